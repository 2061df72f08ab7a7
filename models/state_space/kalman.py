"""Filtering, smoothing and sampling of one linear-Gaussian series, sequentially or in parallel over time.

    x_0 ~ N(m0, P0),    x_t = A x_{t-1} + b + N(0, Q),    y_t = C x_t + d + N(0, R)

The filter gives the laws p(x_t | y_{0:t}). Given all observations the states are a linear-Gaussian chain again. It
runs backwards from the last state, with p(x_t | x_{t+1}, y_{0:t}) = N(E x_{t+1} + g, L). The marginals of this chain
are the smoother, and a path of it is a draw of the states. Sequentially, each recursion is a `lax.scan`. In parallel,
each is an associative scan over the conditionals p(x_t | x_s), which compose.

Covariances are updated in Joseph's form, F P F' + K R K'. It is symmetric and positive semidefinite whatever rounding
did to the gain. The usual form P - K S K' fails in single precision on vague priors.

References:
    Särkkä, Bayesian Filtering and Smoothing, 2013: the filter is theorem 4.2, the smoother theorem 8.2.
    Särkkä and García-Fernández, Temporal parallelization of Bayesian smoothers, IEEE Transactions on Automatic
        Control 66, 2021, section IV: the elements and how they combine.
    Frühwirth-Schnatter, Data augmentation and dynamic linear models, Journal of Time Series Analysis 15, 1994: draws
        of the states, forward filtering and backward sampling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from . import timewise


class Gaussian(NamedTuple):
    """The normal law of a state, or of the state at each time.

    Attributes:
        mean: shape (n,), or (T, n).
        covariance: shape (n, n), or (T, n, n).
    """

    mean: Float[Array, "*t n"]
    covariance: Float[Array, "*t n n"]


class Transition(NamedTuple):
    """x_t = A x_{t-1} + b + N(0, Q). Each is constant, or has a leading axis of T - 1 transitions."""

    A: Float[Array, "*t n n"]
    b: Float[Array, "*t n"]
    Q: Float[Array, "*t n n"]


class Observation(NamedTuple):
    """y_t = C x_t + d + N(0, R). Each is constant, or has a leading axis of T times."""

    C: Float[Array, "*t m n"]
    d: Float[Array, "*t m"]
    R: Float[Array, "*t m m"]


class FilteredGaussian(NamedTuple):
    """The result of `LinearGaussian.filter`: laws of the states given the observations so far.

    Attributes:
        means: E[x_t | y_{0:t}], shape (T, n).
        covariances: Cov[x_t | y_{0:t}], shape (T, n, n).
        predicted_means: E[x_t | y_{0:t-1}], shape (T, n).
        predicted_covariances: Cov[x_t | y_{0:t-1}], shape (T, n, n).
        log_increments: log p(y_t | y_{0:t-1}), shape (T,); they sum to the log density of y.
    """

    means: Float[Array, "*t n"]
    covariances: Float[Array, "*t n n"]
    predicted_means: Float[Array, "*t n"]
    predicted_covariances: Float[Array, "*t n n"]
    log_increments: Float[Array, "*t"]


class SmoothedGaussian(NamedTuple):
    """The result of `LinearGaussian.smoother`: laws of the states given all observations.

    Attributes:
        means: E[x_t | y], shape (T, n).
        covariances: Cov[x_t | y], shape (T, n, n).
        lag_one_covariances: Cov[x_t, x_{t+1} | y], shape (T - 1, n, n).
    """

    means: Float[Array, "t n"]
    covariances: Float[Array, "t n n"]
    lag_one_covariances: Float[Array, "s n n"]


def time_axes(parameters: Any) -> Any:
    """0 for each parameter of a `Transition` or an `Observation` that has a time axis, None for the others."""
    ranks = zip(parameters, (2, 1, 2), strict=True)
    return type(parameters)(*(0 if x.ndim > rank else None for x, rank in ranks))


def expected(observation: Observation, x: Float[Array, "t n"]) -> Float[Array, "t m"]:
    """C x + d at each time."""
    of = lambda o, x: o.C @ x + o.d  # noqa: E731
    return jax.vmap(of, (time_axes(observation), 0))(observation, x)


# --- one step -------------------------------------------------------------------------------------


def predict(law: Gaussian, transition: Transition) -> Gaussian:
    """The law of A x + b + N(0, Q)."""
    A, b, Q = transition
    return Gaussian(A @ law.mean + b, _symmetric(A @ law.covariance @ A.T + Q))


def update(law: Gaussian, observed: tuple[Observation, Array, Array | None]) -> FilteredGaussian:
    """Bayes' rule for one observation. If `where` is given, it says which entries of the observation exist."""
    (C, d, R), y, where = _without_missing(observed)
    mean, P = law
    residual = y - C @ mean - d
    solve, log_determinant = _positive_definite(C @ P @ C.T + R)
    gain = solve(C @ P).T
    count = y.size if where is None else jnp.sum(where, dtype=y.dtype)
    quadratic = residual @ solve(residual[:, None])[:, 0]
    log_density = -0.5 * (quadratic + log_determinant + count * math.log(2 * math.pi))
    return FilteredGaussian(mean + gain @ residual, _joseph(P, gain, C, R), mean, P, log_density)


def _without_missing(observed: tuple[Observation, Array, Array | None]) -> Any:
    """A missing entry becomes an observed zero that is N(0, 1) noise, which says nothing of the state."""
    (C, d, R), y, where = observed
    if where is None:
        return observed
    C, d, y = jnp.where(where[:, None], C, 0), jnp.where(where, d, 0), jnp.where(where, y, 0)
    R = jnp.where(where[:, None] & where[None, :], R, jnp.eye(y.size, dtype=R.dtype))
    return Observation(C, d, R), y, where


def _joseph(P: Array, gain: Array, C: Array, R: Array) -> Array:
    """The covariance of x - gain (C x + N(0, R)) for x of covariance P."""
    F = jnp.eye(P.shape[0], dtype=P.dtype) - gain @ C
    return _symmetric(F @ P @ F.T + gain @ R @ gain.T)


def _positive_definite(S: Array) -> tuple[Callable[[Array], Array], Array]:
    """The inverse of S, as a function, and the logarithm of its determinant.

    For a single number LAPACK is avoided: its calls would cost more than all the rest of a sequential filter.
    """
    if S.shape == (1, 1):
        return lambda B: B / S, jnp.log(S[0, 0])
    factor = jnp.linalg.cholesky(S)
    return lambda B: cho_solve((factor, True), B), 2 * jnp.log(jnp.diag(factor)).sum()


def _symmetric(P: Array) -> Array:
    return 0.5 * (P + P.T)


# --- the filter -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="parallel")
def kalman_filter(
    first: Gaussian,
    transition: Transition,
    observation: Observation,
    y: Float[Array, "t m"],
    where: Bool[Array, "t m"] | None,
    *,
    parallel: bool,
) -> FilteredGaussian:
    """The laws p(x_t | y_{0:t}) and p(x_t | y_{0:t-1}), and log p(y_t | y_{0:t-1}).

    In parallel, the associative scan gives the laws. Then one step of the filter from each law to the next, all steps
    at once, gives the rest. That step also removes most of what rounding did to the laws.
    """
    observed = (observation, y, where)
    observed_axes = (time_axes(observation), 0, None if where is None else 0)
    start = update(first, timewise.at(observed, observed_axes, 0))
    inputs = (transition, timewise.at(observed, observed_axes, slice(1, None)))
    axes = (time_axes(transition), observed_axes)

    def step(law: Gaussian, inputs: Any) -> tuple[Gaussian, FilteredGaussian]:
        out = update(predict(law, inputs[0]), inputs[1])
        return Gaussian(out.means, out.covariances), out

    law, length = Gaussian(start.means, start.covariances), len(y) - 1
    if parallel:
        elements = jax.vmap(_element, in_axes=axes, axis_size=length)(*inputs)
        elements = timewise.join(_first_element(law), elements)
        scanned = lax.associative_scan(jax.vmap(_combine), elements)
        laws = Gaussian(scanned.b[:-1], scanned.C[:-1])
        _, rest = jax.vmap(step, in_axes=(0, axes), axis_size=length)(laws, inputs)
    else:
        # The derivative keeps the laws and recomputes each step: a tenth of the memory, and no slower on CPUs.
        step = jax.checkpoint(step, prevent_cse=False)
        _, rest = timewise.scan(step, law, inputs, axes, length=length)
    return timewise.join(start, rest)


class _Element(NamedTuple):
    """p(x_t | x_s, y) = N(A x_s + b, C), and p(y | x_s) is proportional to exp(eta' x_s - x_s' J x_s / 2)."""

    A: Float[Array, "*t n n"]
    b: Float[Array, "*t n"]
    C: Float[Array, "*t n n"]
    eta: Float[Array, "*t n"]
    J: Float[Array, "*t n n"]


def _first_element(law: Gaussian) -> _Element:
    none = jnp.zeros_like(law.covariance)
    return _Element(none, law.mean, law.covariance, jnp.zeros_like(law.mean), none)


def _element(transition: Transition, observed: tuple[Observation, Array, Array | None]) -> _Element:
    (A, b, Q), ((C, d, R), y, _) = transition, _without_missing(observed)
    residual = y - C @ b - d
    solve, _ = _positive_definite(C @ Q @ C.T + R)
    gain = solve(C @ Q).T
    information = solve(C @ A).T
    return _Element(
        A - gain @ C @ A,
        b + gain @ residual,
        _joseph(Q, gain, C, R),
        information @ residual,
        _symmetric(information @ C @ A),
    )


def _combine(i: _Element, j: _Element) -> _Element:
    """The element from the start of i to the end of j. It takes one linear system, with the matrix I + C_i J_j."""
    n = i.b.size
    right = jnp.concatenate([i.A, i.C, (i.b + i.C @ j.eta)[:, None]], axis=1)
    solved = jnp.linalg.solve(jnp.eye(n, dtype=i.b.dtype) + i.C @ j.J, right)
    A, C, b = solved[:, :n], solved[:, n : 2 * n], solved[:, 2 * n]
    return _Element(
        j.A @ A,
        j.A @ b + j.b,
        _symmetric(j.A @ C @ j.A.T) + j.C,
        A.T @ (j.eta - j.J @ i.b) + i.eta,
        _symmetric(A.T @ j.J @ i.A) + i.J,
    )


# --- chains: the prior forwards, the posterior backwards ------------------------------------------


@functools.partial(jax.jit, static_argnames=("length", "reverse", "parallel"))
def marginals(
    first: Gaussian, transition: Transition, *, length: int, reverse: bool = False, parallel: bool
) -> Gaussian:
    """The laws of all states of the chain that starts with `first` (ends with it, if `reverse`)."""
    axes = time_axes(transition)
    if parallel:
        composed = _compose(transition, length, reverse)
        rest = jax.vmap(predict, in_axes=(None, 0), axis_size=length)(first, composed)
    else:

        def step(law: Gaussian, transition: Transition) -> tuple[Gaussian, Gaussian]:
            law = predict(law, transition)
            return law, law

        _, rest = timewise.scan(step, first, transition, axes, length=length, reverse=reverse)
    return timewise.join(first, rest, reverse=reverse)


@functools.partial(jax.jit, static_argnames=("length", "reverse", "parallel"))
def sample_path(
    key: PRNGKeyArray,
    first: Gaussian,
    transition: Transition,
    *,
    length: int,
    sizes: Float[Array, "s n"] | None = None,
    reverse: bool = False,
    parallel: bool,
) -> Float[Array, "t n"]:
    """A draw of the same chain. Once the noise is drawn, it is a deterministic affine recursion.

    `sizes` are as for `semidefinite_factor`, for each Q.
    """
    A, b, Q = transition
    noise = jax.random.normal(key, (length + 1, *first.mean.shape), first.mean.dtype)
    start = first.mean + semidefinite_factor(first.covariance)[0] @ noise[0]
    steps = _broadcast(b, length, 1) + colour(Q, noise[1:], sizes)
    if parallel:
        A, steps = _compose_affine((_broadcast(A, length, 2), steps), reverse)
        rest = A @ start + steps
    else:

        def step(x: Array, inputs: Any) -> tuple[Array, Array]:
            x = inputs[0] @ x + inputs[1]
            return x, x

        axes = (0 if A.ndim > 2 else None, 0)
        _, rest = timewise.scan(step, start, (A, steps), axes, length=length, reverse=reverse)
    return timewise.join(start, rest, reverse=reverse)


def colour(
    Q: Float[Array, "*t n n"], noise: Float[Array, "t n"], sizes: Float[Array, "t n"] | None = None
) -> Float[Array, "t n"]:
    """Draws of N(0, Q) from draws of N(0, I), Q constant or one for each."""
    if Q.ndim == 2:
        return noise @ semidefinite_factor(Q)[0].T
    axes = (0, 0, None if sizes is None else 0)
    return jax.vmap(lambda Q, z, s: semidefinite_factor(Q, s)[0] @ z, axes)(Q, noise, sizes)


def _compose(transition: Transition, length: int, reverse: bool) -> Transition:
    """The transitions from the chain's first state to each other one."""

    def then(i: Transition, j: Transition) -> Transition:
        return Transition(j.A @ i.A, j.A @ i.b + j.b, _symmetric(j.A @ i.Q @ j.A.T) + j.Q)

    ranks = zip(transition, (2, 1, 2), strict=True)
    every = Transition(*(_broadcast(x, length, rank) for x, rank in ranks))
    return lax.associative_scan(jax.vmap(then), every, reverse=reverse)


def _compose_affine(maps: tuple[Array, Array], reverse: bool) -> tuple[Array, Array]:
    def then(i: tuple[Array, Array], j: tuple[Array, Array]) -> tuple[Array, Array]:
        return j[0] @ i[0], j[0] @ i[1] + j[1]

    return lax.associative_scan(jax.vmap(then), maps, reverse=reverse)


def _broadcast(x: Array, length: int, rank: int) -> Array:
    return x if x.ndim > rank else jnp.broadcast_to(x, (length, *x.shape))


# --- the posterior --------------------------------------------------------------------------------


@jax.jit
def backward_chain(
    filtered: FilteredGaussian, transition: Transition
) -> tuple[Gaussian, Transition]:
    """The states given all observations as a chain that runs backwards from the last one."""
    laws = Gaussian(filtered.means, filtered.covariances)
    predicted = Gaussian(filtered.predicted_means, filtered.predicted_covariances)
    every = jax.vmap(_conditional, in_axes=(0, 0, time_axes(transition)))
    before, after = jax.tree.map(lambda x: x[:-1], laws), jax.tree.map(lambda x: x[1:], predicted)
    return jax.tree.map(lambda x: x[-1], laws), every(before, after, transition)


def _conditional(law: Gaussian, predicted: Gaussian, transition: Transition) -> Transition:
    """p(x_t | x_{t+1}, y_{0:t}) as x_t = E x_{t+1} + g + N(0, L)."""
    A, _, Q = transition
    E = semidefinite_solve(predicted.covariance, A @ law.covariance).T
    return Transition(E, law.mean - E @ predicted.mean, _joseph(law.covariance, E, A, Q))


@functools.partial(jax.jit, static_argnames="parallel")
def smoother(
    filtered: FilteredGaussian, transition: Transition, *, parallel: bool
) -> SmoothedGaussian:
    """The laws p(x_t | y), and the covariances of neighbours."""
    last, backwards = backward_chain(filtered, transition)
    length = len(filtered.means) - 1
    laws = marginals(last, backwards, length=length, reverse=True, parallel=parallel)
    return SmoothedGaussian(laws.mean, laws.covariance, backwards.A @ laws.covariance[1:])


# --- covariances that may be singular -------------------------------------------------------------


def semidefinite_factor(
    S: Float[Array, "n n"], sizes: Float[Array, " n"] | None = None
) -> tuple[Float[Array, "n n"], Int[Array, " n"]]:
    """G with G G' = S and the order of rows in which it is lower triangular, for positive semidefinite S.

    This is Cholesky's elimination on the scale of correlations. A pivot that is no larger than rounding makes a column
    of zeros. Rows keep their order unless a pivot would be small beside another one. So a small change of S changes the
    factor little. Deterministic parts of a state (the lags of an autoregression, a known start) give singular
    covariances.

    If S is the difference of larger variances, its rounding error is theirs. `sizes` are these variances, by default
    those of S.
    """
    n = S.shape[0]
    variance = jnp.diag(S) if sizes is None else sizes
    scale = jnp.sqrt(jnp.where(variance > 0, variance, 1))
    threshold = 2 * n * jnp.finfo(S.dtype).eps

    def eliminate(carry: tuple[Array, Array, Array], j: Array) -> Any:
        G, rest, left = carry
        pivots = jnp.where(left, jnp.diag(rest), -1)
        greatest = jnp.max(pivots)
        k = jnp.argmax(pivots >= jnp.minimum(0.1 * greatest, greatest))
        positive = rest[k, k] > threshold
        column = jnp.where(positive & left, rest[:, k], 0)
        column = column / jnp.sqrt(jnp.where(positive, rest[k, k], 1))
        rest = rest - column[:, None] * column[None, :]
        return (G.at[:, j].set(column), rest, left.at[k].set(False)), k

    start = (jnp.zeros_like(S), S / (scale[:, None] * scale[None, :]), jnp.ones(n, bool))
    (G, _, _), order = lax.scan(eliminate, start, jnp.arange(n))
    return scale[:, None] * G, order


def semidefinite_solve(S: Float[Array, "n n"], B: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """A solution X of S X = B, for positive semidefinite S and B in its range."""
    G, order = semidefinite_factor(S)
    L = G[order]
    null = jnp.diag(L) == 0
    L = L + jnp.diag(null.astype(S.dtype))
    z = jnp.where(null[:, None], 0, solve_triangular(L, B[order], lower=True))
    X = solve_triangular(L, z, lower=True, trans=1)
    return jnp.zeros_like(X).at[order].set(X)
