"""Where the ready-made guides begin: the choices that they draw, and a first point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro.distributions import constraints
from weft.inference.markov.initialisation import check_init
from weft.ppl import Model, Target
from weft.ppl.analysis.dependence import site_inputs
from weft.ppl.programs.handlers import Given
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.errors import DensityError, WeftError
from weft.ppl.stage.keys import as_key
from weft.ppl.stage.specs import Constant

from .factorised import Guide, GuideFamily, Latent, Parts
from .parameters import constrained

NUM_PRIOR_DRAWS = 101
"""Draws of the prior whose median is where `loc` begins."""


class GuideStart(eqx.Module):
    """The common beginning of every guide.

    Attributes:
        latents: the latent choices, in order.
        index: the latent elements of sites that are observed in part.
        target: the target without its discrete choices.
        loc: the unconstrained elements to begin at, by address.
    """

    latents: tuple[Latent, ...] = eqx.field(static=True)
    index: dict[str, Array]
    target: Target
    loc: dict[str, Array]

    @property
    def parts(self) -> Parts:
        """The place of each choice's elements in the vector of all elements."""
        return Parts(tuple((a, z.size) for a, z in self.loc.items()))

    def scale(self, value: float) -> dict[str, Any]:
        """A positive parameter for each choice, of its shape."""
        return {
            a: constrained(jnp.full(z.shape, value, z.dtype), constraints.positive)
            for a, z in self.loc.items()
        }

    def guide(self, name: str, family: GuideFamily) -> Model:
        """The guide of a family."""
        runs = any(p.support is None and p.num_values is None for p in self.latents)
        target = self.target if runs else None
        return Model(Guide(family, self.latents, self.index, target), name)


def start_of(
    name: str, target: Target, init: Any, scale: float, key: Any, discrete: bool = False
) -> GuideStart:
    """Check a target, and find the parameters that its guide begins with."""
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
    latents = tuple(_latent(target, a, shapes) for a in target.latents)
    index = {
        p.address: _elements(target.missing[p.address], p)
        for p in latents
        if p.address in target.missing and p.num_values is None
    }
    loc = {} if space is None else _begin(name, rest, init, as_key(or_zero(key)))
    return GuideStart(latents, index, rest, loc)


def or_zero(key: Any) -> Any:
    """The key, or a fixed one where none is given."""
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
    """The target of the continuous choices, with the discrete ones set to arbitrary values."""
    at = {a: Given(jnp.zeros(target.sites[a].shape, target.sites[a].dtype)) for a in discrete}
    return Target(target.program, {**target.data, **at}, target.missing).staged()


def _latent(target: Target, address: str, shapes: Mapping[str, tuple[int, ...]]) -> Latent:
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
        return Latent(**common, shape=info.shape, support=None, num_values=info.num_values)
    shape = shapes[address]
    if address in target.missing:  # of those the coordinates are the missing elements alone
        shape = (*info.batch_shape, *shape[1:])
    support = None if info.support is None else Constant(info.support)
    return Latent(**common, shape=shape, support=support)


def _elements(missing: Array, latent: Latent) -> Array:
    """Flat indices of the unconstrained elements of the given batch elements."""
    each = math.prod(latent.shape[len(latent.batch_shape) :])
    return (missing[:, None] * each + jnp.arange(each)).reshape(-1)


def _refuse_supports(name: str, target: Target) -> None:
    """Refuse supports that a guide cannot know when it comes to the site.

    Raises:
        DensityError: for such a support. The message names the site.
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
    """The unconstrained elements to begin at: those of `init`, or else the median of draws of the prior."""
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
