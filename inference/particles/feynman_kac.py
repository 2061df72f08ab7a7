"""Feynman-Kac models: what sequential Monte Carlo samples.

A Feynman-Kac model is a Markov chain with a weight for each of its states. Let `M_t` be the law of a step and `G_t` the
potential. The target after `t` steps is

    Q_t(x_0, ..., x_t) = 1/Z_t M_0(x_0) G_0(x_0) prod_{s=1..t} M_s(x_s | x_{s-1}) G_s(x_{s-1}, x_s).

Filtering, tempering and much else are such models (Del Moral 2004; Chopin and Papaspiliopoulos 2020, chapter 5).
`FeynmanKac` is their base class. It has a method for everything that the engine may ask of a model. All but `init` and
`step` do nothing until a model overrides them.
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
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from weft.ppl.stage.errors import ModelError, WeftError
from weft.ppl.stage.modules import Noun

from .hooks import check_hooks, signature_of
from .returned import check_particle

ATTRIBUTES: dict[str, type] = {
    "num_steps": int,
    "closed": bool,
    "keeps_lineage": bool,
    "panel_shape": tuple,
}
"""The types of the optional attributes of a model, and of its number of steps."""


class FeynmanKac(Noun):
    """Base of Feynman-Kac models: what sequential Monte Carlo samples.

    A model has `num_steps`, `init` and `step`. It is written for one particle, which is any pytree of arrays. All other
    methods and attributes are optional hooks: `smc` calls them, and those of this class do nothing. Methods are called
    by position.

    A model is an Equinox module. Its arrays are traced. Python numbers among its fields, also floats, stay Python
    numbers, so a method may have `if self.scale > 0`.

    Attributes:
        num_steps: the number of potentials. `init` gives the first, `step` the others. A field or a property.
        closed: whether a finished run cannot be continued with more observations.
        keeps_lineage: whether `adapt` leaves each particle a descendant of itself, and writes only settings into it. If
            a model has `adapt` and does not say so, particles may have been replaced. Their lineages and the variance
            of the evidence are then not stated.
        panel_shape: the numbers of series, if the model is a panel of several.

    Raises:
        ModelError: when a model is made, if the name of a method or attribute of its class is nearly that of a hook; or
            if it is that of a hook, but takes other arguments. Your own helpers may have any other name, or begin with
            an underscore.

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
            """The number of potentials."""
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
        """A first particle, and the logarithm of its potential. NaN counts as a potential of zero."""

    @abc.abstractmethod
    def step(
        self, key: PRNGKeyArray, t: Int[Array, ""], particle: Any, /
    ) -> tuple[Any, Float[Array, ""]]:
        """The particle at time `t` (from 1), given the one before, and the logarithm of its potential."""

    # --- what a user sees ---

    def choices(self, particle: Any, /) -> Any:
        """What a user sees of a particle: a nested dict. By default, the whole particle."""
        return particle

    def paths(self, last: Any, along: Any, /) -> Any:
        """What a user sees of whole paths, if a run keeps them. By default, the choices of the last step.

        Args:
            last: the particles of the last step, `(particle, ...)`.
            along: the particles that they descend from, `(particle, step, ...)`.
        """
        return jax.vmap(self.choices)(last)

    def observation(self, t: int, /) -> str:
        """The observation at a step, in words, for messages."""
        return ""

    def remark(self, particles: Any, /) -> str | None:
        """A sentence on the last particles that a user should read; None if there is none."""
        return None

    # --- what steers a run ---

    def lookahead(self, t: Int[Array, ""], particle: Any, /) -> Float[Array, ""] | None:
        """The log preference for a particle when particles are resampled before step `t`; None for no preference.

        The weights make up for it: this is the auxiliary particle filter of Pitt and Shephard (1999).
        """
        return None

    def rejuvenate(
        self, key: PRNGKeyArray, t: Int[Array, ""], particles: Any, kernel: Any, /
    ) -> tuple[Any, dict[str, Array]]:
        """Move all particles by steps that leave their law invariant, after each resampling before step `t`.

        Args:
            key: a random key.
            t: the coming step.
            particles: `(particle, ...)`, equally weighted.
            kernel: the argument `rejuvenate` of `smc`.

        Returns:
            The particles, and a dict of scalars that is kept in `result.path.info`.
        """
        return particles, {}

    def adapt(
        self, t: Int[Array, ""], particles: Any, log_weights: Float[Array, " particle"], /
    ) -> Any:
        """The particles before step `t`, changed in the light of all of them.

        A model may write the next temperature into them, for instance. See `keeps_lineage`.
        """
        return particles

    def finished(self, particles: Any, /) -> Bool[Array, ""] | None:
        """Whether the run ends here, before `num_steps`. None if only the number of steps decides."""
        return None

    def engine(self, settings: Any, /) -> Any:
        """The algorithm that runs this model, given the settings of `smc` with the model in them."""
        check_particle(self)
        return dataclasses.replace(settings, model=self)

    # --- paths that are given: conditional SMC and smoothing ---

    def reference(self, choices: dict[str, Any], /) -> Any:
        """The choices of every step, `(step, ...)`, from all choices."""
        raise self._without("reference")

    def replay(self, t: Int[Array, ""], particle: Any, now: Any, /) -> tuple[Any, Float[Array, ""]]:
        """`step` with given choices; `init` with given choices if `particle` is None."""
        raise self._without("replay")

    def log_transition(self, t: Int[Array, ""], particle: Any, now: Any, /) -> Float[Array, ""]:
        """The log density of a step with given choices, `log M_t + log G_t`."""
        raise self._without("log_transition")

    def taken(self, particle: Any, /) -> Any:
        """The choices of a particle's last step."""
        raise self._without("taken")

    def steps_of(self, particles: Any, /) -> Any:
        """The choices of a whole path, `(step, ...)`, from its particles."""
        raise self._without("steps_of")

    # --- as a part of a program: `normalize(target, by=smc(model, N))` ---

    def draw_posterior(
        self, target: Any, num_particles: int, /
    ) -> tuple[dict[str, Any], Array, Array]:
        """A path drawn by its weight, its log density, and the log evidence of the run. None of this takes a key."""
        raise self._inside()

    def conditional_evidence(
        self, target: Any, choices: dict[str, Any], num_particles: int, /
    ) -> Array:
        """The log evidence of a run around given choices, without a key."""
        raise self._inside()

    # --- panels of several series ---

    def each_series(self, f: Callable[..., Any], key: PRNGKeyArray, /, *xs: Any) -> Any:
        """`f(key, model, *xs)` for every series. The results and `xs` lead with the axes of `panel_shape`."""
        return f(key, self, *xs)

    def total_evidence(self, log_evidence: Float[Array, "*series"], /) -> Float[Array, ""]:
        """The log evidence of the whole panel, from that of each series."""
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
    """Whether a model has a hook of its own, as a method or in a field."""
    return hook in vars(model) or getattr(type(model), hook) is not getattr(FeynmanKac, hook)


def as_model(x: Any) -> Any:
    """Take an Equinox module with `init` and `step` as a Feynman-Kac model. Anything else is returned as it is.

    Such a module gets `FeynmanKac` as an additional base. So its hooks are called, and a misspelt hook is refused.
    Arrays of NumPy become those of JAX, which a traced step can index.

    Raises:
        ModelError: if a hook of the module is misspelt, or takes other arguments.
    """
    taken = isinstance(x, eqx.Module) and all(hasattr(x, m) for m in ("num_steps", "init", "step"))
    if not (isinstance(x, FeynmanKac) or taken):
        return x
    model = x
    if not isinstance(x, FeynmanKac):
        model = object.__new__(_based(type(x)))
        for field in dataclasses.fields(x):
            object.__setattr__(model, field.name, getattr(x, field.name))
        check_hooks(model, FeynmanKac, ATTRIBUTES)
    if any(isinstance(leaf, (np.ndarray, np.generic)) for leaf in jax.tree.leaves(model)):
        model = jax.tree.map(_of_jax, model)
    return model


def _of_jax(leaf: Any) -> Any:
    """An array of NumPy as one of JAX, and a number of NumPy as one of Python."""
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "OSU":
        return jnp.asarray(leaf)
    return leaf.item() if isinstance(leaf, np.generic) else leaf


@functools.cache
def _based(cls: type) -> type:
    """The class with `FeynmanKac` as an additional base."""
    return type(cls)(cls.__name__, (cls, FeynmanKac), {"__module__": cls.__module__})


def require_model(x: Any, what: str) -> None:
    """Raise TypeError unless this is a Feynman-Kac model."""
    if not isinstance(x, FeynmanKac):
        raise TypeError(
            f"{what}: expected a Feynman-Kac model (a weft.inference.FeynmanKac with num_steps, init(key), "
            f"step(key, t, particle), or an equinox.Module that has them), got {type(x).__name__}"
        )


def require_steps(model: FeynmanKac) -> None:
    """Raise ModelError unless the number of steps is known, and positive."""
    steps, name = model.num_steps, type(model).__name__
    if not isinstance(steps, (int, np.integer)):
        raise ModelError(
            f"smc: {name}.num_steps must be a Python integer, since it is the length of arrays; got {steps!r}"
        )
    if steps < 1:
        raise ModelError(f"smc: the model has no step, {name}.num_steps is {steps}")
