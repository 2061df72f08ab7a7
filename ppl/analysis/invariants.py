"""``lax.scan`` with what is the same in every step computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from weft.ppl.stage.compat import Literal, Tracer, bind, open_jaxpr

from .constants import folded, known_integers


def scan_without_invariants(
    body: Any, carry: Any, xs: Any, length: int, steps: int, unroll: Any
) -> Any:
    """``lax.scan`` with what is the same in every step computed once.

    Args:
        body: as of ``lax.scan``.
        carry: the carry before the first step.
        xs: inputs of the steps.
        length: how many there are.
        steps: how many were taken before: slots of the carry that are constant after so many are known to be.
        unroll: as of ``lax.scan``.
    """
    first = jax.tree.map(lambda a: a[0], xs)
    closed, shape = jax.make_jaxpr(body, return_shape=True)(carry, first)
    opened, consts = open_jaxpr(closed)
    entry, treedef = jax.tree.flatten(carry)
    slots, inputs = opened.invars[: len(entry)], opened.invars[len(entry) :]
    settled = settled_slots(closed, entry, steps)
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


def settled_slots(closed: Any, entry: Sequence[Any], steps: int) -> list[bool]:
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
