"""Random compositions of the constructs: every one inside every other, against a walk in plain Python.

A tree of constructs is a function of one number, with normal sites at its leaves. `Node.stage` writes
it in JAX, `Node.walk` in Python loops and branches over the recorded choices. Hypothesis draws the
trees (derandomised, so that a run can be repeated); set WEFT_COMPOSITIONS to try more of them.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from weft.ppl import gen, loop, repeat, sample, scope
from weft.ppl.stage.addresses import flatten

from programs import Flat, Term, as_numpy, normal, total

pytestmark = pytest.mark.usefixtures("quick")

lax = jax.lax
NUM_EXAMPLES = int(os.environ.get("WEFT_COMPOSITIONS", "8"))
LANES = np.array([-0.5, 1.0])


def shifts() -> jax.Array:
    return jnp.array(LANES.tolist())


@dataclasses.dataclass
class Walk:
    """Where the walk in Python stands: scope, indices of the axes it is under, and what it has met."""

    choices: Flat
    terms: list[Term]
    prefix: str = ""
    index: tuple[int, ...] = ()

    def inside(self, name: str) -> "Walk":
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}.")

    def at(self, *index: int) -> "Walk":
        return dataclasses.replace(self, index=(*self.index, *index))


@dataclasses.dataclass
class Node:
    """A construct; `name` is its own, for sites and scopes."""

    name: str

    def stage(self, v: Any) -> Any:
        raise NotImplementedError

    def walk(self, v: float, w: Walk) -> float:
        raise NotImplementedError


@dataclasses.dataclass
class Site(Node):
    slope: float

    def stage(self, v):
        return sample(self.name, dist.Normal(self.slope * v, 1.5))

    def walk(self, v, w):
        address = w.prefix + self.name
        x = w.choices[address][w.index]
        w.terms.append(normal(address, x, self.slope * v, 1.5))
        return float(x)


@dataclasses.dataclass
class Then(Node):
    first: Node
    second: Node

    def stage(self, v):
        return self.second.stage(jnp.tanh(self.first.stage(v)))

    def walk(self, v, w):
        return self.second.walk(np.tanh(self.first.walk(v, w)), w)


@dataclasses.dataclass
class Lanes(Node):
    """A vmap; with `mapped` of the argument, else of nothing that the sites depend on."""

    body: Node
    mapped: bool
    named: bool

    def stage(self, v):
        name = {"axis_name": self.name} if self.named else {}
        if self.mapped:
            return jax.vmap(lambda x: self.body.stage(v + x), **name)(shifts()).sum()
        return repeat(lambda: self.body.stage(v), 2, **name).sum()

    def walk(self, v, w):
        shifts = LANES if self.mapped else np.zeros(2)
        return sum(self.body.walk(v + float(x), w.at(i)) for i, x in enumerate(shifts))


@dataclasses.dataclass
class Steps(Node):
    body: Node
    reverse: bool

    def stage(self, v):
        def step(c, x):
            return self.body.stage(0.5 * c + x), c

        out, before = lax.scan(step, v, shifts(), reverse=self.reverse)
        return out + 0.1 * before[0]

    def walk(self, v, w):
        before = {}
        for t in reversed(range(2)) if self.reverse else range(2):
            before[t] = v
            v = self.body.walk(0.5 * v + float(LANES[t]), w.at(t))
        return v + 0.1 * before[0]


@dataclasses.dataclass
class Counted(Node):
    body: Node

    def stage(self, v):
        return lax.fori_loop(0, 2, lambda i, c: self.body.stage(0.5 * c + i), v)

    def walk(self, v, w):
        for t in range(2):
            v = self.body.walk(0.5 * v + t, w.at(t))
        return v


@dataclasses.dataclass
class Bounded(Node):
    body: Node

    def stage(self, v):
        def body(c):
            n, c = c
            return n + 1 + (c > 0), self.body.stage(c)

        return loop(lambda c: c[0] < 2, body, 2, (jnp.zeros((), int), v))[1]

    def walk(self, v, w):
        n, t = 0, 0
        while n < 2 and t < 2:
            n, v, t = n + 1 + (v > 0), self.body.walk(v, w.at(t)), t + 1
        return v


@dataclasses.dataclass
class Branch(Node):
    yes: Node
    no: Node
    operand: bool

    def stage(self, v):
        if self.operand:
            return lax.cond(v > 0.2, self.yes.stage, lambda v: self.no.stage(-v), v)
        return lax.switch(
            (v > 0.2).astype(int), [lambda: self.no.stage(-v), lambda: self.yes.stage(v)]
        )

    def walk(self, v, w):
        return self.yes.walk(v, w) if v > 0.2 else self.no.walk(-v, w)


@dataclasses.dataclass
class Called(Node):
    body: Node
    how: str

    def stage(self, v):
        wrap = {"jit": jax.jit, "checkpoint": jax.checkpoint}[self.how]
        return wrap(self.body.stage)(v)

    def walk(self, v, w):
        return self.body.walk(v, w)


@dataclasses.dataclass
class Nested(Node):
    """A nested program, a scope, a vmapped program, or one jitted function in two scopes."""

    body: Node
    how: str

    def stage(self, v):
        if self.how == "program":
            return sample(self.name, gen(self.body.stage)(v))
        if self.how == "lanes":
            return sample(self.name, jax.vmap(gen(self.body.stage))(v + shifts())).sum()
        if self.how == "scope":
            return scope(self.body.stage, self.name)(v)
        helper = jax.jit(self.body.stage)
        again = scope(helper, self.name + "2")
        return again(0.5 * scope(helper, self.name)(v))

    def walk(self, v, w):
        inside = w.inside(self.name)
        if self.how == "lanes":
            return sum(self.body.walk(v + float(x), inside.at(i)) for i, x in enumerate(LANES))
        out = self.body.walk(v, inside)
        return out if self.how != "twice" else self.body.walk(0.5 * out, w.inside(self.name + "2"))


def nodes(depth: int) -> st.SearchStrategy[Any]:
    """Trees without names; they are given by `named`."""
    leaf = st.builds(Site, st.just(""), st.sampled_from([0.5, -1.0]))
    if depth == 0:
        return leaf
    deeper, flags = nodes(depth - 1), st.booleans()
    name = st.just("")
    return st.one_of(
        st.builds(Then, name, deeper, nodes(max(depth - 2, 0))),
        st.builds(Lanes, name, deeper, flags, flags),
        st.builds(Steps, name, deeper, flags),
        st.builds(Counted, name, deeper),
        st.builds(Bounded, name, deeper),
        st.builds(Branch, name, deeper, nodes(max(depth - 2, 0)), flags),
        st.builds(Called, name, deeper, st.sampled_from(["jit", "checkpoint"])),
        st.builds(Nested, name, deeper, st.sampled_from(["program", "lanes", "scope", "twice"])),
    )


def named(node: Node, names: Iterator[int]) -> Node:
    """Name the parts of a tree, each scope beginning anew: the same names in several scopes."""
    parts = {
        f.name: getattr(node, f.name)
        for f in dataclasses.fields(node)
        if isinstance(getattr(node, f.name), Node)
    }
    name = f"n{next(names)}"
    inner = itertools.count() if isinstance(node, Nested) else names
    return dataclasses.replace(node, name=name, **{k: named(p, inner) for k, p in parts.items()})


def shared_branches(node: Node) -> Node:
    """Give the two leaves of a branch one name: one address."""
    if isinstance(node, Branch) and isinstance(node.yes, Site) and isinstance(node.no, Site):
        return dataclasses.replace(node, no=dataclasses.replace(node.no, name=node.yes.name))
    return node


@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink would take hundreds of compilations
    report_multiple_bugs=False,
)
@given(tree=nodes(4), seed=st.integers(0, 1000))
def test_any_composition_scores_as_plain_python_does(tree: Node, seed: int) -> None:
    """In double precision, at six keys: log density, value, active choices, noise of its own for every site."""
    tree = shared_branches(named(tree, itertools.count()))
    with jax.enable_x64(True):
        program = gen(tree.stage)(0.4)

        def run(key: jax.Array) -> Any:
            trace = program.simulate(key)
            again, weight = program.generate(key, trace.choices)
            position = program.given().unconstrain()
            z = position.from_choices(trace.choices)
            back = position.to_choices(z)
            slope = jax.grad(position.log_density)(z)
            return trace, program.log_density(trace.choices), again, weight, back, slope

        sizes = {a: s.batch_shape for a, s in program.sites.items()}
        keys = jax.random.split(jax.random.key(seed), 6)
        trace, scored, again, weight, back, slope = jax.jit(jax.vmap(run))(keys)
    noises = []
    for k in range(6):
        w = Walk(as_numpy(trace.choices, k), [])
        value = tree.walk(0.4, w)
        np.testing.assert_allclose(trace.value[k], value, rtol=1e-9, atol=1e-9)
        for found in (trace.log_density, scored, again.log_density, weight):
            np.testing.assert_allclose(found[k], total(w.terms), rtol=1e-9, atol=1e-9)
        active = {a: np.asarray(v)[k] for a, v in flatten(trace.active).items()}
        counts = {
            a: np.broadcast_to(v.reshape(v.shape + (1,) * (len(sizes[a]) - v.ndim)), sizes[a]).sum()
            for a, v in active.items()
        }
        met = dict.fromkeys(counts, 0)
        for term in w.terms:
            met[term.address] += 1
        assert counts == met
        noises.append(np.concatenate([t.noise for t in w.terms]))
    gaps = np.diff(np.sort(np.abs(np.concatenate(noises))))
    assert gaps.min() > 1e-11
    jax.tree.map(np.testing.assert_array_equal, again.choices, trace.choices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), back, trace.choices)
    assert all(np.isfinite(s).all() for s in jax.tree.leaves(slope))
