r"""Exact marginalisation: a model without some of its discrete choices.

``marginalize(model, "z")`` is a model of all other choices, with density $p(x) = \sum_z p(x, z)$. Drawing from it is
drawing from the model; scoring it walks the model once with $z$ as a table of its values (``lifting``), collects the
density terms as factors and sums them out (``elimination``). What depends on $z$ shows in the staged program, so that
nothing has to be declared: copies along a ``vmap`` or a batch axis are summed one by one, a ``lax.scan`` is a Markov
chain (``chains``), branches are tables as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from weft.ppl.analysis.affinity import is_polynomial
from weft.ppl.analysis.sameness import computes
from weft.ppl.programs.handlers import Evaluate, Free, Given, conditioned
from weft.ppl.stage.addresses import covers, dotted, unknown
from weft.ppl.stage.compat import (
    CALLS,
    Literal,
    cond_p,
    consts_first,
    inner_jaxprs,
    open_jaxpr,
    scan_p,
    while_p,
)
from weft.ppl.stage.control import (
    eqn_holds_sites,
    estimated_p,
    lanes_p,
    marginal_p,
    scope_p,
    site_names,
)
from weft.ppl.stage.cotangents import finite_cotangents
from weft.ppl.stage.errors import DensityError, ModelError
from weft.ppl.stage.interpreter import (
    RULES,
    Context,
    Handler,
    Records,
    is_record,
    look_up,
    step,
    walk,
    walk_names,
)
from weft.ppl.stage.sites import Lane, Site, lane_shape, site_p
from weft.ppl.stage.structure import SiteInfo, count_anonymous, site_table
from weft.ppl.transforms.rewriting import Rewrite, Transformed, stage_call, transform
from weft.ppl.transforms.transforms import name_of

from .conjugacy import CONJUGATE, FACTORS, Family, Gaussian, base_of, family_of
from .elimination import PROBE, Factor, factor_of, labels_of, sum_out
from .semirings import Reduce, log_sum
from .tables import (
    Axes,
    Entangled,
    Forms,
    Lifted,
    Limit,
    Plate,
    Variable,
    apply,
    axes_of,
    equation,
    is_affine,
    is_lifted,
    variables_of,
)

F = TypeVar("F", bound=Callable[..., Any])
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Options:
    """How choices are summed out.

    Attributes:
        joint: sum over all joint values of the copies of a choice, whatever they read.
        parallel: chains by an associative scan.
        max_terms: the largest table allowed.
    """

    joint: bool = False
    parallel: bool = False
    max_terms: int = 1_000_000


IMPOSSIBLE = -1e30
"""As good as minus infinity: its exponential is zero, and derivatives stay finite."""


class ReturnsChoice(ModelError):
    """What a program returns depends on a choice that is summed out."""


class Weights(NamedTuple):
    """Given at a choice that is summed out: numbers added to its log density, the table's axis last."""

    log_weights: jax.Array


class Place(NamedTuple):
    """Where the points of a continuous choice are, ``centre + scale * grid``; plates lead."""

    centre: jax.Array
    scale: jax.Array
    mean: jax.Array  # a guess of where it is, in units of the grid

    def points(self, family: Family) -> jax.Array:
        grid = jnp.asarray(family.grid, self.centre.dtype)
        plates = (1,) * (self.centre.ndim - len(family.event))
        return self.centre + self.scale * grid.reshape(-1, *plates, *family.event)

    def log_scale(self, family: Family) -> jax.Array:
        return family.log_volume(self.scale)


class Lost:
    """A value that depends on a choice which is gone; an error if anything reads it."""

    def __init__(self, why: str) -> None:
        self.why = why


# --- the walk ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rule:
    """How one choice is summed out.

    Attributes:
        distribution: its law.
        num_values: how many values, or points, its table has.
        copies: sizes of the axes along which copies are summed one by one.
        family: of a continuous choice.
        joint: copies that are summed over all their joint values, or integrated jointly.
        chain: of a choice that a scan hands on: the order, the number of steps, whether they are composed in a tree;
            order zero, if no step hands it on.
    """

    distribution: str
    num_values: int
    copies: tuple[int, ...] = ()
    family: Family | None = None
    joint: int = 1
    chain: tuple[int, int, bool] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one marginalisation sums out, and how.

    Attributes:
        targets: paths of the choices.
        options: as asked for.
        limit: of tables, and an account of them.
        reduce: what a sum is.
        filtering: whether derivatives are those of filtering (``chains``).
        together: normal choices of which the copies are integrated jointly.
        rules: what was found, by address.
    """

    targets: frozenset[Path]
    options: Options
    limit: Limit
    reduce: Reduce = log_sum
    filtering: bool = False
    together: frozenset[str] = frozenset()
    rules: dict[str, Rule] = dataclasses.field(default_factory=dict)

    def holds(self, jaxpr: Any, prefix: Path) -> bool:
        """Whether a choice that is summed out stands in a jaxpr."""
        return any(
            (*prefix, eqn.params["spec"].name) in self.targets
            if eqn.primitive is site_p
            else any(
                self.holds(j, (*prefix, eqn.params["name"]) if eqn.primitive is scope_p else prefix)
                for j in inner_jaxprs(eqn)
            )
            for eqn in open_jaxpr(jaxpr)[0].eqns
            if eqn_holds_sites(eqn)
            and not (eqn.primitive is scope_p and eqn.params["name"] is None)
            and eqn.primitive is not estimated_p
        )


class Level:
    """The walk through one region of a program: its factors, and what it knows without them.

    A region is where equations share their axes: the program, one lane, one step of a scan, a branch.
    """

    def __init__(self, plan: Plan, known: dict[Path, Variable] | None = None) -> None:
        self.plan = plan
        self.factors: list[Factor] = []
        self.constant: Any = 0.0
        self.known = {} if known is None else known  # choices that another branch has, too
        self.keys: dict[Variable, Any] = {}
        self.places: dict[Variable, Place] = {}
        self.created: list[Variable] = []
        self.so_far: tuple[Any, Any] = ((), {})  # equations, and values
        self.shared: dict[
            Path, list[Plate | None]
        ] = {}  # sites whose density is known with others' only

    # --- walking ---

    def walk(
        self, jaxpr: Any, args: Any, context: Context, live: frozenset[Variable] = frozenset()
    ) -> tuple[list[Any], Records]:
        """Outputs and records of a jaxpr on lifted values; its density goes into the factors.

        ``live`` are the variables that are read after it.
        """
        opened, consts = open_jaxpr(jaxpr)
        env: dict[Any, Any] = dict(zip(opened.constvars, consts, strict=True))
        env.update(zip(opened.invars, args, strict=True))
        last_use = {
            v: i for i, e in enumerate(opened.eqns) for v in e.invars if not isinstance(v, Literal)
        }
        last_use.update({v: len(opened.eqns) for v in opened.outvars if not isinstance(v, Literal)})
        records: Records = {}
        for i, eqn in enumerate(opened.eqns):
            ins = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            lost = next((x for x in ins if isinstance(x, Lost)), None)
            if lost is not None:  # what follows from it is lost, too; only a record may be
                if eqn_holds_sites(eqn) and not _is_record_site(eqn):
                    raise ModelError(lost.why)
                outs = [lost] * len(eqn.outvars)
            elif eqn_holds_sites(eqn):
                later = {u for v, x in env.items() if last_use.get(v, -1) > i for u in axes_of(x)}
                self.so_far = opened.eqns[:i], env
                outs, found = self.sited(eqn, ins, context, live | later)
                records.update(found)
                outs = [_cast(o, v.aval) for o, v in zip(outs, eqn.outvars, strict=True)]
                context = context.after(eqn)
            else:
                outs = equation(eqn, ins, self.plan.limit)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [v.val if isinstance(v, Literal) else env[v] for v in opened.outvars], records

    def sited(
        self, eqn: Any, ins: list[Any], context: Context, live: frozenset[Variable]
    ) -> tuple[list[Any], Records]:
        """An equation that holds sites."""
        primitive = eqn.primitive
        if primitive is site_p:
            address = (*context.prefix, eqn.params["spec"].name)
            if address in self.plan.targets:
                return [self.variable(eqn, ins, context, address)], {}
            return self.site(eqn, ins, context, address)
        if not any(map(is_lifted, ins)) and not self._holds(eqn, context):
            outs, records, terms = step(eqn, ins, context)
            self.constant = self.constant + terms.get("log_density", 0.0)
            return outs, records
        if primitive is scope_p and eqn.params["name"] is not None:
            name = eqn.params["name"]
            outs, records = self.walk(eqn.params["jaxpr"], ins, context.enter(name), live)
            return outs, {name: records} if records else {}
        if primitive is lanes_p:
            return self.lanes(eqn, ins, context, live)
        if primitive is scan_p:
            from .chains import chain

            return chain(self, eqn, ins, context, live)
        if primitive is cond_p:
            return self.branches(eqn, ins, context, live)
        if primitive.name in CALLS or primitive is marginal_p:
            # What is summed out further inside is summed out together: sums commute.
            inner = self if primitive is not marginal_p else self._also(eqn, context)
            return inner.walk(inner_jaxprs(eqn)[0], ins, context, live)
        what = "a while_loop" if primitive is while_p else f"{primitive.name!r}"
        names = ", ".join(repr(n) for j in inner_jaxprs(eqn) for n in site_names(j))
        raise ModelError(
            f"the sites {names} in {what} depend on choices that are summed out, or are themselves to be summed out "
            "there: that is possible in vmap, scan, cond, switch, jit and nested programs"
        )

    def _holds(self, eqn: Any, context: Context) -> bool:
        prefix = context.prefix
        if eqn.primitive is scope_p and eqn.params["name"] is not None:
            prefix = (*prefix, eqn.params["name"])
        return any(self.plan.holds(j, prefix) for j in inner_jaxprs(eqn))

    def _also(self, eqn: Any, context: Context) -> Level:
        more = {(*context.prefix, *a) for a in eqn.params["addresses"]}
        self.plan = dataclasses.replace(self.plan, targets=self.plan.targets | more)
        return self

    # --- sites ---

    def site(
        self, eqn: Any, ins: list[Any], context: Context, address: Path
    ) -> tuple[list[Any], Records]:
        """A choice that stays, a factor or a record, whose parameters may be tables."""
        name, kind = address[-1], eqn.params["spec"].kind
        if kind == "deterministic" and any(map(is_lifted, ins)):
            return [self._payload(eqn, ins, context, "value")], {}  # recover() knows it
        scale, ins = self._unscaled(eqn, ins)
        self._certify(eqn, ins, context, address)
        value, record, terms = self._handle(eqn, ins, context, context.given.get(name))
        if kind == "sample" and is_lifted(value):
            raise ModelError(_unknown_value(address, value.axes))
        if "log_density" in terms:
            self.weigh(terms["log_density"], address, scale)
        if record is not None and is_lifted(record["value"]):
            if getattr(context.handler, "record", None) != "log_density":
                raise ModelError(_unknown_value(address, record["value"].axes))
            density = record["value"]
            self.shared[address] = labels_of(density)
            record = {"value": jnp.zeros(density.shape, density.dtype)}
        if record is not None and any(map(is_lifted, record.values())):
            record = (
                {k: v for k, v in record.items() if not is_lifted(v)} if "value" in record else None
            )
            record = None if record is None or "value" not in record else record
        return [value], {} if record is None else {name: record}

    def _handle(self, eqn: Any, ins: list[Any], context: Context, given: Any) -> Any:
        address = (*context.prefix, eqn.params["spec"].name)

        def call(operands: Any, given: Any) -> Any:
            site = Site(eqn.params, operands, address, context.axes)
            return context.handler.site(site, None, given)

        return apply(call, self.plan.limit, ins, given)

    def _payload(self, eqn: Any, ins: list[Any], context: Context, part: str) -> Any:
        def call(operands: Any) -> Any:
            return Site(eqn.params, operands, context.prefix, context.axes).part(part)

        return apply(call, self.plan.limit, ins)

    def _unscaled(self, eqn: Any, ins: list[Any]) -> tuple[Any, list[Any]]:
        """The scale of a site, and its operands with a scale of one: sums come before scaling."""
        skeleton = eqn.params["skeleton"]
        place = skeleton.unpack(range(skeleton.num_arrays)).get("scale")
        if place is None:
            return None, ins
        scale = ins[place]
        return scale, [jnp.ones_like(x) if i == place else x for i, x in enumerate(ins)]

    def weigh(self, term: Any, address: Path, scale: Any = None) -> None:
        """Count a density term."""
        if is_lifted(term):
            if jnp.ndim(scale) if scale is not None else False:
                raise ModelError(
                    f"site {'.'.join(address)!r} depends on {_addresses(term.axes)} and has a scale for each of its "
                    "elements: a sum over choices can be scaled as a whole only"
                )
            self.factors.append(factor_of(term, ".".join(address), scale))
        else:
            self.constant = self.constant + jnp.sum(term if scale is None else term * scale)

    def variable(self, eqn: Any, ins: list[Any], context: Context, address: Path) -> Any:
        """A choice that is summed out: the table of its values, and its own density as a factor."""
        if not eqn.params["spec"].discrete:
            return self.continuous(eqn, ins, context, address)
        spec, name = eqn.params["spec"], ".".join(address)
        listed = None if spec.values is None else np.asarray(spec.values.value)
        site = Site(eqn.params, ins, address, context.axes)
        if "value" in site.parts and "observed" not in site.parts:
            raise ModelError(
                f"the choice {name!r} is given already, so there is nothing to sum out"
            )
        if listed is None or spec.event_shape:
            raise ModelError(
                f"the choice {name!r} ({spec.label}) cannot be summed out: its values are not finitely many single "
                "numbers that are known when the model is staged (Bernoulli, Categorical, DiscreteUniform, Binomial "
                "with a plain total)"
            )
        shape = lane_shape(eqn.params["lanes"]) + spec.shape
        copies = math.prod(shape)
        joint = self.plan.options.joint and copies > 1
        index = np.zeros((1, copies), int)
        if joint:
            terms = len(listed) ** copies
            if terms > self.plan.options.max_terms:
                raise Entangled(
                    f"joint=True sums over {len(listed)}^{copies} = {terms:,} joint values of {name!r}, more than "
                    f"max_terms={self.plan.options.max_terms:,}"
                )
            index = np.indices((len(listed),) * copies).reshape(copies, terms).T
            values, axes = listed[index].reshape(terms, *shape), ()
        else:
            values = np.broadcast_to(listed.reshape(-1, *(1,) * len(shape)), (len(listed), *shape))
            axes = tuple(i for i, size in enumerate(shape) if size > 1)
        found = self.known.get(address)
        if found is None or found.num_values != len(values):
            plates = tuple(Plate(shape[i], f"axis {i} of {name!r}") for i in axes)
            found = self.known[address] = Variable(name, len(values), plates)
            self.created.append(found)
        self.keys[found] = context.keys.get(address[-1])
        value = Lifted(np.asarray(values, spec.dtype), {found: axes})
        self._explain(spec, found, joint=copies if joint else 1)
        self._prior(eqn, ins, context, value, address)
        weights = context.given.get(address[-1])
        if isinstance(weights, Weights):
            extra = jnp.moveaxis(weights.log_weights, -1, 0)
            if joint:
                extra = jnp.sum(extra.reshape(-1, copies)[index, np.arange(copies)], -1)
                extra = extra.reshape(-1, *(1,) * len(shape)) * (np.arange(copies) == 0).reshape(
                    shape
                )
            self.weigh(Lifted(extra, {found: axes}), address)
        return value

    def _prior(
        self, eqn: Any, ins: list[Any], context: Context, value: Lifted, address: Path
    ) -> None:
        scale, ins = self._unscaled(eqn, ins)
        self._certify(eqn, ins, context, address, value)
        drawn = isinstance(context.handler, Score) and context.handler.drawn

        def log_prob(operands: Any, value: Any) -> Any:
            site = Site(eqn.params, operands, address, context.axes)
            # Also where a mask is False: idle copies sum to one.
            own = site.guarded().log_prob(value)
            if "observed" in site.parts:
                fixed = site.part("value") == value
                known = jnp.where(fixed, 0.0 if drawn else own, IMPOSSIBLE)
                own = jnp.where(site.part("observed"), known, own)
            return own

        own = apply(log_prob, self.plan.limit, ins, value)
        if is_lifted(own) and eqn.params["spec"].discrete:
            # Sums of the least float, which some distributions give to what is impossible, would overflow.
            own = own.like(jnp.maximum(own.array, IMPOSSIBLE))
        self.weigh(own, address, scale)
        if (
            not value.axes.keys() <= axes_of(own).keys()
        ):  # a uniform one says nothing, yet is summed
            nothing = jnp.zeros(value.array.shape, jnp.result_type(float))
            self.weigh(Lifted(nothing, value.axes), address, scale)

    def _explain(self, spec: Any, variable: Variable, joint: int) -> None:
        plan, sizes = self.plan, tuple(p.size for p in variable.plates)
        plan.rules[variable.address] = Rule(
            spec.label,
            variable.num_values,
            (*plan.limit.lanes, *sizes),
            variable.family,
            joint,
        )

    # --- continuous choices ---

    def continuous(self, eqn: Any, ins: list[Any], context: Context, address: Path) -> Any:
        """A choice that is integrated out: the table of its points, and its own density as a factor."""
        spec, name = eqn.params["spec"], ".".join(address)
        site = Site(eqn.params, ins, address, context.axes)
        d = site.skeleton.unpack(range(site.skeleton.num_arrays))["d"]
        family = family_of(d, spec.event_shape)
        if family is None:
            raise DensityError(
                f"the choice {name!r} ({spec.label}) cannot be integrated out: priors of which a closed form is known "
                "are Normal, MultivariateNormal, Beta, Gamma, Exponential, InverseGamma, Dirichlet, Wishart and "
                "InverseWishart"
            )
        if "value" in site.parts:
            raise ModelError(
                f"the choice {name!r} is given, in part at least; it cannot be integrated out"
            )
        shape = site.shape
        copies, joint = shape[: len(shape) - len(family.event)], 1
        if name in self.plan.together or (self.plan.options.joint and math.prod(copies) > 1):
            if not family.quadratic:
                raise Entangled(
                    f"copies of {name!r} ({spec.label}) meet; only normal choices can be integrated jointly"
                )
            joint, family, copies = math.prod(copies), Gaussian(math.prod(shape)), ()
        axes = tuple(i for i, size in enumerate(copies) if size > 1)
        found = self.known.get(address)
        if found is None or found.family != family:
            plates = tuple(Plate(shape[i], f"axis {i} of {name!r}") for i in axes)
            found = self.known[address] = Variable(name, family.num_points, plates, family)
            self.created.append(found)
        self.plan.limit.check([found], f"the choice {name!r}")
        self.keys[found] = context.keys.get(address[-1])
        self.places[found] = place = self._place(eqn, ins, context, shape, family)
        points = place.points(family).reshape(-1, *shape).astype(spec.dtype)
        value = Lifted(points, {found: axes}, {found: (1.0, True)})
        self._explain(spec, found, joint)
        self._prior(eqn, ins, context, value, address)
        weights = context.given.get(address[-1])
        if isinstance(weights, Weights):
            extra = weights.log_weights * family.statistic(points)
            own = extra.reshape(len(points), *copies, -1) if family.event else extra
            own = jnp.sum(own, -1) if family.event else own
            self.weigh(Lifted(own, {found: axes}), (PROBE,))
        return value

    def _place(
        self, eqn: Any, ins: list[Any], context: Context, shape: tuple[int, ...], family: Family
    ) -> Place:
        """Points about the prior's mean, taken where the choices that it depends on are likely."""

        def moments(operands: Any) -> Any:
            site = Site(eqn.params, operands, context.prefix, context.axes)
            return site.over_lanes(lambda p: family.moments(p["d"]))

        mean, variance = apply(moments, self.plan.limit, ins)
        centre, scale = family.placement(self._likely(mean, shape), self._likely(variance, shape))
        copies = (
            shape[: len(shape) - len(family.event)]
            if math.prod(shape) != math.prod(family.event)
            else ()
        )
        form = (*(n for n in copies if n > 1), *family.event)
        centre, scale = (jax.lax.stop_gradient(x.reshape(form)) for x in (centre, scale))
        start = jnp.asarray(family.start, centre.dtype)
        return Place(centre, scale, jnp.broadcast_to(start, centre.shape))

    def _likely(self, x: Any, shape: tuple[int, ...]) -> jax.Array:
        """A table at likely values of its choices."""
        array = x.array if is_lifted(x) else jnp.asarray(x)
        left = list(axes_of(x).items())
        while left:
            (variable, places), *left = left
            if variable.family is None or variable not in self.places:
                array = array[0]
                continue
            weights = jnp.moveaxis(variable.family.weights(self.places[variable].mean), -1, 0)
            sizes = [1] * (array.ndim - 1 - len(left))
            for place, plate in zip(places, variable.plates, strict=True):
                sizes[place] = plate.size
            order = sorted(range(len(places)), key=lambda i: places[i])
            weights = jnp.transpose(weights, [0, *(i + 1 for i in order)])
            weights = weights.reshape(len(weights), *(1,) * len(left), *sizes)
            array = jnp.sum(array * weights, 0)
        array = array.astype(jnp.result_type(float))
        return jnp.broadcast_to(array, shape)

    def _certify(
        self, eqn: Any, ins: list[Any], context: Context, address: Path, value: Any = None
    ) -> None:
        """Make sure that a density is of a form that the continuous choices it reads can be integrated over.

        Raises:
            ModelError: if it is not, with what is possible.
        """
        leaves = [*ins, value] if value is not None else ins
        continuous = [v for v in variables_of(leaves) if v.family is not None]
        if not continuous or eqn.params["spec"].kind == "deterministic":
            return
        site, name = Site(eqn.params, ins, address, context.axes), ".".join(address)
        parts = site.skeleton.unpack(range(site.skeleton.num_arrays))
        for part in ("where", "observed", "value"):
            if part in parts and set(continuous) & axes_of(ins[parts[part]]).keys():
                raise ModelError(f"site {name!r}: its {part} depends on {_addresses(continuous)}")
        normal = {v for v in continuous if v.family.quadratic}
        read = [i for i, x in enumerate(leaves) if normal & axes_of(x).keys()]
        if read:
            curved = [i for i in read if not is_affine(leaves[i])]
            if curved or not self._quadratic(eqn, leaves, read, context, value is not None):
                raise ModelError(
                    f"site {name!r} ({site.spec.label}) is not quadratic in {_addresses(normal)}, so that cannot be "
                    "integrated out: a parameter has to be an affine function of it, with a density that is normal "
                    "in that parameter"
                )
        for v in continuous:
            if v.family.matrix:
                self._certify_matrix(v, eqn, leaves, base_of(parts.get("d")), site)
            elif not v.family.quadratic:
                self._certify_conjugate(v, leaves, base_of(parts.get("d")), site)

    def _quadratic(
        self, eqn: Any, leaves: list[Any], read: list[int], context: Context, own: bool
    ) -> bool:
        spec = eqn.params["spec"]

        def log_density(*leaves: Any) -> Any:
            operands = list(leaves[:-1]) if own else list(leaves)
            site = Site(eqn.params, operands, context.prefix, context.axes)
            if spec.kind == "factor":
                return site.part("weight")
            return site.log_prob(leaves[-1] if own else jnp.ones(site.shape, spec.dtype))

        avals = [
            jax.ShapeDtypeStruct(x.shape if is_lifted(x) else jnp.shape(x), x.dtype) for x in leaves
        ]
        return is_polynomial(log_density, avals, read, 2)

    def _certify_conjugate(self, v: Variable, leaves: list[Any], d: Any, site: Site) -> None:
        read = [i for i, x in enumerate(leaves) if v in axes_of(x)]
        if read == [len(site.operands)]:  # its own prior
            return
        known = CONJUGATE[type(v.family)]
        for (label, parameter), (power, itself) in known.items():
            if type(d).__name__ == label and read == [getattr(d, parameter, None)]:
                form = leaves[read[0]].forms.get(v)
                if form is not None and form[0] == power and (form[1] or not itself):
                    return
        raise _not_conjugate(v, d, site, [f"{label}({parameter})" for label, parameter in known])

    def _certify_matrix(self, v: Variable, eqn: Any, leaves: list[Any], d: Any, site: Site) -> None:
        """A multivariate normal with a multiple of the matrix as covariance, or precision: by its Cholesky factor."""
        read = [i for i, x in enumerate(leaves) if v in axes_of(x)]
        if read == [len(site.operands)]:  # its own prior
            return
        known = FACTORS[type(v.family)]
        if isinstance(d, dist.MultivariateNormal) and read == [d.scale_tril]:
            eqns, env = self.so_far
            multiples = [u for u, x in env.items() if v in axes_of(x) and v in x.forms]
            leaf = eqn.invars[read[0]]
            if any(computes(f, eqns, leaf, u) for f in known.values() for u in multiples):
                return
        raise _not_conjugate(v, d, site, [f"MultivariateNormal({p})" for p in known])

    # --- control flow ---

    def lanes(
        self, eqn: Any, ins: list[Any], context: Context, live: frozenset[Variable]
    ) -> tuple[list[Any], Records]:
        """Equations under vmap, the outermost axis first."""
        body, lanes = eqn.params["jaxpr"], eqn.params["lanes"]
        keys, given = context.only(context.names(body))
        inside = context.inside(None, None, context.anonymous, tuple(lane.name for lane in lanes))
        return self._lane(list(lanes), body, ins, keys, given, inside, live)

    def _lane(
        self,
        lanes: list[Lane],
        body: Any,
        ins: list[Any],
        keys: Any,
        given: Any,
        context: Context,
        live: Any,
    ) -> tuple[list[Any], Records]:
        if not lanes:
            inside = dataclasses.replace(context, keys=keys, given=given)
            return self.walk(body, ins, inside, live)
        lane = lanes[-1]
        plate = Plate(lane.size, f"the axis {lane.name or 'of a vmap'!r}")
        slices = _Slices(plate, lane.size)
        inputs = [slices.enter(x, m) for x, m in zip(ins, lane.mapped, strict=True)]
        dying = (
            {v for x in ins for v in axes_of(x) if v in slices.inside and v not in live}
            if any(e.primitive is scan_p for e in open_jaxpr(body)[0].eqns)
            else set()
        )
        taken = [f for f in self.factors if dying & set(f.variables)]
        self.factors = [f for f in self.factors if f not in taken]
        pending = [slices.enter_factor(f) for f in taken]
        if any(v in slices.inside for _, x, _ in inputs for v in axes_of(x)):
            raise Entangled(
                f"lanes of {plate.name} read both their own copy of {_addresses(slices.inside)} and all of them"
            )
        seen: dict[str, Any] = {}

        sliced = [part for whole, part in slices.inside.items() if whole in self.places]
        whole_places = [self.places[slices.whole[part][0]] for part in sliced]
        place_axes = [slices.whole[part][1] for part in sliced]

        def one(arrays: Any, tables: Any, places: Any, keys: Any, given: Any, index: Any) -> Any:
            level = Level(self.plan)
            level.factors = [
                dataclasses.replace(f, table=t) for (f, _), t in zip(pending, tables, strict=True)
            ]
            for whole, part in slices.inside.items():
                key = self.keys.get(whole)
                level.keys[part] = None if key is None else jax.random.fold_in(key, index)
            level.places = {**self.places, **dict(zip(sliced, places, strict=True))}
            values = []
            for new, (old, lifted, at) in zip(arrays, inputs, strict=True):
                array = old if at is None else new
                values.append(array if lifted is None else lifted.like(array))
            alive = frozenset(slices.inside.get(v, v) for v in live)
            outs, records = level._lane(lanes[:-1], body, values, keys, given, context, alive)
            _only_here(level, "a vmap")
            here = {*level.created, *(slices.inside[v] for v in dying)}
            level.finish(here - set(variables_of(outs)))
            left = {*variables_of(outs), *(v for f in level.factors for v in f.variables)}
            created = [v for v in level.created if v in left]
            seen.update(outs=outs, factors=level.factors, created=created)
            escaped = {v: level.keys.get(v) for v in created}
            seen["escaped"] = [v for v, k in escaped.items() if k is not None]
            return (
                [None if isinstance(o, Lost) else o.array if is_lifted(o) else o for o in outs],
                records,
                [f.table for f in level.factors],
                level.constant,
                [escaped[v] for v in seen["escaped"]],
                [level.places[v] for v in created if v in level.places],
            )

        arrays = [a for a, _, _ in inputs]
        with self.plan.limit.repeated(lane.size, (lane.size,)):
            outs, records, tables, constant, found, places = jax.vmap(
                one,
                ([i for _, _, i in inputs], [i for _, i in pending], place_axes, 0, 0, 0),
                axis_size=lane.size,
                axis_name=lane.name,
            )(arrays, [f.table for f in taken], whole_places, keys, given, jnp.arange(lane.size))
        placed = [v for v in seen["created"] if v.family is not None]
        for v, place in zip(placed, places, strict=True):
            one_copy = jax.tree.map(lambda x: x[0], place)
            self.places[slices.leave(v)] = one_copy if lane.size == 1 else place
        self.constant = self.constant + jnp.sum(constant)
        for v, k in zip(seen["escaped"], found, strict=True):
            self.keys[slices.leave(v)] = k[0]
        self.created += [slices.leave(v) for v in seen["created"]]
        for f, table in zip(seen["factors"], tables, strict=True):
            self.factors.append(slices.leave_factor(f, table))
        return [
            old if isinstance(old, Lost) else slices.leave_value(old, new)
            for old, new in zip(seen["outs"], outs, strict=True)
        ], records

    def branches(
        self, eqn: Any, ins: list[Any], context: Context, live: frozenset[Variable]
    ) -> tuple[list[Any], Records]:
        """A cond: every branch as it is, each counted where it is taken."""
        index, *operands = ins
        index = apply(
            lambda i: jnp.clip(i, 0, len(eqn.params["branches"]) - 1), self.plan.limit, index
        )
        operands = [
            x.like(finite_cotangents(x.array)) if is_lifted(x) else finite_cotangents(x)
            for x in operands
        ]
        found: list[tuple[list[Any], Records, Level]] = []
        known: dict[Path, Variable] = {}
        anonymous = context.anonymous
        for branch in eqn.params["branches"]:
            level = Level(self.plan, known)
            level.keys, level.places = self.keys, self.places
            inside = dataclasses.replace(context, anonymous=anonymous)
            outs, records = level.walk(branch, operands, inside, live)
            _only_here(level, "a branch")
            anonymous += count_anonymous(branch)
            found.append((outs, records, level))
        self._check_idle(eqn, context)
        created = [v for _, _, level in found for v in level.created]
        for number, (_, _, level) in enumerate(found):
            here = lambda i, n=number: i == n  # noqa: E731
            for factor in level.factors:
                self._where(index, here, factor)
            constant = apply(
                lambda i, c, h=here: jnp.where(h(i), c, 0),
                self.plan.limit,
                index,
                jnp.asarray(level.constant),
            )
            self.weigh(constant, (*context.prefix, "a branch"))
            mine = {v for f in level.factors for v in f.variables}
            for variable in created:  # idle in this branch: at its first value
                if variable not in mine:
                    rest = jnp.where(jnp.arange(variable.num_values) == 0, 0.0, IMPOSSIBLE)
                    rest = rest.reshape(-1, *(1,) * len(variable.plates))
                    rest = jnp.broadcast_to(
                        rest, (variable.num_values, *(p.size for p in variable.plates))
                    )
                    self._where(index, here, Factor(rest, (variable,), variable.plates))
        self.created += created
        outs = [
            self._select(index, values)
            for values in zip(*(outs for outs, _, _ in found), strict=True)
        ]
        return outs, self._records(index, [records for _, records, _ in found], context)

    def _check_idle(self, eqn: Any, context: Context) -> None:
        """Refuse latent choices that only some branches have: where they are idle they would have no density."""
        if not context.handler.every_branch:
            return
        names = [_paths(walk_names(b)) for b in eqn.params["branches"]]
        for path in {p for found in names for p in found}:
            address = ".".join((*context.prefix, *path))
            latent = isinstance(look_up(context.given, path), Free)
            latent = latent or address in getattr(context.handler, "latents", ())
            if latent and not all(path in found for found in names):
                raise ModelError(
                    f"{address!r} is a choice in some branches only of a cond that is "
                    "summed over: let it stand in every branch, or before the cond"
                )

    def _where(self, index: Any, here: Callable[[Any], Any], factor: Factor) -> None:
        """Count a factor where a branch is taken."""
        term = factor.lifted() if factor.variables else factor.table

        def chosen(i: Any, t: Any) -> Any:
            return jnp.where(here(i), t, 0)

        counted = apply(chosen, self.plan.limit, index, term)
        self.weigh(counted, ("a branch",), factor.scale)

    def _select(self, index: Any, values: tuple[Any, ...]) -> Any:
        lost = next((v for v in values if isinstance(v, Lost)), None)
        if lost is not None:
            return lost
        if all(v is values[0] for v in values):
            return values[0]

        def choose(i: Any, *xs: Any) -> Any:
            return jax.lax.select_n(jnp.broadcast_to(i, jnp.shape(xs[0])).astype(jnp.int32), *xs)

        return apply(choose, self.plan.limit, index, *values)

    def _records(self, index: Any, records: list[Records], context: Context) -> Records:
        """One set of records of all branches, with flags for those that were taken."""
        merged: Records = {}
        names = list(dict.fromkeys(n for r in records for n in r))
        for name in names:
            nodes = [r.get(name) for r in records]
            first = next(n for n in nodes if n is not None)
            if "value" not in first or isinstance(first["value"], dict):
                merged[name] = self._records(index, [n or {} for n in nodes], context)
                continue
            taken = jnp.asarray([n is not None for n in nodes])
            fill = {k: jnp.zeros_like(v) for k, v in first.items()}
            full = [fill if n is None else n for n in nodes]
            value = self._select(index, tuple(n["value"] for n in full))
            if all(n is not None for n in nodes):
                active: Any = True
            else:
                active = apply(lambda i, t: t[i], self.plan.limit, index, taken)
            if is_lifted(value) or is_lifted(active):
                raise ModelError(
                    f"whether {name!r} is a choice at all depends on {_addresses(variables_of([value, active]))}: a "
                    "choice in a branch that is summed over must stand in every branch, or be observed"
                )
            merged[name] = {"value": value, "active": active}
        return merged

    # --- the end ---

    def finish(
        self,
        variables: Iterable[Variable] | None = None,
        may_stay: frozenset[Variable] = frozenset(),
    ) -> None:
        """Sum out variables (all, if None); of those that ``may_stay``, what others have to go before does."""
        gone = (
            {v for f in self.factors for v in f.variables} if variables is None else set(variables)
        )
        scales = {v: place.log_scale(v.family) for v, place in self.places.items()}
        self.factors = sum_out(
            self.factors, gone, self.plan.reduce, self.plan.limit, self.keys, scales, may_stay
        )

    def distribute(self, records: Records) -> Records:
        """The densities of sites that share a choice, at the last of them; all choices are summed out."""
        for factor in self.factors:
            sites = [p for p in self.shared if ".".join(p) in factor.sites]
            if not sites:
                continue
            labels = [None if p is None else p.root() for p in self.shared[sites[-1]]]
            own = [p.root() for p in factor.plates]
            order = [own.index(p) for p in labels if p in own]
            table = jnp.transpose(factor.table, order)
            table = table if factor.scale is None else table * factor.scale
            at = tuple(slice(None) if p in own else 0 for p in labels)
            records = _added(records, sites[-1], at, table)
        return records

    def log_density(self) -> jax.Array:
        """The log density, when everything is summed out."""
        self.finish()
        return self.constant + sum((f.total() for f in self.factors), 0.0)


class _Slices:
    """Values and variables on their way into one lane of a vmap, and back."""

    def __init__(self, plate: Plate, size: int) -> None:
        self.plate = plate
        self.inside: dict[Variable, Variable] = {}
        self.whole: dict[Variable, tuple[Variable, int]] = {}
        self.promoted: dict[Variable, Variable] = {}

    def slice(self, variable: Variable, i: int) -> Variable:
        """One copy of a variable along its plate ``i``."""
        part = self.inside.get(variable)
        if part is None:
            plates = tuple(p for j, p in enumerate(variable.plates) if j != i)
            part = dataclasses.replace(variable, plates=plates)
            self.inside[variable], self.whole[part] = part, (variable, i)
            variable.plates[i].merge(self.plate)
        elif self.whole[part][1] != i:
            raise Entangled(
                f"two axes of copies of {variable.address!r} are mapped together: every copy meets every other"
            )
        return part

    def enter(self, x: Any, mapped: bool) -> tuple[Any, Lifted | None, int | None]:
        """``(array, how it is lifted inside, axis to map)`` of an input."""
        if not is_lifted(x):
            return x, None, 0 if mapped else None
        axes: Axes = {}
        forms: Forms = {}
        for v, places in x.axes.items():
            inside, rest = v, tuple(p - mapped for p in places)
            if mapped and 0 in places:
                i = places.index(0)
                inside = self.slice(v, i)
                rest = tuple(p - 1 for j, p in enumerate(places) if j != i)
            axes[inside] = rest
            if v in x.forms:
                forms[inside] = x.forms[v]
        return x.array, Lifted(x.array, axes, forms), len(x.axes) if mapped else None

    def enter_factor(self, factor: Factor) -> tuple[Factor, int]:
        """A factor over copies along the lane, and the axis of its table to map."""
        root = self.plate.root()
        variables = []
        for v in factor.variables:
            i = next((i for i, p in enumerate(v.plates) if p.root() is root), None)
            variables.append(v if i is None else self.slice(v, i))
        at = [p.root() for p in factor.plates].index(root)
        plates = tuple(p for j, p in enumerate(factor.plates) if j != at)
        return dataclasses.replace(factor, variables=tuple(variables), plates=plates), len(
            variables
        ) + at

    def leave(self, variable: Variable) -> Variable:
        """What a variable of one lane is to the lanes together."""
        if variable in self.whole:
            return self.whole[variable][0]
        if self.plate.size == 1:  # one copy is no plate
            return variable
        if variable not in self.promoted:
            plates = (self.plate, *variable.plates)
            self.promoted[variable] = dataclasses.replace(variable, plates=plates)
        return self.promoted[variable]

    def leave_value(self, old: Any, new: Any) -> Any:
        if not is_lifted(old):
            return new
        axes: Axes = {}
        forms: Forms = {}
        for v, places in old.axes.items():
            outside, shifted = v, [p + 1 for p in places]
            if v in self.whole:
                outside, i = self.whole[v]
                shifted.insert(i, 0)
            elif v in self.promoted:
                outside = self.promoted[v]
                shifted.insert(0, 0)
            axes[outside] = tuple(shifted)
            if v in old.forms:
                forms[outside] = old.forms[v]
        return Lifted(jnp.moveaxis(new, 0, len(old.axes)), axes, forms)

    def leave_factor(self, factor: Factor, table: Any) -> Factor:
        mine = [v for v in factor.variables if v in self.whole or v in self.promoted]
        variables = tuple(self.leave(v) if v in mine else v for v in factor.variables)
        if self.plate.size == 1 or (factor.variables and not mine):
            return dataclasses.replace(factor, table=jnp.sum(table, 0))
        table = jnp.moveaxis(table, 0, len(variables))
        return dataclasses.replace(
            factor, table=table, variables=variables, plates=(self.plate, *factor.plates)
        )


def _added(records: Records, path: Path, at: Any, table: Any) -> Records:
    name, *rest = path
    if rest:
        return {**records, name: _added(records[name], tuple(rest), at, table)}
    value = records[name]["value"].at[at].add(table)
    return {**records, name: {**records[name], "value": value}}


def _is_record_site(eqn: Any) -> bool:
    return eqn.primitive is site_p and eqn.params["spec"].kind == "deterministic"


def _unknown_value(address: Path, axes: Axes) -> str:
    return (
        f"the value of {'.'.join(address)!r} is not known without {_addresses(axes)}: its support, or whether it is "
        "drawn at all, depends on that. Give it a support that does not, or keep the choice"
    )


def _only_here(level: Level, where: str) -> None:
    """Refuse densities by site where they are not known by themselves."""
    if level.shared:
        names = ", ".join(repr(".".join(p)) for p in level.shared)
        raise DensityError(
            f"the log densities of {names} are not known site by site: in {where} they share choices that are summed "
            "out; log_density has their total"
        )


def _cast(x: Any, aval: Any) -> Any:
    dtype = getattr(aval, "dtype", None)
    if isinstance(x, Lost) or dtype is None or x.dtype == dtype:
        return x
    if is_lifted(x):
        return x.like(jax.lax.convert_element_type(x.array, dtype))
    return jax.lax.convert_element_type(x, dtype)


def _paths(names: Mapping[str, Any], prefix: Path = ()) -> list[Path]:
    """The paths of sites in a nested listing of names."""
    return [
        path
        for name, node in names.items()
        for path in ([(*prefix, name)] if is_record(node) else _paths(node, (*prefix, name)))
    ]


def _not_conjugate(v: Variable, d: Any, site: Site, ways: list[str]) -> ModelError:
    return ModelError(
        f"site {'.'.join(site.address)!r} ({type(d).__name__}) is not conjugate to {v.address!r} "
        f"({type(v.family).__name__}) as it reads it: possible are {', '.join(ways)}, where nothing else there depends "
        "on it"
    )


def _addresses(variables: Iterable[Variable]) -> str:
    return " and ".join(repr(a) for a in dict.fromkeys(v.address for v in variables))


# --- the interpreter's rule -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Filled:
    """A choice of which the value is known, and what of it was given."""

    value: Any
    given: Any


jax.tree_util.register_dataclass(_Filled, ["value", "given"], [])


@dataclasses.dataclass(frozen=True)
class Score(Handler):
    """The density of choices that are all known; with ``drawn``, of what was not given of them."""

    drawn: bool = False
    records = False

    def terms(self) -> dict[str, jax.Array]:
        return {"log_density": jnp.zeros(())}

    def site(self, site: Site, key: Any, given: Any) -> Any:
        original = given.given if isinstance(given, _Filled) else given
        if isinstance(given, _Filled):
            given = (
                original
                if original is not None and original.drop is not None
                else Given(given.value, checked=True)
            )
        value, _, terms = Evaluate(None).site(site, None, given)
        if site.spec.kind == "deterministic":
            return value, {"value": value}, {}
        if not self.drawn:
            return value, None, {k: v for k, v in terms.items() if k == "log_density"}
        if site.spec.kind != "sample":
            return value, None, {}
        original = conditioned(site, original)
        if original is None:
            return value, None, {"log_density": terms["log_density"]}
        if original.where is None or original.drop is not None:
            return value, None, {}
        return value, None, {"log_density": jnp.where(original.where, 0, terms["log_density"])}


def score(
    eqn: Any,
    ins: list[Any],
    context: Context,
    reduce: Reduce = log_sum,
    filtering: bool = False,
    plans: list[Plan] | None = None,
) -> tuple[list[Any], Records, jax.Array]:
    """Outputs, records and log density of a program with choices summed out."""
    options: Options = eqn.params["options"]
    targets = frozenset((*context.prefix, *a) for a in eqn.params["addresses"])
    together: frozenset[str] = frozenset()
    while True:
        limit = Limit(options.max_terms)
        plan = Plan(targets, options, limit, reduce, filtering, together)
        level = Level(plan)
        try:
            outs, records = level.walk(eqn.params["jaxpr"], ins, context)
            density = level.log_density()
            prefix = len(context.prefix)
            level.shared = {p[prefix:]: labels for p, labels in level.shared.items()}
            records = level.distribute(records) if level.shared else records
            break
        except Entangled as e:  # copies that meet: normal ones can be integrated jointly
            if not e.addresses or e.addresses <= together:
                raise
            together |= e.addresses
    if plans is not None:
        plans.append(plan)
    for out in outs:
        if isinstance(out, Lost):
            raise ModelError(out.why)
        if is_lifted(out):
            raise ReturnsChoice(
                f"the return value depends on {_addresses(out.axes)}, which is summed out and has no value: return "
                "something else, and get it back with recover"
            )
    return outs, records, jnp.where(density < IMPOSSIBLE / 2, -jnp.inf, density)


@dataclasses.dataclass(frozen=True)
class Posterior(Handler):
    """The density of choices that are all given, by another sum over the rest: its gradient recovers those."""

    reduce: Reduce = log_sum
    filtering: bool = False
    plans: list[Plan] = dataclasses.field(default_factory=list, compare=False)
    records = False

    def terms(self) -> dict[str, jax.Array]:
        return {"log_density": jnp.zeros(())}

    def site(self, site: Site, key: Any, given: Any) -> Any:
        value, _, terms = Evaluate(None).site(site, None, given)
        return value, None, {k: v for k, v in terms.items() if k == "log_density"}


@dataclasses.dataclass(frozen=True)
class Whole(Evaluate):
    """An evaluation in which the choices that were summed out are choices as all others."""


def _rule(eqn: Any, ins: list[Any], context: Context) -> tuple[list[Any], Records, dict[str, Any]]:
    handler = context.handler
    addresses = eqn.params["addresses"]
    if isinstance(handler, Whole):
        return walk(eqn.params["jaxpr"], ins, context)
    if isinstance(handler, Posterior):
        outs, records, density = score(
            eqn, ins, context, handler.reduce, handler.filtering, handler.plans
        )
        return outs, records, {"log_density": density}
    if isinstance(handler, Rewrite):
        run = lambda *xs: walk(eqn.params["jaxpr"], list(xs), context)[0]  # noqa: E731
        return bind_marginal(run, ins, addresses, eqn.params["options"]), {}, {}
    inner = site_table(eqn.params["jaxpr"])
    kept = [
        tuple(a.split("."))
        for a, s in inner.items()
        if s.kind == "sample" and not s.observed and tuple(a.split(".")) not in addresses
    ]
    given = [look_up(context.given, a) for a in kept]
    complete = all(isinstance(g, Given) and (g.where is None or g.drop is not None) for g in given)
    drawing = look_up(context.keys, addresses[0]) is not None
    if complete or not drawing:
        try:
            outs, records, density = score(eqn, ins, context)
            return outs, records, dict.fromkeys(handler.terms(), density)
        except ReturnsChoice:
            if not drawing:
                raise
    recording = (
        dataclasses.replace(handler, record="value") if isinstance(handler, Evaluate) else handler
    )
    outs, records, terms = walk(
        eqn.params["jaxpr"], ins, dataclasses.replace(context, handler=recording)
    )
    for address in addresses:
        records = _without(records, address)
    if not isinstance(handler, Evaluate):
        return outs, records, terms
    known = dataclasses.replace(context, given=_fill(records, context.given))
    _, derived, density = score(eqn, ins, dataclasses.replace(known, handler=Score()))
    rest = score(eqn, ins, dataclasses.replace(known, handler=Score(drawn=True)))[2]
    if any(
        g is not None for g in given
    ):  # what was drawn for the choices summed out does not know the data
        for address, info in inner.items():
            path = tuple(address.split("."))
            if info.kind == "deterministic" and look_up(derived, path) is None:
                records = _without(records, path)
    terms = {"log_density": density, "log_weight": density - rest}
    return outs, records if handler.records else {}, terms


RULES[marginal_p] = _rule


def _without(records: Records, address: Path) -> Records:
    name, *rest = address
    if name not in records:
        return records
    if not rest:
        return {n: r for n, r in records.items() if n != name}
    return {**records, name: _without(records[name], tuple(rest))}


def _fill(records: Records, given: dict[str, Any]) -> dict[str, Any]:
    filled: dict[str, Any] = {}
    for name, node in records.items():
        if "value" in node and not isinstance(node["value"], dict):
            filled[name] = _Filled(node["value"], given.get(name))
        else:
            filled[name] = _fill(node, given.get(name, {}))
    return filled


# --- the transform ----------------------------------------------------------------------------------------------------


def bind_marginal(
    f: Callable[..., list[Any]], args: list[Any], addresses: tuple[Path, ...], options: Options
) -> list[Any]:
    """Stage ``f`` as a program with choices summed out; what it closes over become operands."""
    jaxpr, consts = consts_first(jax.make_jaxpr(lambda *a: f(*a))(*args))
    operands = [*consts, *args]
    if not operands:
        operands = [jnp.zeros(())]
        jaxpr, _ = consts_first(jax.make_jaxpr(lambda _: f())(*operands))
    return list(marginal_p.bind(*operands, jaxpr=jaxpr, addresses=addresses, options=options))


class _Marginalized(Transformed):
    addresses: tuple[str, ...]
    options: Options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        code, operands = stage_call(self.inner, args, kwargs)
        chosen = _chosen(self.addresses, site_table(code.jaxpr), self.inner)
        outs = bind_marginal(
            lambda *xs: walk(code.jaxpr, list(xs), Context(Rewrite(), {}, {}))[0],
            operands,
            chosen,
            self.options,
        )
        return jax.tree.unflatten(code.out_tree, outs)


def _chosen(
    addresses: tuple[str, ...], table: Mapping[str, SiteInfo], model: Any
) -> tuple[Path, ...]:
    name = name_of(model)
    chosen: list[Path] = []
    for address in addresses:
        found = [a for a in table if covers(address, a)]
        if found != [address]:  # a wildcard or a scope: what can be summed out of it
            found = [a for a in found if table[a].values is not None and not table[a].observed]
        if not found:
            raise unknown_choice(address, table, name)
        for a in found:
            info = table[a]
            if info.kind != "sample":
                raise ModelError(
                    f"{a!r} is a {info.kind} site, no choice: there is nothing to sum out"
                )
            if info.observed:
                raise ModelError(
                    f"the choice {a!r} is given already, so there is nothing to sum out"
                )
            chosen.append(tuple(a.split(".")))
    return tuple(dict.fromkeys(chosen))


def unknown_choice(address: str, table: Mapping[str, SiteInfo], name: str) -> Exception:
    from weft.ppl.stage.errors import AddressError

    choices = [a for a, s in table.items() if s.kind == "sample"]
    return AddressError(unknown(address, choices, f" among the choices of {name!r}"))


def marginalize(
    model: F,
    *addresses: str | tuple[str, ...],
    joint: bool = False,
    parallel: bool = False,
    max_terms: int = 1_000_000,
) -> F:
    r"""The model without some of its discrete choices: $p(x) = \sum_z p(x, z)$, exactly.

    Choices may stand at the top, under ``vmap`` (each copy is summed by itself), in branches, in nested programs, and
    in a ``lax.scan`` as a Markov chain of any order (the forward recursion, Rabiner 1989). Several at once are
    eliminated in a greedy order (Obermeyer et al. 2019).

    Args:
        model: a model or a function with sites.
        *addresses: the choices to sum out; wildcards as elsewhere.
        joint: sum over all joint values of the copies of a choice, where copies meet; exponential in their number.
        parallel: chains by an associative scan over time, $O(\log T)$ deep, in place of the sequential recursion.
        max_terms: the largest table allowed, in joint values of the choices in it.

    Raises:
        ModelError: where a choice cannot be summed out exactly, naming the equation that stands in the way; when the
            model is scored, since only then values of the other choices are at hand.
        DensityError: for a continuous choice.
        AddressError: for an unknown one.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, marginalize, sample
        >>> @gen
        ... def mixture(y_scale):
        ...     mu = sample("mu", dist.Normal(jnp.array([-2.0, 2.0]), 1.0))
        ...     def one(_):
        ...         z = sample("z", dist.Bernoulli(0.3))
        ...         return sample("y", dist.Normal(mu[z], y_scale))
        ...     return jax.vmap(one)(jnp.zeros(3))
        >>> marginalize(mixture, "z")(1.0).latents
        ('mu', 'y')
    """
    if not addresses:
        raise TypeError("marginalize(model, address, ...) takes at least one address")
    if max_terms < 2:
        raise ValueError(f"max_terms must be at least 2, got {max_terms}")
    options = Options(bool(joint), bool(parallel), int(max_terms))
    names = tuple(dotted(a) for a in addresses)
    return transform(model, lambda f: _Marginalized(f, names, options))
