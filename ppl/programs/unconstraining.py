"""The handlers of unconstrained space: the density of choices on R^n, and the way from choices to R^n."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to
from weft.ppl.stage.cotangents import finite_cotangents
from weft.ppl.stage.errors import DensityError
from weft.ppl.stage.interpreter import Handler
from weft.ppl.stage.sites import Site
from weft.ppl.stage.specs import is_discrete

from .handlers import Evaluate, Free, conditioned, expand


def bijection(d: Any, address: str) -> Any:
    """NumPyro's bijection from R^n to the support of ``d``.

    Raises:
        DensityError: if the site is discrete, or its support has no bijection.
    """
    label = type(d).__name__
    if is_discrete(d):
        raise DensityError(
            f"site {address!r} ({label}) is discrete, so the target has no density on R^n and no gradient there: give "
            "its value (observe or condition it), sum it out (marginalize), or use an algorithm for discrete choices "
            "(importance, enumeration)"
        )
    try:
        return biject_to(d.support)
    except (NotImplementedError, AttributeError, AssertionError) as e:
        raise DensityError(
            f"site {address!r} ({label}): its support {getattr(d, 'support', 'is not stated')!s} has no bijection "
            f"from R^n{f' ({e})' if str(e) else ''}; reparametrise the site or give its value"
        ) from None


def sum_event(x: jax.Array, batch_ndim: int) -> jax.Array:
    """The sum over the axes after the first `batch_ndim`. These may have size zero."""
    return jnp.sum(x, tuple(range(batch_ndim, x.ndim)))


def to_support(site: Site, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The value and its log-Jacobian, ``(x, log |dx/dz|)``. The latter has the shape ``lanes + batch_shape``."""
    address, batch_ndim = ".".join(site.address), site.spec.batch_ndim

    def one(payload: Any, z: Any) -> Any:
        transform = bijection(payload["d"], address)
        x = transform(z)
        jacobian = jnp.asarray(transform.log_abs_det_jacobian(z, x))
        batch = site.spec.shape[:batch_ndim]
        jacobian = jnp.broadcast_to(jacobian, batch) if jacobian.ndim < batch_ndim else jacobian
        return x.astype(site.spec.dtype), sum_event(jacobian, batch_ndim)

    return site.over_lanes(one, z)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryBranch(Handler):
    """A handler that walks idle branches as well.

    Attributes:
        idle_branch: whether the branch that is walked is idle.
        skip: the addresses in it that the branch taken has too.
    """

    idle_branch: bool = False
    skip: frozenset[tuple[str, ...]] = frozenset()
    every_branch = True

    def idle(self, skip: frozenset[tuple[str, ...]]) -> Handler:
        return dataclasses.replace(self, idle_branch=True, skip=self.skip | skip)


@dataclasses.dataclass(frozen=True)
class Unconstrain(EveryBranch):
    """The density of a target on R^n. Latent choices come as ``Free``, the others as ``Given``.

    An idle latent choice (in a branch that is not taken, or masked) keeps its own prior term. So the target stays
    proper, and the law of the active choices is unchanged. If the parameters of an idle choice are not finite, its term
    is N(0, 1) on the unconstrained scale.
    """

    record: bool = False

    @property
    def records(self) -> bool:  # type: ignore[override]
        return self.record

    def terms(self) -> dict[str, jax.Array]:
        return {"log_density": jnp.zeros(())}

    def site(
        self, site: Site, key: Any, given: Any
    ) -> tuple[jax.Array, dict[str, Any] | None, dict[str, Any]]:
        given = conditioned(site, given)
        if isinstance(given, Free):
            if site.address in self.skip:
                return to_support(site, given.z)[0], None, {}
            return self.latent(site, given)
        value, record, terms = Evaluate("value" if self.record else None).site(site, key, given)
        if self.idle_branch:
            return value, None, {}
        return value, record, {"log_density": terms["log_density"]} if terms else {}

    def latent(self, site: Site, given: Free) -> Any:
        active: Any = not self.idle_branch
        z = given.z
        if self.idle_branch or "where" in site.parts:
            site, z = site.guarded(), finite_cotangents(z)
            if "where" in site.parts and not self.idle_branch:
                active = site.part("where")
        value, jacobian = to_support(site, z)
        free: Any = True
        if given.where is not None:
            value = jnp.where(
                expand(given.where, value), jnp.asarray(given.value).astype(value.dtype), value
            )
            free = ~jnp.asarray(given.where)
        own = site.log_prob(value)
        term = site.weigh(own) + jnp.where(free, jacobian, 0)
        if active is not True:
            stand_in = jnp.where(free, self.pseudo_prior(own + jacobian, given.z), 0)
            term = jnp.where(active, term, stand_in)
        record = None
        if self.record:
            record = {"value": value}
            if "where" in site.parts:
                record["active"] = jnp.broadcast_to(active, own.shape)
        return value, record, {"log_density": term}

    @staticmethod
    def pseudo_prior(own: jax.Array, z: jax.Array) -> jax.Array:
        """The prior term of an idle choice; N(0, 1) where that is not finite."""
        normal = -0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi)
        return jnp.where(jnp.isfinite(own), own, sum_event(normal, own.ndim))


@dataclasses.dataclass(frozen=True)
class ToUnconstrained(EveryBranch):
    """Records every latent choice on the unconstrained scale. Choices that are not given are drawn."""

    latents: frozenset[str]

    def site(
        self, site: Site, key: Any, given: Any
    ) -> tuple[jax.Array, dict[str, Any] | None, dict[str, Any]]:
        evaluate, address = Evaluate(None), ".".join(site.address)
        if site.spec.kind != "sample":
            return evaluate.site(site, key, given)[0], None, {}
        given = conditioned(site, given)

        def inverse(value: Any) -> jax.Array:
            return site.over_lanes(lambda p, x: bijection(p["d"], address).inv(x), value)

        try:
            value = evaluate.value(site, key, given)
        except DensityError:  # improper: a box around zero on the unconstrained scale
            z = jax.eval_shape(inverse, jax.ShapeDtypeStruct(site.shape, site.spec.dtype))
            value = to_support(site, jax.random.uniform(key, z.shape, z.dtype, -2.0, 2.0))[0]
        if address not in self.latents or site.address in self.skip:
            return value, None, {}
        z = inverse(value)
        return value, {"value": jnp.where(jnp.isfinite(z), z, 0)}, {}
