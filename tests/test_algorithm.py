"""The protocol of algorithms: compiled once, never stale, cut into chunks that change nothing."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jaxtyping import Array
from weft.inference import Algorithm, State, hmc, importance, nuts
from weft.inference.run import runner as runner_module
from weft.ppl.stage.errors import WeftError

from counting import counting
from weft import gen, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane

OFFSET = jnp.float32(0.0)


@gen
def model(x: Array) -> None:
    mu = sample("mu", dist.Normal(OFFSET, 2.0))
    jax.vmap(lambda xi: sample("y", dist.Normal(mu + xi, 1.0)), axis_name="row")(x)


def target(seed: int = 0) -> Any:
    x = jax.random.normal(jax.random.key(seed), (5,))
    return model(x).given({"y": x + 1.0})


SHORT = {"num_warmup": 40, "num_samples": 30, "num_chains": 2}
ALGORITHMS = {
    "nuts": nuts(**SHORT),
    "hmc": hmc(**SHORT, num_steps=3),
    "importance": importance(num_particles=50, batch_size=7),
}


@pytest.fixture(params=list(ALGORITHMS))
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    return ALGORITHMS[request.param]


def equal(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def arrays(result: Any) -> Any:
    return result.choices, getattr(result, "stats", getattr(result, "log_weights", None))


def test_new_data_of_the_same_shape_compile_nothing(algorithm: Algorithm) -> None:
    first, second = target(0), target(1)
    algorithm.run(jax.random.key(0), first, progress=False)
    with counting() as count:
        algorithm.run(jax.random.key(1), second, progress=False)
    assert count.compilations == 0
    assert count.lowerings == 0


def test_the_model_is_traced_once_for_all_data_of_one_shape() -> None:
    traces = []

    @gen
    def counted(x: Array) -> None:
        traces.append(x.shape)
        sample("y", dist.Normal(sample("mu", dist.Normal(x, 1.0)), 1.0))

    for i in range(3):
        for algorithm in (importance(num_particles=5), ALGORITHMS["hmc"]):
            target = counted(jnp.float32(i)).given({"y": 1.0 * i})
            algorithm.run(jax.random.key(i), target, progress=False)
    assert len(traces) == 1


def test_a_model_defined_again_compiles_nothing() -> None:
    """A notebook cell that is run again makes a new function of the same structure."""

    def cell(y: float) -> Any:
        @gen
        def again() -> None:
            mu = sample("mu", dist.Normal(0.0, 2.0))
            sample("y", dist.Normal(mu, 1.0))

        return again().given({"y": y})

    short = nuts(num_warmup=10, num_samples=10, num_chains=1)
    first, second = cell(0.0), cell(1.0)
    short.run(jax.random.key(0), first, progress=False)
    with counting() as count:
        short.run(jax.random.key(0), second, progress=False)
    assert count.compilations == 0


def test_another_float_setting_compiles_nothing() -> None:
    first = target(0)
    nuts(**SHORT, target_acceptance=0.8).run(jax.random.key(0), first, progress=False)
    with counting() as count:
        nuts(**SHORT, target_acceptance=0.9).run(jax.random.key(0), first, progress=False)
    assert count.compilations == 0


def test_a_global_bound_again_is_not_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = importance(num_particles=50)
    before = algorithm.run(jax.random.key(0), target(), progress=False)
    monkeypatch.setitem(globals(), "OFFSET", jnp.float32(100.0))
    with counting() as count:
        after = algorithm.run(jax.random.key(0), target(), progress=False)
    np.testing.assert_allclose(after.choices["mu"], before.choices["mu"] + 100.0, rtol=1e-5)
    # NumPyro checks the parameters of a distribution by a few operations on concrete values, which a
    # staging that must not share JAX's caches compiles anew; the algorithm itself is found again.
    assert not {"jit(_begin)", "jit(_advance)"} & set(count.names)


def test_chunks_change_nothing(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (1, 7, 1000):
        monkeypatch.setattr(runner_module, "FIRST_CHUNK", size)
        monkeypatch.setattr(runner_module, "_next_size", lambda *_, size=size: size)
        results.append(arrays(algorithm.run(jax.random.key(3), target(), progress=False)))
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def test_run_under_jit_is_the_same_run(algorithm: Algorithm) -> None:
    t = target()
    outside = algorithm.run(jax.random.key(4), t, progress=False)
    inside = jax.jit(lambda key: arrays(algorithm.run(key, t)))(jax.random.key(4))
    for a, b in zip(jax.tree.leaves(arrays(outside)), jax.tree.leaves(inside), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


LANES = {
    # No warm-up: rounding, which differs between lanes and single runs, would grow through it.
    "nuts": nuts(num_warmup=0, num_samples=5, num_chains=2, step_size=0.3),
    "hmc": hmc(num_warmup=0, num_samples=5, num_chains=2, step_size=0.3, num_steps=3),
    "importance": importance(num_particles=50, batch_size=7),
}


@pytest.mark.parametrize("name", LANES)
def test_run_under_vmap_over_data_sets(name: str) -> None:
    """Each lane is the run on its own data."""
    x = jnp.arange(3.0)
    ys = jnp.array([[0.0, 1.0, 2.0], [3.0, 3.0, 5.0]])

    def run(y: Array) -> Any:
        return LANES[name].run(jax.random.key(5), model(x).given({"y": y}), progress=False).choices

    together = jax.vmap(run)(ys)
    for i in range(2):
        np.testing.assert_allclose(together["mu"][i], run(ys[i])["mu"], rtol=1e-3, atol=1e-3)


def test_raw_keys_are_taken() -> None:
    raw = importance(num_particles=5).run(jax.random.PRNGKey(0), target(), progress=False)
    typed = importance(num_particles=5).run(jax.random.key(0), target(), progress=False)
    assert equal(raw.choices, typed.choices)


def test_a_program_is_no_target() -> None:
    with pytest.raises(TypeError, match=r"expected a Target, got Program.*given"):
        nuts().run(jax.random.key(0), model(jnp.zeros(2)), progress=False)


class Slow(Algorithm):
    """Counts; the test interrupts it after some iterations."""

    length: int = 100

    def num_iterations(self, target: Any) -> int:
        return self.length

    def init(self, key: Any, target: Any, init: Any = None) -> Any:
        return Counter(jnp.int32(0))

    def step(self, key: Any, state: Any, target: Any) -> Any:
        return Counter(state.iteration + 1)

    def result(self, state: Any, target: Any) -> int:
        return int(state.iteration)

    def describe(self, state: Any) -> str:
        if int(state.iteration) >= 10:
            os.kill(os.getpid(), signal.SIGINT)
        return "counting"


class Counter(State):
    iteration: Array


@pytest.fixture
def chunks_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "FIRST_CHUNK", 5)
    monkeypatch.setattr(runner_module, "_next_size", lambda *_: 5)


@pytest.mark.usefixtures("chunks_of_five")
@pytest.mark.usefixtures("interruptible")
def test_an_interruption_returns_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert threading.current_thread() is threading.main_thread()
    with pytest.warns(UserWarning, match="interrupted after 10 of 100 iterations"):
        assert Slow().run(jax.random.key(0), target()) == 10
    assert "counting" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_sampler_keeps_its_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ALGORITHMS["nuts"].run(jax.random.key(0), target(), progress=False)
    reached = []

    def stop(self: Any, state: Any) -> str:
        reached.append(int(state.iteration))
        if reached[-1] == 50:
            os.kill(os.getpid(), signal.SIGINT)
        return ""

    monkeypatch.setattr(runner_module, "FIRST_CHUNK", 10)
    monkeypatch.setattr(runner_module, "_next_size", lambda *_: 10)
    monkeypatch.setattr(nuts, "describe", stop)
    with pytest.warns(UserWarning, match="interrupted after 50 of 70 iterations"):
        part = ALGORITHMS["nuts"].run(jax.random.key(0), target())
    assert part.choices["mu"].shape == (2, 10)
    assert equal(part.choices["mu"], whole.choices["mu"][:, :10])
    assert part.stats["lp"].shape == (2, 10)


@pytest.mark.usefixtures("chunks_of_five")
@pytest.mark.usefixtures("interruptible")
def test_an_interruption_in_warm_up_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nuts, "describe", lambda *_: os.kill(os.getpid(), signal.SIGINT) or "")
    with pytest.raises(KeyboardInterrupt, match="before there was any result"):
        ALGORITHMS["nuts"].run(jax.random.key(0), target())


def test_no_progress_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    importance(num_particles=5).run(jax.random.key(0), target(), progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_progress_names_the_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    ALGORITHMS["nuts"].run(jax.random.key(0), target())
    err = capsys.readouterr().err
    assert "nuts" in err
    assert "70/70" in err


def test_settings_that_make_no_sense() -> None:
    for settings in ({"num_samples": 0}, {"num_chains": 0}, {"num_warmup": -1}, {"thin": 0}):
        with pytest.raises(WeftError, match=next(iter(settings))):
            nuts(**settings)
    with pytest.raises(WeftError, match="num_particles"):
        importance(num_particles=0)
