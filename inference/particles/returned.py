"""Checks of what the methods of a Feynman-Kac model return. Messages name the method."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from weft.ppl.stage.errors import ModelError

from .hooks import signature_of


def check_particle(model: Any) -> None:
    """Raise ModelError unless `init` and `step` give particles of one kind, and their potentials."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    first = jax.eval_shape(lambda key: weighed(model, "init", model.init(key)), key)
    then = jax.eval_shape(
        lambda key, x: weighed(model, "step", model.step(key, jnp.int32(1), x)), key, first[0]
    )
    same_particles(model, "step", first[0], then[0])


def weighed(model: Any, hook: str, found: Any) -> tuple[Any, Float[Array, ""]]:
    """A particle and the logarithm of its potential, as `init`, `step` or `replay` of a model gave them.

    Raises:
        ModelError: if it gave anything else.
    """
    pair = isinstance(found, (tuple, list)) and len(found) == 2
    try:
        particle, potential = jax.tree.map(jnp.asarray, tuple(found) if pair else (found, None))
    except TypeError as error:
        raise ModelError(f"smc: {called(model, hook)} gives what is no array: {error}") from error
    if not pair or potential is None:
        raise ModelError(
            f"smc: {called(model, hook)} must give a particle and the logarithm of its potential, got "
            f"{in_words(found)}"
        )
    if jnp.shape(potential) != ():
        raise ModelError(
            f"smc: {called(model, hook)} must give the logarithm of one potential, a scalar; got "
            f"{in_words(potential)}"
        )
    return particle, potential


def same_particles(model: Any, hook: str, before: Any, after: Any) -> None:
    """Raise ModelError unless a hook left the structure, shapes and dtypes of particles as they were."""
    kept = jax.tree.structure(before) == jax.tree.structure(after)
    if not kept or in_words(before) != in_words(after):
        what = "a step" if hook == "step" else called(model, hook)
        raise ModelError(
            f"smc: {what} changes the particle: it was {in_words(before)} and becomes {in_words(after)}. Both must "
            "have the same structure, shapes and dtypes"
        )


def scalar(model: Any, hook: str, found: Any) -> Array:
    """What a hook gave, as an array without axes.

    Raises:
        ModelError: if it gave anything else.
    """
    if not eqx.is_array_like(found) or jnp.shape(found) != ():
        raise ModelError(f"smc: {called(model, hook)} must give one number, got {in_words(found)}")
    return jnp.asarray(found)


def called(model: Any, hook: str) -> str:
    """A hook of a model as it is called, for messages: `Model.finished(self, particles)`."""
    return f"{type(model).__name__}.{signature_of(type(model), hook)}"


def in_words(tree: Any) -> str:
    """The structure of a pytree, with the dtypes and shapes of its leaves: `{'x': float32[3]}`."""

    def one(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") and not eqx.is_array_like(leaf):
            return repr(leaf)
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        return f"{dtype}[{','.join(map(str, jnp.shape(leaf)))}]"

    return str(jax.tree.map(one, tree)).replace("'", "")
