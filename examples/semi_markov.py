"""Segments that last a typical time: a semi-Markov chain, written as a Markov chain of pairs.

    python examples/semi_markov.py

In a hidden Markov model a segment ends with the same probability at every step, however long it has lasted, so that
short ones are the most frequent. Here a segment draws its duration when it begins. A step has two sites, the state and
how many steps of the segment are left after it. Together they are a Markov chain, and `marginalize` sums both out, one
after the other: a step costs K² D + K D² terms for K states and durations up to D, where pairs would take K² D².

A short series is checked against the sum over all joint values. A longer one, simulated with Poisson durations, is
fitted by NUTS and cut into segments again: once with the same durations, once with geometric ones of the same mean,
which are those of a hidden Markov model. Prints how many steps each gets right, and saves `out/semi_markov.png`.
WEFT_FAST=1 makes a shorter run.
"""

import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
from weft.inference import Draws, Particles, enumeration, nuts

from weft import condition, deterministic, gen, marginalize, recover, sample

OUT = Path(__file__).resolve().parent.parent / "out"
FAST = os.environ.get("WEFT_FAST", "") not in ("", "0")
NUM_STATES, LONGEST, NUM_STEPS, NUM_DRAWS = (2, 16, 120, 100 if FAST else 300)


def poisson(mean):
    """Steps of a segment after its first: about as many each time."""
    return dist.Poisson(mean)


def geometric(mean):
    """As many on average, but without memory."""
    return dist.GeometricProbs(1 / (1 + mean))


@gen
def segments(rest, longest, num_steps):
    """Segments in one of a few states, seen with noise. `rest` is the law of their lengths after the first step."""
    middle = sample("middle", dist.Normal(0.0, 2.0))
    gaps = sample("gaps", dist.LogNormal(0.0, 0.5).expand([NUM_STATES - 1]))
    above = jnp.cumsum(jnp.append(0.0, gaps))  # in order: no labels to exchange
    level = deterministic("level", middle + above - above.mean())
    typical = sample("typical", dist.LogNormal(2.1, 0.3).expand([NUM_STATES]))
    duration = jax.nn.softmax(rest(typical[:, None]).log_prob(jnp.arange(longest)))
    same = jnp.eye(NUM_STATES)
    other = (1 - same) / (NUM_STATES - 1)

    def step(before, _):
        state, left = before
        ends = left == 0
        state = sample("state", dist.Categorical(probs=jnp.where(ends, other[state], same[state])))
        one_less = jax.nn.one_hot(left - 1, longest)
        left = sample("left", dist.Categorical(probs=jnp.where(ends, duration[state], one_less)))
        sample("y", dist.Normal(level[state], 1.0))
        return (state, left), None

    before = sample("before", dist.Categorical(probs=jnp.full(NUM_STATES, 1 / NUM_STATES)))
    jax.lax.scan(step, (before, 0), length=num_steps)


summed_out = marginalize(segments, "before", "state", "left")


def check(key: Any) -> None:
    """Five steps, durations up to three: the sum over all joint values, and their probabilities."""
    args = (poisson, 3, 5)
    choices = segments(*args).simulate(key).choices
    known = {name: choices[name] for name in ("middle", "gaps", "typical")}
    data = {"y": choices["y"]}
    every = enumeration().run(key, segments(*args).given({**known, **data}), progress=False)
    log_density = summed_out(*args).given({**known, **data}).log_density({})

    point = Particles(
        choices=jax.tree.map(lambda x: x[None], known),
        log_weights=jnp.zeros(1),
        target=summed_out(*args).given(data),
    )
    found = recover(key, summed_out, point, *args, sites="marginals").derived["state"][0]
    shown = jax.nn.one_hot(every["state"], NUM_STATES)
    gap = jnp.abs(found - jnp.einsum("i,itk->tk", every.weights, shown)).max()
    print(f"{every.num_particles:,} joint values, summed one by one: {every.log_evidence:.5f}")
    print(f"by marginalize: {log_density:.5f}; probabilities of states differ by {gap:.1e} at most")


TRUTH = {"middle": 0.0, "gaps": jnp.array([1.0]), "typical": jnp.array([7.0, 9.0])}


def draw_picture(truth: Any, draws: Draws, found: dict[str, Any], path: Path) -> None:
    """The data with the true segments; below, the states as each law of durations recovers them."""
    steps, colours = np.arange(NUM_STEPS), ("#0072b2", "#e69f00", "#d55e00")
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure, axes = plt.subplots(
            3, 1, figsize=(10, 6.5), sharex=True, height_ratios=[2.2, 1, 1], layout="constrained"
        )
        level = np.asarray(draws["level"]).mean(axis=(0, 1))
        axes[0].plot(steps, truth["y"], "o", color="0.6", markersize=3, label="data")
        axes[0].step(steps, truth["level"][truth["state"]], "k", where="mid", label="true level")
        path_level = level[found["Poisson"]["path"]]
        axes[0].step(steps, path_level, colours[0], where="mid", label="most probable path")
        axes[0].legend(loc="upper left", ncols=3, frameon=False)
        axes[0].set(title="A series of segments", ylim=(None, truth["y"].max() + 1))
        for axis, (name, answer) in zip(axes[1:], found.items(), strict=True):
            axis.stackplot(steps, answer["probability"].T, colors=colours, step="mid", alpha=0.75)
            for t in np.flatnonzero(np.diff(truth["state"])):
                axis.axvline(t + 0.5, color="k", linewidth=0.8)
            axis.set_title(f"Probability of each state, {name} durations (lines: true ends)")
            axis.set(ylim=(0, 1), xlim=(-0.5, NUM_STEPS - 0.5))
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def main() -> None:
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), 6)
    check(keys[0])

    args = (LONGEST, NUM_STEPS)
    truth = condition(segments, TRUTH)(poisson, *args).simulate(keys[1])
    truth = {k: np.asarray(v) for k, v in {**truth.choices, **truth.derived}.items()}
    target = summed_out(poisson, *args).given({"y": truth["y"]})
    print(f"\n{NUM_STEPS} steps: posterior", flush=True)
    draws = nuts(200, NUM_DRAWS).run(keys[2], target)
    print(draws)

    found = {}
    for name, rest in {"Poisson": poisson, "geometric": geometric}.items():
        again = [
            recover(keys[3], summed_out, draws, rest, *args, sites=sites)["state"]
            for sites in ("marginals", "viterbi")
        ]
        probability = np.asarray(again[0]).mean(axis=(0, 1))
        paths = np.asarray(again[1]).reshape(-1, NUM_STEPS)
        kinds, counts = np.unique(paths, axis=0, return_counts=True)
        path = kinds[counts.argmax()]
        found[name] = {"probability": probability, "path": path}
        right = (probability.argmax(axis=-1) == truth["state"]).mean()
        print(
            f"{name:10s}{right:5.0%} of the steps right, {1 + (np.diff(path) != 0).sum()} segments"
        )
    print(f"{'truth':10s}{'':24s}{1 + (np.diff(truth['state']) != 0).sum()} segments")

    OUT.mkdir(exist_ok=True)
    draw_picture(truth, draws, found, OUT / "semi_markov.png")
    print(f"\n{time.perf_counter() - start:.0f} s. Picture: {OUT / 'semi_markov.png'}")


if __name__ == "__main__":
    main()
