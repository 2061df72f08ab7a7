"""The table of a result, and the verdict under it.

A `Summary` has one row for each scalar and one column for each statistic. It says in words whether the numbers can be
used, and what to do if not. It prints on one screen. `summarise_draws` and `summarise_particles` make it from arrays.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from weft.ppl.stage.addresses import unknown
from weft.ppl.stage.errors import AddressError

from . import diagnostics
from .diagnosis import Finding, judge_draws, judge_particles, label
from .weights import weighted_describe

_SCREEN = 24  # rows a table prints before it leaves some out


class Summary:
    """Statistics of a posterior, one row for each scalar.

    Read a row by its label, a whole site by its address, and a column by its name.

    Attributes:
        columns: the names of the columns, in order.
        rows: the labels of the rows: ``"mu"``, ``"theta[3]"``, ``"x[0,2]"``.
        verdict: what the diagnostics say, in sentences.
        healthy: False if the diagnostics found anything that makes the numbers unreliable.
        findings: the parts of the verdict.

    Examples:
        >>> import jax
        >>> from weft.inference import Draws
        >>> mu = jax.random.normal(jax.random.key(0), (4, 500))
        >>> theta = jax.random.normal(jax.random.key(1), (4, 500, 3))
        >>> draws = Draws(choices={"mu": mu, "theta": theta}, stats={})
        >>> summary = draws.summary()
        >>> summary.rows, summary.healthy
        (('mu', 'theta[0]', 'theta[1]', 'theta[2]'), True)
        >>> sorted(summary["mu"])[:3], summary["theta"]["sd"].shape
        (['5%', '50%', '95%'], (3,))
    """

    def __init__(
        self,
        title: str,
        table: Mapping[str, Mapping[str, np.ndarray]],
        findings: Sequence[Finding],
        notes: Sequence[str] = (),
        *,
        hidden: Sequence[str] = (),
        all: bool = False,
    ) -> None:
        """Take a title, values by address and column, findings, remarks, and the names of hidden columns."""
        self.title = title
        self._table = {address: dict(columns) for address, columns in table.items()}
        self._all = all
        first: Mapping[str, Any] = next(iter(self._table.values()), {})
        self.columns = tuple(name for name in first if name not in hidden)
        self._where = {}
        for address, columns in self._table.items():
            shape = next(iter(columns.values())).shape
            for index in np.ndindex(shape):
                self._where[label(address, index)] = (address, index)
        self.rows = tuple(self._where)
        self.findings = tuple(findings)
        self.healthy = not any(f.bad for f in findings)
        self.notes = tuple(notes)
        self.verdict = " ".join([*(f.text for f in findings), *notes])

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The columns of a row, ``summary["theta[3]"]``, or of a whole site in its shape."""
        if name in self._table:
            values = self._table[name]
            return {c: values[c] if values[c].ndim else float(values[c]) for c in self.columns}
        if name not in self._where:
            raise AddressError(unknown(name, [*self._table, *self._where], " in this summary"))
        address, index = self._where[name]
        return {c: float(self._table[address][c][index]) for c in self.columns}

    def __contains__(self, name: object) -> bool:
        return name in self._table or name in self._where

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """A column for all rows, in the order of `rows`."""
        if name not in self.columns:
            raise AddressError(unknown(name, self.columns, " among the columns"))
        if not self._table:
            return np.zeros(0)
        return np.concatenate([np.ravel(values[name]) for values in self._table.values()])

    def to_dict(self) -> dict[str, dict[str, float]]:
        """The table as ``{row: {column: value}}``."""
        return {row: self[row] for row in self.rows}

    def to_dataframe(self) -> Any:
        """The table as a pandas DataFrame with rows by label."""
        import pandas

        return pandas.DataFrame.from_dict(
            self.to_dict(), orient="index", columns=list(self.columns)
        )

    # ------------------------------------------------------------------------------------- printing

    def _lines(self) -> Iterator[list[str] | str]:
        """The rows as lists of cells. A string stands for a remark in place of rows."""
        sizes = {a: max(1, next(iter(c.values())).size) for a, c in self._table.items()}
        sizes = {a: n for a, n in sizes.items() if next(iter(self._table[a].values())).size}
        shown = fair_shares(sizes, len(self.rows) if self._all else _SCREEN)
        for address, count in shown.items():
            columns, size = self._table[address], sizes[address]
            indices = np.ndindex(next(iter(columns.values())).shape)
            for _, index in zip(range(count), indices, strict=False):
                cells = {c: float(columns[c][index]) for c in self.columns}
                yield [label(address, index), *format_row(cells)]
            if count < size:
                yield f"... {size - count} more of {address}"
        left = [a for a in sizes if a not in shown]
        if left:
            names = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
            yield f"... {sum(sizes[a] for a in left)} more rows: {names}"
        if sum(shown.values()) < len(self.rows):
            yield "... .summary(all=True) shows every row"

    def __repr__(self) -> str:
        lines = list(self._lines())
        cells = [["", *self.columns], *(line for line in lines if not isinstance(line, str))]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

        def aligned(row: list[str]) -> str:
            first = row[0].ljust(widths[0])
            return "  ".join(
                [first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            )

        text = [self.title, "", aligned(cells[0])]
        text += [line if isinstance(line, str) else aligned(line) for line in lines]
        text += ["", *self._sentences()]
        return "\n".join(line.rstrip() for line in text)

    def _sentences(self) -> list[str]:
        texts = [*(f.text for f in self.findings), *self.notes]
        return [line for text in texts for line in textwrap.wrap(text, 100, subsequent_indent="  ")]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in ("", *self.columns))
        body = []
        for line in self._lines():
            if isinstance(line, str):
                span = f'colspan="{len(self.columns) + 1}" style="text-align:left"'
                cells = f"<td {span}>{html.escape(line)}</td>"
            else:
                cells = f'<th style="text-align:left">{html.escape(line[0])}</th>'
                cells += "".join(f"<td>{html.escape(c)}</td>" for c in line[1:])
            body.append(f"<tr>{cells}</tr>")
        verdict = "".join(
            f"<p>{'<b>' if f.bad else ''}{html.escape(f.text)}{'</b>' if f.bad else ''}</p>"
            for f in self.findings
        )
        verdict += "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<div><p>{html.escape(self.title)}</p><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table>{verdict}</div>"
        )


def summarise_draws(
    title: str,
    choices: Mapping[str, Any],
    derived: Mapping[str, Any],
    active: Mapping[str, Any],
    stats: Mapping[str, Any],
    *,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    sites: Mapping[str, Any] | None = None,
    fixed_steps: bool = False,
    all: bool = False,
) -> Summary:
    """The table and the verdict of Markov chains.

    Args:
        title: the first line.
        choices: values of shape (chain, draw, ...), by dotted address.
        derived: the same for derived values.
        active: masks of the draws that count, by dotted address.
        stats: statistics of the sampler, see `Draws`.
        quantiles: the probabilities of the columns of quantiles.
        sites: the table of sites, for advice that names one.
        fixed_steps: whether no warm-up tuned the step size, for advice.
        all: whether to print every row.
    """
    numbers, others = _numeric({**choices, **derived})
    table = {}
    for address, values in numbers.items():
        mask = active.get(address) if address in choices else None
        table[address] = diagnostics.describe(values, mask, quantiles)
    kept = {a: numbers[a] for a in choices if a in numbers}
    findings = judge_draws(table, kept, active, stats, sites or {}, fixed_steps)
    return Summary(title, table, findings, _not_shown(others), hidden=_internal(table), all=all)


def summarise_particles(
    title: str,
    choices: Mapping[str, Any],
    derived: Mapping[str, Any],
    active: Mapping[str, Any],
    log_weights: Any,
    *,
    exact: bool = False,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    all: bool = False,
) -> Summary:
    """The table and the verdict of weighted particles.

    The arguments are those of `summarise_draws`. Values lead with the particle. `exact` says that they are all values
    of an enumeration.
    """
    numbers, others = _numeric({**choices, **derived})
    lw = np.asarray(log_weights, dtype=float)
    usable = not np.isnan(lw).any() and lw.size and np.isfinite(lw.max())
    weights = np.exp(lw - lw.max()) if usable else np.full(lw.shape, np.nan)
    table = {}
    for address, values in numbers.items():
        mask = active.get(address) if address in choices else None
        table[address] = weighted_describe(values, weights, mask, quantiles)
        if exact:
            table[address].pop("mcse")
    findings = judge_particles(table, lw, exact)
    return Summary(title, table, findings, _not_shown(others), hidden=_internal(table), all=all)


def _internal(table: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[str, ...]:
    """The columns that are not shown: those that only the verdict reads, and "active" if every draw counts."""
    idle = any(np.any(columns["active"] != 1) for columns in table.values())
    return ("not_finite", "constant") if idle else ("not_finite", "constant", "active")


def _numeric(values: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The values that have a mean, and the addresses of those that have none (complex numbers, random keys)."""
    numbers, others = {}, []
    for address, value in values.items():
        dtype = getattr(value, "dtype", None) or np.asarray(value).dtype
        real = not (str(dtype).startswith("key<") or np.dtype(dtype).kind in "cOSU")
        if real:
            numbers[address] = np.asarray(value)
        else:
            others.append(address)
    return numbers, others


def _not_shown(addresses: Sequence[str]) -> list[str]:
    if not addresses:
        return []
    return [f"Without a row, since they are not real numbers: {', '.join(addresses)}."]


def fair_shares(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """The number of rows to print of each site.

    Small sites are printed whole, and large ones share the rest equally. A site that is cut costs one more line. Sites
    beyond the budget have no entry.

    >>> fair_shares({"mu": 1, "theta": 100, "w": 3}, 10)
    {'mu': 1, 'theta': 5, 'w': 3}
    """
    if sum(sizes.values()) <= budget:
        return dict(sizes)
    chosen = list(sizes)[
        : max(1, budget // 2)
    ]  # two lines a site at least: a row, and that there are more
    shares: dict[str, int] = {}
    left = budget
    for rank, address in enumerate(sorted(chosen, key=lambda a: sizes[a])):
        part = left // (len(chosen) - rank)
        shares[address] = sizes[address] if sizes[address] <= part else max(1, part - 1)
        left -= min(sizes[address], part)
    return {address: shares[address] for address in chosen}


def format_row(cells: Mapping[str, float]) -> list[str]:
    """Cells as text. Values have three digits of their standard deviation, and sizes are integers."""
    places = 3
    spread = cells.get("sd", math.nan)
    if math.isfinite(spread) and spread > 0:
        places = 2 - math.floor(math.log10(spread))
    return [_cell(name, value, places) for name, value in cells.items()]


def _cell(name: str, value: float, places: int) -> str:
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if name.startswith("ess"):
        return f"{value:.0f}"
    if name == "r_hat":
        return f"{value:.3f}" if value < 100 else f"{value:.0f}"
    if name == "active":
        return f"{100 * value:.3g}%"
    if name == "mcse":
        places = 1 - math.floor(math.log10(value)) if value > 0 else 0
        return f"{value:.2g}" if places > 6 else f"{value:.{max(0, places)}f}"
    if places > 6 or abs(value) >= 1e7:
        return f"{value:.3g}" if value else "0"
    places = max(0, places)
    return f"{round(value, places) + 0.0:.{places}f}"  # no minus before a zero
