"""Objectives of variational inference: estimators `f(key, params, *batch)` of a bound, which `fit` maximises.

Each objective is a few lines around `expect` and `draw`. Copy one to write your own. The gradient strategies of the
guide's sites (`weft.gradients`) decide how it is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, PRNGKeyArray
from weft.inference.weighted.proposals import check_proposal, log_ratio
from weft.ppl import Program, Target, draw, expect
from weft.ppl.expectations.gradients import with_baselines
from weft.ppl.stage.addresses import flatten
from weft.ppl.stage.errors import GradientError, WeftError
from weft.ppl.stage.modules import Noun
from weft.ppl.stage.packing import is_traced


def stop(tree: Any) -> Any:
    """The same pytree without derivatives. Leaves that are no arrays stay: networks hold functions, too."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if is_traced(x) else x, tree)


class Objective(Noun):
    """Base of the objectives of a target and a guide.

    Attributes:
        target: a target; or a function `(params, *batch) -> Target`, for a model with parameters of its own or for
            minibatches. For minibatches scale the model: `scale(model, {"row": N / B})`.
        guide: a function `(params, *batch) -> Program` that draws exactly the target's latent choices.
    """

    target: Target | Callable[..., Target]
    guide: Callable[..., Program]

    def __check_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.target, Target) and not callable(self.target):
            raise TypeError(
                f"{name}: expected a Target or a function (params, *batch) -> Target, got "
                f"{type(self.target).__name__}; condition the program first: model(*args).given(data)"
            )
        if isinstance(self.guide, Program) or not callable(self.guide):
            raise TypeError(
                f"{name}: expected a guide that is a function (params, *batch) -> Program, got "
                f"{type(self.guide).__name__}"
            )
        counts = {"num_samples": 1, "num_particles": self.least_particles, "num_auxiliary": 1}
        for field, least in counts.items():
            n = getattr(self, field, least)
            if not isinstance(n, (int, np.integer)) or n < least:
                what = "a positive integer" if least == 1 else f"an integer, at least {least}"
                raise WeftError(f"{name}: {field} must be {what}, got {n!r}")

    @property
    def least_particles(self) -> int:
        """The smallest number of particles that makes sense."""
        return 1

    @property
    def covers(self) -> bool:
        """Whether the guide must cover the target's support. If not, it must lie inside it.

        It must cover the support if its density is taken at draws of the posterior. It must lie inside if the target's
        density is taken at draws of the guide.
        """
        return False

    def __call__(self, key: PRNGKeyArray, params: Any, *batch: Any) -> Float[Array, ""]:
        """An estimate."""
        raise NotImplementedError

    def at(self, params: Any, *batch: Any) -> tuple[Target, Program]:
        """The target and the guide at the given parameters."""
        target = self.target if isinstance(self.target, Target) else self.target(params, *batch)
        return target, self.guide(params, *batch)

    def pair(self, params: Any, *batch: Any) -> tuple[Target, Program]:
        """The target and the guide at the given parameters, after a check that they fit."""
        target, guide = self.at(params, *batch)
        check_proposal(guide, target, "guide", covers=self.covers)
        return target, guide

    def check(self, params: Any, *batch: Any) -> None:
        """Refuse a pair that gives no bound.

        Raises:
            AddressError: if the guide does not draw exactly the latent choices of the target.
            DensityError: if the guide is not normalised, or if the support of a choice does not match the target's.
        """
        target, guide = self.at(params, *batch)
        if not isinstance(target, Target):
            raise TypeError(
                f"{type(self).__name__}: the target function returned a {type(target).__name__}, expected a Target: "
                "model(...).given(data)"
            )
        check_proposal(guide, target, "guide", covers=self.covers)

    def explain(self, key: PRNGKeyArray, params: Any, *batch: Any) -> str:
        """The sites that make a bound infinite or not a number."""
        target, guide = self.at(params, *batch)
        trace = guide.simulate(key)
        found = []
        for what, terms in (
            ("target", target.log_densities(trace.choices, key=key)),
            ("guide", guide.log_densities(trace.choices, key=key)),
        ):
            for address, term in flatten(terms).items():
                term = np.asarray(term)
                bad = ~np.isfinite(term)
                if bad.any():
                    found.append(
                        f"in the {what}, the log density of {address!r} is {term[bad].flat[0]}"
                    )
        values = ", ".join(
            f"{a} = {np.array2string(np.asarray(v), precision=4, threshold=6)}"
            for a, v in flatten(trace.choices).items()
        )
        return "; ".join([*found, f"at the guide's draw {values}"])


class elbo(Objective):
    r"""The evidence lower bound.

    Let $p$ be the target and $q_\phi$ a guide with parameters $\phi$. Both are programs. Then

    $$\mathrm{ELBO}(\phi) = \mathbb{E}_{q_\phi}[\log p(x, y) - \log q_\phi(x)] \le \log p(y).$$

    Called with a key it gives an unbiased estimate. The gradient of this estimate with respect to the parameters is an
    unbiased estimate of the gradient of the ELBO, by the strategy of each site of the guide.

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: a function `(params, *batch) -> Program`.
        num_samples: the number of draws of the guide that are averaged. With two or more, score terms have
            leave-one-out baselines.
        sticking_the_landing: whether to leave the explicit dependence of $\log q_\phi$ on the parameters out of the
            gradient (Roeder et al. 2017). That part has mean zero. Without it the variance vanishes where the guide is
            the posterior.

    References:
        Jordan et al. (1999); Kingma and Welling (2014), equation 3, for the reparametrised
        estimator.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import elbo
        >>> @gen
        ... def model():
        ...     mu = sample("mu", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(mu, 1.0))
        >>> @gen
        ... def guide(params):
        ...     sample("mu", dist.Normal(params["loc"], params["scale"]))
        >>> bound = elbo(model().given({"y": 2.0}), guide)
        >>> exact = {"loc": 1.0, "scale": 0.5**0.5}  # the posterior: every draw gives the log evidence
        >>> print(f"{bound(jax.random.key(0), exact):.4f}")
        -2.2655
    """

    num_samples: int = eqx.field(default=1, static=True)
    sticking_the_landing: bool = eqx.field(default=False, static=True)

    def __call__(self, key: PRNGKeyArray, params: Any, *batch: Any) -> Float[Array, ""]:
        """An unbiased estimate of the bound."""

        def bound(params: Any) -> Array:
            target, guide = self.pair(params, *batch)
            trace = draw(guide)
            if not self.sticking_the_landing:
                return log_ratio(target, guide, trace)
            _require_exact(guide, "sticking_the_landing")
            still = self.guide(stop(params), *batch)
            return log_ratio(target, still, trace, trace.choices)

        return expect(bound, num_samples=self.num_samples)(key, params)


def log_weights(objective: Objective, num_particles: int, params: Any, *batch: Any) -> Array:
    """`log p(x_i, y) - log q(x_i)` of draws of the guide, of shape `(num_particles,)`. To be used in an expectation."""
    target, guide = objective.pair(params, *batch)
    return jax.vmap(lambda _: log_ratio(target, guide, draw(guide)))(jnp.arange(num_particles))


class iwelbo(Objective):
    r"""The importance-weighted bound.

    $$\mathrm{IWELBO}_K(\phi) = \mathbb{E}\left[ \log \frac{1}{K} \sum_{i=1}^K w_i \right],
    \qquad w_i = \frac{p(x_i, y)}{q_\phi(x_i)}, \quad x_i \sim q_\phi$$

    It is at least the ELBO, and rises to $\log p(y)$ as $K$ grows.

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: a function `(params, *batch) -> Program`.
        num_particles: the number $K$ of draws.
        vimco: whether score terms have baselines. The baseline of a draw is the bound with the weight of that draw
            replaced by the geometric mean of the others (Mnih and Rezende 2016).
        dreg: whether the gradients of the guide are doubly reparametrised (Tucker et al. 2019). Their relative noise
            does not grow with `K`. All sites of the guide must be reparametrised.

    References:
        Burda, Grosse and Salakhutdinov (2016), equation 8.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import iwelbo
        >>> @gen
        ... def model():
        ...     sample("y", dist.Normal(sample("mu", dist.Normal(0.0, 1.0)), 1.0))
        >>> guide = gen(lambda params: sample("mu", dist.Normal(params, 1.0)))
        >>> bound = iwelbo(model().given({"y": 2.0}), guide, num_particles=5000)
        >>> print(f"{bound(jax.random.key(0), 1.0):.1f}")  # the log evidence is -2.2655
        -2.3
    """

    num_particles: int = eqx.field(default=10, static=True)
    vimco: bool = eqx.field(default=False, static=True)
    dreg: bool = eqx.field(default=False, static=True)

    @property
    def least_particles(self) -> int:
        return 2 if self.vimco else 1

    def __call__(self, key: PRNGKeyArray, params: Any, *batch: Any) -> Float[Array, ""]:
        """An unbiased estimate of the bound."""
        k = self.num_particles

        def bound(params: Any) -> Array:
            if self.dreg:
                return self.doubly_reparametrised(params, *batch)
            log_w = log_weights(self, k, params, *batch)
            value = logsumexp(log_w) - jnp.log(k)
            if not self.vimco:
                return value
            mean_of_others = (jnp.sum(log_w) - log_w) / (k - 1)
            without = jnp.where(jnp.eye(k, dtype=bool), mean_of_others[:, None], log_w)
            return with_baselines(value, log_w, logsumexp(without, 1) - jnp.log(k))

        return expect(bound)(key, params)

    def doubly_reparametrised(self, params: Any, *batch: Any) -> Array:
        """The bound with doubly reparametrised gradients.

        The path through each draw is weighed once more, and the explicit part of `log q` is left out.
        """
        target, guide = self.pair(params, *batch)
        fixed = [a for a in guide.latents if not guide.sites[a].reparametrised]
        if fixed:
            raise GradientError(
                f"iwelbo: dreg needs every site of the guide reparametrised; {', '.join(map(repr, fixed))} cannot be. "
                "Take vimco=True in its place"
            )
        _require_exact(guide, "dreg")
        still = self.guide(stop(params), *batch)
        traces = jax.vmap(lambda _: draw(guide))(jnp.arange(self.num_particles))

        def ratio(trace: Any, choices: Any) -> Array:
            return log_ratio(target, still, trace, choices)

        weights = jax.nn.softmax(stop(jax.vmap(ratio)(traces, traces.choices)))

        def weighed(x: Array) -> Array:
            w = weights.reshape(-1, *(1,) * (x.ndim - 1))
            return stop(x) + w * (x - stop(x))

        log_w = jax.vmap(ratio)(traces, jax.tree.map(weighed, traces.choices))
        return logsumexp(log_w) - jnp.log(self.num_particles)


def _require_exact(guide: Program, option: str) -> None:
    if guide.estimated:
        raise GradientError(
            f"{option} needs the density of the guide apart from its draw, and the density of {guide.name!r} is an "
            "estimate that belongs to the draw: leave the option out"
        )


class renyi(Objective):
    r"""The variational Rényi bound, estimated from $K$ draws.

    $$\frac{1}{1 - \alpha} \log \mathbb{E}_{q_\phi}[w^{1 - \alpha}], \qquad w = \frac{p(x, y)}{q_\phi(x)}$$

    For $\alpha$ in (0, 1) it lies between the log evidence ($\alpha = 0$) and the ELBO ($\alpha$ near 1). With finitely
    many draws it is biased towards the ELBO. Negative values of $\alpha$ are allowed.

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`.
        guide: a function `(params, *batch) -> Program`.
        alpha: the order $\alpha$, any number but 1.
        num_particles: the number $K$ of draws.

    References:
        Li and Turner (2016), equation 14.
    """

    alpha: float = eqx.field(default=0.5, static=True)
    num_particles: int = eqx.field(default=10, static=True)

    def __check_init__(self) -> None:
        if self.alpha == 1:
            raise WeftError("renyi: at alpha = 1 the bound is the ELBO: take elbo")

    def __call__(self, key: PRNGKeyArray, params: Any, *batch: Any) -> Float[Array, ""]:
        """An unbiased estimate of the bound for this many draws."""

        def bound(params: Any) -> Array:
            log_w = (1 - self.alpha) * log_weights(self, self.num_particles, params, *batch)
            return (logsumexp(log_w) - jnp.log(self.num_particles)) / (1 - self.alpha)

        return expect(bound)(key, params)
