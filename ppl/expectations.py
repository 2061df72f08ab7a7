"""Expectations of programs: ``expect(f)`` is an unbiased, differentiable estimator of the mean of ``f``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .compat import as_key
from .handlers import Evaluate
from .interpreter import interpret
from .models import Model
from .rewriting import stage_call


class Expectation(eqx.Module):
    """The estimator that ``expect`` makes: ``estimator(key, *args)``."""

    function: Callable[..., Any]

    def __call__(self, key: jax.Array, *args: Any, **kwargs: Any) -> Any:
        code, operands = stage_call(self.function, args, kwargs)
        outs, _, _ = interpret(code.jaxpr, operands, Evaluate(None, gradients=True), as_key(key))
        return jax.tree.unflatten(code.out_tree, outs)


def expect(f: Callable[..., Any]) -> Expectation:
    r"""An unbiased estimator of $\mathbb{E}[f(\text{args})]$, the mean over the choices that ``f`` makes.

    ``f`` may call ``sample`` itself and run programs in place with ``draw``. ``jax.grad`` of the estimator is an
    unbiased estimate of the gradient of the mean, also under ``jit`` and ``vmap``: choices are reparametrised, and a
    gradient through one that cannot be is an error, never a silent bias.

    Args:
        f: a function of arrays that returns arrays, or a model.

    Returns:
        ``estimator(key, *args)``.

    Raises:
        GradientError: naming the site, when a derivative goes through a draw that is not reparametrised.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import expect, sample
        >>> second_moment = expect(lambda s: sample("x", dist.Normal(0.0, s)) ** 2)
        >>> keys = jax.random.split(jax.random.key(0), 10_000)
        >>> grads = jax.vmap(jax.grad(second_moment, argnums=1), (0, None))(keys, 2.0)
        >>> abs(float(grads.mean()) - 4.0) < 0.3
        True
    """
    return Expectation(f.function if isinstance(f, Model) else f)
