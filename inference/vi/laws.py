"""Laws of the unconstrained elements of one choice. Guides are made of them.

A law factorises over its elements in their order, `q(z) = prod_k q(z_k | z_<k)`, and gives the log density of each
factor. So the elements of a choice may be correlated, and some of them may still be left out of a bound, as in a site
that is observed in part or stands in a branch.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, PRNGKeyArray

Vector = Float[Array, " n"]


def normal_log_prob(eps: Array) -> Array:
    """The log density of N(0, 1) for each element."""
    return -0.5 * eps**2 - 0.5 * math.log(2 * math.pi)


class Law(eqx.Module):
    """A law on R^n that factorises over its elements in their order: `q(z) = prod_k q(z_k | z_<k)`."""

    def sample(self, key: PRNGKeyArray) -> Vector:
        """A draw, differentiable in the parameters."""
        raise NotImplementedError

    def log_probs(self, z: Vector) -> Vector:
        """`log q(z_k | z_<k)` of each element."""
        raise NotImplementedError


class Diagonal(Law):
    """Independent normals."""

    loc: Vector
    scale: Vector

    def sample(self, key: PRNGKeyArray) -> Vector:
        return self.loc + self.scale * jax.random.normal(key, self.loc.shape, self.loc.dtype)

    def log_probs(self, z: Vector) -> Vector:
        return normal_log_prob((z - self.loc) / self.scale) - jnp.log(self.scale)


class Triangular(Law):
    """The normal `loc + scale_tril @ eps`."""

    loc: Vector
    scale_tril: Float[Array, "n n"]

    def sample(self, key: PRNGKeyArray) -> Vector:
        return self.loc + self.scale_tril @ jax.random.normal(key, self.loc.shape, self.loc.dtype)

    def log_probs(self, z: Vector) -> Vector:
        eps = solve_triangular(self.scale_tril, z - self.loc, lower=True)
        return normal_log_prob(eps) - jnp.log(jnp.diagonal(self.scale_tril))


class Factored(Law):
    """The normal `loc + factor @ f + scale * e` with `e ~ N(0, 1)` and `f ~ N(precision^-1 @ shift, precision^-1)`."""

    loc: Vector
    scale: Vector
    factor: Float[Array, "n r"]
    precision: Float[Array, "r r"]
    shift: Float[Array, " r"]

    def sample(self, key: PRNGKeyArray) -> Vector:
        factor_key, own_key = jax.random.split(key)
        root = jnp.linalg.cholesky(self.precision)
        half = solve_triangular(root, self.shift, lower=True)
        noise = jax.random.normal(factor_key, self.shift.shape, self.loc.dtype)
        f = solve_triangular(root.T, half + noise, lower=False)
        own = jax.random.normal(own_key, self.loc.shape, self.loc.dtype)
        return self.loc + self.factor @ f + self.scale * own

    def log_probs(self, z: Vector) -> Vector:
        # The information on f before each element: exclusive sums over the elements.
        precisions, shifts = (
            before + jnp.cumsum(told, 0) - told
            for before, told in zip(
                (self.precision, self.shift),
                told_of_factor(self.factor, self.scale, z - self.loc),
                strict=True,
            )
        )
        root = jnp.linalg.cholesky(precisions)
        solve = jax.vmap(functools.partial(solve_triangular, lower=True))
        row, half = solve(root, self.factor), solve(root, shifts)
        mean = self.loc + jnp.sum(row * half, -1)
        scale = jnp.sqrt(self.scale**2 + jnp.sum(row**2, -1))
        return normal_log_prob((z - mean) / scale) - jnp.log(scale)


def told_of_factor(factor: Array, scale: Array, residual: Array) -> tuple[Array, Array]:
    """The information of each element on `f`: precision `w w' / d^2`, `(n, r, r)`, and shift `w (z - loc) / d^2`."""
    row = factor / scale[:, None]
    return row[:, :, None] * row[:, None, :], row * (residual / scale)[:, None]


class MarkovChain(Law):
    """A linear-Gaussian Markov chain, with T steps, R series side by side, and m elements in a step.

    `z_t = loc_t + weights_t (z_{t-1} - loc_{t-1}) + scale_t eps_t`, where `z[order]` is the array `(T, R, m)`.
    """

    loc: Vector
    scale: Vector
    weights: Float[Array, "steps R m m"]
    order: Array

    def steps(self, z: Vector) -> Float[Array, "T R m"]:
        return z[self.order]

    def sample(self, key: PRNGKeyArray) -> Vector:
        scale = self.steps(self.scale)
        noise = scale * jax.random.normal(key, scale.shape, scale.dtype)

        def step(last: Array, x: Any) -> tuple[Array, Array]:
            weights, noise = x
            new = jnp.einsum("rij,rj->ri", weights, last) + noise
            return new, new

        _, rest = jax.lax.scan(step, noise[0], (self.weights, noise[1:]))
        residual = jnp.concatenate([noise[:1], rest])
        return self.loc + jnp.zeros_like(self.loc).at[self.order].set(residual)

    def log_probs(self, z: Vector) -> Vector:
        residual = self.steps(z - self.loc)
        told = jnp.einsum("trij,trj->tri", self.weights, residual[:-1])
        own = jnp.concatenate([residual[:1], residual[1:] - told])
        own = jnp.zeros_like(z).at[self.order].set(own)
        return normal_log_prob(own / self.scale) - jnp.log(self.scale)


class Among(Law):
    """A law of the elements at `index`. The other elements are N(0, 1)."""

    law: Law
    index: Array
    size: int = eqx.field(static=True)

    def sample(self, key: PRNGKeyArray) -> Vector:
        own_key, other_key = jax.random.split(key)
        own = self.law.sample(own_key)
        return jax.random.normal(other_key, (self.size,), own.dtype).at[self.index].set(own)

    def log_probs(self, z: Vector) -> Vector:
        return normal_log_prob(z).at[self.index].set(self.law.log_probs(z[self.index]))
