"""Kernels that propose and accept: Metropolis-Hastings with a program as proposal, and its form with an involution."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray
from weft.ppl import Program, Target
from weft.ppl.stage.addresses import flatten, unflatten, unknown
from weft.ppl.stage.errors import AddressError, DensityError, WeftError

from .kernel import Choices, Info, Kernel, entered, log_density, unchanged


class Metropolis(Kernel):
    """Base of the kernels that propose, and accept with probability `min(1, exp(log_ratio))`."""

    @abc.abstractmethod
    def propose(
        self, key: PRNGKeyArray, choices: Choices, target: Target
    ) -> tuple[Choices, Float[Array, ""], Info]:
        """The proposed choices, the log ratio of their acceptance, and the report."""

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        propose_key, accept_key = jax.random.split(key)
        before = entered(choices, target)
        after, log_ratio, info = self.propose(propose_key, before, target)
        # NaN, as from a density that is zero at both ends, is a rejection.
        rate = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
        accepted = jax.random.uniform(accept_key, (), rate.dtype) < rate
        after = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), after, before)
        return after, {"acceptance_rate": rate, "accepted": accepted, **info}


class metropolis_hastings(Metropolis):
    r"""Metropolis-Hastings. A program that may read the current choices proposes new ones.

    $x' \sim q(\cdot \mid x)$ is accepted with probability $\min\{1, \pi(x') q(x \mid x') / (\pi(x) q(x' \mid x))\}$.
    The proposal draws any of the latent choices, discrete or continuous. The others stay as they are.

    Attributes:
        proposal: a function from all choices (a nested dict) to a program, such as a model.

    Raises:
        AddressError: if the proposal draws a choice that is not latent, or draws nothing.
        DensityError: if the proposal is not normalised, is estimated, or draws in a branch or under a mask.
        WeftError: if a shape differs, or a discrete draw meets a continuous choice or the other way round.

    References:
        Hastings (1970), Biometrika 57.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> @gen
        ... def model():
        ...     rate = sample("rate", dist.Gamma(2.0, 1.0))
        ...     sample("n", dist.Poisson(rate))
        >>> @gen
        ... def step(choices):
        ...     sample("rate", dist.LogNormal(jax.numpy.log(choices["rate"]), 0.5))
        >>> kernel = kernels.metropolis_hastings(step)
        >>> target = model().given({"n": 3})
        >>> after, info = kernel.move(jax.random.key(0), {"rate": 2.0}, target)
        >>> bool(0 < info["acceptance_rate"] <= 1)
        True
    """

    proposal: Callable[[Choices], Program]

    def propose(
        self, key: PRNGKeyArray, choices: Choices, target: Target
    ) -> tuple[Choices, Float[Array, ""], Info]:
        forward = _program(self.proposal, choices, "metropolis_hastings: the proposal")
        _require_part(forward, target)
        drawn = forward.simulate(key)
        flat, sites = flatten(choices), target.sites
        new = {a: x.astype(sites[a].dtype) for a, x in flatten(drawn.choices).items()}
        after = unflatten({**flat, **new})
        backward = _program(self.proposal, after, "metropolis_hastings: the proposal")
        log_ratio = (
            log_density(target, after)
            - log_density(target, choices)
            + backward.log_density(unflatten({a: flat[a] for a in new}))
            - drawn.log_density
        )
        return after, log_ratio, {}


class involutive(Metropolis):
    r"""Involutive MCMC: auxiliary choices, and a bijection of choices and auxiliary choices that is its own inverse.

    With $v \sim q(\cdot \mid x)$ and $(x', v') = f(x, v)$, accept with probability

    $$\min\left\{1, \frac{\pi(x')\, q(v' \mid x')}{\pi(x)\, q(v \mid x)}
    \left| \det \frac{\partial f}{\partial (x, v)} \right|\right\}.$$

    The determinant is that of the floating numbers, by automatic differentiation, with one derivative for each number.
    Discrete numbers enter as they are, and may move, too. The report has "involution_error", the largest difference
    between `f(f(x, v))` and `(x, v)`. The move is rejected if it is larger than rounding explains (the square root of
    the dtype's precision).

    Attributes:
        auxiliary: a function from all choices to the program of `v`.
        transform: a function from `(choices, v)` to the proposed `(choices, v)`. All are nested dicts.

    Raises:
        ModelError: if the transform changes addresses, shapes or dtypes.
        DensityError: if the auxiliary program is not normalised, or is estimated.

    References:
        Green (1995), Biometrika 82; Cusumano-Towner, Lew and Mansinghka (2020), Automating involutive
        MCMC.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> @gen
        ... def model():
        ...     sample("x", dist.Normal(0.0, 1.0))
        >>> @gen
        ... def factor(choices):
        ...     sample("log", dist.Normal(0.0, 0.3))
        >>> def scale(x, v):
        ...     return {"x": x["x"] * jax.numpy.exp(v["log"])}, {"log": -v["log"]}
        >>> kernel = kernels.involutive(factor, scale)
        >>> after, info = kernel.move(jax.random.key(0), {"x": 0.8}, model().given())
        >>> bool(info["involution_error"] < 1e-6)
        True
    """

    auxiliary: Callable[[Choices], Program]
    transform: Callable[[Choices, Choices], tuple[Choices, Choices]]

    def propose(
        self, key: PRNGKeyArray, choices: Choices, target: Target
    ) -> tuple[Choices, Float[Array, ""], Info]:
        _require_whole(target.latents, target)
        forward = _program(self.auxiliary, choices, "involutive: the auxiliary program")
        drawn = forward.simulate(key)
        start = (choices, drawn.choices)
        (after, v), log_jacobian = _change(self._apply, start)
        backward = _program(self.auxiliary, after, "involutive: the auxiliary program")
        log_ratio = (
            log_density(target, after)
            - log_density(target, choices)
            + backward.log_density(v)
            - drawn.log_density
            + log_jacobian
        )
        gap, inverse = _gap(start, self._apply((after, v)))
        return (
            after,
            jnp.where(inverse, log_ratio, -jnp.inf),
            {"involution_error": gap},
        )

    def _apply(self, both: tuple[Choices, Choices]) -> tuple[Choices, Choices]:
        x, v = self.transform(*both)
        who = "involutive: the transform"
        return tuple(unchanged(b, _cast(b, a), who) for b, a in zip(both, (x, v), strict=True))  # pyright: ignore


def _cast(before: Choices, after: Choices) -> Choices:
    """Restore the dtypes from before, if arithmetic promoted integers to integers or floats to floats."""
    asked = flatten(before)

    def one(address: str, x: Any) -> Array:
        x, like = jnp.asarray(x), asked.get(address)
        if like is None or _floats(like) != _floats(x):
            return x
        return x.astype(like.dtype)

    return unflatten({a: one(a, x) for a, x in flatten(after).items()})


def _floats(x: Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _change(f: Any, start: Any) -> tuple[Any, Float[Array, ""]]:
    """`f(start)`, and the log of the absolute determinant of its derivative by the floating numbers."""
    floats, rest = eqx.partition(start, eqx.is_inexact_array)
    x, unravel = ravel_pytree(floats)

    def flat(x: Array) -> tuple[Array, Any]:
        end = f(eqx.combine(unravel(x), rest))
        return ravel_pytree(eqx.filter(end, eqx.is_inexact_array))[0], end

    if not x.size:
        return f(start), jnp.zeros(())
    jacobian, end = jax.jacfwd(flat, has_aux=True)(x)
    return end, jnp.linalg.slogdet(jacobian)[1]


def _gap(start: Any, back: Any) -> tuple[Float[Array, ""], Array]:
    """The largest difference between two points, and whether rounding explains it."""
    gap, same = jnp.zeros(()), jnp.bool_(True)
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(back), strict=True):
        if not _floats(a):
            away = jnp.abs(a.astype(int) - b.astype(int)).astype(gap.dtype)
            same &= jnp.all(away == 0)
        else:
            away = jnp.abs(a - b)
            same &= jnp.all(away <= jnp.sqrt(jnp.finfo(a.dtype).eps) * (1 + jnp.abs(a)))
        gap = jnp.maximum(gap, jnp.max(away, initial=0.0).astype(gap.dtype))
    return gap, same


def _program(f: Callable[[Choices], Program], choices: Choices, who: str) -> Program:
    """The program that a user's function makes of the choices. Its density must be known."""
    program = f(choices)
    if not isinstance(program, Program):
        raise TypeError(
            f"{who} gave a {type(program).__name__} for the choices, expected a Program"
        )
    if program.unnormalised:
        names = ", ".join(map(repr, program.unnormalised_sites))
        raise DensityError(
            f"{who} {program.name!r} is not normalised (it holds {names}), so its density is known up to a "
            "constant only"
        )
    if program.estimated:
        raise DensityError(
            f"{who} {program.name!r} has an estimated density, and here an exact one is needed: sum out what it "
            "integrates (marginalize)"
        )
    return program


def _require_part(program: Program, target: Target) -> None:
    """Refuse a proposal unless it draws latent choices of the target, each whole and in every run."""
    who = f"metropolis_hastings: the proposal {program.name!r}"
    sites = {a: program.sites[a] for a in program.latents}
    if not sites:
        raise AddressError(f"{who} draws nothing")
    for address, site in sites.items():
        if address not in target.latents:
            raise AddressError(
                f"{who} draws what the target does not: {unknown(address, target.latents, ' among the latents')}"
            )
        if site.conditional or site.masked:
            raise DensityError(
                f"{who} draws {address!r} in a branch or under a mask, so that it may propose nothing: mix two kernels"
            )
        wanted = target.sites[address]
        if site.shape != wanted.shape:
            raise WeftError(
                f"{who} draws {address!r} with shape {site.shape}, the target has {wanted.shape}"
            )
        if site.is_discrete != wanted.is_discrete:
            raise WeftError(
                f"{who} draws {address!r} from {site.distribution}, the target from {wanted.distribution}: one is "
                "discrete and the other continuous"
            )
    _require_whole(sites, target)


def _require_whole(addresses: Any, target: Target) -> None:
    partial = [a for a in addresses if a in target.data]
    if partial:
        raise WeftError(
            f"{', '.join(map(repr, partial))} is observed in part, and what is proposed has to be latent as a whole: "
            "make two sites of it"
        )
