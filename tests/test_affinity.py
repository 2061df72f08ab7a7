"""Any function of a continuous choice: integrated out in closed form where it is affine, or a power, else refused.

The oracle is the midpoint rule on a fine grid, in NumPy's double precision, with functions that NumPy evaluates.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import lax
from scipy import special, stats
from weft.ppl import ModelError

from weft import gen, marginalize, sample


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvps(lambda dx, ans, x: dx)


@jax.custom_vjp
def clipped_behind(x):
    return jnp.clip(x, -1.0, 1.0)


clipped_behind.defvjp(lambda x: (clipped_behind(x), None), lambda _, g: (g,))


def steps(x):
    """A loop over a carry that is an integer for a moment."""
    return lax.scan(lambda c, _: (c.astype(int).astype(c.dtype) + 0.5 * c, None), x, length=2)[0]


def until(x):
    return lax.while_loop(lambda c: c < 3.0, lambda c: c + 1.0, x)


def in_half(x):
    return x.astype(jnp.float16).astype(x.dtype)


# JAX's function, and the same in NumPy; whether it is one that has to be integrated out.
FUNCTIONS = {
    "itself": (lambda x: x, lambda x: x, True),
    "twice": (lambda x: 2.0 * x, lambda x: 2 * x, True),
    "in a jit": (jax.jit(lambda x: 2.0 * x), lambda x: 2 * x, True),
    "in a checkpoint": (jax.checkpoint(lambda x: 2.0 * x), lambda x: 2 * x, True),
    "in single precision": (lambda x: x.astype(jnp.float32).astype(float), lambda x: x, True),
    "in half precision": (in_half, lambda x: x.astype(np.float16).astype(float), False),
    "whole": (lambda x: x.astype(int).astype(float), np.trunc, False),
    "whole, in bytes": (lambda x: x.astype(jnp.int8).astype(float), np.trunc, False),
    "whole, in a jit": (jax.jit(lambda x: x.astype(int).astype(float)), np.trunc, False),
    "whole, in a checkpoint": (
        jax.checkpoint(lambda x: x.astype(int).astype(float)),
        np.trunc,
        False,
    ),
    "whole, in lanes": (
        lambda x: jax.vmap(lambda y: y.astype(int).astype(float))(x[None])[0],
        np.trunc,
        False,
    ),
    "whole, in a branch": (
        lambda x: lax.cond(
            jnp.arange(2)[1] == 1, lambda y: y.astype(int).astype(float), lambda y: y, x
        ),
        np.trunc,
        False,
    ),
    "not zero": (lambda x: x.astype(bool).astype(float), lambda x: (x != 0).astype(float), False),
    "floor": (jnp.floor, np.floor, False),
    "round": (jnp.round, np.round, False),
    "sign": (jnp.sign, np.sign, False),
    "modulo": (lambda x: x % 1.0, lambda x: x % 1.0, False),
    "clip": (lambda x: jnp.clip(x, -1.0, 1.0), lambda x: np.clip(x, -1, 1), False),
    "abs": (jnp.abs, np.abs, False),
    "maximum": (lambda x: jnp.maximum(x, 0.5), lambda x: np.maximum(x, 0.5), False),
    "where": (lambda x: jnp.where(x > 0.5, x, -x), lambda x: np.where(x > 0.5, x, -x), False),
    "straight through": (straight_through, np.round, False),
    "clipped behind": (clipped_behind, lambda x: np.clip(x, -1, 1), False),
    "held": (lambda x: lax.stop_gradient(x) ** 2, lambda x: x**2, False),
    "steps": (steps, lambda x: _again(lambda c: np.trunc(c) + 0.5 * c, x), False),
    "until": (until, lambda x: np.where(x < 3, x + np.ceil(3 - x), x), False),
    "reduced": (
        lambda x: lax.reduce(x[None], -jnp.inf, jnp.logaddexp, (0,)) ** 2,
        lambda x: x**2,
        False,
    ),
    "largest": (lambda x: lax.top_k(jnp.stack([x, 1.0 + 0 * x]), 1)[0][0], None, False),
    "sorted": (lambda x: jnp.sort(jnp.stack([x, 1.0 + 0 * x]))[1], None, False),
    "an index": (
        lambda x: jnp.array([0.3, 1.0, 2.0])[jnp.clip(x, 0, 2).astype(int)],
        lambda x: np.array([0.3, 1.0, 2.0])[np.clip(x, 0, 2).astype(int)],
        False,
    ),
    "bits": (
        lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int64), float) ** 2,
        lambda x: x**2,
        False,
    ),
    "a callback": (
        lambda x: jax.pure_callback(lambda y: np.asarray(y) ** 2, x, x, vmap_method="expand_dims"),
        lambda x: x**2,
        False,
    ),
}


def _again(f, x):
    return f(f(x))


def _function(name):
    f, g, sure = FUNCTIONS[name]
    return f, g or (lambda x: np.maximum(x, 1.0)), sure


def exact_or_refused(model, y, right, sure):
    """The log density of `y` with `x` integrated out is `right`; it may be refused, unless it is `sure`."""
    try:
        found, refusal = marginalize(model, "x")().log_density({"y": y}), ""
    except ModelError as e:
        found, refusal = None, str(e)
    if found is not None:
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)
        return
    assert not sure, refusal
    assert "'x'" in refusal


def integral(log_density, low, high, n=400_000):
    grid = low + (np.arange(n) + 0.5) * (high - low) / n
    return special.logsumexp(log_density(grid)) + np.log((high - low) / n)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_a_normal_choice(name):
    f, g, sure = _function(name)

    @gen
    def model():
        x = sample("x", dist.Normal(0.3, 1.0))
        sample("y", dist.Normal(f(x), 0.8))

    def log_density(x):
        return stats.norm(0.3, 1.0).logpdf(x) + stats.norm(g(x), 0.8).logpdf(1.7)

    exact_or_refused(model, 1.7, integral(log_density, -9.0, 9.0), sure)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_a_rate(name):
    f, g, sure = _function(name)

    @gen
    def model():
        x = sample("x", dist.Gamma(3.0, 1.0))
        sample("y", dist.Poisson(f(x)))

    def log_density(x):
        with np.errstate(divide="ignore", invalid="ignore"):
            own = special.xlogy(2, g(x)) - g(x) - np.log(2)
            return stats.gamma(3.0).logpdf(x) + np.where(g(x) > 0, own, -np.inf)

    exact_or_refused(model, 2, integral(log_density, 0.0, 60.0), sure)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_a_probability(name):
    f, g, _ = _function(name)
    sure = name in ("itself", "in single precision")

    @gen
    def model():
        x = sample("x", dist.Beta(2.0, 3.0))
        sample("y", dist.Bernoulli(probs=f(x) / 4.0 if not sure else f(x)))

    def log_density(x):
        p = g(x) if sure else g(x) / 4
        with np.errstate(divide="ignore", invalid="ignore"):
            return stats.beta(2.0, 3.0).logpdf(x) + np.log(p)

    exact_or_refused(model, 1, integral(log_density, 0.0, 1.0), sure)
