"""Kernels that evaluate a density on R^n and need no gradient of it."""

from __future__ import annotations

from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray
from weft.inference.run import libraries
from weft.inference.run.settings import require_counts, require_covariance, require_positive
from weft.ppl.stage.errors import WeftError

from .density_kernels import AdaptiveKernel, DensityKernel, LogDensity, is_array, rate
from .kernel import Info


class random_walk(AdaptiveKernel):
    """Random-walk Metropolis: a normal step in all directions, accepted by the ratio of the densities.

    Attributes:
        scale: the standard deviation of the step over the flattened position: one number, `(n,)` numbers, or an
            `(n, n)` covariance. With None a warm-up searches for the first one. A warm-up begins at the given scale and
            ends with `(n,)` standard deviations, or with a covariance.
        target_acceptance: the mean acceptance probability that a warm-up tunes the scale to. The best value is 0.234 in
            many dimensions, 0.44 in one.
        dense_mass: whether a warm-up estimates a full covariance.
        adapt: what a warm-up tunes: everything (True), the size of the step alone (`"step_size"`), or nothing (False).

    References:
        Metropolis et al. (1953); Roberts, Gelman and Gilks (1997), for the rate.
    """

    scale: Any = 1.0
    target_acceptance: Any = eqx.field(default=0.234, kw_only=True)

    def check_scales(self) -> None:
        if self.scale is None:
            return
        if is_array(self.scale) and np.ndim(self.scale) > 1:
            require_covariance(self, "a scale of two axes", self.scale)
        else:
            several = is_array(self.scale) and np.ndim(self.scale)
            one = "a step size is a positive number"
            expected = "the numbers of a scale are positive" if several else one
            require_positive(self, expected, self.scale, 1)

    def scales(self) -> tuple[Any, Any]:
        if self.scale is None or np.ndim(self.scale) == 0:
            return self.scale, None
        scale = jnp.asarray(self.scale)
        return 1.0, scale if scale.ndim == 2 else scale**2

    def with_scales(self, step_size: Any, inverse_mass: Any) -> Self:
        if inverse_mass is None:
            scale = step_size
        elif np.ndim(inverse_mass) == 2:
            scale = step_size**2 * inverse_mass
        else:
            scale = step_size * jnp.sqrt(inverse_mass)
        return eqx.tree_at(lambda k: k.scale, self, scale, is_leaf=lambda x: x is None)

    def init(self, position: Any, log_density: LogDensity) -> libraries.random_walk.RWState:
        return libraries.random_walk.init(position, log_density)

    def step(
        self, key: PRNGKeyArray, state: libraries.random_walk.RWState, log_density: LogDensity
    ) -> tuple[libraries.random_walk.RWState, libraries.random_walk.RWInfo]:
        flat, unravel = ravel_pytree(state.position)
        self.known_step()
        scale = jnp.asarray(self.scale, flat.dtype)
        if scale.shape not in ((), flat.shape, flat.shape * 2):
            raise WeftError(
                f"random_walk: scale has shape {scale.shape}; the position has {flat.size} numbers, so it is (), "
                f"{flat.shape} or {flat.shape * 2}"
            )

        def propose(key: PRNGKeyArray, position: Any) -> Any:
            noise = jax.random.normal(key, flat.shape, flat.dtype)
            step = jnp.linalg.cholesky(scale) @ noise if scale.ndim == 2 else scale * noise
            return unravel(flat + step)

        return libraries.random_walk.build_rmh()(key, state, log_density, propose)

    def report(self, info: Any) -> Info:
        return rate(info)


class slice_sampler(DensityKernel):
    """Slice sampling of one coordinate after another, in random order.

    Each number is drawn from the part of its line where the density is above a level. An interval about the current
    point steps out until the density at both its ends is below the level. Then points are drawn from it, and it shrinks
    to them, until one is above the level. It finds its widths by itself: a warm-up tunes nothing.

    Attributes:
        width: the width of the first interval, one number or `(n,)`, over the flattened position.
        max_expansions: the interval has at most this many widths.
        max_shrinkage: after this many points below the level a number stays where it is.

    References:
        Neal (2003), Slice sampling, figures 3 and 5.
    """

    keeps_floats = False

    width: Any = 1.0
    max_expansions: int = 10
    max_shrinkage: int = 100

    def __check_init__(self) -> None:
        require_positive(self, "width is a positive number, or an array of them", self.width, 1)
        require_counts(self, max_expansions=0, max_shrinkage=1)

    def init(self, position: Any, log_density: LogDensity) -> libraries.slice.SliceState:
        return libraries.slice.init(position, log_density)

    def step(
        self, key: PRNGKeyArray, state: libraries.slice.SliceState, log_density: LogDensity
    ) -> tuple[libraries.slice.SliceState, libraries.slice.SliceInfo]:
        size = ravel_pytree(state.position)[0].size
        if np.shape(self.width) not in ((), (size,)):
            raise WeftError(
                f"slice_sampler: width has shape {np.shape(self.width)}; the position has {size} numbers, so it is () "
                f"or {(size,)}"
            )
        kernel = libraries.slice.build_coordinate_kernel(
            interval=libraries.slice.stepping_out,
            initial_widths=self.width,
            max_expansions=self.max_expansions,
            max_shrinkage=self.max_shrinkage,
        )
        return kernel(key, state, log_density)

    def report(self, info: Any) -> Info:
        return {
            "acceptance_rate": jnp.asarray(info.is_accepted, float),
            "n_steps": info.num_expansions + info.num_shrink,
        }
