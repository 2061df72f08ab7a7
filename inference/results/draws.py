"""`Draws` of Markov chains: a pytree of arrays that lead with (chain, draw)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from weft.ppl.stage.addresses import flatten
from weft.ppl.stage.errors import WeftError

from . import export, record, storage
from .result import Result, on_host
from .summary import Summary, summarise_draws


@storage.result_type("draws")
class Draws(Result):
    """The result of a Markov chain sampler: draws of every choice, as arrays (chain, draw, ...).

    Attributes:
        choices: nested dict of the latent choices, arrays (chain, draw, ...).
        derived: nested dict of values that `deterministic` recorded, and of the original values of reparametrised
            sites.
        active: a tree like `choices`, of booleans. It is False for draws that do not count, because the branch that
            holds the choice was not taken. The shape of the booleans leads that of the choice. A choice that is absent
            here always counts.
        stats: statistics of the sampler, arrays (chain, draw), under ArviZ's names: "lp", "acceptance_rate",
            "diverging", "energy", "tree_depth", "n_steps", "step_size", "reached_max_treedepth".
        target: the target that was sampled, or a `TargetRecord` if the draws were read from a file without it.
        warmup: what the warm-up found, as arrays that lead with the chain: "step_size", "inverse_mass" (of a cycle or a
            mixture in dicts by the index of the part), and the number of "divergences".

    Examples:
        >>> import jax
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> mu = jax.random.normal(keys[0], (4, 1000))
        >>> theta = 3.0 + 2.0 * jax.random.normal(keys[1], (4, 1000, 2))
        >>> Draws(choices={"mu": mu, "theta": theta})
        Draws: 4 chains of 1000 draws
        <BLANKLINE>
                 mean    sd     5%   50%   95%   mcse  ess_bulk  ess_tail  r_hat
        mu       ...
        theta[0] ...
        theta[1] ...
        <BLANKLINE>
        All R-hat below 1.01 and every ESS above 400: the chains agree.
    """

    choices: dict[str, Any]
    derived: dict[str, Any] = eqx.field(default_factory=dict)
    active: dict[str, Any] = eqx.field(default_factory=dict)
    stats: dict[str, Any] = eqx.field(default_factory=dict)
    target: Any = None
    warmup: dict[str, Any] | None = None

    @property
    def num_chains(self) -> int:
        """The number of chains."""
        return self.lead[0]

    @property
    def num_draws(self) -> int:
        """The number of draws that are kept of each chain."""
        return self.lead[1]

    def summary(
        self, *, quantiles: Sequence[float] = (0.05, 0.5, 0.95), all: bool = False
    ) -> Summary:
        """A table with one row for each scalar, and a verdict in words.

        The columns are mean, standard deviation (sd), the quantiles, the Monte-Carlo standard error of the mean (mcse),
        the effective sample sizes of bulk and tail, and rank-normalised split R-hat. Idle draws (see `active`) are left
        out. Then a column "active" gives the fraction of draws that count.

        Args:
            quantiles: probabilities.
            all: whether to print every row. By default the table fits a screen.

        Returns:
            A `Summary`. It prints as a table, and gives rows by label and sites by address.

        Raises:
            WeftError: under tracing, or if a further axis leads (a vmap over data sets).

        Examples:
            >>> import jax
            >>> draws = Draws(choices={"mu": jax.random.normal(jax.random.key(0), (4, 500))})
            >>> summary = draws.summary(quantiles=(0.1, 0.9))
            >>> summary.columns
            ('mean', 'sd', '10%', '90%', 'mcse', 'ess_bulk', 'ess_tail', 'r_hat')
            >>> summary.verdict
            'All R-hat below 1.01 and every ESS above 400: the chains agree.'
        """
        self._check("summary()")
        parts = map(on_host, (self.choices, self.derived, self.active, self.stats))
        sites = getattr(self.target, "sites", None)
        names = ("step_size", "scale")
        tuned = self.warmup is None or any(a.endswith(names) for a in flatten(self.warmup))
        more: Any = {"quantiles": quantiles, "sites": sites, "all": all}
        return summarise_draws(self._title(), *parts, fixed_steps=not tuned, **more)

    def to_arviz(
        self,
        *,
        predictions: Any = None,
        log_likelihood: bool | str | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Everything in ArviZ's form: `InferenceData` on ArviZ 0.2x, `xarray.DataTree` on 1.x.

        The group `posterior` holds choices and derived values. Idle draws are NaN there. The other groups are
        `sample_stats`, `observed_data`, `log_likelihood`, and `posterior_predictive`, which is called `predictions` if
        the inputs differ from those of the target. Named axes are dims; other axes are called ``theta_dim_0``. Nested
        addresses keep their dots.

        Args:
            predictions: the result of `predict` for these draws: a trace, or a nested dict of arrays (chain, draw,
                ...).
            log_likelihood: whether to evaluate the pointwise log likelihood of every observed site, which leave-one-out
                needs. The name of an axis gives one number for each index of it, summed over sites. By default it is
                evaluated if the target is there and the result has at most 10^8 numbers.
            coords: labels for dims, ``{"school": names}``.
            batch_size: the number of draws for which the log likelihood is evaluated at once. It is chosen by size if
                left out.

        Raises:
            WeftError: if the log likelihood is asked for and the target, or a choice, is not there; or for coords of
                the wrong length, or for a dim that does not exist.

        Examples:
            >>> import jax
            >>> draws = Draws(choices={"mu": jax.random.normal(jax.random.key(0), (4, 500))})
            >>> draws.to_arviz().posterior["mu"].dims
            ('chain', 'draw')
        """
        self._check("to_arviz()")
        return export.to_arviz(self, predictions, log_likelihood, coords, batch_size)

    @property
    def lead(self) -> tuple[int, int]:
        """The shape (chain, draw)."""
        for value in (
            *jax.tree.leaves(self.stats),
            *jax.tree.leaves(self.choices),
            *jax.tree.leaves(self.derived),
        ):
            if jnp.ndim(value) >= 2:
                chains, draws = jnp.shape(value)[:2]
                return chains, draws
        return (0, 0)

    def _saved(self) -> dict[str, Any]:
        names = ("choices", "derived", "active", "stats", "warmup")
        return {name: getattr(self, name) for name in names}

    def _title(self) -> str:
        chains, draws = self.lead
        of = f" of {name}" if (name := record.name_of(self.target)) else ""
        return f"Draws{of}: {chains} chain{'s' if chains != 1 else ''} of {draws} draws"

    def _check(self, what: str) -> None:
        self._require_host(what)
        for name, value in flatten(self.stats).items():
            if value.ndim > 2:
                raise WeftError(
                    f"{what} of Draws whose statistics have shape {value.shape} ({name!r}) instead of (chain, draw): "
                    "they come from a vmap. Take one of them, jax.tree.map(lambda x: x[i], draws)"
                )
        for address, value in self._values().items():
            if value.ndim < 2 or value.shape[:2] != self.lead:
                raise WeftError(
                    f"{what}: {address!r} has shape {value.shape}, which does not lead with (chain, draw) = "
                    f"{self.lead}"
                )
            if 0 in self.lead:
                raise WeftError(f"{what}: there are no draws, (chain, draw) = {self.lead}")
