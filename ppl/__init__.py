"""The language: sites, staging, the interpreter, models, transforms, expectations."""

from .errors import WeftError as WeftError
from .language import deterministic as deterministic
from .language import draw as draw
from .language import factor as factor
from .language import loop as loop
from .language import repeat as repeat
from .language import sample as sample
from .models import Model as Model
from .models import Program as Program
from .models import Trace as Trace
from .models import gen as gen
from .observations import observed as observed
from .targets import Target as Target
from .unconstrained import Unconstrained as Unconstrained
