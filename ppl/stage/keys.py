"""Random keys: what a key is, and which key each name of a staged program gets.

The key of a name is that of its scope with the hash of the name folded in, and the indices of the loops and batch axes
around it. The plan of a scope states this for every name. It is read off the jaxpr, and all keys are made before the
scope runs.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .compat import inner_jaxprs, open_jaxpr
from .control import eqn_holds_sites, estimated_p, lanes_p, scope_p
from .jaxprs import remembered
from .sites import site_p
from .wiring import inside, wiring


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
    """The integer that is folded into a scope's key for a name. It is the same in all versions and processes."""
    return zlib.crc32(name.encode())


@dataclasses.dataclass(frozen=True)
class KeyNode:
    """How the key of one name is made: fold in the name, then an index for each of ``loops``, then go on inside.

    The key of a site (``site``) is needed only to draw its choice.
    """

    loops: tuple[int, ...]
    inner: dict[str, KeyNode] | None = None
    site: bool = False


@remembered
def key_plan(jaxpr: Any) -> dict[str, KeyNode]:
    """The plan of one scope's keys."""
    return scope_plan(jaxpr)


def _plan(jaxpr: Any, loops: tuple[int, ...], anonymous: int, plan: dict[str, KeyNode]) -> None:
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        if not eqn_holds_sites(eqn):
            continue
        params = eqn.params
        if eqn.primitive is site_p:
            plan[params["spec"].name] = KeyNode(loops, site=True)
        elif eqn.primitive is scope_p:
            name = params["name"] if params["name"] is not None else anonymous_name(anonymous)
            other = plan[name].inner if name in plan else None  # the same name in another branch
            plan[name] = KeyNode(loops, _merge_plans(other or {}, key_plan(params["jaxpr"])))
        elif eqn.primitive is estimated_p:
            for address, _ in eqn.params["sites"].value:
                plan[address[0]] = KeyNode(loops)
        else:
            _plan_inside(eqn, loops, anonymous, plan)
        anonymous += eqn_anonymous(eqn)


def _plan_inside(
    eqn: Any, loops: tuple[int, ...], anonymous: int, plan: dict[str, KeyNode]
) -> None:
    w = wiring(eqn)
    if w is not None and w.rounds is None:  # the body derives a key in each of its rounds
        for body in w.bodies:
            plan.update(dict.fromkeys(scope_names(body.jaxpr, anonymous), KeyNode(loops)))
        return
    if eqn.primitive is lanes_p:
        loops = (*loops, *(lane.whole for lane in reversed(eqn.params["lanes"])))
    elif w is not None and w.kind == "loop":
        loops = (*loops, w.rounds or 0)
    for jaxpr in inside(eqn):
        _plan(jaxpr, loops, anonymous, plan)
        anonymous += count_anonymous(jaxpr)


def _merge_plans(a: dict[str, KeyNode], b: dict[str, KeyNode]) -> dict[str, KeyNode]:
    merged = {**a, **b}
    for name in a.keys() & b.keys():
        inner, other = a[name].inner, b[name].inner
        if inner is not None and other is not None:
            merged[name] = KeyNode(b[name].loops, _merge_plans(inner, other))
    return merged


def anonymous_name(index: int) -> str:
    return f"~{index}"


def eqn_anonymous(eqn: Any) -> int:
    """The number of anonymous runs in an equation, in the scope that it stands in."""
    if eqn.primitive is scope_p:
        return int(eqn.params["name"] is None)
    if eqn.primitive is estimated_p:
        return 0
    return sum(count_anonymous(j) for j in inner_jaxprs(eqn))


@remembered
def count_anonymous(jaxpr: Any) -> int:
    return sum(eqn_anonymous(e) for e in jaxpr.eqns if eqn_holds_sites(e))


def scope_plan(jaxpr: Any, anonymous: int = 0) -> dict[str, KeyNode]:
    """The key plan of a part of a scope. Its anonymous runs are numbered from ``anonymous``."""
    plan: dict[str, KeyNode] = {}
    _plan(jaxpr, (), anonymous, plan)
    return plan


def scope_names(jaxpr: Any, anonymous: int) -> list[str]:
    """The names in a part of a scope."""
    return list(scope_plan(jaxpr, anonymous))


def derive_keys(plan: dict[str, KeyNode], key: jax.Array) -> dict[str, Any]:
    """All keys of a scope, made in vectorised calls at its entry. No key is derived inside a loop."""
    if not plan:
        return {}
    if len(plan) == 1:
        ((name, node),) = plan.items()
        return {name: expand_key(node, jax.random.fold_in(key, np.uint32(name_hash(name))))}
    hashes = np.array([name_hash(name) for name in plan], np.uint32)
    folded = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
    return {name: expand_key(node, folded[i]) for i, (name, node) in enumerate(plan.items())}


def expand_key(node: KeyNode, key: jax.Array) -> Any:
    """Fold the index of every loop into a name's key, outermost first. Then derive the nested keys."""
    inner = None if node.inner is None else functools.partial(derive_keys, node.inner)
    for size in reversed(node.loops):
        inner = functools.partial(_over_indices, size, inner)
    return key if inner is None else inner(key)


def _over_indices(size: int, inner: Any, key: jax.Array) -> Any:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(size, dtype=np.uint32))
    return keys if inner is None else jax.vmap(inner)(keys)
