r"""Gradient strategies: how an expectation is differentiated through a choice.

Let $x \sim q_\theta$ be a choice and $k$ the rest of the program. Each strategy but ``gumbel`` gives an unbiased
estimator of $\nabla_\theta\, \mathbb{E}[k(x)]$, whatever the strategies of all other choices are (Lew et al. 2023,
"ADEV: Sound automatic differentiation of expected values"). Strategies are values. They are given at a site,
``sample(name, d, grad=gradients.mvd)``, or from outside, with ``with_gradients``. They change no law, and matter only
to ``expect``. A choice without a strategy is reparametrised if its distribution allows it. Otherwise it has a score
term.

| strategy | needs | variance |
| --- | --- | --- |
| `reparam` | a continuous law with a differentiable draw, and a smooth program after it | low |
| `score` | a density | high; baselines lower it |
| `enum` | finitely many values; not in a scan | none from this choice |
| `mvd` | a law from the list; not in a scan; derivatives of first order | low, for two runs of the rest a parameter |
| `reweight` | a proposal that covers the law | by the weights |
| `gumbel` | Bernoulli, or Multinomial of one trial, used by arithmetic | low, but **biased** |
"""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from weft.ppl.exact.families import base_of
from weft.ppl.stage.errors import GradientError
from weft.ppl.stage.implicit import follow
from weft.ppl.stage.sites import Site, lane_shape

from .derivatives import guarded
from .marks import mark
from .marks import with_baselines as with_baselines
from .measure_valued import UNCOVERED, fours_of


class Strategy(eqx.Module):
    """A way to differentiate an expectation through a choice. This is the base of all strategies.

    Attributes:
        pathwise: whether the draw itself carries the derivative. Then it needs no mark.
    """

    pathwise: ClassVar[bool] = False

    def draw(self, site: Site, key: jax.Array) -> jax.Array:
        """A draw, marked with what its derivative needs."""
        raise NotImplementedError

    def fits(self, site: Site) -> bool:
        """Whether the strategy can be used at a site."""
        raise NotImplementedError


class Reparam(Strategy):
    """The pathwise derivative: the draw is a differentiable function of the parameters and of noise.

    If the sampler is not differentiable, the draw follows the distribution function: for mixtures on the line, and for
    von Mises laws.
    """

    pathwise: ClassVar[bool] = True

    def fits(self, site: Site) -> bool:
        return site.spec.reparametrised

    def draw(self, site: Site, key: jax.Array) -> jax.Array:
        value = site.draw(key)
        if not site.spec.implicit:
            return value
        return site.over_lanes(lambda payload, x: follow(payload["d"], x), value)


class Learned(eqx.Module):
    """A baseline that is regressed on the cost that follows. ``learned`` makes it."""

    value: Any


class Score(Strategy):
    r"""The score function (REINFORCE): $(k(x) - b)\, \nabla \log q_\theta(x)$.

    Attributes:
        baseline: b, one number for each draw, computed from anything that comes before the choice; or
            ``learned(...)``.
    """

    baseline: Any = None

    def __call__(self, baseline: Any = None) -> Score:
        """The strategy with a baseline."""
        return Score(baseline)

    def fits(self, site: Site) -> bool:
        return not site.spec.unsampled

    def draw(self, site: Site, key: jax.Array) -> jax.Array:
        value = jax.lax.stop_gradient(site.draw(key))
        baselines = []
        learned = isinstance(self.baseline, Learned)
        if self.baseline is not None:

            def baseline(payload: Any) -> Any:
                b = payload["grad"].baseline
                return jnp.asarray(b.value if learned else b, jnp.result_type(float))

            baselines = [site.over_lanes(baseline)]
            if jnp.shape(baselines[0]) != lane_shape(site.lanes):
                shape = jnp.shape(baselines[0])[len(site.lanes) :]
                raise GradientError(
                    f"site {_address(site)!r}: a baseline is one number for each draw, got shape {shape}"
                )
        return mark("score", site, [value, _own_density(site, value), *baselines], learned=learned)


class Enum(Strategy):
    r"""The sum over all values: $\sum_v q_\theta(v)\, k(v)$.

    If the choice has several copies, one is enumerated at a time, and the others stay as they were drawn.
    """

    def fits(self, site: Site) -> bool:
        return site.spec.values is not None and not site.spec.event_shape

    def draw(self, site: Site, key: jax.Array) -> jax.Array:
        value = jax.lax.stop_gradient(site.draw(key))
        assert site.spec.values is not None
        listed = np.asarray(site.spec.values.value, site.spec.dtype)
        every = jnp.broadcast_to(
            listed.reshape(-1, *(1,) * value.ndim), (len(listed), *value.shape)
        )
        log_q = jax.vmap(lambda v: _own_density(site, v))(every)
        if "where" in site.parts:  # a choice that is not made has the value that it has
            log_q = jnp.where(_made(site, value) | (every == value), log_q, -jnp.inf)
        return mark(
            "enum", site, [value, jnp.moveaxis(log_q, 0, -1)], values=tuple(listed.tolist())
        )


class Mvd(Strategy):
    r"""Measure-valued derivatives: $c\, (k(x^+) - k(x^-))$ for each parameter (Pflug 1996; Mohamed et al. 2020).

    They exist for Bernoulli, Categorical, Normal, Poisson, Exponential, Gamma (its rate) and Geometric laws, and are of
    first order only.
    """

    def fits(self, site: Site) -> bool:
        return fours_of(_distribution(site)) is not None

    def draw(self, site: Site, key: jax.Array) -> jax.Array:
        value = jax.lax.stop_gradient(site.draw(key))
        fours = fours_of(_distribution(site))
        assert fours is not None
        lanes = lane_shape(site.lanes)
        keys = jax.random.split(jax.random.fold_in(key, 1), lanes)

        def one(payload: Any, value: Any, key: Any) -> list[Any]:
            found = fours(base_of(payload["d"]), value, key)
            return [
                jnp.broadcast_to(jnp.asarray(a), value.shape).astype(
                    value.dtype if i % 4 > 1 else jnp.result_type(float)
                )
                for i, a in enumerate(a for four in found for a in four)
            ]

        value = _only(site, value, UNCOVERED.get(type(base_of(_distribution(site))), ()))
        return mark("mvd", site, [value, *site.over_lanes(one, value, keys)])


class Reweight(Strategy):
    """Importance weights: the choice is drawn from a proposal, and the weight multiplies what follows.

    No parameter moves the proposal.

    Attributes:
        proposal: a distribution of the same shape that covers the distribution of the choice.
    """

    proposal: Any = None

    def __call__(self, proposal: Any) -> Reweight:
        """The strategy with a proposal."""
        return Reweight(proposal)

    def fits(self, site: Site) -> bool:
        return True

    def draw(self, site: Site, key: jax.Array) -> jax.Array:
        if self.proposal is None:
            raise GradientError(
                f"site {_address(site)!r}: reweight needs a proposal, gradients.reweight(dist)"
            )
        keys = jax.random.split(key, lane_shape(site.lanes))
        value = site.over_lanes(
            lambda p, k: jnp.broadcast_to(p["grad"].proposal.sample(k), site.spec.shape).astype(
                site.spec.dtype
            ),
            keys,
        )
        value = jax.lax.stop_gradient(value)

        def other(payload: Any, value: Any) -> Any:
            log_prob = payload["grad"].proposal.log_prob(value)
            return jnp.broadcast_to(log_prob, site.spec.shape[: site.spec.batch_ndim])

        log_weight = _own_density(site, value) - jax.lax.stop_gradient(
            site.over_lanes(other, value)
        )
        return mark("reweight", site, [value, log_weight])


class Gumbel(Strategy):
    r"""Straight through the Gumbel-softmax relaxation (Jang, Gu and Poole 2017; Maddison et al. 2017): **biased**.

    The draw is exact. Its derivative is that of $\operatorname{softmax}((\log q + g) / T)$ at the same noise $g$. The
    gradient is wrong on average. The error grows with the temperature, and with the curvature of the rest of the
    program. The variance grows as the temperature falls. The strategy is for Bernoulli choices, and for
    ``Multinomial(1, probs, total_count_max=1)``, which is a categorical choice given by its indicators. The draw must
    be used by arithmetic.

    Attributes:
        temperature: T.
    """

    temperature: Any = 0.5
    biased = True

    def __call__(self, temperature: Any = 0.5) -> Gumbel:
        """The strategy at a temperature."""
        return Gumbel(temperature)

    def fits(self, site: Site) -> bool:
        d = base_of(_distribution(site))
        if isinstance(d, (dist.MultinomialProbs, dist.MultinomialLogits)):
            return d.total_count_max == 1
        return isinstance(d, (dist.BernoulliProbs, dist.BernoulliLogits))

    def draw(self, site: Site, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, lane_shape(site.lanes))

        def one(payload: Any, key: Any) -> tuple[Any, Any]:
            d: Any = base_of(payload["d"])
            temperature = payload["grad"].temperature
            logits: Any = jnp.broadcast_to(d.logits, site.spec.shape)
            if isinstance(d, (dist.BernoulliProbs, dist.BernoulliLogits)):
                noisy = logits + jax.random.logistic(key, logits.shape)
                return noisy > 0, jax.nn.sigmoid(noisy / temperature)
            noisy = logits + jax.random.gumbel(key, logits.shape)
            hard = jax.nn.one_hot(jnp.argmax(noisy, -1), logits.shape[-1])
            return hard, jax.nn.softmax(noisy / temperature)

        hard, soft = site.over_lanes(one, keys)
        value = jax.lax.stop_gradient(hard).astype(site.spec.dtype)
        return mark("gumbel", site, [value, value + (soft - jax.lax.stop_gradient(soft))])


reparam, score, enum, mvd, reweight = Reparam(), Score(), Enum(), Mvd(), Reweight()
gumbel = Gumbel()


def learned(baseline: Any, *inputs: Any) -> Learned:
    """A baseline that learns: its value is regressed on the cost that follows the choice.

    The gradient of the objective also moves the parameters of the baseline, towards the cost. This part of the gradient
    moves nothing else: derivatives with respect to ``inputs`` are stopped.

    Args:
        baseline: an array, such as a number among the parameters, which becomes a running mean; or a function of
            ``inputs``, such as a network.
        *inputs: anything that is known before the choice.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import expect, gradients, sample
        >>> def cost(params):
        ...     by = gradients.score(baseline=gradients.learned(params["mean"]))
        ...     return (sample("x", dist.Bernoulli(logits=params["logit"]), grad=by) - 0.2) ** 2
        >>> slopes = jax.grad(expect(cost), argnums=1)(jax.random.key(0), {"mean": 0.0, "logit": 0.0})
        >>> sorted(slopes)
        ['logit', 'mean']
    """
    return Learned(baseline(*jax.lax.stop_gradient(inputs)) if callable(baseline) else baseline)


def chosen(site: Site) -> Strategy:
    """The strategy of a site: the one that was asked for, or the default.

    Raises:
        GradientError: if the strategy cannot be used there.
    """
    asked = _strategy(site) if "grad" in site.parts else None
    if asked is None:
        return reparam if site.spec.reparametrised else score
    if not isinstance(asked, Strategy):
        raise GradientError(
            f"site {_address(site)!r}: grad={asked!r} is no gradient strategy; they are in weft.gradients: reparam, "
            "score, enum, mvd, reweight, gumbel"
        )
    if not asked.fits(site):
        raise GradientError(
            f"site {_address(site)!r}: {type(asked).__name__.lower()} does not fit {site.spec.label}; possible are "
            f"{', '.join(fitting(site))}"
        )
    return asked


def marked_draw(site: Site, key: jax.Array) -> jax.Array:
    """A draw of a site, marked as its strategy needs it."""
    return chosen(site).draw(site, key)


def fitting(site: Site) -> list[str]:
    """The names of the strategies that a site's distribution allows."""
    strategies = (reparam, score, enum, mvd, reweight, gumbel)
    return [type(s).__name__.lower() for s in strategies if s.fits(site)]


def _strategy(site: Site) -> Any:
    """The strategy in the payload of a site. Its arrays may be placeholders."""
    return site.skeleton.unpack(site.operands[:-1])["grad"]


def _distribution(site: Site) -> Any:
    return site.skeleton.unpack(site.operands[:-1])["d"]


def _address(site: Site) -> str:
    return ".".join(site.address)


def _own_density(site: Site, value: jax.Array) -> jax.Array:
    """The log density of a draw, without scaling. It is zero where a mask says that the choice is not made."""
    if "where" not in site.parts:
        return site.log_prob(value)
    own = site.guarded().log_prob(value)
    return jnp.where(_made(site, own), own, 0)


def _made(site: Site, density: jax.Array) -> jax.Array:
    """The mask of where a choice is made, in the shape of a density."""
    return site.over_lanes(lambda p, lp: jnp.broadcast_to(p["where"], lp.shape), density)


def _only(site: Site, value: jax.Array, others: tuple[str, ...]) -> jax.Array:
    """``value``, with an error if a derivative with respect to the named parameters is asked for."""
    if not others:
        return value
    parameters = [
        site.over_lanes(lambda p, n=n: jnp.asarray(getattr(base_of(p["d"]), n))) for n in others
    ]
    return guarded(
        value,
        parameters,
        f"site {_address(site)!r}: mvd has no derivative with respect to the {' and '.join(others)} of "
        f"{site.spec.label}; possible are {', '.join(n for n in fitting(site) if n != 'mvd')}",
    )
