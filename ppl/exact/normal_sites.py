"""Sites with normal choices that are summed out: their priors, and the evidence that other sites give on them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from weft.ppl.programs.handlers import expand
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.interpreter import Context
from weft.ppl.stage.sites import Site

from .factors import PROBE, Scale
from .families import base_of
from .gaussian import Quadratic, times
from .normals import NOISE, Evidence, Prior, unit_slope
from .plan import Elimination
from .region import Region, addresses
from .scores import Score
from .semirings import best, drawn
from .small import diagonal, solve_lower
from .tables import (
    Entangled,
    Plate,
    Slope,
    Table,
    Variable,
    affine,
    apply,
    at_zero,
    axes_of,
    is_table,
    slopes_of,
    straightened,
    variables_of,
)

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Centred(dist.Distribution):
    """A normal law around zero with a covariance that may be singular."""

    support = dist.constraints.real_vector  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    pytree_data_fields = ("covariance",)

    def __init__(self, covariance: jax.Array) -> None:
        self.covariance = covariance
        super().__init__(covariance.shape[:-2], covariance.shape[-1:])

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        values, vectors = jnp.linalg.eigh(self.covariance)
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        noise = jax.random.normal(key, shape, self.covariance.dtype)
        return times(vectors, noise * jnp.sqrt(jnp.maximum(values, 0)))

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """The log density along the directions in which the law has any spread."""
        values, vectors = jnp.linalg.eigh(self.covariance)
        there = values > jnp.finfo(values.dtype).eps * values.shape[-1] * values[..., -1:]
        values = jnp.where(there, values, 1)
        along = jnp.where(there, times(jnp.swapaxes(vectors, -1, -2), value), 0)
        constant = jnp.where(there, jnp.log(values) / 2 + HALF_LOG_TWO_PI, 0)
        return -jnp.sum(along**2 / values / 2 + constant, -1)


VECTORS = dist.MultivariateNormal, dist.LowRankMultivariateNormal, Centred


def is_normal(d: Any) -> bool:
    """Whether a distribution has a normal law: by the density that its class states, not by its name."""
    base = base_of(d)
    return any(
        isinstance(base, known) and type(base).log_prob is known.log_prob
        for known in (dist.Normal, *VECTORS)
    )


def _is_vector(d: Any) -> bool:
    return isinstance(base_of(d), VECTORS)


def _parameters(d: Any) -> tuple[Any, Any]:
    """The mean of a normal distribution in its full shape, and the root of its covariance (here the scale)."""
    base, shape = base_of(d), d.batch_shape + d.event_shape
    if isinstance(base, Centred):
        return jnp.zeros(shape, base.covariance.dtype), base.covariance
    if isinstance(base, dist.Normal):
        loc, root = base.loc, jnp.broadcast_to(jnp.asarray(base.scale), shape)
    else:
        loc, root = base.loc, jnp.broadcast_to(base.scale_tril, (*shape, shape[-1]))
    return jnp.broadcast_to(jnp.asarray(loc), shape), root


def _named(site: Site) -> str:
    return ".".join(site.address)


def _law(region: Region, site: Site) -> tuple[Any, Any]:
    """The mean and the root of the covariance of a normal site. The mean may be affine in normal choices."""

    def parameters(operands: Any) -> Any:
        return site.at(operands).over_lanes(lambda payload: _parameters(payload["d"]))

    loc, root = apply(parameters, region.plan.limit, site.operands)
    _refuse_curved(site, loc, "mean")
    if slopes_of(root):
        raise ModelError(
            f"site {_named(site)!r} ({site.spec.label}): its scale depends on {addresses(slopes_of(root))}, which is "
            "summed out and normal: only a mean can depend on a normal choice. Keep one of the two as a choice"
        )
    return loc, root


def _refuse_curved(site: Site, x: Any, what: str) -> None:
    if is_table(x) and x.curved:
        raise ModelError(
            f"site {_named(site)!r} ({site.spec.label}) is not quadratic in {addresses(x.slopes)}: its {what} is not "
            f"an affine function of it, by the equation {x.curved}. So that cannot be integrated out"
        )


# --- choices that are summed out --------------------------------------------------------------------------------------


def choice(region: Region, site: Site, context: Context, weights: Any) -> Table:
    """A normal choice that is integrated out: returns it as a table, and adds its prior."""
    spec, name, plan, shape = site.spec, _named(site), region.plan, site.shape
    payload = site.skeleton.unpack(range(site.skeleton.num_arrays))
    if "value" in site.parts and "observed" not in site.parts:
        raise ModelError(f"the choice {name!r} is given already, so there is nothing to sum out")
    vector = _is_vector(payload["d"])
    plan.limit.indices.active = True
    loc, root = _law(region, site)
    inner = 1 if vector else 0
    copies = shape[: len(shape) - inner]
    joint = name in plan.together or (plan.options.joint and math.prod(copies) > 1)
    squares = None if weights is None else weights.squares
    if squares is not None:  # the numbers of an element are asked for jointly
        copies = shape[: len(shape) - (squares.ndim - len(shape))]
    axes = tuple(
        i for i, n in enumerate(copies) if n != 1 and not joint and (name, i) not in plan.together
    )
    sizes = [shape[i] for i in axes]
    dimension = math.prod(shape) // math.prod(sizes)
    if dimension**2 > plan.options.max_terms:
        raise Entangled(
            f"the {dimension:,} numbers of {name!r} would be integrated out jointly, and a covariance of them has more "
            f"than max_terms={plan.options.max_terms:,} entries. They meet because an equation combines several of its "
            "copies: let each observation read one copy only, of an axis of their own (vmap, repeat), or sum out "
            "fewer of the choices that meet"
        )
    variable = _variable(region, site, axes, dimension, context)
    value = affine(
        np.zeros(shape, spec.dtype), {variable: unit_slope(shape, axes, np.dtype(spec.dtype))}
    )
    scale = _scale(region, site, [variable])
    limit = plan.limit

    order = [*axes, *(i for i in range(len(shape)) if i not in axes)]

    def flat(x: Any) -> Any:
        """The axes of copies, then one for the numbers of a copy."""
        return jnp.transpose(x, order).reshape(*sizes, dimension)

    if "observed" in site.parts:
        value, loc, root = _in_part(region, site, value, loc, root, scale, context)
    mean = apply(flat, limit, loc)
    handed = isinstance(base_of(payload["d"]), Centred)

    def spread(matrices: Any, event: int = inner) -> Any:
        """A block diagonal matrix for each copy, from one for each element; elements have ``event`` axes."""
        if not event:
            return flat(matrices)[..., None] * np.eye(dimension, dtype=matrices.dtype)
        d = math.prod(shape[len(shape) - event :])
        blocks = jnp.transpose(matrices, [*order, *range(len(shape), matrices.ndim)])
        blocks = blocks.reshape(*sizes, dimension // d, d, d)
        if dimension == d:
            return blocks[..., 0, :, :]
        eye = np.eye(dimension // d, dtype=matrices.dtype)
        return jnp.einsum("ij,...ikl->...ikjl", eye, blocks).reshape(*sizes, dimension, dimension)

    if not handed:
        root = apply(functools.partial(_stated, vector=vector), limit, root)
    root = apply(spread, limit, root)
    if not handed:
        mean = _perturbed(region, mean, root, context.keys.get(site.name), limit)
    if plan.semiring is best and not handed:
        log_det = apply(_log_det, limit, root)
        region.weigh_copies(log_det, variable, site.address, scale)
    for x in (mean, root):
        for v, places in axes_of(x).items():
            for place, plate in zip(places, v.plates, strict=True):
                plate.merge(variable.plates[place])
    covariance = root if handed else None
    root = None if handed else root
    region.priors[variable] = Prior(variable, mean, root, covariance, scale)
    if weights is not None:
        probe = _probe(region, weights, value, variable, flat, spread)
        region.evidence.append(dataclasses.replace(probe, scale=scale))
    return value


def _stated(root: jax.Array, vector: bool) -> jax.Array:
    """A scale, or a root of a covariance; no number where it is no valid one, as in the density of the choice."""
    size = diagonal(root)[..., None, :] if vector else root
    return jnp.where(size >= 0, root, jnp.nan)


def _log_det(root: jax.Array) -> jax.Array:
    """The logarithm of the normalising constant of a law with this root of its covariance."""
    return -jnp.sum(jnp.log(diagonal(root)) + HALF_LOG_TWO_PI, -1)


def _perturbed(region: Region, mean: Any, root: Any, key: Any, limit: Any) -> Any:
    """The mean, moved by a draw of the noise where ``NOISE`` is one."""
    if region.plan.semiring is not drawn or key is None:
        return mean
    shape = mean.shape if is_table(mean) else jnp.shape(mean)
    noise = jax.random.normal(key, shape, mean.dtype)
    move = apply(lambda t, e: times(t, e)[..., None], limit, root, noise)
    return _with_noise(mean, move, limit)


def _with_noise(x: Any, noise: Any, limit: Any) -> Any:
    """A value to which noise is added where ``NOISE`` is one."""
    known = slopes_of(x).get(NOISE)
    noise = noise if known is None else apply(jnp.add, limit, known.value, noise)
    return affine(at_zero(x), {**slopes_of(x), NOISE: Slope(noise, ())})


def _variable(
    region: Region, site: Site, axes: tuple[int, ...], dimension: int, context: Context
) -> Variable:
    """The variable of a choice: that of the same choice in another branch, if there is one, or a new one."""
    name, plan = _named(site), region.plan
    found = region.known.get(site.address)
    if found is None or found.dimension != dimension:
        plates = tuple(Plate(site.shape[i], f"axis {i} of {name!r}", i) for i in axes)
        found = region.known[site.address] = Variable(name, 1, plates, None, dimension)
        region.created.append(found)
    copies = (*plan.limit.lanes, *(p.size for p in found.plates))
    plan.rules[name] = Elimination(site.spec.label, 1, copies, dimension=dimension)
    return found


def _in_part(
    region: Region, site: Site, value: Any, loc: Any, root: Any, scale: Any, context: Context
) -> tuple[Any, Any, Any]:
    """A choice of which some elements are given: its value, and the mean and the scale of the rest.

    What is given becomes evidence, and has a standard normal law in the prior that nothing reads.
    """
    limit, name = region.plan.limit, _named(site)
    if _is_vector(site.skeleton.unpack(range(site.skeleton.num_arrays))["d"]):
        raise ModelError(
            f"the choice {name!r} ({site.spec.label}) is given in part; only Normal choices can then be integrated out"
        )
    fixed = site.part("value")
    where = jnp.broadcast_to(expand(site.part("observed"), fixed), fixed.shape)
    if not (isinstance(region.kept, Score) and region.kept.drawn):
        _add(region, site, apply(jnp.subtract, limit, fixed, loc), root, where, scale, context)
    value = apply(lambda v: jnp.where(where, fixed, v), limit, value)
    loc = apply(lambda m: jnp.where(where, 0, m), limit, loc)
    root = apply(lambda s: jnp.where(where, 1, s), limit, root)
    return value, loc, root


def _probe(
    region: Region,
    weights: Any,
    value: Any,
    v: Variable,
    flat: Callable[[Any], Any],
    spread: Callable[[Any, int], Any],
) -> Evidence:
    """Evidence that is zero, and whose derivative by the weights is the choice; or a square of it."""
    limit = region.plan.limit
    rows = apply(flat, limit, value)
    plates = tuple(p.root() for p in v.plates)
    linear = flat(weights.log_weights)
    precision = None
    if weights.squares is not None:
        rows = apply(jnp.subtract, limit, rows, flat(weights.centre))
        precision = -2 * spread(weights.squares, weights.squares.ndim - weights.centre.ndim)
    form = Quadratic(precision, linear, jnp.zeros(linear.shape[:-1], linear.dtype))
    return Evidence(rows, form, plates, (), (PROBE,), True)


# --- choices that are kept --------------------------------------------------------------------------------------------


def observe(
    region: Region, site: Site, value: Any, term: Table, scale: Any, context: Context
) -> None:
    """Count the density of a kept choice, or of a factor, that depends on normal choices.

    ``term`` is its log density, of which only the axes are known. ``scale`` is the number of times that it counts.
    """
    scale = _checked_scale(site, scale, term.slopes)
    payload = site.skeleton.unpack(range(site.skeleton.num_arrays))
    d = payload.get("d")
    if site.spec.kind == "sample" and d is not None and is_normal(d):
        loc, root = _law(region, site)
        away = apply(jnp.subtract, region.plan.limit, value, loc)
        _add(region, site, away, root, _counted(region, site, context), scale, context)
        return
    _expanded(region, site, value, term, scale, context)


def _scale(region: Region, site: Site, variables: Any) -> Scale:
    places = site.skeleton.unpack(range(site.skeleton.num_arrays)).get("scale", ())
    return _checked_scale(site, tuple(site.operands[i] for i in places), variables)


def _checked_scale(site: Site, scale: Scale, variables: Any) -> Scale:
    if any(map(jnp.ndim, scale)):
        raise ModelError(
            f"site {_named(site)!r} depends on {addresses(variables)} and has a scale for each of its elements: a sum "
            "over choices can be scaled as a whole only"
        )
    return scale


def _counted(region: Region, site: Site, context: Context) -> Any:
    """Where a site counts: None if everywhere. It may depend on finite choices."""
    limit, given = region.plan.limit, context.given.get(site.name)
    plain: list[bool] = []

    def counted(operands: Any, given: Any) -> Any:
        here = site.at(operands)
        density = jax.eval_shape(here.log_prob, jnp.zeros(site.shape, site.spec.dtype))
        found = []
        for number in (0.0, 1.0):
            stated = jnp.full(density.shape, number, density.dtype)
            probe = copy.copy(here)
            probe.guarded = lambda probe=probe: probe  # type: ignore[method-assign]
            probe.log_prob = probe.log_prob_anywhere = lambda _, x=stated: x  # type: ignore[method-assign]
            term = region.kept.site(probe, None, given)[2]["log_density"]
            plain.append(term is stated)
            found.append(term)
        return found[1] - found[0] != 0

    operands = [at_zero(x) for x in site.operands]
    where = apply(counted, limit, operands, given)
    return None if all(plain) else where


def _add(
    region: Region, site: Site, away: Any, root: Any, where: Any, scale: Any, context: Context
) -> None:
    """Count a normal density at a value minus its mean. The mean is affine in normal choices."""
    limit = region.plan.limit
    vector = _is_vector(site.skeleton.unpack(range(site.skeleton.num_arrays))["d"])

    def guarded(where: Any, away: Any, root: Any) -> Any:
        where = expand(where, away[..., 0] if vector else away)
        idle = jnp.eye(root.shape[-1], dtype=root.dtype) if vector else 1
        own = (where[..., None], where[..., None, None]) if vector else (where, where)
        return jnp.where(own[0], away, 0), jnp.where(own[1], root, idle)

    def whitened(away: Any, root: Any) -> Any:
        if not vector:
            return away / root
        return solve_lower(root, away[..., None])[..., 0]

    def constant(where: Any, root: Any) -> Any:
        """The normalising constant, where the site counts."""
        log_scale = jnp.log(diagonal(root) if vector else root)
        found = -log_scale - HALF_LOG_TWO_PI
        found = jnp.sum(found, -1) if vector else found
        return found if where is None else jnp.where(expand(where, found), found, 0)

    unit = None if vector else _same_scale(region, site)
    if where is not None:
        away, root = apply(guarded, limit, where, away, root)
    rows = away if unit is not None else apply(whitened, limit, away, root)
    key = context.keys.get(site.name)
    if region.plan.semiring is drawn and key is not None:
        noise = jax.random.normal(jax.random.fold_in(key, 1), rows.shape, rows.dtype)
        if where is not None:

            def keep(w, n):
                return jnp.where(
                    expand(w, n[..., 0] if vector else n)[..., None] if vector else expand(w, n),
                    n,
                    0,
                )

            noise = apply(keep, limit, where, noise)
        noise = apply(lambda n, u: n[..., None] * u, limit, noise, 1.0 if unit is None else unit)
        rows = _with_noise(rows, noise, limit)
    labels = _labels(site, [rows, apply(constant, limit, where, root)], len(rows.shape) - vector)
    plates = tuple(p.root() for p in labels if p is not None)
    first = [i for i, p in enumerate(labels) if p is not None]
    rest = [i for i, p in enumerate(labels) if p is None]

    def fold(x: Any) -> Any:
        x = jnp.transpose(x, [*first, *rest, *range(len(labels), x.ndim)])
        return x.reshape(*(p.size for p in plates), -1 if x.size else 0)

    rows = apply(fold, limit, rows)
    zero = jnp.zeros(tuple(p.size for p in plates), rows.dtype)
    if unit is not None and where is None:
        n = rows.shape[-1]
        total = apply(lambda u: zero - n * (jnp.log(u) + HALF_LOG_TWO_PI), limit, unit)
    else:
        total = apply(lambda w, r: jnp.sum(fold(constant(w, r)), -1), limit, where, root)
    form = Quadratic(None, None, total if unit is None else zero)
    found = Evidence(rows, form, plates, scale, (_named(site),))
    if unit is not None:
        found = dataclasses.replace(found, unit=unit, constant=total)
    region.evidence.append(found)


def _same_scale(region: Region, site: Site) -> Any:
    """The scale of a normal site, if it is one number for all of its elements."""
    base = base_of(site.skeleton.unpack(range(site.skeleton.num_arrays))["d"])
    place = base.scale
    if not isinstance(place, int) or any(lane.mapped[place] for lane in site.lanes):
        return None
    scale = site.operands[place]
    shape = scale.shape if is_table(scale) else jnp.shape(scale)
    if math.prod(shape) != 1:
        return None
    return apply(lambda x: jnp.reshape(x, ()), region.plan.limit, scale)


def _labels(site: Site, values: Sequence[Any], ndim: int) -> list[Plate | None]:
    """For every axis of a density, the plate along it. Plates that share an axis are merged."""
    labels: list[Plate | None] = [None] * ndim
    for x in values:
        for v, places in axes_of(x).items():
            for place, plate in zip(places, v.plates, strict=True):
                known = labels[place]
                if known is not None:
                    known.merge(plate)
                labels[place] = plate
    roots = [p.root() for p in labels if p is not None]
    if len(set(roots)) < len(roots):
        variables = variables_of(values)
        error = Entangled(
            f"at site {_named(site)!r} every copy of {addresses(variables)} meets every other; "
            "marginalize(..., joint=True) sums over all their joint values"
        )
        error.meeting = frozenset(v.address for v in variables if v.normal and v.plates)
        raise error
    return labels


def _expanded(
    region: Region, site: Site, value: Any, term: Table, scale: Any, context: Context
) -> None:
    """Count any density that is quadratic in normal choices, by its derivatives where they are zero."""
    limit, given = region.plan.limit, context.given.get(site.name)
    normal = list(term.slopes)
    sources, compute = straightened(site.operands)
    read = [i for i, x in enumerate(sources) if slopes_of(x)]
    labels = _labels(site, [term], len(term.shape))
    plates = tuple(p.root() for p in labels if p is not None)
    first = [i for i, p in enumerate(labels) if p is not None]
    rest = [i for i, p in enumerate(labels) if p is None]
    sizes = [v.dimension or 0 for v in normal]
    slopes = [[_column(sources[i], v, d) for v, d in zip(normal, sizes, strict=True)] for i in read]

    def expansion(sources: Any, slopes: Any, given: Any) -> Any:
        columns = [jnp.concatenate(own, -1) for own in slopes]

        def density(z: Any) -> Any:
            full = list(sources)
            for i, column in zip(read, columns, strict=True):
                full[i] = full[i] + column @ z
            return region.kept.site(site.at(compute(full)), None, given)[2]["log_density"]

        zero = jnp.zeros(sum(sizes), columns[0].dtype)
        found = density(zero), jax.jacfwd(density)(zero), jax.hessian(density)(zero)
        n = len(plates)

        def fold(x: Any) -> Any:
            x = jnp.transpose(x, [*first, *rest, *range(len(labels), x.ndim)])
            return jnp.sum(x, tuple(range(n, len(labels))))

        return [fold(x) for x in found]

    at = [at_zero(x) for x in sources]
    constant, linear, precision = apply(expansion, limit, at, slopes, given)
    precision = apply(jnp.negative, limit, precision)
    key = context.keys.get(site.name)
    if region.plan.semiring is drawn and key is not None:

        def noisy(linear: Any, precision: Any) -> Any:
            """One more row, for the noise: a root of the precision times noise is added to the linear term."""
            noise = jax.random.normal(jax.random.fold_in(key, 1), linear.shape, linear.dtype)
            values, vectors = jnp.linalg.eigh(precision)
            root = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
            pull = jnp.concatenate([-times(root, noise), jnp.sum(noise**2, -1, keepdims=True)], -1)
            pad = [(0, 0)] * (linear.ndim - 1)
            precision = jnp.pad(precision, [*pad, (0, 1), (0, 1)])
            precision = precision.at[..., -1, :].set(pull).at[..., :, -1].set(pull)
            return jnp.pad(linear, [*pad, (0, 1)]), precision

        linear, precision = apply(noisy, limit, linear, precision)
        normal, sizes = [*normal, NOISE], [*sizes, 1]
    shape = (*(p.size for p in plates), sum(sizes))
    own = {}
    for k, v in enumerate(normal):
        eye = np.eye(sum(sizes), dtype=linear.dtype)[:, sum(sizes[:k]) : sum(sizes[: k + 1])]
        places = tuple(plates.index(p.root()) for p in v.plates)
        known = own[v].value if v in own else 0
        own[v] = Slope(np.broadcast_to(eye, (*shape, sizes[k])) + known, places)
    rows = affine(np.zeros(shape, linear.dtype), own)
    form = Quadratic(precision, linear, constant)
    region.evidence.append(Evidence(rows, form, plates, scale, (_named(site),)))


def _column(x: Any, v: Variable, d: int) -> Any:
    slope = slopes_of(x).get(v)
    return np.zeros((*x.shape, d), x.dtype) if slope is None else slope.value
