"""The rule of ``jax.vmap``: one lane is walked, with its own copies of everything that has one copy for each lane.

A choice that is drawn in a lane has one more plate outside the vmap, since there is one for each lane. A choice from
before the vmap of which every lane reads its own copy has one plate less inside.
"""

from __future__ import annotations

import dataclasses
import functools
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
    apply,
    axes_of,
    is_table,
    pieces,
    rebuilt,
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
    """How the walk of a lane begins: its operands, and what can be summed out in it.

    Attributes:
        slices: the way of variables into the lane.
        inputs: the operands.
        factors, evidence, priors: those of the region around that go into the lanes.
        dying: variables of a lane that nothing reads after the lanes.
        later: variables that are read after the lanes.
    """

    def __init__(
        self, region: Region, lane: Lane, body: Any, ins: list[Any], later: frozenset[Variable]
    ) -> None:
        self.region = region
        self.slices = slices = Slices(Plate(lane.size, f"the axis {lane.name or 'of a vmap'!r}"))
        self.inputs = [
            slices.enter(x, 0 if m else None) for x, m in zip(ins, lane.mapped, strict=True)
        ]
        dying = slices.dying(region, ins, body, later)
        self.factors = [f for f in region.factors if dying & set(f.variables)]
        region.factors = [f for f in region.factors if f not in self.factors]
        self.inner_factors = [slices.enter_factor(f) for f in self.factors]
        inside = [f for f in region.evidence if dying & set(f.variables)]
        region.evidence = [f for f in region.evidence if f not in inside]
        evidence = [f.without_unit(region.plan.limit) for f in inside]
        self.evidence = [(f, slices.enter_parts(f, f.plates)) for f in evidence]
        priors = [region.priors.pop(v) for v in dying if v.normal]
        self.priors = [(f, slices.enter_parts(f, f.variable.plates)) for f in priors]
        if any(v in slices.inside for x in self.inputs for v in axes_of(x.form)):
            error = Entangled(
                f"lanes of {slices.plate.name} read both their own copy of {addresses(slices.inside)} and all of them"
            )
            error.meeting = frozenset(v.address for v in slices.inside if v.normal)
            raise error
        self.placed = [v for v in slices.whole if slices.whole[v][0] in region.placements]
        self.dying = {slices.inside[v] for v in dying}
        self.later = frozenset(slices.inside.get(v, v) for v in later)

    def _entered(self) -> list[Entered]:
        return [*self.inputs, *(x for _, parts in (*self.evidence, *self.priors) for x in parts)]

    def arrays(self) -> Any:
        """Everything that differs between lanes."""
        placements = [self.region.placements[self.slices.whole[v][0]] for v in self.placed]
        arrays = [x.arrays for x in self._entered()]
        return arrays, [f.table for f in self.factors], placements

    def axes(self) -> Any:
        """The axes of these arrays along the lanes."""
        placements = [self.slices.whole[v][1] for v in self.placed]
        return [x.axes for x in self._entered()], [i for _, i in self.inner_factors], placements

    def lane(self, arrays: Any, index: Any) -> tuple[Region, list[Any]]:
        """The region of one lane, and its operands."""
        inputs, tables, placements = arrays
        around = self.region
        inner = Region(around.plan, around.kept, self.later)
        inner.factors = [
            dataclasses.replace(f, table=t)
            for (f, _), t in zip(self.inner_factors, tables, strict=True)
        ]
        values = iter([x.value(a) for x, a in zip(self._entered(), inputs, strict=True)])
        ins = [next(values) for _ in self.inputs]
        root = self.slices.plate.root()
        for f, parts in self.evidence:
            plates = tuple(p for p in f.plates if p.root() is not root)
            found = f.with_parts([next(values) for _ in parts])
            inner.evidence.append(dataclasses.replace(found, plates=plates))
        for f, parts in self.priors:
            part = self.slices.inside[f.variable]
            found = f.with_parts([next(values) for _ in parts])
            inner.priors[part] = dataclasses.replace(found, variable=part)
        for whole, part in self.slices.inside.items():
            key = around.keys.get(whole)
            inner.keys[part] = None if key is None else jax.random.fold_in(key, index)
        inner.placements = {**around.placements, **dict(zip(self.placed, placements, strict=True))}
        return inner, ins


class _End:
    """How the walk of a lane ends: its region, its outputs, and the variables made in it that are still there."""

    def __init__(self, inner: Region, outs: list[Any]) -> None:
        self.inner, self.outs = inner, outs
        inner.evidence = [f.without_unit(inner.plan.limit) for f in inner.evidence]
        left = {*variables_of(outs), *(v for f in inner.factors for v in f.variables)}
        left |= {v for f in inner.evidence for x, _ in f.parts() for v in axes_of(x)} | {
            *inner.priors
        }
        left |= {v for f in inner.priors.values() for x, _ in f.parts() for v in axes_of(x)}
        self.created = [v for v in inner.created if v in left]
        self.placed = [v for v in self.created if v in inner.placements]
        self.keyed = [v for v in self.created if inner.keys.get(v) is not None]
        self.values = [x for f in (*inner.evidence, *inner.priors.values()) for x, _ in f.parts()]

    def arrays(self) -> Any:
        """Everything that differs between lanes."""
        inner = self.inner
        outs = [[] if isinstance(x, Lost) else [a for a, _ in pieces(x)] for x in self.outs]
        keys = [inner.keys[v] for v in self.keyed]
        placements = [inner.placements[v] for v in self.placed]
        values = [[] if x is None else [a for a, _ in pieces(x)] for x in self.values]
        values = jax.tree.map(jnp.asarray, values)
        return outs, [f.table for f in inner.factors], values, inner.constant, keys, placements

    def leave(self, region: Region, slices: Slices, arrays: Any) -> list[Any]:
        """The outputs of all lanes, from arrays that lead with the lanes. The rest goes to the region around."""
        outs, tables, values, constant, keys, placements = arrays
        inner, one_copy = self.inner, slices.plate.size == 1
        for v, place in zip(self.placed, placements, strict=True):
            place = jax.tree.map(lambda x: x[0], place) if one_copy else place
            region.placements[slices.leave(v)] = place
        region.constant = region.constant + jnp.sum(constant)
        for v, key in zip(self.keyed, keys, strict=True):
            region.keys[slices.leave(v)] = key[0]
        region.created += [slices.leave(v) for v in self.created]
        for f, table in zip(inner.factors, tables, strict=True):
            region.factors.append(slices.leave_factor(f, table))
        left = iter(
            [
                None if old is None else slices.leave_value(old, new, one_copy)
                for old, new in zip(self.values, values, strict=True)
            ]
        )
        for f in inner.evidence:
            found = f.with_parts([next(left) for _ in f.parts()])
            plates = f.plates if one_copy else (slices.plate, *f.plates)
            region.evidence.append(dataclasses.replace(found, plates=plates))
        for v, f in inner.priors.items():
            whole, at = slices.whole.get(v, (slices.leave(v), 0))
            parts = [next(left) for _ in f.parts()]
            if at:
                limit = region.plan.limit
                move = functools.partial(jnp.moveaxis, source=0, destination=at)
                parts = [None if x is None else apply(move, limit, x) for x in parts]
            region.priors[whole] = dataclasses.replace(f.with_parts(parts), variable=whole)
        return [
            old if isinstance(old, Lost) else slices.leave_value(old, new)
            for old, new in zip(self.outs, outs, strict=True)
        ]


# --- the way in, and back ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entered:
    """A value on its way into a vmap: its arrays, the axes that are mapped, and the value as one lane sees it."""

    arrays: list[Any]
    axes: list[int | None]
    form: Any

    def value(self, arrays: list[Any]) -> Any:
        """The value in one lane, from its slices of the arrays."""
        return rebuilt(self.form, iter(arrays)) if arrays else None


class Slices:
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

    def dying(
        self, region: Region, ins: list[Any], body: Any, later: frozenset[Variable]
    ) -> set[Variable]:
        """Variables that lanes with a scan read, and that nothing reads later. They can be summed out in the scan."""
        if not any(map(is_loop, open_jaxpr(body)[0].eqns)):
            return set()
        found = {v for x in ins for v in axes_of(x) if v in self.inside and v not in later}
        found = {v for v in found if not v.normal or v in region.priors}
        while True:  # the prior of another choice reads it
            read = {v for f in region.priors.values() if f.variable not in found for v in f.parents}
            if not found & read:
                return found
            found -= read

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

    def enter(self, x: Any, at: int | None) -> Entered:
        """A value as one lane sees it. Its axis ``at`` is mapped."""
        found = pieces(x)
        axes = [None if at is None else lead + at for _, lead in found]
        return Entered([a for a, _ in found], axes, self._entered(x, at))

    def _entered(self, x: Any, at: int | None) -> Any:
        if not is_table(x):
            return x
        moved = {v: self._place(v, places, at) for v, places in axes_of(x).items()}
        axes = dict(moved[v] for v in x.axes)
        forms = {moved[v][0]: f for v, f in x.forms.items()}
        slopes = {}
        for v, slope in x.slopes.items():
            inside, places = moved[v]
            value = None if slope.value is None else self._entered(slope.value, at)
            slopes[inside] = slope._replace(value=value, places=places)
        return Table(x.array, axes, forms, slopes, x.curved)

    def _place(
        self, v: Variable, places: tuple[int, ...], at: int | None
    ) -> tuple[Variable, tuple[int, ...]]:
        """A variable as one lane sees it, and the places of its plates there."""
        if at is None:
            return v, places
        rest = tuple(p - (p > at) for p in places if p != at)
        return (self.slice(v, places.index(at)) if at in places else v), rest

    def enter_parts(self, f: Any, plates: tuple[Plate, ...]) -> list[Entered]:
        """The values of evidence or of a prior, over copies along the lanes, as one lane sees them."""
        at = [p.root() for p in plates].index(self.plate.root())
        return [_NOTHING if x is None else self.enter(x, at) for x, _ in f.parts()]

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

    def leave_value(self, old: Any, new: list[Any], drop: bool = False) -> Any:
        """A value of all lanes, from that of one and arrays that lead with the lanes; or of the only lane."""
        arrays = [
            a[0] if drop else jnp.moveaxis(a, 0, lead)
            for a, (_, lead) in zip(new, pieces(old), strict=True)
        ]
        return rebuilt(self._left(old, 0 if drop else 1), iter(arrays))

    def _left(self, old: Any, more: int) -> Any:
        if not is_table(old):
            return old
        axes: PlateAxes = {}
        for v, places in axes_of(old).items():
            shifted = [p + more for p in places]
            if v in self.whole and more:
                shifted.insert(self.whole[v][1], 0)
            elif v in self.promoted and more:
                shifted.insert(0, 0)
            axes[v] = tuple(shifted)

        def out(v: Variable) -> Variable:
            return self.whole[v][0] if v in self.whole else self.promoted.get(v, v)

        slopes = {
            out(v): s._replace(
                value=None if s.value is None else self._left(s.value, more), places=axes[v]
            )
            for v, s in old.slopes.items()
        }
        forms: Forms = {out(v): f for v, f in old.forms.items()}
        return Table(old.array, {out(v): axes[v] for v in old.axes}, forms, slopes, old.curved)

    def leave_factor(self, factor: Factor, table: Any) -> Factor:
        mine = [v for v in factor.variables if v in self.whole or v in self.promoted]
        variables = tuple(self.leave(v) if v in mine else v for v in factor.variables)
        if self.plate.size == 1 or (factor.variables and not mine):
            return dataclasses.replace(factor, table=jnp.sum(table, 0))
        table = jnp.moveaxis(table, 0, len(variables))
        return dataclasses.replace(
            factor, table=table, variables=variables, plates=(self.plate, *factor.plates)
        )


_NOTHING = Entered([], [], None)
