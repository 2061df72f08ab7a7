"""A hook of MkDocs: formulas become MathML when the pages are built, so that a browser needs no script for them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAYED = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what `pymdownx.arithmatex` has marked."""
    content = INLINE.sub(lambda m: convert(html.unescape(m[1]).strip()), content)
    return DISPLAYED.sub(lambda m: convert(html.unescape(m[1]).strip(), display="block"), content)
