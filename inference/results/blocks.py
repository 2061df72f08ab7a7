"""Moments, quantiles, ranks and effective sizes of many scalars at once, in double precision.

A block is an array (scalar, chain, draw). A mask of the same shape says which draws count. It is None if all count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import fft, special

Series = Float[np.ndarray, "scalar chain draw"]
Mask = Bool[np.ndarray, "scalar chain draw"] | None


def percent(quantile: float) -> str:
    """The column name of a quantile.

    >>> percent(0.05), percent(0.975)
    ('5%', '97.5%')
    """
    return f"{100 * quantile:.6g}%"


def lead(mask: Any, shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
    """Broadcast a mask over the trailing axes of `shape`. The shape of the mask leads `shape`, or is ()."""
    mask = np.asarray(mask, dtype=bool)
    if mask.shape != shape[: mask.ndim]:
        raise ValueError(
            f"`active` has shape {mask.shape}, which does not lead that of the values, {shape}"
        )
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


def filled(x: np.ndarray, a: Mask, value: float) -> np.ndarray:
    """The active values, and another value in place of the idle ones."""
    return x if a is None else np.where(a, x, value)


def count_where(bad: Bool[np.ndarray, "scalar chain draw"], a: Mask) -> np.ndarray:
    """How many active values of each scalar are bad."""
    return (bad if a is None else bad & a).sum(axis=(1, 2))


def mean(x: Series, a: Mask) -> np.ndarray:
    """The mean of the active values of each scalar."""
    if a is None:
        return x.mean(axis=(1, 2))
    return filled(x, a, 0.0).sum(axis=(1, 2)) / a.sum(axis=(1, 2))


def sd(x: Series, a: Mask) -> np.ndarray:
    """The standard deviation of the active values of each scalar, with n - 1."""
    count = x[0].size if a is None else a.sum(axis=(1, 2))
    return np.sqrt(np.square(centred(x, a)).sum(axis=(1, 2)) / (count - 1))


def centred(x: np.ndarray, a: Mask) -> np.ndarray:
    """The series u = a (x - mean). The error of its mean is that of the active mean."""
    return filled(x - mean(x, a)[:, None, None], a, 0.0)


def ordered(x: Series, a: Mask) -> tuple[np.ndarray, np.ndarray]:
    """The active values of each scalar in ascending order (idle ones come last), and their number."""
    flat = filled(x, a, np.inf).reshape(len(x), -1)
    count = np.full(len(x), flat.shape[1]) if a is None else a.sum(axis=(1, 2))
    return np.sort(flat, axis=1), count


def quantile(ordered: np.ndarray, count: np.ndarray, q: float) -> np.ndarray:
    """Linear interpolation between order statistics (type 7, as in NumPy and ArviZ)."""
    at = np.clip((count - 1) * q, 0, None)
    lo = np.floor(at).astype(int)
    hi = np.minimum(lo + 1, np.maximum(count - 1, 0))
    rows = np.arange(len(ordered))
    below, above, part = ordered[rows, lo], ordered[rows, hi], at - lo
    # the middle of two exactly so, for then |x - median| ties as it does in other implementations
    value = np.where(part == 0.5, (below + above) / 2, below + (above - below) * part)
    value = np.where(below == above, below, value)  # also between equal infinities
    return np.where(count > 0, value, np.nan)


def scores(x: Series, a: Mask) -> np.ndarray:
    """Centred normal scores (Blom's) of the ranks of the active values. Idle values have 0."""
    from scipy.stats import rankdata  # half a second, on first use

    flat = filled(x, a, np.inf).reshape(len(x), -1)
    count = flat.shape[1] if a is None else a.sum(axis=(1, 2))[:, None]
    # Idle values have any rank inside the range: they are masked below.
    ranks = np.minimum(rankdata(flat, method="average", axis=1), count)
    return centred(special.ndtri((ranks - 0.375) / (count + 0.25)).reshape(x.shape), a)


def halves(x: Series, a: Mask) -> tuple[Series, Mask]:
    """The halves of chains, as chains. For an odd number of draws the middle one is dropped."""
    half = x.shape[2] // 2

    def split(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[..., :half], x[..., x.shape[2] - half :]], axis=1)

    return split(x), None if a is None else split(a)


def scale_reduction(x: Series) -> np.ndarray:
    """The square root of the variance of all draws over the variance within chains."""
    n = x.shape[2]
    within = x.var(axis=2, ddof=1).mean(axis=1)
    between = n * x.mean(axis=2).var(axis=1, ddof=1)
    # a half that never moves has a variance of rounding errors only
    ratio = np.where(
        within > 1e-20 * between, between / within, np.where(between > 0, np.inf, np.nan)
    )
    return np.sqrt((ratio + n - 1) / n)


def effective_size(u: Series, a: Mask) -> np.ndarray:
    """Effective sample size of a centred series, times the active fraction (section 3.2)."""
    scalars, chains, n = u.shape
    total = chains * n
    covariance = autocovariance(u)  # (scalar, lag), mean over chains
    within = covariance[:, :1] * n / (n - 1)
    pooled = covariance[:, :1]
    if chains > 1:
        pooled = pooled + u.mean(axis=2).var(axis=1, ddof=1)[:, None]
    rho = 1 - (within - covariance) / pooled
    rho[:, 0] = 1.0

    # Geyer: autocorrelations in pairs. The sum ends with the first pair (behind the zeroth) that is not positive.
    pairs = rho[:, : n - n % 2].reshape(scalars, -1, 2).sum(axis=2)
    last = max(0, -(-(n - 2) // 2) - 1)
    ends = np.concatenate([pairs[:, :last] <= 0, np.ones((scalars, 1), bool)], axis=1)
    stop = ends.argmax(axis=1)
    kept = np.minimum.accumulate(pairs, axis=1)
    kept = np.where(np.arange(pairs.shape[1]) < stop[:, None], kept, 0.0).sum(axis=1)
    rows = np.arange(scalars)
    even, ending = rho[rows, 2 * stop], pairs[rows, stop]
    tau = -1 + 2 * kept + np.where((even > 0) | (ending >= 0), even, 0.0)
    # antithetic chains: at most log10(total) draws' worth each
    tau = np.maximum(tau, 1 / np.log10(total))
    size = np.where(np.ptp(u, axis=(1, 2)) < 1e-15, total, total / tau)  # a constant has no error
    return size if a is None else size * a.mean(axis=(1, 2))


def autocovariance(u: Series) -> Float[np.ndarray, "scalar lag"]:
    """Mean over chains of the autocovariances within each (divided by n), by the power spectrum."""
    n = u.shape[2]
    padded = fft.next_fast_len(2 * n, real=True)
    spectrum = np.fft.rfft(u - u.mean(axis=2, keepdims=True), n=padded, axis=2)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    return np.fft.irfft(power.mean(axis=1), n=padded, axis=1)[:, :n] / n
