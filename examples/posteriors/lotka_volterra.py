"""Hares and lynxes: an ordinary differential equation observed with multiplicative noise.

    u' = (a - b v) u,  v' = (-c + d u) v,  (u, v)(0) = z_init,  theta = (a, b, c, d)
    y_0k ~ LogNormal(log z_init_k, sigma_k),  y_nk ~ LogNormal(log z_k(t_n), sigma_k)

Any JAX code may stand in a model, a Diffrax solve too. Steps of fixed size suffice here and keep the cost of a gradient the
same everywhere: a fifth-order step of 0.1 years is exact to five digits at the parameters the data admit.
"""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from weft import Target, gen, sample

STEP = 0.1  # years


def field(t: jax.Array, z: jax.Array, theta: jax.Array) -> jax.Array:
    """The Lotka-Volterra vector field at populations `z` = (hares, lynxes)."""
    a, b, c, d = theta
    hare, lynx = z
    return jnp.stack([(a - b * lynx) * hare, (d * hare - c) * lynx])


def solve(theta: jax.Array, z_init: jax.Array, ts: jax.Array, end: float) -> jax.Array:
    """Populations at the times `ts`, all in (0, end]; shape (n, 2)."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=0.0,
        t1=end,
        dt0=STEP,
        y0=z_init,
        args=theta,
        saveat=diffrax.SaveAt(ts=ts),
        max_steps=round(end / STEP) + 2,
        throw=False,  # absurd parameters give infinite populations: a density of zero, not an error
    )
    return solution.ys


@gen
def populations(ts: jax.Array, end: float) -> jax.Array:
    """Populations of hares and lynxes, counted at time 0 and at the times `ts`."""
    positive = {"low": 0.0}
    rate = lambda mean, sd: dist.TruncatedNormal(mean, sd, **positive)  # noqa: E731
    mean, sd = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    theta = sample("theta", rate(mean, sd).to_event(1))
    z_init = sample("z_init", dist.LogNormal(jnp.log(10.0) * jnp.ones(2), 1.0).to_event(1))
    sigma = sample("sigma", dist.LogNormal(-jnp.ones(2), 1.0).to_event(1))

    z = solve(theta, z_init, ts, end)
    sample("y_init", dist.LogNormal(jnp.log(z_init), sigma).to_event(1))

    year = lambda z: sample("y", dist.LogNormal(jnp.log(z), sigma).to_event(1))  # noqa: E731
    return jax.vmap(year, axis_name="year")(z)


def target(data: dict[str, Any]) -> Target:
    """The posterior given the counts of furs."""
    ts = jnp.asarray(data["ts"], float)
    counts = {"y_init": data["y_init"], "y": data["y"]}
    return populations(ts, float(data["ts"][-1])).given(counts)
