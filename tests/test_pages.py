"""The code on the front pages runs as it stands."""

import importlib
import pkgutil
import re
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/index.md",
        "docs/language.md",
        "docs/inference.md",
        "docs/marginalisation.md",
        "docs/smc.md",
        "docs/testing.md",
        "docs/variational.md",
    ],
)
def test_code_on_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks, f"{page} shows no code"
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.strip(), f"the code of {page} prints nothing"


@pytest.mark.parametrize("page", ["ppl", "inference"])
def test_reference_names_everything_public(page: str) -> None:
    module = importlib.import_module(f"weft.{page}")
    submodules = {x.name for x in pkgutil.iter_modules(module.__path__)}
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs/api" / f"{page}.md").read_text(), re.MULTILINE)
    assert public - {name.rsplit(".", 1)[1] for name in shown} == set()
    # A function with the name of its file is found by the tools only under its full path.
    assert [
        name for name in shown if name.split(".")[-1] in submodules and name.count(".") < 3
    ] == {"inference": ["weft.inference.kernels"], "ppl": []}[page]
