"""A hook of MkDocs, run on every page when it is built.

Formulas become MathML, so that a browser needs no script for them. Code in tables may break after a slash or a bracket,
so that a table of paths or calls fits a narrow screen.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAYED = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
BEFORE = re.compile(r"(</mi>|</msub>|</msup>)(?=<mi>(?:log|exp|max|min|stop)</mi>)")
AFTER = re.compile(r"(<mi>(?:log|exp|max|min|stop)</mi>)(?!<mo|<mrow><mo)")
CELL = re.compile(r"<td.*?</td>", re.DOTALL)
CODE = re.compile(r"(?<=<code>)[^<]*(?=</code>)")


def on_page_content(content: str, **_: Any) -> str:
    """Replace what `pymdownx.arithmatex` has marked, and allow breaks in the code of tables."""
    content = INLINE.sub(lambda m: formula(m[1], "inline"), content)
    content = DISPLAYED.sub(
        lambda m: f'<div class="formula">{formula(m[1], "block")}</div>', content
    )
    return CELL.sub(
        lambda cell: CODE.sub(lambda code: re.sub(r"(?<=[/(])", "<wbr>", code[0]), cell[0]),
        content,
    )


def formula(latex: str, display: str) -> str:
    """A formula as MathML, with spaces around the name of a function, and a tilde that is a relation."""
    found = convert(html.unescape(latex).strip(), display=display)
    found = found.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
    for place in (BEFORE, AFTER):
        found = place.sub(r'\1<mspace width="0.167em"/>', found)
    return found
