"""The compiled functions: a program is simulated, scored as a whole, or scored site by site.

The program is an argument of these functions. Staged programs compare by structure, so one compilation serves all data
of one shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.addresses import unflatten, unknown
from weft.ppl.stage.compat import ShapedArray
from weft.ppl.stage.control import scope_p
from weft.ppl.stage.errors import AddressError
from weft.ppl.stage.interpreter import interpret
from weft.ppl.stage.staging import used
from weft.ppl.stage.structure import SiteInfo

from .handlers import Evaluate
from .traces import Trace, flat_records, run_program

if TYPE_CHECKING:
    from .programs import Program


@jax.jit
def run_generate(
    program: Program, key: jax.Array, given: dict[str, Any]
) -> tuple[Trace, jax.Array]:
    code, args = program.code()
    trace, terms = run_program(code, args, Evaluate("value"), key, given)
    return trace, jnp.asarray(terms["log_weight"])


@jax.jit
def run_log_density(
    program: Program, given: dict[str, Any], key: jax.Array | None = None
) -> jax.Array:
    code, args = program.code()
    return jnp.asarray(interpret(code.jaxpr, args, Evaluate(None), key, given)[2]["log_density"])


@jax.jit
def run_log_densities(
    program: Program, given: dict[str, Any], key: jax.Array | None = None
) -> dict[str, Any]:
    code, args = program.code()
    _, records, _ = interpret(code.jaxpr, args, Evaluate("log_density"), key, given)
    return unflatten({a: r["value"] for a, r in flat_records(records)})


def run_inside(program: Program, given: dict[str, Any]) -> tuple[Trace, jax.Array]:
    """Run a program in place, inside one that is being staged; its choices have no address there.

    Args:
        program: the program.
        given: entries of the choices that are not drawn, by name.

    Returns:
        ``(trace, log_weight)``, as of ``generate``.
    """
    used(program)
    code, args = program.code()
    leaves, structure = jax.tree.flatten(given)

    def run(key: jax.Array, args: list[Any], leaves: list[Any]) -> tuple[Trace, jax.Array]:
        entries = jax.tree.unflatten(structure, leaves)
        trace, terms = run_program(code, args, Evaluate(), key, entries)
        return trace, jnp.asarray(terms["log_weight"])

    shapes = jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)), args, leaves)
    flat, tree = jax.tree.flatten(shapes)
    outs = tuple(ShapedArray(s.shape, s.dtype) for s in flat)
    found = scope_p.bind(*args, *leaves, name=None, jaxpr=code, outs=outs, given=structure)
    return jax.tree.unflatten(tree, found)


def by_axis(
    table: dict[str, SiteInfo], densities: dict[str, Any], axis: str, name: str
) -> jax.Array:
    """Sum log densities of sites to one number for every index of a named axis."""
    total: Any = None
    for address, density in densities.items():
        places = [i for i, a in enumerate(table[address].axes) if a.name == axis]
        if not places:
            continue
        others = tuple(i for i in range(density.ndim) if i != places[0])
        row = jnp.sum(density, axis=others)
        if total is not None and row.shape != total.shape:
            raise AddressError(
                f"model {name!r}: axis {axis!r} has sizes {total.shape[0]} and {row.shape[0]} at different sites"
            )
        total = row if total is None else total + row
    if total is None:
        names = {a.name for s in table.values() for a in s.axes if a.name}
        raise AddressError(unknown(axis, sorted(names), f" among the named axes of model {name!r}"))
    return total
