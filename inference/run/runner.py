"""The loop on the host: compiled chunks, a progress bar, an interruption that keeps what is done.

Long work is a state advanced by `advance(state, start, stop)`, one compiled function whose bounds
are traced: one compilation serves chunks of any length, so the loop makes them as long as they can
be while the bar still moves. What is computed depends on the iteration only, never on where a chunk
ends.
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
"""Iterations of the first chunk, before anything is known of their cost."""

CHUNK_SECONDS = 0.2
"""How long a chunk should take: the bar moves five times a second, and the host costs nothing."""


def tracing(*trees: Any) -> bool:
    """Whether this call is being traced: by its arguments, or by a jit around it."""
    leaves = jax.tree.leaves(trees)
    return any(isinstance(x, Tracer) for x in (*leaves, jnp.zeros(())))


def run_chunks(
    advance: Callable[[State, int, int], State],
    state: State,
    start: int,
    stop: int,
    *,
    title: str,
    progress: bool = True,
    describe: Callable[[State], str] | None = None,
    finished: Callable[[State], bool] | None = None,
    before_chunk: Callable[[State], tuple[State, int | None]] = lambda state: (state, None),
) -> tuple[State, int]:
    """Advance `state` from iteration `start` to `stop` in chunks.

    Ctrl-C ends the loop after the chunk in progress; a second one raises `KeyboardInterrupt` at
    once.

    Args:
        advance: `advance(state, first, last)` runs the iterations `first, ..., last - 1`; it may
            donate `state`.
        state: the state to begin with.
        start: the first iteration.
        stop: one past the last iteration.
        title: what the progress bar is called.
        progress: whether to show it.
        describe: a few words on a state, shown beside the bar.
        finished: whether a state needs no more iterations, which would leave it as it is.
        before_chunk: called before each chunk; gives the state to go on with, and how long the chunk may be, at most.

    Returns:
        The last state, and the iteration reached: `stop` unless it was interrupted or finished.
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
                if describe is not None:
                    bar.set_postfix_str(describe(state), refresh=False)
                bar.update(last - done)
            done = last
            if finished is not None and finished(state):
                break
    return state, done


def _next_size(size: int, seconds: float) -> int:
    ratio = CHUNK_SECONDS / max(seconds, 1e-6)
    return max(1, int(size * min(max(ratio, 0.25), 8.0)))


@contextlib.contextmanager
def _bar(title: str, start: int, stop: int, progress: bool) -> Iterator[Any]:
    """A tqdm bar in a terminal or a notebook; in a log file it writes seldom."""
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
    """Set an event on Ctrl-C instead of raising.

    An exception in the middle of a chunk would lose the state, whose buffers the chunk was given to
    reuse.
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
