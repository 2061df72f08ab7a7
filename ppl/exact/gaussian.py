r"""Gaussian algebra: what is done with normal choices, on arrays. Copies lead.

*Evidence* on choices $z$ is a function of *rows* $e$, which are affine in $z$:

$$\log f = c + p^\top e - \tfrac12 e^\top \Gamma e.$$

A normal observation gives one row for each of its numbers, in units of its noise, with $\Gamma = I$ and $p = 0$. All
formulas are stable where a prior is vague, where an observation is far from its prior, and where a covariance is
singular: nothing is inverted that can be singular, and no large numbers are subtracted that observations do not hold.

- ``eliminate`` integrates over $u \sim N(0, I)$ where $e$ is affine in $u$; ``integrate`` over $u \sim N(0, Q)$ of
  which only the covariance is known.
- ``compress`` writes many rows as few. ``part`` frees most rows of one choice.
- ``update`` conditions a normal law on evidence (Kalman 1960, "A new approach to linear filtering and prediction
  problems").
- ``compose`` makes one step of two (Särkkä and García-Fernández 2021, "Temporal parallelization of Bayesian
  smoothers").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from .small import (
    cholesky,
    diagonal,
    gram,
    inverse,
    inverse_lower,
    product,
    reflection,
    solve_definite,
    solve_lower,
    sums,
    triangle,
)

Array = jax.Array


def times(matrix: Array, vector: Array) -> Array:
    """The product of a matrix and a vector."""
    return (matrix @ vector[..., None])[..., 0]


def swap(matrix: Array) -> Array:
    return jnp.swapaxes(matrix, -1, -2)


def between(rows: Array, covariance: Array) -> Array:
    """The covariance of ``rows @ x``, from that of ``x``."""
    return rows @ covariance @ swap(rows)


def _identity(matrix: Array) -> Any:
    # a NumPy array is a constant to XLA, which evaluates what is computed from constants
    return np.eye(matrix.shape[-1], dtype=matrix.dtype)


def _symmetric(matrix: Array) -> Array:
    return (matrix + swap(matrix)) / 2


def definite(matrix: Array) -> tuple[Callable[[Array], Array], Array]:
    """How to solve with a positive definite matrix, and the log of its determinant."""
    if matrix.shape[-1] == 1:
        return lambda b: b / matrix, jnp.log(matrix[..., 0, 0])
    factor = cholesky(matrix)
    return lambda b: solve_definite(factor, b), 2 * jnp.sum(jnp.log(diagonal(factor)), -1)


# --- evidence ---------------------------------------------------------------------------------------------------------


class Quadratic(NamedTuple):
    r"""$c + p^\top e - e^\top \Gamma e / 2$ as a function of rows $e$.

    Attributes:
        precision: $\Gamma$; None for the identity.
        linear: $p$; None for zero.
        constant: $c$.
    """

    precision: Any
    linear: Any
    constant: Any

    def weighed(self, rows: Array) -> Array:
        r"""$\Gamma$ times a matrix with as many rows."""
        return rows if self.precision is None else self.precision @ rows

    def force(self, rows: Array) -> Array:
        """The derivative by the rows."""
        pull = rows if self.precision is None else times(self.precision, rows)
        return -pull if self.linear is None else self.linear - pull

    def at(self, rows: Array) -> Array:
        pull = rows if self.precision is None else times(self.precision, rows)
        inner = -pull / 2 if self.linear is None else self.linear - pull / 2
        return self.constant + jnp.sum(inner * rows, -1)

    def full(self, like: Array) -> tuple[Array, Array]:
        """The precision and the linear term as arrays, for rows ``like``."""
        precision, linear = self.precision, self.linear
        if precision is None:
            eye = jnp.eye(like.shape[-1], dtype=like.dtype)
            precision = jnp.broadcast_to(eye, (*like.shape, like.shape[-1]))
        return precision, jnp.zeros_like(like) if linear is None else linear


class Block(NamedTuple):
    """Evidence on several choices $z$ at once: rows $A z + b$ and a function of them.

    Attributes:
        rows: $A$, ``(..., n, D)``.
        offset: $b$, ``(..., n)``.
        evidence: the function of the rows.
    """

    rows: Array
    offset: Array
    evidence: Quadratic


class Copies(NamedTuple):
    """How the blocks of rows belong to copies of the choices.

    Attributes:
        spread: repeats an array with one entry for each copy to each block of rows.
        total: sums an array with one entry for each block over the blocks of each copy.
    """

    spread: Callable[[Array], Array]
    total: Callable[[Array], Array]


def compress(blocks: Sequence[tuple[Block, Copies]]) -> tuple[Array, Array, Quadratic]:
    r"""Many rows as one row for each number of $z$.

    The new rows are $e' = W (z - \hat z)$, where $\hat z$ is near the largest value of the evidence, and $W$ near a
    Cholesky factor of $A^\top \Gamma A$: so $\Gamma'$ is near the identity, and $p'$ near zero. $W$ is upper
    triangular: the first choices enter the first rows only. Any constants $W$ and $\hat z$ would do, so derivatives do
    not go through them. With $r = A \hat z + b$ and $\tilde A = A W^{-1}$

    $$\Gamma' = \tilde A^\top \Gamma \tilde A, \qquad p' = \tilde A^\top (p - \Gamma r), \qquad
      c' = c + p^\top r - \tfrac12 r^\top \Gamma r.$$

    The factor comes from a shifted Cholesky factorisation (Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa 2020,
    "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices").

    Returns:
        $W$ ``(..., D, D)``, $\hat z$ ``(..., D)``, and the evidence on the new rows.
    """
    still = [(jax.lax.stop_gradient(b), copies) for b, copies in blocks]
    way, back = _coordinates(_total(_information(b.rows, b.evidence, c) for b, c in still))
    rows = [product(b.rows, c.spread(back)) for b, c in blocks]
    centre = _total(
        c.total(sums(jax.lax.stop_gradient(a), b.evidence.force(b.offset)))
        for a, (b, c) in zip(rows, still, strict=True)
    )
    away = [
        product(a, c.spread(centre)[..., None])[..., 0] + b.offset
        for a, (b, c) in zip(rows, blocks, strict=True)
    ]
    each = [*zip(rows, away, blocks, strict=True)]
    constant = _total(c.total(b.evidence.at(r)) for _, r, (b, c) in each)
    linear = _total(c.total(sums(a, b.evidence.force(r))) for a, r, (b, c) in each)
    precision = _total(_information(a, b.evidence, c) for a, _, (b, c) in each)
    step = jax.lax.stop_gradient(linear)  # to where nothing linear is left, up to rounding
    constant = constant + jnp.sum((linear - times(precision, step) / 2) * step, -1)
    linear = linear - times(precision, step)
    return way, times(back, centre + step), Quadratic(precision, linear, constant)


def _total(terms: Iterable[Array]) -> Array:
    first, *rest = terms
    return sum(rest, first)


def _information(rows: Array, form: Quadratic, copies: Copies) -> Array:
    r"""$A^\top \Gamma A$, summed over the blocks."""
    if form.precision is None:
        return copies.total(gram(rows))
    return copies.total(gram(rows, form.weighed(rows)))


def _coordinates(information: Array) -> tuple[Array, Array]:
    """An upper triangular factor of a positive semidefinite matrix, shifted to be definite, and its inverse."""
    d = information.shape[-1]
    size = diagonal(information)
    shift = jnp.where(size > 0, 8 * d * jnp.finfo(size.dtype).eps * size, 1)
    shifted = information + shift[..., None]
    factor = cholesky(jnp.where(_identity(information) > 0, shifted, information))
    return swap(factor), swap(inverse_lower(factor))


class Parts(NamedTuple):
    """Rows on choices $(v, w)$ in two parts, whose evidence adds up to that of the rows (``part``).

    Attributes:
        sums: a few rows for each copy of $v$.
        free: as many rows as there were. They do not depend on $v$, but their derivative does.
        slopes: their slopes by $v$: zero, with a derivative.
    """

    sums: Block
    free: Block
    slopes: Array


def part(block: Block, d: int, copies: Copies) -> Parts:
    r"""What a mean, and deviations from it, are to the data of a group: to rows on choices $(v, w)$.

    For rows $x = S v + e$, where $e$ is affine in $w$, let $C$ be near an orthogonal basis of what $S$ reaches,
    $P = I - C C^\top$ and $E = I - C^\top C$. Then for any constant $C$

    $$|x|^2 = m^\top (I + E) (I + E^2) m + |P^2 x|^2, \qquad m = C^\top x.$$

    $P^2 S$ is zero up to rounding, and is taken to be zero, but its derivative is not. A second $P$ frees the rows of
    $v$ up to rounding (Giraud, Langou and Rozložník 2005, "The loss of orthogonality in the Gram-Schmidt
    orthogonalization process").

    Args:
        block: the rows. Their precision is the identity, and nothing is linear.
        d: how many numbers $v$ has.
        copies: which rows belong to a copy of $v$.
    """
    own, rest = block.rows[..., :d], block.rows[..., d:]
    rest = jnp.concatenate([block.offset[..., None], rest], -1)
    still = jax.lax.stop_gradient(own)
    _, back = _coordinates(copies.total(gram(still)))
    basis = product(still, copies.spread(back))

    def along(x: Array) -> Array:
        return copies.total(swap(basis) @ x)

    def free(x: Array) -> Array:
        for _ in range(2):
            x = x - product(basis, copies.spread(along(x)))
        return x

    left, slopes = free(rest), free(own)
    mean, lack = along(rest), _identity(still) - copies.total(gram(basis))
    eye = _identity(lack)
    form = Quadratic((eye + lack) @ (eye + lack @ lack), None, jnp.zeros_like(mean[..., 0, 0]))
    return Parts(
        Block(jnp.concatenate([along(own), mean[..., 1:]], -1), mean[..., 0], form),
        Block(left[..., 1:], left[..., 0], block.evidence),
        slopes - jax.lax.stop_gradient(slopes),
    )


def bend(
    rows: Array, slopes: Array, mean: Array, covariance: Array, copies: Copies
) -> tuple[Array, Array]:
    r"""Rows $r + R v$ once $v \sim N(\hat v, \Sigma)$ is integrated out, to second order in $R$, which is zero.

    $$\log E\, e^{-|r + R v|^2 / 2} = -\tfrac12 |r + R \hat v - \tfrac12 R \Sigma R^\top r|^2
      - \tfrac12 \operatorname{tr}(R \Sigma R^\top) + O(R^3).$$

    Args:
        rows: $r$, of which the last axis has the columns of an affine function.
        slopes: $R$.
        mean: $\hat v$ for each copy, with the same columns.
        covariance: $\Sigma$ for each copy.
        copies: which rows belong to a copy.

    Returns:
        The rows, and what is added to the constant of each block.
    """
    turned = covariance @ copies.total(swap(slopes) @ rows)
    loss = jnp.sum(slopes @ copies.spread(covariance) * slopes, (-1, -2)) / 2
    return rows + slopes @ copies.spread(mean - turned / 2), -loss


class Eliminated(NamedTuple):
    r"""A choice integrated out.

    Attributes:
        turn: the rows that are left are ``turn @ rows``.
        evidence: the evidence on them.
        log_det: the logarithm of the determinant that the integral has.
        gain, shift: given other choices, the mean of the choice is ``gain @ rows + shift``.
        covariance: its covariance, given other choices.
    """

    turn: Array
    evidence: Quadratic
    log_det: Array
    gain: Array
    shift: Array
    covariance: Array


def eliminate(evidence: Quadratic, rows: Array) -> Eliminated:
    r"""Integrate over $u$, of which rows $A u + e$ are a function. The last rows are its prior: its noise, $u + u_0$.

    An orthogonal matrix $H$ takes $A$ to $(R, 0)$: so the last rows of $H e$ are free of $u$, and the integral is
    $|R|^{-1}$ times the evidence on them (Bierman 1977, "Factorization methods for discrete sequential estimation").
    $H$ is a constant here: its derivative would be singular where $A$ is. So $H A = (R, \Delta)$, where $\Delta$ is
    zero up to rounding, but its derivative is not. The rounding counts where the rows differ much in size. With
    $\Delta' = \Delta R^{-1}$ the rows that are left are $e' = (-\Delta', I) H e$, and with $\Gamma$ and $p$ turned by
    $H$

    $$M = \Gamma_{11} + \Gamma_{12} \Delta' + \Delta'^\top \Gamma_{21} + \Delta'^\top \Gamma_{22} \Delta', \quad
      G = \Gamma_{21} + \Gamma_{22} \Delta', \quad h = p_1 + \Delta'^\top p_2,$$
    $$\Gamma' = \Gamma_{22} - G M^{-1} G^\top, \quad p' = p_2 - G M^{-1} h, \quad
      c' = c + \tfrac12 h^\top M^{-1} h - \tfrac12 \log |M| - \log |R|.$$

    Args:
        evidence: the evidence on the rows, those of the prior included.
        rows: $A$, ``(..., n, d)``.
    """
    d = rows.shape[-1]
    turn = reflection(jax.lax.stop_gradient(rows))
    full = turn @ rows
    top, low = full[..., :d, :], full[..., d:, :]
    back_top, log_det = inverse(top)
    away = low @ back_top
    onto = turn[..., d:, :] - away @ turn[..., :d, :]
    if evidence.precision is None and evidence.linear is None:
        own = _identity(top) + swap(away) @ away
        solve, more = definite(own)
        back, moved = solve(swap(away)), jnp.zeros_like(top[..., 0])
        evidence = Quadratic(_identity(away @ back) - away @ back, None, evidence.constant)
    else:
        precision, linear = evidence.full(rows[..., 0])
        precision = turn @ precision @ swap(turn)
        linear = times(turn, linear)
        cross, corner = precision[..., d:, :d], precision[..., d:, d:]
        side = cross + corner @ away
        solve, more = definite(precision[..., :d, :d] + swap(cross) @ away + swap(away) @ side)
        force = linear[..., :d] + times(swap(away), linear[..., d:])
        moved, back = solve(force[..., None])[..., 0], solve(swap(side))
        constant = evidence.constant + jnp.sum(force * moved, -1) / 2
        precision = _symmetric(corner - side @ back)
        evidence = Quadratic(precision, linear[..., d:] - times(side, moved), constant)
    gain = -back_top @ (turn[..., :d, :] + back @ onto)
    covariance = back_top @ solve(swap(back_top))
    return Eliminated(onto, evidence, 2 * log_det + more, gain, times(back_top, moved), covariance)


def settle(evidence: Quadratic, rows: Array, offset: Array) -> Eliminated:
    r"""Integrate over $u \sim N(0, I)$ if evidence on rows $A u + b$ is all there is. No rows are left, and a constant.

    It takes fewer operations than ``eliminate``. With $V = A A^\top$, a constant $C$ near a root of $(I + V)^{-1}$,
    $L L^\top = C C^\top + C A (C A)^\top$ (which is near the identity), $K = L^{-1} C$ and $J = K^\top K$

    $$J = (I + V)^{-1}, \quad \Gamma = I + E, \quad F = I + E (I - J), \quad z = K^\top (K b), \quad X = F^{-1} E,$$
    $$c' = c + p^\top F^{-\top} z - \tfrac12 |K b|^2 - \tfrac12 z^\top X z + \tfrac12 p^\top (I - J) F^{-1} p
      - \tfrac12 \log |F| - \log |L| + \log |C|.$$

    All matrices but $A$ are bounded by one where $\Gamma$ is, and $K b$ is as small as what is integrated out explains:
    no terms cancel, nor do their derivatives.

    Args:
        evidence: the evidence on the rows.
        rows: $A$, ``(..., n, d)``.
        offset: $b$, ``(..., n)``.
    """
    eye, still = _identity(rows @ swap(rows)), jax.lax.stop_gradient(rows)
    full = jnp.broadcast_to(eye, (*rows.shape[:-1], rows.shape[-2]))
    factor = triangle(jnp.concatenate([swap(still), full], -2))
    way, across = inverse_lower(factor), solve_lower(factor, rows)
    lower = cholesky(gram(swap(way)) + gram(swap(across)))
    kept = solve_lower(lower, way)
    sizes = jnp.log(jnp.abs(diagonal(factor))) + jnp.log(diagonal(lower))
    small = times(kept, offset)
    log_det, away = 2 * jnp.sum(sizes, -1), times(swap(kept), small)
    constant = evidence.constant - jnp.sum(small**2, -1) / 2
    inner = gram(kept)
    if evidence.precision is None and evidence.linear is None:
        back, force = full, -away
        turned = inner
    else:
        precision, linear = evidence.full(offset)
        rest = precision - eye
        back, more = inverse(eye + rest @ (eye - inner))
        pull, bent = times(back, linear), times(back, times(rest, away))
        log_det = log_det + more
        constant = constant + jnp.sum(pull * times(eye - inner, linear), -1) / 2
        constant = constant + jnp.sum(away * (pull - bent / 2), -1)
        force = times(inner, pull - bent) - away
        turned = inner @ back @ precision
    gain = swap(rows) @ turned
    noise = swap(rows) @ inner @ back
    less = _identity(swap(rows) @ rows) - gain @ rows
    covariance = gram(swap(less)) + between(noise, evidence.full(offset)[0])
    nothing = jnp.zeros((*offset.shape[:-1], 0), offset.dtype)
    return Eliminated(
        nothing[..., None, :],
        Quadratic(None, None, constant),
        log_det,
        nothing[..., None, :],
        times(swap(rows), force),
        covariance,
    )


def integrate(evidence: Quadratic, rows: Array, covariance: Array) -> Eliminated:
    r"""Integrate over $u \sim N(0, Q)$ of which only the covariance is known, for rows $e + A u$.

    The gain then acts on the rows at $u = 0$, and gives the mean of $u$. With $V = A Q A^\top$ and $N = (I + \Gamma
    V)^{-1}$ the result is evidence on $e$ itself:

    $$\Gamma' = N \Gamma, \qquad p' = N p, \qquad c' = c + \tfrac12 p^\top V N p - \tfrac12 \log |I + \Gamma V|.$$

    Args:
        evidence: the evidence, of ``n`` rows.
        rows: $A$, ``(..., n, d)``.
        covariance: $Q$, ``(..., d, d)``.
    """
    found = update(evidence, between(rows, covariance))
    form, cross = found.evidence, rows @ covariance
    if form.precision is None:  # the rows were turned
        turn = found.transform(
            jnp.broadcast_to(_identity(rows @ swap(rows)), (*rows.shape[:-1], rows.shape[-2]))
        )
    else:
        turn = jnp.broadcast_to(_identity(form.precision), form.precision.shape)
    gain = swap(found.weigh(cross))
    shift = jnp.zeros_like(covariance[..., 0])
    if form.linear is not None:
        shift = times(swap(cross), form.linear)
    left = _symmetric(covariance - gain @ cross)
    return Eliminated(turn, form, found.log_det, -gain, shift, left)


# --- a law and evidence on it -----------------------------------------------------------------------------------------


class Update(NamedTuple):
    r"""What evidence on rows $e + A u$ with $u \sim N(0, C)$ does to a law, given $V = A C A^\top$.

    For a value $x$ with $K = A C_x$, its covariances with the rows, let ``weighed`` be $\Gamma' K$ and ``noise`` be
    $Z$. Then the mean of $x$ moves by $K^\top (p' - \Gamma' e)$, and its covariance becomes $D C D^\top + Z^\top
    \Gamma Z$ with $D = F - K^\top \Gamma' A$, if $x = F u$ (Joseph's form: no cancellation).

    Attributes:
        evidence: the evidence that is left, on the rows ``transform(e)``.
        log_det: the logarithm of the determinant that the integral has.
    """

    evidence: Quadratic
    transform: Callable[[Array], Array]
    weigh: Callable[[Array], Array]
    noise: Callable[[Array], Array]
    log_det: Array


def update(evidence: Quadratic, spread: Array) -> Update:
    r"""Condition a law on evidence. For observations alone ($\Gamma = I$) this is the Kalman filter (Kalman 1960)."""
    if evidence.precision is None and evidence.linear is None:
        total = _identity(spread) + spread
        if total.shape[-1] == 1:
            root, log_det = jnp.sqrt(total), jnp.log(total[..., 0, 0])
            solve_one = lambda b: b / total  # noqa: E731
            return Update(evidence, lambda b: b / root, solve_one, solve_one, log_det)
        factor = cholesky(total)
        log_det = 2 * jnp.sum(jnp.log(diagonal(factor)), -1)

        def transform(b: Array) -> Array:
            return solve_lower(factor, b)

        def solve(b: Array) -> Array:
            return solve_definite(factor, b)

        return Update(evidence, transform, solve, solve, log_det)
    precision, linear = evidence.full(spread[..., 0])
    back, log_det = inverse(_identity(spread) + precision @ spread)
    new = times(back, linear)
    constant = evidence.constant + jnp.sum(linear * times(spread, new), -1) / 2
    kept = _symmetric(back @ precision)
    left = Quadratic(kept, new, constant)
    return Update(left, lambda b: b, lambda b: kept @ b, lambda b: swap(back) @ b, log_det)


# --- steps of a chain -------------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    r"""How steps of a chain take the state $x$ before them to the state $x'$ after them, and the evidence in them.

    With other choices $w$ and $z = (x, w)$, it is evidence on $z$ times the density of $x' \sim N(A z + b, C)$.

    Attributes:
        slope: $A$, ``(..., d, D)``.
        offset: $b$, ``(..., d)``.
        covariance: $C$, ``(..., d, d)``.
        evidence: the evidence on $z$; None if there is none.
        probe: weights ``(..., D)`` and a constant ``(...)``: a linear function of $z$ that is zero, and of which only
            the first derivative counts. None if there is none.
    """

    slope: Array
    offset: Array
    covariance: Array
    evidence: Block | None
    probe: tuple[Array, Array] | None


def compose(first: Transition, second: Transition, integral: bool = True) -> Transition:
    r"""Two transitions, one after the other, as one. The state between them is integrated out.

    The first one's state has a normal law given $z$. The second one's evidence updates this law, as in a Kalman filter.
    What the evidence says of $z$ is compressed with the evidence of the first transition (Särkkä and García-Fernández
    2021, eqs. 13 to 15, with evidence as rows in place of $\eta$ and $J$). The operation is associative.

    Args:
        first: may be the law of the state before a chain, whose mean depends on $w$ only. Then the evidence that is
            left comes with as many rows as that of the second.
        second: has the same $w$.
        integral: whether the state is integrated out. Otherwise the largest value is taken.
    """
    d, num = first.offset.shape[-1], first.slope.shape[-1]
    before = num - (second.slope.shape[-1] - d)

    def through(matrix: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """Rows on the state between and on $w$, as rows on $z$ and an offset."""
        own, rest = matrix[..., :d], matrix[..., d:]
        pad = [(0, 0)] * (rest.ndim - 1) + [(before, 0)]
        return own @ state[0] + jnp.pad(rest, pad), times(own, state[1])

    slope, mean, covariance = first.slope, first.offset, first.covariance
    evidence, probe = first.evidence, first.probe
    if second.evidence is not None:
        inner = second.evidence.rows[..., :d]
        rows, offset = through(second.evidence.rows, (slope, mean))
        offset, form = offset + second.evidence.offset, second.evidence.evidence
        form = Quadratic(*form.full(offset), form.constant)
        cross = inner @ covariance
        found = update(form, cross @ swap(inner))
        left, gain, noise = found.evidence, swap(found.weigh(cross)), swap(found.noise(cross))
        slope = slope - gain @ rows
        mean = mean - times(gain, offset) + times(swap(cross), left.linear)
        covariance = between(_identity(covariance) - gain @ inner, covariance)
        covariance = _symmetric(covariance + between(noise, form.precision))
        if integral:
            left = left._replace(constant=left.constant - found.log_det / 2)
        block = Block(rows, offset, left)
        evidence = block if evidence is None else _together(evidence, block)
    if second.probe is not None:
        weights, constant = second.probe
        row, more = through(weights[..., None, :], (slope, mean))
        mean = mean + times(covariance, weights[..., :d])
        weights, constant = row[..., 0, :], constant + more[..., 0]
        probe = (weights, constant) if probe is None else (probe[0] + weights, probe[1] + constant)
    slope, mean = through(second.slope, (slope, mean))
    covariance = between(second.slope[..., :d], covariance) + second.covariance
    return Transition(slope, mean + second.offset, covariance, evidence, probe)


def _together(first: Block, second: Block) -> Block:
    """The evidence of two blocks, in as many rows as there are numbers."""
    alone = Copies(lambda x: x, lambda x: x)
    way, centre, found = compress([(first, alone), (second, alone)])
    return Block(way, -times(way, centre), found)


# --- covariances of values -------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """One of two values of which a covariance is taken.

    Attributes:
        own: its slopes $S$ by each choice; None where it has none.
        reads: the slopes $A$ of the rows.
        gain, noise: $K$ and $Z$; None if the evidence does not move it.
    """

    own: Sequence[Any]
    reads: Sequence[Any]
    gain: Any
    noise: Any

    def left(self) -> list[Any]:
        """The slopes of the value less its estimate, $D = S - K A$."""
        away = [None if a is None or self.gain is None else -(self.gain @ a) for a in self.reads]
        return [_sum(both) for both in zip(self.own, away, strict=True)]


@jax.custom_jvp
def as_joseph(covariance: Array, parts: Any) -> Array:
    r"""A covariance of two values given evidence, that is known, with the derivative of Joseph's form.

    For the covariance $C$ of choices that is $D_i C D_j^\top + Z_i \Gamma Z_j^\top$. It takes longer to compute than
    forms in which $D$ is not needed, but the derivatives of these cancel where a prior is vague.

    Args:
        covariance: the covariance.
        parts: $C$ by pairs of choices, the two values, and $\Gamma$.
    """
    return covariance


def _joseph(joint: Any, one: Side, other: Side, precision: Any) -> Any:
    starts, ends = one.left(), other.left()
    found = []
    for d, row in zip(starts, joint, strict=True):
        along = _sum(
            [
                None if c is None or e is None else c @ swap(e)
                for c, e in zip(row, ends, strict=True)
            ]
        )
        found.append(None if d is None or along is None else d @ along)
    if one.noise is not None and other.noise is not None:
        back = swap(other.noise)
        found.append(one.noise @ (back if precision is None else precision @ back))
    return _sum(found)


def sides(root: Array, rows: Array) -> tuple[Array, Array, Array]:
    """A root of a covariance in two parts, and the rows times the first: times the second they are zero."""
    seen = jax.lax.stop_gradient(swap(rows @ root))
    size = jnp.max(jnp.abs(seen), -2, keepdims=True)
    turned = root @ swap(reflection(seen / jnp.where(size > 0, size, 1)))
    read, unread = jnp.split(turned, [rows.shape[-2]], -1)
    return read, unread, rows @ read


def _sum(terms: Sequence[Any]) -> Any:
    there = [t for t in terms if t is not None]
    return _total(there) if there else None


@functools.partial(as_joseph.defjvp, symbolic_zeros=True)
def _derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
    covariance, parts = primals
    is_zero = lambda t: isinstance(t, SymbolicZero)  # noqa: E731
    leaves, treedef = jax.tree.flatten(parts)
    moves = jax.tree.leaves(tangents[1], is_leaf=is_zero)
    moving = [i for i, t in enumerate(moves) if not is_zero(t)]

    def form(*some: Array) -> Any:
        full = dict(enumerate(leaves)) | dict(zip(moving, some, strict=True))
        return _joseph(*jax.tree.unflatten(treedef, [*full.values()]))

    if not moving:
        return covariance, jnp.zeros_like(covariance)
    at, along = ([x[i] for i in moving] for x in (leaves, moves))
    move = jax.jvp(form, at, along)[1].astype(covariance.dtype)
    return covariance, jnp.broadcast_to(move, covariance.shape)
