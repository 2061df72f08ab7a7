"""The code on a page, what it prints, and what the page says that it prints.

On a page, a block of code that prints is followed by a block of text with its output. Where the output is that of a
sampler, whose draws depend on how a machine rounds, `<!-- sampled -->` stands between the two.

`python tests/pages.py docs/index.md` runs pages and writes the output of every block under it.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax

ROOT = Path(__file__).resolve().parents[1]
SAMPLED = "<!-- sampled -->\n"
_BLOCK = re.compile(
    rf"^```python\n(?P<code>.*?)^```\n(?:\n(?P<sampled>{SAMPLED})?```text\n(?P<shown>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A block of code of a page: its first line, the output that is shown, and the output that it has."""

    line: int
    sampled: bool
    shown: str
    printed: str


def run(page: str) -> list[Block]:
    """Run the code of a page from top to bottom. A page may choose the precision of its numbers."""
    precision = jax.config.read("jax_enable_x64")
    try:
        return _run(page)
    finally:
        jax.config.update("jax_enable_x64", precision)


def _run(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    names = {"__name__": "page"}
    blocks = []
    for found in _BLOCK.finditer(text):
        line = text[: found.start()].count("\n") + 2
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            source = "\n" * (line - 1) + found["code"]
            exec(compile(source, page, "exec", dont_inherit=True), names)
        printed = "".join(f"{x.rstrip()}\n" for x in output.getvalue().strip("\n").splitlines())
        blocks.append(Block(line, bool(found["sampled"]), found["shown"] or "", printed))
    return blocks


def agree(shown: str, printed: str, sampled: bool = False) -> bool:
    """Whether two outputs have the same words, and numbers that differ only by rounding (by a third, if sampled).

    Lines of the page itself, which messages name, may differ.
    """

    def words(text: str) -> str:
        return re.sub(r"\s", "", _NUMBER.sub("#", text))

    def close(a: str, b: str) -> bool:
        x, y = (float(n.replace(",", "").rstrip(".")) for n in (a, b))
        if sampled:
            return abs(x - y) <= 0.1 + 0.3 * max(abs(x), abs(y))
        decimals = len(a.split("e")[0].partition(".")[2])
        last = 10.0**-decimals if "." in a else 0
        return abs(x - y) <= max(1.5 * last, 2e-4 * abs(x))

    shown, printed = (re.sub(r"\.md:\d+(:\d+)?", ".md", x) for x in (shown, printed))
    if words(shown) != words(printed):
        return False
    return all(map(close, _NUMBER.findall(shown), _NUMBER.findall(printed)))


def write(page: str) -> None:
    """Write the output of every block under it."""
    blocks = iter(run(page))

    def block(found: re.Match[str]) -> str:
        printed = next(blocks).printed
        code = f"```python\n{found['code']}```\n"
        return code + (f"\n{found['sampled'] or ''}```text\n{printed}```\n" if printed else "")

    path = ROOT / page
    path.write_text(_BLOCK.sub(block, path.read_text()))


if __name__ == "__main__":
    for page in sys.argv[1:]:
        write(page)
