"""The rule of a site: a choice that is summed out is a table, and the density of any other choice is a factor.

The table of a finite choice holds its values. That of a continuous choice holds the points of its family
(``families``). In both cases its own density is a factor over it. Normal choices have no table (``normal_sites``).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.errors import DensityError, ModelError
from weft.ppl.stage.interpreter import Context
from weft.ppl.stage.records import Records
from weft.ppl.stage.sites import Site, site_p

from .conjugacy import certify, family_of
from .factors import PROBE, Scale, labels_of
from .families import Family
from .normal_sites import choice, is_normal, observe
from .placements import placed
from .plan import Elimination
from .region import Region, addresses, rule
from .scores import Score
from .tables import (
    Entangled,
    Plate,
    PlateAxes,
    Table,
    Variable,
    apply,
    axes_of,
    is_table,
    slopes_of,
)

IMPOSSIBLE = -1e30
"""As good as minus infinity: its exponential is zero, and derivatives stay finite."""


class Weights(NamedTuple):
    """Given at a choice that is summed out: numbers added to its log density.

    For a finite choice there is one for each of its values (the last axis). For a continuous choice each is multiplied
    by a number of the choice.

    Attributes:
        log_weights: these numbers.
        squares: for a normal choice, a matrix for each of its elements. It is multiplied by the outer product of the
            element, less ``centre``.
    """

    log_weights: jax.Array
    squares: jax.Array | None = None
    centre: jax.Array | None = None


@rule(site_p)
def _site(region: Region, eqn: Any, ins: list[Any], context: Context) -> tuple[list[Any], Records]:
    address = (*context.prefix, eqn.params["spec"].name)
    site = Site(eqn.params, ins, address, context.axes)
    if address not in region.plan.targets:
        return _kept(region, eqn, site, context)
    value = (_finite if site.spec.discrete else _continuous)(region, eqn, site, context)
    return [value], {}


# --- choices that are kept --------------------------------------------------------------------------------------------


def _kept(region: Region, eqn: Any, site: Site, context: Context) -> tuple[list[Any], Records]:
    """A choice that is kept, a factor or a record. Its parameters may be tables."""
    limit, name = region.plan.limit, site.name
    if site.spec.kind == "deterministic" and any(map(is_table, site.operands)):
        value = apply(lambda operands: site.at(operands).part("value"), limit, site.operands)
        return [value], {}  # recover() knows its value
    scale, site = _unscaled(site)
    certify(eqn, site, context)

    def handle(operands: Any, given: Any) -> Any:
        return region.kept.site(site.at(operands), None, given)

    value, record, terms = apply(handle, limit, site.operands, context.given.get(name))
    if site.spec.kind == "sample" and is_table(value):
        raise ModelError(_unknown_value(site, value.axes))
    term = terms.get("log_density")
    if slopes_of(term):
        observe(region, site, value, term, scale, context)
    elif term is not None:
        region.weigh(term, site.address, scale)
    record = None if record is None else _recorded(region, site, record)
    return [value], {} if record is None else {name: record}


def _recorded(region: Region, site: Site, record: dict[str, Any]) -> dict[str, Any]:
    """A record without the entries that depend on choices which are summed out."""
    density = record["value"]
    if is_table(density):
        if getattr(region.kept, "record", None) != "log_density":
            raise ModelError(_unknown_value(site, density.axes))
        region.shared[site.address] = labels_of(density)
        record = {"value": jnp.zeros(density.shape, density.dtype)}
    return {k: v for k, v in record.items() if not is_table(v)}


def _unknown_value(site: Site, axes: PlateAxes) -> str:
    return (
        f"the value of {'.'.join(site.address)!r} is not known without {addresses(axes)}: its support, or whether it "
        "is drawn at all, depends on that. Give it a support that does not, or keep the choice"
    )


def _unscaled(site: Site) -> tuple[Scale, Site]:
    """The scale of a site, and the site with scale one. Sums come before scaling."""
    places = site.skeleton.unpack(range(site.skeleton.num_arrays)).get("scale", ())
    operands = [jnp.ones_like(x) if i in places else x for i, x in enumerate(site.operands)]
    return tuple(site.operands[i] for i in places), site.at(operands)


# --- choices that are summed out --------------------------------------------------------------------------------------


def _finite(region: Region, eqn: Any, site: Site, context: Context) -> Table:
    """A finite choice: returns the table of its values, and adds its own density as a factor."""
    spec, name, shape = site.spec, ".".join(site.address), site.shape
    listed = None if spec.values is None else np.asarray(spec.values.value)
    if "value" in site.parts and "observed" not in site.parts:
        raise ModelError(f"the choice {name!r} is given already, so there is nothing to sum out")
    if listed is None or spec.event_shape:
        raise ModelError(
            f"the choice {name!r} ({spec.label}) cannot be summed out: its values are not finitely many single "
            "numbers that are known when the model is staged (Bernoulli, Categorical, DiscreteUniform, Binomial "
            "with a plain total)"
        )
    copies = math.prod(shape)
    joint = region.plan.options.joint and copies > 1
    if joint:
        index = _joint_indices(region, name, len(listed), copies)
        values, axes = listed[index].reshape(len(index), *shape), ()
    else:
        index = np.zeros((1, copies), int)
        values = np.broadcast_to(listed.reshape(-1, *(1,) * len(shape)), (len(listed), *shape))
        axes = tuple(i for i, size in enumerate(shape) if size != 1)
    variable = _variable(region, site, context, len(values), axes, None, copies if joint else 1)
    value = Table(np.asarray(values, spec.dtype), {variable: axes})
    _prior(region, eqn, site, context, value)
    weights = context.given.get(site.name)
    if isinstance(weights, Weights):
        extra = jnp.moveaxis(weights.log_weights, -1, 0)
        if joint:
            extra = jnp.sum(extra.reshape(-1, copies)[index, np.arange(copies)], -1)
            extra = extra.reshape(-1, *(1,) * len(shape))
            extra = extra * (np.arange(copies) == 0).reshape(shape)
        region.weigh(Table(extra, {variable: axes}), site.address, _unscaled(site)[0])
    return value


def _joint_indices(region: Region, name: str, num_values: int, copies: int) -> np.ndarray:
    """All joint values of some copies, as indices of their values: ``(terms, copies)``."""
    terms, most = num_values**copies, region.plan.options.max_terms
    if terms > most:
        raise Entangled(
            f"joint=True sums over {num_values}^{copies} = {terms:,} joint values of {name!r}, more than "
            f"max_terms={most:,}"
        )
    return np.indices((num_values,) * copies).reshape(copies, terms).T


def _continuous(region: Region, eqn: Any, site: Site, context: Context) -> Table:
    """A choice that is integrated out: returns the table of its points, and adds its own density as a factor."""
    plan, spec, name, shape = region.plan, site.spec, ".".join(site.address), site.shape
    weights = context.given.get(site.name)
    weights = weights if isinstance(weights, Weights) else None
    d = site.skeleton.unpack(range(site.skeleton.num_arrays))["d"]
    if is_normal(d):
        certify(eqn, site, context, normal=True)
        return choice(region, site, context, weights)
    family = family_of(d, spec.event_shape)
    if family is None:
        raise DensityError(
            f"the choice {name!r} ({spec.label}) cannot be integrated out: priors of which a closed form is known "
            "are Normal, MultivariateNormal, LowRankMultivariateNormal, Beta, Gamma, Exponential, InverseGamma, "
            "Dirichlet, Wishart and InverseWishart"
        )
    if "value" in site.parts:
        raise ModelError(
            f"the choice {name!r} is given, in part at least; it cannot be integrated out"
        )
    copies = shape[: len(shape) - len(family.event)]
    if plan.options.joint and math.prod(copies) > 1:
        raise Entangled(
            f"copies of {name!r} ({spec.label}) meet; only normal choices can be integrated jointly"
        )
    axes = tuple(i for i, size in enumerate(copies) if size != 1)
    variable = _variable(region, site, context, family.num_points, axes, family, 1)
    plan.limit.check([variable], f"the choice {name!r}")
    region.placements[variable] = placement = placed(region, site, family)
    points = placement.points(family).reshape(-1, *shape).astype(spec.dtype)
    value = Table(points, {variable: axes}, {variable: (1.0, True)})
    _prior(region, eqn, site, context, value)
    if weights is not None:
        extra = weights.log_weights * family.statistic(points)
        own = extra.reshape(len(points), *copies, -1) if family.event else extra
        own = jnp.sum(own, -1) if family.event else own
        region.weigh(Table(own, {variable: axes}), (PROBE,), _unscaled(site)[0])
    return value


def _variable(
    region: Region,
    site: Site,
    context: Context,
    num_values: int,
    axes: tuple[int, ...],
    family: Family | None,
    joint: int,
) -> Variable:
    """The variable of a choice: that of the same choice in another branch, if there is one, or a new one."""
    name, plan = ".".join(site.address), region.plan
    found = region.known.get(site.address)
    if found is None or (found.num_values, found.family) != (num_values, family):
        plates = tuple(Plate(site.shape[i], f"axis {i} of {name!r}") for i in axes)
        found = region.known[site.address] = Variable(name, num_values, plates, family)
        region.created.append(found)
    region.keys[found] = context.keys.get(site.name)
    copies = (*plan.limit.lanes, *(p.size for p in found.plates))
    plan.rules[name] = Elimination(site.spec.label, num_values, copies, family, joint)
    return found


def _prior(region: Region, eqn: Any, site: Site, context: Context, value: Table) -> None:
    """Count the density of a choice that is summed out."""
    scale, site = _unscaled(site)
    certify(eqn, site, context, value)
    drawn = isinstance(region.kept, Score) and region.kept.drawn

    def log_prob(operands: Any, value: Any) -> Any:
        here = site.at(operands)
        # This holds where a mask is False, too: idle copies sum to one.
        own = here.guarded().log_prob(value)
        if "observed" in here.parts:
            fixed = here.part("value") == value
            known = jnp.where(fixed, 0.0 if drawn else own, IMPOSSIBLE)
            own = jnp.where(here.part("observed"), known, own)
        return own

    own = apply(log_prob, region.plan.limit, site.operands, value)
    if is_table(own) and site.spec.discrete:
        # Some distributions give the least float to impossible values. Sums of it would overflow.
        own = own.like(jnp.maximum(own.array, IMPOSSIBLE))
    region.weigh(own, site.address, scale)
    if not value.axes.keys() <= axes_of(own).keys():  # uniform, and yet to be summed out
        nothing = jnp.zeros(value.array.shape, jnp.result_type(float))
        region.weigh(Table(nothing, value.axes), site.address, scale)
