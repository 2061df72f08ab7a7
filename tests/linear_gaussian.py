"""Programs of normal choices that are integrated out, each with its oracle: the same program in exact dense algebra.

Each is a `Case`: a model of numbers `p` and arrays `x`, the choices that are integrated out, and the program once more
over a `Joint` (`joint_normal`), which shares no code with Weft. Numbers, arrays and data are rounded to single
precision, so that both precisions have the same exact answers. Data are a draw of the model, unless a test moves them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import special, stats
from weft.inference import Draws
from weft.ppl import Model, condition, observed
from weft.ppl.stage.addresses import flatten

from joint_normal import Answer, Joint, answer, exact, factor, inverse
from programs import array
from weft import deterministic, gen, marginalize, mask, recover, repeat, sample, scale

lax = jax.lax
Normal, MVN = dist.Normal, dist.MultivariateNormal
RNG = np.random.default_rng(20)


def single(value: Any) -> Any:
    """Numbers that single precision has."""
    value = np.asarray(value)
    return value.astype(np.float32).astype(float) if value.dtype.kind == "f" else value


# --- a table of programs --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of `(p, x)`, its oracle over `(joint, p, x)`, and what is integrated out, known or seen in part."""

    name: str
    model: Model
    addresses: tuple[str, ...]
    p: dict[str, float]
    x: dict[str, Any]
    oracle: Callable[..., Any] = None  # type: ignore[assignment]
    fixed: bool = False  # the arrays are constants of the program, not arguments
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # which data are seen
    missing: str = "drop"
    masked: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # which data the model counts
    inside: tuple[str, ...] = ()  # data that are given before marginalisation
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # values of kept choices
    filtered: tuple[str, ...] = ()
    components: int = 0  # of a mixture; the oracle gets which, and returns its log weight
    power: float = 1.0  # of the marginal density
    means: bool = True  # whether all means are asked for: those of gamma's kin are not at hand
    gamma: tuple[float, float] | None = None  # the unit of all variances has an inverse gamma prior
    parallel: bool = False  # whether the steps of scans are composed in a tree

    def draw(self, seed: int = 0, p: Mapping[str, float] | None = None) -> dict[str, np.ndarray]:
        """Values of all observed sites, drawn from the prior, in their shapes."""
        joint = Joint()
        rest = (0,) if self.components else ()
        self.oracle(joint, exact_numbers(p or self.p), self.x, *rest)
        drawn = joint.draw(np.random.default_rng(seed))
        return {a: single(drawn[a]).reshape(self.shape(a)) for a in self.seen}

    @functools.cached_property
    def sites(self) -> Any:
        return self.model(self.p, self.x).sites

    def shape(self, address: str) -> tuple[int, ...]:
        return self.sites[address].shape

    @functools.cached_property
    def seen(self) -> tuple[str, ...]:
        """The normal sites with data: all that are neither integrated out, nor kept, or are in part."""
        return tuple(
            a
            for a, s in self.sites.items()
            if s.kind == "sample"
            and a not in self.kept
            and (a not in self.addresses or a in self.inside)
        )

    def answer(
        self,
        data: Mapping[str, np.ndarray],
        p: Mapping[str, float] | None = None,
        where: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Answer:
        """The exact answers."""
        where = where or self.where
        flat = {}
        for a, v in data.items():
            seen = np.ones(v.shape, bool)
            if a in where and (self.missing == "drop" or a in self.inside):
                w = np.asarray(where[a])
                seen = np.broadcast_to(w.reshape(w.shape + (1,) * (v.ndim - w.ndim)), v.shape)
            flat[a] = v.ravel(), (seen & self.masked.get(a, True)).ravel()
        options = {"addresses": self.addresses, "filtered": self.filtered, **options}
        options["gamma"] = self.gamma
        run = lambda *k: answer(  # noqa: E731
            lambda j, p: self.oracle(j, p, self.x, *k), p or self.p, flat, **options
        )
        if self.components:
            return mixed([run(k) for k in range(self.components)])
        found = run()
        for what in ("value", "gradient", "hessian"):
            setattr(found, what, self.power * getattr(found, what))
        return found

    # --- Weft's side ---

    def marginal(self, data: Mapping[str, Any]) -> Model:
        """The marginalised model of p and x."""
        model = self.model
        if self.inside:
            model = condition(
                model, {a: observed(data[a], where=self.where[a]) for a in self.inside}
            )
        return marginalize(model, *self.addresses, parallel=self.parallel)

    def target(self, p: Any, x: Any, data: Mapping[str, Any], where: Any = None) -> Any:
        """The marginalised program given its data."""
        x = self.x if self.fixed else x
        return self.marginal(data)(p, x).given(self.entries(data, where))

    def entries(self, data: Mapping[str, Any], where: Any = None) -> dict[str, Any]:
        """What is given to the program: data, of which some are left out, and the values of kept choices."""
        dropped = (where or self.where) if self.missing == "drop" else {}
        seen = {a: v for a, v in data.items() if a not in self.inside}
        for a in dropped:
            seen[a] = observed(seen[a], where=dropped[a], missing="drop")
        return {**seen, **self.kept}

    def joint_density(self, p: Any, data: Mapping[str, Any], latents: Any) -> jax.Array:
        """Weft's log density of the program as it stands, nothing integrated out."""
        return self.model(p, self.x).given(self.entries(data)).log_density(latents)

    @functools.cached_property
    def slope(self) -> Callable[..., Any]:
        """Value and gradient of Weft's log density by p, compiled once."""
        run = jax.value_and_grad(lambda *a: self.target(*a).log_density({}))

        @jax.jit
        def both(*args: Any) -> tuple[jax.Array, jax.Array]:
            value, slope = run(*args)
            return value, jnp.stack([slope[a] for a in self.p])

        return both

    @functools.cached_property
    def derivatives(self) -> Callable[..., Any]:
        """Value, gradient and Hessian of Weft's log density by p, compiled once."""
        return jax.jit(all_three(lambda *a: self.target(*a).log_density({}), list(self.p)))

    def recovered(self, sites: str, n: int = 1) -> Callable[..., dict[str, Any]]:
        """Weft's `recover` for `n` draws, a function of a key, numbers, arrays and data: flat, by address."""

        @jax.jit
        def run(key: Any, p: Any, x: Any, data: Any, where: Any = None) -> dict[str, Any]:
            target = self.target(p, x, data, where)
            draws = Draws(choices={}, stats={"lp": jnp.zeros((1, n))}, target=target)
            x = self.x if self.fixed else x
            return recover(key, self.marginal(data), draws, p, x, sites=sites).derived  # type: ignore[arg-type]

        def flat(*args: Any) -> dict[str, Any]:
            found = flatten(run(*args))
            return {a: np.asarray(found[a])[0].reshape(n, -1) for a in self.addresses if a in found}

        return flat


def all_three(f: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """Value, gradient and Hessian by the named numbers in the first argument, as arrays in the order of the names."""

    def slope(p: Any, *args: Any) -> Any:
        value, g = jax.value_and_grad(f)(p, *args)
        return g, (value, g)

    def run(p: Any, *args: Any) -> Any:
        h, (value, g) = jax.jacfwd(slope, has_aux=True)(p, *args)
        hessian = jnp.stack([jnp.stack([h[a][b] for b in names]) for a in names])
        return value, jnp.stack([g[a] for a in names]), hessian

    return run


def exact_numbers(p: Mapping[str, float]) -> dict[str, Any]:
    return {k: exact(v) for k, v in p.items()}


def mixed(parts: list[Answer]) -> Answer:
    """The answers of a mixture; the values of its parts are joint with their weights, which are constants."""
    values = np.array([a.value for a in parts])
    value = np.logaddexp.reduce(values)
    w = np.exp(values - value)
    gradient = sum(u * a.gradient for u, a in zip(w, parts, strict=True))
    hessian = sum(
        u * (a.hessian + np.outer(a.gradient, a.gradient)) for u, a in zip(w, parts, strict=True)
    )
    mean = {a: sum(u * b.mean[a] for u, b in zip(w, parts, strict=True)) for a in parts[0].mean}
    flat = lambda mean: np.concatenate([np.zeros(0), *mean.values()])  # noqa: E731
    every = [flat(a.mean) - flat(mean) for a in parts]
    cov = sum(u * (a.cov + np.outer(m, m)) for u, a, m in zip(w, parts, every, strict=True))
    return Answer(
        value,
        gradient,
        hessian - np.outer(gradient, gradient),
        mean,
        np.asarray(cov),
        parts[0].prior,
        {},
    )


CASES: dict[str, Case] = {}


def case(*addresses: str, p: dict[str, float], x: Any = None, **settings: Any) -> Any:
    """Register a model, and after it its oracle."""

    def register(f: Any) -> Any:
        numbers = {k: float(single(v)) for k, v in p.items()}
        arrays = {k: single(v) for k, v in (x or {}).items()}
        made = Case(f.__name__, gen(f), addresses, numbers, arrays, **settings)

        def oracle(g: Any) -> Any:
            CASES[f.__name__] = dataclasses.replace(made, oracle=g)
            return g

        return oracle

    return register


# --- plates ---------------------------------------------------------------------------------------

HIERARCHY = {"spread": 5.0, "tau": 0.8, "noise": 0.3}


@case("mu", "theta", p=HIERARCHY)
def plate(p, x):
    mu = sample("mu", Normal(0.0, p["spread"]))

    def group(_):
        sample("y", Normal(sample("theta", Normal(mu, p["tau"])), p["noise"]))

    jax.vmap(group)(jnp.zeros(5))


@plate
def _(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    for _ in range(5):
        j.normal("y", j.normal("theta", mu, p["tau"]), p["noise"])


@case("theta", p={"mu": 0.3, **HIERARCHY}, x={"s": [0.5, 1.0, 2.0]})
def plate_of_known_mean(p, x):
    def group(s):
        theta = sample("theta", Normal(p["mu"], p["tau"] * s))
        jax.vmap(lambda _: sample("y", Normal(2.0 * theta - s, p["noise"])))(jnp.zeros(4))

    jax.vmap(group)(x["s"])


@plate_of_known_mean
def _(j, p, x):
    for s in x["s"]:
        theta = j.normal("theta", p["mu"], p["tau"] * s)
        for _ in range(4):
            j.normal("y", 2.0 * theta - s, p["noise"])


@case("top", "mid", "low", p={"spread": 10.0, "a": 1.0, "b": 0.5, "noise": 0.2})
def nested_plates(p, x):
    top = sample("top", Normal(0.0, p["spread"]))

    def school(mid):
        low = sample("low", Normal(mid, p["b"]))
        jax.vmap(lambda _: sample("y", Normal(low, p["noise"])))(jnp.zeros(2))

    def region(_):
        mid = sample("mid", Normal(top, p["a"]))
        sample("census", Normal(mid, 2.0 * p["noise"]))
        repeat(lambda: school(mid), 3)

    repeat(lambda: region(0.0), 2)


@nested_plates
def _(j, p, x):
    top = j.normal("top", 0.0, p["spread"])
    for _ in range(2):
        mid = j.normal("mid", top, p["a"])
        j.normal("census", mid, 2.0 * p["noise"])
        for _ in range(3):
            low = j.normal("low", mid, p["b"])
            for _ in range(2):
                j.normal("y", low, p["noise"])


@case("mu", "theta", p=HIERARCHY)
def batch_axes(p, x):
    mu = sample("mu", Normal(0.0, p["spread"]))
    theta = sample("theta", Normal(mu, p["tau"]).expand([4]))
    sample("y", Normal(theta[:, None] + jnp.arange(3.0), p["noise"]))


@batch_axes
def _(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    theta = j.normal("theta", np.full(4, mu), p["tau"])
    j.normal("y", theta[:, None] + np.arange(3.0), p["noise"])


@case("mu", "z", p=HIERARCHY)
def written_by_noise(p, x):
    mu = sample("mu", Normal(0.0, p["spread"]))

    def group(_):
        theta = deterministic("theta", mu + p["tau"] * sample("z", Normal(0.0, 1.0)))
        return jax.vmap(lambda c: sample("y", Normal(c * theta, p["noise"])))(jnp.arange(3.0))

    jax.vmap(group)(jnp.zeros(4))


@written_by_noise
def _(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    for _ in range(4):
        theta = mu + p["tau"] * j.normal("z", 0.0, 1.0)
        j.normal("y", np.arange(3.0) * theta, p["noise"])


@case("z", p={"tau": 2.0, "noise": 0.5})
def contrasts(p, x):
    """Effects that add up to nothing, and their mean, read beside each other."""
    z = sample("z", Normal(0.0, p["tau"]).expand([4]))
    effects = deterministic("effects", z - z.mean())
    sample("y", Normal(effects, p["noise"]))
    sample("total", Normal(z.sum(), 1.0))


@contrasts
def _(j, p, x):
    z = j.normal("z", np.zeros(4), p["tau"])
    j.normal("y", z - z.sum() / 4.0, p["noise"])
    j.normal("total", z.sum(), 1.0)


@case("mu", "theta", p=HIERARCHY, masked={"y": np.array([True, False, True])})
def behind_a_mask(p, x):
    mu = sample("mu", Normal(0.0, p["spread"]))

    def group(on):
        theta = sample("theta", Normal(mu, p["tau"]))
        mask(lambda: sample("y", Normal(theta, p["noise"])), on)()

    jax.vmap(group)(jnp.array([True, False, True]))


@behind_a_mask
def _(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    for _ in range(3):
        theta = j.normal("theta", mu, p["tau"])
        j.normal("y", theta, p["noise"])


@case("mu", "theta", p=HIERARCHY, power=2.5)
def scaled_whole(p, x):
    """A power of the marginal density, as for rows that stand for many."""

    def model():
        mu = sample("mu", Normal(0.0, p["spread"]))
        jax.vmap(lambda _: sample("y", Normal(sample("theta", Normal(mu, p["tau"])), p["noise"])))(
            jnp.zeros(3)
        )

    scale(model, 2.5)()


@scaled_whole
def _(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    for _ in range(3):
        j.normal("y", j.normal("theta", mu, p["tau"]), p["noise"])


@case(
    "mu",
    "theta",
    p=HIERARCHY,
    where={"theta": np.array([True, False, False, True])},
    missing="impute",
    inside=("theta",),
)
def seen_in_part(p, x):
    """Some of the choices that are integrated out are known."""
    mu = sample("mu", Normal(0.0, p["spread"]))
    jax.vmap(lambda _: sample("y", Normal(sample("theta", Normal(mu, p["tau"])), p["noise"])))(
        jnp.zeros(4)
    )


@seen_in_part
def _(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    for _ in range(4):
        j.normal("y", j.normal("theta", mu, p["tau"]), p["noise"])


# --- rows that index their groups -----------------------------------------------------------------

ROWS = {"g": np.array([0, 0, 1, 2, 2, 2, 0, 3, 1]), "h": np.array([1, 0, 1, 2, 0, 2, 2, 0, 1])}
ROWS = {**ROWS, "u": RNG.normal(size=9)}


def _rows_by_index(p, x):
    mu = sample("mu", Normal(0.0, p["spread"]))
    theta = sample("theta", Normal(mu, p["tau"]).expand([4]))
    sample("y", Normal(theta[x["g"]], p["noise"]))


def _rows_by_index_exact(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    theta = j.normal("theta", np.full(4, mu), p["tau"])
    j.normal("y", theta[x["g"]], p["noise"])


def known_index(p, x):
    _rows_by_index(p, x)


def traced_index(p, x):
    _rows_by_index(p, x)


case("mu", "theta", p=HIERARCHY, x=ROWS, fixed=True)(known_index)(_rows_by_index_exact)
case("mu", "theta", p=HIERARCHY, x=ROWS)(traced_index)(_rows_by_index_exact)


@case("theta", p=HIERARCHY, x=ROWS)
def index_in_lanes(p, x):
    theta = repeat(lambda: sample("theta", Normal(p["spread"], p["tau"])), 4)
    jax.vmap(lambda g, u: sample("y", Normal(theta[g] * u, p["noise"])))(x["g"], x["u"])


@index_in_lanes
def _(j, p, x):
    theta = j.normal("theta", np.full(4, p["spread"]), p["tau"])
    j.normal("y", theta[x["g"]] * x["u"], p["noise"])


@case("mu", "phi", "theta", p={"spread": 5.0, "a": 1.0, "tau": 0.5, "noise": 0.3}, x=ROWS)
def index_of_an_index(p, x):
    """Rows have a school, schools a district."""
    mu = sample("mu", Normal(0.0, p["spread"]))
    phi = sample("phi", Normal(mu, p["a"]).expand([2]))
    theta = sample("theta", Normal(phi[x["h"][:4] % 2], p["tau"]))
    sample("y", Normal(theta[x["g"]], p["noise"]))


@index_of_an_index
def _(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    phi = j.normal("phi", np.full(2, mu), p["a"])
    theta = j.normal("theta", phi[x["h"][:4] % 2], p["tau"])
    j.normal("y", theta[x["g"]], p["noise"])


CROSSED = {"spread": 3.0, "a": 1.0, "b": 0.5, "noise": 0.3}


@case("mu", "a", "b", p=CROSSED, x=ROWS)
def crossed_by_index(p, x):
    mu = sample("mu", Normal(0.0, p["spread"]))
    a = sample("a", Normal(0.0, p["a"]).expand([4]))
    b = sample("b", Normal(0.0, p["b"]).expand([3]))
    sample("y", Normal(mu + a[x["g"]] + b[x["h"]] * x["u"], p["noise"]))


@crossed_by_index
def _(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    a, b = j.normal("a", np.zeros(4), p["a"]), j.normal("b", np.zeros(3), p["b"])
    j.normal("y", mu + a[x["g"]] + b[x["h"]] * x["u"], p["noise"])


@case("a", "b", p=CROSSED)
def crossed_grid(p, x):
    a = sample("a", Normal(p["spread"], p["a"]).expand([3]))
    b = sample("b", Normal(0.0, p["b"]).expand([4]))
    sample("y", Normal(a[:, None] + b[None, :], p["noise"]))


@crossed_grid
def _(j, p, x):
    a, b = j.normal("a", np.full(3, p["spread"]), p["a"]), j.normal("b", np.zeros(4), p["b"])
    j.normal("y", a[:, None] + b[None, :], p["noise"])


# --- regression and varying slopes ----------------------------------------------------------------

WIDE = {"x": RNG.normal(size=(36, 30))}
TWICE = RNG.normal(size=(8, 3))[:, [0, 1, 1, 2]]
REGRESSION = {"width": 2.0, "noise": 0.5}


@case("beta", p=REGRESSION, x=WIDE)
def regression_of_30(p, x):
    beta = sample("beta", Normal(0.0, p["width"]).expand([30]))
    sample("y", Normal(x["x"] @ beta, p["noise"]))


@regression_of_30
def _(j, p, x):
    beta = j.normal("beta", np.zeros(30), p["width"])
    j.normal("y", x["x"] @ beta, p["noise"])


@case("alpha", "beta", p=REGRESSION, x=WIDE)
def regression_of_a_vector(p, x):
    alpha = sample("alpha", Normal(0.0, 10.0))
    beta = sample("beta", MVN(jnp.zeros(30), p["width"] ** 2 * jnp.eye(30)))
    jax.vmap(lambda row: sample("y", Normal(alpha + row @ beta, p["noise"])))(x["x"])


@regression_of_a_vector
def _(j, p, x):
    alpha = j.normal("alpha", 0.0, 10.0)
    beta = j.normal("beta", np.zeros(30), p["width"])
    j.normal("y", alpha + x["x"] @ beta, p["noise"])


@case("beta", p={"width": 10.0, "noise": 0.01}, x={"x": TWICE})
def collinear_columns(p, x):
    beta = sample("beta", Normal(0.0, p["width"]).expand([4]).to_event(1))
    sample("y", Normal(x["x"] @ beta, p["noise"]))


@collinear_columns
def _(j, p, x):
    j.normal("y", x["x"] @ j.normal("beta", np.zeros(4), p["width"]), p["noise"])


SLOPES = {"s": 1.5, "t": 0.7, "r": 0.6, "noise": 0.3}


def _root(p, array):
    """The root of a covariance of two slopes with sds s and t."""
    return array([[p["s"], 0.0 * p["s"]], [p["r"], p["t"]]])


def _slopes(prior, extra=()):
    def model(p, x):
        c = repeat(lambda: sample("c", prior(p)), 4)
        loc = lambda g, u: sample("y", Normal(c[g, 0] + c[g, 1] * u, p["noise"]))  # noqa: E731
        jax.vmap(loc)(x["g"], x["u"])

    def oracle(j, p, x):
        c = np.array(
            [j.vector("c", exact(np.zeros(2)), _root(p, np.array)) for _ in range(4)], object
        )
        j.normal("y", c[x["g"], 0] + c[x["g"], 1] * x["u"], p["noise"])

    return model, oracle


def _covariance(p):
    root = _root(p, jnp.array)
    return root @ root.T


for _name, _prior in {
    "slopes_by_scale_tril": lambda p: MVN(jnp.zeros(2), scale_tril=_root(p, jnp.array)),
    "slopes_by_covariance": lambda p: MVN(jnp.zeros(2), covariance_matrix=_covariance(p)),
    "slopes_by_precision": lambda p: MVN(
        jnp.zeros(2), precision_matrix=jnp.linalg.inv(_covariance(p))
    ),
}.items():
    _model, _oracle = _slopes(_prior)
    _model.__name__ = _name
    case("c", p=SLOPES, x=ROWS)(_model)(_oracle)


CROSSED_ROWS = {  # a group without rows, one of one row, one of equal rows
    "g": np.array([0, 0, 0, 0, 1, 1, 1, 3, 3, 3, 4, 4, 4, 5]),
    "h": np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0, 3, 2]),
    "u": np.arange(14) % 5 / 4 - 0.5,
}
CROSSED_ROWS["u"][CROSSED_ROWS["g"] == 4] = 0.25


@case("mu", "c", "d", p={"spread": 3.0, "a": 0.6, **SLOPES}, x=CROSSED_ROWS)
def crossed_slopes(p, x):
    """Lines of groups beside levels, and a slope that is a parameter."""
    mu = sample("mu", Normal(0.0, 10.0))
    c = repeat(lambda: sample("c", MVN(jnp.zeros(2), scale_tril=_root(p, jnp.array))), 6)
    d = sample("d", Normal(mu, p["spread"]).expand([5]))
    u = p["a"] + x["u"]
    sample("y", Normal(c[x["g"], 0] + u * c[x["g"], 1] + d[x["h"]], p["noise"]))


@crossed_slopes
def _(j, p, x):
    mu = j.normal("mu", 0.0, 10.0)
    c = np.array([j.vector("c", exact(np.zeros(2)), _root(p, np.array)) for _ in range(6)], object)
    d = j.normal("d", np.full(5, mu), p["spread"])
    u = p["a"] + x["u"]
    j.normal("y", c[x["g"], 0] + u * c[x["g"], 1] + d[x["h"]], p["noise"])


@case("c", p=SLOPES, x={k: v for k, v in ROWS.items() if k != "h"})
def slopes_of_low_rank(p, x):
    factor, rest = jnp.stack([p["s"], p["r"]])[:, None], jnp.stack([1.0, p["t"] ** 2])
    law = dist.LowRankMultivariateNormal(jnp.zeros(2), factor, rest)
    c = repeat(lambda: sample("c", law), 4)
    jax.vmap(lambda g, u: sample("y", Normal(c[g, 0] + c[g, 1] * u, p["noise"])))(x["g"], x["u"])


@slopes_of_low_rank
def _(j, p, x):
    root = np.array([[p["s"], 1.0, 0.0], [p["r"], 0.0, p["t"]]])
    c = np.array([j.vector("c", exact(np.zeros(2)), root) for _ in range(4)], object)
    j.normal("y", c[x["g"], 0] + c[x["g"], 1] * x["u"], p["noise"])


@case("m", "c", p={"spread": 10.0, **SLOPES}, x={"u": RNG.normal(size=(3, 4))})
def slopes_of_a_common_mean(p, x):
    """Groups as lanes, rows as lanes in them; vectors of unknown mean."""
    m = sample("m", Normal(jnp.zeros(2), p["spread"]).to_event(1))

    def group(u):
        c = sample("c", MVN(m, scale_tril=_root(p, jnp.array)))
        sample("y", Normal(jnp.stack([jnp.ones(4), u], 1) @ c, p["noise"]))

    jax.vmap(group)(x["u"])


@slopes_of_a_common_mean
def _(j, p, x):
    m = j.normal("m", np.zeros(2), p["spread"])
    for u in x["u"]:
        c = j.vector("c", m, _root(p, np.array))
        j.normal("y", c[0] + c[1] * u, p["noise"])


@case("c", p=SLOPES)
def multivariate_leaves(p, x):
    """Vectors that are read by vectors, by a precision and a covariance, through matrices."""
    c = sample("c", MVN(jnp.ones(2), scale_tril=_root(p, jnp.array)))
    sample("y", MVN(array(TURN) @ c, p["noise"] ** 2 * array(SPD)))
    sample("z", MVN(c, precision_matrix=array(SPD)).expand([3]))


TURN = single([[0.8, -0.6], [0.5, 0.3]])
SPD = single([[1.2, 0.3], [0.3, 0.7]])


@multivariate_leaves
def _(j, p, x):
    c = j.vector("c", exact(np.ones(2)), _root(p, np.array))
    j.vector("y", TURN @ c, p["noise"] * factor(SPD))
    for _ in range(3):
        j.vector("z", c, factor(inverse(exact(SPD))))


# --- scans ----------------------------------------------------------------------------------------

STEPS = 6
WALK = {"q": 0.7, "noise": 0.4}


@case("x", p=WALK, filtered=("x",))
def random_walk(p, x):
    def step(x, _):
        x = sample("x", Normal(x, p["q"]))
        sample("y", Normal(x, p["noise"]))
        return x, None

    lax.scan(step, 0.0, length=STEPS)


@random_walk
def _(j, p, x):
    x = 0.0
    for _ in range(STEPS):
        x = j.normal("x", x, p["q"])
        j.normal("y", x, p["noise"])
        j.tick()


@case("start", "x", p={"vague": 1000.0, **WALK}, filtered=("x",))
def level_of_vague_start(p, x):
    def step(x, _):
        x = sample("x", Normal(x, p["q"]))
        sample("y", Normal(x, p["noise"]))
        return x, None

    lax.scan(step, sample("start", Normal(0.0, p["vague"])), length=STEPS)


@level_of_vague_start
def _(j, p, x):
    x = j.normal("start", 0.0, p["vague"])
    for _ in range(STEPS):
        x = j.normal("x", x, p["q"])
        j.normal("y", x, p["noise"])
        j.tick()


@case("x", p={"a": 0.9, "b": -0.4, **WALK}, filtered=("x",))
def second_order(p, x):
    def step(carry, _):
        now, before = carry
        new = sample("x", Normal(p["a"] * now + p["b"] * before, p["q"]))
        sample("y", Normal(new, p["noise"]))
        return (new, now), None

    lax.scan(step, (1.0, 0.5), length=STEPS)


@second_order
def _(j, p, x):
    now, before = 1.0, 0.5
    for _ in range(STEPS):
        now, before = j.normal("x", p["a"] * now + p["b"] * before, p["q"]), now
        j.normal("y", now, p["noise"])
        j.tick()


@case("start", "e", p={"a": 0.9, "b": -0.4, **WALK}, filtered=("e",))
def companion(p, x):
    """An autoregression as a vector and its companion matrix, driven by one noise."""

    def step(state, _):
        matrix = jnp.stack([jnp.stack([p["a"], p["b"]]), jnp.array([1.0, 0.0])])
        e = sample("e", Normal(0.0, 1.0))
        state = matrix @ state + jnp.array([1.0, 0.0]) * p["q"] * e
        sample("y", Normal(state[0], p["noise"]))
        return state, None

    lax.scan(step, sample("start", Normal(jnp.zeros(2), 3.0).to_event(1)), length=STEPS)


@companion
def _(j, p, x):
    state = j.normal("start", np.zeros(2), 3.0)
    for _ in range(STEPS):
        new = p["a"] * state[0] + p["b"] * state[1] + p["q"] * j.normal("e", 0.0, 1.0)
        state = np.array([new, state[0]], object)
        j.normal("y", state[0], p["noise"])
        j.tick()


@case("x", p={"a": 0.5, **WALK}, filtered=("x",))
def gathering_carry(p, x):
    """A carry that holds the last three values, shifted by one at each step."""

    def step(past, _):
        x = sample("x", Normal(p["a"] * (past @ jnp.array([1.0, 0.5, -0.25])), p["q"]))
        past = jnp.concatenate([x[None], past[:-1]])
        sample("y", Normal(past.sum(), p["noise"]))
        return past, None

    lax.scan(step, jnp.array([1.0, -1.0, 0.5]), length=STEPS)


@gathering_carry
def _(j, p, x):
    past = [1.0, -1.0, 0.5]
    for _ in range(STEPS):
        new = j.normal("x", p["a"] * (past[0] + 0.5 * past[1] - 0.25 * past[2]), p["q"])
        past = [new, past[0], past[1]]
        j.normal("y", past[0] + past[1] + past[2], p["noise"])
        j.tick()


@case("x", p={"w": 0.5, "noise": 0.3}, filtered=("x",))
def seasonal(p, x):
    """Effects of four seasons that add up to noise."""

    def step(past, _):
        x = sample("x", Normal(-past.sum(), p["w"]))
        sample("y", Normal(x, p["noise"]))
        return jnp.roll(past, 1).at[0].set(x), None

    lax.scan(step, jnp.array([1.0, -2.0, 0.5]), length=STEPS)


@seasonal
def _(j, p, x):
    past = [1.0, -2.0, 0.5]
    for _ in range(STEPS):
        new = j.normal("x", -(past[0] + past[1] + past[2]), p["w"])
        j.normal("y", new, p["noise"])
        past = [new, past[0], past[1]]
        j.tick()


DECAY = single([0.95, 0.5, 0.05])
LOADS = single([[1.0, 0.0], [0.6, 0.5], [-0.4, 0.9]])
START = single([[2.0], [1.0], [0.5]])
READ = single([0.5, 1.0, 2.0])


@case("start", "e", p={"q": 0.5, "noise": 0.05}, filtered=("e",))
def bank_of_states(p, x):
    """Three states driven by two noises, from a start of rank one: no covariance is regular."""

    def step(state, _):
        e = sample("e", Normal(0.0, 1.0).expand([2]).to_event(1))
        new = array(DECAY) * state + p["q"] * array(LOADS) @ e
        sample("y", Normal(array(READ) @ (new - state), p["noise"]))
        return new, None

    start = sample("start", Normal(0.0, 1.0).expand([1]).to_event(1))
    lax.scan(step, array(START) @ start, length=STEPS)


@bank_of_states
def _(j, p, x):
    state = START @ j.normal("start", np.zeros(1), 1.0)
    for _ in range(STEPS):
        new = DECAY * state + p["q"] * (LOADS @ j.normal("e", np.zeros(2), 1.0))
        j.normal("y", READ @ (new - state), p["noise"])
        state = new
        j.tick()


@case(
    "beta",
    "l0",
    "s0",
    "level",
    "slope",
    p={"vague": 1000.0, "q": 0.5, "r": 0.2, "noise": 0.3},
    x={"u": RNG.normal(size=(STEPS, 2))},
)
def trend_with_regressors(p, x):
    """A local linear trend from a vague start; two coefficients are read by every step."""
    beta = sample("beta", Normal(0.0, 10.0).expand([2]))

    def step(carry, u):
        level, slope = carry
        level = sample("level", Normal(level + slope, p["q"]))
        slope = sample("slope", Normal(slope, p["r"]))
        sample("y", Normal(level + u @ beta, p["noise"]))
        return (level, slope), None

    first = sample("l0", Normal(0.0, p["vague"])), sample("s0", Normal(0.0, 2.0))
    lax.scan(step, first, x["u"])


@trend_with_regressors
def _(j, p, x):
    beta = j.normal("beta", np.zeros(2), 10.0)
    level, slope = j.normal("l0", 0.0, p["vague"]), j.normal("s0", 0.0, 2.0)
    for u in x["u"]:
        level, slope = j.normal("level", level + slope, p["q"]), j.normal("slope", slope, p["r"])
        j.normal("y", level + u @ beta, p["noise"])
        j.tick()


@case("l0", "s0", "level", p={"vague": 100.0, "q": 0.5, "noise": 0.3})
def trend_of_constant_slope(p, x):
    """The slope is drawn once and handed on as it is."""

    def step(carry, _):
        level, slope = carry
        level = sample("level", Normal(level + slope, p["q"]))
        sample("y", Normal(level, p["noise"]))
        return (level, slope), None

    first = sample("l0", Normal(0.0, p["vague"])), sample("s0", Normal(0.0, 1.0))
    lax.scan(step, first, length=STEPS)


@trend_of_constant_slope
def _(j, p, x):
    level, slope = j.normal("l0", 0.0, p["vague"]), j.normal("s0", 0.0, 1.0)
    for _ in range(STEPS):
        level = j.normal("level", level + slope, p["q"])
        j.normal("y", level, p["noise"])


@case("l0", "s0", p={"vague": 100.0, "noise": 0.3}, x={"h": [0.5, 1.0, 0.25, 2.0]})
def steps_without_choices(p, x):
    """A straight line as a scan: nothing is drawn in it."""

    def step(carry, h):
        level, slope = carry
        level = level + h * slope
        sample("y", Normal(level, p["noise"]))
        return (level, slope), None

    first = sample("l0", Normal(0.0, p["vague"])), sample("s0", Normal(0.0, 1.0))
    lax.scan(step, first, x["h"])


@steps_without_choices
def _(j, p, x):
    level, slope = j.normal("l0", 0.0, p["vague"]), j.normal("s0", 0.0, 1.0)
    for h in x["h"]:
        level = level + h * slope
        j.normal("y", level, p["noise"])


INPUTS = {"u": RNG.normal(size=STEPS), "h": np.exp(0.5 * RNG.normal(size=STEPS))}


@case("x", p={"a": 0.8, "b": 1.5, **WALK}, x=INPUTS, filtered=("x",))
def inputs(p, x):
    """Inputs of the location and of both scales."""

    def step(x, uh):
        u, h = uh
        x = sample("x", Normal(p["a"] * x + p["b"] * u, p["q"] * jnp.sqrt(h)))
        sample("y", Normal(x - u, p["noise"] * h))
        return x, None

    lax.scan(step, 0.5, (x["u"], x["h"]))


@inputs
def _(j, p, x):
    v = 0.5
    for u, h in zip(x["u"], x["h"], strict=True):
        v = j.normal("x", p["a"] * v + p["b"] * u, p["q"] * np.sqrt(exact(h)))
        j.normal("y", v - u, p["noise"] * h)
        j.tick()


def _gaps(p, x):
    def step(x, _):
        x = sample("x", Normal(p["a"] * x, p["q"]))
        sample("y", Normal(x, p["noise"]))
        return x, None

    lax.scan(step, sample("start", Normal(0.0, p["vague"])), length=STEPS)


def _gaps_exact(j, p, x):
    v = j.normal("start", 0.0, p["vague"])
    for _ in range(STEPS):
        v = j.normal("x", p["a"] * v, p["q"])
        j.normal("y", v, p["noise"])
        j.tick()


GAPS = np.array([False, True, False, False, True, True])


def gaps_left_out(p, x):
    _gaps(p, x)


def gaps_kept(p, x):
    _gaps(p, x)


def gaps_integrated_out(p, x):
    _gaps(p, x)


_settings: dict[str, Any] = {"p": {"vague": 10.0, "a": 0.9, **WALK}, "where": {"y": GAPS}}
case("start", "x", **_settings, filtered=("x",))(gaps_left_out)(_gaps_exact)
case("start", "x", **_settings, missing="impute")(gaps_kept)(_gaps_exact)
case("start", "x", "y", **_settings, missing="impute", inside=("y",))(gaps_integrated_out)(
    _gaps_exact
)

FLIP = single([[0.9, 0.2], [-0.1, 0.7]])


@case("x0", "x", p={"q": 0.5, "r": 0.3, "noise": 0.4}, filtered=("x",))
def multivariate_chain(p, x):
    """A vector state, observed before the scan and by two sites of every step."""
    x0 = sample("x0", MVN(jnp.ones(2), scale_tril=2.0 * jnp.eye(2)))
    sample("y0", Normal(x0[0], p["noise"]))

    def step(x, _):
        x = sample("x", MVN(array(FLIP) @ x, p["q"] * array(SPD)))
        sample("y", MVN(x + 0.5, p["r"] * array(SPD)))
        sample("w", Normal(x[0] - x[1], p["noise"]))
        return x, None

    lax.scan(step, x0, length=4)


@multivariate_chain
def _(j, p, x):
    v = j.normal("x0", exact(np.ones(2)), 2.0)
    j.normal("y0", v[0], p["noise"])
    for _ in range(4):
        v = j.vector("x", FLIP @ v, np.sqrt(p["q"]) * factor(SPD))
        j.vector("y", v + 0.5, np.sqrt(p["r"]) * factor(SPD))
        j.normal("w", v[0] - v[1], p["noise"])
        j.tick()


@case("v", "x", p={"q": 0.5, "r": 0.3, "noise": 0.2}, filtered=("x",))
def two_choices_a_step(p, x):
    """A velocity and a position: the second choice of a step reads the first."""

    def step(carry, _):
        v, x = carry
        v = sample("v", Normal(0.875 * v, p["q"]))
        x = sample("x", Normal(x + v, p["r"]))
        sample("y", Normal(x, p["noise"]))
        return (v, x), None

    lax.scan(step, (0.0, 0.0), length=STEPS)


@two_choices_a_step
def _(j, p, x):
    v = pos = 0.0
    for _ in range(STEPS):
        v = j.normal("v", 0.875 * v, p["q"])
        pos = j.normal("x", pos + v, p["r"])
        j.normal("y", pos, p["noise"])
        j.tick()


@case("e", p={"theta": 0.6, **WALK}, filtered=("e",))
def moving_average(p, x):
    def step(before, _):
        e = sample("e", Normal(0.0, p["q"]))
        sample("y", Normal(e + p["theta"] * before, p["noise"]))
        return e, None

    lax.scan(step, 0.0, length=STEPS)


@moving_average
def _(j, p, x):
    before = 0.0
    for _ in range(STEPS):
        e = j.normal("e", 0.0, p["q"])
        j.normal("y", e + p["theta"] * before, p["noise"])
        before = e
        j.tick()


@case("first", "x", p=WALK, filtered=("x",))
def many_states_in_a_scan(p, x):
    """The states of a step do not meet: a vmap in a scan."""

    def step(x, _):
        def one(x, c):
            x = sample("x", Normal(c * x, p["q"]))
            sample("y", Normal(x, p["noise"]))
            return x

        return jax.vmap(one)(x, jnp.array([0.5, 0.875, 1.0])), None

    last, _ = lax.scan(step, sample("first", Normal(0.0, 2.0).expand([3])), length=4)
    sample("after", Normal(last, 0.5))


@many_states_in_a_scan
def _(j, p, x):
    v = j.normal("first", np.zeros(3), 2.0)
    for _ in range(4):
        v = j.normal("x", np.array([0.5, 0.875, 1.0]) * v, p["q"])
        j.normal("y", v, p["noise"])
        j.tick()
    j.normal("after", v, 0.5)


@case("x", p=WALK, filtered=("x",))
def states_that_meet(p, x):
    """The states of a step are read together by one observation."""

    def step(x, _):
        x = sample("x", Normal(jnp.array([0.5, 0.875, 1.0]) * x, p["q"]))
        sample("y", Normal(x.sum(), p["noise"]))
        return x, None

    lax.scan(step, jnp.zeros(3), length=4)


@states_that_meet
def _(j, p, x):
    v = exact(np.zeros(3))
    for _ in range(4):
        v = j.normal("x", np.array([0.5, 0.875, 1.0]) * v, p["q"])
        j.normal("y", v.sum(), p["noise"])
        j.tick()


@case("start", "x", p=WALK, x={"a": [0.5, 1.0, -0.8]})
def a_series_a_lane(p, x):
    def series(a):
        def step(x, _):
            x = sample("x", Normal(a * x, p["q"]))
            sample("y", Normal(x, p["noise"]))
            return x, None

        last, _ = lax.scan(step, sample("start", Normal(0.0, 2.0)), length=4)
        sample("after", Normal(last, 0.5))

    jax.vmap(series)(x["a"])


@a_series_a_lane
def _(j, p, x):
    for a in x["a"]:
        v = j.normal("start", 0.0, 2.0)
        for _ in range(4):
            v = j.normal("x", a * v, p["q"])
            j.normal("y", v, p["noise"])
        j.normal("after", v, 0.5)


@case("mu", "x", p={"spread": 5.0, **WALK}, x={"a": [0.5, 1.0, -0.8]})
def series_of_a_common_mean(p, x):
    """Lanes of chains that all read one choice; each lane also reads it in its transitions."""
    mu = sample("mu", Normal(0.0, p["spread"]))

    def series(a):
        def step(x, _):
            x = sample("x", Normal(mu + a * (x - mu), p["q"]))
            sample("y", Normal(x, p["noise"]))
            return x, None

        lax.scan(step, 0.0, length=3)

    jax.vmap(series)(x["a"])


@series_of_a_common_mean
def _(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    for a in x["a"]:
        v = 0.0
        for _ in range(3):
            v = j.normal("x", mu + a * (v - mu), p["q"])
            j.normal("y", v, p["noise"])


@case("mu", "x", p={"spread": 5.0, "a": 0.7, **WALK})
def outer_coefficient(p, x):
    """Every step reads a choice from before the scan; so does a site after it."""
    mu = sample("mu", Normal(0.0, p["spread"]))

    def step(x, _):
        x = sample("x", Normal(p["a"] * x, p["q"]))
        sample("y", Normal(mu + x, p["noise"]))
        return x, None

    last, _ = lax.scan(step, 0.0, length=STEPS)
    sample("after", Normal(mu - last, p["noise"]))


@outer_coefficient
def _(j, p, x):
    mu = j.normal("mu", 0.0, p["spread"])
    v = 0.0
    for _ in range(STEPS):
        v = j.normal("x", p["a"] * v, p["q"])
        j.normal("y", mu + v, p["noise"])
    j.normal("after", mu - v, p["noise"])


@case("z", "w", p={"a": 0.7, **WALK})
def chain_in_a_step(p, x):
    """Each inner chain starts from the outer state."""

    def inner(w, _):
        w = sample("w", Normal(p["a"] * w, p["q"]))
        sample("y", Normal(w, p["noise"]))
        return w, None

    def outer(z, u):
        z = sample("z", Normal(z, p["q"]))
        last, _ = lax.scan(inner, z, length=2)
        sample("v", Normal(u + last, p["noise"]))
        return z, None

    lax.scan(outer, 0.0, jnp.array([0.5, -1.0, 0.25]))


@chain_in_a_step
def _(j, p, x):
    z = 0.0
    for u in (0.5, -1.0, 0.25):
        z = j.normal("z", z, p["q"])
        w = z
        for _ in range(2):
            w = j.normal("w", p["a"] * w, p["q"])
            j.normal("y", w, p["noise"])
        j.normal("v", u + w, p["noise"])


@case("x", p=WALK, x=INPUTS)
def backwards(p, x):
    def step(x, u):
        x = sample("x", Normal(0.875 * x + u, p["q"]))
        sample("y", Normal(x, p["noise"]))
        return x, None

    lax.scan(step, 1.0, x["u"], reverse=True)


@backwards
def _(j, p, x):
    v = 1.0
    for t in reversed(range(STEPS)):
        v = j.normal("x", 0.875 * v + x["u"][t], p["q"], at=t)
        j.normal("y", v, p["noise"], at=t)


@case("first", "x", p=WALK)
def read_at_both_ends(p, x):
    first = sample("first", Normal(0.0, 3.0))

    def step(x, _):
        x = sample("x", Normal(x, p["q"]))
        sample("y", Normal(x, p["noise"]))
        return x, None

    last, _ = lax.scan(step, first, length=4)
    sample("after", Normal(last - first, 0.5))


@read_at_both_ends
def _(j, p, x):
    first = v = j.normal("first", 0.0, 3.0)
    for _ in range(4):
        v = j.normal("x", v, p["q"])
        j.normal("y", v, p["noise"])
    j.normal("after", v - first, 0.5)


@case("a", "b", "part.s", p=WALK)
def chain_after_a_chain(p, x):
    """The state goes from one scan into the next, and into a nested program."""

    def first(z, _):
        z = sample("a", Normal(z, p["q"]))
        sample("y", Normal(z, p["noise"]))
        return z, None

    def second(z, _):
        z = sample("b", Normal(0.5 * z, 2.0 * p["q"]))
        sample("w", Normal(z, p["noise"]))
        return z, None

    z, _ = lax.scan(first, 0.0, length=3)
    z, _ = lax.scan(second, z, length=2)

    @gen
    def part(z):
        sample("v", Normal(sample("s", Normal(z, 1.0)), p["noise"]))

    sample("part", part(z))


@chain_after_a_chain
def _(j, p, x):
    z = 0.0
    for _ in range(3):
        z = j.normal("a", z, p["q"])
        j.normal("y", z, p["noise"])
    for _ in range(2):
        z = j.normal("b", 0.5 * z, 2.0 * p["q"])
        j.normal("w", z, p["noise"])
    j.normal("part.v", j.normal("part.s", z, 1.0), p["noise"])


@case("x", p=WALK)
def counted_loop(p, x):
    def body(i, x):
        x = sample("x", Normal(x, p["q"]))
        sample("y", Normal(x + i, p["noise"]))
        return x

    lax.fori_loop(0, 4, body, 0.0)


@counted_loop
def _(j, p, x):
    v = 0.0
    for i in range(4):
        v = j.normal("x", v, p["q"])
        j.normal("y", v + i, p["noise"])


@case("x", p={"a": 0.8, **WALK})
def observations_as_carry(p, x):
    """Steps that also read the last observation: an autoregression with a latent level."""

    def step(carry, _):
        x, y = carry
        x = sample("x", Normal(x, p["q"]))
        y = sample("y", Normal(x + p["a"] * y, p["noise"]))
        return (x, y), None

    lax.scan(step, (0.0, 0.5), length=STEPS)


@observations_as_carry
def _(j, p, x):
    v, y = 0.0, 0.5
    for _ in range(STEPS):
        v = j.normal("x", v, p["q"])
        y = j.normal("y", v + p["a"] * y, p["noise"])


# --- mixed with others ----------------------------------------------------------------------------

GAINS, WIDTHS = single([0.9, -0.5]), single([0.3, 1.2])
SWITCH = np.array([0, 1, 1, 0, 1, 0])
LEAVE = single(0.25)


@case("x", p={"q": 0.7, "noise": 0.4}, kept={"z": SWITCH}, filtered=("x",))
def switching_given_the_switch(p, x):
    def step(carry, _):
        z, x = carry
        z = sample("z", dist.Bernoulli(jnp.where(z == 1, 1 - LEAVE, LEAVE)))
        x = sample("x", Normal(array(GAINS)[z] * x, p["q"] * array(WIDTHS)[z]))
        sample("y", Normal(x, p["noise"]))
        return (z, x), None

    lax.scan(step, (0, 1.0), length=len(SWITCH))


@switching_given_the_switch
def _(j, p, x):
    v = 1.0
    for z in SWITCH:
        v = j.normal("x", GAINS[z] * v, p["q"] * WIDTHS[z])
        j.normal("y", v, p["noise"])
        j.tick()
    moved = np.diff(np.r_[0, SWITCH]) != 0
    return np.log(np.where(moved, LEAVE, 1 - LEAVE)).sum()


@case("x0", p={"q": 2.0, "noise": 0.4}, kept={"u": np.array(0.5)})
def a_branch_of_a_kept_choice(p, x):
    u = sample("u", Normal(0.0, 1.0))
    x0 = sample("x0", Normal(u, p["q"]))
    loc = lax.cond(u > 0.0, lambda x: 2.0 * x, lambda x: x - 1.0, x0)
    lax.cond(
        u > 0.0,
        lambda x: sample("y", Normal(x, p["noise"])),
        lambda x: sample("y", Normal(-x, 1.0)),
        loc,
    )
    sample("w", Normal(x0, 1.0))


@a_branch_of_a_kept_choice
def _(j, p, x):
    x0 = j.normal("x0", 0.5, p["q"])
    j.normal("y", 2.0 * x0, p["noise"])
    j.normal("w", x0, 1.0)
    return stats.norm.logpdf(0.5)


@case("b", "mu", "theta", p=HIERARCHY, components=2)
def a_choice_of_two_that_shifts(p, x):
    """A Bernoulli choice moves the mean and widens the groups: a mixture of two normals."""
    b = sample("b", dist.Bernoulli(LEAVE))
    mu = sample("mu", Normal(2.0 * b, p["spread"]))

    def group(_):
        theta = sample("theta", Normal(mu, p["tau"] * (1.0 + b)))
        sample("y", Normal(theta - b, p["noise"]))

    jax.vmap(group)(jnp.zeros(3))


@a_choice_of_two_that_shifts
def _(j, p, x, b):
    mu = j.normal("mu", 2.0 * b, p["spread"])
    for _ in range(3):
        j.normal("y", j.normal("theta", mu, p["tau"] * (1.0 + b)) - b, p["noise"])
    return np.log(LEAVE if b else 1 - LEAVE)


@case("b", "theta", p=HIERARCHY, components=4)
def mixtures_in_lanes(p, x):
    """A switch a lane: each lane is a mixture of two."""

    def group(_):
        b = sample("b", dist.Bernoulli(LEAVE))
        theta = sample("theta", Normal(p["spread"] * b, p["tau"]))
        jax.vmap(lambda _: sample("y", Normal(theta, p["noise"])))(jnp.zeros(2))

    jax.vmap(group)(jnp.zeros(2))


@mixtures_in_lanes
def _(j, p, x, k):
    weight = 0.0
    for b in (k % 2, k // 2):
        theta = j.normal("theta", p["spread"] * b, p["tau"])
        j.normal("y", np.full(2, theta), p["noise"])
        weight += np.log(LEAVE if b else 1 - LEAVE)
    return weight


@case("variance", "mu", "theta", p={"k": 2.0, "tau": 0.5}, x=ROWS, gamma=(3.0, 2.0), means=False)
def common_variance(p, x):
    """Scales that share an unknown factor, which is integrated out with the means: a multivariate t."""
    unit = jnp.sqrt(sample("variance", dist.InverseGamma(3.0, 2.0)))
    mu = sample("mu", Normal(0.5, p["k"] * unit))
    theta = sample("theta", Normal(mu, p["tau"] * unit).expand([4]))
    sample("y", Normal(theta[x["g"]], unit))


@common_variance
def _(j, p, x):
    mu = j.normal("mu", 0.5, p["k"])
    theta = j.normal("theta", np.full(4, mu), p["tau"])
    j.normal("y", theta[x["g"]], 1.0)


COUNTS, HEADS = np.array([3, 0, 2]), np.array([1, 1, 0, 1])


@case(
    "rate",
    "prob",
    "mu",
    p={"spread": 3.0, "noise": 0.5},
    kept={"n": COUNTS, "h": HEADS},
    means=False,
)
def beside_other_families(p, x):
    """A gamma, a beta and a normal choice that do not meet."""
    rate, prob = sample("rate", dist.Gamma(2.0, 3.0)), sample("prob", dist.Beta(2.0, 3.0))
    mu = sample("mu", Normal(0.0, p["spread"]))
    sample("n", dist.Poisson(rate).expand([3]))
    sample("h", dist.Bernoulli(prob).expand([4]))
    sample("y", Normal(mu, p["noise"]).expand([3]))


@beside_other_families
def _(j, p, x):
    j.normal("y", np.full(3, j.normal("mu", 0.0, p["spread"])), p["noise"])
    n, heads = COUNTS.sum(), HEADS.sum()
    counts = special.gammaln(2 + n) - special.gammaln(2.0) + 2 * np.log(3) - (2 + n) * np.log(3 + 3)
    flips = special.betaln(2 + heads, 3 + 4 - heads) - special.betaln(2, 3)
    return counts - special.gammaln(1.0 + COUNTS).sum() + flips
