"""Whether a part of a program computes a function that is known: equation by equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from weft.ppl.stage.compat import Literal, inner_jaxprs, open_jaxpr


def computes(f: Callable[[Any], Any], eqns: Sequence[Any], result: Any, source: Any) -> bool:
    """Whether ``result`` is computed from the variable ``source`` alone, by the equations that ``f`` makes.

    Leading axes may be batch axes that ``f`` was mapped over, or was called with.
    """
    own = _slice(eqns, result, source)
    g, aval = f, jax.ShapeDtypeStruct(source.aval.shape, source.aval.dtype)
    for _ in range(len(aval.shape) - 1):
        other = open_jaxpr(jax.make_jaxpr(g)(aval))[0]
        pair = _slice(other.eqns, other.outvars[0], other.invars[0])
        if _same(own, result, source, pair, other.outvars[0], other.invars[0]):
            return True
        g = jax.vmap(g)
    return False


def _slice(eqns: Sequence[Any], result: Any, source: Any) -> list[Any]:
    """The equations that a result needs, as far as the source."""
    needed, found = {result}, []
    for eqn in reversed(eqns):
        if source not in eqn.outvars and needed & {*eqn.outvars}:
            found.append(eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return found[::-1]


def _same(
    a: Sequence[Any], out: Any, source: Any, b: Sequence[Any], other: Any, start: Any
) -> bool:
    names = {source: start}
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if x.primitive is not y.primitive or len(x.invars) != len(y.invars):
            return False
        for v, w in zip(x.invars, y.invars, strict=True):
            if isinstance(v, Literal) or isinstance(w, Literal):
                if not (isinstance(v, Literal) and isinstance(w, Literal) and v.val == w.val):
                    return False
            elif names.get(v) is not w:
                return False
        if _statics(x) != _statics(y):
            return False
        names.update(zip(x.outvars, y.outvars, strict=True))
    return names.get(out) is other


def _statics(eqn: Any) -> Any:
    inner = [str(j) for j in inner_jaxprs(eqn)]
    rest = {k: str(v) for k, v in eqn.params.items() if not hasattr(v, "eqns") and k != "ctx_mesh"}
    return inner, rest
