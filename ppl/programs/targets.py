"""Targets: a program and data. Together they are an unnormalised density over the remaining choices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.analysis.dependence import readers
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import AddressError, DensityError
from weft.ppl.stage.keys import as_key
from weft.ppl.stage.modules import Noun
from weft.ppl.stage.structure import SiteInfo

from . import printing
from .evaluation import by_axis, run_generate, run_log_densities
from .handlers import Given, expand
from .observations import entries
from .traces import Trace
from .unconstrained import Unconstrained, unconstrain

if TYPE_CHECKING:
    from .programs import Program


class Target(printing.Printed, Noun):
    """A program with some choices observed: an unnormalised density over the others. It is a pytree.

    Attributes:
        program: the program.
        data: the given choices, by dotted address.
        missing: for a site observed in part, the flat indices of its missing elements, if they were known when the
            target was made. Only these elements are coordinates in unconstrained space.
    """

    program: Program
    data: dict[str, Given]
    missing: dict[str, jax.Array]

    @property
    def sites(self) -> dict[str, SiteInfo]:
        """The table of sites of the program."""
        return self.program.sites

    @property
    def latents(self) -> tuple[str, ...]:
        """The dotted addresses of the latent choices. A site observed in part is among them."""
        return tuple(a for a in self.program.latents if a not in self.data or self._partial(a))

    def _partial(self, address: str) -> bool:
        given = self.data.get(address)
        return given is not None and given.where is not None and given.drop is None

    @property
    def observed(self) -> dict[str, Any]:
        """Nested dict of the data, as arrays."""
        return unflatten({a: g.value for a, g in self.data.items()})

    def latent_shapes(self) -> dict[str, Any]:
        """Nested dict of the shapes and dtypes of the latent choices."""
        return unflatten(
            {
                a: jax.ShapeDtypeStruct(self.sites[a].shape, self.sites[a].dtype)
                for a in self.latents
            }
        )

    def given(self, choices: Mapping[str, Any]) -> Target:
        """The same target with more choices given. It is a density over the remaining ones.

        Args:
            choices: nested dict of latent choices.

        Raises:
            AddressError: for a choice that is unknown, or observed already.
        """
        found = self._latent_entries(choices)
        missing = {a: index for a, index in self.missing.items() if a not in found}
        return Target(self.program, {**self.data, **found}, missing)

    def staged(self) -> Target:
        """The same target, staged now.

        Arrays that the model captured are among its leaves, and the rest compares by structure. A function jitted over
        the target compiles once for all data of one shape, and never sees a stale global.
        """
        return Target(self.program.staged(), self.data, self.missing)

    def log_density(self, latents: Mapping[str, Any], key: jax.Array | None = None) -> jax.Array:
        r"""$\log p(\text{latents}, \text{data})$, a scalar.

        Args:
            latents: nested dict of every latent choice. A site observed in part is given whole, and its observed
                elements are ignored.
            key: a random key, for programs whose density is estimated.
        """
        self.program.require_density()
        return self.program.log_density_of(unflatten(self.complete(latents)), key)

    def log_densities(
        self, latents: Mapping[str, Any], by: str | None = None, key: jax.Array | None = None
    ) -> Any:
        """The log density of each site.

        Args:
            latents: as in ``log_density``.
            by: the name of an axis. The result then is one number for each index of that axis, summed over the observed
                sites.
            key: a random key, for programs whose density is estimated.
        """
        self.program.require_density()
        key = None if key is None else as_key(key)
        found = run_log_densities(self.program.staged(), unflatten(self.complete(latents)), key)
        if by is None:
            return found
        seen = {}
        for address, density in flatten(found).items():
            info, data = self.sites[address], self.data.get(address)
            if data is not None and data.where is not None:
                density = jnp.where(data.where, density, 0)
            if data is not None or info.observed or info.kind == "factor":
                seen[address] = density
        return by_axis(self.sites, seen, by, self.program.name)

    def generate(
        self, key: jax.Array, latents: Mapping[str, Any] | None = None
    ) -> tuple[Trace, jax.Array]:
        """Draw the latent choices that are not given, and weigh the data and the choices that are.

        Args:
            key: one random key.
            latents: nested dict of some of the latent choices.

        Returns:
            ``(trace, log_weight)``.
        """
        given = {**self.data, **self._latent_entries(latents or {})}
        return run_generate(self.program.staged(), as_key(key), unflatten(given))

    def predict(
        self,
        key: jax.Array,
        choices: Mapping[str, Any],
        batch_size: int | None = None,
        keep: str | Iterable[str] | None = None,
    ) -> Trace:
        """Draw new data for every draw of the latent choices. Missing and unseen elements are drawn as well.

        See ``Program.predict`` for the arguments.
        """
        return self.program.predict(
            key,
            {a: v for a, v in flatten(choices).items() if not self._partial(a)},
            batch_size,
            keep,
        )

    def unconstrain(self) -> Unconstrained:
        """The target on R^n, for any sampler.

        Raises:
            DensityError: if a latent choice is discrete, or its support has no bijection. The message names the site.
        """
        return unconstrain(self)

    def complete(self, latents: Mapping[str, Any]) -> dict[str, Given]:
        """The data and all latent choices, as entries by address.

        Raises:
            AddressError: for a missing or an unknown choice.
        """
        found = self._latent_entries(latents)
        absent = [a for a in self.latents if a not in found]
        if absent:
            raise AddressError(
                f"target of model {self.program.name!r}: missing latent choices {', '.join(map(repr, absent))}"
            )
        return {**self.data, **found}

    def _latent_entries(self, latents: Mapping[str, Any]) -> dict[str, Given]:
        found = entries(self.sites, latents, self.program.name)
        for address, entry in found.items():
            if address in self.data and not self._partial(address):
                raise AddressError(
                    f"target of model {self.program.name!r}: {address!r} is observed, not latent"
                )
            if self._partial(address):
                data = self.data[address]
                found[address] = Given(
                    jnp.where(expand(data.where, entry.value), data.value, entry.value)
                )
        return found

    def __repr__(self) -> str:
        return printing.target(self)


def condition_program(program: Program, choices: Mapping[str, Any]) -> Target:
    """``program.given(choices)``."""
    program.require_density()
    data = entries(program.sites, choices, program.name, data=True)
    missing = {}
    for address, given in data.items():
        if given.drop is not None:
            _require_unread(program, address, given)
        elif given.where is not None and not isinstance(given.where, Tracer):
            missing[address] = jnp.asarray(np.flatnonzero(~np.asarray(given.where)), jnp.int32)
    # a site observed whole through a mask is observed
    for address, index in list(missing.items()):
        if index.size == 0:
            data[address] = Given(data[address].value, checked=data[address].checked)
            del missing[address]
    return Target(program, data, missing)


def _require_unread(program: Program, address: str, given: Given) -> None:
    """Refuse ``missing="drop"`` if another density reads the site."""
    if (
        given.where is not None
        and not isinstance(given.where, Tracer)
        and np.all(np.asarray(given.where))
    ):
        return
    code, _ = program.code()
    found = readers(code.jaxpr, address)
    if found:
        raise DensityError(
            f"model {program.name!r}: the missing elements of {address!r} cannot be dropped, since "
            f"{', '.join(map(repr, found))} depend on the site; impute them: observed(y, where=mask, "
            "missing='impute')"
        )
