r"""The sources of a gradient's noise: the variance that each choice contributes.

An estimator `g` of a gradient is a function of independent noises, one for each address: the keys of its choices. The
contribution of the choice at an address is the part of the variance of `g` that vanishes once its noise is integrated
out,

    C_s = E [ tr Var(g | the noise of all other addresses) ] = 1/2 E || g - g_s ||^2,

where `g_s` is `g` with only the noise at `s` drawn again. It is the numerator of the total Sobol index of `s` (Jansen
1999; Saltelli et al. 2010, table 2, row f). The trace is a sum over all parameters that are optimised, on the scale on
which they are optimised: R^n for a constrained one. If all noise is drawn again, the same formula gives the whole
variance `V = tr Var(g)`. The shares `C_s / V` add up to one if each choice adds noise of its own. They add up to more
if choices multiply each other's noise.

Signal to noise is `||E g||^2 / V` of one gradient. At a maximum of the bound it is zero by definition. Only `V` counts
there: together with the learning rate it sets how far the parameters scatter. The signal is estimated by
`||mean of g||^2 - V / n`, over the `n` gradients that were drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from weft.ppl.expectations.sensitivity import Choice, Probe, probed
from weft.ppl.programs.printing import Printed, table
from weft.ppl.stage.errors import WeftError
from weft.ppl.stage.keys import as_key
from weft.ppl.stage.packing import pack
from weft.ppl.stage.staging import stage

from .advice import advice
from .jumps import Jump, find_jumps
from .minibatches import Minibatches
from .parameters import partition, unwrap

BATCH = "(minibatch)"
"""The row of the noise of minibatches."""

ALL = "(all)"


@dataclasses.dataclass(frozen=True)
class Row:
    """The contribution of one choice to the noise of the gradient.

    Attributes:
        address: the address of the choice; `"(minibatch)"` for the rows of data.
        strategy: the name of its gradient strategy.
        size: its number of scalars.
        variance: `C_s`. `error` is its standard error.
        share: `C_s / V`. `share_error` is at least the standard error of this ratio of two estimates.
        signal_to_noise: `||E g||^2 / C_s`; infinite if the choice contributes nothing.
        jumps: the places where the objective jumps along the reparametrised draw.
        suggestion: what may help, in words; empty if nothing is needed.
    """

    address: str
    strategy: str
    size: int
    variance: float
    error: float
    share: float
    share_error: float
    signal_to_noise: float
    jumps: tuple[Jump, ...]
    suggestion: str


@dataclasses.dataclass(frozen=True)
class GradientReport(Printed):
    """The noise of a gradient, choice by choice. It prints as a table.

    Attributes:
        rows: one for each choice, in the order of the program.
        variance: `V`, the sum of the variances over all parameters. `error` is its standard error.
        signal: an estimate of `||E g||^2`.
        num_samples: the number of gradients that were drawn.
        num_failed: the number of gradients that were not finite. They are left out.
    """

    rows: tuple[Row, ...]
    variance: float
    error: float
    signal: float
    num_samples: int
    num_failed: int

    def __getitem__(self, address: str) -> Row:
        """The row of a choice."""
        for row in self.rows:
            if row.address == address:
                return row
        raise KeyError(
            f"no choice at {address!r}; there are {', '.join(r.address for r in self.rows)}"
        )

    @property
    def signal_to_noise(self) -> float:
        """`||E g||^2 / V` of one gradient."""
        return _ratio(self.signal, self.variance)

    def __repr__(self) -> str:
        lines = [
            f"Gradient: variance {self.variance:.3g} +- {self.error:.1g} (all parameters together), signal to noise "
            f"{self.signal_to_noise:.2g}, by {self.num_samples} draws."
        ]
        if self.num_failed:
            lines.append(f"{self.num_failed} of them were not finite and are left out.")
        if self.rows:
            header = ["choice", "strategy", "scalars", "variance", "share", "signal/noise"]
            cells = [
                [
                    r.address,
                    r.strategy,
                    str(r.size),
                    f"{r.variance:.3g} +- {r.error:.1g}",
                    f"{r.share:.0%} +- {r.share_error:.0%}",
                    f"{r.signal_to_noise:.2g}",
                ]
                for r in self.rows
            ]
            lines.append(table(header, cells))
        else:
            lines.append("No choice of an expectation stands behind it.")
        for row in self.rows:
            lines += [f"{row.address}: {jump}" for jump in row.jumps]
            if row.suggestion:
                lines.append(f"{row.address}: {row.suggestion}")
        return "\n".join(lines)


def gradient_report(
    key: PRNGKeyArray,
    objective: Callable[..., Any],
    params: Any,
    *batch: Any,
    num_samples: int = 200,
    batch_size: int | None = None,
) -> GradientReport:
    r"""Where the noise of an objective's gradient comes from, and what may help.

    For each choice the report has its gradient strategy, the variance that it contributes, the ratio of signal to that
    noise, and a suggestion in words. The contribution of a choice is `C_s = 1/2 E || g - g_s ||^2`, where `g_s` is the
    gradient `g` with only the noise of that choice drawn again. If the objective jumps along the path of a
    reparametrised draw, the gradient is silently biased. The report names the place.

    Args:
        key: a random key.
        objective: an estimator `f(key, params, *batch)`, as for `fit`. Its expectations are made by `expect`.
        params: the parameters to look at, as for `fit`, with wrappers.
        *batch: the data that the objective takes.
        num_samples: the number of gradients that are drawn, and as many again for each choice.
        batch_size: the number of rows of data in a step, if `fit` is to take minibatches. They have a row of their own
            in the report.

    Returns:
        The report.

    Raises:
        WeftError: if nothing is to be optimised, or no gradient is finite.

    References:
        Jansen (1999), "Analysis of variance designs for model output"; Saltelli et al. (2010).

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, gradients, sample
        >>> from weft.inference import elbo, gradient_report
        >>> @gen
        ... def model():
        ...     z = sample("z", dist.Bernoulli(0.3))
        ...     sample("y", dist.Normal(sample("x", dist.Normal(2.0 * z, 1.0)), 0.5))
        >>> @gen
        ... def guide(params):
        ...     z = sample("z", dist.Bernoulli(logits=params["logit"]))
        ...     sample("x", dist.Normal(params["x"][0] + z * params["x"][1], 0.5))
        >>> objective = elbo(model().given({"y": 1.5}), guide)
        >>> report = gradient_report(jax.random.key(0), objective, {"logit": 0.0, "x": (0.0, 1.0)})
        >>> [(row.address, row.strategy) for row in report.rows]
        [('z', 'score'), ('x', 'reparam')]
        >>> report["z"].suggestion
        'take gradients.enum: the sum over its 2 values has no noise of this choice'
    """
    if not isinstance(num_samples, (int, np.integer)) or num_samples < 2:
        raise WeftError(
            f"gradient_report: num_samples must be an integer, at least 2, got {num_samples!r}"
        )
    key = as_key(key)
    batches = Minibatches.make(batch, batch_size)
    value, values, num_free = _by_arrays(objective, params, batches)
    arrays = [*values, *batches.example_arrays()]
    with probed(Probe()) as met:
        jax.eval_shape(value, key, *arrays)
    choices = met.choices
    addresses = tuple(choices)
    gradient = _gradient(value, addresses, num_free)
    code, captured = stage(gradient, [key, jnp.int32(0), *arrays])
    measured = _measure(
        _Measured(code, captured, values, batches, len(addresses)), key, int(num_samples)
    )
    means, squares, good, mean = jax.tree.map(np.asarray, measured)
    if not good:
        raise WeftError(f"gradient_report: none of {num_samples} gradients was finite")
    errors = np.sqrt(np.maximum(squares - means**2, 0) / max(good - 1, 1))
    variance = float(means[-1])
    signal = max(
        float(sum(np.sum(np.square(x, dtype=float)) for x in mean)) - variance / (2 * good), 0.0
    )
    jumps = find_jumps(jax.random.fold_in(key, 2), value, arrays, choices)
    rows = []
    listed: list[str] = [*addresses, *([BATCH] if batch_size is not None else [])]
    for i, address in enumerate(listed):
        choice, c = choices.get(address), float(means[i])
        share = c / variance if variance > 0 else 0.0
        rows.append(
            Row(
                address,
                _name(choice),
                batch_size or 0 if choice is None else choice.size,
                c,
                float(errors[i]),
                share,
                share * float(np.hypot(errors[i] / c, errors[-1] / variance)) if share > 0 else 0.0,
                _ratio(signal, c),
                jumps.get(address, ()),
                advice(choice, share, bool(jumps.get(address)), objective),
            )
        )
    return GradientReport(
        tuple(rows), variance, float(errors[-1]), signal, int(num_samples), int(num_samples - good)
    )


def _by_arrays(
    objective: Callable[..., Any], params: Any, batches: Minibatches
) -> tuple[Callable[..., Array], list[Array], int]:
    """The objective as a function of a key and arrays: those of the parameters, then those of a batch.

    Also the arrays of the parameters, and the number of those that are optimised. They come first.
    """
    free, rest = partition(params)
    if not jax.tree.leaves(free):
        raise WeftError("gradient_report: the parameters hold no floating array to optimise")
    moving, skeleton = pack(free)
    others, rest_skeleton = pack(rest)
    n, m = len(moving), len(others)

    def value(key: PRNGKeyArray, *arrays: Array) -> Array:
        free = skeleton.unpack(arrays[:n])
        rest = rest_skeleton.unpack(arrays[n : n + m])
        return objective(key, unwrap(eqx.combine(free, rest)), *batches.unpack(arrays[n + m :]))

    return value, [*moving, *others], n


def _gradient(
    value: Callable[..., Array], addresses: tuple[str, ...], num_free: int
) -> Callable[..., list[Array]]:
    """The gradient of `value` as a function of a key, the index of the choice that is drawn again, and its arrays."""

    def gradient(key: PRNGKeyArray, which: Any, *arrays: Array) -> list[Array]:
        def loss(moving: list[Array]) -> Array:
            with probed(Probe(addresses, which, salt=jnp.uint32(1))):
                return value(key, *moving, *arrays[num_free:])

        return jax.grad(loss)(list(arrays[:num_free]))

    return gradient


class _Measured(eqx.Module):
    """The gradient as compiled code: `code(*captured, key, which, *params, *batch)`."""

    code: Any = eqx.field(static=True)
    captured: list[Array]
    params: list[Array]
    batches: Minibatches
    num_addresses: int = eqx.field(static=True)


@eqx.filter_jit
def _measure(
    f: _Measured, key: PRNGKeyArray, num_samples: int
) -> tuple[Array, Array, Array, list[Array]]:
    """Means of `1/2 ||g - g_s||^2` and of its square, for every address, for the batch, and for all together.

    Also the number of finite draws, and the mean of the gradients.
    """
    batches = f.batches
    # The noise that is drawn again: none; each address; the batch; all of it.
    which = [-1, *range(f.num_addresses)]
    other_batch = [False] * len(which)
    if batches.batch_size is not None:
        which, other_batch = [*which, -1], [*other_batch, True]
    which, other_batch, num = [*which, -1], [*other_batch, False], len(which)

    def at(case: tuple[PRNGKeyArray, Any, Any]) -> list[Array]:
        key, which, other_batch = case
        rows_key = jax.random.fold_in(key, jnp.where(other_batch, 2, 1))
        # Each draw is the first step of an epoch of its own.
        rows = batches.take(batches.shuffle(rows_key, 0, batches.order()), 0)
        return f.code(*f.captured, jax.random.fold_in(key, 0), which, *f.params, *rows)

    def draw(total: Any, i: Any) -> Any:
        own, fresh = (jax.random.fold_in(jax.random.fold_in(key, j), i) for j in range(2))
        keys = jnp.stack([own] * num + [fresh])
        found = jax.lax.map(at, (keys, jnp.array(which, jnp.int32), jnp.array(other_batch)))
        apart = [jnp.reshape((x[1:] - x[0]) ** 2, (num, -1)) for x in found]
        distances = sum((jnp.sum(x, 1) for x in apart), jnp.zeros(num)) / 2
        finite = jnp.all(jnp.isfinite(distances))
        means, squares, good, mean = total
        kept = jnp.where(finite, distances, 0.0)
        added = [
            m + jnp.where(finite, (x[0] + x[-1]) / 2, 0.0) for m, x in zip(mean, found, strict=True)
        ]
        return (means + kept, squares + kept**2, good + finite, added), None

    zeros = [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(at, (key, jnp.int32(0), False))]
    start = (jnp.zeros(num), jnp.zeros(num), jnp.int32(0), zeros)
    (means, squares, good, mean), _ = jax.lax.scan(draw, start, jnp.arange(num_samples))
    n = jnp.maximum(good, 1)
    return means / n, squares / n, good, [m / n for m in mean]


def _name(choice: Choice | None) -> str:
    if choice is None:
        return ""
    if choice.strategy is None:
        return "estimated"
    return type(choice.strategy).__name__.lower()


def _ratio(signal: float, noise: float) -> float:
    return signal / noise if noise > 0 else float("inf")
