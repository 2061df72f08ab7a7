"""Axes that are split over the axes of a mesh: inside of a ``shard_map`` an array has one part of them.

A draw must not depend on how many devices there are. Where a choice has a key of its own for each index, the indices of
this shard are all that is needed. Where one call draws a whole axis with one key, every shard makes the same call, and
takes its own part of what comes out.
"""

from __future__ import annotations

import copy
import functools
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
        ModelError: if that cannot be done.
    """
    key, whole, shape = jax.eval_shape(lambda: jax.random.key(0)), None, None
    try:
        whole = _gathered(d, spec)
        shape = jax.eval_shape(whole.sample, key).shape
    except (
        AttributeError,
        TypeError,
        ValueError,
    ):  # arrays that do not go with each other any more
        pass
    if shape != spec.whole_batch + spec.event_shape:
        raise ModelError(
            f"site {spec.name!r}: the batch of {spec.label} is split over a mesh, and Weft cannot put its shards "
            "together for a draw. Draw one row at a time: jax.vmap(lambda x: sample(name, make(x)))(rows)"
        )
    return whole


def _gathered(d: Any, spec: Any) -> Any:
    """The same, unchecked; None, if the batch shape is not known to be one attribute."""
    if not isinstance(d, dist.Distribution):
        return None
    n, m = len(d.batch_shape), spec.batch_ndim
    batch = spec.whole_batch[:n] + d.batch_shape[m:]
    if isinstance(d, dist.ExpandedDistribution):
        return None if d.base_dist.batch_shape else d.base_dist.expand(batch)
    splits = spec.split[:n] + (WHOLE,) * (n - m)
    whole = copy.copy(d)
    whole._batch_shape = batch
    for field, value in list(vars(d).items()):
        if isinstance(value, dist.Distribution):
            setattr(whole, field, _gathered(value, spec))
        elif field in type(d).gather_pytree_data_fields() or isinstance(value, (jax.Array, Tracer)):
            gather = functools.partial(_gather, splits=splits, batch=d.batch_shape)
            setattr(whole, field, jax.tree.map(gather, value))
    return whole


def _gather(value: Any, splits: tuple[Split, ...], batch: tuple[int, ...]) -> Any:
    """A parameter along the axes of the batch, which it has in front, or is broadcast to from the right."""
    missing = max(len(batch) - jnp.ndim(value), 0)
    for axis, (split, size) in enumerate(zip(splits[missing:], batch[missing:], strict=True)):
        if split.axes and value.shape[axis] == size:
            value = jax.lax.all_gather(value, split.axes, axis=axis, tiled=True)
    return value
