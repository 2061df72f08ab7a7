"""How long `import weft` takes, beside `import numpyro`, on which it stands.

    python benchmarks/imports.py

Processor time of a new interpreter, less that of one that imports nothing; the median of interleaved runs. Bytecode is
written first, as an installation does.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile

PACKAGES = {
    "numpyro": "import numpyro",
    "numpyro and equinox": "import numpyro, equinox",
    "weft": "import weft",
    "weft.inference": "import weft.inference",
}
RUNS = 9


def seconds(code: str, env: dict[str, str]) -> float:
    """User and system time of one interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        codes = {"nothing": "pass", **PACKAGES}
        for code in codes.values():
            seconds(code, env)
        times: dict[str, list[float]] = {name: [] for name in codes}
        for _ in range(RUNS):
            for name, code in codes.items():
                times[name].append(seconds(code, env))
    start = statistics.median(times.pop("nothing"))
    medians = {name: statistics.median(found) - start for name, found in times.items()}
    print("| import | seconds | of numpyro's |\n| --- | ---: | ---: |")
    for name, found in medians.items():
        print(f"| {name} | {found:.2f} | {found / medians['numpyro']:.2f} |")


if __name__ == "__main__":
    main()
