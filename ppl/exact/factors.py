"""Factors: density terms that depend on choices which are summed out, as tables of logarithms.

A factor $f(z_A)$ has one axis for each choice $z_a$ that it depends on, and one for each plate along which there are
several of it (Obermeyer et al. 2019, "Tensor variable elimination for plated factor graphs", ICML).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import ModelError

from .tables import Entangled, Plate, Table, Variable

Scale = tuple[Any, ...]
"""How often a sum counts: the product of these numbers. Those of sites that meet must be the same ones."""


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """A table of log density: one axis for each variable, then one for each plate.

    With ``scale``, the log of the sum over its variables counts this many times. ``sites`` are the sites it comes from.
    """

    table: jax.Array
    variables: tuple[Variable, ...]
    plates: tuple[Plate, ...] = ()
    scale: Scale = ()
    sites: tuple[str, ...] = ()

    def as_table(self) -> Table:
        """The factor as a table whose own axes are the plates."""
        own = [p.root() for p in self.plates]
        axes = {v: tuple(own.index(p.root()) for p in v.plates) for v in self.variables}
        n = len(self.variables)
        order = sorted(range(n), key=lambda i: self.variables[i].number)
        return Table(jnp.transpose(self.table, [*order, *range(n, self.table.ndim)]), axes)

    def total(self, scaled: bool = True) -> jax.Array:
        """Its log density, after all variables are summed out."""
        log_density = jnp.sum(self.table)
        return math.prod(self.scale, start=log_density) if scaled else log_density


PROBE = "~probe"
"""The site of a factor that is zero everywhere and serves for its derivative only."""


def labels_of(term: Table) -> list[Plate | None]:
    """For every axis of a value, the plate along it. Plates that share an axis are merged."""
    labels: list[Plate | None] = [None] * len(term.shape)
    for variable, places in term.axes.items():
        for place, plate in zip(places, variable.plates, strict=True):
            known = labels[place]
            if known is not None:
                known.merge(plate)
            labels[place] = plate
    return labels


def factor_of(term: Table, name: str, scale: Scale) -> Factor:
    """A density term as a factor. Axes along which no variable has copies are summed.

    Raises:
        Entangled: if one axis of copies meets itself, so that every copy meets every other.
    """
    labels = labels_of(term)
    n = len(term.axes)
    table = jnp.sum(term.array, tuple(n + i for i, p in enumerate(labels) if p is None))
    plates = tuple(p for p in labels if p is not None)
    factor = Factor(table, tuple(term.axes), plates, scale, (name,))
    _check_apart(factor, f"at site {name!r}")
    return factor


def _check_apart(factor: Factor, where: str) -> None:
    if len(roots_of(factor.plates)) < len(factor.plates):
        names = " and ".join(repr(v.address) for v in factor.variables)
        raise Entangled(
            f"{where} every copy of {names} meets every other; marginalize(..., joint=True) sums over all their joint "
            "values"
        )


def roots_of(plates: Iterable[Plate]) -> set[Plate]:
    return {p.root() for p in plates}


def multiply(factors: Sequence[Factor]) -> Factor:
    """The product of factors, over all their variables and plates."""
    variables = sorted({v for f in factors for v in f.variables}, key=lambda v: v.number)
    plates = list(dict.fromkeys(p.root() for f in factors for p in f.plates))
    product: Any = None
    for f in factors:
        _check_apart(f, "in the end")
        own = [p.root() for p in f.plates]
        order = [f.variables.index(v) for v in variables if v in f.variables]
        order += [len(f.variables) + own.index(p) for p in plates if p in own]
        shape = [v.num_values if v in f.variables else 1 for v in variables]
        shape += [p.size if p in own else 1 for p in plates]
        table = jnp.transpose(f.table, order).reshape(shape)
        product = table if product is None else product + table
    full = (*(v.num_values for v in variables), *(p.size for p in plates))
    sites = tuple(dict.fromkeys(s for f in factors for s in f.sites))
    table = jnp.broadcast_to(product, full)
    names = [v.address for v in variables]
    scale = same_scale([f.scale for f in factors], names)
    return Factor(table, tuple(variables), tuple(plates), scale, sites)


def same_scale(scales: Sequence[Scale], names: Iterable[str]) -> Scale:
    """The scale of terms that meet in a sum over some choices."""
    if not all(_same(s, scales[0]) for s in scales):
        names = sorted(set(names))
        raise ModelError(
            f"the sites that meet in the sum over {', '.join(map(repr, names))} are scaled differently: scale all of "
            "them, the choice that is summed out among them, or none"
        )
    return scales[0] if scales else ()


def _same(a: Scale, b: Scale) -> bool:
    """Whether two scales are known to be the same numbers."""
    return len(a) == len(b) and all(map(_same_number, a, b))


def _same_number(a: Any, b: Any) -> bool:
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return a is b
    return bool(np.array_equal(a, b))


def narrow(factor: Factor) -> Factor:
    """Multiply up the plates along which no variable has copies."""
    needed = {p for v in factor.variables for p in roots_of(v.plates)}
    n = len(factor.variables)
    gone = tuple(n + i for i, p in enumerate(factor.plates) if p.root() not in needed)
    if not gone:
        return factor
    kept = tuple(p.root() for p in factor.plates if p.root() in needed)
    return dataclasses.replace(factor, table=jnp.sum(factor.table, gone), plates=kept)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def top_of(alpha: Factor, mine: Iterable[Variable]) -> Factor:
    """The largest entry of a factor over some of its variables."""
    axes = tuple(i for i, v in enumerate(alpha.variables) if v in set(mine))
    top = jax.lax.stop_gradient(jnp.max(alpha.table, axes))
    rest = tuple(v for v in alpha.variables if v not in set(mine))
    return Factor(jnp.where(jnp.isfinite(top), top, 0), rest, alpha.plates, alpha.scale)


def less(alpha: Factor, top: Factor) -> Factor:
    """A factor divided by another one over fewer variables and the same plates."""
    own = [p.root() for p in top.plates]
    shape = [v.num_values if v in top.variables else 1 for v in alpha.variables]
    order = [own.index(p.root()) for p in alpha.plates]
    table = jnp.transpose(
        top.table, [*range(len(top.variables)), *(len(top.variables) + i for i in order)]
    )
    return dataclasses.replace(
        alpha, table=alpha.table - table.reshape(*shape, *(p.size for p in alpha.plates))
    )


def ones(variable: Variable, scale: Scale) -> Factor:
    """A factor that is one everywhere."""
    shape = (variable.num_values, *(p.size for p in variable.plates))
    return Factor(jnp.zeros(shape), (variable,), tuple(p.root() for p in variable.plates), scale)


def in_terms(factor: Factor, names: Mapping[Variable, Variable]) -> Factor:
    """The factor with some variables renamed."""
    return dataclasses.replace(factor, variables=tuple(names.get(v, v) for v in factor.variables))


def ordered(factor: Factor, form: Factor) -> jax.Array:
    """The table of a factor, with its axes in the order of another factor's."""
    own = [p.root() for p in factor.plates]
    order = [factor.variables.index(v) for v in form.variables]
    order += [len(order) + own.index(p.root()) for p in form.plates]
    return jnp.transpose(factor.table, order)
