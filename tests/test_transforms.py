"""Transforms, each against a density written by hand, on models and on plain functions, alone and composed."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import lax
from weft.ppl import (
    Affine,
    DensityError,
    LocScale,
    Model,
    ObservationError,
    Transform,
    block,
    condition,
    do,
    mask,
    reparametrize,
    replay,
    scope,
    with_gradients,
)
from weft.ppl.stage.addresses import flatten

from weft import deterministic, factor, gen, noncentered, observed, repeat, sample, scale

KEY = jax.random.key(0)
N = dist.Normal


def logn(x: Any, mean: Any = 0.0, sd: Any = 1.0) -> Any:
    """The normal log density, in double precision and by hand."""
    z = (np.asarray(x, float) - mean) / sd
    return -0.5 * z**2 - np.log(sd) - 0.5 * math.log(2 * math.pi)


def close(a: Any, b: Any, tol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=tol, atol=tol)


@gen
def chain(start: Any = 0.0) -> Any:
    """Three choices in a row: x, then y, then z."""
    x = sample("x", N(start, 1.0))
    y = sample("y", N(x, 2.0))
    return sample("z", N(x + y, 3.0))


def chain_density(x: Any, y: Any, z: Any, start: Any = 0.0) -> Any:
    return logn(x, start) + logn(y, x, 2) + logn(z, x + y, 3)


@gen
def everywhere(xs: Any) -> Any:
    """The same site in lanes, steps, a branch for each lane, and a program: means 0, 1, 2 and 3."""
    lanes = jax.vmap(lambda x: sample("lanes", N(x, 2.0)), axis_name="row")(xs)
    _, steps = lax.scan(lambda c, x: (c, sample("steps", N(1.0 + x, 2.0))), 0.0, xs)

    def branch(x: Any) -> Any:
        return lax.cond(x > 0, lambda: sample("branch", N(2.0 + x, 2.0)), lambda: 0.0)

    branches = jax.vmap(branch)(xs)
    inner = sample("part", gen(lambda m: sample("inner", N(m, 2.0)))(3.0))
    return lanes.sum() + steps.sum() + branches.sum() + inner


XS = np.array([1.0, -1.0, 2.0])
VALUES = {
    "lanes": np.array([0.1, 0.2, 0.3]),
    "steps": np.array([0.4, 0.5, 0.6]),
    "branch": np.array([0.7, 0.8, 0.9]),
    "part.inner": np.array(1.0),
}
TERMS = {
    "lanes": logn(VALUES["lanes"], XS, 2),
    "steps": logn(VALUES["steps"], 1 + XS, 2),
    "branch": logn(VALUES["branch"], 2 + XS, 2) * (XS > 0),
    "part.inner": logn(1.0, 3.0, 2),
}
TOTAL = sum(np.sum(t) for t in TERMS.values())


def test_the_hand_written_density() -> None:
    close(everywhere(XS).log_density(VALUES), TOTAL)
    close(chain(1.0).log_density({"x": 0.1, "y": 0.2, "z": 0.3}), chain_density(0.1, 0.2, 0.3, 1.0))


def test_transforms_keep_the_kind() -> None:
    """A model gives a model of the same name and signature, a function a function."""
    for make in (
        lambda m: condition(m, {"x": 1.0}),
        lambda m: do(m, {"x": 1.0}),
        lambda m: block(m, "x"),
        lambda m: scope(m, "s"),
        lambda m: scale(m, 2.0),
        lambda m: mask(m, True),
        lambda m: replay(m, {"x": 1.0}),
        lambda m: noncentered(m, "x"),
        lambda m: with_gradients(m, {"x": None}),
    ):
        assert isinstance(make(chain), Model)
        assert make(chain).name == "chain"
        assert "start" in repr(make(chain))
        function = make(chain.function)
        assert callable(function)
        assert not isinstance(function, Model)
        with pytest.raises(TypeError, match="too many"):
            make(chain)(1.0, 2.0)
        assert make(chain)(start=5.0).simulate(KEY).value.shape == ()


# --- condition ------------------------------------------------------------------------------------


def test_condition() -> None:
    program = condition(chain, {"y": 0.2})(1.0)
    assert program.latents == ("x", "z")
    assert program.unnormalised
    assert program.unnormalised_sites == ("y",)
    own = chain_density(0.1, 0.2, 0.3, 1.0)
    close(program.log_density({"x": 0.1, "z": 0.3}), own)
    found = program.log_densities({"x": 0.1, "z": 0.3})
    close(found["y"], logn(0.2, 0.1, 2))
    trace, weight = program.generate(KEY, {"x": 0.1})
    assert set(trace.choices) == {"x", "z"}
    close(weight, logn(0.1, 1) + logn(0.2, 0.1, 2))
    close(trace.log_density, chain_density(0.1, 0.2, float(trace.choices["z"]), 1.0))
    close(program.given({"z": 0.3}).log_density({"x": 0.1}), own)
    close(program.given({"z": 0.3}).unconstrain().log_density({"x": jnp.array(0.1)}), own)


@pytest.mark.parametrize("address", VALUES)
def test_condition_everywhere(address: str) -> None:
    """In lanes, steps, branches and programs, with arrays, lists or nested dicts."""
    value = VALUES[address]
    rest = {a: v for a, v in VALUES.items() if a != address}
    forms: list[Any] = [{address: value}, {address: value.tolist()}]
    if "." in address:
        forms += [{"part": {"inner": 1.0}}, {("part", "inner"): jnp.array(1.0)}]
    for form in forms:
        program = condition(everywhere, form)(XS)
        assert set(program.latents) == set(rest)
        close(program.log_density(rest), TOTAL)
    close(condition(everywhere, VALUES)(XS).log_density({}), TOTAL)


def test_condition_in_part() -> None:
    seen = np.array([True, False, True])
    program = condition(everywhere, {"lanes": observed(VALUES["lanes"], where=seen)})(XS)
    assert "lanes" in program.latents
    other = np.where(seen, 99.0, 7.0)
    own = TOTAL - TERMS["lanes"][1] + logn(7.0, XS[1], 2)
    close(program.log_density({**VALUES, "lanes": other}), own)
    trace = program.simulate(KEY)
    close(trace.choices["lanes"][seen], VALUES["lanes"][seen])
    free = everywhere(XS).simulate(KEY)
    close(trace.choices["lanes"][1], free.choices["lanes"][1])


def test_condition_of_traced_values() -> None:
    density = lambda y: condition(chain, {"y": y})().log_density({"x": 0.1, "z": 0.3})  # noqa: E731
    close(jax.jit(density)(0.2), chain_density(0.1, 0.2, 0.3))
    slope = -(0.2 - 0.1) / 4 + (0.3 - 0.3) / 9
    close(jax.grad(density)(0.2), slope)
    close(
        jax.vmap(density)(jnp.array([0.2, 0.4])), [chain_density(0.1, y, 0.3) for y in (0.2, 0.4)]
    )
    program = jax.vmap(condition(chain, {"y": 0.2}))(jnp.array([0.0, 1.0]))
    both = {"x": np.array([0.1, 0.2]), "z": np.array([0.3, 0.4])}
    own = chain_density(0.1, 0.2, 0.3, 0.0) + chain_density(0.2, 0.2, 0.4, 1.0)
    close(program.log_density(both), own)


def test_condition_of_a_plain_function() -> None:
    def pair(m: Any) -> Any:
        x = sample("x", N(m, 1.0))
        return x + sample("y", N(x, 1.0))

    @gen
    def model() -> Any:
        total = condition(pair, {"y": 2.0})(1.0)
        return sample("z", N(total, 1.0))

    program = model()
    assert program.latents == ("x", "z")
    close(program.log_density({"x": 0.5, "z": 3.0}), logn(0.5, 1) + logn(2, 0.5) + logn(3, 2.5))


def test_condition_of_one_use_among_several() -> None:
    """A part that is nested twice is conditioned where its address says."""
    program = condition(gen(lambda: sample("a", chain()) + sample("b", chain())), {"a.y": 0.2})()
    assert program.latents == ("a.x", "a.z", "b.x", "b.y", "b.z")
    inside = gen(lambda: sample("a", condition(chain, {"y": 0.2})()) + sample("b", chain()))()
    assert inside.latents == program.latents
    choices = dict(zip(program.latents, (0.1, 0.3, 0.4, 0.5, 0.6), strict=True))
    own = chain_density(0.1, 0.2, 0.3) + chain_density(0.4, 0.5, 0.6)
    close(program.log_density(choices), own)
    close(inside.log_density(choices), own)


# --- do and replay --------------------------------------------------------------------------------


def test_do() -> None:
    program = do(chain, {"y": 0.2})(1.0)
    assert program.latents == ("x", "z")
    assert not program.unnormalised
    close(program.log_density({"x": 0.1, "z": 0.3}), logn(0.1, 1) + logn(0.3, 0.1 + 0.2, 3))
    _, weight = program.generate(KEY, {"x": 0.1})
    close(weight, logn(0.1, 1))
    assert do(chain, {"z": 7.0})().simulate(KEY).value == 7.0


@pytest.mark.parametrize("address", VALUES)
def test_do_everywhere(address: str) -> None:
    rest = {a: v for a, v in VALUES.items() if a != address}
    program = do(everywhere, {address: VALUES[address]})(XS)
    assert set(program.latents) == set(rest)
    close(program.log_density(rest), TOTAL - np.sum(TERMS[address]))


@pytest.mark.parametrize("transform", [do, replay])
def test_interventions_are_whole(transform: Any) -> None:
    """A part of a site is conditioned on, not intervened on."""
    rows = gen(lambda: repeat(lambda: sample("y", N(0.0, 1.0)), 3))
    partly = {"y": observed([1.0, 2.0, 3.0], where=[True, False, True])}
    with pytest.raises(ObservationError, match="'y' must be given whole"):
        transform(rows, partly)().shapes()


def test_replay() -> None:
    trace = chain(1.0).simulate(KEY)
    again = replay(chain, trace)(5.0).simulate(jax.random.key(1))
    assert again.choices == {}
    assert again.value == trace.value
    assert again.log_density == 0
    partly = replay(chain, {"x": 0.1, "elsewhere": 3.0})(5.0)  # what the model lacks is not missed
    assert partly.latents == ("y", "z")
    close(partly.log_density({"y": 0.2, "z": 0.3}), logn(0.2, 0.1, 2) + logn(0.3, 0.3, 3))


def test_replay_everywhere() -> None:
    trace = everywhere(XS).simulate(KEY)
    close(replay(everywhere, trace)(XS).simulate(jax.random.key(1)).value, trace.value)

    @gen
    def scored() -> Any:
        """A guide whose choices are replayed into the model, as elbos were once written."""
        m = sample("m", N(0.0, 1.0))
        return replay(chain.function, {"x": m})()

    close(scored().log_density({"m": 0.1, "y": 0.2, "z": 0.3}), chain_density(0.1, 0.2, 0.3))


# --- block and scope ------------------------------------------------------------------------------


def test_block() -> None:
    plain = chain().simulate(KEY)
    hidden = block(chain, "x")()
    trace = hidden.simulate(KEY)
    assert set(trace.choices) == {"y", "z"}
    for name in ("y", "z"):
        assert trace.choices[name] == plain.choices[name]
    assert hidden.latents == ("y", "z")
    assert set(block(chain)().simulate(KEY).choices) == set()
    with pytest.raises(DensityError, match="'x'.*hidden by block"):
        hidden.log_density({"y": 0.2, "z": 0.3})


def test_block_everywhere() -> None:
    plain = everywhere(XS).simulate(KEY)
    for patterns, left in (
        (("lanes", "branch"), {"steps", "part.inner"}),
        (("part",), {"lanes", "steps", "branch"}),
        (("*",), set()),  # a scope's name takes what is in it
        (("**",), set()),
        (("part.*", "steps"), {"lanes", "branch"}),
    ):
        trace = block(everywhere, *patterns)(XS).simulate(KEY)
        found = flatten(trace.choices)
        assert set(found) == left, patterns
        close(trace.value, plain.value)


def test_block_of_what_is_fixed_has_a_density() -> None:
    program = block(condition(chain, {"y": 0.2}), "y")()
    close(program.log_density({"x": 0.1, "z": 0.3}), chain_density(0.1, 0.2, 0.3))
    program = do(chain, {"y": 0.2})
    close(program().log_density({"x": 0.1, "z": 0.3}), logn(0.1) + logn(0.3, 0.3, 3))


def test_scope() -> None:
    def two() -> Any:
        return scope(chain.function, "a")(1.0) + scope(chain.function, "b")(2.0)

    program = gen(two)()
    assert program.latents == ("a.x", "a.y", "a.z", "b.x", "b.y", "b.z")
    values = np.arange(1, 7) / 10
    own = chain_density(*values[:3], 1.0) + chain_density(*values[3:], 2.0)
    close(program.log_density(dict(zip(program.latents, values, strict=True))), own)
    trace = program.simulate(KEY)
    assert trace.choices["a"]["x"] - 1 != trace.choices["b"]["x"] - 2
    assert scope(chain, "s")().latents == ("s.x", "s.y", "s.z")
    assert scope(scope(chain, "s"), "t")().latents == ("t.s.x", "t.s.y", "t.s.z")


def test_scope_is_nesting() -> None:
    """The same addresses, hence the same draws."""
    nested = gen(lambda: sample("a", chain(1.0)))().simulate(KEY)
    scoped = gen(lambda: scope(chain.function, "a")(1.0))().simulate(KEY)
    close(nested.value, scoped.value)
    lanes = gen(lambda xs: jax.vmap(lambda x: scope(chain.function, "a")(x))(xs))(XS)
    assert lanes.sites["a.x"].shape == (3,)
    close(
        lanes.simulate(KEY).value,
        gen(lambda xs: jax.vmap(lambda x: sample("a", chain(x)))(xs))(XS).simulate(KEY).value,
    )


# --- scale and mask -------------------------------------------------------------------------------


def test_scale() -> None:
    program = scale(chain, {"y": 3.0, "z": 0.5})()
    close(
        program.log_density({"x": 0.1, "y": 0.2, "z": 0.3}),
        logn(0.1) + 3 * logn(0.2, 0.1, 2) + 0.5 * logn(0.3, 0.3, 3),
    )
    assert program.simulate(KEY).choices == chain().simulate(KEY).choices
    for address, term in TERMS.items():
        close(scale(everywhere, {address: 3.0})(XS).log_density(VALUES), TOTAL + 2 * np.sum(term))
    close(scale(everywhere, {"part": 3.0})(XS).log_density(VALUES), TOTAL + 2 * TERMS["part.inner"])
    close(
        scale(everywhere, {"*": 3.0})(XS).log_density(VALUES), 3 * TOTAL
    )  # a scope's name takes what is in it


@pytest.mark.parametrize("address", VALUES)
def test_mask_everywhere(address: str) -> None:
    shape = VALUES[address].shape
    where = np.array([True, True, False])[: max(shape, default=0)] if shape else np.array(False)
    program = mask(everywhere, {address: where})(XS)
    own = TOTAL - np.sum(TERMS[address] * ~where)
    close(program.log_density(VALUES), own)
    trace = program.simulate(KEY)
    counted = where & (XS > 0) if address == "branch" else where
    assert np.broadcast_to(flatten(trace.active)[address], shape).tolist() == counted.tolist()
    plain = everywhere(XS).simulate(KEY)
    close(trace.value, plain.value)
    close(trace.log_density, program.log_density(trace.choices))


def test_mask_forms() -> None:
    c = {"x": 0.1, "y": 0.2, "z": 0.3}
    close(mask(chain, False)().log_density(c), 0.0)
    close(mask(chain, {"*": True})().log_density(c), chain_density(0.1, 0.2, 0.3))
    close(mask(mask(chain, {"x": False}), {"y": False})().log_density(c), logn(0.3, 0.3, 3))
    close(
        mask(mask(chain, {"x": False}), {"x": True})().log_density(c),
        chain_density(0.1, 0.2, 0.3) - logn(0.1),
    )

    @gen
    def grid() -> None:
        repeat(lambda: sample("g", N(jnp.zeros(3), 1.0)), 2)
        factor("f", jnp.array([1.0, 2.0]))

    g = {"g": np.arange(6.0).reshape(2, 3) / 3}
    rows = mask(grid, {"g": np.array([True, False])})()  # a mask of leading axes
    close(rows.log_density(g), logn(g["g"][0]).sum() + 3)
    whole = mask(grid, {"g": np.array([[True, False, True], [False, False, True]])})()
    close(whole.log_density(g), logn(g["g"])[[0, 0, 1], [0, 2, 2]].sum() + 3)
    close(mask(grid, {"f": np.array([True, False])})().log_density(g), logn(g["g"]).sum() + 1)


def test_mask_and_given() -> None:
    """A masked observation adds nothing, whatever it is; a masked latent is idle."""

    @gen
    def model(where: Any) -> None:
        mu = sample("mu", N(0.0, 1.0))
        mask(lambda: repeat(lambda: sample("y", N(mu, 1.0)), 3), {"y": where})()

    where = np.array([True, False, True])
    target = model(where).given({"y": [1.0, 1e6, 3.0]})
    close(target.log_density({"mu": 0.5}), logn(0.5) + logn([1, 3], 0.5).sum())
    gradient = jax.grad(target.unconstrain().log_density)({"mu": jnp.array(0.5)})
    close(gradient["mu"], -0.5 + 0.5 + 2.5)


def test_mask_guards_gradients() -> None:
    """What a masked site would give is not a number, and neither value nor gradient shows it."""
    model = gen(lambda s: mask(lambda: sample("y", N(0.0, s)), {"y": s > 1})())
    density = lambda s: model(s).log_density({"y": 1.0})  # noqa: E731
    close(density(0.0), 0.0)
    close(density(2.0), logn(1.0, 0, 2))
    close(jax.grad(density)(2.0), -1 / 2 + 1 / 8)
    close(jax.grad(density)(0.0), 0.0)


# --- noncentered and reparametrize ----------------------------------------------------------------


@gen
def funnel() -> Any:
    mu = sample("mu", N(0.0, 1.0))
    tau = sample("tau", dist.HalfNormal(1.0))
    theta = sample("theta", N(mu, tau))
    return sample("y", N(theta, 1.0))


HALF = math.log(2.0)


def test_noncentered() -> None:
    program = noncentered(funnel, "theta")()
    assert program.latents == ("mu", "tau", "theta_base", "y")
    choices = {"mu": 0.5, "tau": 2.0, "theta_base": 0.3, "y": 1.0}
    theta = 0.5 + 2.0 * 0.3
    own = logn(0.5) + logn(2.0) + HALF + logn(0.3) + logn(1.0, theta)
    close(program.log_density(choices), own)
    trace, _ = program.generate(KEY, choices)
    close(trace.derived["theta"], theta)
    target = program.given({"y": 1.0})
    z = {"mu": jnp.array(0.5), "tau": jnp.array(math.log(2.0)), "theta_base": jnp.array(0.3)}
    close(target.unconstrain().log_density(z), own + math.log(2.0))
    close(target.unconstrain().trace(z).derived["theta"], theta)
    # the law is that of the centred program: p(theta) = p(base) / tau
    centred = funnel().log_density({"mu": 0.5, "tau": 2.0, "theta": theta, "y": 1.0})
    close(own - math.log(2.0), centred)


@pytest.mark.parametrize("centered", [0.0, 0.3, 1.0])
def test_partly_centred(centered: float) -> None:
    program = reparametrize(funnel, {"theta": LocScale(centered)})()
    base = 0.3
    mu, tau = 0.5, 2.0
    theta = mu + tau ** (1 - centered) * (base - centered * mu)
    choices = {"mu": mu, "tau": tau, "theta_base": base, "y": 1.0}
    own = logn(mu) + logn(tau) + HALF + logn(base, centered * mu, tau**centered) + logn(1.0, theta)
    close(program.log_density(choices), own)
    close(program.generate(KEY, choices)[0].derived["theta"], theta)


FAMILIES = {
    "Normal": lambda: N(0.5, 2.0),
    "Cauchy": lambda: dist.Cauchy(0.5, 2.0),
    "Laplace": lambda: dist.Laplace(0.5, 2.0),
    "Logistic": lambda: dist.Logistic(0.5, 2.0),
    "Gumbel": lambda: dist.Gumbel(0.5, 2.0),
    "SoftLaplace": lambda: dist.SoftLaplace(0.5, 2.0),
    "StudentT": lambda: dist.StudentT(3.0, 0.5, 2.0),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(0.5, 2.0, 0.7),
    "AsymmetricLaplaceQuantile": lambda: dist.AsymmetricLaplaceQuantile(0.5, 2.0, 0.3),
    "expanded": lambda: N(0.5, 2.0).expand((3,)),
    "independent": lambda: N(jnp.array([0.5, 1.0]), jnp.array([1.0, 2.0])).to_event(1),
    "expanded, independent": lambda: (
        dist.StudentT(3.0, jnp.array([0.5, 1.0]), 2.0).expand((3, 2)).to_event(2)
    ),
    "mixed shapes": lambda: N(jnp.zeros((3, 1)), jnp.array([1.0, 2.0])),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("centered", [0.0, 0.4])
def test_location_scale_families(family: str, centered: float) -> None:
    """The law is kept: p(x) |dx / d base| = p(base), and the shapes are those of the original."""
    d, how = FAMILIES[family](), LocScale(centered)
    base = how.base(d)
    assert (base.batch_shape, base.event_shape) == (d.batch_shape, d.event_shape)
    b = jnp.linspace(-1.0, 1.3, math.prod(d.shape())).reshape(d.shape())
    x = how.value(d, b)
    assert x.shape == d.shape()
    scales = d
    while hasattr(scales, "base_dist"):
        scales = scales.base_dist
    jacobian = (1 - centered) * jnp.log(jnp.broadcast_to(scales.scale, d.shape()))
    jacobian = jacobian.sum(range(len(d.batch_shape), len(d.shape())))
    close(d.log_prob(x) + jacobian, base.log_prob(b), 1e-4)


def test_affine() -> None:
    tril = np.array([[1.0, 0.0], [0.5, 2.0]])
    loc = np.array([1.0, 2.0])

    @gen
    def model() -> Any:
        s = sample("s", N(0.0, 1.0))
        return sample("x", dist.MultivariateNormal(s * loc, scale_tril=tril))

    base, s = np.array([0.3, -0.4]), 0.5
    choices = {"s": s, "x_base": base}
    for program in (noncentered(model, "x")(), reparametrize(model, {"x": Affine()})()):
        close(program.log_density(choices), logn(s) + logn(base).sum())
        close(program.generate(KEY, choices)[0].value, s * loc + tril @ base)
        assert program.sites["x_base"].event_shape == (2,)
    lanes = noncentered(
        gen(lambda: repeat(lambda: sample("x", dist.MultivariateNormal(loc, scale_tril=tril)), 3)),
        "x",
    )()
    assert lanes.sites["x_base"].shape == (3, 2)
    b = np.arange(6.0).reshape(3, 2)
    trace, _ = lanes.generate(KEY, {"x_base": b})
    close(trace.value, loc + b @ tril.T)
    close(trace.log_density, logn(b).sum())


def _log_normal(m: Any, s: Any) -> Any:
    return dist.LogNormal(m, s)


def _shifted(m: Any, s: Any) -> Any:
    return dist.TransformedDistribution(
        N(m, s), [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(1.0, 2.0)]
    )


@pytest.mark.parametrize(
    ("make", "forward"), [(_log_normal, np.exp), (_shifted, lambda x: 1 + 2 * np.exp(x))]
)
def test_noncentered_of_a_transformed_distribution(
    make: Callable[..., Any], forward: Callable[..., Any]
) -> None:
    """Its base is standardised too; ``Transform`` alone leaves the base as it is."""

    @gen
    def model() -> Any:
        m = sample("m", N(0.0, 1.0))
        return sample("x", make(m, 2.0))

    choices = {"m": 0.5, "x_base": 0.3}
    plain = reparametrize(model, {"x": Transform()})()
    close(plain.log_density(choices), logn(0.5) + logn(0.3, 0.5, 2))
    close(plain.generate(KEY, choices)[0].value, forward(0.3))
    program = noncentered(model, "x")()
    close(program.log_density(choices), logn(0.5) + logn(0.3))
    close(program.generate(KEY, choices)[0].value, forward(0.5 + 2 * 0.3))


def test_reparametrised_everywhere() -> None:
    """In lanes, steps, branches and programs; the values are those of the sites, x = mean + 2 base."""
    program = noncentered(everywhere, "lanes", "steps", "branch", "part.inner")(XS)
    assert program.latents == ("lanes_base", "steps_base", "branch_base", "part.inner_base")
    means = {"lanes": XS, "steps": 1 + XS, "branch": 2 + XS, "part.inner": 3.0}
    bases = {a + "_base": (v - means[a]) / 2 for a, v in VALUES.items()}
    own = sum(np.sum(logn(b) * (XS > 0 if a == "branch_base" else 1)) for a, b in bases.items())
    close(program.log_density(bases), own)
    trace, weight = program.generate(KEY, bases)
    close(weight, own)
    for a, x in flatten(trace.derived).items():
        on = XS > 0 if a == "branch" else np.full(np.shape(VALUES[a]), True)
        close(np.asarray(x)[on], VALUES[a][on])
    close(trace.value, everywhere(XS).generate(KEY, VALUES)[0].value)
    assert [x.name for x in program.sites["lanes_base"].axes] == ["row"]
    assert [x.name for x in program.sites["lanes"].axes] == ["row"]


def test_reparametrise_by_pattern() -> None:
    program = reparametrize(everywhere, {"**": LocScale()})(XS)
    assert all(a.endswith("_base") for a in program.latents)
    some = reparametrize(everywhere, {"part.*": None, "lanes": LocScale(0.5)})(XS)
    assert some.latents == ("lanes_base", "steps", "branch", "part.inner_base")


def test_reparametrise_keeps_dims() -> None:
    program = noncentered(gen(lambda: sample("x", N(jnp.zeros(3), 1.0), dims=("school",))), "x")()
    for address in ("x_base", "x"):
        assert [a.name for a in program.sites[address].axes] == ["school"]


# --- gradient strategies --------------------------------------------------------------------------


def test_with_gradients_changes_no_law() -> None:
    program = with_gradients(chain, {"x": None, "z": None})()
    c = {"x": 0.1, "y": 0.2, "z": 0.3}
    close(program.log_density(c), chain_density(0.1, 0.2, 0.3))
    assert program.simulate(KEY).choices == chain().simulate(KEY).choices


# --- composition ----------------------------------------------------------------------------------

C = {"x": 0.1, "y": 0.2, "z": 0.3}

PAIRS: dict[str, tuple[Any, Any, dict[str, float], Any]] = {
    "condition, scale": (
        lambda m: condition(m, {"y": 0.2}),
        lambda m: scale(m, {"y": 3.0}),
        {"x": 0.1, "z": 0.3},
        logn(0.1) + 3 * logn(0.2, 0.1, 2) + logn(0.3, 0.3, 3),
    ),
    "condition, mask": (
        lambda m: condition(m, {"y": 0.2}),
        lambda m: mask(m, {"y": False}),
        {"x": 0.1, "z": 0.3},
        logn(0.1) + logn(0.3, 0.3, 3),
    ),
    "condition, condition": (
        lambda m: condition(m, {"y": 0.2}),
        lambda m: condition(m, {"z": 0.3}),
        {"x": 0.1},
        chain_density(0.1, 0.2, 0.3),
    ),
    "condition, do": (
        lambda m: condition(m, {"z": 0.3}),
        lambda m: do(m, {"y": 0.2}),
        {"x": 0.1},
        logn(0.1) + logn(0.3, 0.3, 3),
    ),
    "condition, noncentered": (
        lambda m: condition(m, {"z": 0.3}),
        lambda m: noncentered(m, "y"),
        {"x": 0.1, "y_base": 0.05},
        logn(0.1) + logn(0.05) + logn(0.3, 0.1 + 0.2, 3),
    ),
    "scale, mask": (
        lambda m: scale(m, {"*": 3.0}),
        lambda m: mask(m, {"y": False}),
        C,
        3 * (logn(0.1) + logn(0.3, 0.3, 3)),
    ),
    "scale, scale": (
        lambda m: scale(m, {"x": 3.0}),
        lambda m: scale(m, 2.0),
        C,
        2 * chain_density(0.1, 0.2, 0.3) + 4 * logn(0.1),
    ),
    "scale, do": (
        lambda m: scale(m, 2.0),
        lambda m: do(m, {"x": 0.1}),
        {"y": 0.2, "z": 0.3},
        2 * (logn(0.2, 0.1, 2) + logn(0.3, 0.3, 3)),
    ),
    "mask, replay": (
        lambda m: mask(m, {"z": False}),
        lambda m: replay(m, {"x": 0.1}),
        {"y": 0.2, "z": 0.3},
        logn(0.2, 0.1, 2),
    ),
    "noncentered, noncentered": (
        lambda m: noncentered(m, "y"),
        lambda m: noncentered(m, "z"),
        {"x": 0.1, "y_base": 0.05, "z_base": 0.0},
        logn(0.1) + logn(0.05) + logn(0.0),
    ),
    "noncentered, do": (
        lambda m: noncentered(m, "y"),
        lambda m: do(m, {"x": 0.1}),
        {"y_base": 0.05, "z": 0.3},
        logn(0.05) + logn(0.3, 0.1 + 0.2, 3),
    ),
    "with_gradients, scale": (
        lambda m: with_gradients(m, {"x": None}),
        lambda m: scale(m, 2.0),
        C,
        2 * chain_density(0.1, 0.2, 0.3),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_both_orders(pair: str) -> None:
    first, second, choices, own = PAIRS[pair]
    for f, g in itertools.permutations((first, second)):
        program = g(f(chain))()
        assert set(program.latents) == set(choices)
        close(program.log_density(choices), own)


def test_scope_renames_what_others_name() -> None:
    """After ``scope`` the addresses have its name in front; before it they have not."""
    outer = condition(scope(chain, "s"), {"s.y": 0.2})()
    inner = scope(condition(chain, {"y": 0.2}), "s")()
    for program in (outer, inner):
        assert program.latents == ("s.x", "s.z")
        close(program.log_density({"s": {"x": 0.1, "z": 0.3}}), chain_density(0.1, 0.2, 0.3))
    bases = noncentered(scope(chain, "s"), "s.y")(), scope(noncentered(chain, "y"), "s")()
    for program in bases:
        assert program.latents == ("s.x", "s.y_base", "s.z")
        close(
            program.log_density({"s": {"x": 0.1, "y_base": 0.05, "z": 0.3}}),
            logn(0.1) + logn(0.05) + logn(0.3, 0.3, 3),
        )
        assert set(flatten(program.simulate(KEY).derived)) == {"s.y"}


def test_condition_of_a_base_choice() -> None:
    """After ``noncentered`` the choice is the base, and the original is no choice any more."""
    program = condition(noncentered(chain, "y"), {"y_base": 0.05})()
    close(program.log_density({"x": 0.1, "z": 0.3}), logn(0.1) + logn(0.05) + logn(0.3, 0.3, 3))
    with pytest.raises(ValueError, match="'y' is a deterministic, not a choice"):
        condition(noncentered(chain, "y"), {"y": 0.2})().shapes()


def test_many_transforms_of_many_constructs() -> None:
    """Lanes, steps, branches and a program, through five transforms at once."""
    model = scale(
        mask(
            condition(noncentered(everywhere, "steps"), {"lanes": VALUES["lanes"]}),
            {"branch": np.array([True, True, False])},
        ),
        {"row": 2.0, "part": 5.0},
    )
    program = model(XS)
    assert program.latents == ("steps_base", "branch", "part.inner")
    base = (VALUES["steps"] - 1 - XS) / 2
    own = (
        2 * TERMS["lanes"].sum()
        + logn(base).sum()
        + (TERMS["branch"] * [1, 1, 0]).sum()
        + 5 * TERMS["part.inner"]
    )
    choices = {"steps_base": base, "branch": VALUES["branch"], "part.inner": 1.0}
    close(program.log_density(choices), own)
    outer = gen(lambda xs: sample("outer", model(xs)))(XS)
    close(
        outer.log_density(
            {"outer": {"steps_base": base, "branch": VALUES["branch"], "part": {"inner": 1.0}}}
        ),
        own,
    )
    lanes = jax.vmap(model)(np.stack([XS, XS]))
    close(lanes.log_density({a: np.stack([x, x]) for a, x in choices.items()}), 2 * own)


def test_untouched_draws_stay() -> None:
    """Keys go by address: no transform of one site changes the draws of those that do not read it."""

    @gen
    def model() -> Any:
        sample("a", N(0.0, 1.0))
        sample("b", N(0.0, 1.0))
        return repeat(lambda: sample("c", N(0.0, 1.0)), 2)

    plain = model().simulate(KEY).choices
    for changed in (
        condition(model, {"a": 1.0}),
        do(model, {"a": 1.0}),
        replay(model, {"a": 1.0}),
        block(model, "a"),
        mask(model, {"a": False}),
        scale(model, {"a": 2.0}),
        noncentered(model, "a"),
        with_gradients(model, {"a": None}),
    ):
        trace = changed().simulate(KEY)
        assert trace.choices["b"] == plain["b"]
        assert (trace.choices["c"] == plain["c"]).all()


def test_records_survive_transforms() -> None:
    @gen
    def model() -> None:
        x = sample("x", N(0.0, 1.0))
        deterministic("double", 2 * x)
        lax.scan(lambda c, _: (c, deterministic("steps", c + x)), 0.0, None, length=2)

    for changed in (
        condition(model, {"x": 1.0}),
        do(model, {"x": 1.0}),
        noncentered(model, "x"),
        scale(model, 2.0),
    ):
        trace = changed().simulate(KEY)
        assert {"double", "steps"} <= set(trace.derived)
        assert trace.derived["steps"].shape == (2,)
    close(do(model, {"x": 1.5})().simulate(KEY).derived["double"], 3.0)
