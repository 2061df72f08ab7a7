"""The programs whose cost is measured, each written by hand in JAX, in Weft and in NumPyro.

The hand-written versions use the same formulas as NumPyro's distributions (which Weft uses too), so that a difference
in floating-point operations is what a language adds, not another way to write a density. Every version of an
operation takes the same arguments; data are arguments, so nothing is folded at compile time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from jax.nn import leaky_relu, sigmoid, softplus
from numpyro.contrib.control_flow import scan as numpyro_scan
from numpyro.distributions.util import binary_cross_entropy_with_logits
from numpyro.handlers import seed, trace
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import log_density as numpyro_log_density
from weft.inference import elbo

from weft import gen, sample


@dataclass(frozen=True)
class Operation:
    """One operation of one program.

    Attributes:
        args: what every version is called with.
        versions: "hand", "weft", "numpyro" to functions of `args`; for draws also "hand, a key a lane".
    """

    args: tuple[Any, ...]
    versions: dict[str, Callable[..., Any]]


def normal(x, loc, scale):
    """log N(x; loc, scale), the arithmetic of `numpyro.distributions.Normal`."""
    return -0.5 * ((x - loc) / scale) ** 2 - jnp.log(jnp.sqrt(2 * jnp.pi) * scale)


def bernoulli(x, logits):
    """log Bernoulli(x; logits), the arithmetic of `numpyro.distributions.BernoulliLogits`, infinite logits included."""
    return -binary_cross_entropy_with_logits(logits, x)


def lane_keys(key, size):
    """A key for every lane, as Weft derives them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(size))


def operations(log_densities, simulators, choices, data, key) -> dict[str, Operation]:
    """Log density, its gradient in the choices, and a simulation, from the versions of the first and the last."""
    gradients = {system: jax.grad(f) for system, f in log_densities.items()}
    return {
        "log density": Operation((choices, *data), log_densities),
        "gradient": Operation((choices, *data), gradients),
        "simulate": Operation((key, *data[:-1]), simulators),
    }


# ---- eight schools ---------------------------------------------------------------------------------------------------


@gen
def schools(sigma):
    mu = sample("mu", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(5.0))

    def school(s):
        theta = sample("theta", dist.Normal(mu, tau))
        return sample("y", dist.Normal(theta, s))

    return jax.vmap(school)(sigma)


def numpyro_schools(sigma, y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", sigma.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        return numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools() -> dict[str, Operation]:
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    choices = {"mu": jnp.array(4.0), "tau": jnp.array(3.0), "theta": y / 3}

    def hand(c, sigma, y):
        half_cauchy = -jnp.log(jnp.pi) - jnp.log(5.0) - jnp.log1p((c["tau"] / 5.0) ** 2)
        half_cauchy = jnp.where(c["tau"] > 0, half_cauchy, -jnp.inf)  # as Weft scores it
        terms = normal(c["theta"], c["mu"], c["tau"]) + normal(y, c["theta"], sigma)
        return normal(c["mu"], 0.0, 5.0) + jnp.log(2.0) + half_cauchy + terms.sum()

    def weft(c, sigma, y):
        return schools(sigma).given({"y": y}).log_density(c)

    def peer(c, sigma, y):
        return numpyro_log_density(numpyro_schools, (sigma, y), {}, c)[0]

    def draw(key, sigma, by_lane):
        k = [jax.random.fold_in(key, i) for i in range(4)]
        mu = 5.0 * jax.random.normal(k[0])
        tau = jnp.abs(5.0 * jax.random.cauchy(k[1]))
        theta = mu + tau * jax.random.normal(k[2], sigma.shape)
        keys = lane_keys(k[3], sigma.size)
        noise = (
            jax.vmap(jax.random.normal)(keys) if by_lane else jax.random.normal(k[3], theta.shape)
        )
        return {"mu": mu, "tau": tau, "theta": theta, "y": theta + sigma * noise}

    simulators = {
        "hand": lambda key, sigma: draw(key, sigma, False),
        "hand, a key a lane": lambda key, sigma: draw(key, sigma, True),
        "weft": lambda key, sigma: schools(sigma).simulate(key).choices,
        "numpyro": lambda key, sigma: values(numpyro_schools, key, sigma),
    }
    versions = {"hand": hand, "weft": weft, "numpyro": peer}
    return operations(versions, simulators, choices, (sigma, y), jax.random.key(0))


def values(model, key, *args):
    """What a NumPyro model's sites draw."""
    sites = trace(seed(model, key)).get_trace(*args)
    return {name: site["value"] for name, site in sites.items() if site["type"] == "sample"}


# ---- logistic regression, 10,000 rows --------------------------------------------------------------------------------


@gen
def logistic(x):
    beta = sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    return jax.vmap(lambda row: sample("y", dist.Bernoulli(logits=row @ beta)))(x)


def numpyro_logistic(x, y=None):
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    with numpyro.plate("row", x.shape[0]):
        return numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def logistic_data(rows: int = 10_000, size: int = 20):
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (rows, size))
    beta = 0.5 * jax.random.normal(keys[1], (size,))
    return x, beta, jax.random.bernoulli(keys[2], jax.nn.sigmoid(x @ beta)).astype(jnp.int32)


def logistic_regression() -> dict[str, Operation]:
    x, beta, y = logistic_data()

    def hand(c, x, y):
        return normal(c["beta"], 0.0, 1.0).sum() + bernoulli(y, x @ c["beta"]).sum()

    def weft(c, x, y):
        return logistic(x).given({"y": y}).log_density(c)

    def peer(c, x, y):
        return numpyro_log_density(numpyro_logistic, (x, y), {}, c)[0]

    def draw(key, x, by_lane):
        k = [jax.random.fold_in(key, i) for i in range(2)]
        beta = jax.random.normal(k[0], (x.shape[1],))
        probs = jax.nn.sigmoid(x @ beta)
        keys = lane_keys(k[1], x.shape[0]) if by_lane else k[1]
        y = (jax.vmap(jax.random.bernoulli) if by_lane else jax.random.bernoulli)(keys, probs)
        return {"beta": beta, "y": y.astype(jnp.int32)}

    simulators = {
        "hand": lambda key, x: draw(key, x, False),
        "hand, a key a lane": lambda key, x: draw(key, x, True),
        "weft": lambda key, x: logistic(x).simulate(key).choices,
        "numpyro": lambda key, x: values(numpyro_logistic, key, x),
    }
    versions = {"hand": hand, "weft": weft, "numpyro": peer}
    return operations(versions, simulators, {"beta": beta}, (x, y), jax.random.key(0))


# ---- a state-space model of 1,000 steps ------------------------------------------------------------------------------


@gen
def state_space(rho, num_steps):
    def step(x, _):
        x = sample("x", dist.Normal(rho * x, 1.0))
        return x, sample("y", dist.Normal(x, 0.5))

    return lax.scan(step, 0.0, length=num_steps)[1]


def numpyro_state_space(rho, num_steps, y=None):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(rho * x, 1.0))
        return x, numpyro.sample("y", dist.Normal(x, 0.5), obs=y)

    return numpyro_scan(step, 0.0, y, length=num_steps)[1]


def state_space_model(num_steps: int = 1000) -> dict[str, Operation]:
    rho = jnp.array(0.9)
    x, y = jax.random.normal(jax.random.key(2), (2, num_steps))

    def hand(c, rho, y):
        def step(previous, now):
            x, y = now
            return x, normal(x, rho * previous, 1.0) + normal(y, x, 0.5)

        return lax.scan(step, 0.0, (c["x"], y))[1].sum()

    def weft(c, rho, y):
        return state_space(rho, num_steps).given({"y": y}).log_density(c)

    def peer(c, rho, y):
        return numpyro_log_density(numpyro_state_space, (rho, num_steps, y), {}, c)[0]

    def draw(key, rho):
        def step(x, keys):
            x = rho * x + jax.random.normal(keys[0])
            return x, (x, x + 0.5 * jax.random.normal(keys[1]))

        steps = lane_keys(key, num_steps)
        keys = jnp.stack([jax.vmap(jax.random.fold_in, (0, None))(steps, i) for i in range(2)], 1)
        x, y = lax.scan(step, 0.0, keys)[1]
        return {"x": x, "y": y}

    simulators = {
        "hand": draw,
        "weft": lambda key, rho: state_space(rho, num_steps).simulate(key).choices,
        "numpyro": lambda key, rho: values(numpyro_state_space, key, rho, num_steps),
    }
    versions = {"hand": hand, "weft": weft, "numpyro": peer}
    return operations(versions, simulators, {"x": x}, (rho, y), jax.random.key(0))


def unrolled_state_space_model() -> dict[str, Operation]:
    """Eight steps with every loop unrolled: XLA counts the body of a loop once, here every step counts."""
    return {
        name: Operation(op.args, {system: unrolled(f) for system, f in op.versions.items()})
        for name, op in state_space_model(8).items()
    }


def unrolled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, traced, with every scan in it unrolled."""

    def rewrite(jaxpr: Any) -> Any:
        if not hasattr(jaxpr, "eqns"):
            return jaxpr
        if (
            hasattr(jaxpr, "jaxpr") and jaxpr.jaxpr is not jaxpr
        ):  # closed; from JAX 0.11 on there is one class
            return jaxpr.replace(jaxpr=rewrite(jaxpr.jaxpr))
        eqns = []
        for eqn in jaxpr.eqns:
            params = {name: rewrite(value) for name, value in eqn.params.items()}
            if eqn.primitive.name == "scan":
                params["unroll"] = params["length"]
            eqns.append(eqn.replace(params=params))
        return jaxpr.replace(eqns=eqns)

    def call(*args: Any) -> Any:
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        flat = jax.extend.core.jaxpr_as_fun(rewrite(jaxpr))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), flat)

    return call


# ---- variational autoencoders, the gradient of their bound -----------------------------------------------------------

PIXELS, IMAGES = 784, 64


@dataclass(frozen=True)
class Autoencoder:
    """Networks of an encoder and of a decoder.

    Attributes:
        latent: the size of the code.
        weights: shapes of the weights by name; biases are vectors.
        encode: from weights and an image (or a batch of images) to mean and scale of the code.
        decode: from weights and a code to logits.
    """

    latent: int
    weights: dict[str, tuple[int, ...]]
    encode: Callable[[Any, Any], tuple[Any, Any]]
    decode: Callable[[Any, Any], Any]

    def init(self, key):
        keys = jax.random.split(key, len(self.weights))
        return {
            n: 0.05 * jax.random.normal(k, s)
            for k, (n, s) in zip(keys, self.weights.items(), strict=True)
        }


def softplus_encode(p, x):
    h = softplus(x.astype(jnp.float32) @ p["e1"])
    return h @ p["mean"], jnp.exp(h @ p["log_sd"])


def softplus_decode(p, z):
    return softplus(z @ p["d1"]) @ p["d2"]


SOFTPLUS = Autoencoder(
    50,
    {
        "e1": (PIXELS, 400),
        "mean": (400, 50),
        "log_sd": (400, 50),
        "d1": (50, 400),
        "d2": (400, PIXELS),
    },
    softplus_encode,
    softplus_decode,
)


def leaky_encode(p, x):
    h = leaky_relu(x.astype(jnp.float32) @ p["e1"] + p["b1"])
    mean, scale = jnp.split(h @ p["e2"] + p["b2"], 2, axis=-1)
    return mean, softplus(scale)


def leaky_decode(p, z):
    h = leaky_relu(z @ p["d1"] + p["b3"])
    # A sigmoid that is then taken for logits: so in the published programs, and kept to compare with them.
    return sigmoid(h @ p["d2"] + p["b4"])


LEAKY = Autoencoder(
    10,
    {
        "e1": (PIXELS, 200),
        "b1": (200,),
        "e2": (200, 20),
        "b2": (20,),
        "d1": (10, 200),
        "b3": (200,),
        "d2": (200, PIXELS),
        "b4": (PIXELS,),
    },
    leaky_encode,
    leaky_decode,
)


def vae(networks: Autoencoder = SOFTPLUS, images: int = IMAGES) -> dict[str, Operation]:
    """A batch's bound and its gradient in all weights, in four layouts.

    Latents of the batch as one site, as a vmap inside the program; a program per image, of which the bounds are
    summed; and a program and its gradient per image, of which the gradients are.
    """
    encode, decode, latent = networks.encode, networks.decode, networks.latent
    p = networks.init(jax.random.key(0))
    x = jax.random.bernoulli(jax.random.key(1), 0.5, (images, PIXELS)).astype(jnp.int32)

    def likelihood(p, z):
        return sample("x", dist.Bernoulli(logits=decode(p, z)).to_event(z.ndim))

    @gen
    def decoder(p, shape):
        return likelihood(p, sample("z", dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape))))

    @gen
    def encoder(p, x):
        return sample("z", dist.Normal(*encode(p, x)).to_event(x.ndim))

    @gen
    def vmap_decoder(p, count):
        def image(_):
            return likelihood(p, sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1)))

        return jax.vmap(image)(jnp.arange(count))

    @gen
    def vmap_encoder(p, x):
        return jax.vmap(lambda x: sample("z", dist.Normal(*encode(p, x)).to_event(1)))(x)

    def peer_model(p, x):
        shape = (*x.shape[:-1], latent)
        z = numpyro.sample("z", dist.Normal(jnp.zeros(shape), 1.0).to_event(x.ndim))
        numpyro.sample("x", dist.Bernoulli(logits=decode(p, z)).to_event(x.ndim), obs=x)

    def peer_guide(p, x):
        numpyro.sample("z", dist.Normal(*encode(p, x)).to_event(x.ndim))

    def peer(key, p, x):
        model, guide = (lambda x: peer_model(p, x)), (lambda x: peer_guide(p, x))
        return -Trace_ELBO().loss(key, {}, model, guide, x)

    def hand(key, p, x, noise=None):
        """The bound of a batch or of one image, one draw of the latent."""
        mean, sd = encode(p, x)
        z = mean + sd * (jax.random.normal(key, mean.shape) if noise is None else noise)
        prior, guide = normal(z, 0.0, 1.0).sum(), normal(z, mean, sd).sum()
        return prior + bernoulli(x, decode(p, z)).sum() - guide

    def hand_by_lane(key, p, x):
        keys = lane_keys(key, len(x))
        return hand(key, p, x, jax.vmap(lambda k: jax.random.normal(k, (latent,)))(keys))

    def per_image(function):
        def total(key, p, x):
            found = jax.vmap(function, (0, None, 0))(jax.random.split(key, len(x)), p, x)
            return jax.tree.map(lambda a: a.sum(0), found)

        return total

    def gradient(function):
        return jax.value_and_grad(function, argnums=1)

    site = elbo(lambda p, x: decoder(p, (len(x), latent)).given({"x": x}), encoder)
    vmap = elbo(lambda p, x: vmap_decoder(p, len(x)).given({"x": x}), vmap_encoder)
    image = elbo(lambda p, x: decoder(p, (latent,)).given({"x": x}), encoder)
    by_lane = {"hand": hand, "hand, a key a lane": hand_by_lane, "weft": vmap, "numpyro": peer}
    one = {"hand": hand, "weft": image, "numpyro": peer}
    layouts = {
        "one site": {s: gradient(f) for s, f in {**one, "weft": site}.items()},
        "vmap": {s: gradient(f) for s, f in by_lane.items()},
        "per image": {s: gradient(per_image(f)) for s, f in one.items()},
        "gradients per image": {s: per_image(gradient(f)) for s, f in one.items()},
    }
    args = (jax.random.key(3), p, x)
    return {
        f"bound's gradient, {layout}": Operation(args, versions)
        for layout, versions in layouts.items()
    }


WORKLOADS: dict[str, Callable[[], dict[str, Operation]]] = {
    "eight schools": eight_schools,
    "logistic regression, 10,000 rows": logistic_regression,
    "state-space model, 1,000 steps": state_space_model,
    "state-space model, 8 steps unrolled": unrolled_state_space_model,
    "variational autoencoder": vae,
    "variational autoencoder, 10 latents": lambda: vae(LEAKY),
}
