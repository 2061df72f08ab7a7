"""Hares and lynxes: an ordinary differential equation observed with multiplicative noise.

    u' = (a - b v) u,  v' = (-c + d u) v,  (u, v)(0) = z_init,  theta = (a, b, c, d)
    y_0k ~ LogNormal(log z_init_k, sigma_k),  y_nk ~ LogNormal(log z_k(t_n), sigma_k)

Any JAX code may stand in a model, a solver too: here fixed steps of Runge and Kutta in a scan, eight between two
counts, whose error in log z is some 1e-5 where the posterior lies, for a noise of 0.25. A `diffrax.diffeqsolve` can
stand in its place.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax

from weft import Target, gen, sample


def field(z: jax.Array, theta: jax.Array) -> jax.Array:
    """The Lotka-Volterra vector field at populations `z` = (hares, lynxes)."""
    a, b, c, d = theta
    hare, lynx = z
    return jnp.stack([(a - b * lynx) * hare, (d * hare - c) * lynx])


def solve(theta: jax.Array, z_init: jax.Array, ts: jax.Array, substeps: int = 8) -> jax.Array:
    """Populations at the increasing times `ts` from `z_init` at time 0; shape (n, 2)."""

    def runge_kutta(z: jax.Array, dt: jax.Array) -> jax.Array:
        k1 = field(z, theta)
        k2 = field(z + dt / 2 * k1, theta)
        k3 = field(z + dt / 2 * k2, theta)
        k4 = field(z + dt * k3, theta)
        return z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def interval(z: jax.Array, duration: jax.Array) -> tuple[jax.Array, jax.Array]:
        dt = duration / substeps
        z = lax.fori_loop(0, substeps, lambda _, z: runge_kutta(z, dt), z)
        return z, z

    return lax.scan(interval, z_init, jnp.diff(ts, prepend=0.0))[1]


@gen
def populations(ts: jax.Array) -> jax.Array:
    """Populations of hares and lynxes, counted at time 0 and at the times `ts`."""
    mean, sd = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    theta = sample("theta", dist.TruncatedNormal(mean, sd, low=0.0).to_event(1))
    z_init = sample("z_init", dist.LogNormal(jnp.log(10.0) * jnp.ones(2), 1.0).to_event(1))
    sigma = sample("sigma", dist.LogNormal(-jnp.ones(2), 1.0).to_event(1))

    z = solve(theta, z_init, ts)
    sample("y_init", dist.LogNormal(jnp.log(z_init), sigma).to_event(1))

    year = lambda z: sample("y", dist.LogNormal(jnp.log(z), sigma).to_event(1))  # noqa: E731
    return jax.vmap(year, axis_name="year")(z)


def target(data: dict[str, Any]) -> Target:
    """The posterior given the counts of furs."""
    program = populations(jnp.asarray(data["ts"], float))
    return program.given({"y_init": data["y_init"], "y": data["y"]})


def start(data: dict[str, Any], period: float = 10.0) -> dict[str, jax.Array]:
    """Where chains begin: at rates that give the mean counts and a cycle of ten years, both read off the data.

    Populations turn around (c/d, a/b) once in some 2 pi / sqrt(a c) years. The posterior has a second mode, where a
    cycle of another length and a large noise explain the counts; its mass is nil, but a chain that begins there stays.
    """
    hare, lynx = np.mean(data["y"], axis=0)
    rate = 2 * np.pi / period
    return {
        "theta": jnp.asarray([rate, rate / lynx, rate, rate / hare], float),
        "z_init": jnp.asarray(data["y_init"], float),
        "sigma": jnp.asarray([0.5, 0.5], float),
    }
