"""The protocol of Feynman-Kac models: hooks that cannot be misspelt, and what a run makes of those that are there."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import integrate, stats
from weft.inference import FeynmanKac, Resampling, filtering, multinomial, smc, smc2, systematic
from weft.ppl import DensityError, ModelError, WeftError

from weft import gen, sample

KEY = jax.random.key(4)


class Walk(FeynmanKac):
    """A walk that is seen with noise."""

    num_steps: int = 6
    seen: float = 0.3

    def init(self, key: Any) -> Any:
        return self.weigh(jax.random.normal(key))

    def step(self, key: Any, t: Any, x: Any) -> Any:
        return self.weigh(x + jax.random.normal(key))

    def weigh(self, x: Any) -> Any:
        return x, -0.5 * (x - self.seen) ** 2


def model(**members: Any) -> Any:
    return type("Model", (Walk,), members)


def run(of: Any, num: int = 200, **settings: Any) -> Any:
    return smc(of, num, **settings).run(KEY, progress=False)


MISSPELT = {
    "rejuvinate": (lambda self, key, t, particles, kernel: None, "rejuvenate(self, key, t, par"),
    "lookahed": (lambda self, t, x: 0.0, "lookahead(self, t, particle)"),
    "LOOKAHEAD": (lambda self, t, x: 0.0, "lookahead(self, t, particle)"),
    "look_ahead": (lambda self, t, x: 0.0, "lookahead(self, t, particle)"),
    "adpat": (lambda self, t, x, w: x, "adapt(self, t, particles, log_weights)"),
    "adapts": (lambda self, x: x, "adapt(self, t, particles, log_weights)"),
    "finish": (lambda self, particles: True, "finished(self, particles)"),
    "observations": (lambda self, t: "y", "observation(self, t)"),
    "log_transitions": (lambda self, t, x, now: 0.0, "log_transition(self, t, particle, now)"),
    "choice": (staticmethod(lambda particle: particle), "choices(self, particle)"),
    "keep_lineage": (True, "keeps_lineage"),
    "is_closed": (property(lambda self: True), None),
    "closd": (property(lambda self: True), "closed"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_hook_is_an_error(name: str) -> None:
    member, wanted = MISSPELT[name]
    made = model(**{name: member})
    if wanted is None:
        made()
        return
    with pytest.raises(ModelError) as error:
        made()
    assert f"Model.{name} is no hook" in str(error.value)
    assert f"did you mean {wanted}" in str(error.value)
    assert f"_{name}" in str(error.value)  # the cure


WRONG = {
    "step": lambda self, key, x: None,
    "rejuvenate": lambda self, key, particles: None,
    "lookahead": lambda self, t: None,
    "log_transition": lambda self, particle, t, now: None,
    "adapt": lambda self, t, x, w, more: None,
    "finished": lambda self: None,
    "choices": 3,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_signature_is_an_error(name: str) -> None:
    with pytest.raises(ModelError, match=rf"Model.{name}.* is called .*as {name}\(self, "):
        model(**{name: WRONG[name]})()


@pytest.mark.parametrize("name", ["num_steps", "closed", "keeps_lineage"])
def test_an_attribute_that_is_written_as_a_method(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} is an attribute, not a method"):
        model(**{name: lambda self: True})()


class First:
    """Not a model, but a part of one."""

    def lookahead(self, t: Any, x: Any) -> Any:
        return 0.3 * x


def hint(share: float, t: Any, x: Any) -> Any:
    return share * x


def test_hooks_in_any_form() -> None:
    """A hook may be any function, in a class or a field; one that would not be called as meant is refused."""

    class Field(Walk):
        lookahead: Any

    class Mixed(First, Walk):
        pass

    forms = {
        "static": model(lookahead=staticmethod(lambda t, x: 0.3 * x)),
        "class": model(lookahead=classmethod(lambda cls, t, x: 0.3 * x)),
        "partial": model(lookahead=functools.partial(hint, 0.3)),
        "mixin": Mixed,
        "field": lambda: Field(lookahead=functools.partial(hint, 0.3)),
    }
    found = {name: float(run(made()).log_evidence) for name, made in forms.items()}
    assert len(set(found.values())) == 1, found
    assert found["mixin"] != float(run(Walk()).log_evidence)
    for wrong in (lambda x: x, Walk.lookahead):
        with pytest.raises(ModelError, match="lookahead is called by position .* without self"):
            Field(lookahead=wrong)
    with pytest.raises(ModelError, match="without self"):
        Field()

    class Late(Walk, First):
        pass

    with pytest.raises(
        ModelError, match="of FeynmanKac, which hides First.lookahead: .*Late.First"
    ):
        Late()

    class Near(Walk):  # data, whatever they hold
        preference: Any = None

    assert Near(preference=lambda t, x: x).num_steps == 6


def any_arguments(*args: Any) -> Any:
    return 0.3 * args[-1]


@pytest.mark.parametrize("hint", [any_arguments, max, jax.jit(lambda self, t, x: 0.3 * x)])
def test_a_hook_whose_arguments_are_not_known_is_taken(hint: Any) -> None:
    assert model(lookahead=hint)().num_steps == 6


RETURNED = {
    "step": [
        (
            lambda self, key, t, x: x,
            r"step\(self, .* a particle and the logarithm .* got float32\[\]",
        ),
        (lambda self, key, t, x: (x, 0.0, 0.0), "got .float32.., float32"),
        (lambda self, key, t, x: None, "got None"),
        (lambda self, key, t, x: (x, None), "got .float32.., None"),
        (lambda self, key, t, x: ("here", 0.0), "no array"),
        (lambda self, key, t, x: (x, jnp.zeros(3)), r"one potential, .* float32\[3\]"),
        (lambda self, key, t, x: ({"x": x}, 0.0), r"changes the particle: .* \{x: float32\[\]\}"),
    ],
    "adapt": [(lambda self, t, x, w: x[:3], r"adapt\(self.* changes the .*\[200\] .*\[3\]")],
    "lookahead": [(lambda self, t, x: jnp.zeros(2), r"lookahead\(self.* one number.*\[2\]")],
    "finished": [(lambda self, x: x > 0, r"finished\(self.* one number, got bool\[200\]")],
    "rejuvenate": [
        (lambda self, key, t, x, kernel: x, "a dict of scalars, got float32"),
        (lambda self, key, t, x, kernel: (x[0], {}), r"rejuvenate\(self.* changes the particle"),
    ],
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_hook_may_not_give(name: str) -> None:
    for member, said in RETURNED[name]:
        with pytest.raises(ModelError, match=said):
            run(model(**{name: member})())


def test_a_hook_in_a_field_is_a_hook() -> None:
    class Adapting(Walk):
        adapt: Any

    collapse = lambda t, x, w: jnp.broadcast_to(x[0], x.shape)  # noqa: E731
    assert np.isnan(run(Adapting(adapt=collapse)).log_evidence_variance)

    class Moving(Walk):
        rejuvenate: Any

    still = Moving(rejuvenate=lambda key, t, x, kernel: (x, {"kernel": jnp.float32(kernel)}))
    found = run(still, threshold=1.0, rejuvenate=2.0)
    np.testing.assert_array_equal(found.path.info["kernel"], [0, 2, 2, 2, 2, 2])


def test_helpers_and_data_may_have_other_names() -> None:
    class Series(Walk):
        observations: Any = None  # data, and no hook that is called
        close: Any = None
        path: Any = None

        def transition(self, key: Any, t: Any, x: Any) -> Any:
            return x

        def finish(self) -> None:
            return None

        def potential(self, t: Any, x: Any) -> Any:
            return x

        def _lookahed(self, t: Any, x: Any) -> Any:
            return x

    assert Series(close=jnp.ones(3)).num_steps == 6

    class Jitted(Walk):
        @eqx.filter_jit
        def step(self, key: Any, t: Any, x: Any) -> Any:
            return self.weigh(x + jax.random.normal(key))

    np.testing.assert_allclose(run(Jitted()).log_evidence, run(Walk()).log_evidence)


def test_a_field_may_not_stand_where_a_method_is_called() -> None:
    class Model(Walk):
        lookahead: Any = None

    with pytest.raises(ModelError, match="lookahead is called as .* here NoneType"):
        Model()


def test_an_equinox_module_with_the_methods_is_a_model() -> None:
    class Model(eqx.Module):  # a walk of which four steps are counted, each with weight 2
        scale: float = 1.0
        num_steps: int = 4

        def init(self, key: Any) -> Any:
            return jnp.zeros(()), jnp.log(2.0)

        def step(self, key: Any, t: Any, x: Any) -> Any:
            if self.scale > 0:
                x = x + self.scale * jax.random.normal(key)
            return x, jnp.log(2.0)

        def finished(self, particles: Any) -> Any:
            return jnp.bool_(True)

    class Misspelt(Model):
        def lookahed(self, t: Any, particle: Any) -> Any:
            return particle

    found = run(Model())
    np.testing.assert_allclose(found.log_evidence, np.log(2.0), rtol=1e-6)  # `finished` was called
    target = level().given({"y": 1.0})
    made = smc(lambda target: Model(), 10).run(KEY, target, progress=False)
    np.testing.assert_allclose(made.log_evidence, np.log(2.0), rtol=1e-6)
    with pytest.raises(ModelError, match="Misspelt.lookahed is no hook of FeynmanKac"):
        smc(Misspelt())


def test_what_is_no_model_is_refused_with_the_cure() -> None:
    class Half(eqx.Module):
        num_steps: int = 3

        def init(self, key: Any) -> Any:
            return jnp.zeros(()), 0.0

    with pytest.raises(TypeError, match="or an equinox.Module that has them.*got Half"):
        smc(Half())
    made = smc(lambda target: Half())
    with pytest.raises(TypeError, match="got Half"):
        made.run(KEY, level().given({"y": 1.0}), progress=False)
    with pytest.raises(TypeError, match="abstract"):
        FeynmanKac()  # type: ignore[abstract]
    with pytest.raises(WeftError, match="takes filtering"):
        smc(Walk()).draw_posterior(level().given({"y": 1.0}))
    with pytest.raises(ModelError, match=r"Walk has no replay\(self, t, particle, now\)"):
        Walk().replay(jnp.int32(0), None, None)


@gen
def level() -> None:
    x = sample("x", dist.Normal(0.0, 1.0))
    sample("y", dist.Normal(x, 1.0))


def test_numbers_of_a_model_stay_numbers() -> None:
    """Methods branch on them, in every part of a run; and another number is another run."""

    class Noisy(Walk):
        noise: float = 0.0
        label: str = "seen"

        def step(self, key: Any, t: Any, x: Any) -> Any:
            assert type(self.noise) is float
            if self.noise > 0:
                x = x + self.noise * jax.random.normal(key)
            return self.weigh(x)

        def choices(self, particle: Any) -> Any:
            return {self.label: particle} if self.noise >= 0 else {}

    still, moving = (run(Noisy(noise=noise), history="full") for noise in (0.0, 0.5))
    assert len(np.unique(still.choices["seen"])) <= len(np.unique(still.path.particles[0]))
    assert len(np.unique(moving.choices["seen"])) == 200
    jitted = jax.jit(lambda k: smc(Noisy(), 200, history="full").run(k, progress=False))(KEY)
    np.testing.assert_allclose(jitted.log_evidence, still.log_evidence, rtol=1e-6)


def test_numbers_and_arrays_of_numpy() -> None:
    """Numbers are those of Python, so that they may be sizes; arrays are those of JAX, which a step can index."""

    class Series(Walk):
        y: Any = None
        scale: Any = 1.0

        def step(self, key: Any, t: Any, x: Any) -> Any:
            return self.weigh(x + self.scale * jax.random.normal(key) + self.y[t])

        def choices(self, particle: Any) -> Any:
            return {"x": particle + self.y[jnp.int32(particle * 0)]}

    y = np.zeros(6)
    found = run(Series(np.int64(6), y=y, scale=np.float64(1.0)), np.int64(200))
    same = run(Series(y=jnp.asarray(y)))
    np.testing.assert_array_equal(found.log_evidence, same.log_evidence)
    np.testing.assert_array_equal(found.choices["x"], same.choices["x"])
    assert type(Series(np.int64(6)).num_steps) is type(smc2(np.int32(20)).num_moves) is int

    class Bare(eqx.Module):
        num_steps: Any
        init = Walk.init
        step = Walk.step
        weigh = Walk.weigh
        seen: Any = np.float64(0.3)

    taken: Any = smc(Bare(np.int64(6))).model
    assert type(taken.num_steps) is int
    assert type(taken.seen) is float


@pytest.mark.parametrize("steps", [6.0, jnp.array(6), "six", None, 0])
def test_a_number_of_steps_that_is_none(steps: Any) -> None:
    with pytest.raises(ModelError, match=r"num_steps must be a Python integer|has no step"):
        run(Walk(steps))
    with pytest.raises(WeftError, match="threshold is a share"):
        smc(Walk(), threshold="half")


# --- adapt ------------------------------------------------------------------------------------------------------------


class Collapsing(Walk):
    """All particles become the first: no one descends from itself."""

    def adapt(self, t: Any, particles: Any, log_weights: Any) -> Any:
        return jnp.broadcast_to(particles[0], particles.shape)


class Noting(Walk):
    """What is written into particles leaves them descendants of themselves."""

    keeps_lineage = True

    def adapt(self, t: Any, particles: Any, log_weights: Any) -> Any:
        return particles


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_lineages_are_not_claimed_where_particles_may_be_replaced(threshold: float) -> None:
    found = run(Collapsing(), threshold=threshold)
    assert np.all(np.asarray(found.path.num_ancestors) == 0)
    assert np.isnan(found.log_evidence_variance)
    assert "lineages are not known" in str(found)
    assert "standard error unknown" in str(found)
    for history in ("ancestors", "full"):
        with pytest.raises(WeftError, match="keeps_lineage = True"):
            run(Collapsing(), history=history)
    plain, noted = (run(m, threshold=threshold, history="full") for m in (Walk(), Noting()))
    assert noted.log_evidence_variance == plain.log_evidence_variance
    np.testing.assert_array_equal(noted.path.num_ancestors, plain.path.num_ancestors)


# --- schemes ----------------------------------------------------------------------------------------------------------


def test_the_variance_asks_the_scheme_and_not_its_name() -> None:
    def own(key: Any, log_weights: Any, num_samples: int) -> Any:
        return multinomial(key, log_weights, num_samples)

    runs = {
        name: run(Walk(), resample=scheme, threshold=1.0)
        for name, scheme in {
            "ours": multinomial,
            "said": Resampling(own, independent=True),
            "plain": own,
        }.items()
    }
    assert len({float(r.log_evidence) for r in runs.values()}) == 1
    ours, said, plain = (float(r.log_evidence_variance) for r in runs.values())
    assert said == ours
    # Five more generations in which lineages meet by chance.
    np.testing.assert_allclose(plain - ours, 5 * np.log1p(1 / 199), rtol=1e-3)
    assert dataclasses.replace(smc(Walk()), num_particles=3).resample is systematic
    with pytest.raises(TypeError, match="a scheme of weft.inference"):
        smc(Walk(), resample="multinomial")


# --- potentials that are no number ------------------------------------------------------------------------------------


class Failing(Walk):
    """Particles beyond a bound have a potential that is no number, and so had they been impossible."""

    nothing: float = np.nan

    def weigh(self, x: Any) -> Any:
        return x, jnp.where(x > 1.0, self.nothing, -0.5 * (x - self.seen) ** 2)

    def lookahead(self, t: Any, x: Any) -> Any:
        return jnp.where(x < -1.0, jnp.nan, 0.1 * x)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_a_potential_that_is_no_number_counts_as_zero(threshold: float) -> None:
    found = run(Failing(), 500, threshold=threshold)
    same = run(Failing(nothing=-np.inf), 500, threshold=threshold)
    np.testing.assert_array_equal(found.log_weights, same.log_weights)
    np.testing.assert_array_equal(found.log_evidence, same.log_evidence)
    assert np.isfinite(found.log_evidence)
    assert np.all(np.asarray(found.path.undefined) > 0)
    assert not np.any(same.path.undefined)
    number = int(np.sum(found.path.undefined))
    assert f"{number} of 3000 potentials were no number (the first at step 0)" in str(found)
    assert "no number" not in str(same)


def test_if_all_potentials_are_no_number() -> None:
    class Never(Walk):
        def step(self, key: Any, t: Any, x: Any) -> Any:
            return x, jnp.where(t == 3, jnp.nan, 0.0)

    with pytest.raises(
        DensityError, match="at step 3, all weights are zero.*200 potentials are NaN"
    ):
        run(Never())


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_evidence_of_what_cannot_be(threshold: float) -> None:
    """Where a run may not raise, it is zero, also when more steps follow; other lanes are as they were alone."""

    class Ending(Walk):
        end: Any = None

        def step(self, key: Any, t: Any, x: Any) -> Any:
            x, weight = self.weigh(x + jax.random.normal(key))
            return x, jnp.where(t == self.end, -jnp.inf, weight)

        def lookahead(self, t: Any, x: Any) -> Any:
            return jnp.where(t == self.end, -jnp.inf, 0.1 * x)  # it may know

    ends = jnp.array([2, 5, 9])
    found = jax.jit(jax.vmap(lambda end: run(Ending(end=end), threshold=threshold).log_evidence))(
        ends
    )
    assert np.all(found[:2] == -np.inf)
    np.testing.assert_allclose(
        found[2], run(Ending(end=9), threshold=threshold).log_evidence, rtol=1e-5
    )


def test_a_filter_whose_likelihood_is_no_number_somewhere() -> None:
    """The evidence is the integral over states where it is a number, by quadrature."""

    @gen
    def series() -> None:
        def step(x: Any, _: Any) -> Any:
            x = sample("x", dist.Normal(0.8 * x, 1.0))
            sample("y", dist.Normal(jnp.where(x < -0.5, jnp.nan, x), 0.7))
            return x, None

        jax.lax.scan(step, 0.0, length=2)

    n = stats.norm.pdf
    exact = integrate.dblquad(
        lambda b, a: n(a) * n(0.2, a, 0.7) * n(b, 0.8 * a) * n(-0.4, b, 0.7), -0.5, 7, -0.5, 7
    )[0]
    target = series().given({"y": jnp.array([0.2, -0.4])})
    for how in (filtering(), filtering(lookahead=lambda x, t, seen: 0.1 * x)):
        one = smc(how, 20_000)
        found = one.run(KEY, target, progress=False)
        # The standard deviation of the log evidence is about .01.
        np.testing.assert_allclose(found.log_evidence, np.log(exact), atol=0.05)
        jitted = jax.jit(lambda k, one=one: one.run(k, target, progress=False).log_evidence)(KEY)
        np.testing.assert_allclose(jitted, found.log_evidence, rtol=1e-4)
