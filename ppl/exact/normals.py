r"""Normal choices in a program: their priors, the evidence on them, and their elimination one by one.

A normal choice that is summed out has a ``Prior``: a mean that is affine in other such choices, and a covariance.
Density terms that depend on normal choices are ``Evidence``. Choices are eliminated from the leaves to the roots: with
$x \mid w \sim N(m + B w, Q)$ the evidence that contains $x$ becomes evidence on $w$ (``gaussian``). Copies along a
plate are eliminated together, each with its own rows. Means, covariances and rows may be tables over other choices.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import gaussian
from .factors import Factor, Scale, roots_of, same_scale
from .gaussian import Block, Copies, Quadratic, compress, times, update
from .semirings import Semiring, best
from .small import SMALL, diagonal, inverse_lower, matmul
from .tables import (
    Entangled,
    Limit,
    Plate,
    Slope,
    Table,
    Variable,
    affine,
    apply,
    at_zero,
    is_table,
    slopes_of,
    still,
)

NOISE = Variable("~noise", 1, dimension=1)
"""Stands for the noise of a draw: where it is one, the mean of all choices is a joint draw of them (``perturbed``)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
    """The law of a normal choice given others.

    Attributes:
        mean: its plates, then the numbers of one copy. Affine in other normal choices.
        root: its plates, then a square matrix: a root of the covariance.
        covariance: the covariance itself, if no root of it is known.
        scale: the number of times that the choice counts.
    """

    variable: Variable
    mean: Any
    root: Any
    covariance: Any = None
    scale: Scale = ()

    def spread(self, limit: Limit) -> Any:
        """The covariance."""
        if self.root is None:
            return self.covariance
        return apply(lambda t: t @ jnp.swapaxes(t, -1, -2), limit, self.root)

    @property
    def parents(self) -> list[Variable]:
        return [v for v in slopes_of(self.mean) if v is not NOISE]

    def parts(self) -> list[tuple[Any, int]]:
        """The values of the prior, and how many axes each has after the plates."""
        return [(self.mean, 1), (self.root, 2), (self.covariance, 2)]

    @property
    def others(self) -> dict[Variable, tuple[int, ...]]:
        """The choices that are not normal on which it depends, with the places of their plates."""
        return others_in(self.parts())

    def with_parts(self, parts: Sequence[Any]) -> Prior:
        mean, root, covariance = parts
        return dataclasses.replace(self, mean=mean, root=root, covariance=covariance)


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    r"""A density term that depends on normal choices: $(c + p^\top e - e^\top \Gamma e / 2) / \sigma^2$.

    Attributes:
        rows: $e$: plates, then rows. Affine in normal choices.
        form: $\Gamma$, $p$ and $c$, as values with the same plates.
        plates: the plates.
        unit: a number $\sigma$; one if None. So rows of data do not depend on the scale of their noise, and sums over
            them are the same for any scale.
        constant: with a unit, what is added to the term, with the same plates.
        scale: the number of times that the sum over its choices counts.
        sites: the sites that it comes from.
        probe: whether it is zero and serves for its derivative only. Without a precision it is linear.
    """

    rows: Any
    form: Quadratic
    plates: tuple[Plate, ...]
    scale: Scale = ()
    sites: tuple[str, ...] = ()
    probe: bool = False
    unit: Any = None
    constant: Any = None

    def without_unit(self, limit: Limit) -> Evidence:
        """The same with rows in units of their noise."""
        if self.unit is None:
            return self
        rows, form = _in_units(self.rows, self.form, self.unit, self.constant, limit)
        return dataclasses.replace(self, rows=rows, form=form, unit=None, constant=None)

    @property
    def variables(self) -> list[Variable]:
        return [v for v in slopes_of(self.rows) if v is not NOISE]

    def parts(self) -> list[tuple[Any, int]]:
        """The values of the evidence, and how many axes each has after the plates."""
        form = self.form
        return [(self.rows, 1), (form.precision, 2), (form.linear, 1), (form.constant, 0)]

    @property
    def others(self) -> dict[Variable, tuple[int, ...]]:
        """The choices that are not normal on which it depends, with the places of their plates."""
        return others_in([*self.parts(), (self.unit, 0), (self.constant, 0)])

    def with_parts(self, parts: Sequence[Any]) -> Evidence:
        return dataclasses.replace(self, rows=parts[0], form=Quadratic(*parts[1:]))

    def _at(self, form: Quadratic, rows: Any) -> Any:
        if self.probe and form.precision is None:
            return form.constant + jnp.sum(form.linear * rows, -1)
        return form.at(rows)

    def factor(self, limit: Limit) -> Factor:
        """The same as a factor, once it depends on no normal choice."""
        offset = at_zero(self.rows)
        value = apply(self._at, limit, self.form, offset)
        if NOISE in slopes_of(self.rows):
            # The value is that without noise, the derivative that with noise.
            noise = slopes_of(self.rows)[NOISE].value

            def drawn(form: Quadratic, offset: Any, noise: Any) -> Any:
                found = self._at(form, offset + noise[..., 0])
                return found - jax.lax.stop_gradient(found)

            value = still(value)
            value = apply(jnp.add, limit, value, apply(drawn, limit, self.form, offset, noise))
        table = value if is_table(value) else Table(value, {})
        for v, places in table.axes.items():
            for place, plate in zip(places, v.plates, strict=True):
                plate.merge(self.plates[place])
        return Factor(table.array, tuple(table.axes), self.plates, self.scale, self.sites)


def _in_units(rows: Any, form: Quadratic, unit: Any, constant: Any, limit: Limit) -> Any:
    def scaled(form: Quadratic, unit: Any, constant: Any) -> Quadratic:
        linear = None if form.linear is None else form.linear / unit
        return Quadratic(form.precision, linear, form.constant / unit**2 + constant)

    return apply(jnp.divide, limit, rows, unit), apply(scaled, limit, form, unit, constant)


def others_in(parts: Iterable[tuple[Any, int]]) -> dict[Variable, tuple[int, ...]]:
    """The choices that are not normal on which values, or their slopes, depend, with the places of their plates."""
    found: dict[Variable, tuple[int, ...]] = {}
    for x, _ in parts:
        for y in (x, *(s.value for s in slopes_of(x).values())):
            if is_table(y):
                found.update(y.axes)
    return found


# --- layout -----------------------------------------------------------------------------------------------------------


def unit_slope(shape: Sequence[int], places: Sequence[int], dtype: Any) -> Slope:
    """The slope of a choice by itself, as a value of some shape of which some axes are its plates."""
    inner = [n for i, n in enumerate(shape) if i not in places]
    outer = [n if i in places else 1 for i, n in enumerate(shape)]
    eye = np.eye(math.prod(inner), dtype=dtype)
    one = [1 if i in places else n for i, n in enumerate(shape)]
    eye = eye.reshape(*one, len(eye))
    full = np.broadcast_to(
        eye, (*(max(a, b) for a, b in zip(one, outer, strict=True)), eye.shape[-1])
    )
    return Slope(full, tuple(places), True, True)


def without(x: Any, gone: Iterable[Variable]) -> Any:
    """A value with the slopes by some choices left out."""
    gone = set(gone)
    rest = {v: s for v, s in slopes_of(x).items() if v not in gone}
    return affine(at_zero(x), rest, x.curved if is_table(x) else None)


def _arranged(
    x: Any, trailing: int, plates: Sequence[Plate], order: Sequence[Plate], limit: Limit
) -> Any:
    """A value with axes for some plates, in order, then one for all other plates together, then the trailing ones."""
    own = [p.root() for p in plates]
    first = [own.index(p) for p in order]
    rest = [i for i in range(len(own)) if i not in first]

    def arrange(x: Any) -> Any:
        n = len(own)
        x = jnp.transpose(x, [*first, *rest, *range(n, n + trailing)])
        return x.reshape(*(p.size for p in order), -1 if x.size else 0, *x.shape[n:])

    return apply(arrange, limit, x)


def _blocks(
    mine: Sequence[Evidence], order: Sequence[Plate], limit: Limit
) -> list[tuple[Any, Quadratic]]:
    """Rows and forms with axes for some plates, one for all others, and those of the rows."""
    found = []
    for f in mine:
        rows, *form = (
            None if x is None else _arranged(x, n, f.plates, order, limit) for x, n in f.parts()
        )
        if form[0] is None and form[1] is None:  # the rows of all blocks are independent
            rows = apply(lambda x: x.reshape(*x.shape[:-2], 1, -1), limit, rows)
            form[2] = apply(lambda x: jnp.sum(x, -1, keepdims=True), limit, form[2])
        found.append((rows, Quadratic(*form)))
    return found


def read_by(f: Evidence, v: Variable, limit: Limit) -> list[Variable]:
    """The choice and its picks, as far as evidence depends on them."""
    picks = limit.indices.picks
    return [u for u in slopes_of(f.rows) if u is v or (u in picks and picks[u].variable is v)]


def gathered(
    mine: Sequence[Evidence], plates: Sequence[Plate], first: Variable | None, limit: Limit
) -> Evidence:
    """Evidence of several terms as that of one, with some plates.

    There are no more rows than numbers of the choices on which they depend.
    """
    order = [p.root() for p in plates]
    found = [_summed(f, order, first, limit) for f in mine]
    if len(found) == 1:
        return found[0]
    joined = _joined([f.without_unit(limit) for f in found], limit)
    variables = _ordered([joined.rows], first)
    if joined.rows.shape[-1] > sum(v.dimension or 0 for v in variables):
        rows, form = apply(
            lambda *x: jax.tree.map(lambda x: jnp.expand_dims(x, len(order)), x),
            limit,
            joined.rows,
            joined.form,
        )
        rows, form = _compressed(rows, form, variables, _copies(len(order)), limit)
        joined = dataclasses.replace(joined, rows=rows, form=form)
    return joined


def _ordered(values: Sequence[Any], first: Variable | None) -> list[Variable]:
    """The choices in some values, one of them first."""
    others = {u: None for x in values for u in slopes_of(x) if u is not first}
    return [*([] if first is None else [first]), *others]


def _summed(f: Evidence, order: Sequence[Plate], first: Variable | None, limit: Limit) -> Evidence:
    """Evidence with axes for some plates only. There are no more rows than numbers of its choices."""
    d = sum(v.dimension or 0 for v in f.variables)
    if first is not None:
        limit.spend([first.address], 2 * math.prod(f.rows.shape) * d * (d + 2))
    rows, form, copies, plates = _by_copy(f, order, first, limit)
    at, variables = len(plates), _ordered([rows], first)
    many = math.prod(rows.shape[at:]) > sum(v.dimension or 0 for v in variables)
    if plates != [*order] or rows.shape[at] > 1 or many:
        rows, form = _compressed(rows, form, variables, copies, limit)
    else:
        rows, form = _one_block(rows, form, at, limit)
    constant = None
    if f.unit is not None:
        constant = apply(copies.total, limit, _arranged(f.constant, 0, f.plates, plates, limit))
    plates = tuple(order)
    return dataclasses.replace(f, rows=rows, form=form, plates=plates, constant=constant)


def _one_block(rows: Any, form: Quadratic, at: int, limit: Limit) -> tuple[Any, Quadratic]:
    """The same without the axis of blocks, if there is one block."""
    return apply(lambda *xs: jax.tree.map(lambda x: jnp.squeeze(x, at), xs), limit, rows, form)


def _is_wide(f: Evidence, v: Variable, limit: Limit) -> bool:
    """Whether evidence, summed by copy of a choice, would have many rows for each: as many as other choices have
    numbers. So it is where the copies of one are joined, as those of crossed groups are.
    """
    read, d = read_by(f, v, limit), v.dimension or 0
    others = [u for u in f.variables if u not in read]
    many = sum(u.dimension or 0 for u in others) > max(SMALL, 2 * d)
    plain = f.form.precision is None and f.form.linear is None and not f.probe
    return many and plain and len(read) == 1 and not any(u.plates for u in others)


class Freed(NamedTuple):
    """Rows free of a choice but for their derivative, with an axis of blocks before the rows.

    Attributes:
        evidence: what they are evidence of; its rows and form are these.
        slopes: their slopes by the choice: zero, with a derivative.
        copies: to which copies of the choice blocks belong.
    """

    evidence: Evidence
    slopes: Any
    copies: Copies


def _parted(f: Evidence, v: Variable, limit: Limit) -> tuple[Evidence, Freed]:
    """Evidence as that of a few rows for each copy of a choice, and that of rows free of it (``gaussian.part``)."""
    order = [p.root() for p in v.plates]
    rows, form, copies, plates = _by_copy(f, order, v, limit)
    variables = _ordered([rows], v)
    sizes = [u.dimension or 0 for u in variables]
    limit.spend([v.address], 10 * math.prod(rows.shape) * sizes[0] * sum(sizes))

    def part(offset: Any, slopes: Any, form: Quadratic) -> Any:
        sums, free, own = gaussian.part(_block(offset, slopes, sizes, form), sizes[0], copies)
        free = free._replace(rows=_columns(free.rows, sizes[1:]))
        return sums._replace(rows=_columns(sums.rows, sizes)), free, own

    slopes = [slopes_of(rows)[u].value for u in variables]
    few, rest, own = apply(part, limit, at_zero(rows), slopes, form)
    places = dict.fromkeys(variables[1:], ()) | {v: tuple(range(len(order)))}
    slopes = {u: Slope(a, places[u]) for u, a in zip(variables, few.rows, strict=True)}
    rows, form, constant = affine(few.offset, slopes), few.evidence, few.evidence.constant
    sums = dataclasses.replace(f, rows=rows, form=form, plates=tuple(order), constant=constant)
    slopes = {u: Slope(a, ()) for u, a in zip(variables[1:], rest.rows, strict=True)}
    rows, form, constant = affine(rest.offset, slopes), rest.evidence, f.constant
    if f.unit is not None:
        constant = _arranged(constant, 0, f.plates, plates, limit)
        constant = apply(lambda x: jnp.sum(x, -1), limit, constant)
    free = dataclasses.replace(f, rows=rows, form=form, plates=tuple(plates), constant=constant)
    return sums, Freed(free, own, copies)


def _left_free(freed: Freed, mean: Any, covariance: Any, limit: Limit) -> Evidence:
    """Evidence on rows free of a choice, once the choice is integrated out (``gaussian.bend``)."""
    f, at = freed.evidence, len(freed.evidence.plates)
    variables = list(dict.fromkeys([*slopes_of(f.rows), *slopes_of(mean)]))
    sizes = [u.dimension or 0 for u in variables]

    def columns(x: Any) -> list[Any]:
        slopes = slopes_of(x)
        return [at_zero(x), *(slopes[u].value if u in slopes else None for u in variables)]

    def bent(rows: Any, form: Any, own: Any, mean: Any, covariance: Any, unit: Any) -> Any:
        rows, mean = (_side_by_side(x, [1, *sizes]) for x in (rows, mean))
        covariance = covariance if unit is None else covariance / unit**2
        rows, more = gaussian.bend(rows, own, mean, covariance, freed.copies)
        if unit is not None:
            more = more * unit**2
        form = form._replace(constant=form.constant + more)
        return jax.tree.map(lambda x: jnp.squeeze(x, at), (_columns(rows, [1, *sizes]), form))

    found, form = apply(
        bent, limit, columns(f.rows), f.form, freed.slopes, columns(mean), covariance, f.unit
    )
    slopes = {u: Slope(a, ()) for u, a in zip(variables, found[1:], strict=True)}
    offset = apply(lambda x: x[..., 0], limit, found[0])
    return dataclasses.replace(f, rows=affine(offset, slopes), form=form)


def _side_by_side(columns: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The value and the slopes of an affine function as one matrix; zero where there is none."""
    first, *rest = columns
    wide = [
        jnp.zeros((*first.shape, n), first.dtype)
        if x is None
        else jnp.broadcast_to(x, (*first.shape, n))
        for x, n in zip(rest, sizes[1:], strict=True)
    ]
    return jnp.concatenate([first[..., None], *wide], -1)


def summed(
    evidence: Sequence[Evidence],
    priors: Mapping[Variable, Prior],
    wanted: Iterable[Variable],
    limit: Limit,
) -> list[Evidence]:
    """The evidence; summed over its rows where it is on choices that can be eliminated now."""
    found = list(evidence)
    for v in wanted:
        if waits(v, priors, found, limit) is None:
            order = [p.root() for p in v.plates]
            found = [
                f
                if f.probe or not read_by(f, v, limit) or _is_wide(f, v, limit)
                else _summed(f, order, v, limit)
                for f in found
            ]
    return found


def _joined(found: Sequence[Evidence], limit: Limit) -> Evidence:
    """All rows, one block after another."""

    def join(rows: Any, forms: Any) -> Any:
        constant = sum((f.constant for f in forms[1:]), forms[0].constant)
        joined = jnp.concatenate(rows, -1)
        if all(f.precision is None and f.linear is None for f in forms):
            return joined, Quadratic(None, None, constant)
        full = [f.full(x) for f, x in zip(forms, rows, strict=True)]
        linear = jnp.concatenate([p for _, p in full], -1)
        return joined, Quadratic(_diagonal([g for g, _ in full]), linear, constant)

    rows, form = apply(join, limit, [f.rows for f in found], [f.form for f in found])
    return dataclasses.replace(found[0], rows=rows, form=form)


def _diagonal(blocks: Sequence[Any]) -> Any:
    """A block diagonal matrix."""
    n = sum(b.shape[-1] for b in blocks)
    rows, at = [], 0
    for b in blocks:
        k = b.shape[-1]
        pad = [(0, 0)] * (b.ndim - 1) + [(at, n - at - k)]
        rows.append(jnp.pad(b, pad))
        at += k
    return jnp.concatenate(rows, -2)


def _compressed(
    rows: Any, form: Quadratic, variables: Sequence[Variable], copies: Copies, limit: Limit
) -> tuple[Any, Quadratic]:
    """As many rows as the choices have numbers."""
    sizes = [v.dimension or 0 for v in variables]

    def together(offset: Any, slopes: Any, form: Quadratic) -> Any:
        way, centre, found = compress([(_block(offset, slopes, sizes, form), copies)])
        return -times(way, centre), _columns(way, sizes), found

    own = slopes_of(rows)
    slopes = [own[v].value for v in variables]
    offset, ways, found = apply(together, limit, at_zero(rows), slopes, form)
    new = {v: Slope(w, own[v].places) for v, w in zip(variables, ways, strict=True)}
    return affine(offset, new), found


def _block(offset: Any, slopes: Any, sizes: Sequence[int], form: Quadratic) -> Block:
    slopes = [jnp.broadcast_to(s, (*offset.shape, d)) for s, d in zip(slopes, sizes, strict=True)]
    return Block(jnp.concatenate(slopes, -1), offset, form)


def _columns(x: Any, sizes: Sequence[int]) -> list[Any]:
    """The columns of a matrix that belong to each choice."""
    ends = np.cumsum([0, *sizes])
    return [x[..., a:b] for a, b in itertools.pairwise(ends)]


def _copies(at: int) -> Copies:
    """Blocks of rows that stand along an axis."""
    return Copies(lambda x: jnp.expand_dims(x, at), lambda x: jnp.sum(x, at))


def _by_copy(
    f: Evidence, order: Sequence[Plate], first: Variable | None, limit: Limit
) -> tuple[Any, Quadratic, Copies, list[Plate]]:
    """Rows and forms of evidence, with an axis of blocks before the rows; to which copies of a choice blocks belong;
    and the plates before that axis. In place of a pick the rows depend on the choice that it reads.
    """
    if first is None or (read := read_by(f, first, limit)[0]) is first:
        ((rows, form),) = _blocks([f], order, limit)
        return rows, form, _copies(len(order)), [*order]
    pick = limit.indices.picks[read]
    others = [p for i, p in enumerate(order) if i != pick.along]
    of_index = [p.root() for p in read.plates[: len(read.plates) - len(others)]]
    ((rows, form),) = _blocks([f], [*of_index, *others], limit)
    slopes = {(first if u is read else u): s for u, s in slopes_of(rows).items()}
    copies = _copies_by_index(pick, len(of_index), order)
    return affine(at_zero(rows), slopes), form, copies, [*of_index, *others]


def _copies_by_index(pick: Any, num_rows: int, order: Sequence[Plate]) -> Copies:
    """How rows belong to the copies of a choice, by an index."""
    at, along = num_rows + len(order) - 1, pick.along

    def spread(x: Any) -> Any:
        return jnp.expand_dims(jnp.moveaxis(x, along, 0)[pick.index], at)

    def total(x: Any) -> Any:
        x = jnp.sum(x, at)
        x = x.reshape(-1, *x.shape[num_rows:])
        return jnp.moveaxis(
            jax.ops.segment_sum(x, pick.index.reshape(-1), order[along].size), 0, along
        )

    return Copies(spread, total)


# --- elimination ------------------------------------------------------------------------------------------------------


def eliminate(
    prior: Prior, mine: Sequence[Evidence], semiring: Semiring, limit: Limit
) -> tuple[list[Evidence], Any]:
    """The evidence on its parents, once a choice is integrated out, and the mean of the choice given its parents.

    ``mine`` is all evidence that contains it.
    """
    v, data = prior.variable, [f for f in mine if not f.probe]
    probes = [f for f in mine if f.probe]
    if not data:
        spread = prior.spread(limit) if probes else None
        return [_probe_left(f, prior, prior.mean, spread, limit) for f in probes], prior.mean
    others = {*prior.parents, *(u for f in data for u in f.variables)} - {v}
    others -= {u for f in data for u in read_by(f, v, limit)}
    wide = [] if any(u.plates for u in others) else [f for f in data if _is_wide(f, v, limit)]
    parts = [_parted(f, v, limit) for f in wide]
    data = [*(f for f in data if f not in wide), *(sums for sums, _ in parts)]
    together = gathered(data, v.plates, v, limit).without_unit(limit)
    limit.spend([v.address], _flops(prior, together))
    alone = not slopes_of(prior.mean) and slopes_of(together.rows).keys() == {v}
    alone = alone and together.rows.shape[-1] > 0  # a table of no data has no rows
    integrate = _settled if alone else _turned
    integrate = _without_root if prior.root is None else integrate
    found, new, mean = integrate(together, prior, limit)
    left = found.evidence
    if (
        semiring is not best
    ):  # else the normalising constant of the prior is counted where it is made
        constant = apply(lambda c, log_det: c - log_det / 2, limit, left.constant, found.log_det)
        left = left._replace(constant=constant)
    scale = same_scale([prior.scale, *(f.scale for f in data)], [v.address])
    sites = tuple(dict.fromkeys(s for f in data for s in f.sites))
    evidence = Evidence(new, left, tuple(p.root() for p in v.plates), scale, sites)
    probed = [_probe_left(f, prior, mean, found.covariance, limit) for f in probes]
    freed = [_left_free(f, mean, found.covariance, limit) for _, f in parts]
    return [evidence, *freed, *probed], mean


def _turned(data: Evidence, prior: Prior, limit: Limit) -> Any:
    r"""Integrate over the noise $u$ of a choice $v = m + T u$, from where the choice is zero.

    There $u$ is $u_0 = -T^{-1} m$, as a constant. So the rows stay as small as they are, and the evidence does not
    depend on the inverse of $T$: where $T$ is nearly singular, its derivatives are large and cancel.
    """
    rows, form, root = data.rows, data.form, prior.root
    slope, others = slopes_of(rows)[prior.variable].value, without(rows, [prior.variable])
    away = apply(lambda t, m: -times(inverse_lower(t), m), limit, root, prior.mean)
    start = still(at_zero(away))

    def placed(rows: Any, slope: Any, mean: Any, zero: Any, root: Any, start: Any) -> Any:
        moved = mean - zero + times(root - jax.lax.stop_gradient(root), start)
        return jnp.concatenate([rows + times(slope, moved), start], -1)

    zero = still(at_zero(prior.mean))
    stacked = apply(placed, limit, others, slope, prior.mean, zero, root, start)

    def eliminated(form: Quadratic, slope: Any, root: Any) -> Any:
        precision, linear = form.precision, form.linear
        d, pad = root.shape[-1], [(0, 0)] * (root.ndim - 2)
        if precision is not None:
            n = precision.shape[-1]
            own = jnp.diag((jnp.arange(n + d) >= n).astype(root.dtype))
            precision = jnp.pad(precision, [*pad, (0, d), (0, d)]) + own
        if linear is not None:
            linear = jnp.pad(linear, [*pad, (0, d)])
        form = Quadratic(precision, linear, form.constant)
        eye = jnp.broadcast_to(jnp.eye(d, dtype=root.dtype), root.shape)
        found = gaussian.eliminate(form, jnp.concatenate([slope @ root, eye], -2))
        return found._replace(covariance=gaussian.between(root, found.covariance))

    found = apply(eliminated, limit, form, slope, root)
    new = apply(times, limit, found.turn, stacked)

    def mean_of(root: Any, gain: Any, shift: Any, rows: Any, away: Any) -> Any:
        return times(root, times(gain, jnp.concatenate([rows, away], -1)) + shift)

    mean = apply(mean_of, limit, root, found.gain, found.shift, others, away)
    return found, new, mean


def _settled(data: Evidence, prior: Prior, limit: Limit) -> Any:
    """Integrate over the noise of a choice that has no parents, and whose data depend on no other normal choice."""
    slope, offset = slopes_of(data.rows)[prior.variable].value, at_zero(data.rows)

    def settled(form: Any, slope: Any, offset: Any, root: Any, mean: Any) -> Any:
        found = gaussian.settle(form, slope @ root, offset + times(slope, mean))
        covariance = gaussian.between(root, found.covariance)
        return found._replace(covariance=covariance), mean + times(root, found.shift)

    found, mean = apply(settled, limit, data.form, slope, offset, prior.root, prior.mean)
    rows = jnp.zeros((*(p.size for p in prior.variable.plates), 0), offset.dtype)
    return found, rows, mean


def _without_root(data: Evidence, prior: Prior, limit: Limit) -> Any:
    rows, form = data.rows, data.form
    slope = slopes_of(rows)[prior.variable].value
    at_mean = apply(
        lambda r, a, m: r + times(a, m), limit, without(rows, [prior.variable]), slope, prior.mean
    )
    found = apply(gaussian.integrate, limit, form, slope, prior.covariance)
    new = apply(times, limit, found.turn, at_mean)
    mean = apply(
        lambda m, g, r, s: m + times(g, r) + s, limit, prior.mean, found.gain, at_mean, found.shift
    )
    return found, new, mean


# --- origins ----------------------------------------------------------------------------------------------------------


def origins(
    priors: Mapping[Variable, Prior],
    evidence: Sequence[Evidence],
    wanted: Iterable[Variable],
    semiring: Semiring,
    limit: Limit,
) -> dict[Variable, Any]:
    """The posterior means of some choices, as constants; of those that can be eliminated."""
    left = [_still(f) for f in evidence if not f.probe]
    rest = {v: _still(f) for v, f in priors.items()}
    wanted, means = set(wanted), []
    while v := next_of(wanted, rest, left, limit):
        wanted.discard(v)
        mine = [f for f in left if read_by(f, v, limit)]
        left = [f for f in left if f not in mine]
        found, mean = eliminate(rest.pop(v), mine, semiring, limit)
        left += found
        means.append((v, mean))
    known: dict[Variable, Any] = {}
    for v, mean in reversed(means):
        at = at_zero(moved(mean, known, limit))
        known[v] = apply(lambda x: jnp.where(jnp.isfinite(x), x, 0), limit, at)
    return known


def _still(f: Any) -> Any:
    """A prior, or evidence, as a constant."""
    f = f.with_parts([None if x is None else still(x) for x, _ in f.parts()])
    if isinstance(f, Evidence) and f.unit is not None:
        f = dataclasses.replace(f, unit=still(f.unit), constant=still(f.constant))
    return f


def moved(x: Any, known: Mapping[Variable, Any], limit: Limit) -> Any:
    """A value, of plates and then numbers, in terms of choices less their origins."""
    picks = limit.indices.picks
    for v, slope in slopes_of(x).items():
        origin = known.get(picks[v].variable if v in picks else v)
        if origin is None:
            continue
        if v in picks:
            pick = picks[v]

            def read(o: Any, pick: Any = pick) -> Any:
                return jnp.moveaxis(o, pick.along, 0)[pick.index]

            origin = apply(read, limit, origin)
        ndim, places = len(x.shape) - 1, slope.places

        def there(a: Any, o: Any, ndim: int = ndim, places: Any = places) -> Any:
            order = sorted(range(len(places)), key=lambda i: places[i])
            sizes = [1] * ndim
            for i in order:
                sizes[places[i]] = o.shape[i]
            o = jnp.transpose(o, [*order, len(places)]).reshape(*sizes, o.shape[-1])
            return times(a, o)

        own = apply(there, limit, slope.value, origin)
        x = affine(apply(jnp.add, limit, at_zero(x), own), slopes_of(x))
    return x


def around(f: Any, known: Mapping[Variable, Any], limit: Limit) -> Any:
    """A prior, or evidence, with choices less their origins in place of the choices."""
    first, *rest = (x for x, _ in f.parts())
    first = moved(first, known, limit)
    if isinstance(f, Prior) and f.variable in known:
        first = apply(jnp.subtract, limit, first, known[f.variable])
    return f.with_parts([first, *rest])


def _flops(prior: Prior, data: Evidence) -> int:
    """About how many operations it takes to integrate a choice out, once the evidence on it is summed."""
    v = prior.variable
    d = sum(u.dimension or 0 for u in _ordered([prior.mean, data.rows], v))
    rows = min(d, data.rows.shape[-1] + (v.dimension or 0))
    return 4 * math.prod(p.size for p in v.plates) * rows**2 * d


def _probe_left(f: Evidence, prior: Prior, mean: Any, covariance: Any, limit: Limit) -> Evidence:
    """A probe of a choice, once the choice is integrated out: to first order it reads the mean given other choices."""
    v = prior.variable
    for u in read_by(f, v, limit):
        own_mean, own_covariance = mean, covariance
        if u is not v:
            pick = limit.indices.picks[u]

            def read(x: Any, pick: Any = pick) -> Any:
                return jnp.moveaxis(x, pick.along, 0)[pick.index]

            own_mean, own_covariance = (apply(read, limit, x) for x in (mean, covariance))
        f = _probe_of(f, u, own_mean, own_covariance, limit)
    return f


def _probe_of(f: Evidence, u: Variable, mean: Any, covariance: Any, limit: Limit) -> Evidence:
    roots, order = [p.root() for p in f.plates], [p.root() for p in u.plates]
    order = [*order, *(p for p in roots if p not in order)]
    more = range(len(u.plates), len(order))

    def front(x: Any) -> Any:
        place = [roots.index(p) for p in order]
        return jnp.transpose(x, [*place, *range(len(order), x.ndim)])

    f = f.with_parts([None if x is None else apply(front, limit, x) for x, _ in f.parts()])
    slope, form = slopes_of(f.rows)[u].value, f.form
    moved = apply(
        lambda r, a, m: r + times(a, jnp.expand_dims(m, more)),
        limit,
        without(f.rows, [u]),
        slope,
        mean,
    )
    if form.precision is not None:

        def trace(form: Quadratic, a: Any, c: Any) -> Quadratic:
            own = gaussian.between(a, jnp.expand_dims(c, more))
            return form._replace(
                constant=form.constant - jnp.sum(form.precision * own, (-1, -2)) / 2
            )

        form = apply(trace, limit, form, slope, covariance)
    return dataclasses.replace(f, rows=moved, form=form, plates=tuple(order))


def waits(
    v: Variable, priors: Mapping[Variable, Prior], evidence: Sequence[Evidence], limit: Limit
) -> tuple[str, Variable] | None:
    """Why a choice cannot be eliminated now, and the choice because of which; None if it can."""
    picks = limit.indices.picks
    for u, prior in priors.items():
        if any(w is v or (w in picks and picks[w].variable is v) for w in slopes_of(prior.mean)):
            return "child", u
    own, prior = roots_of(v.plates), priors[v]
    mine = [(f, found) for f in evidence if (found := read_by(f, v, limit))]
    shared = {u for u in prior.others if u.family is not None}
    shared |= {u for f, _ in mine for u in f.others if u.family is not None}
    for f, (read, *more) in mine:
        if f.probe:
            continue
        if more:
            return "crossed", v
        deeper = roots_of(f.plates) - own
        for u in (*f.variables, *f.others):
            if u is not read and deeper & roots_of(u.plates):
                return ("crossed" if u.normal else "mixture"), u
    for family in shared:  # a scale that is integrated out must scale all of it
        terms = (prior, *(f for f, _ in mine if not f.probe))
        if any(family not in f.others for f in terms):
            return "scale", family
    return None


def next_of(
    wanted: Iterable[Variable],
    priors: Mapping[Variable, Prior],
    evidence: Sequence[Evidence],
    limit: Limit,
) -> Variable | None:
    """The choice to be eliminated next: the one with the most copies; None if none can be."""
    ready = [v for v in wanted if waits(v, priors, evidence, limit) is None]
    return max(ready, key=lambda v: (len(v.plates), v.number), default=None)


def stuck(
    left: Iterable[Variable],
    priors: Mapping[Variable, Prior],
    evidence: Sequence[Evidence],
    limit: Limit,
) -> Entangled:
    """The error if no order of elimination is left. Choices that could be integrated jointly are named in it."""
    reasons = {v: why for v in left if (why := waits(v, priors, evidence, limit)) is not None}
    crossed = {v for v, (what, u) in reasons.items() if what == "crossed"}
    crossed |= {u for what, u in reasons.values() if what == "crossed"}
    picks = limit.indices.picks
    crossed = {picks[v].variable if v in picks else v for v in crossed}
    crossed = {v for v in crossed if v.plates}
    if crossed:
        smallest = min(crossed, key=lambda v: (_numbers(v), v.number))
        names = " and ".join(repr(a) for a in sorted({v.address for v in crossed}))
        error = Entangled(f"the copies of {names} meet in all pairs")
        error.meeting = frozenset({smallest.address})
        return error
    others = {u for what, u in reasons.values() if what in ("mixture", "scale")}
    return mixture(others, evidence, [v for v, (w, _) in reasons.items() if w != "child"])


def mixture(
    others: Iterable[Variable], evidence: Sequence[Evidence], normal: Iterable[Variable] = ()
) -> Entangled:
    """The error if other choices would have to be summed out before a normal one."""
    names = {v.address for v in normal}
    for f in evidence if not names else ():
        if set(others) & f.others.keys():
            names |= {v.address for v in f.variables}
    all_names = sorted({*names, *(v.address for v in others)})
    names |= {v.address for v in others if v.family is not None}
    return Entangled(
        f"{' and '.join(map(repr, sorted(names)))} cannot be integrated out in closed form: what is summed out beside "
        "would leave a mixture, or a scale that only some of the densities share; keep one of "
        f"{', '.join(map(repr, all_names))} as a choice"
    )


def _numbers(v: Variable) -> int:
    return (v.dimension or 0) * math.prod(p.size for p in v.plates)


# --- laws of several choices ------------------------------------------------------------------------------------------


class Joint:
    """Covariances between normal choices, given all others.

    Args:
        priors: the priors of some choices. Parents without a prior here are given.
        known: the covariances of choices that have none.
    """

    def __init__(
        self, priors: Mapping[Variable, Prior], known: Mapping[Any, Any], limit: Limit
    ) -> None:
        self.priors, self.limit = priors, limit
        self.found: dict[tuple[Variable, Variable], Any] = dict(known)
        self.members = {*priors, *(v for pair in known for v in pair)}
        self.depth: dict[Variable, int] = {}
        self.means: dict[Variable, Any] = {}

    def _depth(self, v: Variable) -> int:
        if v not in self.depth:
            parents = (
                [p for p in self.priors[v].parents if p in self.members] if v in self.priors else []
            )
            self.depth[v] = (
                0 if v not in self.priors else 1 + max(map(self._depth, parents), default=0)
            )
        return self.depth[v]

    def __call__(self, u: Variable, v: Variable) -> Any:
        """The covariance of two choices; None if it is zero."""
        if (u, v) in self.found:
            return self.found[u, v]
        if (v, u) not in self.found and self._depth(u) < self._depth(v):
            u, v = v, u
            swapped = True
        else:
            swapped = False
        if (u, v) not in self.found and (v, u) in self.found:
            x = self.found[v, u]
            self.found[u, v] = (
                None if x is None else apply(lambda x: jnp.swapaxes(x, -1, -2), self.limit, x)
            )
        if (u, v) not in self.found:
            self.found[u, v] = self._along(u, v)
        return self(v, u) if swapped else self.found[u, v]

    def expected(self, x: Any) -> Any:
        """The mean of a value of the plates of the choices, then of numbers; given all other choices."""
        total = without(x, self.members)
        for v, slope in slopes_of(x).items():
            if v in self.priors:
                if v not in self.means:
                    self.means[v] = self.expected(self.priors[v].mean)
                mean = self.means[v]
                if not slope.unit:
                    mean = apply(times, self.limit, slope.value, mean)
                total = apply(jnp.add, self.limit, total, mean)
        return total

    def _along(self, u: Variable, v: Variable) -> Any:
        """The covariance of a choice with one that is no descendant of it, by its parents."""
        prior = self.priors.get(u)
        total = prior.spread(self.limit) if prior is not None and u is v else None
        if prior is None:
            return None
        for p in prior.parents:
            if p in self.members and (c := self(p, v)) is not None:
                slope = slopes_of(prior.mean)[p]
                total = plus(product(slope, c, self.limit), total, self.limit)
        return total


def product(slope: Slope, x: Any, limit: Limit) -> Any:
    """A slope times a matrix."""
    if slope.unit:
        return x
    if slope.diagonal:
        return apply(lambda s, x: diagonal(s)[..., None] * x, limit, slope.value, x)
    return apply(matmul, limit, slope.value, x)


def plus(x: Any, y: Any, limit: Limit) -> Any:
    if x is None or y is None:
        return y if x is None else x
    return apply(jnp.add, limit, x, y)


def less(x: Any, a: Any, b: Any, limit: Limit) -> Any:
    """A matrix less a product of matrices."""
    if a is None or b is None:
        return x
    if x is None:
        return apply(lambda a, b: -matmul(a, b), limit, a, b)
    return apply(lambda x, a, b: x - matmul(a, b), limit, x, a, b)


def one_block(f: Evidence, order: Sequence[Plate], limit: Limit) -> tuple[Any, Quadratic]:
    """A probe with some plates only. Its rows along other plates stand one after another."""
    ((rows, form),) = _blocks([f], order, limit)
    at = len(order)

    def flat(rows: Any, form: Quadratic) -> Any:
        shape = (*rows.shape[:at], -1)
        precision = form.precision
        if precision is not None:
            r, n = rows.shape[at:]
            eye = jnp.eye(r, dtype=precision.dtype)
            precision = jnp.einsum("...rij,rs->...risj", precision, eye)
            precision = precision.reshape(*rows.shape[:at], r * n, r * n)
        linear = form.linear.reshape(shape)
        return rows.reshape(shape), Quadratic(precision, linear, jnp.sum(form.constant, -1))

    return apply(flat, limit, rows, form)


class Law:
    """Some values that are affine in normal choices, given evidence on these: a normal law, given other choices.

    Args:
        joint: the covariances of the choices.
        values: the values, with the same plates, then the numbers of one copy.
        mine: the evidence.
        plates: the plates.

    Attributes:
        means: the mean of each value. Affine in choices that are no part of the law.
        left: what the evidence says of other choices.
    """

    def __init__(
        self,
        joint: Joint,
        values: Sequence[Any],
        mine: Sequence[Evidence],
        plates: Sequence[Plate],
        semiring: Semiring,
        filtering: bool = False,
    ) -> None:
        self.joint, self.limit = joint, joint.limit
        roots = tuple(p.root() for p in plates)
        probes = [f for f in mine if f.probe]
        data = [f for f in mine if not f.probe]
        probed = [one_block(f, roots, self.limit) for f in probes]
        values = [*values, *(rows for rows, _ in probed)]
        self.slopes = [self._inside(x) for x in values]
        self.means = [joint.expected(x) for x in values]
        self.added: dict[tuple[int, int], Any] = {}
        self.left: list[Evidence] = []
        self.reads: dict[Variable, Slope] = {}  # how the rows of the evidence depend on choices
        self.along: dict[Variable, Any] = {}  # the covariances of rows and choices
        self.gains: list[Any] = [None] * len(values)
        self.noise = self.gains  # the part of each value that the rows' noise makes
        self.precision: Any = None  # of the rows
        self.given: dict[tuple[int, Variable], Any] = {}
        self.sides: dict[Variable, tuple[Any, Any, Any]] = {}  # of noise, of which rows read a part
        self.errors: dict[int, Any] = {}
        if data:
            self._condition(data, roots, semiring)
        n = len(values) - len(probes)
        for i, (f, (_, form)) in enumerate(zip(probes, probed, strict=True)):
            self._tilt(n + i, n, f, form, roots, filtering)
        self.means = self.means[:n]

    def _inside(self, x: Any) -> dict[Variable, Slope]:
        return {v: s for v, s in slopes_of(x).items() if v in self.joint.members}

    def _condition(
        self, data: Sequence[Evidence], plates: tuple[Plate, ...], semiring: Semiring
    ) -> None:
        limit = self.limit
        found = gathered(data, plates, None, limit).without_unit(limit)
        rows, form = found.rows, found.form
        reads = self.reads = self._inside(rows)
        wanted = {*reads, *(v for slopes in self.slopes for v in slopes)}
        along = self.along = {v: self._before(reads, v) for v in wanted}
        n = rows.shape[-1]
        shape = (*(p.size for p in plates), n, n)
        spread: Any = None
        for v, slope in reads.items():
            spread = plus(self._turned(along[v], slope), spread, limit)
        spread = jnp.zeros(shape, rows.dtype) if spread is None else spread
        crosses = []
        for slopes in self.slopes:
            total = None
            for v, slope in slopes.items():
                total = plus(self._turned(along[v], slope), total, limit)
            crosses.append(total)
        offset = self.joint.expected(rows)

        def conditioned(form: Quadratic, spread: Any, offset: Any, crosses: Any, means: Any) -> Any:
            found = update(form, spread)
            gains = [None if k is None else jnp.swapaxes(found.weigh(k), -1, -2) for k in crosses]
            noise = gains
            if found.noise is not found.weigh:
                noise = [
                    None if k is None else jnp.swapaxes(found.noise(k), -1, -2) for k in crosses
                ]
            pull = [
                m if k is None else m - times(k, offset) for m, k in zip(means, gains, strict=True)
            ]
            left = found.evidence
            if left.linear is not None:
                pull = [
                    m if k is None else m + times(jnp.swapaxes(k, -1, -2), left.linear)
                    for m, k in zip(pull, crosses, strict=True)
                ]
            if semiring is not best:
                left = left._replace(constant=left.constant - found.log_det / 2)
            return pull, gains, noise, found.transform(offset[..., None])[..., 0], left

        self.means, self.gains, self.noise, offset, left = apply(
            conditioned, limit, form, spread, offset, crosses, self.means
        )
        self.precision = form.precision
        for v, slope in reads.items():
            if n < (v.dimension or 0) and self._is_noise(v):
                self.sides[v] = apply(gaussian.sides, limit, self.joint.priors[v].root, slope.value)
        names = [v.address for v in self.joint.members]
        k = sum(v.dimension or 0 for v in wanted)
        copies = math.prod(p.size for p in plates)
        limit.spend(names, copies * (2 * n * (2 * k * k + n * n) + 6 * k**3))
        scale = same_scale([f.scale for f in data], names)
        sites = tuple(dict.fromkeys(s for f in data for s in f.sites))
        self.left.append(Evidence(offset, left, plates, scale, sites))

    def _is_noise(self, v: Variable) -> bool:
        """Whether a choice is independent of all others, and a root of its covariance is known."""
        prior, members = self.joint.priors.get(v), self.joint.members
        alone = prior is not None and prior.root is not None and not members & {*prior.parents}
        return alone and not any(v in f.parents for f in self.joint.priors.values())

    def _turned(self, along: Any, slope: Slope) -> Any:
        """Covariances with a choice, as those with a value that has this slope."""
        if along is None or slope.unit:
            return along
        if slope.diagonal:
            turn = lambda a, s: a * diagonal(s)[..., None, :]  # noqa: E731
        else:
            turn = lambda a, s: matmul(a, jnp.swapaxes(s, -1, -2))  # noqa: E731
        return apply(turn, self.limit, along, slope.value)

    def _before(self, slopes: Mapping[Variable, Slope], v: Variable) -> Any:
        """The covariance of a value that has these slopes with a choice, without the evidence."""
        total: Any = None
        for u, slope in slopes.items():
            if (c := self.joint(u, v)) is not None:
                total = plus(product(slope, c, self.limit), total, self.limit)
        return total

    def _given(self, i: int, v: Variable) -> Any:
        """The covariance of a value with a choice, or with what the rows read of it, given the evidence."""
        if (i, v) not in self.given:
            slope, along = self.slopes[i].get(v), self.along.get(v)
            if v in self.sides:
                read, _, along = self.sides[v]
                before = None if slope is None else product(slope, read, self.limit)
            else:
                before = self._before(self.slopes[i], v)
            self.given[i, v] = less(before, self.gains[i], along, self.limit)
        return self.given[i, v]

    def _shared(self, i: int, v: Variable, slope: Slope) -> Any:
        """The covariance of a value with another that has this slope, by a choice, given the evidence."""
        if v in self.sides:
            slope = Slope(product(slope, self.sides[v][0], self.limit), slope.places)
        return self._turned(self._given(i, v), slope)

    def _error(self, i: int) -> Any:
        """The covariance of a value with the rows given the evidence, less what it is without rounding."""
        if i not in self.errors:
            noise = self.noise[i]
            total = None if noise is None else apply(jnp.negative, self.limit, noise)
            for v, slope in self.reads.items():
                total = plus(self._shared(i, v, slope), total, self.limit)
            self.errors[i] = total
        return self.errors[i]

    def covariance(self, i: int, j: int) -> Any:
        r"""The covariance of two values; None if it is zero.

        Of values $S_i z$ and $S_j z$ and rows $A z$ it is $M S_j^\top - (M A^\top - Z_i) K_j^\top$, if $C$ is the
        covariance of $z$ and $M = (S_i - K_i A) C$. This is Joseph's form. What is subtracted is due to rounding only,
        and so that of $M$ does not stay. Noise is turned until the rows read as few of its numbers as there are rows:
        what the others add is the same in every step of a chain.
        """
        total, limit, gain = None, self.limit, self.gains[j]
        for v, slope in self.slopes[j].items():
            total = plus(self._shared(i, v, slope), total, limit)
            if v in self.sides and v in self.slopes[i]:
                unread = (product(s, self.sides[v][1], limit) for s in (self.slopes[i][v], slope))
                turn = lambda a, b: matmul(a, jnp.swapaxes(b, -1, -2))  # noqa: E731
                total = plus(apply(turn, limit, *unread), total, limit)
        if gain is not None:
            back = apply(lambda k: jnp.swapaxes(k, -1, -2), limit, gain)
            total = less(total, self._error(i), back, limit)
        if total is not None and self.along:
            joint = [[self.joint(u, v) for v in self.along] for u in self.along]
            reads, *own = (
                [slopes[v].value if v in slopes else None for v in self.along]
                for slopes in (self.reads, self.slopes[i], self.slopes[j])
            )
            sides = [
                gaussian.Side(s, reads, self.gains[k], self.noise[k])
                for s, k in zip(own, (i, j), strict=True)
            ]
            total = apply(gaussian.as_joseph, limit, total, (joint, *sides, self.precision))
        return plus(total, self.added.get((i, j)), limit)

    def _tilt(
        self,
        at: int,
        num: int,
        f: Evidence,
        form: Quadratic,
        plates: tuple[Plate, ...],
        filtering: bool,
    ) -> None:
        """What a probe does, to first order: it moves the means, and the covariances if it is quadratic."""
        limit, quadratic = self.limit, f.form.precision is not None
        mean, own = self.means[at], self.covariance(at, at)

        def trace(form: Quadratic, own: Any) -> Quadratic:
            if own is None or form.precision is None:
                return form
            more = jnp.sum(
                form.precision * (jax.lax.stop_gradient(own) if filtering else own), (-1, -2)
            )
            return form._replace(constant=form.constant - more / 2)

        rows = still(mean) if filtering else mean
        form = apply(trace, limit, form, own)
        self.left.append(Evidence(rows, form, plates, f.scale, f.sites, True))
        if filtering:
            return
        sides = [self.covariance(i, at) for i in range(num)]

        def move(form: Quadratic, mean: Any, sides: Any, means: Any) -> Any:
            force = form.linear if form.precision is None else form.force(mean)
            return [
                m if c is None else m + times(c, force) for m, c in zip(means, sides, strict=True)
            ]

        self.means[:num] = apply(move, limit, form, mean, sides, self.means[:num])
        if not quadratic:
            return
        for i in range(num):
            for j in range(num):
                if sides[i] is not None and sides[j] is not None:
                    turn = lambda a, g, b: -(a @ g @ jnp.swapaxes(b, -1, -2))  # noqa: E731
                    more = apply(turn, limit, sides[i], form.precision, sides[j])
                    self.added[i, j] = plus(self.added.get((i, j)), more, limit)
