"""Expectations of programs: ``expect(f)`` estimates the mean of ``f``. It is unbiased, and so are its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.programs.handlers import Evaluate
from weft.ppl.programs.models import Model
from weft.ppl.stage.compat import consts_first, needed
from weft.ppl.stage.errors import WeftError
from weft.ppl.stage.interpreter import interpret
from weft.ppl.stage.jaxprs import Holds
from weft.ppl.stage.keys import as_key
from weft.ppl.stage.modules import Noun
from weft.ppl.stage.sites import site_p
from weft.ppl.stage.structure import is_pathwise
from weft.ppl.transforms.rewriting import stage_call

from .gradients import marked_draw
from .sensitivity import probing
from .surrogates import Evaluator

SAMPLES = "weft samples"
"""The axis of the draws that one call averages."""


class Expectation(Noun):
    """The estimator that ``expect`` makes. Call it as ``estimator(key, *args)``.

    Attributes:
        function: the function of which it estimates the mean.
        num_samples: as in ``expect``.
        max_terms: as in ``expect``.
    """

    function: Callable[..., Any]
    num_samples: int = eqx.field(static=True, default=1)
    max_terms: int = eqx.field(static=True, default=4096)

    def __call__(self, key: jax.Array, *args: Any, **kwargs: Any) -> Any:
        code, operands = stage_call(self.function, args, kwargs)
        probe = probing()  # only while an estimator is examined
        needs_marks = _marked(code.jaxpr) and not (probe and probe.moves)

        def evaluate(key: Any, *operands: Any) -> list[Any]:
            handler = probe.handler() if probe else Evaluate(None, drawn=marked_draw)
            return interpret(code.jaxpr, list(operands), handler, key)[0]

        def estimate(key: Any, axis: str | None = None) -> list[Any]:
            key = probe.keys(code.jaxpr, key) if probe else key
            if not needs_marks:
                return evaluate(key, *operands)
            jaxpr, consts = consts_first(jax.make_jaxpr(evaluate)(key, *operands))
            # A choice that nothing needs has no term, and is not enumerated.
            evaluator = Evaluator(axis, self.max_terms)
            return evaluator(needed(jaxpr), [*consts, *jax.tree.leaves(key), *operands])

        key = as_key(key)
        if self.num_samples == 1:
            return jax.tree.unflatten(code.out_tree, estimate(key))
        keys = jax.random.split(key, self.num_samples)
        outs = jax.vmap(lambda k: estimate(k, SAMPLES), axis_name=SAMPLES)(keys)
        return jax.tree.unflatten(code.out_tree, [jnp.mean(o, 0) for o in outs])


_marked = Holds(lambda eqn: eqn.primitive is site_p and not is_pathwise(eqn.params))
"""Whether a program makes a choice that is not simply reparametrised."""


def expect(f: Callable[..., Any], num_samples: int = 1, max_terms: int = 4096) -> Expectation:
    r"""An unbiased estimator of $\mathbb{E}[f(\text{args})]$, the mean over the choices that ``f`` makes.

    ``f`` may call ``sample`` itself, and may run programs in place with ``draw``. Derivatives of the estimator are
    unbiased estimates of those of the mean: of any order, in both modes, also under ``jit`` and ``vmap``. Each choice
    is differentiated by its gradient strategy (``weft.gradients``). The default is ``reparam`` if the distribution
    allows it, and ``score`` otherwise. A strategy that cannot be used is an error, never a silent bias.

    Args:
        f: a function of arrays that returns arrays; or a model.
        num_samples: the number of independent draws that are averaged. With two or more, the baseline of a score term
            is the mean of the other draws (Kool et al. 2019).
        max_terms: the most runs of the rest of the program that ``enum`` may take.

    Returns:
        ``estimator(key, *args)``.

    Raises:
        GradientError: if a strategy cannot be used. The message names the site, and the strategies that are possible.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import expect, gradients, sample
        >>> second_moment = expect(lambda s: sample("x", dist.Normal(0.0, s)) ** 2)
        >>> keys = jax.random.split(jax.random.key(0), 10_000)
        >>> grads = jax.vmap(jax.grad(second_moment, argnums=1), (0, None))(keys, 2.0)
        >>> abs(float(grads.mean()) - 4.0) < 0.3
        True
        >>> coin = expect(lambda p: 3.0 * sample("b", dist.Bernoulli(p), grad=gradients.enum))
        >>> value, slope = jax.value_and_grad(coin, argnums=1)(keys[0], 0.5)
        >>> print(value, slope)
        1.5 3.0
    """
    if not isinstance(num_samples, (int, np.integer)) or num_samples < 1:
        raise WeftError(f"expect: num_samples must be a positive integer, got {num_samples!r}")
    return Expectation(f.function if isinstance(f, Model) else f, int(num_samples), max_terms)
