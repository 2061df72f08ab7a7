"""How control flow is wired: which jaxprs an equation holds, and how its operands and results become theirs.

This is the one table of control-flow primitives. A new one is one more rule here. An equation without a rule is a plain
operation, whatever jaxprs are among its parameters: its results depend on all of its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .compat import inner_jaxprs, scan_sizes
from .primitives import rules

CALLS = {
    "jit": "plain",
    "pjit": "plain",
    "closed_call": "plain",
    "core_call": "plain",
    "checkpoint": "checkpoint",
    "remat": "checkpoint",
    "remat2": "checkpoint",
    "custom_jvp_call": "derivative",
    "custom_vjp_call": "derivative",
    "custom_vjp_call_jaxpr": "derivative",
}
"""The primitives that evaluate one jaxpr once, on all of their operands, by name.

A ``"checkpoint"`` evaluates it once more in the reverse pass. A ``"derivative"`` states a derivative of its own, which
the jaxpr does not tell: dependence may be read off the jaxpr, but an evaluation must bind the equation as it is.
"""


def is_call(eqn: Any) -> bool:
    """Whether an equation may be replaced by the equations inside it, with the same values and derivatives."""
    return CALLS.get(eqn.primitive.name) in ("plain", "checkpoint")


def is_checkpoint(eqn: Any) -> bool:
    """Whether an equation is a call that saves memory in the reverse pass. Inlining it would lose that."""
    return CALLS.get(eqn.primitive.name) == "checkpoint"


def states_derivative(eqn: Any) -> bool:
    """Whether an equation has a custom derivative, other than that of the jaxpr inside it."""
    return CALLS.get(eqn.primitive.name) == "derivative"


class Body(NamedTuple):
    """A jaxpr inside an equation.

    Attributes:
        jaxpr: the jaxpr, open or closed.
        reads: for each of its inputs, the index of the operand that gives its first value.
        gives: for each of its outputs, the index of the result that it becomes; None for an output that decides (a
            condition).
        back: for each of its outputs, the index of the operand that it replaces in the next round; None if it replaces
            none.
        sliced: for each of its inputs, the number of leading axes of the operand that the loop runs over.
        stacked: for each of its outputs, the number of leading axes that the loop adds in the result.
    """

    jaxpr: Any
    reads: tuple[int, ...]
    gives: tuple[int | None, ...]
    back: tuple[int | None, ...]
    sliced: tuple[int, ...]
    stacked: tuple[int, ...]


class Wiring(NamedTuple):
    """How an equation is connected with the jaxprs inside it.

    Attributes:
        kind: ``"call"``; ``"loop"``, a known number of rounds; ``"unbounded"``, an unknown one; ``"branches"``, one of
            the bodies; or a name of its own, for a primitive of Weft.
        bodies: the jaxprs, in the order of their evaluation.
        chooses: the index of the operand that chooses among the bodies, if one does.
        rounds: how often the bodies are evaluated; None if that is unknown.
    """

    kind: str
    bodies: tuple[Body, ...]
    chooses: int | None = None
    rounds: int | None = 1


_RULES: dict[str, Callable[[Any], Wiring | None]] = {}

wired = rules(_RULES)
"""Register the wiring of the primitives with these names."""


def wiring(eqn: Any) -> Wiring | None:
    """The wiring of an equation; None for a plain operation."""
    rule = _RULES.get(eqn.primitive.name)
    return None if rule is None else rule(eqn)


def kind(eqn: Any) -> str | None:
    """The kind of control flow that an equation is; None for a plain operation."""
    w = wiring(eqn)
    return None if w is None else w.kind


def inside(eqn: Any) -> Sequence[Any]:
    """The jaxprs inside an equation. Those of its wiring come in order."""
    w = wiring(eqn)
    return inner_jaxprs(eqn) if w is None else [body.jaxpr for body in w.bodies]


_WORDS = {
    "loop": "a scan",
    "branches": "a cond",
    "unbounded": "a while_loop",
    "scope": "a nested program",
}


def described(eqn: Any) -> str:
    """The name of an equation in messages."""
    return _WORDS.get(kind(eqn) or "", repr(eqn.primitive.name))


def is_loop(eqn: Any) -> bool:
    """Whether an equation evaluates a jaxpr a known number of times, one after another."""
    return kind(eqn) == "loop"


def whole(jaxpr: Any, eqn: Any, first: int = 0) -> Body:
    """A body that reads all operands from index ``first`` on, and gives all results."""
    n, m = len(eqn.invars) - first, len(eqn.outvars)
    return Body(
        jaxpr, tuple(range(first, first + n)), tuple(range(m)), (None,) * m, (0,) * n, (0,) * m
    )


@wired(*CALLS)
def _call(eqn: Any) -> Wiring | None:
    return Wiring("call", (whole(inner_jaxprs(eqn)[0], eqn),))


@wired("scan")
def _scan(eqn: Any) -> Wiring:
    consts, carry = scan_sizes(eqn.params)
    n, m = len(eqn.invars), len(eqn.outvars)
    body = whole(eqn.params["jaxpr"], eqn)._replace(
        back=tuple(consts + i if i < carry else None for i in range(m)),
        sliced=tuple(int(i >= consts + carry) for i in range(n)),
        stacked=tuple(int(i >= carry) for i in range(m)),
    )
    return Wiring("loop", (body,), rounds=eqn.params["length"])


@wired("while")
def _while(eqn: Any) -> Wiring:
    params, m = eqn.params, len(eqn.outvars)
    before, consts = params["cond_nconsts"], params["body_nconsts"]
    carry = tuple(range(before + consts, before + consts + m))
    reads = (*range(before), *carry)
    predicate = Body(params["cond_jaxpr"], reads, (None,), (None,), (0,) * len(reads), (0,))
    body = whole(params["body_jaxpr"], eqn, before)._replace(back=carry)
    return Wiring("unbounded", (predicate, body), rounds=None)


@wired("cond")
def _cond(eqn: Any) -> Wiring:
    bodies = tuple(whole(b, eqn, 1) for b in eqn.params["branches"])
    return Wiring("branches", bodies, chooses=0)


@wired("shard_map")
def _shard_map(eqn: Any) -> Wiring:
    """A ``shard_map`` is wired like a call. Inside, arrays have the shapes of one shard."""
    return Wiring("shards", (whole(eqn.params["jaxpr"], eqn),))
