"""Fitting: stochastic ascent of an objective over a pytree of parameters, compiled whole, run in chunks."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from weft.inference.run.runner import run_chunks, tracing
from weft.ppl.stage.compat import as_key
from weft.ppl.stage.errors import DensityError, WeftError
from weft.ppl.stage.packing import pack
from weft.ppl.stage.staging import stage

from .fitted import Fit as Fit
from .fitted import Restarts as Restarts
from .minibatches import Minibatches, warn_unscaled
from .parameters import constrained as constrained
from .parameters import fixed as fixed
from .parameters import unwrap
from .starts import Start
from .stopping import plateau

Objective = Callable[..., Float[Array, ""]]

NUM_ESTIMATES = 100
"""Estimates of the bound by which restarts are compared."""


class FitState(eqx.Module):
    """The state of a fit; of several restarts, each array leads with their axis.

    Attributes:
        moving: the arrays of the parameters, on the unconstrained scale, and of the optimiser.
        bounds: `(num_steps,)`, the bound estimated at each step so far.
        num_skipped: steps whose bound or gradient was not finite; they changed nothing.
        order: `(N,)`, the rows of the data in the order of this epoch; empty without minibatches.
        seen: what the rule that stops early has seen; `None` without one.
        stopped: whether it stopped the fit.
        num_done: steps done.
    """

    moving: list[Array]
    bounds: Float[Array, " steps"]
    num_skipped: Int[Array, ""]
    order: Int[Array, " rows"]
    seen: Any
    stopped: Bool[Array, ""]
    num_done: Int[Array, ""]


class _Pure(eqx.Module):
    """What the loop needs besides the state: all of it compares by structure.

    Attributes:
        code: one step, `(*captured, key, *moving, *rest, *batch) -> (moving, bound, finite)`.
        captured: what the objective closed over.
        key: of the fit, or one for each restart.
        rest: the arrays among the parameters that are not optimised, each with an axis of restarts.
        batches: the data.
        rule: when to stop early.
        minimize: whether the objective is a loss.
        lanes: whether there are several restarts.
    """

    code: Any = eqx.field(static=True)
    captured: list[Array]
    key: PRNGKeyArray
    rest: list[Array]
    batches: Minibatches
    rule: Any
    minimize: bool = eqx.field(static=True)
    lanes: bool = eqx.field(static=True)

    def over_lanes(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f(key, rest, state)` of every restart."""
        return jax.vmap(f) if self.lanes else f


def fit(
    key: PRNGKeyArray,
    objective: Objective,
    params: Any,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    data: Any = (),
    batch_size: int | None = None,
    minimize: bool = False,
    *,
    num_restarts: int = 1,
    stop: plateau | None = None,
    state: Any = None,
    progress: bool = True,
) -> Fit:
    """Maximise the expectation of an objective by stochastic gradient ascent.

    Each step estimates the objective and its gradient with a key, and a minibatch, of its own. A
    step whose bound or gradient is not finite changes nothing and is counted. Ctrl-C returns the
    fit so far, with a warning.

    Several restarts run at once, under one `jax.vmap`, each as `fit` alone would with one of
    `jax.random.split(key, num_restarts)`. The one whose bound is best at the end is returned, by
    100 estimates at its last parameters with fresh keys, which are the same for all: the estimate of
    the last step is one draw, and would mostly pick the luckiest. The bounds of all are in
    `Fit.restarts`, and their spread in the report.

    Args:
        key: a random key.
        objective: an estimator `f(key, params, *batch)` of a bound to be maximised: `elbo(target,
            guide)`, or any function that gives a scalar.
        params: where to begin: a pytree, networks included. Floating arrays and Python floats are
            optimised; `constrained(value, constraint)` keeps a leaf in a set, `fixed(value)` leaves
            one as it is. Or a function `init(key)` of such a pytree, from which each restart draws
            its own: `jittered(params)`, if nothing better is known.
        optimizer: an Optax optimiser; clipping and schedules are Optax's,
            `optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))`.
        num_steps: how many steps, at most.
        data: arrays (or pytrees of them) that share their leading axis, handed to the objective
            after the parameters.
        batch_size: rows of the data in a step, drawn without replacement in epochs of `N //
            batch_size` steps; all rows if `None`. The target scales what it sees: `scale(model,
            {"row": N / batch_size})`; one that does not, and has choices that all rows share, is
            warned of.
        minimize: whether the objective is a loss.
        num_restarts: how many fits are made; more than one need `params` to be a function of a key.
        stop: a rule to stop early by, `plateau(window)`. Under `jit` or `vmap` the steps that are
            not made are NaN at the end of `Fit.bounds`; elsewhere it is cut there.
        state: the state of the optimiser to go on with, from an earlier fit: `fit(key, objective,
            before.wrapped, optimizer, num_steps, state=before.state)`.
        progress: whether to show a progress bar.

    Returns:
        The fit.

    Raises:
        WeftError: if the objective, the parameters or the data make no sense together.
        DensityError: if the first bound, or its gradient, is not finite (of every restart, if there
            are several); the message names what makes it so.

    Examples:
        >>> import jax, optax, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from weft import gen, sample
        >>> from weft.inference import constrained, elbo, fit
        >>> @gen
        ... def model():
        ...     mu = sample("mu", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(mu, 1.0))
        >>> @gen
        ... def guide(params):
        ...     sample("mu", dist.Normal(params["loc"], params["scale"]))
        >>> params = {"loc": 0.0, "scale": constrained(1.0, constraints.positive)}
        >>> objective = elbo(model().given({"y": 2.0}), guide, num_samples=10)
        >>> rate = optax.cosine_decay_schedule(0.05, 500)
        >>> found = fit(jax.random.key(0), objective, params, optax.adam(rate), 500, progress=False)
        >>> print(f"{found.params['loc']:.1f} {found.params['scale']:.1f}")
        1.0 0.7
    """
    if not callable(objective):
        raise TypeError(
            f"fit: expected an objective f(key, params, *batch), got {type(objective).__name__}"
        )
    for name, n in (("num_steps", num_steps), ("num_restarts", num_restarts)):
        if not isinstance(n, (int, np.integer)) or n < 1:
            raise WeftError(f"fit: {name} must be a positive integer, got {n!r}")
    if num_restarts > 1 and state is not None:
        raise WeftError("fit: state= goes on with one fit, and num_restarts > 1 begins several")
    key = as_key(key)
    batches = Minibatches.make(data, batch_size)
    optimizer = optax.with_extra_args_support(optimizer)
    start = Start.make(key, params, num_restarts, optimizer, state)
    check = getattr(objective, "check", None)
    if check is not None:
        check(start.params(0), *batches.example())
        warn_unscaled(objective, start.params(0), batches)
    step = _step(objective, optimizer, start, batches, minimize)
    code, captured = stage(
        step, [start.keys[0], *start.moving[0], *start.rest[0], *batches.example_arrays()]
    )
    lanes = num_restarts > 1

    def stacked(xs: list[list[Array]]) -> list[Array]:
        # The state is given to compiled code to reuse, and must not be the caller's own arrays.
        each = [list(x) for x in zip(*xs, strict=True)]
        return [jnp.stack(x) if lanes else jnp.array(x[0], x[0].dtype, copy=True) for x in each]

    def filled(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.stack([x] * num_restarts) if lanes else jnp.array(x, copy=True), tree
        )

    carry = FitState(
        moving=stacked(start.moving),
        bounds=filled(jnp.full(num_steps, jnp.nan, jnp.result_type(float))),
        num_skipped=filled(jnp.int32(0)),
        order=filled(batches.order()),
        seen=None if stop is None else filled(stop.init()),
        stopped=filled(jnp.asarray(False)),
        num_done=filled(jnp.int32(0)),
    )
    pure = _Pure(
        code,
        captured,
        jnp.stack(start.keys) if lanes else key,
        stacked(start.rest),
        batches,
        jax.tree.map(jnp.asarray, stop),
        minimize,
        lanes,
    )

    if concrete := not tracing(key, carry, captured, batches):

        def advance(carry: FitState, first: int, last: int) -> FitState:
            carry = _advance((pure, jnp.int32(first), jnp.int32(last)), carry)
            if first == 0 and not np.isfinite(carry.bounds[..., 0]).any():
                raise _explain(start.keys[0], objective, start.params(0), batches)
            return carry

        def describe(carry: FitState) -> str:
            recent = np.asarray(carry.bounds)
            recent = [
                x[np.isfinite(x)][-100:].mean()
                for x in np.atleast_2d(recent)
                if np.isfinite(x).any()
            ]
            if not recent:
                return ""
            return f"loss {min(recent):.5g}" if minimize else f"bound {max(recent):.5g}"

        carry, done = run_chunks(
            advance,
            carry,
            0,
            num_steps,
            title="fit",
            progress=progress,
            describe=describe,
            finished=None if stop is None else lambda carry: bool(np.all(carry.stopped)),
        )
        if done < num_steps and not np.all(carry.stopped):
            warnings.warn(
                f"fit was interrupted after {done} of {num_steps} steps: this result holds what there is",
                stacklevel=2,
            )
    else:
        carry = _whole(pure, carry)
    restarts, rest = None, pure.rest
    if lanes:
        restarts = _compare(pure, carry.moving, jax.random.fold_in(key, 4))
        carry, rest = jax.tree.map(lambda x: x[restarts.best], (carry, rest))
    free, optimizer_state = start.skeleton.unpack(carry.moving)
    bounds = carry.bounds
    wrapped = eqx.combine(free, start.rest_skeleton.unpack(rest))
    return Fit(
        params=unwrap(wrapped),
        bounds=bounds[: int(carry.num_done)] if concrete else bounds,
        state=optimizer_state,
        num_skipped=carry.num_skipped,
        objective=objective,
        data=batches.whole(),
        minimize=minimize,
        batch_size=batches.batch_size,
        key=jax.random.fold_in(key, 2),
        stopped=carry.stopped,
        restarts=restarts,
        wrapped=wrapped,
    )


def _step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    start: Start,
    batches: Minibatches,
    minimize: bool,
) -> Callable[..., tuple[list[Array], Array, Array]]:
    """One step as a function of arrays: `(key, *moving, *rest, *batch) -> (moving, bound, finite)`."""
    n, m = start.skeleton.num_arrays, start.rest_skeleton.num_arrays

    def step(key: PRNGKeyArray, *arrays: Array) -> tuple[list[Array], Array, Array]:
        moving, batch = arrays[:n], batches.unpack(arrays[n + m :])
        free, state = start.skeleton.unpack(moving)
        rest = start.rest_skeleton.unpack(arrays[n : n + m])

        def loss(free: Any) -> Array:
            bound = jnp.asarray(objective(key, unwrap(eqx.combine(free, rest)), *batch))
            if bound.shape != () or not jnp.issubdtype(bound.dtype, jnp.floating):
                raise WeftError(
                    "fit: the objective must give one floating number, got an array of shape "
                    f"{bound.shape} and dtype {bound.dtype}; take its mean"
                )
            return bound if minimize else -bound

        value, slope = jax.value_and_grad(loss)(free)
        finite = jnp.isfinite(value)
        for x in jax.tree.leaves(slope):
            finite &= jnp.all(jnp.isfinite(x))
        updates, state = optimizer.update(
            slope, state, free, value=value, grad=slope, value_fn=loss
        )
        new, _ = pack((optax.apply_updates(free, updates), state))
        kept = [jnp.where(finite, n.astype(o.dtype), o) for n, o in zip(new, moving, strict=True)]
        return kept, value if minimize else -value, finite

    return step


def _iterate(pure: _Pure, state: FitState, start: Any, stop: Any) -> FitState:
    batches, rule = pure.batches, pure.rule

    def one(i: Any, key: PRNGKeyArray, rest: list[Array], state: FitState) -> FitState:
        step_key, order_key = (jax.random.fold_in(key, k) for k in range(2))
        order = batches.shuffle(order_key, i, state.order)
        moving, bound, finite = pure.code(
            *pure.captured,
            jax.random.fold_in(step_key, i),
            *state.moving,
            *rest,
            *batches.take(order, i),
        )
        # A first step without a finite gradient is marked as one without a finite bound, which
        # stops the fit.
        bound = jnp.where(finite | (i > 0), bound, jnp.nan).astype(state.bounds.dtype)
        new = FitState(
            moving=moving,
            bounds=state.bounds.at[i].set(bound),
            num_skipped=state.num_skipped + jnp.int32(~finite),
            order=order,
            seen=None,
            stopped=state.stopped,
            num_done=state.num_done + 1,
        )
        if rule is None:
            return new
        seen, now = rule.update(state.seen, i, -bound if pure.minimize else bound)
        new = dataclasses.replace(new, seen=seen, stopped=now)
        return jax.tree.map(lambda n, o: jnp.where(state.stopped, o, n), new, state)

    def body(carry: tuple[Any, FitState]) -> tuple[Any, FitState]:
        i, state = carry
        # The iteration is one number for all restarts: their epochs begin together.
        return i + 1, pure.over_lanes(partial(one, i))(pure.key, pure.rest, state)

    def proceed(carry: tuple[Any, FitState]) -> Array:
        i, state = carry
        return (i < stop) & (True if rule is None else ~jnp.all(state.stopped))

    return jax.lax.while_loop(proceed, body, (start, state))[1]


@eqx.filter_jit(donate="all-except-first")
def _advance(fixed: tuple[Any, ...], state: FitState) -> FitState:
    pure, start, stop = fixed
    return _iterate(pure, state, start, stop)


@eqx.filter_jit
def _whole(pure: _Pure, state: FitState) -> FitState:
    return _iterate(pure, state, jnp.int32(0), jnp.int32(state.bounds.shape[-1]))


@eqx.filter_jit
def _compare(pure: _Pure, moving: list[Array], key: PRNGKeyArray) -> Restarts:
    """The bound of every restart at its last parameters, by fresh keys (and batches) that they share."""

    def estimate(i: Any) -> Array:
        order = pure.batches.shuffle(jax.random.fold_in(key, 0), i, pure.batches.order())
        batch = pure.batches.take(order, i)
        step_key = jax.random.fold_in(jax.random.fold_in(key, 1), i)

        def one(moving: list[Array], rest: list[Array]) -> Array:
            return pure.code(*pure.captured, step_key, *moving, *rest, *batch)[1]

        return jax.vmap(one)(moving, pure.rest)

    found = jax.lax.map(estimate, jnp.arange(NUM_ESTIMATES))
    bounds = jnp.mean(found, 0)
    worst = jnp.inf if pure.minimize else -jnp.inf
    ranked = jnp.where(jnp.isfinite(bounds), bounds, worst)
    return Restarts(
        bounds=bounds,
        errors=jnp.std(found, 0, ddof=1) / jnp.sqrt(NUM_ESTIMATES),
        best=jnp.argmin(ranked) if pure.minimize else jnp.argmax(ranked),
    )


def _explain(
    key: PRNGKeyArray,
    objective: Objective,
    params: Any,
    batches: Minibatches,
) -> DensityError:
    """The error for a first step that is not finite."""
    step_key = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    order_key = jax.random.fold_in(key, 1)
    order = batches.shuffle(order_key, 0, batches.order())
    batch = batches.unpack(batches.take(order, 0))
    floating, others = eqx.partition(params, eqx.is_inexact_array)

    def bound(floating: Any) -> Array:
        return jnp.asarray(objective(step_key, eqx.combine(floating, others), *batch))

    value, slope = jax.value_and_grad(bound)(floating)
    explain = getattr(objective, "explain", None)
    bad = _not_finite(params)
    if bad:
        reason = f"the parameters {bad} are not finite to begin with"
    elif np.isfinite(value):
        reason = f"its gradient is not finite with respect to {_not_finite(slope)}"
    elif explain is not None:
        reason = explain(step_key, params, *batch)
    else:
        reason = f"the parameters and their gradients are finite except for {_not_finite(slope) or 'none'}"
    return DensityError(
        f"fit: the first bound is {float(value):.6g}, before any step is taken: {reason}. Begin at other parameters, "
        "or check the model and the data there"
    )


def _not_finite(tree: Any) -> str:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return ", ".join(
        f"params{jax.tree_util.keystr(path)}"
        for path, x in flat
        if eqx.is_inexact_array(x) and not np.isfinite(x).all()
    )
