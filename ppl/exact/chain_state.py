"""What a chain is between two steps: the slots of its carry as tables, and the factor of the choices in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.records import Records

from .chain_laws import Carried
from .factors import Factor
from .families import Placement
from .lanes import Slices
from .normals import Evidence, without
from .tables import (
    Plate,
    PlateAxes,
    Table,
    Variable,
    affine,
    at_zero,
    axes_of,
    is_table,
    pieces,
    rebuilt,
    slopes_of,
)


@dataclasses.dataclass
class State:
    """A chain between two steps.

    Attributes:
        slots: the slots of the carry.
        alpha: the product of the factors that contain the chain's choices.
        born: the choices of the chain, and the step that made each.
        placements: the placements of the continuous choices that are not normal.
        carried: the law of the slots that depend on normal choices.
    """

    slots: list[Any]
    alpha: Factor | None
    born: dict[Variable, int]
    placements: dict[Variable, Placement] = dataclasses.field(default_factory=dict)
    carried: Carried = dataclasses.field(default_factory=Carried)

    def labels(self, step: int) -> dict[Variable, Any]:
        """For each choice of a step, what tells it apart: its size, its age, and its number among choices like it."""
        found: dict[Variable, Any] = {}
        seen: dict[Any, int] = {}
        for v, t in sorted(self.born.items(), key=lambda item: item[0].number):
            kind = v.num_values, v.family, tuple(p.size for p in v.plates), step - t
            seen[kind] = seen.get(kind, 0) + 1
            found[v] = (*kind, seen[kind])
        return found

    def pattern(self, step: int) -> Any:
        """What has to repeat: the choices that each slot and the factor depend on, by age, and along which axes."""
        label = self.labels(step)
        slots = tuple(
            frozenset((label.get(v, v), places) for v, places in axes_of(x).items())
            for x in (*self.slots, *self.carried.blocks.values())
        )
        if self.alpha is None:
            return slots, None
        alpha = self.alpha
        plates = frozenset(
            frozenset(
                (label.get(v, v), i)
                for v in alpha.variables
                for i, q in enumerate(v.plates)
                if q.root() is p
            )
            for p in {p.root() for p in alpha.plates}
        )
        return slots, (frozenset(label.get(v, v) for v in alpha.variables), plates)

    def arrays(self) -> Any:
        """The arrays of the state: those of slots, factor, placements and covariances."""
        slots = [[a for a, _ in pieces(self._without_own(i))] for i in range(len(self.slots))]
        placements = [self.placements[v] for v in self.born if v in self.placements]
        blocks = [[a for a, _ in pieces(x)] for x in self.carried.blocks.values()]
        return slots, None if self.alpha is None else self.alpha.table, placements, blocks

    def with_arrays(self, arrays: Any) -> State:
        """A state of the same form with other arrays."""
        slots = [self._with_own(i, a) for i, a in enumerate(arrays[0])]
        alpha = None if self.alpha is None else dataclasses.replace(self.alpha, table=arrays[1])
        placed = [v for v in self.born if v in self.placements]
        placements = dict(zip(placed, arrays[2], strict=True))
        known = self.carried.blocks.items()
        blocks = {k: rebuilt(x, iter(a)) for a, (k, x) in zip(arrays[3], known, strict=True)}
        carried = dataclasses.replace(self.carried, blocks=blocks)
        return State(slots, alpha, self.born, placements, carried)

    def _without_own(self, i: int) -> Any:
        """A slot without its slope by the variable for it, which is the same after each step."""
        return without(self.slots[i], [v for v in [self.carried.variables.get(i)] if v is not None])

    def _with_own(self, i: int, arrays: Sequence[Any]) -> Any:
        x, v = rebuilt(self._without_own(i), iter(arrays)), self.carried.variables.get(i)
        own = {} if v is None else {v: slopes_of(self.slots[i])[v]}
        return affine(at_zero(x), {**slopes_of(x), **own}, x.curved if is_table(x) else None)

    def widened(self, after: State) -> State:
        """The state with everything in which the state after it is more uncertain: so far that is certain.

        A slot may depend on new variables, whose slope is zero, and be uncertain itself, with covariance zero.
        """
        new = dict(after.carried.variables)
        slots = [_widened(x, y) for x, y in zip(self.slots, after.slots, strict=True)]
        blocks = {
            k: self.carried.blocks[k]
            if k in self.carried.blocks
            else jax.tree.map(jnp.zeros_like, _shape_of(x))
            for k, x in after.carried.blocks.items()
        }
        return dataclasses.replace(self, slots=slots, carried=Carried(new, blocks))

    def carry(self) -> State:
        """The state without its factor: only the slots."""
        return State(self.slots, None, self.born)


@dataclasses.dataclass
class Step:
    """What one step, or several together, leave behind in addition to the state.

    Attributes:
        ys: the outputs.
        records: the records of its sites.
        others: factors over choices that do not belong to the chain.
        evidence: the same for normal choices.
        constant: the density terms that are not factors.
        key: the key of a choice that it made, for draws.
    """

    ys: list[Any]
    records: Records
    others: list[Factor]
    evidence: list[Evidence]
    constant: Any
    key: Any

    def arrays(self) -> Any:
        """Everything that differs between steps. Outputs that are tables are not stacked."""
        ys = [None if is_table(y) else y for y in self.ys]
        constant = None if isinstance(self.constant, float) else self.constant
        parts = [x for f in self.evidence for x, _ in f.parts()]
        values = [[] if x is None else [jnp.asarray(a) for a, _ in pieces(x)] for x in parts]
        return ys, self.records, [f.table for f in self.others], values, constant, self.key

    def together(self, stacked: Any) -> Step:
        """What several steps of this form leave together, from their stacked arrays."""
        ys, records, tables, values, constants, keys = stacked
        steps = Slices(Plate(values[0][0].shape[0], "the steps of a scan")) if values else None
        left = iter(values)
        evidence = []
        for f in self.evidence:
            assert steps is not None
            parts = [(x, next(left)) for x, _ in f.parts()]
            new = [None if x is None else steps.leave_value(x, a) for x, a in parts]
            found = dataclasses.replace(f.with_parts(new), plates=(steps.plate, *f.plates))
            evidence.append(found)
        return Step(
            [old if is_table(old) else new for old, new in zip(self.ys, ys, strict=True)],
            records,
            [
                dataclasses.replace(f, table=jnp.sum(t, 0))
                for f, t in zip(self.others, tables, strict=True)
            ],
            evidence,
            0.0 if constants is None else jnp.sum(constants),
            None if keys is None else keys[-1],
        )


def renamed(after: State, before: State, step: int) -> State:
    """The state after a step, with each choice renamed to the choice of the same age in the state before it."""
    old = {label: v for v, label in before.labels(step).items()}
    names = {v: old[label] for v, label in after.labels(step + 1).items()}
    for new, v in names.items():
        for p, q in zip(v.plates, new.plates, strict=True):
            p.merge(q)
    slots = [_rename(x, names) for x in after.slots]
    alpha = after.alpha
    if alpha is not None and before.alpha is not None:
        variables = [names.get(v, v) for v in alpha.variables]
        own = [p.root() for p in alpha.plates]
        order = [variables.index(v) for v in before.alpha.variables]
        order += [len(variables) + own.index(p.root()) for p in before.alpha.plates]
        alpha = dataclasses.replace(before.alpha, table=jnp.transpose(alpha.table, order))
    places = {names[v]: place for v, place in after.placements.items() if v in names}
    known = before.carried.blocks
    blocks = {k: like(_rename(after.carried.blocks[k], names), x) for k, x in known.items()}
    slots = [like(x, y) for x, y in zip(slots, before.slots, strict=True)]
    carried = dataclasses.replace(before.carried, blocks=blocks)
    return State(slots, alpha, before.born, places, carried)


def like(x: Any, form: Any) -> Any:
    """A value with its slopes in the order of those of another, and its arrays of the same types."""
    if not is_table(x) or not x.slopes:
        dtype = form.dtype if is_table(form) else jnp.result_type(form)
        return x.like(x.array.astype(dtype)) if is_table(x) else jnp.asarray(x, dtype)
    slopes = {
        v: x.slopes[v]._replace(value=like(x.slopes[v].value, s.value))
        for v, s in form.slopes.items()
    }
    return affine(like(at_zero(x), at_zero(form)), slopes, x.curved)


def _widened(x: Any, after: Any) -> Any:
    """A value with slopes of zero by the normal choices that another one depends on besides."""
    slopes = dict(slopes_of(x))
    for v, slope in slopes_of(after).items():
        if v not in slopes:
            zero = (
                slope.value if slope.unit else jax.tree.map(jnp.zeros_like, _shape_of(slope.value))
            )
            slopes[v] = slope._replace(value=zero)
    return affine(at_zero(x), slopes)


def _shape_of(x: Any) -> Any:
    """An array of zeros as large as a value without the axes of a table."""
    return jnp.zeros(x.shape, x.dtype)


def _rename(x: Any, names: dict[Variable, Variable]) -> Any:
    if not is_table(x):
        return x
    if x.slopes:
        slopes = {v: s._replace(value=_rename(s.value, names)) for v, s in x.slopes.items()}
        return affine(_rename(at_zero(x), names), slopes, x.curved)
    axes: PlateAxes = {names.get(v) or v: p for v, p in x.axes.items()}
    back = {v: i for i, v in enumerate(axes)}
    new = sorted(axes, key=lambda v: v.number)
    n = len(axes)
    array = jnp.transpose(x.array, [*(back[v] for v in new), *range(n, x.array.ndim)])
    forms = {names.get(v) or v: f for v, f in x.forms.items()}
    return Table(array, axes, forms)
