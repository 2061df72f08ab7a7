"""Filters of models with chains summed out: steps hand on the law of what the carry holds of them.

With everything summed out each particle has the exact density as its weight: two particles are compared with it in
double precision. With other choices left, evidence and posterior are held to enumeration by five standard errors.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from scipy import stats
from weft.inference import filtering, mcmc, recover, smc
from weft.ppl import ModelError, WeftError

from weft import gen, kernels, marginalize, observed, sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick"),
]  # once is enough: not in every lane
KEY = jax.random.key(3)
Normal = dist.Normal
Y = np.array([0.5, 1.0, -0.3, 0.2, 2.0])


def series(step: Callable[..., Any], first: Any, xs: Any = None) -> Any:
    return jax.lax.scan(step, first, xs, length=len(Y))[0]


# --- everything summed out --------------------------------------------------------------------------------------------


@gen
def regression() -> None:
    """Coefficients that every step reads, a state of second order, and an observation of both in the end."""
    slope = sample("slope", Normal(0.0, 1.0).expand([2]))

    def step(carry: Any, u: Any) -> Any:
        x = sample("x", Normal(0.6 * carry[0] - 0.3 * carry[1] + slope @ u, 0.3))
        sample("y", Normal(x, 0.3))
        return (x, carry[0]), x  # an output that nothing reads

    x, _ = series(step, (0.1, 0.2), jnp.arange(10.0).reshape(5, 2) / 5)
    sample("last", Normal(x + slope[0], 0.3))


@gen
def trend() -> None:
    """Two choices a step, after two before the scan; the carry has affine functions of them."""
    level, slope = sample("level0", Normal(0.0, 1.0)), sample("slope0", Normal(0.0, 0.3))

    def step(carry: Any, _: Any) -> Any:
        mean, slope = carry
        level = sample("level", Normal(mean, 0.5))
        sample("y", Normal(level, 0.3))
        slope = sample("slope", Normal(slope, 0.1))
        return (level + slope, slope), None

    series(step, (level + slope, slope))


@gen
def two_chains() -> None:
    """Finite choices, two a step; their first values are drawn before the scan."""
    table = jnp.array([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    z, w = sample("z0", dist.Categorical(jnp.full(3, 1 / 3))), sample("w0", dist.Bernoulli(0.4))

    def step(carry: Any, _: Any) -> Any:
        z = sample("z", dist.Categorical(table[carry[0]]))
        w = sample("w", dist.Bernoulli(jnp.where(carry[1] == 1, 0.7, 0.2)))
        sample("y", Normal(z - 1.0 * w, 0.5))
        return (z, w), None

    series(step, (z, w))


ALL = {
    "regression": (regression, ("slope", "x"), {"last": 1.0}),
    "trend": (trend, ("level0", "slope0", "level", "slope"), {}),
    "two chains": (two_chains, ("z0", "w0", "z", "w"), {}),
}


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_to_chance(name: str, x64: None) -> None:
    model, addresses, more = ALL[name]

    def target(y: Any) -> Any:
        return marginalize(model, *addresses)().given({"y": y, **more})

    def filtered(y: Any) -> Any:
        return smc(filtering(), num_particles=2).run(KEY, target(y), progress=False).log_evidence

    # Rounding: 2e-16 of sums of some hundred, and covariances of a condition below 1e3; a digit less in derivatives.
    if name != "trend":  # derivatives cost as much again to compile
        np.testing.assert_allclose(filtered(Y), target(Y).log_density({}), rtol=1e-10)
        return
    found, slope = jax.value_and_grad(filtered)(jnp.asarray(Y))
    density, exact = jax.value_and_grad(lambda y: target(y).log_density({}))(jnp.asarray(Y))
    np.testing.assert_allclose(found, density, rtol=1e-10)
    np.testing.assert_allclose(slope, exact, rtol=1e-8)


# --- with a regime that stays -----------------------------------------------------------------------------------------


@gen
def switching() -> None:
    def step(carry: Any, _: Any) -> Any:
        x, z = carry
        z = sample("z", dist.Bernoulli(jnp.where(z == 1, 0.8, 0.2)))
        x = sample("x", Normal(0.9 * x + z, jnp.where(z == 1, 0.3, 1.0)))
        sample("y", Normal(x, 0.5))
        return (x, z), None

    series(step, (0.3, 0))


MODEL = marginalize(switching, "x")
REGIMES = jnp.array(list(itertools.product([0, 1], repeat=len(Y))))


@pytest.fixture(scope="module")
def target() -> Any:
    return MODEL().given({"y": Y})


def densities(target: Any) -> Any:
    return jax.vmap(lambda z: target.log_density({"z": z}))(REGIMES)


@pytest.fixture(scope="module")
def exact(target: Any) -> Any:
    """The log evidence, and the posterior probability of each regime at each step."""
    logs = densities(target)
    return jax.nn.logsumexp(logs), jax.nn.softmax(logs) @ REGIMES


@gen
def by_what_is_seen(law: Any, y: Any) -> None:
    sample("z", dist.Bernoulli(jax.nn.sigmoid(y - 0.9 * law.mean)))


def guide(carry: Any, t: Any, seen: Any) -> Any:
    law, _ = carry  # of the state: what is summed out has no value
    return by_what_is_seen(law, seen["y"])


@pytest.mark.parametrize("proposal", ["optimal", guide], ids=["optimal", "guided"])
def test_regimes_by_particles(target: Any, exact: Any, proposal: Any) -> None:
    found = smc(filtering(proposal), 2000, history="full").run(KEY, target, progress=False)
    evidence, regimes = exact
    assert abs(found.log_evidence - evidence) < 5 * found.log_evidence_variance**0.5
    # A weighted mean of 2,000 paths of which 400 at least differ in what they are worth.
    assert found.ess() > 400
    error = np.sqrt(np.maximum(regimes * (1 - regimes), 1 / 400) / 400)
    assert np.all(np.abs(found.weights @ found.choices["z"] - regimes) < 5 * error)
    if proposal == "optimal":  # and the states, given each path
        means = recover(KEY, MODEL, found, sites="marginals").derived["x"]
        whole = dataclasses.replace(found, choices={"z": REGIMES}, log_weights=densities(target))
        each = recover(KEY, MODEL, whole, sites="marginals").derived["x"]
        mean = whole.weights @ each
        error = np.sqrt(whole.weights @ (each - mean) ** 2 / 400)
        assert np.all(np.abs(found.weights @ means - mean) < 5 * error)


def test_missing_observations_and_a_path_given(exact: Any) -> None:
    """Summed over what is not seen, and as the law of a chain of whole paths."""
    seen = jnp.array([True, True, False, True, True])
    part = MODEL().given({"y": observed(Y, where=seen)})
    grid = jnp.linspace(-10.0, 10.0, 401)

    def density(z: Any, y: Any) -> Any:
        return MODEL().given({"y": jnp.asarray(Y).at[2].set(y)}).log_density({"z": z})

    logs = jax.jit(jax.vmap(jax.vmap(density, (None, 0)), (0, None)))(REGIMES, grid)
    evidence = jax.nn.logsumexp(logs) + jnp.log(grid[1] - grid[0])
    found = smc(filtering(), 4000).run(KEY, part, progress=False)
    assert abs(found.log_evidence - evidence) < 5 * found.log_evidence_variance**0.5

    moves = mcmc(kernels.conditional_smc(20, update=None), 1000, num_warmup=50, num_chains=2)
    draws = moves.run(KEY, MODEL().given({"y": Y}), progress=False)
    z = np.asarray(draws.choices["z"], float)
    ess = effective_sample_size(z)
    assert ess.min() > 100
    error = np.sqrt(np.maximum(exact[1] * (1 - exact[1]), 0.01) / ess)
    assert np.all(np.abs(z.mean((0, 1)) - exact[1]) < 5 * error)


# --- gaps -------------------------------------------------------------------------------------------------------------

GAPS = np.random.default_rng(0)
TIMES = {"y": (5,), "w": (5, 2), "v": (5, 3), "first": (2,), "last": ()}
SEEN = {a: GAPS.random(shape) < 0.5 for a, shape in TIMES.items()}
for at in ("y", "w", "v"):
    SEEN[at][2] = False  # a step that sees nothing
VALUES = {a: GAPS.normal(size=shape) for a, shape in TIMES.items()}
COUNTS = np.array([0, 3, 1, 2, 2])
SLOPES = np.array([1.0, 2.0, -1.0])


@gen
def gappy_trend() -> None:
    """Several sites a step, with elements of a batch and of a vmap; observations before and after the scan."""
    level, slope = sample("level0", Normal(0.0, 1.0)), sample("slope0", Normal(0.0, 0.3))
    sample("first", Normal(level * jnp.ones(2), 0.4))

    def step(carry: Any, _: Any) -> Any:
        level = sample("level", Normal(carry[0] + carry[1], 0.5))
        slope = sample("slope", Normal(carry[1], 0.1))
        sample("y", Normal(level, 0.3))
        sample("w", Normal(jnp.stack([level + slope, level - slope]), jnp.array([0.2, 0.6])))
        jax.vmap(lambda a: sample("v", Normal(a * level, 0.7)))(jnp.array(SLOPES))
        return (level, slope), None

    level, _ = series(step, (level, slope))
    sample("last", Normal(level, 0.3))


def updated(m: Any, p: Any, rows: Any) -> Any:
    """A Kalman update, one number after the other: each row is (loadings, sd, value)."""
    total = 0.0
    for h, sd, y in rows:
        h = np.asarray(h, float)
        s, e = h @ p @ h + sd**2, y - h @ m
        total += -0.5 * (np.log(2 * np.pi * s) + e**2 / s)
        m, p = m + p @ h * e / s, p - np.outer(p @ h, h @ p) / s
    return m, p, total


def seen_of(address: str, t: Any, *rows: Any) -> list[Any]:
    """The rows that are seen, with their values."""
    seen, values = np.atleast_1d(SEEN[address][t]), np.atleast_1d(VALUES[address][t])
    return [(h, sd, y) for (h, sd), y, s in zip(rows, values, seen, strict=True) if s]


def by_kalman() -> float:
    motion, one = np.array([[1.0, 1.0], [0.0, 1.0]]), (1.0, 0.0)
    m, p = np.zeros(2), np.diag([1.0, 0.09])
    m, p, total = updated(m, p, seen_of("first", ..., (one, 0.4), (one, 0.4)))
    for t in range(5):
        m, p = motion @ m, motion @ p @ motion.T + np.diag([0.25, 0.01])
        rows = seen_of("y", t, (one, 0.3)) + seen_of("w", t, ((1, 1), 0.2), ((1, -1), 0.6))
        rows += seen_of("v", t, *(((a, 0.0), 0.7) for a in SLOPES))
        m, p, more = updated(m, p, rows)
        total += more
    return total + updated(m, p, seen_of("last", ..., (one, 0.3)))[2]


TABLE = np.array([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])


@gen
def gappy_chain() -> None:
    z = sample("z0", dist.Categorical(jnp.full(3, 1 / 3)))
    sample("first", Normal(z * jnp.ones(2), 0.5))

    def step(z: Any, _: Any) -> Any:
        z = sample("z", dist.Categorical(jnp.array(TABLE)[z]))
        sample("y", dist.Poisson(1.0 + z))
        sample("w", Normal(z * jnp.array([1.0, -1.0]), jnp.array([0.5, 0.8])))
        return z, None

    z = series(step, z)
    sample("last", Normal(1.0 * z, 0.5))


def by_forward_recursion() -> float:
    z, a = np.arange(3.0), np.full(3, 1 / 3)

    def weighed(a: Any, address: str, t: Any, *rows: Any) -> Any:
        for loading, sd, y in seen_of(address, t, *rows):
            a = a * stats.norm.pdf(y, loading * z, sd)
        return a

    a = weighed(a, "first", ..., (1, 0.5), (1, 0.5))
    for t in range(5):
        a = weighed(a @ TABLE, "w", t, (1, 0.5), (-1, 0.8))
        a = a * stats.poisson.pmf(COUNTS[t], 1 + z) if SEEN["y"][t] else a
    return np.log(weighed(a, "last", ..., (1, 0.5)).sum())


GAPPY = {
    "normal": (gappy_trend, ("level0", "slope0", "level", "slope"), VALUES, by_kalman),
    "finite": (gappy_chain, ("z0", "z"), {**VALUES, "y": COUNTS}, by_forward_recursion),
}


@pytest.mark.parametrize("name", GAPPY)
def test_what_is_missing_tells_nothing(name: str, x64: None) -> None:
    """Every way to leave out an element: in a batch, a vmap, a whole step, before the scan and after it."""
    model, addresses, values, exact = GAPPY[name]
    program = marginalize(model, *addresses)()
    data = {
        a: observed(values[a], where=SEEN[a], missing="drop") for a in TIMES if a in program.sites
    }
    target = program.given(data)
    np.testing.assert_allclose(target.log_density({}), exact(), rtol=1e-10)
    for proposal in (None, "optimal"):  # nothing is drawn, but for what is summed out
        found = smc(filtering(proposal), num_particles=2).run(KEY, target, progress=False)
        np.testing.assert_allclose(found.log_evidence, exact(), rtol=1e-10)


@gen
def two_sensors() -> None:
    """The regime is kept and the state is summed out."""

    def step(carry: Any, _: Any) -> Any:
        x, z = carry
        z = sample("z", dist.Bernoulli(jnp.where(z == 1, 0.8, 0.2)))
        x = sample("x", Normal(0.9 * x + z, jnp.where(z == 1, 0.3, 1.0)))
        sample("y", Normal(x, 0.5))
        sample("w", Normal(jnp.stack([x, -x]), 0.4))
        return (x, z), None

    series(step, (0.3, 0))


@gen
def regime_and_sensor(law: Any) -> None:
    sample("z", dist.Bernoulli(jax.nn.sigmoid(law.mean)))
    sample("w", Normal(law.mean * jnp.ones(2), 2.0))


def weights_by_hand(now: dict[str, Any], missing: str, proposal: Any) -> list[float]:
    """Log weights of one particle at each step: p(choices, data | past) / q(choices), by the Kalman filter."""
    y = now.get("y", VALUES["y"])
    w = now.get("w", VALUES["w"])
    m, p, before, found = np.array([0.3]), np.zeros((1, 1)), 0, []
    for t, z in enumerate(now["z"]):
        rows = [([1.0], 0.5, y[t]), ([1.0], 0.4, -w[t, 1]), ([1.0], 0.4, w[t, 0])]
        told = [SEEN["y"][t], SEEN["w"][t, 1], SEEN["w"][t, 0]]
        seen = [r for r, s in zip(rows, told, strict=True) if s]
        absent = [r for r, s in zip(rows, told, strict=True) if not s]
        used = rows if missing == "impute" else seen

        def stepped(z: int, m: Any = m, p: Any = p) -> Any:
            return 0.9 * m + z, 0.81 * p + (0.09 if z == 1 else 1.0)

        prior = stats.bernoulli.logpmf(np.arange(2), 0.8 if before == 1 else 0.2)
        if proposal == "optimal":
            each = [prior[k] + updated(*stepped(k), seen)[2] for k in range(2)]
            found.append(np.logaddexp(*each))
        else:
            log_q, drawn = prior[z], absent if missing == "impute" else []
            if proposal is not None:
                mean = float(m[0])
                log_q = stats.bernoulli.logpmf(z, 1 / (1 + np.exp(-mean)))
                log_q += sum(
                    stats.norm.logpdf(w[t, i], mean, 2.0) for i in range(2) if not SEEN["w"][t, i]
                )
                drawn = [] if SEEN["y"][t] else rows[:1]
            joint = prior[z] + updated(*stepped(z), used)[2]
            found.append(joint - log_q - updated(*stepped(z), drawn)[2])
        m, p, _ = updated(*stepped(z), used)
        before = z
    return found


@pytest.mark.parametrize(
    ("missing", "proposal"),
    [
        ("drop", None),
        ("drop", "optimal"),
        ("impute", None),
        ("impute", "optimal"),
        ("impute", "own"),
    ],
)
def test_weights_where_observations_are_missing(missing: Any, proposal: Any, x64: None) -> None:
    """Of paths that are drawn, and of the same paths given, as conditional SMC has them."""
    data = {a: observed(VALUES[a], where=SEEN[a], missing=missing) for a in ("y", "w")}
    target = marginalize(two_sensors, "x")().given(data)
    propose = (
        (lambda carry, t, seen: regime_and_sensor(carry[0])) if proposal == "own" else proposal
    )
    model = filtering(propose)(target)

    def along(key: Any) -> Any:
        keys, steps = jax.random.split(key, 5), jnp.arange(1, 5)

        def on(particle: Any, x: Any) -> Any:
            particle, log_weight = model.step(*x, particle)
            return particle, (model.taken(particle), log_weight)

        def again(particle: Any, x: Any) -> Any:
            return model.replay(x[0], particle, x[1])

        particle, weight = model.init(keys[0])
        first = model.taken(particle)
        path, weights = jax.lax.scan(on, particle, (keys[1:], steps))[1]
        particle, given = model.replay(jnp.int32(0), None, first)
        givens = jax.lax.scan(again, particle, (steps, path))[1]
        path = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, path)
        return path, jnp.append(weight, weights), jnp.append(given, givens)

    paths, drawn, given = jax.jit(jax.vmap(along))(jax.random.split(KEY, 3))
    np.testing.assert_allclose(drawn, given, rtol=1e-10, atol=1e-12)
    for i in range(3):
        now = {a: np.asarray(x[i]) for a, x in paths.items()}
        for a in ("y", "w"):  # what is seen stays as it is
            if a in now:
                np.testing.assert_array_equal(now[a][SEEN[a]], VALUES[a][SEEN[a]])
        exact = weights_by_hand(now, missing, proposal)
        np.testing.assert_allclose(drawn[i], exact, rtol=1e-9, atol=1e-9)


# --- what cannot be handed on -----------------------------------------------------------------------------------------


def test_refusals() -> None:
    def refused(step: Any, first: Any, *addresses: str) -> str:
        @gen
        def model() -> None:
            series(step, first)

        model = marginalize(model, *addresses)
        with pytest.raises((ModelError, WeftError)) as caught:
            smc(filtering(), 10).run(KEY, model().given({"y": Y}), progress=False)
        return str(caught.value)

    def older(carry: Any, _: Any) -> Any:
        z = sample("z", dist.Bernoulli(0.2 + 0.3 * carry[0] + 0.3 * carry[1]))
        sample("y", Normal(1.0 * z, 0.3))
        return (z, carry[0]), None

    def curved(x: Any, _: Any) -> Any:
        x = sample("x", Normal(x, 0.3))
        sample("y", Normal(x, 0.3))
        return x**2, None

    def mixed(carry: Any, _: Any) -> Any:
        z = sample("z", dist.Bernoulli(0.2 + 0.3 * carry[1]))
        x = sample("x", Normal(carry[0], 0.3))
        sample("y", Normal(x, 0.3))
        return (x, z), None

    assert "of more than the last step" in refused(older, (0, 1), "z")
    assert "not affine: carry the choice" in refused(curved, 1.0, "x")
    assert "normal choices alone, or finite ones alone" in refused(mixed, (0.0, 0), "x", "z")

    @gen
    def sequence() -> None:
        slope = sample("slope", Normal(0.0, 1.0))

        def step(x: Any, u: Any) -> Any:
            sample("y", Normal(u, 0.3))
            return x, None

        series(step, 0.0, slope * jnp.ones(5))

    with pytest.raises(ModelError, match="hands on consts and carry only"):
        filtering()(marginalize(sequence, "slope")().given({"y": Y}))

    @gen
    def forgotten() -> None:
        """The first state is summed out, and the steps replace it by states that are kept."""
        first = sample("first", dist.Bernoulli(0.3))

        def step(z: Any, _: Any) -> Any:
            z = sample("z", dist.Bernoulli(0.2 + 0.5 * z))
            sample("y", Normal(1.0 * z, 0.3))
            return z, None

        series(step, first)

    with pytest.raises(ModelError, match="hands on another law of 'first' than the steps do"):
        filtering()(marginalize(forgotten, "first")().given({"y": Y}))
