"""Staging: once for each model, static arguments and shapes; nothing compiled twice, nothing stale.

What counts is a side effect of the model's own Python code, which runs only while it is staged, and
JAX's own events for traces and compilations.
"""

import functools
import gc
import operator
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.ppl import (
    Model,
    condition,
    factor,
    gen,
    mask,
    noncentered,
    repeat,
    sample,
    scale,
    scope,
)

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(30)
Normal = dist.Normal


class Counter:
    """Counts how often the model's code runs; not in an attribute, whose change would be noticed."""

    most = 1_000_000

    def __init__(self) -> None:
        self.ticks = iter(range(self.most))

    def __call__(self) -> None:
        next(self.ticks)

    @property
    def count(self) -> int:
        return self.most - operator.length_hint(self.ticks)


# Events of JAX: traces and compilations, of anything.
_events: list[str] = []


def _listen(event: str, duration: float, **_: Any) -> None:
    if event.startswith("/jax/core/compile"):
        _events.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def events_of(f: Callable[[], Any]) -> list[str]:
    _events.clear()
    jax.block_until_ready(f())
    return list(_events)


# --- counts -----------------------------------------------------------------------------------


def counted() -> tuple[Model, Counter]:
    counter = Counter()

    @gen
    def model(x, n=3):
        counter()
        theta = sample("theta", Normal(x.sum() if hasattr(x, "sum") else x, 1.0))
        return repeat(lambda: sample("y", Normal(theta, 1.0)), n)

    return model, counter


def test_a_hundred_eager_calls_stage_once() -> None:
    model, counter = counted()
    y = np.zeros(3)
    for i in range(100):
        program = model(0.1 * i)
        if i % 4 == 0:
            program.simulate(jax.random.fold_in(KEY, i))
        elif i % 4 == 1:
            program.log_density({"theta": 0.2 * i, "y": y + i})
        elif i % 4 == 2:
            program.generate(KEY, {"y": y - i})
        else:
            program.given({"y": y + i}).log_density({"theta": 0.0})
    assert counter.count == 1


def test_eager_calls_compile_once() -> None:
    model, _ = counted()

    def run(x: float, y: np.ndarray, position: Any) -> Any:
        program = model(x)
        return (
            program.simulate(KEY),
            program.log_density({"theta": x, "y": y}),
            program.given({"y": y}).generate(KEY),
            position.log_density({"theta": jnp.asarray(x)}),
            position.trace({"theta": jnp.asarray(x)}).choices,
        )

    ys = [np.zeros(3, np.float32), np.ones(3, np.float32)]
    positions = [
        model(x).given({"y": y}).unconstrain() for x, y in zip((0.0, 1.0), ys, strict=True)
    ]
    run(0.0, ys[0], positions[0])
    assert events_of(lambda: run(1.0, ys[1], positions[1])) == []


@pytest.mark.parametrize(
    ("second", "times"),
    [
        ((2.0,), 1),
        ((np.float32(2.0),), 2),  # a strong type is another type
        ((jnp.ones(2),), 2),
        ((1.0, 4), 2),
        ((1,), 2),  # an int is static
    ],
    ids=["float", "strong float", "shape", "static", "int"],
)
def test_what_stages_anew(second: tuple[Any, ...], times: int) -> None:
    model, counter = counted()
    for args in ((1.0,), second, (3.0,), second):
        model(*args).simulate(KEY)
    assert counter.count == times


def test_staging_is_kept_apart_by_precision() -> None:
    model, _ = counted()
    assert model(1.0).simulate(KEY).log_density.dtype == jnp.float32
    with jax.enable_x64(True):
        assert model(1.0).simulate(KEY).log_density.dtype == jnp.float64
    assert model(1.0).simulate(KEY).log_density.dtype == jnp.float32


def test_staging_is_kept_apart_by_mesh() -> None:
    """JAX writes the mesh that is set into the types of arrays, and compares them."""
    model, counter = counted()
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        with jax.set_mesh(jax.make_mesh((1,), ("i",), axis_types=(kind,))):
            found = model(1.0).simulate(KEY).choices
    assert counter.count == 2
    jax.tree.map(np.testing.assert_array_equal, found, model(1.0).simulate(KEY).choices)


def test_staging_is_kept_apart_by_the_precision_of_products() -> None:
    model = gen(lambda x: sample("y", dist.Normal(x @ x, 1.0)))

    def precision() -> Any:
        code, _ = model(jnp.ones((2, 2))).code()
        return next(e.params["precision"] for e in code.jaxpr.eqns if "precision" in e.params)

    with jax.default_matmul_precision("highest"):
        assert precision() == (jax.lax.Precision.HIGHEST,) * 2
    assert precision() is None


TRANSFORMS: dict[str, Callable[[Model, float], Model]] = {
    "condition": lambda m, v: condition(m, {"y": np.full(3, v)}),
    "condition, a scalar": lambda m, v: condition(m, {"theta": v}),
    "scale": lambda m, v: scale(m, {"theta": v}),
    "mask": lambda m, v: mask(m, {"y": np.array([v > 1, True, False])}),
    "noncentered": lambda m, v: noncentered(m, "theta"),
    "scope": lambda m, v: scope(m, "s"),
    "all": lambda m, v: scale(mask(condition(m, {"y": np.full(3, v)}), {"theta": v > 1}), v),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_made_anew_hits_the_cache(name: str) -> None:
    model, counter = counted()
    values = [TRANSFORMS[name](model, v)(1.0).simulate(KEY).log_density for v in (1.0, 2.0, 3.0)]
    assert counter.count == 1
    if name not in ("noncentered", "scope", "mask"):
        assert len(set(map(float, values))) == 3


def test_a_cell_that_runs_again_traces_again() -> None:
    """Equality of models is structural, but not of different functions."""

    def cell(shift: float) -> Any:
        return gen(lambda: sample("x", Normal(0.0, 1.0)) + shift)

    assert float(cell(1.0)().simulate(KEY).value) + 1 == pytest.approx(
        float(cell(2.0)().simulate(KEY).value)
    )


# --- nothing stale ----------------------------------------------------------------------------

W: Any = None


def _value(model: Model, *args: Any) -> float:
    return float(model(*args).simulate(KEY).value)


def _reads_global():
    return sample("x", dist.Delta(jnp.asarray(W)))


def _reads_global_through_a_helper():
    return jax.vmap(lambda _: _reads_global())(jnp.zeros(2)).sum() / 2


class CallsGlobal(eqx.Module):
    def __call__(self):
        return _reads_global()


class Plain:
    def __init__(self, w: float) -> None:
        self.w = jnp.asarray(w)

    def __call__(self):
        return self.method()

    def method(self):
        return sample("x", dist.Delta(self.w))


FUNCTIONS = {
    "function": _reads_global,
    "lambda": lambda: _reads_global(),
    "helper": _reads_global_through_a_helper,
    "partial": functools.partial(lambda f: f(), _reads_global),
    "module": CallsGlobal(),
    "transformed": condition(_reads_global, {}),
    "scoped": scope(_reads_global, "s"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("make", [float, jnp.float32, np.float32], ids=["float", "jax", "numpy"])
def test_a_rebound_global_is_seen(name: str, make: Any) -> None:
    global W
    model = gen(FUNCTIONS[name])
    for value in (1.0, 2.0, 1.0):
        W = make(value)
        assert _value(model) == value


def _step(carry, _):
    return carry, _reads_global()


INNER = {
    "scan": lambda: jax.lax.scan(_step, 0.0, None, length=1)[1][0],
    "cond": lambda: jax.lax.cond(jnp.array(True), _reads_global, _reads_global),
    "fori": lambda: jax.lax.fori_loop(0, 1, _adds_global, 0.0),
    "checkpoint": jax.checkpoint(_reads_global),
    "jit": jax.jit(_reads_global),
    "vmap": lambda: jax.vmap(jax.jit(lambda _: _reads_global()))(jnp.zeros(1))[0],
}


def _adds_global(_, carry):
    return carry + _reads_global()


@pytest.mark.parametrize("name", INNER)
def test_a_rebound_global_is_seen_in_inner_functions(name: str) -> None:
    """JAX keeps the inner jaxprs of a function that it knows, and serves the global it saw first."""
    global W
    model = gen(INNER[name])
    for value in (1.0, 2.0, 1.0):
        W = jnp.array(value)
        assert _value(model) == value


def test_a_rebound_global_is_seen_by_programs_and_targets_made_before() -> None:
    global W
    W = jnp.array(1.0)

    @gen
    def model():
        x = sample("x", Normal(W, 1.0))
        sample("y", Normal(x, 1.0))

    program = model()
    target = program.given({"y": 0.0})
    before = float(target.log_density({"x": 1.0}))
    W = jnp.array(3.0)
    assert float(target.log_density({"x": 1.0})) == pytest.approx(before - 2.0)
    assert float(target.unconstrain().log_density({"x": jnp.array(1.0)})) == pytest.approx(
        before - 2
    )
    assert float(program.log_density({"x": 1.0, "y": 0.0})) == pytest.approx(before - 2.0)


def test_a_rebound_closure_is_seen() -> None:
    w = jnp.array(1.0)
    model = gen(lambda: sample("x", dist.Delta(w)))
    assert _value(model) == 1.0
    w = jnp.array(2.0)
    assert _value(model) == 2.0


def test_what_containers_and_objects_hold_is_seen() -> None:
    held = {"w": jnp.array(1.0)}
    rows = [jnp.array(1.0)]
    thing = Plain(1.0)
    models = [
        gen(lambda: sample("x", dist.Delta(held["w"]))),
        gen(lambda: sample("x", dist.Delta(rows[0]))),
        gen(lambda: sample("x", dist.Delta(thing.w))),
        gen(thing.method),
        gen(thing),
    ]
    assert [_value(m) for m in models] == [1.0] * 5
    held["w"] = rows[0] = thing.w = jnp.array(2.0)
    assert [_value(m) for m in models] == [2.0] * 5


@pytest.mark.parametrize("make", [jax.custom_jvp, jax.custom_vjp])
def test_rules_of_derivatives_are_not_mixed_up(make: Any) -> None:
    """Two models whose staged code differs in nothing but an array that a custom rule captured."""

    def slope(c: jax.Array) -> float:
        f = make(lambda x: x * c)
        if make is jax.custom_jvp:
            f.defjvp(lambda p, t: (f(*p), t[0] * c))
        else:
            f.defvjp(lambda x: (x * c, None), lambda _, g: (g * c,))
        model = gen(lambda x: sample("y", Normal(f(x), 1.0)))
        return float(jax.grad(lambda x: model(x).log_density({"y": 0.0}))(1.0))

    assert [slope(jnp.array(c)) for c in (2.0, 3.0, 2.0)] == [-4.0, -9.0, -4.0]


def test_arguments_and_data_are_not_kept() -> None:
    model, _ = counted()
    x, y = jnp.ones(5), jnp.zeros(3)
    model(x).given({"y": y}).log_density({"theta": 0.0})
    model(x).simulate(KEY)
    condition(model, {"y": y})(x).simulate(KEY)
    watched = [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()
    assert [w() for w in watched] == [None, None]


# --- targets under jit ------------------------------------------------------------------------


def test_a_staged_target_of_new_data_compiles_nothing() -> None:
    global W
    counter = Counter()

    @gen
    def model(x):
        theta = sample("theta", Normal(W, 1.0))
        return jax.vmap(lambda x: sample("y", Normal(theta * x, 1.0)), axis_name="row")(x)

    @eqx.filter_jit
    def chunk(target: Any, z: Any) -> Any:
        counter()
        position = target.unconstrain()
        return jax.value_and_grad(position.log_density)(z)

    z = {"theta": jnp.array(0.5)}
    xs = np.linspace(-1, 1, 4, dtype=np.float32)

    def run(w: float, scale: float) -> Any:
        global W
        W = jnp.float32(w)
        return chunk(model(xs * scale).given({"y": np.full(4, scale, np.float32)}).staged(), z)

    def exact(w: float, scale: float) -> float:
        y, mean = np.full(4, scale), 0.5 * xs * scale
        return float(dist.Normal(w, 1.0).log_prob(0.5) + dist.Normal(mean, 1.0).log_prob(y).sum())

    assert float(run(1.0, 1.0)[0]) == pytest.approx(exact(1.0, 1.0), rel=1e-5)
    W = jnp.float32(1.0)
    again = model(xs * 3).given({"y": np.full(4, 3.0, np.float32)}).staged()
    assert events_of(lambda: chunk(again, z)) == []
    for w, s in ((1.0, 2.0), (2.0, 1.0), (3.0, 3.0)):  # new data, and a rebound global
        assert float(run(w, s)[0]) == pytest.approx(exact(w, s), rel=1e-5)
    assert counter.count == 1


def test_staged_targets_of_one_model_compare_by_structure() -> None:
    def build(w: float, xs: Any, y: Any) -> Any:
        def model():
            theta = sample("theta", Normal(w * jnp.ones(()), 1.0))
            return jax.vmap(lambda x: sample("y", Normal(theta * x, 1.0)))(xs)

        return gen(model)().given({"y": y}).staged()

    xs, y = jnp.arange(3.0), np.zeros(3)
    a, b = build(1.0, xs, y), build(1.0, 2 * xs, y + 1)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert hash(jax.tree.structure(a)) == hash(jax.tree.structure(b))
    others = [build(2.0, xs, y), build(1.0, jnp.arange(4.0), np.zeros(4))]
    assert all(jax.tree.structure(a) != jax.tree.structure(o) for o in others)


# --- static and traced arguments --------------------------------------------------------------


class Layer(eqx.Module):
    """A module with a function among its fields, as networks have."""

    weight: jax.Array
    bias: float
    activation: Callable[[Any], Any]
    name: str = "layer"
    width: int = 2

    def __call__(self, x: Any) -> Any:
        return self.activation(self.weight * x + self.bias)


def test_arguments_follow_the_rule() -> None:
    """Arrays and floats are traced; ints, bools, strings, functions and None are what they are."""
    seen: dict[str, Any] = {}

    @gen
    def model(a, b, *rest, layer=None, **more):
        seen.update(a=a, b=b, rest=rest, layer=layer, more=more)
        return sample("x", Normal(0.0, 1.0))

    layer = Layer(jnp.ones(()), 0.5, jax.nn.tanh)
    model(1.0, 2, True, "three", None, np.float32(4.0), layer=layer, more={"k": [5.0, 6]}).simulate(
        KEY
    )
    traced = [
        seen["a"],
        seen["rest"][3],
        seen["layer"].weight,
        seen["layer"].bias,
        seen["more"]["more"]["k"][0],
    ]
    assert all(isinstance(v, jax.core.Tracer) for v in traced)
    assert (seen["b"], *seen["rest"][:3], seen["more"]["more"]["k"][1]) == (
        2,
        True,
        "three",
        None,
        6,
    )
    assert seen["layer"].activation is jax.nn.tanh
    assert (seen["layer"].name, seen["layer"].width) == ("layer", 2)


def test_true_is_not_one() -> None:
    @gen
    def model(flag):
        return sample("x", dist.Delta(jnp.float32(10.0 if flag is True else 20.0)))

    assert [_value(model, f) for f in (True, 1, 1.0, False)] == [10.0, 20.0, 20.0, 20.0]


def test_unhashable_static_arguments_are_refused() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

    model = gen(lambda thing: sample("x", Normal(0.0, 1.0)))
    with pytest.raises(TypeError, match="hashable"):
        model(Unhashable()).simulate(KEY)


def test_wrong_arguments_are_refused_where_the_model_is_applied() -> None:
    model, _ = counted()
    with pytest.raises(TypeError, match=r"model: .*'x'"):
        model()


# --- programs as pytrees ----------------------------------------------------------------------


@gen
def line(slope, layer=None, power=1):
    shift = sample("shift", Normal(slope, 1.0))
    mean = shift**power if layer is None else layer(shift)
    return sample("y", Normal(mean, 1.0))


CHOICES = {"shift": jnp.array(0.5), "y": jnp.array(-1.0)}


def _score(slope: Any) -> float:
    return float(line(float(slope)).log_density(CHOICES))


def test_programs_pass_through_jit() -> None:
    counter = Counter()

    @jax.jit
    def score(program: Any) -> jax.Array:
        counter()
        return program.log_density(CHOICES)

    for slope in (1.0, 2.0):
        assert float(score(line(slope))) == pytest.approx(_score(slope), rel=1e-6)
    assert counter.count == 1
    score(line(1.0, power=2))
    assert counter.count == 2


def test_programs_come_out_of_jit_and_scan() -> None:
    program = jax.jit(lambda s: line(s))(2.0)
    assert float(program.log_density(CHOICES)) == pytest.approx(_score(2.0), rel=1e-6)
    _, programs = jax.lax.scan(lambda c, s: (c, line(s)), 0, jnp.arange(3.0))
    assert programs.simulate(KEY).choices["y"].shape == (3,)


def test_a_vmapped_program_is_the_product_over_lanes() -> None:
    slopes = jnp.arange(3.0)
    programs = jax.vmap(line)(slopes)
    alone = [_score(s) for s in slopes]
    each = jax.vmap(lambda p: p.log_density(CHOICES))(programs)
    np.testing.assert_allclose(each, alone, rtol=1e-5)
    together = programs.log_density(jax.tree.map(lambda v: jnp.repeat(v, 3), CHOICES))
    assert float(together) == pytest.approx(sum(alone), rel=1e-5)
    total, _ = jax.lax.scan(lambda c, p: (c + p.log_density(CHOICES), None), 0.0, programs)
    assert float(total) == pytest.approx(sum(alone), rel=1e-5)
    assert programs.shapes()["y"].shape == (3,)


def test_a_program_is_an_argument_of_a_model() -> None:
    outer = gen(lambda program: sample("inner", program))
    trace = outer(line(1.0)).simulate(KEY)
    expected = line(1.0).log_density(trace.choices["inner"])
    np.testing.assert_allclose(trace.log_density, expected, rtol=1e-6)
    assert outer(jax.vmap(line)(jnp.arange(3.0))).simulate(KEY).value.shape == (3,)


def test_modules_with_functions_inside_pass_through_transformations() -> None:
    """Activation functions are static, weights are traced; gradients through `eqx.filter_grad`."""
    layer = Layer(jnp.array(0.7), 0.1, jax.nn.tanh)
    jitted = jax.jit(lambda p: p.log_density(CHOICES))
    value = jitted(line(1.0, layer=layer))
    expected = line(1.0, layer=layer).log_density(CHOICES)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    other = line(1.0, layer=eqx.tree_at(lambda m: m.activation, layer, jax.nn.relu))
    assert float(jitted(other)) != float(value)

    def loss(layer: Layer) -> jax.Array:
        return line(1.0, layer=layer).log_density(CHOICES)

    mean = np.tanh(0.7 * 0.5 + 0.1)
    exact = (-1.0 - mean) * (1 - mean**2) * 0.5
    assert float(eqx.filter_grad(loss)(layer).weight) == pytest.approx(exact, rel=1e-5)
    jitted = eqx.filter_jit(eqx.filter_grad(loss))
    assert float(jitted(layer).weight) == pytest.approx(exact, rel=1e-5)


def test_models_close_over_tracers() -> None:
    """What a model captured is an operand: gradients, vmaps and jits go through it."""

    def score(w: jax.Array) -> jax.Array:
        model = gen(
            lambda: jax.lax.cond(w > 0, lambda: sample("x", Normal(w, 1.0)), lambda: 0.0 * w)
        )
        return model().log_density({"x": 1.0})

    np.testing.assert_allclose(jax.grad(score)(3.0), -2.0, rtol=1e-6)
    slopes = jax.jit(jax.vmap(jax.grad(score)))(jnp.array([-1.0, 0.5, 3.0]))
    np.testing.assert_allclose(slopes, [0.0, 0.5, -2.0], rtol=1e-6)
    nested = gen(lambda w: sample("p", gen(lambda: sample("x", Normal(w, 1.0)))()))
    np.testing.assert_allclose(
        jax.hessian(lambda w: nested(w).log_density({"p": {"x": 1.0}}))(0.0), -1.0, rtol=1e-6
    )


def test_targets_pass_through_vmap_and_scan() -> None:
    """Data of several experiments, one target each."""
    ys = jnp.array([0.0, 1.0, 2.0])
    targets = jax.vmap(lambda y: line(1.0).given({"y": y}))(ys)
    exact = [float(line(1.0).log_density({"shift": 0.5, "y": y})) for y in ys]
    latents = {"shift": jnp.array(0.5)}
    each = jax.vmap(lambda t: t.unconstrain().log_density(latents))(targets)
    np.testing.assert_allclose(each, exact, rtol=1e-5)
    _, each = jax.lax.scan(lambda c, t: (c, t.log_density(latents)), 0, targets)
    np.testing.assert_allclose(each, exact, rtol=1e-5)


SLOPE = 2.0


@jax.custom_jvp
def sloped(x: Any) -> Any:
    return 1.0 * x


sloped.defjvp(lambda primals, tangents: (primals[0], SLOPE * tangents[0]))


def test_what_rules_of_derivatives_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule runs when a derivative is taken, by compiled code that is found by the staged program."""
    held = [2.0]

    @jax.custom_vjp
    def steep(x: Any) -> Any:
        return 1.0 * x

    steep.defvjp(lambda x: (x, None), lambda _, g: (held[0] * g,))

    @gen
    def model(x: Any) -> None:
        factor("f", sloped(x) + steep(x))

    def slope() -> float:
        return float(jax.grad(lambda x: model(x).log_density({}))(1.0))

    assert slope() == 4.0
    monkeypatch.setitem(globals(), "SLOPE", 3.0)
    assert slope() == 5.0
    held[0] = -0.0
    assert slope() == 3.0
