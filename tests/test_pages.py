"""The code on the front pages runs as it stands."""

import ast
import functools
import importlib
import re
import types
from pathlib import Path

import pytest
import weft.models.state_space

import pages
import weft

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = (
    "weft",
    "weft.ppl",
    "weft.inference",
    "weft.kernels",
    "weft.testing",
    "weft.models",
    "weft.models.state_space",
)


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
def test_code_on_page_prints_what_the_page_shows(page: str) -> None:
    blocks = pages.run(page)
    assert blocks, f"{page} shows no code"
    assert any(block.printed for block in blocks), f"the code of {page} prints nothing"
    for line, sampled, shown, printed in blocks:
        assert pages.agree(shown, printed, sampled), (
            f"{page}:{line}: the code prints\n{printed}\nand the page shows\n{shown}\n"
            f"`python tests/pages.py {page}` writes it anew"
        )


def test_outputs_that_differ_are_told_apart() -> None:
    assert pages.agree("mean 2.13, n 7", "mean  2.14, n 7")
    assert not pages.agree("mean 2.13", "mean 2.15")
    assert not pages.agree("n 7", "n 8")
    assert not pages.agree("mean 2.13", "mode 2.13")
    assert not pages.agree("", "2.13")
    assert not pages.agree("[1. 2.]", "[1. 2. 3.]")
    assert pages.agree("refused (docs/x.md:12:3)", "refused (docs/x.md:14:3)")
    assert pages.agree("mean 2.13", "mean 2.5", sampled=True)
    assert not pages.agree("mean 2.13", "mean 3.5", sampled=True)


@pytest.mark.parametrize(
    ("module", "page", "shown_as"),
    [
        ("weft.ppl", "ppl", "weft.ppl"),
        ("weft.inference", "inference", "weft.inference"),
        ("weft.inference.kernels", "inference", "weft.kernels"),
        ("weft.inference.testing", "inference", "weft.testing"),
        ("weft.models.state_space", "models", "weft.models.state_space"),
    ],
)
def test_reference_names_everything_public(module: str, page: str, shown_as: str) -> None:
    front = importlib.import_module(module)
    public = {
        f"{shown_as}.{name}"
        for name in dir(front)  # also what is loaded on first use
        if not name.startswith("_")
        and not isinstance(getattr(front, name), (types.ModuleType, types.GenericAlias, bool))
    }
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs/api" / f"{page}.md").read_text(), re.MULTILINE)
    assert public - set(shown) == set()


def test_reference_names_only_what_users_import() -> None:
    """A path such as weft.inference.markov.samplers.nuts would tell users of folders."""
    for page in (ROOT / "docs/api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            owner, _, last = name.rpartition(".")
            found = functools.reduce(getattr, owner.split(".")[1:], weft)
            assert hasattr(found, last), f"{page.name} shows {name}, which is not there"
            assert owner in PUBLIC, f"{page.name} shows {name} by a path that is not public"


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("ppl", "inference", "models", "tests", "examples", "benchmarks", "requirements", ".ci")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(r"`([\w.]+/[\w./-]*\.(?:py|txt|sh))", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    missing = [p for p in paths if p.split("/")[0] in FOLDERS and not (ROOT / p).exists()]
    alone = re.findall(r"`(\w+\.py)`", text)  # a file whose folder is named before
    missing += [p for p in alone if not any(any((ROOT / f).rglob(p)) for f in FOLDERS)]
    missing += [x for x in links if not (page.parent / x).exists()]
    assert missing == [], f"{page.name} names files that are not there"


def _resolves(path: str) -> bool:
    """Whether a dotted path names a module, or something in one."""
    found: object = weft
    for i, name in enumerate(names := path.split(".")[1:]):
        if not hasattr(found, name):
            try:
                importlib.import_module(".".join(["weft", *names[: i + 1]]))
            except ImportError:
                return False
        found = getattr(found, name)
    return True


def test_dotted_paths_in_pages_and_docstrings_exist() -> None:
    sources = [p for folder in FOLDERS[:3] for p in (ROOT / folder).rglob("*.py")]
    missing = [
        f"{file.relative_to(ROOT)}: {path}"
        for file in [*PAGES, *sources]
        for path in re.findall(r"`(weft(?:\.\w+)+)(?:\([^`]*)?`", file.read_text())
        if path != "weft.json" and not _resolves(path)
    ]
    assert missing == []


def test_every_file_with_references_is_found_from_its_paper() -> None:
    table = (ROOT / "docs/papers.md").read_text()
    sources = [p for folder in FOLDERS[:3] for p in (ROOT / folder).rglob("*.py")]
    named = {p.relative_to(ROOT).as_posix() for p in sources if "References:\n" in p.read_text()}
    assert named, "no file names its references"
    assert {p for p in named if f"`{p}`" not in table} == set()


def test_every_paper_that_a_docstring_cites_is_in_the_table() -> None:
    rows = [
        row for row in (ROOT / "docs/papers.md").read_text().splitlines() if row.startswith("|")
    ]
    cited, missing = 0, []
    for file in (p for folder in FOLDERS[:3] for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                continue
            doc = " ".join((ast.get_docstring(node) or "").split())
            for found in re.finditer(r"[^\W\d_]+(?: et al\.?)?,? \(?((?:19|20)\d\d)\b", doc):
                near = re.findall(r"[A-ZŚ][\w-]+", doc[max(0, found.start() - 80) : found.end()])
                if found[0][0].isupper() and near:
                    cited += 1
                    named = [row for row in rows if found[1] in row and any(a in row for a in near)]
                    if not named:
                        missing.append(f"{file.relative_to(ROOT)}: {found[0]}")
    assert cited > 100
    assert missing == []
