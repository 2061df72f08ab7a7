r"""The steps of a chain composed in a tree, in a depth of $O(\log T)$.

The factor of a single step, from the choices before it to those after it, is a matrix in the semiring. The product of
these matrices is associative (Hassan, Särkkä and García-Fernández 2021, "Temporal parallelization of inference in
hidden Markov models").
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.analysis.invariants import settled_slots

from .chain_state import State, Step, renamed
from .chain_steps import Steps
from .elimination import sum_out
from .factors import Factor, in_terms, less, multiply, ones, ordered, top_of
from .tables import Variable, variables_of


def in_a_tree(steps: Steps, state: State, start: int) -> tuple[State, Step]:
    """Take the steps from ``start`` on. Returns the state after the last, and what all steps leave behind."""
    slots = _slots(steps, state, start)
    links = _Links(steps, state, start, slots.treedef)
    axes = [0 if varying else None for varying in slots.varying]
    length = steps.length - start
    with steps.region.plan.limit.repeated(length):
        tables, stacked = jax.vmap(links.link, (axes, 0))(slots.before, steps.since(start))
    keys = stacked[-1]
    key = None if keys is None else keys[0]
    found = links.steps_found[-1].together(stacked)
    alpha, shifts = links.product(tables, length, key)
    found.others += shifts
    end = jax.tree.unflatten(slots.treedef, slots.after)
    after = state.carry().with_arrays((end, None, [], [])).slots
    return State(after, alpha, state.born), found


class _Links:
    """The factors of single steps, from the choices before a step (``old``) to those after it (``new``)."""

    def __init__(self, steps: Steps, state: State, start: int, treedef: Any) -> None:
        self.steps, self.state, self.start, self.treedef = steps, state, start, treedef
        self.old = list(state.born)
        self.new, self.middle = [[_again(v) for v in self.old] for _ in range(2)]
        self.by_label = dict(zip(state.labels(start).values(), self.new, strict=True))
        self.ages = state.labels(start + 1)
        self.steps_found: list[Step] = []
        self.forms: list[Factor] = []
        self.tops: list[Factor] = []

    def link(self, arrays: Any, x: Any) -> Any:
        """The table of one step, and what the step leaves behind."""
        slots = jax.tree.unflatten(self.treedef, arrays)
        bare = self.state.carry().with_arrays((slots, None, [], []))
        after, found = self.steps.advance(bare, self.start, x, link=True)
        later = after.labels(self.start + 1)
        names = {v: self.by_label[later[v]] for v in after.born if v not in self.state.born}
        for v, u in names.items():
            for p, q in zip(v.plates, u.plates, strict=True):
                p.merge(q)
        factors = [] if after.alpha is None else [in_terms(after.alpha, names)]
        scale = factors[0].scale if factors else None
        for v in self.old:  # a choice that only grows older is the same before and after
            if self.ages[v] in self.by_label:
                same = jnp.where(jnp.eye(v.num_values, dtype=bool), 0.0, -jnp.inf)
                factors.append(Factor(same, (v, self.by_label[self.ages[v]]), (), scale))
        factors += [ones(v, scale) for v in (*self.old, *self.new)]
        whole = multiply(factors)
        self.forms.append(whole)
        self.steps_found.append(found)
        return whole.table, found.arrays()

    def product(self, tables: Any, length: int, key: Any) -> tuple[Factor, list[Factor]]:
        """The factor after all links, and the factors taken out on the way."""
        limit, alpha = self.steps.region.plan.limit, self.state.alpha
        assert alpha is not None
        tables, top = jax.vmap(self._shifted)(tables)
        shifts, depth = [self._total(top)], 0

        def key_at(depth: int) -> Any:
            return None if key is None else jax.random.fold_in(key, 2**30 + depth)

        while length > 1:
            half, keys = length // 2, None
            if key is not None:
                keys = jax.random.split(key_at(depth), half)
            first, second = tables[: 2 * half : 2], tables[1 : 2 * half : 2]
            with limit.repeated(half):
                pairs, top = jax.vmap(self._composed)(first, second, keys)
            shifts.append(self._total(top))
            tables = jnp.concatenate([pairs, tables[2 * half :]])
            length, depth = length - half, depth + 1
        whole = dataclasses.replace(self.forms[-1], table=tables[0])
        alpha = self._summed([alpha, whole], self.old, key_at(depth))
        return in_terms(alpha, dict(zip(self.new, self.old, strict=True))), shifts

    def _composed(self, a: Any, b: Any, key: Any) -> Any:
        form = self.forms[-1]
        first = in_terms(
            dataclasses.replace(form, table=a), dict(zip(self.new, self.middle, strict=True))
        )
        second = in_terms(
            dataclasses.replace(form, table=b), dict(zip(self.old, self.middle, strict=True))
        )
        return self._shifted(ordered(self._summed([first, second], self.middle, key), form))

    def _shifted(self, table: Any) -> tuple[Any, Any]:
        """A table minus its largest entry, and that entry."""
        whole = dataclasses.replace(self.forms[-1], table=table)
        top = top_of(whole, (*self.old, *self.new))
        self.tops.append(top)
        return less(whole, top).table, top.table

    def _total(self, tops: Any) -> Factor:
        return dataclasses.replace(self.tops[-1], table=jnp.sum(tops, 0))

    def _summed(self, factors: list[Factor], variables: list[Variable], key: Any) -> Factor:
        plan = self.steps.region.plan
        keys = {
            v: None if key is None else jax.random.fold_in(key, i) for i, v in enumerate(variables)
        }
        return multiply(sum_out(factors, variables, plan.semiring, plan.limit, keys))


def _again(v: Variable) -> Variable:
    return Variable(v.address, v.num_values, v.plates)


@dataclasses.dataclass
class _Slots:
    """The slots of a carry before every step (stacked if ``varying``), and after the last step."""

    before: list[Any]
    varying: list[bool]
    after: list[Any]
    treedef: Any


def _slots(steps: Steps, state: State, start: int) -> _Slots:
    """The slots of the carry before every step. None of their choices is summed out on the way."""
    bare = state.carry()
    entry, treedef = jax.tree.flatten(bare.arrays()[0])

    def body(arrays: Any, x: Any) -> Any:
        before = bare.with_arrays((jax.tree.unflatten(treedef, arrays), None, [], []))
        after, _ = steps.advance(before, start, x, link=True)
        left = set(variables_of(after.slots))
        born = {v: t for v, t in after.born.items() if v in left}
        after = renamed(State(after.slots, None, born), bare, start)
        return jax.tree.leaves(after.arrays()[0]), arrays

    with steps.region.plan.limit.repeated(0):
        closed = jax.make_jaxpr(lambda a, x: body(a, x)[0])(entry, steps.at(0))
        varying = [not settled for settled in settled_slots(closed, entry, start)]
        if not any(varying):
            return _Slots(entry, varying, entry, treedef)
        after, before = jax.lax.scan(body, entry, steps.since(start), steps.length - start)
    before = [b if v else e for b, v, e in zip(before, varying, entry, strict=True)]
    return _Slots(before, varying, after, treedef)
