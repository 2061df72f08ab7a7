"""Small programs that between them use every construct, each with an oracle written by hand.

An oracle is NumPy and SciPy alone: Python loops over lanes and steps, Python branches, densities
from their formulas. It lists a `Term` for all elements that count, so that it also tells which
choices are active. Where the latent choices can be summed or integrated out, in closed form, by
enumeration or by quadrature, `evidence` is the log of that.

Every model takes one number `x`, so that any of them can be vmapped over its argument.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import integrate, special, stats
from weft.ppl import (
    Model,
    condition,
    deterministic,
    do,
    factor,
    gen,
    loop,
    mask,
    noncentered,
    repeat,
    replay,
    sample,
    scale,
    scope,
)
from weft.ppl.stage.addresses import flatten

Normal = dist.Normal
Flat = Mapping[str, np.ndarray]

X = 0.75  # the argument the laws are tried at
MEANS = np.array([-1.0, 0.5, 2.0])
SCALES = np.array([0.5, 1.0, 0.75])
INPUTS = np.array([0.5, -1.0, 0.25, 1.0])


def array(value: np.ndarray) -> jax.Array:
    """A constant in the precision of the day; a copy, since JAX remembers which it first met it in."""
    return jnp.asarray(np.array(value))


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """XLA without its costly passes: the laws compile some hundred small programs and run each once or twice."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


# --- terms of an oracle --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Term:
    """What some elements of one site add to the log density.

    Attributes:
        address: dotted address of the site.
        log_density: their sum.
        size: how many elements of a choice they are; 0 for factors.
        noise: for normal sites the elements standardised, N(0, 1) under the program.
        score: for other sites the elements with their mean taken off and over their standard deviation.
    """

    address: str
    log_density: float
    size: int = 1
    noise: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    score: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def times(self, weight: float) -> "Term":
        """The term of a scaled site."""
        return dataclasses.replace(self, log_density=weight * self.log_density)


def normal(address: str, value: Any, loc: Any, scale: Any) -> Term:
    value = np.asarray(value, float)
    noise = (value - loc) / scale
    total = np.sum(-0.5 * noise**2 - np.log(scale) - 0.5 * np.log(2 * np.pi))
    return Term(address, float(total), value.size, noise=np.ravel(noise))


def other(address: str, value: Any, law: Any) -> Term:
    """A site whose law is a frozen distribution of SciPy."""
    value = np.asarray(value)
    log = law.logpmf(value) if hasattr(law, "pmf") else law.logpdf(value)
    score = np.ravel((value - law.mean()) / law.std())
    return Term(address, float(np.sum(log)), value.size, score=score)


def categorical(address: str, value: Any, p: Any) -> Term:
    p, k = np.asarray(p), np.arange(len(p))
    mean = p @ k
    score = (value - mean) / np.sqrt(p @ (k - mean) ** 2)
    return Term(address, float(np.log(p[int(value)])), 1, score=np.ravel(score))


def bernoulli(address: str, value: Any, p: float) -> Term:
    return categorical(address, value, [1 - p, p])


def total(terms: Iterable[Term]) -> float:
    return float(sum(t.log_density for t in terms))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its oracle, and data with their exact evidence.

    Attributes:
        model: a model of one number.
        oracle: `(choices by dotted address, x)` to terms.
        data: observations, by dotted address, for the evidence.
        evidence: log of it as a function of x.
        value: what the model returns, likewise from the choices.
        smooth: whether the density is differentiable in its continuous choices where it is tried.
    """

    model: Model
    oracle: Callable[[Flat, float], list[Term]]
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    evidence: Callable[[float], float] | None = None
    value: Callable[[Flat, float], Any] | None = None
    smooth: bool = True


CASES: dict[str, Case] = {}


def case(oracle: Callable[[Flat, float], list[Term]], **more: Any) -> Callable[[Any], Model]:
    """Enter a model into the table under its function's name."""

    def enter(model: Any) -> Model:
        model = gen(model)
        CASES[model.name] = Case(model, oracle, **more)
        return model

    return enter


def gaussian(y: Any, mean: Any, covariance: Any) -> float:
    return float(stats.multivariate_normal(mean, covariance).logpdf(y))


def log_integral(f: Callable[[float], float], low: float, high: float) -> float:
    """log of the integral of exp(f) by adaptive quadrature."""
    value, _ = integrate.quad(lambda t: np.exp(f(t)), low, high, epsabs=0, epsrel=1e-9, limit=200)
    return float(np.log(value))


def log_mean(weights: Any, logs: Any) -> float:
    return float(special.logsumexp(np.asarray(logs, float), b=np.asarray(weights, float)))


# --- vmap ----------------------------------------------------------------------------------------


def _vmap_mapped(c: Flat, x: float) -> list[Term]:
    return [normal("theta", c["theta"], MEANS + x, 1.5), normal("y", c["y"], c["theta"], SCALES)]


@case(
    _vmap_mapped,
    data={"y": [0.0, 1.0, 3.0]},
    evidence=lambda x: gaussian([0.0, 1.0, 3.0], MEANS + x, np.diag(1.5**2 + SCALES**2)),
    value=lambda c, x: c["y"],
)
def vmap_mapped(x):
    def row(m, s):
        theta = sample("theta", Normal(m + x, 1.5))
        return sample("y", Normal(theta, s))

    return jax.vmap(row, axis_name="row")(array(MEANS), array(SCALES))


def _vmap_unmapped(c: Flat, x: float) -> list[Term]:
    where = c["mu"] + c["e"].sum() + c["s"].sum()
    return [
        normal("mu", c["mu"], x, 1.0),
        normal("e", c["e"], 0.0, 2.0),
        normal("s", c["s"], c["mu"], 0.5),
        normal("y", c["y"], where, 3.0),
    ]


@case(
    _vmap_unmapped,
    data={"y": 2.0},
    evidence=lambda x: gaussian(2.0, 5 * x, 25 + 3 * 4 + 4 * 0.25 + 9),
)
def vmap_unmapped(x):
    mu = sample("mu", Normal(x, 1.0))
    e = jax.vmap(lambda _: sample("e", Normal(0.0, 2.0)))(jnp.zeros(3))
    s = jax.vmap(lambda _: sample("s", Normal(mu, 0.5)))(jnp.zeros(4))
    return sample("y", Normal(mu + e.sum() + s.sum(), 3.0))


GRID = np.arange(6.0).reshape(3, 2)
SIGNS = np.array([1.0, -1.0])
PLANE = np.array([[1.0, 0.5], [0.5, 2.0]])


def _vmap_axes(c: Flat, x: float) -> list[Term]:
    law = stats.multivariate_normal([x, 0.0], PLANE)
    return [
        *(
            normal("cell", c["cell"][j, i], GRID[i, j] + x * SIGNS[j], 1.0)
            for i in range(3)
            for j in range(2)
        ),
        *(Term("v", float(law.logpdf(v)), 1) for v in c["v"]),
    ]


@case(_vmap_axes, value=lambda c, x: (c["cell"].T, c["v"].T))
def vmap_axes(x):
    def cell(g, h):
        return sample("cell", Normal(g + x * h, 1.0))

    column = jax.vmap(cell, in_axes=(0, None))
    out = jax.vmap(column, in_axes=(1, 0), out_axes=1)(array(GRID), array(SIGNS))

    def vector(m):
        return sample("v", dist.MultivariateNormal(m, array(PLANE)))

    means = jnp.stack([x, 0.0 * x])[:, None] * jnp.ones((2, 4))
    return out, jax.vmap(vector, in_axes=-1, out_axes=-1)(means)


def _collectives(c: Flat, x: float) -> list[Term]:
    terms = [normal("a", c["a"], MEANS, 1.0)]
    centred = c["a"] - c["a"].mean()
    terms.append(normal("b", c["b"], centred + x * np.arange(3), 0.5))
    state = c["b"]
    for t in range(2):
        terms.append(normal("c", c["c"][:, t], state.mean() + np.arange(3), 1.0))
        state = c["c"][:, t]
    return terms


@case(_collectives, value=lambda c, x: c["c"][:, -1] / 3)
def collectives(x):
    def one(m):
        a = sample("a", Normal(m, 1.0))
        place = jax.lax.axis_index("lane")
        b = sample("b", Normal(a - jax.lax.pmean(a, "lane") + x * place, 0.5))

        def step(state, _):
            index = jax.lax.axis_index("lane")
            return sample("c", Normal(jax.lax.pmean(state, "lane") + index, 1.0)), None

        return jax.lax.scan(step, b, None, length=2)[0] / jax.lax.psum(1.0, "lane")

    return jax.vmap(one, axis_name="lane")(array(MEANS))


def _nested_repeat(c: Flat, x: float) -> list[Term]:
    return [
        *(normal("mu", c["mu"][g], x, 1.0) for g in range(2)),
        *(normal("y", c["y"][g], c["mu"][g], 1.0) for g in range(2)),
    ]


GROUPS = np.array([[0.0, 1.0, 0.5], [2.0, 1.0, 1.5]])


@case(
    _nested_repeat,
    data={"y": GROUPS},
    evidence=lambda x: sum(gaussian(g, [x] * 3, np.eye(3) + 1) for g in GROUPS),
    value=lambda c, x: c["y"],
)
def nested_repeat(x):
    def group():
        mu = sample("mu", Normal(x, 1.0))
        return repeat(lambda: sample("y", Normal(mu, 1.0)), 3, axis_name="member")

    return repeat(group, 2, axis_name="group")


# --- scan ----------------------------------------------------------------------------------------


def _state_space(c: Flat, x: float) -> list[Term]:
    terms, z = [], x
    for t in range(4):
        terms.append(normal("z", c["z"][t], 0.8 * z + INPUTS[t], 0.7))
        z = c["z"][t]
        terms.append(normal("y", c["y"][t], z, 0.5))
    return terms


def _state_space_evidence(x: float) -> float:
    lags = np.subtract.outer(np.arange(4), np.arange(4))
    weights = np.where(lags >= 0, 0.8 ** np.maximum(lags, 0), 0.0)
    mean = weights @ INPUTS + 0.8 ** np.arange(1, 5) * x
    return gaussian([0.5, 0.0, 1.0, 1.0], mean, 0.49 * weights @ weights.T + 0.25 * np.eye(4))


@case(
    _state_space,
    data={"y": [0.5, 0.0, 1.0, 1.0]},
    evidence=_state_space_evidence,
    value=lambda c, x: (c["z"][-1], c["z"] ** 2),
)
def state_space(x):
    def step(z, u):
        z = sample("z", Normal(0.8 * z + u, 0.7))
        sample("y", Normal(z, 0.5))
        return z, z**2

    return jax.lax.scan(step, x, array(INPUTS))


def _reverse_scan(c: Flat, x: float) -> list[Term]:
    terms, z = [], x
    for t in reversed(range(3)):
        terms.append(normal("a", c["a"][t], 0.5 * z + INPUTS[t], 1.0))
        z = c["a"][t]
    return [*terms, normal("y", c["y"], z, 1.0)]


@case(
    _reverse_scan,
    data={"y": 1.0},
    evidence=lambda x: gaussian(
        1.0, x / 8 + INPUTS[2] / 4 + INPUTS[1] / 2 + INPUTS[0], 1 + 1 / 4 + 1 / 16 + 1
    ),
    value=lambda c, x: c["a"] ** 2,
)
def reverse_scan(x):
    def step(z, u):
        z = sample("a", Normal(0.5 * z + u, 1.0))
        return z, z**2

    last, squares = jax.lax.scan(step, x, array(INPUTS[:3]), reverse=True)
    sample("y", Normal(last, 1.0))
    return squares


def _nested_scan(c: Flat, x: float) -> list[Term]:
    terms, z = [], x
    for t in range(3):
        z = z + INPUTS[t]
        for s in range(2):
            terms.append(normal("fine", c["fine"][t, s], z, 0.5))
            z = c["fine"][t, s]
        terms.append(normal("coarse", c["coarse"][t], z, 0.3))
        z = c["coarse"][t]
    return terms


def _nested_scan_evidence(x: float) -> float:
    before = np.array([x, 1.0, 0.5])
    return float(
        np.sum(stats.norm.logpdf([1.0, 0.5, 0.5], before + INPUTS[:3], np.sqrt(0.5 + 0.09)))
    )


@case(_nested_scan, data={"coarse": [1.0, 0.5, 0.5]}, evidence=_nested_scan_evidence)
def nested_scan(x):
    def outer(z, u):
        def inner(z, _):
            return sample("fine", Normal(z, 0.5)), None

        z, _ = jax.lax.scan(inner, z + u, None, length=2)
        return sample("coarse", Normal(z, 0.3)), None

    return jax.lax.scan(outer, x, array(INPUTS[:3]))[0]


SERIES = np.array([[0.5, 0.0], [1.0, -1.0], [0.0, 0.5]])  # time, series


def _vmap_of_scan(c: Flat, x: float) -> list[Term]:
    terms = []
    for i in range(2):
        z = x
        for t in range(3):
            terms.append(normal("z", c["z"][i, t], z + SERIES[t, i], 1.0))
            z = c["z"][i, t]
            terms.append(normal("y", c["y"][i, t], z, 0.8))
    return terms


def _vmap_of_scan_evidence(x: float) -> float:
    walk = np.minimum.outer(np.arange(1, 4), np.arange(1, 4))
    return sum(
        gaussian([1.0, 1.0, 0.5], x + np.cumsum(SERIES[:, i]), walk + 0.64 * np.eye(3))
        for i in range(2)
    )


@case(
    _vmap_of_scan,
    data={"y": [[1.0, 1.0, 0.5]] * 2},
    evidence=_vmap_of_scan_evidence,
    value=lambda c, x: c["y"],
)
def vmap_of_scan(x):
    def series(start, inputs):
        def step(z, u):
            z = sample("z", Normal(z + u, 1.0))
            return z, sample("y", Normal(z, 0.8))

        return jax.lax.scan(step, start, inputs)[1]

    return jax.vmap(series, in_axes=(None, 1), axis_name="series")(x, array(SERIES))


def _scan_of_vmap(c: Flat, x: float) -> list[Term]:
    terms, z = [], np.array([x, -x])
    for t in range(3):
        terms.append(normal("z", c["z"][t], z + INPUTS[t], 1.0))
        z = c["z"][t]
        terms.append(normal("y", c["y"][t], z.sum(), 1.5))
    return terms


@case(
    _scan_of_vmap,
    data={"y": [1.0, 0.0, -1.0]},
    evidence=lambda x: gaussian(
        [1.0, 0.0, -1.0],
        2 * np.cumsum(INPUTS[:3]),
        2 * np.minimum.outer(np.arange(1, 4), np.arange(1, 4)) + 2.25 * np.eye(3),
    ),
)
def scan_of_vmap(x):
    def step(z, u):
        z = jax.vmap(lambda z: sample("z", Normal(z + u, 1.0)))(z)
        sample("y", Normal(z.sum(), 1.5))
        return z, None

    return jax.lax.scan(step, jnp.stack([x, -x]), array(INPUTS[:3]))[0]


def _mapped_fori(c: Flat, x: float) -> list[Term]:
    terms = []
    for i, m in enumerate(MEANS):
        terms.append(normal("t", c["t"][i], m + x, 1.0))
        z = c["t"][i]
        for t in range(3):
            terms.append(normal("a", c["a"][i, t], z + t, 1.0))
            z = c["a"][i, t]
    return terms


@case(
    _mapped_fori,
    data={"a": [[1.0, 2.0, 4.0]] * 3},
    evidence=lambda x: sum(
        stats.norm.logpdf(1.0, m + x, np.sqrt(2.0)) + 2 * stats.norm.logpdf(0.0) for m in MEANS
    ),
)
def mapped_fori(x):
    def one(m):
        t = sample("t", Normal(m + x, 1.0))
        return jax.lax.fori_loop(0, 3, lambda i, z: sample("a", Normal(z + i, 1.0)), t)

    return jax.lax.map(one, array(MEANS))


# --- branches ------------------------------------------------------------------------------------


def _mixture(c: Flat, x: float) -> list[Term]:
    terms = [bernoulli("flag", c["flag"], 0.3)]
    if c["flag"] == 1:
        terms.append(normal("a", c["a"], x, 1.0))
        mean = c["a"]
    else:
        terms.append(normal("b", c["b"], -2.0, 0.5))
        mean = c["b"]
    return [*terms, normal("y", c["y"], mean, 0.8)]


@case(
    _mixture,
    data={"y": -0.5},
    evidence=lambda x: log_mean(
        [0.3, 0.7],
        [gaussian(-0.5, x, 1.64), gaussian(-0.5, -2.0, 0.25 + 0.64)],
    ),
)
def mixture(x):
    flag = sample("flag", dist.Bernoulli(0.3))
    mean = jax.lax.cond(
        flag == 1, lambda: sample("a", Normal(x, 1.0)), lambda: sample("b", Normal(-2.0, 0.5))
    )
    return sample("y", Normal(mean, 0.8))


KINDS = np.array([1, 0, 1])


def _lanes_observed(c: Flat, x: float) -> list[Term]:
    terms = []
    for i, m in enumerate(MEANS + x):
        terms.append(bernoulli("k", c["k"][i], 0.4))
        if c["k"][i] == 1:
            terms.append(normal("u", c["u"][i], m, 1.0))
            terms.append(normal("y", c["y"][i], c["u"][i], 1.0))
        else:
            terms.append(normal("y", c["y"][i], -m, 2.0))
    return terms


@case(
    _lanes_observed,
    data={"k": KINDS, "y": [0.0, 1.0, 2.0]},
    evidence=lambda x: sum(
        np.log(0.4) + gaussian(y, m, 2.0) if k else np.log(0.6) + gaussian(y, -m, 4.0)
        for k, m, y in zip(KINDS, MEANS + x, [0.0, 1.0, 2.0], strict=True)
    ),
)
def lanes_observed(x):
    def one(m):
        k = sample("k", dist.Bernoulli(0.4))
        return jax.lax.cond(
            k == 1,
            lambda m: sample("y", Normal(sample("u", Normal(m, 1.0)), 1.0)),
            lambda m: sample("y", Normal(-m, 2.0)),
            m,
        )

    return jax.vmap(one)(array(MEANS) + x)


def _lanes_given(c: Flat, x: float) -> list[Term]:
    return [
        normal("up", c["up"][i], m, 1.0) if k else normal("down", c["down"][i], -m, 0.5)
        for i, (k, m) in enumerate(zip(KINDS, MEANS + x, strict=True))
    ]


@case(_lanes_given, value=lambda c, x: np.where(KINDS == 1, c["up"], c["down"]))
def lanes_given(x):
    """The predicate of a lane is an argument, no choice."""

    def one(k, m):
        return jax.lax.cond(
            k > 0, lambda: sample("up", Normal(m, 1.0)), lambda: sample("down", Normal(-m, 0.5))
        )

    return jax.vmap(one)(array(KINDS), array(MEANS) + x)


def _lanes_mixture(c: Flat, x: float) -> list[Term]:
    terms = []
    for i, m in enumerate(MEANS):
        terms.append(bernoulli("k", c["k"][i], 0.35))
        loc, scale = (m + x, 1.0) if c["k"][i] == 1 else (-2.0, 0.5)
        terms.append(normal("y", c["y"][i], loc, scale))
    return terms


@case(
    _lanes_mixture,
    data={"y": [-1.0, 0.0, -1.5]},
    evidence=lambda x: sum(
        log_mean([0.35, 0.65], [gaussian(y, m + x, 1.0), gaussian(y, -2.0, 0.25)])
        for m, y in zip(MEANS, [-1.0, 0.0, -1.5], strict=True)
    ),
)
def lanes_mixture(x):
    """The textbook mixture: left to JAX its predicate becomes a select, and the density is wrong."""

    def one(m):
        return jax.lax.cond(
            sample("k", dist.Bernoulli(0.35)) == 1,
            lambda: sample("y", Normal(m + x, 1.0)),
            lambda: sample("y", Normal(-2.0, 0.5)),
        )

    return jax.vmap(one)(array(MEANS))


KIND = np.array([0.2, 0.3, 0.5])


def _lanes_switch(c: Flat, x: float) -> list[Term]:
    terms = []
    for i, m in enumerate(MEANS):
        k = int(c["k"][i])
        terms.append(categorical("k", k, KIND))
        if k == 0:
            terms.append(normal("v", c["v"][i], m + x, 0.5))
            mean = c["v"][i]
        elif k == 1:
            terms.append(other("w", c["w"][i], stats.gamma(2.0, scale=0.5)))
            mean = c["w"][i]
        else:
            terms.append(other("w", c["w"][i], stats.lognorm(0.5, scale=np.exp(x))))
            mean = -c["w"][i]
        terms.append(normal("y", c["y"][i], mean, 1.0))
    return terms


def _lanes_switch_evidence(x: float) -> float:
    def lane(m: float, y: float) -> float:
        def likelihood(t: float) -> float:
            return stats.norm.logpdf(y, t, 1.0)

        gamma, log_normal = stats.gamma(2.0, scale=0.5), stats.lognorm(0.5, scale=np.exp(x))
        return log_mean(
            KIND,
            [
                gaussian(y, m + x, 1.25),
                log_integral(lambda t: gamma.logpdf(t) + likelihood(t), 0, 30),
                log_integral(lambda t: log_normal.logpdf(t) + likelihood(-t), 0, 60),
            ],
        )

    return sum(lane(m, y) for m, y in zip(MEANS, [0.0, -1.0, 1.0], strict=True))


@case(_lanes_switch, data={"y": [0.0, -1.0, 1.0]}, evidence=_lanes_switch_evidence)
def lanes_switch(x):
    """Three branches, one name in two of them with different laws."""

    def one(m):
        mean = jax.lax.switch(
            sample("k", dist.Categorical(array(KIND))),
            [
                lambda: sample("v", Normal(m + x, 0.5)),
                lambda: sample("w", dist.Gamma(2.0, 2.0)),
                lambda: -sample("w", dist.LogNormal(x, 0.5)),
            ],
        )
        return sample("y", Normal(mean, 1.0))

    return jax.vmap(one)(array(MEANS))


def _threshold(c: Flat, x: float) -> list[Term]:
    terms = [normal("s", c["s"], 0.3, 1.0)]
    if c["s"] > x:
        terms.append(normal("a", c["a"], 2.0, 1.0))
        mean = c["a"]
    else:
        terms.append(other("b", c["b"], stats.gamma(2.0)))
        mean = -c["b"]
    return [*terms, normal("y", c["y"], mean, 1.0)]


@case(
    _threshold,
    data={"y": 0.5},
    evidence=lambda x: log_mean(
        [stats.norm.sf(x, 0.3), stats.norm.cdf(x, 0.3)],
        [
            gaussian(0.5, 2.0, 2.0),
            log_integral(lambda b: stats.gamma.logpdf(b, 2.0) + stats.norm.logpdf(0.5, -b), 0, 30),
        ],
    ),
)
def threshold(x):
    """The branch depends on a continuous choice."""
    s = sample("s", Normal(0.3, 1.0))
    mean = jax.lax.cond(
        s > x, lambda: sample("a", Normal(2.0, 1.0)), lambda: -sample("b", dist.Gamma(2.0, 1.0))
    )
    return sample("y", Normal(mean, 1.0))


def _regimes(c: Flat, x: float) -> list[Term]:
    terms, r = [], 0
    for t in range(4):
        terms.append(bernoulli("r", c["r"][t], 0.8 if r == 1 else 0.3))
        r = int(c["r"][t])
        loc, scale = (INPUTS[t] + x, 1.0) if r == 1 else (-INPUTS[t], 0.5)
        terms.append(normal("y", c["y"][t], loc, scale))
    return terms


PATH = np.array([0.5, 0.5, 0.0, 1.0])


def enumerate_evidence(oracle: Any, data: Flat, x: float, name: str, values: Any, n: int) -> float:
    """Sum over all vectors of a discrete choice."""
    return float(
        special.logsumexp(
            [
                total(oracle({**data, name: np.array(v)}, x))
                for v in itertools.product(values, repeat=n)
            ]
        )
    )


@case(
    _regimes,
    data={"y": PATH},
    evidence=lambda x: enumerate_evidence(_regimes, {"y": PATH}, x, "r", (0, 1), 4),
)
def regimes(x):
    """A cond in a scan."""

    def step(r, u):
        r = sample("r", dist.Bernoulli(jnp.where(r == 1, 0.8, 0.3)))
        y = jax.lax.cond(
            r == 1, lambda: sample("y", Normal(u + x, 1.0)), lambda: sample("y", Normal(-u, 0.5))
        )
        return r, y

    return jax.lax.scan(step, jnp.zeros((), int), array(INPUTS))[1]


def _lanes_of_branching_scans(c: Flat, x: float) -> list[Term]:
    terms = []
    for i, start in enumerate(MEANS + x):
        z = start
        for t in range(4):
            if z > 0:
                terms.append(normal("a", c["a"][i, t], 0.5 * z, 1.0))
                z = c["a"][i, t]
            else:
                terms.append(normal("b", c["b"][i, t], -z, 0.5))
                z = c["b"][i, t]
    return terms


@case(_lanes_of_branching_scans)
def lanes_of_branching_scans(x):
    def step(z, _):
        z = jax.lax.cond(
            z > 0,
            lambda z: sample("a", Normal(0.5 * z, 1.0)),
            lambda z: sample("b", Normal(-z, 0.5)),
            z,
        )
        return z, None

    return jax.vmap(lambda start: jax.lax.scan(step, start, None, length=4)[0])(array(MEANS) + x)


def _nested_branches(c: Flat, x: float) -> list[Term]:
    terms = [bernoulli("p", c["p"], 0.5), bernoulli("q", c["q"], 0.4)]
    if c["p"] == 1 and c["q"] == 1:
        terms += [normal("part.a", c["part.a"], x, 1.0)]
    elif c["p"] == 1:
        terms += [normal("part.b", c["part.b"], -x, 1.0), normal("c", c["c"], 1.0, 0.5)]
    else:
        terms += [normal("lone", c["lone"][i], 0.0, 1.0) for i in range(2)]
    return terms


@gen
def _part_a(x):
    return sample("a", Normal(x, 1.0))


@gen
def _part_b(x):
    return sample("b", Normal(-x, 1.0))


@case(_nested_branches)
def nested_branches(x):
    """A cond in a branch, nested programs of one name in its branches, a vmap in another branch."""
    p = sample("p", dist.Bernoulli(0.5))
    q = sample("q", dist.Bernoulli(0.4))

    def inner():
        return jax.lax.cond(
            q == 1,
            lambda: sample("part", _part_a(x)),
            lambda: sample("part", _part_b(x)) + sample("c", Normal(1.0, 0.5)),
        )

    def lanes():
        return repeat(lambda: sample("lone", Normal(0.0, 1.0)), 2).sum()

    return jax.lax.cond(p == 1, inner, lanes)


# --- calls and loops -----------------------------------------------------------------------------


@jax.jit
def _helper(m):
    return sample("z", Normal(m, 1.0))


def _jit_in_scopes(c: Flat, x: float) -> list[Term]:
    a, b = c["first.z"], c["second.z"]
    return [
        normal("first.z", a, x, 1.0),
        normal("second.z", b, 0.5 * a, 1.0),
        normal("z", c["z"], a + b, 1.0),
        normal("y", c["y"], c["z"], 1.0),
    ]


@case(
    _jit_in_scopes,
    data={"y": 1.0},
    evidence=lambda x: gaussian(1.0, 1.5 * x, 1.5**2 + 1 + 1 + 1),
)
def jit_in_scopes(x):
    """One jitted helper in two scopes and at the top: JAX stages it once."""
    a = scope(_helper, "first")(x)
    b = scope(_helper, "second")(0.5 * a)
    return sample("y", Normal(_helper(a + b), 1.0))


def _checkpointed(c: Flat, x: float) -> list[Term]:
    return [
        normal("t", c["t"], MEANS + x, 1.0),
        normal("y", c["y"], np.sin(c["t"]), 0.5),
    ]


@case(
    _checkpointed,
    data={"y": [0.5, 0.0, 1.0]},
    evidence=lambda x: sum(
        log_integral(
            lambda t, m=m, y=y: stats.norm.logpdf(t, m) + stats.norm.logpdf(y, np.sin(t), 0.5),
            m - 12,
            m + 12,
        )
        for m, y in zip(MEANS + x, [0.5, 0.0, 1.0], strict=True)
    ),
)
def checkpointed(x):
    @jax.checkpoint
    def row(m):
        t = sample("t", Normal(m + x, 1.0))
        return sample("y", Normal(jnp.sin(t), 0.5))

    return jax.vmap(jax.jit(row))(array(MEANS))


def _bounded_loop(c: Flat, x: float) -> list[Term]:
    terms, n = [], 0
    for t in range(4):
        terms.append(bernoulli("go", c["go"][t], 0.6))
        n += 1
        if c["go"][t] == 0:
            break
    return [*terms, normal("y", c["y"], x + n, 0.7)]


@case(
    _bounded_loop,
    data={"y": 3.0},
    evidence=lambda x: log_mean(
        [0.4, 0.24, 0.144, 0.216], [gaussian(3.0, x + n, 0.49) for n in range(1, 5)]
    ),
)
def bounded_loop(x):
    def body(state):
        n, _ = state
        return n + 1, sample("go", dist.Bernoulli(0.6)) == 1

    n, _ = loop(lambda s: s[1], body, 4, (jnp.zeros((), int), jnp.array(True)))
    return sample("y", Normal(x + n, 0.7))


def _lanes_of_loops(c: Flat, x: float) -> list[Term]:
    terms = []
    for i, z in enumerate(MEANS):
        for t in range(5):
            if z >= 2.5:
                break
            terms.append(normal("step", c["step"][i, t], 1.0 + 0.1 * x, 0.3))
            z = z + c["step"][i, t]
    return terms


@case(_lanes_of_loops)
def lanes_of_loops(x):
    walk = loop(lambda z: z < 2.5, lambda z: z + sample("step", Normal(1.0 + 0.1 * x, 0.3)), 5)
    return jax.vmap(walk)(array(MEANS))


@jax.custom_jvp
def _soft_abs(x):
    return jnp.sqrt(x * x + 1.0)


_soft_abs.defjvps(lambda t, ans, x: t * x / ans)


@jax.custom_vjp
def _cube(x):
    return x**3


_cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


def _custom_rules(c: Flat, x: float) -> list[Term]:
    terms, z = [], x
    for t in range(3):
        terms.append(normal("z", c["z"][t], np.sqrt(z * z + 1), 0.5))
        z = 0.2 * c["z"][t] ** 3
    loc = np.logaddexp(0.0, z) + MEANS**3
    return [*terms, normal("y", c["y"], loc, np.sqrt(c["z"][0] ** 2 + 1))]


@case(_custom_rules)
def custom_rules(x):
    def step(z, _):
        z = sample("z", Normal(_soft_abs(z), 0.5))
        return 0.2 * _cube(z), z

    last, zs = jax.lax.scan(step, x, None, length=3)

    def row(m):
        return sample("y", Normal(jax.nn.softplus(last) + _cube(m), _soft_abs(zs[0])))

    return jax.vmap(row)(array(MEANS))


# --- programs in programs ------------------------------------------------------------------------


@gen
def pair(m):
    """The little program that the others nest."""
    t = sample("t", Normal(m, 1.0))
    return sample("y", Normal(t, 0.5))


def _pair(c: Flat, m: Any, at: str, place: Any = ()) -> list[Term]:
    t, y = c[f"{at}.t"][place], c[f"{at}.y"][place]
    return [normal(f"{at}.t", t, m, 1.0), normal(f"{at}.y", y, t, 0.5)]


@case(
    lambda c, x: [*_pair(c, x, "left"), *_pair(c, c["left.y"], "right")],
    data={"left.y": 0.5, "right.y": 1.5},
    evidence=lambda x: gaussian(0.5, x, 1.25) + gaussian(1.5, 0.5, 1.25),
)
def nested(x):
    a = sample("left", pair(x))
    return sample("right", pair(a))


def _vmapped_programs(c: Flat, x: float) -> list[Term]:
    terms = _pair(c, MEANS + x, "lanes", ...)
    for i in range(3):
        terms += _pair(c, MEANS[i], "each", i)
    for j in range(2):
        terms += _pair(c, MEANS + j, "both", j)
    return terms


@case(
    _vmapped_programs,
    data={"lanes.y": [0.0, 1.0, 2.0], "each.y": [0.0, 0.0, 1.0]},
    evidence=lambda x: float(
        np.sum(stats.norm.logpdf([0.0, 1.0, 2.0], MEANS + x, np.sqrt(1.25)))
        + np.sum(stats.norm.logpdf([0.0, 0.0, 1.0], MEANS, np.sqrt(1.25)))
    ),
)
def vmapped_programs(x):
    """A vmapped program, a vmap of a nested program, and the one inside the other."""
    a = sample("lanes", jax.vmap(pair)(array(MEANS) + x))
    b = jax.vmap(lambda m: sample("each", pair(m)))(array(MEANS))

    def both(shift):
        return sample("both", jax.vmap(pair)(array(MEANS) + shift))

    return a.sum() + b.sum() + jax.vmap(both)(jnp.arange(2.0)).sum()


def _programs_in_control(c: Flat, x: float) -> list[Term]:
    terms, z = [], x
    for t in range(2):
        terms += _pair(c, z, "step", t)
        z = c["step.y"][t]
    branch = _pair(c, 1.0, "up") if z > 0 else _pair(c, -1.0, "down")
    return [*terms, *branch]


@case(_programs_in_control)
def programs_in_control(x):
    z, _ = jax.lax.scan(lambda z, _: (sample("step", pair(z)), None), x, None, length=2)
    return jax.lax.cond(
        z > 0,
        lambda: sample("up", pair(1.0)),
        lambda: jax.jit(lambda: sample("down", pair(-1.0)))(),
    )


# --- transforms ----------------------------------------------------------------------------------


def _rows(x):
    def row(m):
        t = sample("t", Normal(m + x, 1.0))
        return sample("y", Normal(t, 0.5))

    return jax.vmap(row, axis_name="row")(array(MEANS))


def _scaled(c: Flat, x: float) -> list[Term]:
    return [
        normal("mu", c["mu"], x, 1.0),
        normal("rows.t", c["rows.t"], MEANS + c["mu"], 1.0).times(4.0),
        normal("rows.y", c["rows.y"], c["rows.t"], 0.5).times(6.0),
    ]


@case(_scaled)
def scaled(x):
    mu = sample("mu", Normal(x, 1.0))
    return scope(scale(scale(_rows, {"row": 4.0}), {"y": 1.5}), "rows")(mu)


SEEN = np.array([True, False, True])


def _masked(c: Flat, x: float) -> list[Term]:
    keep = np.flatnonzero(SEEN)
    return [
        normal("t", c["t"][keep], MEANS[keep] + x, 1.0),
        normal("y", c["y"][keep], c["t"][keep], 0.5),
    ]


@case(
    _masked,
    data={"y": [0.0, 100.0, 2.0]},
    evidence=lambda x: gaussian(0.0, MEANS[0] + x, 1.25) + gaussian(2.0, MEANS[2] + x, 1.25),
)
def masked(x):
    return mask(_rows, {"t": array(SEEN), "y": array(SEEN)})(x)


def _conditioned(c: Flat, x: float) -> list[Term]:
    return [
        *_pair({**c, "left.y": np.array(1.0)}, x, "left")[:1],
        dataclasses.replace(normal("left.y", 1.0, c["left.t"], 0.5), size=0, noise=np.zeros(0)),
        normal("rows.t", c["rows.t"], MEANS + 1.0, 1.0),
        dataclasses.replace(
            normal("rows.y", [0.0, 1.0, 2.0], c["rows.t"], 0.5), size=0, noise=np.zeros(0)
        ),
    ]


@case(
    _conditioned,
    evidence=lambda x: float(
        gaussian(1.0, x, 1.25)
        + np.sum(stats.norm.logpdf([0.0, 1.0, 2.0], MEANS + 1.0, np.sqrt(1.25)))
    ),
)
def conditioned(x):
    a = sample("left", condition(pair, {"y": 1.0})(x))
    return scope(condition(_rows, {"y": array(np.arange(3.0))}), "rows")(a)


def _hierarchy(x):
    tau = sample("tau", dist.HalfNormal(1.0))

    def school(m):
        theta = sample("theta", Normal(m + x, tau))
        return sample("y", Normal(theta, 1.0))

    return jax.vmap(school)(array(MEANS))


def _decentred(c: Flat, x: float) -> list[Term]:
    theta = MEANS + x + c["tau"] * c["theta_base"]
    return [
        other("tau", c["tau"], stats.halfnorm()),
        normal("theta_base", c["theta_base"], 0.0, 1.0),
        normal("y", c["y"], theta, 1.0),
    ]


def _decentred_evidence(x: float) -> float:
    def given(tau: float) -> float:
        y = stats.norm.logpdf([0.0, 1.0, 3.0], MEANS + x, np.sqrt(1 + tau**2))
        return stats.halfnorm.logpdf(tau) + np.sum(y)

    return log_integral(given, 0, 12)


@case(_decentred, data={"y": [0.0, 1.0, 3.0]}, evidence=_decentred_evidence)
def decentred(x):
    return noncentered(_hierarchy, "theta")(x)


def _intervened(c: Flat, x: float) -> list[Term]:
    return [
        normal("set.y", c["set.y"], 2.0, 0.5),
        normal("rows.t", c["rows.t"], MEANS + x, 1.0),
    ]


@case(_intervened, value=lambda c, x: c["set.y"] + 3.0)
def intervened(x):
    a = sample("set", do(pair, {"t": 2.0})(x))
    return a + scope(replay(_rows, {"y": array(np.arange(3.0))}), "rows")(x).sum()


def _weighted(c: Flat, x: float) -> list[Term]:
    soft = -0.5 * (c["t"] - x) ** 2
    lanes = np.sum(-np.abs(MEANS - c["t"]) / 10)
    return [normal("t", c["t"], 0.0, 1.0), Term("soft", soft, 0), Term("lane", float(lanes), 0)]


@case(
    _weighted,
    evidence=lambda x: log_integral(lambda t: total(_weighted({"t": np.array(t)}, x)), -12, 12),
    smooth=False,
)
def weighted(x):
    t = sample("t", Normal(0.0, 1.0))
    factor("soft", -0.5 * (t - x) ** 2)
    jax.vmap(lambda m: factor("lane", -jnp.abs(m - t) / 10))(array(MEANS))
    deterministic("twice", 2 * t)
    return jax.vmap(lambda m: deterministic("sums", m + t))(array(MEANS))


# --- other distributions -------------------------------------------------------------------------


def _counts(c: Flat, x: float) -> list[Term]:
    rate = stats.gamma(2.0, scale=1 / (1 + x))
    terms = [other("rate", c["rate"][i], rate) for i in range(2)]
    terms += [other("n", c["n"][i], stats.poisson(c["rate"][i])) for i in range(2)]
    p, heads = c["p"], c["heads"]
    return [
        *terms,
        other("p", p, stats.beta(2.0, 3.0)),
        other("heads", heads, stats.binom(10, p)),
    ]


@case(
    _counts,
    data={"n": [2, 0], "heads": 4},
    evidence=lambda x: float(
        np.sum(stats.nbinom.logpmf([2, 0], 2.0, (1 + x) / (2 + x)))
        + stats.betabinom.logpmf(4, 10, 2.0, 3.0)
    ),
)
def counts(x):
    def one(_):
        return sample("n", dist.Poisson(sample("rate", dist.Gamma(2.0, 1.0 + x))))

    n = jax.vmap(one)(jnp.zeros(2))
    p = sample("p", dist.Beta(2.0, 3.0))
    return n.sum() + sample("heads", dist.Binomial(10, p))


def _batched(c: Flat, x: float) -> list[Term]:
    weights = [normal("w", c["w"][i], m + x, 1.0) for i, m in enumerate(MEANS)]
    simplex = stats.dirichlet([1.0, 2.0, 3.0])
    p = c["p"] / c["p"].sum()
    return [
        *weights,
        Term("p", float(simplex.logpdf(p)), 1),
        *(categorical("word", c["word"][i], p) for i in range(3)),
        Term("tally", float(stats.multinomial(4, p).logpmf(c["tally"])), 1),
    ]


def _batched_evidence(x: float) -> float:
    # words (0, 2, 2) and tally (1, 0, 3): together 2, 0, 5 of each; Dirichlet-multinomial
    prior = np.array([1.0, 2.0, 3.0])

    def log_beta(a: np.ndarray) -> float:
        return float(np.sum(special.gammaln(a)) - special.gammaln(a.sum()))

    return log_beta(prior + np.array([2.0, 0.0, 5.0])) - log_beta(prior) + float(np.log(4))


@case(
    _batched,
    data={"word": [0, 2, 2], "tally": [1, 0, 3]},
    evidence=_batched_evidence,
)
def batched(x):
    """Batch axes inside the distribution, and event axes."""
    sample("w", Normal(array(MEANS) + x, 1.0), dims=("column",))
    p = sample("p", dist.Dirichlet(jnp.arange(1.0, 4.0)))
    repeat(lambda: sample("word", dist.Categorical(p)), 3, axis_name="word")
    return sample("tally", dist.Multinomial(4, p))


CHAIN = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])


def _hidden_markov(c: Flat, x: float) -> list[Term]:
    terms, k = [], 0
    for t in range(4):
        terms.append(categorical("k", c["k"][t], CHAIN[k]))
        k = int(c["k"][t])
        terms.append(normal("y", c["y"][t], k * x, 1.0))
    return terms


def _forward(x: float) -> float:
    alpha = np.array([1.0, 0.0, 0.0])
    for y in PATH:
        alpha = alpha @ CHAIN * stats.norm.pdf(y, np.arange(3) * x, 1.0)
    return float(np.log(alpha.sum()))


@case(_hidden_markov, data={"y": PATH}, evidence=_forward)
def hidden_markov(x):
    chain = array(CHAIN)

    def step(k, _):
        k = sample("k", dist.Categorical(chain[k]))
        return k, sample("y", Normal(k * x, 1.0))

    return jax.lax.scan(step, jnp.zeros((), int), None, length=4)[1]


NAMES = list(CASES)
WITH_EVIDENCE = [name for name, c in CASES.items() if c.evidence is not None]


# --- running them --------------------------------------------------------------------------------


def as_numpy(choices: Any, *index: Any) -> dict[str, np.ndarray]:
    """Choices by dotted address, in double precision, at an index of their leading axes."""
    flat = {a: np.asarray(v)[index] for a, v in flatten(choices).items()}
    return {a: v.astype(float) if v.dtype.kind == "f" else v for a, v in flat.items()}


def noise(terms: list[Term]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(t.noise for t in terms)])


@functools.cache
def run_lanes(name: str) -> tuple[Any, ...]:
    """In double precision: a program spread over lanes, and the same model vmapped in a model."""
    model = CASES[name].model
    function = model.function
    mapped = gen(lambda xs: jax.vmap(function)(xs))
    with jax.enable_x64(True):
        xs = jnp.array([0.5, 1.25])

        def one(key: jax.Array) -> Any:
            program = jax.vmap(model)(xs)
            trace, inside = program.simulate(key), mapped(xs).simulate(key)
            scores = (
                trace.log_density,
                mapped(xs).log_density(trace.choices),
            )
            return trace, inside, scores

        return xs, *jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(9), 3))
