"""`recover`: the choices that were summed out, against their exact posterior given all others.

A statistical test states its null beside it. Joint laws of draws are tested by chi-square at p > 1e-7: some ten such
tests make one false alarm in 1e6 runs. Means after NUTS are held to |z| < 5.5 on the chains' own standard error (4e-8
each). Keys are fixed.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats
from weft.inference import Draws, Particles, importance, load, nuts
from weft.inference.results.diagnostics import mcse
from weft.ppl import Target
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.errors import AddressError, ModelError, WeftError

from bruteforce import anything, posterior
from summed import CASES, means, move, start
from weft import condition, deterministic, gen, marginalize, observed, recover, sample, scale

lax = jax.lax
Normal = dist.Normal
HMM5 = json.loads((Path(__file__).parent / "refcases" / "ssm" / "hmm5.json").read_text())
KEY = jax.random.key(11)

pytestmark = [
    pytest.mark.usefixtures("x64", "quick"),
    pytest.mark.slow,  # once is enough: not in every lane
]


def copies(target: Target, latents: dict[str, Any], *lead: int) -> Draws:
    """Draws that are all the same."""
    choices = {a: jnp.broadcast_to(v, (*lead, *v.shape)) for a, v in latents.items()}
    return Draws(choices=unflatten(choices), stats={"lp": jnp.zeros(lead)}, target=target)


def same(found: Any, exact: Any, **tolerance: float) -> None:
    np.testing.assert_allclose(found, exact, **(tolerance or {"rtol": 1e-10, "atol": 1e-10}))


def codes(values: dict[str, Any], n: int) -> np.ndarray:
    """One integer for every joint value."""
    flat = [np.asarray(v).reshape(n, -1) for v in values.values()]
    rows = np.concatenate(flat, axis=1) + 5
    return rows @ 11 ** np.arange(rows.shape[1])


def chi_square(found: np.ndarray, known: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value of counts of codes; what is expected less than five times is one cell."""
    assert set(found) <= set(known[probabilities > 0])
    count = np.array([np.sum(found == code) for code in known])
    expected = probabilities * len(found)
    small = expected < 5
    if small.any():
        count = np.append(count[~small], count[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
        count, expected = count[expected > 0], expected[expected > 0]
    if len(count) == 1:
        return 1.0
    return float(stats.chisquare(count, expected * count.sum() / expected.sum()).pvalue)


# --- joint law, marginals, the best ---------------------------------------------------------------

TABLE = [
    ("global_beside_lanes_of_lanes", {}),
    ("matrix_of_products", {"joint": True}),
    ("a_branch_that_is_summed_over_for_each_lane", {}),
    ("chain_read_at_both_ends", {}),
    ("chain_read_at_both_ends", {"parallel": True}),
    ("chain_of_second_order", {"parallel": True}),
    ("a_chain_a_lane", {}),
    ("lanes_in_a_step", {}),
    ("chain_after_a_chain", {}),
]


@pytest.mark.parametrize(("name", "options"), TABLE)
def test_against_the_exact_posterior(name: str, options: dict[str, Any]) -> None:
    """The law of 4000 joint draws by chi-square, the probability of each value to 1e-10, and the best joint value."""
    case = CASES[name]
    marginal = marginalize(case.model, *case.addresses, **options)
    target = marginal().given(case.data())
    latents = anything(target, seed=1)
    whole = case.model().given(case.data())
    values, log_terms, active = posterior(whole, latents, case.addresses)
    p = np.exp(log_terms - np.logaddexp.reduce(log_terms))

    found = flatten(recover(KEY, marginal, copies(target, latents, 2, 2000)).derived)
    assert set(found) == set(case.addresses)
    drawn = {a: np.array(found[a]).reshape(4000, *values[a].shape[1:]) for a in values}
    assert {a: v.dtype for a, v in drawn.items()} == {a: whole.sites[a].dtype for a in values}
    for a in values:  # what is idle, whatever the choices, may have any value
        drawn[a][:, ~active[a].any(0)] = whole.sites[a].values[0]
    assert chi_square(codes(drawn, 4000), codes(values, len(p)), p) > 1e-7

    one = copies(target, latents, 1, 1)
    for a, found in flatten(recover(KEY, marginal, one, sites="marginals").derived).items():
        seen = values[a][..., None] == whole.sites[a].values
        same(found[0, 0], np.einsum("n,n...->...", p, seen & active[a][..., None]))
    best = recover(KEY, marginal, one, sites="viterbi").derived
    best = {a: np.array(v)[0] for a, v in flatten(best).items()}
    for a in values:
        best[a][:, ~active[a].any(0)] = whole.sites[a].values[0]
    at = np.flatnonzero(codes(values, len(p)) == codes({a: best[a] for a in values}, 1))
    same(log_terms[at], [log_terms.max()])


@gen
def read_by_every_step():
    """A choice from before a scan of which no step makes a choice."""
    level = sample("level", Normal(0.0, 1.0))
    z = sample("z", dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5])))

    def step(x, _):
        sample("y", Normal(x + level, 2.0))
        return 0.5 * x, None

    lax.scan(step, 1.0 * z, length=3)


def test_a_choice_that_a_scan_reads_and_does_not_make() -> None:
    """Draws have the exact law: chi-square of three values."""
    y, prior = np.array([0.4, -1.0, 2.0]), np.array([0.2, 0.3, 0.5])
    terms = np.log(prior)
    for z in range(3):
        terms[z] += stats.norm.logpdf(y, z * 0.5 ** np.arange(3), 2.0).sum()
    p = np.exp(terms - np.logaddexp.reduce(terms))
    marginal = marginalize(read_by_every_step, "z")
    target = marginal().given({"y": jnp.array(y)})
    same(target.log_density({"level": 0.0}), np.logaddexp.reduce(terms) + stats.norm.logpdf(0.0))
    found = recover(KEY, marginal, copies(target, {"level": jnp.zeros(())}, 2, 2000)).derived["z"]
    assert chi_square(np.asarray(found).ravel(), np.arange(3), p) > 1e-7


@pytest.mark.parametrize("parallel", [False, True])
def test_a_chain_in_steps_of_a_chain_and_lanes_that_are_none(parallel: bool) -> None:
    """Evidence by enumeration. A step composed in a tree keeps the past that a scan within it reads."""
    law, gain = np.array([[0.8, 0.2], [0.4, 0.6]]), [1.0, 3.0]
    y = np.array([[0.3, -1.2], [0.7, 2.1]])

    @gen
    def model():
        jax.vmap(lambda _: sample("none", dist.Bernoulli(0.3)))(jnp.zeros(0))

        def step(z, g):
            def inner(z, _):
                z = sample("z", dist.Categorical(probs=jnp.array(law)[z]))
                sample("y", Normal(z * g, 1.0))
                return z, None

            return lax.scan(inner, z, length=2)

        lax.scan(step, 0, jnp.array(gain))

    terms = []
    for zs in itertools.product(range(2), repeat=4):
        means = np.reshape(zs, (2, 2)) * np.array(gain)[:, None]
        prior = sum(np.log(law[a, b]) for a, b in zip((0, *zs), zs, strict=False))
        terms.append(prior + stats.norm.logpdf(y, means).sum())
    target = marginalize(model, "z", "none", parallel=parallel)().given({"y": jnp.array(y)})
    same(target.log_density({}), np.logaddexp.reduce(terms))


@gen
def two_states():
    def step(carry, _):
        x, z = carry
        z = sample("z", dist.Bernoulli(jnp.where(z == 1, 0.9, 0.2)))
        x = sample("x", Normal(0.9 * x, 0.8))
        sample("y", Normal(x, 0.5))
        sample("w", Normal(1.0 * z, 1.0))
        return (x, z), None

    lax.scan(step, (0.0, 0), length=3)


@gen
def power_of_two_states(power):
    sample("s", scale(two_states, power)())


@pytest.mark.parametrize("sites", ["covariances", "sample"])
def test_a_scale_does_not_change_the_law(sites: Any) -> None:
    """It multiplies the log of a sum, and the law of the choices given the rest is the same."""
    model = marginalize(power_of_two_states, "s.x", "s.z")
    y, w = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.2, 1.0, -0.3])

    def found(power: float) -> dict[str, Any]:
        draws = copies(model(power).given({"s": {"y": y, "w": w}}), {}, 1, 2)
        return recover(KEY, model, draws, power, sites=sites).derived

    right = found(1.0)
    jax.tree.map(same, found(0.4), right)


def test_hidden_markov_model_of_reference() -> None:
    """Filtering and smoothing, expected transition counts, best path and its score of `ssm/hmm5.json` to 1e-8.

    The counts of 500 joint draws have the expected counts as mean: |z| < 5.5 on their own standard
    error, where it is estimated from at least 20 transitions.
    """
    params = {name: jnp.array(value) for name, value in HMM5["params"].items()}

    @gen
    def model():
        mu = sample("mu", Normal(jnp.zeros(5), 5.0))

        def step(row, _):
            z = sample("z", dist.Categorical(row))
            sample("y", Normal(mu[z], params["sd"][z]))
            return params["P"][z], None

        lax.scan(step, params["pi"], None, length=HMM5["T"])

    y, mu = jnp.array(HMM5["y"]), {"mu": params["mu"]}
    prior = float(Normal(0.0, 5.0).log_prob(params["mu"]).sum())
    for parallel in (False, True):
        marginal = marginalize(model, "z", parallel=parallel)
        target = marginal().given({"y": y})
        one = copies(target, mu, 1, 1)
        smooth = recover(KEY, marginal, one, sites="marginals").derived["z"][0, 0]
        same(smooth, HMM5["smoother_prob"], rtol=1e-8, atol=1e-8)
        filtered = recover(KEY, marginal, one, sites="filtered").derived["z"][0, 0]
        same(filtered, HMM5["filter_prob"], rtol=1e-8, atol=1e-8)
        path = recover(KEY, marginal, one, sites="viterbi").derived["z"][0, 0]
        np.testing.assert_array_equal(path, HMM5["viterbi_path"])
        score = model().log_density({**mu, "y": y, "z": path})
        same(score - prior, HMM5["viterbi_logp"], rtol=1e-8)
    same(target.log_density(mu) - prior, HMM5["log_likelihood"], rtol=1e-8)
    z = np.asarray(recover(KEY, marginal, copies(target, mu, 1, 500)).derived["z"][0])
    pairs = 5 * z[:, :-1] + z[:, 1:]
    counts = np.stack([np.bincount(p, minlength=25) for p in pairs]).reshape(-1, 5, 5)
    often = counts.sum(0) >= 20
    away = counts.mean(0) - HMM5["expected_transition_counts"]
    assert np.all(np.abs(away[often]) < 5.5 * (counts.std(0) / np.sqrt(500))[often])


@gen
def second_order(num_steps):
    """A first state before the scan, a chain of second order, a choice for each step, one for all."""
    table = jnp.array([[0.8, 0.2, 0.0], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4]])
    group = sample("group", dist.Bernoulli(0.3))
    first = sample("first", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
    sample("y0", Normal(first + group, 1.0))

    def step(carry, _):
        last, before = carry
        own = sample("own", dist.Bernoulli(0.2 + 0.1 * last))
        state = sample("state", dist.Categorical(table[(last + before) % 3]))
        sample("y", Normal(state + 0.7 * group + own, 0.8))
        return (state, last), None

    lax.scan(step, (first, first), length=num_steps)


def test_filtering_against_enumeration_of_every_beginning() -> None:
    """Given the data so far; what is no part of the chain has its posterior given all data."""
    y = np.array([0.3, -1.0, 2.0, 1.7])
    marginal = marginalize(second_order, "group", "first", "own", "state")
    whole = copies(marginal(4).given({"y0": 0.4, "y": y}), {}, 1, 1)
    found = {
        sites: recover(KEY, marginal, whole, 4, sites=sites).derived
        for sites in ("filtered", "marginals")
    }
    group = np.asarray(found["marginals"]["group"][0, 0])
    same(found["filtered"]["group"][0, 0], group)
    for t in range(5):
        data = {"y0": 0.4, "y": y[:t]}
        exact = {"first": np.zeros(3), "own": np.zeros(2), "state": np.zeros(3)}
        for g in (0, 1):
            target = condition(second_order, {"group": g})(t).given(data)
            values, log_terms, _ = posterior(target, {}, exact)
            p = np.exp(log_terms - log_terms.max())
            for a in exact if t else ["first"]:
                at = values[a] if a == "first" else values[a][:, -1]
                np.add.at(exact[a], at, group[g] * p / p.sum())
        if t == 0:
            same(found["filtered"]["first"][0, 0], exact["first"])
        else:
            same(found["filtered"]["own"][0, 0, t - 1], exact["own"])
            same(found["filtered"]["state"][0, 0, t - 1], exact["state"])


# --- what comes with them -------------------------------------------------------------------------


@gen
def groups(x):
    """Two groups of three, a chain, and computed values that read both."""
    loc = sample("loc", Normal(0.0, 1.0))

    def one(x):
        z = sample("z", dist.Bernoulli(0.4))
        deterministic("mean", loc + x * z)
        return sample("y", Normal(loc + x * z, 1.0))

    jax.vmap(jax.vmap(one))(x)
    deterministic("twice", 2 * loc)

    def step(state, _):
        state = sample("state", move(state))
        deterministic("level", means()[state])
        sample("w", Normal(means()[state] + loc, 1.0))
        return state, None

    lax.scan(step, 0, None, length=4)


X = np.array([[0.5, 1.0, -1.0], [2.0, 0.1, 1.5]])
DATA = {"y": np.array([[0.2, 1.3, -1.0], [1.5, 0.0, 0.3]]), "w": np.array([0.5, -1.0, 2.0, 0.0])}


def test_shapes_and_computed_values() -> None:
    """Arrays lead with (chain, draw) or (particle,); what reads the choices is computed of those that are drawn."""
    marginal = marginalize(groups, "z", "state")
    x = jnp.array(X)
    target = marginal(x).given(DATA)
    loc = jax.random.normal(jax.random.key(1), (2, 7))
    draws = Draws(choices={"loc": loc}, derived={"twice": 2 * loc}, target=target)
    full = recover(KEY, marginal, draws, x)
    assert isinstance(full, Draws)
    assert full.target is target
    assert full.choices is draws.choices
    derived = full.derived
    shapes = {"z": (2, 3), "state": (4,), "mean": (2, 3), "twice": (), "level": (4,)}
    assert {a: v.shape for a, v in derived.items()} == {a: (2, 7, *s) for a, s in shapes.items()}
    same(derived["mean"], loc[..., None, None] + X * derived["z"])
    same(derived["level"], means()[derived["state"]])
    same(derived["twice"], 2 * loc)
    assert len(np.unique(np.asarray(derived["z"]).reshape(14, -1), axis=0)) > 3

    again = recover(KEY, marginal, draws, x, batch_size=4)
    jax.tree.map(np.testing.assert_array_equal, again.derived, derived)
    other = recover(jax.random.key(12), marginal, draws, x)
    assert np.any(other.derived["state"] != derived["state"])

    best = recover(KEY, marginal, draws, x, sites="viterbi").derived
    same(best["mean"], loc[..., None, None] + X * best["z"])
    for batch_size in (None, 3):
        p = recover(KEY, marginal, draws, x, sites="marginals", batch_size=batch_size).derived
        assert set(p) == {"z", "state", "twice"}
        assert p["z"].shape == (2, 7, 2, 3, 2)
        assert p["state"].shape == (2, 7, 4, 3)
        same(p["z"].sum(-1), np.ones((2, 7, 2, 3)))
    logit = jnp.log(0.4 / 0.6) + Normal(loc[..., None, None] + X, 1.0).log_prob(DATA["y"])
    logit -= Normal(loc[..., None, None], 1.0).log_prob(DATA["y"])
    same(p["z"][..., 1], jax.nn.sigmoid(logit))


def test_records_of_stacked_states() -> None:
    """What is computed of all states after the scan, and recorded, is known once they are."""

    @gen
    def model():
        loc = sample("loc", Normal(0.0, 1.0))

        def step(z, _):
            z = sample("z", move(z))
            sample("y", Normal(loc + means()[z], 1.0))
            return z, z

        path = lax.scan(step, 0, None, length=4)[1]
        deterministic("path", path)
        deterministic("moves", jnp.sum(path[1:] != path[:-1]))

    marginal = marginalize(model, "z")
    target = marginal().given({"y": jnp.array([0.3, -0.2, 1.0, 2.0])})
    draws = copies(target, {"loc": jnp.array(0.3)}, 2, 5)
    derived = recover(KEY, marginal, draws).derived
    np.testing.assert_array_equal(derived["path"], derived["z"])
    moves = np.diff(derived["z"], axis=-1) != 0
    np.testing.assert_array_equal(derived["moves"], moves.sum(-1))


def test_particles() -> None:
    """Importance sampling from the prior: the weighted mean of the choices is their posterior mean.

    Null: |z| < 5.5 on the standard error of the self-normalised estimate from 4000 particles.
    """

    @gen
    def model():
        loc = sample("loc", Normal(0.0, 1.0))
        z = sample("z", dist.Bernoulli(0.4).expand([2]))
        sample("y", Normal(loc + z, 1.0))

    marginal = marginalize(model, "z")
    y = jnp.array([1.5, -0.5])
    target = marginal().given({"y": y})
    particles = importance(num_particles=4000).run(KEY, target, progress=False)
    full = recover(KEY, marginal, particles)
    assert isinstance(full, Particles)
    assert full.derived["z"].shape == (4000, 2)
    np.testing.assert_array_equal(full.log_weights, particles.log_weights)
    grid = jnp.linspace(-8.0, 8.0, 2001)
    weight = np.exp(jax.vmap(lambda x: target.log_density({"loc": x}))(grid))
    logit = jnp.log(0.4 / 0.6) + Normal(grid[:, None] + 1, 1.0).log_prob(y)
    p = jax.nn.sigmoid(logit - Normal(grid[:, None], 1.0).log_prob(y))
    exact = np.asarray(weight @ p / weight.sum())
    w = np.exp(full.log_weights - jax.nn.logsumexp(full.log_weights))
    mean = w @ full.derived["z"]
    error = np.sqrt(w**2 @ (full.derived["z"] - mean) ** 2)
    assert np.all(np.abs(mean - exact) < 5.5 * error)


def test_data_known_in_part() -> None:
    """Missing steps, dropped or imputed, and labels for some of the choices: all as the exact posterior has them."""

    @gen
    def model():
        loc = sample("loc", Normal(jnp.zeros(3), 1.0))

        def step(z, _):
            z = sample("z", move(z))
            sample("y", Normal(loc[z], 1.0))
            return z, None

        lax.scan(step, sample("first", start()), None, length=3)

    names = ("first", "z")
    where = jnp.array([True, False, True])
    loc = jnp.array([-1.0, 0.3, 1.0])
    for missing in ("drop", "impute"):
        data = {"y": observed(jnp.array([0.3, jnp.nan, 1.0]), where=where, missing=missing)}
        marginal = marginalize(model, *names)
        target, whole = marginal().given(data), model().given(data)
        latents = {"loc": loc}
        if missing == "impute":
            latents["y"] = jnp.array([0.3, 2.5, 1.0])  # a draw comes whole, data included
        values, log_terms, _ = posterior(whole, latents, names)
        p = np.exp(log_terms - np.logaddexp.reduce(log_terms))
        found = recover(KEY, marginal, copies(target, latents, 1, 1), sites="marginals").derived
        for a in names:
            exact = np.einsum("n,n...->...", p, values[a][..., None] == np.arange(3))
            same(found[a][0, 0], exact)

    labels = observed(jnp.array([2, 0, 1]), where=where)
    known = marginalize(condition(model, {"z": labels}), *names)
    data = {"y": jnp.array([0.3, -0.4, 1.0])}
    target, whole = known().given(data), model().given(data)
    values, log_terms, _ = posterior(whole, {"loc": loc}, names)
    fits = (values["z"][:, 0] == 2) & (values["z"][:, 2] == 1)
    p = np.where(fits, np.exp(log_terms - np.logaddexp.reduce(log_terms[fits])), 0)
    draws = copies(target, {"loc": loc}, 1, 2000)
    found = recover(KEY, known, draws).derived
    drawn = {a: found[a][0] for a in names}
    assert chi_square(codes(drawn, 2000), codes(values, len(p)), p) > 1e-7
    np.testing.assert_array_equal(drawn["z"][:, [0, 2]], np.broadcast_to([2, 1], (2000, 2)))


def test_nothing_else_to_draw() -> None:
    """A program of which the discrete choices are all that is not observed."""

    @gen
    def model():
        z = sample("z", dist.Bernoulli(0.4).expand([2]))
        sample("y", Normal(1.0 * z, 1.0))

    marginal = marginalize(model, "z")
    target = marginal().given({"y": jnp.array([3.0, -3.0])})
    draws = Draws(choices={}, stats={"lp": jnp.zeros((1, 500))}, target=target)
    z = np.asarray(recover(KEY, marginal, draws).derived["z"])
    assert z.shape == (1, 500, 2)
    assert z[..., 0].mean() > 0.8 > 0.2 > z[..., 1].mean()


def test_states_in_an_export_and_a_file(tmp_path: Path) -> None:
    marginal = marginalize(groups, "z", "state")
    x = jnp.array(X)
    target = marginal(x).given(DATA)
    draws = Draws(choices={"loc": jax.random.normal(KEY, (2, 8))}, target=target)
    full = recover(KEY, marginal, draws, x)
    data = full.to_arviz(log_likelihood=False)
    np.testing.assert_array_equal(data.posterior["state"].values, full.derived["state"])
    full.save(tmp_path / "draws.npz")
    back = load(tmp_path / "draws.npz", target=target)
    jax.tree.map(np.testing.assert_array_equal, back.derived, full.derived)
    again = recover(KEY, marginal, back, x)
    np.testing.assert_array_equal(again.derived["z"], full.derived["z"])


# --- after NUTS -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixture", "chain"])
def test_joint_law_of_parameter_and_states_after_nuts(kind: str) -> None:
    """Probabilities of all joint states, and the parameter's mean given each, against enumeration times quadrature.

    Null: for each joint state s both 1[z = s] and loc 1[z = s] have their exact means, 16 numbers,
    |z| < 5.5 on the chains' own standard error; that of probabilities is at least the binomial one.
    """

    @gen
    def model():
        loc = sample("loc", Normal(0.0, 1.5))
        if kind == "mixture":
            z = sample("z", dist.Bernoulli(0.3).expand([3]))
            sample("y", Normal(loc * z, 0.7))
        else:

            def step(z, _):
                z = sample("z", dist.Bernoulli(jnp.where(z == 1, 0.8, 0.3)))
                sample("y", Normal(loc * z, 0.7))
                return z, None

            lax.scan(step, 0, None, length=3)

    y = jnp.array([0.9, -0.2, 1.1])
    marginal = marginalize(model, "z")
    target = marginal().given({"y": y})
    draws = nuts(num_warmup=300, num_samples=1000, num_chains=2).run(KEY, target, progress=False)
    full = recover(jax.random.key(5), marginal, draws)
    grid = jnp.linspace(-9.0, 9.0, 1001)
    states = np.array(list(itertools.product((0, 1), repeat=3)))
    joint = jax.jit(
        jax.vmap(
            jax.vmap(
                lambda z, x: model().log_density({"z": z, "loc": x, "y": y}), in_axes=(None, 0)
            ),
            in_axes=(0, None),
        )
    )(jnp.array(states), grid)
    weight = np.exp(joint - joint.max())
    weight /= weight.sum()
    exact = np.stack([weight.sum(1), weight @ np.asarray(grid)], -1)
    here = np.all(np.asarray(full.derived["z"])[:, :, None] == states, -1)
    loc = np.asarray(full.choices["loc"])[..., None]
    values = np.stack([here, loc * here], -1)
    error = mcse(values)
    error[:, 0] = np.maximum(
        error[:, 0], np.sqrt(exact[:, 0] * (1 - exact[:, 0]) / here[..., 0].size)
    )
    seen = exact[:, 0] * here[..., 0].size > 20
    assert seen.sum() >= 5
    z = (values.mean((0, 1)) - exact)[seen] / error[seen]
    assert np.all(np.abs(z) < 5.5), z


# --- what is refused ------------------------------------------------------------------------------


def refused(error: type[Exception], *words: str) -> Any:
    return pytest.raises(error, match=r"(?s)" + ".*".join(re.escape(w) for w in words))


def test_what_does_not_fit_is_refused() -> None:
    marginal = marginalize(groups, "z", "state")
    x = jnp.array(X)
    target = marginal(x).given(DATA)
    draws = copies(target, {"loc": jnp.zeros(())}, 1, 3)
    with refused(ModelError, "nothing is summed out of 'groups'", "marginalize first"):
        recover(KEY, groups, draws, x)
    with refused(AddressError, "'groups'", "neither the draws nor", "'loc'"):
        recover(KEY, marginal, Draws(choices={"other": jnp.zeros((1, 3))}, target=target), x)
    with refused(AddressError, "'groups'", "neither the draws nor", "'y'", "'w'"):
        recover(KEY, marginal, Draws(choices={"loc": jnp.zeros((1, 3))}), x)
    with refused(AddressError, "'loc'", "(2,)", "()", "arguments"):
        recover(KEY, marginal, Draws(choices={"loc": jnp.zeros((1, 3, 2))}, target=target), x)
    with refused(ValueError, "sites is one of 'sample', 'marginals'", "'covariances'", "'mode'"):
        recover(KEY, marginal, draws, x, sites="mode")
    with refused(TypeError, "Draws or Particles", "dict"):
        recover(KEY, marginal, {"loc": 0.0}, x)
    with refused(ValueError, "batch_size", "at least 1", "0"):
        recover(KEY, marginal, draws, x, batch_size=0)


def test_other_arguments_than_the_data_had() -> None:
    marginal = marginalize(groups, "z", "state")
    target = marginal(jnp.array(X)).given(DATA)
    with refused(WeftError, "'y'", "(2, 3)"):
        recover(KEY, marginal, copies(target, {"loc": jnp.zeros(())}, 1, 3), jnp.array(X[:1]))


def test_draws_from_a_file_without_their_target(tmp_path: Path) -> None:
    marginal = marginalize(groups, "z", "state")
    x = jnp.array(X)
    target = marginal(x).given(DATA)
    copies(target, {"loc": jnp.zeros(())}, 1, 4).save(tmp_path / "draws.npz")
    with refused(WeftError, "without their target", "load(path, target=...)"):
        recover(KEY, marginal, load(tmp_path / "draws.npz"), x)
