"""Markov kernels: moves of the choices of a target that leave its law invariant.

Every kernel has `move(key, choices, target) -> (choices, info)`. The choices are nested dicts of all latent choices.
`info` is a flat dict of scalars, with at least "acceptance_rate". A move is pure: it works under `jit`, `vmap` and
`scan`, also with a target of traced arrays. `mcmc` runs any kernel.

| kernel | moves | needs | a warm-up tunes |
| --- | --- | --- | --- |
| `hmc`, `nuts`, `mala`, `barker` | all at once, along gradients | continuous choices | step size, inverse mass |
| `random_walk` | all at once | continuous choices | its scale |
| `slice_sampler` | one number after the other | continuous choices | |
| `elliptical_slice` | all at once | normal priors | |
| `gibbs` | the choices that are named, by an exact draw given all others | finite supports, or conjugate priors | |
| `conditional_smc` | the choices of a scan | observations in it | |
| `metropolis_hastings`, `involutive` | what a program proposes | its density | |
| `block`, `cycle`, `mixture`, `repeat` | what their kernels move | | what their kernels tune |

The kernels of the first three rows follow a density on R^n. They can do without a target:
`kernel.on(log_density)` binds them to a density. It gives `init(position)` and
`step(key, state) -> (state, info)`. A position is a pytree of floating arrays, a density a function of it.
The transitions are BlackJAX's.

Examples:
    >>> import jax
    >>> from weft.inference import kernels
    >>> kernel = kernels.hmc(step_size=0.5, num_steps=5).on(lambda x: -0.5 * (x**2).sum())
    >>> state = kernel.init(jax.numpy.ones(2))
    >>> state, info = jax.jit(kernel.step)(jax.random.key(0), state)
    >>> state.position.shape, bool(info.is_divergent)
    ((2,), False)
"""

from .markov.combinators import block as block
from .markov.combinators import cycle as cycle
from .markov.combinators import mixture as mixture
from .markov.combinators import repeat as repeat
from .markov.density_kernels import AdaptiveKernel as AdaptiveKernel
from .markov.density_kernels import BoundKernel as BoundKernel
from .markov.density_kernels import DensityKernel as DensityKernel
from .markov.elliptical import elliptical_slice as elliptical_slice
from .markov.gibbs import gibbs as gibbs
from .markov.gradient_free_kernels import random_walk as random_walk
from .markov.gradient_free_kernels import slice_sampler as slice_sampler
from .markov.gradient_kernels import barker as barker
from .markov.gradient_kernels import hmc as hmc
from .markov.gradient_kernels import mala as mala
from .markov.gradient_kernels import nuts as nuts
from .markov.kernel import Choices as Choices
from .markov.kernel import Info as Info
from .markov.kernel import Kernel as Kernel
from .markov.metropolis import involutive as involutive
from .markov.metropolis import metropolis_hastings as metropolis_hastings
from .particles.conditional import conditional_smc as conditional_smc
