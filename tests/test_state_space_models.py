"""Distributions over whole series against exact answers, sequential and parallel in time.

Deterministic tests run in double precision. Their oracles are the recursions of `tests/refcases/ssm`, the joint
Gaussian of a short series, and the sum over all paths of a short chain. Draws are compared with exact laws: |z| < 5.5
by the standard error of the mean of independent draws, for some 400 scalars in all.
"""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp
from weft.models.state_space import HiddenMarkov, LinearGaussian, kalman
from weft.ppl import ModelError, ObservationError

from programs import quick_compilation
from weft import factor, gen, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane
SSM = Path(__file__).parent / "refcases" / "ssm"
NAN, INF = np.nan, np.inf


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True), quick_compilation():
        yield


@pytest.fixture(params=[False, True], ids=["sequential", "parallel"])
def parallel(request):
    return request.param


def close(found, expected, rtol=1e-8, atol=1e-11):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


# --- reference cases ------------------------------------------------------------------------------


def load(name):
    case = json.loads((SSM / f"{name}.json").read_text())
    return {k: np.asarray(v, float) for k, v in case["params"].items()}, case


@pytest.mark.parametrize(
    ("name", "parallel"), [("lgssm_dim1", False), ("lgssm_dim4", False), ("lgssm_dim4", True)]
)
def test_linear_gaussian_reference(name, parallel):
    p, case = load(name)
    d = LinearGaussian(**p, num_steps=case["T"], parallel=parallel)
    y = np.asarray(case["y"])
    filtered, smoothed = d.filter(y), d.smoother(y)
    close(filtered.log_increments, case["log_likelihood_increments"])
    close(d.log_prob(y), case["log_likelihood"])
    close(filtered.means, case["filter_mean"])
    close(filtered.covariances, case["filter_cov"])
    close(filtered.predicted_means, case["predict_mean"])
    close(smoothed.means, case["smoother_mean"])
    close(smoothed.covariances, case["smoother_cov"])
    close(smoothed.lag_one_covariances, case["smoother_lag1_cov"])


@pytest.mark.parametrize("name", ["lgssm_dim1", "lgssm_dim4"])
def test_linear_gaussian_reference_derivatives(name):
    p, case = load(name)

    def log_density(log_scales):
        q, r = jnp.exp(log_scales)
        scaled = {**p, "Q": q * p["Q"], "R": r * p["R"]}
        d = LinearGaussian(**scaled, num_steps=case["T"])
        return d.log_prob(np.asarray(case["y"]))

    gradient = jax.jit(jax.grad(log_density))(np.zeros(2))
    close(gradient, [case["dlogp_dlogscale_Q"], case["dlogp_dlogscale_R"]])


def test_hidden_markov_reference(parallel):
    p, case = load("hmm5")
    emission = dist.Normal(p["mu"], p["sd"])
    d = HiddenMarkov(p["pi"], p["P"], emission, num_steps=case["T"], parallel=parallel)
    y = np.asarray(case["y"])
    filtered, smoothed, best = d.filter(y), d.smoother(y), d.viterbi(y)
    close(filtered.log_increments, case["log_likelihood_increments"])
    close(d.log_prob(y), case["log_likelihood"])
    close(filtered.probs, case["filter_prob"])
    close(smoothed.probs, case["smoother_prob"])
    close(smoothed.transition_counts, case["expected_transition_counts"])
    close(best.log_density, case["viterbi_logp"])
    assert best.states.tolist() == case["viterbi_path"]


# --- linear-Gaussian against the joint Gaussian ---------------------------------------------------

T, N, M = 5, 3, 2


def linear_gaussian_parameters(timed):
    """Of a chain whose noise has rank one and whose first state is partly known."""
    rng = np.random.default_rng(0)
    s, t = ((T - 1,), (T,)) if timed else ((), ())
    g, r = rng.normal(size=(*s, N, 1)), rng.normal(size=(*t, M, M))
    return {
        "m0": rng.normal(size=N),
        "P0": np.diag([1.0, 0.5, 0.0]),
        "A": rng.normal(size=(*s, N, N)) / 2,
        "Q": g @ g.swapaxes(-1, -2),
        "C": rng.normal(size=(*t, M, N)),
        "R": r @ r.swapaxes(-1, -2) + np.eye(M),
        "b": rng.normal(size=(*s, N)),
        "d": rng.normal(size=(*t, M)),
    }


def joint_moments(p, xp=np):
    """Means and covariances of (x_0, ..., x_{T-1}) and of (y_0, ..., y_{T-1}), and their cross-covariance."""

    def over(name, length):
        timed = p[name].ndim == (2 if name in "bd" else 3)
        return p[name] if timed else xp.broadcast_to(p[name], (length, *p[name].shape))

    def blocks(matrices, places):
        return xp.einsum("sij,skl->ikjl", places, matrices).reshape(T * matrices.shape[1], -1)

    same = np.eye(T)[:, :, None] * np.eye(T)[:, None, :]
    after = np.eye(T)[1:, :, None] * np.eye(T)[:-1, None, :]
    total = xp.linalg.inv(np.eye(T * N) - blocks(over("A", T - 1), after))
    mean = total @ xp.concatenate([p["m0"][None], over("b", T - 1)]).reshape(-1)
    noise = blocks(xp.concatenate([p["P0"][None], over("Q", T - 1)]), same)
    C, cov = blocks(over("C", T), same), total @ noise @ total.T
    cov_y = C @ cov @ C.T + blocks(over("R", T), same)
    return mean, cov, C @ mean + over("d", T).reshape(-1), cov_y, cov @ C.T


def joint_log_density(p, y, seen, xp=np):
    _, _, mean, cov, _ = joint_moments(p, xp)
    seen = np.flatnonzero(seen)
    residual, cov = (y.reshape(-1) - mean)[seen], cov[np.ix_(seen, seen)]
    quadratic = residual @ xp.linalg.solve(cov, residual)
    return -0.5 * (quadratic + xp.linalg.slogdet(cov)[1] + len(seen) * np.log(2 * np.pi))


def joint_posterior(p, y, seen):
    mean_x, cov_x, mean_y, cov_y, cross = joint_moments(p)
    seen = np.flatnonzero(seen)
    gain = np.linalg.solve(cov_y[np.ix_(seen, seen)], cross[:, seen].T).T
    mean = mean_x + gain @ (y.reshape(-1)[seen] - mean_y[seen])
    cov = (cov_x - gain @ cross[:, seen].T).reshape(T, N, T, N).swapaxes(1, 2)
    return mean.reshape(T, N), cov


SERIES = np.random.default_rng(1).normal(size=(T, M))
ROWS = np.array([True, False, True, True, False])
ENTRIES = np.array([[True, False], [True, True], [False, False], [False, True], [True, True]])


@pytest.mark.parametrize(
    ("timed", "where"),
    [(False, None), (False, ROWS), (True, ENTRIES)],
    ids=["all", "rows", "timed-entries"],
)
def test_linear_gaussian_equals_the_joint_gaussian(timed, where, parallel):
    """What is missing is marginalised: it is left out of the joint law. There it may be NaN."""
    p = linear_gaussian_parameters(timed)
    d = LinearGaussian(**p, num_steps=T, where=where, parallel=parallel)
    seen = np.ones((T, M), bool) if where is None else where.reshape(T, -1) & np.ones(M, bool)
    y = np.where(seen, SERIES, NAN)
    smoothed, filtered = d.smoother(y), d.filter(y)
    close(np.sum(filtered.log_increments), joint_log_density(p, SERIES, seen))
    close(d.log_prob(y), np.sum(filtered.log_increments))
    mean, cov = joint_posterior(p, SERIES, seen)
    close(smoothed.means, mean, atol=1e-9)
    close(smoothed.covariances, [cov[t, t] for t in range(T)], atol=1e-9)
    close(smoothed.lag_one_covariances, [cov[t, t + 1] for t in range(T - 1)], atol=1e-9)
    mean_x, _, mean_y, cov_y, _ = joint_moments(p)
    close(d.state_marginals().mean, mean_x.reshape(T, N))
    close(d.mean, mean_y.reshape(T, M))
    close(d.variance, np.diag(cov_y).reshape(T, M))


def test_linear_gaussian_derivatives_equal_the_joint_gaussian_s(parallel):
    """With respect to every parameter and the data, through singular covariances and missing entries."""
    p = linear_gaussian_parameters(timed=True)

    def own(p, y):
        return LinearGaussian(**p, where=ENTRIES, parallel=parallel).log_prob(y)

    def oracle(p, y):
        return joint_log_density(p, y, ENTRIES, jnp)

    found, expected = (
        jax.jit(jax.grad(f, (0, 1)))(p, y)
        for f, y in ((own, np.where(ENTRIES, SERIES, NAN)), (oracle, SERIES))
    )
    symmetric = lambda k, g: g + g.swapaxes(-1, -2) if k in ("P0", "Q", "R") else g  # noqa: E731
    for name, g in found[0].items():
        close(symmetric(name, g), symmetric(name, expected[0][name]), atol=1e-9)
    close(found[1], expected[1], atol=1e-9)


def test_draws_of_states_are_differentiable():
    """Through covariances that are singular; beside differences of the function itself."""
    p = linear_gaussian_parameters(timed=False)

    @jax.jit
    @jax.value_and_grad
    def total(a):
        d = LinearGaussian(**{**p, "A": a * p["A"]}, num_steps=T)
        return d.sample_states(jax.random.key(0), SERIES).sum()

    h = 1e-4
    difference = (total(1.0 + h)[0] - total(1.0 - h)[0]) / (2 * h)
    close(total(1.0)[1], difference, rtol=1e-5)


def test_factor_of_singular_covariances():
    """In single precision, of rank two in six dimensions of which one has no variance, on very different scales."""
    rng = np.random.default_rng(0)
    G = rng.normal(size=(50, 6, 2)) * np.exp(rng.normal(size=(50, 6, 1)))
    G[:, 3] = 0.0
    S = np.asarray(G @ G.swapaxes(1, 2), np.float32)
    B = S @ np.asarray(rng.normal(size=(50, 6, 3)), np.float32)

    @jax.jit
    @jax.vmap
    def both(S, B):
        return *kalman.semidefinite_factor(S), kalman.semidefinite_solve(S, B)

    L, order, X = (np.asarray(x) for x in both(S, B))
    scale = np.linalg.norm(G, axis=2) + 1e-30
    error = (L @ L.swapaxes(1, 2) - S) / (scale[:, :, None] * scale[:, None, :])
    assert np.abs(error).max() < 1e-5
    assert np.all(np.triu(np.take_along_axis(L, order[:, :, None], 1), 1) == 0)
    residual = (S @ X - B) / scale[:, :, None]
    assert np.abs(residual).max() < 1e-4 * np.abs(B / scale[:, :, None]).max()


# --- hidden Markov against the sum over all paths -------------------------------------------------

K, SD = 3, 0.7
PATHS = np.array(list(itertools.product(range(K), repeat=T)))
Y = np.array([0.3, -1.2, 0.9, 0.1, 2.0])
SEEN = np.array([True, True, False, True, False])


def chain_parameters(timed):
    """Some transitions are impossible."""
    rng = np.random.default_rng(1)
    initial = rng.dirichlet(np.ones(K))
    transition = rng.dirichlet(np.ones(K), size=(T - 1, K)) * (1 - np.eye(K)[:, ::-1])
    transition /= transition.sum(-1, keepdims=True)
    mu = rng.normal(size=(T, K))
    if not timed:
        transition, mu = transition[0], mu[0]
    return {"initial": initial, "transition": transition, "mu": mu}


def chain(p, **settings):
    emission = dist.Normal(p["mu"], SD)
    return HiddenMarkov(p["initial"], p["transition"], emission, num_steps=T, **settings)


def evidence_of(p, seen=True, xp=np):
    """log p(y_t | z_t) of Y, zero for what is not seen."""
    z = (Y[:, None] - p["mu"]) / SD
    terms = -0.5 * z**2 - np.log(SD) - 0.5 * np.log(2 * np.pi)
    return xp.where(np.broadcast_to(seen, T)[:, None], terms, 0.0)


def path_terms(p, evidence, length=T, xp=np):
    """log p(z, y) of every path; beyond the length, of paths that repeat the last state."""
    log = lambda x: xp.where(x > 0, xp.log(xp.where(x > 0, x, 1.0)), -INF)  # noqa: E731
    transition = xp.broadcast_to(p["transition"], (T - 1, K, K))
    terms = log(p["initial"])[PATHS[:, 0]] + evidence[0, PATHS[:, 0]]
    for t in range(1, length):
        step = log(transition[t - 1])[PATHS[:, t - 1], PATHS[:, t]]
        terms = terms + step + evidence[t, PATHS[:, t]]
    frozen = (PATHS[:, length:] == PATHS[:, length - 1 : length]).all(1)
    return xp.where(frozen, terms, -INF)


def posterior_by_paths(terms, length=T):
    weights = np.exp(terms - logsumexp(terms))
    probs = np.stack([weights @ (PATHS[:, t, None] == np.arange(K)) for t in range(T)])
    counts = np.zeros((K, K))
    for t in range(1, length):
        np.add.at(counts, (PATHS[:, t - 1], PATHS[:, t]), weights)
    return probs, counts


@pytest.mark.parametrize(
    ("timed", "where", "length"),
    [(False, None, None), (False, SEEN, None), (True, SEEN, 4), (True, None, 1)],
    ids=["all", "missing", "timed-missing-short", "timed-shortest"],
)
def test_hidden_markov_equals_the_sum_over_paths(timed, where, length, parallel):
    p = chain_parameters(timed)
    d = chain(p, where=where, length=length, parallel=parallel)
    length = length or T
    seen = (np.ones(T, bool) if where is None else where) & (np.arange(T) < length)
    y = np.where(seen, Y, NAN)
    terms = path_terms(p, evidence_of(p, seen), length)
    smoothed, best, filtered = d.smoother(y), d.viterbi(y), d.filter(y)
    probs, counts = posterior_by_paths(terms, length)
    close(smoothed.probs, probs)
    close(smoothed.transition_counts, counts)
    close(filtered.probs[-1], probs[-1])
    close(np.sum(filtered.log_increments), logsumexp(terms))
    close(d.log_prob(y), logsumexp(terms))
    close(best.log_density, terms.max())
    assert best.states.tolist() == PATHS[terms.argmax()].tolist()


def test_hidden_markov_derivatives_equal_those_of_the_sum_over_paths(parallel):
    """Where transitions are impossible and an observation is missing; the second derivative too."""
    p = chain_parameters(timed=True)

    def own(p):
        y = np.where(SEEN, Y, NAN)
        return chain(p, where=SEEN, parallel=parallel).log_prob(y)

    def oracle(p):
        return jax.nn.logsumexp(path_terms(p, evidence_of(p, SEEN, jnp), xp=jnp))

    direction = jax.tree.map(np.ones_like, p)
    found, expected = (
        jax.jit(lambda p, f=f: jax.jvp(jax.grad(f), (p,), (direction,)))(p) for f in (own, oracle)
    )
    for order in (0, 1):
        for name in p:
            close(found[order][name], expected[order][name])


def test_labels_are_evidence_of_minus_infinity(parallel):
    p = chain_parameters(timed=False)
    labels = np.zeros((T, K))
    labels[1] = [-INF, 0.0, -INF]
    labels[3] = [0.0, 0.0, -INF]
    evidence = evidence_of(p) + labels
    d = HiddenMarkov(p["initial"], p["transition"], num_steps=T, parallel=parallel)
    terms = path_terms(p, evidence)
    probs, counts = posterior_by_paths(terms)
    smoothed = d.smoother(evidence)
    close(smoothed.probs, probs)
    close(smoothed.transition_counts, counts)
    close(d.viterbi(evidence).log_density, terms.max())
    value_and_grad = jax.jit(jax.value_and_grad(d.log_prob))
    value, gradient = value_and_grad(evidence)
    close(value, logsumexp(terms))
    close(gradient, probs)  # the derivative of the log density is the smoother
    value, gradient = value_and_grad(evidence + np.array([[0.0]] * 4 + [[-INF]]))
    assert value == -INF
    assert np.all(np.isfinite(gradient))


def test_unlikely_states_do_not_underflow():
    """State 1 is left behind by 1e4 nats, and then it is the only one that can be; in single precision."""
    evidence = np.array([[0.0, -1e4], [0.0, -1e4], [-INF, 0.0]], np.float32)
    with jax.enable_x64(False):
        d = HiddenMarkov(np.array([0.5, 0.5]), np.eye(2), num_steps=3)
        filtered = d.filter(evidence)
        close(np.sum(filtered.log_increments), -2e4 + np.log(0.5), rtol=1e-6)
        close(filtered.probs, [[1, 0], [1, 0], [0, 1]])


def test_ties_give_a_path(parallel):
    """Two paths are equally good, and mixing them is impossible."""
    d = HiddenMarkov(np.ones(K) / K, np.eye(K), num_steps=T, parallel=parallel)
    states, log_density = d.viterbi(np.zeros((T, K)))
    assert len(set(states.tolist())) == 1
    close(log_density, -np.log(K))


def test_missing_values_of_any_support():
    """What stands in for a missing value is in the support, so derivatives are finite."""
    y = np.array([NAN, 2.0, NAN])

    @jax.jit
    @jax.grad
    def gradient(a):
        emission = dist.LogNormal(a * jnp.array([1.0, 3.0]), 1.0)
        transition = np.array([[0.9, 0.1], [0.2, 0.8]])
        return HiddenMarkov(np.ones(2) / 2, transition, emission, where=~np.isnan(y)).log_prob(y)

    assert np.isfinite(gradient(0.5))
    rates, nowhere = dist.Poisson(np.array([1.0, 2.0])), np.zeros(3, bool)
    empty = HiddenMarkov(np.ones(2) / 2, np.eye(2), rates, where=nowhere)
    close(jax.jit(empty.log_prob)(-np.ones(3)), 0.0)


def test_ragged_equals_separate():
    """A batch of padded series under vmap, and each by itself."""
    p = chain_parameters(timed=False)
    lengths = np.array([2, T])
    ys = np.where(np.arange(T) < lengths[:, None], Y + np.arange(2)[:, None], NAN)

    def all_of(d, y):
        return d.smoother(y).transition_counts, d.viterbi(y).log_density, d.log_prob(y)

    padded = jax.jit(jax.vmap(lambda y, n: all_of(chain(p, length=n), y)))(ys, lengths)
    emission = dist.Normal(p["mu"], SD)
    for i, n in enumerate((2, T)):
        alone = HiddenMarkov(p["initial"], p["transition"], emission, num_steps=n)
        for found, expected in zip(padded, all_of(alone, ys[i, :n]), strict=True):
            close(found[i], expected)


# --- draws ----------------------------------------------------------------------------------------


def assert_mean(draws, expected, name):
    """|z| < 5.5 for each element, draws along the first axis; elements that do not vary must be exact."""
    draws = np.asarray(draws, float)
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    z = (draws.mean(0) - expected) / np.maximum(error, 1e-9)
    assert np.abs(z).max() < 5.5, (name, z)


def test_draws_of_states_given_observations_have_the_smoother_s_law():
    p = linear_gaussian_parameters(timed=True)
    d = LinearGaussian(**p, where=ENTRIES)
    mean, cov = joint_posterior(p, SERIES, ENTRIES)
    keys = jax.random.split(jax.random.key(2), 4000)
    x = np.asarray(jax.jit(jax.vmap(d.sample_states, (0, None)))(keys, SERIES)) - mean
    assert_mean(x, 0.0, "means")
    assert_mean(x[..., None] * x[..., None, :], [cov[t, t] for t in range(T)], "covariances")
    across = x[:, :-1, :, None] * x[:, 1:, None, :]
    assert_mean(across, [cov[t, t + 1] for t in range(T - 1)], "lag-one covariances")


def test_draws_of_paths_given_observations_have_the_posterior_s_law():
    """The joint law over all paths, not only its marginals; the same draws in parallel."""
    p = chain_parameters(timed=True)
    terms = path_terms(p, evidence_of(p))
    keys = jax.random.split(jax.random.key(3), 10_000)
    draws, again = (
        np.asarray(jax.jit(jax.vmap(chain(p, parallel=x).sample_states, (0, None)))(keys, Y))
        for x in (False, True)
    )
    np.testing.assert_array_equal(draws, again)
    counts = np.bincount(draws @ K ** np.arange(T)[::-1], minlength=len(PATHS))
    probs = np.exp(terms - logsumexp(terms))
    assert np.all(counts[probs == 0] == 0)
    frequent = probs > 1e-3  # some ten draws at least, and the rest together
    counts = np.append(counts[frequent], counts[~frequent].sum())
    probs = np.append(probs[frequent], probs[~frequent].sum())
    z = (counts - len(keys) * probs) / np.sqrt(len(keys) * probs * (1 - probs))
    assert np.abs(z).max() < 5.5


def test_draws_of_series():
    p, q = linear_gaussian_parameters(timed=True), chain_parameters(timed=True)
    mean_x, cov_x, mean_y, cov_y, cross = joint_moments(p)
    drawn = jax.jit(lambda k: LinearGaussian(**p).sample_joint(k, (4000,)))(jax.random.key(4))
    x, y = (np.asarray(v).reshape(4000, -1) for v in drawn)
    x, y = x - mean_x, y - mean_y
    assert_mean(x, 0.0, "states")
    assert_mean(y, 0.0, "observations")
    assert_mean(x**2, np.diag(cov_x), "variances of states")
    assert_mean(y[:, :1] * y, cov_y[0], "covariances of observations")
    assert_mean(x[:, -1:] * y, cross[-1], "covariances of both")
    d = chain(q)
    z, y = jax.jit(lambda k: d.sample_joint(k, (4000,)))(jax.random.key(5))
    z, states = np.asarray(z), np.arange(K)
    assert_mean(z[..., None] == states, d.state_marginals(), "states of a chain")
    assert_mean(y, d.mean, "observations of a chain")
    assert_mean((y - d.mean) ** 2, d.variance, "variances of a chain")
    pairs = (z[:, 0, None, None] == states[:, None]) & (z[:, 1, None, None] == states)
    assert_mean(pairs, q["transition"][0] * q["initial"][:, None], "transitions")


def test_sequential_and_parallel_draw_the_same():
    p, q = linear_gaussian_parameters(timed=False), chain_parameters(timed=False)

    @functools.partial(jax.jit, static_argnums=0)
    def draws(parallel, key):
        d = LinearGaussian(**p, num_steps=T, parallel=parallel)
        return d.sample_states(key, SERIES), chain(q, parallel=parallel).sample(key)

    key = jax.random.key(0)
    for one, other in zip(draws(False, key), draws(True, key), strict=True):
        close(one, other, atol=1e-9)


# --- forecasts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("timed", [False, True], ids=["constant", "timed"])
def test_forecast_is_the_conditional_law(timed):
    """p(y) = p(past) p(future | past), and its moments are those of the joint Gaussian."""
    p = linear_gaussian_parameters(timed)
    d = LinearGaussian(**p, num_steps=T, where=ROWS)
    ahead = d.forecast(np.where(ROWS[:, None], SERIES, NAN)[:3], num_steps=2)
    assert ahead.event_shape == (2, M)
    past = (ROWS & (np.arange(T) < 3)).repeat(M)
    whole = past | (np.arange(T) >= 3).repeat(M)
    conditional = joint_log_density(p, SERIES, whole) - joint_log_density(p, SERIES, past)
    close(ahead.log_prob(SERIES[3:]), conditional)
    mean, cov = joint_posterior(p, SERIES, past)
    found = ahead.state_marginals()
    close(found.mean, mean[3:])
    close(found.covariance, [cov[3, 3], cov[4, 4]])
    if timed:
        with pytest.raises(ModelError, match="at most 2 can be forecast, not 3"):
            d.forecast(SERIES[:3], num_steps=3)
    else:
        assert d.forecast(SERIES[:3], num_steps=7).event_shape == (7, M)


@pytest.mark.parametrize("timed", [False, True], ids=["constant", "timed"])
def test_forecast_of_a_chain_is_the_conditional_law(timed):
    p = chain_parameters(timed)
    p["mu"] = p["mu"][0] if timed else p["mu"]
    d = chain(p, where=SEEN)
    ahead = d.forecast(Y[:3], num_steps=2)
    past = SEEN & (np.arange(T) < 3)
    before = path_terms(p, evidence_of(p, past))
    after = path_terms(p, evidence_of(p, past | (np.arange(T) >= 3)))
    close(ahead.log_prob(Y[3:]), logsumexp(after) - logsumexp(before))
    close(ahead.state_marginals(), posterior_by_paths(before)[0][3:])
    if timed:
        with pytest.raises(ModelError, match="at most 2 can be forecast, not 3"):
            d.forecast(Y[:3], num_steps=3)
    else:
        assert d.forecast(Y[:3], num_steps=7).event_shape == (7,)


# --- in models ------------------------------------------------------------------------------------


def test_sites():
    """Observed sites, one a lane, with missing rows; the gradient of the target."""
    p = linear_gaussian_parameters(timed=False)

    def with_scale(scale, shift):
        return {**p, "d": p["d"] + shift, "Q": scale * p["Q"]}

    @gen
    def model(shifts):
        scale = sample("scale", dist.HalfNormal(1.0))

        def series(shift):
            return sample("y", LinearGaussian(**with_scale(scale, shift), where=ROWS))

        return jax.vmap(series)(shifts)

    trace = model(jnp.arange(2.0)).simulate(jax.random.key(0))
    scale, y = trace.choices["scale"], np.asarray(trace.choices["y"])
    assert y.shape == (2, T, M)
    assert len(np.unique(y[1] - y[0])) > 1
    own = dist.HalfNormal(1.0).log_prob(scale)
    for i in range(2):
        own += joint_log_density(with_scale(float(scale), i), y[i], ROWS.repeat(M))
    close(trace.log_density, own)
    target = model(jnp.arange(2.0)).given({"y": y})
    assert target.latents == ("scale",)
    flat = target.unconstrain()
    slope = jax.jit(jax.grad(lambda z: flat.log_density({"scale": z})))(0.1)
    assert np.isfinite(slope)


def test_site_of_a_chain_and_evidence_as_a_factor():
    p = chain_parameters(timed=False)

    @gen
    def model():
        rates = sample("rates", dist.Gamma(jnp.ones(K), 1.0).to_event(1))
        counts = HiddenMarkov(p["initial"], p["transition"], dist.Poisson(rates), num_steps=T)
        y = sample("y", counts)
        evidence = HiddenMarkov(p["initial"], p["transition"], num_steps=T)
        factor("again", evidence.log_prob(dist.Poisson(rates).log_prob(y[:, None])))

    program = model()
    info = program.sites["y"]
    assert (info.shape, info.event_shape) == ((T,), (T,))
    rates, y = np.array([1.0, 3.0, 9.0]), np.array([0, 3, 8, 2, 1])
    terms = path_terms(p, np.asarray(dist.Poisson(rates).log_prob(y[:, None])))
    found = program.log_density({"rates": rates, "y": y})
    close(found, -rates.sum() + 2 * logsumexp(terms))
    with pytest.raises(ObservationError, match="shape"):
        program.given({"y": y[:3]})


def test_latent_series():
    """The support is known, so a series that is not observed can be inferred."""
    p = linear_gaussian_parameters(timed=False)

    @gen
    def model():
        y = sample("y", LinearGaussian(**p, num_steps=T))
        sample("last", dist.Normal(y[-1, 0], 1.0))

    flat = model().given({"last": 0.3}).unconstrain()
    own = joint_log_density(p, SERIES, np.ones((T, M)))
    last = dist.Normal(SERIES[-1, 0], 1.0).log_prob(0.3)
    close(flat.log_density({"y": SERIES}), own + last)


def test_as_numpyro_distributions():
    """Sample shapes, leading axes of values, passing through jit as pytrees."""
    p, q = linear_gaussian_parameters(timed=False), chain_parameters(timed=False)

    @jax.jit
    def both(d, key):
        y = d.sample(key, (2, 3))
        return y, d.log_prob(y)

    for d in (LinearGaussian(**p, num_steps=T), chain(q, where=SEEN, length=4)):
        assert d.batch_shape == ()
        y, density = both(d, jax.random.key(0))
        assert y.shape == (2, 3, *d.event_shape)
        assert density.shape == (2, 3)
        assert len(np.unique(density)) == 6
    assert LinearGaussian(**p, num_steps=T).has_rsample
    assert not chain(q).has_rsample


def test_made_by_vmap():
    """One distribution a lane: used inside another vmap it is right, outside it is refused."""
    p = linear_gaussian_parameters(timed=False)
    shifted = lambda s: LinearGaussian(**{**p, "d": p["d"] + s}, num_steps=T)  # noqa: E731
    many = jax.vmap(shifted)(np.arange(2.0))
    ys = np.stack([SERIES, SERIES + 1.0])
    lanes = jax.jit(jax.vmap(lambda d, y: d.log_prob(y)))(many, ys)
    close(lanes[0], lanes[1])
    with pytest.raises(ModelError, match="inside the vmap"):
        many.log_prob(SERIES)
    chains = jax.vmap(lambda a: HiddenMarkov(a, np.eye(2), NORMAL, num_steps=4))(np.eye(2))
    with pytest.raises(ModelError, match="inside the vmap"):
        chains.log_prob(np.zeros(4))


def test_a_single_step(parallel):
    one = np.ones((1, 1))
    d: Any = LinearGaussian(np.ones(1), 2 * one, one, one, one, one, num_steps=1, parallel=parallel)
    close(d.log_prob(0 * one), dist.Normal(1.0, 3**0.5).log_prob(0.0))
    assert d.smoother(one).lag_one_covariances.shape == (0, 1, 1)
    assert d.sample_states(jax.random.key(0), one).shape == (1, 1)
    d = HiddenMarkov(np.array([0.3, 0.7]), np.eye(2), NORMAL, num_steps=1, parallel=parallel)
    close(d.log_prob(np.array([0.5])), dist.Normal(0.0, 1.0).log_prob(0.5))
    assert d.smoother(np.array([0.5])).transition_counts.sum() == 0
    assert d.sample_states(jax.random.key(0), np.array([0.5])).shape == (1,)


# --- single precision -----------------------------------------------------------------------------


def test_single_precision():
    """A vague prior, 1e3 times the noise: errors beside the standard deviations of the states."""
    p = [np.zeros(2), 1e3 * np.eye(2), np.array([[1.0, 1.0], [0.0, 1.0]]), np.diag([0.1, 0.01])]
    p += [np.eye(1, 2), np.eye(1)]
    y = np.random.default_rng(0).normal(size=(16, 2)).cumsum(0).cumsum(0)[:, :1]

    def both(parallel=False):
        d = LinearGaussian(*p, num_steps=16, parallel=parallel)
        return d.filter(y), d.smoother(y)

    exact = both()
    for parallel in (False, True):
        with jax.enable_x64(False):
            laws = both(parallel)
        assert laws[0].means.dtype == jnp.float32
        density = np.asarray(laws[0].log_increments, float).sum()
        close(density, np.sum(exact[0].log_increments), rtol=1e-4)
        for found, expected in zip(laws, exact, strict=True):
            sd = np.sqrt(np.diagonal(expected.covariances, axis1=1, axis2=2))
            assert np.abs((found.means - expected.means) / sd).max() < 0.01
            error = (found.covariances - expected.covariances) / (sd[:, :, None] * sd[:, None, :])
            assert np.abs(error).max() < 0.01
            assert np.linalg.eigvalsh(np.asarray(found.covariances, float)).min() > 0


def test_single_precision_of_a_long_chain():
    """Logarithms are normalised at each time, so that their sum, 60,000, costs no precision."""
    p = chain_parameters(timed=False)
    evidence = np.random.default_rng(0).normal(-1000.0, 5.0, (60, K))

    def both(parallel=False):
        d = HiddenMarkov(p["initial"], p["transition"], num_steps=60, parallel=parallel)
        return d.filter(evidence).log_increments, d.smoother(evidence).probs

    exact = both()
    for parallel in (False, True):
        with jax.enable_x64(False):
            increments, probs = both(parallel)
        assert increments.dtype == jnp.float32
        close(increments, exact[0], rtol=1e-6)
        close(probs, exact[1], atol=1e-4)


# --- errors ---------------------------------------------------------------------------------------

LINEAR: dict[str, Any] = linear_gaussian_parameters(timed=False)
MARKOV: dict[str, Any] = {"initial": np.ones(2) / 2, "transition": np.eye(2), "num_steps": 4}
NORMAL = dist.Normal(np.zeros(2, np.float32), 1.0)
WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (LinearGaussian, {}, "give num_steps="),
    (LinearGaussian, {"A": np.eye(2), "num_steps": 4}, r"A has shape \(2, 2\), expected \(3, 3\)"),
    (LinearGaussian, {"A": np.eye(2), "num_steps": 4}, r"or with a leading axis of T - 1"),
    (LinearGaussian, {"b": np.zeros(2), "num_steps": 4}, r"b has shape \(2,\), expected \(3,\)"),
    (
        LinearGaussian,
        {"A": np.zeros((4, 3, 3)), "C": np.zeros((4, 2, 3))},
        "A for 5 steps, C for 4 steps",
    ),
    (LinearGaussian, {"num_steps": 0}, "positive integer"),
    (LinearGaussian, {"where": np.ones(4)}, r"booleans of shape \(T,\) or \(T, 2\)"),
    (LinearGaussian, {"where": np.ones((4, 3), bool)}, r"got bool of shape \(4, 3\)"),
    (LinearGaussian, {"num_steps": 4, "R": np.tri(2)}, "R is not symmetric"),
    (LinearGaussian, {"num_steps": 4, "Q": -np.eye(3)}, "Q has a negative eigenvalue"),
    (HiddenMarkov, {"num_steps": None}, "give num_steps="),
    (HiddenMarkov, {"transition": np.eye(3)}, r"\(2,\) and transition \(3, 3\)"),
    (HiddenMarkov, {"transition": np.full((2, 2), 0.55)}, "transition must hold prob.*1.1"),
    (HiddenMarkov, {"initial": np.array([1.5, -0.5])}, "initial must hold.*the least is -0.5"),
    (HiddenMarkov, {"emission": np.zeros((4, 2))}, "HiddenMarkov without emission"),
    (HiddenMarkov, {"emission": dist.Normal(np.zeros(3), 1.0)}, r"\(3,\), expected \(2,\)"),
    (HiddenMarkov, {"emission": dist.Normal(np.zeros((3, 2)), 1.0)}, "emission for 3 steps, num_s"),
    (HiddenMarkov, {"length": 5}, "length must be from 1 to 4"),
    (HiddenMarkov, {"length": np.array([1, 2])}, "a jax.vmap over their lengths"),
    (HiddenMarkov, {"where": np.ones((4, 2), bool)}, r"where must be booleans of shape \(T,\)"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), WRONG)
def test_errors(kind, settings, message, untyped):
    with pytest.raises(ModelError, match=message):
        kind(**{**(LINEAR if kind is LinearGaussian else MARKOV), **settings})


def test_errors_of_series(untyped):
    one = np.ones((1, 1))
    d = LinearGaussian(np.ones(1), one, one, one, one, one, num_steps=4)
    with pytest.raises(ObservationError, match=r"y has shape \(4,\), expected \(4, 1\).*y\[:, No"):
        d.log_prob(np.zeros(4))
    with pytest.raises(ObservationError, match=r"several series are a jax.vmap"):
        d.smoother(np.zeros((2, 4, 1)))
    with pytest.raises(ObservationError, match=r"expected \(S, 1\) with S from 1 to 4"):
        d.forecast(np.zeros((5, 1)), num_steps=2)
    markov = HiddenMarkov(**MARKOV, emission=NORMAL)
    with pytest.raises(ObservationError, match=r"y has shape \(5,\), expected \(4,\)"):
        markov.viterbi(np.zeros(5))
    with pytest.raises(ObservationError, match=r"S from 1 to 4"):
        markov.forecast(np.zeros(5), num_steps=2)
    varying = HiddenMarkov(**MARKOV, emission=dist.Normal(np.zeros((4, 2)), 1.0))
    with pytest.raises(ModelError, match="the emission varies in time.*where= false in the future"):
        varying.forecast(np.zeros(4), num_steps=2)
    with pytest.raises(NotImplementedError, match="without an emission"):
        HiddenMarkov(**MARKOV).sample(jax.random.key(0))
