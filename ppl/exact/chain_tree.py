r"""The steps of a chain composed in a tree, in a depth of $O(\log T)$.

For finite choices the factor of a single step, from the choices before it to those after it, is a matrix in the
semiring. The product of these matrices is associative (Hassan, Särkkä and García-Fernández 2021, "Temporal
parallelization of inference in hidden Markov models"). For normal choices a step is a ``Transition`` (Särkkä and
García-Fernández 2021, "Temporal parallelization of Bayesian smoothers"). No intermediate result is wanted: gradients
give everything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from weft.ppl.analysis.invariants import settled_slots

from .chain_state import State, Step, renamed
from .chain_steps import Steps
from .chain_transitions import arrays_of, groups_of, with_arrays, with_unknowns
from .elimination import sum_out
from .factors import Factor, in_terms, less, multiply, ones, ordered, top_of
from .tables import Limit, Variable, variables_of


def in_a_tree(steps: Steps, state: State, start: int) -> tuple[State, Step]:
    """Take the steps from ``start`` on. Returns the state after the last, and what all steps leave behind."""
    slots = _slots(steps, state, start)
    links = _Links(steps, state, start, slots.treedef)
    axes = [0 if varying else None for varying in slots.varying]
    length, limit = steps.length - start, steps.region.plan.limit
    with limit.repeated(length):
        linked, stacked = jax.vmap(links.link, (axes, 0))(slots.before, steps.since(start))
    keys = stacked[-1]
    found = links.steps_found[-1].together(stacked)
    key = None if keys is None else keys[0]
    parts = _in_pairs(links.composed, Part(linked, links.forms[-1]), length, limit, key)
    end = jax.tree.unflatten(slots.treedef, slots.after)
    after = links.unknown.with_arrays((end, None, [], []))
    return links.finish(after, parts, found, key), found


class Part(NamedTuple):
    """Some steps as one: its arrays, and of what form they are."""

    arrays: Any
    form: Any


def _in_pairs(
    compose: Callable[[Part, Part, Any], Part], parts: Part, length: int, limit: Limit, key: Any
) -> list[Part]:
    """Neighbours composed, and again, while there are two. Returns the few parts that are left, in order."""
    (arrays, form), left, depth = parts, [], 0
    while length > 1:
        half, keys, forms = length // 2, None, []
        if length % 2:
            left.append(Part(jax.tree.map(lambda x: x[-1], arrays), form))
        if key is not None:
            keys = jax.random.split(jax.random.fold_in(key, 2**30 + depth), half)

        def pair(a: Any, b: Any, key: Any, form: Any = form, forms: Any = forms) -> Any:
            forms.append(compose(Part(a, form), Part(b, form), key))
            return forms[-1].arrays

        first, second = (jax.tree.map(lambda x: x[i : 2 * half : 2], arrays) for i in (0, 1))
        with limit.repeated(half):
            arrays = jax.vmap(pair)(first, second, keys)
        form, length, depth = forms[-1].form, half, depth + 1
    return [Part(jax.tree.map(lambda x: x[0], arrays), form), *reversed(left)]


class _Links:
    """Single steps as parts, and parts as one.

    Finite choices have factors from those before a part (``old``) to those after it (``new``), and normal choices have
    transitions.
    """

    def __init__(self, steps: Steps, state: State, start: int, treedef: Any) -> None:
        self.steps, self.state, self.start, self.treedef = steps, state, start, treedef
        self.plan = steps.region.plan
        self.unknown = with_unknowns(state)
        self.groups = groups_of(state, self.plan)
        self.old = list(state.born)
        self.new, self.middle = [[_again(v) for v in self.old] for _ in range(2)]
        self.by_label = dict(zip(state.labels(start).values(), self.new, strict=True))
        self.ages = state.labels(start + 1)
        self.steps_found: list[Step] = []
        self.forms: list[Any] = []

    def link(self, arrays: Any, x: Any) -> Any:
        """The arrays of one step, and what the step leaves behind."""
        slots = jax.tree.unflatten(self.treedef, arrays)
        bare = self.unknown.with_arrays((slots, None, [], []))
        after, found = self.steps.advance(bare, self.start, x, link=True)
        normal = []
        for group in self.groups:
            mine = [f for f in found.evidence if set(group.variables) & set(f.variables)]
            found.evidence = [f for f in found.evidence if f not in mine]
            normal.append(group.step(after, mine))
        self.steps_found.append(found)
        part = self._part(self._factor(after) if self.old else None, normal)
        self.forms.append(part.form)
        return part.arrays, found.arrays()

    def _part(self, whole: Factor | None, normal: list[Any]) -> Part:
        shifted = None
        if whole is not None:
            top = top_of(whole, (*self.old, *self.new))
            shifted = less(whole, top), top
        tables = None if shifted is None else [f.table for f in shifted]
        return Part((tables, [*map(arrays_of, normal)]), (shifted, normal))

    def _factor(self, after: State) -> Factor:
        """The factor of one step."""
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
        return multiply([*factors, *(ones(v, scale) for v in (*self.old, *self.new))])

    def composed(self, a: Part, b: Part, key: Any) -> Part:
        """Two parts as one."""
        normal = [
            group.compose(x, y)
            for group, x, y in zip(self.groups, _transitions(a), _transitions(b), strict=True)
        ]
        if not self.old:
            return self._part(None, normal)
        (first, one), (second, two) = _factors(a), _factors(b)
        first = in_terms(first, dict(zip(self.new, self.middle, strict=True)))
        second = in_terms(second, dict(zip(self.old, self.middle, strict=True)))
        whole = self._summed([first, second], self.middle, key)
        whole = dataclasses.replace(_factors(a)[0], table=ordered(whole, _factors(a)[0]))
        part = self._part(whole, normal)
        part.arrays[0][1] = part.arrays[0][1] + one.table + two.table
        return part

    def finish(self, after: State, parts: list[Part], found: Step, key: Any) -> State:
        """The state after some parts. What they leave behind besides goes to ``found``."""
        alpha = self.state.alpha
        for i, part in enumerate(parts) if alpha is not None else ():
            whole, size = _factors(part)
            keys = None if key is None else jax.random.fold_in(key, 2**31 + i)
            alpha = self._summed([alpha, whole], self.old, keys)
            alpha = in_terms(alpha, dict(zip(self.new, self.old, strict=True)))
            found.others.append(size)
        slots, carried = list(after.slots), dataclasses.replace(self.state.carried, blocks={})
        for i, group in enumerate(self.groups):
            new, blocks, evidence = group.finish([_transitions(part)[i] for part in parts])
            slots = [new.get(i, x) for i, x in enumerate(slots)]
            carried.blocks.update(blocks)
            found.evidence += evidence
        return State(slots, alpha, self.state.born, {}, carried)

    def _summed(self, factors: list[Factor], variables: list[Variable], key: Any) -> Factor:
        keys = {
            v: None if key is None else jax.random.fold_in(key, i) for i, v in enumerate(variables)
        }
        return multiply(sum_out(factors, variables, self.plan.semiring, self.plan.limit, keys))


def _factors(part: Part) -> list[Factor]:
    """The factor of a part less its size, and the size."""
    tables, forms = part.arrays[0], part.form[0]
    return [dataclasses.replace(f, table=t) for f, t in zip(forms, tables, strict=True)]


def _transitions(part: Part) -> list[Any]:
    return [with_arrays(f, a) for f, a in zip(part.form[1], part.arrays[1], strict=True)]


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
    """The slots of the carry before every step. None of their choices is summed out on the way.

    Uncertain slots are unknowns, and the same before every step.
    """
    bare = with_unknowns(state)
    entry, treedef = jax.tree.flatten(bare.arrays()[0])

    def body(arrays: Any, x: Any) -> Any:
        before = bare.with_arrays((jax.tree.unflatten(treedef, arrays), None, [], []))
        after, _ = steps.advance(before, start, x, link=True)
        unknown = state.carried.variables
        slots = [before.slots[i] if i in unknown else x for i, x in enumerate(after.slots)]
        left = set(variables_of(slots))
        born = {v: t for v, t in after.born.items() if v in left}
        after = renamed(State(slots, None, born), bare, start)
        return jax.tree.leaves(after.arrays()[0]), arrays

    with steps.region.plan.limit.repeated(0):
        closed = jax.make_jaxpr(lambda a, x: body(a, x)[0])(entry, steps.at(0))
        varying = [not settled for settled in settled_slots(closed, entry, start)]
        if not any(varying):
            return _Slots(entry, varying, entry, treedef)
        after, before = jax.lax.scan(body, entry, steps.since(start), steps.length - start)
    before = [b if v else e for b, v, e in zip(before, varying, entry, strict=True)]
    return _Slots(before, varying, after, treedef)
