"""The site: one random choice, factor or record of a program, as one JAX primitive.

``site_p`` keeps everything that stands at a site unflattened nowhere but in its rules: its operands are the arrays of
the payload (distribution, gradient strategy, scale, mask, value), its parameters the rest. It is staged, never
evaluated: the interpreter gives it its meaning. Its batching rule keeps the un-vmapped payload and stacks the lanes,
so that a plain ``jax.vmap`` makes independent draws.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, mlir

from .compat import Primitive, ShapedArray, Tracer, fancy_primitive_batchers
from .cotangents import finite_cotangents
from .errors import GradientError, ModelError
from .packing import Skeleton, is_number, pack

# --- what a site knows that is not an array ---------------------------------------------------------------------------


class Lane(NamedTuple):
    """One ``jax.vmap`` that an equation stands under; ``mapped`` tells which operands carry its axis."""

    size: int
    name: str | None
    mapped: tuple[bool, ...]


class Constant:
    """A value kept among the static parameters of an equation: compares by value, hashes by type."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return NotImplemented
        a, b = self.value, other.value
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            return type(a) is type(b) and np.array_equal(a, b)
        return a is b or (type(a) is type(b) and bool(a == b))

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __repr__(self) -> str:
        return repr(self.value)


@dataclasses.dataclass(frozen=True)
class SiteSpec:
    """The static part of a site: what is true of it before any value is known."""

    name: str
    kind: str  # "sample", "factor" or "deterministic"
    label: str  # name of the distribution's class
    shape: tuple[int, ...]  # of one lane's value
    dtype: Any
    batch_ndim: int
    dims: tuple[str | None, ...] = ()
    support: Constant | None = None
    values: Constant | None = None
    reparametrised: bool = False
    takes_sample_shape: bool = False
    num_distribution_arrays: int = 0
    hidden: bool = False
    unsampled: str = ""  # why it cannot be drawn

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shape[self.batch_ndim :]


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
        f"jax.grad, jvp or linearize goes through site {spec.name!r} inside a model, where the choice has "
        f"no value yet. "
        "Differentiate from outside instead: jax.grad of model(...).log_density(choices), or of expect(f)(key, ...)"
    )


ad.primitive_jvps[site_p] = _refuse_jvp


def stack_lane(
    axis_data: Any, args: Any, dims: Any, lanes: tuple[Lane, ...]
) -> tuple[list[Any], tuple[Lane, ...]]:
    """Bring mapped operands' axes to the front and add the new outermost lane."""
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
    """Sizes outermost first (lanes are stacked innermost first)."""
    return tuple(lane.size for lane in reversed(lanes))


# --- binding ----------------------------------------------------------------------------------------------------------


def bind_site(spec: SiteSpec, payload: dict[str, Any]) -> Any:
    """Stage a site whose payload is given as a dict with ``"d"``, ``"grad"``, ``"scale"``, ``"value"``, ``"where"``."""
    arrays, skeleton = pack(payload, is_number)
    # A primitive without operands would never be batched, hence the zero.
    return site_p.bind(*arrays, jnp.zeros(()), spec=spec, skeleton=skeleton, lanes=())[0]


def sample_spec(name: str, d: Any, dims: tuple[str | None, ...], hidden: bool = False) -> SiteSpec:
    """Everything static about a sample site, from its distribution."""
    arrays, skeleton = pack(d, is_number)
    label = type(d).__name__
    if jax.tree_util.all_leaves([d]):
        raise ModelError(
            f"site {name!r}: {label} is no pytree, so its parameters cannot be traced; make it a class derived from "
            "equinox.Module (or register it with jax.tree_util), with sample(key) and log_prob(value)"
        )
    try:
        hash(skeleton)
    except TypeError as e:
        raise ModelError(
            f"site {name!r}: {label} keeps an unhashable value in its static structure ({e}); "
            f"{_array_field(d)}pass its parameters as jax arrays (jnp.asarray)"
        ) from None
    shapes = tuple((jnp.shape(a), jnp.result_type(a)) for a in arrays)
    return _sample_spec(name, skeleton, shapes, tuple(dims), hidden, _support(d), _values(d), label)


def _array_field(d: Any) -> str:
    for field, value in vars(d).items():
        if isinstance(value, np.ndarray):
            return f"its field {field!r} is a NumPy array of shape {value.shape}: "
    return ""


@functools.lru_cache(maxsize=4096)
def _sample_spec(
    name: str,
    skeleton: Skeleton,
    shapes: tuple[Any, ...],
    dims: tuple[str | None, ...],
    hidden: bool,
    support: Constant | None,
    values: Constant | None,
    label: str,
) -> SiteSpec:
    arrays = [jax.ShapeDtypeStruct(*s) for s in shapes]
    key = jax.eval_shape(lambda: jax.random.key(0))
    stated: dict[str, Any] = {}

    def draw(key: Any, arrays: Any) -> Any:
        d = skeleton.unpack(arrays)
        for attribute in ("batch_shape", "event_shape", "has_rsample"):
            stated[attribute] = getattr(d, attribute, None)
        stated["takes_sample_shape"] = "sample_shape" in inspect.signature(d.sample).parameters
        stated["discrete"] = is_discrete(d)
        return jnp.asarray(d.sample(key))

    unsampled = ""
    shape: tuple[int, ...] = ()
    dtype: Any = None
    try:
        out = jax.eval_shape(draw, key, arrays)
        shape, dtype = tuple(out.shape), out.dtype
    except (NotImplementedError, ImportError) as e:
        unsampled = str(e) or "it is improper"
    except Exception as e:
        raise ModelError(
            f"site {name!r}: {label} cannot be sampled. A distribution is a pytree with sample(key) and "
            f"log_prob(value): {type(e).__name__}: {e}"
        ) from e
    batch_shape = stated.get("batch_shape")
    if batch_shape is None:
        value = jax.ShapeDtypeStruct(shape, dtype)
        density = jax.eval_shape(lambda v, a: skeleton.unpack(a).log_prob(v), value, arrays)
        batch_shape = density.shape
        if tuple(batch_shape) != shape[: len(batch_shape)]:
            raise ModelError(
                f"site {name!r}: log_prob of {label} has shape {batch_shape}, which does not lead the shape "
                f"{shape} of a draw"
            )
    else:
        expected = tuple(batch_shape) + tuple(stated["event_shape"])
        if not unsampled and shape != expected:
            unsampled = f"its draws have shape {shape}, not the {expected} that it states"
            if len(shape) > len(expected):
                raise ModelError(
                    f"site {name!r}: {label} states batch_shape {tuple(batch_shape)} and event_shape "
                    f"{tuple(stated['event_shape'])}, but a draw has shape {shape}. It was probably built by jax.vmap; "
                    "sample inside the vmap instead: jax.vmap(lambda x: sample(name, make(x)))(xs)"
                )
        if unsampled:
            shape = expected
            dtype = (
                jnp.result_type(int if stated["discrete"] else float) if dtype is None else dtype
            )
    if len(dims) > len(shape):
        raise ModelError(
            f"site {name!r}: dims={dims} names {len(dims)} axes of a value of shape {shape}"
        )
    rsample = stated.get("has_rsample")
    return SiteSpec(
        name=name,
        kind="sample",
        label=label,
        shape=shape,
        dtype=jnp.dtype(dtype),
        batch_ndim=len(batch_shape),
        dims=dims,
        support=support,
        values=values,
        reparametrised=bool(rsample) and jnp.issubdtype(dtype, jnp.inexact),
        takes_sample_shape=stated["takes_sample_shape"],
        num_distribution_arrays=len(arrays),
        hidden=hidden,
        unsampled=unsampled,
    )


def is_discrete(d: Any) -> bool:
    """Whether a distribution says that it is discrete (some of NumPyro's fail to say anything)."""
    try:
        return bool(d.is_discrete)
    except (AttributeError, AssertionError, NotImplementedError):
        return False


def _support(d: Any) -> Constant | None:
    """The support, where no traced value enters it."""
    try:
        support = d.support
        leaves = jax.tree.leaves(support)
    except (AttributeError, NotImplementedError):
        return None
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return None
    return Constant(support)


def _values(d: Any) -> Constant | None:
    """The values of one element of a finite support, where they can be listed without a traced value."""
    if not getattr(d, "has_enumerate_support", False):
        return None
    try:
        with jax.ensure_compile_time_eval():
            listed = d.enumerate_support(expand=False)
        if isinstance(listed, Tracer):
            return None
        listed = np.asarray(listed)
    except Exception:  # NumPyro raises several kinds where it cannot list a support
        return None
    if listed.size != listed.shape[0]:
        return None
    return Constant(listed.reshape(-1))


# --- a site met by the interpreter ------------------------------------------------------------------------------------


class Site:
    """A site equation with its operands: what a handler sees. All its functions work over the lanes."""

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
        """Which parts the payload has."""
        return frozenset(self.skeleton.unpack([0.0] * self.skeleton.num_arrays))

    def guarded(self) -> Site:
        """The same site; cotangents to its operands that are not finite are replaced by zero."""
        site = copy.copy(self)
        site.operands = finite_cotangents(self.operands)
        return site

    def over_lanes(self, f: Any, *xs: Any) -> Any:
        """``f(payload, *xs)`` for every lane.

        ``xs`` carry all lane axes in front, the payload those that are mapped.
        """

        def one(operands: Any, *xs: Any) -> Any:
            return f(self.skeleton.unpack(operands[:-1]), *xs)

        for lane in self.lanes:
            one = jax.vmap(
                one,
                in_axes=([0 if m else None for m in lane.mapped], *(0 for _ in xs)),
                axis_size=lane.size,
            )
        return one(self.operands, *xs)

    def part(self, name: str) -> Any:
        """One part of the payload with all lane axes in front."""
        return self.over_lanes(lambda payload: payload[name])

    def draw(self, key: jax.Array) -> jax.Array:
        """One draw a lane.

        Lanes over which no parameter is mapped are drawn in one call with one key where the distribution takes a sample
        shape; every other lane has the key with its index folded in.
        """
        n = self.spec.num_distribution_arrays
        mapped = [not self.spec.takes_sample_shape or any(lane.mapped[:n]) for lane in self.lanes]
        block = tuple(
            lane.size for lane, m in reversed(list(zip(self.lanes, mapped, strict=True))) if not m
        )

        def one(key: Any, operands: Any) -> Any:
            d = self.skeleton.unpack(operands[:-1])["d"]
            return jnp.asarray(d.sample(key, block) if block else d.sample(key))

        for lane, m in zip(self.lanes, mapped, strict=True):
            if m:
                one = self._fold_lane(one, lane)
        # Lanes that were drawn as a block: an operand mapped there is none of the distribution's, so any slice serves.
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
        return value.astype(self.spec.dtype)

    @staticmethod
    def _fold_lane(one: Any, lane: Lane) -> Any:
        def lanes(key: Any, operands: Any) -> Any:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(lane.size))
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
        """Log density of each element, shape ``lanes + batch_shape``, as the distribution states it."""
        return self.over_lanes(lambda payload, v: jnp.asarray(payload["d"].log_prob(v)), value)

    def weigh(self, log_prob: jax.Array) -> jax.Array:
        """Apply the site's scale and mask to a log density."""
        if not self.parts & {"scale", "where"}:
            return log_prob

        def one(payload: Any, lp: Any) -> Any:
            if payload.get("where") is not None:
                lp = jnp.where(payload["where"], lp, 0)
            return lp * payload["scale"] if payload.get("scale") is not None else lp

        return self.over_lanes(one, log_prob)
