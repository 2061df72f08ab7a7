"""The loop of a fit: stochastic gradient ascent of one or several runs, compiled whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from weft.inference.run.loop import Loop, State
from weft.ppl.stage.staging import Code

from .fitted import Restarts
from .minibatches import Minibatches

NUM_ESTIMATES = 100
"""Estimates of the bound by which restarts are compared."""


class Run(eqx.Module):
    """The state of one run of a fit. For several restarts, each array leads with their axis.

    Attributes:
        moving: the arrays of the parameters, on the unconstrained scale, and of the optimiser.
        bounds: of shape `(num_steps,)`, the bound that was estimated at each step so far.
        num_skipped: the number of steps whose bound or gradient was not finite. They changed nothing.
        order: of shape `(N,)`, the rows of the data in the order of this epoch; empty without minibatches.
        seen: the state of the rule for an early stop; `None` without one.
        stopped: whether the rule stopped the fit.
        num_done: the number of steps done.
    """

    moving: list[Array]
    bounds: Float[Array, " steps"]
    num_skipped: Int[Array, ""]
    order: Int[Array, " rows"]
    seen: Any
    stopped: Bool[Array, ""]
    num_done: Int[Array, ""]


class AscentState(State):
    """The runs of a fit, and the number of steps done. All runs share this number, so their epochs begin together."""

    iteration: Int[Array, ""]
    run: Run


class Ascent(Loop):
    """The settings of the loop. All of them compare by structure.

    Attributes:
        code: one step, `(*captured, key, *moving, *rest, *batch) -> (moving, bound, finite)`.
        captured: the arrays that the objective closed over.
        keys: the key of the fit, or one for each restart.
        rest: the arrays among the parameters that are not optimised, each with an axis of restarts.
        batches: the data.
        rule: the rule for an early stop.
        num_steps: the most steps.
        minimize: whether the objective is a loss.
        several: whether there are several restarts.
    """

    code: Code = eqx.field(static=True)
    captured: list[Array]
    keys: PRNGKeyArray
    rest: list[Array]
    batches: Minibatches
    rule: Any
    num_steps: int = eqx.field(static=True)
    minimize: bool = eqx.field(static=True)
    several: bool = eqx.field(static=True)

    def begin(self, moving: list[Array]) -> AscentState:
        """The state before the first step."""

        def filled(tree: Any) -> Any:
            lead = self.keys.shape
            # The state is donated to compiled code, so its arrays must not be held elsewhere.
            return jax.tree.map(lambda x: jnp.array(jnp.broadcast_to(x, (*lead, *x.shape))), tree)

        run = Run(
            moving=moving,
            bounds=filled(jnp.full(self.num_steps, jnp.nan, jnp.result_type(float))),
            num_skipped=filled(jnp.int32(0)),
            order=filled(self.batches.order()),
            seen=None if self.rule is None else filled(self.rule.init()),
            stopped=filled(jnp.asarray(False)),
            num_done=filled(jnp.int32(0)),
        )
        return AscentState(jnp.int32(0), run)

    def num_iterations(self, target: Any = None) -> int:
        return self.num_steps

    def step(self, key: PRNGKeyArray, state: AscentState, target: Any = None) -> AscentState:
        # Each restart has a key of its own and runs as it would alone. The loop's key is not used.
        def one(key: PRNGKeyArray, rest: list[Array], run: Run) -> Run:
            return self._stepped(state.iteration, key, rest, run)

        step = self.over_restarts(one)
        return AscentState(state.iteration + 1, step(self.keys, self.rest, state.run))

    def over_restarts(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Turn a function of one run into a function of all runs."""
        return jax.vmap(f) if self.several else f

    def _stepped(self, i: Any, key: PRNGKeyArray, rest: list[Array], run: Run) -> Run:
        step_key, order_key = (jax.random.fold_in(key, k) for k in range(2))
        order = self.batches.shuffle(order_key, i, run.order)
        moving, bound, finite = self.code(
            *self.captured,
            jax.random.fold_in(step_key, i),
            *run.moving,
            *rest,
            *self.batches.take(order, i),
        )
        # A first step without a finite gradient is marked as one without a finite bound, which
        # stops the fit.
        bound = jnp.where(finite | (i > 0), bound, jnp.nan).astype(run.bounds.dtype)
        new = Run(
            moving=moving,
            bounds=run.bounds.at[i].set(bound),
            num_skipped=run.num_skipped + jnp.int32(~finite),
            order=order,
            seen=None,
            stopped=run.stopped,
            num_done=run.num_done + 1,
        )
        if self.rule is None:
            return new
        seen, now = self.rule.update(run.seen, i, -bound if self.minimize else bound)
        new = dataclasses.replace(new, seen=seen, stopped=now)
        return jax.tree.map(lambda n, o: jnp.where(run.stopped, o, n), new, run)

    def finished(self, state: AscentState) -> Any:
        return None if self.rule is None else jnp.all(state.run.stopped)

    def describe(self, state: AscentState) -> str:
        """The mean of the last hundred bounds, of the best restart."""
        bounds = [x[np.isfinite(x)] for x in np.atleast_2d(np.asarray(state.run.bounds))]
        recent = [x[-100:].mean() for x in bounds if x.size]
        if not recent:
            return ""
        return f"loss {min(recent):.5g}" if self.minimize else f"bound {max(recent):.5g}"


@eqx.filter_jit
def compare(ascent: Ascent, moving: list[Array], key: PRNGKeyArray) -> Restarts:
    """The bound of every restart at its last parameters, by new keys (and batches) that all share."""
    batches = ascent.batches

    def estimate(i: Any) -> Array:
        order = batches.shuffle(jax.random.fold_in(key, 0), i, batches.order())
        batch = batches.take(order, i)
        step_key = jax.random.fold_in(jax.random.fold_in(key, 1), i)

        def one(moving: list[Array], rest: list[Array]) -> Array:
            return ascent.code(*ascent.captured, step_key, *moving, *rest, *batch)[1]

        return jax.vmap(one)(moving, ascent.rest)

    found = jax.lax.map(estimate, jnp.arange(NUM_ESTIMATES))
    bounds = jnp.mean(found, 0)
    worst = jnp.inf if ascent.minimize else -jnp.inf
    ranked = jnp.where(jnp.isfinite(bounds), bounds, worst)
    return Restarts(
        bounds=bounds,
        errors=jnp.std(found, 0, ddof=1) / jnp.sqrt(NUM_ESTIMATES),
        best=jnp.argmin(ranked) if ascent.minimize else jnp.argmax(ranked),
    )
