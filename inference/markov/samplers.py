"""Hamiltonian samplers: `nuts` and `hmc`, with adapted step size and mass matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.hmc import HMCInfo, HMCState
from blackjax.mcmc.metrics import Metric
from blackjax.mcmc.nuts import NUTSInfo
from jaxtyping import Array, PRNGKeyArray
from weft.ppl.stage.errors import WeftError

from . import gradient_kernels as kernels
from .hamiltonian import HamiltonianSampler


class nuts(HamiltonianSampler):
    """The No-U-Turn sampler, adapted as Stan does.

    Every chain has its own warm-up. Dual averaging moves the step size until transitions are accepted with probability
    `target_acceptance`. The inverse mass matrix is estimated from the draws of windows that double in length. Draws of
    the warm-up are not stored.

    Attributes:
        num_warmup: iterations of warm-up.
        num_samples: iterations after it, for each chain.
        num_chains: chains, run side by side under one vmap.
        dense_mass: `False` for variances only; `True` for a full covariance; or addresses whose
            coordinates share one dense block (a list of tuples for several), the others having
            variances.
        target_acceptance: the mean acceptance probability wanted; nearer to 1 means smaller steps
            and fewer divergences.
        step_size: the first step size; by default one is searched for.
        adapt_mass: whether to estimate the mass matrix.
        keep: addresses of choices and derived values to store (`"*"` and `"**"` are wildcards); all
            by default.
        thin: store every `thin`-th draw. A draw counts as divergent if a transition since the last
            one stored was.
        init_strategy: how chains find their first point.
        max_tree_depth: a trajectory has at most `2 ** max_tree_depth` steps.

    Raises:
        WeftError: if there is nothing to sample, or a setting makes no sense.
        DensityError: if a latent choice is discrete, or no point of finite density and gradient is
            found to begin at.

    References:
        Hoffman and Gelman (2014), The No-U-Turn Sampler, JMLR 15; Betancourt (2017), A conceptual
        introduction to Hamiltonian Monte Carlo, appendix A. The kernel is BlackJAX's.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import nuts
        >>> @gen
        ... def model():
        ...     mu = sample("mu", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(mu, 1.0))
        >>> target = model().given({"y": 2.0})
        >>> draws = nuts(num_warmup=200, num_samples=200).run(jax.random.key(0), target, progress=False)
        >>> draws.choices["mu"].shape
        (4, 200)
    """

    max_tree_depth: int = 10

    def __check_init__(self) -> None:
        if not isinstance(self.max_tree_depth, (int, np.integer)) or self.max_tree_depth < 1:
            raise WeftError(
                f"max_tree_depth must be a positive integer, got {self.max_tree_depth!r}"
            )

    def kernel(self, key: PRNGKeyArray, step_size: Array, metric: Metric) -> kernels.nuts:
        return kernels.nuts(step_size, metric, self.max_tree_depth)

    def stats(self, before: HMCState, info: NUTSInfo, metric: Metric) -> dict[str, Array]:
        depth, energy = jnp.int32(info.num_trajectory_expansions), jnp.asarray(info.energy)
        stopped = info.is_turning | info.is_divergent
        return {
            "energy": energy,
            "tree_depth": depth,
            "reached_max_treedepth": (depth >= self.max_tree_depth) & ~stopped,
        }


class hmc(HamiltonianSampler):
    """Hamiltonian Monte Carlo with trajectories of given length, adapted as `nuts` is.

    The length varies from one transition to the next, uniformly within `jitter` of its mean, so
    that no trajectory can close on itself for good. Chains that take the same number of steps cost
    nothing to run side by side, which is where this beats `nuts` on accelerators.

    Attributes:
        trajectory_length: mean integration time; with an adapted mass matrix scales are about 1,
            and a quarter of the period of a standard normal, pi / 2, gives nearly independent draws
            of one.
        num_steps: take this number of leapfrog steps instead, whatever the step size.
        jitter: relative half-width of the variation of the length.
        max_steps: no trajectory has more steps.

    The other settings are those of `nuts`.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics, section 3.2 for the jitter. The kernel is
        BlackJAX's.
    """

    trajectory_length: float = np.pi / 2
    num_steps: int | None = None
    jitter: float = 0.2
    max_steps: int = 1000

    def kernel(self, key: PRNGKeyArray, step_size: Array, metric: Metric) -> kernels.hmc:
        factor = jax.random.uniform(key, (), step_size.dtype, 1.0 - self.jitter, 1.0 + self.jitter)
        mean = self.trajectory_length / step_size if self.num_steps is None else self.num_steps
        steps = jnp.clip(jnp.round(factor * mean), 1, self.max_steps).astype(jnp.int32)
        return kernels.hmc(step_size, steps, metric)

    def stats(self, before: HMCState, info: HMCInfo, metric: Metric) -> dict[str, Array]:
        energy = metric.kinetic_energy(info.momentum) - before.logdensity
        return {"energy": jnp.where(info.is_accepted, info.energy, energy)}
