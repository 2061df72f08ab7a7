"""The diagnosis in words: which diagnostic failed, at which address, and what to try.

Each check is one function. It returns a `Finding` or nothing. The thresholds are those of the papers that `diagnostics`
names: R-hat 1.01 and 400 effective draws (Vehtari et al. 2021), E-BFMI 0.3 (Betancourt 2016), k-hat
min(1 - 1/log10 N, 0.7) (Vehtari et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from weft.ppl.transforms.reparam import BASE

from . import diagnostics
from .weights import khat, khat_threshold

MAX_RHAT = 1.01
MIN_ESS = 400
MIN_BFMI = 0.3
MIN_PARTICLE_ESS = 100
_APART = 1.05  # R-hat above which chains disagree, rather than being short
_DEFAULT_TREE_DEPTH = 10
_TUNE = "a smaller step_size, or have a warm-up find one, num_warmup=500"

# Laws with a location and a scale, for which `noncentered` exists
_LOCATION_SCALE = {
    "Normal",
    "StudentT",
    "Cauchy",
    "Laplace",
    "Logistic",
    "Gumbel",
    "LogNormal",
    "MultivariateNormal",
}

Table = Mapping[str, Mapping[str, np.ndarray]]


class Finding(NamedTuple):
    """One finding of a verdict, in a sentence or two. `bad` says that it makes the numbers unreliable."""

    text: str
    bad: bool = True


def _note(text: str) -> Finding:
    return Finding(text, bad=False)


def judge_draws(
    table: Table,
    choices: Mapping[str, np.ndarray],
    active: Mapping[str, Any],
    stats: Mapping[str, Any],
    sites: Mapping[str, Any],
    fixed_steps: bool = False,
) -> list[Finding]:
    """The verdict on Markov chains.

    Args:
        table: the columns of `diagnostics.describe`, by address.
        choices: values of shape (chain, draw, ...), by address. They show chains that never move.
        active: which draws count, by address.
        stats: statistics of the sampler, of shape (chain, draw).
        sites: the `SiteInfo` of each address, for advice that names a site.
        fixed_steps: whether no warm-up tuned the step size, so that the advice is to tune it.
    """
    if not table:
        return [_note("There is nothing to summarise: no choice and no derived value was kept.")]
    chains, draws = next(iter(choices.values())).shape[:2] if choices else _shape(stats)
    recentre = iter([_recentre(table, sites)])  # advice to be given once
    bad = [
        *_not_finite(table),
        *_too_few(draws),
        *_stuck(choices, active, fixed_steps),
        *_divergences(stats, recentre, fixed_steps),
        *_disagreement(table, chains, draws, recentre),
        *_too_short(table, draws),
        *_deep_trees(stats),
        *_energy(stats, recentre),
    ]
    return [*(bad or [_agreement(table, chains)]), *_constants(table), *_idle(table)]


def judge_particles(table: Table, log_weights: np.ndarray, exact: bool) -> list[Finding]:
    """The verdict on weighted particles. `exact` says that they are all values of an enumeration."""
    n = log_weights.size
    if np.isnan(log_weights).any():
        count = int(np.isnan(log_weights).sum())
        return [Finding(f"{count} of {n} log weights are NaN: look at the density there.")]
    if n == 0 or log_weights.max() == -np.inf:
        text = (
            f"All {n} particles have weight zero: the proposal never reaches where the target is "
            "positive. Check the observations against the supports, or take a nearer proposal."
        )
        return [Finding(text)]
    if log_weights.max() == np.inf:
        text = (
            "A log weight is infinite: the proposal's density is 0 there, or the target's infinite"
        )
        return [Finding(text)]
    notes = [*_not_finite(table), *_constants(table), *_idle(table)]
    if exact:
        return [_note(f"Exact: all {n} values enumerated, nothing is estimated."), *notes]
    return [_weights(log_weights), *notes]


# ------------------------------------------------------------------------------------------- chains


def _agreement(table: Table, chains: int) -> Finding:
    if all(np.isnan(columns["r_hat"]).all() for columns in table.values()):
        return _note("No value varies: there is nothing to diagnose.")
    if chains == 1:
        return _note(
            f"R-hat of the chain's halves below {MAX_RHAT} and every ESS above {MIN_ESS}. That "
            "other chains would agree, one chain cannot show: run num_chains=4."
        )
    return _note(f"All R-hat below {MAX_RHAT} and every ESS above {MIN_ESS}: the chains agree.")


def _not_finite(table: Table) -> Iterator[Finding]:
    found = {row: int(v) for row, v in _rows(table, "not_finite") if v > 0}
    if found:
        where = _listed([f"{row} ({count})" for row, count in found.items()])
        yield Finding(
            f"NaN or infinite values in {where}: these rows say nothing. For a derived value look "
            "at its formula, for a choice at the density there."
        )


def _too_few(draws: int) -> Iterator[Finding]:
    if draws < 4:
        what = f"{draws} draw{'s' if draws != 1 else ''} a chain"
        yield Finding(f"Only {what}: R-hat and effective sample sizes need 4, better 1000.")


def _stuck(
    choices: Mapping[str, np.ndarray], active: Mapping[str, Any], fixed_steps: bool
) -> Iterator[Finding]:
    """Find chains in which no continuous choice ever changed."""
    moving = None
    for address, x in choices.items():
        if x.shape[1] < 4 or x.dtype.kind != "f" or not np.all(active.get(address, True)):
            continue  # a discrete choice may well stay; idle values are nobody's
        x = x.reshape(*x.shape[:2], -1)
        some = (x != x[:, :1]).any(axis=(1, 2))
        moving = some if moving is None else moving | some
    if moving is not None and not moving.all():
        yield Finding(
            f"{_chains(np.flatnonzero(~moving))} never moved: the steps are too large for where it started, or the "
            "density has no gradient there. Start elsewhere, with run(..., init=choices), or "
            f"{_TUNE if fixed_steps else 'allow a longer warm-up'}."
        )


def _divergences(
    stats: Mapping[str, Any], recentre: Iterator[str], fixed_steps: bool
) -> Iterator[Finding]:
    diverging = np.asarray(stats.get("diverging", False))
    count = int(diverging.sum())
    if count:
        yield Finding(
            f"{count} of {diverging.size} draws diverged ({_percent(count / diverging.size)}): "
            "where the density bends sharply the sampler cannot follow, and means may be biased. "
            f"Try {_TUNE if fixed_steps else 'target_acceptance=0.95'}{next(recentre, '')}."
        )


def _disagreement(
    table: Table, chains: int, draws: int, recentre: Iterator[str]
) -> Iterator[Finding]:
    sizes = {row: v for row, v in _rows(table, "r_hat") if not math.isnan(v)}
    high = {row: v for row, v in sizes.items() if v > MAX_RHAT}
    if not high:
        return
    worst = max(high, key=lambda row: high[row])
    who = "chains" if chains > 1 else "halves of the chain"
    text = (
        f"R-hat is above {MAX_RHAT} for {_of(len(high), len(sizes))} (worst: {worst}, "
        f"{_rhat(high[worst])}): the {who} "
    )
    if high[worst] <= _APART:
        text += f"do not quite agree yet. Draw more: num_samples={_nice(4 * draws)}."
    else:
        text += (
            f"disagree, and the table is no posterior. Try a longer warm-up{next(recentre, '')}; if chains settle in "
            "different places, the posterior has several modes, or a symmetry that an ordering or a prior should "
            "break."
        )
    yield Finding(text)


def _too_short(table: Table, draws: int) -> Iterator[Finding]:
    sizes: dict[str, tuple[float, str]] = {}
    for kind in ("bulk", "tail"):
        for row, v in _rows(table, f"ess_{kind}"):
            if v < sizes.get(row, (math.inf, ""))[0]:
                sizes[row] = (v, kind)
    low = {row: v for row, v in sizes.items() if v[0] < MIN_ESS}
    if not low:
        return
    worst = min(low, key=lambda row: low[row][0])
    least, kind = low[worst]
    text = (
        f"The effective sample size is below {MIN_ESS} for {_of(len(low), len(sizes))} (least: "
        f"{worst}, {least:.0f} in the {kind})."
    )
    if not any(v > _APART for _, v in _rows(table, "r_hat")):  # else more of the same is no help
        text += f" Draw more: num_samples={_nice(draws * MIN_ESS / max(least, 1))}."
    yield Finding(text)


def _deep_trees(stats: Mapping[str, Any]) -> Iterator[Finding]:
    depth = np.asarray(stats.get("tree_depth", 0))
    full = np.asarray(stats.get("reached_max_treedepth", depth >= _DEFAULT_TREE_DEPTH))
    if full.mean() > 0.01:
        yield Finding(
            f"{_percent(full.mean())} of the draws stopped at the largest tree depth: the posterior is long and thin "
            "for its metric, and the chains walk slowly. Try dense_mass=True, rescale the parameters, or allow "
            "deeper trees."
        )


def _energy(stats: Mapping[str, Any], recentre: Iterator[str]) -> Iterator[Finding]:
    energy = np.asarray(stats.get("energy", np.zeros((1, 1))))
    if energy.ndim != 2 or energy.shape[1] < 4 or not np.isfinite(energy).all():
        return
    fractions = diagnostics.bfmi(energy)
    low = np.flatnonzero(fractions < MIN_BFMI)
    if len(low):
        yield Finding(
            f"E-BFMI is {np.nanmin(fractions):.2f} in {_chains(low).lower()} (below {MIN_BFMI}): "
            "the energy changes too slowly to reach the tails. Try a longer "
            f"warm-up{next(recentre, '')}."
        )


def _recentre(table: Table, sites: Mapping[str, Any]) -> str:
    """Advice to make a hierarchical site non-centred: the one with the fewest effective draws."""

    def rank(address: str) -> float:
        sizes = table[address]["ess_bulk"]
        return math.inf if np.isnan(sizes).all() else float(np.nanmin(sizes))

    found = [
        address
        for address, site in sites.items()
        if address in table
        and site.kind == "sample"
        and site.axes
        and site.distribution in _LOCATION_SCALE
        and address.removesuffix(BASE) not in table.keys() - {address}  # is non-centred already
    ]
    if not found:
        return ""
    best = min(found, key=rank)
    return f', and noncentered(model, "{best}") if the scale of {best} is itself unknown'


def _constants(table: Table) -> Iterator[Finding]:
    still = [row for row, v in _rows(table, "constant") if v]
    if still:
        yield _note(f"Constant, and left out of the verdict: {_listed(still)}.")


def _idle(table: Table) -> Iterator[Finding]:
    idle = {row: 1 - v for row, v in _rows(table, "active") if v < 1}
    if idle:
        parts = [f"{row} in {_percent(v)}" for row, v in idle.items()]
        yield _note(f"Idle draws, of branches not taken, are left out: {_listed(parts)}.")


# ------------------------------------------------------------------------------------------ weights


def _weights(log_weights: np.ndarray) -> Finding:
    n = log_weights.size
    w = np.exp(log_weights - log_weights.max())
    ess = w.sum() ** 2 / np.square(w).sum()
    k, limit = khat(log_weights), khat_threshold(n)
    worth = f"{n} particles are worth {ess:.{0 if ess >= 10 else 1}f} independent draws"
    if math.isnan(k):
        return Finding(f"{worth}: too few for k-hat, which needs 21. Take more.")
    if k > limit:
        return Finding(
            f"k-hat {k:.2f} is above {limit:.2f}: a few particles carry the estimates, whose "
            f"errors are larger than they look; the {worth}. Unreliable: take a proposal nearer to "
            "the posterior and with heavier tails (the guide of a fit, say), or nuts."
        )
    if ess < MIN_PARTICLE_ESS:
        return Finding(
            f"k-hat {k:.2f} is below {limit:.2f}, but the {worth}: take "
            f"num_particles={_nice(n * MIN_PARTICLE_ESS / ess)}, or a better proposal."
        )
    if math.isinf(k):
        return _note(f"The largest weights are equal, and the {worth}: they can be trusted.")
    return _note(f"k-hat {k:.2f} is below {limit:.2f} and the {worth}: the weights can be trusted.")


# ------------------------------------------------------------------------------------------- words


def label(address: str, index: tuple[int, ...]) -> str:
    """The name of one scalar of a site.

    >>> label("theta", ()), label("a.x", (0, 2))
    ('theta', 'a.x[0,2]')
    """
    return f"{address}[{','.join(map(str, index))}]" if index else address


def _rows(table: Table, column: str) -> Iterator[tuple[str, float]]:
    for address, columns in table.items():
        if column in columns:
            values = columns[column]
            for index in np.ndindex(values.shape):
                yield label(address, index), float(values[index])


def _shape(stats: Mapping[str, Any]) -> tuple[int, int]:
    for value in stats.values():
        if np.ndim(value) == 2:
            chains, draws = np.shape(value)
            return chains, draws
    return 1, 0


def _of(count: int, total: int) -> str:
    if total == 1:
        return "the only scalar"
    return f"all {total} scalars" if count == total else f"{count} of {total} scalars"


def _listed(rows: Sequence[str]) -> str:
    return ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")


def _chains(which: np.ndarray) -> str:
    names = ", ".join(str(int(c)) for c in which[:8]) + (", ..." if len(which) > 8 else "")
    return f"Chain{'s' if len(which) > 1 else ''} {names}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 0.995 else f"{100 * fraction:.4g} %"


def _rhat(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.2f}" if value > 1.1 else f"{value:.3f}"


def _nice(value: float) -> int:
    """A round number not below a value.

    >>> _nice(1000), _nice(1234.5), _nice(3)
    (1000, 1300, 3)
    """
    unit = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return int(math.ceil(value / unit) * unit)
