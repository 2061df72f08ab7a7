r"""Sequential Monte Carlo as a part of a program: what `normalize(target, by=smc(filtering(), N))` draws and scores by.

All that is random here are choices of anonymous runs (`draw`), so that an expectation is differentiated through them by
their strategies. Particles are resampled independently at every step. A path `x` that is drawn has the density
:math:`\gamma(x) / \hat Z` by the run that drew it; a path that is given, by a run around it, in which it is one of the
particles (Andrieu, Doucet and Holenstein 2010). For these :math:`E[1/d \mid x] = 1/q(x)` and :math:`E[d'] = q(x)`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jaxtyping import Array
from weft.ppl import Target, draw, gen, sample
from weft.ppl.stage.addresses import unflatten

from .conditional import Genealogy, along, only_the_scan
from .filtering import Filter
from .smc import lineage


def draw_path(
    model: Filter, target: Target, num_particles: int
) -> tuple[dict[str, Any], Array, Array]:
    """A path by its weight, its log density under the target, and the log evidence of the run."""
    only_the_scan(model, "smc inside a program")
    found, log_evidence = _run(model, None, num_particles)
    indices = lineage(draw(_choose(found.log_weights[-1])).value, found.ancestors)
    choices = unflatten(model.steps_of(along(indices, found.particles)))
    return choices, target.log_density(choices), log_evidence


def evidence_around(model: Filter, choices: dict[str, Any], num_particles: int) -> Array:
    """The log evidence of a run in which one particle has the given path."""
    only_the_scan(model, "smc inside a program")
    return _run(model, model.reference(choices), num_particles)[1]


def _run(model: Filter, reference: Any, num_particles: int) -> tuple[Genealogy, Array]:
    """All particles, and the log evidence; the first of each step is that of the reference, if there is one."""
    new = num_particles - (reference is not None)

    def joined(own: Any, others: Any) -> Any:
        return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), own, others)

    def one(_: Array) -> Any:
        return model.init(None)

    particles, log_weights = jax.vmap(one)(jnp.arange(new))
    if reference is not None:
        given = jax.tree.map(lambda x: x[0], reference)
        own = model.replay(jnp.int32(0), None, given)
        particles, log_weights = joined(own, (particles, log_weights))

    def step(carry: Any, x: Any) -> Any:
        particles, log_weights, log_evidence = carry
        t, given = x

        def one(_: Array) -> Any:
            chosen = draw(_choose(log_weights)).value
            return *model.step(None, t, jax.tree.map(lambda x: x[chosen], particles)), chosen

        moved, potentials, chosen = jax.vmap(one)(jnp.arange(new))
        if reference is not None:
            own = model.replay(t, jax.tree.map(lambda x: x[0], particles), given)
            moved, potentials, chosen = joined(
                (*own, jnp.zeros((), chosen.dtype)), (moved, potentials, chosen)
            )
        log_evidence = log_evidence + logsumexp(potentials) - jnp.log(num_particles)
        return (moved, potentials, log_evidence), (moved, potentials, chosen)

    first = (particles, log_weights, jnp.arange(num_particles))
    log_evidence = logsumexp(log_weights) - jnp.log(num_particles)
    then = None if reference is None else jax.tree.map(lambda x: x[1:], reference)
    steps = (jnp.arange(1, model.num_steps), then)
    (_, _, log_evidence), rows = jax.lax.scan(step, (particles, log_weights, log_evidence), steps)
    rows = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rows)
    return Genealogy(*rows), log_evidence


@gen
def _choose(log_weights: Array) -> Array:
    return sample("particle", dist.Categorical(logits=log_weights))
