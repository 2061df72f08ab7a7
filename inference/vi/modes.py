"""The mode of a target on the unconstrained scale, and the curvature there."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from weft.inference.run import libraries
from weft.ppl import Target
from weft.ppl.stage.errors import DensityError

from .laws import Vector


@eqx.filter_jit
def _climb(target: Target, z: Vector, num_steps: int) -> Vector:
    """L-BFGS from `z`, until the gradient vanishes or the steps are used up."""
    space = target.unconstrain().flat

    def loss(z: Vector) -> Array:
        return -space.log_density(z)

    solver = libraries.optax.lbfgs()
    value_and_grad = libraries.optax.value_and_grad_from_state(loss)

    def advance(carry: Any) -> Any:
        z, state, i, _ = carry
        value, slope = value_and_grad(z, state=state)
        step, state = solver.update(slope, state, z, value=value, grad=slope, value_fn=loss)
        new = z + jnp.asarray(step)
        moved = jnp.isfinite(new).all() & (new != z).any()
        return jnp.where(moved, new, z), state, i + 1, moved

    def proceed(carry: Any) -> Any:
        return carry[3] & (carry[2] < num_steps)

    return jax.lax.while_loop(proceed, advance, (z, solver.init(z), jnp.int32(0), jnp.bool_(True)))[
        0
    ]


@eqx.filter_jit
def _derivatives(target: Target, z: Vector) -> tuple[Array, Array, Array]:
    """Value, gradient and Hessian of minus the log density."""
    space = target.unconstrain().flat

    def loss(z: Vector) -> Array:
        return -space.log_density(z)

    return (*jax.value_and_grad(loss)(z), jax.hessian(loss)(z))


def mode(target: Target, z: Vector, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The mode uphill of a point, and the Hessian of minus the log density there, in double precision.

    Raises:
        DensityError: if there is no mode, or if the density does not fall off from it in all directions.
    """
    if not np.isfinite(_derivatives(target, z)[0]):
        raise DensityError(
            "laplace: the log density is not finite at the point to begin at; give another: init=choices"
        )

    def newton(point: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        _, slope, hessian = _derivatives(target, jnp.asarray(point, z.dtype))
        slope, hessian = np.asarray(slope, float), np.asarray(hessian, float)
        _check_curvature(target, hessian)
        step = -np.linalg.solve(hessian, slope)
        return slope, hessian, step, -0.5 * float(slope @ step)  # what a step promises, in nats

    point = np.asarray(_climb(target, z, num_steps), float)
    slope, hessian, step, gain = newton(point)
    for _ in range(50):
        if gain < 1e-10:
            break
        ahead = newton(point + step)
        if ahead[-1] > 0.5 * gain:  # no better in the precision at hand
            break
        point, (slope, hessian, step, gain) = point + step, ahead
    if not gain < 1e-3:
        raise DensityError(
            f"laplace: no mode found: the log density can still rise by about {gain:.2g} from the point reached, at a "
            f"gradient that is largest along {_largest(target, np.abs(slope))}. Begin elsewhere, init=choices; or take "
            "full_rank and fit, which need no mode"
        )
    return point + step, hessian


def _check_curvature(target: Target, hessian: np.ndarray) -> None:
    """Refuse a Hessian that is not positive definite.

    Raises:
        DensityError: if it is not. The message names the directions in which the density does not fall off.
    """
    flat = np.zeros(len(hessian))
    if not np.isfinite(hessian).all():
        flat = (~np.isfinite(hessian)).any(1).astype(float)
        what = "the curvature of the log density is not finite"
    elif (np.diagonal(hessian) <= 0).any():
        flat = (np.diagonal(hessian) <= 0).astype(float)
        what = "the log density does not fall off from there"
    else:
        root = np.sqrt(np.diagonal(hessian))
        values, vectors = np.linalg.eigh(hessian / np.outer(root, root))
        # The relative error of a Hessian in single precision, summed over its rows.
        if values[0] <= 10 * len(hessian) * np.finfo(np.float32).eps:
            flat = vectors[:, 0] ** 2
        what = f"the log density does not fall off from there: its relative curvature is {values[0]:.2g}"
    if not flat.any():
        return
    raise DensityError(
        f"laplace: at the point found, {what} along {_largest(target, flat)}, so there is no normal approximation. "
        "Model and data do not determine these choices, or the density has no mode but rises without end (a "
        "hierarchical scale that goes to zero). Give them narrower priors, reparametrise (noncentered(model, ...), or "
        "only the combinations that are determined), begin elsewhere with init=choices, or take full_rank and fit"
    )


def _largest(target: Target, share: np.ndarray) -> str:
    """The addresses of the choices with the largest share."""
    parts = target.unconstrain().flat.addresses
    most = {a: float(share[part].max(initial=0.0)) for a, part in parts.items()}
    return ", ".join(repr(a) for a, x in most.items() if x > 0.1 * share.max())
