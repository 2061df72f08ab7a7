"""Random linear-Gaussian programs: plates, index maps, scans and regressions, in one another, with observed leaves.

A program is a list of statements over a world, that is over what sites, lanes and steps are. Weft's world has `vmap`
and `scan`. The oracle's has loops over a `Joint` (`joint_normal`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from joint_normal import Joint
from linear_gaussian import Case, single
from weft import gen, sample

Values = list[Any]  # the numbers in scope
Body = Callable[..., Values]
P = {"s": 0.75, "t": 0.25, "a": 0.625}


class Weft:
    """Sites, lanes and steps in Weft."""

    def normal(self, name: str, loc: Any, sd: Any) -> Any:
        return sample(name, dist.Normal(loc, sd))

    def group(self, name: str, n: int, loc: Any, sd: Any) -> Any:
        return sample(name, dist.Normal(loc, sd).expand([n]))

    def lanes(self, f: Callable[..., Any], *inputs: Any) -> None:
        jax.vmap(lambda *x: f(*x) and None)(*(jnp.array(x) for x in inputs))

    def steps(self, f: Callable[..., Any], carry: Values, inputs: Any) -> Values:
        start = tuple(jnp.asarray(c, float) for c in carry)
        step = lambda c, u: (tuple(f(list(c), u)), None)  # noqa: E731
        return list(jax.lax.scan(step, start, jnp.array(inputs))[0])

    def product(self, matrix: Any, vector: Any) -> Any:
        return jnp.array(matrix) @ vector


class Loops:
    """Sites, lanes and steps of the oracle."""

    def __init__(self, joint: Joint) -> None:
        self.normal = joint.normal

    def group(self, name: str, n: int, loc: Any, sd: Any) -> Any:
        return self.normal(name, np.full(n, loc), sd)

    def lanes(self, f: Callable[..., Any], *inputs: Any) -> None:
        for x in zip(*inputs, strict=True):
            f(*x)

    def steps(self, f: Callable[..., Any], carry: Values, inputs: Any) -> Values:
        for u in inputs:
            carry = f(carry, u)
        return carry

    def product(self, matrix: Any, vector: Any) -> Any:
        return matrix @ vector


class Program:
    """A random program. Statements are functions of (world, p, values in scope) that give new values."""

    def __init__(self, seed: int, depth: int = 2) -> None:
        self.rng = random.Random(seed)
        self.names: list[str] = []  # of choices
        self.count = 0
        top = self.choice(0, sd=self.rng.choice([1.0, 8.0, 512.0]))
        self.run = self.sequence(0, [lambda _: top, *self.statements(depth), self.leaf])

    def case(self, name: str) -> Case:
        def model(p: Any, x: Any) -> None:
            self.run(Weft(), p, [])

        model.__name__ = name

        def oracle(j: Joint, p: Any, x: Any) -> None:
            self.run(Loops(j), p, [])

        return Case(name, gen(model), tuple(self.names), P, {}, oracle)

    # --- what a program consists of: each takes the number of values in scope

    def statements(self, depth: int) -> list[Callable[[int], tuple[Body, int]]]:
        kinds = [self.choice, self.relation, self.leaf, self.rows, self.regression]
        if depth:
            kinds += [lambda n: self.plate(n, depth - 1), lambda n: self.scan(n, depth - 1)] * 2
        return self.rng.sample(kinds, 2 if depth else 1)

    def sequence(self, scope: int, parts: Iterable[Callable[[int], tuple[Body, int]]]) -> Body:
        """Statements one after the other; each sees the values of those before."""
        bodies = []
        for part in parts:
            body, added = part(scope)
            bodies.append(body)
            scope += added
        self.scope = scope

        def run(world: Any, p: Any, values: Values) -> Values:
            for body in bodies:
                values = values + body(world, p, values)
            return values

        return run

    def name(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def affine(self, scope: int, last: bool = True) -> Callable[[Any, Values], Any]:
        """An affine function of one or two values, the last one among them."""
        picked = [scope - 1] if scope and last else []
        picked += self.rng.sample(range(scope), min(scope, 1))
        terms = [(i, self.rng.choice([-0.5, 0.5, 1.0, 1.0])) for i in dict.fromkeys(picked)]
        shift, scaled = self.rng.choice([0.0, 0.5, -2.0]), self.rng.random() < 0.3

        def value(p: Any, values: Values) -> Any:
            total = sum((c * values[i] for i, c in terms), 0.0)
            return (p["a"] * total if scaled else total) + shift

        return value

    def width(self) -> Callable[[Any], Any]:
        which, factor = self.rng.choice("st"), self.rng.choice([0.5, 1.0, 2.0])
        return lambda p: factor * p[which]

    def inputs(self, *shape: int) -> np.ndarray:
        return single(np.random.default_rng(self.rng.randrange(10**6)).normal(size=shape))

    def choice(self, scope: int, sd: float | None = None) -> tuple[Body, int]:
        name, loc, width = self.name("x"), self.affine(scope), self.width()
        self.names.append(name)
        width = width if sd is None else lambda p: sd
        return lambda w, p, v: [w.normal(name, loc(p, v), width(p))], 1

    def relation(self, scope: int) -> tuple[Body, int]:
        value = self.affine(scope)
        return lambda w, p, v: [value(p, v)], 1

    def leaf(self, scope: int) -> tuple[Body, int]:
        name, loc, width = self.name("y"), self.affine(scope), self.width()
        return lambda w, p, v: [w.normal(name, loc(p, v), width(p))][:0], 0

    def plate(self, scope: int, depth: int) -> tuple[Body, int]:
        us = self.inputs(self.rng.choice([2, 3]))
        parts = [self.choice, *self.statements(depth), self.leaf]
        body = self.sequence(scope + 1, parts)

        def run(w: Any, p: Any, v: Values) -> Values:
            w.lanes(lambda u: body(w, p, [u, *v]), us)
            return []

        return run, 0

    def rows(self, scope: int) -> tuple[Body, int]:
        """Rows that index the groups of a site."""
        name, loc, width, n = self.name("g"), self.affine(scope), self.width(), 3
        self.names.append(name)
        index = np.array([self.rng.randrange(n) for _ in range(4)])
        leaf, us = self.sequence(scope + 1, [self.leaf]), self.inputs(4)

        def run(w: Any, p: Any, v: Values) -> Values:
            theta = w.group(name, n, loc(p, v), width(p))
            w.lanes(lambda i, u: leaf(w, p, [*v, theta[i] * u]), index, us)
            return []

        return run, 0

    def regression(self, scope: int) -> tuple[Body, int]:
        """A vector of coefficients, read by rows and by the rest of the program."""
        name, leaf, width, scale = self.name("b"), self.name("y"), self.width(), self.width()
        self.names.append(name)
        matrix = self.inputs(4, 3)

        def run(w: Any, p: Any, v: Values) -> Values:
            beta = w.group(name, 3, 0.0, width(p))
            w.normal(leaf, w.product(matrix, beta) + (v[-1] if v else 0.0), scale(p))
            return [beta[0] - beta[2]]

        return run, 1

    def scan(self, scope: int, depth: int) -> tuple[Body, int]:
        """A chain whose carry is a choice of the step and perhaps one from before, or an affine function."""
        us, kind = self.inputs(3), self.rng.choice(["first", "second", "gathers"])
        size = 1 if kind == "first" else 2
        start = [self.affine(scope, last=False) for _ in range(size)]
        inside = self.statements(depth) if self.rng.random() < 0.5 else []
        body = self.sequence(scope + size + 1, [self.choice, *inside, self.leaf])
        gather, last = self.affine(self.scope), scope + size + 1

        def step(w: Any, p: Any, v: Values, carry: Values, u: Any) -> Values:
            values = body(w, p, [u, *v, *carry])
            new = [values[last]]
            if kind == "second":
                new.append(carry[0])
            elif kind == "gathers":
                new.append(gather(p, values))
            return new

        def run(w: Any, p: Any, v: Values) -> Values:
            carry = [s(p, v) for s in start]
            return w.steps(lambda c, u: step(w, p, v, c, u), carry, us)

        return run, size


def random_cases(seeds: Sequence[int]) -> dict[str, Case]:
    return {f"graph_{seed}": Program(seed).case(f"graph_{seed}") for seed in seeds}
