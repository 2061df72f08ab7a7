"""Where the points of a continuous choice are placed: around its prior mean, at likely values of the choices before it.

The values at the points determine the density wherever the points are. But in single precision the density is accurate
only near them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.sites import Site

from .families import Family, Placement
from .region import Region
from .tables import apply, axes_of, is_table


def placed(region: Region, site: Site, family: Family) -> Placement:
    """The points of a choice, placed by the moments of its prior."""

    def moments(operands: Any) -> Any:
        return site.at(operands).over_lanes(lambda payload: family.moments(payload["d"]))

    shape, event = site.shape, family.event
    mean, variance = apply(moments, region.plan.limit, site.operands)
    centre, scale = family.placement(_likely(region, mean, shape), _likely(region, variance, shape))
    copies = shape[: len(shape) - len(event)] if math.prod(shape) != math.prod(event) else ()
    form = (*(n for n in copies if n > 1), *event)
    centre, scale = (jax.lax.stop_gradient(x.reshape(form)) for x in (centre, scale))
    start = jnp.asarray(family.start, centre.dtype)
    return Placement(centre, scale, jnp.broadcast_to(start, centre.shape))


def _likely(region: Region, x: Any, shape: tuple[int, ...]) -> jax.Array:
    """A table at likely values of its choices."""
    array = x.array if is_table(x) else jnp.asarray(x)
    left = list(axes_of(x).items())
    while left:
        (variable, places), *left = left
        if variable.family is None or variable not in region.placements:
            array = array[0]
            continue
        weights = variable.family.weights(region.placements[variable].mean)
        weights = jnp.moveaxis(weights, -1, 0)
        sizes = [1] * (array.ndim - 1 - len(left))
        for place, plate in zip(places, variable.plates, strict=True):
            sizes[place] = plate.size
        order = sorted(range(len(places)), key=lambda i: places[i])
        weights = jnp.transpose(weights, [0, *(i + 1 for i in order)])
        weights = weights.reshape(len(weights), *(1,) * len(left), *sizes)
        array = jnp.sum(array * weights, 0)
    return jnp.broadcast_to(array.astype(jnp.result_type(float)), shape)
