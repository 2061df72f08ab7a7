r"""Recovery of the choices that were summed out: their posterior given all others.

Add numbers $w$ to the log density of each value of each choice. The log density of the marginalised program is then
$\log Z(w) = \log \sum_z \exp(\log p(x, z) + w_z)$. Its gradient by $w$ recovers the choices. What the gradient is
depends on the kind of sum:

- With logarithms of sums, it is the posterior probability of each value.
- With maxima, it is the indicator of the most probable configuration (for a chain: Viterbi 1967).
- With a sum whose derivative is defined as one random term, it is the indicator of an exact joint draw (for a chain:
  forward filtering, backward sampling).

One recursion serves all three; see ``elimination``.

For the covariance of a normal choice with posterior mean $c$, add $(z - c)^\top W (z - c)$ in place of a linear term.
The gradient by $W$, where it is zero, is the covariance itself.
"""

from __future__ import annotations

import math
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

COVARIANCES = {"covariances": "marginals", "filtered_covariances": "filtered"}
"""The kinds of recovery that give covariances, and those that give their means."""

MOMENTS = ("marginals", "filtered", *COVARIANCES)
"""The kinds of recovery that give probabilities, means and covariances, not values."""


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
            same for the choices in a scan, given the steps up to their own. ``"covariances"`` and
            ``"filtered_covariances"`` give the covariances that belong to these means, of normal choices only.
    """
    if sites in COVARIANCES:
        return _covariances(program, given, sites)
    table = summed_out(program.code()[0].jaxpr)
    start = {a: Weights(jnp.zeros(_form(s), jnp.result_type(float))) for a, s in table.items()}
    found, rules = _gradient(program, key, given, start, sites)
    return {a: _value(table[a], found[a].log_weights, rules.get(a), sites) for a in found}


def _gradient(
    program: Program,
    key: jax.Array | None,
    given: Mapping[str, Given],
    weights: dict[str, Weights],
    sites: str,
) -> tuple[dict[str, Weights], dict[str, Elimination]]:
    """The gradient of the log density by numbers that are added, and the rules by which choices are summed out."""
    code, args = program.code()
    handler = Posterior(SUMS[sites], sites == "filtered")
    keys = None
    if sites == "sample":
        assert key is not None
        keys = derive_keys(key_plan(code.jaxpr), key)

    def log_density(weights: dict[str, Weights]) -> jax.Array:
        entries = unflatten({**given, **weights})
        return interpret(code.jaxpr, args, handler, keys, entries)[2]["log_density"]

    found = jax.grad(log_density)(weights)
    return found, {a: rule for plan in handler.plans for a, rule in plan.rules.items()}


def _covariances(program: Program, given: Mapping[str, Given], sites: str) -> dict[str, Any]:
    """The covariances of the numbers of each element of normal choices."""
    table = summed_out(program.code()[0].jaxpr)
    kind, dtype = COVARIANCES[sites], jnp.result_type(float)
    start = {a: Weights(jnp.zeros(_form(s), dtype)) for a, s in table.items()}
    means, rules = _gradient(program, None, given, start, kind)
    normal = [a for a in table if (r := rules.get(a)) is not None and r.dimension is not None]
    if not normal:
        raise ModelError(
            f"recover: sites={sites!r} gives covariances of normal choices, and of {program.name!r} none is summed "
            "out; take sites='marginals'"
        )
    for a in normal:
        squares = jnp.zeros((*table[a].shape, *table[a].event_shape), dtype)
        centre = jax.lax.stop_gradient(means[a].log_weights)
        start[a] = Weights(start[a].log_weights, squares, centre)
    found, _ = _gradient(program, None, given, start, kind)
    return {a: _symmetric(found[a].squares, table[a]) for a in normal}


def _symmetric(squares: Any, info: SiteInfo) -> jax.Array:
    """The derivative by a symmetric matrix, from that by a matrix of which only the symmetric part counts."""
    d = math.prod(info.event_shape)
    matrices = squares.reshape(-1, d, d)
    matrices = (matrices + jnp.swapaxes(matrices, -1, -2)) / 2
    return matrices.reshape(squares.shape).astype(info.dtype)


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
