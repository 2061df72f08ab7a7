"""Everything that differs between the versions of JAX that Weft supports, in one place."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.core import ShapedArray as ShapedArray
from jax.core import Tracer as Tracer
from jax.core import eval_jaxpr as eval_jaxpr
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.interpreters.batching import fancy_primitive_batchers as fancy_primitive_batchers
from jax.interpreters.partial_eval import dce_jaxpr
from jax.lax import cond_p as cond_p
from jax.lax import scan_p as scan_p
from jax.lax import while_p as while_p

CALLS = frozenset({"jit", "pjit", "checkpoint", "remat", "remat2", "closed_call", "core_call"})
"""Primitives that merely call an inner jaxpr: sites inside belong to the caller's scope."""


def is_jaxpr(x: Any) -> bool:
    """Whether ``x`` is a jaxpr, open or closed (from JAX 0.11 the two are one class)."""
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def open_jaxpr(x: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr with equations behind ``x``, and its constants."""
    if hasattr(x, "jaxpr") and hasattr(x.jaxpr, "eqns"):
        return x.jaxpr, x.consts
    return x, getattr(x, "consts", ())


def consts_first(closed: Any) -> tuple[Any, list[Any]]:
    """The jaxpr with its constants as leading arguments, and the constants."""
    opened, consts = open_jaxpr(closed)
    if not consts:
        return opened, []
    info = opened.debug_info
    names = None if info.arg_names is None else ("",) * len(consts) + tuple(info.arg_names)
    invars = [*opened.constvars, *opened.invars]
    return opened.replace(
        constvars=[], invars=invars, debug_info=info._replace(arg_names=names)
    ), list(consts)


def needed(jaxpr: Any) -> Any:
    """A jaxpr without constants, less the equations that no result needs; its arguments stay."""
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Every jaxpr among the parameters of an equation."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if is_jaxpr(item):
                found.append(item)
    return found


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """``(num_consts, num_carry)`` of a scan equation."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluate one equation as JAX would."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if not isinstance(params, dict):
        functions, params = params
        args = [*functions, *args]
    with jax.extend.source_info_util.user_context(eqn.source_info.traceback):
        outs = eqn.primitive.bind(*args, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


generation = jax.make_user_context(0) if hasattr(jax, "make_user_context") else None
"""Part of the key of all of JAX's tracing caches; see ``tracing_generation``."""


def tracing_generation(number: int) -> Any:
    """Trace with caches of inner jaxprs (scan bodies, inner jits) that no other generation shares."""
    return contextlib.nullcontext() if generation is None else generation(number)


def is_typed_key(key: Any) -> bool:
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def as_key(key: Any) -> jax.Array:
    """A typed scalar key from a typed or a raw one.

    Raises:
        TypeError: if ``key`` is neither.
    """
    if is_typed_key(key):
        if key.shape != ():
            raise TypeError(
                f"expected one key, got keys of shape {key.shape}: use jax.vmap over the keys"
            )
        return key
    if getattr(key, "dtype", None) == jnp.uint32 and getattr(key, "ndim", 0) == 1:
        return jax.random.wrap_key_data(key)
    raise TypeError(
        f"expected a random key such as jax.random.key(0), got {type(key).__name__}"
        + (f" of shape {key.shape} and dtype {key.dtype}" if hasattr(key, "dtype") else "")
    )


def name_hash(name: str) -> int:
    """The integer folded into a scope's key for a name (stable across versions and processes)."""
    return zlib.crc32(name.encode())


def where_in_source(eqn: Any) -> str:
    """The user's line that an equation comes from, for messages."""
    try:
        line = jax.extend.source_info_util.summarize(eqn.source_info)
    except Exception:  # not worth an error of its own
        return ""
    return "" if line in ("", "<unknown>") else f" ({line})"
