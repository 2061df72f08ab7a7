r"""Tempering: from a law that can be drawn to the target, by steps between which particles move.

A path of laws `pi_0, ..., pi_1` begins at one that is drawn exactly and ends at the target. A step
from one to the next multiplies weights by `pi_next(x) / pi(x)`; after a resampling, the particles
move by kernels that leave the present law as it is (Neal 2001; Del Moral, Doucet and Jasra 2006).
Three paths:

    prior to posterior      pi_b(x) = p(x) p(y | x)^b
    guide to target         pi_b(x) = q(x)^(1-b) gamma(x)^b
    along the data          pi_n(x) = p(x) p(y_1, ..., y_n | x)           (Chopin 2002)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from weft.inference.markov import gradient_kernels as kernels
from weft.inference.markov.kernel import Kernel
from weft.inference.results.particles import Particles
from weft.inference.weighted.proposals import check_proposal
from weft.ppl import Program, Target
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import DensityError, WeftError
from weft.ppl.stage.jaxprs import equations
from weft.ppl.stage.modules import Module
from weft.ppl.stage.sites import Site, site_p
from weft.ppl.stage.structure import summed_out

from .bridges import Bridge, LawPath, Likelihood
from .feynman_kac import FeynmanKac


class tempering(Module):
    r"""Sequential Monte Carlo from the prior, or a guide, to the target: `smc(tempering()).run(key, target)`.

    The settings are a function from a target to the Feynman-Kac model that `smc` runs. A step weighs
    particles by the change of law, `w <- w l(x)^(b' - b)`; before it, `smc` resamples them if their
    effective sample size has fallen below `threshold`, and only then they move, by `smc(...,
    rejuvenate=)`: a kernel, or a function from the particles to one. By default these are Hamiltonian
    transitions with the covariance of the particles as inverse mass (their variances where they are fewer
    than ten a coordinate) and step sizes that follow the acceptance rate, as many as it takes until
    particles are uncorrelated with what they were before, or correlations no longer fall (after Buchholz,
    Chopin and Jacob 2021). Where the density is no number it counts as zero. A last step weighs nothing:
    it resamples and moves what came out of the one before, if that is due.

    The first temperature is 0. In `result.path`, `log_increments` has what each step added to the log
    evidence: with `by="row"` step `n` has the log predictive density of the rows that it adds, given those
    before. `info` has the temperature (the number of rows) and the acceptance rate of every round of moves; of the
    default ones also how many there were and "correlation", the largest one left of a coordinate, or the log
    density, with what it was before the round.

    Attributes:
        guide: `None` to begin at the prior; or a program that draws exactly the target's latent choices, or a
            function from the target to one.
        by: name of an axis of the observations, whose rows enter one after another in place of a temperature;
            observations without that axis enter with the first.
        rows_per_step: how many rows enter at each step.
        schedule: temperatures, increasing, the last one 1; `None` to choose each by bisection so that the
            conditional effective sample size is `ess`.
        ess: the share of the particles that a step is to leave, when temperatures are chosen:
            `(sum_i W_i v_i)^2 / sum_i W_i v_i^2` with the weights `W` before the step and its factors `v`.
        max_steps: how many temperatures there may be, when they are chosen; the last one is 1, however far, with a
            warning if that is further than `ess` allows.
        num_moves: how many transitions particles make after a resampling; `None` for as many of the default moves as
            it takes, 50 at most, and 5 of a kernel of your own.

    Raises:
        WeftError: for a schedule that does not increase to 1, or settings that contradict each other.
        DensityError: for targets without observations or with estimated or summed densities, for priors
            that cannot be drawn, and where the kernel does not apply to a latent choice.
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

    def __call__(self, target: Target) -> FeynmanKac:
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
            path = Likelihood(target, self.by)
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


# --- the model --------------------------------------------------------------------------------------------------------


class Particle(eqx.Module):
    """One particle, and how far all of them are.

    Attributes:
        choices: nested dict of the latent choices.
        terms: log likelihood at the choices, of each row, or one number.
        level: the temperature, or how many rows are in.
        ahead: that after the step.
        done: whether the step after the last level has been made.
        jumped: whether the last level is further than it should be.
        step_size: of the default moves.
    """

    choices: dict[str, Any]
    terms: Float[Array, " row"]
    level: Float[Array, ""]
    ahead: Float[Array, ""]
    done: Bool[Array, ""]
    jumped: Bool[Array, ""]
    step_size: Float[Array, ""]


class Tempered(FeynmanKac):
    """The Feynman-Kac model of a path of laws.

    Attributes:
        path: the laws.
        levels: of each step; `None` where they are chosen.
        ess: by what they are chosen.
        num_levels: how many there are, at most.
        num_moves: how many transitions particles make after a resampling; `None` as in `tempering`.
    """

    path: LawPath
    levels: Float[Array, " level"] | None
    ess: Any
    num_levels: int = eqx.field(static=True)
    num_moves: int | None = eqx.field(static=True)
    keeps_lineage = True  # `adapt` writes the level into particles

    @property
    def num_steps(self) -> int:
        """The first particles, a step for each level, and one that weighs nothing."""
        return self.num_levels + 2

    def init(self, key: PRNGKeyArray) -> tuple[Particle, Float[Array, ""]]:
        """A draw from the law that the path begins with."""
        choices = self.path.draw(key)
        zero = jnp.zeros(())
        # Stable for d independent coordinates (Beskos et al. 2013).
        size = sum(np.prod(s.shape) for s in jax.tree.leaves(choices))
        step_size = jnp.asarray(max(size, 1) ** -0.25, zero.dtype)
        terms = self._terms(choices)
        no = jnp.zeros((), bool)
        return Particle(choices, terms, zero, zero, no, no, step_size), zero

    def adapt(self, t: Any, particles: Particle, log_weights: Array) -> Particle:
        """The particles with the level of the step to come."""
        jumped = particles.jumped
        if self.levels is None:
            chosen = self._chosen(particles, log_weights)
            ahead = jnp.where(t >= self.num_levels, 1.0, chosen)
            jumped = jumped | (ahead > chosen)
        else:
            ahead = self.levels[jnp.minimum(t, self.num_levels) - 1]
        ahead = jnp.broadcast_to(ahead, particles.level.shape)
        done = particles.level >= self.path.last
        return dataclasses.replace(particles, ahead=ahead, done=done, jumped=jumped)

    def remark(self, particles: Particle) -> str | None:
        """That the temperature had to rise too far at the end."""
        if not bool(jnp.any(particles.jumped)):
            return None
        return (
            f"After {self.num_levels} steps (max_steps) the temperature was not yet one and was set to it, however "
            "far: the evidence and the particles are not to be trusted. Take more steps, or begin at a guide near the "
            "posterior."
        )

    def step(
        self, key: PRNGKeyArray, t: Any, particle: Particle
    ) -> tuple[Particle, Float[Array, ""]]:
        """The same particle at the next level, weighed by the change of law."""
        share = self.path.share(particle.ahead) - self.path.share(particle.level)
        # What does not enter must not count, also where its density is zero.
        change = jnp.sum(jnp.where(share > 0, share * particle.terms, 0))
        return dataclasses.replace(particle, level=particle.ahead), change

    def rejuvenate(
        self, key: PRNGKeyArray, t: Any, particles: Particle, kernel: Any
    ) -> tuple[Particle, dict[str, Array]]:
        """Moves that leave the law of the present level as it is."""
        target = self.path.at(particles.level[0])
        step_size = particles.step_size[0]
        choices, num_moves = particles.choices, self.num_moves
        if kernel is None:
            choices, step_size, info = _hamiltonian(key, choices, target, step_size, num_moves)
        else:
            choices, info = _moved(key, choices, target, kernel, num_moves or NUM_MOVES)
        particles = dataclasses.replace(
            particles,
            choices=choices,
            terms=jax.vmap(self._terms)(choices),
            step_size=jnp.broadcast_to(step_size, particles.step_size.shape),
        )
        return particles, {**info, self.path.unit: particles.level[0]}

    def finished(self, particles: Particle) -> Bool[Array, ""]:
        """Whether the target is reached, and the step after it made."""
        return jnp.all(particles.done)

    def choices(self, particle: Particle) -> dict[str, Any]:
        """The latent choices."""
        return particle.choices

    def _terms(self, choices: dict[str, Any]) -> Float[Array, " row"]:
        """The terms of the path; where they are no number nothing can be: a Cholesky factor failed there, say."""
        terms = self.path.terms(choices)
        return jnp.where(jnp.isnan(terms), -jnp.inf, terms)

    def _chosen(self, particles: Particle, log_weights: Array) -> Float[Array, ""]:
        """The next temperature by bisection on the conditional effective sample size."""
        level, terms = particles.level[0], particles.terms[:, 0]
        log_weights = log_weights - logsumexp(log_weights)
        # A little less than asked for, so that rounding does not keep `smc` from resampling at the same share.
        wanted = 0.999 * self.ess

        def too_far(ahead: Array) -> Array:
            factors = jnp.where(ahead > level, (ahead - level) * terms, 0)
            factors = factors - jnp.max(
                factors
            )  # else large ones cancel below, with what they round to
            share = 2 * logsumexp(log_weights + factors) - logsumexp(log_weights + 2 * factors)
            return ~(jnp.exp(share) >= wanted)  # no number is too far, too

        def halved(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bracket
            middle = (low + high) / 2
            far = too_far(middle)
            return jnp.where(far, low, middle), jnp.where(far, middle, high)

        one = jnp.ones_like(level)
        _, high = jax.lax.fori_loop(0, 60, halved, (level, one))
        return jnp.where(too_far(one), high, one)


# --- moves ------------------------------------------------------------------------------------------------------------


NUM_MOVES = 5  # of kernels that are given


def _moved(
    key: PRNGKeyArray, choices: Any, target: Target, kernel: Any, num_moves: int
) -> tuple[Any, dict[str, Array]]:
    """Choices after some transitions of a kernel, and what happened, on average."""
    n = jax.tree.leaves(choices)[0].shape[0]
    if not isinstance(kernel, Kernel):
        kernel = kernel(Particles(choices=choices, log_weights=jnp.zeros(n)))

    def transition(choices: Any, key: PRNGKeyArray) -> Any:
        keys = jax.random.split(key, n)
        return jax.vmap(lambda k, x: kernel.move(k, x, target))(keys, choices)

    choices, info = jax.lax.scan(transition, choices, jax.random.split(key, num_moves))
    return choices, {name: jnp.mean(x, dtype=float) for name, x in info.items()}


MOST_MOVES = 50
SMALL_CORRELATION = 0.1  # the largest of a few correlations of a thousand independent pairs
SMALL_DECREASE = 0.05
ROUND = 5  # moves, after which correlations must have fallen by so much; not in the first, which finds a step size
MOST_LEAPFROGS = 32
SMALLEST_STEP = 0.1  # of the largest
TIME = 4.0  # on average; half a period of a standard normal is pi
WANTED_ACCEPTANCE = 0.9


def _hamiltonian(
    key: PRNGKeyArray, choices: Any, target: Target, step_size: Array, num_moves: int | None
) -> tuple[Any, Array, dict[str, Array]]:
    """Choices after Hamiltonian transitions tuned to the particles, the step size after them, and what happened."""
    discrete = [a for a in target.latents if target.sites[a].is_discrete]
    if discrete:
        raise DensityError(
            f"tempering: the latent choices {', '.join(map(repr, discrete))} are discrete, which the default moves, "
            "Hamiltonian Monte Carlo, do not reach: sum them out (marginalize), or give a kernel for them: "
            "smc(tempering(), rejuvenate=kernel)"
        )
    flat = target.unconstrain().flat
    positions = jax.vmap(flat.from_choices)(choices)
    n = positions.shape[0]
    space = _Standardised.of(positions)

    def log_density(u: Array) -> Array:
        return flat.log_density(space.back(u))

    def begin(z: Array) -> Any:
        return kernels.hmc(step_size, 1).init(space.there(z), log_density)

    begun: Any = jax.vmap(begin)(positions)

    def correlations(states: Any) -> Array:
        """Of what particles are with what they were: each coordinate, and the log density."""
        was, now = (jnp.c_[s.position, s.logdensity] for s in (begun, states))
        return _correlations(was, now)

    def going_on(carry: Any) -> Array:
        i, _, _, _, before, now = carry
        if num_moves is not None:
            return i < num_moves
        large = now > SMALL_CORRELATION
        # What no longer falls will not: particles that keep to their modes stay correlated.
        falling = (i % ROUND != 0) | (i <= ROUND) | (now < before - SMALL_DECREASE)
        return (i < MOST_MOVES) & jnp.any(large & falling)

    def transition(carry: Any) -> Any:
        i, states, step_size, rates, before, now = carry
        before = jnp.where(i % ROUND == 0, now, before)
        time_key, step_key, move_key = jax.random.split(jax.random.fold_in(key, i), 3)
        # Lengths differ, or trajectories of one period would return to where they began; step sizes
        # differ from particle to particle, since some of them stand where the law is narrow.
        time = TIME * jax.random.uniform(time_key, (), minval=0.5, maxval=1.5)
        length = jnp.clip(jnp.ceil(time / step_size), 1, MOST_LEAPFROGS).astype(jnp.int32)
        step_sizes = step_size * SMALLEST_STEP ** jax.random.uniform(step_key, (n,))

        def one(key: PRNGKeyArray, state: Any, step_size: Array) -> Any:
            return kernels.hmc(step_size, length).step(key, state, log_density)

        states, info = jax.vmap(one)(jax.random.split(move_key, n), states, step_sizes)
        rate = jnp.mean(jnp.nan_to_num(info.acceptance_rate))
        step_size = step_size * jnp.exp(rate - WANTED_ACCEPTANCE)
        return i + 1, states, step_size, rates + rate, before, correlations(states)

    ones = correlations(begun)
    carry = (jnp.int32(0), begun, step_size, jnp.zeros_like(step_size), ones, ones)
    i, states, step_size, rates, _, left = jax.lax.while_loop(going_on, transition, carry)
    choices = jax.vmap(lambda u: flat.to_choices(space.back(u)))(states.position)
    info = {
        "acceptance_rate": rates / i,
        "step_size": step_size,
        "num_moves": i,
        "correlation": jnp.max(left),
    }
    return choices, step_size, info


class _Standardised(eqx.Module):
    """Coordinates in which particles are uncorrelated, with unit variances: `z = centre + scales * (root @ u)`.

    Where particles are too few to tell correlations, at less than ten different ones for each coordinate, they are
    left as they are.
    """

    centre: Float[Array, " n"]
    scales: Float[Array, " n"]
    root: Float[Array, "n n"] | None

    @classmethod
    def of(cls, positions: Float[Array, "particle n"]) -> _Standardised:
        num, size = positions.shape
        centre, spread = jnp.mean(positions, 0), jnp.std(positions, 0)
        scales = jnp.where(spread > 0, spread, 1.0)
        if num < 10 * size:
            return cls(centre, scales, None)
        u = (positions - centre) / scales
        different = 1 + jnp.sum(jnp.diff(jnp.sort(jnp.sum(u, 1))) > 0)
        root = jnp.linalg.cholesky(jnp.matmul(u.T, u, precision="highest") / num)
        known = jnp.all(jnp.isfinite(root)) & (different >= 10 * size)
        return cls(centre, scales, jnp.where(known, root, jnp.eye(size, dtype=root.dtype)))

    def back(self, u: Float[Array, " n"]) -> Float[Array, " n"]:
        if self.root is not None:
            u = jnp.matmul(self.root, u, precision="highest")
        return self.centre + self.scales * u

    def there(self, z: Float[Array, " n"]) -> Float[Array, " n"]:
        u = (z - self.centre) / self.scales
        if self.root is None:
            return u
        return jax.scipy.linalg.solve_triangular(self.root, u, lower=True)


def _correlations(x: Float[Array, "particle n"], y: Float[Array, "particle n"]) -> Array:
    """Of each column of one with that of the other; zero where one is constant."""
    x, y = (v - jnp.mean(v, 0) for v in (x, y))
    x, y = (v / jnp.sqrt(jnp.sum(v**2, 0)) for v in (x, y))
    return jnp.nan_to_num(jnp.sum(x * y, 0))


# --- what cannot be tempered ------------------------------------------------------------------------------------------


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
    if summed := summed_out(program.code()[0].jaxpr):
        raise DensityError(
            f"tempering: in {program.name!r} {', '.join(map(repr, summed))} are summed out, and a power of the "
            "sum is no sum of powers: begin at a program that draws the others, their prior say, "
            "tempering(guide=program), or write the sum as a distribution (dist.MixtureSameFamily)"
        )
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
