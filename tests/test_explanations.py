"""What `explain` says of a marginalised model: the rule for each choice, and terms counted by hand."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest
from weft.ppl import ModelError

from weft import explain, gen, marginalize, observed, sample

K = 3


def chain(num_steps, first=0):
    def step(z, _):
        z = sample("z", dist.Categorical(jnp.eye(K)[z] * 0.7 + 0.1))
        sample("y", dist.Normal(z, 1.0))
        return z, None

    jax.lax.scan(step, first, length=num_steps)


@gen
def mixture(num_rows):
    weight = sample("weight", dist.Beta(2.0, 2.0))

    def row(_):
        z = sample("z", dist.Bernoulli(weight))
        sample("y", dist.Normal(z, 1.0))

    jax.vmap(row)(jnp.zeros(num_rows))


@gen
def several(num_series, num_steps):
    jax.vmap(lambda _: chain(num_steps))(jnp.zeros(num_series))


@gen
def switches(num):
    on = sample("on", dist.Bernoulli(0.3).expand([num]))
    sample("total", dist.Normal(jnp.sum(on), 1.0))


@gen
def effects(num):
    mean = sample("mean", dist.Normal(0.0, 1.0))
    jax.vmap(lambda _: sample("y", dist.Normal(sample("effect", dist.Normal(mean, 1.0)), 1.0)))(
        jnp.zeros(num)
    )


@gen
def steps(num):
    jax.lax.scan(
        lambda c, _: (c, sample("y", dist.Normal(sample("z", dist.Bernoulli(0.3)), 1.0))),
        0,
        length=num,
    )


def test_rules_and_terms():
    """T steps of a chain take K^2 terms each but the first, which starts at a known state, and K at the end."""
    found = explain(marginalize(mixture, "z"), 8)
    assert found.rules["z"].copies == (8,)
    assert found.terms == {"z": 16}
    assert found.largest == 2

    found = explain(marginalize(gen(chain), "z"), 100)
    assert found.rules["z"].chain == (1, 100, False)
    assert found.terms["z"] == 99 * K**2 + K
    assert found.largest == K**2

    found = explain(marginalize(several, "z"), 5, 20)
    assert found.rules["z"].copies == (5,)
    assert found.rules["z"].chain == (1, 20, False)
    assert found.terms["z"] == 5 * (19 * K**2 + K)

    found = explain(marginalize(gen(chain), "z", parallel=True), 9)
    assert found.rules["z"].chain == (1, 9, True)
    assert found.terms["z"] == 7 * K**3 + K**2 + K  # 8 links take 7 products; the first, the last

    found = explain(marginalize(switches, "on", joint=True), 6)
    assert found.rules["on"].joint == 6
    assert found.terms["on"] == 2**6

    found = explain(marginalize(effects, "mean", "effect"), 4)
    assert found.rules["effect"].dimension == 1
    assert found.rules["effect"].copies == (4,)
    assert found.terms == {}
    double = explain(marginalize(effects, "mean", "effect"), 8)
    assert double.flops["effect"] == 2 * found.flops["effect"]  # linear in copies
    assert "1 number" in str(found)
    assert "flops" in str(found)

    found = explain(marginalize(steps, "z"), 7)
    assert found.rules["z"].chain == (0, 7, False)
    assert found.terms["z"] == 14


def test_how_it_prints():
    text = str(explain(marginalize(several, "z"), 5, 20))
    assert text.splitlines() == [
        "'several': 1 choice summed out, 870 terms in all, 9 in the largest table",
        "  choice  distribution      table     rule                                         terms",
        "  z       CategoricalProbs  3 values  copy by copy, 5; chain of order 1, 20 steps  870",
    ]
    assert str(explain(mixture, 8)) == "'mixture': nothing is summed out"


def test_programs_and_targets():
    program = marginalize(gen(chain), "z")(5)
    y = observed(jnp.zeros(5), where=jnp.arange(5) < 3, missing="drop")
    partly = program.given({"y": observed(jnp.zeros(5), where=jnp.arange(5) < 3)})
    for model in (program, program.given({"y": jnp.zeros(5)}), program.given({"y": y}), partly):
        assert explain(model).terms["z"] == 4 * K**2 + K


def test_what_cannot_be_summed_is_refused():
    with pytest.raises(ModelError, match="joint=True"):
        explain(marginalize(switches, "on"), 6)
    with pytest.raises(ModelError, match="max_terms"):
        explain(marginalize(switches, "on", joint=True), 40)
