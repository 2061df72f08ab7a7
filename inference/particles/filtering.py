"""Filtering: the Feynman-Kac model of a program whose scan holds the observations.

The program is split at the scan (`weft.ppl.scans.splitting`). A particle is one run of it up to some step: choices
before the scan, the carry, the choices of the step. Each step draws its latent choices, from the program or from a
proposal `q`, and weighs

    G_t = p(x_t, y_t | carry_{t-1}) / q(x_t | carry_{t-1}, y_t).

With the program itself as proposal this is `p(y_t | x_t)`: the bootstrap filter of Gordon, Salmond and Smith (1993).
Observations before the scan weigh the first step. Observations after the scan are one more step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from weft.ppl import Program, Target
from weft.ppl.analysis.dependence import readers
from weft.ppl.programs.evaluation import (
    run_generate,
)
from weft.ppl.scans.panels import Series, series
from weft.ppl.scans.splitting import split
from weft.ppl.stage.addresses import unflatten
from weft.ppl.stage.errors import ModelError, WeftError
from weft.ppl.stage.modules import Module

from .filter import Filter
from .panels import Panel

Proposal = Callable[[Any, Int[Array, ""], dict[str, Any]], Program]
"""A proposal: a function from the carry, the step and its observations to a program over latent choices of the step."""


class filtering(Module):
    """Filtering of any model whose `jax.lax.scan` holds the observations, for `smc`.

    The model is taken as it is written: one scan at the top level has sites that are observed. Choices before the scan
    (parameters, the first state) are drawn for each particle and travel with it. Choices and observations after the
    scan are a last step. Elements that are not observed (`observed(y, where=...)`, or data shorter than the scan) are
    drawn and do not weigh. With `missing="drop"` they are left out. In a model with choices summed out (`marginalize`)
    only the other choices are drawn. The part of a summed-out chain that the carry holds is handed on as a law
    (`weft.ppl.exact.messages`).

    A scan under one or several `jax.vmap` is a panel of series. Each series has a filter of its own, with its own
    weights and resamplings, and the evidences multiply. Choices outside of the vmap, which the series share, must be
    given (`pmmh` and `smc2` infer them). No density may read choices of several series.

    Attributes:
        proposal: what draws the latent choices of a step. By default it is the model itself (the bootstrap filter). It
            may be a function `(carry, t, observed) -> program` (a guided filter). The program draws choices of the step
            at their addresses, and those that it lacks are drawn from the model. Of an observation that it draws only
            the missing elements count. In the carry that the function gets, choices that are summed out are
            represented by their law. It may also be `"optimal"`: the exact law of the choices given the carry and the
            observation, if `marginalize` can integrate them out of a step.
        lookahead: a function from `(carry, t, observed)` to a log preference for particles when they are resampled
            before step `t` (the auxiliary filter). With `proposal="optimal"` it is the predictive density of the
            observation, unless given.
        scan: an address in the scan that is meant, if several hold observations.

    Raises:
        ModelError: if there is no such scan at the top level of the model, or under a vmap there; or if series share
            latent choices, or read each other's. The message names what stands in the way.
        AddressError: if a proposal draws something that is not a latent choice of a step.

    References:
        Gordon, Salmond and Smith (1993); Pitt and Shephard (1999); Doucet, Godsill and Andrieu (2000) for the
        optimal proposal.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import filtering, smc
        >>> @gen
        ... def random_walk():
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, 1.0))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=2)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0])})
        >>> found = smc(filtering(), num_particles=20_000).run(jax.random.key(0), target, progress=False)
        >>> print(f"{found.log_evidence:.1f}")  # exactly -2.82
        -2.8
    """

    proposal: Proposal | Literal["optimal"] | None = None
    lookahead: Callable[[Any, Int[Array, ""], dict[str, Any]], Float[Array, ""]] | None = None
    scan: str | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if isinstance(self.proposal, str) and self.proposal != "optimal":
            raise WeftError(
                f"filtering: proposal is a function or 'optimal', got {self.proposal!r}"
            )

    def __call__(self, target: Target) -> Filter | Panel:
        """The Feynman-Kac model of a target: a `Filter`, or a `Panel` of filters if its scan stands under a vmap."""
        target.program.require_density()
        apart = self.series(target)
        if apart is not None:
            return self._panel(apart, target)
        parts = split(target.program, list(target.data), self.scan)
        latents = tuple(tuple(a for a in part if a in target.latents) for part in parts.addresses)
        made = Filter(parts, target.data, self.proposal, self.lookahead, latents)
        if self.proposal == "optimal":
            _check_optimal(target, latents[1])
        return made

    def series(self, target: Target) -> Series | None:
        """A target in two parts: what its series share, and one series. None if its scan is not under a vmap."""
        settled = [a for a in target.data if a not in target.latents]
        return series(target.program, target.data, settled, self.scan)

    def _panel(self, apart: Series, target: Target) -> Panel:
        name, shared = target.program.name, apart.shared.sites
        free = [a for a in target.latents if a in shared]
        if free:
            raise ModelError(
                f"filtering: the {apart.size} series of {name!r} share the latent choices "
                f"{', '.join(map(repr, free))}, and a filter for each series wants these given, target.given(...); "
                "pmmh() and smc(smc2()) infer them. What each series has of its own is drawn inside the vmap"
            )
        given = {a: g for a, g in target.data.items() if a in shared}
        any_key = jax.random.key(0)  # nothing is left to draw
        trace, log_shared = run_generate(apart.shared, any_key, unflatten(given))
        data = {a: g for a, g in target.data.items() if a not in shared}

        def one(index: Array) -> Any:
            rows = jax.tree.map(lambda x: jnp.asarray(x)[index], data)
            return self(Target(apart.lane(index, trace.value), rows, {}))

        return Panel.of(one, apart.size, log_shared)


def _check_optimal(target: Target, latents: Sequence[str]) -> None:
    """Check that nothing reads a missing observation. The optimal proposal leaves such observations out."""
    code, _ = target.program.code()
    for address in latents:
        found = readers(code.jaxpr, address) if address in target.data else []
        if found:
            raise ModelError(
                f"filtering: {address!r} is observed in part and {', '.join(map(repr, found))} depend on it, which "
                "proposal='optimal' cannot treat: take the bootstrap filter, or a proposal that draws it"
            )
