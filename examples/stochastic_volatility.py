"""How uncertain is the rate of interest? Filtering, smoothing, parameters and a forecast, by particles.

    python examples/stochastic_volatility.py

The quarterly change of the rate of three-month US Treasury bills is now a tenth of a point and now, in 1980, six. Its
log variance is taken to be a process of its own, which is never seen (Taylor 1986; Kim, Shephard and Chib 1998):

    h_t = mu + phi (h_{t-1} - mu) + sigma e_t,   y_t = exp(h_t / 2) u_t.

1. Filtering, with the parameters given: the bootstrap filter beside one that looks at y_t before it draws h_t.
2. Smoothing: paths drawn backwards, beside those that the last particles descend from, which share their beginnings.
3. The posterior of the parameters: PMMH and particle Gibbs, and NUTS on everything at once as a check of both.
4. A forecast from the end of 2006 on, beside what came: a filter whose data are shorter than its scan. The rate
   then fell for two years, which a model whose changes have independent signs takes for improbable.

Prints tables and saves `out/stochastic_volatility.png`. WEFT_FAST=1 makes a run too short for
its numbers to mean much, and leaves NUTS out.
"""

import csv
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
from weft.inference import (
    Draws,
    backward_sampling,
    filtering,
    nuts,
    particle_gibbs,
    pmmh,
    smc,
)

from weft import gen, kernels, sample

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out"
FAST = os.environ.get("WEFT_FAST", "") not in ("", "0")
PARAMETERS = ("mu", "phi", "sigma")
HELD_OUT = 11  # quarters: 2007 and what followed
ROUGHLY = {
    "mu": -1.4,
    "phi": 0.93,
    "sigma": 0.6,
}  # for filtering and smoothing; near the posterior means


@gen
def volatility(num_steps):
    """Changes "y" of a rate, and their log variances "h". The carry is the law of the next of these."""
    mu = sample("mu", dist.Normal(-1.0, 1.0))
    phi = sample("phi", dist.Beta(20.0, 1.5))
    sigma = sample("sigma", dist.LogNormal(-1.0, 0.5))

    def step(law, _):
        h = sample("h", dist.Normal(*law))
        y = sample("y", dist.Normal(0.0, jnp.exp(h / 2)))
        return (mu + phi * (h - mu), sigma), y

    return jax.lax.scan(step, (mu, sigma / jnp.sqrt(1 - phi**2)), length=num_steps)[1]


@gen
def around(mode, scale):
    """The proposal of a step."""
    sample("h", dist.Normal(mode, scale))


def informed(law, t, observed):
    """The normal of the prior's spread about the mode of p(h | carry, y), found by Newton's method.

    The density of y is log-concave in h, so that it lies below its tangent at the mode: weights are bounded.
    """
    mean, scale = law
    seen = ~jnp.isnan(observed["y"])
    square = jnp.where(seen, observed["y"], 0.0) ** 2

    def newton(_, h):
        pull = 0.5 * square * jnp.exp(-h)
        slope = (mean - h) / scale**2 + pull - 0.5 * seen
        return h + slope / (1 / scale**2 + pull)

    return around(jax.lax.fori_loop(0, 4, newton, mean), scale)


def read() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dates, rates in per cent, and their changes in points."""
    with (HERE / "data" / "tbill.csv").open() as file:
        rows = list(csv.DictReader(file))
    dates = np.array([int(r["year"]) + (int(r["quarter"]) - 1) / 4 for r in rows])
    rates = np.array([float(r["rate"]) for r in rows])
    return dates, rates, np.diff(rates)


# ---- with the parameters given ---------------------------------------------------------------------------------------


def compare_filters(key: Any, target: Any) -> dict[str, np.ndarray]:
    """The evidence by two filters, from independent runs; their effective sample sizes, on average.

    They resample at every step, so that the size after each is that of the weights of this step alone.
    """
    num_particles, num_runs = 500, 10 if FAST else 100
    keys = jax.random.split(key, num_runs)
    print(
        f"{'filter':12s}{'log evidence':>20s}{'sd of a run':>14s}{'smallest ess':>14s}{'its step':>10s}"
    )
    found = {}
    for name, proposal in {"bootstrap": None, "informed": informed}.items():
        algorithm = smc(filtering(proposal), num_particles, threshold=1.0)
        run = jax.jit(jax.vmap(lambda k, a=algorithm: a.run(k, target, progress=False)))
        runs = run(keys)
        logs, ess = np.asarray(runs.log_evidence, float), np.asarray(runs.path.ess).mean(0)
        shares = np.exp(logs - logs.max())
        mean, error = shares.mean(), shares.std(ddof=1) / num_runs**0.5
        evidence = f"{logs.max() + np.log(mean):.2f} ± {error / mean:.2f}"
        print(
            f"{name:12s}{evidence:>20s}{logs.std(ddof=1):14.2f}{ess.min():14.0f}{ess.argmin():10d}"
        )
        found[name] = ess / num_particles
    return found


def compare_paths(key: Any, target: Any) -> dict[str, np.ndarray]:
    """How many different values the paths have at each step: those of the genealogy, and those drawn backwards."""
    filter_key, smooth_key = jax.random.split(key)
    algorithm = smc(filtering(informed), 500, history="full")
    filtered = algorithm.run(filter_key, target, progress=False)
    smoothed = backward_sampling(smooth_key, filtered, num_samples=500)
    kinds = {"genealogy": filtered.choices["h"], "drawn backwards": smoothed.choices["h"]}
    counts = {
        name: np.array([np.unique(column).size for column in np.asarray(h).T])
        for name, h in kinds.items()
    }
    for name, count in counts.items():
        print(f"500 paths, {name}: {count[0]} values at the first step, {count[-1]} at the last")
    return counts


# ---- the parameters --------------------------------------------------------------------------------------------------


def infer(key: Any, target: Any) -> dict[str, Draws]:
    """The posterior three times, and a table of it."""
    short, long = (20, 30) if FAST else (500, 1000)
    moves = kernels.block(kernels.slice_sampler(1.0), *PARAMETERS)
    algorithms = {
        "PMMH": pmmh(50 if FAST else 200, long, short, filter=filtering(informed), paths=False),
        "particle Gibbs": particle_gibbs(moves, 20, long, num_warmup=short // 2, proposal=informed),
    }
    if not FAST:
        algorithms["NUTS"] = nuts(num_warmup=short, num_samples=long)
    print(
        f"\n{'':16s}{'':8s}{'mean':>8s}{'mcse':>8s}{'sd':>8s}{'ess':>8s}{'r_hat':>8s}{'seconds':>9s}"
    )
    found = {}
    for name, algorithm in algorithms.items():
        start = time.perf_counter()
        # PMMH begins at draws of the prior; the path that particle Gibbs begins with should be likely.
        init = ROUGHLY if name == "particle Gibbs" else None
        found[name] = algorithm.run(key, target, init=init, progress=False)
        taken = time.perf_counter() - start
        summary = found[name].summary()
        for parameter in PARAMETERS:
            row = summary[parameter]
            print(
                f"{name:16s}{parameter:8s}{row['mean']:8.3f}{row['mcse']:8.3f}{row['sd']:8.3f}"
                f"{row['ess_bulk']:8.0f}{row['r_hat']:8.3f}{taken:9.0f}",
                flush=True,
            )
            name, taken = "", 0.0
    return found


# ---- the forecast ----------------------------------------------------------------------------------------------------


def forecast(key: Any, draws: Draws, y: Any) -> np.ndarray:
    """Changes after the data: for some draws of the parameters, a particle of a filter that goes on without data."""
    num = 40 if FAST else 500
    flat = {p: draws[p].reshape(-1) for p in PARAMETERS}
    chosen = jnp.linspace(0, flat["mu"].size - 1, num).astype(int)
    longer = volatility(len(y) + HELD_OUT)

    def one(item: Any) -> Any:
        parameters, key = item
        filter_key, key = jax.random.split(key)
        target = longer.given({**parameters, "y": y})
        algorithm = smc(filtering(informed), 100, history="full")
        paths = algorithm.run(filter_key, target, progress=False)
        return paths.choices["y"][jax.random.categorical(key, paths.log_weights), len(y) :]

    parameters = {p: x[chosen] for p, x in flat.items()}
    every = jax.jit(lambda items: jax.lax.map(one, items, batch_size=20))
    return np.asarray(every((parameters, jax.random.split(key, num))))


# ---- the picture -----------------------------------------------------------------------------------------------------

COLOURS = ("#0072b2", "#d55e00", "#009e73")


def draw_picture(
    data: Any, ess: Any, counts: Any, found: dict[str, Draws], ahead: np.ndarray, path: Path
) -> None:
    dates, rates, y = data
    num = len(y) - HELD_OUT
    layout = "aaa;bbc;def;ggg"
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure, axes = plt.subplot_mosaic(layout, figsize=(11, 12), layout="constrained")

        h = np.asarray(found["particle Gibbs"]["h"])
        low, middle, high = np.quantile(np.exp(h / 2), [0.05, 0.5, 0.95], axis=(0, 1))
        then, axis = dates[1 : num + 1], axes["a"]
        for sign in (-2, 2):
            axis.fill_between(then, sign * low, sign * high, color=COLOURS[0], alpha=0.25, lw=0)
            axis.plot(then, sign * middle, color=COLOURS[0], lw=0.8)
        axis.plot(then, y[:num], color="k", lw=0.8)
        axis.set(title="Quarterly change, points; two standard deviations: median and 90 %")

        for (name, share), colour in zip(ess.items(), COLOURS, strict=False):
            axes["b"].plot(then, share, color=colour, lw=1, label=name)
        axes["b"].set(title="Effective sample size over particles", ylim=(0, 1))
        for (name, count), colour in zip(counts.items(), COLOURS, strict=False):
            axes["c"].plot(then, count, color=colour, lw=1, label=name)
        axes["c"].set(title="Different values of 500 paths", ylim=(0, None))

        for panel, parameter in zip("def", PARAMETERS, strict=True):
            values = [np.asarray(draws[parameter]).ravel() for draws in found.values()]
            low, high = np.quantile(np.concatenate(values), [0.001, 0.999])
            edges = np.linspace(low, high, 30)
            for x, name, colour in zip(values, found, COLOURS, strict=False):
                shape = {"bins": edges, "density": True, "histtype": "step", "lw": 1.2}
                axes[panel].hist(x, color=colour, label=name, **shape)
            axes[panel].set(title=parameter, yticks=[])

        axis, levels = axes["g"], rates[num] + np.cumsum(ahead, 1)
        start = np.full((len(levels), 1), rates[num])
        bands = np.quantile(np.hstack([start, levels]), [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
        for i, label, alpha in ((0, "90 %", 0.25), (1, "50 %", 0.5)):
            shade = {"color": COLOURS[0], "alpha": alpha, "lw": 0, "label": label}
            axis.fill_between(dates[num:], bands[i], bands[4 - i], **shade)
        recent = dates > 1995
        axis.plot(dates[recent], rates[recent], color="k", lw=1, label="rate")
        axis.axvline(dates[num], color="0.6", lw=0.8)
        axis.set(title="Rate, per cent, and its forecast from the end of 2006 on")

        for panel in "bcdg":
            axes[panel].legend(frameon=False)
        for axis in axes.values():
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def main() -> None:
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), 4)
    dates, rates, y = read()
    past, future = y[:-HELD_OUT], y[-HELD_OUT:]
    print(f"{len(past)} changes until the end of 2006; parameters given: {ROUGHLY}", flush=True)

    target = volatility(len(past)).given({"y": past})
    known = target.given(ROUGHLY)
    ess = compare_filters(keys[0], known)
    counts = compare_paths(keys[1], known)
    found = infer(keys[2], target)

    ahead = forecast(keys[3], found["particle Gibbs"], past)
    low, high = np.quantile(ahead, [0.05, 0.95], axis=0)
    inside = ((low < future) & (future < high)).sum()
    print(f"\n90 % band of each change: {low[0]:.1f} to {high[0]:.1f} points at first, ", end="")
    print(f"{low[-1]:.1f} to {high[-1]:.1f} at last; {inside} of {HELD_OUT} changes fell within")

    OUT.mkdir(exist_ok=True)
    draw_picture((dates, rates, y), ess, counts, found, ahead, OUT / "stochastic_volatility.png")
    taken = time.perf_counter() - start
    print(f"\n{taken:.0f} s. Picture: {OUT / 'stochastic_volatility.png'}")


if __name__ == "__main__":
    main()
