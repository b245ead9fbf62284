"""Parts that figures are made of: axes with plain numbers, bands, names beside lines instead of legends, triangles."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from nmm_jax.pages.drawing import ink
from nmm_jax.pages.numbers import count

WIDTH = 8.6  # inches; a page scales it to its own width
CORNERS = np.array([[0.5, np.sqrt(3) / 2], [0.0, 0.0], [1.0, 0.0]])  # of a triangle, whose points are shares @ CORNERS
_LETTER, _LINE = 0.011, 0.05  # width and height of a label's letters, of the axes

signed = FuncFormatter(lambda value, _: f"{value:+.3g}".replace("-", "−") if value else "0")  # of ticks: +0.5, −1


class Label(NamedTuple):
    """A name beside a point, in its colour."""

    x: float
    y: float
    text: str
    colour: Any


def new_figure(height: float, columns: int = 1, rows: int = 1, width: float = WIDTH, **more: Any) -> tuple[Figure, Any]:
    """A figure without a background, and its axes."""
    figure = Figure((width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(rows, columns, **more)
    for one in np.ravel(axes):
        one.patch.set_alpha(0)
    return figure, axes


def dots(
    axes: Axes, x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], hollow: Bool[np.ndarray, "n"], colour: Any
) -> None:
    """Runs; hollow ones were held out."""
    axes.plot(x[~hollow], y[~hollow], "o", color=colour, markersize=4.5, markeredgewidth=0, zorder=3)
    outline = {"color": "none", "markeredgecolor": colour, "markeredgewidth": 1.5, "markersize": 6}
    axes.plot(x[hollow], y[hollow], "o", zorder=3, **outline)


def log_x(axes: Axes, limits: tuple[float, float], label: str, counted: bool = False) -> None:
    """A logarithmic axis; `counted` writes 300M instead of powers of ten."""
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.set_xlabel(label)
    axes.xaxis.set_minor_locator(NullLocator())
    if counted:
        counts(axes.xaxis)


def counts(axis: Any) -> None:
    """Ticks such as 300M and 1B, on a logarithmic axis whose limits are set."""
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    subs = (1.0,) if decades > 3.2 else (1.0, 3.0) if decades > 1.3 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def plain_log_y(axes: Axes, values: Float[np.ndarray, "n"], label: str) -> None:
    """A logarithmic axis around the values, with plain numbers at even distances."""
    low, high = values.min(), values.max()
    margin = (high / low) ** 0.06 if high > low else 1.02
    low, high = low / margin, high * margin
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.set_ylabel(label)


def beside(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes names beside the ends of lines, moved up where they would lie on others. Limits have to be set before."""
    to_axes = axes.transData + axes.transAxes.inverted()
    placed: list[tuple[float, float, float]] = []
    for x, y, text, colour in sorted(labels, key=lambda label: label.y):
        across, height = to_axes.transform((x, y))
        end = across + _LETTER * len(text)
        for taken, left, right in sorted(placed):
            if left < end and across < right and abs(taken - height) < _LINE:
                height = taken + _LINE
        placed.append((height, across, end))
        where: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "annotation_clip": False,
            "va": "center",
        }
        axes.annotate(text, (across, height), (5, 0), color=colour, fontsize=8.5, **where)


def triangle(axes: Axes, names: Sequence[str]) -> None:
    """The frame of a ternary plot: a name at each corner, ticks every 20% along the sides."""
    axes.plot(*np.concatenate([CORNERS, CORNERS[:1]]).T, color=ink(), linewidth=1)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_xlim(-0.14, 1.14)
    for corner, name, offset in zip(CORNERS, names, ((0, 12), (-8, -14), (8, -14)), strict=True):
        axes.annotate(f"all {name}", corner, offset, textcoords="offset points", ha="center", va="center")
    for k, name in enumerate(names):  # along the side from the next corner to this one
        begin, end = CORNERS[(k + 1) % 3], CORNERS[k]
        outward = (begin + end) / 2 - CORNERS.mean(axis=0)
        outward /= np.linalg.norm(outward)
        turn = float(np.degrees(np.arctan2(*(end - begin)[::-1])))
        turn += -180 if turn > 90 else 180 if turn < -90 else 0
        for share in (0.2, 0.4, 0.6, 0.8):
            x, y = begin + share * (end - begin)
            axes.plot([x, x + 0.012 * outward[0]], [y, y + 0.012 * outward[1]], color=ink(), linewidth=0.8)
            text = f"{share:.0%}" + (f" {name}" if share == 0.4 else "")
            placed: dict[str, Any] = {"ha": "center", "va": "center", "rotation": turn}
            axes.text(x + 0.05 * outward[0], y + 0.05 * outward[1], text, fontsize=7.5, **placed)


def hull(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "m 2"]:
    """The convex hull, closed (Andrew's monotone chain)."""
    found: list[np.ndarray] = []
    different = np.unique(points, axis=0)
    if len(different) == 1:
        return np.repeat(different, 2, axis=0)
    for chain in (different, different[::-1]):
        side: list[np.ndarray] = []
        for point in chain:
            while len(side) > 1 and np.linalg.det([side[-1] - side[-2], point - side[-2]]) <= 0:
                side.pop()
            side.append(point)
        found += side[:-1]
    return np.array([*found, found[0]])
