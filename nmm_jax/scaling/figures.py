"""Figures of scaling laws: runs as dots coloured by size, laws as lines, what is uncertain as bands.

Each takes the runs of a fit and what the fit says (forecast.Forecast), and returns a figure; colours and type are those
of nmm_jax.pages.drawing, within whose contexts they are to be called.

    frontier     loss against FLOPs, a line for each size, and the least loss that each budget buys
    isoflop      loss against N at equal FLOPs, a parabola for each budget
    optimum      the best N and D of each budget
    residuals    measured / predicted, against N and D
    bootstrap    parameters of the bootstrap draws against each other
    held_out     measured against predicted
    mixture      predicted loss over the mixtures of three sources
    comparison   the frontiers of several laws
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nmm_jax.pages import axes as parts
from nmm_jax.pages.axes import CORNERS, Label, new_figure
from nmm_jax.pages.drawing import COLOURS, SIZES, ink
from nmm_jax.pages.numbers import count, power
from nmm_jax.scaling.forecast import Forecast, Quantity
from nmm_jax.scaling.mixtures import source_of
from nmm_jax.scaling.points import Points

_AHEAD = 3.0  # times the largest budget: how far frontiers are drawn
_LOSS = "held-out loss (nats per text token)"
_FLOPS = "training FLOPs, C"
_NAMED = 9  # sizes that have their name and the law's line, of the smallest to the largest
_CORNER = ("E", "A", "B", "alpha", "beta")  # parameters that are drawn against each other
_SYMBOLS = {"alpha": "α", "beta": "β"}
_REFERENCES = tuple(COLOURS[i] for i in (1, 3, 4))  # unlike SIZES
_CONTOURS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # % above the least loss
_OUTLINE = "#23272e"  # of markers on filled contours


def frontier(points: Points, forecast: Forecast, references: Sequence[Forecast] = ()) -> Figure:
    """Loss against FLOPs. Hollow dots were held out; dashed lines are other laws' frontiers."""
    figure, axes = new_figure(4.8)
    limits = _ahead(points)
    labels = []
    sizes = _by_size(points)
    named = {round(i) for i in np.linspace(0, len(sizes) - 1, min(len(sizes), _NAMED))}
    for i, (rows, colour) in enumerate(sizes):
        size = float(np.exp(np.log(points.N[rows]).mean()))
        parts.dots(axes, points.C[rows], points.loss[rows], points.held_out[rows], colour)
        if i not in named:
            continue
        labels.append(Label(points.C[rows][-1], points.loss[rows][-1] * 1.004, count(size), colour))
        if forecast.has_sizes and not forecast.mixtures and len(rows) > 1:
            reach = np.geomspace(points.C[rows].min(), points.C[rows].max(), 60)
            curve = forecast.slice(forecast.values).loss(np.asarray(size), reach / (forecast.per_pair * size))
            axes.plot(reach, curve, color=colour, linewidth=1.2)
    C = np.geomspace(*limits, 60)
    end = _band(axes, C, [forecast.best(c).loss for c in C], ink())
    best = "best mixture, least loss" if forecast.mixtures else "least loss of a budget"
    labels.append(Label(limits[1], end, best, ink()))
    for other, colour in zip(references, itertools.cycle(_REFERENCES), strict=False):
        losses = [other.best(c).loss.value for c in C]
        axes.plot(C, losses, color=colour, linewidth=1.4, linestyle=(0, (4, 2)))
        labels.append(Label(limits[1], losses[-1], other.name, colour))
    parts.log_x(axes, limits, _FLOPS)
    parts.plain_log_y(axes, np.append(points.loss, end), _LOSS)
    parts.beside(axes, labels)
    return figure


def isoflop(points: Points) -> Figure:
    """A parabola in log N for each budget; a diamond is its lowest point, where that lies between the runs."""
    figure, axes = new_figure(4.4)
    found = points.parabolas()
    labels, curves = [], []
    for (rows, one), colour in zip(found, _scale([np.log(one.C) for _, one in found]), strict=True):
        reach = np.geomspace(points.N[rows].min() / 1.15, points.N[rows].max() * 1.15, 80)
        curve = one.loss + one.curvature * np.log(reach / one.N) ** 2
        axes.plot(reach, curve, color=colour, linewidth=1.3, alpha=1.0 if one.inside else 0.4)
        curves.append(curve)
        parts.dots(axes, points.N[rows], points.loss[rows], points.held_out[rows], colour)
        if one.inside:
            axes.plot([one.N], [one.loss], "D", color=colour, markersize=6.5, markeredgecolor=ink(), zorder=4)
        labels.append(Label(reach[-1], curve[-1], f"{power(one.C)} FLOPs", colour))
    shown = points.take(np.concatenate([rows for rows, _ in found]))
    parts.log_x(axes, (shown.N.min() / 1.3, shown.N.max() * 1.3), "parameters, N", counted=True)
    parts.plain_log_y(axes, np.concatenate([shown.loss, *curves]), _LOSS)
    parts.beside(axes, labels)
    return figure


def optimum(points: Points, forecast: Forecast, in_budgets: Points | None = None) -> Figure:
    """N and D of least loss against C; grey dots are the runs.

    Args:
      in_budgets: points whose parabolas' lowest points are drawn as diamonds.
    """
    figure, all_axes = new_figure(3.7, 2)
    limits = _ahead(points)
    C = np.geomspace(*limits, 40)
    best = [forecast.best(c) for c in C]
    lowest = [one for _, one in (in_budgets or points).parabolas() if one.inside]
    for axes, name, letter, colour in zip(all_axes, "ND", "ab", COLOURS, strict=False):
        axes.plot(points.C, getattr(points, name), "o", color=ink(), markersize=2.4, alpha=0.4, markeredgewidth=0)
        _band(axes, C, [getattr(one, name) for one in best], colour)
        read = [getattr(one, name) for one in lowest]
        axes.plot([one.C for one in lowest], read, "D", color=colour, markersize=6, markeredgecolor=ink(), zorder=3)
        if slope := forecast.exponent(letter):
            axes.set_title(f"{name} ∝ C$^{letter}$,  {letter} = {slope:.3f}")
        axes.set_yscale("log")
        parts.log_x(axes, limits, _FLOPS)
        parts.counts(axes.yaxis)
        axes.set_ylabel({"N": "best parameters, N", "D": "best tokens, D"}[name])
    return figure


def residuals(points: Points) -> Figure:
    """How far runs lie from the law, in percent of the loss, against N and D; hollow dots were held out."""
    figure, all_axes = new_figure(3.2, 2, sharey=True)
    off = 100 * (points.loss / points.predicted - 1)
    for axes, name, what in zip(all_axes, "ND", ("parameters, N", "tokens, D"), strict=True):
        axes.axhline(0, color=ink(), linewidth=0.9)
        column = getattr(points, name)
        for rows, colour in _by_size(points):
            parts.dots(axes, column[rows], off[rows], points.held_out[rows], colour)
        parts.log_x(axes, (column.min() / 1.4, column.max() * 1.4), what, counted=True)
    all_axes[0].set_ylabel("measured above the law (%)")
    largest = np.abs(off).max() * 1.15 or 1.0
    all_axes[0].set_ylim(-largest, largest)
    all_axes[0].yaxis.set_major_formatter(parts.signed)
    return figure


def bootstrap(forecast: Forecast) -> Figure:
    """Each draw a dot, the fit a cross; A and B as logs to base 10. In long thin clouds parameters trade off."""
    names = [name for name in _CORNER if name in forecast.values]
    plain = forecast.law.free | {"E"}

    def seen(values: Mapping[str, float], name: str) -> float:
        return values[name] if name in plain else float(np.log10(values[name]))

    fit = {name: seen(forecast.values, name) for name in names}
    with np.errstate(divide="ignore"):
        clouds = np.array([[seen(draw, name) for draw in forecast.draws] for name in names])
    # A draw that has no use for a term lets its coefficient run to 0 or, with a steep power, to infinity.
    drawn = dict(zip(names, clouds[:, np.isfinite(clouds).all(axis=0)], strict=True))
    title = {name: ("" if name in plain else "log$_{10}$ ") + _SYMBOLS.get(name, name) for name in names}
    figure, grid = new_figure(1.45 * len(names) + 0.4, len(names), rows=len(names))
    for (i, below), (j, across) in itertools.product(enumerate(names), repeat=2):
        axes = grid[i, j]
        axes.grid(False)
        axes.tick_params(labelsize=7)
        axes.set_visible(j <= i)
        axes.set_xlim(*_reach(drawn[across], fit[across]))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        if i == j:
            axes.hist(drawn[below], bins=24, range=axes.get_xlim(), color=COLOURS[0], alpha=0.75)
            axes.axvline(fit[below], color=ink(), linewidth=1.2)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        else:
            axes.plot(drawn[across], drawn[below], "o", color=COLOURS[0], markersize=2.6, alpha=0.45, markeredgewidth=0)
            axes.plot(fit[across], fit[below], "+", color=ink(), markersize=9, markeredgewidth=1.4)
            axes.set_ylim(*_reach(drawn[below], fit[below]))
            axes.yaxis.set_major_locator(MaxNLocator(3))
            r = np.corrcoef(drawn[across], drawn[below])[0, 1]
            axes.set_title(f"r = {r:+.2f}".replace("-", "−"), fontsize=7, pad=2, loc="right")
            axes.tick_params(labelleft=j == 0)
            axes.set_ylabel(title[below] if j == 0 else "")
        axes.tick_params(labelbottom=i == len(names) - 1)
        axes.set_xlabel(title[across] if i == len(names) - 1 else "")
    return figure


def held_out(points: Points, forecast: Forecast) -> Figure:
    """Measured against predicted loss; held-out runs are hollow, with the intervals of their predictions."""
    figure, axes = new_figure(4.6, width=5.4)
    both = np.concatenate([points.loss, points.predicted])
    low, high = both.min() * 0.985, both.max() * 1.015
    axes.plot([low, high], [low, high], color=ink(), linewidth=0.9)
    for rows, colour in _by_size(points):
        parts.dots(axes, points.predicted[rows], points.loss[rows], points.held_out[rows], colour)
    checked = np.flatnonzero(points.held_out)
    for i in checked:
        q = forecast.loss(points.N[i], points.D[i])
        if q.low is not None:
            axes.plot([q.low, q.high], [points.loss[i]] * 2, color=ink(), linewidth=1.2, zorder=2)
    if len(checked):
        off = 100 * np.abs(points.predicted[checked] / points.loss[checked] - 1).mean()
        axes.set_title(f"{len(checked)} held-out run{'s' * (len(checked) > 1)} (hollow): off by {off:.2f}% in the mean")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("predicted loss (nats per text token)")
    axes.set_ylabel("measured loss")
    return figure


def mixture(
    points: Points,
    loss: Callable[[Float[np.ndarray, "n 3"]], Float[np.ndarray, "n"]],
    best: Mapping[str, float],
    title: str,
) -> Figure:
    """Contours of the predicted loss over the mixtures of three sources, above the least.

    Dots are mixtures that were trained, the star is the best within the range of each share; beyond the dashed line
    the law extrapolates.

    Args:
      loss: of shares, in the order of `best`.
      best: by column h/<source>, the mixture of least loss.
    """
    figure, axes = new_figure(5.6, width=6.4)
    n = 120
    shares = np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]) / n
    star = np.array(list(best.values()))
    least = float(loss(star[None])[0])

    def above(shares: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n"]:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = 100 * (loss(shares) / least - 1)
        return np.where(np.isfinite(found), np.minimum(found, 1e3), 1e3)

    x, y = (shares @ CORNERS).T
    colours = [SIZES(1 - i / len(_CONTOURS)) for i in range(len(_CONTOURS) + 1)]
    axes.tricontourf(x, y, above(shares), levels=[-1e3, *_CONTOURS], colors=colours, extend="max", alpha=0.85)
    lines = axes.tricontour(x, y, above(shares), levels=_CONTOURS, colors=_OUTLINE, linewidths=0.6)
    # names of contours on a line from the star to the furthest corner, where there is most room between them
    corner = np.eye(3)[np.argmax(((CORNERS - star @ CORNERS) ** 2).sum(axis=1))]
    ray = np.linspace(star, corner, 400)
    along = above(ray)
    named = [tuple(ray[np.argmax(along > level)] @ CORNERS) for level in _CONTOURS if along.max() > level]
    for text in axes.clabel(lines, fmt=lambda level: f"+{level:g}%", fontsize=7.5, manual=named):
        text.set_color(_OUTLINE)
    tried = np.stack([points.shares[column] for column in best], axis=1) @ CORNERS
    axes.plot(*parts.hull(tried).T, color="white", linewidth=1.2, linestyle=(0, (3, 2)))
    axes.plot(*tried.T, "o", color="white", markeredgecolor=_OUTLINE, markersize=5, markeredgewidth=0.9)
    axes.plot(*(star @ CORNERS), "*", color=COLOURS[1], markersize=17, markeredgecolor=_OUTLINE, markeredgewidth=0.8)
    parts.triangle(axes, [source_of(column) for column in best])
    axes.set_title(title, pad=26, loc="center")
    return figure


def comparison(forecasts: Sequence[Forecast], limits: tuple[float, float]) -> Figure:
    """Least loss of a budget by several laws, relative to the first; bands are their intervals."""
    figure, axes = new_figure(3.8)
    C = np.geomspace(*limits, 40)
    base = [forecasts[0].best(c).loss.value for c in C]
    labels = []
    for forecast, colour in zip(forecasts, itertools.cycle(COLOURS), strict=False):
        found = [forecast.best(c).loss for c in C]
        above = [loss.map(_percent_above(b)) for loss, b in zip(found, base, strict=True)]
        labels.append(Label(C[-1], _band(axes, C, above, colour), forecast.name, colour))
    parts.log_x(axes, limits, _FLOPS)
    axes.set_ylabel(f"least loss, above that of {forecasts[0].name} (%)")
    axes.yaxis.set_major_formatter(parts.signed)
    parts.beside(axes, labels)
    return figure


def _percent_above(base: float) -> Callable[[float], float]:
    return lambda value: 100 * (value / base - 1)


def _ahead(points: Points) -> tuple[float, float]:
    return points.C.min() / 1.6, points.C.max() * _AHEAD


def _by_size(points: Points) -> list[tuple[np.ndarray, Any]]:
    """The rows of each size, and its colour."""
    sizes = points.sizes()
    return list(zip(sizes, _scale([float(np.log(points.N[rows]).mean()) for rows in sizes]), strict=True))


def _scale(logs: Sequence[float]) -> list[Any]:
    """Colours from small to large."""
    low, high = min(logs), max(logs)
    return [SIZES((value - low) / (high - low) if high > low else 0.5) for value in logs]


def _band(axes: Axes, x: Float[np.ndarray, "n"], quantities: Sequence[Quantity], colour: Any) -> float:
    """A line with its interval; returns where it ends."""
    axes.plot(x, [q.value for q in quantities], color=colour, linewidth=1.8, zorder=2)
    if quantities[0].low is not None:
        low, high = ([getattr(q, end) for q in quantities] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    return quantities[-1].value


def _reach(draws: Float[np.ndarray, "n"], value: float) -> tuple[float, float]:
    """From the 1st to the 99th percentile and a little more: a stray draw shall not hide the others."""
    low, high = np.quantile(np.append(draws, value), [0.01, 0.99])
    low, high = min(low, value), max(high, value)
    margin = 0.12 * (high - low) or 0.1 * abs(value) or 1.0
    return low - margin, high + margin
