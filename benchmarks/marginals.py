"""What exact marginalisation costs, beside the same sums by hand, NumPyro with funsor, and dynamax.

    python benchmarks/marginals.py                    counts only: chains and a mixture
    python benchmarks/marginals.py --times 5          and times, `recover` and `nuts`: medians of interleaved rounds
    python benchmarks/marginals.py chains --times 5   one part

funsor and dynamax are no dependencies of Weft: what is not installed is left out, and said.

XLA counts the body of a loop once, whatever its length. Here loops count in full: for each scan its length, less one,
times what its body costs when compiled alone. Nor does XLA count what it leaves to LAPACK (factors of matrices,
triangular solves); that is added by the textbook's counts. Normal choices are in `gaussians.py`.
"""

import argparse
import functools
import importlib.util
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from jax.interpreters.partial_eval import dce_jaxpr
from jax.scipy.special import logsumexp
from numpyro.contrib.control_flow import scan as numpyro_scan
from numpyro.distributions import constraints
from numpyro.infer.util import log_density as numpyro_log_density
from numpyro.ops.indexing import Vindex

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks are no part of the package

from weft.inference import Draws

from benchmarks.costs import count_equations, measure
from benchmarks.nuts import SETTINGS, numpyro_runner, smallest_ess, weft_runner
from benchmarks.workloads import Operation, normal
from weft import factor, gen, marginalize, recover, repeat, sample

FUNSOR, DYNAMAX = (importlib.util.find_spec(name) is not None for name in ("funsor", "dynamax"))
BASE = "recursion in the model"


# ---- hidden Markov models --------------------------------------------------------------------------------------------
# Each is a prior (from how to sample to transition matrix, means and scale) and one of two orders: the state before the
# scan gives the first observation (posteriordb's hmm_example), or moves first (the long chain).


def example_prior(draw: Callable[..., Any], weigh: Callable[..., Any]) -> Any:
    """The prior of posteriordb's hmm_example."""
    theta = jnp.stack([draw(f"theta{i}", dist.Dirichlet(jnp.ones(2))) for i in (1, 2)])
    mu = draw("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    weigh("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    return theta, mu, 1.0


def chain_prior(draw: Callable[..., Any], weigh: Callable[..., Any]) -> Any:
    """Three states."""
    theta = draw("theta", dist.Dirichlet(jnp.ones((3, 3))).to_event(1))
    mu = draw("mu", dist.Normal(jnp.zeros(3), 5.0).to_event(1))
    return theta, mu, draw("sigma", dist.HalfNormal(2.0))


@gen
def emit_first(prior, num_steps):
    theta, mu, sigma = prior(sample, factor)
    size = mu.size

    def step(z, _):
        y = sample("y", dist.Normal(mu[z], sigma))
        return sample("z", dist.Categorical(theta[z])), y

    first = sample("first", dist.Categorical(jnp.full(size, 1 / size)))
    return lax.scan(step, first, length=num_steps)[1]


@gen
def move_first(prior, num_steps):
    theta, mu, sigma = prior(sample, factor)
    size = mu.size

    def step(z, _):
        z = sample("z", dist.Categorical(theta[z]))
        return z, sample("y", dist.Normal(mu[z], sigma))

    first = sample("first", dist.Categorical(jnp.full(size, 1 / size)))
    return lax.scan(step, first, length=num_steps)[1]


def forward(theta, emission, alpha, y, move, rescale=False):
    """The log likelihood of a series by the forward recursion, in logarithms, no constant computed twice.

    ``rescale`` keeps the carry near zero, without which a long series loses digits in single precision.
    """
    log_theta = jnp.log(theta)
    transit = lambda alpha: logsumexp(alpha[:, None] + log_theta, 0)  # noqa: E731

    def step(carry, y):
        alpha, total = carry
        top = lax.stop_gradient(alpha.max()) if rescale else 0.0
        alpha = transit(alpha) + emission(y) if move else transit(alpha + emission(y))
        return (alpha - top, total + top) if rescale else (alpha, total), None

    alpha, total = lax.scan(step, (alpha, 0.0), y)[0]
    return logsumexp(alpha) + total


@gen
def recursion(prior, y, move, rescale=False, turn=False):
    """The same models with the recursion written by hand; with ``turn``, the first emission taken out of the loop."""
    theta, mu, sigma = prior(sample, factor)
    emission, alpha = dist.Normal(mu, sigma).log_prob, jnp.full(mu.size, -jnp.log(mu.size))
    if turn:
        alpha, y, move = alpha + emission(y[0]), y[1:], True
    factor("y", forward(theta, emission, alpha, y, move, rescale))


def numpyro_chain(prior, y, move):
    theta, mu, sigma = prior(numpyro.sample, numpyro.factor)
    size = mu.shape[-1]

    def step(z, y):
        if not move:
            numpyro.sample("y", dist.Normal(Vindex(mu)[z], sigma), obs=y)
        z = enumerated("z", dist.Categorical(Vindex(theta)[z]))
        if move:
            numpyro.sample("y", dist.Normal(Vindex(mu)[z], sigma), obs=y)
        return z, None

    numpyro_scan(step, enumerated("first", dist.Categorical(jnp.full(size, 1 / size))), y)


def enumerated(name, law):
    """A NumPyro site that is summed out."""
    return numpyro.sample(name, law, infer={"enumerate": "parallel"})  # it writes into the dict


def prior_values(prior, choices):
    """What a prior gives at some choices, and its log density."""
    terms = []

    def draw(name, distribution):
        terms.append(distribution.log_prob(choices[name]).sum())
        return choices[name]

    return prior(draw, lambda name, term: terms.append(term)), sum(terms)


def chain(prior, choices, y, move) -> dict[str, Operation]:
    """Log density and gradient of a hidden Markov model with its states summed out."""
    model = move_first if move else emit_first

    def marginal(parallel):
        program = marginalize(model, "first", "z", parallel=parallel)
        return lambda c, y: program(prior, len(y)).given({"y": y}).log_density(c)

    def in_model(**options):
        return lambda c, y: recursion(prior, y, move, **options).log_density(c)

    def jax_alone(c, y):
        (theta, mu, sigma), log_prior = prior_values(prior, c)
        alpha = jnp.full(mu.size, -jnp.log(mu.size))
        return log_prior + forward(theta, lambda y: normal(y, mu, sigma), alpha, y, move)

    def dynamax(filter_):
        def log_density(c, y):
            (theta, mu, sigma), log_prior = prior_values(prior, c)
            initial, log_likelihoods = as_dynamax(theta, mu, sigma, y, move)
            return log_prior + filter_(initial, theta, log_likelihoods).marginal_loglik

        return log_density

    versions = {
        BASE: in_model(),
        "the same, rescaled": in_model(rescale=True),
        **({} if move else {"the same, turned": in_model(turn=True)}),
        "weft": marginal(False),
        "weft, parallel": marginal(True),
        "JAX alone": jax_alone,
    }
    if FUNSOR:
        versions["numpyro, funsor (parallel)"] = lambda c, y: enumerated_log_density(
            functools.partial(numpyro_chain, prior), -1, c, y, move
        )
    if DYNAMAX:
        from dynamax.hidden_markov_model import hmm_filter, parallel_hmm_filter

        versions |= {
            "dynamax": dynamax(hmm_filter),
            "dynamax, parallel": dynamax(parallel_hmm_filter),
        }
    return with_gradients(versions, (choices, y))


def as_dynamax(theta, mu, sigma, y, move):
    """The law of the first state that emits, and log likelihoods of every state at every time."""
    size = len(theta)
    first = jnp.full(size, 1 / size)
    return first @ theta if move else first, normal(y[:, None], mu, sigma)


def enumerated_log_density(model, first_available_dim, choices, *args):
    """A NumPyro model's log density with its discrete sites summed out by funsor."""
    from numpyro.contrib.funsor import enum
    from numpyro.contrib.funsor.infer_util import log_density

    model = enum(model, first_available_dim=first_available_dim)
    return log_density(model, args, {}, choices)[0]


def with_gradients(versions, args) -> dict[str, Operation]:
    gradients = {name: jax.grad(f) for name, f in versions.items()}
    return {"log density": Operation(args, versions), "gradient": Operation(args, gradients)}


def exact_chain(prior, choices, y, move) -> float:
    """The log density in double precision, by the scaled recursion."""
    (theta, mu, sigma), log_prior = prior_values(prior, choices)
    initial, log_likelihoods = as_dynamax(theta, mu, sigma, y, move)
    alpha, theta = np.asarray(initial, float), np.asarray(theta, float)
    mu, sigma, y = (np.asarray(a, float) for a in (mu, sigma, y))
    z = (y[:, None] - mu) / sigma
    log_likelihoods = -0.5 * z**2 - np.log(np.sqrt(2 * np.pi) * sigma)
    total = float(log_prior)
    for row in np.exp(log_likelihoods):
        alpha = alpha * row
        total += np.log(alpha.sum())
        alpha = alpha / alpha.sum() @ theta
    return total


def example_data():
    """The series of hmm_example, and choices near its posterior mean."""
    cases = Path(__file__).resolve().parents[1] / "tests/refcases/posteriordb"
    file = cases / "hmm_example-hmm_example/data.json"
    y = jnp.asarray(json.loads(file.read_text())["y"])
    theta = {"theta1": jnp.array([0.67, 0.33]), "theta2": jnp.array([0.1, 0.9])}
    return {**theta, "mu": jnp.array([3.1, 8.8])}, y


def chain_data(num_steps: int):
    """A series of three states, and the parameters that it was drawn with."""
    theta = jnp.full((3, 3), 0.1).at[jnp.diag_indices(3)].set(0.8)
    choices = {"theta": theta, "mu": jnp.array([-2.0, 0.0, 3.0]), "sigma": jnp.array(1.0)}
    y = move_first(chain_prior, num_steps).generate(jax.random.key(0), choices)[0].choices["y"]
    return choices, y


# ---- a mixture -------------------------------------------------------------------------------------------------------


def mixture_prior(draw: Callable[..., Any], weigh: Any = None) -> Any:
    weights = draw("weights", dist.Dirichlet(jnp.ones(3)))
    mu = draw("mu", dist.Normal(jnp.zeros(3), 5.0).to_event(1))
    return weights, mu, draw("sigma", dist.HalfNormal(jnp.full(3, 2.0)).to_event(1))


@gen
def mixture(num_points):
    weights, mu, sigma = mixture_prior(sample)

    def point():
        z = sample("z", dist.Categorical(weights))
        return sample("y", dist.Normal(mu[z], sigma[z]))

    return repeat(point, num_points)


@gen
def mixture_by_hand(y):
    weights, mu, sigma = mixture_prior(sample)
    terms = jnp.log(weights) + dist.Normal(mu, sigma).log_prob(y[:, None])
    factor("y", logsumexp(terms, -1).sum())


@gen
def mixture_as_distribution(num_points):
    weights, mu, sigma = mixture_prior(sample)
    law = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mu, sigma))
    return repeat(lambda: sample("y", law), num_points)


def numpyro_mixture(y):
    weights, mu, sigma = mixture_prior(numpyro.sample)
    with numpyro.plate("point", len(y)):
        z = enumerated("z", dist.Categorical(weights))
        numpyro.sample("y", dist.Normal(Vindex(mu)[z], Vindex(sigma)[z]), obs=y)


def numpyro_mixture_as_distribution(y):
    weights, mu, sigma = mixture_prior(numpyro.sample)
    law = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mu, sigma))
    with numpyro.plate("point", len(y)):
        numpyro.sample("y", law, obs=y)


def mixture_model(num_points: int = 10_000) -> dict[str, Operation]:
    """A mixture of three normals, its labels summed out."""
    choices = {
        "weights": jnp.array([0.2, 0.3, 0.5]),
        "mu": jnp.array([-2.0, 0.0, 3.0]),
        "sigma": jnp.array([1.0, 0.5, 2.0]),
    }
    y = mixture(num_points).generate(jax.random.key(0), choices)[0].choices["y"]
    marginal = marginalize(mixture, "z")

    def jax_alone(c, y):
        (weights, mu, sigma), log_prior = prior_values(mixture_prior, c)
        return log_prior + logsumexp(jnp.log(weights) + normal(y[:, None], mu, sigma), -1).sum()

    versions = {
        "logsumexp in the model": lambda c, y: mixture_by_hand(y).log_density(c),
        "weft": lambda c, y: marginal(len(y)).given({"y": y}).log_density(c),
        "weft, MixtureSameFamily": lambda c, y: (
            mixture_as_distribution(len(y)).given({"y": y}).log_density(c)
        ),
        "JAX alone": jax_alone,
        "numpyro, MixtureSameFamily": lambda c, y: numpyro_log_density(
            numpyro_mixture_as_distribution, (y,), {}, c
        )[0],
    }
    if FUNSOR:
        versions["numpyro, funsor"] = lambda c, y: enumerated_log_density(numpyro_mixture, -2, c, y)
    return with_gradients(versions, (choices, y))


# ---- counts and times of densities -----------------------------------------------------------------------------------


def scans(jaxpr: Any) -> list[Any]:
    """The outermost scans in a jaxpr."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            found.append(eqn)
            continue
        for value in eqn.params.values():
            for leaf in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(leaf, "jaxpr", leaf)
                found += scans(inner) if hasattr(inner, "eqns") else []
    return found


def in_full(function: Callable[..., Any], args: Any) -> dict[str, float]:
    """Flops and bytes of the compiled function, each step of each loop counted, and what LAPACK does."""
    compiled = jax.jit(function).lower(*args).compile()
    analysis = compiled.cost_analysis()
    once = {name: analysis.get(key, 0.0) for name, key in KEYS.items()}
    once["flops"] += lapack_flops(compiled.as_text())
    jaxpr = jax.make_jaxpr(function)(*args)
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = dict(once)
    for eqn in scans(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]):
        body = eqn.params["jaxpr"]
        inputs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in body.in_avals]
        step = in_full(jax.extend.core.jaxpr_as_fun(body), inputs)
        total = {name: n + (eqn.params["length"] - 1) * step[name] for name, n in total.items()}
    return {"raw": once["flops"], **total}


KEYS = {"flops": "flops", "bytes": "bytes accessed"}

LAPACK = {  # of an m by n matrix: a factor of Cholesky, of LU, of QR, its Q, and eigenvalues with vectors
    "potrf": lambda m, n: n**3 / 3,
    "getrf": lambda m, n: m * n**2 - n**3 / 3,
    "geqrf": lambda m, n: 2 * m * n**2 - 2 * n**3 / 3,
    "orgqr": lambda m, n: 2 * m * n**2 - 2 * n**3 / 3,
    "syevd": lambda m, n: 9 * n**3,
}


def lapack_flops(text: str) -> float:
    """Flops of the calls of LAPACK in a program that was compiled for a CPU, each counted once."""
    total = 0.0
    calls = re.findall(r'"lapack_\w(\w+)_ffi", operand_layout_constraints={(.*?)}, \w+=', text)
    assert len(calls) == text.count('custom_call_target="lapack_'), "a call that is not understood"
    for name, operands in calls:
        shapes = [list(map(int, s.split(","))) for s in re.findall(r"\w\d+\[([\d,]+)\]", operands)]
        if name == "trsm":  # n flops for every entry of the right-hand sides
            total += shapes[0][-1] * math.prod(shapes[1])
        else:
            *batch, m, n = shapes[0]
            total += math.prod(batch) * LAPACK[name](m, n)
    return total


def table(operations: dict[str, Operation], rounds: int, exact: float | None = None) -> None:
    """Print one Markdown table; ratios are to the first version."""
    header = "| operation | version | equations | flops | of hand | body once | bytes |"
    header += " error, nats |" if exact is not None else ""
    header += " trace ms | compile ms | run ms | of hand |" if rounds else ""
    print(f"{header}\n|{' --- |' * (header.count('|') - 1)}", flush=True)
    for label, operation in operations.items():
        agree(operation)
        times = measure(operation, rounds) if rounds else {}
        base = next(iter(operation.versions))
        found = {s: in_full(f, operation.args) for s, f in operation.versions.items()}
        for system, f in operation.versions.items():
            count = found[system]
            equations = count_equations(jax.make_jaxpr(f)(*operation.args))
            ratio = count["flops"] / found[base]["flops"]
            row = f"| {label} | {system} | {equations} | {count['flops']:,.0f} | {ratio:.3f} |"
            row += f" {count['raw']:,.0f} | {count['bytes']:,.0f} |"
            if exact is not None:
                is_value = label == "log density"
                row += f" {float(jax.jit(f)(*operation.args)) - exact:.4f} |" if is_value else " |"
            if rounds:
                t, run = times[system], times[base]["run"]
                row += f" {t['trace'] * 1e3:.0f} | {t['compile'] * 1e3:.0f} |"
                row += f" {t['run'] * 1e3:.2f} | {t['run'] / run:.2f} |"
            print(row, flush=True)


def agree(operation: Operation) -> None:
    """Check that every version gives the same, but for rounding and for derivatives that lead off a simplex."""

    def within(a):
        return a - a.mean(-1, keepdims=True) if a.ndim else a

    found = {s: jax.tree.leaves(jax.jit(f)(*operation.args)) for s, f in operation.versions.items()}
    first = next(iter(found.values()))
    for system, values in found.items():
        for a, b in zip(map(within, values), map(within, first), strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-3 * np.abs(b).max(), err_msg=system)


# ---- states back -----------------------------------------------------------------------------------------------------


def recover_states(rounds: int, num_steps: int = 10_000, num_draws: int = 100) -> None:
    """Time of a joint draw of all states for each of some draws of the parameters."""
    choices, y = chain_data(num_steps)
    noise = 1 + 0.01 * jax.random.normal(jax.random.key(1), (1, num_draws))
    draws = jax.tree.map(lambda a: a * noise.reshape(1, -1, *(1,) * a.ndim), choices)
    draws["theta"] = draws["theta"] / draws["theta"].sum(-1, keepdims=True)

    def weft(parallel):
        model = marginalize(move_first, "first", "z", parallel=parallel)
        target = model(chain_prior, num_steps).given({"y": y})
        held = Draws(choices=draws, derived={}, active={}, stats={}, target=target)

        def run(key):
            return recover(key, model, held, chain_prior, num_steps).derived["z"][0]

        return run

    def dynamax(sampler):
        @jax.jit
        def run(key):
            def one(key, c):
                (theta, mu, sigma), _ = prior_values(chain_prior, c)
                initial, log_likelihoods = as_dynamax(theta, mu, sigma, y, True)
                return sampler(key, initial, theta, log_likelihoods)[1]

            keys = jax.random.split(key, num_draws)
            return jax.vmap(one)(keys, jax.tree.map(lambda a: a[0], draws))

        return run

    runs = {"weft": weft(False), "weft, parallel": weft(True)}
    if DYNAMAX:
        from dynamax.hidden_markov_model import hmm_posterior_sample, parallel_hmm_posterior_sample

        runs["dynamax"] = dynamax(hmm_posterior_sample)
        runs["dynamax, parallel"] = dynamax(parallel_hmm_posterior_sample)
    first, seconds = {}, {name: [] for name in runs}
    occupancy = {}
    for name, run in runs.items():
        start = time.perf_counter()
        states = jax.block_until_ready(run(jax.random.key(0)))
        first[name] = time.perf_counter() - start
        occupancy[name] = [float((states == k).mean()) for k in range(3)]
    for i in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(jax.random.key(i + 1)))
            seconds[name].append(time.perf_counter() - start)
    print("| version | first call s | ms a draw | of weft | share of each state |")
    print("| --- | --- | --- | --- | --- |")
    base = statistics.median(seconds["weft"])
    for name, times in seconds.items():
        median = statistics.median(times)
        shares = ", ".join(f"{p:.4f}" for p in occupancy[name])
        print(
            f"| {name} | {first[name]:.1f} | {median / num_draws * 1e3:.2f} | {median / base:.2f} | {shares} |",
            flush=True,
        )


# ---- effective samples a second --------------------------------------------------------------------------------------


def gradients_in_a_loop(target: Any, num_chains: int, length: int = 3000) -> Callable[[], float]:
    """Microseconds of a gradient for all chains, one after the other inside one program, as in NUTS."""
    flat = target.unconstrain().flat
    slope = jax.vmap(jax.grad(flat.log_density))
    loop = jax.jit(lambda x: lax.fori_loop(0, length, lambda _, x: x + 1e-5 * slope(x), x))
    start = jnp.zeros((num_chains, flat.size))
    jax.block_until_ready(loop(start))

    def run() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(loop(start))
        return (time.perf_counter() - begin) / length * 1e6

    return run


def sampling(rounds: int, num_samples: int = 2000) -> None:
    """NUTS on hmm_example, its states summed out by Weft and by hand.

    Runs are whole ones after the first (but NumPyro compiles at every run). ESS/s is the sum of the smallest ESS of all
    rounds over the sum of their seconds.
    """
    y = example_data()[1]
    program = marginalize(emit_first, "first", "z")(example_prior, len(y))
    targets = {
        BASE: recursion(example_prior, y, False).given(),
        "weft": program.given({"y": y}),
    }
    loops = {n: gradients_in_a_loop(t, SETTINGS["num_chains"]) for n, t in targets.items()}
    times = {name: [] for name in loops}
    for _ in range(4 * rounds):
        for name, run in loops.items():
            times[name].append(run())
    gradient = {name: f"{statistics.median(t):.0f}" for name, t in times.items()}
    runners = {name: weft_runner(target) for name, target in targets.items()}
    if FUNSOR:
        model = functools.partial(numpyro_chain, example_prior, move=False)
        runners["numpyro, funsor"] = numpyro_runner(model, (y,))
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    ess: dict[str, list[float]] = {name: [] for name in runners}
    for seed in range(rounds + 1):
        for name, run in runners.items():
            start = time.perf_counter()
            draws = run(seed, num_samples)
            if seed:  # the first round compiles
                seconds[name].append(time.perf_counter() - start)
                ess[name].append(smallest_ess(draws))
    print(f"{SETTINGS}, {num_samples:,} draws a chain, {rounds} rounds\n")
    print(
        "| version | us a gradient | seconds a run | min ESS | ESS/s | of hand |\n|" + " --- |" * 6
    )
    base = sum(ess[BASE]) / sum(seconds[BASE])
    for name in runners:
        speed = sum(ess[name]) / sum(seconds[name])
        s, e = (statistics.mean(a[name]) for a in (seconds, ess))
        print(
            f"| {name} | {gradient.get(name, '')} | {s:.1f} | {e:,.0f} | {speed:,.0f} | {speed / base:.2f} |",
            flush=True,
        )


# ---- all -------------------------------------------------------------------------------------------------------------


def chains(rounds: int) -> None:
    """hmm_example and a chain of three states."""
    for name, prior, (choices, y), move in (
        ("hmm_example, 2 states, 100 steps", example_prior, example_data(), False),
        ("3 states, 10,000 steps", chain_prior, chain_data(10_000), True),
    ):
        print(f"\n#### {name}\n")
        operations = chain(prior, choices, y, move)
        table(operations, rounds, exact_chain(prior, choices, y, move))


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("chains", "mixture", "recover", "nuts")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)} (default: all)")
    parser.add_argument("--times", type=int, default=0, metavar="ROUNDS", help="measure times too")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, numpyro {numpyro.__version__}, {jax.devices()[0].platform}")
    absent = [name for name, has in (("funsor", FUNSOR), ("dynamax", DYNAMAX)) if not has]
    if absent:
        print(f"left out, as not installed: {', '.join(absent)}")
    for part in options.parts or parts:
        if part == "chains":
            chains(options.times)
        elif part == "mixture":
            print("\n#### mixture of 3 normals, 10,000 points\n")
            table(mixture_model(), options.times)
        elif part in ("recover", "nuts") and options.times:
            titles = {"recover": "states of 10,000 steps, 100 draws", "nuts": "NUTS on hmm_example"}
            print(f"\n#### {titles[part]}\n")
            {"recover": recover_states, "nuts": sampling}[part](options.times)


if __name__ == "__main__":
    main()
