"""The words of a model: ``sample``, ``factor``, ``deterministic``, ``draw``, ``repeat`` and ``loop``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.compat import ShapedArray
from weft.ppl.stage.control import scope_p
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.sites import bind_site
from weft.ppl.stage.specs import SiteSpec, sample_spec
from weft.ppl.stage.staging import used

from .evaluation import run_inside
from .models import check_name
from .programs import Program
from .traces import Trace


def sample(
    name: str, d: Any, *, dims: Sequence[str | None] = (), grad: Any = None, **unknown: Any
) -> Any:
    """Make a named random choice from a distribution or a program.

    Under ``jax.vmap`` every copy makes its own draw, also if ``d`` does not depend on the mapped values. Under
    ``lax.scan`` every step makes its own draw.

    Args:
        name: the address of the choice in its scope. It holds no dot.
        d: any pytree with ``sample(key)`` and ``log_prob(value)``, such as NumPyro's distributions; or a program
            ``model(*args)``, whose choices are put under ``name``.
        dims: names for the leading axes of the value that ``d`` itself makes.
        grad: the gradient strategy in expectations, from ``weft.gradients``. By default it is ``reparam`` if ``d`` has
            differentiable draws, and ``score`` otherwise.
        **unknown: refused. For ``obs=`` the error says how data are given here.

    Returns:
        The value of the choice, an array. For a program, its return value.

    Raises:
        ModelError: if the name or the distribution cannot be used.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> @gen
        ... def coin():
        ...     p = sample("p", dist.Beta(1.0, 1.0))
        ...     return sample("heads", dist.Binomial(10, p))
        >>> sorted(coin().simulate(jax.random.key(0)).choices)
        ['heads', 'p']
    """
    if "obs" in unknown:
        raise ModelError(
            f"sample({name!r}, ..., obs=...): observations are given from outside, model(...).given({{{name!r}: data}})"
        )
    if unknown:
        raise TypeError(
            f"sample got unexpected arguments {sorted(unknown)}; it takes name, d, dims=, grad="
        )
    check_name(name)
    if isinstance(d, Program):
        if dims or grad is not None:
            raise TypeError(
                f"sample({name!r}, program): dims= and grad= are for distributions; name them at the program's sites"
            )
        return _nested(name, d)
    if callable(d) and not hasattr(d, "log_prob") and not isinstance(d, type):
        raise ModelError(
            f"sample({name!r}, {d!r}): apply the model to its arguments first, sample({name!r}, model(...))"
        )
    payload = {"d": d} if grad is None else {"d": d, "grad": grad}
    spec = sample_spec(name, d)
    return bind_site(dataclasses.replace(spec, dims=_dims(name, dims, len(spec.shape))), payload)


def _dims(name: str, dims: Any, ndim: int) -> tuple[str | None, ...]:
    dims = (dims,) if isinstance(dims, str) else tuple(dims)
    if any(not (d is None or (isinstance(d, str) and d)) for d in dims):
        raise ModelError(f"site {name!r}: dims are names or None, got {dims!r}")
    if len(dims) > ndim:
        raise ModelError(
            f"site {name!r}: dims={dims!r} names {len(dims)} axes of a value that has {ndim}"
        )
    return dims


def _array(name: str, what: str, value: Any) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as e:
        raise ModelError(
            f"{what} {name!r}: expected an array, got {type(value).__name__}: {e}"
        ) from None


def factor(name: str, log_weight: Any) -> None:
    """Multiply the density of the program by ``exp(log_weight)``. This makes the program unnormalised.

    Args:
        name: the address of the factor in its scope.
        log_weight: any array. Its sum counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from weft import factor, gen
        >>> @gen
        ... def fair():
        ...     factor("soft", -1.5)
        >>> float(fair().log_density({}))
        -1.5
    """
    check_name(name)
    weight = _array(name, "factor", log_weight)
    if not jnp.issubdtype(weight.dtype, jnp.inexact):
        weight = weight.astype(jnp.result_type(float))
    spec = SiteSpec(name, "factor", "factor", weight.shape, weight.dtype, weight.ndim)
    bind_site(spec, {"weight": weight})


def deterministic(name: str, value: Any, *, dims: Sequence[str | None] = ()) -> Any:
    """Record a computed value in ``trace.derived`` under ``name``, and return it.

    Args:
        name: the address of the value in its scope.
        value: any array.
        dims: names for the leading axes of the value.

    Examples:
        >>> import jax
        >>> from weft import deterministic, gen
        >>> @gen
        ... def model(x):
        ...     return deterministic("square", x**2)
        >>> float(model(3.0).simulate(jax.random.key(0)).derived["square"])
        9.0
    """
    check_name(name)
    value = _array(name, "deterministic", value)
    dims = _dims(name, dims, value.ndim)
    spec = SiteSpec(
        name, "deterministic", "deterministic", value.shape, value.dtype, value.ndim, tuple(dims)
    )
    return bind_site(spec, {"value": value})


def _nested(name: str, program: Program) -> Any:
    """Sample a program under a name, by one scope equation. A vmapped program gives one for each of its copies."""
    used(program)
    code, args = program.code()
    outs = tuple(ShapedArray(v.aval.shape, v.aval.dtype) for v in code.jaxpr.outvars)
    flat = scope_p.bind(*args, name=name, jaxpr=code.jaxpr, outs=outs)
    return jax.tree.unflatten(code.out_tree, flat)


def draw(program: Program) -> Trace:
    """Run a program in place, inside an expectation, and give its trace.

    The run has no name. Its choices have no address in the surrounding program. Gradients flow through the trace.

    Args:
        program: a model applied to arguments.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import draw, expect, gen, sample
        >>> @gen
        ... def guide(m):
        ...     sample("x", dist.Normal(m, 1.0))
        >>> mean = expect(lambda m: draw(guide(m)).choices["x"])
        >>> float(jax.grad(mean, argnums=1)(jax.random.key(0), 0.5))
        1.0
    """
    if not isinstance(program, Program):
        raise TypeError(f"draw takes a program, model(*args); got {type(program).__name__}")
    return run_inside(program, {})[0]


def repeat(f: Callable[[], Any], n: int, axis_name: str | None = None) -> Any:
    """Run ``f()`` ``n`` times, independently. It is a ``jax.vmap`` without a covariate.

    Args:
        f: a function of no arguments, with sites.
        n: the number of runs.
        axis_name: the name of the new axis.

    Returns:
        The return value of ``f``, with a leading axis of size ``n``.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, repeat, sample
        >>> @gen
        ... def dice():
        ...     return repeat(lambda: sample("face", dist.DiscreteUniform(1, 6)), 5, axis_name="throw")
        >>> dice().simulate(jax.random.key(0)).choices["face"].shape
        (5,)
    """
    return jax.vmap(lambda _: f(), axis_size=n, axis_name=axis_name)(jnp.zeros(n))


def loop(
    cond: Callable[[Any], Any], body: Callable[[Any], Any], max_steps: int, init: Any = None
) -> Any:
    """Run ``body`` while ``cond`` holds, at most ``max_steps`` times: a ``lax.while_loop`` with sites and a density.

    Choices gain a leading axis of size ``max_steps``. Choices of steps that were not taken are idle: ``trace.active``
    is false there.

    Args:
        cond: a function from the state to a scalar bool.
        body: a function from state to state, with sites.
        max_steps: the bound on the number of steps.
        init: the first state. Without it, ``loop(cond, body, max_steps)`` is a function of the first state.

    Returns:
        The last state.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, loop, sample
        >>> @gen
        ... def walk():
        ...     step = lambda x: x + sample("step", dist.Normal(1.0, 0.1))
        ...     return loop(lambda x: x < 2.5, step, 10, jnp.zeros(()))
        >>> trace = walk().simulate(jax.random.key(0))
        >>> trace.choices["step"].shape, int(trace.active["step"].sum())
        ((10,), 3)
    """
    if init is None:
        return lambda state: loop(cond, body, max_steps, state)
    state = jax.tree.map(jnp.asarray, init)

    def step(state: Any, _: Any) -> Any:
        return jax.lax.cond(cond(state), body, lambda s: s, state), None

    return jax.lax.scan(step, state, None, length=max_steps)[0]
