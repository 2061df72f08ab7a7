"""Where a chain begins: a point of finite density and finite gradient.

Two kinds of candidates are tried together, a draw from the prior and a point of a small box around
zero on the unconstrained scale: vague priors make the first absurd, informative ones the second. Of
each pair the one of higher density is taken; if neither is finite the next pair is tried, from a
box that shrinks.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from weft.ppl import Target
from weft.ppl.addresses import flatten, unflatten, unknown
from weft.ppl.errors import AddressError, DensityError, WeftError


class Start(eqx.Module):
    """Points to begin at.

    Attributes:
        position: `(num_chains, n)`, on the unconstrained scale.
        log_density: `(num_chains,)`; not finite where no try was any good.
        gradient: `(num_chains, n)`; likewise.
    """

    position: Float[Array, "chains n"]
    log_density: Float[Array, " chains"]
    gradient: Float[Array, "chains n"]


class InitStrategy(eqx.Module):
    """How chains find their first point.

    Attributes:
        num_tries: pairs of candidates tried for each chain.
        radius: of the box around zero that one of each pair is drawn from.
        prior: whether the other is a draw from the prior; if not, both come from the box.
    """

    num_tries: int = 50
    radius: float = 2.0
    prior: bool = True

    def __call__(
        self, key: PRNGKeyArray, target: Target, num_chains: int, init: Any = None
    ) -> Start:
        """Find a point for each chain.

        Args:
            key: a random key.
            target: the target.
            num_chains: how many points to find.
            init: choices that every candidate takes over, all latents or some, with or without a
                leading axis of chains.

        Returns:
            The points: the last tried, where none was any good.
        """
        space = target.unconstrain().flat
        keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(jnp.arange(num_chains))
        given, axes = _align(init, target, num_chains)
        whole = set(given) == set(target.latents)

        def candidates(key: PRNGKeyArray, tries: Array, given: dict[str, Array]) -> Array:
            box_key, other_key = jax.random.split(jax.random.fold_in(key, tries))
            radius = self.radius * 0.9**tries
            box = radius * jax.random.uniform(box_key, (space.size,), minval=-1.0, maxval=1.0)
            other = space.init(other_key) if self.prior else -box
            points = jnp.stack([box.astype(other.dtype), other])
            return jax.vmap(lambda z: _overlay(z, given, space))(points) if given else points

        def pick(points: Array) -> tuple[Array, Array, Array, Array]:
            value, slope = jax.vmap(jax.value_and_grad(space.log_density))(points)
            valid = jnp.isfinite(value) & jnp.all(jnp.isfinite(slope), axis=-1)
            best = jnp.argmax(jnp.where(valid, value, -jnp.inf))
            return points[best], value[best], slope[best], valid[best]

        def find(key: PRNGKeyArray, given: dict[str, Array]) -> tuple[Array, Array, Array]:
            num_tries = 1 if whole else self.num_tries
            shapes = jax.eval_shape(lambda: pick(candidates(key, jnp.int32(0), given)))
            nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            _, (point, value, slope, _) = jax.lax.while_loop(
                lambda c: ~c[1][3] & (c[0] < num_tries),
                lambda c: (c[0] + 1, pick(candidates(key, c[0], given))),
                (jnp.int32(0), nothing),
            )
            return point, value, slope

        return Start(*jax.vmap(find, in_axes=(0, axes))(keys, given))


def _overlay(z: Array, given: dict[str, Array], space: Any) -> Array:
    choices = flatten(space.to_choices(z))
    return space.from_choices(unflatten({**choices, **given})).astype(z.dtype)


def _align(
    init: Any, target: Target, num_chains: int
) -> tuple[dict[str, Array], dict[str, int | None]]:
    """The given choices by address, and which of them have an axis of chains."""
    given, axes = flatten(init), {}
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
        given[address] = jnp.asarray(value, shapes[address].dtype)
    return given, axes


def explain(target: Target, position: Float[Array, " n"], num_tries: int) -> DensityError:
    """The error for a chain that found no point to begin at: which sites are not finite, and the values tried."""
    space = target.unconstrain().flat
    choices = space.to_choices(position)
    culprits = []
    for address, term in flatten(target.log_densities(choices)).items():
        term = np.asarray(term)
        bad = ~np.isfinite(term)
        if bad.any():
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
        f"no point to begin at: density or gradient is not finite in any of {num_tries} tries. "
        f"At the last one {'; '.join(culprits)}. The values tried: {values}. "
        "Check the data and the priors of these sites, or begin at choices of your own: run(..., init=choices)"
    )


def _short(value: Any) -> str:
    value = np.asarray(value)
    text = np.array2string(value, precision=4, threshold=6, edgeitems=3)
    return text.replace("\n", "")
