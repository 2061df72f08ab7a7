"""Positive definite matrices that are integrated out: precisions and covariances of normal choices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import multigammaln

from .families import Family, base_of


class Wishart(Family):
    r"""$c_1 \log |X| + \sum_{i \le j} c_{ij} X_{ij}$ for a positive definite matrix, for instance a precision."""

    linear = True
    matrix = True

    def __init__(self, d: int) -> None:
        self.event = (d, d)
        self.d = d
        self.pairs = np.array([(i, j) for i in range(d) for j in range(i, d)])
        super().__init__()

    def points(self) -> np.ndarray:
        one = np.eye(self.d)
        cross = [np.outer(one[i], one[j]) for i, j in self.pairs]
        steps = [1.5 * e if np.trace(e) else 0.5 * (e + e.T) for e in cross]
        return np.stack([one, 0.4 * one, *(one + e for e in steps)])

    def basis(self, u: Any, xp: Any = jnp) -> Any:
        i, j = self.pairs.T
        log_det = xp.linalg.slogdet(u)[1][..., None]
        return xp.concatenate([xp.ones_like(log_det), log_det, self.linear_in(u)[..., i, j]], -1)

    def linear_in(self, x: Any) -> Any:
        """The matrix that enters linearly."""
        return x

    def natural(self, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The degrees of freedom, and the rate matrix R of -tr(R X) / 2."""
        i, j = self.pairs.T
        rate = jnp.zeros((*c.shape[:-1], self.d, self.d), c.dtype)
        rate = rate.at[..., i, j].add(-c[..., 2:]).at[..., j, i].add(-c[..., 2:])
        return 2 * c[..., 1] + self.d + 1, rate

    def log_integral(self, c: jax.Array) -> jax.Array:
        n, rate = self.natural(c)
        factor = jnp.linalg.cholesky(rate)
        log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), -1)
        return c[..., 0] + n / 2 * (self.d * np.log(2) - log_det) + multigammaln(n / 2, self.d)

    def draw(self, key: jax.Array, c: jax.Array) -> jax.Array:
        n, rate = self.natural(c)
        return dist.Wishart(n, rate_matrix=rate).sample(key)

    def mode(self, c: jax.Array) -> jax.Array:
        n, rate = self.natural(c)
        count = jnp.maximum(n - self.d - 1, jnp.finfo(c.dtype).eps)
        return count[..., None, None] * jnp.linalg.inv(rate)

    def placement(self, mean: Any, variance: Any) -> tuple[Any, Any]:
        scale = jnp.sqrt(jnp.diagonal(mean, axis1=-2, axis2=-1))
        return jnp.zeros_like(mean), scale[..., :, None] * scale[..., None, :]

    def log_volume(self, scale: Any) -> Any:
        i, j = self.pairs.T
        return jnp.sum(jnp.log(scale[..., i, j]), -1)


class InverseWishart(Wishart):
    r"""$c_1 \log |X| + \sum_{i \le j} c_{ij} (X^{-1})_{ij}$ for a covariance."""

    linear = False

    @staticmethod
    def moments(d: Any) -> tuple[Any, Any]:
        mode = jnp.broadcast_to(base_of(d).mode, d.batch_shape + d.event_shape)
        return mode, mode  # there may be no mean

    def linear_in(self, x: Any) -> Any:
        return (np if isinstance(x, np.ndarray) else jnp).linalg.inv(x)

    def natural(self, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        n, rate = super().natural(c)
        return -n, rate

    def draw(self, key: jax.Array, c: jax.Array) -> jax.Array:
        n, rate = self.natural(c)
        return dist.InverseWishart(n, scale_matrix=rate).sample(key)

    def mode(self, c: jax.Array) -> jax.Array:
        n, rate = self.natural(c)
        return rate / (n + self.d + 1)[..., None, None]

    def statistic(self, x: Any) -> Any:
        return jnp.linalg.inv(x)

    def from_statistic(self, s: Any) -> Any:
        x = jnp.linalg.inv(s)
        return (x + jnp.swapaxes(x, -1, -2)) / 2
