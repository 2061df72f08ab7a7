r"""Values as tables over discrete choices: the arithmetic below exact marginalisation.

A choice $z$ that is summed out has no value while a program is scored; what is computed from it is a function of it.
Such a function is kept as a table: a ``Lifted`` array has one leading axis for every choice it depends on, then its own
axes. Any JAX equation is applied to tables by ``jax.vmap`` over the leading axes, so nothing has to be known of it.

A choice of shape $(N,)$ is $N$ choices $z_1 \ldots z_N$. A table over all of them would have $V^N$ entries. Where
every element of a value reads at most the copy with its own index (it is *diagonal*), $V$ evaluations with all copies
set to the same value say everything. That an equation keeps values diagonal is proved from what is known of it
(``analysis.independence``); for every other equation the copies are *entangled*, which is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.analysis.affinity import UNKNOWN, is_linear, multiple_of, power_of
from weft.ppl.analysis.constants import folded
from weft.ppl.analysis.independence import Unaligned, align
from weft.ppl.stage import jaxprs
from weft.ppl.stage.compat import bind, inner_jaxprs, where_in_source
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.jaxprs import is_call

_numbers = itertools.count()


class Plate:
    """One axis of independent copies of a choice. Plates that are found to share their index are merged."""

    __slots__ = ("name", "parent", "size")

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self.name = name
        self.parent: Plate | None = None

    def root(self) -> Plate:
        return self if self.parent is None else self.parent.root()

    def merge(self, other: Plate) -> None:
        a, b = self.root(), other.root()
        if a is not b:
            b.parent = a

    def __repr__(self) -> str:
        return f"Plate({self.name}, {self.size})"


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """A discrete choice that is summed out, one for every index of its plates.

    Attributes:
        address: dotted address of its site.
        num_values: how many values it may take.
        plates: the axes of its copies.
        family: of a continuous choice, which is integrated out; its table is over points (``conjugacy``).
    """

    address: str
    num_values: int
    plates: tuple[Plate, ...] = ()
    family: Any = None
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))

    def __repr__(self) -> str:
        return f"Variable({self.address}, {self.num_values})"


Axes = dict[Variable, tuple[int, ...]]
Forms = dict[Variable, tuple[float, bool]]
"""Of a normal choice: (1, ...), an affine function of all normal choices together. Of another: a multiple of this power
of it, and whether it is the choice itself."""


class Lifted:
    """A table: ``array`` leads with one axis for each variable in ``axes``, in the order of their numbers.

    ``axes`` tells for every variable which of the value's own axes are its plates; ``forms`` what kind of function it
    is of continuous ones, where that is known.
    """

    __slots__ = ("array", "axes", "forms")

    def __init__(self, array: Any, axes: Axes, forms: Forms | None = None) -> None:
        self.array = array
        self.axes = dict(sorted(axes.items(), key=lambda item: item[0].number))
        self.forms = {} if forms is None else forms

    def like(self, array: Any) -> Lifted:
        """Another table of the same kind."""
        return Lifted(array, self.axes, self.forms)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value, without the axes of the table."""
        return tuple(jnp.shape(self.array))[len(self.axes) :]

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def __repr__(self) -> str:
        return f"Lifted({', '.join(v.address for v in self.axes)}; {self.dtype}{list(self.shape)})"


def axes_of(x: Any) -> Axes:
    return x.axes if isinstance(x, Lifted) else {}


def variables_of(xs: Iterable[Any]) -> list[Variable]:
    """All variables that some values depend on, in order."""
    found = {v: None for x in xs for v in axes_of(x)}
    return sorted(found, key=lambda v: v.number)


def is_lifted(x: Any) -> bool:
    return isinstance(x, Lifted)


def num_terms(variables: Iterable[Variable]) -> int:
    return math.prod(v.num_values for v in variables)


class Entangled(ModelError):
    """Copies of a choice meet in one equation, or a table would be too large."""

    addresses: frozenset[str] = frozenset()


class Limit:
    """How large a table may become, and an account of those that were summed.

    Attributes:
        max_terms: the limit.
        terms: for every choice the entries of all tables that were summed over it.
        largest: entries of the largest of them, copies counted once.
        lanes: sizes of the vmaps that the walk is in.
    """

    def __init__(self, max_terms: int) -> None:
        self.max_terms = max_terms
        self.terms: dict[str, int] = {}
        self.largest = 1
        self.lanes: tuple[int, ...] = ()
        self._times = 1

    @contextlib.contextmanager
    def repeated(self, times: int, lanes: tuple[int, ...] = ()) -> Iterator[None]:
        """What is counted inside happens so many times; zero, if it is done only to see what would happen."""
        before = self._times, self.lanes
        self._times, self.lanes = self._times * times, (*self.lanes, *lanes)
        try:
            yield
        finally:
            self._times, self.lanes = before

    def count(self, address: str, joint: Sequence[Variable], entries: int) -> None:
        """Enter a sum over a choice in the account."""
        if self._times:
            self.terms[address] = self.terms.get(address, 0) + entries * self._times
            self.largest = max(self.largest, num_terms(joint))

    def check(self, variables: Sequence[Variable], what: str) -> None:
        terms = num_terms(variables)
        if terms > self.max_terms:
            names = ", ".join(f"{v.address} ({v.num_values})" for v in variables)
            raise Entangled(
                f"summing out takes a table of {terms:,} terms, more than max_terms={self.max_terms:,}: {what} depends "
                f"on {len(variables)} choices with values {names}. Let fewer of them meet there (several factors in "
                "place of one), or raise max_terms"
            )


# --- evaluation -------------------------------------------------------------------------------------------------------


def apply(f: Callable[..., Any], limit: Limit, *args: Any) -> Any:
    """``f(*args)`` where leaves of ``args`` may be lifted; leaves of what it returns then are, too."""
    leaves, treedef = jax.tree.flatten(args, is_leaf=is_lifted)
    if not any(map(is_lifted, leaves)):
        return f(*args)
    avals = [
        jax.ShapeDtypeStruct(
            x.shape if is_lifted(x) else jnp.shape(x),
            getattr(x, "dtype", None) or jnp.result_type(x),
        )
        for x in leaves
    ]
    closed, shape = jax.make_jaxpr(
        lambda *xs: f(*jax.tree.unflatten(treedef, xs)), return_shape=True
    )(*avals)
    return jax.tree.unflatten(jax.tree.structure(shape), evaluate(closed, leaves, limit))


def evaluate(jaxpr: Any, args: Sequence[Any], limit: Limit) -> list[Any]:
    """Evaluate a jaxpr without sites on values of which some are lifted."""
    return jaxprs.evaluate(jaxpr, args, lambda eqn, ins: equation(eqn, ins, limit))


def equation(eqn: Any, ins: list[Any], limit: Limit) -> list[Any]:
    """One equation without sites."""
    variables = variables_of(ins)
    if not variables:
        return bind(eqn, ins)
    if is_call(eqn):
        return evaluate(inner_jaxprs(eqn)[0], ins, limit)
    limit.check(variables, f"the equation {eqn.primitive.name!r}{where_in_source(eqn)}")
    out_axes: list[Axes] = [{} for _ in eqn.outvars]
    for variable in variables:
        aligned: list[list[int]] = [[] for _ in eqn.outvars]
        for i, plate in enumerate(variable.plates):
            places = [axes_of(x)[variable][i] if variable in axes_of(x) else None for x in ins]
            try:
                found = align(eqn, places)
            except Unaligned as e:
                error = Entangled(entangled(variable, plate, eqn, str(e)))
                if variable.family is not None and variable.family.quadratic:
                    error.addresses = frozenset({variable.address})
                raise error from None
            for out, place in zip(aligned, found, strict=True):
                out.append(-1 if place is None else place)
        for out, places in zip(out_axes, aligned, strict=True):
            if -1 not in places:
                out[variable] = tuple(places)
    f: Callable[..., Any] = functools.partial(_bind, eqn)
    for variable in reversed(variables):
        f = jax.vmap(f, [0 if variable in axes_of(x) else None for x in ins])
    outs = folded(eqn, [x.array if isinstance(x, Lifted) else x for x in ins], f)
    forms = forms_of(eqn, ins, variables)
    return [_trim(out, variables, axes, forms) for out, axes in zip(outs, out_axes, strict=True)]


def _bind(eqn: Any, *args: Any) -> list[Any]:
    return bind(eqn, args)


def _trim(array: Any, variables: list[Variable], axes: Axes, forms: Forms) -> Any:
    """A result that leads with all ``variables``; those that it does not depend on are dropped."""
    for i in reversed(range(len(variables))):
        if variables[i] not in axes:
            array = jax.lax.index_in_dim(array, 0, i, keepdims=False)
    return Lifted(array, axes, {v: f for v, f in forms.items() if v in axes}) if axes else array


def entangled(variable: Variable, plate: Plate, eqn: Any, why: str) -> str:
    return (
        f"the {plate.size} copies of {variable.address!r} along {plate.name} are not independent: the equation "
        f"{eqn.primitive.name!r}{where_in_source(eqn)} {why}. Exact summing goes copy by copy, and must see that each "
        f"number reads one copy only; where copies do meet, marginalize(model, {variable.address!r}, joint=True) sums "
        f"over all {variable.num_values}^{plate.size} joint values"
    )


# --- which functions of continuous choices equations compute ----------------------------------------------------------


def forms_of(eqn: Any, ins: list[Any], variables: list[Variable]) -> Forms:
    """What kind of function of continuous choices the results are; what is not known is left out."""
    forms: Forms = {}
    normal = {v for v in variables if v.family is not None and v.family.quadratic}
    if normal:
        read = [i for i, x in enumerate(ins) if normal & axes_of(x).keys()]
        if all(is_affine(ins[i]) for i in read) and is_linear(eqn, read):
            forms.update(dict.fromkeys(normal, (1.0, False)))
    for v in variables:
        if v.family is not None and v not in normal:
            powers = [x.forms.get(v, UNKNOWN) if v in axes_of(x) else None for x in ins]
            power = (multiple_of if v.family.matrix else power_of)(eqn, powers)
            if power is not UNKNOWN:
                forms[v] = power
    return forms


def is_affine(x: Any) -> bool:
    """Whether a value is an affine function of the normal choices it depends on."""
    return all(v in x.forms for v in axes_of(x) if v.family is not None and v.family.quadratic)
