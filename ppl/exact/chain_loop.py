"""The steps of a chain one after another: the forward recursion as ``lax.scan``."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.analysis.invariants import scan_without_invariants

from .chain_state import State, Step, renamed
from .chain_steps import Steps
from .factors import less, top_of


def one_by_one(steps: Steps, state: State, start: int) -> tuple[State, Step]:
    """Take the steps from ``start`` on. Returns the state after the last, and what all steps leave behind."""
    seen: list[Step] = []
    shift = None if state.alpha is None else top_of(state.alpha, state.born)
    zero = None if shift is None else jnp.zeros_like(shift.table)

    def body(carry: Any, x: Any) -> Any:
        arrays, shifts = carry
        before = state.with_arrays(arrays)
        after, found = steps.advance(before, start, x)
        after = renamed(after, state, start)
        if before.alpha is not None and after.alpha is not None:
            # Subtract its size of a step ago: in single precision it would drift away.
            top = top_of(before.alpha, state.born)
            after.alpha = less(after.alpha, top)
            shifts = _add(shifts, top.table)
        seen.append(found)
        return (after.arrays(), shifts), found.arrays()

    length = steps.length - start
    with steps.region.plan.limit.repeated(length):
        (arrays, shifts), stacked = scan_without_invariants(
            body,
            (state.arrays(), (zero, zero)),
            steps.since(start),
            length,
            start,
            steps.eqn.params["unroll"],
            products_only=bool(state.carried.variables),
        )
    found = seen[-1].together(stacked)
    if shift is not None:
        found.others.append(dataclasses.replace(shift, table=shifts[0]))
    return state.with_arrays(arrays), found


def _add(total: tuple[Any, Any], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Add to a running sum, and to the rounding error that it has lost so far (Kahan 1965)."""
    x = x - total[1]
    new = total[0] + x
    return new, (new - total[0]) - x
