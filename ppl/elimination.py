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
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .errors import ModelError
from .lifting import Entangled, Lifted, Limit, Plate, Variable, num_terms

Reduce = Callable[[jax.Array, int, Any], jax.Array]
"""From a table, an axis and a key to the table without the axis."""


# --- three sums -------------------------------------------------------------------------------------------------------


def log_sum(table: jax.Array, axis: int, key: Any = None) -> jax.Array:
    r"""$\log \sum \exp$ along an axis; its derivatives are finite where all terms are zero, too."""
    top = jax.lax.stop_gradient(jnp.max(table, axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    return _log(jnp.sum(jnp.exp(table - top), axis)) + jnp.squeeze(top, axis)


@jax.custom_jvp
def _log(x: jax.Array) -> jax.Array:
    """The logarithm, with derivative zero at zero."""
    return jnp.log(x)


@_log.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return _log(x), jnp.where(x > 0, dx / jnp.where(x > 0, x, 1), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def best(table: jax.Array, axis: int, key: Any = None) -> jax.Array:
    """The largest term; the derivative is one at the first that is largest."""
    return jnp.max(table, axis)


def _best_forward(table: jax.Array, axis: int, key: Any) -> Any:
    return jnp.max(table, axis), (jnp.argmax(table, axis), table.shape[axis])


def _chosen(axis: int, residual: Any, cotangent: Any) -> Any:
    index, size = residual
    one_hot = jax.nn.one_hot(index, size, axis=axis, dtype=cotangent.dtype)
    return one_hot * jnp.expand_dims(cotangent, axis), None


best.defvjp(_best_forward, _chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def drawn(table: jax.Array, axis: int, key: Any) -> jax.Array:
    """The log of the sum; the derivative is one at one term, drawn in proportion to the terms."""
    return log_sum(table, axis)


def _drawn_forward(table: jax.Array, axis: int, key: Any) -> Any:
    index = jax.random.categorical(key, table, axis)
    return log_sum(table, axis), (index, table.shape[axis])


drawn.defvjp(_drawn_forward, _chosen)


# --- factors ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """A table of log density: one axis for each variable, then one for each plate.

    With ``scale``, the log of the sum over its variables counts that many times.
    """

    table: jax.Array
    variables: tuple[Variable, ...]
    plates: tuple[Plate, ...] = ()
    scale: Any = None

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


def factor_of(term: Lifted, name: str, scale: Any = None) -> Factor:
    """A density term as a factor: axes that no variable has copies along are summed.

    Raises:
        Entangled: if one axis of copies meets itself, so that every copy meets every other.
    """
    labels: list[Plate | None] = [None] * len(term.shape)
    for variable, places in term.axes.items():
        for place, plate in zip(places, variable.plates, strict=True):
            known = labels[place]
            if known is not None:
                known.merge(plate)
            labels[place] = plate
    n = len(term.axes)
    table = jnp.sum(term.array, tuple(n + i for i, p in enumerate(labels) if p is None))
    factor = Factor(table, tuple(term.axes), tuple(p for p in labels if p is not None), scale)
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
    return Factor(jnp.broadcast_to(product, full), tuple(variables), tuple(plates), _scale(factors))


def _scale(factors: Sequence[Factor]) -> Any:
    scales = {id(f.scale): f.scale for f in factors}
    if len(scales) > 1:
        names = sorted({v.address for f in factors for v in f.variables})
        raise ModelError(
            f"the sites that meet in the sum over {', '.join(map(repr, names))} are scaled differently: scale all of "
            "them, the choice that is summed out among them, or none"
        )
    return factors[0].scale


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
) -> list[Factor]:
    """Sum out variables from a product of factors, in a greedy order.

    Raises:
        Entangled: if copies of two variables meet in all pairs, or a table would be too large.
    """
    factors = list(factors)
    left = {v for v in variables if any(v in f.variables for f in factors)}
    while left:
        costs = {v: cost for v in left if (cost := _cost(v, factors)) is not None}
        if not costs:
            raise _stuck(left)
        variable = min(costs, key=lambda v: (costs[v], v.number))
        left.remove(variable)
        mine = [f for f in factors if variable in f.variables]
        factors = [f for f in factors if variable not in f.variables]
        joint = sorted({v for f in mine for v in f.variables}, key=lambda v: v.number)
        limit.check(joint, f"the sum over {variable.address!r}")
        product = multiply(mine)
        rest = tuple(v for v in product.variables if v is not variable)
        table = reduce(product.table, product.variables.index(variable), keys.get(variable))
        summed = Factor(table, rest, product.plates, product.scale)
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
    return num_terms({v for f in mine for v in f.variables})


def _stuck(left: Iterable[Variable]) -> Entangled:
    names = " and ".join(map(repr, sorted({v.address for v in left})))
    return Entangled(
        f"the copies of {names} meet in all pairs (each copy of one with each of the other), so that no order of "
        "summing stays small; marginalize(..., joint=True) sums over all their joint values"
    )
