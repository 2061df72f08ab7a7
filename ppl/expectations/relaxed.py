"""Relaxed integers: choices with the strategy ``gumbel``, whose derivatives go through floats beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.lax import stop_gradient
from weft.ppl.stage.compat import bind, where_in_source
from weft.ppl.stage.errors import GradientError
from weft.ppl.stage.sites import DENSITY
from weft.ppl.stage.wiring import described

from .effects import Node, effects_of
from .terms import LINEAR

CARRIES = LINEAR | {"mul", "select_n"}
"""Equations through which a relaxed integer has derivatives."""


def is_of_a_density(eqn: Any) -> bool:
    """Whether an equation was made while the density of a site was evaluated."""
    return DENSITY in str(eqn.source_info.name_stack)


def relaxed(eqn: Any, inputs: list[Node], of_density: bool) -> Sequence[Node]:
    """Evaluate an equation of relaxed integers. Sums, products and changes of shape carry derivatives to floats."""
    name = eqn.primitive.name
    data = inputs[1:] if name == "select_n" else inputs
    if name not in CARRIES and of_density:
        # What the formula of a density decides by the value has no part in its derivative.
        values = bind(eqn, [n.value for n in inputs])
        return [Node(v, d) for v, d in zip(values, effects_of(eqn, inputs), strict=True)]
    if name not in CARRIES or any(n.relaxed is not None for n in inputs if n not in data):
        raise not_carried(eqn)
    floats = [
        n.value if n not in data else n.relaxed if n.relaxed is not None else 1.0 * n.value
        for n in inputs
    ]
    (deps,) = effects_of(eqn, inputs)
    if name != "convert_element_type":
        (value,) = bind(eqn, [n.value for n in inputs])
        return [Node(value, deps, relaxed=bind(eqn, floats)[0])]
    dtype = eqn.params["new_dtype"]
    if jnp.issubdtype(dtype, jnp.inexact):
        moved = floats[0].astype(dtype)
        # Integers may have wrapped around, where floats have not.
        return [Node(inputs[0].value.astype(dtype) + (moved - stop_gradient(moved)), deps)]
    if not jnp.issubdtype(dtype, jnp.integer):
        raise not_carried(eqn)
    return [Node(inputs[0].value.astype(dtype), deps, relaxed=floats[0])]


def not_carried(eqn: Any) -> GradientError:
    return GradientError(
        f"a choice with the strategy gumbel goes as an integer into {described(eqn)}{where_in_source(eqn)}, which has "
        "no derivative: write it by arithmetic, such as b * x + (1 - b) * y, take densities by sites of a program (not "
        "by log_prob), or take enum, mvd or score there"
    )
