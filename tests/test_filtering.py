"""Filtering of programs: against exact filters, enumeration and quadrature, whatever the proposal.

Evidence is unbiased, so that means of replicates are held to five standard errors of theirs (false alarms: one in
a million a comparison), and filter means to five standard errors from replicates; keys are fixed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import filtering, multinomial, smc
from weft.ppl import AddressError, DensityError, ModelError, WeftError

from benchmarks import filters
from weft import gen, marginalize, observed, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane
KEY = jax.random.key(7)
Normal = dist.Normal
CASES = Path(__file__).parent / "refcases" / "ssm"


def case(name: str) -> dict[str, Any]:
    return json.loads((CASES / f"{name}.json").read_text())


@gen
def linear(p: dict[str, jax.Array], num_steps: int) -> Any:
    """A linear-Gaussian series; the first state emits the first observation."""
    root = {k: jnp.linalg.cholesky(p[k]) for k in ("Q", "R", "P0")}

    def law(mean: Any, name: str) -> Any:
        return dist.MultivariateNormal(mean, scale_tril=root[name])

    def step(carry: Any, _: Any) -> Any:
        mean, scale = carry
        x = sample("x", dist.MultivariateNormal(mean, scale_tril=scale))
        sample("y", law(p["C"] @ x + p["d"], "R"))
        return (p["A"] @ x + p["b"], root["Q"]), None

    return jax.lax.scan(step, (p["m0"], root["P0"]), length=num_steps)[1]


@gen
def hidden_markov(p: dict[str, jax.Array], num_steps: int) -> Any:
    def step(probs: Any, _: Any) -> Any:
        z = sample("z", dist.Categorical(probs))
        sample("y", Normal(p["mu"][z], p["sd"][z]))
        return p["P"][z], None

    return jax.lax.scan(step, p["pi"], length=num_steps)[1]


def arrays(params: dict[str, Any]) -> dict[str, jax.Array]:
    return {k: jnp.asarray(v) for k, v in params.items()}


def replicates(algorithm: Any, target: Any, num: int, key: Any = KEY) -> Any:
    run = jax.jit(jax.vmap(lambda k: algorithm.run(k, target, progress=False)))
    return run(jax.random.split(key, num))


def unbiased(log_evidence: Any, exact: float) -> None:
    ratio = np.exp(np.asarray(log_evidence, np.float64) - exact)
    error = ratio.std(ddof=1) / len(ratio) ** 0.5
    assert error < 0.15
    assert abs(ratio.mean() - 1) < 5 * error, (ratio.mean(), error)


@pytest.mark.parametrize(
    ("name", "proposal"), [("lgssm_dim1", "optimal"), ("lgssm_dim4", None), ("hmm5", None)]
)
def test_evidence_and_filter_means(name: str, proposal: Any) -> None:
    found, steps, num = case(name), 40, 24
    y = jnp.asarray(found["y"])[:steps]
    exact = np.sum(found["log_likelihood_increments"][:steps])
    hmm = name == "hmm5"
    model = (hidden_markov if hmm else linear)(arrays(found["params"]), steps)
    address = "z" if hmm else "x"

    def collect(particles: Any) -> Any:
        x = particles.choices[address]
        x = jax.nn.one_hot(x, found["K"]) if hmm else x
        return jnp.sum(particles.weights[:, None] * x, 0)

    num_particles = 200 if proposal else 4000
    algorithm = smc(filtering(proposal), num_particles=num_particles, collect=collect)
    runs = replicates(algorithm, model.given({"y": y}), num)
    unbiased(runs.log_evidence, exact)
    means = np.asarray(runs.path.collected)
    reference = np.asarray(found["filter_prob" if hmm else "filter_mean"])[:steps]
    error = means.std(0, ddof=1) / num**0.5
    # A ratio of estimates is biased by about the square of its standard deviation over the spread of the law.
    bias = num * error**2 / means.std()
    z = (np.abs(means.mean(0) - reference.reshape(means.shape[1:])) - bias) / (error + 1e-6)
    assert z.max() < 7, z.max()  # Student's t of 23 degrees beyond 7: 4e-7 each, 200 comparisons


@gen
def whole(num_steps: int) -> Any:
    """Choices before, within and after the scan, a counter, a value that the carry never changes."""
    a = sample("a", Normal(0.5, 0.1))
    x0 = sample("x0", Normal(0.0, 1.0))

    @jax.jit
    def run(a: Any, x0: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            x, i, slope = carry
            x = sample("x", Normal(slope * x, 1.0))
            sample("y", Normal(x, 0.5))
            return (x, i + 1, slope), x * slope

        return jax.lax.scan(step, (x0, 0, a), length=num_steps)

    (x, _, _), xs = run(a, x0)
    sample("w", Normal(jnp.sum(xs) * 0.1, 1.0))
    return x


STEPS, W = 8, 1.0
Y = np.asarray(jax.random.normal(jax.random.key(3), (STEPS,)), np.float64)


def exact_evidence(seen: Any = None) -> float:
    """By quadrature over `a`; the rest is jointly normal. `seen`: which observations there are."""
    seen = np.ones(STEPS, bool) if seen is None else np.asarray(seen)
    grid, terms = np.linspace(-0.3, 1.3, 801), []
    for a in grid:
        drawn = np.zeros((STEPS + 1, STEPS + 1))
        drawn[0, 0] = 1
        for t in range(1, STEPS + 1):
            drawn[t] = a * drawn[t - 1]
            drawn[t, t] += 1
        design = np.vstack([np.eye(STEPS + 1)[1:][seen], 0.1 * a * np.r_[0, np.ones(STEPS)]])
        noise = np.diag([0.25] * int(seen.sum()) + [1.0])
        covariance = design @ drawn @ drawn.T @ design.T + noise
        values = np.r_[Y[seen], W]
        quadratic = values @ np.linalg.solve(covariance, values)
        log_density = -0.5 * quadratic - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
        terms.append(log_density - 0.5 * ((a - 0.5) / 0.1) ** 2 - np.log(0.1 * np.sqrt(2 * np.pi)))
    terms = np.asarray(terms)
    return float(np.log(np.trapezoid(np.exp(terms - terms.max()), grid)) + terms.max())


@gen
def towards(x: Any, y: Any) -> None:
    mean = jnp.where(jnp.isnan(y), 0.5 * x, 0.8 * y + 0.1 * x)
    sample("x", Normal(mean, jnp.where(jnp.isnan(y), 1.2, 0.6)))


def guide(carry: Any, t: Any, seen: Any) -> Any:
    x, _, _ = carry
    return towards(x, seen["y"])


def hint(carry: Any, t: Any, seen: Any) -> Any:
    _, _, slope = carry
    y = seen["y"]
    return jnp.where(jnp.isnan(y), 0.0, Normal(slope * carry[0], 1.2).log_prob(y))


FILTERS: dict[str, Callable[[], filtering]] = {
    "bootstrap": filtering,
    "guided": lambda: filtering(guide),
    "auxiliary": lambda: filtering(lookahead=hint),
    "optimal": lambda: filtering("optimal"),
    "guided and auxiliary": lambda: filtering(guide, hint),
}


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("bootstrap", False),
        ("guided", False),
        ("auxiliary", False),
        ("optimal", False),
        ("optimal", True),
        ("guided and auxiliary", True),
    ],
)
def test_whatever_the_proposal(name: str, missing: bool) -> None:
    seen = np.arange(STEPS) % 3 != 1 if missing else np.ones(STEPS, bool)
    y = observed(np.where(seen, Y, np.nan), where=seen, missing="impute") if missing else Y
    target = whole(STEPS).given({"y": y, "w": W})
    unbiased(
        replicates(smc(FILTERS[name](), num_particles=400), target, 100).log_evidence,
        exact_evidence(seen),
    )


def test_data_shorter_than_the_scan() -> None:
    seen = np.arange(STEPS) < 5
    target = whole(STEPS).given({"y": Y[:5], "w": W})
    runs = replicates(smc(filtering(), num_particles=400), target, 100)
    unbiased(runs.log_evidence, exact_evidence(seen))


def test_what_a_step_can_sum_out() -> None:
    """Rao and Blackwell: the same evidence, of lower variance; summed out of the model or of its step alike."""

    def step(x: Any, _: Any) -> Any:
        k = sample("k", dist.Bernoulli(0.3))
        x = sample("x", Normal(0.9 * x, 1.0))
        sample("y", Normal(x, jnp.where(k == 1, 3.0, 0.5)))
        return x, None

    def chain(step: Any) -> Any:
        return gen(lambda: jax.lax.scan(step, 0.0, length=STEPS)[1])

    models = chain(step), marginalize(chain(step), "k"), chain(marginalize(step, "k"))
    algorithm = smc(filtering(), num_particles=200)
    logs = np.array(
        [
            np.asarray(replicates(algorithm, m().given({"y": 2 * Y}), 300).log_evidence, float)
            for m in models
        ]
    )
    np.testing.assert_allclose(logs[1], logs[2], rtol=1e-5)
    z = np.exp(logs[:2] - logs.max())
    error = np.sqrt((z.var(1, ddof=1) / 300).sum())
    assert abs(z[0].mean() - z[1].mean()) < 5 * error
    assert z[1].var() < 0.8 * z[0].var()


def test_a_scan_that_runs_backwards() -> None:
    @gen
    def backwards() -> Any:
        def step(x: Any, scale: Any) -> Any:
            x = sample("x", Normal(x, scale))
            return x, sample("y", Normal(x, 0.5))

        return jax.lax.scan(step, 0.0, jnp.array([3.0, 2.0, 1.0]), reverse=True)[0]

    y = np.array([1.0, -1.0, 0.5])
    walk = np.cumsum([[1, 0, 0], [0, 2, 0], [0, 0, 3]], 0).astype(
        float
    )  # of the last, middle, first
    covariance = walk @ walk.T + 0.25 * np.eye(3)
    last_first = y[::-1]
    exact = -0.5 * last_first @ np.linalg.solve(covariance, last_first)
    exact -= 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    target = backwards().given({"y": y})
    algorithm = smc(filtering(), num_particles=1000, history="full")
    runs = replicates(algorithm, target, 50)
    unbiased(runs.log_evidence, exact)
    smoothed = (walk @ walk.T @ np.linalg.solve(covariance, last_first))[::-1]
    means = np.asarray(
        jnp.einsum("rn,rnt->rt", jax.nn.softmax(runs.log_weights), runs.choices["x"])
    )
    error = means.std(0, ddof=1) / 50**0.5
    assert (np.abs(means.mean(0) - smoothed) < 5 * error + 0.01).all()  # + bias of order 1/N


def test_paths_are_those_of_the_particles() -> None:
    target = whole(STEPS).given({"y": Y, "w": W})
    run = smc(filtering(), num_particles=50, history="full").run(KEY, target, progress=False)
    assert run.choices["x"].shape == (50, STEPS)
    assert run.choices["a"].shape == (50,)
    last = smc(filtering(), num_particles=50).run(KEY, target, progress=False)
    np.testing.assert_array_equal(run.choices["x"][:, -1], last.choices["x"])
    np.testing.assert_array_equal(run.log_weights, last.log_weights)
    # A path's particles carry the same parameter all along.
    along = run.along(run.path.particles)["before"]["a"]
    np.testing.assert_array_equal(along, np.broadcast_to(along[:, -1:], along.shape))
    assert jnp.isfinite(jax.vmap(target.log_density)(run.choices)).all()


def test_a_run_is_gone_on_with() -> None:
    found = case("lgssm_dim1")
    p, y = arrays(found["params"]), jnp.asarray(found["y"])
    algorithm = smc(filtering(), num_particles=100, history="ancestors")
    whole_run = algorithm.run(KEY, linear(p, 30).given({"y": y[:30]}), progress=False)
    part = algorithm.run(KEY, linear(p, 18).given({"y": y[:18]}), progress=False)
    rest = algorithm.run(KEY, linear(p, 30).given({"y": y[:30]}), resume=part, progress=False)
    np.testing.assert_allclose(rest.log_evidence, whole_run.log_evidence, rtol=1e-5)
    np.testing.assert_array_equal(rest.choices["x"], whole_run.choices["x"])
    short, long = whole(5).given({"y": Y[:5], "w": W}), whole(6).given({"y": Y[:6], "w": W})
    ended = smc(filtering(), 20).run(KEY, short, progress=False)
    with pytest.raises(WeftError, match="sites after its scan"):
        smc(filtering(), 20).run(KEY, long, resume=ended, progress=False)


def test_new_data_compile_nothing() -> None:
    target = whole(STEPS).given({"y": Y, "w": W})
    algorithm = smc(filtering(guide), num_particles=50)
    for _ in range(2):
        algorithm.run(KEY, target, progress=False)
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: events.append(event)
    )
    algorithm.run(KEY, whole(STEPS).given({"y": Y + 1, "w": 0.5}), progress=False)
    assert not [e for e in events if "backend_compile" in e]


def test_derivative_of_the_evidence() -> None:
    """With resampling at every step the gradient estimates the score (Scibior and Wood 2021)."""
    found = case("lgssm_dim1")
    p, y = arrays(found["params"]), jnp.asarray(found["y"])[:20]

    def log_evidence(log_scale: Any, key: Any) -> Any:
        target = linear({**p, "Q": p["Q"] * jnp.exp(log_scale)}, 20).given({"y": y})
        algorithm = smc(filtering(), 400, resample=multinomial, threshold=1.0)
        return algorithm.run(key, target, progress=False).log_evidence

    def exact(log_scale: float) -> float:
        a, b, c, d = (float(np.ravel(p[k])[0]) for k in ("A", "b", "C", "d"))
        q, r = float(p["Q"][0, 0]) * np.exp(log_scale), float(p["R"][0, 0])
        mean, var, total = float(p["m0"][0]), float(p["P0"][0, 0]), 0.0
        for value in np.asarray(y, np.float64).ravel():
            s = c * c * var + r
            residual = value - c * mean - d
            total -= 0.5 * (np.log(2 * np.pi * s) + residual**2 / s)
            gain = var * c / s
            mean, var = a * (mean + gain * residual) + b, a * a * (1 - gain * c) * var + q
        return total

    keys = jax.random.split(KEY, 100)
    scores = np.asarray(jax.jit(jax.vmap(jax.grad(log_evidence), (None, 0)))(0.0, keys))
    expected = (exact(1e-4) - exact(-1e-4)) / 2e-4
    error = scores.std(ddof=1) / 10
    assert error < 0.5
    # The log of the estimate is biased by minus half its variance, .05 here; its derivative by as much.
    assert abs(scores.mean() - expected) < 5 * error + 0.05


def test_cost_beside_a_filter_by_hand() -> None:
    """Of compiled work, loops counted once; `python benchmarks/filters.py` has the figures of larger runs."""
    y = filters.data(20)
    own, hand = (
        filters.counts(make(2000, 1.0), (KEY, y)) for make in (filters.by_weft, filters.by_hand)
    )
    assert own[0] < 1.1 * hand[0]
    assert own[1] < 1.1 * hand[1]


# --- errors -------------------------------------------------------------------------------------


def run(target: Any, how: Any = None, **settings: Any) -> Any:
    return smc(how or filtering(), 20, **settings).run(KEY, target, progress=False)


def test_what_cannot_be_filtered() -> None:
    @gen
    def flat() -> None:
        sample("y", Normal(0.0, 1.0))

    with pytest.raises(ModelError, match=r"no jax\.lax\.scan with sites"):
        run(flat().given({"y": 1.0}))
    with pytest.raises(ModelError, match="no site in the scan .* is observed"):
        run(whole(STEPS).given({"w": 1.0}))

    @gen
    def twice() -> None:
        def step(x: Any, _: Any) -> Any:
            return x, sample("y", Normal(x, 1.0))

        def other(x: Any, _: Any) -> Any:
            return x, sample("v", Normal(x, 1.0))

        jax.lax.scan(step, 0.0, length=3)
        jax.lax.scan(other, 0.0, length=3)

    both = twice().given({"y": jnp.zeros(3), "v": jnp.zeros(3)})
    with pytest.raises(ModelError, match="several scans .*'y'.*'v'"):
        run(both)
    with pytest.raises(ModelError, match="no top-level scan .* holds the site 'z'"):
        run(both, filtering(scan="z"))
    assert run(both, filtering(scan="v")).num_particles == 20

    @gen
    def branching() -> None:
        def yes() -> Any:
            return jax.lax.scan(lambda x, _: (sample("y", Normal(x, 1.0)), None), 0.0, length=3)[0]

        jax.lax.cond(sample("b", dist.Bernoulli(0.5)) > 0, yes, lambda: 0.0)

    with pytest.raises(ModelError, match="inside a cond"):
        run(branching().given({"y": jnp.zeros(3)}))


def test_proposals_that_do_not_fit() -> None:
    @gen
    def other() -> None:
        sample("q", Normal(0.0, 1.0))

    target = whole(STEPS).given({"y": Y, "w": W})
    with pytest.raises(AddressError, match="draws 'q', and the latent choices of a step are 'x'"):
        run(target, filtering(lambda carry, t, seen: other()))
    with pytest.raises(WeftError, match="a function or 'optimal'"):
        filtering("best")  # type: ignore[arg-type]
    with pytest.raises(WeftError, match="rejuvenate"):
        run(target, waste_free=2)


def test_impossible_observations_are_named() -> None:
    @gen
    def bounded() -> None:
        def step(x: Any, _: Any) -> Any:
            x = sample("x", dist.Uniform(x - 1.0, x + 1.0))
            sample("y", dist.Uniform(x - 1.0, x + 1.0))
            return x, None

        jax.lax.scan(step, 0.0, length=4)

    target = bounded().given({"y": jnp.array([0.0, 0.5, 40.0, 0.0])})
    with pytest.raises(DensityError, match=r"step 2, all weights are zero.*y = 40"):
        run(target)
