"""The recursions and sums that `benchmarks/gaussians.py` measures by, and its models, against dense normal laws.

All of them draw data from standard normal numbers by an affine map f. So the data are normal with mean f(0) and
covariance J J', where J is the derivative of f. Double precision throughout.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from benchmarks import gaussians
from benchmarks.by_hand import (
    Bank,
    Series,
    bank_filter,
    kalman_filter,
    normal_groups,
    normal_slopes,
    posterior_sample,
    smoother,
)
from programs import quick_compilation

pytestmark = pytest.mark.slow  # once is enough: not in every lane


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True), quick_compilation():
        yield


def moments(f, *shapes):
    """The mean and the covariance of f of standard normal numbers of some shapes."""
    zeros = [jnp.zeros(shape) for shape in shapes]
    J = jnp.concatenate(
        [j.reshape(f(*zeros).size, -1) for j in jax.jacobian(f, tuple(range(len(shapes))))(*zeros)],
        1,
    )
    return np.asarray(f(*zeros)).ravel(), np.asarray(J @ J.T)


def log_density(y, mean, cov):
    return multivariate_normal.logpdf(np.ravel(y), mean, cov)


T, N, M = 5, 3, 2


def series(timed):
    rng = np.random.default_rng(0)
    C = rng.normal(size=(T, M, N) if timed else (M, N))
    factors = [np.tril(rng.normal(size=(n, n))) + np.eye(n) for n in (N, N, M)]
    P, Q, R = (a @ a.T for a in factors)
    return Series(rng.normal(size=N), P, rng.normal(size=(N, N)) / 2, Q, C, R), factors


def path(chain, factors, start, moves, noises):
    """States and observations from standard normal numbers."""
    m, _, A, _, C, _ = chain
    x, states, seen = m + factors[0] @ start, [], []
    for t in range(T):
        x = A @ x + factors[1] @ moves[t]
        states.append(x)
        seen.append((C[t] if C.ndim == 3 else C) @ x + factors[2] @ noises[t])
    return jnp.stack(states), jnp.stack(seen)


@pytest.mark.parametrize("timed", [False, True])
def test_recursions_are_the_dense_normal_law(timed):
    chain, factors = series(timed)
    chain = jax.tree.map(jnp.asarray, chain)

    def both(*noise):
        return jnp.concatenate([a.ravel() for a in path(chain, factors, *noise)])

    mean, cov = moments(both, (N,), (T, N), (T, M))
    x, o = np.arange(T * N), np.arange(T * N, T * (N + M))
    y = np.random.default_rng(1).normal(size=(T, M))
    exact = log_density(y, mean[o], cov[np.ix_(o, o)])
    for joseph in (False, True):
        np.testing.assert_allclose(kalman_filter(chain, y, joseph=joseph), exact, rtol=1e-10)
    gain = np.linalg.solve(cov[np.ix_(o, o)], cov[np.ix_(o, x)]).T
    given = mean[x] + gain @ (y.ravel() - mean[o])
    left = cov[np.ix_(x, x)] - gain @ cov[np.ix_(o, x)]
    means, covs = smoother(chain, y)
    blocks = left.reshape(T, N, T, N)[np.arange(T), :, np.arange(T)]
    np.testing.assert_allclose(means.ravel(), given, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(covs, blocks, rtol=1e-9, atol=1e-9)
    # A draw is affine in its noise: the law is exact if mean and covariance are.
    draws = jax.vmap(lambda key: posterior_sample(key, chain, y).ravel())
    n = 20_000
    z = (np.asarray(draws(jax.random.split(jax.random.key(0), n))) - given) @ np.linalg.inv(
        np.linalg.cholesky(left)
    ).T
    # 15 means and 120 second moments of n standard normal numbers, of variance 1 / n, and of 2 / n on the diagonal
    assert np.abs(z.mean(0)).max() < 5 / n**0.5
    assert np.abs(z.T @ z / n - np.eye(T * N)).max() < 5 * (2 / n) ** 0.5


def test_groups_are_the_dense_normal_law():
    rng = np.random.default_rng(0)
    g = np.array([0, 2, 1, 1, 0, 2, 2, 0])
    y, x = 3 + rng.normal(size=8), rng.normal(size=8)
    spread, tau, sigma = 5.0, 0.7, 0.4
    L = np.array([[0.7, 0.0], [-0.2, 0.4]])

    def flat(shared, groups, noise):
        return (spread * shared + tau * groups)[g] + sigma * noise

    def sloping(shared, groups, noise):
        c = spread * shared + groups @ L.T
        return c[g, 0] + c[g, 1] * x + sigma * noise

    exact = log_density(y, *moments(flat, (), (3,), (8,)))
    np.testing.assert_allclose(normal_groups(y, g, 3, spread, tau, sigma), exact, rtol=1e-10)
    exact = log_density(y, *moments(sloping, (2,), (3, 2), (8,)))
    found = normal_slopes(y, x, g, 3, spread, L @ L.T, sigma)
    np.testing.assert_allclose(found, exact, rtol=1e-10)


def test_a_bank_is_the_dense_normal_law():
    y, (decay, noise, start, w) = gaussians.bank_data(4)
    factors = [gaussians.factor_of(a, 0) for a in (noise, start)]
    np.testing.assert_allclose(factors[0] @ factors[0].T, noise, rtol=1e-9)

    def increments(start, moves, noises):
        state, found = factors[1] @ start, []
        for t in range(4):
            new = decay * state + factors[0] @ moves[t]
            found.append(w @ (new - state) + gaussians.SEEN * noises[t])
            state = new
        return jnp.stack(found)

    sizes = [a.shape[1] for a in factors]
    exact = log_density(y, *moments(increments, (sizes[1],), (4, sizes[0]), (4,)))
    by_hand = bank_filter(Bank(*map(jnp.asarray, (decay, noise, start, w)), gaussians.SEEN), y)
    np.testing.assert_allclose(by_hand, exact, rtol=1e-8)


SMALL = {
    "chain": lambda: gaussians.chain_densities(2, 3)["log density"],
    "groups": lambda: gaussians.group_densities(3, 4)["log density"],
    "slopes": lambda: gaussians.slope_densities(3, 4)["log density"],
    "trend": lambda: gaussians.trend_densities(3)["log density"],
    "bank": lambda: gaussians.bank_filters(2)["log density"],
    "filter": lambda: gaussians.bank_filters(2)["2 particles"],
}


@pytest.mark.parametrize("part", SMALL)
def test_models_are_those_by_hand(part):
    """In double precision every version gives the same."""
    with jax.enable_x64(False):
        operation = SMALL[part]()
    args = jax.tree.map(gaussians.double, operation.args)
    found = {name: float(jax.jit(f)(*args)) for name, f in operation.versions.items()}
    by_hand = next(iter(found.values()))
    for name, value in found.items():
        np.testing.assert_allclose(value, by_hand, rtol=1e-6, err_msg=name)
