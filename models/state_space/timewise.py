"""Recursions over time whose inputs may be constant or vary.

Inputs come with a tree of axes, like the `in_axes` of `jax.vmap`: 0 for a leaf with a leading time axis, None for a
constant one. So the same step runs under `jax.vmap` and, here, under `lax.scan`. A constant matrix is never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any,
    axes: Any,
    *,
    length: int,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """`lax.scan` of `step(carry, inputs of one time) -> (carry, output)`."""
    leaves, structure = jax.tree.flatten(inputs)
    timed = [axis is not None for axis in structure.flatten_up_to(axes)]

    def body(carry: Any, now: list[Any]) -> tuple[Any, Any]:
        rest = iter(now)
        here = [next(rest) if t else leaf for leaf, t in zip(leaves, timed, strict=True)]
        return step(carry, structure.unflatten(here))

    over = [leaf for leaf, t in zip(leaves, timed, strict=True) if t]
    return lax.scan(body, carry, over, length=length, reverse=reverse)


def at(inputs: Any, axes: Any, index: int | slice) -> Any:
    """The inputs at a time, or in a window of times."""
    leaves, structure = jax.tree.flatten(inputs)
    pairs = zip(leaves, structure.flatten_up_to(axes), strict=True)
    return structure.unflatten([leaf if axis is None else leaf[index] for leaf, axis in pairs])


def join(start: Any, rest: Any, *, reverse: bool = False) -> Any:
    """A series made of its first element and the others. With `reverse` that element comes last."""
    order = (lambda a, b: [b, a]) if reverse else (lambda a, b: [a, b])
    return jax.tree.map(lambda a, b: jnp.concatenate(order(a[None], b)), start, rest)
