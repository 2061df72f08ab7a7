r"""The variance of the log evidence from one run, by which earlier particles those of now descend from.

Let $E_i$ be the particle of an earlier step $c$ that particle $i$, of normalised weight $W_i$, descends from,
with $n$ generations of $N$ from there to now, the first included. The estimate of Lee and Whiteley (2018, equation 7),

$$u(c) = 1 - \left(\frac{N}{N-1}\right)^n \Big(1 - \sum_b \Big(\sum_{i: E_i = b} W_i\Big)^2\Big),$$

is, from the first step on, the relative variance of the evidence: times the square of the evidence it is unbiased under
multinomial resampling at every step. In the limit of many particles that variance is a sum of terms, one a generation,
and $u(c)$ has those of the generations from $c$ on. It says nothing once all descend from one particle of $c$, which takes
some $2N$ generations.

But the term of a generation depends on what its particles will weigh later, and a model forgets: some steps on the
term is what it will be (Olsson and Douc 2019 fix such a lag). So two earlier steps $c < c'$ are kept. When at step $t$
fewer than $\sqrt{N}$ particles of $c$ have descendants, the generations between the two are closed,

$$V \mathrel{+}= u_t(c) - u_t(c'), \qquad c \leftarrow c', \qquad c' \leftarrow t,$$

and the variance of the log evidence is $V + u_T(c)$ in the end. Before anything is closed that is $u_T(0)$ exactly. Since
variances of a sum of many terms add up, it stays right in long series, where the evidence is nearly log-normal with
parameters $-V/2$ and $V$ (Berard, Del Moral and Doucet 2014): its relative variance is then $e^V - 1$.

Why $\sqrt{N}$: after $\lambda$ generations about $2N/\lambda$ particles have descendants (Kingman's coalescent), so that
$c$ lives for $2\sqrt{N}$. $c'$ is put where twice as many have descendants, half way, and a term is closed $\sqrt{N}$
generations after its own at least. The error of a difference $u(c) - u(c')$ relative to it is of order
$N^{-1/4}$, there are $T/\sqrt{N}$ of them, and that of their sum is $T^{-1/2}$ for any $N$: it is no dearer to wait
longer the more particles there are.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Since(eqx.Module):
    """Which particles of an earlier step those of now descend from.

    Attributes:
        step: the earlier one.
        generations: from there to now, the first included: one more than there were resamplings since.
        ancestors: of each particle.
    """

    step: Int[Array, ""]
    generations: Int[Array, ""]
    ancestors: Int[Array, " particle"]

    def after(self, chosen: Int[Array, " particle"]) -> Since:
        """The same after a resampling."""
        return Since(self.step, self.generations + 1, self.ancestors[chosen])

    def variance(self, weights: Float[Array, " particle"], num: int) -> Float[Array, ""]:
        """What the generations from there on contribute to the relative variance of the evidence."""
        shares = jnp.zeros(num, weights.dtype).at[self.ancestors].add(weights)
        growth = self.generations * np.log1p(1 / (num - 1))
        # 1 - e^growth (1 - s), whose two parts nearly cancel.
        return jnp.exp(growth) * jnp.sum(shares**2) - jnp.expm1(growth)


class Coalescence(eqx.Module):
    """The ancestors of particles at two earlier steps, and the variance contributed before the first of them.

    Attributes:
        early: the first of the two steps.
        late: the second.
        num_ancestors: how many particles of `early` have descendants.
        closed: the variance of the log evidence from the steps before `early`.
        num: how many particles are resampled: those that share a chain (waste-free) count as one.
    """

    early: Since
    late: Since
    num_ancestors: Int[Array, ""]
    closed: Float[Array, ""]
    num: int = eqx.field(static=True)

    @staticmethod
    def begin(num_particles: int, num: int) -> Coalescence:
        """That of the first particles."""
        zero = jnp.int32(0)
        first = Since(zero, zero + 1, jnp.arange(num_particles) % num)
        return Coalescence(first, first, zero + num, jnp.zeros(()), num)

    def after(self, chosen: Int[Array, " particle"]) -> Coalescence:
        """The same after a resampling."""
        early, late = self.early.after(chosen), self.late.after(chosen)
        return dataclasses.replace(self, early=early, late=late, num_ancestors=self._count(early))

    def at(self, t: Int[Array, ""], log_weights: Float[Array, " particle"]) -> Coalescence:
        """The same at step `t`: earlier generations closed, if the particles descend from few of theirs."""
        few = self.num**0.5

        def close() -> Coalescence:
            weights = _normalised(log_weights)
            early, late = (x.variance(weights, self.num) for x in (self.early, self.late))
            closed = self.closed + (early - late)
            return Coalescence(self.late, self.late, self._count(self.late), closed, self.num)

        spent = (self.num_ancestors < few) & (self.late.generations > 1)
        found = jax.lax.cond(spent, close, lambda: self)
        begin = spent | (found.num_ancestors >= 2 * few)
        itself = jnp.arange(log_weights.shape[0]) % self.num
        now = Since(t, jnp.int32(1), itself)
        late = jax.tree.map(lambda new, old: jnp.where(begin, new, old), now, found.late)
        return dataclasses.replace(found, late=late)

    def variance(self, log_weights: Float[Array, " particle"]) -> Float[Array, ""]:
        """Of the log evidence."""
        return self.closed + self.early.variance(_normalised(log_weights), self.num)

    def _count(self, since: Since) -> Int[Array, ""]:
        # Particles of one chain share their ancestor: the first of each chain are enough.
        marked = jnp.zeros(self.num, jnp.int32).at[since.ancestors[: self.num]].set(1)
        return jnp.sum(marked)


def _normalised(log_weights: Float[Array, " particle"]) -> Float[Array, " particle"]:
    return jax.lax.stop_gradient(jax.nn.softmax(log_weights))
