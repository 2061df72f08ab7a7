"""Normal choices integrated out as textbooks write it: what `gaussians.py` measures by.

A linear-Gaussian series by Kalman's filter, the smoother of Rauch, Tung and Striebel, and backward sampling, each a
`lax.scan`. Groups by their sufficient statistics. A bank of decaying states that one noise drives, by a filter that
multiplies by the decays, with no matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular


class Series(NamedTuple):
    """A start N(m, P), states x_t ~ N(A x_{t-1}, Q) and observations y_t ~ N(C x_t, R), for t = 1, ..., T.

    ``C`` may lead with an axis of time.
    """

    m: Any
    P: Any
    A: Any
    Q: Any
    C: Any
    R: Any


def kalman_filter(series: Series, y: Any, moments: bool = False, joseph: bool = False) -> Any:
    """The log likelihood, and with ``moments`` the means and covariances of the filtered states.

    Let S = L L' be the covariance of an observation given those before it, W = L^-1 C P and z = L^-1 (y - C m). The new
    mean is m + W' z, and the new covariance P - W' W. With ``joseph`` it is (I - K C) P (I - K C)' + K R K' for
    K = W' L^-1, which stays positive whatever is rounded.
    """
    _, _, A, Q, C, R = series
    timed = C.ndim == 3

    def step(carry: Any, now: Any) -> Any:
        (m, P), (C_t, y_t) = carry, now if timed else (C, now)
        m, P = A @ m, A @ P @ A.T + Q
        CP = C_t @ P
        L = jnp.linalg.cholesky(CP @ C_t.T + R)
        both = solve_triangular(L, jnp.c_[CP, y_t - C_t @ m], lower=True)
        W, z = both[:, :-1], both[:, -1]
        increment = -0.5 * (z @ z + len(z) * np.log(2 * np.pi)) - jnp.log(jnp.diagonal(L)).sum()
        m = m + W.T @ z
        if joseph:
            K = solve_triangular(L, W, lower=True, trans=1).T
            rest = jnp.eye(len(m)) - K @ C_t
            P = rest @ P @ rest.T + K @ R @ K.T
        else:
            P = P - W.T @ W
        return (m, P), (increment, m, P) if moments else increment

    _, found = lax.scan(step, (series.m, series.P), (C, y) if timed else y)
    return (found[0].sum(), *found[1:]) if moments else found.sum()


def smoother(series: Series, y: Any) -> tuple[Any, Any]:
    """Means and covariances of all states but the start, given all observations."""
    _, means, covs = kalman_filter(series, y, moments=True)

    def step(carry: Any, now: Any) -> Any:
        (m_next, P_next), (m, P) = carry, now
        G, predicted = _backward_gain(series, P)
        m, P = m + G @ (m_next - series.A @ m), P + G @ (P_next - predicted) @ G.T
        return (m, P), (m, P)

    last = means[-1], covs[-1]
    _, (m, P) = lax.scan(step, last, (means[:-1], covs[:-1]), reverse=True)
    return jnp.concatenate([m, last[0][None]]), jnp.concatenate([P, last[1][None]])


def posterior_sample(key: Any, series: Series, y: Any) -> Any:
    """A joint draw of all states but the start, given all observations."""
    _, means, covs = kalman_filter(series, y, moments=True)
    noise = jax.random.normal(key, means.shape)

    def draw(m: Any, P: Any, e: Any) -> Any:
        return m + jnp.linalg.cholesky(P) @ e

    def step(x: Any, now: Any) -> Any:
        m, P, e = now
        G, predicted = _backward_gain(series, P)
        x = draw(m + G @ (x - series.A @ m), P - G @ predicted @ G.T, e)
        return x, x

    last = draw(means[-1], covs[-1], noise[-1])
    _, states = lax.scan(step, last, (means[:-1], covs[:-1], noise[:-1]), reverse=True)
    return jnp.concatenate([states, last[None]])


def _backward_gain(series: Series, P: Any) -> tuple[Any, Any]:
    """G = P A' (A P A' + Q)^-1, and the matrix that is inverted."""
    AP = series.A @ P
    predicted = AP @ series.A.T + series.Q
    return cho_solve((jnp.linalg.cholesky(predicted), True), AP).T, predicted


# ---- groups ----------------------------------------------------------------------------------------------------------


def normal_groups(y: Any, g: Any, num_groups: int, spread: Any, tau: Any, sigma: Any) -> Any:
    """log p(y) for y_i ~ N(theta[g_i], sigma), theta_j ~ N(mu, tau) and mu ~ N(0, spread).

    Of a group its size n, its mean and its sum of squares about the mean suffice: the mean is N(mu, tau^2 + sigma^2/n).
    """
    add = lambda v: jnp.zeros(num_groups).at[g].add(v)  # noqa: E731
    n = add(jnp.ones_like(y))
    mean = add(y) / n
    about = jnp.sum((y - mean[g]) ** 2)
    within = -0.5 * about / sigma**2 - jnp.sum((n - 1) * jnp.log(sigma) + 0.5 * jnp.log(n))
    weight = 1 / (tau**2 + sigma**2 / n)
    total, prior = weight.sum(), 1 / spread**2
    centre = jnp.sum(weight * mean) / total  # the estimate of mu from the groups alone
    between = 0.5 * jnp.log(weight).sum() - 0.5 * jnp.sum(weight * (mean - centre) ** 2)
    shared = 0.5 * jnp.log(prior / (total + prior))
    shared -= 0.5 * centre**2 * total * prior / (total + prior)
    return within + between + shared - 0.5 * y.size * np.log(2 * np.pi)


def normal_slopes(y: Any, x: Any, g: Any, num_groups: int, spread: Any, S: Any, sigma: Any) -> Any:
    """log p(y) for y_i ~ N(c[g_i, 0] + c[g_i, 1] x_i, sigma), c_j ~ N(m, S) and m ~ N(0, spread) in both entries.

    Of a group the least-squares estimate, its precision G = X'X / sigma^2 and the sum of squared residuals suffice: the
    estimate is N(m, S + G^-1). Each group has at least two different x.
    """
    add = lambda v: jnp.zeros(num_groups).at[g].add(v)  # noqa: E731
    G = matrix(add(jnp.ones_like(x)), add(x), add(x**2)) / sigma**2
    cov, log_det_G = inverse_of_two(G)
    estimate = jnp.einsum("jkl,jl->jk", cov, jnp.stack([add(y), add(x * y)], -1)) / sigma**2
    about = jnp.sum((y - estimate[g, 0] - estimate[g, 1] * x) ** 2)
    within = -0.5 * about / sigma**2 - y.size * jnp.log(sigma) - 0.5 * log_det_G.sum()
    weight, log_det = inverse_of_two(S + cov)
    total, prior = weight.sum(0), jnp.eye(2) / spread**2
    centre = inverse_of_two(total)[0] @ jnp.einsum("jkl,jl->k", weight, estimate)
    away = estimate - centre
    between = -0.5 * log_det.sum() - 0.5 * jnp.einsum("jk,jkl,jl", away, weight, away)
    both, log_det = inverse_of_two(total + prior)
    shared = -2 * jnp.log(spread) - 0.5 * log_det - 0.5 * centre @ total @ both @ prior @ centre
    return within + between + shared - 0.5 * y.size * np.log(2 * np.pi)


def matrix(a: Any, b: Any, d: Any) -> Any:
    """The symmetric matrices of two rows with a and d on the diagonal."""
    return jnp.stack([jnp.stack([a, b], -1), jnp.stack([b, d], -1)], -2)


def inverse_of_two(M: Any) -> tuple[Any, Any]:
    """The inverses and the logarithms of the determinants of symmetric matrices of two rows."""
    a, b, d = M[..., 0, 0], M[..., 0, 1], M[..., 1, 1]
    det = a * d - b**2
    return matrix(d, -b, a) / det[..., None, None], jnp.log(det)


# ---- a bank of states ------------------------------------------------------------------------------------------------


class Bank(NamedTuple):
    """States s -> e s + eta, eta ~ N(0, Q), with a start N(0, P); observed is w' (new - old) + N(0, noise^2)."""

    e: Any
    Q: Any
    P: Any
    w: Any
    noise: Any


def bank_filter(bank: Bank, y: Any) -> Any:
    """The log likelihood of the increments that a bank drives; the decays ``e`` multiply entry by entry."""
    e, Q, P, w, noise = bank
    c, Qw = w * (e - 1), Q @ w
    wQw = w @ Qw + noise**2

    def step(carry: Any, y: Any) -> Any:
        m, P = carry
        Pc = P @ c
        v, r = c @ Pc + wQw, y - c @ m
        k = e * Pc + Qw
        m, P = e * m + k * (r / v), e[:, None] * P * e + Q - k[:, None] * (k / v)
        return (m, P), -0.5 * (jnp.log(2 * jnp.pi * v) + r**2 / v)

    return lax.scan(step, (jnp.zeros_like(e), P), y)[1].sum()
