"""Estimated densities: their two laws and their gradients by exact enumeration, and what may be done with them.

Laws are exact, up to rounding. Gradients are means over independent keys, at 5 standard errors: some 60 comparisons,
so that a run in 30,000 would fail by chance; the keys are fixed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from weft.inference import elbo, enumeration, fit, hvi, importance, iwhvi, nuts
from weft.ppl import AddressError, DensityError, GradientError, ModelError

import exactly
from weft import (
    block,
    condition,
    draw,
    expect,
    factor,
    gen,
    gradients,
    marginal,
    normalize,
    repeat,
    sample,
    scale,
    with_gradients,
)

# Every test compiles programs of its own and runs each once.
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.slow,  # once is enough: not in every lane
]
KEY = jax.random.key(11)
P = 0.8
PRIOR = jnp.array([0.2, 0.5, 0.3])
LIKELIHOOD = jnp.array([0.1, 0.6, 0.9])
REVERSE = jnp.array([[0.3, 0.3, 0.4], [0.1, 0.2, 0.7]])


def exact_mean(f: Any, *args: Any) -> Any:
    """Compiled as one: operation by operation its sums take twice as long."""
    return jax.jit(functools.partial(exactly.exact_mean, f))(*args)


def model_of(strategy: Any) -> Any:
    @gen
    def pair(p: Any) -> Any:
        u = sample("u", dist.Categorical(PRIOR), grad=strategy)
        return sample("x", dist.Bernoulli(LIKELIHOOD[u] * p), grad=strategy)

    return pair


def reverse_of(strategy: Any) -> Any:
    @gen
    def reverse(x: Any) -> None:
        sample("u", dist.Categorical(REVERSE[x]), grad=strategy)

    return lambda target: reverse(target.observed["x"])


pair, reverse = model_of(gradients.enum), reverse_of(gradients.enum)


def exact_marginal(p: Any, x: Any) -> Any:
    one = jnp.sum(PRIOR * LIKELIHOOD) * p
    return jnp.where(x == 1, one, 1 - one)


BY = {
    "prior, 1": importance(num_particles=1),
    "prior, 2": importance(num_particles=2),
    "reverse, 2": importance(reverse, num_particles=2),
    "reverse, 3": importance(reverse, num_particles=3),
}


def inverse_density(program: Any, address: str, num_values: int) -> Any:
    """E[1/d; x] for every value, which the first law says is one, and the law of the draw."""

    def given(_: Any) -> Any:
        trace = draw(program())
        here = (trace.choices[address] == jnp.arange(num_values)) * 1.0
        return here * jnp.exp(-trace.log_density), here

    return exact_mean(given, 0.0)


def densities(program: Any, address: str, num_values: int) -> np.ndarray:
    """E[d'] for every value."""
    return np.array(
        [
            exact_mean(lambda _, v=v: jnp.exp(program().log_density({address: v})), 0.0)
            for v in range(num_values)
        ]
    )


@pytest.mark.parametrize("by", BY)
def test_laws_of_a_marginal(by: str) -> None:
    program = lambda: marginal(pair(P), keep="x", by=BY[by])  # noqa: E731
    inverse, law = inverse_density(program, "x", 2)
    exact = np.array([exact_marginal(P, v) for v in range(2)])
    np.testing.assert_allclose(inverse, 1.0, rtol=1e-5)
    np.testing.assert_allclose(law, exact, rtol=1e-5)
    np.testing.assert_allclose(densities(program, "x", 2), exact, rtol=1e-5)


def test_the_two_estimates_are_not_the_same() -> None:
    """What scores a given value does not serve as the density of a draw: the laws are two."""
    one = exact_mean(
        lambda p: jnp.exp(-marginal(pair(p), "x", BY["prior, 2"]).log_density({"x": 1})), P
    )
    assert one * exact_marginal(P, 1) > 1.05


@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_laws_of_a_posterior(num_particles: int) -> None:
    by = importance(
        lambda target: reverse(pair(P).given({"x": 1})), num_particles, grad=gradients.enum
    )
    program = lambda: normalize(pair(P).given({"x": 1}), by=by)  # noqa: E731
    inverse, law = inverse_density(program, "u", 3)
    np.testing.assert_allclose(inverse, 1.0, rtol=1e-5)
    np.testing.assert_allclose(densities(program, "u", 3), law, rtol=1e-5)
    if num_particles == 1:
        np.testing.assert_allclose(law, REVERSE[1], rtol=1e-5)


def test_the_law_of_a_posterior_tends_to_it() -> None:
    posterior = np.array(PRIOR * LIKELIHOOD / np.sum(PRIOR * LIKELIHOOD))
    distances = []
    for num_particles in (1, 2, 3, 4):
        by = importance(num_particles=num_particles, grad=gradients.enum)
        program = lambda by=by: normalize(pair(P).given({"x": 1}), by=by)  # noqa: E731
        law = inverse_density(program, "u", 3)[1]
        distances.append(np.abs(np.asarray(law) - posterior).sum())
    assert np.all(np.diff(distances) < 0)


@gen
def chain(p: Any) -> None:
    """A proposal with an auxiliary choice of its own."""
    v = sample("v", dist.Bernoulli(0.4), grad=gradients.enum)
    sample("u", dist.Categorical(jnp.where(v == 1, REVERSE[1], REVERSE[0])), grad=gradients.enum)


def nested_proposal(target: Any) -> Any:
    return marginal(chain(0.0), keep="u", by=importance(num_particles=2))


@gen
def nested_model(p: Any) -> Any:
    x = sample("part", marginal(pair(p), keep="x", by=BY["prior, 2"]))
    sample("w", dist.Bernoulli(0.2 + 0.5 * x), grad=gradients.enum)


def test_laws_with_an_estimated_proposal() -> None:
    by = importance(nested_proposal, num_particles=2)
    program = lambda: marginal(pair(P), keep="x", by=by)  # noqa: E731
    np.testing.assert_allclose(inverse_density(program, "x", 2)[0], 1.0, rtol=1e-5)
    exact = [exact_marginal(P, v) for v in range(2)]
    np.testing.assert_allclose(densities(program, "x", 2), exact, rtol=1e-5)


def test_laws_of_a_model_that_holds_an_estimate() -> None:
    def joint(x: int, w: int) -> Any:
        q = 0.2 + 0.5 * x
        return exact_marginal(P, x) * (q if w else 1 - q)

    def drawn(p: Any) -> Any:
        trace = draw(nested_model(p))
        x, w = trace.choices["part"]["x"], trace.choices["w"]
        here = (jnp.arange(2)[:, None] == x) & (jnp.arange(2) == w)
        return here * jnp.exp(-trace.log_density)

    np.testing.assert_allclose(exact_mean(drawn, P), 1.0, rtol=1e-5)
    for x, w in ((0, 0), (1, 0), (1, 1)):
        scored = exact_mean(
            lambda p, x=x, w=w: jnp.exp(nested_model(p).log_density({"part": {"x": x}, "w": w})), P
        )
        np.testing.assert_allclose(scored, joint(x, w), rtol=1e-5)


def test_laws_of_a_posterior_under_an_estimated_model() -> None:
    """Sampling importance resampling with an estimated likelihood, and its marginal with an estimated joint."""

    @gen
    def proposal() -> None:
        sample(["part", "x"][0], part())

    @gen
    def part() -> None:
        sample("x", dist.Bernoulli(0.6), grad=gradients.enum)

    by = importance(proposal(), num_particles=2, grad=gradients.enum)
    program = lambda: normalize(nested_model(P).given({"w": 1}), by=by)  # noqa: E731

    def drawn(_: Any) -> Any:
        trace = draw(program())
        here = (trace.choices["part"]["x"] == jnp.arange(2)) * 1.0
        return here * jnp.exp(-trace.log_density), here

    inverse, law = exact_mean(drawn, 0.0)
    np.testing.assert_allclose(inverse, 1.0, rtol=1e-5)
    scored = [
        exact_mean(lambda _, v=v: jnp.exp(program().log_density({"part": {"x": v}})), 0.0)
        for v in range(2)
    ]
    np.testing.assert_allclose(scored, law, rtol=1e-5)

    outer = lambda: marginal(nested_model(P), keep="w", by=importance(proposal(), 2))  # noqa: E731
    exact = [
        sum(exact_marginal(P, x) * abs(1 - w - (0.2 + 0.5 * x)) for x in (0, 1)) for w in (0, 1)
    ]
    np.testing.assert_allclose(inverse_density(outer, "w", 2)[0], 1.0, rtol=1e-5)
    np.testing.assert_allclose(densities(outer, "w", 2), exact, rtol=1e-5)


# --- gradients --------------------------------------------------------------------------------------------------------


def agree(f: Any, exact: Any, num_keys: int = 20_000) -> None:
    """Value and derivative of an expectation against those of an exact mean."""
    keys = jax.random.split(KEY, num_keys)
    both = jax.jit(jax.vmap(jax.value_and_grad(expect(f), argnums=1), (0, None)))(keys, P)
    for found, wanted in zip(
        both, jax.value_and_grad(lambda p: exact_mean(exact, p))(P), strict=True
    ):
        error = found.std() / np.sqrt(num_keys) + 1e-5
        assert abs(found.mean() - wanted) < 5 * error, (found.mean(), wanted, error)


def gap(program: Any) -> Any:
    """A bound's term: log d of a draw, and a cost of the draw."""

    def f(p: Any) -> Any:
        trace = draw(program(p))
        return (1.0 + sum(jax.tree.leaves(trace.choices))) * p - trace.log_density

    return f


@pytest.mark.parametrize("strategy", [gradients.score, gradients.enum, gradients.mvd])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_gradients_through_a_marginal(strategy: Any, num_particles: int) -> None:
    def program(p: Any, strategy: Any = strategy) -> Any:
        by = importance(reverse_of(strategy), num_particles)
        return marginal(model_of(strategy)(p), keep="x", by=by)

    agree(gap(program), gap(lambda p: program(p, gradients.enum)))
    agree(
        lambda p: program(p).log_density({"x": 1}),
        lambda p: program(p, gradients.enum).log_density({"x": 1}),
    )


@pytest.mark.parametrize("strategy", [gradients.score, gradients.enum])
def test_gradients_through_a_posterior(strategy: Any) -> None:
    def program(p: Any, strategy: Any = strategy) -> Any:
        @gen
        def proposal() -> None:
            sample("u", dist.Categorical(jax.nn.softmax(p * jnp.arange(3.0))), grad=strategy)

        by = importance(proposal(), num_particles=2, grad=strategy)
        return normalize(model_of(strategy)(p).given({"x": 1}), by=by)

    agree(gap(program), gap(lambda p: program(p, gradients.enum)))
    agree(
        lambda p: program(p).log_density({"u": 1}),
        lambda p: program(p, gradients.enum).log_density({"u": 1}),
    )


def test_gradients_of_reparametrised_choices() -> None:
    """The ELBO of a marginal guide that is normal; with the exact reverse the estimates are exact."""
    target = normal_model().given({"y": 2.0})
    objective = iwhvi(target, hierarchical, num_auxiliary=4, reverse=exact_reverse)
    keys = jax.random.split(KEY, 4000)
    estimate = jax.vmap(jax.value_and_grad(objective, argnums=1), (0, None))
    bound, slope = jax.jit(estimate)(keys, 0.3)

    @gen
    def plain(loc: Any) -> None:
        sample("mu", dist.Normal(loc, np.sqrt(0.5)))

    trace_of = jax.jit(jax.vmap(lambda k: objective.at(0.3)[1].simulate(k)))(keys)
    np.testing.assert_allclose(
        trace_of.log_density,
        jax.vmap(plain(0.3).log_density)(trace_of.choices),
        atol=1e-4,
    )
    exact = lambda m: (  # noqa: E731
        -0.5 * (m**2 + 0.5 + (2 - m) ** 2 + 0.5) - np.log(2 * np.pi) + 0.5 * np.log(np.pi * np.e)
    )
    for found, wanted in ((bound, exact(0.3)), (slope, jax.grad(exact)(0.3))):
        assert abs(found.mean() - wanted) < 5 * found.std() / np.sqrt(len(keys))


@gen
def normal_model() -> None:
    mu = sample("mu", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(mu, 1.0))


@gen
def hierarchical(loc: Any) -> None:
    u = sample("u", dist.Normal(0.0, 1.0))
    sample("mu", dist.Normal(loc + 0.5 * u, 0.5))


@gen
def exact_reverse_program(loc: Any, mu: Any) -> None:
    sample("u", dist.Normal(mu - loc, np.sqrt(0.5)))


def exact_reverse(loc: Any, choices: Any) -> Any:
    return exact_reverse_program(loc, choices["mu"])


def test_hierarchical_bound_in_closed_form() -> None:
    """With the prior of u as its reverse and one particle the guide's density is that given u."""
    objective = hvi(normal_model().given({"y": 2.0}), hierarchical)
    keys = jax.random.split(KEY, 20_000)
    bound = jax.jit(jax.vmap(objective, (0, None)))(keys, 0.3)
    energy = -0.5 * (0.09 + 0.5 + 1.7**2 + 0.5) - np.log(2 * np.pi)
    exact = energy + 0.5 * np.log(2 * np.pi * np.e * 0.25)
    assert abs(bound.mean() - exact) < 5 * bound.std() / np.sqrt(len(keys))


# --- as programs ------------------------------------------------------------------------------------------------------


def test_asked_from_outside() -> None:
    program = marginal(pair(P), keep="x", by=importance(reverse, 4))
    assert program.estimated
    assert program.latents == ("x",)
    assert not pair(P).estimated
    keys = jax.random.split(KEY, 20_000)
    log_d = jax.vmap(program.estimate_log_density, (0, None))(keys, {"x": 1})
    d = np.exp(log_d)
    assert abs(d.mean() - exact_marginal(P, 1)) < 5 * d.std() / np.sqrt(len(keys))
    choices, log_d = jax.vmap(program.random_weighted)(keys)
    inverse = np.exp(-log_d) * (np.asarray(choices["x"]) == 1)
    assert abs(inverse.mean() - 1.0) < 5 * inverse.std() / np.sqrt(len(keys))
    trace = program.simulate(KEY)
    assert trace.value == trace.choices["x"]
    assert program.log_density({"x": 1}, KEY) == program.estimate_log_density(KEY, {"x": 1})
    assert program.log_densities({"x": 1}, key=KEY)["x"] == program.log_density({"x": 1}, KEY)
    choices, log_d = pair(P).random_weighted(KEY)
    assert log_d == pair(P).log_density(choices)


def test_in_lanes_scans_and_branches() -> None:
    """Copies have estimates of their own, and the density is their product."""
    part = lambda: marginal(pair(P), keep="x", by=importance(reverse, 50))  # noqa: E731

    @gen
    def lanes() -> Any:
        return jax.vmap(lambda _: sample("row", part()))(jnp.arange(3))

    @gen
    def steps() -> Any:
        return jax.lax.scan(lambda c, _: (c + sample("row", part()), None), 0, None, length=3)[0]

    @gen
    def either() -> Any:
        b = sample("b", dist.Bernoulli(0.5))
        return jax.lax.cond(b == 1, lambda: sample("row", part()), lambda: jnp.array(7))

    given = {"row": {"x": jnp.array([0, 1, 1])}}
    exact = float(sum(jnp.log(exact_marginal(P, x)) for x in (0, 1, 1)))
    keys = jax.random.split(KEY, 2000)
    for model in (lanes, steps):
        assert model().simulate(KEY).choices["row"]["x"].shape == (3,)
        estimate = jax.jit(jax.vmap(lambda k, m=model: m().log_density(given, k)))
        d = np.exp(estimate(keys) - exact)
        assert d.std() > 0
        assert abs(d.mean() - 1) < 5 * d.std() / np.sqrt(len(keys))
    log_d = either().log_density({"b": 0, "row": {"x": 1}}, KEY)
    np.testing.assert_allclose(log_d, np.log(0.5), rtol=1e-6)
    assert either().log_density({"b": 1, "row": {"x": 1}}, KEY) < np.log(0.5)
    shown = repeat_rows().simulate(KEY).choices["row"]["x"]
    assert shown.shape == (40,)
    assert 0 < shown.sum() < 40


@gen
def repeat_rows() -> None:
    repeat(lambda: sample("row", marginal(pair(P), "x", importance(num_particles=2))), 40)


def test_scale_reaches_an_estimate() -> None:
    @gen
    def rows(num: int = 3) -> None:
        f = lambda: sample("row", marginal(pair(P), "x", importance(reverse, 3)))  # noqa: E731
        repeat(f, num, axis_name="row")

    given = {"row": {"x": jnp.array([0, 1, 1])}}
    plain = rows().log_density(given, KEY)
    for scaled in (scale(rows, {"row": 2.0}), scale(scale(rows, 4.0), 0.5)):
        np.testing.assert_allclose(scaled().log_density(given, KEY), 2 * plain, rtol=1e-6)


def test_importance_sampling_with_estimates() -> None:
    """The evidence stays unbiased with an estimated model and with an estimated proposal."""
    target = nested_model(P).given({"w": 1})
    exact = sum(exact_marginal(P, x) * (0.2 + 0.5 * x) for x in (0, 1))

    @gen
    def proposal() -> None:
        sample("part", marginal(pair(0.5), keep="x", by=importance(num_particles=2)))

    for settings in ({}, {"proposal": proposal()}):
        run = importance(num_particles=20_000, **settings).run(KEY, target, progress=False)
        weights = np.exp(np.asarray(run.log_weights))
        assert abs(weights.mean() - exact) < 5 * weights.std() / np.sqrt(weights.size)


def test_fitting_an_estimated_guide() -> None:
    """The bound depends on the guide's location by the model's density alone, even about the posterior mean, 1."""
    objective = iwhvi(normal_model().given({"y": 2.0}), hierarchical, num_auxiliary=5)
    rate = optax.adam(optax.cosine_decay_schedule(0.05, 600))
    found = jax.vmap(lambda k: fit(k, objective, 0.0, rate, 600).params)(jax.random.split(KEY, 20))
    assert abs(found.mean() - 1.0) < 5 * found.std(ddof=1) / np.sqrt(20)
    guide = fit(KEY, objective, 0.0, rate, 1, progress=False).guide
    assert guide.estimated
    assert guide.latents == ("mu",)


# --- errors -----------------------------------------------------------------------------------------------------------


def refuses(error: type[Exception], match: str, f: Any) -> None:
    with pytest.raises(error, match=match):
        f()


def test_errors() -> None:
    by = importance(num_particles=2)
    program = marginal(pair(P), keep="x", by=by)
    refuses(DensityError, "take a key", lambda: program.log_density({"x": 1}))
    refuses(DensityError, "estimate", lambda: program.given({"x": 1}).log_density({}))
    refuses(AddressError, "no address 'y'", lambda: marginal(pair(P), keep="y", by=by))
    refuses(TypeError, "apply it to its arguments", lambda: marginal(pair, keep="x", by=by))
    refuses(TypeError, "importance", lambda: marginal(pair(P), keep="x", by=nuts()))
    refuses(TypeError, "takes a target", lambda: normalize(pair(P), by=by))
    refuses(ModelError, "returns what it computes from 'u'", lambda: marginal(leaky(), "x", by))
    refuses(DensityError, "'soft'", lambda: marginal(soft(), "x", by))
    assert marginal(pair(P), keep=("u", "x"), by=by).estimated is False

    target = nested_model(P).given({"w": 1})
    refuses(
        DensityError,
        "is estimated: sum out",
        lambda: enumeration().run(KEY, target, progress=False),
    )
    refuses(DensityError, "marginalize", lambda: normals().given({}).unconstrain())
    for transform in (
        lambda m: with_gradients(m, {"part": gradients.score}),
        lambda m: block(m, "part.x"),
        lambda m: condition(m, {"part.x": 1}),
    ):
        refuses(
            ModelError,
            "'part.x' has an estimated density",
            lambda t=transform: t(nested_model)(P).sites,
        )

    @gen
    def both() -> None:
        sample("a", marginal(pair(P), "x", by))

    bound = elbo(both().given(), lambda _: both(), sticking_the_landing=True)
    refuses(GradientError, "sticking_the_landing", lambda: bound(KEY, 0.0))


@gen
def leaky() -> Any:
    u = sample("u", dist.Normal(0.0, 1.0))
    sample("x", dist.Normal(u, 1.0))
    return u


@gen
def soft() -> None:
    sample("u", dist.Normal(0.0, 1.0))
    sample("x", dist.Normal(0.0, 1.0))
    factor("soft", 1.0)


@gen
def normals() -> None:
    @gen
    def inner() -> None:
        sample("x", dist.Normal(sample("u", dist.Normal(0.0, 1.0)), 1.0))

    sample("a", marginal(inner(), "x", importance(num_particles=2)))


def test_partly_given() -> None:
    @gen
    def three() -> None:
        u = sample("u", dist.Categorical(PRIOR))
        sample("x", dist.Bernoulli(LIKELIHOOD[u]))
        sample("y", dist.Bernoulli(LIKELIHOOD[u]))

    program = marginal(three(), keep=("x", "y"), by=importance(num_particles=2))
    refuses(DensityError, "give all of them", lambda: program.generate(KEY, {"x": 1}))
    trace, log_weight = program.generate(KEY, {"x": 1, "y": 0})
    assert trace.choices["x"] == 1
    assert np.isfinite(log_weight)
