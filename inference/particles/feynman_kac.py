r"""Feynman-Kac models: what sequential Monte Carlo samples.

A Markov chain and a weight for each of its states: with `M_t` the law of a step and `G_t` the
potential, the target after `t` steps is

    Q_t(x_0, ..., x_t) = 1/Z_t M_0(x_0) G_0(x_0) prod_{s=1..t} M_s(x_s | x_{s-1}) G_s(x_{s-1}, x_s).

Filtering, tempering and much else are such models (Del Moral 2004; Chopin and Papaspiliopoulos
2020, chapter 5). A model is any object with the members of `FeynmanKac`.

What a model may have besides; the engine uses what is there:

- `choices(particle)`: the nested dict that a user sees of a particle; all of it, if absent.
- `rejuvenate(key, t, particles, kernel) -> (particles, info)`: after resampling, moves all particles at once
  without changing their law; `info` is a dict of scalars, kept in the path.
- `adapt(t, particles, log_weights) -> particles`: looks at all particles before a step, to choose the next
  temperature, say, which it writes into them.
- `finished(particles)`: whether the run ends here, before `num_steps`.
- `engine(smc)`: the algorithm that runs it by these settings, for what is several models in one (`Lanes`).
- `remark(particles)`: a sentence on the last particles that a user should read, or None.
- `lookahead(t, particle)`: a logarithm by which particles are preferred when they are resampled before step `t`; the
  weights make up for it (the auxiliary particle filter of Pitt and Shephard 1999).
- `closed`: whether a finished run cannot be gone on with, with more observations.
- `observation(t)`: what is observed at a step, in words, for messages.
- `paths(last, along) -> choices`: what a user sees of whole paths: the particles of the last step, and those that they
  descend from, `(particle, step, ...)`.
- `reference(choices)`, `replay(t, particle, now) -> (particle, log potential)` and `log_transition(t, particle, now)`:
  the choices of every step out of all; a step to given choices; and its log density, `log M_t + log G_t`. With
  them paths are smoothed and conditioned on (`conditional_smc`).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PRNGKeyArray


@runtime_checkable
class FeynmanKac(Protocol):
    """What a model states, for one particle, any pytree of arrays. `smc` has an example."""

    @property
    def num_steps(self) -> int:
        """Number of potentials: `init` gives the first, `step` the others."""
        ...

    def init(self, key: PRNGKeyArray) -> tuple[Any, Float[Array, ""]]:
        """A first particle, and the logarithm of its potential."""
        ...

    def step(
        self, key: PRNGKeyArray, t: Int[Array, ""], particle: Any
    ) -> tuple[Any, Float[Array, ""]]:
        """The particle at time `t`, 1 at first, from the one before; and the logarithm of its potential."""
        ...
