"""Counts whose log intensity is a Gaussian process.

    rho ~ Gamma(25, 4),  alpha ~ half-N(0, 2),  f ~ N(0, C),  k_i ~ Poisson(exp f_i)
    C_ij = alpha^2 exp(-(x_i - x_j)^2 / (2 rho^2)) + 1e-10 [i = j]

The values of the process come from standard normals, f = L f_tilde with L L' = C, since f itself is tied to rho and
alpha. The jitter of 1e-10 is below single precision: run it under `jax.enable_x64(True)`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from weft import Target, deterministic, gen, repeat, sample


@gen
def poisson_process(x: jax.Array) -> jax.Array:
    """Counts at inputs `x` of shape (n,)."""
    rho = sample("rho", dist.Gamma(25.0, 4.0))
    alpha = sample("alpha", dist.HalfNormal(2.0))

    distance = (x[:, None] - x) / rho
    covariance = alpha**2 * jnp.exp(-0.5 * distance**2) + 1e-10 * jnp.eye(x.size)
    noise = repeat(lambda: sample("f_tilde", dist.Normal(0.0, 1.0)), x.size)
    f = deterministic("f", jnp.linalg.cholesky(covariance) @ noise)

    count = lambda f: sample("k", dist.Poisson(jnp.exp(f)))  # noqa: E731
    return jax.vmap(count, axis_name="input")(f)


def target(data: dict[str, Any]) -> Target:
    """The posterior given the counts."""
    return poisson_process(jnp.asarray(data["x"], float)).given({"k": data["k"]})
