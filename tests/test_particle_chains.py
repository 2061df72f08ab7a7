"""Particle Markov chains and smoothing, against Kalman smoothers and a posterior by quadrature.

Bands are five standard errors, of independent chains or of the effective sample size; keys are fixed. About 150
numbers are compared: a false alarm has probability below 1e-4 together.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import (
    Draws,
    backward_sampling,
    filtering,
    mcmc,
    paris,
    parisian_gibbs,
    particle_gibbs,
    pmmh,
    smc,
    smc2,
)
from weft.inference.results import diagnostics
from weft.ppl import ModelError, WeftError

from weft import gen, kernels, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane
KEY = jax.random.key(11)
Normal = dist.Normal
NOISE, STEPS = 0.7, 12


def series(slope: float, scale: float, noise: float, num_steps: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x, ys = 0.0, []
    for _ in range(num_steps):
        x = slope * x + scale * rng.normal()
        ys.append(x + noise * rng.normal())
    return np.asarray(ys)


def smoothed(y: np.ndarray, slope: float, scale: float, noise: float) -> tuple[Any, Any]:
    """Mean and covariance of the whole path: it is jointly normal with the data."""
    num_steps = len(y)
    root = np.zeros((num_steps, num_steps))
    for t in range(num_steps):
        root[t] = slope * root[t - 1] if t else 0
        root[t, t] = scale
    prior = root @ root.T
    gain = prior @ np.linalg.inv(prior + noise**2 * np.eye(num_steps))
    return gain @ y, prior - gain @ prior


def log_likelihood(y: np.ndarray, slope: float, scale: float) -> float:
    mean, var, total = 0.0, 0.0, 0.0
    for value in y:
        mean, var = slope * mean, slope**2 * var + scale**2
        s = var + NOISE**2
        total -= 0.5 * (np.log(2 * np.pi * s) + (value - mean) ** 2 / s)
        mean, var = mean + var / s * (value - mean), var * (1 - var / s)
    return total


@gen
def autoregression(num_steps: int, noise: float) -> None:
    slope = sample("slope", dist.Uniform(-1.0, 1.0))
    scale = sample("scale", dist.LogNormal(0.0, 0.5))

    def step(x: Any, _: Any) -> Any:
        x = sample("x", Normal(slope * x, scale))
        sample("y", Normal(x, noise))
        return x, None

    jax.lax.scan(step, 0.0, length=num_steps)


Y = series(0.8, 1.0, NOISE, STEPS, 0)
TARGET = autoregression(STEPS, NOISE).given({"y": Y})


@pytest.fixture(scope="module")
def exact() -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the parameters, and the log evidence, on a grid."""
    slopes = np.linspace(-0.9975, 0.9975, 200)
    logs = np.linspace(-2.2, 2.0, 160)
    terms = np.array(
        [[log_likelihood(Y, a, np.exp(s)) - 0.5 * (s / 0.5) ** 2 for s in logs] for a in slopes]
    )
    weights = np.exp(terms - terms.max())
    cell = (slopes[1] - slopes[0]) * (logs[1] - logs[0]) / (2 * 0.5 * np.sqrt(2 * np.pi))
    evidence = float(np.log(weights.sum() * cell) + terms.max())
    weights /= weights.sum()
    found = {"evidence": (evidence, 0.0)}
    for name, values, margin in (
        ("slope", slopes, weights.sum(1)),
        ("scale", np.exp(logs), weights.sum(0)),
    ):
        mean = float((margin * values).sum())
        found[name] = (mean, float(np.sqrt((margin * values**2).sum() - mean**2)))
    return found


def near(draws: Draws, exact: dict[str, tuple[float, float]]) -> None:
    for name in ("slope", "scale"):
        x, (mean, sd) = np.asarray(draws.choices[name]), exact[name]
        ess = float(np.asarray(diagnostics.ess(x, kind="mean")))
        assert ess > 150
        assert abs(x.mean() - mean) < 5 * sd / ess**0.5, name
        square = (x - mean) ** 2
        error = square.std() / float(np.asarray(diagnostics.ess(square, kind="mean"))) ** 0.5
        assert abs(square.mean() - sd**2) < 5 * error, name


def test_pmmh(exact: Any) -> None:
    draws = pmmh(60, num_samples=800, num_warmup=300).run(KEY, TARGET, progress=False)
    near(draws, exact)
    assert draws.choices["x"].shape == (4, 800, STEPS)
    assert 0.1 < float(draws.stats["acceptance_rate"].mean()) < 0.4  # adapted to 0.234


def test_particle_gibbs(exact: Any) -> None:
    parameters = kernels.block(kernels.repeat(kernels.random_walk(0.4), 3), "slope", "scale")
    algorithm = particle_gibbs(parameters, 15, num_samples=1000, num_warmup=100)
    near(algorithm.run(KEY, TARGET, progress=False), exact)


def test_smc2(exact: Any) -> None:
    algorithm = smc(smc2(num_state_particles=30), num_particles=150)
    run = jax.jit(jax.vmap(lambda k: algorithm.run(k, TARGET, progress=False)))
    runs = run(jax.random.split(KEY, 16))
    evidence, _ = exact["evidence"]
    ratio = np.exp(np.asarray(runs.log_evidence) - evidence)
    error = ratio.std(ddof=1) / 4
    assert error < 0.2
    assert abs(ratio.mean() - 1) < 6 * error  # Student's t of 15 degrees beyond 6: 2e-5
    for name in ("slope", "scale"):
        means = np.asarray(jnp.sum(runs.weights * runs.choices[name], -1))
        error = means.std(ddof=1) / 4
        # besides the error of replicates a bias of order 1 / N, in units of the posterior
        assert abs(means.mean() - exact[name][0]) < 6 * error + exact[name][1] / 150, name


# --- paths, given the parameters ------------------------------------------------------------------

KNOWN = TARGET.given({"slope": 0.8, "scale": 1.0})
MEAN, COVARIANCE = smoothed(Y, 0.8, 1.0, NOISE)


@pytest.mark.parametrize("update", ["ancestor", "backward", None])
def test_conditional_smc_leaves_the_paths_law(update: Any) -> None:
    kernel = kernels.conditional_smc(15 if update else 60, update)
    draws = mcmc(kernel, num_samples=500, num_warmup=20).run(KEY, KNOWN, progress=False)
    x = np.asarray(draws.choices["x"])
    ess = np.asarray(diagnostics.ess(x, kind="mean"))
    z = (x.mean((0, 1)) - MEAN) / np.sqrt(np.diag(COVARIANCE) / ess)
    assert np.abs(z).max() < 5
    square = (x - MEAN) ** 2
    error = square.std((0, 1)) / np.sqrt(np.asarray(diagnostics.ess(square, kind="mean")))
    assert np.abs((square.mean((0, 1)) - np.diag(COVARIANCE)) / error).max() < 5
    pairs = (x - MEAN)[..., 1:] * (x - MEAN)[..., :-1]
    error = pairs.std((0, 1)) / np.sqrt(np.asarray(diagnostics.ess(pairs, kind="mean")))
    assert np.abs((pairs.mean((0, 1)) - np.diag(COVARIANCE, 1)) / error).max() < 5


def test_two_particles_are_enough_for_the_law() -> None:
    """From exact draws of the path, one move with two particles: means and squares stay."""
    root = np.linalg.cholesky(COVARIANCE)
    paths = MEAN + np.asarray(jax.random.normal(KEY, (20_000, STEPS))) @ root.T
    kernel = kernels.conditional_smc(2)
    move = jax.jit(jax.vmap(lambda k, x: kernel.move(k, {"x": x}, KNOWN)[0]["x"]))
    after = np.asarray(move(jax.random.split(KEY, len(paths)), jnp.asarray(paths, jnp.float32)))
    assert (after != paths.astype(np.float32)).mean() > 0.2
    change = after - paths
    z = change.mean(0) / (change.std(0) / len(paths) ** 0.5)
    assert np.abs(z).max() < 5
    change = (after - MEAN) ** 2 - (paths - MEAN) ** 2
    z = change.mean(0) / (change.std(0) / len(paths) ** 0.5)
    assert np.abs(z).max() < 5


def test_backward_sampling() -> None:
    algorithm = smc(filtering(), 400, history="full")

    def one(key: Any) -> Any:
        a, b = jax.random.split(key)
        found = backward_sampling(b, algorithm.run(a, KNOWN, progress=False), 100)
        return jnp.mean(found.choices["x"], 0)

    means = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 50)))
    error = means.std(0, ddof=1) / 50**0.5
    assert (np.abs(means.mean(0) - MEAN) < 5 * error + 2 / 400).all()  # + a bias of order 1 / N


# --- sums over paths: the setting of methods of Cardoso et al. (2023) -----------------------------

LONG = series(0.9, 0.5**0.5, 1.0, 50, 0)


def moments(before: Any, now: Any, t: Any) -> Any:
    product = jnp.zeros(()) if before is None else before["x"] * now["x"]
    return jnp.stack([now["x"], product, now["x"] ** 2])


def exact_sums() -> np.ndarray:
    mean, covariance = smoothed(LONG, 0.9, 0.5**0.5, 1.0)
    second = covariance + np.outer(mean, mean)
    return np.array([mean.sum(), np.diag(second, 1).sum(), np.trace(second)])


def test_the_bias_of_paris_goes_away_in_the_gibbs_sampler() -> None:
    target = autoregression(50, 1.0).given({"y": LONG, "slope": 0.9, "scale": 0.5**0.5})
    expected, replicates = exact_sums(), 400

    def alone(key: Any) -> Any:
        a, b = jax.random.split(key)
        found = smc(filtering(), 12, history="full").run(a, target, progress=False)
        return paris(b, found, moments)

    sums = np.asarray(jax.jit(jax.vmap(alone))(jax.random.split(KEY, replicates)))
    bias = (sums - expected).mean(0)
    error = sums.std(0, ddof=1) / replicates**0.5
    assert (bias[1:] < -5 * error[1:]).all()  # twelve particles are few

    sampler = parisian_gibbs(moments, 12, num_samples=7, num_warmup=0, num_chains=replicates)
    chains = np.asarray(sampler.run(KEY, target, progress=False).derived["sum"])
    errors = chains.std(0, ddof=1) / replicates**0.5
    curve = (chains - expected).mean(0)
    # The bias of the first iteration is halved, or more, at each; from the sixth on nothing of it is seen.
    assert (np.abs(curve[5:]) < 5 * errors[5:]).all()
    assert (np.abs(curve[3, 1:]) < np.abs(bias[1:]) / 3).all()
    rolled = chains[:, 5:].mean(1)
    error = rolled.std(0, ddof=1) / replicates**0.5
    assert (np.abs((rolled - expected).mean(0)) < 5 * error).all()


# --- errors ---------------------------------------------------------------------------------------


def test_what_cannot_be_sampled() -> None:
    @gen
    def remembering() -> None:
        def step(carry: Any, _: Any) -> Any:
            x, total = carry
            x = sample("x", Normal(0.5 * x, 1.0))
            sample("y", Normal(x + 0.1 * total, 1.0))
            return (x, total + x), None

        jax.lax.scan(step, (0.0, 0.0), length=3)

    target = remembering().given({"y": jnp.zeros(3)})
    with pytest.raises(ModelError, match="holds something random of earlier steps"):
        mcmc(kernels.conditional_smc(5), 5).run(KEY, target, progress=False)
    run = mcmc(kernels.conditional_smc(5, None), 5).run(KEY, target, progress=False)
    assert run.choices["x"].shape == (4, 5, 3)
    with pytest.raises(WeftError, match="history='full'"):
        backward_sampling(KEY, smc(filtering(), 10).run(KEY, KNOWN, progress=False))
    with pytest.raises(WeftError, match="'slope', 'scale' stand outside"):
        parisian_gibbs(moments, 5).run(KEY, TARGET, progress=False)
    with pytest.raises(WeftError, match="no latent choice before its scan"):
        pmmh(10).run(KEY, KNOWN, progress=False)
    with pytest.raises(WeftError, match="num_particles must be an integer, at least 2"):
        kernels.conditional_smc(1)
