"""Exact marginalisation against sums over all joint values, one by one; chains by both recursions; what is refused.

Every case of `summed` is a program with discrete choices. Its marginal density and the gradient by everything else are
held to 1e-10 of the log of the sum over all joint values of the density of the program as it stands (`bruteforce`).
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.sharding import PartitionSpec
from weft.ppl import observed
from weft.ppl.stage.addresses import flatten
from weft.ppl.stage.errors import AddressError, DensityError, ModelError

from bruteforce import anything, joint_values, log_evidence, log_terms
from summed import CASES, MEANS, MOVES, START, means, move, start
from weft import (
    condition,
    deterministic,
    do,
    factor,
    gen,
    marginalize,
    mask,
    noncentered,
    repeat,
    sample,
    scale,
    scope,
)

lax = jax.lax
Normal = dist.Normal
REFERENCES = Path(__file__).parent / "refcases"

pytestmark = pytest.mark.usefixtures("x64", "quick")


LONG = {
    "bounded_loop",
    "chain_after_a_chain",
    "chain_in_a_branch",
    "chain_in_a_step",
    "chain_with_branches",
    "semi_markov",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in CASES]
)
def test_value_and_gradient_equal_the_sum_over_all_joint_values(name: str) -> None:
    this = CASES[name]
    whole = this.model().given(this.data())
    addresses = (this.wildcard,) if this.wildcard else this.addresses
    target = marginalize(this.model, *addresses)().given(this.data())
    assert set(whole.latents) - set(target.latents) == set(this.addresses)
    functions = [lambda x: log_evidence(whole, x, this.addresses), target.log_density]
    if this.chain:
        tree = marginalize(this.model, *addresses, parallel=True)().given(this.data())
        functions.append(tree.log_density)
    found = jax.jit(lambda x: [jax.value_and_grad(f)(x) for f in functions])(anything(target))
    (value, slope), *others = found
    assert np.isfinite(value)
    for other, gradient in others:
        np.testing.assert_allclose(other, value, rtol=1e-10, atol=1e-10)
        for a, g in flatten(gradient).items():
            np.testing.assert_allclose(g, slope[a], rtol=1e-9, atol=1e-10, err_msg=a)


# --- other ways to the same number ----------------------------------------------------------------


def same(found: Any, exact: Any, **tolerance: float) -> None:
    np.testing.assert_allclose(found, exact, **(tolerance or {"rtol": 1e-10, "atol": 1e-10}))


@pytest.mark.parametrize("length", [0, 1, 2, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_short_chains(length: int, order: int) -> None:
    """Fewer steps than the order, none at all."""

    @gen
    def model():
        def step(carry, _):
            a, b = carry
            z = sample("z", dist.Bernoulli(jax.nn.sigmoid(0.5 * a - 0.8 * b)))
            sample("y", Normal(z + 0.5 * b, 1.0))
            return (z, a if order == 2 else z), None

        first = sample("first", dist.Bernoulli(0.3))
        (a, b), _ = lax.scan(step, (first, 0), None, length=length)
        sample("after", Normal(a - b, 1.0))

    for parallel in (False, True):
        target = marginalize(model, "first", "z", parallel=parallel)().given()
        latents = anything(target)
        same(target.log_density(latents), log_evidence(model().given(), latents, ("first", "z")))


def test_choices_that_are_known_in_part() -> None:
    """Labels for some of the copies, of a mixture and of a chain: the sum goes over the others."""

    @gen
    def model():
        loc = sample("loc", Normal(jnp.zeros(3), 1.0))
        z = sample("z", start().expand([3]))
        sample("y", Normal(loc[z], 1.0))

        def step(state, _):
            state = sample("state", move(state))
            sample("x", Normal(loc[state], 1.0))
            return state, None

        lax.scan(step, 0, None, length=4)

    labels = {"z": (jnp.array([2, 0, 1]), jnp.array([True, False, True]))}
    labels["state"] = jnp.array([0, 2, 0, 1]), jnp.array([False, True, False, True])
    known = condition(model, {a: observed(v, where=w) for a, (v, w) in labels.items()})
    whole, names = model().given(), ("z", "state")
    values = joint_values(whole, names)
    kept = np.all(
        [np.all((values[a] == v) | ~w, -1) for a, (v, w) in labels.items()],
        axis=0,
    )
    assert kept.sum() == 3 * 3**2
    values = {a: v[kept] for a, v in values.items()}
    latents = anything(marginalize(model, *names)().given())

    def exact(x: Any) -> jax.Array:
        return jax.scipy.special.logsumexp(log_terms(whole, x, values))

    for parallel in (False, True):
        program = marginalize(known, *names, parallel=parallel)()
        assert program.latents == ("loc", "y", "x")
        found, slope = jax.value_and_grad(program.given().log_density)(latents)
        same(found, exact(latents))
        jax.tree.map(same, slope, jax.grad(exact)(latents))


def test_scale_multiplies_the_marginal() -> None:
    """Rows that stand for many: each counts with a power of its marginal density, not of its joint one."""
    model = CASES["mixture_by_vmap"].model
    latents = anything(marginalize(model, "z")().given())
    plain = condition(do(model, {"loc": latents["loc"]}), {"y": latents["y"]})
    one = marginalize(plain, "z")().log_density({})
    same(marginalize(scale(plain, 2.5), "z")().log_density({}), 2.5 * one)
    same(scale(marginalize(plain, "z"), 2.5)().log_density({}), 2.5 * one)

    @gen
    def rows(x):
        def one(x):
            z = sample("z", dist.Bernoulli(0.3))
            return sample("y", Normal(x + z, 1.0))

        return jax.vmap(one, axis_name="row")(x)

    x, y = jnp.array([0.5, 1.0]), {"y": jnp.array([0.2, -0.4])}
    exact = 2.5 * log_evidence(rows(x).given(), y, ("z",))
    for model in (
        marginalize(scale(rows, {"row": 2.5}), "z"),
        scale(marginalize(rows, "z"), {"row": 2.5}),
    ):
        same(model(x).log_density(y), exact)


@gen
def forked():
    """Branches that a sum decides between; some of what they hold depends on no other choice."""
    z = sample("z", dist.Bernoulli(0.3))
    a = sample("a", dist.Normal(0.0, 1.5))

    def first(a):
        sample("w", dist.Normal(0.0, 2.0))
        return a + sample("b", dist.Normal(a, 1.0))

    def second(a):
        sample("w", dist.Normal(0.0, 1.0))
        return a - sample("c", dist.Bernoulli(0.4))

    sample("y", dist.Normal(jax.lax.cond(z == 1, first, second, a), 0.5))


@gen
def chained():
    def step(x, _):
        x = sample("x", dist.Normal(x, 1.0))
        sample("y", dist.Normal(x, 0.5))
        return x, None

    jax.lax.scan(step, 0.0, length=3)


@pytest.mark.parametrize(
    ("model", "names", "data"),
    [
        (forked, "zabc", {"y": 0.3, "w": 1.2}),
        (chained, "x", {"y": jnp.array([0.3, 1.0, -2.0])}),
    ],
)
def test_scales_of_scales_in_branches_and_steps(model: Any, names: str, data: Any) -> None:
    def twice(c):
        scaled = scale(scale(model, c), {"**": 0.5})
        return marginalize(scaled, *names)().log_density(data)

    right = marginalize(model, *names)().log_density(data)
    same(jax.jit(twice)(3.0), 1.5 * right)


def test_of_a_marginal() -> None:
    """One choice after the other, in either order, equals both at once."""
    this = CASES["global_beside_lanes"]
    both = marginalize(this.model, "g", "z")().given()
    latents = anything(both)
    exact = both.log_density(latents)
    for a, b in (("g", "z"), ("z", "g")):
        same(marginalize(marginalize(this.model, a), b)().log_density(latents), exact)
    left = marginalize(this.model, "z")().given()
    assert set(left.latents) == {"g", "y"}
    same(log_evidence(left, latents, ("g",)), exact)


def test_among_other_transforms() -> None:
    """Under condition, scope, noncentered, mask and vmap; inside another program; given to a function."""

    @gen
    def model(x):
        loc = sample("loc", Normal(x, 2.0))
        z = sample("z", dist.Bernoulli(0.3).expand([2]))
        y = sample("y", Normal(loc + z, 1.0))
        return deterministic("mean", y.mean())

    marginal = marginalize(model, "z")
    y = jnp.array([0.2, 1.5])
    exact = log_evidence(model(0.4).given(), {"loc": 0.7, "y": y}, ("z",))
    same(marginal(0.4).log_density({"loc": 0.7, "y": y}), exact)
    same(condition(marginal, {"y": y})(0.4).log_density({"loc": 0.7}), exact)
    inside = {"part.loc": 0.7, "part.y": y}
    same(scope(marginal, "part")(0.4).log_density(inside), exact)
    same(gen(lambda: sample("part", marginal(0.4)))().log_density(inside), exact)
    same(mask(marginal, True)(0.4).log_density({"loc": 0.7, "y": y}), exact)
    same(mask(marginal, False)(0.4).log_density({"loc": 0.7, "y": y}), 0.0)
    prior = Normal(0.4, 2.0).log_prob(0.7)
    same(do(marginal, {"loc": 0.7})(0.4).log_density({"y": y}), exact - prior)
    moved = noncentered(marginal, "loc")(0.4).log_density({"loc_base": 0.15, "y": y})
    same(moved, exact - prior + Normal(0.0, 1.0).log_prob(0.15))
    xs = jnp.array([0.4, -0.4])
    lanes = jax.vmap(marginal)(xs)
    single = [marginal(x).log_density({"loc": 0.7, "y": y}) for x in xs]
    same(lanes.log_density({"loc": jnp.full(2, 0.7), "y": jnp.stack([y, y])}), sum(single))
    assert marginal(0.4).sites["mean"].kind == "deterministic"


def test_derivatives_of_second_order() -> None:
    """Of a mixture and of a chain, both recursions, with a value that has probability zero among the choices."""

    @gen
    def model(loc, p):
        def one(_):
            z = sample("z", dist.Categorical(jnp.stack([p, 1 - p, 0.0])))
            return sample("y", Normal(loc * z, 1.0))

        jax.vmap(one)(jnp.zeros(2))

        def step(state, _):
            rows = jnp.array([[p, 1 - p, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
            state = sample("state", dist.Categorical(rows[state]))
            sample("x", Normal(loc * state, 1.0))
            return state, None

        lax.scan(step, 0, None, length=3)

    data, names = {"y": jnp.array([0.3, 2.0]), "x": jnp.array([0.3, -1.0, 2.5])}, ("z", "state")
    point = (jnp.array(1.2), jnp.array(0.3))
    densities = [lambda *a: log_evidence(model(*a).given(data), {}, names)]
    for parallel in (False, True):
        marginal = marginalize(model, *names, parallel=parallel)
        densities.append(lambda *a, m=marginal: m(*a).log_density(data))
    exact, *found = jax.jit(
        lambda *a: [(f(*a), jax.grad(f, (0, 1))(*a), jax.hessian(f, (0, 1))(*a)) for f in densities]
    )(*point)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(exact[:2]))
    step = 1e-5
    slope = jax.jit(jax.grad(densities[0], (0, 1)))
    ends = [slope(point[0] + s, point[1]) for s in (-step, step)]
    for value, gradient, hessian in found:
        same(value, exact[0])
        jax.tree.map(same, gradient, exact[1])
        assert all(np.isfinite(h).all() for h in jax.tree.leaves(hessian))
        for i in range(2):
            same(hessian[0][i], (ends[1][i] - ends[0][i]) / (2 * step), rtol=1e-6)
        jax.tree.map(same, hessian, found[0][2])


def test_impossible_data() -> None:
    """Where every value is impossible the log density is minus infinity, and its derivatives are finite."""

    @gen
    def model(p):
        def step(z, x):
            rows = jnp.array([[p, 1 - p], [0.0, 1.0]])
            z = sample("z", dist.Categorical(rows[z]))
            factor("seen", jnp.where(z == x, 0.0, -jnp.inf))
            return z, None

        lax.scan(step, 0, jnp.array([1, 1, 0, 0]))

    for parallel in (False, True):
        marginal = marginalize(model, "z", parallel=parallel)
        value, slope = jax.value_and_grad(lambda p, m=marginal: m(p).log_density({}))(0.3)
        assert value == -jnp.inf
        assert np.isfinite(slope)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_long_chain_in_single_precision(parallel: bool) -> None:
    """2000 steps: within 1e-6 of the log likelihood in double, which a forward recursion in NumPy confirms."""

    @gen
    def model(loc):
        def step(z, _):
            z = sample("z", move(z))
            sample("y", Normal(loc[z], 0.7))
            return z, None

        lax.scan(step, 0, None, length=2000)

    rng = np.random.default_rng(1)
    y = rng.normal(size=2000) + rng.choice(MEANS, size=2000)
    alpha, total = np.array([1.0, 0.0, 0.0]), 0.0
    for value in y:
        seen = np.exp(-0.5 * ((value - np.array(MEANS)) / 0.7) ** 2) / (0.7 * np.sqrt(2 * np.pi))
        alpha = (alpha @ np.array(MOVES)) * seen
        total, alpha = total + np.log(alpha.sum()), alpha / alpha.sum()
    slopes = {}
    marginal = marginalize(model, "z", parallel=parallel)
    for double in (True, False):
        with jax.enable_x64(double):
            density = jax.value_and_grad(lambda m, y: marginal(m).log_density({"y": y}))
            value, slopes[double] = jax.jit(density)(means(), jnp.array(y))
            assert slopes[double].dtype == (jnp.float64 if double else jnp.float32)
            same(value, total, rtol=1e-12 if double else 1e-6)
    same(slopes[False], slopes[True], rtol=1e-4, atol=1e-3)


# --- reference cases ------------------------------------------------------------------------------


def test_hidden_markov_model_of_reference() -> None:
    """Log likelihood and expected transition counts of `ssm/hmm5.json` to 1e-8, the counts as gradients."""
    reference = json.loads((REFERENCES / "ssm" / "hmm5.json").read_text())
    params = {name: jnp.array(value) for name, value in reference["params"].items()}

    @gen
    def model(log_moves):
        def step(row, _):
            z = sample("z", dist.Categorical(row))
            sample("y", Normal(params["mu"][z], params["sd"][z]))
            return jnp.exp(log_moves)[z], None

        lax.scan(step, params["pi"], None, length=reference["T"])

    data = {"y": jnp.array(reference["y"])}
    for parallel in (False, True):
        marginal = marginalize(model, "z", parallel=parallel)
        density = jax.value_and_grad(lambda moves, m=marginal: m(moves).log_density(data))
        value, counts = jax.jit(density)(jnp.log(params["P"]))
        same(value, reference["log_likelihood"], rtol=1e-8)
        same(counts, reference["expected_transition_counts"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_ising_lattices_of_reference(size: int) -> None:
    """Normalising constants, magnetisations and neighbour correlations of `ising/ising.json` to 1e-8.

    A program with a site a spin and a factor a bond and a field, eliminated spin by spin; the largest
    tables hold 2^6 (4 x 4) and 2^7 (5 x 5) joint values.
    """
    cases = json.loads((REFERENCES / "ising" / "ising.json").read_text())["cases"]
    cases = [c for c in cases if c["L"] == size]
    assert len(cases) == 8

    @gen
    def lattice(across, down, field):
        spin = {}
        for i, j in np.ndindex(size, size):
            spin[i, j] = s = 2.0 * sample(f"s{i}{j}", dist.Bernoulli(0.5)) - 1
            factor(f"h{i}{j}", field[i, j] * s)
            if i:
                factor(f"v{i}{j}", down[i - 1, j] * spin[i - 1, j] * s)
            if j:
                factor(f"a{i}{j}", across[i, j - 1] * spin[i, j - 1] * s)

    names = [f"s{i}{j}" for i, j in np.ndindex(size, size)]
    marginal = marginalize(lattice, *names, max_terms=256)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=0)
    def run(*args):
        return jax.value_and_grad(lambda *a: marginal(*a).log_density({}), (0, 1, 2))(*args)

    coupling = jnp.array([c["J"] for c in cases])[:, None, None]
    field = jnp.array([c["h"] for c in cases])
    bonds = jnp.ones((size, size - 1))
    value, found = run(coupling * bonds, coupling * bonds.T, field)
    same(value + size**2 * np.log(2), [c["logZ"] for c in cases], rtol=1e-8)
    for name, values in zip(("pair_h", "pair_v", "mean"), found, strict=True):
        same(values, [c[name] for c in cases], rtol=1e-8, atol=1e-8)


# --- drawing --------------------------------------------------------------------------------------


def test_draws_and_their_density() -> None:
    """simulate scores what it draws; generate's weights average to the evidence; nothing that was summed out is there.

    Null: the mean of 4000 weights is the evidence, |z| < 5.5 on its standard error (4e-8); keys are fixed.
    """

    @gen
    def model():
        loc = sample("loc", Normal(0.0, 1.0))
        g = sample("g", dist.Bernoulli(0.3))
        x = sample("x", Normal(loc + g, 1.0))

        def step(z, _):
            z = sample("z", dist.Bernoulli(jnp.where(z == 1, 0.8, 0.3)))
            sample("y", Normal(z + x, 1.0))
            return z, None

        lax.scan(step, g, None, length=2)
        return sample("after", Normal(0.5 * x + g, 0.5))

    marginal = marginalize(model, "g", "z")
    keys = jax.random.split(jax.random.key(3), 4000)
    traces = jax.jit(jax.vmap(marginal().simulate))(keys[:5])
    assert set(flatten(traces.choices)) == {"loc", "x", "y", "after"}
    np.testing.assert_array_equal(traces.value, traces.choices["after"])
    for i in range(5):
        choices = jax.tree.map(lambda a, i=i: a[i], traces.choices)
        same(traces.log_density[i], marginal().log_density(choices))
        whole = model().simulate(keys[i])  # the same draws as without the sum
        jax.tree.map(np.testing.assert_array_equal, choices, {a: whole.choices[a] for a in choices})

    data = {"y": jnp.array([1.3, 0.2]), "after": jnp.array(0.4)}
    trace, log_weights = jax.jit(jax.vmap(lambda k: marginal().generate(k, data)))(keys)
    x = jnp.linspace(-8.0, 8.0, 401)
    grid = jnp.stack(jnp.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    log_joint = jax.lax.map(
        lambda c: marginal().log_density({"loc": c[0], "x": c[1], **data}), grid, batch_size=4096
    )
    exact = jnp.exp(log_joint).sum() * (x[1] - x[0]) ** 2
    weights = np.exp(log_weights)
    assert abs(weights.mean() - exact) < 5.5 * weights.std() / np.sqrt(len(weights))
    assert weights.std() < weights.mean() * 3
    single = marginal().log_density(jax.tree.map(lambda a: a[0], trace.choices))
    same(trace.log_density[0], single)


def test_weights_with_choices_known_in_part() -> None:
    """Labels for some copies are evidence, too: the weights average to their probability and that of the data.

    Null: |z| < 5.5 on the standard error of the mean of 4000 weights (4e-8); keys are fixed.
    """

    @gen
    def model():
        z = sample("z", dist.Bernoulli(0.2).expand([2]))
        x = sample("x", Normal(1.0 * z, 1.0))
        sample("y", Normal(x, 0.5))

    labels = observed(jnp.array([1, 0]), where=jnp.array([True, False]))
    marginal = marginalize(condition(model, {"z": labels}), "z")
    y = jnp.array([0.9, 0.1])
    keys = jax.random.split(jax.random.key(4), 4000)
    log_weights = jax.jit(jax.vmap(lambda k: marginal().generate(k, {"y": y})[1]))(keys)
    one, zero = (np.exp(Normal(z, np.sqrt(1.25)).log_prob(y)) for z in (1.0, 0.0))
    exact = 0.2 * one[0] * (0.2 * one[1] + 0.8 * zero[1])
    weights = np.exp(log_weights)
    assert abs(weights.mean() - exact) < 5.5 * weights.std() / np.sqrt(len(weights))


# --- what is refused ------------------------------------------------------------------------------


def refused(error: type[Exception], *words: str) -> Any:
    """The block raises an error of a type, exactly, whose message has all these words in this order."""
    return pytest.raises(error, match=r"(?s)" + ".*".join(re.escape(w) for w in words))


@gen
def survey():
    loc = sample("loc", Normal(0.0, 1.0))
    state = sample("state", start().expand([3]))
    sample("y", Normal(loc + means()[state], 1.0))


def test_addresses_that_are_no_choices() -> None:
    with refused(AddressError, "'stat'", "'survey'", "did you mean 'state'"):
        marginalize(survey, "stat")().staged()
    with refused(AddressError, "'part.state'", "'state'"):
        marginalize(survey, "part.state")().staged()
    with refused(AddressError, "'q*'", "'state'"):
        marginalize(survey, "q*")().staged()
    with refused(AddressError, "'state'", "'survey'", "'y'"):
        marginalize(marginalize(survey, "state"), "state")().staged()
    with refused(AddressError, "'state'", "'survey'"):
        marginalize(do(survey, {"state": jnp.zeros(3, int)}), "state")().staged()
    with refused(ModelError, "'soft'", "factor"):
        marginalize(gen(lambda: factor("soft", 1.0)), "soft")().staged()
    with refused(AddressError, "'state'", "'survey'"):
        marginalize(survey, "state")().given({"state": jnp.zeros(3, int)})
    with refused(AddressError, "'state'"):
        marginalize(survey, "state")().log_density({"loc": 0.0, "y": jnp.zeros(3), "state": 0})


def test_settings_that_do_not_fit() -> None:
    with refused(TypeError, "at least one address"):
        marginalize(survey)
    with refused(ValueError, "max_terms", "at least 2", "1"):
        marginalize(survey, "state", max_terms=1)
    with refused(TypeError, "a model or a function", "int"):
        marginalize(3, "state")


def test_choices_that_are_given() -> None:
    known = condition(survey, {"state": jnp.array([0, 1, 2])})
    with refused(ModelError, "'state'", "given already", "nothing to sum out"):
        marginalize(known, "state")().staged()


def test_choices_of_infinitely_many_values() -> None:
    @gen
    def counts(n):
        k = sample("k", dist.Poisson(2.0))
        m = sample("m", dist.Binomial(n, 0.3))
        c = sample("c", dist.Multinomial(2, jnp.array(START)))
        g = sample("g", dist.Geometric(0.3))
        sample("y", Normal(k + m + c[0] + g, 1.0))

    given = {"y": 0.0, "k": 1, "m": 1, "c": jnp.array([1, 0, 1]), "g": 1}
    for address, family in (
        ("k", "Poisson"),
        ("m", "Binomial"),
        ("c", "Multinomial"),
        ("g", "Geom"),
    ):
        rest = {a: v for a, v in given.items() if a != address}
        with refused(
            ModelError, repr(address), family, "cannot be summed out", "Binomial with a plain"
        ):
            marginalize(counts, address)(jnp.array(3)).log_density(rest)


def test_tables_that_grow_too_large() -> None:
    @gen
    def crowd():
        s = [sample(f"z{i}", dist.Bernoulli(0.5)) for i in range(8)]
        sample("y", Normal(1.0 * sum(s), 1.0))

    names = [f"z{i}" for i in range(8)]
    with refused(ModelError, "max_terms=100", "choices with values", "z0 (2)", "z6 (2)"):
        marginalize(crowd, *names, max_terms=100)().log_density({"y": 0.0})
    exact = log_evidence(crowd().given(), {"y": 0.5}, names)
    same(marginalize(crowd, *names, max_terms=256)().log_density({"y": 0.5}), exact)
    with refused(ModelError, "3^3 = 27 joint values of 'state'", "max_terms=26"):
        marginalize(survey, "state", joint=True, max_terms=26)().log_density(
            {"loc": 0.0, "y": jnp.zeros(3)}
        )


def _summed():
    z = sample("z", dist.Bernoulli(0.3).expand([3]))
    sample("y", Normal(1.0 * jnp.sum(z), 1.0))


def _turned():
    z = repeat(lambda: sample("z", dist.Bernoulli(0.3)), 3)
    sample("y", Normal(z + 0.5 * z[::-1], 1.0))


def _pairs():
    z = sample("z", dist.Bernoulli(0.3).expand([3]))
    sample("y", Normal(z[:, None] + 2.0 * z, 1.0))


def _rows_and_columns():
    z = sample("z", dist.Bernoulli(0.3).expand([2]))
    w = sample("w", dist.Bernoulli(0.4).expand([3]))
    sample("y", Normal(z[:, None] + 2.0 * w, 1.0))


def _scanned():
    z = sample("z", dist.Bernoulli(0.3).expand([3]))
    lax.scan(lambda c, x: (c, sample("y", Normal(1.0 * x, 1.0))), 0.0, z)


def _all_of_them_in_lanes():
    z = sample("z", dist.Bernoulli(0.3).expand([3]))
    jax.vmap(lambda own: sample("y", Normal(own + 1.0 * z, 1.0).to_event(1)))(z)


def _read_by_columns():
    z = 1.0 * sample("z", dist.Bernoulli(0.3).expand([2, 2]))
    sample("y", Normal(z + 2.0 * lax.reshape(z, (2, 2), (1, 0)), 1.0))


def _put_together_otherwise():
    mesh = jax.make_mesh((1, 1), ("i", "j"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"in_specs": PartitionSpec("i", "j"), "out_specs": PartitionSpec("j", "i")}
    z = 1.0 * sample("z", dist.Bernoulli(0.3).expand([2, 2]))
    moved = jax.shard_map(lambda x: x, mesh=mesh, check_vma=False, **specs)(z)
    sample("y", Normal(z + 2.0 * moved, 1.0))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_read_by_columns, ("'z'", "different axes", "joint=True")),
        (_put_together_otherwise, ("'z'", "'shard_map'", "over the mesh", "joint=True")),
        (_summed, ("'z'", "'reduce_sum'", "test_marginals.py", "_summed", "reduces", "joint=True")),
        (_turned, ("'z'", "'rev'", "test_marginals.py", "_turned", "reverses", "joint=True")),
        (_pairs, ("'z'", "joint=True")),
        (_rows_and_columns, ("'w' and 'z'", "all pairs", "joint=True")),
        (_scanned, ("a scan goes along", "'z'", "inside the scan's step")),
        (_all_of_them_in_lanes, ("'z'", "joint=True")),
    ],
)
def test_copies_that_meet(model: Any, words: tuple[str, ...]) -> None:
    """Refused with the equation and its line; the explicit way is right."""
    model = gen(model)
    names = [a for a in model().latents if a != "y"]
    target = marginalize(model, *names)().given()
    latents = anything(target)
    with refused(ModelError, *words):
        target.log_density(latents)
    joint = marginalize(model, *names, joint=True)().log_density(latents)
    same(joint, log_evidence(model().given(), latents, names))


def test_choices_that_are_written_in_place() -> None:
    @gen
    def model() -> None:
        held = jax.new_ref(jnp.zeros(()))
        held[...] = 2.0 * sample("z", dist.Bernoulli(0.3))
        sample("y", Normal(held[...], 1.0))

    with refused(ModelError, "'z'", "in place", "test_marginals.py"):
        marginalize(model, "z")().log_density({"y": 0.5})


def test_chains_that_gather_their_choices() -> None:
    @gen
    def model():
        def step(count, _):
            z = sample("z", dist.Bernoulli(0.3))
            return count + z, None

        count, _ = lax.scan(step, 0, None, length=8)
        sample("y", Normal(1.0 * count, 1.0))

    with refused(ModelError, "'z' of a scan", "not form a Markov chain", "slot 0", "adds them up"):
        marginalize(model, "z")().log_density({"y": 0.0})


def test_stacked_outputs_that_are_read() -> None:
    @gen
    def model(read):
        def step(z, _):
            z = sample("z", dist.Bernoulli(0.3 + 0.4 * z))
            return z, (z, sample("y", Normal(1.0 * z, 1.0)))

        zs, ys = lax.scan(step, 0, None, length=3)[1]
        if read == "site":
            sample("x", Normal(1.0 * zs.sum(), 1.0))
        return zs if read == "value" else ys

    marginal = marginalize(model, "z")
    y = jnp.zeros(3)
    same(marginal("no").simulate(jax.random.key(0)).value.shape, (3,))
    for read, data in (("site", {"y": y, "x": 0.0}), ("value", {"y": y})):
        with refused(ModelError, "output 0 of a scan", "'z'", "summed out step by step", "recover"):
            marginal(read).log_density(data)


def test_values_that_depend_on_what_is_summed_out() -> None:
    @gen
    def model():
        z = sample("z", dist.Bernoulli(0.3))
        return sample("y", Normal(1.0 * z, 1.0)) + z

    words = ("return value", "'z'", "recover")
    with refused(ModelError, *words):
        marginalize(model, "z")().log_density({"y": 0.0})
    with refused(ModelError, *words):
        marginalize(model, "z")().simulate(jax.random.key(0))


def test_choices_in_a_while_loop() -> None:
    @gen
    def model():
        def body(count):
            return count + sample("z", dist.Bernoulli(0.3))

        sample("y", Normal(1.0 * lax.while_loop(lambda c: c < 2, body, 0), 1.0))

    with refused(ModelError, "'z'", "while_loop"):
        marginalize(model, "z")().log_density({"y": 0.0})


def test_scales_that_differ() -> None:
    @gen
    def model():
        z = sample("z", dist.Bernoulli(0.3))
        sample("y", Normal(1.0 * z, 1.0))

    with refused(ModelError, "'z'", "scaled differently", "scale all of them"):
        marginalize(scale(model, {"y": 2.0}), "z")().log_density({"y": 0.0})


def test_choices_of_which_it_is_not_known_whether_they_are_there() -> None:
    @gen
    def branching():
        b = sample("b", dist.Bernoulli(0.3))
        lax.cond(b == 1, lambda: sample("x", Normal(0.0, 1.0)), lambda: 0.0)

    zero = {"x": jnp.zeros(())}
    with refused(ModelError, "'x'", "some branches only", "summed over"):
        marginalize(branching, "b")().given().unconstrain().log_density(zero)


def test_a_support_that_depends_on_what_is_summed_out() -> None:
    @gen
    def bounded():
        b = sample("b", dist.Bernoulli(0.3))
        sample("x", dist.Uniform(0.0, 1.0 + b))

    same(marginalize(bounded, "b")().log_density({"x": 1.5}), np.log(0.3 / 2))
    with refused(ModelError, "'x'", "'b'", "support"):
        marginalize(bounded, "b")().given().unconstrain()


def test_no_algorithm_for_the_reals_takes_what_is_left() -> None:
    left = marginalize(CASES["global_beside_lanes"].model, "z")().given()
    with refused(DensityError, "'g'", "discrete"):
        left.unconstrain()
