r"""Reparametrisation, ``noncentered`` and ``reparametrize``: the same law with other choices.

A site $x \sim d$ becomes two: a base choice at ``x_base``, and a value that is computed from it and recorded under
``x`` in ``trace.derived``. The law of everything else is unchanged.

References:
    Papaspiliopoulos, Roberts and Sköld (2007), "A general framework for the parametrization of hierarchical models".
    Gorinova, Moore and Hoffman (2020), "Automatic reparameterisation of probabilistic programs".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpyro.distributions as dist
from weft.ppl.programs.language import deterministic, sample
from weft.ppl.stage.addresses import covers, dotted
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.interpreter import Handler
from weft.ppl.stage.sites import Site
from weft.ppl.stage.structure import SiteInfo

from .rewriting import Rewrite, Transformed, transform
from .transforms import _covered, name_of

F = TypeVar("F", bound=Callable[..., Any])

BASE = "_base"
"""The ending of the name of a base choice: ``x_base`` is the base choice of ``x``."""


class Reparam(eqx.Module):
    """A way to write a distribution as a function of a base distribution: ``base(d)`` and ``value(d, base value)``."""

    def base(self, d: Any) -> Any:
        """The base distribution of ``d``."""
        raise NotImplementedError

    def value(self, d: Any, base: jax.Array) -> jax.Array:
        """The value of ``d`` as a function of the base choice."""
        raise NotImplementedError


class LocScale(Reparam):
    r"""A location-scale family on the real line, partly centred.

    Write $\lambda$ for ``centered``. The base choice is $b \sim F(\lambda\mu, \sigma^\lambda)$, and the value is
    $x = \mu + \sigma^{1-\lambda}(b - \lambda\mu)$.

    Attributes:
        centered: from 0 (non-centred) to 1 (as it was).
    """

    centered: float = 0.0

    def base(self, d: Any) -> Any:
        d, ndim = _strip(d)
        if not _is_loc_scale(d):
            raise ModelError(
                f"LocScale takes a location-scale family on the real line, not {type(d).__name__}"
            )
        rest = {n: getattr(d, n) for n in d.arg_constraints if n not in ("loc", "scale")}
        new = type(d)(**rest, loc=self.centered * d.loc, scale=d.scale**self.centered)
        return new.expand(d.batch_shape).to_event(ndim)

    def value(self, d: Any, base: jax.Array) -> jax.Array:
        d, _ = _strip(d)
        return d.loc + d.scale ** (1 - self.centered) * (base - self.centered * d.loc)


class Affine(Reparam):
    r"""A multivariate normal written as $x = \mu + L\,\varepsilon$, with $\varepsilon \sim N(0, I)$."""

    def base(self, d: Any) -> Any:
        if not isinstance(d, dist.MultivariateNormal):
            raise ModelError(f"Affine takes a MultivariateNormal, not {type(d).__name__}")
        return dist.Normal(0.0, 1.0).expand(d.batch_shape + d.event_shape).to_event(1)

    def value(self, d: Any, base: jax.Array) -> jax.Array:
        return d.loc + jax.numpy.squeeze(d.scale_tril @ base[..., None], -1)


class Transform(Reparam):
    """A transformed distribution, written as its transforms applied to a choice of its base distribution.

    Attributes:
        inner: how the base distribution is written in turn; None leaves it as it is.
    """

    inner: Reparam | None = None

    def base(self, d: Any) -> Any:
        d, ndim = _strip(d)
        if not isinstance(d, dist.TransformedDistribution):
            raise ModelError(f"Transform takes a TransformedDistribution, not {type(d).__name__}")
        base = d.base_dist if self.inner is None else self.inner.base(d.base_dist)
        return base.to_event(ndim) if ndim else base

    def value(self, d: Any, base: jax.Array) -> jax.Array:
        d, _ = _strip(d)
        if self.inner is not None:
            base = self.inner.value(d.base_dist, base)
        for t in d.transforms:
            base = t(base)
        return base


def _is_loc_scale(d: Any) -> bool:
    parameters = set(getattr(d, "arg_constraints", {}))
    return {"loc", "scale"} <= parameters and d.support is dist.constraints.real


def _strip(d: Any) -> tuple[Any, int]:
    """The distribution under ``to_event`` and ``expand``, and the number of axes that were made event axes."""
    ndim = 0
    while isinstance(d, (dist.Independent, dist.ExpandedDistribution)):
        if isinstance(d, dist.Independent):
            ndim += d.reinterpreted_batch_ndims
            d = d.base_dist
        else:
            shape = d.batch_shape
            base = d.base_dist
            fields = {
                n: jax.numpy.broadcast_to(getattr(base, n), shape) for n in base.arg_constraints
            }
            d = type(base)(**fields)
    return d, ndim


def default_reparam(d: Any) -> Reparam:
    """The non-centred form of a distribution.

    Raises:
        ModelError: if there is none.
    """
    inner, _ = _strip(d)
    if isinstance(inner, dist.TransformedDistribution):
        try:
            return Transform(default_reparam(inner.base_dist))
        except ModelError:
            return Transform()
    if isinstance(inner, dist.MultivariateNormal):
        return Affine()
    if _is_loc_scale(inner):
        return LocScale()
    raise ModelError(
        f"{type(d).__name__} has no non-centred form: it takes a location-scale family on the real line, a "
        "MultivariateNormal or a TransformedDistribution; give a strategy with reparametrize(model, "
        "{address: strategy})"
    )


@dataclasses.dataclass(frozen=True)
class _Reparametrise(Rewrite):
    strategies: tuple[tuple[str, Any], ...] = ()

    def site(self, site: Site, key: Any, given: Any) -> tuple[jax.Array, None, dict[str, Any]]:
        address = ".".join(site.address)
        for pattern, strategy in self.strategies:
            if site.spec.kind == "sample" and covers(pattern, address):
                split = functools.partial(self.split, site, strategy)
                return site.over_lanes(split), None, {}
        return self.emit(site), None, {}

    def split(self, site: Site, strategy: Reparam | None, payload: dict[str, Any]) -> Any:
        if "value" in payload:
            raise ModelError(
                f"{'.'.join(site.address)!r} is conditioned: reparametrise before condition, or leave it out"
            )
        d = payload["d"]
        try:
            how = default_reparam(d) if strategy is None else strategy
            base, value = how.base(d), functools.partial(how.value, d)
        except ModelError as e:
            raise ModelError(f"site {'.'.join(site.address)!r}: {e}") from None
        drawn = sample(site.name + BASE, base, dims=site.spec.dims)
        return deterministic(site.name, value(drawn), dims=site.spec.dims)


class _Reparametrised(Transformed):
    strategies: dict[str, Any]

    def handler(self, table: dict[str, SiteInfo]) -> tuple[Handler, dict[str, Any]]:
        _covered(tuple(self.strategies), table, name_of(self.inner))
        return _Reparametrise(tuple(self.strategies.items())), {}


def reparametrize(model: F, strategies: Mapping[str, Reparam | None]) -> F:
    """Rewrite sites by the given strategies. The original values are in ``trace.derived``, under the old addresses.

    Args:
        model: a model or a function with sites.
        strategies: a dict from addresses to strategies. An address may hold wildcards. A strategy is, say,
            ``LocScale(centered=0.3)``, or None for the default.

    Raises:
        ModelError: if a distribution has no such form.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample, reparametrize
        >>> from weft.ppl import LocScale
        >>> @gen
        ... def model():
        ...     return sample("x", dist.Normal(3.0, 2.0))
        >>> reparametrize(model, {"x": LocScale(0.5)})().latents
        ('x_base',)
    """
    for address, strategy in strategies.items():
        if not (strategy is None or isinstance(strategy, Reparam)):
            raise TypeError(
                f"reparametrize: expected a strategy such as LocScale(0.5), or None, at {address!r}; got {strategy!r}"
            )
    return transform(
        model, lambda f: _Reparametrised(f, {dotted(k): v for k, v in strategies.items()})
    )


def noncentered(model: F, *addresses: str) -> F:
    r"""The non-centred form of sites: $x = \mu + \sigma\,\varepsilon$, with $\varepsilon$ at ``x_base``.

    The value of ``x`` itself is recorded in ``derived``. The non-centred form cures the funnel of hierarchical models
    with few data in each group. With many data the centred form mixes better.

    Args:
        model: a model or a function with sites.
        *addresses: the sites to rewrite; wildcards are allowed.

    Raises:
        ModelError: if a distribution has no non-centred form.
        AddressError: for an unknown address.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, noncentered, sample
        >>> @gen
        ... def group():
        ...     tau = sample("tau", dist.HalfNormal(1.0))
        ...     return sample("theta", dist.Normal(0.0, tau))
        >>> trace = noncentered(group, "theta")().simulate(jax.random.key(0))
        >>> sorted(trace.choices), sorted(trace.derived)
        (['tau', 'theta_base'], ['theta'])
    """
    if not addresses:
        raise TypeError("noncentered(model, address, ...) takes at least one address")
    if not all(isinstance(a, (str, tuple)) for a in addresses):
        raise TypeError("noncentered takes addresses one by one: noncentered(model, 'x', 'y')")
    return reparametrize(model, dict.fromkeys(addresses))
