"""Programs: a model applied to arguments. It is a distribution over choices and a return value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.compat import Tracer, tracing_context
from weft.ppl.stage.errors import AddressError, DensityError, ModelError
from weft.ppl.stage.keys import as_key
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
"""The number of staged programs that are kept. The one used longest ago is dropped first."""
_staged: dict[Any, tuple[Code, list[Any], dict[str, SiteInfo], list[Any]]] = {}


@jax.tree_util.register_pytree_node_class
class Program(printing.Printed):
    """A model applied to arguments: a distribution over choices and a return value. It is a pytree.

    Its leaves are the traced arguments and one scalar. ``jax.vmap(model)`` gives that scalar a batch axis. Such a
    program is the product of independent copies, one for each index of the axis.

    Attributes:
        leaves: the traced arguments, and the scalar last.
        skeleton: the model and the rest of its arguments.
        name: the name of the model, in messages.
    """

    __slots__ = ("leaves", "name", "skeleton")

    def __init__(self, leaves: list[Any], skeleton: Skeleton, name: str) -> None:
        self.leaves = leaves
        self.skeleton = skeleton
        self.name = name

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Skeleton, str]]:
        """The leaves, and the static rest."""
        used(self)
        return tuple(self.leaves), (self.skeleton, self.name)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Skeleton, str], leaves: Iterable[Any]) -> Program:
        """The program with these leaves."""
        return cls(list(leaves), *aux)

    # --- staging ---

    @property
    def lanes(self) -> tuple[int, ...]:
        """The sizes of the batch axes that ``jax.vmap`` of the model has added, outermost first."""
        return tuple(jnp.shape(self.leaves[-1]))

    @property
    def function(self) -> Any:
        """The function that the program calls: the model's own, or code that was staged already."""
        return self.skeleton.unpack([0.0] * self.skeleton.num_arrays)[0]

    @property
    def is_staged(self) -> bool:
        """Whether the program is staged: its function is code, and its arguments are arrays."""
        return isinstance(self.function, Code) and not self.lanes

    def run(self, *leaves: Any) -> Any:
        """Call the function on the given leaves. Whoever stages this call meets the sites."""

        def one(*leaves: Any) -> Any:
            function, args, kwargs = self.skeleton.unpack(leaves[:-1])
            return function(*args, **kwargs)

        for _ in self.lanes:
            one = jax.vmap(one)
        return one(*leaves)

    def code(self) -> tuple[Code, list[Any]]:
        """The staged program and its flat arguments, those that the model captured first.

        A program is staged once, as long as nothing that it captures has changed.
        """
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
            key = (self.skeleton, avals, tracing_context())
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

        Arrays that the model captured are among its leaves. The rest compares by structure.
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
        """The table of all sites by dotted address, hidden ones included."""
        return self._stage()[2]

    @property
    def latents(self) -> tuple[str, ...]:
        """The dotted addresses of the choices."""
        return tuple(
            a
            for a, s in self.sites.items()
            if s.kind == "sample" and not s.observed and not s.hidden
        )

    @property
    def estimated(self) -> bool:
        """Whether the density is an unbiased estimate, because the program holds a ``marginal`` or a ``normalize``."""
        return any(s.estimated for s in self.sites.values())

    @property
    def unnormalised(self) -> bool:
        """Whether the density need not integrate to one, because of a ``factor`` or a condition inside the model."""
        return bool(self.unnormalised_sites)

    @property
    def unnormalised_sites(self) -> tuple[str, ...]:
        """The addresses of factors, and of choices that are conditioned inside the model."""
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
            key: one random key. Draws depend on the key and on the addresses alone, not on what else the function
                computes.

        Returns:
            A trace.
        """
        return run_generate(self.staged(), as_key(key), {})[0]

    def log_density(self, choices: Mapping[str, Any], key: jax.Array | None = None) -> jax.Array:
        r"""The log density $\log p(\text{choices})$, a scalar.

        Args:
            choices: nested dict (or dotted addresses) of every choice. Choices of branches that are not taken do not
                matter.
            key: a random key, for programs whose density is estimated.

        Raises:
            AddressError: for a missing or an unknown choice.
            ObservationError: for a choice that does not fit its site.
            DensityError: if the program has no known density.
        """
        self.require_density()
        return self.log_density_of(self._entries(choices, complete=True), key)

    def log_density_of(self, given: dict[str, Any], key: jax.Array | None) -> jax.Array:
        """The log density of entries by name.

        Without a key, an estimated density takes its randomness from the program that is being staged.
        """
        if self.estimated and key is None and staging():
            return run_inside(self, given)[0].log_density
        key = None if key is None else as_key(key)
        return run_log_density(self.staged(), given, key)

    def random_weighted(self, key: jax.Array) -> tuple[dict[str, Any], jax.Array]:
        r"""A draw $x$ and $\log d$, with $\mathbb{E}[1/d \mid x] = 1/p(x)$. If the density is exact, $d = p(x)$.

        Args:
            key: one random key.

        Returns:
            ``(choices, log_d)``.
        """
        trace = self.simulate(key)
        return trace.choices, trace.log_density

    def estimate_log_density(self, key: jax.Array, choices: Mapping[str, Any]) -> jax.Array:
        r"""An estimate $\log d'$ with $\mathbb{E}[d'] = p(\text{choices})$. If the density is exact, it is $\log p$.

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
            by: the name of an axis. The result then is one number for each index of that axis, summed over the sites
                that have it.
            key: a random key, for programs whose density is estimated. An estimate is one number for all of its
                choices; it stands at the first.

        Returns:
            A nested dict of arrays of shape (mapped axes..., *batch_shape), summed over event axes only. With ``by``,
            an array of the size of that axis.
        """
        self.require_density()
        key = None if key is None else as_key(key)
        found = run_log_densities(self.staged(), self._entries(choices, complete=True), key)
        return found if by is None else by_axis(self.sites, flatten(found), by, self.name)

    def generate(self, key: jax.Array, choices: Mapping[str, Any]) -> tuple[Trace, jax.Array]:
        r"""Draw the choices that are not given, and weigh those that are.

        The log weight is $\sum_{i\ \text{given}} \log p(x_i \mid x_{<i})$. Its exponential averages to the marginal
        density of the given choices.

        Args:
            key: one random key. The draw of a choice does not depend on which others are given.
            choices: nested dict of some of the choices. ``observed(values, where=mask)`` gives a part of one.

        Returns:
            ``(trace, log_weight)``.
        """
        return run_generate(self.staged(), as_key(key), self._entries(choices))

    def given(self, choices: Mapping[str, Any] | None = None) -> Target:
        """Observe choices. The result is the unnormalised posterior over the others.

        Args:
            choices: nested dict of data: anything that ``numpy.asarray`` takes, or ``observed(y, where=mask)``. If data
                are shorter than the time axis of a scan, the rest is forecast.

        Raises:
            ObservationError: if data do not fit their site.
            AddressError: if there is no such choice.
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
            choices: nested dict, such as ``draws.choices``. All arrays have the same leading batch axes (chain, draw).
            batch_size: the number of draws that are treated at once; all if None. It bounds memory.
            keep: addresses of the choices or derived values to return. By default everything is returned, and the
                return value too.

        Returns:
            A trace whose arrays have the leading batch axes.
        """
        return predict(self, key, choices, batch_size, keep)

    def require_density(self) -> None:
        """Raise DensityError if a choice is not recorded, and say why it is not."""
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
