"""Distributions for sites: those of NumPyro, and Weft's own, under one import.

A site takes any pytree with `sample(key)` and `log_prob(value)`. A distribution need not be listed here to be used.

Examples:
    >>> import jax
    >>> from weft.models import distributions as dist
    >>> dist.Normal(0.0, 1.0).sample(jax.random.key(0)).shape
    ()
"""

from numpyro.distributions import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]
from weft.models.state_space.hidden_markov import HiddenMarkov as HiddenMarkov
from weft.models.state_space.linear_gaussian import LinearGaussian as LinearGaussian
