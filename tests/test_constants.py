"""Indices computed while a program is traced: as JAX does; and no gather where nothing but the order changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import norm
from weft.ppl.analysis.constants import _by_numpy

from weft import gen, marginalize, sample

I = np.arange(6).reshape(2, 3)  # noqa: E741
CASES = {
    "row": lambda x, i: jax.vmap(lambda k: x[k])(i),
    "column": lambda x, i: jax.vmap(lambda k: x[:, k])(i),
    "window": lambda x, i: jax.vmap(lambda k: jax.lax.dynamic_slice(x, (k, 1), (1, 2)))(i),
    "along": lambda x, i: jnp.take_along_axis(x, jnp.stack([i, i], 1), 1),
    "rows of rows": lambda x, i: jax.vmap(lambda row, k: row[k])(x, i),
    "negative": lambda x, i: jax.vmap(lambda k: x[k - 2])(i),
    "arithmetic": lambda x, i: (
        jnp.where(i > 0, 2 * i + 1, jnp.minimum(i, 3))
        - jnp.concatenate([i, i])[None].squeeze(0).reshape(2, 2)
    ),
    "clip": lambda x, i: jnp.clip(jnp.stack([i, i]).T, 0, 1)[:, None],
}


@pytest.mark.parametrize("name", CASES)
def test_same_as_jax(name: str) -> None:
    i = np.array([1, 0])
    closed = jax.make_jaxpr(CASES[name])(I, i)
    found = _by_numpy(closed, [I, i])
    exact: Any = CASES[name](jnp.asarray(I), jnp.asarray(i))
    assert found is not None
    np.testing.assert_array_equal(found[0], exact)
    assert found[0].dtype == exact.dtype


def test_what_is_out_of_bounds_is_left_to_jax() -> None:
    closed = jax.make_jaxpr(lambda x, i: jax.vmap(lambda k: x[k])(i))(I, np.array([1, 5]))
    assert _by_numpy(closed, [I, np.array([1, 5])]) is None
    assert _by_numpy(jax.make_jaxpr(jnp.sin)(1.0), [np.float32(1.0)]) is None


@pytest.mark.parametrize("size", [0, 2])
def test_a_batch_of_no_copies_is_summed_out(size: int) -> None:
    @gen
    def mixtures(means: Any) -> None:
        z = sample("z", dist.Categorical(jnp.ones(3) / 3).expand([size]))
        sample("y", dist.Normal(means[z, jnp.arange(size)], 1.0))

    means = np.arange(3.0 * size).reshape(3, size)
    found = marginalize(mixtures, "z")(jnp.asarray(means)).log_density({"y": jnp.zeros(size)})
    np.testing.assert_allclose(found, np.log(norm.pdf(0.0, means, 1.0).mean(0)).sum(), rtol=1e-5)
