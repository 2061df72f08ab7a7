r"""Programs whose density is estimated: ``marginal`` and ``normalize``.

Such a program does two things. It draws its choices $x$ together with an estimate $d$ of their density, where
$\mathbb{E}[1/d \mid x] = 1/p(x)$. And it scores given choices by an estimate $d'$, where $\mathbb{E}[d'] = p(x)$. In
weights and bounds, the density of a draw stands in a denominator and that of a given value in a numerator. So weights
stay unbiased, and bounds stay bounds, with estimates in place of densities.

Both parts are programs themselves. Their choices have no address. Inside an expectation they use its key, and their
choices have gradient strategies like all others.

An inference algorithm does the integration. It is any object with two methods. They are called while a program is
staged, and may make choices:

- ``draw_posterior(target) -> (choices, log_density, log_evidence)`` gives a draw by the algorithm's law, the log
  density $\log g$ of that draw under the target, and $\log \hat Z$ with $\mathbb{E}[\hat Z] = Z$.
- ``conditional_evidence(target, choices, log_density) -> log_evidence`` gives $\log \hat Z$ of a run in which the
  given choices were drawn. Their $\log g$ is known.

References:
    Lew et al. (2023), "Probabilistic programming with stochastic probabilities".
    Andrieu and Roberts (2009), "The pseudo-marginal approach for efficient Monte Carlo computations".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from weft.ppl.analysis.dependence import returned
from weft.ppl.programs.handlers import Given, conditioned
from weft.ppl.programs.language import draw
from weft.ppl.programs.models import Model
from weft.ppl.programs.programs import Program
from weft.ppl.programs.targets import Target
from weft.ppl.stage.addresses import Address, dotted, flatten, select, unflatten
from weft.ppl.stage.control import estimated_p
from weft.ppl.stage.errors import DensityError, ModelError
from weft.ppl.stage.interpreter import Context, Handler, interpret
from weft.ppl.stage.packing import pack
from weft.ppl.stage.records import look_up
from weft.ppl.stage.sites import Site
from weft.ppl.stage.specs import Constant
from weft.ppl.stage.staging import stage
from weft.ppl.stage.structure import SiteInfo


@runtime_checkable
class Sampler(Protocol):
    """An algorithm that can run inside a program."""

    def draw_posterior(self, target: Target) -> tuple[dict[str, Any], jax.Array, jax.Array]:
        """A draw of the choices, its log density under the target, and the log of an unbiased evidence estimate."""
        ...

    def conditional_evidence(
        self, target: Target, choices: dict[str, Any], log_density: jax.Array
    ) -> jax.Array:
        """The log evidence that is estimated by a run in which the given choices are drawn."""
        ...


def marginal(program: Program, keep: Address | Iterable[Address], by: Sampler) -> Program:
    r"""The law of some choices of a program, with the others integrated out by an algorithm.

    Write $x$ for the choices that stay, $u$ for the others, and $\hat Z(x)$ for the algorithm's estimate of
    $p(x) = \int p(x, u)\, du$, the evidence of the target ``program.given(x)``. A draw is a draw of the program. Its
    $d$ is $\hat Z$ of a run in which its $u$ was drawn. Given choices are scored by $d' = \hat Z$. For importance
    sampling with a proposal $q$ and $M$ particles, $\hat Z = \frac{1}{M} \sum_j p(x, u_j) / q(u_j)$.

    Args:
        program: a program without factors or conditions.
        keep: addresses of the choices that stay; wildcards are allowed.
        by: the algorithm. ``importance(num_particles=5)`` proposes from the program itself. The proposal of
            ``importance(lambda target: reverse(target.observed["x"]), 5)`` sees the choices that stay.

    Returns:
        A program over the choices that stay, at their addresses, with the program's return value.

    Raises:
        DensityError: if the program is not normalised.
        ModelError: if its return value needs the choices that are integrated out.
        AddressError: for an unknown address.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, marginal, sample
        >>> from weft.inference import importance
        >>> @gen
        ... def noisy():
        ...     u = sample("u", dist.Normal(0.0, 1.0))
        ...     sample("x", dist.Normal(u, 1.0))
        >>> x = marginal(noisy(), keep="x", by=importance(num_particles=10_000))
        >>> x.latents
        ('x',)
        >>> log_d = x.estimate_log_density(jax.random.key(0), {"x": 1.0})
        >>> bool(abs(log_d - dist.Normal(0.0, 2.0**0.5).log_prob(1.0)) < 0.05)
        True
    """
    if not isinstance(program, Program):
        raise TypeError(
            f"marginal takes a program, model(*args); got {type(program).__name__}"
            + (" (apply it to its arguments)" if isinstance(program, Model) else "")
        )
    _check(by, "marginal")
    if program.unnormalised:
        names = ", ".join(map(repr, program.unnormalised_sites))
        raise DensityError(
            f"marginal: the program {program.name!r} is not normalised (it holds {names}), so it has no law to take a "
            "part of; make it a target and take normalize(target, by=...)"
        )
    program.require_density()
    patterns = (keep,) if isinstance(keep, str) else tuple(map(dotted, keep))
    kept = tuple(flatten(select(dict.fromkeys(program.latents), patterns)))
    others = [a for a in program.latents if a not in kept]
    if not others:
        return program
    read = returned(program.code()[0].jaxpr) & set(others)
    if read:
        names = ", ".join(map(repr, sorted(read)))
        raise ModelError(
            f"marginal: the program {program.name!r} returns what it computes from {names}, which is integrated out: "
            "return what is kept, or nothing"
        )
    return Model(_Marginal(kept), f"marginal of {program.name}")(program, by)


def normalize(target: Target, by: Sampler) -> Program:
    r"""A posterior, as an inference algorithm samples it. It is a program over the latent choices of a target.

    The law of the program is that of the algorithm's output. It tends to the posterior as the algorithm's effort grows.
    Write $g$ for the target's density, and $\hat Z$ for the algorithm's estimate of the evidence. A draw has $d = g(x)
    / \hat Z$, with $\hat Z$ of the run that gave it. Given choices have $d' = g(x) / \hat Z$, with $\hat Z$ of a run in
    which they were drawn. A run in which no particle is possible gives an impossible draw with $d = \infty$, and an
    impossible given value has $d' = 0$. So both weigh nothing.

    Args:
        target: an unnormalised density.
        by: the algorithm. ``importance(proposal, num_particles=N)`` is sampling importance resampling (Rubin 1987).

    Returns:
        A program over the target's latent choices, at their addresses, with the program's return value.

    Raises:
        DensityError: if a choice is observed in part.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, normalize, sample
        >>> from weft.inference import importance
        >>> @gen
        ... def model():
        ...     mu = sample("mu", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(mu, 1.0))
        >>> posterior = normalize(model().given({"y": 2.0}), by=importance(num_particles=2000))
        >>> log_d = posterior.estimate_log_density(jax.random.key(0), {"mu": 1.0})
        >>> bool(abs(log_d - dist.Normal(1.0, 0.5**0.5).log_prob(1.0)) < 0.1)
        True
    """
    if not isinstance(target, Target):
        raise TypeError(
            f"normalize takes a target, model(*args).given(data); got {type(target).__name__}"
        )
    _check(by, "normalize")
    partial = [a for a in target.latents if a in target.data]
    if partial:
        raise DensityError(
            f"normalize: {', '.join(map(repr, partial))} observed in part; its missing elements cannot be choices of a "
            "program yet: make them a site of their own"
        )
    return Model(_Normalized(), f"posterior of {target.program.name}")(target, by)


class _Marginal(eqx.Module):
    """The function of the program that ``marginal`` makes."""

    kept: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, program: Program, by: Sampler) -> Any:
        def simulate(program: Program, by: Sampler) -> tuple[dict[str, Any], jax.Array]:
            trace = draw(program)
            drawn = flatten(trace.choices)
            kept = {a: drawn[a] for a in self.kept}
            others = unflatten({a: x for a, x in drawn.items() if a not in kept})
            log_d = by.conditional_evidence(program.given(kept), others, trace.log_density)
            return kept, log_d

        def score(program: Program, by: Sampler, kept: dict[str, Any]) -> jax.Array:
            return by.draw_posterior(program.given(kept))[-1]

        sites = {a: program.sites[a] for a in self.kept}
        values = choose(program.name, sites, simulate, score, program, by)
        # The value does not depend on the others: any will do.
        others = {
            a: jnp.zeros(program.sites[a].shape, program.sites[a].dtype)
            for a in program.latents
            if a not in values
        }
        return returned_value(program, {**values, **others})


class _Normalized(eqx.Module):
    """The function of the program that ``normalize`` makes."""

    def __call__(self, target: Target, by: Sampler) -> Any:
        def simulate(target: Target, by: Sampler) -> tuple[dict[str, Any], jax.Array]:
            choices, log_g, log_z = by.draw_posterior(target)
            # Without the `where`, 0 / 0: a run whose weights are all zero gives an impossible draw.
            return flatten(choices), jnp.where(log_g == -jnp.inf, 0.0, log_g) - log_z

        def score(target: Target, by: Sampler, choices: dict[str, Any]) -> jax.Array:
            choices = unflatten(choices)
            log_g = target.log_density(choices)
            log_z = by.conditional_evidence(target, choices, log_g)
            return log_g - jnp.where(log_g == -jnp.inf, 0.0, log_z)

        sites = {a: target.sites[a] for a in target.latents}
        values = choose(target.program.name, sites, simulate, score, target, by)
        data = {a: given.value for a, given in target.data.items()}
        return returned_value(target.program, {**data, **values})


def returned_value(program: Program, choices: Mapping[str, Any]) -> Any:
    """The return value of a program all of whose choices are set."""
    code, args = program.code()
    given = unflatten({a: Given(x) for a, x in choices.items()})
    outs, _, _ = interpret(code.jaxpr, args, _Values(), None, given)
    return jax.tree.unflatten(code.out_tree, outs)


class _Values(Handler):
    """Takes the values that are given, and adds nothing to the density."""

    records = False

    def site(self, site: Site, key: Any, given: Any) -> tuple[jax.Array, None, dict[str, Any]]:
        if site.spec.kind == "sample":
            return conditioned(site, given).value.astype(site.spec.dtype), None, {}
        return site.part("value" if site.spec.kind == "deterministic" else "weight"), None, {}

    def estimated(self, eqn: Any, args: list[Any], context: Context) -> Any:
        sites = eqn.params["sites"].value
        return [look_up(context.given, a).value.astype(i.dtype) for a, i in sites], {}, {}


def choose(
    name: str,
    sites: dict[str, SiteInfo],
    simulate: Callable[..., tuple[dict[str, Any], jax.Array]],
    score: Callable[..., jax.Array],
    *args: Any,
) -> dict[str, Any]:
    """Stage choices that are drawn and scored together by two programs.

    Args:
        name: for messages.
        sites: the choices, by address.
        simulate: from ``args`` to the choices by address, and log d.
        score: from ``args`` and the choices by address to log d'.
        *args: pytrees.

    Returns:
        The choices by address.
    """
    arrays, skeleton = pack(args)

    def drawn(*arrays: Any) -> list[Any]:
        values, log_d = simulate(*skeleton.unpack(arrays))
        return [*(values[a] for a in sites), log_d]

    def scored(*arrays: Any) -> list[Any]:
        count = skeleton.num_arrays
        values = dict(zip(sites, arrays[count:], strict=True))
        return [score(*skeleton.unpack(arrays[:count]), values)]

    shapes = [jax.ShapeDtypeStruct(info.shape, info.dtype) for info in sites.values()]
    simulated, first = stage(drawn, arrays)
    estimated, second = stage(scored, [*arrays, *shapes])
    outs = estimated_p.bind(
        *first,
        *second,
        *arrays,
        name=name,
        sites=Constant(tuple((tuple(a.split(".")), info) for a, info in sites.items())),
        simulate=simulated,
        score=estimated,
        consts=(len(first), len(second)),
        scaled=False,
    )
    return dict(zip(sites, outs, strict=True))


def _check(by: Any, what: str) -> None:
    if not hasattr(by, "draw_posterior") or not hasattr(by, "conditional_evidence"):
        raise TypeError(
            f"{what}: by= takes an algorithm that runs inside a program, such as importance(num_particles=10); got "
            f"{type(by).__name__}"
        )
