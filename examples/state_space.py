"""State-space models as scans: with their states, and with the states integrated out.

Each model comes twice. The joint program names every state: it is what one simulates, filters with particles or
samples by HMC. The collapsed program carries the law of the state instead, by Kalman's or the forward recursion, and
names the observations only: its density is the likelihood p(y), its sites' densities are the one-step predictive
densities, and it can be simulated like any other program. Both start at the law of the first state, which emits the
first observation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, Float

from weft import gen, sample


class LinearGaussian(NamedTuple):
    """x_0 ~ N(m0, P0),  x_t = A x_{t-1} + b + N(0, Q),  y_t = C x_t + d + N(0, R)."""

    A: Float[Array, "n n"]
    b: Float[Array, " n"]
    Q: Float[Array, "n n"]
    C: Float[Array, "m n"]
    d: Float[Array, " m"]
    R: Float[Array, "m m"]
    m0: Float[Array, " n"]
    P0: Float[Array, "n n"]


class HiddenMarkov(NamedTuple):
    """z_0 ~ pi,  z_t ~ P[z_{t-1}],  y_t ~ N(mu[z_t], sd[z_t])."""

    pi: Float[Array, " k"]
    P: Float[Array, "k k"]
    mu: Float[Array, " k"]
    sd: Float[Array, " k"]


@gen
def linear_gaussian(p: LinearGaussian, num_steps: int) -> Float[Array, "t m"]:
    """States "x" and observations "y" of a linear-Gaussian model. The carry is the law of the next state."""
    noise, transition, first = (jnp.linalg.cholesky(c) for c in (p.R, p.Q, p.P0))

    def step(law: tuple, _: None) -> tuple[tuple, Array]:
        mean, scale = law
        x = sample("x", dist.MultivariateNormal(mean, scale_tril=scale))
        y = sample("y", dist.MultivariateNormal(p.C @ x + p.d, scale_tril=noise))
        return (p.A @ x + p.b, transition), y

    return lax.scan(step, (p.m0, first), length=num_steps)[1]


@gen
def kalman(p: LinearGaussian, num_steps: int) -> Float[Array, "t m"]:
    """Observations "y" of the same model, the states integrated out by Kalman's recursion."""

    def step(law: tuple, _: None) -> tuple[tuple, Array]:
        mean, cov = law
        predicted, total = p.C @ mean + p.d, p.C @ cov @ p.C.T + p.R
        y = sample("y", dist.MultivariateNormal(predicted, total))
        gain = jnp.linalg.solve(total, p.C @ cov).T
        mean, cov = mean + gain @ (y - predicted), cov - gain @ total @ gain.T
        return (p.A @ mean + p.b, p.A @ cov @ p.A.T + p.Q), y

    return lax.scan(step, (p.m0, p.P0), length=num_steps)[1]


@gen
def hidden_markov(p: HiddenMarkov, num_steps: int) -> Float[Array, " t"]:
    """States "z" and observations "y" of a hidden Markov model. The carry is the law of the next state."""

    def step(probs: Array, _: None) -> tuple[Array, Array]:
        z = sample("z", dist.Categorical(probs=probs))
        return p.P[z], sample("y", dist.Normal(p.mu[z], p.sd[z]))

    return lax.scan(step, p.pi, length=num_steps)[1]


@gen
def forward(p: HiddenMarkov, num_steps: int) -> Float[Array, " t"]:
    """Observations "y" of the same model, the states summed out by the forward recursion."""
    emission = dist.Normal(p.mu, p.sd)

    def step(probs: Array, _: None) -> tuple[Array, Array]:
        y = sample("y", dist.MixtureSameFamily(dist.Categorical(probs=probs), emission))
        return jax.nn.softmax(jnp.log(probs) + emission.log_prob(y)) @ p.P, y

    return lax.scan(step, p.pi, length=num_steps)[1]
