"""Sites in `jax.shard_map`: a program over shards is the program without them, whatever the number of devices.

Every program here is made twice by one function: over the shards of a mesh, and with the body applied to all rows,
where a sum over the shards is no sum. Random words and discrete choices are equal bit by bit. Floats are equal up to
the rounding of what is computed from them.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy import stats
from weft.ppl import (
    GradientError,
    ModelError,
    condition,
    deterministic,
    do,
    draw,
    expect,
    factor,
    gen,
    gradients,
    marginalize,
    mask,
    noncentered,
    observed,
    repeat,
    sample,
    scale,
)
from weft.ppl.scans.cutting import inlined
from weft.ppl.stage.addresses import flatten
from weft.ppl.stage.structure import site_table

KEY = jax.random.key(7)
ROWS = 8
X = jnp.linspace(-1.0, 1.0, ROWS)
lax = jax.lax


class Plain:
    """The program without shards."""

    def map(self, f: Any, in_specs: Any, out_specs: Any) -> Any:
        return f

    def sum(self, x: Any, axes: Any = "i") -> Any:
        return x


class Sharded:
    """The program over all devices, as a mesh of one axis, or of two."""

    def __init__(self, check: bool = True, kind: AxisType = AxisType.Auto) -> None:
        n, self.check = jax.device_count(), check
        shape = (n // 2, 2) if n > 1 else (1, 1)
        self.line = jax.make_mesh((n,), ("i",), axis_types=(kind,))
        self.plane = jax.make_mesh(shape, ("a", "b"), axis_types=(kind,) * 2)

    def map(self, f: Any, in_specs: Any, out_specs: Any) -> Any:
        line = "'i'" in str((in_specs, out_specs))
        mesh = self.line if line else self.plane
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(f, mesh=mesh, check_vma=self.check, **specs)

    def sum(self, x: Any, axes: Any = "i") -> Any:
        return lax.psum(x, axes)


# --- programs ---------------------------------------------------------------------------------------------------------


class Bits(eqx.Module):
    """Random words: draws are equal bit by bit or not at all. With a parameter that differs from row to row, each row
    has a key of its own.
    """

    parameter: Any = 0.0
    shape: tuple[int, ...] = eqx.field(static=True, default=())

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.bits(key, sample_shape + self.shape)

    def log_prob(self, value: jax.Array) -> jax.Array:
        return jnp.zeros(value.shape)


def rows(how: Any) -> Any:
    """Choices that read their row, choices that do not, and a sum over all rows."""

    @gen
    def model(x):
        mu = sample("mu", dist.Normal(0.0, 1.0))

        def body(x, mu):
            def row(x):
                sample("bits", Bits())
                sample("own", Bits(x))
                theta = sample("theta", dist.Normal(mu, 0.5))
                rate = deterministic("rate", jax.nn.softplus(theta + x))
                return sample("y", dist.LogNormal(rate, 1.0))

            y = jax.vmap(row, axis_name="row")(x)
            return y, how.sum(jnp.sum(jnp.where(y > 1.0, y, mu)))

        return how.map(body, (P("i"), P()), (P("i"), P()))(x, mu)

    return model(X)


def batches(how: Any) -> Any:
    """Distributions that hold the rows themselves, and a choice that all shards share."""

    @gen
    def model(x):
        def body(x):
            shared = sample("shared", dist.Normal(0.0, 1.0))
            sample("bits", Bits(shape=(3,)))
            loc = dist.Normal(x[:, None] + shared, jnp.array([1.0, 2.0])).to_event(1)
            high = jax.nn.logsumexp(sample("loc", loc), -1)
            return sample("up", dist.Bernoulli(logits=high)), shared

        return how.map(body, (P("i"),), (P("i"), P()))(x)

    return model(X)


def series(how: Any) -> Any:
    """A series for each row, with a nested program and branches in it."""

    @gen
    def noise(s):
        return sample("e", dist.Normal(0.0, s))

    @gen
    def model(x):
        def body(x):
            def row(x):
                up = sample("up", dist.Bernoulli(0.5))

                def step(level, _):
                    level = 0.9 * level + x + sample("noise", noise(1.0))

                    def jump():
                        return level + sample("jump", dist.Normal(1.0, 0.1))

                    return lax.cond(up == 1, jump, lambda: level), None

                last, _ = lax.scan(step, x, None, length=3)
                return sample("y", dist.Normal(last, 1.0))

            return jax.vmap(row)(x)

        return how.map(jax.jit(body), (P("i"),), P("i"))(x)

    return model(X)


def steps(how: Any) -> Any:
    """Shards in a loop, and in a shard a loop over rows; a step reads the sum of all draws of the step before."""

    @gen
    def model(x):
        def body(x, level):
            def step(level, spread):
                e = jax.vmap(lambda x: sample("e", dist.Laplace(x + level, spread)))(x)
                return 0.5 * level + 0.1 * how.sum(jnp.sum(e)), e

            return lax.scan(step, level, jnp.array([1.0, 2.0]))

        def outer(level, _):
            return how.map(body, (P("i"), P()), (P(), P(None, "i")))(x, level)

        return lax.scan(outer, 0.0, None, length=2)

    return model(X)


def plane(how: Any) -> Any:
    """A mesh of two axes: rows over one and columns over the other, and rows over both."""

    @gen
    def model(x, z):
        tau = sample("tau", dist.HalfNormal(1.0))

        def body(x, z, tau):
            a = jax.vmap(lambda x: sample("a", dist.Normal(x, tau)))(x)

            def cell(a, z):
                return sample("cell", dist.Normal(a * z, tau))

            cells = jax.vmap(lambda a: jax.vmap(lambda z: cell(a, z))(z))(a)
            total = how.sum(jnp.sum(cells), ("a", "b"))
            return cells, sample("total", dist.Normal(total, 1.0)), how.sum(cells.sum(1), "b")

        cells = how.map(body, (P("a"), P("b"), P()), (P("a", "b"), P(), P("a")))(x, z, tau)

        def line(x):
            return jax.vmap(lambda x: sample("line", dist.Normal(x, 1.0)))(x)

        return cells, how.map(line, (P(("a", "b")),), P(("a", "b")))(x)

    return model(X, jnp.arange(1.0, 3.0))


def regression(how: Any) -> Any:
    """Groups, a design matrix, a factor, a mask, and a scale by the name of the axis."""

    @gen
    def model(x, group):
        slope = sample("slope", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        level = repeat(lambda: sample("level", dist.Normal(0.0, 1.0)), 5)

        def body(x, group, slope, level):
            mean = x @ slope + level[group]
            factor("soft", -0.1 * mean**2)

            def row(m, g):
                mask(lambda: sample("y", dist.Normal(m, 1.0)), g > 0)()
                return sample("t", dist.LogNormal(m, 1.0))

            return how.sum(jax.vmap(row, axis_name="row")(mean, group).sum()) / ROWS

        body = scale(body, {"row": 3.0})
        return how.map(body, (P("i"), P("i"), P(), P()), P())(x, group, slope, level)

    x = jax.random.normal(jax.random.key(2), (ROWS, 3))
    return model(x, jnp.arange(ROWS) % 4)


def transformed(how: Any) -> Any:
    """What transforms make of a program: its sites are staged anew in the shards."""
    model = noncentered(gen(rows(how).function), "theta")
    return condition(model, {"mu": 0.3})(X)


def intervened(how: Any) -> Any:
    """A nested program that has lost its only choice."""
    return do(gen(series(how).function), {"noise.e": jnp.ones((ROWS, 3))})(X)


def lanes(how: Any) -> Any:
    """Programs over shards under `jax.vmap`."""
    return jax.vmap(gen(batches(how).function))(jnp.stack([X, X + 1.0]))


PROGRAMS = {  # with the choices that are given
    "rows": (rows, ["y", "bits", "own"]),
    "batches": (batches, ["up", "bits"]),
    "series": (series, ["y", "up"]),
    "steps": (steps, []),
    "plane": (plane, ["cell"]),
    "regression": (regression, ["y"]),
    "transformed": (transformed, ["y", "bits", "own"]),
    "intervened": (intervened, ["y", "up"]),
    "lanes": (lanes, ["up", "bits"]),
}


@jax.jit
def facts(program: Any, key: jax.Array, given: dict[str, Any]) -> dict[str, Any]:
    """All that can be asked of a program."""
    trace = program.simulate(key)
    flat = flatten(trace.choices)
    some = {a: x for a, x in flat.items() if a.rpartition(".")[2] in given}
    target = program.given(some).unconstrain()
    z = target.init(key)
    latent = {a: x for a, x in flat.items() if a not in some}
    return {
        "choices": flat,
        "trace": (trace.value, trace.derived, trace.log_density, flatten(trace.active)),
        "densities": flatten(program.log_densities(trace.choices)),
        "generated": program.generate(jax.random.key(1), some),
        "start": z,
        "gradient": jax.value_and_grad(target.log_density)(z),
        "position": target.from_choices(latent),
    }


def compare(name: str, how: Any = None) -> None:
    """Assert that a program is the same over shards and without."""
    make, given = PROGRAMS[name]
    wanted = dict.fromkeys(given)
    expected, found = facts(make(Plain()), KEY, wanted), facts(make(how or Sharded()), KEY, wanted)
    for address, x in expected["choices"].items():
        y = found["choices"][address]
        assert (y.shape, y.dtype) == (x.shape, x.dtype), address
        if jnp.issubdtype(x.dtype, jnp.integer):
            np.testing.assert_array_equal(y, x, address)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, 2e-5, 2e-5), expected, found)


@pytest.mark.parametrize("name", PROGRAMS)
def test_shards_change_nothing(name: str) -> None:
    compare(name)


@pytest.mark.parametrize("how", [{"check": False}, {"kind": AxisType.Explicit}], ids=str)
def test_other_kinds_of_mesh(how: dict[str, Any]) -> None:
    """Without JAX's check of what is the same on all shards, and on a mesh whose shardings are part of types."""

    class Placed(Sharded):
        def map(self, f: Any, in_specs: Any, out_specs: Any) -> Any:
            mapped = super().map(f, in_specs, out_specs)
            if self.check:
                return lambda *xs: mapped(*map(jax.reshard, xs, in_specs))
            return mapped

    mesh = Placed(**how)
    if how.get("kind") is AxisType.Explicit:
        with jax.set_mesh(mesh.line):
            compare("batches", mesh)
    else:
        compare("batches", mesh)


@pytest.mark.parametrize(("devices", "names"), [(1, "rows"), (8, "batches plane")])
def test_any_number_of_devices(devices: int, names: str) -> None:
    code = f"import test_shard_map as t; assert t.jax.device_count() == {devices}\n"
    code += f"for name in {names.split()}: t.compare(name)"
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    places = {"PYTHONPATH": str(Path(__file__).parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **flags, **places}
    )
    assert run.returncode == 0, run.stderr


# --- against numbers from elsewhere -----------------------------------------------------------------------------------


def test_density_by_scipy(two_devices: list[jax.Device]) -> None:
    """One model by hand. The choice that all shards share counts once, and a sum over the shards is the sum."""
    choices = {
        "mu": np.float32(0.3),
        "theta": np.linspace(-1.0, 2.0, ROWS, dtype=np.float32),
        "total": np.float32(1.5),
        "y": np.linspace(3.0, -3.0, ROWS, dtype=np.float32),
    }
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))

    @gen
    def model(x):
        def body(x):
            mu = sample("mu", dist.Normal(0.5, 2.0))
            theta = jax.vmap(lambda x: sample("theta", dist.Normal(mu, 1.0)))(x)
            total = sample("total", dist.Normal(lax.psum(theta.sum(), "i"), 3.0))
            return jax.vmap(lambda t, x: sample("y", dist.Normal(t * x + total, 0.7)))(theta, x)

        return jax.shard_map(body, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(x)

    def expected(mu, theta, total, y):
        return (
            stats.norm.logpdf(mu, 0.5, 2.0)
            + stats.norm.logpdf(theta, mu, 1.0).sum()
            + stats.norm.logpdf(total, theta.sum(), 3.0)
            + stats.norm.logpdf(y, theta * np.asarray(X) + total, 0.7).sum()
        )

    def slope(name: str, at: Any = ...) -> float:
        up, down = ({a: np.array(x, float) for a, x in choices.items()} for _ in range(2))
        up[name][at] += 1e-4
        down[name][at] -= 1e-4
        return (expected(**up) - expected(**down)) / 2e-4

    program = model(X)
    np.testing.assert_allclose(program.log_density(choices), expected(**choices), 1e-5)
    gradient = jax.grad(program.log_density)(choices)
    for name in ("mu", "total"):
        np.testing.assert_allclose(gradient[name], slope(name), 1e-4, 1e-4)
    by_hand = [slope("theta", i) for i in range(ROWS)]
    np.testing.assert_allclose(gradient["theta"], by_hand, 1e-4, 1e-4)
    second = jax.hessian(program.log_density)(choices)["mu"]["mu"]
    np.testing.assert_allclose(second, -1 / 4.0 - ROWS, 1e-5)


def test_work_is_shared(two_devices: list[jax.Device]) -> None:
    """In the compiled density each device has its own rows only."""
    x = jnp.linspace(0.0, 1.0, 1024)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))

    @gen
    def model(x):
        def body(x):
            return jax.vmap(lambda x: sample("y", dist.Normal(jnp.sin(x), 1.0)))(x)

        return jax.shard_map(body, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(x)

    split = jax.NamedSharding(mesh, P("i"))
    x, y = jax.device_put((x, x), split)
    density = jax.jit(lambda x, y: model(x).log_density({"y": y}))
    text = str(density.lower(x, y).compile().as_text())
    assert "f32[512]" in text
    assert "f32[1024]" not in text


# --- methods ----------------------------------------------------------------------------------------------------------


def test_missing_data_and_predictions() -> None:
    y = jnp.where(jnp.arange(ROWS) % 3 == 0, jnp.nan, X)
    answers = []
    for how in (Plain(), Sharded()):
        program = rows(how)
        bits = {a: program.simulate(KEY).choices[a] for a in ("bits", "own")}
        data = {**bits, "y": observed(jnp.exp(y), where=~jnp.isnan(y))}
        target = program.given(data).unconstrain()
        keys = jax.random.split(KEY, 3)
        z = jax.vmap(target.init)(keys)
        predicted = program.predict(KEY, {"mu": jnp.array([0.1, 0.2])}, keep="theta")
        answers.append((jax.vmap(jax.grad(target.log_density))(z), z, predicted.choices))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, 1e-4, 1e-5), *answers)
    assert answers[1][1]["y"].shape == (3, 3)


def test_reparametrised_expectation() -> None:
    """The derivative follows the path of each draw; a strategy that needs more is refused."""

    def mean(how: Any, **strategy: Any) -> Any:
        def f(m):
            def body(x, m):
                z = jax.vmap(lambda x: sample("z", dist.Normal(m * x, 1.0), **strategy))(x)
                return how.sum(jnp.sum(z**2))

            return how.map(body, (P("i"), P()), P())(X, m)

        return jax.value_and_grad(expect(f), argnums=1)

    expected, found = (mean(how)(KEY, 0.7) for how in (Plain(), Sharded()))
    np.testing.assert_allclose(found, expected, 1e-5)
    with pytest.raises(GradientError, match="'z' stand in 'shard_map'"):
        mean(Sharded(), grad=gradients.score)(KEY, 0.7)


# --- what is refused --------------------------------------------------------------------------------------------------


def over_shards(body: Callable[[Any], Any]) -> Any:
    return gen(lambda x: Sharded().map(body, (P("i"),), P("i"))(x))


def part_of_the_rows(x):
    return x + sample("z", dist.Normal(jnp.sum(x), 1.0))


def branch_of_a_shard(x):
    on = jnp.sum(x) > 0
    return x + lax.cond(on, lambda: sample("z", dist.Normal(0.0, 1.0)), lambda: 0.0)


def event_axis(x):
    return sample("z", dist.Normal(x, 1.0).to_event(1))


def nobody_knows(x):
    sample("z", dist.Normal(jnp.zeros(x.shape[0]), 1.0))
    return x


def halves_of_rows(x):
    def half(x):
        z = jax.vmap(lambda x: sample("z", dist.Normal(0.0, 1.0)) + x)
        return z(x)

    return jax.vmap(half)(x.reshape(2, -1)).reshape(-1)


def steps_between_rows(x):
    z = jax.vmap(lambda d: sample("z", dist.Normal(0.0, 1.0)) * d)(jnp.diff(x))
    return x + z.sum()


def pairs_of_rows(x):
    jax.vmap(lambda a: jax.vmap(lambda b: sample("z", dist.Normal(a * b, 1.0)))(x))(x)
    return x


def loop_over_rows(x):
    return lax.scan(lambda c, x: (c + sample("z", dist.Normal(x, 1.0)), None), 0.0, x)[0] + x


def one_row_of_each(x):
    def row(x):
        step = lambda c, _: (c + sample("z", dist.Normal(lax.psum(x, "i"), 1.0)), None)  # noqa: E731
        return lax.scan(step, x, None, length=2)[0]

    return jax.vmap(row)(x)


def picked_rows(x):
    picked = x[
        np.arange(0, x.shape[0], 2)
    ]  # two rows of each shard: of eight rows, or of each shard's own
    return x + jax.vmap(lambda x: x * sample("z", dist.Normal(0.0, 1.0)))(picked).sum()


def constant_of_their_number(x):
    sample("z", dist.Normal(np.zeros(x.shape[0]), 1.0))
    return x


def steps_of_their_number(x):
    step = lambda c, _: (c + sample("z", dist.Normal(0.0, 1.0)), None)  # noqa: E731
    return x + lax.scan(step, 0.0, np.zeros(x.shape[0]))[0]


def slope_of_a_shard(x):
    """JAX sums this derivative over the mesh if it knows that it is by a value that is the same on all shards."""
    slope = jax.grad(lambda a: jnp.sum(jnp.sin(a * x)))(0.5)
    return jax.vmap(lambda x: sample("y", dist.Normal(slope * x, 1.0)))(x)


def until(x):
    z = lax.while_loop(lambda z: z < 0, lambda z: z + sample("z", dist.Normal(1.0, 1.0)), -1.0)
    return x + z


def nameless(x):
    draw(gen(lambda: sample("z", dist.Normal(0.0, 1.0)))())
    return x


def summed_out(x):
    inner = marginalize(lambda x: sample("z", dist.Bernoulli(0.5)) + 0 * x, "z")
    jax.vmap(inner)(x)
    return x


def gathered_batch(x):
    class Own(eqx.Module):
        loc: Any

        def sample(self, key):
            return self.loc + jax.random.normal(key, self.loc.shape)

        def log_prob(self, value):
            return -0.5 * (value - self.loc) ** 2

    return sample("z", Own(x))


REFUSED = {
    part_of_the_rows: "site 'z' in a shard_map reads what depends on rows of one shard along 'i'",
    branch_of_a_shard: "site 'z' in a shard_map stands in a branch that is chosen by",
    event_axis: "site 'z': an event axis of Independent is split",
    nobody_knows: "site 'z': nothing tells whether its axis of size",
    halves_of_rows: "site 'z': reshape makes its axis of size 2 of the rows of one shard",
    steps_between_rows: "site 'z': slice makes its axis of size 3 of the rows of one shard",
    pairs_of_rows: "site 'z': two of its axes are split over the same axis of the mesh",
    loop_over_rows: "site 'z' in a scan or map along the rows of a shard",
    one_row_of_each: "psum over 'i' stands in a jax.vmap over rows .* with site 'z'",
    picked_rows: "site 'z': gather makes its axis of size 2 of the rows of one shard",
    constant_of_their_number: "site 'z': nothing tells whether its axis of size",
    steps_of_their_number: "site 'z' in a scan or map of 4 steps: nothing tells",
    slope_of_a_shard: "depends on which values JAX takes to be the same on all shards",
    until: "site 'z' in a while_loop inside a shard_map",
    nameless: r"draw\(program\) stands in a shard_map",
    summed_out: "marginalize inside a shard_map",
    gathered_batch: "site 'z': the batch of Own is split over a mesh",
}


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: body.__name__)
def test_refused_by_name(body: Any, two_devices: list[jax.Device]) -> None:
    with pytest.raises(ModelError, match=REFUSED[body]):
        over_shards(body)(X).simulate(KEY)


def test_derivatives_inside(two_devices: list[jax.Device]) -> None:
    """Without JAX's check a derivative is that of one shard, and its sum over the mesh that of all rows."""

    def body(x):
        slope = jax.grad(lambda a: jnp.sum(jnp.sin(a * x)))(0.5)
        slope = lax.psum(slope, "i")

        def row(x):
            z = sample("z", dist.Normal(slope, 1.0))
            drift = jax.grad(lambda z: -jnp.cosh(z - x))(z)  # of a choice of the row
            return sample("y", dist.Normal(z + drift, 0.5))

        return jax.vmap(row)(x)

    x = np.asarray(X, float)
    z, y = np.linspace(0.0, 1.0, ROWS), np.linspace(1.0, -1.0, ROWS)
    right = stats.norm.logpdf(z, np.sum(x * np.cos(0.5 * x)), 1.0).sum()
    right += stats.norm.logpdf(y, z - np.sinh(z - x), 0.5).sum()
    model = gen(lambda x: Sharded(check=False).map(body, (P("i"),), P("i"))(x))
    density = model(X).log_density({"z": z.astype(np.float32), "y": y.astype(np.float32)})
    np.testing.assert_allclose(density, right, 1e-5)


def test_a_draw_in_a_carry(two_devices: list[jax.Device]) -> None:
    """JAX takes the draw to be the same on all shards. The error says how to go on."""

    def body(x):
        def row(x):
            first = sample("first", dist.Normal(0.0, 1.0))
            step = lambda z, _: (0.9 * z + x + sample("e", dist.Normal(0.0, 1.0)), None)  # noqa: E731
            return lax.scan(step, first, None, length=3)[0]

        return jax.vmap(row, axis_name="row")(x)

    with pytest.raises(TypeError, match="manual axis types") as error:
        over_shards(body)(X).simulate(KEY)
    assert any("check_vma=False" in note for note in error.value.__notes__)
    model = gen(lambda x: Sharded(check=False).map(body, (P("i"),), P("i"))(x))
    expected, found = (f(X).simulate(KEY) for f in (gen(body), model))
    np.testing.assert_allclose(found.value, expected.value, 1e-5, 1e-6)


def test_constants_along_the_rows(two_devices: list[jax.Device]) -> None:
    """NumPy's arrays may have the length of a shard, and then go along its rows. Transforms and filters stage again."""

    def body(x):
        z = sample("z", dist.Normal(np.zeros(x.shape[0], np.float32), 1.0 + x**2))
        return sample("y", dist.Normal(z + np.ones(x.shape[0], np.float32), 2.0)) + x

    x, z, y = np.asarray(X, float), np.linspace(0.0, 1.0, ROWS), np.linspace(1.0, -1.0, ROWS)
    right = stats.norm.logpdf(z, 0.0, 1.0 + x**2).sum() + stats.norm.logpdf(y, z + 1.0, 2.0).sum()
    model = over_shards(body)
    density = scale(model, 3.0)(X).log_density({"z": jnp.asarray(z), "y": jnp.asarray(y)})
    np.testing.assert_allclose(density, 3.0 * right, 1e-5)
    code, args = model(X).code()
    again = inlined(code.jaxpr, args)[0]  # as a filter does, to which these arrays are arguments
    assert {a: s.shape for a, s in site_table(again.jaxpr).items()} == {"z": (ROWS,), "y": (ROWS,)}
    expected, found = (noncentered(f, "z")(X).simulate(KEY) for f in (gen(body), model))
    np.testing.assert_allclose(found.choices["z_base"], expected.choices["z_base"], 1e-6)


def test_operations_on_a_row(two_devices: list[jax.Device]) -> None:
    """What JAX makes of operations under vmap keeps the axis of the rows."""
    eye = np.eye(3) * 4.0

    def row(np: Any, x: Any) -> list[Any]:
        v = np.stack([x, 1.0 - x, 2.0 * x])
        a = eye + np.outer(v, v)
        window = [np.maximum(v[0], v[1]), np.maximum(v[1], v[2])]
        picked = [v[1], v[0]] if np is not jnp else v[jnp.array([1, 0])]
        return [
            np.abs(np.fft.fft(v))[1],
            np.linalg.solve(a, v)[0],
            np.linalg.svd(a, compute_uv=False)[0],
            np.sort(v)[1] if np is not jnp else lax.top_k(v, 2)[0][1],
            np.max(np.stack(window)) if np is not jnp else windows(v),
            picked[0] * (v[2] if np is not jnp else jnp.ones(3).at[2].multiply(v[2])[2]),
            np.abs(x + 1j * v[1]) if np is not jnp else jnp.abs(lax.complex(x, v[1])),
        ]

    def windows(v: Any) -> Any:
        return jnp.max(lax.reduce_window(v, -jnp.inf, lax.max, (2,), (1,), "VALID"))

    def body(x):
        def one(x):
            key = jax.random.fold_in(jax.random.key(0), (10 * x).astype(int))
            loc = sum(row(jnp, x)) + 0.0 * jax.random.normal(key)
            return sample("y", dist.Normal(loc, 1.0))

        return jax.vmap(one)(x)

    right = [stats.norm.logpdf(0.5, sum(row(np, x)), 1.0) for x in np.asarray(X, float)]
    found = over_shards(body)(X).log_density({"y": jnp.full(ROWS, 0.5)})
    np.testing.assert_allclose(found, np.sum(right), 1e-5)


def test_one_row_of_a_shard_or_one_choice(two_devices: list[jax.Device]) -> None:
    """With one row a shard, its axis has the size of one choice that all rows share. Only what a site reads tells."""

    def shared(x):
        return x + sample("z", dist.Normal(jnp.zeros(1), 1.0))

    def along(x):
        z = jax.vmap(lambda _: sample("z", dist.Normal(0.0, 1.0)))(x)
        return sample("y", dist.Normal(x + z, 1.0))

    one_each = X[: jax.device_count()]
    with pytest.raises(ModelError, match="site 'z': a shard has one row, and nothing tells"):
        over_shards(shared)(one_each).simulate(KEY)
    expected, found = (f(one_each).simulate(KEY).choices for f in (gen(along), over_shards(along)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, 1e-6), expected, found)


def test_results_that_are_not_the_same_on_all_shards(two_devices: list[jax.Device]) -> None:
    def body(x):
        return jnp.sum(jax.vmap(lambda x: sample("z", dist.Normal(0.0, 1.0)) + 0 * x)(x))

    model = gen(lambda x: Sharded(check=False).map(body, (P("i"),), P())(x))
    with pytest.raises(ModelError, match="result 0 of a shard_map depends on the choices 'z'"):
        model(X).simulate(KEY)


def test_own_distributions_are_scored_all_the_same(two_devices: list[jax.Device]) -> None:
    """Only a draw needs the whole batch in one call."""
    density = over_shards(gathered_batch)(X).log_density({"z": X + 1.0})
    np.testing.assert_allclose(density, -0.5 * ROWS, 1e-6)


def test_sums_over_shards_are_refused_by_name(two_devices: list[jax.Device]) -> None:
    def model(x):
        def body(x):
            z = sample("z", dist.Bernoulli(0.5))
            return jax.vmap(lambda x: sample("y", dist.Normal(z + x, 1.0)))(x)

        return Sharded().map(body, (P("i"),), P("i"))(x)

    with pytest.raises(ModelError, match="'shard_map'"):
        marginalize(gen(model), "z")(X).log_density({"y": X})


def test_batches_of_many_families(two_devices: list[jax.Device]) -> None:
    """A distribution of all rows of a shard is drawn as that of all rows is."""
    families = {
        "uniform": lambda x: dist.Uniform(x - 1.0, x + 1.0),
        "truncated": lambda x: dist.TruncatedNormal(x, 1.0, low=0.0),
        "shifted": lambda x: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(x, 2.0)
        ),
        "expanded": lambda x: dist.Normal(0.0, 1.0).expand([x.shape[0]]),
        "mixture": lambda x: dist.MixtureSameFamily(
            dist.Categorical(logits=jnp.stack([x, -x], -1)),
            dist.Normal(jnp.stack([x, -x], -1), 1.0),
        ),
        "vector": lambda x: dist.MultivariateNormal(jnp.stack([x, x, x], -1), jnp.eye(3)),
    }

    def body(x):
        for name, family in families.items():
            value = sample(name, family(x))
            x = x + 0.1 * (value[:, 0] if name == "vector" else value)
        return x

    expected, found = (f(X).simulate(KEY) for f in (gen(body), over_shards(body)))
    for name, x in expected.choices.items():
        np.testing.assert_allclose(found.choices[name], x, 1e-5, 1e-6, err_msg=name)
    np.testing.assert_allclose(found.log_density, expected.log_density, 1e-5)


def test_all_rows_on_every_shard(two_devices: list[jax.Device]) -> None:
    """What is gathered is whole: choices along it are shared by all shards, and count once."""

    def body(x):
        rows = lax.all_gather(x, "i", tiled=True)
        z = jax.vmap(lambda x: sample("z", dist.Normal(x, 1.0)))(rows)
        return x + jnp.sum(z)

    plain = jax.vmap(lambda x: sample("z", dist.Normal(x, 1.0)))
    expected, found = (f(X).simulate(KEY) for f in (gen(plain), over_shards(body)))
    np.testing.assert_array_equal(found.choices["z"], expected.choices["z"])
    np.testing.assert_allclose(found.log_density, expected.log_density, 1e-6)


def test_an_axis_that_is_named_is_known(two_devices: list[jax.Device]) -> None:
    """A choice that nothing reads has the rows' axis by its name."""

    def body(x):
        jax.vmap(lambda x: sample("z", dist.Normal(0.0, 1.0)), axis_name="row")(x)
        return jax.vmap(lambda x: sample("y", dist.Normal(x, 1.0)), axis_name="row")(x)

    assert over_shards(body)(X).shapes()["z"].shape == (ROWS,)
