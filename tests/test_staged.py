"""Filters inside programs: both laws of an estimated density, and its derivative, on a chain that can be enumerated.

Bands are five standard errors of 40,000 independent runs; keys are fixed; some 20 numbers are compared.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import filtering, importance, smc, tempering
from weft.ppl import WeftError

from weft import expect, gen, marginal, normalize, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane
NUM, STEPS = 40_000, 3
KEYS = jax.random.split(jax.random.key(5), NUM)
Y = jnp.array([0.5, -1.0, 1.5])


@gen
def chain(stay: Any) -> None:
    """Two states, seen with noise; `stay` is the probability that it stays."""

    def step(z: Any, _: Any) -> Any:
        z = sample("z", dist.Bernoulli(jnp.where(z == 1, stay, 1 - stay)))
        sample("y", dist.Normal(2.0 * z - 1.0, 1.0))
        return z, None

    jax.lax.scan(step, 0, length=STEPS)


@gen
def guess(z: Any, y: Any) -> None:
    sample("z", dist.Bernoulli(jax.nn.sigmoid(2 * y) * 0.8 + 0.1 * z))


FILTERS = {
    "bootstrap": filtering(),
    "guided": filtering(lambda z, t, seen: guess(z, seen["y"])),
}
PATHS = [jnp.array(p) for p in itertools.product((0, 1), repeat=STEPS)]


def joint(stay: Any) -> jax.Array:
    """The density of each path with the data."""
    program = chain(stay)
    return jnp.stack([jnp.exp(program.log_density({"z": z, "y": Y})) for z in PATHS])


def band(values: Any) -> tuple[Any, Any]:
    values = np.asarray(values, np.float64)
    return values.mean(0), values.std(0, ddof=1) / NUM**0.5


@pytest.mark.parametrize("name", FILTERS)
def test_laws_of_a_posterior(name: str) -> None:
    posterior = normalize(chain(0.7).given({"y": Y}), by=smc(FILTERS[name], num_particles=2))
    choices, log_d = jax.jit(jax.vmap(posterior.random_weighted))(KEYS)
    index = choices["z"] @ jnp.array([4, 2, 1])
    here = np.asarray(index[:, None] == jnp.arange(8))
    # E[1/d; x] = 1 for each path, and frequencies are what E[d'] says
    mean, error = band(here * np.exp(-np.asarray(log_d))[:, None])
    assert (np.abs(mean - 1) < 5 * error).all()
    law, law_error = band(here)

    def scored(z: Any) -> Any:
        one = lambda key: posterior.estimate_log_density(key, {"z": z})  # noqa: E731
        return band(jnp.exp(jax.jit(jax.vmap(one))(KEYS)))

    for i in (0, 5, 7):
        mean, error = scored(PATHS[i])
        assert abs(mean - law[i]) < 5 * (error**2 + law_error[i] ** 2) ** 0.5
    # Two particles are few: the law is not yet the posterior.
    exact = np.asarray(joint(0.7) / joint(0.7).sum())
    assert (np.abs(law - exact) > 5 * law_error).any()


@pytest.mark.parametrize("name", FILTERS)
def test_laws_of_a_marginal(name: str) -> None:
    evidence = marginal(chain(0.7), keep="y", by=smc(FILTERS[name], num_particles=2))
    one = lambda key: evidence.estimate_log_density(key, {"y": Y})  # noqa: E731
    mean, error = band(jnp.exp(jax.jit(jax.vmap(one))(KEYS)))
    assert abs(mean - float(joint(0.7).sum())) < 5 * error
    # E[1/d | y] = 1/p(y), averaged over the draws of y by their own law: E[p(y)/d] = 1
    choices, log_d = jax.jit(jax.vmap(evidence.random_weighted))(KEYS)

    def log_exact(y: Any) -> Any:
        program = chain(0.7)
        terms = jnp.stack([program.log_density({"z": z, "y": y}) for z in PATHS])
        return jax.nn.logsumexp(terms)

    ratio = jnp.exp(jax.jit(jax.vmap(log_exact))(choices["y"]) - log_d)
    mean, error = band(ratio)
    assert abs(mean - 1) < 5 * error


@pytest.mark.parametrize("by", [smc(filtering(), 2), importance(num_particles=2)])
def test_runs_without_a_possible_particle_weigh_nothing(by: Any) -> None:
    """Most runs are such, and weights with the posterior as a proposal are unbiased all the same, by enumeration."""
    stays, emits = np.array([[0.9, 0.1], [0.1, 0.9]]), np.array([[1.0, 0.0], [0.5, 0.5]])

    @gen
    def strict() -> None:
        def step(z: Any, _: Any) -> Any:
            z = sample("z", dist.Categorical(jnp.asarray(stays)[z]))
            sample("y", dist.Categorical(jnp.asarray(emits)[z]))
            return z, None

        jax.lax.scan(step, 0, length=3)

    target = strict().given({"y": jnp.array([0, 1, 0])})
    exact = 0.0
    for a, b, c in np.ndindex(2, 2, 2):
        exact += stays[0, a] * emits[a, 0] * stays[a, b] * emits[b, 1] * stays[b, c] * emits[c, 0]
    posterior = normalize(target, by=by)

    def weight(key: Any) -> Any:
        choices, log_d = posterior.random_weighted(key)
        return jnp.exp(target.log_density(choices) - log_d), log_d

    weights, log_d = jax.jit(jax.vmap(weight))(KEYS)
    assert np.mean(log_d == np.inf) > 0.5
    mean, error = band(weights)
    assert abs(mean - exact) < 5 * error
    impossible = {"z": jnp.array([0, 0, 1])}
    assert posterior.estimate_log_density(KEYS[0], impossible) == -np.inf


def test_derivative_of_an_expectation() -> None:
    """Through draws of states and of ancestors, by their scores."""

    def estimate(stay: Any) -> Any:
        evidence = marginal(chain(stay), keep="y", by=smc(filtering(), num_particles=2))
        return jnp.exp(evidence.log_density({"y": Y}))

    gradients = jax.jit(jax.vmap(jax.grad(expect(estimate), 1), (0, None)))(KEYS, 0.7)
    mean, error = band(gradients)
    exact = float(jax.grad(lambda s: joint(s).sum())(0.7))
    assert error < 0.1 * abs(exact)
    assert abs(mean - exact) < 5 * error


def test_what_does_not_run_inside_a_program() -> None:
    target = chain(0.7).given({"y": Y})
    with pytest.raises(WeftError, match="takes filtering"):
        normalize(target, by=smc(tempering(), num_particles=4)).simulate(KEYS[0])
    with pytest.raises(WeftError, match="'optimal' has no density"):
        normalize(target, by=smc(filtering("optimal"), 4)).simulate(KEYS[0])
