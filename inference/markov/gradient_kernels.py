"""Kernels that follow a density on R^n: BlackJAX's transitions as moves of a target."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.mcmc import hmc as _hmc
from blackjax.mcmc import mala as _mala
from blackjax.mcmc import nuts as _nuts
from blackjax.mcmc import random_walk as _random_walk
from blackjax.mcmc import slice as _slice
from blackjax.mcmc.hmc import HMCState
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray
from weft.ppl import Target
from weft.ppl.stage.errors import DensityError, WeftError
from weft.ppl.stage.modules import Noun

from .kernel import Choices, Info, Kernel, entered

LogDensity = Callable[[Any], Float[Array, ""]]


class DensityKernel(Kernel):
    """Base of the kernels that follow a density on R^n: settings, and the two functions of a density."""

    @abc.abstractmethod
    def init(self, position: Any, log_density: LogDensity) -> Any:
        """The state at a position."""

    @abc.abstractmethod
    def step(self, key: PRNGKeyArray, state: Any, log_density: LogDensity) -> tuple[Any, Any]:
        """One transition: the next state, and what happened."""

    @abc.abstractmethod
    def report(self, info: Any) -> Info:
        """What happened, under the names that statistics have."""

    def on(self, log_density: LogDensity) -> BoundKernel:
        """This kernel for one density."""
        return BoundKernel(self, log_density)

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        choices = entered(choices, target)
        discrete = [a for a in target.latents if target.sites[a].is_discrete]
        if discrete:
            raise DensityError(
                f"{type(self).__name__} moves continuous choices, and {', '.join(map(repr, discrete))} "
                f"{'is' if len(discrete) == 1 else 'are'} discrete: move the others by block(...), these by gibbs or "
                "metropolis_hastings, and join the two with cycle"
            )
        space = target.unconstrain().flat
        state = self.init(space.from_choices(choices), space.log_density)
        state, info = self.step(key, state, space.log_density)
        return space.to_choices(state.position), self.report(info)


class BoundKernel(Noun):
    """A kernel and the density that it leaves invariant."""

    kernel: DensityKernel
    log_density: LogDensity

    def init(self, position: Any) -> Any:
        """The state at a position."""
        return self.kernel.init(position, self.log_density)

    def step(self, key: PRNGKeyArray, state: Any) -> tuple[Any, Any]:
        """One transition: the next state, and what happened."""
        return self.kernel.step(key, state, self.log_density)


def _metric(inverse_mass: Any, position: Any) -> Any:
    return jnp.ones_like(ravel_pytree(position)[0]) if inverse_mass is None else inverse_mass


class hmc(DensityKernel):
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps.

    Attributes:
        step_size: of the leapfrog integrator.
        num_steps: leapfrog steps of a proposal; may be traced.
        inverse_mass: `(n,)` variances or an `(n, n)` covariance over the flattened position, or a
            BlackJAX metric; `None` for the identity.
        divergence_threshold: the energy error beyond which a trajectory counts as divergent.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics.
    """

    step_size: Any
    num_steps: Any
    inverse_mass: Any = None
    divergence_threshold: int = 1000

    def init(self, position: Any, log_density: LogDensity) -> HMCState:
        return _hmc.init(position, log_density)

    def step(
        self, key: PRNGKeyArray, state: HMCState, log_density: LogDensity
    ) -> tuple[HMCState, _hmc.HMCInfo]:
        kernel = _hmc.build_kernel(divergence_threshold=self.divergence_threshold)
        metric = _metric(self.inverse_mass, state.position)
        return kernel(key, state, log_density, self.step_size, metric, self.num_steps)

    def report(self, info: Any) -> Info:
        return _trajectory(info)


class nuts(DensityKernel):
    """The No-U-Turn sampler: a trajectory doubles until it turns back, the next state is drawn
    along it.

    Attributes:
        step_size: of the leapfrog integrator.
        inverse_mass: as in `hmc`.
        max_tree_depth: the trajectory has at most `2 ** max_tree_depth` steps.
        divergence_threshold: the energy error beyond which a trajectory counts as divergent.

    References:
        Hoffman and Gelman (2014); Betancourt (2017), appendix A, for the multinomial choice along
        the trajectory.
    """

    step_size: Any
    inverse_mass: Any = None
    max_tree_depth: int = 10
    divergence_threshold: int = 1000

    def init(self, position: Any, log_density: LogDensity) -> HMCState:
        return _hmc.init(position, log_density)

    def step(
        self, key: PRNGKeyArray, state: HMCState, log_density: LogDensity
    ) -> tuple[HMCState, _nuts.NUTSInfo]:
        kernel = _nuts.build_kernel(divergence_threshold=self.divergence_threshold)
        metric = _metric(self.inverse_mass, state.position)
        return kernel(key, state, log_density, self.step_size, metric, self.max_tree_depth)

    def report(self, info: Any) -> Info:
        return _trajectory(info)


class mala(DensityKernel):
    r"""Langevin dynamics with a Metropolis step: one step along the gradient, with noise.

    :math:`x' = x + \epsilon \nabla \log \pi(x) + \sqrt{2 \epsilon}\, \xi`, :math:`\xi \sim N(0, I)`.

    Attributes:
        step_size: :math:`\epsilon`.

    References:
        Roberts and Tweedie (1996), Bernoulli 2.
    """

    step_size: Any

    def init(self, position: Any, log_density: LogDensity) -> _mala.MALAState:
        return _mala.init(position, log_density)

    def step(
        self, key: PRNGKeyArray, state: _mala.MALAState, log_density: LogDensity
    ) -> tuple[_mala.MALAState, _mala.MALAInfo]:
        return _mala.build_kernel()(key, state, log_density, self.step_size)

    def report(self, info: Any) -> Info:
        return {"acceptance_rate": info.acceptance_rate}


class random_walk(DensityKernel):
    """A normal step in all directions, accepted by the ratio of the densities.

    Attributes:
        scale: standard deviation of the step; one, `(n,)` of them, or an `(n, n)` covariance, over the
            flattened position.

    References:
        Metropolis et al. (1953).
    """

    scale: Any = 1.0

    def init(self, position: Any, log_density: LogDensity) -> _random_walk.RWState:
        return _random_walk.init(position, log_density)

    def step(
        self, key: PRNGKeyArray, state: _random_walk.RWState, log_density: LogDensity
    ) -> tuple[_random_walk.RWState, _random_walk.RWInfo]:
        flat, unravel = ravel_pytree(state.position)
        scale = jnp.asarray(self.scale, flat.dtype)
        if scale.shape not in ((), flat.shape, flat.shape * 2):
            raise WeftError(
                f"random_walk: scale has shape {scale.shape}; the position has {flat.size} numbers, so it is (), "
                f"{flat.shape} or {flat.shape * 2}"
            )

        def propose(key: PRNGKeyArray, position: Any) -> Any:
            noise = jax.random.normal(key, flat.shape, flat.dtype)
            step = jnp.linalg.cholesky(scale) @ noise if scale.ndim == 2 else scale * noise
            return unravel(flat + step)

        return _random_walk.build_rmh()(key, state, log_density, propose)

    def report(self, info: Any) -> Info:
        return {"acceptance_rate": info.acceptance_rate}


class slice_sampler(DensityKernel):
    """Every number in turn, in random order, drawn from the part of its line where the density is above a level.

    An interval about the current point steps out until both its ends are below the level, and shrinks
    to points drawn from it until one is above.

    Attributes:
        width: of the first interval; one number or `(n,)`, over the flattened position.
        max_expansions: the interval has at most so many widths.
        max_shrinkage: a number stays where it is after so many points below the level.

    References:
        Neal (2003), Slice sampling, figures 3 and 5.
    """

    width: Any = 1.0
    max_expansions: int = 10
    max_shrinkage: int = 100

    def init(self, position: Any, log_density: LogDensity) -> _slice.SliceState:
        return _slice.init(position, log_density)

    def step(
        self, key: PRNGKeyArray, state: _slice.SliceState, log_density: LogDensity
    ) -> tuple[_slice.SliceState, _slice.SliceInfo]:
        kernel = _slice.build_coordinate_kernel(
            interval=_slice.stepping_out,
            initial_widths=self.width,
            max_expansions=self.max_expansions,
            max_shrinkage=self.max_shrinkage,
        )
        return kernel(key, state, log_density)

    def report(self, info: Any) -> Info:
        return {
            "acceptance_rate": jnp.asarray(info.is_accepted, float),
            "n_steps": info.num_expansions + info.num_shrink,
        }


def _trajectory(info: Any) -> Info:
    return {
        "acceptance_rate": jnp.nan_to_num(info.acceptance_rate),
        "diverging": info.is_divergent,
        "n_steps": jnp.asarray(info.num_integration_steps),
    }
