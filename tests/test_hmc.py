"""nuts and hmc against exact posteriors; initial points, mass matrices, what is stored, errors.

Statistical bands are |z| < 5 of the estimator's own standard error, sd / sqrt(ESS), fixed keys: a
false alarm has probability 6e-7 for each number compared, below 1e-4 over this file.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import InitStrategy, hmc, kernels, nuts
from weft.inference.results import diagnostics
from weft.inference.run.adaptation import MassLayout
from weft.ppl.stage.errors import AddressError, DensityError, ObservationError, WeftError

from weft import deterministic, gen, sample

# These chains are short and their models small: compiling them is what costs.
pytestmark = pytest.mark.usefixtures("quick")

BAND = 5.0


def z_scores(draws: Any, mean: Any, sd: Any) -> np.ndarray:
    """Of means and standard deviations of draws (chain, draw, ...), against exact ones."""
    draws, mean, sd = np.asarray(draws), np.asarray(mean), np.asarray(sd)
    ess = np.asarray(diagnostics.ess(draws, kind="mean"))
    square = (draws - mean) ** 2
    ess2 = np.asarray(diagnostics.ess(square, kind="mean"))
    error = square.std((0, 1)) / np.sqrt(ess2)
    return np.stack(
        [
            (draws.mean((0, 1)) - mean) / (sd / np.sqrt(ess)),
            (square.mean((0, 1)) - sd**2) / error,
        ]
    )


@gen
def regression(x: Any) -> None:
    """Conjugate: weights N(0, 2^2), noise 0.5; the scales of the columns differ by 30."""
    w = sample("w", dist.Normal(0.0, 2.0).expand([x.shape[1]]))
    deterministic("first", w[0])
    sample("y", dist.Normal(x @ w, 0.5), dims=("row",))


def conjugate() -> tuple[Any, np.ndarray, np.ndarray]:
    """A target, and the mean and covariance of its posterior."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)) * np.array([1.0, 0.1, 3.0])
    x[:, 2] += 2 * x[:, 0]
    y = x @ np.array([1.0, -2.0, 0.5]) + 0.5 * rng.normal(size=20)
    precision = x.T @ x / 0.25 + np.eye(3) / 4.0
    covariance = np.linalg.inv(precision)
    target = regression(jnp.asarray(x, jnp.float32)).given({"y": jnp.asarray(y, jnp.float32)})
    return target, covariance @ (x.T @ y) / 0.25, covariance


SHORT = {"num_warmup": 500, "num_samples": 500}


ALGORITHMS = {"nuts": nuts(**SHORT), "dense": nuts(**SHORT, dense_mass=True), "hmc": hmc(**SHORT)}


@functools.cache
def conjugate_draws(name: str) -> Any:
    return ALGORITHMS[name].run(jax.random.key(1), conjugate()[0], progress=False)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_conjugate_regression(name: str) -> None:
    _, mean, covariance = conjugate()
    draws = conjugate_draws(name)
    z = z_scores(draws.choices["w"], mean, np.sqrt(np.diag(covariance)))
    assert np.abs(z).max() < BAND, z
    assert np.array_equal(draws.derived["first"], draws.choices["w"][..., 0])
    assert int(draws.stats["diverging"].sum()) == 0
    assert 0.6 < float(draws.stats["acceptance_rate"].mean()) < 0.99


@gen
def skewed() -> None:
    """Asymmetric, on three supports: a sign error or a missing Jacobian shows."""
    sample("rate", dist.Gamma(2.0, 3.0))
    sample("share", dist.Beta(2.0, 5.0))
    sample("parts", dist.Dirichlet(jnp.array([1.0, 2.0, 4.0])))


@pytest.mark.slow
def test_constrained_supports() -> None:
    algorithm = nuts(num_warmup=300, num_samples=1000, dense_mass=["share", "rate"])
    draws = algorithm.run(jax.random.key(2), skewed().given(), progress=False)
    for name, law in (("rate", dist.Gamma(2.0, 3.0)), ("share", dist.Beta(2.0, 5.0))):
        z = z_scores(draws.choices[name], law.mean, jnp.sqrt(law.variance))
        assert np.abs(z).max() < BAND, (name, z)
    law = dist.Dirichlet(jnp.array([1.0, 2.0, 4.0]))
    z = z_scores(draws.choices["parts"], law.mean, jnp.sqrt(law.variance))
    assert np.abs(z).max() < BAND, z


@pytest.mark.slow
def test_blocks_of_the_mass_matrix() -> None:
    """The metric of a layout is the one of the matrix it stands for."""
    rng = np.random.default_rng(0)
    layout = MassLayout.make(5, [np.array([3, 1])])
    block = np.array([[2.0, 0.5], [0.5, 1.0]])
    inverse_mass = (jnp.array([1.0, 3.0, 0.2]), jnp.asarray(block))
    whole = np.diag([1.0, 0, 3.0, 0, 0.2])
    whole[np.ix_([3, 1], [3, 1])] = block
    metric = layout.metric(inverse_mass)
    p, q = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=5))
    assert np.array_equal(layout.join(layout.split(p)), p)
    np.testing.assert_allclose(metric.kinetic_energy(p), 0.5 * p @ whole @ p, rtol=1e-5)
    for total in (p + q, p - q):
        rho = total - (p + q) / 2
        expected = bool(((whole @ p) @ rho <= 0) | ((whole @ q) @ rho <= 0))
        assert bool(metric.check_turning(p, q, total)) == expected
    keys = jax.random.split(jax.random.key(0), 20_000)
    momenta = np.asarray(jax.vmap(lambda k: metric.sample_momentum(k, p))(keys))
    mass = np.linalg.inv(whole)
    found = np.cov(momenta.T)
    error = np.sqrt((np.outer(np.diag(mass), np.diag(mass)) + mass**2) / 20_000)
    assert (np.abs(found - mass) / error).max() < BAND


@pytest.mark.slow
def test_dense_over_unknown_addresses() -> None:
    target, *_ = conjugate()
    with pytest.raises(AddressError, match="dense_mass: no address 'v'"):
        nuts(dense_mass=["v"]).run(jax.random.key(0), target)
    with pytest.raises(WeftError, match="in two blocks"):
        nuts(dense_mass=[("w",), ("w",)]).run(jax.random.key(0), target)


TINY = hmc(num_warmup=20, num_samples=12, num_chains=2, num_steps=2, step_size=0.1)


@pytest.mark.slow
def test_keep_and_thin_are_a_selection() -> None:
    """They change what is stored, not what is drawn."""
    target, *_ = conjugate()
    whole = TINY.run(jax.random.key(0), target, progress=False)
    fewer = dataclasses.replace(TINY, thin=5, keep=["first"])
    part = fewer.run(jax.random.key(0), target, progress=False)
    assert part.choices == {}
    assert np.array_equal(part.derived["first"], whole.derived["first"][:, [4, 9]])
    assert np.array_equal(part.stats["lp"], whole.stats["lp"][:, [4, 9]])
    with pytest.raises(AddressError, match="keep: no address 'frist'.*'first'"):
        dataclasses.replace(TINY, keep=["frist"]).run(jax.random.key(0), target)
    with pytest.raises(WeftError, match="sequence of addresses"):
        nuts(keep="first")


@pytest.mark.slow
def test_stats_have_arviz_names() -> None:
    draws = conjugate_draws("nuts")
    names = {"lp", "acceptance_rate", "diverging", "energy", "n_steps", "step_size"}
    assert set(draws.stats) == names | {"tree_depth", "reached_max_treedepth"}
    assert all(s.shape == (4, 500) for s in draws.stats.values())
    assert (draws.stats["energy"] >= -draws.stats["lp"] - 1e-3).all()
    assert (draws.stats["n_steps"] < 2 ** (draws.stats["tree_depth"] + 1)).all()
    assert draws.warmup["divergences"].shape == (4,)
    draws = conjugate_draws("hmc")
    assert set(draws.stats) == names
    assert (draws.stats["energy"] >= -draws.stats["lp"] - 1e-3).all()


# --- where chains begin
# -----------------------------------------------------------------------------------------------


@gen
def narrow() -> None:
    """A prior that rarely leaves a finite density: u must lie in a hundredth of its range."""
    u = sample("u", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(jnp.where(jnp.abs(u - 0.3) < 0.02, u, jnp.nan), 1.0))


@pytest.mark.slow
def test_initial_points_are_tried_until_one_is_finite() -> None:
    target = narrow().given({"y": 0.0})
    start = InitStrategy(num_tries=400)(jax.random.key(0), target.staged(), 4)
    assert np.isfinite(start.log_density).all()
    assert (np.abs(start.position - 0.3) < 0.02).all()


@pytest.mark.slow
def test_no_initial_point_names_the_sites_and_values() -> None:
    @gen
    def broken() -> None:
        a = sample("a", dist.Normal(0.0, 1.0))
        sample("b", dist.Normal(a, 1.0))
        sample("y", dist.Normal(jnp.log(-1.0 - a**2), 1.0))

    with pytest.raises(
        DensityError, match=r"(?s)any of the points tried.*'y' is nan.*a = .*b = .*init=choices"
    ) as e:
        TINY.run(jax.random.key(0), broken().given({"y": 0.0}), progress=False)
    assert "'b' is" not in str(e.value)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_named() -> None:
    @gen
    def kink() -> None:
        a = sample("a", dist.Normal(0.0, 1.0))
        sample("y", dist.Normal(jnp.sqrt(a * 0.0), 1.0))

    with pytest.raises(DensityError, match="gradient with respect to 'a' is not finite"):
        TINY.run(jax.random.key(0), kink().given({"y": 0.0}), progress=False)


@pytest.mark.slow
def test_init_from_choices() -> None:
    target, mean, _ = conjugate()
    still = dataclasses.replace(TINY, num_warmup=0, num_samples=1, step_size=1e-6)
    w = jnp.asarray(mean, jnp.float32)
    one = still.run(jax.random.key(0), target, init={"w": w}, progress=False)
    np.testing.assert_allclose(one["w"][:, 0], np.stack([w, w]), atol=1e-4)
    both = still.run(jax.random.key(0), target, init={"w": jnp.stack([w, w + 1])}, progress=False)
    np.testing.assert_allclose(both["w"][1, 0], w + 1, atol=1e-4)
    with pytest.raises(WeftError, match=r"'w' has shape \(4, 3\), expected \(3,\), or \(2, 3\)"):
        still.run(jax.random.key(0), target, init={"w": jnp.zeros((4, 3))}, progress=False)
    with pytest.raises(AddressError, match="init: no address 'v'"):
        still.run(jax.random.key(0), target, init={"v": w}, progress=False)


@pytest.mark.slow
def test_init_of_a_part_leaves_the_rest_to_be_found() -> None:
    still = dataclasses.replace(TINY, num_warmup=0, num_samples=1, step_size=1e-6)
    draws = still.run(jax.random.key(0), skewed().given(), init={"rate": 7.0}, progress=False)
    np.testing.assert_allclose(draws["rate"][:, 0], 7.0, rtol=1e-4)
    assert draws["share"][0, 0] != draws["share"][1, 0]


@pytest.mark.slow
def test_init_outside_the_support_is_an_error() -> None:
    with pytest.raises(ObservationError, match="'rate'.*outside the support"):
        TINY.run(jax.random.key(0), skewed().given(), init={"rate": -1.0}, progress=False)


@pytest.mark.slow
def test_init_outside_a_support_that_depends_on_choices() -> None:
    @gen
    def nested() -> None:
        width = sample("width", dist.Exponential(1.0))
        sample("u", dist.Uniform(0.0, width))

    init = {"width": 1.0, "u": 2.0}
    with pytest.raises(DensityError, match="no point to begin at.*init lie outside their supports"):
        TINY.run(jax.random.key(0), nested().given(), init=init, progress=False)


@pytest.mark.slow
def test_improper_priors_begin_in_the_box() -> None:
    @gen
    def flat() -> None:
        mu = sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        sample("y", dist.Normal(mu, 1.0))

    algorithm = hmc(num_warmup=300, num_samples=500)
    draws = algorithm.run(jax.random.key(0), flat().given({"y": 3.0}), progress=False)
    assert np.abs(z_scores(draws["mu"], 3.0, 1.0)).max() < BAND


# --- what cannot be sampled
# -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_to_sample() -> None:
    target, *_ = conjugate()
    observed = target.program.given({"w": jnp.zeros(3), "y": jnp.zeros(20)})
    with pytest.raises(WeftError, match="no latent choices"):
        nuts().run(jax.random.key(0), observed)


@pytest.mark.slow
def test_discrete_latents_are_named() -> None:
    @gen
    def mixture() -> None:
        k = sample("k", dist.Categorical(jnp.array([0.5, 0.5])))
        sample("y", dist.Normal(1.0 * k, 1.0))

    with pytest.raises(DensityError, match=r"discrete: 'k' \(Categorical.*enumeration"):
        nuts().run(jax.random.key(0), mixture().given({"y": 0.0}))


@pytest.mark.slow
def test_divergences_are_counted() -> None:
    """Neal's funnel, with steps far too long for its neck."""

    @gen
    def funnel() -> None:
        v = sample("v", dist.Normal(0.0, 3.0))
        sample("x", dist.Normal(0.0, jnp.exp(v / 2)).expand([9]))

    algorithm = nuts(num_warmup=200, num_samples=200, target_acceptance=0.6)
    draws = algorithm.run(jax.random.key(0), funnel().given(), progress=False)
    assert int(draws.stats["diverging"].sum()) > 0
    assert "diverge" in draws.summary().verdict


@gen
def jump() -> None:
    s = sample("s", dist.Normal(0.0, 1.0))
    jax.lax.cond(
        s > 0.5,
        lambda: sample("a", dist.Normal(2.0, 1.0)),
        lambda: sample("b", dist.Normal(-2.0, 0.5)),
    )


@pytest.mark.slow
def test_branches_on_a_continuous_choice_warn_and_are_right() -> None:
    algorithm = nuts(num_warmup=300, num_samples=1000)
    with pytest.warns(UserWarning, match="depends on the continuous choice 's'.*jumps"):
        draws = algorithm.run(jax.random.key(0), jump().given(), progress=False)
    up = np.asarray(draws.choices["s"] > 0.5)
    assert np.array_equal(draws.active["a"], up)
    assert np.array_equal(draws.active["b"], ~up)
    p = float(1 - dist.Normal(0.0, 1.0).cdf(0.5))
    ess = float(diagnostics.ess(up.astype(float), kind="mean"))
    assert abs(up.mean() - p) < BAND * np.sqrt(p * (1 - p) / ess)
    a = np.asarray(draws.choices["a"])
    assert abs(a[up].mean() - 2.0) < BAND / np.sqrt(ess * p / 2)
    assert "s" not in draws.active


@pytest.mark.slow
def test_double_precision(x64: None) -> None:
    algorithm = hmc(num_warmup=100, num_samples=100, num_chains=2)
    draws = algorithm.run(jax.random.key(0), jump_free().given({"y": 1.0}), progress=False)
    assert draws.choices["mu"].dtype == jnp.float64
    assert np.abs(z_scores(draws.choices["mu"], 0.5, 0.5**0.5)).max() < BAND


@gen
def jump_free() -> None:
    mu = sample("mu", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(mu, 1.0))


@pytest.mark.slow
def test_kernels_leave_a_density_invariant() -> None:
    """From exact draws of a skewed law, exact draws: Gumbel, whose mean and variance are known."""

    def log_density(x: Any) -> Any:
        return dist.Gumbel(0.0, 1.0).log_prob(x).sum()

    start = jax.random.gumbel(jax.random.key(0), (20_000, 1))
    for kernel in (kernels.hmc(0.7, 3), kernels.nuts(0.7)):
        bound = kernel.on(log_density)

        def move(key: Any, x: Any, bound: Any = bound) -> Any:
            return bound.step(key, bound.init(x))[0].position

        moved = jax.jit(jax.vmap(move))(jax.random.split(jax.random.key(1), 20_000), start)
        x = np.asarray(moved, float)[:, 0]
        assert abs(x.mean() - np.euler_gamma) / (x.std() / np.sqrt(x.size)) < BAND
        square = (x - np.euler_gamma) ** 2
        assert abs(square.mean() - np.pi**2 / 6) / (square.std() / np.sqrt(x.size)) < BAND
