"""Transforms of models.

``condition``, ``do``, ``block``, ``scope``, ``scale``, ``mask``, ``replay``, ``with_gradients``: each takes a model, or
any function with sites, and returns the same kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.programs.handlers import Given
from weft.ppl.programs.models import check_name
from weft.ppl.programs.observations import Observed, as_array, entries
from weft.ppl.programs.traces import Trace
from weft.ppl.stage.addresses import Address, covers, dotted, flatten, unflatten, unknown
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.control import estimated_p
from weft.ppl.stage.errors import AddressError, ObservationError
from weft.ppl.stage.interpreter import Context, Handler
from weft.ppl.stage.records import Records, look_up
from weft.ppl.stage.sites import Site
from weft.ppl.stage.specs import SiteSpec
from weft.ppl.stage.structure import SiteInfo

from .rewriting import Rewrite, Transformed, out_of_reach, rebind_scope, transform

F = TypeVar("F", bound=Callable[..., Any])


def _arrays(choices: Mapping[str, Any], what: str, partial: bool = False) -> dict[str, Any]:
    """Dotted addresses to arrays (or Given), so that a transformed model is a pytree of them."""
    if not isinstance(choices, Mapping):
        raise TypeError(
            f"{what}: choices are a dict from addresses to values, got {type(choices).__name__}"
        )
    found: dict[str, Any] = {}
    for address, given in flatten(choices).items():
        where = None
        if isinstance(given, Observed):
            if not partial:
                raise ObservationError(f"{what}: {address!r} must be given whole")
            if given.missing == "drop":
                raise ObservationError(
                    f"{what}: observed(..., missing='drop') at {address!r} is for given(), which can see what reads "
                    "the site; inside a model impute the missing elements, or mask them after condition"
                )
            given, where = given.value, jnp.asarray(given.where)
        found[address] = jnp.asarray(as_array(given, f"{what}: {address!r}"))
        if where is not None:
            found[address] = Given(found[address], where)
        elif _has_nan(found[address]):
            raise ObservationError(
                f"{what}: the value of {address!r} holds NaN. If parts of it are missing, say so: "
                f"{what}(model, {{{address!r}: observed(y, where=~jnp.isnan(y))}})"
            )
    return found


def _has_nan(value: Any) -> bool:
    known = not isinstance(value, Tracer) and jnp.issubdtype(value.dtype, jnp.inexact)
    return known and bool(np.isnan(np.asarray(value)).any())


# --- condition, do, replay --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Fix(Rewrite):
    def payload(self, site: Site, payload: dict[str, Any], given: Given | None) -> dict[str, Any]:
        if given is None:
            return payload
        payload["value"] = given.value
        if given.where is not None:
            payload["observed"] = given.where
        return payload


class _Condition(Transformed):
    choices: dict[str, Any]

    def handler(self, table: dict[str, SiteInfo]) -> tuple[Handler, dict[str, Any]]:
        return _Fix(), unflatten(entries(table, self.choices, name_of(self.inner), data=True))


def condition(model: F, choices: Mapping[str, Any]) -> F:
    r"""Fix choices inside a model and keep their density: $p(x_{\text{rest}}, x_{\text{fixed}})$, unnormalised.

    Args:
        model: a model or a function with sites.
        choices: nested dict of values, or ``observed(y, where=mask)``.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import condition, gen, sample
        >>> @gen
        ... def pair():
        ...     x = sample("x", dist.Normal(0.0, 1.0))
        ...     return sample("y", dist.Normal(x, 1.0))
        >>> condition(pair, {"y": 2.0})().latents
        ('x',)
    """
    return transform(model, lambda f: _Condition(f, _arrays(choices, "condition", partial=True)))


@dataclasses.dataclass(frozen=True)
class _Set(Rewrite):
    def site(
        self, site: Site, key: Any, given: Given | None
    ) -> tuple[jax.Array, None, dict[str, Any]]:
        if given is None:
            return self.emit(site), None, {}
        return jnp.asarray(given.value).astype(site.spec.dtype), None, {}

    def estimated(
        self, eqn: Any, args: list[Any], context: Context
    ) -> tuple[list[Any], Records, dict[str, Any]]:
        given = [look_up(context.given, address) for address, _ in eqn.params["sites"].value]
        if any(g is None for g in given):
            return super().estimated(eqn, args, context)
        return (
            [
                jnp.asarray(g.value).astype(v.aval.dtype)
                for g, v in zip(given, eqn.outvars, strict=True)
            ],
            {},
            {},
        )


class _Do(Transformed):
    choices: dict[str, Any]

    def handler(self, table: dict[str, SiteInfo]) -> tuple[Handler, dict[str, Any]]:
        return _Set(), unflatten(entries(table, self.choices, name_of(self.inner), data=True))


def do(model: F, choices: Mapping[str, Any]) -> F:
    """Intervene (Pearl's do): the sites become constants, without a density.

    Args:
        model: a model or a function with sites.
        choices: nested dict of values.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import do, gen, sample
        >>> @gen
        ... def pair():
        ...     x = sample("x", dist.Normal(0.0, 1.0))
        ...     return sample("y", dist.Normal(x, 1.0))
        >>> do(pair, {"x": 3.0})().latents
        ('y',)
    """
    return transform(model, lambda f: _Do(f, _arrays(choices, "do")))


def replay(model: F, trace: Trace | Mapping[str, Any]) -> F:
    """Run a model with the choices of another trace.

    Choices at the same addresses are fixed, as by ``do``. Other choices are free.

    Args:
        model: a model or a function with sites.
        trace: a trace of any program, or a nested dict of choices.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, replay, sample
        >>> @gen
        ... def model():
        ...     return sample("x", dist.Normal(0.0, 1.0))
        >>> trace = model().simulate(jax.random.key(0))
        >>> bool(replay(model, trace)().simulate(jax.random.key(1)).value == trace.value)
        True
    """
    choices = trace.choices if isinstance(trace, Trace) else trace
    return transform(model, lambda f: _Replay(f, _arrays(choices, "replay")))


class _Replay(Transformed):
    choices: dict[str, Any]

    def handler(self, table: dict[str, SiteInfo]) -> tuple[Handler, dict[str, Any]]:
        here = {a: v for a, v in self.choices.items() if a in table}
        return _Set(), unflatten(entries(table, here, name_of(self.inner)))


# --- block, scope -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Hide(Rewrite):
    addresses: frozenset[str] = frozenset()

    def spec(self, site: Site, spec: SiteSpec) -> SiteSpec:
        if ".".join(site.address) in self.addresses:
            return dataclasses.replace(spec, hidden=True)
        return spec


class _Block(Transformed):
    patterns: tuple[str, ...] = eqx.field(static=True)

    def handler(self, table: dict[str, SiteInfo]) -> tuple[Handler, dict[str, Any]]:
        return _Hide(frozenset(_covered(self.patterns, table, name_of(self.inner)))), {}


def block(model: F, *addresses: Address) -> F:
    """Hide choices. They are still made, but not recorded. The program then has no known density.

    Args:
        model: a model or a function with sites.
        addresses: the choices to hide; wildcards are allowed. All choices if none is named.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import block, gen, sample
        >>> @gen
        ... def pair():
        ...     x = sample("x", dist.Normal(0.0, 1.0))
        ...     return sample("y", dist.Normal(x, 1.0))
        >>> list(block(pair, "x")().simulate(jax.random.key(0)).choices)
        ['y']
    """
    return transform(model, lambda f: _Block(f, tuple(map(dotted, addresses or ("**",)))))


class _Scope(Transformed):
    name: str = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return rewrite_in_scope(self.inner, self.name, args, kwargs)


def rewrite_in_scope(function: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    tree: list[Any] = []

    def run(*leaves: Any) -> list[Any]:
        out = function(*args, **kwargs)
        flat, treedef = jax.tree.flatten(out)
        tree.append(treedef)
        return flat

    outs = rebind_scope(name, run, [])
    return jax.tree.unflatten(tree[-1], outs)


def scope(model: F, name: str) -> F:
    """Put all choices of a function under a name.

    Args:
        model: a model or a function with sites.
        name: the name. Afterwards the choice ``"x"`` has the address ``"name.x"``.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample, scope
        >>> def noise():
        ...     return sample("x", dist.Normal(0.0, 1.0))
        >>> @gen
        ... def two():
        ...     return scope(noise, "a")() + scope(noise, "b")()
        >>> two().latents
        ('a.x', 'b.x')
    """
    check_name(name)
    return transform(model, lambda f: _Scope(f, name))


# --- scale, mask ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Multiply(Rewrite):
    """Multiplies the scale of a site by every factor whose key names one of the site's axes or covers its address."""

    factors: tuple[tuple[str, Any], ...] = ()

    def payload(self, site: Site, payload: dict[str, Any], given: Any) -> dict[str, Any]:
        if site.spec.kind == "deterministic":
            return payload
        for value in self.matching(".".join(site.address), site.axis_names):
            # The same values for all sites, not a product each: marginalize must see that they share them.
            payload["scale"] = (*payload.get("scale", ()), value)
        return payload

    def matching(self, address: str, axes: set[str]) -> list[Any]:
        """The factors of a site."""
        return [v for key, v in self.factors if key in axes or covers(key, address)]

    def estimated(
        self, eqn: Any, args: list[Any], context: Context
    ) -> tuple[list[Any], Records, dict[str, Any]]:
        address, info = eqn.params["sites"].value[0]
        axes = {n for n in (*context.axes, *(a.name for a in info.axes)) if n}
        for value in self.matching(".".join((*context.prefix, *address)), axes):
            if eqn.params["scaled"]:
                args = [*args[:-1], args[-1] * value]
            else:
                args = [*args, value]
                eqn = eqn.replace(params={**eqn.params, "scaled": True})
        return list(estimated_p.bind(*args, **eqn.params)), {}, {}


class _Scale(Transformed):
    factors: dict[str, Any]

    def handler(self, table: dict[str, SiteInfo]) -> tuple[Handler, dict[str, Any]]:
        known = {a.name for s in table.values() for a in s.axes if a.name}
        for key in self.factors:
            if key not in known and not any(covers(key, a) for a in table):
                raise AddressError(
                    unknown(
                        key,
                        [*sorted(known), *table],
                        f" (axis or site) in model {name_of(self.inner)!r}",
                    )
                )
        return _Multiply(tuple(self.factors.items())), {}


def scale(model: F, factors: Any) -> F:
    r"""Multiply the log densities of sites, $c \log p$, for minibatches and tempering.

    Args:
        model: a model or a function with sites.
        factors: a number for every site; or a dict from names of axes, or addresses, to numbers. ``{"row": N / B}``
            scales every site under that axis, once.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample, scale
        >>> @gen
        ... def model(x):
        ...     f = lambda m: sample("y", dist.Normal(m, 1.0))
        ...     return jax.vmap(f, axis_name="row")(x)
        >>> y = {"y": jnp.zeros(2)}
        >>> a, b = model(jnp.ones(2)), scale(model, {"row": 5.0})(jnp.ones(2))
        >>> bool(jnp.isclose(5 * a.log_density(y), b.log_density(y)))
        True
    """
    factors = dict(factors) if isinstance(factors, Mapping) else {"**": factors}
    numbers = {}
    for name, factor in factors.items():
        if jnp.shape(factor) != () or isinstance(factor, str):
            got = repr(factor) if isinstance(factor, str) else f"shape {jnp.shape(factor)}"
            raise TypeError(f"scale of {dotted(name)!r}: expected a number, got {got}")
        numbers[dotted(name)] = jnp.asarray(factor, float)
    return transform(model, lambda f: _Scale(f, numbers))


@dataclasses.dataclass(frozen=True)
class _Mask(Rewrite):
    addresses: frozenset[str] = frozenset()

    def payload(self, site: Site, payload: dict[str, Any], given: Any) -> dict[str, Any]:
        if given is not None:
            payload["where"] = jnp.logical_and(payload.get("where", True), given)
        return payload


class _Masked(Transformed):
    where: dict[str, Any]

    def handler(self, table: dict[str, SiteInfo]) -> tuple[Handler, dict[str, Any]]:
        found: dict[str, Any] = {}
        for pattern, where in self.where.items():
            for address in _covered((pattern,), table, name_of(self.inner)):
                info = table[address]
                if info.kind == "deterministic":
                    continue
                if jnp.ndim(where) and jnp.shape(where) != info.batch_shape[: jnp.ndim(where)]:
                    raise AddressError(
                        f"mask of {address!r}: expected a scalar or leading axes of {info.batch_shape}, got "
                        f"shape {jnp.shape(where)}"
                    )
                lead = jnp.reshape(
                    where, jnp.shape(where) + (1,) * (len(info.batch_shape) - jnp.ndim(where))
                )
                found[address] = jnp.broadcast_to(lead, info.batch_shape)
        return _Mask(), unflatten(found)


def mask(model: F, where: Any) -> F:
    """Count sites only where a mask is true.

    Elsewhere their choices are idle: ``trace.active`` is false there, and they add nothing to the density.

    Args:
        model: a model or a function with sites.
        where: booleans for every site; or a dict from addresses to booleans of the site's shape, or of leading axes
            of it.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, mask, repeat, sample
        >>> @gen
        ... def model():
        ...     return repeat(lambda: sample("y", dist.Normal(0.0, 1.0)), 2)
        >>> half = mask(model, {"y": jnp.array([True, False])})()
        >>> round(float(half.log_density({"y": jnp.zeros(2)})), 4)
        -0.9189
    """
    where = flatten(where) if isinstance(where, Mapping) else {"**": where}
    where = {dotted(a): as_array(x, f"mask of {dotted(a)!r}") for a, x in where.items()}
    for address, x in where.items():
        if x.dtype != bool:
            raise TypeError(f"mask of {address!r}: where must be booleans, got {x.dtype}")
    return transform(model, lambda f: _Masked(f, {a: jnp.asarray(x) for a, x in where.items()}))


# --- gradient strategies ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Strategy(Rewrite):
    strategies: tuple[tuple[str, Any], ...] = ()

    def payload(self, site: Site, payload: dict[str, Any], given: Any) -> dict[str, Any]:
        for pattern, strategy in self.strategies:
            if covers(pattern, ".".join(site.address)):
                payload["grad"] = strategy
        return payload


class _WithGradients(Transformed):
    strategies: dict[str, Any]

    def handler(self, table: dict[str, SiteInfo]) -> tuple[Handler, dict[str, Any]]:
        _covered(tuple(self.strategies), table, name_of(self.inner))
        return _Strategy(tuple(self.strategies.items())), {}


def with_gradients(model: F, strategies: Mapping[str, Any]) -> F:
    """Choose the gradient strategies of sites from outside.

    Args:
        model: a model or a function with sites.
        strategies: a dict from addresses to strategies (``weft.gradients``), or to None for the default. Addresses
            may hold wildcards. Later entries win.

    Raises:
        AddressError: for an address without a site.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import draw, expect, gen, gradients, sample, with_gradients
        >>> @gen
        ... def coin(p):
        ...     return 3.0 * sample("b", dist.Bernoulli(p))
        >>> enumerated = with_gradients(coin, {"b": gradients.enum})
        >>> print(jax.grad(expect(lambda p: draw(enumerated(p)).value), argnums=1)(jax.random.key(0), 0.5))
        3.0
    """
    return transform(
        model, lambda f: _WithGradients(f, {dotted(k): v for k, v in strategies.items()})
    )


def _covered(patterns: Iterable[str], table: dict[str, SiteInfo], name: str) -> list[str]:
    for pattern in patterns:
        if pattern not in ("*", "**") and not any(covers(pattern, a) for a in table):
            raise AddressError(unknown(pattern, table, f" in model {name!r}"))
    found = [a for a in table if any(covers(p, a) for p in patterns)]
    for address in found:
        if table[address].estimated:
            raise out_of_reach(address)
    return found


def name_of(function: Any) -> str:
    while isinstance(function, Transformed):
        function = function.inner
    return getattr(function, "__name__", type(function).__name__)


__all__ = ["block", "condition", "do", "mask", "replay", "scale", "scope", "with_gradients"]
