"""Weft: a probabilistic programming language inside JAX.

`import weft` loads the language itself. Exact sums, expectations, inference and models are loaded when they are first
used.
"""

from typing import TYPE_CHECKING

from weft import ppl as ppl
from weft.ppl import Model as Model
from weft.ppl import Program as Program
from weft.ppl import Target as Target
from weft.ppl import Trace as Trace
from weft.ppl import Unconstrained as Unconstrained
from weft.ppl import WeftError as WeftError
from weft.ppl import block as block
from weft.ppl import condition as condition
from weft.ppl import deterministic as deterministic
from weft.ppl import do as do
from weft.ppl import draw as draw
from weft.ppl import factor as factor
from weft.ppl import gen as gen
from weft.ppl import loop as loop
from weft.ppl import mask as mask
from weft.ppl import noncentered as noncentered
from weft.ppl import observed as observed
from weft.ppl import reparametrize as reparametrize
from weft.ppl import repeat as repeat
from weft.ppl import replay as replay
from weft.ppl import sample as sample
from weft.ppl import scale as scale
from weft.ppl import scope as scope
from weft.ppl import with_gradients as with_gradients
from weft.ppl.stage.compat import keep_solves_from_waiting as _keep_solves_from_waiting
from weft.ppl.stage.compat import keep_sums_from_ynnpack as _keep_sums_from_ynnpack
from weft.ppl.stage.lazy import on_first_use as _on_first_use

if TYPE_CHECKING:
    from weft import inference as inference
    from weft import models as models
    from weft.inference import kernels as kernels
    from weft.inference import load as load
    from weft.inference import recover as recover
    from weft.inference import testing as testing
    from weft.models import distributions as distributions
    from weft.ppl import expect as expect
    from weft.ppl import explain as explain
    from weft.ppl import gradients as gradients
    from weft.ppl import marginal as marginal
    from weft.ppl import marginalize as marginalize
    from weft.ppl import normalize as normalize

__getattr__, __dir__ = _on_first_use(
    __name__,
    {
        "expect": "weft.ppl",
        "explain": "weft.ppl",
        "gradients": "weft.ppl",
        "marginal": "weft.ppl",
        "marginalize": "weft.ppl",
        "normalize": "weft.ppl",
        "inference": "weft.inference",
        "models": "weft.models",
        "kernels": "weft.inference.kernels",
        "load": "weft.inference",
        "recover": "weft.inference",
        "testing": "weft.inference.testing",
        "distributions": "weft.models.distributions",
    },
)

_keep_sums_from_ynnpack()
_keep_solves_from_waiting()
