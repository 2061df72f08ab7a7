r"""The tree of those particles that have descendants: whole paths in the memory of a few of them.

All particles of all steps are `N T`, but most have no descendants after a while: those that have, with the present
ones, are about $T + c N \log N$ at most (Jacob, Murray and Rubenthaler 2015, theorem 1), since paths soon meet
when traced back. A step appends `N` nodes; when the room is used up, nodes without descendants are dropped.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class AncestralTree(eqx.Module):
    """Particles of all steps, the ones before others, each with the node of its parent.

    Attributes:
        particles: `(node, ...)`.
        parents: `(node,)`: a node before; a particle of the first step is its own.
        leaves: `(particle,)`: nodes of the present particles.
        size: how many nodes are in use; the others are room.
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
        """For how many nodes there is room."""
        return self.parents.shape[-1]

    def grown(self, particles: Any, chosen: Int[Array, " particle"]) -> AncestralTree:
        """The tree one step later; there must be room."""

        def append(buffer: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, self.size, 0)

        parents = append(self.parents, self.leaves[chosen])
        leaves = self.size + jnp.arange(len(self.leaves), dtype=jnp.int32)
        size = self.size + len(self.leaves)
        return AncestralTree(jax.tree.map(append, self.particles, particles), parents, leaves, size)

    def roomier(self, capacity: int) -> AncestralTree:
        """The same with room for so many nodes; fewer than now are cut off."""

        def resize(x: Array) -> Array:
            room = jnp.zeros((max(capacity - len(x), 0), *x.shape[1:]), x.dtype)
            return jnp.concatenate([x[:capacity], room])

        particles, parents = jax.tree.map(resize, (self.particles, self.parents))
        return AncestralTree(particles, parents, self.leaves, self.size)

    def pruned(self) -> AncestralTree:
        """The tree without the nodes from which no present particle descends."""
        marked = jnp.zeros(self.capacity, bool).at[self.leaves].set(True)

        def further(carry: Any) -> Any:
            # With ancestors 2^k generations back, those of the marked up to 2^(k+1) back become marked.
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
        """Nodes from which the present particles descend, in each of so many steps, themselves the last.

        Args:
            num_steps: how many steps there were, with the first particles.
        """

        def back(node: Array, _: None) -> Any:
            return self.parents[node], node

        nodes = jax.lax.scan(back, self.leaves, length=num_steps, reverse=True)[1]
        return nodes.T

    def paths(self, num_steps: int) -> Any:
        """The particles along those lineages, `(particle, step, ...)`."""
        nodes = self.lineages(num_steps)
        return jax.tree.map(lambda x: x[nodes], self.particles)
