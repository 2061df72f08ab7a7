"""Kernels against the laws they leave as they are, and chains of them against exact posteriors.

Statistics have fixed keys; bands are 5.5 standard errors, 4e-8 for each number, and p-values above 1e-7:
together, some 200 numbers and 15 p-values, below 1e-4 for the file.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import lax
from scipy import stats
from weft.inference import enumeration, importance, mcmc
from weft.inference.markov import kernel as moves
from weft.inference.markov import metropolis
from weft.inference.results.diagnostics import mcse
from weft.ppl.stage.errors import AddressError, DensityError, ModelError, WeftError

from weft import (
    condition,
    deterministic,
    factor,
    gen,
    kernels,
    marginal,
    mask,
    observed,
    sample,
    scale,
)

pytestmark = pytest.mark.slow
KEY = jax.random.key(0)


@functools.cache
def exact_draws(draw: Any, n: int) -> Any:
    return jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), n))


def drift(kernel: Any, target: Any, draw: Any, n: int = 8000) -> tuple[float, Any]:
    """How far means are after a move from exact draws, in standard errors of the differences, and the reports.

    The largest of those of each number, its square, and whether it is below each of its quartiles.
    """
    start = exact_draws(draw, n)
    move = jax.jit(jax.vmap(lambda k, x: kernel.move(k, x, target)))
    after, info = move(jax.random.split(KEY, n), start)
    scores, moved = [], []
    for a, x in zip(jax.tree.leaves(start), jax.tree.leaves(after), strict=True):
        a, x = np.asarray(a, float).reshape(n, -1).T, np.asarray(x, float).reshape(n, -1).T
        for u, v in zip(a, x, strict=True):
            moved.append(np.mean(u != v))
            cuts = np.quantile(u, [0.25, 0.5, 0.75])[:, None]
            change = np.stack([v - u, v**2 - u**2, *(1.0 * (v < cuts) - (u < cuts))])
            spread = change.std(1)
            scores += list((change.mean(1) / np.where(spread > 0, spread, 1)) * np.sqrt(n))
    assert max(moved) > 0.1
    return np.abs(scores).max(), jax.tree.map(np.asarray, info)


def many(kernel: Any, target: Any, choices: Any, n: int = 20_000) -> Any:
    """Results of so many moves from one point."""
    run = jax.jit(jax.vmap(lambda k: kernel.move(k, choices, target)))
    return jax.tree.map(np.asarray, run(jax.random.split(KEY, n)))


# --- finite programs: transition matrices ---------------------------------------------------------

SHARES = jnp.array([0.2, 0.5, 0.3])
ROWS = np.array(
    [
        [[0.1, 0.6, 0.3], [0.25, 0.25, 0.5], [0.7, 0.2, 0.1]],
        [[0.5, 0.2, 0.3], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]],
    ]
)
UP = np.array([0.8, 0.4, 0.3])
STATES = np.array(list(itertools.product(range(3), range(2))))


@gen
def finite() -> None:
    a = sample("a", dist.Categorical(SHARES))
    b = sample("b", dist.Bernoulli(jnp.array([0.3, 0.9, 0.5])[a]))
    sample("y", dist.Normal(a - 1.5 * b, 1.0))


@gen
def hop(choices: Any) -> None:
    """Proposes `a` by a matrix that is not symmetric, and depends on `b`."""
    sample("a", dist.Categorical(jnp.array(ROWS.tolist())[choices["b"], choices["a"]]))


@gen
def turn(choices: Any) -> None:
    sample("up", dist.Bernoulli(jnp.array(UP.tolist())[choices["a"]]))


def rotate(x: Any, v: Any) -> Any:
    return {**x, "a": (x["a"] + 2 * v["up"] - 1) % 3}, {"up": 1 - v["up"]}


HOPS = np.array([[(b == d) * ROWS[b, a, c] for c, d in STATES] for a, b in STATES])
TURNS = np.array(
    [[(b == d) * {0: 0, 1: UP[a], 2: 1 - UP[a]}[(c - a) % 3] for c, d in STATES] for a, b in STATES]
)


def target_of(y: float = 0.4) -> Any:
    return finite().given({"y": y})


def hastings(q: np.ndarray) -> np.ndarray:
    """Transition matrix of proposals q, each accepted with min(1, p(x') q(x', x) / (p(x) q(x, x')))."""
    log_p = jax.vmap(lambda s: target_of().log_density({"a": s[0], "b": s[1]}))(jnp.array(STATES))
    flow = np.asarray(jax.nn.softmax(log_p))[:, None] * q
    K = q * np.minimum(1.0, np.divide(flow.T, flow, out=np.ones((6, 6)), where=flow > 0))
    return K + np.diag(1 - K.sum(1))


@pytest.mark.parametrize(
    ("kernel", "q"),
    [(kernels.metropolis_hastings(hop), HOPS), (kernels.involutive(turn, rotate), TURNS)],
    ids=["metropolis_hastings", "involutive"],
)
def test_transition_matrix(kernel: Any, q: np.ndarray, x64: None) -> None:
    """Of all proposals from all states, the rate of acceptance up to rounding; and it is what is accepted.

    That 200 proposals from a state lack one of probability 0.1 has probability 1e-9.
    """
    flow = (hastings(q) - np.diag(np.diag(hastings(q)))) / np.where(q > 0, q, 1)

    def propose(key: Any, s: Any) -> Any:
        after, info = kernel.move(key, {"a": s[0], "b": s[1]}, target_of())
        return (after["a"], after["b"]), info

    keys = jax.random.split(KEY, 6 * 2000).reshape(6, 2000)
    states = jnp.array(STATES)
    found, info = jax.jit(jax.vmap(jax.vmap(propose, (0, None))))(keys, states)
    after, rate, accepted = (
        np.asarray(x) for x in (2 * found[0] + found[1], info["acceptance_rate"], info["accepted"])
    )
    for i in range(6):
        for j in np.flatnonzero(q[i] > 0):
            if j != i and hastings(q)[i, j] > 0:
                seen = rate[i, (after[i] == j) & accepted[i]]
                assert seen.size > 0
                np.testing.assert_allclose(seen, flow[i, j], atol=1e-13)
    error = np.sqrt(np.mean(rate * (1 - rate)) / rate.size)
    assert 0.01 < rate.mean() < 0.99
    assert abs(np.mean(accepted - rate)) < 5.5 * error


def test_cycle_mixture_and_repeat_are_products_sums_and_powers() -> None:
    """Frequencies of 20,000 moves from one state, against matrices: chi-square, p > 1e-7. What they report."""
    hops, turns = kernels.metropolis_hastings(hop), kernels.involutive(turn, rotate)
    H, T = hastings(HOPS), hastings(TURNS)

    def check(kernel: Any, K: np.ndarray) -> Any:
        found, info = many(kernel, target_of(), {"a": 2, "b": 1})
        count = np.bincount(2 * found["a"] + found["b"], minlength=6)
        seen = K[5] > 1e-12
        assert count[~seen].sum() == 0
        assert stats.chisquare(count[seen], K[5, seen] / K[5, seen].sum() * 20_000).pvalue > 1e-7
        return info

    info = check(kernels.cycle(hops, turns), H @ T)
    rates = [info[f"acceptance_rate_{i}"] for i in range(2)]
    np.testing.assert_allclose(info["acceptance_rate"], (rates[0] + rates[1]) / 2, rtol=1e-6)
    info = check(kernels.mixture([hops, turns], [0.3, 0.7]), 0.3 * H + 0.7 * T)
    assert np.array_equal(np.isnan(info["involution_error"]), info["kernel"] == 0)
    assert abs(info["kernel"].mean() - 0.7) < 5.5 * np.sqrt(0.7 * 0.3 / 20_000)
    info = check(kernels.repeat(hops, jnp.int32(3)), H @ H @ H)
    assert info["accepted"].mean() > info["acceptance_rate"].mean() > 0.1  # any, mean


# --- gibbs: exact conditionals --------------------------------------------------------------------


@gen
def plate() -> None:
    loc = sample("loc", dist.Normal(0.0, 2.0))
    z = sample("z", dist.Categorical(SHARES).expand([3]))
    sample("y", dist.Normal(loc * z, 0.7))


@gen
def chain() -> None:
    loc = sample("loc", dist.Normal(0.0, 2.0))

    def step(z: Any, _: Any) -> Any:
        z = sample("z", dist.Categorical(jnp.array(ROWS[0].tolist())[z]))
        sample("y", dist.Normal(loc * z, 0.7))
        return z, z

    return lax.scan(step, 0, None, length=3)[1]  # pyright: ignore


@gen
def meeting() -> None:
    loc = sample("loc", dist.Normal(0.0, 2.0))
    z = sample("z", dist.Categorical(SHARES).expand([3]))
    sample("y", dist.Normal(loc * jnp.prod(z + 0.5), 0.7).expand([3]))


@pytest.mark.parametrize("model", [chain, meeting, "scaled and partial"])
def test_gibbs_draws_from_the_conditional(model: Any) -> None:
    """From one point, all joint values by their exact probabilities: chi-square over 20,000 draws, p > 1e-7."""
    data: dict[str, Any] = {"y": jnp.array([0.3, -0.4, 1.0])}
    now = {"loc": jnp.array(0.6), "z": jnp.array([2, 0, 1])}
    target = (plate if isinstance(model, str) else model)().given(data)
    if isinstance(model, str):  # a likelihood of less weight, and a prior of more
        data["z"] = observed(jnp.array([2, 0, 0]), where=jnp.array([True, False, False]))
        target = scale(plate, {"y": 0.4, "z": 1.5})().given(data)
    kernel = kernels.gibbs("z")
    after, info = many(kernel, target, now)
    assert np.all(after["loc"] == now["loc"])
    assert np.all(info["acceptance_rate"] == 1)
    exact = enumeration().run(KEY, target.given({"loc": now["loc"]}), progress=False)
    weigh = np.array([9, 3, 1])
    p = np.zeros(27)
    np.add.at(p, np.asarray(exact.choices["z"]) @ weigh, np.asarray(exact.weights, float))
    count = np.bincount(after["z"] @ weigh, minlength=27)
    assert count[p == 0].sum() == 0
    rare = p * count.sum() < 5  # pooled, as the chi-square law asks
    seen = [*count[~rare], count[rare].sum()], [*p[~rare], p[rare].sum()]
    keep = np.array(seen[1]) * count.sum() > 1
    observed_, share = np.array(seen[0])[keep], np.array(seen[1])[keep]
    assert stats.chisquare(observed_, share / share.sum() * observed_.sum()).pvalue > 1e-7


def test_gibbs_draws_conjugate_choices() -> None:
    """Normal and gamma choices given data, the likelihood of one raised to a power.

    Kolmogorov-Smirnov of 20,000 draws against the exact conditional, p > 1e-7.
    """
    y, counts = jnp.array([0.5, 2.0, 3.0]), jnp.array([2, 0, 4])

    @gen
    def model() -> None:
        mu = sample("mu", dist.Normal(1.0, 2.0))
        rate = sample("rate", dist.Gamma(2.0, 1.5))
        sample("y", dist.Normal(mu, 0.7).expand([3]))
        sample("n", dist.Poisson(rate).expand([3]))

    target = scale(model, {"y": 0.3})().given({"y": y, "n": counts})
    after, _ = many(kernels.gibbs("mu", "rate"), target, {"mu": 0.0, "rate": 1.0})
    precision = 1 / 4 + 0.3 * 3 / 0.49
    mean = (1 / 4 + 0.3 * float(y.sum()) / 0.49) / precision
    normal = stats.norm(mean, precision**-0.5)
    gamma = stats.gamma(2.0 + 6, scale=1 / (1.5 + 3))
    assert stats.kstest(after["mu"], normal.cdf).pvalue > 1e-7
    assert stats.kstest(after["rate"], gamma.cdf).pvalue > 1e-7


# --- continuous choices ---------------------------------------------------------------------------

POINTS = jnp.array([[0.3, 0.7], [1.4, -0.2], [0.1, 0.9]])
PRIOR = jnp.array([[2.0, 0.6], [0.6, 1.0]])
CENTRE = jnp.array([1.0, -1.0])


@gen
def skewed() -> None:
    """A precision, and a mean whose spread depends on it: conjugate together."""
    tau = sample("tau", dist.Gamma(2.0, 1.5))
    tril = jnp.linalg.cholesky(PRIOR) / jnp.sqrt(tau)
    mean = sample("mean", dist.MultivariateNormal(CENTRE, scale_tril=tril))
    sample("y", dist.Normal(mean, 1 / jnp.sqrt(tau)).expand([3, 2]).to_event(2))


def draw_skewed(key: Any) -> Any:
    """An exact draw of the posterior, which is normal-gamma (DeGroot 1970, section 9.10)."""
    before = jnp.linalg.inv(PRIOR)
    after = before + len(POINTS) * jnp.eye(2)
    mean = jnp.linalg.solve(after, before @ CENTRE + POINTS.sum(0))
    rest = jnp.sum(POINTS**2) + CENTRE @ before @ CENTRE - mean @ after @ mean
    first, second = jax.random.split(key)
    tau = dist.Gamma(2.0 + POINTS.size / 2, 1.5 + rest / 2).sample(first)
    return {
        "tau": tau,
        "mean": dist.MultivariateNormal(mean, precision_matrix=tau * after).sample(second),
    }


@pytest.mark.parametrize(
    "kernel",
    [
        kernels.mala(0.15),
        kernels.random_walk(jnp.diag(jnp.array([0.5, 0.6, 0.3])) + 0.1),
        kernels.slice_sampler(1.5),
        kernels.cycle(
            kernels.block(kernels.elliptical_slice(), "mean"),
            kernels.block(kernels.random_walk(0.5), "tau"),
        ),
    ],
    ids=lambda k: type(k).__name__,
)
def test_continuous_kernels_leave_the_posterior_invariant(kernel: Any) -> None:
    target = skewed().given({"y": POINTS})
    assert drift(kernel, target, draw_skewed)[0] < 5.5


@gen
def bumps() -> None:
    sample("x", dist.Exponential(0.8))
    sample("i", dist.Bernoulli(0.3))


@gen
def stretch(choices: Any) -> None:
    sample("log", dist.Normal(0.5 * choices["i"], 0.6))
    sample("flip", dist.Bernoulli(0.4))


def stretched(x: Any, v: Any) -> Any:
    """Scales `x` up for one value of `i` and down for the other, and turns `i`."""
    sign = jnp.where(x["i"] == 1, -1.0, 1.0)
    turned = jnp.where(v["flip"] == 1, 1 - x["i"], x["i"])
    log = jnp.where(v["flip"] == 1, v["log"], -v["log"])
    return {"x": x["x"] * jnp.exp(sign * v["log"]), "i": turned}, {"log": log, "flip": v["flip"]}


def draw_bumps(key: Any) -> Any:
    return bumps().simulate(key).choices


def test_the_jacobian_of_an_involution(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaling of a positive choice, with a discrete one: right with the Jacobian, refused without."""
    kernel, target = kernels.involutive(stretch, stretched), bumps().given()
    found, info = drift(kernel, target, draw_bumps)
    assert found < 5.5
    assert np.all(info["involution_error"] < 1e-4)
    assert 0.1 < info["acceptance_rate"].mean() < 0.99
    change = metropolis._change
    monkeypatch.setattr(metropolis, "_change", lambda f, x: (change(f, x)[0], jnp.zeros(())))
    assert drift(kernel, target, draw_bumps)[0] > 8


def test_log_determinant(x64: None) -> None:
    """Of the scaling above by hand: |d(x e^v, -v) / d(x, v)| = e^v; discrete leaves do not count."""
    start = (
        {"x": jnp.array(1.3), "i": jnp.array(0)},
        {"log": jnp.array(0.7), "flip": jnp.array(1)},
    )
    end, found = metropolis._change(lambda both: stretched(*both), start)
    np.testing.assert_allclose(found, 0.7, rtol=1e-12)
    np.testing.assert_allclose(end[0]["x"], 1.3 * np.exp(0.7), rtol=1e-12)
    nothing = ({"i": jnp.array(0)}, {"flip": jnp.array(1)})
    assert metropolis._change(lambda both: both, nothing)[1] == 0


def test_what_is_no_involution_stays() -> None:
    kernel = kernels.involutive(stretch, lambda x, v: ({**x, "x": 2 * x["x"]}, v))
    after, info = many(kernel, bumps().given(), {"x": 1.3, "i": 1}, 50)
    assert np.all(after["x"] == np.float32(1.3))
    np.testing.assert_allclose(info["involution_error"], 3 * 1.3, rtol=1e-6)
    assert np.all(info["acceptance_rate"] == 0)


@gen
def shrink(choices: Any) -> None:
    sample("x", dist.Normal(0.6 * choices["x"], 0.6))


def test_the_reverse_density_of_a_proposal() -> None:
    """Steps towards zero, also out of the support: right with the reverse density, refused without it."""
    kernel, target = kernels.metropolis_hastings(shrink), bumps().given()
    assert drift(kernel, target, draw_bumps)[0] < 5.5

    class Careless(metropolis.Metropolis):
        def propose(self, key: Any, choices: Any, target: Any) -> Any:
            after = {**choices, **shrink(choices).simulate(key).choices}
            return after, target.log_density(after) - target.log_density(choices), {}

    assert drift(Careless(), target, draw_bumps)[0] > 8


# --- choices that may be idle ---------------------------------------------------------------------


@gen
def branching() -> None:
    z = sample("z", dist.Bernoulli(0.4))
    mu = sample("mu", dist.Normal(0.0, 1.0))

    def with_a(mu: Any) -> Any:
        return sample("a", dist.Normal(2.0 * mu, 0.5))

    sample("y", dist.Normal(lax.cond(z == 1, with_a, lambda mu: mu, mu), 0.7))


# Of z and mu the exact posterior is a mixture of two normals; a is normal given both, idle or not.
SEEN = 0.6
WEIGHTS = {
    1: 0.4 * stats.norm(0, np.sqrt(4 + 0.25 + 0.49)).pdf(SEEN),
    0: 0.6 * stats.norm(0, np.sqrt(1 + 0.49)).pdf(SEEN),
}


def draw_branching(key: Any) -> Any:
    """An exact posterior draw, with the own prior of an idle `a`."""
    keys = jax.random.split(key, 3)
    z = dist.Bernoulli(WEIGHTS[1] / (WEIGHTS[0] + WEIGHTS[1])).sample(keys[0])
    slope, noise = jnp.where(z == 1, 2.0, 1.0), jnp.where(z == 1, 0.25 + 0.49, 0.49)  # y given mu
    variance = 1 / (1 + slope**2 / noise)
    mu = variance * slope * SEEN / noise + jnp.sqrt(variance) * jax.random.normal(keys[1])
    precision = 4.0 + z / 0.49
    mean = (4.0 * 2 * mu + z * SEEN / 0.49) / precision
    return {"z": z, "mu": mu, "a": mean + jax.random.normal(keys[2]) / jnp.sqrt(precision)}


def test_idle_choices_keep_their_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    """The density in which kernels move, against the sum by hand, and kernels that change the branch.

    Without the idle term both are of another law.
    """
    target = branching().given({"y": SEEN})

    @jax.jit
    def densities(z: Any) -> Any:
        choices = {"z": z, "mu": 0.3, "a": 1.1}
        return moves.log_density(target, choices), target.log_density(choices)

    own = stats.norm(0.6, 0.5).logpdf(1.1)
    for z in (0, 1):
        seen = stats.norm(1.1 if z else 0.3, 0.7).logpdf(SEEN)
        rest = np.log(0.4 if z else 0.6) + stats.norm.logpdf(0.3) + seen
        # Sums of five terms below ten, in single precision.
        np.testing.assert_allclose(densities(z), [rest + own, rest + z * own], atol=1e-5)
    kernel = kernels.cycle(kernels.gibbs("z"), kernels.block(kernels.elliptical_slice(), "mu", "a"))
    assert drift(kernel, target, draw_branching)[0] < 5.5
    monkeypatch.setattr("weft.inference.markov.gibbs.log_density", lambda t, x: t.log_density(x))
    assert drift(kernels.gibbs("z"), target, draw_branching)[0] > 8


def test_masked_choices_keep_their_prior(x64: None) -> None:
    @gen
    def model() -> None:
        z = sample("z", dist.Bernoulli(0.4))
        x = mask(
            lambda: sample("x", dist.Gamma(2.0, 1.0).expand([2])),
            {"x": jnp.array([True, False]) | (z == 1)},
        )()
        sample("y", dist.Normal(x, 1.0))

    target = model().given({"y": jnp.array([0.3, 0.5])})
    x = jnp.array([0.7, 1.9])
    both = (
        jnp.sum(dist.Gamma(2.0, 1.0).log_prob(x))
        + dist.Normal(x, 1.0).log_prob(jnp.array([0.3, 0.5])).sum()
    )
    for z, p in ((0, 0.6), (1, 0.4)):
        found = jax.jit(lambda z: moves.log_density(target, {"z": z, "x": x}))(z)
        np.testing.assert_allclose(found, np.log(p) + both, rtol=1e-12)


# --- mcmc -----------------------------------------------------------------------------------------


@gen
def mixed() -> None:
    mu = sample("mu", dist.Normal(0.5, 2.0))
    w = sample("w", dist.Bernoulli(0.35))
    z = sample("z", dist.Bernoulli(0.3 + 0.4 * w).expand([3]))
    deterministic("far", mu > 1)
    sample("y", dist.Normal(mu + 2.5 * z, 0.8))


MIXED = jnp.array([0.4, 2.9, 1.6])


def exact_mixed() -> tuple[np.ndarray, float, float]:
    """Probabilities of (w, z_1, z_2, z_3), mean of mu and its probability above 1: by the sum over 16 normal laws."""
    y, weights, means, above = np.asarray(MIXED, float), [], [], []
    for w, *z in itertools.product((0, 1), repeat=4):
        p = (0.65, 0.35)[w] * np.prod([(0.7, 0.3)[zi] if not w else (0.3, 0.7)[zi] for zi in z])
        shifted = y - 2.5 * np.array(z)
        evidence = stats.multivariate_normal(np.full(3, 0.5), 4.0 + 0.64 * np.eye(3)).pdf(shifted)
        precision = 1 / 4 + 3 / 0.64
        mean = (0.5 / 4 + shifted.sum() / 0.64) / precision
        weights.append(p * evidence)
        means.append(mean)
        above.append(stats.norm(mean, precision**-0.5).sf(1.0))
    share = np.array(weights) / np.sum(weights)
    return share, float(share @ means), float(share @ above)


def test_chains_of_mixed_choices() -> None:
    """Joint probabilities of the finite choices, mean and tail of the other: |z| < 5.5 by the chains' own errors."""
    target = mixed().given({"y": MIXED})
    swap = kernels.metropolis_hastings(flip)
    kernel = kernels.cycle(swap, kernels.block(kernels.random_walk(0.8), "mu"))
    algorithm = mcmc(kernel, num_samples=2000, num_warmup=100)
    draws = algorithm.run(jax.random.key(4), target, progress=False)
    share, mean, above = exact_mixed()
    assert draws.choices["z"].shape == (4, 2000, 3)
    assert set(draws.stats) == {
        *("lp", "acceptance_rate", "acceptance_rate_0", "acceptance_rate_1"),
        "accepted",
    }
    np.testing.assert_array_equal(draws.derived["far"], draws.choices["mu"] > 1)
    code = np.asarray(8 * draws.choices["w"] + draws.choices["z"] @ jnp.array([4, 2, 1]))
    values = [1.0 * (code == i) for i in range(16) if share[i] > 0.005]
    exact = [share[i] for i in range(16) if share[i] > 0.005]
    assert len(exact) > 5
    mu = np.asarray(draws.choices["mu"], float)
    values, exact = np.stack([*values, mu, 1.0 * (mu > 1)], -1), np.array([*exact, mean, above])
    assert np.all(np.abs(values.mean((0, 1)) - exact) < 5.5 * mcse(values))


@gen
def flip(choices: Any) -> None:
    """All finite choices anew, in part as they are."""
    sample("z", dist.Bernoulli(jnp.where(choices["z"] == 1, 0.5, 0.3)))
    sample("w", dist.Bernoulli(0.35 + 0.3 * choices["z"][0]))


class Count(kernels.Kernel):
    """No kernel of the target: each move adds one."""

    def move(self, key: Any, choices: Any, target: Any) -> Any:
        return {**choices, "mu": choices["mu"] + 1}, {"acceptance_rate": choices["mu"]}


def test_what_is_stored() -> None:
    """Which of the moves, from which point of which chain; its density, and the report of the move to it."""
    target = mixed().given({"y": MIXED})
    start = {"mu": jnp.array([10.0, 20.0]), "w": 1, "z": jnp.ones(3, int)}
    algorithm = mcmc(Count(), num_samples=9, num_chains=2, num_warmup=2, thin=4, keep=["mu", "far"])
    draws = algorithm.run(KEY, target, init=start, progress=False)
    assert draws.choices.keys() == {"mu"}
    np.testing.assert_array_equal(draws.choices["mu"], [[16, 20], [26, 30]])
    np.testing.assert_array_equal(draws.stats["acceptance_rate"], [[15, 19], [25, 29]])
    assert draws.derived["far"].all()
    lp = [[target.log_density({**start, "mu": mu}) for mu in row] for row in draws.choices["mu"]]
    np.testing.assert_allclose(draws.stats["lp"], lp, rtol=1e-5)


@gen
def small() -> None:
    sample("y", dist.Normal(sample("x", dist.Normal(0.0, 1.0)), 1.0))


def test_under_jit_and_vmap_over_data() -> None:
    """A run over two data sets side by side is the two runs."""
    algorithm = mcmc(kernels.metropolis_hastings(shrink), num_samples=5, num_chains=2)

    def run(y: Any) -> Any:
        start = {"x": jnp.array([0.1, -0.3])}
        draws = algorithm.run(KEY, small().given({"y": y}), init=start, progress=False)
        return draws.choices["x"], draws.stats["lp"]

    ys = jnp.array([0.3, 2.0])
    found = jax.jit(jax.vmap(run))(ys)
    for i, y in enumerate(ys):
        for together, alone in zip(found, run(y), strict=True):
            np.testing.assert_allclose(together[i], alone, rtol=1e-4)


WIDTH = 0.1


@gen
def wide(choices: Any) -> None:
    sample("x", dist.Normal(choices["x"], WIDTH))


def test_a_global_of_a_proposal_is_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    target, start = small().given({"y": 1.0}), {"x": 0.1}

    def first() -> float:
        algorithm = mcmc(kernels.metropolis_hastings(wide), num_samples=1, num_chains=1)
        draws = algorithm.run(jax.random.key(2), target, init=start, progress=False)
        assert draws.stats["accepted"].all()
        return float(draws.choices["x"][0, 0]) - 0.1

    step = first()
    assert first() == step
    monkeypatch.setitem(globals(), "WIDTH", 0.3)
    np.testing.assert_allclose(first(), 3 * step, rtol=1e-5)


# --- what is refused ------------------------------------------------------------------------------


def refused(error: type[Exception], *words: str) -> Any:
    return pytest.raises(error, match=r"(?s)" + ".*".join(re.escape(w) for w in words))


@gen
def vague() -> None:
    x = sample("x", dist.Laplace(0.0, 1.0))
    n = sample("n", dist.Poisson(2.0))
    sample("y", dist.Normal(x**3 + n, 1.0))


@gen
def astray(choices: Any) -> None:
    sample("w", dist.Normal(choices["x"], 1.0))


@gen
def counted(choices: Any) -> None:
    sample("x", dist.Poisson(1.0))


def test_what_does_not_fit_is_refused() -> None:
    target = vague().given({"y": 1.0})
    now = {"x": 0.3, "n": 2}
    run = lambda k, t=target, x=now: jax.eval_shape(lambda: k.move(KEY, x, t))  # noqa: E731
    walk = kernels.random_walk(0.3)
    with refused(AddressError, "block", "'m'", "among the latents", "'x', 'n'"):
        run(kernels.block(walk, "m"))
    with refused(AddressError, "gibbs", "'m'"):
        run(kernels.gibbs("m"))
    with refused(AddressError, "missing 'n'"):
        run(kernels.gibbs("n"), x={"x": 0.3})
    with refused(DensityError, "random_walk moves continuous choices", "'n' is discrete", "gibbs"):
        run(walk)
    with refused(DensityError, "no exact draw of 'x'", "Laplace"):
        run(kernels.gibbs("x"))
    with refused(DensityError, "no exact draw of 'n'", "Poisson"):
        run(kernels.gibbs("n"))
    with refused(DensityError, "elliptical_slice", "'x' (Laplace)", "block"):
        run(kernels.block(kernels.elliptical_slice(), "x"))
    with refused(AddressError, "metropolis_hastings", "'astray'", "'w'", "'x', 'n'"):
        run(kernels.metropolis_hastings(astray))
    with refused(WeftError, "'x' from Poisson", "Laplace", "discrete"):
        run(kernels.metropolis_hastings(counted))
    with refused(TypeError, "proposal", "dict", "Program"):
        run(kernels.metropolis_hastings(lambda x: x))  # pyright: ignore
    with refused(DensityError, "auxiliary program 'vague' is not normalised", "'y'"):
        run(kernels.involutive(lambda x: condition(vague, {"y": 1.0})(), lambda x, v: (x, v)))
    with refused(ModelError, "transform changes", "'x' float32[] to nothing", "'z' nothing to int"):
        run(kernels.involutive(astray, lambda x, v: ({"z": x["n"], "n": x["n"]}, v)))
    with refused(WeftError, "scale has shape (3,)", "1 numbers"):
        run(kernels.block(kernels.random_walk(jnp.ones(3)), "x"))
    with refused(DensityError, "max_terms=100", "2^8", "cycle"):
        run(kernels.gibbs("z", max_terms=100), crowd().given({"y": 1.0}), {"z": jnp.zeros(8)})
    idle = branching().given({"y": SEEN})
    with refused(DensityError, "'a' may be idle", "'mu'", "move it, too"):
        run(kernels.block(walk, "mu"), idle, {"z": 0, "mu": 0.1, "a": 0.2})


@gen
def crowd() -> None:
    z = sample("z", dist.Bernoulli(0.5).expand([8]))
    sample("y", dist.Normal(jnp.prod(z + 1.0), 1.0))


def test_settings_that_make_no_sense() -> None:
    gibbs = kernels.gibbs("n")
    for make, words in (
        (lambda: kernels.gibbs(), ("at least one address",)),
        (lambda: kernels.block(gibbs), ("at least one address",)),
        (lambda: kernels.cycle(), ("at least one kernel",)),
        (lambda: kernels.mixture([gibbs], [1.0, 2.0]), ("1 kernels", "(2,)")),
        (lambda: kernels.mixture([gibbs, gibbs], [1.0, 0.0]), ("positive",)),
        (lambda: kernels.repeat(gibbs, 0), ("at least 1",)),
        (lambda: mcmc(gibbs, num_samples=0), ("num_samples", "at least 1")),
        (lambda: mcmc(gibbs, num_samples=2, thin=3), ("keeps no draw",)),
        (lambda: mcmc(gibbs, keep="n"), ("keep", "['n']")),
    ):
        with refused(WeftError, *words):
            make()
    with refused(TypeError, "cycle", "expected a kernel", "str"):
        kernels.cycle("n")  # pyright: ignore


def test_mcmc_refuses_early() -> None:
    """Before anything is compiled, and with the kernel's own words."""
    target = vague().given({"y": 1.0})
    run = lambda k, t=target, **s: mcmc(k, num_samples=2, num_chains=1).run(  # noqa: E731
        KEY, t, progress=False, **s
    )
    walk = kernels.block(kernels.random_walk(0.3), "x")
    with refused(AddressError, "'m'", "'x', 'n'"):
        run(kernels.block(kernels.gibbs("m"), "m"))
    with refused(DensityError, "'n' is discrete"):
        run(kernels.nuts(0.1))
    with refused(WeftError, "nothing to sample"):
        run(walk, vague().given({"y": 1.0, "x": 0.0, "n": 1}))
    with refused(AddressError, "init", "'m'"):
        run(walk, init={"m": 0.0})

    class Drifting(kernels.Kernel):
        to: Any

        def move(self, key: Any, choices: Any, target: Any) -> Any:
            return self.to(choices), {"acceptance_rate": jnp.ones(())}

    with refused(ModelError, "Drifting changes", "'n' int32[] to float32[]"):
        run(Drifting(lambda x: {**x, "n": x["n"] + 0.5}))
    with refused(ModelError, "Drifting changes", "'n' int32[] to nothing"):
        run(Drifting(lambda x: {"x": x["x"]}))

    @gen
    def impossible() -> None:
        n = sample("n", dist.Bernoulli(0.5))
        factor("never", jnp.where(n < 5, -jnp.inf, 0.0))

    with refused(DensityError, "no point of positive density", "'never'", "init=choices"):
        run(kernels.gibbs("n"), impossible().given())

    @gen
    def estimated() -> None:
        sample("x", dist.Normal(0.0, 1.0))
        sample("y", marginal(inner(), keep=["x"], by=importance(num_particles=2)))

    with refused(DensityError, "estimated", "marginalize"):
        run(kernels.block(kernels.metropolis_hastings(shrink), "x"), estimated().given())


@gen
def inner() -> Any:
    z = sample("z", dist.Normal(0.0, 1.0))
    return sample("x", dist.Normal(z, 1.0))
