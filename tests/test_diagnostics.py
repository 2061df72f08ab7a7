"""Diagnostics against ArviZ, against chains of known effective size, against exact tails."""

import warnings

import numpy as np
import pytest
from weft.inference.results import diagnostics
from weft.inference.results.diagnostics import (
    bfmi,
    describe,
    ess,
    mcse,
    rhat,
)
from weft.inference.results.weights import (
    generalized_pareto,
    khat,
    khat_threshold,
    weighted_describe,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.2x announces 1.0
    import arviz


def autoregression(
    rng: np.random.Generator, phi: float, chains: int, draws: int, scalars: int
) -> np.ndarray:
    """Stationary AR(1) chains with unit variance: ESS of the mean is N (1 - phi) / (1 + phi)."""
    noise = rng.normal(size=(draws, chains, scalars)) * np.sqrt(1 - phi**2)
    x = np.empty_like(noise)
    x[0] = rng.normal(size=(chains, scalars))
    for t in range(1, draws):
        x[t] = phi * x[t - 1] + noise[t]
    return np.moveaxis(x, 0, 1)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {
        f"phi={phi}, {n} draws": autoregression(rng, phi, 4, n, 3)
        for phi in (-0.7, 0.0, 0.95, 0.999)
        for n in (4, 5, 7, 8, 101, 400)
    }
    shift = np.arange(4.0)[:, None, None]
    return found | {
        "two chains": rng.normal(size=(2, 100, 3)),
        "chains apart": rng.normal(size=(4, 100, 3)) + shift,
        "scales apart": rng.normal(size=(4, 100, 3)) * (1 + shift),
        "heavy tails": rng.standard_cauchy((4, 301, 3)),
        "counts": rng.poisson(2.0, (4, 200, 3)).astype(float),
        "coins": (rng.random((4, 200, 3)) < 0.3).astype(float),
    }


@pytest.mark.parametrize("name", arrays())
def test_diagnostics_equal_arviz(name: str) -> None:
    x = arrays()[name]
    data = arviz.convert_to_dataset({"x": x})
    pairs = {
        "rhat": (rhat(x), arviz.rhat(data)),
        "bulk": (ess(x), arviz.ess(data, method="bulk")),
        "tail": (ess(x, kind="tail"), arviz.ess(data, method="tail", prob=(0.05, 0.95))),
        "mean": (ess(x, kind="mean"), arviz.ess(data, method="mean")),
        "mcse": (mcse(x), arviz.mcse(data)),
    }
    for what, (ours, theirs) in pairs.items():
        np.testing.assert_allclose(ours, theirs["x"].values, rtol=1e-9, err_msg=what)


def test_describe_agrees_with_the_single_functions_and_numpy() -> None:
    x = np.random.default_rng(1).gamma(2.0, size=(3, 61, 2, 2))
    table = describe(x, quantiles=(0.1, 0.5, 0.9))
    flat = x.reshape(-1, 2, 2)
    expected = {
        "mean": flat.mean(0),
        "sd": flat.std(0, ddof=1),
        "10%": np.quantile(flat, 0.1, axis=0),
        "50%": np.median(flat, axis=0),
        "90%": np.quantile(flat, 0.9, axis=0),
        "mcse": mcse(x),
        "ess_bulk": ess(x),
        "ess_tail": ess(x, kind="tail"),
        "r_hat": rhat(x),
        "active": np.ones((2, 2)),
        "not_finite": np.zeros((2, 2)),
        "constant": np.zeros((2, 2)),
    }
    assert list(table) == list(expected)
    for column, values in expected.items():
        np.testing.assert_allclose(table[column], values, rtol=1e-12, err_msg=column)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(2).normal(size=(2, 20, 7))
    active = np.random.default_rng(3).random((2, 20, 7)) < 0.9
    active[..., 3] = True
    whole = describe(x, active)
    monkeypatch.setattr(diagnostics, "_BLOCK", 100)
    for column, values in describe(x, active).items():
        np.testing.assert_array_equal(whole[column], values)


# 200 independent scalars a case. The mean of ESS / ESS_true has a standard error below 0.02;
# Geyer's truncation and the short chains bias it by a few per cent (Vehtari et al. 2021, section
# 3.2), hence the band of 0.1: 5 standard errors.
@pytest.mark.parametrize("phi", [-0.3, 0.0, 0.5, 0.9])
def test_effective_size_of_autoregressions(phi: float) -> None:
    x = autoregression(np.random.default_rng(4), phi, 4, 1000, 200)
    truth = 4000 * (1 - phi) / (1 + phi)
    assert abs((ess(x, kind="mean") / truth).mean() - 1) < 0.1
    assert abs((ess(x, kind="bulk") / truth).mean() - 1) < 0.1


# z = error of the mean / mcse is N(0, 1) over 400 independent scalars: its mean square has standard
# deviation sqrt(2 / 400) = 0.07, band 5 of these (the estimated mcse itself adds less than 0.01).
@pytest.mark.parametrize("mostly_idle", [False, True])
def test_standard_errors_are_calibrated(mostly_idle: bool) -> None:
    rng = np.random.default_rng(5)
    x = autoregression(rng, 0.6, 4, 500, 400)
    truth, active = 0.0, None
    if (
        mostly_idle
    ):  # activity that lingers and goes with the value: E[x | a] from its own definition
        v = autoregression(rng, 0.6, 4, 500, 400)
        active = v > 0.5  # independent of x, so that the active mean is 0
        assert 0.2 < active.mean() < 0.4
    table = describe(x, active)
    z = (table["mean"] - truth) / table["mcse"]
    assert abs((z**2).mean() - 1) < 0.35
    assert abs(z.mean()) < 5.5 / 20


def test_active_draws_only() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(4, 1000, 2))
    active = rng.random((4, 1000, 2)) < 0.3
    garbage = np.where(active, x, 1e6)
    garbage[0, 0] = np.where(
        active[0, 0], garbage[0, 0], np.nan
    )  # what idle draws hold is nobody's
    table = describe(garbage, active)
    for i in range(2):
        kept = x[..., i][active[..., i]]
        assert table["mean"][i] == pytest.approx(kept.mean())
        assert table["sd"][i] == pytest.approx(kept.std(ddof=1))
        for q in (0.05, 0.5, 0.95):
            assert table[f"{100 * q:g}%"][i] == pytest.approx(np.quantile(kept, q))
        # independent draws: as many as are active, up to the noise of the estimate (some 5 % here,
        # band 25 %)
        assert table["ess_bulk"][i] == pytest.approx(len(kept), rel=0.25)
        assert table["r_hat"][i] < 1.01
    np.testing.assert_array_equal(table["not_finite"], 0)
    np.testing.assert_allclose(table["active"], active.mean((0, 1)))


def test_mask_leads_the_axes_of_the_values() -> None:
    rng = np.random.default_rng(7)
    x, active = rng.normal(size=(2, 50, 3)), rng.random((2, 50)) < 0.5
    whole = np.broadcast_to(active[..., None], x.shape)
    np.testing.assert_array_equal(describe(x, active)["mean"], describe(x, whole)["mean"])
    np.testing.assert_array_equal(rhat(x, True), rhat(x))
    with pytest.raises(ValueError, match=r"\(2, 3\), which does not lead .* \(2, 50, 3\)"):
        describe(x, np.ones((2, 3), bool))


def test_chains_in_different_branches_have_not_mixed() -> None:
    x = np.random.default_rng(8).normal(size=(4, 100))
    active = np.zeros((4, 100), bool)
    active[:2] = True
    assert rhat(x, active) == np.inf
    never = describe(x, np.zeros((4, 100), bool))
    assert np.isnan(never["mean"])
    assert np.isnan(never["5%"])
    assert never["active"] == 0


def test_what_cannot_be_diagnosed_is_nan() -> None:
    x = np.random.default_rng(9).normal(size=(4, 100, 4))
    x[..., 0] = 3.0
    x[1, 2, 1] = np.nan
    x[0, 0, 2] = np.inf
    table = describe(x)
    for column in ("mcse", "ess_bulk", "ess_tail", "r_hat"):
        np.testing.assert_array_equal(np.isnan(table[column]), [True, True, True, False])
    np.testing.assert_array_equal(table["constant"], [1, 0, 0, 0])
    np.testing.assert_array_equal(table["not_finite"], [0, 1, 1, 0])
    assert table["mean"][0] == 3.0
    assert table["sd"][0] == 0.0
    assert np.isnan(table["50%"][1])
    assert np.isfinite(table["50%"][2])
    assert np.isnan(rhat(x[:, :3])).all()
    assert describe(x[:, :1])["mean"][3] == pytest.approx(x[:, 0, 3].mean())


def test_a_half_that_never_moves_has_infinite_rhat() -> None:
    x = np.repeat(np.arange(4.0)[:, None], 10, axis=1)
    assert rhat(x) == np.inf


def test_bfmi_is_its_definition_and_arviz_up_to_the_count() -> None:
    energy = np.random.default_rng(10).normal(size=(4, 1000)).cumsum(1)
    e = energy[0]
    assert bfmi(energy)[0] == pytest.approx(
        ((e[1:] - e[:-1]) ** 2).sum() / ((e - e.mean()) ** 2).sum()
    )
    if "InferenceData" in vars(arviz):
        np.testing.assert_allclose(bfmi(energy), arviz.bfmi(energy), rtol=0.01)
    assert np.isnan(bfmi(np.ones((1, 5)))).all()


def test_khat_equals_arviz() -> None:
    rng = np.random.default_rng(11)
    for k in (0.1, 0.5, 0.9):
        for n in (100, 5000):
            ratios = k * rng.exponential(size=n)
            if "psislw" in vars(arviz):
                assert khat(ratios) == pytest.approx(float(arviz.psislw(ratios)[1]), abs=1e-9)
            elif n == 5000:  # ArviZ 1.x takes the ratios negated, and another tail
                from arviz_stats.base import array_stats

                assert khat(ratios) == pytest.approx(
                    float(array_stats.psislw(-ratios)[1]), abs=0.05
                )


# Weights exp(k E), E exponential, have P(w > t) = t^(-1/k): above any threshold exactly generalised
# Pareto with shape k. With N = 20,000 the tail has M = 425 weights; the estimate is (M k + 5) / (M
# + 10) on average, its standard deviation about (1 + k) / sqrt(M), that of the mean of 30
# replicates 1 / 5.5 of the band.
@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
def test_khat_finds_the_shape_of_exact_tails(k: float) -> None:
    rng = np.random.default_rng(12)
    estimates = [khat(k * rng.exponential(size=20_000)) for _ in range(30)]
    expected = (425 * k + 5) / 435
    assert abs(np.mean(estimates) - expected) < 5.5 * (1 + k) / np.sqrt(425 * 30)


# N = 2000: M = 135. For k = 0.2 the estimate is normal with mean 0.22 and sd 0.096: it passes the
# threshold, 0.697, with probability 3e-7, in 200 replicates 6e-5. For k = 1.2 (mean 1.15, sd 0.18)
# it does with probability .995 each, so that fewer than 180 of 200 has probability below 1e-15.
def test_khat_alarms_are_rarely_false_and_rarely_missing() -> None:
    rng = np.random.default_rng(13)
    limit = khat_threshold(2000)
    assert not any(khat(0.2 * rng.exponential(size=2000)) > limit for _ in range(200))
    assert sum(khat(1.2 * rng.exponential(size=2000)) > limit for _ in range(200)) >= 180


def test_khat_of_weights_without_a_tail() -> None:
    assert np.isnan(khat(np.zeros(20)))
    assert khat(np.zeros(1000)) == -np.inf
    assert np.isnan(khat(np.array([np.nan] + 100 * [0.0])))
    assert np.isnan(khat(np.full(100, -np.inf)))
    carried = np.full(1000, -1e4)
    carried[:3] = [0.0, -1.0, -2.0]
    assert khat(carried) == np.inf
    rng = np.random.default_rng(14)
    ratios = rng.normal(size=500)
    assert khat(ratios + 1e4) == pytest.approx(khat(ratios))  # a constant cancels


def test_generalized_pareto_of_many_draws() -> None:
    u = np.random.default_rng(15).random(100_000)
    for k in (-0.3, 0.4):
        shape, scale = generalized_pareto(2.0 * (u**-k - 1) / k)
        assert shape == pytest.approx(k, abs=5.5 * (1 + k) / np.sqrt(1e5) + 1e-3)
        assert scale == pytest.approx(2.0, rel=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_statistics_are_those_of_repeated_values(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, counts = rng.integers(0, 6, size=(11, 2)).astype(float), rng.integers(0, 5, size=11)
    x[counts == 0] = np.nan  # values of weight zero do not matter
    quantiles = (0.05, 0.25, 0.5, 0.95, 1.0)
    table = weighted_describe(x, counts / 7, quantiles=quantiles)
    for i in range(2):
        values = np.sort(np.repeat(x[:, i], counts))
        assert table["mean"][i] == pytest.approx(values.mean())
        assert table["sd"][i] == pytest.approx(values.std())
        for q in quantiles:
            rank = int(np.ceil(q * len(values) - 1e-9))
            assert table[f"{100 * q:g}%"][i] == values[rank - 1]


# z = error / mcse of the self-normalised mean, over 400 replicates: as above, band 5 x 0.07; the
# finite sample adds 0.01.
def test_weighted_standard_errors_are_calibrated() -> None:
    rng = np.random.default_rng(16)
    z = []
    for _ in range(400):
        x = rng.normal(size=500)
        w = np.exp(0.8 * x)  # towards N(0.8, 1)
        table = weighted_describe(x, w)
        z.append((float(table["mean"]) - 0.8) / float(table["mcse"]))
    assert abs(np.square(z).mean() - 1) < 0.4


def test_weighted_statistics_of_active_values() -> None:
    x, w = np.array([1.0, 2.0, 30.0]), np.array([1.0, 3.0, 4.0])
    table = weighted_describe(x, w, active=np.array([True, True, False]))
    assert table["mean"] == pytest.approx(1.75)
    assert table["active"] == pytest.approx(0.5)
    assert np.isnan(weighted_describe(x, w, active=np.zeros(3, bool))["mean"])


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"'bulk', 'tail', 'mean', not 'middle'"):
        ess(np.zeros((2, 10)), kind="middle")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"leads with \(chain, draw\), not one of shape \(10,\)"):
        rhat(np.zeros(10))
