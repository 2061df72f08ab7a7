"""The interpreter: it walks a staged program, and a handler decides what happens at each site.

One function serves simulate, score, condition and every transform. A handler says what a site gives: a value, a record
of it, and terms to be summed. The interpreter asks the handler first, at every equation, and the handler may take the
equation over. If it declines, the rules of control flow apply. They are written once, here:

- a call (jit, checkpoint) is walked in place, or as a checkpoint of the walk;
- a ``scan`` carries what it carried; records come out stacked, and the terms of all steps are summed after it;
- a ``cond`` runs the branch that is taken; the records of all branches come out, with flags that tell which count;
- lanes are a ``jax.vmap`` of the walk;
- a nested program is walked with the keys, given choices and records under its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from .compat import (
    Literal,
    bind,
    cond_p,
    manual_axes,
    open_jaxpr,
    rebind_shard_map,
    scan_p,
    scan_sizes,
    while_p,
)
from .control import eqn_holds_sites, estimated_p, lanes_p, scope_p
from .cotangents import finite_cotangents
from .errors import DensityError
from .jaxprs import inputs, read, steps
from .keys import (
    anonymous_name,
    count_anonymous,
    derive_keys,
    eqn_anonymous,
    expand_key,
    key_plan,
    scope_names,
    scope_plan,
)
from .records import Records, cast, completed, flagged, merged, recorded
from .shards import layouts, specs_of
from .sites import Site, site_p
from .wiring import inside, is_checkpoint, kind

Result = tuple[list[Any], Records, dict[str, Any]]
"""Outputs, records and summed terms."""


class Handler:
    """What to do at a site. Subclasses override ``site``. The defaults of the other methods suit an evaluation."""

    records = True
    """Whether sites leave records."""

    every_branch = False
    """Whether the idle branches of a ``cond`` are walked as well, by the handler that ``idle(skip)`` gives."""

    def equation(self, eqn: Any, ins: list[Any], context: Context) -> Result | None:
        """Take an equation over: give its outputs, records and terms. None declines, and the rules below apply."""
        return None

    def site(
        self, site: Site, key: Any, given: Any
    ) -> tuple[jax.Array, dict[str, Any] | None, dict[str, Any]]:
        """The value of one site, its record (or None), and its terms: arrays that are summed over the program."""
        raise NotImplementedError

    def terms(self) -> dict[str, jax.Array]:
        """The initial values (zeros) of the terms that the handler sums."""
        return {}

    def idle(self, skip: frozenset[tuple[str, ...]]) -> Handler:
        """The handler for branches that are not taken. ``skip`` are the addresses that the branch taken has."""
        raise NotImplementedError

    def scope(self, eqn: Any, args: list[Any], context: Context) -> Result:
        """Run a nested program."""
        return walk(eqn.params["jaxpr"], args, context.enter(eqn.params["name"]))

    def anonymous(self, eqn: Any, args: list[Any], key: Any) -> tuple[list[Any], dict[str, Any]]:
        """Run a program anonymously (``draw``). The outputs are its trace."""
        raise NotImplementedError

    def estimated(self, eqn: Any, args: list[Any], context: Context) -> Result:
        """Run a program with an estimated density."""
        raise DensityError(
            f"the density of {eqn.params['name']!r} is an estimate, drawn anew at each evaluation, and here an exact "
            "one is needed: sum its choices out exactly (marginalize), or take an algorithm that weighs (importance)"
        )

    def loop(self, eqn: Any, args: list[Any], context: Context) -> Result:
        """Run a ``while_loop`` that holds sites."""
        return walk_while(eqn, args, context)


@dataclasses.dataclass
class Frame:
    """How far the walk through one jaxpr has come.

    Attributes:
        jaxpr: the open jaxpr.
        values: the values of its variables that are known so far.
        at: the index of the equation that is being evaluated.
        outer: the frame of the equation that holds the jaxpr, if the jaxpr is walked in place.
    """

    jaxpr: Any
    values: dict[Any, Any]
    at: int = 0
    outer: Frame | None = None

    def before(self) -> list[Any]:
        """The equations that have been evaluated."""
        return self.jaxpr.eqns[: self.at]

    def later(self) -> list[Any]:
        """The values that are read after this equation."""
        reads = [v for e in self.jaxpr.eqns[self.at + 1 :] for v in e.invars]
        reads = [v for v in (*reads, *self.jaxpr.outvars) if not isinstance(v, Literal)]
        values = [self.values[v] for v in dict.fromkeys(reads) if v in self.values]
        return values if self.outer is None else [*values, *self.outer.later()]


@dataclasses.dataclass(frozen=True)
class Context:
    """What the walk passes down.

    Attributes:
        handler: what to do at a site.
        keys: the keys of the current scope, by name.
        given: the given entries of the current scope, by name.
        prefix: the address of the current scope.
        axes: the names of the loops and lanes around, outermost first.
        anonymous: the number of anonymous runs so far.
        frame: how far the walk has come.
    """

    handler: Handler
    keys: dict[str, Any]
    given: dict[str, Any]
    prefix: tuple[str, ...] = ()
    axes: tuple[str | None, ...] = ()
    anonymous: int = 0
    frame: Frame | None = None
    shared: frozenset[str] | None = None

    def enter(self, name: str) -> Context:
        return dataclasses.replace(
            self,
            keys=self.keys.get(name, {}),
            given=self.given.get(name, {}),
            prefix=(*self.prefix, name),
            anonymous=0,
        )

    def inside(
        self, keys: Any, given: Any, anonymous: int, axes: tuple[str | None, ...] = ()
    ) -> Context:
        return dataclasses.replace(
            self, keys=keys, given=given, anonymous=anonymous, axes=self.axes + axes
        )

    def split(self, axes: Iterable[str]) -> Context:
        """The context for choices that differ from shard to shard along some mesh axes."""
        shared = None if self.shared is None else self.shared - frozenset(axes)
        return dataclasses.replace(self, shared=shared)

    def after(self, eqn: Any) -> Context:
        """The context after an equation."""
        return dataclasses.replace(self, anonymous=self.anonymous + eqn_anonymous(eqn))

    def names(self, *jaxprs: Any) -> list[str]:
        return list(dict.fromkeys(n for j in jaxprs for n in scope_names(j, self.anonymous)))

    def only(self, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        keys = {n: self.keys[n] for n in names if n in self.keys}
        return keys, {n: self.given[n] for n in names if n in self.given}


def interpret(
    jaxpr: Any,
    args: list[Any],
    handler: Handler,
    key: Any = None,
    given: dict[str, Any] | None = None,
) -> Result:
    """Run a staged program under a handler.

    Args:
        jaxpr: a closed jaxpr.
        args: its arguments, flat.
        handler: what to do at a site.
        key: a typed key, if the handler draws; or the keys derived from one, by name. Choices that are given whole need
            no key.
        given: a nested dict of entries that the handler gets by address. Under a scan or lanes their arrays lead with
            those axes.

    Returns:
        Outputs, records and summed terms.
    """
    if key is not None and not isinstance(key, dict):
        entries = given or {}
        plan = {
            name: node
            for name, node in key_plan(jaxpr).items()
            if not (node.site and getattr(entries.get(name), "where", True) is None)
        }
        key = derive_keys(plan, key)
    return walk(jaxpr, args, Context(handler, key or {}, given or {}))


def walk(jaxpr: Any, args: Any, context: Context) -> Result:
    """Evaluate the equations of a jaxpr in order. See ``step``."""
    opened, _ = open_jaxpr(jaxpr)
    frame = Frame(opened, inputs(jaxpr, args), outer=context.frame)
    context = dataclasses.replace(context, frame=frame)
    records: Records = {}
    terms = context.handler.terms()
    for eqn, ins in steps(opened.eqns, frame.values):
        outs, found, more = step(eqn, ins, context)
        if eqn_holds_sites(eqn):
            context = context.after(eqn)
        records.update(found)
        terms = _add(terms, more)
        frame.values.update(zip(eqn.outvars, outs, strict=True))
        frame.at += 1
    return [read(v, frame.values) for v in opened.outvars], records, terms


def step(eqn: Any, ins: list[Any], context: Context) -> Result:
    """Evaluate one equation: as the handler says, else by its rule; without sites, as JAX does."""
    taken = context.handler.equation(eqn, ins, context)
    if taken is not None:
        return taken
    if not eqn_holds_sites(eqn):
        return bind(eqn, ins), {}, {}
    rule = _shards if kind(eqn) == "shards" else RULES.get(eqn.primitive, _call)
    outs, records, terms = rule(eqn, ins, context)
    return [cast(o, v.aval) for o, v in zip(outs, eqn.outvars, strict=True)], records, terms


def _add(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {k: a[k] + b[k] if k in b else a[k] for k in a}


def _site(eqn: Any, ins: list[Any], context: Context) -> Result:
    name = eqn.params["spec"].name
    site = Site(eqn.params, ins, (*context.prefix, name), context.axes)
    value, record, terms = context.handler.site(
        site, context.keys.get(name), context.given.get(name)
    )
    terms = _sum(terms)
    if context.shared is not None:
        own = {a for lane in site.lanes for a in lane.split.axes}
        own |= {a for split in site.spec.split for a in split.axes}
        terms = _once(terms, context.shared - own)
    return [value], {} if record is None else {name: record}, terms


def _once(terms: dict[str, Any], shared: frozenset[str]) -> dict[str, Any]:
    """Count terms that are the same on all shards along some mesh axes on the first shard only."""
    if not shared:
        return terms
    first = jax.lax.axis_index(tuple(sorted(shared))) == 0
    return {k: jnp.where(first, v, 0) for k, v in terms.items()}


def _shards(eqn: Any, ins: list[Any], context: Context) -> Result:
    """Walk a ``shard_map``. Keys and given entries go in along the split axes, and records come out along them."""
    body, mesh_axes = eqn.params["jaxpr"], manual_axes(eqn)
    keys, given = context.only(context.names(body))
    inside = dataclasses.replace(context, shared=mesh_axes)
    layout = layouts(body)

    def run(ins: Any, keys: Any, given: Any) -> Any:
        outs, records, terms = walk(body, ins, inside.inside(keys, given, context.anonymous))
        outs = [cast(o, v.aval) for o, v in zip(outs, eqn.outvars, strict=True)]
        return outs, records, {k: jax.lax.psum(v, tuple(mesh_axes)) for k, v in terms.items()}

    def whole(at: Any) -> Any:
        return (*at.around, *at.own)

    args = (ins, keys, given)
    in_specs = (
        list(eqn.params["in_specs"]),
        specs_of(keys, layout, lambda at: at.around),
        specs_of(given, layout, whole),
    )
    records: Any = {}
    if context.handler.records:
        records = jax.eval_shape(lambda *a: rebind_shard_map(eqn, run, a, in_specs, P())[1], *args)
    out_specs = (list(eqn.params["out_specs"]), specs_of(records, layout, whole), P())
    return rebind_shard_map(eqn, run, args, in_specs, out_specs)


def _scope(eqn: Any, ins: list[Any], context: Context) -> Result:
    if eqn.params["name"] is None:
        key = context.keys.get(anonymous_name(context.anonymous))
        outs, terms = context.handler.anonymous(eqn, ins, key)
        return outs, {}, terms
    outs, records, terms = context.handler.scope(eqn, ins, context)
    return outs, {eqn.params["name"]: records} if records else {}, terms


def _call(eqn: Any, ins: list[Any], context: Context) -> Result:
    (inner,) = inside(
        eqn
    )  # a call: everything else has been refused by name when the sites were listed
    if not is_checkpoint(eqn):
        return walk(inner, ins, context)
    keys, given = context.only(context.names(inner))

    def run(ins: Any, keys: Any, given: Any) -> Any:
        return walk(inner, ins, context.inside(keys, given, context.anonymous))

    settings = {k: v for k, v in eqn.params.items() if k in ("policy", "prevent_cse")}
    return jax.checkpoint(run, **settings)(ins, keys, given)


def _scan(eqn: Any, ins: list[Any], context: Context) -> Result:
    params = eqn.params
    num_consts, num_carry = scan_sizes(params)
    consts, rest = ins[:num_consts], ins[num_consts:]
    carry, xs = rest[:num_carry], rest[num_carry:]
    body = params["jaxpr"]
    keys, given = context.only(context.names(body))

    def step(carry: Any, x: Any) -> Any:
        xs, keys, given = x
        inside = context.inside(keys, given, context.anonymous, (None,))
        outs, records, terms = walk(body, [*consts, *carry, *xs], inside)
        return outs[:num_carry], (outs[num_carry:], records, terms)

    carry, (ys, records, terms) = jax.lax.scan(
        step, carry, (xs, keys, given), params["length"], params["reverse"], params["unroll"]
    )
    return [*carry, *ys], records, _sum(terms)


def _sum(terms: dict[str, Any]) -> dict[str, Any]:
    return {k: jnp.sum(v) for k, v in terms.items()}


def _lanes(eqn: Any, ins: list[Any], context: Context) -> Result:
    body, lanes = eqn.params["jaxpr"], eqn.params["lanes"]
    keys, given = context.only(context.names(body))
    names = tuple(lane.name for lane in lanes)
    inside = context.split(a for lane in lanes for a in lane.split.axes)

    def one(ins: Any, keys: Any, given: Any) -> Any:
        return walk(body, ins, inside.inside(keys, given, context.anonymous, names))

    for lane in lanes:
        in_axes = ([0 if m else None for m in lane.mapped], 0, 0)
        one = jax.vmap(one, in_axes, axis_size=lane.size, axis_name=lane.name)
    outs, records, terms = one(ins, keys, given)
    return outs, records, _sum(terms)


def walk_while(eqn: Any, ins: list[Any], context: Context) -> Result:
    """Run a ``while_loop``. The records and terms of its sites are dropped, since the number of rounds is unknown."""
    params = eqn.params
    n, m = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = ins[:n], ins[n : n + m], ins[n + m :]
    body = params["body_jaxpr"]
    plan = scope_plan(body, context.anonymous)

    def advance(state: Any) -> Any:
        i, carry = state
        keys = {
            name: expand_key(node, jax.random.fold_in(context.keys[name], i))
            for name, node in plan.items()
            if name in context.keys
        }
        outs, _, _ = walk(body, [*body_consts, *carry], context.inside(keys, {}, context.anonymous))
        return i + 1, outs

    def proceed(state: Any) -> Any:
        return walk(params["cond_jaxpr"], [*cond_consts, *state[1]], context)[0][0]

    _, carry = jax.lax.while_loop(proceed, advance, (jnp.zeros((), jnp.uint32), list(carry)))
    return list(carry), {}, {}


# --- branches ---------------------------------------------------------------------------------------------------------


def _cond(eqn: Any, ins: list[Any], context: Context) -> Result:
    index, *operands = ins
    branches = eqn.params["branches"]
    offsets = np.cumsum([0, *(count_anonymous(b) for b in branches)]) + context.anonymous
    contexts = [context.inside(context.keys, context.given, int(o)) for o in offsets[:-1]]
    names = list(
        dict.fromkeys(n for b, c in zip(branches, contexts, strict=True) for n in c.names(b))
    )
    keys, given = context.only(names)

    def run(i: int, operands: Any, keys: Any, given: Any) -> Any:
        inside = context.inside(keys, given, contexts[i].anonymous)
        outs, records, terms = walk(branches[i], operands, inside)
        outs = [cast(o, a) for o, a in zip(outs, branches[i].out_avals, strict=True)]
        if not context.handler.every_branch:
            return outs, records, terms
        mine = recorded(branches[i])
        for j, other in enumerate(branches):
            if j != i:
                skip = frozenset((*context.prefix, *address) for address in mine)
                idle = dataclasses.replace(
                    context.inside(keys, given, contexts[j].anonymous),
                    handler=context.handler.idle(skip),
                )
                more, extra = _idle(other, operands, idle)
                records, terms = merged(records, more), _add(terms, extra)
                mine = [*mine, *recorded(other)]
        return outs, records, terms

    union: Records = {}
    for i in range(len(branches)) if context.handler.records else ():
        union = merged(union, jax.eval_shape(lambda *a, i=i: run(i, *a)[1], operands, keys, given))

    def branch(i: int) -> Any:
        def f(operands: Any, keys: Any, given: Any) -> Any:
            outs, records, terms = run(i, operands, keys, given)
            return outs, completed(records, union), terms

        return f

    index = jnp.clip(index, 0, len(branches) - 1)
    outs, records, terms = jax.lax.switch(
        index, [branch(i) for i in range(len(branches))], operands, keys, given
    )
    here = [set(recorded(b)) for b in branches]
    return outs, flagged(records, index, here), terms


def _idle(branch: Any, operands: Any, context: Context) -> tuple[Records, dict[str, Any]]:
    """Records and terms of a branch that is not taken.

    The parameters may be infinite or NaN there. Cotangents that are not finite are cut off.
    """
    return walk(branch, finite_cotangents(operands), context)[1:]


RULES: dict[Any, Any] = {
    site_p: _site,
    scope_p: _scope,
    scan_p: _scan,
    cond_p: _cond,
    lanes_p: _lanes,
    estimated_p: lambda eqn, ins, context: context.handler.estimated(eqn, ins, context),
    while_p: lambda eqn, ins, context: context.handler.loop(eqn, ins, context),
}
