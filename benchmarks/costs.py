"""What a program costs: traced equations, compiled work, and time, beside hand-written JAX and NumPyro.

    python benchmarks/costs.py                 counts only: equations, flops, bytes
    python benchmarks/costs.py --times 9       and times: medians of 9 interleaved rounds

Counts are those of XLA's cost analysis of the compiled program on this machine. It counts the integer work of random
keys as flops too, and the body of a loop once, whatever its length, for all systems alike.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks are no part of the package

from benchmarks.workloads import WORKLOADS, Operation


def count_equations(jaxpr: Any) -> int:
    """Equations of a jaxpr and of all jaxprs inside it; calls themselves count too."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for eqn in jaxpr.eqns:
        inner = [
            leaf
            for value in eqn.params.values()
            for leaf in (value if isinstance(value, tuple | list) else (value,))
            if hasattr(leaf, "eqns") or hasattr(getattr(leaf, "jaxpr", None), "eqns")
        ]
        total += 1 + sum(count_equations(j) for j in inner)
    return total


def counts(function: Any, args: tuple) -> dict[str, float]:
    """Equations traced, and flops and bytes accessed of the compiled function."""
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return {
        "equations": count_equations(jax.make_jaxpr(function)(*args)),
        "flops": analysis.get("flops", 0.0),
        "bytes": analysis.get("bytes accessed", 0.0),
    }


def measure(operation: Operation, rounds: int, calls: int = 20) -> dict[str, dict[str, float]]:
    """Median seconds to trace, to compile and to run, over `rounds` in which the systems take turns."""
    samples: dict[str, dict[str, list[float]]] = {
        system: {"trace": [], "compile": [], "run": []} for system in operation.versions
    }
    for _ in range(rounds):
        for system, function in operation.versions.items():
            jax.clear_caches()  # else a second trace is a look-up
            start = time.perf_counter()
            lowered = jax.jit(lambda *args, f=function: f(*args)).lower(*operation.args)
            traced = time.perf_counter()
            compiled = lowered.compile()
            done = time.perf_counter()
            jax.block_until_ready(compiled(*operation.args))
            runs = []
            for _ in range(calls):
                begin = time.perf_counter()
                jax.block_until_ready(compiled(*operation.args))
                runs.append(time.perf_counter() - begin)
            times = samples[system]
            times["trace"].append(traced - start)
            times["compile"].append(done - traced)
            times["run"].append(statistics.median(runs))
    return {
        system: {name: statistics.median(values) for name, values in times.items()}
        for system, times in samples.items()
    }


def main() -> None:
    """Print one Markdown table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help="parts of workload names (default: all)")
    parser.add_argument("--times", type=int, default=0, metavar="ROUNDS", help="measure times too")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}")
    for name, build in WORKLOADS.items():
        if options.workloads and not any(part in name for part in options.workloads):
            continue
        header = "| operation | version | equations | flops | of hand | bytes |"
        header += " trace ms | compile ms | run us |" if options.times else ""
        print(f"\n### {name}\n\n{header}\n|{' --- |' * (header.count('|') - 1)}")
        for label, operation in build().items():
            times = measure(operation, options.times) if options.times else {}
            found = {s: counts(f, operation.args) for s, f in operation.versions.items()}
            for system, count in found.items():
                ratio = count["flops"] / max(found["hand"]["flops"], 1.0)
                row = f"| {label} | {system} | {count['equations']} | {count['flops']:,.0f} |"
                row += f" {ratio:.3f} | {count['bytes']:,.0f} |"
                if times:
                    t = times[system]
                    row += f" {t['trace'] * 1e3:.0f} | {t['compile'] * 1e3:.0f} |"
                    row += f" {t['run'] * 1e6:.1f} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
