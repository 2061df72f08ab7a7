"""What a marginalisation will do: the rule for each choice, and its cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from weft.ppl.programs.handlers import Given
from weft.ppl.programs.models import Model
from weft.ppl.programs.printing import Printed, table
from weft.ppl.programs.programs import Program
from weft.ppl.programs.targets import Target
from weft.ppl.stage.addresses import unflatten
from weft.ppl.stage.interpreter import interpret

from .density import Posterior
from .plan import Elimination, Plan


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation(Printed):
    """How the choices of a program are summed out. It prints as a table.

    Attributes:
        name: the name of the program.
        rules: for every choice that is summed out, by dotted address, how that is done.
        terms: for every such choice, the entries of all tables that are summed over it in one evaluation of the
            density.
        flops: for every normal choice, about how many operations its elimination takes in one evaluation.
        largest: the entries of the largest table, with copies counted once. ``max_terms`` bounds it.
    """

    name: str
    rules: dict[str, Elimination]
    terms: dict[str, int]
    flops: dict[str, int]
    largest: int

    def __repr__(self) -> str:
        if not self.rules:
            return f"{self.name!r}: nothing is summed out"
        n = len(self.rules)
        counts = []
        if self.terms:
            terms = sum(self.terms.values())
            counts.append(f"{terms:,} terms in all, {self.largest:,} in the largest table")
        if self.flops:
            counts.append(f"about {sum(self.flops.values()):,} flops for normal choices")
        head = f"{self.name!r}: {n} choice{'s' if n > 1 else ''} summed out, {', '.join(counts)}\n"
        rows = [
            [a, r.distribution, _values(r), _how(r), self._cost(a, r)]
            for a, r in self.rules.items()
        ]
        last = "cost" if self.flops else "terms"
        return head + table(["choice", "distribution", "table", "rule", last], rows, width=64)

    def _cost(self, address: str, rule: Elimination) -> str:
        if rule.dimension is not None:
            return f"{self.flops.get(address, 0):,} flops"
        terms = f"{self.terms.get(address, 0):,}"
        return f"{terms} terms" if self.flops else terms


def _values(how: Elimination) -> str:
    if how.dimension is not None:
        return f"{how.dimension:,} number{'s' if how.dimension > 1 else ''}"
    return f"{how.num_values:,} {'values' if how.family is None else 'points'}"


def _how(how: Elimination) -> str:
    words = []
    if how.dimension is not None:
        words.append("normal")
    if how.family is not None:
        words.append("closed form")
    if how.joint > 1:
        words.append(f"{how.joint} copies jointly")
    if how.copies:
        words.append(f"copy by copy, {' x '.join(map(str, how.copies))}")
    if how.chain is not None:
        order, steps, tree = how.chain
        chain = f"chain of order {order}" if order else "step by step"
        if how.dimension is not None and order:
            chain = "Kalman filter"
        words.append(f"{chain}, {steps:,} steps{' in a tree' if tree else ''}")
    return "; ".join(words) or "one sum"


def explain(model: Model | Program | Target, *args: Any) -> Explanation:
    """How `marginalize` sums out the choices of a model, and at what cost. Nothing is evaluated.

    For normal choices it says about how many operations one evaluation of the density takes. For all others, terms are
    the entries of the tables that are summed in one evaluation. Time is proportional to them, and so is the memory of a
    gradient.

    Args:
        model: a marginalised model, a program or a target. For a target, missing data count as choices.
        *args: the arguments of a model.

    Raises:
        ModelError: if a choice cannot be summed out exactly, as in an evaluation.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import explain, gen, marginalize, sample
        >>> @gen
        ... def hidden_markov(stay, num_steps):
        ...     def step(z, _):
        ...         z = sample("z", dist.Categorical(jnp.where(jnp.arange(3) == z, stay, (1 - stay) / 2)))
        ...         sample("y", dist.Normal(z, 1.0))
        ...         return z, None
        ...     jax.lax.scan(step, 0, length=num_steps)
        >>> explain(marginalize(hidden_markov, "z"), 0.9, 100)
        'hidden_markov': 1 choice summed out, 894 terms in all, 9 in the largest table
          choice  distribution      table     rule                         terms
          z       CategoricalProbs  3 values  chain of order 1, 100 steps  894
    """
    target = model(*args) if isinstance(model, Model) else model
    program = target.program if isinstance(target, Target) else target
    program = program.staged()
    code, operands = program.code()
    data = target.data if isinstance(target, Target) else {}
    latent = {
        a: jax.ShapeDtypeStruct(program.sites[a].shape, program.sites[a].dtype)
        for a in target.latents
    }
    plans: list[Plan] = []

    def score(latent: dict[str, Any], data: dict[str, Given], operands: list[Any]) -> Any:
        given = {
            **data,
            **{a: Given(x, None, getattr(data.get(a), "drop", None)) for a, x in latent.items()},
        }
        return interpret(code.jaxpr, operands, Posterior(plans=plans), None, unflatten(given))[2]

    jax.eval_shape(score, latent, data, operands)
    rules = {a: r for p in plans for a, r in p.rules.items()}
    terms = {a: n for p in plans for a, n in p.limit.terms.items()}
    flops = {a: n for p in plans for a, n in p.limit.flops.items()}
    return Explanation(
        program.name, rules, terms, flops, max((p.limit.largest for p in plans), default=1)
    )
