"""One filter a lane: panels of linear-Gaussian series, against the normal law of their states and data.

Evidences are unbiased and means of paths known: bands are 5.5 standard errors of independent replicates or chains, a
false alarm in 3e7 for a normal statistic; keys are fixed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import (
    backward_sampling,
    diagnostics,
    filtering,
    paris,
    parisian_gibbs,
    pmmh,
    smc,
    smc2,
)
from weft.ppl import DensityError, ModelError, WeftError

from weft import gen, kernels, normalize, observed, sample, testing

pytestmark = pytest.mark.slow  # once is enough: not in every lane
KEY = jax.random.key(17)
Normal = dist.Normal
LANES, STEPS = 3, 4
STARTS = np.array([0.0, 1.0, -1.0])
Y = np.asarray(jax.random.normal(jax.random.key(3), (LANES, STEPS)), np.float64)
W, SEEN = np.array([0.1, 0.2, 0.3]), 0.3
MISSING = np.zeros((LANES, STEPS), bool)
MISSING[0, 1] = MISSING[2, 0] = True


@gen
def panel(num_steps: int = STEPS) -> Any:
    """A slope that all share, first states and last observations of each."""
    slope = sample("slope", Normal(0.5, 0.3))
    sample("seen", Normal(slope, 1.0))

    def one(start: Any) -> Any:
        first = sample("first", Normal(start, 1.0))

        def step(x: Any, _: Any) -> Any:
            x = sample("x", Normal(slope * x, 0.7))
            return x, sample("y", Normal(x, 0.5))

        last, _ = jax.lax.scan(step, first, length=num_steps)
        sample("w", Normal(last, 0.3))

    jax.vmap(one)(jnp.asarray(STARTS))


DATA = {"y": observed(Y, where=~MISSING), "w": W, "seen": SEEN}


def states(lane: int, slope: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean and covariance of first state and path of a lane; which are seen, with what variance of noise."""
    root = np.eye(STEPS + 1)
    for t in range(1, STEPS + 1):
        root[t, t] = 0.7
        root[t, :t] = slope * root[t - 1, :t]
    mean = STARTS[lane] * slope ** np.arange(STEPS + 1)
    design = np.vstack([np.eye(STEPS + 1)[1:][~MISSING[lane]], np.eye(STEPS + 1)[-1]])
    noise = np.r_[np.full(len(design) - 1, 0.25), 0.09]
    return mean, root @ root.T, design, np.diag(noise)


def lane_evidence(lane: int, slope: float) -> float:
    mean, covariance, design, noise = states(lane, slope)
    away = np.r_[Y[lane][~MISSING[lane]], W[lane]] - design @ mean
    total = design @ covariance @ design.T + noise
    log_det = np.linalg.slogdet(2 * np.pi * total)[1]
    return float(-0.5 * away @ np.linalg.solve(total, away) - 0.5 * log_det)


def smoothed(lane: int, slope: float) -> np.ndarray:
    mean, covariance, design, noise = states(lane, slope)
    away = np.r_[Y[lane][~MISSING[lane]], W[lane]] - design @ mean
    total = design @ covariance @ design.T + noise
    return (mean + covariance @ design.T @ np.linalg.solve(total, away))[1:]


def log_shared(slope: Any) -> Any:
    return Normal(0.5, 0.3).log_prob(slope) + Normal(slope, 1.0).log_prob(SEEN)


def unbiased(log_estimates: Any, exact: float) -> None:
    ratio = np.exp(np.asarray(log_estimates, np.float64) - exact)
    error = ratio.std(ddof=1) / len(ratio) ** 0.5
    assert error < 0.1
    assert abs(ratio.mean() - 1) < 5.5 * error, (ratio.mean(), error)


def test_evidences_multiply() -> None:
    slope, num = 0.8, 200
    target = panel().given({**DATA, "slope": slope})
    algorithm = smc(filtering(), 200, history="full")
    runs = jax.jit(jax.vmap(lambda k: algorithm.run(k, target, progress=False)))(
        jax.random.split(KEY, num)
    )
    lanes = np.asarray(runs.path.log_increments, np.float64).sum(1)
    exact = [lane_evidence(lane, slope) for lane in range(LANES)]
    for lane in range(LANES):
        unbiased(lanes[:, lane], exact[lane])
    unbiased(runs.log_evidence, sum(exact) + float(log_shared(slope)))

    # Lanes are independent: correlations of 200 pairs have standard deviation 200^-1/2.
    correlation = np.corrcoef(lanes.T)[np.triu_indices(LANES, 1)]
    assert np.abs(correlation).max() < 5.5 / num**0.5

    # The variances of the lanes add up. That of a variance of nearly normal numbers is 2 / n of its square, and the
    # relative variance that is estimated differs from that of the logarithm by its square.
    claimed, variance = float(runs.log_evidence_variance.mean()), lanes.sum(1).var(ddof=1)
    assert abs(claimed / variance - 1) < 5.5 * (2 / num) ** 0.5 + claimed

    # Slots join one path of each lane, drawn by its weights: they are weighted properly for the whole.
    x = np.asarray(runs.choices["x"], np.float64)
    assert x.shape == (num, 200, LANES, STEPS)
    ratio = np.exp(np.asarray(runs.log_evidence, np.float64) - sum(exact) - float(log_shared(slope)))
    means = np.stack([smoothed(lane, slope) for lane in range(LANES)])
    products = (x[:, :, 0] * x[:, :, 1]).mean(1) - means[0] * means[1]
    for found in (x.mean(1) - means, products):
        weighted = ratio.reshape(-1, *(1,) * (found.ndim - 1)) * found
        error = weighted.std(0, ddof=1) / num**0.5
        assert (np.abs(weighted.mean(0)) < 5.5 * error).all(), weighted.mean(0) / error


@gen
def switching() -> Any:
    """Two series of two states and two steps, their first states before the scan."""
    stay = jnp.array([[0.8, 0.2], [0.3, 0.7]])

    def one(probs: Any) -> Any:
        first = sample("first", dist.Categorical(probs))

        def step(before: Any, _: Any) -> Any:
            z = sample("z", dist.Categorical(stay[before]))
            sample("y", Normal(2.0 * z, 1.0))
            return z, None

        jax.lax.scan(step, first, length=2)

    jax.vmap(one)(jnp.array([[0.5, 0.5], [0.1, 0.9]]))


SWITCHING = {"y": jnp.array([[0.1, 1.9], [1.2, -0.4]])}


def test_whole_law() -> None:
    target = switching().given(SWITCHING)
    particles = smc(filtering(), 3, history="full")
    report = testing.check_proper_weighting(particles, target, key=KEY)
    assert report.passed, report
    chain = kernels.conditional_smc(3)
    report = testing.check_invariance(chain, target, key=KEY)
    assert report.passed, report


def test_parameters_that_series_share() -> None:
    target = panel().given(DATA)
    grid = np.linspace(-1.0, 2.0, 1001)
    terms = [sum(lane_evidence(lane, a) for lane in range(LANES)) for a in grid]
    terms = np.asarray(terms) + np.asarray(log_shared(jnp.asarray(grid)))
    weights = np.exp(terms - terms.max())
    exact = np.log(weights.sum() * (grid[1] - grid[0])) + terms.max()
    weights /= weights.sum()
    mean = weights @ grid
    sd = (weights @ (grid - mean) ** 2) ** 0.5

    draws = pmmh(50, 500, num_warmup=200).run(KEY, target, progress=False)
    assert draws.choices["x"].shape == (4, 500, LANES, STEPS)
    assert draws.choices["first"].shape == (4, 500, LANES)
    slope = np.asarray(draws.choices["slope"])
    ess = float(diagnostics.ess(slope))
    assert ess > 100
    assert abs(slope.mean() - mean) < 5.5 * sd / ess**0.5

    algorithm = smc(smc2(30, num_moves=1), 50)
    runs = jax.jit(jax.vmap(lambda k: algorithm.run(k, target, progress=False)))(
        jax.random.split(KEY, 24)
    )
    unbiased(runs.log_evidence, exact)


@gen
def no_starts(num_steps: int = STEPS) -> Any:
    def one(x: Any) -> Any:
        def step(x: Any, _: Any) -> Any:
            x = sample("x", Normal(0.8 * x, 0.7))
            return x, sample("y", Normal(x, 0.5))

        jax.lax.scan(step, x, length=num_steps)

    jax.vmap(one)(jnp.zeros(LANES))
