"""Log densities of linear-Gaussian programs as textbooks write them: what single precision may be expected to give.

Series go through the covariance form of Kalman's filter, hierarchies and regressions through least squares by QR. Both
are written for the programs of `linear_gaussian` by hand, and run in either precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from linear_gaussian import DECAY, LOADS, READ, START, STEPS
from programs import array

TEXTBOOK: dict[str, Callable[..., Any]] = {}


def textbook(f: Callable[..., Any]) -> Callable[..., Any]:
    """A log density of `(p, x, data, where)`, under the name of the case."""
    TEXTBOOK[f.__name__] = f
    return f


def kalman(m: Any, P: Any, F: Any, Q: Any, H: Any, R: Any, y: Any, seen: Any = True) -> Any:
    """The prediction error decomposition (Harvey 1989, 3.4), of one number a step."""
    n = len(y)
    spread = lambda v, ndim: jnp.broadcast_to(v, (n, *jnp.shape(v)[jnp.ndim(v) - ndim :]))  # noqa: E731

    def step(carry: Any, now: Any) -> Any:
        m, P, total = carry
        F, Q, h, R, y, seen = now
        m, P = F @ m, F @ P @ F.T + Q
        v, r = h @ P @ h + R, y - h @ m
        gain = P @ h / v
        total -= jnp.where(seen, 0.5 * (jnp.log(2 * jnp.pi * v) + r * r / v), 0.0)
        m = jnp.where(seen, m + gain * r, m)
        P = jnp.where(seen, P - jnp.outer(gain, gain) * v, P)
        return (m, P, total), None

    inputs = spread(F, 2), spread(Q, 2), spread(H, 1), spread(R, 0), y, spread(seen, 0)
    return jax.lax.scan(step, (m, P, jnp.zeros_like(m[0])), inputs)[0][2]


def least_squares(*rows: tuple[Any, Any, Any]) -> Any:
    """The integral over z of normal rows `target ~ N(matrix z, sd)`, of which those of the prior come first."""
    a = jnp.concatenate([m / jnp.broadcast_to(s, t.shape)[:, None] for m, t, s in rows])
    b = jnp.concatenate([t / s for _, t, s in rows])
    log_sd = sum(jnp.sum(jnp.log(jnp.broadcast_to(s, t.shape))) for _, t, s in rows)
    q, r = jnp.linalg.qr(a)
    away = b - a @ jax.scipy.linalg.solve_triangular(r, q.T @ b)
    n, d = a.shape
    log_det = jnp.sum(jnp.log(jnp.abs(jnp.diag(r))))
    return -0.5 * (away @ away + (n - d) * jnp.log(2 * jnp.pi)) - log_sd - log_det


def blocks(*parts: Any) -> jax.Array:
    """Matrices side by side; an integer is that many columns of zeros."""
    n = next(len(p) for p in parts if not isinstance(p, int))
    return jnp.concatenate([jnp.zeros((n, p)) if isinstance(p, int) else p for p in parts], 1)


def one(n: int) -> jax.Array:
    return jnp.ones((n, 1))


def pick(index: Any, n: int) -> jax.Array:
    return jax.nn.one_hot(index, n)


# --- series ---------------------------------------------------------------------------------------


@textbook
def level_of_vague_start(p, x, data, where):
    square = lambda v: jnp.reshape(v * v, (1, 1))  # noqa: E731
    noise = p["noise"] ** 2
    return kalman(
        jnp.zeros(1), square(p["vague"]), jnp.eye(1), square(p["q"]), jnp.ones(1), noise, data["y"]
    )


@textbook
def second_order(p, x, data, where):
    F = jnp.stack([jnp.stack([p["a"], p["b"]]), jnp.array([1.0, 0.0])])
    Q = jnp.diag(jnp.array([1.0, 0.0])) * p["q"] ** 2
    start = jnp.array([1.0, 0.5]), jnp.zeros((2, 2))
    return kalman(*start, F, Q, jnp.array([1.0, 0.0]), p["noise"] ** 2, data["y"])


@textbook
def trend_with_regressors(p, x, data, where):
    P = jnp.diag(jnp.stack([p["vague"] ** 2, 4.0, 100.0, 100.0]))
    F = jnp.eye(4).at[0, 1].set(1.0)
    Q = jnp.diag(jnp.stack([p["q"] ** 2, p["r"] ** 2, 0.0, 0.0]))
    H = blocks(one(STEPS), 1, x["u"])
    return kalman(jnp.zeros(4), P, F, Q, H, p["noise"] ** 2, data["y"])


@textbook
def gaps_left_out(p, x, data, where):
    square = lambda v: jnp.reshape(v * v, (1, 1))  # noqa: E731
    start, F = (jnp.zeros(1), square(p["vague"])), jnp.reshape(p["a"], (1, 1))
    noise = p["noise"] ** 2
    return kalman(*start, F, square(p["q"]), jnp.ones(1), noise, data["y"], where["y"])


@textbook
def outer_coefficient(p, x, data, where):
    """The state is (mu, x); the site after the scan is one more step that moves nothing."""
    after = jnp.arange(STEPS + 1) == STEPS
    F = jnp.where(after[:, None, None], jnp.eye(2), jnp.diag(jnp.stack([1.0, p["a"]])))
    Q = jnp.where(after[:, None, None], 0.0, jnp.diag(jnp.stack([0.0, p["q"] ** 2])))
    H = jnp.where(after[:, None], jnp.array([1.0, -1.0]), jnp.ones(2))
    P = jnp.diag(jnp.stack([p["spread"] ** 2, 0.0]))
    y = jnp.append(data["y"], data["after"])
    return kalman(jnp.zeros(2), P, F, Q, H, p["noise"] ** 2, y)


@textbook
def bank_of_states(p, x, data, where):
    """The state is (new, old): what is observed is their difference."""
    D, zero = jnp.diag(array(DECAY)), jnp.zeros((3, 3))
    F = jnp.block([[D, zero], [jnp.eye(3), zero]])
    Q = jnp.block([[p["q"] ** 2 * array(LOADS @ LOADS.T), zero], [zero, zero]])
    P = jnp.block([[array(START @ START.T), zero], [zero, zero]])
    H = array(np.r_[READ, -READ])
    return kalman(jnp.zeros(6), P, F, Q, H, p["noise"] ** 2, data["y"])


# --- hierarchies and regressions ------------------------------------------------------------------


@textbook
def plate(p, x, data, where):
    """z is (mu, theta)."""
    return least_squares(
        (blocks(one(1), 5), jnp.zeros(1), p["spread"]),
        (blocks(-one(5), jnp.eye(5)), jnp.zeros(5), p["tau"]),
        (blocks(1, jnp.eye(5)), data["y"], p["noise"]),
    )


@textbook
def nested_plates(p, x, data, where):
    """z is (top, mid, low)."""
    region, school = pick(np.arange(6) // 3, 2), pick(np.arange(12) // 2, 6)
    return least_squares(
        (blocks(one(1), 8), jnp.zeros(1), p["spread"]),
        (blocks(-one(2), jnp.eye(2), 6), jnp.zeros(2), p["a"]),
        (blocks(1, -region, jnp.eye(6)), jnp.zeros(6), p["b"]),
        (blocks(1, jnp.eye(2), 6), data["census"], 2 * p["noise"]),
        (blocks(3, school), data["y"].ravel(), p["noise"]),
    )


@textbook
def traced_index(p, x, data, where):
    return least_squares(
        (blocks(one(1), 4), jnp.zeros(1), p["spread"]),
        (blocks(-one(4), jnp.eye(4)), jnp.zeros(4), p["tau"]),
        (blocks(1, pick(x["g"], 4)), data["y"], p["noise"]),
    )


@textbook
def crossed_by_index(p, x, data, where):
    """z is (mu, a, b)."""
    return least_squares(
        (blocks(one(1), 7), jnp.zeros(1), p["spread"]),
        (blocks(1, jnp.eye(4), 3), jnp.zeros(4), p["a"]),
        (blocks(5, jnp.eye(3)), jnp.zeros(3), p["b"]),
        (
            blocks(one(9), pick(x["g"], 4), pick(x["h"], 3) * x["u"][:, None]),
            data["y"],
            p["noise"],
        ),
    )


@textbook
def slopes_by_scale_tril(p, x, data, where):
    """z are the four pairs of intercept and slope in units of the root, whose prior is standard."""
    root = jnp.array([[p["s"], 0.0], [p["r"], p["t"]]])
    each = jnp.stack([jnp.ones(9), x["u"]], 1) @ root
    rows = (pick(x["g"], 4)[:, :, None] * each[:, None, :]).reshape(9, 8)
    return least_squares((jnp.eye(8), jnp.zeros(8), 1.0), (rows, data["y"], p["noise"]))


@textbook
def regression_of_30(p, x, data, where):
    prior = jnp.eye(30), jnp.zeros(30), p["width"]
    return least_squares(prior, (x["x"], data["y"], p["noise"]))
