"""Values whose derivatives are stated here, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from weft.ppl.stage.errors import GradientError


def guarded(value: jax.Array, parameters: Sequence[Any], message: str) -> jax.Array:
    """``value``, with an error if a derivative with respect to the given parameters is asked for."""

    @jax.custom_jvp
    def drawn(value: Any, parameters: Any) -> Any:
        return value

    def rule(primals: Any, tangents: Any) -> Any:
        if not all(isinstance(t, SymbolicZero) for t in tangents[1]):
            raise GradientError(message)
        inexact = jnp.issubdtype(primals[0].dtype, jnp.inexact)
        zero = (
            jnp.zeros_like(primals[0]) if inexact else np.zeros(primals[0].shape, jax.dtypes.float0)
        )
        return primals[0], zero

    drawn.defjvp(rule, symbolic_zeros=True)
    return drawn(value, list(parameters))


def product(slope: Any, theta: Any, moved: Sequence[Any], message: str) -> Any:
    """Zero, with the derivative ``slope`` with respect to ``theta``. The axes of ``theta`` lead.

    A second derivative with respect to anything that may have ``moved`` is an error: not all of it is known.
    """

    @jax.custom_jvp
    def product(slope: Any, theta: Any, moved: Any) -> Any:
        return jnp.zeros_like(slope)

    def rule(primals: Any, tangents: Any) -> Any:
        slope, _, moved = primals
        zero = jnp.zeros_like(slope)
        if isinstance(tangents[1], SymbolicZero):
            return zero, zero
        return zero, guarded(slope, moved, message) * spread_out(tangents[1], slope.ndim)

    product.defjvp(rule, symbolic_zeros=True)
    return product(slope, theta, list(moved))


def spread_out(x: Any, ndim: int) -> Any:
    """The array with axes of length one behind its own."""
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))
