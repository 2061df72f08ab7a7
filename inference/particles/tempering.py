"""Tempering: from a law that can be drawn exactly to the target, by steps between which particles move.

A path of laws `pi_0, ..., pi_1` begins at one that is drawn exactly and ends at the target. A step from one law to the
next multiplies weights by `pi_next(x) / pi(x)`. After a resampling, the particles move by kernels that leave the
present law invariant (Neal 2001; Del Moral, Doucet and Jasra 2006). There are three paths:

    prior to posterior      pi_b(x) = p(x) p(y | x)^b
    guide to target         pi_b(x) = q(x)^(1-b) gamma(x)^b
    along the data          pi_n(x) = p(x) p(y_1, ..., y_n | x)           (Chopin 2002)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from weft.inference.weighted.proposals import check_proposal
from weft.ppl import Program, Target
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import DensityError, WeftError
from weft.ppl.stage.jaxprs import equations
from weft.ppl.stage.modules import Module
from weft.ppl.stage.sites import Site, site_p
from weft.ppl.stage.structure import summed_out

from .bridges import Bridge, LawPath, Likelihood, MarginalLikelihood
from .tempered import Tempered


class tempering(Module):
    """Sequential Monte Carlo from the prior, or a guide, to the target: `smc(tempering()).run(key, target)`.

    The settings are a function from a target to the Feynman-Kac model that `smc` runs. A step weighs particles by the
    change of law, `w <- w l(x)^(b' - b)`. Before it, `smc` resamples the particles if their effective sample size has
    fallen below `threshold`. Only then do they move, by `smc(..., rejuvenate=)`: a kernel, or a function from the
    particles to one. Where the density is NaN it counts as zero. A last step weighs nothing: it resamples and moves the
    particles of the step before, if that is due.

    By default the moves are Hamiltonian transitions. Their inverse mass is the covariance of the particles (the
    variances, with fewer than ten particles for each coordinate). Their step sizes follow the acceptance rate. There
    are as many as it takes until particles are uncorrelated with what they were before, or correlations no longer fall
    (after Buchholz, Chopin and Jacob 2021).

    In a model with choices summed out (`marginalize`) the likelihood is `l(x) = p(x, y) / p(x)`, where `p(x)` is the
    marginal density of the other choices without their data. So a move takes about three densities in place of one.
    With `by="row"` the particles need that of the first `n` rows for every `n` after each round of moves.

    The first temperature is 0. `log_increments` in `result.path` has the term that each step added to the log evidence.
    With `by="row"`, that of step `n` is the log predictive density of the rows that it adds, given the rows before.
    `info` has the temperature (the number of rows) and the acceptance rate of every round of moves. For the default
    moves it also has their number and "correlation". This is the largest remaining correlation of a coordinate, or of
    the log density, with its value before the round.

    Attributes:
        guide: `None` to begin at the prior; or a program that draws exactly the target's latent choices, or a function
            from the target to one.
        by: the name of an axis of the observations. Its rows enter one after another, in place of a temperature.
            Observations without that axis enter with the first row.
        rows_per_step: the number of rows that enter at each step.
        schedule: increasing temperatures, of which the last is 1. `None` to choose each by bisection so that the
            conditional effective sample size is `ess`.
        ess: the share of the particles that a step is to leave, if temperatures are chosen:
            `(sum_i W_i v_i)^2 / sum_i W_i v_i^2` with the weights `W` before the step and its factors `v`.
        max_steps: the largest number of temperatures, if they are chosen. The last one is 1, however far away, with a
            warning if that is further than `ess` allows.
        num_moves: the number of transitions after a resampling. `None` for as many of the default moves as it takes (50
            at most), and for 5 of a kernel of your own.

    Raises:
        WeftError: for a schedule that does not increase to 1, or settings that contradict each other.
        DensityError: for targets without observations or with estimated densities, for priors that cannot be drawn, and
            if the kernel does not apply to a latent choice.
        AddressError: if the guide does not draw exactly the latent choices, or no observation has the axis.

    References:
        Neal (2001); Chopin (2002), "A sequential particle filter method for static models"; Del Moral, Doucet
        and Jasra (2006); Zhou, Johansen and Aston (2016) for the conditional effective sample size.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import smc, tempering
        >>> @gen
        ... def model():
        ...     mu = sample("mu", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(mu, 0.1))
        >>> target = model().given({"y": 2.0})
        >>> found = smc(tempering(), num_particles=500).run(jax.random.key(0), target, progress=False)
        >>> print(f"{dist.Normal(0.0, 1.01**0.5).log_prob(2.0):.1f}")
        -2.9
        >>> bool(abs(found.log_evidence + 2.9) < 0.2)
        True
    """

    guide: Program | Callable[[Target], Program] | None = None
    by: str | None = eqx.field(static=True, default=None)
    rows_per_step: int = eqx.field(static=True, default=1)
    schedule: Any = None
    ess: float = 0.5
    max_steps: int = eqx.field(static=True, default=200)
    num_moves: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        for name in ("rows_per_step", "max_steps", "num_moves"):
            value = getattr(self, name)
            if name == "num_moves" and value is None:
                continue
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise WeftError(f"tempering: {name} must be a positive integer, got {value!r}")
        if isinstance(self.ess, (int, float)) and not 0 < self.ess < 1:
            raise WeftError(f"tempering: ess is a share between 0 and 1, got {self.ess!r}")
        if self.by is not None and not (self.guide is None and self.schedule is None):
            raise WeftError(
                "tempering: with by= rows enter one after another, so that there are no temperatures and no other "
                "law to begin at: leave out schedule and guide"
            )
        if self.by is None and self.rows_per_step != 1:
            raise WeftError("tempering: rows_per_step goes with by=, the axis of the rows")
        _check_schedule(self.schedule)

    def __call__(self, target: Target) -> Tempered:
        """The Feynman-Kac model of a target."""
        target = target.staged()
        if not target.latents:
            raise WeftError(
                f"tempering: the target of model {target.program.name!r} has no latent choice to infer"
            )
        _check_exact(target.program)
        if self.guide is not None:
            guide: Any = self.guide
            if not isinstance(guide, Program) and callable(guide):
                guide = guide(target)
            check_proposal(guide, target, "guide")
            _check_program(guide)
            path: LawPath = Bridge(target, guide.staged())
        else:
            _check_program(target.program)
            summed = summed_out(target.program.code()[0].jaxpr)
            path = MarginalLikelihood(target, self.by) if summed else Likelihood(target, self.by)
        levels, num_levels = None, self.max_steps
        if self.by is not None:
            step, last = self.rows_per_step, path.last
            levels = jnp.asarray([*range(step, last, step), last], jnp.result_type(float))
        elif self.schedule is not None:
            levels = self.schedule
            if not isinstance(levels, Tracer):  # the first particles have temperature zero already
                levels = np.asarray(levels, float)
                levels = levels[levels > 0]
            levels = jnp.asarray(levels, jnp.result_type(float))
        num_levels = num_levels if levels is None else levels.size
        return Tempered(path, levels, jnp.asarray(self.ess), num_levels, self.num_moves)


def _check_schedule(schedule: Any) -> None:
    if schedule is None:
        return
    if jnp.ndim(schedule) != 1 or jnp.size(schedule) == 0:
        raise WeftError(
            f"tempering: schedule is one temperature for each step, got shape {jnp.shape(schedule)}"
        )
    if isinstance(schedule, Tracer):
        return
    levels = np.asarray(schedule, float)
    if levels[0] < 0 or levels[-1] != 1 or not np.all(np.diff(levels) > 0):
        raise WeftError(
            "tempering: a schedule increases at every step, from 0 or more to 1 exactly; this one goes from "
            f"{levels[0]:g} to {levels[-1]:g} by steps of {np.diff(levels).min(initial=1.0):g} at least"
        )


def _check_exact(program: Program) -> None:
    if program.estimated:
        raise DensityError(
            f"tempering: the density of {program.name!r} is an estimate, drawn anew at each evaluation, and kernels "
            "need an exact one: take importance"
        )


def _check_program(program: Program) -> None:
    _check_exact(program)
    if fixed := list(_fixed_in_part(program.code()[0].jaxpr)):
        raise DensityError(
            f"tempering: {', '.join(map(repr, fixed))} of {program.name!r} are conditioned in part inside the model, "
            "where a power does not reach the observed elements alone: observe them by given({...: observed(...)})"
        )


def _fixed_in_part(jaxpr: Any) -> Iterator[str]:
    """Names of the sites of which a transform fixed some elements and left others."""
    for eqn, _ in equations(jaxpr):
        if eqn.primitive is site_p and "observed" in Site(eqn.params, [], (), ()).parts:
            yield eqn.params["spec"].name
