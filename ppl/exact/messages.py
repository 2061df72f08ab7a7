r"""The forward message of a Rao-Blackwellised filter: the law of what is summed out, given all that is kept.

A scan has a chain $x_t$ that is summed out. One step reads $x_{t-1}$ through its carry and hands $x_t$ on. Given the
choices $z_{1:t}$ and the observations $y_{1:t}$ that are kept, the carry has a law of its own, the *message*

$$m_t(c) = p(c_t = c \mid z_{1:t}, y_{1:t}).$$

Later steps need nothing else of the past. Step $t + 1$ draws $c_t$ from $m_t$ as one more choice, which is summed out
with the others. So its density is $p(z_{t+1}, y_{t+1} \mid z_{1:t}, y_{1:t})$, and it hands on $m_{t+1}$. For normal
choices this is the Kalman filter, for finite ones the forward recursion. With other choices drawn by particles it is
the mixture Kalman filter (Chen and Liu 2000; Doucet, de Freitas, Murphy and Russell 2000, "Rao-Blackwellised particle
filtering").

A message is a list of arrays. If the carry is an affine function of normal choices, these are the mean of its leaves,
joined into one vector, and their covariance. If it is a function of finite choices, they are the log
probabilities of the choices' joint values, and each leaf at each of these values.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from weft.ppl.programs.handlers import Given
from weft.ppl.programs.language import sample
from weft.ppl.stage.addresses import unflatten
from weft.ppl.stage.errors import ModelError
from weft.ppl.stage.interpreter import Context
from weft.ppl.stage.structure import site_table

from .chain_laws import HANDED, Carried, hand_on
from .density import untangled
from .factors import Factor, multiply
from .normal_sites import Centred
from .plan import Options, Plan
from .region import Lost, Region
from .scores import Score
from .tables import Entangled, Limit, Meeting, Variable, at_zero, is_table, slopes_of, variables_of


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of a message.

    Attributes:
        leaves: the shape and dtype of each leaf of the carry that the message describes.
        num_values: the number of joint values of finite choices; `None` for normal choices.
    """

    leaves: tuple[tuple[tuple[int, ...], Any], ...]
    num_values: int | None

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes and dtypes of the arrays of a message."""
        real = jnp.result_type(float)
        if self.num_values is None:
            n = sum(math.prod(s) for s, _ in self.leaves)
            return [jax.ShapeDtypeStruct((n,), real), jax.ShapeDtypeStruct((n, n), real)]
        tables = [jax.ShapeDtypeStruct((self.num_values, *s), d) for s, d in self.leaves]
        return [jax.ShapeDtypeStruct((self.num_values,), real), *tables]

    def certain(self, values: Sequence[Any]) -> list[jax.Array]:
        """The message of a carry whose value is known."""
        if self.num_values is None:
            mean = self._join(values)
            return [mean, jnp.zeros((mean.size, mean.size), mean.dtype)]
        tables = [jnp.broadcast_to(x, (self.num_values, *jnp.shape(x))) for x in values]
        return [jnp.zeros(self.num_values), *tables]

    def draw(self, message: Sequence[jax.Array]) -> list[jax.Array]:
        """The carry, as a function of a new choice that is to be summed out."""
        if self.num_values is None:
            mean, covariance = message
            return self._apart(mean + sample(HANDED, Centred(covariance)))
        log_probs, *tables = message
        value = sample(HANDED, dist.Categorical(logits=log_probs))
        return [table[value] for table in tables]

    def laws(self, message: Sequence[jax.Array]) -> list[Any]:
        """The law of each leaf of the carry. For finite choices, the law of the index of their joint value."""
        if self.num_values is not None:
            return [dist.Categorical(logits=message[0])] * len(self.leaves)
        sizes = np.cumsum([0, *(math.prod(s) for s, _ in self.leaves)])
        blocks = [message[1][a:b, a:b] for a, b in itertools.pairwise(sizes)]
        return [
            dist.Normal(m, jnp.sqrt(c[0, 0]))
            if m.ndim == 0
            else dist.MultivariateNormal(
                m, c + jnp.finfo(c.dtype).tiny * jnp.eye(len(c), dtype=c.dtype)
            )
            if m.ndim == 1
            else dist.Normal(m, jnp.sqrt(jnp.diagonal(c)).reshape(m.shape)).to_event(m.ndim)
            for m, c in zip(self._apart(message[0]), blocks, strict=True)
        ]

    def _join(self, leaves: Sequence[Any]) -> jax.Array:
        """The leaves of a carry as one vector. Further axes may follow their own."""
        parts = [
            jnp.reshape(x, (math.prod(s), *jnp.shape(x)[len(s) :]))
            for x, (s, _) in zip(leaves, self.leaves, strict=True)
        ]
        return jnp.concatenate(parts)

    def _apart(self, vector: jax.Array) -> list[jax.Array]:
        parts = np.cumsum([math.prod(s) for s, _ in self.leaves])[:-1]
        each = jnp.split(vector, parts) if parts.size else [vector]  # a whole keeps its structure
        return [
            x.reshape(*s, *x.shape[1:]).astype(d)
            for x, (s, d) in zip(each, self.leaves, strict=True)
        ]


@dataclasses.dataclass
class Walked:
    """Code with choices summed out, walked once with all other choices given."""

    region: Region
    outs: list[Any]

    def depends(self, i: int) -> bool:
        """Whether an output depends on choices that are summed out."""
        return is_table(self.outs[i]) or isinstance(self.outs[i], Lost)

    def hand_on(self, outs: Sequence[int]) -> tuple[Form, list[jax.Array]]:
        """The message of some outputs.

        Raises:
            ModelError: if the law of the outputs given the other choices is neither normal nor finite.
        """
        values = [self.outs[i] for i in outs]
        for x in values:
            if isinstance(x, Lost):
                raise ModelError(x.why)
        values = [x if is_table(x) else jnp.asarray(x) for x in values]
        region, chosen = self.region, variables_of(values)
        names = " and ".join(dict.fromkeys(repr(v.address) for v in chosen if v.address != HANDED))
        normal = {v for v in chosen if v.normal}
        if normal and len(normal) < len(chosen):
            raise _mixed(names)
        if normal:
            return self._normal(values, names)
        region.finish(
            {v for f in region.factors for v in f.variables} - set(chosen) | {*region.priors}
        )
        left = [f for f in region.factors if f.variables]
        alpha = multiply(left) if left else Factor(jnp.zeros(()), ())  # nothing is: one joint value
        if alpha.scale:
            raise _scaled(names)
        if any(v.family is not None for v in chosen):
            raise _mixed(names)
        return _finite(values, chosen, alpha, names)

    def _normal(self, values: list[Any], names: str) -> tuple[Form, list[jax.Array]]:
        region = self.region
        form = Form(tuple((tuple(x.shape), np.dtype(x.dtype)) for x in values), None)
        used = {v for x in values for v in slopes_of(x)}
        region.finish(region.priors.keys() - used)
        if any(f.scale for f in (*region.evidence, *region.priors.values())):
            raise _scaled(names)
        values, carried = hand_on(region, values, set(region.priors), Carried())
        joined = form._join([at_zero(x) for x in values])
        blocks: list[list[Any]] = []
        for i, x in enumerate(values):
            sizes = [math.prod(x.shape), *(math.prod(y.shape) for y in values)]
            zeros = [jnp.zeros((sizes[0], n), joined.dtype) for n in sizes[1:]]
            blocks.append([carried.block(i, j, region.plan.limit, z) for j, z in enumerate(zeros)])
        covariance = jnp.concatenate([jnp.concatenate(row, -1) for row in blocks], -2)
        if is_table(covariance) or any(map(is_table, map(at_zero, values))):
            raise _mixed(names)
        return form, [joined, covariance]


def _mixed(names: str) -> ModelError:
    return ModelError(
        f"filtering: a step hands on {names}, whose law given the past is a mixture, or of a family that no "
        "step keeps; normal choices alone, or finite ones alone, can be handed on: leave one kind in the model"
    )


def _scaled(names: str) -> ModelError:
    return ModelError(f"filtering: {names} is scaled, and so has no law to be handed on")


def _finite(
    values: list[Any], chosen: list[Variable], alpha: Factor, names: str
) -> tuple[Form, list[jax.Array]]:
    if len(chosen) > 1 and any(v.address == HANDED for v in chosen):
        raise ModelError(
            f"filtering: the carry of the scan holds {names} of more than the last step, and a filter hands on the "
            "choices of one step: make the choice the pair of them, or sum out the whole chain and take its exact "
            "density"
        )
    if any(v.plates for v in chosen):
        raise ModelError(
            f"filtering: a step hands on copies of {names} that are summed out one by one, which a filter does not: "
            "marginalize(..., joint=True) sums over their joint values"
        )
    sizes = tuple(v.num_values for v in chosen)
    form = Form(tuple((tuple(x.shape), np.dtype(x.dtype)) for x in values), math.prod(sizes))
    tables = []
    for x in values:
        own = x.axes if is_table(x) else {}
        lead = [v.num_values if v in own else 1 for v in chosen]
        array = x.array if is_table(x) else jnp.asarray(x)
        full = jnp.broadcast_to(jnp.reshape(array, (*lead, *x.shape)), (*sizes, *x.shape))
        tables.append(full.reshape(-1, *x.shape))
    log_probs = alpha.table.reshape(-1)
    return form, [log_probs - jnp.max(log_probs), *tables]


def walked(
    jaxpr: Any,
    args: Sequence[Any],
    given: dict[str, Any],
    addresses: tuple[tuple[str, ...], ...],
    options: Options,
) -> Walked:
    """Walk code with choices summed out.

    Args:
        jaxpr: the code. In it these are choices like all others.
        args: its arguments.
        given: a nested dict with a `Given` for every other choice.
        addresses: the addresses of the choices that are summed out, besides those handed on.
        options: how they are summed out.
    """
    targets = frozenset((*addresses, (HANDED,)))

    def attempt(together: frozenset[Meeting]) -> Walked:
        plan = Plan(targets, options, Limit(options.max_terms), together=together)
        region = Region(plan, Score())
        outs, _ = region.walk(jaxpr, list(args), Context(region, {}, given))
        apart = {v.address for v in variables_of(outs) if v.plates and v.normal}
        if not apart <= together:
            meet = Entangled(
                f"the copies of {' and '.join(map(repr, apart))} are handed on together"
            )
            meet.meeting = frozenset(apart)
            raise meet
        return Walked(region, outs)

    return untangled(attempt)


def blank(jaxpr: Any, addresses: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    """Placeholders at every choice of code that is not summed out, for shapes."""
    gone = {HANDED, *(".".join(a) for a in addresses)}
    return unflatten(
        {
            a: Given(jnp.zeros(s.shape, s.dtype), checked=True)
            for a, s in site_table(jaxpr).items()
            if s.kind == "sample" and a not in gone
        }
    )
