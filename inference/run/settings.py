"""Checks of settings when an object is made, so that a mistake is told where it was written.

Traced values are taken as they are.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import WeftError


def require_counts(settings: Any, **least: int) -> None:
    """Raise WeftError unless the named settings are integers, none below the least value given for it."""
    for name, smallest in least.items():
        value = getattr(settings, name)
        if isinstance(value, Tracer):
            continue
        known = numbers(value)
        if (
            known is None
            or known.ndim
            or not jnp.issubdtype(known.dtype, jnp.integer)
            or known < smallest
        ):
            _refuse(settings, f"{name} must be an integer, at least {smallest}", value)


def require_flags(settings: Any, *names: str) -> None:
    """Raise WeftError unless the named settings are True or False."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, (bool, np.bool_)):
            _refuse(settings, f"{name} is True or False", value)


def require_probability(settings: Any, *names: str) -> None:
    """Raise WeftError unless the named settings lie between 0 and 1, both excluded."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, Tracer):
            known = numbers(value)
            if known is None or known.ndim or not 0 < known < 1:
                _refuse(settings, f"{name} is a number between 0 and 1", value)


def require_positive(who: Any, expected: str, value: Any, ndim: int = 0) -> None:
    """Raise WeftError unless a value consists of finite positive numbers, in an array of at most `ndim` axes."""
    if isinstance(value, Tracer):
        return
    known = numbers(value)
    if known is None or known.ndim > ndim or not np.all((known > 0) & np.isfinite(known)):
        _refuse(who, expected, value)


def require_covariance(who: Any, what: str, value: Any) -> None:
    """Raise WeftError unless a matrix is symmetric and positive definite."""
    if isinstance(value, Tracer):
        return
    known = numbers(value)
    square = known is not None and known.ndim == 2 and known.shape[0] == known.shape[1]
    if not square:
        came = value if known is None else f"shape {known.shape}"
        raise WeftError(f"{name_of(who)}: {what} is a square matrix, got {came}")
    matrix = np.asarray(known, np.float64)
    scale = np.sqrt(np.abs(np.diag(matrix)))
    near = np.abs(matrix - matrix.T) <= 1e-4 * np.outer(scale, scale)
    if not np.isfinite(matrix).all() or not near.all() or np.any(np.linalg.eigvalsh(matrix) <= 0):
        _refuse(who, f"{what} is a covariance, symmetric and positive definite", matrix.tolist())


def numbers(value: Any) -> np.ndarray | None:
    """A setting as an array of real numbers; None if it is not one."""
    try:
        known = np.asarray(value)
    except (TypeError, ValueError):
        return None
    real = jnp.issubdtype(known.dtype, jnp.integer) or jnp.issubdtype(known.dtype, jnp.floating)
    return known if real else None


def name_of(who: Any) -> str:
    """How an error message names an object with settings."""
    return who if isinstance(who, str) else type(who).__name__


def _refuse(who: Any, expected: str, came: Any) -> None:
    raise WeftError(f"{name_of(who)}: {expected}, got {came!r}")
