"""Run the reference posteriors by NUTS and hold them against their references.

    python benchmarks/posteriors.py                     all of them, at the documented settings
    python benchmarks/posteriors.py kidiq hmm           some of them
    python benchmarks/posteriors.py --samples 200 -v    a short run, every scalar printed

For each scalar z = (mean - reference) / sqrt(own_mcse^2 + reference_mcse^2), the reference being exact (and its error
zero) where quadrature or a closed form exists. A case passes if |z| < 4 for every scalar and every ratio of standard
deviations lies in [0.9, 1.1] at an effective sample size of at least 1000. The Monte-Carlo errors are NumPyro's, not
Weft's own.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpyro.diagnostics import effective_sample_size

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the examples are no part of the package

from weft.inference import nuts  # noqa: E402

from examples.posteriors import CASES, Case  # noqa: E402

REFERENCES = ROOT / "tests" / "refcases"
DEFAULTS = {"num_warmup": 1000, "num_samples": 1000, "num_chains": 4}
SEED = 0


@dataclass(frozen=True)
class Row:
    """One scalar of one case: what was found and what was expected."""

    scalar: str
    mean: float
    sd: float
    ess: float
    reference_mean: float
    reference_sd: float
    reference_mcse: float

    @property
    def z(self) -> float:
        mcse = self.sd / np.sqrt(self.ess)
        return (self.mean - self.reference_mean) / np.hypot(mcse, self.reference_mcse)

    @property
    def sd_ratio(self) -> float:
        return self.sd / self.reference_sd


def load(case: Case, part: str) -> dict[str, Any]:
    """The content of `data.json` or `reference.json`."""
    return json.loads((REFERENCES / case.folder / f"{part}.json").read_text())


def scalars(case: Case, draws: Any) -> dict[str, np.ndarray]:
    """The reported scalars by their 1-based names, each (chain, draw)."""
    found = {}
    for address in case.report:
        values = draws.choices.get(address)
        values = np.asarray(draws.derived[address] if values is None else values, float)
        if values.ndim == 2:
            found[address] = values
        else:
            for i in range(values.shape[2]):
                found[f"{address}[{i + 1}]"] = values[..., i]
    return found


def sample(case: Case, **settings: Any) -> Any:
    """NUTS draws from a case's posterior; `settings` override the case's own, those the defaults."""
    with jax.enable_x64(case.x64):
        data = load(case, "data")
        init = None if case.init is None else case.init(data)
        algorithm = nuts(**{**DEFAULTS, **case.settings, **settings})
        return algorithm.run(jax.random.key(SEED), case.target(data), init=init, progress=False)


def compare(case: Case, draws: Any) -> list[Row]:
    """Every reported scalar beside its reference."""
    reference = load(case, "reference")
    exact, params = reference.get("exact", {}), reference.get("params", {})
    rows = []
    for name, values in scalars(case, draws).items():
        if name in exact:
            expected = (exact[name]["mean"], exact[name]["sd"], 0.0)
        else:
            expected = tuple(params[name][k] for k in ("mean", "sd", "mcse_mean"))
        ess = float(effective_sample_size(values))
        rows.append(Row(name, float(values.mean()), float(values.std()), ess, *expected))
    return rows


def main() -> None:
    """Print a Markdown table, a line a case; exit with 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"among {', '.join(CASES)}")
    parser.add_argument("--samples", type=int, help="draws a chain after warm-up")
    parser.add_argument("--warmup", type=int, help="iterations of warm-up")
    parser.add_argument("--chains", type=int, help="number of chains")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every scalar")
    options = parser.parse_args()
    given = {"num_samples": options.samples, "num_warmup": options.warmup}
    settings = {k: v for k, v in (given | {"num_chains": options.chains}).items() if v is not None}

    header = "| case | scalars | max abs z | worst sd ratio | min ESS | divergences | seconds | |"
    print(f"jax {jax.__version__}\n\n{header}\n|{' --- |' * (header.count('|') - 1)}")
    failed = []
    for name in options.names or CASES:
        case = CASES[name]
        start = time.perf_counter()
        draws = sample(case, **settings)
        rows = compare(case, draws)
        seconds = time.perf_counter() - start
        z = max(abs(row.z) for row in rows)
        ratio = max((row.sd_ratio for row in rows), key=lambda r: abs(np.log(r)))
        ess = min(row.ess for row in rows)
        divergences = int(np.asarray(draws.stats["diverging"]).sum())
        passed = z < 4 and 0.9 <= ratio <= 1.1 and ess >= 1000
        failed += [] if passed else [name]
        print(
            f"| {name} | {len(rows)} | {z:.2f} | {ratio:.3f} | {ess:,.0f} | {divergences} |"
            f" {seconds:.0f} | {'pass' if passed else 'FAIL'} |",
            flush=True,
        )
        for row in rows if options.verbose else ():
            print(
                f"    {row.scalar:28s} mean {row.mean:10.4f} ({row.reference_mean:10.4f})"
                f"  sd {row.sd:9.4f} ({row.reference_sd:9.4f})  z {row.z:6.2f}  ESS {row.ess:6.0f}"
            )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
