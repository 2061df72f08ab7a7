"""What kernels that follow a density on R^n share: how they move a target, and which of their settings adapt."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Literal, Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from weft.inference.run.adaptation import Adaptation, AdaptationState, MassLayout, Phase
from weft.inference.run.settings import require_flags, require_probability
from weft.ppl import Target
from weft.ppl.stage.errors import DensityError, WeftError
from weft.ppl.stage.modules import Noun

from .kernel import Choices, Info, Kernel, entered

LogDensity = Callable[[Any], Float[Array, ""]]


class DensityKernel(Kernel):
    """Base of the kernels that follow a density on R^n: settings, and two functions of a density, `init` and `step`."""

    @abc.abstractmethod
    def init(self, position: Any, log_density: LogDensity) -> Any:
        """The state at a position."""

    @abc.abstractmethod
    def step(self, key: PRNGKeyArray, state: Any, log_density: LogDensity) -> tuple[Any, Any]:
        """One transition: the next state, and information on what happened."""

    @abc.abstractmethod
    def report(self, info: Any) -> Info:
        """The information on a transition as statistics, under the names that all kernels use."""

    def on(self, log_density: LogDensity) -> BoundKernel:
        """This kernel, bound to one density."""
        return BoundKernel(self, log_density)

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        space, state = self._at(choices, target)
        state, info = self.step(key, state, space.log_density)
        return space.to_choices(state.position), self.report(info)

    def _at(self, choices: Choices, target: Target) -> tuple[Any, Any]:
        """The unconstrained space of the target, and the kernel's state there at the given choices."""
        choices = entered(choices, target)
        discrete = [a for a in target.latents if target.sites[a].is_discrete]
        if discrete:
            raise DensityError(
                f"{type(self).__name__} moves continuous choices, and {', '.join(map(repr, discrete))} "
                f"{'is' if len(discrete) == 1 else 'are'} discrete: move the others by block(...), these by gibbs or "
                "metropolis_hastings, and join the two with cycle"
            )
        space = target.unconstrain().flat
        return space, self.init(space.from_choices(choices), space.log_density)


class BoundKernel(Noun):
    """A kernel, and the density that it leaves invariant. `kernel.on(log_density)` makes it.

    Attributes:
        kernel: the kernel.
        log_density: the log density, a function of a position.
    """

    kernel: DensityKernel
    log_density: LogDensity

    def init(self, position: Any) -> Any:
        """The state at a position."""
        return self.kernel.init(position, self.log_density)

    def step(self, key: PRNGKeyArray, state: Any) -> tuple[Any, Any]:
        """One transition: the next state, and information on what happened."""
        return self.kernel.step(key, state, self.log_density)


# Settings of dual averaging. Stan's (0.05 and 10) are for acceptance averaged along a trajectory. That of one
# proposal is noisier: with them step sizes swing so widely that their average misses the target.
GAMMA, AHEAD, TRIALS = 0.2, 1.0, 8


class AdaptiveKernel(DensityKernel):
    """Base of the density kernels with a step size and an inverse mass, which a warm-up tunes.

    Attributes:
        target_acceptance: the mean acceptance probability that the step size is tuned to.
        dense_mass: whether a warm-up estimates a full covariance as the inverse mass. Otherwise it estimates variances.
        adapt: what a warm-up tunes: step size and inverse mass (True), `"step_size"` alone, or nothing (False).
    """

    keeps_floats = False

    target_acceptance: Any = eqx.field(kw_only=True)
    dense_mass: bool = eqx.field(static=True, default=False, kw_only=True)
    adapt: bool | Literal["step_size"] = eqx.field(static=True, default=True, kw_only=True)

    def __check_init__(self) -> None:
        who = type(self).__name__
        if self.adapt not in (True, False, "step_size"):
            raise WeftError(f"{who}: adapt is True, False or 'step_size', got {self.adapt!r}")
        require_flags(self, "dense_mass")
        require_probability(self, "target_acceptance")
        self.check_scales()
        if not self.adapt and self.scales()[0] is None:
            raise WeftError(f"{who}: adapt=False keeps the step size that is given: give one")

    @abc.abstractmethod
    def check_scales(self) -> None:
        """Raise WeftError if the step size and the inverse mass that were given cannot be any."""

    @abc.abstractmethod
    def scales(self) -> tuple[Any, Any]:
        """The step size and the inverse mass that were given. Either is None if it was not given."""

    @abc.abstractmethod
    def with_scales(self, step_size: Any, inverse_mass: Any) -> Self:
        """This kernel with another step size and inverse mass. None for the inverse mass stands for the identity."""

    def trial(self, step_size: Any, inverse_mass: Any) -> DensityKernel:
        """The kernel whose acceptance decides the search for a first step size."""
        return self.with_scales(step_size, inverse_mass)

    def known_step(self) -> Any:
        """The step size.

        Raises:
            WeftError: if the kernel has none.
        """
        step_size = self.scales()[0]
        if step_size is None:
            who = type(self).__name__
            raise WeftError(
                f"{who}: there is no step size. Give one, {who}(0.1, ...), or let a warm-up find it: "
                "mcmc(kernel, num_warmup=500), then kernel.adapted(draws) has it"
            )
        if np.shape(step_size):
            raise WeftError(
                f"{type(self).__name__}: the step size is one number, got shape {np.shape(step_size)}; "
                "an inverse mass gives each coordinate its scale"
            )
        return step_size

    def tuning(
        self, key: PRNGKeyArray, choices: Choices, target: Target, before: Any = None
    ) -> AdaptationState | None:
        if not self.adapt:
            return None
        space, state = self._at(choices, target)
        step_size, inverse_mass = self.scales()
        adaptation = self._adaptation(space.size)

        def one_step(key: PRNGKeyArray, state: Any, size: Array, mass: tuple[Array, ...]) -> Any:
            kernel = self.trial(size, mass[0] if mass else inverse_mass)
            return kernel.step(key, state, space.log_density)

        if before is not None:
            return adaptation.close(key, before, state, one_step)
        first = None
        if adaptation.adapt_mass and inverse_mass is not None:
            dense = adaptation.layout.dense[0] and np.ndim(inverse_mass) == 1
            first = (jnp.diag(inverse_mass) if dense else jnp.asarray(inverse_mass),)
        return adaptation.init(key, state, one_step, step_size, first)

    def warm(
        self, key: PRNGKeyArray, choices: Choices, target: Target, tuning: Any, now: Phase
    ) -> tuple[Choices, Info, Any]:
        if tuning is None:
            return *self.move(key, choices, target), None
        space, state = self._at(choices, target)
        kernel = self.tuned(tuning.values(now.warming))
        state, info = kernel.step(key, state, space.log_density)
        adaptation = self._adaptation(space.size)
        learnt = adaptation.update(tuning, state.position, info.acceptance_rate, now)
        return space.to_choices(state.position), self.report(info), learnt

    def tuned(self, values: Any) -> Self:
        step_size, inverse_mass = self.scales()
        return self.with_scales(
            values.get("step_size", step_size), values.get("inverse_mass", inverse_mass)
        )

    def _adaptation(self, size: int) -> Adaptation:
        """How this kernel adapts on R^size. A metric does not adapt, and what is not to adapt has no part in it."""
        inverse_mass = self.scales()[1]
        given = inverse_mass is not None
        if given and is_array(inverse_mass):
            require_fit(type(self).__name__, inverse_mass, size)
        if self.adapt == "step_size" or (given and not is_array(inverse_mass)):
            layout, adapt_mass = MassLayout((), ()), False
        else:
            dense = self.dense_mass or (given and np.ndim(inverse_mass) == 2)
            layout, adapt_mass = MassLayout.make(size, dense), True
        return Adaptation(layout, self.target_acceptance, adapt_mass, GAMMA, AHEAD, TRIALS)


def is_array(x: Any) -> bool:
    """Whether a setting is an array, or a list that becomes one."""
    return hasattr(x, "shape") or isinstance(x, list)


def require_fit(who: str, inverse_mass: Any, size: int) -> None:
    """Raise WeftError unless an inverse mass has one number, or one row, for each coordinate of the position."""
    if np.shape(inverse_mass) not in ((size,), (size, size)):
        raise WeftError(
            f"{who}: the inverse mass has shape {np.shape(inverse_mass)}; the position has {size} numbers, so it is "
            f"{(size,)} or {(size, size)}"
        )


def rate(info: Any) -> Info:
    """The report of a kernel that accepts or rejects one point. A rate that is NaN counts as a rejection."""
    return {"acceptance_rate": jnp.nan_to_num(info.acceptance_rate)}
