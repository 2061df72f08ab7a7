"""ArviZ's form of results: groups, dims, coordinates, pointwise log likelihoods. Runs on both lines of ArviZ."""

import pathlib
import warnings
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import xarray
from scipy import stats
from weft.inference import Draws, Particles, load
from weft.inference.results.export import pointwise_log_likelihood
from weft.ppl import deterministic, gen, observed, sample
from weft.ppl.stage.errors import AddressError, WeftError

pytestmark = pytest.mark.slow  # once is enough: not in every lane

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.2x announces 1.0
    import arviz

CHAINS, DRAWS = 2, 30
Y = np.array([1.0, 0.0, -1.0], np.float32)


@gen
def effect():
    return sample("size", dist.Normal(0.0, 1.0))


@gen
def model(x):
    mu = sample("mu", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
    inner = sample("inner", effect())
    deterministic("total", mu[0] + inner)

    def row(xi):
        theta = sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        sample("y", dist.Normal(mu[0] + theta[0] * xi + inner, 2.0))
        sample("z", dist.Bernoulli(jnp.full(2, 0.5)), dims=("kind",))

    jax.vmap(row, axis_name="row")(x)


X = jnp.arange(3.0)
DATA = {"y": Y, "z": np.ones((3, 2), int)}
TARGET = model(X).given(DATA)


def some_draws(target: Any = TARGET, **more: Any) -> Draws:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(CHAINS, DRAWS, *shape)), jnp.float32)

    choices = {"mu": normal(2), "inner": {"size": normal()}, "theta": normal(3, 2)}
    given = {"choices": choices, "derived": {"total": normal()}, "stats": {"lp": normal()}}
    return Draws(**{**given, "target": target, **more})


def log_likelihood(choices: Any) -> np.ndarray:
    """Of y, by SciPy."""
    c = jax.tree.map(np.asarray, choices)
    mean = c["mu"][..., :1] + c["theta"][..., 0] * np.arange(3.0) + c["inner"]["size"][..., None]
    return stats.norm(mean, 2.0).logpdf(Y)


def groups(data: Any) -> set[str]:
    names = data.groups() if callable(data.groups) else data.groups
    return {str(name).strip("/") for name in names} - {""}


def test_groups_dims_and_values() -> None:
    draws = some_draws(stats={"lp": np.ones((CHAINS, DRAWS)), "step_size": np.array([0.1, 0.2])})
    data = draws.to_arviz(coords={"row": ["a", "b", "c"]})
    assert isinstance(data, vars(arviz).get("InferenceData", xarray.DataTree))
    assert groups(data) == {"posterior", "sample_stats", "observed_data", "log_likelihood"}
    dims = {name: v.dims[2:] for name, v in data.posterior.data_vars.items()}
    assert dims == {
        "mu": ("mu_dim_0",),
        "inner.size": (),
        "theta": ("row", "theta_dim_0"),
        "total": (),
    }
    assert data.posterior["theta"].dims[:2] == ("chain", "draw")
    assert data.observed_data["y"].dims == ("row",)
    assert data.observed_data["z"].dims == ("row", "kind")
    assert list(data.posterior["row"].values) == ["a", "b", "c"]
    assert list(data.posterior["draw"].values) == list(range(DRAWS))
    assert data.sample_stats["step_size"].values[:, 0].tolist() == [0.1, 0.2]
    assert data.posterior.attrs["inference_library"] == "weft"
    np.testing.assert_array_equal(data.posterior["theta"].values, draws["theta"])
    np.testing.assert_array_equal(data.observed_data["z"].values, 1)


def test_pointwise_log_likelihood() -> None:
    draws = some_draws()
    data = draws.to_arviz()
    assert data.log_likelihood["y"].dims == ("chain", "draw", "row")
    assert data.log_likelihood["z"].dims == ("chain", "draw", "row", "kind")
    expected = log_likelihood(draws.choices)
    np.testing.assert_allclose(data.log_likelihood["y"].values, expected, rtol=2e-5)
    np.testing.assert_allclose(data.log_likelihood["z"].values, np.log(0.5), rtol=1e-6)
    by_row = draws.to_arviz(log_likelihood="row").log_likelihood
    assert set(by_row.data_vars) == {"log_likelihood"}
    assert by_row["log_likelihood"].dims == ("chain", "draw", "row")
    rows = expected + 2 * np.log(0.5)
    np.testing.assert_allclose(by_row["log_likelihood"].values, rows, rtol=2e-5)
    assert "log_likelihood" not in groups(draws.to_arviz(log_likelihood=False))
    whole = pointwise_log_likelihood(TARGET, draws.choices)
    parts = pointwise_log_likelihood(TARGET, draws.choices, batch_size=7)
    np.testing.assert_allclose(whole["y"], parts["y"], rtol=1e-6)


def test_arviz_reads_it() -> None:
    draws = some_draws()
    data = draws.to_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # these draws are no posterior: some k-hat is high
        loo = arviz.loo(data, var_name="y")
    assert np.isfinite(float(getattr(loo, "elpd_loo", getattr(loo, "elpd", np.nan))))
    assert float(arviz.rhat(data)["total"]) == pytest.approx(draws.summary()["total"]["r_hat"])


def test_partly_observed_sites() -> None:
    seen = np.array([True, False, True])
    for missing in ("impute", "drop"):
        target = model(X).given({**DATA, "y": observed(Y, where=seen, missing=missing)})
        draws = some_draws(target)
        if missing == "impute":
            draws.choices["y"] = jnp.broadcast_to(jnp.asarray(Y), (CHAINS, DRAWS, 3))
        data = draws.to_arviz()
        np.testing.assert_array_equal(data.observed_data["y"].values, np.where(seen, Y, np.nan))
        expected = np.where(seen, log_likelihood(draws.choices), 0.0)
        np.testing.assert_allclose(data.log_likelihood["y"].values, expected, rtol=2e-5)


def test_predictions_at_the_data_and_elsewhere() -> None:
    draws = some_draws()
    again = model(X).predict(jax.random.key(0), draws.choices)
    data = draws.to_arviz(predictions=again, log_likelihood=False)
    assert set(data.posterior_predictive.data_vars) == {"y", "z"}
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "row")

    kept = {name: draws.choices[name] for name in ("mu", "inner")}
    elsewhere = model(jnp.arange(5.0)).predict(jax.random.key(0), kept)
    data = draws.to_arviz(
        predictions=elsewhere, log_likelihood=False, coords={"row": ["a", "b", "c"]}
    )
    assert "posterior_predictive" not in groups(data)
    assert data.predictions["y"].sizes["row"] == 5
    assert list(data.predictions["row"].values) == list(range(5))
    assert "total" in data.predictions

    data = draws.to_arviz(predictions={"y": again.choices["y"]}, log_likelihood=False)
    assert set(data.posterior_predictive.data_vars) == {"y"}
    with pytest.raises(WeftError, match=r"'y' has shape \(30, 3\).*\(chain, draw\) = \(2, 30\)"):
        draws.to_arviz(predictions={"y": again.choices["y"][0]})


def test_idle_draws_are_nan() -> None:
    active = np.zeros((CHAINS, DRAWS, 3), bool)
    active[0] = True
    data = some_draws(active={"theta": active, "mu": True}).to_arviz(log_likelihood=False)
    assert np.isnan(data.posterior["theta"].values[1]).all()
    assert np.isfinite(data.posterior["theta"].values[0]).all()
    assert np.isfinite(data.posterior["mu"].values).all()


def test_names_of_dims_that_are_taken() -> None:
    """By ArviZ, by a variable, by another size, by another axis of the same site."""

    def axes(*names: str | None) -> SimpleNamespace:
        return SimpleNamespace(dims=names)

    sites = {"a": axes("draw"), "b": axes("row"), "c": axes("row"), "d": axes("e"), "e": axes("d")}
    sites["f"] = axes(None, "col", "col", None)
    target = SimpleNamespace(sites=sites, observed={}, latents=tuple(sites))
    shapes = {"a": (2,), "b": (3,), "c": (4,), "d": (2,), "e": (2,), "f": (2, 3, 3, 4)}
    choices = {a: np.zeros((CHAINS, DRAWS, *s)) for a, s in shapes.items()}
    data = Draws(choices=choices, target=target).to_arviz()
    assert {name: v.dims[2:] for name, v in data.posterior.data_vars.items()} == {
        "a": ("a_draw",),
        "b": ("row",),
        "c": ("c_row",),
        "d": ("d_e",),
        "e": ("e_d",),
        "f": ("f_dim_0", "col", "f_col", "f_dim_1"),
    }


def test_draws_without_a_target(tmp_path: pathlib.Path) -> None:
    draws = some_draws(target=None)
    data = draws.to_arviz()
    assert groups(data) == {"posterior", "sample_stats"}
    assert data.posterior["theta"].dims[2:] == ("theta_dim_0", "theta_dim_1")
    with pytest.raises(WeftError, match="no target to evaluate it with"):
        draws.to_arviz(log_likelihood=True)

    some_draws().save(tmp_path / "draws")
    read = load(tmp_path / "draws")
    data = read.to_arviz()
    assert groups(data) == {"posterior", "sample_stats", "observed_data"}
    assert data.posterior["theta"].dims[2:] == ("row", "theta_dim_0")
    with pytest.raises(
        WeftError, match=r"read from a file, which holds no model: load\(path, target"
    ):
        read.to_arviz(log_likelihood=True)
    whole = load(tmp_path / "draws", target=TARGET).to_arviz()
    assert "log_likelihood" in groups(whole)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = some_draws()
    with pytest.raises(AddressError, match=r"'rows' among the dims for coords; did you mean 'row'"):
        draws.to_arviz(coords={"rows": [1, 2, 3]})
    with pytest.raises(WeftError, match=r"'row' has 3 elements, and \(2,\) labels were given"):
        draws.to_arviz(coords={"row": [1, 2]})
    with pytest.raises(AddressError, match=r"'raw'.*did you mean 'row'"):
        draws.to_arviz(log_likelihood="raw")
    part = Draws({"mu": draws["mu"]}, stats=draws.stats, target=TARGET)
    assert "log_likelihood" not in groups(part.to_arviz())
    with pytest.raises(WeftError, match=r"the draws lack 'inner.size', 'theta'"):
        part.to_arviz(log_likelihood=True)
    with pytest.raises(WeftError, match="outside jit, vmap and grad"):
        jax.jit(lambda d: d.to_arviz())(draws)
    monkeypatch.setattr("weft.inference.results.export._LARGE", 10)
    with pytest.warns(UserWarning, match="log_likelihood=True computes it"):
        assert "log_likelihood" not in groups(draws.to_arviz())


def test_particles_become_one_chain_of_equal_weights() -> None:
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), some_draws().choices)
    log_weights = jnp.where(jnp.arange(CHAINS * DRAWS) == 7, 0.0, -jnp.inf)
    particles = Particles(
        flat, log_weights=log_weights, log_evidence=jnp.float32(-3.0), target=TARGET
    )
    data = particles.to_arviz(num_samples=5)
    assert dict(data.posterior.sizes) == {
        "chain": 1,
        "draw": 5,
        "mu_dim_0": 2,
        "row": 3,
        "theta_dim_0": 2,
    }
    seventh = jnp.broadcast_to(flat["theta"][7], (1, 5, 3, 2))
    np.testing.assert_array_equal(data.posterior["theta"].values, seventh)
    assert groups(data) == {"posterior", "observed_data", "log_likelihood"}
    assert data.posterior.attrs["particle_ess"] == pytest.approx(1.0)
    assert data.posterior.attrs["log_evidence"] == -3.0

    even = Particles(flat, log_weights=jnp.zeros(CHAINS * DRAWS), target=TARGET)
    same = [even.to_arviz(seed=s, log_likelihood=False).posterior["mu"].values for s in (1, 1, 2)]
    np.testing.assert_array_equal(same[0], same[1])
    assert (same[0] != same[2]).any()
    equal = even.resample(jax.random.key(4), 6)
    predicted = model(X).predict(jax.random.key(0), equal.choices)
    data = even.to_arviz(seed=4, num_samples=6, predictions=predicted, log_likelihood=False)
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "row")
