r"""Single-run variance of the log evidence, from the genealogy: from which earlier particles the present ones descend.

Let $E_i$ be the particle of an earlier step $c$ from which particle $i$, with normalised weight $W_i$, descends. There
are $n$ generations of $N$ particles from $c$ to now, the first included. The estimate of Lee and Whiteley (2018,
equation 7) is

$$u(c) = 1 - \left(\frac{N}{N-1}\right)^n \Big(1 - \sum_b \Big(\sum_{i: E_i = b} W_i\Big)^2\Big).$$

With $c$ the first step, it estimates the relative variance of the evidence $\hat Z$: under multinomial resampling
$\hat Z^2 (1 - u)$ is unbiased for $Z^2$. Now let the evidence be nearly log-normal (Berard, Del Moral and Doucet 2014),
and let $v$ be the variance of its logarithm. Then $Z^2 = \hat Z^2 e^{-v}$ on average, so

$$v(c) = -\log(1 - u(c)).$$

The two are the same to first order. And $v$ is additive: in the limit of many particles it is a sum of terms, one for
each generation, and $v(c)$ has the terms from $c$ on.

The estimate says nothing once all particles descend from a single particle of $c$, which takes about $2N$ generations.
But the term of a generation depends on the later weights of its particles, and a model forgets. Some steps later the
term no longer changes (Olsson and Douc 2019 take a fixed lag). So two steps $c < c'$ are kept. When at step $t$ fewer
than $\sqrt{N}$ particles of $c$ have descendants, the generations between the two steps are closed:

$$V \leftarrow V + v_t(c) - v_t(c'), \qquad c \leftarrow c', \qquad c' \leftarrow t.$$

The final variance is $V + v_T(c)$. As long as nothing was closed, that is $v_T(0)$.

Why $\sqrt{N}$: after $\lambda$ generations about $2N/\lambda$ particles have descendants (Kingman's coalescent). So $c$
lives for $2\sqrt{N}$ generations. $c'$ is placed half way, where twice as many particles have descendants, and a term
is closed at least $\sqrt{N}$ generations after its own. The relative error of a difference is of order $N^{-1/4}$.
There are $T/\sqrt{N}$ differences, and the relative error of their sum is $T^{-1/2}$ for any $N$. So the lag can grow
with $N$ at no cost.

The factor $(N/(N-1))^n$ makes up for pairs of lineages that meet because they draw their ancestors independently. All
schemes but `multinomial` and `killing` give each family about as many offspring as its weight calls for. Lineages then
meet because of their weights only, and one generation is counted, the first (`independent`).
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Since(eqx.Module):
    """From which particles of an earlier step the present ones descend.

    Attributes:
        step: the earlier step.
        generations: the number of generations of independent draws from that step to now, the first included.
        ancestors: the ancestor of each particle.
    """

    step: Int[Array, ""]
    generations: Int[Array, ""]
    ancestors: Int[Array, " particle"]

    def after(self, chosen: Int[Array, " particle"], independent: bool) -> Since:
        """The ancestors after a resampling."""
        return Since(self.step, self.generations + independent, self.ancestors[chosen])

    def variance(self, log_weights: Float[Array, " particle"], num: int) -> Float[Array, ""]:
        """The variance of the log evidence that comes from the generations since that step."""
        weights = jax.lax.stop_gradient(jax.nn.softmax(log_weights))
        shares = jnp.zeros(num, weights.dtype).at[self.ancestors].add(weights)
        # A single family tells nothing: the variance is a large number, but finite.
        together = jnp.minimum(jnp.sum(shares**2), 1 - 1 / num)
        return -jnp.log1p(-together) - self.generations * np.log1p(1 / (num - 1))


class Coalescence(eqx.Module):
    """The ancestors of particles at two earlier steps, and the variance from the generations before the first.

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
        """The genealogy of the first particles."""
        zero = jnp.int32(0)
        first = Since(zero, zero + 1, _themselves(num_particles, num))
        return Coalescence(first, first, zero + num, jnp.zeros(()), num, independent)

    def after(self, chosen: Int[Array, " particle"]) -> Coalescence:
        """The genealogy after a resampling."""
        early, late = (x.after(chosen, self.independent) for x in (self.early, self.late))
        return dataclasses.replace(self, early=early, late=late, num_ancestors=self._count(early))

    def at(
        self, t: Int[Array, ""], log_weights: Float[Array, " particle"], due: Bool[Array, ""]
    ) -> Coalescence:
        """The genealogy at step `t`, which is `due` for a resampling.

        If few ancestors are left, old generations are closed.
        """
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
        """The variance of the log evidence."""
        return self.closed + self.early.variance(log_weights, self.num)

    def _count(self, since: Since) -> Int[Array, ""]:
        # Particles of one chain share their ancestor, so the first of each chain is enough.
        marked = jnp.zeros(self.num, jnp.int32).at[since.ancestors[: self.num]].set(1)
        return jnp.sum(marked, dtype=jnp.int32)


def _themselves(num_particles: int, num: int) -> Int[Array, " particle"]:
    """Each particle as its own ancestor. Particles of one chain share an ancestor, one of `num`."""
    return jnp.tile(jnp.arange(num), num_particles // num)
