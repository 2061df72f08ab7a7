r"""The tree of the particles that have descendants: whole paths in the memory of a few of them.

The particles of all steps are `N T`. But after a while most have no descendants, since paths soon meet when they are
traced back. The particles with descendants, together with the present ones, number at most about $T + c N \log N$
(Jacob, Murray and Rubenthaler 2015, theorem 1). A step appends `N` nodes. When the room is used up, nodes without
descendants are dropped.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class AncestralTree(eqx.Module):
    """Particles of all steps as nodes, parents before children. Each node has the index of its parent.

    Attributes:
        particles: `(node, ...)`.
        parents: `(node,)`: the index of an earlier node. A particle of the first step is its own parent.
        leaves: `(particle,)`: the nodes of the present particles.
        size: the number of nodes in use. The others are room.
    """

    particles: Any
    parents: Int[Array, " node"]
    leaves: Int[Array, " particle"]
    size: Int[Array, ""]

    @staticmethod
    def begin(particles: Any, num: int) -> AncestralTree:
        """The tree of the first particles."""
        nodes = jnp.arange(num, dtype=jnp.int32)
        return AncestralTree(particles, nodes, nodes, jnp.int32(num))

    @property
    def capacity(self) -> int:
        """The number of nodes there is room for."""
        return self.parents.shape[-1]

    def grown(self, particles: Any, chosen: Int[Array, " particle"]) -> AncestralTree:
        """The tree one step later. There must be room."""

        def append(buffer: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, self.size, 0)

        parents = append(self.parents, self.leaves[chosen])
        leaves = self.size + jnp.arange(len(self.leaves), dtype=jnp.int32)
        size = self.size + len(self.leaves)
        return AncestralTree(jax.tree.map(append, self.particles, particles), parents, leaves, size)

    def roomier(self, capacity: int) -> AncestralTree:
        """The same tree with room for this many nodes. Nodes beyond that are cut off."""

        def resize(x: Array) -> Array:
            room = jnp.zeros((max(capacity - len(x), 0), *x.shape[1:]), x.dtype)
            return jnp.concatenate([x[:capacity], room])

        particles, parents = jax.tree.map(resize, (self.particles, self.parents))
        return AncestralTree(particles, parents, self.leaves, self.size)

    def pruned(self) -> AncestralTree:
        """The tree without the nodes from which no present particle descends."""
        marked = jnp.zeros(self.capacity, bool).at[self.leaves].set(True)

        def further(carry: Any) -> Any:
            # Given ancestors 2^k generations back, mark the ancestors of marked nodes up to 2^(k+1) generations back.
            marked, back, _ = carry
            then = back[back]
            return marked.at[back].max(marked), then, jnp.any(then != back)

        carry = (marked, self.parents, jnp.ones((), bool))
        marked, _, _ = jax.lax.while_loop(lambda carry: carry[2], further, carry)
        place = jnp.cumsum(marked, dtype=jnp.int32) - 1
        kept = jnp.nonzero(marked, size=self.capacity, fill_value=0)[0]
        particles = jax.tree.map(lambda x: x[kept], self.particles)
        parents = place[self.parents[kept]]
        return AncestralTree(particles, parents, place[self.leaves], place[-1] + 1)

    def lineages(self, num_steps: int) -> Int[Array, "particle step"]:
        """The nodes that the present particles descend from, one for each step. Their own nodes are the last.

        Args:
            num_steps: the number of steps, the first particles included.
        """

        def back(node: Array, _: None) -> Any:
            return self.parents[node], node

        nodes = jax.lax.scan(back, self.leaves, length=num_steps, reverse=True)[1]
        return nodes.T

    def paths(self, num_steps: int) -> Any:
        """The particles along those lineages, `(particle, step, ...)`."""
        nodes = self.lineages(num_steps)
        return jax.tree.map(lambda x: x[nodes], self.particles)
