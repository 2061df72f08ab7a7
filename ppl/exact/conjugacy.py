r"""Continuous choices that are integrated out in closed form: a table of a few points says all.

The log density of a choice $x$ with a conjugate prior is, as a function of $x$, a combination of a few known functions,

$$f(x) = c_0 + \sum_j c_j \varphi_j(x),$$

the sufficient statistics of an exponential family (Diaconis and Ylvisaker 1979, "Conjugate priors for exponential
families"): $x, x^2$ (and products) for a normal one, $\log x, \log(1 - x)$ for a beta one, and so on. So its values
at as many points as there are functions determine it everywhere: a choice that is integrated out is kept as a table
over these points, as a discrete one is over its values, and goes through the same elimination. The integral, a draw
and the mode of $\exp f$ are known for each family, and $f$ at any other point is a weighted sum of the table.

That a density *is* of this form is proved from the program before the table is trusted: for normal families, that every
parameter is affine in $x$ (its derivative does not read $x$) and the log density quadratic (its second derivative does
not); for the others by name, from the list ``CONJUGATE``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln, multigammaln
from numpyro.distributions.util import cholesky_of_inverse

from .semirings import best, drawn, log_sum


class Family:
    """An exponential family: the points of its table, its functions, and what is known of it."""

    quadratic = False
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
        """A mean and a variance of the prior, to place the points by."""
        return d.mean, d.variance

    @property
    def start(self) -> np.ndarray:
        """A point in the middle."""
        return np.asarray(self.grid[0])

    @property
    def num_points(self) -> int:
        """Entries of the table."""
        return len(self.grid)

    def points(self) -> np.ndarray:
        """Where the table has its entries, ``(num_points, *event)``, in units of the scale about the centre."""
        raise NotImplementedError

    def basis(self, u: Any, xp: Any = jnp) -> Any:
        """The functions at ``u``, a one first: ``(..., num_points)``."""
        raise NotImplementedError

    def log_integral(self, c: jax.Array) -> jax.Array:
        """Log of the integral of the exponential of a combination of the functions."""
        raise NotImplementedError

    def draw(self, key: jax.Array, c: jax.Array) -> jax.Array:
        """A draw in proportion to it."""
        raise NotImplementedError

    def mode(self, c: jax.Array) -> jax.Array:
        """Where it is largest."""
        raise NotImplementedError

    def placement(self, mean: Any, variance: Any) -> tuple[Any, Any]:
        """A centre and a scale for the points, from moments of the prior."""
        return jnp.zeros_like(mean), jnp.ones_like(mean)

    def log_volume(self, scale: Any) -> Any:
        """Log of the volume of a unit of the points."""
        return jnp.sum(jnp.log(scale), -1) if self.event else jnp.log(scale)

    def statistic(self, x: Any) -> Any:
        """An invertible function of x in the span of the functions."""
        return x

    def from_statistic(self, s: Any) -> Any:
        """Its inverse."""
        return s

    def coefficients(self, table: jax.Array) -> jax.Array:
        """From values at the points, on the last axis, to coefficients."""
        return table @ jnp.asarray(self.inverse.T, table.dtype)

    def weights(self, u: jax.Array) -> jax.Array:
        """Weights of the points that give the value at ``u``."""
        found = self.basis(u)
        return found @ jnp.asarray(self.inverse, found.dtype)


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
        """Constant, linear term (..., d) and precision (..., d, d)."""
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


class Wishart(Family):
    r"""$c_1 \log |X| + \sum_{i \le j} c_{ij} X_{ij}$ for a positive definite matrix, a precision say."""

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
        """Degrees of freedom, and the rate matrix R of -tr(R X) / 2."""
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
    r"""$c_1 \log |X| + \sum_{i \le j} c_{ij} (X^{-1})_{ij}$, a covariance."""

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


def _inside(u: jax.Array) -> jax.Array:
    eps = jnp.finfo(u.dtype).eps
    return jnp.clip(u, jnp.finfo(u.dtype).tiny, 1 - eps / 2)


def family_of(d: Any, event_shape: tuple[int, ...]) -> Family | None:
    """The family of a distribution with event shape, if it is the prior of one."""
    d = base_of(d)
    if isinstance(d, dist.Normal):
        return Gaussian()
    if isinstance(d, dist.MultivariateNormal):
        return Gaussian(event_shape[-1])
    if isinstance(d, dist.Beta):
        return Beta()
    if isinstance(d, dist.InverseGamma):
        return InverseGamma()
    if isinstance(d, (dist.Exponential, dist.Gamma)):
        return Gamma()
    if isinstance(d, dist.Dirichlet):
        return Dirichlet(event_shape[-1])
    if isinstance(d, dist.Wishart):
        return Wishart(event_shape[-1])
    if isinstance(d, dist.InverseWishart):
        return InverseWishart(event_shape[-1])
    return None


FACTORS: dict[type[Family], dict[str, Any]] = {
    Wishart: {"precision_matrix": cholesky_of_inverse},
    InverseWishart: {"covariance_matrix": jnp.linalg.cholesky},
}
"""Parameters of a multivariate normal that a matrix is conjugate to, and how its ``scale_tril`` follows from them."""


def base_of(d: Any) -> Any:
    """A distribution without what expands it or moves its axes."""
    while isinstance(d, (dist.ExpandedDistribution, dist.Independent)):
        d = d.base_dist
    return d


CONJUGATE: dict[type[Family], dict[tuple[str, str], tuple[float, bool]]] = {
    Beta: {
        ("BernoulliProbs", "probs"): (1, True),
        ("BinomialProbs", "probs"): (1, True),
        ("GeometricProbs", "probs"): (1, True),
    },
    Gamma: {
        ("Poisson", "rate"): (1, False),
        ("Exponential", "rate"): (1, False),
        ("Gamma", "rate"): (1, False),
        ("InverseGamma", "rate"): (1, False),
        ("Normal", "scale"): (-0.5, False),
        ("HalfNormal", "scale"): (-0.5, False),
        ("LogNormal", "scale"): (-0.5, False),
    },
    InverseGamma: {
        ("Normal", "scale"): (0.5, False),
        ("HalfNormal", "scale"): (0.5, False),
        ("LogNormal", "scale"): (0.5, False),
        ("Laplace", "scale"): (1, False),
        ("Exponential", "rate"): (-1, False),
        ("Gamma", "rate"): (-1, False),
    },
    Dirichlet: {
        ("CategoricalProbs", "probs"): (1, True),
        ("MultinomialProbs", "probs"): (1, True),
    },
}
"""For each prior the distributions and parameters it is conjugate to: which power of the choice the parameter is a
multiple of, and whether it must be the choice itself. The other parameters must not depend on the choice."""


# --- the integral, a draw, the mode -----------------------------------------------------------------------------------


def integrate(
    reduce: Any, family: Family, table: jax.Array, num_rest: int, log_scale: Any, key: Any
) -> jax.Array:
    """Integrate over a choice whose points are the last axis of a table.

    Args:
        reduce: the sum that a discrete choice would have: logarithm of the sum, largest term, draw.
        family: of the choice.
        table: log density at the points; ``num_rest`` axes for other variables lead, then plates.
        num_rest: how many.
        log_scale: log of the volume of a unit of the points, with axes for the plates.
        key: for draws.
    """
    if reduce is log_sum:
        return family.log_integral(family.coefficients(table)) + log_scale
    if reduce is best:
        return _at_mode(family, num_rest, table)
    assert reduce is drawn
    return _at_draw(family, num_rest, table, key) + log_scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _at_mode(family: Family, num_rest: int, table: jax.Array) -> jax.Array:
    c = family.coefficients(table)
    return jnp.sum(table * family.weights(family.mode(c)), -1)


def _at_mode_forward(family: Family, num_rest: int, table: jax.Array) -> Any:
    return _at_mode(family, num_rest, table), table


def _at_mode_backward(family: Family, num_rest: int, table: jax.Array, cotangent: Any) -> Any:
    chosen = family.coefficients(_at_choice(table, cotangent, num_rest))
    return (cotangent[..., None] * family.weights(family.mode(chosen)),)


_at_mode.defvjp(_at_mode_forward, _at_mode_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _at_draw(family: Family, num_rest: int, table: jax.Array, key: Any) -> jax.Array:
    return family.log_integral(family.coefficients(table))


def _at_draw_forward(family: Family, num_rest: int, table: jax.Array, key: Any) -> Any:
    return _at_draw(family, num_rest, table, key), (table, key)


def _at_draw_backward(family: Family, num_rest: int, residual: Any, cotangent: Any) -> Any:
    table, key = residual
    chosen = family.coefficients(_at_choice(table, cotangent, num_rest))
    return cotangent[..., None] * family.weights(family.draw(key, chosen)), None


_at_draw.defvjp(_at_draw_forward, _at_draw_backward)


def _at_choice(table: jax.Array, cotangent: jax.Array, num_rest: int) -> jax.Array:
    """The table where all other variables have the values that the cotangent chooses."""
    weight = cotangent[..., None]
    chosen = jnp.where(weight == 0, 0, weight * table)
    return jnp.sum(chosen, tuple(range(num_rest)))
