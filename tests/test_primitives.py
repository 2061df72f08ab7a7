"""What the analyses say of each of JAX's primitives is true: tried with numbers, in every setting of `forms`.

Every equation of a form is evaluated at two points. A claim that copies stay apart is tried by moving one copy. A claim
that a function is a polynomial is tried by differences along the line between the points: those of one order higher
vanish. A primitive that stands in one of the tables and in no form is an error.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weft.ppl.analysis.affinity import SMOOTH, UNKNOWN, is_linear, is_polynomial, power_of
from weft.ppl.analysis.constants import _RULES as CONSTANTS
from weft.ppl.analysis.constants import _computed, _known
from weft.ppl.analysis.independence import _RULES as ALIGNED
from weft.ppl.analysis.independence import Unaligned, align
from weft.ppl.expectations.effects import Node
from weft.ppl.expectations.relaxed import CARRIES
from weft.ppl.expectations.terms import LINEAR_IN, _is_linear
from weft.ppl.stage.compat import Literal, Primitive, bind
from weft.ppl.stage.jaxprs import equations, evaluate
from weft.ppl.stage.wiring import inside, is_call

from forms import FORMS
from programs import quick_compilation

TABLES = {*ALIGNED, *SMOOTH, *CONSTANTS, *CARRIES, *LINEAR_IN}
TOLERANCE = 1e-6
"""The numbers are in double precision. What counts as exact keeps at least the 24 bits of single precision."""


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with jax.enable_x64(True), quick_compilation():
        yield


@functools.cache
def tried(form: str) -> list[tuple[Any, list[Any], list[Any]]]:
    """The equations of a form, those in calls too, each with its operands at two points."""
    f, draws = FORMS[form]
    rng = np.random.default_rng(1)
    points = [[jnp.asarray(draw(rng)) for draw in draws] for _ in range(2)]
    closed = jax.make_jaxpr(f)(*points[0])
    found: list[list[Any]] = [[], []]

    def note(seen: list[Any], eqn: Any, ins: list[Any]) -> list[Any] | None:
        if is_call(eqn):
            return evaluate(inside(eqn)[0], ins, functools.partial(note, seen))
        seen.append((eqn, ins))
        return None

    for seen, args in zip(found, points, strict=True):
        evaluate(closed, args, functools.partial(note, seen))
    return [(eqn, a, b) for (eqn, a), (_, b) in zip(*found, strict=True)]


def is_real(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def numbers(x: Any) -> np.ndarray:
    x = jnp.asarray(x)
    return np.asarray(x.astype(complex) if jnp.issubdtype(x.dtype, jnp.inexact) else x)


def agree(a: Any, b: Any) -> None:
    np.testing.assert_allclose(numbers(a), numbers(b), TOLERANCE, TOLERANCE)


def between(a: list[Any], b: list[Any], which: Any, t: float) -> list[Any]:
    """Points on a line, along some operands."""
    return [
        (x + t * (jnp.asarray(y) - x)).astype(jnp.asarray(x).dtype) if i in which else x
        for i, (x, y) in enumerate(zip(a, b, strict=True))
    ]


def vanish(eqn: Any, a: list[Any], b: list[Any], which: Any, order: int) -> None:
    """Differences of an order vanish along a line."""
    points = [bind(eqn, between(a, b, which, -0.3 + 0.7 * k)) for k in range(order + 1)]
    for values in zip(*points, strict=True):
        values = list(map(numbers, values))
        difference = sum((-1) ** k * math.comb(order, k) * v for k, v in enumerate(values))
        size = 1 + max(float(np.abs(v).max(initial=0)) for v in values)
        assert np.abs(difference).max(initial=0) < 10 * TOLERANCE * size, (eqn.primitive, which)


def subsets(eqn: Any) -> Iterator[tuple[int, ...]]:
    """Sets of real operands."""
    places = [i for i, v in enumerate(eqn.invars) if not isinstance(v, Literal) and is_real(v)]
    for n in range(1, min(len(places), 3) + 1):
        yield from itertools.combinations(places, n)


@pytest.mark.parametrize("form", FORMS)
def test_copies_that_are_said_to_stay_apart_do(form: str) -> None:
    for eqn, a, b in tried(form):
        choices = [
            [None, *([] if isinstance(v, Literal) else range(np.ndim(x)))]
            for v, x in zip(eqn.invars, a, strict=True)
        ]
        for places in itertools.product(*choices):
            sizes = {np.shape(x)[p] for x, p in zip(a, places, strict=True) if p is not None}
            found = None
            if len(sizes) == 1:
                with contextlib.suppress(Unaligned):
                    found = align(eqn, list(places))
            if found is not None:
                _moved(eqn, a, b, places, found, sizes.pop())


def _moved(eqn: Any, a: list[Any], b: list[Any], places: Any, found: Any, size: int) -> None:
    at = size // 2

    def move(x: Any, y: Any, place: int | None) -> Any:
        if place is None:
            return x
        index = (*[slice(None)] * place, at)
        return jnp.asarray(x).at[index].set(jnp.asarray(y)[index])

    before, after = bind(eqn, a), bind(eqn, list(map(move, a, b, places)))
    assert len(found) == len(before)
    for x, y, place in zip(before, after, found, strict=True):
        if place is None:
            agree(x, y)
        else:
            assert x.shape[place] == size
            agree(np.delete(numbers(x), at, place), np.delete(numbers(y), at, place))


@pytest.mark.parametrize("form", FORMS)
def test_functions_that_are_said_to_be_polynomials_are(form: str) -> None:
    for eqn, a, b in tried(form):
        for which in subsets(eqn):
            if is_linear(eqn, list(which)):
                vanish(eqn, a, b, which, 2)
                continue
            avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
            f = functools.partial(lambda e, *xs: bind(e, xs), eqn)
            if all(map(is_real, eqn.outvars)) and is_polynomial(f, avals, list(which), 2):
                vanish(eqn, a, b, which, 3)


@pytest.mark.parametrize("form", FORMS)
def test_functions_that_are_said_to_be_powers_are(form: str) -> None:
    times = 1.75
    for eqn, a, _ in tried(form):
        for which in subsets(eqn):
            for given in itertools.product([(1.0, True), (-0.5, False)], repeat=len(which)):
                powers = [None] * len(a)
                for i, power in zip(which, given, strict=True):
                    powers[i] = power
                found = power_of(eqn, powers)
                if found is UNKNOWN:
                    continue
                a = [jnp.abs(x) if i in which else x for i, x in enumerate(a)]
                scaled = [
                    (x * times ** powers[i][0]).astype(x.dtype) if i in which else x
                    for i, x in enumerate(a)
                ]
                for x, y in zip(bind(eqn, a), bind(eqn, scaled), strict=True):
                    agree(numbers(x) * times ** found[0], y)
                    if found[1] and x.size == a[which[0]].size:
                        agree(numbers(x).ravel(), numbers(a[which[0]]).ravel())


@pytest.mark.parametrize("form", FORMS)
def test_what_costs_are_taken_apart_by_is_linear(form: str) -> None:
    for eqn, a, b in tried(form):
        for which in subsets(eqn):
            effect = object()
            inputs = [Node(x, {effect: ()} if i in which else {}) for i, x in enumerate(a)]
            node = Node(bind(eqn, a)[0], {effect: ()}, eqn, inputs)
            if is_real(eqn.outvars[0]) and _is_linear(node):
                vanish(eqn, a, b, which, 2)


@pytest.mark.parametrize("form", FORMS)
def test_integers_are_computed_as_jax_does(form: str) -> None:
    for eqn, a, _ in tried(form):
        found = None
        if all(map(_known, a)):
            found = _computed(eqn, list(map(np.asarray, a)))
        for x, y in zip(found or [], bind(eqn, a) if found else [], strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_every_primitive_in_a_table_has_a_form() -> None:
    there = {x.name for x in gc.get_objects() if isinstance(x, Primitive)}
    seen = set()
    for f, draws in FORMS.values():
        args = [jnp.asarray(draw(np.random.default_rng(1))) for draw in draws]
        seen |= {eqn.primitive.name for eqn, _ in equations(jax.make_jaxpr(f)(*args))}
    assert not TABLES & there - seen
