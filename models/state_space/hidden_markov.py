"""Hidden Markov models as distributions over series of observations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray
from numpyro.distributions import Distribution, constraints
from weft.ppl import ModelError, ObservationError
from weft.ppl.stage.compat import Tracer

from . import forward_backward
from .checks import (
    BUILT_BY_VMAP,
    as_series,
    axis_size,
    check_where,
    count_steps,
    over_leading,
    over_shape,
)
from .forward_backward import FilteredStates, Potentials, SmoothedStates, ViterbiPath


class HiddenMarkov(Distribution):
    r"""A series of observations of a hidden Markov model, with the states summed out.

    $$z_0 \sim \mathrm{initial}, \qquad z_t \sim \mathrm{transition}[z_{t-1}], \qquad
    y_t \sim \mathrm{emission\ given}\ z_t$$

    There are K states, and times are t = 0, ..., T - 1. The first state emits the first observation. The value is y, of
    shape (T, *event). The density is that of the observations alone.

    `log_prob` is the forward recursion, `smoother` is forward-backward, and `viterbi` is Viterbi's recursion. All of
    them compute in logarithms. So probabilities of zero and likelihoods of -inf are exact, and their derivatives are
    zero, never NaN.

    Without an emission the value is the log likelihoods themselves, of shape (T, K), computed elsewhere. Then
    `log_prob(evidence)` is the log of the sum over paths, `log sum_z p(z) exp(sum_t evidence[t, z_t])`, to be used in
    `weft.factor`. Labels enter in this way: let `labels` be zero for the states that are possible at a time and -inf
    for the others. Then `HiddenMarkov(initial, transition, num_steps=T)` takes `d.log_likelihoods(y) + labels`.

    Args:
        initial: probabilities of the first state, shape (K,).
        transition: transition[i, j] = P(z_t = j | z_{t-1} = i), (K, K), or (T - 1, K, K) with one for each transition.
        emission: a distribution of batch shape (K,), or (T, K) if it varies in time. None if the value is log
            likelihoods.
        num_steps: T; needed where nothing else has a time axis.
        where: a mask of the observations that exist, of shape (T,). What y holds elsewhere is ignored.
        length: the number of steps of a shorter series that is padded to T; it may differ under `jax.vmap`. What
            stands after the end counts for nothing, and states there repeat the last one.
        parallel: whether recursions over time are associative scans: O(log T) deep, K times the work.
        validate_args: whether concrete probabilities are checked; NumPyro's default is that they are.

    Raises:
        ModelError: for shapes that do not fit one another, and for probabilities that do not sum to one.
        ObservationError: by the methods, for a series of another shape.

    References:
        Rabiner, A tutorial on hidden Markov models, Proceedings of the IEEE 77, 1989: equations 19-21 for the forward
        recursion, 24-27 and 37 for the smoother, 32-35 for Viterbi's.
        Hassan, Särkkä and García-Fernández, Temporal parallelization of inference in hidden Markov models, IEEE
        Transactions on Signal Processing 69, 2021, for `parallel`.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft.models.state_space import HiddenMarkov
        >>> d = HiddenMarkov(
        ...     jnp.array([0.5, 0.5]), jnp.array([[0.9, 0.1], [0.3, 0.7]]),
        ...     dist.Normal(jnp.array([-1.0, 1.0]), 0.5), num_steps=6)
        >>> y = jnp.array([-1.2, -0.9, 0.8, 1.1, 1.3, -0.7])
        >>> print(d.viterbi(y).states)
        [0 0 1 1 1 0]
        >>> d.smoother(y).probs.shape, d.log_prob(y).shape
        ((6, 2), ())
        >>> missing = HiddenMarkov(d.initial, d.transition, d.emission, where=jnp.arange(6) != 3)
        >>> bool(missing.log_prob(y.at[3].set(jnp.nan)) > d.log_prob(y))
        True
        >>> print(d.forecast(y, num_steps=200).state_marginals()[-1].round(2))
        [0.75 0.25]
    """

    arg_constraints = {  # noqa: RUF012
        "initial": constraints.simplex,
        "transition": constraints.independent(constraints.simplex, 1),
    }
    pytree_data_fields = ("initial", "transition", "emission", "where", "length")
    pytree_aux_fields = ("parallel", "_varying")

    def __init__(
        self,
        initial: ArrayLike,
        transition: ArrayLike,
        emission: Distribution | None = None,
        *,
        num_steps: int | None = None,
        where: ArrayLike | None = None,
        length: ArrayLike | None = None,
        parallel: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        initial, transition = jnp.asarray(initial), jnp.asarray(transition)
        dtype = jnp.result_type(float, initial, transition)
        K = axis_size(initial, -1)
        if initial.ndim != 1 or transition.ndim not in (2, 3) or transition.shape[-2:] != (K, K):
            raise ModelError(
                f"HiddenMarkov: initial has shape {initial.shape} and transition {transition.shape}; expected (K,) and "
                "(K, K), or (T - 1, K, K) with a matrix for each transition. Many series are a jax.vmap"
            )
        lengths = {"transition": len(transition) + 1} if transition.ndim == 3 else {}
        event_shape: tuple[int, ...] = (K,)
        if emission is not None:
            event_shape = _check_emission(emission, K)
            if len(emission.batch_shape) == 2:
                lengths["emission"] = emission.batch_shape[0]
        self._varying = tuple(sorted(lengths))
        self.where = None if where is None else jnp.asarray(where)
        if self.where is not None:
            lengths["where"] = check_where(self, self.where, None)
        steps = count_steps(self, lengths, num_steps)
        self.length = None if length is None else jnp.asarray(length)
        if self.length is not None:
            _check_length(self.length, steps)
        self.initial, self.transition = initial.astype(dtype), transition.astype(dtype)
        self.emission = emission
        self.parallel = parallel
        super().__init__((), (steps, *event_shape), validate_args=validate_args)

    def validate_args(self, strict: bool = True) -> None:
        """Check that concrete probabilities are not below zero and sum to one."""
        for name in ("initial", "transition"):
            p = getattr(self, name)
            if isinstance(p, Tracer) or not p.size:
                continue
            p = np.asarray(p, float)
            if not (np.all(p >= 0) and np.all(np.abs(p.sum(-1) - 1) < 1e-4)):
                raise ModelError(
                    f"HiddenMarkov: {name} must hold probabilities that sum to one over the last axis; the least is "
                    f"{p.min():.4g}, and the sums go from {p.sum(-1).min():.6g} to {p.sum(-1).max():.6g}. "
                    "transition[i, j] is the probability of going from i to j"
                )

    @property
    def support(self) -> Any:
        """The support of the emission, at each time."""
        if self.emission is None:
            return constraints.real_matrix
        support = self.emission.support
        if support is None or any(jnp.ndim(x) for x in jax.tree.leaves(support)):
            raise NotImplementedError("the support of an observation depends on the state")
        return constraints.independent(support, 1)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Series of observations, shape (*sample_shape, T, *event)."""
        return self.sample_joint(key, sample_shape)[1]

    def sample_joint(
        self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Int[Array, "*s t"], Array]:
        """States and observations, shapes (*sample_shape, T) and (*sample_shape, T, *event).

        At each time, observations are drawn for all K states, and one of them is kept.
        """
        emission = self.emission
        if emission is None:
            raise NotImplementedError(
                "HiddenMarkov without an emission has no observations to draw"
            )
        steps = self.event_shape[0]
        chain = self._chain(jnp.zeros((steps, len(self.initial)), self.initial.dtype))

        def draw(key: Array) -> tuple[Array, Array]:
            of_z, of_y = jax.random.split(key)
            z = forward_backward.sample_prior(of_z, chain, parallel=self.parallel)
            shape = (steps,) if len(emission.batch_shape) == 1 else ()
            every = jnp.asarray(emission.sample(of_y, shape))
            return z, every[jnp.arange(steps), z]

        return over_shape(draw, key, sample_shape)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Float[Array, "*s"]:
        """Log density of the observations. Missing ones are summed out."""
        density = lambda y: self.filter(y).log_increments.sum()  # noqa: E731
        return over_leading(density, as_series(self, value), len(self.event_shape))

    def log_likelihoods(self, y: ArrayLike) -> Float[Array, "t k"]:
        """Log p(y_t | z_t = k), of shape (T, K). It is zero where there is no observation.

        Args:
            y: one series, shape (T, *event). Without an emission, the log likelihoods themselves.
        """
        self._check_made_here()
        y = as_series(self, y, exactly=True)
        steps, K = self.event_shape[0], len(self.initial)
        seen = self.where
        if self.length is not None:
            inside = jnp.arange(steps) < self.length
            seen = inside if seen is None else seen & inside
        if seen is None:
            return self._emitted(y[:, None])
        if self.emission is None:
            return jnp.where(seen[:, None], y, 0)
        # What is missing is replaced before the density is taken, else its derivatives may be NaN.
        shape = (steps, K, *self.event_shape[1:])
        instead = _feasible(self.emission, jnp.zeros(shape, y.dtype))
        there = seen.reshape((steps,) + (1,) * (len(shape) - 1))
        return jnp.where(seen[:, None], self._emitted(jnp.where(there, y[:, None], instead)), 0)

    def filter(self, y: ArrayLike) -> FilteredStates:
        """Probabilities of the states given the observations so far, and the log density as a sum of increments.

        Args:
            y: one series, shape (T, *event).
        """
        law, increments = forward_backward.forward(self._chain_of(y), parallel=self.parallel)
        return FilteredStates(jnp.exp(law), increments)

    def smoother(self, y: ArrayLike) -> SmoothedStates:
        """Probabilities of the states given all observations, and the expected number of each transition.

        Args:
            y: one series, shape (T, *event).
        """
        return forward_backward.smoother(self._chain_of(y), parallel=self.parallel)

    def viterbi(self, y: ArrayLike) -> ViterbiPath:
        """The most probable path of the states, and the log density of that path and y together.

        Args:
            y: one series, shape (T, *event).
        """
        return forward_backward.viterbi(self._chain_of(y), parallel=self.parallel)

    def sample_states(self, key: PRNGKeyArray, y: ArrayLike) -> Int[Array, " t"]:
        """A draw of all states given all observations, shape (T,).

        For many draws use `jax.vmap` over keys: what does not depend on the key is computed once.

        Args:
            key: a random key.
            y: one series, shape (T, *event).
        """
        chain = self._chain_of(y)
        return forward_backward.sample_posterior(key, chain, parallel=self.parallel)

    def forecast(self, y: ArrayLike, num_steps: int) -> HiddenMarkov:
        """The law of the next `num_steps` observations, given the first ones. It is a `HiddenMarkov` again.

        Its `state_marginals()` are the forecast of the states. `mean` and `variance` are that of the observations.

        Args:
            y: the observations so far, shape (S, *event) with S at most T.
            num_steps: how many to forecast. If the transition varies in time, at most T - S. An emission that varies
                in time is refused.
        """
        y = jnp.asarray(y)
        steps, event_shape = self.event_shape[0], self.event_shape[1:]
        if y.shape[1:] != event_shape or not 1 <= len(y) <= steps:
            raise ObservationError(
                f"HiddenMarkov.forecast: y has shape {y.shape}, expected (S,) + {event_shape} with S from 1 to {steps}"
            )
        seen = len(y)
        if "emission" in self._varying:
            raise ModelError(
                "HiddenMarkov.forecast: the emission varies in time. Make the distribution for the past and the "
                "future, with where= false in the future: its smoother gives the states of both"
            )
        if self._varying and seen + num_steps > steps:
            raise ModelError(
                f"HiddenMarkov.forecast: transition varies in time and is known for {steps} steps, so after {seen} "
                f"observations at most {steps - seen} can be forecast, not {num_steps}"
            )
        past = self if seen == steps else self._window(0, seen, self.initial)
        law = past.filter(y).probs[-1]
        next_one = self.transition[seen - 1] if self._varying else self.transition
        return self._window(seen, seen + num_steps, law @ next_one)

    def state_marginals(self) -> Float[Array, "t k"]:
        """Probabilities (T, K) of the states before any observation."""
        nothing = jnp.zeros((self.event_shape[0], len(self.initial)), self.initial.dtype)
        law, _ = forward_backward.forward(self._chain(nothing), parallel=self.parallel)
        return jnp.exp(law)

    @property
    def mean(self) -> Array:
        """E[y], shape (T, *event)."""
        return self._average(self._emission().mean)

    @property
    def variance(self) -> Array:
        """Variances of the entries of y, shape (T, *event)."""
        emission = self._emission()
        return self._average(emission.variance + (emission.mean - self.mean[:, None]) ** 2)

    def _emission(self) -> Distribution:
        if self.emission is None:
            raise NotImplementedError("HiddenMarkov without an emission has no observations")
        return self.emission

    def _emitted(self, y: Array) -> Array:
        if self.emission is None:
            return y[:, 0]
        return jnp.asarray(self.emission.log_prob(y))

    def _average(self, by_state: Array) -> Array:
        """The mean, over the states at each time, of a quantity that is given for each state."""
        shape = (self.event_shape[0], len(self.initial), *self.event_shape[1:])
        by_state = jnp.broadcast_to(by_state, shape)
        return jnp.einsum("tk,tk...->t...", self.state_marginals(), by_state)

    def _chain_of(self, y: ArrayLike) -> Potentials:
        return self._chain(self.log_likelihoods(y))

    def _check_made_here(self) -> None:
        if (self.initial.ndim, self.transition.ndim) != (1, 2 + ("transition" in self._varying)):
            raise ModelError(BUILT_BY_VMAP.format("HiddenMarkov"))

    def _chain(self, log_likelihoods: Array) -> Potentials:
        self._check_made_here()
        dtype = jnp.result_type(self.initial, log_likelihoods)
        log = lambda p: forward_backward.safe_log(p.astype(dtype))  # noqa: E731
        inside = None
        if self.length is not None:
            inside = jnp.arange(1, self.event_shape[0]) < self.length
        potentials = log(self.initial), log(self.transition), log_likelihoods.astype(dtype)
        return Potentials(*potentials, inside)

    def _window(self, start: int, stop: int, initial: Array) -> HiddenMarkov:
        """The model of some of the steps, from the law of the first of their states."""
        varying = "transition" in self._varying
        past = start == 0
        return HiddenMarkov(
            initial,
            self.transition[start : stop - 1] if varying else self.transition,
            self.emission,
            num_steps=stop - start,
            where=self.where[:stop] if past and self.where is not None else None,
            length=jnp.minimum(self.length, stop) if past and self.length is not None else None,
            parallel=self.parallel,
            validate_args=False,
        )


def _check_emission(emission: Any, K: int) -> tuple[int, ...]:
    if not isinstance(emission, Distribution):
        raise ModelError(
            f"HiddenMarkov: emission must be a distribution over one observation, got {type(emission).__name__}. Log "
            "likelihoods computed elsewhere are the value of a HiddenMarkov without emission: "
            "HiddenMarkov(initial, transition, num_steps=T).log_prob(log_likelihoods)"
        )
    shape = emission.batch_shape
    if len(shape) not in (1, 2) or shape[-1] != K:
        raise ModelError(
            f"HiddenMarkov: emission has batch shape {shape}, expected ({K},) with a distribution for each of the {K} "
            f"states, or (T, {K}). Its event shape is {emission.event_shape}: axes of one observation belong there "
            "(to_event)"
        )
    return emission.event_shape


def _check_length(length: Array, steps: int) -> None:
    if length.shape != () or not jnp.issubdtype(length.dtype, jnp.integer):
        raise ModelError(
            f"HiddenMarkov: length must be one integer, the length of one series, got {length.dtype} of shape "
            f"{length.shape}. Several series are a jax.vmap over their lengths"
        )
    if not isinstance(length, Tracer) and not 1 <= int(length) <= steps:
        raise ModelError(f"HiddenMarkov: length must be from 1 to {steps}, got {int(length)}")


def _feasible(d: Distribution, prototype: Array) -> Array:
    """A value in the support of each of a batch of distributions, or zero where that is not known."""
    support: Any = d.support
    try:
        return support.feasible_like(prototype).astype(prototype.dtype)
    except (AttributeError, NotImplementedError):
        return prototype
