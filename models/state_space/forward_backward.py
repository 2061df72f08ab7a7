"""Filtering, smoothing, decoding and sampling of one hidden Markov chain, sequentially or in parallel over time.

A chain is given by its log potentials,

    log p(z, y) = log_initial[z_0] + sum_t log_transition_t[z_t, z_{t+1}] + sum_t log_likelihoods[t, z_t],

any of which may be -inf. Everything is computed in logarithms and normalised at each time. The file rests on three
ideas:

- The filter with sums replaced by maxima is Viterbi's recursion.
- Given the filter, z_t is a function of z_{t+1} alone. For Viterbi's path it is the best predecessor. For a draw of the
  posterior it is the best predecessor after Gumbel noise was added. A path follows these maps backwards.
- Both recursions are associative: the first is a product of K x K matrices, the second a composition of maps. In
  parallel they are associative scans, at K times the work.

References:
    Rabiner, A tutorial on hidden Markov models, Proceedings of the IEEE 77, 1989: forward (19)-(21), backward
        (24)-(25), marginals (27), transitions (37), Viterbi (32)-(35).
    Hassan, Särkkä and García-Fernández, Temporal parallelization of inference in hidden Markov models, IEEE
        Transactions on Signal Processing 69, 2021.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from . import timewise


class Potentials(NamedTuple):
    """The log potentials of a chain. `inside` is false for the transitions after the end of a shorter series."""

    log_initial: Float[Array, " k"]
    log_transition: Float[Array, "*s k k"]
    log_likelihoods: Float[Array, "t k"]
    inside: Bool[Array, " s"] | None

    @property
    def transitions(self) -> Float[Array, "#s k k"]:
        """The transitions with a time axis, which has size one if they are all the same."""
        constant = self.log_transition.ndim == 2
        return self.log_transition[None] if constant else self.log_transition

    @property
    def steps(self) -> tuple[Any, Any]:
        """The inputs of the transition to each time but the first, and their axes."""
        axis = 0 if self.log_transition.ndim > 2 else None
        inputs = (self.log_transition, self.log_likelihoods[1:], self.inside)
        return inputs, (axis, 0, None if self.inside is None else 0)


class FilteredStates(NamedTuple):
    """The result of `HiddenMarkov.filter`.

    Attributes:
        probs: P(z_t = k | y_{0:t}), shape (T, K).
        log_increments: log p(y_t | y_{0:t-1}), shape (T,); they sum to the log density of y.
    """

    probs: Float[Array, "t k"]
    log_increments: Float[Array, " t"]


class SmoothedStates(NamedTuple):
    """The result of `HiddenMarkov.smoother`.

    Attributes:
        probs: P(z_t = k | y), shape (T, K).
        transition_counts: the expected number of transitions from i to j given y, shape (K, K).
    """

    probs: Float[Array, "t k"]
    transition_counts: Float[Array, "k k"]


class ViterbiPath(NamedTuple):
    """The result of `HiddenMarkov.viterbi`.

    Attributes:
        states: the most probable states, shape (T,).
        log_density: log p(states, y). No other path has a higher one.
    """

    states: Int[Array, " t"]
    log_density: Float[Array, ""]


# --- logarithms of what may be zero ---------------------------------------------------------------


@jax.jit
def safe_log(p: Array) -> Array:
    """The logarithm; at zero it is -inf with a derivative of zero."""
    positive = p > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, p, 1)), -jnp.inf)


def logsumexp(x: Array, axis: int) -> Array:
    """Log of the sum of exponentials. Where all terms are -inf it is -inf, with a derivative of zero."""
    top = lax.stop_gradient(jnp.max(x, axis, keepdims=True))
    top = _or_zero(top)
    total = jnp.exp(x - top).sum(axis)
    return safe_log(total) + top.squeeze(axis)


def _or_zero(x: Array) -> Array:
    """Zero in place of -inf, so that the result may be subtracted: -inf - 0 is well defined."""
    return jnp.where(x == -jnp.inf, 0, x)


def normalised(law: Array) -> Array:
    """A law in logarithms, scaled to sum to one unless it is zero everywhere."""
    return law - _or_zero(logsumexp(law, -1))[..., None]


# --- recursions -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("total", "parallel"))
def forward(
    chain: Potentials, *, total: Callable[..., Array] = logsumexp, parallel: bool = False
) -> tuple[Float[Array, "t k"], Float[Array, " t"]]:
    """The filter log p(z_t | y_{0:t}) and log p(y_t | y_{0:t-1}).

    With `total=jnp.max` it is Viterbi's recursion. Then the first result is the best log density of a path that ends in
    each state, less that of the best path of all. The second holds the increments of the latter.
    """

    def normalise(joint: Array) -> tuple[Array, Array]:
        increment = total(joint, 0)
        return joint - _or_zero(increment), increment

    def step(law: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
        log_transition, log_likelihood, inside = inputs
        new, increment = normalise(total(law[:, None] + log_transition, 0) + log_likelihood)
        if inside is not None:
            new, increment = jnp.where(inside, new, law), jnp.where(inside, increment, 0)
        return new, (new, increment)

    start = normalise(chain.log_initial + chain.log_likelihoods[0])
    inputs, axes = chain.steps
    length = len(inputs[1])
    if parallel:
        products = _products(chain, total)
        laws, _ = jax.vmap(normalise)(total(start[0][None, :, None] + products, 1))
        laws = jnp.concatenate([start[0][None], laws])[:-1]
        _, rest = jax.vmap(step, in_axes=(0, axes), axis_size=length)(laws, inputs)
    else:
        _, rest = timewise.scan(step, start[0], inputs, axes, length=length)
    return timewise.join(start, rest)


@functools.partial(jax.jit, static_argnames="parallel")
def backward(chain: Potentials, *, parallel: bool = False) -> Float[Array, "t k"]:
    """Log p(y_{t+1:} | z_t), each up to a constant."""
    inputs, axes = chain.steps
    last = jnp.zeros_like(chain.log_initial)

    def step(message: Array, inputs: Any) -> tuple[Array, Array]:
        log_transition, log_likelihood, inside = inputs
        ahead = log_transition + (log_likelihood + message)[None, :]
        new = _scaled(logsumexp(ahead, 1), 1)
        new = new if inside is None else jnp.where(inside, new, message)
        return new, new

    if parallel:
        rest = logsumexp(_products(chain, logsumexp, reverse=True), 2)
    else:
        length = len(inputs[1])
        _, rest = timewise.scan(step, last, inputs, axes, length=length, reverse=True)
    return timewise.join(last, rest, reverse=True)


def _products(
    chain: Potentials, total: Callable[..., Array], *, reverse: bool = False
) -> Float[Array, "s k k"]:
    """The products from the first state to each other state, up to a constant; with `reverse`, from each to the last.

    A product has K^3 terms at each time. For the derivative they are computed again rather than kept.
    """
    matrices = chain.transitions + chain.log_likelihoods[1:, None, :]
    if chain.inside is not None:
        same = jnp.eye(matrices.shape[-1], dtype=bool)[None]
        unit = jnp.where(same, 0, -jnp.inf).astype(matrices.dtype)
        matrices = jnp.where(chain.inside[:, None, None], matrices, unit)

    @jax.checkpoint
    def multiply(a: Array, b: Array) -> Array:
        a, b = (b, a) if reverse else (a, b)
        return _scaled(total(a[..., :, :, None] + b[..., None, :, :], -2), 2)

    return lax.associative_scan(multiply, matrices, reverse=reverse)


def _scaled(x: Array, rank: int) -> Array:
    """Shifted so that the greatest entry is 0. That keeps logarithms small enough for single precision."""
    return x - _or_zero(lax.stop_gradient(x.max(tuple(range(-rank, 0)), keepdims=True)))


@functools.partial(jax.jit, static_argnames="parallel")
def smoother(chain: Potentials, *, parallel: bool = False) -> SmoothedStates:
    """Marginals of the states and of the transitions given all observations."""
    law, _ = forward(chain, parallel=parallel)
    message = backward(chain, parallel=parallel)
    ahead = chain.log_likelihoods[1:] + message[1:]
    pairs = law[:-1, :, None] + chain.transitions + ahead[:, None, :]
    probs = jnp.exp(pairs - _or_zero(logsumexp(logsumexp(pairs, 2), 1))[:, None, None])
    if chain.inside is not None:
        probs = jnp.where(chain.inside[:, None, None], probs, 0)
    return SmoothedStates(jnp.exp(normalised(law + message)), probs.sum(0))


@functools.partial(jax.jit, static_argnames="parallel")
def viterbi(chain: Potentials, *, parallel: bool = False) -> ViterbiPath:
    """The path of greatest density. If several are equally good, the result is one of them, never a mixture."""
    law, increments = forward(chain, total=jnp.max, parallel=parallel)
    path = _follow_back(chain, law, jnp.zeros_like(law), parallel)
    return ViterbiPath(path, increments.sum())


@functools.partial(jax.jit, static_argnames="parallel")
def sample_posterior(
    key: PRNGKeyArray, chain: Potentials, *, parallel: bool = False
) -> Int[Array, " t"]:
    """A draw of the states given the observations: filter forwards, then draw backwards."""
    law, _ = forward(chain, parallel=parallel)
    return _follow_back(chain, law, jax.random.gumbel(key, law.shape, law.dtype), parallel)


@functools.partial(jax.jit, static_argnames="parallel")
def sample_prior(
    key: PRNGKeyArray, chain: Potentials, *, parallel: bool = False
) -> Int[Array, " t"]:
    """A draw of the states before any observation."""
    shape = chain.log_likelihoods.shape
    noise = jax.random.gumbel(key, shape, chain.log_initial.dtype)
    start = jnp.argmax(chain.log_initial + noise[0])
    maps = _stay_outside(chain, jnp.argmax(chain.transitions + noise[1:, None, :], 2))
    return _follow(maps, start, reverse=False, parallel=parallel)


def _follow_back(chain: Potentials, law: Array, noise: Array, parallel: bool) -> Int[Array, " t"]:
    """The last state, then the predecessor of each. All states share one noise, since only one of them is visited."""
    last = jnp.argmax(law[-1] + noise[-1])
    before = (law + noise)[:-1, :, None]
    maps = _stay_outside(chain, jnp.argmax(before + chain.transitions, 1))
    return _follow(maps, last, reverse=True, parallel=parallel)


def _stay_outside(chain: Potentials, maps: Int[Array, "s k"]) -> Int[Array, "s k"]:
    if chain.inside is None:
        return maps
    stay = jnp.arange(maps.shape[1], dtype=maps.dtype)[None, :]
    return jnp.where(chain.inside[:, None], maps, stay)


def _follow(
    maps: Int[Array, "s k"], start: Int[Array, ""], *, reverse: bool, parallel: bool
) -> Int[Array, " t"]:
    """The states to which the maps lead from the first state (from the last, if `reverse`)."""
    if parallel:
        then = lambda f, g: jnp.take_along_axis(g, f, -1)  # noqa: E731
        rest = lax.associative_scan(then, maps, reverse=reverse)[:, start]
    else:
        _, rest = lax.scan(lambda z, f: (f[z], f[z]), start, maps, reverse=reverse)
    return timewise.join(start, rest, reverse=reverse)
