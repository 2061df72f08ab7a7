"""A filter as a Feynman-Kac model: a program split at its scan, run one step after another.

A particle is one run of the program up to some step. A step draws its latent choices, from the program or from a
proposal. It weighs them by the density of choices and observations, divided by that of the proposal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from weft.ppl import Model, Program, Target, marginalize
from weft.ppl.exact.density import Whole
from weft.ppl.exact.recovery import posterior
from weft.ppl.programs.evaluation import run_generate, run_inside, run_log_density
from weft.ppl.programs.handlers import Given, expand
from weft.ppl.programs.traces import flat_records
from weft.ppl.scans.splitting import Split
from weft.ppl.stage.addresses import flatten, unflatten
from weft.ppl.stage.errors import AddressError, ModelError, WeftError
from weft.ppl.stage.interpreter import interpret
from weft.ppl.transforms.priors import prior

from .feynman_kac import FeynmanKac
from .staged import draw_path, evidence_around


class Filter(FeynmanKac):
    """The Feynman-Kac model of a filter. `filtering` makes it.

    A particle is a dict. It holds

    - the values that vary with choices before the scan;
    - the carry, and the message: the law of those leaves of the carry that depend on choices that are summed out;
    - the outputs of the scan that are read after it;
    - the choices, by address: those made before the scan, in the last step, and after the scan.

    Attributes:
        parts: the program, split at its scan.
        data: the given values, by address.
        proposal: the proposal of a step, as in `filtering`.
        preference: the lookahead, as in `filtering`.
        latents: the latent choices before the scan, in a step, and after it.
    """

    parts: Split
    data: dict[str, Given]
    proposal: Any
    preference: Any
    latents: tuple[tuple[str, ...], ...] = eqx.field(static=True)

    # --- what smc runs ---

    @property
    def num_steps(self) -> int:
        return self.parts.length + self.closed

    @property
    def closed(self) -> bool:
        # The part after the scan has already been weighed.
        return self.parts.after_code is not None

    # Without a key these stand inside a program that is being staged, and draw as a part of it.

    def init(self, key: PRNGKeyArray | None) -> tuple[Any, Float[Array, ""]]:
        first_key, step_key = _two_keys(key, self.parts.before is not None)
        particle, log_weight = self._begin(first_key)
        particle, more = self._move(step_key, jnp.int32(0), particle)
        return particle, log_weight + more

    def step(
        self, key: PRNGKeyArray | None, t: Int[Array, ""], particle: Any, given: Any = None
    ) -> tuple[Any, Float[Array, ""]]:
        if not self.closed:
            return self._move(key, t, particle, given)
        return jax.lax.cond(
            t < self.parts.length,
            lambda: self._move(key, t, particle, given),
            lambda: self._finish(key, particle),
        )

    def choices(self, particle: Any) -> dict[str, Any]:
        return unflatten({**particle["before"], **particle["now"], **particle["after"]})

    def observation(self, t: int) -> str:
        if t >= self.parts.length:
            return f"{', '.join(self._given(2)) or 'no data'}, after the scan"
        seen = flatten(self._observed(self._index(t)))
        return ", ".join(
            f"{a} = {np.array2string(np.asarray(x), precision=6)}" for a, x in seen.items()
        )

    def paths(self, last: Any, along: Any) -> dict[str, Any]:
        length = self.parts.length
        steps = {a: x[:, :length] for a, x in along["now"].items()}
        if self.parts.reverse:
            steps = {a: x[:, ::-1] for a, x in steps.items()}
        return unflatten({**last["before"], **steps, **last["after"]})

    def lookahead(self, t: Int[Array, ""], particle: Any) -> Float[Array, ""] | None:
        if self.preference is None and self.proposal != "optimal":
            return None
        i = jnp.clip(self._index(t), 0, self.parts.length - 1)
        if self.preference is not None:
            found = self.preference(self._carry(particle), i, self._observed(i))
        else:
            seen = unflatten(self._at(i, drop=True))
            found = run_log_density(self._integrated(particle, i), seen)
        return jnp.where(t < self.parts.length, found, 0.0)  # none after the scan

    # --- what conditional SMC and smoothing ask for ---

    def reference(self, choices: dict[str, Any]) -> dict[str, Any]:
        # The part after the scan has no choices of a path.
        flat = flatten(choices)
        steps = {a: flat[a] for a in self.latents[1]}
        if self.parts.reverse:
            steps = {a: x[::-1] for a, x in steps.items()}
        if self.closed:
            steps = {a: jnp.concatenate([x, x[-1:]]) for a, x in steps.items()}
        return steps

    def replay(
        self, t: Int[Array, ""], particle: Any, now: dict[str, Any]
    ) -> tuple[Any, Float[Array, ""]]:
        key = jax.random.key(0)  # nothing is left to draw
        if particle is not None:
            return self.step(key, t, particle, now)
        particle, log_weight = self._begin(key)
        particle, more = self._move(key, t, particle, now)
        return particle, log_weight + more

    def log_transition(self, t: Int[Array, ""], particle: Any, now: dict[str, Any]) -> Array:
        i = jnp.clip(self._index(t), 0, self.parts.length - 1)
        entries = {**self._at(i), **_entries(now)}
        density = run_log_density(self._program(particle, i), unflatten(entries))
        # After the scan a particle stays where it is.
        same = [jnp.all(particle["now"][a] == x) for a, x in now.items()]
        stays = jnp.where(jnp.all(jnp.stack(same)), 0.0, -jnp.inf)
        return jnp.where(t < self.parts.length, density, stays)

    def taken(self, particle: Any) -> dict[str, Any]:
        return particle["now"]

    def steps_of(self, particles: Any) -> dict[str, Any]:
        steps = {a: x[: self.parts.length] for a, x in particles["now"].items()}
        return {a: x[::-1] for a, x in steps.items()} if self.parts.reverse else steps

    # --- as a part of a program ---

    def draw_posterior(
        self, target: Target, num_particles: int
    ) -> tuple[dict[str, Any], Array, Array]:
        only_the_scan(self, "smc inside a program")
        return draw_path(self, target, num_particles)

    def conditional_evidence(
        self, target: Target, choices: dict[str, Any], num_particles: int
    ) -> Array:
        only_the_scan(self, "smc inside a program")
        return evidence_around(self, choices, num_particles)

    # --- the parts ---

    def _begin(self, key: PRNGKeyArray | None) -> tuple[Any, Float[Array, ""]]:
        """A particle before the first step."""
        parts = self.parts
        particle: dict[str, Any] = {"varying": [], "before": {}, "after": {}, "ys": []}
        log_weight, choices = jnp.zeros(()), {}
        if parts.before is not None:
            trace, log_weight = _run(parts.before, key, unflatten(self._given(0)))
            particle["varying"], choices = trace.value, trace.choices
            particle["before"] = self._latent(choices, 0)
        particle["carry"], entry = self._operands(particle)[1::3]
        particle["message"] = parts.first_message(entry, _seen(choices, self._given(0)))

        any_key = jax.random.key(0)  # shapes only

        def first(particle: Any) -> Any:
            program, given = self._program(particle, 0), unflatten(self._at(0))
            return run_generate(program, any_key, given)[0].value[len(particle["carry"]) :]

        particle["ys"] = [
            jnp.zeros((parts.length, *y.shape), y.dtype) for y in jax.eval_shape(first, particle)
        ]
        if parts.after_code is not None:
            last = jax.eval_shape(lambda p: self._finish(any_key, p)[0]["after"], particle)
            particle["after"] = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), last)
        return particle, log_weight

    def _move(
        self, key: PRNGKeyArray | None, t: Int[Array, ""], particle: Any, given: Any = None
    ) -> tuple[Any, Float[Array, ""]]:
        """A particle one step later, and the logarithm of the potential. Its choices are drawn or `given`."""
        parts, i = self.parts, self._index(t)
        draw_key, rest_key = _two_keys(key, self.proposal is not None)
        program, data = self._program(particle, i), self._at(i)
        chosen, log_q, predictive = given or {}, 0.0, None
        if self.proposal == "optimal":
            summed, seen = self._integrated(particle, i), self._at(i, drop=True)
            predictive = run_log_density(summed, unflatten(seen))
            if given is None and draw_key is None:
                raise ModelError(
                    "filtering inside a program: proposal='optimal' has no density of its own there; take a program as "
                    "proposal, or None"
                )
            if given is None:
                found = posterior(summed, draw_key, seen, "sample")
                chosen = self._with_missing(program, rest_key, {**data, **_entries(found)})
        elif self.proposal is not None:
            proposal = self.proposal(self._carry(particle), i, self._observed(i)).staged()
            self._check_proposed(proposal)
            known = {a: data[a] for a in proposal.latents if a in data}  # they are missing in part
            drawn = given
            if given is None:
                drawn = flatten(_run(proposal, draw_key, unflatten(known))[0].choices)
            drawn = {a: drawn[a] for a in proposal.latents}
            proposal = prior(proposal, known) if known else proposal
            log_q, chosen = proposal.log_density(drawn), {**chosen, **drawn}
            if given is not None:
                log_q = log_q + self._prior(program, data, given, proposal.latents)
        elif given is not None:
            log_q = self._prior(program, data, given, ())
        entries = unflatten({**data, **_entries(chosen)})
        trace, log_weight = _run(program, rest_key, entries)
        log_weight = log_weight - log_q if predictive is None else predictive
        num_carry = len(particle["carry"])
        carry, read = trace.value[:num_carry], trace.value[num_carry:]
        moved = {
            **particle,
            "carry": carry,
            "message": parts.next_message(_seen(trace.choices, data), *self._read(particle, i)),
            "now": self._latent(trace.choices, 1),
            "ys": [b.at[i].set(y) for b, y in zip(particle["ys"], read, strict=True)],
        }
        return moved, log_weight

    def _finish(self, key: PRNGKeyArray | None, particle: Any) -> tuple[Any, Float[Array, ""]]:
        """Run the part after the scan."""
        kept = self._operands(particle)[3]
        program = self.parts.after(kept, particle["carry"], particle["message"], particle["ys"])
        trace, log_weight = _run(program, key, unflatten(self._given(2)))
        return {**particle, "after": self._latent(trace.choices, 2)}, log_weight

    def _program(self, particle: Any, i: Any) -> Program:
        return self.parts.step(*self._read(particle, i))

    def _integrated(self, particle: Any, i: Any) -> Program:
        """The step without its latent choices, if no observation is missing."""
        hidden = [a for a in self.latents[1] if a not in self.data]
        if not hidden:  # summed out already
            return self._program(particle, i)
        f, args = self.parts.silent_step(*self._read(particle, i))
        return Model(marginalize(f, *hidden), self.parts.name)(*args).staged()

    def _with_missing(
        self, program: Program, key: PRNGKeyArray, given: dict[str, Given]
    ) -> dict[str, Any]:
        """The latent choices of a step: those that are given, and what is missing of the observations, drawn.

        All that is summed out is among those given.
        """
        code, args = program.code()
        _, records, _ = interpret(code.jaxpr, args, Whole("value"), key, unflatten(given))
        found = dict(flat_records(records))
        return {a: found[a]["value"] for a in self.latents[1]}

    def _prior(
        self, program: Program, data: dict[str, Given], given: Any, but: Sequence[str]
    ) -> Any:
        """The log density of given choices, counting only those that the model draws."""
        if set(given) <= set(but):
            return 0.0
        entries = _entries(given)
        drawn = prior(program, {**data, **{a: entries[a] for a in but}})
        return run_log_density(drawn, unflatten({**data, **entries}))

    def _read(self, particle: Any, i: Any) -> tuple[list[Any], ...]:
        """What a step reads: consts, carry, message, and its rows of the sequences."""
        consts, _, xs, _, _ = self._operands(particle)
        return consts, particle["carry"], particle["message"], [x[i] for x in xs]

    def _operands(self, particle: Any) -> tuple[list[Any], ...]:
        """Consts, first carry and sequences of the scan, values kept for later, and the rest of the first carry."""
        parts, drawn = self.parts, iter(particle["varying"])
        groups = (parts.consts, parts.carry, parts.xs, parts.kept, parts.entry)
        return tuple([next(drawn) if x is None else jnp.asarray(x) for x in g] for g in groups)

    def _carry(self, particle: Any) -> Any:
        """The carry as the model has it, including values that never change."""
        consts = self._operands(particle)[0]
        return self.parts.carry_of(consts, particle["carry"], particle["message"])

    def _index(self, t: Any) -> Any:
        return self.parts.length - 1 - t if self.parts.reverse else t

    def _given(self, part: int) -> dict[str, Given]:
        return {a: self.data[a] for a in self.parts.addresses[part] if a in self.data}

    def _at(self, i: Any, drop: bool = False) -> dict[str, Given]:
        """The values given at one step."""
        found = jax.tree.map(lambda x: x[i], self._given(1))
        if not drop:
            return found
        return {
            a: g if g.where is None else Given(g.value, g.where, jnp.ones_like(g.where), g.checked)
            for a, g in found.items()
        }

    def _observed(self, i: Any) -> dict[str, Any]:
        """The observations at a step, for proposals. Missing numbers are NaN."""

        def value(given: Given) -> Array:
            x = jnp.asarray(given.value)
            if given.where is None or not jnp.issubdtype(x.dtype, jnp.inexact):
                return x
            return jnp.where(expand(given.where, x), x, jnp.nan)

        return unflatten({a: value(g) for a, g in self._at(i).items()})

    def _latent(self, choices: dict[str, Any], part: int) -> dict[str, Any]:
        flat = flatten(choices)
        return {a: flat[a] for a in self.latents[part]}

    def _check_proposed(self, proposal: Program) -> None:
        unknown = [a for a in proposal.latents if a not in self.latents[1]]
        if unknown:
            raise AddressError(
                f"filtering: the proposal {proposal.name!r} draws {', '.join(map(repr, unknown))}, and the latent "
                f"choices of a step are {', '.join(map(repr, self.latents[1])) or 'none'}"
            )


def require_markov(model: Any, what: str) -> None:
    """Raise ModelError if the weights of a step's ancestors depend on more than the step."""
    if not model.parts.markov:
        raise ModelError(
            f"{what}: the carry of {model.parts.name!r} holds something random of earlier steps, not only the choices "
            "of the last step, and later steps depend on it: take update=None, with more particles"
        )


def only_the_scan(model: Any, what: str) -> None:
    """Raise WeftError if a latent choice stands outside the scan."""
    outside = [*model.latents[0], *model.latents[2]]
    if outside:
        raise WeftError(
            f"{what}: {', '.join(map(repr, outside))} stand outside the scan and differ from particle to particle: "
            "give them, target.given(...), or take particle_gibbs"
        )


def _run(program: Program, key: PRNGKeyArray | None, given: dict[str, Any]) -> Any:
    return run_inside(program, given) if key is None else run_generate(program, key, given)


def _two_keys(key: PRNGKeyArray | None, two: bool) -> Any:
    """A key twice; or two keys made from it, if both are needed."""
    return jax.random.split(key) if two and key is not None else (key, key)


def _seen(choices: dict[str, Any], data: dict[str, Given]) -> dict[str, Any]:
    """Entries of all choices of a run. What is left out of the data where it is missing stays out."""
    left_out = {a: g for a, g in data.items() if g.drop is not None}
    return unflatten({**_entries(flatten(choices)), **left_out})


def _entries(choices: dict[str, Any]) -> dict[str, Given]:
    return {a: Given(x, checked=True) for a, x in choices.items()}
