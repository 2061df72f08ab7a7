"""What a staged program looks like before it runs: the table of its sites."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .compat import open_jaxpr
from .control import (
    eqn_holds_sites,
    eqn_site_names,
    estimated_p,
    holds_sites,
    lanes_p,
    marginal_p,
    scope_p,
)
from .errors import ModelError
from .keys import name_hash
from .sites import site_p
from .specs import SiteSpec
from .wiring import Wiring, states_derivative, wiring


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a recorded choice.

    Attributes:
        size: its length.
        name: its name, from ``axis_name`` of ``jax.vmap`` or from ``dims`` of a site; None if it has none.
        kind: what made it: ``"lanes"`` for ``jax.vmap``, ``"scan"`` for ``lax.scan``, ``"batch"`` for the distribution.
    """

    size: int
    name: str | None
    kind: str


@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """What is known of a site before the program runs.

    Attributes:
        address: the dotted address.
        kind: ``"sample"``, ``"factor"`` or ``"deterministic"``.
        shape: the shape of the recorded array; ``dtype`` is its dtype.
        axes: one entry for every leading axis of ``shape`` that is not an event axis.
        event_shape: the sizes of the event axes; ``event_dims`` are their names.
        distribution: the name of the distribution's class.
        support: the NumPyro constraint, if no traced value enters it.
        is_discrete: whether the distribution is discrete.
        reparametrised: whether an expectation is differentiated along the path through its draw.
        values: the values of one element, if the support is finite and known; ``num_values`` is their number.
        conditional: whether it stands in a branch, so that it may be idle.
        observed: whether its value is fixed inside the model.
        hidden: whether it is not recorded (``block``, or inside a ``while_loop``).
        why_hidden: the reason, for messages.
        masked: whether a mask decides where it counts.
        estimated: whether its density is an unbiased estimate, which takes a key (``marginal``, ``normalize``).
    """

    address: str
    kind: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[Axis, ...]
    event_shape: tuple[int, ...]
    distribution: str
    support: Any = None
    values: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    conditional: bool = False
    observed: bool = False
    hidden: bool = False
    why_hidden: str = ""
    masked: bool = False
    is_discrete: bool = False
    reparametrised: bool = False
    estimated: bool = False
    event_dims: tuple[str | None, ...] = ()

    def __repr__(self) -> str:
        axes = ", ".join(f"{a.name or a.kind}={a.size}" for a in self.axes)
        event = f" event {self.event_shape}" if self.event_shape else ""
        return f"<site {self.address!r}: {self.kind}, {self.distribution} ({axes}){event} {self.dtype}>"

    @property
    def num_values(self) -> int | None:
        """The number of values that one element may take, if it is finite and known."""
        return None if self.values is None else len(self.values)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The sizes of the axes that are not event axes."""
        return tuple(a.size for a in self.axes)

    @property
    def dims(self) -> tuple[str | None, ...]:
        """The names of all axes of ``shape``."""
        return (*(a.name for a in self.axes), *self.event_dims)

    @property
    def size(self) -> int:
        """The number of scalars."""
        return math.prod(self.shape)


Scope = dict[str, "SiteInfo | Scope"]


# --- the table --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Surroundings:
    """What stands around the equation that is walked."""

    prefix: tuple[str, ...] = ()
    axes: tuple[Axis, ...] = ()
    conditional: bool = False
    in_while: bool = False
    summed: bool = False  # whether the table also has the choices that are summed out

    def under(self, *axes: Axis) -> _Surroundings:
        return dataclasses.replace(self, axes=self.axes + axes)


def site_table(jaxpr: Any) -> dict[str, SiteInfo]:
    """Every site of a staged program by dotted address, in order.

    Raises:
        ModelError: if a name is used twice in a scope, if branches disagree on a name, or if a construct that Weft does
            not know holds a site.
    """
    return dict(_flat(_scope(jaxpr, _Surroundings())))


def summed_out(jaxpr: Any) -> dict[str, SiteInfo]:
    """The choices of a staged program that are summed out, by dotted address."""
    left = site_table(jaxpr)
    return {a: s for a, s in _flat(_scope(jaxpr, _Surroundings(summed=True))) if a not in left}


def _flat(scope: Scope) -> Iterator[tuple[str, SiteInfo]]:
    for node in scope.values():
        if isinstance(node, dict):
            yield from _flat(node)
        else:
            yield node.address, node


def _scope(jaxpr: Any, around: _Surroundings) -> Scope:
    """The sites of one scope. Sites in calls, loops and branches belong to the scope around these."""
    found: Scope = {}
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        if not eqn_holds_sites(eqn):
            continue
        for name, node in _equation(eqn, around).items():
            if name in found:
                raise ModelError(_used_twice(name, around, found[name]))
            found[name] = node
    hashes: dict[int, str] = {}
    for name in found:
        other = hashes.setdefault(name_hash(name), name)
        if other != name:
            raise ModelError(
                f"the names {other!r} and {name!r} hash alike, so their keys would be equal: rename one"
            )
    return found


def _equation(eqn: Any, around: _Surroundings) -> Scope:
    primitive, params = eqn.primitive, eqn.params
    if primitive is site_p:
        info = _info(params, around)
        return {info.address.rpartition(".")[2]: info}
    if primitive is scope_p:
        if params["name"] is None:  # the choices of an anonymous run have no address
            _scope(params["jaxpr"], _Surroundings())
            return {}
        inner = dataclasses.replace(around, prefix=(*around.prefix, params["name"]))
        return {params["name"]: _scope(params["jaxpr"], inner)}
    if primitive is estimated_p:
        nodes: Scope = {}
        for address, info in params["sites"].value:
            inner: Any = nodes
            for name in address[:-1]:
                inner = inner.setdefault(name, {})
            inner[address[-1]] = _moved(info, around)
        return nodes
    if primitive is marginal_p:
        scope = _scope(params["jaxpr"], around)
        for address in () if around.summed else params["addresses"]:
            scope = _without(scope, address)
        return scope
    if primitive is lanes_p:
        axes = [Axis(lane.whole, lane.name, "lanes") for lane in reversed(params["lanes"])]
        return _scope(params["jaxpr"], around.under(*axes))
    w = None if states_derivative(eqn) else wiring(eqn)
    if w is None:
        raise ModelError(
            f"{_listed(eqn)} inside {primitive.name!r}, which Weft has no rule for. Sites may stand in vmap, scan, "
            "cond, switch, jit, checkpoint, map, fori_loop of static length and while_loop; move the site out"
        )
    return _wired(eqn, w, around)


def _wired(eqn: Any, w: Wiring, around: _Surroundings) -> Scope:
    """The sites of a call, a loop or a branch."""
    if w.kind == "loop":
        around = around.under(Axis(w.rounds or 0, None, "scan"))
    elif w.kind == "branches":
        around = dataclasses.replace(around, conditional=True)
    elif w.kind == "unbounded":
        around = dataclasses.replace(around, in_while=True)
    merged: Scope = {}
    for body in w.bodies:
        if None in body.gives and holds_sites(body.jaxpr):
            raise ModelError(
                f"{_listed(eqn)} in the predicate of a while_loop: draw before the loop or in its body"
            )
        _merge(merged, _scope(body.jaxpr, around))
    return merged


def _without(scope: Scope, address: tuple[str, ...]) -> Scope:
    """The scope without the site at an address."""
    name, *rest = address
    node = scope.get(name)
    if rest and isinstance(node, dict):
        inner = _without(node, tuple(rest))
        return {n: inner if n == name else s for n, s in scope.items() if n != name or inner}
    return {n: s for n, s in scope.items() if n != name or rest}


def _listed(eqn: Any) -> str:
    names = eqn_site_names(eqn)
    return ("site " if len(names) == 1 else "sites ") + ", ".join(repr(n) for n in names)


def _merge(into: Scope, scope: Scope) -> None:
    for name, node in scope.items():
        other = into.setdefault(name, node)
        if other is node:
            continue
        if isinstance(other, dict) and isinstance(node, dict):
            _merge(other, node)
        elif isinstance(other, dict) or isinstance(node, dict):
            raise ModelError(
                f"{name!r} is a site in one branch and a nested program in another: rename one"
            )
        elif _form(other) != _form(node):
            raise ModelError(
                f"branches record {node.address!r} with different kinds, shapes or dtypes: {_form(other)} and "
                f"{_form(node)}. One address is one choice: make them agree, or use two names"
            )


def _form(info: SiteInfo) -> str:
    event = f" with event shape {info.event_shape}" if info.event_shape else ""
    return f"a {info.kind} site of shape {info.shape}{event} and dtype {info.dtype}"


def _info(params: dict[str, Any], around: _Surroundings) -> SiteInfo:
    spec: SiteSpec = params["spec"]
    lanes = tuple(Axis(lane.whole, lane.name, "lanes") for lane in reversed(params["lanes"]))
    names = (*spec.dims, *(None,) * len(spec.shape))
    batch = tuple(
        Axis(size, name, "batch") for size, name in zip(spec.whole_batch, names, strict=False)
    )
    axes = around.axes + lanes + batch
    parts = params["skeleton"].unpack([0.0] * params["skeleton"].num_arrays)
    why = (
        "it stands in a while_loop, whose choices are not recorded; use weft.loop"
        if around.in_while
        else ""
    )
    if spec.hidden:
        why = "it is hidden by block"
    return SiteInfo(
        address=".".join((*around.prefix, spec.name)),
        kind=spec.kind,
        shape=tuple(a.size for a in axes) + spec.event_shape,
        dtype=spec.dtype,
        axes=axes,
        event_shape=spec.event_shape,
        distribution=spec.label,
        support=None if spec.support is None else spec.support.value,
        values=None if spec.values is None else spec.values.value,
        conditional=around.conditional,
        observed=spec.kind == "sample" and "value" in parts and "observed" not in parts,
        hidden=bool(why),
        why_hidden=why,
        masked=parts.get("where") is not None,
        is_discrete=spec.discrete,
        reparametrised=spec.kind == "sample" and is_pathwise(params),
        event_dims=names[spec.batch_ndim : len(spec.shape)],
    )


def is_pathwise(params: Mapping[str, Any]) -> bool:
    """Whether the draw of a site is differentiated along its path, given the parameters of its equation.

    That needs a sampler with a derivative, and no gradient strategy that does otherwise. A site whose value is given is
    not drawn.
    """
    skeleton = params["skeleton"]
    payload = skeleton.unpack([0.0] * skeleton.num_arrays)
    if params["spec"].kind != "sample" or ("value" in payload and "observed" not in payload):
        return True
    asked = payload.get("grad")
    return params["spec"].reparametrised if asked is None else getattr(asked, "pathwise", False)


def _moved(info: SiteInfo, around: _Surroundings) -> SiteInfo:
    """The site of a program that stands inside another one, as the outer program sees it."""
    axes = around.axes + info.axes
    return dataclasses.replace(
        info,
        address=".".join((*around.prefix, info.address)),
        axes=axes,
        shape=tuple(a.size for a in around.axes) + info.shape,
        conditional=around.conditional or info.conditional,
        estimated=True,
    )


def _used_twice(name: str, around: _Surroundings, node: SiteInfo | Scope) -> str:
    what = "nested program" if isinstance(node, dict) else f"{node.kind} site"
    where = f" in {'.'.join(around.prefix)!r}" if around.prefix else ""
    return (
        f"the name {name!r} is used twice{where} (first by a {what}). Give each site of a scope its own name, or put "
        "the repeated part into a model and sample it under two names: sample('a', part(...)), sample('b', part(...)). "
        "If one jax construct stages the function more than once (lax.map with a batch_size that leaves a remainder, "
        "associative_scan), use jax.vmap or lax.scan"
    )
