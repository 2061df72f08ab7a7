"""The one place that walks jaxprs: evaluation, forward analyses, folds, and how control flow is wired.

- ``evaluate`` runs a jaxpr; a function may take an equation over, or decline it by returning None.
- ``flow`` is a forward analysis. It is the same walk with abstract values in place of arrays; loops are repeated until
  the values that come back no longer change.
- ``equations`` lists every equation, also those inside others, with the place where it stands.

All three learn from one table, ``wiring``, which jaxprs an equation holds and how its operands and results are
connected with theirs. A new control-flow primitive is one more rule in that table. An equation without a rule is a
plain operation, whatever jaxprs are among its parameters: its results depend on all of its operands.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from .compat import Literal, bind, inner_jaxprs, open_jaxpr, scan_sizes

# --- calls ------------------------------------------------------------------------------------------------------------

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
    """Whether an equation may be replaced by those inside it: values and derivatives stay as they are."""
    return CALLS.get(eqn.primitive.name) in ("plain", "checkpoint")


def is_checkpoint(eqn: Any) -> bool:
    """Whether an equation is a call that saves memory in the reverse pass, which replacing it would lose."""
    return CALLS.get(eqn.primitive.name) == "checkpoint"


def states_derivative(eqn: Any) -> bool:
    """Whether an equation has a derivative that is not that of the jaxpr inside it."""
    return CALLS.get(eqn.primitive.name) == "derivative"


# --- how control flow is wired ----------------------------------------------------------------------------------------


class Body(NamedTuple):
    """A jaxpr inside an equation.

    Attributes:
        jaxpr: open or closed.
        reads: for each of its inputs, the operand that gives its first value.
        gives: for each of its outputs, the result of the equation that it becomes; None, if it decides instead.
        back: for each of its outputs, the operand in whose place it is read in the next round; None, if in none.
        sliced: for each of its inputs, how many leading axes of the operand it goes along.
        stacked: for each of its outputs, how many leading axes the result has besides.
    """

    jaxpr: Any
    reads: tuple[int, ...]
    gives: tuple[int | None, ...]
    back: tuple[int | None, ...]
    sliced: tuple[int, ...]
    stacked: tuple[int, ...]


class Wiring(NamedTuple):
    """What an equation does with the jaxprs inside it.

    Attributes:
        kind: ``"call"``; ``"loop"``, a known number of rounds; ``"unbounded"``, an unknown one; ``"branches"``, one of
            the bodies; or a name of its own, for a primitive of Weft.
        bodies: in the order in which they are evaluated.
        chooses: the operand that chooses among the bodies, if one does.
        rounds: how often they are evaluated; None, if nobody knows.
    """

    kind: str
    bodies: tuple[Body, ...]
    chooses: int | None = None
    rounds: int | None = 1


Rule = Callable[[Any], "Wiring | None"]
_RULES: dict[str, Rule] = {}


def wired(*names: str) -> Callable[[Rule], Rule]:
    """Register how primitives of these names are wired."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def wiring(eqn: Any) -> Wiring | None:
    """How an equation is wired; None, if it is a plain operation."""
    rule = _RULES.get(eqn.primitive.name)
    return None if rule is None else rule(eqn)


def kind(eqn: Any) -> str | None:
    """What kind of control flow an equation is; None, if it is a plain operation."""
    w = wiring(eqn)
    return None if w is None else w.kind


_WORDS = {
    "loop": "a scan",
    "branches": "a cond",
    "unbounded": "a while_loop",
    "scope": "a nested program",
}


def described(eqn: Any) -> str:
    """What an equation is called in messages."""
    return _WORDS.get(kind(eqn) or "", repr(eqn.primitive.name))


def is_loop(eqn: Any) -> bool:
    """Whether an equation evaluates a jaxpr a known number of times, one after another."""
    return kind(eqn) == "loop"


def whole(jaxpr: Any, eqn: Any, first: int = 0) -> Body:
    """A body that reads all operands from one on, and gives all results."""
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
    """Inside, arrays have the shapes of one shard."""
    return Wiring("shards", (whole(eqn.params["jaxpr"], eqn),))


# --- evaluation -------------------------------------------------------------------------------------------------------

Values = dict[Any, Any]
Equation = Callable[[Any, list[Any]], "Sequence[Any] | None"]
"""Gives the results of an equation from its operands' values; None, if it leaves the equation as it is."""


def read(v: Any, values: Values) -> Any:
    """The value of a variable or a literal."""
    return v.val if isinstance(v, Literal) else values[v]


def steps(eqns: Sequence[Any], values: Values) -> Iterator[tuple[Any, list[Any]]]:
    """Equations in order, each with its operands' values; who takes them adds the results to ``values``.

    It is for loops that nest. JAX records the Python stack at every equation, and a callback would make it deeper.
    """
    for eqn in eqns:
        yield eqn, [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]


def run(eqns: Sequence[Any], values: Values, equation: Equation | None = None) -> Values:
    """Evaluate equations in order; their results are added to ``values``."""
    for eqn, ins in steps(eqns, values):
        outs = None if equation is None else equation(eqn, ins)
        values.update(zip(eqn.outvars, bind(eqn, ins) if outs is None else outs, strict=True))
    return values


def results(
    eqns: Sequence[Any], values: Values, wanted: Sequence[Any], equation: Equation | None = None
) -> list[Any]:
    """The values of some variables and literals after equations were evaluated."""
    values = run(eqns, values, equation)
    return [read(v, values) for v in wanted]


def inputs(jaxpr: Any, args: Sequence[Any]) -> Values:
    """The values of a jaxpr's constants and arguments."""
    opened, consts = open_jaxpr(jaxpr)
    values = dict(zip(opened.constvars, consts, strict=True))
    values.update(zip(opened.invars, args, strict=True))
    return values


def evaluate(jaxpr: Any, args: Sequence[Any], equation: Equation | None = None) -> list[Any]:
    """The results of a jaxpr; ``equation`` may take an equation over, or leave it as it is."""
    opened, _ = open_jaxpr(jaxpr)
    return results(opened.eqns, inputs(jaxpr, args), opened.outvars, equation)


def behind(
    eqns: Sequence[Any], wanted: Iterable[Any], meant: Callable[[Any], bool] | None = None
) -> list[Any]:
    """The equations that some variables are computed by, and those that are ``meant`` with what these read."""
    reached, kept = set(wanted), []
    for eqn in reversed(eqns):
        if (meant is not None and meant(eqn)) or not reached.isdisjoint(eqn.outvars):
            kept.append(eqn)
            reached.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1]


def evaluate_inside(
    eqn: Any, ins: Sequence[Any], body: Callable[[int, Sequence[Any]], tuple[Sequence[Any], Any]]
) -> tuple[list[Any], Any]:
    """Evaluate an equation with a function in place of each of its jaxprs, which gives more than their results.

    Args:
        eqn: a call, a loop of known length, or branches. A derivative that a call states is lost.
        ins: values of its operands.
        body: ``body(k, args)`` gives the results of the k-th jaxpr, and more: arrays, alike for all branches.

    Returns:
        The results, and what there was besides: of the branch that is taken, stacked over the rounds of a loop.
    """
    what, params = kind(eqn), eqn.params

    def once(*args: Any, k: int = 0) -> tuple[list[Any], Any]:
        outs, more = body(k, args)
        return list(outs), more

    if what == "branches":
        some = [functools.partial(once, k=k) for k in range(len(inside(eqn)))]
        return jax.lax.switch(ins[0], some, *ins[1:])
    if what == "loop":
        num_consts, num_carry = scan_sizes(params)
        consts, rest = ins[:num_consts], ins[num_consts:]

        def step(carry: Any, xs: Any) -> Any:
            outs, more = once(*consts, *carry, *xs)
            return outs[:num_carry], (outs[num_carry:], more)

        settings = {k: params[k] for k in ("length", "reverse", "unroll")}
        carry, (ys, more) = jax.lax.scan(step, rest[:num_carry], rest[num_carry:], **settings)
        return [*carry, *ys], more
    assert what == "call", f"{eqn.primitive.name} is no call, loop or branch"
    if not is_checkpoint(eqn):
        return once(*ins)
    settings = {k: params[k] for k in ("policy", "prevent_cse") if k in params}
    return jax.checkpoint(once, **settings)(*ins)


# --- places and folds -------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an equation stands.

    Attributes:
        around: the equations that hold it, outermost first, each with the number of the jaxpr in it.
        numbers: its own number in its jaxpr, after those of the equations around and of their jaxprs.
        deciding: in ``flow``, all that decides whether it is evaluated.
    """

    around: tuple[tuple[Any, int], ...] = ()
    numbers: tuple[int, ...] = ()
    deciding: Any = None

    def within(self, eqn: Any, number: int, deciding: Any = None) -> Place:
        """The place of a jaxpr of an equation that stands here."""
        return Place((*self.around, (eqn, number)), (*self.numbers, number), deciding)

    def at(self, number: int) -> Place:
        """The place of an equation of the jaxpr that this is the place of."""
        return Place(self.around, (*self.numbers, number), self.deciding)

    @property
    def kinds(self) -> tuple[str | None, ...]:
        """The kinds of the equations around, outermost first; None for those without a rule."""
        return tuple(kind(eqn) for eqn, _ in self.around)

    @property
    def rounds(self) -> tuple[int | None, ...]:
        """How often each of the equations around evaluates what it holds; None, where nobody knows."""
        found = [wiring(eqn) for eqn, _ in self.around]
        return tuple(1 if w is None else w.rounds for w in found)


def equations(
    jaxpr: Any, enter: Callable[[Any], bool] | None = None
) -> Iterator[tuple[Any, Place]]:
    """Every equation of a jaxpr and of the jaxprs inside it, in order, with its place.

    Args:
        jaxpr: open or closed, or a list of equations.
        enter: whether to go on inside an equation; into all, by default.
    """

    def visit(jaxpr: Any, place: Place) -> Iterator[tuple[Any, Place]]:
        eqns = jaxpr if isinstance(jaxpr, (list, tuple)) else open_jaxpr(jaxpr)[0].eqns
        for i, eqn in enumerate(eqns):
            here = place.at(i)
            yield eqn, here
            if enter is None or enter(eqn):
                for k, inner in enumerate(inside(eqn)):
                    yield from visit(inner, here.within(eqn, k))

    return visit(jaxpr, Place())


def inside(eqn: Any) -> Sequence[Any]:
    """The jaxprs inside an equation, those of its wiring in order."""
    w = wiring(eqn)
    return inner_jaxprs(eqn) if w is None else [body.jaxpr for body in w.bodies]


def remembered(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of an open jaxpr, computed once for each."""
    known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    @functools.wraps(f)
    def look_up(jaxpr: Any) -> Any:
        jaxpr, _ = open_jaxpr(jaxpr)
        found = known.get(jaxpr)
        if found is None:
            found = known[jaxpr] = f(jaxpr)
        return found

    return look_up


class Holds:
    """Whether an equation of some kind stands anywhere in a jaxpr.

    Called with a jaxpr. ``at`` asks the same of one equation, which counts itself.
    """

    def __init__(self, meant: Callable[[Any], bool]) -> None:
        self.meant = meant
        self.inside = remembered(lambda jaxpr: any(map(self.at, jaxpr.eqns)))

    def __call__(self, jaxpr: Any) -> bool:
        return self.inside(jaxpr)

    def at(self, eqn: Any) -> bool:
        return self.meant(eqn) or any(map(self.inside, inner_jaxprs(eqn)))


# --- forward analyses -------------------------------------------------------------------------------------------------


class Axes(NamedTuple):
    """What becomes of an abstract value as loops go along leading axes: ``slice`` on the way in, ``stack`` out."""

    slice: Callable[[Any, int], Any]
    stack: Callable[[Any, int], Any]


Transfer = Callable[[Any, list[Any], Place], "Sequence[Any] | None"]
Join = Callable[[Sequence[Any]], Any]


def flow(
    jaxpr: Any, ins: Sequence[Any], transfer: Transfer, join: Join, axes: Axes | None = None
) -> list[Any]:
    """A forward analysis: the abstract values of a jaxpr's outputs from those of its inputs.

    Where ``transfer`` declines, a call, a loop or a branch is followed by its wiring; results depend on what decides
    about them, too. Any other equation has the join of its operands for each of its results.

    Args:
        jaxpr: open or closed. Its constants and literals have the value ``join([])``.
        ins: one value for each input.
        transfer: ``transfer(eqn, ins, place)`` gives an equation's results; None, if it declines. It may raise for
            what it does not know; ``wiring(eqn)`` tells what would be followed.
        join: the least value that covers several. Loops are repeated until nothing grows, so chains must be finite.
        axes: how loops over leading axes change a value; not at all, by default.
    """
    return _flow(jaxpr, ins, transfer, join, axes, Place(deciding=join([])))


def through(
    eqn: Any, ins: list[Any], transfer: Transfer, join: Join, axes: Axes | None = None
) -> list[Any]:
    """The same of one equation that is wired: the abstract values of its results."""
    w = wiring(eqn)
    assert w is not None, f"{eqn.primitive.name} has no jaxpr to go through"
    return _through(eqn, w, ins, transfer, join, axes, Place(deciding=join([])))


def spread(eqns: Sequence[Any], values: Values, transfer: Transfer, join: Join) -> Values:
    """The same of equations: their variables' abstract values are added to ``values``; others are ``join([])``."""
    return _spread(eqns, values, transfer, join, None, Place(deciding=join([])))


def _flow(
    jaxpr: Any,
    ins: Sequence[Any],
    transfer: Transfer,
    join: Join,
    axes: Axes | None,
    place: Place,
) -> list[Any]:
    opened, _ = open_jaxpr(jaxpr)
    values = dict(zip(opened.invars, ins, strict=True))
    _spread(opened.eqns, values, transfer, join, axes, place)
    nothing = join([])
    return [nothing if isinstance(v, Literal) else values.get(v, nothing) for v in opened.outvars]


def _spread(
    eqns: Sequence[Any],
    values: Values,
    transfer: Transfer,
    join: Join,
    axes: Axes | None,
    place: Place,
) -> Values:
    nothing = join([])
    for i, eqn in enumerate(eqns):
        ins = [nothing if isinstance(v, Literal) else values.get(v, nothing) for v in eqn.invars]
        here = place.at(i)
        outs = transfer(eqn, ins, here)
        if outs is None and (w := wiring(eqn)) is not None:
            outs = _through(eqn, w, ins, transfer, join, axes, here)
        elif outs is None:
            outs = [join(ins)] * len(eqn.outvars)
        values.update(zip(eqn.outvars, outs, strict=True))
    return values


def _through(
    eqn: Any, w: Wiring, ins: list[Any], transfer: Any, join: Any, axes: Axes | None, place: Place
) -> list[Any]:
    """The results of an equation with bodies; what comes back in a loop is followed until it no longer grows."""
    state = list(ins)
    while True:
        decided = [] if w.chooses is None else [state[w.chooses]]
        given: list[list[Any]] = [[] for _ in eqn.outvars]
        grown = list(state)
        for k, body in enumerate(w.bodies):
            args = [state[i] for i in body.reads]
            if axes is not None:
                args = [
                    axes.slice(x, n) if n else x for x, n in zip(args, body.sliced, strict=True)
                ]
            inner = place.within(eqn, k, join([place.deciding, *decided]))
            outs = _flow(body.jaxpr, args, transfer, join, axes, inner)
            for x, result, back, n in zip(outs, body.gives, body.back, body.stacked, strict=True):
                if result is None:
                    decided.append(x)
                    continue
                given[result].append(axes.stack(x, n) if n and axes is not None else x)
                if back is not None:
                    grown[back] = join([grown[back], x])
                    if not w.rounds:  # there may be no round, and then it stays what it was
                        given[result].append(state[back])
        if grown == state:
            return [join([*xs, *decided]) for xs in given]
        state = grown
