"""The engine of sequential Monte Carlo: the state of a run, and the step from one state to the next.

The functions take the settings of `smc`, with the model in them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from weft.inference.results.particles import Particles
from weft.inference.run.algorithm import State
from weft.ppl.stage.errors import ModelError, WeftError

from .ancestral_tree import AncestralTree
from .coalescence import Coalescence
from .feynman_kac import FeynmanKac, has
from .generation import Generation, first_generation, offspring
from .history import History, moments
from .returned import called, in_words, same_particles, scalar


class SMCState(State):
    """The state of a run of particles.

    Attributes:
        iteration: the number of steps done. Drawing the first particles does not count as one.
        particles: `(particle, ...)`.
        log_weights: the unnormalised log weights since the last resampling.
        log_total: the logarithm of the sum of the weights.
        log_evidence: the log evidence so far.
        coalescence: from which earlier particles the present ones descend.
        path: buffers for what is kept of every step.
        tree: the particles that have descendants.
    """

    iteration: Int[Array, ""]
    particles: Any
    log_weights: Float[Array, " particle"]
    log_total: Float[Array, ""]
    log_evidence: Float[Array, ""]
    coalescence: Coalescence
    path: History
    tree: AncestralTree | None = None


def first_state(settings: Any, key: PRNGKeyArray) -> SMCState:
    """The first particles, and buffers for all steps."""
    n, steps = settings.num_particles, settings.model.num_steps
    now, zero = first_generation(key, settings.model, n), jnp.int32(0)
    coalescence = Coalescence.begin(n, num_chains(settings), settings.resample.independent)
    info = jax.eval_shape(lambda: _moved(settings, key, zero, now.particles)[1])
    info = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), info)
    first, total = _record(settings, now, jnp.log(float(n)), zero > 0, coalescence, info)
    path = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype).at[0].set(x), first)
    evidence = path.log_increments[0]
    tree = AncestralTree.begin(now.particles, n) if settings.history == "ancestors" else None
    return SMCState(zero, now.particles, now.log_weights, total, evidence, coalescence, path, tree)


def resumed(settings: Any, key: PRNGKeyArray, state: Any) -> SMCState:
    """The state of an earlier run, or its arrays as read from a file, with room for more steps."""
    if not isinstance(state, SMCState):
        state = reshaped(state, jax.eval_shape(lambda: first_state(settings, key)))
    had = {
        "num_particles": len(state.log_weights),
        "waste_free": len(state.log_weights) // state.coalescence.num,
    }
    for name, value in had.items():
        if value != getattr(settings, name):
            raise WeftError(
                f"smc: the run to be resumed has {name}={value}, this one {getattr(settings, name)}: they must be the "
                "same"
            )
    steps = settings.model.num_steps
    more = steps - state.path.ess.shape[0]
    if more < 0:
        raise WeftError(
            f"smc: the run to be resumed had {steps - more} steps, this model has {steps}"
        )
    if more and settings.model.closed:
        raise WeftError(
            "smc: this model has sites after its scan, which the run to be resumed has weighed already: begin anew"
        )
    has_all, has_tree = state.path.ancestors is not None, state.tree is not None
    kept = "full" if has_all else "ancestors" if has_tree else "none"
    if settings.history != kept:
        raise WeftError(
            f"smc: the run to be resumed has history={kept!r}, this one {settings.history!r}: they must be the same"
        )
    shapes = (
        jax.tree.map(lambda x: (x.shape[1:], x.dtype), state.particles),
        jax.eval_shape(settings.model.init, jax.random.key(0))[0],
    )
    if shapes[0] != jax.tree.map(lambda s: (s.shape, s.dtype), shapes[1]):
        raise ModelError("smc: the run to be resumed had particles of another structure")
    path = jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.zeros((more, *x.shape[1:]), x.dtype)]), state.path
    )
    # Generations from here on are those of this run's scheme.
    independent = settings.resample.independent
    coalescence = dataclasses.replace(state.coalescence, independent=independent)
    return dataclasses.replace(state, path=path, coalescence=coalescence)


def next_state(settings: Any, key: PRNGKeyArray, state: SMCState) -> SMCState:
    """One step: resample if due, rejuvenate, adapt, move, weigh, record."""
    n, t, model = settings.num_particles, state.iteration + 1, settings.model
    resample_key, rejuvenate_key, move_key = jax.random.split(key, 3)
    ess, shares, made_up_for = _preferred(settings, t, state)

    def again(state: SMCState) -> Any:
        parents = _generation(state).selected(
            settings.resample(resample_key, shares, num_chains(settings))
        )
        chosen = parents.ancestors
        # The derivative of a choice of particles (Scibior and Wood 2021).
        log_weights = _derivative_of(shares[chosen], chosen)
        if made_up_for is not None:
            log_weights = log_weights + made_up_for[chosen]
        particles, info = _moved(settings, rejuvenate_key, t, parents.particles)
        chosen, log_weights = (jnp.tile(x, settings.waste_free) for x in (chosen, log_weights))
        parents = Generation(particles, log_weights, chosen)
        return parents, state.coalescence.after(chosen), info

    def as_they_are(state: SMCState) -> Any:
        info = jax.tree.map(lambda x: jnp.zeros_like(x[0]), state.path.info)
        return _generation(state), state.coalescence, info

    # Where no particle is possible, or none that is preferred, there is none to choose.
    some = jnp.max(shares) > -jnp.inf
    due = some & ((ess <= settings.threshold * n) | (settings.threshold >= 1))
    parents, coalescence, info = jax.lax.cond(due, again, as_they_are, state)
    before = jnp.where(due, jnp.log(float(n)), state.log_total)
    particles = model.adapt(t, parents.particles, parents.log_weights)
    same_particles(model, "adapt", parents.particles, particles)
    parents = dataclasses.replace(parents, particles=particles)
    now = offspring(move_key, model, t, parents)
    coalescence = coalescence.at(t, now.log_weights, due)
    row, total = _record(settings, now, before, due, coalescence, info)
    path = jax.tree.map(lambda buffer, x: buffer.at[t].set(x), state.path, row)
    evidence = state.log_evidence + row.log_increments
    tree = None if state.tree is None else state.tree.grown(now.particles, now.ancestors)
    return SMCState(t, now.particles, now.log_weights, total, evidence, coalescence, path, tree)


def _preferred(settings: Any, t: Array, state: SMCState) -> tuple[Array, Array, Array | None]:
    """What resampling goes by: the effective sample size, the log shares, and the correction of weights, if any."""
    ess, shares = state.path.ess[state.iteration], state.log_weights - state.log_total

    def lookahead(particle: Any) -> Array | None:
        hint = settings.model.lookahead(t, particle)
        return None if hint is None else scalar(settings.model, "lookahead", hint)

    hints = jax.vmap(lookahead, axis_size=settings.num_particles)(state.particles)
    if hints is None:
        return ess, shares, None
    hints = jnp.where(jnp.isnan(hints), 0.0, hints)  # NaN is no preference
    _, total, ess = _weights(shares + hints)
    return ess, shares + hints - total, total - hints


def _moved(
    settings: Any, key: PRNGKeyArray, t: Array, particles: Any
) -> tuple[Any, dict[str, Array]]:
    """The particles after rejuvenation. With `waste_free`, all points of the chains that begin at them."""
    if settings.waste_free == 1:
        return _rejuvenated(settings, key, t, particles)

    def move(particles: Any, key: PRNGKeyArray) -> Any:
        particles, info = _rejuvenated(settings, key, t, particles)
        return particles, (particles, info)

    particles = jax.tree.map(lambda x: x[: num_chains(settings)], particles)
    keys = jax.random.split(key, settings.waste_free - 1)
    _, (chain, info) = jax.lax.scan(move, particles, keys)
    joined = jax.tree.map(
        lambda x, xs: jnp.concatenate([x[None], xs]).reshape(-1, *x.shape[1:]), particles, chain
    )
    return joined, jax.tree.map(lambda x: jnp.mean(x, 0), info)


def _rejuvenated(
    settings: Any, key: PRNGKeyArray, t: Array, particles: Any
) -> tuple[Any, dict[str, Array]]:
    """The particles and the report of the hook."""
    model = settings.model
    found = model.rejuvenate(key, t, particles, settings.rejuvenate)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        raise ModelError(
            f"smc: {called(model, 'rejuvenate')} must give the particles and a dict of scalars, got {in_words(found)}"
        )
    same_particles(model, "rejuvenate", particles, found[0])
    return found[0], jax.tree.map(jnp.asarray, found[1])


def _record(
    settings: Any, now: Generation, before: Any, due: Array, coalescence: Coalescence, info: Any
) -> tuple[History, Array]:
    """What is kept of one step, and the logarithm of the sum of the weights."""
    choices, full = shown(settings, now.particles), settings.history == "full"
    weights, total, ess = _weights(now.log_weights)
    known = keeps_lineage(settings.model)
    if settings.collect is None:
        collected = moments(choices, weights)
    else:
        collected = settings.collect(Particles(choices=choices, log_weights=now.log_weights))
    row = History(
        ess=ess,
        log_increments=jnp.where(total == -jnp.inf, -jnp.inf, total - before),
        resampled=due,
        num_ancestors=coalescence.num_ancestors if known else jnp.int32(0),
        since=coalescence.early.step,
        collected=collected,
        ancestors=now.ancestors if full else None,
        particles=now.particles if full else None,
        log_weights=now.log_weights if full else None,
        info=info,
        undefined=now.undefined,
    )
    return row, total


def shown(settings: Any, particles: Any) -> Any:
    """The choices of all particles, as a user sees them."""
    return jax.vmap(settings.model.choices, axis_size=settings.num_particles)(particles)


def num_chains(settings: Any) -> int:
    """The number of particles that are resampled: all, or with waste-free the number of chains."""
    return settings.num_particles // settings.waste_free


def keeps_lineage(model: FeynmanKac) -> bool:
    """Whether a particle that is not resampled descends from itself."""
    return model.keeps_lineage or not has(model, "adapt")


def _generation(state: SMCState) -> Generation:
    """The particles of a state. Each is its own ancestor."""
    return Generation(state.particles, state.log_weights, jnp.arange(len(state.log_weights)))


def with_tree_for(settings: Any, state: SMCState, num_iterations: int) -> SMCState:
    """A state whose tree has room for this many more steps."""
    if state.tree is None:
        return state
    capacity = state.tree.capacity + num_iterations * settings.num_particles
    return dataclasses.replace(state, tree=state.tree.roomier(capacity))


def with_pruned_tree(settings: Any, state: SMCState) -> tuple[SMCState, int | None]:
    """If no room is left, drop the nodes without descendants. If that frees little, double the room."""
    if state.tree is None:
        return state, None
    n, steps, tree = settings.num_particles, state.path.ess.shape[0], state.tree
    if int(tree.size) + n > tree.capacity:
        tree = pruned(tree)
        usual = steps + int(4 * n * (1 + np.log2(n)))
        wanted = max(usual, tree.capacity, 2 * int(tree.size) + n)
        tree = tree.roomier(min(wanted, n * steps))
    room = (tree.capacity - int(tree.size)) // n
    return dataclasses.replace(state, tree=tree), room


@eqx.filter_jit
def pruned(tree: AncestralTree) -> AncestralTree:
    """The tree without the nodes that have no descendants. The function is compiled."""
    return tree.pruned()


def _weights(log_weights: Array) -> tuple[Array, Array, Array]:
    """The normalised weights, the logarithm of their sum before normalisation, and their effective sample size."""
    largest = jax.lax.stop_gradient(jnp.max(log_weights))
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jnp.sum(weights)
    log_total = jnp.where(jnp.isfinite(largest), largest + jnp.log(total), largest)
    return weights / total, log_total, total**2 / jnp.sum(weights**2)


@jax.custom_jvp
def _derivative_of(x: Array, chosen: Array) -> Array:
    """Zeros with the derivative of `x`, one for each chosen particle."""
    # The zeros read `chosen`: in a cond, JAX loses the vmap axis of a constant with a custom derivative.
    return (0 * chosen).astype(x.dtype)


@_derivative_of.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _derivative_of(*primals), tangents[0]


def reshaped(leaves: Any, like: Any) -> Any:
    """Arrays of a state, as read from a file, in the structure of another."""
    templates, structure = jax.tree.flatten(like)
    same = (
        isinstance(leaves, tuple)
        and len(leaves) == len(templates)
        and all(
            x.dtype == y.dtype and x.ndim == y.ndim for x, y in zip(leaves, templates, strict=True)
        )
    )
    if not same:
        raise ModelError(
            "smc: the run to be resumed is one of another model, or of another history or collect"
        )
    return jax.tree.unflatten(structure, leaves)
