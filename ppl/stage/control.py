"""Scopes, and control flow that holds sites under ``jax.vmap``.

``scope_p`` is a nested program. Its choices are recorded under its name.

``lanes_p`` is an equation of control flow (cond, scan, while or scope) that holds sites and stands under a vmap. It
keeps the *un-vmapped* body. JAX's own rules would lose what is needed here. They turn a ``cond`` with a mapped
predicate into a select, and the staged jaxpr no longer tells which branch was taken. They turn a vmapped scan into one
scan over a batched body, and its lanes are no longer separate series. So this file wraps the batching rules of these
primitives. An equation without sites goes to JAX's own rule unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, mlir

from .compat import (
    Primitive,
    ShapedArray,
    cond_p,
    fancy_primitive_batchers,
    like,
    open_jaxpr,
    scan_p,
    while_p,
)
from .errors import GradientError, ModelError
from .jaxprs import Holds, Place, equations
from .sites import Lane, lane_shape, site_p, stack_lane
from .wiring import Wiring, whole, wired

# --- a nested program -------------------------------------------------------------------------------------------------

scope_p = Primitive("scope")
scope_p.multiple_results = True
"""Parameters: ``name`` (None for an anonymous run, ``draw``), ``jaxpr`` (closed, no constants), ``outs`` (avals) and,
of an anonymous run, ``given`` (the structure of the entries that are its last operands)."""


@scope_p.def_abstract_eval
def _(
    *_: Any, name: str | None, jaxpr: Any, outs: tuple[Any, ...], given: Any = None
) -> list[ShapedArray]:
    return [ShapedArray(o.shape, o.dtype) for o in outs]


@scope_p.def_impl
def _outside(*_: Any, name: str | None, **__: Any) -> Any:
    raise ModelError(
        f"the nested program {name!r} is sampled outside a program: decorate the function with @gen and run it with "
        "model(*args).simulate(key)"
        if name is not None
        else "draw(program) stands outside an expectation: put it into a function and call expect(f)(key, *args)"
    )


mlir.register_lowering(scope_p, lambda ctx, *_, **params: _outside(**params))


@wired("scope")
def _(eqn: Any) -> Wiring | None:
    """Results of an anonymous run are its trace, and not those of its jaxpr."""
    named = eqn.params["name"] is not None
    return Wiring("scope", (whole(eqn.params["jaxpr"], eqn),)) if named else None


# --- a program of which some choices are summed out -------------------------------------------------------------------

marginal_p = Primitive("marginal")
marginal_p.multiple_results = True
"""Parameters: ``jaxpr`` (without constants), ``addresses`` (paths of the choices from here), ``options``."""


@marginal_p.def_abstract_eval
def _(*_: Any, jaxpr: Any, **__: Any) -> list[ShapedArray]:
    return [ShapedArray(v.aval.shape, v.aval.dtype) for v in open_jaxpr(jaxpr)[0].outvars]


@marginal_p.def_impl
def _(*_: Any, jaxpr: Any, **__: Any) -> Any:
    raise ModelError(_outside_a_program(jaxpr))


mlir.register_lowering(marginal_p, lambda ctx, *_, **params: marginal_p.impl(**params))


@wired("marginal")
def _(eqn: Any) -> Wiring:
    return Wiring("marginal", (whole(eqn.params["jaxpr"], eqn),))


# --- choices whose density is estimated -------------------------------------------------------------------------------

estimated_p = Primitive("estimated")
estimated_p.multiple_results = True
"""Results: the values of the choices. Parameters: ``sites`` (pairs of their addresses from here and their SiteInfo);
``simulate``, a program that gives the values and log d, and ``score``, one that takes the values and gives log d';
``consts``, how many of the operands come first and belong to each alone; ``name``, for messages; ``scaled``, whether
the last operand multiplies the log density."""


@estimated_p.def_abstract_eval
def _(*_: Any, sites: Any, **__: Any) -> list[ShapedArray]:
    return [ShapedArray(info.shape, info.dtype) for _, info in sites.value]


@estimated_p.def_impl
def _(*_: Any, name: str, **__: Any) -> Any:
    raise ModelError(
        f"{name!r}, whose density is estimated, is sampled outside a program: run it with .random_weighted(key) or "
        ".estimate_log_density(key, choices)"
    )


mlir.register_lowering(estimated_p, lambda ctx, *_, **params: estimated_p.impl(**params))


# --- control flow under vmap ------------------------------------------------------------------------------------------

lanes_p = Primitive("lanes")
lanes_p.multiple_results = True
"""Parameters: ``jaxpr`` (closed, of one equation, for one lane) and ``lanes`` (innermost first)."""


@lanes_p.def_abstract_eval
def _(*_: Any, jaxpr: Any, lanes: tuple[Lane, ...]) -> list[ShapedArray]:
    return [ShapedArray(lane_shape(lanes) + o.shape, o.dtype) for o in jaxpr.out_avals]


@lanes_p.def_impl
def _(*_: Any, jaxpr: Any, **__: Any) -> Any:
    raise ModelError(_outside_a_program(jaxpr))


def _outside_a_program(jaxpr: Any) -> str:
    names = site_names(jaxpr)
    return (
        f"{'site' if len(names) == 1 else 'sites'} {', '.join(map(repr, names))} outside a program: decorate the "
        "function with @gen and run it with model(*args).simulate(key), .log_density(choices) or .given(data)"
    )


mlir.register_lowering(lanes_p, lambda ctx, *_, **params: lanes_p.impl(**params))


def _batch_lanes(axis_data: Any, args: Any, dims: Any, *, jaxpr: Any, lanes: Any) -> Any:
    args, lanes = stack_lane(axis_data, args, dims, lanes)
    outs = lanes_p.bind(*args, jaxpr=jaxpr, lanes=lanes)
    return outs, [0] * len(outs)


fancy_primitive_batchers[lanes_p] = _batch_lanes


@wired("lanes")
def _(eqn: Any) -> Wiring:
    lanes, body = eqn.params["lanes"], whole(eqn.params["jaxpr"], eqn)
    body = body._replace(
        sliced=tuple(sum(lane.mapped[i] for lane in lanes) for i in body.reads),
        stacked=(len(lanes),) * len(body.gives),
    )
    return Wiring("lanes", (body,), rounds=math.prod(lane.size for lane in lanes))


def _keep_unmapped(primitive: Primitive) -> Any:
    """A batching rule that binds ``lanes_p`` around the un-vmapped equation."""

    def rule(axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
        shapes = [
            jnp.shape(a) if d is None else jnp.shape(a)[:d] + jnp.shape(a)[d + 1 :]
            for a, d in zip(args, dims, strict=True)
        ]
        lane_avals = [like(a, shape) for a, shape in zip(args, shapes, strict=True)]
        jaxpr = jax.make_jaxpr(lambda *xs: primitive.bind(*xs, **params))(*lane_avals)
        if not args:  # without operands another vmap around could not batch it
            args, dims = [jnp.zeros(())], [None]
            jaxpr = jax.make_jaxpr(lambda _: primitive.bind(**params))(jnp.zeros(()))
        return _batch_lanes(axis_data, args, dims, jaxpr=jaxpr, lanes=())

    return rule


def _intercept(primitive: Primitive) -> None:
    original = fancy_primitive_batchers[primitive]
    keep = _keep_unmapped(primitive)

    def rule(axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
        jaxprs = [
            item
            for value in params.values()
            for item in (value if isinstance(value, (tuple, list)) else (value,))
            if hasattr(item, "eqns") or hasattr(item, "jaxpr")
        ]
        if any(holds_sites(j) for j in jaxprs):
            return keep(axis_data, args, dims, **params)
        return original(axis_data, args, dims, **params)

    fancy_primitive_batchers[primitive] = rule


for _primitive in (cond_p, scan_p, while_p):
    _intercept(_primitive)
for _primitive in (scope_p, marginal_p, estimated_p):
    fancy_primitive_batchers[_primitive] = _keep_unmapped(_primitive)


# --- derivatives through any of these ---------------------------------------------------------------------------------


def _refuse_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    held = site_names(params["jaxpr"]) if "jaxpr" in params else []
    names = ", ".join(map(repr, held)) or repr(params.get("name"))
    raise GradientError(
        f"jax.grad, jvp or linearize goes through a part of a model that holds the sites {names}, which have no value "
        "yet. Differentiate from outside instead: jax.grad of model(...).log_density(choices), or of expect(f)(key, "
        "...)"
    )


for _primitive in (scope_p, marginal_p, estimated_p, lanes_p):
    ad.primitive_jvps[_primitive] = _refuse_jvp


# --- folds ------------------------------------------------------------------------------------------------------------

holds_sites = Holds(lambda eqn: eqn.primitive in (site_p, scope_p, estimated_p))
"""Whether a site stands anywhere in a jaxpr; ``eqn_holds_sites`` asks the same of an equation."""

eqn_holds_sites = holds_sites.at


def scopes(place: Place) -> tuple[str, ...]:
    """The names of the nested programs around a place."""
    around = [eqn.params["name"] for eqn, _ in place.around if eqn.primitive is scope_p]
    return tuple(name for name in around if name)


def site_names(jaxpr: Any) -> list[str]:
    """The names of all sites in a jaxpr. Names of nested sites are dotted."""
    return _names(jaxpr)


def eqn_site_names(eqn: Any) -> list[str]:
    """The names of all sites in one equation."""
    return _names([eqn])


def _names(code: Any) -> list[str]:
    inside = equations(code, enter=lambda eqn: eqn.primitive is not estimated_p)
    return [
        ".".join((*scopes(place), *address))
        for eqn, place in inside
        for address in addresses_of(eqn)
    ]


def is_record(eqn: Any) -> bool:
    """Whether an equation only records what it reads (``deterministic``)."""
    return eqn.primitive is site_p and eqn.params["spec"].kind == "deterministic"


def addresses_of(eqn: Any) -> list[tuple[str, ...]]:
    """The addresses of the choices, factors and records that an equation makes, relative to the scope it stands in."""
    if eqn.primitive is site_p:
        return [(eqn.params["spec"].name,)]
    if eqn.primitive is estimated_p:
        return [address for address, _ in eqn.params["sites"].value]
    return []


def has_addresses(eqn: Any) -> bool:
    """Whether an equation holds sites with addresses. Sites in an anonymous run or behind an estimate have none."""
    anonymous = eqn.primitive is scope_p and eqn.params["name"] is None
    return not anonymous and eqn.primitive is not estimated_p and eqn_holds_sites(eqn)
