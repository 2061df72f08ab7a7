"""Results in ArviZ's form, with dims from the named axes of the model.

One function builds the groups as xarray Datasets, the same for both lines of ArviZ. The last step wraps them in the
form that the installed line reads: `InferenceData` (0.2x) or `xarray.DataTree` (1.x).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.addresses import flatten, unflatten, unknown
from weft.ppl.stage.errors import AddressError, DensityError, WeftError

_SAMPLE = ("chain", "draw")
_LARGE = 10**8  # numbers of pointwise log likelihood that nobody asked for
_BY_AXIS = "log_likelihood"  # the variable that holds it by the index of an axis, whatever the site
_BATCH = 2**22  # numbers of it evaluated at once

Coords = Mapping[str, Sequence[Any]]


def to_arviz(
    draws: Any,
    predictions: Any = None,
    log_likelihood: bool | str | None = None,
    coords: Coords | None = None,
    batch_size: int | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """`Draws.to_arviz`, with attributes for the posterior."""
    stats = {name: np.asarray(value) for name, value in flatten(draws.stats).items()}
    groups = _groups(draws, predictions, log_likelihood, batch_size)
    groups["sample_stats"] = {
        name: value
        if value.ndim > 1
        else np.broadcast_to(value[:, None], (draws.num_chains, draws.num_draws))
        for name, value in stats.items()
    }
    return _assemble(groups, draws.target, coords or {}, attributes or {}, log_likelihood)


def pointwise_log_likelihood(
    target: Any, choices: Mapping[str, Any], by: str | None = None, batch_size: int | None = None
) -> dict[str, np.ndarray]:
    """The log density of every observation at every draw.

    Args:
        target: the target.
        choices: nested dict of its latent choices, arrays (chain, draw, ...).
        by: the name of an axis. Then there is one number for each index of it, summed over the observed sites that have
            it.
        batch_size: the number of draws that are evaluated at once.

    Returns:
        A dict from the address of each observed site to an array (chain, draw, mapped axes..., *batch_shape), summed
        over event axes. With `by`, a dict from "log_likelihood" to an array (chain, draw, size). Missing elements have
        0.

    Raises:
        WeftError: if a latent choice is not among the choices.
    """
    flat = flatten(choices)
    absent = [a for a in target.latents if a not in flat]
    if absent:
        raise WeftError(
            f"log_likelihood needs every latent choice, and the draws lack {', '.join(map(repr, absent))}: sample "
            "without keep=, or pass log_likelihood=False"
        )
    latents = {a: jnp.asarray(flat[a]) for a in target.latents}
    if not latents:
        raise WeftError("log_likelihood: the target has no latent choices")
    lead = next(iter(latents.values())).shape[:2]
    latents = unflatten({a: v.reshape(-1, *v.shape[2:]) for a, v in latents.items()})
    count = math.prod(lead)
    if batch_size is None:
        batch_size = max(1, _BATCH // max(1, _observations(target)))
    found = _evaluate(target.staged(), latents, by, min(batch_size, count))
    return {a: np.asarray(v).reshape(*lead, *v.shape[1:]) for a, v in found.items()}


@eqx.filter_jit
def _evaluate(target: Any, latents: Any, by: str | None, batch_size: int) -> dict[str, jax.Array]:
    def one(latents: Any) -> dict[str, jax.Array]:
        if by is not None:
            return {_BY_AXIS: target.log_densities(latents, by=by)}
        densities = flatten(target.log_densities(latents))
        return {a: _where_observed(target, a, densities[a]) for a in _observed_sites(target)}

    return jax.lax.map(one, latents, batch_size=batch_size)


def plain_observed(target: Any) -> dict[str, Any]:
    """The data of a target as a nested dict of arrays. Missing elements are NaN."""
    found = {}
    for address, value in flatten(target.observed).items():
        value, where = np.asarray(value), _where(target, address)
        if where is not None:
            seen = _lead_with(np.asarray(where), value.ndim)
            value = np.where(seen, value, np.nan)
        found[address] = value
    return unflatten(found)


# ------------------------------------------------------------------------------------------- groups


def _groups(
    draws: Any, predictions: Any, log_likelihood: bool | str | None, batch_size: int | None
) -> dict[str, Any]:
    target, choices = draws.target, _arrays(draws.choices)
    active = flatten(draws.active)
    posterior = {a: _idle_as_nan(v, active.get(a, True)) for a, v in choices.items()}
    posterior |= {a: np.asarray(v) for a, v in _arrays(draws.derived).items()}
    groups: dict[str, Any] = {"posterior": posterior}
    if predictions is not None:
        name, values = _predictions(draws, predictions)
        groups[name] = values
    if _wants_likelihood(draws, log_likelihood):
        by = log_likelihood if isinstance(log_likelihood, str) else None
        try:
            groups["log_likelihood"] = pointwise_log_likelihood(
                target, draws.choices, by, batch_size
            )
        except DensityError:  # not known site by site, where a chain of choices is summed out
            if log_likelihood is not None:
                raise
    if target is not None and target.observed:
        groups["observed_data"] = flatten(plain_observed(target))
    return groups


def _arrays(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Values by address, without random keys, which NumPy does not know."""
    flat = flatten(tree)
    keys = jax.dtypes.prng_key
    return {a: v for a, v in flat.items() if not jnp.issubdtype(jnp.result_type(v), keys)}


def _wants_likelihood(draws: Any, asked: bool | str | None) -> bool:
    target = draws.target
    if asked is False:
        return False
    if not hasattr(target, "log_densities"):
        if asked is None:
            return False
        raise WeftError(
            "log_likelihood: these draws have no target to evaluate it with"
            + (
                "; they were read from a file, which holds no model: load(path, target=...)"
                if target is not None
                else ""
            )
        )
    if asked is None:
        size = _observations(target) * draws.num_chains * draws.num_draws
        if size > _LARGE:
            warnings.warn(
                f"the pointwise log likelihood, {size:.1e} numbers, is left out; log_likelihood=True computes it, and "
                "the name of an axis, log_likelihood='row', sums it to one number an index",
                UserWarning,
                stacklevel=4,
            )
            return False
        return bool(_observed_sites(target)) and all(
            a in flatten(draws.choices) for a in target.latents
        )
    return True


def _observed_sites(target: Any) -> list[str]:
    given = flatten(target.observed)
    return [
        a
        for a, site in target.sites.items()
        if site.kind == "sample" and (a in given or site.observed)
    ]


def _observations(target: Any) -> int:
    sites = target.sites
    return sum(math.prod(axis.size for axis in sites[a].axes) for a in _observed_sites(target))


def _where(target: Any, address: str) -> Any:
    return getattr(getattr(target, "data", {}).get(address), "where", None)


def _where_observed(target: Any, address: str, density: jax.Array) -> jax.Array:
    where = _where(target, address)
    return density if where is None else jnp.where(where, density, 0)


def _lead_with(mask: np.ndarray, ndim: int) -> np.ndarray:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def _idle_as_nan(value: Any, active: Any) -> np.ndarray:
    value, active = np.asarray(value), np.asarray(active, dtype=bool)
    return value if active.all() else np.where(_lead_with(active, value.ndim), value, np.nan)


class Recorded(NamedTuple):
    """Choices and derived values of predictions."""

    choices: dict[str, Any]
    derived: dict[str, Any]


def recorded(predictions: Any) -> Recorded:
    """The choices and derived values of a trace; a nested dict of values is taken as it is."""
    if isinstance(predictions, Mapping):
        return Recorded(dict(predictions), {})
    return Recorded(predictions.choices, predictions.derived)


def _predictions(draws: Any, predictions: Any) -> tuple[str, dict[str, np.ndarray]]:
    """The predicted values, and the group to which they belong.

    Replicates of the observed data are posterior_predictive. If a site has another shape than its data, the inputs are
    others, and the group is predictions.
    """
    choices, derived = map(flatten, recorded(predictions))
    data = {} if draws.target is None else flatten(draws.target.observed)
    old = flatten(draws.choices)
    values = {a: np.asarray(v) for a, v in choices.items() if a in data or a not in old}
    lead = (draws.num_chains, draws.num_draws)
    for address, value in {**values, **derived}.items():
        if value.shape[:2] != lead:
            raise WeftError(
                f"predictions: {address!r} has shape {value.shape}, which does not lead with (chain, draw) = {lead}; "
                "make them with model(...).predict(key, draws.choices)"
            )
    if all(v.shape[2:] == np.shape(data[a]) for a, v in values.items() if a in data):
        extra = {a: np.asarray(v) for a, v in derived.items() if a not in flatten(draws.derived)}
        return "posterior_predictive", {**values, **extra}
    return "predictions", {**values, **{a: np.asarray(v) for a, v in derived.items()}}


# ----------------------------------------------------------------------------------------- datasets


def _assemble(
    groups: Mapping[str, Any],
    target: Any,
    coords: Coords,
    attributes: Mapping[str, Any],
    by: bool | str | None,
) -> Any:
    import xarray

    names = {a: site.dims for a, site in (getattr(target, "sites", None) or {}).items()}
    labels = {dim: np.asarray(values) for dim, values in coords.items()}
    used: set[str] = set()
    datasets = {}
    for group, values in groups.items():
        if not values:
            continue
        sample = () if group == "observed_data" else _SAMPLE
        sizes: dict[str, int] = {}
        variables = {}
        for address, value in values.items():
            value = np.asarray(value)
            axes = names.get(address, ())
            if group == "log_likelihood" and isinstance(by, str):
                axes = (by,)
            dims = _dims(address, value.shape[len(sample) :], axes, values, sizes)
            variables[address] = ((*sample, *dims), value)
        used |= set(sizes)
        index = {dim: _labels(dim, size, labels, group) for dim, size in sizes.items()}
        if sample:
            first = next(iter(variables.values()))[1]
            index |= {dim: np.arange(n) for dim, n in zip(_SAMPLE, first.shape, strict=False)}
        datasets[group] = xarray.Dataset(
            variables, index, _attributes(attributes if group == "posterior" else {})
        )
    for dim in labels:
        if dim not in used:
            raise AddressError(unknown(dim, sorted(used), " among the dims for coords"))
    return _wrap(datasets)


def _dims(
    address: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    variables: Mapping[str, Any],
    sizes: dict[str, int],
) -> list[str]:
    """The dims of one variable: names of the model, or else ``theta_dim_0``, counted as ArviZ counts."""
    dims: list[str] = []
    unnamed = 0
    for i, size in enumerate(shape):
        name = axes[i] if i < len(axes) else None
        if name is None:
            name = f"{address}_dim_{unnamed}"
            unnamed += 1
        elif name in _SAMPLE or name in dims or name in variables or sizes.get(name, size) != size:
            # the name is taken: by ArviZ, by another axis, by a variable, or for another size
            name = f"{address}_{name}"
            name = f"{name}_{i}" if name in dims else name
        sizes[name] = size
        dims.append(name)
    return dims


def _labels(dim: str, size: int, labels: Mapping[str, np.ndarray], group: str) -> np.ndarray:
    if dim not in labels:
        return np.arange(size)
    if labels[dim].shape != (size,):
        if group == "predictions":  # other inputs, other labels
            return np.arange(size)
        raise WeftError(
            f"coords: {dim!r} has {size} elements, and {labels[dim].shape} labels were given"
        )
    return labels[dim]


def _attributes(more: Mapping[str, Any]) -> dict[str, Any]:
    try:
        version = importlib.metadata.version("weft")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    now = datetime.datetime.now(datetime.UTC).isoformat()
    return {
        "created_at": now,
        "inference_library": "weft",
        "inference_library_version": version,
        **more,
    }


def _wrap(datasets: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.2x announces 1.0 at every import
        import arviz
    if "InferenceData" in vars(arviz):  # not hasattr: 1.x answers it with a warning
        return arviz.InferenceData(**datasets)
    import xarray

    return xarray.DataTree.from_dict(dict(datasets))
