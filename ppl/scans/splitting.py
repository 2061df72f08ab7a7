"""Splitting a program at a scan: what comes before it, one step of it, what comes after.

Each part is a program again. Its arguments are what it reads, and its return value is what the later parts read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
from weft.ppl.exact.chain_laws import HANDED
from weft.ppl.exact.messages import Form
from weft.ppl.programs.programs import Program
from weft.ppl.stage.compat import Literal
from weft.ppl.stage.control import eqn_holds_sites, eqn_site_names
from weft.ppl.stage.jaxprs import Place, results, spread
from weft.ppl.stage.staging import Code, stage
from weft.ppl.transforms.rewriting import bind_marginal

from .carry import head, is_markov, named, names_of
from .cutting import Cut, cut
from .rao_blackwell import Handed, hand_on, inputs, merged, shapes, step


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

    def first_message(self, entry: list[Any], given: dict[str, Any]) -> list[Any]:
        """The message that the first step reads. `given` are the choices made before the scan, as entries."""
        return [] if self.handed is None else self.handed.first(entry, given)

    def next_message(
        self,
        given: dict[str, Any],
        consts: list[Any],
        carry: list[Any],
        message: list[Any],
        x: list[Any],
    ) -> list[Any]:
        """The message after a step whose other choices are known. `given` are these choices, as entries."""
        args = [*consts, *carry, *message, *x]
        return [] if self.handed is None else self.handed.then(args, given)

    def carry_of(self, consts: list[Any], carry: list[Any], message: list[Any]) -> Any:
        """The carry as it stands in the source. It includes values that never change, which JAX turns into consts.

        A leaf that depends on what is summed out is given by its law.
        """
        fixed, moving = self.names
        if self.handed is not None:
            state = merged([*consts, *carry], self.handed.form.laws(message), self.handed.slots)
            consts, carry = state[: len(fixed)], state[len(fixed) :]
        heads = {head(n) for n in moving if n}
        stay = [(n, x) for n, x in zip(fixed, consts, strict=True) if n and head(n) in heads]
        return named([n for n, _ in stay] + list(moving), [x for _, x in stay] + carry)


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
    parts = cut(program, observed, scan)
    handed, kept = hand_on(parts) if parts.addresses else (None, parts.kept)
    slots, form = ((), None) if handed is None else (handed.slots, handed.form)
    before, (consts, carry, xs, kept_values, entry) = _before(parts, handed, kept, program.name)
    step_code, step_consts = _step(parts, slots, form)
    after_code, after_consts = _after(parts, kept, slots, form)
    names, n, m = names_of(parts.body), parts.num_consts, parts.num_state
    sited = (parts.before, [parts.scan], parts.after)
    only_step = is_markov(parts.body, n, m - n) and not any(parts.reads_ys)
    return Split(
        before=before,
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
        reads_ys=parts.reads_ys,
        length=parts.scan.params["length"],
        reverse=parts.scan.params["reverse"],
        names=(tuple(names[:n]), tuple(names[n:m])),
        addresses=tuple(tuple(a for e in part for a in eqn_site_names(e)) for part in sited),
        markov=only_step and handed is None,
        name=program.name,
    )


def _before(
    parts: Cut, handed: Handed | None, kept: list[Any], name: str
) -> tuple[Program | None, list[list[Any]]]:
    """The program before the scan; and the consts, carry, xs, kept values and first message that are known without it.

    What varies with a choice is drawn for each particle; the rest is computed once.
    """
    operands, n, m = parts.scan.invars, parts.num_consts, parts.num_state
    slots = () if handed is None else handed.slots
    known_first = handed is not None and handed.before_code is None
    groups = (
        [operands[i] for i in range(n) if i not in slots],
        [operands[i] for i in range(n, m) if i not in slots],
        operands[m:],
        kept,
        [operands[i] for i in slots] if known_first else [],
    )
    random = {v for v, varies in spread(parts.before, {}, _varies, any).items() if varies}
    plain = [
        e
        for e in parts.before
        if not any(v in random for v in e.outvars) and not eqn_holds_sites(e)
    ]
    wanted = [v for group in groups for v in group]
    varying = [not isinstance(v, Literal) and v in random for v in wanted]
    once = dict(zip(parts.inputs, parts.args, strict=True))
    fixed = iter(results(plain, once, [v for v, w in zip(wanted, varying, strict=True) if not w]))
    filled = iter([None if w else next(fixed) for w in varying])
    values = [[next(filled) for _ in group] for group in groups]
    if not parts.sited_before:
        return None, values
    drawn = [v for v, w in zip(wanted, varying, strict=True) if w]
    f = _without(functools.partial(parts.first, drawn), parts, parts.before)
    code, consts = stage(f, parts.args)
    return Program.of_code(code, [*consts, *parts.args], name), values


def _varies(eqn: Any, ins: list[bool], _: Place) -> list[bool]:
    """Whether the results of an equation vary with a choice."""
    return [eqn_holds_sites(eqn) or any(ins)] * len(eqn.outvars)


def _known_carry(parts: Cut, slots: tuple[int, ...]) -> list[int]:
    """Where the leaves of the carry that no message describes stand in the state."""
    return [i for i in range(parts.num_consts, parts.num_state) if i not in slots]


def _message(form: Form | None) -> list[str]:
    """The choice through which a message is read."""
    return [] if form is None else [HANDED]


def _step(parts: Cut, slots: tuple[int, ...], form: Form | None) -> tuple[Code, list[Any]]:
    """One step, which returns the new carry and the outputs that the part after the scan reads."""
    one_step = step(parts, slots, form)
    wanted = [*_known_carry(parts, slots), *parts.read]

    def known(*xs: Any) -> list[Any]:
        found = one_step(*xs)
        return [found[i] for i in wanted]

    f = _without(known, parts, [parts.scan], _message(form))
    return stage(f, inputs(parts, slots, form))


def _after(
    parts: Cut, kept: list[Any], slots: tuple[int, ...], form: Form | None
) -> tuple[Code | None, list[Any]]:
    """The part after the scan. It reads kept values, the last carry, the message, and outputs of all steps."""
    if not parts.after:
        return None, []
    n, outs = parts.num_consts, list(parts.scan.outvars)
    # The state after the scan: consts as they were, and the carry.
    state = [*parts.scan.invars[:n], *outs[: parts.num_state - n]]
    known = [*kept, *(state[i] for i in _known_carry(parts, slots))]
    ends = [outs[i - n] for i in parts.read]

    def then(*xs: Any) -> list[Any]:
        at, end = len(known), len(xs) - len(ends)
        values = dict(zip([*known, *ends], [*xs[:at], *xs[end:]], strict=True))
        if form is not None:
            values.update(zip([state[i] for i in slots], form.draw(xs[at:end]), strict=True))
        return results(parts.after, values, [])

    read = [*shapes(known), *([] if form is None else form.shapes), *shapes(ends)]
    return stage(_without(then, parts, parts.after, _message(form)), read)


def _without(f: Any, parts: Cut, sites: Sequence[Any], more: Sequence[str] = ()) -> Any:
    """A function without those choices, among its sites, that are summed out; and without others at its top."""
    names = {a for e in sites for a in eqn_site_names(e)}
    mine = (*(a for a in parts.addresses if ".".join(a) in names), *((a,) for a in more))
    options: Any = parts.options
    return (lambda *xs: bind_marginal(f, list(xs), mine, options)) if mine else f
