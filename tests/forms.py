"""Forms of JAX's primitives, small and in many settings: name -> a function, and how its arguments are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from weft.ppl.stage.cotangents import finite_p

Draw = Callable[[np.random.Generator], Any]
FORMS: dict[str, tuple[Callable[..., Any], list[Draw]]] = {}


def real(*shape: int) -> Draw:
    return lambda rng: rng.normal(size=shape)


def within(low: float, high: float, *shape: int) -> Draw:
    return lambda rng: rng.uniform(low, high, size=shape)


def whole(low: int, high: int, *shape: int, dtype: Any = np.int32) -> Draw:
    return lambda rng: rng.integers(low, high, size=shape).astype(dtype)


def flags(*shape: int) -> Draw:
    return lambda rng: rng.integers(0, 2, size=shape).astype(bool)


def definite(*shape: int) -> Draw:
    def draw(rng: np.random.Generator) -> Any:
        a = rng.normal(size=(*shape, shape[-1]))
        return a @ np.swapaxes(a, -1, -2) + shape[-1] * np.eye(shape[-1])

    return draw


def form(name: str, f: Callable[..., Any], *draws: Draw) -> None:
    assert name not in FORMS
    FORMS[name] = f, list(draws)


S = (3, 4)
square, cube = real(3, 3), real(3, 3, 3)

# --- element by element -----------------------------------------------------------------------------------------------

_UNARY = """
abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2 expm1
floor is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square tan tanh
"""
for _name in _UNARY.split():
    _low = 1.1 if _name == "acosh" else 0.05
    form(_name, getattr(lax, _name), within(_low, _low + 0.9, *S))
# JAX 0.12 has primitives for these; for earlier ones they are several equations each.
form("log2", jnp.log2, within(0.1, 2, *S))
form("one_minus_square", lambda x: jax.jvp(jnp.tanh, (x,), (jnp.ones_like(x),))[1], real(*S))
form("polynomial", lambda c, x: jnp.polyval(c, x), real(3), real(*S))
form("polynomial of rows", lambda c, x: jax.vmap(jnp.polyval)(c, x), real(3, 3), real(*S))
for _name in ("add", "sub", "mul", "div", "max", "min", "pow", "atan2", "rem", "nextafter"):
    _f = getattr(lax, _name)
    form(_name, _f, within(0.1, 2, *S), within(0.1, 2, *S))
    form(f"{_name} a number", lambda x, f=_f: f(x, 1.5), within(0.1, 2, *S))
    form(f"a number {_name}", lambda x, f=_f: f(1.5, x), within(0.1, 2, *S))
for _name in [
    "add",
    "sub",
    "mul",
    "div",
    "rem",
    "max",
    "min",
    "and",
    "or",
    "xor",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
]:
    _f = getattr(
        lax, {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}.get(_name, _name)
    )
    form(f"{_name} of integers", _f, whole(-9, 9, *S), whole(1, 9, *S))
    form(
        f"{_name} of bytes",
        _f,
        whole(0, 256, *S, dtype=np.uint8),
        whole(1, 256, *S, dtype=np.uint8),
    )
for _name in ("shift_left", "shift_right_arithmetic", "shift_right_logical"):
    form(_name, getattr(lax, _name), whole(-9, 9, *S), whole(0, 4, *S))
for _name in ("igamma", "igammac", "igamma_grad_a"):
    form(_name, getattr(lax, _name), within(0.5, 2, *S), within(0.5, 2, *S))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    form(f"{_name} of reals", getattr(lax, _name), real(*S), real(*S))
for _power in (-2, 0, 1, 3):
    form(f"integer_pow {_power}", lambda x, y=_power: lax.integer_pow_p.bind(x, y=y), real(*S))
for _name in [
    "float16",
    "bfloat16",
    "float8_e5m2",
    "float32",
    "int32",
    "int8",
    "bool",
    "complex64",
]:
    _dtype = bool if _name == "bool" else getattr(jnp, _name)
    form(f"to {_name}", lambda x, d=_dtype: lax.convert_element_type(x, d), within(0, 9, *S))
    form(
        f"integers to {_name}",
        lambda x, d=_dtype: lax.convert_element_type(x, d),
        whole(-300, 300, *S),
    )
for _bits in ((8, 23), (11, 52), (5, 10), (8, 1)):
    form(f"reduce_precision {_bits}", lambda x, b=_bits: lax.reduce_precision(x, *b), real(*S))
for _name in ("conj", "real", "imag"):
    form(_name, lambda x, y, f=getattr(lax, _name): f(lax.complex(x, y)), real(*S), real(*S))
form("to even", lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), real(*S))
form("clz", lax.clz, whole(0, 100, *S))
form("population_count", lax.population_count, whole(0, 100, *S))
form("not", lax.bitwise_not, whole(0, 100, *S))
form("zeta", lax.zeta, within(1.5, 3, *S), within(0.5, 2, *S))
form("polygamma", lambda x: lax.polygamma(jnp.ones_like(x), x), within(1, 3, *S))
form("betainc", lax.betainc, within(1, 2, *S), within(1, 2, *S), within(0.1, 0.9, *S))
form("clamp", lambda a, x, b: lax.clamp(a, x, b), real(*S), real(*S), within(1, 2, *S))
form("clamp by numbers", lambda a, x, b: lax.clamp(a, x, b), real(), real(*S), within(1, 2))
form("clamp crossed", lax.clamp, whole(0, 5, *S), whole(-9, 9, *S), whole(-5, 1, *S))
form("select", lax.select_n, flags(*S), real(*S), real(*S))
form("select by one", lax.select_n, flags(), real(*S), real(*S))
form("select of three", lax.select_n, whole(0, 3, *S), real(*S), real(*S), real(*S))
form("select integers", lax.select_n, whole(0, 3, *S), *[whole(0, 9, *S)] * 3)
form("add_any", lambda x, y: jax.vjp(lambda z: (z * 2.0, z), x)[1]((x, y)), real(*S), real(*S))
form("mul repeats", lax.mul, real(3, 1), real(1, 3))
form("copy", lambda x: jnp.array(x, copy=True), real(*S))
form("bits", lambda x: lax.bitcast_convert_type(x, jnp.int32), real(*S))
form("stop_gradient", lax.stop_gradient, real(*S))
form("barrier", lambda x, y: lax.optimization_barrier((x, y)), real(*S), real(4, 3))
form("finite_cotangent", finite_p.bind, real(*S))
form("complex", lax.complex, real(*S), real(*S))
for _name in ("eq_to", "le_to", "lt_to"):
    if hasattr(jax._src.lax.lax, f"{_name}_p"):
        form(_name, getattr(jax._src.lax.lax, f"{_name}_p").bind, real(*S), real(*S))

# --- shapes -----------------------------------------------------------------------------------------------------------

_RESHAPED = [
    ((3, 4), (12,)),
    ((3, 4), (4, 3)),
    ((3, 3), (9,)),
    ((2, 6), (2, 2, 3)),
    ((2, 2, 3), (4, 3)),
    ((2, 2), (2, 1, 2)),
]
_TURNED = [
    ((3, 3), (3, 3), (1, 0)),
    ((2, 3, 2), (2, 6), (2, 1, 0)),
    ((2, 2, 3), (2, 2, 3), (1, 0, 2)),
]
for _old, _new, *_order in [*_RESHAPED, *_TURNED]:
    _settings = (_new, *_order)
    for _draw, _what in ((real, ""), (lambda *s: whole(0, 99, *s), " of integers")):
        form(
            f"reshape{_what} {_old} {_settings}",
            lambda x, s=_settings: lax.reshape(x, *s),
            _draw(*_old),
        )
for _what, _draw in ("", real), (" of integers", lambda *s: whole(0, 9, *s)):
    form(f"broadcast{_what}", lambda x: lax.broadcast_in_dim(x, (5, 3, 4), (1, 2)), _draw(*S))
    form(f"squeeze{_what}", lambda x: lax.squeeze(x, (0, 2)), _draw(1, 3, 1, 4))
    form(f"transpose{_what}", lambda x: lax.transpose(x, (1, 2, 0)), _draw(3, 3, 3))
    form(f"concatenate{_what}", lambda x, y: lax.concatenate([x, y], 1), _draw(3, 3), _draw(3, 2))
    form(f"stack{_what}", lambda x, y: jnp.stack([x, y], 1), _draw(*S), _draw(*S))
    form(f"iota{_what}", lambda x: x + lax.broadcasted_iota(x.dtype, S, 1), _draw(*S))
    form(f"rev{_what}", lambda x: lax.rev(x, (1,)), _draw(3, 3))
    form(f"slice{_what}", lambda x: lax.slice(x, (0, 1), (3, 4), (1, 2)), _draw(*S))
    form(f"pad{_what}", lambda x, p: lax.pad(x, p, ((0, 0, 0), (-1, 2, 1))), _draw(3, 3), _draw())
    form(
        f"pad by negative numbers{_what}",
        lambda x, p: lax.pad(x, p, ((1, -1, 0), (0, 0, 0))),
        _draw(3, 3),
        _draw(),
    )
    form(f"cumsum{_what}", lambda x: lax.cumsum(x, 1, reverse=True), _draw(3, 3))
    form(f"sum{_what}", lambda x: lax.reduce_sum(x, (0, 2)), _draw(3, 3, 3))
form("broadcast to rows", lambda x: lax.broadcast_in_dim(x, (3, 3), (1,)), real(3))
form("broadcast repeats", lambda x: lax.broadcast_in_dim(x, S, (0, 1)), real(1, 4))
form("split", lambda x: lax.split(x, (1, 3), 1), real(*S))
form("unstack", lambda x: jnp.unstack(x, axis=1), cube)
form("tile", lambda x: jnp.tile(x, (2, 1)), real(*S))
form("rev of both", lambda x: lax.rev(x, (0, 1)), square)
form("slice of all", lambda x: lax.slice(x, (0, 0), S, (1, 1)), real(*S))
form("dynamic_slice", lambda x, i: lax.dynamic_slice(x, (i, i), (3, 2)), real(*S), whole(-2, 5))
form("dynamic_slice of all", lambda x, i: lax.dynamic_slice(x, (i, i), S), real(*S), whole(-2, 5))
form(
    "dynamic_update",
    lambda x, y, i: lax.dynamic_update_slice(x, y, (i, i)),
    square,
    real(3, 2),
    whole(-2, 5),
)
form(
    "dynamic_update of rows",
    lambda x, y, i: lax.dynamic_update_slice(x, y, (i, i)),
    square,
    real(2, 3),
    whole(-2, 5),
)

# --- along axes -------------------------------------------------------------------------------------------------------

for _name in ("max", "min", "prod"):
    form(f"reduce_{_name}", lambda x, f=getattr(lax, f"reduce_{_name}"): f(x, (0, 2)), cube)
for _name in ("and", "or", "xor"):
    form(
        f"reduce_{_name}",
        lambda x, f=getattr(lax, f"reduce_{_name}"): f(x, (1,)),
        whole(0, 99, 3, 3),
    )
for _name in ("cummax", "cummin", "cumprod", "cumlogsumexp"):
    form(_name, lambda x, f=getattr(lax, _name): f(x, 0), square)
    form(f"{_name} reversed", lambda x, f=getattr(lax, _name): f(x, 1, True), square)
form("argmax", lambda x: lax.argmax(x, 0, np.int32), square)
form("argmin", lambda x: lax.argmin(x, 1, np.int32), square)
form("reduce", lambda x: lax.reduce(x, -np.inf, jnp.logaddexp, (0,)), cube)
form(
    "reduce two",
    lambda x, y: lax.reduce(
        (x, y), (0.0, 1.0), lambda a, b: (a[0] + b[0] * a[1], a[1] * b[1]), (1,)
    ),
    square,
    square,
)
form("sort", lambda x: lax.sort(x, dimension=0), square)
form("sort by one", lambda x, y: lax.sort((x, y), dimension=1, num_keys=1), square, square)
form("sort by two", lambda x, y: lax.sort((x, y), dimension=0, num_keys=2), square, square)
form("top_k", lambda x: lax.top_k(x, 3), square)
form("top_k of columns", lambda x: lax.top_k(x, 3, axis=0), square)
form("reduce_window", lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "SAME"), square)
form("convolution", lambda x, y: lax.conv(x, y, (1, 1), "SAME"), real(3, 3, 3, 3), real(3, 3, 1, 3))
form("fft", lambda x: lax.fft(x.astype(complex), "FFT", (3,)), square)
form("rfft", lambda x: lax.fft(x, "RFFT", (4,)), real(3, 4))

# --- reading and writing by indices -----------------------------------------------------------------------------------

_Numbers = lax.GatherDimensionNumbers
for _what, _draw in ("", real), (" of integers", lambda *s: whole(0, 99, *s)):
    form(f"rows{_what}", lambda x, i: x[i], _draw(3, 3), whole(0, 3, 3))
    form(f"columns{_what}", lambda x, i: x[:, i], _draw(3, 3), whole(0, 3, 3))
    form(f"pairs{_what}", lambda x, i, j: x[i, j], _draw(3, 3), whole(0, 3, 3), whole(0, 3, 3))
    form(
        f"own rows{_what}",
        lambda x, i: jax.vmap(lambda x, i: x[i])(x, i),
        _draw(3, 3),
        whole(0, 3, 3),
    )
    form(f"along{_what}", lambda x, i: jnp.take_along_axis(x, i, 1), _draw(3, 3), whole(0, 3, 3, 3))
    form(
        f"own windows{_what}",
        lambda x, i: jax.vmap(lambda x, i: lax.dynamic_slice(x, (i, i), (2, 3)))(x, i),
        _draw(3, 3, 3),
        whole(-1, 4, 3),
    )
    form(
        f"windows{_what}",
        lambda x, i: lax.gather(x, i[:, None], _Numbers((1,), (), (0,)), (2,), mode="clip"),
        _draw(5),
        whole(0, 6, 3),
    )
    form(
        f"rows last{_what}",
        lambda x, i: lax.gather(x, i[:, None], _Numbers((0,), (0,), (0,)), (1, 3)),
        _draw(3, 3),
        whole(0, 3, 3),
    )
    form(
        f"turned pairs{_what}",
        lambda x, i: lax.gather(x, i, _Numbers((), (0, 1), (1, 0)), (1, 1)),
        _draw(3, 3),
        whole(0, 3, 3, 2),
    )
form("between", lambda x, i, j: x[i, :, j], cube, whole(0, 3, 3), whole(0, 3, 3))
form("filled", lambda x, i: x.at[i].get(mode="fill", fill_value=7.0), square, whole(-1, 5, 3))
form("clipped", lambda x, i: x.at[i].get(mode="clip"), square, whole(-1, 5, 3))
for _name in ("set", "add", "multiply", "min", "max"):
    form(
        f"{_name} rows",
        lambda x, i, y, n=_name: getattr(x.at[i], n)(y, mode="drop"),
        square,
        whole(0, 5, 3),
        square,
    )
    form(
        f"{_name} own rows",
        lambda x, i, y, n=_name: jax.vmap(lambda x, i, y: getattr(x.at[i], n)(y))(x, i, y),
        square,
        whole(0, 3, 3),
        real(3),
    )

# --- linear algebra ---------------------------------------------------------------------------------------------------

_PRODUCTS = [
    (((1,), (0,)), ((), ()), (3, 3), (3, 3)),
    (((2,), (1,)), ((0,), (0,)), (3, 3, 3), (3, 3, 3)),
    (((1,), (2,)), ((0, 2), (1, 0)), (2, 3, 2), (2, 2, 3)),
    (((), ()), ((1,), (0,)), (2, 3), (3, 2)),
    (((), ()), ((), ()), (3,), (3,)),
]
for _sums, _batch, _left, _right in _PRODUCTS:
    form(
        f"product {_sums} {_batch}",
        lambda x, y, n=(_sums, _batch): lax.dot_general(x, y, n),
        real(*_left),
        real(*_right),
    )
for _shape in ((3, 3), (3, 3, 3)):
    _a = definite(*_shape[:-1])
    for _name in (
        "cholesky",
        "eigh",
        "eig",
        "lu",
        "qr",
        "svd",
        "schur",
        "tridiagonal",
        "hessenberg",
    ):
        _more = {"symmetrize_input": False} if _name in ("cholesky", "eigh") else {}
        form(f"{_name} {_shape}", lambda a, f=getattr(lax.linalg, _name), m=_more: f(a, **m), _a)
    form(
        f"triangular_solve {_shape}",
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
        _a,
        real(*_shape),
    )
    form(f"solve {_shape}", jnp.linalg.solve, _a, real(*_shape))
form("geqrf", jax._src.lax.linalg.geqrf, cube)
form("householder_product", lax.linalg.householder_product, cube, square)
form(
    "tridiagonal_solve",
    lambda d, b: lax.linalg.tridiagonal_solve(d * 0.0, d, d * 0.0, b),
    within(4, 5, 3, 3),
    real(3, 3, 2),
)
form(
    "pivots",
    lambda p: lax.linalg.lu_pivots_to_permutation(p, 3),
    lambda rng: np.array([[0, 1, 2], [1, 2, 2], [2, 2, 2]], np.int32)[rng.permutation(3)],
)

# --- control flow -----------------------------------------------------------------------------------------------------

form("scan", lambda x, y: lax.scan(lambda c, a: (c + a, c * a), x, y), real(3), square)
form(
    "scan backwards",
    lambda x, y: lax.scan(lambda c, a: (c + a.sum(), c * a), x, y, reverse=True, unroll=2),
    real(3),
    square,
)
form(
    "scan that turns",
    lambda x, y: lax.scan(lambda c, _: ((c[1], c[0].T), c[0]), (x, y), length=3),
    square,
    square,
)
form(
    "while",
    lambda x, y: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + y), (0, x)),
    square,
    square,
)
form(
    "while for each",
    jax.vmap(lambda x: lax.while_loop(lambda c: c < 9, lambda c: c + 1, x)),
    real(3),
)
form("cond", lambda p, x: lax.cond(p, lambda x: x + 1, lambda x: x.T, x), flags(), square)
form(
    "switch",
    lambda i, x: lax.switch(i, [lambda x: x, lambda x: x * 2.0, lambda x: x * x], x),
    whole(0, 3),
    square,
)
form(
    "cond for each",
    jax.vmap(lambda p, x: lax.cond(p, lambda x: x + 1, lambda x: x * 2, x)),
    flags(3),
    square,
)
form("checkpoint", jax.checkpoint(lambda x: jnp.sin(x) + x.sum(1)), square)
form("custom_jvp", jax.nn.softplus, square)
form("softmax", lambda x: jax.nn.softmax(x, 0), square)
form("composite", lambda x: lax.composite(lambda x: x.T, name="a.b")(x), square)
form(
    "callback",
    lambda x: jax.pure_callback(lambda a: np.asarray(a).T, x, x, vmap_method="sequential"),
    square,
)


@jax.custom_vjp
def _turned(x: Any, y: Any) -> Any:
    return x.T + y


_turned.defvjp(lambda x, y: (_turned(x, y), None), lambda _, g: (g.T, g))
form("custom_vjp", _turned, square, square)


@jax.custom_batching.custom_vmap
def _summed(x: Any) -> Any:
    return x.sum(0)


@_summed.def_vmap
def _(size: int, batched: Any, x: Any) -> Any:
    return x.sum(1), True


form("custom_vmap", _summed, square)
form(
    "linear_solve",
    lambda a, b: lax.custom_linear_solve(lambda v: a @ v, b, lambda _, b: jnp.linalg.solve(a, b)),
    definite(3),
    real(3),
)
