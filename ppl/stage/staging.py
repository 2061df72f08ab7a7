"""Staging: from a function to a jaxpr that compares by structure, and the cache that notices a changed global.

A model is staged once for each combination of static arguments and shapes. What it captures (closed-over arrays,
globals) becomes operands. So the staged program is a hashable structure plus arrays. Two stagings of one model over new
data of the same shape are equal, and share compiled code.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from .compat import (
    Tracer,
    consts_first,
    eval_jaxpr,
    open_jaxpr,
    tracing_generation,
    types_of_shards_ignored,
)
from .equality import global_names, is_filled, is_of_jax, outline, same_code, same_values
from .errors import ModelError
from .jaxprs import equations
from .packing import is_number
from .shards import split_axes, types_vary
from .varying import refuse_read_types
from .wiring import states_derivative

# --- jaxprs by structure ----------------------------------------------------------------------------------------------


class Code:
    """A closed jaxpr without array constants, and the tree of its outputs. It compares by structure."""

    __slots__ = ("__weakref__", "_hash", "jaxpr", "out_tree", "read")
    consts = ()

    def __init__(self, jaxpr: Any, out_tree: Any) -> None:
        self.jaxpr = jaxpr
        self.out_tree = out_tree
        self.read = _read_by_rules(jaxpr)
        self._hash: int | None = None

    def __call__(self, *args: Any) -> Any:
        return jax.tree.unflatten(self.out_tree, eval_jaxpr(*open_jaxpr(self.jaxpr), *args))

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(outline(self.jaxpr))
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Code)
            and hash(self) == hash(other)
            and self.out_tree == other.out_tree
            and same_values(self.read, other.read)
            and same_code(self.jaxpr, other.jaxpr)
        )

    def __repr__(self) -> str:
        return f"Code({len(open_jaxpr(self.jaxpr)[0].eqns)} equations)"


# --- staging ----------------------------------------------------------------------------------------------------------


Snapshot = list[tuple[Any, Any, Any]]
"""What a function captured: ``(container, name, value)``."""


def stage(
    f: Callable[..., Any], args: list[Any], snapshot: Snapshot | None = None
) -> tuple[Code, list[Any]]:
    """Stage a function: ``(code, consts)`` with ``code(*consts, *args) == f(*args)``, sites included.

    ``f`` is traced anew at every call. (``jax.make_jaxpr`` alone would remember the function, and use an outdated
    global.) ``snapshot`` is what it captured, if the caller knows that better than ``captured(f)``.
    """
    number = _current_generation(captured(f) if snapshot is None else snapshot)
    with _watching():
        closed, shape = _traced(f, args, number)
        primitive = types_vary(closed)
        if primitive is not None:
            typed = closed
            with types_of_shards_ignored(primitive):
                closed, shape = _traced(f, args, -1 - number)
            refuse_read_types(typed, closed)
    jaxpr, consts = consts_first(closed)
    return Code(split_axes(jaxpr, len(consts)), jax.tree.structure(shape)), consts


def _traced(f: Callable[..., Any], args: list[Any], generation: int) -> Any:
    with tracing_generation(generation):
        try:
            return jax.make_jaxpr(lambda *xs: _arrays_only(f(*xs)), return_shape=True)(*args)
        except jax.errors.ConcretizationTypeError as e:
            e.add_note(
                "A model is staged once for all values: what it draws, and its array arguments, have none while its "
                "Python runs. Branch with jax.lax.cond or jnp.where, loop with jax.lax.scan or weft.loop."
            )
            raise
        except TypeError as e:
            if "manual axis types" in str(e):
                e.add_note(
                    "In a shard_map JAX takes a draw to be the same on all shards, since it has no value while the "
                    "model's Python runs. Call jax.shard_map with check_vma=False. Weft itself infers from the whole "
                    "body which choices go along the rows."
                )
            raise


_last_seen: dict[tuple[int, Any], tuple[Any, Any]] = {}
_generation = itertools.count()
_number = 0


def _current_generation(snapshot: Snapshot) -> int:
    """A number that grows when something captured has changed since a function that captured it was last staged.

    JAX remembers the jaxprs of scan bodies, branches and inner jits by the identity of the function. Without this
    number, a step function that reads a global would be staged with the old value.
    """
    global _number
    changed = len(_last_seen) > 10 * MAX_CAPTURED or len(snapshot) > MAX_CAPTURED
    if changed:
        _last_seen.clear()
    for container, name, value in snapshot:
        before = _last_seen.setdefault((id(container), name), (container, value))
        if before[1] is not value:
            changed = True
            _last_seen[id(container), name] = (container, value)
    if changed:
        _number = next(_generation) + 1
    return _number


def _arrays_only(out: Any) -> Any:
    pending = _built[-1]
    for leaf in jax.tree.leaves(out, is_leaf=lambda x: id(x) in pending):
        if id(leaf) in pending:
            raise ModelError(_never_sampled([leaf]))
        if not isinstance(
            leaf, (jax.Array, np.ndarray, np.generic, Tracer, bool, int, float, complex)
        ):
            raise ModelError(
                f"a model returned a {type(leaf).__name__}; return arrays, or pytrees of arrays"
            )
    return out


def _never_sampled(programs: list[Any]) -> str:
    names = ", ".join(repr(p.name) for p in programs)
    return (
        f"the program {names} was built inside a model but never sampled, so none of its choices are made; write "
        f"sample(name, {programs[0].name}(...)) to nest it"
    )


# --- what happens while a model is staged -----------------------------------------------------------------------------

_built: list[dict[int, Any]] = []


def staging() -> bool:
    """Whether a model is being staged."""
    return bool(_built)


def built(program: Any) -> None:
    """Note that a program was made while another one is staged."""
    if _built:
        _built[-1][id(program)] = program


def used(program: Any) -> None:
    """Note that a program was sampled, asked for something, or passed on."""
    for frame in _built:
        frame.pop(id(program), None)


@contextlib.contextmanager
def _watching() -> Iterator[None]:
    from .foreign import refuse_numpyro

    _built.append({})
    try:
        with refuse_numpyro():
            yield
        idle = list(_built[-1].values())
    finally:
        _built.pop()
    if idle:
        raise ModelError(_never_sampled(idle))


# --- what a function captured -----------------------------------------------------------------------------------------


def generation_of(root: Any) -> int:
    """A number that grows when anything has changed that the functions in `root` read from outside."""
    return _current_generation(captured(root))


def captured(root: Any) -> Snapshot:
    """What a function reads from outside.

    Returns:
        ``(container, name, value)`` for closure cells and globals, including those of the functions it calls.
    """
    found: Snapshot = []
    seen: set[int] = set()

    def visit(x: Any) -> None:
        if id(x) in seen or len(found) > MAX_CAPTURED:
            return
        seen.add(id(x))
        if isinstance(x, types.FunctionType):
            for cell in x.__closure__ or ():
                if is_filled(cell):
                    note(cell, "cell_contents", cell.cell_contents)
            # A library's wrapper takes the name of what it wraps. Its globals tell where it really lives.
            if str(x.__globals__.get("__name__")).split(".")[0] in _LIBRARIES:
                return
            for name in global_names(x.__code__):
                if name in x.__globals__:
                    note(x.__globals__, name, x.__globals__[name])
            for default in (*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()):
                visit(default)
        elif isinstance(x, types.MethodType):
            visit(x.__self__)
            visit(x.__func__)
        elif isinstance(x, functools.partial):
            for part in (x.func, *x.args, *x.keywords.values()):
                visit(part)
        elif isinstance(x, dict):
            for name, value in dict(x).items():  # the dict may change meanwhile
                note(x, name, value)
        elif isinstance(x, (list, tuple)):
            for i, value in enumerate(x):
                note(x, i, value)
        elif isinstance(x, (type, types.ModuleType)):
            return
        elif hasattr(x, "__dict__"):
            for name, value in list(vars(x).items()):
                note(x, name, value)
            if callable(x):
                visit(getattr(type(x), "__call__", None))  # noqa: B004 (the function, not whether there is one)
                visit(getattr(x, "__wrapped__", None))

    def note(container: Any, name: Any, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            return
        found.append((container, name, value))
        visit(value)

    visit(root)
    return found


MAX_CAPTURED = 4000
"""Beyond this many captured objects a program is staged at every call."""

_LIBRARIES = {
    "jax",
    "jaxlib",
    "numpy",
    "numpyro",
    "equinox",
    "optax",
    "diffrax",
    "blackjax",
    "scipy",
    "weft",
}


def unchanged(snapshot: Snapshot) -> bool:
    """Whether everything that was captured is still the same object."""
    return len(snapshot) <= MAX_CAPTURED and all(_read(c, n) is value for c, n, value in snapshot)


def _read_by_rules(jaxpr: Any) -> list[Any]:
    """The numbers and arrays that rules of custom derivatives read from outside, as they are now.

    The rules are functions, and run when a derivative is taken. What they read may have changed by then.
    """
    rules: list[Any] = []
    seen: set[int] = set()

    def visit(x: Any) -> None:
        """Look for the rules that a user wrote, in the functions that JAX wraps them in."""
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, (tuple, list)):
            parts = list(x)
        elif hasattr(x, "transforms"):
            parts = [x.f, x.transforms]
        elif not is_of_jax(getattr(x, "__module__", None)):
            rules.extend([x] if callable(x) else [])
            return
        else:
            cells = [c for c in getattr(x, "__closure__", None) or () if is_filled(c)]
            parts = [c.cell_contents for c in cells]
        for part in parts:
            visit(part)

    for eqn, _ in equations(jaxpr):
        if states_derivative(eqn):
            visit([x for x in eqn.params.values() if callable(x) or hasattr(x, "transforms")])
    return [x for _, _, x in captured(rules) if is_number(x) and not isinstance(x, Tracer)]


def _read(container: Any, name: Any) -> Any:
    try:
        if isinstance(container, types.CellType):
            return container.cell_contents
        if isinstance(container, (dict, list, tuple)):
            return container[name]
        return vars(container).get(name)
    except (KeyError, IndexError, ValueError):
        return None
