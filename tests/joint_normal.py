"""Dense multivariate normal algebra without rounding: what normal choices that are integrated out are held against.

A program is written once more in NumPy: loops over lanes and steps, and `Joint.normal` for a site. A `Form` is a number
that is affine in independent standard normals, a constant and a coefficient for each of them. Arrays of them are object
arrays, so sums, products with matrices and indexing are NumPy's own. The joint law of all sites follows. One symmetric
elimination of the data gives their log density and the conditional mean and covariance of everything else.

Numbers are integers, in units of 2^-256. No cancellation matters then: a prior of sd 1e4 beside a noise of sd 1e-3, or
a covariance without full rank, costs some thirty of the 256 bits. Derivatives are central differences of relative
step 2^-40, whose error of 2^-80 is far below a rounding of float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

BITS = 256
ONE = 1 << BITS
STEP = 40  # derivatives are differences of relative step 2^-STEP


class Form:
    """A number, exact to 2^-BITS, or a number that is affine in standard normals; products are with numbers."""

    __slots__ = ("const", "terms")

    def __init__(self, const: int, terms: dict[int, int] | None = None) -> None:
        self.const, self.terms = const, terms or {}

    def __add__(self, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return NotImplemented  # NumPy goes element by element
        other = form(other)
        terms = dict(self.terms)
        for k, v in other.terms.items():
            terms[k] = terms.get(k, 0) + v
        return Form(self.const + other.const, terms)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return NotImplemented
        other = form(other)
        if self.terms and other.terms:
            raise TypeError("a product of two random numbers is not affine")
        if not other.terms:
            self, other = other, self
        c = self.const
        if not c:
            return Form(0)
        return Form(other.const * c >> BITS, {k: v * c >> BITS for k, v in other.terms.items()})

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return NotImplemented
        other = form(other)
        if other.terms:
            raise TypeError("a quotient by a random number is not affine")
        return self * Form((ONE << BITS) // other.const)

    def __neg__(self) -> Form:
        return Form(-self.const, {k: -v for k, v in self.terms.items()})

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __rtruediv__(self, other: Any) -> Any:
        return form(other) / self

    def __pow__(self, n: int) -> Form:
        return math.prod([self] * n, start=form(1))

    def sqrt(self) -> Form:  # np.sqrt of an object array calls it
        if self.terms:
            raise TypeError("a square root of a random number is not affine")
        return Form(math.isqrt(self.const << BITS))

    __radd__, __rmul__ = __add__, __mul__


def form(x: Any) -> Form:
    if isinstance(x, Form):
        return x
    n, d = (float(x)).as_integer_ratio()
    return Form((n << BITS) // d)


def exact(x: Any) -> Any:
    """An object array of exact numbers; a `Form` for a scalar."""
    return np.frompyfunc(form, 1, 1)(x)


def to_float(n: Any) -> Any:
    return np.asarray(np.frompyfunc(lambda n: n / ONE, 1, 1)(n), float)


def factor(covariance: Any) -> np.ndarray:
    """The lower triangle L of a positive definite matrix L Lᵀ of exact numbers."""
    covariance = exact(covariance)
    lower = exact(np.zeros(covariance.shape))
    for i in range(len(lower)):
        for j in range(i + 1):
            left = covariance[i, j] - sum((lower[i, k] * lower[j, k] for k in range(j)), form(0))
            lower[i, j] = np.sqrt(left) if i == j else left / lower[j, j]
    return lower


def inverse(matrix: Any) -> np.ndarray:
    """The inverse of a positive definite matrix of exact numbers, by Gauss and Jordan."""
    n = len(matrix)
    both = np.concatenate([exact(matrix), exact(np.eye(n))], 1)
    for i in range(n):
        both[i] = both[i] / both[i, i]
        for j in range(n):
            if j != i:
                both[j] = both[j] - both[j, i] * both[i]
    return both[:, n:]


class Joint:
    """The sites of a program, as forms. `tick` ends a step of a scan, for filters."""

    def __init__(self) -> None:
        self.sites: dict[str, dict[int, tuple[Form, int]]] = {}
        self.num_noises = 0
        self.steps = 0
        self.order: list[tuple[str, int]] = []

    def noise(self, n: int) -> np.ndarray:
        start, self.num_noises = self.num_noises, self.num_noises + n
        return np.array([Form(0, {start + i: ONE}) for i in range(n)] + [None], object)[:-1]

    def put(self, address: str, value: Any, at: int | None = None) -> Any:
        """Record a site; its elements come in the order of its array, or `at` a place in it."""
        site = self.sites.setdefault(address, {})
        for v in np.asarray(value, object).flat:
            place = len(site) if at is None else at
            assert place not in site
            site[place] = form(v), self.steps
            self.order.append((address, place))
            at = None if at is None else at + 1
        return value

    def normal(self, address: str, loc: Any, sd: Any = 1.0, at: int | None = None) -> Any:
        """A normal site, element by element."""
        loc, sd = np.broadcast_arrays(np.asarray(loc, object), np.asarray(sd, object))
        value = loc + sd * self.noise(loc.size).reshape(loc.shape)
        return self.put(address, value, at)

    def vector(self, address: str, loc: Any, root: Any, at: int | None = None) -> Any:
        """A multivariate normal site with covariance root rootᵀ; the root may have fewer columns than rows."""
        return self.put(address, loc + np.asarray(root, object) @ self.noise(np.shape(root)[1]), at)

    def tick(self) -> None:
        self.steps += 1

    def forms(self, address: str) -> list[Form]:
        site = self.sites[address]
        return [site[i][0] for i in range(len(site))]

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A joint draw of all sites, in float64."""
        noise = rng.normal(size=self.num_noises)
        value = lambda f: f.const / ONE + sum(v / ONE * noise[k] for k, v in f.terms.items())  # noqa: E731
        return {a: np.array([value(f) for f in self.forms(a)]) for a in self.sites}


def covariance(left: list[Form], right: list[Form]) -> np.ndarray:
    """Covariances, as integers."""
    noises = sorted({k for f in right for k in f.terms})
    a = np.array([[f.terms.get(k, 0) for k in noises] for f in left], object)
    b = np.array([[f.terms.get(k, 0) for k in noises] for f in right], object)
    shape = len(left), len(right)
    return (a.reshape(shape[0], -1) @ b.reshape(shape[1], -1).T) >> BITS


def eliminate(matrix: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The pivots of the first `n` rows of a symmetric matrix, and what is left of the others."""
    matrix = matrix.copy()
    pivots = []
    for k in range(n):
        pivot = matrix[k, k]
        if pivot <= 0:
            raise ZeroDivisionError("the covariance of the data is singular")
        pivots.append(pivot)
        column = (matrix[k + 1 :, k] << BITS) // pivot
        matrix[k + 1 :, k + 1 :] -= np.outer(column, matrix[k, k + 1 :]) >> BITS
    return np.array(pivots, object), matrix[n:, n:]


@dataclasses.dataclass
class Given:
    """The law of some forms given data: the data's pivots and quadratic form, as integers; moments as floats.

    With `gamma`, all variances are in units of one that has an inverse gamma prior of that shape and rate, and the
    density is a multivariate t's.
    """

    pivots: np.ndarray
    quadratic: int
    mean: np.ndarray
    cov: np.ndarray
    gamma: tuple[float, float] | None = None

    @property
    def logarithms(self) -> list[tuple[float, int]]:
        """Weights and numbers, of whose logarithms minus twice the log density consists, beside the quadratic form."""
        logs = [(1.0, p) for p in self.pivots]
        if self.gamma:
            logs.append(
                (
                    2 * self.gamma[0] + len(self.pivots),
                    2 * form(self.gamma[1]).const + self.quadratic,
                )
            )
        return logs

    @property
    def distance(self) -> int:
        return 0 if self.gamma else self.quadratic

    @property
    def log_density(self) -> float:
        n, logs = len(self.pivots), math.fsum(w * math.log(p / ONE) for w, p in self.logarithms)
        found = -0.5 * (self.distance / ONE + logs + n * math.log(2 * math.pi))
        if self.gamma:
            a, b = self.gamma
            half = a + 0.5 * n
            found += math.lgamma(half) - math.lgamma(a) + a * math.log(b) + half * math.log(2.0)
        return found


def given(
    data: list[tuple[Form, float]], others: list[Form], gamma: tuple[float, float] | None = None
) -> Given:
    """Eliminate the data from their joint covariance with `others`, bordered by the residuals."""
    seen, n, m = [f for f, _ in data], len(data), len(others)
    residual = [form(v).const - f.const for f, v in data]
    border = np.array([*residual, *(-f.const for f in others)], object)
    matrix = np.zeros((n + m + 1, n + m + 1), object)
    matrix[: n + m, : n + m] = covariance(seen + others, seen + others)
    matrix[-1, :-1] = matrix[:-1, -1] = border
    pivots, left = eliminate(matrix, n)
    return Given(pivots, -left[-1, -1], to_float(-left[:-1, -1]), to_float(left[:-1, :-1]), gamma)


@dataclasses.dataclass
class Answer:
    """What a marginalised program should say: log density and its derivatives, and the law of what is summed out."""

    value: float
    gradient: np.ndarray
    hessian: np.ndarray
    mean: dict[str, np.ndarray]  # flat, by address
    cov: np.ndarray  # of all of them one after the other
    prior: np.ndarray  # the sds that they had
    filtered: dict[str, np.ndarray]


Data = Mapping[str, tuple[np.ndarray, np.ndarray]]  # values and which of them are seen, flat


def listed(joint: Joint, data: Data, steps: int | None = None) -> list[tuple[Form, float]]:
    """The observed forms in the order in which the program makes them, perhaps only those of some steps."""
    return [
        (joint.sites[a][i][0], data[a][0][i])
        for a, i in joint.order
        if a in data and data[a][1][i] and (steps is None or joint.sites[a][i][1] <= steps)
    ]


def differentiate(
    evaluate: Callable[[list[Form]], Given], point: Iterable[float]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log density, gradient and Hessian of a normal density by its parameters."""
    start = [form(v) for v in point]
    unit = [v if v.const else form(1) for v in start]
    n = len(start)
    middle = evaluate(start)

    def around(*directions: int) -> tuple[float, float]:
        """First and second derivative along a sum of directions."""
        up, down = (
            evaluate(
                [
                    v + Form(sign * directions.count(i) * u.const >> STEP)
                    for i, (v, u) in enumerate(zip(start, unit, strict=True))
                ]
            )
            for sign in (1, -1)
        )
        slope = (up.distance - down.distance) / ONE
        bend = (up.distance - 2 * middle.distance + down.distance) / ONE
        logs = up.logarithms, middle.logarithms, down.logarithms
        for (w, a), (_, b), (_, c) in zip(*logs, strict=True):
            slope += w * math.log1p((a - c) / c)
            bend += w * math.log1p((a * c - b * b) / (b * b))
        return -0.25 * slope * 2.0**STEP, -0.5 * bend * 4.0**STEP

    gradient, hessian = np.zeros(n), np.zeros((n, n))
    for i in range(n):
        gradient[i], hessian[i, i] = around(i)
    for i in range(n):
        for j in range(i):
            both = around(i, j)[1]
            hessian[i, j] = hessian[j, i] = 0.5 * (both - hessian[i, i] - hessian[j, j])
    scale = np.array([abs(u.const / ONE) for u in unit])
    sign = np.array([1.0 if u.const > 0 else -1.0 for u in unit])
    return (
        middle.log_density,
        gradient * sign / scale,
        hessian * np.outer(sign, sign) / np.outer(scale, scale),
    )


def answer(
    program: Callable[[Joint, dict[str, Form]], Any],
    point: Mapping[str, float],
    data: Data,
    addresses: Iterable[str] = (),
    filtered: Iterable[str] = (),
    derivatives: bool = True,
    gamma: tuple[float, float] | None = None,
) -> Answer:
    """All answers for a program of named parameters at a `point`.

    The program may return a number, which is added to the log density.
    """
    names = list(point)

    def run(values: Iterable[Form]) -> tuple[Joint, float]:
        joint = Joint()
        extra = program(joint, dict(zip(names, values, strict=True)))
        return joint, 0.0 if extra is None else extra

    joint, extra = run(form(v) for v in point.values())
    others = {a: joint.forms(a) for a in addresses if a in joint.sites}
    whole = given(listed(joint, data), [f for fs in others.values() for f in fs], gamma)
    ends = np.cumsum([len(fs) for fs in others.values()])
    n = len(names)
    value, gradient, hessian = whole.log_density, np.zeros(n), np.zeros((n, n))
    if derivatives:
        evaluate = lambda values: given(listed(run(values)[0], data), [], gamma)  # noqa: E731
        value, gradient, hessian = differentiate(evaluate, point.values())
    return Answer(
        value + extra,
        gradient,
        hessian,
        dict(zip(others, np.split(whole.mean, ends), strict=False)),
        whole.cov,
        to_float(np.array([covariance([f], [f])[0, 0] for fs in others.values() for f in fs]))
        ** 0.5,
        {a: _filtered(joint, data, a) for a in filtered},
    )


def _filtered(joint: Joint, data: Data, address: str) -> np.ndarray:
    """The mean of every element given the data of the steps up to its own."""
    site = joint.sites[address]
    found = np.zeros(len(site))
    for step in {step for _, step in site.values()}:
        here = [i for i in range(len(site)) if site[i][1] == step]
        found[here] = given(listed(joint, data, step), [site[i][0] for i in here]).mean
    return found
