"""The sum over a continuous choice, in each semiring: the integral, the mode, a draw."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .families import Family
from .semirings import best, drawn, log_sum


def integrate(
    semiring: Any, family: Family, table: jax.Array, num_rest: int, log_scale: Any, key: Any
) -> jax.Array:
    """Integrate over a choice. Its points are the last axis of a table.

    Args:
        semiring: the kind of sum that a discrete choice would have: logarithm of the sum, largest term, or draw.
        family: the family of the choice.
        table: the log density at the points. ``num_rest`` axes for other variables lead, then plates follow.
        num_rest: the number of axes for other variables.
        log_scale: the log of the volume of one unit of the points, with axes for the plates.
        key: a key, for draws.
    """
    if semiring is log_sum:
        return family.log_integral(family.coefficients(table)) + log_scale
    if semiring is best:
        return _at_mode(family, num_rest, table)
    assert semiring is drawn
    return _at_draw(family, num_rest, table, key) + log_scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _at_mode(family: Family, num_rest: int, table: jax.Array) -> jax.Array:
    c = family.coefficients(table)
    return jnp.sum(table * family.weights(family.mode(c)), -1)


def _at_mode_forward(family: Family, num_rest: int, table: jax.Array) -> Any:
    return _at_mode(family, num_rest, table), table


def _at_mode_backward(family: Family, num_rest: int, table: jax.Array, cotangent: Any) -> Any:
    chosen = family.coefficients(_at_choice(table, cotangent, num_rest))
    return (cotangent[..., None] * family.weights(family.mode(chosen)),)


_at_mode.defvjp(_at_mode_forward, _at_mode_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _at_draw(family: Family, num_rest: int, table: jax.Array, key: Any) -> jax.Array:
    return family.log_integral(family.coefficients(table))


def _at_draw_forward(family: Family, num_rest: int, table: jax.Array, key: Any) -> Any:
    return _at_draw(family, num_rest, table, key), (table, key)


def _at_draw_backward(family: Family, num_rest: int, residual: Any, cotangent: Any) -> Any:
    table, key = residual
    chosen = family.coefficients(_at_choice(table, cotangent, num_rest))
    return cotangent[..., None] * family.weights(family.draw(key, chosen)), None


_at_draw.defvjp(_at_draw_forward, _at_draw_backward)


def _at_choice(table: jax.Array, cotangent: jax.Array, num_rest: int) -> jax.Array:
    """The table at the values of all other variables that the cotangent chooses."""
    weight = cotangent[..., None]
    chosen = jnp.where(weight == 0, 0, weight * table)
    return jnp.sum(chosen, tuple(range(num_rest)))
