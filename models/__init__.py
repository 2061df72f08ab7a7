"""Ready-made distributions, processes and networks, built on the language and its inference."""

from . import distributions as distributions

__all__ = ["distributions"]
