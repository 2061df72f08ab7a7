r"""Exponential families: continuous choices that are integrated out in closed form, as tables of a few points.

As a function of a choice $x$ with a conjugate prior, the log density is a combination of a few known functions,

$$f(x) = c_0 + \sum_j c_j \varphi_j(x).$$

These are the sufficient statistics of an exponential family (Diaconis and Ylvisaker 1979, "Conjugate priors for
exponential families"): $\log x, \log(1 - x)$ for a beta choice, $\log x, x$ for a gamma one, and so on. So
the values of $f$ at as many points as there are functions determine $f$ everywhere. A choice that is integrated out is
kept as a table over these points, as a discrete choice is kept as a table over its values. Both go through the same
elimination. For each family, the integral of $\exp f$, a draw from it and its mode are known, and $f$ at any other
point is a weighted sum of the table.

This file has the families of numbers and of probabilities, ``matrices`` those of positive definite matrices. Normal
choices are no such tables: see ``normals``. ``conjugacy`` tells which density has the form of which family.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln


class Family:
    """An exponential family: the points of its table, its functions, and its integral, draws and mode."""

    linear = False  # whether the statistic is the choice itself
    matrix = False  # positive definite matrices
    event: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.grid = self.points()
        self.inverse = np.linalg.inv(np.asarray(self.basis(self.grid, np)))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.event == getattr(other, "event", None)

    def __hash__(self) -> int:
        return hash((type(self), self.event))

    @staticmethod
    def moments(d: Any) -> tuple[Any, Any]:
        """A mean and a variance of the prior, by which the points are placed."""
        return d.mean, d.variance

    @property
    def start(self) -> np.ndarray:
        """A point in the middle of the support."""
        return np.asarray(self.grid[0])

    @property
    def num_points(self) -> int:
        """The number of entries of the table."""
        return len(self.grid)

    def points(self) -> np.ndarray:
        """The points of the table, ``(num_points, *event)``, relative to the centre and in units of the scale."""
        raise NotImplementedError

    def basis(self, u: Any, xp: Any = jnp) -> Any:
        """The functions at ``u``, with the constant one first: ``(..., num_points)``."""
        raise NotImplementedError

    def log_integral(self, c: jax.Array) -> jax.Array:
        """The log of the integral of the exponential of a combination of the functions."""
        raise NotImplementedError

    def draw(self, key: jax.Array, c: jax.Array) -> jax.Array:
        """A draw with density proportional to that exponential."""
        raise NotImplementedError

    def mode(self, c: jax.Array) -> jax.Array:
        """The point at which it is largest."""
        raise NotImplementedError

    def placement(self, mean: Any, variance: Any) -> tuple[Any, Any]:
        """A centre and a scale for the points, from moments of the prior."""
        return jnp.zeros_like(mean), jnp.ones_like(mean)

    def log_volume(self, scale: Any) -> Any:
        """The log of the volume of one unit of the points."""
        return jnp.sum(jnp.log(scale), -1) if self.event else jnp.log(scale)

    def statistic(self, x: Any) -> Any:
        """An invertible function of x in the span of the functions."""
        return x

    def from_statistic(self, s: Any) -> Any:
        """The inverse of ``statistic``."""
        return s

    def coefficients(self, table: jax.Array) -> jax.Array:
        """The coefficients of the functions, from values at the points (on the last axis)."""
        return table @ jnp.asarray(self.inverse.T, table.dtype)

    def weights(self, u: jax.Array) -> jax.Array:
        """The weights of the points whose weighted sum is the value at ``u``."""
        found = self.basis(u)
        return found @ jnp.asarray(self.inverse, found.dtype)


class Placement(NamedTuple):
    """Where the points of a continuous choice are: ``centre + scale * grid``. Plates lead."""

    centre: jax.Array
    scale: jax.Array
    mean: jax.Array  # a guess of where the choice is, in units of the grid

    def points(self, family: Family) -> jax.Array:
        grid = jnp.asarray(family.grid, self.centre.dtype)
        plates = (1,) * (self.centre.ndim - len(family.event))
        return self.centre + self.scale * grid.reshape(-1, *plates, *family.event)

    def log_scale(self, family: Family) -> jax.Array:
        return family.log_volume(self.scale)


def base_of(d: Any) -> Any:
    """A distribution without the wrappers that expand it or move its axes."""
    while isinstance(d, (dist.ExpandedDistribution, dist.Independent)):
        d = d.base_dist
    return d


class Beta(Family):
    r"""$c_1 \log x + c_2 \log(1 - x)$."""

    def points(self) -> np.ndarray:
        return np.array([0.5, 0.2, 0.8])

    def basis(self, u: Any, xp: Any = jnp) -> Any:
        return xp.stack([xp.ones_like(u), xp.log(u), xp.log1p(-u)], -1)

    def log_integral(self, c: jax.Array) -> jax.Array:
        a, b = c[..., 1] + 1, c[..., 2] + 1
        return c[..., 0] + gammaln(a) + gammaln(b) - gammaln(a + b)

    def draw(self, key: jax.Array, c: jax.Array) -> jax.Array:
        return _inside(jax.random.beta(key, c[..., 1] + 1, c[..., 2] + 1, dtype=c.dtype))

    def mode(self, c: jax.Array) -> jax.Array:
        a, b = jnp.maximum(c[..., 1], 0), jnp.maximum(c[..., 2], 0)
        return _inside(jnp.where(a + b > 0, a / jnp.where(a + b > 0, a + b, 1), 0.5))

    def statistic(self, x: Any) -> Any:
        return jnp.log(x)

    def from_statistic(self, s: Any) -> Any:
        return jnp.exp(s)


class Gamma(Family):
    r"""$c_1 \log x + c_2 x$."""

    linear = True

    def points(self) -> np.ndarray:
        return np.array([1.0, 0.4, 2.5])

    def basis(self, u: Any, xp: Any = jnp) -> Any:
        return xp.stack([xp.ones_like(u), xp.log(u), u], -1)

    def log_integral(self, c: jax.Array) -> jax.Array:
        a, b = c[..., 1] + 1, -c[..., 2]
        return c[..., 0] + gammaln(a) - a * jnp.log(b)

    def draw(self, key: jax.Array, c: jax.Array) -> jax.Array:
        return jax.random.gamma(key, c[..., 1] + 1, dtype=c.dtype) / -c[..., 2]

    def mode(self, c: jax.Array) -> jax.Array:
        tiny = jnp.finfo(c.dtype).tiny
        return jnp.maximum(c[..., 1], tiny) / -c[..., 2]

    def placement(self, mean: Any, variance: Any) -> tuple[Any, Any]:
        return jnp.zeros_like(mean), mean


class InverseGamma(Family):
    r"""$c_1 \log x + c_2 / x$."""

    def points(self) -> np.ndarray:
        return np.array([1.0, 0.4, 2.5])

    def basis(self, u: Any, xp: Any = jnp) -> Any:
        return xp.stack([xp.ones_like(u), xp.log(u), 1 / u], -1)

    def log_integral(self, c: jax.Array) -> jax.Array:
        a, b = -c[..., 1] - 1, -c[..., 2]
        return c[..., 0] + gammaln(a) - a * jnp.log(b)

    def draw(self, key: jax.Array, c: jax.Array) -> jax.Array:
        return -c[..., 2] / jax.random.gamma(key, -c[..., 1] - 1, dtype=c.dtype)

    def mode(self, c: jax.Array) -> jax.Array:
        return c[..., 2] / c[..., 1]

    def placement(self, mean: Any, variance: Any) -> tuple[Any, Any]:
        scale = jnp.where(jnp.isfinite(mean), mean, 1.0)
        return jnp.zeros_like(mean), scale

    def statistic(self, x: Any) -> Any:
        return 1 / x

    def from_statistic(self, s: Any) -> Any:
        return 1 / s


class Dirichlet(Family):
    r"""$\sum_k c_k \log x_k$ on the simplex of ``k`` probabilities."""

    def __init__(self, k: int) -> None:
        self.event = (k,)
        super().__init__()

    def points(self) -> np.ndarray:
        (k,) = self.event
        return np.concatenate([np.full((1, k), 1 / k), (1 + 2 * np.eye(k)) / (k + 2)])

    def basis(self, u: Any, xp: Any = jnp) -> Any:
        return xp.concatenate([xp.ones((*u.shape[:-1], 1), u.dtype), xp.log(u)], -1)

    def log_integral(self, c: jax.Array) -> jax.Array:
        a = c[..., 1:] + 1
        return c[..., 0] + jnp.sum(gammaln(a), -1) - gammaln(jnp.sum(a, -1))

    def draw(self, key: jax.Array, c: jax.Array) -> jax.Array:
        u = jax.random.dirichlet(key, c[..., 1:] + 1, c.shape[:-1], c.dtype)
        return jnp.maximum(u, jnp.finfo(u.dtype).tiny)

    def mode(self, c: jax.Array) -> jax.Array:
        a = jnp.maximum(c[..., 1:], jnp.finfo(c.dtype).eps)
        return a / jnp.sum(a, -1, keepdims=True)

    def statistic(self, x: Any) -> Any:
        return jnp.log(x)

    def from_statistic(self, s: Any) -> Any:
        return jnp.exp(s)


def _inside(u: jax.Array) -> jax.Array:
    eps = jnp.finfo(u.dtype).eps
    return jnp.clip(u, jnp.finfo(u.dtype).tiny, 1 - eps / 2)
