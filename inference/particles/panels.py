"""Panels: sequential Monte Carlo of several series that stand under a ``jax.vmap``, with a filter for each.

Given what they share, the series of a panel are independent. Each has particles, weights and resamplings of its own.
The estimates of their evidences are independent and unbiased, so they multiply. With `v_l` the relative variance of the
estimate of series `l`,

    Z = prod_l Z_l,    Var(Z) / Z^2 = prod_l (1 + v_l) - 1,    Var(log Z) = sum_l Var(log Z_l).

A single filter for all series together would weigh by a product over the series, and would need exponentially many
particles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from weft.inference.results import storage
from weft.inference.results.particles import Particles, shuffled
from weft.inference.run.algorithm import Algorithm, State
from weft.inference.run.runner import tracing
from weft.ppl import Target
from weft.ppl.analysis.affinity import reads
from weft.ppl.stage.errors import DensityError, WeftError

from .engine import reshaped
from .feynman_kac import FeynmanKac
from .history import History
from .results import FEW_ANCESTORS, SequentialParticles
from .smc import nothing, smc


class Panel(FeynmanKac):
    """A Feynman-Kac model for each series of a panel. `filtering` makes it for a scan under a vmap.

    Taken as one model, a particle is one particle of each series, weighed by the product. `engine` gives each series
    its own particles instead.

    Attributes:
        models: the models of all series as one. Its arrays lead with the series where these differ. Under several vmaps
            it is a panel again.
        mapped: which arrays lead with the series.
        log_shared: the log density of what is given outside of the vmap.
        size: the number of series.
    """

    models: Any
    mapped: tuple[bool, ...] = eqx.field(static=True)
    log_shared: Float[Array, ""]
    size: int = eqx.field(static=True)

    @classmethod
    def of(cls, make: Callable[[Array], Any], size: int, log_shared: Array) -> Panel:
        """A panel, from a function that makes the model of the series with a given index."""
        rest: list[Any] = []

        def arrays(index: Array) -> Any:
            found, other = eqx.partition(make(index), eqx.is_array)
            rest.append(other)
            return found

        jaxpr, shapes = jax.make_jaxpr(arrays, return_shape=True)(jnp.int32(0))
        mapped = tuple(reads(jaxpr, [True]))
        axes = [0 if m else None for m in mapped]
        rows = jax.vmap(jax.extend.core.jaxpr_as_fun(jaxpr), out_axes=axes)(
            jnp.arange(size, dtype=jnp.int32)
        )
        models = eqx.combine(jax.tree.unflatten(jax.tree.structure(shapes), rows), rest[0])
        return cls(models, mapped, log_shared, size)

    def map(self, f: Callable[..., Any], *xs: Any) -> Any:
        """`f(model, *xs)` for every series. `xs` lead with the series."""
        arrays, rest = eqx.partition(self.models, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)

        def one(leaves: list[Any], *xs: Any) -> Any:
            return f(eqx.combine(jax.tree.unflatten(structure, leaves), rest), *xs)

        axes = [0 if m else None for m in self.mapped]
        return jax.vmap(one, (axes, *(0 for _ in xs)), axis_size=self.size)(leaves, *xs)

    def at(self, index: int) -> Any:
        """The model of one series."""
        arrays, rest = eqx.partition(self.models, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        own = [x[index] if m else x for x, m in zip(leaves, self.mapped, strict=True)]
        return eqx.combine(jax.tree.unflatten(structure, own), rest)

    def init(self, key: PRNGKeyArray, /) -> tuple[Any, Array]:
        particles, log_weights = self.map(lambda model, key: model.init(key), _keys(key, self.size))
        return particles, jnp.sum(log_weights) + self.log_shared

    def step(self, key: PRNGKeyArray, t: Any, particle: Any, /) -> tuple[Any, Array]:
        keys = _keys(key, self.size)
        moved = self.map(lambda model, key, x: model.step(key, t, x), keys, particle)
        return moved[0], jnp.sum(moved[1])

    def choices(self, particle: Any, /) -> Any:
        return self.map(lambda model, x: model.choices(x), particle)

    def engine(self, settings: smc, /) -> PanelSMC:
        if settings.history == "ancestors":
            raise WeftError(
                "smc: history='ancestors' makes room as a run goes on, which cannot be done for several series at "
                "once: take 'full'"
            )
        return PanelSMC(settings, self)

    def draw_posterior(self, target: Target, num_particles: int, /) -> Any:
        raise self._of_one_series(target)

    def conditional_evidence(self, target: Target, choices: Any, num_particles: int, /) -> Any:
        raise self._of_one_series(target)

    def _of_one_series(self, target: Target) -> Exception:
        return WeftError(
            f"smc inside a program (by=smc(...)) filters one series, and those of {target.program.name!r} stand "
            "under a vmap: normalize a model of one, inside the vmap of the program around it"
        )

    def each_series(self, f: Callable[..., Any], key: PRNGKeyArray, /, *xs: Any) -> Any:
        def one(model: FeynmanKac, key: PRNGKeyArray, *xs: Any) -> Any:
            return model.each_series(f, key, *xs)

        return self.map(one, _keys(key, self.size), *xs)

    def total_evidence(self, log_evidence: Array, /) -> Array:
        inner = self.map(lambda model, x: model.total_evidence(x), log_evidence)
        return jnp.sum(inner) + self.log_shared

    # --- what is the same in all series ---

    @property
    def panel_shape(self) -> tuple[int, ...]:
        return (self.size, *self.models.panel_shape)

    @property
    def num_steps(self) -> int:
        return self.models.num_steps

    @property
    def parts(self) -> Any:
        """The parts of the program of one series."""
        return self.models.parts

    @property
    def latents(self) -> tuple[tuple[str, ...], ...]:
        """The latent choices of one series, before its scan, in a step, and after it."""
        return self.models.latents


def _keys(key: PRNGKeyArray, size: int) -> PRNGKeyArray:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(size))


@storage.result_type("lane particles")
class PanelParticles(SequentialParticles):
    """Particles of all series of a panel. Each is one particle of each series, drawn by weight, so weights are equal.

    The fields of `path` have the axis of the series after that of the step. `path.log_increments`, summed over both, is
    the log evidence minus the log density of given values outside of the vmap. The weights of each series are in the
    values that `collect` made of them, and in the full history. `log_evidence_variance` is the sum over the series.
    """

    def along(self, tree: Any) -> Any:
        """The entries of arrays (step, series, particle, ...) along the paths to each series' last particles.

        The result has the axes (series, particle, step, ...).

        Args:
            tree: for instance `path.particles`.

        Raises:
            WeftError: if the run kept no ancestors.
        """
        if self.path is None or self.path.ancestors is None:
            return super().along(tree)
        path, ndim = self.path, self.path.ess.ndim - 1

        def one(path: History, tree: Any) -> Any:
            found = SequentialParticles(choices={}, log_weights=jnp.zeros(0), path=path)
            return found.along(tree)

        for _ in range(ndim):
            one = jax.vmap(one)
        return one(*jax.tree.map(lambda x: jnp.moveaxis(x, 0, ndim), (path, tree)))

    def _title(self) -> str:
        title = Particles._title(self)
        if self.path is None or tracing(self.path):
            return title
        ess, roots = np.asarray(self.path.ess), np.asarray(self.path.num_ancestors[-1])
        since, least = np.asarray(self.path.since[-1]), int(np.min(self.path.num_ancestors))
        worst = np.unravel_index(np.argmin(ess), ess.shape)
        fewest = np.unravel_index(np.argmin(roots), roots.shape)
        step, series = int(worst[0]), _named(worst[1:])
        times = np.asarray(self.path.resampled).sum(0)
        lines = [
            title,
            f"{roots.size} series with a filter each, {len(ess)} steps, resampled before {times.min()} to "
            f"{times.max()}; smallest effective sample size {ess[worst]:.3g} (series {series}, step {step}); the last "
            f"particles descend from {roots[fewest]} of those of step {since[fewest]}, or more (series "
            f"{_named(fewest)})",
            "The particles of each series were drawn by its last weights, and are worth "
            f"{ess[-1].min():.3g} or more.",
        ]
        if least < FEW_ANCESTORS:
            lines.append(
                f"Those of some step descend from {least} only (path.num_ancestors): too few for the standard error, "
                "which may be far too small, to be trusted."
            )
        if ess[worst] < max(10.0, 0.01 * self.num_particles):
            lines.append(
                f"Series {series} degenerated at step {step}: take more particles, or a better proposal there."
            )
        return "\n".join(lines)


def _named(index: Any) -> str:
    return ", ".join(str(int(i)) for i in index)


class PanelState(State):
    """The states of the runs of all series, `(series, ...)`, and the key by which their last particles are combined."""

    iteration: Int[Array, ""]
    states: Any
    key: PRNGKeyArray


class PanelSMC(Algorithm):
    """Sequential Monte Carlo for each series of a panel: the engine under a vmap."""

    settings: smc
    panel: Panel

    def traced(self) -> Self:
        return dataclasses.replace(self, settings=self.settings.traced())

    def num_iterations(self, target: Target) -> int:
        return self.panel.num_steps - 1

    def init(self, key: PRNGKeyArray, target: Target, init: Any = None) -> PanelState:
        run_key, last_key = jax.random.split(key)
        before = []
        if init is not None:
            if not isinstance(init, PanelState):  # read from a file, which has only leaves
                init = reshaped(init, jax.eval_shape(lambda: self.init(key, target)))
            last_key, before = init.key, [init.states]
            had = init.states.iteration.shape[0]
            if had != self.panel.size:
                raise WeftError(
                    f"smc: the run to be resumed had {had} series, this model has {self.panel.size}"
                )

        def one(engine: Any, key: PRNGKeyArray, *state: Any) -> Any:
            return engine.init(key, nothing().given(), *state)

        states = self._each(one, _keys(run_key, self.panel.size), *before)
        return PanelState(states.iteration[0], states, last_key)

    def step(self, key: PRNGKeyArray, state: PanelState, target: Target) -> PanelState:
        def one(engine: Any, key: PRNGKeyArray, state: Any) -> Any:
            return engine.step(key, state, nothing().given())

        states = self._each(one, _keys(key, self.panel.size), state.states)
        return PanelState(state.iteration + 1, states, state.key)

    def _each(self, f: Callable[..., Any], *xs: Any) -> Any:
        """Apply `f` to the engine of each series."""
        return self.panel.map(lambda model, *xs: f(self._engine(model), *xs), *xs)

    def _engine(self, model: FeynmanKac) -> Algorithm:
        return model.engine(self.settings)

    def describe(self, state: PanelState) -> str:
        return f"log evidence {float(jnp.sum(_evidences(state))):.5g}"

    def has_result(self, iteration: int) -> bool:
        return True

    def result(self, state: PanelState, target: Target) -> PanelParticles:
        states = state if tracing(state) else _until(state, int(state.iteration) + 1)
        runs = self._each(
            lambda engine, state: engine.result(state, nothing().given()), states.states
        )
        path = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), runs.path)
        if not tracing(state):
            self._check_weights(path)
        keys = _keys(state.key, self.panel.size)
        chosen = jax.vmap(lambda k, w: shuffled(k, w, w.shape[0]))(keys, runs.log_weights)

        def joined(x: Array) -> Array:
            return jnp.swapaxes(jax.vmap(lambda x, i: x[i])(x, chosen), 0, 1)

        log_evidence = jnp.sum(runs.log_evidence) + self.panel.log_shared
        return PanelParticles(
            choices=jax.tree.map(joined, runs.choices),
            log_weights=jnp.full(chosen.shape[1], log_evidence),
            log_evidence=log_evidence,
            log_evidence_variance=jnp.sum(runs.log_evidence_variance),
            target=target if target.latents else None,
            path=path,
            state=state,
        )

    def _check_weights(self, path: History) -> None:
        bad = np.argwhere(~np.isfinite(np.asarray(path.log_increments)))
        if not len(bad):
            return
        series, model = bad[0][1:], self.panel
        for index in series:
            model = model.at(int(index))
        one = jax.tree.map(lambda x: x[(slice(None), *series)], path)
        try:
            dataclasses.replace(self.settings, model=model)._check_weights(one)
        except DensityError as e:
            sizes = " by ".join(map(str, self.panel.panel_shape))
            raise DensityError(f"series {_named(series)} of {sizes}: {e}") from None


def _evidences(state: Any) -> Array:
    return _evidences(state.states) if isinstance(state, PanelState) else state.log_evidence


def _until(state: Any, done: int, depth: int = 0) -> Any:
    """A state whose path ends after this many steps."""
    if isinstance(state, PanelState):
        return dataclasses.replace(state, states=_until(state.states, done, depth + 1))
    return dataclasses.replace(
        state, path=jax.tree.map(lambda x: x[(slice(None),) * depth + (slice(done),)], state.path)
    )
