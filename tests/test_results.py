"""Draws and particles: tables, verdicts, resampling, printing, files; and that they are pytrees like any other."""

import inspect
import json
import os
import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import Draws, Fit, Particles, load
from weft.inference.results import storage
from weft.inference.results.storage import StorageError
from weft.inference.results.summary import Summary
from weft.ppl import deterministic, gen, noncentered, observed, sample
from weft.ppl.stage.errors import AddressError, WeftError

RNG = np.random.default_rng(0)
GOOD = {"mu": RNG.normal(size=(4, 500)), "theta": RNG.normal(2.0, 3.0, size=(4, 500, 2, 2))}
STATS = {
    "lp": RNG.normal(size=(4, 500)),
    "diverging": np.zeros((4, 500), bool),
    "tree_depth": np.full((4, 500), 3),
    "energy": RNG.normal(size=(4, 500)),
}


@gen
def schools(sigma):
    mu = sample("mu", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfNormal(5.0))
    deterministic("ratio", mu / tau)

    def school(s):
        theta = sample("theta", dist.Normal(mu, tau))
        return sample("y", dist.Normal(theta, s))

    return jax.vmap(school, axis_name="school")(sigma)


TARGET = schools(jnp.array([1.0, 2.0, 3.0])).given({"y": [1.0, 0.0, -1.0]})


def of_schools(seed: int = 1, chains: int = 2, draws: int = 200) -> Draws:
    """Prior draws of the schools, in the shape of a sampler's result."""
    rng = np.random.default_rng(seed)
    mu, tau = 5 * rng.normal(size=(chains, draws)), 5 * abs(rng.normal(size=(chains, draws)))
    theta = mu[..., None] + tau[..., None] * rng.normal(size=(chains, draws, 3))
    single = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    choices = single({"mu": mu, "tau": tau, "theta": theta})
    stats = {
        "lp": single(rng.normal(size=(chains, draws))),
        "diverging": jnp.zeros((chains, draws), bool),
    }
    return Draws(choices, single({"ratio": mu / tau}), stats=stats, target=TARGET)


# ------------------------------------------------------------------------------------------- tables


def test_summary_has_a_row_a_scalar_and_gives_sites_in_their_shape() -> None:
    nested = {"mu": GOOD["mu"], "group": {"theta": GOOD["theta"]}}
    summary = Draws(choices=nested, derived={"twice": 2 * GOOD["mu"]}, stats=STATS).summary()
    thetas = [f"group.theta[{i},{j}]" for i in range(2) for j in range(2)]
    assert summary.rows == ("mu", *thetas, "twice")
    assert len(summary) == 6
    assert "group.theta[1,0]" in summary
    row = summary["group.theta[1,0]"]
    values = GOOD["theta"][..., 1, 0]
    assert row["mean"] == pytest.approx(values.mean())
    assert row["sd"] == pytest.approx(values.std(ddof=1))
    assert row["5%"] == pytest.approx(np.quantile(values, 0.05))
    assert summary["group.theta"]["mean"].shape == (2, 2)
    assert summary["twice"]["mean"] == pytest.approx(2 * summary["mu"]["mean"])
    np.testing.assert_allclose(summary.column("r_hat"), [summary[r]["r_hat"] for r in summary.rows])
    assert summary.to_dict()["mu"] == summary["mu"]
    assert summary.to_dataframe().loc["mu", "mean"] == summary["mu"]["mean"]
    with pytest.raises(AddressError, match=r"'group.thet'.* did you mean 'group.theta'"):
        summary["group.thet"]
    with pytest.raises(AddressError, match="did you mean 'r_hat'"):
        summary.column("rhat")


def test_draws_are_found_by_address() -> None:
    draws = Draws(choices={"a": {"b": GOOD["mu"]}}, derived={"c": GOOD["theta"]}, stats=STATS)
    assert draws["a.b"] is GOOD["mu"]
    assert draws["c"] is GOOD["theta"]
    assert (draws.num_chains, draws.num_draws) == (4, 500)
    with pytest.raises(AddressError, match=r"'a.d' in this result"):
        draws["a.d"]


def test_integers_booleans_and_things_without_a_mean() -> None:
    keys = jax.random.split(jax.random.key(0), (4, 500))
    choices = {"n": RNG.poisson(3.0, (4, 500)), "b": RNG.random((4, 500)) < 0.25, "key": keys}
    summary = Draws(choices=choices, derived={"z": GOOD["mu"] * 1j}, stats=STATS).summary()
    assert summary.rows == ("n", "b")
    assert summary["b"]["mean"] == pytest.approx(0.25, abs=0.06)  # 5.5 standard errors
    assert "Without a row, since they are not real numbers: key, z." in summary.verdict


def test_printing_fits_a_screen() -> None:
    wide = {f"x{i}": RNG.normal(size=(2, 10)) for i in range(50)}
    wide["big"] = RNG.normal(size=(2, 10, 500))
    for draws in (Draws(choices=wide), Draws(choices={"big": wide["big"], "mu": wide["x0"]})):
        for text in (repr(draws), draws._repr_html_().replace("<tr>", "\n")):
            assert text.count("\n") < 45
        assert "array(" not in repr(draws)
        everything = repr(draws.summary(all=True))
        assert "big[499]" in everything
        assert "..." not in everything
    assert "... 478 more of big" in repr(draws)
    assert "... 478 more of big" in draws._repr_html_()
    assert all(len(line) <= 100 for line in repr(draws).splitlines())


def test_large_results_print_without_a_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.inference.results.result.PRINTED", 100)
    text = repr(Draws(choices=GOOD, stats=STATS))
    assert "theta: float" in text
    assert "call .summary()" in text


def test_html_escapes_addresses() -> None:
    assert "&lt;script&gt;" in Draws(choices={"<script>": GOOD["mu"]})._repr_html_()


def test_title_names_the_model() -> None:
    assert repr(of_schools()).startswith("Draws of schools: 2 chains of 200 draws\n")


# ---------------------------------------------------------------------------------------- verdicts


def _with(**changes: Any) -> Draws:
    return Draws(
        choices={**GOOD, **changes.pop("choices", {})},
        stats={**STATS, **changes.pop("stats", {})},
        **changes,
    )


def _flags(count: int, of: tuple[int, int] = (4, 500)) -> np.ndarray:
    flags = np.zeros(of, bool)
    flags.flat[:count] = True
    return flags


def _chains_apart() -> np.ndarray:
    return RNG.normal(size=(4, 500)) + np.array([0.0, 0, 0, 9])[:, None]


def _stuck() -> Draws:
    return Draws(
        choices={k: np.concatenate([v[:3], v[3:, :1].repeat(500, 1)]) for k, v in GOOD.items()}
    )


def _bad_theta() -> Draws:
    draws = of_schools()
    return Draws(
        choices={
            **draws.choices,
            "theta": draws.choices["theta"] * jnp.arange(1, 3)[:, None, None] * 9,
        },
        stats={**draws.stats, "diverging": _flags(10, (2, 200))},
        target=TARGET,
    )


CASES = {
    "agreement": (
        lambda: _with(),
        True,
        ["All R-hat below 1.01 and every ESS above 400: the chains agree."],
    ),
    "disagreement": (
        lambda: _with(choices={"mu": _chains_apart()}),
        False,
        ["R-hat is above 1.01 for 1 of 5 scalars (worst: mu, ", "longer warm-up", "several modes"],
    ),
    "too short": (
        lambda: _with(choices={"mu": GOOD["mu"][:, ::10].repeat(10, 1)}),
        False,
        ["effective sample size is below 400 for 1 of 5 scalars (least: mu, ", "num_samples="],
    ),
    "divergences": (
        lambda: _with(stats={"diverging": _flags(12)}),
        False,
        ["12 of 2000 draws diverged (0.6 %)", "target_acceptance=0.95."],
    ),
    "a site to take non-centred": (
        _bad_theta,
        False,
        ['target_acceptance=0.95, and noncentered(model, "theta") if the scale of theta is itself'],
    ),
    "deep trees": (
        lambda: _with(stats={"reached_max_treedepth": _flags(1000)}),
        False,
        ["50 % of the draws stopped at the largest tree depth", "dense_mass=True"],
    ),
    "deep trees by number": (lambda: _with(stats={"tree_depth": np.full((4, 500), 10)}), False, ["100 %"]),
    "energy": (
        lambda: _with(stats={"energy": RNG.normal(size=(4, 500)).cumsum(1)}),
        False,
        ["E-BFMI is 0.", "in chains 0, 1, 2, 3 (below 0.3)"],
    ),
    "a stuck chain": (_stuck, False, ["Chain 3 never moved", "run(..., init=choices)"]),
    "constants": (
        lambda: _with(derived={"L": np.zeros((4, 500, 5))}),
        True,
        ["the chains agree. Constant, and left out of the verdict: L[0], L[1], L[2], L[3] and 1 more."],
    ),
    "only constants": (lambda: Draws(choices={"n": np.ones((4, 500), int)}), True, ["No value varies"]),
    "not finite": (
        lambda: _with(derived={"r": np.where(_flags(3), np.inf, GOOD["mu"])}),
        False,
        ["NaN or infinite values in r (3)"],
    ),
    "one chain": (
        lambda: Draws(choices={"mu": GOOD["mu"].reshape(1, 2000)}),
        True,
        ["R-hat of the chain's halves below 1.01", "run num_chains=4"],
    ),
    "one draw": (
        lambda: Draws(choices={"mu": GOOD["mu"][:, :1]}),
        False,
        ["Only 1 draw a chain: R-hat and effective sample sizes need 4"],
    ),
    "idle": (
        lambda: _with(active={"mu": _flags(1500)}),
        False,  # chain 3 never takes the branch
        ["Idle draws, of branches not taken, are left out: mu in 25 %.", "(worst: mu, infinite)"],
    ),
    "nothing": (lambda: Draws(choices={}, stats=STATS), True, ["There is nothing to summarise"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_verdict_of_draws(name: str) -> None:
    make, healthy, phrases = CASES[name]
    summary = make().summary()
    for phrase in phrases:
        assert phrase in summary.verdict
    assert summary.healthy == healthy, summary.verdict
    assert all(word in repr(summary) for word in phrases[0].split())
    assert all(line.count("noncentered") <= 1 for line in [summary.verdict])


def test_sites_that_are_non_centred_already_are_not_proposed() -> None:
    program = noncentered(schools, "theta")(jnp.ones(3))
    target = program.given({"y": jnp.ones(3)})
    assert target.latents == ("mu", "tau", "theta_base")
    x = RNG.normal(size=(2, 50, 3))
    choices = {"mu": x[..., 0], "tau": x[..., 1], "theta_base": x}
    stats = {"diverging": _flags(9, (2, 50))}
    draws = Draws(choices, {"theta": 2 * x}, stats=stats, target=target)
    assert "target_acceptance=0.95." in draws.summary().verdict


def test_idle_draws_are_left_out() -> None:
    active = RNG.random((4, 500)) < 0.5
    mu = np.where(active, GOOD["mu"], 1e9)
    summary = _with(choices={"mu": mu}, active={"mu": active, "theta": True}).summary()
    assert summary["mu"]["mean"] == pytest.approx(GOOD["mu"][active].mean())
    assert summary["mu"]["active"] == pytest.approx(active.mean())
    assert summary["theta"]["active"].tolist() == [[1, 1], [1, 1]]
    assert "active" not in _with().summary().columns


# ------------------------------------------------------------------------------------------ pytrees


def test_results_pass_through_jit_and_vmap() -> None:
    draws = of_schools()

    @jax.jit
    def shifted(draws: Draws) -> Draws:
        assert "mu: float32[2, 200]" in repr(draws)  # printing under jit shows shapes
        with pytest.raises(WeftError, match="outside jit, vmap and grad"):
            draws.summary()
        return Draws(
            choices={"mu": draws.choices["mu"] + 1}, stats=draws.stats, target=draws.target
        )

    again = shifted(draws)
    assert isinstance(again, Draws)
    np.testing.assert_allclose(again["mu"], draws["mu"] + 1)
    assert again.target.latents == TARGET.latents

    many = jax.vmap(lambda x: Draws(choices={"mu": draws["mu"] + x}, stats=draws.stats))(
        jnp.arange(3.0)
    )
    with pytest.raises(WeftError, match=r"\(3, 2, 200\).*jax.tree.map\(lambda x: x\[i\], draws\)"):
        many.summary()
    assert "jax.tree.map" in repr(many)
    assert jax.tree.map(lambda x: x[1], many).summary().rows == ("mu",)

    particles = jax.vmap(lambda x: Particles({"x": x + jnp.arange(5.0)}, log_weights=jnp.zeros(5)))
    assert particles(jnp.arange(2.0)).ess().round(3).tolist() == [5.0, 5.0]
    with pytest.raises(WeftError, match=r"\(2, 5\) instead of \(particle,\)"):
        particles(jnp.arange(2.0)).summary()


def test_shapes_that_do_not_lead_with_chain_and_draw() -> None:
    with pytest.raises(WeftError, match=r"'mu' has shape \(4, 3\).*\(chain, draw\) = \(4, 500\)"):
        Draws(choices={"mu": np.zeros((4, 3))}, stats=STATS).summary()
    none = Draws(choices={"mu": np.zeros((4, 0))})
    with pytest.raises(WeftError, match=r"there are no draws, \(chain, draw\) = \(4, 0\)"):
        none.summary()
    assert "there are no draws" in repr(none)
    with pytest.raises(WeftError, match=r"'x' has shape \(3,\).*\(particle,\) = \(5,\)"):
        Particles({"x": np.zeros(3)}, log_weights=np.zeros(5)).summary()


# ---------------------------------------------------------------------------------------- particles


def weighted(n: int = 2000, tilt: float = 0.3, **more: Any) -> Particles:
    x = np.random.default_rng(1).normal(size=n).astype(np.float32)
    lw = jnp.asarray(tilt * x)
    evidence = jax.nn.logsumexp(lw) - jnp.log(n)
    return Particles({"x": jnp.asarray(x)}, log_weights=lw, log_evidence=evidence, **more)


def test_particles_weigh() -> None:
    particles = weighted()
    w = np.exp(np.asarray(particles.log_weights, float))
    x = np.asarray(particles["x"], float)
    np.testing.assert_allclose(particles.weights, w / w.sum(), rtol=1e-5)
    assert float(particles.ess()) == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-4)
    assert jax.jit(lambda p: p.ess())(particles) == pytest.approx(float(particles.ess()))
    summary = particles.summary()
    assert summary["x"]["mean"] == pytest.approx((w * x).sum() / w.sum())
    assert summary.columns == ("mean", "sd", "5%", "50%", "95%", "mcse")
    assert repr(particles).startswith("Particles: 2000 particles, log evidence 0.0")
    shifted = Particles({"x": x}, log_weights=particles.log_weights - 1e3)
    assert float(shifted.ess()) == pytest.approx(float(particles.ess()), rel=1e-3)


PARTICLES = {
    "good": (lambda: weighted(), True, ["k-hat 0.", "below 0.70", "the weights can be trusted"]),
    "heavy tail": (lambda: weighted(tilt=4.0), False, ["is above 0.70", "heavier tails", "nuts"]),
    "few in effect": (lambda: weighted(60, 0.1), False, ["independent draws: take num_particles="]),
    "too few": (lambda: weighted(12), False, ["too few for k-hat"]),
    "equal": (lambda: weighted(tilt=0.0), True, ["The largest weights are equal"]),
    "exact": (lambda: weighted(6, exact=True), True, ["Exact: all 6 values enumerated"]),
    "all zero": (
        lambda: Particles({"x": jnp.ones(9)}, log_weights=jnp.full(9, -jnp.inf)),
        False,
        ["All 9 particles have weight zero"],
    ),
    "NaN": (
        lambda: Particles({"x": jnp.ones(9)}, log_weights=jnp.full(9, jnp.nan)),
        False,
        ["9 of 9 log weights are NaN"],
    ),
    "infinite": (
        lambda: Particles({"x": jnp.ones(2)}, log_weights=jnp.array([0.0, jnp.inf])),
        False,
        ["A log weight is infinite"],
    ),
    "idle": (
        lambda: weighted(active={"x": np.arange(2000) % 2 == 0}),
        True,
        ["Idle draws, of branches not taken, are left out: x in"],
    ),
}


@pytest.mark.parametrize("name", PARTICLES)
def test_verdict_of_particles(name: str) -> None:
    make, healthy, phrases = PARTICLES[name]
    summary = make().summary()
    for phrase in phrases:
        assert phrase in summary.verdict
    assert summary.healthy == healthy, summary.verdict
    assert isinstance(repr(make()), str)
    assert isinstance(make()._repr_html_(), str)


def test_resampling_takes_each_particle_as_often_as_its_weight_says() -> None:
    weights = jnp.array([0.5, 0.0, 3.25, 1.25, 0.0])
    choices = {"i": jnp.arange(5), "v": jnp.arange(10.0).reshape(5, 2)}
    particles = Particles(choices, log_weights=jnp.log(weights), active={"i": True})
    resample = jax.vmap(lambda k: jnp.bincount(particles.resample(k).choices["i"], length=5))
    counts = np.asarray(resample(jax.random.split(jax.random.key(0), 300)))
    assert set(counts[:, 1]) == {0}
    assert set(counts[:, 4]) == {0}
    assert (np.abs(counts - np.asarray(weights)) < 1).all()  # systematic: rounded up or down
    # Rounding up has probability the fraction: the mean count has sd at most 0.5 / sqrt(300) = 0.029, band 5.5 of these
    assert (np.abs(counts.mean(0) - np.asarray(weights)) < 0.16).all()
    equal = particles.resample(jax.random.key(0), 7)
    assert equal.num_particles == 7
    np.testing.assert_allclose(equal["v"][:, 0], 2.0 * equal["i"])
    np.testing.assert_allclose(equal.log_weights, jnp.log(1.0), atol=1e-6)  # the mean weight
    assert float(equal.ess()) == pytest.approx(7)
    order = particles.resample(jax.random.key(3), 100)["i"]
    assert (np.diff(order) < 0).any()  # shuffled
    with pytest.raises(WeftError, match="no particle can be drawn"):
        Particles({"x": jnp.ones(3)}, log_weights=jnp.full(3, -jnp.inf)).resample(jax.random.key(0))


# -------------------------------------------------------------------------------------------- files


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit, dtypes and structure too."""
    flat_a, tree_a = jax.tree.flatten(a)
    flat_b, tree_b = jax.tree.flatten(b)
    assert tree_a == tree_b
    for x, y in zip(flat_a, flat_b, strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_draws_round_trip(tmp_path: pathlib.Path) -> None:
    draws = of_schools()
    choices = {
        **draws.choices,
        "a": {"b/c": jnp.arange(400).reshape(2, 200), "half": draws["mu"].astype(jnp.bfloat16)},
    }
    draws = Draws(
        choices=choices,
        derived={"nan": jnp.full((2, 200), jnp.nan), "empty": jnp.zeros((2, 200, 0))},
        active={"a": {"b/c": jnp.arange(400).reshape(2, 200) > 7}, "mu": jnp.array(True)},
        stats=draws.stats,
        target=TARGET,
        warmup={"step_size": jnp.array([0.1, 0.2]), "key": jax.random.key(3)},
    )
    path = tmp_path / "draws.npz"
    draws.save(path)
    without = load(path)
    assert repr(without) == repr(draws)
    assert without.target.observed["y"].tolist() == [1.0, 0.0, -1.0]
    assert without.target.sites["theta"].axes == TARGET.sites["theta"].axes
    with pytest.raises(AttributeError, match=r"no 'log_density': load\(path, target=...\)"):
        without.target.log_density({})
    again = load(str(path), target=TARGET)
    assert again.target is TARGET
    for name in ("choices", "derived", "active", "stats", "warmup"):
        assert_same(getattr(draws, name), getattr(again, name))
    without.save(path)  # a file of a file
    assert load(path).target.sites == without.target.sites
    assert np.load(path)["choices/mu.npy".removesuffix(".npy")].shape == (2, 200)
    assert os.listdir(tmp_path) == ["draws.npz"]


def test_double_precision_round_trips(tmp_path: pathlib.Path, x64: None) -> None:
    draws = Draws(
        {"mu": jnp.linspace(0.0, 1.0, 10).reshape(2, 5), "n": jnp.arange(10).reshape(2, 5)}
    )
    assert draws["mu"].dtype == jnp.float64
    draws.save(tmp_path / "d")
    assert_same(load(tmp_path / "d").choices, draws.choices)
    with jax.enable_x64(False):
        single = load(tmp_path / "d")
        assert single["mu"].dtype == np.float64  # a NumPy array: nothing is rounded
        assert single["n"].dtype == np.int64
        np.testing.assert_array_equal(single["mu"], np.asarray(draws["mu"]))


def test_particles_round_trip(tmp_path: pathlib.Path) -> None:
    for particles in (weighted(), weighted(5, exact=True), Particles({}, log_weights=jnp.zeros(3))):
        particles.save(tmp_path / "p.npz")
        again = load(tmp_path / "p.npz")
        assert_same(again, particles)
        assert again.exact == particles.exact


def test_fits_round_trip(tmp_path: pathlib.Path) -> None:
    layer = jax.tree_util.Partial(
        jnp.tanh, jnp.arange(3.0)
    )  # any pytree that is no plain container
    for params, like in (
        ({"loc": jnp.ones(2), "net": [layer]}, True),
        ((jnp.ones(2), None), False),
    ):
        fit = Fit(params=params, bounds=jnp.arange(4.0), state=(), num_skipped=jnp.int32(1))
        fit.save(tmp_path / "fit.npz")
        template = jax.tree.map(jnp.zeros_like, params)
        again = load(tmp_path / "fit.npz", like=template if like else None)
        assert_same(again.params, params)
        assert_same(again.bounds, fit.bounds)
        if like:
            with pytest.raises(StorageError, match=r"'params.net.0' is a Partial.*pass `like`"):
                load(tmp_path / "fit.npz")
            wrong = {"loc": jnp.ones(2), "net": [jax.tree_util.Partial(jnp.tanh, jnp.ones(4))]}
            with pytest.raises(
                StorageError, match=r"shape \(3,\) in the file and \(4,\) in `like`"
            ):
                load(tmp_path / "fit.npz", like=wrong)


def test_partly_observed_data_are_marked_in_the_file(tmp_path: pathlib.Path) -> None:
    y = jnp.array([1.0, jnp.nan, 0.0])
    where = ~jnp.isnan(y)
    target = schools(jnp.ones(3)).given({"y": observed(y, where=where, missing="drop")})
    Draws(of_schools().choices, target=target).save(tmp_path / "d")
    np.testing.assert_array_equal(load(tmp_path / "d").target.observed["y"], y)


def test_a_file_of_another_target_is_refused(tmp_path: pathlib.Path) -> None:
    of_schools().save(tmp_path / "d")
    larger = schools(jnp.ones(4)).given({"y": jnp.ones(4)})
    with pytest.raises(WeftError, match=r"theta: \(3,\) in the file, \(4,\) in the target"):
        load(tmp_path / "d", target=larger)


def test_files_that_are_none_of_ours(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file.npz"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(path)
    with pytest.raises(StorageError, match="is a folder"):
        load(tmp_path)
    path.write_text("hello")
    with pytest.raises(StorageError, match="not a Weft file, or is cut short"):
        load(path)
    np.savez(path, x=np.ones(3))
    with pytest.raises(StorageError, match=r"not a Weft file: it is an archive without weft.json"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "weft.json", json.dumps({"format": 99, "kind": "draws", "meta": {}, "tree": {}})
        )
    with pytest.raises(
        StorageError, match="format 99, written by a later Weft; this one reads up to format 1"
    ):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "weft.json", json.dumps({"format": 1, "kind": "?", "meta": {}, "tree": {"dict": []}})
        )
    with pytest.raises(StorageError, match="unknown kind"):
        load(path)
    of_schools().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="cut short"):
        load(path)
    broken = bytearray(whole)
    at = whole.index(b"NUMPY") + 200
    broken[at : at + 4] = b"\0\1\2\3"
    path.write_bytes(bytes(broken))
    with pytest.raises(StorageError, match="damaged"):
        load(path)


def test_saving_is_all_or_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.npz"
    of_schools(1).save(path)
    old = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array", full)
        with pytest.raises(OSError, match="no space left"):
            of_schools(2).save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["d.npz"]
    of_schools(2).save(path)
    assert path.read_bytes() != old


def test_what_cannot_be_saved(tmp_path: pathlib.Path) -> None:
    draws = of_schools()
    with pytest.raises(StorageError, match="it is a folder; give a file name in it"):
        draws.save(tmp_path)
    with pytest.raises(StorageError, match="there is no folder"):
        draws.save(tmp_path / "nowhere" / "d")
    with pytest.raises(StorageError, match=r"'choices.x': an array of Python objects"):
        Draws(choices={"x": np.array([object()])}).save(tmp_path / "d")
    with pytest.raises(StorageError, match="under jit or vmap"):
        jax.jit(lambda d: d.save(tmp_path / "d"))(Draws(choices={"x": jnp.ones((2, 2))}))
    with pytest.raises(StorageError, match="the key 3 of a dict is not a string"):
        storage.write(tmp_path / "d", "fit", {"params": {3: jnp.ones(2)}})
    assert os.listdir(tmp_path) == []


@pytest.fixture
def own_types(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """The registry of result types; what a test adds is gone afterwards."""
    types = dict(storage._types)
    monkeypatch.setattr(storage, "_types", types)
    return types


class Mean:
    """A result of a user's own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def save(self, path: pathlib.Path) -> None:
        storage.write(path, "mean", {"value": self.value})

    @classmethod
    def from_saved(cls, saved: storage.Saved, target: Any = None) -> "Mean":
        return cls(**saved.tree)


def test_a_type_of_a_user_registers(own_types: dict[str, type], tmp_path: pathlib.Path) -> None:
    assert storage.result_type("mean")(Mean) is Mean
    Mean(3.0).save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert type(again) is Mean
    assert again.value == 3.0
    del own_types["mean"]  # as in another process, which has not imported what defines it
    with pytest.raises(
        StorageError, match=rf"unknown kind 'mean': .*{__name__}.Mean, so import {__name__} first"
    ):
        load(tmp_path / "m")


def test_registrations_that_make_no_sense(
    own_types: dict[str, type], tmp_path: pathlib.Path
) -> None:
    with pytest.raises(StorageError, match="results.draws.Draws has this name already"):
        storage.result_type("draws")(Mean)
    assert storage.result_type("draws")(Draws) is Draws  # once more is no other
    misspelt = type("Misspelt", (), {"save": Mean.save, "from_save": Mean.from_saved})
    with pytest.raises(StorageError, match="no method 'from_saved' .but 'from_save'."):
        storage.result_type("misspelt")(misspelt)
    with pytest.raises(StorageError, match="takes the name of the class in files"):
        storage.result_type(Mean)  # without a name
    with pytest.raises(StorageError, match="no result is called 'drawn' .but 'draws'."):
        storage.write(tmp_path / "d", "drawn", {})

    class Other(Particles):
        """Not registered, unlike the class it is of."""

    with pytest.raises(StorageError, match="Other is not registered"):
        Other({}, log_weights=jnp.zeros(3)).save(tmp_path / "d")
    assert os.listdir(tmp_path) == []


def test_summary_is_exported_for_annotations() -> None:
    assert isinstance(of_schools().summary(), Summary)


def test_arguments_come_in_this_order() -> None:
    fields = ["choices", "derived", "active", "stats", "target", "warmup"]
    assert list(inspect.signature(Draws).parameters) == fields
    fields = ["choices", "derived", "active", "log_evidence", "target", "log_evidence_variance"]
    assert list(inspect.signature(Particles).parameters) == [*fields, "exact", "log_weights"]
