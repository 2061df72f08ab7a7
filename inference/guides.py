r"""Ready-made guides: each gives `(guide, params)` for a target, to be handed to an objective and to `fit`.

A guide is a model `(params, *batch) -> Program` that draws exactly the target's latent choices, at
their addresses and in their supports. All of them work in the same way. Write `z` for the latent
choices on the unconstrained scale, where NumPyro's bijection `T_a` takes the elements `z_a` of the
choice at address `a` to its support. A guide is a density of `z` in the order of the program,

    q(z) = prod_a q(z_a | z_before a),        x_a = T_a(z_a),
    log q(x) = sum_a [ log q(z_a | z_before a) - log |det dT_a / dz_a| ],

with one factor for each site: a site of the guide is the push-forward of its factor by `T_a`, and
reads the choices before it back as `z_b = T_b^-1(x_b)`. So laws that are joint over all choices,
such as a normal with a full covariance, are plain programs, without a choice that the target does
not have. They differ in the factor:

| guide | law of `z` | parameters for `n` elements | cost of a draw |
| --- | --- | --- | --- |
| `mean_field` | independent normals | `2 n` | `n` |
| `full_rank`, `laplace` | normal, any covariance | `n + n (n + 1) / 2` | `n^2` for each site |
| `low_rank` | normal, diagonal plus rank `r` | `(2 + r) n` | `n (r^2 + r^3)` |
| `structured` | linear-Gaussian along the model's own dependences | by the model | by the model |
| `flow` | autoregressive spline flow | `~ n (h + n) + 3 n h bins` | the same, `n` steps in sequence |

Elements that a choice has in the program but that are no latent choice, since the site is observed
in part, are drawn from N(0, 1) on the unconstrained scale; the objectives leave them out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import biject_to, constraints
from weft.ppl import Model, Target, gen, sample
from weft.ppl.addresses import flatten, unflatten
from weft.ppl.compat import as_key
from weft.ppl.dependence import site_inputs
from weft.ppl.errors import DensityError, WeftError
from weft.ppl.handlers import Evaluate, Given, expand
from weft.ppl.interpreter import Handler, interpret
from weft.ppl.sites import Site
from weft.ppl.specs import Constant
from weft.ppl.traces import flat_records

from .initial import check_init
from .parameters import constrained, unwrap
from .runner import tracing

NUM_PRIOR_DRAWS = 101
"""Draws of the prior whose median is where `loc` begins."""

Vector = Float[Array, " n"]
Before = Callable[[str], Vector]
"""The unconstrained elements of a choice that was drawn already, by address."""


# --- the law of one site's elements --------------------------------------------------------------


def normal_log_prob(eps: Array) -> Array:
    """The log density of N(0, 1), element by element."""
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
        # What is known of f before each element: exclusive sums of what the elements tell of it.
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
    """What each element tells of `f`: precision `w w' / d^2`, `(n, r, r)`, and shift `w (z - loc) / d^2`, `(n, r)`."""
    row = factor / scale[:, None]
    return row[:, :, None] * row[:, None, :], row * (residual / scale)[:, None]


class Chain(Law):
    """A linear-Gaussian Markov chain of T steps, of R series side by side, of m elements a step.

    `z_t = loc_t + weights_t (z_{t-1} - loc_{t-1}) + scale_t eps_t`, with `z[order]` as the array
    `(T, R, m)`.
    """

    loc: Vector
    scale: Vector
    weights: Float[Array, "T-1 R m m"]
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
    """A law of the elements at `index`, among others that are N(0, 1)."""

    law: Law
    index: Array
    size: int = eqx.field(static=True)

    def sample(self, key: PRNGKeyArray) -> Vector:
        own_key, other_key = jax.random.split(key)
        own = self.law.sample(own_key)
        return jax.random.normal(other_key, (self.size,), own.dtype).at[self.index].set(own)

    def log_probs(self, z: Vector) -> Vector:
        return normal_log_prob(z).at[self.index].set(self.law.log_probs(z[self.index]))


# --- the law of a flow ---------------------------------------------------------------------------

BOUND = 5.0
"""The splines are the identity outside of `[-BOUND, BOUND]`."""

LEAST = 1e-3
"""The least width and height of a bin, as a fraction of the interval, and the least slope at a knot."""


class Autoregressive(Law):
    """Elements `start, ..., stop - 1` of an autoregressive flow over all elements, given those before.

    Element `k` is `loc_k + scale_k u_k`, where `u_k = shift_k + exp(log_scale_k) s_k(eps_k)`,
    `eps_k ~ N(0, 1)`; shift, log scale and the spline `s_k` are outputs of a masked network at `u_<k`.
    """

    loc: Vector
    scale: Vector
    network: dict[str, Array]
    u: Float[Array, " all"]
    span: tuple[int, int] = eqx.field(static=True)

    def weights(self) -> tuple[Array, Array, Array]:
        """The network's weights, so masked that output `k` sees inputs before `k` only."""
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
    """A monotone rational-quadratic spline at a number: its value and the log of its slope.

    `theta` holds the widths and heights of K bins and the slopes at the K - 1 inner knots, all
    unconstrained: zeros make the identity. Durkan et al. (2019), equations 4 and 5.
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
    """The `x` at which the spline is `y`, and the log of its slope there. Equations 6 to 8."""
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
    """Positions, values and slopes at the K + 1 knots."""
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


# --- its push-forward ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """What is known of a latent choice beforehand.

    Attributes:
        address: dotted address.
        batch_shape: lanes and batch axes of the choice.
        event_shape: the axes that its distribution ties together.
        shape: shape on the unconstrained scale; the batch axes lead.
        dtype: dtype of the choice.
        dims: names of its axes.
        support: its support, if that depends on nothing.
        num_values: of a discrete choice the number of values.
    """

    address: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    dims: tuple[str | None, ...]
    support: Constant | None
    num_values: int | None = None

    @property
    def size(self) -> int:
        """Number of unconstrained elements."""
        return math.prod(self.shape)


class PushForward(eqx.Module):
    """The law of a choice whose unconstrained elements have a given law, as a distribution."""

    law: Law
    support: Any
    place: Place = eqx.field(static=True)

    has_rsample: ClassVar[bool] = True
    is_discrete: ClassVar[bool] = False

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Lanes and batch axes."""
        return self.place.batch_shape

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Axes that are tied together by the support."""
        return self.place.event_shape

    def sample(self, key: PRNGKeyArray) -> Array:
        """A draw."""
        z = self.law.sample(key).reshape(self.place.shape)
        return jnp.asarray(biject_to(self.support)(z)).astype(self.place.dtype)

    def log_prob(self, value: Array) -> Array:
        """Log density by batch axes; elements further on are conditioned on those before them."""
        batch, transform = self.batch_shape, biject_to(self.support)
        z = jnp.asarray(transform.inv(value))
        jacobian = jnp.asarray(transform.log_abs_det_jacobian(z, value))
        if jacobian.ndim < len(batch):
            jacobian = jnp.broadcast_to(jacobian, batch)
        own = self.law.log_probs(z.reshape(-1))
        return jnp.sum(own.reshape(*batch, -1), -1) - jnp.sum(jacobian.reshape(*batch, -1), -1)


# --- the guide -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where each choice stands in the vector of all unconstrained elements."""

    sizes: tuple[tuple[str, int], ...]

    def __getitem__(self, address: str) -> slice:
        start = sum(self.size_of(a) for a in self.before(address))
        return slice(start, start + self.size_of(address))

    @property
    def addresses(self) -> tuple[str, ...]:
        """All of them, in order."""
        return tuple(a for a, _ in self.sizes)

    @property
    def size(self) -> int:
        """Number of all elements."""
        return sum(n for _, n in self.sizes)

    def size_of(self, address: str) -> int:
        """Number of elements of one choice."""
        return dict(self.sizes)[address]

    def before(self, address: str) -> tuple[str, ...]:
        """The choices before one."""
        return self.addresses[: self.addresses.index(address)]


class Family(eqx.Module):
    """A family of laws: for each choice, given those before it, the law of its unconstrained elements."""

    def law(self, params: Any, address: str, before: Before) -> Law:
        """The law of a choice; `before` gives the elements of those before it."""
        raise NotImplementedError


class Guide(eqx.Module):
    """The program of a family over a target's latent choices, as a function of the parameters.

    Attributes:
        family: the family.
        places: the choices, in order.
        index: of sites observed in part, which elements are latent.
        target: the target, where supports have to be found at run time.
    """

    family: Family
    places: tuple[Place, ...] = eqx.field(static=True)
    index: dict[str, Array]
    target: Target | None

    def __call__(self, params: Any, *batch: Any) -> dict[str, Any]:
        """Draw the choices and return them; what comes besides the parameters is not used."""
        return unflatten(
            self.scope(unwrap(params), unflatten({p.address: p for p in self.places}), {})
        )

    def scope(
        self, params: Any, places: dict[str, Any], outer: dict[str, Array]
    ) -> dict[str, Array]:
        """Draw the choices of one scope, given those drawn before it, all by dotted address."""
        drawn: dict[str, Array] = {}
        elements: dict[str, Vector] = {}

        def before(address: str) -> Vector:
            if address not in elements:
                seen = {**outer, **drawn}
                support = self.support(self.place(address), seen)
                z = jnp.asarray(biject_to(support).inv(seen[address])).reshape(-1)
                elements[address] = z[self.index[address]] if address in self.index else z
            return elements[address]

        for name, place in places.items():
            seen = {**outer, **drawn}
            if isinstance(place, Place):
                law = self.law(params, place, before, seen)
                drawn[place.address] = sample(name, law, dims=place.dims)
            else:
                drawn |= sample(name, gen(self.scope)(params, place, seen))
        return drawn

    def law(self, params: Any, place: Place, before: Before, seen: dict[str, Array]) -> Any:
        """The distribution of one choice."""
        if place.num_values is not None:
            return dist.Categorical(logits=params["logits"][place.address])
        law = self.family.law(params, place.address, before)
        if place.address in self.index:
            law = Among(law, self.index[place.address], place.size)
        return PushForward(law, self.support(place, seen), place)

    def place(self, address: str) -> Place:
        """What is known of a choice."""
        return next(p for p in self.places if p.address == address)

    def support(self, place: Place, seen: Mapping[str, Array]) -> Any:
        """The support of a choice; where it depends on the choices before it, or on arguments, the model says it."""
        return self.find_support(place, seen) if place.support is None else place.support.value

    def find_support(self, place: Place, seen: Mapping[str, Array]) -> Any:
        """The support of a choice, from a run of the target's model in which all choices are given."""
        assert self.target is not None
        code, args = self.target.program.code()
        given: dict[str, Given] = dict(self.target.data)
        for address in self.target.latents:
            info = self.target.sites[address]
            # Choices further on do not enter (`_refuse_supports`): any value serves.
            value = seen.get(address, jnp.ones(info.shape, info.dtype))
            if address in given:
                value = jnp.where(expand(given[address].where, value), given[address].value, value)
            given[address] = Given(value)
        handler = FindSupport(place.address, [])
        _, records, _ = interpret(code.jaxpr, args, handler, None, unflatten(given))
        leaves = dict(flat_records(records))[place.address]["leaves"]
        return jax.tree.unflatten(handler.structure[0], leaves)


@dataclasses.dataclass(frozen=True)
class FindSupport(Handler):
    """Records the support of one site, all other choices being given: its bounds, spread over batch axes."""

    address: str
    structure: list[Any]

    def site(
        self, site: Site, key: Any, given: Any
    ) -> tuple[jax.Array, dict[str, Any] | None, dict[str, Any]]:
        value, _, _ = Evaluate(None).site(site, key, given)
        if ".".join(site.address) != self.address:
            return value, None, {}

        def bounds(payload: Any) -> list[Array]:
            leaves, structure = jax.tree.flatten(payload["d"].support)
            self.structure.append(structure)
            return [jnp.broadcast_to(leaf, site.spec.shape) for leaf in leaves]

        return value, {"value": value, "leaves": site.over_lanes(bounds)}, {}


# --- families ------------------------------------------------------------------------------------


class MeanField(Family):
    """Independent normals."""

    def law(self, params: Any, address: str, before: Before) -> Law:
        return Diagonal(_loc(params, address), params["scale"][address].reshape(-1))


class FullRank(Family):
    """A normal of any covariance; `parts` says where each choice stands in the vector."""

    parts: Parts = eqx.field(static=True)

    def law(self, params: Any, address: str, before: Before) -> Law:
        part, tril = self.parts[address], params["scale_tril"]
        loc, start = _loc(params, address), part.start
        if start:
            residual = _residuals(params, self.parts, address, before)
            eps = solve_triangular(tril[:start, :start], residual, lower=True)
            loc = loc + tril[part, :start] @ eps
        return Triangular(loc, tril[part, part])


class LowRank(Family):
    """A normal whose covariance is diagonal but for a few factors."""

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


class Structured(Family):
    """A linear-Gaussian network.

    Attributes:
        parents: for each choice those that it reads, with the number of lanes that go in parallel.
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
            return Chain(loc, scale, weights[address], self.chains[address])
        return Diagonal(loc, scale)


class Flow(Family):
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
    """`z - loc` of all choices before one."""
    return jnp.concatenate([before(a) - _loc(params, a) for a in parts.before(address)])


# --- where they begin ----------------------------------------------------------------------------


class Start(eqx.Module):
    """What every guide begins with.

    Attributes:
        places: the latent choices, in order.
        index: of sites observed in part, which elements are latent.
        target: the target without its discrete choices.
        loc: by address, the unconstrained elements to begin at.
    """

    places: tuple[Place, ...] = eqx.field(static=True)
    index: dict[str, Array]
    target: Target
    loc: dict[str, Array]

    @property
    def parts(self) -> Parts:
        """Where the elements of each choice stand in the vector of all."""
        return Parts(tuple((a, z.size) for a, z in self.loc.items()))

    def scale(self, value: float) -> dict[str, Any]:
        """A positive parameter of the shape of each choice."""
        return {
            a: constrained(jnp.full(z.shape, value, z.dtype), constraints.positive)
            for a, z in self.loc.items()
        }

    def guide(self, name: str, family: Family) -> Model:
        """The guide of a family."""
        runs = any(p.support is None and p.num_values is None for p in self.places)
        target = self.target if runs else None
        return Model(Guide(family, self.places, self.index, target), name)


def _start(
    name: str, target: Target, init: Any, scale: float, key: Any, discrete: bool = False
) -> Start:
    """Check a target, and find where its guide begins."""
    if not isinstance(target, Target):
        raise TypeError(
            f"{name}: expected a Target, got {type(target).__name__}; condition the program first: "
            "model(*args).given(data)"
        )
    if not target.latents:
        raise WeftError(f"{name}: the target of model {target.program.name!r} has no latent choice")
    if not np.ndim(scale) == 0 or not scale > 0:
        raise WeftError(f"{name}: scale must be a positive number, got {scale!r}")
    finite = [_finite(name, target, a, discrete) for a in target.latents if _discrete(target, a)]
    rest = _without(target, finite)
    _refuse_supports(name, target)
    space = rest.unconstrain() if rest.latents else None
    shapes = {} if space is None else space.shapes
    places = tuple(_place(target, a, shapes) for a in target.latents)
    index = {
        p.address: _elements(target.missing[p.address], p)
        for p in places
        if p.address in target.missing and p.num_values is None
    }
    loc = {} if space is None else _begin(name, rest, init, as_key(_or_zero(key)))
    return Start(places, index, rest, loc)


def _or_zero(key: Any) -> Any:
    return jax.random.key(0) if key is None else key


def _discrete(target: Target, address: str) -> bool:
    info = target.sites[address]
    return info.is_discrete or not jnp.issubdtype(info.dtype, jnp.inexact)


def _finite(name: str, target: Target, address: str, allowed: bool) -> str:
    """A discrete choice that the guide may hold: its address."""
    info = target.sites[address]
    cure = (
        f"sum it out (marginalize(model, {address!r})), give its value, or write the guide by hand"
    )
    if not allowed:
        raise DensityError(
            f"{name}: site {address!r} ({info.distribution}) is discrete, and this guide is a law on R^n: "
            f"{cure}; mean_field takes finite choices"
        )
    if info.values is None or not np.array_equal(info.values, np.arange(info.values.size)):
        raise DensityError(
            f"{name}: site {address!r} ({info.distribution}) is discrete, and its values are not known to be "
            f"0, ..., K - 1: {cure}"
        )
    return address


def _without(target: Target, discrete: list[str]) -> Target:
    """The target of the continuous choices, at any values of the discrete ones."""
    at = {a: Given(jnp.zeros(target.sites[a].shape, target.sites[a].dtype)) for a in discrete}
    return Target(target.program, {**target.data, **at}, target.missing).staged()


def _place(target: Target, address: str, shapes: Mapping[str, tuple[int, ...]]) -> Place:
    info = target.sites[address]
    common = {
        "address": address,
        "batch_shape": info.batch_shape,
        "event_shape": info.event_shape,
        "dtype": info.dtype,
        "dims": info.dims,
    }
    if address not in shapes:
        assert info.num_values is not None
        return Place(**common, shape=info.shape, support=None, num_values=info.num_values)
    shape = shapes[address]
    if address in target.missing:  # of those the coordinates are the missing elements alone
        shape = (*info.batch_shape, *shape[1:])
    support = None if info.support is None else Constant(info.support)
    return Place(**common, shape=shape, support=support)


def _elements(missing: Array, place: Place) -> Array:
    """Flat indices of the unconstrained elements of the given batch elements."""
    each = math.prod(place.shape[len(place.batch_shape) :])
    return (missing[:, None] * each + jnp.arange(each)).reshape(-1)


def _refuse_supports(name: str, target: Target) -> None:
    """Refuse supports that a guide cannot know when it comes to the site.

    Raises:
        DensityError: naming the site.
    """
    reads = None
    for i, address in enumerate(target.latents):
        info = target.sites[address]
        if info.support is not None or _discrete(target, address):
            continue
        if reads is None:
            reads = site_inputs(target.program.code()[0].jaxpr)
        late = [a for a in target.latents[i:] if a in reads.get(address, ())]
        if info.conditional:
            why = "stands in a branch"
        elif late:
            why = f"depends on {', '.join(map(repr, late))}, which the guide has not drawn by then"
        else:
            continue
        raise DensityError(
            f"{name}: the support of site {address!r} ({info.distribution}) depends on values that are known at "
            f"run time only, and the site {why}. Write the guide by hand, or reparametrise the site so that its "
            "support is fixed"
        )


def _begin(name: str, target: Target, init: Any, key: PRNGKeyArray) -> dict[str, Array]:
    """The unconstrained elements to begin at: those of `init`, else the median of draws of the prior."""
    space, z = target.unconstrain(), None
    if init is not None:
        check_init(init, target, 1)
        for address, value in flatten(init).items():
            shape = target.sites[address].shape
            if np.shape(value) != shape:
                raise WeftError(
                    f"{name}: init has shape {np.shape(value)} at {address!r}, expected {shape}"
                )
    given = flatten(init)
    if set(given) != set(target.latents):
        z = _median(target, jax.random.split(key, NUM_PRIOR_DRAWS))
        given = {**flatten(space.to_choices(z)), **given} if given else None
    found = flatten(z if given is None else space.from_choices(unflatten(given)))
    return {a: jnp.asarray(found[a], jnp.result_type(float)) for a in target.latents}


@eqx.filter_jit
def _median(target: Target, keys: Array) -> Any:
    """The median of draws of the prior, element by element on the unconstrained scale."""
    draws = jax.vmap(target.unconstrain().init)(keys)
    return jax.tree.map(lambda x: jnp.nanmedian(x, 0), draws)


# --- the guides ----------------------------------------------------------------------------------


def mean_field(
    target: Target, *, init: Any = None, scale: float = 0.1, key: PRNGKeyArray | None = None
) -> tuple[Model, dict[str, Any]]:
    r"""A guide of independent normals on the unconstrained scale.

        z_k ~ N(loc_k, scale_k^2),    x = T(z),

    one element at a time, with `T` NumPyro's bijection to the support of each choice. A discrete
    choice whose values are `0, ..., K - 1` is a categorical law with free logits; its gradient is by
    the score function, or as `with_gradients(guide, {"z": gradients.enum})` says.

    Args:
        target: the target.
        init: choices to begin at, all or some, as a nested dict; the others begin at the median of
            draws of the prior on the unconstrained scale.
        scale: standard deviation to begin with, on the unconstrained scale.
        key: for those draws; `jax.random.key(0)` if `None`.

    Returns:
        The guide, a model `(params, *batch) -> Program`, and its parameters `{"loc": {address:
        array}, "scale": {address: array}}` in the shapes of the choices on the unconstrained scale,
        the scales constrained to be positive; with discrete choices also `"logits"`, `(..., K)`.

    Raises:
        TypeError: if `target` is no Target.
        DensityError: naming the site, for a discrete choice with other values, a support that has no
            bijection from R^n, and one that depends on choices not drawn before it.

    References:
        Kucukelbir et al. (2017), "Automatic differentiation variational inference", section 2.4.

    Example:
        >>> import jax, optax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import elbo, fit, mean_field
        >>> @gen
        ... def model():
        ...     rate = sample("rate", dist.Gamma(2.0, 1.0))
        ...     sample("count", dist.Poisson(rate))
        >>> target = model().given({"count": 4})
        >>> guide, params = mean_field(target)
        >>> objective = elbo(target, guide, num_samples=10)
        >>> found = fit(jax.random.key(0), objective, params, optax.adam(0.02), 500, progress=False)
        >>> draws = jax.vmap(found.guide.simulate)(jax.random.split(jax.random.key(1), 10_000))
        >>> print(f"{draws.choices['rate'].mean():.0f}")  # the posterior is Gamma(6, 2)
        3
    """
    start = _start("mean_field", target, init, scale, key, discrete=True)
    params: dict[str, Any] = {"loc": start.loc, "scale": start.scale(scale)}
    logits = {
        p.address: jnp.zeros((*p.batch_shape, p.num_values))
        for p in start.places
        if p.num_values is not None
    }
    return start.guide("mean_field", MeanField()), {
        **params,
        "logits": logits,
    } if logits else params


def full_rank(
    target: Target, *, init: Any = None, scale: float = 0.1, key: PRNGKeyArray | None = None
) -> tuple[Model, dict[str, Any]]:
    r"""A guide that is a normal of any covariance over all choices, on the unconstrained scale.

        z ~ N(loc, L L'),    x = T(z),

    with `L` lower triangular, `n` by `n`, in the order of `target.unconstrain().flat.addresses`. The
    site at address `a` draws `z_a ~ N(loc_a + L_{a,<a} eps_{<a}, L_aa L_aa')`, where `eps_{<a} =
    L_{<a,<a}^-1 (z_{<a} - loc_{<a})` are the standardised choices before it: the product of these
    conditionals is the joint normal, exactly.

    Args:
        target: the target.
        init: choices to begin at, as in `mean_field`.
        scale: standard deviation to begin with, without correlations.
        key: for draws of the prior.

    Returns:
        The guide, and its parameters `{"loc": {address: array}, "scale_tril": (n, n)}`.

    Raises:
        TypeError: if `target` is no Target.
        DensityError: naming the site, for discrete choices, and as in `mean_field`.

    References:
        Kucukelbir et al. (2017), section 2.4.

    Example:
        >>> import jax, jax.numpy as jnp, optax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import elbo, fit, full_rank
        >>> @gen
        ... def model():
        ...     a = sample("a", dist.Normal(0.0, 1.0))
        ...     b = sample("b", dist.Normal(0.0, 1.0))
        ...     sample("sum", dist.Normal(a + b, 0.5))
        >>> target = model().given({"sum": 1.0})
        >>> guide, params = full_rank(target)
        >>> objective = elbo(target, guide, num_samples=10, sticking_the_landing=True)
        >>> found = fit(jax.random.key(0), objective, params, optax.adam(0.02), 1000, progress=False)
        >>> L = found.params["scale_tril"]
        >>> print(f"{(L @ L.T)[0, 1]:.2f}")  # exactly -4/9
        -0.44
    """
    start = _start("full_rank", target, init, scale, key)
    return start.guide("full_rank", FullRank(start.parts)), {
        "loc": start.loc,
        "scale_tril": _tril(scale * jnp.eye(start.parts.size)),
    }


def _tril(value: Array) -> Any:
    return constrained(value, constraints.lower_cholesky)


def low_rank(
    target: Target,
    *,
    rank: int = 5,
    init: Any = None,
    scale: float = 0.1,
    key: PRNGKeyArray | None = None,
) -> tuple[Model, dict[str, Any]]:
    r"""A guide that is a normal of low-rank plus diagonal covariance, on the unconstrained scale.

        z = loc + W f + d e,    f ~ N(0, I_r),  e ~ N(0, I_n),    cov z = W W' + diag(d^2).

    The site at address `a` draws from the conditional given the choices before it: what these tell
    of the factors is normal, with precision `I + sum_k w_k w_k' / d_k^2` and shift `sum_k w_k (z_k -
    loc_k) / d_k^2`. No `n` by `n` matrix is formed: a draw with its density takes `O(n r^3)`
    operations and `O(n r^2)` memory.

    Args:
        target: the target.
        rank: number of factors `r`.
        init: choices to begin at, as in `mean_field`.
        scale: standard deviation to begin with, on the unconstrained scale; `W` begins at a tenth of
            it, in random directions, since the gradient of the bound vanishes at zero.
        key: for draws of the prior, and for `W`.

    Returns:
        The guide, and its parameters `{"loc": {address: array}, "scale": {address: array}, "factor":
        (n, r)}`: `d` is `scale`, `W` is `factor`, its rows in the order of
        `target.unconstrain().flat.addresses`.

    Raises:
        TypeError: if `target` is no Target.
        WeftError: if `rank` is no positive integer.
        DensityError: naming the site, for discrete choices, and as in `mean_field`.

    References:
        Ong, Nott and Smith (2018), "Gaussian variational approximation with a factor covariance
        structure", section 3.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, repeat, sample
        >>> from weft.inference import low_rank
        >>> @gen
        ... def model():
        ...     return repeat(lambda: sample("x", dist.Normal(0.0, 1.0)), 100)
        >>> guide, params = low_rank(model().given(), rank=3)
        >>> params["factor"].shape, guide(params).simulate(jax.random.key(0)).choices["x"].shape
        ((100, 3), (100,))
    """
    if not isinstance(rank, (int, np.integer)) or rank < 1:
        raise WeftError(f"low_rank: rank must be a positive integer, got {rank!r}")
    start = _start("low_rank", target, init, scale, key)
    noise = jax.random.normal(
        jax.random.fold_in(as_key(_or_zero(key)), 1), (start.parts.size, rank)
    )
    return start.guide("low_rank", LowRank(start.parts)), {
        "loc": start.loc,
        "scale": start.scale(scale),
        "factor": 0.1 * scale * noise / math.sqrt(rank),
    }


def structured(
    target: Target, *, init: Any = None, scale: float = 0.1, key: PRNGKeyArray | None = None
) -> tuple[Model, dict[str, Any]]:
    r"""A guide in the shape of the model: each choice depends linearly on those that its site reads.

        z_a = loc_a + sum_{b in reads(a)} W_ab (z_b - loc_b) + scale_a eps_a,    x = T(z).

    That is a linear-Gaussian network on the unconstrained scale, along the arrows of the model among
    its latent choices, which the staged program shows; the scales are free, and depend on nothing.
    Precisely:

    - *Lanes.* Where `a` and `b` share their leading axes (of `vmap` or `scan`: same sizes and names),
      each lane has weights of its own and reads its own lane; otherwise all elements are read by all.
    - *Time.* A site that reads itself in a `scan` is a Markov chain: step `t` reads step `t - 1`,
      with weights for every step. In nested scans that goes along the inner one.
    - *What is left out.* The guide draws the sites one after the other, so that a site does not read
      one further on, such as the other state of two that alternate in a scan.

    Where the model is linear and Gaussian, and no two latent choices that are otherwise apart meet in
    an observation (a tree with the data at its leaves, a state-space model), the posterior is in the
    family. Where they do meet, as two causes of one datum, the correlation that the data bring is
    missed: take `full_rank` there.

    Args:
        target: the target.
        init: choices to begin at, as in `mean_field`.
        scale: standard deviation to begin with, given what a choice reads; weights begin at zero.
        key: for draws of the prior.

    Returns:
        The guide, and its parameters `{"loc": {address: array}, "scale": {address: array}, "weights":
        {address: {address read: (lanes, elements, elements read)}}}`; of a chain, the weights of a
        site for itself are `(steps - 1, lanes, elements, elements)`.

    Raises:
        TypeError: if `target` is no Target.
        DensityError: naming the site, for discrete choices, for one observed in part, and as in
            `mean_field`.

    References:
        Hoffman and Blei (2015), "Structured stochastic variational inference"; Ambrogioni et al.
        (2021), "Automatic structured variational inference".

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import structured
        >>> @gen
        ... def walk():
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, 1.0))
        ...         sample("y", dist.Normal(x, 1.0))
        ...         return x, None
        ...     jax.lax.scan(step, sample("x0", dist.Normal(0.0, 1.0)), None, length=10)
        >>> guide, params = structured(walk().given({"y": jnp.ones(10)}))
        >>> {b: w.shape for b, w in params["weights"]["x"].items()}
        {'x0': (1, 10, 1), 'x': (9, 1, 1, 1)}
    """
    start = _start("structured", target, init, scale, key)
    if start.index:
        raise DensityError(
            f"structured: {', '.join(map(repr, start.index))} is observed in part, so that its lanes are not alike; "
            "take mean_field, full_rank or low_rank"
        )
    reads = site_inputs(target.program.code()[0].jaxpr)
    parents, weights, chains = [], {}, {}
    for i, place in enumerate(start.places):
        read, own = reads.get(place.address, frozenset()), {}
        lanes = {}
        for other in start.places[:i]:
            if other.address in read:
                n = _shared(target, place.address, other.address)
                lanes[other.address] = n
                own[other.address] = jnp.zeros((n, place.size // n, other.size // n))
        if place.address in read:
            chains[place.address] = order = _chain(target, place)
            steps, series, m = order.shape
            own[place.address] = jnp.zeros((steps - 1, series, m, m))
        parents.append((place.address, tuple(lanes.items())))
        if own:
            weights[place.address] = own
    return start.guide("structured", Structured(tuple(parents), chains)), {
        "loc": start.loc,
        "scale": start.scale(scale),
        "weights": weights,
    }


def _shared(target: Target, address: str, other: str) -> int:
    """Number of lanes of the leading axes that two sites have in common."""
    n = 1
    for a, b in zip(target.sites[address].axes, target.sites[other].axes, strict=False):
        if a != b or a.kind not in ("lanes", "scan"):
            break
        n *= a.size
    return n


def _chain(target: Target, place: Place) -> Array:
    """The elements of a site in a scan as `(steps, lanes, elements of a step)`."""
    axes = target.sites[place.address].axes
    time = max(i for i, a in enumerate(axes) if a.kind == "scan")
    outside = math.prod(a.size for i, a in enumerate(axes) if i != time and a.kind != "batch")
    order = jnp.moveaxis(jnp.arange(place.size).reshape(place.shape), time, 0)
    return order.reshape(axes[time].size, outside, -1)


def flow(
    target: Target,
    *,
    num_hidden: int = 32,
    num_bins: int = 8,
    init: Any = None,
    scale: float = 0.1,
    key: PRNGKeyArray | None = None,
) -> tuple[Model, dict[str, Any]]:
    r"""A guide that is an autoregressive spline flow over all unconstrained elements.

        z_k = loc_k + scale_k u_k,
        u_k = shift_k(u_<k) + exp(log_scale_k(u_<k)) s_k(eps_k; u_<k),    eps_k ~ N(0, 1),

    with `s_k` a monotone rational-quadratic spline, and shift, log scale and spline given by one
    masked network with a hidden layer and a linear skip. In the order of the program every normal is
    in the family (by the skip alone), and with width and bins any law of `z` can be approached; it is
    one layer, since the layers of one order make up a map of the same kind, and only such a map is a
    product over sites. It begins as the independent normals of `mean_field`.

    A density takes one pass of the network, a draw its elements in sequence, at the cost of one pass
    in all.

    Args:
        target: the target.
        num_hidden: units of the hidden layer.
        num_bins: bins of each spline.
        init: choices to begin at, as in `mean_field`.
        scale: standard deviation to begin with, on the unconstrained scale.
        key: for draws of the prior, and for the network.

    Returns:
        The guide, and its parameters `{"loc": {address: array}, "scale": {address: array}, "network":
        {...}}`.

    Raises:
        TypeError: if `target` is no Target.
        WeftError: for numbers of units or bins that make no network.
        DensityError: naming the site, for discrete choices, and as in `mean_field`.

    References:
        Papamakarios, Pavlakou and Murray (2017), "Masked autoregressive flow", equations 3 and 4;
        Durkan et al. (2019), "Neural spline flows"; Germain et al. (2015), "MADE".

    Example:
        >>> import jax, jax.numpy as jnp, optax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import elbo, fit, flow
        >>> @gen
        ... def banana():
        ...     x = sample("x", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(x**2, 0.3))
        >>> target = banana().given()
        >>> guide, params = flow(target)
        >>> objective = elbo(target, guide, num_samples=32)
        >>> rate = optax.cosine_decay_schedule(0.03, 1000)
        >>> found = fit(jax.random.key(0), objective, params, optax.adam(rate), 1000, progress=False)
        >>> print(f"{found.bounds[-200:].mean():.1f}")  # the log evidence is 0; of normals the best is -0.8
        -0.1
    """
    for what, value, least in (("num_hidden", num_hidden, 1), ("num_bins", num_bins, 2)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise WeftError(f"flow: {what} must be an integer, {least} at least, got {value!r}")
    if num_bins > 200:
        raise WeftError(f"flow: num_bins must be 200 at most, got {num_bins}")
    start = _start("flow", target, init, scale, key)
    n, outputs = start.parts.size, 2 + 3 * num_bins - 1
    noise_key = jax.random.fold_in(as_key(_or_zero(key)), 1)
    network = {
        "in": jax.random.normal(noise_key, (num_hidden, n)) / math.sqrt(n),
        "hidden_bias": jnp.zeros(num_hidden),
        "out": jnp.zeros((n, num_hidden, outputs)),
        "bias": jnp.zeros((n, outputs)),
        "skip": jnp.zeros((n, n)),
    }
    return start.guide("flow", Flow(start.parts)), {
        "loc": start.loc,
        "scale": start.scale(scale),
        "network": network,
    }


# --- Laplace -------------------------------------------------------------------------------------


def laplace(
    target: Target,
    *,
    init: Any = None,
    num_steps: int = 1000,
    key: PRNGKeyArray | None = None,
) -> tuple[Model, dict[str, Any]]:
    r"""The normal at the mode of the unconstrained density, with the inverse of its curvature.

        z ~ N(z*, H^-1),    z* = argmax log p(z),    H = - d^2 log p / dz^2 at z*,

    where `p(z)` has the Jacobians of the bijections in it. The mode is found by L-BFGS, then Newton's
    method; `H`, `n` by `n`, is computed by automatic differentiation and inverted in double
    precision. The result is the guide of `full_rank` at these parameters: ready as it is, and a good
    start for `fit`.

    Args:
        target: the target.
        init: choices to begin at, as in `mean_field`. Where there are several modes, the one found is
            that uphill of it.
        num_steps: most steps of L-BFGS.
        key: for draws of the prior.

    Returns:
        The guide, and its parameters `{"loc": {address: array}, "scale_tril": (n, n)}`.

    Raises:
        TypeError: if `target` is no Target.
        DensityError: naming the site, for discrete choices, and as in `mean_field`; naming the
            directions, where the density does not fall off from the point found in all of them;
            where no mode is found.

    References:
        Tierney and Kadane (1986), "Accurate approximations for posterior moments and marginal
        densities", section 2.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import laplace
        >>> @gen
        ... def model():
        ...     mu = sample("mu", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(mu, 1.0))
        >>> guide, params = laplace(model().given({"y": 2.0}))
        >>> program = guide(params)  # the posterior, N(1, 1/2)
        >>> print(f"{program.log_density({'mu': 1.0}):.4f}")
        -0.5724
    """
    if tracing(key):
        raise WeftError(
            "laplace: it decides on the values that it finds, so it runs outside of jit and vmap"
        )
    start = _start("laplace", target, init, 1.0, key)
    space = start.target.unconstrain().flat
    z = jnp.concatenate([x.reshape(-1) for x in start.loc.values()])
    mode, hessian = _mode(start.target, z, num_steps)
    covariance = np.linalg.inv(hessian)
    tril = jnp.asarray(np.linalg.cholesky((covariance + covariance.T) / 2), z.dtype)
    loc = flatten(space.unravel(jnp.asarray(mode, z.dtype)))
    return start.guide("laplace", FullRank(start.parts)), {"loc": loc, "scale_tril": _tril(tril)}


@eqx.filter_jit
def _climb(target: Target, z: Vector, num_steps: int) -> Vector:
    """L-BFGS from `z`, until the gradient vanishes or the steps are used up."""
    space = target.unconstrain().flat

    def loss(z: Vector) -> Array:
        return -space.log_density(z)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def advance(carry: Any) -> Any:
        z, state, i, _ = carry
        value, slope = value_and_grad(z, state=state)
        step, state = solver.update(slope, state, z, value=value, grad=slope, value_fn=loss)
        new = optax.apply_updates(z, step)
        moved = jnp.isfinite(new).all() & (new != z).any()
        return jnp.where(moved, new, z), state, i + 1, moved

    def proceed(carry: Any) -> Any:
        return carry[3] & (carry[2] < num_steps)

    return jax.lax.while_loop(proceed, advance, (z, solver.init(z), jnp.int32(0), jnp.bool_(True)))[
        0
    ]


@eqx.filter_jit
def _derivatives(target: Target, z: Vector) -> tuple[Array, Array, Array]:
    """Value, gradient and Hessian of minus the log density."""
    space = target.unconstrain().flat

    def loss(z: Vector) -> Array:
        return -space.log_density(z)

    return (*jax.value_and_grad(loss)(z), jax.hessian(loss)(z))


def _mode(target: Target, z: Vector, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The mode and the Hessian of minus the log density there, in double precision."""
    value = _derivatives(target, z)[0]
    if not np.isfinite(value):
        raise DensityError(
            "laplace: the log density is not finite at the point to begin at; give another: init=choices"
        )
    point = np.asarray(_climb(target, z, num_steps), float)
    gain = np.inf
    for _ in range(50):
        value, slope, hessian = (
            np.asarray(x, float) for x in _derivatives(target, jnp.asarray(point, z.dtype))
        )
        _check_curvature(target, hessian)
        step = -np.linalg.solve(hessian, slope)
        last, gain = gain, -0.5 * float(slope @ step)  # what the quadratic still promises, in nats
        if gain < 1e-10 or gain > 0.5 * last:  # no better in the precision at hand
            break
        point = point + step
    if not gain < 1e-3:
        raise DensityError(
            f"laplace: no mode found: the log density can still rise by about {gain:.2g} from the point reached, at a "
            f"gradient that is largest along {_largest(target, np.abs(slope))}. Begin elsewhere, init=choices; or take "
            "full_rank and fit, which need no mode"
        )
    return point + step, hessian


def _check_curvature(target: Target, hessian: np.ndarray) -> None:
    """Refuse a Hessian that is not positive definite.

    Raises:
        DensityError: naming the directions in which the density does not fall off.
    """
    flat = np.zeros(len(hessian))
    if not np.isfinite(hessian).all():
        flat = (~np.isfinite(hessian)).any(1).astype(float)
        what = "the curvature of the log density is not finite"
    elif (np.diagonal(hessian) <= 0).any():
        flat = (np.diagonal(hessian) <= 0).astype(float)
        what = "the log density does not fall off from there"
    else:
        root = np.sqrt(np.diagonal(hessian))
        values, vectors = np.linalg.eigh(hessian / np.outer(root, root))
        # The relative error of a Hessian in single precision, summed over its rows.
        if values[0] <= 10 * len(hessian) * np.finfo(np.float32).eps:
            flat = vectors[:, 0] ** 2
        what = f"the log density does not fall off from there: its relative curvature is {values[0]:.2g}"
    if not flat.any():
        return
    raise DensityError(
        f"laplace: at the point found, {what} along {_largest(target, flat)}, so there is no normal approximation. "
        "Model and data do not determine these choices, or the density has no mode but rises without end (a "
        "hierarchical scale that goes to zero). Give them narrower priors, reparametrise (noncentered(model, ...), or "
        "only the combinations that are determined), begin elsewhere with init=choices, or take full_rank and fit"
    )


def _largest(target: Target, share: np.ndarray) -> str:
    """Addresses of the choices that have the largest share."""
    parts = target.unconstrain().flat.addresses
    most = {a: float(share[part].max(initial=0.0)) for a, part in parts.items()}
    return ", ".join(repr(a) for a, x in most.items() if x > 0.1 * share.max())
