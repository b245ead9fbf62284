"""The numbers of many runs side by side: tables in Markdown, and a figure."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nmm_jax.evaluation.figures import COLOURS, INK, STYLE
from nmm_jax.evaluation.results import Results


@dataclasses.dataclass(frozen=True)
class Number:
    """One measurement of a run, in the unit in which it is shown."""

    value: float
    error: float | None
    digits: int
    sign: bool = False  # shown with its sign

    def __str__(self) -> str:
        shown = f"{self.value:{'+' if self.sign else ''}.{self.digits}f}"
        return shown if self.error is None else f"{shown} ± {self.error:.{self.digits}f}"


def numbers(evaluation: Results) -> dict[str, Number]:
    """What evaluate measured, by the heading of its column: losses, image drops, gains, accuracies, recalls."""
    return dict(_numbers(evaluation))


def _numbers(evaluation: Results) -> Iterator[tuple[str, Number]]:
    for source, found in evaluation.get("held_out", {}).items():
        yield source, Number(found["loss"], None, 3)  # its error is of the documents, the same ones for all runs
    for source, found in evaluation.get("image_gain", {}).items():
        yield f"{source}: drop, %", Number(100 * found["drop"], _scaled(found["standard_error"], 100), 1, True)
    for source, found in evaluation.get("in_context", {}).items():
        yield f"{source}: gain", Number(found["pair"]["gain"], found["pair"]["gain_error"], 3, True)
        yield f"{source}: of it the picture", Number(found["picture"]["gain"], found["picture"]["gain_error"], 3, True)
    if pooled := evaluation.get("questions", {}).get("colour_and_count"):
        yield "colour and count, %", Number(100 * pooled["accuracy"], _scaled(pooled["standard_error"], 100), 1)
    for source, found in evaluation.get("pixels", {}).items():
        explained = found["explained"]
        error = _scaled(explained["standard_error"], 100)
        yield f"{source}: variance of pixels explained, %", Number(100 * explained["value"], error, 1)
    for source, found in evaluation.get("retrieval", {}).items():
        for direction in ("image_to_text", "text_to_image"):
            recall = found[direction]["recall@5"]
            heading = f"{source}: {direction.replace('_', ' ')} recall@5, %"
            yield heading, Number(100 * recall["value"], _scaled(recall["standard_error"], 100), 1)
        yield f"{source}: chance, %", Number(100 * found["image_to_text"]["recall@5"]["chance"], None, 1)


def _scaled(error: float | None, scale: float) -> float | None:
    return None if error is None else scale * error


def table(
    names: Sequence[str],
    outcomes: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str],
    columns: Sequence[str] = (),
) -> str:
    """A Markdown table of those runs that there are; outcomes are {"parameters", "flops", "evaluation"} by name.

    Args:
      columns: headings of numbers, all there are unless given.
    """
    there = [name for name in names if name in outcomes]
    found = {name: numbers(outcomes[name]["evaluation"]) for name in there}
    columns = columns or list(dict.fromkeys(column for row in found.values() for column in row))
    lines = ["| " + " | ".join(["", "parameters", "TFLOPs", *columns]) + " |", "|---" * (len(columns) + 3) + "|"]
    for name in there:
        about = outcomes[name]
        cells = [str(found[name][column]) if column in found[name] else "" for column in columns]
        size = [f"{about['parameters'] / 1e6:.2f} M", f"{about['flops'] / 1e12:.1f}"]
        lines.append("| " + " | ".join([labels.get(name, name), *size, *cells]) + " |")
    return "\n".join(lines)


def spread(names: Sequence[str], outcomes: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of every number over runs that differ by their seeds; {} of fewer than two."""
    found = [numbers(outcomes[name]["evaluation"]) for name in names if name in outcomes]
    if len(found) < 2:
        return {}
    values = {column: [run[column].value for run in found] for column in found[0]}
    return {column: (float(np.mean(v)), float(np.std(v, ddof=1))) for column, v in values.items()}


def figure(
    groups: Mapping[str, Sequence[str]],
    outcomes: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str],
    noise: Mapping[str, tuple[float, float]],
    columns: Sequence[str],
) -> Figure:
    """A dot for every run and number; the band is two standard deviations of the seeds to either side of their mean."""
    rows = [(title, name) for title, names in groups.items() for name in names if name in outcomes]
    found = {name: numbers(outcomes[name]["evaluation"]) for _, name in rows}
    with matplotlib.rc_context(STYLE | {"font.size": 8}):
        drawn = Figure((2.6 + 1.35 * len(columns), 0.7 + 0.19 * (len(rows) + len(groups))), layout="constrained")
        all_axes = np.atleast_1d(drawn.subplots(1, len(columns), sharey=True))
        places, names, at, last = [], [], 0.0, ""
        for title, name in rows:
            at -= 1 if title == last else 1.8
            last = title
            places.append(at)
            names.append(labels.get(name, name))
        titles = list(groups)
        colours = [COLOURS[titles.index(title) % len(COLOURS)] for title, _ in rows]
        for axes, column in zip(all_axes, columns, strict=True):
            if column in noise:
                mean, deviation = noise[column]
                axes.axvspan(mean - 2 * deviation, mean + 2 * deviation, color=INK, alpha=0.18, linewidth=0)
            for place, (_, name), colour in zip(places, rows, colours, strict=True):
                if column in found[name]:
                    number = found[name][column]
                    axes.errorbar(number.value, place, xerr=number.error, fmt="o", color=colour, markersize=3.5)
            axes.set_title(column, fontsize=8)
            axes.tick_params(axis="y", length=0)
        all_axes[0].set_yticks(places, names)
        return drawn
