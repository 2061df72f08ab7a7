"""The carry of a scan: whether it is Markov, and its leaves by their names in the source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from weft.ppl.stage.compat import open_jaxpr
from weft.ppl.stage.control import addresses_of, is_record
from weft.ppl.stage.jaxprs import Place, flow

_STEP, _EARLIER = frozenset(["step"]), frozenset(["earlier"])


def is_markov(body: Any, num_consts: int, num_carry: int) -> bool:
    """Whether the carry holds nothing random of earlier steps except what the step's own choices replace.

    Slots that no choice reaches, such as counters, do not count.
    """

    def transfer(eqn: Any, ins: list[frozenset[str]], _: Place) -> list[frozenset[str]] | None:
        chosen = addresses_of(eqn) and not is_record(eqn)
        return [_STEP] * len(eqn.outvars) if chosen else None

    num_xs = len(open_jaxpr(body)[0].invars) - num_consts - num_carry
    carry = [frozenset()] * num_carry
    while True:
        ins = [*[frozenset()] * num_consts, *carry, *[frozenset()] * num_xs]
        outs = flow(body, ins, transfer, lambda sets: frozenset().union(*sets))[:num_carry]
        grown = [_EARLIER if out else x for x, out in zip(carry, outs, strict=True)]
        if grown == carry:
            return not any(out >= _EARLIER for out in outs)
        carry = grown


def names_of(body: Any) -> list[str]:
    """The names in the source of what a step reads; empty strings where they are not known."""
    jaxpr = open_jaxpr(body)[0]
    debug = getattr(jaxpr, "debug_info", None)
    names = [str(n or "") for n in getattr(debug, "arg_names", None) or ()]
    return names if len(names) == len(jaxpr.invars) else [""] * len(jaxpr.invars)


def named(names: Sequence[str], values: Sequence[Any]) -> Any:
    """Leaves by their names in the source, as the pytree from which they came: tuples, dicts, and attributes as a dict.

    Without names, or if the names are no paths into one argument, it is a tuple of the leaves, or the only leaf.
    """
    paths = [_PART.findall(n[len(head(n)) :]) for n in names]
    if len({head(n) for n in names}) != 1 or not all(names):
        return values[0] if len(values) == 1 else tuple(values)
    return _nest([[(a or None, b or c) for a, b, c in p] for p in paths], list(values))


_PART = re.compile(r"\[(\d+)\]|\['([^']*)'\]|\.(\w+)")


def head(name: str) -> str:
    """The argument in which a leaf stands."""
    return re.split(r"[\[.]", name, maxsplit=1)[0]


def _nest(paths: list[Any], values: list[Any]) -> Any:
    if len(paths) == 1 and not paths[0]:
        return values[0]
    groups: dict[Any, tuple[list[Any], list[Any]]] = {}
    for (first, *rest), value in zip(paths, values, strict=True):
        places, inside = groups.setdefault(first, ([], []))
        places.append(rest)
        inside.append(value)
    built = {key: _nest(*group) for key, group in groups.items()}
    if all(number is not None for number, _ in built):
        return tuple(built[k] for k in sorted(built, key=lambda k: int(k[0])))
    return {name: value for (_, name), value in built.items()}
