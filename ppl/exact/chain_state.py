"""What a chain is between two steps: the slots of its carry as tables, and the factor of the choices in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.records import Records

from .factors import Factor
from .families import Placement
from .tables import PlateAxes, Table, Variable, axes_of, is_table


@dataclasses.dataclass
class State:
    """A chain between two steps.

    Attributes:
        slots: the slots of the carry.
        alpha: the product of the factors that contain the chain's choices.
        born: the choices of the chain, and the step that made each.
        placements: the placements of the continuous choices.
    """

    slots: list[Any]
    alpha: Factor | None
    born: dict[Variable, int]
    placements: dict[Variable, Placement] = dataclasses.field(default_factory=dict)

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
            for x in self.slots
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
        """The arrays of the state: those of slots, factor and placements."""
        slots = [x.array if is_table(x) else x for x in self.slots]
        placements = [self.placements[v] for v in self.born if v in self.placements]
        return slots, None if self.alpha is None else self.alpha.table, placements

    def with_arrays(self, arrays: Any) -> State:
        """A state of the same form with other arrays."""
        slots = [
            x.like(a) if is_table(x) else a for a, x in zip(arrays[0], self.slots, strict=True)
        ]
        alpha = None if self.alpha is None else dataclasses.replace(self.alpha, table=arrays[1])
        placed = [v for v in self.born if v in self.placements]
        return State(slots, alpha, self.born, dict(zip(placed, arrays[2], strict=True)))

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
        constant: the density terms that are not factors.
        key: the key of a choice that it made, for draws.
    """

    ys: list[Any]
    records: Records
    others: list[Factor]
    constant: Any
    key: Any

    def arrays(self) -> Any:
        """Everything that differs between steps. Outputs that are tables are not stacked."""
        ys = [None if is_table(y) else y for y in self.ys]
        constant = None if isinstance(self.constant, float) else self.constant
        return ys, self.records, [f.table for f in self.others], constant, self.key

    def together(self, stacked: Any) -> Step:
        """What several steps of this form leave together, from their stacked arrays."""
        ys, records, tables, constants, keys = stacked
        return Step(
            [old if is_table(old) else new for old, new in zip(self.ys, ys, strict=True)],
            records,
            [
                dataclasses.replace(f, table=jnp.sum(t, 0))
                for f, t in zip(self.others, tables, strict=True)
            ],
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
    return State(slots, alpha, before.born, places)


def _rename(x: Any, names: dict[Variable, Variable]) -> Any:
    if not is_table(x):
        return x
    axes: PlateAxes = {names.get(v) or v: p for v, p in x.axes.items()}
    back = {v: i for i, v in enumerate(axes)}
    new = sorted(axes, key=lambda v: v.number)
    n = len(axes)
    array = jnp.transpose(x.array, [*(back[v] for v in new), *range(n, x.array.ndim)])
    forms = {names.get(v) or v: f for v, f in x.forms.items()}
    return Table(array, axes, forms)


def located(variable: Variable, place: Placement, alpha: Factor) -> Placement:
    """A placement whose guess of the choice is the mode of a factor. Other choices are at their first value."""
    if variable not in alpha.variables:
        return place
    table = jnp.moveaxis(alpha.table, alpha.variables.index(variable), -1)
    for _ in range(len(alpha.variables) - 1):
        table = table[0]
    own = [p.root() for p in variable.plates]
    left = [p.root() for p in alpha.plates]
    for i in reversed(range(len(left))):
        if left[i] not in own:
            table = jnp.take(table, 0, i)
    left = [p for p in left if p in own]
    table = jnp.transpose(table, [*(left.index(p) for p in own), len(own)])
    mode = variable.family.mode(variable.family.coefficients(table))
    return place._replace(mean=jax.lax.stop_gradient(mode))
