"""Check the built reference in site/api against the package: nothing that a docstring says may be lost on the way.

Run by `make docs`. For every public name the page must show it, with a signature that has the parameters it really has,
with every word of its docstring in order, and with every line of its examples in a block of code.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

SITE = Path(sys.argv[1] if len(sys.argv) > 1 else "site")
MODULES = ["ppl", "inference", "inference.kernels", "inference.testing", "models.state_space"]
# Hooks that the author of an algorithm overrides are explained once, under `Algorithm` (see mkdocs.yml).
HOOKS = re.search(
    r'filters: \["!\^_", "!\^\((.*?)\)\$",\s*"!\^\((.*?)\)\$"\]', Path("mkdocs.yml").read_text()
)
VOID = {"area", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
ADMONITIONS = {"references", "note", "warning"}
WORD = re.compile(r"\w+")


class Node:
    """An element of a page: its tag, its attributes, and what is inside."""

    def __init__(self, tag: str, attributes: dict[str, str]):
        self.tag, self.attributes = tag, attributes
        self.inside: list[Node | str] = []

    def has(self, name: str) -> bool:
        return name in self.attributes.get("class", "").split()

    def nodes(self) -> Iterator[Node]:
        yield self
        for child in self.inside:
            if isinstance(child, Node):
                yield from child.nodes()

    def text(self, *but: str) -> str:
        """The text inside, less what stands in elements of some tags or classes."""
        if self.tag in but or any(self.has(b) for b in but):
            return " "
        return "".join(c if isinstance(c, str) else c.text(*but) for c in self.inside)


class Tree(HTMLParser):
    """A page as a tree of nodes."""

    def __init__(self, page: str):
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag in (node.tag for node in self.open):
            while self.open.pop().tag != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def shown() -> tuple[dict[str, Node], list[str]]:
    """The objects on the pages of the reference by their paths, and what is wrong with the pages themselves."""
    objects, wrong = {}, []
    pages = sorted(SITE.glob("api/*/index.html"))
    assert pages, f"no reference in {SITE}: `mkdocs build` comes first"
    for page in pages:
        root = Tree(page.read_text()).root
        text = root.text("pre", "script")
        for mark in (">>>", ":math:", ".. math::", "$$"):
            if mark in text:
                wrong.append(f"{page}: {mark!r} stands outside of a block of code")
        for node in root.nodes():
            source = (
                node.attributes.get("src")
                or (node.tag == "link" and node.attributes.get("href"))
                or ""
            )
            if source.startswith(("http:", "https:", "//")):
                wrong.append(f"{page}: the page needs {source}")
            kinds = set(node.attributes.get("class", "").split())
            if node.tag == "details" and not kinds & ADMONITIONS:
                wrong.append(
                    f"{page}: {node.text()[:80].split()} became a box; it is no heading that Griffe knows"
                )
            if node.has("doc-object"):
                heading = next((n for n in node.nodes() if n.has("doc-heading")), None)
                if heading is not None and "id" in heading.attributes:
                    objects[heading.attributes["id"]] = node
    return objects, wrong


def public() -> Iterator[tuple[str, Any]]:
    """Every public name that the reference must show, with the public methods that a class documents itself."""
    assert HOOKS is not None, "mkdocs.yml names the hooks of algorithms under `filters`"
    hooks = set(f"{HOOKS[1]}|{HOOKS[2]}".split("|"))
    for module in MODULES:
        names = importlib.import_module(f"weft.{module}")
        for name in dir(names):  # also what is loaded on first use
            value = getattr(names, name)
            own = getattr(value, "__module__", "").split(".")[0] == "weft"
            if name.startswith("_") or inspect.ismodule(value) or not own:
                continue
            path = f"weft.{module}.{name}".replace("weft.inference.kernels", "weft.kernels")
            path = path.replace("weft.inference.testing", "weft.testing")
            yield path, value
            for attribute, member in vars(value).items() if inspect.isclass(value) else ():
                if attribute.startswith("_") or (attribute in hooks and name != "Algorithm"):
                    continue
                if attribute in getattr(value, "__dataclass_fields__", ()):
                    continue
                if getattr(member, "__doc__", None) and (
                    inspect.isroutine(member) or isinstance(member, property)
                ):
                    yield f"{path}.{attribute}", getattr(value, attribute)


def parts(node: Node) -> tuple[str, str, list[str]]:
    """The signature, the text and the blocks of code of one object, without those of its members."""

    def own(node: Node) -> Iterator[Node]:
        for child in node.inside:
            if isinstance(child, Node) and not child.has("doc-object"):
                yield child
                yield from own(child)

    inside = list(own(node))
    signature = next((n.text() for n in inside if n.has("doc-signature")), "")
    text = " ".join(n.text("math", "doc-children") for n in inside if n.has("doc-contents"))
    blocks = [n.text() for n in inside if n.tag == "pre"]
    return signature, text, blocks


def faults(path: str, value: Any, node: Node) -> Iterator[str]:
    """What is missing of one object."""
    signature, text, blocks = parts(node)
    if inspect.isclass(value) or inspect.isfunction(value):
        for name in parameters(value):
            if not re.search(rf"\b{name}\b", signature):
                yield f"{path}: the signature lacks {name!r}: {' '.join(signature.split()) or 'there is none'}"
    doc = inspect.getdoc(value) or ""
    for example in doctest.DocTestParser().get_examples(doc):
        for line in example.source.splitlines():
            if not any(line.strip() in block for block in blocks):
                yield f"{path}: a line of its example is in no block of code: {line}"
    doc = re.sub(r"\$\$?[^$]+\$\$?", " ", doc)  # formulas are set as MathML
    doc = doc.replace("<BLANKLINE>", "")
    doc = re.sub(
        r"^(Args|Raises|Returns|Attributes|Examples|References):$", "", doc, flags=re.MULTILINE
    )
    doc = re.sub(r"\]\([^)]*\)", "]", doc)  # addresses of links
    words = iter(WORD.findall(text))
    for i, word in enumerate(wanted := WORD.findall(doc)):
        if word not in words:  # goes on from where the last one was found
            yield f"{path}: lost from its docstring: '... {' '.join(wanted[max(0, i - 6) : i + 3])} ...'"
            break


def parameters(value: Any) -> list[str]:
    try:
        names = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in names if name not in ("self", "args", "kwargs")]


def main() -> int:
    """Print what is wrong; the exit status says whether anything is."""
    objects, wrong = shown()
    checked = examples = 0
    for path, value in public():
        if path not in objects:
            wrong.append(f"{path}: not in the reference")
            continue
        checked += 1
        if getattr(value, "__name__", "") not in ("", path.rsplit(".", 1)[1]):
            continue  # a second name, explained under the first
        examples += bool(doctest.DocTestParser().get_examples(inspect.getdoc(value) or ""))
        wrong.extend(faults(path, value, objects[path]))
    print(*wrong, sep="\n")
    print(f"{checked} public names checked, {examples} of them with examples: {len(wrong)} faults")
    return bool(wrong) or not examples


if __name__ == "__main__":
    sys.exit(main())
