"""Axes that must have the same length: which axes of arrays the equations of a jaxpr tie to each other.

Arrays that are combined element by element have equal lengths, a sum leaves the other axes as they are, and so on. A
fact about one axis then holds for all axes that are tied to it, earlier or later in the jaxpr. An equation that is not
listed ties nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from .primitives import BATCHED, CUMULATIVE, ELEMENTWISE, REDUCTIONS, rules

_MORE = ["bitcast_convert_type", "ppermute", "reshard", "rev", "sort", "threefry2x32"]
_SHAPED = CUMULATIVE | set(_MORE)
SHAPED = ELEMENTWISE | _SHAPED
"""Primitives whose results have the shape of their operands, axis by axis."""

Axes = Sequence[int]
"""The axes of an array, as numbers in ``Ties``."""


class Ties:
    """Axes that are tied to each other, and the facts known of them."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.sizes: list[int] = []
        self.facts: list[set[Hashable]] = []
        self.made: list[tuple[str, Axes, Axes]] = []
        """Of equations that tie nothing: the name, the axes read, and the new axes that may be made of them."""
        self.picked: list[tuple[str, Axes, Axes]] = []
        """Of gathers: the name, the axes from which is picked, and those along which the indices stand."""

    def axes(self, shape: Sequence[int]) -> Axes:
        """New axes with these sizes."""
        start = len(self.parents)
        self.parents += range(start, start + len(shape))
        self.sizes += shape
        self.facts += [set() for _ in shape]
        return range(start, start + len(shape))

    def root(self, axis: int) -> int:
        while self.parents[axis] != axis:
            self.parents[axis] = axis = self.parents[self.parents[axis]]
        return axis

    def tie(self, a: Axes, b: Axes) -> None:
        """Tie axes pair by pair. Axes of different size (one of them is repeated) are not tied."""
        for x, y in zip(map(self.root, a), map(self.root, b), strict=False):
            if x != y and self.sizes[x] == self.sizes[y]:
                self.parents[y] = x
                self.facts[x] |= self.facts[y]

    def state(self, axis: int, fact: Hashable) -> bool:
        """Add a fact, and tell whether it is new."""
        facts = self.facts[self.root(axis)]
        is_new = fact not in facts
        facts.add(fact)
        return is_new

    def known(self, axis: int) -> set[Any]:
        return self.facts[self.root(axis)]

    def results(self, eqn: Any, ins: Sequence[Axes], outs: Sequence[Axes]) -> None:
        """Tie the axes of an equation's results to those of its operands, or note that they are not tied."""
        self.apply(eqn, ins, outs)
        if eqn.primitive.name == "gather":
            dropped = eqn.params["dimension_numbers"].collapsed_slice_dims
            self.picked.append(("gather", [ins[0][k] for k in dropped], ins[1][:-1]))
        before, after = ({self.root(a): a for axes in xs for a in axes} for xs in (ins, outs))
        lost = [a for root, a in before.items() if root not in after]
        new = [a for root, a in after.items() if root not in before]
        if lost and new:
            self.made.append((eqn.primitive.name, lost, new))

    def apply(self, eqn: Any, ins: Sequence[Axes], outs: Sequence[Axes]) -> None:
        """Tie the axes that the rules name."""
        name = eqn.primitive.name
        if name in SHAPED:
            for a, b in itertools.product(ins, outs):
                if len(a) == len(b):
                    self.tie(a, b)
        elif name in BATCHED:
            own = 1 if name == "lu_pivots_to_permutation" else 2
            batch = max(map(len, ins)) - own
            for a, b in itertools.product(ins, outs):
                self.tie(a[:batch], b[:batch])
        elif name == "reshape":
            order = eqn.params.get("dimensions") or range(len(ins[0]))
            self.reshape([ins[0][axis] for axis in order], outs[0])
        elif name in RULES:
            for a, b in RULES[name](eqn.params, ins, outs):
                self.tie(a, b)
        elif name in REDUCTIONS:
            for a, b in itertools.product(ins, outs):
                self.tie(_without(a, eqn.params["axes"]), b)

    def reshape(self, a: Axes, b: Axes) -> None:
        """Tie the axes that a reshape leaves as they are: they have the same size, and as many elements before them."""
        before = [
            list(itertools.accumulate((self.sizes[k] for k in x), int.__mul__, initial=1))
            for x in (a, b)
        ]
        places = {(n, self.sizes[k]): k for n, k in zip(before[0], a, strict=False)}
        for n, k in zip(before[1], b, strict=False):
            found = places.pop((n, self.sizes[k]), None)
            if found is not None:
                self.tie([found], [k])


# --- rules: the pairs of lists of axes that an equation ties ----------------------------------------------------------

Pairs = list[tuple[Axes, Axes]]
Rule = Callable[[Any, Any, Any], Pairs]
RULES: dict[str, Rule] = {}
_rule = rules(RULES)


def _without(axes: Axes, left_out: Sequence[int]) -> Axes:
    return [a for k, a in enumerate(axes) if k not in left_out]


@_rule("broadcast_in_dim")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    return [(ins[0], [outs[0][k] for k in params["broadcast_dimensions"]])]


@_rule("transpose")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    return [([ins[0][k] for k in params["permutation"]], outs[0])]


@_rule("squeeze")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    return [(_without(ins[0], params["dimensions"]), outs[0])]


@_rule("reduce")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    return [(_without(a, params["dimensions"]), b) for a, b in zip(ins, outs, strict=False)]


@_rule("optimization_barrier")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    return list(zip(ins, outs, strict=True))


@_rule("concatenate")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    along = (params["dimension"],)
    return [(_without(a, along), _without(outs[0], along)) for a in ins]


@_rule("split")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    along = (params["axis"],)
    return [(_without(ins[0], along), _without(b, along)) for b in outs]


@_rule("stack")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    return [(a, _without(outs[0], (params["axis"],))) for a in ins]


@_rule("unstack")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    return [(_without(ins[0], (params["axis"],)), b) for b in outs]


@_rule(
    *("slice", "dynamic_slice", "dynamic_update_slice", "pad", "tile"),
    *(
        "scatter",
        "scatter-add",
        "scatter_add",
        "scatter-sub",
        "scatter-mul",
        "scatter-min",
        "scatter-max",
    ),
)
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    return [(ins[0], outs[0])]  # where the sizes differ nothing is tied


@_rule(
    *("random_seed", "random_wrap", "random_unwrap", "random_clone", "random_fold_in"),
    *("random_split", "random_bits", "random_gamma"),
)
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    return [(a, outs[0]) for a in ins]  # the axes of keys lead


@_rule("fft")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    own = len(params["fft_lengths"])
    return [(ins[0][:-own], outs[0][:-own])]


@_rule("top_k")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    along = (params.get("axis", len(ins[0]) - 1) % len(ins[0]),)
    return [(_without(ins[0], along), _without(b, along)) for b in outs]


@_rule(
    *("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"),
    *("select_and_scatter", "select_and_scatter_add", "select_and_gather_add"),
)
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    along = [k for k, n in enumerate(params["window_dimensions"]) if n > 1]
    return [(_without(a, along), _without(b, along)) for a in ins for b in outs if len(a) == len(b)]


@_rule("custom_linear_solve")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    return list(zip(ins[-len(outs) :], outs, strict=True))  # right-hand sides and solutions


@_rule("dot_general")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    contract, batch = params["dimension_numbers"]
    left, right = ([a[k] for k in ks] for a, ks in zip(ins, contract, strict=True))
    shared = [[a[k] for k in ks] for a, ks in zip(ins, batch, strict=True)]
    free = [
        axis for a, c, b in zip(ins, contract, batch, strict=True) for axis in _without(a, (*c, *b))
    ]
    return [(left, right), (shared[0], shared[1]), ([*shared[0], *free], outs[0])]


@_rule("conv_general_dilated")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    numbers = params["dimension_numbers"]
    return [([ins[0][numbers.lhs_spec[0]]], [outs[0][numbers.out_spec[0]]])]


@_rule("gather")
def _(params: Any, ins: Any, outs: Any) -> Pairs:
    operand, indices = ins
    numbers = params["dimension_numbers"]
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    shared = [operand[k] for k in numbers.operand_batching_dims]
    return [
        (indices[:-1], _without(outs[0], numbers.offset_dims)),
        (_without(operand, dropped), [outs[0][k] for k in numbers.offset_dims]),
        (shared, [indices[k] for k in numbers.start_indices_batching_dims]),
    ]
