r"""Sum-product over tables: variable elimination on plated factor graphs.

A density term that depends on discrete choices $z$ is a *factor* $f(z_A)$, a table of logarithms. The marginal density

$$\log \sum_z \exp \sum_f \log f(z_{A_f})$$

is found by summing out one choice after the other, each time over the sum of the factors that it stands in. Copies of
a choice along a plate are summed one by one (in one vectorised call), and what remains of a plate is multiplied up
(Obermeyer et al. 2019, "Tensor variable elimination for plated factor graphs", ICML). The order is greedy: the
smallest table first.

What "sum" means is a parameter (Li and Eisner 2009, "First- and second-order expectation semirings"; Rush 2020,
"Torch-Struct", section 4): with logarithms of sums the result is the log evidence, and its gradient by a factor is
the posterior probability of each entry; with maxima it is the score of the best configuration, and the gradient is
that configuration; and if the derivative of a sum is *defined* as one draw, made with probability proportional to the
terms, the gradient is an exact joint draw from the posterior.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import ModelError

from .conjugacy import integrate
from .semirings import Reduce
from .tables import Entangled, Lifted, Limit, Plate, Variable, num_terms

# --- factors ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """A table of log density: one axis for each variable, then one for each plate.

    With ``scale``, the log of the sum over its variables counts that many times. ``sites`` are those it comes from.
    """

    table: jax.Array
    variables: tuple[Variable, ...]
    plates: tuple[Plate, ...] = ()
    scale: Any = None
    sites: tuple[str, ...] = ()

    def lifted(self) -> Lifted:
        """The factor as a lifted value whose own axes are the plates."""
        own = [p.root() for p in self.plates]
        axes = {v: tuple(own.index(p.root()) for p in v.plates) for v in self.variables}
        n = len(self.variables)
        order = sorted(range(n), key=lambda i: self.variables[i].number)
        return Lifted(jnp.transpose(self.table, [*order, *range(n, self.table.ndim)]), axes)

    def total(self) -> jax.Array:
        """Its log density, when all variables are summed out."""
        log_density = jnp.sum(self.table)
        return log_density if self.scale is None else log_density * self.scale


PROBE = "~probe"
"""The site of a factor that is zero, and there for its derivative only."""


def labels_of(term: Lifted) -> list[Plate | None]:
    """For every axis of a value the plate that runs along it; plates that share one are merged."""
    labels: list[Plate | None] = [None] * len(term.shape)
    for variable, places in term.axes.items():
        for place, plate in zip(places, variable.plates, strict=True):
            known = labels[place]
            if known is not None:
                known.merge(plate)
            labels[place] = plate
    return labels


def factor_of(term: Lifted, name: str, scale: Any = None) -> Factor:
    """A density term as a factor: axes that no variable has copies along are summed.

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
    if len(_roots(factor.plates)) < len(factor.plates):
        names = " and ".join(repr(v.address) for v in factor.variables)
        raise Entangled(
            f"{where} every copy of {names} meets every other; marginalize(..., joint=True) sums over all their joint "
            "values"
        )


def _roots(plates: Iterable[Plate]) -> set[Plate]:
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
    return Factor(table, tuple(variables), tuple(plates), _scale(factors), sites)


def _scale(factors: Sequence[Factor]) -> Any:
    if not all(_same(f.scale, factors[0].scale) for f in factors):
        names = sorted({v.address for f in factors for v in f.variables})
        raise ModelError(
            f"the sites that meet in the sum over {', '.join(map(repr, names))} are scaled differently: scale all of "
            "them, the choice that is summed out among them, or none"
        )
    return factors[0].scale


def _same(a: Any, b: Any) -> bool:
    """Whether two scales are known to be the same number."""
    if a is None or b is None or isinstance(a, Tracer) or isinstance(b, Tracer):
        return a is b
    return bool(np.array_equal(a, b))


def _narrow(factor: Factor) -> Factor:
    """Multiply up the plates along which no variable has copies."""
    needed = {p for v in factor.variables for p in _roots(v.plates)}
    n = len(factor.variables)
    gone = tuple(n + i for i, p in enumerate(factor.plates) if p.root() not in needed)
    if not gone:
        return factor
    kept = tuple(p.root() for p in factor.plates if p.root() in needed)
    return dataclasses.replace(factor, table=jnp.sum(factor.table, gone), plates=kept)


def sum_out(
    factors: Sequence[Factor],
    variables: Iterable[Variable],
    reduce: Reduce,
    limit: Limit,
    keys: Mapping[Variable, Any],
    log_scales: Mapping[Variable, Any] | None = None,
    may_stay: frozenset[Variable] = frozenset(),
) -> list[Factor]:
    """Sum out variables from a product of factors, in a greedy order.

    Raises:
        Entangled: if copies of two variables meet in all pairs, or a table would be too large.
    """
    factors = [_narrow(f) if f.variables else f for f in factors]
    left = {v for v in variables if any(v in f.variables for f in factors)}
    while left:
        costs = {v: cost for v in left if (cost := _cost(v, factors)) is not None}
        if not costs and left <= may_stay:
            break
        if not costs:
            raise _stuck(left)
        variable = min(costs, key=lambda v: (costs[v], v.number))
        left.remove(variable)
        mine = [f for f in factors if variable in f.variables]
        factors = [f for f in factors if variable not in f.variables]
        joint = sorted({v for f in mine for v in f.variables}, key=lambda v: v.number)
        limit.check(joint, f"the sum over {variable.address!r}")
        product = multiply(mine)
        limit.count(variable.address, joint, product.table.size)
        rest = tuple(v for v in product.variables if v is not variable)
        axis = product.variables.index(variable)
        if variable.family is None:
            table = reduce(product.table, axis, keys.get(variable))
        else:
            log_scale = (log_scales or {}).get(variable, 0.0)
            table = _integrate(product, axis, reduce, log_scale, keys.get(variable))
        summed = dataclasses.replace(product, table=table, variables=rest)
        factors.append(_narrow(summed) if rest else summed)
    return factors


def _cost(variable: Variable, factors: list[Factor]) -> int | None:
    """Entries of the table that summing a variable takes; None if others have to go first."""
    mine = [f for f in factors if variable in f.variables]
    own = _roots(variable.plates)
    for f in mine:
        deeper = _roots(f.plates) - own
        if any(deeper & _roots(v.plates) for v in f.variables if v is not variable):
            return None
    if not _closed(variable, mine):
        return None
    return num_terms({v for f in mine for v in f.variables})


def _closed(variable: Variable, mine: list[Factor]) -> bool:
    """Whether what is left, when a variable is summed out, is of a form that the continuous ones among it have."""
    others = {v for f in mine for v in f.variables if v is not variable and v.family is not None}
    if variable.family is None or not variable.family.quadratic:
        return not others  # a sum of conjugate densities is none
    # A normal choice with a scale that is integrated out, too: all that reads it must have that scale.
    scales = {v for v in others if not v.family.quadratic}
    return all(scales <= set(f.variables) for f in mine if f.sites != (PROBE,))


def _integrate(product: Factor, axis: int, reduce: Reduce, log_scale: Any, key: Any) -> jax.Array:
    variable = product.variables[axis]
    own = [p.root() for p in variable.plates]
    shape = [p.size if p.root() in own else 1 for p in product.plates]
    order = [own.index(p.root()) for p in product.plates if p.root() in own]
    log_scale = jnp.transpose(jnp.asarray(log_scale), order).reshape(shape) if own else log_scale
    table = jnp.moveaxis(product.table, axis, -1)
    num_rest = len(product.variables) - 1
    return integrate(reduce, variable.family, table, num_rest, log_scale, key)


def _stuck(left: Iterable[Variable]) -> Entangled:
    continuous = sorted({v.address for v in left if v.family is not None})
    if continuous:
        return Entangled(
            f"{' and '.join(map(repr, continuous))} cannot be integrated out in closed form: what is summed out beside "
            "would leave a mixture, or a scale that only some of the densities share; keep one of "
            f"{', '.join(map(repr, sorted({v.address for v in left})))} as a choice"
        )
    names = " and ".join(map(repr, sorted({v.address for v in left})))
    return Entangled(
        f"the copies of {names} meet in all pairs (each copy of one with each of the other), so that no order of "
        "summing stays small; marginalize(..., joint=True) sums over all their joint values"
    )
