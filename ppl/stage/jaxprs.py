"""The one place that walks jaxprs: evaluation, forward analyses, and folds.

- ``evaluate`` runs a jaxpr; a function may take an equation over, or decline it by returning None.
- ``flow`` is a forward analysis. It is the same walk with abstract values in place of arrays; loops are repeated until
  the values that come back no longer change.
- ``equations`` lists every equation, also those inside others, with the place where it stands.

All three learn from one table (``wiring.py``) which jaxprs an equation holds, and how its operands and results are
connected with theirs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from .compat import Literal, bind, inner_jaxprs, open_jaxpr, scan_sizes
from .wiring import Wiring, inside, is_checkpoint, kind, wiring

# --- evaluation -------------------------------------------------------------------------------------------------------

Values = dict[Any, Any]
Equation = Callable[[Any, list[Any]], "Sequence[Any] | None"]
"""Gives the results of an equation from the values of its operands; None to decline."""


def read(v: Any, values: Values) -> Any:
    """The value of a variable or a literal."""
    return v.val if isinstance(v, Literal) else values[v]


def steps(eqns: Sequence[Any], values: Values) -> Iterator[tuple[Any, list[Any]]]:
    """Each equation in order, with the values of its operands. The caller adds the results to ``values``.

    This serves nested loops. JAX records the Python stack at every equation, and a callback would make the stack
    deeper.
    """
    for eqn in eqns:
        yield eqn, [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]


def run(eqns: Sequence[Any], values: Values, equation: Equation | None = None) -> Values:
    """Evaluate equations in order, and add their results to ``values``."""
    for eqn, ins in steps(eqns, values):
        outs = None if equation is None else equation(eqn, ins)
        values.update(zip(eqn.outvars, bind(eqn, ins) if outs is None else outs, strict=True))
    return values


def results(
    eqns: Sequence[Any], values: Values, wanted: Sequence[Any], equation: Equation | None = None
) -> list[Any]:
    """The values of some variables and literals, after the equations were evaluated."""
    values = run(eqns, values, equation)
    return [read(v, values) for v in wanted]


def inputs(jaxpr: Any, args: Sequence[Any]) -> Values:
    """The values of a jaxpr's constants and arguments."""
    opened, consts = open_jaxpr(jaxpr)
    values = dict(zip(opened.constvars, consts, strict=True))
    values.update(zip(opened.invars, args, strict=True))
    return values


def evaluate(jaxpr: Any, args: Sequence[Any], equation: Equation | None = None) -> list[Any]:
    """Evaluate a jaxpr. ``equation`` may take an equation over, or decline it by returning None."""
    opened, _ = open_jaxpr(jaxpr)
    return results(opened.eqns, inputs(jaxpr, args), opened.outvars, equation)


def behind(
    eqns: Sequence[Any], wanted: Iterable[Any], meant: Callable[[Any], bool] | None = None
) -> list[Any]:
    """The equations that compute some variables; and the ``meant`` equations, with the equations these need."""
    reached, kept = set(wanted), []
    for eqn in reversed(eqns):
        if (meant is not None and meant(eqn)) or not reached.isdisjoint(eqn.outvars):
            kept.append(eqn)
            reached.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1]


def evaluate_inside(
    eqn: Any, ins: Sequence[Any], body: Callable[[int, Sequence[Any]], tuple[Sequence[Any], Any]]
) -> tuple[list[Any], Any]:
    """Evaluate an equation with a function in place of each jaxpr inside it, which may give extra arrays.

    Args:
        eqn: a call, a loop of known length, or branches. A custom derivative of a call is lost.
        ins: the values of its operands.
        body: ``body(k, args)`` gives the results of the k-th jaxpr, and extra arrays. All branches must give extra
            arrays of the same form.

    Returns:
        The results and the extra arrays. The latter are those of the branch taken; in a loop they are stacked over the
        rounds.
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
        around: the equations that hold it, outermost first, each with the index of the jaxpr in it.
        numbers: its index in its jaxpr, after the indices of the equations around it and of their jaxprs.
        deciding: in ``flow``, the abstract value of everything that decides whether it is evaluated.
    """

    around: tuple[tuple[Any, int], ...] = ()
    numbers: tuple[int, ...] = ()
    deciding: Any = None

    def within(self, eqn: Any, number: int, deciding: Any = None) -> Place:
        """The place of a jaxpr inside an equation that stands here."""
        return Place((*self.around, (eqn, number)), (*self.numbers, number), deciding)

    def at(self, number: int) -> Place:
        """The place of an equation in the jaxpr that this place belongs to."""
        return Place(self.around, (*self.numbers, number), self.deciding)

    @property
    def kinds(self) -> tuple[str | None, ...]:
        """The kinds of the equations around, outermost first; None for those without a rule."""
        return tuple(kind(eqn) for eqn, _ in self.around)

    @property
    def rounds(self) -> tuple[int | None, ...]:
        """How often each of the equations around evaluates its jaxpr; None if that is unknown."""
        found = [wiring(eqn) for eqn, _ in self.around]
        return tuple(1 if w is None else w.rounds for w in found)


def equations(
    jaxpr: Any, enter: Callable[[Any], bool] | None = None
) -> Iterator[tuple[Any, Place]]:
    """Every equation of a jaxpr and of the jaxprs inside it, in order, with its place.

    Args:
        jaxpr: an open or closed jaxpr, or a list of equations.
        enter: whether to look inside an equation. By default all are looked into.
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


def remembered(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Cache a function of an open jaxpr, so that it is computed once for each jaxpr."""
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
    """Whether a jaxpr holds an equation of some kind, at any depth.

    Call it with a jaxpr. ``at`` asks the same of one equation, and counts the equation itself.
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
    """How loops over leading axes change an abstract value: by ``slice`` on the way in, by ``stack`` on the way out."""

    slice: Callable[[Any, int], Any]
    stack: Callable[[Any, int], Any]


Transfer = Callable[[Any, list[Any], Place], "Sequence[Any] | None"]
Join = Callable[[Sequence[Any]], Any]


def flow(
    jaxpr: Any, ins: Sequence[Any], transfer: Transfer, join: Join, axes: Axes | None = None
) -> list[Any]:
    """A forward analysis: from the abstract values of a jaxpr's inputs to those of its outputs.

    If ``transfer`` declines, a call, loop or branch is followed by its wiring. Its results also depend on what decides
    about it. For any other equation, each result is the join of the operands.

    Args:
        jaxpr: an open or closed jaxpr. Its constants and literals have the value ``join([])``.
        ins: one value for each input.
        transfer: ``transfer(eqn, ins, place)`` gives the values of an equation's results, or None to decline. It may
            raise an error for an equation that it does not know. ``wiring(eqn)`` tells whether the equation would be
            followed.
        join: the least value that covers several. Loops are repeated until nothing grows, so chains of values must be
            finite.
        axes: how loops over leading axes change a value. By default they do not.
    """
    return _flow(jaxpr, ins, transfer, join, axes, Place(deciding=join([])))


def through(
    eqn: Any, ins: list[Any], transfer: Transfer, join: Join, axes: Axes | None = None
) -> list[Any]:
    """The forward analysis of one wired equation: the abstract values of its results."""
    w = wiring(eqn)
    assert w is not None, f"{eqn.primitive.name} has no jaxpr to go through"
    return _through(eqn, w, ins, transfer, join, axes, Place(deciding=join([])))


def spread(eqns: Sequence[Any], values: Values, transfer: Transfer, join: Join) -> Values:
    """The forward analysis of a list of equations.

    It adds the abstract values of their variables to ``values``. Any other variable has the value ``join([])``.
    """
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
    """The values of the results of an equation with bodies. Loops are repeated until their carry no longer grows."""
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
                    if not w.rounds:  # there may be no round, and then the value stays as it was
                        given[result].append(state[back])
        if grown == state:
            return [join([*xs, *decided]) for xs in given]
        state = grown
