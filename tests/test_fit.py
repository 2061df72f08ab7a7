"""fit and elbo: exact bounds and gradients, minibatches, parameters that are not free, errors.

Bands are |z| < 5 of the estimator's own standard error, fixed keys (false alarm 6e-7 each).
"""

from __future__ import annotations

import os
import signal
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from weft.inference import (
    constrained,
    elbo,
    fit,
    fixed,
    importance,
    jittered,
    load,
    plateau,
    wake_phi,
)
from weft.inference.run import runner as runner_module
from weft.ppl.stage.errors import AddressError, DensityError, WeftError

from counting import counting
from weft import factor, gen, gradients, sample, scale

BAND = 5.0
KEY = jax.random.key(0)


@gen
def model() -> None:
    mu = sample("mu", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(mu, 1.0))


@gen
def guide(params: Any) -> None:
    sample("mu", dist.Normal(params["loc"], params["scale"]))


TARGET = model().given({"y": 2.0})
EVIDENCE = float(dist.Normal(0.0, 2.0**0.5).log_prob(2.0))


def closed_form(params: Any) -> Any:
    """The ELBO of the pair above: log p(y) - KL(N(loc, scale^2) || N(1, 1/2))."""
    posterior = dist.Normal(1.0, 0.5**0.5)
    return EVIDENCE - dist.kl_divergence(dist.Normal(params["loc"], params["scale"]), posterior)


# --- the objective
# ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_estimate_and_its_gradient_are_unbiased() -> None:
    params = {"loc": 0.4, "scale": 1.3}
    keys = jax.random.split(KEY, 4000)
    estimate = jax.jit(jax.vmap(jax.value_and_grad(elbo(TARGET, guide), argnums=1), (0, None)))
    exact = jax.value_and_grad(closed_form)(params)
    for x, mean in zip(
        jax.tree.leaves(estimate(keys, params)), jax.tree.leaves(exact), strict=True
    ):
        x = np.asarray(x, float)
        assert abs(x.mean() - mean) < BAND * x.std() / np.sqrt(x.size)


@pytest.mark.slow
def test_at_the_posterior_every_estimate_is_the_evidence() -> None:
    keys = jax.random.split(KEY, 10)
    found = jax.vmap(elbo(TARGET, guide), (0, None))(keys, {"loc": 1.0, "scale": 0.5**0.5})
    np.testing.assert_allclose(found, EVIDENCE, rtol=1e-5)


@pytest.mark.slow
def test_num_samples_is_a_mean_of_independent_estimates() -> None:
    params = {"loc": 0.4, "scale": 1.3}
    keys = jax.random.split(KEY, 2000)
    one = jax.jit(jax.vmap(elbo(TARGET, guide), (0, None)))(keys, params)
    ten = jax.jit(jax.vmap(elbo(TARGET, guide, num_samples=10), (0, None)))(keys, params)
    np.testing.assert_allclose(ten.std() ** 2 * 10, one.std() ** 2, rtol=0.25)
    assert abs(float(ten.mean()) - float(closed_form(params))) < BAND * ten.std() / 2000**0.5


@pytest.mark.slow
def test_the_target_may_depend_on_the_parameters() -> None:
    """Maximising over the model's own parameter too: d/d noise of E log p(y | mu)."""

    @gen
    def noisy(noise: Any) -> None:
        mu = sample("mu", dist.Normal(0.0, 1.0))
        sample("y", dist.Normal(mu, noise))

    objective = elbo(lambda params: noisy(params["noise"]).given({"y": 2.0}), guide)
    params = {"loc": 0.4, "scale": 1.3, "noise": 0.8}
    keys = jax.random.split(KEY, 4000)
    slope = jax.jit(jax.vmap(jax.grad(objective, argnums=1), (0, None)))(keys, params)["noise"]
    exact = -1 / 0.8 + ((2.0 - 0.4) ** 2 + 1.3**2) / 0.8**3
    assert abs(slope.mean() - exact) < BAND * slope.std() / 4000**0.5


@pytest.mark.slow
def test_idle_choices_do_not_bias_the_bound() -> None:
    """The guide draws what is idle in the target as well; with q = p the bound is exact."""

    @gen
    def branching() -> None:
        s = sample("s", dist.Normal(0.0, 1.0))
        jax.lax.cond(
            s > 0,
            lambda: sample("a", dist.Normal(2.0, 1.0)),
            lambda: sample("b", dist.Normal(-2.0, 1.0)),
        )

    @gen
    def straight(params: Any) -> None:
        sample("s", dist.Normal(params["loc"], 1.0))
        sample("a", dist.Normal(2.0, 1.0))
        sample("b", dist.Normal(-2.0, 1.0))

    bound = jax.vmap(elbo(branching().given(), straight), (0, None))
    np.testing.assert_allclose(bound(jax.random.split(KEY, 8), {"loc": 0.0}), 0.0, atol=1e-5)


# --- fitting
# ----------------------------------------------------------------------------------------------------------


def start() -> dict[str, Any]:
    return {"loc": 0.0, "scale": constrained(1.0, constraints.positive)}


def test_fit_finds_the_posterior() -> None:
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 1500))
    found = fit(KEY, elbo(TARGET, guide, num_samples=8), start(), optimizer, 1500, progress=False)
    assert abs(found.params["loc"] - 1.0) < 0.03
    assert abs(found.params["scale"] - 0.5**0.5) < 0.03
    assert found.bounds.shape == (1500,)
    assert int(found.num_skipped) == 0
    assert "has converged" in found.report()
    assert "k-hat" in found.report()
    particles = importance(found.guide, 500).run(KEY, TARGET, progress=False)
    np.testing.assert_allclose(particles.log_evidence, EVIDENCE, atol=0.02)


@pytest.mark.slow
def test_the_report_tells_how_the_bound_went() -> None:
    def report(objective: Any, optimizer: Any, steps: int = 100, **kwargs: Any) -> str:
        params = {"loc": 0.0, "scale": 1.0}
        return fit(KEY, objective, params, optimizer, steps, progress=False, **kwargs).report()

    exact = lambda key, params: closed_form(params)  # noqa: E731
    loss = lambda key, params: -closed_form(params)  # noqa: E731
    assert "still rising" in report(exact, optax.sgd(1e-3))
    assert "still falling" in report(loss, optax.sgd(1e-3), minimize=True)
    assert "It has converged" in report(exact, optax.sgd(0.2))
    assert "and fell" in report(exact, optax.sgd(-1e-3))
    assert "hidden in the noise" in report(elbo(TARGET, guide), optax.adam(1e-3), 50)


@pytest.mark.slow
def test_fit_is_the_loop_by_hand() -> None:
    """The same optimiser, step by step, on an objective without noise."""

    def objective(key: Any, params: Any) -> Any:
        return closed_form(params)

    optimizer = optax.sgd(0.1)
    found = fit(KEY, objective, {"loc": 0.0, "scale": 1.0}, optimizer, 5, progress=False)
    params, bounds = {"loc": jnp.float32(0.0), "scale": jnp.float32(1.0)}, []
    for _ in range(5):
        bound, slope = jax.value_and_grad(closed_form)(params)
        params = jax.tree.map(lambda p, s: p + 0.1 * s, params, slope)
        bounds.append(bound)
    np.testing.assert_allclose(found.bounds, bounds, rtol=1e-5)
    np.testing.assert_allclose(found.params["loc"], params["loc"], rtol=1e-5)

    loss = fit(
        KEY,
        lambda k, p: -closed_form(p),
        {"loc": 0.0, "scale": 1.0},
        optimizer,
        5,
        minimize=True,
        progress=False,
    )
    np.testing.assert_allclose(loss.params["loc"], params["loc"], rtol=1e-5)
    np.testing.assert_allclose(loss.bounds, -np.asarray(bounds), rtol=1e-5)


@pytest.mark.slow
def test_fit_goes_on_from_its_state() -> None:
    def objective(key: Any, params: Any) -> Any:
        return closed_form(params)

    params, optimizer = {"loc": 0.0, "scale": 1.0}, optax.adam(0.1)
    whole = fit(KEY, objective, params, optimizer, 6, progress=False)
    half = fit(KEY, objective, params, optimizer, 3, progress=False)
    rest = fit(KEY, objective, half.params, optimizer, 3, state=half.state, progress=False)
    np.testing.assert_allclose(rest.params["loc"], whole.params["loc"], rtol=1e-5)


@pytest.mark.slow
def test_second_fit_compiles_nothing() -> None:
    """New data, a new objective, guide and optimiser: everything compares by structure."""

    def go(y: float) -> Any:
        @gen
        def again(params: Any) -> None:
            sample("mu", dist.Normal(params["loc"], params["scale"]))

        target = model().given({"y": y})
        return fit(KEY, elbo(target, again), start(), optax.adam(0.01), 20, progress=False)

    first = go(2.0)
    with counting() as count:
        second = go(3.0)
    assert count.compilations == 0
    assert first.params["loc"] != second.params["loc"]


@pytest.mark.slow
def test_second_fit_of_vmapped_tasks_compiles_nothing() -> None:
    """Rules of custom derivatives (here xlogy's) are wrapped anew under each vmap."""

    @gen
    def coins() -> None:
        sample("y", dist.Normal(sample("on", dist.Bernoulli(0.3)), 1.0))

    @gen
    def guess(params: Any, y: Any) -> None:
        sample("on", dist.Bernoulli(jax.nn.sigmoid(params * y)), grad=gradients.enum)

    one = elbo(lambda params, y: coins().given({"y": y}), guess)

    def go() -> Any:
        def mean(key: Any, params: Any, y: Any) -> Any:
            keys = jax.random.split(key, len(y))
            return jnp.mean(jax.vmap(one, (0, None, 0))(keys, params, y))

        return fit(KEY, mean, 0.1, optax.adam(0.01), 2, jnp.arange(3.0), progress=False)

    go()
    with counting() as count:
        go()
    assert count.compilations == 0


@pytest.mark.slow
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1, 6, 100):
        monkeypatch.setattr(runner_module, "FIRST_CHUNK", size)
        monkeypatch.setattr(runner_module, "_next_size", lambda *_, size=size: size)
        found.append(fit(KEY, elbo(TARGET, guide), start(), optax.adam(0.01), 20, progress=False))
    for other in found[1:]:
        assert np.array_equal(found[0].bounds, other.bounds)
        assert np.array_equal(found[0].params["loc"], other.params["loc"])


@pytest.mark.slow
def test_fit_under_vmap_over_data() -> None:
    def go(y: Any) -> Any:
        objective = elbo(model().given({"y": y}), guide)
        return fit(KEY, objective, start(), optax.adam(0.01), 20, progress=False).params["loc"]

    together = jax.vmap(go)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(together, [go(1.0), go(2.0)], rtol=1e-4)


@pytest.mark.slow
def test_the_callers_arrays_are_not_given_away() -> None:
    params = {"loc": jnp.zeros(()), "scale": jnp.ones(())}
    for _ in range(2):
        fit(KEY, elbo(TARGET, guide), params, optax.adam(0.01), 3, progress=False)
    assert float(params["scale"]) == 1.0


# --- stopping early
# ----------------------------------------------------------------------------------------------------


def noisy(slope: float, spread: float = 1.0) -> Any:
    """An objective that rises by `slope` a step whatever is done, with normal noise: a known law of its windows."""

    def objective(key: Any, params: Any) -> Any:
        still = jax.lax.stop_gradient(params)
        return still + (params - still) + spread * jax.random.normal(key)

    return objective, optax.sgd(slope)


def stopped_after(objective: Any, optimizer: Any, steps: int, **kwargs: Any) -> Any:
    return fit(KEY, objective, 0.0, optimizer, steps, progress=False, **kwargs)


@pytest.mark.slow
def test_a_level_bound_stops_and_a_rising_one_does_not() -> None:
    """A level one stops at a decision with probability 0.977: at none of ten, 2e-16.

    One that rises by delta a window with standard error s is stopped with probability Phi(2 - delta / s); here
    delta / s = 0.5 * 40 / (2 / 40)**0.5 = 89.
    """
    found = stopped_after(*noisy(0.0), 440, stop=plateau(40))
    assert bool(found.stopped)
    assert found.bounds.size % 40 == 0
    assert found.bounds.size < 440
    assert np.isfinite(found.bounds).all()
    assert f"stopped early, after {found.bounds.size} steps" in found.report()
    rising = stopped_after(*noisy(0.5), 440, stop=plateau(40))
    assert not bool(rising.stopped)
    assert rising.bounds.size == 440
    falling = stopped_after(*noisy(0.5), 440, stop=plateau(40), minimize=True)  # a loss, descended
    assert not bool(falling.stopped)


@pytest.mark.slow
def test_the_rule_is_its_formula() -> None:
    """Windows by NumPy, with estimates left out that are not finite."""
    rng = np.random.default_rng(1)
    rule, values = plateau(20, tolerance=0.01, z=1.0), rng.normal(0.02 * np.arange(400.0), 1.0)
    values[rng.random(400) < 0.1] = np.nan
    seen, decided = rule.init(), []
    update = jax.jit(rule.update)
    for i, v in enumerate(values):
        seen, stop = update(seen, i, jnp.asarray(v))
        decided.append(bool(stop))
    expected = np.zeros(400, bool)
    for end in range(40, 401, 20):
        old, new = (
            x[np.isfinite(x)] for x in (values[end - 40 : end - 20], values[end - 20 : end])
        )
        error = np.sqrt(old.var(ddof=1) / old.size + new.var(ddof=1) / new.size)
        expected[end - 1] = new.mean() - old.mean() <= max(0.01, error)
    assert decided == expected.tolist()
    assert 0 < sum(decided) < 19


@pytest.mark.slow
def test_a_tolerance_stops_what_has_no_noise() -> None:
    """The mean of closed-form bounds: it always rises, by less and less."""
    run = lambda stop: fit(  # noqa: E731
        KEY,
        lambda key, p: closed_form(p),
        {"loc": 0.0, "scale": 1.0},
        optax.sgd(0.05),
        1000,
        stop=stop,
        progress=False,
    )
    found = run(plateau(20, tolerance=1e-3))
    windows = np.asarray(found.bounds, float).reshape(-1, 20).mean(1)
    rises = np.diff(windows)
    assert bool(found.stopped)
    assert rises[-1] <= 1e-3
    assert (rises[:-1] > 1e-3).all()


@pytest.mark.slow
def test_stopping_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (7, 40, 1000):
        monkeypatch.setattr(runner_module, "FIRST_CHUNK", size)
        monkeypatch.setattr(runner_module, "_next_size", lambda *_, size=size: size)
        found.append(stopped_after(*noisy(0.0), 440, stop=plateau(40)))
    assert all(np.array_equal(found[0].bounds, other.bounds) for other in found[1:])
    assert all(float(found[0].params) == float(other.params) for other in found[1:])


@pytest.mark.slow
def test_stopping_under_vmap() -> None:
    """Each lane by itself: those that are done wait, and what they did not do is NaN."""

    def go(key: Any) -> Any:
        objective, optimizer = noisy(0.0)
        found = fit(key, objective, 0.0, optimizer, 200, stop=plateau(10, z=0.0), progress=False)
        return found.bounds, found.stopped, found.params

    keys = jax.random.split(KEY, 6)
    bounds, stopped, _ = jax.vmap(go)(keys)
    sizes = np.isfinite(bounds).sum(1)
    assert len(set(sizes)) > 1
    for key, row, n, end in zip(keys, bounds, sizes, stopped, strict=True):
        alone, alone_end, _ = go(key)
        assert alone.size == n
        assert bool(end) == bool(alone_end)
        np.testing.assert_allclose(row[:n], alone, rtol=1e-6)


@pytest.mark.slow
def test_a_rule_that_makes_no_sense() -> None:
    with pytest.raises(WeftError, match="window must be an integer"):
        plateau(1)
    with pytest.raises(WeftError, match="tolerance must be a number, at least 0"):
        plateau(10, tolerance=-1.0)


# --- restarts
# ----------------------------------------------------------------------------------------------------------


def two_hills(key: Any, params: Any) -> Any:
    """Maxima near -2 (of 1) and 2 (of 3), in noise."""
    x = params["x"]
    hills = 1.0 * jnp.exp(-((x + 2.0) ** 2)) + 3.0 * jnp.exp(-((x - 2.0) ** 2))
    return hills + 0.1 * jax.random.normal(key)


def anywhere(key: Any) -> Any:
    return {"x": jax.random.uniform(key, minval=-3.0, maxval=3.0), "unit": fixed(1.0)}


@pytest.mark.slow
def test_the_best_restart_is_kept() -> None:
    key = jax.random.key(1)
    found = fit(key, two_hills, anywhere, optax.adam(0.05), 300, num_restarts=8, progress=False)
    ends = np.asarray(found.restarts.bounds)
    low, high = abs(ends - 1.0) < 0.1, abs(ends - 3.0) < 0.1  # standard error 0.01
    assert (low | high).all()
    assert low.any()
    assert high.any()
    assert int(found.restarts.best) == ends.argmax()
    assert abs(float(found.params["x"]) - 2.0) < 0.05
    assert found.bounds.shape == (300,)
    assert f"best of 8 restarts: {high.sum()} of them ended" in found.report()
    loss = fit(
        key,
        lambda k, p: -two_hills(k, p),
        anywhere,
        optax.adam(0.05),
        300,
        num_restarts=8,
        minimize=True,
        progress=False,
    )
    np.testing.assert_allclose(loss.params["x"], found.params["x"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [None, plateau(20, z=0.0)], ids=["whole", "stopped"])
def test_restarts_are_fits_of_their_own(stop: Any) -> None:
    """Each equals a fit alone with one of the split keys, minibatches and early stops included."""
    data = jnp.arange(12.0)

    def objective(key: Any, params: Any, rows: Any) -> Any:
        return two_hills(key, params) + 0.01 * rows.mean()

    settings = {"data": data, "batch_size": 4, "stop": stop, "progress": False}
    found = fit(KEY, objective, anywhere, optax.adam(0.05), 100, num_restarts=4, **settings)
    best = int(found.restarts.best)
    alone = fit(
        jax.random.split(KEY, 4)[best], objective, anywhere, optax.adam(0.05), 100, **settings
    )
    np.testing.assert_allclose(found.bounds, alone.bounds, rtol=1e-5)
    np.testing.assert_allclose(found.params["x"], alone.params["x"], rtol=1e-5)
    assert bool(found.stopped) == bool(alone.stopped)


@pytest.mark.slow
def test_restarts_compile_once() -> None:
    def go(num: int) -> int:
        with counting() as count:
            fit(KEY, two_hills, anywhere, optax.adam(0.05), 5, num_restarts=num, progress=False)
        return count.compilations

    go(2)  # what else there is to compile
    assert go(2) == 0


@pytest.mark.slow
def test_restarts_of_which_some_begin_nowhere() -> None:
    def objective(key: Any, params: Any) -> Any:
        return -((params - 1.0) ** 2) + 0.0 * jnp.log(params)

    init = lambda key: jax.random.normal(key)  # noqa: E731
    found = fit(KEY, objective, init, optax.adam(0.05), 200, num_restarts=8, progress=False)
    assert 0 < np.isfinite(found.restarts.bounds).sum() < 8
    assert abs(float(found.params) - 1.0) < 0.05
    with pytest.raises(DensityError, match="first bound is nan"):
        fit(KEY, objective, lambda key: -1.0, optax.adam(0.05), 9, num_restarts=2, progress=False)


@pytest.mark.slow
def test_restarts_under_vmap() -> None:
    def go(key: Any) -> Any:
        found = fit(key, two_hills, anywhere, optax.adam(0.1), 100, num_restarts=3, progress=False)
        return found.params["x"], found.restarts.best

    keys = jax.random.split(KEY, 2)
    for together, alone in zip(jax.vmap(go)(keys), zip(*map(go, keys), strict=True), strict=True):
        np.testing.assert_allclose(together, alone, rtol=1e-4)


@pytest.mark.slow
def test_where_restarts_begin() -> None:
    with pytest.raises(WeftError, match=r"would all begin at the same parameters.*jittered"):
        fit(KEY, two_hills, {"x": 0.0}, optax.adam(0.1), 5, num_restarts=3)
    with pytest.raises(WeftError, match="goes on with one fit"):
        fit(KEY, two_hills, anywhere, optax.adam(0.1), 5, num_restarts=3, state=())
    params = {
        "x": 1.0,
        "s": constrained(2.0, constraints.positive),
        "net": eqx.nn.Linear(2, 2, key=KEY),
    }
    init = jittered({**params, "n": 3}, scale=0.5)
    one, two = init(jax.random.key(1)), init(jax.random.key(2))
    assert one["n"] == 3
    assert float(one["s"].value) > 0
    assert float(one["x"]) != float(two["x"])
    moves = jax.vmap(lambda k: jittered(jnp.zeros(50), 0.5)(k))(jax.random.split(KEY, 100))
    # 5000 normal draws: the standard deviation's own error is 0.5 / sqrt(10000).
    assert abs(float(moves.std()) - 0.5) < BAND * 0.005


@pytest.mark.slow
def test_clipping_and_schedules_are_optax() -> None:
    """Step by step by hand, on an objective without noise whose gradient is clipped at the start."""
    rate = optax.exponential_decay(0.5, 2, 0.5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    objective = lambda key, p: -jnp.sum(p["a"] ** 4) - p["b"] ** 2  # noqa: E731
    params = {"a": jnp.array([3.0, -2.0]), "b": jnp.float32(1.0)}
    found = fit(KEY, objective, params, optimizer, 6, progress=False)
    state = optimizer.init(params)
    for _ in range(6):
        slope = jax.grad(lambda p: -objective(None, p))(params)
        updates, state = optimizer.update(slope, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found.params["a"], params["a"], rtol=1e-5)
    np.testing.assert_allclose(found.params["b"], params["b"], rtol=1e-5)


# --- minibatches
# ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_minibatches_are_epochs_without_replacement() -> None:
    """Each objective value tells which rows it saw, in base 2."""
    rows = jnp.arange(10)

    def objective(key: Any, params: Any, i: Any, x: Any) -> Any:
        seen = jnp.sum(2.0**i)
        return seen + 0.0 * params * x.sum()

    found = fit(
        KEY,
        objective,
        1.0,
        optax.sgd(0.0),
        9,
        data=(rows, rows * 1.0),
        batch_size=3,
        progress=False,
    )
    seen = [{i for i in range(10) if int(b) >> i & 1} for b in found.bounds]
    assert all(len(s) == 3 for s in seen)
    for epoch in range(3):
        assert len(set.union(*seen[3 * epoch : 3 * epoch + 3])) == 9
    assert len({frozenset(s) for s in seen}) > 3


@pytest.mark.slow
def test_a_scaled_minibatch_has_the_same_mean() -> None:
    """scale(model, {"row": N / B}) and batches: the mean over an epoch is the bound on all of the data."""
    n, b = 12, 4
    x = jax.random.normal(jax.random.key(1), (n,))

    @gen
    def rows(x: Any) -> None:
        mu = sample("mu", dist.Normal(0.0, 1.0))
        jax.vmap(lambda x: sample("y", dist.Normal(mu + 0.0 * x, 1.0)), axis_name="row")(x)

    def target(params: Any, batch: Any) -> Any:
        return scale(rows, {"row": n / batch.shape[0]})(batch).given({"y": batch})

    def objective(key: Any, params: Any, batch: Any) -> Any:
        return target(params, batch).log_density({"mu": params})

    def bounds(batch_size: int | None, steps: int) -> Any:
        still = optax.sgd(0.0)
        return fit(
            KEY, objective, 0.3, still, steps, data=x, batch_size=batch_size, progress=False
        ).bounds

    np.testing.assert_allclose(bounds(b, 3).mean(), bounds(None, 1)[0], rtol=1e-5)
    np.testing.assert_allclose(bounds(n, 1), bounds(None, 1), rtol=1e-5)

    @gen
    def amortised(params: Any, batch: Any) -> None:
        sample("mu", dist.Normal(params + 0.0 * batch.mean(), 0.3))

    found = fit(
        KEY,
        elbo(target, amortised),
        0.3,
        optax.adam(0.02),
        300,
        data=x,
        batch_size=b,
        progress=False,
    )
    exact = x.sum() / (n + 1)
    assert abs(found.params - exact) < 0.3
    assert found.guide.latents == ("mu",)
    assert "minibatches: not checked" in found.report()


@pytest.mark.slow
def test_a_target_that_is_not_scaled_is_warned_of() -> None:
    """Unless every choice belongs to a row, where a constant factor is all that is missing."""

    @gen
    def rows(x: Any, shared: bool) -> None:
        mu = sample("mu", dist.Normal(0.0, 1.0)) if shared else 0.0

        def row(x: Any) -> None:
            z = 0.0 if shared else sample("z", dist.Normal(0.0, 1.0))
            sample("y", dist.Normal(mu + z + 0.0 * x, 1.0))

        jax.vmap(row, axis_name="row")(x)

    @gen
    def one(params: Any, x: Any) -> None:
        sample("mu", dist.Normal(params, 1.0))

    @gen
    def each(params: Any, x: Any) -> None:
        jax.vmap(lambda _: sample("z", dist.Normal(params, 1.0)), axis_name="row")(x)

    data = jnp.arange(6.0)
    settings = {"data": data, "batch_size": 2, "progress": False}
    bare = elbo(lambda params, x: rows(x, True).given({"y": x}), one)
    with pytest.warns(UserWarning, match=r"counts 2 of 6 rows, while 'mu'.*\{'row': 6 / 2\}"):
        fit(KEY, bare, 0.0, optax.adam(0.1), 2, **settings)
    fit(
        KEY,
        elbo(lambda params, x: rows(x, False).given({"y": x}), each),
        0.0,
        optax.adam(0.1),
        2,
        **settings,
    )


@pytest.mark.slow
def test_data_that_cannot_be_batched() -> None:
    objective = lambda key, params, *batch: params  # noqa: E731
    with pytest.raises(WeftError, match=r"share their leading axis, got shapes \[\(3,\), \(4,\)\]"):
        fit(KEY, objective, 1.0, optax.sgd(0.1), 2, data=(jnp.zeros(3), jnp.zeros(4)), batch_size=2)
    with pytest.raises(WeftError, match="batch_size=5 of only 3 rows"):
        fit(KEY, objective, 1.0, optax.sgd(0.1), 2, data=jnp.zeros(3), batch_size=5)


# --- parameters
# -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fixed_and_constrained_leaves() -> None:
    params = {
        "loc": fixed({"a": 0.25}),
        "scale": constrained(0.5, constraints.interval(0.2, 0.6)),
        "mix": constrained(jnp.array([0.2, 0.3, 0.5]), constraints.simplex),
        "label": "kept",
        "count": 3,
    }

    def objective(key: Any, params: Any) -> Any:
        assert params["label"] == "kept"
        return closed_form({"loc": params["loc"]["a"], "scale": params["scale"]}) + params["mix"][0]

    found = fit(KEY, objective, params, optax.sgd(0.5), 50, progress=False)
    assert float(found.params["loc"]["a"]) == 0.25
    assert 0.5 < float(found.params["scale"]) < 0.6
    np.testing.assert_allclose(found.params["mix"].sum(), 1.0, rtol=1e-5)
    assert found.params["mix"][0] > 0.9
    assert found.params["count"] == 3


@pytest.mark.slow
def test_a_network_passes_through() -> None:
    """Equinox modules with activation functions inside, as they are."""
    net = eqx.nn.MLP(1, 2, 4, 1, key=KEY)

    @gen
    def amortised(net: Any) -> None:
        loc, scale = net(jnp.array([2.0]))
        sample("mu", dist.Normal(loc, jax.nn.softplus(scale)))

    found = fit(KEY, elbo(TARGET, amortised), net, optax.adam(0.02), 400, progress=False)
    assert isinstance(found.params, eqx.nn.MLP)
    assert abs(float(found.params(jnp.array([2.0]))[0]) - 1.0) < 0.3
    assert float(found.bounds[-50:].mean()) > float(found.bounds[:5].mean())


@pytest.mark.slow
def test_parameters_that_make_no_sense() -> None:
    with pytest.raises(WeftError, match="not in the set"):
        constrained(-1.0, constraints.positive)
    with pytest.raises(WeftError, match="no floating array to optimise"):
        fit(KEY, elbo(TARGET, guide), {"loc": fixed(0.0), "scale": fixed(1.0)}, optax.adam(0.1), 3)
    with pytest.raises(WeftError, match="num_steps"):
        fit(KEY, elbo(TARGET, guide), start(), optax.adam(0.1), 0)
    with pytest.raises(WeftError, match=r"one floating number, got an array of shape \(3,\)"):
        fit(KEY, lambda key, params: params * jnp.ones(3), 1.0, optax.sgd(0.1), 3)


# --- what is not finite
# -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_first_bound_that_is_not_finite_names_the_site() -> None:
    @gen
    def broken() -> None:
        mu = sample("mu", dist.Normal(0.0, 1.0))
        sample("y", dist.Normal(jnp.log(-1.0 - mu**2), 1.0))

    with pytest.raises(DensityError, match=r"first bound is nan.*in the target.*'y' is nan.*mu = "):
        fit(
            KEY,
            elbo(broken().given({"y": 0.0}), guide),
            start(),
            optax.adam(0.1),
            5,
            progress=False,
        )


@pytest.mark.slow
def test_a_first_gradient_that_is_not_finite_names_the_parameter() -> None:
    objective = lambda key, params: jnp.sqrt(params["a"]) + params["b"]  # noqa: E731
    with pytest.raises(DensityError, match=r"gradient is not finite with respect to params\['a'\]"):
        fit(KEY, objective, {"a": 0.0, "b": 1.0}, optax.sgd(0.1), 5, progress=False)


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_named() -> None:
    with pytest.raises(DensityError, match=r"the parameters params\['b'\] are not finite"):
        fit(
            KEY,
            lambda k, p: p["a"] * p["b"],
            {"a": 0.0, "b": np.inf},
            optax.sgd(0.1),
            5,
            progress=False,
        )


@pytest.mark.slow
def test_later_steps_that_are_not_finite_are_skipped_and_counted() -> None:
    def objective(key: Any, params: Any) -> Any:
        return jnp.where(jax.random.uniform(key) < 0.3, jnp.nan, -((params - 1.0) ** 2))

    keys = (jax.random.key(i) for i in range(20))
    found = None
    for key in keys:  # the first step must be finite
        try:
            found = fit(key, objective, 0.0, optax.sgd(0.1), 100, progress=False)
            break
        except DensityError:
            continue
    assert found is not None
    assert int(found.num_skipped) == int(np.isnan(found.bounds).sum())
    assert 5 < int(found.num_skipped) < 60
    assert abs(float(found.params) - 1.0) < 1e-3
    assert f"{int(found.num_skipped)} of 100 steps were skipped" in found.report()


# --- pairs that give no bound
# -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_guide_draws_exactly_the_latents() -> None:
    @gen
    def other(params: Any) -> None:
        sample("mv", dist.Normal(params["loc"], params["scale"]))

    with pytest.raises(
        AddressError, match=r"(?s)the guide 'other'.*latent choices: 'mu'.*draws: +'mv'"
    ):
        fit(KEY, elbo(TARGET, other), start(), optax.adam(0.1), 3)


@pytest.mark.slow
def test_an_unnormalised_guide_is_refused() -> None:
    @gen
    def soft(params: Any) -> None:
        sample("mu", dist.Normal(params["loc"], params["scale"]))
        factor("tilt", 1.0)

    with pytest.raises(DensityError, match=r"guide 'soft' is not normalised.*'tilt'.*normalize"):
        fit(KEY, elbo(TARGET, soft), start(), optax.adam(0.1), 3)


@gen
def scaled() -> None:
    tau = sample("tau", dist.HalfNormal(1.0))
    sample("y", dist.Normal(0.0, tau))


def on(law: Any) -> Any:
    @gen
    def guide_on(params: Any) -> None:
        sample("tau", law(params))

    return guide_on


LAWS = {
    "normal": lambda p: dist.Normal(p, 1.0),
    "wider": lambda p: dist.Uniform(-1.0, 1.0),
    "lognormal": lambda p: dist.LogNormal(p, 1.0),
    "narrower": lambda p: dist.Uniform(0.5, 1.5),
    "poisson": lambda p: dist.Poisson(jnp.exp(p)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "inside"), [("normal", 0), ("wider", 0), ("lognormal", 1), ("narrower", 1)]
)
def test_a_guide_stays_in_the_targets_support(law: str, inside: int) -> None:
    objective = elbo(scaled().given({"y": 1.0}), on(LAWS[law]))
    if inside:
        objective.check(0.0)
        return
    with pytest.raises(
        DensityError, match=r"draws 'tau' from .*has it from HalfNormal.*minus infinity"
    ):
        fit(KEY, objective, 0.0, optax.adam(0.1), 3, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "covers"), [("normal", 1), ("wider", 0), ("lognormal", 1), ("narrower", 0)]
)
def test_a_proposal_covers_the_targets_support(law: str, covers: int) -> None:
    """And so must the guide of an objective that is weighed by the posterior."""
    target = scaled().given({"y": 1.0})
    objective = wake_phi(target, on(LAWS[law]))
    if covers:
        objective.check(0.0)
        return
    with pytest.raises(DensityError, match="are never drawn"):
        objective.check(0.0)
    with pytest.raises(DensityError, match="are never drawn"):
        importance(on(LAWS[law])(0.0), 10).run(KEY, target, progress=False)


@pytest.mark.slow
def test_a_discrete_guide_of_a_continuous_choice() -> None:
    for objective in (elbo, wake_phi):
        with pytest.raises(DensityError, match=r"'tau' from Poisson \(discrete.*one is discrete"):
            objective(scaled().given({"y": 1.0}), on(LAWS["poisson"])).check(0.0)


@pytest.mark.slow
def test_supports_that_are_no_intervals() -> None:
    """A normal guide of a simplex, and one of a Cholesky factor, are refused; their own kinds are not."""

    @gen
    def mixed() -> None:
        sample("p", dist.Dirichlet(jnp.ones(3)))
        sample("c", dist.LKJCholesky(2, 1.0))

    def guide_of(p: Any, c: Any) -> Any:
        @gen
        def some(params: Any) -> None:
            sample("p", p)
            sample("c", c)

        return elbo(mixed().given(), some)

    own = (dist.Dirichlet(2.0 * jnp.ones(3)), dist.LKJCholesky(2, 2.0))
    guide_of(*own).check(0.0)
    for p, c in (
        (dist.Normal(jnp.zeros(3), 1.0).to_event(1), own[1]),
        (own[0], dist.Normal(jnp.zeros((2, 2)), 1.0).to_event(2)),
    ):
        with pytest.raises(DensityError, match="minus infinity"):
            guide_of(p, c).check(0.0)


@pytest.mark.slow
def test_what_elbo_takes() -> None:
    with pytest.raises(TypeError, match="expected a Target"):
        elbo(model(), guide)
    with pytest.raises(TypeError, match="guide that is a function"):
        elbo(TARGET, guide(start()))
    with pytest.raises(WeftError, match="num_samples"):
        elbo(TARGET, guide, num_samples=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [gradients.enum, gradients.mvd], ids=["enum", "mvd"])
def test_a_guide_with_a_discrete_choice(strategy: Any) -> None:
    """A coin given its consequence: the fitted probability is the posterior's, and no gradient has noise."""

    @gen
    def coin() -> None:
        z = sample("z", dist.Bernoulli(0.3))
        sample("y", dist.Normal(2.0 * z, 1.0))

    @gen
    def guess(params: Any) -> None:
        sample("z", dist.Bernoulli(logits=params), grad=strategy)

    objective = elbo(coin().given({"y": 1.5}), guess, sticking_the_landing=True)
    found = fit(KEY, objective, 0.0, optax.adam(0.1), 400, progress=False)
    log_odds = np.log(0.3 / 0.7) + 0.5 * 1.5**2 - 0.5 * 0.5**2
    assert abs(found.params - log_odds) < 0.01


# --- around the loop
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_an_interruption_returns_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "FIRST_CHUNK", 5)
    monkeypatch.setattr(
        runner_module, "_next_size", lambda *_: os.kill(os.getpid(), signal.SIGINT) or 5
    )
    with pytest.warns(UserWarning, match="fit was interrupted after 10 of 100 steps"):
        found = fit(KEY, elbo(TARGET, guide), start(), optax.adam(0.1), 100, progress=False)
    assert found.bounds.shape == (10,)


@pytest.mark.slow
def test_save_and_load(tmp_path: Any) -> None:
    found = fit(KEY, elbo(TARGET, guide), start(), optax.adam(0.1), 10, progress=False)
    found.save(tmp_path / "fit.npz")
    again = load(tmp_path / "fit.npz")
    assert np.array_equal(again.bounds, found.bounds)
    assert float(again.params["loc"]) == float(found.params["loc"])
    with pytest.raises(WeftError, match="loaded from a file"):
        _ = again.guide


@pytest.mark.slow
def test_printing() -> None:
    found = fit(KEY, elbo(TARGET, guide), start(), optax.adam(0.1), 10, progress=False)
    text = repr(found)
    assert "10 steps" in text
    assert "params['loc']" in text
    assert len(text.splitlines()) < 24


@pytest.mark.slow
def test_double_precision(x64: None) -> None:
    target = model().given({"y": 2.0})
    found = fit(KEY, elbo(target, guide), start(), optax.adam(0.1), 10, progress=False)
    assert found.bounds.dtype == jnp.float64
    assert found.params["scale"].dtype == jnp.float64
