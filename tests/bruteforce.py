"""Sums over all joint values of discrete choices, one by one: what exact marginalisation is held against."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl import Target
from weft.ppl.stage.addresses import flatten


def joint_values(target: Target, addresses: Iterable[str]) -> dict[str, np.ndarray]:
    """All joint values of some choices, along a leading axis; shapes are those of the choices."""
    sites = [target.sites[a] for a in addresses]
    listed = [s.values for s in sites for _ in range(s.size)]
    rows = np.array(list(itertools.product(*listed)))
    parts = np.split(rows, np.cumsum([s.size for s in sites])[:-1], axis=1)
    return {
        s.address: part.reshape(len(rows), *s.shape).astype(s.dtype)
        for s, part in zip(sites, parts, strict=True)
    }


def log_terms(target: Target, latents: Any, values: dict[str, np.ndarray]) -> jax.Array:
    """The log density of the whole program at each of the joint values.

    Copies of a choice that are idle, in a branch not taken or behind a mask, have no density; each of
    their values counts for its share, so that the sum over them is one.
    """
    return _terms(target, latents, values)[0]


def _terms(target: Target, latents: Any, values: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """The log terms, and for each copy of each choice whether it is active."""
    sites = [target.sites[a] for a in values]
    idle = any(s.conditional or s.masked for s in sites)

    def one(z: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        active = {s.address: jnp.ones(s.shape, bool) for s in sites}
        if not idle:
            return target.log_density({**latents, **z}), active
        trace, _ = target.generate(jax.random.key(0), {**latents, **z})
        share = jnp.zeros(())
        for s in sites:
            flag = jnp.asarray(flatten(trace.active)[s.address])
            flag = flag.reshape(flag.shape + (1,) * (len(s.shape) - flag.ndim))
            active[s.address] = jnp.broadcast_to(flag, s.shape)
            share += jnp.sum(~active[s.address]) * np.log(len(s.values))
        return trace.log_density - share, active

    return jax.vmap(one)({a: jnp.asarray(v) for a, v in values.items()})


def posterior(
    target: Target, latents: Any, addresses: Iterable[str]
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """The law of discrete choices given all others: joint values, their log terms, and which copies are active.

    Idle copies stand at their first value, and joint values that differ there alone are one.
    """
    values = joint_values(target, addresses)
    terms, active = jax.jit(lambda x: _terms(target, x, values))(latents)
    terms, active = np.asarray(terms), {a: np.asarray(v) for a, v in active.items()}
    values = {a: np.where(active[a], v, target.sites[a].values[0]) for a, v in values.items()}
    flat = np.concatenate([v.reshape(len(terms), -1) for v in values.values()], axis=1)
    _, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    merged = np.full(len(first), -np.inf)
    np.logaddexp.at(merged, inverse.ravel(), terms)
    return (
        {a: v[first] for a, v in values.items()},
        merged,
        {a: v[first] for a, v in active.items()},
    )


def log_evidence(target: Target, latents: Any, addresses: Iterable[str]) -> jax.Array:
    """The log of the sum over some choices, as a function of the others."""
    terms = log_terms(target, latents, joint_values(target, addresses))
    return jax.scipy.special.logsumexp(terms)


def anything(target: Target, seed: int = 0) -> dict[str, jax.Array]:
    """Values for all latent choices, by dotted address: standard normal, moved into the support."""
    rng = np.random.default_rng(seed)
    found = {}
    for address in target.latents:
        info = target.sites[address]
        value: Any = rng.normal(size=info.shape)
        name = type(info.support).__name__.lstrip("_").lower()
        if "positive" in name or "greaterthan" in name:
            value = np.exp(value)
        elif "simplex" in name:
            value = np.exp(value) / np.exp(value).sum(-1, keepdims=True)
        elif info.is_discrete:
            value = rng.choice(info.values, size=info.shape)
        known = target.data.get(address)  # in part: as in draws, the data are among the values
        found[address] = jnp.asarray(
            value if known is None else np.where(known.where, known.value, value), info.dtype
        )
    return found
