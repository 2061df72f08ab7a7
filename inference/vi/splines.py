"""An autoregressive flow of monotone splines, as a law of one choice given those before it."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .laws import Law, Vector, normal_log_prob

BOUND = 5.0
"""The splines are the identity outside of `[-BOUND, BOUND]`."""

LEAST = 1e-3
"""The least width and height of a bin, as a fraction of the interval, and the least slope at a knot."""


class Autoregressive(Law):
    """Elements `start, ..., stop - 1` of an autoregressive flow over all elements, given those before them.

    Element `k` is `loc_k + scale_k u_k`, where `u_k = shift_k + exp(log_scale_k) s_k(eps_k)` and `eps_k ~ N(0, 1)`.
    Shift, log scale and the spline `s_k` are outputs of a masked network at `u_<k`.
    """

    loc: Vector
    scale: Vector
    network: dict[str, Array]
    u: Float[Array, " all"]
    span: tuple[int, int] = eqx.field(static=True)

    def weights(self) -> tuple[Array, Array, Array]:
        """The weights of the network. They are masked so that output `k` sees only the inputs before `k`."""
        num_hidden, n = self.network["in"].shape
        degree = np.arange(num_hidden) * max(n - 1, 1) // num_hidden
        inputs = self.network["in"] * (np.arange(n) <= degree[:, None])
        outputs = self.network["out"] * (degree < np.arange(n)[:, None])[:, :, None]
        return inputs, outputs, jnp.tril(self.network["skip"], -1)

    def sample(self, key: PRNGKeyArray) -> Vector:
        inputs, outputs, skip = self.weights()
        own = slice(*self.span)
        eps = jax.random.normal(key, self.loc.shape, self.loc.dtype)

        def step(state: Any, x: Any) -> Any:
            u, hidden = state
            k, eps, inputs, outputs, skip, bias = x
            theta = bias + jnp.tanh(hidden) @ outputs
            new = theta[0] + skip @ u + jnp.exp(theta[1]) * spline(theta[2:], eps)[0]
            return (u.at[k].set(new), hidden + inputs * new), new

        hidden = self.network["hidden_bias"] + inputs @ self.u
        weights = (inputs.T[own], outputs[own], skip[own], self.network["bias"][own])
        _, new = jax.lax.scan(step, (self.u, hidden), (np.arange(*self.span), eps, *weights))
        return self.loc + self.scale * new

    def log_probs(self, z: Vector) -> Vector:
        inputs, outputs, skip = self.weights()
        own = slice(*self.span)
        u = self.u.at[own].set((z - self.loc) / self.scale)
        hidden = jnp.tanh(self.network["hidden_bias"] + inputs @ u)
        theta = self.network["bias"][own] + jnp.einsum("h,khp->kp", hidden, outputs[own])
        shift, log_scale = theta[:, 0] + skip[own] @ u, theta[:, 1]
        eps, slope = jax.vmap(spline_inverse)(theta[:, 2:], (u[own] - shift) * jnp.exp(-log_scale))
        return normal_log_prob(eps) - slope - log_scale - jnp.log(self.scale)


def spline(theta: Float[Array, " p"], x: Array) -> tuple[Array, Array]:
    """The value of a monotone rational-quadratic spline at a number, and the log of its slope there.

    `theta` holds the widths and heights of K bins and the slopes at the K - 1 inner knots. All are unconstrained, and
    zeros make the identity. See Durkan et al. (2019), equations 4 and 5.
    """
    xs, ys, slopes = knots(theta)
    inside = jnp.clip(x, -BOUND, BOUND)
    (x0, y0, d0), (width, height, d1) = bin_of(xs, inside, xs, ys, slopes)
    xi = (inside - x0) / width
    y = y0 + height * (height / width * xi**2 + d0 * xi * (1 - xi)) / _lower(
        xi, height / width, d0, d1
    )
    out = jnp.abs(x) > BOUND
    slope = jnp.where(out, 0.0, _log_slope(xi, height / width, d0, d1))
    return jnp.where(out, x, y), slope


def spline_inverse(theta: Float[Array, " p"], y: Array) -> tuple[Array, Array]:
    """The `x` at which the spline is `y`, and the log of its slope there (equations 6 to 8)."""
    xs, ys, slopes = knots(theta)
    inside = jnp.clip(y, -BOUND, BOUND)
    (x0, y0, d0), (width, height, d1) = bin_of(ys, inside, xs, ys, slopes)
    s, rise = height / width, inside - y0
    a = height * (s - d0) + rise * (d1 + d0 - 2 * s)
    b = height * d0 - rise * (d1 + d0 - 2 * s)
    c = -s * rise
    xi = jnp.clip(-2 * c / (b + jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, 0.0))), 0.0, 1.0)
    out = jnp.abs(y) > BOUND
    slope = jnp.where(out, 0.0, _log_slope(xi, s, d0, d1))
    return jnp.where(out, y, x0 + width * xi), slope


def knots(theta: Array) -> tuple[Array, Array, Array]:
    """The positions, values and slopes at the K + 1 knots."""
    k = (theta.size + 1) // 3

    def positions(free: Array) -> Array:
        share = LEAST + (1 - LEAST * k) * jax.nn.softmax(free)
        ends = jnp.cumsum(share)[:-1] * 2 * BOUND - BOUND
        border = jnp.full(1, BOUND, theta.dtype)
        return jnp.concatenate([-border, ends, border])

    one = math.log(math.expm1(1 - LEAST))  # where the slope is 1
    inner = LEAST + jax.nn.softplus(theta[2 * k :] + one)
    border = jnp.ones(1, theta.dtype)
    slopes = jnp.concatenate([border, inner, border])
    return positions(theta[:k]), positions(theta[k : 2 * k]), slopes


def bin_of(grid: Array, x: Array, xs: Array, ys: Array, slopes: Array) -> Any:
    """The bin of `grid` that holds `x`: its left knot `(x, y, slope)`, and `(width, height, right slope)`."""
    i = jnp.clip(jnp.searchsorted(grid, x, side="right") - 1, 0, grid.size - 2)
    return (xs[i], ys[i], slopes[i]), (xs[i + 1] - xs[i], ys[i + 1] - ys[i], slopes[i + 1])


def _lower(xi: Array, s: Array, d0: Array, d1: Array) -> Array:
    return s + (d1 + d0 - 2 * s) * xi * (1 - xi)


def _log_slope(xi: Array, s: Array, d0: Array, d1: Array) -> Array:
    upper = d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2
    return 2 * jnp.log(s) + jnp.log(upper) - 2 * jnp.log(_lower(xi, s, d0, d1))
