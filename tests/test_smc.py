"""Sequential Monte Carlo against Kalman filters: evidence, filter means, the variance of one run, and errors.

Bands are five standard errors of independent replicates; keys are fixed.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import load, multinomial, smc, ssp, stratified, systematic
from weft.inference.particles.panels import PanelState
from weft.ppl import DensityError, ModelError, WeftError

from weft import gen, sample

# Filters of a few steps: compiling them is what costs.
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.slow,  # once is enough: not in every lane
]
KEY = jax.random.key(2)
CASE = json.loads((Path(__file__).parent / "refcases" / "ssm" / "lgssm_dim1.json").read_text())
Y = jnp.asarray(CASE["y"]).ravel()


class Linear(eqx.Module):
    """The bootstrap model of a linear-Gaussian series."""

    y: jax.Array
    num_steps: int = eqx.field(static=True)

    def number(self, name: str) -> float:
        return float(np.ravel(CASE["params"][name])[0])

    def init(self, key: Any) -> Any:
        p = self.number
        return self.weigh(0, p("m0") + p("P0") ** 0.5 * jax.random.normal(key))

    def step(self, key: Any, t: Any, x: Any) -> Any:
        p = self.number
        return self.weigh(t, p("A") * x + p("b") + p("Q") ** 0.5 * jax.random.normal(key))

    def weigh(self, t: Any, x: Any) -> Any:
        p = self.number
        return x, dist.Normal(p("C") * x + p("d"), p("R") ** 0.5).log_prob(self.y[t])


def series(num_steps: int) -> Linear:
    return Linear(Y[:num_steps], num_steps)


def replicates(algorithm: Any, num: int, key: Any = KEY) -> Any:
    run = jax.jit(jax.vmap(lambda k: algorithm.run(k, progress=False)))
    return run(jax.random.split(key, num))


@pytest.mark.parametrize(
    ("scheme", "threshold"), [(multinomial, 0.0), (multinomial, 1.0), (stratified, 0.5), (ssp, 1.0)]
)
def test_the_evidence_is_unbiased(scheme: Any, threshold: float) -> None:
    runs = replicates(smc(series(6), 50, resample=scheme, threshold=threshold), 1000)
    ratio = np.exp(np.asarray(runs.log_evidence) - sum(CASE["log_likelihood_increments"][:6]))
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / np.sqrt(ratio.size)
    increments = np.asarray(runs.path.log_increments)
    np.testing.assert_allclose(increments.sum(1), runs.log_evidence, rtol=1e-4)
    assert bool(np.any(runs.path.resampled)) == (threshold > 0)


def test_filter_means() -> None:
    runs = replicates(smc(series(30), 500), 40)
    means = np.asarray(runs.path.collected["mean"])
    exact = np.ravel(CASE["filter_mean"])[:30]
    error = means.std(0) / np.sqrt(40)
    # The bias of a ratio of estimates, of order 1/500 of the posterior's spread, is a fifth of a standard error.
    assert np.all(np.abs(means.mean(0) - exact) < 5 * error)


def test_the_variance_of_the_evidence_from_one_run() -> None:
    """Lee and Whiteley's estimate, whose mean is unbiased for the relative variance under multinomial resampling."""
    runs = replicates(smc(series(6), 200, resample=multinomial, threshold=1.0), 4000)
    ratio = np.exp(np.asarray(runs.log_evidence) - sum(CASE["log_likelihood_increments"][:6]))
    squares = (ratio - 1) ** 2
    single = -np.expm1(-np.asarray(runs.log_evidence_variance)) * ratio**2  # unbiased for var Z
    error = np.hypot(squares.std(), single.std()) / np.sqrt(ratio.size)
    assert abs(single.mean() - squares.mean()) < 5 * error
    assert abs(np.mean(runs.log_evidence_variance) / np.log(ratio).var() - 1) < 0.15


def test_the_variance_while_many_have_descendants() -> None:
    """Exactly Lee and Whiteley's estimate, from the ancestors of each step."""
    run = smc(series(12), 2000, resample=multinomial, threshold=0.5, history="full")
    found = run.run(KEY, progress=False)
    path, first = found.path, np.arange(2000)
    for chosen in np.asarray(path.ancestors)[1:]:
        first = first[chosen]
    shares = np.bincount(first, np.asarray(found.weights, float), 2000)
    generations = 1 + int(path.resampled.sum())
    assert 3 < generations < 20
    assert int(path.since[-1]) == 0
    assert int(path.num_ancestors[-1]) == len(set(first))
    exact = 1 - (2000 / 1999) ** generations * (1 - np.sum(shares**2))
    # A sum of squares in single precision, of which a part is taken away.
    np.testing.assert_allclose(-np.expm1(-found.log_evidence_variance), exact, rtol=1e-4)


@pytest.mark.parametrize(("scheme", "threshold"), [(multinomial, 1.0), (systematic, 0.5)])
def test_the_variance_in_a_long_series(scheme: Any, threshold: float) -> None:
    """Particles whose ancestors are all one long before the end: the estimate beside the variance of replicates."""
    algorithm = smc(series(150), 100, resample=scheme, threshold=threshold)
    runs = replicates(dataclasses.replace(algorithm, collect=lambda particles: ()), 400)
    assert np.all(np.asarray(runs.path.since)[:, -1] > 60)
    single, variance = np.asarray(runs.log_evidence_variance), np.var(runs.log_evidence, ddof=1)
    error = np.hypot(single.std() / 20, variance * (2 / 399) ** 0.5)
    # What a lag of some ten generations leaves out, a tenth at most in this series.
    assert abs(single.mean() - variance) < 5 * error + 0.1 * variance, (single.mean(), variance)
    assert error < 0.1 * variance


def test_history_traces_paths() -> None:
    found = smc(series(8), 20, history="full", threshold=1.0).run(KEY, progress=False)
    path = found.path
    assert path is not None
    index = np.arange(20)
    for t in range(7, int(path.since[-1]), -1):
        index = np.asarray(path.ancestors)[t][index]
    assert len(set(index.tolist())) == int(path.num_ancestors[-1])
    np.testing.assert_array_equal(path.particles[-1], found.choices["state"])
    np.testing.assert_allclose(path.ess[-1], found.ess(), rtol=1e-5)
    assert smc(series(8), 20).run(KEY, progress=False).path.ancestors is None


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_the_tree_of_those_with_descendants(threshold: float) -> None:
    """The paths of the full history, from fewer particles; without resampling all are kept, and room is made."""
    n, steps = 20, 40
    y = Y[:steps]
    runs = [
        smc(Linear(y, steps), n, history=history, threshold=threshold).run(KEY, progress=False)
        for history in ("full", "ancestors")
    ]
    full, kept = (run.path for run in runs)
    assert full is not None
    assert kept is not None
    np.testing.assert_array_equal(runs[0].log_weights, runs[1].log_weights)
    paths = np.asarray(runs[0].along(full.particles))
    np.testing.assert_array_equal(paths, kept.tree.paths(steps))
    # Values differ where particles do: the tree has those that the paths go through, and no other.
    different = sum(len(np.unique(paths[:, t])) for t in range(steps))
    assert kept.tree.capacity == different
    assert different == n * steps if threshold == 0 else different < n * steps / 2
    with pytest.raises(WeftError, match="has history='ancestors', this one 'full'"):
        smc(Linear(y, steps), n, history="full").run(KEY, resume=runs[1], progress=False)


def test_the_tree_needs_little_room() -> None:
    n, steps = 1000, 5000
    algorithm = smc(Linear(jnp.zeros(steps), steps), n, history="ancestors")
    state = jax.eval_shape(algorithm.init, KEY, None)
    room = algorithm.before_chunk(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state))[0]
    nodes = steps + 4 * n * (1 + np.log2(n))
    assert n <= room.tree.capacity <= nodes
    assert nodes < 0.01 * n * steps + 1


@pytest.mark.parametrize("history", ["ancestors", "full"])
def test_a_run_that_was_read_goes_on_as_one_that_was_not(history: str, tmp_path: Path) -> None:
    part = smc(series(8), 20, history=history, threshold=1.0).run(KEY, progress=False)
    part.save(tmp_path / "part")
    read = load(tmp_path / "part")
    assert repr(read) == repr(part)
    for one, other in zip(jax.tree.leaves(read.path), jax.tree.leaves(part.path), strict=True):
        np.testing.assert_array_equal(one, other)
    longer = smc(series(12), 20, history=history, threshold=1.0)
    runs = [longer.run(KEY, resume=resume, progress=False) for resume in (read, part)]
    for one, other in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ModelError, match="of another model, or of another history"):
        smc(series(12), 20, threshold=1.0).run(KEY, resume=read, progress=False)
    of_a_panel = eqx.tree_at(lambda r: r.state, part, PanelState(part.state.iteration, 0, KEY))
    with pytest.raises(ModelError, match="of another model"):
        longer.run(KEY, resume=of_a_panel, progress=False)
    for resume in (read, part):
        with pytest.raises(WeftError, match="has num_particles=20, this one 30"):
            smc(series(12), 30, history=history).run(KEY, resume=resume, progress=False)
    if history == "full":  # generations that follow are those of the scheme that follows
        other = smc(series(12), 20, multinomial, 1.0, history)
        one, two = (
            other.run(KEY, resume=r, progress=False).log_evidence_variance for r in (read, part)
        )
        assert one == two


def test_what_is_printed() -> None:
    text = repr(smc(series(8), 200).run(KEY, progress=False))
    assert "8 steps, resampled before" in text
    assert "log evidence" in text
    poor = repr(smc(series(30), 3, threshold=0.0).run(KEY, progress=False))
    assert "degenerated at step" in poor
    assert "too few for the standard error" in poor


class Impossible(Linear):
    def weigh(self, t: Any, x: Any) -> Any:
        return x, jnp.where(jnp.asarray(t) == 3, -jnp.inf, 0.0)


class Growing(Linear):
    def step(self, key: Any, t: Any, x: Any) -> Any:
        return jnp.stack([x, x]), jnp.zeros(())


def test_errors() -> None:
    with pytest.raises(DensityError, match="at step 3, all weights are zero"):
        smc(Impossible(Y[:5], 5), 10).run(KEY, progress=False)
    with pytest.raises(ModelError, match="a step changes the particle"):
        smc(Growing(Y[:5], 5), 10).run(KEY, progress=False)
    for settings, match in (
        ({"num_particles": 1}, "num_particles"),
        ({"threshold": 2.0}, "threshold"),
        ({"history": "all"}, "history"),
    ):
        with pytest.raises(WeftError, match=match):
            smc(series(5), **settings)
    with pytest.raises(TypeError, match="Feynman-Kac"):
        smc(3)
    with pytest.raises(TypeError, match="made from a target"):
        smc(lambda target: series(5)).run(KEY)


def test_a_model_made_from_a_target() -> None:
    @gen
    def level() -> None:
        sample("x", dist.Normal(0.0, 1.0))
        sample("y", dist.Normal(0.0, 1.0))

    target = level().given({"y": 1.0})
    made = smc(lambda t: series(4 if t.latents == ("x",) else 5), 30)
    found = made.run(KEY, target, progress=False)
    assert found.path.ess.shape == (4,)
