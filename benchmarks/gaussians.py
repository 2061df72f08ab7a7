"""What normal choices cost when they are integrated out, beside the same by hand and dynamax.

    python benchmarks/gaussians.py                    counts only: densities, gradients and a filter
    python benchmarks/gaussians.py --times 5          and times, `recover` and NUTS: medians of interleaved rounds
    python benchmarks/gaussians.py chain --times 5    one part
    python benchmarks/gaussians.py --small --times 1  small sizes: to see that everything runs and agrees

By hand is `by_hand.py`: recursions with `lax.scan`, sums by group. Its counterparts in dynamax, which is no dependency
of Weft, are left out if it is not installed. Flops are those of `marginals.py`: loops in full, and what LAPACK does.
"Error" is the difference from the first version in double precision: of the value in nats, of a gradient in the entry
that is most off.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks are no part of the package

from weft.inference import Draws, filtering, nuts, smc
from weft.models.state_space import LinearGaussian

from benchmarks.by_hand import (
    Bank,
    Series,
    bank_filter,
    kalman_filter,
    normal_groups,
    normal_slopes,
    posterior_sample,
    smoother,
)
from benchmarks.costs import measure
from benchmarks.marginals import DYNAMAX, in_full, prior_values
from benchmarks.nuts import SETTINGS, SIGMA, Y, smallest_ess
from benchmarks.workloads import Operation, schools
from weft import gen, marginalize, noncentered, recover, repeat, sample


class Sizes(NamedTuple):
    """How large everything is."""

    steps: int = 1000
    groups: int = 200
    rows: int = 50  # of a group
    increments: int = 64
    draws: int = 100  # of which states are recovered
    short: int = 100  # steps of the series that NUTS samples
    warmup: int = SETTINGS["num_warmup"]
    samples: int = 1000  # draws of a chain


SMALL = Sizes(5, 3, 4, 3, 2, 5, 20, 20)


# ---- a chain of four states ------------------------------------------------------------------------------------------

DIM, NOISE = 4, 0.5


class System(NamedTuple):
    """States x_t ~ N(A x_{t-1}, (scale L)(scale L)'), observations y_t ~ N(C x_t, NOISE)."""

    A: Any
    L: Any
    C: Any


def chain_prior(draw: Callable[..., Any], weigh: Any = None) -> Any:
    return draw("scale", dist.HalfNormal(1.0))


@gen
def chain(system, num_steps):
    A, L, C = system
    scale = chain_prior(sample)

    def step(x, _):
        x = sample("x", dist.MultivariateNormal(A @ x, scale_tril=scale * L))
        sample("y", dist.Normal(C @ x, NOISE).to_event(1))
        return x, None

    lax.scan(step, sample("start", dist.Normal(jnp.zeros(DIM), 1.0).to_event(1)), length=num_steps)


@gen
def chain_as_distribution(system, num_steps):
    law = emitting_first(as_series(system, chain_prior(sample)))
    sample("y", LinearGaussian(**law, num_steps=num_steps))


def as_series(system: System, scale: Any) -> Series:
    """The matrices of the chain."""
    A, L, C = system
    Q, R = scale**2 * L @ L.T, NOISE**2 * jnp.eye(len(C))
    return Series(jnp.zeros(DIM), jnp.eye(DIM), A, Q, C, R)


def emitting_first(series: Series) -> dict[str, Any]:
    """A series by the law of the first state that is observed, as `LinearGaussian` and dynamax have it."""
    m, P, A, Q, C, R = series
    return {"m0": A @ m, "P0": A @ P @ A.T + Q, "A": A, "Q": Q, "C": C, "R": R}


def as_dynamax(series: Series) -> Any:
    from dynamax.linear_gaussian_ssm.inference import make_lgssm_params

    return make_lgssm_params(*emitting_first(series).values())


def chain_data(num_observed: int, num_steps: int) -> tuple[Any, Any, System]:
    """The scale, a series drawn with it, and matrices: a turn that decays, correlated noise."""
    rng = np.random.default_rng(num_observed)
    turn, _ = np.linalg.qr(rng.normal(size=(DIM, DIM)))
    L = np.linalg.cholesky(np.corrcoef(rng.normal(size=(DIM, 3 * DIM))))
    C = rng.normal(size=(num_observed, DIM))
    system = System(*(jnp.asarray(a, jnp.float32) for a in (0.95 * turn, L, C)))
    choices = {"scale": jnp.array(0.3)}
    return choices, drawn(chain(system, num_steps), choices), system


def drawn(program: Any, choices: Any) -> Any:
    """Observations for given parameters."""
    return program.generate(jax.random.key(0), choices)[0].choices["y"]


def chain_densities(num_observed: int, num_steps: int) -> dict[str, Operation]:
    """Log density, and that with its gradient in the scale."""

    def by_hand(c, y, system, **options):
        scale, log_prior = prior_values(chain_prior, c)
        return log_prior + kalman_filter(as_series(system, scale), y, **options)

    def weft(c, y, system, **options):
        program = marginalize(chain, "start", "x", **options)(system, len(y))
        return program.given({"y": y}).log_density(c)

    versions = {
        "Kalman by hand": by_hand,
        "the same, Joseph's form": functools.partial(by_hand, joseph=True),
        "weft": weft,
        "weft, parallel": functools.partial(weft, parallel=True),
        "weft, LinearGaussian": lambda c, y, system: (
            chain_as_distribution(system, len(y)).given({"y": y}).log_density(c)
        ),
    }
    if DYNAMAX:
        from dynamax.linear_gaussian_ssm import lgssm_filter

        def dynamax(c, y, system):
            scale, log_prior = prior_values(chain_prior, c)
            return log_prior + lgssm_filter(as_dynamax(as_series(system, scale)), y).marginal_loglik

        versions["dynamax"] = dynamax
    return densities(versions, chain_data(num_observed, num_steps))


def densities(versions: dict[str, Callable[..., Any]], args: Any) -> dict[str, Operation]:
    """Values, and values with gradients."""
    both = {name: jax.value_and_grad(f) for name, f in versions.items()}
    return {"log density": Operation(args, versions), "with gradient": Operation(args, both)}


# ---- rows that index their group -------------------------------------------------------------------------------------

SPREAD = 5.0


def groups_prior(draw: Callable[..., Any], weigh: Any = None) -> Any:
    return draw("tau", dist.HalfNormal(1.0)), draw("sigma", dist.HalfNormal(1.0))


@gen
def groups(g, num_groups):
    tau, sigma = groups_prior(sample)
    mu = sample("mu", dist.Normal(0.0, SPREAD))
    theta = repeat(lambda: sample("theta", dist.Normal(mu, tau)), num_groups)
    jax.vmap(lambda i: sample("y", dist.Normal(theta[i], sigma)))(g)


def rows(num_groups: int, num_rows: int) -> tuple[Any, Any]:
    """A covariate and the group of every row, in no order."""
    rng = np.random.default_rng(0)
    g = rng.permutation(np.repeat(np.arange(num_groups), num_rows))
    return jnp.asarray(rng.normal(size=g.size), jnp.float32), jnp.asarray(g)


def group_densities(num_groups: int, num_rows: int) -> dict[str, Operation]:
    """Means of groups and their mean summed out."""
    g, choices = rows(num_groups, num_rows)[1], {"tau": jnp.array(0.7), "sigma": jnp.array(0.5)}

    def by_hand(c, y, g):
        (tau, sigma), log_prior = prior_values(groups_prior, c)
        return log_prior + normal_groups(y, g, num_groups, SPREAD, tau, sigma)

    def weft(c, y, g):
        program = marginalize(groups, "mu", "theta")(g, num_groups)
        return program.given({"y": y}).log_density(c)

    y = drawn(groups(g, num_groups), {**choices, "mu": 2.0})
    return densities({"sums by hand": by_hand, "weft": weft}, (choices, y, g))


# ---- slopes that vary ------------------------------------------------------------------------------------------------


def slopes_prior(draw: Callable[..., Any], weigh: Any = None) -> Any:
    """The factor of the covariance of intercept and slope, and the scale of the noise."""
    tau = draw("tau", dist.HalfNormal(jnp.ones(2)).to_event(1))
    rho, sigma = draw("rho", dist.Uniform(-1.0, 1.0)), draw("sigma", dist.HalfNormal(1.0))
    L = jnp.array([[1.0, 0.0], [0.0, 0.0]]).at[1].set(jnp.stack([rho, jnp.sqrt(1 - rho**2)]))
    return tau[:, None] * L, sigma


@gen
def slopes(x, g, num_groups):
    L, sigma = slopes_prior(sample)
    m = sample("m", dist.Normal(jnp.zeros(2), SPREAD).to_event(1))
    c = repeat(lambda: sample("c", dist.MultivariateNormal(m, scale_tril=L)), num_groups)
    jax.vmap(lambda x, i: sample("y", dist.Normal(c[i, 0] + c[i, 1] * x, sigma)))(x, g)


SLOPES = {"tau": np.float32([0.7, 0.4]), "rho": np.float32(-0.5), "sigma": np.float32(0.5)}


def slope_densities(num_groups: int, num_rows: int) -> dict[str, Operation]:
    """Intercepts and slopes of groups and their mean summed out."""
    x, g = rows(num_groups, num_rows)

    def by_hand(c, y, x, g):
        (L, sigma), log_prior = prior_values(slopes_prior, c)
        return log_prior + normal_slopes(y, x, g, num_groups, SPREAD, L @ L.T, sigma)

    def weft(c, y, x, g):
        program = marginalize(slopes, "m", "c")(x, g, num_groups)
        return program.given({"y": y}).log_density(c)

    y = drawn(slopes(x, g, num_groups), {**SLOPES, "m": jnp.array([2.0, 1.0])})
    return densities({"sums by hand": by_hand, "weft": weft}, (SLOPES, y, x, g))


# ---- a local linear trend with regressors ----------------------------------------------------------------------------

REGRESSORS = 5
START = np.float32([5.0, 0.5])  # deviations of the first level and slope


def trend_prior(draw: Callable[..., Any], weigh: Any = None) -> Any:
    scales = {"level_sd": 1.0, "slope_sd": 0.1, "noise": 1.0}
    return [draw(name, dist.HalfNormal(scale)) for name, scale in scales.items()]


@gen
def trend(x):
    level_sd, slope_sd, noise = trend_prior(sample)
    beta = sample("beta", dist.Normal(jnp.zeros(REGRESSORS), 1.0).to_event(1))

    def step(state, x):
        level, slope = state
        level = sample("level", dist.Normal(level + slope, level_sd))
        slope = sample("slope", dist.Normal(slope, slope_sd))
        sample("y", dist.Normal(level + x @ beta, noise))
        return (level, slope), None

    first = (
        sample("level_0", dist.Normal(0.0, START[0])),
        sample("slope_0", dist.Normal(0.0, START[1])),
    )
    lax.scan(step, first, x)


TREND = ("beta", "level_0", "slope_0", "level", "slope")
TREND_SCALES = {"level_sd": np.float32(0.3), "slope_sd": np.float32(0.02), "noise": np.float32(0.5)}


def trend_as_series(x: Any, level_sd: Any, slope_sd: Any, noise: Any) -> Series:
    """The coefficients among the states, which stay as they are."""
    size = 2 + REGRESSORS
    A = jnp.eye(size).at[0, 1].set(1.0)
    Q = jnp.zeros((size, size)).at[0, 0].set(level_sd**2).at[1, 1].set(slope_sd**2)
    P = jnp.diag(jnp.concatenate([START**2, jnp.ones(REGRESSORS)]))
    C = jnp.concatenate([jnp.ones((len(x), 1)), jnp.zeros((len(x), 1)), x], 1)[:, None]
    return Series(jnp.zeros(size), P, A, Q, C, noise**2 * jnp.eye(1))


def trend_data(num_steps: int) -> tuple[Any, Any]:
    """Regressors and a series."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(num_steps, REGRESSORS)), jnp.float32)
    return x, drawn(trend(x), TREND_SCALES)


def trend_densities(num_steps: int) -> dict[str, Operation]:
    """Level, slope, where both start, and the coefficients summed out."""
    x, y = trend_data(num_steps)

    def by_hand(c, y, x, **options):
        scales, log_prior = prior_values(trend_prior, c)
        return log_prior + kalman_filter(trend_as_series(x, *scales), y[:, None], **options)

    def weft(c, y, x):
        return marginalize(trend, *TREND)(x).given({"y": y}).log_density(c)

    versions = {
        "Kalman by hand": by_hand,
        "the same, Joseph's form": functools.partial(by_hand, joseph=True),
        "weft": weft,
    }
    if DYNAMAX:
        from dynamax.linear_gaussian_ssm import lgssm_filter

        def dynamax(c, y, x):
            scales, log_prior = prior_values(trend_prior, c)
            params = as_dynamax(trend_as_series(x, *scales))
            return log_prior + lgssm_filter(params, y[:, None]).marginal_loglik

        versions["dynamax"] = dynamax
    return densities(versions, (TREND_SCALES, y, x))


# ---- a filter of fractional noise ------------------------------------------------------------------------------------

RATES = np.geomspace(0.05, 768.0, 5)
WEIGHTS = np.array(
    [0.58076804, 0.30950398, 0.553131, 0.84204856, 1.99358274]
)  # for a Hurst index of 0.3
SEEN = 0.01  # the scale of the noise of an increment


@gen
def bank(decay, noise_factor, start_factor, w, num_steps):
    """Five states of very different decay that one Brownian motion drives, and increments of their weighted sum."""

    def standard(name, factor):
        return factor @ sample(name, dist.Normal(jnp.zeros(factor.shape[1]), 1.0).to_event(1))

    def step(state, _):
        new = decay * state + standard("noise", noise_factor)
        sample("y", dist.Normal(w @ (new - state), SEEN))
        return new, None

    lax.scan(step, standard("start", start_factor), length=num_steps)


def bank_data(num_steps: int) -> tuple[Any, Any]:
    """Increments of fractional Brownian motion on [0, 1]; of the bank decays, covariances and weights."""
    times, rates = np.arange(1, num_steps + 1) / num_steps, RATES[:, None] + RATES
    rough = 0.5 * (times[:, None] ** 0.6 + times**0.6 - abs(times[:, None] - times) ** 0.6)
    path = np.linalg.cholesky(rough) @ np.random.default_rng(0).normal(size=num_steps)
    noise = -np.expm1(-rates / num_steps) / rates
    return np.diff(path, prepend=0), (np.exp(-RATES / num_steps), noise, 1 / rates, WEIGHTS)


def factor_of(covariance: Any, least: float) -> Any:
    """A factor of low rank, from the correlations, in double precision."""
    d = np.sqrt(np.diag(covariance))
    values, vectors = np.linalg.eigh(covariance / np.outer(d, d))
    keep = values > least
    return d[:, None] * vectors[:, keep] * np.sqrt(values[keep])


def bank_filters(num_steps: int) -> dict[str, Operation]:
    """The log evidence of the marginalised program: its density, and by filters. All particles of these are alike."""
    y, (decay, noise, start, w) = bank_data(num_steps)
    factors = factor_of(noise, 1e-9), factor_of(start, 1e-12)
    everything = jax.tree.map(jnp.float32, (y, (decay, noise, start, w), factors))

    def target(y, system, factors):
        decay, _, _, w = system
        return marginalize(bank, "start", "noise")(decay, *factors, w, len(y)).given({"y": y})

    def by_hand(num_copies):
        def run(key, y, system, factors):
            e, Q, P, w = system
            P = jnp.broadcast_to(P, (num_copies, *P.shape))
            return jax.vmap(lambda P: bank_filter(Bank(e, Q, P, w, SEEN), y))(P).mean()

        return run

    def weft(num_particles):
        def run(key, *args):
            found = smc(filtering(), num_particles).run(key, target(*args), progress=False)
            return found.log_evidence

        return run

    single = {
        "Kalman by hand": lambda key, y, system, factors: bank_filter(Bank(*system, SEEN), y),
        "weft": lambda key, *args: target(*args).log_density({}),
    }
    args = jax.random.key(0), *everything
    filters = {
        f"{n} particles": Operation(
            args, {f"{n} filters by hand": by_hand(n), "weft, smc(filtering())": weft(n)}
        )
        for n in (2, 100)
    }
    return {"log density": Operation(args, single), **filters}


# ---- counts and times ------------------------------------------------------------------------------------------------


def compare(operations: dict[str, Operation], rounds: int) -> None:
    """Print one Markdown table; ratios are to the first version."""
    header = "| operation | version | flops | of hand | error |"
    header += " trace ms | compile ms | of hand | run ms | of hand |" if rounds else ""
    print(f"{header}\n|{' --- |' * (header.count('|') - 1)}", flush=True)
    for label, operation in operations.items():
        flops = {s: in_full(f, operation.args)["flops"] for s, f in operation.versions.items()}
        times = measure(operation, rounds) if rounds else {}
        base, by_hand = next(iter(operation.versions.items()))
        with jax.enable_x64(True):
            exact = answer(by_hand, jax.tree.map(double, operation.args))
        for system, f in operation.versions.items():
            off = answer(f, operation.args) - exact
            row = (
                f"| {label} | {system} | {flops[system]:,.0f} | {flops[system] / flops[base]:.2f} |"
            )
            row += f" {off[np.abs(off).argmax()]:.5f} |"
            if rounds:
                t, of = times[system], times[base]
                row += f" {t['trace'] * 1e3:.0f} | {t['compile'] * 1e3:.0f} |"
                row += f" {t['compile'] / of['compile']:.2f} |"
                row += f" {t['run'] * 1e3:.3f} | {t['run'] / of['run']:.2f} |"
            print(row, flush=True)


def answer(function: Callable[..., Any], args: Any) -> np.ndarray:
    """A value, or the entries of the gradient that comes with it."""
    leaves = jax.tree.leaves(jax.jit(function)(*args))
    return np.concatenate([np.ravel(np.asarray(a, float)) for a in leaves[1:] or leaves])


def double(a: Any) -> Any:
    """A floating-point array in double precision."""
    return np.asarray(a, float) if jnp.issubdtype(a.dtype, jnp.floating) else a


# ---- states back -----------------------------------------------------------------------------------------------------


def recover_states(rounds: int, num_steps: int, num_draws: int) -> None:
    """Time of smoothed means, and of joint draws of all states, for each of some draws of the scale.

    The check of means is their largest distance from the first version's, in deviations; that of draws is their mean
    squared distance from the smoothed means, in variances: one.
    """
    choices, y, system = chain_data(2, num_steps)
    scales = choices["scale"] * (1 + 0.01 * jax.random.normal(jax.random.key(1), (num_draws,)))
    model = marginalize(chain, "start", "x")
    target = model(system, num_steps).given({"y": y})
    held = Draws(choices={"scale": scales[None]}, target=target)

    def weft(sites):
        return lambda key: recover(key, model, held, system, num_steps, sites=sites).derived["x"][0]

    def over_draws(function):
        @jax.jit
        def run(key):
            keys = jax.random.split(key, num_draws)
            return jax.vmap(lambda k, s: function(k, as_series(system, s)))(keys, scales)

        return run

    smoothing = {"by hand": over_draws(lambda key, series: smoother(series, y)[0])}
    draws = {"by hand": over_draws(lambda key, series: posterior_sample(key, series, y))}
    if DYNAMAX:
        from dynamax.linear_gaussian_ssm import lgssm_posterior_sample, lgssm_smoother

        def smoothed(key, series):
            return lgssm_smoother(as_dynamax(series), y).smoothed_means

        smoothing["dynamax"] = over_draws(smoothed)
        draws["dynamax"] = over_draws(lambda k, s: lgssm_posterior_sample(k, as_dynamax(s), y))
    smoothing["weft"], draws["weft"] = weft("marginals"), weft("sample")
    means, covs = over_draws(lambda key, series: smoother(series, y))(jax.random.key(0))
    variances = jnp.diagonal(covs, axis1=-2, axis2=-1)
    print("| operation | version | first call s | ms a draw | of hand | of dynamax | check |")
    print("|" + " --- |" * 7)
    for label, runs in (("smoothed means", smoothing), ("joint draws", draws)):
        first, seconds, found = in_turns(runs, rounds)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        for name in runs:
            z = (found[name] - means) ** 2 / variances
            check = float(jnp.sqrt(z.max()) if runs is smoothing else z.mean())
            ratios = [
                f"{median[name] / median[n]:.2f}" if n in median else ""
                for n in ("by hand", "dynamax")
            ]
            row = f"| {label} | {name} | {first[name]:.1f} | {median[name] / num_draws * 1e3:.3f} |"
            print(f"{row} {' | '.join(ratios)} | {check:.4f} |", flush=True)


def in_turns(runs: dict[str, Callable[..., Any]], rounds: int) -> Any:
    """Seconds of the first call, seconds of those of the rounds, and what the first call gave."""
    first, found, seconds = {}, {}, {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            out = jax.block_until_ready(run(jax.random.key(i)))
            spent = time.perf_counter() - start
            if i:
                seconds[name].append(spent)
            else:
                first[name], found[name] = spent, out
    return first, seconds, found


# ---- effective samples a second --------------------------------------------------------------------------------------


@gen
def local_level(num_steps):
    move, noise = sample("move", dist.HalfNormal(1.0)), sample("noise", dist.HalfNormal(1.0))

    def step(level, _):
        level = sample("level", dist.Normal(level, move))
        sample("y", dist.Normal(level, noise))
        return level, None

    lax.scan(step, sample("start", dist.Normal(0.0, 5.0)), length=num_steps)


@gen
def autoregression(num_steps):
    """AR(1) plus noise, from the stationary law."""
    rho = sample("rho", dist.Uniform(-1.0, 1.0))
    move, noise = sample("move", dist.HalfNormal(1.0)), sample("noise", dist.HalfNormal(1.0))

    def step(x, _):
        x = sample("x", dist.Normal(rho * x, move))
        sample("y", dist.Normal(x, noise))
        return x, None

    start = sample("start", dist.Normal(0.0, move / jnp.sqrt(1 - rho**2)))
    lax.scan(step, start, length=num_steps)


class Problem(NamedTuple):
    """A model with data, what is summed out, and what may be written non-centred in place of it."""

    model: Any
    args: tuple[Any, ...]
    y: Any
    summed: tuple[str, ...]
    noncentred: tuple[str, ...]


def hierarchies(sizes: Sizes) -> dict[str, Problem]:
    """Effects of schools, means of groups, slopes of groups."""
    x, g = rows(sizes.groups, sizes.rows)
    means, lines = (
        densities(sizes.groups, sizes.rows)["log density"].args[1]
        for densities in (group_densities, slope_densities)
    )
    schools_args, of_groups = (jnp.asarray(SIGMA),), f"{sizes.groups} groups of {sizes.rows}"
    return {
        "eight schools": Problem(schools, schools_args, Y, ("mu", "theta"), ("theta",)),
        of_groups: Problem(groups, (g, sizes.groups), means, ("mu", "theta"), ("theta",)),
        "varying slopes": Problem(slopes, (x, g, sizes.groups), lines, ("m", "c"), ("c",)),
    }


def time_series(sizes: Sizes) -> dict[str, Problem]:
    """A level that moves, an autoregression, and a trend with regressors."""
    args, scales = (sizes.short,), {"move": 0.3, "noise": 0.5}
    level = drawn(local_level(*args), scales)
    x = drawn(autoregression(*args), {**scales, "rho": 0.9})
    inputs, trending = trend_data(sizes.short)
    title = f"trend with {REGRESSORS} regressors"
    return {
        "local level": Problem(local_level, args, level, ("start", "level"), ("level",)),
        "AR(1) plus noise": Problem(autoregression, args, x, ("start", "x"), ("x",)),
        title: Problem(trend, (inputs,), trending, TREND, ("level", "slope")),
    }


def sampling(problems: dict[str, Problem], rounds: int, sizes: Sizes) -> None:
    """NUTS with the normal choices summed out, as written, and non-centred.

    Runs are whole ones after the first. ESS/s is the sum over rounds of the smallest ESS of the hyperparameters, over
    the sum of seconds; z the largest distance between means of this and of the first version, in their standard errors.
    """
    print(
        f"{SETTINGS['num_chains']} chains, {sizes.warmup} + {sizes.samples} iterations, {rounds} rounds\n"
    )
    columns = "problem | version | first run s | seconds a run | min ESS | ESS/s | of as written | divergent | z"
    print(f"| {columns} |\n|{' --- |' * 9}")
    for title, (model, args, y, summed, moved) in problems.items():
        targets = {
            "summed out": marginalize(model, *summed)(*args).given({"y": y}),
            "as written": model(*args).given({"y": y}),
            "non-centred": noncentered(model, *moved)(*args).given({"y": y}),
        }
        keep = targets["summed out"].latents
        algorithm = nuts(
            sizes.warmup, sizes.samples, num_chains=SETTINGS["num_chains"], keep=list(keep)
        )

        def runner(target, algorithm=algorithm):
            return lambda key: algorithm.run(key, target, progress=False)

        runs = {name: runner(target) for name, target in targets.items()}
        seconds, draws = {name: [] for name in runs}, {name: [] for name in runs}
        for i in range(rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                found = run(jax.random.key(i))
                seconds[name].append(time.perf_counter() - start)
                draws[name].append(found)
        report(title, seconds, draws)


def report(title: str, seconds: dict[str, list[float]], draws: dict[str, list[Draws]]) -> None:
    """The rows of one problem; the first run of each version compiles, and counts for the means alone."""
    ess, moments, divergent = {}, {}, {}
    for name, runs in draws.items():
        choices = [jax.tree.map(np.asarray, d.choices) for d in runs]
        ess[name] = [smallest_ess(c) for c in choices]
        flat = np.stack([scalars(c) for c in choices])  # (run, chain, draw, scalar)
        moments[name] = flat.mean((0, 1, 2)), flat.std((0, 1, 2)) / sum(ess[name]) ** 0.5
        divergent[name] = sum(int(d.stats["diverging"].sum()) for d in runs[1:])
    speed = {name: sum(e[1:]) / sum(seconds[name][1:]) for name, e in ess.items()}
    first, error = next(iter(moments.values()))
    for name, (mean, own) in moments.items():
        z = np.abs((mean - first) / np.hypot(error, own)).max()
        s, e = seconds[name], statistics.mean(ess[name][1:])
        row = f"| {title} | {name} | {s[0]:.1f} | {statistics.mean(s[1:]):.2f} | {e:,.0f} |"
        row += (
            f" {speed[name]:,.1f} | {speed[name] / speed['as written']:.2f} | {divergent[name]} |"
        )
        print(f"{row} {z:.1f} |" if name != next(iter(moments)) else f"{row} |", flush=True)


def scalars(choices: dict[str, np.ndarray]) -> np.ndarray:
    """Every number of a draw, along the last axis."""
    return np.concatenate([a.reshape(*a.shape[:2], -1) for a in jax.tree.leaves(choices)], -1)


# ---- all -------------------------------------------------------------------------------------------------------------


def tables(sizes: Sizes) -> dict[str, list[tuple[str, Callable[[], dict[str, Operation]]]]]:
    """The titles of the tables of each part, and what they compare."""
    of_groups, steps = f"{sizes.groups} groups of {sizes.rows} rows", f"{sizes.steps:,} steps"

    def of_chain(num_observed: int) -> tuple[str, Callable[[], dict[str, Operation]]]:
        title = f"chain of {DIM} states, {num_observed} observed, {steps}"
        return title, lambda: chain_densities(num_observed, sizes.steps)

    return {
        "chain": [of_chain(2), of_chain(DIM)],
        "groups": [(of_groups, lambda: group_densities(sizes.groups, sizes.rows))],
        "slopes": [(f"slopes, {of_groups}", lambda: slope_densities(sizes.groups, sizes.rows))],
        "trend": [
            (f"trend with {REGRESSORS} regressors, {steps}", lambda: trend_densities(sizes.steps))
        ],
        "filter": [
            (
                f"filter of fractional noise, {sizes.increments} increments",
                lambda: bank_filters(sizes.increments),
            )
        ],
    }


COUNTED = ("chain", "groups", "slopes", "trend", "filter")
TIMED = ("recover", "hierarchies", "series")


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (*COUNTED, *TIMED)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)} (default: all)")
    parser.add_argument("--times", type=int, default=0, metavar="ROUNDS", help="measure times too")
    parser.add_argument("--small", action="store_true", help="small sizes")
    options = parser.parse_args()
    sizes, rounds = SMALL if options.small else Sizes(), options.times
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
    print(f"jax {jax.__version__}, numpyro {numpyro.__version__}, {jax.devices()[0].platform}")
    if not DYNAMAX:
        print("left out, as not installed: dynamax")
    for part in options.parts or parts:
        if part in COUNTED:
            for title, build in tables(sizes)[part]:
                print(f"\n#### {title}\n")
                compare(build(), rounds)
        elif part == "recover" and rounds:
            print(f"\n#### states of {sizes.steps:,} steps, {sizes.draws} draws\n")
            recover_states(rounds, sizes.steps, sizes.draws)
        elif part in TIMED and rounds:
            print(f"\n#### NUTS, {part}\n")
            problems = {"hierarchies": hierarchies, "series": time_series}[part](sizes)
            sampling(problems, rounds, sizes)


if __name__ == "__main__":
    main()
