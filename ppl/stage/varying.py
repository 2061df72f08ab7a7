"""What differs from shard to shard in the body of a ``jax.shard_map``, and which choices may read it.

A choice that all shards share must not read a part of the rows. Choices along the rows may read their own shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .control import eqn_holds_sites, eqn_site_names, lanes_p, scopes
from .errors import ModelError
from .jaxprs import Place, equations, flow
from .sites import site_p
from .splits import Split
from .wiring import kind, wiring

SAME = {"psum": "axes", "pmax": "axes", "pmin": "axes", "all_gather": "axis_name"}
"""Collectives whose result is the same on all shards along axes of the mesh, and the parameter that names those."""


_CASTS = {"pvary", "pcast", "reshard"}
"""Primitives that change the type of a value over a mesh, and not the value."""

_TYPED = {"psum_invariant": "psum"}
"""Primitives that JAX names otherwise if it knows along which mesh axes their operands vary."""


def refuse_read_types(typed: Any, untyped: Any) -> None:
    """Refuse a program that computes something else if JAX does not infer which values are the same on all shards.

    JAX sums a derivative by such a value over the mesh. It takes draws for such values, before they have any.

    Args:
        typed: the program, staged with that inference.
        untyped: the same program, staged without it.
    """

    def operations(jaxpr: Any) -> list[Any]:
        """The operations and loops of a jaxpr. Calls are left out, since what they hand on may differ."""
        found = [
            (e.primitive.name, [v.aval.shape for v in e.outvars] if wiring(e) is None else kind(e))
            for e, _ in equations(jaxpr)
        ]
        return [
            (_TYPED.get(name, name), what)
            for name, what in found
            if name not in _CASTS and what != "call"
        ]

    found = [operations(jaxpr) for jaxpr in (typed, untyped)]
    if found[0] != found[1] and any(name == "psum" for name, _ in found[0] + found[1]):
        raise ModelError(
            "what a program with sites in a shard_map computes depends on which values JAX takes to be the same on "
            "all shards, as jax.grad does in a shard_map: it sums a derivative by such a value over the mesh. JAX "
            "cannot tell which draws are such values. Call jax.shard_map with check_vma=False. A derivative is then "
            "that of one shard, and jax.lax.psum of it that of all"
        )


def mesh_axes(eqn: Any) -> frozenset[str]:
    """The mesh axes along which all shards have the same result of a collective."""
    if eqn.params.get("axis_index_groups") is not None:
        return frozenset()
    over = eqn.params[SAME[eqn.primitive.name]]
    return frozenset(over if isinstance(over, (tuple, list)) else (over,))


def listed(eqn: Any) -> str:
    """The sites in an equation, for messages."""
    names = eqn_site_names(eqn)
    return ("site " if len(names) == 1 else "sites ") + ", ".join(map(repr, names))


Mixed = frozenset[tuple[str, str]]
"""The mesh axes over which a value differs from shard to shard, each with the choice that makes it differ, if any."""


def refuse_mixed(
    body: Any, ins: Sequence[Sequence[Split]], outs: Sequence[Sequence[Split]]
) -> None:
    """Refuse choices that read a part of the rows as if it were all rows, and results that return such a part."""

    def join(values: Sequence[Mixed]) -> Mixed:
        return frozenset().union(*values)

    def transfer(eqn: Any, values: list[Mixed], place: Place) -> list[Mixed] | None:
        name, params = eqn.primitive.name, eqn.params
        around = [a for e, _ in place.around if e.primitive is lanes_p for a in _axes(e)]
        if name in SAME:
            over = mesh_axes(eqn)
            for axis in sorted(over & set(around)):
                raise ModelError(
                    f"{name} over {axis!r} stands in a jax.vmap over rows that are split over it, with "
                    f"{listed(place.around[0][0])}: it would combine one row of each shard. Move it out of the vmap"
                )
            return [frozenset(t for t in x if t[0] not in over) for x in values]
        if name == "axis_index":
            return [frozenset({(params["axis_name"], "")})]
        if kind(eqn) == "branches" and eqn_holds_sites(eqn):
            _refuse_parts(listed(eqn), "stands in a branch that is chosen by", values[0], around)
        if eqn.primitive is not site_p:
            return None
        site = ".".join((*scopes(place), params["spec"].name))
        own = [*around, *_axes(eqn)]
        if len(set(own)) < len(own):
            raise ModelError(
                f"site {site!r}: two of its axes are split over the same axis of the mesh, so that a shard has only a "
                "part of their pairs. Gather one of them first (jax.lax.all_gather)"
            )
        _refuse_parts(f"site {site!r}", "reads", join(values), own)
        _refuse_one_row(site, eqn, join(values))
        return [join(values) | {(a, site) for a in own}]

    first = [frozenset((a, "") for split in spec for a in split.axes) for spec in ins]
    results = flow(body, first, transfer, join)
    for k, (value, spec) in enumerate(zip(results, outs, strict=True)):
        covered = {a for split in spec for a in split.axes}
        for axis, site in sorted(value):
            if site and axis not in covered:
                raise ModelError(
                    f"result {k} of a shard_map depends on the choices {site!r} of one shard along {axis!r}, and its "
                    f"out_specs say that it is the same on all: mention {axis!r} there, or reduce it (jax.lax.psum)"
                )


def _refuse_parts(who: str, does: str, value: Mixed, allowed: Sequence[str]) -> None:
    for axis, site in sorted(value):
        if axis not in allowed:
            what = f"the choices {site!r}" if site else "rows"
            raise ModelError(
                f"{who} in a shard_map {does} what depends on {what} of one shard along {axis!r}, but all shards share "
                "it. Put it under jax.vmap over the rows, or reduce what it reads over all shards first (jax.lax.psum)"
            )


def _refuse_one_row(site: str, eqn: Any, value: Mixed) -> None:
    """Refuse a batch axis of size one that may be the single row of a shard, or one choice that its row meets."""
    varies, spec = {axis for axis, _ in value}, eqn.params["spec"]
    for size, split in zip(spec.shape, spec.split, strict=False):
        if size == 1 < split.shards and varies.isdisjoint(split.axes):
            raise ModelError(
                f"site {site!r}: a shard has one row, and nothing tells whether the site's batch axis of size 1 goes "
                "along the rows. If it does, draw one row at a time: jax.vmap(lambda x: sample(name, ...))(rows). If "
                "it does not, draw the choice outside of the shard_map"
            )


def _axes(eqn: Any) -> list[str]:
    """The mesh axes over which a site or lanes are split."""
    splits = [lane.split for lane in eqn.params["lanes"]]
    splits += eqn.params["spec"].split if "spec" in eqn.params else ()
    return [a for split in splits for a in split.axes]
