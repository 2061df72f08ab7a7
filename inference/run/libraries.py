"""Libraries that are imported on first use: BlackJAX, whose package imports everything it has, and Optax.

Use a name as an attribute of this module: `libraries.optax.adam(0.1)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.ppl.stage.lazy import on_first_use

if TYPE_CHECKING:
    import optax as optax
    from blackjax.adaptation import mass_matrix as mass_matrix
    from blackjax.adaptation import step_size as step_size
    from blackjax.adaptation.staged_adaptation import build_schedule as build_schedule
    from blackjax.mcmc import barker as barker
    from blackjax.mcmc import hmc as hmc
    from blackjax.mcmc import mala as mala
    from blackjax.mcmc import metrics as metrics
    from blackjax.mcmc import nuts as nuts
    from blackjax.mcmc import proposal as proposal
    from blackjax.mcmc import random_walk as random_walk
    from blackjax.mcmc import slice as slice

_KERNELS = ("barker", "hmc", "mala", "metrics", "nuts", "proposal", "random_walk", "slice")
_ADAPTATION = ("mass_matrix", "step_size")

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "optax": "optax",
        "build_schedule": "blackjax.adaptation.staged_adaptation",
        **{name: f"blackjax.mcmc.{name}" for name in _KERNELS},
        **{name: f"blackjax.adaptation.{name}" for name in _ADAPTATION},
    },
)
