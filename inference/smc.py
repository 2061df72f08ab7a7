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
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from weft.ppl import Target, gen
from weft.ppl.errors import DensityError, ModelError, WeftError

from .algorithm import Algorithm, State
from .feynman_kac import FeynmanKac
from .resampling import Resampling, systematic
from .results import Particles
from .runner import tracing


class Path(eqx.Module):
    """What is known of every step.

    Attributes:
        ess: effective sample size of the weights after each step.
        log_increments: by how much each step raised the log evidence.
        resampled: whether the particles were resampled before the step.
        num_ancestors: from how many of the first particles those of the step descend.
        collected: what `collect` gave, `(step, ...)`.
        ancestors: `(step, particle)`, which particle of the step before each descends from; `None`
            without history.
        particles: `(step, particle, ...)`; `None` without the full history.
        log_weights: the same of their weights.
    """

    ess: Float[Array, " step"]
    log_increments: Float[Array, " step"]
    resampled: Bool[Array, " step"]
    num_ancestors: Int[Array, " step"]
    collected: Any
    ancestors: Int[Array, "step particle"] | None = None
    particles: Any = None
    log_weights: Float[Array, "step particle"] | None = None


class SequentialParticles(Particles):
    """The particles of the last step, and how they came about.

    Attributes:
        path: what is known of every step.
    """

    path: Path | None = None

    def _title(self) -> str:
        title = super()._title()
        if self.path is None or tracing(self.path):
            return title
        ess, worst = np.asarray(self.path.ess), int(np.argmin(self.path.ess))
        times, roots = int(np.sum(self.path.resampled)), int(self.path.num_ancestors[-1])
        lines = [
            title,
            f"{ess.size} steps, resampled before {times}; smallest effective sample size {ess[worst]:.3g} (step "
            f"{worst}); the last particles descend from {roots} of the first",
        ]
        if ess[worst] < max(10.0, 0.01 * self.num_particles):
            lines.append(
                f"The run degenerated at step {worst}: take more particles, or a better proposal there."
            )
        return "\n".join(lines)


class SMCState(State):
    """Particles on their way.

    Attributes:
        iteration: steps done; the first particles are no step.
        particles: `(particle, ...)`.
        log_weights: unnormalised, since they were resampled.
        log_evidence: so far.
        roots: which of the first particles each descends from.
        path: buffers of what is known of every step.
    """

    iteration: Int[Array, ""]
    particles: Any
    log_weights: Float[Array, " particle"]
    log_evidence: Float[Array, ""]
    roots: Int[Array, " particle"]
    path: Path


class smc(Algorithm):
    """Sequential Monte Carlo for a Feynman-Kac model.

    Attributes:
        model: a `FeynmanKac` model; or a function from a target to one.
        num_particles: `N`.
        resample: a resampling scheme: `systematic`, `stratified`, `multinomial`, `residual`, `ssp` or
            `killing`.
        threshold: particles are resampled when the effective sample size falls below this share of
            their number: 1 for always, 0 for never.
        history: what is kept of past steps: `"none"`, `"ancestors"` (indices, by which paths can be traced) or
            `"full"` (the particles, too).
        collect: a function of the weighted particles after each step, whose values are kept; by default the
            weighted mean and standard deviation of everything floating.

    Raises:
        DensityError: if all weights are zero after some step, or one is infinite or no number.
        ModelError: if a step changes the structure, shapes or dtypes of a particle.

    References:
        Del Moral (2004); Chopin and Papaspiliopoulos (2020), "An introduction to sequential Monte Carlo"; Lee and
        Whiteley (2018) for the variance of the evidence.

    Example:
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
    resample: Resampling = systematic
    threshold: float = 0.5
    history: str = eqx.field(static=True, default="none")
    collect: Callable[[Particles], Any] | None = None

    def __check_init__(self) -> None:
        n = self.num_particles
        if not isinstance(n, (int, np.integer)) or n < 2:
            raise WeftError(f"smc: num_particles must be an integer, 2 at least, got {n!r}")
        if isinstance(self.threshold, (int, float)) and not 0 <= self.threshold <= 1:
            raise WeftError(f"smc: threshold is a share between 0 and 1, got {self.threshold!r}")
        if self.history not in ("none", "ancestors", "full"):
            raise WeftError(f"smc: history is 'none', 'ancestors' or 'full', got {self.history!r}")
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
        progress: bool = True,
    ) -> SequentialParticles:
        """Run the particles through the model.

        Args:
            key: a random key.
            target: what a model made from a target is made of; a model that stands for itself needs none.
            init: nothing: the model has its own first particles.
            progress: whether to show a progress bar.

        Returns:
            The particles of the last step, with the log evidence and its variance, and the path.
        """
        if target is None:
            if not _is_model(self.model):
                raise TypeError("smc: this model is made from a target: run(key, target)")
            target = _nothing().given()
        return super().run(key, target, init=init, progress=progress)

    def check(self, target: Target, init: Any = None) -> None:
        if init is not None:
            raise WeftError("smc has no starting point: its model has first particles")

    def prepare(self, target: Target) -> smc:
        model = self._made(target)
        if model.num_steps < 1:
            raise WeftError("smc: the model has no step")
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
        particles, log_weights = jax.vmap(self._model.init)(jax.random.split(key, n))
        roots = jnp.arange(n)
        first = self._seen(
            particles, log_weights, jnp.log(float(n)), jnp.zeros((), bool), roots, roots
        )
        path = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype).at[0].set(x), first)
        return SMCState(jnp.int32(0), particles, log_weights, path.log_increments[0], roots, path)

    def step(self, key: PRNGKeyArray, state: SMCState, target: Target) -> SMCState:
        n, t = self.num_particles, state.iteration + 1
        resample_key, move_key = jax.random.split(key)

        def again(state: SMCState) -> Any:
            chosen = self.resample(resample_key, state.log_weights, n)
            particles = jax.tree.map(lambda x: x[chosen], state.particles)
            return particles, jnp.zeros_like(state.log_weights), state.roots[chosen], chosen

        def as_they_are(state: SMCState) -> Any:
            return state.particles, state.log_weights, state.roots, jnp.arange(n)

        due = (_ess(state.log_weights) < self.threshold * n) | (self.threshold >= 1)
        particles, log_weights, roots, chosen = jax.lax.cond(due, again, as_they_are, state)
        before = logsumexp(log_weights)
        particles, potentials = jax.vmap(self._model.step, (0, None, 0))(
            jax.random.split(move_key, n), t, particles
        )
        log_weights = log_weights + potentials
        now = self._seen(particles, log_weights, before, due, roots, chosen)
        path = jax.tree.map(lambda buffer, x: buffer.at[t].set(x), state.path, now)
        log_evidence = state.log_evidence + now.log_increments
        return SMCState(t, particles, log_weights, log_evidence, roots, path)

    def has_result(self, iteration: int) -> bool:
        return True

    def describe(self, state: SMCState) -> str:
        return f"log evidence {float(state.log_evidence):.5g}, ess {float(_ess(state.log_weights)):.3g}"

    def result(self, state: SMCState, target: Target) -> SequentialParticles:
        path = state.path
        if not tracing(state):
            done = int(state.iteration) + 1
            path = jax.tree.map(lambda x: x[:done], path)
            self._check_weights(path)
        n = self.num_particles
        generations = 1 + jnp.sum(path.resampled)
        shares = jnp.zeros(n).at[state.roots].add(jax.nn.softmax(state.log_weights))
        # Lee and Whiteley (2018), equation 7.
        variance = 1 - (n / (n - 1)) ** generations * (1 - jnp.sum(shares**2))
        choices = state.particles
        if not isinstance(choices, dict):
            choices = {"state": choices} if eqx.is_array(choices) else dict(_leaves(choices))
        return SequentialParticles(
            choices=choices,
            log_weights=state.log_weights,
            log_evidence=state.log_evidence,
            log_evidence_variance=variance,
            target=target if target.latents else None,
            path=path,
        )

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
        roots: Array,
        chosen: Array,
    ) -> Path:
        """What is kept of one step."""
        weighted = Particles(choices=particles, log_weights=log_weights)
        kept, full = self.history != "none", self.history == "full"
        marked = jnp.zeros(self.num_particles, int).at[roots].set(1)
        return Path(
            ess=_ess(log_weights),
            log_increments=logsumexp(log_weights) - before,
            resampled=due,
            num_ancestors=jnp.sum(marked),
            collected=moments(weighted) if self.collect is None else self.collect(weighted),
            ancestors=chosen if kept else None,
            particles=particles if full else None,
            log_weights=log_weights if full else None,
        )

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
            raise DensityError(
                f"smc: at step {t}, {what}. Take more particles or a proposal that knows what is observed there; the "
                f"{t} steps before it are fine"
            )


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


def _ess(log_weights: Array) -> Array:
    return jnp.exp(2 * logsumexp(log_weights) - logsumexp(2 * log_weights))


def _is_model(x: Any) -> bool:
    return isinstance(x, FeynmanKac)


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
def _nothing() -> None:
    """A program without choices, for models that need no target."""
