"""A value as a linear function of terms: each term of a sum gets the score of its own draws only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from weft.ppl.analysis.affinity import rounds
from weft.ppl.stage.compat import Tracer, bind

from .effects import Node, is_precise, is_real

_ANY = """
add add_any sub neg reduce_sum reshape squeeze broadcast_in_dim transpose copy copy_p concatenate stack slice rev pad
expand_dims cumsum convert_element_type
"""
LINEAR = frozenset(_ANY.split())
"""Equations that are linear in all their operands together."""
LINEAR_IN = {"div": (0,), "gather": (0,), "dynamic_slice": (0,), "select_n": None}
"""And those that are in some: the places of these; None for all but the first."""


def linearly(out: Node, leaf: Callable[[Node], Any], constant: Callable[[Node], Any]) -> Any:
    """A value, computed again from the terms of which it is a linear function.

    ``leaf`` gives the terms that depend on draws, and ``constant`` the others.
    """
    nodes: dict[int, Node] = {}
    left = [out]
    while left:
        node = left.pop()
        if node.number not in nodes:
            nodes[node.number] = node
            left += node.inputs if node.deps and _is_linear(node) else ()
    found: dict[int, Any] = {}
    for number in sorted(nodes):
        node = nodes[number]
        if node.deps and _is_linear(node):
            added = node.eqn.primitive.name in LINEAR
            operands = [
                found[n.number]
                if n.deps
                else constant(n)
                if added and is_real(n.value)
                else n.value
                for n in node.inputs
            ]
            found[number] = bind(node.eqn, operands)[node.out]
        elif node.deps:
            found[number] = leaf(node)
    return found[out.number]


def _is_linear(node: Node) -> bool:
    if node.eqn is None or not all(is_precise(n.value) for n in node.inputs if n.deps):
        return False
    name, places = node.eqn.primitive.name, [i for i, n in enumerate(node.inputs) if n.deps]
    if name in LINEAR:
        return not rounds(node.eqn)
    if name in ("mul", "div") and any(map(_infinite, node.inputs)):
        return False  # guarded by a `where`, as in NumPyro's Bernoulli: its derivative must not meet a zero
    if name in ("mul", "dot_general"):
        return len(places) == 1
    if name in LINEAR_IN:
        allowed = LINEAR_IN[name] or range(1, len(node.inputs))
        return all(i in allowed for i in places)
    return False


def _infinite(node: Node) -> bool:
    """Whether a value is known and holds an infinity."""
    x = node.value
    return (
        not node.deps
        and not isinstance(x, Tracer)
        and is_real(x)
        and bool(np.any(np.isinf(np.asarray(x))))
    )
