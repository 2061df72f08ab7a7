"""Fourteen reference posteriors, written in Weft.

Each module holds one family: read it for how such a model is written. `CASES` says, for each case, how its data
become a target and what is reported; `benchmarks/posteriors.py` runs them against their references.

- `schools`: a hierarchical model, centred and non-centred.
- `regression`: six linear regressions from one model, priors as arguments.
- `series`: an autoregression, a hidden Markov model (its states summed out, and by hand) and Brownian motion, as scans.
- `mixture`: a mixture of two normals, with and without labels.
- `gaussian_process`: counts with a latent Gaussian process.
- `lotka_volterra`: an ordinary differential equation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from weft import Target

from . import gaussian_process, lotka_volterra, mixture, regression, schools, series


@dataclass(frozen=True)
class Case:
    """A reference case: data to target, and what to compare.

    Attributes:
        folder: where the data and the reference stand, below `tests/refcases`.
        target: from the content of `data.json` to the posterior.
        report: addresses whose scalars the reference names; vectors become `name[1]`, `name[2]`, ...
        x64: whether double precision is needed: jitter far below single precision, or correlations near one.
        settings: what `nuts` is given for this case beyond the defaults of the run.
        init: from the content of `data.json` to choices to begin at, where random ones will not do.
    """

    folder: str
    target: Callable[[dict[str, Any]], Target]
    report: tuple[str, ...]
    x64: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    init: Callable[[dict[str, Any]], dict[str, Any]] | None = None


_LINEAR = {"report": ("beta", "sigma"), "settings": {"dense_mass": True, "num_samples": 2000}}

CASES: dict[str, Case] = {
    "eight_schools_centered": Case(
        "posteriordb/eight_schools-eight_schools_noncentered",
        schools.centered,
        ("theta", "mu", "tau"),
        # The neck of the funnel wants tiny steps: at 0.99 and 64,000 draws tau is visibly biased (z = 3.7).
        settings={"target_acceptance": 0.999, "num_warmup": 2000, "num_samples": 8000},
    ),
    "eight_schools_noncentered": Case(
        "posteriordb/eight_schools-eight_schools_noncentered",
        schools.noncentered_target,
        ("theta", "mu", "tau"),
        settings={"target_acceptance": 0.95, "num_samples": 2000},
    ),
    "earnings": Case(
        "posteriordb/earnings-logearn_interaction", regression.earnings, x64=True, **_LINEAR
    ),
    "kidiq": Case("posteriordb/kidiq-kidscore_interaction", regression.kidiq, x64=True, **_LINEAR),
    "mesquite": Case("posteriordb/mesquite-logmesquite_logvash", regression.mesquite, **_LINEAR),
    "nes1972": Case("posteriordb/nes1972-nes", regression.nes, **_LINEAR),
    "sblri": Case("posteriordb/sblri-blr", regression.sblri, x64=True, **_LINEAR),
    "kilpisjarvi": Case(
        "posteriordb/kilpisjarvi_mod-kilpisjarvi",
        regression.kilpisjarvi,
        ("alpha", "beta", "sigma"),
        x64=True,
        settings={"dense_mass": True, "num_samples": 2000},
    ),
    "arK": Case(
        "posteriordb/arK-arK",
        series.autoregression_target,
        ("alpha", "beta", "sigma"),
        settings={"dense_mass": True},
    ),
    "hmm": Case(
        "posteriordb/hmm_example-hmm_example",
        series.hidden_markov_target,
        ("theta1", "theta2", "mu"),
        settings={"dense_mass": True},
    ),
    "hmm_by_hand": Case(
        "posteriordb/hmm_example-hmm_example",
        series.hidden_markov_by_hand_target,
        ("theta1", "theta2", "mu"),
        settings={"dense_mass": True},
    ),
    "gauss_mix": Case(
        "posteriordb/low_dim_gauss_mix-low_dim_gauss_mix",
        mixture.target,
        ("mu", "sigma", "theta"),
    ),
    "gauss_mix_labelled": Case(
        "posteriordb/low_dim_gauss_mix-low_dim_gauss_mix",
        mixture.labelled_target,
        ("mu", "sigma", "theta"),
    ),
    "gp_pois_regr": Case(
        "posteriordb/gp_pois_regr-gp_pois_regr",
        gaussian_process.target,
        ("rho", "alpha", "f"),
        x64=True,
        settings={"target_acceptance": 0.95, "num_samples": 2000},
    ),
    "lotka_volterra": Case(
        "posteriordb/hudson_lynx_hare-lotka_volterra",
        lotka_volterra.target,
        ("theta", "z_init", "sigma"),
        settings={"dense_mass": True},
        init=lotka_volterra.start,
    ),
    "brownian_known_scales": Case(
        "inference_gym/brownian_known_scales", series.brownian_target, ("locs",)
    ),
    "brownian_unknown_scales": Case(
        "inference_gym/brownian_unknown_scales",
        series.brownian_unknown_scales_target,
        ("innovation_noise_scale", "observation_noise_scale", "locs"),
        x64=True,
    ),
}
