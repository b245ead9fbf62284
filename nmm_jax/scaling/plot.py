"""Draws the figures of fits: PNG for documents, SVG for pages.

    python -m nmm_jax.scaling.plot --fit=early.json [--fit=late.json] [--law=published:early-mean] --output=figures
    python -m nmm_jax.scaling.plot --runs=runs/study/table.csv --fit=early.json --output=figures

Writes NAME-frontier, -isoflop, -optimum, -residuals, -bootstrap, -held_out and -mixture of each fit NAME.json, as far
as there is something to draw, and `comparison` of several fits of the same losses. Frontiers of other laws are dashed.
With --runs the runs of that table that the fits have not seen are drawn too, as held-out ones.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from configs import command_line
from nmm_jax.pages import drawing
from nmm_jax.pages.numbers import power
from nmm_jax.scaling import figures
from nmm_jax.scaling.fitted import Fit, read, with_runs
from nmm_jax.scaling.forecast import Forecast, of_published
from nmm_jax.scaling.mixtures import at_best, losses_of
from nmm_jax.scaling.points import Points

Draw = Callable[[], Figure]


def of_fit(fit: Fit, references: Sequence[Forecast] = ()) -> dict[str, Draw]:
    """What there is to draw of a fit, by name."""
    points, forecast = fit.points, at_best(fit.forecast, float(fit.points.C.max()))
    found: dict[str, Draw] = {"frontier": lambda: figures.frontier(points, forecast, references)}
    in_budgets = points if points.parabolas() else points.at_budgets()
    if forecast.mixtures:  # runs of one budget differ by more than their sizes
        in_budgets = points.take(np.zeros(0, int))
    if forecast.has_sizes:
        found["optimum"] = lambda: figures.optimum(points, forecast, in_budgets)
    if in_budgets.parabolas():
        found["isoflop"] = lambda: figures.isoflop(in_budgets)
    found["residuals"] = lambda: figures.residuals(points)
    if points.held_out.any():
        found["held_out"] = lambda: figures.held_out(points, forecast)
    if forecast.draws:
        found["bootstrap"] = lambda: figures.bootstrap(forecast)
    if len(forecast.mixtures) == 3:
        found["mixture"] = lambda: _mixture(points, forecast)
    return found


def compare(fits: Sequence[Fit]) -> Figure:
    """The frontiers of several fits, from a tenth of the least of their largest budgets to ten times it."""
    C = float(min(fit.points.C.max() for fit in fits))
    return figures.comparison([at_best(fit.forecast, C) for fit in fits], (C / 10, 10 * C))


def _mixture(points: Points, forecast: Forecast) -> Figure:
    """At the largest budget of the runs."""
    C = float(points.C.max())
    return figures.mixture(
        points,
        lambda shares: losses_of(forecast, C, forecast.values, shares),
        forecast.held,
        f"predicted loss of {power(C)} FLOPs, above the least",
    )


if __name__ == "__main__":
    FITS = flags.DEFINE_multi_string("fit", None, "the JSON of nmm_jax.scaling.fit", required=True)
    RUNS = flags.DEFINE_string(
        "runs", "", "a table with the columns of the fits' own: runs made since are held-out ones"
    )
    LAWS = flags.DEFINE_multi_string("law", [], "published:NAME, to draw beside them")
    OUTPUT = flags.DEFINE_string("output", None, "folder for the pictures", required=True)

    def main(_: list[str]) -> None:
        jax.config.update("jax_platforms", "cpu")  # no accelerator of this machine is touched
        references = [of_published(name.removeprefix("published:")) for name in LAWS.value]
        fits = [fit for path in FITS.value for fit in read(path)]
        if RUNS.value:
            fits = [with_runs(fit, RUNS.value) for fit in fits]
        folder = pathlib.Path(OUTPUT.value)
        folder.mkdir(parents=True, exist_ok=True)
        with drawing.on_paper():
            for fit in fits:
                for name, draw in of_fit(fit, references).items():
                    drawing.save(draw(), folder / f"{fit.name}-{name}", f"{fit.name}: {name}")
                    print(f"wrote {folder / fit.name}-{name}.png, .svg", file=sys.stderr)
            if len(fits) > 1 and len({fit.forecast.data for fit in fits}) == 1:
                drawing.save(compare(fits), folder / "comparison", "comparison")

    command_line.run(main)
