"""NUTS on the reference posteriors, in runs that fit continuous integration.

The null is that a run's mean is the reference's; z is their difference over its Monte-Carlo error (own and
reference's). Some 150 scalars are tested, at |z| < 5.5 each: the family-wise size is below 1e-5 were the errors
exactly Gaussian, so a red test means a bug. The seed is fixed. `python benchmarks/posteriors.py` makes the full runs,
at |z| < 4.
"""

import jax
import numpy as np
import pytest

from benchmarks.posteriors import compare, load, sample
from examples.posteriors import CASES

QUICK = {"num_warmup": 500, "num_samples": 500, "num_chains": 4}
SLOW = {"lotka_volterra", "arK", "hmm", "gauss_mix", "earnings", "eight_schools_centered"}


def check(rows):
    for row in rows:
        assert row.ess > 100, f"{row.scalar}: effective sample size {row.ess:.0f}"
        assert abs(row.z) < 5.5, (
            f"{row.scalar}: mean {row.mean:.5g}, reference {row.reference_mean:.5g}, z {row.z:.1f}"
        )
        # The error of an estimated sd, relative, is some 1/sqrt(2 ESS); tails heavier than normal make it larger.
        assert abs(np.log(row.sd_ratio)) < 0.1 + 5.5 / np.sqrt(2 * row.ess), (
            f"{row.scalar}: sd {row.sd:.4g}, reference {row.reference_sd:.4g}"
        )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]
)
def test_nuts_recovers_the_reference(name):
    case = CASES[name]
    check(compare(case, sample(case, **QUICK)))


def test_centred_and_noncentred_schools_are_one_joint_law():
    """Their log densities differ by the log-Jacobian of theta = mu + tau * base, 8 log tau."""
    centred, noncentred = CASES["eight_schools_centered"], CASES["eight_schools_noncentered"]
    data = load(centred, "data")
    one, other = centred.target(data), noncentred.target(data)
    u = other.unconstrain()
    for seed in range(3):
        trace = u.trace(u.init(jax.random.key(seed)))
        tau = trace.choices["tau"]
        originals = {k: trace.choices[k] for k in ("mu", "tau")} | {"theta": trace.derived["theta"]}
        np.testing.assert_allclose(
            one.log_density(originals) + 8 * np.log(tau), trace.log_density, rtol=2e-5
        )
