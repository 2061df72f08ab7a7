"""Splitting a program at a scan: what comes before it, one step of it, what comes after.

Each part is a program again. Its arguments are what it reads, and its return value is what the later parts read. Calls
(jit, checkpoint) around the scan are inlined.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
from weft.ppl.exact.messages import HANDED, Form, blank, walked
from weft.ppl.exact.plan import Options
from weft.ppl.programs.handlers import Given
from weft.ppl.programs.programs import Program
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.compat import Literal, open_jaxpr, scan_sizes
from weft.ppl.stage.control import (
    addresses_of,
    eqn_holds_sites,
    eqn_site_names,
    is_record,
    lanes_p,
    marginal_p,
)
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.jaxprs import (
    Holds,
    Place,
    behind,
    described,
    evaluate,
    flow,
    inside,
    is_call,
    is_loop,
    results,
    spread,
)
from weft.ppl.stage.staging import Code, stage
from weft.ppl.transforms.rewriting import bind_marginal


class Split(eqx.Module):
    """A program in three parts, around a scan.

    Attributes:
        before: a program that gives the values that vary with a choice and that the scan or `after` reads. None if no
            choice is made before the scan.
        consts, carry, xs: the operands of the scan; None for those that `before` gives.
        kept: other values that `after` reads; None for those that `before` gives.
        entry: the first values of the carry that are handed on as a message (`handed`); None for those that `before`
            gives. Empty if the part before the scan makes the first message.
        step_code, step_consts: the code of `step`, and arrays that it reads.
        after_code, after_consts: the same for `after`; None if no site follows the scan.
        handed: how choices that are summed out reach the next step; None if none do.
        reads_ys: the stacked outputs on which a site after the scan depends.
        length: the number of steps.
        reverse: whether the steps run backwards.
        names: the names of the consts and of the carry's leaves in the source, for `named`.
        addresses: the addresses of the sites before, within, and after the scan.
        markov: whether nothing random outlives a step except what the step's own choices put into the carry.
        name: the name of the program.
    """

    before: Program | None
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    kept: list[Any]
    entry: list[Any]
    step_code: Code
    step_consts: list[Any]
    after_code: Code | None
    after_consts: list[Any]
    handed: Handed | None
    reads_ys: tuple[bool, ...] = eqx.field(static=True)
    length: int = eqx.field(static=True)
    reverse: bool = eqx.field(static=True)
    names: tuple[tuple[str, ...], tuple[str, ...]] = eqx.field(static=True)
    addresses: tuple[tuple[str, ...], ...] = eqx.field(static=True)
    markov: bool = eqx.field(static=True)
    name: str = eqx.field(static=True)

    # A carry is in two: its leaves that are known, and the message of those that depend on what is summed out.

    def step(
        self, consts: list[Any], carry: list[Any], message: list[Any], x: list[Any]
    ) -> Program:
        """One step as a program. It returns the new carry, and those of its outputs that `after` reads."""
        args = [*self.step_consts, *consts, *carry, *message, *x]
        return Program.of_code(self.step_code, args, self.name)

    def silent_step(
        self, consts: list[Any], carry: list[Any], message: list[Any], x: list[Any]
    ) -> Any:
        """One step as a function with sites that returns nothing, and its arguments."""
        args = [*self.step_consts, *consts, *carry, *message, *x]
        return _Silent(self.step_code), args

    def after(
        self, kept: list[Any], carry: list[Any], message: list[Any], ys: list[Any]
    ) -> Program:
        """The part after the scan, as a program. `ys` are the outputs that it reads."""
        assert self.after_code is not None
        args = [*self.after_consts, *kept, *carry, *message, *ys]
        return Program.of_code(self.after_code, args, self.name)

    def first_message(self, entry: list[Any], choices: dict[str, Any]) -> list[Any]:
        """The message that the first step reads. `choices` are those made before the scan."""
        return [] if self.handed is None else self.handed.first(entry, choices)

    def next_message(
        self,
        choices: dict[str, Any],
        consts: list[Any],
        carry: list[Any],
        message: list[Any],
        x: list[Any],
    ) -> list[Any]:
        """The message after a step whose other choices are known."""
        args = [*consts, *carry, *message, *x]
        return [] if self.handed is None else self.handed.then(args, choices)

    def carry_of(self, consts: list[Any], carry: list[Any], message: list[Any]) -> Any:
        """The carry as it stands in the source. It includes values that never change, which JAX turns into consts.

        A leaf that depends on what is summed out is given by its law.
        """
        fixed, moving = self.names
        if self.handed is not None:
            state = _merged([*consts, *carry], self.handed.form.laws(message), self.handed.slots)
            consts, carry = state[: len(fixed)], state[len(fixed) :]
        heads = {_head(n) for n in moving if n}
        stay = [(n, x) for n, x in zip(fixed, consts, strict=True) if n and _head(n) in heads]
        return named([n for n, _ in stay] + list(moving), [x for _, x in stay] + carry)


class Handed(eqx.Module):
    """The way in which choices that are summed out reach the next step: by a forward message (`messages`).

    Attributes:
        step_code, step_consts: one step in which these choices are choices. It returns the state.
        before_code, before_args: the same for what comes before the scan; None if the state is known there.
        slots: the leaves of the state that the message describes. The state is the consts and the carry of the scan.
        form: the form of the message.
        addresses: the addresses of all choices that are summed out.
        options: the options of the sum.
    """

    step_code: Code
    step_consts: list[Any]
    before_code: Code | None
    before_args: list[Any]
    slots: tuple[int, ...] = eqx.field(static=True)
    form: Form = eqx.field(static=True)
    addresses: tuple[tuple[str, ...], ...] = eqx.field(static=True)
    options: Options = eqx.field(static=True)

    def first(self, entry: list[Any], choices: dict[str, Any]) -> list[Any]:
        """The message before the first step."""
        if self.before_code is None:
            return self.form.certain(entry)
        return self._message(self.before_code, self.before_args, choices)

    def then(self, args: list[Any], choices: dict[str, Any]) -> list[Any]:
        """The message after a step."""
        return self._message(self.step_code, [*self.step_consts, *args], choices)

    def _message(self, code: Code, args: list[Any], choices: dict[str, Any]) -> list[Any]:
        given = {a: Given(x, checked=True) for a, x in flatten(choices).items()}
        found = walked(code.jaxpr, args, unflatten(given), self.addresses, self.options)
        return found.hand_on(self.slots)[1]


class _Silent(eqx.Module):
    code: Code

    def __call__(self, *args: Any) -> None:
        self.code(*args)


def split(program: Program, observed: Sequence[str], scan: str | None = None) -> Split:
    """Split a program at its one sited scan that holds an observation.

    Args:
        program: the program.
        observed: the dotted addresses of observed choices. Factors count as observed.
        scan: an address in the scan that is meant, if there are several.

    Raises:
        ModelError: if there is no such scan at the top level, or more than one; or if what is summed out cannot be
            handed from step to step.
    """
    code, args = program.staged().code()
    flat, args, sums = inlined(code.jaxpr, args)
    jaxpr, _ = open_jaxpr(flat.jaxpr)
    at = _find(program, jaxpr, set(observed), scan)
    eqn, before, after = jaxpr.eqns[at], jaxpr.eqns[:at], jaxpr.eqns[at + 1 :]
    params = eqn.params
    num_consts, num_carry = scan_sizes(params)
    addresses = tuple(dict.fromkeys(a for e in sums for a in e.params["addresses"]))
    options: Any = sums[0].params["options"] if sums else None

    # What the sites after the scan read, and what they need for it.
    last = behind(after, [], eqn_holds_sites)
    read_after = dict.fromkeys(v for e in last for v in e.invars if not isinstance(v, Literal))
    made = {v for e in last for v in e.outvars}
    outs = list(eqn.outvars)
    kept = [v for v in read_after if v not in made and v not in outs]
    reads_ys = tuple(v in read_after for v in outs[num_carry:])

    # What varies with a choice is drawn for each particle; the rest is computed once.
    random = {v for v, varies in spread(before, {}, _varies, any).items() if varies}
    wanted = [*eqn.invars, *kept]
    plain = [
        e for e in before if not any(v in random for v in e.outvars) and not eqn_holds_sites(e)
    ]
    once = dict(zip(jaxpr.invars, args, strict=True))

    def first(read: Sequence[Any], *xs: Any) -> list[Any]:
        return results(before, dict(zip(jaxpr.invars, xs, strict=True)), read)

    # What is summed out, and what the steps hand on of it.
    body = params["jaxpr"]
    avals = _shapes(open_jaxpr(body)[0].invars)
    num_state = num_consts + num_carry
    read = [num_state + i for i, r in enumerate(reads_ys) if r]
    sited_before = any(eqn_holds_sites(e) for e in before)
    handed = None
    if addresses:
        handed, kept = _handed(first, wanted, args, eqn, sited_before, read, addresses, options)
    slots, form = ((), None) if handed is None else (handed.slots, handed.form)
    known_first = handed is not None and handed.before_code is None
    entry = [wanted[i] for i in slots] if known_first else []
    groups = (
        [wanted[i] for i in range(num_consts) if i not in slots],
        [wanted[i] for i in range(num_consts, num_state) if i not in slots],
        eqn.invars[num_state:],
        kept,
        entry,
    )
    operands = [v for group in groups for v in group]
    varying = [not isinstance(v, Literal) and v in random for v in operands]
    fixed = iter(results(plain, once, [v for v, w in zip(operands, varying, strict=True) if not w]))
    filled = iter([None if w else next(fixed) for w in varying])
    consts, carry, xs, kept_values, entry = ([next(filled) for _ in group] for group in groups)

    staged_before = None
    if sited_before:
        drawn = [v for v, w in zip(operands, varying, strict=True) if w]
        f = _without(functools.partial(first, drawn), addresses, options, before)
        staged_before = _staged(f, args, program.name)

    message = [] if form is None else [HANDED]
    step = _step(body, num_consts, num_carry, slots, form)
    wanted_outs = [*(i for i in range(num_consts, num_state) if i not in slots), *read]

    def known(*xs: Any) -> list[Any]:
        found = step(*xs)
        return [found[i] for i in wanted_outs]

    step_code, step_consts = stage(
        _without(known, addresses, options, [eqn], message),
        _inputs(avals, num_state, slots, form),
    )

    # The state after the scan: consts as they were, and the carry.
    state = [*eqn.invars[:num_consts], *outs[:num_carry]]
    ends = [outs[i - num_consts] for i in read]
    inputs = [*kept, *(state[i] for i in range(num_consts, num_state) if i not in slots)]

    def then(*xs: Any) -> list[Any]:
        n, m = len(inputs), len(xs) - len(ends)
        values = dict(zip([*inputs, *ends], [*xs[:n], *xs[m:]], strict=True))
        if form is not None:
            values.update(zip([state[i] for i in slots], form.draw(xs[n:m]), strict=True))
        return results(last, values, [])

    after_code, after_consts = None, []
    if last:
        shapes = [*_shapes(inputs), *([] if form is None else form.shapes), *_shapes(ends)]
        after_code, after_consts = stage(_without(then, addresses, options, last, message), shapes)

    debug = getattr(open_jaxpr(body)[0], "debug_info", None)
    names = [str(n or "") for n in getattr(debug, "arg_names", None) or ()]
    names = names if len(names) == len(avals) else [""] * len(avals)
    n, m = num_consts, num_consts + num_carry
    parts = (before, [eqn], last)
    return Split(
        before=staged_before,
        consts=consts,
        carry=carry,
        xs=xs,
        kept=kept_values,
        entry=entry,
        step_code=step_code,
        step_consts=step_consts,
        after_code=after_code,
        after_consts=after_consts,
        handed=handed,
        reads_ys=reads_ys,
        length=params["length"],
        reverse=params["reverse"],
        names=(tuple(names[:n]), tuple(names[n:m])),
        addresses=tuple(tuple(a for e in part for a in eqn_site_names(e)) for part in parts),
        markov=_is_markov(body, num_consts, num_carry) and not any(reads_ys) and handed is None,
        name=program.name,
    )


# --- what is summed out -----------------------------------------------------------------------------------------------


def _varies(eqn: Any, ins: list[bool], _: Place) -> list[bool]:
    """Whether the results of an equation vary with a choice."""
    return [eqn_holds_sites(eqn) or any(ins)] * len(eqn.outvars)


def _step(
    body: Any, num_consts: int, num_carry: int, slots: tuple[int, ...], form: Form | None
) -> Any:
    """One step that reads some leaves of its state (consts and carry) from a message, and returns the whole state."""
    num_known = num_consts + num_carry - len(slots)

    def step(*xs: Any) -> list[Any]:
        m = num_known + (0 if form is None else len(form.shapes))
        handed = [] if form is None else form.draw(xs[num_known:m])
        state = _merged(xs[:num_known], handed, slots)
        return [*state[:num_consts], *_inline(body, [*state, *xs[m:]])]

    return step


def _shapes(variables: Sequence[Any]) -> list[Any]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]


def _inputs(
    avals: list[Any], num_state: int, slots: tuple[int, ...], form: Form | None
) -> list[Any]:
    """The shapes of the values that such a step reads."""
    known = [avals[i] for i in range(num_state) if i not in slots]
    return [*known, *([] if form is None else form.shapes), *avals[num_state:]]


def _handed(
    first: Any,
    wanted: list[Any],
    args: list[Any],
    eqn: Any,
    sited_before: bool,
    read: list[int],
    addresses: Any,
    options: Options,
) -> tuple[Handed | None, list[Any]]:
    """The way in which what is summed out reaches the next step, if it does, and other values kept for the end.

    The leaves of the state that depend on it, and the form of their message, are found by a walk: first of what comes
    before the scan, then of steps, until another step changes nothing.
    """
    num_consts, num_carry = scan_sizes(eqn.params)
    num_state, num_read = num_consts + num_carry, len(eqn.invars)
    body = eqn.params["jaxpr"]
    avals = _shapes(open_jaxpr(body)[0].invars)

    before_code, before_args, depends = None, [], ()
    if sited_before:
        before_code, found = stage(functools.partial(first, wanted), args)
        before_args = [*found, *args]
        depends, _ = _walked(before_code, before_args, addresses, options)
    slots = tuple(i for i in depends if i < num_state)
    constant = {wanted[i] for i in slots if i < num_consts}
    if any(i >= num_state and (i < num_read or wanted[i] not in constant) for i in depends):
        raise ModelError(
            f"filtering: {_listed(addresses)} is summed out, and read before the scan by what the scan, or what "
            "follows it, reads beside its carry: a filter hands on consts and carry only. Leave it in the model"
        )
    kept = [v for i, v in enumerate(wanted) if i >= num_read and i not in depends]
    if not depends:
        before_code, before_args = None, []

    form: Form | None = None
    while True:
        if before_code is not None:
            form = _walked(before_code, before_args, addresses, options, slots, num_state)[1]
        inputs = _inputs(avals, num_state, slots, form)
        code, consts = stage(_step(body, num_consts, num_carry, slots, form), inputs)
        reached, new = _walked(code, [*consts, *inputs], addresses, options, slots, num_state)
        if set(reached) & set(read):
            raise ModelError(
                f"filtering: what follows the scan reads an output of every step that depends on {_listed(addresses)}, "
                "which is summed out: observe it inside the step, or leave it in the model"
            )
        grown = tuple(sorted({*slots, *(i for i in reached if i < num_state)}))
        if new is None:
            return None, kept
        if (grown, new) == (slots, form):
            made = (code, consts, before_code, before_args, slots, new, addresses, options)
            return Handed(*made), kept
        if before_code is not None and grown == slots:
            raise ModelError(
                f"filtering: what comes before the scan hands on another law of {_listed(addresses)} than the steps do "
                f"({form} and {new}): give it, or draw it in the first step"
            )
        slots, form = grown, new


def _walked(
    code: Code,
    args: list[Any],
    addresses: Any,
    options: Options,
    slots: tuple[int, ...] = (),
    num_state: int = 0,
) -> tuple[list[int], Form | None]:
    """The outputs that depend on what is summed out, and the form of the message of these and `slots` of the state."""
    found: list[Any] = []

    def walk(args: list[Any]) -> None:
        seen = walked(code.jaxpr, args, blank(code.jaxpr, addresses), addresses, options)
        depends = [i for i in range(len(seen.outs)) if seen.depends(i)]
        outs = sorted({*slots, *(i for i in depends if i < num_state)})
        found.append((depends, seen.hand_on(outs)[0] if outs else None))

    jax.eval_shape(walk, args)
    return found[0]


def _without(
    f: Any, addresses: Any, options: Any, sites: Sequence[Any], more: Sequence[str] = ()
) -> Any:
    """A function without those choices, among its sites, that are summed out; and without others at its top."""
    names = {a for e in sites for a in eqn_site_names(e)}
    mine = (*(a for a in addresses if ".".join(a) in names), *((a,) for a in more))
    return (lambda *xs: bind_marginal(f, list(xs), mine, options)) if mine else f


def _listed(addresses: Any) -> str:
    return " and ".join(repr(".".join(a)) for a in addresses)


def _merged(known: Sequence[Any], others: Sequence[Any], slots: tuple[int, ...]) -> list[Any]:
    """The leaves of a carry: those of some slots, put among the rest."""
    rest, mine = iter(known), iter(others)
    return [next(mine) if i in slots else next(rest) for i in range(len(known) + len(others))]


def _staged(f: Any, args: list[Any], name: str) -> Program:
    code, consts = stage(f, args)
    return Program.of_code(code, [*consts, *args], name)


def inlined(jaxpr: Any, args: list[Any]) -> tuple[Code, list[Any], list[Any]]:
    """A program without calls that hold sites, its arguments, and the equations that sum choices out of a scan."""
    sums: list[Any] = []
    code, consts = stage(lambda *xs: _inline(jaxpr, list(xs), sums), args)
    return code, [*consts, *args], sums


def _inline(jaxpr: Any, args: list[Any], sums: list[Any] | None = None) -> list[Any]:
    """Stage a jaxpr again, without the calls that hold sites.

    With `sums`, equations that sum choices out of a scan are noted there, and replaced by the program inside them.
    """

    def equation(eqn: Any, ins: list[Any]) -> list[Any] | None:
        if sums is not None and eqn.primitive is marginal_p and holds_scan.at(eqn):
            sums.append(eqn)
        elif not (is_call(eqn) and eqn_holds_sites(eqn)):
            return None
        return _inline(inside(eqn)[0], ins, sums)

    return evaluate(jaxpr, args, equation)


def _find(program: Program, jaxpr: Any, observed: set[str], scan: str | None) -> int:
    """The index of the equation that is meant."""
    factors = {a for a, s in program.sites.items() if s.kind == "factor" or s.observed}
    sited = {i: eqn_site_names(e) for i, e in enumerate(jaxpr.eqns) if eqn_holds_sites(e)}
    scans = {i: names for i, names in sited.items() if is_loop(jaxpr.eqns[i])}
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
        if jaxpr.eqns[i].primitive is lanes_p and holds_scan.at(jaxpr.eqns[i])
    }
    if unseen:
        found = "; ".join(", ".join(map(repr, names)) for names in unseen.values())
        raise ModelError(f"filtering: no site in the scan of {name!r} is observed ({found})")
    held_in = [
        (described(eqn), eqn_site_names(eqn))
        for eqn in jaxpr.eqns
        if eqn_holds_sites(eqn) and holds_scan.at(eqn)
    ]
    if held_in:
        where, names = held_in[0]
        raise ModelError(
            f"filtering: the scan of {name!r} with the sites {', '.join(map(repr, names))} stands inside {where}; "
            "filtering takes a scan at the top level of the model"
        )
    raise ModelError(
        f"filtering: {name!r} has no jax.lax.scan with sites in it, whose observations could enter one after another"
    )


holds_scan = Holds(is_loop)
"""Whether a scan stands anywhere in a jaxpr."""

_STEP, _EARLIER = frozenset(["step"]), frozenset(["earlier"])


def _is_markov(body: Any, num_consts: int, num_carry: int) -> bool:
    """Whether the carry holds nothing random of earlier steps except what the step's own choices replace.

    Slots that no choice reaches, such as counters, do not count.
    """

    def transfer(eqn: Any, ins: list[frozenset[str]], _: Place) -> list[frozenset[str]] | None:
        chosen = addresses_of(eqn) and not is_record(eqn)
        return [_STEP] * len(eqn.outvars) if chosen else None

    num_xs = len(open_jaxpr(body)[0].invars) - num_consts - num_carry
    carry = [frozenset()] * num_carry
    while True:
        ins = [*[frozenset()] * num_consts, *carry, *[frozenset()] * num_xs]
        outs = flow(body, ins, transfer, lambda sets: frozenset().union(*sets))[:num_carry]
        grown = [_EARLIER if out else x for x, out in zip(carry, outs, strict=True)]
        if grown == carry:
            return not any(out >= _EARLIER for out in outs)
        carry = grown


def named(names: Sequence[str], values: Sequence[Any]) -> Any:
    """Leaves by their names in the source, as the pytree from which they came: tuples, dicts, and attributes as a dict.

    Without names, or if the names are no paths into one argument, it is a tuple of the leaves, or the only leaf.
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
