"""Panels: a scan under ``jax.vmap``, taken apart into what all series share and the program of one series.

A series is one index of the batch axis, here called a lane. ``jax.vmap`` has batched the equations between the sites of
a lane, and only the sites still tell their lanes. Batch-axis propagation (``ppl/analysis/independence.py``) gives the
program of lane ``l`` back. For every equation that reads a choice of a lane, it proves where the results carry the axis
of the lanes, and that index ``l`` there reads index ``l`` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from weft.ppl.analysis.independence import Unaligned, align
from weft.ppl.programs.programs import Program
from weft.ppl.stage.compat import Literal, bind, open_jaxpr, where_in_source
from weft.ppl.stage.control import eqn_holds_sites, eqn_site_names, is_record, lanes_p
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.jaxprs import Holds, Place, evaluate, results, run, spread
from weft.ppl.stage.primitives import BATCHED, ELEMENTWISE
from weft.ppl.stage.sites import site_p
from weft.ppl.stage.staging import Code, stage
from weft.ppl.stage.wiring import inside, is_call, is_loop
from weft.ppl.transforms.rewriting import bind_marginal

from .cutting import holds_scan, inlined


class Series(eqx.Module):
    """A panel in two parts: what all lanes share, and one lane.

    Attributes:
        shared: a program with the sites outside of the lanes. It returns what the lanes read.
        code: the code of one lane, as a function of its index and of what `shared` returns.
        size: the number of lanes.
        addresses: the addresses of the sites of a lane. Their first axis is that of the lanes.
        scanned: those of them that are in the scan.
        name: the name of the program.
    """

    shared: Program
    code: Code
    consts: list[Any]
    size: int = eqx.field(static=True)
    addresses: tuple[str, ...] = eqx.field(static=True)
    scanned: tuple[str, ...] = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def lane(self, index: Any, values: list[Any]) -> Program:
        """The program of one lane, given what `shared` returned."""
        return Program.of_code(self.code, [*self.consts, index, *values], self.name)


def series(
    program: Program, observed: Collection[str], settled: Collection[str], scan: str | None = None
) -> Series | None:
    """Take apart a program whose scan with the observations stands under a vmap. None if the scan does not.

    Args:
        program: the program.
        observed: the dotted addresses of observed choices. Factors count as observed.
        settled: the addresses of choices all of whose elements are known. Sites that read no other choice are shared.
        scan: an address in the scan that is meant.

    Raises:
        ModelError: if a site reads the choices of several lanes.
    """
    code, args = program.staged().code()
    if not _holds_lanes(code.jaxpr):
        return None
    flat, args, sums = inlined(code.jaxpr, args)
    jaxpr, _ = open_jaxpr(flat.jaxpr)
    factors = {a for a, s in program.sites.items() if s.kind == "factor" or s.observed}
    wanted = {*observed, *factors} if scan is None else {scan}
    held = [e for e in jaxpr.eqns if eqn_holds_sites(e) and wanted & set(eqn_site_names(e))]
    scans = [e for e in held if e.primitive is lanes_p and holds_scan.at(e)]
    if not scans or any(map(is_loop, held)):
        return None
    sizes = sorted({e.params["lanes"][-1].size for e in scans})
    if len(sizes) > 1:
        raise ModelError(
            f"filtering: {program.name!r} has scans with observations under vmaps of sizes {sizes}: choose one by an "
            "address in it, filtering(scan=...)"
        )
    walk = _Walk(jaxpr, scans, sizes[0], set(settled) | factors, program.name)
    reads = list(walk.reads)
    names = [n for e in walk.own for n in eqn_site_names(e)]

    def first(*xs: Any) -> list[Any]:
        return results(walk.shared, dict(zip(jaxpr.invars, xs, strict=True)), reads)

    shared_code, shared_consts = stage(first, args)
    shared = Program.of_code(shared_code, [*shared_consts, *args], program.name)
    lane: Any = functools.partial(_lane, walk)
    for eqn in sums:
        addresses = eqn.params["addresses"]
        outside = [a for a in map(".".join, addresses) if a not in names]
        if outside:
            raise ModelError(
                f"filtering: {program.name!r} sums out {', '.join(map(repr, outside))}, which its series share: leave "
                "them in"
            )
        lane = functools.partial(_without, lane, addresses, eqn.params["options"])
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in reads]
    lane_code, consts = stage(lane, [jnp.int32(0), *avals])
    scanned = tuple(n for e in scans for n in eqn_site_names(e))
    return Series(shared, lane_code, consts, walk.size, tuple(names), scanned, program.name)


_holds_lanes = Holds(
    lambda eqn: eqn.primitive is lanes_p and holds_scan.at(eqn) and eqn_holds_sites(eqn)
)
"""Whether a scan with sites stands under a vmap anywhere."""


def _without(lane: Any, addresses: Any, options: Any, *xs: Any) -> list[Any]:
    return bind_marginal(lane, list(xs), addresses, options)


# --- which equations belong to the lanes ------------------------------------------------------------------------------


SHARED: Any = object()
"""The abstract value of what is computed without a choice of a lane."""


class _Mixed(NamedTuple):
    """The abstract value of what is computed from several lanes, and how. It may not reach a density."""

    why: str


class _Walk:
    """The equations of a program, sorted into those of its lanes and the others, by a forward analysis.

    A variable is ``SHARED``, or ``_Mixed``, or the lanes' own. Of their own variables it is known where they carry the
    axis of the lanes (None if they do not).

    Attributes:
        shared: the equations that read no choice of a lane.
        own: the others, in order, if they can be computed for one lane.
        reads: the shared values that the lanes read, in order.
    """

    def __init__(
        self, jaxpr: Any, scans: list[Any], size: int, settled: set[str], name: str
    ) -> None:
        self.scans, self.size, self.name, self.settled = scans, size, name, settled
        self.shared: list[Any] = []
        self.own: list[Any] = []
        self.reads: dict[Any, None] = {}
        spread(jaxpr.eqns, {}, self._transfer, lambda _: SHARED)

    def _transfer(self, eqn: Any, ins: list[Any], _: Place) -> list[Any]:
        begins = any(e is eqn for e in self.scans) or self._draws(eqn)
        if not begins and all(x is SHARED for x in ins):
            self.shared.append(eqn)
            return [SHARED] * len(eqn.outvars)
        why = next((x.why for x in ins if isinstance(x, _Mixed)), None)
        if why is None:
            try:
                found = self._place(eqn, [None if x is SHARED else x for x in ins])
            except Unaligned as e:
                what = repr(eqn.primitive.name)
                if eqn_holds_sites(eqn):
                    what = ", ".join(map(repr, eqn_site_names(eqn)))
                why = f"{what}{where_in_source(eqn)} {e}"
            else:
                self.own.append(eqn)
                read = zip(eqn.invars, ins, strict=True)
                self.reads.update(
                    (v, None) for v, x in read if x is SHARED and not isinstance(v, Literal)
                )
                return list(found)
        if eqn_holds_sites(eqn) and not is_record(eqn):
            names = ", ".join(map(repr, eqn_site_names(eqn)))
            raise ModelError(
                f"filtering: the {self.size} series of {self.name!r} are not independent, so they cannot have a filter "
                f"each: {names} would read several ({why}). Draw in each series what it reads; what they share must be "
                "given, and drawn outside of their vmap"
            )
        return [_Mixed(why)] * len(eqn.outvars)

    def _is_lane(self, eqn: Any) -> bool:
        lanes = eqn.params["lanes"] if eqn.primitive in (site_p, lanes_p) else ()
        return bool(lanes) and lanes[-1].size == self.size

    def _draws(self, eqn: Any) -> bool:
        """Whether an equation of the lanes makes an unknown choice."""
        return self._is_lane(eqn) and any(
            n not in self.settled for n in eqn_site_names(eqn) if not is_record(eqn)
        )

    def _place(self, eqn: Any, places: list[int | None]) -> list[int | None]:
        """The place of the lanes' axis in the results of an equation."""
        if not eqn_holds_sites(eqn):
            return align(eqn, places)
        if not self._is_lane(eqn):
            raise Unaligned("stands outside of their vmap")
        mapped = eqn.params["lanes"][-1].mapped
        if any(p is not None and (p != 0 or not m) for p, m in zip(places, mapped, strict=True)):
            raise Unaligned("reads the whole axis of the series")
        return [0] * len(eqn.outvars)


# --- one lane ---------------------------------------------------------------------------------------------------------


class _Own(NamedTuple):
    """The part of an array that belongs to one lane: its own index along the axis at a place."""

    value: Any
    place: int


def _lane(walk: _Walk, index: Any, *values: Any) -> list[Any]:
    """Run the equations of one lane. It returns nothing."""

    def equation(eqn: Any, ins: list[Any]) -> list[Any]:
        sited = eqn_holds_sites(eqn)
        if is_call(eqn) and not sited:
            return evaluate(inside(eqn)[0], ins, equation)
        at = [x.place if isinstance(x, _Own) else None for x in ins]
        own = [x.value if isinstance(x, _Own) else x for x in ins]
        if sited:
            outs, places = _sited(eqn, own, at, index), [0] * len(eqn.outvars)
        else:
            places = align(eqn, at)
            outs = _one_of(eqn, own, at, places, walk.size, index)
        return [x if p is None else _Own(x, p) for x, p in zip(outs, places, strict=True)]

    run(walk.own, dict(zip(walk.reads, values, strict=True)), equation)
    return []


def _sited(eqn: Any, ins: list[Any], at: list[int | None], index: Any) -> list[Any]:
    """Run an equation with sites, for one lane."""
    *inner, outer = eqn.params["lanes"]
    own = [
        jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False) if m and p is None else x
        for x, p, m in zip(ins, at, outer.mapped, strict=True)
    ]
    if inner or eqn.primitive is site_p:
        return eqn.primitive.bind(*own, **{**eqn.params, "lanes": tuple(inner)})
    return evaluate(eqn.params["jaxpr"], own)


def _one_of(
    eqn: Any, ins: list[Any], at: list[int | None], out: list[int | None], size: int, index: Any
) -> list[Any]:
    """Run an equation that keeps lanes apart: one lane of the results, from one lane of the operands."""

    def take(x: Any, axis: int | None) -> Any:
        if axis is None or jnp.ndim(x) <= axis:
            return x
        return jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False)

    name, target = eqn.primitive.name, out[0]
    if name in ELEMENTWISE and target is not None and set(out) == {target}:
        # A scalar beside arrays (of select_n, clamp) is the same for all lanes.
        return bind(
            eqn, [take(x, target) if p is None else x for x, p in zip(ins, at, strict=True)]
        )
    # One lane in the place of all of them: for what is asked of the others, they are all alike.
    resized = _RESIZED.get(name)
    alone = name in _SINGLE and len(ins) == 1 and target is not None
    times = 1 if alone else size
    if alone and resized is not None and target is not None:
        sizes = list(eqn.params[resized])
        sizes[target] = 1
        eqn = eqn.replace(params={**eqn.params, resized: tuple(sizes)})
    wide = [
        x if p is None else jnp.repeat(jnp.expand_dims(x, p), times, p)
        for x, p in zip(ins, at, strict=True)
    ]
    found = bind(eqn, wide)
    if times == 1:
        return [jnp.squeeze(x, p) for x, p in zip(found, out, strict=True)]
    return [take(x, p) for x, p in zip(found, out, strict=True)]


_RESIZED = {"broadcast_in_dim": "shape", "reshape": "new_sizes"}
_SINGLE = BATCHED | {*_RESIZED, "transpose", "squeeze", "reduce_sum", "reduce_max", "reduce_min"}
"""Equations of one operand that may be had of one lane alone, their parameters as they are but for one size."""
