"""Splitting a program at a scan: what comes before it, one step of it, what comes after.

Each part is a program again: its arguments are what it reads, its return value is what the parts
after it read. Calls (jit, checkpoint) around the scan are inlined.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax

from .compat import (
    CALLS,
    Literal,
    bind,
    cond_p,
    inner_jaxprs,
    open_jaxpr,
    scan_p,
    scan_sizes,
    while_p,
)
from .control import eqn_holds_sites, eqn_site_names, lanes_p, marginal_p, scope_p
from .dependence import returned
from .errors import ModelError
from .marginals import bind_marginal
from .programs import Program
from .staging import Code, stage


class Split(eqx.Module):
    """A program in three parts, around a scan.

    Attributes:
        before: gives what the scan and `after` read that varies with a choice; None, where none is made there.
        consts, carry, xs: operands of the scan; None, where `before` gives it.
        kept: values that `after` reads besides; None, where `before` gives it.
        step_code, step_consts: the code of `step`, and arrays that it reads.
        after_code, after_consts: the same of `after`; None, where no site follows.
        reads_ys: which of the stacked outputs a site after the scan depends on.
        length: number of steps.
        reverse: whether they run backwards.
        names: of consts and of the carry's leaves in the source, for `named`.
        addresses: of the sites before, within, and after the scan.
        markov: whether nothing random outlives a step, but what the step's own choices put into the carry.
        name: of the program.
    """

    before: Program | None
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    kept: list[Any]
    step_code: Code
    step_consts: list[Any]
    after_code: Code | None
    after_consts: list[Any]
    reads_ys: tuple[bool, ...] = eqx.field(static=True)
    length: int = eqx.field(static=True)
    reverse: bool = eqx.field(static=True)
    names: tuple[tuple[str, ...], tuple[str, ...]] = eqx.field(static=True)
    addresses: tuple[tuple[str, ...], ...] = eqx.field(static=True)
    markov: bool = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def step(self, consts: list[Any], carry: list[Any], x: list[Any]) -> Program:
        """One step as a program, which returns the new carry and what the step puts out."""
        args = [*self.step_consts, *consts, *carry, *x]
        return Program.of_code(self.step_code, args, self.name)

    def silent_step(self, consts: list[Any], carry: list[Any], x: list[Any]) -> Any:
        """The same as a function with sites that returns nothing, and its arguments."""
        args = [*self.step_consts, *consts, *carry, *x]
        return _Silent(self.step_code), args

    def after(self, kept: list[Any], carry: list[Any], ys: list[Any]) -> Program:
        """What follows the scan, as a program; `ys` are those outputs that it reads."""
        assert self.after_code is not None
        return Program.of_code(self.after_code, [*self.after_consts, *kept, *carry, *ys], self.name)

    def carry_of(self, consts: list[Any], carry: list[Any]) -> Any:
        """The carry as the source has it; values that it never changes, which JAX makes consts, included."""
        fixed, moving = self.names
        heads = {_head(n) for n in moving if n}
        stay = [(n, x) for n, x in zip(fixed, consts, strict=True) if n and _head(n) in heads]
        return named([n for n, _ in stay] + list(moving), [x for _, x in stay] + carry)


class _Silent(eqx.Module):
    code: Code

    def __call__(self, *args: Any) -> None:
        self.code(*args)


def split(program: Program, observed: Sequence[str], scan: str | None = None) -> Split:
    """Split a program at its one sited scan that holds an observation.

    Args:
        program: the program.
        observed: dotted addresses of what is observed; factors count as such.
        scan: an address of the scan that is meant, where there are several.

    Raises:
        ModelError: if there is no such scan at the top level, or more than one.
    """
    code, args = program.staged().code()
    flat, args, sums = inlined(code.jaxpr, args)
    jaxpr, _ = open_jaxpr(flat.jaxpr)
    at = _find(program, jaxpr, set(observed), scan)
    eqn, before, after = jaxpr.eqns[at], jaxpr.eqns[:at], jaxpr.eqns[at + 1 :]
    params = eqn.params
    num_consts, num_carry = scan_sizes(params)

    # What the sites after the scan read, and what they need for it.
    last = _needed(after)
    read_after = dict.fromkeys(v for e in last for v in e.invars if not isinstance(v, Literal))
    made = {v for e in last for v in e.outvars}
    outs = list(eqn.outvars)
    kept = [v for v in read_after if v not in made and v not in outs]

    # What varies with a choice is drawn for each particle; the rest is computed once.
    random: set[Any] = set()
    for e in before:
        if eqn_holds_sites(e) or any(not isinstance(v, Literal) and v in random for v in e.invars):
            random.update(e.outvars)
    wanted = [*eqn.invars, *kept]
    varying = [not isinstance(v, Literal) and v in random for v in wanted]

    def run(equations: Any, values: dict[Any, Any], read: Sequence[Any]) -> list[Any]:
        for e in equations:
            found = bind(e, [v.val if isinstance(v, Literal) else values[v] for v in e.invars])
            values.update(zip(e.outvars, found, strict=True))
        return [v.val if isinstance(v, Literal) else values[v] for v in read]

    plain = [
        e for e in before if not any(v in random for v in e.outvars) and not eqn_holds_sites(e)
    ]
    once = dict(zip(jaxpr.invars, args, strict=True))
    fixed = [v for v, w in zip(wanted, varying, strict=True) if not w]
    values = iter(run(plain, once, fixed))
    operands = [None if w else next(values) for w in varying]

    def first(*xs: Any) -> list[Any]:
        return run(
            before,
            dict(zip(jaxpr.invars, xs, strict=True)),
            [v for v, w in zip(wanted, varying, strict=True) if w],
        )

    sited_before = any(eqn_holds_sites(e) for e in before)
    body = params["jaxpr"]
    avals = [v.aval for v in open_jaxpr(body)[0].invars]
    step = _summed(lambda *xs: _inline(body, list(xs)), body, sums, program.name)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    step_code, step_consts = stage(step, shapes)

    reads_ys = tuple(v in read_after for v in outs[num_carry:])
    inputs = [
        *kept,
        *outs[:num_carry],
        *(v for v, r in zip(outs[num_carry:], reads_ys, strict=True) if r),
    ]

    def then(*xs: Any) -> list[Any]:
        return run(last, dict(zip(inputs, xs, strict=True)), [])

    after_code, after_consts = None, []
    if last:
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs]
        after_code, after_consts = stage(then, shapes)

    debug = getattr(open_jaxpr(body)[0], "debug_info", None)
    names = [str(n or "") for n in getattr(debug, "arg_names", None) or ()]
    names = names if len(names) == len(avals) else [""] * len(avals)
    n, m = num_consts, num_consts + num_carry
    parts = (before, [eqn], last)
    return Split(
        before=_staged(first, args, program.name) if sited_before else None,
        consts=operands[:n],
        carry=operands[n:m],
        xs=operands[m : len(eqn.invars)],
        kept=operands[len(eqn.invars) :],
        step_code=step_code,
        step_consts=step_consts,
        after_code=after_code,
        after_consts=after_consts,
        reads_ys=reads_ys,
        length=params["length"],
        reverse=params["reverse"],
        names=(tuple(names[:n]), tuple(names[n:m])),
        addresses=tuple(tuple(a for e in part for a in eqn_site_names(e)) for part in parts),
        markov=_is_markov(body, num_consts, num_carry) and not any(reads_ys),
        name=program.name,
    )


def _summed(step: Any, body: Any, sums: list[Any], name: str) -> Any:
    """A step without the choices that were summed out of the whole; they must be of no concern to later steps."""
    for eqn in sums:
        addresses = eqn.params["addresses"]
        names = [".".join(a) for a in addresses]
        within = {n for e in open_jaxpr(body)[0].eqns for n in eqn_site_names(e)}
        carried = returned(body) & set(names)
        outside = [n for n in names if n not in within]
        if carried or outside:
            which = ", ".join(map(repr, [*sorted(carried), *outside]))
            raise ModelError(
                f"filtering: {name!r} sums out {which}, and a filter can sum out what one step draws and no other "
                "reads: leave the others in, or sum out the whole chain and take its exact density"
            )
        step = functools.partial(_without, step, addresses, eqn.params["options"])
    return step


def _without(step: Any, addresses: Any, options: Any, *xs: Any) -> list[Any]:
    return bind_marginal(step, list(xs), addresses, options)


def _staged(f: Any, args: list[Any], name: str) -> Program:
    code, consts = stage(f, args)
    return Program.of_code(code, [*consts, *args], name)


def inlined(jaxpr: Any, args: list[Any]) -> tuple[Code, list[Any], list[Any]]:
    """A program without calls that hold sites, its arguments, and the equations that sum choices out of a scan."""
    sums: list[Any] = []
    code, consts = stage(lambda *xs: _inline(jaxpr, list(xs), sums), args)
    return code, [*consts, *args], sums


def _inline(jaxpr: Any, args: list[Any], sums: list[Any] | None = None) -> list[Any]:
    """Stage a jaxpr anew, without the calls that hold sites.

    With `sums`, equations that sum choices out of a scan are noted there, and what they hold is taken in their place.
    """
    opened, consts = open_jaxpr(jaxpr)
    env = dict(zip(opened.constvars, consts, strict=True))
    env.update(zip(opened.invars, args, strict=True))
    for eqn in opened.eqns:
        ins = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        if eqn_holds_sites(eqn) and eqn.primitive.name in CALLS:
            outs = _inline(inner_jaxprs(eqn)[0], ins, sums)
        elif eqn.primitive is marginal_p and sums is not None and holds_scan(eqn):
            sums.append(eqn)
            outs = _inline(eqn.params["jaxpr"], ins, sums)
        else:
            outs = bind(eqn, ins)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in opened.outvars]


def _needed(equations: Any) -> list[Any]:
    """The equations that hold sites, and those that they read from."""
    kept: list[Any] = []
    read: set[Any] = set()
    for eqn in reversed(equations):
        if eqn_holds_sites(eqn) or any(v in read for v in eqn.outvars):
            kept.append(eqn)
            read = read | {v for v in eqn.invars if not isinstance(v, Literal)}
    return kept[::-1]


def _find(program: Program, jaxpr: Any, observed: set[str], scan: str | None) -> int:
    """The index of the equation that is meant."""
    factors = {a for a, s in program.sites.items() if s.kind == "factor" or s.observed}
    sited = {i: eqn_site_names(e) for i, e in enumerate(jaxpr.eqns) if eqn_holds_sites(e)}
    scans = {i: names for i, names in sited.items() if jaxpr.eqns[i].primitive is scan_p}
    held = {i: names for i, names in scans.items() if (observed | factors) & set(names)}
    if scan is not None:
        held = {i: names for i, names in scans.items() if scan in names}
    if len(held) == 1:
        return next(iter(held))
    name = program.name
    if len(held) > 1:
        found = "; ".join(", ".join(map(repr, names)) for names in held.values())
        raise ModelError(
            f"filtering: {name!r} has several scans that hold observations ({found}): choose one by an address in it, "
            "filtering(scan=...)"
        )
    if scan is not None:
        raise ModelError(f"filtering: no top-level scan of {name!r} holds the site {scan!r}")
    unseen = scans or {
        i: names
        for i, names in sited.items()
        if jaxpr.eqns[i].primitive is lanes_p and holds_scan(jaxpr.eqns[i])
    }
    if unseen:
        found = "; ".join(", ".join(map(repr, names)) for names in unseen.values())
        raise ModelError(f"filtering: no site in the scan of {name!r} is observed ({found})")
    inside = [
        (_WHERE[jaxpr.eqns[i].primitive], names)
        for i, names in sited.items()
        if jaxpr.eqns[i].primitive in _WHERE and holds_scan(jaxpr.eqns[i])
    ]
    if inside:
        where, names = inside[0]
        raise ModelError(
            f"filtering: the scan of {name!r} with the sites {', '.join(map(repr, names))} stands inside {where}; "
            "filtering takes a scan at the top level of the model"
        )
    raise ModelError(
        f"filtering: {name!r} has no jax.lax.scan with sites in it, whose observations could enter one after another"
    )


_WHERE = {
    cond_p: "a cond",
    while_p: "a while_loop",
    scope_p: "a nested program",
}


def holds_scan(eqn: Any) -> bool:
    """Whether an equation is a scan, or holds one."""
    return eqn.primitive is scan_p or any(
        holds_scan(e) for j in inner_jaxprs(eqn) for e in open_jaxpr(j)[0].eqns
    )


def _is_markov(body: Any, num_consts: int, num_carry: int) -> bool:
    """Whether the carry holds nothing random of earlier steps but what the step's own choices replace.

    Slots that no choice reaches (counters) do not count.
    """
    opened, _ = open_jaxpr(body)
    slots = range(num_consts, num_consts + num_carry)

    def spread(tainted: set[Any], sites: bool) -> list[bool]:
        tainted = set(tainted)
        for eqn in opened.eqns:
            reads = any(not isinstance(v, Literal) and v in tainted for v in eqn.invars)
            if eqn_holds_sites(eqn):
                if sites:
                    tainted.update(eqn.outvars)
            elif reads:
                tainted.update(eqn.outvars)
        return [not isinstance(v, Literal) and v in tainted for v in opened.outvars[:num_carry]]

    random: set[Any] = set()
    while True:
        reached = spread(random, True)
        grown = {opened.invars[i] for i, r in zip(slots, reached, strict=True) if r}
        if grown <= random:
            break
        random |= grown
    return not any(spread(random, False))


def named(names: Sequence[str], values: Sequence[Any]) -> Any:
    """Leaves by their names in the source, as the pytree they came from: tuples, dicts; attributes as a dict.

    Without names, or with such as are no paths into one argument, a tuple of the leaves; of a single leaf the leaf.
    """
    paths = [_PART.findall(n[len(_head(n)) :]) for n in names]
    if len({_head(n) for n in names}) != 1 or not all(names):
        return values[0] if len(values) == 1 else tuple(values)
    return _nest([[(a or None, b or c) for a, b, c in p] for p in paths], list(values))


_PART = re.compile(r"\[(\d+)\]|\['([^']*)'\]|\.(\w+)")


def _head(name: str) -> str:
    return re.split(r"[\[.]", name, maxsplit=1)[0]


def _nest(paths: list[Any], values: list[Any]) -> Any:
    if len(paths) == 1 and not paths[0]:
        return values[0]
    groups: dict[Any, tuple[list[Any], list[Any]]] = {}
    for (first, *rest), value in zip(paths, values, strict=True):
        places, inside = groups.setdefault(first, ([], []))
        places.append(rest)
        inside.append(value)
    built = {key: _nest(*group) for key, group in groups.items()}
    if all(number is not None for number, _ in built):
        return tuple(built[k] for k in sorted(built, key=lambda k: int(k[0])))
    return {name: value for (_, name), value in built.items()}
