"""State-space models written with `lax.scan` score exactly as the recursion does.

Everything here is deterministic and in double precision: 1e-8 relative. The oracles are Kalman's, the forward and the
Viterbi recursion of `tests/refcases/ssm`, and densities written out in NumPy.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from examples.state_space import (
    HiddenMarkov,
    LinearGaussian,
    forward,
    hidden_markov,
    kalman,
    linear_gaussian,
)

SSM = Path(__file__).parent / "refcases" / "ssm"
RTOL = 1e-8


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def load(name):
    case = json.loads((SSM / f"{name}.json").read_text())
    kind = HiddenMarkov if name.startswith("hmm") else LinearGaussian
    arrays = {k: np.asarray(v, float) for k, v in case["params"].items()}
    reference = {k: np.asarray(v) for k, v in case.items() if isinstance(v, list | float)}
    return kind(**arrays), reference, case["T"]


def on_device(params):
    return jax.tree.map(jnp.asarray, params)


@pytest.fixture(params=["lgssm_dim1", "lgssm_dim4"])
def lgssm(request):
    return load(request.param)


@pytest.fixture
def hmm():
    return load("hmm5")


def joint_by_hand(p, x, y):
    """log p(x, y) of a linear-Gaussian model, one term at a time."""
    total = multivariate_normal.logpdf(x[0], p.m0, p.P0)
    for t in range(1, len(x)):
        total += multivariate_normal.logpdf(x[t], p.A @ x[t - 1] + p.b, p.Q)
    return total + sum(
        multivariate_normal.logpdf(y[t], p.C @ x[t] + p.d, p.R) for t in range(len(x))
    )


def smoother_log_density(p, reference, x):
    """log p(x | y) from the filter: p(x_T | y_{0:T}) times p(x_t | x_{t+1}, y_{0:t}) backwards."""
    means, covs = reference["filter_mean"], reference["filter_cov"]
    total = multivariate_normal.logpdf(x[-1], means[-1], covs[-1])
    for t in range(len(x) - 1):
        predicted = p.A @ covs[t] @ p.A.T + p.Q
        gain = np.linalg.solve(predicted, p.A @ covs[t]).T
        mean = means[t] + gain @ (x[t + 1] - p.A @ means[t] - p.b)
        total += multivariate_normal.logpdf(x[t], mean, covs[t] - gain @ predicted @ gain.T)
    return total


def test_linear_gaussian_joint_density_equals_the_terms_written_out(lgssm):
    p, reference, steps = lgssm
    program = linear_gaussian(on_device(p), steps)
    for x in (reference["x_true"], reference["smoother_mean"], np.zeros_like(reference["x_true"])):
        got = program.log_density({"x": x, "y": reference["y"]})
        np.testing.assert_allclose(got, joint_by_hand(p, x, reference["y"]), rtol=RTOL)


def test_linear_gaussian_joint_over_smoother_is_the_likelihood(lgssm):
    """log p(y) = log p(x, y) - log p(x | y) whatever x is."""
    p, reference, steps = lgssm
    target = linear_gaussian(on_device(p), steps).given({"y": reference["y"]})
    for x in (reference["x_true"], reference["smoother_mean"] + 0.5):
        evidence = target.log_density({"x": x}) - smoother_log_density(p, reference, x)
        # The filter in the file is given to 14 digits, and x off the posterior costs some of them.
        np.testing.assert_allclose(evidence, reference["log_likelihood"], rtol=RTOL)


def test_kalman_program_scores_as_the_recursion(lgssm):
    p, reference, steps = lgssm
    program = kalman(on_device(p), steps)
    terms = program.log_densities({"y": reference["y"]})["y"]
    np.testing.assert_allclose(terms, reference["log_likelihood_increments"], rtol=RTOL)
    total = program.log_density({"y": reference["y"]})
    np.testing.assert_allclose(total, reference["log_likelihood"], rtol=RTOL)


@pytest.mark.parametrize("matrix", ["Q", "R"])
def test_kalman_program_has_the_recursion_s_gradient(lgssm, matrix):
    p, reference, steps = lgssm
    p = on_device(p)

    def log_likelihood(log_scale):
        scaled = p._replace(**{matrix: jnp.exp(log_scale) * getattr(p, matrix)})
        return kalman(scaled, steps).log_density({"y": reference["y"]})

    gradient = jax.grad(log_likelihood)(0.0)
    np.testing.assert_allclose(gradient, reference[f"dlogp_dlogscale_{matrix}"], rtol=RTOL)


def test_linear_gaussian_simulation_scores_itself(lgssm):
    p, _, steps = lgssm
    program = linear_gaussian(on_device(p), steps)
    trace = program.simulate(jax.random.key(0))
    assert trace.choices["x"].shape == (steps, len(p.m0))
    np.testing.assert_allclose(trace.value, trace.choices["y"])
    np.testing.assert_allclose(trace.log_density, program.log_density(trace.choices), rtol=RTOL)
    by_hand = joint_by_hand(p, np.asarray(trace.choices["x"]), np.asarray(trace.choices["y"]))
    np.testing.assert_allclose(trace.log_density, by_hand, rtol=RTOL)


def test_lanes_of_a_vmapped_series_are_independent_series(lgssm):
    p, reference, steps = lgssm
    p = on_device(p)
    series = jax.vmap(lambda shift: kalman(p._replace(d=p.d + shift), steps))(jnp.array([0.0, 1.0]))
    y = np.stack([reference["y"], reference["y"] + 1.0])
    total = series.log_density({"y": y})
    np.testing.assert_allclose(total, 2 * reference["log_likelihood"], rtol=RTOL)


def hmm_joint_by_hand(p, z, y):
    total = np.log(p.pi[z[0]]) + np.log(p.P[z[:-1], z[1:]]).sum()
    return total + norm.logpdf(y, p.mu[z], p.sd[z]).sum()


def test_hidden_markov_joint_density_equals_the_terms_written_out(hmm):
    p, reference, steps = hmm
    program = hidden_markov(on_device(p), steps)
    for z in (reference["z_true"], reference["viterbi_path"], np.arange(steps) % 5):
        got = program.log_density({"z": z, "y": reference["y"]})
        np.testing.assert_allclose(got, hmm_joint_by_hand(p, z, reference["y"]), rtol=RTOL)
    best = program.log_density({"z": reference["viterbi_path"], "y": reference["y"]})
    np.testing.assert_allclose(best, reference["viterbi_logp"], rtol=RTOL)


def test_hidden_markov_joint_over_posterior_is_the_likelihood(hmm):
    """p(z | y) backwards from the filter: p(z_t | z_{t+1}, y_{0:t}) is filter_t[i] P[i, z_{t+1}], normalised."""
    p, reference, steps = hmm
    target = hidden_markov(on_device(p), steps).given({"y": reference["y"]})
    for z in (reference["z_true"], reference["viterbi_path"]):
        posterior = np.log(reference["filter_prob"][-1][z[-1]])
        for t in range(steps - 1):
            weights = reference["filter_prob"][t] * p.P[:, z[t + 1]]
            posterior += np.log(weights[z[t]] / weights.sum())
        evidence = target.log_density({"z": z}) - posterior
        np.testing.assert_allclose(evidence, reference["log_likelihood"], rtol=RTOL)


def test_hidden_markov_enumerated_is_the_forward_recursion(hmm):
    """All 5^4 paths of the first four steps, summed."""
    p, reference, _ = hmm
    y = reference["y"][:4]
    paths = jnp.stack(jnp.meshgrid(*[jnp.arange(5)] * 4, indexing="ij"), -1).reshape(-1, 4)
    target = hidden_markov(on_device(p), 4).given({"y": y})
    total = jax.nn.logsumexp(jax.vmap(lambda z: target.log_density({"z": z}))(paths))
    np.testing.assert_allclose(total, reference["log_likelihood_increments"][:4].sum(), rtol=RTOL)
    np.testing.assert_allclose(total, forward(on_device(p), 4).log_density({"y": y}), rtol=RTOL)


def test_forward_program_scores_as_the_recursion(hmm):
    p, reference, steps = hmm
    program = forward(on_device(p), steps)
    terms = program.log_densities({"y": reference["y"]})["y"]
    np.testing.assert_allclose(terms, reference["log_likelihood_increments"], rtol=RTOL)
    total = program.log_density({"y": reference["y"]})
    np.testing.assert_allclose(total, reference["log_likelihood"], rtol=RTOL)
