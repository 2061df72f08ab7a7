"""Rewriting a function with sites: the interpreter runs over it with a handler that stages each site again.

Every transform of a model (condition, scale, reparametrize, ...) is such a handler. The rewritten function has the same
arguments and the same return value. It can be sampled, nested, and transformed again.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from weft.ppl.programs.models import Model
from weft.ppl.stage.compat import ShapedArray, consts_first
from weft.ppl.stage.control import estimated_p, marginal_p, scope_p
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.interpreter import Context, Handler, Result, walk
from weft.ppl.stage.packing import pack
from weft.ppl.stage.records import Records, look_up
from weft.ppl.stage.sites import Site, bind_site
from weft.ppl.stage.specs import SiteSpec
from weft.ppl.stage.staging import Code, stage
from weft.ppl.stage.structure import site_table


@dataclasses.dataclass(frozen=True)
class Rewrite(Handler):
    """A handler that stages each site that it meets. Subclasses override ``payload`` or ``site``."""

    records = False

    def site(self, site: Site, key: Any, given: Any) -> tuple[jax.Array, None, dict[str, Any]]:
        return self.emit(site, given), None, {}

    def emit(self, site: Site, given: Any = None) -> jax.Array:
        """Stage the site with its payload changed by ``payload``, for each element of its batch axes as before."""

        def one(payload: dict[str, Any], given: Any) -> Any:
            changed = self.payload(site, dict(payload), given)
            return bind_site(self.spec(site, site.spec), changed)

        return site.over_lanes(one, given)

    def payload(self, site: Site, payload: dict[str, Any], given: Any) -> dict[str, Any]:
        """The changed payload, for one element of the batch axes."""
        return payload

    def spec(self, site: Site, spec: SiteSpec) -> SiteSpec:
        return spec

    def scope(
        self, eqn: Any, args: list[Any], context: Context
    ) -> tuple[list[Any], Records, dict[str, Any]]:
        inside = context.enter(eqn.params["name"])
        return (
            rebind_scope(
                eqn.params["name"], lambda *a: walk(eqn.params["jaxpr"], list(a), inside)[0], args
            ),
            {},
            {},
        )

    def anonymous(self, eqn: Any, args: list[Any], key: Any) -> tuple[list[Any], dict[str, Any]]:
        return list(scope_p.bind(*args, **eqn.params)), {}

    def estimated(
        self, eqn: Any, args: list[Any], context: Context
    ) -> tuple[list[Any], Records, dict[str, Any]]:
        for address, _ in eqn.params["sites"].value:
            if look_up(context.given, address) is not None:
                raise out_of_reach(".".join((*context.prefix, *address)))
        return list(estimated_p.bind(*args, **eqn.params)), {}, {}

    def equation(self, eqn: Any, ins: list[Any], context: Context) -> Result | None:
        if eqn.primitive is not marginal_p:
            return None
        jaxpr, addresses, options = (eqn.params[k] for k in ("jaxpr", "addresses", "options"))
        outs = bind_marginal(lambda *a: walk(jaxpr, list(a), context)[0], ins, addresses, options)
        return outs, {}, {}


def out_of_reach(address: str) -> ModelError:
    """The error for a transform of a choice whose density is estimated."""
    return ModelError(
        f"the choice {address!r} has an estimated density, which only scale and do reach, and do only with all of its "
        "choices: transform the program that is handed to marginal or normalize, or give the value with given()"
    )


def rebind_scope(name: str, f: Callable[..., list[Any]], args: list[Any]) -> list[Any]:
    """Stage ``f`` as a nested program. Arrays that ``f`` closes over become operands."""
    jaxpr, operands = _closed(f, args)
    outs = tuple(ShapedArray(v.aval.shape, v.aval.dtype) for v in jaxpr.outvars)
    return list(scope_p.bind(*operands, name=name, jaxpr=jaxpr, outs=outs))


def bind_marginal(
    f: Callable[..., list[Any]],
    args: list[Any],
    addresses: tuple[tuple[str, ...], ...],
    options: Any,
) -> list[Any]:
    """Stage ``f`` as a program with choices summed out. Arrays that ``f`` closes over become operands."""
    jaxpr, operands = _closed(f, args)
    return list(marginal_p.bind(*operands, jaxpr=jaxpr, addresses=addresses, options=options))


def _closed(f: Callable[..., list[Any]], args: list[Any]) -> tuple[Any, list[Any]]:
    """The jaxpr of a function without constants, and its operands: what it closes over, then its arguments."""
    jaxpr, consts = consts_first(jax.make_jaxpr(lambda *a: f(*a))(*args))
    if consts or args:
        return jaxpr, [*consts, *args]
    zero = jnp.zeros(())  # an equation without operands would never be batched
    return consts_first(jax.make_jaxpr(lambda _: f())(zero))[0], [zero]


def rewrite(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    handler: Callable[[dict[str, Any]], tuple[Handler, dict[str, Any]]],
) -> Any:
    """Call ``function`` with its sites rewritten.

    Args:
        function: any function with sites.
        args: its positional arguments.
        kwargs: its keyword arguments.
        handler: a function from the table of sites to a handler and to what it is given, by address.
    """
    code, operands = stage_call(function, args, kwargs)
    chosen, given = handler(site_table(code.jaxpr))
    outs, _, _ = walk(code.jaxpr, operands, Context(chosen, {}, given))
    return jax.tree.unflatten(code.out_tree, outs)


def stage_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Code, list[Any]]:
    """Stage a call with its arrays and floats traced. Gives ``(code, its flat arguments)``."""
    arrays, skeleton = pack((args, kwargs))

    def call(*arrays: Any) -> Any:
        args, kwargs = skeleton.unpack(arrays)
        return function(*args, **kwargs)

    code, consts = stage(call, arrays)
    return code, [*consts, *arrays]


class Transformed(eqx.Module):
    """A function with sites, and a transform of these sites. Subclasses give the handler."""

    inner: Callable[..., Any]

    def handler(self, table: dict[str, Any]) -> tuple[Handler, dict[str, Any]]:
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return rewrite(self.inner, args, kwargs, self.handler)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    @property
    def __wrapped__(self) -> Any:
        return self.inner


def transform(target: Any, make: Callable[[Callable[..., Any]], Transformed]) -> Any:
    """Apply a transform to a model or to a function with sites. The result is of the same kind."""
    if isinstance(target, Model):
        return Model(make(target.function), target.name)
    if not callable(target):
        raise TypeError(
            f"a transform takes a model or a function with sites, got {type(target).__name__}"
        )
    return make(target)
