"""Variational inference as an algorithm: a guide, an objective and an optimiser, to be run on a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxtyping import PRNGKeyArray
from weft.inference.run import libraries
from weft.ppl import Program, Target
from weft.ppl.programs.printing import Printed
from weft.ppl.stage.errors import WeftError
from weft.ppl.stage.modules import Module

from .fit import Fit, fit
from .objectives import Objective, elbo
from .stopping import plateau

if TYPE_CHECKING:
    import optax

FLAT_RATE, FALLING_RATE = 0.01, 0.02
"""Learning rates of Adam where none is asked for."""


class variational(Printed, Module):
    r"""An algorithm that fits a guide to a target: `fit`, with its settings in one value.

    It looks for the parameters that maximise $\mathbb{E}[\mathrm{objective}(\mathrm{key}, \phi)]$. The default
    objective is the ELBO, so the guide comes to minimise $\mathrm{KL}(q_\phi \,\|\, p)$. Like every algorithm it runs
    on any target, also under `jit`, and under `vmap` over data sets.

    Attributes:
        guide: a function `params -> Program` that draws exactly the target's latent choices; or, without `params`, a
            function from the target to such a guide and its first parameters, `(guide, params)`. `mean_field` and the
            other ready-made guides are functions of the second kind.
        params: where to begin, as `fit` takes it: a pytree, or a function `init(key)`.
        objective: a function from a target and a guide to an objective: `elbo`, or
            `lambda target, guide: iwelbo(target, guide, num_particles=10)`.
        optimizer: an Optax optimiser. The default is Adam. Its rate falls from 0.02 to 0 along a cosine over
            `num_steps`; it stays at 0.01 if the fit may stop early.
        num_steps: the most steps.
        num_restarts: the number of fits from different parameters; the best is kept. For more than one, `params` must
            be a function, or the guide `jittered(mean_field)`.
        stop: a rule for an early stop, `plateau(window)`.
        minimize: whether the objective is a loss.

    Raises:
        WeftError: if there are no parameters to begin at.

    References:
        Kucukelbir, Tran, Ranganath, Gelman and Blei (2017), for the ready-made guides.

    Examples:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from weft import gen, sample
        >>> from weft.inference import constrained, variational
        >>> @gen
        ... def model():
        ...     mu = sample("mu", dist.Normal(0.0, 1.0))
        ...     sample("y", dist.Normal(mu, 1.0))
        >>> @gen
        ... def guide(params):
        ...     sample("mu", dist.Normal(params["loc"], params["scale"]))
        >>> start = {"loc": 0.0, "scale": constrained(1.0, constraints.positive)}
        >>> algorithm = variational(guide, start, num_steps=1000)
        >>> fitted = algorithm.run(jax.random.key(0), model().given({"y": 2.0}), progress=False)
        >>> print(f"{fitted.params['loc']:.1f} {fitted.params['scale']:.1f}")
        1.0 0.7
    """

    guide: Callable[..., Any]
    params: Any = None
    objective: Callable[[Any, Any], Objective] = elbo
    optimizer: optax.GradientTransformation | None = None
    num_steps: int = 2000
    num_restarts: int = 1
    stop: plateau | None = None
    minimize: bool = False

    def __check_init__(self) -> None:
        if isinstance(self.guide, Program) or not callable(self.guide):
            raise TypeError(
                "variational: expected a guide that is a function of parameters, or of the target, got "
                f"{type(self.guide).__name__}"
            )

    def run(
        self, key: PRNGKeyArray, target: Target, *, init: Any = None, progress: bool = True
    ) -> Fit:
        """Fit the guide.

        Args:
            key: a random key.
            target: what to infer: `model(*args).given(data)`.
            init: parameters to begin at, in place of the algorithm's own.
            progress: whether to show a progress bar.

        Returns:
            The fit.

        Raises:
            WeftError: if guide, target and parameters do not match.
            DensityError: if the first bound is not finite.
        """
        if not isinstance(target, Target):
            raise TypeError(
                f"variational.run expected a Target, got {type(target).__name__}: condition a program first, "
                "model(*args).given(data), or .given() if it has no data"
            )
        guide, params = self.guide, self.params
        if params is None:
            guide, params = self._made(target)
        optimizer = self._default_optimizer() if self.optimizer is None else self.optimizer
        return fit(
            key,
            self.objective(target, guide),
            params if init is None else init,
            optimizer,
            self.num_steps,
            minimize=self.minimize,
            num_restarts=self.num_restarts,
            stop=self.stop,
            progress=progress,
        )

    def _default_optimizer(self) -> optax.GradientTransformation:
        if self.stop is not None:
            return libraries.optax.adam(FLAT_RATE)
        return libraries.optax.adam(
            libraries.optax.cosine_decay_schedule(FALLING_RATE, self.num_steps)
        )

    def _made(self, target: Target) -> tuple[Callable[..., Any], Any]:
        """The guide and its first parameters, made for the target."""
        found = self.guide(target)
        if isinstance(found, tuple) and len(found) == 2 and callable(found[0]):
            return found
        raise WeftError(
            "variational: without params, the guide is a function from the target to (guide, params), and this one "
            f"gave {type(found).__name__}. Give the parameters to begin at: variational(guide, params)"
        )
