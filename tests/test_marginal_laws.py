"""Random programs with discrete choices: summed out they are right, or they are refused; never silently wrong.

Three kinds of programs: trees of constructs that stand within the rules, which have to be right; trees of
constructs that need not; and a few choices with any array function of them read by a site, most of which mix copies
that exact summing has to keep apart. All are held to 1e-10 of the sum over all joint values (`bruteforce`). Hypothesis
draws them (derandomised, so that a run can be repeated); set WEFT_MARGINALS to try more of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from weft.ppl import Model
from weft.ppl.addresses import flatten
from weft.ppl.errors import ModelError

from bruteforce import anything, log_evidence
from programs import quick_compilation
from weft import factor, gen, marginalize, sample, scope

lax = jax.lax
Normal = dist.Normal
NUM_EXAMPLES = int(os.environ.get("WEFT_MARGINALS", "10"))
MAX_VALUES = 1500

law = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink would take hundreds of compilations
    report_multiple_bugs=False,
    suppress_health_check=[],
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compilation():
        yield


# --- trees of constructs --------------------------------------------------------------------------


@dataclasses.dataclass
class Node:
    """A function of one number with sites; `name` is for those."""

    name: str

    def stage(self, v: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass
class Choice(Node):
    """A discrete choice whose law depends on the number; returns a function of it alone, or of both."""

    family: str
    keep: bool = False

    def stage(self, v):
        d = {
            "bernoulli": lambda: dist.Bernoulli(logits=0.5 - v),
            "probs": lambda: dist.Bernoulli(0.3),
            "categorical": lambda: dist.Categorical(logits=v * jnp.array([0.5, -1.0, 0.3])),
            "uniform": lambda: dist.DiscreteUniform(1, 2),
        }[self.family]()
        z = sample(self.name, d)
        return jnp.array([-1.0, 0.5, 1.25])[z] + (0.3 * v if self.keep else 0.0)


@dataclasses.dataclass
class Emit(Node):
    """A continuous choice; returns it, or the number as it came."""

    through: bool

    def stage(self, v):
        y = sample(self.name, Normal(v, 1.0 + 0.1 * jnp.abs(v)))
        return v if self.through else y


@dataclasses.dataclass
class Soft(Node):
    def stage(self, v):
        factor(self.name, jnp.sin(2 * v))
        return v


@dataclasses.dataclass
class Batch(Node):
    """A choice and what reads it with their copies inside the distribution."""

    def stage(self, v):
        z = sample(self.name, dist.Bernoulli(logits=jnp.array([0.2, -0.5]) * v))
        sample(self.name + "y", Normal(jnp.array([0.5, -0.3]) * v + z, 1.0))
        return v


@dataclasses.dataclass
class Then(Node):
    first: Node
    second: Node

    def stage(self, v):
        return self.second.stage(self.first.stage(v))


@dataclasses.dataclass
class Both(Node):
    first: Node
    second: Node

    def stage(self, v):
        return self.first.stage(v) - 0.5 * self.second.stage(v)


@dataclasses.dataclass
class Lanes(Node):
    """A vmap; what comes out goes nowhere, into other lanes, or into one number."""

    body: Node
    size: int
    out: str

    def stage(self, v):
        shifts = jnp.array([0.5, -1.0])[: self.size]
        out = jax.vmap(lambda s: self.body.stage(v * s))(shifts)
        if self.out == "lanes":
            jax.vmap(lambda o, s: sample(self.name, Normal(o, 1.0 + s**2)))(out, shifts)
        if self.out == "batch":
            sample(self.name, Normal(out + shifts, 1.0))
        if self.out == "branches":
            return jax.vmap(
                lambda o: lax.cond(
                    o > 0.1,
                    lambda: sample(self.name, Normal(o, 1.0)),
                    lambda: sample(self.name, Normal(-o, 2.0)),
                )
            )(out)[0]
        if self.out == "sum":
            return out.sum()
        if self.out == "first":
            return out[0]
        if self.out == "last":
            return out[::-1][0]
        if self.out == "dot":
            return out @ shifts
        return v


@dataclasses.dataclass
class Steps(Node):
    """A scan; its carry is what the body returns, or also keeps what came."""

    body: Node
    length: int
    reverse: bool
    keep: str = ""

    def stage(self, v):
        def step(c, x):
            new = self.body.stage(0.5 * c + x)
            return (new + 0.5 * c if self.keep == "carry" else new), c

        xs = jnp.array([0.5, -1.0, 0.2])[: self.length]
        last, before = lax.scan(step, v, xs, reverse=self.reverse)
        if self.keep == "stack":
            return before.sum()
        if self.keep == "first":
            return last + v
        return last


@dataclasses.dataclass
class Vector(Node):
    """A scan over a vector of states, one chain for each element."""

    length: int
    roll: bool

    def stage(self, v):
        def step(c, x):
            z = sample(self.name, dist.Bernoulli(logits=x * c))
            sample(self.name + "y", Normal(z + c, 1.0))
            c = jnp.array([-0.5, 1.0])[z]
            return (jnp.roll(c, 1) if self.roll else c), None

        last, _ = lax.scan(
            step, v * jnp.array([0.3, 0.6]), jnp.array([0.5, -1.0, 0.2])[: self.length]
        )
        sample(self.name + "e", Normal(last, 1.0))
        return v


@dataclasses.dataclass
class Branch(Node):
    yes: Node
    no: Node
    on: bool  # what decides: the number, or something known

    def stage(self, v):
        index = v > 0.2 if self.on else jnp.array(len(self.name) % 2 == 0)
        return lax.cond(index, self.yes.stage, lambda v: self.no.stage(-v), v)


@dataclasses.dataclass
class Called(Node):
    body: Node
    how: str

    def stage(self, v):
        if self.how == "program":
            return sample(self.name, gen(self.body.stage)(v))
        if self.how == "scope":
            return scope(self.body.stage, self.name)(v)
        return {"jit": jax.jit, "checkpoint": jax.checkpoint}[self.how](self.body.stage)(v)


_ANY = st.just("")
_FAMILIES = st.sampled_from(["bernoulli", "probs", "categorical", "uniform"])
_CALLS = st.sampled_from(["jit", "checkpoint", "program", "scope"])


def sound(depth: int) -> st.SearchStrategy[Any]:
    """Trees within the rules: lanes go apart, carries hold the last choice."""
    choice = st.builds(Choice, _ANY, _FAMILIES)
    emit = st.builds(Emit, _ANY, st.booleans())
    leaf = st.one_of(choice, st.builds(Then, _ANY, choice, emit), st.builds(Batch, _ANY))
    if depth == 0:
        return leaf
    deeper = sound(depth - 1)
    body = st.builds(Then, _ANY, deeper, st.one_of(choice, st.builds(Then, _ANY, choice, emit)))
    flags = st.booleans()
    return st.one_of(
        leaf,
        st.builds(Then, _ANY, deeper, st.one_of(deeper, st.builds(Soft, _ANY), emit)),
        st.builds(Both, _ANY, choice, deeper),
        st.builds(
            Lanes,
            _ANY,
            deeper,
            st.sampled_from([1, 2, 2]),
            st.sampled_from(["", "lanes", "batch"]),
        ),
        st.builds(Steps, _ANY, body, st.sampled_from([1, 2, 3]), flags),
        st.builds(Steps, _ANY, body, st.sampled_from([2, 3]), flags),
        st.builds(Vector, _ANY, st.sampled_from([1, 2, 3]), st.just(False)),
        st.builds(Branch, _ANY, deeper, leaf, flags),
        st.builds(Called, _ANY, deeper, _CALLS),
    )


def wild(depth: int) -> st.SearchStrategy[Any]:
    """Any tree."""
    flags = st.booleans()
    choice = st.builds(Choice, _ANY, _FAMILIES, flags)
    emit = st.builds(Emit, _ANY, flags)
    leaf = st.one_of(choice, st.builds(Then, _ANY, choice, emit), emit, st.builds(Batch, _ANY))
    if depth == 0:
        return leaf
    deeper = wild(depth - 1)
    outs = st.sampled_from(["", "lanes", "batch", "sum", "first", "last", "dot", "branches"])
    keep = st.sampled_from(["", "carry", "stack", "first"])
    lengths = st.sampled_from([0, 1, 2, 2, 3])
    return st.one_of(
        st.builds(Then, _ANY, deeper, st.one_of(deeper, st.builds(Soft, _ANY), emit)),
        st.builds(Both, _ANY, deeper, wild(max(depth - 2, 0))),
        st.builds(Lanes, _ANY, deeper, st.sampled_from([1, 2, 2]), outs),
        st.builds(Steps, _ANY, deeper, lengths, flags, keep),
        st.builds(Vector, _ANY, st.sampled_from([1, 2, 3]), flags),
        st.builds(Branch, _ANY, deeper, wild(max(depth - 2, 0)), flags),
        st.builds(Called, _ANY, deeper, _CALLS),
    )


def named(node: Node, names: Iterator[int]) -> Node:
    """Give every part of a tree a name of its own; the two choices of a branch may share one."""
    parts = {
        f.name: getattr(node, f.name)
        for f in dataclasses.fields(node)
        if isinstance(getattr(node, f.name), Node)
    }
    name = f"n{next(names)}"
    inner = itertools.count() if isinstance(node, Called) and node.how == "program" else names
    found = dataclasses.replace(node, name=name, **{k: named(p, inner) for k, p in parts.items()})
    if isinstance(found, Branch):
        yes, no = found.yes, found.no
        if isinstance(yes, Choice) and isinstance(no, Choice) and len(found.name) % 2 == 0:
            found.no = dataclasses.replace(no, name=yes.name, family=yes.family)
    return found


def program(tree: Node) -> Model:
    """A program that reads what the tree gives, and returns nothing."""
    tree = named(tree, itertools.count())

    def run() -> None:
        sample("end", Normal(tree.stage(0.4), 1.0))

    return gen(run)


# --- the law --------------------------------------------------------------------------------------


def right(model: Model, gradients: bool = False, **options: Any) -> None:
    """The marginal density, and its gradients, equal the sum over all joint values.

    Raises:
        ModelError: if the program is refused.
    """
    target = model().given()
    found = [a for a in target.latents if target.sites[a].is_discrete]
    copies = [target.sites[a].num_values for a in found for _ in range(target.sites[a].size)]
    assume(found and math.prod(copies) <= MAX_VALUES)
    marginal = marginalize(model, *found, **options)().given()
    latents = anything(marginal)
    functions = [marginal.log_density, lambda x: log_evidence(target, x, found)]
    if gradients:
        functions = [jax.value_and_grad(f) for f in functions]
    left, whole = jax.jit(lambda x: [f(x) for f in functions])(latents)
    if not gradients:
        np.testing.assert_allclose(left, whole, rtol=1e-10, atol=1e-10)
        return
    np.testing.assert_allclose(left[0], whole[0], rtol=1e-10, atol=1e-10)
    for a, slope in flatten(left[1]).items():
        np.testing.assert_allclose(slope, whole[1][a], rtol=1e-8, atol=1e-9, err_msg=a)


@law
@given(tree=sound(3), gradients=st.booleans(), parallel=st.booleans())
def test_programs_within_the_rules_are_right(tree: Node, gradients: bool, parallel: bool) -> None:
    right(program(tree), gradients, parallel=parallel)


@law
@given(tree=wild(3), parallel=st.booleans())
def test_any_program_is_right_or_refused(tree: Node, parallel: bool) -> None:
    with contextlib.suppress(ModelError):
        right(program(tree), parallel=parallel)
