"""Six linear regressions from one model.

    beta ~ prior,  sigma ~ prior,  y_i ~ N(x_i . beta, sigma)

Priors are arguments: a distribution is a pytree like any other. Flat priors are `ImproperUniform`: they have no
sampler and no normalising constant, which a posterior does not need.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from weft import Target, gen, sample


@gen
def linear_regression(
    design: jax.Array, beta: dist.Distribution, sigma: dist.Distribution
) -> jax.Array:
    """Responses of `rows` with covariates `design` of shape (rows, k); `beta` is a law over k-vectors."""
    coefficients = sample("beta", beta)
    scale = sample("sigma", sigma)

    def row(x: jax.Array) -> jax.Array:
        return sample("y", dist.Normal(x @ coefficients, scale))

    return jax.vmap(row, axis_name="row")(design)


@gen
def trend(x: jax.Array, alpha: dist.Distribution, beta: dist.Distribution) -> jax.Array:
    """A straight line through `x`, flat in the scale of the noise."""
    intercept = sample("alpha", alpha)
    slope = sample("beta", beta)
    scale = sample("sigma", flat_positive())
    row = lambda x: sample("y", dist.Normal(intercept + slope * x, scale))  # noqa: E731
    return jax.vmap(row, axis_name="year")(x)


def flat(size: int) -> dist.Distribution:
    """The improper uniform law on R^size."""
    return dist.ImproperUniform(constraints.real_vector, (), (size,))


def flat_positive() -> dist.Distribution:
    """The improper uniform law on the positive reals."""
    return dist.ImproperUniform(constraints.positive, (), ())


def _columns(*columns: Any) -> jax.Array:
    """A design matrix with an intercept, (rows, 1 + columns)."""
    arrays = [np.asarray(c, float) for c in columns]
    return jnp.asarray(np.stack([np.ones_like(arrays[0]), *arrays], axis=1))


def earnings(data: dict[str, Any]) -> Target:
    """Log earnings on height, sex and their product; flat priors."""
    height, male = np.asarray(data["height"]), np.asarray(data["male"])
    design = _columns(height, male, height * male)
    return linear_regression(design, flat(4), flat_positive()).given({"y": np.log(data["earn"])})


def kidiq(data: dict[str, Any]) -> Target:
    """Children's test scores on the mother's schooling, her IQ and their product."""
    school, iq = np.asarray(data["mom_hs"]), np.asarray(data["mom_iq"])
    program = linear_regression(_columns(school, iq, school * iq), flat(4), dist.HalfCauchy(2.5))
    return program.given({"y": data["kid_score"]})


def mesquite(data: dict[str, Any]) -> Target:
    """Log leaf weight of bushes on logs of their volume, area, shape and height; flat priors."""
    d1, d2, c = (np.asarray(data[k]) for k in ("diam1", "diam2", "canopy_height"))
    design = _columns(
        np.log(d1 * d2 * c),
        np.log(d1 * d2),
        np.log(d1 / d2),
        np.log(data["total_height"]),
        data["group"],
    )
    return linear_regression(design, flat(6), flat_positive()).given({"y": np.log(data["weight"])})


def nes(data: dict[str, Any]) -> Target:
    """Party identification (1972 election study) on ideology and demographics; flat priors."""
    age = np.asarray(data["age_discrete"])
    design = _columns(
        data["real_ideo"],
        data["race_adj"],
        *(age == group for group in (2, 3, 4)),
        data["educ1"],
        data["gender"],
        data["income"],
    )
    return linear_regression(design, flat(9), flat_positive()).given({"y": data["partyid7"]})


def sblri(data: dict[str, Any]) -> Target:
    """A simulated regression without intercept; weak proper priors."""
    design = jnp.asarray(np.asarray(data["X"]))
    beta = dist.Normal(jnp.zeros(design.shape[1]), 10.0).to_event(1)
    return linear_regression(design, beta, dist.HalfNormal(10.0)).given({"y": data["y"]})


def kilpisjarvi(data: dict[str, Any]) -> Target:
    """Summer temperature in Kilpisjärvi by year; the years are not centred."""
    program = trend(
        jnp.asarray(data["x"], float),
        dist.Normal(data["pmualpha"], float(data["psalpha"])),
        dist.Normal(float(data["pmubeta"]), data["psbeta"]),
    )
    return program.given({"y": data["y"]})
