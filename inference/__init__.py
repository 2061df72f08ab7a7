"""Inference: algorithms that take a target and give draws, particles or a fit."""

from . import kernels as kernels
from .algorithm import Algorithm as Algorithm
from .algorithm import State as State
from .enumeration import enumeration as enumeration
from .fit import fit as fit
from .fitted import Fit as Fit
from .hmc import hmc as hmc
from .hmc import nuts as nuts
from .importance import importance as importance
from .initial import InitStrategy as InitStrategy
from .objectives import elbo as elbo
from .parameters import constrained as constrained
from .parameters import fixed as fixed
from .recovery import recover as recover
from .results import Draws as Draws
from .results import Particles as Particles
from .storage import load as load
