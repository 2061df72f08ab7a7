"""One filter a lane: panels of linear-Gaussian series, against the normal law of their states and data.

Evidences are unbiased and means of paths known: bands are 5.5 standard errors of independent replicates or chains, a
false alarm in 3e7 for a normal statistic; keys are fixed.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import (
    backward_sampling,
    filtering,
    load,
    paris,
    parisian_gibbs,
    pmmh,
    smc,
    smc2,
)
from weft.inference.particles.pmmh import Parameters
from weft.ppl import DensityError, ModelError, WeftError

from weft import gen, kernels, marginalize, normalize, observed, sample, testing

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
    ratio = np.exp(
        np.asarray(runs.log_evidence, np.float64) - sum(exact) - float(log_shared(slope))
    )
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


def test_what_is_summed_out_of_each_lane() -> None:
    """Chains that are summed out whole leave nothing to draw: the evidence is exact."""
    target = marginalize(switching, "first", "z")().given(SWITCHING)
    found = smc(filtering(), 2).run(KEY, target, progress=False)
    assert float(found.log_evidence) == pytest.approx(float(target.log_density({})), rel=1e-5)


def test_whole_law() -> None:
    target = switching().given(SWITCHING)
    particles = smc(filtering(), 3, history="full")
    report = testing.check_proper_weighting(particles, target, key=KEY)
    assert report.passed, report
    chain = kernels.conditional_smc(3)
    report = testing.check_invariance(chain, target, key=KEY)
    assert report.passed, report


def test_parameters_that_series_share() -> None:
    """What particle Metropolis-Hastings and SMC squared weigh parameters by."""
    target, slope, num = panel().given(DATA), 0.8, 200
    algorithm = pmmh(50)

    def estimate(key: Any) -> Any:
        parameters = Parameters(target, filtering())
        position = parameters.space.from_choices({"slope": jnp.asarray(slope)})
        return algorithm._estimate(key, parameters, position)

    log_density, choices = jax.jit(jax.vmap(estimate))(jax.random.split(KEY, num))
    exact = sum(lane_evidence(lane, slope) for lane in range(LANES)) + float(log_shared(slope))
    unbiased(log_density, exact)
    means = np.stack([smoothed(lane, slope) for lane in range(LANES)])
    ratio = np.exp(np.asarray(log_density, np.float64) - exact)
    away = ratio[:, None, None] * (np.asarray(choices["x"], np.float64) - means)
    assert (np.abs(away.mean(0)) < 5.5 * away.std(0, ddof=1) / num**0.5).all()
    assert choices["first"].shape == (num, LANES)
    draws = jax.eval_shape(lambda key: algorithm.run(key, target, progress=False), KEY)
    assert draws.choices["x"].shape == (4, 1000, LANES, STEPS)

    # A particle of parameters, with the weights of its filters' steps: they average to the evidence.
    model = smc2(50)(target)
    assert model.num_steps == STEPS + 1

    def weigh(key: Any) -> Any:
        first, rest = jax.random.split(key)
        particle, log_weight = model.init(first)

        def step(t: Any, state: Any) -> Any:
            particle, more = model.step(jax.random.fold_in(rest, t), t, state[0])
            return particle, state[1] + more

        return jax.lax.fori_loop(1, model.num_steps, step, (particle, log_weight))

    particles, log_weights = jax.jit(jax.vmap(weigh))(jax.random.split(KEY, 1000))
    grid = np.linspace(-1.5, 2.5, 801)
    terms = [sum(lane_evidence(lane, a) for lane in range(LANES)) for a in grid]
    terms = np.asarray(terms) + np.asarray(log_shared(jnp.asarray(grid)), np.float64)
    evidence = np.exp(terms).sum() * (grid[1] - grid[0])
    unbiased(log_weights, np.log(evidence))
    found = log_weights + Normal(0.5, 0.3).log_prob(particles["position"][:, 0])
    np.testing.assert_allclose(particles["log_joint"], found, rtol=1e-4)


@gen
def no_starts(num_steps: int = STEPS) -> Any:
    def one(x: Any) -> Any:
        def step(x: Any, _: Any) -> Any:
            x = sample("x", Normal(0.8 * x, 0.7))
            return x, sample("y", Normal(x, 0.5))

        jax.lax.scan(step, x, length=num_steps)

    jax.vmap(one)(jnp.zeros(LANES))


def test_smoothing() -> None:
    """Paths drawn back and sums over them, of each lane; a filter that looks at the observation."""
    target = no_starts().given({"y": Y})
    gram = np.tril(0.8 ** (np.arange(STEPS)[:, None] - np.arange(STEPS)))
    prior = 0.49 * gram @ gram.T
    total = prior + 0.25 * np.eye(STEPS)
    exact = Y @ np.linalg.solve(total, prior)
    algorithm = smc(filtering("optimal"), 100, history="full")

    def one(key: Any) -> Any:
        run_key, path_key, sum_key = jax.random.split(key, 3)
        found = algorithm.run(run_key, target, progress=False)
        paths = backward_sampling(path_key, found, 50).choices["x"]
        return found.log_evidence, paths, paris(sum_key, found, lambda before, now, t: now["x"])

    log_evidence, paths, sums = jax.jit(jax.vmap(one))(jax.random.split(KEY, 50))
    log_density = -0.5 * np.einsum("li,li->", Y, np.linalg.solve(total, Y.T).T)
    unbiased(log_evidence, log_density - LANES / 2 * np.linalg.slogdet(2 * np.pi * total)[1])
    assert paths.shape == (50, 50, LANES, STEPS)
    for found, wanted in ((paths.mean(1), exact), (sums, exact.sum(-1))):
        found = np.asarray(found, np.float64)
        error = found.std(0, ddof=1) / 50**0.5
        # A ratio of estimates is biased by the order of its variance.
        z = (np.abs(found.mean(0) - wanted) - found.var(0)) / error
        assert z.max() < 5.5, z
    chains = parisian_gibbs(lambda before, now, t: now["x"], 4, 3, num_warmup=1, num_chains=2)
    draws = jax.eval_shape(lambda key: chains.run(key, target, progress=False), KEY)
    assert draws.derived["sum"].shape == (2, 3, LANES)
    assert draws.choices["x"].shape == (2, 3, LANES, STEPS)


def test_more_data_and_many_lanes(tmp_path: Path) -> None:
    """A run that goes on, from a file too, is one run; lanes of lanes are lanes, with draws of their own."""
    short = smc(filtering(), 20, history="full").run(
        KEY, no_starts(2).given({"y": Y[:, :2]}), progress=False
    )
    short.save(tmp_path / "short")
    assert repr(load(tmp_path / "short")) == repr(short)
    short = load(tmp_path / "short")
    target = no_starts().given({"y": Y})
    again = smc(filtering(), 20, history="full").run(KEY, target, resume=short, progress=False)
    whole = smc(filtering(), 20, history="full").run(KEY, target, progress=False)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        assert bool((a == b).all())
    assert f"{LANES} series with a filter each" in repr(whole)
    x = whole.path.particles["now"]["x"]
    along = np.asarray(whole.along(x))
    assert along.shape == (LANES, 20, STEPS)
    # Each slot of the choices is a path of each lane.
    paths = np.moveaxis(np.asarray(whole.choices["x"]), 0, 1)
    assert all({*map(bytes, p)} <= {*map(bytes, a)} for p, a in zip(paths, along, strict=True))

    @gen
    def groups() -> Any:
        jax.vmap(lambda _: no_starts.function())(jnp.arange(2))

    with pytest.raises(WeftError, match="had 3 series, this model has 2"):
        smc(filtering(), 20).run(
            KEY, groups().given({"y": jnp.stack([Y, Y])}), resume=whole, progress=False
        )


def run(model: Any, data: Any, **settings: Any) -> Any:
    return smc(filtering(), 10, **settings).run(KEY, model().given(data), progress=False)


@gen
def mixed() -> Any:
    first = jax.vmap(lambda x: sample("first", Normal(x, 1.0)))(jnp.zeros(LANES))

    def one(x: Any) -> Any:
        def step(x: Any, _: Any) -> Any:
            x = sample("x", Normal(x, 1.0))
            return x, sample("y", Normal(x, 0.5))

        return jax.lax.scan(step, x, length=STEPS)[0]

    return jax.vmap(one)(first - first.mean())


@gen
def total() -> Any:
    def one(x: Any) -> Any:
        def step(x: Any, _: Any) -> Any:
            x = sample("x", Normal(x, 1.0))
            return x, sample("y", Normal(x, 0.5))

        return jax.lax.scan(step, x, length=STEPS)[0]

    sample("sum", Normal(jax.vmap(one)(jnp.zeros(LANES)).sum(), 1.0))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "shared latents": (
        lambda: run(panel, DATA),
        ModelError,
        r"share the latent choices 'slope'.*pmmh\(\) and smc\(smc2\(\)\) infer them",
    ),
    "lanes meet": (
        lambda: run(mixed, {"y": Y}),
        ModelError,
        r"'x', 'y' would read several \('reduce_sum' .*reduces over their axis 0",
    ),
    "lanes meet after": (
        lambda: run(total, {"y": Y, "sum": 0.0}),
        ModelError,
        r"'sum' would read several",
    ),
    "nothing observed in the scan": (
        lambda: run(no_starts, {}),
        ModelError,
        r"no site in the scan of 'no_starts' is observed \('x', 'y'\)",
    ),
    "rejuvenation": (
        lambda: run(no_starts, {"y": Y}, rejuvenate=kernels.random_walk(0.1)),
        WeftError,
        "nothing can rejuvenate them",
    ),
    "all weights zero": (
        lambda: run(no_starts, {"y": np.where(np.arange(LANES)[:, None] == 1, 1e30, Y)}),
        DensityError,
        r"series 1 of 3: smc: at step 0, all weights are zero.*y = 1\.e\+30",
    ),
    "no parameter": (
        lambda: pmmh(10).run(KEY, no_starts().given({"y": Y})),
        WeftError,
        "no latent choice that its 3 series share",
    ),
    "inside a program": (
        lambda: normalize(no_starts().given({"y": Y}), by=smc(filtering(), 10)).random_weighted(
            KEY
        ),
        WeftError,
        "normalize a model of one, inside the vmap",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    refused, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        refused()


def test_double_precision(x64: None) -> None:
    """The same panel under 64-bit numbers, against the exact evidence."""
    target = panel().given({**DATA, "slope": 0.8})
    found = smc(filtering(), 10_000).run(KEY, target, progress=False)
    assert found.log_evidence.dtype == np.float64
    exact = sum(lane_evidence(lane, 0.8) for lane in range(LANES)) + float(log_shared(0.8))
    error = float(found.log_evidence_variance) ** 0.5
    assert error < 0.1
    assert abs(found.log_evidence - exact) < 5.5 * error
