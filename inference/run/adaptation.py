"""Warm-up of Markov kernels: a step size by dual averaging, an inverse mass matrix from Stan's windows.

A warm-up has three parts. In the first and the last only the step size adapts. Between them the inverse mass matrix is
estimated too, in windows that double in length. Each window forgets the draws before it. At the end of a window its
estimate replaces the old one. The step size belonged to the old one, so a new one is searched for.

The building blocks are BlackJAX's: dual averaging, the running covariance with its shrinkage, the schedule. This file
puts them together one iteration at a time, so that a warm-up can be interrupted and resumed. It also lets some
coordinates share a dense block while the others have variances only.

This file knows nothing of kernels. A kernel reports how often it accepts and where it is. It gets back a step size and
an inverse mass matrix.

References:
    Stan reference manual, "HMC algorithm parameters"; Hoffman and Gelman (2014), The No-U-Turn Sampler, section 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from . import libraries

if TYPE_CHECKING:
    from blackjax.adaptation.mass_matrix import MassMatrixAdaptationState
    from blackjax.adaptation.step_size import DualAveragingAdaptationState
    from blackjax.mcmc.metrics import Metric

InverseMass = tuple[Array, ...]
"""One array for each part of a `MassLayout`: `(n,)` variances, or an `(n, n)` covariance."""
OneStep = Callable[[PRNGKeyArray, Any, Array, InverseMass], tuple[Any, Any]]
"""`one_step(key, state, step_size, inverse_mass)`, a transition and its report with `acceptance_rate`."""


@dataclasses.dataclass(frozen=True)
class MassLayout:
    """Which coordinates of a vector share a dense block of the inverse mass matrix.

    Attributes:
        parts: disjoint index arrays that cover all coordinates. `None` stands for all coordinates in order.
        dense: for each part, whether it has a full covariance or variances only.
    """

    parts: tuple[np.ndarray | None, ...]
    dense: tuple[bool, ...]

    @staticmethod
    def make(size: int, blocks: list[np.ndarray] | bool) -> MassLayout:
        """A layout of `size` coordinates: all dense, none dense, or some dense blocks and variances for the rest."""
        if isinstance(blocks, bool):
            return MassLayout((None,), (blocks,))
        rest = np.setdiff1d(np.arange(size), np.concatenate(blocks))
        parts, dense = [*blocks], [True] * len(blocks)
        if rest.size:
            parts, dense = [rest, *parts], [False, *dense]
        return MassLayout(tuple(parts), tuple(dense))

    def split(self, z: Float[Array, " n"]) -> tuple[Array, ...]:
        """Split a vector into its parts."""
        return tuple(z if part is None else z[part] for part in self.parts)

    def join(self, parts: tuple[Array, ...]) -> Float[Array, " n"]:
        """Join the parts to a vector."""
        if self.parts[0] is None:
            return parts[0]
        order = np.argsort(np.concatenate([part for part in self.parts if part is not None]))
        return jnp.concatenate(parts)[order]

    def metric(self, inverse_mass: InverseMass) -> Metric:
        """The Euclidean metric, in the form that BlackJAX's kernels take.

        The momentum is `N(0, M)`, and the kinetic energy is `p' M^-1 p / 2`. A trajectory turns where the velocity at
        one of its ends points against the sum of its momenta.
        """
        if self.parts[0] is None:
            return libraries.metrics.gaussian_euclidean(inverse_mass[0])
        metrics = [libraries.metrics.gaussian_euclidean(m) for m in inverse_mass]

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

        return libraries.metrics.Metric(sample_momentum, kinetic_energy, check_turning, scale)


class Phase(NamedTuple):
    """Where an iteration stands in its run.

    Attributes:
        iteration: the number of the iteration.
        warming: whether it belongs to the warm-up.
        slow: whether it lies in a window of the mass matrix.
        ends: whether it is the last of such a window.
    """

    iteration: Int[Array, ""]
    warming: Bool[Array, ""]
    slow: Bool[Array, ""]
    ends: Bool[Array, ""]


def phase(iteration: Int[Array, ""], num_warmup: int) -> Phase:
    """The phase of an iteration, in a warm-up of this length."""
    warming = iteration < num_warmup
    if num_warmup == 0:
        return Phase(iteration, warming, jnp.bool_(False), jnp.bool_(False))
    slow, ends = jnp.asarray(_schedule(num_warmup))[jnp.minimum(iteration, num_warmup - 1)]
    return Phase(iteration, warming, warming & slow, warming & ends)


def _schedule(num_warmup: int) -> np.ndarray:
    """For each iteration, whether it lies in a window, and whether it ends one.

    The schedule is Stan's. But a warm-up of less than 150 iterations, which Stan divides 15 : 75 : 10, is divided
    15 : 55 : 30. The step size of a kernel is settled in the last part, and a handful of moves do not settle it.
    """
    sizes = ()
    if num_warmup < 150:
        first, last = int(0.15 * num_warmup), int(0.3 * num_warmup)
        sizes = (first, last, num_warmup - first - last)
    with jax.ensure_compile_time_eval():
        return np.asarray(libraries.build_schedule(num_warmup, *sizes)).astype(bool)


class AdaptationState(eqx.Module):
    """What a warm-up knows of one kernel of one chain.

    Attributes:
        step: the state of dual averaging.
        mass: the running covariance and the current inverse mass, for each part of the layout.
        adapt_mass: whether the inverse mass is estimated.
    """

    step: DualAveragingAdaptationState
    mass: tuple[MassMatrixAdaptationState, ...]
    adapt_mass: bool = eqx.field(static=True, default=True)

    @property
    def inverse_mass(self) -> InverseMass:
        return tuple(m.inverse_mass_matrix for m in self.mass)

    def step_size(self, warming: Bool[Array, ""] | bool) -> Float[Array, ""]:
        """The current step size during warm-up, and the averaged one after it."""
        return jnp.exp(jnp.where(warming, self.step.log_step_size, self.step.log_step_size_avg))

    def values(self, warming: Bool[Array, ""] | bool = False) -> dict[str, Array]:
        """The values found: "step_size", and "inverse_mass" if that is a single array."""
        mass = {"inverse_mass": self.inverse_mass[0]} if len(self.mass) == 1 else {}
        return {"step_size": self.step_size(warming), **mass}


def values(tuning: Any) -> Any:
    """The values that a warm-up found, each in the place of its state."""
    return jax.tree.map(AdaptationState.values, tuning, is_leaf=_is_state)


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How one kernel adapts.

    Attributes:
        layout: the blocks of the inverse mass matrix.
        target_acceptance: the mean acceptance probability that the step size is tuned to.
        adapt_mass: whether to estimate the inverse mass matrix.
        gamma: how slowly dual averaging reacts. After t transitions, one whose acceptance is off by d changes the log
            step size by about d / (gamma sqrt(t)).
        ahead: step sizes are drawn towards this multiple of the one that a search found.
        trials: a search goes by the mean acceptance of this many trial moves of each step size.
    """

    layout: MassLayout
    target_acceptance: Any
    adapt_mass: bool = True
    gamma: float = 0.05
    ahead: float = 10.0
    trials: int = 1

    def init(
        self,
        key: PRNGKeyArray,
        state: Any,
        one_step: OneStep,
        step_size: Any = None,
        inverse_mass: InverseMass | None = None,
    ) -> AdaptationState:
        """The state before the first iteration.

        Args:
            key: a random key.
            state: the state in which the chain begins. `state.position` is a vector.
            one_step: a transition, by whose acceptance the search for a first step size goes.
            step_size: the first step size. None to search for one.
            inverse_mass: the first inverse mass. None for the identity.
        """
        position: Any = state.position
        parts = self.layout.split(position)
        mass = tuple(
            init(part.size) for (init, _, _), part in zip(self._mass(), parts, strict=True)
        )
        if inverse_mass is not None:
            given = zip(mass, inverse_mass, strict=True)
            mass = tuple(m._replace(inverse_mass_matrix=x) for m, x in given)
        dtype = position.dtype
        mass = jax.tree.map(lambda x: _cast(x, dtype), mass)
        if step_size is None:
            step_size = self._search(key, state, one_step, jnp.ones((), dtype), mass)
        step = _first(jnp.asarray(step_size, dtype), self.ahead)
        step = jax.tree.map(lambda x: _cast(x, dtype), step)
        return AdaptationState(step, mass, self.adapt_mass)

    def close(
        self, key: PRNGKeyArray, before: AdaptationState, state: Any, one_step: OneStep
    ) -> AdaptationState:
        """The state after a window: its covariance is taken over, and a step size is searched for that goes with it.

        A window of fewer than two draws has no covariance, and changes nothing.
        """
        if not self.adapt_mass:
            return before
        learnt = jnp.array([m.wc_state.sample_size > 1 for m in before.mass]).all()
        ends = zip(self._mass(), before.mass, strict=True)
        mass = _like(tuple(end(m) for (_, _, end), m in ends), before.mass)
        size = self._search(key, state, one_step, before.step_size(False), mass)
        after = AdaptationState(_first(size, self.ahead), mass, True)
        return jax.tree.map(
            lambda x, old: jnp.where(learnt, jnp.asarray(x, old.dtype), old), after, before
        )

    def _search(
        self, key: PRNGKeyArray, state: Any, one_step: OneStep, step_size: Array, mass: Any
    ) -> Array:
        """A step size near `step_size` at which acceptance crosses the target, by doubling or halving.

        If no step size does so, as on R^0, where all moves are accepted, it is `step_size` itself.
        """
        inverse_mass = tuple(m.inverse_mass_matrix for m in mass)

        def generator(size: Any) -> Callable:
            def trial(key: PRNGKeyArray) -> Array:
                _, info = one_step(key, state, size, inverse_mass)
                return jnp.nan_to_num(info.acceptance_rate)

            def move(key: PRNGKeyArray, _: Any) -> tuple[None, _Trials]:
                # One trial after another: side by side they take half as long again to compile.
                rates = jax.lax.map(trial, jax.random.split(key, self.trials))
                return None, _Trials(rates.mean())

            return move

        search: Any = libraries.step_size.find_reasonable_step_size
        found = search(key, generator, state, step_size, self.target_acceptance)
        limits = jnp.finfo(step_size.dtype)
        crosses = (found > limits.tiny) & (found < limits.max)
        return jnp.where(crosses, found, step_size)

    def update(
        self,
        state: AdaptationState,
        position: Float[Array, " n"],
        acceptance: Float[Array, ""],
        now: Phase,
    ) -> AdaptationState:
        """Learn from one transition, if it belongs to the warm-up."""
        _, update, _ = libraries.step_size.dual_averaging_adaptation(
            self.target_acceptance, gamma=self.gamma
        )

        def learn(mass: Any) -> Any:
            parts = zip(self._mass(), mass, self.layout.split(position), strict=True)
            return _like(tuple(add(m, part) for (_, add, _), m, part in parts), mass)

        def warm(state: AdaptationState) -> AdaptationState:
            mass = state.mass
            if self.adapt_mass:
                mass = jax.lax.cond(now.slow, learn, lambda m: m, mass)
            step = update(state.step, jnp.nan_to_num(acceptance))
            return _like(AdaptationState(step, mass, self.adapt_mass), state)

        return jax.lax.cond(now.warming, warm, lambda state: state, state)

    def _mass(self) -> list[tuple[Callable, Callable, Callable]]:
        return [
            libraries.mass_matrix.mass_matrix_adaptation(is_diagonal_matrix=not dense)
            for dense in self.layout.dense
        ]


class _Trials(NamedTuple):
    """What a search reads of the trial moves of one step size."""

    acceptance_rate: Array


def _first(step_size: Array, ahead: float) -> DualAveragingAdaptationState:
    """Dual averaging before its first update. Its average is the first step size."""
    init, _, _ = libraries.step_size.dual_averaging_adaptation(
        0.0
    )  # the target acceptance matters to updates only
    state = init(step_size)
    mu = jnp.log(ahead * step_size)
    return state._replace(log_step_size_avg=state.log_step_size, mu=mu)


def _is_state(x: Any) -> bool:
    return isinstance(x, AdaptationState)


def _times(matrix: Array, vector: Array) -> Array:
    """A covariance, or variances, times a vector. The product has full precision on every device."""
    if matrix.ndim == 1:
        return matrix * vector
    return jnp.matmul(matrix, vector, precision="highest")


def _cast(x: Any, dtype: Any) -> Array:
    """A strongly typed array. Floats have the chain's own precision."""
    x = jnp.asarray(x)
    return jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


def _like(tree: Any, reference: Any) -> Any:
    return jax.tree.map(lambda x, r: jnp.asarray(x, r.dtype), tree, reference)
