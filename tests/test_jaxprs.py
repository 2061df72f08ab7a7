"""Walks of jaxprs: evaluation, forward analyses, folds, and equality of code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from weft.ppl.stage.compat import bind
from weft.ppl.stage.equality import outline, same_code
from weft.ppl.stage.jaxprs import Axes, Holds, equations, evaluate, flow
from weft.ppl.stage.wiring import is_call, is_checkpoint, states_derivative, wiring


@jax.custom_jvp
def doubled(x):
    return 2.0 * x


doubled.defjvp(lambda primals, tangents: (doubled(primals[0]), 2.0 * tangents[0]))


@jax.custom_vjp
def tripled(x):
    return 3.0 * x


tripled.defvjp(lambda x: (3.0 * x, None), lambda _, g: (3.0 * g,))


def reduced(x):
    return lax.reduce(x, 0.0, lambda a, b: a * b + 1.0, (0,))


FORMS = {
    "jit": (jax.jit(lambda x: jnp.sin(x)), "call"),
    "checkpoint": (jax.checkpoint(lambda x: jnp.sin(x)), "call"),
    "custom_jvp": (doubled, "call"),
    "custom_vjp": (tripled, "call"),
    "scan": (lambda x: lax.scan(lambda c, y: (c + y, c), 0.0, x)[0], "loop"),
    "while": (lambda x: lax.while_loop(lambda c: c.sum() < 3, lambda c: c + 1, x), "unbounded"),
    "cond": (lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), "branches"),
    "reduce": (reduced, None),
    "reduce_and": (lambda x: jnp.all(x > 0), None),
    "top_k": (lambda x: lax.top_k(x, 2), None),
    "sort": (lambda x: lax.sort(x), None),
    "solve": (
        lambda x: lax.custom_linear_solve(lambda v: 2.0 * v, x, lambda _, b: b / 2.0),
        None,
    ),
}
ONES = jnp.ones(3)


def outermost(form):
    """The equation that a form is about: the last one with a jaxpr, or the last."""
    eqns = jax.make_jaxpr(FORMS[form][0])(ONES).jaxpr.eqns
    held = [e for e in eqns if wiring(e)]
    return held[-1] if held else eqns[-1]


@pytest.mark.parametrize("form", FORMS)
def test_kind_of_an_equation(form):
    found = wiring(outermost(form))
    assert (None if found is None else found.kind) == FORMS[form][1]


@pytest.mark.parametrize("form", FORMS)
def test_calls(form):
    eqn = outermost(form)
    assert is_call(eqn) == (form in ("jit", "checkpoint"))
    assert is_checkpoint(eqn) == (form == "checkpoint")
    assert states_derivative(eqn) == (form in ("custom_jvp", "custom_vjp"))


# --- evaluation -------------------------------------------------------------------------------------------------------


def nested(x, n):
    """A scan in a cond in a jit, beside a while loop."""

    @jax.jit
    def inner(x):
        def step(c, y):
            c = c + y * 2.0
            return c, jnp.sin(c)

        return lax.cond(x.sum() > 0, lambda x: lax.scan(step, 0.0, x), lambda x: (1.0, x), x)

    total, each = inner(x)
    _, power = lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] * 2.0), (0, total))
    return power, each


def test_evaluate_gives_what_jax_gives():
    closed = jax.make_jaxpr(nested)(ONES, 3)
    found = evaluate(closed, [ONES, 3])
    np.testing.assert_array_equal(found[0], nested(ONES, 3)[0])
    np.testing.assert_array_equal(found[1], nested(ONES, 3)[1])


def test_evaluate_hands_equations_over():
    closed = jax.make_jaxpr(lambda x: jnp.sin(x) + jnp.cos(x) * 2.0)(1.0)

    def equation(eqn, ins):
        return [10.0] if eqn.primitive.name == "sin" else None

    np.testing.assert_allclose(
        evaluate(closed, [1.0], equation), [10.0 + 2 * np.cos(1.0)], rtol=1e-6
    )


def test_evaluate_keeps_custom_derivatives():
    @jax.custom_jvp
    def f(x):
        return x**2

    f.defjvp(lambda primals, tangents: (primals[0] ** 2, 100.0 * tangents[0]))
    closed = jax.make_jaxpr(f)(3.0)

    def inlined(eqn, ins):
        return evaluate(wiring(eqn).bodies[0].jaxpr, ins) if is_call(eqn) else None

    assert jax.grad(lambda x: evaluate(closed, [x], inlined)[0])(3.0) == 100.0


# --- folds ------------------------------------------------------------------------------------------------------------


def where(f, *args, name):
    """Places of the equations of a primitive."""
    closed = jax.make_jaxpr(f)(*args)
    return [place for eqn, place in equations(closed) if eqn.primitive.name == name]


def test_place_of_an_equation():
    (place,) = where(lambda x: nested(x, 3), ONES, name="sin")
    assert place.kinds == ("call", "branches", "loop")
    assert place.rounds == (1, 1, 3)
    _, branch, _ = place.around
    assert branch[1] == 1  # the true branch
    assert len(place.numbers) == 2 * len(place.around) + 1


def test_rounds_may_be_unknown():
    def f(x):
        def inner(c, _):
            return jnp.sin(c), None

        def outer(c, _):
            return lax.scan(inner, c, None, length=5)[0], None

        return lax.while_loop(
            lambda c: c < 1, lambda c: jnp.cos(c), lax.scan(outer, x, None, length=4)[0]
        )

    assert [p.rounds for p in where(f, 1.0, name="sin")] == [(4, 5)]
    assert [p.rounds for p in where(f, 1.0, name="cos")] == [(None,)]


def test_equations_inside_of_plain_operations_are_listed():
    (place,) = where(reduced, ONES, name="mul")
    assert place.kinds == (None,)


def test_enter_decides_what_is_listed():
    closed = jax.make_jaxpr(nested)(ONES, 3)
    top = [eqn for eqn, _ in equations(closed, enter=lambda _: False)]
    assert top == list(closed.jaxpr.eqns)


def test_holds():
    sines = Holds(lambda eqn: eqn.primitive.name == "sin")
    closed = jax.make_jaxpr(nested)(ONES, 3)
    assert sines(closed)
    assert [sines.at(e) for e in closed.jaxpr.eqns] == [
        e.primitive.name in ("jit", "pjit") for e in closed.jaxpr.eqns
    ]
    assert not Holds(lambda eqn: eqn.primitive.name == "tan")(closed)


# --- forward analyses -------------------------------------------------------------------------------------------------


def union(sets):
    return frozenset().union(*sets)


def depends(f, *args, transfer=lambda *_: None):
    """For each result of a function, the numbers of the arguments that it depends on."""
    closed = jax.make_jaxpr(f)(*args)
    ins = [frozenset([i]) for i in range(len(args))]
    return [set(x) for x in flow(closed, ins, transfer, union)]


def shifted(a, b, c, d):
    """What enters at d takes three steps to reach a."""

    def step(carry, _):
        a, b, c, d = carry
        return (b, c, d, d), a

    (a, _, _, d), before = lax.scan(step, (a, b, c, d), None, length=2)
    return a, d, before


FLOWS = {
    "plain operations join": (lambda a, b: (a + b, a * 1.0, 2.0), 2, [{0, 1}, {0}, set()]),
    "a call keeps its results apart": (jax.jit(lambda a, b: (b, a)), 2, [{1}, {0}]),
    "also one with its own derivative": (lambda a, b: (doubled(a), tripled(b)), 2, [{0}, {1}]),
    "a cond depends on what chooses": (
        lambda i, a, b: lax.cond(i > 0, lambda a, b: (a, 1.0), lambda a, b: (b, 1.0), a, b),
        3,
        [{0, 1, 2}, {0}],
    ),
    "a loop is followed until nothing grows": (
        shifted,
        4,
        [{1, 2, 3}, {3}, {0, 1, 2, 3}],
    ),
    "inputs of a scan stay apart": (
        lambda a, b: lax.scan(lambda c, x: (c + 1.0, x * 2.0), a, b[None])[:2],
        2,
        [{0}, {1}],
    ),
    "a while loop depends on its predicate, and may make no step": (
        lambda n, a, b, c: lax.while_loop(
            lambda s: s[0] < n, lambda s: (s[0] + 1.0, c, 2.0 * s[2]), (0.0, a, b)
        ),
        4,
        [{0}, {0, 1, 3}, {0, 2}],
    ),
    "a reduction is no call": (
        lambda a, b: lax.reduce(jnp.stack([a, b]), 0.0, lambda x, _: x, (0,)),
        2,
        [{0, 1}],
    ),
}


@pytest.mark.parametrize("case", FLOWS)
def test_flow(case):
    f, n, expected = FLOWS[case]
    assert depends(f, *[jnp.float32(i) for i in range(n)]) == expected


def test_flow_without_steps_keeps_the_carry():
    def last(length):
        return lambda a, b: lax.scan(lambda c, _: (b, None), a, None, length=length)[0]

    assert depends(last(0), 1.0, 2.0) == [{0, 1}]
    assert depends(last(1), 1.0, 2.0) == [{1}]


def test_transfer_takes_over_and_learns_what_decides():
    seen = []

    def transfer(eqn, ins, place):
        if eqn.primitive.name != "sin":
            return None
        seen.append((set(place.deciding), place.kinds))
        return [frozenset()]

    def f(i, x):
        return lax.cond(i > 0, lambda x: jnp.sin(x), lambda x: x, x)

    assert depends(f, 1, 2.0, transfer=transfer) == [{0, 1}]
    assert seen == [({0}, ("branches",))]


def test_axes_are_sliced_and_stacked():
    """An analysis that counts leading axes of a value that carry an index."""
    axes = Axes(lambda x, n: x - n, lambda x, n: x + n)

    def ranks(eqn, ins, place):
        return None if wiring(eqn) else [v.aval.ndim for v in eqn.outvars]

    def f(xs):
        return lax.scan(lambda c, x: (c + 1.0, x.T * 2.0), 0.0, xs)

    closed = jax.make_jaxpr(f)(jnp.ones((4, 3, 2)))
    assert flow(closed, [3], ranks, lambda xs: max(xs, default=0), axes) == [0, 3]


# Random programs of three values: the analysis covers what changes when an argument does.

_OPS = st.sampled_from(["add", "swap", "jit", "cond", "scan", "while", "reduce", "drop"])


def program(ops):
    """A function of three numbers, by a list of operations, each on the results of those before."""

    def then(op, a, b, c):
        if op == "add":
            return a + 2.0 * b, b, c
        if op == "swap":
            return b, c, a
        if op == "jit":
            return jax.jit(lambda a, b, c: (a * 3.0, c, b + 1.0))(a, b, c)
        if op == "cond":
            return lax.cond(a > 0, lambda b, c: (b, c, b), lambda b, c: (c, b, b), b, c)
        if op == "scan":
            return lax.scan(lambda s, _: ((s[1], s[2] + s[1], s[2]), None), (a, b, c), length=2)[0]
        if op == "while":
            return lax.while_loop(
                lambda s: s[0] < 2.0, lambda s: (s[0] + 1.0, s[2], s[1]), (a, b, c)
            )
        if op == "reduce":
            total = lax.reduce(jnp.stack([a, b]), 0.0, lambda x, y: x * 0.5 + y, (0,))
            return total, b, c
        return jnp.float32(1.0), b, c

    return lambda a, b, c: functools.reduce(lambda s, op: then(op, *s), ops, (a, b, c))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(_OPS, min_size=1, max_size=5),
    st.lists(st.sampled_from([-1.5, 0.5, 1.0]), min_size=3, max_size=3),
)
def test_flow_covers_what_changes(ops, start):
    f = program(ops)
    found = depends(f, *map(jnp.float32, start))
    closed = jax.make_jaxpr(f)(*map(jnp.float32, start))
    values = evaluate(closed, list(map(jnp.float32, start)))
    for i in range(3):
        for other in (-2.25, 0.25, 1.75):
            moved = [jnp.float32(other if j == i else x) for j, x in enumerate(start)]
            for before, after, seen in zip(values, evaluate(closed, moved), found, strict=True):
                assert i in seen or before == after


# --- equality of code -------------------------------------------------------------------------------------------------


def staged(f, *args):
    return jax.make_jaxpr(f)(*(args or (1.0,)))


def with_rule(rule):
    @jax.custom_jvp
    def f(x):
        return 1.0 * x

    f.defjvp(rule)
    return f


def by_default(c):
    def rule(primals, tangents, c=c):
        return primals[0], c * tangents[0]

    return with_rule(rule)


def by_keyword(c):
    def rule(primals, tangents, *, c=c):
        return primals[0], c * tangents[0]

    return with_rule(rule)


def by_closure(c):
    return with_rule(lambda primals, tangents: (primals[0], c * tangents[0]))


def by_dict(c):
    held = {"slope": c}
    return with_rule(lambda primals, tangents: (primals[0], held["slope"] * tangents[0]))


def by_partial(c):
    def rule(c, primals, tangents):
        return primals[0], c * tangents[0]

    return with_rule(functools.partial(rule, c))


class Rule:
    def __init__(self, c):
        self.c = c

    def __call__(self, primals, tangents):
        return primals[0], self.c * tangents[0]

    def method(self, primals, tangents):
        return self(primals, tangents)


def by_object(c):
    return with_rule(Rule(c))


def by_method(c):
    return with_rule(Rule(c).method)


def by_another_rule(c):
    inner = by_closure(c)
    return with_rule(lambda primals, tangents: (primals[0], jax.jvp(inner, primals, tangents)[1]))


class Slotted:
    __slots__ = ("c",)

    def __init__(self, c):
        self.c = c


class BelowSlots(Slotted):
    """An object with slots above, and a dictionary of its own."""

    def __call__(self, primals, tangents):
        return primals[0], self.c * tangents[0]


class Named(Rule):
    """An object that takes the name of a function."""

    def __init__(self, c):
        functools.update_wrapper(self, with_rule)
        super().__init__(c)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Equal to any other."""

    c: float = dataclasses.field(compare=False)

    def __call__(self, primals, tangents):
        return primals[0], self.c * tangents[0]


def by_slot(c):
    return with_rule(BelowSlots(c))


def by_name(c):
    return with_rule(Named(c))


def by_frozen(c):
    return with_rule(Frozen(c))


def by_attribute(c):
    def rule(primals, tangents):
        return primals[0], rule.c * tangents[0]

    rule.c = c
    return with_rule(rule)


def by_global(c):
    names = {"C": c}
    exec("def rule(primals, tangents): return primals[0], C * tangents[0]", names)
    return with_rule(names["rule"])


def by_set(c):
    held = frozenset([c])
    return with_rule(lambda primals, tangents: (primals[0], max(held) * tangents[0]))


def by_key(c):
    held = {c: 1}
    return with_rule(lambda primals, tangents: (primals[0], max(held) * tangents[0]))


def by_rule_of_vmap(c):
    @jax.custom_batching.custom_vmap
    def f(x):
        return 2.0 * x

    f.def_vmap(lambda size, batched, x: (c * x, True))
    return with_rule(lambda primals, tangents: (primals[0], jax.vmap(f)(tangents[0][None])[0]))


def backward(c):
    @jax.custom_vjp
    def f(x):
        return 1.0 * x

    f.defvjp(lambda x: (x, None), lambda _, g: (c * g,))
    return f


def static(c):
    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def f(c, x):
        return 1.0 * x

    f.defjvp(lambda c, primals, tangents: (primals[0], c * tangents[0]))
    return lambda x: f(c, x)


def frozen_static(c):
    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def f(c, x):
        return 1.0 * x

    f.defjvp(lambda c, primals, tangents: (primals[0], c.c * tangents[0]))
    return lambda x: f(Frozen(c), x)


def callback(c):
    return lambda x: jax.pure_callback(functools.partial(np.multiply, c), x, x)


RULES = [
    by_slot,
    by_name,
    by_frozen,
    by_attribute,
    by_global,
    by_set,
    by_key,
    by_rule_of_vmap,
    frozen_static,
    callback,
    by_default,
    by_keyword,
    by_closure,
    by_dict,
    by_partial,
    by_object,
    by_method,
    by_another_rule,
    backward,
    static,
]


@pytest.mark.parametrize("make", RULES)
def test_rules_of_custom_derivatives_count(make):
    two, again, three = (staged(make(c)) for c in (2.0, 2.0, 3.0))
    assert outline(two) == outline(again) == outline(three)
    assert same_code(two, again)
    assert not same_code(two, three)


@pytest.mark.parametrize(("a", "b"), [(0.0, -0.0), (1, True), (2, 2.0)])
@pytest.mark.parametrize("make", RULES)
def test_numbers_in_rules_count_bit_by_bit(make, a, b):
    assert not same_code(staged(make(a)), staged(make(b)))


def test_one_function_is_equal_to_itself():
    f = by_object(2.0)
    assert same_code(staged(f), staged(f))
    assert same_code(staged(nested, ONES, 3), staged(nested, ONES, 3))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.0, -0.0),
        (1.0, 2.0),
        (jnp.nan, 1.0),
        (np.nan, -np.nan),
        (np.float32(0.0), np.float32(-0.0)),
        (0j, -0j),
    ],
)
def test_literals_by_bits(a, b):
    def with_literal(c):
        return staged(
            lambda x: lax.atan2(x, jnp.float32(c)) if not isinstance(c, complex) else x * c
        )

    assert same_code(with_literal(a), with_literal(a))
    assert not same_code(with_literal(a), with_literal(b))


def test_constants_by_bits():
    zero, minus = np.zeros(3, np.float32), -np.zeros(3, np.float32)
    code = [staged(lambda x, c=c: x * jnp.asarray(c), ONES) for c in (zero, zero.copy(), minus)]
    assert same_code(code[0], code[1])
    assert not same_code(code[0], code[2])


def test_order_of_operands_counts():
    assert not same_code(staged(lambda x, y: x - y, 1.0, 2.0), staged(lambda x, y: y - x, 1.0, 2.0))


def test_parameters_count():
    sums = [staged(lambda x, a=a: jnp.sum(x, a), jnp.ones((2, 2))) for a in (0, 1)]
    assert not same_code(*sums)
    bodies = [
        staged(lambda x, c=c: lax.scan(lambda s, _: (s * c, None), x, None, length=2)[0])
        for c in (2.0, 3.0)
    ]
    assert not same_code(*bodies)


def test_bind_of_every_form_is_what_evaluate_does():
    for f, _ in FORMS.values():
        closed = jax.make_jaxpr(f)(ONES)
        for found, right in zip(
            evaluate(closed, [ONES], bind_all), jax.tree.leaves(f(ONES)), strict=True
        ):
            np.testing.assert_array_equal(found, right)


def bind_all(eqn, ins):
    return bind(eqn, ins)
