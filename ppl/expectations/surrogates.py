r"""Surrogates: a program with marked draws, evaluated so that its value and its derivatives are both unbiased.

An expectation is evaluated in two stages. First the interpreter turns the program into a plain jaxpr. Every draw that
is not reparametrised is *marked* there: an equation hands the draw on, and holds what its strategy needs. The second
stage is here. It evaluates that jaxpr in such a way that the derivatives are right.

*Score terms* do not need the rest of the program. Write $l = \log q_\theta(x)$ at a stopped draw. A cost $c$ that
depends on $x$ is replaced by $\square(l)\, (c - b) + b$, where $\square(l) = \exp(l - \operatorname{stop} l)$ has value
one and carries the score in every derivative, of whatever order (Foerster et al. 2018, "DiCE"). The jaxpr tells on
which draws a cost depends, element by element along the axes that batch-axis propagation keeps apart. A sum is boxed
term by term, each term with its own draws only.

*Enumeration* and *measure-valued derivatives* need the rest of the program as a function $k$ of the draw. This is the
tail of the jaxpr after the draw, also out of calls and branches. The tail is run under ``vmap``, and all other draws
keep their noise. In a scan or a loop there is no tail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir
from weft.ppl.analysis.independence import Unaligned, align
from weft.ppl.stage.compat import (
    Literal,
    Primitive,
    ShapedArray,
    Tracer,
    bind,
    open_jaxpr,
    scan_sizes,
    where_in_source,
)
from weft.ppl.stage.errors import GradientError
from weft.ppl.stage.jaxprs import (
    Holds,
    described,
    equations,
    evaluate_inside,
    inside,
    is_call,
    is_checkpoint,
    is_loop,
    kind,
    states_derivative,
)
from weft.ppl.stage.sites import DENSITY

stop = jax.lax.stop_gradient

# --- marks ------------------------------------------------------------------------------------------------------------

mark_p = Primitive("mark")


def mark(kind: str, site: Any, arrays: Sequence[Any], **params: Any) -> jax.Array:
    """Mark the first array, which is a draw. All arrays lead with the draw's batch axes."""
    return mark_p.bind(*arrays, kind=kind, name=".".join(site.address), **params)


def with_baselines(cost: jax.Array, per_draw: jax.Array, baselines: jax.Array) -> jax.Array:
    r"""A cost with a baseline for each of several draws. The baseline of a draw must not depend on that draw.

    Args:
        cost: a number computed from all draws.
        per_draw: ``(K,)`` numbers. The i-th is computed from the i-th draw, and tells which draw is meant.
        baselines: ``(K,)`` numbers. The i-th is a function of all draws but the i-th.

    Returns:
        The cost. Score terms of the i-th draw are multiplied by the cost less the i-th baseline.
    """
    return mark_p.bind(cost, per_draw, baselines, kind="control", name="")


@mark_p.def_abstract_eval
def _(draw: Any, *_: Any, **__: Any) -> ShapedArray:
    return ShapedArray(draw.shape, draw.dtype)


mark_p.def_impl(lambda draw, *_, **__: draw)
mlir.register_lowering(mark_p, lambda _, draw, *rest, **params: [draw])


def _batch(args: Any, dims: Any, **params: Any) -> Any:
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    args = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args, dims, strict=True)
    ]
    return mark_p.bind(*args, **params), 0


batching.primitive_batchers[mark_p] = _batch


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    return mark_p.bind(*primals, **params), tangents[0]


ad.primitive_jvps[mark_p] = _jvp


holds_marks = Holds(lambda eqn: eqn.primitive is mark_p)


def kinds(code: Any) -> list[tuple[str, str]]:
    """The address and the kind of every mark in a jaxpr, or in a list of equations."""
    marks = (eqn.params for eqn, _ in equations(code) if eqn.primitive is mark_p)
    return [(params["name"], params["kind"]) for params in marks]


TAILED = ("enum", "mvd")
"""Kinds that need the rest of the program."""


# --- values that know which draws they depend on ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Effect:
    """The effect of draws on the costs that depend on them.

    Attributes:
        log_q: the log density, for every copy along leading axes of the draw. For draws of a scan it is, at every step,
            the sum up to that step.
        log_weight: the same for weights that also multiply the value.
        whole: for draws of a scan, the log density and the log weight of all steps. Values that read several steps have
            these.
        control: the baselines' part. It has mean zero and is subtracted from a cost once.
        learned: the sum of the baselines that learn, and of their squares.
    """

    log_q: Any
    log_weight: Any = None
    control: Any = 0.0
    learned: tuple[Any, Any] | None = None
    whole: tuple[Any, Any] | None = None

    def sum(self, part: str) -> Any:
        """The log density, or the log weight, of all draws."""
        if self.whole is not None:
            return self.whole[part == "log_weight"]
        return jnp.sum(getattr(self, part))

    @property
    def weighs(self) -> bool:
        return self.log_weight is not None

    @property
    def ndim(self) -> int:
        return jnp.ndim(self.log_q)


Places = tuple["int | None", ...]


class Node:
    """A value, the effects on which it depends (with the places of their axes), and how it was computed.

    If a relaxed draw determines an integer, ``relaxed`` is the same number as a float with derivatives.
    """

    __slots__ = ("deps", "eqn", "inputs", "number", "out", "relaxed", "value")
    made = itertools.count()

    def __init__(
        self,
        value: Any,
        deps: dict[Effect, Places] | None = None,
        eqn: Any = None,
        inputs: Sequence[Node] = (),
        out: int = 0,
        relaxed: Any = None,
    ) -> None:
        self.value, self.deps, self.relaxed = value, deps or {}, relaxed
        self.eqn, self.inputs, self.out = eqn, inputs, out
        self.number = next(Node.made)


def _spread(eqn: Any, inputs: Sequence[Node]) -> list[dict[Effect, Places]]:
    """The effects on which the results of an equation depend."""
    outs: list[dict[Effect, Places]] = [{} for _ in eqn.outvars]
    for effect in dict.fromkeys(e for n in inputs for e in n.deps):
        found: list[list[int | None]] = [[] for _ in eqn.outvars]
        gone = [False] * len(outs)
        for i in range(effect.ndim):
            places: list[int | None] = [
                n.deps[effect][i] if effect in n.deps else None for n in inputs
            ]
            mixed = any(effect in n.deps and n.deps[effect][i] is None for n in inputs)
            try:
                axes = [None] * len(outs) if mixed else align(eqn, places)
            except Unaligned:
                axes, mixed = [None] * len(outs), True
            for o, place in enumerate(axes):
                found[o].append(place)
                gone[o] |= place is None and not mixed  # does not read it at all
        for o in range(len(outs)):
            if not gone[o]:
                outs[o][effect] = tuple(found[o])
    return outs


# --- evaluation -------------------------------------------------------------------------------------------------------


class Evaluator:
    """One evaluation of a marked jaxpr.

    It is a loop over equations of its own (``go``), and not ``jaxprs.evaluate``, since some strategies need the rest of
    the program as a function: the equations that follow, out of calls and branches too.

    Attributes:
        axis: the name of the axis of independent samples. The other samples give baselines. None if there is one
            sample.
        max_terms: the most runs of the rest of the program that enumeration may take.
        effects: the effects of all draws so far that are not inside others.
        moved: the floating arguments, with respect to which derivatives may be taken.
        pure: whether marks, except weights, are taken as mere draws.
        weighs: whether there are weights.
        scores: whether the call that is evaluated belongs to a density.
    """

    def __init__(self, axis: str | None = None, max_terms: int = 4096) -> None:
        self.axis = axis
        self.max_terms = max_terms
        self.effects: list[Effect] = []
        self.moved: list[Any] = []
        self.pure = False
        self.weighs = False
        self.scores = False

    def __call__(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr, with derivatives by the strategies of its marks."""

        def surrogates(outs: list[Node]) -> list[Any]:
            return [self.surrogate(n) for n in outs]

        self.moved = [a for a in args if _real(a)]
        self.weighs = any(kind == "reweight" for _, kind in kinds(jaxpr))
        return self.run(jaxpr, [Node(a) for a in args], surrogates)

    # -- equations in order; `then` is what follows, a function of the results

    def run(
        self, jaxpr: Any, args: Sequence[Node], then: Callable[[list[Node]], Any], terms: int = 1
    ) -> Any:
        opened, consts = open_jaxpr(jaxpr)
        env: dict[Any, Node] = {v: Node(c) for v, c in zip(opened.constvars, consts, strict=True)}
        env.update(zip(opened.invars, args, strict=True))
        return self.go(opened, 0, env, then, terms)

    def go(
        self,
        jaxpr: Any,
        start: int,
        env: dict[Any, Node],
        then: Callable[[list[Node]], Any],
        terms: int,
    ) -> Any:
        """Evaluate the equations of a jaxpr from a given one on. ``terms`` is the number of evaluations in all."""
        env = dict(env)

        def read(v: Any) -> Node:
            return Node(v.val) if isinstance(v, Literal) else env[v]

        for i in range(start, len(jaxpr.eqns)):
            eqn = jaxpr.eqns[i]
            inputs = [read(v) for v in eqn.invars]

            def rest(outs: Sequence[Node], terms: int, i: int = i, eqn: Any = eqn) -> Any:
                known = {**env, **dict(zip(eqn.outvars, outs, strict=True))}
                return self.go(jaxpr, i + 1, known, then, terms)

            marks = kinds([eqn]) if holds_marks.at(eqn) else []
            if self.pure:
                marks = [pair for pair in marks if pair[1] == "reweight"]
            tailed = [name for name, kind in marks if kind in TAILED]
            if not tailed:
                env.update(zip(eqn.outvars, self.equation(eqn, inputs, bool(marks)), strict=True))
            elif eqn.primitive is mark_p and eqn.params["kind"] == "enum":
                return self.enumerate(eqn, inputs, rest, terms)
            elif eqn.primitive is mark_p:
                return self.measure_valued(eqn, inputs, rest, terms)
            elif kind(eqn) == "branches":
                return self.branches(eqn, inputs, rest, terms)
            elif is_call(eqn):
                return self.run(inside(eqn)[0], inputs, lambda o: rest(o, terms), terms)
            else:
                raise _no_tail(eqn, tailed)
        return then([read(v) for v in jaxpr.outvars])

    def equation(self, eqn: Any, inputs: list[Node], marked: bool) -> Sequence[Node]:
        """Evaluate an equation in which no mark needs a tail."""
        if eqn.primitive is mark_p:
            return [self.marked(eqn, inputs)]
        if any(n.relaxed is not None for n in inputs):
            return self.relaxed(eqn, inputs)
        dependent = any(n.deps for n in inputs) and (self.weighs or not self.pure)
        if _is_plain(eqn) and (marked or dependent):
            return self.run(inside(eqn)[0], inputs, lambda outs: outs)
        if marked:
            return self.beside(eqn, inputs)
        values = bind(eqn, [n.value for n in inputs])
        if not dependent:
            return [Node(v) for v in values]
        deps = _spread(eqn, inputs)
        return [
            Node(v, d, eqn, inputs, o) for o, (v, d) in enumerate(zip(values, deps, strict=True))
        ]

    # -- score terms

    def marked(self, eqn: Any, inputs: list[Node]) -> Node:
        """Evaluate a mark: a draw with a score term or a weight, or a cost with baselines of its own."""
        if eqn.params["kind"] == "control":
            return inputs[0] if self.pure else _controlled(*inputs)
        draw, term, *baselines = (n.value for n in inputs)
        if self.pure and eqn.params["kind"] != "reweight":
            return Node(draw, _through(inputs, draw.ndim))
        if eqn.params["kind"] == "gumbel":
            return Node(draw, _through(inputs, draw.ndim), relaxed=term)
        effect = Effect(term)
        if eqn.params["kind"] == "reweight":
            effect = Effect(jnp.zeros_like(term), term)
        elif baselines:
            (b,) = baselines
            own = jnp.sum(term, tuple(range(b.ndim, term.ndim)))
            control = jnp.sum((_box(own) - 1) * stop(b))
            learned = (jnp.sum(b), jnp.sum(b**2)) if eqn.params["learned"] else None
            effect = Effect(term, control=control, learned=learned)
        self.effects.append(effect)
        return Node(draw, {**_through(inputs, term.ndim), effect: tuple(range(term.ndim))})

    def relaxed(self, eqn: Any, inputs: list[Node]) -> Sequence[Node]:
        """Evaluate an equation of relaxed integers. Sums, products and changes of shape carry derivatives to floats."""
        name = eqn.primitive.name
        if _is_plain(eqn):
            with self.scoring(eqn):
                return self.run(inside(eqn)[0], inputs, lambda outs: outs)
        data = inputs[1:] if name == "select_n" else inputs
        if name not in CARRIES and (self.scores or is_of_a_density(eqn)):
            # What the formula of a density decides by the value has no part in its derivative.
            values = bind(eqn, [n.value for n in inputs])
            return [Node(v, d) for v, d in zip(values, _spread(eqn, inputs), strict=True)]
        if name not in CARRIES or any(n.relaxed is not None for n in inputs if n not in data):
            raise _not_carried(eqn)
        floats = [
            n.value if n not in data else n.relaxed if n.relaxed is not None else 1.0 * n.value
            for n in inputs
        ]
        (deps,) = _spread(eqn, inputs)
        if name != "convert_element_type":
            (value,) = bind(eqn, [n.value for n in inputs])
            return [Node(value, deps, relaxed=bind(eqn, floats)[0])]
        dtype = eqn.params["new_dtype"]
        if jnp.issubdtype(dtype, jnp.inexact):
            return [Node(floats[0].astype(dtype), deps)]
        if not jnp.issubdtype(dtype, jnp.integer):
            raise _not_carried(eqn)
        return [Node(inputs[0].value.astype(dtype), deps, relaxed=floats[0])]

    def beside(self, eqn: Any, inputs: list[Node]) -> list[Node]:
        """Evaluate a scan, a branch or a checkpoint with score terms. Their sums come out beside its results."""
        values = [n.value for n in inputs]

        def body(jaxpr: Any, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            inner = Evaluator(None, self.max_terms)
            inner.pure, inner.weighs = self.pure, self.weighs
            outs = inner.run(jaxpr, [Node(a) for a in args], lambda outs: outs)
            if any(n.relaxed is not None for n in outs):
                raise _not_carried(eqn)
            return [n.value for n in outs], _totals(inner.effects)

        if kind(eqn) not in ("loop", "branches", "call") or states_derivative(eqn):
            names = ", ".join(dict.fromkeys(repr(name) for name, _ in kinds([eqn])))
            raise GradientError(
                f"the choices {names} stand in {described(eqn)}, where no strategy but reparam is possible"
            )
        jaxprs = inside(eqn)
        outs, totals = evaluate_inside(eqn, values, lambda k, args: body(jaxprs[k], args))
        earlier = _through(inputs, 0)
        if not is_loop(eqn):
            log_q, log_weight, control, *learned = totals
            effect = Effect(log_q, log_weight, control, (learned[0], learned[1]))
            self.effects.append(effect)
            return [Node(v, {**earlier, effect: ()}) for v in outs]
        # What comes out of a step depends on the steps before it.
        reverse = eqn.params["reverse"]
        log_q, log_weight = (jax.lax.cumsum(t, reverse=reverse) for t in totals[:2])
        totals = [jnp.sum(t) for t in totals]
        effect = Effect(
            log_q, log_weight, totals[2], (totals[3], totals[4]), (totals[0], totals[1])
        )
        self.effects.append(effect)
        num_carry = scan_sizes(eqn.params)[1]
        return [
            Node(v, {**earlier, effect: (None,) if o < num_carry else (0,)})
            for o, v in enumerate(outs)
        ]

    # -- costs

    def surrogate(self, out: Node) -> Any:
        """A result with its derivatives."""
        if not out.deps or not _real(out.value) or (self.pure and not self.weighs):
            return out.value
        found = _linearly(out, self.box, lambda n: n.value)
        for effect in () if self.pure else out.deps:
            found = found - effect.control
            if effect.learned is not None:

                def follows(n: Node, effect: Effect = effect) -> Any:
                    return n.value if effect in n.deps else jnp.zeros_like(n.value)

                cost = jnp.sum(stop(_linearly(out, follows, follows)))
                regression = cost * effect.learned[0] - 0.5 * effect.learned[1]
                found = found + (regression - stop(regression))
        return found

    def box(self, node: Node) -> Any:
        cost = node.value
        if any(e.weighs for e in node.deps):
            cost = cost * jnp.exp(_total(node, "log_weight"))
        if self.pure:
            return cost
        others: Any = 0.0
        if self.axis is not None:
            n = jax.lax.psum(1, self.axis)
            others = stop((jax.lax.psum(cost, self.axis) - cost) / (n - 1))
            others = jnp.where(jnp.isfinite(others), others, 0)
        # Costs that are not finite are mostly those of a `where` that does not choose them: no score term, since zero
        # times infinity would be its derivative.
        finite = jnp.isfinite(cost)
        boxed = _box(_total(node, "log_q")) * (jnp.where(finite, cost, 0) - others) + others
        return jnp.where(finite, boxed, cost)

    # -- strategies that need the tail

    def enumerate(
        self, eqn: Any, inputs: list[Node], rest: Callable[..., Any], terms: int
    ) -> list[Any]:
        draw, log_q = (n.value for n in inputs)
        values = jnp.asarray(eqn.params["values"], draw.dtype)
        copies, terms = draw.size, terms * draw.size * len(values)
        if terms > self.max_terms:
            raise GradientError(
                f"enum at {eqn.params['name']!r} runs the rest of the program {terms:,} times, with the choices "
                f"enumerated before it; the limit is {self.max_terms:,}. Take score or mvd at some of them"
            )
        q = jnp.exp(log_q).reshape(copies, len(values))
        # Impossible values are replaced by a possible one: what follows may not be finite there.
        likely = values[jnp.argmax(stop(q), -1)]
        values = jnp.where(q > 0, values, likely[:, None])
        earlier = _through(inputs, draw.ndim)

        def tail(copy: Any, value: Any) -> list[Any]:
            return rest([Node(_with(draw, copy, value), earlier)], terms)

        if copies == 1:
            found = jax.vmap(lambda v: tail(0, v))(values[0])
            return [_weighed(q[0], k) if _real(k) else k[0] for k in found]
        here = rest([Node(draw, earlier)], terms)
        with self.purely():
            every = jax.vmap(jax.vmap(tail, (None, 0)))(jnp.arange(copies), values)
        message = _first_order(eqn, "enum of several copies")
        found = []
        for h, k in zip(here, every, strict=True):
            if _real(h):
                mean = jnp.mean(jax.vmap(_weighed)(q, k), 0)
                h = h + stop(mean - h) + jnp.sum(_product(k, q, self.moved, message), (0, 1))
            found.append(h)
        return found

    def measure_valued(
        self, eqn: Any, inputs: list[Node], rest: Callable[..., Any], terms: int
    ) -> list[Any]:
        draw, *arrays = (n.value for n in inputs)
        found = rest([Node(draw, _through(inputs, draw.ndim))], terms)
        message = _first_order(eqn, "mvd")
        for i in range(0, len(arrays), 4):
            theta, c, up, down = (a.reshape(-1) for a in arrays[i : i + 4])

            def tails(copy: Any, values: Any) -> list[Any]:
                return jax.vmap(lambda v: rest([Node(_with(draw, copy, v))], terms))(values)

            with self.purely():
                pairs = jax.vmap(tails)(jnp.arange(draw.size), jnp.stack([up, down], 1))
            for o, k in enumerate(pairs):
                if _real(found[o]):
                    slope = _spread_out(c, k.ndim - 1) * (k[:, 0] - k[:, 1])
                    found[o] = found[o] + jnp.sum(_product(slope, theta, self.moved, message), 0)
        return found

    def branches(
        self, eqn: Any, inputs: list[Node], rest: Callable[..., Any], terms: int
    ) -> list[Any]:
        """Evaluate a cond with marks that need a tail. The tail goes into the branches."""
        index, *operands = inputs
        decided = _through([index], 0)

        def through(branch: Any) -> Callable[[], Any]:
            def after(outs: list[Node]) -> Any:
                # What is computed in a branch depends on what chose it.
                chosen = [Node(o.value, {**o.deps, **decided}) for o in outs]
                return rest(chosen, terms)

            return lambda: self.run(branch, operands, after, terms)

        return jax.lax.switch(index.value, [through(b) for b in eqn.params["branches"]])

    @contextlib.contextmanager
    def scoring(self, eqn: Any) -> Iterator[None]:
        """What follows stands in a call of a density, if the call does."""
        before, self.scores = self.scores, self.scores or is_of_a_density(eqn)
        try:
            yield
        finally:
            self.scores = before

    @contextlib.contextmanager
    def purely(self) -> Iterator[None]:
        """Run what follows without strategies, for its value alone."""
        before, self.pure = self.pure, True
        try:
            yield
        finally:
            self.pure = before


# --- parts ------------------------------------------------------------------------------------------------------------


def _controlled(cost: Node, per_draw: Node, baselines: Node) -> Node:
    control: Any = 0.0
    for effect, places in per_draw.deps.items():
        if 0 in places and effect.whole is None:
            other = tuple(i for i, p in enumerate(places) if p != 0)
            own = jnp.sum(effect.log_q, other)
            control = control + jnp.sum((_box(own) - 1) * stop(baselines.value))
    return Node(cost.value - control, cost.deps)


def _box(log_q: Any) -> Any:
    return jnp.exp(log_q - stop(log_q))


def _total(node: Node, part: str) -> Any:
    """The sum, over all effects on a node, of one part of them. It has the node's axes where these are kept apart."""
    total: Any = 0.0
    for effect, places in node.deps.items():
        x = getattr(effect, part)
        if x is None:
            continue
        if effect.whole is not None and places == (None,):
            x = effect.sum(part)
        elif x.ndim:
            x = jnp.sum(x, tuple(i for i, p in enumerate(places) if p is None))
            kept = [p for p in places if p is not None]
            x = jnp.transpose(x, sorted(range(len(kept)), key=kept.__getitem__))
            shape = [s if a in kept else 1 for a, s in enumerate(jnp.shape(node.value))]
            x = x.reshape(shape)
        total = total + x
    return total


def _totals(effects: Sequence[Effect]) -> list[Any]:
    """The sums of log density, log weight, control and learned baselines over all effects."""
    zero = jnp.zeros(())
    log_q = sum((e.sum("log_q") for e in effects), zero)
    log_weight = sum((e.sum("log_weight") for e in effects if e.weighs), zero)
    control = sum((e.control for e in effects), zero)
    learned = [sum((e.learned[i] for e in effects if e.learned), zero) for i in range(2)]
    return [log_q, log_weight, control, *learned]


def _through(inputs: Sequence[Node], ndim: int) -> dict[Effect, Places]:
    """The effects on some values, for a draw that they determine copy by copy along leading axes."""
    found: dict[Effect, Places] = {}
    for effect in dict.fromkeys(e for n in inputs for e in n.deps):
        places: list[int | None] = []
        for i in range(effect.ndim):
            seen = {n.deps[effect][i] for n in inputs if effect in n.deps}
            place = seen.pop() if len(seen) == 1 else None
            places.append(place if place is not None and place < ndim else None)
        found[effect] = tuple(places)
    return found


_ANY = """
add add_any sub neg reduce_sum reshape squeeze broadcast_in_dim transpose copy copy_p concatenate stack slice rev pad
expand_dims cumsum convert_element_type
"""
LINEAR = frozenset(_ANY.split())
"""Equations that are linear in all their operands together."""
LINEAR_IN = {"div": (0,), "gather": (0,), "dynamic_slice": (0,), "select_n": None}
"""And those that are in some: the places of these; None for all but the first."""


CARRIES = LINEAR | {"mul", "select_n"}
"""Equations through which a relaxed integer has derivatives."""


def is_of_a_density(eqn: Any) -> bool:
    """Whether an equation was made while the density of a site was evaluated."""
    return DENSITY in str(eqn.source_info.name_stack)


def _is_plain(eqn: Any) -> bool:
    """Whether an equation is a call that may be evaluated in place; checkpoints keep their purpose."""
    return is_call(eqn) and not is_checkpoint(eqn)


def _not_carried(eqn: Any) -> GradientError:
    return GradientError(
        f"a choice with the strategy gumbel goes as an integer into {described(eqn)}{where_in_source(eqn)}, which has "
        "no derivative: write it by arithmetic, such as b * x + (1 - b) * y, take densities by sites of a program (not "
        "by log_prob), or take enum, mvd or score there"
    )


def _is_linear(node: Node) -> bool:
    if node.eqn is None or not all(_real(n.value) for n in node.inputs if n.deps):
        return False
    name, places = node.eqn.primitive.name, [i for i, n in enumerate(node.inputs) if n.deps]
    if name in LINEAR:
        return True
    if name in ("mul", "div") and any(map(_infinite, node.inputs)):
        return False  # guarded by a `where`, as in NumPyro's Bernoulli: its derivative must not meet a zero
    if name in ("mul", "dot_general"):
        return len(places) == 1
    if name in LINEAR_IN:
        allowed = LINEAR_IN[name] or range(1, len(node.inputs))
        return all(i in allowed for i in places)
    return False


def _infinite(node: Node) -> bool:
    """Whether a value is known and holds an infinity."""
    x = node.value
    return (
        not node.deps
        and not isinstance(x, Tracer)
        and _real(x)
        and bool(np.any(np.isinf(np.asarray(x))))
    )


def _linearly(out: Node, leaf: Callable[[Node], Any], constant: Callable[[Node], Any]) -> Any:
    """A value, computed again from the terms of which it is a linear function.

    ``leaf`` gives the terms that depend on draws, and ``constant`` the others.
    """
    nodes: dict[int, Node] = {}
    left = [out]
    while left:
        node = left.pop()
        if node.number not in nodes:
            nodes[node.number] = node
            left += node.inputs if node.deps and _is_linear(node) else ()
    found: dict[int, Any] = {}
    for number in sorted(nodes):
        node = nodes[number]
        if node.deps and _is_linear(node):
            added = node.eqn.primitive.name in LINEAR
            operands = [
                found[n.number] if n.deps else constant(n) if added and _real(n.value) else n.value
                for n in node.inputs
            ]
            found[number] = bind(node.eqn, operands)[node.out]
        elif node.deps:
            found[number] = leaf(node)
    return found[out.number]


def _real(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _with(draw: Any, copy: Any, value: Any) -> Any:
    return draw.reshape(-1).at[copy].set(value).reshape(draw.shape)


def _spread_out(x: Any, ndim: int) -> Any:
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def _weighed(q: Any, k: Any) -> Any:
    q = _spread_out(q, k.ndim)
    return jnp.sum(jnp.where(q > 0, q * k, 0), 0)


def _product(slope: Any, theta: Any, moved: Sequence[Any], message: str) -> Any:
    """Zero, with the derivative ``slope`` with respect to ``theta``. The axes of ``theta`` lead.

    A second derivative with respect to anything that may have ``moved`` is an error: not all of it is known.
    """

    @jax.custom_jvp
    def once(slope: Any, moved: Any) -> Any:
        return slope

    def refuse(primals: Any, tangents: Any) -> Any:
        if not all(
            isinstance(t, SymbolicZero) for t in jax.tree.leaves(tangents[1], is_leaf=_zero)
        ):
            raise GradientError(message)
        return primals[0], jnp.zeros_like(primals[0])

    once.defjvp(refuse, symbolic_zeros=True)

    @jax.custom_jvp
    def product(slope: Any, theta: Any, moved: Any) -> Any:
        return jnp.zeros_like(slope)

    def rule(primals: Any, tangents: Any) -> Any:
        slope, _, moved = primals
        zero = jnp.zeros_like(slope)
        if _zero(tangents[1]):
            return zero, zero
        return zero, once(slope, moved) * _spread_out(tangents[1], slope.ndim)

    product.defjvp(rule, symbolic_zeros=True)
    return product(slope, theta, list(moved))


def _zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _first_order(eqn: Any, what: str) -> str:
    return (
        f"a second derivative is needed through {eqn.params['name']!r}, but {what} has first ones only: take reparam, "
        "score, or enum of a single choice"
    )


def _no_tail(eqn: Any, names: Sequence[str]) -> GradientError:
    what = " and ".join(dict.fromkeys(map(repr, names)))
    return GradientError(
        f"enum and mvd need the rest of the program as a function of the choice, and {what} stands in "
        f"{described(eqn)}, where there is none: take score, reparam or reweight there, sum the choice out "
        "(marginalize), or write the loop in Python"
    )
