"""What is read off equations: which functions are polynomials, and what keeps copies apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from weft.ppl.analysis.affinity import is_linear, is_polynomial, reads
from weft.ppl.analysis.independence import Unaligned, align
from weft.ppl.stage.compat import Literal


def with_derivative(value, slope):
    """A function with a derivative of its own."""
    f = jax.custom_jvp(value)
    f.defjvp(lambda primals, tangents: (value(primals[0]), slope(primals[0]) * tangents[0]))
    return f


TRUE = jnp.array(True)
POLYNOMIALS = {  # function of one number, its degree (None: none that is proved)
    "affine": (lambda x: 2.0 * x + 1.0, 1),
    "constant": (lambda x: 0.0 * x, 1),
    "square": (lambda x: (x - 1.0) ** 2, 2),
    "cube": (lambda x: x * x * x, 3),
    "in a call": (jax.jit(lambda x: 3.0 * x), 1),
    "in a checkpoint": (jax.checkpoint(lambda x: x * x), 2),
    "in a branch": (lambda x: lax.cond(TRUE, lambda x: x, lambda x: 2.0 * x, x), 1),
    "in a loop": (lambda x: lax.scan(lambda c, _: (2.0 * c + x, None), x, length=3)[0], 1),
    "in a loop, squared": (lambda x: lax.scan(lambda c, _: (c * c, None), x, length=1)[0], None),
    "sine": (jnp.sin, None),
    "rounded": (jnp.round, None),
    "cast to integers": (lambda x: x.astype(jnp.int32).astype(x.dtype), None),
    "cast in a branch": (
        lambda x: lax.cond(TRUE, lambda x: x.astype(int).astype(x.dtype), lambda x: x, x),
        None,
    ),
    "cast in a loop": (
        lambda x: lax.scan(lambda c, _: (c.astype(int).astype(c.dtype), None), x, length=2)[0],
        None,
    ),
    "narrowed and widened": (lambda x: x.astype(jnp.float16).astype(x.dtype), None),
    "of fewer digits": (lambda x: lax.reduce_precision(x, 8, 2), None),
    "of all digits": (lambda x: lax.reduce_precision(x, 8, 23), 1),
    "chosen by it": (lambda x: lax.cond(x > 0, lambda x: x, lambda x: 2.0 * x, x), None),
    "chosen by it, both alike": (
        lambda x: lax.cond(x > 0, lambda x: x, lambda x: x + 0.0, x),
        None,
    ),
    "while below": (lambda x: lax.while_loop(lambda c: c < 3.0, lambda c: c + 1.0, x), None),
    "derivative that hides": (with_derivative(lambda x: x**2, lambda x: 0.0), None),
    "straight through": (with_derivative(lambda x: lax.round(x), lambda x: 1.0), None),
    "reduced by a function": (
        lambda x: lax.reduce(jnp.stack([x, x]), 0.0, lambda a, b: a * b + 1.0, (0,)),
        None,
    ),
}


@pytest.mark.parametrize("case", POLYNOMIALS)
def test_is_polynomial(case):
    f, degree = POLYNOMIALS[case]
    avals = [jax.ShapeDtypeStruct((), jnp.float32)]
    for limit in (1, 2, 3):
        right = degree is not None and degree <= limit
        assert is_polynomial(f, avals, [0], limit) == right


def test_is_polynomial_in_some_operands_together():
    avals = [jax.ShapeDtypeStruct((), jnp.float32)] * 2
    assert is_polynomial(jnp.multiply, avals, [0], 1)
    assert not is_polynomial(jnp.multiply, avals, [0, 1], 1)
    assert is_polynomial(jnp.multiply, avals, [0, 1], 2)


def test_is_linear_asks_for_real_numbers():
    (cast,) = jax.make_jaxpr(lambda x: x.astype(jnp.int32))(1.5).eqns
    (sum_,) = jax.make_jaxpr(lambda x: x.sum())(jnp.ones(3)).eqns
    assert not is_linear(cast, [0])
    assert is_linear(sum_, [0])


def test_reads_sees_through_control_flow():
    def f(x, y):
        return lax.scan(lambda c, _: ((c[1], c[1]), c[0]), (x, y), length=2)

    closed = jax.make_jaxpr(f)(1.0, 2.0)
    assert reads(closed, [True, False]) == [False, False, True]
    assert reads(closed, [False, True]) == [True, True, True]
    names = set()
    reads(closed, [True, True], names)
    assert "scan" not in names


# --- copies kept apart ------------------------------------------------------------------------------------------------

ROWS, COLUMNS = 0, 1
MESH = jax.make_mesh((1, 1), ("i", "j"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def in_shards(ins, outs):
    return jax.shard_map(
        lambda x: 2.0 * x, mesh=MESH, in_specs=ins, out_specs=outs, check_vma=False
    )


ALIGNED = {  # function of a (3, 4) array, the axis of the copies, where its results carry it (None: refused)
    "top_k behind": (lambda x: lax.top_k(x, 2), ROWS, [0, 0]),
    "top_k along": (lambda x: lax.top_k(x, 2, axis=0), ROWS, None),
    "top_k beside": (lambda x: lax.top_k(x, 2, axis=0), COLUMNS, [1, 1]),
    "sum": (lambda x: x.sum(0), COLUMNS, [0]),
    "sum along": (lambda x: x.sum(0), ROWS, None),
    "argmax": (lambda x: jnp.argmax(x, 1), ROWS, [0]),
    "generic reduce": (lambda x: lax.reduce(x, 0.0, jnp.logaddexp, (0,)), COLUMNS, [0]),
    "generic reduce along": (lambda x: lax.reduce(x, 0.0, jnp.logaddexp, (0,)), ROWS, None),
    "custom derivative": (with_derivative(lambda x: 2.0 * x, lambda x: 2.0), ROWS, [0]),
    "scan along": (lambda x: lax.scan(lambda c, r: (c, r + 1.0), 0.0, x)[1], ROWS, None),
    "scan beside": (lambda x: lax.scan(lambda c, r: (c, r + 1.0), 0.0, x)[1], COLUMNS, [1]),
    "cond that turns": (
        lambda x: lax.cond(TRUE, lambda x: x @ x.T, lambda x: (x @ x.T).T, x),
        ROWS,
        None,
    ),
    "shards": (in_shards(P("i", "j"), P("i")), ROWS, [0]),
    "shards put together otherwise": (in_shards(P("i", "j"), P("j", "i")), ROWS, None),
    "all of them in each shard": (in_shards(P(), P("i")), ROWS, None),
    "while, decided by all": (
        lambda x: lax.while_loop(lambda v: v.sum() < 3, lambda v: v + 1.0, x),
        ROWS,
        None,
    ),
    "while, decided in each": (
        lambda x: jax.vmap(lambda r: lax.while_loop(lambda v: v.sum() < 3, lambda v: v + 1.0, r))(
            x
        ),
        ROWS,
        None,
    ),
}


def places(f, axis):
    """The places of a function's results, by the equations that make it."""
    opened = jax.make_jaxpr(f)(jnp.ones((3, 4))).jaxpr
    found = {opened.invars[0]: axis}
    for eqn in opened.eqns:
        ins = [None if isinstance(v, Literal) else found.get(v) for v in eqn.invars]
        found.update(zip(eqn.outvars, align(eqn, ins), strict=True))
    return [found[v] for v in opened.outvars]


@pytest.mark.parametrize("case", ALIGNED)
def test_align(case):
    f, axis, right = ALIGNED[case]
    if right is None:
        with pytest.raises(Unaligned):
            places(f, axis)
    else:
        found = places(f, axis)
        assert [p for p in found if p is not None] == right


@pytest.mark.parametrize("case", [c for c, (_, _, right) in ALIGNED.items() if right])
def test_aligned_results_read_their_own_copy_only(case):
    f, axis, _ = ALIGNED[case]
    x = jnp.arange(12.0).reshape(3, 4) % 5.0
    moved = jnp.where(
        jnp.arange(x.shape[axis]).reshape((-1, 1) if axis == 0 else (1, -1)) == 1, x + 7.5, x
    )
    before, after = jax.tree.leaves(f(x)), jax.tree.leaves(f(moved))
    for a, b, place in zip(before, after, places(f, axis), strict=True):
        if place is not None:
            np.testing.assert_array_equal(np.delete(a, 1, place), np.delete(b, 1, place))
