"""Names of a package that are imported on first use (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax


def on_first_use(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions ``__getattr__`` and ``__dir__`` of a package whose names are imported on first use.

    Type checkers do not run them. So the package imports the same names under ``TYPE_CHECKING``.

    Args:
        package: the full name of the package.
        names: for each name, the full name of the module that has it, or of the module that it is.
    """

    def getattr_(name: str) -> Any:
        if (
            name == "__all__"
        ):  # asked by `from package import *`, which is to bring the later names, too
            return [n for n in dir_() if not n.startswith("_") and n != "TYPE_CHECKING"]
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        where = names[name]
        with (
            jax.ensure_compile_time_eval()
        ):  # constants of the module must not become part of a trace around
            module = importlib.import_module(where)
        own = where.rpartition(".")[2] == name and not hasattr(module, name)
        found = module if own else getattr(module, name)
        setattr(sys.modules[package], name, found)
        return found

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return getattr_, dir_
