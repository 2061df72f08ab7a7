"""Normal choices integrated out, against dense multivariate normal algebra without rounding (`joint_normal`).

Double precision is held to 1e-9 of what is large: one, the log density, the derivative itself. Single precision is
held to the textbook's algorithm in single precision (`normal_textbook`). Data may lie a thousand standard deviations
from where the prior has them. Hypothesis draws the numbers (derandomised); set WEFT_MARGINALS to try more of them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.scipy.stats import multivariate_normal as stats_of_jax
from numpyro.distributions import MultivariateNormal, Normal
from scipy import stats
from weft.inference import Draws, filtering, smc
from weft.ppl import ModelError

from linear_gaussian import CASES, Case, all_three, single
from normal_graphs import random_cases
from normal_textbook import TEXTBOOK
from weft import explain, factor, gen, marginalize, recover, sample

pytestmark = [
    pytest.mark.usefixtures("x64", "quick"),
    pytest.mark.slow,  # once is enough: not in every lane
]

KEY = jax.random.key(3)
GRAPH_SEEDS = [1, 5, 10, 16]


def near(found: Any, right: Any, tol: float, scale: float = 1.0) -> None:
    """Within `tol` of the larger of one and `scale`."""
    np.testing.assert_allclose(found, right, rtol=0, atol=tol * max(1.0, scale))


def check_density(case: Case, found: Any, exact: Any, tol: float, p: Any = None) -> None:
    """Value, gradient and perhaps Hessian; the derivatives are by relative changes of the parameters.

    What is allowed is relative to the largest of one, the value and the entries of the derivative itself.
    """
    unit = np.array([abs(v) or 1.0 for v in (p or case.p).values()])
    units = 1.0, unit, np.outer(unit, unit)
    for value, right, u in zip(
        found, (exact.value, exact.gradient, exact.hessian), units, strict=False
    ):
        size = max(abs(exact.value), np.max(np.abs(right * u)))
        near(np.asarray(value, float) * u, right * u, tol, size)


def arrays(values: Any) -> dict[str, jax.Array]:
    kinds = {k: jax.dtypes.canonicalize_dtype(np.asarray(v).dtype) for k, v in values.items()}
    return {k: jnp.asarray(np.asarray(v, kinds[k])) for k, v in values.items()}


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if not (c.components or c.inside or not c.means)]
)
def test_the_oracle_is_of_the_same_program(name: str) -> None:
    """log p(y) = log p(z, y) - log p(z | y) at the conditional mean z, with Weft's density of the whole program.

    This holds today and for ever: where a test below fails, it is not the oracle. The determinant of a conditional
    covariance in double precision is what limits it.
    """
    case = CASES[name]
    data = case.draw()
    exact = case.answer(data, derivatives=False)
    latents = {a: jnp.asarray(v).reshape(case.shape(a)) for a, v in exact.mean.items()}
    whole = case.joint_density(arrays(case.p), arrays(data), latents)
    _, log_det = np.linalg.slogdet(2 * np.pi * exact.cov)
    near(whole, exact.value - 0.5 * case.power * log_det, 1e-7)


CURVED = {  # whose Hessian is compared, too, beside all that hypothesis tries below
    "plate_of_known_mean",
    "crossed_grid",
    "crossed_slopes",
    "slopes_by_precision",
    "collinear_columns",
    "companion",
    "gathering_carry",
    "inputs",
    "states_that_meet",
    "a_series_a_lane",
    "switching_given_the_switch",
    "a_choice_of_two_that_shifts",
    "common_variance",
}


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_hessian(name: str) -> None:
    case = CASES[name]
    data = case.draw()
    run = case.derivatives if name in CURVED or name in TEXTBOOK else case.slope
    found = run(arrays(case.p), arrays(case.x), arrays(data))
    check_density(case, found, case.answer(data, addresses=(), filtered=()), 1e-9)


MEANS = [(n, "marginals") for n, c in CASES.items() if c.means]
MEANS += [(n, "filtered") for n, c in CASES.items() if c.filtered]


@pytest.mark.parametrize(("name", "sites"), MEANS)
def test_means_of_what_is_integrated_out(name: str, sites: str) -> None:
    """Smoothing and filtering means, within 1e-9 of the scale of the largest."""
    case = CASES[name]
    data = case.draw()
    exact = case.answer(data, derivatives=False)
    right = exact.mean if sites == "marginals" else exact.filtered
    found = case.recovered(sites)(KEY, arrays(case.p), arrays(case.x), arrays(data))
    for a, v in right.items():
        near(found[a][0], v, 1e-9, np.abs(v).max())


COVARIANCES = [  # several numbers to an element, elements read by an index, gaps, finite choices beside
    "nested_plates",
    "crossed_slopes",
    "seen_in_part",
    "companion",
    "series_of_a_common_mean",
    "a_choice_of_two_that_shifts",
]


def blocks(cov: np.ndarray, exact: Any, found: Any) -> dict[str, np.ndarray]:
    """The blocks of a covariance matrix that belong to each element of each choice, in one row."""
    flat, at = {}, 0
    for a, mean in exact.mean.items():
        n = found[a].size // mean.size
        starts = range(at, at + mean.size, n)
        flat[a] = np.concatenate([cov[i : i + n, i : i + n].ravel() for i in starts])
        at += mean.size
    return flat


@pytest.mark.parametrize("name", COVARIANCES)
def test_covariances_of_what_is_integrated_out(name: str) -> None:
    """Posterior covariances, to 1e-9 of the largest."""
    case = CASES[name]
    data = case.draw()
    exact = case.answer(data, derivatives=False, filtered=())
    found = case.recovered("covariances")(KEY, arrays(case.p), arrays(case.x), arrays(data))
    for a, v in blocks(exact.cov, exact, found).items():
        near(found[a][0], v, 1e-9, np.abs(v).max())


def test_filtered_covariances() -> None:
    """At each step they are the posterior covariances given the data up to it."""
    case = CASES["gaps_left_out"]
    data = case.draw()
    (address,) = case.filtered
    here = arrays(case.p), arrays(case.x), arrays(data)
    found = case.recovered("filtered_covariances")(KEY, *here)
    for t in range(len(found[address][0])):
        where = {a: w & (np.arange(len(w)) <= t) for a, w in case.where.items()}
        exact = case.answer(data, where=where, derivatives=False, filtered=())
        right = blocks(exact.cov, exact, found)[address][t]
        near(found[address][0, t], right, 1e-9, right)


# --- random programs ------------------------------------------------------------------------------

GRAPHS = random_cases(GRAPH_SEEDS)


@pytest.mark.parametrize("name", GRAPHS)
def test_random_graphs(name: str) -> None:
    """Value and gradient of random programs, and the means of what is integrated out; none is refused."""
    case = GRAPHS[name]
    data = case.draw()
    exact = case.answer(data)
    check_density(case, case.slope(arrays(case.p), {}, arrays(data)), exact, 1e-9)
    found = case.recovered("marginals")(KEY, arrays(case.p), {}, arrays(data))
    for a, v in exact.mean.items():
        near(found[a][0], v, 1e-9, np.abs(v).max())


# --- joint draws ----------------------------------------------------------------------------------

DRAWN = [
    "nested_plates",
    "seen_in_part",
    "crossed_by_index",
    "crossed_slopes",
    "regression_of_30",
    "gathering_carry",
    "bank_of_states",
    "trend_with_regressors",
    "gaps_integrated_out",
    "many_states_in_a_scan",
    "series_of_a_common_mean",
    "a_choice_of_two_that_shifts",
]


@pytest.mark.parametrize("name", DRAWN)
def test_joint_draws(name: str) -> None:
    """Draws have the conditional mean and covariance, every direction on its own scale.

    Null: draws in units of the conditional covariance are independent standard normals w. The sum of their squares is
    chi-square, and so is n times the squared mean. The squared sample correlations, times n, are so in the limit. For a
    mixture only the mean is tested. Every p-value is above 1e-7: 31 of them make one false alarm in 300,000 keys.
    """
    check_draws(CASES[name])


def check_draws(case: Case) -> None:
    n, data = 2000, case.draw()
    exact = case.answer(data, derivatives=False, filtered=())
    found = case.recovered("sample", n)(KEY, arrays(case.p), arrays(case.x), arrays(data))
    away = np.concatenate([found[a] for a in exact.mean], 1) - np.concatenate(
        [*exact.mean.values()]
    )
    known = np.diag(exact.cov) == 0.0
    np.testing.assert_allclose(away[:, known], 0.0, atol=1e-12)
    sd = np.sqrt(np.diag(exact.cov))[~known]
    root = np.linalg.cholesky(exact.cov[np.ix_(~known, ~known)] / np.outer(sd, sd))
    w = np.linalg.solve(root, (away[:, ~known] / sd).T)
    d = len(w)
    p_values = {"mean": stats.chi2(d).sf(n * np.sum(w.mean(1) ** 2))}
    if not case.components:
        total, squares = stats.chi2(n * d), np.sum(w**2)
        p_values["scale"] = 2 * min(total.sf(squares), total.cdf(squares))
        products = np.sqrt(n) * np.corrcoef(w)[np.triu_indices(d, 1)]
        p_values["correlations"] = stats.chi2(len(products)).sf(np.sum(products**2))
    assert min(p_values.values()) > 1e-7, p_values


# --- steps composed in a tree ---------------------------------------------------------------------

IN_A_TREE = [
    "bank_of_states",
    "trend_with_regressors",
    "gaps_integrated_out",
    "many_states_in_a_scan",
    "chain_in_a_step",
]


@pytest.mark.parametrize("name", IN_A_TREE)
def test_steps_in_a_tree(name: str) -> None:
    """Value, gradient and conditional means."""
    case = dataclasses.replace(CASES[name], parallel=True)
    data = case.draw()
    exact = case.answer(data, filtered=())
    check_density(case, case.slope(arrays(case.p), arrays(case.x), arrays(data)), exact, 1e-9)
    found = case.recovered("marginals")(KEY, arrays(case.p), arrays(case.x), arrays(data))
    for a, v in exact.mean.items():
        near(found[a][0], v, 1e-9, np.abs(v).max())


@pytest.mark.parametrize("name", ["companion", "series_of_a_common_mean"])
def test_joint_draws_in_a_tree(name: str) -> None:
    check_draws(dataclasses.replace(CASES[name], parallel=True))


@gen
def drift(num_steps):
    """A level and its slope, beside a chain of two values in the same carry."""
    noise = sample("noise", dist.HalfNormal(1.0))

    def step(carry, _):
        level, slope, z = carry
        z = sample("z", dist.Bernoulli(jnp.where(z == 1, 0.9, 0.2)))
        sample("w", dist.Normal(1.0 * z, noise))
        level = sample("level", dist.Normal(level + slope, 0.5))
        sample("y", dist.Normal(level, noise))
        return (level, slope, z), None

    first = sample("level_0", dist.Normal(0.0, 3.0)), sample("slope", dist.Normal(0.0, 1.0))
    jax.lax.scan(step, (*first, 0), length=num_steps)


def loops(jaxpr: Any) -> list[int]:
    """The lengths of all loops in a jaxpr."""
    found = []
    for eqn in jaxpr.eqns:
        assert eqn.primitive.name != "while"
        if eqn.primitive.name == "scan":
            found.append(eqn.params["length"])
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += loops(inner)
    return found


def test_the_depth_of_a_tree() -> None:
    """A loop has at most as many steps as the tree has levels. Finite and normal choices may be in one carry."""
    n, names = 100, ("level_0", "slope", "level", "z")
    data = {a: jax.random.normal(jax.random.key(i), (n,)) for i, a in enumerate("yw")}
    found = []
    for parallel in (False, True):
        target = marginalize(drift, *names, parallel=parallel)(n).given(data)
        run = jax.value_and_grad(lambda s, t=target: t.log_density({"noise": s}))
        found.append(run(jnp.array(0.7)))
    assert max(loops(jax.make_jaxpr(run)(0.7).jaxpr), default=0) <= np.log2(n)
    near(found[1][0], found[0][0], 1e-9, abs(found[0][0]))
    near(found[1][1], found[0][1], 1e-9, abs(found[0][1]))
    text = str(explain(target))
    assert "Kalman filter, 100 steps in a tree" in text
    assert "chain of order 1, 100 steps in a tree" in text


# --- numbers that hypothesis draws ----------------------------------------------------------------

law = settings(
    max_examples=int(os.environ.get("WEFT_MARGINALS", "4")),
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
)
RANGES = {"prior": (-3.0, 4.0), "step": (-3.0, 2.0), "noise": (-3.0, 1.0)}  # of log10 of an sd
KINDS = {"spread": "prior", "vague": "prior", "width": "prior", "noise": "noise"}
KINDS |= dict.fromkeys(("tau", "q", "r", "s", "t"), "step")
HIERARCHIES = {"plate", "nested_plates", "traced_index", "crossed_by_index"}
LARGEST_RATIO = 1e6  # of two sds
UNIT = st.floats(0.0, 1.0, width=32)


def numbers(case: Case, u: list[float], far: float) -> tuple[dict[str, float], dict[str, float]]:
    """Parameters of a case, and those that data are drawn with: `far` times as wide at the top."""
    sds, p = {}, {}
    for (name, usual), v in zip(case.p.items(), u, strict=False):
        kind = KINDS.get(name, "step" if case.name in HIERARCHIES else "coefficient")
        if kind == "coefficient":
            p[name] = usual * (2 * v - 1)
        else:
            low, high = RANGES[kind]
            sds[name] = 10 ** (low + (high - low) * v)
    least = max([1.0, *sds.values()]) / LARGEST_RATIO
    p |= {name: max(v, least) for name, v in sds.items()}
    p = {name: float(single(p[name])) for name in case.p}
    top = next((n for n in ("spread", "vague", "width", "s", "q") if n in p), None)
    return p, {**p, top: far * p[top]} if top else p


def drawn(test: Callable[..., None]) -> Callable[..., None]:
    """Give a test of a case its numbers, data and gaps."""

    @pytest.mark.parametrize("name", TEXTBOOK)
    @law
    @given(
        u=st.lists(UNIT, min_size=6, max_size=6),
        far=st.sampled_from([1.0, 30.0, 1e3]),
        seed=st.integers(0, 99),
    )
    def run(name: str, u: list[float], far: float, seed: int) -> None:
        case = CASES[name]
        p, wide = numbers(case, u, far)
        data = case.draw(seed, wide)
        rng = np.random.default_rng(seed)
        where = {a: rng.uniform(size=w.shape) < 0.6 for a, w in case.where.items()}
        for w in where.values():
            w[seed % len(w)] = True
        test(case, p, data, where)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@functools.cache
def means(name: str) -> Callable[..., Any]:
    return CASES[name].recovered("marginals")


@drawn
def test_any_numbers_conditional_means(case: Case, p: Any, data: Any, where: Any) -> None:
    """Means to 1e-9 of their conditional sds, and what a stable algorithm loses.

    That is some roundings of the largest number, times the condition number of the least squares problem: the ratio of
    the largest prior sd to the smallest conditional one.
    """
    found = means(case.name)(KEY, *map(arrays, (p, case.x, data, where)))
    exact = case.answer(data, p, where=where, filtered=(), derivatives=False)
    sds = np.sqrt(np.diag(exact.cov))
    flat = np.concatenate([*exact.mean.values()])
    largest = max(np.abs(v).max() for v in [flat, *data.values()])
    lost = 32 * 2.0**-53 * largest * exact.prior.max() / sds.min()
    away = np.concatenate([found[a][0] for a in exact.mean]) - flat
    assert (np.abs(away) <= 1e-9 * sds + lost).all(), p


@functools.cache
def rounding(name: str) -> Callable[..., Any]:
    """The textbook's errors in single precision: the largest of 32, of inputs that differ by a rounding each."""
    run = jax.vmap(all_three(TEXTBOOK[name], list(CASES[name].p)), (0, None, 0, None))
    both = jax.jit(run)

    def errors(p: Any, x: Any, data: Any, where: Any) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        ulps = lambda v: single(v * (1 + rng.integers(-1, 2, (32, *np.shape(v))) * 2.0**-23))  # noqa: E731
        p, data = ({a: ulps(v) for a, v in values.items()} for values in (p, data))
        found = []
        for double in (False, True):
            with jax.enable_x64(double):
                found.append(both(*map(arrays, (p, x, data, where))))
        away = [np.abs(np.asarray(a, float) - np.asarray(b)) for a, b in zip(*found, strict=True)]
        return [np.where(np.isnan(v), np.inf, v).max(0) for v in away]

    return errors


@drawn
def test_any_numbers_in_both_precisions(case: Case, p: Any, data: Any, where: Any) -> None:
    """Value, gradient and Hessian to 1e-9 in double precision, and to twice the textbook's error in single.

    To the latter come eight roundings of the largest number, and for the value two of the logarithm of each noise: rows
    are in units of their noise, so its logarithm and that of their variance in these units are rounded apart.
    """
    exact = case.answer(data, p, where=where, addresses=(), filtered=())
    found = case.derivatives(*map(arrays, (p, case.x, data, where)))
    check_density(case, found, exact, 1e-9, p)
    allowed = rounding(case.name)(p, case.x, data, where)
    with jax.enable_x64(False):
        found = case.derivatives(*map(arrays, (p, case.x, data, where)))
    unit = np.abs([*p.values()])
    units = 1.0, unit, np.outer(unit, unit)
    right = exact.value, exact.gradient, exact.hessian
    logarithms = abs(np.log(p["noise"])) * sum(v.size for v in data.values()), 0.0, 0.0
    for a, b, error, u, logs in zip(found, right, allowed, units, logarithms, strict=True):
        size = max(1.0, abs(exact.value), np.max(np.abs(b * u)))
        away = np.max(np.abs(np.asarray(a, float) - b) * u)
        assert away <= 2 * np.max(error * u) + 2.0**-24 * (8 * size + 2 * logs), (p, away, size)
        assert np.isfinite(away), p


# --- factors --------------------------------------------------------------------------------------


@gen
def squares(b):
    t = sample("t", Normal(0.0, jnp.array([1.0, 2.0])).to_event(1))

    def row(x, y):
        factor("row", -0.5 * jnp.square(t[0] + x * t[1] - y) - 0.1 * b * t[0] * t[1])

    jax.vmap(row)(jnp.arange(3.0), jnp.array([1.0, 2.0, 0.0]))


@gen
def squares_in_a_scan(b):
    def step(t, _):
        t = sample("t", Normal(b * t, 1.0))
        factor("step", -0.5 * (t - 1.0) ** 2)
        return t, None

    lax.scan(step, 0.0, length=3)


def quadratic(precision: Any, pull: Any, constant: float, log_det: float) -> float:
    solved = np.linalg.solve(precision, pull)
    return constant + pull @ solved / 2 - (np.linalg.slogdet(precision)[1] + log_det) / 2


def test_factors_that_are_squares() -> None:
    """A product and squares of choices in factors, in lanes and in steps."""
    x = np.stack([np.ones(3), np.arange(3.0)], 1)
    y, ones = np.array([1.0, 2.0, 0.0]), np.ones(3)
    side = np.array([[0.0, 0.3], [0.3, 0.0]])
    walk = lambda b: np.eye(3) - b * np.eye(3, k=-1)  # noqa: E731
    cases = {
        squares: lambda b: quadratic(
            np.diag([1, 0.25]) + x.T @ x + b * side, x.T @ y, -y @ y / 2, np.log(4)
        ),
        squares_in_a_scan: lambda b: quadratic(walk(b).T @ walk(b) + np.eye(3), ones, -1.5, 0.0),
    }
    for model, right in cases.items():
        density = lambda b, m=model: marginalize(m, "t")(b).log_density({})  # noqa: E731
        found, slope = jax.value_and_grad(density)(0.9)
        near(found, right(0.9), 1e-9)
        near(slope, (right(0.9 + 1e-5) - right(0.9 - 1e-5)) / 2e-5, 1e-8)


@pytest.mark.parametrize("f", [lambda t: t**3, jnp.exp, jnp.round, lambda t: jnp.clip(t, 0.0) ** 2])
def test_factors_that_are_no_squares_are_refused(f: Any) -> None:
    @gen
    def model():
        factor("g", -f(sample("t", Normal(0.0, 1.0))))

    with pytest.raises(ModelError, match=r"'g' .* is not quadratic in 't'.*test_normal_algebra"):
        marginalize(model, "t")().log_density({})


# --- noise of which an observation reads a part ---------------------------------------------------


@gen
def driven(root, decay, watched):
    """Three states that three numbers of noise drive."""

    def step(x, _):
        x = decay * x + root @ sample("u", Normal(jnp.zeros(3), 1.0).to_event(1))
        sample("y", Normal(watched @ x, 0.1).to_event(1))
        return x, None

    lax.scan(step, jnp.zeros(3), length=4)


@jax.jit
@jax.value_and_grad
def driven_exactly(root: Any, decay: Any, watched: Any, y: Any) -> Any:
    power = lambda t: jnp.diag(decay**t)  # noqa: E731
    rows = [
        jnp.concatenate([watched @ power(t - s) @ root * (s <= t) for s in range(4)], 1)
        for t in range(4)
    ]
    reads = jnp.concatenate(rows)
    spread = reads @ reads.T + 0.01 * jnp.eye(y.size)
    return stats_of_jax.logpdf(y.ravel(), jnp.zeros(y.size), spread)


def test_noise_of_which_rows_read_a_part() -> None:
    """The filter, and the density with its gradient. Noise may be large, or none at all, or none that is seen."""
    rng = np.random.default_rng(0)
    watched, decay = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0]]), np.array([0.9, 0.5, 0.1])
    y, root = rng.normal(size=(4, 2)), np.eye(3) + 0.3 * rng.normal(size=(3, 3))

    def target(root: Any) -> Any:
        return marginalize(driven, "u")(root, decay, watched).given({"y": y})

    both = jax.jit(jax.value_and_grad(lambda root: target(root).log_density({})))
    run = lambda root: smc(filtering(), 2).run(KEY, target(root), progress=False)  # noqa: E731
    filtered = jax.jit(lambda root: run(root).log_evidence)
    for r in (root, 1e3 * root, root * [1, 1, 0], root * [[0], [0], [1]], 0 * root):
        value, gradient = driven_exactly(r, decay, watched, y)
        found = both(r)
        size = max(1.0, abs(value), np.abs(gradient).max())
        near(found[0], value, 1e-9, size)
        near(found[1], gradient, 1e-9, size)
        near(filtered(r), value, 1e-9, size)


# --- no data --------------------------------------------------------------------------------------


@gen
def no_rows(scale):
    mu = sample("mu", Normal(jnp.zeros(2), scale).to_event(1))
    sample("y", Normal(jnp.zeros((0, 2)) @ mu, 1.0))


def test_no_data_say_nothing() -> None:
    target = marginalize(no_rows, "mu")(3.0).given({"y": jnp.zeros(0)})
    draws = Draws(choices={}, stats={"lp": jnp.zeros((1, 1))}, target=target)
    model = marginalize(no_rows, "mu")
    assert target.log_density({}) == 0.0
    for sites, right in {"marginals": np.zeros(2), "covariances": 9 * np.eye(2)}.items():
        found = recover(KEY, model, draws, 3.0, sites=sites).derived["mu"][0, 0]
        np.testing.assert_allclose(found, right, atol=1e-12)


# --- bad input ------------------------------------------------------------------------------------


@gen
def one(scale):
    mu = sample("mu", Normal(0.0, scale))
    sample("y", Normal(mu, 1.0))


@gen
def walk(scale):
    def step(x, _):
        x = sample("mu", Normal(x, scale))
        sample("y", Normal(x, 1.0))
        return x, None

    lax.scan(step, 0.0, length=3)


@gen
def vector(root):
    mu = sample("mu", MultivariateNormal(jnp.zeros(2), scale_tril=root * jnp.eye(2)))
    sample("y", Normal(mu, 1.0))


@pytest.mark.parametrize("model", [one, walk, vector])
def test_a_negative_scale_has_no_density(model: Any) -> None:
    """As in the density of the choice itself. Squared, it would pass for its size."""
    shape = {"one": (), "walk": (3,), "vector": (2,)}[model.name]
    density = lambda s: marginalize(model, "mu")(s).log_density({"y": jnp.ones(shape)})  # noqa: E731
    assert jnp.isfinite(density(0.5))
    assert jnp.isnan(density(-0.5))
