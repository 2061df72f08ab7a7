"""The errors of the language. Each message says what was expected, what came, where, and the cure."""

from __future__ import annotations


class WeftError(ValueError):
    """Base class of every error that Weft raises on purpose."""


class ModelError(WeftError):
    """The model itself is ill-formed: a name is used twice, say, or a site stands where none is possible."""


class AddressError(WeftError):
    """The program has no such address, or a choice is missing."""


class ObservationError(WeftError):
    """Data do not fit the site they are given to, by shape, dtype, support or NaN."""


class DensityError(WeftError):
    """A density was asked for where there is none, or where it is not normalised."""


class GradientError(WeftError):
    """A gradient was asked for through a random choice that has none."""
