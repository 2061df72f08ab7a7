"""Smoothing: paths that go back through the particles of a filter.

A path drawn along the genealogy shares its beginning with all others. A path drawn backwards from its end does not
(Godsill, Doucet and West 2004). Particle `i` of the previous step is taken with weight

    W_{t-1}^i m_t(x_t | x_{t-1}^i) G_t(x_{t-1}^i, x_t).

That needs a carry in which nothing random outlives a step except the step's own choices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray
from weft.inference.results.particles import Particles
from weft.ppl.stage.errors import WeftError

from .feynman_kac import FeynmanKac
from .filter import Filter, only_the_scan, require_markov
from .filtering import filtering
from .generation import Generation, log_transitions
from .history import along, lineage
from .panels import Panel
from .results import SequentialParticles


def traced_back(key: PRNGKeyArray, model: FeynmanKac, found: Generation) -> Int[Array, " step"]:
    """A path along the genealogy, with its end drawn by weight: the index of its particle at each step."""
    return lineage(jax.random.categorical(key, found.log_weights[-1]), found.ancestors)


def drawn_back(key: PRNGKeyArray, model: FeynmanKac, found: Generation) -> Int[Array, " step"]:
    """A path drawn from its end, by the density of each step's choices after each particle of the previous step."""
    end_key, rest = jax.random.split(key)
    last = jax.random.categorical(end_key, found.log_weights[-1])
    num_steps = found.log_weights.shape[0]

    def back(index: Array, x: Any) -> Any:
        t, particles, log_weights, then = x
        given = model.taken(jax.tree.map(lambda x: x[index], then))
        onward = log_transitions(model, t, particles, given)
        index = jax.random.categorical(jax.random.fold_in(rest, t), log_weights + onward)
        return index, index

    before = jax.tree.map(lambda x: x[:-1], (found.particles, found.log_weights))
    after = jax.tree.map(lambda x: x[1:], found.particles)
    steps = (jnp.arange(1, num_steps), *before, after)
    _, indices = jax.lax.scan(back, last, steps, reverse=True)
    return jnp.append(indices, last)


def backward_sampling(
    key: PRNGKeyArray,
    particles: SequentialParticles,
    num_samples: int = 100,
    scan: str | None = None,
) -> Particles:
    r"""Smoothing: paths drawn backwards from their end, through the particles of a filter.

    A path begins at a particle drawn by the last weights, and goes back by $W_{t-1}^i\, p(x_t, y_t \mid x_{t-1}^i)$
    (Godsill, Doucet and West 2004). This costs O(N) for each step and path. Unlike the paths that the particles of a
    filter descend from, these do not share their beginnings.

    Args:
        key: a random key.
        particles: the result of `smc(filtering(), ..., history="full")`, for a model without latent choices outside the
            scan. For series under a vmap, a path of each is drawn.
        num_samples: the number of paths.
        scan: the argument given to `filtering`.

    Returns:
        Equally weighted particles: whole paths.

    Raises:
        WeftError: if the run did not keep its history, or a choice stands outside the scan.
        ModelError: if the carry remembers more than the choices of the last step.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import backward_sampling, filtering, smc
        >>> @gen
        ... def random_walk():
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, 1.0))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=3)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
        >>> filtered = smc(filtering(), 200, history="full").run(jax.random.key(0), target, progress=False)
        >>> smoothed = backward_sampling(jax.random.key(1), filtered, num_samples=50)
        >>> smoothed.choices["x"].shape
        (50, 3)
    """
    model, found = genealogy(particles, scan, "backward_sampling")

    def one(key: PRNGKeyArray, model: FeynmanKac, found: Generation) -> Any:
        path = along(drawn_back(key, model, found), found.particles)
        last = jax.tree.map(lambda x: x[-1:], path)
        whole = model.paths(last, jax.tree.map(lambda x: x[None], path))
        return jax.tree.map(lambda x: x[0], whole)

    choices = jax.jit(jax.vmap(lambda k: model.each_series(one, k, found)))(
        jax.random.split(key, num_samples)
    )
    evidence = particles.log_evidence
    return Particles(
        choices=choices,
        log_weights=jnp.full(num_samples, 0.0 if evidence is None else evidence),
        log_evidence=evidence,
        log_evidence_variance=particles.log_evidence_variance,
        target=particles.target,
    )


def genealogy(
    particles: SequentialParticles, scan: str | None, what: str
) -> tuple[Filter | Panel, Generation]:
    """The filter that was run, and its particles of all steps. The axes of a panel's series lead."""
    path = particles.path
    if path is None or path.particles is None or path.log_weights is None:
        raise WeftError(f"{what}: run the filter with history='full'")
    model = filtering(scan=scan)(particles.target)
    only_the_scan(model, what)
    require_markov(model, what)
    assert path.ancestors is not None
    found = Generation(path.particles, path.log_weights, path.ancestors)
    ndim = len(model.panel_shape)
    return model, jax.tree.map(lambda x: jnp.moveaxis(x, 0, ndim), found)
