"""Whole series as distributions: linear-Gaussian models and hidden Markov models, with their states integrated out.

The value of such a distribution is the series of observations. `log_prob` sums over all paths of the states, by the
exact recursion. So a site `sample("y", LinearGaussian(...))` leaves only the parameters to infer. `filter`, `smoother`,
`viterbi` and `sample_states` give the states back, and `forecast` continues the series. With `parallel=True` every
recursion over time is an associative scan: more work in logarithmic depth, for accelerators. For many series use
`jax.vmap`.

Examples:
    The noise of a random walk, from a series of which one observation is missing.

    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
    >>> from weft import gen, sample
    >>> from weft.models.state_space import LinearGaussian
    >>> y = jnp.array([[1.1], [2.3], [0.0], [2.9]])
    >>> seen = jnp.array([True, True, False, True])
    >>> one = jnp.eye(1)
    >>> @gen
    ... def walk():
    ...     q = sample("q", dist.HalfNormal(1.0))
    ...     sample("y", LinearGaussian(jnp.zeros(1), one, one, q**2 * one, one, 0.25 * one, where=seen))
    >>> target = walk().given({"y": y})
    >>> target.latents
    ('q',)
    >>> bool(target.log_density({"q": 0.8}) > target.log_density({"q": 8.0}))
    True
"""

from .forward_backward import FilteredStates as FilteredStates
from .forward_backward import SmoothedStates as SmoothedStates
from .forward_backward import ViterbiPath as ViterbiPath
from .hidden_markov import HiddenMarkov as HiddenMarkov
from .kalman import FilteredGaussian as FilteredGaussian
from .kalman import Gaussian as Gaussian
from .kalman import SmoothedGaussian as SmoothedGaussian
from .linear_gaussian import LinearGaussian as LinearGaussian
