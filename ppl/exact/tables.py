r"""Values as tables over choices: the arithmetic beneath exact marginalisation.

A choice $z$ that is summed out has no value while a program is scored. What is computed from it is a function of it.
Such a function is kept as a ``Table``: an array with one leading axis for every choice it depends on, followed by its
own axes. Any JAX equation is applied to tables by ``jax.vmap`` over the leading axes, so nothing has to be known of it.

A normal choice has no such axis. A value must be an affine function of all normal choices together, and its table has
the value where they are zero, and its *slopes* by each of them. Equations are applied to both (``jax.jvp``).

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from weft.ppl.analysis.affinity import (
    UNKNOWN,
    is_linear,
    keeps_numbers,
    multiple_of,
    power_of,
)
from weft.ppl.analysis.constants import folded
from weft.ppl.analysis.independence import Unaligned, align
from weft.ppl.stage.compat import bind, inner_jaxprs, reads_ref, where_in_source
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.jaxprs import evaluate
from weft.ppl.stage.primitives import ELEMENTWISE
from weft.ppl.stage.wiring import is_call

from .picks import Indices, Pick, read_plates, reading

_numbers = itertools.count()


class Plate:
    """One axis of independent copies of a choice. Plates that turn out to share their index are merged.

    ``axis`` is the axis of its site, if it is one.
    """

    __slots__ = ("axis", "name", "parent", "size")

    def __init__(self, size: int, name: str, axis: int | None = None) -> None:
        self.size = size
        self.name = name
        self.axis = axis
        self.parent: Plate | None = None

    def root(self) -> Plate:
        return self if self.parent is None else self.parent.root()

    def merge(self, other: Plate) -> None:
        a, b = self.root(), other.root()
        if a is not b:
            b.parent = a

    def __repr__(self) -> str:
        return f"Plate({self.name}, {self.size})"


Meeting = str | tuple[str, int]
"""Copies that meet: all those at an address, or those along one axis of its site."""


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """A choice that is summed out, once for every index of its plates.

    Attributes:
        address: the dotted address of its site.
        num_values: the number of values it may take; one for a normal choice.
        plates: the axes of its copies.
        family: the family of a continuous choice that is not normal. Its table is over points (``families``).
        dimension: how many numbers one copy of a normal choice has; None for any other choice.
        number: variables are ordered by this number.
    """

    address: str
    num_values: int
    plates: tuple[Plate, ...] = ()
    family: Any = None
    dimension: int | None = None
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))

    @property
    def normal(self) -> bool:
        return self.dimension is not None

    def meeting(self, plate: Plate) -> Meeting:
        """The copies along one of its plates."""
        return self.address if plate.axis is None else (self.address, plate.axis)

    def __repr__(self) -> str:
        return f"Variable({self.address}, {self.num_values})"


PlateAxes = dict[Variable, tuple[int, ...]]
"""For each variable that a value depends on, which of the value's own axes are its plates."""

Forms = dict[Variable, tuple[float, bool]]
"""What kind of function of continuous choices a value is, where that is known.

It is the power of the choice of which the value is a multiple, and whether the value is the choice itself.
"""


class Slope(NamedTuple):
    """The derivative of a value by a normal choice.

    Attributes:
        value: an array or a table. The value's own axes are followed by one for the numbers of one copy of the choice.
        places: the positions of the choice's plates among the value's own axes.
        unit: whether the value's numbers are those of the choice, in order: the derivative is an identity matrix.
        diagonal: whether each of them depends on the number of the choice in its place only.
    """

    value: Any
    places: tuple[int, ...]
    unit: bool = False
    diagonal: bool = False


class Made(NamedTuple):
    """An equation, its operands, and the number of the result that a value is."""

    eqn: Any
    ins: list[Any]
    number: int


class Table:
    """A value that depends on choices which are summed out, at each of their values.

    Attributes:
        array: has one leading axis for each variable, in the order of their numbers, then the value's own axes.
        axes: the variables, each with the positions of its plates among the value's own axes.
        forms: which function of the continuous variables the value is.
        slopes: the derivatives by normal choices. The array is the value where these are zero.
        curved: if the value is not affine in the normal choices, the equation that made it so.
        made: how a curved value is computed, as long as it is read where it is made.
    """

    __slots__ = ("array", "axes", "curved", "forms", "made", "slopes")

    def __init__(
        self,
        array: Any,
        axes: PlateAxes,
        forms: Forms | None = None,
        slopes: dict[Variable, Slope] | None = None,
        curved: str | None = None,
    ) -> None:
        self.array = array
        self.axes = dict(sorted(axes.items(), key=lambda item: item[0].number))
        self.forms = {} if forms is None else forms
        self.slopes = slopes or {}
        self.curved = curved
        self.made: Made | None = None

    def like(self, array: Any) -> Table:
        """Another table of the same kind, without slopes."""
        return Table(array, self.axes, self.forms)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value, without the axes of the table."""
        return tuple(jnp.shape(self.array))[len(self.axes) :]

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def __repr__(self) -> str:
        names = ", ".join(v.address for v in axes_of(self))
        return f"Table({names}; {self.dtype}{list(self.shape)})"


def axes_of(x: Any) -> PlateAxes:
    """All variables that a value depends on, each with the positions of its plates among the value's own axes."""
    if not isinstance(x, Table):
        return {}
    return {**x.axes, **{v: slope.places for v, slope in x.slopes.items()}}


def slopes_of(x: Any) -> dict[Variable, Slope]:
    return x.slopes if isinstance(x, Table) else {}


def at_zero(x: Any) -> Any:
    """A value where all normal choices are zero."""
    if not slopes_of(x):
        return x
    return x.like(x.array) if x.axes else x.array


def affine(value: Any, slopes: dict[Variable, Slope], curved: str | None = None) -> Any:
    """The value that is ``value`` where normal choices are zero, and has these slopes."""
    if not slopes:
        return value
    if isinstance(value, Table):
        return Table(value.array, value.axes, value.forms, slopes, curved)
    return Table(value, {}, None, slopes, curved)


def pieces(x: Any) -> list[tuple[Any, int]]:
    """The arrays of a value, each with the number of its axes before the value's own axes."""
    if not isinstance(x, Table):
        return [(x, 0)]
    found = [(x.array, len(x.axes))]
    for slope in x.slopes.values():
        found += [] if slope.value is None else pieces(slope.value)
    return found


def rebuilt(x: Any, arrays: Iterator[Any]) -> Any:
    """A value of the same form with other arrays."""
    if not isinstance(x, Table):
        return next(arrays)
    array = next(arrays)
    slopes = {
        v: s if s.value is None else Slope(rebuilt(s.value, arrays), s.places)
        for v, s in x.slopes.items()
    }
    return Table(array, x.axes, x.forms, slopes, x.curved)


def still(x: Any) -> Any:
    """A value of which no derivative is taken."""
    return rebuilt(x, iter([jax.lax.stop_gradient(a) for a, _ in pieces(x)]))


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

    ``meeting`` are normal choices whose copies could be integrated jointly.
    """

    meeting: frozenset[Meeting] = frozenset()


class Limit:
    """How large a table may become, and an account of the tables that were summed.

    Attributes:
        max_terms: the limit.
        terms: for every choice, the number of entries of all tables that were summed over it.
        flops: for every normal choice, about how many operations its elimination takes.
        largest: the number of entries of the largest of them, with copies counted once.
        lanes: the sizes of the vmaps around the walk.
        indices: what is known of integers that read copies of normal choices.
    """

    def __init__(self, max_terms: int) -> None:
        self.max_terms = max_terms
        self.terms: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.largest = 1
        self.lanes: tuple[int, ...] = ()
        self.indices = Indices()
        self._times = 1
        self._around: tuple[Any, ...] = ()

    @contextlib.contextmanager
    def repeated(self, times: int, lanes: tuple[int, ...] = ()) -> Iterator[None]:
        """Count everything inside this many times; zero times if it is only a trial."""
        before = self._times, self.lanes
        self._times, self.lanes = self._times * times, (*self.lanes, *lanes)
        try:
            yield
        finally:
            self._times, self.lanes = before

    @contextlib.contextmanager
    def inside(self, call: Any) -> Iterator[None]:
        """Name the line of a call where an equation inside, in a library's own jit, has none."""
        before = self._around
        self._around = (call, *before)
        try:
            yield
        finally:
            self._around = before

    def named(self, eqn: Any) -> str:
        """The name of an equation and its line in the user's code."""
        line = next(filter(None, map(where_in_source, (eqn, *self._around))), "")
        return f"{eqn.primitive.name!r}{line}"

    def count(self, address: str, joint: Sequence[Variable], entries: int) -> None:
        """Enter a sum over a choice in the account."""
        if self._times:
            self.terms[address] = self.terms.get(address, 0) + entries * self._times
            self.largest = max(self.largest, num_terms(joint))

    def spend(self, addresses: Iterable[str], flops: int) -> None:
        """Enter operations in the account, in equal parts for some choices."""
        names = list(dict.fromkeys(addresses))
        for name in names if self._times else ():
            self.flops[name] = self.flops.get(name, 0) + flops * self._times // len(names)

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
        return limit.indices.evaluate(eqn, ins)
    if reads_ref(eqn):
        names = ", ".join(repr(v.address) for v in variables)
        raise ModelError(
            f"what depends on {names} is written to an array in place{where_in_source(eqn)}: exact summing follows "
            "values only. Write it with .at[...].set, or keep the choice"
        )
    if is_call(eqn):
        with limit.inside(eqn):
            return evaluate(inner_jaxprs(eqn)[0], ins, functools.partial(equation, limit=limit))
    if any(map(slopes_of, ins)):
        return _affine(eqn, ins, limit)
    limit.check(variables, f"the equation {limit.named(eqn)}")
    out_axes = _plate_axes(eqn, ins, variables, limit)
    f: Callable[..., Any] = functools.partial(_bind, eqn)
    for variable in reversed(variables):
        f = jax.vmap(f, [0 if variable in axes_of(x) else None for x in ins])
    outs = folded(eqn, [x.array if isinstance(x, Table) else x for x in ins], f)
    forms = forms_of(eqn, ins, variables)
    return [_trim(out, variables, axes, forms) for out, axes in zip(outs, out_axes, strict=True)]


def _plate_axes(
    eqn: Any, ins: list[Any], variables: list[Variable], limit: Limit
) -> list[PlateAxes]:
    """For each result of an equation, the variables it depends on, and the positions of their plates."""
    out_axes: list[PlateAxes] = [{} for _ in eqn.outvars]
    for variable in variables:
        aligned: list[list[int | None]] = [[] for _ in eqn.outvars]
        for i, plate in enumerate(variable.plates):
            places = [axes_of(x)[variable][i] if variable in axes_of(x) else None for x in ins]
            try:
                found = align(eqn, places)
            except Unaligned as e:
                raise _entangled(variable, plate, limit.named(eqn), str(e)) from None
            for out, place in zip(aligned, found, strict=True):
                out.append(place)
        for axes, places in zip(out_axes, aligned, strict=True):
            known = [p for p in places if p is not None]
            if len(known) == len(places):
                axes[variable] = tuple(known)
    return out_axes


def _affine(eqn: Any, ins: list[Any], limit: Limit) -> list[Any]:
    """One equation on values some of which are affine in normal choices."""
    normal = [v for v in variables_of(ins) if v.normal]
    read = [i for i, x in enumerate(ins) if slopes_of(x)]
    values = [at_zero(x) for x in ins]
    curved = next((ins[i].curved for i in read if ins[i].curved), None)
    if curved is None and not is_linear(eqn, read):
        curved = limit.named(eqn)
    outs = equation(eqn, values, limit)
    places, picks = _normal_axes(eqn, ins, normal, limit)
    if curved is not None:
        return [
            _curved(out, axes, curved, Made(eqn, ins, k))
            for k, (out, axes) in enumerate(zip(outs, places, strict=True))
        ]
    as_large = all(_size(eqn.invars[i]) == _size(outs[0]) for i in read)
    keeps = len(read) == 1 and keeps_numbers(eqn) and as_large
    in_place = keeps or (eqn.primitive.name in ELEMENTWISE and as_large)
    slopes: list[dict[Variable, Slope]] = [{} for _ in outs]
    for v in normal:
        mine = [i for i in read if v in ins[i].slopes]
        found = _slopes(eqn, values, {i: ins[i].slopes[v].value for i in mine}, limit)
        u, old = picks.get(v, v), [ins[i].slopes[v] for i in mine]
        unit = keeps and old[0].unit
        diagonal = in_place and all(s.diagonal for s in old)
        for out, axes, slope in zip(slopes, places, found, strict=True):
            if u in axes:
                out[u] = Slope(slope, axes[u], unit, diagonal)
    return [affine(out, found) for out, found in zip(outs, slopes, strict=True)]


def _normal_axes(
    eqn: Any, ins: list[Any], normal: list[Variable], limit: Limit
) -> tuple[list[PlateAxes], dict[Variable, Variable]]:
    """The axes of normal choices in the results of an equation, and picks in place of choices read by an index."""
    out_axes: list[PlateAxes] = [{} for _ in eqn.outvars]
    picks: dict[Variable, Variable] = {}
    for v in normal:
        try:
            found = _plate_axes(eqn, ins, [v], limit)
        except Entangled as error:
            pick = _picked(eqn, ins, v, limit)
            if pick is None:
                error.meeting = _read_together(eqn, ins, v) or error.meeting
                raise
            picks[v], places = pick
            found = [{picks[v]: places}]
        for axes, own in zip(out_axes, found, strict=True):
            axes.update(own)
    return out_axes, picks


def _read_together(eqn: Any, ins: list[Any], v: Variable) -> frozenset[Meeting]:
    """Copies to be integrated jointly where one equation reads several plates by indices: all but the largest."""
    read = read_plates(eqn, slopes_of(ins[0])[v].places) if v in slopes_of(ins[0]) else []
    plates = sorted((v.plates[i] for i in read), key=lambda p: p.size)
    return frozenset(v.meeting(p) for p in plates[:-1])


def _picked(
    eqn: Any, ins: list[Any], v: Variable, limit: Limit
) -> tuple[Variable, tuple[int, ...]] | None:
    """The pick by which an equation reads a choice, and its axes in the result."""
    if v not in slopes_of(ins[0]) or any(map(slopes_of, ins[1:])) or v in limit.indices.picks:
        return None
    places = slopes_of(ins[0])[v].places
    found = reading(eqn, ins, places, limit.indices)
    if found is None:
        return None
    rest = []
    for i, place in enumerate(places):
        if i != found.along:
            try:
                [at, *_] = align(eqn, [place if k == 0 else None for k in range(len(ins))])
            except Unaligned:
                return None
            rest.append(at)
    shape = eqn.outvars[0].aval.shape
    rows = [a for a in found.rows if shape[a] != 1]
    key = v, found.along, found.name
    known = limit.indices.by_index
    if key not in known:
        others = [p for i, p in enumerate(v.plates) if i != found.along]
        plates = [Plate(shape[a], f"the rows that read {v.address!r}") for a in rows]
        pick = dataclasses.replace(v, plates=(*plates, *others))
        index = jnp.reshape(found.index, [shape[a] for a in rows])
        limit.indices.picks[pick] = Pick(v, found.along, index)
        known[key] = pick, ins
    return known[key][0], (*rows, *rest)


def _size(x: Any) -> int:
    return math.prod(getattr(x, "aval", x).shape)


def _curved(out: Any, axes: PlateAxes, why: str, made: Made) -> Any:
    found = affine(out, {v: Slope(None, places) for v, places in axes.items()}, why)
    if is_table(found):
        found.made = made
    return found


def straightened(values: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """Values that are affine, if it is known of all how they are made, and the function of them that others are."""
    sources: dict[int, Any] = {}

    def collect(x: Any) -> None:
        if is_table(x) and x.made is not None:
            for y in x.made.ins:
                collect(y)
        else:
            sources[id(x)] = x

    for x in values:
        collect(x)

    def compute(arrays: Sequence[Any]) -> list[Any]:
        known = dict(zip(sources, arrays, strict=True))
        results: dict[int, Any] = {}  # by operands

        def value(x: Any) -> Any:
            if id(x) in known:
                return known[id(x)]
            if id(x.made.ins) not in results:
                results[id(x.made.ins)] = bind(x.made.eqn, [value(y) for y in x.made.ins])
            return results[id(x.made.ins)][x.made.number]

        return [value(x) for x in values]

    return list(sources.values()), compute


def _slopes(eqn: Any, values: list[Any], slopes: dict[int, Any], limit: Limit) -> list[Any]:
    """The slopes of the results of an equation, from those of some operands. The axis of numbers comes last."""
    mine = list(slopes)

    def derivative(values: list[Any], slopes: list[Any]) -> Any:
        def f(*some: Any) -> Any:
            full = list(values)
            for i, x in zip(mine, some, strict=True):
                full[i] = x
            return bind(eqn, full)

        at = [values[i] for i in mine]
        return jax.vmap(lambda *ds: jax.jvp(f, at, list(ds))[1], -1, -1)(*slopes)

    values = [x if is_table(x) else jnp.asarray(x) for x in values]
    return apply(derivative, limit, values, list(slopes.values()))


def _bind(eqn: Any, *args: Any) -> list[Any]:
    return bind(eqn, args)


def _trim(array: Any, variables: list[Variable], axes: PlateAxes, forms: Forms) -> Any:
    """A result that leads with all ``variables``, without those that it does not depend on."""
    for i in reversed(range(len(variables))):
        if variables[i] not in axes:
            array = jax.lax.index_in_dim(array, 0, i, keepdims=False)
    return Table(array, axes, {v: f for v, f in forms.items() if v in axes}) if axes else array


def _entangled(variable: Variable, plate: Plate, eqn: str, why: str) -> Entangled:
    error = Entangled(
        f"the {plate.size} copies of {variable.address!r} along {plate.name} are not independent: the equation "
        f"{eqn} {why}. Exact summing goes copy by copy, and must see that each "
        f"number reads one copy only; where copies do meet, marginalize(model, {variable.address!r}, joint=True) sums "
        f"over all {variable.num_values}^{plate.size} joint values"
    )
    if variable.normal:
        error.meeting = frozenset({variable.meeting(plate)})
    return error


# --- which functions of continuous choices equations compute ----------------------------------------------------------


def forms_of(eqn: Any, ins: list[Any], variables: list[Variable]) -> Forms:
    """Which functions of continuous choices the results are. Unknown ones are left out."""
    forms: Forms = {}
    for v in variables:
        if v.family is not None:
            powers = [x.forms.get(v, UNKNOWN) if v in axes_of(x) else None for x in ins]
            power = (multiple_of if v.family.matrix else power_of)(eqn, powers)
            if power is not UNKNOWN:
                forms[v] = power
    return forms
