"""Checks of a sampler: proper weighting, invariance, marginals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from weft.inference.markov.kernel import idling, log_density
from weft.inference.results.draws import Draws
from weft.inference.results.particles import Particles
from weft.inference.results.weights import khat, khat_threshold
from weft.inference.run.algorithm import Algorithm
from weft.ppl import Target
from weft.ppl.stage.addresses import flatten
from weft.ppl.stage.errors import WeftError
from weft.ppl.stage.keys import as_key

from .law_functions import (
    Functions,
    complete,
    enumerated,
    every_value,
    exact_evidence,
    exact_means,
    functions_of,
    integral,
    settled,
)
from .law_report import LawReport, compare, compare_flows, compare_pairs, judged, least_error


def check_proper_weighting(
    sampler: Any,
    target: Target,
    *,
    key: PRNGKeyArray,
    functions: Functions | None = None,
    expected: Mapping[str, Any] | None = None,
    log_evidence: float | None = None,
    num_runs: int = 1000,
    batch_size: int = 100,
    traced: bool = True,
    false_alarm: float = 1e-3,
) -> LawReport:
    r"""Check that weighted draws estimate integrals under the unnormalised target $\gamma$ without bias.

    The law holds for every function $g$ and any number of particles. Write $\hat Z$ for the estimate of the evidence,
    and $W_i$ for the normalised weights. Then

    $$E[\hat Z \sum_i W_i g(x_i)] = \int g \, d\gamma.$$

    Importance sampling and every stage of sequential Monte Carlo obey it exactly. Both sides are divided by the
    evidence, so the row `"evidence"` expects one. The other functions are by default the indicators of all values of
    each finite choice, and of all joint values if there are at most 64. Together these are the whole law.

    The standard error comes from the spread of independent runs. It misleads if weights have no variance, which happens
    if the proposal has lighter tails than the target. Then the mean of the runs is too low most of the time, its error
    looks small, and a correct sampler may be refused. A note says so if the tail of the runs' evidence looks that
    heavy.

    Args:
        sampler: an algorithm whose `run(key, target)` gives `Particles`; or a function of a key that gives `Particles`
            or a pair `(choices, log_weights)`. The pair holds arrays that lead with the particle, or a single draw with
            a scalar. Its mean weight estimates the evidence.
        target: the target that is sampled.
        key: a random key.
        functions: functions by name, from the latent choices of one particle to arrays, instead of the usual ones. In a
            branch that is not taken, choices have their first value, or 0.
        expected: the means of the functions under the normalised target. If latent choices are not finite, only
            functions that are named here are compared. For a continuous choice the usual ones are `"x"` and `"x^2"`.
        log_evidence: the log evidence, if neither enumeration nor `marginalize` finds it.
        num_runs: the number of independent runs.
        batch_size: the number of runs at once. It bounds memory.
        traced: whether JAX can trace the sampler. If not, it is called run by run.
        false_alarm: the probability with which a correct sampler may be refused.

    Returns:
        The report.

    Raises:
        WeftError: if the exact answer is not known, or a draw lacks a choice or has it in another shape.

    References:
        Ścibior et al. (2018), "Denotational validation of higher-order Bayesian inference"; Naesseth, Lindsten and
        Schön (2015) for proper weighting.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample, testing
        >>> @gen
        ... def model():
        ...     rain = sample("rain", dist.Bernoulli(0.2))
        ...     sample("wet", dist.Bernoulli(0.1 + 0.8 * rain))
        >>> target = model().given({"wet": 1})
        >>> def unweighted(key):  # a draw from the prior, whose weight forgets the prior's rain
        ...     trace, log_weight = target.generate(key)
        ...     return trace.choices, 2 * log_weight
        >>> report = testing.check_proper_weighting(unweighted, target, key=jax.random.key(0))
        >>> report.passed, round(report["evidence"].estimate, 1)
        (False, 0.7)
    """
    what = "check_proper_weighting"
    _check_sizes(what, num_runs, batch_size, false_alarm)
    run, exact = _runner(sampler, target, what), enumerated(target)
    log_z = exact_evidence(target, exact, log_evidence, what)
    features = functions_of(target, exact, functions, expected, what)

    def measure(drawn: _Weighted) -> Array:
        weights = jnp.exp(drawn.log_weights - log_z)
        means = integral(target, features, drawn.choices, weights)
        return jnp.concatenate([jnp.stack([drawn.size, jnp.sum(weights)]), means])

    def once(key: PRNGKeyArray) -> _Weighted:
        result = run(key)
        if isinstance(result, Draws):
            raise WeftError(f"{what}: Draws have no weights and no evidence; take check_marginals")
        return _weighted(result, target, what)

    values = _repeat(once, measure, key, num_runs, batch_size, traced=traced)
    size, evidence, values = values[0, 0], values[:, 1], values[:, 2:]
    rounding = max(1.0, abs(log_z))
    answer, spread = exact_means(target, features, exact, expected)
    rows = [
        *compare(["evidence"], evidence[:, None], np.ones(1), rounding=rounding),
        *compare(features.names, values, answer, least_error(spread, num_runs * size), rounding),
    ]
    tail = khat(np.log(np.maximum(evidence, 1e-300)))
    notes: list[str] = []
    if tail > khat_threshold(num_runs):
        notes.append(
            f"The evidence of the runs has a heavy tail (shape {tail:.2f}), so that their spread understates the "
            "error: take a proposal with heavier tails, or more particles, before you believe a refusal."
        )
    law = "Proper weighting: integrals under the unnormalised target, over its evidence"
    return judged(law, rows, num_runs, false_alarm, notes)


def check_marginals(
    sampler: Any,
    target: Target,
    *,
    key: PRNGKeyArray,
    functions: Functions | None = None,
    expected: Mapping[str, Any] | None = None,
    num_runs: int = 30,
    batch_size: int = 30,
    traced: bool = True,
    false_alarm: float = 1e-3,
) -> LawReport:
    r"""Check that draws of a sampler have the marginals of the target.

    Each run gives the mean of every function: over all draws of all chains, or the weighted mean $\sum_i W_i g(x_i)$
    over particles. The mean over runs is compared with the exact one. Its standard error comes from the spread of the
    runs, so neither autocorrelation nor resampling has to be accounted for.

    Such means are biased in a correct sampler, too. A ratio of estimates is biased by some 1/N of the spread of $g$,
    and a Markov chain by its first point. More runs notice a smaller bias: with R runs of N draws the bias is of the
    order of $\sqrt{R / N}$ standard errors. So take few runs and many draws. `check_proper_weighting` and
    `check_invariance` have no such limit.

    Args:
        sampler: an algorithm whose `run(key, target)` gives `Draws` or `Particles`; or a function of a key that gives
            one of these or a pair `(choices, log_weights)`.
        target: the target that is sampled.
        key: a random key.
        functions: as for `check_proper_weighting`.
        expected: as for `check_proper_weighting`.
        num_runs: the number of independent runs.
        batch_size: the number of runs at once. It bounds memory.
        traced: whether JAX can trace the sampler. If not, it is called run by run.
        false_alarm: the probability with which a correct sampler may be refused if it has no bias.

    Returns:
        The report.

    Raises:
        WeftError: if the exact answer is not known, or a draw lacks a choice or has it in another shape.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample, testing
        >>> from weft.inference import importance
        >>> @gen
        ... def model():
        ...     mu = sample("mu", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(mu, 1.0))
        >>> target = model().given({"y": 2.0})  # the posterior of mu is N(1, 1/2)
        >>> testing.check_marginals(
        ...     importance(), target, key=jax.random.key(0), expected={"mu": 1.0, "mu^2": 1.5})
        Marginals: means under the target: 30 runs
                estimate  expected  error  z
          mu    ...       1         ...
          mu^2  ...       1.5       ...
        Passed: all 2 within 3.92 standard errors. ...
    """
    what = "check_marginals"
    _check_sizes(what, num_runs, batch_size, false_alarm)
    run, exact = _runner(sampler, target, what), enumerated(target)
    features = functions_of(target, exact, functions, expected, what)
    if not features.labels:
        raise WeftError(
            f"{what}: the latent choices of {target.program.name!r} are not finite, so what is expected of them has "
            'to be given: expected={"x": mean, "x^2": mean of the square}, by address'
        )

    def measure(drawn: _Weighted) -> Array:
        weights = jax.nn.softmax(drawn.log_weights)
        means = integral(target, features, drawn.choices, weights)
        return jnp.concatenate([drawn.size[None], means])

    def once(key: PRNGKeyArray) -> _Weighted:
        return _weighted(run(key), target, what)

    values = _repeat(once, measure, key, num_runs, batch_size, traced=traced)
    size, values = values[0, 0], values[:, 1:]
    answer, spread = exact_means(target, features, exact, expected)
    rows = compare(features.names, values, answer, least_error(spread, num_runs * size))
    return judged("Marginals: means under the target", rows, num_runs, false_alarm)


def check_invariance(
    kernel: Any,
    target: Target,
    *,
    key: PRNGKeyArray,
    draw: Callable[[PRNGKeyArray], dict[str, Any]] | None = None,
    functions: Functions | None = None,
    num_steps: int = 1,
    reversible: bool = False,
    num_runs: int = 20_000,
    batch_size: int = 1000,
    traced: bool = True,
    false_alarm: float = 1e-3,
) -> LawReport:
    r"""Check that a Markov kernel leaves the law $p$ of the target invariant: $\sum_x p(x) K(x, \cdot) = p$.

    Every run starts at an exact draw $x$ of the target, and goes to $x'$. Then $E[g(x') - g(x)] = 0$ for every function
    $g$. If the kernel is reversible, $E[g(x) h(x') - h(x) g(x')] = 0$ for every two functions. The differences of each
    run are averaged, so a kernel with small steps is tested as sharply as one with large steps. For indicators of
    values these are McNemar's test, and Bowker's test of detailed balance. With a reversible kernel the differences are
    symmetric about zero, and then the test keeps its size whatever the tails.

    The default functions are, for each finite choice, the indicators of all its values, and of all joint values if
    there are at most 64. For other choices they are the elements, their squares, and whether they are below each of
    five quantiles. The log density is always one of the functions.

    Invariance is not convergence: a kernel that never moves passes.

    Args:
        kernel: a kernel with `move(key, choices, target)`, or a function `(key, choices, target)`. It gives the next
            choices, or a pair of them and anything else.
        target: the target whose law is to stay invariant.
        key: a random key.
        draw: a function from a key to an exact draw of the target's latent choices. It is needed if they are not
            finite. A choice in a branch that is not taken must be drawn from its prior there.
        functions: functions by name, from the latent choices to arrays, instead of the usual ones.
        num_steps: the number of times that the kernel is applied. More steps let small errors add up.
        reversible: whether to test detailed balance, too.
        num_runs: the number of independent runs.
        batch_size: the number of runs at once. It bounds memory.
        traced: whether JAX can trace the kernel. If not, it is called run by run.
        false_alarm: the probability with which a correct kernel may be refused.

    Returns:
        The report. Its column "expected" has the means before the moves.

    Raises:
        WeftError: if there are no exact draws, or if a move changes the structure, shapes or dtypes of the choices.

    References:
        Geweke (2004), "Getting it right", for tests of this kind; McNemar (1947); Bowker (1948).

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample, testing
        >>> @gen
        ... def coin():
        ...     sample("z", dist.Bernoulli(0.8))
        >>> def metropolis(key, choices, target):
        ...     flipped = {"z": 1 - choices["z"]}
        ...     ratio = jax.numpy.exp(target.log_density(flipped) - target.log_density(choices))
        ...     return {"z": jax.numpy.where(jax.random.uniform(key) < ratio, flipped["z"], choices["z"])}
        >>> def careless(key, choices, target):  # always moves
        ...     return {"z": 1 - choices["z"]}
        >>> target = coin().given({})
        >>> [testing.check_invariance(k, target, key=jax.random.key(0)).passed for k in (metropolis, careless)]
        [True, False]
    """
    what = "check_invariance"
    _check_sizes(what, num_runs, batch_size, false_alarm)
    if not isinstance(num_steps, (int, np.integer)) or num_steps < 1:
        raise WeftError(f"{what}: num_steps must be a positive integer, got {num_steps!r}")
    key, pilot_key = jax.random.split(as_key(key))
    exact = enumerated(target)
    start = _starter(target, exact, draw)
    move = _mover(kernel, target)
    features = functions_of(target, exact, functions, None, what, pilot=(start, pilot_key))

    def once(key: PRNGKeyArray) -> Any:
        start_key, key = jax.random.split(key)
        first = start(start_key)
        loop = jax.lax.fori_loop if traced else _plain_loop
        return first, loop(0, num_steps, lambda i, x: move(jax.random.fold_in(key, i), x), first)

    def measure(pair: Any) -> Array:
        return jnp.stack([features.of(settled(x, target, what)) for x in pair])

    values = _repeat(once, measure, key, num_runs, batch_size, traced=traced)
    before, after = values[:, 0], values[:, 1]
    rows = compare_pairs(features.names, before, after)
    if reversible:
        few = len(features.labels.get("joint", features.names))  # which come last
        rows += compare_flows(features.names[-few:], before[:, -few:], after[:, -few:])
    moved = np.mean(np.any(before != after, axis=1))
    note = f"The kernel moved in {moved:.0%} of the runs."
    return judged("Invariance: means after and before", rows, num_runs, false_alarm, [note])


# --- runs -------------------------------------------------------------------------------------------------------------


class _Weighted(NamedTuple):
    """Draws `(particle, ...)`, weights that sum to the evidence, and the number of draws (infinite if exact)."""

    choices: dict[str, Any]
    log_weights: Array
    size: Array


def _runner(sampler: Any, target: Target, what: str) -> Callable[[PRNGKeyArray], Any]:
    if isinstance(sampler, Algorithm):
        return lambda key: sampler.run(key, target, progress=False)
    if hasattr(sampler, "run"):
        return lambda key: sampler.run(key, target)
    if callable(sampler):
        return sampler
    raise TypeError(
        f"{what}: a sampler is an algorithm with run(key, target), or a function of a key; got "
        f"{type(sampler).__name__}"
    )


def _weighted(result: Any, target: Target, what: str) -> _Weighted:
    """The result of a run, in one form."""
    exact = False
    if isinstance(result, Draws):
        choices = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), result.choices)
        log_weights = jnp.zeros(math.prod(result.lead))
    elif isinstance(result, Particles):
        choices, log_weights, exact = result.choices, result.log_weights, result.exact
        if result.log_evidence is not None:
            log_weights = result.log_evidence + jax.nn.log_softmax(log_weights)
            # With no weight at all the shares are not numbers.
            log_weights = jnp.where(result.log_evidence == -jnp.inf, -jnp.inf, log_weights)
            return _sized(choices, log_weights, target, what, exact=exact)
    elif isinstance(result, tuple) and len(result) == 2:
        choices, log_weights = result[0], jnp.asarray(result[1])
        if log_weights.ndim == 0:
            choices, log_weights = jax.tree.map(
                lambda x: jnp.asarray(x)[None], (choices, log_weights)
            )
    else:
        raise TypeError(
            f"{what}: a sampler gives Draws, Particles or a pair (choices, log_weights); got {type(result).__name__}"
        )
    log_weights = log_weights - math.log(log_weights.shape[0])
    return _sized(choices, log_weights, target, what, exact=exact)


def _sized(
    choices: Any, log_weights: Array, target: Target, what: str, *, exact: bool
) -> _Weighted:
    flat, count = flatten(choices), log_weights.shape[0]
    for address, value in flat.items():
        if jnp.shape(value)[:1] != (count,):
            raise WeftError(
                f"{what}: {address!r} has shape {jnp.shape(value)}, which does not lead with the {count} log weights"
            )
    size = jnp.asarray(math.inf if exact else count, log_weights.dtype)
    return _Weighted({a: flat[a] for a in flat if a in target.latents}, log_weights, size)


def _repeat(
    once: Callable[[PRNGKeyArray], Any],
    measure: Callable[[Any], Array],
    key: PRNGKeyArray,
    num_runs: int,
    batch_size: int,
    *,
    traced: bool,
) -> np.ndarray:
    """The measurements of independent runs, `(run, ...)`."""
    keys = jax.random.split(as_key(key), num_runs)
    if not traced:
        measured = jax.jit(measure)
        return np.stack([np.asarray(measured(once(k))) for k in keys])

    @jax.jit
    def every(keys: PRNGKeyArray) -> Array:
        return jax.lax.map(lambda k: measure(once(k)), keys, batch_size=min(batch_size, num_runs))

    return np.asarray(every(keys))


def _plain_loop(start: int, stop: int, body: Callable[[int, Any], Any], x: Any) -> Any:
    for i in range(start, stop):
        x = body(i, x)
    return x


def _starter(
    target: Target, exact: Particles | None, draw: Callable[[PRNGKeyArray], Any] | None
) -> Callable[[PRNGKeyArray], dict[str, Any]]:
    """Exact draws of the target."""
    what = "check_invariance"
    if draw is not None:
        return lambda key: complete(draw(key), target, f"{what}: draw")
    if exact is None:
        raise WeftError(
            f"{what}: the latent choices of {target.program.name!r} are not finite, so exact draws of the target have "
            "to be given: draw=, a function from a key to choices"
        )

    choices, log_weights = exact.choices, exact.log_weights
    if idling(target):  # kernels let an idle choice keep its prior
        choices = every_value(target, exact)
        log_weights = jax.vmap(lambda x: log_density(target, x))(choices)

    def drawn(key: PRNGKeyArray) -> dict[str, Any]:
        i = jax.random.categorical(key, log_weights)
        return jax.tree.map(lambda x: x[i], choices)

    return drawn


def _mover(kernel: Any, target: Target) -> Callable[[PRNGKeyArray, Any], dict[str, Any]]:
    """One transition of a kernel, as a function of a key and choices."""
    function = getattr(kernel, "move", kernel)
    if not callable(function):
        raise TypeError(
            "check_invariance: a kernel has move(key, choices, target), or is a function of these; got "
            f"{type(kernel).__name__}"
        )

    def move(key: PRNGKeyArray, choices: dict[str, Any]) -> dict[str, Any]:
        moved = function(key, choices, target)
        moved = moved[0] if isinstance(moved, tuple) else moved
        return complete(moved, target, "check_invariance: the kernel")

    return move


def _check_sizes(what: str, num_runs: int, batch_size: int, false_alarm: float) -> None:
    for name, value, least in (("num_runs", num_runs, 2), ("batch_size", batch_size, 1)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise WeftError(f"{what}: {name} must be an integer, at least {least}, got {value!r}")
    if not 0 < false_alarm < 1:
        raise WeftError(f"{what}: false_alarm is a probability, got {false_alarm!r}")
