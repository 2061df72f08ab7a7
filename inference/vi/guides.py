r"""Ready-made guides. Each takes a target and gives `(guide, params)`, for an objective and for `fit`.

A guide is a model `(params, *batch) -> Program` that draws exactly the target's latent choices, at their addresses and
in their supports. All guides here work in the same way. Write `z` for the latent choices on the unconstrained scale.
NumPyro's bijection `T_a` takes the elements `z_a` of the choice at address `a` to its support. A guide is a density of
`z` in the order of the program,

    q(z) = prod_a q(z_a | z_before a),        x_a = T_a(z_a),
    log q(x) = sum_a [ log q(z_a | z_before a) - log |det dT_a / dz_a| ],

with one factor for each site. A site of the guide is the push-forward of its factor by `T_a`. It reads the choices
before it as `z_b = T_b^-1(x_b)`. So a law that is joint over all choices, such as a normal with a full covariance, is a
plain program, and has no choice that the target lacks. Guides differ in the factor:

| guide | law of `z` | parameters for `n` elements | cost of a draw |
| --- | --- | --- | --- |
| `mean_field` | independent normals | `2 n` | `n` |
| `full_rank`, `laplace` | normal, any covariance | `n + n (n + 1) / 2` | `n^2` for each site |
| `low_rank` | normal, diagonal plus rank `r` | `(2 + r) n` | `n (r^2 + r^3)` |
| `structured` | linear-Gaussian along the model's own dependences | by the model | by the model |
| `flow` | autoregressive spline flow | `~ n (h + n) + 3 n h bins` | the same, `n` steps in sequence |

If a choice is so close to the border of its support that it rounds to it, its unconstrained value is lost. In single
precision an interval resolves `|z| < 15`, and scores are less exact near that. If a site is observed in part, its
observed elements are no latent choices. The guide draws them from N(0, 1) on the unconstrained scale, and objectives
leave them out.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro.distributions import constraints
from weft.ppl import Model, Target
from weft.ppl.analysis.dependence import site_inputs
from weft.ppl.stage.errors import DensityError, WeftError
from weft.ppl.stage.keys import as_key

from .factorised import Latent
from .families import Flow, FullRank, LowRank, MeanField, Structured
from .guide_start import or_zero, start_of
from .parameters import constrained


def mean_field(
    target: Target, *, init: Any = None, scale: float = 0.1, key: PRNGKeyArray | None = None
) -> tuple[Model, dict[str, Any]]:
    r"""A guide of independent normals on the unconstrained scale.

    $$z_k \sim N(\mathrm{loc}_k, \mathrm{scale}_k^2), \qquad x = T(z)$$

    for each element $k$, where $T$ is NumPyro's bijection to the support of the choice. A discrete choice with values
    `0, ..., K - 1` has a categorical law with free logits. Its gradient is by the score function, unless
    `with_gradients(guide, {"z": gradients.enum})` says otherwise.

    Args:
        target: the target.
        init: choices to begin at, all or some, as a nested dict. The others begin at the median of draws of the prior,
            on the unconstrained scale.
        scale: the first standard deviation, on the unconstrained scale.
        key: a random key for draws of the prior; `jax.random.key(0)` if `None`.

    Returns:
        The guide and its parameters. The guide is a model `(params, *batch) -> Program`. The parameters are
        `{"loc": {address: array}, "scale": {address: array}}`, in the shapes of the choices on the unconstrained scale.
        Scales are constrained to be positive. For discrete choices there is also `"logits"`, of shape `(..., K)`.

    Raises:
        TypeError: if `target` is no Target.
        DensityError: for a discrete choice with other values, for a support that has no bijection from R^n, and for one
            that depends on choices that are not drawn before it. The message names the site.

    References:
        Kucukelbir et al. (2017), "Automatic differentiation variational inference", section 2.4.

    Examples:
        >>> import jax, optax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import elbo, fit, mean_field
        >>> @gen
        ... def model():
        ...     rate = sample("rate", dist.Gamma(2.0, 1.0))
        ...     sample("count", dist.Poisson(rate))
        >>> target = model().given({"count": 4})
        >>> guide, params = mean_field(target)
        >>> objective = elbo(target, guide, num_samples=10)
        >>> found = fit(jax.random.key(0), objective, params, optax.adam(0.02), 500, progress=False)
        >>> draws = jax.vmap(found.guide.simulate)(jax.random.split(jax.random.key(1), 10_000))
        >>> print(f"{draws.choices['rate'].mean():.0f}")  # the posterior is Gamma(6, 2)
        3
    """
    start = start_of("mean_field", target, init, scale, key, discrete=True)
    params: dict[str, Any] = {"loc": start.loc, "scale": start.scale(scale)}
    logits = {
        p.address: jnp.zeros((*p.batch_shape, p.num_values))
        for p in start.latents
        if p.num_values is not None
    }
    return start.guide("mean_field", MeanField()), {
        **params,
        "logits": logits,
    } if logits else params


def full_rank(
    target: Target, *, init: Any = None, scale: float = 0.1, key: PRNGKeyArray | None = None
) -> tuple[Model, dict[str, Any]]:
    r"""A guide that is a normal of any covariance over all choices, on the unconstrained scale.

    $$z \sim N(\mathrm{loc}, L L^\top), \qquad x = T(z)$$

    Here $L$ is lower triangular, $n \times n$, in the order of `target.unconstrain().flat.addresses`. The site at
    address $a$ draws its elements given the choices before it, in standardised form $\varepsilon_{<a}$:

    $$z_a \sim N(\mathrm{loc}_a + L_{a,<a}\, \varepsilon_{<a},\; L_{aa} L_{aa}^\top), \qquad
    \varepsilon_{<a} = L_{<a,<a}^{-1} (z_{<a} - \mathrm{loc}_{<a})$$

    The product of these conditionals is exactly the joint normal.

    Args:
        target: the target.
        init: choices to begin at, as in `mean_field`.
        scale: the first standard deviation. There are no correlations at first.
        key: a random key for draws of the prior.

    Returns:
        The guide, and its parameters `{"loc": {address: array}, "scale_tril": (n, n)}`.

    Raises:
        TypeError: if `target` is no Target.
        DensityError: for discrete choices, and as in `mean_field`. The message names the site.

    References:
        Kucukelbir et al. (2017), section 2.4.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import elbo, fit, full_rank
        >>> @gen
        ... def model():
        ...     a = sample("a", dist.Normal(0.0, 1.0))
        ...     b = sample("b", dist.Normal(0.0, 1.0))
        ...     sample("sum", dist.Normal(a + b, 0.5))
        >>> target = model().given({"sum": 1.0})
        >>> guide, params = full_rank(target)
        >>> objective = elbo(target, guide, num_samples=10, sticking_the_landing=True)
        >>> found = fit(jax.random.key(0), objective, params, optax.adam(0.02), 1000, progress=False)
        >>> L = found.params["scale_tril"]
        >>> print(f"{(L @ L.T)[0, 1]:.2f}")  # exactly -4/9
        -0.44
    """
    start = start_of("full_rank", target, init, scale, key)
    return start.guide("full_rank", FullRank(start.parts)), {
        "loc": start.loc,
        "scale_tril": triangular(scale * jnp.eye(start.parts.size)),
    }


def triangular(value: Array) -> Any:
    """A parameter that stays a lower Cholesky factor."""
    return constrained(value, constraints.lower_cholesky)


def low_rank(
    target: Target,
    *,
    rank: int = 5,
    init: Any = None,
    scale: float = 0.1,
    key: PRNGKeyArray | None = None,
) -> tuple[Model, dict[str, Any]]:
    r"""A guide that is a normal of low-rank plus diagonal covariance, on the unconstrained scale.

    $$z = \mathrm{loc} + W f + d\, e, \qquad f \sim N(0, I_r), \quad e \sim N(0, I_n), \qquad
    \mathrm{Cov}(z) = W W^\top + \mathrm{diag}(d^2)$$

    The site at address $a$ draws from the conditional given the choices before it. Given these, the factors $f$ are
    normal, with precision $I + \sum_k w_k w_k^\top / d_k^2$ and shift $\sum_k w_k (z_k - \mathrm{loc}_k) / d_k^2$. No
    $n \times n$ matrix is formed. A draw with its density takes $O(n r^3)$ operations and $O(n r^2)$ memory.

    Args:
        target: the target.
        rank: the number of factors `r`.
        init: choices to begin at, as in `mean_field`.
        scale: the first standard deviation, on the unconstrained scale. `W` begins at a tenth of it, in random
            directions, since the gradient of the bound vanishes at `W = 0`.
        key: a random key for draws of the prior, and for `W`.

    Returns:
        The guide and its parameters `{"loc": {address: array}, "scale": {address: array}, "factor": (n, r)}`. Here `d`
        is `scale`, and `W` is `factor`. The rows of `W` are in the order of `target.unconstrain().flat.addresses`.

    Raises:
        TypeError: if `target` is no Target.
        WeftError: if `rank` is no positive integer.
        DensityError: for discrete choices, and as in `mean_field`. The message names the site.

    References:
        Ong, Nott and Smith (2018), "Gaussian variational approximation with a factor covariance
        structure".

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, repeat, sample
        >>> from weft.inference import low_rank
        >>> @gen
        ... def model():
        ...     return repeat(lambda: sample("x", dist.Normal(0.0, 1.0)), 100)
        >>> guide, params = low_rank(model().given(), rank=3)
        >>> params["factor"].shape, guide(params).simulate(jax.random.key(0)).choices["x"].shape
        ((100, 3), (100,))
    """
    if not isinstance(rank, (int, np.integer)) or rank < 1:
        raise WeftError(f"low_rank: rank must be a positive integer, got {rank!r}")
    start = start_of("low_rank", target, init, scale, key)
    noise = jax.random.normal(jax.random.fold_in(as_key(or_zero(key)), 1), (start.parts.size, rank))
    return start.guide("low_rank", LowRank(start.parts)), {
        "loc": start.loc,
        "scale": start.scale(scale),
        "factor": 0.1 * scale * noise / math.sqrt(rank),
    }


def structured(
    target: Target, *, init: Any = None, scale: float = 0.1, key: PRNGKeyArray | None = None
) -> tuple[Model, dict[str, Any]]:
    r"""A guide in the shape of the model: each choice depends linearly on those that its site reads.

    $$z_a = \mathrm{loc}_a + \sum_{b\ \mathrm{read\ by}\ a} W_{ab} (z_b - \mathrm{loc}_b) + \mathrm{scale}_a\,
    \varepsilon_a, \qquad x = T(z)$$

    This is a linear-Gaussian network on the unconstrained scale. Its arrows are those of the model among its latent
    choices, which the staged program shows. Scales are free and depend on nothing. The rules are:

    - *Batch axes.* If `a` and `b` share their leading axes (of `vmap` or `scan`, with the same sizes and names), each
      index of these axes has weights of its own, and `a` reads `b` at the same index only. Otherwise all elements of
      `a` read all elements of `b`.
    - *Time.* A site that reads itself in a `scan` is a Markov chain. Step `t` reads step `t - 1`, with weights for
      every step. In nested scans the chain goes along the inner one.
    - *What is left out.* The guide draws the sites one after the other. So a site does not read a later one, such as
      the other of two states that alternate in a scan.

    Suppose that the model is linear and Gaussian, and that no observation joins two latent choices that are otherwise
    apart: a tree with the data at its leaves, or a state-space model. Then the posterior is in the family. If an
    observation does join two, as two causes of one datum, the guide misses the correlation that it brings. Take
    `full_rank` there.

    Args:
        target: the target.
        init: choices to begin at, as in `mean_field`.
        scale: the first standard deviation of a choice, given the choices that it reads. Weights begin at zero.
        key: a random key for draws of the prior.

    Returns:
        The guide and its parameters `{"loc": {address: array}, "scale": {address: array}, "weights": {...}}`. Weights
        are `{address: {address read: (copies, elements, elements read)}}`. Copies are the indices of the axes that the
        two choices share. For a chain, the weights of a site for itself have shape `(steps - 1, copies, elements,
        elements)`.

    Raises:
        TypeError: if `target` is no Target.
        DensityError: for discrete choices, for a choice observed in part, and as in `mean_field`. The message names the
            site.

    References:
        Hoffman and Blei (2015), "Structured stochastic variational inference"; Ambrogioni et al.
        (2021), "Automatic structured variational inference".

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import structured
        >>> @gen
        ... def walk():
        ...     def step(x, _):
        ...         x = sample("x", dist.Normal(x, 1.0))
        ...         sample("y", dist.Normal(x, 1.0))
        ...         return x, None
        ...     jax.lax.scan(step, sample("x0", dist.Normal(0.0, 1.0)), None, length=10)
        >>> guide, params = structured(walk().given({"y": jnp.ones(10)}))
        >>> {b: w.shape for b, w in params["weights"]["x"].items()}
        {'x0': (1, 10, 1), 'x': (9, 1, 1, 1)}
    """
    start = start_of("structured", target, init, scale, key)
    if start.index:
        raise DensityError(
            f"structured: {', '.join(map(repr, start.index))} is observed in part, so that its copies are not all "
            "alike; take mean_field, full_rank or low_rank"
        )
    reads = site_inputs(target.program.code()[0].jaxpr)
    parents, weights, chains = [], {}, {}
    for i, latent in enumerate(start.latents):
        read, own = reads.get(latent.address, frozenset()), {}
        lanes = {}
        for other in start.latents[:i]:
            if other.address in read:
                n = _shared(target, latent.address, other.address)
                lanes[other.address] = n
                own[other.address] = jnp.zeros((n, latent.size // n, other.size // n))
        if latent.address in read:
            chains[latent.address] = order = _chain(target, latent)
            steps, series, m = order.shape
            own[latent.address] = jnp.zeros((steps - 1, series, m, m))
        parents.append((latent.address, tuple(lanes.items())))
        if own:
            weights[latent.address] = own
    return start.guide("structured", Structured(tuple(parents), chains)), {
        "loc": start.loc,
        "scale": start.scale(scale),
        "weights": weights,
    }


def _shared(target: Target, address: str, other: str) -> int:
    """The number of lanes in the leading axes that two sites share."""
    n = 1
    for a, b in zip(target.sites[address].axes, target.sites[other].axes, strict=False):
        if a != b or a.kind not in ("lanes", "scan"):
            break
        n *= a.size
    return n


def _chain(target: Target, latent: Latent) -> Array:
    """The elements of a site in a scan as `(steps, lanes, elements of a step)`."""
    axes = target.sites[latent.address].axes
    time = max(i for i, a in enumerate(axes) if a.kind == "scan")
    outside = math.prod(a.size for i, a in enumerate(axes) if i != time and a.kind != "batch")
    order = jnp.moveaxis(jnp.arange(latent.size).reshape(latent.shape), time, 0)
    return order.reshape(axes[time].size, outside, -1)


def flow(
    target: Target,
    *,
    num_hidden: int = 32,
    num_bins: int = 8,
    init: Any = None,
    scale: float = 0.1,
    key: PRNGKeyArray | None = None,
) -> tuple[Model, dict[str, Any]]:
    r"""A guide that is an autoregressive spline flow over all unconstrained elements.

    $$z_k = \mathrm{loc}_k + \mathrm{scale}_k u_k, \qquad
    u_k = m_k(u_{<k}) + e^{l_k(u_{<k})}\, s_k(\varepsilon_k; u_{<k}), \qquad \varepsilon_k \sim N(0, 1)$$

    Here $m_k$ is a shift, $l_k$ a log scale, and $s_k$ a monotone rational-quadratic spline. One masked network, with a
    hidden layer and a linear skip, gives shift, log scale and spline. Every normal is in the family, by the skip alone.
    With enough units and bins the flow comes near to any law of `z`. There is only one layer: several layers of the
    same order make up a map of the same kind, and only such a map is a product over sites. The flow begins as the
    independent normals of `mean_field`.

    A density takes one pass of the network. A draw computes its elements in sequence, at the cost of one pass in all.

    Args:
        target: the target.
        num_hidden: the number of units of the hidden layer.
        num_bins: the number of bins of each spline.
        init: choices to begin at, as in `mean_field`.
        scale: the first standard deviation, on the unconstrained scale.
        key: a random key for draws of the prior, and for the network.

    Returns:
        The guide, and its parameters `{"loc": {address: array}, "scale": {address: array}, "network": {...}}`.

    Raises:
        TypeError: if `target` is no Target.
        WeftError: if there can be no network with so many units or bins.
        DensityError: for discrete choices, and as in `mean_field`. The message names the site.

    References:
        Papamakarios, Pavlakou and Murray (2017), "Masked autoregressive flow", equations 3 and 4;
        Durkan et al. (2019), "Neural spline flows"; Germain et al. (2015), "MADE".

    Examples:
        >>> import jax, jax.numpy as jnp, optax, numpyro.distributions as dist
        >>> from weft import gen, sample
        >>> from weft.inference import elbo, fit, flow
        >>> @gen
        ... def banana():
        ...     x = sample("x", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(x**2, 0.3))
        >>> target = banana().given()
        >>> guide, params = flow(target)
        >>> objective = elbo(target, guide, num_samples=32)
        >>> rate = optax.cosine_decay_schedule(0.03, 1000)
        >>> found = fit(jax.random.key(0), objective, params, optax.adam(rate), 1000, progress=False)
        >>> print(f"{found.bounds[-200:].mean():.1f}")  # the log evidence is 0; of normals the best is -0.8
        -0.1
    """
    for what, value, least in (("num_hidden", num_hidden, 1), ("num_bins", num_bins, 2)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise WeftError(f"flow: {what} must be an integer, at least {least}, got {value!r}")
    if num_bins > 200:
        raise WeftError(f"flow: num_bins must be 200 at most, got {num_bins}")
    start = start_of("flow", target, init, scale, key)
    n, outputs = start.parts.size, 2 + 3 * num_bins - 1
    noise_key = jax.random.fold_in(as_key(or_zero(key)), 1)
    network = {
        "in": jax.random.normal(noise_key, (num_hidden, n)) / math.sqrt(n),
        "hidden_bias": jnp.zeros(num_hidden),
        "out": jnp.zeros((n, num_hidden, outputs)),
        "bias": jnp.zeros((n, outputs)),
        "skip": jnp.zeros((n, n)),
    }
    return start.guide("flow", Flow(start.parts)), {
        "loc": start.loc,
        "scale": start.scale(scale),
        "network": network,
    }
