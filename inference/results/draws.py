"""Results: `Draws` of Markov chains and weighted `Particles`.

Both are pytrees of arrays, made in compiled code and passed through `jit` and `vmap` like any
other; what describes them (tables, exports, files) runs on the host. Choices are nested dicts;
values lead with (chain, draw) in `Draws` and with (particle,) in `Particles`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy import special
from weft.inference.resampling import systematic
from weft.ppl.stage.addresses import flatten, unknown
from weft.ppl.stage.compat import Tracer, as_key
from weft.ppl.stage.errors import AddressError, WeftError

from . import diagnostics, export, record, storage
from .summary import Summary, summarise_draws, summarise_particles

_PRINTED = 5_000_000  # numbers that printing summarises: some seconds


@storage.result_type("draws")
class Draws(eqx.Module):
    """What a Markov chain sampler gives: draws of every choice, (chain, draw, ...).

    Attributes:
        choices: nested dict of the latent choices, arrays (chain, draw, ...).
        derived: the same for values recorded by `deterministic` and the originals of reparametrised
            sites.
        active: the tree of `choices`, booleans of a shape that leads the choice's: False for draws
            that do not count, since the branch that holds the choice was not taken. What is absent
            counts always.
        stats: statistics of the sampler, (chain, draw), under ArviZ's names: "lp",
            "acceptance_rate", "diverging", "energy", "tree_depth", "n_steps", "step_size",
            "reached_max_treedepth".
        target: what was sampled; a `Record` of it, if the draws were read from a file without it.
        warmup: what the sampler has to say of its warm-up, arrays that lead with the chain.

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
        """Number of chains."""
        return self.lead[0]

    @property
    def num_draws(self) -> int:
        """Number of draws kept of each chain."""
        return self.lead[1]

    def __getitem__(self, address: str) -> Any:
        """Values of a choice or a derived value by dotted address, ``draws["team.skill"]``."""
        return _lookup(address, self.choices, self.derived)

    def summary(
        self, *, quantiles: Sequence[float] = (0.05, 0.5, 0.95), all: bool = False
    ) -> Summary:
        """Means, spreads, quantiles and diagnostics, one row a scalar, and a verdict in words.

        Columns are mean, sd, the quantiles, the Monte-Carlo standard error of the mean (mcse), bulk
        and tail effective sample sizes and rank-normalised split R-hat. Draws that are idle (see
        `active`) are left out; a column "active" then gives the fraction of those that count.

        Args:
            quantiles: probabilities.
            all: print every row; otherwise what fits a screen.

        Returns:
            A `Summary`: prints as a table, gives rows by label and sites by address.

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
        parts = (_host(self.choices), _host(self.derived), _host(self.active), _host(self.stats))
        sites = getattr(self.target, "sites", None)
        return summarise_draws(self._title(), *parts, quantiles=quantiles, sites=sites, all=all)

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
            predictions: what `predict` gave for these draws: a trace, or a nested dict of arrays
                (chain, draw, ...).
            log_likelihood: whether to evaluate the pointwise log likelihood of every observed site,
                which leave-one-out needs; the name of an axis gives one number for each index of
                it, summed over sites. The default is to do so where the target is at hand and the
                result has at most 10^8 numbers.
            coords: labels for dims, ``{"school": names}``.
            batch_size: how many draws the log likelihood takes at once; chosen by size if left out.

        Raises:
            WeftError: where the log likelihood is asked for and the target, or a choice, is not at
                hand; for coords of the wrong length or for no dim.

        Examples:
            >>> import jax
            >>> draws = Draws(choices={"mu": jax.random.normal(jax.random.key(0), (4, 500))})
            >>> draws.to_arviz().posterior["mu"].dims
            ('chain', 'draw')
        """
        self._check("to_arviz()")
        return export.draws_to_arviz(self, predictions, log_likelihood, coords, batch_size)

    def save(self, path: storage.PathLike) -> None:
        """Write everything but the model to one file; `weft.inference.load` reads it.

        Args:
            path: the file, written under another name first and renamed when complete. `numpy.load`
                opens it too.

        Raises:
            StorageError: if it cannot be written there.
        """
        tree = {
            name: getattr(self, name)
            for name in ("choices", "derived", "active", "stats", "warmup")
        }
        _save(path, self, tree, {})

    @classmethod
    def from_saved(cls, saved: storage.Saved, target: Any = None) -> Draws:
        """Rebuild from what `storage.read` gives."""
        tree, target = _restore(saved, target)
        return cls(**tree, target=target)

    def __repr__(self) -> str:
        return _printed(self, str)

    def _repr_html_(self) -> str:
        return _printed(self, Summary._repr_html_)

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

    def _title(self) -> str:
        chains, draws = self.lead
        of = f" of {name}" if (name := record.name_of(self.target)) else ""
        return f"Draws{of}: {chains} chain{'s' if chains != 1 else ''} of {draws} draws"

    def _check(self, what: str) -> None:
        _check_host(self, what)
        for name, value in flatten(self.stats).items():
            if value.ndim > 2:
                raise WeftError(
                    f"{what} of Draws whose statistics have shape {value.shape} ({name!r}) instead of (chain, draw): "
                    "they come from a vmap. Take one of them, jax.tree.map(lambda x: x[i], draws)"
                )
        for address, value in flatten({**self.choices, **self.derived}).items():
            if value.ndim < 2 or value.shape[:2] != self.lead:
                raise WeftError(
                    f"{what}: {address!r} has shape {value.shape}, which does not lead with (chain, draw) = "
                    f"{self.lead}"
                )
            if 0 in self.lead:
                raise WeftError(f"{what}: there are no draws, (chain, draw) = {self.lead}")


@storage.result_type("particles")
class Particles(eqx.Module):
    r"""What a weighted sampler gives: particles with weights, and an estimate of the evidence.

    A posterior expectation is :math:`\sum_i w_i f(x_i) / \sum_i w_i` with :math:`w_i = \exp(`
    `log_weights` :math:`_i)`.

    Attributes:
        choices: nested dict of the latent choices, arrays (particle, ...).
        derived: the same for values recorded by `deterministic`.
        active: the tree of `choices`, booleans of a shape that leads the choice's: False where a
            choice does not count.
        log_weights: unnormalised, (particle,).
        log_evidence: logarithm of an unbiased estimate of the evidence.
        target: what was sampled; a `Record` of it, if the particles were read from a file without
            it.
        log_evidence_variance: variance of `log_evidence`, where the algorithm estimates one;
            otherwise it is taken from the weights, 1/ESS - 1/N.
        exact: whether the particles are all values there are, with their probabilities.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (2000,))
        >>> particles = Particles(choices={"x": x}, log_weights=0.3 * x)
        >>> 1500 < particles.ess() < 2000, particles.khat() < 0.7
        (Array(True, dtype=bool), True)
        >>> bool(jnp.abs(particles.summary()["x"]["mean"] - 0.3) < 0.1)
        True
    """

    choices: dict[str, Any]
    derived: dict[str, Any] = eqx.field(default_factory=dict)
    active: dict[str, Any] = eqx.field(default_factory=dict)
    log_weights: Float[Array, " particle"] = eqx.field(kw_only=True)
    log_evidence: Float[Array, ""] | None = None
    target: Any = None
    log_evidence_variance: Float[Array, ""] | None = None
    exact: bool = eqx.field(static=True, default=False)

    @property
    def num_particles(self) -> int:
        """Number of particles."""
        return self.log_weights.shape[-1]

    @property
    def weights(self) -> Float[Array, " particle"]:
        """Normalised weights."""
        return jax.nn.softmax(self.log_weights, axis=-1)

    def __getitem__(self, address: str) -> Any:
        """Values of a choice or a derived value by dotted address."""
        return _lookup(address, self.choices, self.derived)

    def ess(self) -> Float[Array, ""]:
        r"""Effective sample size :math:`(\sum_i w_i)^2 / \sum_i w_i^2` (Kish 1965); traceable."""
        return 1 / jnp.sum(jnp.square(self.weights), axis=-1)

    def khat(self) -> float:
        r"""Pareto :math:`\hat k` of the weights; above 0.7 they mislead. See `diagnostics.khat`."""
        self._check("khat()")
        return diagnostics.khat(self.log_weights)

    def resample(self, key: PRNGKeyArray, num_samples: int | None = None) -> Particles:
        """Equally weighted particles, drawn from these by their weights.

        Systematic resampling (Kitagawa 1996): of M samples a particle of normalised weight w is
        taken either floor(M w) or ceil(M w) times, M w on average. The samples are then shuffled,
        so that any part of them is a fair one.

        Args:
            key: random key.
            num_samples: how many; as many as there are particles if left out.

        Returns:
            Particles whose weights are all equal to the evidence. Traceable.

        Raises:
            WeftError: if no particle has a positive weight (where weights are concrete).

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> weights = jnp.array([1.0, 0.0, 3.0])
            >>> particles = Particles(choices={"z": jnp.arange(3)}, log_weights=jnp.log(weights))
            >>> equal = particles.resample(jax.random.key(0), num_samples=4)
            >>> sorted(equal.choices["z"].tolist()), equal.ess().item()
            ([0, 2, 2, 2], 4.0)
        """
        if not _traced(self.log_weights):
            largest = np.max(np.asarray(self.log_weights), initial=-np.inf)
            if not np.isfinite(largest):
                raise WeftError(
                    f"resample: the largest log weight is {largest}, no particle can be drawn by them"
                )
        count = self.num_particles if num_samples is None else num_samples
        chosen = shuffled(as_key(key), self.log_weights, count)
        evidence = self.log_evidence
        if evidence is None:
            evidence = jax.nn.logsumexp(self.log_weights) - jnp.log(self.num_particles)
        return Particles(
            choices=jax.tree.map(lambda x: x[chosen], self.choices),
            derived=jax.tree.map(lambda x: x[chosen], self.derived),
            active=jax.tree.map(lambda x: x[chosen] if jnp.ndim(x) else x, self.active),
            log_weights=jnp.full((count,), evidence, self.log_weights.dtype),
            log_evidence=self.log_evidence,
            target=self.target,
            log_evidence_variance=self.log_evidence_variance,
        )

    def summary(
        self, *, quantiles: Sequence[float] = (0.05, 0.5, 0.95), all: bool = False
    ) -> Summary:
        """A table with one row for each scalar, and a verdict in words.

        The columns are the weighted mean, the standard deviation (sd), the quantiles, and the standard error of the
        self-normalised estimate of the mean (mcse). The verdict rests on the effective sample size and on k-hat.

        Args:
            quantiles: probabilities.
            all: print every row; otherwise what fits a screen.

        Returns:
            A `Summary`: prints as a table, gives rows by label and sites by address.

        Raises:
            WeftError: under tracing, or if a further axis leads (a vmap over data sets).
        """
        self._check("summary()")
        parts = (_host(self.choices), _host(self.derived), _host(self.active))
        weights = np.asarray(self.log_weights)
        return summarise_particles(
            self._title(), *parts, weights, exact=self.exact, quantiles=quantiles, all=all
        )

    def to_arviz(
        self,
        *,
        seed: int = 0,
        num_samples: int | None = None,
        predictions: Any = None,
        log_likelihood: bool | str | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """One chain of equally weighted draws in ArviZ's form, which knows no weights.

        Args:
            seed: of the resampling.
            num_samples: how many draws; as many as there are particles if left out.
            predictions: what `predict` gave for `self.resample(jax.random.key(seed), num_samples)`.
            log_likelihood: as for `Draws`.
            coords: as for `Draws`.
            batch_size: as for `Draws`.

        Returns:
            The same groups as `Draws.to_arviz`, without sample_stats; the effective sample size,
            k-hat and log evidence of the particles are attributes of the posterior.
        """
        self._check("to_arviz()")
        return export.particles_to_arviz(
            self, seed, num_samples, predictions, log_likelihood, coords, batch_size
        )

    def save(self, path: storage.PathLike) -> None:
        """Write everything but the model to one file; see `Draws.save`."""
        _save(path, self, self._saved(), {"exact": self.exact})

    def _saved(self) -> dict[str, Any]:
        """What is written of it."""
        names = (
            "choices",
            "derived",
            "active",
            "log_weights",
            "log_evidence",
            "log_evidence_variance",
        )
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_saved(cls, saved: storage.Saved, target: Any = None) -> Self:
        """Rebuild from what `storage.read` gives."""
        tree, target = _restore(saved, target)
        return cls(**tree, target=target, exact=saved.meta["exact"])

    def __repr__(self) -> str:
        return _printed(self, str)

    def _repr_html_(self) -> str:
        return _printed(self, Summary._repr_html_)

    def _title(self) -> str:
        name = record.name_of(self.target)
        of = f" of {name}" if name else ""
        title = f"Particles{of}: {self.num_particles} {'values' if self.exact else 'particles'}"
        if self.log_evidence is None or isinstance(self.log_weights, Tracer):
            return title
        if self.exact:
            return f"{title}, log evidence {float(self.log_evidence):.6g}"
        variance = self.log_evidence_variance
        if variance is None:
            share = special.softmax(np.asarray(self.log_weights, dtype=float))
            variance = max(np.square(share).sum() - 1 / self.num_particles, 0.0)
        variance = float(variance)
        # An unbiased estimate of a small variance may come out negative.
        error = f"standard error {variance**0.5:.2g}" if variance >= 0 else "standard error unknown"
        return f"{title}, log evidence {float(self.log_evidence):.6g} ({error})"

    def _check(self, what: str) -> None:
        _check_host(self, what)
        if self.log_weights.ndim != 1:
            raise WeftError(
                f"{what} of Particles whose log weights have shape {self.log_weights.shape} instead of (particle,): "
                "they come from a vmap. Take one of them, jax.tree.map(lambda x: x[i], particles)"
            )
        for address, value in flatten({**self.choices, **self.derived}).items():
            if value.shape[:1] != self.log_weights.shape:
                raise WeftError(
                    f"{what}: {address!r} has shape {value.shape}, which does not lead with "
                    f"(particle,) = {self.log_weights.shape}"
                )


# ------------------------------------------------------------------------------------------- shared


@functools.partial(jax.jit, static_argnums=2)
def shuffled(key: PRNGKeyArray, log_weights: Array, count: int) -> Int[Array, " count"]:
    """Indices of a systematic resampling, shuffled."""
    draw, shuffle = jax.random.split(key)
    return jax.random.permutation(shuffle, systematic(draw, log_weights, count))


def _lookup(address: str, *trees: dict[str, Any]) -> Any:
    known = {}
    for tree in trees:
        flat = flatten(tree)
        if address in flat:
            return flat[address]
        known |= flat
    raise AddressError(unknown(address, known, " in this result"))


def _host(tree: dict[str, Any]) -> dict[str, Any]:
    """Addresses to arrays on the host, in one transfer; random keys stay where they are."""
    flat = flatten(tree)
    plain = {
        a: v for a, v in flat.items() if not jnp.issubdtype(jnp.result_type(v), jax.dtypes.prng_key)
    }
    return {**flat, **jax.device_get(plain)}


def _traced(tree: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def _check_host(result: Any, what: str) -> None:
    if _traced((result.choices, result.derived, result.active)):
        raise WeftError(
            f"{what} is for results outside jit, vmap and grad: return the result and call it there"
        )


def _printed(result: Any, form: Any) -> str:
    """The summary, or what there is to say where it cannot be had or would take long."""
    flat = flatten({**result.choices, **result.derived})
    size = sum(int(np.prod(jnp.shape(v), dtype=float)) for v in flat.values())
    reason = None
    try:
        if size <= _PRINTED:
            return form(result.summary())
        reason = f"{size / 1e6:.0f} million numbers: call .summary() for the table and the verdict"
    except WeftError as error:
        reason = str(error)
    leaves = [
        f"  {a}: {jnp.result_type(v)}{list(jnp.shape(v))}" for a, v in list(flat.items())[:16]
    ]
    leaves += [f"  ... {len(flat) - 16} more"] if len(flat) > 16 else []
    text = "\n".join([type(result).__name__, *leaves, reason])
    return text if form is str else f"<pre>{text}</pre>"


def _save(path: storage.PathLike, result: Any, tree: dict[str, Any], meta: dict[str, Any]) -> None:
    target = result.target
    observed = {} if target is None else export.plain_observed(target)
    meta = {**meta, "target": record.to_meta(target)}
    storage.write(path, storage.kind_of(type(result)), {**tree, "observed": observed}, meta)


def _restore(saved: storage.Saved, target: Any) -> tuple[dict[str, Any], Any]:
    tree = dict(saved.tree)
    observed = tree.pop("observed")
    meta = saved.meta["target"]
    if target is None:
        return tree, record.from_meta(meta, observed)
    record.check_fits(target, meta, repr(saved.path))
    return tree, target
