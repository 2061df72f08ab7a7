"""Ready-made guides: exact densities, exact posteriors, the law of their draws, errors.

Densities are compared with ones written by hand on the unconstrained vector. Where a family holds
the posterior, its parameters are set to it, and then every estimate of the bound is the evidence.
Statistical bands are |z| < 5 of the estimator's own standard error, with fixed keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from scipy import stats
from weft.inference import (
    elbo,
    fit,
    flow,
    full_rank,
    importance,
    iwelbo,
    laplace,
    low_rank,
    mean_field,
    renyi,
    structured,
)
from weft.ppl import noncentered
from weft.ppl.stage.addresses import flatten
from weft.ppl.stage.errors import AddressError, DensityError, WeftError

from programs import quick_compilation
from weft import gen, gradients, observed, repeat, sample, with_gradients

pytestmark = pytest.mark.slow  # once is enough: not in every lane

BAND = 5.0
KEY = jax.random.key(0)
GUIDES = {
    "mean_field": mean_field,
    "full_rank": full_rank,
    "low_rank": low_rank,
    "structured": structured,
    "flow": flow,
}
each_guide = pytest.mark.parametrize("name", GUIDES)


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most tests compile programs and run each once; those that fit run theirs for long."""
    if "fitted" in request.node.name or "schools" in request.node.name:
        yield
        return
    with quick_compilation():
        yield


# --- a target with every kind of support ---------------------------------------------------------


@gen
def inner(level: Any) -> Any:
    rate = sample("rate", dist.LogNormal(level, 1.0))  # positive
    sample("share", dist.Dirichlet(jnp.ones(3)))  # a simplex
    return rate


@gen
def model(x: Any) -> None:
    level = sample("level", dist.Normal(0.0, 1.0))
    rate = sample("sub", inner(level))  # addresses "sub.rate", "sub.share"
    jax.vmap(lambda xi: sample("slope", dist.Normal(xi * rate, 1.0)))(x)
    part = sample("part", dist.Uniform(-1.0, 3.0).expand([2]))  # an interval
    sample("y", dist.Normal(level + part.sum(), 1.0))


TARGET = model(jnp.arange(3.0)).given({"y": 2.0})
SIZES = {"level": 1, "sub.rate": 1, "sub.share": 2, "slope": 3, "part": 2}
SIZE = sum(SIZES.values())
POINT = {
    "level": 0.2,
    "sub": {"rate": 0.7, "share": np.array([0.2, 0.3, 0.5])},
    "slope": np.array([0.1, -0.4, 1.0]),
    "part": np.array([0.0, 1.5]),
}


def log_jacobian(z: np.ndarray) -> float:
    """log |dx/dz| at an unconstrained vector, by hand: exp, stick breaking, a scaled sigmoid."""

    def log_sigmoid(t: np.ndarray) -> np.ndarray:
        return -np.logaddexp(0.0, -t)

    total, left = z[1], 0.0  # exp; log of the stick that is left
    for t in z[2:4] - np.log([2.0, 1.0]):
        total += left + log_sigmoid(t) + log_sigmoid(-t)
        left += log_sigmoid(-t)
    t = z[7:9]
    return float(total + np.sum(np.log(4.0) + log_sigmoid(t) + log_sigmoid(-t)))


def moved(params: Any, size: float = 0.3) -> Any:
    """Parameters at random, away from where they begin."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noise = [
        size * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.map(jnp.add, params, jax.tree.unflatten(tree, noise))


def value(params: Any) -> Any:
    """Parameters as an objective sees them."""
    return jax.tree.map(
        lambda p: p.value if hasattr(p, "unconstrained") else p,
        params,
        is_leaf=lambda p: hasattr(p, "unconstrained"),
    )


def stacked(tree: Any) -> np.ndarray:
    """What stands at each address of TARGET, as a vector in the order of the program."""
    return np.concatenate([np.ravel(tree[a]) for a in SIZES])


def joint_normal(name: str, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the unconstrained vector, assembled from the stated formula."""
    params = jax.tree.map(lambda x: np.asarray(x, float), value(params))
    loc = stacked(params["loc"])
    if name == "full_rank":
        return loc, params["scale_tril"] @ params["scale_tril"].T
    d = stacked(params["scale"])
    if name == "mean_field":
        return loc, np.diag(d**2)
    if name == "low_rank":
        return loc, params["factor"] @ params["factor"].T + np.diag(d**2)
    arrows = np.zeros((SIZE, SIZE))  # "slope" reads "sub.rate", which reads "level"
    assert {a: set(w) for a, w in params["weights"].items()} == {
        "sub.rate": {"level"},
        "slope": {"sub.rate"},
    }
    arrows[1, 0] = params["weights"]["sub.rate"]["level"].item()
    arrows[4:7, 1] = params["weights"]["slope"]["sub.rate"].ravel()
    root = np.linalg.inv(np.eye(SIZE) - arrows) * d
    return loc, root @ root.T


@pytest.mark.parametrize("name", [n for n in GUIDES if n != "flow"])
def test_density_and_draws_are_those_of_the_stated_normal_pushed_forward(
    name: str, x64: None
) -> None:
    target = model(jnp.arange(3.0)).given({"y": 2.0})
    guide, params = GUIDES[name](target, init=POINT, scale=0.5)
    params = value(moved(params))
    mean, covariance = joint_normal(name, params)
    space, n = target.unconstrain().flat, 20_000
    assert {a: s.stop - s.start for a, s in space.addresses.items()} == SIZES

    @jax.jit
    def run(keys: Any, params: Any) -> Any:
        traces = jax.vmap(lambda k: guide(params).simulate(k))(keys)
        return jax.vmap(space.from_choices)(traces.choices), traces.log_density

    z, log_density = map(np.asarray, run(jax.random.split(KEY, n), params))
    normal = stats.multivariate_normal(mean, covariance)
    for i in range(5):
        expected = normal.logpdf(z[i]) - log_jacobian(z[i])
        np.testing.assert_allclose(log_density[i], expected, rtol=1e-8, atol=1e-8)
        found = guide(params).log_density(space.to_choices(z[i]))
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
    sd = np.sqrt(np.diagonal(covariance))
    assert np.all(np.abs(z.mean(0) - mean) < BAND * sd / np.sqrt(n))
    # The variance of a product of two centred normals is s_ii s_jj + s_ij^2.
    error = np.sqrt((np.outer(sd**2, sd**2) + covariance**2) / n)
    assert np.all(np.abs(np.cov(z.T) - covariance) < BAND * error)


@each_guide
def test_sites_are_the_target_s_latent_choices(name: str) -> None:
    guide, params = GUIDES[name](TARGET, init=POINT, scale=0.5)
    program = guide(params, jnp.zeros(3))  # the rows of a minibatch are not used
    shapes = {a: (s.shape, s.dtype) for a, s in flatten(TARGET.latent_shapes()).items()}
    assert {a: (s.shape, s.dtype) for a, s in program.sites.items()} == shapes
    assert all(program.sites[a].dims == TARGET.sites[a].dims for a in shapes)
    assert all(program.sites[a].support == TARGET.sites[a].support for a in shapes)


# --- the flow ------------------------------------------------------------------------------------


@gen
def pair() -> None:
    a = sample("a", dist.Normal(0.0, 1.0))
    sample("b", dist.LogNormal(a, 1.0))


@gen
def vector() -> None:
    sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


@pytest.mark.parametrize("two", [pair, vector], ids=["two sites", "one vector"])
def test_a_flow_is_normalised_and_draws_what_it_scores(two: Any, x64: None) -> None:
    """By quadrature on the unconstrained plane: total mass, and the moments of draws."""
    target = two().given()
    guide, params = flow(target, scale=0.7, num_hidden=8, num_bins=4)
    params = moved(params, 0.3)
    space, n = target.unconstrain().flat, 20_000

    @jax.jit
    def run(keys: Any, params: Any) -> Any:
        traces = jax.vmap(lambda k: guide(params).simulate(k))(keys)
        return jax.vmap(space.from_choices)(traces.choices)

    @jax.jit
    @jax.vmap
    def density(z: Any) -> Any:
        jacobian = z[1] if two is pair else 0.0  # where b = exp(z_b)
        return jnp.exp(guide(params).log_density(space.to_choices(z)) + jacobian)

    z = np.asarray(run(jax.random.split(KEY, n), params))
    sides = [
        np.linspace(low, high, 601) for low, high in zip(z.min(0) - 3, z.max(0) + 3, strict=True)
    ]
    cell = np.prod([s[1] - s[0] for s in sides])
    points = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2)
    q = np.asarray(density(points)) * cell
    # The density has kinks where bins meet, so that the rule errs by the square of its step, h < .05.
    # What lies outside of all of 20,000 draws, and three further, is less than 1e-4.
    assert abs(q.sum() - 1.0) < 3e-3
    for f in (np.asarray, np.square, lambda z: z[:, :1] * z[:, 1:], lambda z: z**2 * z[:, ::-1]):
        drawn, exact = f(z), q @ f(points)
        error = drawn.std(0) / np.sqrt(n)
        assert np.all(np.abs(drawn.mean(0) - exact) < BAND * error + 3e-3 * np.abs(exact))


def test_a_flow_begins_as_independent_normals() -> None:
    found = []
    for make in (flow, mean_field):
        guide, params = make(TARGET, init=POINT, scale=0.5)
        found.append(guide(params).log_density({**POINT, "level": 1.0}))
    np.testing.assert_allclose(*found, rtol=1e-5)


# --- exact posteriors ----------------------------------------------------------------------------

DESIGN = np.array([[1.0, 0.5, -0.3], [1.0, -1.2, 0.4], [1.0, 0.1, 1.5], [1.0, 2.0, 0.7]])
RESPONSE = np.array([0.7, -1.1, 2.0, 2.4])
NOISE = 0.6


@gen
def regression() -> None:
    first = sample("first", dist.Normal(0.0, 1.0))
    rest = sample("rest", dist.Normal(0.0, 1.0).expand([2]))
    weights = jnp.concatenate([first[None], rest])
    sample("y", dist.Normal(jnp.asarray(DESIGN) @ weights, NOISE))


REGRESSION = regression().given({"y": RESPONSE})
PRECISION = np.eye(3) + DESIGN.T @ DESIGN / NOISE**2
COVARIANCE = np.linalg.inv(PRECISION)
MEAN = COVARIANCE @ DESIGN.T @ RESPONSE / NOISE**2
EVIDENCE = stats.multivariate_normal(np.zeros(4), DESIGN @ DESIGN.T + NOISE**2 * np.eye(4)).logpdf(
    RESPONSE
)


def divergence(mean: np.ndarray, covariance: np.ndarray) -> float:
    """KL from a normal to the posterior of the regression: the gap of its bound."""
    off = mean - MEAN
    logs = np.linalg.slogdet(COVARIANCE)[1] - np.linalg.slogdet(covariance)[1]
    return float(np.trace(PRECISION @ covariance) + off @ PRECISION @ off - 3 + logs) / 2


def loc_of(params: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in params["loc"].values()])


def posterior() -> dict[str, Any]:
    return {
        "loc": {"first": jnp.asarray(MEAN[0]), "rest": jnp.asarray(MEAN[1:])},
        "scale_tril": jnp.asarray(np.linalg.cholesky(COVARIANCE)),
    }


@pytest.mark.parametrize(
    "objective",
    [
        lambda t, g: elbo(t, g, sticking_the_landing=True),
        lambda t, g: iwelbo(t, g, num_particles=4),
        lambda t, g: iwelbo(t, g, num_particles=4, dreg=True),
        lambda t, g: renyi(t, g, num_particles=4, alpha=0.5),
    ],
    ids=["elbo", "iwelbo", "dreg", "renyi"],
)
def test_at_the_posterior_every_bound_is_the_evidence(objective: Any) -> None:
    guide, _ = full_rank(REGRESSION)
    bound = jax.jit(jax.vmap(objective(REGRESSION, guide), (0, None)))
    # Rounding: some twenty terms of order one to ten in single precision.
    np.testing.assert_allclose(bound(jax.random.split(KEY, 8), posterior()), EVIDENCE, rtol=1e-4)


def test_sticking_the_landing_has_no_noise_at_the_posterior() -> None:
    guide, _ = full_rank(REGRESSION)
    for still, noisy in ((True, False), (False, True)):
        bound = elbo(REGRESSION, guide, sticking_the_landing=still)
        slopes = jax.jit(jax.vmap(jax.grad(bound, argnums=1), (0, None)))(
            jax.random.split(KEY, 16), posterior()
        )
        largest = max(float(jnp.abs(s).max()) for s in jax.tree.leaves(slopes))
        assert (largest > 1e-2) == noisy


def test_full_rank_is_fitted_to_the_posterior() -> None:
    guide, params = full_rank(REGRESSION)
    objective = elbo(REGRESSION, guide, num_samples=8, sticking_the_landing=True)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 1000))
    found = fit(KEY, objective, params, optimizer, 1000, progress=False)
    tril = np.asarray(found.params["scale_tril"], float)
    # At the optimum the gradient is free of noise, so what is left is the optimiser's: a divergence
    # of 1e-4 nats is a mean within sqrt(2e-4) = .014 posterior standard deviations.
    assert divergence(loc_of(found.params), tril @ tril.T) < 1e-4
    # The bound's estimates have a variance of twice the divergence, up to higher order.
    np.testing.assert_allclose(found.bounds[-1], EVIDENCE, atol=BAND * np.sqrt(2e-4 / 8))
    weighted = importance(found.guide, num_particles=500).run(KEY, REGRESSION, progress=False)
    np.testing.assert_allclose(weighted.log_evidence, EVIDENCE, atol=BAND * np.sqrt(2e-4 / 500))


def test_mean_field_is_fitted_to_its_known_optimum() -> None:
    """Independent normals of the posterior's mean, and of the variances 1 / diag(precision)."""
    guide, params = mean_field(REGRESSION)
    objective = elbo(REGRESSION, guide, num_samples=16)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 1500))
    found = fit(KEY, objective, params, optimizer, 1500, progress=False)
    scale = np.concatenate([np.ravel(x) for x in found.params["scale"].values()])
    best = divergence(MEAN, np.diag(1 / np.diagonal(PRECISION)))
    # The step size goes to zero, so that the noise of the gradients is averaged out: 2e-3 nats are
    # .06 standard deviations, a twentieth of the gap to the posterior.
    assert best > 0.04
    assert best <= divergence(loc_of(found.params), np.diag(scale.astype(float) ** 2)) < best + 2e-3


def test_low_rank_holds_a_posterior_of_low_rank() -> None:
    """Any covariance of three elements is a multiple of the identity and three factors."""
    guide, params = low_rank(REGRESSION, rank=3)
    floor = np.linalg.eigvalsh(COVARIANCE)[0] / 2
    values, vectors = np.linalg.eigh(COVARIANCE - floor * np.eye(3))
    exact = {
        "loc": posterior()["loc"],
        "scale": jax.tree.map(lambda x: jnp.full(jnp.shape(x), floor**0.5), posterior()["loc"]),
        "factor": jnp.asarray(vectors * np.sqrt(values)),
    }
    assert exact["factor"].shape == params["factor"].shape
    bound = jax.jit(jax.vmap(elbo(REGRESSION, guide), (0, None)))
    np.testing.assert_allclose(bound(jax.random.split(KEY, 8), exact), EVIDENCE, rtol=1e-3)


def test_structured_holds_the_posterior_of_a_tree() -> None:
    """mu -> theta_i -> y_i: given the data theta_i reads mu, with weights of its own."""
    noise, y = np.array([0.5, 1.0, 2.0]), np.array([1.0, -0.5, 3.0])

    @gen
    def tree() -> None:
        mu = sample("mu", dist.Normal(0.0, 2.0))

        def leaf(s: Any) -> None:
            sample("y", dist.Normal(sample("theta", dist.Normal(mu, 1.0)), s))

        jax.vmap(leaf)(jnp.asarray(noise))

    target = tree().given({"y": y})
    guide, params = structured(target)
    assert params["weights"]["theta"]["mu"].shape == (1, 3, 1)
    # theta_i | mu, y_i is normal of precision 1 + 1/s^2; y_i | mu of variance 1 + s^2.
    seen = 1 / (1 + noise**2)
    variance = 1 / (1 / 4 + seen.sum())
    mu = variance * (seen * y).sum()
    weight = noise**2 * seen  # of mu; the rest is y's
    exact = {
        "loc": {"mu": jnp.asarray(mu), "theta": jnp.asarray(weight * mu + (1 - weight) * y)},
        "scale": {"mu": jnp.asarray(variance**0.5), "theta": jnp.asarray(weight**0.5)},
        "weights": {"theta": {"mu": jnp.asarray(weight).reshape(1, 3, 1)}},
    }
    evidence = stats.multivariate_normal(np.zeros(3), 4 + np.diag(1 + noise**2)).logpdf(y)
    bound = jax.jit(jax.vmap(elbo(target, guide), (0, None)))
    np.testing.assert_allclose(bound(jax.random.split(KEY, 8), exact), evidence, rtol=1e-4)


@gen
def walks() -> None:
    """Two random walks of four steps, side by side, that set out from one place."""
    start = sample("start", dist.Normal(0.0, 1.0))

    def walk(drift: Any) -> None:
        def step(x: Any, _: Any) -> Any:
            x = sample("x", dist.Normal(x + drift, 1.0))
            sample("y", dist.Normal(x, 0.7))
            return x, None

        jax.lax.scan(step, start, None, length=4)

    jax.vmap(walk)(jnp.array([0.5, -1.0]))


def test_structured_holds_the_posterior_of_a_state_space_model() -> None:
    y = np.array([[0.3, 1.0, 0.2, 2.0], [-1.0, -1.5, -3.5, -3.0]])
    target = walks().given({"y": y})
    guide, params = structured(target)
    shapes = {b: w.shape for b, w in params["weights"]["x"].items()}
    assert shapes == {"start": (1, 8, 1), "x": (3, 2, 1, 1)}
    # The joint normal of (start, x) and y by hand.
    arrows, drift = np.zeros((9, 9)), np.zeros(9)
    for series in range(2):
        for t in range(4):
            i = 1 + 4 * series + t
            arrows[i, i - 1 if t else 0] = 1.0
            drift[i] = (0.5, -1.0)[series]
    root = np.linalg.inv(np.eye(9) - arrows)
    prior_mean, prior = root @ drift, root @ root.T
    seen = np.eye(9)[1:]
    marginal = seen @ prior @ seen.T + 0.49 * np.eye(8)
    gain = prior @ seen.T @ np.linalg.inv(marginal)
    mean = prior_mean + gain @ (y.ravel() - prior_mean[1:])
    cov = prior - gain @ seen @ prior
    # Each x given what it reads: its predecessor, and for the first the start.
    weights = {"start": np.zeros((1, 8, 1)), "x": np.zeros((3, 2, 1, 1))}
    scale = np.zeros(9)
    scale[0] = np.sqrt(cov[0, 0])
    for series in range(2):
        for t in range(4):
            i = 1 + 4 * series + t
            j = i - 1 if t else 0
            w = cov[i, j] / cov[j, j]
            scale[i] = np.sqrt(cov[i, i] - w * cov[i, j])
            if t:
                weights["x"][t - 1, series, 0, 0] = w
            else:
                weights["start"][0, 4 * series, 0] = w
    # A chain carries residuals on, so that what the first step reads must not be read again.
    for series in range(2):
        for t in range(1, 4):
            i = 4 * series + t
            weights["start"][0, i, 0] = (
                weights["x"][t - 1, series, 0, 0] * weights["start"][0, i - 1, 0]
            )
    exact = {
        "loc": {"start": jnp.asarray(mean[0]), "x": jnp.asarray(mean[1:].reshape(2, 4))},
        "scale": {"start": jnp.asarray(scale[0]), "x": jnp.asarray(scale[1:].reshape(2, 4))},
        "weights": {"x": jax.tree.map(jnp.asarray, weights)},
    }
    evidence = stats.multivariate_normal(prior_mean[1:], marginal).logpdf(y.ravel())
    bound = jax.jit(jax.vmap(elbo(target, guide), (0, None)))
    np.testing.assert_allclose(bound(jax.random.split(KEY, 8), exact), evidence, rtol=1e-4)


def test_structured_pairs_the_lanes_that_two_sites_share() -> None:
    @gen
    def rows() -> None:
        def row() -> None:
            a = sample("a", dist.Normal(0.0, 1.0))
            sample("b", dist.Normal(a, 1.0).expand([2]).to_event(1))

        repeat(row, 5)

    _, params = structured(rows().given())
    assert params["weights"]["b"]["a"].shape == (5, 2, 1)


# --- Laplace -------------------------------------------------------------------------------------


def test_laplace_is_exact_where_the_posterior_is_normal() -> None:
    guide, params = laplace(REGRESSION)
    tril = np.asarray(params["scale_tril"].value, float)
    np.testing.assert_allclose(loc_of(params), MEAN, atol=1e-4)
    np.testing.assert_allclose(tril @ tril.T, COVARIANCE, atol=1e-4)
    bound = jax.vmap(elbo(REGRESSION, guide), (0, None))(jax.random.split(KEY, 4), value(params))
    np.testing.assert_allclose(bound, EVIDENCE, rtol=1e-4)


def test_laplace_is_at_the_mode_of_the_unconstrained_density() -> None:
    """A Gamma(6, 2) posterior: the log has its mode at log(6 / 2), and a curvature of 6 there."""

    @gen
    def counts() -> None:
        sample("count", dist.Poisson(sample("rate", dist.Gamma(2.0, 1.0))))

    _, params = laplace(counts().given({"count": 4}))
    np.testing.assert_allclose(params["loc"]["rate"], np.log(3.0), atol=1e-4)
    np.testing.assert_allclose(params["scale_tril"].value, [[6**-0.5]], rtol=1e-4)


def test_laplace_names_what_is_not_determined() -> None:
    @gen
    def twins() -> None:
        flat = dist.ImproperUniform(dist.constraints.real, (), ())
        a, b = sample("a", flat), sample("b", flat)
        c = sample("c", dist.Normal(0.0, 1.0))
        sample("y", dist.Normal(a + b + c, 1.0))

    with pytest.raises(DensityError, match="along 'a', 'b', so there is no normal approximation"):
        laplace(twins().given({"y": 1.0}))


def test_laplace_refuses_a_density_that_rises_without_end() -> None:
    @gen
    def centred() -> None:
        tau = sample("tau", dist.HalfCauchy(5.0))
        repeat(lambda: sample("theta", dist.Normal(0.0, tau)), 8)

    with pytest.raises(DensityError, match="'tau'.*noncentered|finite"):
        laplace(centred().given())


# --- a posterior that is no normal ---------------------------------------------------------------


@gen
def schools(sigma: Any) -> None:
    mu = sample("mu", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(5.0))

    def school(s: Any) -> None:
        sample("y", dist.Normal(sample("theta", dist.Normal(mu, tau)), s))

    jax.vmap(school)(sigma)


@pytest.mark.slow
def test_weights_of_full_rank_can_be_trusted_on_eight_schools() -> None:
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    target = noncentered(schools, "theta")(sigma).given({"y": y})
    guide, params = full_rank(target)
    objective = elbo(target, guide, num_samples=8, sticking_the_landing=True)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 3000))
    found = fit(KEY, objective, params, optimizer, 3000, progress=False)
    weighted = importance(found.guide, num_particles=4000).run(KEY, target, progress=False)
    assert weighted.khat() < 0.7


# --- supports that depend on other choices, discrete choices, sites in part and in branches ------


@gen
def nested_bounds(low: Any) -> None:
    top = sample("top", dist.HalfNormal(2.0))
    jax.vmap(lambda b: sample("u", dist.Uniform(b, b + top)))(low)


@each_guide
def test_a_support_may_depend_on_choices_before_it(name: str) -> None:
    low = jnp.array([-1.0, 0.5])
    guide, params = GUIDES[name](nested_bounds(low).given(), init={"top": 1.5}, scale=0.4)
    program = guide(params)
    u = program.simulate(KEY).choices
    assert np.all((low < u["u"]) & (u["u"] < low + u["top"]))
    if name != "mean_field":
        return
    loc = np.asarray(params["loc"]["u"], float)
    top, at = 1.2, np.array([-0.4, 1.3])
    unit = (at - np.asarray(low)) / top  # z = logit(unit)
    z = np.log(unit / (1 - unit))
    expected = stats.norm(loc, 0.4).logpdf(z) - np.log(top * unit * (1 - unit))
    expected = expected.sum() + stats.norm(np.log(1.5), 0.4).logpdf(np.log(top)) - np.log(top)
    found = program.log_density({"top": top, "u": at})
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_support_that_a_later_choice_decides_is_refused() -> None:
    @gen
    def ladder() -> None:
        def step(x: Any, _: Any) -> Any:
            return sample("x", dist.Uniform(x, x + 1.0)), None

        jax.lax.scan(step, jnp.zeros(()), None, length=3)

    with pytest.raises(DensityError, match="the support of site 'x' .Uniform. .*depends on 'x'"):
        mean_field(ladder().given())


@gen
def mixture() -> None:
    z = sample("z", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
    x = sample("x", dist.Normal(jnp.array([-2.0, 0.0, 2.0])[z], 1.0))
    sample("y", dist.Normal(x, 0.5))


def test_mean_field_holds_discrete_choices() -> None:
    target = mixture().given({"y": 1.0})
    guide, params = mean_field(target)
    logits = np.array([0.3, -0.2, 0.9])
    params = {**params, "logits": {"z": jnp.asarray(logits)}}
    found = guide(params).log_density({"z": 2, "x": 0.7})
    loc = float(params["loc"]["x"])
    expected = np.log(np.exp(logits) / np.exp(logits).sum())[2] + stats.norm(loc, 0.1).logpdf(0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("strategy", [None, gradients.enum], ids=["score", "enum"])
def test_gradients_of_discrete_choices_are_unbiased(strategy: Any) -> None:
    """The bound of a discrete target and guide in closed form: E log p - log q over three values."""

    @gen
    def only() -> None:
        z = sample("z", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
        sample("y", dist.Normal(jnp.array([-2.0, 0.0, 2.0])[z], 1.0))

    target = only().given({"y": 1.0})
    guide, params = mean_field(target)
    assert params.keys() == {"loc", "scale", "logits"}
    if strategy is not None:
        guide = with_gradients(guide, {"z": strategy})
    params = {**params, "logits": {"z": jnp.array([0.3, -0.2, 0.9])}}
    log_p = jnp.log(jnp.array([0.2, 0.5, 0.3])) + stats.norm([-2.0, 0.0, 2.0], 1.0).logpdf(1.0)

    def exact(logits: Any) -> Any:
        return jnp.sum(jax.nn.softmax(logits) * (log_p - jax.nn.log_softmax(logits)))

    n = 4000
    slopes = jax.jit(jax.vmap(jax.grad(elbo(target, guide), argnums=1), (0, None)))(
        jax.random.split(KEY, n), params
    )["logits"]["z"]
    error = slopes.std(0) / np.sqrt(n) + 1e-5
    expected = jax.grad(exact)(params["logits"]["z"])
    assert np.all(np.abs(slopes.mean(0) - expected) < BAND * error)


@pytest.mark.parametrize("name", [n for n in GUIDES if n != "mean_field"])
def test_discrete_choices_are_refused_elsewhere(name: str) -> None:
    with pytest.raises(DensityError, match=r"site 'z' .*marginalize\(model, 'z'\)"):
        GUIDES[name](mixture().given({"y": 1.0}))


@pytest.mark.parametrize("name", ["mean_field", "full_rank", "low_rank", "flow"])
def test_a_site_observed_in_part_is_drawn_whole_and_counts_in_part(name: str) -> None:
    """x_i ~ N(0, 1), two of four given: the guide at N(0, 1) is the posterior of the others."""

    @gen
    def four() -> None:
        repeat(lambda: sample("x", dist.Normal(0.0, 1.0)), 4)

    mask = np.array([True, False, False, True])
    target = four().given({"x": observed(np.array([1.0, 0.0, 0.0, 2.0]), where=mask)})
    guide, params = GUIDES[name](target, init={"x": jnp.zeros(4)}, scale=1.0)
    assert params["loc"]["x"].shape == (2,)
    if name == "low_rank":
        params = {**params, "factor": jnp.zeros_like(params["factor"])}
    bound = jax.jit(jax.vmap(elbo(target, guide), (0, None)))(
        jax.random.split(KEY, 8), value(params)
    )
    np.testing.assert_allclose(bound, stats.norm.logpdf([1.0, 2.0]).sum(), rtol=1e-4)


def test_joint_guides_are_unbiased_with_choices_in_branches() -> None:
    """The evidence, with correlated choices of which one is idle at a time, by quadrature over s."""

    @gen
    def branching() -> None:
        s = sample("s", dist.Normal(0.0, 1.0))
        level = jax.lax.cond(
            s > 0,
            lambda: sample("a", dist.Normal(1.0, 1.0)),
            lambda: sample("b", dist.Normal(-1.0, 1.0)),
        )
        sample("y", dist.Normal(level, 1.0))

    target = branching().given({"y": 0.5})
    guide, params = full_rank(target, init={"s": 0.0, "a": 1.0, "b": -1.0}, scale=1.5)
    tril = jnp.array([[1.3, 0.0, 0.0], [0.3, 1.4, 0.0], [-0.4, 0.2, 1.4]])
    program = guide({**params, "scale_tril": tril})
    weighted = importance(program, num_particles=20_000).run(KEY, target, progress=False)
    weights = np.exp(np.asarray(weighted.log_weights, float))
    exact = (stats.norm(1.0, 2**0.5).pdf(0.5) + stats.norm(-1.0, 2**0.5).pdf(0.5)) / 2
    assert abs(weights.mean() - exact) < BAND * weights.std() / np.sqrt(weights.size)


# --- where they begin, and errors ----------------------------------------------------------------


def test_guides_begin_at_given_choices_and_else_at_the_prior_s_median() -> None:
    _, params = mean_field(TARGET, init={"sub": {"rate": 2.5}}, scale=0.3)
    np.testing.assert_allclose(params["loc"]["sub.rate"], np.log(2.5), rtol=1e-5)
    np.testing.assert_allclose(params["scale"]["part"].value, [0.3, 0.3], rtol=1e-5)
    # The median of 101 draws of N(0, 1) has a standard error of 1.25 / sqrt(101).
    assert abs(float(params["loc"]["level"])) < BAND * 1.25 / np.sqrt(101)
    _, again = mean_field(TARGET, key=jax.random.key(9))
    assert float(again["loc"]["level"]) != float(params["loc"]["level"])


def test_guides_are_vmapped_over_their_parameters() -> None:
    guide, params = full_rank(REGRESSION)
    many = jax.tree.map(lambda x: jnp.stack([x, x + 0.5]), value(params))
    choices = {"first": 0.2, "rest": jnp.array([0.1, 0.4])}
    found = jax.jit(jax.vmap(lambda p: guide(p).log_density(choices)))(many)
    for i in range(2):
        alone = guide(jax.tree.map(lambda x, i=i: x[i], many)).log_density(choices)
        np.testing.assert_allclose(found[i], alone, rtol=1e-5)


@pytest.mark.parametrize("make", [*GUIDES.values(), laplace])
def test_errors_say_what_to_do(make: Any, untyped: None) -> None:
    with pytest.raises(
        TypeError, match=r"expected a Target, got Program; condition .*given\(data\)"
    ):
        make(regression())
    with pytest.raises(WeftError, match="no latent choice"):
        make(pair().given({"a": 0.0, "b": 1.0}))
    with pytest.raises(AddressError, match="no address 'rste'.*did you mean 'rest'"):
        make(REGRESSION, init={"rste": jnp.zeros(2)})
    with pytest.raises(WeftError, match=r"'rest'.*\(3,\)"):
        make(REGRESSION, init={"rest": jnp.zeros(3)})


def test_options_that_make_no_guide_are_refused(untyped: None) -> None:
    with pytest.raises(WeftError, match="scale must be a positive number, got -1.0"):
        mean_field(REGRESSION, scale=-1.0)
    with pytest.raises(WeftError, match="rank must be a positive integer, got 0"):
        low_rank(REGRESSION, rank=0)
    with pytest.raises(WeftError, match="num_bins must be an integer, at least 2, got 1"):
        flow(REGRESSION, num_bins=1)
    with pytest.raises(WeftError, match="outside of jit"):
        jax.jit(lambda: laplace(REGRESSION)[1]["loc"])()


def test_discrete_values_that_are_not_counted_from_zero_are_refused() -> None:
    @gen
    def die() -> None:
        sample("y", dist.Normal(sample("face", dist.DiscreteUniform(1, 6)), 1.0))

    with pytest.raises(
        DensityError, match="site 'face' .DiscreteUniform. is discrete, and its values"
    ):
        mean_field(die().given({"y": 3.0}))


def test_structured_refuses_a_site_observed_in_part() -> None:
    @gen
    def two() -> None:
        repeat(lambda: sample("x", dist.Normal(0.0, 1.0)), 2)

    target = two().given({"x": observed(np.zeros(2), where=np.array([True, False]))})
    with pytest.raises(DensityError, match="'x' is observed in part"):
        structured(target)
