"""Writes a page about a study: what was asked, what came out, how sure that is, and every run.

    python -m nmm_jax.scaling.report --runs=runs/study/table.csv --fit=early.json --fit=late.json \\
        --output=runs/study/report.html [--title="Early and late fusion"]

One HTML file that needs nothing else, no network either. The runs are those of a study's table
(nmm_jax.scaling.sweep), or anybody's; the fits are of nmm_jax.scaling.fit. Fits of the same loss are compared.
"""

import dataclasses
import itertools
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jinja2
import numpy as np
from absl import flags
from etils import epath
from markupsafe import Markup, escape

from configs import command_line
from nmm_jax.pages import drawing
from nmm_jax.pages.numbers import count, power
from nmm_jax.scaling import plan, plot, published
from nmm_jax.scaling.fitted import Fit, read
from nmm_jax.scaling.mixtures import at_best
from nmm_jax.scaling.runs import Table, read_table

_AHEAD = (0.1, 1.0, 10.0)  # times the largest budget of all fits: where laws are compared
_GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "lambda": "λ", "delta": "δ", "sum": "Σ"}
_BY_SOURCE = ("E", "alpha", "beta", "a", "b")
_LONG = 12  # letters of a cell that are shown


def render(fits: Sequence[Fit], table: Table, path: str, title: str) -> str:
    """The page."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("nmm_jax", ""), autoescape=True)
    environment.filters |= {
        "power": power,
        "formula": formula,
        "symbol": symbol,
        "digits": lambda value, n: f"{value:.{n}g}".replace("-", "−"),
        "signed": lambda value: f"{value:+.2f}".replace("-", "−"),
    }
    level = next((fit.forecast.level for fit in fits if fit.forecast.draws), None)
    return environment.get_template("scaling/report.html").render(
        title=title,
        facts=facts(table),
        headlines=headlines(fits),
        fits=[_shown(fit) for fit in fits],
        comparison=comparison(fits),
        level=level,
        by_source=_BY_SOURCE,
        kept_back=any(fit.points.held_out.any() for fit in fits),
        runs=_runs(table, path),
        commands=list(dict.fromkeys(fit.command for fit in fits if fit.command)),
    )


def formula(text: str) -> Markup:
    """With exponents raised and Greek letters: E + A/N^alpha."""
    for word, letter in _GREEK.items():
        text = re.sub(rf"\b{word}(?=\b|_)", letter, text)
    text = re.sub(r"(\w)_(\w+(?:,i)?)", r"\1<sub>\2</sub>", str(escape(text)))
    return Markup(re.sub(r"\^(\([^)]*\)|\w+(?:<sub>.*?</sub>)?)", r"<sup>\1</sup>", text))


def symbol(name: str) -> Markup:
    """Of a parameter: C with captions below it for C/h_captions."""
    head, _, domain = name.partition("/")
    letter, _, term = head.partition("_")
    below = ",".join(part for part in (term, domain.removeprefix("h_")) if part)
    return Markup(f"{escape(_GREEK.get(letter, letter))}" + (f"<sub>{escape(below)}</sub>" if below else ""))


def facts(table: Table) -> dict[str, str]:
    """The study in a few words and numbers, of the columns that its table has (results_table.py)."""
    rows = len(next(iter(table.values())))
    found = {"runs": f"{rows}"}
    lost = [cell for cell in table.get("diverged", []) if str(cell).lower() == "true"]
    if lost:
        found["runs"] += f", of which {len(lost)} diverged"
    for column, name in (("architecture", "architectures"), ("mixture", "mixtures"), ("device", "hardware")):
        if kinds := list(dict.fromkeys(str(cell) for cell in table.get(column, []) if cell not in (None, ""))):
            found[name] = ", ".join(kinds)
    for column, name in (("n", "parameters"), ("d", "tokens"), ("c", "FLOPs of a run")):
        if numbers := _numbers(table, column):
            shown = count if column != "c" else power
            found[name] = f"{shown(min(numbers))} to {shown(max(numbers))}"
    if flops := _numbers(table, "flops") or _numbers(table, "c"):
        found["FLOPs of all runs"] = power(sum(flops))
    if seconds := _numbers(table, "seconds"):
        hours = sum(seconds) / 3600
        found["time of all runs"] = f"{hours:,.1f} hours" if hours > 2 else f"{60 * hours:,.0f} minutes"
    if commits := list(dict.fromkeys(str(cell)[:_LONG] for cell in table.get("commit", []) if cell)):
        found["commit"] = ", ".join(commits)
    return found


def headlines(fits: Sequence[Fit]) -> list[tuple[str, str, str]]:
    """(number, interval, what it is) of each fit, a few of the most telling."""
    found = []
    for fit in fits:
        if slope := fit.parameters.get("a"):
            interval = f"[{slope.low:.2f}, {slope.high:.2f}]" if slope.low is not None else ""
            found.append((f"{slope.value:.2f}", interval, f"{fit.name}: the best N grows as C to this power"))
        if fit.held_out_error is not None:
            n = int(fit.points.held_out.sum())
            what = f"{fit.name}: off from the loss of {n} held-out run{'s' * (n > 1)}, the largest N = "
            found.append((f"{fit.held_out_error:.2f}%", "", what + count(fit.points.N[fit.points.held_out].max())))
    return found


def comparison(fits: Sequence[Fit]) -> dict[str, Any] | None:
    """How the least losses of fits differ, of the losses that the first is of; None of one fit."""
    alike = [fit for fit in fits if fit.forecast.data == fits[0].forecast.data]
    if len(alike) < 2:
        return None
    C = float(min(fit.points.C.max() for fit in alike))
    rows = [
        (times * C, plan.differences([at_best(fit.forecast, times * C) for fit in alike], times * C))
        for times in _AHEAD
    ]
    at = rows[1][1]
    with drawing.on_page():
        picture = drawing.to_svg(plot.compare(alike), "comparison of laws")
    return {
        "figure": picture,
        "names": [each["of"] for each in at],
        "rows": rows,
        "verdict": f"Against {alike[0].name}, at {power(C)} FLOPs: "
        + "; ".join(f"{each['of']} is {each['verdict']}" for each in at)
        + ".",
    }


def _shown(fit: Fit) -> dict[str, Any]:
    """A fit's numbers and figures."""
    with drawing.on_page():
        drawn = {name: drawing.to_svg(draw(), f"{fit.name}: {name}") for name, draw in plot.of_fit(fit).items()}
    rows = {row.data: row for row in published.ROWS if row.architecture == fit.forecast.architecture}
    row = rows.get(fit.loss.removeprefix("loss_"), rows.get("mean"))
    beside: dict[str, str] = {}
    if row and fit.forecast.law.name in ("dense", "late"):
        beside = {name: getattr(row, name) for name in ("E", "alpha", "beta")}
        forms = published.closed_forms(row.alpha, row.beta)
        beside |= {name: f"{sum(forms[name]) / 2:.3f}" for name in ("a", "b", "d")}
    return {field.name: getattr(fit, field.name) for field in dataclasses.fields(fit)} | {
        "error": fit.error,
        "held_out_error": fit.held_out_error,
        "figures": drawn,
        "interpolated": not fit.points.parabolas(),
        "published": beside,
        "published_row": f"{row.architecture}, {row.data}" if row else "",
    }


def _runs(table: Table, path: str) -> dict[str, Any]:
    rows = [[_cell(cell) for cell in row] for row in itertools.zip_longest(*table.values())]
    return {"path": path, "columns": list(table), "rows": rows}


def _cell(cell: object) -> str:
    text = "" if cell is None else str(cell)
    try:
        number = float(text)
    except ValueError:
        return text
    return text if number.is_integer() and len(text) < _LONG else f"{number:.5g}"


def _numbers(table: Table, column: str) -> list[float]:
    """The finite numbers of a column."""
    found = []
    for cell in table.get(column, []):
        try:
            found.append(float(cell))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
    return [number for number in found if np.isfinite(number)]


if __name__ == "__main__":
    RUNS = flags.DEFINE_string("runs", None, "the table: CSV or Parquet", required=True)
    FITS = flags.DEFINE_multi_string("fit", None, "the JSON of nmm_jax.scaling.fit; several", required=True)
    OUTPUT = flags.DEFINE_string("output", None, "the page", required=True)
    TITLE = flags.DEFINE_string("title", "Scaling study", "of the page")

    def main(_: list[str]) -> None:
        jax.config.update("jax_platforms", "cpu")  # no accelerator of this machine is touched
        fits = [fit for path in FITS.value for fit in read(path)]
        page = render(fits, read_table(RUNS.value), RUNS.value, TITLE.value)
        epath.Path(OUTPUT.value).write_text(page)
        print(f"wrote {OUTPUT.value}", file=sys.stderr)

    command_line.run(main)
