"""``lax.scan`` in which whatever is the same in every step is computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from weft.ppl.stage.compat import Literal, Tracer, open_jaxpr
from weft.ppl.stage.jaxprs import flow, inputs, read, run

from .constants import folded, known_integers

PRODUCT = "product"
"""The name of a product of matrices that is written out."""
_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(PRODUCT)
)


def scan_without_invariants(
    body: Any,
    carry: Any,
    xs: Any,
    length: int,
    steps: int,
    unroll: Any,
    products_only: bool = False,
) -> Any:
    """``lax.scan`` in which whatever is the same in every step is computed once.

    Args:
        body: as in ``lax.scan``.
        carry: the carry before the first step.
        xs: the inputs of the steps.
        length: the number of steps.
        steps: the number of steps taken before. Slots of the carry that become constant after that many steps are
            known.
        unroll: as in ``lax.scan``.
        products_only: keep only products of matrices of each step for derivatives, and compute the rest again. That
            takes less time than to keep many small arrays.
    """
    first = jax.tree.map(lambda a: a[0], xs)
    closed, shape = jax.make_jaxpr(body, return_shape=True)(carry, first)
    opened, _ = open_jaxpr(closed)
    entry, treedef = jax.tree.flatten(carry)
    settled = settled_slots(closed, entry, steps)
    start = inputs(closed, [*entry, *jax.tree.leaves(first)])
    moving = {*opened.invars[len(entry) :]}
    moving |= {v for v, done in zip(opened.invars, settled, strict=False) if not done}
    known = {v: x for v, x in start.items() if v not in moving}
    varying = [v for v in opened.invars[: len(entry)] if v in moving]
    rest = []
    for eqn in opened.eqns:
        if all(isinstance(v, Literal) or v in known for v in eqn.invars):
            run([eqn], known, folded)
        else:
            rest.append(eqn)

    def step(carry: list[Any], x: Any) -> Any:
        values = {**known, **dict(zip(varying, carry, strict=True))}
        values.update(zip(opened.invars[len(entry) :], jax.tree.leaves(x), strict=True))
        run(rest, values)
        outs = [read(v, values) for v in opened.outvars]
        after, ys = outs[: len(entry)], outs[len(entry) :]
        return [a for a, done in zip(after, settled, strict=True) if not done], ys

    if products_only:
        step = jax.checkpoint(step, prevent_cse=False, policy=_PRODUCTS)
    before = [a for a, done in zip(entry, settled, strict=True) if not done]
    after, ys = jax.lax.scan(step, before, xs, length, unroll=unroll)
    moved = iter(after)
    end = [a if done else next(moved) for a, done in zip(entry, settled, strict=True)]
    return jax.tree.unflatten(treedef, end), jax.tree.unflatten(jax.tree.structure(shape[1]), ys)


def settled_slots(closed: Any, entry: Sequence[Any], steps: int) -> list[bool]:
    """Which slots of a carry are constant after so many steps, as far as the jaxpr of a step shows.

    A slot that is computed from constants alone is constant after one step. It is constant from the start if it begins
    with that same value. A slot computed from such slots is constant after two steps, and so on.
    """
    opened, consts = open_jaxpr(closed)
    slots, ends = opened.invars[: len(entry)], opened.outvars[: len(entry)]
    moving = [math.inf] * (len(opened.invars) - len(entry))

    def oldest(ages: Sequence[float]) -> float:
        return max(ages, default=0)

    def together(eqn: Any, ins: list[float], place: Any) -> list[float]:
        return [oldest(ins)] * len(eqn.outvars)

    found = [math.inf] * len(entry)
    begun = [False] * len(entry)
    for n in range(steps + 1):
        ages = flow(closed, [*found, *moving], together, oldest)[: len(entry)]
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
    """Whether a constant result of a jaxpr, such as a table of indices, is known to equal an array."""
    if isinstance(x, Tracer):
        return False
    known = known_integers(opened.eqns, dict(zip(opened.constvars, consts, strict=True)))
    if not isinstance(v, Literal) and v not in known:
        return False
    found = read(v, known)
    return found.dtype == x.dtype and np.array_equal(found, x)
