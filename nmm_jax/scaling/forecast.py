"""What a law says of runs that were not made, with the uncertainty of its fit.

A forecast is a fit's JSON (nmm_jax.scaling.fit) or a published law, ready to be asked. Every answer is a Quantity: the
value at the fitted parameters, and an interval of the values at the parameters of its bootstrap draws. That is how
uncertain the law's curve is; a single run scatters about it besides.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nmm_jax.scaling import published
from nmm_jax.scaling.laws import Law, Values, law
from nmm_jax.scaling.optima import FLOPS, Slice

_SIZES = np.exp(np.linspace(math.log(1e3), math.log(1e16), 20_001))  # N that `cheapest` looks at


class Quantity(NamedTuple):
    """A value and its interval, which is missing where there are no draws."""

    value: float
    low: float | None = None
    high: float | None = None

    def map(self, of: Callable[[float], float]) -> "Quantity":
        """A rising function of it."""
        return Quantity(*(None if v is None else of(v) for v in self))  # type: ignore[arg-type]

    def __format__(self, form: str) -> str:
        """0.527 [0.498, 0.561]."""
        return f"{self.value:{form}}" + ("" if self.low is None else f" [{self.low:{form}}, {self.high:{form}}]")


class Best(NamedTuple):
    """The compute-optimal run of a budget; of a frontier the loss alone."""

    N: Quantity | None
    D: Quantity | None
    loss: Quantity


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A law with numbers.

    Attributes:
      name: for tables.
      source: the file or the publication.
      draws: parameters of bootstrap draws; () if there are none.
      level: of intervals; 0.9 is from the 5th to the 95th percentile.
      fitted: range of N, D and C that the law was fitted to.
      per_pair: C / (N D).
      held: values of the law's other columns: S, or h/<source>.
      mixtures: of a law of mixtures, the range of each share that it was fitted to, by column h/<source>.
      architecture: early, late or moe: whose configs are its models.
      data: what its losses are of; only those of the same can be compared.
      notes: what whoever reads an answer has to know.
    """

    name: str
    law: Law
    values: Values
    source: str
    draws: tuple[Values, ...] = ()
    level: float = 0.9
    fitted: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    per_pair: float = FLOPS
    held: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mixtures: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    architecture: str = "early"
    data: str = ""
    notes: tuple[str, ...] = ()

    @property
    def has_sizes(self) -> bool:
        """Whether it speaks of N and D, and not of C alone."""
        return self.law.reduce is not None

    def slice(self, values: Values) -> Slice:
        """The law as curves of N and D."""
        return self.law.at(values, **self.held)

    def interval(self, value: float, drawn: Float[np.ndarray, "draws"]) -> Quantity:
        """Of a value and what it is in each draw. NaN, of draws that say nothing of it, widens both ends."""
        if not len(drawn):
            return Quantity(value)
        tail = (1 - self.level) / 2
        if np.isfinite(drawn).all():
            low, high = np.quantile(drawn, [tail, 1 - tail])
        else:  # between infinities nothing is interpolated
            low = np.quantile(np.where(np.isnan(drawn), -np.inf, drawn), tail, method="lower")
            high = np.quantile(np.where(np.isnan(drawn), np.inf, drawn), 1 - tail, method="higher")
        return Quantity(value, float(low), float(high))

    def quantity(self, of: Callable[[Values], float]) -> Quantity:
        """A function of the law's parameters; a draw that it raises ValueError of says nothing, as without optimum."""

        def of_draw(draw: Values) -> float:
            try:
                return of(draw)
            except ValueError:
                return math.nan

        return self.interval(float(of(self.values)), np.array([of_draw(draw) for draw in self.draws]))

    def loss(self, N: float, D: float) -> Quantity:
        return self.quantity(lambda values: float(self.slice(values).loss(np.asarray(N), np.asarray(D))))

    def exponent(self, letter: str) -> Quantity | None:
        """Of how the optimum moves: a of N ~ C^a, b of D ~ C^b; None of laws without a closed form."""

        def of(values: Values) -> float:
            return float(self.law.exponents({name: np.asarray(v) for name, v in values.items()})[letter])

        return self.quantity(of) if "alpha" in self.values and "gamma" not in self.values else None

    def optima(self, values: Values, C: float) -> tuple[float, float, float]:
        """N, D and loss of a budget at some parameters; NaN where a draw has no optimum."""
        if not self.has_sizes:
            return math.nan, math.nan, float(self.law.predict(values, {"C": np.array([C])})[0])
        try:
            found = self.slice(values).optimum(np.asarray(C), self.per_pair)
        except ValueError:
            if values is self.values:
                raise
            return math.nan, math.nan, math.nan
        return float(found.N), float(found.D), float(found.loss)

    def best(self, C: float) -> Best:
        """The optimum of a budget.

        Raises:
          ValueError: the law has none.
        """
        value, *draws = (self.optima(values, C) for values in (self.values, *self.draws))
        columns = np.array(draws).reshape(-1, 3).T
        N, D, loss = (self.interval(v, column) for v, column in zip(value, columns, strict=True))
        return Best(N, D, loss) if self.has_sizes else Best(None, None, loss)

    def budget(self, N: float, D: float) -> float:
        return self.per_pair * N * D

    def beyond(self, **asked: float) -> list[str]:
        """Warnings: by how much N, D or C leave the range that the law was fitted to."""
        found = []
        for name, value in asked.items():
            low, high = self.fitted.get(name, (0.0, math.inf))
            if value > high * (1 + 1e-6):
                found.append(f"{name} = {value:.3g} is {value / high:.3g} times the largest of the fit, {high:.3g}")
            elif value < low * (1 - 1e-6):
                found.append(f"{name} = {value:.3g} is 1/{low / value:.3g} of the smallest of the fit, {low:.3g}")
        return found


def of_published(name: str) -> Forecast:
    """A law of published.py, by its name there."""
    one = published.find(name)
    return Forecast(
        name=f"{name} (published)",
        law=law(one.law),
        values=one.values,
        source=one.source,
        fitted=one.fitted,
        architecture=next((each for each in ("late", "moe") if name.startswith(each)), "early"),
        data=one.data,
        notes=one.notes,
    )


def balanced_tokens(curve: Slice, N: float) -> float:
    """The D whose budget has this N for its optimum: where dL/dlog N = dL/dlog D. NaN if there is none."""
    b, beta = curve.tokens
    slope = sum(a * alpha * N**-alpha for a, alpha in curve.sizes)
    return (b * beta / slope) ** (1 / beta) if slope > 0 and beta > 0 else math.nan


def tokens_for(curve: Slice, N: float, loss: float) -> float:
    """The D that takes a model of N to a loss; inf if none does."""
    b, beta = curve.tokens
    left = loss - curve.E - sum(a * N**-alpha for a, alpha in curve.sizes)
    return (b / left) ** (1 / beta) if left > 0 else math.inf


def cheapest(curve: Slice, loss: float, per_pair: float, served: float) -> tuple[float, float]:
    """N and D that reach a loss for the least per_pair N D + 2 N served, the FLOPs of training and of serving.

    Sardana et al. 2024, "Beyond Chinchilla-Optimal", arXiv 2401.00448. By search over log N.
    """
    b, beta = curve.tokens
    sizes = _SIZES
    for _ in range(2):  # the second time between the neighbours of the best
        left = loss - curve.E - sum(a * sizes**-alpha for a, alpha in curve.sizes)
        tokens = np.where(left > 0, (b / np.where(left > 0, left, 1.0)) ** (1 / beta), np.inf)
        i = int(np.argmin(sizes * (per_pair * tokens + 2 * served)))
        N, D = float(sizes[i]), float(tokens[i])
        sizes = np.geomspace(sizes[max(i - 1, 0)], sizes[min(i + 1, len(sizes) - 1)], 2_001)
    return N, D
