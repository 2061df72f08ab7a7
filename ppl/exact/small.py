"""Linear algebra that is written out for small matrices, with any number of axes in front.

A call of LAPACK for every 2 by 2 matrix costs more than its arithmetic, and XLA can neither fuse it nor evaluate it
while it compiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from weft.ppl.analysis.invariants import PRODUCT

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
    a = _entries(matrix)
    found: dict[tuple[int, int], Any] = {}
    for i in range(d):
        left = a[i][i]
        for j in range(i):
            entry = a[i][j]
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
    a, rows = _entries(factor), _rows(b)
    found: dict[int, Any] = {}
    for i in reversed(range(d)) if transposed else range(d):
        left = rows[i]
        for j, x in found.items():
            left = left - (a[j][i] if transposed else a[i][j]) * x
        found[i] = left / a[i][i]
    return jnp.concatenate([found[i] for i in range(d)], -2)


def inverse_lower(factor: Array) -> Array:
    """The inverse of a lower triangular matrix."""
    d = factor.shape[-1]
    if d > SMALL:
        return solve_lower(factor, jnp.eye(d, dtype=factor.dtype))
    a = _entries(factor)
    found: dict[tuple[int, int], Any] = {}
    for i in range(d):
        found[i, i] = 1 / a[i][i]
        for j in range(i):
            dot = sum(a[i][k] * found[k, j] for k in range(j, i))
            found[i, j] = -dot * found[i, i]
    return _matrix(found, d)


def _rows(matrix: Array) -> list[Array]:
    """The rows of a matrix, as matrices. Taken all at once, their derivatives are put together at once, too."""
    return [*jax.lax.split(matrix, [1] * matrix.shape[-2], matrix.ndim - 2)]


def _entries(matrix: Array) -> list[list[Array]]:
    """The entries of a matrix, as matrices of one row and one column."""
    d = matrix.shape[-1]
    return [[*jax.lax.split(row, [1] * d, matrix.ndim - 1)] for row in _rows(matrix)]


def _columns(a: Array) -> list[Array]:
    """The columns of a matrix, as matrices."""
    return [*jax.lax.split(a, [1] * a.shape[-1], a.ndim - 1)]


def _matrix(entries: dict[tuple[int, int], Any], d: int) -> Array:
    """A matrix from its entries; zero where there is none."""
    zero = jnp.zeros_like(entries[0, 0])
    flat = [entries.get((i, j), zero) for i in range(d) for j in range(d)]
    return jnp.concatenate(flat, -1).reshape(*zero.shape[:-2], d, d)


def diagonal(matrix: Array) -> Array:
    """The diagonal of a matrix."""
    d = matrix.shape[-1]
    if d > SMALL:
        return jnp.diagonal(matrix, axis1=-2, axis2=-1)
    return jnp.concatenate([row[i] for i, row in enumerate(_entries(matrix))], -1)[..., 0, :]


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
    rows = _rows(jnp.concatenate([matrix, eye], -1))
    log_det: Any = 0.0
    for i in range(d):  # Gauss and Jordan
        pivot = rows[i][..., i : i + 1]
        log_det = log_det + jnp.log(jnp.abs(pivot[..., 0, 0]))
        rows[i] = rows[i] / pivot
        for k in range(d):
            if k != i:
                rows[k] = rows[k] - rows[k][..., i : i + 1] * rows[i]
    return jnp.concatenate([row[..., d:] for row in rows], -2), log_det


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
        norm = jnp.sqrt(jnp.sum(v**2, -2, keepdims=True))
        v = v / jnp.where(norm > 0, norm, 1)
        turn = turn - 2 * v @ (jnp.swapaxes(v, -1, -2) @ turn)
        matrix = matrix - 2 * v @ (jnp.swapaxes(v, -1, -2) @ matrix)
    return turn


def triangle(matrix: Array) -> Array:
    r"""A lower triangular $L$ such that $L L^\top = A^\top A$, without this product: of $A = Q L^\top$, by the modified
    Gram-Schmidt process.
    """
    d = matrix.shape[-1]
    if d > SMALL:
        return jnp.swapaxes(jnp.linalg.qr(matrix, mode="r"), -1, -2)
    columns, found = _columns(matrix), {}
    for i in range(d):
        found[i, i] = jnp.sqrt(jnp.sum(columns[i] ** 2, -2, keepdims=True))
        unit = columns[i] / found[i, i]
        for j in range(i + 1, d):
            found[j, i] = jnp.sum(unit * columns[j], -2, keepdims=True)
            columns[j] = columns[j] - found[j, i] * unit
    return _matrix(found, d)


def gram(a: Array, b: Array | None = None) -> Array:
    r"""$A^\top A$, or a symmetric $A^\top B$."""
    d = a.shape[-1]
    b = a if b is None else b
    if d > SMALL or 1 < a.shape[-2] <= FEW:
        found = jnp.swapaxes(a, -1, -2) @ b
        return found if a is b else (found + jnp.swapaxes(found, -1, -2)) / 2
    left, right = _columns(a), _columns(b)
    entries: dict[tuple[int, int], Any] = {}
    for i in range(d):
        for j in range(i + 1):
            total = jnp.sum(left[i] * right[j], -2, keepdims=True)
            entries[i, j] = entries[j, i] = total
    return _matrix(entries, d)


def product(a: Array, b: Array) -> Array:
    """$A B$, for many rows $A$ and a small $B$."""
    d = b.shape[-2]
    if d > SMALL or b.shape[-1] > SMALL or 1 < a.shape[-2] <= FEW:
        return a @ b
    columns, entries = _columns(a), _entries(b)
    found = [sum(columns[i] * entries[i][j] for i in range(d)) for j in range(b.shape[-1])]
    return jnp.concatenate(found, -1)


def matmul(a: Array, b: Array) -> Array:
    """$A B$. If all sizes are small it is written out: XLA would call a library for every matrix."""
    sizes = *a.shape[-2:], b.shape[-1]
    if max(sizes) > FEW or min(sizes) == 1:
        return a @ b
    return checkpoint_name(_matmul(a, b), PRODUCT)


@jax.custom_jvp
def _matmul(a: Array, b: Array) -> Array:
    return jnp.sum(a[..., :, :, None] * b[..., None, :, :], -2)


@_matmul.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (a, b), (da, db) = primals, tangents
    return _matmul(a, b), da @ b + a @ db


def sums(a: Array, x: Array) -> Array:
    r"""$A^\top x$ for a vector $x$ and many rows $A$."""
    d = a.shape[-1]
    if d > SMALL or 1 < a.shape[-2] <= FEW:
        return (jnp.swapaxes(a, -1, -2) @ x[..., None])[..., 0]
    return jnp.concatenate([jnp.sum(c * x[..., None], -2) for c in _columns(a)], -1)
