"""Guides as programs: they draw the choices of a target one after the other, each by a law pushed to its support."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, PRNGKeyArray
from numpyro.distributions import biject_to
from weft.ppl import Target, gen, sample
from weft.ppl.programs.handlers import Evaluate, Given, expand
from weft.ppl.programs.traces import flat_records
from weft.ppl.programs.unconstraining import sum_event
from weft.ppl.stage.addresses import unflatten
from weft.ppl.stage.interpreter import Handler, interpret
from weft.ppl.stage.modules import Noun
from weft.ppl.stage.sites import Site
from weft.ppl.stage.specs import Constant

from .laws import Among, Law, Vector
from .parameters import unwrap

Before = Callable[[str], Vector]
"""The unconstrained elements of a choice that was drawn already, by address."""


# --- its push-forward ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Latent:
    """A latent choice, as far as it is known before the guide runs.

    Attributes:
        address: its dotted address.
        batch_shape: its batch axes, those of `vmap` and `scan` included.
        event_shape: the axes that its distribution ties together.
        shape: its shape on the unconstrained scale. The batch axes lead.
        dtype: its dtype.
        dims: the names of its axes.
        support: its support, if that depends on nothing.
        num_values: the number of values, if the choice is discrete.
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
        """The number of unconstrained elements."""
        return math.prod(self.shape)


class PushForward(eqx.Module):
    """The distribution of a choice whose unconstrained elements have a given law."""

    law: Law
    support: Any
    latent: Latent = eqx.field(static=True)

    has_rsample: ClassVar[bool] = True
    is_discrete: ClassVar[bool] = False

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch axes of the choice."""
        return self.latent.batch_shape

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The axes that the support ties together."""
        return self.latent.event_shape

    def sample(self, key: PRNGKeyArray) -> Array:
        """A draw."""
        z = self.law.sample(key).reshape(self.latent.shape)
        return jnp.asarray(biject_to(self.support)(z)).astype(self.latent.dtype)

    def log_prob(self, value: Array) -> Array:
        """The log density for each index of the batch axes. Each element is conditioned on those before it."""
        batch, transform = self.batch_shape, biject_to(self.support)
        z = jnp.asarray(transform.inv(value))
        jacobian = jnp.asarray(transform.log_abs_det_jacobian(z, value))
        if jacobian.ndim < len(batch):
            jacobian = jnp.broadcast_to(jacobian, batch)
        own = self.law.log_probs(z.reshape(-1)).reshape(z.shape)
        return sum_event(own, len(batch)) - sum_event(jacobian, len(batch))


# --- the guide -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
    """The place of each choice in the vector of all unconstrained elements."""

    sizes: tuple[tuple[str, int], ...]

    def __getitem__(self, address: str) -> slice:
        start = sum(self.size_of(a) for a in self.before(address))
        return slice(start, start + self.size_of(address))

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of all choices, in order."""
        return tuple(a for a, _ in self.sizes)

    @property
    def size(self) -> int:
        """The number of all elements."""
        return sum(n for _, n in self.sizes)

    def size_of(self, address: str) -> int:
        """The number of elements of one choice."""
        return dict(self.sizes)[address]

    def before(self, address: str) -> tuple[str, ...]:
        """The choices before a given one."""
        return self.addresses[: self.addresses.index(address)]


class GuideFamily(eqx.Module):
    """A family of laws: for each choice, the law of its unconstrained elements given the choices before it."""

    def law(self, params: Any, address: str, before: Before) -> Law:
        """The law of a choice. `before` gives the elements of the choices before it."""
        raise NotImplementedError


class Guide(Noun):
    """The program of a family over a target's latent choices, as a function of the parameters.

    Attributes:
        family: the family.
        latents: the choices, in order.
        index: the latent elements of sites that are observed in part.
        target: the target, if supports have to be found when the guide runs.
    """

    family: GuideFamily
    latents: tuple[Latent, ...] = eqx.field(static=True)
    index: dict[str, Array]
    target: Target | None

    def __call__(self, params: Any, *batch: Any) -> dict[str, Any]:
        """Draw the choices and return them. Arguments besides the parameters are not used."""
        return unflatten(
            self.scope(unwrap(params), unflatten({p.address: p for p in self.latents}), {})
        )

    def scope(
        self, params: Any, latents: dict[str, Any], outer: dict[str, Array]
    ) -> dict[str, Array]:
        """Draw the choices of one scope, given those that were drawn before it. All are by dotted address."""
        drawn: dict[str, Array] = {}
        elements: dict[str, Vector] = {}

        def before(address: str) -> Vector:
            if address not in elements:
                seen = {**outer, **drawn}
                support = self.support(self.latent(address), seen)
                z = jnp.asarray(biject_to(support).inv(seen[address])).reshape(-1)
                elements[address] = z[self.index[address]] if address in self.index else z
            return elements[address]

        for name, latent in latents.items():
            seen = {**outer, **drawn}
            if isinstance(latent, Latent):
                law = self.law(params, latent, before, seen)
                drawn[latent.address] = sample(name, law, dims=latent.dims)
            else:
                drawn |= sample(name, gen(self.scope)(params, latent, seen))
        return drawn

    def law(self, params: Any, latent: Latent, before: Before, seen: dict[str, Array]) -> Any:
        """The distribution of one choice."""
        if latent.num_values is not None:
            return dist.Categorical(logits=params["logits"][latent.address])
        law = self.family.law(params, latent.address, before)
        if latent.address in self.index:
            law = Among(law, self.index[latent.address], latent.size)
        return PushForward(law, self.support(latent, seen), latent)

    def latent(self, address: str) -> Latent:
        """A choice by its address."""
        return next(p for p in self.latents if p.address == address)

    def support(self, latent: Latent, seen: Mapping[str, Array]) -> Any:
        """The support of a choice. If it depends on earlier choices or on arguments, the model gives it."""
        return self.find_support(latent, seen) if latent.support is None else latent.support.value

    def find_support(self, latent: Latent, seen: Mapping[str, Array]) -> Any:
        """The support of a choice, found by a run of the target's model in which all choices are given."""
        assert self.target is not None
        code, args = self.target.program.code()
        given: dict[str, Given] = dict(self.target.data)
        for address in self.target.latents:
            info = self.target.sites[address]
            # Later choices do not matter (`_refuse_supports`), so they may have any value.
            value = seen.get(address, jnp.ones(info.shape, info.dtype))
            if address in given:
                value = jnp.where(expand(given[address].where, value), given[address].value, value)
            given[address] = Given(value)
        handler = FindSupport(latent.address, [])
        _, records, _ = interpret(code.jaxpr, args, handler, None, unflatten(given))
        leaves = dict(flat_records(records))[latent.address]["leaves"]
        return jax.tree.unflatten(handler.structure[0], leaves)


@dataclasses.dataclass(frozen=True)
class FindSupport(Handler):
    """Records the bounds of one site's support, broadcast over batch axes, in a run with all choices given."""

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
