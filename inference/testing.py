r"""Checks of samplers: laws that every correct sampler obeys exactly.

A sampler that is wrong seldom fails. It gives draws of another law. These checks compare it with a law that every
correct sampler obeys, on a target so small that the answer is known (Ścibior et al. 2018):

- `check_proper_weighting`: weighted draws estimate integrals under the unnormalised target without bias.
- `check_invariance`: a Markov kernel that starts with the law of the target ends with it.
- `check_marginals`: draws have the marginals of the target, up to a bias that goes away with their number.

Each check runs the sampler many times, compares means with what they should be, in standard errors, and gives a
`LawReport`. If all latent choices are finite, the answer is computed by enumeration.
"""

from .checks.law_report import LawReport as LawReport
from .checks.law_report import LawRow as LawRow
from .checks.laws import check_invariance as check_invariance
from .checks.laws import check_marginals as check_marginals
from .checks.laws import check_proper_weighting as check_proper_weighting
