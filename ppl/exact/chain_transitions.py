r"""Normal choices in the carry of a scan whose steps are composed: what single steps do to them.

A step is walked with the slots before it as unknowns. The slots after it are then affine in those before it, with a
covariance, and what the step observes is evidence on those before it: a ``Transition``. So it may be any step that the
Kalman filter can take.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .chain_laws import Blocks, Carried, at_zero_of, copies_of, uncopied
from .chain_state import State
from .factors import PROBE, Scale, roots_of, same_scale
from .gaussian import Block, Quadratic, Transition, compose
from .normals import Evidence, gathered, one_block
from .plan import Plan
from .semirings import best
from .tables import (
    Plate,
    Slope,
    Variable,
    affine,
    apply,
    at_zero,
    is_table,
    pieces,
    rebuilt,
    slopes_of,
)

FLOPS = 60
"""About how many operations a composition takes, in units of the cube of the number of columns."""


def with_unknowns(state: State) -> State:
    """The slots of a state, and in place of uncertain ones what they are as functions of themselves."""
    slots = list(state.slots)
    for i, v in state.carried.variables.items():
        x = slots[i]
        slots[i] = affine(jnp.zeros(x.shape, x.dtype), {v: slopes_of(x)[v]})
    return State(slots, None, state.born)


def groups_of(state: State, plan: Plan) -> list[Group]:
    """The uncertain slots of a carry, in groups of those that have the same plates."""
    found: dict[frozenset[Plate], list[int]] = {}
    for i, v in state.carried.variables.items():
        found.setdefault(frozenset(roots_of(v.plates)), []).append(i)
    return [Group(state, numbers, plan) for numbers in found.values()]


class Group:
    """Uncertain slots with the same plates: the state of one copy is a vector.

    Args:
        state: the state before the steps.
        numbers: the numbers of the slots.
        plan: what is summed out.
    """

    def __init__(self, state: State, numbers: Sequence[int], plan: Plan) -> None:
        self.plan, self.limit, self.numbers = plan, plan.limit, sorted(numbers)
        self.variables = [state.carried.variables[i] for i in self.numbers]
        self.slots = [state.slots[i] for i in self.numbers]
        self.order = tuple(p.root() for p in self.variables[0].plates)
        self.places = []
        for x, v in zip(self.slots, self.variables, strict=True):
            own, at = [p.root() for p in v.plates], slopes_of(x)[v].places
            self.places.append(tuple(at[own.index(p)] for p in self.order))
        self.outer: dict[
            Variable, tuple[int, ...]
        ] = {}  # the others, and the places of their plates
        self.scale: Scale = ()
        self.sites: tuple[str, ...] = ()
        self.law = self._mean(state), self._covariance(state.carried)

    def step(self, after: State, evidence: Sequence[Evidence]) -> Transition:
        """What a step does, from the state after it and the evidence on the unknowns before it."""
        data, probes = ([f for f in evidence if f.probe is probe] for probe in (False, True))
        mean, covariance = self._mean(after), self._covariance(after.carried)
        rows = form = block = probe = None
        if data:
            whole = gathered(data, self.order, None, self.limit).without_unit(self.limit)
            rows, form = self._noted((whole.rows, whole.form))
        probed = [self._noted(one_block(f, self.order, self.limit)) for f in probes]
        self.scale = same_scale([f.scale for f in data], [v.address for v in self.variables])
        self.sites = tuple(dict.fromkeys(s for f in data for s in f.sites))
        every = [*self.variables, *self.outer]
        if rows is not None:
            assert form is not None
            block = Block(self._matrix(rows, every), at_zero(rows), form)
        for rows, form in probed:
            found = apply(_linear, self.limit, self._matrix(rows, every), at_zero(rows), form)
            probe = found if probe is None else apply(_both, self.limit, probe, found)
        return Transition(self._matrix(mean, every), at_zero(mean), covariance, block, probe)

    def compose(self, first: Transition, second: Transition) -> Transition:
        """Two transitions as one."""
        d, copies = first.slope.shape[-1], math.prod(p.size for p in self.order)
        self.limit.spend([v.address for v in self.variables], copies * FLOPS * d**3)
        integral = self.plan.semiring is not best
        return apply(lambda a, b: compose(a, b, integral), self.limit, first, second)

    def finish(self, whole: Transition) -> tuple[dict[int, Any], Blocks, list[Evidence]]:
        """The slots after all steps, their covariances, and the evidence on other choices."""
        mean, covariance = self.law
        law = Transition(self._matrix(mean, [*self.outer]), at_zero(mean), covariance, None, None)
        law, evidence = self.compose(law, whole), []
        if law.evidence is not None:
            rows = self._rows(law.evidence.rows, law.evidence.offset)
            form = law.evidence.evidence
            evidence.append(Evidence(rows, form, self.order, self.scale, self.sites))
        if law.probe is not None:
            row, form = apply(_as_row, self.limit, *law.probe)
            rows = self._rows(*row)
            evidence.append(Evidence(rows, form, self.order, self.scale, (PROBE,), True))
        mean, slots, blocks = self._rows(law.slope, law.offset), {}, {}
        means = self._parts(mean)
        for k, (i, v, x) in enumerate(zip(self.numbers, self.variables, self.slots, strict=True)):
            own = uncopied(means[k], x.shape, self.places[k], self.limit)
            slots[i] = affine(at_zero(own), {**slopes_of(own), v: slopes_of(x)[v]})
            columns = self._parts(law.covariance)[k]
            across = apply(lambda c: jnp.swapaxes(c, -1, -2), self.limit, columns)
            for j, block in zip(self.numbers[k:], self._parts(across)[k:], strict=True):
                blocks[i, j] = apply(lambda c: jnp.swapaxes(c, -1, -2), self.limit, block)
        return slots, blocks, evidence

    def _parts(self, x: Any) -> list[Any]:
        """The entries of a vector of all numbers of a copy that belong to each slot; of a matrix, its columns."""
        ends = np.cumsum([0, *(v.dimension or 0 for v in self.variables)])

        def part(a: int, b: int) -> Any:
            return apply(lambda x: x[..., a:b], self.limit, x)

        return [part(int(a), int(b)) for a, b in itertools.pairwise(ends)]

    def _mean(self, state: State) -> Any:
        """The mean of a state."""
        slots = [at_zero_of(state.slots[i], state.carried) for i in self.numbers]
        slots = [x if is_table(x) else jnp.asarray(x) for x in slots]
        values = [copies_of(x, at, self.limit) for x, at in zip(slots, self.places, strict=True)]
        mean = apply(lambda *x: jnp.concatenate(x, -1), self.limit, *values)
        return self._noted((mean, None))[0]

    def _covariance(self, carried: Carried) -> Any:
        sizes = [v.dimension or 0 for v in self.variables]
        rows = []
        for i, n in zip(self.numbers, sizes, strict=True):
            row = [
                self._block(carried, i, j, (n, m)) for j, m in zip(self.numbers, sizes, strict=True)
            ]
            rows.append(apply(lambda *x: jnp.concatenate(x, -1), self.limit, *row))
        return apply(lambda *x: jnp.concatenate(x, -2), self.limit, *rows)

    def _block(self, carried: Carried, i: int, j: int, shape: tuple[int, int]) -> Any:
        """The covariance of two slots, with the plates in order."""
        found = carried.block(i, j, self.limit)
        if found is None:
            dtype = self.slots[0].dtype
            return jnp.zeros((*(p.size for p in self.order), *shape), dtype)
        own = [p.root() for p in carried.variables[i].plates]
        n, order = len(own), [own.index(p) for p in self.order]
        return apply(lambda x: jnp.transpose(x, [*order, n, n + 1]), self.limit, found)

    def _noted(self, x: tuple[Any, Any]) -> tuple[Any, Any]:
        """A value with a form, after the other choices that it depends on are noted."""
        for v, slope in slopes_of(x[0]).items():
            if v not in self.variables:
                self.outer.setdefault(v, slope.places)
        return x

    def _matrix(self, x: Any, variables: Sequence[Variable]) -> Any:
        """The slopes of a vector by some choices, beside one another."""
        own = slopes_of(x)
        shapes = [(*x.shape, v.dimension) for v in variables]

        def matrix(slopes: Any) -> Any:
            columns = [
                jnp.zeros(n, x.dtype) if s is None else jnp.broadcast_to(s, n)
                for s, n in zip(slopes, shapes, strict=True)
            ]
            return jnp.concatenate([jnp.zeros((*x.shape, 0), x.dtype), *columns], -1)

        return apply(matrix, self.limit, [own[v].value if v in own else None for v in variables])

    def _rows(self, matrix: Any, offset: Any) -> Any:
        """A vector from its slopes by the other choices, and its value where they are zero."""
        slopes, at = {}, 0
        for v, places in self.outer.items():
            n = v.dimension or 0
            own = apply(lambda x, at=at, n=n: x[..., at : at + n], self.limit, matrix)
            slopes[v], at = Slope(own, places), at + n
        return affine(offset, slopes)


def _linear(rows: Any, offset: Any, form: Quadratic) -> tuple[Any, Any]:
    """Weights and constant of a linear function of some rows."""
    weights = jnp.sum(form.linear[..., None] * rows, -2)
    return weights, form.constant + jnp.sum(form.linear * offset, -1)


def _both(first: Any, second: Any) -> Any:
    return jax.tree.map(jnp.add, first, second)


def _as_row(weights: Any, constant: Any) -> Any:
    """A linear function as a single row, and the form that returns it."""
    row = weights[..., None, :], constant[..., None]
    return row, Quadratic(None, jnp.ones_like(row[1]), jnp.zeros_like(constant))


def arrays_of(x: Any) -> Any:
    """The arrays of a transition of which parts may be tables."""
    return [[a for a, _ in pieces(leaf)] for leaf in jax.tree.leaves(x, is_leaf=is_table)]


def idle(arrays: Any) -> Any:
    """The arrays of a transition that leaves the state as it is, from those of any transition."""
    (slope,), *rest = arrays
    eye = jnp.broadcast_to(jnp.eye(*slope.shape[-2:], dtype=slope.dtype), slope.shape)
    return [[eye], *jax.tree.map(jnp.zeros_like, rest)]


def with_arrays(form: Any, arrays: Any) -> Any:
    """A transition of the same form with other arrays."""
    leaves, treedef = jax.tree.flatten(form, is_leaf=is_table)
    new = [rebuilt(x, iter(a)) for x, a in zip(leaves, arrays, strict=True)]
    return jax.tree.unflatten(treedef, new)
