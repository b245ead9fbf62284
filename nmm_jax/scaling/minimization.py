"""Many small robust regressions at once: BFGS over starts, tables and resampled rows, in one program.

What is minimised over the fitted parameters of a law is

    huber     sum_i w_i huber(log L(x_i) - log y_i),  huber(r) = r^2/2 where |r| <= delta, else delta (|r| - delta/2)
    squares   sum_i w_i (L(x_i) - y_i)^2 / 2

A law has 2 to 20 parameters, fewer than the pairs that L-BFGS would remember, so the whole inverse Hessian is kept and
the method is L-BFGS with nothing forgotten. Two things make it dependable here. It begins with the inverse of
J' W J, Gauss-Newton's matrix with the weights of iterated least squares: N^-alpha with log N near 20 ties A to alpha,
and in plain coordinates most starts creep along that valley for ever. And it begins anew, with that matrix at the
point reached, until a whole round gains nothing: with delta a tenth of the residuals the objective is nearly a sum of
absolute values, whose curvature one point tells little about.

Every trip of the loop evaluates each problem once, at whatever its line search (weak Wolfe, by bisection: Lewis and
Overton, 2013) asks for; no problem waits for another's. After each round those that are done leave.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nmm_jax.scaling.laws import Law, Logs, float64

DELTA = 1e-3  # Hoffmann et al., arXiv 2203.15556, and all since
OBJECTIVES = ("huber", "squares")

_TRIPS = 60  # of the loop, a round
# Levenberg's, of each round. Far from the minimum an undamped step throws a term out of reach: with none, a third as
# many starts of the laws of mixtures come to the best minimum.
_DAMPING = (1.0, 0.03, 1e-3, 3e-5, *[1e-6] * 8)
_GAIN = 1e-9  # of the objective, relative: what a round must gain for another to follow
_ARMIJO, _WOLFE = 1e-4, 0.9
_ROUNDING = 1e-14  # of the objective, relative
_CHUNK = 1 << 16  # residuals at once: what stays in a core's cache
_LEAST = 64

Report = Callable[[int, int], None]  # problems done, of all


class Minima(NamedTuple):
    """Where each start of each table ended; the objective there is inf if no finite point was found."""

    fitted: Float[np.ndarray, "tables starts p"]
    objective: Float[np.ndarray, "tables starts"]


def minimize(
    law: Law,
    objective: str,
    logs: Logs,
    losses: Float[np.ndarray, "tables n"],
    weights: Float[np.ndarray, "tables n"],
    starts: Float[np.ndarray, "tables starts p"],
    report: Report | None = None,
) -> Minima:
    """A minimum from each start of each table; all tables have the same columns and differ in losses and weights."""
    tables, per_table, p = starts.shape
    of_table = np.repeat(np.arange(tables), per_table)
    x, f = starts.reshape(-1, p).astype(np.float64), np.full(tables * per_table, np.inf)
    size = _LEAST  # of a program, problems; few sizes, since each is compiled
    while size < len(x) and 4 * size * losses.shape[1] <= _CHUNK:
        size *= 4
    going = np.arange(len(x))
    with float64():
        held = tuple(jnp.asarray(a) for a in (losses, weights))
        given = {name: jnp.asarray(column) for name, column in logs.items()}
        for damping in _DAMPING:
            left = []
            for begin in range(0, len(going), size):
                now = going[begin : begin + size]
                fill = np.resize(now, size)
                found = _round(law, objective, given, *held, jnp.asarray(of_table[fill]), jnp.asarray(x[fill]), damping)
                end, value, began = (np.asarray(a)[: len(now)] for a in found)
                x[now], f[now] = end, value
                left.append(now[began - value > _GAIN * np.abs(value)])
                if report:
                    report(len(x) - len(going) + begin + len(now) - sum(map(len, left)), len(x))
            going = np.concatenate(left)
            if not len(going):
                break
    if report:
        report(len(x), len(x))
    f = np.where(np.isfinite(f), f, np.inf)
    return Minima(x.reshape(starts.shape), f.reshape(tables, per_table))


def total(law: Law, objective: str, logs: Logs, fitted: Array, losses: Array, weights: Array) -> Array:
    """The objective of one problem; fitted [p], losses and weights [n]."""
    log_loss = law.log_loss(fitted, logs)
    if objective == "squares":
        return 0.5 * jnp.sum(weights * jnp.square(jnp.exp(log_loss) - losses))
    r = jnp.abs(log_loss - jnp.log(losses))
    return jnp.sum(weights * jnp.where(r <= DELTA, 0.5 * r * r, DELTA * (r - 0.5 * DELTA)))


@functools.partial(jax.jit, static_argnums=0)
def _jacobian(law: Law, fitted: Array, logs: Logs) -> Array:
    return jax.jacfwd(law.log_loss)(fitted, logs)


def jacobian(law: Law, fitted: Float[np.ndarray, "p"], logs: Logs) -> Float[np.ndarray, "n p"]:
    """Of log L."""
    with float64():
        return np.asarray(_jacobian(law, fitted, logs))


def _metric(
    law: Law, objective: str, logs: Logs, fitted: Array, losses: Array, weights: Array, damping: float
) -> Array:
    """The inverse of J' W J, its diagonal grown by `damping`, and by something where J says nothing."""
    slopes = jax.jacfwd(law.log_loss)(fitted, logs)  # [n, p]
    log_loss = law.log_loss(fitted, logs)
    if objective == "squares":
        w = weights * jnp.exp(2 * log_loss)
    else:
        w = weights * jnp.minimum(1.0, DELTA / jnp.maximum(jnp.abs(log_loss - jnp.log(losses)), 1e-12))
    curvature = slopes.T @ (w[:, None] * slopes)
    diagonal = jnp.diag(curvature)
    return jnp.linalg.inv(curvature + jnp.diag(damping * diagonal + 1e-12 * diagonal.sum() + 1e-200))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _round(
    law: Law, objective: str, logs: Logs, losses: Array, weights: Array, table: Array, x: Array, damping: float
) -> Any:
    """(x, objective, objective before) of a chunk of problems, after one round; table [b], x [b, p]."""

    def one(x: Array, losses: Array, weights: Array) -> tuple[Array, Array, Array]:
        evaluate = jax.value_and_grad(lambda fitted: total(law, objective, logs, fitted, losses, weights))
        f, g = evaluate(x)
        inverse = _metric(law, objective, logs, x, losses, weights, damping)
        begun = (x, f, g, inverse, -inverse @ g, _step(1.0, 0.0, jnp.inf), 0, ~jnp.isfinite(f))
        end = jax.lax.while_loop(lambda s: ~s[-1] & (s[-2] < _TRIPS), functools.partial(_trip, evaluate), begun)
        return end[0], end[1], f

    return jax.vmap(one)(x, losses[table], weights[table])


def _step(now: Any, low: Any, high: Any) -> Array:
    """Of a line search: the step to try, the longest known to be too short, the shortest known to be too long."""
    return jnp.stack([jnp.asarray(v, jnp.float64) for v in (now, low, high)])


def _trip(evaluate: Callable[[Array], tuple[Array, Array]], state: tuple) -> tuple:
    x, f, g, inverse, direction, (t, low, high), trips, _ = state
    new_x = x + t * direction
    new_f, new_g = evaluate(new_x)
    slope = g @ direction
    lower = jnp.isfinite(new_f) & (new_f <= f + _ARMIJO * t * slope + _ROUNDING * jnp.abs(f))
    accepted = lower & (new_g @ direction >= _WOLFE * slope)

    s, y = new_x - x, new_g - g
    sy, hy = s @ y, inverse @ y
    update = ((sy + y @ hy) / sy**2) * jnp.outer(s, s) - (jnp.outer(hy, s) + jnp.outer(s, hy)) / sy
    new_inverse = inverse + jnp.where(sy > 0, update, 0.0)
    low, high = jnp.where(lower, t, low), jnp.where(lower, high, t)
    shorter = _step(jnp.where(jnp.isfinite(high), (low + high) / 2, 2 * t), low, high)

    def moved(there: Array, here: Array) -> Array:
        return jnp.where(accepted, there, here)

    x, f, g, inverse = moved(new_x, x), moved(new_f, f), moved(new_g, g), moved(new_inverse, inverse)
    direction = moved(-inverse @ g, direction)
    step = moved(_step(1.0, 0.0, jnp.inf), shorter)
    # -g'direction is what a full step would gain, twice over
    done = (-(g @ direction) <= 4 * _ROUNDING * jnp.abs(f)) | (high - low < 1e-10 * high)
    return x, f, g, inverse, direction, step, trips + 1, done
