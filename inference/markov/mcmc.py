"""Markov chain Monte Carlo with any kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray
from weft.inference.run.adaptation import Phase, phase
from weft.inference.weighted.points import record
from weft.ppl import Target
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.errors import DensityError, WeftError
from weft.ppl.stage.staging import generation_of

from .driver import ChainSampler, ChainsState, Record
from .initialisation import InitStrategy, check_init
from .kernel import Choices, Info, Kernel, entered, log_density, unchanged


class Chain(NamedTuple):
    """Where a chain is: its choices, and whether it found a first point with positive density."""

    choices: Choices
    valid: Bool[Array, ""]


class mcmc(ChainSampler):
    """Markov chains of a kernel, side by side under one vmap, for choices of any kind.

    The first `num_warmup` transitions are discarded. In them, kernels with a step size adapt it and their inverse mass,
    each chain on its own and by the schedule of `nuts`. This works inside `block`, `cycle`, `mixture` and `repeat`,
    too. After the warm-up the values are frozen. Without a warm-up a kernel is used as it is given.

    The values found are in `draws.warmup`: "step_size" and "inverse_mass", of shape `(chain, ...)`. For the parts of a
    cycle or a mixture they are in dicts by the index of the part. `kernel.adapted(draws)` is the kernel with these
    values, for further runs.

    Chains begin at `init` if `run` is given one. Otherwise, if all choices are continuous, they begin where `nuts`
    would. If not, they begin at draws from the prior: at most 100 for each chain, until one has a positive density.

    The statistics of a draw are the kernel's report of the transition that led to it, with "acceptance_rate", and "lp",
    the log density of choices and data.

    Attributes:
        kernel: the kernel that moves the choices; see `weft.kernels`.
        num_samples: transitions of each chain after warm-up.
        num_chains: the number of chains.
        num_warmup: transitions in which the kernel adapts. They are discarded.
        thin: store every `thin`-th draw.
        keep: the addresses of the choices and derived values to store (`"*"` and `"**"` are wildcards); all by default.
        generation: set by `run`. It grows if anything has changed that the kernel reads from outside, so that code
            compiled before the change is not used again.

    Raises:
        WeftError: if there is nothing to sample, or a setting makes no sense.
        ModelError: if the kernel changes addresses, shapes or dtypes of the choices.
        DensityError: if the kernel cannot move the choices of this target, or a chain finds no first point.

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
    keep: Sequence[str] | None = None
    # Compiled code is found by the settings, and functions among them compare by identity: without this
    # number a proposal that reads a global would go on with the old one when that is bound again.
    generation: int = eqx.field(static=True, default=0, repr=False)

    def __check_init__(self) -> None:
        if not isinstance(self.kernel, Kernel):
            raise TypeError(f"mcmc: expected a kernel, got {type(self.kernel).__name__}")

    def check(self, target: Target, init: Any = None) -> None:
        if not target.latents:
            raise WeftError("mcmc: this target has no latent choices, there is nothing to sample")
        self.require_kept(target.sites)
        check_init(init, target, self.num_chains)
        key = jax.eval_shape(lambda: jax.random.key(0))
        chain = Chain(target.latent_shapes(), jnp.bool_(True))

        def once(key: PRNGKeyArray, chain: Chain) -> Any:
            tuning = self._tuning(key, chain.choices, target)
            return self.transition(key, chain, target, tuning, phase(jnp.int32(0), self.num_warmup))

        jax.eval_shape(once, key, chain)

    def prepare(self, target: Target) -> mcmc:
        return dataclasses.replace(self, generation=generation_of(self.kernel))

    def begin(self, key: PRNGKeyArray, target: Target, init: Any) -> tuple[Chain, Any]:
        chains = Chain(*self._start(key, target, init))
        rest = jax.random.fold_in(key, self.num_chains)  # the keys below are those of the chains

        def one(chain: Array, choices: Choices) -> Any:
            return self._tuning(jax.random.fold_in(rest, chain), choices, target)

        return chains, jax.vmap(one)(jnp.arange(self.num_chains), chains.choices)

    def _tuning(self, key: PRNGKeyArray, choices: Choices, target: Target) -> Any:
        return self.kernel.tuning(key, choices, target) if self.num_warmup else None

    def is_valid(self, state: ChainsState) -> bool:
        return bool(state.chains.valid.all())

    def init_error(self, state: ChainsState, target: Target) -> Exception:
        chain = int(np.flatnonzero(~np.asarray(state.chains.valid))[0])
        choices = jax.tree.map(lambda x: x[chain], state.chains.choices)
        terms = flatten(target.log_densities(choices))
        bad = [a for a, t in terms.items() if not np.isfinite(np.asarray(t)).all()]
        return DensityError(
            f"mcmc: no point of positive density to begin at; at the last one tried the density of "
            f"{', '.join(map(repr, bad)) or 'the whole'} is zero, or no number. Begin at choices of your own: "
            "run(..., init=choices)"
        )

    def transition(
        self, key: PRNGKeyArray, chain: Chain, target: Target, tuning: Any, now: Phase
    ) -> tuple[Chain, Info, Any]:
        if tuning is None:
            after, info = self.kernel.move(key, chain.choices, target)
        else:
            after, info, tuning = self.kernel.warm(key, chain.choices, target, tuning, now)
        info = {k: jnp.asarray(v) for k, v in info.items()}
        who = f"mcmc: {type(self.kernel).__name__}"
        if "acceptance_rate" not in info or any(x.shape for x in info.values()):
            raise WeftError(
                f"{who} must report scalars, 'acceptance_rate' among them; it reports "
                f"{ {k: x.shape for k, x in info.items()} }"
            )
        return Chain(unchanged(chain.choices, after, who), chain.valid), info, tuning

    def close(self, key: PRNGKeyArray, chain: Chain, target: Target, tuning: Any) -> Any:
        return self.kernel.tuning(key, chain.choices, target, tuning)

    def record(self, chain: Chain, target: Target) -> tuple[Record, Info]:
        # Everything is given, so the key draws nothing.
        trace, lp = target.generate(jax.random.key(0), chain.choices)
        return record(target, trace), {"lp": lp}

    def _start(self, key: PRNGKeyArray, target: Target, init: Any) -> tuple[Choices, Array]:
        """The first choices of every chain, and whether their density is positive."""
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


def _has_positions(target: Target) -> bool:
    """Whether all latent choices have coordinates on the unconstrained scale."""
    try:
        target.unconstrain()
    except DensityError:
        return False
    return True
