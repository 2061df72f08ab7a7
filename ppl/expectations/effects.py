"""Values that know on which draws they depend, and along which axes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from weft.ppl.analysis.independence import Unaligned, align


@dataclasses.dataclass(frozen=True, eq=False)
class Effect:
    """The effect of draws on the costs that depend on them.

    Attributes:
        log_q: the log density, for every copy along leading axes of the draw. For draws of a scan it is, at every step,
            the sum up to that step.
        log_weight: the same for weights that also multiply the value.
        whole: for draws of a scan, the log density and the log weight of all steps. Values that read several steps have
            these.
        control: the baselines' part. It has mean zero and is subtracted from a cost once.
        learned: the sum of the baselines that learn, and of their squares.
    """

    log_q: Any
    log_weight: Any = None
    control: Any = 0.0
    learned: tuple[Any, Any] | None = None
    whole: tuple[Any, Any] | None = None

    def sum(self, part: str) -> Any:
        """The log density, or the log weight, of all draws."""
        if self.whole is not None:
            return self.whole[part == "log_weight"]
        return jnp.sum(getattr(self, part))

    @property
    def weighs(self) -> bool:
        return self.log_weight is not None

    @property
    def ndim(self) -> int:
        return jnp.ndim(self.log_q)


Places = tuple["int | None", ...]


class Node:
    """A value, the effects on which it depends (with the places of their axes), and how it was computed.

    If a relaxed draw determines an integer, ``relaxed`` is the same number as a float with derivatives.
    """

    __slots__ = ("deps", "eqn", "inputs", "number", "out", "relaxed", "value")
    made = itertools.count()

    def __init__(
        self,
        value: Any,
        deps: dict[Effect, Places] | None = None,
        eqn: Any = None,
        inputs: Sequence[Node] = (),
        out: int = 0,
        relaxed: Any = None,
    ) -> None:
        self.value, self.deps, self.relaxed = value, deps or {}, relaxed
        self.eqn, self.inputs, self.out = eqn, inputs, out
        self.number = next(Node.made)

    def total(self, part: str) -> Any:
        """The sum of one part of all effects. It has the axes of the value where these are kept apart."""
        found: Any = 0.0
        for effect, places in self.deps.items():
            x = getattr(effect, part)
            if x is None:
                continue
            if effect.whole is not None and places == (None,):
                x = effect.sum(part)
            elif x.ndim:
                x = jnp.sum(x, tuple(i for i, p in enumerate(places) if p is None))
                kept = [p for p in places if p is not None]
                x = jnp.transpose(x, sorted(range(len(kept)), key=kept.__getitem__))
                x = x.reshape([s if a in kept else 1 for a, s in enumerate(jnp.shape(self.value))])
            found = found + x
        return found


def effects_of(eqn: Any, inputs: Sequence[Node]) -> list[dict[Effect, Places]]:
    """The effects on which the results of an equation depend."""
    outs: list[dict[Effect, Places]] = [{} for _ in eqn.outvars]
    for effect in dict.fromkeys(e for n in inputs for e in n.deps):
        found: list[list[int | None]] = [[] for _ in eqn.outvars]
        gone = [False] * len(outs)
        for i in range(effect.ndim):
            places: list[int | None] = [
                n.deps[effect][i] if effect in n.deps else None for n in inputs
            ]
            mixed = any(effect in n.deps and n.deps[effect][i] is None for n in inputs)
            try:
                axes = [None] * len(outs) if mixed else align(eqn, places)
            except Unaligned:
                axes, mixed = [None] * len(outs), True
            for o, place in enumerate(axes):
                found[o].append(place)
                gone[o] |= place is None and not mixed  # does not read it at all
        for o in range(len(outs)):
            if not gone[o]:
                outs[o][effect] = tuple(found[o])
    return outs


def copywise(inputs: Sequence[Node], ndim: int) -> dict[Effect, Places]:
    """The effects on some values, for a draw that they determine copy by copy along leading axes."""
    found: dict[Effect, Places] = {}
    for effect in dict.fromkeys(e for n in inputs for e in n.deps):
        places: list[int | None] = []
        for i in range(effect.ndim):
            seen = {n.deps[effect][i] for n in inputs if effect in n.deps}
            place = seen.pop() if len(seen) == 1 else None
            places.append(place if place is not None and place < ndim else None)
        found[effect] = tuple(places)
    return found


def sums(effects: Sequence[Effect]) -> list[Any]:
    """The sums of log density, log weight, control and learned baselines over all effects."""
    zero = jnp.zeros(())
    log_q = sum((e.sum("log_q") for e in effects), zero)
    log_weight = sum((e.sum("log_weight") for e in effects if e.weighs), zero)
    control = sum((e.control for e in effects), zero)
    learned = [sum((e.learned[i] for e in effects if e.learned), zero) for i in range(2)]
    return [log_q, log_weight, control, *learned]


def is_precise(x: Any) -> bool:
    """Whether a value is real, with the digits of single precision. A score term in fewer would be rounded."""
    return is_real(x) and jnp.finfo(jnp.result_type(x)).bits >= 32


def is_real(x: Any) -> bool:
    """Whether a value may have a derivative."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
