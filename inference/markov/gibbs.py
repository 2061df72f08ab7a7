"""Gibbs sampling: exact draws of some choices given all others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from weft.inference.run.settings import require_counts
from weft.ppl import Model, Program, Target, condition, marginalize, observed
from weft.ppl.analysis.dependence import site_inputs
from weft.ppl.exact.recovery import posterior
from weft.ppl.stage.addresses import Address, dotted, flatten, unflatten
from weft.ppl.stage.errors import DensityError, ModelError, WeftError
from weft.ppl.stage.interpreter import Handler
from weft.ppl.stage.sites import Site
from weft.ppl.transforms.rewriting import Rewrite, Transformed

from .kernel import Choices, Info, Kernel, chosen, entered, idling, log_density


class gibbs(Kernel):
    r"""A joint, exact draw of some choices from $\pi(x_B \mid x_{-B})$.

    It sums out finite choices and integrates out normal, beta, gamma, ... choices with conjugate data, as `marginalize`
    does. Then it draws them as `recover` does. Elements of a plate that do not interact are drawn one by one, and
    chains in a `scan` by forward filtering and backward sampling. If none of this is possible and all choices are
    finite, their joint values are listed.

    Attributes:
        addresses: the addresses of the choices that are drawn. `"*"` and `"**"` are wildcards.
        max_terms: the most joint values that may be listed.

    Raises:
        AddressError: for an address that is not a latent choice.
        DensityError: if there is no exact draw. The message gives the reason.

    References:
        Geman and Geman (1984).

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> @gen
        ... def mixture():
        ...     mu = sample("mu", dist.Normal(0.0, 3.0).expand([2]))
        ...     z = sample("z", dist.Bernoulli(0.5).expand([4]))
        ...     sample("y", dist.Normal(mu[z], 0.1))
        >>> target = mixture().given({"y": jnp.array([-1.0, -1.0, 2.0, 2.0])})
        >>> now = {"mu": jnp.array([-1.0, 2.0]), "z": jnp.array([1, 1, 1, 1])}
        >>> after, info = kernels.gibbs("z").move(jax.random.key(0), now, target)
        >>> after["z"].tolist()
        [0, 0, 1, 1]
    """

    addresses: tuple[str, ...] = eqx.field(static=True)
    max_terms: int = eqx.field(static=True)

    def __init__(self, *addresses: Address, max_terms: int = 10_000) -> None:
        if not addresses:
            raise WeftError("gibbs(address, ...) takes at least one address")
        self.addresses = tuple(dotted(a) for a in addresses)
        self.max_terms = max_terms
        require_counts(self, max_terms=0)

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        choices = entered(choices, target)
        moved = chosen(self.addresses, target, "gibbs")
        try:
            found = _recovered(key, choices, target, moved)
        except (DensityError, ModelError) as reason:
            self._require_few(target, moved, reason)
            found = _listed(key, choices, target, moved)
        return unflatten({**flatten(choices), **found}), {"acceptance_rate": jnp.ones(())}

    def _require_few(self, target: Target, moved: tuple[str, ...], reason: Exception) -> None:
        """Refuse to list joint values that are infinitely many, or too many."""
        names = ", ".join(map(repr, moved))
        if target.program.estimated or any(target.sites[a].values is None for a in moved):
            raise DensityError(f"gibbs: there is no exact draw of {names}: {reason}") from reason
        counts = [(len(target.sites[a].values), target.sites[a].size) for a in moved]  # pyright: ignore
        terms = math.prod(k**n for k, n in counts)
        if terms > self.max_terms:
            told = " * ".join(f"{k}^{n}" for k, n in counts)
            raise DensityError(
                f"gibbs: {names} would have to be listed, {told} joint values, more than "
                f"max_terms={self.max_terms:,}, since: {reason}. Draw fewer at once, cycle(gibbs(...), gibbs(...))"
            ) from reason


# --- by summing out -------------------------------------------------------------------------------


def _recovered(
    key: PRNGKeyArray, choices: Choices, target: Target, moved: tuple[str, ...]
) -> dict[str, Array]:
    """Draw, by address, from the program with the choices summed out."""
    _require_plain(target, moved)
    entries = target.complete(choices)
    given = {a: g for a, g in entries.items() if a not in moved}
    # This also finds choices that the model itself has summed out.
    found = posterior(_without(target, moved).staged(), key, given, "sample")
    return {a: found[a] for a in moved}


def _without(target: Target, moved: tuple[str, ...]) -> Program:
    """The target's program with choices summed out. It returns nothing, since its return value may depend on them."""
    code, args = target.program.code()

    def silent(*args: Any) -> None:
        code(*args)

    known = {a: target.data[a] for a in moved if a in target.data}
    data = {a: observed(g.value, where=g.where) for a, g in known.items()}
    whole: Any = condition(silent, data) if data else silent
    return Model(marginalize(_Folded(whole), *moved), target.program.name)(*args)


def _require_plain(target: Target, moved: tuple[str, ...]) -> None:
    """Refuse to sum out choices if the result would be another sum than the one a kernel needs."""
    program = target.program
    if program.estimated:
        raise DensityError(f"the density of {program.name!r} is estimated")
    jaxpr = program.code()[0].jaxpr
    read = site_inputs(jaxpr)
    near = {*moved, *(a for a, inputs in read.items() if inputs & set(moved))}
    idle = [a for a in idling(target) if a in near]
    if idle:
        raise ModelError(f"{', '.join(map(repr, idle))} may be idle, in a branch or under a mask")


@dataclasses.dataclass(frozen=True)
class _Fold(Rewrite):
    """Make the scale of a site part of its density. Summing out first and scaling then would give another law."""

    def payload(self, site: Site, payload: dict[str, Any], given: Any) -> dict[str, Any]:
        scale = payload.pop("scale", ())
        if site.spec.kind == "factor":
            payload["weight"] = math.prod(scale, start=payload["weight"])
        elif scale:
            payload["d"] = Scaled(payload["d"], math.prod(scale))
        return payload


class _Folded(Transformed):
    def handler(self, table: dict[str, Any]) -> tuple[Handler, dict[str, Any]]:
        return _Fold(), {}


class Scaled(eqx.Module):
    """A distribution whose log density is scaled."""

    base: Any
    scale: Any

    @property
    def support(self) -> Any:
        """The support of the distribution."""
        return self.base.support

    def sample(self, key: PRNGKeyArray) -> Any:
        """A draw of the distribution."""
        return self.base.sample(key)

    def log_prob(self, value: Any) -> Array:
        """The scaled log density."""
        return self.base.log_prob(value) * self.scale


# --- by listing -----------------------------------------------------------------------------------


def _listed(
    key: PRNGKeyArray, choices: Choices, target: Target, moved: tuple[str, ...]
) -> dict[str, Array]:
    """A draw among all joint values, by address."""
    table = _joint_values(target, moved)
    flat = flatten(choices)

    def weigh(values: dict[str, Array]) -> Array:
        return log_density(target, unflatten({**flat, **values}))

    terms = len(table[moved[0]])
    log_weights = jax.lax.map(weigh, table, batch_size=min(terms, 1024))
    index = jax.random.categorical(key, log_weights)
    found = {a: values[index] for a, values in table.items()}
    # For a site observed in part, every value is listed once for each value of the observed elements.
    whole = target.complete(unflatten({**flat, **found}))
    return {a: jnp.asarray(whole[a].value, found[a].dtype) for a in moved}


def _joint_values(target: Target, moved: tuple[str, ...]) -> dict[str, Array]:
    """All joint values of some finite choices, each of shape `(terms, *shape)`."""
    sites = [target.sites[a] for a in moved]
    radices = [len(s.values) for s in sites for _ in range(s.size)]  # pyright: ignore
    terms = math.prod(radices)
    digits = np.array(np.unravel_index(np.arange(terms), radices)).reshape(len(radices), terms).T
    ends = np.cumsum([0, *(s.size for s in sites)])
    return {
        a: jnp.asarray(np.asarray(s.values)[digits[:, i:j]].reshape(terms, *s.shape), s.dtype)
        for a, s, i, j in zip(moved, sites, ends[:-1], ends[1:], strict=True)
    }
