"""Rules for an early stop of a fit, from the bounds that were estimated so far."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from weft.ppl.stage.errors import WeftError


class Windows(eqx.Module):
    """The moments of two successive windows of estimates.

    Attributes:
        count: the number of finite estimates in the present window.
        mean: their mean.
        squares: the sum of their squared distances from the mean.
        before: the same three numbers for the window before. Its count is zero as long as there is none.
    """

    count: Float[Array, ""]
    mean: Float[Array, ""]
    squares: Float[Array, ""]
    before: Float[Array, " 3"]


class plateau(eqx.Module):
    r"""A rule that stops a fit as soon as the bound no longer rises.

    After every `window` steps the mean of the last `window` estimates is compared with the mean of the `window`
    estimates before. The fit stops if it has risen by no more than

    $$\max(\mathrm{tolerance}, z s), \qquad s^2 = \frac{v_1}{n_1} + \frac{v_2}{n_2},$$

    where $v_i$ and $n_i$ are the variances and the counts of the finite estimates in the two windows. Estimates are
    independent given the parameters. So a bound that rises by $\delta$ in a window is stopped, at one decision, with
    probability $\Phi(z - \delta / s)$. A level bound is stopped with probability $\Phi(z)$, by default 0.977. Slow
    progress is seen if the window is so long that the noise of its mean is smaller than the progress.

    Decisions depend on the estimates alone. Progress bars and interruptions change nothing.

    Attributes:
        window: the number of steps in a window. The first decision comes after two windows.
        tolerance: a rise that is not worth another window, in the units of the objective.
        z: a rise of fewer standard errors than this is taken for noise.

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
            raise WeftError(f"plateau: window must be an integer, at least 2, got {self.window!r}")
        for name in ("tolerance", "z"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value >= 0:
                raise WeftError(f"plateau: {name} must be a number, at least 0, got {value!r}")

    def init(self) -> Windows:
        """The windows before the first estimate."""
        zero = jnp.zeros(())
        return Windows(zero, zero, zero, jnp.zeros(3))

    def update(
        self, seen: Windows, step: Any, gain: Float[Array, ""]
    ) -> tuple[Windows, Bool[Array, ""]]:
        """Take one more estimate, and say whether to stop after it.

        Args:
            seen: the windows so far.
            step: the number of estimates so far.
            gain: the new estimate; more is better. It is left out if it is not finite.
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
    """The squared standard error of the mean of a window."""
    count, _, squares = moments
    return squares / jnp.maximum(count - 1, 1) / jnp.maximum(count, 1)
