"""Laplace's approximation: a normal guide at the mode, with the curvature there."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from weft.inference.run.runner import tracing
from weft.ppl import Model, Target
from weft.ppl.stage.addresses import flatten
from weft.ppl.stage.errors import WeftError

from .families import FullRank
from .guide_start import start_of
from .guides import triangular
from .modes import mode


def laplace(
    target: Target,
    *,
    init: Any = None,
    num_steps: int = 1000,
    key: PRNGKeyArray | None = None,
) -> tuple[Model, dict[str, Any]]:
    r"""The normal at the mode of the unconstrained density, with the inverse of its curvature.

    $$z \sim N(z^*, H^{-1}), \qquad z^* = \mathrm{arg\,max}_z \log p(z), \qquad H = -\nabla^2 \log p(z^*)$$

    Here $p(z)$ includes the Jacobians of the bijections. L-BFGS, and then Newton's method, find the mode. Automatic
    differentiation computes the $n \times n$ matrix $H$, and it is inverted in double precision. The result is the
    guide of `full_rank` at these parameters. It is ready to use, and a good start for `fit`.

    Args:
        target: the target.
        init: choices to begin at, as in `mean_field`. If there are several modes, the one uphill of `init` is found.
        num_steps: the most steps of L-BFGS.
        key: a random key for draws of the prior.

    Returns:
        The guide, and its parameters `{"loc": {address: array}, "scale_tril": (n, n)}`.

    Raises:
        TypeError: if `target` is no Target.
        DensityError: for discrete choices, and as in `mean_field`; the message names the site. Also if no mode is
            found, or if the density does not fall off in all directions from the point that was found; the message
            names the directions.

    References:
        Tierney and Kadane (1986), "Accurate approximations for posterior moments and marginal
        densities".

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import laplace
        >>> @gen
        ... def model():
        ...     mu = sample("mu", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(mu, 1.0))
        >>> guide, params = laplace(model().given({"y": 2.0}))
        >>> program = guide(params)  # the posterior, N(1, 1/2)
        >>> print(f"{program.log_density({'mu': 1.0}):.4f}")
        -0.5724
    """
    if tracing(key):
        raise WeftError(
            "laplace: it decides on the values that it finds, so it runs outside of jit and vmap"
        )
    start = start_of("laplace", target, init, 1.0, key)
    space = start.target.unconstrain().flat
    z = jnp.concatenate([x.reshape(-1) for x in start.loc.values()])
    found, hessian = mode(start.target, z, num_steps)
    covariance = np.linalg.inv(hessian)
    tril = jnp.asarray(np.linalg.cholesky((covariance + covariance.T) / 2), z.dtype)
    loc = flatten(space.unravel(jnp.asarray(found, z.dtype)))
    return start.guide("laplace", FullRank(start.parts)), {
        "loc": loc,
        "scale_tril": triangular(tril),
    }
