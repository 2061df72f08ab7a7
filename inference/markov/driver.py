"""The driver of Markov chains: warm-up, thinning and storing, for every sampler that gives `Draws`.

A sampler says where its chains begin, what one transition of one chain does, and what a draw stores. Everything else is
here. The chains run side by side under one vmap, each with its own warm-up. Draws are written into buffers of their
final size while the chains run. So neither a warm-up nor a site that is not kept ever takes memory.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray
from weft.inference.results.draws import Draws
from weft.inference.results.result import Record as Record
from weft.inference.run import adaptation
from weft.inference.run.adaptation import Phase
from weft.inference.run.algorithm import Algorithm, State
from weft.inference.run.settings import require_counts
from weft.ppl import Target
from weft.ppl.stage.addresses import covers, unflatten, unknown
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import AddressError, WeftError

Stats = dict[str, Array]


class ChainsState(State):
    """The state of a set of chains. The first axis of every field but `iteration` is that of the chains.

    Attributes:
        iteration: the number of iterations done, including warm-up.
        chains: where the chains are.
        tuning: what the warm-up tunes; None if there is nothing to tune.
        diverged: whether a transition since the last stored draw was divergent.
        divergences: the number of divergent transitions in warm-up and after it, `(chain, 2)`.
        draws: buffers `(chain, draw, ...)` of choices, derived values and activity.
        stats: buffers `(chain, draw)` of the statistics of the stored draws.
    """

    iteration: Int[Array, ""]
    chains: Any
    tuning: Any
    diverged: Bool[Array, " chains"]
    divergences: Int[Array, "chains 2"]
    draws: Record
    stats: Stats


class ChainSampler(Algorithm):
    """Base of the samplers by Markov chains. Each has these fields, in an order of its own.

    Attributes:
        num_samples: iterations of each chain after warm-up.
        num_chains: the number of chains.
        num_warmup: iterations of warm-up.
        thin: store every `thin`-th draw.
        keep: the addresses of the choices and derived values to store; None for all.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    # --- what a sampler says --------------------------------------------------------------------------

    @abc.abstractmethod
    def begin(self, key: PRNGKeyArray, target: Target, init: Any) -> tuple[Any, Any]:
        """Where the chains begin, and the first state of what warm-up tunes. The first axis of both is the chain."""

    @abc.abstractmethod
    def transition(
        self, key: PRNGKeyArray, chain: Any, target: Target, tuning: Any, now: Phase
    ) -> tuple[Any, Stats, Any]:
        """One transition of one chain. Returns where the chain is then, its statistics, and the updated tuning."""

    def close(self, key: PRNGKeyArray, chain: Any, target: Target, tuning: Any) -> Any:
        """The tuning of one chain after a window of the warm-up."""
        return tuning

    @abc.abstractmethod
    def record(self, chain: Any, target: Target) -> tuple[Record, Stats]:
        """What a draw of one chain stores, and the statistics that are computed for stored draws only."""

    def warmup(self, state: ChainsState) -> dict[str, Any]:
        """The values that the warm-up found. The first axis of the arrays is the chain."""
        return adaptation.values(state.tuning) or {}

    # --- settings -------------------------------------------------------------------------------------

    def __check_init__(self) -> None:
        who = type(self).__name__
        require_counts(self, num_warmup=0, num_samples=1, num_chains=1, thin=1)
        if self.thin > self.num_samples:
            raise WeftError(
                f"{who}: thin={self.thin} of num_samples={self.num_samples} iterations keeps no draw"
            )
        if isinstance(self.keep, str):
            raise WeftError(
                f"{who}: keep must be a sequence of addresses, got {self.keep!r}: write [{self.keep!r}]"
            )

    @property
    def num_draws(self) -> int:
        """The number of draws stored for each chain."""
        return self.num_samples // self.thin

    def num_iterations(self, target: Target) -> int:
        return self.num_warmup + self.num_samples

    def has_result(self, iteration: int) -> bool:
        return iteration >= self.num_warmup + self.thin

    def require_kept(self, addresses: Any) -> None:
        """Raise AddressError if a pattern in `keep` matches none of the addresses."""
        for pattern in self.keep or ():
            if not any(covers(pattern, a) for a in addresses):
                raise AddressError(f"{type(self).__name__}: keep: {unknown(pattern, addresses)}")

    # --- the run --------------------------------------------------------------------------------------

    def init(self, key: PRNGKeyArray, target: Target, init: Any = None) -> ChainsState:
        chains, tuning = self.begin(key, target, init)
        state = ChainsState(
            iteration=jnp.int32(0),
            chains=chains,
            tuning=tuning,
            diverged=jnp.zeros(self.num_chains, bool),
            divergences=jnp.zeros((self.num_chains, 2), jnp.int32),
            draws={},
            stats={},
        )
        draws, more = jax.eval_shape(lambda: self._record(chains, target))
        stats = jax.eval_shape(lambda: self._move(key, state, target)[1])

        def buffer(x: Any) -> Array:
            return jnp.zeros((self.num_chains, self.num_draws, *x.shape[1:]), x.dtype)

        draws, stats = jax.tree.map(buffer, (draws, {**stats, **more}))
        return dataclasses.replace(state, draws=draws, stats=stats)

    def step(self, key: PRNGKeyArray, state: ChainsState, target: Target) -> ChainsState:
        # 1. Every chain moves, and learns from it in warm-up. Where a window ends, all close theirs. The
        # predicate has no axis of chains: what is not due is skipped.
        chains, stats, tuning, now = self._move(key, state, target)
        if tuning is not None:
            rest = jax.random.fold_in(key, self.num_chains)  # the keys below are those of the moves

            def close(index: Array, chain: Any, tuning: Any) -> Any:
                return self.close(jax.random.fold_in(rest, index), chain, target, tuning)

            tuning = jax.lax.cond(
                now.ends,
                lambda x: jax.vmap(close)(jnp.arange(self.num_chains), chains, x),
                lambda x: x,
                tuning,
            )

        # 2. Store. The slot of a draw is written at each of its `thin` iterations, last when it is due.
        drawn = state.iteration - self.num_warmup
        due = ~now.warming & ((drawn + 1) % self.thin == 0)
        shapes = jax.eval_shape(lambda x: self._record(x, target), chains)
        draws, more = jax.lax.cond(
            due,
            lambda x: self._record(x, target),
            lambda _: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            chains,
        )
        diverging = stats.get("diverging", jnp.zeros_like(state.diverged))
        diverged = diverging | (state.diverged & ~now.warming)
        if "diverging" in stats:
            stats = {**stats, "diverging": diverged}
        slot = jnp.clip(drawn // self.thin, 0, self.num_draws - 1)
        in_range = now.warming | (drawn < self.num_draws * self.thin)

        def write(buffer: Array, value: Array) -> Array:
            old = jax.lax.dynamic_index_in_dim(buffer, slot, 1, keepdims=False)
            value = jnp.where(in_range, value.astype(buffer.dtype), old)
            return jax.lax.dynamic_update_index_in_dim(buffer, value, slot, 1)

        part = jnp.stack([now.warming, ~now.warming])
        return ChainsState(
            iteration=state.iteration + 1,
            chains=chains,
            tuning=tuning,
            diverged=diverged & ~due & ~now.warming,
            divergences=state.divergences + (diverging[:, None] & part).astype(jnp.int32),
            draws=jax.tree.map(write, state.draws, draws),
            stats=jax.tree.map(write, state.stats, {**stats, **more}),
        )

    def _move(
        self, key: PRNGKeyArray, state: ChainsState, target: Target
    ) -> tuple[Any, Stats, Any, Phase]:
        """One transition of every chain, each with its own key."""
        now = adaptation.phase(state.iteration, self.num_warmup)

        def one(index: Array, chain: Any, tuning: Any) -> Any:
            return self.transition(jax.random.fold_in(key, index), chain, target, tuning, now)

        moved = jax.vmap(one)(jnp.arange(self.num_chains), state.chains, state.tuning)
        return *moved, now

    def _record(self, chains: Any, target: Target) -> tuple[Record, Stats]:
        """What a draw of every chain stores, restricted to what is kept."""

        def kept(flat: dict[str, Any]) -> dict[str, Any]:
            if self.keep is None:
                return flat
            return {a: x for a, x in flat.items() if any(covers(p, a) for p in self.keep)}

        def one(chain: Any) -> tuple[Record, Stats]:
            draw, stats = self.record(chain, target)
            return {name: kept(flat) for name, flat in draw.items()}, stats

        return jax.vmap(one)(chains)

    def result(self, state: ChainsState, target: Target) -> Draws:
        draws, stats = state.draws, state.stats
        if not isinstance(state.iteration, Tracer):
            done = (int(state.iteration) - self.num_warmup) // self.thin
            if done < self.num_draws:  # interrupted
                draws, stats = jax.tree.map(lambda x: x[:, :done], (draws, stats))
        warmup = self.warmup(state) if self.num_warmup else {}
        if "diverging" in stats:
            warmup = {"divergences": state.divergences[:, 0], **warmup}
        parts = {name: unflatten(flat) for name, flat in draws.items()}
        return Draws(**parts, stats=stats, target=target, warmup=warmup or None)

    def describe(self, state: ChainsState) -> str:
        warming = int(state.iteration) < self.num_warmup
        words = ["warm-up" if warming else "sampling"]
        for name in ("step_size", "scale"):
            if name in (found := self.warmup(state)):
                words.append(f"{name.replace('_', ' ')} {np.mean(np.asarray(found[name])):.2g}")
        if "diverging" in state.stats:
            words.append(f"{int(state.divergences[:, 0 if warming else 1].sum())} divergences")
        return ", ".join(words)
