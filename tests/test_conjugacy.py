"""Continuous choices integrated out in closed form, against the textbook's answers in double precision."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import special, stats
from weft.inference import Draws
from weft.ppl import ModelError

from weft import gen, marginalize, recover, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane

SSM = Path(__file__).parent / "refcases" / "ssm"
Y = np.array([0.3, 1.2, -0.7, 2.0])
S = np.array([1.0, 2.0, 0.5, 0.3])


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@gen
def schools(sigma):
    tau = sample("tau", dist.HalfNormal(1.0))
    mu = sample("mu", dist.Normal(0.0, 5.0))

    def school(s):
        sample("y", dist.Normal(sample("theta", dist.Normal(mu, tau)), s))

    jax.vmap(school)(sigma)


@gen
def normal_scalar():
    mu = sample("mu", dist.Normal(1.0, 2.0))
    sample("y", dist.Normal(mu * 1.5 + 0.2, 0.7).expand([4]))


@gen
def regression(x):
    beta = sample("beta", dist.Normal(0.0, 2.0).expand([3]))
    sample("y", dist.Normal(x @ beta, 0.5))


@gen
def multivariate_regression(x):
    beta = sample("beta", dist.MultivariateNormal(jnp.zeros(3), 4 * jnp.eye(3)))
    sample("y", dist.Normal(x @ beta, 0.5))


@gen
def coins():
    p = sample("p", dist.Beta(2.0, 3.0))
    sample("y", dist.Bernoulli(p).expand([5]))
    sample("k", dist.Binomial(7, p))


@gen
def counts(exposure):
    def one(e):
        sample("y", dist.Poisson(sample("rate", dist.Gamma(2.0, 3.0)) * e))

    jax.vmap(one)(exposure)


@gen
def categories():
    w = sample("w", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    sample("z", dist.Categorical(w).expand([4]))
    sample("c", dist.Multinomial(5, w))


@gen
def normal_inverse_gamma():
    variance = sample("variance", dist.InverseGamma(3.0, 2.0))
    mu = sample("mu", dist.Normal(0.5, jnp.sqrt(variance / 2.0)))
    sample("y", dist.Normal(mu, jnp.sqrt(variance)).expand([4]))


@gen
def normal_gamma():
    precision = sample("precision", dist.Gamma(3.0, 2.0))
    mu = sample("mu", dist.Normal(0.5, 1 / jnp.sqrt(2 * precision)))
    sample("y", dist.Normal(mu, precision**-0.5).expand([4]))


A = np.array([[1.5, 0.3], [0.3, 0.8]])
PAIRS = np.random.default_rng(1).normal(size=(2, 6, 2))


@gen
def normal_inverse_wishart(kappa):
    cov = sample("cov", dist.InverseWishart(5.0, scale_matrix=A))
    mu = sample("mu", dist.MultivariateNormal(jnp.array([0.3, -0.2]), cov / kappa))
    sample("y", dist.MultivariateNormal(mu, cov).expand([6]))


@gen
def normal_wishart(kappa):
    precision = sample("precision", dist.Wishart(5.0, rate_matrix=A))
    normal = dist.MultivariateNormal
    mu = sample("mu", normal(jnp.array([0.3, -0.2]), precision_matrix=kappa * precision))
    jax.vmap(lambda _: sample("y", normal(mu, precision_matrix=precision)))(jnp.zeros(6))


@gen
def tasks(kappa):
    jax.vmap(lambda k: sample("task", normal_inverse_wishart(k)))(kappa)


def _niw(kappa, y):
    """Log evidence, degrees of freedom, scale matrix and mean of the posterior (Murphy 2007, eqs. 250-266)."""
    n, centre = len(y), y.mean(0)
    scatter = (y - centre).T @ (y - centre)
    away = centre - np.array([0.3, -0.2])
    scale = A + scatter + kappa * n / (kappa + n) * np.outer(away, away)
    log_det = lambda m: np.linalg.slogdet(m)[1]  # noqa: E731
    log_evidence = (
        -n * np.log(np.pi)
        + special.multigammaln((5 + n) / 2, 2)
        - special.multigammaln(5 / 2, 2)
        + 5 / 2 * log_det(A)
        - (5 + n) / 2 * log_det(scale)
        + np.log(kappa / (kappa + n))
    )
    return log_evidence, 5 + n, scale, np.array([0.3, -0.2]) + n / (kappa + n) * away


def _normal(mean, cov):
    return stats.multivariate_normal(np.full(4, mean), cov).logpdf(Y)


X = np.random.default_rng(0).normal(size=(4, 3))
STUDENT = stats.multivariate_t(np.full(4, 0.5), 2 / 3 * (np.eye(4) + 0.5), df=6).logpdf(Y)
LOG_B = lambda a: special.gammaln(a).sum() - special.gammaln(np.sum(a))  # noqa: E731

CASES = {
    "normal": (normal_scalar, ("mu",), (), {"y": Y}, _normal(1.7, 0.49 * np.eye(4) + 9.0)),
    "normal in lanes": (
        schools,
        ("theta",),
        (S,),
        {"y": Y, "mu": 0.4, "tau": 0.8},
        stats.norm(0, 5).logpdf(0.4)
        + stats.halfnorm.logpdf(0.8)
        + stats.norm(0.4, np.sqrt(0.64 + S**2)).logpdf(Y).sum(),
    ),
    "hierarchy of normals": (
        schools,
        ("theta", "mu"),
        (S,),
        {"y": Y, "tau": 0.8},
        stats.halfnorm.logpdf(0.8) + _normal(0.0, np.diag(0.64 + S**2) + 25),
    ),
    "regression": (
        regression,
        ("beta",),
        (X,),
        {"y": Y},
        _normal(0.0, 0.25 * np.eye(4) + 4 * X @ X.T),
    ),
    "regression, one vector": (
        multivariate_regression,
        ("beta",),
        (X,),
        {"y": Y},
        _normal(0.0, 0.25 * np.eye(4) + 4 * X @ X.T),
    ),
    "beta": (
        coins,
        ("p",),
        (),
        {"y": [1, 0, 1, 1, 0], "k": 4},
        special.betaln(9, 8) - special.betaln(2, 3) + np.log(special.comb(7, 4)),
    ),
    "gamma": (
        counts,
        ("rate",),
        (np.array([1.0, 2.0]),),
        {"y": [3, 1]},
        stats.nbinom(2, 3 / (3 + np.array([1.0, 2.0]))).logpmf([3, 1]).sum(),
    ),
    "dirichlet": (
        categories,
        ("w",),
        (),
        {"z": [0, 1, 2, 2], "c": [1, 1, 3]},
        LOG_B(np.array([3.0, 4.0, 8.0])) - LOG_B(np.array([1.0, 2.0, 3.0])) + np.log(20.0),
    ),
    "normal-inverse-gamma": (normal_inverse_gamma, ("mu", "variance"), (), {"y": Y}, STUDENT),
    "normal-gamma": (normal_gamma, ("mu", "precision"), (), {"y": Y}, STUDENT),
    "normal-inverse-wishart": (
        normal_inverse_wishart,
        ("mu", "cov"),
        (1.7,),
        {"y": PAIRS[0]},
        _niw(1.7, PAIRS[0])[0],
    ),
    "normal-wishart": (
        normal_wishart,
        ("mu", "precision"),
        (1.7,),
        {"y": PAIRS[0]},
        _niw(1.7, PAIRS[0])[0],
    ),
    "normal-inverse-wishart in lanes": (
        tasks,
        ("task.mu", "task.cov"),
        (np.array([0.5, 1.7]),),
        {"task.y": PAIRS},
        _niw(0.5, PAIRS[0])[0] + _niw(1.7, PAIRS[1])[0],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_marginal_density_is_the_textbooks(case):
    model, addresses, args, choices, exact = CASES[case]
    found = marginalize(model, *addresses)(*args).log_density(choices)
    np.testing.assert_allclose(found, exact, rtol=1e-10)


def _state_space(p, num_steps):
    normal = dist.MultivariateNormal
    scale = sample("scale", dist.HalfNormal(1.0))
    x0 = sample("x0", normal(p["m0"], p["P0"]))
    sample("y0", normal(p["C"] @ x0 + p["d"], p["R"]))

    def step(x, _):
        x = sample("x", normal(p["A"] @ x + p["b"], scale * p["Q"]))
        sample("y", normal(p["C"] @ x + p["d"], p["R"]))
        return x, None

    jax.lax.scan(step, x0, None, length=num_steps)


@pytest.mark.parametrize("name", ["lgssm_dim1", pytest.param("lgssm_dim4", marks=pytest.mark.slow)])
def test_a_linear_gaussian_chain_is_kalmans(name):
    case = json.loads((SSM / f"{name}.json").read_text())
    p = {k: jnp.array(v) for k, v in case["params"].items()}
    y = jnp.array(case["y"])
    marginal = marginalize(gen(_state_space), "x0", "x")
    program = marginal(p, len(y) - 1)
    prior = float(dist.HalfNormal(1.0).log_prob(1.0))

    def log_likelihood(scale):
        return program.log_density({"scale": scale, "y0": y[0], "y": y[1:]})

    value, slope = jax.value_and_grad(log_likelihood)(1.0)
    np.testing.assert_allclose(value - prior, case["log_likelihood"], rtol=1e-10)
    np.testing.assert_allclose(
        slope + 1.0, case["dlogp_dlogscale_Q"], rtol=1e-8
    )  # the prior's is -1

    target = program.given({"y0": y[0], "y": y[1:]})
    draws = Draws(choices={"scale": jnp.ones((1, 1))}, target=target)
    for sites in ("marginals", "viterbi"):  # the mean of a Gaussian path is its mode
        found = recover(jax.random.key(0), marginal, draws, p, len(y) - 1, sites=sites).derived
        path = np.concatenate([found["x0"][0], found["x"][0, 0]])
        np.testing.assert_allclose(path, case["smoother_mean"], atol=1e-8)
    found = recover(jax.random.key(0), marginal, draws, p, len(y) - 1, sites="filtered").derived
    path = np.concatenate([found["x0"][0], found["x"][0, 0]])
    np.testing.assert_allclose(path, case["filter_mean"], atol=1e-8)


def test_draws_have_the_posteriors_moments():
    """Means and second moments of (mu, theta) given tau; 20 z-scores below 4.9, a false alarm in 50,000 runs."""
    marginal, n = marginalize(schools, "theta", "mu"), 4000
    target = marginal(S).given({"y": Y})
    draws = Draws(choices={"tau": jnp.full((1, n), 0.8)}, target=target)
    found = recover(jax.random.key(0), marginal, draws, S).derived
    x = np.concatenate([found["mu"][0][:, None], found["theta"][0]], 1)

    precision = np.diag(np.r_[1 / 25 + 4 / 0.64, 1 / 0.64 + 1 / S**2])
    precision[0, 1:] = precision[1:, 0] = -1 / 0.64
    cov = np.linalg.inv(precision)
    mean = cov @ np.r_[0, Y / S**2]
    z = (x.mean(0) - mean) / np.sqrt(np.diag(cov) / n)
    assert np.abs(z).max() < 4.9
    centred = x - mean
    for i, j in zip(*np.triu_indices(5), strict=True):
        products = centred[:, i] * centred[:, j]
        se = np.sqrt((cov[i, i] * cov[j, j] + cov[i, j] ** 2) / n)
        assert abs(products.mean() - cov[i, j]) < 4.9 * se


def test_draws_of_a_scale_and_a_mean():
    """Normal-inverse-gamma: posterior means of 1 / variance and of mu; two z-scores below 4.9."""
    marginal, n = marginalize(normal_inverse_gamma, "mu", "variance"), 4000
    draws = Draws(choices={}, stats={"lp": jnp.zeros((1, n))}, target=marginal().given({"y": Y}))
    found = recover(jax.random.key(0), marginal, draws).derived
    k, a = 6.0, 5.0
    m = (2 * 0.5 + Y.sum()) / k
    b = 2.0 + 0.5 * ((Y**2).sum() + 2 * 0.25 - k * m**2)
    precision = 1 / found["variance"][0]
    assert abs(precision.mean() - a / b) < 4.9 * np.sqrt(a / b**2 / n)
    assert abs(found["mu"][0].mean() - m) < 4.9 * np.sqrt(b / (a - 1) / k / n)


@pytest.mark.parametrize("model", [normal_inverse_wishart, normal_wishart])
def test_draws_of_a_covariance_and_a_mean(model):
    """Means of the precision matrix and of mu; five z-scores below 4.9."""
    (matrix,) = {"cov", "precision"} & set(model(1.7).latents)
    marginal, n = marginalize(model, "mu", matrix), 4000
    target = marginal(1.7).given({"y": PAIRS[0]})
    draws = Draws(choices={}, stats={"lp": jnp.zeros((1, n))}, target=target)
    found = recover(jax.random.key(0), marginal, draws, 1.7).derived
    _, dof, scale, mean = _niw(1.7, PAIRS[0])
    precision = found[matrix][0]
    precision = jnp.linalg.inv(precision) if matrix == "cov" else precision
    inverse = np.linalg.inv(scale)
    diagonal = np.diag(inverse)
    se = np.sqrt(dof * (inverse**2 + np.outer(diagonal, diagonal)) / n)
    assert (np.abs(precision.mean(0) - dof * inverse) < 4.9 * se).all()
    se = np.sqrt(np.diag(scale) / (dof - 3) / 7.7 / n)
    assert (np.abs(found["mu"][0].mean(0) - mean) < 4.9 * se).all()


@gen
def _jitter():
    cov = sample("cov", dist.InverseWishart(5.0, scale_matrix=A))
    sample("y", dist.MultivariateNormal(jnp.zeros(2), cov + 1e-6 * jnp.eye(2)))


@gen
def _shrunk():
    cov = sample("cov", dist.InverseWishart(5.0, scale_matrix=A))
    sample("y", dist.MultivariateNormal(jnp.zeros(2), cov * jnp.array([[1.0, 0.5], [0.5, 1.0]])))


@gen
def _as_precision():
    cov = sample("cov", dist.InverseWishart(5.0, scale_matrix=A))
    sample("y", dist.MultivariateNormal(jnp.zeros(2), precision_matrix=cov))


@gen
def _curved():
    x = sample("x", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(x**2, 1.0))


@gen
def _stepped():
    x = sample("x", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(jnp.floor(x), 1.0))


@gen
def _other_scale():
    variance = sample("variance", dist.InverseGamma(3.0, 2.0))
    mu = sample("mu", dist.Normal(0.5, 1.0))
    sample("y", dist.Normal(mu, jnp.sqrt(variance)))


@gen
def _shifted_rate():
    sample("y", dist.Poisson(sample("rate", dist.Gamma(2.0, 3.0)) + 1.0))


@gen
def _student():
    sample("y", dist.Normal(sample("x", dist.StudentT(3.0)), 1.0))


@gen
def _mixture():
    mu = sample("mu", dist.Normal(0.0, 1.0))

    def one(_):
        sample("y", dist.Normal(mu * sample("z", dist.Bernoulli(0.5)), 1.0))

    jax.vmap(one)(jnp.zeros(3))


REFUSED = {
    "a parameter that is not affine": (_curved, ("x",), 0.3, "'y'.*not quadratic in 'x'"),
    "a parameter that jumps": (_stepped, ("x",), 0.3, "'y'.*not quadratic in 'x'"),
    "a scale that only some share": (
        _other_scale,
        ("mu", "variance"),
        0.3,
        "'mu' and 'variance' cannot",
    ),
    "a parameter that is no multiple": (
        _shifted_rate,
        ("rate",),
        2,
        "'y'.*not conjugate to 'rate'",
    ),
    "a prior without a family": (_student, ("x",), 0.3, "'x'.*StudentT.*cannot be integrated out"),
    "a mixture of many": (_mixture, ("mu", "z"), np.zeros(3), "'mu' cannot be integrated out"),
    "a covariance with jitter": (_jitter, ("cov",), np.zeros(2), "'y'.*not conjugate to 'cov'"),
    "a covariance that shrinks": (_shrunk, ("cov",), np.zeros(2), "'y'.*not conjugate to 'cov'"),
    "a covariance as precision": (
        _as_precision,
        ("cov",),
        np.zeros(2),
        r"'y'.*not conjugate to 'cov'.*MultivariateNormal\(covariance_matrix\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_closed_form_is_refused(case):
    model, addresses, y, message = REFUSED[case]
    with pytest.raises((ModelError, ValueError), match=message):
        marginalize(model, *addresses)().log_density({"y": y})
