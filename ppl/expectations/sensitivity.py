"""Intervene on the keys of single choices of an estimator, for sensitivity analyses.

An expectation is a function of keys, one for each address. A ``Probe`` can be in force while an estimator is traced. It
lists the choices of the estimator. And it can replace the keys of one address, while all others stay as they were. A
sensitivity analysis (Sobol indices) needs nothing more, and neither does a search for jumps along the path of a
reparametrised draw.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from weft.ppl.programs.handlers import Evaluate
from weft.ppl.stage.control import estimated_p, scopes
from weft.ppl.stage.interpreter import Context, Handler
from weft.ppl.stage.jaxprs import equations
from weft.ppl.stage.keys import derive_keys, key_plan
from weft.ppl.stage.sites import Site, site_p

from .gradients import Reparam, Strategy, chosen, fitting, marked_draw

PATH = "weft path "
"""Prefix of the names that mark reparametrised draws in a jaxpr."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A choice of an expectation.

    Attributes:
        address: its dotted address. In ``draw(guide)`` it is the guide's own.
        distribution: the name of the distribution's class.
        strategy: its gradient strategy. None if its density is estimated, by choices with strategies of their own.
        default: whether the strategy is the default.
        fits: the names of the strategies that its distribution allows.
        size: the number of scalars, all copies included.
        num_values: the number of values of one element, if that is finite and known.
        in_loop: whether it stands in a scan or a loop. There no strategy has the rest of the program.
    """

    address: str
    distribution: str
    strategy: Strategy | None
    default: bool
    fits: tuple[str, ...]
    size: int
    num_values: int | None
    in_loop: bool


class Moved(NamedTuple):
    """The key of a draw on the line between the draws of ``key`` and ``other``, a part ``step`` of the way."""

    key: Any
    other: Any
    step: Any


class Probe:
    """An intervention on the keys of all expectations that are traced while it is in force.

    Without ``salt`` it only lists the choices. With ``salt``, the keys at the address ``addresses[which]`` are replaced
    by independent ones, another set for each salt. With ``step`` as well, the reparametrised draws there move a part of
    the way to the draws of the new keys. Then the estimators give plain values, without gradients.

    Attributes:
        choices: the choices that were found, by address.
    """

    def __init__(
        self, addresses: tuple[str, ...] = (), which: Any = None, salt: Any = None, step: Any = None
    ) -> None:
        self.choices: dict[str, Choice] = {}
        self.addresses = addresses
        self.which, self.salt, self.step = which, salt, step

    @property
    def moves(self) -> bool:
        """Whether draws are moved. Then nothing is differentiated."""
        return self.step is not None

    def keys(self, jaxpr: Any, key: jax.Array) -> dict[str, Any]:
        """The keys of all choices of a program, after the intervention."""
        plan = key_plan(jaxpr)
        own = derive_keys(plan, key)
        if self.salt is None:
            for choice in _choices(jaxpr):
                self.choices.setdefault(choice.address, choice)
            return own
        other = derive_keys(plan, jax.random.fold_in(key, self.salt))

        def one(path: Any, a: Any, b: Any) -> Any:
            address = ".".join(n for n in (p.key for p in path) if not n.startswith("~"))
            here = jnp.asarray(False)
            for i, known in enumerate(self.addresses):
                if known == address or known.startswith(f"{address}."):
                    here = here | (self.which == i)
            if self.step is None:
                return jnp.where(here, b, a)
            return Moved(a, b, jnp.broadcast_to(jnp.where(here, self.step, 0.0), a.shape))

        return jax.tree_util.tree_map_with_path(one, own, other)

    def handler(self) -> Handler:
        """The handler that runs a program under this probe."""
        return Line(None, drawn=marked_draw) if self.moves else Evaluate(None, drawn=marked_draw)


_in_force: contextvars.ContextVar[Probe | None] = contextvars.ContextVar("probe", default=None)


def probing() -> Probe | None:
    """The probe in force."""
    return _in_force.get()


@contextlib.contextmanager
def probed(probe: Probe) -> Iterator[Probe]:
    """Put a probe in force."""
    token = _in_force.set(probe)
    try:
        yield probe
    finally:
        _in_force.reset(token)


@dataclasses.dataclass(frozen=True)
class Line(Evaluate):
    """Evaluates a program whose reparametrised draws are moved along lines, and names these draws."""

    def draw(self, site: Site, key: Any) -> jax.Array:
        if not isinstance(key, Moved):
            return super().draw(site, key)
        if not isinstance(chosen(site), Reparam):
            return super().draw(site, key.key)
        start = super().draw(site, key.key)
        moved = start + key.step * (super().draw(site, key.other) - start)
        return checkpoint_name(moved.astype(start.dtype), PATH + ".".join(site.address))

    def estimated(self, eqn: Any, args: list[Any], context: Context) -> Any:
        return super().estimated(eqn, args, _still(context))

    def loop(self, eqn: Any, args: list[Any], context: Context) -> Any:
        return super().loop(eqn, args, _still(context))


def _still(context: Context) -> Context:
    """The keys without the movement, for parts of a program that derive keys of their own from them."""
    keys = jax.tree.map(
        lambda k: k.key if isinstance(k, Moved) else k,
        context.keys,
        is_leaf=lambda k: isinstance(k, Moved),
    )
    return dataclasses.replace(context, keys=keys)


# --- the choices of a program -----------------------------------------------------------------------------------------


def _choices(jaxpr: Any) -> Iterator[Choice]:
    for eqn, place in equations(jaxpr, enter=lambda e: e.primitive is not estimated_p):
        prefix, copies = scopes(place), math.prod(n for n in place.rounds if n is not None)
        in_loop = not {"loop", "unbounded"}.isdisjoint(place.kinds)
        if eqn.primitive is site_p:
            found = _choice(eqn.params, prefix, copies, in_loop)
            if found is not None:
                yield found
        elif eqn.primitive is estimated_p:
            for address, info in eqn.params["sites"].value:
                name = ".".join((*prefix, *address))
                yield Choice(name, "estimated", None, True, (), copies * info.size, None, in_loop)


def _choice(
    params: dict[str, Any], prefix: tuple[str, ...], copies: int, in_loop: bool
) -> Choice | None:
    spec = params["spec"]
    operands = [jnp.zeros(())] * (params["skeleton"].num_arrays + 1)
    site = Site(params, operands, (*prefix, spec.name), ())
    fixed = "value" in site.parts and "observed" not in site.parts
    if spec.kind != "sample" or fixed or spec.unsampled:
        return None
    default = "grad" not in site.parts
    return Choice(
        ".".join(site.address),
        spec.label,
        chosen(site),
        default,
        tuple(fitting(site)),
        copies * functools.reduce(lambda a, b: a * b, site.shape, 1),
        None if spec.values is None else len(spec.values.value),
        in_loop,
    )
