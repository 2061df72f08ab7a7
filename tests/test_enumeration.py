"""Enumeration against sums by hand."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.inference import enumeration
from weft.ppl.stage.errors import DensityError, WeftError

from weft import gen, observed, repeat, sample

KEY = jax.random.key(0)


@gen
def model(p: Any) -> None:
    """A Bernoulli, three shifted uniform faces under vmap, and a normal observation."""
    z = sample("z", dist.Bernoulli(p))
    face = repeat(lambda: sample("face", dist.DiscreteUniform(2, 3)), 3)
    sample("y", dist.Normal(z + 0.5 * face.sum(), 1.0))


def by_hand(p: float, y: float) -> dict[tuple[int, ...], float]:
    found = {}
    for z, *faces in itertools.product((0, 1), (2, 3), (2, 3), (2, 3)):
        prior = np.log(p if z else 1 - p) + 3 * np.log(0.5)
        found[z, *faces] = prior + float(dist.Normal(z + 0.5 * sum(faces), 1.0).log_prob(y))
    return found


@pytest.mark.parametrize("batch_size", [4096, 5])
def test_every_value_and_the_evidence(batch_size: int) -> None:
    exact = by_hand(0.3, 4.0)
    found = enumeration(batch_size=batch_size).run(
        KEY, model(0.3).given({"y": 4.0}), progress=False
    )
    values = np.column_stack([found.choices["z"], found.choices["face"]])
    assert [tuple(v) for v in values.tolist()] == list(exact)
    np.testing.assert_allclose(found.log_weights, list(exact.values()), rtol=1e-5)
    np.testing.assert_allclose(
        found.log_evidence, np.logaddexp.reduce(list(exact.values())), rtol=1e-6
    )
    assert found.exact


def test_under_jit_and_vmap_over_data() -> None:
    ys = jnp.array([3.0, 4.0, 5.0])
    run = jax.jit(
        jax.vmap(lambda y: enumeration().run(KEY, model(0.3).given({"y": y})).log_evidence)
    )
    exact = [np.logaddexp.reduce(list(by_hand(0.3, float(y)).values())) for y in ys]
    np.testing.assert_allclose(run(ys), exact, rtol=1e-6)


def test_the_evidence_has_a_gradient() -> None:
    """It is a plain function of the parameters: jax.grad is Fisher's identity."""

    def evidence(p: Any) -> Any:
        return enumeration().run(KEY, model(p).given({"y": 4.0})).log_evidence

    step = 1e-3
    ends = [np.logaddexp.reduce(list(by_hand(0.3 + s, 4.0).values())) for s in (-step, step)]
    np.testing.assert_allclose(jax.grad(evidence)(0.3), (ends[1] - ends[0]) / (2 * step), rtol=1e-3)


@gen
def branching() -> None:
    up = sample("up", dist.Bernoulli(0.3))
    loc = jax.lax.cond(
        up == 1,
        lambda: 1.0 * sample("a", dist.Categorical(jnp.array([0.2, 0.3, 0.5]))),
        lambda: jnp.float32(-1.0),
    )
    sample("y", dist.Normal(loc, 1.0))


def test_idle_choices_count_once() -> None:
    log = lambda loc: float(dist.Normal(loc, 1.0).log_prob(0.5))  # noqa: E731
    terms = [np.log(0.7) + log(-1.0)] + [
        np.log(0.3 * p) + log(a) for a, p in enumerate((0.2, 0.3, 0.5))
    ]
    found = enumeration().run(KEY, branching().given({"y": 0.5}), progress=False)
    assert found.log_weights.shape == (6,)
    np.testing.assert_allclose(found.log_evidence, np.logaddexp.reduce(terms), rtol=1e-6)
    up = float(found.weights @ found.choices["up"])
    np.testing.assert_allclose(up, 1 - np.exp(terms[0] - np.logaddexp.reduce(terms)), rtol=1e-5)
    assert np.array_equal(found.active["a"], found.choices["up"] == 1)


def test_only_the_missing_elements_are_enumerated() -> None:
    @gen
    def faces() -> None:
        p = sample("bias", dist.Bernoulli(0.5))
        sample(
            "face",
            dist.Categorical(
                probs=jnp.where(p == 1, jnp.array([0.8, 0.1, 0.1]), jnp.ones(3) / 3)
            ).expand([4]),
        )

    face = jnp.array([0, 2, 0, 0])
    where = jnp.array([True, False, True, False])
    exact = np.log(0.5 * 0.8**2 + 0.5 / 9)

    def evidence(where: Any) -> Any:
        target = faces().given({"face": observed(face, where=where)})
        return enumeration().run(KEY, target, progress=False)

    found = evidence(where)
    assert found.log_weights.shape == (2 * 3**2,)
    assert (np.asarray(found.choices["face"])[:, [0, 2]] == 0).all()
    np.testing.assert_allclose(found.log_evidence, exact, rtol=1e-6)
    # Which elements are missing may be traced: then all are enumerated, and count as often as they
    # must.
    traced = jax.jit(lambda where: evidence(where).log_evidence)(where)
    np.testing.assert_allclose(traced, exact, rtol=1e-6)


def test_nothing_latent_gives_the_density() -> None:
    @gen
    def plain() -> None:
        sample("y", dist.Normal(0.0, 1.0))

    found = enumeration().run(KEY, plain().given({"y": 1.0}), progress=False)
    np.testing.assert_allclose(found.log_evidence, dist.Normal(0.0, 1.0).log_prob(1.0))


def test_supports_without_end_are_named() -> None:
    @gen
    def endless() -> None:
        sample("k", dist.Poisson(1.0))
        sample("x", dist.Normal(0.0, 1.0))
        sample("z", dist.Bernoulli(0.5))

    with pytest.raises(
        DensityError, match=r"'k' \(Poisson, not finite.*'x' \(Normal, continuous\)"
    ) as e:
        enumeration().run(KEY, endless().given())
    assert "'z'" not in str(e.value)


def test_too_many_terms_are_counted() -> None:
    with pytest.raises(WeftError, match=r"16 terms \('z' 2, 'face' 2\^3\).*max_terms=10"):
        enumeration(max_terms=10).run(KEY, model(0.3).given({"y": 0.0}))
    with pytest.raises(WeftError, match="max_terms"):
        enumeration(max_terms=0)


def test_double_precision(x64: None) -> None:
    found = enumeration().run(jax.random.key(0), model(0.3).given({"y": 4.0}), progress=False)
    exact = np.logaddexp.reduce(list(by_hand(0.3, 4.0).values()))
    np.testing.assert_allclose(found.log_evidence, exact, rtol=1e-12)
