r"""Sequential Monte Carlo as a part of a program: `normalize(target, by=smc(filtering(), N))` draws and scores with it.

All that is random here are choices of anonymous runs (`draw`). So an expectation is differentiated through them by
their strategies. Particles are resampled independently at every step. A path `x` that is drawn has the density
$\gamma(x) / \hat Z$, by the run that drew it. A path that is given has such a density by a run around it, in which it
is one of the particles (Andrieu, Doucet and Holenstein 2010). For these $E[1/d \mid x] = 1/q(x)$ and $E[d'] = q(x)$.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from weft.ppl import Target, draw, gen, sample
from weft.ppl.stage.addresses import unflatten

from .feynman_kac import FeynmanKac
from .generation import Generation, log_mean_weight, whole_pass
from .history import along, lineage


def draw_path(
    model: FeynmanKac, target: Target, num_particles: int
) -> tuple[dict[str, Any], Array, Array]:
    """A path drawn by its weight, its log density under the target, and the log evidence of the run."""
    found = _run(model, None, num_particles)
    indices = lineage(draw(_choose(found.log_weights[-1])).value, found.ancestors)
    choices = unflatten(model.steps_of(along(indices, found.particles)))
    return choices, target.log_density(choices), jnp.sum(log_mean_weight(found))


def evidence_around(model: FeynmanKac, choices: dict[str, Any], num_particles: int) -> Array:
    """The log evidence of a run in which one particle follows the given path."""
    found = _run(model, model.reference(choices), num_particles)
    return jnp.sum(log_mean_weight(found))


def _run(model: FeynmanKac, path: Any, num_particles: int) -> Generation:
    """All particles. If a path is given, the first particle of each step follows it."""

    def choose(key: Any, t: Array, before: Generation, given: Any) -> Array:
        new = num_particles - (given is not None)
        chosen = jax.vmap(lambda _: draw(_choose(before.log_weights)).value)(jnp.arange(new))
        own = jnp.zeros(num_particles - new, chosen.dtype)
        return jnp.concatenate([own, chosen])

    return whole_pass(None, model, num_particles, choose, path)


@gen
def _choose(log_weights: Array) -> Array:
    return sample("particle", dist.Categorical(logits=log_weights))
