"""Variational inference in NumPyro, Pyro, GenJAX and Weft, each in an environment of its own: speed, and what is wrong.

    python benchmarks/peers.py                     all parts, in every system that is installed here
    python benchmarks/peers.py cone probes         parts: cone, vae, air, probes

    python -m venv pyro && pyro/bin/pip install pyro-ppl torch
    python3.12 -m venv genjax && genjax/bin/pip install genjax==1.0.14 optax
    genjax/bin/python benchmarks/peers.py probes   no system needs the others

`cone` is the gradient of the bound on the noisy cone where its value is known; `vae` an epoch of 60,000 images at
batches of 64; `air` one of attend, infer, repeat in Pyro (in the others by benchmarks/air.py); `probes` are small
expectations whose derivative is known exactly, in the forms programs take.
"""

import argparse
import importlib.metadata
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PHI = (0.5, 2.0, -1.0, -1.0)
CONE_SLOPE = (33.50, 133.35, 2.97, -102.85)
"""By quadrature (`cone_elbo` in tests/test_objectives.py)."""
NUM_DRAWS, BATCH, NUM_IMAGES, PIXELS, HIDDEN, LATENT = 100_000, 64, 60_000, 784, 200, 10


class Absent(Exception):
    """The system is not installed here, or cannot express this."""


def need(package: str) -> str:
    """The version of a package that is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Absent(f"{package} is not installed here") from None


# ---- the cone: functions from a key to a gradient, many at once ------------------------------------------------------


def cone_weft() -> Any:
    need("weft")
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from weft.inference import elbo

    from weft import gen, sample

    @gen
    def model():
        r = sample("x", dist.Normal(0.0, 10.0)) ** 2 + sample("y", dist.Normal(0.0, 10.0)) ** 2
        sample("z", dist.Normal(r, 0.1 + r / 100))

    @gen
    def guide(phi):
        sample("x", dist.Normal(phi[0], jnp.exp(phi[2])))
        sample("y", dist.Normal(phi[1], jnp.exp(phi[3])))

    bound = elbo(model().given({"z": 5.0}), guide)
    return over_keys(lambda key: jax.grad(bound, argnums=1)(key, jnp.array(PHI)))


def cone_numpyro() -> Any:
    need("numpyro")
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import Trace_ELBO

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 10.0))
        r = x**2 + numpyro.sample("y", dist.Normal(0.0, 10.0)) ** 2
        numpyro.sample("z", dist.Normal(r, 0.1 + r / 100), obs=5.0)

    def bound(key, phi):
        def guide():
            numpyro.sample("x", dist.Normal(phi[0], jnp.exp(phi[2])))
            numpyro.sample("y", dist.Normal(phi[1], jnp.exp(phi[3])))

        return -Trace_ELBO().loss(key, {}, model, guide)

    return over_keys(lambda key: jax.grad(bound, argnums=1)(key, jnp.array(PHI)))


def cone_genjax() -> Any:
    need("genjax")
    import jax.numpy as jnp
    from genjax import gen, normal, normal_reparam, seed
    from genjax.inference import elbo_factory

    @gen
    def model():
        x = normal(0.0, 10.0) @ "x"
        y = normal(0.0, 10.0) @ "y"
        r = x**2 + y**2
        normal(r, 0.1 + r / 100) @ "z"

    @gen
    def guide(constraint, phi):
        normal_reparam(phi[0], jnp.exp(phi[2])) @ "x"
        normal_reparam(phi[1], jnp.exp(phi[3])) @ "y"

    bound = elbo_factory(model, guide, {"z": 5.0})
    return over_keys(lambda key: seed(bound.grad_estimate)(key, jnp.array(PHI)))


def cone_pyro() -> Any:
    need("pyro-ppl")
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import Trace_ELBO

    def model(phi):
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        r = x**2 + pyro.sample("y", dist.Normal(0.0, 10.0)) ** 2
        pyro.sample("z", dist.Normal(r, 0.1 + r / 100), obs=torch.tensor(5.0))

    def guide(phi):
        pyro.sample("x", dist.Normal(phi[..., 0], phi[..., 2].exp()))
        pyro.sample("y", dist.Normal(phi[..., 1], phi[..., 3].exp()))

    def run(seed, num):
        """As many copies of the parameters as draws: each gets the gradient of its own draw."""
        pyro.set_rng_seed(seed)
        phi = torch.tensor([PHI]).repeat(num, 1).requires_grad_()

        def wide(f):
            def plated(phi):
                with pyro.plate("draws", num):
                    f(phi)

            return plated

        (-Trace_ELBO().differentiable_loss(wide(model), wide(guide), phi)).backward()
        assert phi.grad is not None
        return phi.grad.numpy()

    return run


def over_keys(gradient: Callable[[Any], Any]) -> Callable[[int, int], Any]:
    """Of a seed and a number of draws."""
    import jax

    def many(key: Any, num: int) -> Any:
        return jax.vmap(gradient)(jax.random.split(key, num))

    compiled = jax.jit(many, static_argnums=1)
    return lambda seed, num: jax.block_until_ready(compiled(jax.random.key(seed), num))


def cone() -> None:
    print("| system | version | gradient of the bound, ± its error | largest z | ms for 64 draws |")
    print("| --- | --- | --- | --- | --- |")
    print(f"| exact | | {', '.join(f'{x:.2f}' for x in CONE_SLOPE)} | | |")
    for name, package, build in (
        ("weft", "weft", cone_weft),
        ("numpyro", "numpyro", cone_numpyro),
        ("genjax", "genjax", cone_genjax),
        ("pyro", "pyro-ppl", cone_pyro),
    ):
        try:
            run = build()
            slopes = np.asarray(run(0, NUM_DRAWS), float).reshape(NUM_DRAWS, 4)
        except Absent as reason:
            print(f"| {name} | | {reason} | | |", flush=True)
            continue
        mean, error = slopes.mean(0), slopes.std(0) / math.sqrt(NUM_DRAWS)
        z = np.abs(mean - CONE_SLOPE) / error
        run(0, 64)
        ms = 1e3 * statistics.median(seconds(lambda run=run: run(1, 64)) for _ in range(200))
        shown = ", ".join(f"{m:.2f} ± {e:.2f}" for m, e in zip(mean, error, strict=True))
        print(f"| {name} | {need(package)} | {shown} | {z.max():.1f} | {ms:.3f} |", flush=True)


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


# ---- an epoch of the autoencoder -------------------------------------------------------------------------------------
# 784-200-10, leaky rectifiers, Adam at 1e-3; images of random bits, since the time does not depend on what is in them.


def images() -> Any:
    return np.random.default_rng(0).integers(0, 2, (NUM_IMAGES, PIXELS)).astype(np.float32)


def jax_epochs(bound_of: Callable[..., Any]) -> Callable[[], Any]:
    """Epochs of a bound `(key, params, batch)`, compiled whole, with Optax."""
    import jax
    import jax.numpy as jnp
    import optax

    sizes = {"e1": (PIXELS, HIDDEN), "e2": (HIDDEN, 2 * LATENT), "d1": (LATENT, HIDDEN)}
    sizes["d2"] = (HIDDEN, PIXELS)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = {
        n: (0.05 * jax.random.normal(k, s), jnp.zeros(s[1]))
        for k, (n, s) in zip(keys, sizes.items(), strict=True)
    }
    optimizer, data = optax.adam(1e-3), jnp.asarray(images())
    state = optimizer.init(params)

    @jax.jit
    def epoch(key, params, state, data):
        first, key = jax.random.split(key)
        num = NUM_IMAGES // BATCH
        order = jax.random.permutation(first, NUM_IMAGES)[: num * BATCH].reshape(num, BATCH)

        def step(carry, task):
            params, state = carry
            key, rows = task
            slope = jax.grad(lambda p: -bound_of(key, p, data[rows]) / BATCH)(params)
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), (jax.random.split(key, num), order))[0]

    return lambda: jax.block_until_ready(epoch(jax.random.key(1), params, state, data))


def networks() -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    def layer(p, x):
        return x @ p[0] + p[1]

    def encode(p, x):
        out = layer(p["e2"], jax.nn.leaky_relu(layer(p["e1"], x)))
        mean, raw = jnp.split(out, 2, -1)
        return mean, jax.nn.softplus(raw)

    def decode(p, z):
        return layer(p["d2"], jax.nn.leaky_relu(layer(p["d1"], z)))

    return encode, decode


def vae_hand() -> Any:
    need("jax")
    need("optax")
    import jax
    import jax.numpy as jnp

    encode, decode = networks()

    def bound(key, p, x):
        mean, scale = encode(p, x)
        noise = jax.random.normal(key, mean.shape)
        z = mean + scale * noise
        logits = decode(p, z)
        fit = x * logits - jax.nn.softplus(logits)
        return fit.sum() + (-0.5 * z**2 + 0.5 * noise**2 + jnp.log(scale)).sum()

    return jax_epochs(bound)


def vae_weft() -> Any:
    need("weft")
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from weft.inference import elbo

    from weft import gen, sample

    encode, decode = networks()

    @gen
    def model(p, num):
        z = sample("z", dist.Normal(jnp.zeros((num, LATENT)), 1.0).to_event(2))
        sample("x", dist.Bernoulli(logits=decode(p, z)).to_event(2))

    guide = gen(lambda p, x: sample("z", dist.Normal(*encode(p, x)).to_event(2)))
    bound = elbo(lambda p, x: model(p, len(x)).given({"x": x.astype(int)}), guide)
    return jax_epochs(bound)


def vae_numpyro() -> Any:
    need("numpyro")
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import Trace_ELBO

    encode, decode = networks()

    def bound(key, p, x):
        def model():
            with numpyro.plate("image", BATCH):
                z = numpyro.sample("z", dist.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
                numpyro.sample("x", dist.Bernoulli(logits=decode(p, z)).to_event(1), obs=x)

        def guide():
            with numpyro.plate("image", BATCH):
                numpyro.sample("z", dist.Normal(*encode(p, x)).to_event(1))

        return -Trace_ELBO().loss(key, {}, model, guide)

    return jax_epochs(bound)


def vae_genjax() -> Any:
    need("genjax")
    need("optax")
    import jax
    import jax.numpy as jnp
    from genjax import expectation, gen, normal, normal_reparam, seed

    encode, decode = networks()

    @gen
    def prior():
        normal(jnp.zeros((BATCH, LATENT)), jnp.ones((BATCH, LATENT))) @ "z"

    @gen
    def guide(p, x):
        normal_reparam(*encode(p, x)) @ "z"

    @expectation
    def expected(p, x):  # its elbo_factory has no parameters of a model
        trace = guide.simulate(p, x)
        logits = decode(p, trace.get_choices()["z"])
        fit = x * logits - jax.nn.softplus(logits)
        return (prior.assess(trace.get_choices())[0] + trace.get_score()).sum() + fit.sum()

    def bound(key, p, x):
        """A function of p with the gradient that GenJAX estimates."""
        fixed = jax.lax.stop_gradient(p)
        slope = seed(expected.grad_estimate)(key, fixed, x)[0]
        products = jax.tree.map(lambda g, v: jnp.sum(jax.lax.stop_gradient(g) * v), slope, p)
        return sum(jax.tree.leaves(products))

    return jax_epochs(bound)


def vae_pyro() -> Any:
    need("pyro-ppl")
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from torch import nn

    encoder = nn.Sequential(
        nn.Linear(PIXELS, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, 2 * LATENT)
    )
    decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, PIXELS))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("image", BATCH):
            z = pyro.sample("z", dist.Normal(torch.zeros(BATCH, LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("image", BATCH):
            mean, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, nn.functional.softplus(raw)).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    data = torch.from_numpy(images())

    def epoch():
        for rows in torch.randperm(NUM_IMAGES)[: NUM_IMAGES // BATCH * BATCH].view(-1, BATCH):
            svi.step(data[rows])

    return epoch


def vae(rounds: int) -> None:
    print("| system | seconds an epoch |\n| --- | --- |")
    epochs: dict[str, Callable[[], Any]] = {}
    for name, build in (
        ("hand-written JAX", vae_hand),
        ("weft", vae_weft),
        ("numpyro", vae_numpyro),
        ("genjax", vae_genjax),
        ("pyro", vae_pyro),
    ):
        try:
            epochs[name] = build()
            epochs[name]()  # compiles
        except Absent as reason:
            print(f"| {name} | {reason} |")
    samples = {n: [] for n in epochs}
    for _ in range(rounds):
        for name, epoch in epochs.items():
            samples[name].append(seconds(epoch))
    for name, found in samples.items():
        print(f"| {name} | {statistics.median(found):.2f} |", flush=True)


# ---- an epoch of attend, infer, repeat ------------------------------------------------------------------------------
# Sizes of examples/air.py; scenes of noise, since the time does not depend on what is in them. For systems on JAX there
# is benchmarks/air.py.

CANVAS, WINDOW, WHAT, MEMORY, NUM_SCENES, STEPS = 28, 8, 6, 64, 4_000, 3


def air_pyro() -> Any:
    need("pyro-ppl")
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, TraceGraph_ELBO
    from torch import nn

    def layers(*sizes):
        found = [nn.Linear(sizes[0], sizes[1])]
        for a, b in itertools.pairwise(sizes[1:]):
            found += [nn.LeakyReLU(), nn.Linear(a, b)]
        return nn.Sequential(*found)

    see = nn.Linear(CANVAS**2, 4 * MEMORY)
    recall = nn.Linear(MEMORY + 3 + WHAT + 1, 4 * MEMORY, bias=False)
    decide = nn.Linear(MEMORY, 7)
    encoder, decoder = layers(WINDOW**2, 64, 2 * WHAT), layers(WHAT, 64, WINDOW**2)
    more = (0.05, 0.05**2.3, 0.05**5)
    usual = torch.tensor([3.5, 0.0, 0.0]), torch.tensor([0.1, 1.0, 1.0])

    def interpolate(num_to, num_from, scale, shift):
        places = (2 * torch.arange(num_to) + 1) / num_to - 1
        places = ((scale[:, None] * places + shift[:, None] + 1) * num_from - 1) / 2
        return (1 - (places[..., None] - torch.arange(num_from)).abs()).clamp(min=0)

    def place(items, where, num_to):
        s, x, y = where.unbind(-1)
        rows, columns = (interpolate(num_to, items.shape[-1], s, shift) for shift in (y, x))
        return rows @ items @ columns.transpose(1, 2)

    def model(images):
        pyro.module("decoder", decoder)
        canvas = torch.zeros(len(images), CANVAS, CANVAS)
        with pyro.plate("scene", len(images)):
            for t in range(STEPS):
                pres = pyro.sample(f"pres_{t}", dist.Bernoulli(torch.tensor(more[t])))
                where = pyro.sample(f"where_{t}", dist.Normal(*usual).to_event(1))
                code = dist.Normal(torch.zeros(WHAT), 1.0).to_event(1)
                items = torch.sigmoid(decoder(pyro.sample(f"what_{t}", code)))
                items = place(items.view(-1, WINDOW, WINDOW), where, CANVAS)
                canvas = canvas + pres[:, None, None] * items
            pyro.sample("image", dist.Normal(canvas, 0.2).to_event(2), obs=images)

    def guide(images):
        nets = {"see": see, "recall": recall, "decide": decide, "encoder": encoder}
        for name, net in nets.items():
            pyro.module(name, net)
        num = len(images)
        seen, hidden, cell = see(images.view(num, -1)), torch.zeros(num, MEMORY), 0.0
        where, what, pres = torch.zeros(num, 3), torch.zeros(num, WHAT), torch.ones(num)
        with pyro.plate("scene", num):
            for t in range(STEPS):
                gates = seen + recall(torch.cat([hidden, where, what, pres[:, None]], -1))
                enter, forget, new, leave = gates.chunk(4, -1)
                cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
                hidden = leave.sigmoid() * cell.tanh()
                decided = decide(hidden)
                probs = (1e-4 + decided[:, 0].sigmoid() * pres) / (1 + 1.01e-4)
                pres = pyro.sample(f"pres_{t}", dist.Bernoulli(probs))
                spread = nn.functional.softplus(decided[:, 4:])
                law = dist.Normal(decided[:, 1:4] + usual[0], spread).to_event(1)
                where = pyro.sample(f"where_{t}", law)
                s, x, y = where.unbind(-1)
                back = torch.stack([1 / s, -x / s, -y / s], -1)
                loc, raw = encoder(place(images, back, WINDOW).flatten(1)).chunk(2, -1)
                law = dist.Normal(loc, nn.functional.softplus(raw)).to_event(1)
                what = pyro.sample(f"what_{t}", law)

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceGraph_ELBO())
    data = torch.rand(NUM_SCENES, CANVAS, CANVAS)

    def epoch():
        for rows in torch.randperm(NUM_SCENES)[: NUM_SCENES // BATCH * BATCH].view(-1, BATCH):
            svi.step(data[rows])

    return epoch


def air(rounds: int) -> None:
    print("| coins by | system | seconds an epoch |\n| --- | --- | --- |")
    try:
        epoch = air_pyro()
        epoch()
        found = [seconds(epoch) for _ in range(rounds)]
        print(f"| score (TraceGraph_ELBO) | pyro | {statistics.median(found):.2f} |")
    except Absent as reason:
        print(f"| | pyro | {reason} |")


# ---- probes ----------------------------------------------------------------------------------------------------------
# Each is a function of p whose expectation has a known derivative: two coins, E[(1 + b)(1 + 2 c)] with P(b) = P(c) = p,
# is (1 + p)(1 + 2 p), of derivative 3 + 4 p; coins summed in a loop of three steps; a draw in an inner jit.

P = 0.3


def probes_weft() -> dict[str, tuple[float, Any]]:
    need("weft")
    import jax
    import numpyro.distributions as dist

    from weft import expect, gradients, sample

    def coin(name, p, grad=gradients.score):
        return sample(name, dist.Bernoulli(p), grad=grad)

    def in_scan(p):
        def step(total, _):
            return total + sample("x", dist.Normal(p, 1.0)) ** 2, None

        return jax.lax.scan(step, 0.0, length=3)[0]

    def coins_in_scan(p):
        def step(total, _):
            return total + coin("b", p), None

        return jax.lax.scan(step, 0, length=3)[0] ** 2.0

    inner = jax.jit(lambda p: sample("x", dist.Normal(p, 1.0)) ** 2)
    functions = {
        "two coins, score": (3 + 4 * P, lambda p: (1.0 + coin("b", p)) * (1 + 2 * coin("c", p))),
        "coins in a scan, score": (3 + 12 * P, coins_in_scan),
        "normals in a scan": (6 * P, in_scan),
        "a normal in an inner jit": (2 * P, inner),
    }
    return {
        name: (exact, over_keys(lambda k, f=f: jax.grad(expect(f), argnums=1)(k, P)))
        for name, (exact, f) in functions.items()
    }


def probes_genjax() -> dict[str, tuple[float, Any]]:
    need("genjax")
    import jax
    from genjax import expectation, flip_reinforce, normal_reparam, seed

    @expectation
    def coins(p):
        return (1.0 + flip_reinforce(p)) * (1.0 + 2.0 * flip_reinforce(p))

    @expectation
    def in_scan(p):
        def step(total, _):
            return total + normal_reparam(p, 1.0) ** 2, None

        return jax.lax.scan(step, 0.0, length=3)[0]

    @expectation
    def in_jit(p):
        return jax.jit(lambda p: normal_reparam(p, 1.0) ** 2)(p)

    functions = {
        "two coins, score": (3 + 4 * P, coins),
        "normals in a scan": (6 * P, in_scan),
        "a normal in an inner jit": (2 * P, in_jit),
    }
    return {
        name: (exact, over_keys(lambda k, f=f: seed(f.grad_estimate)(k, P)))
        for name, (exact, f) in functions.items()
    }


def probes_numpyro() -> dict[str, tuple[float, Any]]:
    """As bounds: the cost is a factor of a model of fair coins; how far the guide's are from fair is known."""
    need("numpyro")
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan
    from numpyro.infer import Trace_ELBO, TraceGraph_ELBO

    def bound(objective):
        def model():
            b = numpyro.sample("b", dist.Bernoulli(0.5))
            c = numpyro.sample("c", dist.Bernoulli(0.5))
            numpyro.factor("cost", (1 + b) * (1 + 2 * c))

        def value(key, p):
            def guide():
                numpyro.sample("b", dist.Bernoulli(p))
                numpyro.sample("c", dist.Bernoulli(p))

            return -objective.loss(key, {}, model, guide)

        return over_keys(lambda k: jax.grad(value, argnums=1)(k, jnp.array(P)))

    def in_scan(objective):
        def coins(p):
            def step(total, _):
                total = total + numpyro.sample("b", dist.Bernoulli(p))
                return total, None

            return scan(step, jnp.zeros((), int), None, length=3)[0]

        def model():
            numpyro.factor("cost", coins(0.5) ** 2)

        def value(key, p):
            return -objective.loss(key, {}, model, lambda: coins(p))

        return over_keys(lambda k: jax.grad(value, argnums=1)(k, jnp.array(P)))

    divergence = math.log(P / (1 - P))  # of one coin from a fair one, differentiated
    exact = 3 + 4 * P - 2 * divergence
    return {
        "two coins, Trace_ELBO": (exact, bound(Trace_ELBO())),
        "two coins, TraceGraph_ELBO": (exact, bound(TraceGraph_ELBO())),
        "coins in a scan, TraceGraph_ELBO": (
            3 + 12 * P - 3 * divergence,
            in_scan(TraceGraph_ELBO()),
        ),
    }


def probes() -> None:
    print("| system | probe | exact | mean ± error | spread over keys | |\n|" + " --- |" * 6)
    for name, build in (
        ("weft", probes_weft),
        ("genjax", probes_genjax),
        ("numpyro", probes_numpyro),
    ):
        try:
            found = build()
        except Absent as reason:
            print(f"| {name} | {reason} | | | | |", flush=True)
            continue
        for probe, (exact, run) in found.items():
            try:
                slopes = np.asarray(run(0, 20_000), float).ravel()
            except Exception as error:  # a peer may refuse, which is no wrong answer
                print(f"| {name} | {probe} | {exact:.3f} | {type(error).__name__} | | refused |")
                continue
            mean, spread = slopes.mean(), slopes.std()
            error = spread / math.sqrt(slopes.size)
            right = abs(mean - exact) < 5 * error + 1e-5 * abs(exact)
            print(
                f"| {name} | {probe} | {exact:.3f} | {mean:.3f} ± {error:.3f} | {spread:.3f} | "
                f"{'right' if right else '**wrong**'} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="of cone, vae, air, probes (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="epochs whose median is taken")
    options = parser.parse_args()
    rounds = options.rounds
    run = {"cone": cone, "vae": lambda: vae(rounds), "air": lambda: air(rounds), "probes": probes}
    for part in options.parts or run:
        print(f"\n### {part}\n")
        run[part]()


if __name__ == "__main__":
    main()
