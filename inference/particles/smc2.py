"""SMC squared: particles of parameters, each with a filter of its own.

A particle is a value of the parameters and `N_x` particles of the states. A step takes its filter one observation
further, and weighs it by the estimate of `p(y_t | y_{1:t-1}, theta)`. After a resampling the parameters move by
particle marginal Metropolis-Hastings, with filters run anew (Chopin, Jacob and Papaspiliopoulos 2013).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from weft.inference.resampling import systematic
from weft.inference.run.settings import require_counts
from weft.ppl import Target
from weft.ppl.stage.errors import WeftError
from weft.ppl.stage.modules import Module

from .feynman_kac import FeynmanKac
from .filter import Filter
from .filtering import filtering
from .generation import Generation, first_generation, log_mean_weight, offspring
from .panels import Panel
from .pmmh import Parameters, random_step


class smc2(Module):
    """SMC squared, for `smc`: the posterior of the choices before a scan, one observation after another.

    `smc(smc2(), num_particles=200).run(key, target)` gives weighted particles of the parameters, and unbiased estimates
    of the evidence after each observation. If there are several series under a `jax.vmap`, the parameters are the
    choices outside of it, and a step takes the filters of all series one observation further.

    Attributes:
        num_state_particles: the number of particles of each filter. The variance of its log evidence over all
            observations should be near one, or most moves are rejected.
        num_moves: the number of moves of the parameters after each resampling.
        filter: how to filter.

    Raises:
        WeftError: if no latent choice stands before the scan, or outside of the vmap of several series.
        ModelError: if a latent choice stands after the scan.

    References:
        Chopin, Jacob and Papaspiliopoulos (2013), section 2.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import smc, smc2
        >>> @gen
        ... def random_walk():
        ...     scale = sample("scale", dist.LogNormal(0.0, 1.0))
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, scale))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=3)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
        >>> found = smc(smc2(20), num_particles=100).run(jax.random.key(0), target, progress=False)
        >>> found.choices["scale"].shape
        (100,)
    """

    num_state_particles: int = 100
    num_moves: int = 3
    filter: filtering = filtering()

    def __check_init__(self) -> None:
        require_counts(self, num_state_particles=2, num_moves=1)

    def __call__(self, target: Target) -> FilterOfFilters:
        """The Feynman-Kac model of a target."""
        Parameters(target, self.filter)
        return FilterOfFilters(
            target.staged(), self.filter, self.num_state_particles, self.num_moves
        )


class FilterOfFilters(FeynmanKac):
    """The Feynman-Kac model of `smc2`."""

    target: Target
    filter: filtering
    num_state_particles: int = eqx.field(static=True)
    num_moves: int = eqx.field(static=True)

    @property
    def num_steps(self) -> int:
        parameters = self.parameters
        anywhere = parameters.choices(jnp.zeros(parameters.space.size))
        return self._model(parameters, anywhere).num_steps

    @property
    def parameters(self) -> Parameters:
        return Parameters(self.target, self.filter)

    def init(self, key: PRNGKeyArray) -> tuple[Any, Float[Array, ""]]:
        draw_key, filter_key = jax.random.split(key)
        parameters = self.parameters
        drawn, log_prior = parameters.draw(draw_key)
        states, joint = self._begin(filter_key, self._model(parameters, drawn))
        position = parameters.space.from_choices(drawn)
        particle = {"position": position, "states": states, "log_joint": joint}
        return particle, joint - log_prior

    def step(
        self, key: PRNGKeyArray, t: Int[Array, ""], particle: Any
    ) -> tuple[Any, Float[Array, ""]]:
        parameters = self.parameters
        model = self._model(parameters, parameters.choices(particle["position"]))
        states, more = self._advance(key, t, model, particle["states"])
        joint = particle["log_joint"] + more
        return {**particle, "states": states, "log_joint": joint}, more

    def choices(self, particle: Any) -> dict[str, Any]:
        return self.parameters.choices(particle["position"])

    def rejuvenate(
        self, key: PRNGKeyArray, t: Int[Array, ""], particles: Any, kernel: Any
    ) -> tuple[Any, dict[str, Array]]:
        if kernel is not None:
            raise WeftError("smc2 moves parameters by its own kernel: leave out rejuvenate")
        parameters = self.parameters
        positions = particles["position"]
        covariance = jnp.atleast_2d(jnp.cov(positions, rowvar=False))

        def one(key: PRNGKeyArray, particle: Any) -> tuple[Any, Array]:
            step_key, filter_key, accept_key = jax.random.split(key, 3)
            position = particle["position"] + random_step(step_key, covariance)
            choices = parameters.choices(position)
            model = self._model(parameters, choices)
            first_key, rest = jax.random.split(filter_key)

            def onward(s: Any, carry: Any) -> Any:
                states, joint = carry
                states, more = self._advance(jax.random.fold_in(rest, s), s, model, states)
                return states, joint + more

            states, joint = jax.lax.fori_loop(1, t, onward, self._begin(first_key, model))
            old = parameters.choices(particle["position"])
            log_ratio = joint + parameters.log_prior_change(position, choices)
            log_ratio -= particle["log_joint"]
            log_ratio -= parameters.log_prior_change(particle["position"], old)
            rate = jnp.minimum(1.0, jnp.exp(jnp.nan_to_num(log_ratio, nan=-jnp.inf)))
            accepted = jax.random.uniform(accept_key) < rate
            proposed = {"position": position, "states": states, "log_joint": joint}
            moved = jax.tree.map(lambda new, was: jnp.where(accepted, new, was), proposed, particle)
            return moved, rate

        def move(particles: Any, key: PRNGKeyArray) -> Any:
            particles, rate = jax.vmap(one)(jax.random.split(key, len(positions)), particles)
            return particles, jnp.mean(rate)

        particles, rates = jax.lax.scan(move, particles, jax.random.split(key, self.num_moves))
        return particles, {"acceptance_rate": jnp.mean(rates)}

    # --- the filter of one particle ---

    def _model(self, parameters: Parameters, choices: dict[str, Any]) -> Filter | Panel:
        return self.filter(parameters.given(choices))

    def _begin(self, key: PRNGKeyArray, model: Filter | Panel) -> tuple[Any, Array]:
        states = model.each_series(self._first, key)
        return states, model.total_evidence(log_mean_weight(states))

    def _advance(
        self, key: PRNGKeyArray, t: Any, model: Filter | Panel, states: Generation
    ) -> tuple[Any, Array]:
        def one(key: PRNGKeyArray, model: Filter, states: Generation) -> Generation:
            resample_key, move_key = jax.random.split(key)
            chosen = systematic(resample_key, states.log_weights, self.num_state_particles)
            return offspring(move_key, model, t, states.selected(chosen))

        states = model.each_series(one, key, states)
        return states, jnp.sum(log_mean_weight(states))

    def _first(self, key: PRNGKeyArray, model: Filter) -> Generation:
        return first_generation(key, model, self.num_state_particles)
