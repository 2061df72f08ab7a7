"""Which axes equations tie: whatever is tied to an axis changes its length with it, and what is made of it is noted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from weft.ppl.stage.ties import Ties
from weft.ppl.stage.wiring import wiring

lax = jax.lax
W = jnp.ones((3, 4))

# Functions of an array of shape (n, 3), whose rules are known: each result with n in its shape is tied to it.
TIED: dict[str, Callable[[Any], Any]] = {
    "elementwise": lambda x: jnp.sin(x) + x[:1] * 2.0,
    "broadcast": lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 2, 3)),
    "transpose": lambda x: x.T,
    "reshape": lambda x: x.reshape(x.shape[0], 3, 1),
    "squeeze": lambda x: lax.squeeze(x[:, :1], (1,)),
    "sum": lambda x: x.sum(1),
    "argmax": lambda x: jnp.argmax(x, 1),
    "reduce": lambda x: lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (1,)),
    "cumsum": lambda x: jnp.cumsum(x, 0),
    "sort": lambda x: lax.sort(x, dimension=0),
    "matmul": lambda x: x @ W,
    "from the right": lambda x: W.T @ x.T,
    "batched": lambda x: jax.vmap(jnp.outer)(x, x),
    "concatenate": lambda x: jnp.concatenate([x, x[:, :1]], 1),
    "split": lambda x: lax.split(x, (1, 2), 1),
    "slice": lambda x: lax.slice_in_dim(x, 1, 3, axis=1),
    "dynamic": lambda x: lax.dynamic_slice_in_dim(x, x.shape[1] - 2, 2, 1),
    "update": lambda x: lax.dynamic_update_slice(x, jnp.zeros((1, 1)), (0, 0)),
    "pad": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 1, 0))),
    "gather": lambda x: W[0][x.astype(int)],
    "pick": lambda x: jax.vmap(lambda row: row[row.astype(int)[0]])(x),
    "scatter": lambda x: x.at[0, 1].add(1.0),
    "cholesky": lambda x: lax.linalg.cholesky(jax.vmap(jnp.diag)(x)),
    "barrier": lambda x: lax.optimization_barrier((x, W))[0],
    "convolution": lambda x: lax.conv(x[:, None, None, :], jnp.ones((1, 1, 1, 2)), (1, 1), "SAME"),
}

# Of these nothing is tied, and the new axes may be made of the old ones.
MADE: dict[str, Callable[[Any], Any]] = {
    "flat": lambda x: x.reshape(-1),
    "joined": lambda x: jnp.concatenate([x, x], 0)[:, 0],
    "cut": lambda x: x[1:, 0],
    "repeated": lambda x: jnp.repeat(x[:, 0], 2),
}


def followed(f: Callable[[Any], Any], n: int) -> tuple[Ties, int, list[Any]]:
    """The ties of all equations of a function, the first axis of its argument, and the axes of its results."""
    ties = Ties()

    def visit(jaxpr: Any, args: list[Any]) -> list[Any]:
        env = dict(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Any:
            return env[v] if v in env else ties.axes(v.aval.shape)

        for eqn in jaxpr.eqns:
            ins = [
                ties.axes(jnp.shape(v.val)) if hasattr(v, "val") else read(v) for v in eqn.invars
            ]
            found = wiring(eqn)
            if found is None:
                outs = [ties.axes(v.aval.shape) for v in eqn.outvars]
                ties.results(eqn, ins, outs)
            else:
                inner = found.bodies[0].jaxpr
                outs = visit(getattr(inner, "jaxpr", inner), ins)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    jaxpr = jax.make_jaxpr(f)(jnp.ones((n, 3))).jaxpr
    start = ties.axes((n, 3))
    return ties, ties.root(start[0]), visit(jaxpr, [start])


@pytest.mark.parametrize("name", TIED)
def test_tied_axes_change_together(name: str) -> None:
    sizes = {}
    for n in (5, 7):
        ties, root, results = followed(TIED[name], n)
        root = ties.root(root)
        sizes[n] = [[ties.sizes[a] for a in axes] for axes in results]
        tied = [[ties.root(a) == root for a in axes] for axes in results]
        sizes[n, "tied"] = tied
    changed = [
        [a != b for a, b in zip(x, y, strict=True)] for x, y in zip(sizes[5], sizes[7], strict=True)
    ]
    assert sizes[5, "tied"] == changed
    assert any(map(any, changed))


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_an_axis_is_noted(name: str) -> None:
    ties, root, results = followed(MADE[name], 5)
    made, grown = {ties.root(root)}, True
    while grown:
        new = {ties.root(b) for _, a, b in ties.made if {ties.root(x) for x in a} & made for b in b}
        grown = not new <= made
        made |= new
    assert all(ties.root(a) in made for axes in results for a in axes)
    assert all(ties.root(a) != ties.root(root) for axes in results for a in axes)
