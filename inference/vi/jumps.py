"""Jumps of an objective along the path of a reparametrised draw. They bias the gradient silently.

The pathwise derivative of `E[f(x)]` misses what `f` gains by jumping. A jump needs an equation whose result is
piecewise constant in the draw (a comparison, a rounding, an index), and a way from that result to the objective. Such
equations are found by following the draws through the staged objective. A draw whose derivative was stopped on purpose
is not followed.

Most of these equations are harmless: the guards of library code never switch where draws fall, and `where(x > 0, x, 0)`
is continuous. So each is tried. Take two draws `x_0` and `x_1`, and leave all other noise as it is. On the line

    x(t) = x_0 + t (x_1 - x_0)

bisection finds a `t` at which the equation switches, if its result differs at the two ends. The objective jumps there
under three conditions. Its difference over the last interval, of length 2^-20, is at least a quarter of the difference
over one of length 2^-10. (For a Lipschitz function it would have shrunk a thousandfold, for a square root 32-fold.) The
difference is more than rounding. And the operands of the equation are continuous there.

The inside of a `while_loop` is not followed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from weft.ppl.expectations.gradients import Reparam
from weft.ppl.expectations.marks import mark_p
from weft.ppl.expectations.sensitivity import PATH, Choice, Probe, probed
from weft.ppl.stage.compat import bind, open_jaxpr, where_in_source
from weft.ppl.stage.jaxprs import Place, evaluate, evaluate_inside, flow
from weft.ppl.stage.staging import Code, stage
from weft.ppl.stage.wiring import inside, kind, wiring

NUM_LINES = 16
"""Pairs of draws between which a switch is looked for."""

NUM_TRIED = 3
"""Switches of one equation that are bisected."""

COARSE, FINE = 10, 20
"""Bisections after which the differences are compared."""

ROUNDING = 100.0
"""Units in the last place of the objective that are taken for rounding."""


@dataclasses.dataclass(frozen=True)
class Jump:
    """A jump of an objective along the path of a draw.

    Attributes:
        primitive: the name of the equation's operation.
        where: the line of the source from which it comes, in brackets; empty if unknown.
        size: the size of the jump at one place.
    """

    primitive: str
    where: str
    size: float

    def __str__(self) -> str:
        return (
            f"the objective jumps by {self.size:.2g} where {_WORDS.get(self.primitive, self.primitive)} switches"
            f"{self.where}; its reparametrised gradient does not see that and is biased"
        )


_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ROUNDINGS = ("floor", "ceil", "round", "sign")
_WORDS = {
    **dict.fromkeys(_COMPARISONS, "a comparison"),
    **dict.fromkeys(_ROUNDINGS, "a rounding"),
    "convert_element_type": "an integer cast",
    "rem": "a remainder",
    "argmax": "an index of the largest",
    "argmin": "an index of the smallest",
    "sort": "an order",
    "top_k": "an order",
    "is_finite": "a test for finiteness",
}

# --- following the draws ----------------------------------------------------------------------------------------------

Numbers = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Taint:
    """The dependence of a value on the draws.

    Attributes:
        smooth: the addresses of the draws with respect to which it may be differentiated.
        stepped: the equations, by their numbers (see `Place`), through which it is piecewise constant in some draw.
    """

    smooth: frozenset[str] = frozenset()
    stepped: frozenset[Numbers] = frozenset()

    def __or__(self, other: _Taint) -> _Taint:
        return _Taint(self.smooth | other.smooth, self.stepped | other.stepped)


_CLEAN = _Taint()


class _Follower:
    """The draws of an objective, followed through its equations.

    Attributes:
        found: the equations whose result is piecewise constant in a draw: name, line of the source, addresses of the
            draws.
        out: the dependence of the objective on the draws.
    """

    def __init__(self, jaxpr: Any) -> None:
        self.found: dict[Numbers, tuple[str, str, frozenset[str]]] = {}
        ins = [_CLEAN] * len(open_jaxpr(jaxpr)[0].invars)
        (self.out,) = flow(jaxpr, ins, self.transfer, _union)

    def transfer(self, eqn: Any, ins: list[_Taint], place: Place) -> list[_Taint] | None:
        name, params, every = eqn.primitive.name, eqn.params, _union(ins)
        if name == "name" and params["name"].startswith(PATH):
            return [every | _Taint(frozenset([params["name"].removeprefix(PATH)]))]
        if eqn.primitive is mark_p:  # a strategy of its own takes care of it
            return [ins[0] if params["kind"] == "control" else _CLEAN]
        if name == "stop_gradient":
            return [_Taint(stepped=every.stepped)]
        w = wiring(eqn)
        if w is not None and w.rounds is not None:
            return None
        floats = [i.smooth for i, v in zip(ins, eqn.invars, strict=True) if _real(v)]
        smooth = frozenset[str]().union(*floats)
        if smooth and _steps(eqn):
            self.found[place.numbers] = (name, _line(eqn, place), smooth)
            every = every | _Taint(stepped=frozenset([place.numbers]))
            if name in _ROUNDINGS:
                return [_Taint(stepped=every.stepped)]
        return [every if _real(v) else _Taint(stepped=every.stepped) for v in eqn.outvars]


def _line(eqn: Any, place: Place) -> str:
    """The line of an equation. An equation in a library's own jit may have none; then it is the line of the call."""
    around = [eqn, *(e for e, _ in reversed(place.around))]
    return next(filter(None, map(where_in_source, around)), "")


def _steps(eqn: Any) -> bool:
    """Whether an equation's result is piecewise constant in its floating operands, or jumps in them."""
    name = eqn.primitive.name
    if name in ("convert_element_type", "argmax", "argmin", "sort", "top_k"):
        return any(not _real(v) for v in eqn.outvars)
    return name in _COMPARISONS or name in _ROUNDINGS or name in ("rem", "is_finite")


def _union(taints: Sequence[_Taint]) -> _Taint:
    found = _CLEAN
    for t in taints:
        found = found | t
    return found


def _real(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.floating)


# --- trying them ------------------------------------------------------------------------------------------------------

Seen = dict[Numbers, tuple[list[Array], list[Array]]]
"""For each equation watched, what is floating of its operands, and what is piecewise constant of its results."""


def _watch(
    jaxpr: Any, args: Sequence[Any], places: frozenset[Numbers], numbers: Numbers = ()
) -> Any:
    """Evaluate a jaxpr, and also give the operands and results of the equations at some places."""
    seen: Seen = {}
    count = itertools.count()

    def equation(eqn: Any, ins: list[Any]) -> Sequence[Any] | None:
        here = (*numbers, next(count))
        if here in places:
            outs = bind(eqn, ins)
            floats = [jnp.asarray(x) for x, v in zip(ins, eqn.invars, strict=True) if _real(v)]
            seen[here] = (floats, _flags(eqn, ins, outs))
            return outs
        if not any(p[: len(here)] == here for p in places):
            return None
        outs, found = _watch_inside(eqn, ins, places, here)
        seen.update(found)
        return outs

    return evaluate(jaxpr, args, equation), seen


def _watch_inside(eqn: Any, ins: list[Any], places: frozenset[Numbers], here: Numbers) -> Any:
    """Evaluate an equation with jaxprs inside in the same way. What a branch does not have is zero there."""
    jaxprs = inside(eqn)

    def body(k: int, args: Sequence[Any]) -> Any:
        return _watch(jaxprs[k], args, places, (*here, k))

    zeros: Seen = {}
    if kind(eqn) == "branches":
        for k in range(len(jaxprs)):
            shapes = jax.eval_shape(lambda *args, k=k: body(k, args)[1], *ins[1:])
            zeros.update(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

    def filled(k: int, args: Sequence[Any]) -> Any:
        outs, seen = body(k, args)
        return outs, {**zeros, **seen}

    return evaluate_inside(eqn, ins, filled)


def _flags(eqn: Any, ins: list[Any], outs: list[Any]) -> list[Array]:
    """The results of an equation that are piecewise constant."""
    name = eqn.primitive.name
    if name == "rem":
        return [jnp.round((ins[0] - outs[0]) / ins[1])]
    if name in _ROUNDINGS:
        return list(outs)
    return [o for o, v in zip(outs, eqn.outvars, strict=True) if not _real(v)]


class _Lines(eqx.Module):
    """The objective along lines, as compiled code.

    Attributes:
        code: `code(*captured, key, which, salt, step, *arrays)` gives the objective.
        captured: the arrays that it closes over.
        arrays: the parameters and the data.
        places: the places of the equations that are watched.
    """

    code: Code = eqx.field(static=True)
    captured: list[Array]
    arrays: list[Array]
    places: tuple[Numbers, ...] = eqx.field(static=True)

    def at(self, line: tuple[PRNGKeyArray, Any, Any], t: Any) -> tuple[Array, Seen]:
        """The objective, and the watched values, at one point of a line."""
        key, which, salt = line
        args = [
            *self.captured,
            key,
            which,
            salt,
            jnp.asarray(t, jnp.result_type(float)),
            *self.arrays,
        ]
        outs, seen = _watch(self.code.jaxpr, args, frozenset(self.places))
        return outs[0], seen


@eqx.filter_jit
def _switches(lines: _Lines, key: PRNGKeyArray, num_addresses: int) -> Array:
    """Whether each equation switches between the ends of a line: `(num_addresses, NUM_LINES, equations)`."""

    def one(which: Any, i: Any) -> Array:
        ends = jax.lax.map(lambda t: lines.at((key, which, i), t)[1], jnp.array([0.0, 1.0]))
        start, end = (jax.tree.map(lambda x, k=k: x[k], ends) for k in range(2))
        return _differ(lines.places, start, end)

    over = jnp.arange(NUM_LINES, dtype=jnp.uint32)
    return jax.lax.map(
        lambda which: jax.lax.map(lambda i: one(which, i), over),
        jnp.arange(num_addresses, dtype=jnp.int32),
    )


def _differ(places: tuple[Numbers, ...], a: Seen, b: Seen) -> Array:
    return jnp.stack(
        [
            jnp.any(jnp.stack([jnp.any(x != y) for x, y in zip(a[p][1], b[p][1], strict=True)]))
            for p in places
        ]
    )


@eqx.filter_jit
def _bisect(lines: _Lines, line: tuple[PRNGKeyArray, Any, Any], number: Any) -> Any:
    """The differences of the objective, and of an equation's operands, over intervals in which it switches."""
    _, first = lines.at(line, 0.0)

    def halve(i: Any, state: Any) -> Any:
        (low, high), coarse = state
        middle = (low + high) / 2
        switched = _differ(lines.places, first, lines.at(line, middle)[1])[number]
        ends = (jnp.where(switched, low, middle), jnp.where(switched, middle, high))
        return ends, jax.tree.map(lambda c, e: jnp.where(i == COARSE - 1, e, c), coarse, ends)

    start = (jnp.zeros(()), jnp.ones(()))
    fine, coarse = jax.lax.fori_loop(0, FINE, halve, (start, start))
    values, seen = jax.lax.map(lambda t: lines.at(line, t), jnp.stack([*coarse, *fine]))

    def difference(k: int) -> Any:
        def largest(f: Callable[[Array], Array]) -> Array:
            return jnp.stack(
                [
                    jnp.max(jnp.stack([jnp.max(f(x), initial=0.0) for x in seen[p][0]]))
                    for p in lines.places
                ]
            )[number]

        return (
            jnp.abs(values[k] - values[k + 1]),
            jnp.max(jnp.abs(values[k : k + 2])),
            largest(lambda x: jnp.abs(x[k] - x[k + 1])),
            largest(lambda x: jnp.abs(x[k])),
        )

    return difference(0), difference(2)


def _stays(coarse: float, fine: float, size: float) -> bool:
    """Whether a difference stays as the interval shrinks a thousandfold."""
    if not np.isfinite(fine):
        return True
    rounding = ROUNDING * float(jnp.finfo(jnp.result_type(float)).eps) * size
    return fine > rounding and not fine < coarse / 4


def find_jumps(
    key: PRNGKeyArray,
    value: Callable[..., Array],
    arrays: Sequence[Array],
    choices: Mapping[str, Choice],
) -> dict[str, tuple[Jump, ...]]:
    """The jumps of an objective along the paths of its reparametrised draws, by address.

    Args:
        key: a random key.
        value: the objective, `value(key, *arrays)`.
        arrays: parameters and data.
        choices: the choices of its expectations.
    """
    addresses = tuple(a for a, c in choices.items() if isinstance(c.strategy, Reparam))
    if not addresses:
        return {}

    def moved(key: PRNGKeyArray, which: Any, salt: Any, step: Any, *arrays: Array) -> Array:
        with probed(Probe(addresses, which, salt, step)):
            return value(key, *arrays)

    some = (key, jnp.int32(0), jnp.uint32(0), jnp.zeros(()))
    code, captured = stage(moved, [*some, *arrays])
    follower = _Follower(code.jaxpr)
    reached = {p: follower.found[p] for p in sorted(follower.out.stepped)}
    if not reached:
        return {}
    places = tuple(reached)
    lines = _Lines(code, captured, list(arrays), places)
    switching = np.asarray(_switches(lines, key, len(addresses)))
    found: dict[str, dict[str, Jump]] = {}
    for s, address in enumerate(addresses):
        for number, place in enumerate(places):
            name, line, sources = reached[place]
            if address not in sources:
                continue
            for i in np.flatnonzero(switching[s, :, number])[:NUM_TRIED]:
                path = (key, jnp.int32(s), jnp.uint32(i))
                coarse, fine = jax.tree.map(float, _bisect(lines, path, jnp.int32(number)))
                if _stays(coarse[0], fine[0], fine[1]) and not _stays(coarse[2], fine[2], fine[3]):
                    jump = Jump(name, line, fine[0])
                    found.setdefault(address, {}).setdefault(line or str(place), jump)
                    break
    return {a: tuple(jumps.values()) for a, jumps in found.items()}
