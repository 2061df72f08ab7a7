"""The base of draws and particles: values by address, printing, and files.

Both are pytrees of arrays. They are made in compiled code, and pass through `jit` and `vmap` like any other. Tables,
exports and files are made on the host.
"""

from __future__ import annotations

import abc
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.addresses import flatten, unknown
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import AddressError, WeftError
from weft.ppl.stage.modules import Noun

from . import export, record, storage
from .summary import Summary

Record = dict[str, dict[str, Any]]
"""For each of "choices", "derived" and "active", the values by address."""

PRINTED = 5_000_000
"""So many numbers are summarised when a result is printed: it takes some seconds."""


class Result(Noun):
    """A result with choices. It is the base of `Draws` and `Particles`.

    Attributes:
        choices: nested dict of the latent choices, arrays that lead with the axes of the result.
        derived: nested dict of values that `deterministic` recorded.
        active: a tree like `choices`, of booleans. It is False where a choice does not count. The shape of the booleans
            leads that of the choice. A choice that is absent here always counts.
        target: the target that was sampled, or a `TargetRecord` if the result was read from a file without it.
    """

    choices: eqx.AbstractVar[dict[str, Any]]
    derived: eqx.AbstractVar[dict[str, Any]]
    active: eqx.AbstractVar[dict[str, Any]]

    @abc.abstractmethod
    def summary(self) -> Summary:
        """A table with one row for each scalar, and a verdict in words."""

    @abc.abstractmethod
    def _title(self) -> str:
        """The first line of the table."""

    @abc.abstractmethod
    def _saved(self) -> dict[str, Any]:
        """The fields that a file holds, besides the target."""

    def _saved_settings(self) -> dict[str, Any]:
        """The static fields that a file holds."""
        return {}

    def __getitem__(self, address: str) -> Any:
        """The values of a choice, or a derived value, by dotted address: ``draws["team.skill"]``."""
        values = self._values()
        if address in values:
            return values[address]
        raise AddressError(unknown(address, values, " in this result"))

    def _values(self) -> dict[str, Any]:
        """Choices and derived values by dotted address."""
        return {**flatten(self.derived), **flatten(self.choices)}

    def save(self, path: storage.PathLike) -> None:
        """Write everything but the model to one file; `weft.inference.load` reads it.

        Args:
            path: the file. It is first written under another name and renamed when it is complete. `numpy.load` can
                open it, too.

        Raises:
            StorageError: if it cannot be written there, or if the type is not registered with `load`.
        """
        own: Any = self  # each type has a field `target`, at its own place among the arguments
        observed = {} if own.target is None else export.plain_observed(own.target)
        meta = {**self._saved_settings(), "target": record.to_meta(own.target)}
        storage.write(
            path, storage.kind_of(type(self)), {**self._saved(), "observed": observed}, meta
        )

    @classmethod
    def from_saved(cls, saved: storage.Saved, target: Any = None) -> Self:
        """Rebuild a result from what `storage.read` gives.

        Raises:
            WeftError: if the file was written for another target.
        """
        tree, settings = dict(saved.tree), dict(saved.meta)
        observed, meta = tree.pop("observed"), settings.pop("target")
        if target is None:
            target = record.from_meta(meta, observed)
        else:
            record.check_fits(target, meta, repr(saved.path))
        make: Any = cls
        return make(**tree, **settings, target=target)

    def __repr__(self) -> str:
        return self._printed(str)

    def _repr_html_(self) -> str:
        return self._printed(Summary._repr_html_)

    def _printed(self, form: Any) -> str:
        """The summary; a shorter text if the summary cannot be computed or would take long."""
        flat = self._values()
        size = sum(int(np.prod(jnp.shape(v), dtype=float)) for v in flat.values())
        reason = None
        try:
            if size <= PRINTED:
                return form(self.summary())
            reason = (
                f"{size / 1e6:.0f} million numbers: call .summary() for the table and the verdict"
            )
        except WeftError as error:
            reason = str(error)
        leaves = [
            f"  {a}: {jnp.result_type(v)}{list(jnp.shape(v))}" for a, v in list(flat.items())[:16]
        ]
        leaves += [f"  ... {len(flat) - 16} more"] if len(flat) > 16 else []
        text = "\n".join([type(self).__name__, *leaves, reason])
        return text if form is str else f"<pre>{text}</pre>"

    def _require_host(self, what: str) -> None:
        if traced((self.choices, self.derived, self.active)):
            raise WeftError(
                f"{what} is for results outside jit, vmap and grad: return the result and call it there"
            )


def on_host(tree: dict[str, Any]) -> dict[str, Any]:
    """Arrays by address, moved to the host in one transfer. Random keys stay where they are."""
    flat = flatten(tree)
    plain = {
        a: v for a, v in flat.items() if not jnp.issubdtype(jnp.result_type(v), jax.dtypes.prng_key)
    }
    return {**flat, **jax.device_get(plain)}


def traced(tree: Any) -> bool:
    """Whether an array of a pytree is being traced."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))
