r"""Choices in a scan, summed out as a Markov chain: the forward recursion.

A choice $z_t$ of step $t$ reaches later steps through the carry. Each slot of the carry is a table over the choices
that it depends on. At some point the pattern of these dependences repeats from step to step. If then each slot reads at
most the last $m$ choices, the chain has order $m$, and

$$\alpha_t(z_{t-m+1:t}) = \log \sum_{z_{t-m}} \exp\left(\alpha_{t-1}(z_{t-m:t-1}) + f_t(z_{t-m:t})\right)$$

with $f_t$ the sum of the density terms of the step (Rabiner 1989, eq. 20, in logarithms). The carry may hold any
function of the last choices. A slot that keeps gathering choices (a running sum) never repeats, and is refused.
Equations that no choice reaches run once, as in any scan. With ``parallel`` the steps are composed in a tree
(``chain_tree``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from weft.ppl.stage.compat import scan_p
from weft.ppl.stage.interpreter import Context
from weft.ppl.stage.records import Records

from .chain_loop import one_by_one
from .chain_state import State, Step
from .chain_steps import Steps
from .chain_tree import in_a_tree
from .factors import multiply
from .filtered import filtered
from .region import Region, rule
from .tables import Entangled, axes_of, variables_of

MAX_ORDER = 4
"""The number of steps that are tried before a chain counts as having no order."""


@rule(scan_p)
def chain(region: Region, eqn: Any, ins: list[Any], context: Context) -> tuple[list[Any], Records]:
    """The outputs and records of a scan whose sites depend on choices that are summed out."""
    plan, known, length = region.plan, set(region.plan.rules), eqn.params["length"]
    steps = Steps(region, eqn, ins, context)
    outside = {v for x in (*steps.consts, *steps.xs) for v in axes_of(x)}
    outside |= region.read_later(context)
    entering = {v for v in variables_of(steps.carry) if v not in outside and not v.normal}
    state = steps.begin(region, outside)
    state.born = dict.fromkeys(entering, -1)
    pending = [f for f in region.factors if entering & set(f.variables)]
    region.factors = [f for f in region.factors if f not in pending]
    if plan.filtering and pending:
        pending = [filtered(plan, multiply(pending), state.born)]
    if length:
        state = steps.settled(state)
    begun = None
    if len(pending) == 1 and length and all(v.family is None for v in entering):
        begun = dataclasses.replace(state, alpha=pending[0])
        if steps.repeats(begun, 0):  # the choice before the scan is like those in it
            state, pending = begun, []
    first: list[Step] = []
    step = 0
    while step < length:
        if not pending and (state is begun or steps.repeats(state, step)):
            break
        if step > MAX_ORDER:
            raise Entangled(_no_order(state, step))
        state, found = steps.advance(state, step, steps.at(step), pending)
        pending = []
        first.append(found)
        step += 1
    region.factors += pending
    rest: list[Step] = []
    composed = state.alpha is not None or bool(state.carried.variables)
    parallel = plan.options.parallel and composed and not state.placements
    parallel = parallel and not plan.filtering and not steps.squared
    if step < length:
        state, found = (in_a_tree if parallel else one_by_one)(steps, state, step)
        rest = [found]
    carried = {v.address for v in state.carried.variables.values()}
    for address in plan.rules.keys() - known:
        how = plan.rules[address]
        if how.chain is None:
            order = steps.orders.get(address, int(address in carried))
            how.chain = order, length, parallel and order > 0
    return steps.collect(state, first, rest)


def _no_order(state: State, step: int) -> str:
    grown = [(i, x) for i, x in enumerate(state.slots) if len({*axes_of(x)} & set(state.born)) > 1]
    slot = ", ".join(
        f"slot {i} ({x.dtype}{list(x.shape)}) depends on {len(x.axes)} of them" for i, x in grown
    )
    names = " and ".join(dict.fromkeys(repr(v.address) for v in state.born))
    return (
        f"the choices {names} of a scan do not form a Markov chain: after {step} steps its carry still gathers them "
        f"({slot or 'through their density'}). A carry may hold any function of the last few choices, but nothing that "
        "adds them up or keeps the first; move what does into the choice, or keep the choice"
    )
