"""Sequential Monte Carlo.

`N` particles go through a Feynman-Kac model. If their weights have become too uneven before a step, they are resampled.
Then each moves, and its weight is multiplied by its potential:

    ess_t < c N:   A_t^i ~ resampling of W_{t-1},  w_{t-1}^i = 1;      else  A_t^i = i
    x_t^i ~ M_t( . | x_{t-1}^{A_t^i} ),     w_t^i = w_{t-1}^i G_t(x_{t-1}^{A_t^i}, x_t^i)

The product over `t` of `sum_i w_t^i / sum_i w_{t-1}^i` estimates the evidence without bias (Del Moral 2004; Chopin and
Papaspiliopoulos 2020, algorithm 10.3).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from weft.inference.resampling import Resampling, as_scheme, systematic
from weft.inference.results.particles import Particles
from weft.inference.run.algorithm import Algorithm
from weft.inference.run.runner import tracing
from weft.ppl import Target, gen
from weft.ppl.stage.errors import DensityError, WeftError

from .engine import (
    SMCState,
    first_state,
    keeps_lineage,
    next_state,
    pruned,
    resumed,
    shown,
    with_pruned_tree,
    with_tree_for,
)
from .feynman_kac import FeynmanKac, as_model, has, require_model, require_steps
from .history import History, along_lineages
from .results import SequentialParticles
from .returned import scalar


class smc(Algorithm):
    """Sequential Monte Carlo for a Feynman-Kac model.

    A potential that is NaN counts as zero. The printed result says how many there were.

    Attributes:
        model: a `FeynmanKac` model, or an Equinox module with its methods; or a function from a target to one.
        num_particles: `N`.
        resample: a resampling scheme: `systematic`, `stratified`, `multinomial`, `residual`, `ssp` or `killing`; a
            `Resampling` of your own; or a plain function, whose draws are not assumed to be independent.
        threshold: particles are resampled when the effective sample size falls below this share of their number. 1
            means always, 0 never.
        history: what is kept of past steps: `"none"`; `"ancestors"`, the particles from which the last ones descend, so
            that these are whole paths; or `"full"`, all particles.
        collect: a function of the weighted particles after each step. Its values are kept. By default it gives the
            weighted mean and standard deviation of all floating values.
        rejuvenate: a kernel, or a function from the weighted particles to one. Particles move by it after each
            resampling. It is for models that state the law it leaves invariant (`tempering`).
        waste_free: keep all `waste_free` points of a chain of moves, instead of one particle after several moves. One
            in `waste_free` particles is resampled.

    Raises:
        DensityError: if all weights are zero after some step, or one is infinite.
        ModelError: if a step changes the structure, shapes or dtypes of a particle.
        TypeError: if the model is not a Feynman-Kac model.

    References:
        Del Moral (2004); Chopin and Papaspiliopoulos (2020), "An introduction to sequential Monte Carlo"; Lee and
        Whiteley (2018) for the variance of the evidence; Dau and Chopin (2022) for waste-free.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft.inference import FeynmanKac, smc
        >>> class RandomWalk(FeynmanKac):  # seen with unit noise
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

    model: FeynmanKac | Callable[[Target], FeynmanKac] = eqx.field(converter=as_model)
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
            raise WeftError(f"smc: num_particles must be an integer, at least 2, got {n!r}")
        share = self.threshold
        if not eqx.is_array(share) and not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise WeftError(f"smc: threshold is a share between 0 and 1, got {share!r}")
        if self.history not in ("none", "ancestors", "full"):
            raise WeftError(f"smc: history is 'none', 'ancestors' or 'full', got {self.history!r}")
        if n % self.waste_free or n // self.waste_free < 2:
            raise WeftError(
                f"smc: waste_free={self.waste_free} must divide num_particles={n}, and leave 2 to be resampled"
            )
        if not callable(self.model):
            require_model(self.model, "smc")

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
            target: the target from which the model is made. A model that stands for itself needs none.
            init: must be None: the model has its own first particles.
            resume: a result for fewer steps of the same model, say fewer observations. The run continues from it. With
                the key of that run, the outcome is that of a single run over all steps.
            progress: whether to show a progress bar.

        Returns:
            The particles of the last step, with the log evidence and its variance, and the path.
        """
        if target is None:
            if not isinstance(self.model, FeynmanKac):
                raise TypeError("smc: this model is made from a target: run(key, target)")
            target = nothing().given()
        if init is not None:
            raise WeftError("smc has no starting point: its model has first particles")
        if resume is not None and getattr(resume, "state", None) is None:
            raise WeftError("smc: resume= takes a result of smc, to be continued")
        state = None if resume is None else resume.state
        return super().run(key, target, init=state, progress=progress)

    def prepare(self, target: Target) -> Algorithm:
        model = self._made(target)
        require_steps(model)
        if not has(model, "rejuvenate") and (self.rejuvenate is not None or self.waste_free > 1):
            raise WeftError(
                f"smc: {type(model).__name__} does not say which law its particles have, so that nothing can "
                "rejuvenate them: leave out rejuvenate and waste_free, or give the model a method "
                "rejuvenate(key, t, particles, kernel)"
            )
        if self.history != "none" and not keeps_lineage(model):
            raise WeftError(
                f"smc: history={self.history!r} keeps ancestors, and adapt of {type(model).__name__} may replace "
                "particles by others. If it leaves each a descendant of itself, set keeps_lineage = True in the "
                "model; else leave out history"
            )
        return model.engine(self)

    def traced(self) -> Self:
        # Numbers among the fields of a model stay Python numbers, so that its methods may branch on them.
        return dataclasses.replace(super().traced(), model=self.model)

    def _made(self, target: Target) -> FeynmanKac:
        """The model. It is made from the target if necessary."""
        if isinstance(self.model, FeynmanKac):
            return self.model
        model = as_model(self.model(target))
        require_model(model, f"smc: the model that {_name(self.model)} makes of a target")
        return model

    @property
    def _model(self) -> FeynmanKac:
        model: Any = self.model
        return model

    def num_iterations(self, target: Target) -> int:
        return self._made(target).num_steps - 1

    # --- one run ---

    def init(self, key: PRNGKeyArray, target: Target, init: Any = None) -> SMCState:
        return first_state(self, key) if init is None else resumed(self, key, init)

    def step(self, key: PRNGKeyArray, state: SMCState, target: Target) -> SMCState:
        return next_state(self, key, state)

    def reserve(self, state: SMCState, num_iterations: int) -> SMCState:
        return with_tree_for(self, state, num_iterations)

    def before_chunk(self, state: SMCState) -> tuple[SMCState, int | None]:
        return with_pruned_tree(self, state)

    def finished(self, state: SMCState) -> Any:
        found = self._model.finished(state.particles)
        return None if found is None else scalar(self._model, "finished", found) != 0

    def has_result(self, iteration: int) -> bool:
        return True

    def describe(self, state: SMCState) -> str:
        return f"log evidence {float(state.log_evidence):.5g}, ess {float(state.path.ess[state.iteration]):.3g}"

    def result(self, state: SMCState, target: Target) -> SequentialParticles:
        path, remark = state.path, None
        if not tracing(state):
            done = int(state.iteration) + 1
            path = jax.tree.map(lambda x: x[:done], path)
            self._check_weights(path)
            if state.tree is not None:
                tree = pruned(state.tree)
                state = dataclasses.replace(state, tree=tree.roomier(int(tree.size)))
            remark = self._model.remark(state.particles)
        if remark is not None:
            warnings.warn(f"smc: {remark}", stacklevel=4)
        variance = state.coalescence.variance(state.log_weights)
        return SequentialParticles(
            choices=self._shown(state, path),
            log_weights=state.log_weights,
            log_evidence=state.log_evidence,
            log_evidence_variance=variance if keeps_lineage(self._model) else variance * jnp.nan,
            target=target if target.latents else None,
            path=dataclasses.replace(path, tree=state.tree),
            state=state,
            remark=remark,
        )

    def _shown(self, state: SMCState, path: History) -> dict[str, Any]:
        """The choices of the last particles, or of the paths to them if the run kept these."""
        if self.history == "none" or not has(self._model, "paths"):
            choices = shown(self, state.particles)
        elif state.tree is not None:
            choices = self._model.paths(state.particles, state.tree.paths(path.ess.shape[0]))
        else:
            assert path.ancestors is not None
            along = along_lineages(path.ancestors, path.particles)
            choices = self._model.paths(state.particles, along)
        if isinstance(choices, dict):
            return choices
        return {"state": choices} if eqx.is_array(choices) else dict(_leaves(choices))

    def _check_weights(self, path: History) -> None:
        increments = np.asarray(path.log_increments)
        bad = np.flatnonzero(~np.isfinite(increments))
        if not bad.size:
            return
        t, value = int(bad[0]), increments[bad[0]]
        what = f"a weight is infinite or no number (the log evidence changes by {value})"
        if value == -np.inf:
            what = "all weights are zero: no particle can be where the potential is positive"
            undefined = 0 if path.undefined is None else int(path.undefined[t])
            if undefined:
                what += f"; {undefined} potentials are NaN, which counts as zero"
        observed = self._model.observation(t)
        seen = f" (there: {observed})" if observed else ""
        raise DensityError(
            f"smc: at step {t}, {what}{seen}. Take more particles or a proposal that knows what is observed there; "
            f"the {t} steps before it are fine"
        )

    # --- inside a program: see `staged` ---

    def draw_posterior(self, target: Target) -> tuple[dict[str, Any], Array, Array]:
        """Inside a program: a path drawn by its weight, `(choices, log_density, log_evidence)`."""
        return self._made(target).draw_posterior(target, self.num_particles)

    def conditional_evidence(
        self, target: Target, choices: dict[str, Any], log_density: Array
    ) -> Array:
        """The log evidence of a run around a known path: conditional SMC."""
        return self._made(target).conditional_evidence(target, choices, self.num_particles)


def _name(f: Any) -> str:
    return getattr(f, "__name__", type(f).__name__)


def _leaves(tree: Any) -> list[tuple[str, Array]]:
    """The leaves of a particle that is not a dict, by their paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path).strip(".[]'"), x) for path, x in flat]


@gen
def nothing() -> None:
    """A program without choices, for models that need no target."""
