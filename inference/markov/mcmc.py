"""Markov chains of any kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray
from weft.inference.results.draws import Draws
from weft.inference.run.algorithm import Algorithm, State
from weft.inference.weighted.points import Record, record
from weft.ppl import Target
from weft.ppl.stage import staging
from weft.ppl.stage.addresses import covers, flatten, unflatten, unknown
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import AddressError, DensityError, WeftError

from .initialisation import InitStrategy, check_init
from .kernel import Choices, Info, Kernel, entered, log_density, unchanged


class MCMCState(State):
    """The state of a set of chains; every field but `iteration` leads with the chain.

    Attributes:
        iteration: transitions made, warm-up included.
        choices: all latent choices.
        valid: whether the chain found a point of positive density to begin at.
        draws: buffers `(chain, draw, ...)` of choices, derived values and activity, by address.
        stats: buffers `(chain, draw)` of the statistics of the draws stored.
    """

    iteration: Int[Array, ""]
    choices: Choices
    valid: Bool[Array, " chains"]
    draws: Record
    stats: Info


class mcmc(Algorithm):
    r"""Markov chains of a kernel, side by side under one vmap, for choices of any kind.

    Nothing is adapted: warm-up only discards. For adapted step sizes and mass matrices take `nuts` or
    `hmc`, where all choices are continuous.

    Chains begin at `init`, where `run` has one; else where `nuts` would, if all choices are continuous,
    or at draws of the prior (at most 100 for each chain, until one has a positive density).

    Attributes:
        kernel: what moves the choices, see `weft.kernels`.
        num_samples: transitions after warm-up, for each chain.
        num_chains: chains.
        num_warmup: transitions that are discarded.
        thin: store every `thin`-th.
        keep: addresses of choices and derived values to store (`"*"` and `"**"` are wildcards); all by
            default.

    The statistics are what the kernel reports of the transition that led to the draw,
    "acceptance_rate" among it, and "lp", the log density of choices and data.

    Raises:
        WeftError: if there is nothing to sample, or a setting makes no sense.
        ModelError: if the kernel changes addresses, shapes or dtypes of the choices.
        DensityError: if the kernel cannot move the choices of this target, or a chain finds no point to
            begin at.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> from weft.inference import mcmc
        >>> @gen
        ... def mixture():
        ...     mu = sample("mu", dist.Normal(0.0, 3.0).expand([2]))
        ...     z = sample("z", dist.Bernoulli(0.5).expand([4]))
        ...     sample("y", dist.Normal(mu[z], 1.0))
        >>> target = mixture().given({"y": jnp.array([-1.0, -1.2, 2.0, 2.2])})
        >>> kernel = kernels.cycle(kernels.gibbs("z"), kernels.gibbs("mu"))
        >>> draws = mcmc(kernel, num_samples=200).run(jax.random.key(0), target, progress=False)
        >>> draws.choices["z"].shape, draws.choices["mu"].shape
        ((4, 200, 4), (4, 200, 2))
    """

    kernel: Kernel
    num_samples: int = 1000
    num_chains: int = 4
    num_warmup: int = 0
    thin: int = 1
    keep: Sequence[str] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if not isinstance(self.kernel, Kernel):
            raise TypeError(f"mcmc: expected a kernel, got {type(self.kernel).__name__}")
        for name, least in (("num_samples", 1), ("num_chains", 1), ("num_warmup", 0), ("thin", 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < least:
                raise WeftError(
                    f"mcmc: {name} must be an integer of at least {least}, got {value!r}"
                )
        if self.thin > self.num_samples:
            raise WeftError(
                f"mcmc: thin={self.thin} of num_samples={self.num_samples} transitions keeps no draw"
            )
        if isinstance(self.keep, str):
            raise WeftError(
                f"mcmc: keep must be a sequence of addresses, got {self.keep!r}: write [{self.keep!r}]"
            )

    @property
    def num_draws(self) -> int:
        """Draws stored for each chain."""
        return self.num_samples // self.thin

    def num_iterations(self, target: Target) -> int:
        return self.num_warmup + self.num_samples

    def has_result(self, iteration: int) -> bool:
        return iteration >= self.num_warmup + self.thin

    def check(self, target: Target, init: Any = None) -> None:
        if not target.latents:
            raise WeftError("mcmc: this target has no latent choices, there is nothing to sample")
        for pattern in self.keep or ():
            if not any(covers(pattern, a) for a in target.sites):
                raise AddressError(f"mcmc: keep: {unknown(pattern, target.sites)}")
        check_init(init, target, self.num_chains)
        key = jax.eval_shape(lambda: jax.random.key(0))
        choices = target.latent_shapes()
        jax.eval_shape(lambda key, choices: self._move(key, choices, target), key, choices)

    def prepare(self, target: Target) -> mcmc:
        return dataclasses.replace(self, kernel=_Current(self.kernel, _generation(self.kernel)))

    def init(self, key: PRNGKeyArray, target: Target, init: Any = None) -> MCMCState:
        choices, valid = self._start(key, target, init)
        info = jax.eval_shape(lambda: self._moves(key, choices, target)[1])
        draws, lp = jax.eval_shape(lambda: self._record(choices, target))

        def buffer(x: Any) -> Array:
            return jnp.zeros((self.num_chains, self.num_draws, *x.shape[1:]), x.dtype)

        draws, stats = jax.tree.map(buffer, (draws, {**info, "lp": lp}))
        return MCMCState(jnp.int32(0), choices, valid, draws, stats)

    def is_valid(self, state: MCMCState) -> bool:
        return bool(state.valid.all())

    def init_error(self, state: MCMCState, target: Target) -> Exception:
        chain = int(np.flatnonzero(~np.asarray(state.valid))[0])
        choices = jax.tree.map(lambda x: x[chain], state.choices)
        terms = flatten(target.log_densities(choices))
        bad = [a for a, t in terms.items() if not np.isfinite(np.asarray(t)).all()]
        return DensityError(
            f"mcmc: no point of positive density to begin at; at the last one tried the density of "
            f"{', '.join(map(repr, bad)) or 'the whole'} is zero, or no number. Begin at choices of your own: "
            "run(..., init=choices)"
        )

    def step(self, key: PRNGKeyArray, state: MCMCState, target: Target) -> MCMCState:
        choices, info = self._moves(key, state.choices, target)
        drawn = state.iteration - self.num_warmup
        due = (drawn >= 0) & ((drawn + 1) % self.thin == 0)
        slot = jnp.where(
            due, drawn // self.thin, self.num_draws
        )  # past the end: nothing is written
        shapes = jax.eval_shape(lambda x: self._record(x, target), choices)
        draws, lp = jax.lax.cond(
            due,
            lambda x: self._record(x, target),
            lambda x: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            choices,
        )

        def write(buffer: Array, values: Array) -> Array:
            return buffer.at[:, slot].set(values.astype(buffer.dtype), mode="drop")

        draws, stats = jax.tree.map(write, (state.draws, state.stats), (draws, {**info, "lp": lp}))
        return MCMCState(state.iteration + 1, choices, state.valid, draws, stats)

    def result(self, state: MCMCState, target: Target) -> Draws:
        draws, stats = state.draws, state.stats
        if not isinstance(state.iteration, Tracer):
            done = (int(state.iteration) - self.num_warmup) // self.thin
            if done < self.num_draws:  # interrupted
                draws, stats = jax.tree.map(lambda x: x[:, :done], (draws, stats))
        parts = {name: unflatten(flat) for name, flat in draws.items()}
        return Draws(**parts, stats=stats, target=target)

    def describe(self, state: MCMCState) -> str:
        return "warm-up" if int(state.iteration) < self.num_warmup else "sampling"

    def _move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        """One transition of one chain."""
        after, info = self.kernel.move(key, choices, target)
        info = {k: jnp.asarray(v) for k, v in info.items()}
        if "acceptance_rate" not in info or any(x.shape for x in info.values()):
            raise WeftError(
                f"mcmc: {type(self.kernel).__name__} must report scalars, 'acceptance_rate' among them; it reports "
                f"{ {k: x.shape for k, x in info.items()} }"
            )
        return unchanged(choices, after, f"mcmc: {type(self.kernel).__name__}"), info

    def _moves(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        """One transition of every chain."""
        keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(jnp.arange(self.num_chains))
        return jax.vmap(lambda k, x: self._move(k, x, target))(keys, choices)

    def _record(self, choices: Choices, target: Target) -> tuple[Record, Array]:
        """What a draw of every chain stores, and its log density."""

        def one(choices: Choices) -> tuple[Record, Array]:
            # Everything is given, so the key draws nothing.
            trace, lp = target.generate(jax.random.key(0), choices)
            return {name: self._kept(flat) for name, flat in record(target, trace).items()}, lp

        return jax.vmap(one)(choices)

    def _kept(self, flat: dict[str, Array]) -> dict[str, Array]:
        return {
            a: x
            for a, x in flat.items()
            if self.keep is None or any(covers(p, a) for p in self.keep)
        }

    def _start(self, key: PRNGKeyArray, target: Target, init: Any) -> tuple[Choices, Array]:
        """Choices of every chain, and whether their density is positive."""
        given = flatten(init)
        shapes = flatten(target.latent_shapes())
        axes = {a: 0 if jnp.ndim(x) > len(shapes[a].shape) else None for a, x in given.items()}
        if set(given) != set(shapes) and _has_positions(target):
            start = InitStrategy()(key, target, self.num_chains, init)
            choices = jax.vmap(target.unconstrain().flat.to_choices)(start.position)
            return choices, start.valid

        def find(key: PRNGKeyArray, given: dict[str, Array]) -> tuple[Choices, Array]:
            def attempt(i: Array) -> tuple[Choices, Array]:
                drawn = dict(given)
                if set(given) != set(shapes):
                    trace, _ = target.generate(jax.random.fold_in(key, i), unflatten(given))
                    found = flatten(trace.choices)
                    drawn = {a: found[a] for a in shapes}
                choices = entered(unflatten(drawn), target)
                return choices, jnp.isfinite(log_density(target, choices))

            def again(state: Any) -> Any:
                return state[0] + 1, *attempt(state[0])

            tries = 1 if set(given) == set(shapes) else 100
            state = (jnp.int32(1), *attempt(jnp.int32(0)))
            return jax.lax.while_loop(lambda s: ~s[2] & (s[0] < tries), again, state)[1:]

        keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(jnp.arange(self.num_chains))
        return jax.vmap(find, (0, axes), axis_size=self.num_chains)(keys, given)


class _Current(Kernel):
    """A kernel, and a number that tells whether what its functions read from outside is still the same.

    Compiled code is found by the settings it is for, and functions compare by identity: without the number, a
    proposal that reads a global would go on with the old one when that is bound again.
    """

    kernel: Kernel
    generation: int = eqx.field(static=True)

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        return self.kernel.move(key, choices, target)


def _generation(kernel: Kernel) -> int:
    """A number that has grown if anything that the kernel's functions captured has changed."""
    return staging._current_generation(staging.captured(kernel))


def _has_positions(target: Target) -> bool:
    """Whether all latent choices have coordinates on the unconstrained scale."""
    try:
        target.unconstrain()
    except DensityError:
        return False
    return True
