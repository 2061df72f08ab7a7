"""Checks of data against their sites: shapes, dtypes, supports, NaN.

Nothing is broadcast or dropped silently.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.addresses import flatten, unknown
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import AddressError, ObservationError
from weft.ppl.stage.structure import SiteInfo

from .handlers import Given, expand


@dataclasses.dataclass(frozen=True)
class Observed:
    """Values for a part of a site. ``observed`` makes it.

    Attributes:
        value: an array of the site's shape.
        where: booleans, true where the value is observed.
        missing: what becomes of the other elements, ``"impute"`` or ``"drop"``.
    """

    value: Any
    where: Any
    missing: str

    def __repr__(self) -> str:
        known = not isinstance(self.where, Tracer)
        share = f"{int(np.sum(self.where))} of {np.size(self.where)}" if known else "where"
        return f"observed(shape {np.shape(self.value)}, {share}, missing={self.missing!r})"


def observed(value: Any, *, where: Any, missing: str = "impute") -> Observed:
    """Observe a part of a site: the elements where ``where`` is true.

    Args:
        value: an array of the site's shape. What it holds elsewhere (NaN, say) is ignored.
        where: booleans of the site's shape without its event axes.
        missing: what becomes of the other elements. ``"impute"`` keeps them as latent choices. ``"drop"`` leaves them
            out, which is right if nothing else reads the site.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, observed, repeat, sample
        >>> @gen
        ... def model():
        ...     return repeat(lambda: sample("y", dist.Normal(0.0, 1.0)), 3)
        >>> y = jnp.array([0.0, jnp.nan, 1.0])
        >>> target = model().given({"y": observed(y, where=~jnp.isnan(y), missing="drop")})
        >>> target.latents
        ()
    """
    if missing not in ("impute", "drop"):
        raise ObservationError(f"observed(missing={missing!r}): it is 'impute' or 'drop'")
    return Observed(value, where, missing)


def entries(
    sites: Mapping[str, SiteInfo], choices: Mapping[str, Any], model: str, data: bool = False
) -> dict[str, Given]:
    """Check choices against the table of sites. Gives ``{address: Given}``.

    Shapes and dtypes are always checked. Values (NaN, support) are checked if they are ``data`` and concrete.

    Raises:
        AddressError: for an address that is no choice of the program.
        ObservationError: for values that do not fit.
    """
    if not isinstance(choices, Mapping):
        raise TypeError(
            f"model {model!r}: choices are a dict from addresses to values, got {type(choices).__name__}"
        )
    return {
        address: _entry(sites, address, value, model, data)
        for address, value in flatten(choices).items()
    }


def _entry(
    sites: Mapping[str, SiteInfo], address: str, given: Any, model: str, data: bool
) -> Given:
    info = sites.get(address)
    choosable = [
        a for a, s in sites.items() if s.kind == "sample" and not s.observed and not s.hidden
    ]
    if info is None:
        inside = [a for a in sites if a.startswith(address + ".")]
        if inside:
            raise AddressError(
                f"model {model!r}: {address!r} is a nested program; give its choices, {inside[0]!r} and so on"
            )
        raise AddressError(unknown(address, choosable, f" in model {model!r}"))
    if info.kind != "sample":
        raise AddressError(
            f"model {model!r}: {address!r} is a {info.kind}, not a choice; its value follows from the choices"
        )
    if info.observed:
        raise AddressError(
            f"model {model!r}: {address!r} is fixed inside the model already (condition)"
        )
    if info.hidden:
        raise AddressError(f"model {model!r}: {address!r} cannot be given: {info.why_hidden}")
    where = drop = None
    if isinstance(given, Given):
        given, where, drop = given.value, given.where, given.drop
    elif isinstance(given, Observed):
        where, drop = given.where, (True if given.missing == "drop" else None)
        given = given.value
    return _fit(info, given, where, drop, model, data)


def _fit(info: SiteInfo, value: Any, where: Any, drop: Any, model: str, data: bool) -> Given:
    site = f"model {model!r}, site {info.address!r} ({info.distribution})"
    value = as_array(value, site)
    if where is not None:
        where = as_array(where, site)
        shape = tuple(value.shape[: len(info.axes)])
        if where.dtype != bool or where.shape != shape:
            raise ObservationError(
                f"{site}: where must be booleans of shape {shape}, got {where.dtype} of shape {where.shape}"
            )
    value, where = _forecast(info, value, where)
    if value.shape != info.shape:
        raise ObservationError(_shapes(info, value.shape, site))
    known = not isinstance(value, Tracer)
    seen = None if where is None or isinstance(where, Tracer) else np.asarray(where)
    told = known and not isinstance(where, Tracer)  # what is missing is known, too
    if data and told:
        _check_nan(info, np.asarray(value), seen, site)
    if not _castable(value.dtype, info.dtype):
        if not known:
            raise ObservationError(
                f"{site}: values of dtype {value.dtype} for a site of dtype {info.dtype}; cast them first"
            )
        _check_cast(info, np.asarray(value), seen, site)
    if data and told:
        _check_support(info, np.asarray(value), seen, site)
    if where is not None:
        value = _fill(value, where)
    value = jnp.asarray(value).astype(info.dtype)
    return Given(
        value,
        None if where is None else jnp.asarray(where),
        None if drop is None else jnp.ones(info.batch_shape, bool),
        checked=data and info.support is not None,
    )


def as_array(value: Any, site: str) -> Any:
    if isinstance(value, (Tracer, jax.Array)) and not jnp.issubdtype(
        value.dtype, jax.dtypes.extended
    ):
        return value
    try:
        array = np.asarray(value)
    except Exception as e:
        raise ObservationError(
            f"{site}: expected numbers, cannot make an array of {type(value).__name__}: {e}"
        ) from None
    if array.dtype == object or array.dtype.kind in "USOmM":
        raise ObservationError(
            f"{site}: expected numbers, got {type(value).__name__} of dtype {array.dtype}"
        )
    return array


def _forecast(info: SiteInfo, value: Any, where: Any) -> tuple[Any, Any]:
    """Pad data that end before a scan does. The rest is latent."""
    if value.shape == info.shape or value.ndim != len(info.shape):
        return value, where
    differ = [i for i, (n, m) in enumerate(zip(value.shape, info.shape, strict=True)) if n != m]
    axis = differ[0]
    if (
        len(differ) > 1
        or axis >= len(info.axes)
        or info.axes[axis].kind != "scan"
        or value.shape[axis] > info.shape[axis]
    ):
        return value, where
    if value.shape[axis] == 0:
        return jnp.zeros(info.shape, info.dtype), jnp.zeros(info.batch_shape, bool)
    extra = info.shape[axis] - value.shape[axis]
    numpy = jnp if isinstance(value, Tracer) else np
    pad = [(0, extra if i == axis else 0) for i in range(value.ndim)]
    known = np.arange(info.shape[axis]) < value.shape[axis]
    known = np.broadcast_to(
        np.expand_dims(known, [i for i in range(len(info.axes)) if i != axis]), info.batch_shape
    )
    if where is not None:
        known = known & numpy.pad(where, pad[: len(info.axes)])
    return numpy.pad(value, pad, mode="edge"), known


def _shapes(info: SiteInfo, shape: tuple[int, ...], site: str) -> str:
    named = ", ".join(a.name or f"{a.kind} axis" for a in info.axes)
    return (
        f"{site}: expected shape {info.shape} ({named or 'scalar'}{', event' if info.event_shape else ''}), got "
        f"{shape}; nothing is broadcast silently"
    )


def _castable(source: Any, target: Any) -> bool:
    """Whether a cast keeps every value (floats may be rounded)."""
    order = [jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating]
    rank = [
        next(i for i, kind in enumerate(order) if jnp.issubdtype(d, kind)) for d in (source, target)
    ]
    if rank[0] == rank[1] == 1:
        return np.can_cast(source, target)
    return rank[0] <= rank[1]


def _seen(info: SiteInfo, where: np.ndarray | None) -> np.ndarray:
    return np.ones(info.batch_shape, bool) if where is None else where


def _check_nan(info: SiteInfo, value: np.ndarray, where: np.ndarray | None, site: str) -> None:
    seen = _seen(info, where)
    if np.issubdtype(value.dtype, np.inexact):
        bad = _over_events(np.any, np.isnan(value), info) & seen
        if bad.any():
            raise ObservationError(
                f"{site}: {int(bad.sum())} of {bad.size} observations are NaN, the first at {_first(bad)}. If they "
                f"are missing, say so: given({{{info.address!r}: observed(y, where=~jnp.isnan(y))}}), with "
                "missing='drop' to leave them out"
            )


def _check_cast(info: SiteInfo, value: np.ndarray, where: np.ndarray | None, site: str) -> None:
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")  # the cast is compared with what it should keep
        cast = value.astype(info.dtype)
    bad = _over_events(np.any, cast != value, info) & _seen(info, where)
    if bad.any():
        first = value[tuple(np.argwhere(bad)[0])] if bad.ndim else value
        raise ObservationError(
            f"{site}: the site is of dtype {info.dtype} and {first} at {_first(bad)} is not (its value would change)"
        )


def _check_support(info: SiteInfo, value: np.ndarray, where: np.ndarray | None, site: str) -> None:
    seen = _seen(info, where)
    if info.support is not None:
        try:
            with jax.ensure_compile_time_eval():
                inside = np.asarray(info.support(jnp.asarray(value)))
        except Exception:  # a support that cannot be checked is no reason to refuse data
            return
        if inside.ndim > len(info.batch_shape):
            inside = _over_events(np.all, inside, info)
        bad = ~inside & seen
        if bad.any():
            first = value[tuple(np.argwhere(bad)[0])] if bad.ndim else value
            raise ObservationError(
                f"{site}: {int(bad.sum())} of {bad.size} observations are outside the support {_support(info)}, the "
                f"first, {first}, at {_first(bad)}"
            )


def _over_events(reduce: Any, flags: Any, info: SiteInfo) -> Any:
    return reduce(flags, axis=tuple(range(len(info.batch_shape), flags.ndim)))


def expand_np(where: np.ndarray, value: np.ndarray) -> np.ndarray:
    return where.reshape(where.shape + (1,) * (value.ndim - where.ndim))


def _first(bad: np.ndarray) -> str:
    return f"index {tuple(int(i) for i in np.argwhere(bad)[0])}" if bad.ndim else "the scalar"


def _support(info: SiteInfo) -> str:
    support = info.support
    name = type(support).__name__.lstrip("_")
    bounds = [
        f"{b}={np.asarray(getattr(support, b))}"
        for b in ("lower_bound", "upper_bound")
        if getattr(support, b, None) is not None
    ]
    return f"{name}({', '.join(bounds)})" if bounds else name


def _fill(value: Any, where: Any) -> Any:
    """Fill missing elements with a value that was observed.

    That value is in the support, so its density and gradient are finite.
    """
    concrete = not isinstance(value, Tracer) and not isinstance(where, Tracer)
    numpy = np if concrete else jnp
    value, where = numpy.asarray(value), numpy.asarray(where)
    if value.size == 0 or where.ndim == 0:
        return value
    flat = value.reshape(where.size, *value.shape[where.ndim :])
    fill = flat[numpy.argmax(where.reshape(-1))]
    fill = numpy.where(numpy.any(where), fill, numpy.zeros_like(fill))
    mask = expand_np(where, value) if concrete else expand(where, value)
    return numpy.where(mask, value, fill)
