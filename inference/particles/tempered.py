"""The Feynman-Kac model of a path of laws. Particles are weighed from one law to the next, and moved by kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .bridges import LawPath
from .feynman_kac import FeynmanKac
from .moves import NUM_MOVES, hamiltonian_moves, moves_of_kernel


class Particle(eqx.Module):
    """One particle, and how far all particles have come.

    Attributes:
        choices: a nested dict of the latent choices.
        terms: the log likelihood at the choices, of each row, or one number.
        level: the temperature, or the number of rows included.
        ahead: the level after the step.
        done: whether the step after the last level has been made.
        jumped: whether the last level is further than it should be.
        step_size: the step size of the default moves.
    """

    choices: dict[str, Any]
    terms: Float[Array, " row"]
    level: Float[Array, ""]
    ahead: Float[Array, ""]
    done: Bool[Array, ""]
    jumped: Bool[Array, ""]
    step_size: Float[Array, ""]


class Tempered(FeynmanKac):
    """The Feynman-Kac model of a path of laws.

    Attributes:
        path: the laws.
        levels: the level of each step; `None` if they are chosen.
        ess: the share of particles by which they are chosen.
        num_levels: the largest number of levels.
        num_moves: the number of transitions after a resampling; `None` as in `tempering`.
    """

    path: LawPath
    levels: Float[Array, " level"] | None
    ess: Any
    num_levels: int = eqx.field(static=True)
    num_moves: int | None = eqx.field(static=True)
    keeps_lineage = True  # `adapt` writes the level into particles

    @property
    def num_steps(self) -> int:
        """One for the first particles, one for each level, and one that weighs nothing."""
        return self.num_levels + 2

    def init(self, key: PRNGKeyArray) -> tuple[Particle, Float[Array, ""]]:
        """A draw from the first law of the path."""
        choices = self.path.draw(key)
        zero = jnp.zeros(())
        # Stable for d independent coordinates (Beskos et al. 2013).
        size = sum(np.prod(s.shape) for s in jax.tree.leaves(choices))
        step_size = jnp.asarray(max(size, 1) ** -0.25, zero.dtype)
        terms = self._terms(choices)
        no = jnp.zeros((), bool)
        return Particle(choices, terms, zero, zero, no, no, step_size), zero

    def adapt(self, t: Any, particles: Particle, log_weights: Array) -> Particle:
        """The particles with the level of the coming step."""
        jumped = particles.jumped
        if self.levels is None:
            chosen = self._chosen(particles, log_weights)
            ahead = jnp.where(t >= self.num_levels, 1.0, chosen)
            jumped = jumped | (ahead > chosen)
        else:
            ahead = self.levels[jnp.minimum(t, self.num_levels) - 1]
        ahead = jnp.broadcast_to(ahead, particles.level.shape)
        done = particles.level >= self.path.last
        return dataclasses.replace(particles, ahead=ahead, done=done, jumped=jumped)

    def remark(self, particles: Particle) -> str | None:
        """A warning if the temperature had to rise too far at the end."""
        if not bool(jnp.any(particles.jumped)):
            return None
        return (
            f"After {self.num_levels} steps (max_steps) the temperature was not yet one and was set to it, however "
            "far: the evidence and the particles are not to be trusted. Take more steps, or begin at a guide near the "
            "posterior."
        )

    def step(
        self, key: PRNGKeyArray, t: Any, particle: Particle
    ) -> tuple[Particle, Float[Array, ""]]:
        """The same particle at the next level, weighed by the change of law."""
        share = self.path.share(particle.ahead) - self.path.share(particle.level)
        # Rows that do not enter must not count, even if their density is zero.
        change = jnp.sum(jnp.where(share > 0, share * particle.terms, 0))
        return dataclasses.replace(particle, level=particle.ahead), change

    def rejuvenate(
        self, key: PRNGKeyArray, t: Any, particles: Particle, kernel: Any
    ) -> tuple[Particle, dict[str, Array]]:
        """Moves that leave the law of the present level invariant."""
        target = self.path.at(particles.level[0])
        step_size = particles.step_size[0]
        choices, num_moves = particles.choices, self.num_moves
        if kernel is None:
            choices, step_size, info = hamiltonian_moves(key, choices, target, step_size, num_moves)
        else:
            choices, info = moves_of_kernel(key, choices, target, kernel, num_moves or NUM_MOVES)
        particles = dataclasses.replace(
            particles,
            choices=choices,
            terms=jax.vmap(self._terms)(choices),
            step_size=jnp.broadcast_to(step_size, particles.step_size.shape),
        )
        return particles, {**info, self.path.unit: particles.level[0]}

    def finished(self, particles: Particle) -> Bool[Array, ""]:
        """Whether the target is reached, and the step after it is made."""
        return jnp.all(particles.done)

    def choices(self, particle: Particle) -> dict[str, Any]:
        """The latent choices."""
        return particle.choices

    def _terms(self, choices: dict[str, Any]) -> Float[Array, " row"]:
        """The terms of the path. NaN counts as a density of zero: a Cholesky factor failed there, for instance."""
        terms = self.path.terms(choices)
        return jnp.where(jnp.isnan(terms), -jnp.inf, terms)

    def _chosen(self, particles: Particle, log_weights: Array) -> Float[Array, ""]:
        """The next temperature by bisection on the conditional effective sample size."""
        level, terms = particles.level[0], particles.terms[:, 0]
        log_weights = log_weights - logsumexp(log_weights)
        # A little less than asked for, so that rounding does not keep `smc` from resampling at the same share.
        wanted = 0.999 * self.ess

        def too_far(ahead: Array) -> Array:
            factors = jnp.where(ahead > level, (ahead - level) * terms, 0)
            factors = factors - jnp.max(
                factors
            )  # otherwise large ones would cancel below, and leave rounding errors
            share = 2 * logsumexp(log_weights + factors) - logsumexp(log_weights + 2 * factors)
            return ~(jnp.exp(share) >= wanted)  # NaN is too far, too

        def halved(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bracket
            middle = (low + high) / 2
            far = too_far(middle)
            return jnp.where(far, low, middle), jnp.where(far, middle, high)

        one = jnp.ones_like(level)
        _, high = jax.lax.fori_loop(0, 60, halved, (level, one))
        return jnp.where(too_far(one), high, one)
