"""Random programs with discrete choices: summed out they are right, or they are refused; never silently wrong.

Three kinds of programs: trees of constructs that stand within the rules, which have to be right; trees of
constructs that need not; and a few choices with any array function of them read by a site, most of which mix copies
that exact summing has to keep apart. All are held to 1e-10 of the sum over all joint values (`bruteforce`). Hypothesis
draws them (derandomised, so that a run can be repeated); set WEFT_MARGINALS to try more of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from weft.ppl import Model, repeat
from weft.ppl.stage.addresses import flatten
from weft.ppl.stage.errors import ModelError

from bruteforce import anything, log_evidence
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

pytestmark = [
    pytest.mark.usefixtures("x64", "quick"),
    pytest.mark.slow,  # once is enough: not in every lane
]


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


def choices(model: Model) -> tuple[list[str], int]:
    """The discrete choices to be summed out, and how many joint values they have."""
    program = model()
    names = [a for a in program.latents if program.sites[a].is_discrete and a[0] != "y"]
    sites = [program.sites[a] for a in names]
    return names, math.prod(s.num_values**s.size for s in sites)


def right(model: Model, gradients: bool = False, **options: Any) -> None:
    """The marginal density, and its gradients, equal the sum over all joint values.

    Raises:
        ModelError: if the program is refused.
    """
    target, (found, _) = model().given(), choices(model)
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
    model = program(tree)
    assume(1 < choices(model)[1] <= MAX_VALUES)
    right(model, gradients, parallel=parallel)


@law
@given(tree=wild(3), parallel=st.booleans())
def test_any_program_is_right_or_refused(tree: Node, parallel: bool) -> None:
    model = program(tree)
    assume(1 < choices(model)[1] <= MAX_VALUES)
    with contextlib.suppress(ModelError):
        right(model, parallel=parallel)


# --- any function of an array of choices ----------------------------------------------------------


def whole(x: Any, size: int) -> Any:
    """An index below `size` made of real numbers."""
    return jnp.floor(jnp.abs(x) * 1.7).astype(int) % size


def _rows(f: Callable[[Any], Any], k: int, j: int = 0) -> Callable[[Any], Any]:
    return jax.vmap(f, in_axes=k, out_axes=j)


# Each of an array and two axes. Most mix copies; those that do not permute, repeat or drop them.
UNARY: dict[str, Callable[[Any, int, int], Any]] = {
    "flip": lambda x, k, j: jnp.flip(x, k),
    "roll": lambda x, k, j: jnp.roll(x, 1, k),
    "sort": lambda x, k, j: jnp.sort(x, k),
    "argsort": lambda x, k, j: jnp.argsort(x, k) + 0.0,
    "argmax": lambda x, k, j: jnp.argmax(x, k) + 0.0,
    "top_k": lambda x, k, j: lax.top_k(x, 1)[0],
    "transpose": lambda x, k, j: x.T,
    "swapaxes": lambda x, k, j: jnp.swapaxes(x, k, j),
    "ravel": lambda x, k, j: x.reshape(-1),
    "ravel columns": lambda x, k, j: x.T.reshape(-1),
    "shape turned": lambda x, k, j: x.reshape(x.shape[::-1]),
    "shape (2, -1)": lambda x, k, j: x.reshape(2, -1),
    "shape (-1, 2)": lambda x, k, j: x.reshape(-1, 2),
    "new axis": lambda x, k, j: jnp.expand_dims(x, k),
    "squeeze": lambda x, k, j: x.squeeze(),
    "sum": lambda x, k, j: x.sum(k),
    "sum kept": lambda x, k, j: x.sum(k, keepdims=True),
    "max": lambda x, k, j: x.max(k),
    "prod": lambda x, k, j: x.prod(k),
    "mean of all": lambda x, k, j: x.mean(),
    "centred": lambda x, k, j: x - x.mean(k, keepdims=True),
    "cumsum": lambda x, k, j: jnp.cumsum(x, k),
    "cumlogsumexp": lambda x, k, j: lax.cumlogsumexp(x, axis=k % x.ndim),
    "softmax": lambda x, k, j: jax.nn.softmax(x, k),
    "diff": lambda x, k, j: jnp.diff(x, axis=k),
    "median": lambda x, k, j: jnp.median(x, k),
    "turned rows": lambda x, k, j: x[jnp.array([1, 0])],
    "same rows": lambda x, k, j: x[jnp.arange(x.shape[0])],
    "turned columns": lambda x, k, j: x[:, jnp.array([1, 0])],
    "diagonal by index": lambda x, k, j: x[jnp.arange(2), jnp.arange(2)],
    "first": lambda x, k, j: x[0],
    "last element": lambda x, k, j: x[..., -1],
    "tail": lambda x, k, j: x[1:],
    "every second": lambda x, k, j: x[::2],
    "slice of an axis": lambda x, k, j: lax.dynamic_slice_in_dim(x, 1, 1, k % x.ndim),
    "element of an axis": lambda x, k, j: lax.dynamic_index_in_dim(x, 1, k % x.ndim, False),
    "along an order": lambda x, k, j: jnp.take_along_axis(
        x, jnp.argsort(jnp.arange(x.size).reshape(x.shape) % 3, k), k
    ),
    "spread in front": lambda x, k, j: jnp.broadcast_to(x, (2, *x.shape)),
    "spread behind": lambda x, k, j: jnp.broadcast_to(x[..., None], (*x.shape, 2)),
    "tile": lambda x, k, j: jnp.tile(x, 2),
    "tile rows": lambda x, k, j: jnp.tile(x, (2, 1)),
    "repeat": lambda x, k, j: jnp.repeat(x, 2, k),
    "twice": lambda x, k, j: jnp.concatenate([x, x], k),
    "and flipped": lambda x, k, j: jnp.concatenate([x, x[::-1]], k),
    "stack": lambda x, k, j: jnp.stack([x, 2 * x + 1], k),
    "stack flipped": lambda x, k, j: jnp.stack([x, x[::-1]], k),
    "gram": lambda x, k, j: x @ x.T,
    "from the right": lambda x, k, j: x @ jnp.array([[1.0, 0.5], [-1.0, 2.0]])[: x.shape[-1]],
    "from the left": lambda x, k, j: jnp.arange(1.0, 1 + x.shape[0]) @ x,
    "permuted by a matrix": lambda x, k, j: jnp.eye(x.shape[0])[::-1] @ x,
    "identity matrix": lambda x, k, j: jnp.eye(x.shape[0]) @ x,
    "outer": lambda x, k, j: jnp.outer(x, x),
    "pairs": lambda x, k, j: x[:, None] * x[None, :],
    "outer with numbers": lambda x, k, j: x[:, None] + jnp.arange(3.0),
    "einsum ii->i": lambda x, k, j: jnp.einsum("ii->i", x),
    "einsum ij->ji": lambda x, k, j: jnp.einsum("ij->ji", x),
    "einsum ij,ij->i": lambda x, k, j: jnp.einsum("ij,ij->i", x, x),
    "einsum ij,kj->ik": lambda x, k, j: jnp.einsum("ij,kj->ik", x, x),
    "kron": lambda x, k, j: jnp.kron(x, jnp.ones(2)),
    "kron of numbers": lambda x, k, j: jnp.kron(jnp.arange(1.0, 3.0), x),
    "diag": lambda x, k, j: jnp.diag(x),
    "triangle": lambda x, k, j: jnp.tril(jnp.ones((x.shape[0],) * 2)) @ x,
    "batched products": lambda x, k, j: x[..., None] @ x[..., None, :],
    "batch of two": lambda x, k, j: lax.dot_general(x, x, (((), ()), ((0,), (0,)))),
    "solve": lambda x, k, j: jnp.linalg.solve(3 * jnp.eye(2) + x[..., None, None], jnp.ones(2)),
    "solve across": lambda x, k, j: jnp.linalg.solve(3 * jnp.eye(x.shape[-1]) + 1.0, x),
    "inverse of pairs": lambda x, k, j: jnp.linalg.inv(3 * jnp.eye(x.size) + jnp.outer(x, x)),
    "eigenvalues": lambda x, k, j: jnp.linalg.eigvalsh(jnp.eye(2) + x[..., None, None]),
    "fft": lambda x, k, j: jnp.fft.fft(x).real,
    "fft of all axes": lambda x, k, j: jnp.fft.fftn(x[..., None] * jnp.ones(2)).real,
    "convolve": lambda x, k, j: jnp.convolve(x, jnp.array([0.5, 1.0]), "same"),
    "window": lambda x, k, j: lax.reduce_window(
        x, 0.0, lax.add, (2,) + (1,) * (x.ndim - 1), (1,) * x.ndim, "SAME"
    ),
    "pad": lambda x, k, j: jnp.pad(x, [(1, 0)] + [(0, 0)] * (x.ndim - 1)),
    "pad behind": lambda x, k, j: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]),
    "set": lambda x, k, j: x.at[0].set(1.0),
    "add to one": lambda x, k, j: x.at[..., 0].add(x[..., 1]),
    "scatter turned": lambda x, k, j: x.at[jnp.array([1, 0])].set(x),
    "update": lambda x, k, j: lax.dynamic_update_slice(x, x[:1] + 1, (1,) + (0,) * (x.ndim - 1)),
    "segments": lambda x, k, j: jax.ops.segment_sum(x, jnp.arange(x.shape[0]) % 2, 2),
    "counts": lambda x, k, j: jnp.bincount(whole(x, 2), length=2) + 0.0,
    "where any": lambda x, k, j: jnp.where(x.sum() > 0.5, x, -x),
    "where first": lambda x, k, j: jnp.where(x[0] > 0.5, x, -x),
    "where": lambda x, k, j: jnp.where(jnp.arange(x.shape[-1]) > 0, x, 0.0),
    "table": lambda x, k, j: jnp.array([3.0, 5.0, 7.0])[whole(x, 3)],
    "rows of a table": lambda x, k, j: jnp.arange(12.0).reshape(3, 4)[whole(x, 3)],
    "columns of a table": lambda x, k, j: jnp.arange(12.0).reshape(3, 4)[:, whole(x, 4)],
    "pairs of a table": lambda x, k, j: jnp.arange(9.0).reshape(3, 3)[
        whole(x, 3)[:, None], whole(x, 3)[None, :]
    ],
    "twice a table": lambda x, k, j: jnp.arange(9.0).reshape(3, 3)[whole(x, 3)][:, whole(x, 3)],
    "one hot": lambda x, k, j: jax.nn.one_hot(whole(x, 3), 3),
    "one hot in front": lambda x, k, j: jax.nn.one_hot(whole(x, 3), 3, axis=0),
    "one hot of each other": lambda x, k, j: jax.nn.one_hot(whole(x, x.shape[0]), x.shape[0]) @ x,
    "index of each other": lambda x, k, j: x[whole(x, x.shape[0])],
    "along each other": lambda x, k, j: jnp.take_along_axis(x, whole(x, x.shape[0]), 0),
    "while": lambda x, k, j: lax.while_loop(lambda v: v.sum() < 3, lambda v: v + 1.0, x),
    "while in lanes": lambda x, k, j: _rows(
        lambda r: lax.while_loop(lambda v: v.sum() < 1, lambda v: v + 1.0, r), k, j
    )(x),
    "loop that rolls": lambda x, k, j: lax.fori_loop(0, 2, lambda i, v: v + jnp.roll(v, 1, k), x),
    "loop that turns": lambda x, k, j: lax.fori_loop(0, 3, lambda i, v: v.T, x),
    "loop": lambda x, k, j: lax.fori_loop(0, 2, lambda i, v: 0.5 * v + 1, x),
    "scan that adds": lambda x, k, j: lax.scan(lambda c, r: (c + r, c), 0.0 * x[0], x)[1],
    "scan of rows": lambda x, k, j: lax.scan(lambda c, r: (c, r + 1), 0.0, x, reverse=True)[1],
    "scan with it": lambda x, k, j: lax.scan(lambda c, i: (c + i, c), x, jnp.arange(2.0))[1],
    "scan that turns": lambda x, k, j: lax.scan(lambda c, i: (c.T, c[0]), x, jnp.arange(2))[1],
    "map": lambda x, k, j: lax.map(lambda r: 2 * r, x),
    "associative scan": lambda x, k, j: lax.associative_scan(jnp.add, x, axis=k % x.ndim),
    "lanes": lambda x, k, j: _rows(lambda r: r + 1.0, k, j)(x),
    "sums of lanes": lambda x, k, j: _rows(lambda r: r + jnp.sum(r), k, j)(x),
    "all in lanes": lambda x, k, j: jax.vmap(lambda r: x + r)(x),
    "lanes and flipped": lambda x, k, j: jax.vmap(lambda r, s: r + s)(x, x[::-1]),
    "mean over lanes": lambda x, k, j: jax.vmap(
        lambda r: r - lax.pmean(r, "lane"), axis_name="lane"
    )(x),
    "gathered lanes": lambda x, k, j: jax.vmap(
        lambda r: lax.all_gather(r, "lane"), axis_name="lane"
    )(x),
    "cond": lambda x, k, j: lax.cond(x.sum() > 1, lambda v: v + 1, lambda v: 2 * v, x),
    "cond in lanes": lambda x, k, j: jax.vmap(
        lambda r: lax.cond(r.sum() > 0.5, lambda v: v + 1, lambda v: 2 * v, r)
    )(x),
    "checkpoint": lambda x, k, j: jax.checkpoint(lambda v: v.sum(k))(x),
    "barrier": lambda x, k, j: lax.optimization_barrier((x, x[::-1]))[1],
    "largest along": lambda x, k, j: lax.top_k(x, x.shape[k], axis=k)[0],
    "reduced by a function": lambda x, k, j: lax.reduce(x, -jnp.inf, jnp.logaddexp, (k,)),
    "rows reduced": lambda x, k, j: lax.reduce(x[..., None], 0.0, lambda a, b: a + b, (k,)),
}

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "turned": lambda x, y: x + y.T,
    "flipped": lambda x, y: x - y[::-1],
    "outer": lambda x, y: x[:, None] + y,
    "outer turned": lambda x, y: x[None, :] * y[:, None],
    "matmul": lambda x, y: x @ y,
    "where": lambda x, y: jnp.where(x > 0.5, y, -y),
    "where any": lambda x, y: jnp.where(x.sum() > 0.5, y, -y),
    "concatenate": lambda x, y: jnp.concatenate([x, y]),
    "stack": lambda x, y: jnp.stack([x, y], -1),
    "index": lambda x, y: x[whole(y, x.shape[0])],
    "along": lambda x, y: jnp.take_along_axis(x, whole(y, x.shape[-1])[..., None], -1),
    "lanes": lambda x, y: jax.vmap(lambda a, b: a * b)(x, y),
    "lanes, second axis": lambda x, y: jax.vmap(lambda a, b: a + b, in_axes=(0, 1))(x, y),
    "lanes, one fixed": lambda x, y: jax.vmap(lambda a: a + y.sum())(x),
    "index in lanes": lambda x, y: jax.vmap(lambda a, b: a[whole(b, a.shape[0])])(x, y),
    "lanes of lanes": lambda x, y: jax.vmap(lambda a: jax.vmap(lambda b: a + b)(y))(x),
    "einsum ij,ji->ij": lambda x, y: jnp.einsum("ij,ji->ij", x, y),
    "einsum ij,i->j": lambda x, y: jnp.einsum("ij,i->j", x, y),
    "einsum ij,j->ij": lambda x, y: jnp.einsum("ij,j->ij", x, y),
    "batched dot": lambda x, y: lax.dot_general(x, y, (((), ()), ((0,), (0,)))),
    "contracted dot": lambda x, y: lax.dot_general(x, y, (((0,), (0,)), ((), ()))),
    "slice at": lambda x, y: lax.dynamic_index_in_dim(x, whole(y.reshape(-1)[0], 2), 0, False),
    "update": lambda x, y: lax.dynamic_update_slice(x, y, (0,) * x.ndim),
    "set at": lambda x, y: x.at[whole(y, x.shape[0])].set(1.0),
    "cond": lambda x, y: lax.cond(x.reshape(-1)[0] > 0.5, lambda a, b: a, lambda a, b: b, x, y),
    "cond in lanes": lambda x, y: jax.vmap(
        lambda a, b: lax.cond(a.sum() > 0.5, lambda b: b, lambda b: 2 * b, b)
    )(x, y),
    "scan with it": lambda x, y: lax.scan(lambda c, r: (c, r + c), y, x)[1],
    "scan of both": lambda x, y: lax.scan(lambda c, r: (c, r[0] + r[1]), 0.0, (x, y))[1],
    "scan that shifts": lambda x, y: lax.scan(lambda c, r: (r, c), y[0], x)[1],
    "sorted by": lambda x, y: lax.sort((x, y), dimension=x.ndim - 1, num_keys=1)[1],
    "solve": lambda x, y: jnp.linalg.solve(3 * jnp.eye(y.shape[0]) + jnp.outer(y, y), x),
    "clamp": lambda x, y: lax.clamp(x, y, x + 1),
}


def _reader(d: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, x: sample(name, d(x))


# What reads the array in the end.
READERS: dict[str, Callable[[str, Any], Any]] = {
    "batch": _reader(lambda x: Normal(x, 1.0)),
    "event": _reader(lambda x: Normal(x, 1.0).to_event(1)),
    "multivariate": _reader(lambda x: dist.MultivariateNormal(x, jnp.eye(x.shape[-1]))),
    "logits": _reader(lambda x: dist.Categorical(logits=x)),
    "scales": _reader(lambda x: Normal(jnp.ones((*x.shape, 2)), 1.0 + x[..., None] ** 2)),
    "factor": lambda name, x: factor(name, jnp.sin(x)),
    "factor of a sum": lambda name, x: factor(name, jnp.sin(x).sum()),
    "lanes": lambda name, x: jax.vmap(lambda r: sample(name, Normal(r, 1.0)))(x),
    "lanes of columns": lambda name, x: jax.vmap(
        lambda r: sample(name, Normal(r, 1.0)), in_axes=-1
    )(x),
    "nested lanes": lambda name, x: jax.vmap(
        scope(lambda r: sample("y", Normal(r, 1.0)), name), in_axes=-1
    )(x),
    "branches": lambda name, x: jax.vmap(
        lambda r: lax.cond(
            r.sum() > 0.5,
            lambda r: sample(name, Normal(r, 1.0)),
            lambda r: sample(name, Normal(2 * r, 1.0)),
            r,
        )
    )(x),
    "scan over it": lambda name, x: lax.scan(
        lambda c, r: (c, sample(name, Normal(r, 1.0))), 0.0, x
    ),
    "scan with it": lambda name, x: lax.scan(
        lambda c, t: (c, sample(name, Normal(c, 1.0 + t))), x, jnp.arange(2.0)
    ),
    "scan that turns it": lambda name, x: lax.scan(
        lambda c, t: (c[::-1], sample(name, Normal(c, 1.0 + t))), x, jnp.arange(2.0)
    ),
}

SHAPES = [(2,), (3,), (2, 2), (1,), (2, 3), (1, 2), (2, 1), ()]


def copies(name: str, shape: tuple[int, ...], how: str) -> Any:
    """Independent choices as one array of real numbers."""
    d = dist.Bernoulli(0.3)
    if how == "batch":
        z = sample(name, d.expand(shape))
    elif how == "mixed" and shape:
        z = repeat(lambda: sample(name, d.expand(shape[1:])), shape[0])
    else:
        part = gen(lambda: sample("v", d))
        draw = (lambda: sample(name, part())) if how == "nested" else (lambda: sample(name, d))
        for size in reversed(shape):
            draw = functools.partial(repeat, draw, size)
        z = draw()
    return 0.7 * z + 0.3


@pytest.mark.parametrize("name", UNARY)
def test_any_function_of_copies_is_right_or_refused(name: str) -> None:
    """Of a vector and of a matrix of copies, read by a batch site."""
    for shape, k, j in (((3,), 0, 0), ((2, 2), 0, 1), ((2, 2), 1, 0)):

        def model(shape=shape, k=k, j=j):
            x = copies("z", shape, "nested" if j else "batch")
            with contextlib.suppress(*MISFITS):
                x = UNARY[name](x, k, j)
            sample("y", Normal(x, 1.0))

        with contextlib.suppress(ModelError):
            right(gen(model))


@law
@given(data=st.data())
def test_any_functions_of_several_copies_are_right_or_refused(data: Any) -> None:
    """Up to three arrays of choices, up to three functions of them, one or two sites that read what comes out."""
    hows = st.sampled_from(["batch", "lanes", "mixed", "nested"])
    arrays = data.draw(st.lists(st.tuples(st.sampled_from(SHAPES), hows), min_size=1, max_size=3))
    one = st.tuples(st.sampled_from(sorted(UNARY)), st.integers(-1, 1), st.integers(-1, 1))
    steps = data.draw(
        st.lists(st.one_of(one, st.sampled_from(sorted(BINARY))), min_size=1, max_size=3)
    )
    readers = data.draw(st.lists(st.sampled_from(sorted(READERS)), min_size=1, max_size=2))
    order = data.draw(st.randoms(use_true_random=False))

    def model():
        choose = random.Random(order_seed)
        found = [copies("zwu"[i], *a) for i, a in enumerate(arrays)]
        for step in steps:
            with contextlib.suppress(*MISFITS):
                if isinstance(step, str):
                    x = BINARY[step](choose.choice(found), choose.choice(found))
                else:
                    x = UNARY[step[0]](choose.choice(found), *step[1:])
                if 0 < x.size <= 24 and x.ndim <= 3:
                    found.append(x)
        for i, reader in enumerate(readers):
            x = found[-1] if i == 0 else choose.choice(found)
            try:
                READERS[reader](f"y{i}", x)
            except MISFITS:
                READERS["batch"](f"y{i}", x)

    order_seed = order.randrange(10**6)
    assume(choices(gen(model))[1] <= 2**8)
    with contextlib.suppress(ModelError):
        right(gen(model))


MISFITS = (TypeError, ValueError, IndexError, ZeroDivisionError, AssertionError)
"""What JAX raises where a function is not made for an array of that shape."""
