r"""Exact marginalisation: a model without some of its choices, which are summed or integrated out.

``marginalize(model, "z")`` is a model of all other choices, with density $p(x) = \sum_z p(x, z)$. Drawing from it means
drawing from the model. Scoring it walks the model once. On that walk $z$ is a table of its values (``tables``), density
terms are factors over such tables (``factors``), and the factors are summed out (``elimination``). The staged program
shows what depends on $z$, so nothing has to be declared. Copies along a ``vmap`` or a batch axis are summed one by one
(``lanes``). A ``lax.scan`` is a Markov chain (``chains``), and branches are tables as well (``branches``).

This file is the transform. Its equation is scored in ``density``, by the handler in ``region``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from weft.ppl.stage.addresses import covers, dotted, unknown
from weft.ppl.stage.errors import AddressError, ModelError
from weft.ppl.stage.interpreter import Context, walk
from weft.ppl.stage.structure import SiteInfo, site_table
from weft.ppl.transforms.rewriting import Rewrite, Transformed, bind_marginal, stage_call, transform
from weft.ppl.transforms.transforms import name_of

from . import density  # noqa: F401  (the rule of the equation)
from .plan import Address, Options

F = TypeVar("F", bound=Callable[..., Any])


class _Marginalized(Transformed):
    addresses: tuple[str, ...]
    options: Options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        code, operands = stage_call(self.inner, args, kwargs)
        chosen = _chosen(self.addresses, site_table(code.jaxpr), self.inner)
        outs = bind_marginal(
            lambda *xs: walk(code.jaxpr, list(xs), Context(Rewrite(), {}, {}))[0],
            operands,
            chosen,
            self.options,
        )
        return jax.tree.unflatten(code.out_tree, outs)


def _chosen(
    addresses: tuple[str, ...], table: Mapping[str, SiteInfo], model: Any
) -> tuple[Address, ...]:
    name = name_of(model)
    chosen: list[Address] = []
    for address in addresses:
        found = [a for a in table if covers(address, a)]
        if found != [
            address
        ]:  # a wildcard or a scope: take the choices in it that can be summed out
            found = [a for a in found if table[a].values is not None and not table[a].observed]
        if not found:
            raise unknown_choice(address, table, name)
        for a in found:
            info = table[a]
            if info.kind != "sample":
                raise ModelError(
                    f"{a!r} is a {info.kind} site, no choice: there is nothing to sum out"
                )
            if info.observed:
                raise ModelError(
                    f"the choice {a!r} is given already, so there is nothing to sum out"
                )
            chosen.append(tuple(a.split(".")))
    return tuple(dict.fromkeys(chosen))


def unknown_choice(address: str, table: Mapping[str, SiteInfo], name: str) -> Exception:
    choices = [a for a, s in table.items() if s.kind == "sample"]
    return AddressError(unknown(address, choices, f" among the choices of {name!r}"))


def marginalize(
    model: F,
    *addresses: str | tuple[str, ...],
    joint: bool = False,
    parallel: bool = False,
    max_terms: int = 1_000_000,
) -> F:
    r"""The model without some of its choices, which are summed out exactly: $p(x) = \sum_z p(x, z)$.

    The choices $z$ are discrete with finitely many values. Or they are continuous with a conjugate prior: normal, beta,
    gamma, inverse-gamma, Dirichlet, Wishart and inverse-Wishart choices are integrated out in closed form. For normal
    choices that is linear algebra: means must be affine in them, and scales must not depend on them.

    Choices may stand at the top level, under ``vmap`` (each copy is summed by itself), in branches, in nested programs,
    and in a ``lax.scan``. In a scan they are a Markov chain of any order (the forward recursion, Rabiner 1989). Several
    choices are eliminated in a greedy order (Obermeyer et al. 2019).

    Args:
        model: a model or a function with sites.
        *addresses: the choices to sum out. Wildcards work as elsewhere.
        joint: whether to sum over all joint values of the copies of a choice, where copies meet. That is exponential in
            their number. Copies of normal choices that meet are integrated jointly without it.
        parallel: whether to compose the steps of chains in a tree of depth $O(\log T)$, in place of one after the
            other. So it goes for chains of finite choices (Hassan, Särkkä and García-Fernández 2021) and of normal
            ones (Särkkä and García-Fernández 2021, "Temporal parallelization of Bayesian smoothers"), for draws,
            means and gradients too. It takes more operations in all, for accelerators. Chains of other families, and
            recovery of covariances and of what is ``"filtered"``, go step by step. `explain` says which rule is used.
        max_terms: the largest table allowed, in joint values of the choices in it; for a normal choice, the largest
            covariance, in entries.

    Raises:
        ModelError: if a choice cannot be summed out exactly. The message names the equation that stands in the way. The
            error comes when the model is scored, since the values of the other choices are known only then.
        DensityError: for a continuous choice whose distribution has no closed form.
        AddressError: for an unknown choice.

    Examples:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from weft import gen, marginalize, sample
        >>> @gen
        ... def mixture(y_scale):
        ...     mu = sample("mu", dist.Normal(jnp.array([-2.0, 2.0]), 1.0))
        ...     def one(_):
        ...         z = sample("z", dist.Bernoulli(0.3))
        ...         return sample("y", dist.Normal(mu[z], y_scale))
        ...     return jax.vmap(one)(jnp.zeros(3))
        >>> marginalize(mixture, "z")(1.0).latents
        ('mu', 'y')
    """
    if not addresses:
        raise TypeError("marginalize(model, address, ...) takes at least one address")
    if max_terms < 2:
        raise ValueError(f"max_terms must be at least 2, got {max_terms}")
    options = Options(bool(joint), bool(parallel), int(max_terms))
    names = tuple(dotted(a) for a in addresses)
    return transform(model, lambda f: _Marginalized(f, names, options))
