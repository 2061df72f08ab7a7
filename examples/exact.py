"""Exact posteriors of the two problems of the demo, by one-dimensional quadrature in double precision.

In both, all parameters but one scale are Gaussian given that scale. So the law of the scale is known on a grid up to
one sum, and every other parameter is a mixture of Gaussians over that grid.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Grid = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Exact:
    """The exact posterior of one scalar.

    Attributes:
        mean: its mean.
        sd: its standard deviation.
        interval: its 5 % and 95 % quantiles.
        x: points that span it.
        density: its density there.
    """

    mean: float
    sd: float
    interval: tuple[float, float]
    x: Grid
    density: Grid


def _summarise(mean: float, sd: float, x: Grid, density: Grid) -> Exact:
    cdf = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(x))])
    low, high = np.interp([0.05, 0.95], cdf / cdf[-1], x)
    return Exact(float(mean), float(sd), (float(low), float(high)), x, density / cdf[-1])


def _scale(grid: Grid, weights: Grid) -> Exact:
    """The scale itself; `weights` are its probabilities on a grid even in its logarithm."""
    mean = weights @ grid
    sd = np.sqrt(weights @ (grid - mean) ** 2)
    density = weights / (grid * np.log(grid[1] / grid[0]))
    inside = grid < mean + 12 * sd
    return _summarise(mean, sd, grid[inside], density[inside])


def _mixture(weights: Grid, means: Grid, sds: Grid, size: int = 800) -> Exact:
    """sum_g weights_g N(means_g, sds_g)."""
    mean = weights @ means
    sd = np.sqrt(weights @ (sds**2 + (means - mean) ** 2))
    x = np.linspace(mean - 8 * sd, mean + 8 * sd, size)
    kept = weights > 1e-12 * weights.max()
    z = (x[:, None] - means[kept]) / sds[kept]
    density = np.exp(-0.5 * z**2) / (np.sqrt(2 * np.pi) * sds[kept]) @ weights[kept]
    return _summarise(mean, sd, x, density)


def _normalise(log_weights: Grid) -> Grid:
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def eight_schools(y: Grid, sigma: Grid) -> dict[str, Exact]:
    r"""mu ~ N(0, 5), tau ~ half-Cauchy(0, 5), theta_j ~ N(mu, tau), y_j ~ N(theta_j, sigma_j).

    Given tau, y_j ~ N(mu, sqrt(sigma_j^2 + tau^2)), so mu is Gaussian, and theta_j given (mu, tau) too:

    .. math:: p(\tau \mid y) \propto p(\tau)\, s_\tau \exp(m_\tau^2 / 2 s_\tau^2)
              \prod_j N(y_j; 0, \sqrt{\sigma_j^2 + \tau^2})
    """
    y, sigma = np.asarray(y, float), np.asarray(sigma, float)
    tau = np.exp(np.linspace(np.log(1e-4), np.log(500.0), 4000))
    variance = sigma**2 + tau[:, None] ** 2
    precision = 1 / 25.0 + (1 / variance).sum(1)
    mean = (y / variance).sum(1) / precision
    log_marginal = -0.5 * (np.log(variance) + y**2 / variance).sum(1)
    log_marginal += -0.5 * np.log(precision) + 0.5 * mean**2 * precision
    log_prior = -np.log1p((tau / 5.0) ** 2) + np.log(tau)  # the grid is even in log tau
    weights = _normalise(log_marginal + log_prior)

    shrink = tau[:, None] ** 2 / variance  # E[theta | mu, tau] = mu + shrink (y - mu)
    theta_mean = mean[:, None] + shrink * (y - mean[:, None])
    theta_sd = np.sqrt(shrink * sigma**2 + (1 - shrink) ** 2 / precision[:, None])
    scalars = {"mu": _mixture(weights, mean, precision**-0.5), "tau": _scale(tau, weights)}
    for j in range(y.size):
        scalars[f"theta[{j}]"] = _mixture(weights, theta_mean[:, j], theta_sd[:, j])
    return scalars


def regression(design: Float[np.ndarray, "n k"], y: Grid, prior_scale: float) -> dict[str, Exact]:
    r"""Linear regression with flat coefficients and sigma ~ half-Cauchy(0, prior_scale).

    .. math:: p(\sigma \mid y) \propto p(\sigma)\, \sigma^{-(n-k)} \exp(-\mathrm{RSS} / 2\sigma^2),
              \qquad \beta \mid \sigma \sim N(\hat\beta, \sigma^2 (X'X)^{-1})
    """
    n, k = design.shape
    beta, *_ = np.linalg.lstsq(design, y, rcond=None)
    rss = ((y - design @ beta) ** 2).sum()
    spread = np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    centre = np.sqrt(rss / (n - k))
    sigma = centre * np.exp(np.linspace(-12, 12, 2000) / np.sqrt(2 * (n - k)))
    log_density = -(n - k) * np.log(sigma) - 0.5 * rss / sigma**2
    log_density += -np.log1p((sigma / prior_scale) ** 2) + np.log(sigma)
    weights = _normalise(log_density)
    scalars = {
        f"beta[{i}]": _mixture(weights, np.full_like(sigma, beta[i]), sigma * spread[i])
        for i in range(k)
    }
    return scalars | {"sigma": _scale(sigma, weights)}
