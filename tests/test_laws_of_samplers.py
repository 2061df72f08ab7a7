"""Samplers obey their laws, by the checks of `weft.testing`; planted faults are refused.

Each check has a false alarm rate of one in a million, so that one of the hundred here fails by chance once in 10,000
suites; keys are fixed. Faults are to be seen at no less than twice the threshold.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import (
    Draws,
    Particles,
    enumeration,
    filtering,
    importance,
    killing,
    multinomial,
    residual,
    smc,
    ssp,
    stratified,
    systematic,
    tempering,
)
from weft.inference.checks.law_report import LawReport, LawRow, compare, judged
from weft.ppl import Target, WeftError

from exactly import exact_mean
from weft import gen, gradients, kernels, observed, sample, testing

pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.slow,  # once is enough: not in every lane
]
KEY = jax.random.key(7)
ALARM = 1e-6


def refused(report: LawReport) -> None:
    """By at least twice the threshold, so that another key would find the fault as well."""
    assert not report.passed
    assert not report
    assert abs(report.refused[0].z) > 2 * report.threshold, report


# --- targets ----------------------------------------------------------------------------------------------------------


@gen
def weather() -> None:
    season = sample("season", dist.Categorical(jnp.array([0.5, 0.2, 0.3])))
    rain = sample("rain", dist.Bernoulli(jnp.array([0.1, 0.7, 0.4])[season]).expand([2]))
    sample("wet", dist.Bernoulli(0.2 + 0.6 * rain))


@gen
def branches() -> None:
    """A choice is idle in one branch; half of it will be given."""
    z = sample("z", dist.Bernoulli(0.6))
    jax.lax.cond(
        z == 1,
        lambda: sample("x", dist.Categorical(jnp.array([0.6, 0.2, 0.2])).expand([2])),
        lambda: jnp.zeros(2, jnp.int32),
    )
    sample("y", dist.Normal(1.0 * z, 1.0))


@gen
def level() -> None:
    mu = sample("mu", dist.Normal(1.0, 2.0))
    sample("y", dist.Normal(mu, 1.0))


START = jnp.array([0.3, 0.7])
MOVE = jnp.array([[0.8, 0.2], [0.4, 0.6]])
SEEN = jnp.array([0.2, 0.7])


@gen
def series(num_steps: int) -> None:
    def step(x: Any, _: Any) -> Any:
        x = sample("x", dist.Categorical(MOVE[x]))
        sample("y", dist.Bernoulli(SEEN[x]))
        return x, None

    jax.lax.scan(step, 0, length=num_steps)


WEATHER = weather().given({"wet": jnp.array([1, 0])})
HALF = observed(jnp.array([1, 0]), where=jnp.array([True, False]))
BRANCHES = branches().given({"y": 1.5, "x": HALF})
LEVEL = level().given({"y": 2.5})  # mu is N(2.2, 0.8)
MEAN, VAR = 2.2, 0.8
MOMENTS = {"mu": MEAN, "mu^2": MEAN**2 + VAR}
DATA = jnp.array([1, 0, 1, 1])
SERIES = series(4).given({"y": DATA})


class Bootstrap(eqx.Module):
    """The bootstrap model of the series, written out."""

    num_steps: int = eqx.field(static=True, default=4)

    def init(self, key: Any) -> Any:
        return self.step(key, jnp.int32(0), {"x": jnp.zeros(4, jnp.int32)})

    def step(self, key: Any, t: Any, particle: Any) -> Any:
        x = particle["x"]
        before = jnp.where(t == 0, 0, x[t - 1])
        now = jax.random.categorical(key, jnp.log(MOVE[before])).astype(x.dtype)
        return {"x": x.at[t].set(now)}, dist.Bernoulli(SEEN[now]).log_prob(DATA[t])


# --- proper weighting -------------------------------------------------------------------------------------------------


@gen
def guess() -> None:
    season = sample("season", dist.Categorical(jnp.array([0.2, 0.4, 0.4])))
    sample("rain", dist.Bernoulli(jnp.array([[0.5, 0.3], [0.6, 0.2], [0.4, 0.4]])[season]))


@gen
def wide() -> None:
    sample("mu", dist.Normal(2.0, 1.5))


def of_trace(key: Any) -> Any:
    """A single draw of the prior, weighted by the likelihood."""
    trace, log_weight = WEATHER.generate(key)
    return trace.choices, log_weight


SAMPLERS = {
    "enumeration": (enumeration(), WEATHER),
    "prior": (importance(num_particles=10), WEATHER),
    "proposal": (importance(guess(), num_particles=5), WEATHER),
    "one draw": (of_trace, WEATHER),
    "idle": (importance(num_particles=10), BRANCHES),
    "idle, enumeration": (enumeration(), BRANCHES),
}
SCHEMES = (systematic, stratified, ssp, residual, killing, multinomial)


@pytest.mark.parametrize("name", SAMPLERS)
def test_weighted_samplers(name: str) -> None:
    sampler, target = SAMPLERS[name]
    report = testing.check_proper_weighting(
        sampler, target, key=KEY, num_runs=4000, false_alarm=ALARM
    )
    report.require()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resampling_in_sequence(scheme: Any) -> None:
    sampler = smc(Bootstrap(), 8, resample=scheme, threshold=1.0)
    testing.check_proper_weighting(
        sampler, SERIES, key=KEY, num_runs=4000, false_alarm=ALARM
    ).require()


def next_seen(carry: Any, t: Any, observed: Any) -> Any:
    """A guess at the probability of what is observed next, to look ahead by."""
    return jnp.where(observed["y"] == 1, 0.5, -0.5) * carry


LADDER = tempering(schedule=jnp.array([0.3, 1.0]), num_moves=1)
IN_SEQUENCE = {
    "optimal": (smc(filtering("optimal"), 8, history="full"), SERIES),
    "lookahead": (smc(filtering(lookahead=next_seen), 8, history="full"), SERIES),
    "tempering": (smc(LADDER, 8, rejuvenate=kernels.gibbs("season")), WEATHER),
    "waste-free": (smc(LADDER, 8, rejuvenate=kernels.gibbs("season"), waste_free=2), WEATHER),
}


@pytest.mark.parametrize("name", IN_SEQUENCE)
def test_sequential_samplers(name: str) -> None:
    sampler, target = IN_SEQUENCE[name]
    sampler = dataclasses.replace(sampler, threshold=1.0)
    testing.check_proper_weighting(
        sampler, target, key=KEY, num_runs=4000, false_alarm=ALARM
    ).require()


def test_tempering_of_a_continuous_choice() -> None:
    sampler = smc(LADDER, 10, rejuvenate=kernels.hmc(1.2, 2))
    testing.check_proper_weighting(
        sampler, LEVEL, key=KEY, expected=MOMENTS, false_alarm=ALARM
    ).require()


def test_weights_of_a_continuous_choice() -> None:
    """The evidence is found by integrating mu out."""
    sampler = importance(wide(), num_particles=20)
    report = testing.check_proper_weighting(
        sampler, LEVEL, key=KEY, expected=MOMENTS, false_alarm=ALARM
    )
    report.require()
    assert [row.name for row in report.rows] == ["evidence", "mu", "mu^2"]
    report = testing.check_proper_weighting(
        sampler,
        LEVEL,
        key=KEY,
        functions={"beyond": lambda x: x["mu"] > MEAN},
        expected={"beyond": 0.5},
        false_alarm=ALARM,
    )
    report.require()
    assert [row.name for row in report.rows] == ["evidence", "beyond"]


def test_samplers_that_cannot_be_traced() -> None:
    def sampler(key: Any) -> Any:
        rng = np.random.default_rng(int(jax.random.bits(key)))
        mu = rng.normal(2.0, 1.5, 50)
        log_w = dist.Normal(1.0, 2.0).log_prob(mu) + dist.Normal(mu, 1.0).log_prob(2.5)
        return {"mu": mu}, log_w - dist.Normal(2.0, 1.5).log_prob(mu)

    testing.check_proper_weighting(
        sampler, LEVEL, key=KEY, expected=MOMENTS, num_runs=200, traced=False, false_alarm=ALARM
    ).require()


# --- and what is not properly weighted --------------------------------------------------------------------------------


def wrong_sign(key: Any) -> Any:
    trace, log_weight = WEATHER.generate(key)
    return trace.choices, -log_weight


def weightless(key: Any) -> Any:
    """Draws of the prior, all with the evidence for weight: the evidence is right, the law is not."""
    return WEATHER.generate(key)[0].choices, enumeration().run(KEY, WEATHER).log_evidence


def forgetful_proposal(key: Any) -> Any:
    """The weight leaves out the density of the proposal."""
    found = guess().simulate(key)
    return found.choices, WEATHER.log_density(found.choices)


def greedy(key: Any, log_weights: Any, num_samples: int) -> Any:
    """Heavy particles get more than their share."""
    return systematic(key, 1.5 * log_weights, num_samples)


def shifted(key: Any, log_weights: Any, num_samples: int) -> Any:
    """Off by one."""
    return jnp.maximum(systematic(key, log_weights, num_samples) - 1, 0)


class Unreset(smc):
    """Forgets that resampled particles have equal weights."""

    def step(self, key: Any, state: Any, target: Target) -> Any:
        after = super().step(key, state, target)
        return eqx.tree_at(lambda s: s.log_weights, after, after.log_weights + state.log_weights)


@pytest.mark.parametrize("sampler", [wrong_sign, weightless, forgetful_proposal])
def test_wrong_weights_are_refused(sampler: Any) -> None:
    refused(
        testing.check_proper_weighting(sampler, WEATHER, key=KEY, num_runs=4000, false_alarm=ALARM)
    )


@pytest.mark.parametrize(
    "sampler",
    [
        smc(Bootstrap(), 8, resample=greedy, threshold=1.0),
        smc(Bootstrap(), 8, resample=shifted, threshold=1.0),
        Unreset(Bootstrap(), 8, threshold=1.0),
    ],
    ids=["greedy", "shifted", "unreset"],
)
def test_wrong_resampling_is_refused(sampler: Any) -> None:
    refused(
        testing.check_proper_weighting(
            sampler, SERIES, key=KEY, num_runs=10_000, batch_size=1000, false_alarm=ALARM
        )
    )


def test_heavy_tails_are_noted() -> None:
    """A proposal with lighter tails than the target: the weights have no variance."""

    @gen
    def narrow() -> None:
        sample("mu", dist.Normal(MEAN, 0.4))

    report = testing.check_proper_weighting(
        importance(narrow(), num_particles=2), LEVEL, key=KEY, expected=MOMENTS
    )
    assert "heavy tail" in repr(report)


# --- exactly ----------------------------------------------------------------------------------------------------------


def test_sampling_importance_resampling_exactly(x64: None) -> None:
    """Law L1 after resampling, by the sum over all that can be drawn: E[Z 1{x = v}] = gamma(v)."""
    prior, likelihood = jnp.array([0.2, 0.5, 0.3]), jnp.array([0.1, 0.6, 0.9])

    @gen
    def model() -> None:
        u = sample("u", dist.Categorical(prior))
        sample("x", dist.Bernoulli(likelihood[u]))

    @gen
    def proposal() -> None:
        sample("u", dist.Categorical(jnp.array([0.3, 0.3, 0.4])), grad=gradients.enum)

    target = model().given({"x": 1})
    by = importance(proposal(), num_particles=2, grad=gradients.enum)

    def chosen(_: Any) -> Any:
        choices, _, log_evidence = by.draw_posterior(target)
        here = 1.0 * (choices["u"] == jnp.arange(3))
        return jnp.exp(log_evidence) * here, here

    integral, law = exact_mean(chosen, 0.0)
    np.testing.assert_allclose(integral, prior * likelihood, rtol=1e-12)
    # Its own law is another: only with the evidence for weight is it the posterior.
    assert np.abs(law - prior * likelihood / (prior @ likelihood)).max() > 0.005


# --- marginals --------------------------------------------------------------------------------------------------------


def test_marginals() -> None:
    testing.check_marginals(
        importance(num_particles=1000), WEATHER, key=KEY, false_alarm=ALARM
    ).require()
    testing.check_marginals(enumeration(), BRANCHES, key=KEY, false_alarm=ALARM).require()

    def chains(key: Any) -> Any:
        """Two of 500 draws each, of an autoregression whose law is the posterior."""
        noise = jax.random.normal(key, (500, 2)) * (0.75 * VAR) ** 0.5
        first = noise[0] / 0.75**0.5

        def step(x: Any, e: Any) -> Any:
            return 0.5 * x + e, 0.5 * x + e

        drawn = jnp.concatenate([first[None], jax.lax.scan(step, first, noise[1:])[1]])
        return Draws(choices={"mu": MEAN + drawn.T})

    report = testing.check_marginals(chains, LEVEL, key=KEY, expected=MOMENTS, false_alarm=ALARM)
    report.require()
    # An autoregression's mean has (1 + 0.5) / (1 - 0.5) = 3 times the variance; of 30 runs the standard deviation is
    # known up to a factor 1 +- 5 / sqrt(58).
    assert abs(report["mu"].error / np.sqrt(3 * VAR / 30_000) - 1) < 0.66


def test_other_marginals_are_refused() -> None:
    def prior(key: Any) -> Any:
        drawn = jax.vmap(lambda k: LEVEL.generate(k)[0].choices)(jax.random.split(key, 400))
        return Draws(choices=jax.tree.map(lambda x: x.reshape(2, 200), drawn))

    refused(testing.check_marginals(prior, LEVEL, key=KEY, expected=MOMENTS, false_alarm=ALARM))

    def never(key: Any) -> Any:
        """A value that is never drawn, though nothing in the runs varies."""
        return Particles(choices={"z": jnp.zeros(50, jnp.int32)}, log_weights=jnp.zeros(50))

    @gen
    def rare() -> None:
        sample("z", dist.Bernoulli(0.1))

    refused(testing.check_marginals(never, rare().given(), key=KEY, false_alarm=ALARM))


# --- invariance -------------------------------------------------------------------------------------------------------


@gen
def turned(choices: Any) -> None:
    """Proposes another season, by a matrix that is not symmetric."""
    rows = jnp.array([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.8, 0.1, 0.1]])
    sample("season", dist.Categorical(rows[choices["season"]]))


@gen
def any_branch(choices: Any) -> None:
    sample("z", dist.Bernoulli(jnp.where(choices["z"] == 1, 0.3, 0.6)))


@gen
def stretch(choices: Any) -> None:
    sample("log", dist.Normal(0.0, 0.5))


def stretched(x: Any, v: Any) -> Any:
    return {"mu": x["mu"] * jnp.exp(v["log"])}, {"log": -v["log"]}


def posterior(key: Any) -> Any:
    return {"mu": MEAN + VAR**0.5 * jax.random.normal(key)}


SEASON = kernels.metropolis_hastings(turned)
KERNELS = {
    "cycle": (kernels.cycle(kernels.gibbs("rain"), SEASON), WEATHER, False),
    "idle": (
        kernels.mixture([kernels.metropolis_hastings(any_branch), kernels.gibbs("x")]),
        BRANCHES,
        True,
    ),
    "conditional": (kernels.conditional_smc(3, "ancestor", "optimal"), SERIES, False),
    "hmc": (kernels.hmc(1.2, 2), LEVEL, True),
    "involutive": (kernels.involutive(stretch, stretched), LEVEL, True),
}


def invariance(kernel: Any, target: Any, **settings: Any) -> LawReport:
    exact = posterior if target is LEVEL else None
    settings = {"draw": exact, "num_runs": 8000, "batch_size": 8000, **settings}
    return testing.check_invariance(kernel, target, key=KEY, false_alarm=ALARM, **settings)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name: str) -> None:
    kernel, target, reversible = KERNELS[name]
    report = invariance(kernel, target, reversible=reversible)
    report.require()
    assert "moved in" in report.notes[0]
    assert "moved in 0%" not in report.notes[0]


def test_several_moves_and_own_functions() -> None:
    functions = {"sum": lambda x: x["season"] + jnp.sum(x["rain"])}
    report = invariance(SEASON, WEATHER, num_steps=3, functions=functions)
    report.require()
    assert [row.name for row in report.rows] == ["sum"]


def test_kernels_that_cannot_be_traced() -> None:
    def kernel(key: Any, choices: Any, target: Any) -> Any:
        rng = np.random.default_rng(int(jax.random.bits(key)))
        x = float(choices["mu"]) - MEAN
        return {"mu": MEAN + 0.6 * x + rng.normal() * 0.8 * VAR**0.5}, {"acceptance_rate": 1.0}

    report = invariance(kernel, LEVEL, num_runs=300, num_steps=2, traced=False, reversible=True)
    report.require()


def accepted(key: Any, after: Any, choices: Any, log_ratio: Any) -> Any:
    take = jnp.log(jax.random.uniform(key)) < log_ratio
    return jax.tree.map(lambda new, old: jnp.where(take, new, old), after, choices)


def unbalanced(key: Any, choices: Any, target: Any) -> Any:
    """Metropolis-Hastings without the densities of the proposals there and back."""
    draw_key, key = jax.random.split(key)
    after = {**choices, **turned(choices).simulate(draw_key).choices}
    log_ratio = target.log_density(after) - target.log_density(choices)
    return accepted(key, after, choices, log_ratio)


def without_jacobian(key: Any, choices: Any, target: Any) -> Any:
    """A scaling, accepted by the densities alone."""
    draw_key, key = jax.random.split(key)
    after = stretched(choices, stretch(choices).simulate(draw_key).choices)[0]
    log_ratio = target.log_density(after) - target.log_density(choices)
    return accepted(key, after, choices, log_ratio)


def leapfrog(key: Any, choices: Any, target: Any) -> Any:
    """A leapfrog step whose energy error is not corrected for."""
    gradient = jax.grad(lambda x: target.log_density({"mu": x}))
    x, p = choices["mu"], jax.random.normal(key)
    return {"mu": x + p + 0.5 * gradient(x)}


def other_conditional(key: Any, choices: Any, target: Any) -> Any:
    """Gibbs with the prior of the rain, given the season, in place of its posterior."""
    rain = jax.random.bernoulli(key, jnp.array([0.1, 0.7, 0.4])[choices["season"]], (2,))
    return {**choices, "rain": rain.astype(choices["rain"].dtype)}


def by_state(key: Any, choices: Any, target: Any) -> Any:
    """A right kernel, taken only where the choice that it moves has a certain value."""
    after, _ = SEASON.move(key, choices, target)
    return jax.tree.map(lambda a, b: jnp.where(choices["season"] == 0, a, b), after, choices)


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        (unbalanced, WEATHER),
        (other_conditional, WEATHER),
        (by_state, WEATHER),
        (without_jacobian, LEVEL),
        (leapfrog, LEVEL),
    ],
)
def test_wrong_kernels_are_refused(kernel: Any, target: Any) -> None:
    refused(invariance(kernel, target))


def test_detailed_balance() -> None:
    """A walk round a circle leaves the uniform law as it is, and is not reversible."""

    @gen
    def circle() -> None:
        sample("x", dist.Categorical(jnp.ones(3) / 3))

    def walk(key: Any, choices: Any, target: Any) -> Any:
        return {"x": (choices["x"] + 1 + jax.random.bernoulli(key, 0.3)) % 3}

    invariance(walk, circle().given()).require()
    report = invariance(walk, circle().given(), reversible=True)
    refused(report)
    assert report.refused[0].name.count("x = ") == 2
    # Flows are 0.7 / 3 and 0.3 / 3.
    row = report["x = 0 -> x = 1"]
    assert abs(row.estimate - 0.7 / 3) < 5.5 * np.sqrt(0.7 / 3 / 8000)


def test_what_never_moves() -> None:
    report = invariance(lambda key, choices, target: choices, LEVEL)
    assert report.passed
    assert report.notes == ("The kernel moved in 0% of the runs.",)


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_size_of_the_test() -> None:
    """With normal means the threshold is exact for one row: of 4,000 checks at rate 0.2, 0.2 are refused."""
    values = np.random.default_rng(0).normal(size=(20, 4000))
    z = np.array([row.z for row in compare([""] * 4000, values, np.zeros(4000))])
    threshold = judged("", [LawRow("", 0, 0, 0, 0)], 20, 0.2).threshold
    share = np.mean(np.abs(z) > threshold)
    assert abs(share - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 4000)


def test_what_is_printed() -> None:
    report = testing.check_proper_weighting(wrong_sign, WEATHER, key=KEY, num_runs=500)
    text = repr(report)
    assert "evidence" in text
    assert "Refused: " in text
    assert "season = 1" in text
    with pytest.raises(AssertionError, match="Refused"):
        report.require()
    assert report["evidence"].expected == 1
    with pytest.raises(KeyError, match="there are evidence"):
        report["evidense"]
    # Zero against zero is no difference; what never varies and is off its value is far off.
    values = np.array([[0.0, 1.0]] * 3)
    none, far = compare(["none", "far"], values, np.array([0.0, 0.5]))
    assert none.z == 0
    assert far.z > 1e6


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    check = testing.check_proper_weighting
    with pytest.raises(WeftError, match="num_runs"):
        check(of_trace, WEATHER, key=KEY, num_runs=1)
    with pytest.raises(WeftError, match="false_alarm"):
        check(of_trace, WEATHER, key=KEY, false_alarm=2.0)
    with pytest.raises(TypeError, match="a sampler is"):
        check(3, WEATHER, key=KEY)
    with pytest.raises(TypeError, match="gives Draws, Particles or a pair"):
        check(lambda key: {"z": 1}, WEATHER, key=KEY)
    with pytest.raises(WeftError, match="must give the latent choices 'season', 'rain'"):
        check(lambda key: ({"season": 1}, 0.0), WEATHER, key=KEY)
    with pytest.raises(WeftError, match="gives 'rain' with shape"):
        check(lambda key: ({"season": 1, "rain": jnp.zeros(3)}, 0.0), WEATHER, key=KEY)
    with pytest.raises(WeftError, match="does not lead with the 4"):
        check(lambda key: ({"season": jnp.zeros(3)}, jnp.zeros(4)), WEATHER, key=KEY)
    with pytest.raises(WeftError, match="Draws have no weights"):
        check(lambda key: Draws(choices={"mu": jnp.zeros((1, 3))}), LEVEL, key=KEY)
    with pytest.raises(WeftError, match="expected has 'nu'"):
        check(of_trace, LEVEL, key=KEY, expected={"nu": 1.0})
    with pytest.raises(WeftError, match="expected\\['mu'\\] has 2 elements"):
        check(importance(wide(), 3), LEVEL, key=KEY, expected={"mu": [1.0, 2.0]}, num_runs=2)
    with pytest.raises(WeftError, match="means of 'f' are not known"):
        check(of_trace, LEVEL, key=KEY, functions={"f": lambda x: x["mu"]})
    with pytest.raises(WeftError, match="has to be given"):
        testing.check_marginals(importance(), LEVEL, key=KEY)

    @gen
    def closed() -> None:
        sample("y", dist.Normal(jnp.sin(sample("x", dist.Normal(0.0, 1.0))), 1.0))

    with pytest.raises(WeftError, match="Give it: log_evidence="):
        check(importance(), closed().given({"y": 1.0}), key=KEY)
    with pytest.raises(WeftError, match="num_steps"):
        testing.check_invariance(SEASON, WEATHER, key=KEY, num_steps=0)
    with pytest.raises(WeftError, match="draw=, a function from a key"):
        testing.check_invariance(SEASON, LEVEL, key=KEY)
    with pytest.raises(TypeError, match="a kernel has move"):
        testing.check_invariance(3, WEATHER, key=KEY)
    with pytest.raises(WeftError, match="the kernel must give the latent choices"):
        testing.check_invariance(lambda k, x, t: {"season": 1}, WEATHER, key=KEY)
    with pytest.raises(WeftError, match="the kernel gives 'rain' with shape"):
        testing.check_invariance(lambda k, x, t: {**x, "rain": 1}, WEATHER, key=KEY)
