"""Figures of a run as SVG that sits inside a page: text in the page's font, lines in its colour, light or dark."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = ("#4c8dd6", "#e0863a", "#3fa66a", "#b06fd0", "#cf5a6a", "#8a8f3c")  # legible on white and on near-black
INK = "#7f8081"  # stands for the page's own text colour until the figure is in the page
STYLE: Any = {  # matplotlib's rc parameters
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl


def loss_curves(lines: Lines, sources: Sequence[str], held_out: Mapping[str, float], step: int) -> str:
    """Training loss of each source, raw and smoothed, with its held-out loss as a dot where it was measured."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(8.6, 3.6)
        for source, colour in zip(sources, _colours(sources), strict=True):
            steps, losses = _series(lines, f"loss/{source}")
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(losses), color=colour, linewidth=1.8, label=source)
            if source in held_out:
                axes.plot([step], [held_out[source]], "o", color=colour, markersize=5, clip_on=False)
        if held_out:
            axes.plot([], [], "o", color=INK, markersize=5, label="held out")
        axes.set_ylabel("loss (nats per text token)")
        axes.set_ylim(bottom=0)
        _over_steps(axes)
        axes.legend(ncols=len(sources) + 1)
        return to_svg(figure, "Training loss per source")


def optimization(lines: Lines) -> str:
    """Learning rate and gradient norm."""
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = _figure(8.6, 2.4, columns=2)
        left.plot(*_series(lines, "learning_rate"), color=COLOURS[0], linewidth=1.6)
        left.set_ylabel("learning rate")
        left.set_ylim(bottom=0)
        steps, norms = _series(lines, "grad_norm")
        right.plot(steps, norms, color=COLOURS[3], alpha=0.25, linewidth=0.8)
        right.plot(steps, smoothed(norms), color=COLOURS[3], linewidth=1.6)
        right.set_ylabel("gradient norm")
        right.set_yscale("log")
        _over_steps(left, right)
        return to_svg(figure, "Learning rate and gradient norm")


def experts(lines: Lines) -> str:
    """How evenly experts are loaded, and how sure their routers are."""
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = _figure(8.6, 2.4, columns=2)
        for axes, key, label, colour in (
            (left, "moe/load_imbalance", "busiest expert / mean", COLOURS[4]),
            (right, "moe/router_entropy", "router entropy (nats)", COLOURS[5]),
        ):
            steps, values = _series(lines, key)
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(values), color=colour, linewidth=1.6)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        left.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        _over_steps(left, right)
        return to_svg(figure, "Experts: load and entropy")


def speed(lines: Lines) -> str:
    """Positions a second, and the share of the time that was spent waiting for data."""
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = _figure(8.6, 2.4, columns=2)
        steps, rates = _series(lines, "speed/tokens_per_second")
        left.plot(steps, rates, color=COLOURS[2], linewidth=1.2)
        left.set_ylabel("positions per second")
        left.set_ylim(bottom=0)
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        steps, waits = _series(lines, "time/data_wait")
        _, times = _series(lines, "time/step")
        right.plot(steps, 100 * waits / times, color=COLOURS[1], linewidth=1.2)
        right.set_ylabel("waiting for data (% of time)")
        right.set_ylim(0, max(5, 105 * float(np.max(waits / times))))
        _over_steps(left, right)
        return to_svg(figure, "Speed")


def question_accuracy(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar for each kind of question, on combinations seen and held out, with base rates and standard errors."""
    kinds = [kind for kind, score in scores.items() if "seen" in score or "held_out_combinations" in score]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(8.6, 3.0)
        for offset, part, label, colour in (
            (-0.19, "seen", "combinations seen in training", COLOURS[0]),
            (0.19, "held_out_combinations", "combinations held out", COLOURS[1]),
        ):
            places = [i + offset for i, kind in enumerate(kinds) if part in scores[kind]]
            shown = [scores[kind][part] for kind in kinds if part in scores[kind]]
            errors = [100 * (score["standard_error"] or 0) for score in shown]
            accuracies = [100 * score["accuracy"] for score in shown]
            axes.bar(places, accuracies, 0.34, yerr=errors, color=colour, ecolor=INK, label=label)
            bases = [100 * score["base"] for score in shown]
            left, right = [p - 0.19 for p in places], [p + 0.19 for p in places]
            label_once = "base rate: the commonest answer" if offset > 0 else None
            axes.hlines(bases, left, right, color=INK, linewidth=2, label=label_once)
        axes.set_xticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
        axes.set_ylabel("right answers (%)")
        axes.set_ylim(0, 100)
        axes.grid(axis="x", visible=False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        return to_svg(figure, "Accuracy by kind of question")


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over a centred window of 1/25 of the curve, shorter at its ends."""
    half = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _series(lines: Lines, key: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(line["step"], line[key]) for line in lines if key in line]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps), np.array(values, np.float64)


def _colours(names: Sequence[str]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure((width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, columns)
    for one in np.atleast_1d(axes):
        one.patch.set_alpha(0)
    return figure, axes


def _over_steps(*all_axes: Axes) -> None:
    for axes in all_axes:
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def to_svg(figure: Figure, title: str) -> str:
    """To be called within STYLE; sets ids that are this figure's alone, and the same every time."""
    matplotlib.rcParams["svg.hashsalt"] = title
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Title": title, "Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)
