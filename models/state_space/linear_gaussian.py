"""Linear-Gaussian state-space models as distributions over series of observations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.distributions import Distribution, constraints
from weft.ppl import ModelError, ObservationError
from weft.ppl.stage.compat import Tracer

from . import kalman, timewise
from .checks import (
    BUILT_BY_VMAP,
    as_series,
    axis_size,
    check_where,
    count_steps,
    over_leading,
    over_shape,
)
from .kalman import FilteredGaussian, Gaussian, Observation, SmoothedGaussian, Transition


class LinearGaussian(Distribution):
    r"""A series of observations of a linear-Gaussian state-space model, with the states integrated out.

    $$x_0 \sim N(m_0, P_0), \qquad x_t = A x_{t-1} + b + N(0, Q), \qquad y_t = C x_t + d + N(0, R)$$

    States have n dimensions, observations have m, and times are t = 0, ..., T - 1. The first state emits the first
    observation. The value is y, of shape (T, m). The density is that of the observations alone.

    `log_prob` is the Kalman filter. `smoother` is the one of Rauch, Tung and Striebel. `sample_states` filters forwards
    and samples backwards.

    Covariances may be singular: the lags of an autoregression, or a first state that is known. But the observations
    must have a density. So C P C' + R must be positive definite for the predicted covariances P, and with `parallel`
    also for Q in their place.

    In single precision a vague prior costs the smoother its first states. On a local linear trend they were off by .003
    of their standard deviations for prior variances of 1e3 times the noise's, and by .05 for 1e4. For 1e6 they were
    lost, and the filter was off by .006. Use double precision for vaguer priors.

    Args:
        m0: mean of the first state, shape (n,).
        P0: its covariance, (n, n).
        A: the transition from each state to the next, (n, n), or (T - 1, n, n) with one for each transition.
        Q: covariance of its noise, (n, n) or (T - 1, n, n).
        C: what is observed of the state, (m, n) or (T, m, n).
        R: covariance of its noise, (m, m) or (T, m, m).
        b: offset of the transition, (n,) or (T - 1, n); zero if not given.
        d: offset of the observation, (m,) or (T, m); zero if not given.
        num_steps: T; needed where nothing else has a time axis.
        where: a mask of the observations that exist, of shape (T,) for whole rows or (T, m) for single entries. What
            y holds elsewhere (NaN, say) is ignored. Draws have values everywhere.
        parallel: whether recursions over time are associative scans: O(log T) deep, several times the work.
        validate_args: whether concrete covariances are checked; NumPyro's default is that they are.

    Raises:
        ModelError: for shapes that do not fit one another, and for a covariance that is none.
        ObservationError: by the methods, for a series of another shape.

    References:
        Särkkä, Bayesian Filtering and Smoothing, 2013, theorem 4.2 for the filter and 8.2 for the smoother.
        Frühwirth-Schnatter, Data augmentation and dynamic linear models, 1994, for draws of the states.
        Särkkä and García-Fernández, Temporal parallelization of Bayesian smoothers, IEEE Transactions on Automatic
        Control 66, 2021, section IV, for `parallel`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from weft.models.state_space import LinearGaussian
        >>> d = LinearGaussian(  # level and slope; the level is observed
        ...     m0=jnp.zeros(2), P0=jnp.eye(2), A=jnp.array([[1.0, 1.0], [0.0, 1.0]]), Q=0.1 * jnp.eye(2),
        ...     C=jnp.array([[1.0, 0.0]]), R=jnp.eye(1), num_steps=50)
        >>> y = d.sample(jax.random.key(0))
        >>> y.shape, d.log_prob(y).shape, d.smoother(y).means.shape
        ((50, 1), (), (50, 2))
        >>> jax.vmap(d.sample_states, (0, None))(jax.random.split(jax.random.key(1), 7), y).shape
        (7, 50, 2)
        >>> ahead = d.forecast(y, num_steps=10)  # again such a distribution
        >>> ahead.mean.shape, ahead.variance.shape
        ((10, 1), (10, 1))
    """

    arg_constraints = {  # noqa: RUF012
        "m0": constraints.real_vector,
        "P0": constraints.positive_semidefinite,
        "A": constraints.real_matrix,
        "Q": constraints.positive_semidefinite,
        "C": constraints.real_matrix,
        "R": constraints.positive_semidefinite,
        "b": constraints.real_vector,
        "d": constraints.real_vector,
    }
    _support = constraints.real_matrix
    reparametrized_params = list(arg_constraints)  # noqa: RUF012
    pytree_data_fields = (*arg_constraints, "where")
    pytree_aux_fields = ("parallel", "_varying")
    m0: Array
    P0: Array
    A: Array
    Q: Array
    C: Array
    R: Array
    b: Array
    d: Array

    def __init__(
        self,
        m0: ArrayLike,
        P0: ArrayLike,
        A: ArrayLike,
        Q: ArrayLike,
        C: ArrayLike,
        R: ArrayLike,
        *,
        b: ArrayLike | None = None,
        d: ArrayLike | None = None,
        num_steps: int | None = None,
        where: ArrayLike | None = None,
        parallel: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        given = {"m0": m0, "P0": P0, "A": A, "Q": Q, "C": C, "R": R, "b": b, "d": d}
        parameters = {name: jnp.asarray(x) for name, x in given.items() if x is not None}
        dtype = jnp.result_type(float, *parameters.values())
        n, m = axis_size(parameters["m0"], -1), axis_size(parameters["C"], -2)
        parameters = {"b": jnp.zeros(n), "d": jnp.zeros(m), **parameters}
        lengths = _check_shapes(parameters, n, m)
        self._varying = tuple(sorted(lengths))
        self.where = None if where is None else jnp.asarray(where)
        if self.where is not None:
            lengths["where"] = check_where(self, self.where, m)
        steps = count_steps(self, lengths, num_steps)
        for name, x in parameters.items():
            setattr(self, name, x.astype(dtype))
        self.parallel = parallel
        super().__init__((), (steps, m), validate_args=validate_args)

    def validate_args(self, strict: bool = True) -> None:
        """Check that concrete covariances are symmetric and positive semidefinite."""
        for name in ("P0", "Q", "R"):
            S = getattr(self, name)
            if isinstance(S, Tracer) or not S.size:
                continue
            S = np.asarray(S, float)
            scale = np.sqrt(np.abs(np.diagonal(S, axis1=-2, axis2=-1)))
            scale = scale[..., :, None] * scale[..., None, :] + np.finfo(float).tiny
            if not np.all(np.abs(S - S.swapaxes(-1, -2)) <= 1e-4 * scale):
                raise ModelError(f"LinearGaussian: {name} is not symmetric, so it is no covariance")
            if np.linalg.eigvalsh(S / scale).min() < -1e-4 * S.shape[-1]:
                raise ModelError(
                    f"LinearGaussian: {name} has a negative eigenvalue, so it is no covariance; variances, "
                    "not precisions or Cholesky factors, are expected"
                )

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Series of observations, shape (*sample_shape, T, m)."""
        return self.sample_joint(key, sample_shape)[1]

    def sample_joint(
        self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Float[Array, "*s t n"], Float[Array, "*s t m"]]:
        """States and observations, shapes (*sample_shape, T, n) and (*sample_shape, T, m)."""
        first, transition, observation = self._model()
        length = self.event_shape[0] - 1

        def draw(key: Array) -> tuple[Array, Array]:
            of_x, of_y = jax.random.split(key)
            x = kalman.sample_path(of_x, first, transition, length=length, parallel=self.parallel)
            noise = jax.random.normal(of_y, self.event_shape, x.dtype)
            return x, kalman.expected(observation, x) + kalman.colour(observation.R, noise)

        return over_shape(draw, key, sample_shape)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Float[Array, "*s"]:
        """Log density of the observations. Missing ones are integrated out."""
        density = lambda y: self.filter(y).log_increments.sum()  # noqa: E731
        return over_leading(density, as_series(self, value), 2)

    def filter(self, y: ArrayLike) -> FilteredGaussian:
        """The laws of the states given the observations so far, and the log density as a sum of increments.

        Args:
            y: one series, shape (T, m).
        """
        y = as_series(self, y, exactly=True)
        model = self._model(y)
        y = y.astype(model[0].mean.dtype)
        return kalman.kalman_filter(*model, y, self._entries(), parallel=self.parallel)

    def smoother(self, y: ArrayLike) -> SmoothedGaussian:
        """The laws of the states given all observations: means, covariances, and covariances of neighbouring states.

        Args:
            y: one series, shape (T, m).
        """
        y = as_series(self, y, exactly=True)
        _, transition, _ = self._model(y)
        return kalman.smoother(self.filter(y), transition, parallel=self.parallel)

    def sample_states(self, key: PRNGKeyArray, y: ArrayLike) -> Float[Array, "t n"]:
        """A draw of all states given all observations, shape (T, n).

        For many draws use `jax.vmap` over keys: what does not depend on the key is computed once.

        Args:
            key: a random key.
            y: one series, shape (T, m).
        """
        y = as_series(self, y, exactly=True)
        _, transition, _ = self._model(y)
        filtered = self.filter(y)
        last, backwards = kalman.backward_chain(filtered, transition)
        return kalman.sample_path(
            key,
            last,
            backwards,
            length=len(y) - 1,
            sizes=jnp.diagonal(filtered.covariances[:-1], axis1=1, axis2=2),
            reverse=True,
            parallel=self.parallel,
        )

    def forecast(self, y: ArrayLike, num_steps: int) -> LinearGaussian:
        """The law of the next `num_steps` observations, given the first ones. It is a `LinearGaussian` again.

        Its `mean` and `variance` are the forecast of the observations, and `state_marginals()` that of the states.
        `sample` draws futures. `log_prob` scores what came.

        Args:
            y: the observations so far, shape (S, m) with S at most T.
            num_steps: how many to forecast. If parameters vary in time, at most T - S.
        """
        y = jnp.asarray(y)
        steps, m = self.event_shape
        if y.ndim != 2 or y.shape[1] != m or not 1 <= len(y) <= steps:
            raise ObservationError(
                f"LinearGaussian.forecast: y has shape {y.shape}, expected (S, {m}) with S from 1 to {steps}"
            )
        seen = len(y)
        if self._varying and seen + num_steps > steps:
            raise ModelError(
                f"LinearGaussian.forecast: {', '.join(self._varying)} vary in time and are known for {steps} steps, "
                f"so after {seen} observations at most {steps - seen} can be forecast, not {num_steps}. Make the "
                f"distribution with their values for {seen + num_steps} steps and give forecast the first {seen} rows"
            )
        past = self if seen == steps else self._window(0, seen, self.m0, self.P0)
        filtered = past.filter(y)
        transition = self._model(y)[1]
        transition = timewise.at(transition, kalman.time_axes(transition), seen - 1)
        law = kalman.predict(Gaussian(filtered.means[-1], filtered.covariances[-1]), transition)
        return self._window(seen, seen + num_steps, *law)

    def state_marginals(self) -> Gaussian:
        """Means (T, n) and covariances (T, n, n) of the states before any observation."""
        first, transition, _ = self._model()
        length = self.event_shape[0] - 1
        return kalman.marginals(first, transition, length=length, parallel=self.parallel)

    @property
    def mean(self) -> Float[Array, "t m"]:
        """E[y], shape (T, m)."""
        return kalman.expected(self._model()[2], self.state_marginals().mean)

    @property
    def variance(self) -> Float[Array, "t m"]:
        """Variances of the entries of y, shape (T, m)."""
        observation = self._model()[2]
        P = self.state_marginals().covariance
        of = lambda o, P: jnp.diag(o.C @ P @ o.C.T + o.R)  # noqa: E731
        return jax.vmap(of, (kalman.time_axes(observation), 0))(observation, P)

    def _model(self, y: Array | None = None) -> tuple[Gaussian, Transition, Observation]:
        """The parameters, in the dtype that the data ask for."""
        for name, constraint in self.arg_constraints.items():
            if getattr(self, name).ndim != constraint.event_dim + (name in self._varying):
                raise ModelError(BUILT_BY_VMAP.format("LinearGaussian"))
        dtype = self.A.dtype if y is None else jnp.result_type(self.A, y)
        m0, P0, A, Q, C, R, b, d = (getattr(self, x).astype(dtype) for x in self.arg_constraints)
        return Gaussian(m0, P0), Transition(A, b, Q), Observation(C, d, R)

    def _entries(self) -> Array | None:
        """`where` for each entry of y."""
        if self.where is None or self.where.ndim == 2:
            return self.where
        return jnp.broadcast_to(self.where[:, None], self.event_shape)

    def _window(self, start: int, stop: int, m0: Array, P0: Array) -> LinearGaussian:
        """The model of some of the steps, from the law of the first of their states."""
        rest = {name: getattr(self, name) for name in ("A", "Q", "C", "R", "b", "d")}
        for name in self._varying:
            rest[name] = rest[name][start : stop - 1 if name in "AQb" else stop]
        where = None if self.where is None or start else self.where[start:stop]
        return LinearGaussian(
            m0,
            P0,
            **rest,
            num_steps=stop - start,
            where=where,
            parallel=self.parallel,
            validate_args=False,
        )


def _check_shapes(parameters: Mapping[str, Array], n: int, m: int) -> dict[str, int]:
    """Check shapes against the dimensions of m0 and C. Gives T for the name of each parameter that varies in time."""
    shapes = {"m0": (n,), "P0": (n, n), "A": (n, n), "Q": (n, n), "b": (n,)}
    shapes |= {"C": (m, n), "R": (m, m), "d": (m,)}
    lengths = {}
    for name, x in parameters.items():
        timed = name not in ("m0", "P0")
        ahead = name in ("A", "Q", "b")
        if timed and x.ndim == len(shapes[name]) + 1 and x.shape[1:] == shapes[name]:
            lengths[name] = len(x) + ahead
        elif x.shape != shapes[name]:
            axis = f", or with a leading axis of {'T - 1' if ahead else 'T'} for one at each time"
            raise ModelError(
                f"LinearGaussian: {name} has shape {x.shape}, expected {shapes[name]}{axis if timed else ''}; m0 says "
                f"that states have {n} dimensions, C that observations have {m}. Many series are a jax.vmap"
            )
    return lengths
