"""Functions of choices whose means tell laws apart, and their exact means if these can be computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, PRNGKeyArray
from scipy import special
from weft.inference.results.particles import Particles
from weft.inference.weighted.enumeration import enumeration
from weft.inference.weighted.proposals import may_idle, trailing
from weft.ppl import Model, Target, marginalize
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.errors import WeftError

MAX_STATES = 64
"""Up to so many joint values, the probability of each is looked at, and not of single choices only."""

MAX_TERMS = 2**16
"""Up to so many joint values, the exact answer is the sum over them."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Where the distribution function of a continuous choice is looked at."""

Functions = Mapping[str, Callable[[dict[str, Any]], Any]]
"""Functions of latent choices, by name."""


def complete(choices: Any, target: Target, what: str) -> dict[str, Any]:
    """One draw as arrays, with every latent choice in the shape and dtype of its site."""
    flat = flatten(choices) if isinstance(choices, Mapping) else {}
    absent = [a for a in target.latents if a not in flat]
    if absent:
        found = ", ".join(map(repr, flat)) or type(choices).__name__
        raise WeftError(
            f"{what} must give the latent choices {', '.join(map(repr, target.latents))}; got {found}"
        )
    for address in target.latents:
        shape, wanted = jnp.shape(flat[address]), tuple(target.sites[address].shape)
        if shape != wanted:
            raise WeftError(f"{what} gives {address!r} with shape {shape}, the target has {wanted}")
    return unflatten(
        {a: jnp.asarray(flat[a]).astype(target.sites[a].dtype) for a in target.latents}
    )


def settled(choices: Any, target: Target, what: str) -> dict[str, Any]:
    """The latent choices of one draw. Choices in a branch that is not taken have their first value, or 0."""
    choices = complete(choices, target, what)
    if not may_idle(target):
        return choices
    trace, _ = target.generate(jax.random.key(0), choices)  # nothing is left to draw
    found, active = flatten(trace.choices), flatten(trace.active)

    def one(address: str) -> Array:
        x, values = found[address], target.sites[address].values
        counts = trailing(jnp.asarray(active[address]), x.ndim)
        return jnp.where(counts, x, jnp.asarray(0 if values is None else values[0], x.dtype))

    return unflatten({a: one(a) for a in target.latents})


# --- what is compared -------------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """Functions of settled choices: the labels of their elements, and all values in one array."""

    labels: dict[str, list[str]]
    of: Callable[[dict[str, Any]], Array]

    @property
    def names(self) -> list[str]:
        """All labels."""
        return list(itertools.chain.from_iterable(self.labels.values()))


_Part = tuple[list[str], Callable[[dict[str, Any]], Any]]


def functions_of(
    target: Target,
    exact: Particles | None,
    functions: Functions | None,
    expected: Mapping[str, Any] | None,
    what: str,
    pilot: tuple[Callable[..., Any], PRNGKeyArray] | None = None,
) -> Features:
    """The functions to compare: those of the user, or the usual ones.

    `pilot` is a function from keys to exact draws, and a key. The quantiles of choices that are not finite come from
    these draws. Without `pilot`, only functions whose mean is known are taken.
    """
    if functions is not None:
        parts = {name: _own(name, f, target) for name, f in functions.items()}
    else:
        parts = _usual(target, exact, what, pilot)
    if expected is not None:
        unknown = [name for name in expected if name not in parts]
        if unknown:
            raise WeftError(
                f"{what}: expected has {', '.join(map(repr, unknown))}, of which no function is known; there are "
                f"{', '.join(map(repr, parts))}"
            )
        parts = {name: parts[name] for name in expected}
    elif exact is None and pilot is None:
        if functions is not None:
            raise WeftError(
                f"{what}: the means of {', '.join(map(repr, functions))} are not known, since the latent choices are "
                "not finite: give them, expected={...}"
            )
        parts = {}

    def of(choices: dict[str, Any]) -> Array:
        found = [jnp.ravel(jnp.asarray(f(choices), float)) for _, f in parts.values()]
        return jnp.concatenate([jnp.zeros(0), *found])

    return Features({name: labels for name, (labels, _) in parts.items()}, of)


def _own(name: str, function: Callable[[dict[str, Any]], Any], target: Target) -> _Part:
    """A function that the user gives."""
    shape = jax.eval_shape(function, target.latent_shapes()).shape
    return [name + place for place in _places(shape)], function


def _usual(
    target: Target,
    exact: Particles | None,
    what: str,
    pilot: tuple[Callable[..., Any], PRNGKeyArray] | None,
) -> dict[str, _Part]:
    parts: dict[str, _Part] = {}
    draws = {}
    if pilot is not None:
        start, key = pilot
        keys = jax.random.split(key, 1000)
        first = jax.jit(jax.vmap(lambda k: settled(start(k), target, what)))(keys)
        draws = flatten(first)
    for address in target.latents:
        site = target.sites[address]
        places = _places(site.shape)
        if site.values is not None:
            labels = [f"{address}{p} = {_short(v)}" for p in places for v in site.values]
            parts[address] = labels, _indicators(address, site.values)
            continue
        parts[address] = [address + p for p in places], _power(address, 1)
        parts[f"{address}^2"] = [f"{address}{p}^2" for p in places], _power(address, 2)
        if address in draws:
            at = np.quantile(np.asarray(draws[address]), QUANTILES, axis=0)
            names = [f"{address}{p}" for _ in QUANTILES for p in places]
            labels = [f"{n} <= {q:.3g}" for n, q in zip(names, at.ravel(), strict=True)]
            parts[f"{address} <= quantiles"] = labels, _below(address, at)
    if pilot is not None and not target.program.estimated:
        parts["log density"] = ["log density"], target.log_density
    if exact is not None:
        latents = target.latents
        rows = jax.vmap(lambda x: _vector(settled(x, target, what), latents))(exact.choices)
        states = np.unique(np.asarray(rows), axis=0)
        if states.shape[1] > 1 and len(states) <= MAX_STATES:
            scalars = [a + p for a in latents for p in _places(target.sites[a].shape)]
            labels = [
                ", ".join(f"{a} = {_short(v)}" for a, v in zip(scalars, state, strict=True))
                for state in states
            ]
            parts["joint"] = labels, lambda x: jnp.all(_vector(x, latents) == states, axis=1)
    return parts


def _indicators(address: str, values: np.ndarray) -> Callable[[dict[str, Any]], Array]:
    return lambda choices: flatten(choices)[address][..., None] == jnp.asarray(values)


def _power(address: str, power: int) -> Callable[[dict[str, Any]], Array]:
    return lambda choices: jnp.asarray(flatten(choices)[address], float) ** power


def _below(address: str, at: np.ndarray) -> Callable[[dict[str, Any]], Array]:
    return lambda choices: flatten(choices)[address] <= at


def _vector(choices: dict[str, Any], addresses: tuple[str, ...]) -> Array:
    """All elements in a row."""
    flat = flatten(choices)
    return jnp.concatenate([jnp.ravel(jnp.asarray(flat[a], float)) for a in addresses])


def _places(shape: Any) -> list[str]:
    """The subscripts of an array's elements."""
    return ["[" + ", ".join(map(str, i)) + "]" if i else "" for i in np.ndindex(*shape)]


def _short(value: Any) -> str:
    return f"{float(value):g}"


def integral(target: Target, features: Features, choices: Any, weights: Array) -> Array:
    """Sums of all functions over weighted draws. Draws of weight zero may have any value."""
    values = jax.vmap(lambda x: features.of(settled(x, target, "the sampler")))(choices)
    w = weights[:, None]
    return jnp.sum(jnp.where(w == 0, 0, w * values.astype(w.dtype)), axis=0)


# --- the answer -------------------------------------------------------------------------------------------------------


def enumerated(target: Target) -> Particles | None:
    """All values of the latent choices with their probabilities, if they are finite and not too many."""
    every = enumeration(max_terms=MAX_TERMS)
    try:
        every.check(target)
    except WeftError:
        return None
    return every.run(jax.random.key(0), target, progress=False)


def every_value(target: Target, exact: Particles) -> dict[str, Any]:
    """The choices of an enumeration, the first of which varies slowest. Idle choices are zero."""
    flat, found = flatten(exact.choices), {}
    missing = {a: np.asarray(target.missing.get(a, range(flat[a][0].size))) for a in target.latents}
    supports = {a: np.asarray(target.sites[a].values) for a in target.latents}
    sizes = [len(supports[a]) for a in target.latents for _ in missing[a]]
    digits = np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), axis=1)
    for address in target.latents:
        x = np.array(flat[address])
        here, digits = np.split(digits, [missing[address].size], axis=1)
        x.reshape(len(x), -1)[:, missing[address]] = supports[address][here]
        found[address] = jnp.asarray(x)
    return unflatten(found)


def exact_evidence(
    target: Target, exact: Particles | None, given: float | None, what: str
) -> float:
    """The log evidence: as given, by enumeration, or by summing and integrating everything out."""
    if given is not None:
        return float(given)
    if exact is not None:
        return float(logsumexp(exact.log_weights))
    try:
        if any(data.where is not None for data in target.data.values()):
            raise WeftError("sites are observed in part")
        code, args = target.program.code()
        model = marginalize(Model(code, target.program.name), *target.latents)
        return float(model(*args).given(target.observed).log_density({}))
    except WeftError as error:
        raise WeftError(
            f"{what}: the evidence of {target.program.name!r} is not known exactly: its latent choices are not finite, "
            f"and they cannot be summed out ({error}). Give it: log_evidence=..."
        ) from error


def exact_means(
    target: Target,
    features: Features,
    exact: Particles | None,
    expected: Mapping[str, Any] | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The means of the functions under the target, and their variance if it is known."""
    if expected is not None:
        found = [np.zeros(0)]
        for name, labels in features.labels.items():
            value = np.ravel(np.asarray(expected[name], float))
            if value.size != len(labels):
                raise WeftError(
                    f"expected[{name!r}] has {value.size} elements, and the function {len(labels)}: {labels}"
                )
            found.append(value)
        return np.concatenate(found), None
    if exact is None:
        return np.zeros(0), None
    of = jax.vmap(lambda x: features.of(settled(x, target, "enumeration")))
    values = np.asarray(of(exact.choices), float)
    weights = special.softmax(np.asarray(exact.log_weights, float))
    mean = weights @ values
    return mean, weights @ (values - mean) ** 2
