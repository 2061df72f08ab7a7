"""Marks: the equations that a draw with a gradient strategy leaves in a plain jaxpr.

A mark hands the draw on. It holds what the strategy needs, such as the log density of the draw. To JAX it is an
identity; the second stage of an expectation (``surrogates.py``) reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from weft.ppl.stage.compat import Primitive, ShapedArray, makes_ref
from weft.ppl.stage.jaxprs import Holds, equations

mark_p = Primitive("mark")


def mark(kind: str, site: Any, arrays: Sequence[Any], **params: Any) -> jax.Array:
    """Mark the first array, which is a draw. All arrays lead with the draw's batch axes."""
    return mark_p.bind(*arrays, kind=kind, name=".".join(site.address), **params)


def with_baselines(cost: jax.Array, per_draw: jax.Array, baselines: jax.Array) -> jax.Array:
    r"""A cost with a baseline for each of several draws. The baseline of a draw must not depend on that draw.

    Args:
        cost: a number computed from all draws.
        per_draw: ``(K,)`` numbers. The i-th is computed from the i-th draw, and tells which draw is meant.
        baselines: ``(K,)`` numbers. The i-th is a function of all draws but the i-th.

    Returns:
        The cost. Score terms of the i-th draw are multiplied by the cost less the i-th baseline.
    """
    return mark_p.bind(cost, per_draw, baselines, kind="control", name="")


@mark_p.def_abstract_eval
def _(draw: Any, *_: Any, **__: Any) -> ShapedArray:
    return ShapedArray(draw.shape, draw.dtype)


mark_p.def_impl(lambda draw, *_, **__: draw)
mlir.register_lowering(mark_p, lambda _, draw, *rest, **params: [draw])


def _batch(args: Any, dims: Any, **params: Any) -> Any:
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    args = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args, dims, strict=True)
    ]
    return mark_p.bind(*args, **params), 0


batching.primitive_batchers[mark_p] = _batch


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    return mark_p.bind(*primals, **params), tangents[0]


ad.primitive_jvps[mark_p] = _jvp


holds_marks = Holds(lambda eqn: eqn.primitive is mark_p)
makes_refs = Holds(makes_ref)


def kinds(code: Any) -> list[tuple[str, str]]:
    """The address and the kind of every mark in a jaxpr, or in a list of equations."""
    marks = (eqn.params for eqn, _ in equations(code) if eqn.primitive is mark_p)
    return [(params["name"], params["kind"]) for params in marks]


TAILED = ("enum", "mvd")
"""Kinds that need the rest of the program."""
