"""Objectives of variational inference: estimators `f(key, params, *batch)` of a bound, to be maximised by `fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from weft.ppl import Program, Target, draw, expect
from weft.ppl.addresses import flatten
from weft.ppl.compat import as_key
from weft.ppl.errors import WeftError

from .weights import check_proposal, log_ratio


class elbo(eqx.Module):
    r"""The evidence lower bound.

    For a guide `q` with parameters `phi` and a target `p`, both programs,

        ELBO(phi) = E_q [ log p(x, y) - log q(x) ]  <=  log p(y).

    Called with a key it gives an unbiased estimate, whose gradient with respect to the parameters
    is an unbiased estimate of the ELBO's, by the strategy of each site of the guide
    (reparametrisation).

    Attributes:
        target: a target, or a function `(params, *batch) -> Target`: for a model with parameters of
            its own, or for minibatches, where the model is scaled by `scale(model, {"row": N /
            B})`.
        guide: a function `(params, *batch) -> Program` that draws exactly the target's latent
            choices.
        num_samples: draws of the guide that are averaged.

    References:
        Jordan et al. (1999); Kingma and Welling (2014), equation 3, for the reparametrised
        estimator.

    Example:
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

    target: Target | Callable[..., Target]
    guide: Callable[..., Program]
    num_samples: int = eqx.field(default=1, static=True)

    def __check_init__(self) -> None:
        if not isinstance(self.target, Target) and not callable(self.target):
            raise TypeError(
                "elbo: expected a Target or a function (params, *batch) -> Target, got "
                f"{type(self.target).__name__}; condition the program first: model(*args).given(data)"
            )
        if isinstance(self.guide, Program) or not callable(self.guide):
            raise TypeError(
                "elbo: expected a guide that is a function (params, *batch) -> Program, got "
                f"{type(self.guide).__name__}"
            )
        if not isinstance(self.num_samples, (int, np.integer)) or self.num_samples < 1:
            raise WeftError(
                f"elbo: num_samples must be a positive integer, got {self.num_samples!r}"
            )

    def __call__(self, key: PRNGKeyArray, params: Any, *batch: Any) -> Float[Array, ""]:
        """An unbiased estimate of the bound."""

        @expect
        def bound(params: Any) -> Array:
            target, guide = self.at(params, *batch)
            check_proposal(guide, target, "guide")
            trace = draw(guide)
            return log_ratio(target, guide, trace)

        if self.num_samples == 1:
            return bound(key, params)
        keys = jax.random.split(as_key(key), self.num_samples)
        return jnp.mean(jax.vmap(lambda k: bound(k, params))(keys))

    def at(self, params: Any, *batch: Any) -> tuple[Target, Program]:
        """The target and the guide at some parameters."""
        target = self.target if isinstance(self.target, Target) else self.target(params, *batch)
        return target, self.guide(params, *batch)

    def check(self, params: Any, *batch: Any) -> None:
        """Refuse a pair that gives no bound.

        Raises:
            AddressError: if the guide does not draw exactly the latent choices of the target.
            DensityError: if the guide is not normalised.
        """
        target, guide = self.at(params, *batch)
        if not isinstance(target, Target):
            raise TypeError(
                f"elbo: the target function returned a {type(target).__name__}, expected a Target: "
                "model(...).given(data)"
            )
        check_proposal(guide, target, "guide")

    def explain(self, key: PRNGKeyArray, params: Any, *batch: Any) -> str:
        """Which sites make a bound that is not finite."""
        target, guide = self.at(params, *batch)
        trace = guide.simulate(key)
        found = []
        for what, terms in (
            ("target", target.log_densities(trace.choices)),
            ("guide", guide.log_densities(trace.choices)),
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
