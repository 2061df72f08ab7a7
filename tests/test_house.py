"""The order of the house: which package may import which, and that no file imports itself by a detour."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Imports go to the left only: a package may import those before it. A single file counts as a package.
ORDER = {
    "ppl": "stage analysis programs transforms exact expectations scans estimated",
    "inference": "resampling run results weighted markov particles vi checks kernels testing",
    "models": "state_space distributions",
}
FOLDERS = list(ORDER)


def module_of(path: Path) -> tuple[str, ...]:
    """The path of a module below `weft`: `("ppl", "stage", "sites")`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


FILES = {module_of(p): p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))}


def only_types(tree: ast.Module) -> set[ast.AST]:
    """What stands under `if TYPE_CHECKING`, which never runs."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }


def imports(module: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The modules of Weft that a module imports, at its top or inside of its functions."""
    path = FILES[module]
    tree = ast.parse(path.read_text())
    unseen = only_types(tree)
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in unseen:
            continue
        named = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            base = package[: len(package) - node.level + 1] + named
        elif named[0] == "weft":
            base = named[1:]
        else:
            continue
        for alias in node.names:
            found = (*base, alias.name)
            yield found if found in FILES else base


GRAPH = {module: sorted(set(imports(module)) - {module}) for module in FILES}


def rank(module: tuple[str, ...]) -> int:
    """Where the module's package stands in its folder; the folder's own `__init__` is last of all."""
    order = ORDER[module[0]].split()
    return order.index(module[1]) if len(module) > 1 else len(order)


def test_every_package_has_its_place():
    assert {m[:2] for m in FILES if len(m) > 1} == {
        (folder, name) for folder, order in ORDER.items() for name in order.split()
    }


@pytest.mark.parametrize("module", [m for m in FILES if len(m) > 1], ids="/".join)
def test_imports_go_to_the_left(module):
    folder = FOLDERS.index(module[0])
    for target in GRAPH[module]:
        assert target != (module[0],), f"{'/'.join(module)} imports the front of its own folder"
        there = FOLDERS.index(target[0])
        assert there <= folder, f"{'/'.join(module)} imports {'/'.join(target)}"
        if there == folder:
            assert rank(target) <= rank(module), f"{'/'.join(module)} imports {'/'.join(target)}"


def test_no_file_imports_itself_by_a_detour():
    inside = {m: [t for t in GRAPH[m] if len(t) > 1] for m in FILES if len(m) > 1}
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], path: list[tuple[str, ...]]) -> None:
        if module in path:
            ring = [*path[path.index(module) :], module]
            raise AssertionError(" -> ".join("/".join(m) for m in ring))
        if module in done:
            return
        for target in inside.get(module, ()):
            visit(target, [*path, module])
        done.add(module)

    for module in inside:
        visit(module, [])


# Control flow is known to one table and to those who stage, run or sum it anew; every other walk asks the table.
PRIMITIVES = {"scan_p", "cond_p", "while_p", "shard_map_p"}
NAMES = {"scan", "cond", "while", "shard_map"}
MAY_NAME = {
    ("ppl", "stage", "compat"),
    ("ppl", "stage", "wiring"),
    ("ppl", "stage", "control"),
    ("ppl", "stage", "interpreter"),
    ("ppl", "exact", "branches"),
    ("ppl", "exact", "chains"),
}


def is_of_an_axis(node: ast.AST) -> bool:
    """Whether an expression is about the kind of an axis of a choice, one of which is `"scan"`."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", "") == "Axis"
    sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    return any(getattr(side, "attr", "") == "kind" for side in sides)


def named_primitives(tree: ast.Module) -> Iterator[str]:
    """Control-flow primitives that a module names: as a variable, an attribute, an import, or a string."""
    axes = {inner for node in ast.walk(tree) if is_of_an_axis(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in axes and node.value in NAMES:
            yield repr(node.value)
        found = {getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", "")}
        yield from found & PRIMITIVES


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("eqn.primitive is scan_p", {"scan_p"}),
        ("eqn.primitive is lax.cond_p", {"cond_p"}),
        ("from jax.lax import while_p as loop", {"while_p"}),
        ("eqn.primitive.name == 'while'", {"'while'"}),
        ("eqn.primitive.name in ('scan', 'cond')", {"'scan'", "'cond'"}),
        ("RULES = {'shard_map': rule}", {"'shard_map'"}),
        ("axis.kind == 'scan' and Axis(3, None, 'scan')", set()),
        ("jax.lax.scan(step, 0.0, xs)", set()),
    ],
)
def test_what_names_a_primitive(source, right):
    assert set(named_primitives(ast.parse(source))) == right


@pytest.mark.parametrize("module", FILES, ids="/".join)
def test_control_flow_is_named_in_one_place(module):
    found = sorted(set(named_primitives(ast.parse(FILES[module].read_text()))))
    assert not found or module in MAY_NAME, f"{'/'.join(module)} names {', '.join(found)}"
