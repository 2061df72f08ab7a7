"""Batch-axis propagation: which equations keep independent copies apart, and where their results have the batch axis.

An equation is *aligned* with an axis of independent copies if index l of its results reads only index l of its
operands. The rules below prove that from what is known of each primitive. A primitive without a rule is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from weft.ppl.stage.compat import is_shard_map, shard_map_specs
from weft.ppl.stage.jaxprs import Axes, Place, through
from weft.ppl.stage.primitives import BATCHED, CUMULATIVE, ELEMENTWISE, REDUCTIONS, rules
from weft.ppl.stage.wiring import wiring


class Unaligned(Exception):
    """An equation may mix the copies of a choice. The message says how."""


Places = list["int | None"]

Rule = Callable[[Any, Places], Places]
_RULES: dict[str, Rule] = {}


def align(eqn: Any, places: Places) -> Places:
    """For each result of an equation, the position of the batch axis that the operands carry at ``places``.

    A position is None if there is no such axis.

    Raises:
        Unaligned: if the equation may mix indices of that axis.
    """
    found = _align(eqn, places)
    return through(eqn, places, _align, _agree, _LEADING) if found is None else found


def _align(eqn: Any, places: Places, where: Place | None = None) -> Places | None:
    """The same for one equation; None if it has equations inside."""
    if where is not None and where.deciding is not None:
        raise Unaligned("decides by all of them how long to go on")
    if all(p is None for p in places):
        return [None for _ in eqn.outvars]
    rule = _RULES.get(eqn.primitive.name)
    if rule is not None:
        return rule(eqn, places)
    if is_shard_map(eqn):
        return _sharded(eqn, places)
    if wiring(eqn) is None:
        raise Unaligned("is not known to keep them apart")
    return None


def _agree(places: Sequence[int | None]) -> int | None:
    found = {p for p in places if p is not None}
    if len(found) > 1:
        raise Unaligned("puts them on different axes in different branches")
    return found.pop() if found else None


def _slice(place: int | None, count: int) -> int | None:
    if place is not None and place < count:
        raise Unaligned(f"goes along their axis {place}")
    return None if place is None else place - count


def _sharded(eqn: Any, places: Places) -> Places:
    """Inside, an index counts from the first row of a shard. So the axis must be split over the mesh all the same."""
    found = through(eqn, places, _align, _agree, _LEADING)
    ins, outs = shard_map_specs(eqn)
    pairs = [*zip(ins, places, strict=True), *zip(outs, found, strict=True)]
    if len({tuple(spec[p]) for spec, p in pairs if p is not None}) > 1:
        raise Unaligned("splits their axis over the mesh in different ways")
    return found


_LEADING = Axes(_slice, lambda place, count: None if place is None else place + count)


# --- rules ------------------------------------------------------------------------------------------------------------


_rule = rules(_RULES)


def _one(places: Places) -> int:
    """The position that all operands agree on."""
    found = {p for p in places if p is not None}
    if len(found) != 1:
        raise Unaligned(f"combines them along different axes {sorted(found)}")
    return found.pop()


def _shape(eqn: Any, i: int = 0) -> tuple[int, ...]:
    return tuple(eqn.invars[i].aval.shape)


@_rule("optimization_barrier")
def _barrier(eqn: Any, places: Places) -> Places:
    return list(places)


@_rule(*ELEMENTWISE)
def _elementwise(eqn: Any, places: Places) -> Places:
    place = _one(places)
    shapes = [_shape(eqn, i) for i, p in enumerate(places) if p is not None]
    for out in eqn.outvars:
        if any(len(s) != len(out.aval.shape) for s in shapes):
            raise Unaligned("changes the number of axes")
        if any(s[place] != out.aval.shape[place] for s in shapes):
            raise Unaligned("repeats their axis")
    return [place] * len(eqn.outvars)


@_rule(*BATCHED)
def _batched(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if any(p is not None and p >= len(_shape(eqn, i)) - 2 for i, p in enumerate(places)):
        raise Unaligned("reads the whole axis")
    return [place] * len(eqn.outvars)


@_rule(*REDUCTIONS)
def _reduce(eqn: Any, places: Places) -> Places:
    place, axes = _one(places), eqn.params["axes"]
    if place in axes:
        raise Unaligned(f"reduces over their axis {place}")
    return [place - sum(a < place for a in axes)] * len(eqn.outvars)


@_rule("reduce")
def _generic_reduce(eqn: Any, places: Places) -> Places:
    """By any function of two numbers. Operands come first, then as many initial values without axes."""
    place, axes = _one(places), eqn.params["dimensions"]
    if place in axes:
        raise Unaligned(f"reduces over their axis {place}")
    return [place - sum(a < place for a in axes)] * len(eqn.outvars)


def _along(eqn: Any, places: Places, axis: int) -> Places:
    place = _one(places)
    if place == axis:
        raise Unaligned(f"goes along their axis {axis}")
    return [place] * len(eqn.outvars)


@_rule(*CUMULATIVE)
def _cumulative(eqn: Any, places: Places) -> Places:
    return _along(eqn, places, eqn.params["axis"])


@_rule("broadcast_in_dim")
def _broadcast(eqn: Any, places: Places) -> Places:
    place = _one(places[:1])
    target = eqn.params["broadcast_dimensions"][place]
    if _shape(eqn)[place] != eqn.params["shape"][target]:
        raise Unaligned("repeats their axis")
    return [target]


@_rule("reshape")
def _reshape(eqn: Any, places: Places) -> Places:
    order = eqn.params.get("dimensions") or range(len(_shape(eqn)))
    place, new = order.index(_one(places[:1])), tuple(eqn.params["new_sizes"])
    old = tuple(_shape(eqn)[axis] for axis in order)
    before = math.prod(old[:place])
    for target, size in enumerate(new):
        if size == old[place] and math.prod(new[:target]) == before:
            return [target]
    raise Unaligned(f"reshapes their axis, {old} to {new}")


@_rule("squeeze")
def _squeeze(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if place in eqn.params["dimensions"]:
        raise Unaligned("drops their axis, of one copy")
    return [place - sum(a < place for a in eqn.params["dimensions"])]


@_rule("fft")
def _fft(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if place >= len(_shape(eqn)) - len(eqn.params["fft_lengths"]):
        raise Unaligned(f"transforms along their axis {place}")
    return [place]


@_rule("transpose")
def _transpose(eqn: Any, places: Places) -> Places:
    return [list(eqn.params["permutation"]).index(_one(places))]


@_rule("rev")
def _rev(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if place in eqn.params["dimensions"]:
        raise Unaligned(f"reverses their axis {place}")
    return [place]


@_rule("sort", "concatenate", "split")
def _dimension(eqn: Any, places: Places) -> Places:
    return _along(eqn, places, eqn.params.get("dimension", eqn.params.get("axis")))


@_rule("stack")
def _stack(eqn: Any, places: Places) -> Places:
    place = _one(places)
    return [place + (eqn.params["axis"] <= place)]


@_rule("unstack")
def _unstack(eqn: Any, places: Places) -> Places:
    [place, *_] = _along(eqn, places, eqn.params["axis"])
    assert place is not None
    return [place - (eqn.params["axis"] < place)] * len(eqn.outvars)


@_rule("tile")
def _tile(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if eqn.params["reps"][place] != 1:
        raise Unaligned(f"repeats their axis {place}")
    return [place]


@_rule("top_k")
def _top_k(eqn: Any, places: Places) -> Places:
    rank = len(_shape(eqn))
    return _along(eqn, places, eqn.params.get("axis", -1) % rank)


@_rule("pad")
def _pad(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if tuple(eqn.params["padding_config"][place]) != (0, 0, 0):
        raise Unaligned(f"pads their axis {place}")
    return [place]


@_rule("slice")
def _static_slice(eqn: Any, places: Places) -> Places:
    place, params = _one(places), eqn.params
    whole = (
        params["start_indices"][place] == 0 and params["limit_indices"][place] == _shape(eqn)[place]
    )
    if not whole or (params["strides"] and params["strides"][place] != 1):
        raise Unaligned(f"takes a part of their axis {place}")
    return [place]


@_rule("dynamic_slice")
def _dynamic_slice(eqn: Any, places: Places) -> Places:
    place = _one(places[:1])
    if eqn.params["slice_sizes"][place] != _shape(eqn)[place]:
        raise Unaligned(f"takes a part of their axis {place}")
    return [place]


@_rule("dynamic_update_slice")
def _dynamic_update_slice(eqn: Any, places: Places) -> Places:
    place = _one(places[:2])
    if _shape(eqn, 1)[place] != _shape(eqn, 0)[place]:
        raise Unaligned(f"writes a part of their axis {place}")
    return [place]


@_rule("dot_general")
def _dot_general(eqn: Any, places: Places) -> Places:
    (contract, batch), out = eqn.params["dimension_numbers"], set()
    free_before = len(batch[0])
    for side, place in enumerate(places[:2]):
        free = [
            a
            for a in range(len(_shape(eqn, side)))
            if a not in contract[side] and a not in batch[side]
        ]
        if place is not None:
            if place in contract[side]:
                raise Unaligned(f"sums over their axis {place}")
            out.add(
                list(batch[side]).index(place)
                if place in batch[side]
                else free_before + free.index(place)
            )
        free_before += len(free)
    if len(out) != 1:
        raise Unaligned("combines every copy with every other")
    return [out.pop()]


@_rule("gather")
def _gather(eqn: Any, places: Places) -> Places:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = places
    out_rank = len(eqn.outvars[0].aval.shape)
    batch = [a for a in range(out_rank) if a not in numbers.offset_dims]
    out = set()
    if indices is not None:
        if indices == len(_shape(eqn, 1)) - 1:
            raise Unaligned("reads an index made of several copies")
        out.add(batch[indices])
    if operand is not None:
        if operand in numbers.operand_batching_dims:
            i = list(numbers.operand_batching_dims).index(operand)
            out.add(batch[numbers.start_indices_batching_dims[i]])
        elif sizes[operand] != _shape(eqn)[operand]:
            raise Unaligned(f"takes parts of their axis {operand}")
        else:
            dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
            kept = [a for a in range(len(_shape(eqn))) if a not in dropped]
            out.add(numbers.offset_dims[kept.index(operand)])
    if len(out) != 1:
        raise Unaligned("combines every copy with every other")
    return [out.pop()]
