"""Programs with discrete choices that can be summed out exactly, at most some hundred joint values each.

Each is a `Case`: the program, the choices, and data where not anything goes. Values are constants of the programs;
the oracle is the sum over all joint values (`bruteforce`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from weft.ppl import Model, observed

from weft import factor, gen, loop, mask, repeat, sample

lax = jax.lax
Normal = dist.Normal
MEANS = [-1.0, 0.5, 2.0]
START = [0.2, 0.3, 0.5]
MOVES = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.3, 0.45]]


def means() -> jax.Array:
    return jnp.array(MEANS)


def start() -> Any:
    """The law of a first state."""
    return dist.Categorical(jnp.array(START))


def move(z: Any) -> Any:
    """The law of the state after state `z`."""
    return dist.Categorical(jnp.array(MOVES)[z])


# --- a table of programs --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, the choices that are summed out, and data if they are not just anything."""

    model: Model
    addresses: tuple[str, ...]
    chain: bool = False
    data: Callable[[], dict[str, Any]] = dict
    wildcard: str = ""


CASES: dict[str, Case] = {}


def case(*addresses: str, **settings: Any) -> Callable[[Any], Model]:
    def register(f: Any) -> Model:
        model = gen(f)
        CASES[f.__name__] = Case(model, addresses, **settings)
        return model

    return register


# --- copies ---------------------------------------------------------------------------------------


@case("z")
def mixture_by_vmap():
    loc = sample("loc", Normal(jnp.zeros(3), 2.0))

    def one(x):
        z = sample("z", dist.Categorical(logits=x * jnp.arange(3.0)))
        return sample("y", Normal(loc[z], 1.0))

    return jax.vmap(one)(jnp.array([0.5, -0.5, 1.0]))


@case("z")
def mixture_as_batch_site():
    loc = sample("loc", Normal(jnp.zeros(3), 2.0))
    p = sample("p", dist.Dirichlet(jnp.ones(3)))
    z = sample("z", dist.Categorical(p).expand([3]))
    sample("y", Normal(loc[z], jnp.exp(0.3 * loc[z])))


@case("z")
def nested_vmaps():
    def inner(x, w):
        z = sample("z", dist.Bernoulli(jax.nn.sigmoid(x * w)))
        return sample("y", Normal(x - w * z, 1.0))

    widths = jnp.array([0.5, 1.0, 2.0])
    jax.vmap(lambda x: jax.vmap(lambda w: inner(x, w))(widths))(jnp.array([-1.0, 1.0]))


@case("z")
def batch_under_vmap_of_columns():
    shift = sample("shift", Normal(jnp.zeros((2, 3)), 1.0))

    def column(s):
        z = sample("z", dist.Bernoulli(probs=jnp.array([0.3, 0.6])))
        sample("y", Normal(s + z, 1.0))

    jax.vmap(column, in_axes=1)(shift)


@case("z", "w")
def two_sites_a_lane():
    def one(x):
        z = sample("z", dist.Bernoulli(0.3))
        w = sample("w", dist.Categorical(jnp.where(z == 1, jnp.array(START), jnp.array([1, 0, 0]))))
        return sample("y", Normal(x + means()[w] * (1 + z), 1.0))

    jax.vmap(one)(jnp.array([0.0, 0.5]))


@case("g", "z")
def global_beside_lanes():
    g = sample("g", dist.Categorical(jnp.array(START)))

    def one(x):
        z = sample("z", dist.Bernoulli(jnp.array([0.2, 0.5, 0.9])[g]))
        return sample("y", Normal(x + z * means()[g], 1.0))

    jax.vmap(one)(jnp.array([0.0, 0.5, 1.0]))


@case("g", "z", "w")
def global_beside_lanes_of_lanes():
    g = sample("g", dist.Bernoulli(0.3))

    def inner(x, z):
        w = sample("w", dist.Bernoulli(0.2 + 0.5 * z))
        return sample("y", Normal(x + w - g, 1.0))

    def outer(x):
        z = sample("z", dist.Bernoulli(0.6 - 0.4 * g))
        sample("v", Normal(z, 1.0))
        return jax.vmap(lambda x: inner(x, z))(x)

    jax.vmap(outer)(jnp.array([[0.0, 0.5], [1.0, -0.5]]))


@case("rate")
def global_only():
    rate = sample("rate", dist.DiscreteUniform(1, 4))
    repeat(lambda: sample("y", dist.Exponential(rate)), 3)


@case("k", "u", "b")
def every_finite_family():
    p = sample("p", dist.Beta(2.0, 2.0))
    k = sample("k", dist.Binomial(3, p))
    u = sample("u", dist.DiscreteUniform(-1, 1))
    b = sample("b", dist.Bernoulli(logits=p + u))
    sample("y", Normal(k - u, 1.0 + b))


@case("z")
def multivariate_emissions():
    z = sample("z", dist.Categorical(jnp.array(START)).expand([2]))
    loc = jnp.array([[-1.0, 0.0], [0.5, 1.0], [2.0, 2.0]])
    tril = jnp.array([[[1.0, 0.0], [0.3, 1.0]], [[0.5, 0.0], [-0.2, 1.0]], [[2.0, 0.0], [0, 0.5]]])
    sample("mvn", dist.MultivariateNormal(loc[z], scale_tril=tril[z]))
    sample("full", dist.MultivariateNormal(loc[z], tril[z] @ tril[z].mT))
    sample("simplex", dist.Dirichlet(jnp.exp(loc[z])))
    sample("indep", Normal(loc[z], 1.0).to_event(1))


@case("z", data=lambda: {"hot": [[0, 1, 0], [0, 0, 1]], "count": [[1, 2, 0], [0, 1, 2]]})
def one_hot_emissions():
    p = sample("p", dist.Dirichlet(jnp.ones(3)))

    def one(x):
        z = sample("z", dist.Bernoulli(logits=x))
        probs = jnp.stack([p, jnp.array(START)])[z]
        sample("hot", dist.Multinomial(1, probs))
        sample("count", dist.Multinomial(3, probs))

    jax.vmap(one)(jnp.array([0.3, -0.4]))


@case("z")
def ways_of_picking():
    loc = sample("loc", Normal(jnp.zeros(3), 1.0))
    z = sample("z", dist.Categorical(jnp.array(START)).expand([2]))
    hot = jax.nn.one_hot(z, 3)
    picked = [
        loc[z],
        jnp.where(z == 0, loc[0], jnp.where(z == 1, loc[1], loc[2])),
        jnp.take(loc, z),
        jnp.take_along_axis(jnp.broadcast_to(loc, (2, 3)), z[:, None], -1)[:, 0],
        hot @ loc,
        jnp.sum(hot * loc, -1),
        jnp.select([z == 0, z == 1], [loc[0], loc[1]], loc[2]),
        lax.select_n(z, *(jnp.broadcast_to(x, 2) for x in loc)),
        jnp.einsum("nk,k->n", hot, loc),
        jax.vmap(lambda i: loc[i])(z),
        jax.vmap(lambda i: lax.switch(i, [lambda i=i: loc[i] for i in range(3)]))(z),
        jnp.max(jnp.where(hot == 1, loc, -jnp.inf), -1),
    ]
    for i, value in enumerate(picked):
        sample(f"y{i}", Normal((0.3 + 0.1 * i) * value, 1.0))


@case("z")
def axes_that_move():
    z = sample("z", dist.Bernoulli(0.4).expand([2, 3]))
    x = 0.5 * z + jnp.arange(3.0)
    sample("turned", Normal(x.T, 1.0))
    sample("shaped", Normal(x.reshape(1, 2, 3).transpose(2, 0, 1), 1.0))
    sample("swapped", Normal(jnp.broadcast_to(jnp.swapaxes(x, 0, 1)[None], (2, 3, 2)), 1.0))
    jax.vmap(jax.vmap(lambda x: sample("lane", Normal(x, 1.0))), in_axes=1)(x)


@case("z", "w")
def matrix_of_products():
    """Rows and columns: every row choice meets every column choice, both small by joint values of one."""
    z = sample("z", dist.Bernoulli(0.4))
    w = sample("w", dist.Bernoulli(0.3).expand([4]))
    sample("y", Normal(z + jnp.outer(jnp.arange(3.0), w), 1.0))


@case("part.z", "other.deep.z")
def nested_programs():
    @gen
    def part(x):
        z = sample("z", dist.Bernoulli(0.3))
        return sample("y", Normal(x + z, 1.0))

    @gen
    def outer(x):
        return jax.vmap(lambda x: sample("deep", part(x)))(x)

    y = sample("part", part(0.5))
    sample("other", outer(jnp.array([0.1, 0.2]) * y))


@case("rows.z", wildcard="**.z")
def vmapped_program_as_a_site():
    @gen
    def part(x):
        z = sample("z", start())
        return sample("y", Normal(x * means()[z], 1.0))

    sample("rows", jax.vmap(part)(jnp.array([0.5, 1.0])))


@case("z")
def a_value_that_leaves_the_lanes():
    """A lane's value read again in other lanes, in a batch site and in a jitted function."""
    part = gen(lambda: sample("z", dist.Bernoulli(0.3)))
    z = repeat(lambda: jax.jit(lambda: 1.0 * part.function())(), 3)
    shift = jnp.array([0.1, 0.2, 0.3])
    jax.vmap(lambda z, s: sample("a", Normal(z, 1.0 + s)))(z, shift)
    sample("b", Normal(z + shift, 1.0))
    jax.checkpoint(lambda z: sample("c", Normal(2 * z, 1.0)))(z)


# --- branches -------------------------------------------------------------------------------------


def _branch(p: float, gain: float) -> Callable[[Any], Any]:
    def branch(x):
        z = sample("z", dist.Bernoulli(p))
        sample("y", Normal(x + gain * z, 1.0))
        return gain * z

    return branch


@case("z")
def choice_in_both_branches():
    x = sample("x", Normal(0.0, 1.0))
    value = lax.cond(x > 0.0, _branch(0.3, 1.0), _branch(0.6, -2.0), x)
    sample("w", Normal(value, 1.0))


@case("z")
def choice_in_one_branch():
    x = sample("x", Normal(0.0, 1.0))
    value = lax.cond(x < 0.0, _branch(0.3, 1.0), lambda x: 2.0 * x, x)
    sample("w", Normal(value, 1.0))


@case("z")
def a_branch_for_each_lane():
    x = sample("x", Normal(jnp.zeros(3), 1.0))

    def one(x):
        value = lax.switch(
            (x > 0).astype(int) + (x > 0.3), [_branch(0.3, 1.0), jnp.sin, _branch(0.5, 2.0)], x
        )
        return sample("w", Normal(value, 1.0))

    jax.vmap(one)(x)


@case("b", "z", "v")
def a_branch_that_is_summed_over():
    b = sample("b", dist.Categorical(jnp.array(START)))

    def third(x):
        sample("y", Normal(x, 3.0))
        return 1.0 * sample("v", start())

    value = lax.switch(b, [_branch(0.3, 1.0), _branch(0.6, -2.0), third], 0.5)
    sample("w", Normal(value, 1.0))


@case("b", "z")
def a_branch_that_is_summed_over_for_each_lane():
    def one(x):
        b = sample("b", dist.Bernoulli(0.3))
        value = lax.cond(b == 1, _branch(0.3, 1.0), _branch(0.6, -2.0), x)
        return sample("w", Normal(value, 1.0))

    jax.vmap(one)(jnp.array([0.5, -0.5]))


@case("z")
def behind_a_mask():
    x = sample("x", Normal(jnp.zeros(3), 1.0))

    def one(x):
        z = sample("z", dist.Bernoulli(0.3))
        sample("y", Normal(x + z, 1.0))

    jax.vmap(lambda x, on: mask(one, on)(x))(x, jnp.array([True, False, True]))


# --- chains ---------------------------------------------------------------------------------------


@case("z", chain=True)
def chain():
    loc = sample("loc", Normal(jnp.zeros(3), 1.0))

    def step(z, t):
        z = sample("z", move(z))
        sample("y", Normal(loc[z] + 0.1 * t, 1.0))
        return z, None

    lax.scan(step, 0, jnp.arange(4.0))


@case("first", "z", chain=True)
def chain_from_a_first_state():
    loc = sample("loc", Normal(jnp.zeros(3), 1.0))
    first = sample("first", start())
    sample("y0", Normal(loc[first], 1.0))

    def step(z, _):
        z = sample("z", move(z))
        sample("y", Normal(loc[z], 1.0))
        return z, None

    last, _ = lax.scan(step, first, None, length=3)
    sample("after", Normal(loc[last], 0.5))


@case("first", "z", chain=True)
def chain_read_at_both_ends():
    """The first state is read after the scan, too: it is kept beside the last."""
    first = sample("first", start())

    def step(z, _):
        z = sample("z", move(z))
        sample("y", Normal(means()[z], 1.0))
        return z, None

    last, _ = lax.scan(step, first, None, length=4)
    sample("after", Normal(means()[last] - means()[first], 0.5))


@case("z", chain=True)
def chain_of_second_order():
    def step(carry, _):
        a, b = carry
        z = sample("z", dist.Bernoulli(jax.nn.sigmoid(0.5 * a - 0.8 * b + 0.2)))
        sample("y", Normal(z + 0.3 * a, 1.0))
        return (z, a), None

    lax.scan(step, (0, 1), None, length=5)


@case("z", chain=True)
def switching():
    """Continuous choices in the carry, read by later steps."""

    def step(carry, _):
        z, x = carry
        z = sample("z", move(z))
        x = sample("x", Normal(0.5 * x + means()[z], 0.7))
        sample("y", Normal(x, 0.5))
        return (z, x), x

    sample("w", Normal(lax.scan(step, (0, 0.0), None, length=4)[1].sum(), 1.0))


@case("z", chain=True)
def soft_evidence():
    gain = sample("gain", Normal(0.0, 1.0))

    def step(z, u):
        z = sample("z", move(z))
        factor("f", jnp.sin(gain * u * z))
        return z, None

    lax.scan(step, 0, jnp.arange(4.0), reverse=True)


@case(
    "z",
    chain=True,
    data=lambda: {"y": observed([0.3, 9.0, -1.0, 9.0], where=_odd(), missing="drop")},
)
def chain_with_missing_data_dropped():
    _emitting(4)


@case("z", chain=True, data=lambda: {"y": observed([0.3, 9.0, -1.0, 9.0], where=_odd())})
def chain_with_missing_data_imputed():
    _emitting(4)


@case("z", chain=True, data=lambda: {"y": [0.3, -0.2]})
def chain_with_a_forecast():
    _emitting(4)


def _odd() -> Any:
    return jnp.array([True, False, True, False])


def _emitting(length: int) -> None:
    def step(z, _):
        z = sample("z", move(z))
        sample("y", Normal(means()[z], 1.0))
        return z, None

    lax.scan(step, 1, None, length=length)


@case("z", chain=True)
def ragged_chains():
    shift = sample("shift", Normal(0.0, 1.0))

    def series(n, x):
        def step(z, t):
            def body(z):
                z = sample("z", move(z))
                sample("y", Normal(means()[z] + shift * x, 1.0))
                return z

            return mask(body, t < n)(z), None

        lax.scan(step, 0, jnp.arange(3))

    jax.vmap(series)(jnp.array([1, 3]), jnp.array([0.5, 1.0]))


@case("first", "z", chain=True)
def a_chain_a_lane():
    def series(x):
        def step(z, t):
            z = sample("z", move(z))
            sample("y", Normal(means()[z] + x, 1.0))
            return z, None

        last, _ = lax.scan(step, sample("first", start()), jnp.arange(2.0))
        return sample("after", Normal(x * means()[last], 1.0))

    jax.vmap(series)(jnp.array([0.5, -1.0]))


@case("first", "z", chain=True)
def many_states_in_one_scan():
    first = sample("first", start().expand([2]))

    def step(z, t):
        z = sample("z", move(z))
        sample("y", Normal(means()[z], 1.0))
        return z, None

    last, _ = lax.scan(step, first, jnp.arange(2.0))
    sample("after", Normal(means()[last], 1.0))


@case("z", chain=True)
def lanes_in_a_step():
    def step(z, t):
        def one(z, x):
            z = sample("z", dist.Bernoulli(jnp.where(z == 1, 0.8, 0.3)))
            sample("y", Normal(z + x, 1.0))
            return z

        return jax.vmap(one)(z, jnp.array([0.1, 0.2])), None

    last, _ = lax.scan(step, jnp.zeros(2, int), jnp.arange(3.0))
    jax.vmap(lambda z: sample("after", Normal(z, 1.0)))(last)


@case("a", "b", chain=True)
def factorial_chain():
    def step(carry, _):
        a, b = carry
        a = sample("a", dist.Bernoulli(jnp.where(a == 1, 0.8, 0.3)))
        b = sample("b", dist.Bernoulli(jnp.where(b == 1, 0.7, 0.4)))
        sample("y", Normal(a + 2.0 * b, 1.0))
        return (a, b), None

    lax.scan(step, (0, 1), None, length=4)


@case("new", "z", "left", chain=True)
def semi_markov():
    """Durations by an augmented state: a counter of steps left, drawn anew with each new state."""

    def step(carry, _):
        z, left = carry
        new = sample("new", dist.Bernoulli(1.0 * (left == 0)))
        z = sample("z", dist.Categorical(jnp.where(new == 1, jnp.array(MOVES)[z], jnp.eye(3)[z])))
        again = jnp.eye(2)[jnp.maximum(left - 1, 0)]
        left = sample("left", dist.Categorical(jnp.where(new == 1, jnp.array([0.3, 0.7]), again)))
        sample("y", Normal(means()[z], 1.0))
        return (z, left), None

    lax.scan(step, (0, 0), None, length=3)


@case("z", chain=True)
def functions_of_the_state_in_the_carry():
    def step(carry, _):
        hot, loc = carry
        z = sample("z", dist.Categorical(hot @ jnp.array(MOVES)))
        sample("y", Normal(means()[z] + loc, 1.0))
        return (jax.nn.one_hot(z, 3), means()[z]), None

    hot, loc = lax.scan(step, (jnp.array(START), 0.0), None, length=4)[0]
    sample("after", Normal(hot @ means() + loc, 1.0))


@case("z", chain=True)
def chain_with_branches():
    def step(z, x):
        def stay(z):
            return z

        def go(z):
            z = sample("z", move(z))
            sample("y", Normal(means()[z] + x, 1.0))
            return z

        return lax.cond(x > 0, go, stay, z), None

    last, _ = lax.scan(step, 0, jnp.array([0.5, -1.0, 1.0, 0.3]))
    sample("after", Normal(means()[last], 1.0))


@case("z", chain=True)
def steps_that_are_independent():
    def step(c, x):
        z = sample("z", start())
        c = sample("y", Normal(means()[z] + c, 1.0))
        return c, None

    lax.scan(step, 0.5, jnp.arange(3.0))


@case("g", "z", chain=True)
def chain_under_a_global_choice():
    g = sample("g", dist.Bernoulli(0.4))

    def step(z, _):
        z = sample("z", dist.Categorical(jnp.where(g == 1, jnp.array(MOVES)[z], jnp.array(START))))
        sample("y", Normal(means()[z], 1.0 + g))
        return z, None

    lax.scan(step, 0, None, length=3)


@case("g", "z", chain=True)
def chain_in_a_branch():
    g = sample("g", dist.Bernoulli(0.4))

    def yes(x):
        def step(z, _):
            z = sample("z", move(z))
            sample("y", Normal(means()[z] + x, 1.0))
            return z, None

        return means()[lax.scan(step, 0, None, length=3)[0]]

    def no(x):
        def step(c, _):
            return sample("y", Normal(c, 2.0)), None

        return lax.scan(step, x, None, length=3)[0] * 0.0

    sample("after", Normal(lax.cond(g == 1, yes, no, 0.5), 1.0))


@case("a", "b", chain=True)
def chain_after_a_chain():
    """The state goes from one scan into the next."""

    def first(z, _):
        z = sample("a", move(z))
        sample("y", Normal(means()[z], 1.0))
        return z, None

    def second(z, _):
        z = sample("b", move(z))
        sample("x", Normal(means()[z], 1.0))
        return z, None

    z, _ = lax.scan(first, 0, None, length=2)
    lax.scan(second, z, None, length=3, reverse=True)


@case("z", "w", chain=True)
def chain_in_a_step():
    """Scans in a scan: each inner chain starts from the outer state."""

    def inner(w, _):
        w = sample("w", move(w))
        sample("y", Normal(means()[w], 1.0))
        return w, None

    def outer(z, x):
        z = sample("z", move(z))
        last, _ = lax.scan(inner, z, None, length=2)
        sample("v", Normal(x + means()[last], 1.0))
        return z, None

    lax.scan(outer, 0, jnp.array([0.2, 0.4]))


@case("z", chain=True)
def bounded_loop_and_counted_loop():
    def body(i, z):
        z = sample("z", move(z))
        sample("y", Normal(means()[z] + i, 1.0))
        return z

    sample("after", Normal(means()[lax.fori_loop(0, 3, body, 0)], 1.0))


@case("z", chain=True)
def bounded_loop():
    def body(carry):
        n, z = carry
        z = sample("z", move(z))
        sample("y", Normal(means()[z] + n, 1.0))
        return n + 1, z

    _, last = loop(lambda c: c[0] < 2, body, 3, (0, 1))
    sample("after", Normal(means()[last], 1.0))
