"""Laws over the table of programs: one interpreter, one density, whatever the construct and the transformation.

Oracles are the table's own. What is deterministic is held to rounding. What is statistical states its null beside it:
noise of the draws is standard normal by Kolmogorov and Smirnov at p > 1e-7, other scores have mean zero and weights
average to the evidence at |z| < 5.5 on the estimator's own standard error (4e-8 two-sided each; some 150 such numbers,
so that a false alarm has a chance below 1e-4). Seeds are fixed: hypothesis is derandomised.
"""

import functools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from weft.ppl import Program, Trace, condition, gen, observed, sample
from weft.ppl.stage.addresses import flatten, unflatten

from programs import (
    CASES,
    NAMES,
    WITH_EVIDENCE,
    Flat,
    Term,
    X,
    as_numpy,
    noise,
    run_lanes,
    total,
)

pytestmark = pytest.mark.usefixtures("quick")

SINGLE = {"rtol": 2e-4, "atol": 2e-4}
DOUBLE = {"rtol": 1e-9, "atol": 1e-9}
NUM_KEYS = 12

law = settings(max_examples=3, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)
arguments = st.floats(0.125, 2.0, width=32)


# --- helpers -------------------------------------------------------------------------------------


def scores(terms: list[Term]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(t.score for t in terms)])


def counted(program: Program, active: Any) -> int:
    """How many elements of choices are active."""
    counts = 0
    for address, flag in flatten(active).items():
        shape = program.sites[address].batch_shape
        flag = np.asarray(flag)
        counts += np.broadcast_to(
            flag.reshape(flag.shape + (1,) * (len(shape) - flag.ndim)), shape
        ).sum()
    return int(counts)


def sizes(terms: list[Term]) -> int:
    return sum(t.size for t in terms)


def same(a: Any, b: Any, **tolerance: float) -> None:
    """Two pytrees agree, leaf by leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **(tolerance or SINGLE)), a, b)


@functools.cache
def run_all(name: str) -> Callable[..., Any]:
    """Everything that a program does to itself, at many keys, compiled once."""
    model = CASES[name].model

    def one(key: jax.Array, x: jax.Array) -> Any:
        program = model(x)
        trace = program.simulate(key)
        scored = program.log_density(trace.choices)
        again, weight = program.generate(jax.random.fold_in(key, 1), trace.choices)
        parts = program.log_densities(trace.choices)
        return trace, scored, again, weight, sum(map(jnp.sum, jax.tree.leaves(parts)))

    return jax.jit(jax.vmap(one, (0, None)))


def keys(seed: int, n: int = NUM_KEYS) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


# --- simulate, log_density and generate ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@law
@given(seed=seeds, x=arguments)
def test_simulate_score_and_generate_agree_with_the_oracle(name: str, seed: int, x: float) -> None:
    case = CASES[name]
    program = case.model(x)
    trace, scored, again, weight, parts = run_all(name)(keys(seed), x)
    noises, other = [], []
    for i in range(NUM_KEYS):
        choices = as_numpy(trace.choices, i)
        terms = case.oracle(choices, x)
        for found in (trace.log_density, scored, again.log_density, weight, parts):
            np.testing.assert_allclose(found[i], total(terms), **SINGLE)
        assert counted(program, jax.tree.map(lambda a, i=i: a[i], trace.active)) == sizes(terms)
        if case.value is not None:
            value = jax.tree.map(lambda v, i=i: v[i], trace.value)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, **SINGLE),
                value,
                case.value(choices, x),
            )
        noises.append(noise(terms))
        other.append(scores(terms))
    same((again.choices, again.active, again.value), (trace.choices, trace.active, trace.value))
    standard = np.concatenate(noises)
    assert standard.size == 0 or stats.kstest(standard, "norm").pvalue > 1e-7
    centred = np.concatenate(other)
    assert abs(centred.sum()) < 5.5 * max(np.sqrt(centred.size), 1)


@pytest.mark.parametrize("name", NAMES)
def test_generate_weighs_what_is_given_and_draws_the_rest_as_simulate_does(name: str) -> None:
    """Called as a user does, one key and no jit, beside the runs that were jitted and vmapped over keys."""
    case, many = CASES[name], keys(5)
    program = case.model(X)
    trace = jax.tree.map(lambda v: v[3], run_all(name)(many, X)[0])
    flat = flatten(trace.choices)
    terms = case.oracle(as_numpy(trace.choices), X)
    fixed = [t for t in terms if t.address not in flat]
    half = program.latents[NAMES.index(name) % 2 :: 2]  # now the first of them, now the second
    found, weight = program.generate(many[3], {a: flat[a] for a in half})
    same(found, trace)
    expected = total(fixed) + total(t for t in terms if t.address in half)
    np.testing.assert_allclose(weight, expected, **SINGLE)


PARTLY = (
    "vmap_mapped",
    "state_space",
    "vmap_of_scan",
    "lanes_mixture",
    "vmapped_programs",
    "batched",
)


@pytest.mark.parametrize("name", PARTLY)
def test_generate_with_part_of_a_site_given(name: str) -> None:
    program, key = CASES[name].model(X), jax.random.key(6)
    trace = program.simulate(key)
    flat, parts = flatten(trace.choices), flatten(program.log_densities(trace.choices))
    rng = np.random.default_rng(0)
    where = {a: rng.random(program.sites[a].batch_shape) < 0.5 for a in flat}
    partly = {a: observed(flat[a], where=where[a]) for a in flat}
    found, weight = jax.jit(lambda key: program.generate(key, partly))(key)
    same(found.choices, trace.choices)
    same(found.log_density, trace.log_density)
    np.testing.assert_allclose(
        weight, sum(np.sum(parts[a], where=where[a]) for a in flat), **SINGLE
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_EVIDENCE)
def test_weights_average_to_the_evidence(name: str) -> None:
    """Null: exp(weight) has mean exp(evidence); |z| < 5.5 on 4096 weights."""
    case = CASES[name]
    program = case.model(X)
    assert case.evidence is not None
    exact = case.evidence(X)
    log_weights = jax.jit(jax.vmap(lambda key: program.generate(key, case.data)[1]))(keys(7, 4096))
    ratio = np.exp(np.asarray(log_weights, float) - exact)
    error = ratio.std() / np.sqrt(ratio.size)
    assert error < 0.1, "too wide to tell anything: choose other data"
    assert abs(ratio.mean() - 1) < 5.5 * error + 1e-4  # rounding, where nothing is left to draw


# --- conditioning, nesting and vmap commute ------------------------------------------------------


def _as_data(data: dict[str, Any]) -> dict[str, Any]:
    return {a: np.asarray(v) for a, v in data.items()}


NESTED = (
    "vmap_of_scan",
    "scan_of_vmap",
    "nested_scan",
    "mixture",
    "lanes_observed",
    "lanes_switch",
    "regimes",
    "jit_in_scopes",
    "bounded_loop",
    "vmapped_programs",
    "masked",
    "decentred",
    "counts",
)


@pytest.mark.parametrize("name", NESTED)
def test_conditioning_commutes_with_nesting(name: str) -> None:
    case, key = CASES[name], jax.random.key(8)
    data = unflatten(_as_data(case.data))
    outer = gen(lambda x: sample("p", case.model(x)))
    inner = gen(lambda x: sample("p", condition(case.model, data)(x)))
    both = (condition(outer, {"p": data})(X), inner(X))
    target, nested = case.model(X).given(data), outer(X).given({"p": data})
    drawn = as_numpy(run_all(name)(keys(8), X)[0].choices, 0)
    latents = {a: v for a, v in drawn.items() if a not in case.data}
    terms = case.oracle({**latents, **_as_data(case.data)}, X)

    @jax.jit
    def run(key: jax.Array, latents: Any) -> Any:
        below = {"p": latents}
        scored = [p.log_density(below) for p in both]
        scored += [target.log_density(latents), nested.log_density(below)]
        return scored, [p.generate(key, {}) for p in both]

    scored, ((a, a_weight), (b, b_weight)) = run(key, unflatten(latents))
    for found in scored:
        np.testing.assert_allclose(found, total(terms), **SINGLE)
    same((a.choices, a.active, a.value, a_weight), (b.choices, b.active, b.value, b_weight))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_a_program_is_a_program_that_vmaps(name: str) -> None:
    """Densities agree to rounding; the draws of both have the same law: standard normal noise, no two alike."""
    case = CASES[name]
    xs, trace, inside, scores = run_lanes(name)
    noises = []
    for k in range(3):
        lanes = [case.oracle(as_numpy(trace.choices, k, i), float(x)) for i, x in enumerate(xs)]
        for found in scores:
            np.testing.assert_allclose(found[k], sum(map(total, lanes)), **DOUBLE)
        others = [case.oracle(as_numpy(inside.choices, k, i), float(x)) for i, x in enumerate(xs)]
        np.testing.assert_allclose(inside.log_density[k], sum(map(total, others)), **DOUBLE)
        assert all(v.dtype != jnp.float32 for v in jax.tree.leaves((trace, inside)))
        noises += [noise(terms) for terms in lanes]
    standard = np.concatenate(noises)
    if standard.size:
        assert stats.kstest(standard, "norm").pvalue > 1e-7


# --- transformations change nothing --------------------------------------------------------------


def _continuous(flat: Flat) -> dict[str, np.ndarray]:
    return {a: v for a, v in flat.items() if v.dtype.kind == "f"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if CASES[n].smooth])
def test_gradient_and_hessian_in_double_precision(name: str) -> None:
    """Along a direction, against differences of the oracle; the second derivative goes through `jax.checkpoint`."""
    case = CASES[name]
    trace = jax.tree.map(lambda v: v[0], run_all(name)(keys(11), X)[0])
    flat = as_numpy(trace.choices)
    start, rng = _continuous(flat), np.random.default_rng(1)
    along = {a: rng.normal(size=v.shape) for a, v in start.items()}
    if "p" in along and name == "batched":  # stay on the simplex
        along["p"] -= along["p"].mean()
        start["p"] = start["p"] / start["p"].sum()

    with jax.enable_x64(True):
        program = case.model(X)

        def density(moving: Any) -> jax.Array:
            return program.log_density({**{a: jnp.asarray(v) for a, v in flat.items()}, **moving})

        def slope(moving: Any) -> Any:
            gradient = jax.grad(jax.checkpoint(density))(moving)
            return sum(jnp.vdot(gradient[a], along[a]) for a in along)

        @jax.jit
        def run(moving: Any) -> Any:
            return *jax.value_and_grad(density)(moving), slope(moving), jax.grad(slope)(moving)

        value, gradient, slope_value, hessian = run({a: jnp.asarray(v) for a, v in start.items()})

    def oracle(t: float) -> float:
        return total(case.oracle({**flat, **{a: start[a] + t * along[a] for a in along}}, X))

    h = 1e-4
    first = (oracle(h) - oracle(-h)) / (2 * h)
    second = (oracle(h) - 2 * oracle(0) + oracle(-h)) / h**2
    np.testing.assert_allclose(value, oracle(0), **DOUBLE)
    directional = sum(np.vdot(gradient[a], along[a]) for a in along)
    np.testing.assert_allclose(directional, first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope_value, first, rtol=1e-5, atol=1e-5)
    curvature = sum(np.vdot(hessian[a], along[a]) for a in along)
    np.testing.assert_allclose(curvature, second, rtol=1e-4, atol=1e-4 * max(1, abs(oracle(0))))


SHARDED = ("state_space", "nested", "bounded_loop", "lanes_mixture")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_two_devices_change_nothing(name: str, two_devices: list[jax.Device]) -> None:
    """Lanes of a program on two devices: arguments, hence choices and densities, are sharded."""
    model, key = CASES[name].model, jax.random.key(12)
    mesh = jax.sharding.Mesh(np.array(two_devices), ("lane",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("lane"))
    xs = jnp.array([0.5, 1.0, 1.5, 2.0])

    @jax.jit
    def run(key: jax.Array, xs: jax.Array) -> Any:
        program = jax.vmap(model)(xs)
        trace = program.simulate(key)
        gradient = jax.grad(lambda xs: jax.vmap(model)(xs).log_density(trace.choices))(xs)
        return trace, gradient

    one = run(key, xs)
    two = run(key, jax.device_put(xs, split))
    assert len(two[1].sharding.device_set) == 2
    same(one, two, rtol=1e-5, atol=1e-5)
    assert len(jax.vmap(model)(jax.device_put(xs, split)).simulate(key).log_density.devices()) == 2


def test_jax_itself_is_untouched() -> None:
    """Control flow without sites goes to JAX's own batching rules: same jaxprs and same bits as without Weft."""
    source = textwrap.dedent(
        """
        import jax, jax.numpy as jnp, json, numpy as np
        from jax import lax

        def branch(i, x):
            return lax.switch(i, [jnp.sin, jnp.cos, lambda x: x / 3], x)

        def walk(x, n):
            body = lambda c, u: (lax.cond(c > u, jnp.sin, jnp.exp, c) + u, c * u)
            return lax.scan(body, x, jnp.linspace(0.0, 1.0, 7), reverse=True)

        def until(x, n):
            return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] * 1.1 - 0.3), (0, x))

        def fori(x, n):
            return lax.fori_loop(0, n, lambda i, c: jnp.sqrt(c * c + i), x)

        xs, ns = jnp.linspace(-1.0, 2.0, 5), jnp.array([0, 1, 2, 1, 0])
        functions = {
            "cond": (jax.vmap(branch), (ns, xs)),
            "shared": (jax.vmap(branch, (None, 0)), (jnp.array(1), xs)),
            "scan": (jax.vmap(walk), (xs, ns)),
            "while": (jax.vmap(until), (xs, ns)),
            "fori": (jax.vmap(fori, (0, None)), (xs, 4)),
            "nested": (jax.vmap(jax.vmap(jax.jit(walk), (0, None)), (None, 0)), (xs, ns)),
            "grad": (jax.grad(lambda xs, ns: jax.vmap(walk)(xs, ns)[0].sum()), (xs, ns)),
        }
        found = {}
        for name, (f, args) in functions.items():
            out = jax.tree.leaves(jax.jit(f)(*args))
            found[name] = [str(jax.make_jaxpr(f)(*args)), [np.asarray(o).tobytes().hex() for o in out]]
        """
    )
    scope: dict[str, Any] = {}
    exec(source, scope)
    alone = subprocess.run(
        [sys.executable, "-c", source + "\nprint(json.dumps(found))"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": ""},
    )
    expected = json.loads(alone.stdout)
    for name, (jaxpr, bits) in scope["found"].items():
        assert jaxpr == expected[name][0], name
        assert bits == expected[name][1], name


# --- programs as values --------------------------------------------------------------------------


def test_a_program_under_vmap_is_one_draw_a_lane() -> None:
    """`sample(name, jax.vmap(model)(xs))` draws one execution a lane; unhandled, all lanes would share one."""
    inner = gen(lambda m: sample("z", dist.Normal(m, 1.0)))
    outer = gen(lambda xs: sample("p", jax.vmap(inner)(xs)))
    draws = outer(jnp.zeros(50)).simulate(jax.random.key(13)).choices["p"]["z"]
    assert len(np.unique(draws)) == 50


def test_traces_are_pytrees_under_jit_and_vmap() -> None:
    program = CASES["mixture"].model(X)
    traces = jax.jit(jax.vmap(program.simulate))(keys(14, 3))
    assert isinstance(traces, Trace)
    assert jax.tree.structure(traces) == jax.tree.structure(program.simulate(keys(14)[0]))
