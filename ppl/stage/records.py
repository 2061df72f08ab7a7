"""Records: nested dicts, by name, of what a walk records at each site; and how the records of branches are joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .control import addresses_of, has_addresses, scopes
from .jaxprs import equations

Records = dict[str, Any]
"""Name to what was recorded there (``{"value": ..., "active": ...}``), or to the records of a nested program."""


def recorded(jaxpr: Any) -> list[tuple[str, ...]]:
    """The addresses, relative to a scope, at which a jaxpr may leave records."""
    return [
        (*scopes(place), *address)
        for eqn, place in equations(jaxpr, has_addresses)
        for address in addresses_of(eqn)
    ]


def at_addresses(eqn: Any, items: Sequence[Any]) -> dict[str, Any]:
    """A nested dict with one item for each choice of an estimated density."""
    tree: dict[str, Any] = {}
    for (address, _), item in zip(eqn.params["sites"].value, items, strict=True):
        node = tree
        for name in address[:-1]:
            node = node.setdefault(name, {})
        node[address[-1]] = item
    return tree


def look_up(tree: dict[str, Any], address: Sequence[str]) -> Any:
    """The entry of a nested dict at an address; None if there is none."""
    node: Any = tree
    for name in address:
        node = node.get(name) if isinstance(node, dict) else None
    return node


def is_site_record(node: Any) -> bool:
    """Whether a node of the records is a site's record: its ``"value"`` is an array, or None in a listing."""
    return "value" in node and not isinstance(node["value"], dict)


def cast(x: Any, aval: Any) -> Any:
    """An array with the dtype of another."""
    dtype = getattr(aval, "dtype", None)
    return x if dtype is None or x.dtype == dtype else jax.lax.convert_element_type(x, dtype)


def merged(a: Records, b: Records) -> Records:
    """``a``, with the entries of ``b`` that ``a`` lacks."""
    both = dict(a)
    for name, node in b.items():
        if name not in both:
            both[name] = node
        elif is_site_record(node):
            both[name] = {**node, **both[name]}
        else:
            both[name] = merged(both[name], node)
    return both


def completed(records: Records, shapes: Records) -> Records:
    """The records, with zeros (idle, unset) for the entries that this branch lacks."""
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.tree.map(cast, merged(records, zeros), shapes)


def flagged(
    records: Records, index: Any, here: list[set[tuple[str, ...]]], prefix: tuple[str, ...] = ()
) -> Records:
    """Mark in every record whether the branch that has it was taken."""
    told: Records = {}
    for name, node in records.items():
        address = (*prefix, name)
        if not is_site_record(node):
            told[name] = flagged(node, index, here, address)
            continue
        taken = jnp.asarray([address in names for names in here])[index]
        told[name] = {**node, "active": jnp.logical_and(node.get("active", True), taken)}
    return told
