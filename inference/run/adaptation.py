"""Warm-up of Hamiltonian chains: Stan's windows, step size by dual averaging, mass matrix by
blocks.

The warm-up has three parts. In the first and the last only the step size adapts; between them the
mass matrix is estimated too, in windows that double in length and forget what was before. The
building blocks (dual averaging, the running covariance with its shrinkage, the schedule) are
BlackJAX's; what is here puts them together one iteration at a time, so that a warm-up can be
interrupted and resumed, and lets some coordinates share a dense block while the others stay
diagonal.

References:
    Stan reference manual, "HMC algorithm parameters"; Hoffman and Gelman (2014), The No-U-Turn
    Sampler, section 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.mass_matrix import MassMatrixAdaptationState, mass_matrix_adaptation
from blackjax.adaptation.staged_adaptation import build_schedule
from blackjax.adaptation.step_size import (
    DualAveragingAdaptationState,
    dual_averaging_adaptation,
    find_reasonable_step_size,
)
from blackjax.mcmc import hmc
from blackjax.mcmc.hmc import HMCState
from blackjax.mcmc.metrics import Metric, gaussian_euclidean
from jaxtyping import Array, Bool, Float, PRNGKeyArray

InverseMass = tuple[Array, ...]
"""One array for each part of a `MassLayout`: `(n,)` variances, or an `(n, n)` covariance."""


@dataclasses.dataclass(frozen=True)
class MassLayout:
    """Which coordinates of a vector share a dense block of the inverse mass matrix.

    Attributes:
        parts: disjoint index arrays that cover all coordinates; `None` stands for all of them in
            order.
        dense: for each part, whether it has a full covariance or variances only.
    """

    parts: tuple[np.ndarray | None, ...]
    dense: tuple[bool, ...]

    @staticmethod
    def make(size: int, blocks: list[np.ndarray] | bool) -> MassLayout:
        """A layout of `size` coordinates: all dense, none dense, or dense blocks amid a diagonal."""
        if isinstance(blocks, bool):
            return MassLayout((None,), (blocks,))
        rest = np.setdiff1d(np.arange(size), np.concatenate(blocks))
        parts, dense = [*blocks], [True] * len(blocks)
        if rest.size:
            parts, dense = [rest, *parts], [False, *dense]
        return MassLayout(tuple(parts), tuple(dense))

    def split(self, z: Float[Array, " n"]) -> tuple[Array, ...]:
        """The parts of a vector."""
        return tuple(z if part is None else z[part] for part in self.parts)

    def join(self, parts: tuple[Array, ...]) -> Float[Array, " n"]:
        """The vector of its parts."""
        if self.parts[0] is None:
            return parts[0]
        order = np.argsort(np.concatenate([part for part in self.parts if part is not None]))
        return jnp.concatenate(parts)[order]

    def metric(self, inverse_mass: InverseMass) -> Metric:
        """The Euclidean metric, as BlackJAX's kernels take it.

        The momentum is `N(0, M)`, the kinetic energy `p' M^-1 p / 2`, and a trajectory turns where
        the velocity at one of its ends points against the sum of its momenta.
        """
        if self.parts[0] is None:
            return gaussian_euclidean(inverse_mass[0])
        metrics = [gaussian_euclidean(m) for m in inverse_mass]

        def sample_momentum(key: PRNGKeyArray, position: Any) -> Any:
            keys = jax.random.split(key, len(metrics))
            parts: Any = zip(metrics, keys, self.split(position), strict=True)
            return self.join(tuple(m.sample_momentum(k, p) for m, k, p in parts))

        def velocity(momentum: Array) -> Array:
            parts = zip(inverse_mass, self.split(momentum), strict=True)
            return self.join(tuple(_times(m, p) for m, p in parts))

        def kinetic_energy(momentum: Any, position: Any = None) -> Any:
            return 0.5 * velocity(momentum) @ momentum

        def check_turning(
            momentum_left: Any,
            momentum_right: Any,
            momentum_sum: Any,
            position_left: Any = None,
            position_right: Any = None,
        ) -> Any:
            rho = momentum_sum - (momentum_left + momentum_right) / 2
            return (velocity(momentum_left) @ rho <= 0) | (velocity(momentum_right) @ rho <= 0)

        def scale(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                "only Riemannian and isokinetic integrators scale by a metric"
            )

        return Metric(sample_momentum, kinetic_energy, check_turning, scale)


class AdaptationState(eqx.Module):
    """What warm-up knows of one chain.

    Attributes:
        step: the state of dual averaging.
        mass: running covariance and current inverse mass, for each part of the layout.
    """

    step: DualAveragingAdaptationState
    mass: tuple[MassMatrixAdaptationState, ...]

    @property
    def inverse_mass(self) -> InverseMass:
        return tuple(m.inverse_mass_matrix for m in self.mass)

    def step_size(self, warming: Bool[Array, ""]) -> Float[Array, ""]:
        """The current step size in warm-up, the averaged one after it."""
        return jnp.exp(jnp.where(warming, self.step.log_step_size, self.step.log_step_size_avg))


@dataclasses.dataclass(frozen=True)
class Warmup:
    """The rule of warm-up for one chain.

    Attributes:
        num_steps: its iterations.
        layout: the blocks of the mass matrix.
        target_acceptance: the mean acceptance probability that the step size is tuned to.
        adapt_mass: whether to estimate the mass matrix.
    """

    num_steps: int
    layout: MassLayout
    target_acceptance: Any
    adapt_mass: bool = True

    def schedule(self) -> tuple[np.ndarray, np.ndarray]:
        """For each iteration, whether it is in a window of the mass matrix, and whether it ends one."""
        if self.num_steps == 0:
            return np.zeros(1, bool), np.zeros(1, bool)
        with jax.ensure_compile_time_eval():
            table = np.asarray(build_schedule(self.num_steps)).astype(bool)
        return table[:, 0] & self.adapt_mass, table[:, 1] & self.adapt_mass

    def _mass(self) -> list[tuple[Callable, Callable, Callable]]:
        return [mass_matrix_adaptation(is_diagonal_matrix=not dense) for dense in self.layout.dense]

    def init(
        self,
        key: PRNGKeyArray,
        state: HMCState,
        log_density: Callable[[Array], Array],
        step_size: Any = None,
    ) -> AdaptationState:
        """Unit mass, and a step size: the one given, or one at which leapfrog steps are accepted as wanted."""
        position: Any = state.position
        parts = self.layout.split(position)
        mass = tuple(
            init(part.size) for (init, _, _), part in zip(self._mass(), parts, strict=True)
        )
        dtype = position.dtype
        mass = jax.tree.map(lambda x: _cast(x, dtype), mass)
        if step_size is None:
            metric = self.layout.metric(tuple(m.inverse_mass_matrix for m in mass))
            one_step = hmc.build_kernel()

            def generator(size: Any) -> Callable:
                return lambda k, s: one_step(k, s, log_density, size, metric, 1)

            one: Any = jnp.ones((), dtype)
            step_size = find_reasonable_step_size(
                key, generator, state, one, self.target_acceptance
            )
        init, _, _ = dual_averaging_adaptation(self.target_acceptance)
        step = jax.tree.map(lambda x: _cast(x, dtype), init(jnp.asarray(step_size, dtype)))
        return AdaptationState(step, mass)

    def update(
        self,
        state: AdaptationState,
        position: Float[Array, " n"],
        acceptance: Float[Array, ""],
        slow: Bool[Array, ""],
        ends: Bool[Array, ""],
    ) -> AdaptationState:
        """Learn from one transition. `slow` and `ends` are this iteration's entries of the schedule."""
        init, update, final = dual_averaging_adaptation(self.target_acceptance)
        step = update(state.step, acceptance)

        def learn(mass: Any) -> Any:
            parts = self.layout.split(position)
            return tuple(
                update_mass(m, part)
                for (_, update_mass, _), m, part in zip(self._mass(), mass, parts, strict=True)
            )

        def close(operand: Any) -> Any:
            step, mass = operand
            mass = tuple(end(m) for (_, _, end), m in zip(self._mass(), mass, strict=True))
            return _like((init(final(step)), mass), operand)

        mass = jax.lax.cond(slow, lambda m: _like(learn(m), m), lambda m: m, state.mass)
        step, mass = jax.lax.cond(
            ends, close, lambda operand: operand, (_like(step, state.step), mass)
        )
        return AdaptationState(step, mass)


def _times(matrix: Array, vector: Array) -> Array:
    """A covariance, or variances, times a vector, in full precision on every device."""
    if matrix.ndim == 1:
        return matrix * vector
    return jnp.matmul(matrix, vector, precision="highest")


def _cast(x: Any, dtype: Any) -> Array:
    """A strongly typed array; floats in the chain's own precision."""
    x = jnp.asarray(x)
    return jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


def _like(tree: Any, reference: Any) -> Any:
    return jax.tree.map(lambda x, r: jnp.asarray(x, r.dtype), tree, reference)
