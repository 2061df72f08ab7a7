"""The language: sites, staging, the interpreter, models, transforms, expectations."""

from typing import TYPE_CHECKING

from .programs.language import deterministic as deterministic
from .programs.language import draw as draw
from .programs.language import factor as factor
from .programs.language import loop as loop
from .programs.language import repeat as repeat
from .programs.language import sample as sample
from .programs.models import Model as Model
from .programs.models import gen as gen
from .programs.observations import Observed as Observed
from .programs.observations import observed as observed
from .programs.programs import Program as Program
from .programs.targets import Target as Target
from .programs.traces import Trace as Trace
from .programs.unconstrained import FlatUnconstrained as FlatUnconstrained
from .programs.unconstrained import Unconstrained as Unconstrained
from .stage.errors import AddressError as AddressError
from .stage.errors import DensityError as DensityError
from .stage.errors import GradientError as GradientError
from .stage.errors import ModelError as ModelError
from .stage.errors import ObservationError as ObservationError
from .stage.errors import WeftError as WeftError
from .stage.lazy import on_first_use as _on_first_use
from .stage.structure import Axis as Axis
from .stage.structure import SiteInfo as SiteInfo
from .transforms.reparam import Affine as Affine
from .transforms.reparam import LocScale as LocScale
from .transforms.reparam import Reparam as Reparam
from .transforms.reparam import Transform as Transform
from .transforms.reparam import noncentered as noncentered
from .transforms.reparam import reparametrize as reparametrize
from .transforms.transforms import block as block
from .transforms.transforms import condition as condition
from .transforms.transforms import do as do
from .transforms.transforms import mask as mask
from .transforms.transforms import replay as replay
from .transforms.transforms import scale as scale
from .transforms.transforms import scope as scope
from .transforms.transforms import with_gradients as with_gradients

if TYPE_CHECKING:
    from .estimated import marginal as marginal
    from .estimated import normalize as normalize
    from .exact.explanations import Explanation as Explanation
    from .exact.explanations import explain as explain
    from .exact.marginalize import marginalize as marginalize
    from .expectations import gradients as gradients
    from .expectations.expectations import Expectation as Expectation
    from .expectations.expectations import expect as expect

__getattr__, __dir__ = _on_first_use(
    __name__,
    {
        "marginal": "weft.ppl.estimated",
        "normalize": "weft.ppl.estimated",
        "Explanation": "weft.ppl.exact.explanations",
        "explain": "weft.ppl.exact.explanations",
        "marginalize": "weft.ppl.exact.marginalize",
        "gradients": "weft.ppl.expectations.gradients",
        "Expectation": "weft.ppl.expectations.expectations",
        "expect": "weft.ppl.expectations.expectations",
    },
)
