"""A mixture of two normals, its labels summed out and its means ordered.

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

from weft import Target, factor, gen, repeat, sample


@gen
def mixture(num_points: int) -> jax.Array:
    """Independent points of a two-component mixture; component 1 has the smaller mean."""
    mu = sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = repeat(lambda: sample("sigma", dist.HalfNormal(2.0)), 2)
    theta = sample("theta", dist.Beta(5.0, 5.0))

    weights = dist.Categorical(probs=jnp.stack([theta, 1.0 - theta]))
    component = dist.Normal(mu, sigma)
    point = lambda: sample("y", dist.MixtureSameFamily(weights, component))  # noqa: E731
    return repeat(point, num_points, axis_name="point")


def target(data: dict[str, Any]) -> Target:
    """The posterior given the points."""
    return mixture(len(data["y"])).given({"y": data["y"]})
