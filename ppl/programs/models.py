"""Models: ``@gen`` makes a model of a function with sites. A model applied to arguments is a program."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.modules import Noun
from weft.ppl.stage.packing import pack
from weft.ppl.stage.staging import built

from .printing import Printed
from .programs import Program


class Model(Printed, Noun):
    """A function with sites. ``@gen`` makes one. Applied to arguments it gives a program.

    Attributes:
        function: the Python function, or a transformed one.
        name: its name in messages.
    """

    function: Callable[..., Any]
    name: str = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Program:
        try:
            inspect.signature(self.function).bind(*args, **kwargs)
        except TypeError as e:
            raise TypeError(f"{self.name}: {e}") from None
        except ValueError:
            pass
        try:
            arrays, skeleton = pack((self.function, args, kwargs))
        except TypeError as e:
            raise TypeError(
                f"model {self.name!r}: an argument is an array of no numbers: {e}"
            ) from None
        program = Program([*arrays, np.zeros((), np.float32)], skeleton, self.name)
        built(program)
        return program

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(Program, name):
            raise AttributeError(
                f"apply the model first: {self.name}(...).{name}; a model has no arguments yet"
            )
        raise AttributeError(f"a Model has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<model {self.name}{_signature(self.function)}>"

    @property
    def __wrapped__(self) -> Any:
        return self.function


def _signature(f: Any) -> str:
    try:
        return str(inspect.signature(f))
    except (TypeError, ValueError):
        return "(...)"


def gen(function: Callable[..., Any]) -> Model:
    """Make a model of a function that calls ``sample``.

    Args:
        function: any Python function of arrays and static values, written in JAX.

    Returns:
        A model. Applied to arguments it gives a program: a distribution over its choices and its return value.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> @gen
        ... def line(x):
        ...     slope = sample("slope", dist.Normal(0.0, 1.0))
        ...     return jax.vmap(lambda xi: sample("y", dist.Normal(slope * xi, 0.1)), axis_name="row")(x)
        >>> trace = line(jax.numpy.arange(3.0)).simulate(jax.random.key(0))
        >>> trace.choices["y"].shape
        (3,)
    """
    if isinstance(function, Model):
        return function
    if not callable(function):
        raise TypeError(f"gen takes a function, got {type(function).__name__}")
    return Model(function, getattr(function, "__name__", type(function).__name__))


def check_name(name: Any) -> None:
    """Refuse a name that is not a non-empty string without a dot or a wildcard."""
    if not isinstance(name, str) or not name:
        raise ModelError(f"a site's name is a non-empty string, got {name!r}")
    if "." in name or "*" in name or name.startswith("~"):
        raise ModelError(
            f"a site's name holds no dot, no '*' and does not start with '~' (those are for addresses): {name!r}"
        )
