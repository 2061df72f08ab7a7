"""One step of a chain: a scan equation with tables as operands, and how a step of it changes the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.compat import Literal, scan_sizes
from weft.ppl.stage.interpreter import Context
from weft.ppl.stage.records import Records

from .chain_laws import fold, hand_on, unfold
from .chain_state import State, Step
from .choices import Weights
from .factors import Factor, multiply
from .filtered import filtered
from .region import Lost, Region, addresses
from .tables import (
    Entangled,
    PlateAxes,
    Table,
    Variable,
    axes_of,
    is_table,
    pieces,
    rebuilt,
    slopes_of,
    variables_of,
)


class Steps:
    """A scan equation with its operands, in the order of its steps.

    Attributes:
        squared: whether squares of its normal choices are asked for.
        orders: for each carried choice, the number of steps that it is carried for.
    """

    def __init__(self, region: Region, eqn: Any, ins: list[Any], context: Context) -> None:
        self.region, self.eqn, self.context = region, eqn, context
        num_consts, num_carry = scan_sizes(eqn.params)
        self.num_carry, self.length = num_carry, eqn.params["length"]
        self.body = eqn.params["jaxpr"]
        self.consts = ins[:num_consts]
        self.carry = ins[num_consts : num_consts + num_carry]
        self.xs = ins[num_consts + num_carry :]
        keys, given = context.only(context.names(self.body))
        weights = jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, Weights))
        self.squared = any(isinstance(w, Weights) and w.squares is not None for w in weights)
        self.orders: dict[str, int] = {}
        self.forms = [_one_step(x) for x in self.xs]
        arrays = [[jnp.moveaxis(a, lead, 0) for a, lead in pieces(x)] for x in self.xs]
        inputs = (arrays, keys, given)
        self.inputs = jax.tree.map(lambda a: a[::-1], inputs) if eqn.params["reverse"] else inputs

    def at(self, step: int) -> Any:
        """The inputs of one step."""
        return jax.tree.map(lambda a: a[step], self.inputs)

    def since(self, step: int) -> Any:
        """The inputs of this step and of all later ones."""
        return jax.tree.map(lambda a: a[step:], self.inputs)

    def advance(
        self, state: State, step: int, x: Any, pending: Sequence[Factor] = (), link: bool = False
    ) -> tuple[State, Step]:
        """One step of the recursion.

        Args:
            state: the state before the step.
            step: the number of the step.
            x: the inputs of the step.
            pending: other factors that contain choices of the state, besides the state's own factor.
            link: leave out the past. The factor after the step is then that of the step alone, and no past choice is
                summed out.
        """
        plan, (arrays, keys, given) = self.region.plan, x
        xs = [rebuilt(form, iter(a)) for a, form in zip(arrays, self.forms, strict=True)]
        # Choices read outside stay. Those of the chain are summed out as soon as no slot reads them.
        outside = frozenset(variables_of([*self.consts, *self.xs]))
        if link:  # scans and lanes within the step may not sum out the past either
            outside |= frozenset(state.born) | frozenset(variables_of(state.slots))
        inner = Region(plan, self.region.kept, outside)
        inner.keys = dict(self.region.keys)
        inner.placements = {**self.region.placements, **state.placements}
        inner.factors = [*pending] if state.alpha is None or link else [*pending, state.alpha]
        inside = self.context.inside(keys, given, self.context.anonymous, (None,))
        outs, records = inner.walk(self.body, [*self.consts, *state.slots, *xs], inside)
        inner.refuse_shared("a scan")
        slots, ys = outs[: self.num_carry], outs[self.num_carry :]
        inner.finish({v for v in inner.priors if not _reads(slots, v)}, frozenset(state.born))
        for v in inner.priors:  # the next step knows the slots only, so it is of order one
            self.orders[v.address] = max(self.orders.get(v.address, 0), 1)
        slots, carried = hand_on(inner, slots, set(inner.priors), state.carried)
        inner.settle()
        self._refuse_mixture(state, slots)
        made = [v for v in inner.created if not v.normal]
        born = {**state.born, **dict.fromkeys(made, step)}
        key = next((k for v in inner.created if (k := inner.keys.get(v)) is not None), None)
        for i, v in enumerate(state.born):
            if key is not None:  # else the step makes no choice, and these are from before the scan
                inner.keys[v] = jax.random.fold_in(key, i + 1)
        kept = set(variables_of(slots)) | (set(state.born) if link else set())
        entered = frozenset(v for v, t in state.born.items() if t < 0)
        inner.finish(set(born) - kept, entered)
        born = {v: t for v, t in born.items() if v in kept}
        if not link:
            self._note_orders(born, step)
        mine = [f for f in inner.factors if set(f.variables) & set(born)]
        others = [f for f in inner.factors if f not in mine]
        placements = {v: inner.placements[v] for v in born if v in inner.placements}
        alpha = multiply(mine) if mine else None
        if plan.filtering and alpha is not None:
            alpha = filtered(plan, alpha, born)
        after = State(slots, alpha, born, placements, carried)
        evidence = [f.without_unit(plan.limit) for f in inner.evidence]
        return after, Step(ys, records, others, evidence, inner.constant, key)

    def _refuse_mixture(self, state: State, slots: Sequence[Any]) -> None:
        """Refuse normal choices of a chain whose law depends on finite choices of the chain: it is a mixture."""
        mine = set(state.carried.variables.values())
        for x in slots:
            others = {v for v in axes_of(x) if v in state.born}
            if others and mine & slopes_of(x).keys():
                names = addresses([*others, *slopes_of(x)])
                raise Entangled(
                    f"{names} of a scan cannot be summed out together: the law of a normal choice given all values of "
                    "the others so far is a mixture that grows with each step; keep one of them as a choice"
                )

    def begin(self, region: Region, outside: set[Variable]) -> State:
        """The state before the first step."""
        slots, carried = fold(region, list(self.carry), outside)
        return State(slots, None, {}, {}, carried)

    def _note_orders(self, born: dict[Variable, int], step: int) -> None:
        """Note for how many steps the choices in a state were carried."""
        for v, t in born.items():
            if t >= 0:
                self.orders[v.address] = max(self.orders.get(v.address, 0), step + 1 - t)

    def settled(self, state: State) -> State:
        """The state with all slots uncertain that become so in the steps. So far their spread is zero."""
        while True:
            after = self.after(state, 0)
            wider = state.widened(after)
            same = wider.carried.variables.keys() == state.carried.variables.keys()
            slots = zip(wider.slots, state.slots, strict=True)
            if same and all(slopes_of(x).keys() == slopes_of(y).keys() for x, y in slots):
                return state
            state = wider

    def after(self, state: State, step: int, pending: Sequence[Factor] = ()) -> State:
        """The form of the state after one more step."""
        found: list[Any] = []

        def probe(state_arrays: Any, x: Any) -> Any:
            after, _ = self.advance(state.with_arrays(state_arrays), step, x, pending)
            found.append(after)
            return 0

        with self.region.plan.limit.repeated(0):
            jax.eval_shape(probe, state.arrays(), self.at(0))
        return found[0]

    def repeats(self, state: State, step: int) -> bool:
        """Whether one more step would leave the pattern of dependences unchanged."""
        after = self.after(state, step)
        if after.pattern(step + 1) != state.pattern(step):
            return False
        if state.alpha is None or after.alpha is None:
            return True
        return after.alpha.table.dtype == state.alpha.table.dtype

    def collect(
        self, state: State, first: list[Step], rest: list[Step]
    ) -> tuple[list[Any], Records]:
        """The outputs of the scan. Everything else that the steps left behind goes to the region around the scan.

        Args:
            state: the state after the last step.
            first: the steps that were taken one by one.
            rest: the remaining steps together, if there are any.
        """
        region = self.region
        for found in (*first, *rest):
            region.factors += found.others
            region.evidence += found.evidence
            region.constant = region.constant + found.constant
        if state.alpha is not None:
            region.factors.append(state.alpha)
        key = next((f.key for f in (*rest, *reversed(first)) if f.key is not None), None)
        for i, v in enumerate(state.born):
            if key is not None:
                region.keys[v] = jax.random.fold_in(key, 2**31 + i)
            if v in state.placements:
                region.placements[v] = state.placements[v]
            if v not in region.created:
                region.created.append(v)
        avals = [v.aval for v in self.eqn.outvars[self.num_carry :]]
        slots = unfold(region, state.slots, state.carried, self._read())
        if not first and not rest:  # a scan of no steps
            return [*slots, *(jnp.zeros(a.shape, a.dtype) for a in avals)], {}
        ys = [
            self._stacked_output(i, [s.ys[i] for s in first], [s.ys[i] for s in rest])
            for i in range(len(avals))
        ]
        records = self._stacked([s.records for s in first], [s.records for s in rest])
        return [*slots, *ys], records

    def _read(self) -> set[int]:
        """The slots that something reads after the scan."""
        frame = self.context.frame
        assert frame is not None
        read = {
            v
            for e in frame.jaxpr.eqns[frame.at + 1 :]
            for v in e.invars
            if not isinstance(v, Literal)
        }
        read |= {v for v in frame.jaxpr.outvars if not isinstance(v, Literal)}
        return {i for i, v in enumerate(self.eqn.outvars[: self.num_carry]) if v in read}

    def _stacked_output(self, i: int, parts: list[Any], rest: list[Any]) -> Any:
        lost = variables_of([*parts, *rest])
        if not lost:
            return self._stacked(parts, rest)
        names = " and ".join(dict.fromkeys(repr(u.address) for u in lost))
        return Lost(
            f"output {i} of a scan is stacked from values that depend on {names}, which is summed out step "
            "by step: use them inside the step (observe there), or get them back with recover"
        )

    def _stacked(self, parts: list[Any], rest: list[Any]) -> Any:
        """The values of single steps, joined with the stacked values of all other steps before or after them."""
        joined = rest[0] if rest else None
        if parts:
            joined = jax.tree.map(lambda *a: jnp.stack(a), *parts)
        if parts and rest:
            joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), joined, rest[0])
        return jax.tree.map(lambda a: a[::-1], joined) if self.eqn.params["reverse"] else joined


def _reads(xs: Sequence[Any], v: Variable) -> bool:
    return any(v in slopes_of(x) for x in xs)


def _one_step(x: Any) -> Any:
    """A value as one step of the scan sees it."""
    if not is_table(x):
        return x
    moved: PlateAxes = {}
    for v, places in axes_of(x).items():
        if 0 in places:
            error = Entangled(
                f"a scan goes along the axis of the copies of {v.address!r}, so that its carry may gather "
                f"them; sample {v.address!r} inside the scan's step"
            )
            error.meeting = frozenset({v.address} if v.normal else ())
            raise error
        moved[v] = tuple(p - 1 for p in places)
    slopes = {
        v: s._replace(value=None if s.value is None else _one_step(s.value), places=moved[v])
        for v, s in x.slopes.items()
    }
    return Table(x.array, {v: moved[v] for v in x.axes}, x.forms, slopes, x.curved)
