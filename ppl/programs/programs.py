"""Programs: a model applied to arguments is a distribution over choices and a return value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.compat import Tracer, as_key
from weft.ppl.stage.errors import AddressError, DensityError, ModelError
from weft.ppl.stage.packing import Skeleton, pack
from weft.ppl.stage.staging import Code, captured, stage, staging, unchanged, used
from weft.ppl.stage.structure import SiteInfo, site_table

from . import printing
from .evaluation import by_axis, run_generate, run_inside, run_log_densities, run_log_density
from .observations import entries
from .predictions import predict
from .targets import Target, condition_program
from .traces import Trace, table_of

MAX_STAGED = 512
"""So many staged programs are kept; the one used longest ago goes first."""
_staged: dict[Any, tuple[Code, list[Any], dict[str, SiteInfo], list[Any]]] = {}


@jax.tree_util.register_pytree_node_class
class Program(printing.Printed):
    """A model applied to arguments: a distribution over choices and a return value. A pytree.

    Its leaves are the traced arguments and one scalar that tells over how many lanes ``jax.vmap(model)`` has spread it:
    such a program is the product over its lanes.
    """

    __slots__ = ("leaves", "name", "skeleton")

    def __init__(self, leaves: list[Any], skeleton: Skeleton, name: str) -> None:
        self.leaves = leaves
        self.skeleton = skeleton
        self.name = name

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Skeleton, str]]:
        """Leaves, and what compares statically."""
        used(self)
        return tuple(self.leaves), (self.skeleton, self.name)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Skeleton, str], leaves: Iterable[Any]) -> Program:
        """The program of these leaves."""
        return cls(list(leaves), *aux)

    # --- staging ---

    @property
    def lanes(self) -> tuple[int, ...]:
        """Sizes of the axes that ``jax.vmap`` of the model has added, outermost first."""
        return tuple(jnp.shape(self.leaves[-1]))

    @property
    def function(self) -> Any:
        """What the program calls: the model's function, or code that was staged already."""
        return self.skeleton.unpack([0.0] * self.skeleton.num_arrays)[0]

    @property
    def is_staged(self) -> bool:
        """Whether ``staged`` has run: what it calls is code, and the arguments are arrays."""
        return isinstance(self.function, Code) and not self.lanes

    def run(self, *leaves: Any) -> Any:
        """Call the function on the given leaves; sites are met by whoever stages this."""

        def one(*leaves: Any) -> Any:
            function, args, kwargs = self.skeleton.unpack(leaves[:-1])
            return function(*args, **kwargs)

        for _ in self.lanes:
            one = jax.vmap(one)
        return one(*leaves)

    def code(self) -> tuple[Code, list[Any]]:
        """The staged program and its flat arguments, what the model captured first. Staged once, if nothing changed."""
        code, consts, _, _ = self._stage()
        return code, [*consts, *(self.leaves[:-1] if self.is_staged else self.leaves)]

    def _stage(self) -> tuple[Code, list[Any], dict[str, SiteInfo], list[Any]]:
        used(self)
        function = self.function
        if self.is_staged:
            return function, [], table_of(function), []
        avals = tuple(
            (jnp.shape(x), jnp.result_type(x), getattr(x, "weak_type", False)) for x in self.leaves
        )
        try:
            key = (self.skeleton, avals, jax.config.read("jax_enable_x64"))
            entry = _staged.get(key)
        except TypeError as e:
            raise TypeError(
                f"{self.name}: an argument that is no array must be hashable ({e})"
            ) from None
        if entry is not None and unchanged(entry[3]):
            _staged[key] = _staged.pop(key, entry)  # the last one used goes last
            return entry
        snapshot = captured(function)
        code, consts = stage(self.run, self.leaves, snapshot)
        try:
            entry = (code, consts, site_table(code.jaxpr), snapshot)
        except ModelError as e:
            raise ModelError(f"model {self.name!r}: {e}") from None
        if not any(isinstance(x, Tracer) for x in (*consts, *(v for _, _, v in snapshot))):
            _staged.pop(key, None)
            _staged[key] = entry
            while len(_staged) > MAX_STAGED:
                del _staged[next(iter(_staged))]
        return entry

    def staged(self) -> Program:
        """The same program, staged now.

        What the model captured is among its leaves, and the rest compares by structure.
        """
        if self.is_staged:
            return self
        return Program.of_code(*self.code(), self.name)

    @classmethod
    def of_code(cls, code: Code, args: list[Any], name: str) -> Program:
        """The program of staged code and its flat arguments."""
        arrays, skeleton = pack((code, tuple(args), {}))
        return cls([*arrays, np.zeros((), np.float32)], skeleton, name)

    @property
    def sites(self) -> dict[str, SiteInfo]:
        """The table of sites, by dotted address: all of them, hidden ones too."""
        return self._stage()[2]

    @property
    def latents(self) -> tuple[str, ...]:
        """Dotted addresses of the choices."""
        return tuple(
            a
            for a, s in self.sites.items()
            if s.kind == "sample" and not s.observed and not s.hidden
        )

    @property
    def estimated(self) -> bool:
        """Whether its density is an unbiased estimate: it holds a ``marginal`` or a ``normalize``."""
        return any(s.estimated for s in self.sites.values())

    @property
    def unnormalised(self) -> bool:
        """Whether a ``factor`` or a condition inside the model makes its density one that does not integrate to one."""
        return bool(self.unnormalised_sites)

    @property
    def unnormalised_sites(self) -> tuple[str, ...]:
        """Addresses of the factors and of the choices that are conditioned inside the model."""
        return tuple(a for a, s in self.sites.items() if s.kind == "factor" or s.observed)

    def shapes(self) -> dict[str, Any]:
        """Nested dict of the shapes and dtypes of the choices."""
        return unflatten(
            {
                a: jax.ShapeDtypeStruct(self.sites[a].shape, self.sites[a].dtype)
                for a in self.latents
            }
        )

    # --- running ---

    def simulate(self, key: jax.Array) -> Trace:
        """Draw every choice.

        Args:
            key: one random key. Draws depend on it and on the addresses alone, not on what else the function computes.

        Returns:
            A trace.
        """
        return run_generate(self.staged(), as_key(key), {})[0]

    def log_density(self, choices: Mapping[str, Any], key: jax.Array | None = None) -> jax.Array:
        r"""The log density $\log p(\text{choices})$, a scalar.

        Args:
            choices: nested dict (or dotted addresses) of every choice; those of branches not taken do not matter.
            key: for programs whose density is estimated.

        Raises:
            AddressError: for a missing or an unknown choice.
            ObservationError: for one that does not fit its site.
            DensityError: if the program has no density.
        """
        self.require_density()
        return self.log_density_of(self._entries(choices, complete=True), key)

    def log_density_of(self, given: dict[str, Any], key: jax.Array | None = None) -> jax.Array:
        """The same, of entries by name. An estimated density has its randomness from a program that is being staged."""
        if self.estimated and key is None and staging():
            return run_inside(self, given)[0].log_density
        key = None if key is None else as_key(key)
        return run_log_density(self.staged(), given, key)

    def random_weighted(self, key: jax.Array) -> tuple[dict[str, Any], jax.Array]:
        r"""A draw $x$ and $\log d$ with $\mathbb{E}[1/d \mid x] = 1/p(x)$; where the density is exact, $d = p(x)$.

        Args:
            key: one random key.

        Returns:
            ``(choices, log_d)``.
        """
        trace = self.simulate(key)
        return trace.choices, trace.log_density

    def estimate_log_density(self, key: jax.Array, choices: Mapping[str, Any]) -> jax.Array:
        r"""$\log d'$ with $\mathbb{E}[d'] = p(\text{choices})$; where the density is exact, $\log p$.

        Args:
            key: one random key.
            choices: nested dict of every choice.
        """
        return self.log_density(choices, key)

    def log_densities(
        self, choices: Mapping[str, Any], by: str | None = None, key: jax.Array | None = None
    ) -> Any:
        """The log density of each site, or of each row.

        Args:
            choices: as in ``log_density``.
            by: name of an axis; then one number for every index of it, summed over the sites that have the axis.
            key: for programs whose density is estimated: one number for all choices of an estimate, at the first.

        Returns:
            A nested dict of arrays of shape (mapped axes..., *batch_shape), summed over event axes only; with ``by`` an
            array of the size of that axis.
        """
        self.require_density()
        key = None if key is None else as_key(key)
        found = run_log_densities(self.staged(), self._entries(choices, complete=True), key)
        return found if by is None else by_axis(self.sites, flatten(found), by, self.name)

    def generate(self, key: jax.Array, choices: Mapping[str, Any]) -> tuple[Trace, jax.Array]:
        r"""Draw what is not given; weigh what is.

        The weight is $\sum_{i\ \text{given}} \log p(x_i \mid x_{<i})$: with ``choices`` drawn this way its exponential
        averages to the marginal density of the given part.

        Args:
            key: one random key; the draw of a choice does not depend on which others are given.
            choices: nested dict of any of the choices, also ``observed(values, where=mask)`` for a part of one.

        Returns:
            ``(trace, log_weight)``.
        """
        return run_generate(self.staged(), as_key(key), self._entries(choices))

    def given(self, choices: Mapping[str, Any] | None = None) -> Target:
        """Observe choices: the unnormalised posterior over the others.

        Args:
            choices: nested dict of data, anything ``numpy.asarray`` takes, or ``observed(y, where=mask)``. Data shorter
                than a scan's time axis leave the rest to be forecast.

        Raises:
            ObservationError, AddressError: where data do not fit the program.
        """
        return condition_program(self, choices or {})

    def predict(
        self,
        key: jax.Array,
        choices: Mapping[str, Any],
        batch_size: int | None = None,
        keep: str | Iterable[str] | None = None,
    ) -> Trace:
        """Draw the rest of the program for every draw of some of its choices.

        Args:
            key: one random key.
            choices: nested dict, such as ``draws.choices``, whose arrays lead with the same batch axes (chain, draw).
            batch_size: how many draws at once (all, if None); bounds memory.
            keep: addresses of choices or derived values to return; without it everything and the return value.

        Returns:
            A trace whose arrays lead with the batch axes.
        """
        return predict(self, key, choices, batch_size, keep)

    def require_density(self) -> None:
        """Raise DensityError, with the reason, if a choice is not recorded."""
        for address, info in self.sites.items():
            if info.hidden and info.kind == "sample" and not info.observed:
                raise DensityError(
                    f"model {self.name!r} has no density at hand: the choice {address!r} is not recorded, since "
                    f"{info.why_hidden}"
                    + ("(cond, body, max_steps)" if "loop" in info.why_hidden else "")
                )

    def _entries(self, choices: Mapping[str, Any], complete: bool = False) -> dict[str, Any]:
        used(self)
        found = entries(self.sites, choices, self.name)
        if complete:
            missing = [a for a in self.latents if a not in found]
            if missing:
                raise AddressError(
                    f"model {self.name!r}: log_density needs every choice; missing {', '.join(map(repr, missing))}. "
                    "Draw the rest with generate(key, choices), or observe a part with given(choices)"
                )
        return unflatten(found)

    def __repr__(self) -> str:
        return printing.program(self)
