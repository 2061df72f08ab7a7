"""Objectives whose draws do not move with the parameters: wake-sleep and its relatives, by weighted draws."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from weft.inference.weighted.proposals import log_ratio
from weft.ppl import Program, Target, expect
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.keys import as_key

from .objectives import Objective, stop


class _Weighted(Objective):
    """Base of objectives that average over draws of the guide by normalised weights. Neither draws nor weights move."""

    num_particles: int = eqx.field(default=10, static=True)

    @property
    def covers(self) -> bool:
        return True

    def __call__(self, key: PRNGKeyArray, params: Any, *batch: Any) -> Float[Array, ""]:
        """An estimate."""
        draw_key, score_key = jax.random.split(as_key(key))
        fixed_target, fixed_guide = self.at(stop(params), *batch)

        def one(key: PRNGKeyArray) -> tuple[Any, Array]:
            trace = fixed_guide.simulate(key)
            return trace.choices, log_ratio(fixed_target, fixed_guide, trace, key=key)

        keys = jax.random.split(draw_key, self.num_particles)
        choices, log_w = stop(jax.vmap(one)(keys))

        def value(params: Any) -> Array:
            return self.value(*self.pair(params, *batch), choices, jax.nn.softmax(log_w))

        return expect(value)(score_key, params)

    def value(self, target: Target, guide: Program, choices: Any, weights: Array) -> Array:
        """The objective for given draws, of shape `(num_particles, ...)`, and their normalised weights."""
        raise NotImplementedError


class wake_theta(_Weighted):
    r"""The model's part of reweighted wake-sleep, $\sum_i w_i \log p_\theta(x_i, y)$.

    The draws $x_i$ of the guide and their normalised weights $w_i$ do not move with the parameters. The gradient is
    that of the log evidence, with a bias of order 1 / `num_particles`. Discrete choices of the guide need no strategy.

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: a function `(params, *batch) -> Program`.
        num_particles: the number of draws of the guide.

    References:
        Bornschein and Bengio (2015), equation 5.
    """

    def value(self, target: Target, guide: Program, choices: Any, weights: Array) -> Array:
        return jnp.sum(weights * jax.vmap(target.log_density)(choices))


class wake_phi(_Weighted):
    r"""The guide's part of reweighted wake-sleep, $\sum_i w_i \log q_\phi(x_i)$.

    The draws $x_i$ and their normalised weights $w_i$ do not move with the parameters. To maximise the objective is to
    minimise the forward divergence $\mathrm{KL}(p(x \mid y) \,\|\, q_\phi)$, with a bias of order 1 / `num_particles`.
    So the guide comes to cover the posterior.

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: a function `(params, *batch) -> Program`.
        num_particles: the number of draws of the guide.

    References:
        Bornschein and Bengio (2015), equation 7.
    """

    def value(self, target: Target, guide: Program, choices: Any, weights: Array) -> Array:
        return jnp.sum(weights * jax.vmap(guide.log_density)(choices))


forward_kl = wake_phi
"""The forward divergence, up to its sign and a constant: what `wake_phi` maximises."""


class rws(_Weighted):
    r"""Reweighted wake-sleep: the sum of `wake_theta` and `wake_phi`, from the same draws.

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: a function `(params, *batch) -> Program`.
        num_particles: the number of draws of the guide.
    """

    def value(self, target: Target, guide: Program, choices: Any, weights: Array) -> Array:
        both = jax.vmap(lambda x: target.log_density(x) + guide.log_density(x))(choices)
        return jnp.sum(weights * both)


class sleep_phi(Objective):
    r"""The sleep phase of wake-sleep: $\mathbb{E}_{x, y \sim p}[\log q_\phi(x \mid y)]$, for data drawn from the model.

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: an amortised guide, a function `(params, data, *batch) -> Program`. `data` is a nested dict like the
            target's `observed`.

    References:
        Hinton et al. (1995); Bornschein and Bengio (2015), equation 9.
    """

    @property
    def covers(self) -> bool:
        return True

    def at(self, params: Any, *batch: Any) -> tuple[Target, Program]:
        target = self.target if isinstance(self.target, Target) else self.target(params, *batch)
        return target, self.guide(params, target.observed, *batch)

    def __call__(self, key: PRNGKeyArray, params: Any, *batch: Any) -> Float[Array, ""]:
        """An unbiased estimate."""
        dream_key, score_key = jax.random.split(as_key(key))
        target, _ = self.pair(params, *batch)
        dream = flatten(stop(target.program.simulate(dream_key).choices))
        data = unflatten({a: x for a, x in dream.items() if a in target.data})
        latent = unflatten({a: x for a, x in dream.items() if a not in target.data})

        def value(params: Any) -> Array:
            return self.guide(params, data, *batch).log_density(latent)

        return expect(value)(score_key, params)


class eubo(_Weighted):
    r"""An estimate of the evidence upper bound, $\mathbb{E}_{p(x \mid y)}[\log p(x, y) - \log q_\phi(x)]$.

    The mean over the posterior is taken with the normalised weights of draws of the guide. So the estimate is biased
    downwards, and is not itself a bound. Its distance from the ELBO says how far apart guide and posterior are. A guide
    that is fitted by it is fitted with `minimize=True`.

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: a function `(params, *batch) -> Program`.
        num_particles: the number of draws of the guide.
    """

    def value(self, target: Target, guide: Program, choices: Any, weights: Array) -> Array:
        gaps = jax.vmap(lambda x: target.log_density(x) - guide.log_density(x))(choices)
        return jnp.sum(weights * gaps)


class log_variance(_Weighted):
    r"""Minus half the variance of the log weights $\log p(x_i, y) - \log q_\phi(x_i)$ of draws of the guide.

    The draws do not move with the parameters. The maximum is zero: there all weights are equal. The gradient is that of
    the ELBO with the best constant baseline. No choice needs a strategy.

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: a function `(params, *batch) -> Program`.
        num_particles: the number of draws of the guide.

    References:
        Richter et al. (2020), "VarGrad", proposition 1.
    """

    @property
    def covers(self) -> bool:
        return False  # one draw outside would make the variance infinite

    @property
    def least_particles(self) -> int:
        return 2

    def value(self, target: Target, guide: Program, choices: Any, weights: Array) -> Array:
        log_w = jax.vmap(lambda x: target.log_density(x) - guide.log_density(x))(choices)
        return -0.5 * jnp.var(log_w, ddof=1)
