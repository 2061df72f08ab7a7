# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # How many digits are there? Attend, infer, repeat
#
# A scene holds no digit, one or two, anywhere. Nobody says how many, where, or what a digit looks like: a model learns
# to draw scenes, and a guide learns to take them apart, step by step (Eslami et al. 2016). At each of three steps the
# guide decides whether there is one more object (`pres`), where it is (`where`), and what it looks like (`what`).
#
# Whether there is one more object is a coin. Its gradient is the hard part, and here it is one line: the same model
# and guide are trained with the coins enumerated, by measure-valued derivatives, by score terms, by mixtures of them,
# under the ELBO, the importance-weighted bound and reweighted wake-sleep (the comparison of Becker et al. 2024).
#
#     python examples/air.py                               one variant, a minute or two, and the picture
#     python examples/air.py enum mvd score --seeds 0 1 2  a table of several
#     python examples/air.py --all --seeds 0 1 2           of all
#     python examples/air.py --all --full                  at the published size: for a GPU
#
# Prints a table, and saves `out/air.csv` and `out/air.png`. WEFT_FAST=1 makes a shorter run.

# %%
import argparse
import csv
import itertools
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import optax
from matplotlib.patches import Rectangle
from weft.inference import elbo, fit, iwelbo, rws

from weft import gen, gradients, sample, with_gradients

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out"
FAST = os.environ.get("WEFT_FAST", "") not in ("", "0")


@dataclass(frozen=True)
class Size:
    """How large everything is. The defaults learn to count on one core in a minute or two.

    Attributes:
        canvas, window: pixels along a side of a scene and of an object.
        what: dimensions of the code of an object.
        memory: units of the guide's memory, an LSTM.
        encoder, decoder: hidden layers between an object and its code.
        scale, spread: prior mean and standard deviation of canvas over object.
        noise: standard deviation of a pixel.
        num_scenes, num_epochs, batch_size, rate: of the training.
    """

    canvas: int = 28
    window: int = 8
    what: int = 6
    memory: int = 64
    encoder: tuple[int, ...] = (64,)
    decoder: tuple[int, ...] = (64,)
    scale: float = 3.5
    spread: float = 0.1
    noise: float = 0.2
    num_scenes: int = 4_000
    num_epochs: int = 40
    batch_size: int = 64
    rate: float = 1e-3


REDUCED = Size()
FULL = Size(
    canvas=50,
    window=20,
    what=50,
    memory=256,
    encoder=(200,),
    decoder=(200,),
    scale=3.0,
    spread=0.2,
    noise=0.3,
    num_scenes=60_000,
    num_epochs=41,
    rate=1e-4,
)
NUM_STEPS = 3
MORE = (0.05, 0.05**2.3, 0.05**5)
"""The prior probability of an object at each step: few are better."""

# %% [markdown]
# ## Looking and drawing
#
# `where` is (s, x, y): a point p of the scene, with coordinates from -1 to 1, is the point s p + (x, y) of the object.
# Shrinking an object into the scene and cutting a window out of it are the same operation, one the inverse of the
# other: linear interpolation along rows and along columns, a matrix on either side.


# %%
def interpolate(num_to, num_from, scale, shift):
    """The matrix that reads `num_from` pixels at the places of `num_to`; zero outside."""
    places = (2 * jnp.arange(num_to) + 1) / num_to - 1
    places = ((scale * places + shift + 1) * num_from - 1) / 2
    return jnp.maximum(0, 1 - jnp.abs(places[:, None] - jnp.arange(num_from)))


def place(item, where, num_to):
    """An object in a scene."""
    s, x, y = where
    rows, columns = (interpolate(num_to, len(item), s, shift) for shift in (y, x))
    return rows @ item @ columns.T


def cut(scene, where, num_to):
    """The window of a scene in which an object stands."""
    s, x, y = where
    return place(scene, (1 / s, -x / s, -y / s), num_to)


# %% [markdown]
# ## The scenes
#
# Digits are those of scikit-learn, 8 x 8 pixels, two sevenths of the scene wide and put anywhere. A scene is drawn
# again until its digits do not overlap.


# %%
def scenes(key, size):
    """Scenes, and how many digits they hold."""
    digits = jnp.asarray(np.load(HERE / "data" / "digits.npz")["images"]) / 16.0

    def one(key):
        first, key = jax.random.split(key)
        count = jax.random.randint(first, (), 0, 3)

        def draw(key):
            keys = jax.random.split(key, 3)
            items = digits[jax.random.randint(keys[0], (2,), 0, len(digits))]
            s = size.scale + 0.1 * jax.random.normal(keys[1], (2,))
            centre = (1 - 1 / s) * jax.random.uniform(keys[2], (2, 2), minval=-1.0)
            where = (s, *(-s * centre))
            placed = jax.vmap(place, (0, 0, None))(items, where, size.canvas)
            return jnp.sum(placed * (jnp.arange(2) < count)[:, None, None], 0)

        def again(state):
            key, _ = jax.random.split(state[0])
            return key, draw(key)

        return jax.lax.while_loop(lambda s: jnp.max(s[1]) > 1.001, again, (key, draw(key)))[
            1
        ], count

    keys = jax.random.split(key, size.num_scenes)
    return jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(keys)


# %% [markdown]
# ## The model and the guide
#
# Both are programs for one scene. Their networks are parameters, an Equinox module.


# %%
class Networks(eqx.Module):
    see: eqx.nn.Linear
    recall: eqx.nn.Linear
    decide: eqx.nn.Linear
    encoder: eqx.nn.Sequential
    decoder: eqx.nn.Sequential
    size: Size = eqx.field(static=True)

    def __init__(self, key, size):
        keys = jax.random.split(key, 5)
        pixels, gates = size.window**2, 4 * size.memory
        self.see = eqx.nn.Linear(size.canvas**2, gates, key=keys[0])
        inputs = size.memory + 3 + size.what + 1
        self.recall = eqx.nn.Linear(inputs, gates, use_bias=False, key=keys[1])
        self.decide = eqx.nn.Linear(size.memory, 7, key=keys[2])
        self.encoder = layers(keys[3], pixels, *size.encoder, 2 * size.what)
        self.decoder = layers(keys[4], size.what, *size.decoder, pixels)
        self.size = size

    def draw(self, what):
        """An object from its code."""
        return jax.nn.sigmoid(self.decoder(what)).reshape(self.size.window, -1)

    def remember(self, seen, before, hidden, cell):
        """A step of an LSTM. What it sees of the scene is the same at every step, and computed once."""
        gates = seen + self.recall(jnp.concatenate([hidden, *before]))
        enter, forget, new, leave = jnp.split(gates, 4)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
        return jax.nn.sigmoid(leave) * jnp.tanh(cell), cell


def layers(key, *sizes):
    """Linear layers with leaky rectifiers between them."""
    found = []
    for i, pair in enumerate(itertools.pairwise(sizes)):
        found += [eqx.nn.Linear(*pair, key=jax.random.fold_in(key, i))]
        found += [eqx.nn.Lambda(jax.nn.leaky_relu)]
    return eqx.nn.Sequential(found[:-1])


@gen
def scene(nets):
    size = nets.size
    canvas = jnp.zeros((size.canvas, size.canvas))
    usual = jnp.array([size.scale, 0.0, 0.0]), jnp.array([size.spread, 1.0, 1.0])
    for t in range(NUM_STEPS):
        pres = sample(f"pres_{t}", dist.Bernoulli(MORE[t]))
        where = sample(f"where_{t}", dist.Normal(*usual).to_event(1))
        what = sample(f"what_{t}", dist.Normal(jnp.zeros(size.what), 1.0).to_event(1))
        canvas += pres * place(nets.draw(what), where, size.canvas)
    sample("image", dist.Normal(canvas, size.noise).to_event(2))
    return canvas


@gen
def look(nets, image):
    size, few = nets.size, 1e-4
    seen = nets.see(image.ravel())
    hidden, cell = jnp.zeros((2, size.memory))
    where, what, pres, count = jnp.zeros(3), jnp.zeros(size.what), 1, 0
    for t in range(NUM_STEPS):
        before = [where, what, jnp.array([pres], float)]
        hidden, cell = nets.remember(seen, before, hidden, cell)
        decided = nets.decide(hidden)
        # After a step without an object there is none, almost surely.
        probs = (few + jax.nn.sigmoid(decided[0]) * pres) / (1 + 1.01 * few)
        pres = sample(f"pres_{t}", dist.Bernoulli(probs))
        loc, spread = decided[1:4], jax.nn.softplus(decided[4:])
        loc += jnp.array([size.scale, 0.0, 0.0])  # begins at the prior's mean
        where = sample(f"where_{t}", dist.Normal(loc, spread).to_event(1))
        code = nets.encoder(cut(image, where, size.window).ravel())
        loc, raw = jnp.split(code, 2)
        what = sample(f"what_{t}", dist.Normal(loc, jax.nn.softplus(raw)).to_event(1))
        count += pres
    return count


# %% [markdown]
# ## Eight ways to train it
#
# A variant is a line: which strategy each coin has, and which objective is maximised.


# %%
enum, mvd, score = gradients.enum, gradients.mvd, gradients.score


def target(nets, image):
    return scene(nets).given({"image": image})


def by(*strategies):
    """The guide with a strategy for the coin of each step."""
    return with_gradients(look, {f"pres_{t}": s for t, s in enumerate(strategies)})


VARIANTS = {
    "enum": elbo(target, by(enum, enum, enum)),
    "mvd": elbo(target, by(mvd, mvd, mvd)),
    "score": elbo(target, by(score, score, score)),
    "hybrid": elbo(target, by(mvd, mvd, enum)),
    "iwae score": iwelbo(target, by(score, score, score), num_particles=2),
    "iwae mvd": iwelbo(target, by(mvd, mvd, mvd), num_particles=2),
    "iwae hybrid": iwelbo(target, by(mvd, mvd, enum), num_particles=2),
    "rws": rws(target, look, num_particles=10),
}


def over_scenes(objective):
    """The mean over a batch. Each scene has its own estimator, so that enumeration has eight leaves a scene."""

    def mean(key, nets, images):
        keys = jax.random.split(key, len(images))
        return jnp.mean(jax.vmap(objective, (0, None, 0))(keys, nets, images))

    return mean


@eqx.filter_jit
def accuracy(key, nets, images, counts):
    """The share of scenes in which a draw of the guide finds as many objects as there are digits."""

    def right(task):
        key, image, count = task
        return look(nets, image).simulate(key).value == count

    keys = jax.random.split(key, len(images))
    return jnp.mean(jax.lax.map(right, (keys, images, counts), batch_size=500))


# %%
class Run(NamedTuple):
    """One variant, one seed: the networks, and for each epoch the mean bound, the accuracy and the seconds."""

    variant: str
    seed: int
    nets: Networks
    bounds: list[float]
    accuracies: list[float]
    seconds: list[float]

    def row(self) -> str:
        """A row of the table; the first epoch compiles and does not count for the time."""
        learned = next((str(i) for i, a in enumerate(self.accuracies) if a > 0.9), "never")
        seconds = statistics.median(self.seconds[1:] or self.seconds)
        return (
            f"| {self.variant} | {self.seed} | {self.bounds[-1]:.1f} | {self.accuracies[-1]:.3f} | "
            f"{max(self.accuracies):.3f} | {learned} | {seconds:.1f} |"
        )


HEADER = """
| variant | seed | objective | accuracy | best | epoch above .9 | seconds an epoch |
| --- | --- | --- | --- | --- | --- | --- |"""


@eqx.filter_jit
def epoch(variant, key, nets, state, images):
    """Once through the scenes. Inside `jit` a whole fit is one compiled loop, and is traced once for all epochs."""
    size = nets.size
    num_steps = len(images) // size.batch_size
    objective, optimizer = over_scenes(VARIANTS[variant]), optax.adam(size.rate)
    found = fit(key, objective, nets, optimizer, num_steps, images, size.batch_size, state=state)
    return found.params, found.state, jnp.mean(found.bounds)


def train(variant: str, seed: int, data: Any, size: Size, verbose: bool) -> Run:
    images, counts = data
    key = jax.random.key(seed)
    nets = Networks(jax.random.fold_in(key, 0), size)
    state = optax.adam(size.rate).init(eqx.filter(nets, eqx.is_inexact_array))
    run = Run(variant, seed, nets, [], [], [])
    for i in range(size.num_epochs):
        fit_key, accuracy_key = jax.random.split(jax.random.fold_in(key, 1 + i))
        begin = time.perf_counter()
        nets, state, bound = epoch(variant, fit_key, nets, state, images)
        run.bounds.append(float(bound))
        run.seconds.append(time.perf_counter() - begin)
        run.accuracies.append(float(accuracy(accuracy_key, nets, images, counts)))
        if verbose:
            print(
                f"{variant}, seed {seed}, epoch {i}: {run.bounds[-1]:.1f}, {run.accuracies[-1]:.3f}, "
                f"{run.seconds[-1]:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return run._replace(nets=nets)


# %% [markdown]
# ## The picture
#
# Scenes with the windows that the guide chose, what the model draws from what it found, and how the accuracy grew.


# %%
COLOURS = {
    "enum": "#0072b2",
    "mvd": "#009e73",
    "score": "#d55e00",
    "hybrid": "#56b4e9",
    "iwae score": "#e69f00",
    "iwae mvd": "#cc79a7",
    "iwae hybrid": "0.6",
    "rws": "k",
}


def draw_picture(runs: list[Run], images: Any, counts: Any, path: Path) -> None:
    nets, size = runs[0].nets, runs[0].nets.size
    # Three of each count, as they come.
    shown = np.concatenate([np.flatnonzero(np.asarray(counts) == n)[:3] for n in (1, 2, 0)])
    keys = jax.random.split(jax.random.key(0), len(shown))
    found = jax.vmap(lambda k, x: look(nets, x).simulate(k))(keys, images[shown])
    drawn = jax.vmap(lambda k, c: scene(nets).generate(k, c)[0].value)(keys, found.choices)
    figure = plt.figure(figsize=(11, 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2, 1.7])
    axes = top.subplots(2, len(shown))
    for i, n in enumerate(shown):
        for axis, picture in zip(axes[:, i], (images[n], drawn[i]), strict=True):
            axis.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        for t in range(NUM_STEPS):
            if found.choices[f"pres_{t}"][i]:
                s, x, y = np.asarray(found.choices[f"where_{t}"][i])
                corner = [((-c - 1) / s + 1) * size.canvas / 2 - 0.5 for c in (x, y)]
                side, colour = size.canvas / s, ("#d55e00", "#0072b2", "#009e73")[t]
                axes[0, i].add_patch(
                    Rectangle(corner, side, side, fill=False, color=colour, lw=1.5)
                )
        axes[0, i].set_title(f"{int(counts[n])}, found {int(found.value[i])}", fontsize=9)
    axes[0, 0].set_ylabel("scene")
    axes[1, 0].set_ylabel("drawn again")
    top.suptitle(f"Taken apart by {runs[0].variant}", fontsize=10)
    axis = bottom.subplots()
    for run in runs:
        first = run.variant not in [line.get_label() for line in axis.lines]
        label = run.variant if first else None
        axis.plot(run.accuracies, color=COLOURS[run.variant], label=label, lw=1.2)
    axis.set(xlabel="epoch", ylabel="scenes counted right", ylim=(0, 1.02))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=2)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# %%
def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)} (default: mvd)")
    parser.add_argument("--all", action="store_true", help="all variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--full", action="store_true", help="the published size: for a GPU")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--canvas", type=int, help="pixels along a side; objects stay as large")
    options = parser.parse_args(args)
    variants = list(VARIANTS) if options.all else options.variants or ["mvd"]
    if unknown := [v for v in variants if v not in VARIANTS]:
        parser.error(f"no variant {unknown[0]!r}: take {', '.join(VARIANTS)}")
    size = FULL if options.full else REDUCED
    changes = {"num_epochs": options.epochs or (8 if FAST else None), "num_scenes": options.scenes}
    size = replace(size, **{n: v for n, v in changes.items() if v})
    if options.canvas:
        scale = size.scale * options.canvas / size.canvas
        size = replace(size, canvas=options.canvas, scale=scale)
    data = scenes(jax.random.key(681307), size)
    runs = []
    print(HEADER, flush=True)
    for variant in variants:
        for seed in options.seeds:
            runs.append(train(variant, seed, data, size, verbose=len(args) > 0))
            print(runs[-1].row(), flush=True)
    OUT.mkdir(exist_ok=True)
    with open(OUT / "air.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["variant", "seed", "epoch", "objective", "accuracy", "seconds"])
        for run in runs:
            for i, numbers in enumerate(zip(run.bounds, run.accuracies, run.seconds, strict=True)):
                rows.writerow([run.variant, run.seed, i, *(f"{x:.4f}" for x in numbers)])
    draw_picture(runs, *data, OUT / "air.png")
    print(f"\nout/air.png: {len(data[0]):,} scenes, {size.num_epochs} epochs.")


if __name__ == "__main__":
    main(sys.argv[1:] if "ipykernel" not in sys.modules else [])
