r"""Implicit reparametrisation: the derivative of a draw whose sampler has none.

Let $x$ be a draw of a continuous law on the line with distribution function $F_\theta$. When $\theta$ changes, $x$
moves so that $F_\theta(x)$ stays the same:

$$\frac{dx}{d\theta} = -\frac{\partial F_\theta(x) / \partial\theta}{p_\theta(x)}$$

(Figurnov, Mohamed and Mnih 2018, equation 5). This serves mixtures, whose $F$ is the mean of their components', and the
von Mises law, whose $F$ is an integral. Draws of gamma, beta, Dirichlet and Student laws have such derivatives in JAX
already.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import i0e, i1e

from .packing import is_number, pack


def is_implicit(d: Any) -> bool:
    """Whether the distribution function of a law gives its draws a derivative by the parameters."""
    base = _elementwise(d)
    if isinstance(base, dist.VonMises):
        return True
    if base is None or type(base).cdf is dist.Distribution.cdf:
        return False
    arrays, skeleton = pack(base, is_number)

    def moved(*arrays: Any) -> Any:
        tangents = [
            jnp.ones_like(a)
            if jnp.issubdtype(a.dtype, jnp.inexact)
            else np.zeros(a.shape, jax.dtypes.float0)
            for a in arrays
        ]
        x = jnp.zeros(base.batch_shape)
        return jax.jvp(lambda *a: skeleton.unpack(a).cdf(x), arrays, tangents)

    try:  # not every distribution function can be computed, or has derivatives
        jax.eval_shape(moved, *arrays)
    except Exception:
        return False
    return True


def follow(d: Any, x: jax.Array) -> jax.Array:
    """A draw of a law, with derivatives by the law's parameters."""
    base = _elementwise(d)
    x = jax.lax.stop_gradient(x)
    return _around_circle(base, x) if isinstance(base, dist.VonMises) else _along_cdf(base, x)


def _elementwise(d: Any) -> Any:
    """The law of single elements. None if the elements are not independent numbers on the line."""
    while isinstance(d, dist.Independent):
        d = d.base_dist
    plain = isinstance(d, dist.Distribution) and not isinstance(d, dist.MaskedDistribution)
    return d if plain and d.event_shape == () else None


def _along_cdf(d: Any, x: jax.Array) -> jax.Array:
    arrays, skeleton = pack(d, is_number)

    @jax.custom_jvp
    def value(x: Any, *arrays: Any) -> Any:
        return x

    @value.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        x = value(*primals)  # moves with the parameters when it is differentiated again
        d = skeleton.unpack(primals[1:])
        _, moved = jax.jvp(lambda *a: skeleton.unpack(a).cdf(x), primals[1:], tangents[1:])
        return x, -moved / jnp.exp(d.log_prob(x))

    return value(x, *arrays)


@functools.cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss-Legendre quadrature on (-1, 1)."""
    return np.polynomial.legendre.leggauss(64)


def _around_circle(d: Any, x: jax.Array) -> jax.Array:
    r"""A von Mises draw $x = \mu + z$. Its derivatives are $dx/d\mu = 1$, and $dz/d\kappa$ by quadrature."""
    loc, concentration = d.loc, d.concentration
    turn = 2 * math.pi
    z = (x - jax.lax.stop_gradient(loc) + math.pi) % turn - math.pi
    moved = _angle(z, jnp.broadcast_to(concentration, x.shape))
    stop = jax.lax.stop_gradient
    return x + (moved - stop(moved)) + (loc - stop(loc))


@jax.custom_jvp
def _angle(z: jax.Array, concentration: jax.Array) -> jax.Array:
    return z


@_angle.defjvp
def _(primals: Any, tangents: Any) -> Any:
    r"""$dz/d\kappa = \int_z^\pi (\cos t - I_1/I_0(\kappa))\, e^{\kappa (\cos t - \cos z)}\, dt$ for $z > 0$."""
    z, kappa = _angle(*primals), primals[1]
    size = jnp.abs(z)
    # Twelve standard deviations from z the integrand is below exp(-72) times its value at z.
    width = jnp.minimum(math.pi - size, 12 / jnp.sqrt(kappa))
    nodes, weights = _quadrature()
    t = size[..., None] + width[..., None] * (jnp.asarray(nodes, z.dtype) + 1) / 2
    kappa = kappa[..., None]
    mean = i1e(kappa) / i0e(kappa)
    integrand = (jnp.cos(t) - mean) * jnp.exp(kappa * (jnp.cos(t) - jnp.cos(size[..., None])))
    integral = jnp.sum(jnp.asarray(weights, z.dtype) * integrand, -1) * width / 2
    return z, jnp.sign(z) * integral * tangents[1]
