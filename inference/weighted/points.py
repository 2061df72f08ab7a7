"""A table of weighted points that is filled batch by batch, for importance sampling and enumeration."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from weft.inference.results.particles import Particles
from weft.inference.results.result import Record
from weft.inference.run.algorithm import Algorithm, State
from weft.inference.run.runner import tracing
from weft.ppl import Target, Trace
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.errors import DensityError


class WeightedState(State):
    """A table of weighted points that is being filled.

    Attributes:
        iteration: the number of batches done.
        key: the key from which the keys of the points are folded.
        points: buffers `(num_points, ...)` of choices, derived values and activity, by address.
        log_weights: of shape `(num_points,)`.
    """

    iteration: Int[Array, ""]
    key: PRNGKeyArray
    points: Record
    log_weights: Float[Array, " points"]

    @staticmethod
    def empty(key: PRNGKeyArray, num_points: int, example: tuple[Record, Any]) -> WeightedState:
        """Empty buffers for `num_points` points, each like the example."""
        points, log_weights = jax.tree.map(
            lambda s: jnp.zeros((num_points, *s.shape), s.dtype), example
        )
        return WeightedState(jnp.int32(0), key, points, log_weights)

    def write(self, first: Array, batch: tuple[Record, Array]) -> WeightedState:
        """The state after a batch of points was written at index `first`."""

        def put(buffer: Array, values: Array) -> Array:
            values = values.astype(buffer.dtype)
            return jax.lax.dynamic_update_slice_in_dim(buffer, values, first, 0)

        points, log_weights = jax.tree.map(put, (self.points, self.log_weights), batch)
        return WeightedState(self.iteration + 1, self.key, points, log_weights)


def record(target: Target, trace: Trace) -> Record:
    """The stored parts of a point: latent choices, derived values, and the activity of choices that may be idle."""
    choices, active = flatten(trace.choices), flatten(trace.active)
    sites = target.sites
    idle = [a for a in target.latents if sites[a].conditional or sites[a].masked]
    return {
        "choices": {a: choices[a] for a in target.latents},
        "derived": flatten(trace.derived),
        "active": {a: active[a] for a in idle},
    }


def particles(
    algorithm: Algorithm, state: WeightedState, target: Target, batch_size: int, *, exact: bool
) -> Particles:
    """The result: points with their log weights, and the log evidence.

    The evidence is the mean of the weights for draws of a proposal. It is their sum for an enumeration, `exact`.
    """
    points, log_weights = state.points, state.log_weights
    if not tracing(state):
        done = int(state.iteration) * min(batch_size, log_weights.size)
        if done < log_weights.size:  # interrupted
            points, log_weights = jax.tree.map(lambda x: x[:done], (points, log_weights))
        _check(algorithm, points, np.asarray(log_weights), target, state.key)
    number = log_weights.shape[0]
    total = logsumexp(log_weights)
    log_evidence = total if exact else total - jnp.log(number)
    if exact:
        variance = jnp.zeros_like(total)
    else:  # delta method: the relative variance of a mean of weights
        share = jnp.exp(log_weights - total)
        variance = (number * jnp.sum(share**2) - 1.0) / max(number - 1, 1)
    parts = {name: unflatten(flat) for name, flat in points.items()}
    return Particles(
        **parts,
        log_weights=log_weights,
        log_evidence=log_evidence,
        log_evidence_variance=variance,
        target=target,
        exact=exact,
    )


def _check(
    algorithm: Algorithm,
    points: Record,
    log_weights: np.ndarray,
    target: Target,
    key: PRNGKeyArray,
) -> None:
    name = type(algorithm).__name__
    bad = np.isnan(log_weights) | (log_weights == np.inf)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        choices = unflatten({a: v[first] for a, v in points["choices"].items()})
        terms = flatten(target.log_densities(choices, key=key))
        sites = [a for a, t in terms.items() if (np.isnan(t) | (np.asarray(t) == np.inf)).any()]
        where = ", ".join(repr(a) for a in sites)
        raise DensityError(
            f"{name}: {bad.sum()} of {bad.size} log weights are not numbers or infinite, the first at index {first}: "
            + (
                f"the log density is so at {where}"
                if sites
                else "the density of the proposal is zero there"
            )
        )
    if log_weights.size and log_weights.max() == -np.inf:
        warnings.warn(
            f"{name}: all {log_weights.size} weights are zero: no point has positive density under the target",
            stacklevel=4,
        )
