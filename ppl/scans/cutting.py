"""A staged program cut at its scan: which scan is meant, and the equations before and after it.

Calls (jit, checkpoint) around the scan are inlined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from weft.ppl.exact.plan import Options
from weft.ppl.programs.programs import Program
from weft.ppl.stage.compat import Literal, open_jaxpr, scan_sizes
from weft.ppl.stage.control import eqn_holds_sites, eqn_site_names, lanes_p, marginal_p
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.jaxprs import Holds, behind, evaluate, results
from weft.ppl.stage.staging import Code, stage
from weft.ppl.stage.wiring import described, inside, is_call, is_loop

holds_scan = Holds(is_loop)
"""Whether a scan stands anywhere in a jaxpr."""


class Cut(NamedTuple):
    """A staged program cut at a scan, as equations.

    Attributes:
        inputs, args: the variables that the program reads, and their values.
        before: the equations before the scan.
        scan: the equation of the scan.
        after: the equations after the scan that a site there needs, and these sites.
        kept: the variables that `after` reads beside the outputs of the scan.
        reads_ys: the stacked outputs of the scan that `after` reads.
        addresses: the addresses of the choices that are summed out.
        options: the options of the sum; None if nothing is summed out.
    """

    inputs: list[Any]
    args: list[Any]
    before: list[Any]
    scan: Any
    after: list[Any]
    kept: list[Any]
    reads_ys: tuple[bool, ...]
    addresses: tuple[tuple[str, ...], ...]
    options: Options | None

    @property
    def body(self) -> Any:
        """The jaxpr of one step. It reads consts, carry and xs, and returns the carry and the ys."""
        return self.scan.params["jaxpr"]

    @property
    def num_consts(self) -> int:
        """The number of consts of the scan. They lead the state."""
        return scan_sizes(self.scan.params)[0]

    @property
    def num_state(self) -> int:
        """The number of leaves of the state: the consts and the carry of the scan."""
        return sum(scan_sizes(self.scan.params))

    @property
    def wanted(self) -> list[Any]:
        """The variables that the scan and `after` read of what comes before."""
        return [*self.scan.invars, *self.kept]

    @property
    def read(self) -> list[int]:
        """Where the outputs that `after` reads stand among the state and the outputs of a step."""
        return [self.num_state + i for i, r in enumerate(self.reads_ys) if r]

    @property
    def sited_before(self) -> bool:
        """Whether there are sites before the scan."""
        return any(eqn_holds_sites(e) for e in self.before)

    def first(self, read: Sequence[Any], *xs: Any) -> list[Any]:
        """The values of some variables before the scan, from those of the inputs."""
        return results(self.before, dict(zip(self.inputs, xs, strict=True)), read)


def cut(program: Program, observed: Sequence[str], scan: str | None = None) -> Cut:
    """A staged program, cut at its one sited scan that holds an observation (`split`)."""
    code, args = program.staged().code()
    flat, args, sums = inlined(code.jaxpr, args)
    jaxpr, _ = open_jaxpr(flat.jaxpr)
    at = _find(program, jaxpr, set(observed), scan)
    eqn, before, after = jaxpr.eqns[at], jaxpr.eqns[:at], jaxpr.eqns[at + 1 :]

    # What the sites after the scan read, and what they need for it.
    last = behind(after, [], eqn_holds_sites)
    read_after = dict.fromkeys(v for e in last for v in e.invars if not isinstance(v, Literal))
    made = {v for e in last for v in e.outvars}
    outs = list(eqn.outvars)
    _, num_carry = scan_sizes(eqn.params)
    return Cut(
        inputs=list(jaxpr.invars),
        args=args,
        before=before,
        scan=eqn,
        after=last,
        kept=[v for v in read_after if v not in made and v not in outs],
        reads_ys=tuple(v in read_after for v in outs[num_carry:]),
        addresses=tuple(dict.fromkeys(a for e in sums for a in e.params["addresses"])),
        options=sums[0].params["options"] if sums else None,
    )


def inlined(jaxpr: Any, args: list[Any]) -> tuple[Code, list[Any], list[Any]]:
    """A program without calls that hold sites, its arguments, and the equations that sum choices out of a scan."""
    sums: list[Any] = []
    code, consts = stage(lambda *xs: inline(jaxpr, list(xs), sums), args)
    return code, [*consts, *args], sums


def inline(jaxpr: Any, args: list[Any], sums: list[Any] | None = None) -> list[Any]:
    """Stage a jaxpr again, without the calls that hold sites.

    With `sums`, equations that sum choices out of a scan are noted there, and replaced by the program inside them.
    """

    def equation(eqn: Any, ins: list[Any]) -> list[Any] | None:
        if sums is not None and eqn.primitive is marginal_p and holds_scan.at(eqn):
            sums.append(eqn)
        elif not (is_call(eqn) and eqn_holds_sites(eqn)):
            return None
        return inline(inside(eqn)[0], ins, sums)

    return evaluate(jaxpr, args, equation)


def _find(program: Program, jaxpr: Any, observed: set[str], scan: str | None) -> int:
    """The index of the equation that is meant."""
    factors = {a for a, s in program.sites.items() if s.kind == "factor" or s.observed}
    sited = {i: eqn_site_names(e) for i, e in enumerate(jaxpr.eqns) if eqn_holds_sites(e)}
    scans = {i: names for i, names in sited.items() if is_loop(jaxpr.eqns[i])}
    held = {i: names for i, names in scans.items() if (observed | factors) & set(names)}
    if scan is not None:
        held = {i: names for i, names in scans.items() if scan in names}
    if len(held) == 1:
        return next(iter(held))
    name = program.name
    if len(held) > 1:
        found = "; ".join(", ".join(map(repr, names)) for names in held.values())
        raise ModelError(
            f"filtering: {name!r} has several scans that hold observations ({found}): choose one by an address in it, "
            "filtering(scan=...)"
        )
    if scan is not None:
        raise ModelError(f"filtering: no top-level scan of {name!r} holds the site {scan!r}")
    unseen = scans or {
        i: names
        for i, names in sited.items()
        if jaxpr.eqns[i].primitive is lanes_p and holds_scan.at(jaxpr.eqns[i])
    }
    if unseen:
        found = "; ".join(", ".join(map(repr, names)) for names in unseen.values())
        raise ModelError(f"filtering: no site in the scan of {name!r} is observed ({found})")
    held_in = [
        (described(eqn), eqn_site_names(eqn))
        for eqn in jaxpr.eqns
        if eqn_holds_sites(eqn) and holds_scan.at(eqn)
    ]
    if held_in:
        where, names = held_in[0]
        raise ModelError(
            f"filtering: the scan of {name!r} with the sites {', '.join(map(repr, names))} stands inside {where}; "
            "filtering takes a scan at the top level of the model"
        )
    raise ModelError(
        f"filtering: {name!r} has no jax.lax.scan with sites in it, whose observations could enter one after another"
    )
