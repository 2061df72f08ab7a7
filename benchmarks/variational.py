"""Variational inference: what a bound's gradient costs, what bounds are reached, and what peers give.

    python benchmarks/variational.py vae-flops            counts: four layouts of two autoencoders
    python benchmarks/variational.py vae-times            run times at batches of 64 to 1,024, by hand and in Weft
    python benchmarks/variational.py vae-compile          seconds to trace and to compile
    python benchmarks/variational.py cone                 bounds on the noisy cone, near their optimum

Peers in environments of their own are in `peers.py`.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks are no part of the package

from weft.inference import diwhvi, elbo, fit, hvi, iwelbo, iwhvi

from benchmarks.costs import count_equations, counts
from benchmarks.workloads import LEAKY, SOFTPLUS, vae
from weft import gen, sample

AUTOENCODERS = {"784-200-10": LEAKY, "784-400-50": SOFTPLUS}
BATCHES = (64, 128, 256, 512, 1024)


def table(*columns: str) -> None:
    """Print the head of a table."""
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)


# ---- autoencoders ----------------------------------------------------------------------------------------------------


def like(versions: dict[str, Any]) -> str:
    """The hand-written version to compare with: the one that draws as Weft does."""
    return "hand, a key a lane" if "hand, a key a lane" in versions else "hand"


def vae_flops() -> None:
    table("autoencoder", "layout", "version", "equations", "flops", "of hand", "bytes")
    for name, networks in AUTOENCODERS.items():
        for label, operation in vae(networks).items():
            found = {v: counts(f, operation.args) for v, f in operation.versions.items()}
            base = found[like(operation.versions)]["flops"]
            for version, count in found.items():
                print(
                    f"| {name} | {label.split(', ')[1]} | {version} | {count['equations']} | "
                    f"{count['flops']:,.0f} | {count['flops'] / base:.4f} | {count['bytes']:,.0f} |",
                    flush=True,
                )


def turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, which take turns; in another order each round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name in calls:
        jax.block_until_ready(calls[name]())
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            begin = time.perf_counter()
            jax.block_until_ready(calls[name]())
            samples[name].append(time.perf_counter() - begin)
    return samples


def vae_times(rounds: int) -> None:
    print(f"Medians of {rounds} calls of each version, which take turns; ms a gradient.")
    table("autoencoder", "layout", "batch", "hand", "weft", "numpyro", "weft of hand")
    for name, networks in list(AUTOENCODERS.items())[:1]:
        for batch in BATCHES:
            for label, operation in vae(networks, batch).items():
                compiled = {
                    v: functools.partial(jax.jit(f), *operation.args)
                    for v, f in operation.versions.items()
                }
                by_hand = like(compiled)
                samples = turns({v: compiled[v] for v in (by_hand, "weft", "numpyro")}, rounds)
                ms = {v: 1e3 * statistics.median(s) for v, s in samples.items()}
                # Of pairs that follow one another: other work on the machine weighs on both.
                pairs = zip(samples["weft"], samples[by_hand], strict=True)
                ratio = statistics.median(a / b for a, b in pairs)
                print(
                    f"| {name} | {label.split(', ')[1]} | {batch} | {ms[by_hand]:.2f} | {ms['weft']:.2f} | "
                    f"{ms['numpyro']:.2f} | {ratio:.3f} |",
                    flush=True,
                )


def vae_compile(rounds: int) -> None:
    table(
        "autoencoder", "layout", "version", "equations", "trace ms", "compile ms", "both, of hand"
    )
    for name, networks in AUTOENCODERS.items():
        for label, operation in vae(networks).items():
            samples: dict[str, list[tuple[float, float]]] = {v: [] for v in operation.versions}
            for _ in range(rounds):
                for version, function in operation.versions.items():
                    jax.clear_caches()  # else a second trace is a look-up
                    begin = time.perf_counter()
                    lowered = jax.jit(lambda *args, f=function: f(*args)).lower(*operation.args)
                    traced = time.perf_counter()
                    lowered.compile()
                    samples[version].append((traced - begin, time.perf_counter() - traced))
            both = {v: statistics.median(a + b for a, b in s) for v, s in samples.items()}
            for version, pairs in samples.items():
                trace, build = (1e3 * statistics.median(x) for x in zip(*pairs, strict=True))
                equations = count_equations(
                    jax.make_jaxpr(operation.versions[version])(*operation.args)
                )
                print(
                    f"| {name} | {label.split(', ')[1]} | {version} | {equations} | {trace:.0f} | {build:.0f} | "
                    f"{both[version] / both[like(both)]:.2f} |",
                    flush=True,
                )


# ---- the noisy cone --------------------------------------------------------------------------------------------------
# A point (x, y) seen through its squared distance from the origin: a posterior around a circle, and bounds that tell
# guides and objectives apart (Becker et al. 2024, table 4).

Z = 5.0
LOG_EVIDENCE = -5.3232
"""By quadrature over the squared distance, whose prior is exponential."""


@gen
def cone():
    x = sample("x", dist.Normal(0.0, 10.0))
    y = sample("y", dist.Normal(0.0, 10.0))
    square = x**2 + y**2
    sample("z", dist.Normal(square, 0.1 + square / 100))


@gen
def naive(phi):
    """Independent normals."""
    sample("x", dist.Normal(phi[0], jnp.exp(phi[2])))
    sample("y", dist.Normal(phi[1], jnp.exp(phi[3])))


@gen
def around(phi):
    """Normals around a point of the circle, which is an auxiliary choice."""
    angle = 2 * jnp.pi * sample("u", dist.Uniform(0.0, 1.0))
    sample("x", dist.Normal(math.sqrt(Z) * jnp.cos(angle), jnp.exp(phi[0])))
    sample("y", dist.Normal(math.sqrt(Z) * jnp.sin(angle), jnp.exp(phi[1])))


@dataclass(frozen=True)
class Bound:
    """An objective, where its fit begins, and its optimum.

    Attributes:
        objective: of parameters alone.
        start: parameters.
        optimum: found by a hand-written estimator from 200,000 draws.
    """

    objective: Callable[..., Any]
    start: tuple[float, ...]
    optimum: float


def cone_bounds() -> dict[str, Bound]:
    target = cone().given({"z": Z})
    return {
        "ELBO": Bound(elbo(target, naive), (0.0, 0.0, 1.0, 1.0), -8.078),
        "IWELBO, K = 5": Bound(
            iwelbo(target, naive, num_particles=5), (3.0, 0.0, 1.0, 1.0), -7.532
        ),
        "HVI": Bound(hvi(target, around), (0.0, 0.0), -9.747),
        "IWHVI, M = 5": Bound(iwhvi(target, around, num_auxiliary=5), (0.0, 0.0), -8.179),
        "DIWHVI, K = M = 5": Bound(
            diwhvi(target, around, num_particles=5, num_auxiliary=5), (0.0, 0.0), -7.314
        ),
    }


def mean_of(objective: Callable[..., Any], num: int) -> Callable[..., Any]:
    """The mean of independent estimates."""

    def mean(key, *args):
        keys = jax.random.split(key, num)
        return jnp.mean(jax.vmap(lambda k: objective(k, *args))(keys))

    return mean


def fit_cone(
    bound: Bound, num_steps: int = 3_000, num_draws: int = 256, num_test: int = 400_000
) -> tuple[float, float, Any]:
    """The bound at fitted parameters from fresh draws, its standard error, and the parameters."""
    keys = jax.random.split(jax.random.key(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, num_steps))
    objective = mean_of(bound.objective, num_draws)
    phi = fit(
        keys[0], objective, jnp.array(bound.start), optimizer, num_steps, progress=False
    ).params
    draws = jax.jit(
        lambda key, phi: jax.lax.map(
            lambda k: bound.objective(k, phi), jax.random.split(key, num_test), batch_size=10_000
        )
    )(keys[1], phi)
    return float(draws.mean()), float(draws.std() / math.sqrt(num_test)), np.asarray(phi)


def cone_table(num_steps: int) -> None:
    print(f"Adam, {num_steps:,} steps of 256 draws; the log evidence is {LOG_EVIDENCE}.")
    table("objective", "bound", "reference", "difference", "parameters", "seconds")
    for name, bound in cone_bounds().items():
        begin = time.perf_counter()
        value, error, phi = fit_cone(bound, num_steps)
        seconds = time.perf_counter() - begin
        print(
            f"| {name} | {value:.3f} ± {error:.3f} | {bound.optimum:.3f} | {value - bound.optimum:+.3f} | "
            f"{', '.join(f'{p:.3f}' for p in phi)} | {seconds:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("vae-flops", "vae-times", "vae-compile", "cone")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--rounds", type=int, default=40, help="calls whose median is taken")
    parser.add_argument("--steps", type=int, default=3_000, help="of the fits of the cone")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"no part {sorted(unknown)}: take {', '.join(parts)}")
    run = {
        "vae-flops": vae_flops,
        "vae-times": lambda: vae_times(options.rounds),
        "vae-compile": lambda: vae_compile(max(options.rounds // 8, 3)),
        "cone": lambda: cone_table(options.steps),
    }
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}")
    for part in options.parts or parts:
        print(f"\n### {part}\n")
        run[part]()


if __name__ == "__main__":
    main()
