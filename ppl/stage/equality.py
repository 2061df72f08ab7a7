"""When two pieces of staged code are the same: they have the same equations in the same order. Names do not matter.

Literals and parameters are compared bit by bit: 0.0 is not -0.0, and NaN equals NaN. At each trace JAX wraps the rules
of custom derivatives in new objects. These are compared by the code of the functions inside, and by what the functions
hold (defaults, closures, attributes of callable objects).
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .compat import Literal, is_jaxpr, open_jaxpr
from .keys import is_typed_key


def outline(jaxpr: Any) -> tuple[Any, ...]:
    """A hash key: features that equal code always has in common."""
    opened, _ = open_jaxpr(jaxpr)
    return (
        tuple((str(v.aval.shape), str(v.aval.dtype)) for v in opened.invars),
        tuple((e.primitive.name, tuple(str(v.aval) for v in e.outvars)) for e in opened.eqns),
    )


def same_code(a: Any, b: Any) -> bool:
    """Whether two jaxprs have the same equations, constants and results."""
    if a is b:
        return True
    a, a_consts = open_jaxpr(a)
    b, b_consts = open_jaxpr(b)
    if len(a.eqns) != len(b.eqns) or not _all_same(a_consts, b_consts):
        return False
    names: dict[Any, Any] = {}
    return (
        _define(a.constvars, b.constvars, names)
        and _define(a.invars, b.invars, names)
        and same_equations(a.eqns, b.eqns, names)
        and _read(a.outvars, b.outvars, names)
    )


def same_values(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists hold the same: numbers bit by bit, arrays by identity."""
    return len(a) == len(b) and all(_same_function(x, y, set()) for x, y in zip(a, b, strict=True))


def same_equations(
    a: Sequence[Any], b: Sequence[Any], names: dict[Any, Any], ignored: Sequence[str] = ()
) -> bool:
    """Whether two lists of equations are the same.

    Args:
        a: equations in order.
        b: the other equations.
        names: for each variable of the first list, the corresponding variable of the second. The results are added to
            it.
        ignored: names of parameters that are not compared.
    """
    return len(a) == len(b) and all(
        e.primitive is f.primitive
        and _read(e.invars, f.invars, names)
        and e.params.keys() == f.params.keys()
        and all(k in ignored or _same(v, f.params[k]) for k, v in e.params.items())
        and _define(e.outvars, f.outvars, names)
        for e, f in zip(a, b, strict=True)
    )


def _define(xs: Any, ys: Any, names: dict[Any, Any]) -> bool:
    names.update(zip(xs, ys, strict=False))
    return len(xs) == len(ys) and all(x.aval == y.aval for x, y in zip(xs, ys, strict=True))


def _read(xs: Any, ys: Any, names: dict[Any, Any]) -> bool:
    return len(xs) == len(ys) and all(
        isinstance(y, Literal) and x.aval == y.aval and _same(x.val, y.val)
        if isinstance(x, Literal)
        else names.get(x) is y
        for x, y in zip(xs, ys, strict=True)
    )


def _all_same(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
    return len(xs) == len(ys) and all(map(_same, xs, ys))


def _same(a: Any, b: Any) -> bool:
    """Whether two literals, constants or parameters are the same."""
    if a is b:
        return True
    if is_jaxpr(a) and is_jaxpr(b):
        return same_code(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return _all_same(a, b)
    if isinstance(a, (np.ndarray, np.generic, jax.Array)):
        return _bits(a) == _bits(b)
    if isinstance(a, complex):
        return _same(a.real, b.real) and _same(a.imag, b.imag)
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if callable(a) or type(a).__name__ == "WrappedFun":
        return _same_function(a, b, set())
    return bool(a == b)


def _bits(x: Any) -> tuple[Any, ...]:
    x = np.asarray(jax.random.key_data(x) if is_typed_key(x) else x)
    return x.dtype, x.shape, x.tobytes()


# --- functions among the parameters -----------------------------------------------------------------------------------


def _same_function(a: Any, b: Any, seen: set[tuple[int, int]], internal: bool = True) -> bool:
    """Whether two callables do the same, judged by their code and by what they hold.

    JAX's own wrappers (``internal``) hold traces, tags and caches, which differ each time. Only the types of these are
    compared. What a user's function holds counts: numbers bit by bit, arrays by identity, objects by their attributes.
    An object's own ``==`` is asked only if it shows no attributes: most take 0.0 for -0.0, and True for 1.
    """
    if a is b or (id(a), id(b)) in seen:
        return True
    if type(a) is not type(b):
        return False
    seen.add((id(a), id(b)))

    def same(xs: Sequence[Any], ys: Sequence[Any], internal: bool = internal) -> bool:
        return len(xs) == len(ys) and all(
            _same_function(x, y, seen, internal) for x, y in zip(xs, ys, strict=True)
        )

    if isinstance(a, types.FunctionType):
        of_jax = is_of_jax(a.__globals__.get("__name__"))
        outside = of_jax or same(_outside(a, b), _outside(b, a), False)
        return a.__code__ == b.__code__ and same(_held(a), _held(b), of_jax) and outside
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and same([a.__self__], [b.__self__])
    if isinstance(a, functools.partial):
        return same([a.func, a.args, a.keywords], [b.func, b.args, b.keywords], False)
    if type(a).__name__ == "WrappedFun":
        return same([a.f, a.transforms], [b.f, b.transforms])
    if isinstance(a, (tuple, list)):
        return same(a, b)
    if isinstance(a, (bool, int, float, complex, str, bytes, np.generic)):
        return _same(a, b)
    if isinstance(a, (jax.Array, np.ndarray)):
        return False
    if is_jaxpr(a):
        return same_code(a, b)
    if internal and (isinstance(a, _BOOKS) or type(a) is object):
        return True
    if is_of_jax(type(a).__module__):
        return _same_wrapper(a, b, same, internal)
    if isinstance(a, dict):
        return same([*a, *a.values()], [*b, *b.values()])
    if isinstance(a, (set, frozenset)):
        return same(sorted(a, key=repr), sorted(b, key=repr))
    held, other = _attributes(a), _attributes(b)
    if held or other:
        return same([*held, *held.values()], [*other, *other.values()], False)
    own_hash = type(a).__hash__ not in (None, object.__hash__)
    return (own_hash and (a == b) is True) or (not own_hash and hasattr(a, "__dict__"))


def _same_wrapper(a: Any, b: Any, same: Callable[..., bool], internal: bool) -> bool:
    """The same for an object of JAX: a jit, a custom rule, a static argument, a callback; or one of its books."""
    if hasattr(a, "__wrapped__"):
        return all(same([getattr(a, n, None)], [getattr(b, n, None)]) for n in _PARTS)
    if "val" in _listed(getattr(type(a), "__slots__", ())):  # a static argument
        return same([a.val], [b.val], False)
    held = list(_attributes(a).values())
    if dataclasses.is_dataclass(a) and any(map(callable, held)):  # a callback
        return same(held, list(_attributes(b).values()), False)
    hashed = type(a).__hash__
    own_hash = hashed is not None and hashed is not object.__hash__
    if own_hash or internal:
        return not own_hash or (a == b) is True
    return hasattr(a, "__dict__") and same([vars(a)], [vars(b)], False)


_PARTS = ("__wrapped__", "jvp", "fwd", "bwd", "vmap_rule")
_BOOKS = (dict, set, weakref.ref)


def _attributes(x: Any) -> dict[str, Any]:
    """What an object holds, in its ``__dict__`` and in its slots."""
    slots = [n for t in type(x).__mro__ for n in _listed(vars(t).get("__slots__", ()))]
    held = {n: getattr(x, n) for n in slots if not n.startswith("__") and hasattr(x, n)}
    held |= getattr(x, "__dict__", {})
    return {n: held[n] for n in sorted(held)}


def _listed(names: Any) -> Sequence[str]:
    return [names] if isinstance(names, str) else list(names)


def _outside(f: types.FunctionType, other: types.FunctionType) -> list[Any]:
    """The attributes of a function, and the globals that it reads, if the other function has globals of its own."""
    read = {} if f.__globals__ is other.__globals__ else f.__globals__
    return [vars(f), {n: read[n] for n in sorted(global_names(f.__code__)) if n in read}]


def global_names(code: types.CodeType) -> set[str]:
    """The names that a function and those defined in it may read from their globals."""
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= global_names(const)
    return names


def _held(f: types.FunctionType) -> list[Any]:
    """What a function holds besides its code: its defaults and the contents of its closure."""
    cells = [c.cell_contents for c in f.__closure__ or () if is_filled(c)]
    return [f.__defaults__, f.__kwdefaults__, *cells]


def is_filled(cell: Any) -> bool:
    """Whether a variable of a closure has a value yet."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def is_of_jax(module: Any) -> bool:
    return str(module).split(".")[0] in ("jax", "jaxlib")
