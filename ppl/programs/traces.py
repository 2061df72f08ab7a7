"""Traces: the records of one execution of a program."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.addresses import unflatten
from weft.ppl.stage.interpreter import Handler, interpret
from weft.ppl.stage.modules import Noun
from weft.ppl.stage.records import Records, is_site_record
from weft.ppl.stage.staging import Code
from weft.ppl.stage.structure import SiteInfo, site_table

from . import printing


class Trace(printing.Printed, Noun):
    """One execution of a program.

    Attributes:
        choices: nested dict of the values of the choices.
        active: a tree like ``choices``, of booleans that say whether a choice counts. It does not count in a branch
            that was not taken, where a mask is false, and in unused steps of a loop. The booleans have the leading axes
            of the choice.
        derived: nested dict of the values that ``deterministic`` recorded.
        log_density: the log density of the choices, a scalar. It is not a number if the program has no known density:
            it holds hidden sites, or a ``while_loop`` with sites.
        value: the return value.
    """

    choices: dict[str, Any]
    active: dict[str, Any]
    derived: dict[str, Any]
    log_density: jax.Array
    value: Any

    def __repr__(self) -> str:
        return printing.trace(self)


@functools.lru_cache(maxsize=512)
def table_of(code: Code) -> dict[str, SiteInfo]:
    return site_table(code.jaxpr)


def run_program(
    code: Code,
    args: list[Any],
    handler: Handler,
    key: Any,
    given: dict[str, Any],
) -> tuple[Trace, dict[str, jax.Array]]:
    """Interpret a staged program and sort its records into a trace."""
    outs, records, terms = interpret(code.jaxpr, args, handler, key, given)
    choices, active, derived = sort_records(records, table_of(code))
    value = jax.tree.unflatten(code.out_tree, outs)
    return Trace(choices, active, derived, jnp.asarray(terms["log_density"]), value), terms


def sort_records(
    records: Records, table: dict[str, SiteInfo]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sort records into ``(choices, active, derived)``."""
    flat = dict(flat_records(records))
    choices = {a: r["value"] for a, r in flat.items() if table[a].kind == "sample"}
    active = {a: flat[a].get("active", jnp.ones((), bool)) for a in choices}
    derived = {a: r["value"] for a, r in flat.items() if table[a].kind == "deterministic"}
    return unflatten(choices), unflatten(active), unflatten(derived)


def flat_records(records: Records, prefix: str = "") -> Iterable[tuple[str, dict[str, Any]]]:
    for name, node in records.items():
        if is_site_record(node):
            yield prefix + name, node
        else:
            yield from flat_records(node, f"{prefix}{name}.")
