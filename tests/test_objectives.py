"""Objectives against closed forms and enumeration: values and gradients, at 5 standard errors (some 30 comparisons)."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import (
    elbo,
    eubo,
    iwelbo,
    log_variance,
    renyi,
    rws,
    sleep_phi,
    wake_phi,
    wake_theta,
)
from weft.ppl import GradientError, WeftError

from weft import gen, gradients, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane
KEY = jax.random.key(5)
Y = 2.0
PHI = {"loc": 0.4, "scale": 0.9}
POSTERIOR = {"loc": Y / 2, "scale": np.sqrt(0.5)}


@gen
def model(prior: Any = 0.0) -> None:
    x = sample("x", dist.Normal(prior, 1.0))
    sample("y", dist.Normal(x, 1.0))


@gen
def guide(phi: Any) -> None:
    sample("x", dist.Normal(phi["loc"], phi["scale"]))


@gen
def scored(phi: Any) -> None:
    sample("x", dist.Normal(phi["loc"], phi["scale"]), grad=gradients.score)


TARGET = model().given({"y": Y})


def exact_elbo(phi: Any) -> Any:
    m, s = phi["loc"], phi["scale"]
    energy = -0.5 * (m**2 + s**2) - 0.5 * ((m - Y) ** 2 + s**2) - jnp.log(2 * jnp.pi)
    return energy + 0.5 * jnp.log(2 * jnp.pi * jnp.e) + jnp.log(s)


def samples(objective: Any, phi: Any, num_keys: int = 10_000) -> Any:
    keys = jax.random.split(KEY, num_keys)
    return jax.jit(jax.vmap(jax.value_and_grad(objective, argnums=1), (0, None)))(keys, phi)


def close(found: Any, exact: Any) -> None:
    for x, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        x = np.asarray(x, float)
        error = x.std(0) / np.sqrt(len(x)) + 1e-5
        assert np.all(np.abs(x.mean(0) - np.asarray(wanted)) < 5 * error), (
            x.mean(0),
            wanted,
            error,
        )


ELBOS = {
    "reparam": lambda: elbo(TARGET, guide),
    "sticking the landing": lambda: elbo(TARGET, guide, sticking_the_landing=True),
    "score": lambda: elbo(TARGET, scored),
    "score, several": lambda: elbo(TARGET, scored, num_samples=4),
    "score, sticking the landing": lambda: elbo(TARGET, scored, sticking_the_landing=True),
    "one particle": lambda: iwelbo(TARGET, guide, num_particles=1),
    "one particle, twice reparametrised": lambda: iwelbo(TARGET, guide, num_particles=1, dreg=True),
    "one particle of renyi": lambda: renyi(TARGET, guide, alpha=0.3, num_particles=1),
}


@pytest.mark.parametrize("name", ELBOS)
def test_elbo(name: str) -> None:
    close(samples(ELBOS[name](), PHI), jax.value_and_grad(exact_elbo)(PHI))


def test_no_variance_at_the_posterior() -> None:
    """Sticking the landing, doubly reparametrised gradients, and the variance of log weights."""
    for objective in (
        elbo(TARGET, guide, sticking_the_landing=True),
        iwelbo(TARGET, guide, num_particles=5, dreg=True),
        log_variance(TARGET, guide, num_particles=5),
    ):
        _, slopes = samples(objective, POSTERIOR, 100)
        assert max(np.abs(x).max() for x in jax.tree.leaves(slopes)) < 1e-4


def test_iwelbo_gradients_agree() -> None:
    """Plain, doubly reparametrised, by score terms, and by VIMCO: one mean, ever less noise."""
    makers = {
        "plain": iwelbo(TARGET, guide, num_particles=5),
        "dreg": iwelbo(TARGET, guide, num_particles=5, dreg=True),
        "score": iwelbo(TARGET, scored, num_particles=5),
        "vimco": iwelbo(TARGET, scored, num_particles=5, vimco=True),
    }
    slopes = {n: np.asarray(samples(o, PHI, 40_000)[1]["loc"], float) for n, o in makers.items()}
    reference = slopes.pop("dreg")
    for name, x in slopes.items():
        error = np.hypot(x.std(), reference.std()) / np.sqrt(len(x))
        assert abs(x.mean() - reference.mean()) < 5 * error, name
    assert reference.std() < slopes["plain"].std()
    assert slopes["vimco"].std() < 0.8 * slopes["score"].std()


@gen
def coin_model() -> None:
    z = sample("z", dist.Bernoulli(0.3))
    sample("y", dist.Normal(2.0 * z, 1.0))


@pytest.mark.parametrize("strategy", [gradients.score, gradients.enum, gradients.mvd], ids=str)
@pytest.mark.parametrize("vimco", [False, True])
def test_iwelbo_of_a_discrete_choice(strategy: Any, vimco: bool) -> None:
    """Three particles of a coin, against the sum over all eight outcomes."""
    target = coin_model().given({"y": 1.5})

    @gen
    def guess(phi: Any) -> None:
        sample("z", dist.Bernoulli(logits=phi), grad=strategy)

    def exact(phi: Any) -> Any:
        total = 0.0
        for zs in itertools.product((0, 1), repeat=3):
            z = jnp.array(zs)
            log_q = dist.Bernoulli(logits=phi).log_prob(z)
            log_p = dist.Bernoulli(0.3).log_prob(z) + dist.Normal(2.0 * z, 1.0).log_prob(1.5)
            bound = jax.nn.logsumexp(log_p - log_q) - jnp.log(3)
            total = total + jnp.exp(jnp.sum(log_q)) * bound
        return total

    found = samples(iwelbo(target, guess, num_particles=3, vimco=vimco), 0.2)
    close(found, jax.value_and_grad(exact)(0.2))


X = np.linspace(-8, 10, 20_001)


def quadrature() -> Any:
    """The guide's density and the log weights on a grid, and the integral over it."""
    q = dist.Normal(PHI["loc"], PHI["scale"])
    log_w = dist.Normal(0.0, 1.0).log_prob(X) + dist.Normal(X, 1.0).log_prob(Y) - q.log_prob(X)
    density = np.exp(np.asarray(q.log_prob(X), float))
    return np.asarray(log_w, float), lambda f: np.trapezoid(density * f, X)


def test_renyi_lies_between() -> None:
    """By quadrature; K draws have bias -var(v) / (2 K (1 - alpha)) to first order, v = w^(1 - alpha) over its mean."""
    log_w, mean = quadrature()
    root, k = mean(np.exp(0.5 * log_w)), 500
    exact = np.log(root) / 0.5
    bias = -(mean(np.exp(log_w)) / root**2 - 1) / k
    values, _ = samples(renyi(TARGET, guide, alpha=0.5, num_particles=k), PHI, 2_000)
    error = values.std() / np.sqrt(2_000) + abs(bias) / 10 + 1e-5
    assert abs(values.mean() - exact - bias) < 5 * error
    assert exact_elbo(PHI) < exact < dist.Normal(0.0, np.sqrt(2.0)).log_prob(Y)


@pytest.mark.parametrize(
    "objective",
    [wake_phi, rws, eubo, log_variance, lambda t, g: elbo(t, g, sticking_the_landing=True)],
)
def test_networks_among_the_parameters(objective: Any) -> None:
    """An activation function is a leaf, too."""
    net = eqx.nn.MLP(1, 1, 2, 1, key=KEY)
    amortised = gen(lambda net, y: sample("x", dist.Normal(net(y[None])[0], 1.0)))

    def bound(net: Any) -> Any:
        return objective(lambda _, y: model().given({"y": y}), amortised)(KEY, net, jnp.array(Y))

    value, slope = eqx.filter_value_and_grad(bound)(net)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


def test_wake_phases_at_the_posterior() -> None:
    """The model's gradient is that of the evidence; the guide's vanishes."""

    def target(params: Any) -> Any:
        return model(params["prior"]).given({"y": Y})

    def fixed_guide(params: Any) -> Any:
        return guide({k: params[k] for k in ("loc", "scale")})

    params = {"prior": 0.0, **POSTERIOR}
    evidence = jax.grad(lambda m: dist.Normal(m, np.sqrt(2.0)).log_prob(Y))(0.0)
    for objective, prior in (
        (wake_theta(target, fixed_guide, num_particles=5), evidence),
        (wake_phi(target, fixed_guide, num_particles=5), 0.0),
        (rws(target, fixed_guide, num_particles=5), evidence),
    ):
        _, slopes = samples(objective, params)
        close(slopes, {"loc": 0.0, "prior": prior, "scale": 0.0})


def test_sleep() -> None:
    """E log q(x | y) under the joint law, for q = N(a y, s): in closed form."""

    @gen
    def amortised(params: Any, data: Any) -> None:
        sample("x", dist.Normal(params["a"] * data["y"], params["s"]))

    def exact(params: Any) -> Any:
        a, s = params["a"], params["s"]
        square = (1 - a) ** 2 + a**2  # E (x - a y)^2 with y = x + noise
        return -0.5 * square / s**2 - jnp.log(s) - 0.5 * jnp.log(2 * jnp.pi)

    params = {"a": 0.3, "s": 0.8}
    close(samples(sleep_phi(TARGET, amortised), params), jax.value_and_grad(exact)(params))


def test_log_variance_has_the_gradient_of_the_elbo() -> None:
    _, slopes = samples(log_variance(TARGET, guide, num_particles=4), PHI, 40_000)
    close(slopes, jax.grad(exact_elbo)(PHI))


def test_upper_bound() -> None:
    """E_posterior log w by quadrature; the bias of K weighted draws is -E_q[v^2 (log w - exact)] / K to first order."""
    log_w, mean = quadrature()
    v, k = np.exp(log_w) / mean(np.exp(log_w)), 1_000
    exact = mean(v * log_w)
    bias = -mean(v**2 * (log_w - exact)) / k
    values, _ = samples(eubo(TARGET, guide, num_particles=k), PHI, 2_000)
    error = values.std() / np.sqrt(2_000) + abs(bias) / 10 + 1e-5
    assert abs(values.mean() - exact - bias) < 5 * error


def test_what_objectives_refuse() -> None:
    @gen
    def guess(phi: Any) -> None:
        sample("z", dist.Bernoulli(logits=phi))

    with pytest.raises(GradientError, match="'z' cannot be.*vimco"):
        iwelbo(coin_model().given({"y": 1.5}), guess, dreg=True)(KEY, 0.2)
    with pytest.raises(WeftError, match="iwelbo: num_particles must be an integer, at least 2"):
        iwelbo(TARGET, guide, num_particles=1, vimco=True)
    with pytest.raises(WeftError, match="renyi.*take elbo"):
        renyi(TARGET, guide, alpha=1)
    with pytest.raises(TypeError, match="wake_phi: expected a Target"):
        wake_phi(model(), guide)


# --- the noisy cone: two coordinates seen through their squared distance from the origin --------------------------


@gen
def cone() -> None:
    x = sample("x", dist.Normal(0.0, 10.0))
    y = sample("y", dist.Normal(0.0, 10.0))
    r = x**2 + y**2
    sample("z", dist.Normal(r, 0.1 + r / 100))


def cone_elbo(phi: Any) -> Any:
    """The bound of independent normals, by quadrature in both coordinates."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    w = jnp.asarray(np.outer(weights, weights) / weights.sum() ** 2)
    s = jnp.exp(phi[2:])
    x, y = phi[0] + s[0] * nodes[:, None], phi[1] + s[1] * nodes
    r = x**2 + y**2
    log_p = dist.Normal(0.0, 10.0).log_prob(x) + dist.Normal(0.0, 10.0).log_prob(y)
    log_p = log_p + dist.Normal(r, 0.1 + r / 100).log_prob(5.0)
    return jnp.sum(w * log_p) + jnp.log(2 * jnp.pi * jnp.e) + phi[2] + phi[3]


@pytest.mark.parametrize("first", [gradients.reparam, gradients.score, gradients.mvd], ids=str)
@pytest.mark.parametrize("second", [gradients.reparam, gradients.mvd], ids=str)
def test_noisy_cone(first: Any, second: Any) -> None:
    """Gradients of the bound against quadrature, which agrees with published estimates within three of their errors."""

    @gen
    def normals(phi: Any) -> None:
        sample("x", dist.Normal(phi[0], jnp.exp(phi[2])), grad=first)
        sample("y", dist.Normal(phi[1], jnp.exp(phi[3])), grad=second)

    phi = jnp.array([0.5, 2.0, -1.0, -1.0])
    with jax.enable_x64(True):
        value, slope = map(np.asarray, jax.value_and_grad(cone_elbo)(np.asarray(phi, float)))
    away = np.abs(slope - np.array([33.5, 133.4, 2.97, -102.9]))
    assert np.all(away < 3 * np.array([0.22, 0.67, 0.09, 0.32]))
    objective = elbo(cone().given({"z": 5.0}), normals)
    close(samples(objective, phi, 50_000), (value, slope))
