"""A mixture of two normals with ordered means: as a mixture, and with its labels as choices that are summed out.

    mu_1 < mu_2 with mu_k ~ N(0, 2),  sigma_k ~ half-N(0, 2),  theta ~ Beta(5, 5)
    y_n ~ theta N(mu_1, sigma_1) + (1 - theta) N(mu_2, sigma_2)

Without the order the posterior has two mirror images and no sampler's average means anything. The restricted prior is
the flat law on ordered vectors times the factor of the normal densities; its constant does not matter to a posterior.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from weft import Target, factor, gen, marginalize, repeat, sample


def _priors() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Means, standard deviations and the weights of the two components; component 1 has the smaller mean."""
    mu = sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = repeat(lambda: sample("sigma", dist.HalfNormal(2.0)), 2)
    theta = sample("theta", dist.Beta(5.0, 5.0))
    return mu, sigma, jnp.stack([theta, 1.0 - theta])


@gen
def mixture(num_points: int) -> jax.Array:
    """Independent points, each from a distribution that is a mixture."""
    mu, sigma, weights = _priors()
    law = dist.MixtureSameFamily(dist.Categorical(probs=weights), dist.Normal(mu, sigma))
    return repeat(lambda: sample("y", law), num_points, axis_name="point")


@gen
def labelled(num_points: int) -> jax.Array:
    """The same law: each point has a label, and comes from one component."""
    mu, sigma, weights = _priors()

    def point() -> jax.Array:
        z = sample("z", dist.Categorical(probs=weights))
        return sample("y", dist.Normal(mu[z], sigma[z]))

    return repeat(point, num_points, axis_name="point")


def target(data: dict[str, Any]) -> Target:
    """The posterior given the points."""
    return mixture(len(data["y"])).given({"y": data["y"]})


def labelled_target(data: dict[str, Any]) -> Target:
    """The same with the labels summed out."""
    return marginalize(labelled, "z")(len(data["y"])).given({"y": data["y"]})
