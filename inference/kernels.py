"""Markov kernels that leave a density invariant: the moving part of samplers, without adaptation.

A kernel is a small module of settings. `kernel.on(log_density)` binds it to a density; what that
gives has `init(position)` and `step(key, state) -> (state, info)`, pure functions that jit, vmap
and scan. Positions are pytrees of floating arrays, densities functions of them. The transitions are
BlackJAX's.

Example:
    >>> import jax
    >>> from weft.inference import kernels
    >>> kernel = kernels.hmc(step_size=0.5, num_steps=5).on(lambda x: -0.5 * (x**2).sum())
    >>> state = kernel.init(jax.numpy.ones(2))
    >>> state, info = jax.jit(kernel.step)(jax.random.key(0), state)
    >>> state.position.shape, bool(info.is_divergent)
    ((2,), False)
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from blackjax.mcmc import hmc as _hmc
from blackjax.mcmc import nuts as _nuts
from blackjax.mcmc.hmc import HMCState
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

LogDensity = Callable[[Any], Float[Array, ""]]


class Kernel(eqx.Module):
    """Base of the kernels: settings, and the two functions of a density."""

    @abc.abstractmethod
    def init(self, position: Any, log_density: LogDensity) -> Any:
        """The state at a position."""

    @abc.abstractmethod
    def step(self, key: PRNGKeyArray, state: Any, log_density: LogDensity) -> tuple[Any, Any]:
        """One transition: the next state, and what happened."""

    def on(self, log_density: LogDensity) -> BoundKernel:
        """This kernel for one density."""
        return BoundKernel(self, log_density)


class BoundKernel(eqx.Module):
    """A kernel and the density that it leaves invariant."""

    kernel: Kernel
    log_density: LogDensity

    def init(self, position: Any) -> Any:
        """The state at a position."""
        return self.kernel.init(position, self.log_density)

    def step(self, key: PRNGKeyArray, state: Any) -> tuple[Any, Any]:
        """One transition: the next state, and what happened."""
        return self.kernel.step(key, state, self.log_density)


def _metric(inverse_mass: Any, position: Any) -> Any:
    return jnp.ones_like(ravel_pytree(position)[0]) if inverse_mass is None else inverse_mass


class hmc(Kernel):
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


class nuts(Kernel):
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
