r"""Particle marginal Metropolis-Hastings: a chain on parameters whose likelihood a filter estimates.

The estimate $\hat p(y \mid \theta)$ is unbiased. A Metropolis-Hastings chain that keeps the estimate together with its
point therefore leaves $p(\theta) p(y \mid \theta)$ invariant, for any number of particles (Andrieu and Roberts 2009;
Andrieu, Doucet and Holenstein 2010). A step proposes

    z' = z + s (2.38 / sqrt(d)) L e,   e ~ N(0, I),

on the unconstrained scale. `L L^T` is the covariance of the chain. It and the scale `s` are adapted in warm-up (Haario,
Saksman and Tamminen 2001; Andrieu and Thoms 2008, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from weft.inference.markov.driver import ChainSampler, ChainsState, Record, Stats
from weft.inference.run.adaptation import Phase
from weft.inference.run.settings import require_counts
from weft.ppl import Program, Target
from weft.ppl.scans.panels import Series
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.errors import ModelError, WeftError

from .filter import Filter
from .filtering import filtering
from .panels import Panel
from .smc import smc


class Parameters:
    """The choices before a scan, or outside of the vmap of several: their prior, and the filter given them."""

    def __init__(self, target: Target, how: filtering) -> None:
        self.target = target
        apart = how.series(target)
        program = _before(how(target), target) if apart is None else _outside(apart, target)
        data = {a: g for a, g in target.data.items() if a in program.sites}
        self.prior = program.given(unflatten(data))
        self.space = self.prior.unconstrain().flat

    def draw(self, key: PRNGKeyArray) -> tuple[dict[str, Any], Array]:
        """Draw parameters. Also returns the log density of their prior, without observations among them."""
        trace, log_weight = self.prior.generate(key)
        found = flatten(trace.choices)
        drawn = unflatten({a: found[a] for a in self.prior.latents})
        return drawn, trace.log_density - log_weight

    def choices(self, position: Array) -> dict[str, Any]:
        return self.space.to_choices(position)

    def given(self, choices: dict[str, Any]) -> Target:
        """The target with the parameters given. Its evidence is their joint density with the data."""
        return self.target.given(choices)

    def log_prior_change(self, position: Array, choices: dict[str, Any]) -> Array:
        """The term that the change of variables adds to the log density."""
        return self.space.log_density(position) - self.prior.log_density(choices)


def _before(model: Filter | Panel, target: Target) -> Program:
    """The program before a scan. Its choices are the parameters."""
    before, _, after = model.latents
    name = target.program.name
    if not before:
        raise WeftError(
            f"{name!r} has no latent choice before its scan: nothing to infer but the path"
        )
    if after:
        raise ModelError(
            f"the choices {', '.join(map(repr, after))} of {name!r} stand after its scan, and parameters "
            "stand before it: move them there, or take particle_gibbs"
        )
    program = model.parts.before
    assert program is not None
    return program


def _outside(apart: Series, target: Target) -> Program:
    """The program outside of the vmap of several series. Its choices are the parameters."""
    if not any(a in target.latents for a in apart.shared.sites):
        raise WeftError(
            f"{target.program.name!r} has no latent choice that its {apart.size} series share. For the choices "
            "that each series has of its own use smc(filtering())"
        )
    return apart.shared


class Chain(NamedTuple):
    """One chain: its position, the estimate there, and the choices with the path drawn with it."""

    position: Float[Array, " n"]
    log_density: Float[Array, ""]
    choices: dict[str, Array]


class Learnt(NamedTuple):
    """What has been learnt of a chain's law, and the scale of its steps."""

    mean: Float[Array, " n"]
    covariance: Float[Array, "n n"]
    log_scale: Float[Array, ""]


class pmmh(ChainSampler):
    """Particle marginal Metropolis-Hastings for the choices before a scan, with a path for each draw.

    If there are several series under a `jax.vmap`, the parameters are the choices outside of it, which the series
    share. The choices that each series draws before its own scan are left to its filter.

    The statistics have "acceptance_rate", the probability of acceptance, and "lp", the log of the estimated joint
    density.

    Attributes:
        num_particles: the number of particles of each filter. As a rule, the standard deviation of the log evidence
            near the mode should be about 1.2 (Doucet et al. 2015). With too few particles the chain stands still for
            long.
        num_samples: iterations of each chain after warm-up.
        num_warmup: iterations in which covariance and scale of the proposal are adapted.
        num_chains: the number of chains, under one vmap.
        filter: how to filter.
        paths: whether to keep a path with each draw. That takes memory of N T in each filter.
        thin: store every `thin`-th draw.
        keep: the addresses of the choices to store; all by default.

    Raises:
        WeftError: if no latent choice stands before the scan, or outside of the vmap of several series.
        ModelError: if a latent choice stands after the scan.
        DensityError: if a parameter is discrete.

    References:
        Andrieu, Doucet and Holenstein (2010), section 2.4.2.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import pmmh
        >>> @gen
        ... def random_walk():
        ...     scale = sample("scale", dist.LogNormal(0.0, 1.0))
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, scale))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=3)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
        >>> draws = pmmh(20, num_samples=20, num_warmup=20).run(jax.random.key(0), target, progress=False)
        >>> draws.choices["scale"].shape, draws.choices["x"].shape
        ((4, 20), (4, 20, 3))
    """

    num_particles: int = 200
    num_samples: int = 1000
    num_warmup: int = 500
    num_chains: int = 4
    filter: filtering = filtering()
    paths: bool = True
    thin: int = 1
    keep: Sequence[str] | None = None

    def __check_init__(self) -> None:
        require_counts(self, num_particles=2)

    def check(self, target: Target, init: Any = None) -> None:
        if init is not None:
            raise WeftError("pmmh begins at draws of the prior: leave out init")
        Parameters(target, self.filter)
        self.require_kept(target.sites)

    def begin(self, key: PRNGKeyArray, target: Target, init: Any) -> tuple[Chain, Learnt]:
        parameters = Parameters(target, self.filter)
        size = parameters.space.size

        def one(key: PRNGKeyArray) -> tuple[Chain, Learnt]:
            draw_key, filter_key = jax.random.split(key)

            def attempt(i: Array) -> Any:
                drawn, _ = parameters.draw(jax.random.fold_in(draw_key, i))
                position = parameters.space.from_choices(drawn)
                found = self._estimate(jax.random.fold_in(filter_key, i), parameters, position)
                return i + 1, position, *found

            def again(state: Any) -> Array:
                return ~jnp.isfinite(state[2]) & (state[0] < 100)

            _, position, log_density, choices = jax.lax.while_loop(
                again, lambda state: attempt(state[0]), attempt(jnp.int32(0))
            )
            learnt = Learnt(position, 0.1 * jnp.eye(size), jnp.zeros_like(log_density))
            return Chain(position, log_density, choices), learnt

        return jax.vmap(one)(jax.random.split(key, self.num_chains))

    def is_valid(self, state: ChainsState) -> bool:
        return bool(jnp.isfinite(state.chains.log_density).all())

    def init_error(self, state: ChainsState, target: Target) -> Exception:
        return WeftError(
            "pmmh: in 100 draws of the prior no filter ended with a positive weight: take more particles, a proposal "
            "that knows the observations, or a narrower prior"
        )

    def transition(
        self, key: PRNGKeyArray, chain: Chain, target: Target, tuning: Learnt, now: Phase
    ) -> tuple[Chain, Stats, Learnt]:
        parameters = Parameters(target, self.filter)
        step_key, filter_key, accept_key = jax.random.split(key, 3)
        position = chain.position + jnp.exp(tuning.log_scale) * random_step(
            step_key, tuning.covariance
        )
        log_density, choices = self._estimate(filter_key, parameters, position)
        log_ratio = jnp.nan_to_num(log_density - chain.log_density, nan=-jnp.inf)
        rate = jnp.minimum(1.0, jnp.exp(log_ratio))
        accepted = jax.random.uniform(accept_key) < rate
        proposed = Chain(position, log_density, choices)
        chain = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposed, chain)
        gain = jnp.where(now.warming, (now.iteration + 2.0) ** -0.6, 0.0)
        away = chain.position - tuning.mean
        learnt = Learnt(
            tuning.mean + gain * away,
            tuning.covariance + gain * (jnp.outer(away, away) - tuning.covariance),
            tuning.log_scale + gain * (rate - 0.234),
        )
        return chain, {"lp": chain.log_density, "acceptance_rate": rate}, learnt

    def record(self, chain: Chain, target: Target) -> tuple[Record, Stats]:
        return {"choices": chain.choices}, {}

    def warmup(self, state: ChainsState) -> dict[str, Any]:
        return {"scale": jnp.exp(state.tuning.log_scale)}

    def _estimate(
        self, key: PRNGKeyArray, parameters: Parameters, position: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The log of the estimated joint density on the unconstrained scale, and all choices, with a path drawn."""
        run_key, path_key = jax.random.split(key)
        choices = parameters.choices(position)
        history = "full" if self.paths else "none"
        found = smc(self.filter, self.num_particles, history=history).run(
            run_key, parameters.given(choices), progress=False
        )
        flat = dict(flatten(choices))
        if self.paths:
            index = jax.random.categorical(path_key, found.log_weights)
            flat.update({a: x[index] for a, x in flatten(found.choices).items()})
        assert found.log_evidence is not None
        return found.log_evidence + parameters.log_prior_change(position, choices), flat


def random_step(key: PRNGKeyArray, covariance: Float[Array, "n n"]) -> Float[Array, " n"]:
    """A normal step with the covariance that is best for normal laws (Roberts, Gelman and Gilks 1997)."""
    size = covariance.shape[0]
    root = jnp.linalg.cholesky(covariance + 1e-6 * jnp.eye(size))
    return 2.38 / size**0.5 * root @ jax.random.normal(key, (size,))
