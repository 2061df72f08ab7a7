"""Fitting: stochastic gradient ascent of an objective over a pytree of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from weft.inference.run import libraries
from weft.inference.run.loop import iterate
from weft.inference.run.runner import tracing
from weft.ppl.stage.errors import DensityError, WeftError
from weft.ppl.stage.keys import as_key
from weft.ppl.stage.packing import pack
from weft.ppl.stage.staging import stage

from .ascent import Ascent, AscentState, compare
from .fitted import Fit as Fit
from .fitted import Restarts as Restarts
from .minibatches import Minibatches, warn_unscaled
from .parameters import constrained as constrained
from .parameters import fixed as fixed
from .parameters import unwrap
from .starts import FitStart
from .stopping import plateau

if TYPE_CHECKING:
    import optax

Objective = Callable[..., Float[Array, ""]]


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

    Each step estimates the objective and its gradient, with a key and a minibatch of its own. A step whose bound or
    gradient is not finite changes nothing and is counted. Ctrl-C returns the fit so far, with a warning.

    Several restarts run at once, under one `jax.vmap`. Each runs as `fit` alone would with one of
    `jax.random.split(key, num_restarts)`. The restart with the best bound at the end is returned. Its bound is the mean
    of 100 estimates at the last parameters, with new keys that all restarts share. (The estimate of the last step is
    one draw, and would mostly pick the luckiest.) `Fit.restarts` has the bounds of all, and the report has their
    spread.

    Args:
        key: a random key.
        objective: an estimator `f(key, params, *batch)` of a bound that is maximised: `elbo(target, guide)`, or any
            function that gives a scalar.
        params: where to begin: a pytree, networks included. Floating arrays and Python floats are optimised.
            `constrained(value, constraint)` keeps a leaf in a set, and `fixed(value)` leaves a leaf as it is. Or a
            function `init(key)` that gives such a pytree, from which each restart draws its own. Take
            `jittered(params)` if nothing better is known.
        optimizer: an Optax optimiser. Clipping and schedules are Optax's:
            `optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))`.
        num_steps: the most steps.
        data: arrays (or pytrees of arrays) that share their leading axis. The objective takes them after the
            parameters.
        batch_size: the number of rows of data in a step; all rows if `None`. They are drawn without replacement, in
            epochs of `N // batch_size` steps. The target must scale what it sees: `scale(model, {"row": N /
            batch_size})`. If it does not, and has choices that all rows share, a warning says so.
        minimize: whether the objective is a loss.
        num_restarts: the number of fits. For more than one, `params` must be a function of a key.
        stop: a rule for an early stop, `plateau(window)`. `Fit.bounds` is cut there. Under `jit` or `vmap` it is not
            cut, and steps that were not made are NaN.
        state: the state of the optimiser of an earlier fit, to continue it: `fit(key, objective, before.wrapped,
            optimizer, num_steps, state=before.state)`.
        progress: whether to show a progress bar.

    Returns:
        The fit.

    Raises:
        WeftError: if the objective, the parameters or the data do not match.
        DensityError: if the first bound, or its gradient, is not finite (for every restart, if there are several). The
            message names what makes it so.

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
    optimizer = libraries.optax.with_extra_args_support(optimizer)
    start = FitStart.make(key, params, num_restarts, optimizer, state)
    if (check := getattr(objective, "check", None)) is not None:
        check(start.params(0), *batches.example())
        warn_unscaled(objective, start.params(0), batches)
    step = _step(objective, optimizer, start, batches, minimize)
    code, captured = stage(
        step, [start.keys[0], *start.moving[0], *start.rest[0], *batches.example_arrays()]
    )
    several = num_restarts > 1
    ascent = Ascent(
        code,
        captured,
        jnp.stack(start.keys) if several else key,
        _stacked(start.rest),
        batches,
        jax.tree.map(jnp.asarray, stop),
        num_steps,
        minimize,
        several,
    )
    begin = ascent.begin(_stacked(start.moving))
    concrete = not tracing(key, begin, captured, batches)
    end = (
        _in_chunks(ascent, begin, objective, start, progress) if concrete else _whole(ascent, begin)
    )
    run = end.run
    restarts, rest = None, ascent.rest
    if several:
        restarts = compare(ascent, run.moving, jax.random.fold_in(key, 4))
        run, rest = jax.tree.map(lambda x: x[restarts.best], (run, rest))
    free, optimizer_state = start.skeleton.unpack(run.moving)
    wrapped = eqx.combine(free, start.rest_skeleton.unpack(rest))
    return Fit(
        params=unwrap(wrapped),
        bounds=run.bounds[: int(run.num_done)] if concrete else run.bounds,
        state=optimizer_state,
        num_skipped=run.num_skipped,
        objective=objective,
        data=batches.whole(),
        minimize=minimize,
        batch_size=batches.batch_size,
        key=jax.random.fold_in(key, 2),
        stopped=run.stopped,
        restarts=restarts,
        wrapped=wrapped,
    )


def _stacked(runs: list[list[Array]]) -> list[Array]:
    """The arrays of all runs, stacked. They are copies in any case, since the state of a loop is donated."""
    each = [list(x) for x in zip(*runs, strict=True)]
    several = len(runs) > 1
    return [jnp.stack(x) if several else jnp.array(x[0], x[0].dtype, copy=True) for x in each]


def _in_chunks(
    ascent: Ascent, begin: AscentState, objective: Objective, start: FitStart, progress: bool
) -> AscentState:
    """The state after all steps, in chunks that the host drives. A first bound that is not finite ends the fit."""

    def require_finite(state: AscentState) -> tuple[AscentState, None]:
        if int(state.iteration) and not np.isfinite(state.run.bounds[..., 0]).any():
            raise _explain(start.keys[0], objective, start.params(0), ascent.batches)
        return state, None

    state = ascent.in_chunks(
        start.keys[0],
        begin,
        None,
        title="fit",
        unit="steps",
        progress=progress,
        before_chunk=require_finite,
    )
    return require_finite(state)[0]


@eqx.filter_jit
def _whole(ascent: Ascent, state: AscentState) -> AscentState:
    return iterate(ascent, None, jax.random.key(0), state, 0, ascent.num_steps)


def _step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    start: FitStart,
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
        new, _ = pack((libraries.optax.apply_updates(free, updates), state))
        kept = [jnp.where(finite, n.astype(o.dtype), o) for n, o in zip(new, moving, strict=True)]
        return kept, value if minimize else -value, finite

    return step


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
