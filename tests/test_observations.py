"""Data against models: what ``given`` takes, parts of sites, forecasts, prediction, densities by row, weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import lax
from weft.ppl import DensityError, ObservationError, condition, loop, mask
from weft.ppl.stage.addresses import flatten

from weft import deterministic, factor, gen, observed, repeat, sample, scale

KEY = jax.random.key(0)
N = dist.Normal


def logn(x: Any, mean: Any = 0.0, sd: Any = 1.0) -> Any:
    """The normal log density, in double precision and by hand."""
    z = (np.asarray(x, float) - mean) / sd
    return -0.5 * z**2 - np.log(sd) - 0.5 * math.log(2 * math.pi)


def close(a: Any, b: Any, tol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=tol, atol=tol)


@gen
def groups(n: int = 3) -> Any:
    """A mean and its rows."""
    mu = sample("mu", N(0.0, 2.0))
    return repeat(lambda: sample("y", N(mu, 1.0)), n, axis_name="row")


@gen
def walk(steps: int = 4) -> Any:
    """A hidden random walk and what is seen of it."""

    def step(z: Any, _: Any) -> Any:
        z = sample("z", N(z, 1.0))
        return z, sample("y", N(z, 0.5))

    return lax.scan(step, 0.0, None, length=steps)[1]


@gen
def autoregression(steps: int = 4) -> Any:
    def step(y: Any, _: Any) -> Any:
        y = sample("y", N(0.5 * y, 1.0))
        return y, y

    return lax.scan(step, 1.0, None, length=steps)[1]


# --- what given takes -----------------------------------------------------------------------------


@gen
def mixed() -> None:
    sample("real", N(jnp.zeros(2), 1.0))
    sample("count", dist.Poisson(jnp.array([1.0, 2.0])))
    sample("flag", dist.Bernoulli(0.5))
    sample("inner", gen(lambda: sample("x", N(0.0, 1.0)))())


REFERENCE = (
    logn([1, 2]).sum()
    + (2 * math.log(1) - 1 - math.log(2))
    + (3 * math.log(2) - 2 - math.log(6))
    + math.log(0.5)
    + logn(1.0)
)


@pytest.mark.parametrize(
    "data",
    [
        {"real": [1, 2], "count": [2, 3], "flag": True, "inner": {"x": 1}},
        {"real": np.array([1, 2]), "count": np.array([2.0, 3.0]), "flag": 1.0, "inner.x": 1.0},
        {
            "real": (1.0, 2.0),
            "count": np.array([2, 3], np.uint8),
            "flag": np.bool_(True),
            ("inner", "x"): [[1.0]][0][0],
        },
        {
            "real": jnp.array([1.0, 2.0]),
            "count": jnp.array([2, 3]),
            "flag": jnp.array(1),
            "inner": {"x": np.float64(1)},
        },
        {
            "real": np.array([1, 2], np.float16),
            "count": [2, 3.0],
            "flag": np.int64(1),
            "inner": {"x": np.int8(1)},
        },
    ],
)
def test_casts_that_keep_the_value_are_silent(data: Any) -> None:
    target = mixed().given(data)
    assert target.latents == ()
    kinds = {a: x.dtype for a, x in flatten(target.observed).items()}
    assert kinds == {
        "real": jnp.float32,
        "count": jnp.int32,
        "flag": jnp.int32,
        "inner.x": jnp.float32,
    }
    close(target.log_density({}), REFERENCE)
    close(mixed().log_density(data), REFERENCE)
    trace, weight = mixed().generate(KEY, data)
    close(weight, REFERENCE)
    close(trace.log_density, REFERENCE)


def test_given_under_tracing() -> None:
    """Data are arguments: a target made inside a jitted function, or passed into one."""

    def density(y: Any, mu: Any) -> Any:
        return groups().given({"y": y}).log_density({"mu": mu})

    y = jnp.array([1.0, 2.0, 3.0])
    own = logn(0.5, 0, 2) + logn(y, 0.5).sum()
    close(jax.jit(density)(y, 0.5), own)
    close(jax.jit(lambda t, mu: t.log_density({"mu": mu}))(groups().given({"y": y}), 0.5), own)
    close(
        jax.vmap(density, (0, None))(jnp.stack([y, y + 1]), 0.5),
        [own, logn(0.5, 0, 2) + logn(y + 1, 0.5).sum()],
    )
    close(jax.grad(density)(y, 0.5), 0.5 - y)


def test_no_rows() -> None:
    for n, model in ((0, groups), (0, walk)):
        target = model(n).given({"y": np.zeros(n)})
        assert "y" not in target.latents
    close(groups(0).given({"y": np.zeros(0)}).log_density({"mu": 0.3}), logn(0.3, 0.0, 2.0))


def test_given_nothing() -> None:
    target = groups().given()
    assert target.latents == ("mu", "y")
    close(target.log_density({"mu": 0.0, "y": [0, 0, 0]}), logn(0, 0, 2) + 3 * logn(0))


def test_the_data_are_kept_as_given() -> None:
    target = groups().given({"y": [1, 2, 3]})
    assert target.observed["y"].tolist() == [1.0, 2.0, 3.0]
    assert target.latent_shapes() == {"mu": jax.ShapeDtypeStruct((), jnp.float32)}


# --- part of a site -------------------------------------------------------------------------------

SEEN = np.array([True, False, True])
HOLES = np.array([1.0, np.nan, 3.0])


def test_impute() -> None:
    target = groups().given({"y": observed(HOLES, where=SEEN)})
    assert target.latents == ("mu", "y")
    own = logn(0.5, 0, 2) + logn([1, 7, 3], 0.5).sum()
    close(
        target.log_density({"mu": 0.5, "y": [99.0, 7.0, np.nan]}), own
    )  # what was seen is not asked
    flat = target.unconstrain()
    assert flat.shapes == {"mu": (), "y": (1,)}
    assert flat.flat.size == 2
    close(flat.log_density({"mu": 0.5, "y": [7.0]}), own)
    close(flat.to_choices({"mu": 0.5, "y": [7.0]})["y"], [1, 7, 3])
    close(flat.from_choices({"mu": 0.5, "y": [0.0, 7.0, 0.0]})["y"], [7.0])
    gradient = jax.grad(flat.log_density)({"mu": 0.5, "y": jnp.array([7.0])})
    close(gradient["y"], [-6.5])
    close(gradient["mu"], -0.5 / 4 + 0.5 + 6.5 + 2.5)
    close(target.log_densities({"mu": 0.5, "y": [0, 7, 0]}, by="row"), logn([1, 0, 3], 0.5) * SEEN)
    trace, weight = target.generate(KEY, {"mu": 0.5})
    close(trace.choices["y"][SEEN], [1, 3])
    assert np.isfinite(trace.choices["y"][1])
    close(weight, logn(0.5, 0, 2) + logn([1, 3], 0.5).sum())


def test_drop() -> None:
    target = groups().given({"y": observed(HOLES, where=SEEN, missing="drop")})
    assert target.latents == ("mu",)
    own = logn(0.5, 0, 2) + logn([1, 3], 0.5).sum()
    close(target.log_density({"mu": 0.5}), own)
    flat = target.unconstrain()
    assert flat.shapes == {"mu": ()}
    close(flat.log_density({"mu": 0.5}), own)
    close(jax.grad(flat.log_density)({"mu": 0.5})["mu"], -0.125 + 0.5 + 2.5)
    close(target.log_densities({"mu": 0.5})["y"], logn([1, 0, 3], 0.5) * SEEN)
    close(target.log_densities({"mu": 0.5}, by="row"), logn([1, 0, 3], 0.5) * SEEN)
    _, weight = target.generate(KEY, {"mu": 0.5})
    close(weight, own)


@pytest.mark.parametrize("missing", ["impute", "drop"])
def test_all_or_nothing_seen(missing: str) -> None:
    everything = observed([1.0, 2.0, 3.0], where=np.ones(3, bool), missing=missing)
    target = groups().given({"y": everything})
    assert target.latents == ("mu",)
    close(target.log_density({"mu": 0.5}), logn(0.5, 0, 2) + logn([1, 2, 3], 0.5).sum())
    nothing = observed(np.full(3, np.nan), where=np.zeros(3, bool), missing=missing)
    target = groups().given({"y": nothing})
    latents = {"mu": 0.5} if missing == "drop" else {"mu": 0.5, "y": [1.0, 2.0, 3.0]}
    rest = 0 if missing == "drop" else logn([1, 2, 3], 0.5).sum()
    assert target.latents == tuple(latents)
    close(target.log_density(latents), logn(0.5, 0, 2) + rest)


@pytest.mark.parametrize("where", [np.zeros(2, bool), np.array([True, False])])
@pytest.mark.parametrize(
    "make",
    [lambda s: dist.LogNormal(0.0, s), lambda s: dist.Gamma(s, s), lambda s: dist.Beta(s, s)],
)
def test_gradients_are_finite_beside_what_is_dropped(make: Any, where: Any) -> None:
    """What stands in for an unseen value is of the support, however few were seen."""

    @gen
    def model() -> None:
        s = sample("s", dist.HalfNormal(1.0))
        repeat(lambda: sample("y", make(s)), 2)

    target = model().given(
        {"y": observed(np.where(where, 0.5, np.nan), where=where, missing="drop")}
    )
    value, gradient = jax.value_and_grad(target.unconstrain().log_density)({"s": jnp.zeros(())})
    assert np.isfinite(value)
    assert np.isfinite(gradient["s"])


def test_part_of_vectors() -> None:
    """``where`` has the site's shape without its event axes."""
    d = lambda mu: dist.MultivariateNormal(jnp.stack([mu, mu]), jnp.eye(2))  # noqa: E731

    @gen
    def model() -> None:
        mu = sample("mu", N(0.0, 1.0))
        repeat(lambda: sample("y", d(mu)), 3, axis_name="row")

    y = np.array([[1.0, 2.0], [np.nan, 0.0], [3.0, 4.0]])
    prior = logn(0.5)
    target = model().given({"y": observed(y, where=SEEN)})
    flat = target.unconstrain()
    assert flat.shapes == {"mu": (), "y": (1, 2)}
    own = prior + logn([[1, 2], [5, 6], [3, 4]], 0.5).sum()
    close(flat.log_density({"mu": 0.5, "y": [[5.0, 6.0]]}), own)
    close(flat.to_choices({"mu": 0.5, "y": [[5.0, 6.0]]})["y"], [[1, 2], [5, 6], [3, 4]])
    close(target.log_density({"mu": 0.5, "y": [[0, 0], [5, 6], [0, 0]]}), own)
    dropped = model().given({"y": observed(y, where=SEEN, missing="drop")})
    close(dropped.log_density({"mu": 0.5}), prior + logn([[1, 2], [3, 4]], 0.5).sum())


def test_part_of_constrained_vectors() -> None:
    """The unconstrained array of a simplex is shorter than the simplex."""

    @gen
    def model() -> None:
        repeat(lambda: sample("p", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0]))), 3)

    p = np.array([[0.2, 0.3, 0.5], [np.nan] * 3, [0.1, 0.1, 0.8]])
    target = model().given({"p": observed(p, where=SEEN)})
    flat = target.unconstrain()
    assert flat.shapes == {"p": (1, 2)}
    z = {"p": jnp.array([[0.3, -0.2]])}
    bijection = dist.biject_to(dist.constraints.simplex)
    x = bijection(z["p"])
    full = np.where(SEEN[:, None], p, x)
    own = dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])).log_prob(full).sum()
    close(flat.log_density(z), own + bijection.log_abs_det_jacobian(z["p"], x).sum())
    close(flat.to_choices(z)["p"], full)
    close(flat.from_choices({"p": full})["p"], z["p"], 1e-4)


def test_part_of_a_vmapped_lane_with_its_own_mean() -> None:
    @gen
    def model(x: Any) -> None:
        jax.vmap(lambda m: sample("y", dist.LogNormal(m, 1.0)), axis_name="row")(x)

    x = jnp.array([0.0, 1.0, 2.0])
    target = model(x).given({"y": observed([1.0, -1.0, 3.0], where=SEEN)})
    z = {"y": jnp.array([0.7])}
    own = dist.LogNormal(x, 1.0).log_prob(jnp.array([1.0, math.exp(0.7), 3.0])).sum() + 0.7
    close(target.unconstrain().log_density(z), own)
    # data that are nowhere seen may be outside the support, or no number at all
    close(target.log_density({"y": [1.0, math.exp(0.7), 3.0]}), own - 0.7)


def test_part_of_a_scanned_site() -> None:
    where = np.array([True, True, False, True])
    y = np.array([1.0, 2.0, np.nan, 0.0])
    z = np.array([0.1, 0.2, 0.3, 0.4])
    prior = logn(z, np.r_[0, z[:-1]]).sum()
    imputed = walk().given({"y": observed(y, where=where)})
    own = prior + logn([1, 2, 5, 0], z, 0.5).sum()
    close(imputed.log_density({"z": z, "y": [0, 0, 5, 0]}), own)
    flat = imputed.unconstrain()
    assert flat.shapes == {"z": (4,), "y": (1,)}
    close(flat.log_density({"z": z, "y": np.array([5.0])}), own)
    dropped = walk().given({"y": observed(y, where=where, missing="drop")})
    close(dropped.log_density({"z": z}), prior + logn([1, 2, 0], z[where], 0.5).sum())
    close(dropped.unconstrain().log_density({"z": z}), prior + logn([1, 2, 0], z[where], 0.5).sum())


def test_part_of_a_scanned_site_that_reads_itself() -> None:
    """An autoregression needs its missing values: imputed they are right, dropped they would be wrong."""
    where = np.array([True, False, True, True])
    y = np.array([0.3, np.nan, 0.5, 0.7])
    full = np.array([0.3, 0.4, 0.5, 0.7])
    own = logn(full, 0.5 * np.r_[1, full[:-1]]).sum()
    target = autoregression().given({"y": observed(y, where=where)})
    close(target.log_density({"y": full}), own)
    close(target.unconstrain().log_density({"y": np.array([0.4])}), own)
    with pytest.raises(DensityError, match=r"'y' cannot be dropped.*'y' depend"):
        autoregression().given({"y": observed(y, where=where, missing="drop")})


def test_drop_within_a_vmapped_scan() -> None:
    series = gen(lambda: sample("part", walk(3)))
    program = gen(lambda: repeat(lambda: sample("lane", series()), 2, axis_name="series"))()
    assert program.sites["lane.part.y"].shape == (2, 3)
    where = np.array([[True, False, True], [False, True, True]])
    y, z = np.arange(6.0).reshape(2, 3), 0.1 * np.arange(6.0).reshape(2, 3)
    target = program.given({"lane": {"part": {"y": observed(y, where=where, missing="drop")}}})
    assert target.latents == ("lane.part.z",)
    prior = logn(z, np.c_[np.zeros(2), z[:, :-1]]).sum()
    close(target.log_density({"lane.part.z": z}), prior + (logn(y, z, 0.5) * where).sum())
    per_series = (logn(y, z, 0.5) * where).sum(1)
    close(target.log_densities({"lane.part.z": z}, by="series"), per_series)


def test_scalar_observed_or_not() -> None:
    for where, latents in ((True, ("mu",)), (False, ("mu", "x"))):
        program = gen(lambda: sample("x", N(sample("mu", N(0.0, 1.0)), 1.0)))()
        target = program.given({"x": observed(2.0, where=where)})
        assert target.latents == latents
        choices = {"mu": 0.5, "x": 3.0}
        x = 2.0 if where else 3.0
        close(target.log_density({a: choices[a] for a in latents}), logn(0.5) + logn(x, 0.5))


def test_mask_that_is_traced() -> None:
    """Where the mask is not known, every element has a coordinate, and those of the seen ones are N(0, 1)."""

    def density(y: Any, where: Any, z: Any) -> Any:
        return groups().given({"y": observed(y, where=where)}).unconstrain().log_density(z)

    z = {"mu": 0.5, "y": jnp.array([0.2, 7.0, -0.3])}
    own = logn(0.5, 0, 2) + logn([1, 7, 3], 0.5).sum() + logn([0.2, -0.3]).sum()
    close(jax.jit(density)(HOLES, SEEN, z), own)
    masks = np.stack([SEEN, ~SEEN])
    other = logn(0.5, 0, 2) + logn([0.2, 2, -0.3], 0.5).sum() + logn(7.0)
    close(jax.vmap(density, (None, 0, None))(jnp.array([1.0, 2.0, 3.0]), masks, z), [own, other])
    gradient = jax.grad(lambda z: jax.jit(density)(HOLES, SEEN, z))(z)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))

    def dropped(y: Any, where: Any) -> Any:
        return (
            groups().given({"y": observed(y, where=where, missing="drop")}).log_density({"mu": 0.5})
        )

    close(jax.jit(dropped)(HOLES, SEEN), logn(0.5, 0, 2) + logn([1, 3], 0.5).sum())


def test_part_of_a_discrete_site() -> None:
    program = gen(lambda: repeat(lambda: sample("k", dist.Poisson(2.0)), 3))()
    dropped = program.given({"k": observed([1, np.nan, 2], where=SEEN, missing="drop")})
    own = dist.Poisson(2.0).log_prob(np.array([1, 2])).sum()
    close(dropped.unconstrain().log_density({}), own)
    imputed = program.given({"k": observed([1, -5, 2], where=SEEN)})
    assert imputed.latents == ("k",)
    with pytest.raises(DensityError, match="'k'.*discrete"):
        imputed.unconstrain()


def test_observing_choices_that_are_scored_or_generated() -> None:
    """``observed`` is for ``generate`` too: the seen part is given and weighed, the rest drawn."""
    trace, weight = groups().generate(KEY, {"mu": 0.5, "y": observed(HOLES, where=SEEN)})
    close(trace.choices["y"][SEEN], [1, 3])
    close(weight, logn(0.5, 0, 2) + logn([1, 3], 0.5).sum())
    close(trace.log_density, logn(0.5, 0, 2) + logn(trace.choices["y"], 0.5).sum())
    free = groups().generate(KEY, {"mu": 0.5})[0].choices["y"]
    assert trace.choices["y"][1] == free[1]  # a draw does not depend on what else is given


# --- forecasts ------------------------------------------------------------------------------------


def test_forecast() -> None:
    """Data shorter than the time axis: the rest is to come."""
    target = walk().given({"y": [1.0, 2.0]})
    assert target.latents == ("z", "y")
    z, y = np.array([0.1, 0.2, 0.3, 0.4]), np.array([1.0, 2.0, 5.0, 6.0])
    own = logn(z, np.r_[0, z[:-1]]).sum() + logn(y, z, 0.5).sum()
    close(target.log_density({"z": z, "y": y}), own)
    flat = target.unconstrain()
    assert flat.shapes == {"z": (4,), "y": (2,)}
    close(flat.log_density({"z": z, "y": y[2:]}), own)
    trace, weight = target.generate(KEY)
    close(trace.choices["y"][:2], [1.0, 2.0])
    seen = logn([1, 2], trace.choices["z"][:2], 0.5).sum()
    close(weight, seen)


def test_forecast_of_what_reads_itself() -> None:
    target = autoregression(5).given({"y": [0.3, 0.4]})
    full = np.array([0.3, 0.4, 0.5, 0.6, 0.7])
    close(target.log_density({"y": full}), logn(full, 0.5 * np.r_[1, full[:-1]]).sum())
    assert target.unconstrain().shapes == {"y": (3,)}
    trace, _ = target.generate(KEY)
    close(trace.choices["y"][:2], [0.3, 0.4])
    close(trace.value, trace.choices["y"])


def test_forecast_with_holes_and_in_lanes() -> None:
    program = gen(lambda: repeat(lambda: sample("s", walk(3)), 2, axis_name="series"))()
    y = np.array([[1.0, np.nan], [3.0, 4.0]])
    target = program.given({"s.y": observed(y, where=~np.isnan(y))})
    flat = target.unconstrain()
    assert flat.shapes == {"s.z": (2, 3), "s.y": (3,)}  # one hole, two to come
    z = 0.1 * np.arange(6.0).reshape(2, 3)
    full = np.array([[1.0, 7.0, 8.0], [3.0, 4.0, 9.0]])
    own = logn(z, np.c_[np.zeros(2), z[:, :-1]]).sum() + logn(full, z, 0.5).sum()
    close(flat.log_density({"s": {"z": z, "y": np.array([7.0, 8.0, 9.0])}}), own)
    whole = program.given({"s.y": np.array([[1.0, 2.0], [3.0, 4.0]])})
    assert whole.unconstrain().shapes["s.y"] == (2,)


def test_forecast_from_nothing() -> None:
    target = walk().given({"y": np.zeros(0)})
    assert target.unconstrain().shapes == {"z": (4,), "y": (4,)}
    z = np.array([0.1, 0.2, 0.3, 0.4])
    close(
        target.log_density({"z": z, "y": z}), logn(z, np.r_[0, z[:-1]]).sum() + 4 * logn(0, 0, 0.5)
    )


def test_forecast_of_vectors() -> None:
    def step(c: Any, _: Any) -> Any:
        return c, sample("y", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))

    program = gen(lambda: lax.scan(step, 0.0, None, length=3)[1])()
    target = program.given({"y": [[1.0, 2.0]]})
    assert target.unconstrain().shapes == {"y": (2, 2)}
    close(target.log_density({"y": [[0, 0], [3, 4], [5, 6]]}), logn([1, 2, 3, 4, 5, 6]).sum())


def test_only_time_may_end_early() -> None:
    with pytest.raises(ObservationError, match=r"expected shape \(3,\).*got \(2,\)"):
        groups().given({"y": [1.0, 2.0]})
    with pytest.raises(ObservationError, match=r"expected shape \(4,\).*got \(5,\)"):
        walk().given({"y": np.zeros(5)})
    program = gen(lambda: repeat(lambda: sample("s", walk(3)), 2))()
    with pytest.raises(ObservationError, match=r"expected shape \(2, 3\).*got \(1, 3\)"):
        program.given({"s.y": np.zeros((1, 3))})


def test_forecast_under_tracing() -> None:
    y = jnp.array([1.0, 2.0])
    z = jnp.array([0.1, 0.2, 0.3, 0.4])
    full = jnp.array([0.0, 0.0, 5.0, 6.0])
    density = jax.jit(lambda y: walk().given({"y": y}).log_density({"z": z, "y": full}))
    close(density(y), logn(z, np.r_[0, z[:-1]]).sum() + logn([1, 2, 5, 6], z, 0.5).sum())


# --- data as arguments ----------------------------------------------------------------------------


def test_part_conditioned_part_read() -> None:
    """A model may take its covariates, and even its data, as arguments, and be conditioned on the rest."""

    @gen
    def regression(x: Any, labels: Any) -> None:
        slope = sample("slope", N(0.0, 1.0))
        factor("labels", jnp.sum(dist.Bernoulli(logits=slope * x).log_prob(labels)))
        jax.vmap(lambda x: sample("y", N(slope * x, 1.0)), axis_name="row")(x)

    x, labels, y = np.array([1.0, 2.0]), np.array([0, 1]), np.array([0.5, 1.5])
    target = regression(x, labels).given({"y": y})
    assert target.latents == ("slope",)
    bernoulli = dist.Bernoulli(logits=0.7 * x).log_prob(labels).sum()
    close(target.log_density({"slope": 0.7}), logn(0.7) + bernoulli + logn(y, 0.7 * x).sum())


# --- prediction -----------------------------------------------------------------------------------


@gen
def line(x: Any) -> Any:
    slope = sample("slope", N(0.0, 1.0))
    sd = sample("noise", gen(lambda: sample("sd", dist.HalfNormal(1.0)))())

    def row(x: Any) -> Any:
        mean = deterministic("mean", slope * x)
        return sample("y", N(mean, sd))

    return jax.vmap(row, axis_name="row")(x)


DRAWS = {"slope": np.arange(6.0).reshape(2, 3), "noise": {"sd": np.full((2, 3), 0.01)}}


def test_predict_at_new_inputs() -> None:
    x = np.array([1.0, 10.0])
    found = line(x).predict(KEY, DRAWS)
    assert set(found.choices) == {"y"}
    assert found.choices["y"].shape == (2, 3, 2)
    assert found.active["y"].shape[:2] == (2, 3)
    assert found.value.shape == (2, 3, 2)
    means = DRAWS["slope"][..., None] * x
    close(found.derived["mean"], means)
    assert np.abs(found.choices["y"] - means).max() < 0.1
    assert np.abs(found.choices["y"] - means).min() > 0
    residuals = np.asarray(found.choices["y"] - means).reshape(-1)
    assert len(np.unique(residuals)) == 12


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_predict_does_not_depend_on_the_batch(batch_size: int) -> None:
    x = np.array([1.0, 10.0])
    close(
        line(x).predict(KEY, DRAWS, batch_size=batch_size).choices["y"],
        line(x).predict(KEY, DRAWS).choices["y"],
    )


def test_predict_keeps_what_is_asked() -> None:
    x = np.array([1.0, 10.0])
    whole = line(x).predict(KEY, DRAWS)
    kept = line(x).predict(KEY, DRAWS, keep="y")
    assert flatten(kept.choices).keys() == {"y"}
    assert kept.derived == {}
    assert kept.value is None
    close(kept.choices["y"], whole.choices["y"])
    kept = line(x).predict(KEY, DRAWS, keep=["mean", "noise.*", "slope"])
    assert flatten(kept.choices).keys() == {"slope", "noise.sd"}
    close(kept.choices["slope"], DRAWS["slope"])
    close(kept.derived["mean"], whole.derived["mean"])


def test_predict_draws_what_it_is_not_given() -> None:
    """Also with dotted addresses, one leading axis, none at all, and raw keys."""
    x = np.array([1.0])
    found = line(x).predict(KEY, {"noise.sd": np.full(5, 0.01)})
    assert found.choices["slope"].shape == (5,)
    assert len(np.unique(found.choices["slope"])) == 5
    single = line(x).predict(KEY, {"slope": 2.0, "noise.sd": 0.01})
    assert single.choices["y"].shape == (1,)
    assert abs(single.choices["y"][0] - 2.0) < 0.1
    prior = line(x).predict(jax.random.PRNGKey(0), {})
    assert set(flatten(prior.choices)) == {"slope", "noise.sd", "y"}


def test_predict_is_generate() -> None:
    """Draw i is that of the key with i folded in."""
    x = np.array([1.0, 10.0])
    found = line(x).predict(KEY, DRAWS)
    one = {"slope": DRAWS["slope"][1, 2], "noise.sd": 0.01}
    trace, _ = line(x).generate(jax.random.fold_in(KEY, 5), one)
    close(found.choices["y"][1, 2], trace.choices["y"])
    close(found.log_density[1, 2], trace.log_density)


def test_predict_from_a_target() -> None:
    """The data are drawn anew; what was missing of them too."""
    x = np.array([1.0, 10.0])
    target = line(x).given({"y": [1.0, 10.0]})
    found = target.predict(KEY, DRAWS)
    close(found.choices["y"], line(x).predict(KEY, DRAWS).choices["y"])
    partly = line(x).given({"y": observed([1.0, np.nan], where=[True, False])})
    found = partly.predict(KEY, {**DRAWS, "y": np.zeros((2, 3, 2))})
    close(found.choices["y"], line(x).predict(KEY, DRAWS).choices["y"])


def test_predict_under_lanes_and_jit() -> None:
    program = gen(lambda xs: jax.vmap(lambda x: sample("line", line(x)), axis_name="task")(xs))
    xs = np.arange(6.0).reshape(3, 2)
    slopes = np.arange(12.0).reshape(4, 3)
    choices = {"line": {"slope": slopes, "noise": {"sd": np.full((4, 3), 0.01)}}}
    found = jax.jit(lambda key: program(xs).predict(key, choices, keep="line.y"))(KEY)
    assert found.choices["line"]["y"].shape == (4, 3, 2)
    assert np.abs(found.choices["line"]["y"] - slopes[..., None] * xs).max() < 0.1


def test_forecast_by_predict() -> None:
    """At more steps than there were data: the state goes on from where the draws leave it."""

    @gen
    def drift(steps: int) -> Any:
        rate = sample("rate", N(0.0, 1.0))
        return lax.scan(
            lambda y, _: ((y := y + rate), sample("y", N(y, 0.01))), 0.0, None, length=steps
        )[1]

    found = drift(5).predict(KEY, {"rate": np.array([1.0, 2.0])})
    assert np.abs(found.choices["y"] - np.outer([1, 2], np.arange(1, 6))).max() < 0.1


# --- densities by site and by row -----------------------------------------------------------------


@gen
def wide() -> None:
    """Axes of every kind."""
    b = sample("b", N(jnp.zeros(2), 1.0), dims=("feature",))
    sample("matrix", N(jnp.zeros((2, 3)), 1.0), dims=("feature", "column"))
    sample("vector", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), dims=("feature",))

    def row(m: Any) -> None:
        sample("y", N(m, 1.0))
        jax.vmap(lambda n: sample("w", N(n, 1.0).to_event(1)), axis_name="column")(
            jnp.zeros((3, 2))
        )

    jax.vmap(row, axis_name="row")(jnp.stack([*b, 0.0, 1.0]))
    lax.scan(
        lambda c, _: (c, repeat(lambda: sample("s", N(0.0, 1.0)), 2, axis_name="series")),
        0.0,
        None,
        length=3,
    )
    factor("f", -1.0)


def wide_choices() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"b": (2,), "matrix": (2, 3), "vector": (2,), "y": (4,), "w": (4, 3, 2), "s": (3, 2)}
    return {a: rng.normal(size=s).astype(np.float32) for a, s in shapes.items()}


def test_axes() -> None:
    sites = wide().sites
    axes = {a: [(x.size, x.name, x.kind) for x in s.axes] for a, s in sites.items()}
    assert axes == {
        "b": [(2, "feature", "batch")],
        "matrix": [(2, "feature", "batch"), (3, "column", "batch")],
        "vector": [],
        "y": [(4, "row", "lanes")],
        "w": [(4, "row", "lanes"), (3, "column", "lanes")],
        "s": [(3, None, "scan"), (2, "series", "lanes")],
        "f": [],
    }
    assert {a: s.event_shape for a, s in sites.items() if s.event_shape} == {
        "vector": (2,),
        "w": (2,),
    }
    assert {a: s.event_dims for a, s in sites.items() if s.event_shape} == {
        "vector": ("feature",),
        "w": (None,),
    }
    assert sites["w"].dims == ("row", "column", None)
    assert {a: s.shape for a, s in wide().shapes().items()} == {
        a: x.shape for a, x in wide_choices().items()
    }


def test_log_densities() -> None:
    """Summed over event axes only, and together the log density."""
    c = wide_choices()
    found = wide().log_densities(c)
    means = np.r_[c["b"], 0.0, 1.0]
    own = {
        "b": logn(c["b"]),
        "matrix": logn(c["matrix"]),
        "vector": logn(c["vector"]).sum(),
        "y": logn(c["y"], means),
        "w": logn(c["w"]).sum(-1),
        "s": logn(c["s"]),
        "f": -1.0,
    }
    assert found.keys() == own.keys()
    for a, density in own.items():
        assert found[a].shape == np.shape(density)
        close(found[a], density)
    close(wide().log_density(c), sum(np.sum(d) for d in own.values()))
    close(wide().log_densities(c, by="row"), own["y"] + own["w"].sum(1))
    close(wide().log_densities(c, by="column"), own["matrix"].sum(0) + own["w"].sum(0))
    close(wide().log_densities(c, by="feature"), own["b"] + own["matrix"].sum(1))
    close(wide().log_densities(c, by="series"), own["s"].sum(0))


def test_log_densities_of_a_target() -> None:
    """By row: those of the data alone, which is what leave-one-out needs."""
    c = wide_choices()
    target = wide().given({"y": c["y"], "s": c["s"]})
    latents = {a: c[a] for a in target.latents}
    means = np.r_[c["b"], 0.0, 1.0]
    close(target.log_densities(latents, by="row"), logn(c["y"], means))
    close(target.log_densities(latents, by="series"), logn(c["s"]).sum(0))
    assert target.log_densities(latents).keys() == c.keys() | {"f"}
    with pytest.raises(ValueError, match=r"sizes 4 and 2|sizes 2 and 4"):
        gen(
            lambda: (
                [
                    repeat(lambda n=n: sample(f"a{n}", N(0.0, 1.0)), n, axis_name="row")
                    for n in (2, 4)
                ]
                and None
            )
        )().log_densities({"a2": np.zeros(2), "a4": np.zeros(4)}, by="row")


def test_log_densities_in_nested_programs() -> None:
    inner = gen(lambda m: repeat(lambda: sample("y", N(m, 1.0)), 2, axis_name="row"))
    program = gen(lambda: [sample("a", inner(0.0)), sample("b", inner(1.0))])()
    y = np.array([0.1, 0.2])
    found = program.log_densities({"a": {"y": y}, "b.y": y})
    close(found["a"]["y"], logn(y))
    close(found["b"]["y"], logn(y, 1.0))
    close(program.log_densities({"a": {"y": y}, "b.y": y}, by="row"), logn(y) + logn(y, 1.0))


def test_dims_of_a_record() -> None:
    program = gen(lambda x: deterministic("d", x, dims=("row",)))(jnp.zeros(3))
    assert [(a.size, a.name) for a in program.sites["d"].axes] == [(3, "row")]
    single = gen(lambda: sample("x", N(jnp.zeros(3), 1.0), dims="row"))()
    assert [a.name for a in single.sites["x"].axes] == ["row"]
    partly = gen(lambda: sample("x", N(jnp.zeros((3, 2)), 1.0), dims=(None, "column")))()
    assert [a.name for a in partly.sites["x"].axes] == [None, "column"]


# --- weights by axis ------------------------------------------------------------------------------


def test_scale_by_axis() -> None:
    """A minibatch: every site under the axis, once, and no other."""
    c = wide_choices()
    plain = {a: float(np.sum(d)) for a, d in wide().log_densities(c).items()}
    total = sum(plain.values())
    rows = plain["y"] + plain["w"]
    columns = plain["w"] + plain["matrix"]
    close(scale(wide, {"row": 5.0})().log_density(c), total + 4 * rows)
    close(scale(wide, {"column": 3.0})().log_density(c), total + 2 * columns)
    close(scale(wide, {"series": 3.0})().log_density(c), total + 2 * plain["s"])
    both = scale(wide, {"row": 5.0, "column": 3.0})()
    close(both.log_density(c), total + 4 * plain["y"] + 2 * plain["matrix"] + 14 * plain["w"])
    close(scale(scale(wide, {"row": 5.0}), {"column": 3.0})().log_density(c), both.log_density(c))
    close(scale(wide, 2.0)().log_density(c), 2 * total)
    close(
        scale(wide, {"vector": 2.0, "f": 3.0})().log_density(c),
        total + plain["vector"] + 2 * plain["f"],
    )
    scaled = scale(wide, {"row": 5.0})().log_densities(c)
    close(scaled["y"], 5 * wide().log_densities(c)["y"])


def test_scale_reaches_into_programs_and_scans() -> None:
    """An axis around a nested program, a scan or a branch, as one inside of them."""

    @gen
    def task(x: Any) -> Any:
        a = sample("a", N(0.0, 1.0))

        def step(c: Any, x: Any) -> Any:
            return c, lax.cond(
                x > 0, lambda: sample("y", N(a, 1.0)), lambda: sample("y", N(-a, 1.0))
            )

        return lax.scan(step, 0.0, x)[1]

    @gen
    def tasks(xs: Any) -> Any:
        mu = sample("mu", N(0.0, 1.0))
        return mu + jax.vmap(lambda x: sample("task", task(x)), axis_name="task")(xs)

    xs = np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    a, y = np.array([0.1, 0.2, 0.3]), np.arange(6.0).reshape(3, 2) / 3
    choices = {"mu": 0.5, "task": {"a": a, "y": y}}
    inside = logn(a).sum() + logn(y, np.sign(xs) * a[:, None]).sum()
    close(tasks(xs).log_density(choices), logn(0.5) + inside)
    close(scale(tasks, {"task": 4.0})(xs).log_density(choices), logn(0.5) + 4 * inside)
    around = gen(lambda xs: sample("outer", scale(tasks, {"task": 4.0})(xs)))
    close(around(xs).log_density({"outer": choices}), logn(0.5) + 4 * inside)
    target = scale(tasks, {"task": 4.0})(xs).given({"task.y": y})
    flat = target.unconstrain()
    close(flat.log_density({"mu": 0.5, "task": {"a": a}}), logn(0.5) + 4 * inside)


def test_scale_of_a_minibatch_is_unbiased() -> None:
    """The mean of the scaled density over all minibatches is that of the whole."""

    @gen
    def model(x: Any) -> None:
        mu = sample("mu", N(0.0, 1.0))
        jax.vmap(lambda x: sample("y", N(mu * x, 1.0)), axis_name="row")(x)

    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.5, 1.0, 2.0, 3.0])
    density = jax.jit(
        lambda x, y: scale(model, {"row": 2.0})(x).given({"y": y}).log_density({"mu": 0.3})
    )
    halves = [density(x[i], y[i]) for i in ([0, 1], [2, 3])]
    close(np.mean(halves), model(x).given({"y": y}).log_density({"mu": 0.3}))


def test_scale_under_a_gradient_and_by_a_traced_number() -> None:
    @gen
    def model() -> None:
        repeat(lambda: sample("y", N(0.0, 1.0)), 2, axis_name="row")

    y = {"y": jnp.array([1.0, 2.0])}
    gradient = jax.grad(lambda c: scale(model, {"row": c})().log_density(y))(3.0)
    close(gradient, logn([1, 2]).sum())
    lanes = jax.vmap(lambda c: scale(model, {"row": c})().log_density(y))(jnp.array([1.0, 2.0]))
    close(lanes, np.array([1, 2]) * logn([1, 2]).sum())


def test_scale_leaves_the_jacobian_alone() -> None:
    program = scale(gen(lambda: sample("s", dist.LogNormal(0.0, 1.0))), 3.0)()
    z = 0.7
    own = 3 * (logn(z) - z) + z
    close(program.given().unconstrain().log_density({"s": z}), own)


# --- what counts ----------------------------------------------------------------------------------


def test_active_flags() -> None:
    @gen
    def model(p: Any) -> None:
        x = lax.cond(p, lambda: sample("left", N(0.0, 1.0)), lambda: sample("right", N(5.0, 1.0)))
        sample("both", N(x, 1.0))
        lax.cond(p, lambda: sample("shared", N(0.0, 1.0)), lambda: sample("shared", N(3.0, 1.0)))

    for p in (True, False):
        trace = model(jnp.array(p)).simulate(KEY)
        flags = {a: bool(np.all(f)) for a, f in flatten(trace.active).items()}
        assert flags == {"left": p, "right": not p, "both": True, "shared": True}
        c = trace.choices
        one, mean = ("left", 0.0) if p else ("right", 5.0)
        shared = logn(c["shared"], 0.0 if p else 3.0)
        close(trace.log_density, logn(c[one], mean) + logn(c["both"], c[one]) + shared)
        found = model(jnp.array(p)).log_densities(c)
        close(found["right" if p else "left"], 0.0)


def test_active_flags_in_lanes_masks_and_loops() -> None:
    @gen
    def model() -> Any:
        def branch(p: Any) -> Any:
            return lax.cond(p, lambda: sample("x", N(jnp.zeros(2), 1.0)), lambda: jnp.zeros(2))

        jax.vmap(branch)(jnp.array([True, False, True]))
        mask(lambda: sample("m", N(jnp.zeros(2), 1.0)), {"m": jnp.array([True, False])})()
        return loop(lambda s: s < 2.5, lambda s: s + 1 + 0 * sample("step", N(0.0, 1.0)), 4, 0.0)

    trace = model().simulate(KEY)
    active = trace.active
    assert np.broadcast_to(active["x"].reshape(3, -1)[:, :1], (3, 1)).ravel().tolist() == [
        True,
        False,
        True,
    ]
    assert active["m"].tolist() == [True, False]
    assert active["step"].tolist() == [True, True, True, False]
    c = trace.choices
    own = logn(np.asarray(c["x"])[[0, 2]]).sum() + logn(c["m"][0]) + logn(c["step"][:3]).sum()
    close(trace.log_density, own)
    close(model().log_density(c), own)


def test_inactive_observations_add_nothing() -> None:
    @gen
    def model(p: Any) -> None:
        jax.vmap(
            lambda p: lax.cond(p, lambda: sample("y", N(0.0, 1.0)), lambda: 0.0), axis_name="row"
        )(p)

    p = np.array([True, False, True])
    target = model(p).given({"y": [1.0, 2.0, 3.0]})
    close(target.log_density({}), logn([1, 3]).sum())
    close(target.log_densities({}, by="row"), logn([1, 2, 3]) * p)


def test_idle_latents_keep_their_prior_in_unconstrained_space() -> None:
    """So that the target stays proper; where their parameters are not finite, N(0, 1) stands in."""

    @gen
    def model(p: Any, sd: Any) -> None:
        x = lax.cond(p, lambda: sample("x", N(1.0, 2.0)), lambda: 0.0)
        masked = mask(lambda: sample("m", dist.LogNormal(0.0, sd)), p)
        sample("y", N(x + 0 * masked(), 1.0))

    z = {"x": jnp.array(0.3), "m": jnp.array(0.7)}
    for p, sd in ((True, 2.0), (False, 2.0)):
        target = model(jnp.array(p), sd).given({"y": 1.0})
        x = 0.3 if p else 0.0
        own = logn(0.3, 1, 2) + logn(0.7, 0, sd) + logn(1.0, x)
        close(target.unconstrain().log_density(z), own)
        plain = (logn(0.3, 1, 2) + logn(0.7, 0, sd) - 0.7) * p + logn(1.0, x)
        close(target.log_density({"x": 0.3, "m": math.exp(0.7)}), plain)
    target = model(jnp.array(False), 0.0).given({"y": 1.0}).unconstrain()
    value, gradient = jax.value_and_grad(target.log_density)(z)
    close(value, logn(0.3, 1, 2) + logn(0.7) + logn(1.0))
    assert all(np.isfinite(g) for g in jax.tree.leaves(gradient))


def test_conditions_inside_and_outside_agree() -> None:
    y = {"y": [1.0, 2.0, 3.0]}
    inside, outside = condition(groups, y)().given(), groups().given(y)
    assert inside.latents == outside.latents == ("mu",)
    close(inside.log_density({"mu": 0.5}), outside.log_density({"mu": 0.5}))
    close(inside.log_densities({"mu": 0.5}, by="row"), outside.log_densities({"mu": 0.5}, by="row"))
    holes = {"y": observed(HOLES, where=SEEN)}
    inside, outside = condition(groups, holes)().given(), groups().given(holes)
    assert inside.latents == outside.latents == ("mu", "y")
    latents = {"mu": 0.5, "y": [0.0, 7.0, 0.0]}
    close(inside.log_density(latents), outside.log_density(latents))
    dropped = {"y": observed(HOLES, where=SEEN, missing="drop")}
    with pytest.raises(ObservationError, match=r"missing='drop'.*'y'.*given\(\).*impute"):
        condition(groups, dropped)().shapes()


def test_what_is_missing_may_be_traced_beside_known_values() -> None:
    @gen
    def model() -> None:
        mu = sample("mu", dist.Normal(0.0, 2.0))
        sample("y", dist.Gamma(jnp.exp(mu), 1.0).expand([3]))

    y, where = jnp.array([1.0, jnp.nan, -1.0]), jnp.array([True, False, False])

    def density(where: Any) -> Any:
        target = model().given({"y": observed(y, where=where, missing="drop")})
        return target.log_density({"mu": 0.5})

    right = logn(0.5, 0.0, 2.0) - 1.0 - math.lgamma(math.exp(0.5))
    np.testing.assert_allclose(jax.jit(density)(where), right, rtol=1e-5)
    np.testing.assert_allclose(density(where), right, rtol=1e-5)
