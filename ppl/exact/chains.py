r"""Choices in a scan, summed out as a Markov chain: the forward recursion.

A choice $z_t$ of step $t$ reaches later steps through the carry. Each slot of the carry is a table over the choices
that it depends on; when the pattern of these dependences repeats from step to step, say each slot reads at most the
last $m$ choices, the chain has order $m$, and

$$\alpha_t(z_{t-m+1:t}) = \log \sum_{z_{t-m}} \exp\left(\alpha_{t-1}(z_{t-m:t-1}) + f_t(z_{t-m:t})\right)$$

with $f_t$ the sum of the density terms of the step (Rabiner 1989, eq. 20, in logarithms). Any function of the last
choices may be carried; a slot that keeps gathering them (a running sum) never repeats, and is refused. What no choice
reaches runs once, as in any scan. With ``parallel`` the steps are composed in a tree (Hassan, Särkkä and
García-Fernández 2021, "Temporal parallelization of inference in hidden Markov models").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.analysis.constants import folded, known_integers
from weft.ppl.stage.compat import Literal, Tracer, bind, open_jaxpr, scan_sizes
from weft.ppl.stage.interpreter import Context, Records

from .elimination import Factor, multiply, sum_out
from .tables import Axes, Entangled, Lifted, Variable, axes_of, is_lifted, variables_of

if TYPE_CHECKING:
    from .marginalize import Level, Place

MAX_ORDER = 4
"""Steps tried before a chain is said to have no order."""


@dataclasses.dataclass
class _State:
    """Between two steps: the carry, the product of the factors that the chain's choices stand in, and their ages."""

    slots: list[Any]
    alpha: Factor | None
    born: dict[Variable, int]  # choices of the chain, by the step that made them
    places: dict[Variable, Place] = dataclasses.field(default_factory=dict)  # of continuous ones

    def labels(self, step: int) -> dict[Variable, Any]:
        """What tells a choice among those of one step: its size, its age, and which of several it is."""
        found: dict[Variable, Any] = {}
        seen: dict[Any, int] = {}
        for v, t in sorted(self.born.items(), key=lambda item: item[0].number):
            kind = v.num_values, v.family, tuple(p.size for p in v.plates), step - t
            seen[kind] = seen.get(kind, 0) + 1
            found[v] = (*kind, seen[kind])
        return found

    def pattern(self, step: int) -> Any:
        """What has to repeat: which choices each slot and the factor depend on, by age, and along which axes."""
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


@dataclasses.dataclass
class _Step:
    """What one step leaves behind, besides the state."""

    ys: list[Any]
    records: Records
    others: list[Factor]  # over choices that are not the chain's
    constant: Any
    key: Any


def chain(
    level: Level, eqn: Any, ins: list[Any], context: Context, live: frozenset[Variable]
) -> tuple[list[Any], Records]:
    """Outputs and records of a scan whose sites depend on choices that are summed out."""
    plan, known = level.plan, set(level.plan.rules)
    scan = _Scan(level, eqn, ins, context)
    length = eqn.params["length"]
    outside = {v for x in (*scan.consts, *scan.xs) for v in axes_of(x)} | live
    entering = {v for v in variables_of(scan.carry) if v not in outside}
    state = _State(list(scan.carry), None, dict.fromkeys(entering, -1))
    pending = [f for f in level.factors if entering & set(f.variables)]
    level.factors = [f for f in level.factors if f not in pending]
    if plan.filtering and pending:
        born = dict.fromkeys(entering, -1)
        pending = [scan.filtered(multiply(pending), born, level)]
    begun = None
    if len(pending) == 1 and length and all(v.family is None for v in entering):
        begun = _State(state.slots, pending[0], state.born)
        if scan.repeats(begun, 0):  # the choice before the scan is one like those in it
            state, pending = begun, []
    first: list[_Step] = []
    step = 0
    while step < length:
        if not pending and (state is begun or scan.repeats(state, step)):
            break
        if step > MAX_ORDER:
            raise Entangled(_no_order(scan, state, step))
        state, found = scan.advance(state, step, scan.at(step), pending)
        pending = []
        first.append(found)
        step += 1
    level.factors += pending
    rest: list[_Step] = []
    parallel = plan.options.parallel and state.alpha is not None and not state.places
    parallel = parallel and not plan.filtering
    if step < length:
        run = scan.parallel if parallel else scan.loop
        state, found = run(state, step)
        rest = [found]
    for address in plan.rules.keys() - known:
        rule = plan.rules[address]
        if rule.chain is None:
            order = scan.orders.get(address, 0)
            rule.chain = order, length, parallel and order > 0
    return scan.collect(state, first, rest, context)


@dataclasses.dataclass
class _Carries:
    """Slots of a carry: before every step (stacked where ``varying``), and after the last."""

    before: list[Any]
    varying: list[bool]
    after: list[Any]


class _Scan:
    """A scan equation with its operands, in the order of its steps."""

    def __init__(self, level: Level, eqn: Any, ins: list[Any], context: Context) -> None:
        self.level, self.eqn, self.context = level, eqn, context
        num_consts, num_carry = scan_sizes(eqn.params)
        self.num_carry, self.length = num_carry, eqn.params["length"]
        self.body = eqn.params["jaxpr"]
        self.consts = ins[:num_consts]
        self.carry = ins[num_consts : num_consts + num_carry]
        self.xs = ins[num_consts + num_carry :]
        self.keys, self.given = context.only(context.names(self.body))
        self.orders: dict[str, int] = {}  # of choices that are carried, how many steps
        arrays: list[Any] = []
        self.lifted: list[Lifted | None] = []
        for x in self.xs:
            if not is_lifted(x):
                arrays.append(x)
                self.lifted.append(None)
                continue
            for v, places in x.axes.items():
                if 0 in places:
                    raise Entangled(
                        f"a scan goes along the axis of the copies of {v.address!r}, so that its carry may gather "
                        f"them; sample {v.address!r} inside the scan's step"
                    )
            arrays.append(jnp.moveaxis(x.array, len(x.axes), 0))
            axes = {v: tuple(p - 1 for p in places) for v, places in x.axes.items()}
            self.lifted.append(Lifted(x.array, axes, x.forms))
        inputs = (arrays, self.keys, self.given)
        self.inputs = jax.tree.map(lambda a: a[::-1], inputs) if eqn.params["reverse"] else inputs

    def at(self, step: int) -> Any:
        return jax.tree.map(lambda a: a[step], self.inputs)

    def advance(
        self, state: _State, step: int, x: Any, pending: Sequence[Factor] = (), link: bool = False
    ) -> tuple[_State, _Step]:
        """One step of the recursion; with ``link``, the factor of the step alone, nothing of the past summed out."""
        from .marginalize import Level, _only_here

        arrays, keys, given = x
        xs = [
            a if lifted is None else lifted.like(a)
            for a, lifted in zip(arrays, self.lifted, strict=True)
        ]
        level = Level(self.level.plan)
        level.keys = dict(self.level.keys)
        level.places = {**self.level.places, **state.places}
        level.factors = [*pending] if state.alpha is None or link else [*pending, state.alpha]
        inside = self.context.inside(keys, given, self.context.anonymous, (None,))
        # All that is read outside stays; the choices of the chain go as soon as no slot reads them.
        live = frozenset(variables_of([*self.consts, *self.xs]))
        outs, records = level.walk(self.body, [*self.consts, *state.slots, *xs], inside, live)
        _only_here(level, "a scan")
        slots, ys = outs[: self.num_carry], outs[self.num_carry :]
        born = {**state.born, **dict.fromkeys(level.created, step)}
        key = next((k for v in level.created if (k := level.keys.get(v)) is not None), None)
        kept = set(variables_of(slots)) | (set(state.born) if link else set())
        for i, v in enumerate(state.born):
            level.keys[v] = None if key is None else jax.random.fold_in(key, i + 1)
        entered = frozenset(v for v, t in state.born.items() if t < 0)
        level.finish(set(born) - kept, entered)
        born = {v: t for v, t in born.items() if v in kept}
        for v, t in born.items():
            if t >= 0 and not link:
                self.orders[v.address] = max(self.orders.get(v.address, 0), step + 1 - t)
        places = {v: level.places[v] for v in born if v in level.places}
        mine = [f for f in level.factors if set(f.variables) & set(born)]
        others = [f for f in level.factors if f not in mine]
        alpha = multiply(mine) if mine else None
        if alpha is not None and not link:
            places = {v: _located(v, place, alpha) for v, place in places.items()}
        if self.level.plan.filtering and alpha is not None:
            alpha = self.filtered(alpha, born, level)
        after = _State(slots, alpha, born, places)
        return after, _Step(ys, records, others, level.constant, key)

    def filtered(self, alpha: Factor, born: dict[Variable, int], level: Level) -> Factor:
        """The same, but that its derivative is the posterior given the steps so far, whatever comes later.

        Of choices outside of the chain that it depends on it is the posterior given everything.
        """
        axes = tuple(i for i, v in enumerate(alpha.variables) if v in born)
        rest = [v for v in alpha.variables if v not in born]
        plan = level.plan
        # Of no matter to a derivative; the true ones would be tracers that the rule below must not hold.
        scales = {v: np.zeros([p.size for p in v.plates]) for v in level.places}
        seen: list[Factor] = []

        def total(table: Any) -> Any:
            whole = dataclasses.replace(alpha, table=table)
            with plan.limit.repeated(0):
                left = sum_out([whole], born, plan.reduce, plan.limit, {}, scales)
            seen.append(multiply(left))
            return seen[-1].table

        @jax.custom_vjp
        def stop(table: Any) -> Any:
            return table

        def backward(table: Any, cotangent: Any) -> Any:
            _, pull = jax.vjp(total, table)
            # Along plates that were multiplied up, what others weigh is the same everywhere.
            own = [p.root() for p in seen[-1].plates]
            labels = [*rest, *(p.root() for p in alpha.plates)]
            weight = jnp.sum(cotangent, axes)
            for i in reversed(range(len(rest), len(labels))):
                if labels[i] not in own:
                    weight = jnp.take(weight, 0, i)
                    del labels[i]
            return pull(
                jnp.transpose(weight, [labels.index(a) for a in [*seen[-1].variables, *own]])
            )

        stop.defvjp(lambda table: (table, table), backward)
        return dataclasses.replace(alpha, table=stop(alpha.table))

    def repeats(self, state: _State, step: int) -> bool:
        """Whether one more step would leave the pattern of dependences as it is."""
        found: list[Any] = []

        def probe(state_arrays: Any, x: Any) -> Any:
            after, _ = self.advance(_with_arrays(state, state_arrays), step, x)
            found.append(after)
            return 0

        with self.level.plan.limit.repeated(0):
            jax.eval_shape(probe, _arrays(state), self.at(0))
        (after,) = found
        if after.pattern(step + 1) != state.pattern(step):
            return False
        return state.alpha is None or after.alpha.table.dtype == state.alpha.table.dtype

    def loop(self, state: _State, start: int) -> tuple[_State, _Step]:
        """The remaining steps, one after the other."""
        seen: dict[str, Any] = {}
        shift = None if state.alpha is None else _top(state.alpha, state.born)
        zero = None if shift is None else jnp.zeros_like(shift.table)

        def body(carry: Any, x: Any) -> Any:
            arrays, shifts = carry
            before = _with_arrays(state, arrays)
            after, found = self.advance(before, start, x)
            after = _renamed(after, state, start)
            if before.alpha is not None and after.alpha is not None:
                # Less what it had grown to a step ago: in single precision it would drift away.
                top = _top(before.alpha, state.born)
                after.alpha = _less(after.alpha, top)
                shifts = _add(shifts, top.table)
            seen["step"] = found
            ys = [None if is_lifted(y) else y for y in found.ys]
            tables = [f.table for f in found.others]
            constant = None if isinstance(found.constant, float) else found.constant
            return (_arrays(after), shifts), (ys, found.records, tables, constant, found.key)

        inputs = jax.tree.map(lambda a: a[start:], self.inputs)
        with self.level.plan.limit.repeated(self.length - start):
            (arrays, shifts), (ys, records, tables, constants, keys) = _scan_without_invariants(
                body,
                (_arrays(state), (zero, zero)),
                inputs,
                self.length - start,
                start,
                self.eqn.params["unroll"],
            )
        step: _Step = seen["step"]
        others = _summed_over_steps(step.others, tables)
        if shift is not None:
            others.append(dataclasses.replace(shift, table=shifts[0]))
        constant = 0.0 if constants is None else jnp.sum(constants)
        ys = [old if is_lifted(old) else new for old, new in zip(step.ys, ys, strict=True)]
        key = None if keys is None else keys[-1]
        return _with_arrays(state, arrays), _Step(ys, records, others, constant, key)

    def parallel(self, state: _State, start: int) -> tuple[_State, _Step]:
        """The remaining steps at once: the factor of each, then their product in a tree."""
        slots, xs = self.carries(state, start)
        old = list(state.born)
        new = [Variable(v.address, v.num_values, v.plates) for v in old]
        by_label = dict(zip(state.labels(start).values(), new, strict=True))
        ages = state.labels(start + 1)
        seen: dict[str, Any] = {}

        def link(arrays: Any, x: Any) -> Any:
            """The factor of one step, from the choices before it (old) to those after it (new)."""
            after, found = self.advance(
                _with_arrays(_State(state.slots, None, state.born), (arrays, None, [])),
                start,
                x,
                link=True,
            )
            later = after.labels(start + 1)
            names = {v: by_label[later[v]] for v in after.born if v not in state.born}
            for v, u in names.items():
                for p, q in zip(v.plates, u.plates, strict=True):
                    p.merge(q)
            mine = [] if after.alpha is None else [after.alpha]
            factors = [
                dataclasses.replace(f, variables=tuple(names.get(v, v) for v in f.variables))
                for f in mine
            ]
            scale = factors[0].scale if factors else None
            for v in old:  # what only grows older is the same before and after
                if ages[v] in by_label:
                    same = jnp.where(jnp.eye(v.num_values, dtype=bool), 0.0, -jnp.inf)
                    factors.append(Factor(same, (v, by_label[ages[v]]), (), scale))
            for v in (*old, *new):
                factors.append(_ones(v, scale))
            seen["link"], seen["step"] = multiply(factors), found
            ys = [None if is_lifted(y) else y for y in found.ys]
            tables = [f.table for f in found.others]
            return seen["link"].table, (ys, found.records, tables, found.constant, found.key)

        in_axes = [0 if varying else None for varying in slots.varying]
        limit = self.level.plan.limit
        with limit.repeated(self.length - start):
            links, (ys, records, tables, constants, keys) = jax.vmap(link, (in_axes, 0))(
                slots.before, xs
            )
        form: Factor = seen["link"]
        middle = [Variable(v.address, v.num_values, v.plates) for v in old]
        own_key = None if keys is None else keys[0]
        shifts: list[Factor] = []

        def shifted(table: Any) -> tuple[Any, Any]:
            whole = dataclasses.replace(form, table=table)
            seen["shift"] = top = _top(whole, (*old, *new))
            return _less(whole, top).table, top.table

        def compose(a: Any, b: Any, key: Any) -> Any:
            first = _in_terms(
                dataclasses.replace(form, table=a), dict(zip(new, middle, strict=True))
            )
            second = _in_terms(
                dataclasses.replace(form, table=b), dict(zip(old, middle, strict=True))
            )
            table = self._summed([first, second], middle, key)
            return shifted(_ordered(table, form))

        n = self.length - start
        depth = 0
        links, top = jax.vmap(shifted)(links)
        shifts.append(dataclasses.replace(seen["shift"], table=jnp.sum(top, 0)))
        while n > 1:
            half, key = n // 2, None
            if own_key is not None:
                key = jax.random.split(jax.random.fold_in(own_key, 2**30 + depth), half)
            with limit.repeated(half):
                pairs, top = jax.vmap(compose)(links[: 2 * half : 2], links[1 : 2 * half : 2], key)
            shifts.append(dataclasses.replace(seen["shift"], table=jnp.sum(top, 0)))
            links = jnp.concatenate([pairs, links[2 * half :]])
            n, depth = n - half, depth + 1
        assert state.alpha is not None
        key = None if own_key is None else jax.random.fold_in(own_key, 2**30 + depth)
        whole = dataclasses.replace(form, table=links[0])
        alpha = self._summed([state.alpha, whole], old, key)
        alpha = _in_terms(alpha, dict(zip(new, old, strict=True)))
        step: _Step = seen["step"]
        others = _summed_over_steps(step.others, tables)
        ys = [y if is_lifted(y) else stacked for y, stacked in zip(step.ys, ys, strict=True)]
        last = None if keys is None else keys[-1]
        bare = _State(state.slots, None, state.born)
        end = _State(_with_arrays(bare, (slots.after, None, [])).slots, alpha, state.born)
        return end, _Step(ys, records, [*others, *shifts], jnp.sum(constants), last)

    def _summed(self, factors: list[Factor], variables: list[Variable], key: Any) -> Factor:
        plan = self.level.plan
        keys = {
            v: None if key is None else jax.random.fold_in(key, i) for i, v in enumerate(variables)
        }
        return multiply(sum_out(factors, variables, plan.reduce, plan.limit, keys))

    def carries(self, state: _State, start: int) -> tuple[_Carries, Any]:
        """The slots of the carry before every remaining step; no choice of theirs is summed out on the way."""
        with self.level.plan.limit.repeated(0):
            return self._carries(state, start)

    def _carries(self, state: _State, start: int) -> tuple[_Carries, Any]:
        xs = jax.tree.map(lambda a: a[start:], self.inputs)
        bare = _State(state.slots, None, state.born)
        entry = _arrays(bare)[0]

        def body(arrays: Any, x: Any) -> Any:
            after, _ = self.advance(_with_arrays(bare, (arrays, None, [])), start, x, link=True)
            left = set(variables_of(after.slots))
            born = {v: t for v, t in after.born.items() if v in left}
            after = _renamed(_State(after.slots, None, born), bare, start)
            return _arrays(after)[0], arrays

        closed = jax.make_jaxpr(lambda a, x: body(a, x)[0])(entry, self.at(0))
        varying = [not settled for settled in _settled(closed, entry, start)]
        if not any(varying):
            return _Carries(entry, varying, entry), xs
        after, before = jax.lax.scan(body, entry, xs, self.length - start)
        before = [b if v else e for b, v, e in zip(before, varying, entry, strict=True)]
        return _Carries(before, varying, after), xs

    def collect(
        self, state: _State, first: list[_Step], rest: list[_Step], context: Context
    ) -> tuple[list[Any], Records]:
        """The outputs of the scan; what the steps found goes to the level it stands in."""
        from .marginalize import Lost

        level = self.level
        for found in (*first, *rest):
            level.factors += found.others
            level.constant = level.constant + found.constant
        if state.alpha is not None:
            level.factors.append(state.alpha)
        key = next((f.key for f in (*rest, *reversed(first)) if f.key is not None), None)
        for i, v in enumerate(state.born):
            level.keys[v] = None if key is None else jax.random.fold_in(key, 2**31 + i)
            if v in state.places:
                level.places[v] = state.places[v]
            if v not in level.created:
                level.created.append(v)
        flip = self.eqn.params["reverse"]

        def stack(parts: list[Any], done: list[Any]) -> Any:
            if not parts:
                joined = done[0]
            else:
                stacked = jax.tree.map(lambda *a: jnp.stack(a), *parts)
                joined = (
                    jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stacked, done[0])
                    if done
                    else stacked
                )
            return jax.tree.map(lambda a: a[::-1], joined) if flip else joined

        ys: list[Any] = []
        for i, v in enumerate(self.eqn.outvars[self.num_carry :]):
            parts, done = [s.ys[i] for s in first], [s.ys[i] for s in rest]
            lost = variables_of([*parts, *done])
            if lost:
                names = " and ".join(dict.fromkeys(repr(u.address) for u in lost))
                ys.append(
                    Lost(
                        f"output {i} of a scan is stacked from values that depend on {names}, which is summed out step "
                        "by step: use them inside the step (observe there), or get them back with recover"
                    )
                )
            elif not parts and not done:
                ys.append(jnp.zeros(v.aval.shape, v.aval.dtype))
            else:
                ys.append(stack(parts, done))
        if not first and not rest:  # a scan of no steps
            return [*state.slots, *ys], {}
        return [*state.slots, *ys], stack([s.records for s in first], [s.records for s in rest])


def _summed_over_steps(factors: list[Factor], tables: list[Any]) -> list[Factor]:
    return [
        dataclasses.replace(f, table=jnp.sum(t, 0)) for f, t in zip(factors, tables, strict=True)
    ]


def _add(total: tuple[Any, Any], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A running sum and what rounding has taken from it (Kahan 1965)."""
    x = x - total[1]
    new = total[0] + x
    return new, (new - total[0]) - x


# --- states as arrays, and back ---------------------------------------------------------------------------------------


def _arrays(state: _State) -> Any:
    slots = [x.array if is_lifted(x) else x for x in state.slots]
    places = [state.places[v] for v in state.born if v in state.places]
    return slots, None if state.alpha is None else state.alpha.table, places


def _with_arrays(state: _State, arrays: Any) -> _State:
    slots = [x.like(a) if is_lifted(x) else a for a, x in zip(arrays[0], state.slots, strict=True)]
    alpha = None if state.alpha is None else dataclasses.replace(state.alpha, table=arrays[1])
    placed = [v for v in state.born if v in state.places]
    return _State(slots, alpha, state.born, dict(zip(placed, arrays[2], strict=True)))


def _renamed(after: _State, before: _State, step: int) -> _State:
    """The state after a step in terms of the choices of the state before it, each of the same age."""
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
    places = {names[v]: place for v, place in after.places.items() if v in names}
    return _State(slots, alpha, before.born, places)


def _rename(x: Any, names: dict[Variable, Variable]) -> Any:
    if not is_lifted(x):
        return x
    axes: Axes = {names.get(v) or v: p for v, p in x.axes.items()}
    back = {v: i for i, v in enumerate(axes)}
    new = sorted(axes, key=lambda v: v.number)
    n = len(axes)
    array = jnp.transpose(x.array, [*(back[v] for v in new), *range(n, x.array.ndim)])
    forms = {names.get(v) or v: f for v, f in x.forms.items()}
    return Lifted(array, axes, forms)


def _located(variable: Variable, place: Place, alpha: Factor) -> Place:
    """A place with the mode of a factor as the guess of where the choice is, other choices at their first value."""
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


def _top(alpha: Factor, mine: Iterable[Variable]) -> Factor:
    """The largest entry of a factor over some of its variables."""
    axes = tuple(i for i, v in enumerate(alpha.variables) if v in set(mine))
    top = jax.lax.stop_gradient(jnp.max(alpha.table, axes))
    rest = tuple(v for v in alpha.variables if v not in set(mine))
    return Factor(jnp.where(jnp.isfinite(top), top, 0), rest, alpha.plates, alpha.scale)


def _less(alpha: Factor, top: Factor) -> Factor:
    """A factor divided by another over fewer variables and the same plates."""
    own = [p.root() for p in top.plates]
    shape = [v.num_values if v in top.variables else 1 for v in alpha.variables]
    order = [own.index(p.root()) for p in alpha.plates]
    table = jnp.transpose(
        top.table, [*range(len(top.variables)), *(len(top.variables) + i for i in order)]
    )
    return dataclasses.replace(
        alpha, table=alpha.table - table.reshape(*shape, *(p.size for p in alpha.plates))
    )


def _ones(variable: Variable, scale: Any) -> Factor:
    """A factor that says nothing."""
    shape = (variable.num_values, *(p.size for p in variable.plates))
    return Factor(jnp.zeros(shape), (variable,), tuple(p.root() for p in variable.plates), scale)


def _in_terms(factor: Factor, names: dict[Variable, Variable]) -> Factor:
    """The factor with some variables renamed."""
    return dataclasses.replace(factor, variables=tuple(names.get(v, v) for v in factor.variables))


def _ordered(factor: Factor, form: Factor) -> jax.Array:
    """The table of a factor with its axes in the order of another's."""
    own = [p.root() for p in factor.plates]
    order = [factor.variables.index(v) for v in form.variables]
    order += [len(order) + own.index(p.root()) for p in form.plates]
    return jnp.transpose(factor.table, order)


def _scan_without_invariants(
    body: Any, carry: Any, xs: Any, length: int, steps: int, unroll: Any
) -> Any:
    """``lax.scan`` with what is the same in every step, tables of a constant transition above all, computed once."""
    first = jax.tree.map(lambda a: a[0], xs)
    closed, shape = jax.make_jaxpr(body, return_shape=True)(carry, first)
    opened, consts = open_jaxpr(closed)
    entry, treedef = jax.tree.flatten(carry)
    slots, inputs = opened.invars[: len(entry)], opened.invars[len(entry) :]
    settled = _settled(closed, entry, steps)
    known: dict[Any, Any] = dict(zip(opened.constvars, consts, strict=True))
    known.update({v: a for v, a, done in zip(slots, entry, settled, strict=True) if done})
    rest = []
    for eqn in opened.eqns:
        if all(isinstance(v, Literal) or v in known for v in eqn.invars):
            ins = [_read(known, v) for v in eqn.invars]
            outs = folded(eqn, ins)
            known.update(zip(eqn.outvars, outs, strict=True))
        else:
            rest.append(eqn)
    varying = [v for v, done in zip(slots, settled, strict=True) if not done]

    def step(carry: list[Any], x: Any) -> Any:
        env = {**known, **dict(zip(varying, carry, strict=True))}
        env.update(zip(inputs, jax.tree.leaves(x), strict=True))
        for eqn in rest:
            outs = bind(eqn, [_read(env, v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        outs = [_read(env, v) for v in opened.outvars]
        after, ys = outs[: len(entry)], outs[len(entry) :]
        return [a for a, done in zip(after, settled, strict=True) if not done], ys

    moving = [a for a, done in zip(entry, settled, strict=True) if not done]
    after, ys = jax.lax.scan(step, moving, xs, length, unroll=unroll)
    moved = iter(after)
    end = [a if done else next(moved) for a, done in zip(entry, settled, strict=True)]
    return jax.tree.unflatten(treedef, end), jax.tree.unflatten(jax.tree.structure(shape[1]), ys)


def _read(env: dict[Any, Any], v: Any) -> Any:
    return v.val if isinstance(v, Literal) else env[v]


def _settled(closed: Any, entry: Sequence[Any], steps: int) -> list[bool]:
    """Which slots of a carry are constant after so many steps, as far as the jaxpr of a step shows.

    A slot computed from nothing but constants is after one step, or from the start if it begins with the same; from
    such slots, after two; and so on.
    """
    opened, consts = open_jaxpr(closed)
    slots, ends = opened.invars[: len(entry)], opened.outvars[: len(entry)]
    age: dict[Any, float] = dict.fromkeys(opened.invars, float("inf"))
    found = [float("inf")] * len(entry)
    begun = [False] * len(entry)
    for n in range(steps + 1):
        age.update(zip(slots, found, strict=True))
        for eqn in opened.eqns:
            inputs = [age.get(v, 0) for v in eqn.invars if not isinstance(v, Literal)]
            age.update(dict.fromkeys(eqn.outvars, max(inputs, default=0)))
        ages = [0 if isinstance(v, Literal) else age.get(v, 0) for v in ends]
        if n == 0:
            begun = [
                a == 0 and _begins(opened, consts, v, x)
                for a, v, x in zip(ages, ends, entry, strict=True)
            ]
        if n < steps or n == 0:
            found = [
                0 if v is slot or same else a + 1
                for v, slot, same, a in zip(ends, slots, begun, ages, strict=True)
            ]
    return [n <= steps for n in found]


def _begins(opened: Any, consts: Sequence[Any], v: Any, x: Any) -> bool:
    """Whether a constant result of a jaxpr is known to equal an array: a table of indices."""
    if isinstance(x, Tracer):
        return False
    known = known_integers(opened.eqns, dict(zip(opened.constvars, consts, strict=True)))
    if not isinstance(v, Literal) and v not in known:
        return False
    found = _read(known, v)
    return found.dtype == x.dtype and np.array_equal(found, x)


# --- messages ---------------------------------------------------------------------------------------------------------


def _no_order(scan: _Scan, state: _State, step: int) -> str:
    grown = [(i, x) for i, x in enumerate(state.slots) if len({*axes_of(x)} & set(state.born)) > 1]
    slot = ", ".join(
        f"slot {i} ({x.dtype}{list(x.shape)}) depends on {len(x.axes)} of them" for i, x in grown
    )
    names = " and ".join(dict.fromkeys(repr(v.address) for v in state.born))
    return (
        f"the choices {names} of a scan do not form a Markov chain: after {step} steps its carry still gathers them "
        f"({slot or 'through their density'}). A carry may hold any function of the last few choices, but nothing that "
        "adds them up or keeps the first; move what does into the choice, or keep the choice"
    )
