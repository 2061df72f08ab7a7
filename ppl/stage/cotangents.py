"""An identity function whose reverse pass replaces cotangents that are not finite by zero.

A choice that is masked out, dropped or idle may have infinite or NaN parameters. ``where`` keeps their values out of a
density. But the reverse pass multiplies their derivatives by a zero cotangent, and zero times infinity is NaN. This
identity stands between such a term and everything before it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, mlir
from jax.interpreters.batching import primitive_batchers

from .compat import Primitive, ShapedArray

finite_p = Primitive("finite_cotangent")
finite_p.def_impl(lambda x: x)
finite_p.def_abstract_eval(lambda x: ShapedArray(x.shape, x.dtype))
mlir.register_lowering(finite_p, mlir.lower_fun(lambda x: x, multiple_results=False))
ad.deflinear2(finite_p, lambda ct, _: [jnp.where(jnp.isfinite(ct), ct, 0)])
primitive_batchers[finite_p] = lambda args, dims: (finite_p.bind(*args), dims[0])


def finite_cotangents(tree: Any) -> Any:
    """The same values. In the reverse pass, cotangents that are not finite become zero."""

    def cut(x: Any) -> Any:
        return finite_p.bind(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x

    return jax.tree.map(cut, tree)
