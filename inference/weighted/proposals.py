"""Proposals: whether a program may propose for a target, and the log ratio of their densities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from weft.ppl import Program, Target
from weft.ppl.stage.addresses import flatten, nearest
from weft.ppl.stage.errors import AddressError, DensityError, WeftError
from weft.ppl.stage.structure import SiteInfo, summed_out

from .supports import is_within


def check_proposal(
    program: Any, target: Target, what: str = "proposal", *, covers: bool = True
) -> None:
    """Refuse a program that cannot propose for a target.

    Args:
        program: the proposal or guide.
        target: the target.
        what: what to call the program in messages.
        covers: if true, the program must be able to draw all that the target allows, as weights need. If false, it
            must draw nothing that the target does not allow, as bounds need.

    Raises:
        DensityError: if the program is not normalised, or if the supports of a choice are known and do not match.
        AddressError: if the program does not draw exactly the target's latent choices.
        WeftError: if a choice has another shape.
    """
    if not isinstance(program, Program):
        raise TypeError(
            f"expected a Program as {what}, got {type(program).__name__}: apply the model to its arguments"
        )
    drawn = {a: program.sites[a] for a in program.latents}
    if program.unnormalised:
        names = ", ".join(repr(a) for a in program.unnormalised_sites)
        raise DensityError(
            f"the {what} {program.name!r} is not normalised (it holds {names}), so its density is known up to a "
            f"constant only. A {what} must be a plain program; normalize(target, by=...) turns an unnormalised one "
            "into one"
        )
    missing = [a for a in target.latents if a not in drawn]
    spare = [a for a in drawn if a not in target.latents]
    if missing or spare:
        hints = [
            f"{a!r} for {nearest(a, missing)!r}?" for a in spare if nearest(a, missing) is not None
        ]
        raise AddressError(
            f"the {what} {program.name!r} must draw exactly the latent choices of the target.\n"
            f"  the target's latent choices: {_listed(target.latents)}\n"
            f"  the {what} draws:{' ' * max(1, 17 - len(what))}{_listed(drawn)}\n"
            f"  missing: {_listed(missing)}; not in the target: {_listed(spare)}"
            + (f" (misspelt: {', '.join(hints)})" if hints else "")
        )
    shapes = flatten(target.latent_shapes())
    for address, site in drawn.items():
        if tuple(site.shape) != tuple(shapes[address].shape):
            raise WeftError(
                f"the {what} {program.name!r} draws {address!r} with shape {tuple(site.shape)}, the target expects "
                f"{tuple(shapes[address].shape)}"
            )
        _check_support(address, site, target.sites[address], f"the {what} {program.name!r}", covers)


def _check_support(
    address: str, drawn: SiteInfo, wanted: SiteInfo, program: str, covers: bool
) -> None:
    """Refuse a choice whose support in the program and in the target do not match (see `check_proposal`)."""
    pair = f"{program} draws {address!r} from {_law(drawn)}, the target has it from {_law(wanted)}"
    if drawn.is_discrete != wanted.is_discrete:
        raise DensityError(
            f"{pair}: one is discrete and the other continuous, so the ratio of their densities has no meaning"
        )
    if not covers and not is_within(drawn.support, wanted.support, drawn.event_shape):
        raise DensityError(
            f"{pair}. Draws outside the target's support have density zero there, which makes the bound "
            "minus infinity: draw from a law on that support, such as dist.TransformedDistribution("
            "dist.Normal(loc, scale), dist.biject_to(support))"
        )
    if covers and not is_within(wanted.support, drawn.support, drawn.event_shape):
        raise DensityError(
            f"{pair}. Values that the target allows are never drawn, so that weighted draws would be of "
            "another law: draw from one that covers the target's support"
        )


def _law(site: SiteInfo) -> str:
    kind = "discrete, " if site.is_discrete else ""
    support = "" if site.support is None else f", on {site.support}"
    return f"{site.distribution} ({kind}shape {tuple(site.shape)}{support})"


def may_idle(target: Target) -> bool:
    """Whether some elements of latent choices may not count: idle (branch not taken, mask) or observed in part."""
    return any(
        target.sites[a].conditional or target.sites[a].masked or a in target.data
        for a in target.latents
    )


def live(target: Target, active: Any, address: str, ndim: int) -> Array:
    """Which elements of a latent choice are latent and count: booleans that broadcast over `ndim` axes."""
    flag = trailing(jnp.asarray(flatten(active)[address]), ndim)
    if address in target.data:
        flag = flag & trailing(~target.data[address].where, ndim)
    return flag


def log_ratio(
    target: Target, program: Program, trace: Any, choices: Any = None, key: Any = None
) -> Float[Array, ""]:
    """`log p(x) - log q(x)` of a draw of the program.

    Here `p` is the density of the target and `q` that of the program. With `choices` both are computed there, and not
    at the choices of the trace. `key` is for a target whose density is estimated.

    If a choice is idle in the target, its value means nothing and `p` has no term for it. Then the program's own
    conditional density stands on both sides and cancels: the ratio has `q` of the active choices only. It stays
    unbiased, since a conditional density integrates to one. The same holds for the observed elements of a site that is
    observed in part.
    """
    if not may_idle(target):
        if choices is None:
            return target.log_density(trace.choices, key) - trace.log_density
        return target.log_density(choices) - program.log_density(choices)
    choices = trace.choices if choices is None else choices
    if target.program.estimated:
        raise DensityError(
            f"the density of {target.program.name!r} is estimated, and choices of it may be idle (branches, masks): "
            "weights of such a target are not known yet"
        )
    if summed := summed_out(program.code()[0].jaxpr):
        raise DensityError(
            f"choices of {target.program.name!r} may be idle or observed in part, and {program.name!r}, which sums out "
            f"{_listed(summed)}, has no density of the others alone: propose from a program that sums out nothing"
        )
    against, log_p = target.generate(jax.random.key(0), choices)  # nothing is left to draw
    log_q = jnp.zeros(())
    for address, term in flatten(program.log_densities(choices)).items():
        counts = live(target, against.active, address, term.ndim)
        log_q = log_q + jnp.sum(jnp.where(counts, term, 0.0))
    return log_p - log_q


def trailing(flag: Array, ndim: int) -> Array:
    """A flag with trailing axes added, so that it broadcasts over arrays of `ndim` axes whose first are its own."""
    return flag.reshape(flag.shape + (1,) * (ndim - flag.ndim))


def _listed(addresses: Any) -> str:
    return ", ".join(repr(a) for a in addresses) or "none"
