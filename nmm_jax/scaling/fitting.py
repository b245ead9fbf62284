"""Fits of a law to runs: the minimum over a grid of starts, refits of resampled runs, intervals, held-out errors."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from nmm_jax.scaling.laws import Law
from nmm_jax.scaling.minimization import Report, minimize

STARTS = 16  # the best ones, that each resampled table is fitted from
LEVEL = 0.9  # of intervals
_AGREE = 1e-6  # relative difference of objectives that are the same minimum

Columns = Mapping[str, Float[np.ndarray, "n"]]
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A law and the runs it was fitted to.

    Attributes:
      how: the objective, of minimization.OBJECTIVES.
      columns, loss: of the runs.
      fitted: the best minimum's parameters, in the law's fitted form.
      starts: all that was begun from; `ends` and `objectives` say where each came to.
    """

    law: Law
    how: str
    columns: Columns
    loss: Float[np.ndarray, "n"]
    fitted: Float[np.ndarray, "p"]
    objective: float
    starts: Float[np.ndarray, "starts p"]
    ends: Float[np.ndarray, "starts p"]
    objectives: Float[np.ndarray, "starts"]

    @property
    def values(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.law.values(self.fitted).items()}

    @property
    def exponents(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.law.exponents(self.values).items()}

    @property
    def agreed(self) -> Bool[np.ndarray, "starts"]:
        """Starts that came to the best minimum."""
        return self.objectives <= self.objective * (1 + _AGREE)

    def predict(self, columns: Columns) -> Float[np.ndarray, "m"]:
        return self.law.predict(self.values, columns)

    @property
    def residuals(self) -> Float[np.ndarray, "n"]:
        """Of log loss: measured minus predicted."""
        return np.log(self.loss) - np.log(self.predict(self.columns))


def fit(
    law: Law,
    columns: Columns,
    losses: Float[np.ndarray, "tables n"],
    how: str = "huber",
    starts: Float[np.ndarray, "starts p"] | None = None,
    report: Report | None = None,
) -> list[Fit]:
    """A fit for each row of losses, all of the same runs; from the law's own starts unless others are given.

    Raises:
      ValueError: fewer runs than parameters and one, or no start came to anything finite.
    """
    losses = np.atleast_2d(np.asarray(losses, np.float64))
    if losses.shape[1] <= len(law.parameters):
        raise ValueError(
            f"{losses.shape[1]} runs are too few for the law {law.name!r}: its {len(law.parameters)} parameters "
            f"({', '.join(law.parameters)}) need {len(law.parameters) + 1} or more"
        )
    logs = law.logs(columns)
    if starts is None:
        means = {name: float(np.mean(column)) for name, column in logs.items()}
        starts = law.starts(means | {"L": float(np.mean(np.log(losses)))})
    every = np.broadcast_to(starts, (len(losses), *starts.shape))
    found = minimize(law, how, logs, losses, np.ones_like(losses), every, report)
    best = found.objective.argmin(axis=1)
    if not np.isfinite(found.objective.min(axis=1)).all():
        raise ValueError(
            f"no start of the law {law.name!r} came to a finite objective; are the columns in their units?"
        )
    return [
        Fit(law, how, columns, loss, ends[i], float(objectives[i]), starts, ends, objectives)
        for loss, ends, objectives, i in zip(losses, found.fitted, found.objective, best, strict=True)
    ]


def bootstrap(
    fits: Sequence[Fit],
    count: int,
    seed: int = 0,
    starts: int = STARTS,
    report: Report | None = None,
) -> Float[np.ndarray, "fits count p"]:
    """Fitted parameters of resampled runs, drawn with replacement; fits of the same runs share the draws.

    Each table is fitted from the estimate and from those starts of the fit that came to the least, `starts` in all. A
    draw with fewer different runs than parameters determines nothing and is drawn again.
    """
    law = fits[0].law
    weights = resampled(len(fits[0].loss), count, len(fits[0].fitted), seed)
    begin = [
        np.concatenate([f.fitted[None], f.starts[np.argsort(f.objectives, kind="stable")[: starts - 1]]]) for f in fits
    ]
    found = minimize(
        law,
        fits[0].how,
        law.logs(fits[0].columns),
        np.repeat([f.loss for f in fits], count, axis=0),
        np.tile(weights.astype(np.float64), (len(fits), 1)),
        np.repeat(begin, count, axis=0),
        report,
    )
    best = found.objective.argmin(axis=1)
    return found.fitted[np.arange(len(best)), best].reshape(len(fits), count, -1)


def resampled(n: int, count: int, least: int = 1, seed: int = 0) -> Int[np.ndarray, "count n"]:
    """How often each of n runs is in each resampled table, of `least` different runs or more."""
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(n, np.full(n, 1 / n), count)
    while (few := np.count_nonzero(weights, axis=1) < least).any():
        weights[few] = draw.multinomial(n, np.full(n, 1 / n), few.sum())
    return weights


def intervals(fitted: Fit, draws: Float[np.ndarray, "count p"], level: float = LEVEL) -> dict[str, Interval]:
    """Percentiles of the draws, of every parameter and of the exponents that follow."""
    values = fitted.law.values(draws)
    return {name: percentiles(value, level) for name, value in (values | fitted.law.exponents(values)).items()}


def percentiles(drawn: Float[np.ndarray, "count"], level: float = LEVEL) -> Interval:
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def errors(loss: Float[np.ndarray, "n"], predicted: Float[np.ndarray, "n"]) -> dict[str, float | None]:
    """As table 10 of arXiv 2504.07951 has them: mse and R^2 of the loss, mean absolute error as a share of it, in %."""
    off = predicted - loss
    spread = np.sum(np.square(loss - loss.mean()))
    return {
        "mse": float(np.mean(np.square(off))),
        "r2": float(1 - np.sum(np.square(off)) / spread) if spread > 0 else None,
        "mae_percent": float(100 * np.mean(np.abs(off) / loss)),
    }
