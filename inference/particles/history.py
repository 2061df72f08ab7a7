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
        ess: effective sample size of the weights after each step.
        log_increments: by how much each step raised the log evidence.
        resampled: whether the particles were resampled before the step.
        num_ancestors: from how many particles of the step `since` those of the step descend; 0 where that is not known.
        since: an earlier step, the first one as long as many of its particles have descendants; see
            `weft.inference.coalescence`.
        collected: what `collect` gave, `(step, ...)`.
        tree: the particles that have descendants among the last ones; of `history="ancestors"`.
        ancestors: `(step, particle)`, which particle of the step before each descends from; `None`
            without the full history.
        particles: `(step, particle, ...)`; `None` without the full history.
        log_weights: the same of their weights.
        info: what rejuvenation had to say, `(step,)` each; zeros where there was none.
        undefined: how many potentials of each step were no number, and count as zero.
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
    """Which particles of each step those of the last one descend from, themselves at the end."""

    def back(index: Array, chosen: Array) -> Any:
        return chosen[index], index

    return jax.lax.scan(back, last, ancestors, reverse=True)[1]


def along_lineages(ancestors: Int[Array, "step particle"], tree: Any) -> Any:
    """What arrays `(step, particle, ...)` hold along the paths to the last particles, `(particle, step, ...)`."""
    indices = lineage(jnp.arange(ancestors.shape[1]), ancestors)

    def one(x: Array) -> Array:
        taken = jax.vmap(lambda row, index: row[index])(x, indices)
        return jnp.swapaxes(taken, 0, 1)

    return jax.tree.map(one, tree)


def along(indices: Int[Array, " step"], particles: Any) -> Any:
    """What the particles of one path are, `(step, ...)`, out of `(step, particle, ...)`."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, indices), particles)


def moments(choices: Any, weights: Float[Array, " particle"]) -> Any:
    """Weighted mean and standard deviation of everything floating in the choices; weights are normalised."""

    def one(x: Array) -> dict[str, Array]:
        w = weights.reshape(-1, *(1,) * (x.ndim - 1))
        x = jnp.where(w > 0, x, 0)  # where nothing can be, it may be no number
        mean = jnp.sum(w * x, 0)
        return {"mean": mean, "sd": jnp.sqrt(jnp.sum(w * (x - mean) ** 2, 0))}

    floating = eqx.filter(choices, eqx.is_inexact_array)
    return jax.tree.map(one, floating)
