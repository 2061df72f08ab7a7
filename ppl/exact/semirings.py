"""Three semirings over tables of logarithms: the log of the sum, the largest term, and one term drawn in proportion."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Semiring = Callable[[jax.Array, int, Any], jax.Array]
"""A kind of sum: a function from a table, an axis and a key to the table without the axis."""


def log_sum(table: jax.Array, axis: int, key: Any = None) -> jax.Array:
    r"""$\log \sum \exp$ along an axis. Its derivatives are finite even if all terms are zero."""
    top = jax.lax.stop_gradient(jnp.max(table, axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    return _log(jnp.sum(jnp.exp(table - top), axis)) + jnp.squeeze(top, axis)


@jax.custom_jvp
def _log(x: jax.Array) -> jax.Array:
    """The logarithm, with derivative zero at zero."""
    return jnp.log(x)


@_log.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return _log(x), jnp.where(x > 0, dx / jnp.where(x > 0, x, 1), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def best(table: jax.Array, axis: int, key: Any = None) -> jax.Array:
    """The largest term. The derivative is one at the first of the largest terms."""
    return jnp.max(table, axis)


def _best_forward(table: jax.Array, axis: int, key: Any) -> Any:
    return jnp.max(table, axis), (jnp.argmax(table, axis), table.shape[axis])


def _chosen(axis: int, residual: Any, cotangent: Any) -> Any:
    index, size = residual
    one_hot = jax.nn.one_hot(index, size, axis=axis, dtype=cotangent.dtype)
    return one_hot * jnp.expand_dims(cotangent, axis), None


best.defvjp(_best_forward, _chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def drawn(table: jax.Array, axis: int, key: Any) -> jax.Array:
    """The log of the sum. The derivative is one at a single term, drawn in proportion to the terms."""
    return log_sum(table, axis)


def _drawn_forward(table: jax.Array, axis: int, key: Any) -> Any:
    top = jnp.max(table, axis, keepdims=True)
    weights = jnp.exp(table - jnp.where(jnp.isfinite(top), top, 0))
    up_to = jnp.cumsum(weights, axis)
    total = jnp.take(up_to, jnp.array([-1]), axis)
    u = jax.random.uniform(key, total.shape, table.dtype)
    # Rounding must not lead past the last possible value.
    index = jnp.sum((up_to <= u * total) & (up_to < total), axis)
    return log_sum(table, axis), (index, table.shape[axis])


drawn.defvjp(_drawn_forward, _chosen)
