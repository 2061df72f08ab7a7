"""Paths of laws from one that can be drawn exactly to a target, and the programs of the laws between them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from weft.inference.weighted.proposals import log_ratio
from weft.ppl import Model, Program, Target, factor, mask
from weft.ppl.programs.traces import flat_records
from weft.ppl.programs.unconstraining import sum_event
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.control import marginal_p
from weft.ppl.stage.errors import AddressError, DensityError
from weft.ppl.stage.interpreter import Context, Handler, Result, walk
from weft.ppl.stage.sites import Site
from weft.ppl.stage.structure import SiteInfo, summed_out
from weft.ppl.transforms.rewriting import (
    Rewrite,
    Transformed,
    bind_marginal,
    rebind_scope,
    stage_call,
)


class LawPath(eqx.Module):
    """A path of laws from one that can be drawn exactly to a target."""

    target: eqx.AbstractVar[Target]

    @property
    @abc.abstractmethod
    def unit(self) -> str:
        """The name of the levels."""

    @property
    @abc.abstractmethod
    def last(self) -> int:
        """The level of the target; the first law has level 0."""

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Draw the latent choices from the first law."""

    @abc.abstractmethod
    def terms(self, choices: dict[str, Any]) -> Float[Array, " row"]:
        """The terms whose sum is the target's log density minus that of the first law."""

    @abc.abstractmethod
    def share(self, level: Any) -> Float[Array, " row"]:
        """The share of each term that counts at a level."""

    @abc.abstractmethod
    def at(self, level: Any) -> Target:
        """The law at a level."""


class FromPrior(LawPath):
    """A path from the prior, along the temperature or along the rows of the observations.

    Attributes:
        target: the last law.
        axis: the name of the axis of the rows; None for a temperature.
    """

    target: eqx.AbstractVar[Target]
    axis: eqx.AbstractVar[str | None]

    def __check_init__(self) -> None:
        if not self.observed:
            raise DensityError(
                f"tempering: the target of model {self.target.program.name!r} has no observation and no factor: its "
                "prior is the target already. Give it data, or begin elsewhere: tempering(guide=program)"
            )
        self.last  # noqa: B018  (checks the axis)

    @property
    def observed(self) -> list[str]:
        """The addresses of the sites that are tempered: observations and factors."""
        return [
            address
            for address, info in self.target.sites.items()
            if info.kind == "factor" or info.observed or address in self.target.data
        ]

    @property
    def unit(self) -> str:
        return "temperature" if self.axis is None else "rows"

    @property
    def last(self) -> int:
        if self.axis is None:
            return 1
        places = {a: self._place(a) for a in self.observed}
        sizes = {self.target.sites[a].axes[p].size for a, p in places.items() if p is not None}
        if len(sizes) == 1:
            return sizes.pop()
        model = self.target.program.name
        if sizes:
            raise AddressError(
                f"tempering: the axis {self.axis!r} has several sizes in model {model!r}: {sorted(sizes)}"
            )
        names = {x.name for a in self.observed for x in self.target.sites[a].axes if x.name}
        raise AddressError(
            f"tempering: no observation of model {model!r} has an axis {self.axis!r}; those that are named: "
            f"{', '.join(map(repr, sorted(names))) or 'none'}"
        )

    def draw(self, key: PRNGKeyArray) -> dict[str, Any]:
        try:
            drawn, _ = self.target.generate(key)
        except DensityError as e:
            raise DensityError(
                f"tempering begins with draws of the prior, which has none ({e}); begin with those of another program: "
                "tempering(guide=program)"
            ) from None
        return _latent(self.target, drawn.choices)

    def share(self, level: Any) -> Float[Array, " row"]:
        if self.axis is None:
            return jnp.reshape(level, (1,))
        return jnp.where(jnp.arange(self.last) < level, 1.0, 0.0)

    def shares(self, level: Any) -> dict[str, Array]:
        """The share of each element of the observed sites that counts at a level, by address."""
        share, found = self.share(level), {}
        for address in self.observed:
            shape, place = self.target.sites[address].batch_shape, self._place(address)
            along = share[0] if place is None else share
            if place is not None:
                along = along.reshape(-1, *(1,) * (len(shape) - place - 1))
            given = self.target.data.get(address)
            if given is not None and given.where is not None:  # what is missing is latent
                along = jnp.where(given.where, along, 1.0)
            found[address] = jnp.broadcast_to(along, shape)
        return found

    def of(self, function: Callable[..., Any], args: list[Any]) -> Target:
        """The target with another program, of the same sites."""
        program = Model(function, self.target.program.name)(*args)
        return Target(program, self.target.data, self.target.missing)

    def _place(self, address: str) -> int | None:
        """The position of the axis of the rows at a site."""
        axes = self.target.sites[address].axes if self.axis is not None else ()
        return next((i for i, a in enumerate(axes) if a.name == self.axis), None)


class Likelihood(FromPrior):
    """The prior times powers of the observations' densities: one power for all, or a power 0 or 1 for each row."""

    target: Target
    axis: str | None = eqx.field(static=True, default=None)

    def terms(self, choices: dict[str, Any]) -> Float[Array, " row"]:
        densities = flatten(self.target.log_densities(choices))
        total = jnp.zeros(self.last)
        for address in self.observed:
            density, given = densities[address], self.target.data.get(address)
            if given is not None and given.where is not None:
                density = jnp.where(given.where, density, 0)
            place = self._place(address)
            if place is None:
                total = total.at[0].add(jnp.sum(density))
            else:
                total = total + sum_event(jnp.moveaxis(density, place, 0), 1)
        return total

    def at(self, level: Any) -> Target:
        code, args = self.target.program.code()
        return self.of(_Raised(code, self.shares(level)), args)


class MarginalLikelihood(FromPrior):
    r"""The same where choices $z$ are summed out. Then the likelihood is no product over sites.

    It is one number,

    $$p(y \mid x) = p(x, y) / p(x), \quad p(x, y) = \sum_z p(x, y, z), \quad p(x) = \sum_z p(x, z).$$

    Both densities are those of the target, the second without its observations. So is the density of the first rows.
    """

    target: Target
    axis: str | None = eqx.field(static=True, default=None)

    def terms(self, choices: dict[str, Any]) -> Float[Array, " row"]:
        def log_density(level: Array) -> Array:
            return self._with_observed(level).log_density(choices)

        # Many rows are taken one after the other.
        over = jax.vmap(log_density) if self.axis is None else partial(jax.lax.map, log_density)
        found = over(jnp.arange(self.last + 1))
        impossible = jnp.isneginf(found[:-1])  # and so is what follows
        return jnp.where(impossible, -jnp.inf, jnp.diff(found))

    def at(self, level: Any) -> Target:
        if self.axis is not None:
            return self._with_observed(level)
        code, args = self._with_observed(0).program.code()
        return self.of(_Bridged(code, self, jnp.asarray(level)), args)

    def _with_observed(self, level: Any) -> Target:
        """The target with those observations only that count at a level, whole."""
        code, args = self.target.program.code()
        counts = {a: share > 0 for a, share in self.shares(level).items()}
        return self.of(mask(code, unflatten(counts)), args)


class Bridge(LawPath):
    """The geometric path from a guide to the target.

    Attributes:
        target: the last law.
        guide: the first law.
    """

    target: Target
    guide: Program

    @property
    def unit(self) -> str:
        return "temperature"

    @property
    def last(self) -> int:
        return 1

    def draw(self, key: PRNGKeyArray) -> dict[str, Any]:
        draw_key, rest_key = jax.random.split(key)
        drawn = self.guide.simulate(draw_key)
        # The guide drew everything. This completes sites that are observed in part.
        whole, _ = self.target.generate(rest_key, drawn.choices)
        return _latent(self.target, whole.choices)

    def terms(self, choices: dict[str, Any]) -> Float[Array, " row"]:
        return jnp.reshape(log_ratio(self.target, self.guide, None, choices), (1,))

    def share(self, level: Any) -> Float[Array, " row"]:
        return jnp.reshape(level, (1,))

    def at(self, level: Any) -> Target:
        latents = self.target.latents
        given = {a: g for a, g in self.target.data.items() if a in latents}
        code, args = self.guide.code()
        inner: Any = code
        if given:  # the guide has no observed elements
            inner = mask(code, unflatten({a: ~g.where for a, g in given.items()}))
        program = Model(_Bridged(inner, self, jnp.asarray(level)), self.guide.name)(*args)
        return Target(program, given, {a: i for a, i in self.target.missing.items() if a in given})


def _latent(target: Target, choices: dict[str, Any]) -> dict[str, Any]:
    found = flatten(choices)
    return unflatten({a: found[a] for a in target.latents})


# --- programs of these laws -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Power(Rewrite):
    """Raise densities of elements to powers. Elements raised to zero do not count, even if their density is zero."""

    def payload(self, site: Site, payload: dict[str, Any], given: Any) -> dict[str, Any]:
        if given is not None:
            payload["scale"] = (*payload.get("scale", ()), given)
            payload["where"] = jnp.logical_and(payload.get("where", True), given > 0)
        return payload


class _Raised(Transformed):
    """A program in which the densities of some sites are raised to powers: arrays of the sites' batch shapes."""

    powers: dict[str, Array]

    def handler(self, table: dict[str, SiteInfo]) -> tuple[Handler, dict[str, Any]]:
        return _Power(), unflatten(self.powers)


@dataclasses.dataclass(frozen=True)
class _InPlace(Rewrite):
    """Stage every site unchanged, and record the values of the choices, except for those that are summed out."""

    summed: frozenset[str] = frozenset()
    records = True

    def site(self, site: Site, key: Any, given: Any) -> tuple[jax.Array, Any, dict[str, Any]]:
        value = self.emit(site)
        recorded = site.spec.kind == "sample" and ".".join(site.address) not in self.summed
        return value, {"value": value} if recorded else None, {}

    def equation(self, eqn: Any, ins: list[Any], context: Context) -> Result | None:
        if eqn.primitive is not marginal_p:
            return None
        addresses, options = eqn.params["addresses"], eqn.params["options"]
        run, opened = _with_records(eqn.params["jaxpr"], context)
        return opened(bind_marginal(run, ins, addresses, options))

    def scope(self, eqn: Any, args: list[Any], context: Context) -> Result:
        name = eqn.params["name"]
        run, opened = _with_records(eqn.params["jaxpr"], context.enter(name))
        return opened(rebind_scope(name, run, args))


def _with_records(jaxpr: Any, context: Context) -> tuple[Callable[..., list[Any]], Any]:
    """A walk as a flat function, its records among its outputs; and the way from these to a result."""
    trees = []

    def run(*args: Any) -> list[Any]:
        outs, records, _ = walk(jaxpr, list(args), context)
        leaves, tree = jax.tree.flatten(records)
        trees.append((len(outs), tree))
        return [*outs, *leaves]

    def opened(found: list[Any]) -> Result:
        n, tree = trees[-1]
        return found[:n], jax.tree.unflatten(tree, found[n:]), {}

    return run, opened


class _Bridged(eqx.Module):
    """A program, with a factor: a power of the ratio of the target's density to that of the program."""

    inner: Callable[..., Any]
    path: LawPath
    level: Array

    def __call__(self, *args: Any) -> None:
        code, operands = stage_call(self.inner, args, {})
        handler = _InPlace(frozenset(summed_out(code.jaxpr)))
        _, records, _ = walk(code.jaxpr, operands, Context(handler, {}, {}))
        choices = unflatten({a: r["value"] for a, r in flat_records(records)})
        terms = self.path.terms(_latent(self.path.target, choices))[0]
        factor("tempering", jnp.where(self.level > 0, self.level * terms, 0))
