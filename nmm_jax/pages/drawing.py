"""How figures look: on a page in its own text colour, light or dark, and in files on white.

    with drawing.on_page():                         with drawing.on_paper():
        svg = drawing.to_svg(figure(...), title)        drawing.save(figure(...), folder / "name", title)

A figure asks `ink()` for the colour of text and lines, and takes its others from COLOURS and SIZES.
"""

import contextlib
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

# Told apart by colour-blind readers (after Okabe and Ito), legible on white and on near-black.
COLOURS = ("#2a7fbf", "#d9641e", "#1f9e77", "#b765a8", "#c89a1a", "#5b6ee1")
SIZES: Colormap = (
    LinearSegmentedColormap.from_list(  # small to large: cividis is for all eyes; viridis tells more apart
        "sizes", matplotlib.colormaps["viridis"].resampled(256)([0.1 + 0.67 * i / 63 for i in range(64)])
    )
)
_INK = "#7f8081"  # stands for the page's own text colour until the figure is in the page
_DARK = "#2a2e35"
_DPI = 160


def _style(ink: str) -> Any:  # matplotlib's rc parameters
    return {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "grid.color": ink,
        "grid.alpha": 0.15,
        "grid.linewidth": 0.6,
        "xtick.color": ink,
        "ytick.color": ink,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }


@contextlib.contextmanager
def on_page() -> Iterator[None]:
    """Figures made within are for to_svg."""
    with matplotlib.rc_context(_style(_INK)):
        yield


@contextlib.contextmanager
def on_paper() -> Iterator[None]:
    """Figures made within are for save."""
    with matplotlib.rc_context(_style(_DARK)):
        yield


def ink() -> str:
    """The colour of text."""
    return matplotlib.rcParams["text.color"]


def to_svg(figure: Figure, title: str) -> str:
    """An element for a page, whose ids are this figure's alone, and the same every time."""
    text = _svg(figure, title)
    return text[text.index("<svg") :].replace(_INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)


def save(figure: Figure, path: pathlib.Path, title: str) -> None:
    """Writes path.png and path.svg; the latter with the text as text."""
    figure.patch.set(alpha=1, facecolor="white")
    figure.savefig(path.with_suffix(".png"), dpi=_DPI)
    path.with_suffix(".svg").write_text(_svg(figure, title), encoding="utf-8")


def _svg(figure: Figure, title: str) -> str:
    matplotlib.rcParams["svg.hashsalt"] = title
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Title": title, "Date": None})
    return file.getvalue()
