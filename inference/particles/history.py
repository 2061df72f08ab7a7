"""What a run of sequential Monte Carlo keeps of its steps, and the paths of its particles."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .ancestral_tree import AncestralTree


class History(eqx.Module):
    """What is known of every step.

    Attributes:
        ess: the effective sample size of the weights after each step.
        log_increments: the increase of the log evidence at each step.
        resampled: whether the particles were resampled before the step.
        num_ancestors: the number of particles of step `since` from which those of the step descend; 0 if it is not
            known.
        since: an earlier step. It is the first one as long as many of its particles have descendants; see
            `weft.inference.particles.coalescence`.
        collected: the values of `collect`, `(step, ...)`.
        tree: with `history="ancestors"`, the particles from which the last ones descend.
        ancestors: `(step, particle)`: from which particle of the previous step each descends. `None` without the full
            history.
        particles: `(step, particle, ...)`. `None` without the full history.
        log_weights: the log weights, `(step, particle)`. `None` without the full history.
        info: the report of rejuvenation, `(step,)` for each entry; zeros if there was none.
        undefined: the number of potentials of each step that were NaN. They count as zero.
    """

    ess: Float[Array, " step"]
    log_increments: Float[Array, " step"]
    resampled: Bool[Array, " step"]
    num_ancestors: Int[Array, " step"]
    since: Int[Array, " step"]
    collected: Any
    tree: AncestralTree | None = None
    ancestors: Int[Array, "step particle"] | None = None
    particles: Any = None
    log_weights: Float[Array, "step particle"] | None = None
    info: dict[str, Array] = eqx.field(default_factory=dict)
    undefined: Int[Array, " step"] | None = None


def lineage(
    last: Int[Array, "*n"], ancestors: Int[Array, "step particle"]
) -> Int[Array, "step *n"]:
    """The particles of each step from which those of the last step descend. The last step's own indices come last."""

    def back(index: Array, chosen: Array) -> Any:
        return chosen[index], index

    return jax.lax.scan(back, last, ancestors, reverse=True)[1]


def along_lineages(ancestors: Int[Array, "step particle"], tree: Any) -> Any:
    """The entries of arrays `(step, particle, ...)` along the paths to the last particles, `(particle, step, ...)`."""
    indices = lineage(jnp.arange(ancestors.shape[1]), ancestors)

    def one(x: Array) -> Array:
        taken = jax.vmap(lambda row, index: row[index])(x, indices)
        return jnp.swapaxes(taken, 0, 1)

    return jax.tree.map(one, tree)


def along(indices: Int[Array, " step"], particles: Any) -> Any:
    """The particles of one path, `(step, ...)`, out of `(step, particle, ...)`."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, indices), particles)


def moments(choices: Any, weights: Float[Array, " particle"]) -> Any:
    """The weighted mean and standard deviation of all floating choices. The weights are normalised."""

    def one(x: Array) -> dict[str, Array]:
        w = weights.reshape(-1, *(1,) * (x.ndim - 1))
        x = jnp.where(w > 0, x, 0)  # a particle of weight zero may hold NaN
        mean = jnp.sum(w * x, 0)
        return {"mean": mean, "sd": jnp.sqrt(jnp.sum(w * (x - mean) ** 2, 0))}

    floating = eqx.filter(choices, eqx.is_inexact_array)
    return jax.tree.map(one, floating)
