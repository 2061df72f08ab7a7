"""The rule of ``jax.vmap``: one lane is walked, with its own copies of everything that has one copy for each lane.

A choice that is drawn in a lane has one more plate outside the vmap, since there is one for each lane. A choice from
before the vmap of which every lane reads its own copy has one plate less inside.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.compat import open_jaxpr
from weft.ppl.stage.control import lanes_p
from weft.ppl.stage.interpreter import Context
from weft.ppl.stage.records import Records
from weft.ppl.stage.sites import Lane
from weft.ppl.stage.wiring import is_loop

from .factors import Factor
from .region import Lost, Region, addresses, rule
from .tables import (
    Entangled,
    Forms,
    Plate,
    PlateAxes,
    Table,
    Variable,
    axes_of,
    is_table,
    variables_of,
)


@rule(lanes_p)
def _lanes(region: Region, eqn: Any, ins: list[Any], context: Context) -> tuple[list[Any], Records]:
    """The outputs and records of equations under vmap, the outermost axis first."""
    body, lanes = eqn.params["jaxpr"], eqn.params["lanes"]
    keys, given = context.only(context.names(body))
    inside = context.inside(None, None, context.anonymous, tuple(lane.name for lane in lanes))
    later = region.read_later(context)
    return _over(region, list(lanes), body, ins, keys, given, inside, later)


def _over(
    region: Region,
    lanes: list[Lane],
    body: Any,
    ins: list[Any],
    keys: Any,
    given: Any,
    context: Context,
    later: frozenset[Variable],
) -> tuple[list[Any], Records]:
    """The same for the last vmap in ``lanes``. The others stand inside it."""
    if not lanes:
        return region.walk(body, ins, dataclasses.replace(context, keys=keys, given=given))
    lane = lanes[-1]
    begin = _Begin(region, lane, body, ins, later)
    ends: list[_End] = []

    def one(arrays: Any, keys: Any, given: Any, index: Any) -> Any:
        inner, values = begin.lane(arrays, index)
        outs, records = _over(inner, lanes[:-1], body, values, keys, given, context, inner.outside)
        inner.refuse_shared("a vmap")
        inner.finish({*inner.created, *begin.dying} - set(variables_of(outs)))
        ends.append(_End(inner, outs))
        return ends[-1].arrays(), records

    with region.plan.limit.repeated(lane.size, (lane.size,)):
        arrays, records = jax.vmap(
            one, (begin.axes(), 0, 0, 0), axis_size=lane.size, axis_name=lane.name
        )(begin.arrays(), keys, given, jnp.arange(lane.size))
    return ends[-1].leave(region, begin.slices, arrays), records


class _Begin:
    """How the walk of a lane begins: its operands, and the factors that can be summed out in it.

    Attributes:
        slices: the way of variables into the lane.
        inputs: the operands.
        factors: the factors of the region around that go into the lanes.
        dying: variables of a lane that nothing reads after the lanes.
        later: variables that are read after the lanes.
    """

    def __init__(
        self, region: Region, lane: Lane, body: Any, ins: list[Any], later: frozenset[Variable]
    ) -> None:
        self.region = region
        self.slices = slices = _Slices(Plate(lane.size, f"the axis {lane.name or 'of a vmap'!r}"))
        self.inputs = [slices.enter(x, m) for x, m in zip(ins, lane.mapped, strict=True)]
        dying = slices.dying(ins, body, later)
        self.factors = [f for f in region.factors if dying & set(f.variables)]
        region.factors = [f for f in region.factors if f not in self.factors]
        self.inner_factors = [slices.enter_factor(f) for f in self.factors]
        if any(v in slices.inside for x in self.inputs for v in axes_of(x.form)):
            raise Entangled(
                f"lanes of {slices.plate.name} read both their own copy of {addresses(slices.inside)} and all of them"
            )
        self.placed = [v for v in slices.whole if slices.whole[v][0] in region.placements]
        self.dying = {slices.inside[v] for v in dying}
        self.later = frozenset(slices.inside.get(v, v) for v in later)

    def arrays(self) -> Any:
        """Everything that differs between lanes."""
        placements = [self.region.placements[self.slices.whole[v][0]] for v in self.placed]
        return [x.array for x in self.inputs], [f.table for f in self.factors], placements

    def axes(self) -> Any:
        """The axes of these arrays along the lanes."""
        placements = [self.slices.whole[v][1] for v in self.placed]
        return [x.axis for x in self.inputs], [i for _, i in self.inner_factors], placements

    def lane(self, arrays: Any, index: Any) -> tuple[Region, list[Any]]:
        """The region of one lane, and its operands."""
        inputs, tables, placements = arrays
        around = self.region
        inner = Region(around.plan, around.kept, self.later)
        inner.factors = [
            dataclasses.replace(f, table=t)
            for (f, _), t in zip(self.inner_factors, tables, strict=True)
        ]
        for whole, part in self.slices.inside.items():
            key = around.keys.get(whole)
            inner.keys[part] = None if key is None else jax.random.fold_in(key, index)
        inner.placements = {**around.placements, **dict(zip(self.placed, placements, strict=True))}
        return inner, [x.value(a) for x, a in zip(self.inputs, inputs, strict=True)]


class _End:
    """How the walk of a lane ends: its region, its outputs, and the variables made in it that are still there."""

    def __init__(self, inner: Region, outs: list[Any]) -> None:
        self.inner, self.outs = inner, outs
        left = {*variables_of(outs), *(v for f in inner.factors for v in f.variables)}
        self.created = [v for v in inner.created if v in left]
        self.placed = [v for v in self.created if v in inner.placements]
        self.keyed = [v for v in self.created if inner.keys.get(v) is not None]

    def arrays(self) -> Any:
        """Everything that differs between lanes."""
        inner = self.inner
        outs = [None if isinstance(x, Lost) else x.array if is_table(x) else x for x in self.outs]
        keys = [inner.keys[v] for v in self.keyed]
        placements = [inner.placements[v] for v in self.placed]
        return outs, [f.table for f in inner.factors], inner.constant, keys, placements

    def leave(self, region: Region, slices: _Slices, arrays: Any) -> list[Any]:
        """The outputs of all lanes, from arrays that lead with the lanes. The rest goes to the region around."""
        outs, tables, constant, keys, placements = arrays
        for v, place in zip(self.placed, placements, strict=True):
            one_copy = slices.plate.size == 1
            place = jax.tree.map(lambda x: x[0], place) if one_copy else place
            region.placements[slices.leave(v)] = place
        region.constant = region.constant + jnp.sum(constant)
        for v, key in zip(self.keyed, keys, strict=True):
            region.keys[slices.leave(v)] = key[0]
        region.created += [slices.leave(v) for v in self.created]
        for f, table in zip(self.inner.factors, tables, strict=True):
            region.factors.append(slices.leave_factor(f, table))
        return [
            old if isinstance(old, Lost) else slices.leave_value(old, new)
            for old, new in zip(self.outs, outs, strict=True)
        ]


# --- the way in, and back ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entered:
    """An input of a vmap: its array, the table that one lane sees, and the axis that is mapped."""

    array: Any
    form: Table | None
    axis: int | None

    def value(self, part: Any) -> Any:
        """The input of one lane, from its slice of the array."""
        array = self.array if self.axis is None else part
        return array if self.form is None else self.form.like(array)


class _Slices:
    """Variables, values and factors on their way into one lane of a vmap, and back.

    Attributes:
        plate: the lanes.
        inside: for each variable with one copy for each lane, the variable that one lane sees.
        whole: the way back: the whole variable, and which of its plates runs along the lanes.
        promoted: for each variable made in one lane, the variable of all lanes.
    """

    def __init__(self, plate: Plate) -> None:
        self.plate = plate
        self.inside: dict[Variable, Variable] = {}
        self.whole: dict[Variable, tuple[Variable, int]] = {}
        self.promoted: dict[Variable, Variable] = {}

    def dying(self, ins: list[Any], body: Any, later: frozenset[Variable]) -> set[Variable]:
        """Variables that lanes with a scan read, and that nothing reads later. They can be summed out in the scan."""
        if not any(map(is_loop, open_jaxpr(body)[0].eqns)):
            return set()
        return {v for x in ins for v in axes_of(x) if v in self.inside and v not in later}

    def slice(self, variable: Variable, i: int) -> Variable:
        """One copy of a variable along its plate ``i``."""
        part = self.inside.get(variable)
        if part is None:
            plates = tuple(p for j, p in enumerate(variable.plates) if j != i)
            part = dataclasses.replace(variable, plates=plates)
            self.inside[variable], self.whole[part] = part, (variable, i)
            variable.plates[i].merge(self.plate)
        elif self.whole[part][1] != i:
            raise Entangled(
                f"two axes of copies of {variable.address!r} are mapped together: every copy meets every other"
            )
        return part

    def enter(self, x: Any, mapped: bool) -> Entered:
        """An input, as one lane sees it."""
        if not is_table(x):
            return Entered(x, None, 0 if mapped else None)
        axes: PlateAxes = {}
        forms: Forms = {}
        for v, places in x.axes.items():
            inside, rest = v, tuple(p - mapped for p in places)
            if mapped and 0 in places:
                i = places.index(0)
                inside = self.slice(v, i)
                rest = tuple(p - 1 for j, p in enumerate(places) if j != i)
            axes[inside] = rest
            if v in x.forms:
                forms[inside] = x.forms[v]
        return Entered(x.array, Table(x.array, axes, forms), len(x.axes) if mapped else None)

    def enter_factor(self, factor: Factor) -> tuple[Factor, int]:
        """A factor over copies along the lanes, as one lane sees it, and the axis of its table to map."""
        root = self.plate.root()
        variables = []
        for v in factor.variables:
            i = next((i for i, p in enumerate(v.plates) if p.root() is root), None)
            variables.append(v if i is None else self.slice(v, i))
        at = [p.root() for p in factor.plates].index(root)
        plates = tuple(p for j, p in enumerate(factor.plates) if j != at)
        return dataclasses.replace(factor, variables=tuple(variables), plates=plates), len(
            variables
        ) + at

    def leave(self, variable: Variable) -> Variable:
        """The variable of all lanes, from that of one lane."""
        if variable in self.whole:
            return self.whole[variable][0]
        if self.plate.size == 1:  # a single copy needs no plate
            return variable
        if variable not in self.promoted:
            plates = (self.plate, *variable.plates)
            self.promoted[variable] = dataclasses.replace(variable, plates=plates)
        return self.promoted[variable]

    def leave_value(self, old: Any, new: Any) -> Any:
        if not is_table(old):
            return new
        axes: PlateAxes = {}
        forms: Forms = {}
        for v, places in old.axes.items():
            outside, shifted = v, [p + 1 for p in places]
            if v in self.whole:
                outside, i = self.whole[v]
                shifted.insert(i, 0)
            elif v in self.promoted:
                outside = self.promoted[v]
                shifted.insert(0, 0)
            axes[outside] = tuple(shifted)
            if v in old.forms:
                forms[outside] = old.forms[v]
        return Table(jnp.moveaxis(new, 0, len(old.axes)), axes, forms)

    def leave_factor(self, factor: Factor, table: Any) -> Factor:
        mine = [v for v in factor.variables if v in self.whole or v in self.promoted]
        variables = tuple(self.leave(v) if v in mine else v for v in factor.variables)
        if self.plate.size == 1 or (factor.variables and not mine):
            return dataclasses.replace(factor, table=jnp.sum(table, 0))
        table = jnp.moveaxis(table, 0, len(variables))
        return dataclasses.replace(
            factor, table=table, variables=variables, plates=(self.plate, *factor.plates)
        )
