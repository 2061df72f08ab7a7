"""What a site gives when a program is simulated, scored or conditioned, and what may be given at a site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from weft.ppl.stage.errors import AddressError, DensityError
from weft.ppl.stage.interpreter import Context, Handler, interpret, walk_while
from weft.ppl.stage.records import Records, at_addresses, look_up
from weft.ppl.stage.sites import Site

from .traces import run_program


class Given(eqx.Module):
    """A given choice.

    Attributes:
        value: its value.
        where: the elements that are given; all if None.
        drop: if it is not None, the other elements do not count: they are no latent choice and have no density.
        checked: whether the value is known to be in the site's support, and the support depends on no other choice.
    """

    value: Any
    where: Any = None
    drop: Any = None
    checked: bool = eqx.field(static=True, default=False)


class Free(NamedTuple):
    """A latent choice by its unconstrained value ``z``. Where ``where`` is true the choice is given as ``value``."""

    z: Any
    value: Any = None
    where: Any = None


def conditioned(site: Site, given: Any) -> Any:
    """The entry that is given at a site. It includes values that ``condition`` has fixed there."""
    if "value" not in site.parts:
        return given
    value = site.part("value")
    if "observed" not in site.parts:
        return Given(value)
    where = site.part("observed")
    if given is None:
        return Given(value, where)
    if isinstance(given, Free):
        return Free(given.z, value, where)
    return Given(jnp.where(expand(where, value), value, given.value))


def expand(where: Any, value: jax.Array) -> jax.Array:
    """Broadcast a mask of batch shape over the event axes of a value."""
    where = jnp.asarray(where)
    return where.reshape(where.shape + (1,) * (value.ndim - where.ndim))


@dataclasses.dataclass(frozen=True)
class Evaluate(Handler):
    """Simulate, score, or anything between: given choices are taken, and the others are drawn.

    The terms are ``log_density``, the log density of all choices, and ``log_weight``, that of the given choices.

    Attributes:
        record: ``"value"``, ``"log_density"`` or None.
        drawn: the function that draws a site. An expectation marks its draws here.
    """

    record: str | None = "value"
    drawn: Callable[[Site, Any], jax.Array] = Site.draw

    @property
    def records(self) -> bool:  # type: ignore[override]
        return self.record is not None

    def terms(self) -> dict[str, jax.Array]:
        return {"log_density": jnp.zeros(()), "log_weight": jnp.zeros(())}

    def site(
        self, site: Site, key: Any, given: Any
    ) -> tuple[jax.Array, dict[str, Any] | None, dict[str, Any]]:
        if site.spec.kind == "deterministic":
            value = site.part("value")
            return value, {"value": value} if self.record == "value" else None, {}
        if site.spec.kind == "factor":
            weight = site.part("weight")
            counted = site.weigh(weight)
            terms = {"log_density": counted, "log_weight": counted}
            return weight, {"value": counted} if self.record == "log_density" else None, terms
        fixed = "value" in site.parts
        given = conditioned(site, given)
        value = self.value(site, key, given)
        if site.spec.hidden and not fixed:  # the density of what is not recorded is not known
            return value, None, {"log_density": jnp.nan, "log_weight": 0.0}
        if "where" in site.parts or (given is not None and given.drop is not None):
            site = site.guarded()
        inside = given is None or given.checked
        log_prob = site.weigh(site.log_prob(value) if inside else site.log_prob_anywhere(value))
        terms = {}
        if given is None:
            terms["log_density"] = log_prob
        else:
            seen = log_prob if given.where is None else jnp.where(given.where, log_prob, 0)
            log_prob = seen if given.drop is not None else log_prob
            terms = {"log_weight": seen, "log_density": log_prob}
        if self.record is None or (
            fixed and "observed" not in site.parts and self.record == "value"
        ):
            return value, None, terms
        record = {"value": value if self.record == "value" else log_prob}
        if "where" in site.parts:
            where = site.over_lanes(
                lambda p: jnp.broadcast_to(p["where"], jnp.shape(log_prob)[len(site.lanes) :])
            )
            record["active"] = where
        return value, record, terms

    def value(self, site: Site, key: Any, given: Given | None) -> jax.Array:
        if given is not None and (given.where is None or given.drop is not None):
            return jnp.asarray(given.value).astype(site.spec.dtype)
        if key is None:
            raise AddressError(
                f"the choice {'.'.join(site.address)!r} is missing and there is no key to draw it with"
            )
        value = self.draw(site, key)
        if given is None:
            return value
        return jnp.where(
            expand(given.where, value), jnp.asarray(given.value).astype(value.dtype), value
        )

    def draw(self, site: Site, key: Any) -> jax.Array:
        if site.spec.unsampled:
            raise DensityError(
                f"site {'.'.join(site.address)!r}: {site.spec.label} cannot be sampled ({site.spec.unsampled}); it can "
                "stand in a target, where its choice is given or inferred"
            )
        return self.drawn(site, key)

    def anonymous(self, eqn: Any, args: list[Any], key: Any) -> tuple[list[Any], dict[str, Any]]:
        if key is None:
            raise DensityError(
                "the program runs another one in place (draw), whose choices have no address, so its density is not "
                "known without a key; nest it with sample(name, program) instead"
            )
        structure = eqn.params.get("given")
        num_given = 0 if structure is None else structure.num_leaves
        args, leaves = args[: len(args) - num_given], args[len(args) - num_given :]
        given = {} if structure is None else jax.tree.unflatten(structure, leaves)
        handler = dataclasses.replace(self, record="value")
        trace, terms = run_program(eqn.params["jaxpr"], args, handler, key, given)
        return jax.tree.leaves((trace, terms["log_weight"])), {"log_density": jnp.nan}

    def estimated(
        self, eqn: Any, args: list[Any], context: Context
    ) -> tuple[list[Any], Records, dict[str, Any]]:
        params = eqn.params
        sites = params["sites"].value
        key = context.keys.get(sites[0][0][0])
        if key is None:
            raise DensityError(_NO_KEY.format(name=params["name"]))
        arrays, factor = (args[:-1], args[-1]) if params["scaled"] else (args, None)
        first, second = params["consts"]
        operands = arrays[first + second :]
        given = [look_up(context.given, address) for address, _ in sites]
        inside = dataclasses.replace(self, record=None)
        if all(g is None for g in given):
            outs, _, _ = interpret(params["simulate"], [*arrays[:first], *operands], inside, key)
            *values, density = outs
        elif all(g is not None and g.where is None for g in given):
            values = [
                jnp.asarray(g.value).astype(i.dtype) for g, (_, i) in zip(given, sites, strict=True)
            ]
            own = arrays[first : first + second]
            outs, _, _ = interpret(params["score"], [*own, *operands, *values], inside, key)
            (density,) = outs
        else:
            absent = [
                a
                for g, (a, _) in zip(given, sites, strict=True)
                if g is None or g.where is not None
            ]
            raise DensityError(
                f"the choices of {params['name']!r} have one estimated density together: give all of them, or none; "
                f"{', '.join(repr('.'.join((*context.prefix, *a))) for a in absent)} not given, or in part"
            )
        density = density if factor is None else density * factor
        terms = {"log_density": density}
        if given[0] is not None:
            terms["log_weight"] = density
        if self.record is None:
            return values, {}, terms
        shown = values
        if self.record == "log_density":  # one number for all of them: it stands at the first
            shown = [density, *(jnp.zeros_like(density) for _ in sites[1:])]
        return values, at_addresses(eqn, [{"value": v} for v in shown]), terms

    def loop(
        self, eqn: Any, args: list[Any], context: Context
    ) -> tuple[list[Any], Records, dict[str, Any]]:
        outs, records, _ = walk_while(
            eqn, args, dataclasses.replace(context, handler=dataclasses.replace(self, record=None))
        )
        return outs, records, {"log_density": jnp.nan, "log_weight": 0.0}


_NO_KEY = (
    "the density of {name!r} is estimated with draws of its own, which take a key: log_density(choices, key), or "
    "estimate_log_density(key, choices); inside expect(...) the key is that of the expectation"
)
