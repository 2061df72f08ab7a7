r"""The choices that were summed out, back: their posterior given all others.

The log density of a marginalised program, $\log Z(w) = \log \sum_z \exp(\log p(x, z) + w_z)$, is differentiated by
numbers $w$ added to the log density of each value of each choice. With logarithms of sums the gradient is the
posterior probability of each value; with maxima it is the indicator of the most probable configuration (for a chain:
Viterbi 1967); and with a sum whose derivative is defined as one random term it is the indicator of an exact joint
draw (for a chain: forward filtering, backward sampling). One recursion serves all three; see ``elimination``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .addresses import unflatten
from .elimination import best, drawn, log_sum
from .handlers import Given
from .interpreter import interpret
from .marginals import Posterior, Weights, Whole
from .programs import Program
from .structure import SiteInfo, summed_out
from .traces import flat_records

SUMS = {"sample": drawn, "marginals": log_sum, "viterbi": best}


def posterior(
    program: Program, key: jax.Array, given: Mapping[str, Given], sites: str
) -> dict[str, Any]:
    """What was summed out of a staged program, given all its other choices, by dotted address.

    Args:
        program: a program with choices summed out.
        key: random key, for draws.
        given: every other choice, by dotted address.
        sites: ``"sample"`` (one joint draw), ``"viterbi"`` (the most probable values) or ``"marginals"``
            (probabilities, an axis of values last).
    """
    code, args = program.code()
    table = summed_out(code.jaxpr)
    dtype = jnp.result_type(float)
    start = {a: jnp.zeros((*s.shape, len(_values(s))), dtype) for a, s in table.items()}

    def log_density(log_weights: dict[str, Any]) -> jax.Array:
        entries = {**given, **{a: Weights(w) for a, w in log_weights.items()}}
        handler = Posterior(SUMS[sites])
        return interpret(code.jaxpr, args, handler, key, unflatten(entries))[2]["log_density"]

    found = jax.grad(log_density)(start)
    if sites == "marginals":
        return found
    return {
        a: jnp.asarray(_values(table[a]), table[a].dtype)[jnp.argmax(one_hot, -1)]
        for a, one_hot in found.items()
    }


def restored(
    program: Program, given: Mapping[str, Given], found: Mapping[str, Any]
) -> dict[str, Any]:
    """What the program records when the choices that were summed out are known: its derived values."""
    code, args = program.code()
    entries = {**given, **{a: Given(v, checked=True) for a, v in found.items()}}
    _, records, _ = interpret(code.jaxpr, args, Whole("value"), None, unflatten(entries))
    table = program.sites
    return {
        a: r["value"]
        for a, r in flat_records(records)
        if a in table and table[a].kind == "deterministic"
    }


def _values(info: SiteInfo) -> np.ndarray:
    assert info.values is not None
    return info.values
