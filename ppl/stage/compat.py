"""Everything that differs between the versions of JAX that Weft supports, in one place."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend
import jaxlib
import numpy as np
from jax._src.core import get_opaque_trace_state
from jax._src.xla_bridge import backends_are_initialized
from jax.core import ShapedArray as ShapedArray
from jax.core import Tracer as Tracer
from jax.core import eval_jaxpr as eval_jaxpr
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.interpreters.batching import fancy_primitive_batchers as fancy_primitive_batchers
from jax.interpreters.partial_eval import dce_jaxpr
from jax.lax import cond_p as cond_p
from jax.lax import scan_p as scan_p
from jax.lax import while_p as while_p
from jax.sharding import NamedSharding


def keep_sums_from_ynnpack() -> None:
    """Set the flag of XLA that keeps sums on a CPU right, if XLA has not started yet.

    From version 0.10.2 on jaxlib hands sums to YNNPACK. Where a fused computation has some thousands of rows, the
    result can be wrong, and nothing is said (jax-ml/jax#39103). A log evidence by importance sampling was off by 2.
    The flag is left as it is if it is set already. Other versions of jaxlib may not know it, and would not start.

    Warns:
        RuntimeWarning: if XLA has started, on a CPU, without the flag.
    """
    flag = "--xla_cpu_experimental_ynn_fusion_type"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag in flags or not (0, 10, 2) <= jaxlib.version.__version_info__[:3] < (0, 13):
        return
    if not backends_are_initialized():
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=-reduce".strip()
    else:
        _warn_too_late(
            "gives wrong sums over large arrays on a CPU (https://github.com/jax-ml/jax/issues/39103)",
            f'XLA_FLAGS="{flag}=-reduce"',
        )


def trace_state() -> Any:
    """What tells the trace that is going on from others."""
    return get_opaque_trace_state(None)


LEAST_THREADS = 16


def keep_solves_from_waiting() -> None:
    """Give XLA 16 threads at least on a CPU, if it has not started yet.

    In jaxlib 0.10.0 to 0.11.0 a batch of Cholesky factors or triangular solves waits, on a thread of XLA's pool, for
    other threads of the pool. If as many batches run at once as there are threads, they wait for each other forever.
    On two cores two are enough: the densities of two multivariate normals with their gradients, vmapped over 20,000
    rows. A number of threads that is set already, in ``PJRT_NPROC`` or ``NPROC``, is left as it is. With 16 the wait is
    not impossible, but takes a program with as many batches at the same time.

    Warns:
        RuntimeWarning: if XLA has started, on a CPU, with fewer threads.
    """
    names = ("PJRT_NPROC", "NPROC")
    if not (0, 10) <= jaxlib.version.__version_info__[:3] <= (0, 11, 0):
        return
    if any(name in os.environ for name in names) or num_cores() >= LEAST_THREADS:
        return
    if not backends_are_initialized():
        os.environ[names[0]] = str(LEAST_THREADS)
    else:
        _warn_too_late(
            "may wait forever for batches of Cholesky factors or triangular solves on a CPU of few cores",
            f"{names[0]}={LEAST_THREADS}",
        )


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warn_too_late(fault: str, setting: str) -> None:
    if jax.default_backend() == "cpu":
        warnings.warn(
            f"jaxlib {jaxlib.version.__version__} {fault}. Weft avoids it by a setting of XLA, but JAX has started "
            f"already. Import weft before the first computation, or start Python with {setting}",
            RuntimeWarning,
            stacklevel=4,
        )


def is_jaxpr(x: Any) -> bool:
    """Whether ``x`` is a jaxpr, open or closed (from JAX 0.11 the two are one class)."""
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def open_jaxpr(x: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr, which has the equations, and its constants."""
    if hasattr(x, "jaxpr") and hasattr(x.jaxpr, "eqns"):
        return x.jaxpr, x.consts
    return x, getattr(x, "consts", ())


def consts_first(closed: Any) -> tuple[Any, list[Any]]:
    """The jaxpr with its constants as leading arguments, and the constants themselves.

    Equal indices become one. Each time a NumPy array is an index, JAX makes the constants anew that it derives from it:
    two reads of one row of a table would look like reads of two.
    """
    opened, consts = open_jaxpr(closed)
    if not consts:
        return opened, []
    first: dict[Any, Any] = {}
    same = {
        v: first.setdefault(_content(c), v) for v, c in zip(opened.constvars, consts, strict=True)
    }
    kept = [(v, c) for v, c in zip(opened.constvars, consts, strict=True) if same[v] is v]

    def renamed(variables: Sequence[Any]) -> list[Any]:
        return [v if isinstance(v, Literal) else same.get(v, v) for v in variables]

    eqns = opened.eqns
    if len(kept) < len(consts):
        eqns = [e.replace(invars=renamed(e.invars)) for e in eqns]
    info = opened.debug_info
    names = None if info.arg_names is None else ("",) * len(kept) + tuple(info.arg_names)
    jaxpr = opened.replace(
        constvars=[],
        invars=[*(v for v, _ in kept), *opened.invars],
        eqns=eqns,
        outvars=renamed(opened.outvars),
        debug_info=info._replace(arg_names=names),
    )
    return jaxpr, [c for _, c in kept]


def _content(const: Any) -> Any:
    """What tells constants apart: for NumPy's integers and booleans what they hold, else which object it is."""
    if isinstance(const, np.ndarray) and const.dtype.kind in "iub":
        return const.dtype, const.shape, const.tobytes()
    return id(const)


def needed(jaxpr: Any) -> Any:
    """A jaxpr without constants and without the equations that no result needs. Its arguments stay."""
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def makes_ref(eqn: Any) -> bool:
    """Whether an equation makes an array that may be changed in place (``jax.new_ref``)."""
    return any(type(v.aval).__name__ == "AbstractRef" for v in eqn.outvars)


def reads_ref(eqn: Any) -> bool:
    """Whether an operand of an equation is an array that may be changed in place."""
    return any(type(v.aval).__name__ == "AbstractRef" for v in eqn.invars)


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Every jaxpr among the parameters of an equation."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if is_jaxpr(item):
                found.append(item)
    return found


def replaced(x: Any, **parts: Any) -> Any:
    """The jaxpr, open or closed, with some of its parts replaced."""
    opened, consts = open_jaxpr(x)
    opened = opened.replace(**parts)
    return opened if x is open_jaxpr(x)[0] else x.replace(jaxpr=opened, consts=list(consts))


def is_shard_map(eqn: Any) -> bool:
    return eqn.primitive.name == "shard_map"


def shard_map_specs(eqn: Any) -> tuple[list[list[tuple[str, ...]]], list[list[tuple[str, ...]]]]:
    """The mesh axes over which each axis of each operand is split, and the same for each result."""

    def names(spec: Any, v: Any) -> list[tuple[str, ...]]:
        entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
        return entries + [()] * (v.aval.ndim - len(entries))

    ins, outs = eqn.params["in_specs"], eqn.params["out_specs"]
    return (
        [names(s, v) for s, v in zip(ins, eqn.invars, strict=True)],
        [names(s, v) for s, v in zip(outs, eqn.outvars, strict=True)],
    )


def manual_axes(eqn: Any) -> frozenset[str]:
    """The axes of the mesh that a ``shard_map`` is written for."""
    params = eqn.params
    return params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]


def rebind_shard_map(eqn: Any, f: Any, args: Any, in_specs: Any, out_specs: Any) -> Any:
    """Call ``f`` in a ``shard_map`` like that of an equation. Whether values are the same on all shards is not checked.

    Types that vary over the mesh are dropped together with that check. They were inferred before sites had values.
    """
    mesh = eqn.params["mesh"]
    if any(t == jax.sharding.AxisType.Explicit for t in mesh.axis_types):
        shardings = jax.tree.map(functools.partial(NamedSharding, mesh), in_specs)
        args = jax.tree.map(jax.reshard, args, shardings)
    run = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=manual_axes(eqn),
        check_vma=False,
    )
    return run(*args)


@contextlib.contextmanager
def types_of_shards_ignored(shard_map_p: Any) -> Iterator[None]:
    """Trace every ``shard_map`` as if with ``check_vma=False``.

    With ``check_vma`` JAX infers along which mesh axes a value varies. It does so before a site has a value that may
    vary.
    """
    bind = type(shard_map_p).bind
    shard_map_p.bind = lambda *args, **params: bind(
        shard_map_p, *args, **{**params, "check_vma": False}
    )
    try:
        yield
    finally:
        vars(shard_map_p).pop("bind", None)


def like(x: Any, shape: tuple[int, ...]) -> Any:
    """The type of an array with another shape that varies over a mesh as ``x`` does."""
    return jax.typeof(x).update(shape=shape, weak_type=False)


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """``(num_consts, num_carry)`` of a scan equation."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluate one equation as JAX would."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if not isinstance(params, dict):
        functions, params = params
        args = [*functions, *args]
    with jax.extend.source_info_util.user_context(eqn.source_info.traceback):
        outs = eqn.primitive.bind(*args, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


generation = jax.make_user_context(0) if hasattr(jax, "make_user_context") else None
"""Part of the key of all of JAX's tracing caches; see ``tracing_generation``."""


def tracing_generation(number: int) -> Any:
    """Trace with caches of inner jaxprs (scan bodies, inner jits) that no other generation shares."""
    return contextlib.nullcontext() if generation is None else generation(number)


def tracing_context() -> tuple[Any, ...]:
    """What of JAX's settings is written into a jaxpr: number types, the precision of products, and the mesh."""
    names = ("jax_enable_x64", "jax_numpy_dtype_promotion", "jax_default_matmul_precision")
    return (*(getattr(jax.config, name) for name in names), jax.sharding.get_abstract_mesh())


def where_in_source(eqn: Any) -> str:
    """The line of the user's code that an equation comes from, for messages."""
    try:
        line = jax.extend.source_info_util.summarize(eqn.source_info)
    except Exception:  # not worth an error of its own
        return ""
    return "" if line in ("", "<unknown>") else f" ({line})"
