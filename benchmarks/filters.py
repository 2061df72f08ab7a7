"""A bootstrap filter beside the same by hand: compiled work, time, and how both grow.

    python benchmarks/filters.py                 counts: flops and bytes
    python benchmarks/filters.py --times 9       and times: medians of 9 rounds in turns
    python benchmarks/filters.py --growth        and seconds over numbers of particles and of steps
    python benchmarks/filters.py --growth --plot growth.png            and a picture of them
    python benchmarks/filters.py --tempering     tempering, beside BlackJAX's and beside exact log evidences
    python benchmarks/filters.py --variance      the variance of the log evidence, estimated from one run

The model is stochastic volatility, x_t = mu + rho (x_{t-1} - mu) + sigma e_t and y_t ~ N(0, exp(x_t)), with mu = -1,
rho = 0.95, sigma = 0.25, 1,000 steps; 10,000 particles, systematic resampling. By hand it is a `jax.lax.scan` with the
same resampling, random keys derived in the same way, and NumPyro's densities. Counts are those of XLA's cost analysis:
integer work of random keys is counted as flops, and the body of a loop once. Peers are timed where they are installed:
`particles`, on NumPy and numba, and `cuthbert`, on JAX.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples are no part of the package

from weft.inference import filtering, kernels, multinomial, smc, systematic, tempering

from benchmarks.posteriors import CASES, load
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
    """Log evidence, last particles and their log weights, by a key and a target."""
    algorithm = smc(filtering(), num_particles=num_particles, threshold=threshold)

    def run(key: Any, y: Any) -> Any:
        found = algorithm.run(key, volatility(len(y)).given({"y": y}), progress=False)
        return found.log_evidence, found.choices["x"], found.log_weights

    return run


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
        x, log_weights, evidence = jax.lax.scan(step, carry, (jnp.arange(1, len(y)), y[1:]))[0]
        return evidence, x, log_weights

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
        return filtered.logLt, filtered.X, filtered.W

    return run


def by_cuthbert(num_particles: int, threshold: float) -> Callable[..., Any]:
    """The same by the package `cuthbert`."""
    from cuthbert import filter as run_filter
    from cuthbert.smc.particle_filter import build_filter
    from cuthbertlib.resampling import adaptive, systematic

    def propagate(key: Any, x: Any, inputs: Any) -> Any:
        return MU + RHO * (x - MU) + inputs[0] * jax.random.normal(key)

    def log_potential(before: Any, x: Any, inputs: Any) -> Any:
        return dist.Normal(0.0, jnp.exp(x / 2)).log_prob(inputs[1])

    resample = systematic.resampling
    if threshold < 1:
        resample = adaptive.ess_decorator(resample, threshold)
    made = build_filter(
        lambda key: jnp.asarray(MU), propagate, log_potential, num_particles, resample
    )

    def run(key: Any, y: Any) -> Any:
        first, rest = jax.random.split(key)
        scales = jnp.full(len(y), SIGMA).at[0].set(FIRST)
        states = run_filter(made, (scales, y), made.init_prepare(key=first), key=rest)
        return states.log_normalizing_constant[-1], states.particles[-1], states.log_weights[-1]

    return run


PEERS = {"particles": by_particles, "cuthbert": by_cuthbert}


def systems() -> dict[str, Callable[..., Any]]:
    """Weft, by hand, and the peers that are installed."""
    there = {name: make for name, make in PEERS.items() if importlib.util.find_spec(name)}
    return {"weft": by_weft, "by hand": by_hand, **there}


def compiled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What is timed."""
    return function if name == "particles" else jax.jit(function)


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


# --- growth -----------------------------------------------------------------------------------------------------------

PARTICLES, STEPS = (10**3, 10**4, 10**5, 10**6), (100, 1000, 10_000)


def growth() -> dict[tuple[int, int], dict[str, float]]:
    """Seconds over numbers of particles, 100 steps, and over numbers of steps, 1,000 particles; resampling always."""
    found = {}
    for n, steps in dict.fromkeys([*((n, 100) for n in PARTICLES), *((1000, t) for t in STEPS)]):
        ready = {name: compiled(name, make(n, 1.0)) for name, make in systems().items()}
        found[n, steps] = seconds(ready, (jax.random.key(1), data(steps)), 3)
    return found


def plot(found: dict[tuple[int, int], dict[str, float]], path: str) -> None:
    """Both panels of growth, logarithmic."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    points = ([(n, 100) for n in PARTICLES], [(1000, t) for t in STEPS])
    names = ("particles, 100 steps", "steps, 1,000 particles")
    for which, (panel, keys, name) in enumerate(zip(panels, points, names, strict=True)):
        for system in found[keys[0]]:
            times = [found[key][system] for key in keys]
            panel.loglog([key[which] for key in keys], times, marker="o", ms=3, label=system)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=100)


# --- variance ---------------------------------------------------------------------------------------------------------

SCHEMES = ((200, multinomial, 1.0), (1000, multinomial, 1.0), (1000, systematic, 0.5))


@gen
def autoregression(num_steps: int) -> None:
    """A coefficient of .95, seen in noise of deviation one."""

    def step(x: Any, _: Any) -> Any:
        x = sample("x", dist.Normal(0.95 * x, 0.3))
        sample("y", dist.Normal(x, 1.0))
        return x, None

    jax.lax.scan(step, 0.0, length=num_steps)


def variances(num_steps: int = 1000, num_runs: int = 300) -> None:
    """The variance of the log evidence over runs, beside its estimate from each."""
    y = autoregression(num_steps).simulate(jax.random.key(0)).choices["y"]
    target = autoregression(num_steps).given({"y": y})
    keys = jax.random.split(jax.random.key(1), num_runs)
    print(f"\nVariance of the log evidence, {num_steps} steps, {num_runs} runs\n")
    print("| particles | resampling | over the runs | mean of the estimates (deviation) |")
    print("| ---: | --- | ---: | ---: |")
    for n, scheme, threshold in SCHEMES:
        algorithm = smc(filtering(), n, resample=scheme, threshold=threshold)

        def run(key: Any, algorithm: Any = algorithm) -> Any:
            found = algorithm.run(key, target, progress=False)
            return found.log_evidence, found.log_evidence_variance

        logs, single = (np.asarray(x, float) for x in jax.jit(lambda k: jax.lax.map(run, k))(keys))
        variance = logs.var(ddof=1)
        cells = f"{variance:.2f} ± {variance * (2 / num_runs) ** 0.5:.2f} | {single.mean():.2f} ({single.std():.2f})"
        print(f"| {n} | {scheme.__name__}, {threshold:g} | {cells} |")


# --- tempering --------------------------------------------------------------------------------------------------------

DIM, NOISE, MOVES, MOST_STEPS = 10, 0.1, 10, 200


@gen
def normals() -> None:
    """Ten normal numbers, seen with a tenth of their deviation."""
    x = sample("x", dist.Normal(jnp.zeros(DIM), 1.0).to_event(1))
    sample("y", dist.Normal(x, NOISE).to_event(1))


def by_blackjax(num_particles: int, y: Any) -> Callable[..., Any]:
    """BlackJAX's adaptive tempering, its steps in one loop; log evidence and number of steps."""
    import blackjax
    from blackjax.smc import extend_params, resampling

    settings = {"step_size": 0.1, "inverse_mass_matrix": jnp.ones(DIM), "num_integration_steps": 5}
    algorithm = blackjax.adaptive_tempered_smc(
        lambda x: dist.Normal(0.0, 1.0).log_prob(x).sum(),
        lambda x: dist.Normal(x, NOISE).log_prob(y).sum(),
        blackjax.hmc.build_kernel(),
        blackjax.hmc.init,
        extend_params(settings),
        resampling.systematic,
        0.5,
        num_mcmc_steps=MOVES,
    )

    def run(key: Any) -> Any:
        first, rest = jax.random.split(key)
        state = algorithm.init(jax.random.normal(first, (num_particles, DIM)))

        def step(carry: Any) -> Any:
            state, evidence, i = carry
            state, info = algorithm.step(jax.random.fold_in(rest, i), state)
            return state, evidence + info.log_likelihood_increment, i + 1

        def going_on(carry: Any) -> Any:
            state, _, i = carry
            return (state.tempering_param < 1) & (i < MOST_STEPS)

        begun = (state, jnp.zeros(()), jnp.int32(0))
        return jax.lax.while_loop(going_on, step, begun)[1:]

    return run


def tempered(algorithm: Any, target: Any) -> Callable[..., Any]:
    """Log evidence and number of steps by a key."""

    def run(key: Any) -> Any:
        found = algorithm.run(key, target, progress=False)
        return found.log_evidence, found.state.iteration

    return run


def temperings(rounds: int, num_particles: int = 2000) -> None:
    """Evidence, its spread over twenty keys, and seconds of one run."""
    y = jnp.linspace(-2.0, 2.0, DIM)
    exact = float(dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(y).sum())
    target = normals().given({"y": y})
    same = smc(
        tempering(num_moves=MOVES), num_particles, threshold=1.0, rejuvenate=kernels.hmc(0.1, 5)
    )
    makers = {
        "weft, the same moves": tempered(same, target),
        "blackjax": by_blackjax(num_particles, y),
        "weft, its own moves": tempered(smc(tempering(), num_particles), target),
    }
    ready = {name: jax.jit(make) for name, make in makers.items()}
    times = seconds(ready, (jax.random.key(1),), rounds)
    keys = jax.random.split(jax.random.key(2), 20)
    print(f"\nTempering, {num_particles} particles; the log evidence is {exact:.2f}\n")
    print("| system | steps | log evidence, less the exact | spread | seconds |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, run in ready.items():
        logs, steps = (np.asarray(x, float) for x in jax.lax.map(run, keys))
        off = f"{np.mean(logs) - exact:.2f} ± {np.std(logs) / 20**0.5:.2f}"
        print(f"| {name} | {steps.mean():.1f} | {off} | {np.std(logs):.2f} | {times[name]:.3f} |")


REFERENCES = ("sblri", "eight_schools_noncentered", "brownian_known_scales")


def references(num_runs: int = 16) -> None:
    """Tempering from the prior beside exact log evidences, in double precision."""
    print(f"\nFrom the prior, 1,000 particles, {num_runs} runs\n")
    print("| target | temperatures | moves | log evidence, less the exact | spread |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in REFERENCES:
        case, algorithm = CASES[name], smc(tempering(), 1000)
        known = load(case, "reference")
        exact = next(v for k, v in known.items() if k.startswith("log_evidence_exact"))
        with jax.enable_x64(True):
            target = case.target(load(case, "data"))

            def run(key: Any, target: Any = target, algorithm: Any = algorithm) -> Any:
                found = algorithm.run(key, target, progress=False)
                return found.log_evidence, found.state.iteration, found.path.info["num_moves"]

            keys = jax.random.split(jax.random.key(2), num_runs)
            found = jax.jit(lambda keys, run=run: jax.lax.map(run, keys))(keys)
        logs, steps, moves = (np.asarray(x, float) for x in found)
        off = f"{logs.mean() - exact:.2f} ± {logs.std() / num_runs**0.5:.2f}"
        cells = (f"{steps.mean() - 1:.1f}", f"{moves.sum(1).mean():.0f}", off, f"{logs.std():.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=0)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--tempering", action="store_true")
    parser.add_argument("--variance", action="store_true")
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
        made = {name: make(options.particles, threshold) for name, make in systems().items()}
        work = {name: counts(made[name], (key, y)) for name in ("weft", "by hand")}
        ready = {name: compiled(name, f) for name, f in made.items()}
        times = seconds(ready, (key, y), options.times) if options.times else {}
        for name, function in ready.items():
            cells = [
                f"{count:.4g} ({count / base:.3f})"
                for count, base in zip(work.get(name, ()), work["by hand"], strict=False)
            ] or ["", ""]
            cells.append(f"{times[name]:.3f}" if times else "")
            evidence = float(function(key, y)[0])
            print(f"| ESS < {threshold:g} N | {name} | {' | '.join(cells)} | {evidence:.2f} |")
    if options.growth:
        found = growth()
        names = list(next(iter(found.values())))
        print(
            f"\n| particles | steps | {' | '.join(names)} |\n| ---: | ---: {'| ---: ' * len(names)}|"
        )
        for (n, steps), times in found.items():
            print(f"| {n} | {steps} | {' | '.join(f'{times[x]:.3f}' for x in names)} |")
        if options.plot:
            plot(found, options.plot)
    if options.variance:
        variances()
    if options.tempering:
        temperings(max(options.times, 3))
        references()


if __name__ == "__main__":
    main()
