"""Records: what is left of a target in a file, its sites and data but not its model.

A result that was read from a file has a `TargetRecord` in the place of its target. Tables and exports read the same
attributes from either.
"""

from __future__ import annotations

from typing import Any, NoReturn

import equinox as eqx
import numpy as np
from weft.ppl.stage.addresses import flatten
from weft.ppl.stage.errors import WeftError
from weft.ppl.stage.structure import Axis, SiteInfo


class TargetRecord(eqx.Module):
    """The description of a target: `sites`, `observed`, `latents`, `name`.

    Attributes:
        observed: nested dict of the data.
        table: one `SiteInfo` for each site.
        name: the name of the model.
        latents: the addresses of the latent choices.
    """

    observed: dict[str, Any]
    table: tuple[SiteInfo, ...] = eqx.field(static=True)
    name: str = eqx.field(static=True)
    latents: tuple[str, ...] = eqx.field(static=True)

    @property
    def sites(self) -> dict[str, SiteInfo]:
        """The table by address."""
        return {site.address: site for site in self.table}

    def __getattr__(self, name: str) -> NoReturn:
        """Raise an error that says why a method of a target is not there."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"this result was read from a file, which holds no model, hence no {name!r}: load(path, target=...)"
        )


def name_of(target: Any) -> str | None:
    """The name of the model behind a target, if it has one."""
    if isinstance(target, TargetRecord):
        return target.name
    return getattr(getattr(target, "program", None), "name", None)


def to_meta(target: Any) -> dict[str, Any] | None:
    """The description of a target, as JSON can hold it."""
    if target is None:
        return None
    return {
        "name": name_of(target) or "model",
        "latents": list(target.latents),
        "sites": [
            {
                "address": site.address,
                "kind": site.kind,
                "shape": list(site.shape),
                "dtype": np.dtype(site.dtype).name,
                "axes": [[axis.size, axis.name, axis.kind] for axis in site.axes],
                "event_shape": list(site.event_shape),
                "event_dims": list(site.event_dims),
                "distribution": site.distribution,
                "conditional": site.conditional,
                "observed": site.observed,
                "is_discrete": site.is_discrete,
            }
            for site in target.sites.values()
        ],
    }


def from_meta(meta: dict[str, Any] | None, observed: dict[str, Any]) -> TargetRecord | None:
    """The record that `to_meta` described."""
    if meta is None:
        return None
    table = []
    for entry in meta["sites"]:
        entry = dict(entry)
        for field in ("shape", "event_shape", "event_dims"):
            entry[field] = tuple(entry[field])
        entry["axes"] = tuple(Axis(*axis) for axis in entry["axes"])
        table.append(SiteInfo(**entry))
    return TargetRecord(observed, tuple(table), meta["name"], tuple(meta["latents"]))


def check_fits(target: Any, meta: dict[str, Any] | None, where: str) -> None:
    """Raise unless a target has the latent choices of the one that a file was written with.

    Raises:
        WeftError: if they differ. The message shows the shapes of these choices side by side.
    """
    if meta is None:
        return
    known = {site["address"]: tuple(site["shape"]) for site in meta["sites"]}
    saved = {address: known.get(address) for address in meta["latents"]}
    given = {address: tuple(s.shape) for address, s in flatten(target.latent_shapes()).items()}
    if saved == given:
        return
    lines = [
        f"  {address}: {saved.get(address, 'absent')} in the file, {given.get(address, 'absent')} "
        "in the target"
        for address in dict.fromkeys([*saved, *given])
        if saved.get(address) != given.get(address)
    ]
    raise WeftError(
        "\n".join(
            [f"{where} was written for another target; latent choices and their shapes:", *lines]
        )
    )
