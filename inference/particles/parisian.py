r"""Expectations of sums over a path: PaRIS, and its particle Gibbs sampler, which loses the bias.

Let $h = \sum_t h_t(x_{t-1}, x_t)$. Each particle carries an estimate of the sum over its past, averaged over `M` draws
of the particle that it may come from (Olsson and Westerborn 2017):

    b_t^i = 1/M sum_j [b_{t-1}^{J_ij} + h_t(x_{t-1}^{J_ij}, x_t^i)],   J_ij ~ W_{t-1}^l p(x_t^i, y_t | x_{t-1}^l).

With N particles the estimate $\sum_i W_T^i b_T^i$ has a bias of order T/N. Run inside conditional SMC, it loses that
bias geometrically in the number of iterations (Cardoso, Janati, Le Corff, Moulines and Olsson 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray
from weft.inference.markov.driver import ChainSampler, Record, Stats
from weft.inference.run.adaptation import Phase
from weft.inference.run.settings import require_counts
from weft.ppl import Target
from weft.ppl.stage.addresses import unflatten
from weft.ppl.stage.errors import WeftError

from .conditional import conditional_pass
from .filter import Filter, only_the_scan, require_markov
from .filtering import filtering
from .generation import Generation, log_transitions
from .history import along
from .results import SequentialParticles
from .smc import smc
from .smoothing import drawn_back, genealogy

Functional = Callable[[dict[str, Any] | None, dict[str, Any], Int[Array, ""]], Any]
"""One term of a sum: a function of the last step's choices (None at first), this step's choices, and its number."""


def paris(
    key: PRNGKeyArray,
    particles: SequentialParticles,
    functional: Functional,
    num_backward: int = 2,
    scan: str | None = None,
) -> Any:
    r"""The smoothed expectation of a sum over the path, $E[\sum_t h_t(x_{t-1}, x_t) \mid y]$.

    It costs O(N^2 T), since the particle that each may come from is drawn from all of them.

    Args:
        key: a random key.
        particles: the result of `smc(filtering(), ..., history="full")`, for a model without latent choices outside the
            scan.
        functional: `functional(before, now, t)` gives the term of step `t`, an array or a pytree of arrays, from the
            nested dicts of the choices of two steps. At the first step `before` is None.
        num_backward: `M`, at least 2. With 1 the estimates degenerate as paths do.
        scan: the argument given to `filtering`.

    Returns:
        The values of the functional, summed and averaged. For series under a vmap there is one for each, `(series,
        ...)`.

    Raises:
        WeftError: if the run kept no history, or a choice stands outside the scan.
        ModelError: if the carry remembers more than the choices of the last step.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import filtering, paris, smc
        >>> @gen
        ... def random_walk():
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, 1.0))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=3)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
        >>> filtered = smc(filtering(), 500, history="full").run(jax.random.key(0), target, progress=False)
        >>> total = paris(jax.random.key(1), filtered, lambda before, now, t: now["x"])
        >>> print(f"{total:.0f}")  # exactly 2.95
        3
    """
    _require_backward(num_backward)
    model, found = genealogy(particles, scan, "paris")

    def one(key: PRNGKeyArray, model: Filter, found: Generation) -> Any:
        return _expectation(key, model, found, functional, int(num_backward))

    return model.each_series(one, key, found)


@eqx.filter_jit
def _expectation(
    key: PRNGKeyArray, model: Filter, found: Generation, functional: Functional, num_backward: int
) -> Any:
    """Run the recursion of the statistics over all steps, and take their weighted mean at the last."""
    num_particles = found.log_weights.shape[1]

    def term(before: Any, now: Any, t: Any) -> Any:
        found = functional(None if before is None else unflatten(before), unflatten(now), t)
        return jax.tree.map(jnp.asarray, found)

    def step(carry: Any, x: Any) -> Any:
        statistics, particles, log_weights = carry
        t, then, then_weights, ancestors = x
        before, now = model.taken(particles), model.taken(then)

        def one(key: PRNGKeyArray, now: Any) -> Any:
            onward = log_transitions(model, t, particles, now)
            chosen = jax.random.categorical(key, log_weights + onward, shape=(num_backward,))

            def past(j: Array) -> Any:
                taken = jax.tree.map(lambda x: x[j], (statistics, before))
                return jax.tree.map(jnp.add, taken[0], term(taken[1], now, t))

            return jax.tree.map(lambda x: jnp.mean(x, 0), jax.vmap(past)(chosen))

        keys = jax.random.split(jax.random.fold_in(key, t), num_particles)
        # After the scan nothing is added.
        moved = jax.lax.cond(
            t < model.parts.length,
            lambda: jax.vmap(one)(keys, now),
            lambda: jax.tree.map(lambda x: x[ancestors], statistics),
        )
        return (moved, then, then_weights), None

    rows = (found.particles, found.log_weights, found.ancestors)
    first = jax.tree.map(lambda x: x[0], rows[:2])
    rest = jax.tree.map(lambda x: x[1:], rows)
    begin = jax.vmap(lambda now: term(None, now, jnp.int32(0)))(model.taken(first[0]))
    begin = jax.tree.map(lambda x: x.astype(jnp.result_type(x, float)), begin)
    steps = jnp.arange(1, found.log_weights.shape[0])
    (statistics, _, log_weights), _ = jax.lax.scan(step, (begin, *first), (steps, *rest))
    weights = jax.nn.softmax(log_weights)
    return jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), statistics)


class Chain(NamedTuple):
    """Where a chain is: the path that the next iteration takes, and the path as it is stored, with the estimate."""

    reference: Any
    found: Any


class parisian_gibbs(ChainSampler):
    """The Parisian particle Gibbs sampler: expectations of sums over a path, with a bias that vanishes geometrically.

    Each iteration runs conditional SMC around a path, gives an estimate by the recursion of `paris` over all its
    particles, and draws the next path. The estimates of the iterations after warm-up, `derived["sum"]` of the result,
    are averaged. Their variance is that of `N` particles. For a single estimate at the same cost, plain `paris` with
    more particles has less variance, but a bias. Use this sampler if estimates feed a recursion in which a bias would
    add up.

    Attributes:
        functional: one term of the sum, as in `paris`.
        num_particles: `N`.
        num_samples: iterations of each chain after warm-up.
        num_warmup: iterations of warm-up.
        num_chains: the number of chains, under one vmap.
        num_backward: `M`.
        filter: how to filter.
        thin: store every `thin`-th path and estimate.
        keep: the addresses of the choices to store, and "sum" for the estimate; all by default.

    Raises:
        WeftError: if a latent choice stands outside the scan.
        ModelError: if the carry remembers more than the choices of the last step.

    References:
        Cardoso, Janati, Le Corff, Moulines and Olsson (2023), algorithm 2.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import parisian_gibbs
        >>> @gen
        ... def random_walk():
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, 1.0))
        ...         return x, sample("y", dist.Normal(x, 1.0))
        ...     return jax.lax.scan(step, 0.0, length=3)[0]
        >>> target = random_walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
        >>> sampler = parisian_gibbs(lambda before, now, t: now["x"], 10, num_samples=100, num_warmup=5)
        >>> draws = sampler.run(jax.random.key(0), target, progress=False)
        >>> print(f"{draws.derived['sum'].mean():.0f}")  # exactly 2.95
        3
    """

    functional: Functional
    num_particles: int = 50
    num_samples: int = 100
    num_warmup: int = 10
    num_chains: int = 4
    num_backward: int = eqx.field(static=True, default=2)
    filter: filtering = filtering()
    thin: int = 1
    keep: Sequence[str] | None = None

    def __check_init__(self) -> None:
        require_counts(self, num_particles=2, num_backward=1)

    def check(self, target: Target, init: Any = None) -> None:
        if init is not None:
            raise WeftError("parisian_gibbs begins at a path of a filter: leave out init")
        model = self.filter(target)
        only_the_scan(model, "parisian_gibbs")
        require_markov(model, "parisian_gibbs")
        self.require_kept([*target.sites, "sum"])

    def begin(self, key: PRNGKeyArray, target: Target, init: Any) -> tuple[Chain, None]:
        model = self.filter(target)

        def one(key: PRNGKeyArray) -> Chain:
            run_key, path_key = jax.random.split(key)
            found = smc(self.filter, self.num_particles, history="full").run(
                run_key, target, progress=False
            )
            _, all_of_them = genealogy(found, self.filter.scan, "parisian_gibbs")
            reference = model.each_series(_drawn, path_key, all_of_them)
            shapes = jax.eval_shape(lambda: self._iterate(key, model, reference)[1])
            return Chain(reference, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

        return jax.vmap(one)(jax.random.split(key, self.num_chains)), None

    def transition(
        self, key: PRNGKeyArray, chain: Chain, target: Target, tuning: None, now: Phase
    ) -> tuple[Chain, Stats, None]:
        return Chain(*self._iterate(key, self.filter(target), chain.reference)), {}, None

    def record(self, chain: Chain, target: Target) -> tuple[Record, Stats]:
        return {"choices": chain.found["path"], "derived": {"sum": chain.found["sum"]}}, {}

    def _iterate(self, key: PRNGKeyArray, model: Any, reference: Any) -> tuple[Any, Any]:
        """The next path, and the path with the estimate."""

        def one(key: PRNGKeyArray, model: Filter, reference: Any) -> Any:
            run_key, path_key, sum_key = jax.random.split(key, 3)
            found = conditional_pass(run_key, model, reference, self.num_particles)
            total = _expectation(sum_key, model, found, self.functional, self.num_backward)
            path = along(drawn_back(path_key, model, found), found.particles)
            return model.taken(path), {"sum": total, "path": model.steps_of(path)}

        return model.each_series(one, key, reference)


def _drawn(key: PRNGKeyArray, model: Filter, found: Generation) -> Any:
    """The choices of a path, drawn backwards from its end."""
    return model.taken(along(drawn_back(key, model, found), found.particles))


def _require_backward(num_backward: int) -> None:
    if not isinstance(num_backward, (int, np.integer)) or num_backward < 1:
        raise WeftError(f"num_backward must be a positive integer, got {num_backward!r}")
