"""The loop on the host: compiled chunks, a progress bar, and an interruption that keeps what is done.

Long work is a state that `advance(state, start, stop)` advances. This is one compiled function with traced bounds, so
one compilation serves chunks of any length. The loop makes chunks as long as possible while the bar still moves.
Results depend on the iteration only, never on where a chunk ends.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from tqdm import TqdmWarning
from weft.ppl.stage.compat import Tracer

State = TypeVar("State")

FIRST_CHUNK = 8
"""The number of iterations of the first chunk, when their cost is still unknown."""

CHUNK_SECONDS = 0.2
"""How long a chunk should take: the bar moves five times a second, and the host costs nothing."""


def tracing(*trees: Any) -> bool:
    """Whether this call is being traced, judged by its arguments and by a jit around it."""
    leaves = jax.tree.leaves(trees)
    return any(isinstance(x, Tracer) for x in (*leaves, jnp.zeros(())))


def run_chunks(
    advance: Callable[[State, int, int], State],
    state: State,
    start: int,
    stop: int,
    *,
    title: str,
    progress: bool,
    describe: Callable[[State], str],
    finished: Callable[[State], Any],
    before_chunk: Callable[[State], tuple[State, int | None]],
) -> tuple[State, int]:
    """Advance `state` from iteration `start` to `stop` in chunks.

    Ctrl-C ends the loop after the current chunk. A second Ctrl-C raises `KeyboardInterrupt` at once.

    Args:
        advance: `advance(state, first, last)` runs the iterations `first, ..., last - 1`. It may donate `state`.
        state: the first state.
        start: the first iteration.
        stop: one past the last iteration.
        title: the title of the progress bar.
        progress: whether to show the bar.
        describe: a few words on a state, shown beside the bar.
        finished: whether a state needs no more iterations. These would leave it as it is.
        before_chunk: called before each chunk. It gives the state to continue with, and the greatest length of the
            chunk.

    Returns:
        The last state, and the iteration reached: `stop`, unless the loop was interrupted or finished before.
    """
    done, size = start, FIRST_CHUNK
    with _bar(title, start, stop, progress) as bar, _interrupts() as interrupted:
        while done < stop and not interrupted.is_set():
            state, most = before_chunk(state)
            last = min(done + (size if most is None else min(size, most)), stop)
            began = time.perf_counter()
            state = jax.block_until_ready(advance(state, done, last))
            seconds = time.perf_counter() - began
            if done > start:  # the first chunk's time is mostly compilation
                size = _next_size(last - done, seconds)
            if bar is not None:
                bar.set_postfix_str(describe(state), refresh=False)
                bar.update(last - done)
            done = last
            if finished(state):
                break
    return state, done


def _next_size(size: int, seconds: float) -> int:
    ratio = CHUNK_SECONDS / max(seconds, 1e-6)
    return max(1, int(size * min(max(ratio, 0.25), 8.0)))


@contextlib.contextmanager
def _bar(title: str, start: int, stop: int, progress: bool) -> Iterator[Any]:
    """A tqdm bar in a terminal or a notebook. In a log file it writes seldom."""
    if not progress:
        yield None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # says only that a notebook lacks ipywidgets
        from tqdm.auto import tqdm

        bar = tqdm(total=stop, initial=start, desc=title, dynamic_ncols=True, leave=True)
    with bar:
        if not getattr(bar.fp, "isatty", lambda: True)():
            bar.mininterval = 10.0
        yield bar


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set an event on Ctrl-C instead of raising an exception.

    An exception in the middle of a chunk would lose the state, since the chunk reuses its buffers.
    """
    event = threading.Event()
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield event
        return

    def handler(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
