"""Reports of a fit: variances by choice against closed forms, jumps, suggestions, bounds by weights.

A contribution is the mean of independent numbers `1/2 ||g - g_s||^2`; bands are |z| < 5.5 of the standard error that
the report itself gives. These numbers are heavy-tailed (squares, or fourth powers, of normals), so that 1,000 or more
are drawn, and keys are fixed: about 25 such bands, false alarm below 1e-4 together.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from weft.inference import (
    constrained,
    elbo,
    fit,
    fixed,
    gradient_report,
    iwelbo,
    load,
    mean_field,
    plateau,
    wake_phi,
)
from weft.ppl.stage.errors import WeftError

from weft import expect, gen, gradients, sample

# Every report is compiled for its own function, and run once.
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.slow,  # once is enough: not in every lane
]

KEY = jax.random.key(0)
BAND = 5.5


def of(f: Any, params: Any, num_samples: int = 1000, **kwargs: Any) -> Any:
    estimator = expect(f, **kwargs)
    return gradient_report(
        KEY, lambda key, params: estimator(key, params), params, num_samples=num_samples
    )


def near(row: Any, exact: float) -> bool:
    return abs(row.variance - exact) < BAND * row.error


# --- variances
# --------------------------------------------------------------------------------------------------------


def test_independent_choices() -> None:
    """g = 2 (m + e1) + 6 (m + 2 e2) + 0.3: of variance 4 + 144; the enumerated choice adds none."""

    def cost(params: Any) -> Any:
        m = params["m"]
        x = sample("x", dist.Normal(m, 1.0))
        y = sample("y", dist.Normal(m, 2.0))
        b = sample("b", dist.Bernoulli(0.3), grad=gradients.enum)
        return x**2 + 3 * y**2 + b * m

    report = of(cost, {"m": 0.5, "other": fixed(1.0)})
    assert [(r.address, r.strategy, r.size) for r in report.rows] == [
        ("x", "reparam", 1),
        ("y", "reparam", 1),
        ("b", "enum", 1),
    ]
    assert near(report["x"], 4.0)
    assert near(report["y"], 144.0)
    assert report["b"].variance == 0.0
    assert near(report, 148.0)
    # The signal's own error: that of the mean of 2000 gradients, twice.
    assert abs(report.signal - 4.3**2) < BAND * 2 * 4.3 * (148.0 / 2000) ** 0.5
    assert report.signal_to_noise == pytest.approx(report.signal / report.variance)
    assert "Gradient: variance" in repr(report)


def test_choices_that_multiply() -> None:
    """g = (s2 e1 e2, s1 e1 e2): each choice alone accounts for all of the variance, s1^2 + s2^2."""

    def cost(params: Any) -> Any:
        return sample("x", dist.Normal(0.0, params[0])) * sample("y", dist.Normal(0.0, params[1]))

    report = of(cost, (2.0, 1.0), 4000)
    for row in (*report.rows, report):
        assert near(row, 5.0)


def test_a_score_term() -> None:
    """g = c b (b - p), of variance c^2 (1 - p)^3 p."""

    def cost(logit: Any) -> Any:
        return 5.0 * sample("b", dist.Bernoulli(logits=logit), grad=gradients.score)

    p = 1 / (1 + np.exp(-0.7))
    report = of(cost, 0.7, 4000)
    assert near(report["b"], 25.0 * (1 - p) ** 3 * p)
    assert near(report, 25.0 * (1 - p) ** 3 * p)


def test_the_scale_is_that_of_the_optimiser() -> None:
    """x = s e with s = exp(u): the gradient by u is s e, and s^2 its variance; by s it would be 1."""
    cost = lambda params: sample("x", dist.Normal(0.0, params["s"]))  # noqa: E731
    report = of(cost, {"s": constrained(3.0, constraints.positive)})
    assert near(report["x"], 9.0)


def test_averages_copies_and_scans() -> None:
    """Averaged, the variance is divided; copies under vmap, and steps of a scan, are one address and add up."""

    def copies(m: Any) -> Any:
        return jnp.sum(jax.vmap(lambda _: sample("x", dist.Normal(m, 1.0)) ** 2)(jnp.zeros(3)))

    def steps(m: Any) -> Any:
        step = lambda total, _: (total + sample("x", dist.Normal(m, 1.0)) ** 2, None)  # noqa: E731
        return jax.lax.scan(step, 0.0, None, length=3)[0]

    for f in (copies, steps):
        for num_samples in (1, 4):
            estimator = expect(f, num_samples)
            found = gradient_report(KEY, lambda k, p, e=estimator: e(k, p), 0.5, num_samples=1000)
            assert found["x"].size == 3
            assert near(found["x"], 3 * 4.0 / num_samples)


@gen
def model() -> None:
    mu = sample("mu", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(mu, 1.0))


@gen
def guide(params: Any) -> None:
    sample("mu", dist.Normal(params["loc"], jnp.exp(params["log_scale"])))


PARAMS = {"loc": 0.4, "log_scale": -0.5}


def elbo_variance(y: float) -> float:
    """Of both parameters: (y - 2 x) and (y - 2 x) s e + 1, x = loc + s e."""
    loc, s = PARAMS["loc"], np.exp(PARAMS["log_scale"])
    return 4 * s**2 + s**2 * (y - 2 * loc) ** 2 + 8 * s**4


def test_objectives() -> None:
    """The ELBO's in closed form; none at the posterior, sticking the landing; one row for IWELBO's lanes."""
    target = model().given({"y": 2.0})
    report = gradient_report(KEY, elbo(target, guide), PARAMS, num_samples=4000)
    assert near(report["mu"], elbo_variance(2.0))
    posterior = {"loc": 1.0, "log_scale": -0.5 * np.log(2.0)}
    landed = gradient_report(KEY, elbo(target, guide, sticking_the_landing=True), posterior)
    assert landed.variance < 1e-9
    many = gradient_report(KEY, iwelbo(target, guide, num_particles=5), PARAMS)
    assert [r.address for r in many.rows] == ["mu"]
    assert abs(many["mu"].variance - many.variance) < BAND * (many["mu"].error + many.error)


def test_noise_that_is_no_choice_of_an_expectation() -> None:
    """Draws that do not move have no strategy: the report has the whole variance, and no row for them."""
    report = gradient_report(KEY, wake_phi(model().given({"y": 2.0}), guide), PARAMS)
    assert report.variance > 0
    assert not any(r.strategy == "score" for r in report.rows)


def test_minibatches_have_a_row() -> None:
    """g is the mean of B of N rows: of variance s^2 / B (N - B) / (N - 1), s^2 the rows' own."""
    x = jnp.arange(10.0) ** 2
    report = gradient_report(
        KEY, lambda key, p, rows: p * rows.mean(), 1.0, x, num_samples=1000, batch_size=4
    )
    (row,) = report.rows
    exact = float(np.var(x)) / 4 * 6 / 9
    assert row.address == "(minibatch)"
    assert near(row, exact)
    assert near(report, exact)
    assert "larger batches" in row.suggestion


def test_gradients_that_are_not_finite() -> None:
    def cost(m: Any) -> Any:
        return jnp.sqrt(sample("x", dist.Normal(m, 1.0)))

    report = of(cost, 0.0, 200)
    # A draw counts if x, its own copy and that of all are positive: 1/8, of 200.
    assert 0 < report.num_samples - report.num_failed < 60
    assert "were not finite" in repr(report)
    with pytest.raises(WeftError, match="none of 200 gradients was finite"):
        of(lambda m: jnp.sqrt(-1.0 - m * sample("x", dist.Exponential(1.0))), 1.0, 200)


def test_what_it_takes() -> None:
    with pytest.raises(WeftError, match="no floating array to optimise"):
        of(lambda p: sample("x", dist.Normal(0.0, 1.0)), {"a": fixed(1.0)})
    with pytest.raises(WeftError, match="num_samples must be an integer, at least 2"):
        of(lambda p: p, 1.0, 1)


# --- jumps
# ------------------------------------------------------------------------------------------------------------


def x(m: Any) -> Any:
    return sample("x", dist.Normal(m, 1.0))


JUMPS = {
    "where": lambda m: jnp.where(x(m) > 0.3, 1.0, 0.0),
    "cond": lambda m: jax.lax.cond(x(m) > 0, lambda: m, lambda: 0.0),
    "switch": lambda m: jax.lax.switch(x(m).astype(int), [lambda: 0.0, lambda: 2.0]),
    "cast": lambda m: 1.0 * (x(m) < 0),
    "floor": lambda m: m * jnp.floor(x(m)),
    "sign": lambda m: jnp.sign(x(m)) * m,
    "remainder": lambda m: x(m) % 1.0,
    "table": lambda m: jnp.array([1.0, 2.0, 5.0])[jnp.clip(x(m), 0, 2).astype(int)],
    "argmax": lambda m: jnp.array([m, 2.0])[jnp.argmax(jnp.stack([x(m), 0.0]))],
    "in a scan": lambda m: jax.lax.scan(
        lambda c, _: (c + jnp.where(x(m) > 0, 1.0, 0.0), None), 0.0, None, length=3
    )[0],
    "carried by a scan": lambda m: jax.lax.scan(
        lambda c, _: (c + x(m), jnp.where(c > 1.0, 1.0, 0.0)), 0.0, None, length=3
    )[1].sum(),
    "in a branch": lambda m: jax.lax.cond(
        m > 0, lambda v: jnp.where(v > 0, 1.0, 0.0), lambda v: v, x(m)
    ),
    "in lanes": lambda m: jnp.sum(
        jax.vmap(lambda i: jnp.where(x(m) > i, 1.0, 0.0))(jnp.arange(3.0))
    ),
    "of a later draw": lambda m: jnp.where(
        sample("y", dist.Gamma(jnp.exp(x(m)), 1.0)) > 1, 1.0, 0.0
    ),
}


@pytest.mark.parametrize("name", JUMPS)
def test_jumps_are_found(name: str) -> None:
    report = of(JUMPS[name], 0.5, 20)
    assert report["x"].jumps
    assert "smooth the jump" in report["x"].suggestion
    assert all("test_reports.py" in jump.where for jump in report["x"].jumps)


def through_a_coin(m: Any) -> Any:
    b = sample("b", dist.Bernoulli(logits=x(m)), grad=gradients.score)
    return 3.0 * b * m


SMOOTH = {
    "relu": lambda m: jax.nn.relu(x(m)),
    "relu by where": lambda m: (lambda v: jnp.where(v > 0, v, 0.0))(x(m)),
    "abs": lambda m: jnp.abs(x(m)),
    "clip": lambda m: jnp.clip(x(m), -0.5, 0.5),
    "root": lambda m: jnp.sqrt(jnp.abs(x(m))),
    "sort": lambda m: jnp.sort(jnp.stack([x(m), 0.0]))[0],
    "largest": lambda m: jnp.max(jnp.stack([x(m), 0.0])),
    "unused": lambda m: (lambda v: (v > 0, v)[1])(x(m)),
    "a switch that is never met": lambda m: jnp.where(x(m) > 50.0, 1.0, 0.0),
    "a coin with a score": through_a_coin,
    "a sampler that rejects": lambda m: jax.nn.relu(
        sample("y", dist.Gamma(jnp.exp(x(m)), 1.0)) - 1
    ),
    "a score": lambda m: jnp.where(
        sample("x", dist.Normal(m, 1.0), grad=gradients.score) > 0, 1.0, 0.0
    ),
    "stopped": lambda m: x(m) * jnp.where(jax.lax.stop_gradient(m) > 0, 1.0, 0.0),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_what_is_continuous_is_no_jump(name: str) -> None:
    report = of(SMOOTH[name], 0.5, 20)
    assert not any(row.jumps for row in report.rows)


@gen
def positive() -> None:
    sample("log_normal", dist.LogNormal(0.0, 1.0))
    sample("gamma", dist.Gamma(2.0, 1.0))
    sample("half_cauchy", dist.HalfCauchy(1.0))
    sample("half_normal", dist.HalfNormal(1.0))
    sample("weibull", dist.Weibull(1.0, 2.0))


@gen
def bounded() -> None:
    sample("beta", dist.Beta(2.0, 3.0))
    sample("truncated", dist.TruncatedNormal(0.0, 1.0, low=-1.0, high=2.0))
    sample("uniform", dist.Uniform(0.0, 1.0))
    sample("dirichlet", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))


@gen
def whole_line() -> None:
    sample("student", dist.StudentT(4.0))
    sample("laplace", dist.Laplace(0.0, 1.0))
    m = sample("mvn", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
    sample("y", dist.Poisson(jnp.exp(m[0])))
    sample("b", dist.Bernoulli(logits=m[1]))


@pytest.mark.parametrize(
    ("laws", "data"),
    [(positive, {}), (bounded, {}), (whole_line, {"y": 3, "b": 1})],
    ids=["positive", "bounded", "whole line"],
)
def test_numpyros_densities_are_no_jumps(laws: Any, data: Any) -> None:
    """In three models: the work is that of the model's size times the number of its choices."""
    target = laws().given(data)
    made, params = mean_field(target)
    report = gradient_report(KEY, elbo(target, made), params, num_samples=20)
    assert {r.address for r in report.rows} == set(target.latents)
    assert not [(r.address, r.jumps) for r in report.rows if r.jumps]


def test_a_jump_in_the_target() -> None:
    """The place is told by its line; with another strategy there is nothing to tell."""

    @gen
    def jumping() -> None:
        z = sample("z", dist.Normal(0.0, 1.0))
        sample("y", dist.Normal(jnp.where(z > 0.2, 2.0, -1.0), 1.0))

    line = jumping.function.__code__.co_firstlineno + 3
    target = jumping().given({"y": 1.0})
    for strategy in (gradients.reparam, gradients.mvd):

        @gen
        def some(params: Any, strategy: Any = strategy) -> None:
            sample("z", dist.Normal(params, 1.0), grad=strategy)

        report = gradient_report(KEY, elbo(target, some), 0.1, num_samples=20)
        if strategy is gradients.mvd:
            assert not report["z"].jumps
        else:
            (jump,) = report["z"].jumps
            assert f"test_reports.py:{line}" in jump.where
            # log N(1; 2, 1) - log N(1; -1, 1) = (4 - 1) / 2
            assert jump.size == pytest.approx(1.5, rel=1e-3)
            assert "gradients.mvd or gradients.score" in report["z"].suggestion


# --- suggestions
# ------------------------------------------------------------------------------------------------------


def counted(law: Any, **grad: Any) -> Any:
    return lambda m: jnp.sum((1.0 * sample("z", law(m), **grad)) ** 2)


SUGGESTIONS = {
    "take gradients.enum": counted(lambda m: dist.Bernoulli(logits=m)),
    "take gradients.reparam": counted(lambda m: dist.Normal(m, 1.0), grad=gradients.score),
    "take gradients.mvd": counted(lambda m: dist.Poisson(jnp.exp(m))),
    "give it a baseline": counted(lambda m: dist.NegativeBinomialProbs(3.0, jax.nn.sigmoid(m))),
    "num_samples": counted(
        lambda m: dist.NegativeBinomialProbs(3.0, jax.nn.sigmoid(m)),
        grad=gradients.score(baseline=2.0),
    ),
}


@pytest.mark.parametrize("words", SUGGESTIONS)
def test_suggestions(words: str) -> None:
    assert words in of(SUGGESTIONS[words], 0.3, 50)["z"].suggestion


def test_a_biased_strategy_says_so() -> None:
    report = of(counted(lambda m: dist.Bernoulli(logits=m), grad=gradients.gumbel(0.5)), 0.3, 50)
    assert "biased by construction" in report["z"].suggestion
    assert "gradients.enum" in report["z"].suggestion


def test_sticking_the_landing_is_suggested() -> None:
    objective = elbo(model().given({"y": 2.0}), guide)
    assert "sticking_the_landing" in gradient_report(KEY, objective, PARAMS)["mu"].suggestion


def test_in_a_scan_no_tail_is_suggested() -> None:
    def steps(m: Any) -> Any:
        step = lambda c, _: (c + 1.0 * sample("z", dist.Bernoulli(logits=m)), None)  # noqa: E731
        return jax.lax.scan(step, 0.0, None, length=3)[0]

    assert "baseline" in of(steps, 0.3, 50)["z"].suggestion


# --- the report of a fit
# ----------------------------------------------------------------------------------------------


def test_the_report_of_a_fit() -> None:
    """ELBO, log evidence and their gap against closed forms, by the errors that the report states."""
    target = model().given({"y": 2.0})
    objective = elbo(target, guide)
    found = fit(KEY, objective, PARAMS, optax.sgd(1e-6), 20, progress=False)  # stays where it is
    text = found.report(num_particles=20_000)
    number = r"(-?[\d.e-]+?)"
    both = rf"{number} \+- {number}"
    pattern = rf"ELBO {both}; importance-weighted bound {both},.*gap, {both} nats"
    match = re.search(pattern, text)
    assert match is not None
    lower, e1, upper, e2, gap, e3 = map(float, match.groups())
    evidence = float(dist.Normal(0.0, 2.0**0.5).log_prob(2.0))
    q = dist.Normal(PARAMS["loc"], float(np.exp(PARAMS["log_scale"])))
    exact = float(dist.kl_divergence(q, dist.Normal(1.0, 0.5**0.5)))
    # Five of the errors as printed, with one digit: between 3.4 and 10 of the true ones.
    assert abs(lower - (evidence - exact)) < 10 * e1
    assert abs(upper - evidence) < 10 * e2
    assert abs(gap - exact) < 10 * e3
    assert e3 < 0.05
    assert "k-hat" in text
    assert "mu" in text
    assert "Gradient: variance" in text
    assert "Gradient" not in found.report(num_particles=100, num_gradients=0)


def test_the_report_looks_at_constrained_parameters_as_fit_does() -> None:
    params = {"s": constrained(3.0, constraints.positive)}
    cost = expect(lambda p: sample("x", dist.Normal(0.0, p["s"])))
    found = fit(KEY, lambda key, p: cost(key, p), params, optax.sgd(0.0), 3, progress=False)
    assert near(found.gradient_report(1000)["x"], 9.0)


def test_a_fit_goes_on_with_its_constraints() -> None:
    start = {"loc": 0.0, "s": constrained(1.0, constraints.positive)}
    objective = lambda key, p: -((p["loc"] - 1.0) ** 2) - (jnp.log(p["s"]) - 1.0) ** 2  # noqa: E731
    whole = fit(KEY, objective, start, optax.adam(0.1), 8, progress=False)
    half = fit(KEY, objective, start, optax.adam(0.1), 4, progress=False)
    rest = fit(KEY, objective, half.wrapped, optax.adam(0.1), 4, state=half.state, progress=False)
    np.testing.assert_allclose(rest.params["s"], whole.params["s"], rtol=1e-5)


def test_a_guide_narrower_than_the_target_is_not_checked_by_weights() -> None:
    @gen
    def moving(params: Any) -> None:
        unit = dist.transforms.SigmoidTransform()
        sample("mu", dist.TransformedDistribution(dist.Normal(params, 1.0), unit))

    found = fit(
        KEY, elbo(model().given({"y": 0.5}), moving), 0.0, optax.adam(0.01), 5, progress=False
    )
    assert "Not checked by weights" in found.report(num_gradients=0)


def test_saved_with_restarts(tmp_path: Any) -> None:
    objective = lambda key, p: -((p - 1.0) ** 2) + 0.1 * jax.random.normal(key)  # noqa: E731
    found = fit(
        KEY,
        objective,
        lambda key: jax.random.normal(key),
        optax.sgd(0.1),
        100,
        num_restarts=3,
        stop=plateau(10),
        progress=False,
    )
    found.save(tmp_path / "fit.npz")
    again = load(tmp_path / "fit.npz")
    assert bool(again.stopped) == bool(found.stopped)
    assert np.array_equal(again.restarts.bounds, found.restarts.bounds)
    assert again.report() == found.report()
    with pytest.raises(WeftError, match="loaded from a file"):
        again.gradient_report()
