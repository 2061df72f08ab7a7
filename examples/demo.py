"""Two models, three ways to their posteriors, and the exact answers beside them.

    make demo            or   python examples/demo.py

Eight schools (Rubin 1981) and the test scores of 434 children (Gelman and Hill 2006). Each model is written once,
below. Its posterior is then found three times:

1. NUTS, on the model with its funnel taken out by `noncentered`;
2. a variational fit: a guide, which is a program too, trained to maximise the evidence lower bound;
3. importance sampling with the fitted guide as the proposal, which removes the fit's remaining bias, with
   Pareto's k-hat to say whether the weights can be trusted (below 0.7 they can).

In both problems the exact posterior is a one-dimensional integral away, so every number can be checked. Prints a
table, saves `out/demo.csv` and `out/demo.png`. WEFT_FAST=1 makes a shorter run.
"""

import csv
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ExpTransform
from weft.inference import elbo, fit, importance, nuts

import exact  # beside this file
from weft import Program, Target, gen, noncentered, sample

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out"
FAST = os.environ.get("WEFT_FAST", "") not in ("", "0")

# ---- the models ------------------------------------------------------------------------------------------------------


@gen
def schools(sigma):
    """Effects of coaching in eight schools, each measured with a known standard error."""
    mu = sample("mu", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(5.0))

    def school(s):
        theta = sample("theta", dist.Normal(mu, tau))
        return sample("y", dist.Normal(theta, s))

    return jax.vmap(school, axis_name="school")(sigma)


@gen
def regression(design):
    """A linear regression with flat coefficients."""
    beta = sample("beta", dist.ImproperUniform(constraints.real_vector, (), (design.shape[1],)))
    sigma = sample("sigma", dist.HalfCauchy(2.5))
    return jax.vmap(lambda x: sample("y", dist.Normal(x @ beta, sigma)), axis_name="child")(design)


# ---- the guides: programs over the same addresses, with parameters to fit --------------------------------------------


@gen
def schools_guide(params, sigma, y):
    """tau, then mu given tau, then each effect given both, shrunk towards mu as far as tau says.

    tau is a Student's t folded at zero: its tails are heavier than the posterior's, which bounds the weights.
    """
    tau = sample("tau", dist.FoldedDistribution(dist.StudentT(5.0, 0.0, jnp.exp(params["tau"]))))
    loc, loc_slope, scale, scale_slope = params["mu"]
    pull = tau / (tau + 10.0)
    mu = sample("mu", dist.Normal(loc + loc_slope * pull, jnp.exp(scale + scale_slope * pull)))

    def school(s, y):
        trust = tau**2 / (tau**2 + s**2)
        return sample("theta", dist.Normal(mu + trust * (y - mu), jnp.sqrt(trust) * s))

    return jax.vmap(school)(sigma, y)


@gen
def regression_guide(params, fitted, spread):
    """sigma, then the coefficients given sigma, around the least-squares `fitted` as widely as sigma * `spread`."""
    loc, scale = params["log_sigma"]
    log_sigma = dist.StudentT(10.0, loc, jnp.exp(scale))
    sigma = sample("sigma", dist.TransformedDistribution(log_sigma, ExpTransform()))
    centre = fitted + sigma * spread @ params["shift"]
    factor = sigma * spread * jnp.exp(params["log_width"])
    return sample("beta", dist.MultivariateNormal(centre, scale_tril=factor))


# ---- the problems ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A model on its data, and what the three strategies need.

    Attributes:
        title: what it is called in the table.
        target: the posterior, for the guide.
        sampled: the posterior as NUTS sees it.
        guide: from parameters to a program over the target's latents.
        params: where the fit starts.
        exact: the exact posterior of every scalar.
        labels: what the scalars are called in the picture.
        settings: for `nuts`.
    """

    title: str
    target: Target
    sampled: Target
    guide: Callable[[Any], Program]
    params: Any
    exact: dict[str, exact.Exact]
    labels: dict[str, str]
    settings: dict[str, Any]


def eight_schools() -> Problem:
    """Eight schools: a hierarchical model."""
    data = json.loads((HERE / "data" / "eight_schools.json").read_text())
    sigma, y = jnp.array(data["sigma"], float), jnp.array(data["y"], float)
    labels = {"mu": "mean effect", "tau": "spread of effects"}
    labels |= {f"theta[{i}]": f"school {name}" for i, name in enumerate(data["school"])}
    return Problem(
        title="Eight schools",
        target=schools(sigma).given({"y": y}),
        sampled=noncentered(schools, "theta")(sigma).given({"y": y}),
        guide=lambda params: schools_guide(params, sigma, y),
        params={"tau": jnp.array(1.0), "mu": jnp.array([0.0, 0.0, 1.0, 0.0])},
        exact=exact.eight_schools(data["y"], data["sigma"]),
        labels=labels,
        settings={"target_acceptance": 0.95},
    )


def test_scores() -> Problem:
    """Children's test scores on the mother's schooling and IQ: a regression with strongly correlated columns."""
    data = {
        k: np.array(v, float) for k, v in json.loads((HERE / "data/kidiq.json").read_text()).items()
    }
    school, iq, y = data["mom_hs"], data["mom_iq"], data["kid_score"]
    design = np.stack([np.ones_like(iq), school, iq, school * iq], axis=1)
    fitted = jnp.asarray(np.linalg.lstsq(design, y, rcond=None)[0])
    spread = jnp.asarray(np.linalg.cholesky(np.linalg.inv(design.T @ design)))
    target = regression(jnp.asarray(design)).given({"y": y})
    names = ("intercept", "mother's schooling", "mother's IQ", "schooling × IQ")
    return Problem(
        title="Children's test scores",
        target=target,
        sampled=target,
        guide=lambda params: regression_guide(params, fitted, spread),
        params={
            "log_sigma": jnp.array([2.0, -2.0]),
            "shift": jnp.zeros(4),
            "log_width": jnp.array(0.0),
        },
        exact=exact.regression(design, y, prior_scale=2.5),
        labels={f"beta[{i}]": n for i, n in enumerate(names)} | {"sigma": "residual sd"},
        settings={"dense_mass": True},
    )


# ---- the three strategies --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What one strategy found: weighted draws of every scalar, and how far to trust them."""

    draws: dict[str, np.ndarray]
    weights: np.ndarray
    quality: dict[str, str]

    def summary(self, name: str) -> tuple[float, float, float, float]:
        """Mean, sd, 5 % and 95 % quantile of a scalar."""
        x, w = self.draws[name], self.weights
        mean = w @ x
        order = np.argsort(x)
        low, high = np.interp([0.05, 0.95], np.cumsum(w[order]), x[order])
        return mean, np.sqrt(w @ (x - mean) ** 2), low, high


def scalars(choices: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays (draws,) by scalar, from arrays (draws, ...) by address: `theta[0]` is the first element of `theta`."""
    found = {}
    for name, values in choices.items():
        values = np.asarray(values, float)
        if values.ndim == 1:
            found[name] = values
        else:
            found |= {f"{name}[{i}]": values[:, i] for i in range(values.shape[1])}
    return found


def by_nuts(key: jax.Array, problem: Problem) -> Answer:
    """Markov chain Monte Carlo."""
    n = 200 if FAST else 1000
    algorithm = nuts(num_warmup=n, num_samples=n, num_chains=4, **problem.settings)
    draws = algorithm.run(key, problem.sampled)
    summary = draws.summary()
    print(f"  {summary.verdict}")
    addresses = {name.partition("[")[0] for name in problem.exact}
    chains = {address: np.asarray(draws[address]) for address in addresses}
    found = scalars({k: v.reshape(-1, *v.shape[2:]) for k, v in chains.items()})
    quality = {name: f"ESS {summary[name]['ess_bulk']:,.0f}" for name in problem.exact}
    return Answer(found, np.full(4 * n, 1 / (4 * n)), quality)


def by_fit(key: jax.Array, problem: Problem) -> tuple[Program, Answer]:
    """Variational inference: the guide's parameters, by stochastic gradients of the bound."""
    steps, n = (500, 2000) if FAST else (2000, 20_000)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    objective = elbo(problem.target, problem.guide, num_samples=32)
    fitting, drawing = jax.random.split(key)
    fitted = fit(fitting, objective, problem.params, optimizer, num_steps=steps)
    traces = jax.vmap(fitted.guide.simulate)(jax.random.split(drawing, n))
    return fitted.guide, Answer(scalars(traces.choices), np.full(n, 1 / n), {})


def by_importance(key: jax.Array, problem: Problem, guide: Program) -> Answer:
    """Importance sampling from the fitted guide."""
    particles = importance(guide, 2000 if FAST else 20_000).run(key, problem.target)
    quality = f"ESS {float(particles.ess()):,.0f}, k-hat {particles.khat():.2f}"
    weights = np.asarray(particles.weights, float)
    return Answer(scalars(particles.choices), weights, dict.fromkeys(problem.exact, quality))


# ---- the table and the picture ---------------------------------------------------------------------------------------

COLOURS = {"NUTS": "#0072b2", "importance": "#d55e00", "variational": "#009e73"}


def print_table(problem: Problem, answers: dict[str, Answer]) -> list[tuple[Any, ...]]:
    """Print every scalar by every strategy; give the rows back."""
    print(f"\n{problem.title:36s}{'mean':>8s}{'sd':>8s}{'90 % interval':>20s}")
    rows = []
    for name, true in problem.exact.items():
        lines = {"exact": (true.mean, true.sd, *true.interval)}
        lines |= {strategy: answer.summary(name) for strategy, answer in answers.items()}
        for strategy, (mean, sd, low, high) in lines.items():
            quality = answers[strategy].quality.get(name, "") if strategy in answers else ""
            label = {"exact": name, "NUTS": f"  {problem.labels[name]}"}.get(strategy, "")
            numbers = f"{mean:9.3f}{sd:8.3f}  [{low:8.3f},{high:8.3f} ]"
            print(f"  {label:21s}{strategy:12s}{numbers}  {quality}".rstrip())
            rows.append((problem.title, name, strategy, mean, sd, low, high, quality))
    return rows


def smooth(x: np.ndarray, weights: np.ndarray, grid: np.ndarray, low: float | None) -> np.ndarray:
    """A weighted kernel density estimate on an even grid; what leaks below `low` = grid[0] is reflected."""
    spread = np.sqrt(weights @ (x - weights @ x) ** 2)
    bandwidth = 0.9 * spread * (1 / (weights**2).sum()) ** -0.2
    step = grid[1] - grid[0]
    reach = int(4 * bandwidth / step) + 1
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / bandwidth) ** 2)
    start = grid[0] - reach * step
    edges = start + step * (np.arange(reach + grid.size + 1) - 0.5)
    counts = np.histogram(x, edges, weights=weights)[0]
    if low is not None:
        counts += np.histogram(2 * low - x, edges, weights=weights)[0]
    return np.convolve(counts, kernel / kernel.sum() / step, mode="same")[reach:]


def draw_picture(problems: dict[str, tuple[Problem, dict[str, Answer]]], path: Path) -> None:
    """One panel a scalar: the exact density filled, the three strategies over it."""
    columns = 5
    rows = [-(-len(problem.exact) // columns) for problem, _ in problems.values()]
    style = {"font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9.5}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12.5, 2.15 * sum(rows) + 1.2), layout="constrained")
        parts = figure.subfigures(len(rows), 1, height_ratios=[r + 0.25 for r in rows])
        for part, count, (title, (problem, answers)) in zip(
            parts, rows, problems.items(), strict=True
        ):
            part.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
            axes = part.subplots(count, columns, squeeze=False).ravel()
            for axis in axes[len(problem.exact) :]:
                axis.set_axis_off()
            for axis, (name, true) in zip(axes, problem.exact.items(), strict=False):
                draw_panel(axis, name, problem, true, answers)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def draw_panel(
    axis: Any, name: str, problem: Problem, true: exact.Exact, answers: dict[str, Answer]
) -> None:
    """One scalar."""
    low = 0.0 if name in ("tau", "sigma") and true.x[0] < 0.05 * true.sd else None
    left = low if low is not None else true.mean - 3.6 * true.sd
    grid = np.linspace(left, true.mean + 3.6 * true.sd, 400)
    axis.fill_between(true.x, true.density, color="0.87", linewidth=0, label="exact")
    axis.plot(true.x, true.density, color="0.55", linewidth=0.8)
    for strategy, answer in answers.items():
        density = smooth(answer.draws[name], answer.weights, grid, low)
        style = {"variational": (0, (5, 2)), "importance": (0, (1, 1))}.get(strategy, "-")
        colour = COLOURS[strategy]
        axis.plot(grid, density, color=colour, linestyle=style, linewidth=1.4, label=strategy)
    axis.set_title(problem.labels[name], pad=3)
    axis.set_xlim(grid[0], grid[-1])
    axis.set_ylim(0, 1.12 * true.density[(true.x >= grid[0])].max())
    axis.locator_params(axis="x", nbins=5)
    axis.set_yticks([])
    axis.spines[["left", "right", "top"]].set_visible(False)


def main() -> None:
    """Run everything."""
    start = time.perf_counter()
    key, finished, rows = jax.random.key(0), {}, []
    for build in (eight_schools, test_scores):
        problem = build()
        print(f"\n{problem.title}: NUTS, a variational fit, importance sampling", flush=True)
        key, *keys = jax.random.split(key, 4)
        answers = {"NUTS": by_nuts(keys[0], problem)}
        guide, fitted = by_fit(keys[1], problem)
        answers |= {"importance": by_importance(keys[2], problem, guide), "variational": fitted}
        finished[problem.title] = (problem, answers)
    for problem, answers in finished.values():
        rows += print_table(problem, answers)

    OUT.mkdir(exist_ok=True)
    with (OUT / "demo.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "scalar", "strategy", "mean", "sd", "q05", "q95", "quality"))
        writer.writerows(rows)
    draw_picture(finished, OUT / "demo.png")
    print(f"\n{time.perf_counter() - start:.0f} s. Table: {OUT / 'demo.csv'}")
    print(f"Picture: {OUT / 'demo.png'}")


if __name__ == "__main__":
    main()
