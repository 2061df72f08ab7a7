"""Filters of models with chains summed out: steps hand on the law of what the carry holds of them.

With everything summed out each particle has the exact density as its weight: two particles are compared with it in
double precision. With other choices left, evidence and posterior are held to enumeration by five standard errors.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from weft.inference import filtering, mcmc, recover, smc
from weft.ppl import ModelError, WeftError

from weft import gen, kernels, marginalize, observed, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane
KEY = jax.random.key(3)
Normal = dist.Normal
Y = np.array([0.5, 1.0, -0.3, 0.2, 2.0])


def series(step: Callable[..., Any], first: Any, xs: Any = None) -> Any:
    return jax.lax.scan(step, first, xs, length=len(Y))[0]


# --- everything summed out --------------------------------------------------------------------------------------------


@gen
def regression() -> None:
    """Coefficients that every step reads, a state of second order, and an observation of both in the end."""
    slope = sample("slope", Normal(0.0, 1.0).expand([2]))

    def step(carry: Any, u: Any) -> Any:
        x = sample("x", Normal(0.6 * carry[0] - 0.3 * carry[1] + slope @ u, 0.3))
        sample("y", Normal(x, 0.3))
        return (x, carry[0]), x  # an output that nothing reads

    x, _ = series(step, (0.1, 0.2), jnp.arange(10.0).reshape(5, 2) / 5)
    sample("last", Normal(x + slope[0], 0.3))


@gen
def trend() -> None:
    """Two choices a step, after two before the scan; the carry has affine functions of them."""
    level, slope = sample("level0", Normal(0.0, 1.0)), sample("slope0", Normal(0.0, 0.3))

    def step(carry: Any, _: Any) -> Any:
        mean, slope = carry
        level = sample("level", Normal(mean, 0.5))
        sample("y", Normal(level, 0.3))
        slope = sample("slope", Normal(slope, 0.1))
        return (level + slope, slope), None

    series(step, (level + slope, slope))


@gen
def two_chains() -> None:
    """Finite choices, two a step; their first values are drawn before the scan."""
    table = jnp.array([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    z, w = sample("z0", dist.Categorical(jnp.full(3, 1 / 3))), sample("w0", dist.Bernoulli(0.4))

    def step(carry: Any, _: Any) -> Any:
        z = sample("z", dist.Categorical(table[carry[0]]))
        w = sample("w", dist.Bernoulli(jnp.where(carry[1] == 1, 0.7, 0.2)))
        sample("y", Normal(z - 1.0 * w, 0.5))
        return (z, w), None

    series(step, (z, w))


ALL = {
    "regression": (regression, ("slope", "x"), {"last": 1.0}),
    "trend": (trend, ("level0", "slope0", "level", "slope"), {}),
    "two chains": (two_chains, ("z0", "w0", "z", "w"), {}),
}


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_to_chance(name: str, x64: None) -> None:
    model, addresses, more = ALL[name]

    def target(y: Any) -> Any:
        return marginalize(model, *addresses)().given({"y": y, **more})

    def filtered(y: Any) -> Any:
        return smc(filtering(), num_particles=2).run(KEY, target(y), progress=False).log_evidence

    # Rounding: 2e-16 of sums of some hundred, and covariances of a condition below 1e3; a digit less in derivatives.
    if name != "trend":  # derivatives cost as much again to compile
        np.testing.assert_allclose(filtered(Y), target(Y).log_density({}), rtol=1e-10)
        return
    found, slope = jax.value_and_grad(filtered)(jnp.asarray(Y))
    density, exact = jax.value_and_grad(lambda y: target(y).log_density({}))(jnp.asarray(Y))
    np.testing.assert_allclose(found, density, rtol=1e-10)
    np.testing.assert_allclose(slope, exact, rtol=1e-8)


# --- with a regime that stays -----------------------------------------------------------------------------------------


@gen
def switching() -> None:
    def step(carry: Any, _: Any) -> Any:
        x, z = carry
        z = sample("z", dist.Bernoulli(jnp.where(z == 1, 0.8, 0.2)))
        x = sample("x", Normal(0.9 * x + z, jnp.where(z == 1, 0.3, 1.0)))
        sample("y", Normal(x, 0.5))
        return (x, z), None

    series(step, (0.3, 0))


MODEL = marginalize(switching, "x")
REGIMES = jnp.array(list(itertools.product([0, 1], repeat=len(Y))))


@pytest.fixture(scope="module")
def target() -> Any:
    return MODEL().given({"y": Y})


def densities(target: Any) -> Any:
    return jax.vmap(lambda z: target.log_density({"z": z}))(REGIMES)


@pytest.fixture(scope="module")
def exact(target: Any) -> Any:
    """The log evidence, and the posterior probability of each regime at each step."""
    logs = densities(target)
    return jax.nn.logsumexp(logs), jax.nn.softmax(logs) @ REGIMES


@gen
def by_what_is_seen(law: Any, y: Any) -> None:
    sample("z", dist.Bernoulli(jax.nn.sigmoid(y - 0.9 * law.mean)))


def guide(carry: Any, t: Any, seen: Any) -> Any:
    law, _ = carry  # of the state: what is summed out has no value
    return by_what_is_seen(law, seen["y"])


@pytest.mark.parametrize("proposal", ["optimal", guide], ids=["optimal", "guided"])
def test_regimes_by_particles(target: Any, exact: Any, proposal: Any) -> None:
    found = smc(filtering(proposal), 2000, history="full").run(KEY, target, progress=False)
    evidence, regimes = exact
    assert abs(found.log_evidence - evidence) < 5 * found.log_evidence_variance**0.5
    # A weighted mean of 2,000 paths of which 400 at least differ in what they are worth.
    assert found.ess() > 400
    error = np.sqrt(np.maximum(regimes * (1 - regimes), 1 / 400) / 400)
    assert np.all(np.abs(found.weights @ found.choices["z"] - regimes) < 5 * error)
    if proposal == "optimal":  # and the states, given each path
        means = recover(KEY, MODEL, found, sites="marginals").derived["x"]
        whole = dataclasses.replace(found, choices={"z": REGIMES}, log_weights=densities(target))
        each = recover(KEY, MODEL, whole, sites="marginals").derived["x"]
        mean = whole.weights @ each
        error = np.sqrt(whole.weights @ (each - mean) ** 2 / 400)
        assert np.all(np.abs(found.weights @ means - mean) < 5 * error)


def test_missing_observations_and_a_path_given(exact: Any) -> None:
    """Summed over what is not seen, and as the law of a chain of whole paths."""
    seen = jnp.array([True, True, False, True, True])
    part = MODEL().given({"y": observed(Y, where=seen)})
    grid = jnp.linspace(-10.0, 10.0, 401)

    def density(z: Any, y: Any) -> Any:
        return MODEL().given({"y": jnp.asarray(Y).at[2].set(y)}).log_density({"z": z})

    logs = jax.jit(jax.vmap(jax.vmap(density, (None, 0)), (0, None)))(REGIMES, grid)
    evidence = jax.nn.logsumexp(logs) + jnp.log(grid[1] - grid[0])
    found = smc(filtering(), 4000).run(KEY, part, progress=False)
    assert abs(found.log_evidence - evidence) < 5 * found.log_evidence_variance**0.5

    moves = mcmc(kernels.conditional_smc(20, update=None), 1000, num_warmup=50, num_chains=2)
    draws = moves.run(KEY, MODEL().given({"y": Y}), progress=False)
    z = np.asarray(draws.choices["z"], float)
    ess = effective_sample_size(z)
    assert ess.min() > 100
    error = np.sqrt(np.maximum(exact[1] * (1 - exact[1]), 0.01) / ess)
    assert np.all(np.abs(z.mean((0, 1)) - exact[1]) < 5 * error)


# --- what cannot be handed on -----------------------------------------------------------------------------------------


def test_refusals() -> None:
    def refused(step: Any, first: Any, *addresses: str) -> str:
        @gen
        def model() -> None:
            series(step, first)

        model = marginalize(model, *addresses)
        with pytest.raises((ModelError, WeftError)) as caught:
            smc(filtering(), 10).run(KEY, model().given({"y": Y}), progress=False)
        return str(caught.value)

    def older(carry: Any, _: Any) -> Any:
        z = sample("z", dist.Bernoulli(0.2 + 0.3 * carry[0] + 0.3 * carry[1]))
        sample("y", Normal(1.0 * z, 0.3))
        return (z, carry[0]), None

    def curved(x: Any, _: Any) -> Any:
        x = sample("x", Normal(x, 0.3))
        sample("y", Normal(x, 0.3))
        return x**2, None

    def mixed(carry: Any, _: Any) -> Any:
        z = sample("z", dist.Bernoulli(0.2 + 0.3 * carry[1]))
        x = sample("x", Normal(carry[0], 0.3))
        sample("y", Normal(x, 0.3))
        return (x, z), None

    assert "of more than the last step" in refused(older, (0, 1), "z")
    assert "not affine: carry the choice" in refused(curved, 1.0, "x")
    assert "normal choices alone, or finite ones alone" in refused(mixed, (0.0, 0), "x", "z")

    @gen
    def sequence() -> None:
        slope = sample("slope", Normal(0.0, 1.0))

        def step(x: Any, u: Any) -> Any:
            sample("y", Normal(u, 0.3))
            return x, None

        series(step, 0.0, slope * jnp.ones(5))

    with pytest.raises(ModelError, match="hands on consts and carry only"):
        filtering()(marginalize(sequence, "slope")().given({"y": Y}))

    @gen
    def forgotten() -> None:
        """The first state is summed out, and the steps replace it by states that are kept."""
        first = sample("first", dist.Bernoulli(0.3))

        def step(z: Any, _: Any) -> Any:
            z = sample("z", dist.Bernoulli(0.2 + 0.5 * z))
            sample("y", Normal(1.0 * z, 0.3))
            return z, None

        series(step, first)

    with pytest.raises(ModelError, match="hands on another law of 'first' than the steps do"):
        filtering()(marginalize(forgotten, "first")().given({"y": Y}))
