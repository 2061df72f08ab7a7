"""Where a chain begins: a point with finite density and finite gradient.

First, points are tried in a small box around zero on the unconstrained scale. The box shrinks from try to try. If the
data leave no such point there, draws from the prior are tried. The box comes first for two reasons. Vague priors, which
are common, give absurd points. And compiling the samplers of priors takes longer than everything else.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from weft.inference.run.settings import require_counts, require_flags, require_positive
from weft.ppl import Target
from weft.ppl.programs.observations import entries
from weft.ppl.stage.addresses import flatten, unflatten, unknown
from weft.ppl.stage.errors import AddressError, DensityError, WeftError
from weft.ppl.stage.modules import Module


class ChainStart(eqx.Module):
    """Points to begin at, with or without a leading axis of chains.

    Attributes:
        position: `(n,)`, on the unconstrained scale.
        log_density: the log density there. It is not finite if no try succeeded.
        gradient: `(n,)`, the gradient there. It is not finite if no try succeeded.
    """

    position: Float[Array, "*chains n"]
    log_density: Float[Array, "*chains"]
    gradient: Float[Array, "*chains n"]

    @property
    def valid(self) -> Bool[Array, "*chains"]:
        """Whether density and gradient are finite."""
        return jnp.isfinite(self.log_density) & jnp.isfinite(self.gradient).all(-1)


class InitStrategy(Module):
    """How chains find their first point.

    Attributes:
        num_tries: the number of points of the box that are tried for each chain, and then of draws from the prior.
        radius: half the width of the box.
        prior: whether to try the prior at all.
    """

    num_tries: int = 50
    radius: float = 2.0
    prior: bool = True

    def __check_init__(self) -> None:
        require_counts(self, num_tries=1)
        require_positive(self, "radius is a positive number", self.radius)
        require_flags(self, "prior")

    def __call__(
        self, key: PRNGKeyArray, target: Target, num_chains: int, init: Any = None
    ) -> ChainStart:
        """Find a point for each chain.

        Args:
            key: a random key.
            target: the target.
            num_chains: the number of points to find.
            init: choices that every point takes over: all latent choices or some, with or without a leading axis of
                chains.

        Returns:
            The points. A chain for which no try succeeded has the point of the last try.
        """
        space = target.unconstrain().flat
        given, axes = _align(init, target, num_chains)
        whole = bool(given) and set(given) == set(target.latents)
        num_tries = 1 if whole else self.num_tries

        def from_box(key: PRNGKeyArray, tries: Array) -> Array:
            radius = self.radius * 0.9**tries
            return radius * jax.random.uniform(key, (space.size,), minval=-1.0, maxval=1.0)

        def from_prior(key: PRNGKeyArray, tries: Array) -> Array:
            return space.init(key)

        def find(key: PRNGKeyArray, given: dict[str, Array]) -> ChainStart:
            def attempt(source: Any, tries: Array) -> ChainStart:
                point = source(jax.random.fold_in(key, tries), tries)
                if given:
                    point = _overlay(point, given, target, space)
                return ChainStart(point, *jax.value_and_grad(space.log_density)(point))

            shapes = jax.eval_shape(lambda: attempt(from_box, jnp.int32(0)))
            start = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
            for source in (from_box, from_prior) if self.prior and not whole else (from_box,):
                _, start = jax.lax.while_loop(
                    lambda c: ~c[1].valid & (c[0] < num_tries),
                    lambda c, source=source: (c[0] + 1, attempt(source, c[0])),
                    (jnp.int32(0), start),
                )
            return start

        keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(jnp.arange(num_chains))
        return jax.vmap(find, in_axes=(0, axes))(keys, given)


def _overlay(z: Array, given: dict[str, Array], target: Target, space: Any) -> Array:
    """The position with some choices replaced by given ones. NaN if these have no position."""
    choices = {**flatten(space.to_choices(z)), **given}
    moved = space.from_choices(unflatten(choices)).astype(z.dtype)
    back, held = flatten(space.to_choices(moved)), jnp.bool_(True)
    for address, value in given.items():
        if (
            address not in target.data
        ):  # of a site observed in part, only the latent elements are taken over
            held &= jnp.allclose(back[address], value, rtol=1e-2, atol=1e-4)
    return jnp.where(held, moved, jnp.nan)


def _align(
    init: Any, target: Target, num_chains: int
) -> tuple[dict[str, Array], dict[str, int | None]]:
    """The given choices by address, and which of them have an axis of chains."""
    given, axes = {a: jnp.asarray(v) for a, v in flatten(init).items()}, {}
    shapes = flatten(target.latent_shapes())
    for address, value in given.items():
        if address not in shapes:
            raise AddressError(f"init: {unknown(address, shapes, ' among the latents')}")
        shape, came = shapes[address].shape, np.shape(value)
        if came == shape:
            axes[address] = None
        elif came == (num_chains, *shape):
            axes[address] = 0
        else:
            raise WeftError(
                f"init: {address!r} has shape {came}, expected {shape}, or {(num_chains, *shape)} "
                f"with one point for each of the {num_chains} chains"
            )
    return given, axes


def check_init(init: Any, target: Target, num_chains: int) -> None:
    """Refuse first choices that do not fit the target: address, shape, dtype, support.

    Raises:
        AddressError: for an address that is not a latent choice.
        WeftError: for a shape other than that of the choice, with or without an axis of chains.
        ObservationError: for values that the site cannot take.
    """
    given, axes = _align(init, target, num_chains)
    for chain in range(num_chains if 0 in axes.values() else 1):
        point = {a: v if axes[a] is None else v[chain] for a, v in given.items()}
        whole = {
            a: v for a, v in point.items() if a not in target.data
        }  # the others are partly data
        entries(target.sites, whole, target.program.name, data=True)


def explain(target: Target, position: Float[Array, " n"]) -> DensityError:
    """The error for a chain that found no first point. It names the sites at fault, and the values tried.

    Args:
        target: the target.
        position: the last point tried.
    """
    space = target.unconstrain().flat
    lost = [a for a, part in space.addresses.items() if np.isnan(position[part]).any()]
    choices = space.to_choices(position)
    culprits = []
    if lost:
        culprits = ["the choices given in init lie outside their supports there"]
    for address, term in flatten(target.log_densities(choices)).items():
        term = np.asarray(term)
        bad = ~np.isfinite(term)
        if bad.any() and not lost:
            amount = "" if term.ndim == 0 else f" in {bad.sum()} of {term.size} elements"
            culprits.append(f"the log density of {address!r} is {term[bad].flat[0]}{amount}")
    if not culprits:
        slope = np.asarray(jax.grad(space.log_density)(position))
        culprits = [
            f"the gradient with respect to {address!r} is not finite"
            for address, part in space.addresses.items()
            if not np.isfinite(slope[part]).all()
        ] or ["the log-Jacobian of the map from the unconstrained scale is not finite"]
    values = ", ".join(f"{a} = {_short(v)}" for a, v in flatten(choices).items())
    return DensityError(
        "no point to begin at: density or gradient is not finite at any of the points tried. At the "
        f"last one {'; '.join(culprits)}. The values tried: {values}. Check the data and the priors "
        "of these sites, or begin at choices of your own: run(..., init=choices)"
    )


def _short(value: Any) -> str:
    text = np.array2string(np.asarray(value), precision=4, threshold=6, edgeitems=3)
    return text.replace("\n", "")
