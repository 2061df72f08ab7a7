"""Which sites read which others, as far as the staged program shows."""

from __future__ import annotations

from typing import Any

from weft.ppl.stage.compat import (
    Literal,
    cond_p,
    inner_jaxprs,
    open_jaxpr,
    scan_p,
    scan_sizes,
    while_p,
)
from weft.ppl.stage.control import eqn_holds_sites, estimated_p, scope_p
from weft.ppl.stage.sites import site_p

Taint = frozenset[str]


def site_inputs(jaxpr: Any) -> dict[str, Taint]:
    """For each site (choices and factors) the addresses of the choices that its parameters depend on.

    A site in a branch depends on what the predicate does; a deterministic record does not count.
    """
    found: dict[str, Taint] = {}
    _walk(jaxpr, None, frozenset(), (), found, {})
    return found


def predicates(jaxpr: Any) -> Taint:
    """Addresses of the choices that a branch index of sited control flow depends on."""
    collected: dict[str, Taint] = {}
    _walk(jaxpr, None, frozenset(), (), {}, collected)
    return frozenset().union(*collected.values()) if collected else frozenset()


def returned(jaxpr: Any) -> Taint:
    """Addresses of the choices that what a program returns is computed from."""
    return frozenset().union(*_walk(jaxpr, None, frozenset(), (), {}, {}))


def readers(jaxpr: Any, address: str) -> list[str]:
    """Addresses of the sites whose density depends on a choice; the choice itself, if at a later step of a scan."""
    return [a for a, read in site_inputs(jaxpr).items() if address in read]


def _walk(
    jaxpr: Any,
    inputs: list[Taint] | None,
    control: Taint,
    prefix: tuple[str, ...],
    found: dict[str, Taint],
    predicates: dict[str, Taint],
) -> list[Taint]:
    opened, _ = open_jaxpr(jaxpr)
    taint: dict[Any, Taint] = {}
    for i, v in enumerate(opened.invars):
        taint[v] = inputs[i] if inputs is not None else frozenset()

    def read(v: Any) -> Taint:
        return frozenset() if isinstance(v, Literal) else taint.get(v, frozenset())

    for eqn in opened.eqns:
        ins = [read(v) for v in eqn.invars]
        together = frozenset().union(*ins)
        outs = [together] * len(eqn.outvars)
        if eqn.primitive is site_p:
            spec = eqn.params["spec"]
            address = ".".join((*prefix, spec.name))
            if spec.kind != "deterministic":
                found[address] = found.get(address, frozenset()) | together | control
            if spec.kind == "sample":
                outs = [frozenset({address}) | control]
        elif eqn.primitive is estimated_p:
            names = [".".join((*prefix, *address)) for address, _ in eqn.params["sites"].value]
            found.update({a: found.get(a, frozenset()) | together | control for a in names})
            outs = [frozenset({a}) | control for a in names]
        elif eqn_holds_sites(eqn):
            outs = _inner(eqn, ins, control, prefix, found, predicates)
        for v, t in zip(eqn.outvars, outs, strict=True):
            taint[v] = t
    return [read(v) for v in opened.outvars]


def _inner(
    eqn: Any, ins: list[Taint], control: Taint, prefix: Any, found: Any, predicates: Any
) -> list[Taint]:
    params, primitive = eqn.params, eqn.primitive
    if primitive is scope_p and params["name"] is not None:
        return _walk(params["jaxpr"], ins, control, (*prefix, params["name"]), found, predicates)
    if primitive is cond_p:
        if ins[0]:
            predicates[str(id(eqn))] = predicates.get(str(id(eqn)), frozenset()) | ins[0]
        outs = [
            _walk(b, ins[1:], control | ins[0], prefix, found, predicates)
            for b in params["branches"]
        ]
        return [frozenset().union(ins[0], *o) for o in zip(*outs, strict=True)]
    if primitive is scan_p:
        consts, carry = scan_sizes(params)
        state = list(ins)
        while True:  # what the carry depends on grows until it does not
            outs = _walk(params["jaxpr"], state, control, prefix, found, predicates)
            grown = [
                a | b for a, b in zip(state[consts : consts + carry], outs[:carry], strict=True)
            ]
            if grown == state[consts : consts + carry]:
                return outs
            state[consts : consts + carry] = grown
    if primitive is while_p:
        return [frozenset().union(*ins)] * len(eqn.outvars)
    inner = inner_jaxprs(eqn)
    if len(inner) == 1 and len(open_jaxpr(inner[0])[0].invars) == len(ins):
        return _walk(inner[0], ins, control, prefix, found, predicates)
    return [frozenset().union(*ins)] * len(eqn.outvars)
