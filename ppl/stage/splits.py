"""Axes that are split over the axes of a mesh. Inside of a ``shard_map`` an array has one part of such an axis.

A draw must not depend on the number of devices. If every index of a choice has a key of its own, a shard only needs its
own indices. If one call draws a whole axis with one key, every shard makes the same call and takes its own part of the
result.
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
    """How an axis is split: the mesh axes, and the number of shards."""

    axes: tuple[str, ...] = ()
    shards: int = 1

    def __str__(self) -> str:
        return f"split over {', '.join(map(repr, self.axes))}" if self.axes else "whole"

    def start(self, size: int) -> jax.Array:
        """The first index, in the whole axis, of the ``size`` elements of this shard."""
        return jax.lax.axis_index(self.axes) * size

    def indices(self, size: int) -> jax.Array:
        """The indices, in the whole axis, of all elements of this shard."""
        return jnp.arange(size) + self.start(size) if self.axes else jnp.arange(size)


WHOLE = Split()
"""The split of an axis that every shard has whole."""


def own_part(value: jax.Array, splits: Sequence[Split]) -> jax.Array:
    """This shard's part of an array. ``splits`` are the splits of its leading axes."""
    for axis, split in enumerate(splits):
        if split.axes:
            size = value.shape[axis] // split.shards
            value = jax.lax.dynamic_slice_in_dim(value, split.start(size), size, axis)
    return value


def gathered(d: Any, spec: Any) -> Any:
    """The distribution of the whole batch, from a shard's part of it.

    Its parameters are gathered along the axes that are split. This works for distributions of NumPyro whose batch shape
    is known to be a single attribute. A draw on all shards is then the same call as without shards.

    Raises:
        ModelError: if the distribution is not of this kind.
    """
    key, whole, shape = jax.eval_shape(lambda: jax.random.key(0)), None, None
    try:
        whole = _gathered(d, spec)
        shape = jax.eval_shape(whole.sample, key).shape
    except (
        AttributeError,
        TypeError,
        ValueError,
    ):  # the arrays no longer fit each other
        pass
    if shape != spec.whole_batch + spec.event_shape:
        raise ModelError(
            f"site {spec.name!r}: the batch of {spec.label} is split over a mesh, and Weft cannot put its shards "
            "together for a draw. Draw one row at a time: jax.vmap(lambda x: sample(name, make(x)))(rows)"
        )
    return whole


def _gathered(d: Any, spec: Any) -> Any:
    """The distribution of the whole batch, unchecked. None if the batch shape is not known to be a single attribute."""
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
    """Gather a parameter along the batch axes. It has them in front, or broadcasts against them from the right."""
    missing = max(len(batch) - jnp.ndim(value), 0)
    for axis, (split, size) in enumerate(zip(splits[missing:], batch[missing:], strict=True)):
        if split.axes and value.shape[axis] == size:
            value = jax.lax.all_gather(value, split.axes, axis=axis, tiled=True)
    return value
