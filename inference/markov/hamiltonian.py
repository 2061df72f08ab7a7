"""Hamiltonian chains: what `nuts` and `hmc` share, which is everything but the kernel.

All chains advance together under one vmap, each with its own adaptation. The kernel sees the target
on the unconstrained scale; what is stored are the choices themselves, written into buffers of their
final size as the chains go, so that neither a warm-up nor a discarded site ever takes memory.
"""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.hmc import HMCState
from blackjax.mcmc.metrics import Metric
from jaxtyping import Array, Bool, Int, PRNGKeyArray
from weft.inference.results.draws import Draws
from weft.inference.run.adaptation import AdaptationState, MassLayout, Warmup
from weft.inference.run.algorithm import Algorithm, State
from weft.ppl import Target
from weft.ppl.analysis.dependence import predicates
from weft.ppl.stage.addresses import covers, flatten, unflatten, unknown
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import AddressError, DensityError, WeftError

from . import gradient_kernels as kernels
from .initialisation import InitStrategy, Start, check_init, explain


class ChainsState(State):
    """The state of a set of Hamiltonian chains; every field but `iteration` leads with the chain.

    Attributes:
        iteration: iterations done, warm-up included.
        chains: positions on the unconstrained scale, with log density and gradient.
        adaptation: step size and mass matrix.
        diverged: whether a divergence happened since the last draw stored.
        divergences: number of divergent transitions, `(chain, 2)`: in warm-up, after it.
        draws: buffers `(chain, draw, ...)` of choices, derived values and activity.
        stats: buffers `(chain, draw)` of the statistics of the draws stored.
    """

    iteration: Int[Array, ""]
    chains: HMCState
    adaptation: AdaptationState
    diverged: Bool[Array, " chains"]
    divergences: Int[Array, "chains 2"]
    draws: dict[str, dict[str, Array]]
    stats: dict[str, Array]


class HamiltonianSampler(Algorithm):
    """Base of `nuts` and `hmc`, which give the kernel. See `nuts` for the settings."""

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
        for name, least in (("num_warmup", 0), ("num_samples", 1), ("num_chains", 1), ("thin", 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < least:
                raise WeftError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.thin > self.num_samples:
            raise WeftError(
                f"thin={self.thin} of num_samples={self.num_samples} iterations keeps no draw"
            )
        if isinstance(self.keep, str):
            raise WeftError(
                f"keep must be a sequence of addresses, got {self.keep!r}: write [{self.keep!r}]"
            )

    @abc.abstractmethod
    def kernel(self, key: PRNGKeyArray, step_size: Array, metric: Metric) -> kernels.DensityKernel:
        """The kernel of one transition."""

    @abc.abstractmethod
    def stats(self, before: HMCState, info: Any, metric: Metric) -> dict[str, Array]:
        """What the kernel has to say of one transition beyond what all kernels do: "energy" at least."""

    def num_iterations(self, target: Target) -> int:
        return self.num_warmup + self.num_samples

    @property
    def num_draws(self) -> int:
        """Draws stored for each chain."""
        return self.num_samples // self.thin

    def has_result(self, iteration: int) -> bool:
        return iteration >= self.num_warmup + self.thin

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
        self._kept(target.sites)

    def init(self, key: PRNGKeyArray, target: Target, init: Any = None) -> ChainsState:
        space = target.unconstrain().flat
        start_key, step_key = jax.random.split(key)
        start: Any = self.init_strategy(start_key, target, self.num_chains, init)
        warmup = self._warmup(target)

        chains = HMCState(start.position, start.log_density, start.gradient)

        def begin(chain: Array, state: HMCState) -> AdaptationState:
            step = jax.random.fold_in(step_key, chain)
            return warmup.init(step, state, space.log_density, self.step_size)

        adaptation = jax.vmap(begin)(jnp.arange(self.num_chains), chains)
        state = ChainsState(
            iteration=jnp.int32(0),
            chains=chains,
            adaptation=adaptation,
            diverged=jnp.zeros(self.num_chains, bool),
            divergences=jnp.zeros((self.num_chains, 2), jnp.int32),
            draws={},
            stats={},
        )
        draws = jax.eval_shape(lambda z: self._record(target, z), chains.position)
        stats = jax.eval_shape(lambda: self._move(key, state, target)[1])

        def buffer(x: Any) -> Array:
            return jnp.zeros((self.num_chains, self.num_draws, *x.shape[1:]), x.dtype)

        draws, stats = jax.tree.map(buffer, (draws, stats))
        return dataclasses.replace(state, draws=draws, stats=stats)

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

    def step(self, key: PRNGKeyArray, state: ChainsState, target: Target) -> ChainsState:
        warmup = self._warmup(target)
        warming = state.iteration < self.num_warmup

        # 1. Every chain moves.
        chains, stats = self._move(key, state, target)

        # 2. In warm-up, every chain learns from its move. The predicates have no axis of chains:
        # what is not due is skipped.
        slow, ends = warmup.schedule()
        at = jnp.minimum(state.iteration, len(slow) - 1)
        slow, ends = jnp.asarray(slow)[at], jnp.asarray(ends)[at]

        def learn(adaptation: AdaptationState) -> AdaptationState:
            update = lambda a, z, p: warmup.update(a, z, p, slow, ends)  # noqa: E731
            new = jax.vmap(update)(adaptation, chains.position, stats["acceptance_rate"])
            return jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, adaptation)

        adaptation = jax.lax.cond(warming, learn, lambda a: a, state.adaptation)

        # 3. Store. The slot of a draw is written at each of its `thin` iterations, last when the
        # draw is due.
        drawn = state.iteration - self.num_warmup
        due = ~warming & ((drawn + 1) % self.thin == 0)
        slot = jnp.clip(drawn // self.thin, 0, self.num_draws - 1)
        shapes = jax.eval_shape(lambda z: self._record(target, z), chains.position)
        draws = jax.lax.cond(
            due,
            lambda z: self._record(target, z),
            lambda z: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            chains.position,
        )
        diverged = stats["diverging"] | (state.diverged & ~warming)
        stats = {**stats, "diverging": diverged}
        in_range = warming | (drawn < self.num_draws * self.thin)

        def write(buffer: Array, value: Array) -> Array:
            old = jax.lax.dynamic_index_in_dim(buffer, slot, 1, keepdims=False)
            value = jnp.where(in_range, value.astype(buffer.dtype), old)
            return jax.lax.dynamic_update_index_in_dim(buffer, value, slot, 1)

        phase = jnp.stack([warming, ~warming])
        return ChainsState(
            iteration=state.iteration + 1,
            chains=chains,
            adaptation=adaptation,
            diverged=diverged & ~due & ~warming,
            divergences=state.divergences + (stats["diverging"][:, None] & phase).astype(jnp.int32),
            draws=jax.tree.map(write, state.draws, draws),
            stats=jax.tree.map(write, state.stats, stats),
        )

    def _move(
        self, key: PRNGKeyArray, state: ChainsState, target: Target
    ) -> tuple[HMCState, dict[str, Array]]:
        """One transition of every chain, and its statistics under ArviZ's names."""
        space = target.unconstrain().flat
        layout = self._layout(target)
        warming = state.iteration < self.num_warmup

        def move(chain: Array, before: HMCState, adaptation: AdaptationState) -> Any:
            kernel_key, move_key = jax.random.split(jax.random.fold_in(key, chain))
            step_size = adaptation.step_size(warming)
            metric = layout.metric(adaptation.inverse_mass)
            kernel = self.kernel(kernel_key, step_size, metric)
            after, info = kernel.step(move_key, before, space.log_density)
            return after, {
                "lp": after.logdensity,
                "acceptance_rate": jnp.nan_to_num(info.acceptance_rate),
                "diverging": info.is_divergent,
                "n_steps": info.num_integration_steps,
                "step_size": step_size,
                **self.stats(before, info, metric),
            }

        return jax.vmap(move)(jnp.arange(self.num_chains), state.chains, state.adaptation)

    def result(self, state: ChainsState, target: Target) -> Draws:
        draws, stats = state.draws, state.stats
        if not isinstance(state.iteration, Tracer):
            done = (int(state.iteration) - self.num_warmup) // self.thin
            if done < self.num_draws:  # interrupted
                draws, stats = jax.tree.map(lambda x: x[:, :done], (draws, stats))
        warmup = {
            "divergences": state.divergences[:, 0],
            "step_size": jnp.exp(state.adaptation.step.log_step_size_avg),
        }
        parts = {name: unflatten(flat) for name, flat in draws.items()}
        return Draws(**parts, stats=stats, target=target, warmup=warmup)

    def describe(self, state: ChainsState) -> str:
        warming = int(state.iteration) < self.num_warmup
        count = int(state.divergences[:, 0 if warming else 1].sum())
        step = np.exp(np.asarray(state.adaptation.step.log_step_size_avg)).mean()
        return f"{'warm-up' if warming else 'sampling'}, step size {step:.2g}, {count} divergences"

    def _warmup(self, target: Target) -> Warmup:
        return Warmup(
            self.num_warmup, self._layout(target), self.target_acceptance, self.adapt_mass
        )

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
        """Warn where a branch turns on a continuous latent choice: the density jumps there."""
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

    def _kept(self, sites: Any) -> None:
        """Check the patterns of `keep` against the addresses there are."""
        for pattern in self.keep or ():
            if not any(covers(pattern, a) for a in sites):
                raise AddressError(f"keep: {unknown(pattern, sites)}")

    def _record(self, target: Target, positions: Array) -> dict[str, dict[str, Array]]:
        """What a draw stores: choices, derived values, and activity where a site may be idle; chains lead."""
        space = target.unconstrain().flat
        sites = target.sites
        idle = {a for a in target.latents if sites[a].conditional or sites[a].masked}

        def kept(tree: Any) -> dict[str, Array]:
            return {
                a: v
                for a, v in flatten(tree).items()
                if self.keep is None or any(covers(p, a) for p in self.keep)
            }

        def one(position: Array) -> dict[str, dict[str, Array]]:
            trace = space.trace(position)
            return {
                "choices": kept(trace.choices),
                "derived": kept(trace.derived),
                "active": {a: v for a, v in kept(trace.active).items() if a in idle},
            }

        return jax.vmap(one)(positions)


def _start(state: ChainsState) -> Start:
    chains: Any = state.chains
    return Start(chains.position, chains.logdensity, chains.logdensity_grad)
