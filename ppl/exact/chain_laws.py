r"""Normal choices in the carry of a scan: their law before each step.

The slots of a carry that depend on normal choices of the chain have a joint normal law, given all other choices. One
step reads it, and hands on the law of the new slots given the evidence of the step: the Kalman filter. Slots may be any
affine functions of any choices: the last states, innovations, buffers of them. So a chain may be of any order. Choices
from before the scan that stay outside are no part of the law: means are affine in them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
from weft.ppl.stage.errors import ModelError

from .factors import roots_of
from .normals import Evidence, Joint, Law, Prior, unit_slope
from .region import Region, addresses
from .semirings import log_sum
from .tables import (
    Entangled,
    Plate,
    Slope,
    Table,
    Variable,
    affine,
    apply,
    at_zero,
    axes_of,
    is_table,
    slopes_of,
)

Blocks = dict[tuple[int, int], Any]

HANDED = "handed on"
"""The name of the choice through which a step of a filter reads the law of the carry (``messages``)."""


@dataclasses.dataclass
class Carried:
    """The law of the slots of a carry.

    Attributes:
        variables: for each slot that is uncertain, the variable for it. Its mean is zero.
        blocks: the covariances of these variables, by pairs of slots ``i <= j``.
    """

    variables: dict[int, Variable] = dataclasses.field(default_factory=dict)
    blocks: Blocks = dataclasses.field(default_factory=dict)

    def known(self) -> dict[tuple[Variable, Variable], Any]:
        found: dict[tuple[Variable, Variable], Any] = {}
        for i, u in self.variables.items():
            for j, v in self.variables.items():
                if i <= j:
                    found[u, v] = self.blocks.get((i, j))
        return found

    def block(self, i: int, j: int, limit: Any, otherwise: Any = None) -> Any:
        """The covariance of two slots."""
        if i <= j:
            return self.blocks.get((i, j), otherwise)
        if (j, i) not in self.blocks:
            return otherwise
        return apply(lambda x: jnp.swapaxes(x, -1, -2), limit, self.blocks[j, i])


def hand_on(
    region: Region, slots: Sequence[Any], inside: Collection[Variable], before: Carried
) -> tuple[list[Any], Carried]:
    """The slots and their law, given the evidence. The choices ``inside`` leave the region.

    Args:
        region: the region of the step. What its evidence says of other choices stays in it.
        slots: the slots after the step.
        inside: the choices of the chain that have a prior in the region.
        before: the law of the slots before the step.
    """
    plan, limit = region.plan, region.plan.limit
    members = {*inside, *before.variables.values()}
    mine = [f for f in region.evidence if members & set(f.variables)]
    joint = Joint({v: region.priors[v] for v in inside}, before.known(), limit)
    random = [i for i, x in enumerate(slots) if members & slopes_of(x).keys()]
    groups: dict[frozenset[Plate], tuple[list[int], list[Evidence]]] = {}
    for i in random:
        _check_slot(slots[i], members)
        groups.setdefault(_group(slopes_of(slots[i]), members), ([], []))[0].append(i)
    for f in mine:
        groups.setdefault(_group(f.variables, members), ([], []))[1].append(f)
        _check_apart(f, members)
    for v in inside:
        _group([v, *region.priors[v].parents], members)
    region.evidence = [f for f in region.evidence if f not in mine]
    region.priors = {v: prior for v, prior in region.priors.items() if v not in inside}
    after, new = Carried(), list(slots)
    for numbers, evidence in groups.values():
        some = next(
            v
            for x in (*(slopes_of(slots[i]) for i in numbers), *(f.variables for f in evidence))
            for v in x
            if v in members
        )
        order = [p.root() for p in some.plates]
        places = [_places(slots[i], members, order) for i in numbers]
        values = [copies_of(slots[i], at, limit) for i, at in zip(numbers, places, strict=True)]
        law = Law(joint, values, evidence, order, plan.semiring, plan.filtering)
        region.evidence += law.left
        for k, i in enumerate(numbers):
            slot, at = slots[i], places[k]
            mean = uncopied(law.means[k], slot.shape, at, limit)
            v = before.variables.get(i)
            if v is None or roots_of(v.plates) != set(order):
                source = next(u for u in slopes_of(slot) if u in members)
                size = math.prod(slot.shape) // math.prod(p.size for p in order)
                v = Variable(source.address, 1, tuple(order), None, size)
            after.variables[i] = v
            unit = unit_slope(slot.shape, at, slot.dtype)
            new[i] = affine(at_zero(mean), {**slopes_of(mean), v: unit})
            for m, j in enumerate(numbers[k:], k):
                block = law.covariance(k, m)
                if block is None:
                    sizes = [p.size for p in order], values[k].shape[-1], values[m].shape[-1]
                    block = jnp.zeros((*sizes[0], *sizes[1:]), slot.dtype)
                after.blocks[i, j] = block
    return new, after


def integrate_message(region: Region) -> None:
    """Integrate over the message that a step of a filter reads, and over the other choices of the step.

    This is done as the step's own message is made. So a compiler that sees both computes it once.
    """
    read = any(v.address == HANDED for v in region.priors)
    if not read or region.plan.semiring is not log_sum:
        return
    region.finish({v for v in region.priors if v.plates})
    terms = (*region.priors.values(), *region.evidence)
    together = not any(v.plates for v in region.priors) and not any(f.scale for f in terms)
    if together:
        hand_on(region, [], set(region.priors), Carried())


def fold(
    region: Region, slots: list[Any], outside: Collection[Variable]
) -> tuple[list[Any], Carried]:
    """The slots before the first step and their law. It has all choices that nothing but the scan reads."""
    inside = {v for v in region.priors if v not in outside}
    while True:  # a choice that stays outside must not depend on one inside
        gone = {u for v, f in region.priors.items() if v not in inside for u in f.parents}
        if not inside & gone:
            break
        inside -= gone
    reached = {v for x in slots for v in slopes_of(x) if v in inside}
    while True:  # what they are connected with
        more = {u for v in reached for u in region.priors[v].parents}
        more |= {v for v in inside if reached & set(region.priors[v].parents)}
        more |= {u for f in region.evidence if reached & set(f.variables) for u in f.variables}
        more = (more & inside) - reached
        if not more:
            break
        reached |= more
    return hand_on(region, slots, reached, Carried())


def unfold(
    region: Region, slots: Sequence[Any], carried: Carried, wanted: Collection[int]
) -> list[Any]:
    """The slots after the last step, in terms of new variables of the region; ``wanted`` are those that are read."""
    new = [at_zero_of(x, carried) for x in slots]
    groups: dict[tuple[Plate, ...], list[int]] = {}
    for i, v in carried.variables.items():
        if i in wanted:
            groups.setdefault(tuple(p.root() for p in v.plates), []).append(i)
    limit = region.plan.limit
    for order, numbers in groups.items():
        sizes = [carried.variables[i].dimension or 0 for i in numbers]
        rows = []
        for a in numbers:
            blocks = [carried.block(a, b, limit) for b in numbers]
            rows.append(apply(lambda *x: jnp.concatenate(x, -1), limit, *blocks))
        covariance = apply(lambda *x: jnp.concatenate(x, -2), limit, *rows)
        first = carried.variables[numbers[0]]
        v = Variable(first.address, 1, order, None, sum(sizes))
        shape = (*(p.size for p in order), sum(sizes))
        region.priors[v] = Prior(v, jnp.zeros(shape, covariance.dtype), None, covariance)
        region.created.append(v)
        at = 0
        for i, size in zip(numbers, sizes, strict=True):
            own = slopes_of(slots[i])[carried.variables[i]]
            pad = [(0, 0)] * (own.value.ndim - 1) + [(at, sum(sizes) - at - size)]
            one = len(numbers) == 1
            slope = Slope(jnp.pad(own.value, pad), own.places, one, one)
            new[i] = affine(at_zero(new[i]), {**slopes_of(new[i]), v: slope})
            at += size
    return new


def at_zero_of(x: Any, carried: Carried) -> Any:
    gone = set(carried.variables.values())
    if not gone & slopes_of(x).keys():
        return x
    return affine(at_zero(x), {v: s for v, s in slopes_of(x).items() if v not in gone})


def _group(variables: Any, members: Collection[Variable]) -> frozenset[Plate]:
    """The plates that choices of the chain which meet have in common."""
    found = [v for v in variables if v in members]
    keys = {frozenset(roots_of(v.plates)) for v in found}
    if len(keys) > 1:
        raise _meet([v for v in found if v.plates])
    return next(iter(keys))


def _check_apart(f: Evidence, members: Collection[Variable]) -> None:
    """Copies of a choice outside that share a choice of the chain meet."""
    own = _group(f.variables, members)
    apart = [v for v in f.variables if not roots_of(v.plates) <= own]
    if apart:
        raise _meet(apart)


def _meet(variables: Sequence[Variable]) -> Entangled:
    error = Entangled(
        f"the copies of {addresses(variables)} meet in a scan: each depends on a choice that they share"
    )
    error.meeting = frozenset(v.address for v in variables)
    return error


def _check_slot(x: Table, members: Collection[Variable]) -> None:
    if x.curved or not jnp.issubdtype(x.dtype, jnp.inexact):
        names = addresses(v for v in x.slopes if v in members)
        by = f" (it is not affine by the equation {x.curved})" if x.curved else ""
        raise ModelError(
            f"the carry of the scan holds a function of {names} that is not affine: carry the choice, and compute "
            f"what is wanted of it in the next step{by}"
        )


def _places(x: Table, members: Collection[Variable], order: Sequence[Plate]) -> tuple[int, ...]:
    """The axes of a slot along some plates."""
    found = set()
    for v, places in axes_of(x).items():
        if v in members:
            own = [p.root() for p in v.plates]
            found.add(tuple(places[own.index(p)] for p in order))
    if len(found) > 1:
        raise _meet([v for v in slopes_of(x) if v in members])
    return next(iter(found))


def copies_of(x: Any, places: Sequence[int], limit: Any) -> Any:
    """A slot with the axes of copies first, and one axis for the numbers of a copy."""

    def copies(x: Any) -> Any:
        rest = [i for i in range(x.ndim) if i not in places]
        x = jnp.transpose(x, [*places, *rest])
        return x.reshape(*x.shape[: len(places)], -1)

    found = apply(copies, limit, x)
    if not is_table(found):
        return found
    kept = {  # the order of the numbers of one copy is still that of the slot
        v: slopes_of(x)[v]._replace(value=s.value, places=s.places)
        for v, s in slopes_of(found).items()
    }
    return affine(at_zero(found), kept, found.curved)


def uncopied(x: Any, shape: Sequence[int], places: Sequence[int], limit: Any) -> Any:
    """The way back."""
    rest = [i for i in range(len(shape)) if i not in places]
    order = [*places, *rest]
    back = [order.index(i) for i in range(len(shape))]

    return apply(lambda x: jnp.transpose(x.reshape([shape[i] for i in order]), back), limit, x)
