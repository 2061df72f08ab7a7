"""Resampling: from weights to ancestors, so that each particle has `n W_i` offspring on average.

A scheme is a function `(key, log_weights, num_samples) -> ancestors`, an array of indices in
ascending order. All cost O(N), `multinomial`, `residual` and `killing` O(N log N). They differ in
the variance of the offspring counts `O_i` and in what is known of them:

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

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

Resampling = Callable[[PRNGKeyArray, Float[Array, " n"], int], Int[Array, " m"]]
"""What a scheme is."""


def systematic(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    r"""Positions `(k + U) / m` with one `U` for all: `O_i = ceil(m C_i - U) - ceil(m C_{i-1} - U)`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from weft.inference import systematic
        >>> log_weights = jnp.log(jnp.array([0.5, 0.25, 0.25]))
        >>> systematic(jax.random.key(0), log_weights, 4).tolist()
        [0, 0, 1, 2]
    """
    ends = _ends(log_weights, num_samples)
    return ancestors(jnp.ceil(ends - jax.random.uniform(key, (), ends.dtype)), num_samples)


def stratified(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    """Positions `(k + U_k) / m`, a uniform number in each stratum."""
    ends = _ends(log_weights, num_samples)
    stratum = jnp.clip(jnp.floor(ends).astype(int), 0, num_samples - 1)
    uniform = jax.random.uniform(key, (num_samples,), ends.dtype)
    return ancestors(stratum + (uniform[stratum] < ends - stratum), num_samples)


def multinomial(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    """Independent draws, in ascending order: the order statistics of uniform numbers come from exponential spacings."""
    ends = _ends(log_weights, 1)
    return ancestors(_below(key, ends, num_samples, num_samples), num_samples)


def residual(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    """The whole part of `m W_i` each; the rest by independent draws in proportion to the fractions."""
    expected = num_samples * jax.nn.softmax(log_weights)
    whole = jnp.floor(expected)
    left = num_samples - jnp.sum(whole).astype(int)
    fraction = jnp.cumsum(expected - whole)
    drawn = _below(key, fraction / jnp.maximum(fraction[-1], 1e-30), left, num_samples)
    return ancestors(jnp.cumsum(whole) + drawn, num_samples)


def killing(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int
) -> Int[Array, " m"]:
    """Particle `i` survives with probability `W_i / max W`; the place of a dead one goes to a draw by weight.

    Raises:
        ValueError: if the number of particles changes: each has its own place.
    """
    if num_samples != log_weights.shape[0]:
        raise ValueError(
            f"killing keeps particles in their places: {log_weights.shape[0]} cannot become {num_samples}"
        )
    live_key, draw_key = jax.random.split(key)
    relative = jnp.exp(log_weights - jnp.max(log_weights))
    dead = jax.random.uniform(live_key, relative.shape) >= relative
    # The draws come in order, and which of them are used must not depend on it: shuffle.
    drawn = jax.random.permutation(
        draw_key, multinomial(jax.random.fold_in(draw_key, 1), log_weights, num_samples)
    )
    return jnp.sort(jnp.where(dead, drawn, jnp.arange(num_samples)))


def ssp(key: PRNGKeyArray, log_weights: Float[Array, " n"], num_samples: int) -> Int[Array, " m"]:
    """The Srinivasan sampling process: fractions of two particles meet until one of them is a whole number."""
    expected = num_samples * jax.nn.softmax(log_weights)
    whole = jnp.floor(expected)
    fraction = expected - whole
    uniforms = jax.random.uniform(key, fraction.shape, fraction.dtype)

    def meet(carry, item):
        i, x = carry  # the particle that is left over so far, and its fraction
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
    extra = jnp.zeros(n).at[finished].set(values).at[last].set(jnp.round(rest))
    return ancestors(jnp.cumsum(whole + extra), num_samples)


def ancestors(ends: Float[Array, " n"] | Int[Array, " n"], num_samples: int) -> Int[Array, " m"]:
    """Indices from the cumulated numbers of offspring, without a search.

    A particle is noted where its offspring begin, and a running maximum does the rest.
    """
    ends = jnp.clip(ends.astype(int), 0, num_samples).at[-1].set(num_samples)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    # One without offspring begins where the next one does, and has the lower index.
    noted = jnp.zeros(num_samples, int).at[starts].max(jnp.arange(ends.shape[0]), mode="drop")
    return jax.lax.cummax(noted)


def _ends(log_weights: Float[Array, " n"], num_samples: int) -> Float[Array, " n"]:
    """Cumulated weights times the number of samples."""
    total = jnp.cumsum(jax.nn.softmax(log_weights))
    return num_samples * total / total[-1]


def _below(
    key: PRNGKeyArray, ends: Float[Array, " n"], count: Int[Array, ""] | int, most: int
) -> Int[Array, " n"]:
    """How many of `count` uniform numbers are below each of some ascending numbers in [0, 1]."""
    spacings = jnp.cumsum(jax.random.exponential(key, (most + 1,), ends.dtype))
    uniform = jnp.where(jnp.arange(most) < count, spacings[:-1] / spacings[count], 2.0)
    return jnp.searchsorted(uniform, ends, side="right")
