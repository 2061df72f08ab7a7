"""Tempering: the laws on the way, evidence without bias, reference posteriors, two modes, rows one by one.

Keys are fixed. Bands are four standard errors of independent replicates: a false alarm of 6e-5 each, of 1e-3
where there are sixteen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp
from scipy import integrate, stats
from weft.inference import Particles, importance, kernels, nuts, smc, tempering
from weft.inference.particles.bridges import Bridge, Likelihood, MarginalLikelihood
from weft.ppl import AddressError, DensityError, WeftError

from benchmarks.posteriors import load
from examples.posteriors import CASES
from weft import condition, factor, gen, marginalize, observed, repeat, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane
KEY = jax.random.key(5)


def replicates(algorithm: Any, target: Any, num: int) -> Any:
    """Runs one after another, compiled once (under a vmap, both branches of each resampling are)."""
    run = jax.jit(lambda ks, t: jax.lax.map(lambda k: algorithm.run(k, t, progress=False), ks))
    return run(jax.random.split(KEY, num), target)


def means(runs: Any, values: Any) -> Any:
    """Weighted means of values (run, particle, ...)."""
    return jnp.einsum("rp,rp...->r...", runs.weights, values)


def near(values: Any, exact: Any, allowed: Any = 0.0) -> None:
    """Whether replicates have this mean."""
    values = np.asarray(values)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    assert np.all(np.abs(values.mean(0) - exact) < 4 * error + allowed), (values.mean(0), error)


# --- the laws on the way ----------------------------------------------------------------------------------------------


@gen
def part() -> Any:
    return sample("z", dist.Normal(0.0, 1.0))


@gen
def rich(x: Any) -> None:
    """A scan, branches, a program inside, a plate with a batch in it, a factor."""
    a = sample("a", dist.Normal(0.0, 2.0))
    s = sample("s", dist.HalfNormal(1.0))
    b = sample("sub", part())

    def step(c: Any, _: Any) -> Any:
        c = sample("w", dist.Normal(c, 0.5))
        sample("o", dist.Normal(c, s))
        return c, None

    jax.lax.scan(step, a, x)
    branches = [lambda n=n: sample(n, dist.Normal(0.0, 1.0)) for n in ("p", "q")]
    k = jax.lax.cond(a > 0, *branches)

    def row(xi: Any) -> None:
        u = sample("u", dist.Normal(a, 1.0))
        sample("y", dist.Normal(u + b * xi + k, s))
        sample("v", dist.Normal(jnp.stack([u, u]), s))

    jax.vmap(row, axis_name="row")(x)
    factor("f", -(a**2))


@gen
def begin(m: Any, partial: bool) -> None:
    a = sample("a", dist.Normal(m, 3.0))
    sample("s", dist.LogNormal(0.0, 1.0))
    sample("sub", beginning_part(a))
    jax.lax.scan(lambda c, _: (sample("w", dist.Normal(c, 0.7)), None), a, None, length=3)
    branches = [lambda n=n: sample(n, dist.Normal(0.0, 2.0)) for n in ("p", "q")]
    jax.lax.cond(a > 0.1, *branches)
    jax.vmap(lambda m: sample("u", dist.Normal(m, 1.3)))(a * jnp.ones(3))
    if partial:
        sample("v", dist.Normal(a * jnp.ones((3, 2)), 2.0))


@gen
def beginning_part(m: Any) -> None:
    sample("z", dist.Normal(m, 2.0))


X = np.arange(3.0)
DATA = {"o": X + 1, "y": X**2, "v": np.arange(6.0).reshape(3, 2)}
SEEN = np.array([[True, False], [True, True], [False, True]])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("partial", [False, True])
def test_the_laws_on_the_way(partial: bool) -> None:
    """On the scale of the choices and on R^n, they differ from the target by what has not entered."""
    data = {**DATA, "v": observed(DATA["v"], where=SEEN)} if partial else DATA
    target = rich(X).given(data).staged()
    guide = begin(0.3, partial).staged()
    laws: list[tuple[Any, Any]] = [
        (Likelihood(target), (0.0, 0.3, 1.0)),
        (Likelihood(target, "row"), (0.0, 2.0, 3.0)),
        (Bridge(target, guide), (0.0, 0.3, 1.0)),
    ]
    whole = target.unconstrain()
    for path, levels in laws:
        choices = path.draw(KEY)
        terms = path.terms(choices)
        assert set(choices) == {a.split(".")[0] for a in target.latents}
        if isinstance(path, Likelihood):
            weight = target.generate(jax.random.key(1), choices)[1] - terms.sum()
            # What generate weighs of given choices beside the likelihood is the prior.
            np.testing.assert_allclose(path.at(0.0).log_density(choices), weight, rtol=1e-12)
            drawn, weight = target.generate(KEY)
            seen = {a: drawn.choices[a] for a in choices}
            np.testing.assert_allclose(path.terms(seen).sum(), weight, rtol=1e-12)
        elif not partial:
            np.testing.assert_allclose(
                path.at(0.0).log_density(choices), guide.log_density(choices), rtol=1e-12
            )
        for level in levels:
            law = path.at(jnp.asarray(level))
            missing = jnp.sum((1 - path.share(level)) * terms)
            np.testing.assert_allclose(
                law.log_density(choices), target.log_density(choices) - missing, rtol=1e-12
            )
            space = law.unconstrain()
            z = space.from_choices(choices)
            if isinstance(path, Likelihood):  # a guide may have another support, another bijection
                np.testing.assert_allclose(
                    space.log_density(z), whole.log_density(z) - missing, rtol=1e-12
                )


# --- evidence ---------------------------------------------------------------------------------------------------------


@gen
def level(n: int) -> None:
    mu = sample("mu", dist.Normal(0.0, 2.0))
    jax.vmap(lambda _: sample("y", dist.Normal(mu, 0.5)), axis_name="row")(jnp.zeros(n))


Y = np.array([1.9, 0.6, 1.2, 2.8, 1.4, 0.9, 2.2, 1.1])


def log_evidence(y: Any) -> float:
    cov = 0.25 * np.eye(len(y)) + 4.0
    return float(dist.MultivariateNormal(jnp.zeros(len(y)), cov).log_prob(jnp.asarray(y)))


@gen
def elsewhere() -> None:
    sample("mu", dist.Normal(0.5, 0.8))


def ratios(runs: Any, exact: float) -> np.ndarray:
    return np.exp(np.asarray(runs.log_evidence, float) - exact)


WALK = kernels.random_walk(0.3)


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        ({"schedule": jnp.linspace(0.0, 1.0, 6) ** 2}, {"waste_free": 5}),
        ({"schedule": jnp.array([0.1, 0.3, 1.0]), "guide": elsewhere()}, {"threshold": 1.0}),
    ],
)
def test_the_evidence_is_unbiased_on_a_schedule(settings: Any, engine: Any) -> None:
    """With kernels that do not look at the particles; on data of which the first is missing."""
    target = level(8).given({"y": observed(Y, where=np.arange(8) > 0, missing="drop")})
    algorithm = smc(tempering(**settings, num_moves=1), 50, rejuvenate=WALK, **engine)
    runs = replicates(algorithm, target, 1000)
    near(ratios(runs, log_evidence(Y[1:])), 1.0)
    assert np.asarray(runs.path.info["acceptance_rate"]).max() > 0.1


def test_rows_give_their_predictive_densities() -> None:
    """The evidence of the first rows is unbiased at every step; so are weighted sums of the particles."""
    algorithm = smc(tempering(by="row", num_moves=1), 50, rejuvenate=WALK)
    runs = replicates(algorithm, level(8).given({"y": Y}), 500)
    exact = np.array([log_evidence(Y[: n + 1]) for n in range(8)])
    increments = np.asarray(runs.path.log_increments, float)
    np.testing.assert_array_equal(increments[:, [0, -1]], 0.0)
    for n in range(8):
        near(np.exp(increments[:, 1 : n + 2].sum(1) - exact[n]), 1.0)
    # An increment is the log of a ratio of estimates with a relative variance of 1/50 or so.
    near(increments[:, 1:-1], np.diff(exact, prepend=0.0), 2 / 50)
    weighed = means(runs, runs.choices["mu"]) * ratios(runs, exact[-1])
    near(weighed, Y.sum() / 0.25 / (len(Y) / 0.25 + 0.25))
    rows = np.asarray(runs.path.info["rows"])[np.asarray(runs.path.resampled)]
    assert 0 < rows.min() < rows.max() <= 8


def test_rows_at_each_step() -> None:
    target = level(8).given({"y": Y})
    model = tempering(by="row", rows_per_step=3)(target)
    np.testing.assert_array_equal(model.levels, [3, 6, 8])
    choices = {"mu": jnp.asarray(0.7)}
    each = dist.Normal(0.7, 0.5).log_prob(Y)
    np.testing.assert_allclose(model.path.terms(choices), each, rtol=1e-5)
    particle, weight = model.init(KEY)
    particle = dataclasses.replace(particle, terms=jnp.arange(8.0))
    for t, added in ((1, 0 + 1 + 2), (2, 3 + 4 + 5), (3, 6 + 7), (4, 0)):
        particle = model.adapt(t, jax.tree.map(lambda x: x[None], particle), jnp.zeros(1))
        assert bool(model.finished(particle)) == (t == 4)
        particle, weight = model.step(KEY, t, jax.tree.map(lambda x: x[0], particle))
        assert float(weight) == added


# --- temperatures that are chosen -------------------------------------------------------------------------------------


@gen
def heavy() -> None:
    """A prior with heavy tails, and data far to one side of it."""
    x = sample("x", dist.Cauchy(0.0, 1.0))
    sample("y", dist.Normal(x * jnp.ones(4), 1.0))


FAR = np.array([13.0, 12.0, 12.5, 14.0])


def test_an_asymmetric_likelihood() -> None:
    grid = np.linspace(5.0, 20.0, 20_001)
    log_p = -np.log(np.pi * (1 + grid**2)) - 2 * np.log(2 * np.pi)
    log_p = log_p - 0.5 * ((FAR[:, None] - grid) ** 2).sum(0)
    p = np.exp(log_p)
    exact, mean = (
        np.log(np.trapezoid(p, grid)),
        np.trapezoid(grid * p, grid) / np.trapezoid(p, grid),
    )
    n = 400
    runs = replicates(smc(tempering(max_steps=30), n), heavy().given({"y": FAR}), 100)
    # Chosen temperatures bias the evidence: by the covariance of a temperature's error and of what that moves the
    # estimate by, which is no more than the noise of the estimate; hence by less than its relative variance.
    ratio = ratios(runs, exact)
    near(ratio, 1.0, ratio.var())
    assert ratio.var() < 0.3
    near(means(runs, runs.choices["x"]), mean, 1.0 / n)
    assert np.all(np.asarray(runs.state.iteration) < 20)  # none stalls
    for run in range(3):
        path = jax.tree.map(lambda x, run=run: np.asarray(x[run]), runs.path)
        last = int(runs.state.iteration[run])
        chosen = path.ess[
            1 : last - 1
        ]  # all but the step that reached the target, and the one after it
        assert np.all((chosen <= 0.5 * n) & (chosen > 0.495 * n))
        assert np.all(path.resampled[2:last])
        temperatures = path.info["temperature"][2:last]
        assert np.all(np.diff([0, *temperatures, 1]) > 0)


@pytest.mark.parametrize("terms", [-np.geomspace(1e-3, 1e9, 1000), np.geomspace(1e-3, 1e9, 1000)])
@pytest.mark.parametrize("level", [0.0, 1e-7, 0.5])
@pytest.mark.parametrize("weights", [0.0, 1.0])
def test_the_next_temperature(terms: Any, level: float, weights: float) -> None:
    """It leaves half of the conditional effective sample size, a little less, however skew the likelihood is."""
    model = tempering()(heavy().given({"y": FAR}))
    one, _ = model.init(KEY)
    particles = jax.tree.map(lambda x: jnp.broadcast_to(x, (1000, *x.shape)), one)
    terms = jnp.asarray(terms)[:, None]
    particles = dataclasses.replace(particles, terms=terms, level=jnp.full(1000, level))
    log_weights = weights * jax.random.normal(KEY, (1000,))
    after = model.adapt(3, particles, log_weights)
    change = np.asarray(jax.vmap(model.step, (None, None, 0))(KEY, 3, after)[1], float)
    w = np.exp(np.asarray(log_weights, float))
    v = np.exp(change - change.max())
    share = (w @ v) ** 2 / (w @ v**2) / w.sum()
    # Beside 0.5, a thousandth is subtracted; a temperature is a float, 1e-7 of which times 1e9 is not small.
    if level < 0.5:
        assert 0.499 < share <= 0.4996
    else:
        assert share < 0.4996
    assert np.all(after.ahead == after.ahead[0])
    assert level < float(after.ahead[0]) < 1


def test_a_last_temperature_set_too_far_is_said() -> None:
    @gen
    def precise() -> None:
        sample("y", dist.Normal(sample("x", dist.Normal(0.0, 1.0)), 0.01))

    target, kernel = precise().given({"y": 1.0}), kernels.random_walk(0.1)
    with pytest.warns(UserWarning, match=r"After 3 steps \(max_steps\) the temperature was not"):
        found = smc(tempering(max_steps=3), 50, rejuvenate=kernel).run(KEY, target, progress=False)
    assert found.remark is not None
    assert found.remark in repr(found)


def test_temperatures_where_nothing_else_is_left() -> None:
    model = tempering(max_steps=6)(heavy().given({"y": FAR}))
    one, _ = model.init(KEY)
    particles = jax.tree.map(lambda x: jnp.broadcast_to(x, (10, *x.shape)), one)

    def ahead(t: int, terms: Any) -> float:
        given = dataclasses.replace(particles, terms=jnp.asarray(terms, float)[:, None])
        return float(model.adapt(t, given, jnp.zeros(10)).ahead[0])

    steep = np.arange(10) * 1e3
    assert ahead(5, steep) < 1e-2
    assert ahead(6, steep) == 1.0  # the last step that is allowed
    assert ahead(1, np.zeros(10)) == 1.0
    # Six in ten are impossible: no temperature leaves half of the particles, and the first is as good as any.
    impossible = np.where(np.arange(10) < 6, -np.inf, -1.0)
    assert 0.0 < ahead(1, impossible) < 1e-6


# --- reference posteriors ---------------------------------------------------------------------------------------------


def check_reference(name: str, runs: Any, key: str, values: dict[str, Any]) -> None:
    reference = load(CASES[name], "reference")
    ratio = ratios(runs, reference[key])
    near(ratio, 1.0, ratio.var())
    for scalar, value in values.items():
        near(means(runs, value), reference["exact"][scalar]["mean"])


@pytest.mark.usefixtures("x64")
def test_eight_schools() -> None:
    name = "eight_schools_noncentered"
    runs = replicates(smc(tempering(), 1000), CASES[name].target(load(CASES[name], "data")), 32)
    mu, tau = runs.choices["mu"], runs.choices["tau"]
    theta = mu[..., None] + tau[..., None] * runs.choices["theta_base"]
    values = {f"theta[{i + 1}]": theta[..., i] for i in range(8)}
    check_reference(name, runs, "log_evidence_exact", {"mu": mu, "tau": tau, **values})


@pytest.mark.usefixtures("x64")
def test_a_regression_from_the_prior() -> None:
    """Posterior deviations are 1e-4 of the prior's; on the way the law is a funnel."""
    target = CASES["sblri"].target(load(CASES["sblri"], "data"))
    runs = replicates(smc(tempering(), 1000), target, 8)
    values = {f"beta[{i + 1}]": runs.choices["beta"][..., i] for i in range(5)}
    values["sigma"] = runs.choices["sigma"]
    check_reference("sblri", runs, "log_evidence_exact_halfnormal_sigma", values)
    # Each step adds the relative variance of its weights, if particles are independent, as good moves leave them; 4.27
    # times that is the 1e-4 quantile of a variance with 7 degrees of freedom.
    ess = np.asarray(runs.path.ess, float)
    independent = np.sum(np.where(ess > 0, 1 / np.where(ess > 0, ess, 1) - 1 / 1000, 0), 1).mean()
    assert np.var(np.asarray(runs.log_evidence), ddof=1) < 4.27 * independent
    assert np.asarray(runs.path.info["correlation"]).max() < 0.5
    moves = np.asarray(runs.path.info["num_moves"])
    assert moves[np.asarray(runs.path.resampled)].mean() < 15


# --- two modes --------------------------------------------------------------------------------------------------------


@gen
def modes() -> None:
    """Three in ten at minus four, seven in ten at four, twenty deviations from zero."""
    x = sample("x", dist.Normal(0.0, 4.0))
    both = jnp.stack(
        [jnp.log(0.3) - 0.5 * ((x + 4) / 0.2) ** 2, jnp.log(0.7) - 0.5 * ((x - 4) / 0.2) ** 2]
    )
    factor("modes", logsumexp(both))


def test_two_modes() -> None:
    target = modes().given()
    runs = replicates(smc(tempering(), 500), target, 40)
    right = means(runs, runs.choices["x"] > 0)
    near(right, 0.7)  # the prior is the same at both
    exact = dist.Normal(0.0, (16 + 0.04) ** 0.5).log_prob(4.0) + np.log(0.2 * (2 * np.pi) ** 0.5)
    ratio = ratios(runs, float(exact))
    near(ratio, 1.0, ratio.var())
    assert 0.0 < np.std(right) < 0.1
    draws = nuts(num_chains=1, num_warmup=200, num_samples=300).run(KEY, target, progress=False)
    signs = np.sign(np.asarray(draws.choices["x"]))
    assert np.all(signs == signs.flat[0])


# --- kernels ----------------------------------------------------------------------------------------------------------


@gen
def labels() -> None:
    z = sample("z", dist.Bernoulli(jnp.array([0.2, 0.4, 0.7])))
    sample("y", dist.Normal(z @ jnp.array([1.0, 2.0, 3.0]), 0.7))


def test_discrete_choices_and_kernels_made_of_particles() -> None:
    target = labels().given({"y": 3.4})
    seen = []

    def kernel(particles: Particles) -> Any:
        seen.append(particles.choices["z"].shape)
        return kernels.gibbs("z")

    schedule = jnp.array([0.2, 0.5, 1.0])
    algorithm = smc(tempering(schedule=schedule, num_moves=1), 40, rejuvenate=kernel, threshold=1.0)
    runs = replicates(algorithm, target, 500)
    z = np.stack(np.meshgrid(*[[0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    exact = logsumexp(jax.vmap(lambda z: target.log_density({"z": z}))(jnp.asarray(z)))
    near(ratios(runs, float(exact)), 1.0)
    assert set(seen) == {(40, 3)}
    with pytest.raises(DensityError, match="'z' are discrete"):
        smc(tempering(), 20).run(KEY, target, progress=False)


def test_a_sum_from_a_guide_and_densities_that_are_no_number() -> None:
    """Of the root of a number, whose sign is summed out; where the number is negative nothing can be."""

    @gen
    def root() -> None:
        x = sample("x", dist.Normal(0.0, 1.0))
        z = sample("z", dist.Bernoulli(0.3))
        sample("y", dist.Normal(jnp.sqrt(x) * (1 - 2.0 * z), 0.3))

    prior = gen(lambda: sample("x", dist.Normal(0.0, 1.0)))()
    target = marginalize(root, "z")().given({"y": 1.2})
    x = jnp.linspace(1e-4, 8.0, 8000)
    logs = jax.vmap(lambda x: target.log_density({"x": x}))(x)
    exact, mean = logsumexp(logs) + jnp.log(x[1] - x[0]), jax.nn.softmax(logs) @ x
    moved = smc(tempering(guide=prior), 500).run(KEY, target, progress=False)
    assert bool((moved.choices["x"] > 0).all())
    # On a schedule, by a kernel that does not look at the particles, nothing is biased.
    steps = tempering(guide=prior, schedule=jnp.array([0.2, 0.5, 1.0]))
    fixed = smc(steps, 200, rejuvenate=kernels.random_walk(0.5))
    runs = replicates(fixed, target, 100)
    ratio = jnp.exp(runs.log_evidence - exact)
    near(ratio, 1.0)
    near(ratio * means(runs, runs.choices["x"]), mean)


def test_what_comes_out() -> None:
    target = rich(X).given(DATA)
    found, other = (
        jax.eval_shape(lambda k, a=a: a.run(k, target, progress=False).choices, KEY)
        for a in (smc(tempering(), 20), importance(num_particles=20))
    )
    assert found == other


# --- choices summed out -----------------------------------------------------------------------------------------------


@gen
def shares(n: int) -> None:
    w = sample("w", dist.Beta(2.0, 3.0))

    def row() -> None:
        z = sample("z", dist.Bernoulli(w))
        sample("y", dist.Normal(3.0 * z - 1.0, 0.7))

    repeat(row, n, axis_name="row")


@gen
def groups(n: int) -> None:
    """The mean of all groups is shared by all data."""
    tau = sample("tau", dist.HalfNormal(2.0))
    mean = sample("mean", dist.Normal(0.0, 3.0))

    def group() -> None:
        theta = sample("theta", dist.Normal(mean, tau))
        repeat(lambda: sample("y", dist.Normal(theta, 0.5)), n, axis_name="row")

    repeat(group, 3)


MOTION = [[0.9, 0.1], [0.3, 0.7]]


@gen
def regimes(n: int) -> None:
    m = sample("m", dist.Normal(0.0, 1.0))

    def step(z: Any, _: Any) -> Any:
        z = sample("z", dist.Categorical(jnp.array(MOTION)[z]))
        sample("y", dist.Normal(m + 2.0 * z, 0.5))
        return z, None

    jax.lax.scan(step, 0, None, length=n)


@gen
def downstream() -> None:
    """The prior of what is left is a mixture itself; it is observed twice, and a factor counts as an observation."""
    z = sample("z", dist.Bernoulli(0.3))
    x = sample("x", dist.Normal(2.0 * z, 0.5))
    sample("y", dist.Normal(x + z, 0.5))
    factor("f", -0.5 * (x - 1.0) ** 2)


ROWS = np.array([2.1, -0.8, 1.9, -1.1])
TABLE = np.array([[1.2, 0.8], [-2.0, -1.5], [3.0, 2.5]])
THERE = np.array([[True, True], [True, False], [True, True]])


def joint_shares(w: float, n: int) -> float:
    each = w * stats.norm.pdf(ROWS[:n], 2.0, 0.7) + (1 - w) * stats.norm.pdf(ROWS[:n], -1.0, 0.7)
    return stats.beta.logpdf(w, 2, 3) + np.log(each).sum()


def joint_groups(tau: float, n: int) -> float:
    seen = np.argwhere(THERE[:, :n])
    group = seen[:, :1] == seen[:, 0]
    cov = 9.0 + tau**2 * group + 0.25 * np.eye(len(seen))
    y = TABLE[tuple(seen.T)]
    return stats.halfnorm.logpdf(tau, scale=2.0) + (
        stats.multivariate_normal.logpdf(y, np.zeros(len(y)), cov) if len(y) else 0.0
    )


def joint_regimes(m: float, n: int) -> float:
    alpha = np.array([1.0, 0.0])
    for y in ROWS[:n]:
        alpha = alpha @ np.array(MOTION) * stats.norm.pdf(y, m + np.array([0.0, 2.0]), 0.5)
    return stats.norm.logpdf(m) + np.log(alpha.sum())


def joint_downstream(x: float, n: int) -> float:
    z = np.arange(2.0)
    terms = stats.bernoulli.logpmf([0, 1], 0.3) + stats.norm.logpdf(x, 2 * z, 0.5)
    if n:
        terms = terms + stats.norm.logpdf(1.7, x + z, 0.5) - 0.5 * (x - 1.0) ** 2
    return np.logaddexp.reduce(terms)


def summed(name: str) -> Any:
    """A target; the log density by hand of a value and of the first `n` rows; the number of rows, bounds, a value."""
    part = observed(TABLE, where=THERE, missing="drop")
    return {
        "w": (marginalize(shares, "z")(4).given({"y": ROWS}), joint_shares, 4, (0, 1), 0.3),
        "tau": (
            marginalize(groups, "mean", "theta")(2).given({"y": part}),
            joint_groups,
            2,
            (0, 20),
            0.7,
        ),
        "m": (marginalize(regimes, "z")(4).given({"y": ROWS}), joint_regimes, 4, (-9, 9), 0.4),
        "x": (marginalize(downstream, "z")().given({"y": 1.7}), joint_downstream, 1, (-5, 7), 0.2),
    }[name]


def evidence_of(name: str) -> float:
    _, joint, n, bounds, _ = summed(name)
    return float(np.log(integrate.quad(lambda v: np.exp(joint(v, n)), *bounds, limit=200)[0]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["w", "tau", "m", "x"])
def test_the_laws_on_the_way_of_what_is_left(name: str) -> None:
    """The marginal prior times a power of the marginal likelihood; or times that of the first rows."""
    target, joint, n, _, value = summed(name)
    target, choices = target.staged(), {name: jnp.asarray(value)}
    whole, prior = joint(value, n), joint(value, 0)
    path = MarginalLikelihood(target)
    np.testing.assert_allclose(path.terms(choices), [whole - prior], rtol=1e-10)
    space = target.unconstrain()
    jacobian = space.log_density(space.from_choices(choices)) - target.log_density(choices)
    for b in (0.0, 0.3, 1.0):
        law, exact = path.at(jnp.asarray(b)), (1 - b) * prior + b * whole
        np.testing.assert_allclose(law.log_density(choices), exact, rtol=1e-10)
        space = law.unconstrain()
        found = space.log_density(space.from_choices(choices))
        np.testing.assert_allclose(found - jacobian, exact, rtol=1e-10)
    if name in ("w", "tau"):
        path = MarginalLikelihood(target, "row")
        rows = [joint(value, k) for k in range(n + 1)]
        if name == "w":  # impossible before any row, and then too
            nowhere = {"w": jnp.asarray(-0.1)}
            np.testing.assert_array_equal(path.terms(nowhere), -np.inf)
        np.testing.assert_allclose(path.terms(choices), np.diff(rows), rtol=1e-9)
        for k in range(n + 1):
            found = path.at(jnp.asarray(k)).log_density(choices)
            np.testing.assert_allclose(found, rows[k], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_a_prior_that_branches_under_a_name() -> None:
    """Summed-out steps in a nested program beside branches, a scan of kept choices, and a site observed in part."""

    @gen
    def inner() -> None:
        def step(z: Any, _: Any) -> Any:
            z = sample("z", dist.Categorical(jnp.array(MOTION)[z]))
            u = sample("u", dist.Normal(1.0 * z, 1.0))
            sample("y", dist.Normal(u, 0.5))
            return z, None

        jax.lax.scan(step, 0, None, length=3)

    @gen
    def outer() -> None:
        sample("in", inner())
        a = sample("a", dist.Normal(0.0, 1.0))
        branches = [lambda n=n: sample(n, dist.Normal(0.0, 1.0)) for n in ("p", "q")]
        k = jax.lax.cond(a > 0, *branches)
        sample("v", dist.Normal(a + k * jnp.ones(2), 1.0))

    data = {"in.y": ROWS[:3], "v": observed(np.ones(2), where=np.array([True, False]))}
    target = marginalize(outer, "in.z")().given(data).staged()
    path = MarginalLikelihood(target)
    for key in jax.random.split(KEY, 4):  # of both branches
        choices = path.draw(key)
        u = np.asarray(choices["in"]["u"])
        k = choices["p"] if choices["a"] > 0 else choices["q"]
        # Given u, the observations do not depend on z.
        likelihood = stats.norm.logpdf(ROWS[:3], u, 0.5).sum()
        likelihood += stats.norm.logpdf(1.0, choices["a"] + k)
        np.testing.assert_allclose(path.terms(choices)[0], likelihood, rtol=1e-10)
        for b in (0.0, 0.4, 1.0):
            found = path.at(jnp.asarray(b)).log_density(choices)
            exact = target.log_density(choices) - (1 - b) * likelihood
            np.testing.assert_allclose(found, exact, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["tau", "x"])
def test_the_evidence_of_what_is_left_is_unbiased(name: str) -> None:
    steps = tempering(schedule=jnp.array([0.1, 0.4, 1.0]), num_moves=1)
    algorithm = smc(steps, 50, rejuvenate=WALK, threshold=1.0)
    runs = replicates(algorithm, summed(name)[0], 400)
    near(ratios(runs, evidence_of(name)), 1.0)
    assert np.asarray(runs.path.info["acceptance_rate"]).max() > 0.1


def test_rows_whose_choices_are_summed_out() -> None:
    algorithm = smc(tempering(by="row", rows_per_step=2, num_moves=1), 50, rejuvenate=WALK)
    runs = replicates(algorithm, summed("w")[0], 400)
    increments = np.asarray(runs.path.log_increments, float)
    exact = [integrate.quad(lambda w, n=n: np.exp(joint_shares(w, n)), 0, 1)[0] for n in (2, 4)]
    near(np.exp(increments[:, 1]), exact[0])
    near(np.exp(increments[:, 1:3].sum(1)), exact[1])


def test_what_is_left_under_vmap_with_moves_fitted_to_particles() -> None:
    """Temperatures and moves look at the particles; the data are those of several targets."""
    data = np.stack([ROWS, ROWS[::-1] + 0.4])

    @jax.jit
    @jax.vmap
    def runs(keys: Any, y: Any) -> Any:
        target = marginalize(regimes, "z")(4).given({"y": y})
        run = smc(tempering(), 200).run
        return jax.vmap(lambda k: run(k, target, progress=False).log_evidence)(keys)

    found = np.asarray(runs(jax.random.split(KEY, (2, 16)), data), float)
    for y, logs in zip(data, found, strict=True):

        def density(m: float, y: Any = y) -> float:
            alpha = np.array([1.0, 0.0])
            for one in y:
                alpha = (
                    alpha @ np.array(MOTION) * stats.norm.pdf(one, m + np.array([0.0, 2.0]), 0.5)
                )
            return stats.norm.pdf(m) * alpha.sum()

        ratio = np.exp(logs) / integrate.quad(density, -9, 9)[0]
        near(ratio, 1.0, ratio.var())


def test_discrete_choices_are_left() -> None:
    @gen
    def noisy() -> None:
        u = sample("u", dist.Normal(0.0, 1.0))
        z = sample("z", dist.Bernoulli(jnp.array([0.2, 0.4, 0.7])))
        sample("y", dist.Normal(u + z @ jnp.array([1.0, 2.0, 3.0]), 0.7))

    target = marginalize(noisy, "u")().given({"y": 3.4})
    schedule = jnp.array([0.2, 0.5, 1.0])
    algorithm = smc(
        tempering(schedule=schedule, num_moves=1),
        40,
        rejuvenate=kernels.gibbs("z"),
        threshold=1.0,
    )
    runs = replicates(algorithm, target, 400)
    z = np.stack(np.meshgrid(*[[0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    prior = np.prod(np.where(z, [0.2, 0.4, 0.7], [0.8, 0.6, 0.3]), 1)
    exact = prior @ stats.norm.pdf(3.4, z @ [1.0, 2.0, 3.0], np.sqrt(1.49))
    near(ratios(runs, float(np.log(exact))), 1.0)


def test_a_guide_with_a_choice_summed_out() -> None:
    @gen
    def guide() -> None:
        k = sample("k", dist.Bernoulli(0.4))
        sample("w", dist.Beta(2.0 + k, 3.0))

    settings = tempering(guide=marginalize(guide, "k")(), schedule=jnp.array([0.4, 1.0]))
    runs = replicates(smc(settings, 50, rejuvenate=WALK), summed("w")[0], 400)
    near(ratios(runs, evidence_of("w")), 1.0)


# --- errors -----------------------------------------------------------------------------------------------------------


@gen
def flat() -> None:
    mu = sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    sample("y", dist.Normal(mu, 1.0))


@gen
def coin() -> None:
    p = sample("p", dist.Beta(2.0, 2.0))
    sample("y", dist.Normal(sample("z", dist.Bernoulli(p * jnp.ones(2))), 1.0))


@gen
def pair() -> None:
    sample("y", dist.Normal(sample("x", dist.Normal(jnp.zeros(2), 1.0))[0], 1.0))


@gen
def two() -> None:
    sample("x", dist.Normal(sample("z", dist.Bernoulli(0.5)) * jnp.ones(2), 1.0))


def test_errors() -> None:
    for settings, match in (
        ({"schedule": jnp.array([0.5, 0.2, 1.0])}, "increases at every step"),
        ({"schedule": jnp.array([0.5, 0.9])}, "to 1 exactly"),
        ({"schedule": jnp.array([-0.5, 1.0])}, "from 0 or more"),
        ({"schedule": 1.0}, "one temperature for each step"),
        ({"ess": 1.5}, "ess is a share"),
        ({"max_steps": 0}, "max_steps"),
        ({"by": "row", "guide": elsewhere()}, "leave out schedule and guide"),
        ({"rows_per_step": 2}, "goes with by="),
    ):
        with pytest.raises(WeftError, match=match):
            tempering(**settings)

    def refuse(target: Any, match: str, kind: Any = DensityError, **settings: Any) -> None:
        with pytest.raises(kind, match=match):
            smc(tempering(**settings), 10).run(KEY, target, progress=False)

    target = level(8).given({"y": Y})
    refuse(target, "those that are named: 'row'", AddressError, by="column")
    refuse(
        target,
        "the guide draws: *'a'",
        AddressError,
        guide=gen(lambda: sample("a", dist.Normal()))(),
    )
    refuse(gen(lambda: sample("a", dist.Normal()))().given(), "no observation and no factor")
    refuse(flat().given({"y": 1.0}), r"tempering\(guide=program\)")
    half = condition(coin, {"z": observed(jnp.ones(2, int), where=np.array([True, False]))})
    refuse(marginalize(half, "z")().given({"y": np.ones(2)}), "'z' of 'coin' are conditioned")
    partly = pair().given({"x": observed(np.ones(2), where=np.array([True, False])), "y": 1.0})
    refuse(partly, "sums out 'z'", guide=marginalize(two, "z")())
    half = condition(level, {"y": observed(Y, where=Y > 1.0)})(8).given()
    refuse(half, "given")
    everything = level(8).given({"y": Y, "mu": 1.0})
    refuse(everything, "no latent choice", WeftError)
