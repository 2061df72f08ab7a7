r"""Convergence diagnostics: whether chains agree, what draws are worth, whether weights can be trusted.

All functions take arrays that lead with (chain, draw). They work on all scalars behind these axes at once, in double
precision and in NumPy, on the host. For chains they follow Vehtari et al. (2021), and agree with ArviZ to rounding.

One thing ArviZ does not have: `active` is a mask for draws that do not count, because the branch of the model that
holds them was not taken. An expectation over the active draws is a ratio, $E[x \mid a] = E[a x] / E[a]$. Its
Monte-Carlo error is that of the mean of the series $u_t = a_t (x_t - \bar x)$, over **all** draws (delta method). So

$$\mathrm{ESS}_{active} = \bar a \; \mathrm{ESS}(u),$$

where $\bar a$ is the active fraction. For independent draws this is the number of active draws. R-hat is taken of $u$,
and of $a$ itself: chains that disagree about the branch have not mixed either.

References:
    A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Bürkner (2021). Rank-normalization, folding, and
    localization: an improved R-hat for assessing convergence of MCMC. Bayesian Analysis 16(2). A. Vehtari, D. Simpson,
    A. Gelman, Y. Yao, J. Gabry (2024). Pareto smoothed importance sampling. JMLR 25.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import ArrayLike, Bool, Float
from scipy import fft, special

_BLOCK = 2**20  # numbers worked on at once: keeps the temporaries of thousands of scalars in cache
_MIN_DRAWS = 4

_Series = Float[np.ndarray, "scalar chain draw"]
_Mask = Bool[np.ndarray, "scalar chain draw"] | None


# ----------------------------------------------------------------------------------- public, chains


def rhat(draws: ArrayLike, active: ArrayLike | None = None) -> Float[np.ndarray, "..."]:
    r"""Rank-normalised split R-hat (Vehtari et al. 2021, section 4).

    Every chain is cut in halves, and the values are replaced by normal scores of their ranks. $\hat R =
    \sqrt{((n-1)/n\, W + B/n) / W}$ compares the variance W within halves with the variance B between them. It is
    computed for the scores and for the folded scores $|x - \mathrm{median}|$, and the larger value counts. So chains
    with the same location and different spread are seen. A value below 1.01 is good.

    Args:
        draws: values, of shape (chain, draw, ...).
        active: a mask of the draws that count, of a shape that leads that of `draws`. All count if it is left out.

    Returns:
        One number for each scalar, shape (...). It is NaN for a constant, for fewer than four draws, and if a value is
        not finite. It is infinite if every half is constant and the halves differ.

    Examples:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(4, 500))
        >>> bool(rhat(x) < 1.01), bool(rhat(x + np.arange(4)[:, None]) > 1.5)
        (True, True)
    """
    return _each(_rhat, draws, active)


def ess(
    draws: ArrayLike,
    active: ArrayLike | None = None,
    kind: Literal["bulk", "tail", "mean"] = "bulk",
) -> Float[np.ndarray, "..."]:
    r"""Effective sample size: the number of independent draws that would estimate as well.

    $\mathrm{ESS} = MN / \tau$ with $\tau = -1 + 2 \sum_t \hat\rho_t$. The autocorrelations of all chains are combined.
    Geyer's initial positive and monotone sequences cut the sum off (Vehtari et al. 2021, section 3.2).

    Args:
        draws: values, of shape (chain, draw, ...).
        active: a mask of the draws that count, of a shape that leads that of `draws`. All count if it is left out.
        kind: "bulk" is the ESS of the rank-normalised values, and says how well the centre is known. "tail" is the
            smaller ESS of the 5 % and the 95 % quantile. "mean" is the ESS of the values themselves, and gives the
            standard error of the mean.

    Returns:
        One number for each scalar, shape (...). It is NaN where `rhat` is.

    Raises:
        ValueError: for another kind.

    Examples:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(4, 500, 2))
        >>> ess(x).shape, bool((ess(x) > 1500).all())
        ((2,), True)
        >>> bool((ess(np.repeat(x, 5, axis=1)) < 2500).all())     # every draw five times
        True
    """
    kinds: dict[str, Callable[[_Series, _Mask], np.ndarray]]
    kinds = {"bulk": _ess_bulk, "tail": _ess_tail, "mean": _ess_mean}
    if kind not in kinds:
        raise ValueError(f"ess: kind is one of {', '.join(map(repr, kinds))}, not {kind!r}")
    return _each(kinds[kind], draws, active)


def mcse(draws: ArrayLike, active: ArrayLike | None = None) -> Float[np.ndarray, "..."]:
    r"""Monte-Carlo standard error of the mean, $\mathrm{sd} / \sqrt{\mathrm{ESS}_{mean}}$.

    Args:
        draws: values, of shape (chain, draw, ...).
        active: a mask of the draws that count, of a shape that leads that of `draws`. All count if it is left out.

    Returns:
        One number for each scalar, shape (...).

    Examples:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(4, 500))
        >>> bool(abs(mcse(x) * 2000**0.5 - 1) < 0.2)
        True
    """
    return _each(lambda x, a: _sd(x, a) / np.sqrt(_ess_mean(x, a)), draws, active)


def bfmi(energy: Float[ArrayLike, "chain draw"]) -> Float[np.ndarray, " chain"]:
    r"""Estimated Bayesian fraction of missing information, one number for each chain (Betancourt 2016).

    It is $\sum_n (E_n - E_{n-1})^2 / \sum_n (E_n - \bar E)^2$. Below 0.3, new momenta move the energy too little for
    the sampler to reach the tails.

    Args:
        energy: the Hamiltonian at each draw.

    Returns:
        One number for each chain. It is NaN for a chain whose energy never changes.

    Examples:
        >>> import numpy as np
        >>> np.round(bfmi(np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 2.0, 3.0]])), 2)
        array([3. , 0.6])
    """
    e = np.asarray(energy, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = np.square(np.diff(e, axis=1)).sum(axis=1)
        spread = np.square(e - e.mean(axis=1, keepdims=True)).sum(axis=1)
        return np.where(spread > 0, moved / spread, np.nan)


def describe(
    draws: ArrayLike,
    active: ArrayLike | None = None,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
) -> dict[str, np.ndarray]:
    """All numbers that a summary of chains needs, in one pass.

    Args:
        draws: values, of shape (chain, draw, ...).
        active: a mask of the draws that count, of a shape that leads that of `draws`. All count if it is left out.
        quantiles: probabilities.

    Returns:
        Arrays of shape (...): "mean", "sd" (with n - 1), one entry for each quantile ("5%"), "mcse", "ess_bulk",
        "ess_tail", "r_hat", "active" (the fraction of draws that count), "not_finite" (the number of these that are NaN
        or infinite), "constant" (1 if all that count are equal).

    Examples:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(4, 500, 3))
        >>> table = describe(x)
        >>> list(table)
        ['mean', 'sd', '5%', '50%', '95%', 'mcse', 'ess_bulk', 'ess_tail', 'r_hat', 'active',
        'not_finite', 'constant']
        >>> table["mean"].shape
        (3,)
    """

    def columns(x: _Series, a: _Mask) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            ordered = _ordered(x, a)
            # the dearest part by far: once for both
            scores = None if x.shape[2] < _MIN_DRAWS else _split_scores(x, a)
            bad = _not_finite(x, a)
            sd = _sd(x, a)
            rows = [
                _mean(x, a),
                sd,
                *(np.where(_has_nan(x, a), np.nan, _quantile(*ordered, q)) for q in quantiles),
                sd / np.sqrt(_valid(_ess_mean, x, a)),
                _valid(lambda x, a: _ess_bulk(x, a, scores), x, a),
                _valid(lambda x, a: _ess_tail(x, a, ordered), x, a),
                _valid(lambda x, a: _rhat(x, a, scores), x, a),
                np.ones(len(x)) if a is None else a.mean(axis=(1, 2)),
                bad,
                (ordered[1] > 0) & (ordered[0][:, 0] == _quantile(*ordered, 1.0)),
            ]
        return np.stack(rows, axis=-1)

    names = ["mean", "sd", *map(percent, quantiles)]
    names += ["mcse", "ess_bulk", "ess_tail", "r_hat", "active", "not_finite", "constant"]
    table = _each(columns, draws, active, width=len(names), check=False)
    return {name: table[..., i] for i, name in enumerate(names)}


def percent(quantile: float) -> str:
    """The column name of a quantile.

    >>> percent(0.05), percent(0.975)
    ('5%', '97.5%')
    """
    return f"{100 * quantile:.6g}%"


# ---------------------------------------------------------------------------------- public, weights


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
        a = _lead(active, np.shape(values)).reshape(x.shape[1], -1).T
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


# ------------------------------------------------------------------------ one block: (scalar, C, N)


def _each(
    f: Callable[[_Series, _Mask], np.ndarray],
    draws: ArrayLike,
    active: ArrayLike | None,
    width: int | None = None,
    check: bool = True,
) -> np.ndarray:
    """Apply `f` to blocks of scalars, and put the results into the shape behind (chain, draw)."""
    x = np.asarray(draws)
    if x.ndim < 2:
        raise ValueError(
            f"diagnostics want an array that leads with (chain, draw), not one of shape {x.shape}; "
            "a single chain is x[None]"
        )
    chains, n, *shape = x.shape
    mask = None if active is None else _lead(active, x.shape)
    if mask is not None and mask.all():
        mask = None
    size = int(np.prod(shape, dtype=int))
    x = x.reshape(chains, n, size)
    mask = None if mask is None else mask.reshape(chains, n, size)
    out = np.empty((size,) if width is None else (size, width))
    step = max(1, _BLOCK // max(1, chains * n))
    for i in range(0, size, step):
        block = np.ascontiguousarray(np.moveaxis(x[..., i : i + step], -1, 0), dtype=float)
        a = None if mask is None else np.moveaxis(mask[..., i : i + step], -1, 0)
        if a is not None and a.all():
            a = None
        with np.errstate(invalid="ignore", divide="ignore"):
            out[i : i + step] = _valid(f, block, a) if check else f(block, a)
    return out.reshape((*shape,) if width is None else (*shape, width))


def _lead(mask: Any, shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
    """Broadcast a mask over the trailing axes of `shape`. The shape of the mask leads `shape`, or is ()."""
    mask = np.asarray(mask, dtype=bool)
    if mask.shape != shape[: mask.ndim]:
        raise ValueError(
            f"`active` has shape {mask.shape}, which does not lead that of the values, {shape}"
        )
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


def _valid(diagnostic: Callable[[_Series, _Mask], np.ndarray], x: _Series, a: _Mask) -> np.ndarray:
    """A diagnostic, NaN where it means nothing: for too few draws, values that are not finite, or a constant."""
    if x.shape[2] < _MIN_DRAWS:
        return np.full(len(x), np.nan)
    value = diagnostic(x, a)
    lo = (x if a is None else np.where(a, x, np.inf)).min(axis=(1, 2))
    hi = (x if a is None else np.where(a, x, -np.inf)).max(axis=(1, 2))
    if (
        a is not None
    ):  # a branch taken by some chains only is no constant: its indicator has not mixed
        mixed = np.all(np.any(a, axis=2), axis=1) & (a.sum(axis=(1, 2)) >= _MIN_DRAWS)
        return np.where((_not_finite(x, a) > 0) | ((lo >= hi) & mixed) | (lo > hi), np.nan, value)
    return np.where((_not_finite(x, a) > 0) | (lo >= hi), np.nan, value)


def _not_finite(x: _Series, a: _Mask) -> np.ndarray:
    bad = ~np.isfinite(x)
    return (bad if a is None else bad & a).sum(axis=(1, 2))


def _has_nan(x: _Series, a: _Mask) -> np.ndarray:
    bad = np.isnan(x)
    return np.any(bad if a is None else bad & a, axis=(1, 2))


def _mean(x: _Series, a: _Mask) -> np.ndarray:
    if a is None:
        return x.mean(axis=(1, 2))
    return np.where(a, x, 0.0).sum(axis=(1, 2)) / a.sum(axis=(1, 2))


def _sd(x: _Series, a: _Mask) -> np.ndarray:
    off = x - _mean(x, a)[:, None, None]
    count = x[0].size if a is None else a.sum(axis=(1, 2))
    return np.sqrt(
        np.square(off if a is None else np.where(a, off, 0.0)).sum(axis=(1, 2)) / (count - 1)
    )


def _ordered(x: _Series, a: _Mask) -> tuple[np.ndarray, np.ndarray]:
    """The active values of each scalar in ascending order (idle ones come last), and their number."""
    flat = (x if a is None else np.where(a, x, np.inf)).reshape(len(x), -1)
    count = np.full(len(x), flat.shape[1]) if a is None else a.sum(axis=(1, 2))
    return np.sort(flat, axis=1), count


def _quantile(ordered: np.ndarray, count: np.ndarray, q: float) -> np.ndarray:
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


def _split(x: np.ndarray) -> np.ndarray:
    """The halves of chains, as chains. For an odd number of draws the middle one is dropped."""
    half = x.shape[2] // 2
    return np.concatenate([x[..., :half], x[..., x.shape[2] - half :]], axis=1)


def _scores(x: _Series, a: _Mask) -> np.ndarray:
    """Centred normal scores (Blom's) of the ranks of the active values. Idle values have 0."""
    flat = (x if a is None else np.where(a, x, np.inf)).reshape(len(x), -1)
    count = flat.shape[1] if a is None else a.sum(axis=(1, 2))[:, None]
    from scipy.stats import rankdata  # half a second, on first use

    ranks = rankdata(flat, method="average", axis=1)
    if a is not None:
        ranks = np.minimum(
            ranks, count
        )  # idle values: any rank inside the range, they are masked below
    return _centred(special.ndtri((ranks - 0.375) / (count + 0.25)).reshape(x.shape), a)


def _centred(x: np.ndarray, a: _Mask) -> np.ndarray:
    """The series u = a (x - mean). The error of its mean is that of the active mean."""
    off = x - _mean(x, a)[:, None, None]
    return off if a is None else np.where(a, off, 0.0)


def _split_scores(x: _Series, a: _Mask) -> np.ndarray:
    return _scores(_split(x), None if a is None else _split(a))


def _rhat(x: _Series, a: _Mask, scores: np.ndarray | None = None) -> np.ndarray:
    scores = _split_scores(x, a) if scores is None else scores
    x, a = _split(x), None if a is None else _split(a)
    middle = _quantile(*_ordered(x, a), 0.5)[:, None, None]
    folded = _scores(np.abs(x - middle), a)
    worst = np.fmax(_scale_reduction(scores), _scale_reduction(folded))
    if a is not None:
        worst = np.fmax(worst, _scale_reduction(a.astype(float)))
    return worst


def _scale_reduction(x: _Series) -> np.ndarray:
    n = x.shape[2]
    within = x.var(axis=2, ddof=1).mean(axis=1)
    between = n * x.mean(axis=2).var(axis=1, ddof=1)
    # a half that never moves has a variance of rounding errors only
    ratio = np.where(
        within > 1e-20 * between, between / within, np.where(between > 0, np.inf, np.nan)
    )
    return np.sqrt((ratio + n - 1) / n)


def _ess_bulk(x: _Series, a: _Mask, scores: np.ndarray | None = None) -> np.ndarray:
    scores = _split_scores(x, a) if scores is None else scores
    return _effective(scores, None if a is None else _split(a))


def _ess_mean(x: _Series, a: _Mask) -> np.ndarray:
    x, a = _split(x), None if a is None else _split(a)
    return _effective(_centred(x, a), a)


def _ess_tail(
    x: _Series, a: _Mask, ordered: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    ordered = _ordered(x, a) if ordered is None else ordered
    halves = None if a is None else _split(a)
    sizes = []
    for q in (0.05, 0.95):
        below = x <= _quantile(*ordered, q)[:, None, None]
        sizes.append(_effective(_centred(_split(below.astype(float)), halves), halves))
    return np.minimum(*sizes)


def _effective(u: _Series, a: _Mask) -> np.ndarray:
    """Effective sample size of a centred series, times the active fraction (section 3.2)."""
    scalars, chains, n = u.shape
    total = chains * n
    covariance = _autocovariance(u)  # (scalar, lag), mean over chains
    within = covariance[:, :1] * n / (n - 1)
    pooled = covariance[:, :1]
    if chains > 1:
        pooled = pooled + u.mean(axis=2).var(axis=1, ddof=1)[:, None]
    rho = 1 - (within - covariance) / pooled
    rho[:, 0] = 1.0

    # Geyer: autocorrelations in pairs; the first pair (behind the zeroth) that is not positive ends
    # the sum
    pairs = rho[:, : n - n % 2].reshape(scalars, -1, 2).sum(axis=2)
    last = max(0, -(-(n - 2) // 2) - 1)
    stop = np.concatenate([pairs[:, :last] <= 0, np.ones((scalars, 1), bool)], axis=1).argmax(
        axis=1
    )
    kept = np.minimum.accumulate(pairs, axis=1)
    kept = np.where(np.arange(pairs.shape[1]) < stop[:, None], kept, 0.0).sum(axis=1)
    rows = np.arange(scalars)
    even, ending = rho[rows, 2 * stop], pairs[rows, stop]
    tau = -1 + 2 * kept + np.where((even > 0) | (ending >= 0), even, 0.0)
    tau = np.maximum(
        tau, 1 / np.log10(total)
    )  # antithetic chains: at most log10(total) draws' worth each
    size = np.where(np.ptp(u, axis=(1, 2)) < 1e-15, total, total / tau)  # a constant has no error
    return size if a is None else size * a.mean(axis=(1, 2))


def _autocovariance(u: _Series) -> Float[np.ndarray, "scalar lag"]:
    """Mean over chains of the autocovariances within each (divided by n), by the power spectrum."""
    n = u.shape[2]
    padded = fft.next_fast_len(2 * n, real=True)
    spectrum = np.fft.rfft(u - u.mean(axis=2, keepdims=True), n=padded, axis=2)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    return np.fft.irfft(power.mean(axis=1), n=padded, axis=1)[:, :n] / n
