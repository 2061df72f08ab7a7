"""Methods of the nouns are functions to JAX: under `jit`, `vmap` and `grad` they give what the plain call gives."""

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import Particles, elbo, importance, mcmc, mean_field
from weft.ppl import Target

from counting import counting
from weft import expect, gen, kernels, sample

KEY = jax.random.key(0)
Y = jnp.array([0.3, -1.0, 2.0])


@gen
def model(scale):
    mu = sample("mu", dist.Normal(0.0, scale))
    tau = sample("tau", dist.HalfNormal(1.0))
    return jax.vmap(lambda _: sample("y", dist.Normal(mu, tau)))(jnp.arange(3))


@gen
def guide(params):
    sample("mu", dist.Normal(params["loc"], 1.0))
    sample("tau", dist.LogNormal(0.0, 1.0))


def program(scale: float) -> Any:
    return model(scale)


def target(scale: float) -> Target:
    return model(scale).given({"y": Y * scale})


LATENTS = {"mu": jnp.float32(0.5), "tau": jnp.float32(1.5)}
CHOICES = {**LATENTS, "y": Y}
VECTOR = jnp.array([0.5, 0.2])
PARAMS = {"loc": jnp.float32(0.3)}


def particles(scale: float) -> Particles:
    x = scale * jnp.arange(4.0)
    return Particles(choices={"x": x}, log_weights=x)


def expectation(scale: float) -> Any:
    prior = jnp.float32(scale)
    return expect(lambda x: x * sample("z", dist.Normal(x, prior)) ** 2)


def bound(scale: float) -> Any:
    return kernels.hmc(0.1, 2).on(target(scale).unconstrain().flat.log_density)


def unconstrained(scale: float) -> Any:
    return target(scale).unconstrain()


def flat(scale: float) -> Any:
    return target(scale).unconstrain().flat


def objective(scale: float) -> Any:
    return elbo(target(scale), guide)


def walk(scale: float) -> Any:
    return kernels.random_walk(jnp.float32(scale))


def sampler(scale: float) -> Any:
    return mcmc(walk(scale), 2, 2, 1)


def weighing(scale: float) -> Any:
    return importance(num_particles=int(4 * scale))


def same_model(scale: float) -> Any:
    return model


def made_guide(scale: float) -> Any:
    return mean_field(target(scale))[0]


class Case(NamedTuple):
    """A method of a noun, and what it is called with."""

    make: Callable[[float], Any]
    method: str
    args: tuple[Any, ...]
    grad: bool = True
    same: bool = False  # for every scale


CASES = [
    Case(program, "log_density", (CHOICES,)),
    Case(program, "log_densities", (CHOICES,)),
    Case(program, "simulate", (KEY,), grad=False),
    Case(program, "generate", (KEY, {"mu": LATENTS["mu"]})),
    Case(program, "random_weighted", (KEY,), grad=False),
    Case(program, "estimate_log_density", (KEY, CHOICES)),
    Case(program, "predict", (KEY, {"mu": LATENTS["mu"]})),
    Case(program, "given", ({"y": Y},)),
    Case(same_model, "__call__", (jnp.float32(2.0),), same=True),
    Case(target, "log_density", (LATENTS,)),
    Case(target, "log_densities", (LATENTS,)),
    Case(target, "generate", (KEY, {"mu": LATENTS["mu"]})),
    Case(target, "predict", (KEY, LATENTS)),
    Case(target, "given", ({"tau": LATENTS["tau"]},)),
    Case(unconstrained, "log_density", ({"mu": VECTOR[0], "tau": VECTOR[1]},)),
    Case(unconstrained, "trace", ({"mu": VECTOR[0], "tau": VECTOR[1]},)),
    Case(unconstrained, "from_choices", (LATENTS,), same=True),
    Case(unconstrained, "init", (KEY,), grad=False),
    Case(flat, "log_density", (VECTOR,)),
    Case(flat, "to_choices", (VECTOR,), same=True),
    Case(flat, "from_choices", (LATENTS,), same=True),
    Case(flat, "init", (KEY,), grad=False),
    Case(expectation, "__call__", (KEY, jnp.float32(0.7))),
    Case(objective, "__call__", (KEY, PARAMS)),
    Case(made_guide, "__call__", (mean_field(target(1.0))[1],), same=True),
    Case(particles, "ess", ()),
    Case(particles, "resample", (KEY,), grad=False),
    Case(weighing, "run", (KEY, target(1.0)), grad=False),
    Case(
        sampler,
        "run",
        (KEY, target(1.0)),
        grad=False,
    ),
    Case(walk, "move", (KEY, LATENTS, target(1.0)), False),
    Case(bound, "init", (VECTOR,), grad=False),
]


def cases(chosen: Callable[[Case], bool]) -> Any:
    found = [c for c in CASES if chosen(c)]
    return pytest.mark.parametrize(
        "case", found, ids=[f"{c.make.__name__}.{c.method}" for c in found]
    )


def numbers(tree: Any) -> list[np.ndarray]:
    """The numbers of a result; random keys by their data."""
    leaves = [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    keys = jax.dtypes.prng_key
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x) for x in leaves
    ]


def assert_close(found: Any, expected: Any) -> None:
    pairs = list(zip(numbers(found), numbers(expected), strict=True))
    assert pairs
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5)


def plain(noun: Any, method: str) -> Callable[..., Any]:
    """The method as a function that JAX has never seen."""
    return lambda *args: getattr(noun, method)(*args)


@cases(lambda c: True)
def test_under_jit(case: Case) -> None:
    first, second = case.make(1.0), case.make(2.0)
    expected = plain(first, case.method)(*case.args)
    compiled = jax.jit(getattr(first, case.method))
    assert_close(compiled(*case.args), expected)
    with counting() as count:
        compiled(*case.args)
    assert count.lowerings == 0
    if not case.same:  # of the same shapes and dtypes, mostly, and yet another function
        other = plain(second, case.method)(*case.args)
        assert_close(jax.jit(getattr(second, case.method))(*case.args), other)
        pairs = zip(numbers(other), numbers(expected), strict=True)
        assert not all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


@cases(lambda c: bool(c.args))
def test_under_vmap(case: Case) -> None:
    method = getattr(case.make(1.0), case.method)
    # Targets are arguments of some: only what is plain arrays is batched.
    axes = tuple(None if isinstance(x, Target) else 0 for x in case.args)
    batch = tuple(
        x if axis is None else jax.tree.map(lambda y: jnp.stack([y, y]), x)
        for x, axis in zip(case.args, axes, strict=True)
    )
    found = jax.vmap(method, axes)(*batch)
    expected = jax.vmap(plain(case.make(1.0), case.method), axes)(*batch)
    assert_close(found, expected)


@cases(lambda c: c.grad and bool(c.args))
def test_under_grad(case: Case) -> None:
    *others, x = case.args

    def total(f: Callable[..., Any]) -> Callable[[Any], jax.Array]:
        def value(x: Any) -> jax.Array:
            floats = [y for y in jax.tree.leaves(f(*others, x)) if eqx.is_inexact_array(y)]
            return sum(map(jnp.sum, floats), jnp.zeros(()))

        return value

    method = getattr(case.make(1.0), case.method)
    expected = jax.grad(total(plain(case.make(1.0), case.method)))(x)
    assert any(np.any(y != 0) for y in jax.tree.leaves(expected))
    for f in (method, jax.jit(method), jax.checkpoint(method)):
        assert_close(jax.grad(total(f))(x), expected)


def test_methods_compare_by_their_owner() -> None:
    one, other = target(1.0), target(1.0)
    assert one.log_density == one.log_density
    assert hash(one.log_density) == hash(one.log_density)
    assert one.log_density != other.log_density
    assert one.log_density != one.log_densities
    assert one != other
    assert len({one, other, one}) == 2
    assert eqx.tree_equal(one, other)
    assert one.log_density.__name__ == "log_density"
    assert one.log_density.__doc__ == Target.log_density.__doc__


def test_settings_compare_by_their_fields() -> None:
    assert importance(num_particles=3) == importance(num_particles=3)
    assert hash(kernels.hmc(0.1, 2)) == hash(kernels.hmc(0.1, 2))


def test_methods_are_pytrees_like_their_owners() -> None:
    compiled = eqx.filter_jit(lambda f, x: f(x))
    ends = target(1.0).staged(), target(2.0).staged()
    found = compiled(ends[0].log_density, LATENTS)
    np.testing.assert_allclose(found, ends[0].log_density(LATENTS), rtol=1e-6)
    with counting() as count:
        found = compiled(ends[1].log_density, LATENTS)
    assert count.lowerings == 0  # the data are operands
    np.testing.assert_allclose(found, ends[1].log_density(LATENTS), rtol=1e-6)


def test_methods_of_what_is_being_traced() -> None:
    """A noun that holds tracers is a function too, as often as one likes."""

    @jax.jit
    def run(y: jax.Array) -> jax.Array:
        posterior = model(1.0).given({"y": y})
        points = {"mu": jnp.arange(3.0), "tau": jnp.arange(1.0, 4.0)}
        one = jax.lax.map(posterior.log_density, points)
        two = jax.lax.map(posterior.log_density, points)
        return one + two + jax.jit(posterior.log_density)(LATENTS)

    posterior = target(1.0)
    point = posterior.log_density({"mu": jnp.float32(1.0), "tau": jnp.float32(2.0)})
    expected = 2 * point + posterior.log_density(LATENTS)
    np.testing.assert_allclose(run(Y)[1], expected, rtol=1e-6)


def test_no_noun_outlives_its_function() -> None:
    """What JAX keeps of a compiled method goes with it."""
    noun = target(3.0)
    gone = weakref.ref(noun)
    compiled = jax.jit(noun.log_density)
    compiled(LATENTS)
    del noun, compiled
    gc.collect()
    assert gone() is None
