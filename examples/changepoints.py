"""The Nile between 1871 and 1970: one change of its level, or states that come and go?

    python examples/changepoints.py

The annual flow at Aswan fell about 1899 (Cobb 1978). Two models say how, each written once, with its discrete variables
as sites:

1. `one_change`: one level before a year, another after it. The year is a site, "change".
2. `states`: a hidden Markov model. Each year is in one of K states with levels of their own, K from 1 to 4. The state
   of a year is a site, "z", in a `lax.scan`.

`marginalize` sums these sites out exactly, NUTS and importance sampling see the continuous choices only, and `recover`
gives the sites back: the posterior of the year, the probability of each state in each year, the most probable path.

States have no names of their own: exchange two, and the density is the same. A posterior over K levels has K! copies
of every mode, which no sampler visits fairly. Here the levels are drawn in order (`Ordered`), one of the K! copies, and
scored K! times as high. So the evidence is that of the model without an order, and it can be compared across K.

The evidence of each model is found by importance sampling. Where it is an integral over the noise alone, which is
done by quadrature, it stands beside that. Prints a table and what it says, and saves `out/changepoints.png`.
WEFT_FAST=1 makes a shorter run.
"""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from numpyro.distributions import constraints
from numpyro.distributions.transforms import SigmoidTransform
from scipy import special, stats
from weft.inference import Draws, Particles, enumeration, importance, nuts

from weft import deterministic, factor, gen, marginalize, recover, sample

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out"
FAST = os.environ.get("WEFT_FAST", "") not in ("", "0")
NUM_DRAWS, NUM_PARTICLES, MAX_STATES = (200, 4_000, 2) if FAST else (500, 20_000, 4)

# ---- the models ------------------------------------------------------------------------------------------------------

LEVEL, NOISE = (90.0, 30.0), 20.0
"""Prior mean and scale of a level, and prior scale of the noise, in km³ a year; the same in both models."""


class Ordered(eqx.Module):
    """Independent draws of a distribution, sorted: a way to write exchangeable parameters once."""

    base: dist.Distribution
    size: int = eqx.field(static=True)
    support = constraints.ordered_vector

    def sample(self, key):
        return jnp.sort(self.base.sample(key, (self.size,)))

    def log_prob(self, x):
        return jnp.sum(self.base.log_prob(x)) + gammaln(self.size + 1.0)  # K! orders, one of them


@gen
def one_change(num_years):
    """The level changes once; year number `change` is the first of the second level."""
    level = sample("level", dist.Normal(*LEVEL).expand([2]))
    noise = sample("noise", dist.HalfNormal(NOISE))
    change = sample("change", dist.DiscreteUniform(1, num_years - 1))

    def year(t):
        mean = deterministic("mean", jnp.where(t < change, level[0], level[1]))
        sample("flow", dist.Normal(mean, noise))

    jax.vmap(year, axis_name="year")(jnp.arange(num_years))


@gen
def states(num_states, num_years):
    """A hidden Markov model: a year stays in the state of the year before, or moves to any other."""
    level = sample("level", Ordered(dist.Normal(*LEVEL), num_states))
    noise = sample("noise", dist.HalfNormal(NOISE))
    stay = sample("stay", dist.Beta(9.0, 1.0))
    others = num_states - 1
    move = (1 - stay) / max(others, 1)
    transition = jnp.where(jnp.eye(num_states, dtype=bool), 1 - others * move, move)

    def year(probs, _):
        z = sample("z", dist.Categorical(probs=probs))
        mean = deterministic("mean", level[z])
        sample("flow", dist.Normal(mean, noise))
        return transition[z], None

    jax.lax.scan(year, jnp.full(num_states, 1 / num_states), length=num_years)


# ---- guides, for the evidence ----------------------------------------------------------------------------------------
# Both are fitted to draws by NUTS: a mean and a scale for each level, a mean and a relative scale for the noise.


@gen
def one_change_guide(level, noise):
    sample("level", dist.Normal(*level))
    sample("noise", dist.LogNormal(*noise))


@gen
def states_guide(level, noise, num_states):
    """Every level is near one that was found, or anywhere; so is a level of a state that explains nothing."""
    found = level[0].size
    locs, scales = (jnp.append(a, b) for a, b in zip(level, LEVEL, strict=True))
    part = dist.Categorical(probs=jnp.append(jnp.full(found, 0.6 / found), 0.4))
    base = dist.MixtureSameFamily(part, dist.Normal(locs, scales))
    sample("level", Ordered(base, num_states))
    sample("noise", dist.LogNormal(*noise))
    sample("stay", dist.TransformedDistribution(dist.Logistic(3.0, 1.0), SigmoidTransform()))


def moments(draws: Draws) -> tuple[Any, Any]:
    """Arguments of a guide: means and scales of draws, the scales half as wide again."""
    level, noise = draws["level"], jnp.log(draws["noise"])
    axes = (0, 1)
    return (level.mean(axes), 1.5 * level.std(axes)), (noise.mean(), 1.5 * noise.std())


# ---- the exact evidence, where it is an integral over the noise ------------------------------------------------------


def exact_log_evidence(flow: np.ndarray) -> tuple[float, np.ndarray]:
    """Of no change, and of a change in each year but the first: levels integrated by hand, the noise on a grid."""
    noise = np.linspace(5.0, 40.0, 1001)
    log_prior = stats.halfnorm(scale=NOISE).logpdf(noise) + np.log(noise[1] - noise[0])
    mean, scale = LEVEL

    def segment(y: np.ndarray) -> np.ndarray:
        """The log density of years with one level, for every value of the noise."""
        n, away = len(y), y - mean
        spread = noise**2 + n * scale**2
        squares = (away @ away - scale**2 * away.sum() ** 2 / spread) / noise**2
        volume = n * np.log(2 * np.pi) + (n - 1) * np.log(noise**2) + np.log(spread)
        return -0.5 * (squares + volume)

    none = special.logsumexp(log_prior + segment(flow))
    years = range(1, len(flow))
    once = [special.logsumexp(log_prior + segment(flow[:t]) + segment(flow[t:])) for t in years]
    return none, np.array(once) - np.log(len(years))


# ---- what is run -----------------------------------------------------------------------------------------------------


class OneChange(NamedTuple):
    """What is found of the model with one change. Arrays lead with (chain, draw)."""

    draws: Draws
    evidence: Particles
    mean: np.ndarray  # of every year
    probability: np.ndarray  # of a change in each year but the first
    exact: np.ndarray  # the log evidence of a change in each year but the first


class States(NamedTuple):
    """What is found of the hidden Markov models. Arrays that lead with (chain, draw) are of that with two states."""

    draws: Draws
    mean: np.ndarray  # of every year
    probability: np.ndarray  # of each state in every year
    path: np.ndarray  # the most probable
    evidence: list[Particles]  # for 1, 2, ... states
    exact: float  # the log evidence of one state
    numbers: np.ndarray  # the probability of 1, 2, ... states
    visits: np.ndarray  # that 1, 2, ... are visited: a row for each number of states


def find_change(key: Any, flow: np.ndarray, exact: np.ndarray) -> OneChange:
    keys = jax.random.split(key, 3)
    model, args = marginalize(one_change, "change"), (len(flow),)
    target = model(*args).given({"flow": flow})
    draws = by_nuts(keys[0], target, flow, "one change")
    found = recovered(keys[1], model, draws, *args)
    mean, probability = found["sample"]["mean"], found["marginals"]["change"]
    evidence = by_importance(keys[2], target, one_change_guide(*moments(draws)), "one change")
    return OneChange(draws, evidence, np.asarray(mean), np.asarray(probability), exact)


def find_states(key: Any, flow: np.ndarray, exact: float) -> States:
    keys = jax.random.split(key, 3)
    model, args = marginalize(states, "z"), (2, len(flow))
    draws = by_nuts(keys[0], model(*args).given({"flow": flow}), flow, "two states")
    found = recovered(keys[1], model, draws, *args)
    mean, probability = found["sample"]["mean"], found["marginals"]["z"]
    path = found["viterbi"]["z"]

    alone = (flow.mean()[None], flow.std()[None] / 5), (np.log(flow.std()), 0.1)
    evidence, visits = [], []
    for number in range(1, MAX_STATES + 1):
        first, second = jax.random.split(jax.random.fold_in(keys[2], number))
        args = (number, len(flow))
        target = model(*args).given({"flow": flow})
        guide = states_guide(*(alone if number == 1 else moments(draws)), number)
        evidence.append(by_importance(first, target, guide, f"K = {number}"))
        visits.append(visited(second, model, evidence[-1], *args))
    program = number_of_states(jnp.array([p.log_evidence for p in evidence]))
    numbers = enumeration().run(keys[2], program.given({}), progress=False).weights
    arrays = map(np.asarray, (mean, probability, path))
    return States(draws, *arrays, evidence, exact, np.asarray(numbers), np.array(visits))


def by_nuts(key: Any, target: Any, flow: np.ndarray, what: str) -> Draws:
    """Four chains; each begins with the flows of two years as its levels."""
    print(f"\n{what}: posterior", flush=True)
    first, second = jax.random.split(key)
    init = {"level": jnp.sort(jax.random.choice(first, flow, (4, 2)), axis=-1)}
    draws = nuts(NUM_DRAWS, NUM_DRAWS, target_acceptance=0.9).run(second, target, init=init)
    print(f"  {draws.summary().verdict}")
    return draws


def by_importance(key: Any, target: Any, guide: Any, what: str) -> Particles:
    print(f"{what}: evidence", flush=True)
    return importance(guide, NUM_PARTICLES).run(key, target, progress=False)


def recovered(key: Any, model: Any, draws: Draws, *args: int) -> dict[str, Draws]:
    """What was summed out, in three forms."""
    forms = ("sample", "marginals", "viterbi")
    return {form: recover(key, model, draws, *args, sites=form) for form in forms}


def visited(key: Any, model: Any, particles: Particles, *args: int) -> np.ndarray:
    """The probability that the series visits 1, 2, ... different states."""
    if args[0] == 1:
        return np.eye(MAX_STATES)[0]
    draws = particles.resample(key, 1000)
    z = np.asarray(recover(key, model, draws, *args)["z"])
    count = (z[:, :, None] == np.arange(MAX_STATES)).any(axis=1).sum(axis=1)
    return np.bincount(count, minlength=MAX_STATES + 1)[1:] / len(z)


@gen
def number_of_states(log_evidence):
    """How many states, all numbers equally likely before the data."""
    number = sample("number", dist.DiscreteUniform(1, MAX_STATES))
    factor("data", log_evidence[number - 1])


# ---- the table and what it says --------------------------------------------------------------------------------------


def print_table(change: OneChange, hidden: States) -> None:
    print(f"\n{'':16s}{'log evidence':>16s}{'exact':>10s}{'ESS':>8s}{'k-hat':>7s}", end="")
    print(f"{'P(K)':>8s}   P(1, 2, ... states are visited)")
    rows = [("one change", change.evidence, f"{special.logsumexp(change.exact):.2f}", "")]
    for i, particles in enumerate(hidden.evidence):
        exact = f"{hidden.exact:.2f}" if i == 0 else ""
        visits = " ".join(f"{p:.2f}" for p in hidden.visits[i, : i + 1])
        name = f"{i + 1} state{'s' if i else ''}"
        rows.append((name, particles, exact, f"{hidden.numbers[i]:8.2f}   {visits}"))
    for name, particles, exact, rest in rows:
        error = float(particles.log_evidence_variance) ** 0.5
        print(f"  {name:14s}{float(particles.log_evidence):8.2f} ± {error:.2f} {exact:>9s}", end="")
        print(f"{float(particles.ess()):8,.0f}{particles.khat():7.2f}{rest}".rstrip())
    visits = " ".join(f"{p:.2f}" for p in hidden.numbers @ hidden.visits)
    print(f"  {'any number of states':59s}{visits:>{len(visits) + 6}s}")


def print_verdicts(change: OneChange, hidden: States, years: np.ndarray) -> None:
    probability = change.probability.mean(axis=(0, 1))
    exact = special.softmax(change.exact)
    likely, error = probability.argmax(), abs(probability - exact).max()
    near = probability[max(likely - 2, 0) : likely + 3].sum()
    before, after = np.asarray(change.draws["level"]).mean(axis=(0, 1))
    low, high = np.asarray(hidden.draws["level"]).mean(axis=(0, 1))
    print(
        f"\nOne change: from {before:.0f} to {after:.0f} km³ a year. The first year of the second"
    )
    print(
        f"  level is {years[1 + likely]} with probability {probability[likely]:.2f}, within two years"
    )
    print(f"  of it with {near:.2f}; by quadrature the same within {error:.3f}.")

    moves = np.diff(hidden.path, axis=-1) != 0
    once = moves.sum(axis=-1) == 1
    when = years[1 + np.bincount(moves[once].argmax(axis=-1)).argmax()]
    print(
        f"Two states: at {low:.0f} and {high:.0f} km³ a year. The most probable path changes once in"
    )
    print(f"  {once.mean():.0%} of the draws, most often in {when}.")

    odds = float(jnp.exp(change.evidence.log_evidence - hidden.evidence[1].log_evidence))
    print(
        f"One change is {odds:.0f} times as probable as two states, which may go back and never do."
    )
    used = hidden.numbers @ hidden.visits
    print(
        f"How many states: {1 + hidden.numbers.argmax()} is most probable, and says little: a state that is never"
    )
    print(
        f"  visited costs nothing. {1 + used.argmax()} are visited with probability {used.max():.2f}."
    )


# ---- the picture -----------------------------------------------------------------------------------------------------

ORANGE, BLUE = "#d55e00", "#0072b2"
SHADES = ("0.6", "#56b4e9", "#009e73", "#e69f00")


def draw_picture(
    change: OneChange, hidden: States, years: np.ndarray, flow: np.ndarray, path: Path
) -> None:
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = plt.figure(figsize=(12, 8), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=[3, 1])
        axes = left.subplots(4, 1, sharex=True, height_ratios=[3, 1.2, 3, 1.2])
        draw_levels(axes[0], years, flow, change.mean, ORANGE)
        axes[0].set_title("One change: the level, 90 % band")
        axes[1].bar(
            years[1:], change.probability.mean(axis=(0, 1)), color=ORANGE, label="recovered"
        )
        axes[1].plot(years[1:], special.softmax(change.exact), "k_", markersize=5, label="exact")
        axes[1].set(title="Probability that the second level begins in a year", ylim=(0, None))
        axes[1].legend(frameon=False)
        draw_levels(axes[2], years, flow, hidden.mean, BLUE)
        axes[2].set_title("Two states: the level, 90 % band")
        high = hidden.probability[..., 1].mean(axis=(0, 1))
        axes[3].fill_between(years, high, step="mid", color=BLUE, alpha=0.4, linewidth=0)
        axes[3].step(years, hidden.path.mean(axis=(0, 1)), where="mid", color="k", linewidth=0.9)
        axes[3].set(title="Probability of the upper state (line: on the most probable paths)")
        axes[3].set(ylim=(0, 1.05), xlim=(years[0] - 1, years[-1] + 1))

        axis = right.subplots()
        numbers, base = np.arange(1, MAX_STATES + 1), np.zeros(MAX_STATES)
        for i, shade in enumerate(SHADES[:MAX_STATES]):
            share = hidden.numbers * hidden.visits[:, i]
            axis.bar(numbers, share, 0.7, base, color=shade, label=f"{i + 1} visited")
            base += share
        axis.set(title="Probability of K states", xlabel="K", xticks=numbers, ylim=(0, None))
        axis.legend(frameon=False, loc="upper left", reverse=True)
        for a in (*axes, axis):
            a.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def draw_levels(
    axis: Any, years: np.ndarray, flow: np.ndarray, mean: np.ndarray, colour: str
) -> None:
    """The data, and the posterior of the level of each year."""
    low, middle, high = np.quantile(mean, [0.05, 0.5, 0.95], axis=(0, 1))
    axis.plot(years, flow, color="0.6", linewidth=0.8, marker="o", markersize=2.5)
    axis.fill_between(years, low, high, step="mid", color=colour, alpha=0.3, linewidth=0)
    axis.step(years, middle, where="mid", color=colour)
    axis.set_ylabel("km³ a year")


def main() -> None:
    start = time.perf_counter()
    table = np.loadtxt(HERE / "data" / "nile.csv", delimiter=",", skiprows=1)
    years, flow = table[:, 0].astype(int), table[:, 1] / 10  # 10^8 m³ to km³
    none, once = exact_log_evidence(flow)
    first, second = jax.random.split(jax.random.key(0))
    change = find_change(first, flow, once)
    hidden = find_states(second, flow, none)
    print_table(change, hidden)
    print_verdicts(change, hidden, years)
    OUT.mkdir(exist_ok=True)
    draw_picture(change, hidden, years, flow, OUT / "changepoints.png")
    print(f"\n{time.perf_counter() - start:.0f} s. Picture: {OUT / 'changepoints.png'}")


if __name__ == "__main__":
    main()
