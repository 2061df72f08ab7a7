"""Fitting: stochastic ascent of an objective over a pytree of parameters, compiled whole, run in chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from weft.ppl.compat import as_key
from weft.ppl.errors import DensityError, WeftError
from weft.ppl.packing import pack
from weft.ppl.staging import stage

from .fitted import Fit as Fit
from .minibatches import Minibatches
from .parameters import constrained as constrained
from .parameters import fixed as fixed
from .parameters import partition, unwrap
from .runner import run_chunks, tracing

Objective = Callable[..., Float[Array, ""]]


class FitState(eqx.Module):
    """The state of a fit.

    Attributes:
        moving: the arrays of the parameters, on the unconstrained scale, and of the optimiser.
        bounds: `(num_steps,)`, the bound estimated at each step so far.
        num_skipped: steps whose bound or gradient was not finite; they changed nothing.
        order: `(N,)`, the rows of the data in the order of this epoch; empty without minibatches.
    """

    moving: list[Array]
    bounds: Float[Array, " steps"]
    num_skipped: Int[Array, ""]
    order: Int[Array, " rows"]


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
    state: Any = None,
    progress: bool = True,
) -> Fit:
    """Maximise the expectation of an objective by stochastic gradient ascent.

    Each step estimates the objective and its gradient with a key, and a minibatch, of its own. A
    step whose bound or gradient is not finite changes nothing and is counted. Ctrl-C returns the
    fit so far, with a warning.

    Args:
        key: a random key.
        objective: an estimator `f(key, params, *batch)` of a bound to be maximised: `elbo(target,
            guide)`, or any function that gives a scalar.
        params: where to begin: a pytree, networks included. Floating arrays and Python floats are
            optimised; `constrained(value, constraint)` keeps a leaf in a set, `fixed(value)` leaves
            one as it is.
        optimizer: an Optax optimiser.
        num_steps: how many steps.
        data: arrays (or pytrees of them) that share their leading axis, handed to the objective
            after the parameters.
        batch_size: rows of the data in a step, drawn without replacement in epochs of `N //
            batch_size` steps; all rows if `None`. The objective scales what it sees: `scale(model,
            {"row": N / batch_size})`.
        minimize: whether the objective is a loss.
        state: the state of the optimiser to go on with, from an earlier `Fit.state`.
        progress: whether to show a progress bar.

    Returns:
        The fit.

    Raises:
        WeftError: if the objective, the parameters or the data make no sense together.
        DensityError: if the first bound, or its gradient, is not finite; the message names what
            makes it so.

    Example:
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
    if not isinstance(num_steps, (int, np.integer)) or num_steps < 1:
        raise WeftError(f"fit: num_steps must be a positive integer, got {num_steps!r}")
    key = as_key(key)
    batches = Minibatches.make(data, batch_size)
    check = getattr(objective, "check", None)
    if check is not None:
        check(unwrap(params), *batches.example())
    free, rest = partition(params)
    if not jax.tree.leaves(free):
        raise WeftError(
            "fit: the parameters hold no floating array to optimise: every leaf is fixed or not floating"
        )
    optimizer = optax.with_extra_args_support(optimizer)
    moving, skeleton = pack((free, optimizer.init(free) if state is None else state))
    step = _step(objective, optimizer, rest, skeleton, batches, minimize)
    code, captured = stage(step, [key, *moving, *batches.example_arrays()])
    # The state is given to compiled code to reuse, and must not be the caller's own arrays.
    carry = FitState(
        moving=[jnp.array(x, x.dtype, copy=True) for x in moving],
        bounds=jnp.full(num_steps, jnp.nan, jnp.result_type(float)),
        num_skipped=jnp.int32(0),
        order=batches.order(),
    )
    pure = (code, captured, key, batches)

    if tracing(key, moving, captured, batches):
        carry, done = _whole(pure, carry), num_steps
    else:

        def advance(carry: FitState, first: int, last: int) -> FitState:
            carry = _advance((*pure, jnp.int32(first), jnp.int32(last)), carry)
            if first == 0 and not np.isfinite(carry.bounds[0]):
                raise _explain(key, objective, unwrap(eqx.combine(free, rest)), batches)
            return carry

        def describe(carry: FitState) -> str:
            recent = np.asarray(carry.bounds)
            recent = recent[np.isfinite(recent)][-100:]
            return f"{'loss' if minimize else 'bound'} {recent.mean():.5g}" if recent.size else ""

        carry, done = run_chunks(
            advance, carry, 0, num_steps, title="fit", progress=progress, describe=describe
        )
        if done < num_steps:
            warnings.warn(
                f"fit was interrupted after {done} of {num_steps} steps: this result holds what there is",
                stacklevel=2,
            )
    free, optimizer_state = skeleton.unpack(carry.moving)
    return Fit(
        params=unwrap(eqx.combine(free, rest)),
        bounds=carry.bounds[:done],
        state=optimizer_state,
        num_skipped=carry.num_skipped,
        objective=objective,
        data=batches.whole(),
        minimize=minimize,
        batch_size=batches.batch_size,
        key=jax.random.fold_in(key, 2),
    )


def _step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    rest: Any,
    skeleton: Any,
    batches: Minibatches,
    minimize: bool,
) -> Callable[..., tuple[list[Array], Array, Array]]:
    """One step as a function of arrays: `(key, *moving, *batch) -> (moving, bound, finite)`."""

    def step(key: PRNGKeyArray, *arrays: Array) -> tuple[list[Array], Array, Array]:
        moving, batch = arrays[: skeleton.num_arrays], batches.unpack(arrays[skeleton.num_arrays :])
        free, state = skeleton.unpack(moving)

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


def _iterate(fixed: tuple[Any, ...], state: FitState, start: Any, stop: Any) -> FitState:
    code, captured, key, batches = fixed
    step_key, order_key = (jax.random.fold_in(key, i) for i in range(2))

    def body(i: Any, state: FitState) -> FitState:
        order = batches.shuffle(order_key, i, state.order)
        batch = batches.take(order, i)
        moving, bound, finite = code(
            *captured, jax.random.fold_in(step_key, i), *state.moving, *batch
        )
        # A first step without a finite gradient is marked as one without a finite bound, which
        # stops the fit.
        bound = jnp.where(finite | (i > 0), bound, jnp.nan).astype(state.bounds.dtype)
        return FitState(
            moving=moving,
            bounds=state.bounds.at[i].set(bound),
            num_skipped=state.num_skipped + jnp.int32(~finite),
            order=order,
        )

    return jax.lax.fori_loop(start, stop, body, state)


@eqx.filter_jit(donate="all-except-first")
def _advance(fixed: tuple[Any, ...], state: FitState) -> FitState:
    *pure, start, stop = fixed
    return _iterate(tuple(pure), state, start, stop)


@eqx.filter_jit
def _whole(fixed: tuple[Any, ...], state: FitState) -> FitState:
    return _iterate(fixed, state, 0, state.bounds.size)


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
        f"fit: the first bound is {float(value):.6g}, before any step is taken: {reason}. "
        "Begin at other parameters, or check the model and the data there"
    )


def _not_finite(tree: Any) -> str:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return ", ".join(
        f"params{jax.tree_util.keystr(path)}"
        for path, x in flat
        if eqx.is_inexact_array(x) and not np.isfinite(x).all()
    )
