"""The result of sequential Monte Carlo: weighted particles, and the history of the run."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import equinox as eqx
import jax
import numpy as np
from weft.inference.results import storage
from weft.inference.results.particles import Particles
from weft.inference.run.runner import tracing
from weft.ppl.stage.errors import WeftError

from .ancestral_tree import AncestralTree
from .history import History, along_lineages

FEW_ANCESTORS = 10
"""With fewer ancestors than this, there are too few to estimate a variance."""


@storage.result_type("sequential particles")
class SequentialParticles(Particles):
    """The particles of the last step, and the history of the run.

    Attributes:
        path: what is known of every step.
        state: the state of the run, for `resume=`. If the result was read from a file, its arrays in order.
        remark: the model's remark on the run.
    """

    path: History | None = None
    state: Any = None
    remark: str | None = eqx.field(static=True, default=None)

    def along(self, tree: Any) -> Any:
        """The entries of arrays (step, particle, ...) along the paths to the last particles: (particle, step, ...).

        Args:
            tree: for instance `path.particles`.

        Raises:
            WeftError: if the run did not keep all ancestors.
        """
        if self.path is None or self.path.ancestors is None:
            raise WeftError("this run did not keep all ancestors: smc(..., history='full')")
        return along_lineages(self.path.ancestors, tree)

    def _saved(self) -> dict[str, Any]:
        path, state = self.path, self.state
        if path is not None and isinstance(getattr(state, "path", None), History):
            # The same arrays, which are written once, without the steps that are still to come.
            state = dataclasses.replace(state, path=dataclasses.replace(path, tree=None))
        leaves = None if state is None else tuple(jax.tree.leaves(state))
        parts = {"path": _plain(path), "state": leaves, "remark": self.remark}
        return {**super()._saved(), **parts}

    @classmethod
    def from_saved(cls, saved: storage.Saved, target: Any = None) -> Self:
        """Rebuild from the result of `storage.read`. Modules in particles and collected values come back as dicts."""
        path = saved.tree["path"]
        if path is not None:
            tree = path["tree"] and AncestralTree(**path["tree"])
            path = History(**{**path, "tree": tree})
        saved = saved._replace(tree={**saved.tree, "path": path})
        return super().from_saved(saved, target)

    def _title(self) -> str:
        title, path = super()._title(), self.path
        if path is None or tracing(path):
            return title
        ess, worst = np.asarray(path.ess), int(np.argmin(path.ess))
        times = int(np.sum(path.resampled))
        lines = [
            title,
            f"{ess.size} steps, resampled before {times}; smallest effective sample size {ess[worst]:.3g} (step "
            f"{worst}); {_descent(path)}",
        ]
        if path.info:
            moved = np.asarray(path.resampled)
            shown = (f"{k} {np.asarray(v)[moved].mean():.3g}" for k, v in path.info.items())
            lines.append(f"Moves after resampling, on average: {', '.join(shown)}")
        if ess[worst] < max(10.0, 0.01 * self.num_particles):
            lines.append(
                f"The run degenerated at step {worst}: take more particles, or a better proposal there."
            )
        if path.undefined is not None and np.any(path.undefined):
            counts = np.asarray(path.undefined)
            lines.append(
                f"{counts.sum()} of {ess.size * self.num_particles} potentials were no number (the first at step "
                f"{np.flatnonzero(counts)[0]}) and count as zero."
            )
        if self.remark is not None:
            lines.append(self.remark)
        return "\n".join(lines)


def _descent(path: History) -> str:
    """From how many particles the last ones descend, with a warning if these are few."""
    fewest, step = int(np.min(path.num_ancestors)), int(np.argmin(path.num_ancestors))
    if fewest == 0:
        return "lineages are not known, since adapt may have replaced particles (FeynmanKac.keeps_lineage)"
    said = f"the last particles descend from {int(path.num_ancestors[-1])} of those of step {int(path.since[-1])}"
    if fewest < FEW_ANCESTORS:
        said += (
            f"\nThose of step {step} descend from {fewest} of those of step {int(path.since[step])}: too few "
            "for the standard error, which may be far too small, to be trusted."
        )
    return said


def _plain(tree: Any) -> Any:
    """Modules as dicts of their fields, for a file."""
    if isinstance(tree, eqx.Module):
        return {name: _plain(x) for name, x in vars(tree).items()}
    if isinstance(tree, dict):
        return {name: _plain(x) for name, x in tree.items()}
    return type(tree)(map(_plain, tree)) if type(tree) in (list, tuple) else tree
