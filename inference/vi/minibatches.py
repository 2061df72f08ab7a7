"""Minibatches: rows of the data without replacement, epoch by epoch, drawn inside compiled code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray
from weft.ppl.stage.errors import WeftError
from weft.ppl.stage.jaxprs import Holds
from weft.ppl.stage.packing import Skeleton, pack
from weft.ppl.stage.sites import site_p


class Minibatches(eqx.Module):
    """Data, and the way in which they are handed out.

    An epoch is a random permutation of the rows. Each step takes the next `batch_size` rows of it. Rows that are left
    over at the end of an epoch are not used in it. In every step all rows are equally likely.

    Attributes:
        arrays: the arrays of the data.
        skeleton: the structure of the data without the arrays.
        num_rows: the size of the leading axis that the arrays share.
        batch_size: the number of rows in a step; `None` for all data, as they are.
    """

    arrays: list[Array]
    skeleton: Skeleton = eqx.field(static=True)
    num_rows: int = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)

    @staticmethod
    def make(data: Any, batch_size: int | None) -> Minibatches:
        """Check the data, and make minibatches of them.

        Raises:
            WeftError: if a batch size is given, and the arrays share no leading axis, or it is shorter than that.
        """
        data = data if isinstance(data, (tuple, list)) else (data,)
        arrays, skeleton = pack(tuple(data))
        if batch_size is None:
            return Minibatches(arrays, skeleton, 0, None)
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise WeftError(f"fit: batch_size must be a positive integer, got {batch_size!r}")
        shapes = [tuple(x.shape) for x in arrays]
        rows = {shape[0] if shape else -1 for shape in shapes}
        if len(rows) != 1 or -1 in rows:
            raise WeftError(
                f"fit: with batch_size={batch_size} the arrays of data must share their leading axis, "
                f"got shapes {shapes}"
            )
        (num_rows,) = rows
        if batch_size > num_rows:
            raise WeftError(f"fit: batch_size={batch_size} of only {num_rows} rows of data")
        return Minibatches(arrays, skeleton, num_rows, int(batch_size))

    def whole(self) -> tuple[Any, ...]:
        """All of the data."""
        return self.skeleton.unpack(self.arrays)

    def unpack(self, arrays: Sequence[Array]) -> tuple[Any, ...]:
        """A batch, as the objective takes it."""
        return self.skeleton.unpack(arrays)

    def example_arrays(self) -> list[Array]:
        """The arrays of some batch."""
        return (
            self.arrays if self.batch_size is None else [x[: self.batch_size] for x in self.arrays]
        )

    def example(self) -> tuple[Any, ...]:
        """Some batch."""
        return self.unpack(self.example_arrays())

    def order(self) -> Int[Array, " rows"]:
        """The rows in their own order."""
        return jnp.arange(self.num_rows, dtype=jnp.int32)

    def shuffle(self, key: PRNGKeyArray, step: Any, order: Int[Array, " rows"]) -> Array:
        """The order of the rows in the epoch of a step. The first step of an epoch draws a new one."""
        if self.batch_size is None:
            return order
        epoch, position = jnp.divmod(step, self.num_rows // self.batch_size)
        return jax.lax.cond(
            position == 0,
            lambda: jax.random.permutation(jax.random.fold_in(key, epoch), self.num_rows).astype(
                jnp.int32
            ),
            lambda: order,
        )

    def take(self, order: Int[Array, " rows"], step: Any) -> list[Array]:
        """The arrays of a step's batch."""
        if self.batch_size is None:
            return self.arrays
        position = jnp.asarray(step) % (self.num_rows // self.batch_size)
        rows = jax.lax.dynamic_slice_in_dim(order, position * self.batch_size, self.batch_size)
        return [x[rows] for x in self.arrays]


def warn_unscaled(objective: Any, params: Any, batches: Minibatches) -> None:
    """Warn if a target counts a minibatch as if it were all data.

    That is right if every choice belongs to a row. If all rows share a choice, the data must be scaled up against the
    prior of that choice.
    """
    n, b = batches.num_rows, batches.batch_size
    if b is None or b == n or not hasattr(objective, "at"):
        return
    target, _ = objective.at(params, *batches.example())
    shared = [a for a in target.latents if b not in target.sites[a].shape]
    rows = [a for a, s in target.sites.items() if a in target.data and b in s.shape]
    weighed = any(s.kind == "factor" for s in target.sites.values())
    if shared and rows and not weighed and not _scales(target.program.code()[0].jaxpr):
        axes = [a.name for a in target.sites[rows[0]].axes if a.size == b and a.name]
        axis = axes[0] if axes else "row"
        warnings.warn(
            f"fit: the target counts {b} of {n} rows, while {', '.join(map(repr, shared))} belong to all of them: its "
            f"bound is not that of the data. Scale the model: scale(model, {{{axis!r}: {n} / {b}}})",
            stacklevel=3,
        )


def _is_scaled(eqn: Any) -> bool:
    if eqn.primitive is not site_p:
        return bool(eqn.params.get("scaled"))
    skeleton = eqn.params["skeleton"]
    return skeleton.unpack([0.0] * skeleton.num_arrays).get("scale") is not None


_scales = Holds(_is_scaled)
"""Whether a site of a program is scaled."""
