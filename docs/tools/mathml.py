"""A hook of MkDocs: formulas become MathML when the pages are built, so that a browser needs no script for them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAYED = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
BEFORE = re.compile(r"(</mi>|</msub>|</msup>)(?=<mi>(?:log|exp|max|min|stop)</mi>)")
AFTER = re.compile(r"(<mi>(?:log|exp|max|min|stop)</mi>)(?!<mo|<mrow><mo)")


def on_page_content(content: str, **_: Any) -> str:
    """Replace what `pymdownx.arithmatex` has marked."""
    content = INLINE.sub(lambda m: formula(m[1], "inline"), content)
    return DISPLAYED.sub(lambda m: formula(m[1], "block"), content)


def formula(latex: str, display: str) -> str:
    """A formula as MathML, with spaces around the name of a function, and a tilde that is a relation."""
    found = convert(html.unescape(latex).strip(), display=display)
    found = found.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
    for place in (BEFORE, AFTER):
        found = place.sub(r'\1<mspace width="0.167em"/>', found)
    return found
