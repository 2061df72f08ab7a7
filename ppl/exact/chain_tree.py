r"""The steps of a chain composed in a tree, in a depth of $O(\log T)$.

For finite choices the factor of a single step, from the choices before it to those after it, is a matrix in the
semiring. The product of these matrices is associative (Hassan, Särkkä and García-Fernández 2021, "Temporal
parallelization of inference in hidden Markov models"). For normal choices a step is a ``Transition`` (Särkkä and
García-Fernández 2021, "Temporal parallelization of Bayesian smoothers"). No intermediate result is wanted: gradients
give everything else.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from weft.ppl.analysis.invariants import settled_slots

from .chain_state import State, Step, renamed
from .chain_steps import Steps
from .chain_transitions import arrays_of, groups_of, idle, with_arrays, with_unknowns
from .elimination import sum_out
from .factors import Factor, Scale, in_terms, less, multiply, ones, ordered, top_of
from .tables import Variable, variables_of


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
    whole = links.together(Part(linked, links.forms[-1]), length, key)
    end = jax.tree.unflatten(slots.treedef, slots.after)
    after = links.unknown.with_arrays((end, None, [], []))
    return links.finish(after, whole, found, key), found


class Part(NamedTuple):
    """Some steps as one, or several such parts: arrays, and of what form they are."""

    arrays: Any
    form: Any


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
        scale = factors[0].scale if factors else ()
        for v in self.old:  # a choice that only grows older is the same before and after
            if self.ages[v] in self.by_label:
                factors.append(_unchanged(v, self.by_label[self.ages[v]], scale))
        return multiply([*factors, *(ones(v, scale) for v in (*self.old, *self.new))])

    # --- many parts ---

    def together(self, parts: Part, length: int, key: Any) -> Part:
        """All parts as one. Neighbours are composed, in rounds of half as many each.

        Once their form has settled, several rounds are one loop over arrays of the same length, filled up with parts
        that do nothing. Otherwise every round would be compiled for itself.
        """
        depth = 0
        while length > 1:
            rounds, half = self._rounds(parts, length), (length + 1) // 2
            parts, keys = _filled(parts, 2 * half, self._idle(parts)), None
            if key is not None:
                keys = jax.random.fold_in(key, 2**30 + depth)
                keys = jax.random.split(keys, (rounds, half))
            if rounds == 1:
                parts = self._round(parts, None if keys is None else keys[0])
            else:
                parts = self._loop(parts, rounds, keys)
            length, depth = -(-length // 2**rounds), depth + 1
            parts = parts._replace(arrays=jax.tree.map(lambda x, n=length: x[:n], parts.arrays))
        return _first(parts)

    def _rounds(self, parts: Part, length: int) -> int:
        """How many rounds come next at once. More of them compose more parts that do nothing."""
        left = (length - 1).bit_length()
        if not self.groups or left < 3 or not self._settled(parts):
            return 1
        return left if left <= 6 else 3

    def _settled(self, parts: Part) -> bool:
        """Whether two of the parts make one of the same form."""
        one = _first(parts)
        with self.plan.limit.repeated(0):
            new = jax.eval_shape(
                lambda x: self.composed(Part(x, parts.form), Part(x, parts.form), None).arrays,
                one.arrays,
            )
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (one.arrays, new)]
        return shapes[0] == shapes[1]

    def _round(self, parts: Part, keys: Any) -> Part:
        """Every second part with the one after it."""
        form, forms = parts.form, []

        def pair(a: Any, b: Any, key: Any) -> Any:
            forms.append(self.composed(Part(a, form), Part(b, form), key))
            return forms[-1].arrays

        first, second = (jax.tree.map(lambda x, i=i: x[i::2], parts.arrays) for i in range(2))
        with self.plan.limit.repeated(_num(parts) // 2):
            arrays = jax.vmap(pair)(first, second, keys)
        return Part(arrays, forms[-1].form)

    def _loop(self, parts: Part, rounds: int, keys: Any) -> Part:
        """Some rounds. Those who have no neighbour any more are composed with parts that do nothing."""
        idle, num = self._idle(parts), _num(parts)

        def body(arrays: Any, keys: Any) -> Any:
            new = self._round(parts._replace(arrays=arrays), keys)
            return _filled(new, num, idle).arrays, None

        with self.plan.limit.repeated(rounds):
            arrays, _ = jax.lax.scan(body, parts.arrays, keys, rounds)
        return parts._replace(arrays=arrays)

    def _idle(self, parts: Part) -> Any:
        """The arrays of a part that does nothing."""
        tables, normal = _first(parts).arrays
        if tables is not None:
            form, size = parts.form[0]
            own = [_unchanged(v, u, form.scale) for v, u in zip(self.old, self.new, strict=True)]
            empty = dataclasses.replace(size, table=jnp.zeros_like(tables[1]))
            whole = multiply([*own, *(ones(v, form.scale) for v in form.variables), empty])
            tables = [ordered(whole, form).astype(form.table.dtype), jnp.zeros_like(tables[1])]
        return tables, [idle(x) for x in normal]

    # --- two parts ---

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

    def finish(self, after: State, whole: Part, found: Step, key: Any) -> State:
        """The state after all steps. What they leave behind besides goes to ``found``."""
        alpha, slots = self.state.alpha, list(after.slots)
        if alpha is not None:
            factor, size = _factors(whole)
            alpha = self._summed([alpha, factor], self.old, key)
            alpha = in_terms(alpha, dict(zip(self.new, self.old, strict=True)))
            found.others.append(size)
        carried = dataclasses.replace(self.state.carried, blocks={})
        for group, transition in zip(self.groups, _transitions(whole), strict=True):
            new, blocks, evidence = group.finish(transition)
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


def _unchanged(v: Variable, u: Variable, scale: Scale = ()) -> Factor:
    """The factor of a choice that is the same as another."""
    return Factor(jnp.where(jnp.eye(v.num_values, dtype=bool), 0.0, -jnp.inf), (v, u), (), scale)


def _num(parts: Part) -> int:
    return jax.tree.leaves(parts.arrays)[0].shape[0]


def _first(parts: Part) -> Part:
    return parts._replace(arrays=jax.tree.map(lambda x: x[0], parts.arrays))


def _filled(parts: Part, num: int, idle: Any) -> Part:
    """The parts, and others that do nothing after them."""

    def fill(x: jax.Array, more: jax.Array) -> jax.Array:
        more = jnp.broadcast_to(more, (num - x.shape[0], *x.shape[1:]))
        return jnp.concatenate([x, more.astype(x.dtype)]) if len(more) else x

    return parts._replace(arrays=jax.tree.map(fill, parts.arrays, idle))


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
