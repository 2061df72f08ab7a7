"""Count what JAX traces and compiles: `with counting() as count: ...; count.compilations == 0`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax


class Count:
    """How often JAX traced and compiled since the block began."""

    def __init__(self) -> None:
        self.compilations = 0
        self.lowerings = 0
        self.names: list[str] = []


_open: list[Count] = []


def _listen(event: str, duration: float, **details: Any) -> None:
    for count in _open:
        count.compilations += event == "/jax/core/compile/backend_compile_duration"
        if event == "/jax/core/compile/backend_compile_duration":
            count.names.append(str(details.get("fun_name", "")))
        count.lowerings += event == "/jax/core/compile/jaxpr_to_mlir_module_duration"


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def counting() -> Iterator[Count]:
    """Count inside a block; blocks may nest."""
    count = Count()
    _open.append(count)
    try:
        yield count
    finally:
        _open.remove(count)
