r"""Values as tables over discrete choices: the arithmetic below exact marginalisation.

A choice $z$ that is summed out has no value while a program is scored; what is computed from it is a function of it.
Such a function is kept as a table: a ``Lifted`` array has one leading axis for every choice it depends on, then its own
axes. Any JAX equation is applied to tables by ``jax.vmap`` over the leading axes, so nothing has to be known of it.

A choice of shape $(N,)$ is $N$ choices $z_1 \ldots z_N$. A table over all of them would have $V^N$ entries. Where
every element of a value reads at most the copy with its own index (it is *diagonal*), $V$ evaluations with all copies
set to the same value say everything. That an equation keeps values diagonal is proved from what is known of it, the
rules below; for every other equation the copies are *entangled*, which is an error.
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
from weft.ppl.analysis.constants import folded
from weft.ppl.stage.compat import (
    Literal,
    bind,
    inner_jaxprs,
    open_jaxpr,
    scan_sizes,
    where_in_source,
)
from weft.ppl.stage.errors import ModelError

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
    opened, consts = open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(opened.constvars, consts, strict=True))
    env.update(zip(opened.invars, args, strict=True))
    for eqn in opened.eqns:
        ins = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        env.update(zip(eqn.outvars, equation(eqn, ins, limit), strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in opened.outvars]


def equation(eqn: Any, ins: list[Any], limit: Limit) -> list[Any]:
    """One equation without sites."""
    variables = variables_of(ins)
    if not variables:
        return bind(eqn, ins)
    if eqn.primitive.name in INLINED:
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
        if all(is_affine(ins[i]) for i in read) and _is_linear(eqn, read):
            forms.update(dict.fromkeys(normal, (1.0, False)))
    for v in variables:
        if v.family is not None and v not in normal:
            powers = [x.forms.get(v, _UNKNOWN) if v in axes_of(x) else None for x in ins]
            power = (_multiple if v.family.matrix else _power)(eqn, powers)
            if power is not _UNKNOWN:
                forms[v] = power
    return forms


def is_affine(x: Any) -> bool:
    """Whether a value is an affine function of the normal choices it depends on."""
    return all(v in x.forms for v in axes_of(x) if v.family is not None and v.family.quadratic)


_UNKNOWN: Any = object()
_KEEPS = frozenset(
    ["broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy", "copy_p"]
)


def _power(eqn: Any, powers: list[Any]) -> Any:
    """The power of a choice that the result is a multiple of, and whether it is the choice itself."""
    name = eqn.primitive.name
    if any(p is _UNKNOWN for p in powers):
        return _UNKNOWN
    first, *rest = powers
    if name in _KEEPS:
        return first if first is not None else _UNKNOWN
    exponent = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2, "integer_pow": eqn.params.get("y")}.get(
        name
    )
    if name == "pow" and isinstance(eqn.invars[1], Literal):
        exponent = float(eqn.invars[1].val)
    if exponent is not None:
        return first[0] * exponent, False
    if name in ("mul", "div"):
        a, b = (0 if p is None else p[0] for p in (first, rest[0]))
        return (a + b if name == "mul" else a - b), False
    if name in ("transpose", "gather", "slice", "dynamic_slice") and first and not any(rest):
        return first[0], False
    return _UNKNOWN


def _multiple(eqn: Any, powers: list[Any]) -> Any:
    """The same for a positive definite matrix, in the last two axes: a multiple of it by a number."""
    name, shapes = eqn.primitive.name, [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
    first, rest = powers[0], powers[1:]
    if name in _KEEPS and first is not _UNKNOWN:
        kept = shapes[0][-2:] == shapes[-1][-2:]
        if name == "broadcast_in_dim":
            n = len(shapes[-1])
            kept = kept and tuple(eqn.params["broadcast_dimensions"][-2:]) == (n - 2, n - 1)
        return first if kept else _UNKNOWN
    if (
        name in ("mul", "div")
        and sum(p is not None for p in powers) == 1
        and _UNKNOWN not in powers
    ):
        other = shapes[1 if first is not None else 0]
        if other[-2:] in ((), (1, 1)) and not (name == "div" and rest[0] is not None):
            return 1, False
    return _UNKNOWN


def _is_linear(eqn: Any, read: list[int]) -> bool:
    """Whether an equation is affine in some operands together: whether its derivative does not read them."""
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    real = [avals[i].dtype for i in read] + [v.aval.dtype for v in eqn.outvars]
    if not all(jnp.issubdtype(d, jnp.inexact) for d in real):
        return False

    return is_polynomial(lambda *xs: bind(eqn, xs), avals, read, 1)


def is_polynomial(f: Callable[..., Any], avals: list[Any], read: list[int], degree: int) -> bool:
    """Whether ``f`` is a polynomial of at most this degree in the operands ``read`` together.

    That is so if it is made of smooth equations and its derivative of that order does not read them.
    """

    def along(g: Callable[..., Any], direction: Any) -> Callable[..., Any]:
        return lambda *xs: jax.jvp(g, xs, direction)[1]

    def derivative(xs: Any, directions: Any) -> Any:
        def g(*some: Any) -> Any:
            full = list(xs)
            for i, x in zip(read, some, strict=True):
                full[i] = x
            return f(*full)

        for direction in directions:
            g = along(g, tuple(direction))
        return g(*(xs[i] for i in read))

    flags = [i in read for i in range(len(avals))]
    names: set[str] = set()
    reads(jax.make_jaxpr(f)(*avals), flags, names)
    if not names <= SMOOTH:
        return False
    directions = [[avals[i] for i in read]] * degree
    closed = jax.make_jaxpr(derivative)(avals, directions)
    return not any(reads(closed, [*flags, *[False] * (len(read) * degree)]))


_SMOOTH = """
add add_any broadcast_in_dim cholesky concatenate conv_general_dilated convert_element_type copy copy_p cos cumsum div
dot_general dynamic_slice dynamic_update_slice exp expand_dims finite_cotangent gather imag integer_pow log log1p
logistic mul neg pad real reduce_precision reduce_sum reshape rev scatter-add scatter_add select_n sin slice split
sqrt square squeeze stack sub tanh tile transpose triangular_solve unstack
"""
SMOOTH = frozenset(_SMOOTH.split())
"""Equations that are analytic where they are defined; of others (floor, say) a derivative does not tell all."""


def reads(jaxpr: Any, flags: Sequence[bool], names: set[str] | None = None) -> list[bool]:
    """Which results of a jaxpr depend on the operands that are flagged.

    The primitives through which they do are added to ``names``.
    """
    opened, _ = open_jaxpr(jaxpr)
    env: dict[Any, bool] = dict(zip(opened.invars, flags, strict=True))

    def read(v: Any) -> bool:
        return not isinstance(v, Literal) and env.get(v, False)

    for eqn in opened.eqns:
        found = _eqn_reads(eqn, [read(v) for v in eqn.invars], set() if names is None else names)
        env.update(zip(eqn.outvars, found, strict=True))
    return [read(v) for v in opened.outvars]


def _eqn_reads(eqn: Any, flags: list[bool], names: set[str]) -> list[bool]:
    inner = inner_jaxprs(eqn)
    if not any(flags):
        return [False] * len(eqn.outvars)
    if eqn.primitive.name == "scan":
        num_consts, num_carry = scan_sizes(eqn.params)
        state = list(flags)
        while True:
            outs = reads(inner[0], state, names)
            carry = state[num_consts : num_consts + num_carry]
            grown = [a or b for a, b in zip(carry, outs[:num_carry], strict=True)]
            if grown == carry:
                return [*carry, *outs[num_carry:]]
            state[num_consts : num_consts + num_carry] = grown
    if eqn.primitive.name == "cond" and not flags[0]:
        found = [reads(b, flags[1:], names) for b in inner]
        return [any(outs) for outs in zip(*found, strict=True)]
    if eqn.primitive.name in INLINED:
        return reads(inner[0], flags, names)
    names.add(eqn.primitive.name)
    return [True] * len(eqn.outvars)


# --- which equations keep copies apart --------------------------------------------------------------------------------


class Unaligned(Exception):
    """An equation may mix the copies of a choice; says how."""


Places = list["int | None"]

INLINED = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "checkpoint",
        "remat",
        "remat2",
        "custom_vjp_call_jaxpr",
    }
)

_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz conj
convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1
finite_cotangent floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p
logistic lt lt_to max min mul ne neg nextafter not optimization_barrier or polygamma population_count pow
random_gamma_grad real reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())

_BATCHED = """
cholesky triangular_solve lu lu_solve lu_pivots_to_permutation eigh eig svd qr geqrf householder_product
tridiagonal_solve tridiagonal schur
"""
BATCHED = frozenset(_BATCHED.split())
"""Linear algebra: all axes but the last two are batch axes, in the same places in the results."""

Rule = Callable[[Any, Places], Places]
_RULES: dict[str, Rule] = {}


def align(eqn: Any, places: Places) -> Places:
    """Where the results of an equation carry the axis that some operands carry at ``places`` (None: not at all).

    Raises:
        Unaligned: if the equation may mix indices of that axis.
    """
    name = eqn.primitive.name
    if all(p is None for p in places):
        return [None] * len(eqn.outvars)
    if name in _RULES:
        return _RULES[name](eqn, places)
    if name in ELEMENTWISE:
        return _same(eqn, places)
    if name in BATCHED:
        return _batched(eqn, places)
    if name.startswith(("reduce_", "arg")):
        return _reduce(eqn, places)
    if name.startswith("cum"):
        return _along(eqn, places, eqn.params["axis"])
    inner = inner_jaxprs(eqn)
    if len(inner) == 1 and len(open_jaxpr(inner[0])[0].invars) == len(places):
        return align_jaxpr(inner[0], places)
    raise Unaligned("is not known to keep them apart")


def align_jaxpr(jaxpr: Any, places: Places) -> Places:
    """The same for a whole jaxpr."""
    opened, _ = open_jaxpr(jaxpr)
    env: dict[Any, int | None] = dict(zip(opened.invars, places, strict=True))

    def read(v: Any) -> int | None:
        return None if isinstance(v, Literal) else env.get(v)

    for eqn in opened.eqns:
        env.update(zip(eqn.outvars, align(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in opened.outvars]


def _one(places: Places) -> int:
    """The place that all operands agree on."""
    found = {p for p in places if p is not None}
    if len(found) != 1:
        raise Unaligned(f"combines them along different axes {sorted(found)}")
    return found.pop()


def _shape(eqn: Any, i: int = 0) -> tuple[int, ...]:
    return tuple(eqn.invars[i].aval.shape)


def _same(eqn: Any, places: Places) -> Places:
    place = _one(places)
    ranks = {len(_shape(eqn, i)) for i, p in enumerate(places) if p is not None}
    if eqn.primitive.name == "optimization_barrier":
        return list(places)
    if any(len(out.aval.shape) not in ranks for out in eqn.outvars):
        raise Unaligned("changes the number of axes")
    return [place] * len(eqn.outvars)


def _batched(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if any(p is not None and p >= len(_shape(eqn, i)) - 2 for i, p in enumerate(places)):
        raise Unaligned("reads the whole axis")
    return [place] * len(eqn.outvars)


def _reduce(eqn: Any, places: Places) -> Places:
    place, axes = _one(places), eqn.params.get("axes", eqn.params.get("dimensions"))
    if axes is None or place in axes:
        raise Unaligned(f"reduces over their axis {place}")
    return [place - sum(a < place for a in axes)] * len(eqn.outvars)


def _along(eqn: Any, places: Places, axis: int) -> Places:
    place = _one(places)
    if place == axis:
        raise Unaligned(f"goes along their axis {axis}")
    return [place] * len(eqn.outvars)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


@_rule("broadcast_in_dim")
def _broadcast(eqn: Any, places: Places) -> Places:
    place = _one(places[:1])
    target = eqn.params["broadcast_dimensions"][place]
    if _shape(eqn)[place] != eqn.params["shape"][target]:
        raise Unaligned("repeats their axis")
    return [target]


@_rule("reshape")
def _reshape(eqn: Any, places: Places) -> Places:
    place, old, new = _one(places[:1]), _shape(eqn), tuple(eqn.params["new_sizes"])
    before = math.prod(old[:place])
    for target, size in enumerate(new):
        if size == old[place] and math.prod(new[:target]) == before:
            return [target]
    raise Unaligned(f"reshapes their axis, {old} to {new}")


@_rule("squeeze")
def _squeeze(eqn: Any, places: Places) -> Places:
    place = _one(places)
    assert place not in eqn.params["dimensions"], "a plate has more than one copy"
    return [place - sum(a < place for a in eqn.params["dimensions"])]


@_rule("fft")
def _fft(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if place >= len(_shape(eqn)) - len(eqn.params["fft_lengths"]):
        raise Unaligned(f"transforms along their axis {place}")
    return [place]


@_rule("transpose")
def _transpose(eqn: Any, places: Places) -> Places:
    return [list(eqn.params["permutation"]).index(_one(places))]


@_rule("rev")
def _rev(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if place in eqn.params["dimensions"]:
        raise Unaligned(f"reverses their axis {place}")
    return [place]


@_rule("sort", "concatenate", "split")
def _dimension(eqn: Any, places: Places) -> Places:
    return _along(eqn, places, eqn.params.get("dimension", eqn.params.get("axis")))


@_rule("stack")
def _stack(eqn: Any, places: Places) -> Places:
    place = _one(places)
    return [place + (eqn.params["axis"] <= place)]


@_rule("unstack")
def _unstack(eqn: Any, places: Places) -> Places:
    [place, *_] = _along(eqn, places, eqn.params["axis"])
    assert place is not None
    return [place - (eqn.params["axis"] < place)] * len(eqn.outvars)


@_rule("tile")
def _tile(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if eqn.params["reps"][place] != 1:
        raise Unaligned(f"repeats their axis {place}")
    return [place]


@_rule("top_k")
def _top_k(eqn: Any, places: Places) -> Places:
    return _along(eqn, places, len(_shape(eqn)) - 1)


@_rule("pad")
def _pad(eqn: Any, places: Places) -> Places:
    place = _one(places)
    if tuple(eqn.params["padding_config"][place]) != (0, 0, 0):
        raise Unaligned(f"pads their axis {place}")
    return [place]


@_rule("slice")
def _slice(eqn: Any, places: Places) -> Places:
    place, params = _one(places), eqn.params
    whole = (
        params["start_indices"][place] == 0 and params["limit_indices"][place] == _shape(eqn)[place]
    )
    if not whole or (params["strides"] and params["strides"][place] != 1):
        raise Unaligned(f"takes a part of their axis {place}")
    return [place]


@_rule("dynamic_slice")
def _dynamic_slice(eqn: Any, places: Places) -> Places:
    place = _one(places[:1])
    if eqn.params["slice_sizes"][place] != _shape(eqn)[place]:
        raise Unaligned(f"takes a part of their axis {place}")
    return [place]


@_rule("dynamic_update_slice")
def _dynamic_update_slice(eqn: Any, places: Places) -> Places:
    place = _one(places[:2])
    if _shape(eqn, 1)[place] != _shape(eqn, 0)[place]:
        raise Unaligned(f"writes a part of their axis {place}")
    return [place]


@_rule("dot_general")
def _dot_general(eqn: Any, places: Places) -> Places:
    (contract, batch), out = eqn.params["dimension_numbers"], set()
    free_before = len(batch[0])
    for side, place in enumerate(places[:2]):
        free = [
            a
            for a in range(len(_shape(eqn, side)))
            if a not in contract[side] and a not in batch[side]
        ]
        if place is not None:
            if place in contract[side]:
                raise Unaligned(f"sums over their axis {place}")
            out.add(
                list(batch[side]).index(place)
                if place in batch[side]
                else free_before + free.index(place)
            )
        free_before += len(free)
    if len(out) != 1:
        raise Unaligned("combines every copy with every other")
    return [out.pop()]


@_rule("gather")
def _gather(eqn: Any, places: Places) -> Places:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = places
    out_rank = len(eqn.outvars[0].aval.shape)
    batch = [a for a in range(out_rank) if a not in numbers.offset_dims]
    out = set()
    if indices is not None:
        if indices == len(_shape(eqn, 1)) - 1:
            raise Unaligned("reads an index made of several copies")
        out.add(batch[indices])
    if operand is not None:
        if operand in numbers.operand_batching_dims:
            i = list(numbers.operand_batching_dims).index(operand)
            out.add(batch[numbers.start_indices_batching_dims[i]])
        elif operand in numbers.start_index_map or sizes[operand] != _shape(eqn)[operand]:
            raise Unaligned(f"takes parts of their axis {operand}")
        else:
            dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
            kept = [a for a in range(len(_shape(eqn))) if a not in dropped]
            out.add(numbers.offset_dims[kept.index(operand)])
    if len(out) != 1:
        raise Unaligned("combines every copy with every other")
    return [out.pop()]


@_rule("scan")
def _scan(eqn: Any, places: Places) -> Places:
    num_consts, num_carry = scan_sizes(eqn.params)
    consts, carry = places[:num_consts], places[num_consts : num_consts + num_carry]
    xs = places[num_consts + num_carry :]
    if 0 in xs:
        raise Unaligned("goes along their axis 0")
    xs = [None if p is None else p - 1 for p in xs]
    carry = _settle(
        lambda c: align_jaxpr(eqn.params["jaxpr"], [*consts, *c, *xs])[:num_carry], carry
    )
    outs = align_jaxpr(eqn.params["jaxpr"], [*consts, *carry, *xs])
    return [*carry, *(None if p is None else p + 1 for p in outs[num_carry:])]


@_rule("while")
def _while(eqn: Any, places: Places) -> Places:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = places[n : n + m], places[n + m :]
    carry = _settle(lambda c: align_jaxpr(eqn.params["body_jaxpr"], [*consts, *c]), carry)
    if align_jaxpr(eqn.params["cond_jaxpr"], [*places[:n], *carry])[0] is not None:
        raise Unaligned("decides by all of them how long to go on")
    return carry


@_rule("cond")
def _cond(eqn: Any, places: Places) -> Places:
    outs = [align_jaxpr(b, places[1:]) for b in eqn.params["branches"]]
    return [_agree(found) for found in zip(*outs, strict=True)]


def _agree(places: Sequence[int | None]) -> int | None:
    found = {p for p in places if p is not None}
    if len(found) > 1:
        raise Unaligned("puts them on different axes in different branches")
    return found.pop() if found else None


def _settle(step: Callable[[Places], Places], carry: Places) -> Places:
    """Places of a carry that one more step does not change."""
    while True:
        new = [_agree(pair) for pair in zip(carry, step(carry), strict=True)]
        if new == carry:
            return carry
        carry = new
