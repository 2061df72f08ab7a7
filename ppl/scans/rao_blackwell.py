"""Rao-Blackwellised steps: how choices that are summed out reach the next step, by a forward message (`messages`).

A step reads some leaves of its state from the message of the step before. The state is the consts and the carry of the
scan.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
from weft.ppl.exact.messages import Form, blank, walked
from weft.ppl.exact.plan import Options
from weft.ppl.stage.compat import open_jaxpr
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.staging import Code, stage

from .cutting import Cut, inline


class Handed(eqx.Module):
    """The way in which choices that are summed out reach the next step: by a forward message.

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

    # `given` has an entry for every choice that is not summed out. An observation that is left out where it is missing
    # says so there, and tells the message nothing.

    def first(self, entry: list[Any], given: dict[str, Any]) -> list[Any]:
        """The message before the first step."""
        if self.before_code is None:
            return self.form.certain(entry)
        return self._message(self.before_code, self.before_args, given)

    def then(self, args: list[Any], given: dict[str, Any]) -> list[Any]:
        """The message after a step."""
        return self._message(self.step_code, [*self.step_consts, *args], given)

    def _message(self, code: Code, args: list[Any], given: dict[str, Any]) -> list[Any]:
        found = walked(code.jaxpr, args, given, self.addresses, self.options)
        return found.hand_on(self.slots)[1]


def step(parts: Cut, slots: tuple[int, ...], form: Form | None) -> Any:
    """One step that reads some leaves of its state from a message, and returns the whole state and its outputs."""
    num_known = parts.num_state - len(slots)

    def one_step(*xs: Any) -> list[Any]:
        m = num_known + (0 if form is None else len(form.shapes))
        handed = [] if form is None else form.draw(xs[num_known:m])
        state = merged(xs[:num_known], handed, slots)
        return [*state[: parts.num_consts], *inline(parts.body, [*state, *xs[m:]])]

    return one_step


def inputs(parts: Cut, slots: tuple[int, ...], form: Form | None) -> list[Any]:
    """The shapes of the values that such a step reads."""
    avals = shapes(open_jaxpr(parts.body)[0].invars)
    known = [avals[i] for i in range(parts.num_state) if i not in slots]
    return [*known, *([] if form is None else form.shapes), *avals[parts.num_state :]]


def shapes(variables: Sequence[Any]) -> list[Any]:
    """The shapes and dtypes of variables."""
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]


def merged(known: Sequence[Any], others: Sequence[Any], slots: tuple[int, ...]) -> list[Any]:
    """The leaves of a carry: those of some slots, put among the rest."""
    rest, mine = iter(known), iter(others)
    return [next(mine) if i in slots else next(rest) for i in range(len(known) + len(others))]


def hand_on(parts: Cut) -> tuple[Handed | None, list[Any]]:
    """The way in which what is summed out reaches the next step, if it does, and other values kept for the end.

    A walk finds the leaves of the state that depend on it, and the form of their message. It goes through what comes
    before the scan, and then through one step after another, until a step changes nothing.
    """
    addresses, options, num_state = parts.addresses, parts.options, parts.num_state
    assert options is not None
    before, before_args, slots, kept = _law_before(parts, options)
    form: Form | None = None
    while True:
        if before is not None:
            form = _walked(before, before_args, addresses, options, slots, num_state)[1]
        args = inputs(parts, slots, form)
        code, consts = stage(step(parts, slots, form), args)
        reached, new = _walked(code, [*consts, *args], addresses, options, slots, num_state)
        if set(reached) & set(parts.read):
            raise ModelError(
                f"filtering: what follows the scan reads an output of every step that depends on {_listed(addresses)}, "
                "which is summed out: observe it inside the step, or leave it in the model"
            )
        grown = tuple(sorted({*slots, *(i for i in reached if i < num_state)}))
        if new is None:
            return None, kept
        if (grown, new) == (slots, form):
            return Handed(code, consts, before, before_args, slots, new, addresses, options), kept
        if before is not None and grown == slots:
            raise ModelError(
                f"filtering: what comes before the scan hands on another law of {_listed(addresses)} than the steps do "
                f"({form} and {new}): give it, or draw it in the first step"
            )
        slots, form = grown, new


def _law_before(
    parts: Cut, options: Options
) -> tuple[Code | None, list[Any], tuple[int, ...], list[Any]]:
    """What comes before the scan as code and its arguments, if the state depends there on what is summed out.

    Also the leaves of the state that depend on it, and the other values that are kept for the end.
    """
    wanted, num_read = parts.wanted, len(parts.scan.invars)
    code, args, depends = None, [], ()
    if parts.sited_before:
        code, found = stage(functools.partial(parts.first, wanted), parts.args)
        args = [*found, *parts.args]
        depends, _ = _walked(code, args, parts.addresses, options)
    slots = tuple(i for i in depends if i < parts.num_state)
    constant = {wanted[i] for i in slots if i < parts.num_consts}
    beside = [i for i in depends if i >= parts.num_state]
    if any(i < num_read or wanted[i] not in constant for i in beside):
        raise ModelError(
            f"filtering: {_listed(parts.addresses)} is summed out, and read before the scan by what the scan, or what "
            "follows it, reads beside its carry: a filter hands on consts and carry only. Leave it in the model"
        )
    kept = [v for i, v in enumerate(wanted) if i >= num_read and i not in depends]
    return (code, args, slots, kept) if depends else (None, [], slots, kept)


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


def _listed(addresses: Any) -> str:
    return " and ".join(repr(".".join(a)) for a in addresses)
