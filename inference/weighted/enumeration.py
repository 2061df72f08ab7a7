"""Enumeration: exact inference where every latent choice has finitely many values."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from weft.inference.results.particles import Particles
from weft.inference.run.algorithm import Algorithm
from weft.ppl import Target
from weft.ppl.stage.addresses import unflatten
from weft.ppl.stage.errors import DensityError, WeftError

from .points import WeightedState, particles, record
from .proposals import live


class enumeration(Algorithm):
    r"""Exact inference by scoring every joint value of the latent choices.

    The particles are all joint values $x$ of the latent choices. Their weights are $p(x, y)$. The log evidence is
    exact:

    $$\log p(y) = \log \sum_x p(x, y)$$

    A choice that is idle (in a branch not taken) would be counted once for each of its values. So its terms are divided
    by the number of its values.

    Attributes:
        max_terms: more joint values than this are refused.
        batch_size: the number of values that are scored at once.

    Raises:
        DensityError: if a latent choice has no finite support.
        WeftError: if there are more than `max_terms` joint values.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import enumeration
        >>> @gen
        ... def model():
        ...     rain = sample("rain", dist.Bernoulli(0.2))
        ...     sample("wet", dist.Bernoulli(0.1 + 0.8 * rain))
        >>> target = model().given({"wet": 1})
        >>> exact = enumeration().run(jax.random.key(0), target, progress=False)
        >>> round(float(jax.numpy.exp(exact.log_evidence)), 3)
        0.26
    """

    max_terms: int = 1_000_000
    batch_size: int = 4096

    def __check_init__(self) -> None:
        for name in ("max_terms", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise WeftError(f"enumeration: {name} must be a positive integer, got {value!r}")
        if self.max_terms >= 2**31:
            raise WeftError("enumeration: max_terms must be below 2**31")

    def check(self, target: Target, init: Any = None) -> None:
        if init is not None:
            raise WeftError("enumeration has no starting point: it visits every value")
        if target.program.estimated:
            raise DensityError(
                f"enumeration is exact, and the density of {target.program.name!r} is estimated: sum out what "
                "it integrates (marginalize), or use importance sampling"
            )
        endless = [a for a in target.latents if target.sites[a].values is None]
        if endless:
            what = ", ".join(
                f"{a!r} ({target.sites[a].distribution}, "
                + (
                    "not finite, or not known before the model runs)"
                    if target.sites[a].is_discrete
                    else "continuous)"
                )
                for a in endless
            )
            raise DensityError(
                f"enumeration needs a finite support of every latent choice; it has none at {what}. "
                "Observe these choices, or use importance sampling"
            )
        terms = self._terms(target)
        if terms > self.max_terms:
            counts = ", ".join(
                f"{a!r} {len(values)}{f'^{size}' if size > 1 else ''}"
                for a, values, size in _supports(target)
            )
            raise WeftError(
                f"enumeration would take {terms:,} terms ({counts}), more than max_terms={self.max_terms:,}. "
                "Sum sites out one by one (marginalize), raise max_terms, or use importance sampling"
            )

    def num_iterations(self, target: Target) -> int:
        return -(-self._terms(target) // self.batch_size)

    def init(self, key: PRNGKeyArray, target: Target, init: Any = None) -> WeightedState:
        term = jax.eval_shape(lambda i: self._term(i, target), jnp.int32(0))
        return WeightedState.empty(key, self._terms(target), term)

    def step(self, key: PRNGKeyArray, state: WeightedState, target: Target) -> WeightedState:
        terms = self._terms(target)
        batch = min(self.batch_size, terms)
        first = jnp.minimum(state.iteration * batch, terms - batch)
        indices = first + jnp.arange(batch, dtype=jnp.int32)
        return state.write(first, jax.vmap(lambda i: self._term(i, target))(indices))

    def result(self, state: WeightedState, target: Target) -> Particles:
        return particles(self, state, target, self.batch_size, exact=True)

    def _terms(self, target: Target) -> int:
        return math.prod(len(values) ** size for _, values, size in _supports(target))

    def _term(self, index: Array, target: Target) -> tuple[Any, Array]:
        """The joint value at an index, and its log weight. The first latent choice varies slowest."""
        choices: dict[str, Array] = {}
        stride = self._terms(target)
        for address, values, size in _supports(target):
            strides = np.array([stride // len(values) ** (i + 1) for i in range(size)], np.int32)
            digits = (index // strides) % len(values)
            choices[address] = _place(target, address, jnp.asarray(values)[digits])
            stride //= len(values) ** size
        # Everything is given, so the key draws nothing.
        trace, log_weight = target.generate(jax.random.key(0), unflatten(choices))
        for address, values, size in _supports(target):
            counted = _take(
                target, address, live(target, trace.active, address, choices[address].ndim)
            )
            idle = size - jnp.sum(jnp.broadcast_to(counted, (size,)))
            log_weight = log_weight - idle * math.log(len(values))
        return record(target, trace), log_weight


def _supports(target: Target) -> list[tuple[str, np.ndarray, int]]:
    """For every latent choice its address, the values of one element, and the number of elements to enumerate."""
    found = []
    for address in target.latents:
        site = target.sites[address]
        missing = target.missing.get(address)
        size = math.prod(site.shape) if missing is None else missing.size
        found.append((address, site.values, size))
    return found


def _place(target: Target, address: str, values: Array) -> Array:
    """The whole value of a choice, made from its enumerated elements."""
    site = target.sites[address]
    values = values.astype(site.dtype)
    if address in target.missing:
        given = jnp.ravel(target.data[address].value)
        values = given.at[target.missing[address]].set(values)
    return values.reshape(site.shape)


def _take(target: Target, address: str, flags: Array) -> Array:
    """The flags of the enumerated elements."""
    flags = jnp.broadcast_to(flags, target.sites[address].shape).reshape(-1)
    return flags[target.missing[address]] if address in target.missing else flags
