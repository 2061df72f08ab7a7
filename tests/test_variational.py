"""variational: what it runs is `fit`, on any target, with ready-made guides, under transformations.

Bands are |z| < 5 of the estimator's own standard error, fixed keys (false alarm 6e-7 each).
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
    iwelbo,
    jittered,
    mean_field,
    plateau,
    variational,
)
from weft.ppl.stage.errors import WeftError

from counting import counting
from weft import gen, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane

KEY = jax.random.key(0)


@gen
def model() -> None:
    mu = sample("mu", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(mu, 1.0))


@gen
def guide(params: Any) -> None:
    sample("mu", dist.Normal(params["loc"], params["scale"]))


def start() -> dict[str, Any]:
    return {"loc": 0.0, "scale": constrained(1.0, constraints.positive)}


def test_it_is_fit_with_its_settings() -> None:
    target, optimizer = model().given({"y": 2.0}), optax.adam(0.05)
    objective = partial(iwelbo, num_particles=3)
    algorithm = variational(guide, start(), objective, optimizer, 30)
    found = algorithm.run(KEY, target, progress=False)
    same = fit(KEY, objective(target, guide), start(), optimizer, 30, progress=False)
    assert np.array_equal(found.bounds, same.bounds)
    elsewhere = {"loc": 3.0, "scale": constrained(1.0, constraints.positive)}
    moved = algorithm.run(KEY, target, init=elsewhere, progress=False)
    same = fit(KEY, objective(target, guide), elsewhere, optimizer, 30, progress=False)
    assert np.array_equal(moved.bounds, same.bounds)


def test_a_ready_made_guide() -> None:
    """By its defaults, on two targets: the second compiles nothing. The posterior is N(y / 2, 1/2)."""
    algorithm = variational(mean_field, num_steps=1000)
    first = algorithm.run(KEY, model().given({"y": 2.0}), progress=False)
    with counting() as count:
        second = algorithm.run(KEY, model().given({"y": -1.0}), progress=False)
    assert count.compilations == 0
    for found, mean in ((first, 1.0), (second, -0.5)):
        draws = jax.vmap(found.guide.simulate)(jax.random.split(KEY, 4000)).choices["mu"]
        # The family holds the posterior; Adam at a rate that ends at 0 comes within 0.05.
        assert abs(float(draws.mean()) - mean) < 0.05 + 5 * 0.7 / 4000**0.5
        assert abs(float(draws.std()) - 0.5**0.5) < 0.05 + 5 * 0.7 / 8000**0.5


def test_under_jit_and_vmap_over_data() -> None:
    algorithm = variational(guide, start(), num_steps=50, stop=plateau(20))

    def go(y: Any) -> Any:
        return algorithm.run(KEY, model().given({"y": y}), progress=False).params["loc"]

    ys = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(go))(ys), [go(1.0), go(2.0)], rtol=1e-4)


def test_restarts_of_a_ready_made_guide() -> None:
    """Two modes, at -3 (of weight .4) and 3: the best restart sits at the heavier."""

    @gen
    def two() -> None:
        mixture = dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.4, 0.6])), dist.Normal(jnp.array([-3.0, 3.0]), 0.3)
        )
        sample("x", mixture)

    algorithm = variational(
        jittered(mean_field, 4.0),
        objective=partial(elbo, num_samples=4),
        num_steps=300,
        optimizer=optax.adam(0.05),
        num_restarts=8,
    )
    found = algorithm.run(KEY, two().given(), progress=False)
    ends = np.asarray(found.restarts.bounds)
    # The bound of a guide that holds one mode is the logarithm of its weight; standard errors are below 0.03.
    assert abs(ends.max() - np.log(0.6)) < 0.15
    assert abs(ends.min() - np.log(0.4)) < 0.15
    assert abs(float(found.guide.simulate(KEY).choices["x"]) - 3.0) < 2.0


def test_what_it_takes() -> None:
    target = model().given({"y": 2.0})
    with pytest.raises(TypeError, match="expected a Target, got Program"):
        variational(guide, start()).run(KEY, model())
    with pytest.raises(TypeError, match="expected a guide that is a function"):
        variational(model())
    with pytest.raises(
        WeftError, match=r"Give the parameters to begin at: variational\(guide, params\)"
    ):
        variational(guide).run(KEY, target)
    with pytest.raises(WeftError, match="would all begin at the same parameters"):
        variational(guide, start(), num_restarts=2).run(KEY, target)
