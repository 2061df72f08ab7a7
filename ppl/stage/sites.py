"""The site: one random choice, factor or record of a program, as one JAX primitive, ``site_p``.

The operands of ``site_p`` are the arrays of the payload: distribution, gradient strategy, scale, mask, value. Its
parameters are the rest. Only its rules unflatten the payload. The primitive is staged and never evaluated: the
interpreter gives it its meaning. Its batching rule keeps the un-vmapped payload and adds a lane, so that a plain
``jax.vmap`` makes independent draws.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad, mlir

from .compat import Primitive, ShapedArray, fancy_primitive_batchers
from .cotangents import finite_cotangents
from .errors import GradientError, ModelError
from .packing import Skeleton, is_number, pack
from .specs import SiteSpec, in_support
from .splits import WHOLE, Split, gathered, own_part


class Lane(NamedTuple):
    """One ``jax.vmap`` around an equation. ``mapped`` tells which operands carry its axis.

    If the axis is split over a mesh, ``size`` is the size of one part.
    """

    size: int
    name: str | None
    mapped: tuple[bool, ...]
    split: Split = WHOLE

    @property
    def whole(self) -> int:
        """The size of the whole axis."""
        return self.size * self.split.shards


DENSITY = "weft density"
"""The scope of the equations by which the density of a site is evaluated."""


# --- the primitive ----------------------------------------------------------------------------------------------------

site_p = Primitive("site")
site_p.multiple_results = True


@site_p.def_abstract_eval
def _(*_: Any, spec: SiteSpec, skeleton: Skeleton, lanes: tuple[Lane, ...]) -> list[ShapedArray]:
    return [ShapedArray(lane_shape(lanes) + spec.shape, spec.dtype)]


@site_p.def_impl
def _outside(*_: Any, spec: SiteSpec, **__: Any) -> Any:
    raise ModelError(
        f"{spec.kind} site {spec.name!r} stands outside a program: decorate the function with @gen and run it with "
        "model(*args).simulate(key), .log_density(choices) or .given(data)"
    )


mlir.register_lowering(site_p, lambda ctx, *_, **params: _outside(**params))


def _refuse_jvp(primals: Any, tangents: Any, *, spec: SiteSpec, **__: Any) -> Any:
    raise GradientError(
        f"jax.grad, jvp or linearize goes through site {spec.name!r} inside a model, where the choice has no value "
        "yet. Differentiate from outside instead: jax.grad of model(...).log_density(choices), or of expect(f)(key, "
        "...)"
    )


ad.primitive_jvps[site_p] = _refuse_jvp


def stack_lane(
    axis_data: Any, args: Any, dims: Any, lanes: tuple[Lane, ...]
) -> tuple[list[Any], tuple[Lane, ...]]:
    """Move the mapped axes of the operands to the front, and add the new outermost lane."""
    args = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True)]
    name = axis_data.name if isinstance(axis_data.name, str) else None
    mapped = tuple(d is not None for d in dims)
    return args, (*lanes, Lane(axis_data.size, name, mapped))


def _batch(
    axis_data: Any, args: Any, dims: Any, *, spec: SiteSpec, skeleton: Skeleton, lanes: Any
) -> Any:
    args, lanes = stack_lane(axis_data, args, dims, lanes)
    outs = site_p.bind(*args, spec=spec, skeleton=skeleton, lanes=lanes)
    return outs, [0] * len(outs)


fancy_primitive_batchers[site_p] = _batch


def lane_shape(lanes: tuple[Lane, ...]) -> tuple[int, ...]:
    """The sizes of the lanes, outermost first. They are stacked innermost first."""
    return tuple(lane.size for lane in reversed(lanes))


# --- binding ----------------------------------------------------------------------------------------------------------


def bind_site(spec: SiteSpec, payload: dict[str, Any]) -> Any:
    """Stage a site whose payload is given as a dict with ``"d"``, ``"grad"``, ``"scale"``, ``"value"``, ``"where"``.

    The scale is a tuple of numbers, one for each time that the site was scaled.
    """
    arrays, skeleton = pack(payload, is_number)
    # A primitive without operands is never batched, so this one has a zero.
    return site_p.bind(*arrays, jnp.zeros(()), spec=spec, skeleton=skeleton, lanes=())[0]


# --- a site met by the interpreter ------------------------------------------------------------------------------------


class Site:
    """A site equation with its operands, as a handler sees it. All its methods work over the lanes."""

    def __init__(
        self,
        params: dict[str, Any],
        operands: list[Any],
        address: tuple[str, ...],
        axes: tuple[Any, ...],
    ) -> None:
        self.spec: SiteSpec = params["spec"]
        self.skeleton: Skeleton = params["skeleton"]
        self.lanes: tuple[Lane, ...] = params["lanes"]
        self.operands = operands
        self.address = address
        self.axis_names = {
            n for n in (*axes, *(lane.name for lane in self.lanes), *self.spec.dims) if n
        }

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return lane_shape(self.lanes) + self.spec.shape

    @functools.cached_property
    def parts(self) -> frozenset[str]:
        """The names of the parts that the payload has."""
        return frozenset(self.skeleton.unpack([0.0] * self.skeleton.num_arrays))

    def guarded(self) -> Site:
        """The same site, but cotangents to its operands that are not finite become zero."""
        return self.at(finite_cotangents(self.operands))

    def at(self, operands: list[Any]) -> Site:
        """The same site with other operands."""
        site = copy.copy(self)
        site.operands = operands
        return site

    def over_lanes(self, f: Any, *xs: Any) -> Any:
        """``f(payload, *xs)`` for every lane.

        ``xs`` have all lane axes in front. The payload has those that are mapped.
        """

        def one(operands: Any, *xs: Any) -> Any:
            return f(self.skeleton.unpack(operands[:-1]), *xs)

        for lane in self.lanes:
            in_axes = ([0 if m else None for m in lane.mapped], *(0 for _ in xs))
            one = jax.vmap(one, in_axes, axis_size=lane.size, axis_name=lane.name)
        return one(self.operands, *xs)

    def part(self, name: str) -> Any:
        """One part of the payload, with all lane axes in front."""
        return self.over_lanes(lambda payload: payload[name])

    def draw(self, key: jax.Array) -> jax.Array:
        """One draw for each lane.

        Some lanes map no parameter. They are drawn in one call with one key if the distribution takes a sample shape.
        Every other lane has its own key, into which the lane's index is folded.
        """
        n = self.spec.num_distribution_arrays
        mapped = [not self.spec.takes_sample_shape or any(lane.mapped[:n]) for lane in self.lanes]
        block = tuple(
            lane.whole for lane, m in reversed(list(zip(self.lanes, mapped, strict=True))) if not m
        )

        def one(key: Any, operands: Any) -> Any:
            d = self.skeleton.unpack(operands[:-1])["d"]
            d = gathered(d, self.spec) if self.spec.split else d
            return jnp.asarray(d.sample(key, block) if block else d.sample(key))

        for lane, m in zip(self.lanes, mapped, strict=True):
            if m:
                one = self._fold_lane(one, lane)
        # Lanes drawn as a block map no operand of the distribution, so any slice of the other operands serves.
        operands = self._first_slice([not m for m in mapped])
        value = one(key, operands)
        outer = [i for i, m in reversed(list(enumerate(mapped))) if m]
        inner = [i for i, m in reversed(list(enumerate(mapped))) if not m]
        now = {lane: axis for axis, lane in enumerate(outer + inner)}
        order = [now[i] for i in reversed(range(len(self.lanes)))]
        value = (
            jnp.transpose(value, [*order, *range(len(order), value.ndim)])
            if order != sorted(order)
            else value
        )
        drawn_whole = [
            WHOLE if m else lane.split for lane, m in zip(self.lanes, mapped, strict=True)
        ]
        value = own_part(value, (*reversed(drawn_whole), *self.spec.split))
        return value.astype(self.spec.dtype)

    @staticmethod
    def _fold_lane(one: Any, lane: Lane) -> Any:
        def lanes(key: Any, operands: Any) -> Any:
            indices = lane.split.indices(lane.size)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
            axes = (0, [0 if m else None for m in lane.mapped])
            return jax.vmap(one, axes, axis_size=lane.size)(keys, operands)

        return lanes

    def _first_slice(self, blocked: list[bool]) -> list[Any]:
        operands = list(self.operands)
        for i, operand in enumerate(operands):
            axis = 0
            for lane, drop in reversed(list(zip(self.lanes, blocked, strict=True))):
                if lane.mapped[i]:
                    if drop:
                        operand = jax.lax.index_in_dim(operand, 0, axis, keepdims=False)
                    else:
                        axis += 1
            operands[i] = operand
        return operands

    def log_prob(self, value: jax.Array) -> jax.Array:
        """The log density of each element, of shape ``lanes + batch_shape``, as the distribution states it."""
        with jax.named_scope(DENSITY):
            return self.over_lanes(lambda payload, v: jnp.asarray(payload["d"].log_prob(v)), value)

    def log_prob_anywhere(self, value: jax.Array) -> jax.Array:
        """The same, but minus infinity outside the support. Some distributions state a number there."""

        def one(payload: Any, v: Any) -> Any:
            log_prob = jnp.asarray(payload["d"].log_prob(v))
            inside = in_support(payload["d"], v)
            if inside is None or jnp.shape(inside) != log_prob.shape:
                return log_prob
            return jnp.where(inside, log_prob, -jnp.inf)

        with jax.named_scope(DENSITY):
            return self.over_lanes(one, value)

    def weigh(self, log_prob: jax.Array) -> jax.Array:
        """Apply the site's scale and mask to a log density."""
        if not self.parts & {"scale", "where"}:
            return log_prob

        def one(payload: Any, lp: Any) -> Any:
            if payload.get("where") is not None:
                lp = jnp.where(payload["where"], lp, 0)
            return math.prod(payload.get("scale") or (), start=lp)

        return self.over_lanes(one, log_prob)
