"""Effective samples a second of NUTS: Weft (BlackJAX's kernel) beside NumPyro's, same target, same settings.

    python benchmarks/nuts.py [--rounds 5]

Both run vectorised chains; the smallest effective sample size over all scalars counts. NumPyro compiles at every run,
Weft at the first. So two speeds are given: of a whole second run (1,000 draws a chain), and of sampling alone, the
slope between that and a run of ten times the draws. The systems take turns; medians over rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks are no part of the package

from weft.inference import nuts

from benchmarks.workloads import logistic, logistic_data, numpyro_logistic, schools
from weft import noncentered

SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32)
SETTINGS = {"num_warmup": 500, "num_chains": 4}
LENGTHS = (1000, 10_000)
Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)


def numpyro_schools(sigma: Any, y: Any) -> None:
    """Non-centred by hand, as NumPyro's users write it."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        base = numpyro.sample("base", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * base, sigma), obs=y)


def weft_runner(target: Any) -> Callable[[int, int], dict[str, np.ndarray]]:
    """Draws by address for a seed and a number of draws a chain."""

    def run(seed: int, num_samples: int) -> dict[str, np.ndarray]:
        algorithm = nuts(num_samples=num_samples, **SETTINGS)
        draws = algorithm.run(jax.random.key(seed), target, progress=False)
        return jax.tree.map(np.asarray, draws.choices)

    return run


def numpyro_runner(model: Any, args: tuple) -> Callable[[int, int], dict[str, np.ndarray]]:
    """The same by NumPyro; its sampler is kept between runs."""
    samplers: dict[int, MCMC] = {}

    def run(seed: int, num_samples: int) -> dict[str, np.ndarray]:
        if num_samples not in samplers:
            samplers[num_samples] = MCMC(
                NUTS(model),
                num_samples=num_samples,
                **SETTINGS,
                chain_method="vectorized",
                progress_bar=False,
                jit_model_args=True,
            )
        mcmc = samplers[num_samples]
        mcmc.run(jax.random.key(seed), *args)
        return jax.tree.map(np.asarray, mcmc.get_samples(group_by_chain=True))

    return run


def smallest_ess(draws: dict[str, np.ndarray]) -> float:
    """The smallest effective sample size over all scalars."""
    return min(
        float(effective_sample_size(leaf.reshape(*leaf.shape[:2], -1)[..., i]))
        for leaf in jax.tree.leaves(draws)
        for i in range(int(np.prod(leaf.shape[2:])))
    )


def measure(run: Callable[[int, int], dict[str, np.ndarray]], seed: int) -> dict[str, float]:
    """Seconds and effective samples of a short run, and both speeds."""
    seconds, ess = {}, {}
    for length in LENGTHS:
        start = time.perf_counter()
        draws = run(seed, length)
        seconds[length] = time.perf_counter() - start
        ess[length] = smallest_ess(draws)
    short, long = LENGTHS
    slope = (ess[long] - ess[short]) / (seconds[long] - seconds[short])
    return {
        "seconds": seconds[short],
        "ess": ess[short],
        "whole": ess[short] / seconds[short],
        "sampling": slope,
    }


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", nargs="?", default="", help="part of a problem's name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000, help="rows of the regression")
    options = parser.parse_args()
    x, _, y = logistic_data(options.rows)
    schools_target = noncentered(schools, "theta")(jnp.asarray(SIGMA)).given({"y": Y})
    problems = {
        "eight schools, non-centred": {
            "weft": weft_runner(schools_target),
            "numpyro": numpyro_runner(numpyro_schools, (SIGMA, Y)),
        },
        f"logistic regression, {options.rows:,} rows": {
            "weft": weft_runner(logistic(x).given({"y": y})),
            "numpyro": numpyro_runner(numpyro_logistic, (x, y)),
        },
    }
    print(f"jax {jax.__version__}, {SETTINGS}\n")
    print(
        "| problem | system | first run s | second run s | min ESS | ESS/s, second run | ESS/s, sampling |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for problem, runners in problems.items():
        if options.problem not in problem:
            continue
        first = {}
        for system, run in runners.items():
            start = time.perf_counter()
            run(0, LENGTHS[0])
            first[system] = time.perf_counter() - start
            run(0, LENGTHS[1])
        found: dict[str, list[dict[str, float]]] = {system: [] for system in runners}
        for seed in range(1, options.rounds + 1):
            for system, run in runners.items():
                found[system].append(measure(run, seed))
        median = {
            system: {k: statistics.median(f[k] for f in values) for k in values[0]}
            for system, values in found.items()
        }
        for system, m in median.items():
            ratios = [m[k] / median["numpyro"][k] for k in ("whole", "sampling")]
            print(
                f"| {problem} | {system} | {first[system]:.1f} | {m['seconds']:.2f} | {m['ess']:,.0f} |"
                f" {m['whole']:,.0f} ({ratios[0]:.1f}x) | {m['sampling']:,.0f} ({ratios[1]:.1f}x) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
