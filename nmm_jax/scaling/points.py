"""The runs of a fit as points to draw and to read off: measured, predicted, of one size, of one budget."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from nmm_jax.scaling import frontier

_SAME_SIZE = 0.03  # of log N: runs whose sizes differ by less are of one size
_SAME_BUDGET = 0.5  # of log C: what runs of one budget may differ by
_BUDGETS = 5  # that sizes' curves are read off at


@dataclasses.dataclass(frozen=True)
class Points:
    """The runs of a fit, and those that it was checked on; shares by h/<source>."""

    N: Float[np.ndarray, "n"]
    D: Float[np.ndarray, "n"]
    C: Float[np.ndarray, "n"]
    loss: Float[np.ndarray, "n"]
    predicted: Float[np.ndarray, "n"]
    held_out: Bool[np.ndarray, "n"]
    shares: Mapping[str, Float[np.ndarray, "n"]] = dataclasses.field(default_factory=dict)

    def take(self, rows: Int[np.ndarray, "k"]) -> "Points":
        return self._of(lambda column: column[rows])

    def joined(self, other: "Points") -> "Points":
        """These and others, of the same sources."""
        columns = iter((*other._columns, *other.shares.values()))
        return self._of(lambda column: np.concatenate([column, next(columns)]))

    def error(self, rows: Bool[np.ndarray, "n"]) -> float | None:
        """Mean distance of measured and predicted loss, in percent of it; None of no rows."""
        off = np.abs(self.predicted[rows] / self.loss[rows] - 1)
        return 100 * float(off.mean()) if len(off) else None

    @property
    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.N, self.D, self.C, self.loss, self.predicted, self.held_out

    def _of(self, change: Callable[[np.ndarray], np.ndarray]) -> "Points":
        N, D, C, loss, predicted, held_out = map(change, self._columns)
        return Points(N, D, C, loss, predicted, held_out, {name: change(each) for name, each in self.shares.items()})

    def sizes(self) -> list[Int[np.ndarray, "k"]]:
        """Rows of each size, the smallest first, by tokens."""
        order = np.argsort(self.N)
        breaks = np.flatnonzero(np.diff(np.log(self.N[order])) > _SAME_SIZE) + 1
        return [part[np.argsort(self.D[part])] for part in np.split(order, breaks)]

    def parabolas(self) -> list[tuple[Int[np.ndarray, "k"], frontier.Budget]]:
        """The rows of each budget that has a parabola, by rising budget, and it."""
        found = []
        for rows in frontier.budgets(self.C):
            if np.ptp(np.log(self.C[rows])) > _SAME_BUDGET:  # neighbour by neighbour they make a chain, no budget
                continue
            one = self.take(rows)
            found += [(rows, budget) for budget in frontier.isoflop(one.N, one.D, one.C, one.loss)]
        return found

    def at_budgets(self) -> "Points":
        """The losses of each size at a few budgets, on straight lines in logs between its runs; none held out.

        For studies that were not laid out in budgets. There have to be three sizes with runs on both sides of a budget.
        """
        curves = [self._curve(part) for part in self.sizes() if len(np.unique(self.C[part])) > 1]
        starts, ends = (sorted(curve[0, i] for curve in curves) for i in (0, -1))
        found = []
        if len(curves) > 2 and starts[2] < ends[-3]:
            for C in np.exp(np.linspace(starts[2], ends[-3], _BUDGETS + 2)[1:-1]):
                for x, *y in curves:
                    if x[0] <= np.log(C) <= x[-1]:
                        found.append(np.exp([np.log(C), *(np.interp(np.log(C), x, each) for each in y)]))
        C, N, D, loss = np.array(found).reshape(-1, 4).T
        return Points(N, D, C, loss, loss, np.zeros(len(N), bool))

    def _curve(self, rows: Int[np.ndarray, "k"]) -> Float[np.ndarray, "4 m"]:
        """Logs of C, N, D and loss, by rising C; seeds are averaged."""
        logs = np.log([self.C[rows], self.N[rows], self.D[rows], self.loss[rows]])
        _, same = np.unique(logs[0], return_inverse=True)
        return np.stack([np.bincount(same, each) / np.bincount(same) for each in logs])
