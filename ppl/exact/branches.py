"""The rule of ``cond``: every branch is walked, and its density counts where the branch is taken.

The branch index may be a table. Outputs are then tables, too. A density term of a branch becomes a factor that also
depends on the variables of the index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.programs.handlers import Free
from weft.ppl.stage.compat import cond_p
from weft.ppl.stage.cotangents import finite_cotangents
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.interpreter import Context
from weft.ppl.stage.keys import count_anonymous
from weft.ppl.stage.records import Records, is_site_record, look_up, recorded

from .choices import IMPOSSIBLE
from .factors import Factor, Scale
from .region import Lost, Region, addresses, rule
from .tables import Limit, Variable, apply, is_table, pieces, rebuilt, variables_of


@rule(cond_p)
def branches(
    region: Region, eqn: Any, ins: list[Any], context: Context
) -> tuple[list[Any], Records]:
    """The outputs and records of a cond."""
    index, *operands = ins
    limit, last = region.plan.limit, len(eqn.params["branches"]) - 1
    index = apply(lambda i: jnp.clip(i, 0, last), limit, index)
    guarded = [rebuilt(x, iter([finite_cotangents(a) for a, _ in pieces(x)])) for x in operands]
    plain = {id(g): x for g, x in zip(guarded, operands, strict=True) if not is_table(x)}
    outside, known, anonymous = region.read_later(context), {}, context.anonymous
    outs: list[list[Any]] = []
    records: list[Records] = []
    regions: list[Region] = []
    for branch in eqn.params["branches"]:
        inner = Region(region.plan, region.kept, outside, known)
        inner.keys, inner.placements = region.keys, region.placements
        found = inner.walk(branch, guarded, dataclasses.replace(context, anonymous=anonymous))
        inner.refuse_shared("a branch")
        _name_scales(inner, plain)
        anonymous += count_anonymous(branch)
        outs.append(found[0])
        records.append(found[1])
        regions.append(inner)
    _check_idle(region, eqn, context)
    created = [v for inner in regions for v in inner.created]
    _merge_priors(region, index, regions)
    scales = {v: f.scale for inner in regions for f in inner.factors for v in f.variables}
    for number, inner in enumerate(regions):
        _count(region, context, index, number, inner, created, scales)
    region.created += created
    return [_select(limit, index, values) for values in zip(*outs, strict=True)], _records(
        limit, index, records
    )


def _name_scales(inner: Region, plain: dict[int, Any]) -> None:
    """Scales as they were before the branch: those of sites that meet must be the same."""

    def named(x: Any) -> Any:
        return dataclasses.replace(x, scale=tuple(plain.get(id(s), s) for s in x.scale))

    inner.factors = [named(f) for f in inner.factors]
    inner.evidence = [named(f) for f in inner.evidence]
    inner.priors = {v: named(p) for v, p in inner.priors.items()}


def _count(
    region: Region,
    context: Context,
    index: Any,
    number: int,
    inner: Region,
    created: list[Variable],
    scales: dict[Variable, Scale],
) -> None:
    """Count the density of a branch where it is taken."""
    limit = region.plan.limit

    def here(i: Any, term: Any) -> Any:
        return jnp.where(i == number, term, 0)

    def weigh(factor: Factor) -> None:
        term = factor.as_table() if factor.variables else factor.table
        region.weigh(apply(here, limit, index, term), ("a branch",), factor.scale)

    for factor in inner.factors:
        weigh(factor)
    if not isinstance(inner.constant, float):  # else nothing was added, of no scale
        constant = apply(here, limit, index, jnp.asarray(inner.constant))
        region.weigh(constant, (*context.prefix, "a branch"))
    for evidence in (f.without_unit(limit) for f in inner.evidence):
        parts = [None if x is None else apply(here, limit, index, x) for x, _ in evidence.parts()]
        parts[1] = evidence.form.precision  # rows that are zero give nothing
        region.evidence.append(evidence.with_parts(parts))
    mine = {v for f in inner.factors for v in f.variables} | {v for v in created if v.normal}
    for variable in created:  # idle in this branch: it has its first value
        if variable not in mine:
            rest = jnp.where(jnp.arange(variable.num_values) == 0, 0.0, IMPOSSIBLE)
            rest = rest.reshape(-1, *(1,) * len(variable.plates))
            shape = (variable.num_values, *(p.size for p in variable.plates))
            scale = scales.get(variable, ())
            weigh(Factor(jnp.broadcast_to(rest, shape), (variable,), variable.plates, scale))


def _merge_priors(region: Region, index: Any, regions: list[Region]) -> None:
    """The priors of normal choices: that of the branch taken, and a standard normal law where a choice is idle."""
    limit = region.plan.limit
    for v in dict.fromkeys(v for inner in regions for v in inner.priors):
        found = [inner.priors.get(v) for inner in regions]
        first = next(f for f in found if f is not None)
        rooted = all(f is None or f.root is not None for f in found)
        shape = first.mean.shape if is_table(first.mean) else jnp.shape(first.mean)
        eye = jnp.broadcast_to(jnp.eye(shape[-1], dtype=first.mean.dtype), (*shape, shape[-1]))
        means = [jnp.zeros(shape, first.mean.dtype) if f is None else f.mean for f in found]
        if rooted:
            spreads = [eye if f is None else f.root for f in found]
        else:
            spreads = [eye if f is None else f.spread(limit) for f in found]
        parts = [_select(limit, index, means), _select(limit, index, spreads)]
        parts = [parts[0], *((parts[1], None) if rooted else (None, parts[1]))]
        region.priors[v] = first.with_parts(parts)


def _check_idle(region: Region, eqn: Any, context: Context) -> None:
    """Refuse latent choices that only some branches have. Where they are idle they would have no density."""
    if not region.kept.every_branch:
        return
    names = [recorded(b) for b in eqn.params["branches"]]
    for path in {p for found in names for p in found}:
        address = ".".join((*context.prefix, *path))
        latent = isinstance(look_up(context.given, path), Free)
        latent = latent or address in getattr(region.kept, "latents", ())
        if latent and not all(path in found for found in names):
            raise ModelError(
                f"{address!r} is a choice in some branches only of a cond that is summed over: let it stand in every "
                "branch, or before the cond"
            )


def _select(limit: Limit, index: Any, values: Sequence[Any]) -> Any:
    """The value from the branch that is taken."""
    lost = next((v for v in values if isinstance(v, Lost)), None)
    if lost is not None:
        return lost
    if all(v is values[0] for v in values):
        return values[0]

    def choose(i: Any, *xs: Any) -> Any:
        return jax.lax.select_n(jnp.broadcast_to(i, jnp.shape(xs[0])).astype(jnp.int32), *xs)

    return apply(choose, limit, index, *values)


def _records(limit: Limit, index: Any, records: list[Records]) -> Records:
    """One set of records for all branches, with flags for the branches that were taken."""
    merged: Records = {}
    for name in dict.fromkeys(n for r in records for n in r):
        nodes = [r.get(name) for r in records]
        first = next(n for n in nodes if n is not None)
        if not is_site_record(first):
            merged[name] = _records(limit, index, [n or {} for n in nodes])
            continue
        fill = {k: jnp.zeros_like(v) for k, v in first.items()}
        value = _select(limit, index, [(n or fill)["value"] for n in nodes])
        active: Any = True
        if any(n is None for n in nodes):
            taken = jnp.asarray([n is not None for n in nodes])
            active = apply(lambda i, t: t[i], limit, index, taken)
        if is_table(value) or is_table(active):
            raise ModelError(
                f"whether {name!r} is a choice at all depends on {addresses(variables_of([value, active]))}: a "
                "choice in a branch that is summed over must stand in every branch, or be observed"
            )
        merged[name] = {"value": value, "active": active}
    return merged
