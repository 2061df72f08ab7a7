"""Linear algebra that is written out for small matrices, with any number of axes in front.

A call of LAPACK for every 2 by 2 matrix costs more than its arithmetic, and XLA can neither fuse it nor evaluate it
while it compiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
SMALL = 4
"""The largest matrices that are written out."""
FEW = 2 * SMALL
"""Products of so few rows are not: that would compile for longer, and run no faster."""


def cholesky(matrix: Array) -> Array:
    """The lower Cholesky factor."""
    d = matrix.shape[-1]
    if d > SMALL:
        return jnp.linalg.cholesky(matrix)
    found: dict[tuple[int, int], Any] = {}
    for i in range(d):
        left = matrix[..., i, i]
        for j in range(i):
            entry = matrix[..., i, j]
            for k in range(j):
                entry = entry - found[i, k] * found[j, k]
            found[i, j] = entry = entry / found[j, j]
            left = left - entry * entry
        found[i, i] = jnp.sqrt(left)
    return _matrix(found, d)


def solve_lower(factor: Array, b: Array, transposed: bool = False) -> Array:
    r"""$L^{-1} b$ for a lower triangular matrix, or $L^{-\top} b$. ``b`` is a matrix."""
    d = factor.shape[-1]
    if d > SMALL:
        shape = jnp.broadcast_shapes(factor.shape[:-2], b.shape[:-2])
        factor = jnp.broadcast_to(factor, (*shape, d, d))
        b = jnp.broadcast_to(b, (*shape, *b.shape[-2:]))
        return jax.scipy.linalg.solve_triangular(factor, b, lower=True, trans=int(transposed))
    found: dict[int, Any] = {}
    order = reversed(range(d)) if transposed else range(d)
    for i in order:
        left = b[..., i, :]
        for j, x in found.items():
            entry = factor[..., j, i] if transposed else factor[..., i, j]
            left = left - entry[..., None] * x
        found[i] = left / factor[..., i, i][..., None]
    return jnp.stack([found[i] for i in range(d)], -2)


def inverse_lower(factor: Array) -> Array:
    """The inverse of a lower triangular matrix."""
    d = factor.shape[-1]
    if d > SMALL:
        return solve_lower(factor, jnp.eye(d, dtype=factor.dtype))
    found: dict[tuple[int, int], Any] = {}
    for i in range(d):
        found[i, i] = 1 / factor[..., i, i]
        for j in range(i):
            dot = sum(factor[..., i, k] * found[k, j] for k in range(j, i))
            found[i, j] = -dot * found[i, i]
    return _matrix(found, d)


def _matrix(entries: dict[tuple[int, int], Any], d: int) -> Array:
    """A matrix from its entries; zero where there is none."""
    zero = jnp.zeros_like(entries[0, 0])
    flat = [entries.get((i, j), zero) for i in range(d) for j in range(d)]
    return jnp.stack(flat, -1).reshape(*zero.shape, d, d)


def diagonal(matrix: Array) -> Array:
    """The diagonal of a matrix."""
    d = matrix.shape[-1]
    if d > SMALL:
        return jnp.diagonal(matrix, axis1=-2, axis2=-1)
    return jnp.stack([matrix[..., i, i] for i in range(d)], -1)


def solve_definite(factor: Array, b: Array) -> Array:
    r"""$(L L^\top)^{-1} b$."""
    return solve_lower(factor, solve_lower(factor, b), transposed=True)


def inverse(matrix: Array) -> tuple[Array, Array]:
    """The inverse of a matrix whose leading minors are not zero, and the logarithm of its determinant's size."""
    if matrix.shape[-1] > SMALL:
        return jnp.linalg.inv(matrix), jnp.linalg.slogdet(matrix)[1]
    return _inverse(matrix)


@jax.custom_jvp
def _inverse(matrix: Array) -> tuple[Array, Array]:
    d = matrix.shape[-1]
    eye = jnp.broadcast_to(np.eye(d, dtype=matrix.dtype), matrix.shape)
    rows = [jnp.concatenate([matrix[..., i, :], eye[..., i, :]], -1) for i in range(d)]
    log_det: Any = 0.0
    for i in range(d):  # Gauss and Jordan
        log_det = log_det + jnp.log(jnp.abs(rows[i][..., i]))
        rows[i] = rows[i] / rows[i][..., i : i + 1]
        for k in range(d):
            if k != i:
                rows[k] = rows[k] - rows[k][..., i : i + 1] * rows[i]
    return jnp.stack([row[..., d:] for row in rows], -2), log_det


@_inverse.defjvp
def _(primals: Any, tangents: Any) -> Any:
    found, log_det = _inverse(*primals)
    moved = found @ tangents[0]
    return (found, log_det), (-moved @ found, jnp.trace(moved, axis1=-2, axis2=-1))


def reflection(matrix: Array) -> Array:
    r"""An orthogonal $H$ such that $H a$ is zero below its first ``d`` rows (Householder 1958, "Unitary
    triangularization of a nonsymmetric matrix").
    """
    n, d = matrix.shape[-2:]
    if d > SMALL:
        return jnp.swapaxes(jnp.linalg.qr(matrix, mode="complete")[0], -1, -2)
    turn = jnp.broadcast_to(np.eye(n, dtype=matrix.dtype), (*matrix.shape[:-2], n, n))
    for i in range(d):
        column = matrix[..., i:, i]
        size = jnp.sqrt(jnp.sum(column**2, -1, keepdims=True))
        first = column[..., :1]
        v = jnp.concatenate([first + jnp.where(first < 0, -size, size), column[..., 1:]], -1)
        v = jnp.concatenate([jnp.zeros_like(matrix[..., :i, 0]), v], -1)[..., None]
        v = v / jnp.sqrt(jnp.sum(v**2, -2, keepdims=True))
        turn = turn - 2 * v @ (jnp.swapaxes(v, -1, -2) @ turn)
        matrix = matrix - 2 * v @ (jnp.swapaxes(v, -1, -2) @ matrix)
    return turn


def gram(a: Array, b: Array | None = None) -> Array:
    r"""$A^\top A$, or a symmetric $A^\top B$."""
    d = a.shape[-1]
    b = a if b is None else b
    if d > SMALL or 1 < a.shape[-2] <= FEW:
        found = jnp.swapaxes(a, -1, -2) @ b
        return found if a is b else (found + jnp.swapaxes(found, -1, -2)) / 2
    entries: dict[tuple[int, int], Any] = {}
    for i in range(d):
        for j in range(i + 1):
            entries[i, j] = entries[j, i] = jnp.sum(a[..., i] * b[..., j], -1)
    return _matrix(entries, d)


def product(a: Array, b: Array) -> Array:
    """$A B$, for many rows $A$ and a small $B$."""
    d = b.shape[-2]
    if d > SMALL or b.shape[-1] > SMALL or 1 < a.shape[-2] <= FEW:
        return a @ b
    columns = [sum(a[..., i] * b[..., None, i, j] for i in range(d)) for j in range(b.shape[-1])]
    return jnp.stack(columns, -1)


def sums(a: Array, x: Array) -> Array:
    r"""$A^\top x$ for a vector $x$ and many rows $A$."""
    d = a.shape[-1]
    if d > SMALL or 1 < a.shape[-2] <= FEW:
        return (jnp.swapaxes(a, -1, -2) @ x[..., None])[..., 0]
    return jnp.stack([jnp.sum(a[..., i] * x, -1) for i in range(d)], -1)
