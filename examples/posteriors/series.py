"""Time series: an autoregression, a hidden Markov model, and Brownian motion with a gap. A time axis is a `lax.scan`.

Sites inside a scan get a leading time axis, and observing one means conditioning each step on its datum; what a step
reads of the past travels in the carry.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions import constraints

from weft import Target, deterministic, factor, gen, marginalize, observed, repeat, sample


@gen
def autoregression(first: jax.Array, num_steps: int) -> jax.Array:
    """An AR(K) process after its `first` K values:  y_t ~ N(alpha + sum_k beta_k y_{t-k}, sigma)."""
    order = first.size
    alpha = sample("alpha", dist.Normal(0.0, 10.0))
    beta = sample("beta", dist.Normal(jnp.zeros(order), 10.0).to_event(1))
    sigma = sample("sigma", dist.HalfCauchy(2.5))

    def step(past: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        y = sample("y", dist.Normal(alpha + beta @ past, sigma))
        return jnp.concatenate([y[None], past[:-1]]), y  # the newest value comes first

    return lax.scan(step, first[::-1], length=num_steps)[1]


def autoregression_target(data: dict[str, Any]) -> Target:
    """The posterior given all values after the first K."""
    y, order = np.asarray(data["y"], float), data["K"]
    return autoregression(jnp.asarray(y[:order]), y.size - order).given({"y": y[order:]})


def _states() -> tuple[jax.Array, jax.Array]:
    """The transition matrix of two states, and the mean of what is seen in each."""
    theta = jnp.stack(
        [
            sample("theta1", dist.Dirichlet(jnp.ones(2))),
            sample("theta2", dist.Dirichlet(jnp.ones(2))),
        ]
    )
    mu = sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    return theta, mu


@gen
def hidden_markov(num_steps: int) -> jax.Array:
    """A hidden Markov model as its states are drawn; `marginalize` sums them out."""
    theta, mu = _states()

    def step(law: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        state = sample("state", dist.Categorical(probs=law))
        y = sample("y", dist.Normal(mu[state], 1.0))
        return theta[state], y

    return lax.scan(step, jnp.full(2, 0.5), length=num_steps)[1]


def hidden_markov_target(data: dict[str, Any]) -> Target:
    """The posterior on transition probabilities and means."""
    return marginalize(hidden_markov, "state")(len(data["y"])).given({"y": data["y"]})


@gen
def hidden_markov_by_hand(num_steps: int) -> jax.Array:
    """The same with its states summed out by hand.

    The carry is the law of the present state given the past. The law of y_t is then a mixture over it, and Bayes'
    rule and the transition matrix give the law of the next state: the forward recursion, one step a line.
    """
    theta, mu = _states()
    emission = dist.Normal(mu, 1.0)

    def step(state: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        y = sample("y", dist.MixtureSameFamily(dist.Categorical(probs=state), emission))
        posterior = jax.nn.softmax(jnp.log(state) + emission.log_prob(y))
        return posterior @ theta, y

    return lax.scan(step, jnp.full(2, 0.5), length=num_steps)[1]


def hidden_markov_by_hand_target(data: dict[str, Any]) -> Target:
    """The same posterior."""
    return hidden_markov_by_hand(len(data["y"])).given({"y": data["y"]})


@gen
def brownian(innovation: float, noise: float, num_steps: int) -> jax.Array:
    """Brownian motion from 0, observed with noise at every step."""

    def step(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x = sample("locs", dist.Normal(x, innovation))
        return x, sample("y", dist.Normal(x, noise))

    return lax.scan(step, jnp.array(0.0), length=num_steps)[1]


def brownian_target(data: dict[str, Any]) -> Target:
    """The path given its observations; those that are missing carry no likelihood."""
    y = np.array(data["y"], float)  # null becomes nan
    data_seen = observed(y, where=~np.isnan(y), missing="drop")
    return brownian(0.1, 0.15, y.size).given({"y": data_seen})


@gen
def brownian_unknown_scales(times: np.ndarray, seen: np.ndarray, y: jax.Array) -> jax.Array:
    """Brownian motion with both scales unknown, factored as  p(q, r) p(y | q, r) p(path | q, r, y).

    Written as in `brownian`, the path is tied to both scales, and the posterior is a funnel in each of them: centred
    or not, NUTS is biased there. The path is Gaussian given the scales, so the same joint law is written the other
    way round: first the observations with the path integrated out, then the path given them, from standard normals.
    The geometry left is that of the two scales alone.

    Args:
        times: the time of each location.
        seen: the indices of the times that are observed.
        y: the observations, which the law of the path reads. They are also the datum of the site "y".
    """
    q = sample("innovation_noise_scale", dist.LogNormal(0.0, 2.0))
    r = sample("observation_noise_scale", dist.LogNormal(0.0, 2.0))

    prior = q**2 * jnp.minimum(times[:, None], times)  # the covariance of Brownian motion
    cross = prior[:, seen]
    total = cross[seen] + r**2 * jnp.eye(seen.size)
    sample("y", dist.MultivariateNormal(0.0, total))

    gain = jnp.linalg.solve(total, cross.T).T
    # The exact covariance is singular to rounding at observed times when r is small, hence the jitter.
    covariance = prior - gain @ cross.T + 1e-12 * jnp.eye(times.size)
    noise = repeat(lambda: sample("locs_tilde", dist.Normal(0.0, 1.0)), times.size)
    return deterministic("locs", gain @ y + jnp.linalg.cholesky(covariance) @ noise)


def brownian_unknown_scales_target(data: dict[str, Any]) -> Target:
    """The posterior on the two scales and the path."""
    y = np.array(data["y"], float)
    seen = np.flatnonzero(~np.isnan(y))
    program = brownian_unknown_scales(1.0 + np.arange(y.size), seen, jnp.asarray(y[seen]))
    return program.given({"y": y[seen]})
