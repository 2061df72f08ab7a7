"""Reports of checks: comparisons of means with what they should be, as a table and a verdict."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import special
from weft.ppl.programs.printing import Printed, table


@dataclasses.dataclass(frozen=True)
class LawRow:
    """One comparison.

    Attributes:
        name: the function that was averaged.
        estimate: the mean over the runs.
        expected: the exact mean.
        error: the standard error of the difference.
        z: the difference in standard errors.
    """

    name: str
    estimate: float
    expected: float
    error: float
    z: float


@dataclasses.dataclass(frozen=True)
class LawReport(Printed):
    """The report on whether a sampler obeys a law. It prints as a table and a verdict.

    Attributes:
        law: the law, in words.
        rows: the comparisons.
        threshold: a comparison that is off by more standard errors than this is refused. It is a quantile of Student's
            t, by Bonferroni's inequality for all rows together.
        false_alarm: the probability, at most, that a correct sampler is refused.
        num_runs: the number of independent runs of the sampler.
        notes: further remarks.
    """

    law: str
    rows: tuple[LawRow, ...]
    threshold: float
    false_alarm: float
    num_runs: int
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LawRow:
        """The row with a name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(r.name for r in self.rows)}")

    @property
    def refused(self) -> tuple[LawRow, ...]:
        """The comparisons that failed, the worst first. A result that is not a number failed, too."""
        failed = [row for row in self.rows if not abs(row.z) <= self.threshold]
        return tuple(sorted(failed, key=_distance))

    @property
    def passed(self) -> bool:
        """Whether nothing was refused."""
        return not self.refused

    def __bool__(self) -> bool:
        # Else `assert check(...)` would hold whatever came out.
        return self.passed

    def require(self) -> None:
        """Raise `AssertionError`, with the table, unless the check passed."""
        if not self.passed:
            raise AssertionError(repr(self))

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        once = f"at most once in {1 / self.false_alarm:,.0f} checks"
        if self.passed:
            return (
                f"Passed: all {len(self.rows)} within {self.threshold:.2f} standard errors. A right sampler is refused "
                f"{once}; a wrong one passes if it is off by less than the errors."
            )
        worst = self.refused[0]
        return (
            f"Refused: {len(self.refused)} of {len(self.rows)} beyond {self.threshold:.2f} standard errors, most of "
            f"all {worst.name!r}, by {worst.z:.1f}. With a right sampler this happens {once}."
        )

    def __repr__(self) -> str:
        rows = self.rows if len(self.rows) <= 20 else sorted(self.rows, key=_distance)[:20]
        cells = [
            [r.name, f"{r.estimate:.5g}", f"{r.expected:.5g}", f"{r.error:.2g}", f"{r.z:+.2f}"]
            for r in rows
        ]
        lines = [
            f"{self.law}: {self.num_runs:,} runs",
            table(["", "estimate", "expected", "error", "z"], cells),
        ]
        if len(rows) < len(self.rows):
            lines.append(f"  ... {len(self.rows) - len(rows)} more, nearer to what is expected")
        return "\n".join([*lines, self.verdict, *self.notes])


def _distance(row: LawRow) -> float:
    return -math.inf if math.isnan(row.z) else -abs(row.z)


def least_error(spread: np.ndarray | None, size: float) -> np.ndarray | float:
    """The standard error of as many independent draws of the target.

    It is a lower bound for the error. If hardly any run met a value, the spread of the runs is too small, or zero.
    """
    return 0.0 if spread is None else np.sqrt(spread / size)


def compare(
    names: list[str],
    values: np.ndarray,
    expected: np.ndarray,
    least: np.ndarray | float = 0.0,
    rounding: float = 1.0,
) -> list[LawRow]:
    """Compare means of `(run, function)` with what is expected. `rounding` is the size of the log weights."""
    eps, values = np.finfo(values.dtype).eps, np.asarray(values, float)
    error = np.maximum(values.std(0, ddof=1) / math.sqrt(len(values)), least)
    # A log weight of size L is known up to some units of its last place, eps L.
    size = np.maximum(np.abs(expected), np.abs(values).mean(0))
    error = np.hypot(error, 8 * eps * rounding * size)
    return _compared(names, values.mean(0), expected, error)


def compare_pairs(names: list[str], before: np.ndarray, after: np.ndarray) -> list[LawRow]:
    """Compare means after with means before, with the error of their difference."""
    eps, n = np.finfo(before.dtype).eps, len(before)
    before, after = np.asarray(before, float), np.asarray(after, float)
    error = np.hypot(
        (after - before).std(0, ddof=1) / math.sqrt(n), 8 * eps * np.abs(before).mean(0)
    )
    return _compared(names, after.mean(0), before.mean(0), error)


def compare_flows(names: list[str], before: np.ndarray, after: np.ndarray) -> list[LawRow]:
    """Compare means of g(before) h(after) with those of h(before) g(after), for every two functions."""
    eps, n = np.finfo(before.dtype).eps, len(before)
    before, after = np.asarray(before, float), np.asarray(after, float)
    there = before.T @ after / n
    both = (before * after).T @ (before * after) / n
    squares = (before**2).T @ after**2 / n
    variance = np.maximum(squares + squares.T - 2 * both - (there - there.T) ** 2, 0)
    size = np.abs(before).T @ np.abs(after) / n
    error = np.hypot(np.sqrt(variance / n), 8 * eps * size)
    i, j = np.triu_indices(len(names), 1)
    pairs = [f"{names[a]} -> {names[b]}" for a, b in zip(i, j, strict=True)]
    return _compared(pairs, there[i, j], there[j, i], error[i, j])


def _compared(
    names: list[str], estimate: np.ndarray, expected: np.ndarray, error: np.ndarray
) -> list[LawRow]:
    difference = estimate - expected
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(difference == 0, 0.0, difference / error)
    columns = (x.tolist() for x in (estimate, expected, error, z))
    return [LawRow(*row) for row in zip(names, *columns, strict=True)]


def judged(
    law: str, rows: list[LawRow], num_runs: int, false_alarm: float, notes: Any = ()
) -> LawReport:
    """The report, with the threshold that keeps the probability of a false alarm."""
    threshold = float(special.stdtrit(num_runs - 1, 1 - false_alarm / (2 * len(rows))))
    return LawReport(law, tuple(rows), threshold, false_alarm, num_runs, tuple(notes))
