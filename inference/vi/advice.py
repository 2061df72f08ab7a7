"""Suggestions against the noise of a choice, in words."""

from __future__ import annotations

from typing import Any

from weft.ppl.expectations.gradients import Enum, Reparam, Score
from weft.ppl.expectations.sensitivity import Choice

NOTICED = 0.1
"""Share of the variance from which on a choice is worth a word."""

MOSTLY = 0.5
"""Share from which on the noise is mostly of one source."""

FEW = 64
"""Values that are cheap to sum over."""


def advice(choice: Choice | None, share: float, jumps: bool, objective: Any) -> str:
    """A suggestion for a choice; empty if nothing is needed.

    Args:
        choice: the choice; `None` for minibatches.
        share: its share of the variance.
        jumps: whether the objective jumps along the path of the choice.
        objective: the objective whose gradient it is.
    """
    num_samples = getattr(objective, "num_samples", None)
    if choice is None:
        return "take larger batches: most of the noise is theirs" if share > MOSTLY else ""
    strategy = choice.strategy
    if jumps:
        others = _listed(choice, ("enum", "mvd", "score"))
        return f"take {others} in its place, or smooth the jump"
    if getattr(strategy, "biased", False):
        others = _listed(choice, ("enum", "mvd", "score"))
        return f"its gradient is biased by construction: check the fit by {others}"
    if strategy is None or share < NOTICED:
        return ""
    possible = [name for name in choice.fits if not (choice.in_loop and name in ("enum", "mvd"))]
    if isinstance(strategy, Reparam):
        if share >= MOSTLY and not getattr(objective, "sticking_the_landing", True):
            return "take sticking_the_landing=True, if the guide can come near the posterior"
        return ""
    more = "average more draws a step: num_samples"
    if isinstance(strategy, Enum):  # of several copies one at a time, the others at their draws
        return more
    if "enum" in possible and choice.num_values is not None and choice.num_values <= FEW:
        return f"take gradients.enum: the sum over its {choice.num_values} values has no noise of this choice"
    if isinstance(strategy, Score):
        if "reparam" in possible:
            return "take gradients.reparam, if what follows is smooth in it: its noise is mostly far lower"
        if "mvd" in possible:
            return "take gradients.mvd: two more runs of the rest for each parameter, and far less noise"
        if strategy.baseline is None and num_samples in (None, 1):
            return "give it a baseline: num_samples of 2 or more, or gradients.score(baseline=gradients.learned(...))"
    return more


def _listed(choice: Choice, names: tuple[str, ...]) -> str:
    possible = [
        n for n in names if n in choice.fits and not (choice.in_loop and n in ("enum", "mvd"))
    ]
    return " or ".join(f"gradients.{n}" for n in possible) or "another law"
