"""Splitting a pytree into arrays, which are traced, and a hashable rest.

The rule is Equinox's, except for floats: arrays and Python floats are traced. Ints, bools, strings, functions and None
are part of the structure, hence of the compilation key. Inside a distribution every number is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .compat import Tracer


class _Slot:
    """A placeholder in a skeleton: an array goes here."""

    def __repr__(self) -> str:
        return "*"


SLOT = _Slot()


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, Tracer))


def is_traced(x: Any) -> bool:
    """The rule for the arguments of models: arrays and Python floats."""
    return is_array(x) or isinstance(x, (float, complex))


def is_number(x: Any) -> bool:
    """The rule inside distributions: arrays and every Python number."""
    return is_array(x) or isinstance(x, (bool, int, float, complex))


class Skeleton:
    """A pytree without its arrays. It compares and hashes by structure."""

    __slots__ = ("_hash", "static", "treedef")

    def __init__(self, treedef: Any, static: tuple[Any, ...]) -> None:
        self.treedef = treedef
        self.static = static
        self._hash: int | None = None

    def unpack(self, arrays: Sequence[Any]) -> Any:
        """The pytree, with ``arrays`` in the slots."""
        rest = iter(arrays)
        return jax.tree.unflatten(
            self.treedef, [next(rest) if s is SLOT else s for s in self.static]
        )

    @property
    def num_arrays(self) -> int:
        return sum(s is SLOT for s in self.static)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Skeleton)
            and self.treedef == other.treedef
            and len(self.static) == len(other.static)
            and all(
                a is b or (type(a) is type(b) and bool(a == b))
                for a, b in zip(self.static, other.static, strict=True)
            )
        )

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.treedef, self.static))
        return self._hash

    def __repr__(self) -> str:
        return "Skeleton"


def pack(tree: Any, traced: Callable[[Any], bool] = is_traced) -> tuple[list[Any], Skeleton]:
    """``(arrays, skeleton)`` with ``skeleton.unpack(arrays)`` equal to ``tree``."""
    leaves, treedef = jax.tree.flatten(tree)
    flags = [traced(leaf) for leaf in leaves]
    arrays = [jnp.asarray(leaf) for leaf, f in zip(leaves, flags, strict=True) if f]
    static = tuple(SLOT if f else leaf for leaf, f in zip(leaves, flags, strict=True))
    return arrays, Skeleton(treedef, static)
