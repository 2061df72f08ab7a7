"""Which sites read which other sites, as far as the staged program shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from weft.ppl.stage.compat import open_jaxpr
from weft.ppl.stage.control import addresses_of, eqn_holds_sites, scopes
from weft.ppl.stage.jaxprs import Place, flow
from weft.ppl.stage.sites import site_p
from weft.ppl.stage.wiring import wiring

Names = frozenset[str]
"""Addresses of choices: the abstract value of whatever depends on them."""


def site_inputs(jaxpr: Any) -> dict[str, Names]:
    """For each site (choice or factor), the addresses of the choices that its parameters depend on.

    A site in a branch depends on whatever the predicate depends on. Deterministic records are left out.
    """
    return _Follower(jaxpr).found


def predicates(jaxpr: Any) -> Names:
    """The addresses of the choices on which a branch index depends, in control flow with sites."""
    return _Follower(jaxpr).predicates


def returned(jaxpr: Any) -> Names:
    """The addresses of the choices from which the return value of a program is computed."""
    return _union(_Follower(jaxpr).results)


def readers(jaxpr: Any, address: str) -> list[str]:
    """The addresses of the sites whose density depends on a choice.

    The choice itself is among them if a later step of a scan reads it.
    """
    return [a for a, read in site_inputs(jaxpr).items() if address in read]


def _union(sets: Iterable[Names]) -> Names:
    return frozenset().union(*sets)


class _Follower:
    """The choices of a program, followed through its equations.

    Attributes:
        found: for each site, the choices that it reads.
        predicates: the choices that decide which branch with sites is taken.
        results: for each result, the choices that it depends on.
    """

    def __init__(self, jaxpr: Any) -> None:
        self.found: dict[str, Names] = {}
        self.predicates: Names = frozenset()
        ins = [frozenset()] * len(open_jaxpr(jaxpr)[0].invars)
        self.results = flow(jaxpr, ins, self.transfer, _union)

    def transfer(self, eqn: Any, ins: list[Names], place: Place) -> list[Names] | None:
        if not eqn_holds_sites(eqn):
            return [_union(ins)] * len(eqn.outvars)
        w = wiring(eqn)
        if w is not None and w.rounds is not None:
            if w.chooses is not None:
                self.predicates |= ins[w.chooses]
            return None
        kind = eqn.params["spec"].kind if eqn.primitive is site_p else "sample"
        here = () if kind == "deterministic" else addresses_of(eqn)
        names = [".".join((*scopes(place), *address)) for address in here]
        for name in names:
            self.found[name] = self.found.get(name, frozenset()) | _union(ins) | place.deciding
        if kind == "sample" and names:
            return [frozenset({name}) | place.deciding for name in names]
        # The choices of a while loop or an anonymous run are not recorded.
        return [_union(ins)] * len(eqn.outvars)
