"""Filtering as a derivative: an identity function after every step of a chain.

Its derivative is the posterior of the state given the steps so far, in place of the cotangent from later steps. So the
gradient of the log evidence by the weights of a choice (``recovery``) is the filtered law of the choice, not the
smoothed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .elimination import sum_out
from .factors import Factor, multiply
from .plan import Plan
from .tables import Variable


def filtered(plan: Plan, alpha: Factor, born: Collection[Variable]) -> Factor:
    """The factor of a chain, unchanged. Its derivative is the posterior given the steps so far.

    Args:
        plan: what is summed out.
        alpha: the factor.
        born: the choices of the chain. For other choices of the factor the derivative is the posterior given
            everything.
    """
    axes = tuple(i for i, v in enumerate(alpha.variables) if v in born)
    rest = [v for v in alpha.variables if v not in born]
    # They do not matter to a derivative, and the true ones would be tracers that the rule below must not hold.
    scales = {v: np.zeros([p.size for p in v.plates]) for v in born if v.family is not None}
    seen: list[Factor] = []

    def total(table: Any) -> Any:
        whole = dataclasses.replace(alpha, table=table)
        with plan.limit.repeated(0):
            left = sum_out([whole], born, plan.semiring, plan.limit, {}, scales)
        seen.append(multiply(left))
        return seen[-1].table

    @jax.custom_vjp
    def stop(table: Any) -> Any:
        return table

    def backward(table: Any, cotangent: Any) -> Any:
        _, pull = jax.vjp(total, table)
        # Along plates that were multiplied up, the weight of other terms is the same everywhere.
        own = [p.root() for p in seen[-1].plates]
        labels = [*rest, *(p.root() for p in alpha.plates)]
        weight = jnp.sum(cotangent, axes)
        for i in reversed(range(len(rest), len(labels))):
            if labels[i] not in own:
                weight = jnp.take(weight, 0, i)
                del labels[i]
        order = [labels.index(a) for a in [*seen[-1].variables, *own]]
        return pull(jnp.transpose(weight, order))

    stop.defvjp(lambda table: (table, table), backward)
    return dataclasses.replace(alpha, table=stop(alpha.table))
