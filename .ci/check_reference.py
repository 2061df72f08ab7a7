"""Check the built reference in site/api against the package: nothing that a docstring says may be lost on the way.

Run by `make docs`. For every public name the page must show it once, with a signature that has the parameters it really
has, with every word of its docstring in order, with every parameter explained, and with every line of its examples in a
highlighted block of code. On all pages of the site every formula must be set.
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
FILTERS = re.search(r'filters: \["!\^_", ([^\]]*)\]', Path("mkdocs.yml").read_text())
VOID = {"area", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
ADMONITIONS = {"references", "note", "warning"}
WORD = re.compile(r"\w+")
TEX = re.compile(r"\\[a-zA-Z(\[]+|\$[^$\n]+\$")


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

    def own(self) -> Iterator[Node]:
        """The elements inside that do not belong to another object of the reference."""
        for child in self.inside:
            if isinstance(child, Node) and not child.has("doc-object"):
                yield child
                yield from child.own()

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
        blocks = [n for n in root.nodes() if n.has("highlight") and not n.has("doc-signature")]
        for block in blocks:
            if not block.has("language-pycon"):
                wrong.append(f"{page}: no example, but a block of code: {block.text().split()[:9]}")
            elif not any(n.tag == "span" and n.attributes.get("class") for n in block.nodes()):
                wrong.append(f"{page}: an example is not highlighted: {block.text().split()[:9]}")
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
                heading = next((n for n in node.own() if n.has("doc-heading")), None)
                if heading is not None and "id" in heading.attributes:
                    if heading.attributes["id"] in objects:
                        wrong.append(f"{page}: shows {heading.attributes['id']} twice")
                    objects[heading.attributes["id"]] = node
    return objects, wrong


def unset_formulas() -> Iterator[str]:
    """What is left of TeX on any page: a command that was not understood, or a formula as plain text."""
    for page in sorted(SITE.glob("**/index.html")):
        root = Tree(page.read_text()).root
        for text in [root.text("pre", "code", "script", "style", "math")] + [
            n.text() for n in root.nodes() if n.tag == "math"
        ]:
            for found in TEX.finditer(text):
                near = text[max(0, found.start() - 30) : found.end()]
                yield f"{page}: not set as a formula: {found[0]!r} in {near!r}"


def public() -> Iterator[tuple[str, Any]]:
    """Every public name that the reference must show, with the public methods that a class documents itself."""
    assert FILTERS is not None, "mkdocs.yml names the hooks of algorithms under `filters`"
    hooks = set("|".join(re.findall(r"\((.*?)\)", FILTERS[1])).split("|"))
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
    inside = list(node.own())
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


def unexplained(path: str, value: Any, documented: dict[str, Any]) -> Iterator[str]:
    """The parameters that neither the docstring explains, nor that of a public name to which it refers."""
    doc = inspect.getdoc(value) or ""
    beside = path.rpartition(".")[0]
    names = [p for n in re.findall(r"`(\w+)`", doc) if (p := f"{beside}.{n}") in documented]
    bases = inspect.getmro(value)[1:] if inspect.isclass(value) else ()
    docs = [doc, *(inspect.getdoc(documented[n]) or "" for n in names)]
    docs += [b.__doc__ or "" for b in bases if b.__module__.startswith("weft.")]
    for name in parameters(value):
        explained = rf"(?m)^ *(\*|`)*({name}|.*, {name})\b.*:|`[^`\n]*\b{name}\b[^`\n]*`"
        if not any(re.search(explained, d) for d in docs):
            yield f"{path}: its docstring does not explain {name!r}"


def parameters(value: Any) -> list[str]:
    try:
        names = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in names if name not in ("self", "args", "kwargs")]


def main() -> int:
    """Print what is wrong; the exit status says whether anything is."""
    objects, wrong = shown()
    wrong.extend(unset_formulas())
    checked = examples = 0
    found = list(public())
    documented = dict(found)
    for path, value in found:
        if path not in objects:
            wrong.append(f"{path}: not in the reference")
            continue
        checked += 1
        if getattr(value, "__name__", "") not in ("", path.rsplit(".", 1)[1]):
            continue  # a second name, explained under the first
        examples += bool(doctest.DocTestParser().get_examples(inspect.getdoc(value) or ""))
        wrong.extend(faults(path, value, objects[path]))
        if inspect.isclass(value) or (inspect.isfunction(value) and path.count(".") < 3):
            wrong.extend(unexplained(path, value, documented))
    print(*wrong, sep="\n")
    print(f"{checked} public names checked, {examples} of them with examples: {len(wrong)} faults")
    return bool(wrong) or not examples


if __name__ == "__main__":
    sys.exit(main())
