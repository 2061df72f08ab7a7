"""Printing of the nouns: tables of sites on one screen, without the contents of arrays."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import jax
from weft.ppl.stage.addresses import flatten
from weft.ppl.stage.compat import Tracer

if TYPE_CHECKING:
    from weft.ppl.stage.structure import SiteInfo

    from .programs import Program
    from .targets import Target
    from .traces import Trace
    from .unconstrained import FlatUnconstrained, Unconstrained

MAX_ROWS = 24


def table(header: list[str], rows: list[list[str]], limit: int = MAX_ROWS, width: int = 36) -> str:
    """A table of text. A column is at most ``width`` wide, and there are at most ``limit`` rows."""
    left = len(rows) - limit
    rows = [[_cut(cell, width) for cell in row] for row in rows[:limit]]
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = [
        "  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()
        for r in [header, *rows]
    ]
    return "\n".join([*lines, *([f"  ... {left} more"] if left > 0 else [])])


def _cut(text: str, width: int) -> str:
    """The text, with its middle left out if it is long."""
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"


class Printed:
    """A noun that prints as text. Notebooks show the same text."""

    def _repr_html_(self) -> str:
        return as_html(repr(self))


def as_html(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def shape(info: SiteInfo) -> str:
    parts = [f"{a.name}={a.size}" if a.name else str(a.size) for a in info.axes]
    event = ", ".join(map(str, info.event_shape))
    text = ", ".join(parts)
    return f"({text})" + (f" + ({event})" if event else "")


def _sites(sites: dict[str, SiteInfo], role: Any) -> str:
    rows = []
    for address, info in sites.items():
        support = "" if info.support is None else type(info.support).__name__.lstrip("_").lower()
        rows.append(
            [address, role(address, info), info.distribution, shape(info), str(info.dtype), support]
        )
    return table(["address", "role", "distribution", "shape", "dtype", "support"], rows)


def _role(address: str, info: SiteInfo) -> str:
    if info.kind != "sample":
        return info.kind
    if info.hidden:
        return "hidden"
    role = "conditioned" if info.observed else "choice"
    return role + (" (may be idle)" if info.conditional else "")


def program(p: Program) -> str:
    try:
        sites = p.sites
    except Exception as e:  # a model that cannot be staged still has a name
        return f"Program of {p.name!r}, which cannot be staged: {e}"
    lanes = f", one a lane of {p.lanes}" if p.lanes else ""
    unnormalised = ", unnormalised" if p.unnormalised else ""
    return f"Program of {p.name!r}: {len(sites)} sites{lanes}{unnormalised}\n" + _sites(
        sites, _role
    )


def target(t: Target) -> str:
    latents = set(t.latents)

    def role(address: str, info: SiteInfo) -> str:
        if address in t.data:
            return "observed in part" if address in latents else "observed"
        return _role(address, info).replace("choice", "latent")

    return (
        f"Target: model {t.program.name!r}, {len(latents)} of {len(t.sites)} sites latent\n"
        + _sites(t.sites, role)
    )


def unconstrained(u: Unconstrained) -> str:
    sites = u.target.sites
    rows = [[a, shape(sites[a]), str(s)] for a, s in u.shapes.items()]
    head = f"Unconstrained target of model {u.target.program.name!r}: {u.flat.size} dimensions\n"
    return head + table(["address", "shape", "shape on R^n"], rows)


def flat(f: FlatUnconstrained) -> str:
    rows = [[a, f"{s.start}:{s.stop}"] for a, s in f.addresses.items()]
    head = f"Unconstrained target of model {f.nested.target.program.name!r}, as vectors of size {f.size}\n"
    return head + table(["address", "slice"], rows)


def trace(t: Trace) -> str:
    rows = []
    for kind, tree in (("choice", t.choices), ("derived", t.derived)):
        for address, value in flatten(tree).items():
            rows.append(
                [address, kind, str(jax.numpy.shape(value)), str(jax.numpy.result_type(value))]
            )
    density = (
        ""
        if isinstance(t.log_density, Tracer) or jax.numpy.ndim(t.log_density)
        else f" {float(t.log_density):.4g}"
    )
    return f"Trace: log density{density or ' ' + str(jax.numpy.shape(t.log_density))}\n" + table(
        ["address", "kind", "shape", "dtype"], rows
    )
