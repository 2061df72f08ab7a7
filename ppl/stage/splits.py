"""Axes that are split over the axes of a mesh: inside of a ``shard_map`` an array has one part of them.

A draw must not depend on how many devices there are. Where a choice has a key of its own for each index, the indices of
this shard are all that is needed. Where one call draws a whole axis with one key, every shard makes the same call, and
takes its own part of what comes out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from .compat import Tracer
from .errors import ModelError


class Split(NamedTuple):
    """How an axis is split: over these axes of a mesh, into this many shards."""

    axes: tuple[str, ...] = ()
    shards: int = 1

    def __str__(self) -> str:
        return f"split over {', '.join(map(repr, self.axes))}" if self.axes else "whole"

    def start(self, size: int) -> jax.Array:
        """The index in the whole axis of the first of the ``size`` elements that this shard has."""
        return jax.lax.axis_index(self.axes) * size

    def indices(self, size: int) -> jax.Array:
        """Those of all of its elements."""
        return jnp.arange(size) + self.start(size) if self.axes else jnp.arange(size)


WHOLE = Split()
"""The split of an axis that every shard has as it is."""


def own_part(value: jax.Array, splits: Sequence[Split]) -> jax.Array:
    """The part of an array that belongs to this shard; ``splits`` are those of its leading axes."""
    for axis, split in enumerate(splits):
        if split.axes:
            size = value.shape[axis] // split.shards
            value = jax.lax.dynamic_slice_in_dim(value, split.start(size), size, axis)
    return value


def gathered(d: Any, spec: Any) -> Any:
    """The distribution of the whole batch, from the part of it that a shard has.

    Its parameters are gathered along the axes that are split; of NumPyro's distributions the batch shape is known to
    be one attribute, so that a draw of all shards is the same call as without shards.

    Raises:
        ModelError: if ``d`` is another distribution.
    """
    whole = _gathered(d, spec)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if (
        whole is None
        or jax.eval_shape(whole.sample, key).shape != spec.whole_batch + spec.event_shape
    ):
        raise ModelError(
            f"site {spec.name!r}: the batch of {spec.label} is split over a mesh, and Weft cannot put its shards "
            "together for a draw. Draw one row at a time: jax.vmap(lambda x: sample(name, make(x)))(rows)"
        )
    return whole


def _gathered(d: Any, spec: Any) -> Any:
    if not isinstance(d, dist.Distribution) or isinstance(d, dist.ExpandedDistribution):
        return None
    whole = copy.copy(d)
    n, m = len(d.batch_shape), spec.batch_ndim
    whole._batch_shape = spec.whole_batch[:n] + d.batch_shape[m:]
    splits = spec.split[:n] + (WHOLE,) * (n - m)
    for field, value in list(vars(d).items()):
        if isinstance(value, dist.Distribution):
            inner = _gathered(value, spec)
            if inner is None:
                return None
            setattr(whole, field, inner)
        elif isinstance(value, (jax.Array, Tracer)):
            setattr(whole, field, _gather(value, splits, d.batch_shape))
        elif jax.tree.leaves(value) and field in type(d).gather_pytree_data_fields():
            return None
    return whole


def _gather(value: jax.Array, splits: tuple[Split, ...], batch: tuple[int, ...]) -> jax.Array:
    missing = max(len(batch) - value.ndim, 0)
    for axis, (split, size) in enumerate(zip(splits[missing:], batch[missing:], strict=True)):
        if split.axes and value.shape[axis] == size:
            value = jax.lax.all_gather(value, split.axes, axis=axis, tiled=True)
    return value
