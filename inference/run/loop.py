"""A loop: settings that advance a state by one iteration, and the compiled code that repeats this.

Everything iterative is such a loop: samplers, filters and fits. The author writes one iteration in plain JAX. Progress,
interruption and chunks are written once, here and in `runner`. The key of an iteration is `fold_in(key, iteration)`, so
the division into chunks changes no result.
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
    """Base of the states of loops. They hold arrays only, whose shapes never change.

    Attributes:
        iteration: the number of iterations done.
    """

    iteration: eqx.AbstractVar[Int[Array, ""]]


class Loop(Module):
    """Base of everything that runs iteration by iteration: settings with a method `step`."""

    @abc.abstractmethod
    def num_iterations(self, target: Any) -> int:
        """The number of iterations of a whole run."""

    @abc.abstractmethod
    def step(self, key: PRNGKeyArray, state: Any, target: Any) -> Any:
        """The state one iteration later (traced), with the same shapes and dtypes. `key` belongs to this iteration."""

    def has_result(self, iteration: int) -> bool:
        """Whether there is anything to return after this many iterations."""
        return iteration > 0

    def finished(self, state: Any) -> Any:
        """Whether a state needs no more iterations (traced). None if only their number decides."""
        return None

    def before_chunk(self, state: Any) -> tuple[Any, int | None]:
        """Work on the host before each chunk.

        Returns a state, and the number of iterations that it has room for (None for any number).
        """
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
        """Run all iterations in compiled chunks, started from the host, and return the last state.

        Ctrl-C ends the loop after the current chunk, with a warning.

        Args:
            key: a random key.
            state: the first state. It is donated.
            target: what the steps get as their target.
            title: the name of the loop in the progress bar and in messages.
            unit: the name of its iterations.
            progress: whether to show a progress bar.
            before_chunk: used in place of the method.

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
    """The same arrays without weak types. So a first state has the same type as every later one."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), tree)


def iteration_keys(key: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """The key of the first state, and the key from which the keys of the iterations are folded."""
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
