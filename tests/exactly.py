"""The exact mean of a function with finite choices, by the sum over all of their joint values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.expectations.gradients import marked_draw
from weft.ppl.expectations.marks import mark_p
from weft.ppl.programs.handlers import Evaluate
from weft.ppl.stage.compat import consts_first, needed
from weft.ppl.stage.interpreter import interpret
from weft.ppl.stage.jaxprs import Holds, equations, evaluate
from weft.ppl.stage.wiring import inside, is_call
from weft.ppl.transforms.rewriting import stage_call


def exact_mean(f, *args):
    """E[f(*args)] over choices that all have the strategy ``enum``; every copy counts."""
    code, operands = stage_call(f, args, {})

    def run(*operands):
        handler = Evaluate(None, drawn=marked_draw)
        return interpret(code.jaxpr, list(operands), handler, jax.random.key(0))[0]

    jaxpr, consts = consts_first(jax.make_jaxpr(run)(*operands))
    jaxpr, operands = needed(jaxpr), [*consts, *operands]
    sizes = list(_copies(jaxpr))
    joint = itertools.product(*(range(n) for copies, n in sizes for _ in range(copies)))
    ends = np.cumsum([0, *(copies for copies, _ in sizes)])

    def weighed(joint):
        chosen = iter([joint[i:j] for i, j in itertools.pairwise(ends)])
        log_q = [jnp.zeros(())]
        outs = _evaluate(jaxpr, operands, chosen, log_q)
        return [jnp.exp(sum(log_q)) * o for o in outs]

    terms = jax.vmap(weighed)(jnp.asarray(list(joint), int))
    return jax.tree.unflatten(code.out_tree, [jnp.sum(t, 0) for t in terms])


_holds_draws = Holds(lambda eqn: eqn.primitive is mark_p)


def _copies(jaxpr):
    for eqn, _ in equations(jaxpr):
        if eqn.primitive is mark_p:
            assert eqn.params["kind"] == "enum"
            yield int(np.prod(eqn.invars[0].aval.shape)), len(eqn.params["values"])


def _evaluate(jaxpr, args, chosen, log_q):
    def equation(eqn, ins):
        if not _holds_draws.at(eqn):
            return None
        if eqn.primitive is not mark_p:
            assert is_call(eqn), eqn.primitive
            return evaluate(inside(eqn)[0], ins, equation)
        draw, table = ins
        index = next(chosen)
        values = jnp.asarray(eqn.params["values"], draw.dtype)
        table = table.reshape(index.size, -1)
        log_q.append(jnp.sum(table[jnp.arange(index.size), index]))
        return [values[index].reshape(draw.shape)]

    return evaluate(jaxpr, args, equation)
