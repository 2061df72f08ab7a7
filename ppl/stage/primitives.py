"""Lists of JAX's primitives by name, by how the axes of their results correspond to those of their operands.

A primitive that is in no list is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Rule = TypeVar("Rule", bound=Callable[..., Any])

_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1
finite_cotangent floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p log2
logistic lt lt_to max min mul ne neg nextafter not one_minus_square or polygamma polynomial population_count pow
random_gamma_grad real reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
"""Index l of a result reads index l of the operands, or all of an operand without axes."""

_BATCHED = """
cholesky triangular_solve lu lu_solve lu_pivots_to_permutation eigh eig svd qr geqrf householder_product
tridiagonal_solve tridiagonal schur
"""
BATCHED = frozenset(_BATCHED.split())
"""Linear algebra: all axes but the last two are batch axes, in the same places in the results."""

_REDUCTIONS = """
argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
"""
REDUCTIONS = frozenset(_REDUCTIONS.split())
"""They go over the axes that their parameter ``axes`` names."""

CUMULATIVE = frozenset(["cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"])
"""They go along the axis that their parameter ``axis`` names."""


def rules(table: dict[str, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator ``rule(*names)``, which enters a rule in a table for the primitives with these names."""

    def rule(*names: str) -> Callable[[Rule], Rule]:
        def enter(f: Rule) -> Rule:
            table.update(dict.fromkeys(names, f))
            return f

        return enter

    return rule
