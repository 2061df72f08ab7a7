"""Kernels of kernels: on some of the choices, one after the other, at random, several times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from weft.ppl import Target
from weft.ppl.analysis.dependence import site_inputs
from weft.ppl.stage.addresses import Address, dotted, flatten, unflatten
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import DensityError, WeftError

from .kernel import Choices, Info, Kernel, chosen, entered, idling, pooled, unchanged


class block(Kernel):
    r"""A kernel on some of the choices, all others given: it leaves :math:`\pi(x_B \mid x_{-B})` as it is.

    Attributes:
        kernel: the kernel.
        addresses: what it moves; `"*"` and `"**"` are wildcards.

    Raises:
        AddressError: for an address that is no latent choice.
        DensityError: where another choice may be idle and depends on these, so that it has to move with
            them.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> @gen
        ... def model():
        ...     z = sample("z", dist.Bernoulli(0.3))
        ...     sample("x", dist.Normal(2.0 * z, 1.0))
        >>> kernel = kernels.block(kernels.hmc(0.3, 5), "x")
        >>> after, info = kernel.move(jax.random.key(0), {"z": 1, "x": 2.0}, model().given())
        >>> int(after["z"]), bool(after["x"] != 2.0)
        (1, True)
    """

    kernel: Kernel
    addresses: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, kernel: Kernel, *addresses: Address) -> None:
        _require_kernels("block", [kernel])
        if not addresses:
            raise WeftError("block(kernel, address, ...) takes at least one address")
        self.kernel = kernel
        self.addresses = tuple(dotted(a) for a in addresses)

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        flat = flatten(entered(choices, target))
        moved = chosen(self.addresses, target, "block")
        others = {a: x for a, x in flat.items() if a not in moved}
        _require_apart(target, moved)
        mine = unflatten({a: flat[a] for a in moved})
        after, info = self.kernel.move(key, mine, target.given(unflatten(others)))
        after = unchanged(mine, after, f"block: {type(self.kernel).__name__}")
        return unflatten({**flat, **flatten(after)}), info


class cycle(Kernel):
    r"""Kernels one after the other, :math:`K_1 K_2 \cdots K_n`.

    Its report pools theirs (any of booleans, the sum of counts, the mean of the rest), and has
    "acceptance_rate_0", "acceptance_rate_1", ... of each.

    Attributes:
        kernels: the kernels.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> @gen
        ... def model():
        ...     z = sample("z", dist.Bernoulli(0.3))
        ...     sample("x", dist.Normal(2.0 * z, 1.0))
        >>> kernel = kernels.cycle(kernels.gibbs("z"), kernels.block(kernels.hmc(0.3, 5), "x"))
        >>> after, info = kernel.move(jax.random.key(0), {"z": 1, "x": 2.0}, model().given())
        >>> float(info["acceptance_rate_0"])
        1.0
    """

    kernels: tuple[Kernel, ...]

    def __init__(self, *kernels: Kernel) -> None:
        _require_kernels("cycle", kernels)
        self.kernels = kernels

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        choices, infos = entered(choices, target), []
        for own, kernel in zip(jax.random.split(key, len(self.kernels)), self.kernels, strict=True):
            after, info = kernel.move(own, choices, target)
            choices = unchanged(choices, after, f"cycle: {type(kernel).__name__}")
            infos.append(info)
        rates = {f"acceptance_rate_{i}": info["acceptance_rate"] for i, info in enumerate(infos)}
        return choices, {**pooled(infos), **rates}


class mixture(Kernel):
    r"""One of several kernels, drawn anew for each move, :math:`\sum_i w_i K_i`.

    Its report is that of the kernel drawn (what only others report is nothing, False or zero), and
    "kernel", the index of it. Chains side by side under `vmap` draw different ones, so that all are
    computed.

    Attributes:
        kernels: the kernels.
        weights: positive numbers in proportion to their probabilities; all the same by default. They
            must not depend on the choices.
    """

    kernels: tuple[Kernel, ...]
    weights: Any

    def __init__(self, kernels: Sequence[Kernel], weights: Any = None) -> None:
        _require_kernels("mixture", kernels)
        weights = jnp.ones(len(kernels)) if weights is None else jnp.asarray(weights, float)
        if weights.shape != (len(kernels),):
            raise WeftError(f"mixture: {len(kernels)} kernels and weights of shape {weights.shape}")
        if not isinstance(weights, Tracer) and not np.all(np.asarray(weights) > 0):
            raise WeftError(f"mixture: weights are positive numbers, got {np.asarray(weights)}")
        self.kernels = tuple(kernels)
        self.weights = weights

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        before = entered(choices, target)
        draw_key, move_key = jax.random.split(key)
        index = jax.random.categorical(draw_key, jnp.log(self.weights))

        def branch(kernel: Kernel) -> Any:
            def run(_: Any) -> tuple[Choices, Info]:
                after, info = kernel.move(move_key, before, target)
                after = unchanged(before, after, f"mixture: {type(kernel).__name__}")
                return after, {k: jnp.asarray(v) for k, v in info.items()}

            return run

        runs = [branch(kernel) for kernel in self.kernels]
        shapes: dict[str, Any] = {}
        for run in runs:
            shapes = {**jax.eval_shape(run, 0)[1], **shapes}

        def filled(run: Any) -> Any:
            def f(_: Any) -> tuple[Choices, Info]:
                after, info = run(_)
                full = {k: info.get(k, _nothing(s)).astype(s.dtype) for k, s in shapes.items()}
                return after, full

            return f

        after, info = jax.lax.switch(index, [filled(run) for run in runs], 0)
        return after, {**info, "kernel": index}


class repeat(Kernel):
    """A kernel several times in a row.

    Its report pools those of the moves: any of booleans, the sum of counts, the mean of the rest.

    Attributes:
        kernel: the kernel.
        n: how often, at least once; may be traced.
    """

    kernel: Kernel
    n: Any

    def __check_init__(self) -> None:
        _require_kernels("repeat", [self.kernel])
        if isinstance(self.n, (int, np.integer)) and self.n < 1:
            raise WeftError(f"repeat: n is at least 1, got {self.n}")

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        before = entered(choices, target)

        def once(i: Any, choices: Choices) -> tuple[Choices, Info]:
            after, info = self.kernel.move(jax.random.fold_in(key, i), choices, target)
            after = unchanged(before, after, f"repeat: {type(self.kernel).__name__}")
            return after, {k: jnp.asarray(v) for k, v in info.items()}

        def body(i: Any, state: Any) -> Any:
            after, info = once(i, state[0])
            return after, {
                k: x | info[k] if x.dtype == bool else x + info[k] for k, x in state[1].items()
            }

        shapes = jax.eval_shape(once, jnp.int32(0), before)[1]
        zeros = {k: jnp.zeros(s.shape, s.dtype) for k, s in shapes.items()}
        after, info = jax.lax.fori_loop(0, self.n, body, (before, zeros))
        mean = lambda x: x / self.n if jnp.issubdtype(x.dtype, jnp.inexact) else x  # noqa: E731
        return after, {k: mean(x) for k, x in info.items()}


def _nothing(shape: Any) -> Array:
    empty = jnp.nan if jnp.issubdtype(shape.dtype, jnp.inexact) else 0
    return jnp.full(shape.shape, empty, shape.dtype)


def _require_kernels(who: str, kernels: Sequence[Any]) -> None:
    if not kernels:
        raise WeftError(f"{who} takes at least one kernel")
    for kernel in kernels:
        if not isinstance(kernel, Kernel):
            raise TypeError(f"{who}: expected a kernel, got {type(kernel).__name__}")


def _require_apart(target: Target, moved: tuple[str, ...]) -> None:
    """Given, an idle choice has no density; where that depends on what moves, the law would be another."""
    others = [a for a in idling(target) if a not in moved]
    if not others:
        return
    read = site_inputs(target.program.code()[0].jaxpr)
    bound = [a for a in others if read.get(a, frozenset()) & set(moved)]
    if bound:
        raise DensityError(
            f"block: {', '.join(map(repr, bound))} may be idle (in a branch, or under a mask) and depends on what "
            f"moves here, {', '.join(map(repr, moved))}: move it, too. Kernels that need no block (gibbs, "
            "metropolis_hastings, involutive) know how to leave it"
        )
