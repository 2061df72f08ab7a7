r"""Sequential Monte Carlo.

`N` particles go through a Feynman-Kac model. Before a step, if their weights have become too
uneven, they are resampled; then each moves, and its weight is multiplied by its potential:

    ess_t < c N:   A_t^i ~ resampling of W_{t-1},  w_{t-1}^i = 1;      else  A_t^i = i
    x_t^i ~ M_t( . | x_{t-1}^{A_t^i} ),     w_t^i = w_{t-1}^i G_t(x_{t-1}^{A_t^i}, x_t^i)

The product over `t` of `sum_i w_t^i / sum_i w_{t-1}^i` estimates the evidence without bias (Del Moral
2004; Chopin and Papaspiliopoulos 2020, algorithm 10.3).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from weft.inference.resampling import Resampling, as_scheme, systematic
from weft.inference.results import storage
from weft.inference.results.particles import Particles
from weft.inference.run.algorithm import Algorithm, State
from weft.inference.run.runner import tracing
from weft.ppl import Target, gen
from weft.ppl.stage.errors import DensityError, ModelError, WeftError

from .ancestral_tree import AncestralTree
from .coalescence import Coalescence
from .feynman_kac import FeynmanKac

FEW_ANCESTORS = 10
"""So many are too few to tell a variance from."""


class Path(eqx.Module):
    """What is known of every step.

    Attributes:
        ess: effective sample size of the weights after each step.
        log_increments: by how much each step raised the log evidence.
        resampled: whether the particles were resampled before the step.
        num_ancestors: from how many particles of the step `since` those of the step descend.
        since: an earlier step, the first one as long as many of its particles have descendants; see
            `weft.inference.coalescence`.
        collected: what `collect` gave, `(step, ...)`.
        tree: the particles that have descendants among the last ones; of `history="ancestors"`.
        ancestors: `(step, particle)`, which particle of the step before each descends from; `None`
            without the full history.
        particles: `(step, particle, ...)`; `None` without the full history.
        log_weights: the same of their weights.
        info: what rejuvenation had to say, `(step,)` each; zeros where there was none.
    """

    ess: Float[Array, " step"]
    log_increments: Float[Array, " step"]
    resampled: Bool[Array, " step"]
    num_ancestors: Int[Array, " step"]
    since: Int[Array, " step"]
    collected: Any
    tree: AncestralTree | None = None
    ancestors: Int[Array, "step particle"] | None = None
    particles: Any = None
    log_weights: Float[Array, "step particle"] | None = None
    info: dict[str, Array] = eqx.field(default_factory=dict)


@storage.result_type("sequential particles")
class SequentialParticles(Particles):
    """The particles of the last step, and how they came about.

    Attributes:
        path: what is known of every step.
        state: where the run stands, for `resume=`; its arrays in order, if the result was read from a file.
        remark: what the model has to say of the run.
    """

    path: Path | None = None
    state: Any = None
    remark: str | None = eqx.field(static=True, default=None)

    def along(self, tree: Any) -> Any:
        """What arrays (step, particle, ...) hold along the paths that end in the last particles: (particle, step, ...).

        Args:
            tree: for instance `path.particles`.

        Raises:
            WeftError: if the run did not keep all ancestors.
        """
        if self.path is None or self.path.ancestors is None:
            raise WeftError("this run did not keep all ancestors: smc(..., history='full')")
        return _along(self.path.ancestors, tree)

    def _saved(self) -> dict[str, Any]:
        path, state = self.path, self.state
        if path is not None and isinstance(state, SMCState):
            # The same arrays, which are written once, without the steps that are still to come.
            state = dataclasses.replace(state, path=dataclasses.replace(path, tree=None))
        leaves = None if state is None else tuple(jax.tree.leaves(state))
        parts = {"path": _plain(path), "state": leaves, "remark": self.remark}
        return {**super()._saved(), **parts}

    @classmethod
    def from_saved(cls, saved: storage.Saved, target: Any = None) -> Self:
        """Rebuild from what `storage.read` gives; modules in particles and in what was collected come as dicts."""
        path = saved.tree["path"]
        if path is not None:
            tree = path["tree"] and AncestralTree(**path["tree"])
            path = Path(**{**path, "tree": tree})
        saved = saved._replace(tree={**saved.tree, "path": path})
        return super().from_saved(saved, target)

    def _title(self) -> str:
        title = super()._title()
        if self.path is None or tracing(self.path):
            return title
        ess, worst = np.asarray(self.path.ess), int(np.argmin(self.path.ess))
        times, fewest = int(np.sum(self.path.resampled)), int(np.min(self.path.num_ancestors))
        roots, since = int(self.path.num_ancestors[-1]), int(self.path.since[-1])
        lines = [
            title,
            f"{ess.size} steps, resampled before {times}; smallest effective sample size {ess[worst]:.3g} (step "
            f"{worst}); the last particles descend from {roots} of those of step {since}",
        ]
        if fewest < FEW_ANCESTORS:
            step = int(np.argmin(self.path.num_ancestors))
            lines.append(
                f"Those of step {step} descend from {fewest} of those of step {int(self.path.since[step])}: too few "
                "for the standard error, which may be far too small, to be trusted."
            )
        if self.path.info:
            moved = np.asarray(self.path.resampled)
            shown = (f"{k} {np.asarray(v)[moved].mean():.3g}" for k, v in self.path.info.items())
            lines.append(f"Moves after resampling, on average: {', '.join(shown)}")
        if ess[worst] < max(10.0, 0.01 * self.num_particles):
            lines.append(
                f"The run degenerated at step {worst}: take more particles, or a better proposal there."
            )
        if self.remark is not None:
            lines.append(self.remark)
        return "\n".join(lines)


class SMCState(State):
    """Particles on their way.

    Attributes:
        iteration: steps done; the first particles are no step.
        particles: `(particle, ...)`.
        log_weights: unnormalised, since they were resampled.
        log_total: logarithm of their sum.
        log_evidence: so far.
        coalescence: which earlier particles they descend from.
        path: buffers of what is known of every step.
        tree: those that have descendants.
    """

    iteration: Int[Array, ""]
    particles: Any
    log_weights: Float[Array, " particle"]
    log_total: Float[Array, ""]
    log_evidence: Float[Array, ""]
    coalescence: Coalescence
    path: Path
    tree: AncestralTree | None = None


class smc(Algorithm):
    """Sequential Monte Carlo for a Feynman-Kac model.

    Attributes:
        model: a `FeynmanKac` model; or a function from a target to one.
        num_particles: `N`.
        resample: a resampling scheme: `systematic`, `stratified`, `multinomial`, `residual`, `ssp` or
            `killing`.
        threshold: particles are resampled when the effective sample size falls below this share of
            their number: 1 for always, 0 for never.
        history: what is kept of past steps: `"none"`; `"ancestors"`, the particles from which the last ones descend,
            so that these are whole paths; or `"full"`, all particles.
        collect: a function of the weighted particles after each step, whose values are kept; by default the
            weighted mean and standard deviation of everything floating.
        rejuvenate: a kernel, or a function from the weighted particles to one, by which particles move after each
            resampling, for models that say what the law is that it leaves as it is (`tempering`).
        waste_free: instead of one particle after several moves, keep all of `waste_free` points of such a chain: one
            in `waste_free` particles is resampled.

    Raises:
        DensityError: if all weights are zero after some step, or one is infinite or no number.
        ModelError: if a step changes the structure, shapes or dtypes of a particle.

    References:
        Del Moral (2004); Chopin and Papaspiliopoulos (2020), "An introduction to sequential Monte Carlo"; Lee and
        Whiteley (2018) for the variance of the evidence; Dau and Chopin (2022) for waste-free.

    Examples:
        >>> import equinox as eqx, jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft.inference import smc
        >>> class RandomWalk(eqx.Module):  # seen with unit noise
        ...     y: jax.Array
        ...     @property
        ...     def num_steps(self):
        ...         return len(self.y)
        ...     def init(self, key):
        ...         return self.weigh(0, jax.random.normal(key))
        ...     def step(self, key, t, x):
        ...         return self.weigh(t, x + jax.random.normal(key))
        ...     def weigh(self, t, x):
        ...         return x, dist.Normal(x, 1.0).log_prob(self.y[t])
        >>> found = smc(RandomWalk(jnp.array([0.5, 1.0])), 10_000).run(jax.random.key(0), progress=False)
        >>> print(f"{found.log_evidence:.1f}")  # exactly -2.79
        -2.8
    """

    model: FeynmanKac | Callable[[Target], FeynmanKac]
    num_particles: int = 1000
    resample: Resampling = eqx.field(converter=as_scheme, default=systematic)
    threshold: float = 0.5
    history: str = eqx.field(static=True, default="none")
    collect: Callable[[Particles], Any] | None = None
    rejuvenate: Any = None
    waste_free: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        n = self.num_particles
        if not isinstance(n, (int, np.integer)) or n < 2:
            raise WeftError(f"smc: num_particles must be an integer, 2 at least, got {n!r}")
        if isinstance(self.threshold, (int, float)) and not 0 <= self.threshold <= 1:
            raise WeftError(f"smc: threshold is a share between 0 and 1, got {self.threshold!r}")
        if self.history not in ("none", "ancestors", "full"):
            raise WeftError(f"smc: history is 'none', 'ancestors' or 'full', got {self.history!r}")
        if n % self.waste_free or n // self.waste_free < 2:
            raise WeftError(
                f"smc: waste_free={self.waste_free} must divide num_particles={n}, and leave 2 to be resampled"
            )
        if not _is_model(self.model) and not callable(self.model):
            raise TypeError(
                f"smc: expected a Feynman-Kac model (num_steps, init(key), step(key, t, particle)), got "
                f"{type(self.model).__name__}"
            )

    def run(
        self,
        key: PRNGKeyArray,
        target: Target | None = None,
        *,
        init: Any = None,
        resume: SequentialParticles | None = None,
        progress: bool = True,
    ) -> SequentialParticles:
        """Run the particles through the model.

        Args:
            key: a random key.
            target: what a model made from a target is made of; a model that stands for itself needs none.
            init: nothing: the model has its own first particles.
            resume: a result for fewer steps of the same model, say fewer observations: it is gone on with. With the key
                of its run, the outcome is that of one run over all steps.
            progress: whether to show a progress bar.

        Returns:
            The particles of the last step, with the log evidence and its variance, and the path.
        """
        if target is None:
            if not _is_model(self.model):
                raise TypeError("smc: this model is made from a target: run(key, target)")
            target = nothing().given()
        if init is not None:
            raise WeftError("smc has no starting point: its model has first particles")
        if resume is not None and getattr(resume, "state", None) is None:
            raise WeftError("smc: only a result of smc itself can be gone on with")
        state = None if resume is None else resume.state
        return super().run(key, target, init=state, progress=progress)

    def prepare(self, target: Target) -> Algorithm:
        model: Any = self._made(target)
        if model.num_steps < 1:
            raise WeftError("smc: the model has no step")
        if not hasattr(model, "rejuvenate") and (
            self.rejuvenate is not None or self.waste_free > 1
        ):
            raise WeftError(
                f"smc: {type(model).__name__} does not say which law its particles have, so that nothing can "
                "rejuvenate them: leave out rejuvenate and waste_free, or give the model a method "
                "rejuvenate(key, t, particles, kernel)"
            )
        if hasattr(model, "engine"):
            return model.engine(self)
        _check_particle(model)
        return dataclasses.replace(self, model=model)

    def _made(self, target: Target) -> FeynmanKac:
        """The model, made from the target if it has to be."""
        model: Any = self.model
        return model if _is_model(model) else model(target)

    def num_iterations(self, target: Target) -> int:
        return self._made(target).num_steps - 1

    def init(self, key: PRNGKeyArray, target: Target, init: Any = None) -> SMCState:
        n, steps = self.num_particles, self._model.num_steps
        if init is not None:
            if not isinstance(init, SMCState):  # read from a file, which knows leaves
                init = reshaped(init, jax.eval_shape(lambda: self.init(key, target)))
            return self._extended(init, steps)
        particles, log_weights = jax.vmap(self._model.init)(_keys(key, n))
        particles = jax.tree.map(jnp.asarray, particles)
        coalescence = Coalescence.begin(n, self._num_chains, self.resample.independent)
        zero = jnp.int32(0)
        info = jax.eval_shape(lambda: self._moved(key, zero, particles)[1])
        info = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), info)
        first, total = self._seen(
            particles, log_weights, jnp.log(float(n)), zero > 0, coalescence, jnp.arange(n), info
        )
        path = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype).at[0].set(x), first)
        evidence = path.log_increments[0]
        tree = AncestralTree.begin(particles, n) if self.history == "ancestors" else None
        return SMCState(zero, particles, log_weights, total, evidence, coalescence, path, tree)

    def _extended(self, state: SMCState, steps: int) -> SMCState:
        """A state with room for more steps."""
        more = steps - state.path.ess.shape[0]
        if more < 0:
            raise WeftError(
                f"smc: the run to be resumed had {steps - more} steps, this model has {steps}"
            )
        if more and getattr(self._model, "closed", False):
            raise WeftError(
                "smc: this model has sites after its scan, which the run to be resumed has weighed already: begin anew"
            )
        has_all, has_tree = state.path.ancestors is not None, state.tree is not None
        kept = "full" if has_all else "ancestors" if has_tree else "none"
        if self.history != kept:
            raise WeftError(
                f"smc: the run to be resumed has history={kept!r}, this one {self.history!r}: they must be the same"
            )
        shapes = (
            jax.tree.map(lambda x: (x.shape[1:], x.dtype), state.particles),
            jax.eval_shape(self._model.init, jax.random.key(0))[0],
        )
        if shapes[0] != jax.tree.map(lambda s: (s.shape, s.dtype), shapes[1]):
            raise ModelError("smc: the run to be resumed had particles of another structure")
        path = jax.tree.map(
            lambda x: jnp.concatenate([x, jnp.zeros((more, *x.shape[1:]), x.dtype)]), state.path
        )
        return dataclasses.replace(state, path=path)

    def step(self, key: PRNGKeyArray, state: SMCState, target: Target) -> SMCState:
        n, m, t = self.num_particles, self._num_chains, state.iteration + 1
        model: Any = self._model
        resample_key, rejuvenate_key, move_key = jax.random.split(key, 3)

        ess, shares = state.path.ess[state.iteration], state.log_weights - state.log_total
        made_up_for = None
        if hasattr(model, "lookahead"):
            hints = jax.vmap(model.lookahead, (None, 0))(t, state.particles)
            total, ess = _total_and_ess(shares + hints)
            shares, made_up_for = shares + hints - total, total - hints

        def again(state: SMCState) -> Any:
            chosen = self.resample(resample_key, shares, m)
            particles = jax.tree.map(lambda x: x[chosen], state.particles)
            # The derivative of a choice of particles (Scibior and Wood 2021).
            log_weights = _derivative_of(shares[chosen])
            if made_up_for is not None:
                log_weights = log_weights + made_up_for[chosen]
            particles, info = self._moved(rejuvenate_key, t, particles)
            repeated = n // m
            chosen, log_weights = jnp.tile(chosen, repeated), jnp.tile(log_weights, repeated)
            return particles, log_weights, state.coalescence.after(chosen), chosen, info

        def as_they_are(state: SMCState) -> Any:
            info = jax.tree.map(lambda x: jnp.zeros_like(x[0]), state.path.info)
            return state.particles, state.log_weights, state.coalescence, jnp.arange(n), info

        due = (ess <= self.threshold * n) | (self.threshold >= 1)
        particles, log_weights, coalescence, chosen, info = jax.lax.cond(
            due, again, as_they_are, state
        )
        before = jnp.where(due, jnp.log(float(n)), state.log_total)
        if hasattr(model, "adapt"):
            particles = model.adapt(t, particles, log_weights)
        particles, potentials = jax.vmap(model.step, (0, None, 0))(_keys(move_key, n), t, particles)
        log_weights = log_weights + potentials
        coalescence = coalescence.at(t, log_weights, due)
        now, total = self._seen(particles, log_weights, before, due, coalescence, chosen, info)
        path = jax.tree.map(lambda buffer, x: buffer.at[t].set(x), state.path, now)
        log_evidence = state.log_evidence + now.log_increments
        tree = None if state.tree is None else state.tree.grown(particles, chosen)
        return SMCState(t, particles, log_weights, total, log_evidence, coalescence, path, tree)

    def reserve(self, state: SMCState, num_iterations: int) -> SMCState:
        if state.tree is None:
            return state
        capacity = state.tree.capacity + num_iterations * self.num_particles
        return dataclasses.replace(state, tree=state.tree.roomier(capacity))

    def before_chunk(self, state: SMCState) -> tuple[SMCState, int | None]:
        """When there is no room left, nodes without descendants are dropped; where that gives little, it is doubled."""
        if state.tree is None:
            return state, None
        n, steps, tree = self.num_particles, state.path.ess.shape[0], state.tree
        if int(tree.size) + n > tree.capacity:
            tree = _pruned(tree)
            usual = steps + int(4 * n * (1 + np.log2(n)))
            wanted = max(usual, tree.capacity, 2 * int(tree.size) + n)
            tree = tree.roomier(min(wanted, n * steps))
        room = (tree.capacity - int(tree.size)) // n
        return dataclasses.replace(state, tree=tree), room

    @property
    def _num_chains(self) -> int:
        """How many particles are resampled: all, unless none is wasted of the chains that begin at them."""
        return self.num_particles // self.waste_free

    def _moved(self, key: PRNGKeyArray, t: Array, particles: Any) -> tuple[Any, dict[str, Array]]:
        """Particles after rejuvenation, if the model knows how; all of each chain, if none is to be wasted."""
        model: Any = self._model
        if not hasattr(model, "rejuvenate"):
            return particles, {}
        if self.waste_free == 1:
            return model.rejuvenate(key, t, particles, self.rejuvenate)

        def move(particles: Any, key: PRNGKeyArray) -> Any:
            particles, info = model.rejuvenate(key, t, particles, self.rejuvenate)
            return particles, (particles, info)

        particles = jax.tree.map(lambda x: x[: self._num_chains], particles)
        keys = jax.random.split(key, self.waste_free - 1)
        _, (chain, info) = jax.lax.scan(move, particles, keys)
        joined = jax.tree.map(
            lambda x, xs: jnp.concatenate([x[None], xs]).reshape(-1, *x.shape[1:]), particles, chain
        )
        return joined, jax.tree.map(lambda x: jnp.mean(x, 0), info)

    def finished(self, state: SMCState) -> Any:
        model: Any = self._model
        return model.finished(state.particles) if hasattr(model, "finished") else None

    def has_result(self, iteration: int) -> bool:
        return True

    def describe(self, state: SMCState) -> str:
        return f"log evidence {float(state.log_evidence):.5g}, ess {float(state.path.ess[state.iteration]):.3g}"

    def result(self, state: SMCState, target: Target) -> SequentialParticles:
        path = state.path
        if not tracing(state):
            done = int(state.iteration) + 1
            path = jax.tree.map(lambda x: x[:done], path)
            self._check_weights(path)
            if state.tree is not None:
                tree = _pruned(state.tree)
                state = dataclasses.replace(state, tree=tree.roomier(int(tree.size)))
        model: Any = self._model
        remark = None
        if hasattr(model, "remark") and not tracing(state):
            remark = model.remark(state.particles)
        if remark is not None:
            warnings.warn(f"smc: {remark}", stacklevel=4)
        if self.history != "none" and hasattr(model, "paths"):
            along = (
                _along(path.ancestors, path.particles)
                if state.tree is None
                else state.tree.paths(path.ess.shape[0])
            )
            choices = model.paths(state.particles, along)
        else:
            choices = self._choices(state.particles)
        if not isinstance(choices, dict):
            choices = {"state": choices} if eqx.is_array(choices) else dict(_leaves(choices))
        return SequentialParticles(
            choices=choices,
            log_weights=state.log_weights,
            log_evidence=state.log_evidence,
            log_evidence_variance=state.coalescence.variance(state.log_weights),
            target=target if target.latents else None,
            path=dataclasses.replace(path, tree=state.tree),
            state=state,
            remark=remark,
        )

    # --- inside a program: see `staged` ---

    def draw_posterior(self, target: Target) -> tuple[dict[str, Any], Array, Array]:
        """A path by its weight, as a part of a program: `(choices, log_density, log_evidence)`."""
        from .staged import draw_path

        return draw_path(self._filter(target), target, self.num_particles)

    def conditional_evidence(
        self, target: Target, choices: dict[str, Any], log_density: Array
    ) -> Array:
        """The log evidence of a run around a path that is known: conditional SMC."""
        from .staged import evidence_around

        return evidence_around(self._filter(target), choices, self.num_particles)

    def _filter(self, target: Target) -> Any:
        from .filtering import Filter

        model = self._made(target)
        if hasattr(model, "engine"):
            raise WeftError(
                f"smc inside a program (by=smc(...)) filters one series, and those of {target.program.name!r} stand "
                "under a vmap: normalize a model of one, inside the vmap of the program around it"
            )
        if not isinstance(model, Filter):
            raise WeftError(
                f"smc inside a program (by=smc(...)) takes filtering(...), whose steps are programs; "
                f"{type(model).__name__} draws by keys"
            )
        return model

    def _choices(self, particles: Any) -> Any:
        model: Any = self._model
        if not hasattr(model, "choices"):
            return particles
        return jax.vmap(model.choices, axis_size=self.num_particles)(particles)

    @property
    def _model(self) -> FeynmanKac:
        model: Any = self.model
        return model

    def _seen(
        self,
        particles: Any,
        log_weights: Array,
        before: Any,
        due: Array,
        coalescence: Coalescence,
        chosen: Array,
        info: dict[str, Array],
    ) -> tuple[Path, Array]:
        """What is kept of one step, and the logarithm of the sum of the weights."""
        weighted = Particles(choices=self._choices(particles), log_weights=log_weights)
        full = self.history == "full"
        total, ess = _total_and_ess(log_weights)
        path = Path(
            ess=ess,
            log_increments=total - before,
            resampled=due,
            num_ancestors=coalescence.num_ancestors,
            since=coalescence.early.step,
            collected=moments(weighted) if self.collect is None else self.collect(weighted),
            ancestors=chosen if full else None,
            particles=particles if full else None,
            log_weights=log_weights if full else None,
            info=info,
        )
        return path, total

    def _check_weights(self, path: Path) -> None:
        increments = np.asarray(path.log_increments)
        bad = np.flatnonzero(~np.isfinite(increments))
        if bad.size:
            t, value = int(bad[0]), increments[bad[0]]
            what = (
                "all weights are zero: no particle can be where the potential is positive"
                if value == -np.inf
                else f"a weight is infinite or no number (the log evidence changes by {value})"
            )
            model: Any = self._model
            seen = f" (there: {model.observation(t)})" if hasattr(model, "observation") else ""
            raise DensityError(
                f"smc: at step {t}, {what}{seen}. Take more particles or a proposal that knows what is observed there; "
                f"the {t} steps before it are fine"
            )


@eqx.filter_jit
def _pruned(tree: AncestralTree) -> AncestralTree:
    return tree.pruned()


def lineage(
    last: Int[Array, "*n"], ancestors: Int[Array, "step particle"]
) -> Int[Array, "step *n"]:
    """Which particles of each step those of the last one descend from, themselves at the end."""

    def back(index: Array, chosen: Array) -> Any:
        return chosen[index], index

    return jax.lax.scan(back, last, ancestors, reverse=True)[1]


def _along(ancestors: Any, tree: Any) -> Any:
    indices = lineage(jnp.arange(ancestors.shape[1]), ancestors)

    def one(x: Array) -> Array:
        taken = jax.vmap(lambda row, index: row[index])(x, indices)
        return jnp.swapaxes(taken, 0, 1)

    return jax.tree.map(one, tree)


def moments(particles: Particles) -> Any:
    """Weighted mean and standard deviation of everything floating in the particles."""
    weights = particles.weights

    def one(x: Array) -> dict[str, Array]:
        w = weights.reshape(-1, *(1,) * (x.ndim - 1))
        mean = jnp.sum(w * x, 0)
        return {"mean": mean, "sd": jnp.sqrt(jnp.sum(w * (x - mean) ** 2, 0))}

    floating = eqx.filter(particles.choices, eqx.is_inexact_array)
    return jax.tree.map(one, floating)


def _leaves(tree: Any) -> list[tuple[str, Array]]:
    """The leaves of a particle that is no dict, by their paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path).strip(".[]'"), x) for path, x in flat]


def _keys(key: PRNGKeyArray, num: int) -> PRNGKeyArray:
    """A key for each particle.

    Threefry is a keyed permutation of counters: different keys give independent streams, also when they are consecutive
    (Salmon et al. 2011). So they are counted on from `key`, which saves one of three hashes that a draw costs.
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.split(key, num)
    high, low = jax.random.key_data(key)
    words = jnp.stack(jnp.broadcast_arrays(high, low + jnp.arange(num, dtype=low.dtype)), 1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _total_and_ess(log_weights: Array) -> tuple[Array, Array]:
    """Logarithm of the sum of weights, and their effective sample size."""
    largest = jax.lax.stop_gradient(jnp.max(log_weights))
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jnp.sum(weights)
    log_total = jnp.where(jnp.isfinite(largest), largest + jnp.log(total), largest)
    return log_total, total**2 / jnp.sum(weights**2)


@jax.custom_jvp
def _derivative_of(x: Array) -> Array:
    """Zero, with the derivative of `x`."""
    return _zero(x)


def _zero(x: Array) -> Array:
    """Zeros that read `x`: within a cond, JAX loses the axis of a vmap of a constant with a custom derivative."""
    return jnp.where(jnp.isnan(x), 0.0, jnp.zeros_like(x))


@_derivative_of.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _zero(primals[0]), tangents[0]


def _plain(tree: Any) -> Any:
    """Modules as dicts of their fields, for a file."""
    if isinstance(tree, eqx.Module):
        return {name: _plain(x) for name, x in vars(tree).items()}
    if isinstance(tree, dict):
        return {name: _plain(x) for name, x in tree.items()}
    return type(tree)(map(_plain, tree)) if type(tree) in (list, tuple) else tree


def reshaped(leaves: Sequence[Array], like: Any) -> Any:
    """Arrays of a state in the structure of another."""
    templates, structure = jax.tree.flatten(like)
    same = len(leaves) == len(templates) and all(
        x.dtype == y.dtype and x.ndim == y.ndim for x, y in zip(leaves, templates, strict=True)
    )
    if not same:
        raise ModelError(
            "smc: the run that was read is one of another model, or of another history or collect"
        )
    return jax.tree.unflatten(structure, leaves)


def _is_model(x: Any) -> bool:
    return isinstance(x, FeynmanKac) or hasattr(x, "engine")


def _check_particle(model: FeynmanKac) -> None:
    key = jax.eval_shape(lambda: jax.random.key(0))
    first = jax.eval_shape(model.init, key)
    then = jax.eval_shape(model.step, key, jnp.int32(1), first[0])
    for name, (_, weight) in (("init", first), ("step", then)):
        if weight.shape != ():
            raise ModelError(
                f"smc: {name} must give the logarithm of one potential, a scalar; got shape {weight.shape}"
            )
    a, b = (jax.tree.map(lambda s: (s.shape, s.dtype), p) for p in (first[0], then[0]))
    if a != b:
        raise ModelError(
            f"smc: a step changes the particle: init gives {a}, step gives {b}. Both must have the same structure, "
            "shapes and dtypes"
        )


@gen
def nothing() -> None:
    """A program without choices, for models that need no target."""
