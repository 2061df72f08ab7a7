"""How the nouns print: one screen, addresses, shapes and axes, never what an array holds."""

import functools
import html
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from weft.inference import Draws, elbo, enumeration, fit, hmc, importance, nuts
from weft.ppl import LocScale, Trace, block, condition, noncentered

from weft import deterministic, expect, factor, gen, observed, repeat, sample

pytestmark = pytest.mark.slow  # once is enough: not in every lane

KEY = jax.random.key(0)
N = dist.Normal

LINES, COLUMNS = 40, 140


@gen
def schools(sigma: Any) -> Any:
    """Eight schools, with a site of every kind."""
    mu = sample("mu", N(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(5.0))
    sample("part", gen(lambda: sample("pair", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2))))())
    sample("beta", N(jnp.zeros(3), 1.0), dims=("feature",))
    lax.cond(mu > 0, lambda: sample("left", N(0.0, 1.0)), lambda: sample("right", N(0.0, 1.0)))
    factor("soft", -tau)

    def school(s: Any) -> Any:
        theta = sample("theta", N(mu, tau))
        deterministic("shift", theta - mu)
        return sample("y", N(theta, s))

    return jax.vmap(school, axis_name="school")(sigma)


SIGMA = jnp.full(8, 12.345678)
DATA = jnp.full(8, 3.1415926)


@gen
def crowded() -> None:
    """More sites than lines on a screen, of long names, under many axes."""
    for i in range(60):
        repeat(
            lambda i=i: repeat(
                lambda: sample(f"a_name_that_tells_all_there_is_to_tell_{i}", N(0.0, 1.0)),
                3,
                axis_name="inner_axis",
            ),
            2,
            axis_name="an_outer_axis_with_a_name",
        )


@gen
def deep(levels: int = 8) -> Any:
    if levels == 0:
        return sample("a_rather_long_name_at_the_bottom_of_it", N(jnp.zeros((2, 3, 4, 5)), 1.0))
    return sample("a_level_of_nesting", deep(levels - 1))


@functools.cache
def draws() -> Draws:
    shapes = {"mu": (), "tau": (), "theta": (8,)}
    choices = {
        a: np.full((2, 5, *s), 2.7182818) + np.arange(5).reshape(5, *(1 for _ in s))
        for a, s in shapes.items()
    }
    program = gen(_plain)(SIGMA)
    return Draws(
        choices=choices,
        derived={},
        active={a: np.ones((), bool) for a in choices},
        stats={"lp": np.zeros((2, 5)), "diverging": np.zeros((2, 5), bool)},
        target=program.given({"y": DATA}),
    )


def _plain(sigma: Any) -> Any:
    mu, tau = sample("mu", N(0.0, 5.0)), sample("tau", dist.HalfCauchy(5.0))
    return jax.vmap(lambda s: sample("y", N(sample("theta", N(mu, tau)), s)), axis_name="school")(
        sigma
    )


def zeros(program: Any) -> Trace:
    """A trace of zeros, without compiling anything."""
    choices = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), program.shapes())
    return Trace(
        choices, jax.tree.map(lambda x: np.ones((), bool), choices), {}, jnp.zeros(()), None
    )


@functools.cache
def particles() -> Any:
    return importance(num_particles=5).run(
        KEY, gen(_plain)(SIGMA).given({"y": DATA}), progress=False
    )


@functools.cache
def fitted() -> Any:
    target = gen(lambda: sample("y", N(sample("x", N(0.0, 1.0)), 1.0)))().given({"y": 1.0})
    guide = gen(lambda p: sample("x", N(p["m"], 1.0)))
    return fit(
        KEY, elbo(target, guide), {"m": jnp.zeros(())}, optax.sgd(0.1), num_steps=2, progress=False
    )


def target() -> Any:
    return schools(SIGMA).given({"y": DATA})


def partial_target() -> Any:
    return schools(SIGMA).given({"y": observed(DATA, where=np.arange(8) < 5), "mu": 1.0})


NOUNS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "model": (lambda: schools, ("schools", "sigma")),
    "program": (
        lambda: schools(SIGMA),
        ("schools", "theta", "(school=8)", "feature=3", "part.pair", "HalfCauchy", "float32"),
    ),
    "program of lanes": (
        lambda: jax.vmap(schools)(jnp.stack([SIGMA, SIGMA])),
        ("(2, school=8)", "lane"),
    ),
    "transformed program": (
        lambda: condition(noncentered(schools, "theta"), {"mu": 1.0})(SIGMA),
        ("theta_base", "condition"),
    ),
    "blocked program": (lambda: block(schools, "mu")(SIGMA), ("hidden",)),
    "crowded program": (lambda: crowded(), ("60 sites", "more")),
    "deep program": (lambda: deep(), ("bottom_of_it",)),
    "trace": (
        lambda: schools(SIGMA).simulate(KEY),
        ("part.pair", "theta", "(8,)", "shift", "log density"),
    ),
    "crowded trace": (lambda: zeros(crowded()), ("more",)),
    "deep trace": (lambda: zeros(deep()), ("bottom_of_it",)),
    "batched trace": (
        lambda: jax.vmap(schools(SIGMA).simulate)(jax.random.split(KEY, 2)),
        ("(2, 8)",),
    ),
    "target": (target, ("schools", "observed", "latent", "(school=8)")),
    "target in part": (partial_target, ("observed in part", "latent")),
    "crowded target": (lambda: crowded().given(), ("60",)),
    "unconstrained": (lambda: target().unconstrain(), ("schools", "theta", "part.pair", "(8,)")),
    "flat": (lambda: target().unconstrain().flat, ("schools", "theta", "17")),
    "crowded unconstrained": (lambda: crowded().given().unconstrain(), ()),
    "site": (lambda: schools(SIGMA).sites["theta"], ("theta", "school")),
    "observed": (lambda: observed(DATA, where=np.arange(8) < 5), ("(8,)", "impute")),
    "expectation": (lambda: expect(_plain), ("_plain",)),
    "strategy": (lambda: LocScale(0.5), ("0.5",)),
    "nuts": (lambda: nuts(num_warmup=3, num_samples=5, num_chains=2), ("nuts", "num_samples=5")),
    "hmc": (lambda: hmc(step_size=0.1, num_steps=3), ("hmc", "num_steps=3")),
    "importance": (lambda: importance(num_particles=7), ("importance", "num_particles=7")),
    "importance from a guide": (
        lambda: importance(schools(SIGMA), num_particles=7),
        ("importance", "num_particles=7"),
    ),
    "enumeration": (lambda: enumeration(), ("enumeration",)),
    "draws": (draws, ("mu", "theta", "mean")),
    "particles": (particles, ("theta", "evidence", "mean")),
    "fit": (fitted, ("2",)),
}

IN_NOTEBOOKS = [
    "model", "program", "trace", "target", "unconstrained", "flat", "nuts", "importance", "enumeration", "draws",
    "particles", "fit",
]  # fmt: skip


@pytest.mark.parametrize("noun", NOUNS)
def test_one_screen(noun: str) -> None:
    make, shown = NOUNS[noun]
    text = repr(make())
    lines = text.splitlines()
    assert len(lines) <= LINES, text
    assert max(map(len, lines)) < COLUMNS, text
    assert not [s for s in shown if s not in text], text


@pytest.mark.parametrize(
    "noun", [n for n in NOUNS if n not in ("draws", "particles", "fit", "strategy")]
)
def test_no_array_contents(noun: str) -> None:
    """Neither data nor draws; summaries are what results are for."""
    text = repr(NOUNS[noun][0]())
    assert "Array(" not in text
    assert "array(" not in text
    for number in ("12.34", "3.14"):
        assert number not in text
    assert not re.search(r"\[\s*[-\d.]+[ ,]+[-\d.]+", text), text


@pytest.mark.parametrize("noun", IN_NOTEBOOKS)
def test_html(noun: str) -> None:
    value = NOUNS[noun][0]()
    page = value._repr_html_()
    assert page.lstrip().startswith("<")
    plain = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for word in NOUNS[noun][1]:
        assert word in plain
    assert "<lambda>" not in page  # what is no tag is escaped


def test_roles() -> None:
    rows = {line.split()[0]: line for line in repr(partial_target()).splitlines()[1:]}
    assert "observed in part" in rows["y"]
    assert "observed" in rows["mu"]
    assert "latent" in rows["tau"]
    assert "latent (may be idle)" in rows["left"]
    assert "factor" in rows["soft"]
    assert "deterministic" in rows["shift"]
    assert "positive" in rows["tau"]
    program = {line.split()[0]: line for line in repr(schools(SIGMA)).splitlines()[1:]}
    assert "choice" in program["mu"]
    assert "(school=8)" in program["theta"]
    assert "(feature=3)" in program["beta"]
    assert "unnormalised" in repr(schools(SIGMA)).splitlines()[0]


def test_printing_under_tracing() -> None:
    """A print inside a jitted function, a vmap, a gradient or a model shows what is known there."""
    seen: list[str] = []

    def note(*things: Any) -> None:
        seen.extend(repr(x) for x in things)
        seen.extend(x._repr_html_() for x in things if hasattr(x, "_repr_html_"))

    def inside(sigma: Any, y: Any, key: Any) -> Any:
        program = gen(_plain)(sigma)
        target = program.given({"y": y})
        trace = program.simulate(key)
        note(schools, program, target, trace, target.unconstrain(), target.unconstrain().flat)
        note(observed(y, where=y > 0), program.given({"y": observed(y, where=y > 0)}))
        return target.log_density({"mu": 0.0, "tau": 1.0, "theta": y})

    jax.jit(inside)(SIGMA, DATA, KEY)
    jax.vmap(inside, (None, 0, None))(SIGMA, jnp.stack([DATA, DATA]), KEY)
    jax.grad(inside)(SIGMA, DATA, KEY)

    @gen
    def model(sigma: Any) -> Any:
        program = gen(_plain)(sigma)
        note(program)
        return sample("part", program)

    note(model(SIGMA).simulate(KEY))
    assert all(seen)
    assert not any("Traced" in s or "Tracer" in s for s in seen)
    assert all(len(s.splitlines()) <= LINES for s in seen)


def test_printing_does_not_need_a_density() -> None:
    """Programs of which little can be asked print all the same."""
    waiting = gen(
        lambda: lax.while_loop(
            lambda s: s < 2.0, lambda s: s + sample("step", dist.Exponential(1.0)), 0.0
        )
    )()
    assert "hidden" in repr(waiting)
    assert "nan" in repr(waiting.simulate(KEY))
    assert "0 sites" in repr(gen(lambda: 1.0)())
    assert repr(gen(lambda: 1.0)().simulate(KEY))


def test_a_program_that_cannot_be_staged_prints() -> None:
    """In a notebook and in a debugger, an error must not stand in for a picture."""
    broken = gen(lambda: sample("a", N(0.0, 1.0)) + sample("a", N(0.0, 1.0)))()
    text = repr(broken)
    assert "'a' is used twice" in text
    assert len(text.splitlines()) <= LINES
