"""What an inference algorithm is: settings, and three pure functions of a key, a state and a target.

An algorithm is an Equinox module of settings. `init` makes its state, `step` advances the state by one iteration, and
`result` turns it into what the user reads. `run` puts them together. The author of an algorithm writes the first three,
for one data set, in plain JAX. The rest is written once, here:

- **Compilation.** `run` stages the target anew at every call, outside compiled code. It passes it to two functions of
  this module that `eqx.filter_jit` compiles. Arrays that the model captured travel as operands, and the rest compares
  by structure. So new data of the same shape compile nothing, and a global that was bound again is never outdated.
- **Chunks.** Iterations run in compiled chunks, which the host starts one after another. Progress, interruption and
  checkpoints happen between chunks. The key of an iteration is `fold_in(key, iteration)`, so the division into chunks
  changes no result.
- **Tracing.** Called under `jit` or `vmap` (over data sets, say), `run` is one scan and shows no progress.
"""

from __future__ import annotations

import abc
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray
from weft.ppl import Target
from weft.ppl.programs.printing import Printed
from weft.ppl.stage.keys import as_key

from .loop import Loop, iterate, iteration_keys, strong
from .loop import State as State
from .runner import tracing


class Algorithm(Printed, Loop):
    """Base of all algorithms: settings with the methods `init`, `step`, `result` and `run`."""

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, target: Target, init: Any = None) -> Any:
        """The state before the first iteration (traced). `init` are choices to begin at, if the algorithm takes any."""

    @abc.abstractmethod
    def result(self, state: Any, target: Target) -> Any:
        """Turn a state, after `state.iteration` iterations, into the user's result."""

    def check(self, target: Target, init: Any = None) -> None:
        """Raise an error, before anything is compiled, for a target or choices that the algorithm cannot treat."""

    def prepare(self, target: Target) -> Algorithm:
        """The settings as they enter compiled code. Programs among them are staged."""
        return self

    def traced(self) -> Self:
        """The settings with their Python floats as arrays, so that another value of one needs no new compilation.

        A setting with a true attribute `keeps_floats` stays as it is. Its methods may branch on its numbers.
        """
        return jax.tree.map(
            lambda x: jnp.asarray(x) if type(x) is float else x,
            self,
            is_leaf=lambda x: getattr(x, "keeps_floats", False),
        )

    def cheap_settings(self) -> Algorithm:
        """Cheaper settings, tried first.

        The full settings are compiled only if the first state of the cheaper ones is not valid.
        """
        return self

    def is_valid(self, state: Any) -> bool:
        """Whether the run can go on from a first state. Its values are concrete."""
        return True

    def init_error(self, state: Any, target: Target) -> Exception:
        """The error to raise if a first state is not valid."""
        raise NotImplementedError

    def reserve(self, state: Any, num_iterations: int) -> Any:
        """A state with room for this many more iterations (traced), for runs that have no chunks."""
        return state

    def run(
        self, key: PRNGKeyArray, target: Target, *, init: Any = None, progress: bool = True
    ) -> Any:
        """Run the algorithm on a target.

        Ctrl-C ends the run after the current chunk. The run then returns what there is so far, with a warning.

        Args:
            key: a random key, typed (`jax.random.key`) or raw.
            target: what to infer: `model(*args).given(data)`.
            init: choices to begin at, if the algorithm takes any.
            progress: whether to show a progress bar.

        Returns:
            The algorithm's result: `Draws` or `Particles`.

        Raises:
            WeftError: if the algorithm does not apply to this target. The message names the sites.
        """
        _require_target(target, self)
        self.check(target, init)
        key = as_key(key)
        staged, settings = target.staged(), self.prepare(target).traced()
        if init is not None:
            init = jax.tree.map(jnp.asarray, init)
        if tracing(key, staged, init, settings):
            return settings.result(_whole(settings, staged, key, init), target)

        cheap = settings.cheap_settings()
        state = _begin(cheap, staged, key, init)
        if cheap is not settings and not self.is_valid(state):
            state = _begin(settings, staged, key, init)
        if not self.is_valid(state):
            raise self.init_error(state, staged)
        state = settings.in_chunks(key, state, staged, title=type(self).__name__, progress=progress)
        return settings.result(state, target)


@eqx.filter_jit
def _begin(algorithm: Algorithm, target: Target, key: PRNGKeyArray, init: Any) -> Any:
    return strong(algorithm.init(iteration_keys(key)[0], target, init))


@eqx.filter_jit
def _whole(algorithm: Algorithm, target: Target, key: PRNGKeyArray, init: Any) -> Any:
    state = strong(algorithm.init(iteration_keys(key)[0], target, init))
    start, stop = 0 if init is None else state.iteration, algorithm.num_iterations(target)
    return iterate(algorithm, target, key, algorithm.reserve(state, stop), start, stop)


def _require_target(target: Any, algorithm: Algorithm) -> None:
    if not isinstance(target, Target):
        raise TypeError(
            f"{type(algorithm).__name__}.run expected a Target, got {type(target).__name__}: "
            "condition a program first, model(*args).given(data), or .given() if it has no data"
        )
