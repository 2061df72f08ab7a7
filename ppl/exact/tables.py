r"""Values as tables over choices: the arithmetic beneath exact marginalisation.

A choice $z$ that is summed out has no value while a program is scored. What is computed from it is a function of it.
Such a function is kept as a ``Table``: an array with one leading axis for every choice it depends on, followed by its
own axes. Any JAX equation is applied to tables by ``jax.vmap`` over the leading axes, so nothing has to be known of it.

A choice of shape $(N,)$ is $N$ choices $z_1 \ldots z_N$. A table over all of them would have $V^N$ entries. But a value
may be *diagonal*: every element reads at most the copy with its own index. Then $V$ evaluations, with all copies set to
the same value, determine it. Batch-axis propagation proves that an equation keeps values diagonal
(``analysis.independence``). For every other equation the copies are *entangled*, which is an error.
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
from weft.ppl.stage.compat import bind, inner_jaxprs, reads_ref, where_in_source
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.jaxprs import evaluate
from weft.ppl.stage.wiring import is_call

_numbers = itertools.count()


class Plate:
    """One axis of independent copies of a choice. Plates that turn out to share their index are merged."""

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
    """A choice that is summed out, once for every index of its plates.

    Attributes:
        address: the dotted address of its site.
        num_values: the number of values it may take.
        plates: the axes of its copies.
        family: the family of a continuous choice, which is integrated out. Its table is over points (``families``).
        number: variables are ordered by this number.
    """

    address: str
    num_values: int
    plates: tuple[Plate, ...] = ()
    family: Any = None
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))

    def __repr__(self) -> str:
        return f"Variable({self.address}, {self.num_values})"


PlateAxes = dict[Variable, tuple[int, ...]]
"""For each variable that a value depends on, which of the value's own axes are its plates."""

Forms = dict[Variable, tuple[float, bool]]
"""What kind of function of continuous choices a value is, where that is known.

For a normal choice the entry is (1, ...): the value is affine in all normal choices together. For any other choice it
is the power of which the value is a multiple, and whether the value is the choice itself.
"""


class Table:
    """A value that depends on choices which are summed out, at each of their values.

    Attributes:
        array: has one leading axis for each variable, in the order of their numbers, then the value's own axes.
        axes: the variables, each with the positions of its plates among the value's own axes.
        forms: which function of the continuous variables the value is.
    """

    __slots__ = ("array", "axes", "forms")

    def __init__(self, array: Any, axes: PlateAxes, forms: Forms | None = None) -> None:
        self.array = array
        self.axes = dict(sorted(axes.items(), key=lambda item: item[0].number))
        self.forms = {} if forms is None else forms

    def like(self, array: Any) -> Table:
        """Another table of the same kind."""
        return Table(array, self.axes, self.forms)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value, without the axes of the table."""
        return tuple(jnp.shape(self.array))[len(self.axes) :]

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def __repr__(self) -> str:
        return f"Table({', '.join(v.address for v in self.axes)}; {self.dtype}{list(self.shape)})"


def axes_of(x: Any) -> PlateAxes:
    return x.axes if isinstance(x, Table) else {}


def variables_of(xs: Iterable[Any]) -> list[Variable]:
    """All variables that some values depend on, in order."""
    found = {v: None for x in xs for v in axes_of(x)}
    return sorted(found, key=lambda v: v.number)


def is_table(x: Any) -> bool:
    return isinstance(x, Table)


def num_terms(variables: Iterable[Variable]) -> int:
    return math.prod(v.num_values for v in variables)


class Entangled(ModelError):
    """Copies of a choice meet in one equation, or a table would be too large.

    ``addresses`` are those of normal choices whose copies could be integrated jointly.
    """

    addresses: frozenset[str] = frozenset()


class Limit:
    """How large a table may become, and an account of the tables that were summed.

    Attributes:
        max_terms: the limit.
        terms: for every choice, the number of entries of all tables that were summed over it.
        largest: the number of entries of the largest of them, with copies counted once.
        lanes: the sizes of the vmaps around the walk.
    """

    def __init__(self, max_terms: int) -> None:
        self.max_terms = max_terms
        self.terms: dict[str, int] = {}
        self.largest = 1
        self.lanes: tuple[int, ...] = ()
        self._times = 1

    @contextlib.contextmanager
    def repeated(self, times: int, lanes: tuple[int, ...] = ()) -> Iterator[None]:
        """Count everything inside this many times; zero times if it is only a trial."""
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
    """``f(*args)``, where leaves of ``args`` may be tables. Leaves of the result then are tables, too."""
    leaves, treedef = jax.tree.flatten(args, is_leaf=is_table)
    if not any(map(is_table, leaves)):
        return f(*args)
    avals = [
        jax.ShapeDtypeStruct(
            x.shape if is_table(x) else jnp.shape(x),
            getattr(x, "dtype", None) or jnp.result_type(x),
        )
        for x in leaves
    ]
    closed, shape = jax.make_jaxpr(
        lambda *xs: f(*jax.tree.unflatten(treedef, xs)), return_shape=True
    )(*avals)
    outs = evaluate(closed, leaves, functools.partial(equation, limit=limit))
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


def equation(eqn: Any, ins: list[Any], limit: Limit) -> list[Any]:
    """Apply one equation without sites to operands that may be tables."""
    variables = variables_of(ins)
    if not variables:
        return bind(eqn, ins)
    if reads_ref(eqn):
        names = ", ".join(repr(v.address) for v in variables)
        raise ModelError(
            f"what depends on {names} is written to an array in place{where_in_source(eqn)}: exact summing follows "
            "values only. Write it with .at[...].set, or keep the choice"
        )
    if is_call(eqn):
        return evaluate(inner_jaxprs(eqn)[0], ins, functools.partial(equation, limit=limit))
    limit.check(variables, f"the equation {eqn.primitive.name!r}{where_in_source(eqn)}")
    out_axes = _plate_axes(eqn, ins, variables)
    f: Callable[..., Any] = functools.partial(_bind, eqn)
    for variable in reversed(variables):
        f = jax.vmap(f, [0 if variable in axes_of(x) else None for x in ins])
    outs = folded(eqn, [x.array if isinstance(x, Table) else x for x in ins], f)
    forms = forms_of(eqn, ins, variables)
    return [_trim(out, variables, axes, forms) for out, axes in zip(outs, out_axes, strict=True)]


def _plate_axes(eqn: Any, ins: list[Any], variables: list[Variable]) -> list[PlateAxes]:
    """For each result of an equation, the variables it depends on, and the positions of their plates."""
    out_axes: list[PlateAxes] = [{} for _ in eqn.outvars]
    for variable in variables:
        aligned: list[list[int | None]] = [[] for _ in eqn.outvars]
        for i, plate in enumerate(variable.plates):
            places = [axes_of(x)[variable][i] if variable in axes_of(x) else None for x in ins]
            try:
                found = align(eqn, places)
            except Unaligned as e:
                raise _entangled(variable, plate, eqn, str(e)) from None
            for out, place in zip(aligned, found, strict=True):
                out.append(place)
        for axes, places in zip(out_axes, aligned, strict=True):
            known = [p for p in places if p is not None]
            if len(known) == len(places):
                axes[variable] = tuple(known)
    return out_axes


def _bind(eqn: Any, *args: Any) -> list[Any]:
    return bind(eqn, args)


def _trim(array: Any, variables: list[Variable], axes: PlateAxes, forms: Forms) -> Any:
    """A result that leads with all ``variables``, without those that it does not depend on."""
    for i in reversed(range(len(variables))):
        if variables[i] not in axes:
            array = jax.lax.index_in_dim(array, 0, i, keepdims=False)
    return Table(array, axes, {v: f for v, f in forms.items() if v in axes}) if axes else array


def _entangled(variable: Variable, plate: Plate, eqn: Any, why: str) -> Entangled:
    error = Entangled(
        f"the {plate.size} copies of {variable.address!r} along {plate.name} are not independent: the equation "
        f"{eqn.primitive.name!r}{where_in_source(eqn)} {why}. Exact summing goes copy by copy, and must see that each "
        f"number reads one copy only; where copies do meet, marginalize(model, {variable.address!r}, joint=True) sums "
        f"over all {variable.num_values}^{plate.size} joint values"
    )
    if variable.family is not None and variable.family.quadratic:
        error.addresses = frozenset({variable.address})
    return error


# --- which functions of continuous choices equations compute ----------------------------------------------------------


def forms_of(eqn: Any, ins: list[Any], variables: list[Variable]) -> Forms:
    """Which functions of continuous choices the results are. Unknown ones are left out."""
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
    """Whether a value is an affine function of the normal choices that it depends on."""
    return all(v in x.forms for v in axes_of(x) if v.family is not None and v.family.quadratic)
