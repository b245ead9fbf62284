"""The least loss that a budget buys, read off the runs themselves: no law of N and D is assumed.

- the envelope of the sizes' curves, and the power law L = K C^c through it (Shukor et al., arXiv 2504.07951);
- a parabola in log N for each budget, whose lowest points are N ~ C^a and D ~ C^b (Hoffmann et al., arXiv 2203.15556,
  approach 2). It leans: with exponents that differ, the lowest point of a parabola is not the law's optimum, and the
  more so the wider the sizes are spread.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_FAR = 50.0  # in log N from the runs' middle: no size at all
_SAME_BUDGET = 0.1  # runs are of one budget when neighbours differ by less than this, relatively


class PowerLaw(NamedTuple):
    """y = coefficient x^exponent, by least squares of the logs."""

    coefficient: float
    exponent: float
    standard_error: float | None  # of the exponent; None from two points

    def __call__(self, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        return self.coefficient * np.power(x, self.exponent)


def power_law(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> PowerLaw:
    """Raises ValueError of fewer than two different x."""
    log_x, log_y = np.log(x), np.log(y)
    if len(np.unique(log_x)) < 2:
        raise ValueError(f"a power law needs two different points, got x = {np.unique(x)}")
    centred = log_x - log_x.mean()
    exponent = centred @ log_y / (centred @ centred)
    intercept = log_y.mean() - exponent * log_x.mean()
    error = None
    if len(x) > 2:
        residuals = log_y - intercept - exponent * log_x
        error = float(np.sqrt(residuals @ residuals / (len(x) - 2) / (centred @ centred)))
    return PowerLaw(float(np.exp(intercept)), float(exponent), error)


def lower_hull(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> Int[np.ndarray, "k"]:
    """Indices of the lower convex hull of points, from the least x to the least y: no point is below, none is worse."""
    kept: list[int] = []
    for i in np.lexsort((y, x)):
        if kept and x[i] == x[kept[-1]]:
            continue
        while len(kept) > 1:
            a, b = kept[-2:]
            if (x[b] - x[a]) * (y[i] - y[a]) > (y[b] - y[a]) * (x[i] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return np.array(kept[: int(np.argmin(y[kept])) + 1])


class Envelope(NamedTuple):
    """Points on the lower hull of all sizes' curves in (log C, log L), by rising C."""

    C: Float[np.ndarray, "k"]
    loss: Float[np.ndarray, "k"]
    N: Float[np.ndarray, "k"]


def envelope(
    N: Float[np.ndarray, "n"], C: Float[np.ndarray, "n"], loss: Float[np.ndarray, "n"], per_curve: int = 50
) -> Envelope:
    """The envelope of runs: each size's losses joined by straight lines in logs, and what is below all of them.

    A size of one run is a point. `per_curve` points are taken of each line.
    """
    parts = []
    for size in np.unique(N):
        here = N == size
        log_c, first = np.unique(np.log(C[here]), return_index=True)
        log_l = np.minimum.accumulate(np.log(loss[here])[first])  # a longer run is never worth less than a shorter one
        at = np.unique(np.concatenate([np.linspace(log_c[0], log_c[-1], per_curve), log_c]))
        parts.append(np.stack([at, np.interp(at, log_c, log_l), np.full(len(at), size)]))
    x, y, n = np.concatenate(parts, axis=1)
    hull = lower_hull(x, y)
    return Envelope(np.exp(x[hull]), np.exp(y[hull]), n[hull])


class Budget(NamedTuple):
    """A parabola of the losses of one budget: loss = least + curvature (log N - log N_best)^2."""

    C: float
    N: float
    D: float
    loss: float
    curvature: float
    runs: int
    inside: bool  # the lowest point lies between the sizes that were run; elsewhere it is an extrapolation


def budgets(C: Float[np.ndarray, "n"], same: float = _SAME_BUDGET) -> list[Int[np.ndarray, "k"]]:
    """Indices of the runs of each budget, by rising budget."""
    if not len(C):
        return []
    order = np.argsort(C, kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(C[order])) > np.log1p(same)) + 1
    return np.split(order, cuts)


def isoflop(
    N: Float[np.ndarray, "n"], D: Float[np.ndarray, "n"], C: Float[np.ndarray, "n"], loss: Float[np.ndarray, "n"]
) -> list[Budget]:
    """The parabola of each budget that has three sizes or more and bends upwards; others are left out."""
    found = []
    for runs in budgets(C):
        x = np.log(N[runs])
        if len(np.unique(x)) < 3:
            continue
        middle = x.mean()
        curvature, slope, level = np.polyfit(x - middle, loss[runs], 2)
        if curvature <= 0:
            continue
        lowest = -slope / (2 * curvature)
        if abs(lowest) > _FAR:  # all but a straight line
            continue
        at, budget = lowest + middle, float(np.exp(np.log(C[runs]).mean()))
        pairs = np.exp(np.log(N[runs] * D[runs]).mean())
        found.append(
            Budget(
                C=budget,
                N=float(np.exp(at)),
                D=float(pairs / np.exp(at)),
                loss=float(level - curvature * lowest**2),
                curvature=float(curvature),
                runs=len(runs),
                inside=bool(x.min() <= at <= x.max()),
            )
        )
    return found


def isoflop_exponents(found: Sequence[Budget]) -> dict[str, PowerLaw]:
    """{"a": of N ~ C^a, "b": of D ~ C^b} through the budgets whose lowest point lies inside; {} of fewer than two."""
    inside = [budget for budget in found if budget.inside]
    if len(inside) < 2:
        return {}
    C, N, D = (np.array([getattr(budget, name) for budget in inside]) for name in ("C", "N", "D"))
    return {"a": power_law(C, N), "b": power_law(C, D)}
