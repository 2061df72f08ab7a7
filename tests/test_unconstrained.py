"""The target on R^n: bijections and Jacobians, sites observed in part, and the law of branches not taken.

Bijections are held to autodiff in double precision. The law of branches is integrated: the density on
R^n of a program with branches, by Gauss and Legendre's rule over panels that end where a predicate
changes, must give the evidence. Integrands are smooth within a panel, so 1e-5 relative is generous.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats
from weft.inference import nuts
from weft.ppl import (
    DensityError,
    Target,
    condition,
    gen,
    loop,
    mask,
    noncentered,
    observed,
    sample,
    scope,
)
from weft.ppl.stage.addresses import flatten

from programs import CASES, X, log_integral, log_mean

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(40)
Normal = dist.Normal
constraints = dist.constraints
lax = jax.lax


# --- bijections -------------------------------------------------------------------------------


def improper(support: Any, *event_shape: int) -> Any:
    return dist.ImproperUniform(support, (), event_shape)


def ordered() -> Any:
    transform = dist.transforms.OrderedTransform()
    return dist.TransformedDistribution(Normal(jnp.zeros(3), 1.0).to_event(1), transform)


def lower(x: jax.Array) -> jax.Array:
    return x[jnp.tril_indices(x.shape[-1])]


def strictly_lower(x: jax.Array) -> jax.Array:
    return x[jnp.tril_indices(x.shape[-1], -1)]


# Distribution, and the coordinates that its density is with respect to.
SUPPORTS: dict[str, tuple[Callable[[], Any], Callable[[jax.Array], jax.Array]]] = {
    "real": (lambda: Normal(1.0, 2.0), jnp.ravel),
    "positive": (lambda: dist.Gamma(2.0, 1.5), jnp.ravel),
    "positive batch": (lambda: dist.HalfNormal(jnp.array([0.5, 2.0])), jnp.ravel),
    "unit interval": (lambda: dist.Beta(2.0, 3.0), jnp.ravel),
    "interval": (lambda: dist.Uniform(-1.0, 3.0), jnp.ravel),
    "truncated": (lambda: dist.TruncatedNormal(0.0, 1.0, low=-0.5, high=2.0), jnp.ravel),
    "greater than": (lambda: dist.Pareto(1.5, 3.0), jnp.ravel),
    "circular": (lambda: dist.VonMises(0.5, 2.0), jnp.ravel),
    "simplex": (lambda: dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])), lambda x: x[:-1]),
    "simplex batch": (
        lambda: dist.Dirichlet(jnp.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])),
        lambda x: jnp.ravel(x[:, :-1]),
    ),
    "real vector": (
        lambda: dist.MultivariateNormal(jnp.arange(2.0), jnp.array([[2.0, 0.5], [0.5, 1.0]])),
        jnp.ravel,
    ),
    "independent": (lambda: dist.LogNormal(jnp.zeros((2, 2)), 0.5).to_event(1), jnp.ravel),
    "ordered vector": (ordered, jnp.ravel),
    "correlation Cholesky": (lambda: dist.LKJCholesky(3, 1.5), strictly_lower),
    "correlation matrix": (lambda: dist.LKJ(3, 1.5), strictly_lower),
    "positive definite": (
        lambda: dist.Wishart(4.0, jnp.array([[2.0, 0.5], [0.5, 1.0]])),
        lower,
    ),
    "zero sum": (lambda: dist.ZeroSumNormal(1.0, (3,)), jnp.ravel),
    "less than": (lambda: improper(constraints.less_than(1.0)), jnp.ravel),
    "nonnegative": (lambda: improper(constraints.nonnegative), jnp.ravel),
    "open interval": (lambda: improper(constraints.open_interval(0.0, 2.0)), jnp.ravel),
    "softplus": (lambda: improper(constraints.softplus_positive), jnp.ravel),
    "positive ordered": (lambda: improper(constraints.positive_ordered_vector, 3), jnp.ravel),
    "l1 ball": (lambda: improper(constraints.l1_ball, 2), jnp.ravel),
    "lower Cholesky": (lambda: improper(constraints.lower_cholesky, 2, 2), lower),
    "scaled Cholesky": (lambda: improper(constraints.scaled_unit_lower_cholesky, 2, 2), lower),
    "softplus Cholesky": (lambda: improper(constraints.softplus_lower_cholesky, 2, 2), lower),
    "real matrix": (lambda: improper(constraints.real_matrix, 2, 2), jnp.ravel),
}


@pytest.mark.parametrize("name", SUPPORTS)
@pytest.mark.usefixtures("x64")
def test_bijections_and_their_jacobians(name: str) -> None:
    """There and back; inside the support; log density less that of the choice is log |det J|.

    The volume is that of J'J: the zero-sum vectors are a plane in a larger space.
    """
    make, coordinates = SUPPORTS[name]
    d = make()
    target = gen(lambda: sample("x", d))().given()
    position = target.unconstrain().flat

    @jax.jit
    def run(z: jax.Array) -> Any:
        choices = position.to_choices(z)
        jacobian = jax.jacobian(lambda z: coordinates(position.to_choices(z)["x"]))(z)
        volume = 0.5 * jnp.linalg.slogdet(jacobian.T @ jacobian)[1]
        scores = position.log_density(z), target.log_density(choices), volume
        return choices, position.from_choices(choices), scores

    z = position.init(KEY)
    assert z.shape == (position.size,)
    for shift in (0.0, 0.5):
        at = z + shift * jnp.sin(jnp.arange(position.size) + 1.0)
        choices, back, (on_reals, own, volume) = run(at)
        assert choices["x"].shape == d.batch_shape + d.event_shape
        assert bool(jnp.all(d.support(choices["x"])))
        np.testing.assert_allclose(back, at, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(on_reals - own, volume, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_bijections_in_lanes_and_scans() -> None:
    """Supports whose unconstrained shape differs, under every kind of axis."""

    @gen
    def model(a):
        jax.vmap(lambda a: sample("p", dist.Dirichlet(a * jnp.ones(3))))(a)
        lax.scan(lambda c, a: (c, sample("l", dist.LKJCholesky(2, a))), 0.0, a)

        def step(c, _):
            return c, sample("g", dist.Gamma(jnp.exp(c), 1.0))

        return jax.vmap(lambda a: lax.scan(step, a, None, length=3))(a)

    target = model(jnp.array([1.0, 2.0])).given()
    position = target.unconstrain()
    z = position.init(KEY)
    assert jax.tree.map(jnp.shape, z) == {"p": (2, 2), "l": (2, 1), "g": (2, 3)}
    choices = position.to_choices(z)
    assert jax.tree.map(jnp.shape, choices) == {"p": (2, 3), "l": (2, 2, 2), "g": (2, 3)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), position.from_choices(choices), z
    )
    flat = position.flat

    def free(z: jax.Array) -> jax.Array:
        c = flat.to_choices(z)
        return jnp.concatenate([c["p"][:, :2].ravel(), c["l"][:, 1, 0], c["g"].ravel()])

    x = flat.from_choices(choices)
    volume = jnp.linalg.slogdet(jax.jacobian(free)(x))[1]
    np.testing.assert_allclose(flat.log_density(x) - target.log_density(choices), volume, rtol=1e-8)


def test_flat_vectors_are_the_nested_dicts() -> None:
    target = CASES["decentred"].model(X).given({"y": [0.0, 1.0, 3.0]})
    position = target.unconstrain()
    z = position.init(KEY)
    x = position.flat.ravel(z)
    assert position.flat.size == 4
    assert sorted(position.flat.addresses) == ["tau", "theta_base"]
    np.testing.assert_allclose(position.flat.log_density(x), position.log_density(z), rtol=1e-6)
    np.testing.assert_array_equal(x[position.flat.addresses["tau"]], [z["tau"]])
    np.testing.assert_array_equal(position.flat.unravel(x)["theta_base"], z["theta_base"])
    np.testing.assert_array_equal(position.flat.init(KEY), x)
    assert "theta" in position.trace(z).derived


@pytest.mark.parametrize(
    ("d", "words"),
    [
        (lambda: dist.Bernoulli(0.5), "discrete"),
        (lambda: dist.Poisson(2.0), "discrete"),
        (lambda: dist.ProjectedNormal(jnp.ones(2)), "no bijection"),
    ],
    ids=["bernoulli", "poisson", "sphere"],
)
def test_what_has_no_bijection_is_refused_by_name(d: Any, words: str) -> None:
    model = gen(lambda: scope(lambda: sample("x", d()), "part")())
    with pytest.raises(DensityError, match=rf"part\.x.*{words}"):
        model().given().unconstrain()


# --- sites observed in part -------------------------------------------------------------------

Y = np.array([0.5, np.nan, 1.0, np.nan])
SEEN = ~np.isnan(Y)
FULL = np.array([0.5, 0.25, 1.0, -0.5])


def _state_space(y: Any) -> Target:
    return CASES["state_space"].model(X).given({"y": y})


def _seen_evidence(seen: np.ndarray, y: np.ndarray) -> float:
    """Evidence of some of the observations of the linear state-space model of the table."""
    lags = np.subtract.outer(np.arange(4), np.arange(4))
    weights = np.where(lags >= 0, 0.8 ** np.maximum(lags, 0), 0.0)
    mean = weights @ np.array([0.5, -1.0, 0.25, 1.0]) + 0.8 ** np.arange(1, 5) * X
    covariance = 0.49 * weights @ weights.T + 0.25 * np.eye(4)
    law = stats.multivariate_normal(mean[seen], covariance[np.ix_(seen, seen)])
    return float(law.logpdf(y[seen]))


OBSERVATIONS: dict[str, Callable[[], tuple[Any, np.ndarray]]] = {
    "impute": lambda: (observed(Y, where=SEEN), SEEN),
    "drop": lambda: (observed(Y, where=SEEN, missing="drop"), SEEN),
    "forecast": lambda: (FULL[:2], np.array([True, True, False, False])),
    "forecast and impute": lambda: (
        observed(Y[:3], where=SEEN[:3]),
        np.array([True, False, True, False]),
    ),
    "forecast all": lambda: (FULL[:0], np.zeros(4, bool)),
    "nothing missing": lambda: (observed(FULL, where=np.ones(4, bool)), np.ones(4, bool)),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_what_is_missing_does_not_weigh(name: str) -> None:
    """Null: weights average to the evidence of what is seen; |z| < 5.5 on 4096 of them."""
    y, seen = OBSERVATIONS[name]()
    target = _state_space(y)
    keys = jax.random.split(KEY, 4096)
    log_weights = jax.jit(jax.vmap(lambda key: target.generate(key)[1]))(keys)
    exact = _seen_evidence(seen, np.where(np.isnan(Y), FULL, Y)) if seen.any() else 0.0
    ratio = np.exp(np.asarray(log_weights, float) - exact)
    assert abs(ratio.mean() - 1) < 5.5 * ratio.std() / np.sqrt(ratio.size) + 1e-5


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_the_missing_are_coordinates_or_gone(name: str) -> None:
    y, seen = OBSERVATIONS[name]()
    target = _state_space(y)
    latent = not seen.all() and name != "drop"
    assert target.latents == (("z", "y") if latent else ("z",))
    position = target.unconstrain()
    assert position.flat.size == 4 + (~seen).sum() * latent
    z = position.init(KEY)
    choices = position.to_choices(z)
    values = np.where(seen, np.where(np.isnan(Y), FULL, Y), 0.0)
    if latent:
        np.testing.assert_allclose(np.asarray(choices["y"])[seen], values[seen], rtol=1e-6)
        values = np.asarray(choices["y"], float)
    terms = CASES["state_space"].oracle({"z": np.asarray(choices["z"], float), "y": values}, X)
    counts = [t.log_density for t in terms[::2]]
    counts += [t.log_density for t, s in zip(terms[1::2], seen, strict=True) if s or latent]
    np.testing.assert_allclose(position.log_density(z), sum(counts), rtol=1e-5)
    np.testing.assert_allclose(target.log_density(choices), sum(counts), rtol=1e-5)
    back = position.from_choices(choices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), back, z)
    slope = jax.grad(position.log_density)(z)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(slope))


@gen
def skewed(shape):
    """Positive, with event axes beside it."""

    def row(a):
        g = sample("g", dist.Gamma(a, 1.0))
        return sample("p", dist.Dirichlet(g * jnp.ones(3)))

    return jax.vmap(row)(shape)


def test_jacobians_of_the_missing_alone() -> None:
    where = np.array([True, False, False])
    g = np.array([1.0, np.nan, np.nan], np.float32)
    simplex = np.full((3, 3), np.nan, np.float32)
    simplex[1] = [0.2, 0.3, 0.5]
    data = {"g": observed(g, where=where), "p": observed(simplex, where=np.array([0, 1, 0], bool))}
    target = skewed(jnp.array([1.0, 2.0, 3.0])).given(data)
    position = target.unconstrain()
    assert jax.tree.map(jnp.shape, position.init(KEY)) == {"g": (2,), "p": (2, 2)}
    flat = position.flat

    def free(z: jax.Array) -> jax.Array:
        c = flat.to_choices(z)
        return jnp.concatenate([c["g"][1:], c["p"][np.array([0, 2]), :2].ravel()])

    z = flat.init(KEY)
    volume = jnp.linalg.slogdet(jax.jacobian(free)(z))[1]
    own = target.log_density(flat.to_choices(z))
    np.testing.assert_allclose(flat.log_density(z) - own, volume, rtol=1e-4)


MASKS = [np.array(m) for m in ([1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0])]


@pytest.mark.parametrize("missing", ["impute", "drop"])
def test_traced_masks(missing: str) -> None:
    """One compilation for every mask; NaN where nothing was seen; coordinates of the seen are N(0, 1)."""
    program = skewed(jnp.array([1.0, 2.0, 3.0, 1.5]))
    g = np.array([1.0, 0.5, 2.0, 0.7], np.float32)
    p = np.full((4, 3), 1 / 3, np.float32)
    latents = {"p": jnp.asarray(p)}

    if missing == "drop":  # the simplex reads g, so that g cannot be dropped: drop of p
        latents = {"g": jnp.asarray(g)}

        def score(where: Any, latents: Any) -> jax.Array:
            data = {
                "p": observed(jnp.where(where[:, None], p, jnp.nan), where=where, missing="drop")
            }
            return program.given(data).log_density(latents)

    else:

        def score(where: Any, latents: Any) -> jax.Array:
            data = {"g": observed(jnp.where(where, g, jnp.nan), where=where)}
            target = program.given(data)
            z = {"p": jnp.zeros((4, 2)), "g": jnp.log(latents["g"])}
            return target.unconstrain().log_density(z)

        latents["g"] = jnp.asarray(g)

    run = jax.jit(jax.value_and_grad(score, argnums=1))
    log_g = stats.gamma.logpdf(g, [1.0, 2.0, 3.0, 1.5])
    log_p = np.array([stats.dirichlet.logpdf([1 / 3] * 3, [a] * 3) for a in g])
    for where in MASKS:
        seen = where.astype(bool)
        value, slope = run(jnp.asarray(seen), latents)
        if missing == "drop":
            exact = log_g.sum() + log_p[seen].sum()
        else:
            filler = stats.norm.logpdf(np.log(g[seen])).sum()
            simplex = program.given({"g": g}).unconstrain().log_density({"p": jnp.zeros((4, 2))})
            exact = float(simplex) + np.log(g[~seen]).sum() + filler
        np.testing.assert_allclose(value, exact, rtol=1e-5)
        assert all(bool(jnp.isfinite(s).all()) for s in jax.tree.leaves(slope))


def test_masks_of_several_data_sets_under_vmap() -> None:
    def score(y: jax.Array) -> jax.Array:
        data = observed(y, where=~jnp.isnan(y), missing="drop")
        return _state_space(data).log_density({"z": jnp.zeros(4)})

    rows = np.stack([Y, FULL, np.full(4, np.nan)]).astype(np.float32)
    each = jax.vmap(score)(jnp.asarray(rows))
    z = CASES["state_space"].oracle({"z": np.zeros(4), "y": np.zeros(4)}, X)
    prior = sum(t.log_density for t in z[::2])
    exact = [prior + stats.norm.logpdf(r[~np.isnan(r)], 0.0, 0.5).sum() for r in rows]
    np.testing.assert_allclose(each, exact, rtol=1e-5)


# --- the law of branches that are not taken ---------------------------------------------------


def panels(*ends: float, order: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Gauss and Legendre's nodes and weights over adjoining panels."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    at = [(b - a) / 2 * nodes + (a + b) / 2 for a, b in itertools.pairwise(ends)]
    of = [(b - a) / 2 * weights for a, b in itertools.pairwise(ends)]
    return np.concatenate(at), np.concatenate(of)


def integral(target: Target, rules: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> float:
    """log of the integral of the density on R^n; a rule for every coordinate, by address."""
    position = target.unconstrain().flat
    axes: list[Any] = [None] * position.size
    for address, where in position.addresses.items():
        axes[where] = rules[address]
    points = np.stack([g.ravel() for g in np.meshgrid(*(a for a, _ in axes), indexing="ij")], -1)
    weights = np.ones(1)
    for _, w in axes:
        weights = np.outer(weights, w).ravel()
    scores = jax.jit(lambda xs: jax.lax.map(position.log_density, xs, batch_size=16384))(points)
    top = float(jnp.max(scores))
    return top + float(np.log(np.sum(weights * np.exp(np.asarray(scores) - top))))


WIDE = panels(-9.0, -3.0, 0.0, 3.0, 9.0)
LOG = panels(-16.0, -6.0, -2.0, 0.0, 1.0, 2.0, 3.5)  # the logarithm of a Gamma or a LogNormal


def narrow(*at: float) -> tuple[np.ndarray, np.ndarray]:
    """Panels about zero that end at the given points as well."""
    return panels(*sorted({-8.0, -2.5, 2.5, 8.0, *at}))


def _gamma_branch(y: float) -> float:
    return log_integral(lambda b: stats.gamma.logpdf(b, 2.0) + stats.norm.logpdf(y, -b), 0, 30)


def _continuous_predicate() -> tuple[Target, Any, float]:
    """`threshold` of the table: each branch has a choice of its own, one of them positive."""
    case = CASES["threshold"]
    assert case.evidence is not None
    rules = {"s": [narrow(X)], "a": [WIDE], "b": [LOG]}
    return case.model(X).given(case.data), rules, case.evidence(X)


def _shared_name() -> tuple[Target, Any, float]:
    """Three branches, two of them with one name and different laws: one pseudo-prior, not two."""

    @gen
    def model():
        s = sample("s", Normal(0.0, 1.0))
        index = jnp.where(s < -0.5, 0, jnp.where(s < 0.5, 1, 2))
        mean = lax.switch(
            index,
            [
                lambda: sample("a", Normal(1.0, 0.7)),
                lambda: -sample("b", dist.Gamma(2.0, 1.0)),
                lambda: sample("b", dist.LogNormal(0.5, 0.5)),
            ],
        )
        return sample("y", Normal(mean, 1.0))

    log_normal = stats.lognorm(0.5, scale=np.exp(0.5))
    parts = [
        stats.norm.logpdf(0.3, 1.0, np.sqrt(1.49)),
        _gamma_branch(0.3),
        log_integral(lambda b: log_normal.logpdf(b) + stats.norm.logpdf(0.3, b), 0, 60),
    ]
    below, above = stats.norm.cdf(-0.5), stats.norm.sf(0.5)
    exact = log_mean([below, 1 - below - above, above], parts)
    return model().given({"y": 0.3}), {"s": [narrow(-0.5, 0.5)], "a": [WIDE], "b": [LOG]}, exact


def _undefined() -> tuple[Target, Any, float]:
    """Parameters of the idle branch are not numbers: N(0, 1) stands in."""

    @gen
    def model():
        s = sample("s", Normal(0.0, 1.0))
        mean = lax.cond(
            s > 0,
            lambda: sample("a", Normal(jnp.log(s), jnp.sqrt(s))),
            lambda: sample("b", dist.Gamma(jnp.sqrt(-s) + 1.0, 1.0)),
        )
        return sample("y", Normal(mean, 1.0))

    def right(s: float) -> float:
        return stats.norm.logpdf(s) + stats.norm.logpdf(0.3, np.log(s), np.sqrt(s + 1))

    b, w = LOG
    nodes, weights = panels(-8.0, -4.0, -2.0, -1.0, -0.1, -1e-2, 0.0)
    grid = (
        stats.norm.logpdf(nodes)[:, None]
        + stats.gamma.logpdf(np.exp(b), np.sqrt(-nodes)[:, None] + 1)
        + b
        + stats.norm.logpdf(0.3, np.exp(b))
    )
    left = np.log(weights @ np.exp(grid) @ w)
    exact = float(np.logaddexp(log_integral(right, 0, 9), left))
    s = panels(-8.0, -4.0, -2.0, -1.0, -0.1, -1e-2, 0.0, 1e-2, 0.1, 1.0, 2.0, 4.0, 8.0)
    # a is as narrow as sqrt(s), about log(s)
    a = panels(*np.linspace(-10.0, 8.0, 19))
    return model().given({"y": 0.3}), {"s": [s], "a": [a], "b": [LOG]}, exact


def _lanes() -> tuple[Target, Any, float]:
    """Predicates a lane, from one shared choice; a branch without choices; parameters undefined."""
    starts = np.array([-1.0, 0.5])

    @gen
    def model():
        s = sample("s", Normal(0.0, 1.0))

        def one(start):
            z = start + s
            return lax.cond(z > 0, lambda: sample("a", Normal(jnp.log(z + 1), 1.0)), lambda: -z)

        means = jax.vmap(one)(jnp.array(starts))
        return jax.vmap(lambda m: sample("y", Normal(m, 1.0)))(means)

    def given(s: float) -> float:
        z = starts + s
        logs = np.where(
            z > 0,
            stats.norm.logpdf(0.3, np.log(np.maximum(z, 0) + 1), np.sqrt(2)),
            stats.norm.logpdf(0.3, -z),
        )
        return stats.norm.logpdf(s) + logs.sum()

    nodes, weights = narrow(-0.5, 1.0)
    exact = float(np.log(weights @ np.exp([given(s) for s in nodes])))
    rules = {"s": [narrow(-0.5, 1.0)], "a": [WIDE, WIDE]}
    return model().given({"y": np.full(2, 0.3)}), rules, exact


def _in_scan() -> tuple[Target, Any, float]:
    """A cond in a scan, the predicate of a step a choice of the step before."""

    @gen
    def model():
        def step(z, _):
            z = lax.cond(
                z > 0,
                lambda z: sample("a", Normal(0.5 * z, 1.0)),
                lambda z: sample("b", Normal(-z, 0.7)),
                z,
            )
            return z, None

        z, _ = lax.scan(step, jnp.ones(()), None, length=2)
        return sample("y", Normal(z, 1.0))

    nodes, weights = narrow(0.0)
    after = np.where(
        nodes > 0,
        stats.norm.logpdf(0.3, 0.5 * nodes, np.sqrt(2)),
        stats.norm.logpdf(0.3, -nodes, np.sqrt(1.49)),
    )
    exact = float(np.log(weights @ np.exp(stats.norm.logpdf(nodes, 0.5) + after)))
    small = panels(-7.0, 0.0, 7.0, order=14)
    first = panels(-5.0, 0.0, 6.0, order=14)
    rules = {"a": [first, small], "b": [panels(-5.0, -1.0, 3.0), small]}
    return model().given({"y": 0.3}), rules, exact


def _loop() -> tuple[Target, Any, float]:
    """Steps of a loop that are not taken."""

    @gen
    def model():
        def body(z):
            return z + sample("step", Normal(0.8, 0.5))

        return sample("y", Normal(loop(lambda z: z < 1.0, body, 2, jnp.zeros(())), 0.5))

    nodes, weights = panels(-3.0, 0.0, 1.0, 2.0, 5.0)
    after = np.where(
        nodes < 1,
        stats.norm.logpdf(1.2, nodes + 0.8, np.sqrt(0.5)),
        stats.norm.logpdf(1.2, nodes, 0.5),
    )
    exact = float(np.log(weights @ np.exp(stats.norm.logpdf(nodes, 0.8, 0.5) + after)))
    rule = panels(-3.5, 0.0, 1.0, 2.0, 5.0)
    return model().given({"y": 1.2}), {"step": [rule, rule]}, exact


def _masked() -> tuple[Target, Any, float]:
    """Masked out: its own prior where that is a number, N(0, 1) where it is not; one traced mask."""

    @gen
    def model(scales):
        def row(s):
            return sample("y", Normal(sample("t", dist.HalfNormal(s)), 1.0))

        return jax.vmap(row)(scales)

    keep = jnp.array([True, False, False])
    masked = mask(model, {"t": keep, "y": keep})
    target = masked(jnp.array([1.0, 2.0, -1.0])).given({"y": np.array([0.3, 5.0, 7.0])})
    exact = log_integral(lambda t: stats.halfnorm.logpdf(t) + stats.norm.logpdf(0.3, t), 0, 12)
    return target, {"t": [LOG, LOG, WIDE]}, exact


def _observed_in_part() -> tuple[Target, Any, float]:
    """A site in a branch of which an element is observed: idle, neither counts."""

    @gen
    def model():
        s = sample("s", Normal(0.0, 1.0))
        mean = lax.cond(
            s > 0.4,
            lambda: sample("a", Normal(1.0, 1.0)),
            lambda: sample("b", Normal(jnp.array([0.0, 1.0]), 1.0)).sum(),
        )
        return sample("y", Normal(mean, 1.0))

    data = {"y": 0.3, "b": observed(np.array([2.0, np.nan]), where=np.array([True, False]))}
    exact = log_mean(
        [stats.norm.sf(0.4), stats.norm.cdf(0.4)],
        [
            stats.norm.logpdf(0.3, 1.0, np.sqrt(2)),
            stats.norm.logpdf(2.0) + stats.norm.logpdf(0.3, 3.0, np.sqrt(2)),
        ],
    )
    return model().given(data), {"s": [narrow(0.4)], "a": [WIDE], "b": [WIDE]}, exact


def _nested() -> tuple[Target, Any, float]:
    """Nested programs of one name in the branches, non-centred, conditioned inside."""

    @gen
    def left(m):
        t = sample("t", Normal(m, 1.0))
        return sample("y", Normal(t, 0.5))

    @gen
    def right(m):
        return sample("y", Normal(sample("u", Normal(m, 2.0)), 1.0))

    @gen
    def model():
        s = sample("s", Normal(0.0, 1.0))
        return lax.cond(
            s > 0,
            lambda: sample("p", condition(left, {"y": 0.4})(s)),
            lambda: sample("p", noncentered(condition(right, {"y": 0.4}), "u")(s)),
        )

    nodes, weights = narrow(0.0)
    scale = np.where(nodes > 0, np.sqrt(1.25), np.sqrt(5.0))
    logs = stats.norm.logpdf(nodes) + stats.norm.logpdf(0.4, nodes, scale)
    exact = float(np.log(weights @ np.exp(logs)))
    return model().given(), {"s": [narrow(0.0)], "p.t": [WIDE], "p.u_base": [WIDE]}, exact


BRANCHES = [
    _continuous_predicate,
    _shared_name,
    _undefined,
    _lanes,
    _in_scan,
    _loop,
    _masked,
    _observed_in_part,
    _nested,
]


@pytest.mark.parametrize("make", BRANCHES, ids=lambda f: f.__name__[1:])
@pytest.mark.usefixtures("x64")
def test_the_density_on_the_reals_integrates_to_the_evidence(make: Any) -> None:
    target, rules, exact = make()
    assert integral(target, rules) == pytest.approx(exact, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("make", BRANCHES, ids=lambda f: f.__name__[1:])
@pytest.mark.usefixtures("x64")
def test_gradients_and_hessians_are_finite_and_right_in_every_branch(make: Any) -> None:
    """Whatever the idle branches' parameters are. Against differences of the density itself."""
    target, _, _ = make()
    position = target.unconstrain().flat

    @jax.jit
    def run(x: jax.Array) -> Any:
        f = position.log_density
        return f(x), jax.grad(f)(x), jax.hessian(f)(x)

    h = 1e-5
    for key in jax.random.split(KEY, 6):
        x = position.init(key)
        _, slope, curvature = run(x)
        assert bool(jnp.isfinite(slope).all())
        assert bool(jnp.isfinite(curvature).all())
        along = jnp.cos(jnp.arange(position.size) + 1.0)
        (up, *_), (down, *_) = run(x + h * along), run(x - h * along)
        np.testing.assert_allclose(slope @ along, (up - down) / (2 * h), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", BRANCHES, ids=lambda f: f.__name__[1:])
def test_idle_choices_come_back_where_they_were(make: Any) -> None:
    """`to_choices` gives every branch's choices, `from_choices` takes them; `active` tells which count."""
    target, _, _ = make()
    position = target.unconstrain()
    idle = False
    for key in jax.random.split(KEY, 8):
        z = position.init(key)
        trace = position.trace(z)
        back = position.from_choices(trace.choices)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), back, z)
        assert jax.tree.structure(trace.choices) == jax.tree.structure(trace.active)
        np.testing.assert_allclose(trace.log_density, position.log_density(z), rtol=1e-5)
        active = flatten(trace.active)
        assert all(v.dtype == bool for v in active.values())
        assert bool(active.get("s", True))
        idle |= not all(bool(jnp.all(v)) for v in active.values())
    assert idle


def test_forward_derivatives_of_branches() -> None:
    """The cut of cotangents that are not finite leaves forward mode whole."""
    target, _, _ = _continuous_predicate()
    position = target.unconstrain().flat
    x = position.init(KEY)
    np.testing.assert_allclose(
        jax.jacfwd(position.log_density)(x), jax.grad(position.log_density)(x), rtol=1e-4, atol=1e-6
    )


def test_nuts_recovers_the_probability_of_a_branch() -> None:
    """Null: the indicator of the branch has its posterior mean; |z| < 5.5, errors from 40 batch means.

    Without the prior terms of idle choices the share of a branch is wrong (.617 for .5).
    """
    case = CASES["threshold"]
    assert case.evidence is not None
    share = (
        stats.norm.sf(X, 0.3) * stats.norm.pdf(0.5, 2.0, np.sqrt(2.0)) / np.exp(case.evidence(X))
    )
    sampler = nuts(num_warmup=300, num_samples=1500, num_chains=2)
    with pytest.warns(UserWarning, match="s"):
        draws = sampler.run(KEY, case.model(X).given(case.data), progress=False)
    taken = np.asarray(draws.choices["s"]) > X
    np.testing.assert_array_equal(draws.active["a"], taken)
    np.testing.assert_array_equal(draws.active["b"], ~taken)
    batches = taken.reshape(40, -1).mean(1)
    error = batches.std(ddof=1) / np.sqrt(40)
    assert error < 0.05
    assert abs(taken.mean() - share) < 5.5 * error
