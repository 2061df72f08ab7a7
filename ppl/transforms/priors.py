"""The law of what a program draws: the program with its observations in place, and not counted."""

from __future__ import annotations

from collections.abc import Mapping

from weft.ppl.programs.handlers import Given
from weft.ppl.programs.models import Model
from weft.ppl.programs.programs import Program
from weft.ppl.stage.addresses import unflatten

from .transforms import mask


def prior(program: Program, data: Mapping[str, Given]) -> Program:
    r"""The prior of the choices that are left when data are given: the law that ``generate`` draws them from.

    It is the program itself. What is observed keeps its value and has no density: data, what is conditioned inside, and
    factors. Choices that are summed out stay so. With these $z$ and the other choices $x$, the density is

    $$p(x) = \sum_z p(z) \, p(x \mid z).$$

    Args:
        program: the program.
        data: its data by dotted address. What they lack is drawn, or left out with ``missing="drop"``.

    Returns:
        A program with the same sites. A site that is observed in part counts where it is not observed.
    """
    code, args = program.code()
    counts = dict.fromkeys(program.unnormalised_sites, False)
    for address, given in data.items():
        where = given.where if given.drop is None else None
        counts[address] = False if where is None else ~where
    return Model(mask(code, unflatten(counts)), program.name)(*args).staged()
