"""A bootstrap filter beside the same by hand: compiled work, time, and how both grow.

    python benchmarks/filters.py                 counts: flops and bytes
    python benchmarks/filters.py --times 9       and times: medians of 9 rounds in turns
    python benchmarks/filters.py --growth        and seconds over numbers of particles and of steps

The model is stochastic volatility, x_t = mu + rho (x_{t-1} - mu) + sigma e_t and y_t ~ N(0, exp(x_t)), with mu = -1,
rho = 0.95, sigma = 0.25, 1,000 steps; 10,000 particles, systematic resampling. By hand it is a `jax.lax.scan` with the
same resampling, random keys derived in the same way, and NumPyro's densities. Counts are those of XLA's cost analysis:
integer work of random keys is counted as flops, and the body of a loop once. Peers are timed where they are installed
(`particles`, on NumPy and numba).
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from weft.inference import filtering, smc, systematic

from weft import gen, sample

MU, RHO, SIGMA = -1.0, 0.95, 0.25
FIRST = SIGMA / (1 - RHO**2) ** 0.5
NAME = 7  # what a key is folded with for the name of a choice


@gen
def volatility(num_steps: int) -> None:
    """A first state from the stationary law, then a scan."""
    scales = jnp.full(num_steps, SIGMA).at[0].set(FIRST)

    def step(mean: Any, scale: Any) -> Any:
        x = sample("x", dist.Normal(mean, scale))
        sample("y", dist.Normal(0.0, jnp.exp(x / 2)))
        return MU + RHO * (x - MU), None

    jax.lax.scan(step, MU, scales)


def data(num_steps: int) -> jax.Array:
    """A series drawn from the model."""
    trace = volatility(num_steps).simulate(jax.random.key(0))
    return trace.choices["y"]


def by_weft(num_particles: int, threshold: float) -> Callable[..., Any]:
    """Log evidence by a key and a target."""
    algorithm = smc(filtering(), num_particles=num_particles, threshold=threshold)
    return lambda key, y: (
        algorithm.run(key, volatility(len(y)).given({"y": y}), progress=False).log_evidence
    )


def by_hand(num_particles: int, threshold: float) -> Callable[..., Any]:
    """The same as a scan."""
    n = num_particles

    def ess(log_weights: Any) -> Any:
        return jnp.exp(2 * logsumexp(log_weights) - logsumexp(2 * log_weights))

    def noise(key: Any) -> Any:
        high, low = jax.random.key_data(key)  # consecutive keys, as Weft's particles have them
        words = jnp.stack([jnp.broadcast_to(high, n), low + jnp.arange(n, dtype=low.dtype)], 1)
        keys = jax.random.wrap_key_data(words)
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, NAME)))(keys)

    def likelihood(x: Any, y: Any) -> Any:
        return dist.Normal(0.0, jnp.exp(x / 2)).log_prob(y)

    def run(key: Any, y: Any) -> Any:
        first, rest = jax.random.split(key)
        x = MU + FIRST * noise(first)
        log_weights = likelihood(x, y[0])
        evidence = logsumexp(log_weights) - jnp.log(n)

        def step(carry: Any, item: Any) -> Any:
            x, log_weights, evidence = carry
            t, y_t = item
            resample_key, move_key = jax.random.split(jax.random.fold_in(rest, t))

            def again() -> Any:
                chosen = systematic(resample_key, log_weights, n)
                return x[chosen], jnp.zeros(n), jnp.log(float(n))

            def as_they_are() -> Any:
                return x, log_weights, logsumexp(log_weights)

            due = (ess(log_weights) <= threshold * n) | (threshold >= 1)
            x, log_weights, before = jax.lax.cond(due, again, as_they_are)
            x = MU + RHO * (x - MU) + SIGMA * noise(move_key)
            log_weights = log_weights + likelihood(x, y_t)
            evidence = evidence + logsumexp(log_weights) - before
            return (x, log_weights, evidence), None

        carry = (x, log_weights, evidence)
        return jax.lax.scan(step, carry, (jnp.arange(1, len(y)), y[1:]))[0][2]

    return run


def by_particles(num_particles: int, threshold: float) -> Callable[..., Any]:
    """The same by the package `particles` (Chopin), in double precision."""
    from particles import SMC
    from particles import distributions as law
    from particles import state_space_models as models

    class Volatility(models.StateSpaceModel):
        def PX0(self) -> Any:
            return law.Normal(loc=MU, scale=FIRST)

        def PX(self, t: int, xp: Any) -> Any:
            return law.Normal(loc=MU + RHO * (xp - MU), scale=SIGMA)

        def PY(self, t: int, xp: Any, x: Any) -> Any:
            return law.Normal(loc=0.0, scale=np.exp(0.5 * x))

    def run(key: Any, y: Any) -> Any:
        model = models.Bootstrap(ssm=Volatility(), data=np.asarray(y, float))
        filtered = SMC(fk=model, N=num_particles, resampling="systematic", ESSrmin=threshold)
        filtered.run()
        return filtered.logLt

    return run


def counts(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[float, float]:
    """Flops and bytes accessed of the compiled function."""
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return analysis.get("flops", 0.0), analysis.get("bytes accessed", 0.0)


def seconds(functions: dict[str, Callable[..., Any]], args: Any, rounds: int) -> dict[str, float]:
    """Medians over rounds in which the functions take turns, after one call each."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            if i:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=0)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--particles", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    y, key = data(options.steps), jax.random.key(1)
    print(
        f"{options.steps} steps, {options.particles} particles, jax {jax.__version__}, "
        f"{jax.devices()[0].device_kind}\n"
    )
    print("| resampling | system | flops | bytes | seconds | log evidence |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for threshold in (1.0, 0.5):
        makers = {"weft": by_weft, "by hand": by_hand}
        if importlib.util.find_spec("particles"):
            makers["particles"] = by_particles
        made = {name: make(options.particles, threshold) for name, make in makers.items()}
        work = {name: counts(made[name], (key, y)) for name in ("weft", "by hand")}
        ready = {n: f if n == "particles" else jax.jit(f) for n, f in made.items()}
        times = seconds(ready, (key, y), options.times) if options.times else {}
        for name, function in ready.items():
            cells = [
                f"{count:.4g} ({count / base:.3f})"
                for count, base in zip(work.get(name, ()), work["by hand"], strict=False)
            ] or ["", ""]
            cells.append(f"{times[name]:.3f}" if times else "")
            evidence = float(function(key, y))
            print(f"| ESS < {threshold:g} N | {name} | {' | '.join(cells)} | {evidence:.2f} |")
    if options.growth:
        print("\n| particles | steps | weft | by hand |\n| ---: | ---: | ---: | ---: |")
        for n, steps in ((10**3, 1000), (10**4, 1000), (10**5, 1000), (10**6, 100), (10**4, 4000)):
            both = {"weft": by_weft(n, 1.0), "by hand": by_hand(n, 1.0)}
            times = seconds({k: jax.jit(f) for k, f in both.items()}, (key, data(steps)), 3)
            print(f"| {n} | {steps} | {times['weft']:.3f} | {times['by hand']:.3f} |")


if __name__ == "__main__":
    main()
