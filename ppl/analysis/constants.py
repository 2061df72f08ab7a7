"""Integers that are known while a program is traced: tables of indices, and reading arrays by them.

They are computed with NumPy. Compiling small XLA programs for them would take longer than they save.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.compat import Literal, Tracer, bind, inner_jaxprs, open_jaxpr
from weft.ppl.stage.jaxprs import run
from weft.ppl.stage.wiring import is_call

SMALL = 1 << 14
"""The largest number of elements for which this is done."""

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
}


def folded(
    eqn: Any, args: Sequence[Any], mapped: Callable[..., list[Any]] | None = None
) -> list[Any]:
    """The results of an equation (or of what it was ``mapped`` to), computed now if its indices are constants.

    Reading an array at all of its indices in order only rearranges it. That is done without a gather, since the
    derivative of a gather is a scatter.
    """
    f = functools.partial(_bind, eqn) if mapped is None else mapped
    name = eqn.primitive.name
    reads = name in ("gather", "dynamic_slice")
    fixed = args[1:] if reads else args
    sizes = [*map(np.size, args), *(math.prod(v.aval.shape) for v in eqn.outvars)]
    tried = reads or name in _RULES or is_call(eqn)
    if not tried or sum(sizes) > SMALL or not all(map(_known, fixed)):
        return f(*args)
    if not reads:
        return _by_numpy(jax.make_jaxpr(f)(*args), args) or f(*args)
    operand = args[0]
    start = np.arange(np.size(operand)).reshape(np.shape(operand))
    found = _by_numpy(jax.make_jaxpr(f)(start, *fixed), [start, *fixed])
    order = None if found is None else _order(start, found[0])
    if order is None or found is None:
        return f(*args)
    squeezed = jnp.reshape(operand, [n for n in start.shape if n != 1])
    return [jnp.transpose(squeezed, order).reshape(found[0].shape)]


def known_integers(eqns: Sequence[Any], known: dict[Any, Any]) -> dict[Any, Any]:
    """The values that equations compute from known integers alone, where they can be found."""

    def equation(eqn: Any, ins: list[Any]) -> Sequence[Any]:
        outs = None if any(x is None for x in ins) else _computed(eqn, ins)
        return [None] * len(eqn.outvars) if outs is None else outs

    start = {v: x for v, x in known.items() if _known(x)}
    found = run(eqns, collections.defaultdict(lambda: None, start), equation)
    return {v: x for v, x in found.items() if x is not None}


def _bind(eqn: Any, *args: Any) -> list[Any]:
    return bind(eqn, args)


def _known(x: Any) -> bool:
    if isinstance(x, Tracer):
        return False
    dtype = getattr(x, "dtype", None) or np.result_type(x)
    return isinstance(dtype, np.dtype) and dtype.kind in "biu"


def _order(start: np.ndarray, places: np.ndarray) -> tuple[int, ...] | None:
    """The transposition that reads an array's entries at some indices, up to axes of size one; None if none does."""
    if places.size != start.size:
        return None
    squeezed = start.reshape([n for n in start.shape if n != 1])
    for order in itertools.permutations(range(squeezed.ndim)) if squeezed.ndim < 6 else ():
        if (squeezed.transpose(order).ravel() == places.ravel()).all():
            return order
    return None


def _by_numpy(closed: Any, args: Sequence[Any]) -> list[np.ndarray] | None:
    """The results of a jaxpr of integers; None if a primitive is unsupported."""
    opened, consts = open_jaxpr(closed)
    values = dict(zip([*opened.constvars, *opened.invars], [*consts, *args], strict=True))
    found = known_integers(opened.eqns, values)
    outs = [v.val if isinstance(v, Literal) else found.get(v) for v in opened.outvars]
    return None if any(x is None for x in outs) else list(map(np.asarray, outs))


def _computed(eqn: Any, ins: Sequence[Any]) -> list[np.ndarray] | None:
    """The results of an equation of known integers; None if it has other numbers or its primitive is unsupported."""
    if not all(map(_known, ins)):
        return None
    if is_call(eqn):
        return _by_numpy(inner_jaxprs(eqn)[0], ins)
    rule = _RULES.get(eqn.primitive.name)
    outs = None if rule is None else rule(eqn, *map(np.asarray, ins))
    return None if outs is None else _typed(eqn, outs)


def _typed(eqn: Any, outs: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(x, v.aval.dtype) for x, v in zip(outs, eqn.outvars, strict=True)]


def _broadcast(eqn: Any, x: np.ndarray) -> list[Any]:
    shape = [1] * len(eqn.params["shape"])
    for size, place in zip(x.shape, eqn.params["broadcast_dimensions"], strict=True):
        shape[place] = size
    return [np.broadcast_to(x.reshape(shape), eqn.params["shape"])]


def _reshape(eqn: Any, x: np.ndarray) -> list[Any]:
    order = eqn.params.get("dimensions")
    return [(x if order is None else x.transpose(order)).reshape(eqn.params["new_sizes"])]


def _iota(eqn: Any) -> list[Any]:
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    return [np.indices(shape)[axis]]


def _gather(eqn: Any, x: np.ndarray, indices: np.ndarray) -> list[Any] | None:
    """XLA's gather with all indices within bounds: a window of the operand at each index."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rank = len(eqn.outvars[0].aval.shape)
    batch = [a for a in range(rank) if a not in numbers.offset_dims]
    offsets = iter(numbers.offset_dims)

    def along(values: np.ndarray, places: Sequence[int]) -> np.ndarray:
        shape = [1] * rank
        for size, place in zip(values.shape, places, strict=True):
            shape[place] = size
        return values.reshape(shape)

    index = []
    for d, (n, size) in enumerate(zip(x.shape, sizes, strict=True)):
        if d in numbers.operand_batching_dims:
            which = list(numbers.operand_batching_dims).index(d)
            place = batch[numbers.start_indices_batching_dims[which]]
            index.append(along(np.arange(n), [place]))
            continue
        at = np.zeros((1,) * rank, int)
        if d in numbers.start_index_map:
            start = indices[..., list(numbers.start_index_map).index(d)]
            if start.size and (start.min() < 0 or start.max() + size > n):
                return None
            at = along(start, batch)
        if d not in numbers.collapsed_slice_dims:
            at = at + along(np.arange(size), [next(offsets)])
        index.append(at)
    return [np.broadcast_to(x[tuple(index)], eqn.outvars[0].aval.shape)]


_RULES: dict[str, Callable[..., list[Any] | None]] = {
    **{name: lambda eqn, *xs, g=g: [g(*xs)] for name, g in _ELEMENTWISE.items()},
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "gather": _gather,
    "select_n": lambda eqn, i, *cases: [np.choose(i.astype(int), cases)],
    "convert_element_type": lambda eqn, x: [x],
    "reshape": _reshape,
    "squeeze": lambda eqn, x: [x.squeeze(eqn.params["dimensions"])],
    "transpose": lambda eqn, x: [x.transpose(eqn.params["permutation"])],
    "concatenate": lambda eqn, *xs: [np.concatenate(xs, eqn.params["dimension"])],
    "stack": lambda eqn, *xs: [np.stack(xs, eqn.params["axis"])],
    "clamp": lambda eqn, low, x, high: [np.clip(x, low, high)],
}
