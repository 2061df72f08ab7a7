"""Leaves of a parameter pytree that are not free: they are constrained to a set, or fixed."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import biject_to
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import WeftError


class Constrained(eqx.Module):
    """A parameter that stays in a set. `fit` moves `unconstrained`, which a bijection maps from R^n to the set."""

    unconstrained: Array
    constraint: Any

    @property
    def value(self) -> Array:
        return biject_to(self.constraint)(self.unconstrained)


class Fixed(eqx.Module):
    """A parameter, or a pytree of them, that `fit` leaves as it is."""

    value: Any


def constrained(value: Any, constraint: Any) -> Constrained:
    """Mark a leaf of the parameters that must stay in a set while it is optimised.

    Args:
        value: its first value, inside the set.
        constraint: a NumPyro constraint, such as `numpyro.distributions.constraints.positive`.

    Returns:
        A wrapper. The objective and `Fit.params` see the value itself.

    Raises:
        WeftError: if the value is outside the set, or if there is no bijection from R^n to it.

    Examples:
        >>> from numpyro.distributions import constraints
        >>> from weft.inference import constrained
        >>> float(constrained(2.0, constraints.positive).value)
        2.0
    """
    value = jnp.asarray(value, jnp.result_type(float, value))
    try:
        transform = biject_to(constraint)
    except NotImplementedError:
        raise WeftError(f"constrained: no bijection from R^n to {constraint} is known") from None
    inside = constraint(value)
    if not isinstance(inside, Tracer) and not np.all(inside):
        raise WeftError(f"constrained: {np.asarray(value)} is not in the set {constraint}")
    return Constrained(transform.inv(value), constraint)


def fixed(value: Any) -> Fixed:
    """Mark a leaf, or a whole subtree, of the parameters that is not optimised.

    Args:
        value: any pytree.

    Returns:
        A wrapper. The objective and `Fit.params` see the value itself.
    """
    return Fixed(value)


def _is_wrapper(x: Any) -> bool:
    return isinstance(x, (Constrained, Fixed))


def unwrap(params: Any) -> Any:
    """The parameters as the objective sees them."""
    return jax.tree.map(lambda x: x.value if _is_wrapper(x) else x, params, is_leaf=_is_wrapper)


def partition(params: Any) -> tuple[Any, Any]:
    """Split parameters into `(free, rest)`: floating arrays that are optimised, and everything else.

    `eqx.combine` puts them together again. Python floats count as arrays.
    """

    def free(x: Any) -> Any:
        if isinstance(x, Fixed):
            return jax.tree.map(lambda _: False, x)
        if isinstance(x, Constrained):
            still = jax.tree.map(lambda _: False, x)
            return eqx.tree_at(lambda c: c.unconstrained, still, True)
        return eqx.is_inexact_array(x)

    params = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, (float, np.ndarray, np.generic)) else x, params
    )
    return eqx.partition(params, jax.tree.map(free, params, is_leaf=_is_wrapper))
