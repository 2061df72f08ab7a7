"""Kernels that follow the gradient of a density on R^n. The transitions are BlackJAX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, PRNGKeyArray
from weft.inference.run import libraries
from weft.inference.run.settings import require_counts, require_covariance, require_positive
from weft.ppl.stage.errors import WeftError

from .density_kernels import AdaptiveKernel, LogDensity, is_array, rate, require_fit
from .kernel import Info

if TYPE_CHECKING:
    from blackjax.mcmc.hmc import HMCState


class GradientKernel(AdaptiveKernel):
    """Base of the kernels in this file. All have the fields `step_size` and `inverse_mass`.

    Attributes:
        takes_metric: whether the inverse mass may be a BlackJAX metric.
    """

    takes_metric = False

    def check_scales(self: Any) -> None:
        who, inverse_mass = type(self).__name__, self.inverse_mass
        if self.step_size is not None:
            require_positive(who, "a step size is a positive number", self.step_size, 1)
        if inverse_mass is None or (self.takes_metric and _is_metric(inverse_mass)):
            return
        if not is_array(inverse_mass) or np.ndim(inverse_mass) not in (1, 2):
            came = (
                f"shape {np.shape(inverse_mass)}" if is_array(inverse_mass) else repr(inverse_mass)
            )
            raise WeftError(
                f"{who}: an inverse mass is an array, (n,) variances or an (n, n) covariance, got {came}"
            )
        if np.ndim(inverse_mass) == 2:
            require_covariance(who, "a dense inverse mass", inverse_mass)
        else:
            require_positive(who, "the variances of an inverse mass are positive", inverse_mass, 1)

    def scales(self: Any) -> tuple[Any, Any]:
        return self.step_size, self.inverse_mass

    def with_scales(self: Any, step_size: Any, inverse_mass: Any) -> Any:
        names = lambda k: (k.step_size, k.inverse_mass)  # noqa: E731
        return eqx.tree_at(names, self, (step_size, inverse_mass), is_leaf=lambda x: x is None)


class Hamiltonian(GradientKernel):
    """Base of `hmc` and `nuts`. One leapfrog step tells whether a first step size is reasonable."""

    takes_metric = True

    def __check_init__(self: Any) -> None:
        require_positive(
            self, "divergence_threshold is a positive number", self.divergence_threshold
        )

    def trial(self, step_size: Any, inverse_mass: Any) -> hmc:
        return hmc(step_size, 1, inverse_mass)

    def init(self, position: Any, log_density: LogDensity) -> HMCState:
        return libraries.hmc.init(position, log_density)

    def report(self, info: Any) -> Info:
        return {
            **rate(info),
            "diverging": info.is_divergent,
            "n_steps": jnp.asarray(info.num_integration_steps),
        }


class hmc(Hamiltonian):
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps.

    Attributes:
        step_size: the step size of the leapfrog integrator. With None a warm-up searches for the first one.
        num_steps: the number of leapfrog steps of a proposal. It may be traced.
        inverse_mass: `(n,)` variances or an `(n, n)` covariance over the flattened position; None for the identity. It
            may be a BlackJAX metric, which does not adapt.
        divergence_threshold: the energy error above which a trajectory counts as divergent.
        target_acceptance: the mean acceptance probability that a warm-up tunes the step size to.
        dense_mass: whether a warm-up estimates a full covariance.
        adapt: what a warm-up tunes: everything (True), `"step_size"` alone, or nothing (False).

    References:
        Neal (2011), MCMC using Hamiltonian dynamics.
    """

    step_size: Any = None
    num_steps: Any = 10
    inverse_mass: Any = None
    divergence_threshold: int = 1000
    target_acceptance: Any = eqx.field(default=0.8, kw_only=True)

    def __check_init__(self) -> None:
        require_counts(self, num_steps=1)

    def step(
        self, key: PRNGKeyArray, state: HMCState, log_density: LogDensity
    ) -> tuple[HMCState, libraries.hmc.HMCInfo]:
        kernel = libraries.hmc.build_kernel(divergence_threshold=self.divergence_threshold)
        metric = _metric(type(self).__name__, self.inverse_mass, state.position)
        return kernel(key, state, log_density, self.known_step(), metric, self.num_steps)


class nuts(Hamiltonian):
    """The No-U-Turn sampler: a trajectory doubles until it turns back, and the next state is drawn along it.

    Attributes:
        step_size: the step size of the leapfrog integrator. With None a warm-up searches for the first one.
        inverse_mass: as in `hmc`.
        max_tree_depth: a trajectory has at most `2 ** max_tree_depth` steps.
        divergence_threshold: the energy error above which a trajectory counts as divergent.
        target_acceptance: as in `hmc`; so are `dense_mass` and `adapt`.

    References:
        Hoffman and Gelman (2014); Betancourt (2017), appendix A, for the multinomial choice along the trajectory.
    """

    step_size: Any = None
    inverse_mass: Any = None
    max_tree_depth: int = 10
    divergence_threshold: int = 1000
    target_acceptance: Any = eqx.field(default=0.8, kw_only=True)

    def __check_init__(self) -> None:
        require_counts(self, max_tree_depth=1)

    def step(
        self, key: PRNGKeyArray, state: HMCState, log_density: LogDensity
    ) -> tuple[HMCState, libraries.nuts.NUTSInfo]:
        kernel = libraries.nuts.build_kernel(divergence_threshold=self.divergence_threshold)
        metric = _metric(type(self).__name__, self.inverse_mass, state.position)
        return kernel(key, state, log_density, self.known_step(), metric, self.max_tree_depth)


class mala(GradientKernel):
    r"""The Metropolis-adjusted Langevin algorithm: one step along the gradient with noise, accepted or rejected.

    $x' = x + \epsilon M^{-1} \nabla \log \pi(x) + \sqrt{2 \epsilon}\, \xi$, $\xi \sim N(0, M^{-1})$.

    Attributes:
        step_size: $\epsilon$. With None a warm-up searches for the first one.
        inverse_mass: $M^{-1}$, `(n,)` variances or an `(n, n)` covariance over the flattened position; None for the
            identity.
        target_acceptance: the mean acceptance probability that a warm-up tunes the step size to. The best value in many
            dimensions is 0.574.
        dense_mass: whether a warm-up estimates a full covariance.
        adapt: what a warm-up tunes: everything (True), `"step_size"` alone, or nothing (False).

    References:
        Roberts and Tweedie (1996), Bernoulli 2; Roberts and Rosenthal (1998), JRSS B 60, for the rate.
    """

    step_size: Any = None
    inverse_mass: Any = None
    target_acceptance: Any = eqx.field(default=0.574, kw_only=True)

    def init(self, position: Any, log_density: LogDensity) -> libraries.mala.MALAState:
        return libraries.mala.init(position, log_density)

    def report(self, info: Any) -> Info:
        return rate(info)

    def step(
        self, key: PRNGKeyArray, state: libraries.mala.MALAState, log_density: LogDensity
    ) -> tuple[libraries.mala.MALAState, libraries.mala.MALAInfo]:
        move = libraries.mala.build_kernel()
        step_size = self.known_step()
        return _scaled(
            "mala",
            lambda s, f: move(key, s, f, step_size),
            state,
            log_density,
            self.inverse_mass,
        )


class barker(GradientKernel):
    r"""Barker's proposal: a normal step in each coordinate, whose sign is drawn with the help of the gradient.

    With $z \sim N(0, \epsilon^2)$ a coordinate moves by $z$ with probability $1 / (1 + e^{-z \partial \log \pi(x)})$,
    else by $-z$. A Metropolis step follows. The kernel tolerates step sizes that are too large, with which `mala` does
    not move at all.

    Attributes:
        step_size: $\epsilon$. With None a warm-up searches for the first one.
        inverse_mass: as in `mala`; so are `dense_mass` and `adapt`.
        target_acceptance: the mean acceptance probability that a warm-up tunes the step size to. 0.4 is good in few
            dimensions. In the limit of many dimensions 0.574 is best.

    References:
        Livingstone and Zanella (2022), JRSS B 84; Vogrinc, Livingstone and Zanella (2023), Biometrika 110, for
        the limit.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from weft import gen, kernels, sample
        >>> @gen
        ... def model():
        ...     sample("rate", dist.Gamma(2.0, 1.0))
        >>> after, info = kernels.barker(1.0).move(jax.random.key(0), {"rate": 2.0}, model().given())
        >>> bool(0 < info["acceptance_rate"] <= 1)
        True
    """

    step_size: Any = None
    inverse_mass: Any = None
    target_acceptance: Any = eqx.field(default=0.4, kw_only=True)

    def init(self, position: Any, log_density: LogDensity) -> libraries.barker.BarkerState:
        return libraries.barker.init(position, log_density)

    def report(self, info: Any) -> Info:
        return rate(info)

    def step(
        self, key: PRNGKeyArray, state: libraries.barker.BarkerState, log_density: LogDensity
    ) -> tuple[libraries.barker.BarkerState, libraries.barker.BarkerInfo]:
        step_size = self.known_step()
        return _scaled(
            "barker",
            lambda s, f: _barker_step(key, s, f, step_size),
            state,
            log_density,
            self.inverse_mass,
        )


def _barker_step(
    key: PRNGKeyArray, state: libraries.barker.BarkerState, log_density: LogDensity, step_size: Any
) -> tuple[libraries.barker.BarkerState, libraries.barker.BarkerInfo]:
    """One transition. BlackJAX's own overflows where a step meets a steep slope, and then rejects without need."""
    normal_key, sign_key, accept_key = jax.random.split(key, 3)
    x, unravel = ravel_pytree(state.position)
    slope = ravel_pytree(state.logdensity_grad)[0]
    z = step_size * jax.random.normal(normal_key, x.shape, x.dtype)
    forward = jax.random.uniform(sign_key, x.shape, x.dtype) < jax.nn.sigmoid(z * slope)
    move = jnp.where(forward, z, -z)
    proposal = libraries.barker.init(unravel(x + move), log_density)
    slope_there = ravel_pytree(proposal.logdensity_grad)[0]
    # The normal law of z is symmetric and cancels. The two probabilities of a sign remain of the proposal's density.
    signs = jax.nn.softplus(-move * slope) - jax.nn.softplus(move * slope_there)
    log_ratio: Any = proposal.logdensity - state.logdensity + jnp.sum(signs)
    after, (accepted, probability, _) = libraries.proposal.static_binomial_sampling(
        accept_key, log_ratio, state, proposal
    )
    info: Any = libraries.barker.BarkerInfo
    return after, info(probability, accepted, proposal)


def _metric(who: str, inverse_mass: Any, position: Any) -> Any:
    flat = ravel_pytree(position)[0]
    if inverse_mass is None:
        return jnp.ones_like(flat)
    if not is_array(inverse_mass):
        return inverse_mass
    require_fit(who, inverse_mass, flat.size)
    return jnp.asarray(inverse_mass, flat.dtype)


def _is_metric(x: Any) -> bool:
    return not is_array(x) and (callable(x) or isinstance(x, libraries.metrics.Metric))


def _scaled(
    who: str,
    move: Callable[[Any, LogDensity], tuple[Any, Any]],
    state: Any,
    log_density: LogDensity,
    inverse_mass: Any,
) -> tuple[Any, Any]:
    """A transition made on `u`, where `x = position + L u` and `L L^T` is the inverse mass.

    A rejected proposal leaves the state unchanged, bit for bit.
    """
    if inverse_mass is None:
        return move(state, log_density)
    flat, unravel = ravel_pytree(state.position)
    require_fit(who, inverse_mass, flat.size)
    inverse_mass = jnp.asarray(inverse_mass, flat.dtype)
    root = jnp.sqrt(inverse_mass) if inverse_mass.ndim == 1 else jnp.linalg.cholesky(inverse_mass)

    def times(u: Array) -> Array:
        return root * u if root.ndim == 1 else jnp.matmul(root, u, precision="highest")

    def covector(slope: Array) -> Array:
        return root * slope if root.ndim == 1 else jnp.matmul(root.T, slope, precision="highest")

    def back(slope: Array) -> Array:
        return slope / root if root.ndim == 1 else solve_triangular(root.T, slope, lower=False)

    start = state._replace(
        position=jnp.zeros_like(flat),
        logdensity_grad=covector(ravel_pytree(state.logdensity_grad)[0]),
    )
    after, info = move(start, lambda u: log_density(unravel(flat + times(u))))
    after = after._replace(
        position=unravel(flat + times(after.position)),
        logdensity_grad=unravel(back(after.logdensity_grad)),
    )
    keep = lambda new, old: jnp.where(info.is_accepted, new, old)  # noqa: E731
    return jax.tree.map(keep, after, state), info
