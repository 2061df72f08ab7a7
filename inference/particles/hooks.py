"""Hooks of a base class: optional methods and attributes that cannot be misspelt.

A base class has a method for everything that may be asked of a subclass. The methods that do nothing are overridden as
needed. A method with a wrong name would silently never be called. So when an object is made, the public names of its
class are compared with those of the base. It is an error if one is nearly the name of a hook, or is the name of a hook
but takes other arguments. The message shows the hook.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import numpy as np
from weft.ppl.stage.errors import ModelError

NEAR = 0.8
"""A method whose name is this similar to a hook's, and that takes its arguments, counts as that hook misspelt."""

VERY_NEAR = 0.9
"""A method whose name is this similar counts as misspelt, whatever its arguments are."""


def check_hooks(model: eqx.Module, base: type[eqx.Module], attributes: Mapping[str, type]) -> None:
    """Check the names in the class of a model against the hooks of a base class.

    Args:
        model: an instance of a subclass of `base`.
        base: the base class. Its methods, called by position, are hooks.
        attributes: the attributes that are hooks, with the type of each.

    Raises:
        ModelError: if a public name is a misspelt hook, or a hook with another signature. The message shows the hook.
    """
    _check_methods(type(model), base, tuple(attributes))
    _check_values(model, base, attributes)


def signature_of(base: type[eqx.Module], hook: str) -> str:
    """A hook as it should be written: `step(self, key, t, particle)`."""
    if not callable(getattr(base, hook, None)):
        return hook
    return f"{hook}({', '.join(['self', *_arguments(base, hook)])})"


@functools.cache
def _check_methods(cls: type, base: type, attributes: tuple[str, ...]) -> None:
    """Raise ModelError if a method or property of a class is a misspelt hook, or a hook with another signature."""
    methods = _methods(base)
    fields = {f.name for f in dataclasses.fields(cls)} - set(attributes)
    for name in sorted(_own_names(cls, base) - fields):
        member, shown = getattr(cls, name, None), f"{cls.__name__}.{name}"
        _refuse_hidden(cls, name, base)
        if name in methods:
            takes = callable(member) and _takes(cls, name, methods[name])
            if not (takes and _in_order(cls, name, base)):
                took = f"({', '.join(_arguments(cls, name))})" if callable(member) else ""
                raise ModelError(
                    f"{shown}{took} is called by position as {signature_of(base, name)}: give it these arguments"
                )
        elif name in attributes:
            if callable(member):
                raise ModelError(f"{shown} is an attribute, not a method: write @property above it")
        elif callable(member):

            def near(hook: str, name: str = name) -> float:
                return NEAR if _takes(cls, name, methods[hook]) else VERY_NEAR

            _refuse_near(shown, name, base, methods, near)
        elif isinstance(member, property):
            _refuse_near(shown, name, base, attributes, lambda hook: VERY_NEAR)


def _check_values(model: Any, base: type, attributes: Mapping[str, type]) -> None:
    """Raise ModelError if a field or constant is a misspelt attribute, or stands in the place of a method."""
    fields, methods = {f.name for f in dataclasses.fields(model)}, _methods(base)
    for name in sorted(_own_names(type(model), base) | fields):
        of_class = inspect.getattr_static(type(model), name, None)
        if name not in fields and (isinstance(of_class, property) or callable(of_class)):
            continue
        value, shown = getattr(model, name), f"{type(model).__name__}.{name}"
        if name in methods and not callable(value):
            raise ModelError(
                f"{shown} is called as {signature_of(base, name)}, and here {type(value).__name__}: give the field "
                "another name"
            )
        if name in methods and name in fields and not _binds(value, methods[name]):
            raise ModelError(
                f"{shown} is called by position as {signature_of(base, name)}: give the function in the field these "
                "arguments, without self"
            )
        if name not in methods and name not in attributes:

            def near(hook: str, value: Any = value) -> float:
                return NEAR if type(value) is attributes[hook] else np.inf

            _refuse_near(shown, name, base, attributes, near)


@functools.cache
def _methods(base: type) -> dict[str, int]:
    """The public methods of a base class, with the number of arguments of each call."""
    found = {n: _arguments(base, n) for n, x in vars(base).items() if n[0] != "_" and callable(x)}
    return {n: sum(p.kind is p.POSITIONAL_ONLY for p in args.values()) for n, args in found.items()}


def _own_names(cls: type, base: type) -> set[str]:
    """The public names that the classes of a model define, other than its base."""
    classes = [c for c in cls.__mro__ if c not in base.__mro__]
    return {name for c in classes for name in vars(c) if not name.startswith("_")}


def _refuse_hidden(cls: type, name: str, base: type) -> None:
    """Raise ModelError if a hook stands in a class after the base, whose own comes first and does nothing."""
    owner, *others = (c for c in cls.__mro__ if name in vars(c))
    if owner in base.__mro__:
        hidden = next(c.__name__ for c in others if c not in base.__mro__)
        raise ModelError(
            f"{cls.__name__}.{name} is that of {base.__name__}, which hides {hidden}.{name}: let {hidden} come first "
            f"among the bases, class {cls.__name__}({hidden}, ...)"
        )


def _refuse_near(
    shown: str, name: str, base: type, hooks: Iterable[str], near: Callable[[str], float]
) -> None:
    """Raise ModelError if a name is so near to a hook, by the score `near`, that it must be a misspelling of it."""
    similar = {hook: difflib.SequenceMatcher(None, name.lower(), hook).ratio() for hook in hooks}
    hook = max(similar, key=similar.__getitem__)
    # A part of the words of a hook is another name: `transition` beside `log_transition`.
    part = set(name.split("_")) < set(hook.split("_"))
    if similar[hook] >= near(hook) and not part:
        raise ModelError(
            f"{shown} is no hook of {base.__name__}: did you mean {signature_of(base, hook)}? If it is a helper of "
            f"your own, give it another name, or begin it with an underscore, _{name}"
        )


def _arguments(cls: type, name: str) -> dict[str, inspect.Parameter]:
    """The parameters of a method, without the model itself. If they are not known, any."""
    try:
        found = dict(inspect.signature(getattr(cls, name)).parameters)
    except ValueError:  # a function that is not written in Python
        return {"args": inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)}
    member = inspect.getattr_static(cls, name)
    bound = hasattr(type(member), "__get__")  # what is not, a partial function say, takes no self
    if bound and not isinstance(member, (staticmethod, classmethod)):
        first = next(iter(found.values()), None)
        if first is not None and first.kind is not first.VAR_POSITIONAL:  # of `*args`, self is one
            del found[first.name]
    return found


def _in_order(cls: type, name: str, base: type) -> bool:
    """Whether arguments that are named as those of a hook stand in the same order."""
    own, hook = list(_arguments(cls, name)), list(_arguments(base, name))
    return all(own.index(arg) == i for i, arg in enumerate(hook) if arg in own)


def _takes(cls: type, name: str, number: int) -> bool:
    """Whether a method can be called with this many arguments by position."""
    return _bind(inspect.Signature(list(_arguments(cls, name).values())), number)


def _binds(f: Any, number: int) -> bool:
    """Whether a function can be called with this many arguments by position, as far as its signature is known."""
    try:
        signature = inspect.signature(f)
    except ValueError:
        return True
    return _bind(signature, number)


def _bind(signature: inspect.Signature, number: int) -> bool:
    try:
        signature.bind(*range(number))
    except TypeError:
        return False
    return True
