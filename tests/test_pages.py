"""The code on the front pages runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_code_on_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, f"{page} shows no code"
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.strip(), f"the code of {page} prints nothing"
