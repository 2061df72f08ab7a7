"""Every distribution of NumPyro as a site: one table of constructors, every law on each row.

A row is a constructor and two settings of its parameters, so that a lane can be told from its neighbour. All that
is asked of a row is computed in one jitted function, lightly optimised, since compiling is what these tests cost.
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import biject_to, constraints
from weft.ppl import DensityError, ModelError, ObservationError, Program

from weft import gen, repeat, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane

# --- the table ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A constructor (None: the class of that name) and two settings of its parameters."""

    make: Callable[..., Any] | None
    first: tuple[Any, ...]
    second: tuple[Any, ...]


def _ornstein_uhlenbeck(x: Any, t: Any) -> tuple[Any, Any]:
    return -x, jnp.ones_like(x)


EYE = np.eye(2, dtype=np.float32)
COV = np.array([[2.0, 0.3], [0.3, 1.0]], np.float32)
TRIL = np.array([[1.0, 0.0], [0.5, 2.0]], np.float32)
CORR = np.array([[1.0, 0.4], [0.4, 1.0]], np.float32)
NEIGHBOURS = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)


def v(*xs: float) -> np.ndarray:
    return np.array(xs, np.float32)


TABLE: dict[str, Row] = {
    "AsymmetricLaplace": Row(None, (0.0, 1.0, 1.0), (1.0, 2.0, 0.5)),
    "AsymmetricLaplaceQuantile": Row(None, (0.0, 1.0, 0.5), (1.0, 2.0, 0.2)),
    "BernoulliLogits": Row(None, (0.1,), (-1.0,)),
    "BernoulliProbs": Row(None, (0.3,), (0.9,)),
    "Beta": Row(None, (1.0, 2.0), (3.0, 0.7)),
    "BetaBinomial": Row(lambda a, b: dist.BetaBinomial(a, b, 5), (1.0, 2.0), (3.0, 0.7)),
    "BetaNegativeBinomial": Row(None, (3.0, 2.0, 4.0), (4.0, 1.0, 2.0)),
    "BetaProportion": Row(None, (0.3, 2.0), (0.6, 5.0)),
    "BinomialLogits": Row(lambda x: dist.BinomialLogits(x, 5), (0.1,), (-1.0,)),
    "BinomialProbs": Row(lambda p: dist.BinomialProbs(p, 5), (0.3,), (0.9,)),
    "CAR": Row(
        lambda m, r, p: dist.CAR(m, r, p, NEIGHBOURS), (v(0, 1), 0.5, 1.0), (v(1, 0), 0.2, 2.0)
    ),
    "CategoricalLogits": Row(None, (v(0.1, 0.2, 0.3),), (v(1, 0, -1),)),
    "CategoricalProbs": Row(None, (v(0.3, 0.7),), (v(0.8, 0.2),)),
    "Cauchy": Row(None, (0.0, 1.0), (1.0, 2.0)),
    "Chi2": Row(None, (3.0,), (5.0,)),
    "CirculantNormal": Row(
        None, (v(0, 0, 0, 0), v(2, 0.5, 0.1, 0.5)), (v(1, 2, 3, 4), v(1, 0.2, 0, 0.2))
    ),
    "Dagum": Row(None, (1.0, 2.0, 1.0), (2.0, 3.0, 0.5)),
    "Delta": Row(None, (1.0, 0.5), (2.0, 0.0)),
    "Dirichlet": Row(None, (v(1, 2, 3),), (v(3, 1, 1),)),
    "DirichletMultinomial": Row(lambda a: dist.DirichletMultinomial(a, 5), (v(1, 2),), (v(3, 1),)),
    "DiscreteUniform": Row(None, (0, 3), (2, 9)),
    "DoublyTruncatedPowerLaw": Row(None, (2.0, 1.0, 3.0), (-0.5, 2.0, 5.0)),
    "EulerMaruyama": Row(
        lambda s: dist.EulerMaruyama(
            np.arange(4.0, dtype=np.float32), _ornstein_uhlenbeck, dist.Normal(0.0, s)
        ),
        (1.0,),
        (2.0,),
    ),
    "ExpandedDistribution": Row(lambda m: dist.Normal(m, 1.0).expand((3,)), (0.5,), (2.0,)),
    "Exponential": Row(None, (1.0,), (2.0,)),
    "FoldedDistribution": Row(
        lambda m: dist.FoldedDistribution(dist.Normal(m, 1.0)), (1.0,), (2.0,)
    ),
    "Gamma": Row(None, (1.0, 2.0), (3.0, 0.5)),
    "GammaPoisson": Row(None, (1.0, 2.0), (3.0, 0.5)),
    "GaussianCopula": Row(
        lambda a, c: dist.GaussianCopula(dist.Normal(a, 1.0), c), (v(1, 1), CORR), (v(2, 3), EYE)
    ),
    "GaussianRandomWalk": Row(lambda s: dist.GaussianRandomWalk(s, 4), (1.0,), (2.0,)),
    "GaussianStateSpace": Row(
        lambda a, c: dist.GaussianStateSpace(3, a, c), (0.5 * EYE, COV), (0.9 * EYE, EYE)
    ),
    "GeometricLogits": Row(None, (0.1,), (-1.0,)),
    "GeometricProbs": Row(None, (0.3,), (0.7,)),
    "Gompertz": Row(None, (1.0, 1.0), (2.0, 0.5)),
    "Gumbel": Row(None, (0.0, 1.0), (1.0, 2.0)),
    "HalfCauchy": Row(None, (1.0,), (2.0,)),
    "HalfNormal": Row(None, (1.0,), (2.0,)),
    "HurdleGamma": Row(None, (0.3, 1.0, 2.0), (0.1, 3.0, 0.5)),
    "HurdleLogNormal": Row(None, (0.3, 0.0, 1.0), (0.1, 1.0, 2.0)),
    "HurdleLogits": Row(
        lambda r, g: dist.HurdleLogits(dist.Poisson(r), g), (2.0, -0.5), (1.0, 0.5)
    ),
    "HurdlePoisson": Row(None, (0.3, 2.0), (0.1, 1.0)),
    "HurdleProbs": Row(lambda r, g: dist.HurdleProbs(dist.Poisson(r), g), (2.0, 0.3), (1.0, 0.6)),
    "Independent": Row(lambda m: dist.Normal(m, v(1, 2)).to_event(1), (v(0, 1),), (v(2, 3),)),
    "InverseGamma": Row(None, (1.0, 2.0), (3.0, 0.5)),
    "InverseWishart": Row(None, (5.0, COV), (4.0, EYE)),
    "InverseWishartCholesky": Row(None, (5.0, COV), (4.0, EYE)),
    "Kumaraswamy": Row(None, (1.0, 2.0), (3.0, 0.7)),
    "LKJ": Row(lambda c: dist.LKJ(3, c), (1.0,), (3.0,)),
    "LKJCholesky": Row(lambda c: dist.LKJCholesky(3, c), (1.0,), (3.0,)),
    "Laplace": Row(None, (0.0, 1.0), (1.0, 2.0)),
    "LeftCensoredDistribution": Row(
        lambda m, s: dist.LeftCensoredDistribution(dist.Normal(m, s), np.array(False)),
        (0.0, 1.0),
        (1.0, 2.0),
    ),
    "LeftTruncatedDistribution": Row(
        lambda m, a: dist.LeftTruncatedDistribution(dist.Normal(m, 1.0), a), (0.0, -1.0), (1.0, 0.5)
    ),
    "LeftTruncatedGamma": Row(
        lambda c, a: dist.LeftTruncatedGamma(dist.Gamma(c, 1.0), a), (2.0, 0.5), (3.0, 1.0)
    ),
    "Levy": Row(None, (0.0, 1.0), (1.0, 2.0)),
    "LogNormal": Row(None, (0.0, 1.0), (1.0, 0.5)),
    "LogUniform": Row(None, (1.0, 2.0), (2.0, 5.0)),
    "Logistic": Row(None, (0.0, 1.0), (1.0, 2.0)),
    "LowRankMultivariateNormal": Row(
        None, (v(0, 0), v(1, 2)[:, None], v(1, 1)), (v(1, 2), v(0, 1)[:, None], v(2, 1))
    ),
    "LowerTruncatedPowerLaw": Row(None, (-2.0, 1.0), (-3.0, 2.0)),
    "MaskedDistribution": Row(
        lambda m: dist.Normal(m, 1.0).mask(np.array([True, False])), (v(0, 1),), (v(2, 3),)
    ),
    "MatrixNormal": Row(None, (np.zeros((2, 2), np.float32), EYE, TRIL), (COV, TRIL, EYE)),
    "MixtureGeneral": Row(
        lambda p, m: dist.MixtureGeneral(
            dist.Categorical(p),
            [dist.Normal(m, 1.0), dist.Laplace(0.0, 2.0)],
            support=constraints.real,
        ),
        (v(0.3, 0.7), 1.0),
        (v(0.9, 0.1), 2.0),
    ),
    "MixtureSameFamily": Row(
        lambda p, m: dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(m, 1.0)),
        (v(0.3, 0.7), v(-1, 1)),
        (v(0.9, 0.1), v(-2, 3)),
    ),
    "MultinomialLogits": Row(lambda x: dist.MultinomialLogits(x, 5), (v(0.1, 0.2),), (v(1, -1),)),
    "MultinomialProbs": Row(lambda p: dist.MultinomialProbs(p, 5), (v(0.3, 0.7),), (v(0.9, 0.1),)),
    "MultivariateNormal": Row(None, (v(0, 0), COV), (v(1, 2), EYE)),
    "MultivariateStudentT": Row(None, (3.0, v(0, 0), TRIL), (5.0, v(1, 2), EYE)),
    "NegativeBinomial2": Row(None, (1.0, 2.0), (3.0, 0.5)),
    "NegativeBinomialLogits": Row(None, (3.0, 0.1), (2.0, -0.5)),
    "NegativeBinomialProbs": Row(None, (3.0, 0.3), (2.0, 0.6)),
    "Normal": Row(None, (0.0, 1.0), (1.0, 2.0)),
    "OrderedLogistic": Row(None, (0.1, v(0, 1)), (1.0, v(-1, 2))),
    "Pareto": Row(None, (1.0, 2.0), (2.0, 3.0)),
    "Poisson": Row(None, (2.0,), (5.0,)),
    "ProjectedNormal": Row(None, (v(1, 2),), (v(-1, 0.5),)),
    "RelaxedBernoulliLogits": Row(None, (0.5, 0.1), (1.0, -1.0)),
    "RightCensoredDistribution": Row(
        lambda m, s: dist.RightCensoredDistribution(dist.Normal(m, s), np.array(False)),
        (0.0, 1.0),
        (1.0, 2.0),
    ),
    "RightTruncatedDistribution": Row(
        lambda m, b: dist.RightTruncatedDistribution(dist.Normal(m, 1.0), b), (0.0, 1.0), (1.0, 0.5)
    ),
    "RightTruncatedGamma": Row(
        lambda c, b: dist.RightTruncatedGamma(dist.Gamma(c, 1.0), b), (2.0, 3.0), (3.0, 2.0)
    ),
    "SineBivariateVonMises": Row(
        lambda a, b, k: dist.SineBivariateVonMises(a, b, k, k, 0.3),
        (0.0, 0.5, 1.0),
        (1.0, -1.0, 2.0),
    ),
    "SineSkewed": Row(
        lambda m, s: dist.SineSkewed(dist.VonMises(m, 1.0).expand((1,)).to_event(1), s),
        (0.0, v(0.5)),
        (1.0, v(-0.2)),
    ),
    "SoftLaplace": Row(None, (0.0, 1.0), (1.0, 2.0)),
    "StudentT": Row(None, (3.0, 0.0, 1.0), (5.0, 1.0, 2.0)),
    "TransformedDistribution": Row(
        lambda a, b: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0),
            [dist.transforms.AffineTransform(a, b), dist.transforms.ExpTransform()],
        ),
        (0.0, 1.0),
        (1.0, 0.5),
    ),
    "TruncatedPolyaGamma": Row(lambda _: dist.TruncatedPolyaGamma(), (0.0,), (1.0,)),
    "TwoSidedTruncatedDistribution": Row(
        lambda m, a, b: dist.TwoSidedTruncatedDistribution(dist.Normal(m, 1.0), a, b),
        (0.0, -1.0, 2.0),
        (1.0, 0.0, 4.0),
    ),
    "TwoSidedTruncatedGamma": Row(
        lambda c, a, b: dist.TwoSidedTruncatedGamma(dist.Gamma(c, 1.0), a, b),
        (2.0, 0.5, 3.0),
        (3.0, 1.0, 4.0),
    ),
    "Uniform": Row(None, (0.0, 1.0), (1.0, 3.0)),
    "Unit": Row(None, (0.3,), (0.1,)),
    "VonMises": Row(None, (0.0, 1.0), (1.0, 2.0)),
    "Weibull": Row(None, (1.0, 2.0), (2.0, 3.0)),
    "Wishart": Row(None, (5.0, COV), (4.0, EYE)),
    "WishartCholesky": Row(None, (5.0, COV), (4.0, EYE)),
    "ZeroInflatedLogits": Row(
        lambda r, g: dist.ZeroInflatedLogits(dist.Poisson(r), g), (2.0, -0.5), (1.0, 0.5)
    ),
    "ZeroInflatedPoisson": Row(None, (0.3, 2.0), (0.1, 1.0)),
    "ZeroInflatedProbs": Row(
        lambda r, g: dist.ZeroInflatedProbs(dist.Poisson(r), g), (2.0, 0.3), (1.0, 0.6)
    ),
    "ZeroSumNormal": Row(lambda s: dist.ZeroSumNormal(s, (3,)), (1.0,), (2.0,)),
}

N = dist.Normal
VARIANTS: dict[str, Row] = {
    "mvn by precision": Row(
        lambda m, p: dist.MultivariateNormal(m, precision_matrix=p), (v(0, 0), COV), (v(1, 2), EYE)
    ),
    "mvn by factor": Row(
        lambda m, t: dist.MultivariateNormal(m, scale_tril=t), (v(0, 0), TRIL), (v(1, 2), EYE)
    ),
    "mvn, lazy fields read": Row(
        lambda m, t: _read(
            dist.MultivariateNormal(m, scale_tril=t), "covariance_matrix", "precision_matrix"
        ),
        (v(0, 0), TRIL),
        (v(1, 2), EYE),
    ),
    "categorical, lazy field read": Row(
        lambda x: _read(dist.Categorical(logits=x), "probs"), (v(0.1, 0.2, 0.3),), (v(1, 0, -1),)
    ),
    "expanded, event": Row(lambda m: N(m, 1.0).expand((3, 2)).to_event(1), (v(0, 1),), (v(2, 3),)),
    "masked whole": Row(lambda m: N(m, 1.0).mask(False), (0.0,), (1.0,)),
    "masked by a parameter": Row(lambda m, w: N(m, 1.0).mask(w > 0), (0.0, 1.0), (1.0, -1.0)),
    "truncated normal": Row(
        lambda m, a, b: dist.TruncatedNormal(m, 1.0, low=a, high=b),
        (0.0, -1.0, 2.0),
        (1.0, 0.0, 3.0),
    ),
    "truncated cauchy": Row(lambda m: dist.TruncatedCauchy(m, 1.0, low=-1.0), (0.0,), (1.0,)),
    "affine of a vector": Row(
        lambda m, t: dist.TransformedDistribution(
            N(jnp.zeros(2), 1.0).to_event(1), dist.transforms.LowerCholeskyAffine(m, t)
        ),
        (v(0, 0), TRIL),
        (v(1, 2), EYE),
    ),
    "delta of a vector": Row(lambda x: dist.Delta(x, event_dim=1), (v(0, 1),), (v(2, 3),)),
    "delta, a Python float": Row(lambda _: dist.Delta(1.5), (0.0,), (1.0,)),
    "delta, a Python int": Row(lambda _: dist.Delta(2), (0.0,), (1.0,)),
    "mixture, support by components": Row(
        lambda p, m: dist.MixtureGeneral(dist.Categorical(p), [N(m, 1.0), dist.Laplace(m, 1.0)]),
        (v(0.3, 0.7), 0.0),
        (v(0.6, 0.4), 1.0),
    ),
    "counts as arrays": Row(
        lambda p: dist.Binomial(total_count=jnp.array(5), probs=p), (0.3,), (0.6,)
    ),
    "uniform, static bounds": Row(lambda _: dist.Uniform(0, 2), (0.0,), (1.0,)),
    "validated": Row(lambda m: N(m, 1.0, validate_args=True), (0.0,), (1.0,)),
    "relaxed bernoulli": Row(
        lambda p: dist.RelaxedBernoulli(jnp.array(0.5), probs=p), (0.3,), (0.6,)
    ),
}


def _read(d: Any, *fields: str) -> Any:
    for field in fields:
        getattr(d, field)
    return d


ROWS = {n: r for n, r in TABLE.items() if hasattr(dist, n)} | VARIANTS

SPECIAL = {
    "Distribution": "the abstract base class",
    "ImproperUniform": "no sampler: test_improper",
    "GaussianCopulaBeta": "its sampler needs a package that is absent: test_absent_package",
    "IntervalCensoredDistribution": "its draw is not of the shape it states: test_interval_censored",
}

NO_BIJECTION = {
    "ProjectedNormal": r"'x' \(ProjectedNormal\): its support Sphere\(\) has no bijection",
    "Levy": r"'x' \(Levy\): its support None has no bijection",  # NumPyro's loses it when flattened
}
"""Continuous rows that cannot be latent where a gradient is needed, with the error."""


def test_every_class_is_in_the_table() -> None:
    exported = {
        n for n, c in inspect.getmembers(dist, inspect.isclass) if issubclass(c, dist.Distribution)
    }
    assert exported - set(TABLE) - set(SPECIAL) == set()


# --- the laws -------------------------------------------------------------------------------------


def _make(name: str) -> Callable[..., Any]:
    return ROWS[name].make or getattr(dist, name)


def _two_by_two(name: str) -> Callable[..., Program]:
    """Two lanes with a parameter of their own, and in each two that share it."""
    make = _make(name)

    @gen
    def model(*stacked: Any) -> Any:
        return jax.vmap(lambda *p: repeat(lambda: sample("x", make(*p)), 2))(*stacked)

    return model


@pytest.mark.parametrize("name", ROWS)
def test_laws(name: str) -> None:
    make, row = _make(name), ROWS[name]
    lanes = [row.first, row.second]
    stacked = [np.stack([_array(a), _array(b)]) for a, b in zip(*lanes, strict=True)]
    model = _two_by_two(name)
    info = model(*stacked).sites["x"]
    unconstrainable = not info.is_discrete and name not in NO_BIJECTION

    def everything(key: Any, stacked: Any) -> dict[str, Any]:
        program = model(*stacked)
        trace = program.simulate(key)
        x = trace.choices["x"]
        own = jnp.stack([jax.vmap(make(*p).log_prob)(x[i]) for i, p in enumerate(lanes)])
        out = {"x": x, "own": own, "simulated": trace.log_density}
        out["densities"] = program.log_densities(trace.choices)["x"]
        if unconstrainable:
            flat = program.given().unconstrain()
            z = flat.from_choices(trace.choices)
            back = flat.trace(z)
            out["back"], out["unconstrained"] = back.choices["x"], back.log_density
            out["jacobian"] = sum(
                jnp.sum(
                    jax.vmap(lambda z, b=biject_to(make(*p).support): _jacobian(b, z))(z["x"][i])
                )
                for i, p in enumerate(lanes)
            )
        return out

    quick = {"xla_backend_optimization_level": 0}
    out = jax.jit(everything, compiler_options=quick)(jax.random.key(3), stacked)

    one = jax.eval_shape(make, *row.first)  # a distribution without values: its shapes
    assert name not in TABLE or type(one).__name__ == name
    assert out["x"].shape == (2, 2, *one.shape())
    assert (info.shape, info.event_shape, info.dtype) == (
        out["x"].shape,
        one.event_shape,
        out["x"].dtype,
    )
    assert info.distribution == type(one).__name__
    assert out["densities"].shape == (2, 2, *one.batch_shape)
    assert np.isfinite(out["own"]).all()
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)  # noqa: E731
    close(out["densities"], out["own"])
    close(out["simulated"], out["own"].sum())
    if unconstrainable:
        np.testing.assert_allclose(out["back"], out["x"], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(
            out["unconstrained"], out["own"].sum() + out["jacobian"], rtol=1e-3, atol=1e-3
        )
    if not info.is_discrete and not isinstance(one, dist.Delta) and info.size:
        flat = out["x"].reshape(4, -1)
        assert len(np.unique(flat, axis=0)) == 4, "two lanes share a draw"


def _array(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32 if isinstance(x, float) else None)


def _jacobian(bijection: Any, z: Any) -> Any:
    return jnp.sum(bijection.log_abs_det_jacobian(z, bijection(z)))


def test_lanes_over_a_shared_choice_are_independent() -> None:
    """Unmapped lanes of discrete draws, told apart by many of them rather than by two."""

    @gen
    def model(p: Any) -> None:
        repeat(lambda: sample("b", dist.Bernoulli(p)), 40)
        repeat(lambda: sample("c", dist.Categorical(jnp.full(4, 0.25))), 40)
        repeat(lambda: sample("m", dist.Multinomial(3, jnp.array([0.5, 0.5]))), 40)

    choices = model(0.5).simulate(jax.random.key(0)).choices
    assert 5 < choices["b"].sum() < 35
    assert set(np.unique(choices["c"])) == {0, 1, 2, 3}
    assert len(np.unique(choices["m"], axis=0)) == 4
    assert (choices["m"].sum(-1) == 3).all()


# --- those without a bijection, or without a sampler ----------------------------------------------


@pytest.mark.parametrize("name", NO_BIJECTION)
def test_no_bijection_names_the_site(name: str) -> None:
    program = gen(lambda: sample("x", _make(name)(*TABLE[name].first)))()
    with pytest.raises(DensityError, match=NO_BIJECTION[name]):
        program.given().unconstrain()


@pytest.mark.parametrize(
    "name", ["BernoulliProbs", "Poisson", "GeometricProbs", "MultinomialProbs"]
)
def test_discrete_is_named_by_unconstrain(name: str) -> None:
    program = _two_by_two(name)(*(np.stack([_array(x)] * 2) for x in TABLE[name].first))
    assert program.sites["x"].is_discrete
    with pytest.raises(DensityError, match=rf"'x' \({name}\) is discrete"):
        program.given().unconstrain()


IMPROPER: list[tuple[Any, tuple[int, ...], tuple[int, ...], float]] = [
    (constraints.real, (), (), 0.3),
    (constraints.positive, (3,), (), 0.3),
    (constraints.real, (), (2,), 0.3),
    (constraints.ordered_vector, (), (3,), 0.3),
    (constraints.interval(-1.0, 2.0), (2,), (), 0.3),
    (constraints.simplex, (), (3,), 0.3),
]


@pytest.mark.parametrize(("support", "batch", "event", "z"), IMPROPER)
def test_improper(support: Any, batch: tuple[int, ...], event: tuple[int, ...], z: float) -> None:
    """A flat prior has a density of one on its support, so a target of it is the likelihood."""

    @gen
    def model() -> None:
        x = sample("x", dist.ImproperUniform(support, batch, event))
        sample("y", dist.Normal(x.sum(), 1.0))

    program = model()
    assert program.shapes()["x"] == jax.ShapeDtypeStruct(batch + event, jnp.float32)
    with pytest.raises(DensityError, match=r"'x': ImproperUniform cannot be sampled.*target"):
        program.simulate(jax.random.key(0))
    target = program.given({"y": 2.0})
    flat = target.unconstrain()
    shape = (2,) if support is constraints.simplex else batch + event
    assert flat.shapes["x"] == shape
    z = jnp.full(shape, z)
    bijection = biject_to(support)
    x = bijection(z)
    likelihood = dist.Normal(x.sum(), 1.0).log_prob(2.0)
    np.testing.assert_allclose(target.log_density({"x": x}), likelihood, rtol=1e-5)
    jacobian = bijection.log_abs_det_jacobian(z, x).sum()
    np.testing.assert_allclose(flat.log_density({"x": z}), likelihood + jacobian, rtol=1e-5)
    start = flat.init(jax.random.key(1))
    assert np.isfinite(flat.log_density(start))
    np.testing.assert_allclose(flat.from_choices({"x": x})["x"], z, rtol=1e-4)


def test_improper_in_lanes_and_steps() -> None:
    @gen
    def model() -> None:
        flat = dist.ImproperUniform(constraints.positive, (), ())
        repeat(lambda: sample("lanes", flat), 3)
        jax.lax.scan(lambda c, _: (c, sample("steps", flat)), 0.0, length=2)

    target = model().given()
    assert target.latent_shapes()["lanes"].shape == (3,)
    flat = target.unconstrain()
    z = {"lanes": jnp.array([0.1, 0.2, 0.3]), "steps": jnp.array([1.0, 2.0])}
    np.testing.assert_allclose(flat.log_density(z), 0.6 + 3.0, rtol=1e-6)  # x = exp z
    lanes = flat.init(jax.random.key(0))["lanes"]
    assert len(np.unique(lanes)) == 3


def test_improper_under_given_is_generated_around() -> None:
    @gen
    def model() -> None:
        x = sample("x", dist.ImproperUniform(constraints.real, (), ()))
        sample("y", dist.Normal(x, 1.0))

    trace, weight = model().generate(jax.random.key(0), {"x": 1.0})
    assert weight == 0
    assert abs(trace.choices["y"] - 1.0) < 6


def test_interval_censored() -> None:
    """Its value is a pair, (lower, upper), but its ``sample`` gives one number: it is for data only."""

    @gen
    def model() -> None:
        mu = sample("mu", dist.Normal(0.0, 1.0))
        d = dist.IntervalCensoredDistribution(
            dist.Normal(mu, 1.0), np.array(False), np.array(False)
        )
        repeat(lambda: sample("t", d), 3)

    program = model()
    assert program.sites["t"].shape == (3, 2)
    with pytest.raises(
        DensityError, match=r"'t': IntervalCensoredDistribution cannot be sampled.*\(2,\)"
    ):
        program.simulate(jax.random.key(0))
    data = np.array([[-1.0, 0.0], [0.5, 2.0], [1.0, 1.5]])
    found = program.given({"t": data}).log_density({"mu": 0.5})
    cdf = dist.Normal(0.5, 1.0).cdf
    own = np.log(cdf(data[:, 1]) - cdf(data[:, 0])).sum() + dist.Normal(0.0, 1.0).log_prob(0.5)
    np.testing.assert_allclose(found, own, rtol=1e-4)


def test_absent_package() -> None:
    """Drawing from the beta copula needs the quantile of a beta, which NumPyro takes from another package."""
    d = dist.GaussianCopulaBeta(v(1, 1), v(2, 2), CORR)
    program = gen(lambda: sample("u", d))()
    assert program.sites["u"].shape == (2,)
    if importlib.util.find_spec("tensorflow_probability") is None:
        absent = r"'u': GaussianCopulaBeta cannot be sampled.*tensorflow_probability"
        with pytest.raises(DensityError, match=absent):
            program.simulate(jax.random.key(0))
    else:
        assert program.simulate(jax.random.key(0)).choices["u"].shape == (2,)
    x = jnp.array([0.3, 0.6])
    np.testing.assert_allclose(program.log_density({"u": x}), d.log_prob(x), rtol=1e-5)


# --- a distribution of one's own ------------------------------------------------------------------


class Triangle(eqx.Module):
    """Density 2 x / w^2 on (0, w): the whole of what a site needs."""

    w: Any

    def sample(self, key: Any) -> Any:
        return self.w * jnp.sqrt(jax.random.uniform(key))

    def log_prob(self, x: Any) -> Any:
        return jnp.log(2 * x / self.w**2)


def test_custom() -> None:
    @gen
    def model(w: Any) -> Any:
        x = sample("x", Triangle(w))
        jax.vmap(lambda s: sample("lanes", Triangle(s)))(jnp.array([1.0, 2.0, 3.0]))
        repeat(lambda: sample("shared", Triangle(w)), 2)
        jax.lax.scan(lambda c, _: (c, sample("steps", Triangle(w))), 0.0, length=2)
        return x

    program = model(2.0)
    assert program.sites["lanes"].shape == (3,)
    assert program.sites["x"].distribution == "Triangle"
    trace = jax.jit(lambda key: program.simulate(key))(jax.random.key(0))
    c = trace.choices
    assert c["shared"][0] != c["shared"][1]
    assert c["steps"][0] != c["steps"][1]
    own = sum(
        np.log(2 * np.asarray(c[n]) / w**2).sum()
        for n, w in [
            ("x", 2.0),
            ("lanes", np.array([1.0, 2.0, 3.0])),
            ("shared", 2.0),
            ("steps", 2.0),
        ]
    )
    np.testing.assert_allclose(trace.log_density, own, rtol=1e-5)
    np.testing.assert_allclose(program.log_density(c), own, rtol=1e-5)
    gradient = jax.grad(lambda w: model(w).log_density(c))(2.0)
    np.testing.assert_allclose(gradient, -5 * 2 / 2.0, rtol=1e-5)  # five sites have w
    with pytest.raises(DensityError, match=r"'x' \(Triangle\): its support is not stated"):
        program.given().unconstrain()


class Pair(eqx.Module):
    """A vector of two, correlated; ``log_prob`` tells the event shape by the shape of what it gives."""

    loc: Any

    def sample(self, key: Any) -> Any:
        a, b = jax.random.normal(key, (2,))
        return jnp.stack([self.loc + a, self.loc + a + b])

    def log_prob(self, x: Any) -> Any:
        normal = lambda z: -0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi)  # noqa: E731
        return normal(x[0] - self.loc) + normal(x[1] - x[0])

    @property
    def support(self) -> Any:
        return constraints.real_vector


def test_custom_vector_with_support() -> None:
    program = gen(lambda m: repeat(lambda: sample("x", Pair(m)), 3))(1.0)
    info = program.sites["x"]
    assert (info.batch_shape, info.event_shape) == ((3,), (2,))
    x = program.simulate(jax.random.key(0)).choices["x"]
    own = np.stack([Pair(1.0).log_prob(row) for row in x])
    np.testing.assert_allclose(program.log_densities({"x": x})["x"], own, rtol=1e-5)
    np.testing.assert_allclose(
        program.given().unconstrain().log_density({"x": x}), own.sum(), rtol=1e-5
    )


class NoLeaves(eqx.Module):
    """A distribution without a parameter."""

    def sample(self, key: Any) -> Any:
        return jax.random.normal(key)

    def log_prob(self, x: Any) -> Any:
        return -0.5 * x**2


def test_custom_without_parameters() -> None:
    program = gen(lambda: repeat(lambda: sample("x", NoLeaves()), 4))()
    x = program.simulate(jax.random.key(0)).choices["x"]
    assert len(np.unique(x)) == 4
    np.testing.assert_allclose(program.log_density({"x": x}), -0.5 * (x**2).sum(), rtol=1e-5)


def test_custom_that_are_none() -> None:
    class Plain:
        def sample(self, key: Any) -> Any:
            return jnp.zeros(())

        def log_prob(self, x: Any) -> Any:
            return x

    class NoSample(eqx.Module):
        a: Any = 1.0

        def log_prob(self, x: Any) -> Any:
            return x

    class Wrong(eqx.Module):
        """Elements of log_prob that are none of the value's."""

        def sample(self, key: Any) -> Any:
            return jnp.zeros(3)

        def log_prob(self, x: Any) -> Any:
            return jnp.zeros(2)

    with pytest.raises(ModelError, match=r"'x': Plain is no pytree.*equinox\.Module"):
        gen(lambda: sample("x", Plain()))().shapes()
    with pytest.raises(
        ModelError, match=r"'x': expected a distribution.*sample\(key\) and log_prob.*got NoSample"
    ):
        gen(lambda: sample("x", NoSample()))().shapes()
    with pytest.raises(ModelError, match=r"'x': log_prob of Wrong has shape \(2,\).*\(3,\)"):
        gen(lambda: sample("x", Wrong()))().shapes()
    with pytest.raises(ModelError, match=r"'x'.*apply the model"):
        gen(lambda: sample("x", gen(lambda: sample("y", dist.Normal(0.0, 1.0)))))().shapes()
    for wrong in (1.0, jnp.zeros(3), None):
        with pytest.raises(ModelError, match=r"'x'.*expected a distribution.*or a program"):
            gen(lambda w=wrong: sample("x", w))().shapes()


# --- parameters of unusual types ------------------------------------------------------------------


def test_numpy_arrays_as_parameters() -> None:
    """NumPy arrays are parameters like any other, wherever NumPyro keeps them."""

    @gen
    def model() -> None:
        sample("normal", dist.Normal(np.zeros(2), np.ones(2)))
        sample("binomial", dist.Binomial(np.array([3, 5]), np.array([0.2, 0.8])))
        sample("multinomial", dist.Multinomial(np.array(5), np.array([0.2, 0.8])))
        sample("uniform", dist.DiscreteUniform(np.array(0), np.array(3)))

    trace = model().simulate(jax.random.key(0))
    c = trace.choices
    own = (
        dist.Normal(0.0, 1.0).log_prob(c["normal"]).sum()
        + dist.Binomial(np.array([3, 5]), np.array([0.2, 0.8])).log_prob(c["binomial"]).sum()
        + dist.Multinomial(5, np.array([0.2, 0.8])).log_prob(c["multinomial"])
        - np.log(4)
    )
    np.testing.assert_allclose(trace.log_density, own, rtol=1e-5)


@jax.tree_util.register_pytree_node_class
class Static:
    """A distribution that keeps an array where JAX compares and hashes."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def tree_flatten(self) -> Any:
        return (), (self.table,)

    @classmethod
    def tree_unflatten(cls, aux: Any, leaves: Any) -> Any:
        return cls(*aux)

    def sample(self, key: Any) -> Any:
        return jnp.asarray(self.table)[0]

    def log_prob(self, x: Any) -> Any:
        return jnp.zeros(())


def test_array_in_the_static_structure() -> None:
    """NumPyro keeps several total counts there."""
    d = dist.Multinomial(np.array([3, 5]), np.array([[0.2, 0.8], [0.5, 0.5]]))
    with pytest.raises(ModelError, match=r"'x': Multinomial.*array of shape \(2,\).*'total_count'"):
        gen(lambda: sample("x", d))().shapes()
    with pytest.raises(ModelError, match=r"'x': Static.*array of shape \(2,\).*'table'"):
        gen(lambda: sample("x", Static(np.zeros(2))))().shapes()


def test_observations_of_every_support_are_checked() -> None:
    """A value outside the support is refused wherever the support can be told."""
    outside = [
        (dist.HalfNormal(1.0), -1.0),
        (dist.Beta(1.0, 1.0), 1.5),
        (dist.Poisson(1.0), -1),
        (dist.Bernoulli(0.5), 2),
        (dist.Categorical(jnp.ones(3) / 3), 3),
        (dist.Dirichlet(jnp.ones(2)), [0.5, 0.6]),
        (dist.Binomial(4, 0.5), 5),
        (dist.Uniform(0.0, 2.0), 2.5),
        (dist.LKJCholesky(2, 1.0), [[1.0, 0.0], [0.5, 0.5]]),
        (dist.MultivariateNormal(jnp.zeros(2), EYE), [0.0, np.inf]),
    ]
    for d, value in outside:
        program = gen(lambda d=d: sample("x", d))()
        with pytest.raises(ObservationError, match=r"'x'.*outside the support"):
            program.given({"x": value})


def test_traced_value_in_the_static_structure() -> None:
    """As when a total count is an argument of the model, or differs from lane to lane."""
    p = np.array([[0.2, 0.8], [0.5, 0.5]])
    one = gen(lambda n: sample("x", dist.Multinomial(n, p[0])))
    with pytest.raises(ModelError, match=r"'x': Multinomial.*'total_count'.*plain number"):
        one(np.array(5)).shapes()
    assert one(5).simulate(jax.random.key(0)).choices["x"].sum() == 5
    lane = lambda n, p: sample("x", dist.Multinomial(n, p, total_count_max=5))  # noqa: E731
    with pytest.raises(ModelError, match=r"'x': Multinomial.*'total_count'.*plain number"):
        gen(lambda n: jax.vmap(lane)(n, p))(np.array([3, 5])).shapes()
