"""Resampling: from weights to ancestors, so that each particle has `n W_i` offspring on average.

A scheme is a `Resampling`: a function `(key, log_weights, num_samples) -> ancestors`, and the facts that the rest of
Weft must know of it. The function gives indices in ascending order. A particle of weight zero never has offspring, even
if sums of weights are rounded. All schemes cost O(N), but `multinomial`, `residual` and `killing` cost O(N log N). They
differ in the variance of the offspring counts `O_i`, and in what has been proved of them:

| scheme | offspring counts | take it |
| --- | --- | --- |
| `systematic` | within one of `n W_i`; one uniform number for all | the default: fast, and mostly the lowest variance |
| `stratified` | within two; one uniform number a stratum | where consistency has to be proven |
| `ssp` | within one, negatively associated | the same, of lower variance; sequential, so slow on accelerators |
| `residual` | at least the whole part of `n W_i` | |
| `killing` | the heaviest survive; few die when weights are nearly equal | many small steps of time |
| `multinomial` | independent draws | where theory asks for them: conditional SMC, variances from one run |

References:
    Douc, Cappé and Moulines (2005) for the first four; Gerber, Chopin and Whiteley (2019) for `ssp`; Del Moral (2004)
    for `killing`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

Draw = Callable[[PRNGKeyArray, Float[Array, " n"], int], Int[Array, " m"]]
"""The function of a scheme: from a key, log weights (normalised or not), and a number to that many ancestors."""


class Resampling(eqx.Module):
    """A resampling scheme: how ancestors are drawn, and what is known of the draws.

    `smc` also takes a plain function `(key, log_weights, num_samples) -> ancestors`, and wraps it as
    `Resampling(function)`. If its draws are independent, wrap it yourself and say so.

    Attributes:
        draw: the function.
        independent: whether the ancestors are independent draws by the weights, as those of `multinomial` are. Two
            lineages then meet by chance in every generation, and `log_evidence_variance` allows for that.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from weft.inference import Resampling
        >>> def by_table(key, log_weights, num_samples):
        ...     return jnp.sort(jax.random.categorical(key, log_weights, shape=(num_samples,)))
        >>> mine = Resampling(by_table, independent=True)
        >>> mine(jax.random.key(0), jnp.array([0.0, -jnp.inf]), 3).tolist()
        [0, 0, 0]
    """

    draw: Draw
    independent: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        if not callable(self.draw):
            raise TypeError(
                "resampling: expected a scheme of weft.inference (systematic, multinomial, ...) or a function (key, "
                f"log_weights, num_samples) -> ancestors, got {type(self.draw).__name__}"
            )

    @property
    def __wrapped__(self) -> Draw:
        return self.draw

    def __call__(
        self, key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
    ) -> Int[Array, " m"]:
        """The ancestors of `num_samples` particles."""
        return self.draw(key, jax.lax.stop_gradient(log_weights), num_samples)


def as_scheme(scheme: Resampling | Draw) -> Resampling:
    """A plain function as a scheme. Its draws are not assumed to be independent."""
    return scheme if isinstance(scheme, Resampling) else Resampling(scheme)


def _scheme(draw: Draw, independent: bool = False) -> Resampling:
    """A decorator: make a scheme of a function, with the function's name and docstring."""
    scheme: Any = eqx.module_update_wrapper(Resampling(draw, independent))
    return scheme


@_scheme
def systematic(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    """Positions `(k + U) / m` with a single `U`: `O_i = ceil(m C_i - U) - ceil(m C_{i-1} - U)`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from weft.inference import systematic
        >>> log_weights = jnp.log(jnp.array([0.5, 0.25, 0.25]))
        >>> systematic(jax.random.key(0), log_weights, 4).tolist()
        [0, 0, 1, 2]
    """
    weights = jax.nn.softmax(log_weights)
    ends = _cumulated(weights, num_samples)
    counts = jnp.ceil(ends - jax.random.uniform(key, (), ends.dtype))
    return ancestors(counts, weights, num_samples)


@_scheme
def stratified(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    """Positions `(k + U_k) / m`, with a uniform number in each stratum."""
    weights = jax.nn.softmax(log_weights)
    ends = _cumulated(weights, num_samples)
    stratum = jnp.clip(jnp.floor(ends).astype(int), 0, num_samples - 1)
    uniform = jax.random.uniform(key, (num_samples,), ends.dtype)
    return ancestors(stratum + (uniform[stratum] < ends - stratum), weights, num_samples)


@functools.partial(_scheme, independent=True)
def multinomial(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    """Independent draws, in ascending order. Exponential spacings give the order statistics of uniform numbers."""
    weights = jax.nn.softmax(log_weights)
    counts = _below(key, _cumulated(weights), num_samples, num_samples)
    return ancestors(counts, weights, num_samples)


@_scheme
def residual(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    """Each particle has the whole part of `m W_i` as offspring. The rest are independent draws by the fractions."""
    whole, fraction = _whole_and_fraction(log_weights, num_samples)
    left = num_samples - jnp.sum(whole)
    drawn = _below(key, _cumulated(fraction), left, num_samples)
    return ancestors(jnp.cumsum(whole) + drawn, whole + fraction, num_samples)


@_scheme
def killing(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    """Particle `i` survives with probability `W_i / max W`. A draw by weight takes the place of a dead one.

    Raises:
        ValueError: if the number of particles changes, since each has its own place.
    """
    if num_samples != log_weights.shape[0]:
        raise ValueError(
            f"killing keeps particles in their places: {log_weights.shape[0]} cannot become {num_samples}"
        )
    live_key, draw_key = jax.random.split(key)
    relative = jnp.exp(log_weights - jnp.max(log_weights))
    dead = jax.random.uniform(live_key, relative.shape) >= relative
    # The draws are sorted. Which of them are used must not depend on their order, so they are shuffled.
    drawn = jax.random.permutation(
        draw_key, multinomial(jax.random.fold_in(draw_key, 1), log_weights, num_samples)
    )
    return jnp.sort(jnp.where(dead, drawn, jnp.arange(num_samples)))


@_scheme
def ssp(key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int) -> Int[Array, " m"]:
    """The Srinivasan sampling process: the fractions of two particles meet until one becomes a whole number."""
    whole, fraction = _whole_and_fraction(log_weights, num_samples)
    uniforms = jax.random.uniform(key, fraction.shape, fraction.dtype)

    def meet(carry, item):
        i, x = carry  # the particle left over so far, and its fraction
        j, y, u = item
        up, down = jnp.minimum(y, 1 - x), jnp.minimum(x, 1 - y)
        total = up + down
        first_grows = u * total < down
        x, y = jnp.where(first_grows, x + up, x - down), jnp.where(first_grows, y - up, y + down)
        done = (x < 1e-6) | (x > 1 - 1e-6)
        finished, value = jnp.where(done, i, j), jnp.where(done, x, y)
        left = jnp.where(done, j, i), jnp.where(done, y, x)
        return left, (finished, jnp.round(value))

    n = fraction.shape[0]
    items = (jnp.arange(1, n), fraction[1:], uniforms[1:])
    (last, rest), (finished, values) = jax.lax.scan(meet, (0, fraction[0]), items)
    extra = jnp.zeros(n).at[finished].set(values).at[last].set(jnp.round(rest)).astype(int)
    return ancestors(jnp.cumsum(whole + extra), whole + fraction, num_samples)


def ancestors(
    ends: Float[Array, " n"] | Int[Array, " n"], weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    """Indices from the cumulated numbers of offspring, without a search.

    A particle's index is written where its offspring begin, and a running maximum does the rest. Particles of weight
    zero are not written. If rounding gives one of them offspring, these go to the particle before it.
    """
    starts = jnp.clip(jnp.roll(ends, 1).astype(int), 0, num_samples).at[0].set(0)
    # A particle without offspring begins where the next one does, and has the lower index.
    index = jnp.where(weights > 0, jnp.arange(weights.shape[0]), 0)
    noted = jnp.zeros(num_samples, int).at[starts].max(index, mode="drop")
    return jax.lax.cummax(noted)


def _cumulated(weights: Float[Array, " n"], whole: int = 1) -> Float[Array, " n"]:
    """The cumulated sums of the weights, as shares of `whole`. Zeros if all weights are zero."""
    total = jnp.cumsum(weights)
    return whole * total / jnp.where(total[-1] > 0, total[-1], 1.0)


def _whole_and_fraction(
    log_weights: Float[Array, " n"], num_samples: int
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The whole and the fractional part of the expected numbers of offspring, `n W_i`.

    Weights that call for a whole number give one a little below it, since their logarithms, exponentials and sum are
    rounded. So a value that is below a whole number by some tens of units in the last place counts as that number.
    """
    relative = jnp.exp(log_weights - jnp.max(log_weights))
    expected = num_samples * relative / _pairwise_sum(relative)
    rounding = 32 * jnp.finfo(expected.dtype).eps
    whole = jnp.floor(expected * (1 + rounding))
    fraction = expected - whole
    return whole.astype(int), jnp.where(fraction > expected * rounding, fraction, 0.0)


def _pairwise_sum(x: Float[Array, " n"]) -> Float[Array, ""]:
    """The sum by halves. Its rounding error grows with the logarithm of the number of terms."""
    while (n := x.shape[0]) > 1:
        half = (n + 1) // 2
        x = x[:half] + jnp.pad(x[half:], (0, 2 * half - n))
    return x[0]


def _below(
    key: PRNGKeyArray, ends: Float[Array, " n"], count: Int[Array, ""] | int, most: int
) -> Int[Array, " n"]:
    """For each of some ascending numbers in [0, 1], how many of `count` uniform numbers are below it."""
    spacings = jnp.cumsum(jax.random.exponential(key, (most + 1,), ends.dtype))
    uniform = jnp.where(jnp.arange(most) < count, spacings[:-1] / spacings[count], 2.0)
    return jnp.searchsorted(uniform, ends)
