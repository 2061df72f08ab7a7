"""The handler of exact sums: a program is walked with tables in place of the choices that are summed out.

A value that depends on such a choice is a table of its values (``tables``). A density term that depends on one is a
factor. All other terms add up to a constant. The interpreter asks this handler at every equation. An equation on tables
is applied to each of their entries. A part of the program without tables, and without choices to be summed out, is left
to the handler of the other choices. Control flow around the rest has rules of its own, ``RULES``.

The rules stand in files of their own: sites in ``choices``, ``jax.vmap`` in ``lanes``, ``cond`` in ``branches``,
``scan`` in ``chains``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.compat import inner_jaxprs
from weft.ppl.stage.control import eqn_holds_sites, is_record, marginal_p, scope_p, site_names
from weft.ppl.stage.errors import DensityError, ModelError
from weft.ppl.stage.interpreter import Context, Handler, Result, step, walk
from weft.ppl.stage.records import Records, cast
from weft.ppl.stage.sites import site_p
from weft.ppl.stage.wiring import described, is_call

from .elimination import sum_out
from .factors import Factor, Scale, factor_of
from .families import Placement
from .normals import (
    Evidence,
    Prior,
    around,
    eliminate,
    mixture,
    next_of,
    origins,
    read_by,
    stuck,
    summed,
)
from .picks import is_integer
from .plan import Address, Plan
from .tables import (
    Plate,
    Table,
    Variable,
    affine,
    equation,
    is_table,
    variables_of,
)


class Lost:
    """A value that depends on a choice which has been summed out. It is an error if anything reads it."""

    def __init__(self, why: str) -> None:
        self.why = why


class Region(Handler):
    """The walk through one region of a program: its factors, and the rest of its density.

    A region is a part in which equations share their axes: the program, one lane, one step of a scan, or a branch.

    Attributes:
        plan: what is summed out.
        kept: the handler of the choices that are kept.
        outside: the variables that are read after the region.
        known: the variables by address. Branches share them.
        factors: the density terms that are tables.
        constant: the sum of all other density terms.
        keys: the keys of the variables, for draws.
        placements: the placements of the continuous variables that are not normal.
        priors: the priors of the normal variables.
        evidence: the density terms that depend on normal variables.
        created: the variables made in the region.
        shared: for each site whose density is known only together with that of others, the plates of its axes.
    """

    def __init__(
        self,
        plan: Plan,
        kept: Handler,
        outside: frozenset[Variable] = frozenset(),
        known: dict[Address, Variable] | None = None,
    ) -> None:
        self.plan = plan
        self.kept = kept
        self.outside = outside
        self.known = {} if known is None else known
        self.factors: list[Factor] = []
        self.constant: Any = 0.0
        self.keys: dict[Variable, Any] = {}
        self.placements: dict[Variable, Placement] = {}
        self.priors: dict[Variable, Prior] = {}
        self.evidence: list[Evidence] = []
        self.created: list[Variable] = []
        self.shared: dict[Address, list[Plate | None]] = {}

    # --- the walk ---

    def walk(self, jaxpr: Any, args: Any, context: Context) -> tuple[list[Any], Records]:
        """The outputs and records of a jaxpr on tables. Its density goes into the factors and the constant."""
        inside = dataclasses.replace(context, handler=self, frame=None)
        return walk(jaxpr, args, inside)[:2]

    def equation(self, eqn: Any, ins: list[Any], context: Context) -> Result | None:
        sited = eqn_holds_sites(eqn)
        lost = next((x for x in ins if isinstance(x, Lost)), None)
        if lost is not None:  # what depends on it is lost, too; only records may be lost
            if sited and not is_record(eqn):
                raise ModelError(lost.why)
            return [lost] * len(eqn.outvars), {}, {}
        tables = any(map(is_table, ins))
        if not sited:
            if not tables and not is_integer(eqn):
                return None
            return equation(eqn, ins, self.plan.limit), {}, {}
        if tables or eqn.primitive is site_p or self.plan.holds(eqn, context.prefix):
            outs, records = RULES.get(eqn.primitive, _call)(self, eqn, ins, context)
        else:
            outside = dataclasses.replace(context, handler=self.kept)
            outs, records, terms = step(eqn, ins, outside)
            self.constant = self.constant + terms.get("log_density", 0.0)
        return [_cast(o, v.aval) for o, v in zip(outs, eqn.outvars, strict=True)], records, {}

    def read_later(self, context: Context) -> frozenset[Variable]:
        """The variables that are read after the current equation."""
        assert context.frame is not None
        return self.outside | frozenset(variables_of(context.frame.later()))

    # --- the density ---

    def weigh(self, term: Any, address: Address, scale: Scale = ()) -> None:
        """Count a density term."""
        each = any(map(jnp.ndim, scale))
        if not is_table(term) and (each or not scale):
            self.constant = self.constant + jnp.sum(math.prod(scale, start=term))
            return
        if not is_table(
            term
        ):  # not in the constant: in a branch it meets what decides between branches
            self.factors.append(Factor(jnp.sum(term), (), (), scale, (".".join(address),)))
            return
        if each:
            raise ModelError(
                f"site {'.'.join(address)!r} depends on {addresses(term.axes)} and has a scale for each of its "
                "elements: a sum over choices can be scaled as a whole only"
            )
        self.factors.append(factor_of(term, ".".join(address), scale))

    def weigh_copies(self, term: Any, variable: Variable, address: Address, scale: Scale) -> None:
        """Count a density term with one entry for each copy of a variable."""
        axes = term.axes if is_table(term) else {}
        array = term.array if is_table(term) else term
        plates = tuple(p.root() for p in variable.plates)
        self.factors.append(Factor(array, tuple(axes), plates, scale, (".".join(address),)))

    def finish(
        self,
        variables: Iterable[Variable] | None = None,
        may_stay: frozenset[Variable] = frozenset(),
    ) -> None:
        """Sum out variables; all of them if None.

        Variables that ``may_stay`` stay if others have to be summed out before them. So do normal variables, unless all
        are summed out.
        """
        everything = variables is None
        wanted = set(self.priors) if variables is None else {v for v in variables if v.normal}
        left = self._eliminate(wanted)
        if everything and left:
            raise stuck(left, self.priors, self.evidence, self.plan.limit)
        held = {v for f in (*self.evidence, *self.priors.values()) for v in f.others}
        if variables is None:
            variables = {v for f in self.factors for v in f.variables}
        finite = {v for v in variables if not v.normal}
        meeting = (finite & held) - may_stay
        if meeting:
            raise mixture(meeting, self.evidence)
        scales = {v: place.log_scale(v.family) for v, place in self.placements.items()}
        semiring, limit = self.plan.semiring, self.plan.limit
        self.factors = sum_out(
            self.factors, finite - held, semiring, limit, self.keys, scales, may_stay
        )

    def _eliminate(self, wanted: set[Variable]) -> set[Variable]:
        """Integrate over normal variables, as far as it goes, from the leaves to the roots. Returns those that stay."""
        limit, semiring = self.plan.limit, self.plan.semiring
        wanted = wanted & self.priors.keys()
        if any(self.priors[v].parents for v in wanted):
            self.evidence = summed(
                self.evidence, self.priors, sorted(wanted, key=lambda v: v.number), limit
            )
            # Measured from where they are likely, all numbers are small, and no derivative cancels.
            with limit.repeated(0):
                known = origins(self.priors, self.evidence, wanted, semiring, limit)
            self.evidence = [around(f, known, limit) for f in self.evidence]
            self.priors = {v: around(f, known, limit) for v, f in self.priors.items()}
        while v := next_of(wanted, self.priors, self.evidence, limit):
            wanted.discard(v)
            mine = [f for f in self.evidence if read_by(f, v, limit)]
            self.evidence = [f for f in self.evidence if f not in mine]
            self.evidence += eliminate(self.priors.pop(v), mine, semiring, limit)[0]
        self.settle()
        return wanted

    def settle(self) -> None:
        """Turn evidence that depends on no normal variable any more into factors."""
        limit = self.plan.limit
        self.evidence = [f if f.variables else f.without_unit(limit) for f in self.evidence]
        self.factors += [f.factor(limit) for f in self.evidence if not f.variables]
        self.evidence = [f for f in self.evidence if f.variables]

    def log_density(self, scaled: bool = True) -> jax.Array:
        """The log density, after everything is summed out. Without scales, its sums count once."""
        self.finish()
        return self.constant + sum((f.total(scaled) for f in self.factors), 0.0)

    def distribute(self, records: Records, prefix: int) -> Records:
        """The records with the densities of sites that share a choice, each at the last of these sites.

        All choices are summed out. The records begin at an address of length ``prefix``.
        """
        for factor in self.factors:
            sites = [a for a in self.shared if ".".join(a) in factor.sites]
            if not sites:
                continue
            labels = [None if p is None else p.root() for p in self.shared[sites[-1]]]
            own = [p.root() for p in factor.plates]
            order = [own.index(p) for p in labels if p in own]
            table = jnp.transpose(factor.table, order)
            table = math.prod(factor.scale, start=table)
            at = tuple(slice(None) if p in own else 0 for p in labels)
            records = _added(records, sites[-1][prefix:], at, table)
        return records

    def refuse_shared(self, where: str) -> None:
        """Refuse densities by site if they are not known site by site."""
        if self.shared:
            names = ", ".join(repr(".".join(a)) for a in self.shared)
            raise DensityError(
                f"the log densities of {names} are not known site by site: in {where} they share choices that are "
                "summed out; log_density has their total"
            )


def _added(records: Records, address: Address, at: Any, table: Any) -> Records:
    name, *rest = address
    if rest:
        return {**records, name: _added(records[name], tuple(rest), at, table)}
    value = records[name]["value"].at[at].add(table)
    return {**records, name: {**records[name], "value": value}}


def _cast(x: Any, aval: Any) -> Any:
    if isinstance(x, Lost):
        return x
    if not is_table(x):
        return cast(x, aval)
    if x.made is not None:
        return x
    return affine(Table(cast(x.array, aval), x.axes, x.forms), x.slopes, x.curved)


def addresses(variables: Iterable[Variable]) -> str:
    """The addresses of some variables, for messages."""
    return " and ".join(repr(a) for a in dict.fromkeys(v.address for v in variables))


# --- rules ------------------------------------------------------------------------------------------------------------

Rule = Callable[[Region, Any, list[Any], Context], tuple[list[Any], Records]]
"""A function from a region, an equation with sites, its operands and the context to outputs and records."""

RULES: dict[Any, Rule] = {}


def rule(primitive: Any) -> Callable[[Rule], Rule]:
    """Register the rule of a primitive."""

    def register(f: Rule) -> Rule:
        RULES[primitive] = f
        return f

    return register


@rule(scope_p)
def _scope(region: Region, eqn: Any, ins: list[Any], context: Context) -> tuple[list[Any], Records]:
    name = eqn.params["name"]
    if name is None:
        raise _refusal(eqn)
    outs, records, _ = walk(eqn.params["jaxpr"], ins, context.enter(name))
    return outs, {name: records} if records else {}


@rule(marginal_p)
def _marginal(
    region: Region, eqn: Any, ins: list[Any], context: Context
) -> tuple[list[Any], Records]:
    """Choices that are summed out further inside are summed out together with these: sums commute."""
    more = {(*context.prefix, *a) for a in eqn.params["addresses"]}
    region.plan = dataclasses.replace(region.plan, targets=region.plan.targets | more)
    return walk(eqn.params["jaxpr"], ins, context)[:2]


def _call(region: Region, eqn: Any, ins: list[Any], context: Context) -> tuple[list[Any], Records]:
    if not is_call(eqn):
        raise _refusal(eqn)
    return walk(inner_jaxprs(eqn)[0], ins, context)[:2]


def _refusal(eqn: Any) -> ModelError:
    names = ", ".join(repr(n) for j in inner_jaxprs(eqn) for n in site_names(j))
    return ModelError(
        f"the sites {names} in {described(eqn)} depend on choices that are summed out, or are themselves to be summed "
        "out there: that is possible in vmap, scan, cond, switch, jit and nested programs"
    )
