"""Index maps: values of copies of a normal choice that are read by an index, as rows read that of their group.

``theta[g]`` with an array ``g`` is a value for every row. Its copies are those of a choice of its own, a *pick*: row
$r$ reads copy $g_r$ of the choice. Rows that read the same copy meet only when the choice is eliminated: then they are
summed by group, and nothing has as many entries as rows times groups.

Two values that read a choice by the same index have the same pick. Indices are compared by how they were computed:
equal equations on the same integers are evaluated once (``Indices``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from weft.ppl.analysis.constants import folded
from weft.ppl.stage.compat import Tracer, bind, trace_state


@dataclasses.dataclass(frozen=True, eq=False)
class Pick:
    """What a pick reads: the copies of ``variable`` along its plate number ``along``, by an index of the pick's first
    plates.
    """

    variable: Any
    along: int
    index: Any


class Indices:
    """Integers that were computed, by how: equal equations on equal operands give the same array.

    Attributes:
        picks: for each pick, what it reads.
        active: whether there are normal choices; else integers are computed as they are.
    """

    def __init__(self) -> None:
        self.active = False
        self.known: dict[Any, list[tuple[Any, list[Any]]]] = {}
        self.made: dict[
            int, tuple[Any, list[Any], Any]
        ] = {}  # equation and operands of an array, which it keeps alive
        self.picks: dict[Any, Pick] = {}
        self.by_index: dict[Any, Any] = {}

    def evaluate(self, eqn: Any, ins: Sequence[Any]) -> list[Any]:
        """The results of an equation. They are looked up if it was evaluated before."""
        if not self.active or not is_integer(eqn):
            return bind(eqn, ins)
        if not any(isinstance(x, Tracer) for x in ins):
            return folded(eqn, ins)
        key = (eqn.primitive.name, str(sorted(eqn.params.items(), key=str)), tuple(map(_name, ins)))
        now = trace_state()
        for state, outs in self.known.setdefault(key, []):
            if state == now:
                return outs
        outs = bind(eqn, ins)
        self.known[key].append((now, outs))
        for x in outs:
            self.made[id(x)] = eqn, list(ins), x
        return outs

    def name(self, x: Any, number: int) -> Any:
        """What tells a component of indices (their last axis) from others: the array that was joined there."""
        made = self.made.get(id(x))
        if made is None:
            return (_name(x), number)
        eqn, ins, _ = made
        name, last = eqn.primitive.name, x.ndim - 1
        if name == "concatenate" and eqn.params["dimension"] == last:
            for piece in ins:
                if number < piece.shape[-1]:
                    return self.name(piece, number)
                number -= piece.shape[-1]
        if (
            name == "broadcast_in_dim"
            and x.shape[-1] == 1
            and last not in eqn.params["broadcast_dimensions"]
        ):
            return (_name(ins[0]), str(eqn.params["broadcast_dimensions"]), x.shape)
        return (_name(x), number)


def is_integer(eqn: Any) -> bool:
    outs = [v.aval for v in eqn.outvars]
    return (
        bool(outs)
        and not eqn.effects
        and all(isinstance(a.dtype, np.dtype) and a.dtype.kind in "biu" for a in outs)
    )


def _name(x: Any) -> Any:
    """What tells an operand from others: small constants by their value."""
    if isinstance(x, Tracer):
        return id(x)
    array = np.asarray(x) if not hasattr(x, "dtype") or isinstance(x.dtype, np.dtype) else None
    if array is None or array.size > 1 << 12:
        return id(x)
    return array.dtype.str, array.shape, array.tobytes()


class Reading(NamedTuple):
    """How an equation reads copies of a choice by an index.

    Attributes:
        along: the number of the plate whose copies are read.
        rows: the axes of the result along the index.
        index: the index, with these axes.
        name: what tells the index from others.
    """

    along: int
    rows: tuple[int, ...]
    index: Any
    name: Any


def read_plates(eqn: Any, places: Sequence[int]) -> list[int]:
    """The plates of which an equation reads one copy by an index; ``places`` are their axes in its first operand."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dynamic_slice":
        sizes, shape = params["slice_sizes"], eqn.invars[0].aval.shape
        return [i for i, p in enumerate(places) if sizes[p] == 1 and shape[p] > 1]
    if name != "gather":
        return []
    mapped, sizes = params["dimension_numbers"].start_index_map, params["slice_sizes"]
    return [i for i, p in enumerate(places) if p in mapped and sizes[p] == 1]


def reading(
    eqn: Any, ins: Sequence[Any], places: Sequence[int], indices: Indices
) -> Reading | None:
    """How an equation reads one plate of a choice; None if it does not, or by an index that is one constant number.

    Args:
        eqn: an equation.
        ins: its operands.
        places: the axes of the first operand along the plates of the choice.
        indices: what is known of integers.
    """
    found = read_plates(eqn, places)
    if len(found) != 1:
        return None
    if eqn.primitive.name == "dynamic_slice":
        index = ins[1 + places[found[0]]]
        return Reading(found[0], (), index, _name(index)) if isinstance(index, Tracer) else None
    numbers = eqn.params["dimension_numbers"]
    mapped = list(numbers.start_index_map)
    if numbers.operand_batching_dims:
        return None
    rank = len(eqn.outvars[0].aval.shape)
    rows = tuple(a for a in range(rank) if a not in numbers.offset_dims)
    if not rows and not isinstance(ins[1], Tracer):
        return None
    component = mapped.index(places[found[0]])
    return Reading(found[0], rows, ins[1][..., component], indices.name(ins[1], component))
