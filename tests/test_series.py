"""Series under a vmap, one lane at a time: the densities of the lanes and of what they share multiply to the whole.

Densities are sums of the same terms in another order: the tolerance is some hundred rounding errors of their size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from weft.ppl.scans.panels import series
from weft.ppl.stage.addresses import flatten

from weft import deterministic, factor, gen, marginalize, repeat, sample

KEY = jax.random.key(5)
Normal = dist.Normal
STEPS = 3


def walk(x: Any, scale: Any = 1.0) -> Any:
    def step(x: Any, _: Any) -> Any:
        x = sample("x", Normal(x, scale))
        return x, sample("y", Normal(x, 0.5))

    return jax.lax.scan(step, x, length=STEPS)


@gen
def plain() -> Any:
    return jax.vmap(walk, (0, None))(jnp.arange(3.0), 0.7)


@gen
def nothing_mapped() -> Any:
    return repeat(lambda: walk(0.0), 4)


@gen
def before_and_after() -> Any:
    """Choices around the scan, shared ones, a value made of all lanes that reaches no density."""
    mean = sample("mean", Normal(0.0, 1.0))
    sample("seen", Normal(mean, 1.0))

    def one(data: dict[str, Any], scale: Any) -> Any:
        start = sample("start", Normal(data["x"] * mean, 1.0))
        last, _ = walk(start, scale)
        deterministic("twice", 2 * last)
        factor("end", -(last**2))
        return last

    last = jax.vmap(one, ({"x": 0, "name": None}, None))({"x": jnp.arange(3.0), "name": 0.0}, 0.5)
    return deterministic("mean of last", last.mean())


@gen
def matrices() -> Any:
    """What stands between the choices of a lane: products, broadcasts, reductions, calls, branches, a loop."""

    def one(a: Any) -> Any:
        z = sample("z", Normal(jnp.zeros(2), 1.0).to_event(1))
        u = sample("u", Normal(a @ z, 1.0).to_event(1))
        wide = jnp.sort(jnp.where(u[:, None] > 0, z[None, :], jnp.ones((2, 2))).reshape(4))
        total = jax.lax.fori_loop(0, 2, lambda i, s: s + wide[i] ** 2, jnp.sum(wide))
        total = jnp.linalg.cholesky(jnp.eye(2) + u[:, None] * u[None, :]).sum() + total
        flag = sample("flag", dist.Bernoulli(jax.nn.sigmoid(total)))
        shift = jax.lax.cond(flag == 1, lambda: sample("v", Normal(0.0, 1.0)), lambda: 0.0)
        return walk(shift + jax.nn.softplus(z[0]) + jnp.clip(u[1], -1.0, 1.0))[1]

    return jax.vmap(one)(jnp.arange(12.0).reshape(3, 2, 2))


@gen
def two_vmaps() -> Any:
    """The second vmap reads of each lane what the first drew there."""
    start = jax.vmap(lambda x: sample("start", Normal(x, 1.0)))(jnp.arange(3.0))
    return jax.vmap(walk, out_axes=(0, 1))(jnp.exp(0.1 * start) + 1.0)


@gen
def nested() -> Any:
    level = sample("level", Normal(0.0, 1.0))

    def group(x: Any) -> Any:
        mean = sample("mean", Normal(level + x[0], 1.0))
        return jax.vmap(lambda x: walk(mean + x))(x)

    return jax.vmap(group)(jnp.arange(6.0).reshape(2, 3))


@gen
def one_series(x: Any) -> Any:
    start = sample("start", Normal(x, 1.0))
    return jax.jit(walk)(start)[1]


@gen
def summed() -> Any:
    def one(x: Any) -> Any:
        def step(x: Any, _: Any) -> Any:
            x = sample("x", Normal(x, 1.0))
            flag = sample("flag", dist.Bernoulli(0.2))
            return x, sample("y", Normal(x, jnp.where(flag == 1, 3.0, 0.5)))

        return jax.lax.scan(step, x, length=STEPS)[1]

    return jax.vmap(one)(jnp.arange(3.0))


PROGRAMS: dict[str, Callable[[], Any]] = {
    "plain": plain,
    "nothing mapped": nothing_mapped,
    "before and after": before_and_after,
    "matrices": matrices,
    "two vmaps": two_vmaps,
    "nested": nested,
    "vmap of a model": lambda: jax.vmap(one_series)(jnp.arange(3.0)),
    "summed out": lambda: marginalize(summed, "flag")(),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_lanes_multiply_to_the_whole(name: str) -> None:
    program = PROGRAMS[name]()
    choices = flatten(program.simulate(KEY).choices)
    apart = series(program, ["y"], [])
    assert apart is not None
    assert not set(apart.addresses) & set(apart.shared.sites)
    shared = {a: x for a, x in choices.items() if a not in apart.addresses}
    trace, log_density = apart.shared.generate(KEY, shared)
    rows = {a: choices[a] for a in apart.addresses if a in choices}
    assert {"x", "y"} <= set(rows)

    def one(index: Any, row: Any) -> Any:
        return apart.lane(index, trace.value).log_density(row)

    lanes = jax.vmap(one)(jnp.arange(apart.size), rows)
    whole = float(program.log_density(choices))
    assert lanes.shape == (len(choices["y"]),)
    assert log_density + lanes.sum() == pytest.approx(whole, rel=1e-4)
    # The data of one lane are of no concern to the others.
    moved = jax.vmap(one)(jnp.arange(apart.size), {**rows, "y": rows["y"].at[1].add(1.0)})
    assert np.flatnonzero(moved != lanes).tolist() == [1]
