"""The density of a program with choices summed out, and the rule of its equation.

``marginalize`` stages one equation, ``marginal_p``, around the program. To a handler that scores, it is the program
without some of its choices. To a handler that recovers these choices, it is a function whose gradient gives them
(``recovery``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from weft.ppl.programs.handlers import Evaluate, Given
from weft.ppl.stage.control import marginal_p
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.interpreter import RULES, Context, Handler, Result, walk
from weft.ppl.stage.records import Records, look_up
from weft.ppl.stage.sites import Site
from weft.ppl.stage.structure import site_table

from . import branches, chains, choices, lanes  # noqa: F401  (their rules)
from .chain_laws import integrate_message
from .choices import IMPOSSIBLE
from .plan import Address, Options, Plan
from .region import Lost, Region, addresses
from .scores import Score, filled
from .semirings import Semiring, log_sum
from .tables import Entangled, Limit, Meeting, is_table

R = TypeVar("R")


class ReturnsChoice(ModelError):
    """The return value of a program depends on a choice that is summed out."""


def untangled(attempt: Callable[[frozenset[Meeting]], R]) -> R:
    """``attempt(together)``, where ``together`` are normal choices whose copies are integrated jointly.

    At first there are none. Choices whose copies turn out to meet are added until there are no more.
    """
    together: frozenset[Meeting] = frozenset()
    while True:
        try:
            return attempt(together)
        except Entangled as e:
            if not e.meeting or e.meeting <= together:
                raise
            together |= e.meeting


def score(
    eqn: Any,
    ins: list[Any],
    context: Context,
    semiring: Semiring = log_sum,
    filtering: bool = False,
    plans: list[Plan] | None = None,
    scaled: bool = True,
) -> tuple[list[Any], Records, jax.Array]:
    """The outputs, records and log density of a program with choices summed out.

    Args:
        eqn: the equation of ``marginal_p``.
        ins: its operands.
        context: its handler is that of the choices that are kept.
        semiring: the kind of sum.
        filtering: whether derivatives are those of filtering.
        plans: a list to which the plan is added.
        scaled: whether a sum counts as often as its sites are scaled.
    """
    options: Options = eqn.params["options"]
    targets = frozenset((*context.prefix, *a) for a in eqn.params["addresses"])

    def attempt(together: frozenset[Meeting]) -> tuple[list[Any], Records, jax.Array, Plan]:
        limit = Limit(options.max_terms)
        region = Region(
            Plan(targets, options, limit, semiring, filtering, together), context.handler
        )
        outs, records = region.walk(eqn.params["jaxpr"], ins, context)
        integrate_message(region)
        density = region.log_density(scaled)
        return outs, region.distribute(records, len(context.prefix)), density, region.plan

    outs, records, density, plan = untangled(attempt)
    if plans is not None:
        plans.append(plan)
    for out in outs:
        if isinstance(out, Lost):
            raise ModelError(out.why)
        if is_table(out):
            raise ReturnsChoice(
                f"the return value depends on {addresses(out.axes)}, which is summed out and has no value: return "
                "something else, and get it back with recover"
            )
    return outs, records, jnp.where(density < IMPOSSIBLE / 2, -jnp.inf, density)


# --- handlers ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Posterior(Handler):
    """The density of choices that are all given, by another sum over the rest. Its gradient recovers the rest."""

    semiring: Semiring = log_sum
    filtering: bool = False
    plans: list[Plan] = dataclasses.field(default_factory=list, compare=False)
    records = False

    def terms(self) -> dict[str, jax.Array]:
        return {"log_density": jnp.zeros(())}

    def site(self, site: Site, key: Any, given: Any) -> Any:
        value, _, terms = Evaluate(None).site(site, None, given)
        return value, None, {k: v for k, v in terms.items() if k == "log_density"}

    def equation(self, eqn: Any, ins: list[Any], context: Context) -> Result | None:
        if eqn.primitive is not marginal_p:
            return None
        # How often a sum counts is no part of the law of its choices.
        settings = self.semiring, self.filtering, self.plans
        outs, records, density = score(eqn, ins, context, *settings, scaled=False)
        return outs, records, {"log_density": density}


@dataclasses.dataclass(frozen=True)
class Whole(Evaluate):
    """An evaluation in which choices that were summed out are choices like all others."""

    def equation(self, eqn: Any, ins: list[Any], context: Context) -> Result | None:
        return walk(eqn.params["jaxpr"], ins, context) if eqn.primitive is marginal_p else None


# --- the rule ---------------------------------------------------------------------------------------------------------


def _marginal(eqn: Any, ins: list[Any], context: Context) -> Result:
    """Score, if all choices that are kept are known. Otherwise draw all choices, and score those that are kept."""
    handler, summed = context.handler, eqn.params["addresses"]
    inner = {tuple(a.split(".")): info for a, info in site_table(eqn.params["jaxpr"]).items()}
    kept = [
        look_up(context.given, a)
        for a, info in inner.items()
        if info.kind == "sample" and not info.observed and a not in summed
    ]
    drawing = look_up(context.keys, summed[0]) is not None
    known = (isinstance(g, Given) and (g.where is None or g.drop is not None) for g in kept)
    if not drawing or all(known):
        try:
            outs, records, density = score(eqn, ins, context)
            return outs, records, dict.fromkeys(handler.terms(), density)
        except ReturnsChoice:
            if not drawing:
                raise
    if not isinstance(handler, Evaluate):
        outs, records, terms = walk(eqn.params["jaxpr"], ins, context)
        return outs, _without(records, summed), terms
    drawn = dataclasses.replace(context, handler=dataclasses.replace(handler, record="value"))
    outs, records, _ = walk(eqn.params["jaxpr"], ins, drawn)
    records = _without(records, summed)
    given = filled(records, context.given)
    derived, density, rest = _scores(eqn, ins, dataclasses.replace(context, given=given))
    if any(g is not None for g in kept):
        # The draws of the summed-out choices ignore the data.
        unknown = [
            a
            for a, info in inner.items()
            if info.kind == "deterministic" and look_up(derived, a) is None
        ]
        records = _without(records, unknown)
    terms = {"log_density": density, "log_weight": density - rest}
    return outs, records if handler.records else {}, terms


def _scores(eqn: Any, ins: list[Any], context: Context) -> tuple[Records, jax.Array, jax.Array]:
    """The derived values, the density of all choices that are kept, and the density of those that were drawn."""
    _, derived, density = score(eqn, ins, dataclasses.replace(context, handler=Score()))
    rest = score(eqn, ins, dataclasses.replace(context, handler=Score(drawn=True)))[2]
    return derived, density, rest


RULES[marginal_p] = _marginal


def _without(records: Records, gone: Iterable[Address]) -> Records:
    """The records without those at some addresses."""
    for address in gone:
        records = _without_one(records, address)
    return records


def _without_one(records: Records, address: Address) -> Records:
    name, *rest = address
    if name not in records:
        return records
    if not rest:
        return {n: r for n, r in records.items() if n != name}
    return {**records, name: _without_one(records[name], tuple(rest))}
