"""Conditional sequential Monte Carlo: a Markov kernel on the choices of a scan.

One of `N` particles follows the current path, and the others are drawn around it. One of the resulting paths is the
next. This leaves the law of paths given the observations invariant, for every `N` of at least 2 (Andrieu, Doucet and
Holenstein 2010). But all paths soon share one ancestor. Two ways make early steps move all the same:

- ancestor sampling (Lindsten, Jordan and Schön 2014) draws anew, at each step, from which particle the given path
  descends: `A_t ~ W_{t-1}^i m_t(x_t* | x_{t-1}^i) G_t(x_{t-1}^i, x_t*)`;
- backward sampling (Whiteley 2010) draws the next path from its end, by the same weights.

Both need a carry in which nothing random outlives a step except the step's own choices.
"""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from weft.inference.markov.combinators import cycle
from weft.inference.markov.kernel import Choices, Info, Kernel, entered
from weft.inference.markov.mcmc import mcmc
from weft.inference.resampling import multinomial
from weft.inference.run.settings import require_counts
from weft.ppl import Target
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.errors import ModelError, WeftError

from .feynman_kac import FeynmanKac
from .filter import Filter, require_markov
from .filtering import Proposal, filtering
from .generation import Generation, log_transitions, whole_pass
from .history import along
from .panels import Panel
from .smoothing import drawn_back, traced_back


def conditional_pass(
    key: PRNGKeyArray,
    model: FeynmanKac,
    path: Any,
    num_particles: int,
    ancestor_sampling: bool = False,
) -> Generation:
    """The particles of all steps of a run around a given path. The first particle of each step follows it.

    Args:
        key: random key.
        model: a Feynman-Kac model with `replay` (and `log_transition`, for ancestor sampling).
        path: the choices of every step, `(step, ...)`.
        num_particles: `N`.
        ancestor_sampling: whether the ancestor of the given path is drawn anew at each step.
    """

    def choose(key: Any, t: Array, before: Generation, given: Any) -> Array:
        draw_key, ancestor_key = jax.random.split(key)
        first = jnp.zeros((), int)
        if ancestor_sampling:
            onward = log_transitions(model, t, before.particles, given)
            first = jax.random.categorical(ancestor_key, before.log_weights + onward)
        others = multinomial(draw_key, before.log_weights, num_particles - 1)
        return jnp.concatenate([first[None], others])

    return whole_pass(key, model, num_particles, choose, path)


class conditional_smc(Kernel):
    """Conditional SMC: a kernel that moves the latent choices of the model's scan, given all others.

    If there are several series under a `jax.vmap`, each is moved by a run of its own.

    The statistics have "acceptance_rate", the share of steps at which the path has changed. If it is near zero for
    early steps, the chain does not move there.

    Attributes:
        num_particles: `N`, at least 2. Longer series need more particles, and many more without `update`.
        update: `"ancestor"` sampling, `"backward"` sampling, or None for a path along the genealogy.
        proposal: the proposal of a step, as in `filtering`.
        scan: an address in the scan that is meant, as in `filtering`.

    Raises:
        ModelError: for ancestor or backward sampling, if the carry remembers more than the last step's choices.

    References:
        Andrieu, Doucet and Holenstein (2010); Lindsten, Jordan and Schön (2014); Whiteley (2010), in the
        discussion of the first.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> from weft.inference import mcmc
        >>> @gen
        ... def random_walk():
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, 1.0))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=3)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
        >>> kernel = kernels.conditional_smc(num_particles=10)
        >>> draws = mcmc(kernel, num_samples=100).run(jax.random.key(0), target, progress=False)
        >>> draws.choices["x"].shape
        (4, 100, 3)
    """

    num_particles: int = 50
    update: Literal["ancestor", "backward"] | None = eqx.field(static=True, default="ancestor")
    proposal: Proposal | Literal["optimal"] | None = None
    scan: str | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        require_counts(self, num_particles=2)
        if self.update not in ("ancestor", "backward", None):
            raise WeftError(
                f"conditional_smc: update is 'ancestor', 'backward' or None, got {self.update!r}"
            )

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        choices = entered(choices, target)
        model = given_the_rest(filtering(self.proposal, scan=self.scan), choices, target)
        if self.update is not None:
            require_markov(model, f"conditional_smc(update={self.update!r})")
        flat = flatten(choices)
        within = {a: flat[a] for a in model.latents[1]}
        moved, shares = model.each_series(self._move, key, within)
        return unflatten({**flat, **moved}), {"acceptance_rate": jnp.mean(shares)}

    def _move(self, key: PRNGKeyArray, model: Filter, within: dict[str, Array]) -> Any:
        """Move the choices of one scan. Also returns the share of its steps at which they have changed."""
        run_key, path_key = jax.random.split(key)
        reference = model.reference(within)
        by_ancestors = self.update == "ancestor"
        found = conditional_pass(run_key, model, reference, self.num_particles, by_ancestors)
        draw_path = drawn_back if self.update == "backward" else traced_back
        indices = draw_path(path_key, model, found)
        moved = model.steps_of(along(indices, found.particles))
        return moved, jnp.mean(indices[: model.parts.length] != 0)


def given_the_rest(how: filtering, choices: Choices, target: Target) -> Filter | Panel:
    """The filter of a target in which only the choices of the scan are latent."""
    apart = how.series(target)
    within = how(target).latents[1] if apart is None else apart.scanned
    within = [a for a in within if a in target.latents]
    if not within:
        raise ModelError(
            f"conditional SMC: the scan of {target.program.name!r} has no latent choice to be moved"
        )
    rest = {a: x for a, x in flatten(choices).items() if a not in within}
    return how(target.given(rest))


def particle_gibbs(
    parameters: Kernel | None = None,
    num_particles: int = 50,
    num_samples: int = 1000,
    *,
    update: Literal["ancestor", "backward"] | None = "ancestor",
    proposal: Proposal | Literal["optimal"] | None = None,
    scan: str | None = None,
    num_chains: int = 4,
    num_warmup: int = 0,
    thin: int = 1,
) -> mcmc:
    """Particle Gibbs: conditional SMC for the path, in turns with a kernel for everything else.

    Args:
        parameters: a kernel that moves the choices outside the scan, for instance `kernels.block(kernel, "theta")`;
            None if there are none.
        num_particles: the number of particles of conditional SMC.
        num_samples: the number of draws of each chain.
        update: as in `conditional_smc`.
        proposal: the proposal of a step, as in `conditional_smc`.
        scan: an address in the scan that is meant.
        num_chains: the number of chains, as in `mcmc`.
        num_warmup: transitions in which the kernel of the parameters adapts. They are discarded.
        thin: store every `thin`-th draw.

    Returns:
        An algorithm. Its `run(key, target)` gives `Draws`.

    References:
        Andrieu, Doucet and Holenstein (2010), section 2.4.3; Lindsten, Jordan and Schön (2014).

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> from weft.inference import particle_gibbs
        >>> @gen
        ... def random_walk():
        ...     scale = sample("scale", dist.LogNormal(0.0, 1.0))
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, scale))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=3)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
        >>> kernel = kernels.block(kernels.random_walk(0.5), "scale")
        >>> draws = particle_gibbs(kernel, 10, 50).run(jax.random.key(0), target, progress=False)
        >>> draws.choices["scale"].shape, draws.choices["x"].shape
        ((4, 50), (4, 50, 3))
    """
    path = conditional_smc(num_particles, update, proposal, scan)
    kernel = path if parameters is None else cycle(path, parameters)
    return mcmc(kernel, num_samples, num_chains, num_warmup, thin)
