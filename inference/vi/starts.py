"""The beginning of fits: the parameters of each restart, and the state of its optimiser, as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from weft.ppl.stage.errors import WeftError
from weft.ppl.stage.keys import as_key
from weft.ppl.stage.packing import Skeleton, pack

from .parameters import partition, unwrap

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True)
class FitStart:
    """The beginning of one or several fits.

    Attributes:
        keys: one for each fit.
        moving: for each fit, the arrays that are optimised and those of the optimiser's state.
        rest: for each fit, the other arrays among its parameters.
        skeleton: the structure from which `moving` is packed: `(free, state)`.
        rest_skeleton: the structure from which `rest` is packed.
    """

    keys: list[PRNGKeyArray]
    moving: list[list[Array]]
    rest: list[list[Array]]
    skeleton: Skeleton
    rest_skeleton: Skeleton

    @staticmethod
    def make(
        key: PRNGKeyArray,
        params: Any,
        num: int,
        optimizer: optax.GradientTransformationExtraArgs,
        state: Any,
    ) -> FitStart:
        """Make the beginning of all fits.

        Raises:
            WeftError: if there is nothing to optimise, if several fits would begin at one point, or if a function of
                parameters gives other structures for other keys.
        """
        drawn = callable(params) and jax.tree_util.all_leaves([params])
        if num > 1 and not drawn:
            raise WeftError(
                f"fit: num_restarts={num} fits would all begin at the same parameters. Give a function init(key) "
                "of the parameters in their place, or jittered(params), which moves them at random"
            )
        keys = [key] if num == 1 else list(jax.random.split(key, num))
        moving, rest, skeletons = [], [], set()
        for k in keys:
            free, other = partition(params(jax.random.fold_in(k, 3)) if drawn else params)
            if not jax.tree.leaves(free):
                raise WeftError(
                    "fit: the parameters hold no floating array to optimise: every leaf is fixed or not floating"
                )
            arrays, skeleton = pack((free, optimizer.init(free) if state is None else state))
            others, rest_skeleton = pack(other)
            moving.append(arrays)
            rest.append(others)
            shapes = tuple((x.shape, x.dtype) for x in (*arrays, *others))
            skeletons.add((skeleton, rest_skeleton, shapes))
        if len(skeletons) > 1:
            raise WeftError(
                "fit: init(key) gave parameters of different structures or shapes for different keys"
            )
        ((skeleton, rest_skeleton, _),) = skeletons
        return FitStart(keys, moving, rest, skeleton, rest_skeleton)

    def params(self, i: int) -> Any:
        """The first parameters of one fit, as the objective sees them."""
        free, _ = self.skeleton.unpack(self.moving[i])
        return unwrap(eqx.combine(free, self.rest_skeleton.unpack(self.rest[i])))


def jittered(params: Any, scale: float = 1.0) -> Callable[..., Any]:
    """Parameters with random noise, for the restarts of a fit.

    Args:
        params: a pytree of parameters, as `fit` takes it; or a function from a target to a guide and its parameters,
            such as `mean_field`.
        scale: the standard deviation of the normal noise that is added to every number that is optimised. Constrained
            numbers move on the unconstrained scale.

    Returns:
        A function `init(key)` that gives parameters. If `params` is a function of a target, the same function with such
        an `init` in place of the parameters, for `variational(jittered(mean_field), num_restarts=5)`.

    Examples:
        >>> import jax
        >>> from weft.inference import fixed, jittered
        >>> init = jittered({"loc": 0.0, "prior": fixed(1.0)}, scale=0.1)
        >>> moved = init(jax.random.key(0))
        >>> bool(0 < abs(moved["loc"]) < 1), float(moved["prior"].value)
        (True, 1.0)
    """
    if callable(params) and jax.tree_util.all_leaves([params]):
        make: Any = params

        def made(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            guide, begin = make(*args, **kwargs)
            return guide, jittered(begin, scale)

        return made

    def init(key: PRNGKeyArray) -> Any:
        free, rest = partition(params)
        leaves, tree = jax.tree.flatten(free)
        keys = jax.random.split(as_key(key), max(len(leaves), 1))
        moved = [
            x + jnp.asarray(scale, x.dtype) * jax.random.normal(k, x.shape, x.dtype)
            for k, x in zip(keys, leaves, strict=False)
        ]
        return eqx.combine(jax.tree.unflatten(tree, moved), rest)

    return init
