"""Which functions of their operands equations compute: affine functions, polynomials, powers.

What cannot be proved counts as unknown. A cast that rounds is none of these. An equation is not
trusted if its derivative does not tell everything (``floor``), or is not that of its value (custom derivatives).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.compat import Literal, bind
from weft.ppl.stage.jaxprs import Place, flow
from weft.ppl.stage.wiring import states_derivative, wiring

# --- powers of one choice ---------------------------------------------------------------------------------------------

UNKNOWN: Any = object()
"""The power of an operand that is another function of the choice."""
_KEEPS = frozenset(
    ["broadcast_in_dim", "reshape", "squeeze", "copy", "copy_p", "convert_element_type"]
)


def keeps_numbers(eqn: Any) -> bool:
    """Whether an equation gives the numbers that it reads in the same order, in another shape or precision."""
    name = eqn.primitive.name
    turns = name == "reshape" and eqn.params.get("dimensions") is not None
    return name in _KEEPS and not turns and not rounds(eqn)


def rounds(eqn: Any) -> bool:
    """Whether an equation rounds real numbers: to integers, or to fewer digits than single precision has."""
    name = eqn.primitive.name
    if name not in ("convert_element_type", "reduce_precision"):
        return False
    if not _is_real(eqn.outvars[0]):
        return True
    if not _is_real(eqn.invars[0]):
        return False
    before = jnp.finfo(eqn.invars[0].aval.dtype)
    kept = eqn.params.get("exponent_bits"), eqn.params.get("mantissa_bits")
    if name == "convert_element_type":
        after = jnp.finfo(eqn.outvars[0].aval.dtype)
        kept = after.nexp, after.nmant
    single = jnp.finfo(jnp.float32)
    return kept[0] < min(before.nexp, single.nexp) or kept[1] < min(before.nmant, single.nmant)


def _is_real(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def power_of(eqn: Any, powers: list[Any]) -> Any:
    """``(power, is_choice)`` if the result is a multiple of a power of a choice, or is the choice; else ``UNKNOWN``."""
    name = eqn.primitive.name
    if any(p is UNKNOWN for p in powers):
        return UNKNOWN
    first, *rest = powers
    if keeps_numbers(eqn):
        return first if first is not None else UNKNOWN
    exponent = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2, "integer_pow": eqn.params.get("y")}.get(
        name
    )
    if name == "pow" and isinstance(eqn.invars[1], Literal):
        exponent = float(eqn.invars[1].val)
    if exponent is not None:
        return first[0] * exponent, False
    if name in ("mul", "div"):
        a, b = (0 if p is None else p[0] for p in (first, rest[0]))
        return (a + b if name == "mul" else a - b), False
    if name in _MOVES and first and not any(rest) and not _fills(eqn):
        return first[0], False
    return UNKNOWN


_MOVES = frozenset(["transpose", "reshape", "gather", "slice", "dynamic_slice"])


def _fills(eqn: Any) -> bool:
    """Whether a gather gives a number of its own for indices out of range, other than NaN, which spoils all else."""
    value = eqn.params.get("fill_value")
    return value is not None and not np.isnan(value)


def multiple_of(eqn: Any, powers: list[Any]) -> Any:
    """The same for a choice that is a positive definite matrix, in the last two axes, times a number."""
    name, shapes = eqn.primitive.name, [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
    first, rest = powers[0], powers[1:]
    if keeps_numbers(eqn) and first is not UNKNOWN:
        kept = shapes[0][-2:] == shapes[-1][-2:]
        if name == "broadcast_in_dim":
            n = len(shapes[-1])
            kept = kept and tuple(eqn.params["broadcast_dimensions"][-2:]) == (n - 2, n - 1)
        return first if kept else UNKNOWN
    if name in ("mul", "div") and sum(p is not None for p in powers) == 1 and UNKNOWN not in powers:
        other = shapes[1 if first is not None else 0]
        if other[-2:] in ((), (1, 1)) and not (name == "div" and rest[0] is not None):
            return 1, False
    return UNKNOWN


# --- polynomials ------------------------------------------------------------------------------------------------------


def is_linear(eqn: Any, read: list[int]) -> bool:
    """Whether an equation is affine in some operands jointly: whether its derivative does not read them."""
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    if not all(map(_is_real, [*(eqn.invars[i] for i in read), *eqn.outvars])):
        return False
    name = eqn.primitive.name
    if name in _LINEAR or (name in _BILINEAR and len(read) == 1):
        return True
    if set(read) <= _LINEAR_IN.get(name, frozenset()):
        return True
    return is_polynomial(lambda *xs: bind(eqn, xs), avals, read, 1)


def is_polynomial(f: Callable[..., Any], avals: list[Any], read: list[int], degree: int) -> bool:
    """Whether ``f`` is a polynomial of at most this degree in the operands ``read`` jointly.

    That holds if all its equations are smooth and its derivative of that order does not read these operands.
    """

    def along(g: Callable[..., Any], direction: Any) -> Callable[..., Any]:
        return lambda *xs: jax.jvp(g, xs, direction)[1]

    def derivative(xs: Any, directions: Any) -> Any:
        def g(*some: Any) -> Any:
            full = list(xs)
            for i, x in zip(read, some, strict=True):
                full[i] = x
            return f(*full)

        for direction in directions:
            g = along(g, tuple(direction))
        return g(*(xs[i] for i in read))

    flags = [i in read for i in range(len(avals))]
    names: set[str] = set()
    reads(jax.make_jaxpr(f)(*avals), flags, names)
    if not names <= SMOOTH:
        return False
    directions = [[avals[i] for i in read]] * degree
    closed = jax.make_jaxpr(derivative)(avals, directions)
    return not any(reads(closed, [*flags, *[False] * (len(read) * degree)]))


_NAMES = """
add add_any broadcast_in_dim concatenate copy copy_p cumsum expand_dims neg reduce_sum reshape rev slice split squeeze
stack sub tile transpose unstack
"""
_LINEAR = frozenset(_NAMES.split())
"""Linear in all operands together."""
_BILINEAR = frozenset(["mul", "dot_general"])
_LINEAR_IN = {
    "div": frozenset([0]),
    "gather": frozenset([0]),
    "dynamic_slice": frozenset([0]),
    "dynamic_update_slice": frozenset([0, 1]),
    "scatter": frozenset([0, 2]),
    "scatter-add": frozenset([0, 2]),
}
"""Linear in these operands together."""

_SMOOTH = """
add add_any broadcast_in_dim cholesky concatenate conv_general_dilated convert_element_type copy copy_p cos cumsum div
dot_general dynamic_slice dynamic_update_slice exp expand_dims finite_cotangent gather imag integer_pow log log1p
logistic mul neg pad real reduce_precision reduce_sum reshape rev scatter-add scatter_add select_n sin slice split
sqrt square squeeze stack sub tanh tile transpose triangular_solve unstack
"""
SMOOTH = frozenset(_SMOOTH.split())
"""Primitives that are analytic where they are defined. For others (floor) a derivative does not tell everything."""


def reads(jaxpr: Any, flags: Sequence[bool], names: set[str] | None = None) -> list[bool]:
    """For each result of a jaxpr, whether it depends on the operands that are flagged.

    The names of the primitives on the way are added to ``names``. Calls, loops of known length, and branches chosen by
    something that is not flagged do not count as such: the analysis looks into them.
    """

    def transfer(eqn: Any, ins: list[bool], place: Place) -> list[bool] | None:
        if not any(ins):
            return [False] * len(eqn.outvars)
        w = wiring(eqn)
        chosen = w is not None and w.chooses is not None and ins[w.chooses]
        if w is not None and w.rounds is not None and not chosen and not states_derivative(eqn):
            return None
        if names is not None:
            names.add(_name(eqn))
        return [True] * len(eqn.outvars)

    return flow(jaxpr, flags, transfer, any)


def _name(eqn: Any) -> str:
    """The name of an equation's primitive. Casts that round have a name that says so."""
    return "rounding" if rounds(eqn) else eqn.primitive.name
