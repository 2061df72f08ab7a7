"""Prediction: draws of the rest of a program, for every draw of some of its choices."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from weft.ppl.stage.addresses import flatten, select, unflatten, unknown
from weft.ppl.stage.errors import AddressError, ObservationError
from weft.ppl.stage.keys import as_key

from .handlers import Evaluate
from .observations import entries
from .traces import Trace, run_program

if TYPE_CHECKING:
    from .programs import Program


def predict(
    program: Program,
    key: jax.Array,
    choices: Mapping[str, Any],
    batch_size: int | None = None,
    keep: str | Iterable[str] | None = None,
) -> Trace:
    """See ``Program.predict``."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"predict: batch_size is at least 1, got {batch_size}")
    flat = {a: jnp.asarray(v) for a, v in flatten(choices).items()}
    lead = _batch_shape(program, flat)
    n = math.prod(lead)
    if keep is not None:
        keep = (keep,) if isinstance(keep, str) else tuple(keep)
        select(
            {a: None for a, s in program.sites.items() if s.kind != "factor" and not s.hidden}, keep
        )
    flat = {a: v.reshape(n, *v.shape[len(lead) :]) for a, v in flat.items()}
    keys = jax.vmap(jax.random.fold_in, (None, 0))(as_key(key), jnp.arange(n))
    found = _predict(
        program.staged(), keys, flat, None if batch_size is None else min(batch_size, n), keep
    )
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def _batch_shape(program: Program, flat: dict[str, Any]) -> tuple[int, ...]:
    """The leading axes that all choices share."""
    lead: tuple[int, ...] | None = None
    for address, value in flat.items():
        info = program.sites.get(address)
        if info is None:
            raise AddressError(unknown(address, program.latents, f" in model {program.name!r}"))
        ndim = value.ndim - len(info.shape)
        if ndim < 0 or value.shape[ndim:] != info.shape:
            raise ObservationError(
                f"predict, model {program.name!r}: choice {address!r} must end in the site's shape {info.shape}, got "
                f"{value.shape}. If the model at new inputs has another number of them, leave the address out: it is "
                "drawn anew"
            )
        if lead is not None and value.shape[:ndim] != lead:
            raise ObservationError(
                f"predict, model {program.name!r}: choices disagree on their leading (chain, draw) axes, {lead} and "
                f"{value.shape[:ndim]} at {address!r}"
            )
        lead = value.shape[:ndim]
    return lead or ()


@functools.partial(jax.jit, static_argnums=(3, 4))
def _predict(
    program: Any,
    keys: Any,
    flat: dict[str, Any],
    batch_size: int | None,
    keep: tuple[str, ...] | None,
) -> Trace:
    code, args = program.code()

    def one(x: Any) -> Trace:
        key, given = x
        found = unflatten(entries(program.sites, given, program.name))
        trace, _ = run_program(code, args, Evaluate("value"), key, found)
        choices, active, derived = (
            flatten(trace.choices),
            flatten(trace.active),
            flatten(trace.derived),
        )
        if keep is None:
            choices = {a: v for a, v in choices.items() if a not in given}
            value = trace.value
        else:
            chosen = flatten(select({**choices, **derived}, keep))
            choices, derived = (
                {a: v for a, v in t.items() if a in chosen} for t in (choices, derived)
            )
            value = None
        active = {a: active[a] for a in choices}
        return Trace(
            unflatten(choices), unflatten(active), unflatten(derived), trace.log_density, value
        )

    return (
        jax.vmap(one)((keys, flat))
        if batch_size is None
        else jax.lax.map(one, (keys, flat), batch_size=batch_size)
    )
