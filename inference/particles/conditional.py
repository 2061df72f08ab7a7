r"""Conditional sequential Monte Carlo: a Markov kernel on the choices of a scan.

One of `N` particles is the path there is, the others are drawn around it; one of the resulting paths is
the next. This leaves the law of paths given the observations as it is, for every `N` of 2 or more
(Andrieu, Doucet and Holenstein 2010). So that early steps move although all paths soon share one ancestor,

- ancestor sampling (Lindsten, Jordan and Schon 2014) draws anew, at each step, which particle the given path
  descends from: `A_t ~ W_{t-1}^i m_t(x_t* | x_{t-1}^i) G_t(x_{t-1}^i, x_t*)`;
- backward sampling (Whiteley 2010) draws the next path from its end, by the same weights.

Both want a carry in which nothing random outlives a step but what the step's own choices put there.
"""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from weft.inference.markov.combinators import cycle
from weft.inference.markov.kernel import Choices, Info, Kernel, entered
from weft.inference.markov.mcmc import mcmc
from weft.inference.resampling import multinomial
from weft.inference.results.particles import Particles
from weft.inference.run.algorithm import require_counts
from weft.ppl import Target
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.errors import ModelError, WeftError

from .filtering import Filter, Proposal, filtering
from .panel_filters import Lanes, each_lane
from .smc import SequentialParticles, lineage


class Genealogy(eqx.Module):
    """All particles of all steps.

    Attributes:
        particles: `(step, particle, ...)`.
        log_weights: of each step's potentials.
        ancestors: which particle of the step before each descends from.
    """

    particles: Any
    log_weights: Float[Array, "step particle"]
    ancestors: Int[Array, "step particle"]


def around(
    key: PRNGKeyArray,
    model: Any,
    reference: Any,
    num_particles: int,
    ancestor_sampling: bool = False,
) -> Genealogy:
    """Particles around a path: the first particle of each step is that of the path.

    Args:
        key: random key.
        model: a Feynman-Kac model with `replay` (and `log_transition`, for ancestor sampling).
        reference: the choices of every step, `(step, ...)`.
        num_particles: `N`.
        ancestor_sampling: whether the ancestor of the given path is drawn anew at each step.
    """
    init_key, rest = jax.random.split(key)
    particles, log_weights = jax.vmap(model.init)(jax.random.split(init_key, num_particles))
    given = jax.tree.map(lambda x: x[0], reference)
    particles, log_weights = _put_first(
        (particles, log_weights), model.replay(jnp.int32(0), None, given)
    )

    def step(carry: Any, x: Any) -> Any:
        particles, log_weights = carry
        t, given = x
        draw_key, ancestor_key, move_key = jax.random.split(jax.random.fold_in(rest, t), 3)
        first = jnp.zeros((), int)
        if ancestor_sampling:
            onward = jax.vmap(model.log_transition, (None, 0, None))(t, particles, given)
            first = jax.random.categorical(ancestor_key, log_weights + onward)
        others = multinomial(draw_key, log_weights, num_particles - 1)
        chosen = jnp.concatenate([first[None], others])
        before = jax.tree.map(lambda x: x[chosen], particles)
        moved = jax.vmap(model.step, (0, None, 0))(
            jax.random.split(move_key, num_particles), t, before
        )
        own = model.replay(t, jax.tree.map(lambda x: x[0], before), given)
        particles, log_weights = _put_first(moved, own)
        return (particles, log_weights), (particles, log_weights, chosen)

    steps = jnp.arange(1, model.num_steps)
    then = jax.tree.map(lambda x: x[1:], reference)
    first = (particles, log_weights, jnp.arange(num_particles))
    _, rows = jax.lax.scan(step, (particles, log_weights), (steps, then))
    return Genealogy(*jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rows))


def _put_first(all_of_them: Any, one: Any) -> Any:
    return jax.tree.map(lambda xs, x: xs.at[0].set(x), all_of_them, one)


def traced(key: PRNGKeyArray, model: Any, found: Genealogy) -> Int[Array, " step"]:
    """A path along the genealogy, its end drawn by weight: the index of its particle at each step."""
    return lineage(jax.random.categorical(key, found.log_weights[-1]), found.ancestors)


def backward(key: PRNGKeyArray, model: Any, found: Genealogy) -> Int[Array, " step"]:
    """A path from its end on, by the density of each step's choices after each particle of the step before."""
    end_key, rest = jax.random.split(key)
    last = jax.random.categorical(end_key, found.log_weights[-1])
    num_steps = found.log_weights.shape[0]

    def back(index: Array, x: Any) -> Any:
        t, particles, log_weights, then = x
        given = model.taken(jax.tree.map(lambda x: x[index], then))
        onward = jax.vmap(model.log_transition, (None, 0, None))(t, particles, given)
        index = jax.random.categorical(jax.random.fold_in(rest, t), log_weights + onward)
        return index, index

    before = jax.tree.map(lambda x: x[:-1], (found.particles, found.log_weights))
    after = jax.tree.map(lambda x: x[1:], found.particles)
    steps = (jnp.arange(1, num_steps), *before, after)
    _, indices = jax.lax.scan(back, last, steps, reverse=True)
    return jnp.append(indices, last)


def along(indices: Int[Array, " step"], particles: Any) -> Any:
    """What the particles of a path are, `(step, ...)`."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, indices), particles)


class conditional_smc(Kernel):
    """Conditional SMC: a kernel that moves the latent choices of the model's scan, all others given.

    Of series under a `jax.vmap` each is moved by a run of its own.

    Attributes:
        num_particles: `N`, 2 at least; the longer the series, the more (without `update`, many more).
        update: `"ancestor"` sampling, `"backward"` sampling, or None: a path along the genealogy.
        proposal: of a step, as in `filtering`.
        scan: an address in the scan that is meant, as in `filtering`.

    The statistics are "acceptance_rate", the share of steps at which the path is another than before; where
    it is near zero for early steps, the chain does not move there.

    Raises:
        ModelError: for ancestor or backward sampling, if the carry remembers more than the last step's choices.

    References:
        Andrieu, Doucet and Holenstein (2010); Lindsten, Jordan and Schon (2014); Whiteley (2010), in the
        discussion of the first.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> from weft.inference import mcmc
        >>> @gen
        ... def random_walk():
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, 1.0))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=3)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
        >>> kernel = kernels.conditional_smc(num_particles=10)
        >>> draws = mcmc(kernel, num_samples=100).run(jax.random.key(0), target, progress=False)
        >>> draws.choices["x"].shape
        (4, 100, 3)
    """

    num_particles: int = 50
    update: Literal["ancestor", "backward"] | None = eqx.field(static=True, default="ancestor")
    proposal: Proposal | Literal["optimal"] | None = None
    scan: str | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        require_counts(self, num_particles=2)
        if self.update not in ("ancestor", "backward", None):
            raise WeftError(
                f"conditional_smc: update is 'ancestor', 'backward' or None, got {self.update!r}"
            )

    def move(self, key: PRNGKeyArray, choices: Choices, target: Target) -> tuple[Choices, Info]:
        choices = entered(choices, target)
        model = given_the_rest(filtering(self.proposal, scan=self.scan), choices, target)
        if self.update is not None:
            require_markov(model, f"conditional_smc(update={self.update!r})")
        flat = flatten(choices)
        within = {a: flat[a] for a in model.latents[1]}
        moved, shares = each_lane(self._move, model, key, within)
        return unflatten({**flat, **moved}), {"acceptance_rate": jnp.mean(shares)}

    def _move(self, key: PRNGKeyArray, model: Filter, within: dict[str, Array]) -> Any:
        """The choices of one scan moved, and the share of its steps at which they are others."""
        run_key, path_key = jax.random.split(key)
        reference = model.reference(within)
        found = around(run_key, model, reference, self.num_particles, self.update == "ancestor")
        ends = backward if self.update == "backward" else traced
        indices = ends(path_key, model, found)
        moved = model.steps_of(along(indices, found.particles))
        return moved, jnp.mean(indices[: model.parts.length] != 0)


def given_the_rest(how: filtering, choices: Choices, target: Target) -> Filter | Lanes:
    """The filter of a target in which only the choices of the scan are left."""
    apart = how.series(target)
    within = how(target).latents[1] if apart is None else apart.scanned
    within = [a for a in within if a in target.latents]
    if not within:
        raise ModelError(
            f"conditional SMC: the scan of {target.program.name!r} has no latent choice to be moved"
        )
    rest = {a: x for a, x in flatten(choices).items() if a not in within}
    return how(target.given(rest))


def require_markov(model: Filter | Lanes, what: str) -> None:
    """Raise ModelError if the weights of a step's ancestors were not all there is to it."""
    if not model.parts.markov:
        raise ModelError(
            f"{what}: the carry of {model.parts.name!r} holds something random of earlier steps besides what the "
            "choices of the last step put there, on which later steps depend: take update=None, with more particles"
        )


def particle_gibbs(
    parameters: Kernel | None = None,
    num_particles: int = 50,
    num_samples: int = 1000,
    *,
    update: Literal["ancestor", "backward"] | None = "ancestor",
    proposal: Proposal | Literal["optimal"] | None = None,
    scan: str | None = None,
    num_chains: int = 4,
    num_warmup: int = 0,
    thin: int = 1,
) -> mcmc:
    """Particle Gibbs: conditional SMC for the path, in turns with a kernel for everything else.

    Args:
        parameters: a kernel that moves the choices outside the scan, `kernels.block(kernel, "theta")` for
            instance; None, if there are none.
        num_particles: of conditional SMC.
        num_samples: draws of each chain.
        update: as in `conditional_smc`, with `proposal` and `scan`.
        proposal: of a step.
        scan: an address in the scan that is meant.
        num_chains: as in `mcmc`, with `num_warmup` and `thin`.
        num_warmup: transitions that are discarded.
        thin: store every `thin`-th.

    Returns:
        An algorithm; `run(key, target)` gives `Draws`.

    References:
        Andrieu, Doucet and Holenstein (2010), section 2.4.3; Lindsten, Jordan and Schon (2014).

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> from weft.inference import particle_gibbs
        >>> @gen
        ... def random_walk():
        ...     scale = sample("scale", dist.LogNormal(0.0, 1.0))
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, scale))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=3)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
        >>> kernel = kernels.block(kernels.random_walk(0.5), "scale")
        >>> draws = particle_gibbs(kernel, 10, 50).run(jax.random.key(0), target, progress=False)
        >>> draws.choices["scale"].shape, draws.choices["x"].shape
        ((4, 50), (4, 50, 3))
    """
    path = conditional_smc(num_particles, update, proposal, scan)
    kernel = path if parameters is None else cycle(path, parameters)
    return mcmc(kernel, num_samples, num_chains, num_warmup, thin)


def backward_sampling(
    key: PRNGKeyArray,
    particles: SequentialParticles,
    num_samples: int = 100,
    scan: str | None = None,
) -> Particles:
    r"""Smoothing: paths drawn from the end on, through the particles of a filter.

    A path begins at a particle drawn by the last weights and goes back by
    $W_{t-1}^i\, p(x_t, y_t \mid x_{t-1}^i)$ (Godsill, Doucet and West 2004), which costs O(N) a step and path.
    Unlike the paths that the particles of a filter descend from, these do not share their beginnings.

    Args:
        key: random key.
        particles: what `smc(filtering(), ..., history="full")` gave, for a model without latent choices outside
            the scan. Of series under a vmap a path of each is drawn.
        num_samples: number of paths.
        scan: as given to `filtering`.

    Returns:
        Equally weighted particles: whole paths.

    Raises:
        WeftError: if the run did not keep its history, or a choice stands outside the scan.
        ModelError: if the carry remembers more than the choices of the last step.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import backward_sampling, filtering, smc
        >>> @gen
        ... def random_walk():
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, 1.0))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=3)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
        >>> filtered = smc(filtering(), 200, history="full").run(jax.random.key(0), target, progress=False)
        >>> smoothed = backward_sampling(jax.random.key(1), filtered, num_samples=50)
        >>> smoothed.choices["x"].shape
        (50, 3)
    """
    model, found = genealogy(particles, scan, "backward_sampling")

    def one(key: PRNGKeyArray, model: Filter, found: Genealogy) -> Any:
        path = along(backward(key, model, found), found.particles)
        last = jax.tree.map(lambda x: x[-1:], path)
        whole = model.paths(last, jax.tree.map(lambda x: x[None], path))
        return jax.tree.map(lambda x: x[0], whole)

    choices = jax.jit(jax.vmap(lambda k: each_lane(one, model, k, found)))(
        jax.random.split(key, num_samples)
    )
    evidence = particles.log_evidence
    return Particles(
        choices=choices,
        log_weights=jnp.full(num_samples, 0.0 if evidence is None else evidence),
        log_evidence=evidence,
        log_evidence_variance=particles.log_evidence_variance,
        target=particles.target,
    )


def genealogy(
    particles: SequentialParticles, scan: str | None, what: str
) -> tuple[Filter | Lanes, Genealogy]:
    """The filter that was run, and all its particles, for what goes back through them; of lanes these lead."""
    path = particles.path
    if path is None or path.particles is None or path.log_weights is None:
        raise WeftError(f"{what}: run the filter with history='full'")
    model = filtering(scan=scan)(particles.target)
    only_the_scan(model, what)
    require_markov(model, what)
    assert path.ancestors is not None
    found = Genealogy(path.particles, path.log_weights, path.ancestors)
    ndim = len(model.shape) if isinstance(model, Lanes) else 0
    return model, jax.tree.map(lambda x: jnp.moveaxis(x, 0, ndim), found)


def only_the_scan(model: Filter | Lanes, what: str) -> None:
    """Raise WeftError if a latent choice stands outside the scan."""
    outside = [*model.latents[0], *model.latents[2]]
    if outside:
        raise WeftError(
            f"{what}: {', '.join(map(repr, outside))} stand outside the scan and differ from particle to particle: "
            "give them, target.given(...), or take particle_gibbs"
        )
