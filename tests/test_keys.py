"""Random keys: a draw depends on the key and on the address alone, and no two sites ever share noise.

`Bits` is a distribution whose draws are the random words themselves, so that two sites with one key would show equal
words, whatever they are made of. Two of n words of 64 bits agree by chance with probability n^2 / 2^65.
"""

import zlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats
from weft.ppl import (
    ModelError,
    block,
    condition,
    draw,
    expect,
    factor,
    gen,
    loop,
    mask,
    repeat,
    sample,
    scale,
    scope,
)
from weft.ppl.stage.addresses import flatten

from programs import CASES, NAMES, as_numpy, noise, run_lanes

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(20)
lax = jax.lax


class Bits(eqx.Module):
    """Sixty-four random bits; `parameter` is only there to be mapped, or not."""

    parameter: Any = 0.0

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.bits(key, (*sample_shape, 2))

    def log_prob(self, value: jax.Array) -> jax.Array:
        return jnp.zeros(value.shape[:-1])


class OneByOne(eqx.Module):
    """The same without a sample shape: every lane has a key of its own."""

    parameter: Any = 0.0

    def sample(self, key: jax.Array) -> jax.Array:
        return jax.random.bits(key, (2,))

    def log_prob(self, value: jax.Array) -> jax.Array:
        return jnp.zeros(())


def bits(name: str, parameter: Any = 0.0) -> jax.Array:
    return sample(name, Bits(parameter))


def word(name: str) -> jax.Array:
    """A site whose value can steer control flow: uniform in (0, 1)."""
    return (bits(name)[0] >> 8) / 2**24


XS = np.arange(3.0, dtype=np.float32)


# --- constructs ----------------------------------------------------------------------------------


@gen
def _pair(parameter=0.0):
    return bits("first", parameter) ^ bits("second")


@jax.jit
def _helper(parameter):
    return bits("inner", parameter)


def _steps(length: int, start: Any = 0.0, **settings: Any) -> Any:
    def step(carry, _):
        return carry + 1, bits("step", carry)

    return lax.scan(step, start, None, length=length, **settings)[1]


CONSTRUCTS: dict[str, Callable[[], Any]] = {}


def construct(f: Callable[[], Any]) -> Callable[[], Any]:
    CONSTRUCTS[f.__name__] = f
    return f


@construct
def straight():
    return [bits("a"), bits("b"), bits("a_"), bits("1"), bits("0")]


@construct
def lanes():
    """Mapped, unmapped, both orders of the two, and a vmap outside each."""
    xs = jnp.asarray(XS)
    jax.vmap(lambda x: bits("mapped", x))(xs)
    jax.vmap(lambda _: bits("unmapped"))(xs)
    jax.vmap(lambda x: jax.vmap(lambda _: bits("outer", x))(jnp.zeros(4)))(xs)
    jax.vmap(lambda _: jax.vmap(lambda x: bits("inner", x))(xs))(jnp.zeros(4))
    jax.vmap(lambda x: jax.vmap(lambda y: bits("both", x + y))(xs), in_axes=0, out_axes=2)(xs)
    jax.vmap(
        jax.vmap(jax.vmap(lambda x: bits("middle", x), (None,), axis_size=2), (0,)),
        None,
        axis_size=2,
    )(xs)
    return jax.vmap(jax.vmap(lambda _: sample("single", OneByOne())))(jnp.zeros((2, 3)))


@construct
def scans():
    _steps(3)

    def outer(carry, x):
        scope(lambda: _steps(2, x), "steps")()
        bits("outer", x)
        jax.vmap(lambda _: bits("lane"))(jnp.zeros(2))
        return carry, None

    return lax.scan(outer, 0.0, jnp.asarray(XS), reverse=True)


@construct
def lanes_of_scans():
    return jax.vmap(lambda x: jax.vmap(lambda: _steps(3, x), axis_size=2)())(jnp.asarray(XS))


@construct
def calls():
    scope(_helper, "a")(0.0)
    scope(_helper, "b")(0.0)
    _helper(0.0)
    jax.checkpoint(lambda: jax.jit(lambda: bits("deep"))())()
    return jax.vmap(jax.jit(jax.checkpoint(lambda x: bits("mapped", x))))(jnp.asarray(XS))


@construct
def loops():
    lax.map(lambda x: bits("map", x), jnp.asarray(XS))
    lax.fori_loop(0, 3, lambda i, c: c + bits("fori", c)[0].astype(float), 0.0)
    loop(lambda n: n < 3, lambda n: n + 1 + 0 * bits("loop")[0].astype(int), 4, jnp.zeros((), int))

    def lane(n):
        return loop(lambda n: n < 3, lambda n: n + 1 + 0 * bits("lane")[0].astype(int), 4, n)

    return jax.vmap(lane)(jnp.arange(3))


@construct
def branches():
    def lane(x):
        return lax.cond(x > 0, lambda: bits("yes", x), lambda: bits("no") ^ bits("more"))

    def three(i):
        return lax.switch(i, [lambda: bits("p"), lambda: bits("q"), lambda: bits("p") ^ bits("q")])

    jax.vmap(lane)(jnp.asarray(XS))
    jax.vmap(three)(jnp.arange(3))
    lax.cond(word("coin") < 0.5, lambda: bits("heads"), lambda: bits("tails"))

    def step(carry, x):
        return carry, lax.cond(x > 0, lambda: bits("up"), lambda: scope(bits, "down")("up"))

    return lax.scan(step, 0.0, jnp.asarray(XS))


@construct
def programs():
    sample("a", _pair())
    sample("first", _pair())
    sample("lanes", jax.vmap(_pair)(jnp.asarray(XS)))
    jax.vmap(lambda x: sample("each", _pair(x)))(jnp.asarray(XS))
    jax.vmap(lambda _: sample("shared", _pair()))(jnp.asarray(XS))
    jax.vmap(lambda x: sample("both", jax.vmap(_pair)(x + jnp.asarray(XS))))(jnp.asarray(XS))
    sample("nested", gen(lambda: sample("a", _pair()) ^ sample("b", _pair()))())
    return lax.scan(lambda c, x: (c, sample("step", _pair(x))), 0.0, jnp.asarray(XS))


@construct
def transformed():
    given = np.array([7, 7], np.uint32)
    scope(scale(_pair.function, 2.0), "scaled")()
    scope(mask(_pair.function, {"first": True}), "masked")()
    scope(condition(_pair.function, {"first": given}), "conditioned")()
    factor("weight", 0.0)
    return repeat(lambda: repeat(lambda: bits("r"), 2), 3, axis_name="row")


@construct
def unrecorded():
    """Through the value: a while loop, a hidden site and programs run in place leave no record."""

    def body(state):
        i, words = state
        return i + 1, words.at[i].set(bits("w"))

    _, words = lax.while_loop(lambda s: s[0] < 4, body, (0, jnp.zeros((4, 2), jnp.uint32)))
    hidden = scope(block(lambda: bits("h"), "h"), "hidden")()
    return [words, hidden]


def gather(trace: Any, program: Any) -> np.ndarray:
    """All active words of a trace, one a row; of `unrecorded` the returned ones."""
    found = [np.zeros((0, 2), np.uint32)]
    for address, value in flatten(trace.choices).items():
        shape = program.sites[address].batch_shape
        active = np.asarray(flatten(trace.active)[address])
        active = np.broadcast_to(
            active.reshape(active.shape + (1,) * (len(shape) - active.ndim)), shape
        )
        found.append(np.asarray(value)[active])
    if not trace.choices:
        found += [np.asarray(v).reshape(-1, 2) for v in jax.tree.leaves(trace.value)]
    return np.concatenate(found)


def repeats(words: np.ndarray) -> int:
    return len(words) - len(np.unique(words, axis=0))


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_no_two_sites_share_noise_and_no_two_keys_do(name: str) -> None:
    """In one run and over three keys."""
    program = gen(CONSTRUCTS[name])()
    many = jax.jit(jax.vmap(program.simulate))(jax.random.split(KEY, 3))
    words = [gather(jax.tree.map(lambda v, i=i: v[i], many), program) for i in range(3)]
    assert len(words[0]) >= 3
    assert repeats(np.concatenate(words)) == 0


@pytest.mark.parametrize("name", ["lanes_of_scans", "branches", "programs", "unrecorded"])
def test_the_same_key_draws_the_same_under_jit_vmap_and_outside(name: str) -> None:
    """Bit by bit."""
    program = gen(CONSTRUCTS[name])()
    keys = jax.random.split(KEY, 3)
    eager = program.simulate(keys[1])
    vmapped = jax.tree.map(lambda v: v[1], jax.jit(jax.vmap(program.simulate))(keys))
    for found in (jax.jit(program.simulate)(keys[1]), vmapped):
        jax.tree.map(np.testing.assert_array_equal, found, eager)


@pytest.mark.parametrize("name", NAMES)
def test_no_noise_is_shared_in_any_program_of_the_table(name: str) -> None:
    """Standardised noise of all sites, lanes, steps, lanes of the program and three keys: in double precision no two
    agree to 1e-10, sign aside (chance below 1e-5 a program).
    """
    xs, trace, inside, _ = run_lanes(name)
    for found in (trace, inside):
        terms = [
            noise(CASES[name].oracle(as_numpy(found.choices, k, i), float(x)))
            for k in range(3)
            for i, x in enumerate(xs)
        ]
        gaps = np.diff(np.sort(np.abs(np.concatenate(terms))))
        assert gaps.size == 0 or gaps.min() > 1e-10


# --- a draw depends on the key and the address alone ---------------------------------------------


def _plain():
    return bits("x"), bits("y")


def _other_order():
    y = bits("y")
    return bits("x"), y


def _among_equations():
    noise = jnp.sin(jnp.arange(3.0)).sum()
    x = bits("x", noise)
    noise = lax.scan(lambda c, _: (jnp.cos(c), None), noise, None, length=3)[0]
    return x, bits("y", noise)


def _among_sites():
    bits("a")
    jax.vmap(lambda _: bits("b"))(jnp.zeros(2))
    x = bits("x")
    sample("p", _pair())
    return x, bits("y")


def _in_calls():
    x = jax.jit(lambda: jax.jit(lambda: bits("x"))())()
    return x, jax.checkpoint(lambda: bits("y"))()


def _in_branches():
    x = lax.cond(jnp.array(True), lambda: bits("x"), lambda: bits("x", 1.0))
    return x, lax.switch(2, [lambda: bits("z"), lambda: bits("w"), lambda: bits("y")])


def _transformed():
    return scale(mask(_plain, {"x": True}), 2.0)()


SAME = [_plain, _other_order, _among_equations, _among_sites, _in_calls, _in_branches, _transformed]


@pytest.mark.parametrize("f", SAME, ids=lambda f: f.__name__[1:])
def test_draws_do_not_depend_on_what_stands_around_a_site(f: Callable[[], Any]) -> None:
    expected = [expected_bits(KEY, "x"), expected_bits(KEY, "y")]
    program = gen(f)()
    for simulate in (program.simulate, jax.jit(program.simulate)):
        found = simulate(KEY).choices
        np.testing.assert_array_equal([found["x"], found["y"]], expected)


def test_draws_do_not_depend_on_which_choices_are_given() -> None:
    @gen
    def chain():
        a = sample("a", dist.Normal(0.0, 1.0))
        b = sample("b", dist.Normal(a, 1.0))
        return sample("c", dist.Normal(b, 2.0))

    free = chain().simulate(KEY).choices
    for given in ({"a": 3.0}, {"b": -1.0}, {"a": 0.5, "c": 1.0}):
        found, _ = chain().generate(KEY, given)
        c = {**free, **found.choices}
        if "b" not in given:
            np.testing.assert_allclose(c["b"] - c["a"], free["b"] - free["a"], atol=1e-6)
        if "c" not in given:
            np.testing.assert_allclose(c["c"] - c["b"], free["c"] - free["b"], atol=1e-6)


def expected_bits(key: jax.Array, *path: str | int) -> jax.Array:
    """What DESIGN promises: names are folded in by their hash, steps and lanes by their index."""
    for part in path:
        key = jax.random.fold_in(key, zlib.crc32(part.encode()) if isinstance(part, str) else part)
    return jax.random.bits(key, (2,))


def test_the_derivation_of_keys_is_a_promise() -> None:
    """No version of JAX or of Weft may change a draw."""

    def in_scan(c, x):
        jax.vmap(lambda x: bits("l", x))(jnp.asarray(XS))
        return c, scope(bits, "s")("n", x)

    @gen
    def model():
        bits("x")
        sample("p", gen(lambda: sample("q", _pair()))())
        jax.vmap(lambda x: bits("lane", x))(jnp.asarray(XS))
        jax.vmap(lambda _: bits("block"))(jnp.asarray(XS))
        jax.vmap(lambda x: lax.scan(lambda c, _: (c, bits("walk", x)), 0.0, None, length=2))(
            jnp.asarray(XS)
        )
        jax.vmap(jax.vmap(lambda x: bits("grid", x)))(jnp.ones((2, 3)))
        lax.scan(in_scan, 0.0, jnp.asarray(XS))

    found = flatten(model().simulate(KEY).choices)
    expected = {
        ("x",): found["x"],
        ("p", "q", "first"): found["p.q.first"],
        ("lane", 2): found["lane"][2],
        ("walk", 2, 1): found["walk"][2, 1],
        ("grid", 1, 2): found["grid"][1, 2],
        ("l", 2, 1): found["l"][2, 1],
        ("s", 2, "n"): found["s.n"][2],
    }
    for path, value in expected.items():
        np.testing.assert_array_equal(value, expected_bits(KEY, *path), err_msg=str(path))
    together = jax.random.bits(jax.random.fold_in(KEY, zlib.crc32(b"block")), (3, 2))
    np.testing.assert_array_equal(found["block"], together)


def test_lanes_and_steps_draw_alike_in_any_number() -> None:
    @gen
    def model(xs):
        jax.vmap(lambda x: bits("lane", x))(xs)
        lax.scan(lambda c, x: (c, bits("step", x)), 0.0, xs)
        jax.vmap(lambda x: scope(_steps, "walk")(2, x))(xs)

    few, many = model(jnp.zeros(2)).simulate(KEY), model(jnp.zeros(5)).simulate(KEY)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), few.choices, many.choices)


def test_prediction_draws_alike_in_any_batch() -> None:
    @gen
    def model():
        x = sample("x", dist.Normal(0.0, 1.0))
        return sample("y", dist.Normal(x, 1.0))

    xs = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    whole = model().predict(KEY, {"x": xs}).choices["y"]
    parts = model().predict(KEY, {"x": xs}, batch_size=4).choices["y"]
    assert whole.shape == (2, 3)
    np.testing.assert_allclose(whole, parts, rtol=1e-6)
    assert len(np.unique(np.asarray(whole) - xs)) == 6


# --- lanes in one draw ---------------------------------------------------------------------------


def test_lanes_drawn_as_a_block_are_independent() -> None:
    """20 keys of 400 lanes: standard normal by Kolmogorov and Smirnov (p > 1e-7); correlations of neighbouring lanes
    and of one lane under neighbouring keys within 5.5 of their error.
    """
    program = gen(lambda: repeat(lambda: sample("e", dist.Normal(0.0, 1.0)), 400))()
    e = np.asarray(jax.vmap(program.simulate)(jax.random.split(KEY, 20)).choices["e"], float)
    assert stats.kstest(e.ravel(), "norm").pvalue > 1e-7
    for a, b in ((e[:, 1:], e[:, :-1]), (e[1:], e[:-1])):
        assert abs(np.mean(a * b)) < 5.5 / np.sqrt(a.size)


# --- what other languages got wrong --------------------------------------------------------------


def _normal(name: str, scale: Any) -> jax.Array:
    return sample(name, dist.Normal(0.0, scale))


def _in_scan(s):
    return lax.scan(lambda c, _: (c + _normal("x", s) ** 2, None), 0.0, None, length=3)[0] / 2


def _in_fori(s):
    return lax.fori_loop(0, 3, lambda i, c: c + _normal("x", s) ** 2, 0.0) / 2


def _in_while(s):
    state = (0, 0.0)
    return lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + _normal("x", s) ** 2), state
    )[1]


def _in_jit(s):
    return jax.jit(lambda s: _normal("x", s) ** 2)(s) / 2


def _two_sites(s):
    return (_normal("x", s) - _normal("y", s)) ** 2


def _two_in_place(s):
    program = gen(lambda s: _normal("x", s))
    return (draw(program(s)).value - draw(program(s)).value) ** 2


@pytest.mark.parametrize(
    ("f", "truth"),
    [(_in_scan, 3.0), (_in_fori, 3.0), (_in_jit, 1.0), (_two_sites, 4.0), (_two_in_place, 4.0)],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_gradients_differ_between_keys_and_average_to_the_truth(f: Any, truth: float) -> None:
    """GenJAX 1.0.14 freezes the key in scan, fori_loop and jit (one gradient for every key); GenJAX 0.10.3 gives
    consecutive sites one noise (gradient 0 for 4). Null: mean `truth`, |z| < 5.5 on 4000 draws.
    """
    keys = jax.random.split(KEY, 4000)
    slopes = jax.jit(jax.vmap(jax.grad(expect(f), argnums=1), (0, None)))(keys, 1.0)
    slopes = np.asarray(slopes, float)
    assert len(np.unique(slopes)) > 3900
    assert abs(slopes.mean() - truth) < 5.5 * slopes.std() / np.sqrt(slopes.size)


def test_values_in_a_while_loop_differ_between_keys() -> None:
    """Null: mean 3, |z| < 5.5."""
    keys = jax.random.split(KEY, 2000)
    values = np.asarray(jax.vmap(expect(_in_while), (0, None))(keys, 1.0), float)
    assert len(np.unique(values)) > 1950
    assert abs(values.mean() - 3.0) < 5.5 * values.std() / np.sqrt(values.size)


# --- what a key may be ---------------------------------------------------------------------------


def test_raw_keys_are_typed_keys() -> None:
    program = gen(_plain)()
    raw, typed = program.simulate(jax.random.PRNGKey(3)), program.simulate(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, raw, typed)
    many = jax.vmap(program.simulate)(jax.random.split(jax.random.PRNGKey(3), 4))
    again = jax.vmap(program.simulate)(jax.random.split(jax.random.key(3), 4))
    jax.tree.map(np.testing.assert_array_equal, many, again)


def test_other_implementations_of_keys_work() -> None:
    words = gather(gen(lanes)().simulate(jax.random.key(0, impl="rbg")), gen(lanes)())
    assert repeats(words) == 0


@pytest.mark.parametrize(
    ("key", "words"),
    [(jax.random.split(KEY, 3), "vmap"), (0, "int"), (np.zeros(3), "float64"), (None, "NoneType")],
    ids=["several", "seed", "floats", "none"],
)
def test_what_is_no_key_is_refused(key: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        gen(_plain)().simulate(key)


def test_names_that_hash_alike_are_refused() -> None:
    a, b = "plumless", "buckeroo"
    assert zlib.crc32(a.encode()) == zlib.crc32(b.encode())
    with pytest.raises(ModelError, match=r"plumless.*buckeroo.*hash alike"):
        gen(lambda: (bits(a), bits(b)))().simulate(KEY)
    with pytest.raises(ModelError, match="hash alike"):
        gen(lambda: (bits(a), sample(b, _pair())))().simulate(KEY)
    with pytest.raises(ModelError, match="hash alike"):
        gen(lambda: (bits(a), lax.scan(lambda c, _: (c, bits(b)), 0.0, None, length=2)))().simulate(
            KEY
        )
    apart = gen(lambda: (scope(bits, "s")(a), scope(bits, "t")(b)))()
    assert repeats(gather(apart.simulate(KEY), apart)) == 0
