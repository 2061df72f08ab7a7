"""Kernels made of kernels: on some of the choices, one after another, one at random, several times.

Each is written once, as a move of a warm-up. A plain move is one with nothing to learn.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from weft.inference.run.adaptation import Phase
from weft.inference.run.settings import require_counts, require_positive
from weft.ppl import Target
from weft.ppl.analysis.dependence import site_inputs
from weft.ppl.stage.addresses import Address, dotted, flatten, unflatten
from weft.ppl.stage.errors import DensityError, WeftError

from .kernel import Choices, Info, Kernel, chosen, entered, idling, pooled, unchanged


class Combinator(Kernel):
    """Base of the kernels made of kernels. A warm-up tunes the settings of their parts."""

    keeps_floats = False

    @abc.abstractmethod
    def warm(
        self, key: PRNGKeyArray, choices: Choices, target: Target, tuning: Any, now: Phase | None
    ) -> tuple[Choices, Info, Any]:
        """A move with the values in `tuning` for the parts. A part without values is used as it is."""

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        return self.warm(key, choices, target, None, None)[:2]


class Several(Combinator):
    """Base of `cycle` and `mixture`, which have a field `kernels`. The tuning of the i-th kernel has the name "i"."""

    def tuning(
        self: Any, key: PRNGKeyArray, choices: Choices, target: Target, before: Any = None
    ) -> Any:
        keys = jax.random.split(key, len(self.kernels))
        found = {
            str(i): kernel.tuning(own, choices, target, (before or {}).get(str(i)))
            for i, (own, kernel) in enumerate(zip(keys, self.kernels, strict=True))
        }
        return {i: tuning for i, tuning in found.items() if tuning is not None} or None

    def tuned(self: Any, values: Any) -> Any:
        kernels = tuple(k.tuned(values.get(str(i), {})) for i, k in enumerate(self.kernels))
        return eqx.tree_at(lambda k: k.kernels, self, kernels)


class block(Combinator):
    r"""A kernel on some of the choices, given all others. It leaves $\pi(x_B \mid x_{-B})$ invariant.

    Attributes:
        kernel: the kernel.
        addresses: the addresses of the choices that it moves. `"*"` and `"**"` are wildcards.

    Raises:
        AddressError: for an address that is not a latent choice.
        DensityError: if another choice may be idle and depends on these. It then has to move with them.

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

    def tuning(
        self, key: PRNGKeyArray, choices: Choices, target: Target, before: Any = None
    ) -> Any:
        return self.kernel.tuning(key, *self._inside(choices, target), before)

    def warm(
        self, key: PRNGKeyArray, choices: Choices, target: Target, tuning: Any, now: Phase | None
    ) -> tuple[Choices, Info, Any]:
        mine, given = self._inside(choices, target)
        after, info, tuning = _move(self.kernel, key, mine, given, tuning, now)
        after = unchanged(mine, after, f"block: {type(self.kernel).__name__}")
        flat = flatten(entered(choices, target))
        return unflatten({**flat, **flatten(after)}), info, tuning

    def tuned(self, values: Any) -> block:
        return eqx.tree_at(lambda k: k.kernel, self, self.kernel.tuned(values))

    def _inside(self, choices: Choices, target: Target) -> tuple[Choices, Target]:
        """The choices that move, and the target in which all others are given."""
        flat = flatten(entered(choices, target))
        moved = chosen(self.addresses, target, "block")
        _require_apart(target, moved)
        others = {a: x for a, x in flat.items() if a not in moved}
        return unflatten({a: flat[a] for a in moved}), target.given(unflatten(others))


class cycle(Several):
    r"""Kernels one after another, $K_1 K_2 \cdots K_n$.

    The report combines those of the kernels: booleans by any, counts by their sum, the rest by their mean. It also has
    "acceptance_rate_0", "acceptance_rate_1" and so on, one for each kernel.

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

    def warm(
        self, key: PRNGKeyArray, choices: Choices, target: Target, tuning: Any, now: Phase | None
    ) -> tuple[Choices, Info, Any]:
        choices, infos, keys = (
            entered(choices, target),
            [],
            jax.random.split(key, len(self.kernels)),
        )
        for i, (own, kernel) in enumerate(zip(keys, self.kernels, strict=True)):
            after, info, tuning = _move_part(i, kernel, own, choices, target, tuning, now)
            choices = unchanged(choices, after, f"cycle: {type(kernel).__name__}")
            infos.append(info)
        rates = {f"acceptance_rate_{i}": info["acceptance_rate"] for i, info in enumerate(infos)}
        return choices, {**pooled(infos), **rates}, tuning


class mixture(Several):
    r"""One of several kernels, drawn anew for each move, $\sum_i w_i K_i$.

    The report is that of the kernel drawn, and "kernel", its index. An entry that only other kernels report is NaN,
    False or zero. Chains side by side under `vmap` draw different kernels, so all kernels are computed.

    Attributes:
        kernels: the kernels.
        weights: positive numbers, proportional to the probabilities of the kernels; equal by default. They must not
            depend on the choices.
    """

    kernels: tuple[Kernel, ...]
    weights: Any

    def __init__(self, kernels: Sequence[Kernel], weights: Any = None) -> None:
        _require_kernels("mixture", kernels)
        if weights is None:
            weights = jnp.ones(len(kernels))
        require_positive("mixture", "weights are positive numbers", weights, 1)
        weights = jnp.asarray(weights, float)
        if weights.shape != (len(kernels),):
            raise WeftError(f"mixture: {len(kernels)} kernels and weights of shape {weights.shape}")
        self.kernels = tuple(kernels)
        self.weights = weights

    def warm(
        self, key: PRNGKeyArray, choices: Choices, target: Target, tuning: Any, now: Phase | None
    ) -> tuple[Choices, Info, Any]:
        before = entered(choices, target)
        draw_key, move_key = jax.random.split(key)
        index = jax.random.categorical(draw_key, jnp.log(self.weights))

        def branch(i: int, kernel: Kernel) -> Any:
            def run(tuning: Any) -> tuple[Choices, Info, Any]:
                after, info, tuning = _move_part(i, kernel, move_key, before, target, tuning, now)
                after = unchanged(before, after, f"mixture: {type(kernel).__name__}")
                return after, {k: jnp.asarray(v) for k, v in info.items()}, tuning

            return run

        runs = [branch(i, kernel) for i, kernel in enumerate(self.kernels)]
        shapes: dict[str, Any] = {}
        for run in runs:
            shapes = {**jax.eval_shape(run, tuning)[1], **shapes}

        def filled(run: Any) -> Any:
            def f(tuning: Any) -> tuple[Choices, Info, Any]:
                after, info, tuning = run(tuning)
                full = {k: info.get(k, _nothing(s)).astype(s.dtype) for k, s in shapes.items()}
                return after, full, tuning

            return f

        after, info, tuning = jax.lax.switch(index, [filled(run) for run in runs], tuning)
        return after, {**info, "kernel": index}, tuning


class repeat(Combinator):
    """A kernel, several times in a row.

    The report combines those of the moves: booleans by any, counts by their sum, the rest by their mean.

    Attributes:
        kernel: the kernel.
        n: the number of moves, at least one. It may be traced.
    """

    kernel: Kernel
    n: Any

    def __check_init__(self) -> None:
        _require_kernels("repeat", [self.kernel])
        require_counts(self, n=1)

    def tuning(
        self, key: PRNGKeyArray, choices: Choices, target: Target, before: Any = None
    ) -> Any:
        return self.kernel.tuning(key, choices, target, before)

    def warm(
        self, key: PRNGKeyArray, choices: Choices, target: Target, tuning: Any, now: Phase | None
    ) -> tuple[Choices, Info, Any]:
        before = entered(choices, target)

        def once(i: Any, choices: Choices, tuning: Any) -> tuple[Choices, Info, Any]:
            own = jax.random.fold_in(key, i)
            after, info, tuning = _move(self.kernel, own, choices, target, tuning, now)
            after = unchanged(before, after, f"repeat: {type(self.kernel).__name__}")
            return after, {k: jnp.asarray(v) for k, v in info.items()}, tuning

        def body(i: Any, state: Any) -> Any:
            after, info, tuning = once(i, state[0], state[2])
            added = {
                k: x | info[k] if x.dtype == bool else x + info[k] for k, x in state[1].items()
            }
            return after, added, tuning

        shapes = jax.eval_shape(once, jnp.int32(0), before, tuning)[1]
        zeros = {k: jnp.zeros(s.shape, s.dtype) for k, s in shapes.items()}
        after, info, tuning = jax.lax.fori_loop(0, self.n, body, (before, zeros, tuning))
        mean = lambda x: x / self.n if jnp.issubdtype(x.dtype, jnp.inexact) else x  # noqa: E731
        return after, {k: mean(x) for k, x in info.items()}, tuning

    def tuned(self, values: Any) -> repeat:
        return eqx.tree_at(lambda k: k.kernel, self, self.kernel.tuned(values))


def _move(
    kernel: Kernel, key: PRNGKeyArray, choices: Choices, target: Target, tuning: Any, now: Any
) -> tuple[Choices, Info, Any]:
    """A move; a move of a warm-up if there is something to tune."""
    if tuning is None:
        return *kernel.move(key, choices, target), None
    return kernel.warm(key, choices, target, tuning, now)


def _move_part(
    i: int, kernel: Kernel, key: Any, choices: Choices, target: Target, tuning: Any, now: Any
) -> tuple[Choices, Info, Any]:
    """A move of the i-th of several kernels. `tuning` is that of all of them."""
    own = None if tuning is None else tuning.get(str(i))
    after, info, own = _move(kernel, key, choices, target, own, now)
    return after, info, tuning if own is None else {**(tuning or {}), str(i): own}


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
    """Refuse to fix choices that may be idle and depend on those that move.

    An idle choice that is given has no density. So the kernel would leave another law invariant.
    """
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
