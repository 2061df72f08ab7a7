"""Gradient strategies: derivatives of expectations against quadrature and enumeration.

Every test compares means over independent keys with exact values, at 5 standard errors. Some 250 comparisons are
made, so that a run in 5,000 would fail by chance; the keys are fixed.
"""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import lax
from weft.ppl import GradientError

from weft import draw, expect, gen, gradients, mask, sample, with_gradients

# Every test compiles programs of its own and runs each once.
pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(3)
THETA = 0.6
KINDS = {
    "normal": (
        gradients.reparam,
        gradients.score,
        gradients.mvd,
        gradients.reweight(dist.Normal(0.5, 2.0)),
    ),
    "coin": (gradients.score, gradients.mvd, gradients.enum),
}
SITES = [(law, strategy) for law, strategies in KINDS.items() for strategy in strategies]
# Every strategy once, at laws of both kinds: where strategies meet, or stand in a form, the law is of no account.
FIRST = [s for s in SITES if s[0] == "normal" or s[1] is gradients.enum]
SECOND = [s for s in SITES if s[0] == "coin" or s[1] not in KINDS["coin"]]
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)


def name_of(site: Any) -> str:
    return f"{site[0]}-{type(site[1]).__name__.lower()}"


def agree(f: Any, theta: Any, exact: Any, num_keys: int = 20_000, **settings: Any) -> np.ndarray:
    """Value and gradient of an expectation against those of a function; the spread of the gradient."""
    estimator = expect(f, **settings)
    keys = jax.random.split(KEY, num_keys)
    both = jax.jit(jax.vmap(jax.value_and_grad(estimator, argnums=1), (0, None)))(keys, theta)
    for found, wanted in zip(both, jax.value_and_grad(exact)(theta), strict=True):
        found, wanted = np.asarray(found, float), np.asarray(wanted, float)
        error = found.std(0) / np.sqrt(num_keys) + 1e-5 * (1 + np.abs(wanted))
        assert np.all(np.abs(found.mean(0) - wanted) < 5 * error), (found.mean(0), wanted, error)
    return np.asarray(both[1]).std(0)


def law(kind: str, mean: Any) -> Any:
    return dist.Normal(mean, 1.0) if kind == "normal" else dist.Bernoulli(jax.nn.sigmoid(mean))


def over(kind: str, mean: Any, f: Any) -> Any:
    """The mean of f, by quadrature or enumeration."""
    if kind == "coin":
        p = jax.nn.sigmoid(mean)
        return (1 - p) * f(0.0) + p * f(1.0)
    weights = jnp.asarray(WEIGHTS / WEIGHTS.sum())
    return jnp.sum(weights * jax.vmap(lambda e: f(mean + e))(jnp.asarray(NODES)))


def pair(first: Any, second: Any) -> Any:
    def program(theta: Any) -> Any:
        x = sample("x", law(first[0], theta), grad=first[1]) * 1.0
        y = sample("y", law(second[0], x * theta), grad=second[1]) * 1.0
        return (x - y) ** 2 + theta * x

    return program


def pair_mean(first: str, second: str) -> Any:
    def mean(theta: Any) -> Any:
        def given(x: Any) -> Any:
            return over(second, x * theta, lambda y: (x - y) ** 2 + theta * x)

        return over(first, theta, given)

    return mean


@pytest.mark.slow
@pytest.mark.parametrize(
    "sites", list(itertools.product(FIRST, SECOND)), ids=lambda s: "-".join(map(name_of, s))
)
def test_every_ordered_pair(sites: Any) -> None:
    first, second = sites
    spread = agree(pair(first, second), THETA, pair_mean(first[0], second[0]))
    assert (spread > 1e-5) == (name_of(first) != "coin-enum" or name_of(second) != "coin-enum")


FORMS = {
    "jit": lambda f: jax.jit(f),
    "checkpoint": lambda f: jax.checkpoint(f),
    "branch": lambda f: lambda t: lax.cond(t > 0, f, lambda t: 0 * t, t),
    "chosen branch": lambda f: (
        lambda t: (
            lax.cond(
                sample("b", dist.Bernoulli(0.5), grad=gradients.score) == 1, f, lambda t: 0 * t, t
            )
            * 2.0
        )
    ),
    "nested": lambda f: lambda t: draw(gen(f)(t)).value,
    "lanes": lambda f: lambda t: jnp.mean(jax.vmap(f)(t * jnp.ones(2))),
    "scan": lambda f: lambda t: lax.scan(lambda c, _: (c + f(t) / 2, None), 0.0, None, length=2)[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("site", FIRST, ids=name_of)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, site: Any) -> None:
    program = FORMS[form](pair(site, ("normal", gradients.score)))
    if form == "scan" and isinstance(site[1], (gradients.Enum, gradients.Mvd)):
        with pytest.raises(GradientError, match="'x' stands in a scan.*score.*marginalize"):
            expect(program)(KEY, THETA)
        return
    agree(program, THETA, pair_mean(site[0], "normal"))


@pytest.mark.parametrize("site", SITES, ids=name_of)
def test_one_choice(site: Any) -> None:
    """Value and first derivative; the second one, too, or an error that says so."""

    def program(theta: Any) -> Any:
        x = sample("x", law(site[0], theta), grad=site[1]) * 1.0
        return x**2 * theta + jnp.sin(x)

    def mean(theta: Any) -> Any:
        return over(site[0], theta, lambda x: x**2 * theta + jnp.sin(x))

    agree(program, THETA, mean)
    second = jax.jit(jax.vmap(jax.hessian(expect(program), argnums=1), (0, None)))
    keys = jax.random.split(KEY, 20_000)
    if isinstance(site[1], gradients.Mvd):
        with pytest.raises(GradientError, match="'x'.*first ones only"):
            second(keys, THETA)
        return
    found = np.asarray(second(keys, THETA), float)
    error = found.std() / np.sqrt(len(found)) + 1e-4
    assert abs(found.mean() - jax.hessian(mean)(THETA)) < 5 * error


LAWS = {
    "Normal, scale": (lambda t: dist.Normal(0.3, t), 0.7),
    "Poisson": (dist.Poisson, 1.3),
    "Exponential": (dist.Exponential, 1.3),
    "Gamma": (lambda t: dist.Gamma(2.0, t), 1.3),
    "GeometricProbs": (dist.GeometricProbs, 0.4),
    "GeometricLogits": (dist.GeometricLogits, 0.4),
    "CategoricalProbs": (lambda t: dist.Categorical(jnp.stack([t, 1 - t - t**2, t**2])), 0.4),
    "CategoricalLogits": (lambda t: dist.Categorical(logits=jnp.stack([t, 0 * t, 2 * t])), 0.4),
    "BernoulliProbs": (lambda t: dist.Bernoulli(t), 0.4),
}


FINITE = {"Bernoulli": 2, "Categorical": 3}


@pytest.mark.parametrize("name", LAWS)
def test_measure_valued_derivatives(name: str) -> None:
    make, theta = LAWS[name]

    def f(x: Any) -> Any:
        return jnp.minimum(x, 20.0) ** 2 + jnp.sin(x)

    def mean(theta: Any) -> Any:
        d = make(theta)
        if d.is_discrete:
            num_values = next((n for k, n in FINITE.items() if name.startswith(k)), 80)
            x = jnp.arange(num_values)
            return jnp.sum(jnp.exp(d.log_prob(x)) * f(x * 1.0))
        x = jnp.linspace(-8.0 if name.startswith("Normal") else 1e-6, 30.0, 200_001)
        return jnp.trapezoid(jnp.exp(d.log_prob(x)) * f(x), x)

    agree(lambda t: f(sample("x", make(t), grad=gradients.mvd) * 1.0), theta, mean, 40_000)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [gradients.score, gradients.enum, gradients.mvd], ids=str)
def test_copies_of_a_choice(strategy: Any) -> None:
    """Three coins under vmap that all matter to one cost."""
    probs = jnp.array([0.3, 0.6, 0.2])

    def program(p: Any) -> Any:
        coins = jax.vmap(lambda q: sample("b", dist.Bernoulli(q), grad=strategy))(p)
        return sample("x", dist.Normal(jnp.sum(coins), 1.0)) ** 2

    def mean(p: Any) -> Any:
        return 1 + jnp.sum(p) ** 2 + jnp.sum(p * (1 - p))

    agree(program, probs, mean, 40_000)


@pytest.mark.slow
def test_lanes_are_weighed_by_their_own_draws() -> None:
    """The cost of a lane has the score of this lane only: the spread does not grow with the number of lanes."""

    def program(theta: Any, num: int) -> Any:
        def lane(t: Any) -> Any:
            x = sample("x", dist.Normal(t, 1.0), grad=gradients.score)
            y = sample("y", dist.Bernoulli(jax.nn.sigmoid(x)), grad=gradients.score)
            return x**2 + y * t

        return jnp.sum(jax.vmap(lane)(theta * jnp.ones(num))) / num

    keys = jax.random.split(KEY, 4_000)
    few, many = (
        jax.jit(jax.vmap(jax.grad(expect(lambda t, n=n: program(t, n)), argnums=1), (0, None)))(
            keys, 0.6
        )
        for n in (1, 100)
    )
    assert many.std() < 1.2 * few.std() / 10


def test_costs_are_weighed_by_the_draws_they_depend_on() -> None:
    """A large cost beside a choice adds nothing to the variance of its gradient."""

    def program(theta: Any) -> Any:
        x = sample("x", dist.Normal(theta, 1.0), grad=gradients.score)
        z = sample("z", dist.Normal(theta, 1.0), grad=gradients.score)
        return jnp.sum(jnp.stack([1000.0 * theta, 2.0 * x])) - (z / 4 - 1e3)

    spread = agree(program, THETA, lambda t: 1001.75 * t + 1e3, 4_000)
    assert spread < 5


@pytest.mark.slow
def test_baselines_lower_the_variance_and_nothing_else() -> None:
    def program(strategy: Any) -> Any:
        return lambda t: (sample("x", dist.Normal(t, 1.0), grad=strategy) - 5.0) ** 2

    def mean(t: Any) -> Any:
        return (t - 5.0) ** 2 + 1.0

    plain = agree(program(gradients.score), THETA, mean)
    assert agree(program(gradients.score(baseline=20.0)), THETA, mean) < 0.6 * plain
    alone = agree(program(gradients.score), THETA, mean, 5_000, num_samples=8)
    assert alone < 0.6 * plain / np.sqrt(8)


@pytest.mark.slow
def test_learned_baselines_move_towards_the_cost() -> None:
    def program(params: Any) -> Any:
        by = gradients.score(baseline=gradients.learned(lambda x: params["b"] + 0 * x, params["t"]))
        return (sample("x", dist.Normal(params["t"], 1.0), grad=by) - 5.0) ** 2

    estimate = jax.jit(jax.vmap(jax.grad(expect(program), argnums=1), (0, None)))
    slopes = estimate(jax.random.split(KEY, 20_000), {"t": THETA, "b": 3.0})
    for name, exact in (("t", 2 * (THETA - 5.0)), ("b", (THETA - 5.0) ** 2 + 1 - 3.0)):
        x = np.asarray(slopes[name], float)
        assert abs(x.mean() - exact) < 5 * x.std() / np.sqrt(len(x)), name


def test_strategies_from_outside() -> None:
    """`with_gradients` at addresses and wildcards; an enumerated coin makes the gradient exact."""

    @gen
    def coin(p: Any) -> Any:
        return 3.0 * sample("b", dist.Bernoulli(p))

    @gen
    def two(p: Any) -> Any:
        return sample("part", coin(p)) + p * sample("c", dist.Bernoulli(0.5))

    def slope(strategies: Any) -> float:
        program = with_gradients(two, strategies)
        return float(jax.grad(expect(lambda p: draw(program(p)).value), argnums=1)(KEY, 0.3))

    for address in ("part.b", "part.*"):  # 3 from the coin of the part, and the draw of the other
        assert min(abs(slope({address: gradients.enum}) - x) for x in (3.0, 4.0)) < 1e-5
    assert abs(slope({"**": gradients.enum}) - 3.5) < 1e-5


def test_two_choices_of_one_name() -> None:
    """A program drawn twice in place, its choice by two strategies."""

    @gen
    def coin(p: Any) -> Any:
        return 1.0 * sample("b", dist.Bernoulli(p))

    def program(p: Any) -> Any:
        def both(p: Any) -> Any:
            first = draw(with_gradients(coin, {"b": gradients.enum})(p)).value
            return first * draw(with_gradients(coin, {"b": gradients.score})(p)).value

        return lax.cond(p > 0, both, lambda p: p, p)

    agree(program, 0.3, lambda p: p**2)


def test_impossible_values_are_harmless() -> None:
    """A value of probability zero at which what follows is not finite."""

    def program(t: Any) -> Any:
        z = sample("z", dist.Categorical(jnp.stack([t, 1 - t, 0 * t])), grad=gradients.enum)
        return jnp.log(jnp.array([1.0, 2.0, 0.0])[z] + 0 * t) * t

    value, slope = jax.value_and_grad(expect(program), argnums=1)(KEY, 0.25)
    np.testing.assert_allclose(value, 0.25 * 0.75 * np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(slope, 0.5 * np.log(2.0), rtol=1e-5)


@pytest.mark.slow
def test_forward_mode_and_vmap_of_estimators() -> None:
    program = pair(("coin", gradients.enum), ("normal", gradients.score))
    estimator = expect(program)
    keys = jax.random.split(KEY, 20_000)
    forward = jax.vmap(lambda k: jax.jvp(lambda t: estimator(k, t), (THETA,), (1.0,))[1])
    slopes = jax.jit(forward)(keys)
    exact = jax.grad(pair_mean("coin", "normal"))(THETA)
    assert abs(slopes.mean() - exact) < 5 * slopes.std() / np.sqrt(len(slopes))
    many = jax.vmap(jax.grad(estimator, argnums=1))(keys[:3], jnp.full(3, THETA))
    one = jax.grad(estimator, argnums=1)(keys[1], THETA)
    np.testing.assert_allclose(many[1], one, rtol=1e-4)


@pytest.mark.slow
def test_several_results() -> None:
    """Each result has derivatives of its own; integers pass."""

    def program(t: Any) -> Any:
        z = sample("z", dist.Poisson(t), grad=gradients.score)
        return {"count": z, "square": z.astype(float) ** 2, "both": jnp.stack([z, 2 * z]) * t}

    found = expect(program)(KEY, 1.5)
    assert found["count"].dtype == jnp.int32
    slope = jax.vmap(jax.grad(lambda k, t: expect(program)(k, t)["both"][1], argnums=1), (0, None))
    slopes = jax.jit(slope)(jax.random.split(KEY, 20_000), 1.5)
    assert abs(slopes.mean() - 4 * 1.5) < 5 * slopes.std() / np.sqrt(len(slopes))


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_what_comes_out_of_a_step_has_the_scores_of_those_before(reverse: bool) -> None:
    """A scan's outputs against its last carry: the same gradient, less noise.

    With T independent steps of one cost the score of step t multiplies T - t costs in place of T, so that the variance
    falls to a third; some of it, which neither changes, stays.
    """
    num_steps = 20

    def program(t: Any, gather: bool) -> Any:
        def step(carry: Any, _: Any) -> Any:
            x = sample("x", dist.Normal(t, 1.0), grad=gradients.score)
            y = (x - 3.0) ** 2 + 0.1 * x * carry[1]
            return (carry[0] + y, x), y

        zero = (0.0 * t, 0.0 * t)
        carry, ys = lax.scan(step, zero, None, length=num_steps, reverse=reverse)
        return jnp.sum(ys) if gather else carry[0]

    def mean(t: Any) -> Any:
        return num_steps * ((t - 3.0) ** 2 + 1.0) + 0.1 * (num_steps - 1) * t**2

    apart = agree(lambda t: program(t, True), THETA, mean)
    together = agree(lambda t: program(t, False), THETA, mean)
    assert apart < 0.7 * together
    agree(lambda t: program(t, True) * program_of_lasts(t), THETA, lambda t: mean(t) * t**2)


def program_of_lasts(t: Any) -> Any:
    """Draws of another scan, read out of their order."""

    def step(carry: Any, _: Any) -> Any:
        x = sample("z", dist.Normal(t, 1.0), grad=gradients.score)
        return carry, x

    _, xs = lax.scan(step, 0.0, None, length=4)
    return xs[::-1][0] * xs[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [gradients.score, gradients.enum, gradients.mvd])
def test_choices_that_a_mask_leaves_out(strategy: Any) -> None:
    """One lane of two is idle, its parameter not a number: the others have their gradient, it has none."""

    @gen
    def coins(p: Any) -> Any:
        probs = jnp.stack([p, jnp.nan])
        return jax.vmap(lambda q: sample("b", dist.Bernoulli(q), grad=strategy))(probs)

    def program(p: Any) -> Any:
        trace = draw(mask(coins, {"b": jnp.array([True, False])})(p))
        return 3.0 * trace.value[0] - trace.log_density

    agree(program, 0.3, lambda p: 3 * p - p * jnp.log(p) - (1 - p) * jnp.log(1 - p))


# --- implicit reparametrisation, and the biased relaxation ------------------------------------------------------------


def on_line(d: Any, f: Any, low: float, high: float) -> Any:
    """The mean of f under a law, by the trapezium rule."""
    x = jnp.linspace(low, high, 40_001)[1:-1]
    return jnp.sum(jnp.exp(d.log_prob(x)) * f(x)) * (high - low) / 40_000


IMPLICIT = {
    "mixture of one family": (
        lambda t: dist.MixtureSameFamily(
            dist.Categorical(probs=jnp.stack([t, 1 - t])),
            dist.Normal(t * jnp.array([-1.0, 2.0]), jnp.array([1.0, 0.5])),
        ),
        (-12.0, 12.0),
    ),
    "mixture of several": (
        lambda t: dist.MixtureGeneral(
            dist.Categorical(probs=jnp.stack([t, 1 - t])),
            [dist.Normal(-t, 1.0), dist.Laplace(t, 0.5)],
        ),
        (-16.0, 16.0),
    ),
    "mixture of gammas": (
        lambda t: dist.MixtureSameFamily(
            dist.Categorical(probs=jnp.stack([t, 1 - t])),
            dist.Gamma(jnp.array([1.5, 3.0]) + t, 1.5),
        ),
        (0.0, 40.0),
    ),
    "von Mises": (lambda t: dist.VonMises(t, 3.0 * t), (-np.pi, np.pi)),
    "narrow von Mises": (lambda t: dist.VonMises(t, 100.0 * t), (-np.pi, np.pi)),
    "wide von Mises": (lambda t: dist.VonMises(t, 0.1 * t), (-np.pi, np.pi)),
    "gamma": (lambda t: dist.Gamma(t + 1.0, 1.3), (0.0, 40.0)),
    "beta": (lambda t: dist.Beta(1.0 + t, 2.0), (0.0, 1.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPLICIT)
def test_paths_through_draws_without_derivatives(name: str) -> None:
    """Against quadrature; the default where the sampler has no derivative, and of second order, too."""
    make, (low, high) = IMPLICIT[name]
    cost = lambda x: jnp.sin(x) + jnp.cos(2 * x)  # noqa: E731  (of one turn, for the circle)
    program = lambda t: cost(sample("x", make(t)))  # noqa: E731
    exact = lambda t: on_line(make(t), cost, low, high)  # noqa: E731
    agree(program, THETA, exact)
    if name in ("gamma", "beta"):  # JAX has first derivatives of these draws only
        return
    keys = jax.random.split(KEY, 20_000)
    curve = jax.vmap(jax.grad(jax.grad(expect(program), argnums=1), argnums=1), (0, None))
    found, wanted = jax.jit(curve)(keys, THETA), jax.jit(jax.grad(jax.grad(exact)))(THETA)
    assert abs(found.mean() - wanted) < 5 * found.std() / np.sqrt(len(keys)) + 1e-3 * abs(wanted)


@pytest.mark.slow
def test_paths_through_simplexes() -> None:
    """Dirichlet draws: the mean of the square of a weight is known."""
    cost = lambda t: sample("x", dist.Dirichlet(t * jnp.array([1.0, 2.0, 3.0])))[0] ** 2  # noqa: E731
    agree(cost, 1.5, lambda t: t * (t + 1) / (6 * t * (6 * t + 1)))


def test_a_law_without_a_path_has_a_score() -> None:
    """The distribution function of a mixture of betas has no derivative in JAX: the default is the score function."""

    @gen
    def betas() -> None:
        components = dist.Beta(jnp.array([1.0, 2.0]), 2.0)
        sample("x", dist.MixtureSameFamily(dist.Categorical(probs=jnp.full(2, 0.5)), components))

    assert not betas().sites["x"].reparametrised


@pytest.mark.slow
def test_gumbel_is_the_straight_through_estimator() -> None:
    """Its value is unbiased, its derivative that of the relaxation: by quadrature over the noise."""
    noise = np.log(np.linspace(0, 1, 200_001)[1:-1])
    noise = noise - np.log1p(-np.exp(noise))

    def relaxed(logit: Any, temperature: float) -> Any:
        """The mean of 2 s(b) over the noise, with the slope of the relaxed b for that of b."""
        noisy = logit + noise
        slope = jax.nn.sigmoid(noisy / temperature)
        hard = noisy > 0
        return jnp.mean((2 * hard - 0.6) * (slope - lax.stop_gradient(slope)))

    keys = jax.random.split(KEY, 20_000)
    for temperature in (0.3, 1.0):

        def program(logit: Any, temperature: float = temperature) -> Any:
            by = gradients.gumbel(temperature)
            b = sample("b", dist.Bernoulli(logits=logit), grad=by)
            return (jnp.array([b, b])[0].reshape(1) - 0.3)[0] ** 2

        both = jax.vmap(jax.value_and_grad(expect(program), argnums=1), (0, None))(keys, 0.4)
        p = jax.nn.sigmoid(0.4)
        wanted = (p * 0.49 + (1 - p) * 0.09, jax.grad(relaxed)(0.4, temperature))
        for found, exact in zip(both, wanted, strict=True):
            assert abs(found.mean() - exact) < 5 * found.std() / np.sqrt(len(keys))
    unbiased = 0.4 * p * (1 - p)
    assert abs(wanted[1] - unbiased) > 0.005  # it says of itself that it is biased
    assert gradients.gumbel.biased


@pytest.mark.slow
def test_gumbel_of_indicators() -> None:
    def program(t: Any) -> Any:
        probs = jnp.stack([t, 1 - 2 * t, t])
        z = sample("z", dist.Multinomial(1, probs, total_count_max=1), grad=gradients.gumbel(0.5))
        return jnp.sum(z * jnp.array([1.0, 2.0, 4.0]))

    def by_hand(key: Any, t: Any) -> Any:
        noisy = jnp.log(jnp.stack([t, 1 - 2 * t, t])) + jax.random.gumbel(key, (3,))
        return jnp.sum(jax.nn.softmax(noisy / 0.5) * jnp.array([1.0, 2.0, 4.0]))

    keys = jax.random.split(KEY, 20_000)
    found = jax.vmap(jax.grad(expect(program), argnums=1), (0, None))(keys, 0.3)
    wanted = jax.vmap(jax.grad(by_hand, argnums=1), (0, None))(keys, 0.3)
    error = np.hypot(found.std(), wanted.std()) / np.sqrt(len(keys))
    assert abs(found.mean() - wanted.mean()) < 5 * error


class Guarded(eqx.Module):
    """A coin of a user's own, whose density compares."""

    logit: Any

    def sample(self, key: Any, sample_shape: Any = ()) -> Any:
        return dist.Bernoulli(logits=self.logit).sample(key, sample_shape)

    def log_prob(self, x: Any) -> Any:
        own = x * jax.nn.log_sigmoid(self.logit) + (1 - x) * jax.nn.log_sigmoid(-self.logit)
        return jnp.where((x == 0) | (x == 1), own, -jnp.inf)


@pytest.mark.parametrize("d", [lambda t: dist.Bernoulli(logits=t), Guarded])
def test_gumbel_goes_through_the_densities_of_sites(d: Any) -> None:
    """What they compare has no derivative; their arithmetic has: log q has the slope t in b."""

    def program(t: Any) -> Any:
        b = sample("b", dist.Bernoulli(logits=0.2 * t), grad=gradients.gumbel(0.5))
        return gen(lambda t: sample("y", d(t)))(lax.stop_gradient(t)).log_density({"y": b})

    def relaxed(t: Any) -> Any:
        b = sample("b", dist.Bernoulli(logits=0.2 * t), grad=gradients.gumbel(0.5))
        return b * lax.stop_gradient(t)

    found, right = (jax.grad(expect(f), argnums=1)(KEY, 0.7) for f in (program, relaxed))
    assert abs(float(found)) > 1e-3
    np.testing.assert_allclose(found, right, rtol=1e-5)


def test_gumbel_where_it_has_no_derivative() -> None:
    def compared(p: Any) -> Any:
        b = sample("b", dist.Bernoulli(p), grad=gradients.gumbel)
        return jnp.where(b == 1, 3.0, p)

    with pytest.raises(GradientError, match=r"'eq' .*test_gradients.*arithmetic"):
        expect(compared)(KEY, 0.3)
    with pytest.raises(GradientError, match="gumbel does not fit Poisson"):
        expect(lambda t: sample("n", dist.Poisson(t), grad=gradients.gumbel))(KEY, 0.3)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_score_of_costs_that_are_guarded(num_samples: int) -> None:
    """NumPyro's Bernoulli multiplies by infinity in a `where` that never chooses it; so may any guard.

    E[log q(z) + guarded] has the derivative s (1 - s) (l + 2) at the logit l, s its probability.
    """

    def cost(logit: Any) -> Any:
        trace = draw(gen(lambda x: sample("z", dist.Bernoulli(logits=x)))(logit))
        z = 1.0 * trace.value
        guarded = jnp.where(z >= 0, 2.0 * z, jnp.log(z - 1.0))
        return trace.log_density + guarded

    logit, keys = 0.3, jax.random.split(jax.random.key(3), 4000)
    slopes = jax.jit(jax.vmap(jax.grad(expect(cost, num_samples), argnums=1), (0, None)))(
        keys, logit
    )
    s = 1 / (1 + np.exp(-logit))
    exact = s * (1 - s) * (2.0 + logit)
    assert np.isfinite(slopes).all()
    assert abs(float(slopes.mean()) - exact) < 5 * float(slopes.std()) / 4000**0.5


def test_a_batch_of_one_copy() -> None:
    ys = jnp.array([0.5, 1.0, -2.0])

    def program(theta: Any) -> Any:
        x = sample("x", dist.Normal(theta * jnp.ones(1), 1.0), grad=gradients.score)
        return jnp.sum((x - ys) ** 2) + x[0] * lax.squeeze(x, (0,))

    agree(program, THETA, lambda theta: jnp.sum((theta - ys) ** 2) + theta**2 + 4)


def test_costs_of_fewer_digits() -> None:
    grid = np.linspace(-9, 9, 100_001)
    weights = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi) * (grid[1] - grid[0])

    def cost(x: Any) -> Any:
        rounded = (x**2).astype(jnp.float8_e5m2).astype(x.dtype)
        single = x.astype(jnp.float32) ** 2 + jnp.float32(1.5)
        return 2.0 * rounded + lax.reduce_precision(x, 8, 1) + single

    with jax.enable_x64(True):
        keys = jax.random.split(KEY, 20_000)
        estimator = expect(lambda t: cost(sample("x", dist.Normal(t, 1.0), grad=gradients.score)))
        found = jax.jit(jax.vmap(jax.value_and_grad(estimator, argnums=1), (0, None)))(keys, THETA)
        costs = np.asarray(cost(jnp.asarray(THETA + grid)))
    exact = costs @ weights, (costs * grid) @ weights
    for x, right in zip(map(np.asarray, found), exact, strict=True):
        assert abs(np.mean(x) - right) < 5 * np.std(x) / np.sqrt(len(keys))


def test_relaxed_integers_wrap_around_as_integers_do() -> None:
    def program(theta: Any) -> Any:
        z = sample("z", law("coin", theta), grad=gradients.gumbel)
        return (z.astype(jnp.uint8) - jnp.uint8(1)).astype(float)

    keys = jax.random.split(KEY, 20)
    values, slopes = jax.vmap(jax.value_and_grad(expect(program), argnums=1), (0, None))(
        keys, THETA
    )
    assert set(np.asarray(values).tolist()) == {0.0, 255.0}
    assert np.all(slopes > 0)


def test_costs_that_are_written_in_place() -> None:
    def program(theta: Any) -> Any:
        held = jax.new_ref(jnp.zeros(()))
        held[...] = sample("x", dist.Normal(theta, 1.0), grad=gradients.score) ** 2
        return held[...]

    with pytest.raises(GradientError, match="in place"):
        expect(program)(KEY, THETA)
