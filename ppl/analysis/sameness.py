"""Whether a part of a program computes a known function. The equations are compared one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from weft.ppl.stage.compat import open_jaxpr
from weft.ppl.stage.equality import same_equations
from weft.ppl.stage.jaxprs import behind


def computes(f: Callable[[Any], Any], eqns: Sequence[Any], result: Any, source: Any) -> bool:
    """Whether the equations that ``f`` makes, and no others, compute ``result`` from the variable ``source``.

    Leading axes may be batch axes, over which ``f`` was mapped or with which it was called.
    """
    own = _between(source, result, eqns)
    shape, dtype, weak = source.aval.shape, source.aval.dtype, source.aval.weak_type
    g, aval = f, jax.ShapeDtypeStruct(shape, dtype, weak_type=weak)
    for _ in range(len(shape) - 1):
        other = open_jaxpr(jax.make_jaxpr(g)(aval))[0]
        pair = _between(other.invars[0], other.outvars[0], other.eqns)
        names = {source: other.invars[0]}
        same = same_equations(own, pair, names, ignored=("ctx_mesh",))
        if same and names.get(result) is other.outvars[0]:
            return True
        g = jax.vmap(g)
    return False


def _between(source: Any, result: Any, eqns: Sequence[Any]) -> list[Any]:
    """The equations between a source and a result that the result needs."""
    return behind([e for e in eqns if source not in e.outvars], [result])
