"""Sites inside ``jax.shard_map``: which of their axes are split over which axes of the mesh.

The body of a ``shard_map`` is written for one shard. What a choice is for the whole program must be inferred from it. A
``jax.vmap`` over the rows of a shard makes one choice for each row of all shards. Any other choice is shared by all
shards. ``split_axes`` infers this when a program is staged, and writes it on lanes and sites (``Split``). After that
the program has whole sizes outside of the ``shard_map``, and the sizes of one shard inside.

Equations tie axes of equal length to each other. If an axis is tied to an axis of an operand or a result of the
``shard_map``, it is split in the same way. Whatever cannot be inferred is an error that names the site.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from .compat import (
    Literal,
    is_jaxpr,
    is_shard_map,
    open_jaxpr,
    replaced,
    shard_map_specs,
)
from .control import eqn_holds_sites, eqn_site_names, estimated_p, lanes_p, scope_p, scopes
from .errors import ModelError
from .jaxprs import Holds, Place, equations, flow
from .sites import site_p
from .splits import WHOLE, Split
from .ties import Axes, Ties
from .varying import SAME, listed, mesh_axes, refuse_mixed
from .wiring import is_loop, kind, wiring

_holds_shards = Holds(is_shard_map)


def split_axes(jaxpr: Any, num_consts: int = 0) -> Any:
    """The jaxpr, with its splits written on every site and lane inside a ``shard_map``.

    The first ``num_consts`` inputs are arrays that the program captured.

    Raises:
        ModelError: for a site that is neither one choice shared by all shards nor one choice for each row.
    """
    if not _holds_shards(jaxpr):
        return jaxpr
    told = _told(jaxpr, num_consts)

    def change(eqn: Any) -> Any:
        return _Body(eqn, told[id(eqn)]).split() if is_shard_map(eqn) else _inside(eqn, change)

    return _mapped(jaxpr, change)


def _told(jaxpr: Any, num_consts: int) -> dict[int, list[bool]]:
    """For the id of every ``shard_map``, which of its operands are no constants.

    A constant that the body captured is an operand with the spec ``P()``. But Python may have given it the length of
    one shard, as in ``np.zeros(len(rows))``. So such a spec does not tell that it is whole.
    """
    found: dict[int, list[bool]] = {}

    def transfer(eqn: Any, ins: list[bool], _: Place) -> list[bool] | None:
        if is_shard_map(eqn):
            before = found.get(id(eqn), ins)
            found[id(eqn)] = [a or b for a, b in zip(before, ins, strict=True)]
        elif wiring(eqn) is not None:
            return None
        return [True] * len(eqn.outvars)

    num_args = len(open_jaxpr(jaxpr)[0].invars) - num_consts
    flow(jaxpr, [False] * num_consts + [True] * num_args, transfer, any)
    return found


def types_vary(jaxpr: Any) -> Any:
    """The primitive of a ``shard_map`` that holds sites and was traced with ``check_vma``; None if there is none."""
    if not _holds_shards(jaxpr):
        return None
    held = (e for e, _ in equations(jaxpr, enter=eqn_holds_sites) if eqn_holds_sites(e))
    return next((e.primitive for e in held if is_shard_map(e) and e.params.get("check_vma")), None)


def _mapped(jaxpr: Any, change: Callable[[Any], Any]) -> Any:
    """The jaxpr, with ``change`` applied to the equations that hold sites."""
    old = open_jaxpr(jaxpr)[0].eqns
    new = [change(e) if eqn_holds_sites(e) else e for e in old]
    same = all(e is f for e, f in zip(old, new, strict=True))
    return jaxpr if same else replaced(jaxpr, eqns=new)


def _inside(eqn: Any, change: Callable[[Any], Any]) -> Any:
    """The equation, with ``change`` applied to the equations inside it.

    Anonymous and estimated programs were staged by themselves. What has no rule is refused by name.
    """
    if wiring(eqn) is None:
        return eqn

    def go(value: Any) -> Any:
        if isinstance(value, (tuple, list)) and any(map(is_jaxpr, value)):
            return type(value)(map(go, value))
        return _mapped(value, change) if is_jaxpr(value) else value

    params = {k: go(v) for k, v in eqn.params.items()}
    same = all(params[k] is v for k, v in eqn.params.items())
    return eqn if same else eqn.replace(params=params)


def _is_anonymous(eqn: Any) -> bool:
    return eqn.primitive is scope_p and eqn.params["name"] is None


# --- how the axes of a body are split ---------------------------------------------------------------------------------


class Made(NamedTuple):
    """Tells that an axis is made of the rows of one shard by a primitive: it is neither whole nor an axis of rows."""

    by: str


class _Found(NamedTuple):
    """A site or lanes in a body, and those of its axes that may be split."""

    name: str
    eqn: Any
    axes: Axes
    event: Axes = ()


@dataclasses.dataclass
class _Body:
    """The body of one ``shard_map``, and what is inferred from it.

    Attributes:
        eqn: the equation.
        told: for each operand, whether its spec tells that it is whole.
        ties: the axes of all arrays in the body.
        found: its sites and lanes, in order.
        loops: the loops that hold sites, each with the axis that it goes along.
        named: an axis for each name and size that a ``jax.vmap`` gives.
        lengths: the lengths, on one shard, of axes that are split.
        same: of collectives with one result for all shards: an axis of the operand, its axis of the result, and the
            axes of the mesh.
    """

    eqn: Any
    told: Sequence[bool]
    ties: Ties = dataclasses.field(default_factory=Ties)
    found: list[_Found] = dataclasses.field(default_factory=list)
    loops: list[tuple[Any, int]] = dataclasses.field(default_factory=list)
    named: dict[tuple[str, int], int] = dataclasses.field(default_factory=dict)
    lengths: set[int] = dataclasses.field(default_factory=set)
    same: list[tuple[int, int, frozenset[str]]] = dataclasses.field(default_factory=list)

    def split(self) -> Any:
        """The equation, with its splits written on the sites and lanes in its body."""
        if self.eqn.params.get("check_vma"):  # traced elsewhere, and kept by JAX
            raise ModelError(
                f"{listed(self.eqn)} in a shard_map of which JAX has inferred what is the same on all shards: call it "
                "with check_vma=False"
            )
        ins, outs = _specs(self.eqn)
        body = self.eqn.params["jaxpr"]
        args = [self.ties.axes(v.aval.shape) for v in open_jaxpr(body)[0].invars]
        known = [
            [s if whole or s != WHOLE else None for s in spec]
            for spec, whole in zip(ins, self.told, strict=True)
        ]
        self.state(args, known)
        self.state(self.visit(body, args, ()), outs)
        while self.settle() or self.pick():
            pass
        for loop, axis in self.loops:
            self.refuse_rows(loop, axis)
        found = iter(self.found)

        def change(eqn: Any) -> Any:
            if eqn.primitive is site_p:
                return eqn.replace(params={**eqn.params, **self.of_site(next(found))})
            if eqn.primitive is lanes_p:
                lanes = self.of_lanes(next(found))
                eqn = eqn.replace(params={**eqn.params, "lanes": lanes})
            return _inside(eqn, change)

        body = _mapped(body, change)
        refuse_mixed(body, ins, outs)
        return self.eqn.replace(params={**self.eqn.params, "jaxpr": body})

    def state(self, arrays: Sequence[Axes], specs: Sequence[Sequence[Split | None]]) -> None:
        """State how axes are split. None stands for an axis of which a spec tells nothing."""
        for axes, spec in zip(arrays, specs, strict=True):
            for axis, split in zip(axes, spec, strict=True):
                if split is not None:
                    self.ties.state(axis, split)
                if split not in (None, WHOLE):
                    self.lengths.add(self.ties.sizes[axis])

    def settle(self) -> bool:
        """Pass on new facts. Tells whether there were any."""
        waiting, self.same = self.same, []
        for a, b, over in waiting:
            known = self.ties.known(a)
            if any(isinstance(split, Split) and over & set(split.axes) for split in known):
                self.ties.state(b, WHOLE)
            elif known:
                self.ties.tie([a], [b])
            else:
                self.same.append((a, b, over))
        made = [self.note(by, lost, new) for by, lost, new in self.ties.made]
        return len(self.same) < len(waiting) or any(made)

    def pick(self) -> bool:
        """Note the axes of indices that pick rows, if nothing else tells of them. Tells whether there were any."""
        return any(
            self.note(by, picked, [axis])
            for by, picked, new in self.ties.picked
            for axis in new
            if not self.ties.known(axis)
        )

    def note(self, by: str, lost: Axes, new: Axes) -> bool:
        """Note that axes may be made of others. Tells whether some of these are rows, and that is new."""
        facts = set().union(*map(self.ties.known, lost)) - {WHOLE}
        made = {f for f in facts if isinstance(f, Made)} or {Made(by)}
        return bool(facts) and sum(self.ties.state(axis, f) for axis in new for f in made) > 0

    # --- the walk ---

    def visit(self, jaxpr: Any, args: Sequence[Axes], scope: tuple[str, ...]) -> list[Axes]:
        """Tie the axes of a jaxpr's arrays, given those of its arguments. Returns the axes of its results."""
        opened, _ = open_jaxpr(jaxpr)
        env = {v: self.ties.axes(v.aval.shape) for v in opened.constvars}
        env.update(zip(opened.invars, args, strict=True))

        def read(v: Any) -> Axes:
            return env[v] if not isinstance(v, Literal) else self.ties.axes(jnp.shape(v.val))

        for eqn in opened.eqns:
            outs = [self.ties.axes(v.aval.shape) for v in eqn.outvars]
            self.equation(eqn, [read(v) for v in eqn.invars], outs, scope)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in opened.outvars]

    def equation(self, eqn: Any, ins: list[Axes], outs: list[Axes], scope: tuple[str, ...]) -> None:
        _refuse(eqn)
        if eqn.primitive is site_p:
            self.site(eqn, ins, outs[0], scope)
        elif eqn.primitive is lanes_p:
            self.lanes(eqn, ins, outs, scope)
        elif eqn.primitive.name in SAME:
            self.collective(eqn, ins, outs)
        elif wiring(eqn) is None:
            self.ties.results(eqn, ins, outs)
        else:
            inside = (*scope, eqn.params["name"]) if eqn.primitive is scope_p else scope
            self.control(eqn, ins, outs, inside)

    def collective(self, eqn: Any, ins: list[Axes], outs: list[Axes]) -> None:
        """A collective with the same result on all shards. Its axes are tied to those of the operand, or are whole."""
        for a, b in zip(ins, outs, strict=True):
            new = eqn.params["all_gather_dimension"] if len(b) > len(a) else len(b)
            for axis in b[new : new + 1]:
                self.ties.state(axis, WHOLE)
            kept = [*b[:new], *b[new + 1 :]]
            self.same += [(x, y, mesh_axes(eqn)) for x, y in zip(a, kept, strict=True)]

    def control(self, eqn: Any, ins: list[Axes], outs: list[Axes], scope: tuple[str, ...]) -> None:
        """A call, a loop or a branch: tie what its bodies read and give, by its wiring."""
        rounds = [self.ties.axes([eqn.params["length"]])] if is_loop(eqn) else []
        for body in wiring(eqn).bodies:  # type: ignore[union-attr]
            reads = list(zip(body.reads, body.sliced, strict=True))
            results = self.visit(body.jaxpr, [ins[i][n:] for i, n in reads], scope)
            along = rounds + [ins[i][:n] for i, n in reads if n]
            for axes, to, back, n in zip(results, body.gives, body.back, body.stacked, strict=True):
                if to is not None:
                    self.ties.tie(axes, outs[to][n:])
                    along += [outs[to][:n]] if n else []
                if back is not None:
                    self.ties.tie(axes, ins[back])
            for axes in along:
                self.ties.tie(along[0], axes)
            if along and eqn_holds_sites(eqn):
                self.loops.append((eqn, along[0][0]))

    def site(self, eqn: Any, ins: list[Axes], out: Axes, scope: tuple[str, ...]) -> None:
        spec, lanes = eqn.params["spec"], eqn.params["lanes"]
        own = out[len(lanes) :][: spec.batch_ndim]
        for i, axes in enumerate(self.along_lanes(lanes, ins, out)):
            # Parameters are broadcast to the batch from the right, or have it in front of event axes of their own.
            # Values and masks have its axes.
            missing = max(len(own) - len(axes), 0) if i < spec.num_distribution_arrays else 0
            if not (missing and spec.event_shape):
                self.ties.tie(axes, own[missing:])
        cut = len(lanes) + len(own)
        self.found.append(_Found(".".join((*scope, spec.name)), eqn, out[:cut], out[cut:]))

    def lanes(self, eqn: Any, ins: list[Axes], outs: list[Axes], scope: tuple[str, ...]) -> None:
        lanes = eqn.params["lanes"]
        lead = self.ties.axes([lane.size for lane in reversed(lanes)])
        name = ".".join((*scope, *eqn_site_names(eqn)[:1]))
        self.found.append(_Found(name, eqn, lead))
        results = self.visit(eqn.params["jaxpr"], self.along_lanes(lanes, ins, lead), scope)
        for axes, out in zip(results, outs, strict=True):
            self.ties.tie([*lead, *axes], out)

    def along_lanes(self, lanes: Sequence[Any], ins: Sequence[Axes], lead: Axes) -> list[Axes]:
        """Tie the leading axes of the operands to those of the lanes. Returns the other axes of the operands."""
        rest = []
        for i, axes in enumerate(ins):
            pairs = zip(reversed(lanes), lead, strict=False)
            mapped = [axis for lane, axis in pairs if lane.mapped[i]]
            self.ties.tie(mapped, axes)
            rest.append(axes[len(mapped) :])
        for lane, axis in zip(reversed(lanes), lead, strict=False):
            if lane.name is not None:
                self.ties.tie([axis], [self.named.setdefault((lane.name, lane.size), axis)])
        return rest

    # --- what was found ---

    def of_site(self, at: _Found) -> dict[str, Any]:
        """A site's parameters, with its splits."""
        spec, lanes = at.eqn.params["spec"], at.eqn.params["lanes"]
        if any(self.ties.known(axis) - {WHOLE} for axis in at.event):
            raise ModelError(
                f"site {at.name!r}: an event axis of {spec.label} is split over the mesh, and the density takes "
                "whole events. Gather it first (jax.lax.all_gather), or split other axes"
            )
        found = self.splits_of(at)
        batch = tuple(found[len(lanes) :])
        spec = dataclasses.replace(spec, split=batch if set(batch) - {WHOLE} else ())
        return {"spec": spec, "lanes": _written(lanes, found[: len(lanes)])}

    def of_lanes(self, at: _Found) -> tuple[Any, ...]:
        return _written(at.eqn.params["lanes"], self.splits_of(at))

    def splits_of(self, at: _Found) -> list[Split]:
        """The splits of a site or of lanes. Those that an earlier staging of the same body has written are kept."""
        before = _splits(at.eqn)
        return [
            self.split_of(axis, at) if was == WHOLE else was
            for axis, was in zip(at.axes, before, strict=True)
        ]

    def refuse_rows(self, loop: Any, axis: int) -> None:
        """Refuse a loop with sites that goes along the rows of a shard, or that may do so."""
        known, size = self.ties.known(axis), self.ties.sizes[axis]
        if known - {WHOLE}:
            raise ModelError(_ALONG_ROWS.format(sites=listed(loop)))
        if not known and size in self.lengths:
            raise ModelError(
                f"{listed(loop)} in a scan or map of {size} steps: nothing tells whether they go along the rows of a "
                "shard, of which there are as many. If they do, use jax.vmap over the rows. If they do not, scan over "
                "an array of the model, say jnp.arange(n), for which the in_specs of the shard_map have P()"
            )

    def split_of(self, axis: int, at: _Found) -> Split:
        known, size = self.ties.known(axis), self.ties.sizes[axis]
        if size == 1 and len(known) > 1:  # one row a shard: what is whole was repeated along them
            known = known - {WHOLE}
        made = sorted(f.by for f in known if isinstance(f, Made))
        if made:
            raise ModelError(
                f"site {at.name!r}: {made[0]} makes its axis of size {size} of the rows of one shard. Draw the choices "
                "along the rows as they are, with jax.vmap"
            )
        if len(known) == 1:
            return next(iter(known))
        if known:
            raise ModelError(
                f"site {at.name!r}: its axis of size {size} meets axes that are "
                f"{' and '.join(sorted(map(str, known)))} in one shard_map. Give what is combined the same specs"
            )
        if size in self.lengths:
            raise ModelError(
                f"site {at.name!r}: nothing tells whether its axis of size {size} goes along the rows of a shard, of "
                "which there are as many. If it does, name the axis, there and where the rows are read: "
                "jax.vmap(..., axis_name='row'). If it does not, draw the choice outside of the shard_map"
            )
        return WHOLE


def _specs(eqn: Any) -> tuple[list[list[Split]], ...]:
    """How each axis of each operand, and of each result, of a ``shard_map`` is split."""
    sizes = eqn.params["mesh"].shape
    return tuple(
        [[Split(axes, math.prod(sizes[a] for a in axes)) for axes in spec] for spec in specs]
        for specs in shard_map_specs(eqn)
    )


def _written(lanes: Sequence[Any], outermost_first: Sequence[Split]) -> tuple[Any, ...]:
    pairs = zip(lanes, reversed(outermost_first), strict=True)
    return tuple(lane._replace(split=split) for lane, split in pairs)


# --- what is refused --------------------------------------------------------------------------------------------------

_REFUSED = {
    "unbounded": "a while_loop",
    "marginal": "marginalize",
    "shards": "another shard_map",
}

_ALONG_ROWS = (
    "{sites} in a scan or map along the rows of a shard: inside a shard_map each shard would begin it anew. Use "
    "jax.vmap over the rows"
)


def _refuse(eqn: Any) -> None:
    """Refuse by name whatever has no rule inside a ``shard_map``."""
    if _is_anonymous(eqn):
        raise ModelError(
            "draw(program) stands in a shard_map: its choices have no address. Move it out"
        )
    what = _REFUSED.get(kind(eqn) or "")
    what = "marginal or normalize" if eqn.primitive is estimated_p else what
    if what is not None and eqn_holds_sites(eqn):
        raise ModelError(
            f"{listed(eqn)} in {what} inside a shard_map, which Weft has no rule for: move one out of the other"
        )


# --- whole arrays, and those of one shard -----------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the arrays of a site are split: the axes of loops and lanes around it, then its own, up to event axes."""

    around: tuple[Split, ...]
    own: tuple[Split, ...]


def layouts(body: Any) -> dict[str, Any]:
    """The layouts of all sites in the body of a ``shard_map``: a nested dict by address."""
    tree: dict[str, Any] = {}
    for eqn, place in equations(body):
        if eqn.primitive is not site_p:
            continue
        node = tree
        around = [s for e, _ in place.around for s in _around(e)]
        for name in scopes(place):
            node = node.setdefault(name, {})
        node[eqn.params["spec"].name] = Layout(tuple(around), _splits(eqn))
    return tree


def _around(eqn: Any) -> Sequence[Split]:
    if eqn.primitive is lanes_p:
        return _splits(eqn)
    return (WHOLE,) if is_loop(eqn) else ()


def _splits(eqn: Any) -> tuple[Split, ...]:
    """The splits that are written on a site or on lanes, those of the outermost lane first."""
    lanes = tuple(lane.split for lane in reversed(eqn.params["lanes"]))
    spec = eqn.params.get("spec")
    return lanes if spec is None else (*lanes, *(spec.split or (WHOLE,) * spec.batch_ndim))


def specs_of(tree: Any, layouts: Any, of: Callable[[Layout], Sequence[Split]]) -> Any:
    """The specs of arrays whose leading axes are ``of`` the layout of a site. Both are nested dicts by name."""
    if isinstance(layouts, dict):
        return {name: specs_of(node, layouts.get(name, {}), of) for name, node in tree.items()}
    names = [split.axes or None for split in of(layouts)]
    return jax.tree.map(lambda x: P(*names[: jnp.ndim(x)]), tree)
