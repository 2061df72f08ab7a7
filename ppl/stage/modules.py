"""Modules whose methods can be handed to JAX as functions.

JAX finds what it has traced and compiled by the function, which it hashes and compares. An Equinox module compares by
its fields. So a method of a module that holds an array or a dict cannot be given to `jax.jit`, `jax.lax.scan` or
`jax.checkpoint`. Modules are immutable, so the object itself is as good a key. A method of a `Module` here hashes and
compares by its function and by the identity of its owner. As with every function under `jax.jit`, values that the first
trace read from outside stay as they were then.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np


class Method(eqx.Module):
    """A method of a module. It is a pytree like its module, and equal to the same method of the same module."""

    __func__: Callable[..., Any] = eqx.field(static=True)
    __self__: Any

    def __init__(self, function: Callable[..., Any], owner: Any) -> None:
        self.__func__ = function
        self.__self__ = owner
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, name, getattr(function, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        return types.MethodType(self.__func__, self.__self__)

    def __hash__(self) -> int:
        return hash((self.__func__, id(self.__self__)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Method)
            and self.__func__ is other.__func__
            and self.__self__ is other.__self__
        )


class Module(eqx.Module):
    """Base of classes with methods: an Equinox module whose methods compare by the identity of their owner.

    Fields that are set to numbers of NumPy hold Python numbers. Equinox would trace the others, like arrays, and a
    number of particles must be known.
    """

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.item() if isinstance(value, np.generic) else value)

        def __getattribute__(self, name: str) -> Any:
            found = object.__getattribute__(self, name)
            if (
                isinstance(found, types.MethodType)
                and found.__self__ is self
                and not name.startswith("__")
            ):
                return Method(found.__func__, self)
            return found


class Noun(Module):
    """Base of classes that hold arrays. It hashes and compares by identity, so that JAX can call objects, too."""

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __eq__(self, other: object) -> bool:
        return self is other
