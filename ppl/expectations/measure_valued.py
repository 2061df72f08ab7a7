r"""Measure-valued derivatives of distributions (Pflug 1996; Mohamed et al. 2020).

A distribution has four arrays $(\theta, c, x^+, x^-)$ for each of its parameters, with
$\partial_\theta\, \mathbb{E}[k(x)] = \mathbb{E}[c\, (k(x^+) - k(x^-))]$. The two draws share their noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from weft.ppl.exact.families import base_of

Fours = Callable[[Any, jax.Array, jax.Array], list[tuple[Any, Any, Any, Any]]]


def _bernoulli(d: Any, x: jax.Array, key: jax.Array) -> Any:
    return [(d.probs, jnp.where(x == 1, 1.0, -1.0), x, 1 - x)]


def _categorical(d: Any, x: jax.Array, key: jax.Array) -> Any:
    num_values = jnp.shape(d.probs)[-1]
    return [(d.probs[..., v], 1.0, jnp.full_like(x, v), x) for v in range(num_values)]


def _normal(d: Any, x: jax.Array, key: jax.Array) -> Any:
    keys = jax.random.split(key, 3)
    wave = jnp.sqrt(-2 * jnp.log1p(-jax.random.uniform(keys[0], x.shape, x.dtype)))  # Rayleigh
    loc, scale = jax.lax.stop_gradient((d.loc, d.scale))
    # Double-sided Maxwell; times a uniform number it is normal.
    radius = jnp.sqrt(jnp.sum(jax.random.normal(keys[1], (3, *x.shape), x.dtype) ** 2, 0))
    sign_and_size = jax.random.uniform(keys[2], (2, *x.shape), x.dtype)
    maxwell = jnp.where(sign_and_size[0] < 0.5, -radius, radius)
    return [
        (d.loc, 1 / (scale * math.sqrt(2 * math.pi)), loc + scale * wave, loc - scale * wave),
        (d.scale, 1 / scale, loc + scale * maxwell, loc + scale * maxwell * sign_and_size[1]),
    ]


def _poisson(d: Any, x: jax.Array, key: jax.Array) -> Any:
    return [(d.rate, 1.0, x + 1, x)]


def _exponential(d: Any, x: jax.Array, key: jax.Array) -> Any:
    rate = jax.lax.stop_gradient(d.rate)
    return [(d.rate, 1 / rate, x, x + jax.random.exponential(key, x.shape, x.dtype) / rate)]


def _gamma(d: Any, x: jax.Array, key: jax.Array) -> Any:
    shape, rate = jax.lax.stop_gradient((d.concentration, d.rate))
    more = jax.random.exponential(key, x.shape, x.dtype) / rate
    return [(d.rate, shape / rate, x, x + more)]


def _geometric(d: Any, x: jax.Array, key: jax.Array) -> Any:
    again = jax.lax.stop_gradient(dist.GeometricProbs(d.probs).sample(key))
    return [(d.probs, 1 / jax.lax.stop_gradient(d.probs), x, 1 + x + again.astype(x.dtype))]


_TABLE: dict[type, Fours] = {
    dist.BernoulliProbs: _bernoulli,
    dist.BernoulliLogits: _bernoulli,
    dist.CategoricalProbs: _categorical,
    dist.CategoricalLogits: _categorical,
    dist.Normal: _normal,
    dist.Poisson: _poisson,
    dist.Exponential: _exponential,
    dist.Gamma: _gamma,
    dist.GeometricProbs: _geometric,
    dist.GeometricLogits: _geometric,
}
UNCOVERED: dict[type, tuple[str, ...]] = {dist.Gamma: ("concentration",)}
"""Parameters that have no measure-valued derivative here: one that is asked for is an error."""


def fours_of(d: Any) -> Fours | None:
    """The function ``f(d, draw, key)`` that gives four arrays for each parameter; None if there is none."""
    return _TABLE.get(type(base_of(d)))
