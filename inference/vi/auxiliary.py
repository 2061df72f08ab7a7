"""Objectives for guides with auxiliary choices, which the target lacks: hierarchical variational inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
from weft.inference.weighted.importance import importance
from weft.ppl import Program, Target, marginal

from .objectives import elbo, iwelbo


def over_auxiliary(
    target: Target, guide: Program, reverse: Callable[[Any], Program] | None, num_auxiliary: int
) -> Program:
    """The guide's law of the latent choices. Its other choices are integrated out by importance sampling.

    Args:
        target: the target.
        guide: a program that draws the latent choices and others.
        reverse: a function from the latent choices to a proposal for the others. `None` proposes from the guide itself,
            which does not look at the latent choices.
        num_auxiliary: the number of particles.
    """
    if not set(target.latents) < set(guide.latents):
        return guide  # nothing to integrate out, or an error that is told with both lists
    proposal = None if reverse is None else lambda kept: reverse(kept.observed)
    by = importance(proposal=proposal, num_particles=num_auxiliary)
    return marginal(guide, keep=target.latents, by=by)


class hvi(elbo):
    r"""The bound of hierarchical variational inference: an ELBO whose guide has auxiliary choices `u`.

    $$\mathrm{HVI} = \mathbb{E}_q\left[ \log p(x, y) - \log \frac{q(u, x)}{r(u \mid x)} \right]$$

    It is at most the ELBO of the marginal guide $q(x)$, whose density has no closed form. It is computed as the ELBO
    with `marginal(guide, keep=target.latents, by=importance(r, 1))` as its guide.

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: a function `(params, *batch) -> Program` that draws the latent choices and others.
        reverse: `r`, a function `(params, choices, *batch) -> Program` from the latent choices to a program over the
            others. `None` is the guide's own law of them before it draws `x`.
        num_samples: the number of draws that are averaged.
        sticking_the_landing: refused here, since the guide's density is an estimate.

    References:
        Ranganath, Tran and Blei (2016), equation 5.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import hvi, iwhvi
        >>> @gen
        ... def model():
        ...     sample("y", dist.Normal(sample("mu", dist.Normal(0.0, 1.0)), 1.0))
        >>> @gen
        ... def guide(params):
        ...     u = sample("u", dist.Normal(0.0, 1.0))
        ...     sample("mu", dist.Normal(params + 0.5 * u, 0.5))
        >>> target, keys = model().given({"y": 2.0}), jax.random.split(jax.random.key(0), 4000)
        >>> bounds = [hvi(target, guide), iwhvi(target, guide, num_auxiliary=50)]
        >>> loose, tight = (jax.vmap(b, (0, None))(keys, 1.0).mean() for b in bounds)
        >>> print(f"{loose:.1f} {tight:.1f}")  # the log evidence is -2.2655
        -2.6 -2.3
    """

    reverse: Callable[..., Program] | None = None

    @property
    def auxiliary(self) -> int:
        """The number of particles that integrate the auxiliary choices out."""
        return 1

    def at(self, params: Any, *batch: Any) -> tuple[Target, Program]:
        target, guide = super().at(params, *batch)
        return target, over_auxiliary(target, guide, _reversed(self, params, batch), self.auxiliary)


class iwhvi(hvi):
    r"""The importance-weighted hierarchical bound: `hvi` with `M` auxiliary particles.

    $$\mathrm{IWHVI}_M = \mathbb{E}\left[ \log p(x, y) - \log \frac{1}{M} \sum_{j=1}^M
    \frac{q(u_j, x)}{r(u_j \mid x)} \right]$$

    Here $u_1$ is the draw from which $x$ came, and the others are draws of $r$. The bound rises to the ELBO of the
    marginal guide as $M$ grows.

    Attributes:
        num_auxiliary: the number $M$ of particles. The other settings are those of `hvi`.

    References:
        Sobolev and Vetrov (2019), equation 6.
    """

    num_auxiliary: int = eqx.field(default=5, static=True)

    @property
    def auxiliary(self) -> int:
        return self.num_auxiliary


class diwhvi(iwelbo):
    r"""The doubly importance-weighted hierarchical bound: `iwelbo` with the guide of `iwhvi`.

    $$\mathrm{DIWHVI} = \mathbb{E}\left[ \log \frac{1}{K} \sum_{k=1}^K p(x_k, y) \Big/
    \frac{1}{M} \sum_{j=1}^M \frac{q(u_{kj}, x_k)}{r(u_{kj} \mid x_k)} \right]$$

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: a function `(params, *batch) -> Program` that draws the latent choices and others.
        num_particles: the number $K$ of draws of the latent choices.
        vimco: as in `iwelbo`.
        dreg: refused here, since the guide's density is an estimate.
        num_auxiliary: the number $M$ of particles for the auxiliary choices of each draw.
        reverse: `r`, as for `hvi`.

    References:
        Sobolev and Vetrov (2019), equation 9.
    """

    num_auxiliary: int = eqx.field(default=5, static=True)
    reverse: Callable[..., Program] | None = None

    def at(self, params: Any, *batch: Any) -> tuple[Target, Program]:
        target, guide = super().at(params, *batch)
        reverse = _reversed(self, params, batch)
        return target, over_auxiliary(target, guide, reverse, self.num_auxiliary)


def _reversed(objective: Any, params: Any, batch: tuple[Any, ...]) -> Any:
    if objective.reverse is None:
        return None
    return lambda choices: objective.reverse(params, choices, *batch)
