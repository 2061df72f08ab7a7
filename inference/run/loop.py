"""A loop: settings that advance a state by one iteration, and the compiled code that does it many times.

Everything iterative is such a loop: samplers, filters and fits. The author writes one iteration in
plain JAX. Progress, interruption and chunks are written once, here and in `runner`. The key of an
iteration is `fold_in(key, iteration)`, so that chunks change nothing.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray
from weft.ppl.stage.modules import Module

from .runner import run_chunks


class State(eqx.Module):
    """Base of the states of loops: arrays only, of shapes that never change.

    Attributes:
        iteration: the number of iterations done.
    """

    iteration: eqx.AbstractVar[Int[Array, ""]]


class Loop(Module):
    """Base of what runs iteration by iteration: settings with a `step`."""

    @abc.abstractmethod
    def num_iterations(self, target: Any) -> int:
        """How many iterations a whole run takes."""

    @abc.abstractmethod
    def step(self, key: PRNGKeyArray, state: Any, target: Any) -> Any:
        """The state one iteration later (traced), with the same shapes and dtypes. `key` is this iteration's own."""

    def has_result(self, iteration: int) -> bool:
        """Whether there is anything to return after so many iterations."""
        return iteration > 0

    def finished(self, state: Any) -> Any:
        """Whether a state needs no more iterations (traced); None, where their number alone decides."""
        return None

    def before_chunk(self, state: Any) -> tuple[Any, int | None]:
        """Work on the host before each chunk: gives a state, and the iterations it has room for (None: any number)."""
        return state, None

    def describe(self, state: Any) -> str:
        """A few words for the progress bar."""
        return ""

    def in_chunks(
        self,
        key: PRNGKeyArray,
        state: Any,
        target: Any,
        *,
        title: str,
        unit: str = "iterations",
        progress: bool = True,
        before_chunk: Callable[[Any], tuple[Any, int | None]] | None = None,
    ) -> Any:
        """The state after all iterations, advanced from the host in compiled chunks.

        Ctrl-C ends the loop after the chunk in progress, with a warning.

        Args:
            key: a random key.
            state: the state to begin with. It is donated.
            target: what the steps are handed.
            title: what the loop is called in the progress bar and in messages.
            unit: what its iterations are called.
            progress: whether to show a progress bar.
            before_chunk: takes the place of the method.

        Raises:
            KeyboardInterrupt: if the loop is interrupted before there is any result.
        """
        start, stop = int(state.iteration), self.num_iterations(target)

        def advance(state: Any, first: int, last: int) -> Any:
            return _advance((self, target, key, jnp.int32(first), jnp.int32(last)), state)

        state, done = run_chunks(
            advance,
            state,
            start,
            stop,
            title=title,
            progress=progress,
            describe=self.describe,
            finished=self.finished,
            before_chunk=self.before_chunk if before_chunk is None else before_chunk,
        )
        if done < stop and not self.finished(state):
            interrupted = f"{title} was interrupted after {done} of {stop} {unit}"
            if not self.has_result(done):
                raise KeyboardInterrupt(f"{interrupted}, before there was any result")
            warnings.warn(f"{interrupted}: this result holds what there is", stacklevel=4)
        return state


def strong(tree: Any) -> Any:
    """The same arrays without weak types, so that a first state has the type of every later one."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), tree)


def iteration_keys(key: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """The key of the first state, and the one that the iterations' keys are folded from."""
    first, rest = jax.random.split(key)
    return first, rest


def iterate(loop: Loop, target: Any, key: PRNGKeyArray, state: Any, start: Any, stop: Any) -> Any:
    """Advance a state from iteration `start` to `stop`, or until it is finished (traced)."""
    _, rest = iteration_keys(key)

    def body(i: Any, state: Any) -> Any:
        return strong(loop.step(jax.random.fold_in(rest, i), state, target))

    if loop.finished(state) is None:
        return jax.lax.fori_loop(start, stop, body, state)

    def goes_on(carry: Any) -> Any:
        return (carry[0] < stop) & ~loop.finished(carry[1])

    return jax.lax.while_loop(
        goes_on, lambda carry: (carry[0] + 1, body(*carry)), (jnp.asarray(start), state)
    )[1]


@eqx.filter_jit(donate="all-except-first")
def _advance(fixed: tuple[Any, ...], state: Any) -> Any:
    # The state is donated: buffers of draws are written in place, chunk after chunk.
    loop, target, key, start, stop = fixed
    return iterate(loop, target, key, state, start, stop)
