r"""Convergence diagnostics: whether chains agree, and what their draws are worth.

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
    localization: an improved R-hat for assessing convergence of MCMC. Bayesian Analysis 16(2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import ArrayLike, Float

from . import blocks
from .blocks import Mask, Series, percent

_BLOCK = 2**20  # numbers worked on at once: keeps the temporaries of thousands of scalars in cache
_MIN_DRAWS = 4


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
    kinds: dict[str, Callable[[Series, Mask], np.ndarray]]
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
    return _each(lambda x, a: blocks.sd(x, a) / np.sqrt(_ess_mean(x, a)), draws, active)


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

    def columns(x: Series, a: Mask) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            ordered = blocks.ordered(x, a)
            # the dearest part by far: once for both
            scores = None if x.shape[2] < _MIN_DRAWS else blocks.scores(*blocks.halves(x, a))
            nan = blocks.count_where(np.isnan(x), a) > 0
            sd = blocks.sd(x, a)
            rows = [
                blocks.mean(x, a),
                sd,
                *(np.where(nan, np.nan, blocks.quantile(*ordered, q)) for q in quantiles),
                sd / np.sqrt(_valid(_ess_mean, x, a)),
                _valid(lambda x, a: _ess_bulk(x, a, scores), x, a),
                _valid(lambda x, a: _ess_tail(x, a, ordered), x, a),
                _valid(lambda x, a: _rhat(x, a, scores), x, a),
                np.ones(len(x)) if a is None else a.mean(axis=(1, 2)),
                blocks.count_where(~np.isfinite(x), a),
                (ordered[1] > 0) & (ordered[0][:, 0] == blocks.quantile(*ordered, 1.0)),
            ]
        return np.stack(rows, axis=-1)

    names = ["mean", "sd", *map(percent, quantiles)]
    names += ["mcse", "ess_bulk", "ess_tail", "r_hat", "active", "not_finite", "constant"]
    table = _each(columns, draws, active, width=len(names), check=False)
    return {name: table[..., i] for i, name in enumerate(names)}


def _each(
    f: Callable[[Series, Mask], np.ndarray],
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
    mask = None if active is None else blocks.lead(active, x.shape)
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


def _valid(diagnostic: Callable[[Series, Mask], np.ndarray], x: Series, a: Mask) -> np.ndarray:
    """A diagnostic, NaN where it means nothing: for too few draws, values that are not finite, or a constant."""
    if x.shape[2] < _MIN_DRAWS:
        return np.full(len(x), np.nan)
    value = diagnostic(x, a)
    lowest = blocks.filled(x, a, np.inf).min(axis=(1, 2))
    highest = blocks.filled(x, a, -np.inf).max(axis=(1, 2))
    constant = lowest >= highest
    if a is not None:
        # A branch taken by some chains only is no constant: its indicator has not mixed.
        everywhere = np.all(np.any(a, axis=2), axis=1) & (a.sum(axis=(1, 2)) >= _MIN_DRAWS)
        constant = (constant & everywhere) | (lowest > highest)
    return np.where((blocks.count_where(~np.isfinite(x), a) > 0) | constant, np.nan, value)


def _rhat(x: Series, a: Mask, scores: np.ndarray | None = None) -> np.ndarray:
    x, a = blocks.halves(x, a)
    scores = blocks.scores(x, a) if scores is None else scores
    middle = blocks.quantile(*blocks.ordered(x, a), 0.5)[:, None, None]
    folded = blocks.scores(np.abs(x - middle), a)
    worst = np.fmax(blocks.scale_reduction(scores), blocks.scale_reduction(folded))
    if a is not None:
        worst = np.fmax(worst, blocks.scale_reduction(a.astype(float)))
    return worst


def _ess_bulk(x: Series, a: Mask, scores: np.ndarray | None = None) -> np.ndarray:
    x, a = blocks.halves(x, a)
    return blocks.effective_size(blocks.scores(x, a) if scores is None else scores, a)


def _ess_mean(x: Series, a: Mask) -> np.ndarray:
    x, a = blocks.halves(x, a)
    return blocks.effective_size(blocks.centred(x, a), a)


def _ess_tail(
    x: Series, a: Mask, ordered: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    ordered = blocks.ordered(x, a) if ordered is None else ordered
    ends = [x <= blocks.quantile(*ordered, q)[:, None, None] for q in (0.05, 0.95)]
    return np.minimum(*(_ess_mean(below.astype(float), a) for below in ends))
