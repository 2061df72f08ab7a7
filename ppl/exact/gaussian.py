"""Normal choices, as tables over points that determine a quadratic function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .families import Family


class Gaussian(Family):
    """Quadratic functions of ``d`` numbers."""

    quadratic = True
    linear = True

    def __init__(self, d: int | None = None) -> None:
        self.event = () if d is None else (d,)
        self.d = d or 1
        self.pairs = np.array([(i, j) for i in range(self.d) for j in range(i, self.d)])
        super().__init__()

    def points(self) -> np.ndarray:
        one = np.eye(self.d)
        cross = [one[i] + one[j] for i, j in self.pairs if i != j]
        grid = np.concatenate([np.zeros((1, self.d)), one, -one, np.reshape(cross, (-1, self.d))])
        return grid if self.event else grid[:, 0]

    def basis(self, u: Any, xp: Any = jnp) -> Any:
        u = u if self.event else u[..., None]
        i, j = self.pairs.T
        return xp.concatenate([xp.ones((*u.shape[:-1], 1), u.dtype), u, u[..., i] * u[..., j]], -1)

    def natural(self, c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The constant, the linear term (..., d) and the precision (..., d, d)."""
        h, q = c[..., 1 : 1 + self.d], c[..., 1 + self.d :]
        i, j = self.pairs.T
        to_matrix = np.zeros((len(self.pairs), self.d, self.d))
        to_matrix[np.arange(len(self.pairs)), i, j] -= 1
        to_matrix[np.arange(len(self.pairs)), j, i] -= 1
        return c[..., 0], h, jnp.tensordot(q, jnp.asarray(to_matrix, q.dtype), 1)

    def log_integral(self, c: jax.Array) -> jax.Array:
        if self.d == 1:
            h, precision = c[..., 1], -2 * c[..., 2]
            return c[..., 0] + 0.5 * (h**2 / precision - jnp.log(precision / (2 * np.pi)))
        constant, h, precision = self.natural(c)
        factor = jnp.linalg.cholesky(precision)
        half = jax.scipy.linalg.solve_triangular(factor, h[..., None], lower=True)[..., 0]
        log_det = jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), -1)
        return constant + 0.5 * jnp.sum(half**2, -1) - log_det + 0.5 * self.d * np.log(2 * np.pi)

    def draw(self, key: jax.Array, c: jax.Array) -> jax.Array:
        _, h, precision = self.natural(c)
        factor = jnp.linalg.cholesky(precision)
        noise = jax.random.normal(key, h.shape, h.dtype)[..., None]
        away = jax.scipy.linalg.solve_triangular(factor, noise, lower=True, trans=1)[..., 0]
        u = self._mean(h, factor) + away
        return u if self.event else u[..., 0]

    def mode(self, c: jax.Array) -> jax.Array:
        _, h, precision = self.natural(c)
        u = self._mean(h, jnp.linalg.cholesky(precision))
        return u if self.event else u[..., 0]

    @staticmethod
    def _mean(h: jax.Array, factor: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_solve((factor, True), h[..., None])[..., 0]

    def placement(self, mean: Any, variance: Any) -> tuple[Any, Any]:
        return mean, jnp.sqrt(variance)
