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
from examples import exact
from examples.posteriors import CASES

QUICK = {"num_warmup": 500, "num_samples": 500, "num_chains": 4}


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


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_nuts_recovers_the_reference(name):
    case = CASES[name]
    settings = {} if name == "eight_schools_centered" else QUICK  # its funnel takes the full run
    check(compare(case, sample(case, **settings)))


def test_centred_and_noncentred_schools_are_one_joint_law():
    """Their log densities differ by the log-Jacobian of theta = mu + tau * base, 8 log tau."""
    centred, noncentred = CASES["eight_schools_centered"], CASES["eight_schools_noncentered"]
    data = load(centred, "data")
    one, other = centred.target(data), noncentred.target(data)
    for seed in range(3):
        trace, _ = other.generate(jax.random.key(seed), {})
        base = {name: trace.choices[name] for name in other.latents}
        tau = base["tau"]
        originals = {k: trace.choices[k] for k in ("mu", "tau")} | {"theta": trace.derived["theta"]}
        np.testing.assert_allclose(
            one.log_density(originals) + 8 * np.log(tau), other.log_density(base), rtol=2e-5
        )


def test_the_exact_answers_of_the_demo_are_the_reference_s():
    cases = {
        "eight_schools_noncentered": lambda d: exact.eight_schools(d["y"], d["sigma"]),
        "kidiq": lambda d: exact.regression(*kidiq_design(d), prior_scale=2.5),
    }
    for name, solve in cases.items():
        expected = load(CASES[name], "reference")["exact"]
        for scalar, found in solve(load(CASES[name], "data")).items():
            address, _, index = scalar.partition("[")
            one_based = f"{address}[{int(index[:-1]) + 1}]" if index else address
            want = expected[one_based]
            assert abs(found.mean - want["mean"]) < 1e-3 * want["sd"], scalar
            assert abs(found.sd / want["sd"] - 1) < 1e-3, scalar


def kidiq_design(data):
    school, iq = np.array(data["mom_hs"], float), np.array(data["mom_iq"])
    return np.stack([np.ones_like(iq), school, iq, school * iq], 1), np.array(
        data["kid_score"], float
    )
