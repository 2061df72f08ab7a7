r"""Recovery of the choices that were summed out: their posterior given all others.

Add numbers $w$ to the log density of each value of each choice. The log density of the marginalised program is then
$\log Z(w) = \log \sum_z \exp(\log p(x, z) + w_z)$. Its gradient by $w$ recovers the choices. What the gradient is
depends on the kind of sum:

- With logarithms of sums, it is the posterior probability of each value.
- With maxima, it is the indicator of the most probable configuration (for a chain: Viterbi 1967).
- With a sum whose derivative is defined as one random term, it is the indicator of an exact joint draw (for a chain:
  forward filtering, backward sampling).

One recursion serves all three; see ``elimination``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.programs.handlers import Given
from weft.ppl.programs.programs import Program
from weft.ppl.programs.traces import flat_records
from weft.ppl.stage.addresses import unflatten
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.interpreter import interpret
from weft.ppl.stage.keys import derive_keys, key_plan
from weft.ppl.stage.structure import SiteInfo, summed_out

from .choices import Weights
from .density import Posterior, Whole
from .plan import Elimination
from .semirings import best, drawn, log_sum

SUMS = {"sample": drawn, "marginals": log_sum, "filtered": log_sum, "viterbi": best}

MOMENTS = ("marginals", "filtered")
"""The kinds of recovery that give probabilities and means, not values."""


def posterior(
    program: Program, key: jax.Array, given: Mapping[str, Given], sites: str
) -> dict[str, Any]:
    """The choices that were summed out of a staged program, given all its other choices, by dotted address.

    Args:
        program: a program with choices summed out.
        key: a random key, for draws.
        given: every other choice, by dotted address.
        sites: ``"sample"`` gives one joint draw, and ``"viterbi"`` the most probable values. ``"marginals"`` gives
            probabilities, with the axis of values last, or the mean of a continuous choice. ``"filtered"`` gives the
            same for the choices in a scan, given the steps up to their own.
    """
    code, args = program.code()
    table = summed_out(code.jaxpr)
    start = {a: jnp.zeros(_form(s), jnp.result_type(float)) for a, s in table.items()}
    handler = Posterior(SUMS[sites], sites == "filtered")
    keys = derive_keys(key_plan(code.jaxpr), key) if sites == "sample" else None

    def log_density(log_weights: dict[str, Any]) -> jax.Array:
        entries = {**given, **{a: Weights(w) for a, w in log_weights.items()}}
        return interpret(code.jaxpr, args, handler, keys, unflatten(entries))[2]["log_density"]

    found = jax.grad(log_density)(start)
    rules = {a: rule for plan in handler.plans for a, rule in plan.rules.items()}
    return {a: _value(table[a], found[a], rules.get(a), sites) for a in found}


def _form(info: SiteInfo) -> tuple[int, ...]:
    """The shape of the numbers that are added.

    There is one for each value of a discrete choice, and one for each number of a continuous choice.
    """
    return (*info.shape, len(info.values)) if info.values is not None else info.shape


def _value(info: SiteInfo, found: jax.Array, rule: Elimination | None, sites: str) -> jax.Array:
    if info.values is not None:
        if sites in MOMENTS:
            return found
        return jnp.asarray(info.values, info.dtype)[jnp.argmax(found, -1)]
    assert rule is not None
    family = rule.family
    if family is None:  # a normal choice
        return found.astype(info.dtype)
    if sites not in MOMENTS:
        return family.from_statistic(found).astype(info.dtype)
    if not family.linear:
        raise ModelError(
            f"recover: the mean of {info.address!r} ({info.distribution}) is not at hand; take sites='sample'"
        )
    return found


def restored(
    program: Program, given: Mapping[str, Given], found: Mapping[str, Any]
) -> dict[str, Any]:
    """The derived values that the program records, once the choices that were summed out are known."""
    code, args = program.code()
    entries = {**given, **{a: Given(v, checked=True) for a, v in found.items()}}
    _, records, _ = interpret(code.jaxpr, args, Whole("value"), None, unflatten(entries))
    table = program.sites
    return {
        a: r["value"]
        for a, r in flat_records(records)
        if a in table and table[a].kind == "deterministic"
    }
