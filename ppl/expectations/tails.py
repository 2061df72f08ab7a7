"""Strategies that need the rest of the program as a function of the draw: enumeration and measure-valued derivatives.

The rest of the program is given as ``rest(outs, terms, pure=False)``. It takes the draw, and the number of evaluations
in all. A *pure* run is for the value alone, without strategies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.errors import GradientError
from weft.ppl.stage.wiring import described

from .derivatives import product, spread_out
from .effects import Node, copywise, is_real

stop = jax.lax.stop_gradient

Rest = Callable[..., "list[Any]"]


def enumerated(
    eqn: Any, inputs: list[Node], rest: Rest, moved: Sequence[Any], terms: int, max_terms: int
) -> list[Any]:
    """The results of the program as sums over the values of a draw of one copy or several."""
    draw, log_q = (n.value for n in inputs)
    values = jnp.asarray(eqn.params["values"], draw.dtype)
    copies, terms = draw.size, terms * draw.size * len(values)
    if terms > max_terms:
        raise GradientError(
            f"enum at {eqn.params['name']!r} runs the rest of the program {terms:,} times, with the choices "
            f"enumerated before it; the limit is {max_terms:,}. Take score or mvd at some of them"
        )
    q = jnp.exp(log_q).reshape(copies, len(values))
    # Impossible values are replaced by a possible one: what follows may not be finite there.
    likely = values[jnp.argmax(stop(q), -1)]
    values = jnp.where(q > 0, values, likely[:, None])
    earlier = copywise(inputs, draw.ndim)

    def tail(copy: Any, value: Any, pure: bool) -> list[Any]:
        return rest([Node(_with(draw, copy, value), earlier)], terms, pure=pure)

    if copies == 1:
        found = jax.vmap(lambda v: tail(0, v, pure=False))(values[0])
        return [_weighed(q[0], k) if is_real(k) else k[0] for k in found]
    here = rest([Node(draw, earlier)], terms)
    alone = jax.vmap(lambda copy, v: tail(copy, v, pure=True), (None, 0))
    every = jax.vmap(alone)(jnp.arange(copies), values)
    message = _first_order(eqn, "enum of several copies")
    found = []
    for h, k in zip(here, every, strict=True):
        if is_real(h):
            mean = jnp.mean(jax.vmap(_weighed)(q, k), 0)
            h = h + stop(mean - h) + jnp.sum(product(k, q, moved, message), (0, 1))
        found.append(h)
    return found


def differenced(
    eqn: Any, inputs: list[Node], rest: Rest, moved: Sequence[Any], terms: int
) -> list[Any]:
    """The results of the program, with the derivative of each parameter as a difference of two runs of the rest."""
    draw, *arrays = (n.value for n in inputs)
    found = rest([Node(draw, copywise(inputs, draw.ndim))], terms)
    message = _first_order(eqn, "mvd")
    for i in range(0, len(arrays), 4):
        theta, c, up, down = (a.reshape(-1) for a in arrays[i : i + 4])

        def tails(copy: Any, values: Any) -> list[Any]:
            return jax.vmap(lambda v: rest([Node(_with(draw, copy, v))], terms, pure=True))(values)

        pairs = jax.vmap(tails)(jnp.arange(draw.size), jnp.stack([up, down], 1))
        for o, k in enumerate(pairs):
            if is_real(found[o]):
                slope = spread_out(c, k.ndim - 1) * (k[:, 0] - k[:, 1])
                found[o] = found[o] + jnp.sum(product(slope, theta, moved, message), 0)
    return found


def _with(draw: Any, copy: Any, value: Any) -> Any:
    return draw.reshape(-1).at[copy].set(value).reshape(draw.shape)


def _weighed(q: Any, k: Any) -> Any:
    q = spread_out(q, k.ndim)
    return jnp.sum(jnp.where(q > 0, q * k, 0), 0)


def _first_order(eqn: Any, what: str) -> str:
    return (
        f"a second derivative is needed through {eqn.params['name']!r}, but {what} has first ones only: take reparam, "
        "score, or enum of a single choice"
    )


def no_tail(eqn: Any, names: Sequence[str]) -> GradientError:
    what = " and ".join(dict.fromkeys(map(repr, names)))
    return GradientError(
        f"enum and mvd need the rest of the program as a function of the choice, and {what} stands in "
        f"{described(eqn)}, where there is none: take score, reparam or reweight there, sum the choice out "
        "(marginalize), or write the loop in Python"
    )
