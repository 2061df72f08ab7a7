"""Whether one support contains another, as far as supports are known before any value is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to, constraints

NUM_WITNESSES = 64
"""The number of points of one support that are tried in another, where not both are intervals."""


def is_within(inner: Any, outer: Any, event_shape: tuple[int, ...]) -> bool:
    """Whether one support lies in another, up to a set of measure zero.

    Intervals of reals or integers are compared by their ends, element by element. Other supports of the same kind are
    taken to be equal. For supports of different kinds, points of the inner one are tried in the outer one. If nothing
    can be told the answer is `True`. So `False` is a proof.

    Args:
        inner: a NumPyro constraint, or `None` if it is not known.
        outer: another.
        event_shape: the shape of one value.

    >>> from numpyro.distributions import constraints
    >>> is_within(constraints.unit_interval, constraints.positive, ())
    True
    >>> is_within(constraints.real, constraints.positive, ())
    False
    >>> is_within(constraints.simplex, constraints.real_vector, (3,))
    True
    """
    if inner is None or outer is None or inner is outer:
        return True
    a, b = _ends(inner), _ends(outer)
    if a is not None and b is not None:
        try:
            return bool(np.all(b[0] <= a[0]) and np.all(a[1] <= b[1]))
        except ValueError:  # bounds of shapes that do not go together: the shapes are another error
            return True
    if type(inner) is type(outer):
        return True
    try:
        with jax.ensure_compile_time_eval():
            transform = biject_to(inner)
            shape = (NUM_WITNESSES, *transform.inverse_shape(event_shape))
            z = np.random.default_rng(0).normal(0.0, 2.0, shape)
            return bool(np.all(outer(transform(jnp.asarray(z, jnp.result_type(float))))))
    except Exception:  # constraints of users' own may lack any of this, and nothing is known then
        return True


def _ends(constraint: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """The ends of an interval; None if the support is no interval."""
    base = constraint
    while hasattr(base, "base_constraint"):
        base = base.base_constraint
    if isinstance(base, type(constraints.real)):
        return np.array(-np.inf), np.array(np.inf)
    if isinstance(base, type(constraints.boolean)):
        return np.array(0.0), np.array(1.0)
    low, high = (getattr(base, f"{side}_bound", None) for side in ("lower", "upper"))
    if (low is None and high is None) or base.event_dim != 0:
        return None
    # An open end and a closed one differ by a point, which has no mass.
    return (
        np.array(-np.inf) if low is None else np.asarray(low, float),
        np.array(np.inf) if high is None else np.asarray(high, float),
    )
