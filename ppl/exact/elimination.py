r"""Sum-product over tables: variable elimination on plated factor graphs.

A density term that depends on discrete choices $z$ is a *factor* $f(z_A)$, a table of logarithms. The marginal density
is

$$\log \sum_z \exp \sum_f \log f(z_{A_f}).$$

It is computed by summing out one choice after another. Each sum is over the product of the factors that contain the
choice. Copies of a choice along a plate are summed one by one, in one vectorised call. What remains of a plate is
multiplied up (Obermeyer et al. 2019, "Tensor variable elimination for plated factor graphs", ICML). The order is
greedy: the smallest table first.

What "sum" means is a parameter, the semiring (Li and Eisner 2009, "First- and second-order expectation semirings"; Rush
2020, "Torch-Struct", section 4):

- With logarithms of sums the result is the log evidence. Its gradient by a factor is the posterior probability of each
  entry.
- With maxima the result is the score of the best configuration. The gradient is that configuration.
- The derivative of a sum may also be *defined* as one draw, made with probability proportional to the terms. The
  gradient is then an exact joint draw from the posterior.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .factors import Factor, multiply, narrow, roots_of
from .integrals import integrate
from .semirings import Semiring
from .tables import Entangled, Limit, Variable, num_terms


def sum_out(
    factors: Sequence[Factor],
    variables: Iterable[Variable],
    semiring: Semiring,
    limit: Limit,
    keys: Mapping[Variable, Any],
    log_scales: Mapping[Variable, Any] | None = None,
    may_stay: frozenset[Variable] = frozenset(),
) -> list[Factor]:
    """Sum out variables from a product of factors, in a greedy order.

    Raises:
        Entangled: if copies of two variables meet in all pairs, or a table would be too large.
    """
    factors = [narrow(f) if f.variables else f for f in factors]
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
            table = semiring(product.table, axis, keys.get(variable))
        else:
            log_scale = (log_scales or {}).get(variable, 0.0)
            table = _integrate(product, axis, semiring, log_scale, keys.get(variable))
        summed = dataclasses.replace(product, table=table, variables=rest)
        factors.append(narrow(summed) if rest else summed)
    return factors


def _cost(variable: Variable, factors: list[Factor]) -> int | None:
    """The number of entries of the table that summing out a variable takes; None if others have to go first."""
    mine = [f for f in factors if variable in f.variables]
    own = roots_of(variable.plates)
    for f in mine:
        deeper = roots_of(f.plates) - own
        if any(deeper & roots_of(v.plates) for v in f.variables if v is not variable):
            return None
    if not _closed(variable, mine):
        return None
    return num_terms({v for f in mine for v in f.variables})


def _closed(variable: Variable, mine: list[Factor]) -> bool:
    """Whether no continuous variable is left over: a sum of conjugate densities is not conjugate."""
    return not any(v is not variable and v.family is not None for f in mine for v in f.variables)


def _integrate(
    product: Factor, axis: int, semiring: Semiring, log_scale: Any, key: Any
) -> jax.Array:
    variable = product.variables[axis]
    own = [p.root() for p in variable.plates]
    shape = [p.size if p.root() in own else 1 for p in product.plates]
    order = [own.index(p.root()) for p in product.plates if p.root() in own]
    log_scale = jnp.transpose(jnp.asarray(log_scale), order).reshape(shape) if own else log_scale
    table = jnp.moveaxis(product.table, axis, -1)
    num_rest = len(product.variables) - 1
    return integrate(semiring, variable.family, table, num_rest, log_scale, key)


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
