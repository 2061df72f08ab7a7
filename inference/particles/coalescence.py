r"""The variance of the log evidence from one run, by which earlier particles those of now descend from.

Let $E_i$ be the particle of an earlier step $c$ that particle $i$, of normalised weight $W_i$, descends from, with
$n$ generations of $N$ from there to now, the first included. The estimate of Lee and Whiteley (2018, equation 7),

$$u(c) = 1 - \left(\frac{N}{N-1}\right)^n \Big(1 - \sum_b \Big(\sum_{i: E_i = b} W_i\Big)^2\Big),$$

is, from the first step on, that of the relative variance of the evidence $\hat Z$: under multinomial resampling
$\hat Z^2 (1 - u)$ is unbiased for $Z^2$. An evidence that is nearly log-normal (Berard, Del Moral and Doucet
2014) has $Z^2 = \hat Z^2 e^{-v}$ on average, with $v$ the variance of its logarithm, hence

$$v(c) = -\log(1 - u(c)),$$

the same to first order, and additive: in the limit of many particles it is a sum of terms, one a generation, and
$v(c)$ has those from $c$ on.

It says nothing once all descend from one particle of $c$, which takes some $2N$ generations. But the term of a
generation depends on what its particles will weigh, and a model forgets: some steps later the term is what it
will be (Olsson and Douc 2019 take a fixed lag). So two steps $c < c'$ are kept. When at step $t$ fewer than $\sqrt{N}$
particles of $c$ have descendants, the generations between the two are closed,

$$V \leftarrow V + v_t(c) - v_t(c'), \qquad c \leftarrow c', \qquad c' \leftarrow t,$$

and the variance is $V + v_T(c)$ in the end: $v_T(0)$ as long as nothing was closed.

Why $\sqrt{N}$: after $\lambda$ generations about $2N/\lambda$ particles have descendants (Kingman's coalescent), so
that $c$ lives for $2\sqrt{N}$. $c'$ is put where twice as many have descendants, half way, and a term is
closed $\sqrt{N}$ generations after its own at least. The error of a difference relative to it is of order $N^{-1/4}$,
there are $T/\sqrt{N}$ of them, and that of their sum is $T^{-1/2}$ for any $N$: the lag can grow with $N$ at no cost.

The factor $(N/(N-1))^n$ makes up for pairs of lineages that meet when they draw their ancestors independently. Where
resampling gives each family about the offspring that its weight calls for, as all other schemes but `killing` do,
lineages meet for their weights only, and one generation is counted, the first (`independent`).
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Since(eqx.Module):
    """Which particles of an earlier step those of now descend from.

    Attributes:
        step: the earlier one.
        generations: of independent draws, from there to now, the first included.
        ancestors: of each particle.
    """

    step: Int[Array, ""]
    generations: Int[Array, ""]
    ancestors: Int[Array, " particle"]

    def after(self, chosen: Int[Array, " particle"], independent: bool) -> Since:
        """The same after a resampling."""
        return Since(self.step, self.generations + independent, self.ancestors[chosen])

    def variance(self, log_weights: Float[Array, " particle"], num: int) -> Float[Array, ""]:
        """What the generations from there on contribute to the variance of the log evidence."""
        weights = jax.lax.stop_gradient(jax.nn.softmax(log_weights))
        shares = jnp.zeros(num, weights.dtype).at[self.ancestors].add(weights)
        # Of one family alone there is nothing to be told: a large number, no infinite one.
        together = jnp.minimum(jnp.sum(shares**2), 1 - 1 / num)
        return -jnp.log1p(-together) - self.generations * np.log1p(1 / (num - 1))


class Coalescence(eqx.Module):
    """The ancestors of particles at two earlier steps, and the variance contributed before the first of them.

    Attributes:
        early: the first of the two steps.
        late: the second.
        num_ancestors: how many particles of `early` have descendants.
        closed: the variance of the log evidence from the steps before `early`.
        num: how many particles are resampled: those that share a chain (waste-free) count as one.
        independent: whether they are resampled by independent draws.
    """

    early: Since
    late: Since
    num_ancestors: Int[Array, ""]
    closed: Float[Array, ""]
    num: int = eqx.field(static=True)
    independent: bool = eqx.field(static=True)

    @staticmethod
    def begin(num_particles: int, num: int, independent: bool) -> Coalescence:
        """That of the first particles."""
        zero = jnp.int32(0)
        first = Since(zero, zero + 1, _themselves(num_particles, num))
        return Coalescence(first, first, zero + num, jnp.zeros(()), num, independent)

    def after(self, chosen: Int[Array, " particle"]) -> Coalescence:
        """The same after a resampling."""
        early, late = (x.after(chosen, self.independent) for x in (self.early, self.late))
        return dataclasses.replace(self, early=early, late=late, num_ancestors=self._count(early))

    def at(
        self, t: Int[Array, ""], log_weights: Float[Array, " particle"], due: Bool[Array, ""]
    ) -> Coalescence:
        """The same at step `t`, `due` for a resampling: generations closed of which few particles are left."""
        few = self.num**0.5

        def close() -> Coalescence:
            early, late = (x.variance(log_weights, self.num) for x in (self.early, self.late))
            closed, count = self.closed + (early - late), self._count(self.late)
            return dataclasses.replace(self, early=self.late, num_ancestors=count, closed=closed)

        spent = due & (self.num_ancestors < few)
        found = jax.lax.cond(spent, close, lambda: self)
        anew = spent | (found.num_ancestors >= 2 * few)
        now = Since(t, jnp.int32(1), _themselves(log_weights.shape[0], self.num))
        late = jax.tree.map(lambda new, old: jnp.where(anew, new, old), now, found.late)
        return dataclasses.replace(found, late=late)

    def variance(self, log_weights: Float[Array, " particle"]) -> Float[Array, ""]:
        """Of the log evidence."""
        return self.closed + self.early.variance(log_weights, self.num)

    def _count(self, since: Since) -> Int[Array, ""]:
        # Particles of one chain share their ancestor: the first of each are enough.
        marked = jnp.zeros(self.num, jnp.int32).at[since.ancestors[: self.num]].set(1)
        return jnp.sum(marked, dtype=jnp.int32)


def _themselves(num_particles: int, num: int) -> Int[Array, " particle"]:
    """Each particle as its own ancestor; those of one chain have the same, one of `num`."""
    return jnp.tile(jnp.arange(num), num_particles // num)
