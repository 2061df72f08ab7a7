"""Hamiltonian samplers: `nuts` and `hmc`, with adapted step size and mass matrix.

The chains live on the unconstrained scale. They carry log density and gradient along, so that a transition evaluates
nothing twice. The draws that are stored are the choices themselves.
"""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from weft.inference.run import libraries
from weft.inference.run.adaptation import Adaptation, AdaptationState, MassLayout, OneStep, Phase
from weft.inference.run.settings import (
    numbers,
    require_counts,
    require_flags,
    require_positive,
    require_probability,
)
from weft.inference.weighted.points import record
from weft.ppl import Target
from weft.ppl.analysis.dependence import predicates
from weft.ppl.stage.addresses import covers, unknown
from weft.ppl.stage.errors import AddressError, DensityError, WeftError

from . import gradient_kernels as kernels
from .density_kernels import DensityKernel
from .driver import ChainSampler, ChainsState, Record, Stats
from .initialisation import ChainStart, InitStrategy, check_init, explain

if TYPE_CHECKING:
    from blackjax.mcmc.hmc import HMCInfo, HMCState
    from blackjax.mcmc.metrics import Metric
    from blackjax.mcmc.nuts import NUTSInfo


class HamiltonianSampler(ChainSampler):
    """Base of `nuts` and `hmc`, which provide the kernel. See `nuts` for the settings."""

    num_warmup: int = 1000
    num_samples: int = 1000
    num_chains: int = 4
    dense_mass: bool | Sequence[Any] = False
    target_acceptance: float = 0.8
    step_size: float | None = None
    adapt_mass: bool = True
    keep: Sequence[str] | None = None
    thin: int = 1
    init_strategy: InitStrategy = InitStrategy()

    def __check_init__(self) -> None:
        require_flags(self, "adapt_mass")
        require_probability(self, "target_acceptance")
        if self.step_size is not None:
            require_positive(self, "step_size is a positive number", self.step_size)
        if not isinstance(self.init_strategy, InitStrategy):
            raise WeftError(
                f"{type(self).__name__}: init_strategy is an InitStrategy, got {self.init_strategy!r}"
            )
        groups = self.dense_mass
        if not isinstance(groups, (bool, np.bool_)) and not _are_addresses(groups):
            raise WeftError(
                f"{type(self).__name__}: dense_mass is True, False, a list of addresses or a list of tuples of them, "
                f"got {groups!r}"
            )

    @abc.abstractmethod
    def kernel(self, key: PRNGKeyArray, step_size: Array, metric: Metric) -> DensityKernel:
        """The kernel of one transition."""

    @abc.abstractmethod
    def stats(self, before: HMCState, info: Any, metric: Metric) -> Stats:
        """The kernel's own statistics of one transition, besides those of all kernels. "energy" is among them."""

    def check(self, target: Target, init: Any = None) -> None:
        if not target.latents:
            raise WeftError(
                f"{type(self).__name__}: this target has no latent choices, there is nothing to sample"
            )
        discrete = [
            a for a in target.latents if not np.issubdtype(target.sites[a].dtype, np.inexact)
        ]
        if discrete:
            names = ", ".join(f"{a!r} ({target.sites[a].distribution})" for a in discrete)
            raise DensityError(
                f"{type(self).__name__} needs gradients, and these latent choices are discrete: {names}. "
                "Sum them out (weft.inference.enumeration where the support is finite and all latents are discrete, "
                "or a mixture distribution in the model), observe them, or take importance sampling"
            )
        self._warn_of_jumps(target)
        check_init(init, target, self.num_chains)
        self._layout(target)
        self.require_kept(target.sites)

    def begin(
        self, key: PRNGKeyArray, target: Target, init: Any
    ) -> tuple[HMCState, AdaptationState]:
        adaptation, one_step = self._adaptation(target), self._one_step(target)
        start_key, step_key = jax.random.split(key)
        start: Any = self.init_strategy(start_key, target, self.num_chains, init)
        chains = libraries.hmc.HMCState(start.position, start.log_density, start.gradient)

        def one(chain: Array, state: HMCState) -> AdaptationState:
            key = jax.random.fold_in(step_key, chain)
            return adaptation.init(key, state, one_step, self.step_size)

        return chains, jax.vmap(one)(jnp.arange(self.num_chains), chains)

    def close(self, key: PRNGKeyArray, chain: HMCState, target: Target, tuning: Any) -> Any:
        return self._adaptation(target).close(key, tuning, chain, self._one_step(target))

    def cheap_settings(self) -> HamiltonianSampler:
        if not self.init_strategy.prior:
            return self
        without = dataclasses.replace(self.init_strategy, prior=False)
        return dataclasses.replace(self, init_strategy=without)

    def is_valid(self, state: ChainsState) -> bool:
        return bool(_start(state).valid.all())

    def init_error(self, state: ChainsState, target: Target) -> Exception:
        start = _start(state)
        chain = int(np.flatnonzero(~np.asarray(start.valid))[0])
        return explain(target, start.position[chain])

    def transition(
        self,
        key: PRNGKeyArray,
        chain: HMCState,
        target: Target,
        tuning: AdaptationState,
        now: Phase,
    ) -> tuple[HMCState, Stats, AdaptationState]:
        space = target.unconstrain().flat
        kernel_key, move_key = jax.random.split(key)
        step_size = tuning.step_size(now.warming)
        metric = self._layout(target).metric(tuning.inverse_mass)
        kernel = self.kernel(kernel_key, step_size, metric)
        after, info = kernel.step(move_key, chain, space.log_density)
        stats = {
            "lp": after.logdensity,
            "acceptance_rate": jnp.nan_to_num(info.acceptance_rate),
            "diverging": info.is_divergent,
            "n_steps": info.num_integration_steps,
            "step_size": step_size,
            **self.stats(chain, info, metric),
        }
        adaptation = self._adaptation(target)
        learnt = adaptation.update(tuning, after.position, stats["acceptance_rate"], now)
        return after, stats, learnt

    def record(self, chain: HMCState, target: Target) -> tuple[Record, Stats]:
        position: Any = chain.position
        return record(target, target.unconstrain().flat.trace(position)), {}

    def _one_step(self, target: Target) -> OneStep:
        """One leapfrog step, which tells whether a step size is reasonable."""
        space, layout = target.unconstrain().flat, self._layout(target)

        def one_step(key: PRNGKeyArray, state: Any, size: Array, mass: tuple[Array, ...]) -> Any:
            return kernels.hmc(size, 1, layout.metric(mass)).step(key, state, space.log_density)

        return one_step

    def _adaptation(self, target: Target) -> Adaptation:
        return Adaptation(self._layout(target), self.target_acceptance, self.adapt_mass)

    def _layout(self, target: Target) -> MassLayout:
        space = target.unconstrain().flat
        if isinstance(self.dense_mass, bool):
            return MassLayout.make(space.size, self.dense_mass)
        groups = list(self.dense_mass)
        if groups and all(isinstance(g, str) for g in groups):
            groups = [groups]
        blocks, taken = [], {}
        for group in groups:
            block = []
            for pattern in (group,) if isinstance(group, str) else group:
                found = [a for a in space.addresses if covers(pattern, a)]
                if not found:
                    raise AddressError(
                        f"dense_mass: {unknown(pattern, space.addresses, ' among the latents')}"
                    )
                for address in found:
                    if address in taken:
                        raise WeftError(f"dense_mass: {address!r} is in two blocks")
                    taken[address] = True
                    block.append(np.arange(space.size)[space.addresses[address]])
            blocks.append(np.concatenate(block))
        return MassLayout.make(space.size, blocks or False)

    def _warn_of_jumps(self, target: Target) -> None:
        """Warn if a branch depends on a continuous latent choice: the density jumps there."""
        code, _ = target.program.code()
        turning = sorted(predicates(code.jaxpr) & set(target.latents))
        if turning:
            names = ", ".join(repr(a) for a in turning)
            warnings.warn(
                f"{type(self).__name__}: which branch of the model is taken depends on the continuous "
                f"choice {names}, so the density jumps where it switches. The draws are right, but "
                "trajectories that cross a jump are often rejected: look at the acceptance rate, "
                "and whether every branch was visited",
                stacklevel=4,
            )


def _are_addresses(groups: Any) -> bool:
    """Whether groups of coordinates are given as a list of addresses, or of sequences of addresses."""
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        return False
    each = [group for group in groups if not isinstance(group, str)]
    return all(isinstance(g, Sequence) and all(isinstance(a, str) for a in g) for g in each)


def _start(state: ChainsState) -> ChainStart:
    chains: Any = state.chains
    return ChainStart(chains.position, chains.logdensity, chains.logdensity_grad)


class nuts(HamiltonianSampler):
    """The No-U-Turn sampler, adapted as Stan does.

    Every chain has its own warm-up. Dual averaging moves the step size until transitions are accepted with probability
    `target_acceptance`. The inverse mass matrix is estimated from the draws of windows that double in length. Draws of
    the warm-up are not stored.

    Attributes:
        num_warmup: iterations of warm-up.
        num_samples: iterations of each chain after warm-up.
        num_chains: the number of chains, which run side by side under one vmap.
        dense_mass: `False` for variances only, and `True` for a full covariance. A list of addresses makes their
            coordinates share one dense block; a list of tuples makes several blocks. All other coordinates have
            variances.
        target_acceptance: the mean acceptance probability to aim at. A value nearer to 1 means smaller steps and fewer
            divergences.
        step_size: the first step size. By default it is searched for.
        adapt_mass: whether to estimate the mass matrix.
        keep: the addresses of the choices and derived values to store (`"*"` and `"**"` are wildcards); all by default.
        thin: store every `thin`-th draw. A draw counts as divergent if any transition since the last stored draw was.
        init_strategy: how chains find their first point.
        max_tree_depth: a trajectory has at most `2 ** max_tree_depth` steps.

    Raises:
        WeftError: if there is nothing to sample, or a setting makes no sense.
        DensityError: if a latent choice is discrete, or no first point with finite density and gradient is found.

    References:
        Hoffman and Gelman (2014), The No-U-Turn Sampler, JMLR 15; Betancourt (2017), A conceptual introduction to
        Hamiltonian Monte Carlo, appendix A. The kernel is BlackJAX's.

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
        require_counts(self, max_tree_depth=1)

    def kernel(self, key: PRNGKeyArray, step_size: Array, metric: Metric) -> kernels.nuts:
        return kernels.nuts(step_size, metric, self.max_tree_depth)

    def stats(
        self,
        before: HMCState,
        info: NUTSInfo,
        metric: Metric,
    ) -> dict[str, Array]:
        depth, energy = jnp.int32(info.num_trajectory_expansions), jnp.asarray(info.energy)
        stopped = info.is_turning | info.is_divergent
        return {
            "energy": energy,
            "tree_depth": depth,
            "reached_max_treedepth": (depth >= self.max_tree_depth) & ~stopped,
        }


class hmc(HamiltonianSampler):
    """Hamiltonian Monte Carlo with trajectories of a given length, adapted as `nuts` is.

    The length varies from one transition to the next, uniformly within `jitter` of its mean. So no trajectory can keep
    returning to where it began. Chains that take the same number of steps cost nothing extra when they run side by
    side. On accelerators this is the advantage over `nuts`.

    Attributes:
        trajectory_length: the mean integration time. With an adapted mass matrix scales are about 1. A quarter of the
            period of a standard normal, pi / 2, then gives nearly independent draws.
        num_steps: take this number of leapfrog steps instead, whatever the step size.
        jitter: the relative half-width of the variation of the length.
        max_steps: no trajectory has more steps than this.

    The other settings are those of `nuts`.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics, section 3.2 for the jitter. The kernel is BlackJAX's.
    """

    trajectory_length: float = np.pi / 2
    num_steps: int | None = None
    jitter: float = 0.2
    max_steps: int = 1000

    def __check_init__(self) -> None:
        require_positive(self, "trajectory_length is a positive number", self.trajectory_length)
        require_counts(self, max_steps=1)
        if self.num_steps is not None:
            require_counts(self, num_steps=1)
        jitter = numbers(self.jitter)
        if jitter is None or jitter.ndim or not 0 <= jitter < 1:
            raise WeftError(f"hmc: jitter is a number from 0 to below 1, got {self.jitter!r}")

    def kernel(self, key: PRNGKeyArray, step_size: Array, metric: Metric) -> kernels.hmc:
        factor = jax.random.uniform(key, (), step_size.dtype, 1.0 - self.jitter, 1.0 + self.jitter)
        mean = self.trajectory_length / step_size if self.num_steps is None else self.num_steps
        steps = jnp.clip(jnp.round(factor * mean), 1, self.max_steps).astype(jnp.int32)
        return kernels.hmc(step_size, steps, metric)

    def stats(
        self,
        before: HMCState,
        info: HMCInfo,
        metric: Metric,
    ) -> dict[str, Array]:
        energy = metric.kinetic_energy(info.momentum) - before.logdensity
        return {"energy": jnp.where(info.is_accepted, info.energy, energy)}
