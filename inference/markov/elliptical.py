"""Elliptical slice sampling, for choices with normal priors."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, PRNGKeyArray
from weft.inference.run.settings import require_counts
from weft.ppl import Target
from weft.ppl.exact.families import base_of
from weft.ppl.programs.handlers import Evaluate, Free
from weft.ppl.programs.traces import flat_records
from weft.ppl.programs.unconstraining import EveryBranch
from weft.ppl.stage.addresses import unflatten
from weft.ppl.stage.errors import DensityError
from weft.ppl.stage.interpreter import Handler, interpret
from weft.ppl.stage.sites import Site

from .kernel import Choices, Info, Kernel, entered


class elliptical_slice(Kernel):
    r"""Elliptical slice sampling: a point on an ellipse through the current point and a draw from the prior.

    The point is chosen by its likelihood. All latent choices must be `Normal` or `MultivariateNormal`. With `block`,
    the others are given. Each choice is standardised, $x = m + L z$. Its mean and scale are those of the program. They
    may depend on other choices, including choices that move.

    With $z' = z \cos\theta + \nu \sin\theta$ and $\nu \sim N(0, I)$, an angle is drawn. It is drawn again, from an
    interval that shrinks towards zero, until the likelihood at it is above a level. There is nothing to tune.

    Attributes:
        max_shrinkage: the most angles that are tried. After that many, the choices stay where they are.

    Raises:
        DensityError: for choices that are not normal, or are observed in part.

    References:
        Murray, Adams and MacKay (2010), figure 2.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> @gen
        ... def model():
        ...     x = sample("x", dist.Normal(0.0, 2.0))
        ...     sample("n", dist.Poisson(jax.numpy.exp(x)))
        >>> target = model().given({"n": 3})
        >>> after, info = kernels.elliptical_slice().move(jax.random.key(0), {"x": 1.0}, target)
        >>> bool(after["x"] != 1.0), int(info["n_steps"]) >= 1
        (True, True)
    """

    max_shrinkage: int = eqx.field(static=True, default=100)

    def __check_init__(self) -> None:
        require_counts(self, max_shrinkage=1)

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        space = _Standardised(target)
        z, unravel = ravel_pytree(space.enter(entered(choices, target)))
        normal_key, level_key, angle_key, loop_key = jax.random.split(key, 4)
        other = jax.random.normal(normal_key, z.shape, z.dtype)
        level = space.log_likelihood(unravel(z)) + jnp.log1p(-jax.random.uniform(level_key))
        angle = 2 * jnp.pi * jax.random.uniform(angle_key)

        def at(angle: Array) -> Array:
            return z * jnp.cos(angle) + other * jnp.sin(angle)

        def above(angle: Array) -> Array:
            return space.log_likelihood(unravel(at(angle))) >= level

        def shrink(state: Any) -> Any:
            i, angle, low, high, _ = state
            low, high = jnp.where(angle < 0, angle, low), jnp.where(angle < 0, high, angle)
            angle = jax.random.uniform(jax.random.fold_in(loop_key, i), minval=low, maxval=high)
            return i + 1, angle, low, high, above(angle)

        first = (jnp.int32(1), angle, angle - 2 * jnp.pi, angle, above(angle))
        steps, angle, _, _, found = jax.lax.while_loop(
            lambda s: ~s[4] & (s[0] < self.max_shrinkage), shrink, first
        )
        after = space.leave(unravel(jnp.where(found, at(angle), z)))
        return after, {"acceptance_rate": jnp.asarray(found, float), "n_steps": steps}


class _Standardised:
    """A target with normal choices, as a likelihood of numbers that are N(0, 1)."""

    def __init__(self, target: Target) -> None:
        target.program.require_density()
        partial = [a for a in target.latents if a in target.data]
        if partial:
            raise DensityError(
                f"elliptical_slice: {', '.join(map(repr, partial))} is observed in part; make two sites of it"
            )
        self.target = target
        self.latents = frozenset(target.latents)

    def enter(self, choices: Choices) -> dict[str, Array]:
        """From choices to standard normal numbers."""
        entries = self.target.complete(choices)
        return self._run(_Standardise(self.latents), entries)[0]

    def leave(self, z: dict[str, Array]) -> Choices:
        """From standard normal numbers to choices."""
        return unflatten(self._run(_Colour(self.latents, record=True), self._free(z))[0])

    def log_likelihood(self, z: dict[str, Array]) -> Array:
        """The log density without the normal terms. Minus infinity where it is NaN."""
        found = self._run(_Colour(self.latents), self._free(z))[1]
        return jnp.where(jnp.isnan(found), -jnp.inf, found)

    def _free(self, z: dict[str, Array]) -> dict[str, Any]:
        return {**self.target.data, **{a: Free(x) for a, x in z.items()}}

    def _run(self, handler: Handler, entries: dict[str, Any]) -> tuple[dict[str, Array], Any]:
        code, args = self.target.program.code()
        _, records, terms = interpret(code.jaxpr, args, handler, None, unflatten(entries))
        found = {a: r["value"] for a, r in flat_records(records) if a in self.latents}
        return found, terms.get("log_density")


@dataclasses.dataclass(frozen=True)
class _Standardise(EveryBranch):
    """Record `L^-1 (x - m)` of every latent choice."""

    latents: frozenset[str]

    def site(self, site: Site, key: Any, given: Any) -> Any:
        value = Evaluate(None).site(site, key, given)[0]
        if ".".join(site.address) not in self.latents or site.address in self.skip:
            return value, None, {}

        def standard(payload: Any, x: Array) -> Array:
            loc, scale, dense = _normal(payload["d"], site)
            if not dense:
                return (x - loc) / scale
            tril = jnp.broadcast_to(scale, (*x.shape, x.shape[-1]))
            return solve_triangular(tril, (x - loc)[..., None], lower=True)[..., 0]

        return value, {"value": site.over_lanes(standard, value)}, {}


@dataclasses.dataclass(frozen=True)
class _Colour(EveryBranch):
    """Latent choices come as standard normal numbers. The density is that of all other sites, and scales and masks."""

    latents: frozenset[str]
    record: bool = False

    @property
    def records(self) -> bool:  # type: ignore[override]
        return self.record

    def terms(self) -> dict[str, jax.Array]:
        return {"log_density": jnp.zeros(())}

    def site(self, site: Site, key: Any, given: Any) -> Any:
        if not isinstance(given, Free):
            value, _, terms = Evaluate(None).site(site, key, given)
            counted = {} if self.idle_branch else {"log_density": terms.get("log_density", 0.0)}
            return value, None, counted

        def coloured(payload: Any, z: Array) -> Array:
            loc, scale, dense = _normal(payload["d"], site)
            return loc + ((scale @ z[..., None])[..., 0] if dense else scale * z)

        value = site.over_lanes(coloured, given.z).astype(site.spec.dtype)
        record = {"value": value} if self.record and site.address not in self.skip else None
        if self.idle_branch or "scale" not in site.parts:
            return value, record, {}
        own = site.log_prob(value)
        rest = site.weigh(own) - own
        if "where" in site.parts:
            rest = jnp.where(site.part("where"), rest, 0.0)
        return value, record, {"log_density": rest}


def _normal(d: Any, site: Site) -> tuple[Any, Any, bool]:
    """The mean and scale of a normal prior, and whether the scale is a lower triangle."""
    base = base_of(d)
    if isinstance(base, dist.Normal):
        return base.loc, base.scale, False
    if isinstance(base, dist.MultivariateNormal):
        return base.loc, base.scale_tril, True
    raise DensityError(
        f"elliptical_slice moves normal choices, and {'.'.join(site.address)!r} ({type(base).__name__}) is none: "
        "leave it out, block(elliptical_slice(), ...), and move it by another kernel"
    )
