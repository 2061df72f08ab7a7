"""Importance sampling: independent draws of a proposal, weighted to stand for the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jaxtyping import Array, PRNGKeyArray
from weft.inference.results.particles import Particles
from weft.inference.run.algorithm import Algorithm
from weft.ppl import Model, Program, Target, Trace, do, draw, gen, sample
from weft.ppl.stage.errors import WeftError

from .points import WeightedState, particles, record
from .proposals import check_proposal, log_ratio, may_idle


class importance(Algorithm):
    r"""Importance sampling.

    Let $\gamma$ be the unnormalised density of the target. $N$ particles are drawn independently from the proposal $q$.
    Their mean weight is an unbiased estimate of the evidence:

    $$x_i \sim q, \qquad w_i = \frac{\gamma(x_i)}{q(x_i)}, \qquad \hat Z = \frac{1}{N} \sum_{i=1}^N w_i$$

    Attributes:
        proposal: a program that draws exactly the target's latent choices; or a function from the target to such a
            program; or `None` for the prior.
        num_particles: the number $N$ of particles.
        batch_size: the most particles that are drawn at once. It bounds memory. The result does not depend on it.
        grad: the gradient strategy (`weft.gradients`) of the choice among the particles. It is used where `normalize`
            stands in an expectation. `None` is the score function.

    Raises:
        DensityError: if the proposal is not normalised, or a weight is infinite or not a number.
        AddressError: if the proposal does not draw exactly the latent choices.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import importance
        >>> @gen
        ... def model():
        ...     mu = sample("mu", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(mu, 1.0))
        >>> target = model().given({"y": 2.0})
        >>> particles = importance(num_particles=2000).run(jax.random.key(0), target, progress=False)
        >>> bool(abs(particles.log_evidence - dist.Normal(0.0, 2.0**0.5).log_prob(2.0)) < 0.1)
        True
    """

    proposal: Program | Callable[[Target], Program] | Any = None
    num_particles: int = 1000
    batch_size: int = 4096
    grad: Any = None

    def __check_init__(self) -> None:
        for name in ("num_particles", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise WeftError(f"importance: {name} must be a positive integer, got {value!r}")

    def num_iterations(self, target: Target) -> int:
        return -(-self.num_particles // self.batch_size)

    def check(self, target: Target, init: Any = None) -> None:
        if init is not None:
            raise WeftError("importance has no starting point: give a proposal instead of init")

    def prepare(self, target: Target) -> importance:
        if self.proposal is None:
            return self
        return dataclasses.replace(self, proposal=self._program(target).staged())

    def _program(self, target: Target) -> Program:
        """The proposal for a target. For the prior it is the target's program without its data."""
        program: Any = self.proposal
        if program is None:
            code, args = target.program.code()
            data = {address: given.value for address, given in target.data.items()}
            program = Model(do(code, data), target.program.name)(*args)
        elif not isinstance(program, Program) and callable(program):
            program = program(target)
        check_proposal(program, target)
        return program

    def init(self, key: PRNGKeyArray, target: Target, init: Any = None) -> WeightedState:
        particle = jax.eval_shape(lambda k: self._particle(k, target), key)
        return WeightedState.empty(key, self.num_particles, particle)

    def step(self, key: PRNGKeyArray, state: WeightedState, target: Target) -> WeightedState:
        # Each particle has its own key, so batches change nothing. The last batch may overlap the one before it.
        batch = min(self.batch_size, self.num_particles)
        first = jnp.minimum(state.iteration * batch, self.num_particles - batch)
        keys = jax.vmap(lambda i: jax.random.fold_in(state.key, i))(first + jnp.arange(batch))
        return state.write(first, jax.vmap(lambda k: self._particle(k, target))(keys))

    def result(self, state: WeightedState, target: Target) -> Particles:
        return particles(self, state, target, self.batch_size, exact=False)

    def _particle(self, key: PRNGKeyArray, target: Target) -> tuple[Any, Array]:
        """One draw with its log weight."""
        if self.proposal is None:
            trace, log_weight = target.generate(key, {})
            return record(target, trace), log_weight
        draw_key, rest_key = jax.random.split(key)
        proposal: Any = self.proposal  # staged by `prepare`
        drawn = proposal.simulate(draw_key)
        # Nothing is left to draw: this only computes the derived values.
        trace, _ = target.generate(rest_key, drawn.choices)
        return record(target, trace), log_ratio(target, proposal, drawn, key=rest_key)

    # --- inside a program: sampling importance resampling ---

    def draw_posterior(self, target: Target) -> tuple[dict[str, Any], Array, Array]:
        """One of the particles, chosen by its weight. It is a part of the program that is being staged.

        Returns:
            `(choices, log_density, log_evidence)`: the particle, its density under the target, and the log of
            the mean weight.

        References:
            Rubin (1987); Lew et al. (2023) for its density.
        """
        proposal = self._program(target)

        def particle(_: Any) -> tuple[Any, Array, Array]:
            trace = draw(proposal)
            return trace.choices, *weigh(target, proposal, trace)

        choices, log_g, log_w = jax.vmap(particle)(jnp.arange(self.num_particles))
        log_evidence = logsumexp(log_w) - jnp.log(self.num_particles)
        i = 0 if self.num_particles == 1 else draw(_choose(log_w, self.grad)).value
        return jax.tree.map(lambda x: x[i], choices), log_g[i], log_evidence

    def conditional_evidence(
        self, target: Target, choices: dict[str, Any], log_density: Array
    ) -> Array:
        """Conditional importance sampling: the log of the mean weight when one of the particles is given."""
        proposal = self._program(target)
        if may_idle(target):
            log_w = log_ratio(target, proposal, None, choices)
        else:
            log_w = log_density - proposal.log_density(choices)
        if self.num_particles > 1:

            def particle(_: Any) -> Array:
                return weigh(target, proposal, draw(proposal))[1]

            others = jax.vmap(particle)(jnp.arange(self.num_particles - 1))
            log_w = jnp.append(others, log_w)
        return logsumexp(log_w) - jnp.log(self.num_particles)


def weigh(target: Target, proposal: Program, trace: Trace) -> tuple[Array, Array]:
    """The log density under the target, and the log weight, of a draw of the proposal."""
    log_g = target.log_density(trace.choices)
    if may_idle(target):
        return log_g, log_ratio(target, proposal, trace)
    return log_g, log_g - trace.log_density


@gen
def _choose(log_weights: Array, grad: Any) -> Array:
    return sample("particle", dist.Categorical(logits=log_weights), grad=grad)
