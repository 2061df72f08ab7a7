"""When a fit may stop: a rule over the bounds estimated so far, decided by iteration."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from weft.ppl.stage.errors import WeftError


class Windows(eqx.Module):
    """Two successive windows of estimates, by their moments.

    Attributes:
        count: how many finite estimates the present window has.
        mean: their mean.
        squares: their summed squared distance from it.
        before: the same three of the window before; its count is zero as long as there is none.
    """

    count: Float[Array, ""]
    mean: Float[Array, ""]
    squares: Float[Array, ""]
    before: Float[Array, " 3"]


class plateau(eqx.Module):
    r"""Stop as soon as the bound rises no more.

    After every `window` steps the mean of the last `window` estimates is compared with that of the
    `window` before. The fit stops if the difference `d` is at most

        max(tolerance, z s),    s^2 = v_1 / n_1 + v_2 / n_2,

    with the variances `v` and the counts `n` of the finite estimates of the two windows, which are
    independent given the parameters. At one decision a bound that rises by `delta` a window is
    stopped with probability `Phi(z - delta / s)`, and a level one with probability `Phi(z)`, 0.977
    by default: slow progress is seen if the window is long enough for the noise of its mean to be
    smaller.

    Decisions depend on the iteration alone: progress bars and interruptions change nothing.

    Attributes:
        window: steps in a window; the first decision is after two.
        tolerance: a rise, in the units of the objective, that is not worth another window.
        z: how many standard errors a rise must be, not to be taken for noise.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from weft.inference import fit, plateau
        >>> def hill(key, params):
        ...     return -(params - 3.0) ** 2 + 0.1 * jax.random.normal(key)
        >>> found = fit(jax.random.key(0), hill, 0.0, optax.sgd(0.05), 10_000, stop=plateau(50), progress=False)
        >>> bool(found.stopped), bool(found.bounds.size < 2000), f"{found.params:.2f}"
        (True, True, '3.00')
    """

    window: int = eqx.field(static=True, default=500)
    tolerance: Any = 0.0
    z: Any = 2.0

    def __check_init__(self) -> None:
        if not isinstance(self.window, (int, np.integer)) or self.window < 2:
            raise WeftError(f"plateau: window must be an integer, 2 at least, got {self.window!r}")
        for name in ("tolerance", "z"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value >= 0:
                raise WeftError(f"plateau: {name} must be a number, 0 at least, got {value!r}")

    def init(self) -> Windows:
        """No estimates yet."""
        zero = jnp.zeros(())
        return Windows(zero, zero, zero, jnp.zeros(3))

    def update(
        self, seen: Windows, step: Any, gain: Float[Array, ""]
    ) -> tuple[Windows, Bool[Array, ""]]:
        """One more estimate, of which more is better, and whether to stop after it.

        Args:
            seen: the estimates so far.
            step: how many there are.
            gain: this one; left out where it is not finite.
        """
        finite = jnp.isfinite(gain)
        gain = jnp.where(finite, gain, seen.mean).astype(seen.mean.dtype)
        count = seen.count + finite
        apart = gain - seen.mean
        mean = seen.mean + apart / jnp.maximum(count, 1)
        squares = seen.squares + apart * (gain - mean)  # Welford
        now = jnp.stack([count, mean, squares])

        full = (step + 1) % self.window == 0
        rise = mean - seen.before[1]
        error = jnp.sqrt(_error(now) + _error(seen.before))
        enough = (count > 1) & (seen.before[0] > 1)
        stop = full & enough & (rise <= jnp.maximum(self.tolerance, self.z * error))
        now = jnp.where(full, jnp.zeros_like(now), now)
        return Windows(
            *now, before=jnp.where(full, jnp.stack([count, mean, squares]), seen.before)
        ), stop


def _error(moments: Float[Array, " 3"]) -> Array:
    """The squared standard error of a window's mean."""
    count, _, squares = moments
    return squares / jnp.maximum(count - 1, 1) / jnp.maximum(count, 1)
