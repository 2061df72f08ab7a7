"""Epochs of attend, infer, repeat (examples/air.py, at its reduced size): by hand, in Weft, and in NumPyro.

    python benchmarks/air.py               medians of epochs that take turns
    python benchmarks/air.py --check       gradients of the hand-written estimators against Weft's, on four scenes

The strategies of the coins are written out by hand as they are in Weft: score terms, all eight leaves of the
enumeration, one flipped tail for each coin of the measure-valued derivative. NumPyro has score terms (those of its
`TraceGraph_ELBO`) and no measure-valued derivatives; to enumerate a guide's coins there, networks would have to
broadcast over the dimensions of earlier coins. Pyro is in peers.py, and GenJAX in neither.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import TraceGraph_ELBO

sys.path.append(str(Path(__file__).resolve().parents[1]))  # examples are no part of the package

from examples.air import (
    MORE,
    NUM_STEPS,
    REDUCED,
    VARIANTS,
    Networks,
    cut,
    over_scenes,
    place,
    scenes,
)

stop = jax.lax.stop_gradient
Bound = Callable[[Any, Any, Any], Any]
"""A bound, and its gradient, of a batch: `(key, networks, images)`."""


def normal(x: Any, loc: Any, scale: Any) -> Any:
    return jnp.sum(-0.5 * ((x - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi))


def unroll(
    nets: Any, image: Any, key: Any, coin: Callable[[int, Any, Any], Any]
) -> tuple[Any, Any, Any]:
    """The log weight of a path through the guide, the log density of its coins, and the coins with their odds."""
    size, few = nets.size, 1e-4
    seen = nets.see(image.ravel())
    hidden, cell = jnp.zeros((2, size.memory))
    canvas = jnp.zeros((size.canvas, size.canvas))
    usual = jnp.array([size.scale, 0.0, 0.0]), jnp.array([size.spread, 1.0, 1.0])
    where, what, pres = jnp.zeros(3), jnp.zeros(size.what), jnp.ones(())
    log_w, log_coins, coins = jnp.zeros(()), jnp.zeros(()), []
    for t in range(NUM_STEPS):
        keys = jax.random.split(jax.random.fold_in(key, t), 3)
        hidden, cell = nets.remember(seen, [where, what, pres[None]], hidden, cell)
        decided = nets.decide(hidden)
        probs = (few + jax.nn.sigmoid(decided[0]) * pres) / (1 + 1.01 * few)
        pres = coin(t, probs, keys[0])
        coins.append((pres, probs))
        log_q = jnp.where(pres == 1, jnp.log(probs), jnp.log1p(-probs))
        log_coins += log_q
        log_w += jnp.where(pres == 1, jnp.log(MORE[t]), jnp.log1p(-MORE[t])) - log_q
        loc, spread = decided[1:4] + usual[0], jax.nn.softplus(decided[4:])
        where = loc + spread * jax.random.normal(keys[1], (3,))
        log_w += normal(where, *usual) - normal(where, loc, spread)
        loc, raw = jnp.split(nets.encoder(cut(image, where, size.window).ravel()), 2)
        scale = jax.nn.softplus(raw)
        what = loc + scale * jax.random.normal(keys[2], (size.what,))
        log_w += normal(what, 0.0, 1.0) - normal(what, loc, scale)
        canvas += pres * place(nets.draw(what), where, size.canvas)
    return log_w + normal(image, canvas, size.noise), log_coins, coins


def drawn(t: int, probs: Any, key: Any) -> Any:
    return stop((jax.random.uniform(key) < probs) * 1.0)


def by_score(key: Any, nets: Any, image: Any) -> Any:
    log_w, log_coins, _ = unroll(nets, image, key, drawn)
    return log_w + stop(log_w) * (log_coins - stop(log_coins))


def by_enum(key: Any, nets: Any, image: Any) -> Any:
    leaves = jnp.array(list(np.ndindex(*(2,) * NUM_STEPS)), float)

    def leaf(values: Any) -> Any:
        log_w, log_coins, _ = unroll(nets, image, key, lambda t, probs, key: values[t])
        return jnp.exp(log_coins) * log_w

    return jnp.sum(jax.vmap(leaf)(leaves))


def by_mvd(key: Any, nets: Any, image: Any) -> Any:
    log_w, _, coins = unroll(nets, image, key, drawn)
    values = jnp.stack([pres for pres, _ in coins])

    def flipped(at: Any) -> Any:
        def coin(t: int, probs: Any, key: Any) -> Any:
            later = drawn(t, probs, key)
            return jnp.where(t < at, values[t], jnp.where(t == at, 1 - values[t], later))

        return unroll(nets, image, key, coin)[0]

    others = jax.vmap(flipped)(jnp.arange(NUM_STEPS))
    slopes = stop((2 * values - 1) * (log_w - others))
    probs = jnp.stack([p for _, p in coins])
    return log_w + jnp.sum(slopes * (probs - stop(probs)))


def in_numpyro(key: Any, nets: Any, images: Any) -> Any:
    """The mean of the bounds of a batch, by score terms."""
    size, num = nets.size, len(images)
    usual = jnp.array([size.scale, 0.0, 0.0]), jnp.array([size.spread, 1.0, 1.0])

    def model() -> None:
        canvas = jnp.zeros((num, size.canvas, size.canvas))
        with numpyro.plate("scene", num):
            for t in range(NUM_STEPS):
                pres = numpyro.sample(f"pres_{t}", dist.Bernoulli(MORE[t]))
                where = numpyro.sample(f"where_{t}", dist.Normal(*usual).to_event(1))
                code = dist.Normal(jnp.zeros(size.what), 1.0).to_event(1)
                what = numpyro.sample(f"what_{t}", code)
                items = jax.vmap(lambda c, w: place(nets.draw(c), w, size.canvas))(what, where)
                canvas += pres[:, None, None] * items
            numpyro.sample("image", dist.Normal(canvas, size.noise).to_event(2), obs=images)

    def guide() -> None:
        seen = jax.vmap(nets.see)(images.reshape(num, -1))
        hidden, cell = jnp.zeros((2, num, size.memory))
        where, what, pres = jnp.zeros((num, 3)), jnp.zeros((num, size.what)), jnp.ones(num)
        with numpyro.plate("scene", num):
            for t in range(NUM_STEPS):
                before = [where, what, pres[:, None] * 1.0]
                hidden, cell = jax.vmap(nets.remember)(seen, before, hidden, cell)
                decided = jax.vmap(nets.decide)(hidden)
                probs = (1e-4 + jax.nn.sigmoid(decided[:, 0]) * pres) / (1 + 1.01e-4)
                pres = numpyro.sample(f"pres_{t}", dist.Bernoulli(probs))
                loc, spread = decided[:, 1:4] + usual[0], jax.nn.softplus(decided[:, 4:])
                where = numpyro.sample(f"where_{t}", dist.Normal(loc, spread).to_event(1))
                windows = jax.vmap(lambda x, w: cut(x, w, size.window).ravel())(images, where)
                loc, raw = jnp.split(jax.vmap(nets.encoder)(windows), 2, -1)
                scale = jax.nn.softplus(raw)
                what = numpyro.sample(f"what_{t}", dist.Normal(loc, scale).to_event(1))

    return -TraceGraph_ELBO().loss(key, {}, model, guide) / num


BOUNDS: dict[tuple[str, str], Bound] = {
    ("score", "hand-written JAX"): over_scenes(by_score),
    ("score", "weft"): over_scenes(VARIANTS["score"]),
    ("score", "numpyro"): in_numpyro,
    ("mvd", "hand-written JAX"): over_scenes(by_mvd),
    ("mvd", "weft"): over_scenes(VARIANTS["mvd"]),
    ("enum", "hand-written JAX"): over_scenes(by_enum),
    ("enum", "weft"): over_scenes(VARIANTS["enum"]),
}


def epochs(bound: Bound, images: Any) -> Callable[[], Any]:
    """Epochs of a bound, compiled whole, with Optax."""
    free, static = eqx.partition(Networks(jax.random.key(0), REDUCED), eqx.is_inexact_array)
    optimizer, size = optax.adam(REDUCED.rate), REDUCED.batch_size
    state = optimizer.init(free)

    @jax.jit
    def epoch(key: Any, free: Any, state: Any, images: Any) -> Any:
        first, key = jax.random.split(key)
        num = len(images) // size
        order = jax.random.permutation(first, len(images))[: num * size].reshape(num, size)

        def step(carry: Any, task: Any) -> Any:
            free, state = carry
            key, rows = task
            loss = lambda f: -bound(key, eqx.combine(f, static), images[rows])  # noqa: E731
            updates, state = optimizer.update(jax.grad(loss)(free), state)
            return (optax.apply_updates(free, updates), state), None

        return jax.lax.scan(step, (free, state), (jax.random.split(key, num), order))[0]

    return lambda: jax.block_until_ready(epoch(jax.random.key(1), free, state, images))


def times(rounds: int) -> None:
    images = scenes(jax.random.key(0), REDUCED)[0]
    runs = {name: epochs(bound, images) for name, bound in BOUNDS.items()}
    found: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # compiles
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - begin)
    print("| coins by | system | seconds an epoch | of hand |\n| --- | --- | --- | --- |")
    for (strategy, system), samples in found.items():
        base = found[strategy, "hand-written JAX"]
        ratio = statistics.median(a / b for a, b in zip(samples, base, strict=True))
        print(f"| {strategy} | {system} | {statistics.median(samples):.2f} | {ratio:.2f} |")


def check(num_keys: int = 1000) -> None:
    """Means of a gradient (of the bias that decides on the first coin) over keys, with standard errors."""
    images = scenes(jax.random.key(0), REDUCED)[0][:4]
    nets = Networks(jax.random.key(0), REDUCED)
    keys = jax.random.split(jax.random.key(2), num_keys)
    print("| coins by | system | bound | gradient |\n| --- | --- | --- | --- |")
    for (strategy, system), bound in BOUNDS.items():

        def shifted(b: Any, key: Any, bound: Bound = bound) -> Any:
            moved = eqx.tree_at(lambda n: n.decide.bias, nets, nets.decide.bias.at[0].add(b))
            return bound(key, moved, images)

        one = functools.partial(jax.value_and_grad(shifted), 0.0)
        value, slope = jax.jit(lambda keys, one=one: jax.lax.map(one, keys, batch_size=100))(keys)
        cells = [f"{x.mean():.3f} ± {x.std() / num_keys**0.5:.3f}" for x in (value, slope)]
        print(f"| {strategy} | {system} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    check() if options.check else times(options.rounds)
