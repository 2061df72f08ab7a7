"""The exact mean of a function with finite choices, by the sum over all of their joint values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.expectations.surrogates import mark_p
from weft.ppl.programs.handlers import Evaluate
from weft.ppl.stage.compat import Literal, bind, consts_first, inner_jaxprs, needed, open_jaxpr
from weft.ppl.stage.interpreter import interpret
from weft.ppl.transforms.rewriting import stage_call


def exact_mean(f, *args):
    """E[f(*args)] over choices that all have the strategy ``enum``; every copy counts."""
    code, operands = stage_call(f, args, {})

    def run(*operands):
        handler = Evaluate(None, gradients=True)
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


def _copies(jaxpr):
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive is mark_p:
            assert eqn.params["kind"] == "enum"
            yield int(np.prod(eqn.invars[0].aval.shape)), len(eqn.params["values"])
        else:
            for inner in inner_jaxprs(eqn):
                yield from _copies(inner)


def _evaluate(jaxpr, args, chosen, log_q):
    opened, consts = open_jaxpr(jaxpr)
    env = dict(zip(opened.constvars, consts, strict=True))
    env.update(zip(opened.invars, args, strict=True))
    for eqn in opened.eqns:
        ins = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        if eqn.primitive is mark_p:
            draw, table = ins
            index = next(chosen)
            values = jnp.asarray(eqn.params["values"], draw.dtype)
            table = table.reshape(index.size, -1)
            log_q.append(jnp.sum(table[jnp.arange(index.size), index]))
            outs = [values[index].reshape(draw.shape)]
        elif any(_copies_in(j) for j in inner_jaxprs(eqn)):
            assert eqn.primitive.name in ("jit", "pjit"), eqn.primitive
            outs = _evaluate(inner_jaxprs(eqn)[0], ins, chosen, log_q)
        else:
            outs = bind(eqn, ins)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in opened.outvars]


def _copies_in(jaxpr):
    return any(True for _ in _copies(jaxpr))
