"""Figures of where routers sent their tokens, as SVG for a page; drawn from the JSON of nmm_jax/routing.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nmm_jax.evaluation.figures import COLOURS, INK, STYLE, to_svg

_ANNOTATED = 16  # experts, with their numbers in the cells
_WIDTH = 8.6  # inches; the page scales it to its own width
_OCTAVES = 2  # loads are coloured from 1/4 to 4 times the even share
_LABELLED = 32  # experts or layers that have room for a label each

Found = Mapping[str, Any]


def image_shares(found: Found) -> str:
    """Heatmaps, one a source of both modalities, of the share of images among each expert's tokens."""
    both = {name: one for name, one in _panels(found).items() if _mixed(one)}
    if not both:
        return ""
    panels = {name: 100 * _array(one["image_share"]) for name, one in both.items()}
    titles = {name: f"{name} ({_images(one):.0%} images)" for name, one in both.items()}
    colours = {"cmap": "PuOr_r", "vmin": 0, "vmax": 100}
    label = "images among an expert's tokens (%)"
    return _heatmaps(found, panels, titles, colours, label, "{:.0f}".format, "Share of images by expert")


def loads(found: Found) -> str:
    """Heatmaps, one a source, of each expert's tokens relative to the mean of all experts."""
    count = found["experts"]["count"]
    relative = {name: count * _array(one["load"]["all"]) for name, one in _panels(found).items()}
    with np.errstate(divide="ignore"):
        panels = {name: np.log2(np.where(one > 0, one, np.nan)) for name, one in relative.items()}
    colours = {"cmap": "RdBu_r", "vmin": -_OCTAVES, "vmax": _OCTAVES}
    label = "tokens at an expert / mean of all experts"

    def times(octaves: float) -> str:
        return f"{2**octaves:.1f}" if octaves < 3.3 else f"{2**octaves:.0f}"

    return _heatmaps(found, panels, {name: name for name in panels}, colours, label, times, "Load by expert")


def by_layer(found: Found) -> str:
    """Specialisation in both definitions, entropy and imbalance against the layer, a line for each source."""
    layers, count = found["experts"]["layers"], found["experts"]["count"]
    with matplotlib.rc_context(STYLE):
        figure = Figure((_WIDTH, 5.4), layout="constrained")
        figure.patch.set_alpha(0)
        (score, deviation), (entropy, imbalance) = figure.subplots(2, 2, gridspec_kw={"hspace": 0.1})
        for (name, one), colour in zip(_panels(found).items(), _line_colours(found), strict=True):
            # All sources lie below the single ones, to which they are often close.
            zorder = 3 if name in found["sources"] else 2
            line = {"color": colour, "marker": "o", "markersize": 3, "clip_on": False, "zorder": zorder}
            if _mixed(one):
                score.plot(layers, _array(one["specialisation"]), **line)
                score.axhline(one["specialisation_baseline"], color=colour, linewidth=1, linestyle=":")
            deviation.plot(layers, count * _array(one["deviation"]["mean"]), label=name, **line)
            for modality, style in (("text", "-"), ("image", "--")):
                entropy.plot(layers, _array(one["entropy_share"][modality]), linestyle=style, **line)
            imbalance.plot(layers, _array(one["imbalance"]), **line)
        score.set_title("specialisation: 1 − H(image share)")
        deviation.set_title("specialisation: deviation from uniform (1/E is 1)")
        entropy.set_title("router entropy / the largest possible")
        imbalance.set_title("busiest expert / mean of all experts")
        for axes in (score, entropy):
            axes.set_ylim(0, 1)
        for axes in (deviation, imbalance):
            axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
        imbalance.axhline(1, color=INK, linewidth=1, linestyle=":")
        if found["experts"]["modality"] == "fixed":
            entropy.text(0.5, 0.5, "no router", transform=entropy.transAxes, ha="center", va="center")
        for axes in (score, deviation, entropy, imbalance):
            axes.patch.set_alpha(0)
            axes.set_xlabel("layer")
            axes.set_xlim(min(layers) - 0.3, max(layers) + 0.3)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.title.set_fontsize(9.5)
        figure.legend(
            *deviation.get_legend_handles_labels(), loc="outside upper center", ncols=len(found["sources"]) + 1
        )
        return to_svg(figure, "Routing by layer")


def _heatmaps(
    found: Found,
    panels: Mapping[str, Float[np.ndarray, "L E"]],
    titles: Mapping[str, str],
    colours: Mapping[str, Any],
    label: str,
    text: Any,
    title: str,
) -> str:
    """Layers down, experts across; hatched where an expert has no tokens. `text` writes a cell's number."""
    experts = found["experts"]
    columns = max(1, min(len(panels), 2 * _ANNOTATED // experts["count"]))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "hatch.color": INK, "hatch.linewidth": 0.7}):
        height = rows * (0.7 + max(0.5, 0.17 * len(experts["layers"]))) + 0.7
        figure = Figure((_WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (name, panel) in zip(all_axes, panels.items(), strict=False):
            shown = axes.imshow(panel, interpolation="none", aspect="auto", **colours)
            axes.set_title(titles[name], fontsize=9)
            _cells(axes, experts)
            if experts["count"] <= _ANNOTATED:
                _annotate(axes, panel, shown, text)
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        bar = figure.colorbar(
            shown, ax=all_axes, location="bottom", shrink=0.5, aspect=40, pad=0.15 / height, label=label
        )
        if colours["vmin"] < 0:
            octaves = range(-_OCTAVES, _OCTAVES + 1)
            names = {-2: "≤ ¼", -1: "½", 0: "1", 1: "2", 2: "≥ 4"}
            bar.set_ticks(list(octaves), labels=[names[octave] for octave in octaves])
        bar.outline.set_visible(False)
        return to_svg(figure, title)


def _cells(axes: Axes, experts: Found) -> None:
    """The frame of a heatmap: names of layers and experts, the border between text's and images' experts."""
    layers, labels = experts["layers"], experts["labels"]
    axes.patch.set(facecolor="none", hatch="//////", edgecolor=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7.5)
    for axis, names in ((axes.xaxis, labels), (axes.yaxis, layers)):
        step = 1 if len(names) <= _LABELLED else 4
        axis.set_ticks(range(0, len(names), step), labels=names[::step])
    axes.set_xlabel("expert", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    if experts["image"]:
        axes.axvline(experts["count"] - experts["image"] - 0.5, color=INK, linewidth=1.5)


def _annotate(axes: Axes, panel: Float[np.ndarray, "L E"], shown: Any, text: Any) -> None:
    for (y, x), value in np.ndenumerate(panel):
        if not np.isnan(value):
            red, green, blue, _ = shown.cmap(shown.norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            colour = "#1d2025" if light else "#ffffff"
            axes.text(x, y, text(value), color=colour, fontsize=6.8, ha="center", va="center_baseline")


def _panels(found: Found) -> dict[str, Found]:
    """Every source, and all together unless there is but one."""
    return {**found["sources"], **({"all sources": found["all"]} if len(found["sources"]) > 1 else {})}


def _line_colours(found: Found) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(found["sources"]))] + [INK] * (len(found["sources"]) > 1)


def _mixed(one: Found) -> bool:
    """Whether there are both text and images; of one alone, experts see that one."""
    return all(one["tokens"].values())


def _images(one: Found) -> float:
    return one["tokens"]["image"] / sum(one["tokens"].values())


def _array(values: Sequence[Any]) -> np.ndarray:
    return np.array(values, np.float64)  # None becomes NaN
