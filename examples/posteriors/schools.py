"""Eight schools: a hierarchical normal model, and the same model non-centred.

    mu ~ N(0, 5),  tau ~ half-Cauchy(0, 5),  theta_j ~ N(mu, tau),  y_j ~ N(theta_j, sigma_j)

The model is written once. As it stands its posterior is a funnel: where tau is small all theta_j are close to mu, and
no one step size suits both ends. `noncentered` rewrites the site, not the model: it samples a standard normal for
each school and records theta = mu + tau * normal, so the law of (theta, mu, tau) is the same and the sampler's
geometry is benign.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from weft import Target, gen, noncentered, sample


@gen
def schools(sigma: jax.Array) -> jax.Array:
    """Effects of coaching in several schools, each measured with a known standard error."""
    mu = sample("mu", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(5.0))

    def school(s: jax.Array) -> jax.Array:
        theta = sample("theta", dist.Normal(mu, tau))
        return sample("y", dist.Normal(theta, s))

    return jax.vmap(school, axis_name="school")(sigma)


def centered(data: dict[str, Any]) -> Target:
    """The posterior on (mu, tau, theta) as the model is written."""
    return schools(jnp.asarray(data["sigma"], float)).given({"y": data["y"]})


def noncentered_target(data: dict[str, Any]) -> Target:
    """The same posterior with theta derived from standard normals."""
    model = noncentered(schools, "theta")
    return model(jnp.asarray(data["sigma"], float)).given({"y": data["y"]})
