"""The density of choices that are all known, site by site."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.programs.handlers import Evaluate, Given, conditioned
from weft.ppl.stage.interpreter import Handler
from weft.ppl.stage.records import Records, is_site_record
from weft.ppl.stage.sites import Site


@dataclasses.dataclass(frozen=True)
class Filled:
    """A choice with a known value, and the part of it that was given."""

    value: Any
    given: Any


jax.tree_util.register_dataclass(Filled, ["value", "given"], [])


def filled(records: Records, given: dict[str, Any]) -> dict[str, Any]:
    """Entries of choices from their records, each with the part that was given."""
    return {
        name: Filled(node["value"], given.get(name))
        if is_site_record(node)
        else filled(node, given.get(name, {}))
        for name, node in records.items()
    }


@dataclasses.dataclass(frozen=True)
class Score(Handler):
    """The density of choices that are all known. With ``drawn``, the density of the parts that were not given."""

    drawn: bool = False
    records = False

    def terms(self) -> dict[str, jax.Array]:
        return {"log_density": jnp.zeros(())}

    def site(self, site: Site, key: Any, given: Any) -> Any:
        original = given.given if isinstance(given, Filled) else given
        if isinstance(given, Filled) and (original is None or original.drop is None):
            given = Given(given.value, checked=True)
        elif isinstance(given, Filled):
            given = original
        value, _, terms = Evaluate(None).site(site, None, given)
        if site.spec.kind == "deterministic":
            return value, {"value": value}, {}
        if not self.drawn:
            return value, None, {k: v for k, v in terms.items() if k == "log_density"}
        if site.spec.kind != "sample":
            return value, None, {}
        original = conditioned(site, original)
        if original is None:
            return value, None, {"log_density": terms["log_density"]}
        if original.where is None or original.drop is not None:
            return value, None, {}
        return value, None, {"log_density": jnp.where(original.where, 0, terms["log_density"])}
