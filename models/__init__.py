"""Ready-made distributions and processes, built on the language and its inference."""

from . import distributions as distributions
from . import state_space as state_space

__all__ = ["distributions", "state_space"]
