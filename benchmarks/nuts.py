"""Effective samples a second of NUTS: Weft (BlackJAX's kernel) beside NumPyro's, same target, same settings.

    python benchmarks/nuts.py [--rounds 5]

Both run vectorised chains. The first run of each, which compiles, is reported apart; then the two take turns, and the
median of (smallest effective sample size over all scalars) / (seconds of warm-up and sampling) is printed.
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
Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)


def numpyro_schools(sigma: Any, y: Any) -> None:
    """Non-centred by hand, as NumPyro's users write it."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        base = numpyro.sample("base", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * base, sigma), obs=y)


def weft_runner(target: Any, settings: dict[str, int]) -> Callable[[int], dict[str, np.ndarray]]:
    """Draws by address for a seed."""
    algorithm = nuts(**settings)

    def run(seed: int) -> dict[str, np.ndarray]:
        draws = algorithm.run(jax.random.key(seed), target, progress=False)
        return jax.tree.map(np.asarray, draws.choices)

    return run


def numpyro_runner(
    model: Any, args: tuple, settings: dict[str, int]
) -> Callable[[int], dict[str, np.ndarray]]:
    """The same by NumPyro; its compiled sampler is kept between runs."""
    mcmc = MCMC(NUTS(model), **settings, chain_method="vectorized", progress_bar=False)

    def run(seed: int) -> dict[str, np.ndarray]:
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


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of the regression")
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    settings = {"num_warmup": 500, "num_samples": options.samples, "num_chains": 4}
    x, _, y = logistic_data(options.rows)
    problems = {
        "eight schools, non-centred": {
            "weft": weft_runner(
                noncentered(schools, "theta")(jnp.asarray(SIGMA)).given({"y": Y}), settings
            ),
            "numpyro": numpyro_runner(numpyro_schools, (SIGMA, Y), settings),
        },
        f"logistic regression, {options.rows:,} rows": {
            "weft": weft_runner(logistic(x).given({"y": y}), settings),
            "numpyro": numpyro_runner(numpyro_logistic, (x, y), settings),
        },
    }
    print(f"jax {jax.__version__}, {settings}\n")
    print("| problem | system | first run s | later run s | min ESS | ESS a second | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for problem, runners in problems.items():
        first, seconds, ess, speed = ({system: [] for system in runners} for _ in range(4))
        for seed in range(options.rounds + 1):
            for system, run in runners.items():
                start = time.perf_counter()
                draws = run(seed)
                taken = time.perf_counter() - start
                if seed == 0:
                    first[system].append(taken)
                    continue
                seconds[system].append(taken)
                ess[system].append(smallest_ess(draws))
                speed[system].append(ess[system][-1] / taken)
        median = statistics.median
        for system in runners:
            ratio = median(speed[system]) / median(speed["numpyro"])
            print(
                f"| {problem} | {system} | {first[system][0]:.1f} | {median(seconds[system]):.2f} |"
                f" {median(ess[system]):,.0f} | {median(speed[system]):,.0f} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
