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
        largest: the entries of the largest table, with copies counted once. ``max_terms`` bounds it.
    """

    name: str
    rules: dict[str, Elimination]
    terms: dict[str, int]
    largest: int

    def __repr__(self) -> str:
        if not self.rules:
            return f"{self.name!r}: nothing is summed out"
        n = len(self.rules)
        head = (
            f"{self.name!r}: {n} choice{'s' if n > 1 else ''} summed out, {sum(self.terms.values()):,} terms in all, "
            f"{self.largest:,} in the largest table\n"
        )
        rows = [
            [a, r.distribution, _values(r), _how(r), f"{self.terms.get(a, 0):,}"]
            for a, r in self.rules.items()
        ]
        return head + table(["choice", "distribution", "table", "rule", "terms"], rows, width=64)


def _values(how: Elimination) -> str:
    return f"{how.num_values:,} {'values' if how.family is None else 'points'}"


def _how(how: Elimination) -> str:
    words = []
    if how.family is not None:
        words.append("closed form")
    if how.joint > 1:
        words.append(f"{how.joint} copies jointly")
    if how.copies:
        words.append(f"copy by copy, {' x '.join(map(str, how.copies))}")
    if how.chain is not None:
        order, steps, tree = how.chain
        chain = f"chain of order {order}" if order else "step by step"
        words.append(f"{chain}, {steps:,} steps{' in a tree' if tree else ''}")
    return "; ".join(words) or "one sum"


def explain(model: Model | Program | Target, *args: Any) -> Explanation:
    """How `marginalize` sums out the choices of a model, and at what cost. Nothing is evaluated.

    Terms are the entries of the tables that are summed in one evaluation of the density. Time is proportional to them,
    and so is the memory of a gradient.

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
    return Explanation(program.name, rules, terms, max((p.limit.largest for p in plans), default=1))
