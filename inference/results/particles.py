"""Weighted `Particles`: a pytree of arrays that lead with the particle, and an estimate of the evidence."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy import special
from weft.inference.resampling import systematic
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import WeftError
from weft.ppl.stage.keys import as_key

from . import export, record, storage
from .draws import Draws
from .result import Result, on_host, traced
from .summary import Summary, summarise_particles
from .weights import khat


@storage.result_type("particles")
class Particles(Result):
    r"""The result of a weighted sampler: particles with weights, and an estimate of the evidence.

    The posterior expectation of $f$ is $\sum_i w_i f(x_i) / \sum_i w_i$, where $\log w_i$ are the `log_weights`.

    Attributes:
        choices: nested dict of the latent choices, arrays (particle, ...).
        derived: nested dict of values that `deterministic` recorded.
        active: a tree like `choices`, of booleans. It is False where a choice does not count. The shape of the booleans
            leads that of the choice.
        log_weights: unnormalised, of shape (particle,).
        log_evidence: the logarithm of an unbiased estimate of the evidence.
        target: the target that was sampled, or a `TargetRecord` if the particles were read from a file without it.
        log_evidence_variance: the variance of `log_evidence`, if the algorithm estimates it. Otherwise it is taken from
            the weights, 1/ESS - 1/N.
        exact: whether the particles are all values of an enumeration, with their probabilities.

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
        """The number of particles."""
        return self.log_weights.shape[-1]

    @property
    def weights(self) -> Float[Array, " particle"]:
        """The normalised weights."""
        return jax.nn.softmax(self.log_weights, axis=-1)

    def ess(self) -> Float[Array, ""]:
        r"""The effective sample size $(\sum_i w_i)^2 / \sum_i w_i^2$ (Kish 1965). It can be traced."""
        return 1 / jnp.sum(jnp.square(self.weights), axis=-1)

    def khat(self) -> float:
        r"""The Pareto $\hat k$ of the weights. Above 0.7 they mislead."""
        self._check("khat()")
        return khat(self.log_weights)

    def resample(self, key: PRNGKeyArray, num_samples: int | None = None) -> Particles:
        """Equally weighted particles, drawn from these by their weights.

        This is systematic resampling (Kitagawa 1996). Among M samples a particle of normalised weight w occurs floor(M
        w) or ceil(M w) times, on average M w times. The samples are shuffled, so any part of them is a fair sample.

        Args:
            key: a random key.
            num_samples: the number of samples; as many as there are particles if left out.

        Returns:
            Particles whose weights are all equal to the evidence.

        Raises:
            WeftError: if no particle has a positive weight. It is checked if weights are concrete.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> weights = jnp.array([1.0, 0.0, 3.0])
            >>> particles = Particles(choices={"z": jnp.arange(3)}, log_weights=jnp.log(weights))
            >>> equal = particles.resample(jax.random.key(0), num_samples=4)
            >>> sorted(equal.choices["z"].tolist()), equal.ess().item()
            ([0, 2, 2, 2], 4.0)
        """
        if not traced(self.log_weights):
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
            all: whether to print every row. By default the table fits a screen.

        Returns:
            A `Summary`. It prints as a table, and gives rows by label and sites by address.

        Raises:
            WeftError: under tracing, or if a further axis leads (a vmap over data sets).
        """
        self._check("summary()")
        return summarise_particles(
            self._title(),
            on_host(self.choices),
            on_host(self.derived),
            on_host(self.active),
            np.asarray(self.log_weights),
            exact=self.exact,
            quantiles=quantiles,
            all=all,
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
        """One chain of equally weighted draws in ArviZ's form. ArviZ has no weights.

        Args:
            seed: the seed of the resampling.
            num_samples: the number of draws; as many as there are particles if left out.
            predictions: the result of `predict` for `self.resample(jax.random.key(seed), num_samples)`.
            log_likelihood: as for `Draws`.
            coords: as for `Draws`.
            batch_size: as for `Draws`.

        Returns:
            The same groups as `Draws.to_arviz`, without sample_stats. The effective sample size, k-hat and log evidence
            of the particles are attributes of the posterior.
        """
        self._check("to_arviz()")
        attributes = {"particle_ess": float(self.ess()), "particle_khat": self.khat()}
        if self.log_evidence is not None:
            attributes["log_evidence"] = float(self.log_evidence)
        if predictions is not None:
            predictions = jax.tree.map(lambda x: jnp.asarray(x)[None], export.recorded(predictions))
        draws = self.resample(jax.random.key(seed), num_samples)._one_chain()
        return export.to_arviz(draws, predictions, log_likelihood, coords, batch_size, attributes)

    def _one_chain(self) -> Draws:
        """The choices as draws of one chain, without the weights."""

        def one(x: Any) -> Any:
            return jnp.asarray(x)[None]

        return Draws(
            choices=jax.tree.map(one, self.choices),
            derived=jax.tree.map(one, self.derived),
            active=jax.tree.map(lambda x: one(x) if jnp.ndim(x) else x, self.active),
            target=self.target,
        )

    def _saved(self) -> dict[str, Any]:
        names = (
            "choices",
            "derived",
            "active",
            "log_weights",
            "log_evidence",
            "log_evidence_variance",
        )
        return {name: getattr(self, name) for name in names}

    def _saved_settings(self) -> dict[str, Any]:
        return {"exact": self.exact}

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
        self._require_host(what)
        if self.log_weights.ndim != 1:
            raise WeftError(
                f"{what} of Particles whose log weights have shape {self.log_weights.shape} instead of (particle,): "
                "they come from a vmap. Take one of them, jax.tree.map(lambda x: x[i], particles)"
            )
        for address, value in self._values().items():
            if value.shape[:1] != self.log_weights.shape:
                raise WeftError(
                    f"{what}: {address!r} has shape {value.shape}, which does not lead with "
                    f"(particle,) = {self.log_weights.shape}"
                )


@functools.partial(jax.jit, static_argnums=2)
def shuffled(key: PRNGKeyArray, log_weights: Array, count: int) -> Int[Array, " count"]:
    """The indices of a systematic resampling, shuffled."""
    draw, shuffle = jax.random.split(key)
    return jax.random.permutation(shuffle, systematic(draw, log_weights, count))
