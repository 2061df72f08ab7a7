"""`recover` gives back the choices that `marginalize` summed out, for draws of the other choices."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from weft.ppl import Model, Program
from weft.ppl.exact.recovery import COVARIANCES, MOMENTS, SUMS, posterior, restored
from weft.ppl.programs.handlers import Given
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.errors import AddressError, ModelError, WeftError
from weft.ppl.stage.keys import as_key
from weft.ppl.stage.structure import summed_out

from .draws import Draws
from .particles import Particles

R = TypeVar("R", Draws, Particles)


def recover(
    key: jax.Array,
    model: Model,
    draws: R,
    *args: Any,
    sites: Literal[
        "sample", "marginals", "filtered", "viterbi", "covariances", "filtered_covariances"
    ] = "sample",
    batch_size: int | None = None,
) -> R:
    r"""The choices $z$ that were summed out, from $p(z \mid x, y)$, for every draw $x$ of the other choices.

    The modes of `sites` are:

    - `"sample"`: one joint draw of all these choices. Together with $x$ it is a draw of the posterior of the whole
      model. For a chain this is forward filtering, backward sampling.
    - `"marginals"`: the probability of every value, with an axis of values last. For a chain these are the smoothing
      probabilities. For a normal, gamma or Wishart choice it is the posterior mean.
    - `"filtered"`: the same for choices in a scan, given only the data of the steps up to the one that draws them.
    - `"viterbi"`: the most probable joint values.
    - `"covariances"`: the posterior covariance of every element of a normal choice, `(*batch, *event, *event)`: a
      matrix for an element of a multivariate normal or of `Normal(...).to_event(1)`, the variance for one of `Normal`.
      For a chain these are the smoothing covariances. Other choices are left out.
    - `"filtered_covariances"`: the same, given the data that `"filtered"` means are given.

    `scale` multiplies the log of a sum over $z$. It does not change the law of $z$.

    Args:
        key: a random key. Only draws are random.
        model: the marginalised model.
        draws: draws or particles of the model, with their target. The data are taken from the target.
        *args: the arguments of the model.
        sites: one of the modes above.
        batch_size: the number of draws that are treated at once; all if left out. It bounds memory.

    Returns:
        The same draws with the choices in `derived`, under their addresses. They lead with (chain, draw) or
        (particle,). Values of `deterministic` that depend on these choices are there, too, except with probabilities.

    Raises:
        ModelError: if nothing is summed out of the model, or for the mean of a choice of another family.
        AddressError: if draws and data together lack a choice.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, marginalize, recover, sample
        >>> from weft.inference import nuts
        >>> @gen
        ... def mixture():
        ...     mu = sample("mu", dist.Normal(0.0, 3.0))
        ...     z = sample("z", dist.Bernoulli(0.5).expand([2]))
        ...     sample("y", dist.Normal(jnp.where(z, mu, -mu), 1.0))
        >>> marginal = marginalize(mixture, "z")
        >>> target = marginal().given({"y": jnp.array([4.0, -4.0])})
        >>> draws = nuts(num_warmup=50, num_samples=20, num_chains=1).run(
        ...     jax.random.key(0), target, progress=False)
        >>> full = recover(jax.random.key(1), marginal, draws)
        >>> full.derived["z"].shape, bool((full.derived["z"].sum(-1) == 1).all())
        ((1, 20, 2), True)
    """
    modes = (*SUMS, *COVARIANCES)
    if sites not in modes:
        raise ValueError(f"recover: sites is one of {', '.join(map(repr, modes))}, got {sites!r}")
    if not isinstance(draws, (Draws, Particles)):
        raise TypeError(f"recover takes Draws or Particles, got {type(draws).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"recover: batch_size is at least 1, got {batch_size}")
    program = model(*args).staged()
    table = summed_out(program.code()[0].jaxpr)
    if not table:
        raise ModelError(
            f"recover: nothing is summed out of {program.name!r}; apply marginalize first"
        )
    data = _data(draws, program)
    values = {a: jnp.asarray(v) for a, v in flatten(draws.choices).items() if a in program.sites}
    missing = [a for a in program.latents if a not in values and a not in data]
    if missing:
        raise AddressError(
            f"recover, model {program.name!r}: neither the draws nor their target's data have "
            f"{', '.join(map(repr, missing))}"
        )
    lead = 2 if isinstance(draws, Draws) else 1
    for address, value in values.items():
        if value.shape[lead:] != program.sites[address].shape:
            raise AddressError(
                f"recover, model {program.name!r}: draws of {address!r} have shape {value.shape[lead:]} each, the site "
                f"{program.sites[address].shape}. Are these the arguments that the draws were made with?"
            )
    shape = (draws.num_particles,) if isinstance(draws, Particles) else draws.lead
    n = math.prod(shape)
    flat = {a: v.reshape(n, *v.shape[lead:]) for a, v in values.items()}
    keys = jax.vmap(jax.random.fold_in, (None, 0))(as_key(key), jnp.arange(n))
    found = _recover(
        program, data, keys, flat, sites, None if batch_size is None else min(batch_size, n)
    )
    found = {a: v.reshape(*shape, *v.shape[1:]) for a, v in found.items()}
    derived = unflatten({**flatten(draws.derived), **found})
    return dataclasses.replace(draws, derived=derived)


def _data(draws: Any, program: Program) -> dict[str, Given]:
    target = draws.target
    if target is None:
        return {}
    if not hasattr(target, "data"):
        raise WeftError(
            "recover: these draws were read from a file without their target: load(path, target=...)"
        )
    data = {a: g for a, g in target.data.items() if a in program.sites}
    for address, given in data.items():
        shape = program.sites[address].shape
        if jnp.shape(given.value) != shape:
            raise AddressError(
                f"recover, model {program.name!r}: the data of {address!r} have shape {jnp.shape(given.value)}, the "
                f"site {shape}. Are these the arguments that the draws were made with?"
            )
    return data


@functools.partial(eqx.filter_jit)
def _recover(
    program: Program,
    data: dict[str, Given],
    keys: Any,
    flat: dict[str, Any],
    sites: str,
    batch_size: int | None,
) -> dict[str, Any]:
    def one(x: Any) -> dict[str, Any]:
        key, values = x
        given = {**data, **{a: _given(v, data.get(a)) for a, v in values.items()}}
        found = posterior(program, key, given, sites)
        return found if sites in MOMENTS else {**found, **restored(program, given, found)}

    if batch_size is None:
        return jax.vmap(one)((keys, flat))
    return jax.lax.map(one, (keys, flat), batch_size=batch_size)


def _given(value: jax.Array, data: Given | None) -> Given:
    """A draw of a choice. For a choice that is observed in part it is whole, with its data."""
    return Given(value, None, None if data is None else data.drop)
