r"""Laws that right samplers obey, as checks to run on one's own.

A sampler that is wrong seldom fails: it gives draws of another law. What tells is a law that every right one obeys, on
a target small enough to know the answer (Ścibior et al. 2018):

- `check_proper_weighting`: weighted draws estimate integrals under the unnormalised target without bias;
- `check_invariance`: a Markov kernel that starts from the target's law ends with it;
- `check_marginals`: draws have the target's marginals, up to a bias that goes away with their number.

Each runs the sampler many times, compares means with what they should be, in standard errors, and gives a `LawReport`.
The answer is computed by enumeration where all latent choices are finite.
"""

from .checks.law_report import LawReport as LawReport
from .checks.law_report import LawRow as LawRow
from .checks.laws import check_invariance as check_invariance
from .checks.laws import check_marginals as check_marginals
from .checks.laws import check_proper_weighting as check_proper_weighting
