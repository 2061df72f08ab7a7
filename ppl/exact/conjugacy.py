"""Which densities a continuous choice can be integrated over: proofs, from the program, that a table of points serves.

The density must have the form of the choice's family (``families``). The distribution decides, by name, from the list
``CONJUGATE``. That a matrix is the covariance, or the precision, of a normal density is proved by comparing equations.
For normal choices no table is needed, but the density must be quadratic in them: its parameters are affine (which the
walk knows), and its second derivative does not read them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions.util import cholesky_of_inverse
from weft.ppl.analysis.affinity import is_polynomial
from weft.ppl.analysis.sameness import computes
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.interpreter import Context
from weft.ppl.stage.sites import Site

from .families import Beta, Dirichlet, Family, Gamma, InverseGamma, base_of
from .matrices import InverseWishart, Wishart
from .normal_sites import is_normal
from .region import addresses
from .tables import Variable, axes_of, is_table, slopes_of, straightened, variables_of


def family_of(d: Any, event_shape: tuple[int, ...]) -> Family | None:
    """The family for which a distribution with this event shape is a prior, if there is one."""
    d = base_of(d)
    if _states(d, dist.Beta):
        return Beta()
    if _states(d, dist.InverseGamma):
        return InverseGamma()
    if _states(d, dist.Exponential) or _states(d, dist.Gamma):
        return Gamma()
    if _states(d, dist.Dirichlet):
        return Dirichlet(event_shape[-1])
    if _states(d, dist.Wishart):
        return Wishart(event_shape[-1])
    if _states(d, dist.InverseWishart):
        return InverseWishart(event_shape[-1])
    return None


def _states(d: Any, known: Any) -> bool:
    """Whether a distribution has the density that a class of NumPyro states. A class derived from it may not."""
    return isinstance(d, known) and type(d).log_prob is known.log_prob


FACTORS: dict[type[Family], dict[str, Any]] = {
    Wishart: {"precision_matrix": cholesky_of_inverse},
    InverseWishart: {"covariance_matrix": jnp.linalg.cholesky},
}
"""The parameter of a multivariate normal that a matrix is conjugate to, and how ``scale_tril`` follows from it."""


CONJUGATE: dict[type[Family], dict[tuple[str, str], tuple[float, bool]]] = {
    Beta: {
        ("BernoulliProbs", "probs"): (1, True),
        ("BinomialProbs", "probs"): (1, True),
        ("GeometricProbs", "probs"): (1, True),
    },
    Gamma: {
        ("Poisson", "rate"): (1, False),
        ("Exponential", "rate"): (1, False),
        ("Gamma", "rate"): (1, False),
        ("InverseGamma", "rate"): (1, False),
        ("Normal", "scale"): (-0.5, False),
        ("HalfNormal", "scale"): (-0.5, False),
        ("LogNormal", "scale"): (-0.5, False),
    },
    InverseGamma: {
        ("Normal", "scale"): (0.5, False),
        ("HalfNormal", "scale"): (0.5, False),
        ("LogNormal", "scale"): (0.5, False),
        ("Laplace", "scale"): (1, False),
        ("Exponential", "rate"): (-1, False),
        ("Gamma", "rate"): (-1, False),
    },
    Dirichlet: {
        ("CategoricalProbs", "probs"): (1, True),
        ("MultinomialProbs", "probs"): (1, True),
    },
}
"""For each prior the distributions and parameters it is conjugate to: which power of the choice the parameter is a
multiple of, and whether it must be the choice itself. The other parameters must not depend on the choice."""


# --- proofs -----------------------------------------------------------------------------------------------------------


def certify(
    eqn: Any, site: Site, context: Context, value: Any = None, normal: bool = False
) -> None:
    """Make sure that a density has a form over which the continuous choices that it reads can be integrated.

    Args:
        eqn: the equation of a site.
        site: the site. Its operands may be tables.
        context: where it stands.
        value: the table of its values, if the site itself is integrated out over points.
        normal: whether the site is a normal choice that is summed out itself.

    Raises:
        ModelError: if it has not. The message says what is possible.
    """
    leaves = [*site.operands, value] if value is not None else site.operands
    continuous = [v for v in variables_of(leaves) if v.normal or v.family is not None]
    if not continuous or site.spec.kind == "deterministic":
        return
    parts = site.skeleton.unpack(range(site.skeleton.num_arrays))
    for part in ("where", "observed", "value"):
        if part in parts and set(continuous) & axes_of(leaves[parts[part]]).keys():
            name = ".".join(site.address)
            raise ModelError(f"site {name!r}: its {part} depends on {addresses(continuous)}")
    if not normal:
        _certify_normal(site, leaves)
    d = base_of(parts.get("d"))
    for v in continuous:
        read = [i for i, x in enumerate(leaves) if v in axes_of(x)]
        if v.normal or read == [len(site.operands)]:  # in the second case it is its own prior
            continue
        if v.family.matrix:
            _certify_matrix(v, eqn, read, d, site, context)
        else:
            _certify_conjugate(v, leaves, read, d, site)


def _certify_normal(site: Site, leaves: list[Any]) -> None:
    """Make sure that a density is quadratic in the normal choices that it reads."""
    read = [i for i, x in enumerate(leaves) if slopes_of(x)]
    curved = next((leaves[i].curved for i in read if leaves[i].curved), None)
    d = site.skeleton.unpack(range(site.skeleton.num_arrays)).get("d")
    if curved is None and is_normal(d):  # its scale is looked at where its density is counted
        return
    if not read or _is_quadratic(site, leaves):
        return
    why = (
        ""
        if curved is None
        else f": it reads a function of it that is not affine, by the equation {curved}"
    )
    raise ModelError(
        f"site {'.'.join(site.address)!r} ({site.spec.label}) is not quadratic in "
        f"{addresses(v for i in read for v in slopes_of(leaves[i]))}, so that cannot be integrated out{why}. A "
        "parameter has to be an affine function of it, with a density that is normal in that parameter"
    )


def _is_quadratic(site: Site, leaves: list[Any]) -> bool:
    """Whether a density is a polynomial of the second degree in the affine values that it is computed from."""
    sources, compute = straightened(leaves)
    read = [i for i, x in enumerate(sources) if slopes_of(x)]
    if any(sources[i].curved for i in read):
        return False

    def log_density(*sources: Any) -> Any:
        here = site.at(compute(sources))
        if site.spec.kind == "factor":
            return here.part("weight")
        return here.log_prob(jnp.ones(site.shape, site.spec.dtype))

    avals = [
        jax.ShapeDtypeStruct(
            x.shape if is_table(x) else jnp.shape(x),
            getattr(x, "dtype", None) or jnp.result_type(x),
        )
        for x in sources
    ]
    return is_polynomial(log_density, avals, read, 2)


def _certify_conjugate(v: Variable, leaves: list[Any], read: list[int], d: Any, site: Site) -> None:
    known = CONJUGATE[type(v.family)]
    for (label, parameter), (power, itself) in known.items():
        if _states(d, getattr(dist, label)) and read == [getattr(d, parameter, None)]:
            form = leaves[read[0]].forms.get(v)
            if form is not None and form[0] == power and (form[1] or not itself):
                return
    raise _not_conjugate(v, d, site, [f"{label}({parameter})" for label, parameter in known])


def _certify_matrix(
    v: Variable, eqn: Any, read: list[int], d: Any, site: Site, context: Context
) -> None:
    """A multivariate normal whose covariance or precision is a multiple of the matrix, by its Cholesky factor."""
    known, frame = FACTORS[type(v.family)], context.frame
    assert frame is not None
    if isinstance(d, dist.MultivariateNormal) and read == [d.scale_tril]:
        multiples = [u for u, x in frame.values.items() if v in axes_of(x) and v in x.forms]
        leaf = eqn.invars[read[0]]
        if any(computes(f, frame.before(), leaf, u) for f in known.values() for u in multiples):
            return
    raise _not_conjugate(v, d, site, [f"MultivariateNormal({p})" for p in known])


def _not_conjugate(v: Variable, d: Any, site: Site, ways: list[str]) -> ModelError:
    return ModelError(
        f"site {'.'.join(site.address)!r} ({type(d).__name__}) is not conjugate to {v.address!r} "
        f"({type(v.family).__name__}) as it reads it: possible are {', '.join(ways)}, where nothing else there depends "
        "on it"
    )
