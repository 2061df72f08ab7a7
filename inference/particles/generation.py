"""One pass of sequential Monte Carlo: resample, move, weigh, record.

A `Generation` holds the particles of one step with their weights, and from which particle of the previous step each
descends. A step is two functions. `selected` makes the chosen particles the parents of the next step, and `offspring`
moves and weighs them. A whole pass is a scan over these two, which records the generations.

One particle of each step may follow a given path (conditional SMC). Without a key, everything that is drawn is a choice
of an anonymous run of the program around it (`staged`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .feynman_kac import FeynmanKac


class Generation(eqx.Module):
    """The particles of one step. If its arrays lead with the step, those of all steps.

    Attributes:
        particles: `(particle, ...)`.
        log_weights: the log weights since the last resampling.
        ancestors: from which particle of the previous step each descends.
        undefined: the number of potentials of the step that were NaN. They count as zero.
    """

    particles: Any
    log_weights: Float[Array, "*step particle"]
    ancestors: Int[Array, "*step particle"]
    undefined: Int[Array, "*step"] | None = None

    def selected(self, ancestors: Int[Array, " particle"]) -> Generation:
        """The particles with these indices, equally weighted. They are the parents of the next step."""
        particles = jax.tree.map(lambda x: x[ancestors], self.particles)
        return Generation(particles, jnp.zeros(ancestors.shape, self.log_weights.dtype), ancestors)


Choose = Callable[[PRNGKeyArray | None, Int[Array, ""], Generation, Any], Int[Array, " particle"]]
"""Chooses ancestors: a function of a key, the coming step, the last generation, and the next point of a given path."""


def first_generation(
    key: PRNGKeyArray | None, model: FeynmanKac, num_particles: int, given: Any = None
) -> Generation:
    """The particles of the first step. The first one follows the given path, if there is one."""
    found = _each(model.init, key, num_particles - (given is not None))
    if given is not None:
        found = _joined(model.replay(jnp.int32(0), None, given), found)
    particles, potentials, undefined = _weighed(found)
    return Generation(particles, potentials, jnp.arange(num_particles), undefined)


def offspring(
    key: PRNGKeyArray | None,
    model: FeynmanKac,
    t: Int[Array, ""],
    parents: Generation,
    given: Any = None,
) -> Generation:
    """The generation of step `t`: every parent is moved, and its weight multiplied by the potential."""
    first = 0 if given is None else 1
    rest = jax.tree.map(lambda x: x[first:], parents.particles)
    num = parents.ancestors.shape[0] - first
    found = _each(lambda key, particle: model.step(key, t, particle), key, num, rest)
    if given is not None:
        parent = jax.tree.map(lambda x: x[0], parents.particles)
        found = _joined(model.replay(t, parent, given), found)
    particles, potentials, undefined = _weighed(found)
    log_weights = parents.log_weights + potentials
    return Generation(particles, log_weights, parents.ancestors, undefined)


def whole_pass(
    key: PRNGKeyArray | None,
    model: FeynmanKac,
    num_particles: int,
    choose: Choose,
    path: Any = None,
) -> Generation:
    """All generations, `(step, ...)`, of a run that resamples before every step.

    Args:
        key: a random key; None inside a program.
        model: the model, which gives the steps.
        num_particles: the number of particles of each step.
        choose: how ancestors are chosen.
        path: the choices of every step, `(step, ...)`, of a path that the first particles follow.
    """
    first_key, rest = (None, None) if key is None else jax.random.split(key)

    def step(before: Generation, x: Any) -> tuple[Generation, Generation]:
        t, given = x
        choose_key, move_key = (None, None)
        if rest is not None:
            choose_key, move_key = jax.random.split(jax.random.fold_in(rest, t))
        parents = before.selected(choose(choose_key, t, before, given))
        now = offspring(move_key, model, t, parents, given)
        return now, now

    given, then = None, None
    if path is not None:
        given = jax.tree.map(lambda x: x[0], path)
        then = jax.tree.map(lambda x: x[1:], path)
    first = first_generation(first_key, model, num_particles, given)
    _, later = jax.lax.scan(step, first, (jnp.arange(1, model.num_steps), then))
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, later)


def log_mean_weight(generation: Generation) -> Float[Array, "*step"]:
    """The increase of the log evidence at each step, in a run that resamples before every step."""
    return logsumexp(generation.log_weights, axis=-1) - jnp.log(generation.log_weights.shape[-1])


def log_transitions(
    model: FeynmanKac, t: Int[Array, ""], particles: Any, now: Any
) -> Float[Array, " particle"]:
    """The log density of a step to given choices from each particle. NaN becomes minus infinity."""
    found = jax.vmap(model.log_transition, (None, 0, None))(t, particles, now)
    return jnp.where(jnp.isnan(found), -jnp.inf, found)


def particle_keys(key: PRNGKeyArray, num: int) -> PRNGKeyArray:
    """A key for each particle.

    Threefry is a keyed permutation of counters. Different keys give independent streams, even if they are consecutive
    (Salmon et al. 2011). So the keys are counted on from `key`, which saves one of the three hashes that a draw costs.
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.split(key, num)
    high, low = jax.random.key_data(key)
    words = jnp.stack(jnp.broadcast_arrays(high, low + jnp.arange(num, dtype=low.dtype)), 1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _each(f: Callable[..., Any], key: PRNGKeyArray | None, num: int, *xs: Any) -> Any:
    """`f(key, *xs)` for each particle, with a key of its own; or with None, if there is no key."""
    if key is None:
        return jax.vmap(lambda _, *xs: f(None, *xs))(jnp.arange(num), *xs)
    return jax.vmap(f)(particle_keys(key, num), *xs)


def _joined(own: Any, others: Any) -> Any:
    return jax.tree.map(lambda x, xs: jnp.concatenate([jnp.asarray(x)[None], xs]), own, others)


def _weighed(found: tuple[Any, Array]) -> tuple[Any, Array, Array]:
    """The particles, their log potentials with NaN replaced by minus infinity, and the number of NaNs."""
    particles, potentials = jax.tree.map(jnp.asarray, found)
    no_number = jnp.isnan(potentials)
    return particles, jnp.where(no_number, -jnp.inf, potentials), jnp.sum(no_number)
