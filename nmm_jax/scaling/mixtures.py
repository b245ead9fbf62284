"""The mixture of sources that a law of mixtures has the least loss for, within what was tried."""

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from nmm_jax.scaling.forecast import Forecast, Quantity
from nmm_jax.scaling.laws import MIXTURE, Values

_GRID = 20_000  # mixtures to begin from, at most
_STEP, _FINEST = 0.05, 1e-4  # share that is moved between two sources, at first and in the end
_EDGE = 2e-3  # of a share, from the end of its range


def best_mixture(forecast: Forecast, C: float) -> dict[str, Quantity]:
    """The share of each column h/<source> in the mixture of least loss, at the best N and D of a budget.

    Shares stay within the ranges that the law was fitted to: beyond them its terms are free to be anything.
    """
    found, *drawn = (_search(forecast, C, values) for values in (forecast.values, *forecast.draws))
    columns = list(forecast.mixtures)
    return {
        column: forecast.interval(float(found[i]), np.array([draw[i] for draw in drawn]))
        for i, column in enumerate(columns)
    }


def source_of(column: str) -> str:
    """What a column of shares is called: captions of h/captions, and of a study's h/h_captions."""
    return column.removeprefix(MIXTURE).removeprefix("h_")


def at_best(forecast: Forecast, C: float) -> Forecast:
    """A law of mixtures at its best mixture for a budget; others, and those that have one, as they are."""
    if not forecast.mixtures or forecast.held:
        return forecast
    best = best_mixture(dataclasses.replace(forecast, draws=()), C)
    return dataclasses.replace(forecast, held={column: share.value for column, share in best.items()})


def losses_of(forecast: Forecast, C: float, values: Values, shares: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n"]:
    """The least loss of a budget by mixtures; columns of `shares` are in the order of forecast.mixtures."""
    held = dict(zip(forecast.mixtures, np.asarray(shares).T, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(forecast.law.at(values, **held).optimum(np.asarray(C), forecast.per_pair).loss)


def _search(forecast: Forecast, C: float, values: Values) -> Float[np.ndarray, "k"]:
    """From the best point of a grid, moving shares from one source to another while that helps."""
    k = len(forecast.mixtures)
    low, high = np.array(list(forecast.mixtures.values())).T

    def inside(shares: np.ndarray) -> np.ndarray:
        return shares[np.all((shares >= low - 1e-9) & (shares <= high + 1e-9), axis=1)].clip(0, 1)

    middle = low + (high - low) * (1 - low.sum()) / max((high - low).sum(), 1e-12)
    shares = np.concatenate([inside(_simplex(k)), middle[None]])  # one at least, however narrow the ranges are
    best = shares[np.nanargmin(losses_of(forecast, C, values, shares))]
    moves = np.array([np.eye(k)[i] - np.eye(k)[j] for i, j in itertools.permutations(range(k), 2)])
    step = _STEP
    while step > _FINEST:
        tried = np.concatenate([best[None], inside(best + step * moves)])
        lowest = int(np.nanargmin(losses_of(forecast, C, values, tried)))
        best, step = tried[lowest], step if lowest else step / 2
    return best


def _simplex(k: int) -> Float[np.ndarray, "n k"]:
    """All mixtures of k sources, in steps as fine as _GRID allows."""
    steps = next(n for n in range(40, 0, -1) if math.comb(n + k - 1, k - 1) <= _GRID)
    bars = np.array(list(itertools.combinations(range(steps + k - 1), k - 1)), dtype=float).reshape(-1, k - 1)
    ends = np.ones((len(bars), 1))
    return (np.diff(np.concatenate([-ends, bars, (steps + k - 1) * ends], axis=1), axis=1) - 1) / steps


def at_edges(forecast: Forecast, mixture: Mapping[str, Quantity]) -> list[str]:
    """Warnings of shares that would go on beyond what was tried, if they could."""
    found = []
    for column, share in mixture.items():
        for end, name in zip(forecast.mixtures[column], ("least", "most"), strict=True):
            if abs(share.value - end) < _EDGE:
                found.append(
                    f"{source_of(column)} {share.value:.1%} is the {name} that was tried: the best may lie beyond"
                )
    return found


def parse_mixture(text: str) -> dict[str, float]:
    """`captions=0.45,interleaved=0.45,text=0.1`.

    Raises:
      ValueError: it is no such list, or the shares do not sum to one.
    """
    found = {}
    for part in text.split(","):
        name, equals, share = part.partition("=")
        try:
            found[name.strip()] = float(share)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--mixture={text}: {part!r} is not SOURCE=SHARE, as in captions=0.45,text=0.55")
    if not math.isclose(sum(found.values()), 1, abs_tol=1e-3) or min(found.values()) < 0:
        raise ValueError(
            f"--mixture={text}: shares must be 0 or more and sum to 1; they sum to {sum(found.values()):g}"
        )
    return found
