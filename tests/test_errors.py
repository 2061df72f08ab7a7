"""Every error that a model or its data can cause, by what its message must say: where, what came, what to do."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas
from weft.inference import elbo, enumeration, fit, hmc, importance, nuts
from weft.ppl import (
    AddressError,
    Affine,
    DensityError,
    GradientError,
    LocScale,
    ModelError,
    ObservationError,
    Transform,
    WeftError,
    block,
    condition,
    loop,
    mask,
    noncentered,
    reparametrize,
    scale,
    scope,
    with_gradients,
)

from weft import deterministic, draw, expect, factor, gen, gradients, observed, repeat, sample

KEY = jax.random.key(0)
N = dist.Normal


@contextlib.contextmanager
def refused(kind: type[Exception] | tuple[type[Exception], ...], *substance: str) -> Iterator[None]:
    """An error of that kind, whose message has all of these in it."""
    with pytest.raises(kind) as e:
        yield
    lacking = [s for s in substance if s not in str(e.value)]
    assert not lacking, f"not in the message: {lacking}\n{e.value}"


def run(function: Callable[..., Any]) -> Any:
    return gen(function)().simulate(KEY)


def normal(name: str) -> Any:
    return sample(name, N(0.0, 1.0))


def flip() -> Any:
    return sample("flip", dist.Bernoulli(0.5)) == 1


@gen
def part() -> Any:
    return normal("inner")


@gen
def survey(scale: Any = 1.0) -> Any:
    """Something of everything that can be observed."""
    rate = sample("rate", dist.Beta(1.0, 1.0))
    repeat(lambda: sample("count", dist.Binomial(10, rate)), 3, axis_name="row")
    sample("weights", dist.Dirichlet(jnp.ones(3)))
    sample("height", N(0.0, scale))
    sample("part", part())
    factor("soft", rate)
    deterministic("twice", 2 * rate)


@gen
def pair() -> Any:
    return sample("y", N(normal("x"), 1.0))


CHOICES = {
    "rate": 0.5,
    "count": [1, 2, 3],
    "weights": [0.2, 0.3, 0.5],
    "height": 1.0,
    "part": {"inner": 1.0},
}


def test_all_are_value_errors() -> None:
    for kind in (AddressError, DensityError, GradientError, ModelError, ObservationError):
        assert issubclass(kind, WeftError)
        assert issubclass(kind, ValueError)


# --- names ----------------------------------------------------------------------------------------


def _twice() -> Any:
    return normal("a") + normal("a")


def _twice_in_jit() -> Any:
    helper = jax.jit(lambda: normal("a"))
    return helper() + helper()


def _twice_by_remainder() -> Any:
    return lax.map(lambda m: sample("a", N(m, 1.0)), jnp.zeros(5), batch_size=2)


def _twice_by_associative_scan() -> Any:
    combine = lambda x, y: x + y + sample("a", N(jnp.zeros_like(x), 1.0))  # noqa: E731
    return lax.associative_scan(combine, jnp.zeros(5))


def _twice_nested() -> Any:
    return sample("a", part()) + sample("a", part())


def _site_and_program() -> Any:
    return sample("a", part()) + normal("a")


def _site_and_record() -> Any:
    return deterministic("a", normal("a"))


def _site_and_factor() -> None:
    factor("a", normal("a"))


def _branch_and_after() -> Any:
    return lax.cond(flip(), lambda: normal("a"), lambda: 0.0) + normal("a")


def _twice_in_a_branch() -> Any:
    return lax.cond(flip(), _twice, lambda: 0.0)


def _scan_and_after() -> Any:
    return lax.scan(lambda c, _: (c + normal("a"), None), 0.0, None, length=2)[0] + normal("a")


def _lanes_and_after() -> Any:
    return repeat(lambda: normal("a"), 2).sum() + normal("a")


def _twice_in_checkpoint() -> Any:
    return jax.checkpoint(lambda: normal("a"))() + normal("a")


@pytest.mark.parametrize(
    "function",
    [
        _twice,
        _twice_in_jit,
        _twice_by_remainder,
        _twice_by_associative_scan,
        _twice_nested,
        _site_and_program,
        _site_and_record,
        _site_and_factor,
        _branch_and_after,
        _twice_in_a_branch,
        _scan_and_after,
        _lanes_and_after,
        _twice_in_checkpoint,
    ],
)
def test_name_used_twice(function: Callable[..., Any]) -> None:
    cures = ("two names", "jax.vmap or lax.scan", "lax.map with a batch_size", "associative_scan")
    with refused(ModelError, f"model {function.__name__!r}", "'a' is used twice", *cures):
        run(function)


def test_name_used_twice_says_in_which_scope() -> None:
    with refused(ModelError, "'a' is used twice", "_twice"):
        run(lambda: sample("outer", gen(_twice)()))
    with refused(ModelError, "'a' is used twice", "'outer'"):
        run(lambda: scope(_twice, "outer")())


def test_name_used_twice_is_found_by_everything() -> None:
    """Staging finds it, whatever is asked of the program."""
    program = gen(_twice)()
    for ask in (
        lambda: program.log_density({"a": 0.0}),
        lambda: program.given({"a": 0.0}),
        lambda: program.shapes(),
        lambda: program.generate(KEY, {}),
    ):
        with refused(ModelError, "'a' is used twice"):
            ask()


def test_one_name_in_two_scopes_or_branches_is_fine() -> None:
    def function() -> Any:
        a = sample("one", part()) + sample("two", part())
        return a + lax.cond(flip(), lambda: normal("a"), lambda: normal("a"))

    assert set(run(function).choices) == {"one", "two", "flip", "a"}


def test_names_with_one_hash() -> None:
    """Two words with one CRC-32: their keys would be equal."""
    with refused(ModelError, "'plumless'", "'buckeroo'", "rename"):
        run(lambda: normal("plumless") + normal("buckeroo"))


@pytest.mark.parametrize("name", ["", "a.b", "*", "a*", "~a", 3, None, ("a", "b")])
def test_unfit_names(name: Any) -> None:
    for site in (
        lambda: normal(name),
        lambda: factor(name, 1.0),
        lambda: deterministic(name, 1.0),
        lambda: sample(name, part()),
        lambda: scope(lambda: normal("a"), name)(),
    ):
        with refused(ModelError, "name", repr(name)):
            run(site)


# --- where a site may stand -----------------------------------------------------------------------

OUTSIDE: dict[str, tuple[Callable[[], Any], str]] = {
    "plain": (lambda: normal("a"), "'a'"),
    "jit": (lambda: jax.jit(lambda: normal("a"))(), "'a'"),
    "vmap": (lambda: jax.vmap(lambda m: sample("a", N(m, 1.0)))(jnp.zeros(2)), "'a'"),
    "cond": (lambda: lax.cond(True, lambda: normal("a"), lambda: 0.0), "'a'"),
    "scan": (lambda: lax.scan(lambda c, _: (c + normal("a"), None), 0.0, None, length=2), "'a'"),
    "cond under vmap": (
        lambda: jax.vmap(lambda p: lax.cond(p, lambda: normal("a"), lambda: 0.0))(
            jnp.arange(2) > 0
        ),
        "'a'",
    ),
    "scan under vmap": (
        lambda: jax.vmap(
            lambda m: lax.scan(lambda c, _: (c + normal("a"), None), m, None, length=2)
        )(jnp.zeros(2)),
        "'a'",
    ),
    "nested program": (lambda: sample("a", part()), "'a'"),
    "nested program in jit": (lambda: jax.jit(lambda: sample("a", part()))(), "'a'"),
    "factor": (lambda: factor("a", 1.0), "factor site 'a'"),
    "deterministic": (lambda: deterministic("a", 1.0), "deterministic site 'a'"),
    "transformed function": (lambda: condition(lambda: normal("a"), {"a": 1.0})(), "'a'"),
    "noncentered function": (lambda: noncentered(lambda: normal("a"), "a")(), "'a_base'"),
    "scope": (lambda: scope(lambda: normal("a"), "s")(), "'s'"),
}


@pytest.mark.parametrize("where", OUTSIDE)
def test_site_outside_a_program(where: str) -> None:
    function, site = OUTSIDE[where]
    with refused(ModelError, site, "outside a program", "@gen"):
        function()


def test_draw_outside_an_expectation() -> None:
    with refused(ModelError, "draw", "outside an expectation", "expect(f)(key"):
        draw(part())
    with refused(TypeError, "draw takes a program", "Model"):
        draw(part)


def _custom_jvp() -> Any:
    @jax.custom_jvp
    def f(x: Any) -> Any:
        return x * normal("a")

    f.defjvp(lambda x, t: (x[0], t[0]))
    return f(1.0)


def _custom_vjp() -> Any:
    @jax.custom_vjp
    def f(x: Any) -> Any:
        return x * normal("a")

    f.defvjp(lambda x: (x, None), lambda _, g: (g,))
    return f(1.0)


def _custom_vmap() -> Any:
    @custom_vmap
    def f(x: Any) -> Any:
        return x * normal("a")

    @f.def_vmap
    def _(size: Any, batched: Any, x: Any) -> Any:
        return x, True

    return f(1.0)


def _pallas() -> Any:
    def kernel(x: Any, out: Any) -> None:
        out[...] = x[...] + normal("a")

    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(jnp.ones(2))


def _reduce() -> Any:
    return lax.reduce(jnp.ones(3), 0.0, lambda x, y: x + y + normal("a"), (0,))


def _linear_solve() -> Any:
    matvec = lambda x: 2 * x + 0 * normal("a")  # noqa: E731
    return lax.custom_linear_solve(matvec, jnp.ones(()), lambda _, b: b / 2, symmetric=True)


@pytest.mark.parametrize(
    ("function", "primitive"),
    [
        (_custom_jvp, "custom_jvp_call"),
        (_custom_vjp, "custom_vjp_call"),
        (_custom_vmap, "custom_vmap_call"),
        (_pallas, "pallas_call"),
        (_reduce, "reduce"),
        (_linear_solve, "custom_linear_solve"),
    ],
)
def test_constructs_without_a_rule(function: Callable[..., Any], primitive: str) -> None:
    with refused(
        ModelError,
        f"model {function.__name__!r}",
        "'a'",
        f"'{primitive}'",
        "no rule",
        "move the site out",
    ):
        run(function)


def test_constructs_without_a_rule_under_others() -> None:
    """The refusal reaches through scans, branches, lanes and nested programs."""
    for function in (
        lambda: lax.scan(lambda c, _: (_custom_jvp(), None), 0.0, None, length=2)[0],
        lambda: lax.cond(flip(), _custom_jvp, lambda: 0.0),
        lambda: repeat(lambda: lax.cond(flip(), _custom_jvp, lambda: 0.0), 2),
        lambda: sample("part", gen(_custom_jvp)()),
    ):
        with refused(ModelError, "'a'", "'custom_jvp_call'"):
            run(function)


def test_while_predicate() -> None:
    def function() -> Any:
        return lax.while_loop(lambda s: normal("a") < s, lambda s: s - 1.0, 3.0)

    with refused(ModelError, "'a'", "predicate of a while_loop", "in its body"):
        run(function)
    with refused(ModelError, "'a'", "predicate of a while_loop"):
        run(
            lambda: jax.vmap(
                lambda m: lax.while_loop(lambda s: sample("a", N(m, 1.0)) < s, lambda s: s - 1.0, m)
            )(jnp.ones(2))
        )


# --- derivatives inside a model -------------------------------------------------------------------


def _scanned(m: Any) -> Any:
    return lax.scan(lambda c, _: (c + sample("a", N(m, 1.0)), None), m, None, length=2)[0]


def _branched(m: Any) -> Any:
    return lax.cond(m > 0, lambda: sample("a", N(m, 1.0)), lambda: m)


def _nested(m: Any) -> Any:
    return sample("outer", gen(lambda m: sample("a", N(m, 1.0)))(m))


def _lanes(m: Any) -> Any:
    return jax.vmap(lambda x: sample("a", N(m * x, 1.0)))(jnp.ones(2)).sum()


def _branched_lanes(m: Any) -> Any:
    return jax.vmap(lambda x: _branched(m * x))(jnp.ones(2)).sum()


def _while(m: Any) -> Any:
    return lax.while_loop(lambda s: s < 2.0, lambda s: s + sample("a", dist.Exponential(m)), 0.0)


DIFFERENTIATED: dict[str, Callable[[], Any]] = {
    "grad": lambda: jax.grad(lambda m: sample("a", N(m, 1.0)))(1.0),
    "value_and_grad": lambda: jax.value_and_grad(lambda m: sample("a", N(m, 1.0)))(1.0),
    "jacfwd": lambda: jax.jacfwd(lambda m: sample("a", N(m, 1.0)))(1.0),
    "hessian": lambda: jax.hessian(lambda m: sample("a", N(m, 1.0)))(1.0),
    "jvp": lambda: jax.jvp(lambda m: sample("a", N(m, 1.0)), (1.0,), (1.0,)),
    "vjp": lambda: jax.vjp(lambda m: sample("a", N(m, 1.0)), 1.0)[0],
    "linearize": lambda: jax.linearize(lambda m: sample("a", N(m, 1.0)), 1.0)[0],
    "grad of vmap": lambda: jax.grad(_lanes)(1.0),
    "vmap of grad": lambda: jax.vmap(jax.grad(lambda m: sample("a", N(m, 1.0))))(jnp.ones(2)),
    "scan": lambda: jax.grad(_scanned)(1.0),
    "cond": lambda: jax.grad(_branched)(1.0),
    "cond in lanes": lambda: jax.grad(_branched_lanes)(1.0),
    "while": lambda: jax.jacfwd(_while)(1.0),
    "jit": lambda: jax.grad(jax.jit(lambda m: sample("a", N(m, 1.0))))(1.0),
    "checkpoint": lambda: jax.grad(jax.checkpoint(lambda m: sample("a", N(m, 1.0))))(1.0),
    "nested program": lambda: jax.grad(_nested)(1.0),
}


@pytest.mark.parametrize("how", DIFFERENTIATED)
def test_gradient_through_a_site(how: str) -> None:
    with refused(
        GradientError, "jax.grad, jvp or linearize", "'a'", "log_density(choices)", "expect(f)(key"
    ):
        run(DIFFERENTIATED[how])


def test_gradients_beside_sites_are_fine() -> None:
    """Of functions without sites, at choices, and of functions whose sites do not depend on what is varied."""

    def function() -> Any:
        x = normal("x")
        slope = jax.grad(lambda t: t**2)(x)
        other = jax.grad(lambda m: (normal("y"), m**2)[1])(3.0)
        return slope, other, x

    slope, other, x = run(function).value
    assert slope == 2 * x
    assert other == 6.0


# --- what is no site of Weft's --------------------------------------------------------------------


def _plate() -> Any:
    with numpyro.plate("a", 3):
        return normal("x")


@pytest.mark.parametrize(
    ("function", "cure"),
    [
        (lambda: numpyro.sample("a", N(0.0, 1.0)), "weft.sample('a'"),
        (lambda: numpyro.sample("a", N(0.0, 1.0), obs=1.0), ".given({'a': data})"),
        (lambda: numpyro.deterministic("a", 1.0), "weft.deterministic('a'"),
        (lambda: numpyro.factor("a", 1.0), "weft.factor('a'"),
        (lambda: numpyro.param("a", 1.0), "argument of the model"),
        (_plate, "jax.vmap(f, axis_name="),
        (jax.jit(lambda: numpyro.sample("a", N(0.0, 1.0))), "weft.sample('a'"),
        (lambda: repeat(lambda: numpyro.sample("a", N(0.0, 1.0)), 2), "weft.sample('a'"),
        (
            lambda: numpyro.handlers.seed(lambda: numpyro.sample("a", N(0.0, 1.0)), 0)(),
            "weft.sample('a'",
        ),
    ],
)
def test_numpyro_primitives(function: Callable[..., Any], cure: str) -> None:
    with refused(ModelError, "numpyro.", "'a' inside a Weft model", cure):
        run(function)


def test_numpyro_is_itself_again_afterwards() -> None:
    with pytest.raises(ModelError):
        run(lambda: numpyro.sample("a", N(0.0, 1.0)))
    assert np.isfinite(numpyro.handlers.seed(lambda: numpyro.sample("a", N(0.0, 1.0)), 0)())


def test_obs_in_sample() -> None:
    with refused(ModelError, "'a'", "obs=", "model(...).given({'a': data})"):
        run(lambda: sample("a", N(0.0, 1.0), obs=1.0))
    with refused(TypeError, "sample_shape", "name, d, dims"):
        run(lambda: sample("a", N(0.0, 1.0), sample_shape=(3,)))


def test_what_is_no_distribution() -> None:
    with refused(ModelError, "'a'", "apply the model", "sample('a', model(...))"):
        run(lambda: sample("a", part))
    for wrong, kind in ((1.0, "float"), ({"loc": 0.0}, "dict"), (None, "NoneType")):
        with refused(ModelError, "'a'", "expected a distribution", "program, model(*args)", kind):
            run(lambda w=wrong: sample("a", w))
    with refused(
        ModelError, "'a'", "expected a distribution", "class Normal", "give it parameters"
    ):
        run(lambda: sample("a", dist.Normal))


@pytest.mark.parametrize(
    "make",
    [
        lambda m: N(m, 1.0),
        lambda m: dist.MultivariateNormal(jnp.stack([m, m]), jnp.eye(2)),
        lambda m: dist.Bernoulli(logits=m),
        lambda m: dist.Gamma(jnp.exp(m), 1.0),
        lambda m: N(m, 1.0).expand([2]).to_event(1),
    ],
)
def test_distribution_built_by_vmap(make: Callable[[Any], Any]) -> None:
    label = type(make(0.0)).__name__
    with refused(ModelError, "'a'", label, "built by jax.vmap", "ample inside the vmap"):
        run(lambda: sample("a", jax.vmap(make)(jnp.zeros(3))))


def test_too_many_dims() -> None:
    with refused(ModelError, "'a'", "names 2 axes"):
        run(lambda: sample("a", N(jnp.zeros(3), 1.0), dims=("row", "column")))
    with refused(ModelError, "'a'", "names 2 axes"):
        run(lambda: deterministic("a", jnp.zeros(3), dims=("row", "column")))


# --- programs built, applied, returned ------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda: (part(), 1.0)[1],
        lambda: lax.scan(lambda c, _: (part(), (c, None))[1], 0.0, None, length=2),
        lambda: repeat(lambda: (part(), 1.0)[1], 2),
        lambda: (condition(part, {"inner": 1.0})(), 1.0)[1],
        lambda: part(),
        lambda: {"value": part()},
        lambda: sample("outer", gen(lambda: (part(), 1.0)[1])()),
    ],
)
def test_program_never_sampled(function: Callable[..., Any]) -> None:
    with refused(ModelError, "'part'", "never sampled", "sample(name, part(...))"):
        run(function)


def test_programs_that_are_asked_are_used() -> None:
    def function() -> Any:
        factor("w", part().log_density({"inner": 1.0}))
        return sample("passed", gen(lambda p: sample("p", p))(part()))

    assert set(run(function).choices) == {"passed"}


def test_call_signature() -> None:
    with refused(TypeError, "survey", "too many positional arguments"):
        survey(1.0, 2.0)
    with refused(TypeError, "survey", "unexpected keyword argument 'scal'"):
        survey(scal=1.0)
    with refused(TypeError, "missing a required argument: 'x'"):
        gen(lambda x: x)()


def test_arguments_and_values_that_are_none() -> None:
    with refused(TypeError, "survey", "must be hashable", "set"):
        survey({1, 2}).simulate(KEY)
    with refused(TypeError, "survey", "no numbers"):
        survey(np.array(["a"])).simulate(KEY)
    with refused(ModelError, "returned a str", "return arrays"):
        run(lambda: "text")
    with refused(TypeError, "gen takes a function", "int"):
        gen(3)
    with refused(AttributeError, "apply the model first", "survey(...).simulate"):
        survey.simulate(KEY)


def test_keys() -> None:
    program = survey()
    with refused(TypeError, "expected a random key", "jax.random.key(0)", "int"):
        program.simulate(3)
    with refused(TypeError, "expected one key", "(3,)", "jax.vmap over the keys"):
        program.simulate(jax.random.split(KEY, 3))
    with refused(TypeError, "expected a random key", "NoneType"):
        program.generate(None, {})


# --- choices and observations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "came", "near"),
    [
        ({"cuont": [1, 2, 3]}, "'cuont'", "did you mean 'count'"),
        ({"part.iner": 1.0}, "'part.iner'", "did you mean 'part.inner'"),
        ({"part": {"iner": 1.0}}, "'part.iner'", "did you mean 'part.inner'"),
        ({"xyz": 1.0}, "'xyz'", "'rate', 'count', 'weights', 'height', 'part.inner'"),
        ({"part": 1.0}, "'part'", "nested program"),
        ({"soft": 1.0}, "'soft'", "is a factor, not a choice"),
        ({"twice": 1.0}, "'twice'", "is a deterministic, not a choice"),
    ],
)
def test_unknown_address(choices: Any, came: str, near: str) -> None:
    program = survey()
    for ask in (
        lambda: program.given(choices),
        lambda: program.log_density({**CHOICES, **choices}),
        lambda: program.log_densities({**CHOICES, **choices}),
        lambda: program.generate(KEY, choices),
        lambda: condition(survey, choices)().shapes(),
    ):
        with refused(AddressError, "'survey'", came, near):
            ask()


@pytest.mark.parametrize("came", [(2,), (), (1, 3), (4,), (3, 1)])
def test_wrong_shape(came: tuple[int, ...]) -> None:
    """Both shapes are shown, and nothing is broadcast."""
    data = {"count": np.zeros(came, int)}
    for ask in (
        lambda: survey().given(data),
        lambda: survey().log_density({**CHOICES, **data}),
        lambda: survey().generate(KEY, data),
        lambda: condition(survey, data)().shapes(),
        lambda: jax.eval_shape(lambda y: survey().given({"count": y}).data, data["count"]),
    ):
        with refused(
            ObservationError,
            "'survey'",
            "'count'",
            "expected shape (3,)",
            f"got {came}",
            "row",
            "broadcast",
        ):
            ask()


def test_wrong_event_shape() -> None:
    with refused(ObservationError, "'weights'", "expected shape (3,)", "event", "got (2,)"):
        survey().given({"weights": [0.5, 0.5]})


@pytest.mark.parametrize(
    ("value", "shown"),
    [([1.5, 2, 3], "1.5"), (np.array([2**40, 1, 1]), str(2**40)), ([1.0, 2.0, 2.5], "index (2,)")],
)
def test_dtype_that_does_not_fit(value: Any, shown: str) -> None:
    """Casts that would change a value; those that keep it are silent."""
    for ask in (
        lambda: survey().given({"count": value}),
        lambda: survey().log_density({**CHOICES, "count": value}),
        lambda: survey().generate(KEY, {"count": value}),
    ):
        with refused(ObservationError, "'survey'", "'count'", "int32", shown):
            ask()


def test_dtype_under_tracing() -> None:
    with refused(ObservationError, "'count'", "float32", "int32", "cast"):
        jax.eval_shape(lambda y: survey().given({"count": y}).data, jnp.zeros(3))
    with refused(ObservationError, "'count'", "float32", "int32", "cast"):
        condition(survey, {"count": [1.5, 2.0, 3.0]})().shapes()


@pytest.mark.parametrize("value", ["a", None, object(), np.datetime64("2020-01-01"), 1 + 2j, KEY])
def test_no_numbers(value: Any) -> None:
    with refused(ObservationError, "'survey'", "'height'"):
        survey().given({"height": value})


def test_ragged() -> None:
    with refused(ObservationError, "'count'", "cannot make an array of list"):
        survey().given({"count": [[1], [2, 3]]})


@pytest.mark.parametrize("choices", [5, [1.0], "height", {3: 1.0}])
def test_choices_that_are_no_dict(choices: Any) -> None:
    with pytest.raises((TypeError, AddressError), match=r"(?i)address"):
        survey().given(choices)


@pytest.mark.parametrize(
    ("data", "substance"),
    [
        (
            {"count": [1, 2, 11]},
            ("'count'", "1 of 3", "outside the support", "upper_bound=10", "11", "index (2,)"),
        ),
        ({"count": [-1, 2, -3]}, ("'count'", "2 of 3", "-1", "index (0,)")),
        ({"rate": 1.5}, ("'rate'", "outside the support", "1.5")),
        ({"weights": [0.5, 0.5, 0.5]}, ("'weights'", "outside the support", "Simplex")),
        ({"height": np.inf}, ("'height'", "outside the support", "Real", "inf")),
    ],
)
def test_outside_the_support(data: Any, substance: tuple[str, ...]) -> None:
    with refused(ObservationError, "'survey'", *substance):
        survey().given(data)


def test_nan_without_a_mask() -> None:
    with refused(
        ObservationError,
        "'count'",
        "1 of 3",
        "NaN",
        "index (1,)",
        "observed(y, where=~jnp.isnan(y))",
        "'drop'",
    ):
        survey().given({"count": [1.0, np.nan, 2.0]})
    with refused(ObservationError, "'height'", "NaN", "given({'height': observed("):
        survey().given({"height": np.nan})
    with refused(ObservationError, "'weights'", "NaN"):
        survey().given({"weights": [0.5, 0.5, np.nan]})
    with refused(ObservationError, "'count'", "NaN"):  # also where the mask says that it was seen
        seen = np.array([True, True, False])
        survey().given({"count": observed([1.0, np.nan, 2.0], where=seen)})


@pytest.mark.parametrize("where", [[True, False], True, [1, 0, 1], [[True, False, True]]])
def test_mask_that_does_not_fit(where: Any) -> None:
    shape = np.shape(where)
    with refused(
        ObservationError, "'count'", "where must be booleans of shape (3,)", f"of shape {shape}"
    ):
        survey().given({"count": observed([1, 2, 3], where=where)})


def test_missing_is_a_closed_choice() -> None:
    with refused(ObservationError, "'impute' or 'drop'", "'skip'"):
        observed(1.0, where=True, missing="skip")


def test_dropping_what_is_read() -> None:
    @gen
    def chain() -> None:
        x = repeat(lambda: normal("x"), 2)
        sample("y", N(x.sum(), 1.0))

    with refused(DensityError, "'chain'", "'x'", "cannot be dropped", "'y'", "missing='impute'"):
        chain().given({"x": observed([1.0, np.nan], where=[True, False], missing="drop")})


def test_missing_choice() -> None:
    program = survey()
    for ask in (program.log_density, program.log_densities):
        with refused(
            AddressError,
            "'survey'",
            "missing 'weights', 'part.inner'",
            "generate(key, choices)",
            "given(choices)",
        ):
            ask({"rate": 0.5, "count": [1, 2, 3], "height": 1.0})
    target = program.given({"count": [1, 2, 3], "height": 1.0})
    for ask in (target.log_density, target.log_densities):
        with refused(AddressError, "'survey'", "missing latent choices 'weights', 'part.inner'"):
            ask({"rate": 0.5})
    with refused(AddressError, "'height' is observed, not latent"):
        target.log_density({k: v for k, v in CHOICES.items() if k != "count"})


def test_unknown_axis() -> None:
    with refused(AddressError, "'rows'", "'survey'", "did you mean 'row'"):
        survey().log_densities(CHOICES, by="rows")
    with refused(AddressError, "'rwo'", "did you mean 'row'"):
        scale(survey, {"rwo": 2.0})().shapes()


@pytest.mark.parametrize(
    "transform",
    [
        lambda: block(survey, "heigth"),
        lambda: mask(survey, {"heigth": True}),
        lambda: noncentered(survey, "heigth"),
        lambda: reparametrize(survey, {"heigth": None}),
        lambda: with_gradients(survey, {"heigth": None}),
        lambda: scale(survey, {"heigth": 1.0}),
        lambda: condition(survey, {"heigth": 1.0}),
    ],
)
def test_transform_of_an_unknown_address(transform: Callable[[], Any]) -> None:
    with refused(AddressError, "'heigth'", "did you mean 'height'"):
        transform()().shapes()


def test_transforms_that_cannot_be() -> None:
    with refused(ModelError, "Beta", "no non-centred form", "reparametrize"):
        noncentered(survey, "rate")().shapes()
    with refused(ModelError, "'height' is conditioned", "reparametrise before"):
        noncentered(condition(survey, {"height": 1.0}), "height")().shapes()
    with refused(AddressError, "'height'", "fixed inside the model"):
        condition(survey, {"height": 1.0})().given({"height": 1.0})
    with refused(AddressError, "'count'", "leading axes of (3,)", "(2,)"):
        mask(survey, {"count": jnp.ones(2, bool)})().shapes()
    with refused(TypeError, "a transform takes a model or a function with sites", "int"):
        condition(3, {})
    with refused(TypeError, "at least one address"):
        noncentered(survey)


@pytest.mark.parametrize(
    ("strategy", "d"),
    [
        (LocScale(), dist.LogNormal(0.0, 1.0)),
        (LocScale(), dist.HalfNormal(1.0)),
        (LocScale(), dist.Poisson(1.0)),
        (Affine(), N(0.0, 1.0)),
        (Transform(), N(0.0, 1.0)),
        (None, dist.Beta(1.0, 1.0)),
    ],
)
def test_strategies_that_do_not_fit(strategy: Any, d: Any) -> None:
    model = gen(lambda: sample("x", d))
    with refused(ModelError, "'x'", type(d).__name__):
        reparametrize(model, {"x": strategy})().shapes()


def test_settings_of_transforms_that_do_not_fit() -> None:
    with refused((TypeError, ModelError), "'x'", "str"):
        reparametrize(pair, {"x": "noncentered"})().shapes()
    with refused(TypeError, "noncentered", "address"):
        noncentered(pair, ["x", "y"])
    for factors in (np.ones(3), {"row": np.ones(3)}):
        with refused((TypeError, ModelError), "scale", "number", "(3,)"):
            scale(survey, factors)().log_density(CHOICES)
    with refused((TypeError, ModelError), "scale", "number"):
        scale(survey, "twice")().shapes()
    for where in ([0.5, 0.0, 1.0], [1, 0, 1]):
        with refused((TypeError, ModelError, AddressError), "mask", "booleans"):
            mask(survey, {"count": where})().shapes()
    for settings in ({"dims": ("row",)}, {"grad": 1.0}):
        with refused((TypeError, ModelError), "'a'", next(iter(settings))):
            run(lambda settings=settings: sample("a", part(), **settings))


def test_conditions_are_checked() -> None:
    """Inside a model as from outside, where the values are known when ``condition`` is called."""
    with refused(ObservationError, "'height'", "NaN"):
        condition(survey, {"height": np.nan})().shapes()
    with refused(ObservationError, "'count'", "NaN", "observed("):
        condition(survey, {"count": [1.0, np.nan, 2.0]})().shapes()
    floats = condition(survey, {"count": [1.0, 2.0, 3.0]})  # inside a model only dtypes are known
    with refused(ObservationError, "'count'", "float32", "int32", "cast them first"):
        floats().shapes()
    assert "count" not in condition(survey, {"count": [1, 2, 3]})().shapes()


def test_predict() -> None:
    program = survey()
    with refused(ObservationError, "disagree", "(2, 3)", "(3, 3)", "'rate'"):
        program.predict(KEY, {"height": jnp.zeros((2, 3)), "rate": jnp.zeros((3, 3))})
    with refused(ObservationError, "'count'", "(3,)", "(2, 4)", "leave the address out"):
        program.predict(KEY, {"count": jnp.zeros((2, 4), int)})
    with refused(AddressError, "'coutn'", "did you mean 'count'"):
        program.predict(KEY, {"height": jnp.zeros(2)}, keep="coutn")
    with refused(AddressError, "'hieght'", "did you mean 'height'"):
        program.predict(KEY, {"hieght": jnp.zeros(2)})
    with refused(ValueError, "batch_size", "0"):
        program.predict(KEY, {"height": jnp.zeros(2)}, batch_size=0)


# --- branches -------------------------------------------------------------------------------------


def _vector() -> Any:
    return sample("a", N(jnp.zeros(2), 1.0)).sum()


@pytest.mark.parametrize(
    ("other", "substance"),
    [
        (_vector, ("'a'", "shape (2,)", "shape ()", "float32", "two names")),
        (lambda: 1.0 * sample("a", dist.Poisson(1.0)), ("'a'", "int32", "float32", "two names")),
        (lambda: deterministic("a", 1.0), ("'a'", "sample", "deterministic")),
        (lambda: sample("a", part()), ("'a'", "a site in one branch", "nested program in another")),
    ],
)
def test_branches_that_disagree(other: Callable[[], Any], substance: tuple[str, ...]) -> None:
    with refused(ModelError, *substance):
        run(lambda: lax.cond(flip(), other, lambda: normal("a")))
    with refused(ModelError, *substance):
        run(lambda: lax.switch(flip() + 0, [lambda: 0.0, lambda: normal("a"), other]))
    with refused(ModelError, "'a'"):
        run(lambda: repeat(lambda: lax.cond(flip(), other, lambda: normal("a")), 2))


def test_branches_that_disagree_inside_a_program() -> None:
    with refused(ModelError, "'part.inner'", "shape (2,)", "shape ()"):
        vector = gen(lambda: sample("inner", N(jnp.zeros(2), 1.0)).sum())
        run(
            lambda: lax.cond(
                flip(), lambda: sample("part", part()), lambda: sample("part", vector())
            )
        )


def test_branches_that_disagree_on_events() -> None:
    with refused(ModelError, "'a'", "event"):
        event = lambda: sample("a", N(jnp.zeros(2), 1.0).to_event(1)).sum()  # noqa: E731
        run(lambda: lax.cond(flip(), event, _vector))


# --- densities that are not there -----------------------------------------------------------------


@gen
def waiting() -> Any:
    return lax.while_loop(
        lambda s: s < 2.0, lambda s: s + sample("step", dist.Exponential(1.0)), 0.0
    )


def test_density_of_a_while_loop() -> None:
    program = waiting()
    for ask in (
        lambda: program.log_density({}),
        lambda: program.log_densities({}),
        lambda: program.given(),
        lambda: sample_in(program).log_density({}),
    ):
        with refused(DensityError, "step'", "while_loop", "weft.loop(cond, body, max_steps)"):
            ask()
    with refused(AddressError, "'step' cannot be given", "while_loop"):
        program.generate(KEY, {"step": 1.0})
    assert program.simulate(KEY).value >= 2.0
    bounded = gen(
        lambda: loop(lambda s: s < 2.0, lambda s: s + sample("step", dist.Exponential(1.0)), 4, 0.0)
    )()
    assert np.isfinite(bounded.log_density({"step": jnp.ones(4)}))


def sample_in(program: Any) -> Any:
    return gen(lambda: sample("outer", program))()


def test_density_of_a_loop_of_unknown_length() -> None:
    @gen
    def model() -> Any:
        n = sample("n", dist.Poisson(3.0))
        return lax.fori_loop(0, n, lambda i, s: s + normal("a"), 0.0)

    with refused(DensityError, "'a'", "while_loop"):
        model().log_density({"n": 2})


def test_density_of_what_is_blocked() -> None:
    program = block(survey, "height")()
    for ask in (lambda: program.log_density(CHOICES), lambda: program.given({"rate": 0.5})):
        with refused(DensityError, "'survey'", "'height'", "hidden by block"):
            ask()
    with refused(AddressError, "'height' cannot be given", "hidden by block"):
        program.generate(KEY, {"height": 1.0})


def test_density_of_what_runs_in_place() -> None:
    """``draw`` leaves choices without an address, so there is no density to be had."""
    program = gen(lambda: draw(part()).value + normal("a"))()
    with refused(DensityError, "draw", "sample(name, program)"):
        program.log_density({"a": 1.0})


# --- gradients that are not there -----------------------------------------------------------------


def test_discrete_site_in_unconstrained_space() -> None:
    @gen
    def mixture() -> Any:
        k = sample("k", dist.Categorical(jnp.ones(2) / 2))
        return sample("y", N(1.0 * k, 1.0))

    with refused(DensityError, "'k' (CategoricalProbs) is discrete", "marginalize", "enumeration"):
        mixture().given({"y": 1.0}).unconstrain()
    program = gen(lambda: repeat(lambda: sample("m", mixture()), 2))()
    with refused(DensityError, "'m.k'", "is discrete"):
        program.given({"m.y": [1.0, 2.0]}).unconstrain()
    assert mixture().given({"y": 1.0, "k": 0}).unconstrain().shapes == {}


STRATEGIES: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "reparam of a coin": (
        lambda p: 1.0 * sample("k", dist.Bernoulli(p), grad=gradients.reparam),
        ("'k'", "reparam does not fit BernoulliProbs", "score, enum, mvd, reweight"),
    ),
    "enum of what has no end": (
        lambda p: 1.0 * sample("k", dist.Poisson(p), grad=gradients.enum),
        ("'k'", "enum does not fit Poisson", "score, mvd, reweight"),
    ),
    "enum of a real number": (
        lambda p: sample("k", N(p, 1.0), grad=gradients.enum),
        ("'k'", "enum does not fit Normal", "reparam, score, mvd"),
    ),
    "mvd of another law": (
        lambda p: sample("k", dist.StudentT(3.0, p), grad=gradients.mvd),
        ("'k'", "mvd does not fit StudentT", "reparam, score"),
    ),
    "mvd of another parameter": (
        lambda p: sample("k", dist.Gamma(p, 2.0), grad=gradients.mvd),
        ("'k'", "concentration", "reparam, score"),
    ),
    "no strategy": (
        lambda p: sample("k", N(p, 1.0), grad="score"),
        ("'k'", "grad='score' is no gradient strategy", "weft.gradients"),
    ),
    "no proposal": (
        lambda p: sample("k", N(p, 1.0), grad=gradients.reweight),
        ("'k'", "reweight needs a proposal"),
    ),
    "enum in a scan": (
        lambda p: lax.scan(
            lambda c, _: (c + sample("k", dist.Bernoulli(p), grad=gradients.enum), None),
            0.0,
            None,
            length=2,
        )[0],
        ("'k'", "in a scan", "score", "marginalize"),
    ),
    "score in a while_loop": (
        lambda p: lax.while_loop(
            lambda c: c < 1.0,
            lambda c: c + sample("k", dist.Exponential(p), grad=gradients.score),
            p,
        ),
        ("'k'", "in a while_loop", "reparam"),
    ),
    "a baseline for each element": (
        lambda p: sample(
            "k", N(p, 1.0).expand([3]), grad=gradients.score(baseline=jnp.zeros(3))
        ).sum(),
        ("'k'", "baseline", "one number", "(3,)"),
    ),
    "too many values": (
        lambda p: (
            sum(
                sample(f"k{i}", dist.Categorical(jnp.ones(9) / 9 + 0 * p), grad=gradients.enum)
                for i in range(5)
            )
            * 1.0
        ),
        ("'k3'", "6,561 times", "4,096", "score or mvd"),
    ),
}


@pytest.mark.parametrize("how", STRATEGIES)
def test_strategy_that_cannot_be_honoured(how: str) -> None:
    program, parts = STRATEGIES[how]
    with refused(GradientError, *parts):
        jax.grad(expect(program), argnums=1)(KEY, 0.5)


def test_gradient_beside_a_discrete_choice() -> None:
    """A discrete choice whose law does not depend on what is varied is no obstacle."""
    mean = expect(lambda p: p * (1.0 + sample("k", dist.Bernoulli(0.5))))
    assert jax.grad(mean, argnums=1)(KEY, 0.5) in (1.0, 2.0)


def test_positions() -> None:
    """Points of unconstrained space are checked as choices are."""
    y = observed([1, 2, 3], where=[True, False, True])
    flat = gen(_rows)().given({"y": y}).unconstrain()
    assert np.isfinite(flat.log_density({"x": 0.5, "y": [1.0]}))
    with refused(AddressError, "'y'"):
        flat.log_density({"x": 0.5})
    with refused(AddressError, "'z'"):
        flat.log_density({"x": 0.5, "y": [1.0], "z": 1.0})
    with refused(WeftError, "'y'", "expected shape (1,)", "got (3,)"):
        flat.log_density({"x": 0.5, "y": [1.0, 2.0, 3.0]})
    with refused(AddressError, "'y'"):
        flat.from_choices({"x": 0.5})
    assert flat.flat.size == 2
    with refused(WeftError, "(2,)", "(3,)"):
        flat.flat.log_density(jnp.zeros(3))


def _rows() -> Any:
    x = normal("x")
    return repeat(lambda: sample("y", N(x, 1.0)), 3)


# --- inference ------------------------------------------------------------------------------------


@gen
def tilted() -> None:
    factor("tilt", normal("x"))


UNNORMALISED: dict[str, tuple[Callable[[], Any], str]] = {
    "factor": (tilted, "'tilt'"),
    "nested factor": (gen(lambda: sample("part", tilted())), "'part.tilt'"),
    "condition": (condition(pair, {"y": 1.0}), "'y'"),
}


@pytest.mark.parametrize("how", UNNORMALISED)
def test_unnormalised_guide(how: str) -> None:
    guide, site = UNNORMALISED[how]
    target = pair().given({"y": 1.0})
    params = {"m": jnp.zeros(())}
    for use in (
        lambda: importance(guide(), num_particles=2).run(KEY, target, progress=False),
        lambda: importance(lambda t: guide(), num_particles=2).run(KEY, target, progress=False),
        lambda: fit(
            KEY,
            elbo(target, lambda p: guide()),
            params,
            optax.sgd(0.1),
            num_steps=1,
            progress=False,
        ),
        lambda: elbo(target, lambda p: guide())(KEY, params),
    ):
        with refused(DensityError, "not normalised", site, "normalize"):
            use()


def _impossible() -> None:
    """No value of alpha that is ever tried has a density."""
    alpha = sample("alpha", N(0.0, 1.0))
    sample("beta", dist.HalfNormal(1.0))
    factor("trap", jnp.where(alpha > 1e6, 0.0, -jnp.inf))


def _undefined() -> None:
    alpha = sample("alpha", N(0.0, 1.0))
    repeat(lambda: sample("beta", N(alpha, 1.0)), 2)
    sample("y", N(jnp.log(-jnp.exp(alpha)), 1.0))


@pytest.mark.parametrize(
    ("function", "data", "site", "algorithm"),
    [
        (_impossible, {}, "'trap'", nuts(num_warmup=2, num_samples=2, num_chains=1)),
        (
            _undefined,
            {"y": 1.0},
            "'y'",
            hmc(step_size=0.1, num_steps=2, num_warmup=2, num_samples=2, num_chains=1),
        ),
    ],
)
def test_initial_density_is_not_finite(function: Any, data: Any, site: str, algorithm: Any) -> None:
    with refused(DensityError, "not finite", site, "alpha = ", "beta = ", "init=choices"):
        algorithm.run(KEY, gen(function)().given(data), progress=False)


def test_inference_names_what_it_cannot_take() -> None:
    discrete = gen(lambda: sample("k", dist.Poisson(1.0)))().given()
    with refused(DensityError, "'k' (Poisson)", "discrete"):
        nuts(num_warmup=2, num_samples=2, num_chains=1).run(KEY, discrete, progress=False)
    with refused(DensityError, "'x' (Normal", "continuous"):
        enumeration().run(KEY, pair().given({"y": 1.0}))
    with refused(TypeError, "expected a Target", "Program", ".given"):
        nuts(num_warmup=2, num_samples=2, num_chains=1).run(KEY, pair(), progress=False)
    with refused(AddressError, "'z'", "'x'"):
        other = gen(lambda: normal("z"))()
        importance(other, num_particles=2).run(KEY, pair().given({"y": 1.0}), progress=False)


def test_static_module_fields_are_fine() -> None:
    """A module with functions and strings in it is an argument like any other."""

    class Net(eqx.Module):
        weight: Any
        activation: Any
        label: str

    net = Net(jnp.ones(()), jnp.tanh, "net")
    trace = gen(lambda net: sample("x", N(net.activation(net.weight), 1.0)))(net).simulate(KEY)
    assert np.isfinite(trace.log_density)


def test_a_python_branch_on_a_choice() -> None:
    @gen
    def branchy() -> None:
        if sample("x", dist.Normal()) > 0:
            sample("y", dist.Normal())

    with pytest.raises(jax.errors.TracerBoolConversionError) as e:
        branchy().simulate(jax.random.key(0))
    assert "staged once" in e.value.__notes__[-1]
    assert "lax.cond" in e.value.__notes__[-1]
