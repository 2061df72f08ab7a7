r"""Numbers of weighted points: their moments and quantiles, and whether the weights can be trusted.

References:
    A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024). Pareto smoothed importance sampling. JMLR 25.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike, Float
from scipy import special

from .blocks import lead, percent


def weighted_describe(
    values: ArrayLike,
    weights: Float[ArrayLike, " particle"],
    active: ArrayLike | None = None,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
) -> dict[str, np.ndarray]:
    r"""Weighted mean, sd, quantiles, and standard error of the mean.

    A quantile is the smallest value for which the weights of all values up to it reach the probability. The standard
    error is that of the self-normalised estimator, $\sqrt{\sum_i w_i^2 (x_i - \bar x)^2}$, with weights that sum to one
    over the active particles (Owen, Monte Carlo theory, methods and examples, chapter 9).

    Args:
        values: of shape (particle, ...).
        weights: nonnegative, not all zero.
        active: a mask of the values that count, of a shape that leads that of `values`. All count if it is left out.
        quantiles: probabilities.

    Returns:
        Arrays of shape (...): "mean", "sd", one entry for each quantile ("5%"), "mcse", "active" (the weight of the
        particles that count), "not_finite" (the number of values of positive weight that are NaN or infinite).

    Examples:
        >>> import numpy as np
        >>> x, w = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0])
        >>> table = weighted_describe(x, w, quantiles=(0.25, 0.5))
        >>> float(table["mean"]), float(table["25%"]), float(table["50%"])
        (2.0, 1.0, 2.0)
    """
    x = np.asarray(values, dtype=float)
    tail = x.shape[1:]
    x = np.ascontiguousarray(x.reshape(len(x), -1).T)  # (scalar, particle)
    w = np.broadcast_to(np.asarray(weights, dtype=float), x.shape)
    w = w / w.sum(axis=1, keepdims=True)
    share = np.ones(len(x))
    if active is not None:
        a = lead(active, np.shape(values)).reshape(x.shape[1], -1).T
        w = np.where(a, w, 0.0)
        share = w.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        w = w / w.sum(axis=1, keepdims=True)
        x = np.where(w > 0, x, 0.0)  # a value of weight zero may be anything, NaN among it
        mean = (w * x).sum(axis=1)
        off = x - mean[:, None]
        sd = np.sqrt((w * off**2).sum(axis=1))
        error = np.sqrt((w**2 * off**2).sum(axis=1))
        order = np.argsort(x, axis=1, kind="stable")
        heaps = np.cumsum(np.take_along_axis(w, order, axis=1), axis=1)
        columns = {"mean": mean, "sd": sd}
        for q in quantiles:
            # the sum of the weights is 1 up to rounding: let a probability be reached within
            # rounding
            at = (heaps < q - 1e-12).sum(axis=1, keepdims=True).clip(max=x.shape[1] - 1)
            found = np.take_along_axis(np.take_along_axis(x, order, axis=1), at, axis=1)[:, 0]
            columns[percent(q)] = np.where(np.isnan(mean), np.nan, found)
    columns |= {"mcse": error, "active": share, "not_finite": (~np.isfinite(x)).sum(axis=1)}
    return {name: np.asarray(column, dtype=float).reshape(tail) for name, column in columns.items()}


def khat(log_weights: Float[ArrayLike, " particle"], r_eff: float = 1.0) -> float:
    r"""Pareto $\hat k$ of importance weights (Vehtari, Simpson, Gelman, Yao and Gabry 2024).

    A generalised Pareto law is fitted to the largest $\lceil \min(N/5, 3\sqrt{N / r}) \rceil$ weights, less the next
    one. Its shape k says how heavy the tail of the weights is: they have moments of order below 1/k. Estimates can be
    trusted below `khat_threshold`, about 0.7. Above it the error is larger than it looks. Above 1 the mean of the
    weights need not exist.

    Args:
        log_weights: logarithms of the importance ratios, up to a constant.
        r_eff: the relative efficiency of the draws, 1 for independent ones.

    Returns:
        The shape k. It is NaN if there are fewer than 21 weights, or one is NaN or +inf, or all are zero. It is
        infinite if no more than four weights stand out from the rest: so few carry everything that no fit is possible.
        It is minus infinity if the largest weights are all equal: there is no tail.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> ratios = 0.5 * rng.exponential(size=10_000)     # logarithms of a Pareto law, k = 0.5
        >>> abs(khat(ratios) - 0.5) < 0.2
        True
    """
    lw = np.sort(np.asarray(log_weights, dtype=float).ravel())
    n = lw.size
    count = int(np.ceil(min(n / 5, 3 * np.sqrt(n / r_eff))))
    if count <= 4 or not np.isfinite(lw[-1]):  # NaN sorts last
        return float("nan")
    lw = lw - lw[-1]
    cutoff = np.exp(max(lw[-count - 1], np.log(np.finfo(float).tiny)))
    tail = np.exp(lw[-count:]) - cutoff
    tail = tail[tail > 0]
    if tail.size == 0:
        return float("-inf")
    if tail.size <= 4:
        return float("inf")
    return generalized_pareto(tail)[0]


def khat_threshold(num_particles: int) -> float:
    r"""The threshold above which $\hat k$ is a warning: $\min(1 - 1/\log_{10} N, 0.7)$.

    See Vehtari et al. 2024, equation 13.

    >>> round(khat_threshold(100), 3), khat_threshold(100_000)
    (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(max(num_particles, 2)), 0.7)


def generalized_pareto(excesses: Float[ArrayLike, " n"]) -> tuple[float, float]:
    r"""The shape k and the scale sigma of a generalised Pareto law, $P(X > x) = (1 + k x / \sigma)^{-1/k}$.

    This is the quasi-Bayesian estimator of Zhang and Stephens (2009, Technometrics 51(3), section 3). It averages the
    profile likelihood of $\theta = -k/\sigma$ over a grid of quantiles of its prior. Then the shape is drawn towards
    0.5 with the weight of ten observations (Vehtari et al. 2024, appendix C), which steadies small tails.

    Args:
        excesses: values above the threshold, positive, at least two of them distinct.

    Returns:
        (shape, scale).

    Examples:
        >>> import numpy as np
        >>> shape, scale = generalized_pareto(np.random.default_rng(0).exponential(size=4000))
        >>> bool(abs(shape) < 0.1), bool(abs(scale - 1) < 0.1)     # the exponential law has shape 0
        (True, True)
    """
    x = np.sort(np.asarray(excesses, dtype=float).ravel())
    n = x.size
    grid = 30 + int(np.sqrt(n))
    quartile = x[int(n / 4 + 0.5) - 1]
    theta = 1 / x[-1] + (1 - np.sqrt(grid / (np.arange(grid) + 0.5))) / (3 * quartile)
    with np.errstate(divide="ignore", invalid="ignore"):
        k = np.log1p(-theta[:, None] * x).mean(axis=1)
        profile = n * (np.log(-theta / k) - k - 1)
    profile = np.where(np.isnan(profile), -np.inf, profile)
    theta_hat = float(special.softmax(profile) @ theta)
    k_hat = float(np.log1p(-theta_hat * x).mean())
    return (n * k_hat + 10 * 0.5) / (n + 10), -k_hat / theta_hat
