r"""Feynman-Kac models: what sequential Monte Carlo samples.

A Markov chain and a weight for each of its states: with `M_t` the law of a step and `G_t` the potential, the target
after `t` steps is

    Q_t(x_0, ..., x_t) = 1/Z_t M_0(x_0) G_0(x_0) prod_{s=1..t} M_s(x_s | x_{s-1}) G_s(x_{s-1}, x_s).

Filtering, tempering and much else are such models (Del Moral 2004; Chopin and Papaspiliopoulos 2020, chapter 5).
`FeynmanKac` is their base class. It has a method for everything that the engine may ask of a model, and each but `init`
and `step` does nothing until a model overrides it.
"""

# No postponed annotations here: Equinox must see that `num_steps` is abstract.
import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from weft.ppl.stage.errors import ModelError, WeftError
from weft.ppl.stage.modules import Noun

from .hooks import check_hooks, signature_of

ATTRIBUTES: dict[str, type] = {
    "num_steps": int,
    "closed": bool,
    "keeps_lineage": bool,
    "panel_shape": tuple,
}
"""What the optional attributes of a model, and the number of its steps, hold."""


class FeynmanKac(Noun):
    r"""Base of Feynman-Kac models: what sequential Monte Carlo samples.

    A model has `num_steps`, `init` and `step`, for one particle, which is any pytree of arrays. All other methods and
    attributes are optional; `smc` calls them, and those here do nothing. Methods are called by position.

    A model is an Equinox module. Its arrays are traced; Python numbers among its fields, floats too, stay what they
    are, so that `if self.scale > 0` may stand in a method.

    Attributes:
        num_steps: number of potentials: `init` gives the first, `step` the others. A field or a property.
        closed: whether a finished run cannot be gone on with, with more observations.
        keeps_lineage: whether `adapt` leaves each particle a descendant of itself, and writes only settings into it.
            If a model has `adapt` and does not say so, particles may have been replaced: their lineages and the
            variance of the evidence are then not stated.
        panel_shape: numbers of series, where the model is a panel of several.

    Raises:
        ModelError: when a model is made, if a method or an attribute of its class is named nearly like one of those
            here, or like one and takes other arguments. Helpers of your own may have any other name, or begin with an
            underscore.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from weft.inference import FeynmanKac, smc
        >>> class Walk(FeynmanKac):  # that stays above zero: its evidence is the probability that it does
        ...     num_steps: int = 4
        ...     def init(self, key):
        ...         return {"x": jnp.zeros(())}, 0.0
        ...     def step(self, key, t, particle):
        ...         x = particle["x"] + jax.random.normal(key)
        ...         return {"x": x}, jnp.where(x > 0, 0.0, -jnp.inf)
        >>> found = smc(Walk(), 10_000).run(jax.random.key(0), progress=False)
        >>> print(f"{jnp.exp(found.log_evidence):.2f}")  # exactly 5/16
        0.31
        >>> class Misspelt(Walk):
        ...     def lookahed(self, t, particle):
        ...         return particle["x"]
        >>> Misspelt()
        Traceback (most recent call last):
        ...
        weft.ppl.stage.errors.ModelError: Misspelt.lookahed is no hook of FeynmanKac: did you mean lookahead(self, t...
    """

    if TYPE_CHECKING:

        @property
        def num_steps(self) -> int:
            """Number of potentials."""
            ...
    else:
        num_steps: eqx.AbstractVar[int]

    closed = False
    keeps_lineage = False
    panel_shape = ()

    def __check_init__(self) -> None:
        check_hooks(self, FeynmanKac, ATTRIBUTES)

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, /) -> tuple[Any, Float[Array, ""]]:
        """A first particle, and the logarithm of its potential. One that is no number counts as zero."""

    @abc.abstractmethod
    def step(
        self, key: PRNGKeyArray, t: Int[Array, ""], particle: Any, /
    ) -> tuple[Any, Float[Array, ""]]:
        """The particle at time `t`, 1 at first, from the one before; and the logarithm of its potential."""

    # --- what a user sees ---

    def choices(self, particle: Any, /) -> Any:
        """What a user sees of a particle, a nested dict: all of it."""
        return particle

    def paths(self, last: Any, along: Any, /) -> Any:
        """What a user sees of whole paths, where a run keeps them: the choices of the last step.

        Args:
            last: the particles of the last step, `(particle, ...)`.
            along: those that they descend from, `(particle, step, ...)`.
        """
        return jax.vmap(self.choices)(last)

    def observation(self, t: int, /) -> str:
        """What is observed at a step, in words, for messages."""
        return ""

    def remark(self, particles: Any, /) -> str | None:
        """A sentence on the last particles that a user should read, if there is one."""
        return None

    # --- what steers a run ---

    def lookahead(self, t: Int[Array, ""], particle: Any, /) -> Float[Array, ""] | None:
        """A logarithm by which a particle is preferred when particles are resampled before step `t`; None for none.

        The weights make up for it: the auxiliary particle filter of Pitt and Shephard (1999).
        """
        return None

    def rejuvenate(
        self, key: PRNGKeyArray, t: Int[Array, ""], particles: Any, kernel: Any, /
    ) -> tuple[Any, dict[str, Array]]:
        """All particles after moves that leave their law as it is, made after each resampling before step `t`.

        Args:
            key: a random key.
            t: the step to come.
            particles: `(particle, ...)`, equally weighted.
            kernel: what was given as `smc(..., rejuvenate=)`.

        Returns:
            The particles, and a dict of scalars that is kept in `result.path.info`.
        """
        return particles, {}

    def adapt(
        self, t: Int[Array, ""], particles: Any, log_weights: Float[Array, " particle"], /
    ) -> Any:
        """The particles before step `t`, after a look at all of them: a model may write the next temperature into them.

        See `keeps_lineage`.
        """
        return particles

    def finished(self, particles: Any, /) -> Bool[Array, ""] | None:
        """Whether the run ends here, before `num_steps`; None where their number alone decides."""
        return None

    def engine(self, settings: Any, /) -> Any:
        """The algorithm that runs this model by the settings of `smc`: these, with the model in them."""
        check_particle(self)
        return dataclasses.replace(settings, model=self)

    # --- paths that are given: conditional SMC and smoothing ---

    def reference(self, choices: dict[str, Any], /) -> Any:
        """The choices of every step, `(step, ...)`, out of all choices."""
        raise self._without("reference")

    def replay(self, t: Int[Array, ""], particle: Any, now: Any, /) -> tuple[Any, Float[Array, ""]]:
        """`step` to given choices; `init`, if `particle` is None."""
        raise self._without("replay")

    def log_transition(self, t: Int[Array, ""], particle: Any, now: Any, /) -> Float[Array, ""]:
        """Log density of a step to given choices, `log M_t + log G_t`."""
        raise self._without("log_transition")

    def taken(self, particle: Any, /) -> Any:
        """The choices of a particle's last step."""
        raise self._without("taken")

    def steps_of(self, particles: Any, /) -> Any:
        """The choices of a whole path out of its particles, `(step, ...)`."""
        raise self._without("steps_of")

    # --- as a part of a program: `normalize(target, by=smc(model, N))` ---

    def draw_posterior(
        self, target: Any, num_particles: int, /
    ) -> tuple[dict[str, Any], Array, Array]:
        """A path by its weight, its log density, and the log evidence of the run that drew it, all without a key."""
        raise self._inside()

    def conditional_evidence(
        self, target: Any, choices: dict[str, Any], num_particles: int, /
    ) -> Array:
        """The log evidence of a run around given choices, without a key."""
        raise self._inside()

    # --- panels of several series ---

    def each_series(self, f: Callable[..., Any], key: PRNGKeyArray, /, *xs: Any) -> Any:
        """`f(key, model, *xs)` for every series; results and `xs` lead with the axes of `panel_shape`."""
        return f(key, self, *xs)

    def total_evidence(self, log_evidence: Float[Array, "*series"], /) -> Float[Array, ""]:
        """The log evidence of the whole out of that of each series."""
        return log_evidence

    def _without(self, hook: str) -> Exception:
        return ModelError(
            f"{type(self).__name__} has no {signature_of(FeynmanKac, hook)}, which conditional SMC and smoothing need: "
            "give it one"
        )

    def _inside(self) -> Exception:
        return WeftError(
            "smc inside a program (by=smc(...)) takes filtering(...), whose steps are programs; "
            f"{type(self).__name__} draws by keys"
        )


def has(model: FeynmanKac, hook: str) -> bool:
    """Whether a model has a hook of its own."""
    return getattr(type(model), hook) is not getattr(FeynmanKac, hook)


def as_model(x: Any) -> Any:
    """A Feynman-Kac model as it is, and an Equinox module with `init` and `step` as one; all else as it is.

    Such a module gets `FeynmanKac` as one more base. So what it has of hooks is called, and a misspelt one is refused.

    Raises:
        ModelError: if a hook of the module is misspelt, or takes other arguments.
    """
    taken = isinstance(x, eqx.Module) and all(hasattr(x, m) for m in ("num_steps", "init", "step"))
    if isinstance(x, FeynmanKac) or not taken:
        return x
    model = object.__new__(_based(type(x)))
    for field in dataclasses.fields(x):
        object.__setattr__(model, field.name, getattr(x, field.name))
    check_hooks(model, FeynmanKac, ATTRIBUTES)
    return model


@functools.cache
def _based(cls: type) -> type:
    """A class with `FeynmanKac` as one more base."""
    return type(cls)(cls.__name__, (cls, FeynmanKac), {"__module__": cls.__module__})


def require_model(x: Any, what: str) -> None:
    """Raise TypeError unless this is a Feynman-Kac model."""
    if not isinstance(x, FeynmanKac):
        raise TypeError(
            f"{what}: expected a Feynman-Kac model (a weft.inference.FeynmanKac with num_steps, init(key), "
            f"step(key, t, particle), or an equinox.Module that has them), got {type(x).__name__}"
        )


def check_particle(model: FeynmanKac) -> None:
    """Raise ModelError unless potentials are scalars, and a step leaves the structure of a particle as it is."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    first = jax.eval_shape(model.init, key)
    then = jax.eval_shape(model.step, key, jnp.int32(1), first[0])
    for name, (_, weight) in (("init", first), ("step", then)):
        if weight.shape != ():
            raise ModelError(
                f"smc: {name} must give the logarithm of one potential, a scalar; got shape {weight.shape}"
            )
    a, b = (jax.tree.map(lambda s: (s.shape, s.dtype), p) for p in (first[0], then[0]))
    if a != b:
        raise ModelError(
            f"smc: a step changes the particle: init gives {a}, step gives {b}. Both must have the same structure, "
            "shapes and dtypes"
        )
