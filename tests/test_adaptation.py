"""One warm-up for every kernel: acceptance, inverse mass, where it does nothing, and what comes back.

A warm-up of 400 is to lose at most 3 percent of a kernel's efficiency, and one of 50 at most 10 percent. In the scaling
limits, where acceptance is 2 Phi(-l / 2) for a random walk of scale l and 2 Phi(-l^3 / 2) for MALA, and efficiency is
l^2 times acceptance, this is so within .05 and .1 of the best acceptance (`test_what_a_distance_costs`). Beyond that
there is the error of the mean over chains, which are independent: the quantile of Student's t that a right warm-up
exceeds once in a million. With about 60 such numbers, 6e-5 is the chance of a false alarm.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import optimize, special, stats
from weft.inference import hmc, load, mcmc, nuts, particle_gibbs, pmmh
from weft.inference.results.diagnostics import ess, mcse
from weft.inference.run import runner as runner_module
from weft.inference.run.adaptation import phase
from weft.inference.run.loop import iterate, iteration_keys, strong
from weft.inference.testing import check_invariance
from weft.ppl.stage.errors import WeftError

from weft import gen, kernels, sample

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(0)
BAND = 5.0
NEAR = 0.05  # loses at most 3 percent of the efficiency
CLOSE = 0.1  # loses at most 10 percent


def student(chains: int) -> float:
    """The quantile that the mean of independent chains, over its own standard error, exceeds once in a million."""
    return float(stats.t(chains - 1).isf(5e-7))


def require_acceptance(rates: Any, target: float, near: float) -> None:
    """The acceptance of draws `(chain, draw)` is the target, but for what was allowed and the error of the mean."""
    mean = np.asarray(rates, float).mean(1)
    error = mean.std(ddof=1) / mean.size**0.5
    assert abs(mean.mean() - target) < near + student(mean.size) * error, (mean, error)


@gen
def skewed() -> None:
    """Asymmetric; on the unconstrained scale variances are .64, 10^4 and 1.6."""
    sample("a", dist.Gamma(2.0, 30.0))
    sample("b", dist.Normal(0.0, 100.0))
    sample("c", dist.Gumbel(3.0, 1.0))


VARIANCES = {"a": float(special.polygamma(1, 2.0)), "b": 1e4, "c": np.pi**2 / 6}
ADAPTIVE = {
    "random_walk": kernels.random_walk(),
    "mala": kernels.mala(),
    "barker": kernels.barker(),
    "hmc": kernels.hmc(num_steps=3),
    "nuts": kernels.nuts(max_tree_depth=5),
}


def everywhere(kernel: Any) -> Any:
    """A kernel alone, in a block, in a mixture, repeated; all of them in a cycle."""
    return kernels.cycle(
        kernel,
        kernels.block(kernel, "a", "b"),
        kernels.mixture([kernel, kernels.block(kernel, "c")], [2.0, 1.0]),
        kernels.repeat(kernel, 2),
    )


@functools.cache
def warmed(name: str) -> Any:
    algorithm = mcmc(everywhere(ADAPTIVE[name]), num_samples=200, num_chains=24, num_warmup=400)
    return algorithm.run(KEY, skewed().given(), progress=False)


@pytest.mark.parametrize(("near", "loss"), [(NEAR, 0.03), (CLOSE, 0.1)])
def test_what_a_distance_costs(near: float, loss: float) -> None:
    for power in (1, 3):
        loss_of = lambda a, power=power: -efficiency(a, power)  # noqa: E731
        best = optimize.minimize_scalar(loss_of, bounds=(0.05, 0.95))
        for acceptance in (best.x - near, best.x + near):
            assert efficiency(acceptance, power) > (1 - loss) * efficiency(best.x, power)


def efficiency(acceptance: Any, power: int) -> Any:
    """The speed of the limiting diffusion; `power` is 1 for a random walk, 3 for MALA."""
    return (2 * stats.norm.isf(acceptance / 2)) ** (2 / power) * acceptance


@pytest.mark.parametrize("name", ADAPTIVE)
def test_acceptance_is_what_was_asked_for(name: str) -> None:
    found = warmed(name)
    for part in range(4):
        rates = found.stats[f"acceptance_rate_{part}"]
        require_acceptance(rates, ADAPTIVE[name].target_acceptance, NEAR)


@gen
def uneven() -> None:
    sample("x", dist.Normal(0.0, jnp.array([0.1, 1.0, 30.0])))


def test_a_short_warm_up_settles_the_step_size() -> None:
    """At the end of the only window the mass changes by a factor of 900, and the step size has to follow."""
    kernel = kernels.cycle(*ADAPTIVE.values())
    algorithm = mcmc(kernel, num_samples=200, num_chains=32, num_warmup=50)
    draws = algorithm.run(KEY, uneven().given(), progress=False)
    for i, part in enumerate(ADAPTIVE.values()):
        require_acceptance(draws.stats[f"acceptance_rate_{i}"], part.target_acceptance, CLOSE)


def test_a_window_without_draws_changes_nothing() -> None:
    """One draw has no covariance: the part drawn once in forty moves once or never in a window."""
    rare = kernels.mixture([kernels.barker(), kernels.mala(0.7)], [100.0, 1.0])
    algorithm = mcmc(rare, num_samples=50, num_chains=24, num_warmup=40)
    draws = algorithm.run(KEY, skewed().given(), progress=False)
    masses = np.asarray(draws.warmup["1"]["inverse_mass"])
    untouched = (masses == 1.0).all(1)
    assert np.isfinite(masses).all()
    assert untouched.any()
    sizes = np.asarray(draws.warmup["1"]["step_size"])
    moved = np.isin(np.arange(24), np.flatnonzero(sizes != np.float32(0.7)))
    assert np.isfinite(sizes).all()
    assert (untouched | moved).all()


def test_the_draws_are_those_of_the_frozen_kernel() -> None:
    kernel = kernels.cycle(kernels.mala(), kernels.block(kernels.nuts(max_tree_depth=3), "b"))
    algorithm, target = mcmc(kernel, 2, 2, num_warmup=30), skewed().given().staged()
    first = jax.jit(lambda: strong(algorithm.init(KEY, target)))()
    advance = jax.jit(lambda state, a, b: iterate(algorithm, target, KEY, state, a, b))
    before = advance(first, 0, 30)
    after, values = advance(before, 30, 31), algorithm.warmup(before)
    iteration = jax.random.fold_in(iteration_keys(KEY)[1], 30)
    keys = jax.vmap(lambda chain: jax.random.fold_in(iteration, chain))(jnp.arange(2))

    @jax.jit
    @jax.vmap
    def frozen(key: Any, values: Any, choices: Any) -> Any:
        return kernel.tuned(values).move(key, choices, target)[0]

    for name, x in frozen(keys, values, before.chains.choices).items():
        np.testing.assert_allclose(after.chains.choices[name], x, rtol=1e-4)
    for x, y in zip(jax.tree.leaves(values), jax.tree.leaves(algorithm.warmup(after)), strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_each_part_learns_its_own_scales(name: str) -> None:
    """Variances of the coordinates that the part moves, within a factor of two in the median over chains.

    A variance off by two is a scale off by 1.4, by which the step is too short or too long for that coordinate. Over
    24 chains the logarithm of an estimate has errors of .02 to .06, and of .10 for `b` by MALA, which is slow there:
    log(2) is six errors and more from the means found, and for that one three and a half.
    """
    found = warmed(name).warmup
    assert set(found) - {"divergences"} == {"0", "1", "2", "3"}
    for part, names in ((found["0"], "abc"), (found["1"], "ab"), (found["2"]["1"], "c")):
        learnt = np.median(np.asarray(part["inverse_mass"]), 0)
        exact = np.array([VARIANCES[name] for name in names])
        assert learnt.shape == exact.shape
        assert (np.abs(np.log(learnt / exact)) < np.log(2)).all(), (learnt, exact)
        assert part["step_size"].shape == (24,)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_adapted_kernel_leaves_the_law(name: str) -> None:
    require_invariance(everywhere(ADAPTIVE[name]).adapted(warmed(name)), skewed)


def require_invariance(kernel: Any, model: Any) -> None:
    draw = lambda key: model().simulate(key).choices  # noqa: E731
    report = check_invariance(kernel, model().given(), key=KEY, draw=draw, num_runs=3000)
    assert report.passed, report


def test_the_draws_after_warm_up_are_those_of_the_law() -> None:
    x = warmed("mala").choices
    exact = {"a": 2 / 30, "b": 0.0, "c": 3 + np.euler_gamma}
    for name, mean in exact.items():
        values = np.asarray(x[name], float)
        assert abs(values.mean() - mean) < 5.5 * mcse(values)


# --- a mixture with discrete choices ----------------------------------------------------------------------------------

DATA = np.array([0.3, -0.4, 2.1, 0.9, 3.2, 0.1, 2.6])


@gen
def mixture() -> None:
    far = sample("far", dist.Gamma(3.0, 1.0))
    spread = sample("spread", dist.LogNormal(-0.5, 0.5))
    z = sample("z", dist.Bernoulli(0.3).expand([len(DATA)]))
    sample("y", dist.Normal(far * z, spread))


def by_quadrature() -> dict[str, Any]:
    """Posterior means of both numbers and of every z, on a grid of both: what is left, a sum over z, factorises."""
    far, logs = np.linspace(1e-3, 12, 600)[:, None, None], np.linspace(-3, 2, 400)[:, None]
    spread = np.exp(logs)
    up = np.log(0.3) + stats.norm(far, spread).logpdf(DATA)
    both = np.logaddexp(up, np.log(0.7) + stats.norm(0.0, spread).logpdf(DATA))
    log_weights = both.sum(-1) + stats.gamma(3.0).logpdf(far[..., 0])
    log_weights = log_weights + stats.norm(-0.5, 0.5).logpdf(logs[:, 0])
    weights = special.softmax(log_weights)
    return {
        "far": (weights * far[..., 0]).sum(),
        "spread": (weights * spread[:, 0]).sum(),
        "z": (weights[..., None] * np.exp(up - both)).sum((0, 1)),
    }


@pytest.mark.parametrize("name", ["mala", "nuts"])
def test_in_turns_with_gibbs_on_a_mixture(name: str) -> None:
    kernel = kernels.cycle(kernels.gibbs("z"), kernels.block(ADAPTIVE[name], "far", "spread"))
    algorithm = mcmc(kernel, num_samples=500, num_chains=16, num_warmup=400)
    draws = algorithm.run(KEY, mixture().given({"y": jnp.asarray(DATA)}), progress=False)
    require_acceptance(draws.stats["acceptance_rate_1"], ADAPTIVE[name].target_acceptance, NEAR)
    assert set(draws.warmup) - {"divergences"} == {"1"}
    for address, exact in by_quadrature().items():
        values = np.asarray(draws.choices[address], float)
        assert (np.abs(values.mean((0, 1)) - exact) < 5.5 * mcse(values)).all(), address


# --- runs -------------------------------------------------------------------------------------------------------------


@gen
def scaled(s: Any) -> None:
    sample("x", dist.Gumbel(0.0, s))


def test_jitted_and_vmapped_over_data_sets() -> None:
    """The step size of each data set is in proportion to its scale; that of MALA to the square of it."""
    kernel = kernels.mala(adapt="step_size")
    algorithm = mcmc(kernel, num_samples=50, num_chains=8, num_warmup=300)
    scales = jnp.array([0.01, 30.0])
    run = lambda s: algorithm.run(KEY, scaled(s).given(), init={"x": s}, progress=False)  # noqa: E731
    draws = jax.jit(jax.vmap(run))(scales)
    assert draws.warmup["step_size"].shape == (2, 8)
    assert "inverse_mass" not in draws.warmup
    unit = np.log(np.asarray(draws.warmup["step_size"]) / np.asarray(scales)[:, None] ** 2)
    error = np.sqrt((unit.var(1, ddof=1) / 8).sum())
    assert abs(unit[0].mean() - unit[1].mean()) < BAND * error
    assert error < 0.5
    assert kernel.adapted(jax.tree.map(lambda x: x[0], draws)).step_size.shape == ()


def test_a_run_in_pieces_is_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernels.cycle(kernels.mala(), kernels.block(kernels.random_walk(), "b"))
    algorithm = mcmc(kernel, num_samples=11, num_chains=2, num_warmup=60, thin=2)
    whole = algorithm.run(KEY, skewed().given(), progress=False)
    monkeypatch.setattr(runner_module, "FIRST_CHUNK", 7)
    monkeypatch.setattr(runner_module, "_next_size", lambda *_: 7)
    pieces = algorithm.run(KEY, skewed().given(), progress=False)
    for part in ("choices", "stats", "warmup"):
        a, b = jax.tree.leaves(getattr(whole, part)), jax.tree.leaves(getattr(pieces, part))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)), part


def test_a_state_that_was_put_aside_goes_on_as_it_would_have() -> None:
    algorithm = mcmc(kernels.barker(), num_samples=10, num_chains=2, num_warmup=40)
    target = skewed().given().staged()
    advance = jax.jit(lambda state, a, b: iterate(algorithm, target, KEY, state, a, b))
    first = jax.jit(lambda: strong(algorithm.init(KEY, target)))()
    whole = advance(first, 0, 50)
    kept = jax.tree.map(np.asarray, advance(first, 0, 23))  # in the midst of the warm-up
    resumed = advance(jax.tree.map(jnp.asarray, kept), 23, 50)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(a, b)


def test_what_a_warm_up_found_is_saved_and_run_on_with(tmp_path: Any) -> None:
    draws, kernel = warmed("barker"), everywhere(ADAPTIVE["barker"])
    draws.save(tmp_path / "draws.npz")
    adapted = kernel.adapted(load(tmp_path / "draws.npz"))
    expected = np.exp(np.median(np.log(draws.warmup["1"]["step_size"])))
    np.testing.assert_allclose(adapted.kernels[1].kernel.step_size, expected, rtol=1e-6)
    masses = draws.warmup["3"]["inverse_mass"].mean(0)
    np.testing.assert_allclose(adapted.kernels[3].kernel.inverse_mass, masses, rtol=1e-5)
    assert draws.warmup["2"]["0"]["step_size"].shape == (24,)


# --- what is given ----------------------------------------------------------------------------------------------------


def test_without_warm_up_a_kernel_is_used_as_given() -> None:
    for kernel in (kernels.mala(1e-12), kernels.nuts(1e-12), kernels.random_walk(1e-12)):
        draws = mcmc(kernel, num_samples=3, num_chains=1).run(
            KEY, skewed().given(), init={"a": 0.05, "b": 4.0, "c": 2.0}, progress=False
        )
        np.testing.assert_allclose(draws.choices["c"], 2.0, rtol=1e-5)
    for make in (nuts, hmc):
        draws = make(0, 3, num_chains=1, step_size=0.005).run(KEY, skewed().given(), progress=False)
        np.testing.assert_allclose(draws.stats["step_size"], 0.005, rtol=1e-6)


def test_what_does_not_adapt_stays() -> None:
    still = kernels.cycle(kernels.mala(0.02, adapt=False), kernels.slice_sampler())
    algorithm = mcmc(still, num_samples=2, num_chains=2, num_warmup=20)
    assert algorithm.run(KEY, skewed().given(), progress=False).warmup is None
    for kernel in (kernels.nuts(), kernels.random_walk(None), kernels.mala()):
        with pytest.raises(WeftError, match="no step size.*num_warmup"):
            mcmc(kernel, num_samples=2).run(KEY, skewed().given(), progress=False)
    with pytest.raises(WeftError, match="adapt=False keeps the step size that is given"):
        kernels.barker(adapt=False)
    with pytest.raises(WeftError, match="adapt is True, False or 'step_size'"):
        kernels.barker(0.1, adapt="mass")  # pyright: ignore
    for size in (0, -1.0, np.zeros(1)):
        with pytest.raises(WeftError, match="a step size is a positive number"):
            kernels.random_walk(size) if np.ndim(size) == 0 else kernels.nuts(size)
    for kernel in (kernels.hmc(np.full(1, 0.3)), kernels.barker(np.full(1, 0.3))):
        with pytest.raises(WeftError, match=r"one number, got shape \(1,\)"):
            mcmc(kernel, num_samples=2).run(KEY, skewed().given(), progress=False)


class Shift(kernels.Kernel):
    """A kernel of a user, who branches on numbers that nobody made arrays."""

    share: float = 0.5
    noise: float = 0.0

    def move(self, key: Any, choices: Any, target: Any) -> Any:
        if self.noise > 0:
            raise AssertionError
        return choices, {"acceptance_rate": jnp.float32(self.share)}


def test_floats_of_a_users_kernel_stay_numbers() -> None:
    moving = kernels.block(kernels.barker(0.1), "a")
    draws = mcmc(kernels.cycle(Shift(), moving), 3, 2, 3).run(KEY, skewed().given(), progress=False)
    np.testing.assert_array_equal(draws.stats["acceptance_rate_0"], 0.5)
    settings: Any = mcmc(kernels.cycle(Shift(), moving)).traced()
    assert isinstance(settings.kernel.kernels[1].kernel.step_size, jax.Array)


@gen
def tilted() -> None:
    x = sample("x", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(x, 0.2))


@pytest.mark.parametrize(
    "kernel",
    [
        kernels.mala(dense_mass=True),
        kernels.random_walk(jnp.eye(2)),
        kernels.barker(inverse_mass=jnp.eye(2)),
    ],
)
def test_a_dense_inverse_mass_is_a_covariance(kernel: Any) -> None:
    """Shrunk as Stan does, and smaller by the variance of the window's mean, which is what autocorrelation adds to it.

    The last window has 300 of the 600 iterations. The covariance C of its draws, around their own mean, has the
    expectation C (1 - 1 / ESS) 300 / 299. It is shrunk to (300 C + 5e-3 I) / 305.
    """
    algorithm = mcmc(kernel, num_samples=300, num_chains=24, num_warmup=600)
    draws = algorithm.run(KEY, tilted().given(), progress=False)
    found = np.asarray(draws.warmup["inverse_mass"], float)
    values = np.stack([np.asarray(draws.choices[name], float) for name in "xy"])
    sizes = np.array([[ess(chain[None]) for chain in one] for one in values]).mean(1)
    kept = 300 / 299 * (1 - 1 / np.sqrt(np.outer(sizes, sizes)))
    expected = (300 * kept * np.array([[1.0, 1.0], [1.0, 1.04]]) + 5e-3 * np.eye(2)) / 305
    error = found.std(0, ddof=1) / found.shape[0] ** 0.5
    assert (np.abs(found.mean(0) - expected) < student(24) * error).all(), (found.mean(0), expected)
    require_acceptance(draws.stats["acceptance_rate"], kernel.target_acceptance, NEAR)
    require_invariance(kernel.adapted(draws), tilted)


def test_given_scales_are_where_a_warm_up_begins() -> None:
    given = jnp.array([0.3, 50.0, 1.0])
    algorithm = mcmc(kernels.mala(0.5, inverse_mass=given), 1, 1, num_warmup=1)
    draws = algorithm.run(KEY, skewed().given(), progress=False)
    np.testing.assert_allclose(draws.warmup["inverse_mass"][0], given)
    walk = kernels.random_walk(given)
    step_size, inverse_mass = walk.scales()
    np.testing.assert_allclose(walk.with_scales(step_size, inverse_mass).scale, given, rtol=1e-6)


def test_the_verdict_gives_advice_that_can_be_followed() -> None:
    def verdict(kernel: Any, num_warmup: int) -> str:
        algorithm = mcmc(kernel, num_samples=30, num_chains=2, num_warmup=num_warmup)
        target = scaled(1e-3).given()
        return algorithm.run(KEY, target, init={"x": 0.0}, progress=False).summary().verdict

    assert "a smaller step_size, or have a warm-up find one" in verdict(kernels.nuts(1e3), 0)
    assert "target_acceptance" not in verdict(kernels.nuts(1e3), 0)
    assert "step_size" not in verdict(kernels.nuts(1e3), 60)


# --- the driver -------------------------------------------------------------------------------------------------------


def test_schedule_is_stans() -> None:
    phases = jax.vmap(lambda i: phase(i, 150))(jnp.arange(152))
    assert np.flatnonzero(~phases.slow)[75] == 100
    assert np.flatnonzero(phases.ends).tolist() == [99]
    assert np.asarray(phases.warming).sum() == 150
    short = jax.vmap(lambda i: phase(i, 100))(jnp.arange(102))  # 15, 55 and 30 percent
    assert np.flatnonzero(short.slow).tolist() == list(range(15, 70))
    assert np.flatnonzero(short.ends).tolist() == [69]


@gen
def walk() -> Any:
    scale = sample("scale", dist.LogNormal(0.0, 1.0))

    def step(x: Any, _: Any) -> Any:
        x = sample("x", dist.Normal(x, scale))
        return x, sample("y", dist.Normal(x, 1.0))

    return jax.lax.scan(step, 0.0, length=3)[0]


@pytest.mark.slow
def test_particle_gibbs_warms_its_kernel_up_and_pmmh_thins() -> None:
    target = walk().given({"y": jnp.array([0.5, 1.0, 2.0])})
    kernel = kernels.block(kernels.random_walk(1e-4), "scale")
    draws = particle_gibbs(kernel, 10, 50, num_warmup=150).run(KEY, target, progress=False)
    assert (draws.warmup["1"]["step_size"] > 0.05).all()
    settings = {"num_samples": 6, "num_warmup": 4, "num_chains": 2}
    whole = pmmh(10, **settings).run(KEY, target, progress=False)
    part = pmmh(10, **settings, thin=3, keep=["scale"]).run(KEY, target, progress=False)
    assert set(part.choices) == {"scale"}
    assert np.array_equal(part.choices["scale"], whole.choices["scale"][:, 2::3])
    assert np.array_equal(part.stats["lp"], whole.stats["lp"][:, 2::3])


# --- latents of size zero, and mistakes -------------------------------------------------------------------------------


@gen
def partly_empty() -> None:
    sample("none", dist.Gumbel(jnp.zeros((0, 3)), 1.0))
    sample("x", dist.Gamma(2.0, 3.0))


def test_choices_of_size_zero_stand_beside_others() -> None:
    kernel = kernels.cycle(
        kernels.block(kernels.mala(dense_mass=True), "none"),
        kernels.block(kernels.barker(), "x"),
        kernels.nuts(max_tree_depth=2),
    )
    algorithm = mcmc(kernel, num_samples=200, num_chains=4, num_warmup=40)
    draws = algorithm.run(KEY, partly_empty().given(), progress=False)
    assert draws.choices["none"].shape == (4, 200, 0, 3)
    x = np.asarray(draws.choices["x"], float)
    assert abs(x.mean() - 2 / 3) < 5.5 * mcse(x)
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(draws.warmup))


WITH_STEP = [kernels.random_walk, kernels.mala, kernels.barker, kernels.hmc, kernels.nuts]


@pytest.mark.parametrize("make", WITH_STEP)
def test_settings_that_cannot_be_are_refused_where_they_are_written(make: Any) -> None:
    for size in ("a", -1.0, 0, np.nan, np.inf, True, 1j, [0.1, -0.2], {"a": 1}, object()):
        with pytest.raises(WeftError, match=r"(positive|are positive).*got"):
            make(size)
    for rate in ("a", 1.0, 0, -0.1, np.nan, None, [0.1, 0.2]):
        with pytest.raises(WeftError, match="target_acceptance is a number between 0 and 1, got"):
            make(0.1, target_acceptance=rate)
    with pytest.raises(WeftError, match="dense_mass is True or False, got 'x'"):
        make(0.1, dense_mass="x")


MASSES: list[tuple[Any, str]] = [
    (np.array([1.0, -1.0]), "are positive"),
    (np.array([1.0, np.nan]), "are positive"),
    (np.ones((2, 3)), r"square matrix, got shape \(2, 3\)"),
    (np.array([[1.0, 2.0], [2.0, 1.0]]), "symmetric and positive definite"),
    (np.array([[1.0, 0.5], [0.0, 1.0]]), "symmetric and positive definite"),
    (np.ones((2, 2, 2)), r"got shape \(2, 2, 2\)"),
]


@pytest.mark.parametrize("make", WITH_STEP)
def test_masses_that_cannot_be_are_refused(make: Any) -> None:
    walks = make is kernels.random_walk
    for mass, message in MASSES:
        with pytest.raises(WeftError, match=message):
            make(mass) if walks else make(0.1, inverse_mass=mass)
    for mass in ("a", 2.0):
        if not walks:
            with pytest.raises(WeftError, match="an inverse mass is an array"):
                make(0.1, inverse_mass=mass)
    for mass in (np.ones(1), np.ones(2), np.eye(2)):  # the target has three numbers
        kernel = make(mass) if walks else make(0.1, inverse_mass=mass)
        for num_warmup in (0, 5):
            with pytest.raises(WeftError, match="the position has 3 numbers"):
                mcmc(kernel, 2, 2, num_warmup).run(KEY, skewed().given(), progress=False)


def test_other_settings_that_cannot_be_are_refused() -> None:
    walk = kernels.random_walk()
    mistakes: list[tuple[Any, str]] = [
        (lambda: kernels.hmc(0.1, 1.5), "num_steps must be an integer, at least 1, got 1.5"),
        (lambda: kernels.nuts(0.1, max_tree_depth=0), "max_tree_depth must be an integer"),
        (lambda: kernels.nuts(0.1, divergence_threshold=-1), "divergence_threshold is a positive"),
        (
            lambda: kernels.slice_sampler("a"),
            "width is a positive number, or an array of them, got",
        ),
        (lambda: kernels.slice_sampler(max_shrinkage=0), "max_shrinkage must be an integer"),
        (lambda: kernels.elliptical_slice(max_shrinkage="a"), "max_shrinkage must be an integer"),
        (lambda: kernels.repeat(walk, 1.5), "n must be an integer, at least 1, got 1.5"),
        (lambda: kernels.mixture([walk, walk], ["a", "b"]), "weights are positive numbers, got"),
        (lambda: kernels.mixture([walk, walk], [1.0, np.inf]), "weights are positive numbers, got"),
        (lambda: nuts(step_size="a"), "step_size is a positive number, got 'a'"),  # pyright: ignore
        (lambda: nuts(target_acceptance=1.0), "between 0 and 1, got 1.0"),
        (lambda: nuts(dense_mass=1), "dense_mass is True, False, a list of addresses"),  # pyright: ignore
        (lambda: nuts(init_strategy="x"), "init_strategy is an InitStrategy"),  # pyright: ignore
        (lambda: hmc(jitter=1.0), "jitter is a number from 0 to below 1"),
        (lambda: hmc(trajectory_length=0), "trajectory_length is a positive number"),
    ]
    for mistake, message in mistakes:
        with pytest.raises(WeftError, match=message):
            mistake()
    wide = kernels.slice_sampler(np.ones(2))
    with pytest.raises(WeftError, match="the position has 3 numbers"):
        mcmc(wide, 2, 2).run(KEY, skewed().given(), progress=False)
