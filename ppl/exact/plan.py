"""What one marginalisation sums out, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

from weft.ppl.stage.records import recorded

from .families import Family
from .semirings import Semiring, log_sum
from .tables import Limit, Meeting

Address = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Options:
    """How choices are summed out.

    Attributes:
        joint: whether to sum over all joint values of the copies of a choice, whatever they read.
        parallel: whether to compose the steps of chains in a tree.
        max_terms: the largest table allowed.
    """

    joint: bool = False
    parallel: bool = False
    max_terms: int = 1_000_000


@dataclasses.dataclass
class Elimination:
    """How one choice is summed out.

    Attributes:
        distribution: the name of its law.
        num_values: the number of values, or points, of its table.
        copies: the sizes of the axes along which copies are summed one by one.
        family: the family of a continuous choice.
        joint: the number of copies that are summed over all their joint values.
        dimension: how many numbers of a normal choice are integrated jointly; None for any other choice.
        chain: for a choice that a scan hands on: the order, the number of steps, and whether they are composed in a
            tree. The order is zero if no step hands it on.
    """

    distribution: str
    num_values: int
    copies: tuple[int, ...] = ()
    family: Family | None = None
    joint: int = 1
    dimension: int | None = None
    chain: tuple[int, int, bool] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one marginalisation sums out, and how.

    Attributes:
        targets: the addresses of the choices.
        options: the options that were asked for.
        limit: the limit on tables, and an account of them.
        semiring: the kind of sum.
        filtering: whether derivatives are those of filtering (``chains``).
        together: the copies of normal choices that are integrated jointly.
        rules: the rules found, by dotted address.
    """

    targets: frozenset[Address]
    options: Options
    limit: Limit
    semiring: Semiring = log_sum
    filtering: bool = False
    together: frozenset[Meeting] = frozenset()
    rules: dict[str, Elimination] = dataclasses.field(default_factory=dict)

    def holds(self, eqn: Any, prefix: Address) -> bool:
        """Whether an equation is, or holds, a choice that is summed out."""
        return any((*prefix, *address) in self.targets for address in recorded([eqn]))
