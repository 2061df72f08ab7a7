"""Check that a wheel holds every module of the repository, under `weft/`, and nothing else."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "weft": "weft",
    "ppl": "weft/ppl",
    "inference": "weft/inference",
    "models": "weft/models",
}


def main(wheel: str) -> None:
    """Compare the names in `wheel` with the files in the repository, then import from the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.endswith("/")}
    wanted = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    } | {"weft/py.typed"}
    dist_info = {name for name in held if name.split("/")[0].endswith(".dist-info")}
    problems = [f"missing: {name}" for name in sorted(wanted - held)]
    problems += [f"unexpected: {name}" for name in sorted(held - dist_info - wanted)]
    if not any(name.endswith("/LICENSE") for name in dist_info):
        problems.append("missing: LICENSE")
    if problems:
        sys.exit(f"{wheel}:\n  " + "\n  ".join(problems))

    with tempfile.TemporaryDirectory() as empty:  # not the repository, whose folders would be found
        code = (
            f"import sys; sys.path.insert(0, {str(Path(wheel).resolve())!r})\n"
            "import weft, weft.ppl, weft.inference, weft.models\n"
            "assert '.whl' in weft.ppl.__file__, weft.ppl.__file__\n"
        )
        subprocess.run([sys.executable, "-c", code], cwd=empty, check=True)
    print(f"{Path(wheel).name}: {len(wanted)} files, all there, all under weft/")


if __name__ == "__main__":
    main(*sys.argv[1:])
