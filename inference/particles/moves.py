"""Moves of tempered particles that leave a law invariant: by any kernel, or by Hamiltonian transitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from weft.inference.markov import gradient_kernels as kernels
from weft.inference.markov.kernel import Kernel
from weft.inference.results.particles import Particles
from weft.ppl import Target
from weft.ppl.stage.errors import DensityError

NUM_MOVES = 5  # of kernels that are given


def moves_of_kernel(
    key: PRNGKeyArray, choices: Any, target: Target, kernel: Any, num_moves: int
) -> tuple[Any, dict[str, Array]]:
    """The choices after some transitions of a kernel, and the averages of its reports."""
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


def hamiltonian_moves(
    key: PRNGKeyArray, choices: Any, target: Target, step_size: Array, num_moves: int | None
) -> tuple[Any, Array, dict[str, Array]]:
    """The choices after Hamiltonian transitions tuned to the particles, the next step size, and a report.

    Args:
        key: a random key.
        choices: the choices of all particles, `(particle, ...)`.
        target: the law to be left invariant.
        step_size: the first step size. It follows the acceptance rate.
        num_moves: the number of transitions; None for as many as the correlations call for.

    Raises:
        DensityError: if a latent choice is discrete.
    """
    _require_continuous(target)
    flat = target.unconstrain().flat
    positions = jax.vmap(flat.from_choices)(choices)
    space = Standardised.of(positions)

    def log_density(u: Array) -> Array:
        return flat.log_density(space.back(u))

    def begin(z: Array) -> Any:
        return kernels.hmc(step_size, 1).init(space.there(z), log_density)

    begun: Any = jax.vmap(begin)(positions)

    def going_on(carry: _Moving) -> Array:
        i = carry.num_moves
        if num_moves is not None:
            return i < num_moves
        large = carry.correlations > SMALL_CORRELATION
        # Correlations that stop falling will not fall: particles that stay in their modes remain correlated.
        falling = carry.correlations < carry.before - SMALL_DECREASE
        falling = (i % ROUND != 0) | (i <= ROUND) | falling
        return (i < MOST_MOVES) & jnp.any(large & falling)

    def transition(carry: _Moving) -> _Moving:
        i = carry.num_moves
        before = jnp.where(i % ROUND == 0, carry.correlations, carry.before)
        states, rate = _transition(
            jax.random.fold_in(key, i), carry.states, log_density, carry.step_size
        )
        step_size = carry.step_size * jnp.exp(rate - WANTED_ACCEPTANCE)
        left = _correlations(begun, states)
        return _Moving(i + 1, states, step_size, carry.rates + rate, before, left)

    ones = _correlations(begun, begun)
    first = _Moving(jnp.int32(0), begun, step_size, jnp.zeros_like(step_size), ones, ones)
    last = jax.lax.while_loop(going_on, transition, first)
    choices = jax.vmap(lambda u: flat.to_choices(space.back(u)))(last.states.position)
    info = {
        "acceptance_rate": last.rates / last.num_moves,
        "step_size": last.step_size,
        "num_moves": last.num_moves,
        "correlation": jnp.max(last.correlations),
    }
    return choices, last.step_size, info


class _Moving(NamedTuple):
    """Particles between two transitions.

    Attributes:
        num_moves: the number of transitions so far.
        states: the states of the kernel, `(particle, ...)`.
        step_size: the largest step size of the next transition.
        rates: the sum of the acceptance rates.
        before: the correlations when the present round of `ROUND` transitions began.
        correlations: the correlations of the present states with the first ones: of each coordinate, and of the log
            density.
    """

    num_moves: Array
    states: Any
    step_size: Array
    rates: Array
    before: Array
    correlations: Array


def _transition(
    key: PRNGKeyArray, states: Any, log_density: Callable[[Array], Array], step_size: Array
) -> tuple[Any, Array]:
    """One Hamiltonian transition of all particles, and its acceptance rate."""
    time_key, step_key, move_key = jax.random.split(key, 3)
    # Lengths differ, or trajectories of one period would return to where they began; step sizes
    # differ from particle to particle, since some of them stand where the law is narrow.
    time = TIME * jax.random.uniform(time_key, (), minval=0.5, maxval=1.5)
    length = jnp.clip(jnp.ceil(time / step_size), 1, MOST_LEAPFROGS).astype(jnp.int32)
    n = states.position.shape[0]
    step_sizes = step_size * SMALLEST_STEP ** jax.random.uniform(step_key, (n,))

    def one(key: PRNGKeyArray, state: Any, step_size: Array) -> Any:
        return kernels.hmc(step_size, length).step(key, state, log_density)

    states, info = jax.vmap(one)(jax.random.split(move_key, n), states, step_sizes)
    return states, jnp.mean(jnp.nan_to_num(info.acceptance_rate))


def _require_continuous(target: Target) -> None:
    discrete = [a for a in target.latents if target.sites[a].is_discrete]
    if discrete:
        raise DensityError(
            f"tempering: the latent choices {', '.join(map(repr, discrete))} are discrete, which the default moves, "
            "Hamiltonian Monte Carlo, do not reach: sum them out (marginalize), or give a kernel for them: "
            "smc(tempering(), rejuvenate=kernel)"
        )


class Standardised(eqx.Module):
    """Coordinates in which particles are uncorrelated, with unit variances: `z = centre + scales * (root @ u)`.

    With fewer than ten different particles for each coordinate there are too few to estimate correlations. They are
    then left as they are.
    """

    centre: Float[Array, " n"]
    scales: Float[Array, " n"]
    root: Float[Array, "n n"] | None

    @classmethod
    def of(cls, positions: Float[Array, "particle n"]) -> Standardised:
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


def _correlations(was: Any, now: Any) -> Float[Array, " n"]:
    """The correlations of states with earlier ones: of each coordinate and the log density. Zero for a constant."""
    x, y = (jnp.c_[s.position, s.logdensity] for s in (was, now))
    x, y = (v - jnp.mean(v, 0) for v in (x, y))
    x, y = (v / jnp.sqrt(jnp.sum(v**2, 0)) for v in (x, y))
    return jnp.nan_to_num(jnp.sum(x * y, 0))
