"""Helpers of distributions over whole series: checks of lengths, and axes that lead those of a series."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike
from numpyro.distributions import Distribution
from weft.ppl import ModelError, ObservationError

BUILT_BY_VMAP = (
    "{}: its parameters have more axes than when it was made, as if jax.vmap had made it. Use it inside the vmap: "
    "jax.vmap(lambda p, y: make(p).log_prob(y))(parameters, ys)"
)


def axis_size(x: Array, axis: int) -> int:
    """The size of an axis, counted from the last; 0 if there is none."""
    return x.shape[axis] if x.ndim >= -axis else 0


def check_where(d: Distribution, where: Array, m: int | None) -> int:
    """Check a mask of rows (or of entries, if `m` is their number in a row), and give its number of steps."""
    fits = where.ndim == 1 or (m is not None and where.ndim == 2 and where.shape[1] == m)
    if where.dtype != bool or not fits:
        raise ModelError(
            f"{type(d).__name__}: where must be booleans of shape (T,){'' if m is None else f' or (T, {m})'}, true "
            f"where there is an observation; got {where.dtype} of shape {where.shape}"
        )
    return len(where)


def count_steps(d: Distribution, lengths: dict[str, int], num_steps: int | None) -> int:
    """The number of steps on which everything with a time axis agrees."""
    name = type(d).__name__
    if num_steps is not None:
        if not isinstance(num_steps, (int, np.integer)) or num_steps < 1:
            raise ModelError(f"{name}: num_steps must be a positive integer, got {num_steps!r}")
        lengths = {**lengths, "num_steps": int(num_steps)}
    if not lengths:
        raise ModelError(f"{name}: how many steps the series has is not known: give num_steps=")
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 1:
        each = ", ".join(f"{x} for {k} steps" for x, k in lengths.items())
        raise ModelError(
            f"{name}: lengths differ: {each}. What belongs to a transition has an entry less than there are steps"
        )
    return next(iter(lengths.values()))


def as_series(d: Distribution, y: ArrayLike, *, exactly: bool = False) -> Array:
    """Data in the distribution's shape. Unless `exactly`, further axes may lead."""
    y = jnp.asarray(y)
    rank = len(d.event_shape)
    if y.shape[max(y.ndim - rank, 0) :] != d.event_shape or (exactly and y.ndim > rank):
        cure = "y[:, None]" if y.shape == d.event_shape[:1] else "several series are a jax.vmap"
        raise ObservationError(
            f"{type(d).__name__}: y has shape {y.shape}, expected {d.event_shape}, time first: {cure}"
        )
    return y


def over_leading(f: Callable[[Array], Array], y: Array, rank: int) -> Array:
    """Apply `f` to each element along the axes that come before the last `rank` ones."""
    lead = y.shape[: y.ndim - rank]
    if not lead:
        return f(y)
    flat = y.reshape(math.prod(lead), *y.shape[len(lead) :])
    return jax.vmap(f)(flat).reshape(lead)


def over_shape(draw: Callable[[Array], Any], key: Array, shape: tuple[int, ...]) -> Any:
    """Independent draws. `shape` leads the shape of each array that `draw(key)` gives."""
    if not shape:
        return draw(key)
    draws = jax.vmap(draw)(jax.random.split(key, math.prod(shape)))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), draws)
