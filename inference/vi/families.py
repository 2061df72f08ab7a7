"""The families of the ready-made guides: the law of each choice, given the choices before it."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array

from .factorised import Before, GuideFamily, Parts
from .laws import Diagonal, Factored, Law, MarkovChain, Triangular, Vector, told_of_factor
from .splines import Autoregressive


class MeanField(GuideFamily):
    """Independent normals."""

    def law(self, params: Any, address: str, before: Before) -> Law:
        return Diagonal(_loc(params, address), params["scale"][address].reshape(-1))


class FullRank(GuideFamily):
    """A normal of any covariance. `parts` gives the place of each choice in the vector."""

    parts: Parts = eqx.field(static=True)

    def law(self, params: Any, address: str, before: Before) -> Law:
        part, tril = self.parts[address], params["scale_tril"]
        loc, start = _loc(params, address), part.start
        if start:
            residual = _residuals(params, self.parts, address, before)
            eps = solve_triangular(tril[:start, :start], residual, lower=True)
            loc = loc + tril[part, :start] @ eps
        return Triangular(loc, tril[part, part])


class LowRank(GuideFamily):
    """A normal whose covariance is a diagonal plus a few factors."""

    parts: Parts = eqx.field(static=True)

    def law(self, params: Any, address: str, before: Before) -> Law:
        part, factor = self.parts[address], params["factor"]
        rank = factor.shape[-1]
        precision, shift = jnp.eye(rank, dtype=factor.dtype), jnp.zeros(rank, factor.dtype)
        if part.start:
            scales = [params["scale"][a].reshape(-1) for a in self.parts.before(address)]
            residual = _residuals(params, self.parts, address, before)
            told = told_of_factor(factor[: part.start], jnp.concatenate(scales), residual)
            precision, shift = precision + told[0].sum(0), shift + told[1].sum(0)
        scale = params["scale"][address].reshape(-1)
        return Factored(_loc(params, address), scale, factor[part], precision, shift)


class Structured(GuideFamily):
    """A linear-Gaussian network.

    Attributes:
        parents: for each choice, the choices that it reads, and for each of them the number of lanes that they share.
        chains: for each choice that reads itself in a scan, its elements as (steps, lanes, elements).
    """

    parents: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = eqx.field(static=True)
    chains: dict[str, Array]

    def law(self, params: Any, address: str, before: Before) -> Law:
        loc, scale = _loc(params, address), params["scale"][address].reshape(-1)
        weights = params["weights"].get(address, {})
        for parent, lanes in dict(self.parents)[address]:
            read = before(parent) - _loc(params, parent)
            told = jnp.einsum("sij,sj->si", weights[parent], read.reshape(lanes, -1))
            loc = loc + told.reshape(-1)
        if address in self.chains:
            return MarkovChain(loc, scale, weights[address], self.chains[address])
        return Diagonal(loc, scale)


class Flow(GuideFamily):
    """An autoregressive spline flow; see `Autoregressive`."""

    parts: Parts = eqx.field(static=True)

    def law(self, params: Any, address: str, before: Before) -> Law:
        part = self.parts[address]
        scale = params["scale"]
        earlier = [
            (before(a) - _loc(params, a)) / scale[a].reshape(-1) for a in self.parts.before(address)
        ]
        return Autoregressive(
            _loc(params, address),
            scale[address].reshape(-1),
            params["network"],
            jnp.concatenate([*earlier, jnp.zeros(self.parts.size - part.start)]),
            (part.start, part.stop),
        )


def _loc(params: Any, address: str) -> Vector:
    return params["loc"][address].reshape(-1)


def _residuals(params: Any, parts: Parts, address: str, before: Before) -> Vector:
    """`z - loc` for all choices before a given one."""
    return jnp.concatenate([before(a) - _loc(params, a) for a in parts.before(address)])
