"""The result of a fit, and its report in words."""

from __future__ import annotations

import os
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from weft.inference.results.storage import Saved, result_type, write
from weft.inference.results.weights import khat_threshold
from weft.inference.weighted.importance import importance
from weft.ppl import Program, Target
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import DensityError, WeftError
from weft.ppl.stage.modules import Noun

from .gradient_report import GradientReport, gradient_report


class Restarts(eqx.Module):
    """The ends of several restarts of a fit.

    Attributes:
        bounds: of shape `(num_restarts,)`, the bound at the last parameters of each. It is the mean of 100 estimates,
            and all restarts share their keys.
        errors: of shape `(num_restarts,)`, the standard errors of these means.
        best: the index of the restart that was kept.
    """

    bounds: Float[Array, " restart"]
    errors: Float[Array, " restart"]
    best: Int[Array, ""]


@result_type("fit")
class Fit(Noun):
    """The result of a fit.

    Attributes:
        params: the parameters, without wrappers. Constrained ones are inside their sets.
        bounds: of shape `(num_steps,)`, the bound (or the loss) that was estimated at each step.
        state: the state of the optimiser. `fit(..., state=...)` continues with it.
        num_skipped: the number of steps that were skipped because the bound or its gradient was not finite.
        objective: the objective.
        data: the data that it was given.
        minimize: whether the objective was a loss.
        batch_size: the number of rows of data in a step; `None` if all.
        key: a random key for `report`.
        stopped: whether the fit stopped early.
        restarts: how all restarts ended, if there were several. All other attributes are of the best one.
        wrapped: the parameters as `fit` takes them, to continue from.
    """

    params: Any
    bounds: Float[Array, " steps"]
    state: Any
    num_skipped: Int[Array, ""]
    objective: Any = None
    data: tuple[Any, ...] = ()
    minimize: bool = eqx.field(static=True, default=False)
    batch_size: int | None = eqx.field(static=True, default=None)
    key: PRNGKeyArray | None = None
    stopped: Bool[Array, ""] | bool = False
    restarts: Restarts | None = None
    wrapped: Any = None

    @property
    def guide(self) -> Program:
        """The fitted guide. It is a program, so it can be a proposal.

        Raises:
            WeftError: if the objective has no guide.
        """
        return self._pair()[1]

    @property
    def target(self) -> Target:
        """The target that the guide was fitted to.

        Raises:
            WeftError: if the objective has no target.
        """
        return self._pair()[0]

    def report(self, num_particles: int = 1000, num_gradients: int = 200) -> str:
        """The fit in words: did it converge, can the guide be trusted, where does the noise of its gradient come from.

        - The course of the bound, skipped steps, an early stop, the other restarts.
        - From the weights `w = p / q` of draws of the guide: the ELBO, which is mean log w; the importance-weighted
          bound, log mean w; the gap between them, which estimates KL(q || p) from below; and the Pareto k-hat of the
          weights.
        - The gradient report at the last parameters (see `gradient_report`).

        Args:
            num_particles: the number of draws of the guide for the check by importance weights.
            num_gradients: the number of gradients that are drawn for the gradient report, and as many again for each
                choice. 0 leaves the gradient report out.

        Returns:
            A few lines of text.

        References:
            Burda, Grosse and Salakhutdinov (2016), equation 8, for the bound; Yao, Vehtari, Simpson
            and Gelman (2018) for k-hat as a check of variational inference.
        """
        bounds = np.asarray(self.bounds, float)
        lines = [_course(bounds, self.minimize)]
        if np.all(self.stopped):
            lines.append(
                f"It was stopped early, after {np.flatnonzero(~np.isnan(bounds))[-1] + 1} steps."
            )
        if self.restarts is not None:
            lines.append(_spread(self.restarts, self.minimize))
        skipped = int(self.num_skipped)
        if skipped:
            lines.append(
                f"{skipped} of {self.bounds.size} steps were skipped: the bound or its gradient was not finite."
            )
        lines.append(self._check(num_particles))
        if num_gradients and self.objective is not None and self.key is not None:
            found = self.gradient_report(num_gradients)
            lines.append(repr(found) if found.rows else "")
        return "\n".join(line for line in lines if line)

    def gradient_report(self, num_samples: int = 200) -> GradientReport:
        """Where the noise of the gradient comes from, at the last parameters.

        See the function `gradient_report`.

        Raises:
            WeftError: if the fit was loaded from a file, which holds no objective.
        """
        if self.objective is None or self.key is None:
            raise WeftError(
                "this fit was loaded from a file, which holds no code: give the objective again, "
                "gradient_report(key, objective, params)"
            )
        return gradient_report(
            jax.random.fold_in(self.key, 1),
            self.objective,
            self.params if self.wrapped is None else self.wrapped,
            *self.data,
            num_samples=num_samples,
            batch_size=self.batch_size,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters, bounds and the optimiser's state to one file. `weft.inference.load` reads it.

        The objective is code, so it is not in the file.
        """
        tree = {
            "params": self.params,
            "bounds": self.bounds,
            "num_skipped": self.num_skipped,
            "state": jax.tree.leaves(self.state),
            "stopped": np.asarray(self.stopped),
            "restarts": None
            if self.restarts is None
            else [self.restarts.bounds, self.restarts.errors, self.restarts.best],
        }
        write(path, "fit", tree, {"minimize": self.minimize, "batch_size": self.batch_size})

    @classmethod
    def from_saved(cls, saved: Saved, target: Target | None = None) -> Fit:
        """The fit that a file holds. It has no objective and so no guide. Its `state` is a list of leaves."""
        tree = dict(saved.tree)
        restarts = tree.pop("restarts", None)  # files of earlier versions have none
        return cls(**tree, **saved.meta, restarts=None if restarts is None else Restarts(*restarts))

    def _pair(self) -> tuple[Target, Program]:
        if not hasattr(self.objective, "at"):
            raise WeftError(
                "this fit has no guide: "
                + (
                    "it was loaded from a file, which holds no code; apply your guide to fit.params"
                    if self.objective is None
                    else "its objective, unlike elbo(target, guide), has none; apply your guide to fit.params"
                )
            )
        return self.objective.at(self.params, *self.data)

    def _check(self, num_particles: int) -> str:
        if not hasattr(self.objective, "at") or self.key is None:
            return ""
        if self.batch_size is not None:  # the target may be scaled for batches of this size
            return "Fitted on minibatches: not checked by weights. Try importance(fit.guide).run(key, target)."
        target, guide = self._pair()
        try:
            particles = importance(guide, num_particles).run(self.key, target, progress=False)
        except DensityError as error:
            return f"Not checked by weights: {error}."
        khat, n = float(particles.khat()), num_particles
        limit = khat_threshold(n)
        if khat < limit:
            verdict = "its draws, weighted, can be trusted: importance(fit.guide)"
        else:
            verdict = "it misses the target's tails or shape; do not trust weighted draws; take a richer guide, or nuts"
        return "\n".join(
            [
                _bounds(np.asarray(particles.log_weights, float)),
                f"Guide against target, by {n} weighted draws: k-hat {khat:.2f} (limit {limit:.2f}), {verdict}.",
            ]
        )

    def __repr__(self) -> str:
        bounds = np.asarray(self.bounds) if not isinstance(self.bounds, Tracer) else None
        lines = [f"Fit: {self.bounds.shape[0]} steps"]
        if bounds is not None and bounds.size:
            lines.append(_course(bounds.astype(float), self.minimize))
        flat, _ = jax.tree_util.tree_flatten_with_path(self.params)
        for path, leaf in flat[:20]:
            if eqx.is_array(leaf):
                lines.append(
                    f"  params{jax.tree_util.keystr(path)}: {leaf.dtype}{list(leaf.shape)}"
                )
        if len(flat) > 20:
            lines.append(f"  ... {len(flat) - 20} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(repr(self))}</pre>"


def _course(bounds: np.ndarray, minimize: bool) -> str:
    """The movement of the bound over the last quarter of the steps, compared with its own noise, in words."""
    name = "loss" if minimize else "bound"
    steps = np.flatnonzero(np.isfinite(bounds))
    tail = steps[-max(steps.size // 4, 1) :]
    if tail.size < 8:
        return (
            f"The {name} ended at {bounds[steps[-1]]:.5g}."
            if steps.size
            else f"The {name} was never finite."
        )
    y, x = bounds[tail], tail - tail.mean()
    slope = (x @ y) / (x @ x)
    residual = y - y.mean() - slope * x
    error = np.sqrt(residual @ residual / (tail.size - 2) / (x @ x))
    span = tail[-1] - tail[0]
    change, noise = slope * span, error * span
    better = -change if minimize else change
    gain = abs(y.mean() - bounds[steps[: max(steps.size // 20, 1)]].mean())
    size = f"{abs(change):.2g} +- {noise:.1g} over the last {tail.size} steps"
    text = f"The {name} ended at {y.mean():.5g} (mean of the last {tail.size} steps)"
    if abs(change) >= 3 * noise and abs(change) >= 1e-3 * gain:
        if better > 0:
            word = "falling" if minimize else "rising"
            return f"{text} and was still {word}, by {size}: it has not converged, run more steps."
        word = "rose" if minimize else "fell"
        return f"{text} and {word}, by {size}: the optimiser is unstable, lower its learning rate."
    if 3 * noise > max(0.1 * gain, 0.05):
        return (
            f"{text}. Its trend, {size}, is hidden in the noise of single estimates: whether it has "
            "converged cannot be told. Run more steps, or average more draws a step (num_samples)."
        )
    return f"{text} and was level: its trend is {size}. It has converged, as far as it tells."


def _bounds(log_w: np.ndarray) -> str:
    """The bounds that weights give, and the gap between them, in words."""
    n = log_w.size
    if not np.isfinite(log_w).all():
        return f"{(~np.isfinite(log_w)).sum()} of {n} draws of the guide have weight zero: the ELBO is minus infinity."
    lower = log_w.mean()
    w = np.exp(log_w - log_w.max())
    upper = np.log(w.mean()) + log_w.max()
    # Delta method: log(mean w) moves by w_i / mean w - 1 for each draw.
    own = w / w.mean() - 1
    errors = [x.std(ddof=1) / np.sqrt(n) for x in (log_w, own, own - log_w)]
    return (
        f"By {n} draws of the guide: ELBO {lower:.5g} +- {errors[0]:.1g}; importance-weighted bound {upper:.5g} +- "
        f"{errors[1]:.1g}, near the log evidence; the gap, {upper - lower:.2g} +- {errors[2]:.1g} nats, is the "
        "divergence KL(guide || posterior) or less."
    )


def _spread(restarts: Restarts, minimize: bool) -> str:
    """The number of restarts that ended where the best did, and where the others ended, in words."""
    ends, errors = (np.asarray(x, float) for x in (restarts.bounds, restarts.errors))
    best = int(restarts.best)
    # All restarts share their keys, so the error of a difference is below the sum of both errors.
    near = abs(ends - ends[best]) <= np.maximum(3 * (errors + errors[best]), 1e-3 * abs(ends[best]))
    n, finite = ends.size, ends[np.isfinite(ends)]
    text = (
        f"It is the best of {n} restarts: {near.sum()} of them ended as well as it, within the error, at "
        f"{ends[best]:.5g} +- {errors[best]:.1g}"
    )
    if near.all():
        return f"{text}."
    worst = finite.max() if minimize else finite.min()
    text += f"; the worst at {worst:.5g}"
    if finite.size < n:
        text += f"; {n - finite.size} at none that is finite"
    if near.sum() == 1:
        text += ". No other found it: there may be better ones still, take more restarts"
    return f"{text}."
