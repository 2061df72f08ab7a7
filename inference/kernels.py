"""Markov kernels: moves of the choices of a target by which its law stays as it is.

Every kernel has `move(key, choices, target) -> (choices, info)`: nested dicts of all latent choices go
in and come out, `info` is a flat dict of scalars with "acceptance_rate" at least. A move is pure; it
jits, vmaps and scans, also with a target of traced arrays. `mcmc` runs any kernel.

| kernel | moves | needs |
| --- | --- | --- |
| `hmc`, `nuts`, `mala` | all at once, along gradients | continuous choices |
| `random_walk`, `slice_sampler` | all at once, one by one | continuous choices |
| `elliptical_slice` | all at once | normal priors |
| `gibbs` | the named, by an exact draw given all others | finite supports, or conjugate priors |
| `conditional_smc` | the choices of a scan | observations in it |
| `metropolis_hastings`, `involutive` | what a program proposes | its density |
| `block`, `cycle`, `mixture`, `repeat` | what their kernels move | |

Those that follow a density on R^n (the first two rows) can do without a target, too:
`kernel.on(log_density)` binds them to a density; what that gives has `init(position)` and
`step(key, state) -> (state, info)`. Positions are pytrees of floating arrays, densities functions of
them. The transitions are BlackJAX's.

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
