"""What is known of a site before it has a value: its shape, its support, whether it can be drawn."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from .compat import Tracer
from .errors import ModelError
from .implicit import is_implicit
from .packing import Skeleton, is_number, pack
from .splits import WHOLE, Split


class Constant:
    """A value among the static parameters of an equation. It compares by value and hashes by type."""

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
    """The static part of a site: what holds before any value is known."""

    name: str
    kind: str  # "sample", "factor" or "deterministic"
    label: str  # name of the distribution's class
    shape: tuple[int, ...]  # of the value of one lane
    dtype: Any
    batch_ndim: int
    dims: tuple[str | None, ...] = ()
    support: Constant | None = None
    values: Constant | None = None
    discrete: bool = False
    reparametrised: bool = False
    implicit: bool = False  # differentiated through its distribution function
    takes_sample_shape: bool = False
    num_distribution_arrays: int = 0
    hidden: bool = False
    unsampled: str = ""  # why it cannot be drawn
    split: tuple[Split, ...] = ()  # of the batch axes, where one of them is no whole axis

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shape[self.batch_ndim :]

    @property
    def whole_batch(self) -> tuple[int, ...]:
        """The batch shape with whole axes."""
        batch = self.shape[: self.batch_ndim]
        splits = self.split or (WHOLE,) * self.batch_ndim
        return tuple(n * split.shards for n, split in zip(batch, splits, strict=True))


def sample_spec(name: str, d: Any) -> SiteSpec:
    """The static part of a sample site, from its distribution."""
    label = type(d).__name__
    if isinstance(d, type):
        raise ModelError(
            f"site {name!r}: expected a distribution, got the class {d.__name__}: give it parameters"
        )
    if not (hasattr(d, "sample") and hasattr(d, "log_prob")):
        raise ModelError(
            f"site {name!r}: expected a distribution (a pytree with sample(key) and log_prob(value)) or a program, "
            f"model(*args); got {label}"
        )
    if jax.tree_util.all_leaves([d]):
        raise ModelError(
            f"site {name!r}: {label} is no pytree, so its parameters cannot be traced; make it a class derived from "
            "equinox.Module (or register it with jax.tree_util), with sample(key) and log_prob(value)"
        )
    for array in _static_arrays(jax.tree.structure(d)):
        kind = "a traced value" if isinstance(array, Tracer) else "an array"
        field = next((f for f, x in vars(d).items() if x is array), None)
        raise ModelError(
            f"site {name!r}: {label} keeps {kind} of shape {array.shape} in its static structure"
            + (f", its field {field!r}" if field else "")
            + ". Give that parameter as a plain number, known when the model is staged"
        )
    arrays, skeleton = pack(d, is_number)
    try:
        hash(skeleton)
    except TypeError as e:
        raise ModelError(
            f"site {name!r}: {label} keeps an unhashable value in its static structure: {e}"
        ) from None
    shapes = tuple((jnp.shape(a), jnp.result_type(a)) for a in arrays)
    x64 = bool(jax.config.read("jax_enable_x64"))
    return _sample_spec(name, skeleton, shapes, _support(d), _values(d), label, x64)


def _static_arrays(treedef: Any) -> Iterator[Any]:
    """Arrays in the structure of a pytree. They would be part of a compilation key, which cannot hold arrays."""
    stack = [treedef.node_data()]
    while stack:
        x = stack.pop()
        if isinstance(x, Tracer) or (isinstance(x, (np.ndarray, jax.Array)) and x.ndim):
            yield x
        elif isinstance(x, (tuple, list)):
            stack.extend(x)
    for child in treedef.children():
        yield from _static_arrays(child)


@functools.lru_cache(maxsize=4096)
def _sample_spec(
    name: str,
    skeleton: Skeleton,
    shapes: tuple[Any, ...],
    support: Constant | None,
    values: Constant | None,
    label: str,
    x64: bool,  # dtypes of draws depend on it, so it is part of the cache's key
) -> SiteSpec:
    arrays = [jax.ShapeDtypeStruct(*s) for s in shapes]
    shape, dtype, stated, unsampled = _drawn(name, skeleton, arrays, label)
    batch_shape = stated.get("batch_shape")
    if batch_shape is None:
        batch_shape = _shape_of_density(name, skeleton, arrays, label, shape, dtype)
    else:
        expected = tuple(batch_shape) + tuple(stated["event_shape"])
        if not unsampled and shape != expected:
            unsampled = _not_as_stated(name, label, shape, stated)
        if unsampled:
            shape = expected
            dtype = (
                jnp.result_type(int if stated["discrete"] else float) if dtype is None else dtype
            )
    differentiable = bool(stated.get("has_rsample")) or stated.get("implicit", False)
    return SiteSpec(
        name=name,
        kind="sample",
        label=label,
        shape=shape,
        dtype=jnp.dtype(dtype),
        batch_ndim=len(batch_shape),
        support=support,
        values=values,
        discrete=stated["discrete"] or not jnp.issubdtype(dtype, jnp.inexact),
        reparametrised=differentiable and jnp.issubdtype(dtype, jnp.inexact),
        implicit=stated.get("implicit", False),
        takes_sample_shape=stated["takes_sample_shape"],
        num_distribution_arrays=len(arrays),
        unsampled=unsampled,
    )


def _drawn(
    name: str, skeleton: Skeleton, arrays: list[Any], label: str
) -> tuple[tuple[int, ...], Any, dict[str, Any], str]:
    """The shape and dtype of a draw, what the distribution states of itself, and why it cannot be drawn."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    stated: dict[str, Any] = {}

    def draw(key: Any, arrays: Any) -> Any:
        d = skeleton.unpack(arrays)
        for attribute in ("batch_shape", "event_shape", "has_rsample"):
            stated[attribute] = getattr(d, attribute, None)
        stated["takes_sample_shape"] = "sample_shape" in inspect.signature(d.sample).parameters
        stated["discrete"] = is_discrete(d)
        stated["implicit"] = not (stated["has_rsample"] or stated["discrete"]) and is_implicit(d)
        return jnp.asarray(d.sample(key))

    try:
        out = jax.eval_shape(draw, key, arrays)
    except (NotImplementedError, ImportError) as e:
        return (), None, stated, str(e) or "it is improper"
    except Exception as e:
        if _built_by_vmap(skeleton, arrays):
            raise ModelError(_BUILT_BY_VMAP.format(name=name, label=label)) from None
        raise ModelError(
            f"site {name!r}: {label} cannot be sampled. A distribution is a pytree with sample(key) and "
            f"log_prob(value): {type(e).__name__}: {e}"
        ) from e
    return tuple(out.shape), out.dtype, stated, ""


def _shape_of_density(
    name: str,
    skeleton: Skeleton,
    arrays: list[Any],
    label: str,
    shape: tuple[int, ...],
    dtype: Any,
) -> tuple[int, ...]:
    """The batch shape of a distribution that states none: the shape of the log density of a draw."""
    value = jax.ShapeDtypeStruct(shape, dtype)
    density = jax.eval_shape(lambda v, a: skeleton.unpack(a).log_prob(v), value, arrays)
    if tuple(density.shape) != shape[: len(density.shape)]:
        raise ModelError(
            f"site {name!r}: log_prob of {label} has shape {density.shape}, which does not lead the shape "
            f"{shape} of a draw"
        )
    return density.shape


def _not_as_stated(name: str, label: str, shape: tuple[int, ...], stated: dict[str, Any]) -> str:
    """Why a distribution cannot be drawn whose draws have another shape than it states."""
    batch_shape, event_shape = tuple(stated["batch_shape"]), tuple(stated["event_shape"])
    expected = batch_shape + event_shape
    if len(shape) > len(expected):
        raise ModelError(
            _BUILT_BY_VMAP.format(name=name, label=label)
            + f" (it states batch_shape {batch_shape} and event_shape {event_shape}, but a draw has shape {shape})"
        )
    return f"its draws have shape {shape}, not the {expected} that it states"


_BUILT_BY_VMAP = (
    "site {name!r}: {label} was probably built by jax.vmap: its parameters have more axes than it knows of. "
    "Sample inside the vmap instead: jax.vmap(lambda x: sample(name, make(x)))(xs)"
)


def _built_by_vmap(skeleton: Skeleton, arrays: list[Any]) -> bool:
    """Whether a parameter has more axes than the distribution states."""

    def check(arrays: Any) -> Any:
        d = skeleton.unpack(arrays)
        while d is not None:
            for name, constraint in getattr(d, "arg_constraints", {}).items():
                ndim = jnp.ndim(getattr(d, name, 0.0)) - getattr(constraint, "event_dim", 0)
                found.append(ndim > len(d.batch_shape))
            d = getattr(d, "base_dist", None)
        return 0

    found: list[bool] = []
    try:
        jax.eval_shape(check, arrays)
    except Exception:  # the distribution cannot answer
        return False
    return any(found)


def is_discrete(d: Any) -> bool:
    """Whether a distribution says that it is discrete (some of NumPyro's fail to say anything)."""
    try:
        return bool(d.is_discrete)
    except (AttributeError, AssertionError, NotImplementedError):
        return False


def in_support(d: Any, value: Any) -> Any:
    """Whether elements of a value are in the support of ``d``. None if that is certain, or cannot be decided exactly.

    NumPyro checks supports that tie several elements together (a simplex, a Cholesky factor) up to a rounding error.
    Draws in single precision may exceed it. So such supports are not checked.
    """
    inner = d
    while inner is not None:
        if isinstance(inner, dist.MaskedDistribution):  # masked values may be anything
            return None
        inner = getattr(inner, "base_dist", None)
    try:
        support = base = d.support
        while isinstance(base, type(_INDEPENDENT)):
            base = base.base_constraint
        if base is None or base is dist.constraints.real or base.event_dim != 0:
            return None
        return support(value)
    except (AttributeError, AssertionError, NotImplementedError, TypeError):
        return None


_INDEPENDENT = dist.constraints.independent(dist.constraints.real, 1)


def _support(d: Any) -> Constant | None:
    """The support, if no traced value enters it."""
    try:
        support = d.support
        leaves = jax.tree.leaves(support)
    except (AttributeError, NotImplementedError):
        return None
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return None
    return Constant(support)


def _values(d: Any) -> Constant | None:
    """The values of one element of a finite support, if they can be listed without a traced value."""
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
