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
from .objectives import eubo as eubo
from .objectives import forward_kl as forward_kl
from .objectives import iwelbo as iwelbo
from .objectives import log_variance as log_variance
from .objectives import renyi as renyi
from .objectives import rws as rws
from .objectives import sleep_phi as sleep_phi
from .objectives import wake_phi as wake_phi
from .objectives import wake_theta as wake_theta
from .parameters import constrained as constrained
from .parameters import fixed as fixed
from .recovery import recover as recover
from .results import Draws as Draws
from .results import Particles as Particles
from .storage import load as load
