"""What Weft adds to a program, counted: the floating-point operations of the compiled program, by XLA's cost analysis.

At most 1.02 times those of hand-written JAX with the same formulas, and never more than NumPyro's. Where lanes of a
vmap depend on mapped values, Weft gives each its own key and hand-written code may use one for all: there the
comparison is with hand-written code that derives a key a lane too, and NumPyro is granted the price of those keys.

A loop's body is counted once by XLA, so the state-space model is taken unrolled.

Choices that are summed out cost at most 1.1 times what the sum costs when written by hand with `factor` in the same
model. There each step of a loop counts, at what its body costs in a loop. A chain of normal choices costs at most 1.5
times a Kalman filter by hand that loses digits where a start is vague. With its derivative, that of Joseph's form, it
costs 2.2 times. A Rao-Blackwellised filter costs at most three times a Kalman filter by hand for each of its particles.
Rows that read their group by an index cost at most ten times sums by hand: those square what they sum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from benchmarks.costs import count_equations, counts
from benchmarks.gaussians import (
    bank_filters,
    chain_densities,
    group_densities,
    slope_densities,
    trend_densities,
)
from benchmarks.marginals import (
    chain,
    chain_data,
    chain_prior,
    example_data,
    example_prior,
    in_full,
    mixture_model,
)
from benchmarks.workloads import WORKLOADS
from weft import gen, marginalize, repeat, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane
OPERATIONS = ("log density", "gradient", "simulate")
LAYOUTS = ("one site", "vmap", "per image", "gradients per image")
GRADIENTS = tuple(f"bound's gradient, {layout}" for layout in LAYOUTS)
CASES = [
    (workload, operation)
    for workload, operations in {
        "eight schools": OPERATIONS,
        "logistic regression, 10,000 rows": OPERATIONS,
        "state-space model, 8 steps unrolled": OPERATIONS,
        "variational autoencoder": GRADIENTS,
        "variational autoencoder, 10 latents": GRADIENTS,
    }.items()
    for operation in operations
]


@pytest.mark.parametrize(("workload", "operation"), CASES)
def test_flops_are_those_of_hand_written_code(workload, operation):
    op = WORKLOADS[workload]()[operation]
    flops = {system: counts(f, op.args)["flops"] for system, f in op.versions.items()}
    like = flops.get("hand, a key a lane", flops["hand"])
    assert flops["weft"] <= 1.02 * like, flops
    assert flops["weft"] <= flops["numpyro"] + max(like - flops["hand"], 0), flops


def test_lanes_cost_no_equations():
    """A vmap of a thousand lanes is traced as often as one of two."""
    build = WORKLOADS["logistic regression, 10,000 rows"]
    op = build()["log density"]
    small = (op.args[0], op.args[1][:2], op.args[2][:2])
    weft = op.versions["weft"]
    assert count_equations(jax.make_jaxpr(weft)(*op.args)) == count_equations(
        jax.make_jaxpr(weft)(*small)
    )


def test_loops_count_in_full():
    def triangle(x):
        def row(total, i):
            return jax.lax.scan(lambda t, j: (t + jnp.sin(j * x), None), total, jnp.arange(5.0))[
                0
            ], None

        return jax.lax.scan(row, 0.0, jnp.arange(7))[0]

    count = in_full(triangle, (jnp.array(2.0),))
    assert count["raw"] < 20
    assert 70 <= count["flops"] < 150  # 35 multiplications, 35 additions, and the counters


def test_factors_and_solves_count():
    """XLA has no flops for what it leaves to LAPACK."""

    def solve(a, b):
        return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(a), b, lower=True)

    args = jnp.eye(6) + jnp.zeros((10, 6, 6)), jnp.ones((10, 6, 4))
    count = in_full(solve, args)["flops"] - counts(solve, args)["flops"]
    assert count == 10 * (6**3 / 3 + 6**2 * 4)


SUMS = {
    "hmm_example": lambda: chain(example_prior, *example_data(), move=False),
    "a chain of 3 states": lambda: chain(chain_prior, *chain_data(100), move=True),
    "a mixture": lambda: mixture_model(100),
}


@pytest.mark.parametrize("operation", ["log density", "gradient"])
@pytest.mark.parametrize("model", SUMS)
def test_sums_cost_what_they_cost_by_hand(model, operation):
    op = SUMS[model]()[operation]
    by_hand = next(iter(op.versions))
    flops = {name: in_full(op.versions[name], op.args)["flops"] for name in (by_hand, "weft")}
    assert flops["weft"] <= 1.1 * flops[by_hand], flops


NORMAL = {
    "four states, two observed": (lambda: chain_densities(2, 1000), 1.5, 2.2),
    "a trend with regressors": (lambda: trend_densities(1000), 0.5, 0.6),
}


@pytest.mark.parametrize("model", NORMAL)
def test_chains_of_normal_choices_cost_what_filters_cost(model):
    build, *most = NORMAL[model]
    for op, limit in zip(build().values(), most, strict=True):
        by_hand, weft = (
            in_full(op.versions[k], op.args)["flops"] for k in ("Kalman by hand", "weft")
        )
        assert weft <= limit * by_hand, (weft, by_hand)


@pytest.mark.parametrize(("part", "limit"), [("log density", 2.1), ("100 particles", 3.0)])
def test_noise_that_drives_states_costs_what_a_filter_costs(part, limit):
    """A bank of five states, by a filter that knows that its matrix is diagonal. With particles, a filter for each."""
    op = bank_filters(64)[part]
    by_hand, weft = (in_full(f, op.args)["flops"] for f in op.versions.values())
    assert weft <= limit * by_hand, (weft, by_hand)


@pytest.mark.parametrize("densities", [group_densities, slope_densities])
def test_groups_of_rows_cost_what_sums_cost(densities):
    for operation, op in densities(20, 15).items():
        flops = {name: in_full(f, op.args)["flops"] for name, f in op.versions.items()}
        assert flops["weft"] <= 10 * flops["sums by hand"], (operation, flops)


def test_groups_of_known_mean_cost_what_sums_cost():
    """Lines of groups whose law is known; data and an index of NumPy's that are constants; by the noise's scale."""
    cov, rng, g = (
        np.array([[0.5, -0.3], [-0.3, 0.4]]),
        np.random.default_rng(5),
        np.arange(300) % 20,
    )
    x, y = jnp.array(rng.normal(size=(2, 300)), jnp.float32)
    precision = np.linalg.inv(cov)

    @gen
    def lines(sigma):
        law = dist.MultivariateNormal(jnp.zeros(2), jnp.array(cov))
        c = repeat(lambda: sample("c", law), 20)
        sample("y", dist.Normal(c[g, 0] + c[g, 1] * x, sigma))

    def by_hand(sigma):
        add = lambda v: jnp.zeros(20).at[g].add(v) / sigma**2  # noqa: E731
        a, b, d = add(jnp.ones(300)), add(jnp.array(x)), add(jnp.array(x**2))
        a, b, d = a + precision[0, 0], b + precision[0, 1], d + precision[1, 1]
        u, v, det = add(jnp.array(y)), add(jnp.array(x * y)), a * d - b**2
        each = (d * u**2 - 2 * b * u * v + a * v**2) / det - jnp.log(det)
        rest = jnp.sum(y**2) / sigma**2 + 600 * jnp.log(sigma) + 300 * jnp.log(2 * jnp.pi)
        return 0.5 * (jnp.sum(each) - 20 * np.linalg.slogdet(cov)[1] - rest)

    weft = lambda s: marginalize(lines, "c")(s).log_density({"y": jnp.array(y)})  # noqa: E731
    assert jnp.allclose(weft(0.5), by_hand(0.5), rtol=1e-5)
    flops = [in_full(jax.value_and_grad(f), (0.5,))["flops"] for f in (weft, by_hand)]
    assert flops[0] <= 10 * flops[1], flops


def test_crossed_groups_cost_rows_times_a_square():
    """Of 40 groups crossed with 20 the smaller ones are integrated jointly: that takes rows times the square of 20.

    It takes 16 times that. A cube for each group would take a hundred times.
    """
    rng, n = np.random.default_rng(6), 200
    a, b, y = (
        jnp.array(x)
        for x in (rng.integers(40, size=n), rng.integers(20, size=n), rng.normal(size=n))
    )

    @gen
    def crossed(scale):
        here = sample("here", dist.Normal(0.0, 1.0).expand([40]))
        there = sample("there", dist.Normal(0.0, 1.0).expand([20]))
        sample("y", dist.Normal(here[a] + there[b], scale))

    density = lambda s, y: marginalize(crossed, "here", "there")(s).log_density({"y": y})  # noqa: E731
    cov = 1.0 * (a[:, None] == a) + 1.0 * (b[:, None] == b) + 0.25 * jnp.eye(n)
    right = jax.scipy.stats.multivariate_normal.logpdf(y, jnp.zeros(n), cov)
    assert jnp.allclose(density(0.5, y), right, rtol=1e-5)
    flops = in_full(density, (0.5, y))["flops"]
    assert flops <= 25 * n * 20**2, flops / (n * 20**2)
