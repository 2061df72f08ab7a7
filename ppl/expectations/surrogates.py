r"""Surrogates: a program with marked draws, evaluated so that its value and its derivatives are both unbiased.

An expectation is evaluated in two stages. First the interpreter turns the program into a plain jaxpr. Every draw that
is not reparametrised is *marked* there: an equation hands the draw on, and holds what its strategy needs. The second
stage is here. It evaluates that jaxpr in such a way that the derivatives are right.

Values know on which draws they depend (``effects.py``), and results are taken apart into terms (``terms.py``).

*Score terms* do not need the rest of the program. Write $l = \log q_\theta(x)$ at a stopped draw. A cost $c$ that
depends on $x$ is replaced by $\square(l)\, (c - b) + b$, where $\square(l) = \exp(l - \operatorname{stop} l)$ has value
one and carries the score in every derivative, of whatever order (Foerster et al. 2018, "DiCE"). The jaxpr tells on
which draws a cost depends, element by element along the axes that batch-axis propagation keeps apart. A sum is boxed
term by term, each term with its own draws only.

*Enumeration* and *measure-valued derivatives* need the rest of the program as a function $k$ of the draw. This is the
tail of the jaxpr after the draw, also out of calls and branches. The tail is run under ``vmap``, and all other draws
keep their noise (``tails.py``). In a scan or a loop there is no tail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.compat import Literal, bind, open_jaxpr, scan_sizes
from weft.ppl.stage.errors import GradientError
from weft.ppl.stage.jaxprs import evaluate_inside
from weft.ppl.stage.wiring import (
    described,
    inside,
    is_call,
    is_checkpoint,
    is_loop,
    kind,
    states_derivative,
)

from .effects import Effect, Node, copywise, effects_of, is_precise, is_real, sums
from .marks import TAILED, holds_marks, kinds, makes_refs, mark_p
from .relaxed import is_of_a_density, not_carried, relaxed
from .tails import differenced, enumerated, no_tail
from .terms import linearly

stop = jax.lax.stop_gradient


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

        if makes_refs(jaxpr):
            raise GradientError(
                "the program changes an array in place (jax.new_ref), so that it is not known what depends on the "
                "choices with strategies: write it with .at[...].set"
            )
        self.moved = [a for a in args if is_real(a)]
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

            def rest(
                outs: Sequence[Node], terms: int, pure: bool = False, i: int = i, eqn: Any = eqn
            ) -> Any:
                known = {**env, **dict(zip(eqn.outvars, outs, strict=True))}
                with self.having(pure=self.pure or pure):
                    return self.go(jaxpr, i + 1, known, then, terms)

            marks = kinds([eqn]) if holds_marks.at(eqn) else []
            if self.pure:
                marks = [pair for pair in marks if pair[1] == "reweight"]
            tailed = [name for name, kind in marks if kind in TAILED]
            if not tailed:
                env.update(zip(eqn.outvars, self.equation(eqn, inputs, bool(marks)), strict=True))
            elif eqn.primitive is mark_p and eqn.params["kind"] == "enum":
                return enumerated(eqn, inputs, rest, self.moved, terms, self.max_terms)
            elif eqn.primitive is mark_p:
                return differenced(eqn, inputs, rest, self.moved, terms)
            elif kind(eqn) == "branches":
                return self.branches(eqn, inputs, rest, terms)
            elif is_call(eqn):
                return self.run(inside(eqn)[0], inputs, lambda o: rest(o, terms), terms)
            else:
                raise no_tail(eqn, tailed)
        return then([read(v) for v in jaxpr.outvars])

    def equation(self, eqn: Any, inputs: list[Node], marked: bool) -> Sequence[Node]:
        """Evaluate an equation in which no mark needs a tail."""
        if eqn.primitive is mark_p:
            return [self.marked(eqn, inputs)]
        if any(n.relaxed is not None for n in inputs):
            of_density = self.scores or is_of_a_density(eqn)
            if not _is_plain(eqn):
                return relaxed(eqn, inputs, of_density)
            with self.having(scores=of_density):
                return self.run(inside(eqn)[0], inputs, lambda outs: outs)
        dependent = any(n.deps for n in inputs) and (self.weighs or not self.pure)
        if _is_plain(eqn) and (marked or dependent):
            return self.run(inside(eqn)[0], inputs, lambda outs: outs)
        if marked:
            return self.beside(eqn, inputs)
        values = bind(eqn, [n.value for n in inputs])
        if not dependent:
            return [Node(v) for v in values]
        deps = effects_of(eqn, inputs)
        return [
            Node(v, d, eqn, inputs, o) for o, (v, d) in enumerate(zip(values, deps, strict=True))
        ]

    def branches(
        self, eqn: Any, inputs: list[Node], rest: Callable[..., Any], terms: int
    ) -> list[Any]:
        """Evaluate a cond with marks that need a tail. The tail goes into the branches."""
        index, *operands = inputs
        decided = copywise([index], 0)

        def taking(branch: Any) -> Callable[[], Any]:
            def after(outs: list[Node]) -> Any:
                # What is computed in a branch depends on what chose it.
                chosen = [Node(o.value, {**o.deps, **decided}) for o in outs]
                return rest(chosen, terms)

            return lambda: self.run(branch, operands, after, terms)

        return jax.lax.switch(index.value, [taking(b) for b in eqn.params["branches"]])

    @contextlib.contextmanager
    def having(self, **settings: bool) -> Iterator[None]:
        """Evaluate what stands inside with other settings."""
        before = {name: getattr(self, name) for name in settings}
        vars(self).update(settings)
        try:
            yield
        finally:
            vars(self).update(before)

    # -- score terms

    def marked(self, eqn: Any, inputs: list[Node]) -> Node:
        """Evaluate a mark: a draw with a score term or a weight, or a cost with baselines of its own."""
        if eqn.params["kind"] == "control":
            return inputs[0] if self.pure else _controlled(*inputs)
        draw, term, *baselines = (n.value for n in inputs)
        if self.pure and eqn.params["kind"] != "reweight":
            return Node(draw, copywise(inputs, draw.ndim))
        if eqn.params["kind"] == "gumbel":
            return Node(draw, copywise(inputs, draw.ndim), relaxed=term)
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
        return Node(draw, {**copywise(inputs, term.ndim), effect: tuple(range(term.ndim))})

    def beside(self, eqn: Any, inputs: list[Node]) -> list[Node]:
        """Evaluate a scan, a branch or a checkpoint with score terms. Their sums come out beside its results."""
        values = [n.value for n in inputs]

        def body(jaxpr: Any, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            inner = Evaluator(None, self.max_terms)
            inner.pure, inner.weighs, inner.scores = self.pure, self.weighs, self.scores
            outs = inner.run(jaxpr, [Node(a) for a in args], lambda outs: outs)
            if any(n.relaxed is not None for n in outs):
                raise not_carried(eqn)
            return [n.value for n in outs], sums(inner.effects)

        if kind(eqn) not in ("loop", "branches", "call") or states_derivative(eqn):
            names = ", ".join(dict.fromkeys(repr(name) for name, _ in kinds([eqn])))
            raise GradientError(
                f"the choices {names} stand in {described(eqn)}, where no strategy but reparam is possible"
            )
        jaxprs = inside(eqn)
        outs, totals = evaluate_inside(eqn, values, lambda k, args: body(jaxprs[k], args))
        earlier = copywise(inputs, 0)
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
        if not out.deps or not is_real(out.value) or (self.pure and not self.weighs):
            return out.value
        found = linearly(out, self.box, lambda n: n.value)
        for effect in () if self.pure else out.deps:
            found = found - effect.control
            if effect.learned is not None:

                def follows(n: Node, effect: Effect = effect) -> Any:
                    return n.value if effect in n.deps else jnp.zeros_like(n.value)

                cost = jnp.sum(stop(linearly(out, follows, follows)))
                regression = cost * effect.learned[0] - 0.5 * effect.learned[1]
                found = found + (regression - stop(regression))
        return found

    def box(self, node: Node) -> Any:
        dtype = jnp.result_type(node.value)
        cost = node.value if is_precise(node.value) else node.value.astype(jnp.float32)
        if any(e.weighs for e in node.deps):
            cost = cost * jnp.exp(node.total("log_weight")).astype(cost.dtype)
        if self.pure:
            return cost.astype(dtype)
        others: Any = 0.0
        if self.axis is not None:
            n = jax.lax.psum(1, self.axis)
            others = stop((jax.lax.psum(cost, self.axis) - cost) / (n - 1))
            others = jnp.where(jnp.isfinite(others), others, 0)
        # Costs that are not finite are mostly those of a `where` that does not choose them: no score term, since zero
        # times infinity would be its derivative.
        finite = jnp.isfinite(cost)
        box = _box(node.total("log_q")).astype(cost.dtype)
        boxed = box * (jnp.where(finite, cost, 0) - others) + others
        return jnp.where(finite, boxed, cost).astype(dtype)


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


def _is_plain(eqn: Any) -> bool:
    """Whether an equation is a call that may be evaluated in place; checkpoints keep their purpose."""
    return is_call(eqn) and not is_checkpoint(eqn)
