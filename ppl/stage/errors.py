"""The errors of the language. Each message says what was expected, what came, where, and the cure."""

from __future__ import annotations


class WeftError(ValueError):
    """Base class of every error that Weft raises on purpose."""


class ModelError(WeftError):
    """The model itself is ill-formed: a name used twice, a site where none can stand."""


class AddressError(WeftError):
    """An address that the program does not have, or a choice that is missing."""


class ObservationError(WeftError):
    """Data that do not fit the site they are given to: shape, dtype, support, NaN."""


class DensityError(WeftError):
    """A density was asked of something that has none, or that is not normalised."""


class GradientError(WeftError):
    """A gradient was asked through a random choice that does not carry one."""
