"""Resampling schemes: unbiased counts and the bounds that they promise.

Means over 4,000 keys at 5 standard errors, some 100 comparisons: a run in 15,000 would fail by chance; keys are fixed.
"""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from weft.inference import resampling

# Each scheme is compiled for each size, and draws little.
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.slow,  # once is enough: not in every lane
]

SCHEMES = ["systematic", "stratified", "multinomial", "residual", "killing", "ssp"]
WEIGHTS = {
    "uneven": np.array([0.5, 0.23, 0.12, 0.1, 0.03, 0.02]),
    "whole": np.array([0.5, 0.0, 0.25, 0.25]),
    "one": np.array([0.0, 1.0, 0.0]),
    "even": np.full(5, 0.2),
}
DRAW = {s: jax.jit(getattr(resampling, s), static_argnums=2) for s in SCHEMES}


@functools.cache
def counts(scheme: str, name: str, num: int, num_keys: int = 4000) -> np.ndarray:
    weights = WEIGHTS[name]
    keys = jax.random.split(jax.random.key(1), num_keys)
    log_w = jnp.log(jnp.asarray(weights))
    found = np.asarray(jax.vmap(lambda k: DRAW[scheme](k, log_w, num))(keys))
    assert found.shape == (num_keys, num)
    assert np.all(np.diff(found, axis=1) >= 0)
    return np.stack([(found == i).sum(1) for i in range(len(weights))], 1)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_counts_are_unbiased(scheme: str, weights: str) -> None:
    w = WEIGHTS[weights]
    for num in (len(w),) if scheme == "killing" else (len(w), 7):
        found = counts(scheme, weights, num)
        error = found.std(0) / np.sqrt(len(found)) + 1e-6
        assert np.all(np.abs(found.mean(0) - num * w) < 5 * error), (found.mean(0), num * w)


def test_variances_of_counts() -> None:
    """Independent draws have the binomial variance; the others less."""
    w = WEIGHTS["uneven"]
    spread = {s: counts(s, "uneven", 6).var(0).sum() for s in SCHEMES}
    binomial = np.sum(6 * w * (1 - w))
    assert abs(spread["multinomial"] / binomial - 1) < 0.1  # 4,000 keys: 5 standard errors are .09
    for scheme in ("systematic", "stratified", "residual", "ssp"):
        assert spread[scheme] < 0.8 * binomial


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-8.0, 3.0), min_size=20, max_size=20), st.integers(0, 10_000))
def test_bounds_of_counts(log_weights: list[float], seed: int) -> None:
    """Within one of n W for systematic and ssp, within two for stratified, the whole part for residual."""
    log_w = jnp.asarray(log_weights)
    expected = 20 * np.asarray(jax.nn.softmax(log_w), float)
    slack = 1e-4  # of cumulated weights in single precision
    for scheme, bound in (("systematic", 1.0), ("ssp", 1.0), ("stratified", 2.0)):
        found = DRAW[scheme](jax.random.key(seed), log_w, 20)
        count = np.bincount(np.asarray(found), minlength=20)
        assert np.all(np.abs(count - expected) < bound + slack), scheme
    found = DRAW["residual"](jax.random.key(seed), log_w, 20)
    assert np.all(np.bincount(np.asarray(found), minlength=20) >= np.floor(expected - slack))


def test_a_weight_of_zero_has_no_offspring() -> None:
    log_w = jnp.array([-jnp.inf, 0.0, -jnp.inf, 1.0, -jnp.inf])
    keys = jax.random.split(jax.random.key(0), 50)
    for scheme in SCHEMES:
        found = jax.vmap(lambda k, scheme=scheme: DRAW[scheme](k, log_w, 5))(keys)
        assert set(np.ravel(found).tolist()) <= {1, 3}, scheme


WORST = 1 - 2.0**-24  # the largest uniform number below one, or nearly, in single precision


@pytest.mark.parametrize("num", [997, 10_000])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_of_zero_in_single_precision(scheme: str, num: int) -> None:
    """Where cumulated weights are rounded: dead particles at both ends and everywhere between."""
    rng = np.random.default_rng(num)
    dead = rng.uniform(size=num) < 0.6
    dead[[0, 1, -2, -1]] = True
    log_w = jnp.where(dead, -jnp.inf, jnp.asarray(rng.normal(size=num), jnp.float32))
    for key in jax.random.split(jax.random.key(3), 20):
        assert not dead[np.asarray(DRAW[scheme](key, log_w, num))].any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("uniform", [0.0, WORST])
def test_weights_of_zero_at_the_extremes(
    scheme: str, uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every uniform number is the smallest there is, or the largest."""

    def all_the_same(key: jax.Array, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
        return jnp.full(shape, uniform, dtype)

    def exponential(key: jax.Array, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
        return -jnp.log1p(-all_the_same(key, shape, dtype)).at[-1].set(1.0)

    monkeypatch.setattr(jax.random, "uniform", all_the_same)
    monkeypatch.setattr(jax.random, "exponential", exponential)
    log_w = jnp.full(700, -jnp.inf).at[jnp.arange(5, 690, 3)].set(0.0)
    found = getattr(resampling, scheme)(jax.random.key(0), log_w, 700)
    assert np.all(np.isfinite(np.asarray(log_w)[np.asarray(found)]))


@pytest.mark.parametrize("scheme", ["residual", "ssp"])
@pytest.mark.parametrize("num", [41, 130, 997, 20_000])
def test_equal_weights_are_whole(scheme: str, num: int) -> None:
    """N equal weights call for one each, whatever their size."""
    for log_w in (0.0, -7.3):
        found = DRAW[scheme](jax.random.key(num), jnp.full(num, log_w), num)
        np.testing.assert_array_equal(found, np.arange(num))


@pytest.mark.parametrize("num", [19, 87, 1500])
def test_whole_parts_are_kept(num: int) -> None:
    """Weights in proportion to whole numbers, whose logarithms are rounded."""
    rng = np.random.default_rng(num)
    counts = rng.multinomial(num, rng.dirichlet(np.full(num // 2, 0.3)))
    log_w = jnp.log(jnp.asarray(counts, jnp.float32)) + 1.7
    for scheme in ("residual", "ssp"):
        for seed in range(5):
            found = np.asarray(DRAW[scheme](jax.random.key(seed), log_w, num))
            np.testing.assert_array_equal(np.bincount(found, minlength=len(counts)), counts)


def test_what_a_scheme_says_of_itself() -> None:
    assert [s for s in SCHEMES if getattr(resampling, s).independent] == ["multinomial"]
    plain = resampling.as_scheme(lambda key, log_weights, num_samples: jnp.arange(num_samples))
    assert not plain.independent
    assert plain(jax.random.key(0), jnp.zeros(3), 3).tolist() == [0, 1, 2]
    assert resampling.as_scheme(resampling.multinomial) is resampling.multinomial
    with pytest.raises(TypeError, match=r"a scheme of weft.inference .* got str"):
        resampling.as_scheme("multinomial")


def test_killing_keeps_places() -> None:
    with pytest.raises(ValueError, match="5 cannot become 3"):
        resampling.killing(jax.random.key(0), jnp.zeros(5), 3)
