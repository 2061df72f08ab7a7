"""Targets on R^n: each latent choice passes through NumPyro's bijection to its support, with the log-Jacobian."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from weft.ppl.stage.addresses import flatten, unflatten, unknown
from weft.ppl.stage.errors import AddressError
from weft.ppl.stage.interpreter import interpret
from weft.ppl.stage.keys import as_key
from weft.ppl.stage.modules import Noun
from weft.ppl.stage.packing import pack

from . import printing
from .handlers import Free, Given, expand
from .traces import Trace, flat_records, sort_records
from .unconstraining import ToUnconstrained, Unconstrain

if TYPE_CHECKING:
    from .targets import Target

Positions = dict[str, Any]


class Unconstrained(printing.Printed, Noun):
    """A target on R^n. A position is a nested dict ``z`` of unconstrained arrays.

    ``biject_to(support)`` maps the array at an address to the choice. The log density includes the log-Jacobian.

    Attributes:
        target: the target.
        shapes: the shape of each unconstrained array, by dotted address.
    """

    target: Target
    shapes: dict[str, tuple[int, ...]] = eqx.field(static=True)

    def _enter(self, z: Mapping[str, Any]) -> dict[str, jax.Array]:
        """A checked position, by dotted address."""
        flat = {a: jnp.asarray(x, jnp.result_type(float)) for a, x in flatten(z).items()}
        for address in (*flat, *self.shapes):
            if address not in self.shapes:
                raise AddressError(unknown(address, self.shapes, " in the position"))
            if address not in flat:
                raise AddressError(f"the position lacks {address!r}")
            if flat[address].shape != self.shapes[address]:
                raise AddressError(
                    f"position of {address!r}: expected shape {self.shapes[address]} on the unconstrained scale, got "
                    f"{flat[address].shape}"
                )
        return flat

    def log_density(self, z: Mapping[str, Any]) -> jax.Array:
        r"""$\log p(x(z), \text{data}) + \log |dx/dz|$, a scalar."""
        return _log_density(self.target.staged(), self._enter(z))

    def trace(self, z: Mapping[str, Any]) -> Trace:
        """The trace at ``z``: latent choices, their activity, derived values. Its log density is that of ``z``."""
        return _trace(self.target.staged(), self._enter(z))

    def to_choices(self, z: Mapping[str, Any]) -> dict[str, Any]:
        """The latent choices at ``z``."""
        return self.trace(z).choices

    def from_choices(self, choices: Mapping[str, Any]) -> Positions:
        """The position of latent choices. It is the inverse of ``to_choices``."""
        return unflatten(_positions(self.target.staged(), None, self.target.complete(choices)))

    def init(self, key: jax.Array) -> Positions:
        """A draw from the prior, as a position. Choices of all branches are drawn."""
        return unflatten(_positions(self.target.staged(), as_key(key), dict(self.target.data)))

    @property
    def flat(self) -> FlatUnconstrained:
        """The same density on vectors."""
        return FlatUnconstrained(self)

    def __repr__(self) -> str:
        return printing.unconstrained(self)


class FlatUnconstrained(printing.Printed, Noun):
    """An unconstrained target on vectors of R^n. It has the methods of ``Unconstrained``.

    Attributes:
        nested: the same target on nested positions.
    """

    nested: Unconstrained

    @property
    def size(self) -> int:
        """The dimension n."""
        return sum(math.prod(s) for s in self.nested.shapes.values())

    @property
    def addresses(self) -> dict[str, slice]:
        """The place of each latent choice in the vector."""
        ends = list(itertools.accumulate(math.prod(s) for s in self.nested.shapes.values()))
        return {
            a: slice(e - math.prod(s), e)
            for (a, s), e in zip(self.nested.shapes.items(), ends, strict=True)
        }

    def ravel(self, z: Mapping[str, Any]) -> jax.Array:
        """The vector of a nested position."""
        flat = flatten(z)
        parts = [jnp.ravel(flat[a]).astype(jnp.result_type(float)) for a in self.nested.shapes]
        return jnp.concatenate(parts) if parts else jnp.zeros((0,))

    def unravel(self, x: jax.Array) -> Positions:
        """The nested position of a vector."""
        x = jnp.asarray(x)
        if x.shape != (self.size,):
            raise AddressError(f"expected a position of shape ({self.size},), got {x.shape}")
        return unflatten(
            {a: x[where].reshape(self.nested.shapes[a]) for a, where in self.addresses.items()}
        )

    def log_density(self, x: jax.Array) -> jax.Array:
        """As ``Unconstrained.log_density``."""
        return self.nested.log_density(self.unravel(x))

    def trace(self, x: jax.Array) -> Trace:
        """As ``Unconstrained.trace``."""
        return self.nested.trace(self.unravel(x))

    def to_choices(self, x: jax.Array) -> dict[str, Any]:
        """As ``Unconstrained.to_choices``."""
        return self.nested.to_choices(self.unravel(x))

    def from_choices(self, choices: Mapping[str, Any]) -> jax.Array:
        """As ``Unconstrained.from_choices``."""
        return self.ravel(self.nested.from_choices(choices))

    def init(self, key: jax.Array) -> jax.Array:
        """As ``Unconstrained.init``."""
        return self.ravel(self.nested.init(key))

    def __repr__(self) -> str:
        return printing.flat(self)


def unconstrain(target: Target) -> Unconstrained:
    """See ``Target.unconstrain``."""
    target.program.require_density()
    staged = target.staged()
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = {}
    if target.latents:
        leaves, skeleton = pack(staged)
        found = jax.eval_shape(
            lambda leaves, key: _shape_of_positions(skeleton.unpack(leaves), key), leaves, key
        )
        shapes = {a: found[a].shape for a in target.latents}
    return Unconstrained(staged, shapes)


def _shape_of_positions(target: Target, key: Any) -> Any:
    # Improper priors cannot be drawn: shapes come from the inverse bijection at any value.
    given = {
        a: Given(jnp.ones(s.shape, s.dtype)) for a, s in target.sites.items() if s.kind == "sample"
    }
    return _positions_of(
        target, key, {a: g for a, g in given.items() if a in target.program.latents}
    )


def _positions_of(target: Target, key: Any, given: dict[str, Given]) -> dict[str, jax.Array]:
    code, args = target.program.code()
    handler = ToUnconstrained(frozenset(target.latents))
    _, records, _ = interpret(code.jaxpr, args, handler, key, unflatten(given))
    found = {a: r["value"] for a, r in flat_records(records)}
    positions = {}
    for address in target.latents:
        z = found[address]
        if address in target.missing:
            info = target.sites[address]
            n = math.prod(info.batch_shape)
            z = z.reshape(n, *z.shape[len(info.batch_shape) :])[target.missing[address]]
        positions[address] = z
    return positions


def _free(target: Target, z: dict[str, Any]) -> dict[str, Any]:
    """Entries for the handler: latent choices by their positions, the others as given."""
    found: dict[str, Any] = dict(target.data)
    for address in target.latents:
        if address not in target.data:
            found[address] = Free(z[address])
            continue
        data = target.data[address]
        full = z[address]
        if address in target.missing:
            shape = target.sites[address].batch_shape
            zeros = jnp.zeros((math.prod(shape), *full.shape[1:]), full.dtype)
            full = zeros.at[target.missing[address]].set(full).reshape(*shape, *full.shape[1:])
        found[address] = Free(full, data.value, data.where)
    return found


def _filler(target: Target, z: dict[str, Any]) -> jax.Array:
    """The density of coordinates of observed elements, which are N(0, 1).

    They exist only if it was not known which elements are observed.
    """
    total = jnp.zeros(())
    for address in target.latents:
        if address in target.data and address not in target.missing:
            where = expand(target.data[address].where, z[address])
            total += jnp.sum(
                jnp.where(where, -0.5 * z[address] ** 2 - 0.5 * math.log(2 * math.pi), 0)
            )
    return total


@eqx.filter_jit
def _log_density(target: Target, z: dict[str, Any]) -> jax.Array:
    code, args = target.program.code()
    _, _, terms = interpret(code.jaxpr, args, Unconstrain(), None, unflatten(_free(target, z)))
    return terms["log_density"] + _filler(target, z)


@eqx.filter_jit
def _trace(target: Target, z: dict[str, Any]) -> Trace:
    code, args = target.program.code()
    outs, records, terms = interpret(
        code.jaxpr, args, Unconstrain(record=True), None, unflatten(_free(target, z))
    )
    choices, active, derived = sort_records(records, target.sites)
    choices = {a: v for a, v in flatten(choices).items() if a in target.latents}
    active = {a: v for a, v in flatten(active).items() if a in target.latents}
    value = jax.tree.unflatten(code.out_tree, outs)
    return Trace(
        unflatten(choices),
        unflatten(active),
        derived,
        terms["log_density"] + _filler(target, z),
        value,
    )


@eqx.filter_jit
def _positions(target: Target, key: Any, given: dict[str, Given]) -> dict[str, jax.Array]:
    return _positions_of(target, key, given)
