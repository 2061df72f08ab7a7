"""What a Markov kernel is: one move of the choices of a target, which leaves the target's law invariant.

    move(key, choices, target) -> (choices, info)       with   ∫ π(dx) K(x, A) = π(A)

`choices` are all latent choices of the target, and π is its law. Nothing else is asked of a kernel, and it remembers
nothing between moves. So kernels combine: on parts of the choices, one after another, at random.

A kernel with settings that a warm-up can tune has three more methods. `tuning` gives the state of the warm-up before
the first move and after each window, `warm` moves and learns, and `tuned` makes the kernel with the values found.

A choice in a branch that is not taken, or under a mask, does not count in the density of a target. So that π is proper
all the same, an idle choice keeps its own prior here, as it does on the unconstrained scale. The law of the choices
that count is unchanged.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from weft.inference.results.draws import Draws
from weft.inference.run.adaptation import Phase
from weft.ppl import Target
from weft.ppl.programs.handlers import Evaluate, Given, expand
from weft.ppl.programs.unconstraining import EveryBranch, Unconstrain, bijection, to_support
from weft.ppl.stage.addresses import Address, covers, dotted, flatten, unflatten, unknown
from weft.ppl.stage.errors import AddressError, DensityError, ModelError
from weft.ppl.stage.interpreter import interpret
from weft.ppl.stage.modules import Module
from weft.ppl.stage.sites import Site

Choices = dict[str, Any]
Info = dict[str, Array]


class Kernel(Module):
    """Base of the kernels: settings, one move, and the settings that a warm-up tunes (none by default).

    Attributes:
        keeps_floats: whether Python floats among the settings stay Python floats, so that `if self.scale > 0` may
            stand in a method. If not, samplers trace them, and another value needs no new compilation.
    """

    keeps_floats = True

    @abc.abstractmethod
    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        """One transition. It is pure and works under `jit`, `vmap` and `scan`, with a target of traced arrays.

        Args:
            key: a random key.
            choices: a nested dict of all latent choices of the target.
            target: the target. The transition leaves its law invariant.

        Returns:
            The next choices, of the same structure, and a flat dict of scalars on what happened. "acceptance_rate" is
            one of them.
        """

    def tuning(
        self, key: PRNGKeyArray, choices: Choices, target: Target, before: Any = None
    ) -> Any:
        """The state of a warm-up before the first move, or after a window: an `AdaptationState` for each part.

        Args:
            key: a random key.
            choices: where the chain is.
            target: the target.
            before: the tuning at the end of a window. Its covariance is taken over. None before the first move.

        Returns:
            One state, or a nested dict of states by the index of the part; None if there is nothing to tune.
        """
        return None

    def warm(
        self, key: PRNGKeyArray, choices: Choices, target: Target, tuning: Any, now: Phase
    ) -> tuple[Choices, Info, Any]:
        """A move with the present values of `tuning`, and the new tuning. If `now` is in warm-up, it has learnt."""
        return *self.move(key, choices, target), tuning

    def tuned(self, values: Any) -> Kernel:
        """This kernel with the values of a warm-up, "step_size" and "inverse_mass", in dicts nested as `tuning` is."""
        return self

    def adapted(self, draws: Draws) -> Kernel:
        """This kernel as a warm-up left it: one kernel for all chains.

        Its step size is the geometric median of the chains' step sizes, and its inverse mass is the mean of theirs.

        Args:
            draws: the draws of a sampler with this kernel. Their `warmup` holds what each chain found.

        Examples:
            >>> import jax, numpyro.distributions as dist
            >>> from weft import gen, kernels, sample
            >>> from weft.inference import mcmc
            >>> @gen
            ... def narrow():
            ...     sample("x", dist.Normal(0.0, 0.01))
            >>> kernel = kernels.mala()
            >>> draws = mcmc(kernel, 10, num_warmup=300).run(jax.random.key(0), narrow().given(), progress=False)
            >>> bool(kernel.adapted(draws).step_size * draws.warmup["inverse_mass"].mean() < 1e-3)
            True
        """

        def pooled(path: Any, x: Array) -> Array:
            if getattr(path[-1], "key", None) == "step_size":
                return jnp.exp(jnp.median(jnp.log(x), axis=0))
            return jnp.mean(x, axis=0)

        return self.tuned(jax.tree_util.tree_map_with_path(pooled, draws.warmup or {}))


# --- the density that kernels leave invariant -----------------------------------------------------


def log_density(target: Target, choices: Choices) -> Float[Array, ""]:
    """The log density of all latent choices of a target, up to a constant. An idle choice keeps its own prior.

    Raises:
        DensityError: if the density of the target is estimated.
    """
    if target.program.estimated:
        raise DensityError(
            f"kernels need the density of {target.program.name!r}, which is estimated, drawn anew at each "
            "evaluation: sum out what it integrates (marginalize)"
        )
    if not idling(target):
        return target.log_density(choices)
    target.program.require_density()
    code, args = target.program.code()
    entries: dict[str, Any] = target.complete(choices)
    for address in target.latents:
        given = target.data.get(address)
        entries[address] = _Latent(entries[address], None if given is None else given.where)
    return interpret(code.jaxpr, args, _Proper(), None, unflatten(entries))[2]["log_density"]


def idling(target: Target) -> tuple[str, ...]:
    """The latent choices that may be idle: in a branch, or under a mask."""
    sites = target.sites
    return tuple(a for a in target.latents if sites[a].conditional or sites[a].masked)


@dataclasses.dataclass(frozen=True)
class _Latent:
    """The value of a latent choice. Where `where` is true it is given."""

    given: Given
    where: Any


jax.tree_util.register_dataclass(_Latent, ["given", "where"], [])


@dataclasses.dataclass(frozen=True)
class _Proper(EveryBranch):
    """The density of choices that are all known. Idle latent choices keep their own terms."""

    records = False

    def terms(self) -> dict[str, jax.Array]:
        return {"log_density": jnp.zeros(())}

    def site(self, site: Site, key: Any, given: Any) -> Any:
        latent = given if isinstance(given, _Latent) else None
        value, _, terms = Evaluate(None).site(site, key, given if latent is None else latent.given)
        term = terms.get("log_density", 0.0)
        if latent is None or site.address in self.skip:
            return value, None, {} if self.idle_branch else {"log_density": term}
        if self.idle_branch or "where" in site.parts:
            active = False if self.idle_branch else site.part("where")
            term = jnp.where(active, term, self._stand_in(site, value, latent.where))
        return value, None, {"log_density": term}

    @staticmethod
    def _stand_in(site: Site, value: Array, where: Any) -> Array:
        """The own density of an idle choice. If it is not finite, that of `unconstrain` is used, or a uniform one."""
        own = site.log_prob_anywhere(value)
        if not site.spec.discrete:
            name = ".".join(site.address)
            z = site.over_lanes(lambda p, x: bijection(p["d"], name).inv(x), value)
            jacobian = to_support(site, z)[1]
            own = Unconstrain.pseudo_prior(own + jacobian, z) - jacobian
        elif site.spec.values is not None:
            count = math.log(len(site.spec.values.value)) * math.prod(site.spec.event_shape)
            own = jnp.where(jnp.isfinite(own), own, -count)
        for given in (where, site.part("observed") if "observed" in site.parts else None):
            own = own if given is None else jnp.where(expand(given, own), 0.0, own)
        return own


# --- choices --------------------------------------------------------------------------------------


def entered(choices: Choices, target: Target) -> Choices:
    """Choices as arrays with the dtypes of their sites.

    Raises:
        AddressError: unless they are exactly the latent choices of the target.
    """
    flat = flatten(choices)
    for address in flat:
        if address not in target.latents:
            raise AddressError(unknown(address, target.latents, " among the latent choices"))
    missing = [a for a in target.latents if a not in flat]
    if missing:
        raise AddressError(f"a move takes all latent choices; missing {_listed(missing)}")
    sites = target.sites
    return unflatten({a: jnp.asarray(x, sites[a].dtype) for a, x in flat.items()})


def chosen(addresses: Iterable[Address], target: Target, who: str) -> tuple[str, ...]:
    """The latent choices that some addresses name. `"*"` and `"**"` are wildcards.

    Raises:
        AddressError: if an address names none. The message lists those that exist.
    """
    addresses = [dotted(a) for a in addresses]
    for pattern in addresses:
        if not any(covers(pattern, a) for a in target.latents):
            raise AddressError(f"{who}: {unknown(pattern, target.latents, ' among the latents')}")
    return tuple(a for a in target.latents if any(covers(p, a) for p in addresses))


def unchanged(before: Any, after: Any, who: str) -> Any:
    """The result of a kernel, or of a user's function, after a check: structure, shapes and dtypes are as before.

    Raises:
        ModelError: if they are not.
    """
    told, asked = (
        {a: (jnp.shape(x), jnp.result_type(x)) for a, x in flatten(t).items()}
        for t in (after, before)
    )
    if told != asked:
        wrong = [a for a in {**asked, **told} if told.get(a) != asked.get(a)]
        pairs = ", ".join(f"{a!r} {_form(asked.get(a))} to {_form(told.get(a))}" for a in wrong)
        raise ModelError(
            f"{who} changes what the choices are: {pairs}. Addresses, shapes and dtypes must stay"
        )
    return unflatten({a: jnp.asarray(flatten(after)[a]) for a in flatten(before)})


def pooled(infos: list[Info]) -> Info:
    """Combine the reports of several moves: booleans by any, counts by their sum, the rest by their mean."""
    names = dict.fromkeys(name for info in infos for name in info)
    return {name: _pool([info[name] for info in infos if name in info]) for name in names}


def _pool(values: list[Array]) -> Array:
    stacked = jnp.stack([jnp.asarray(v) for v in values])
    if stacked.dtype == bool:
        return stacked.any()
    return stacked.mean() if jnp.issubdtype(stacked.dtype, jnp.inexact) else stacked.sum()


def _form(what: Any) -> str:
    return "nothing" if what is None else f"{what[1]}{list(what[0])}"


def _listed(addresses: Iterable[str]) -> str:
    return ", ".join(repr(a) for a in addresses)
