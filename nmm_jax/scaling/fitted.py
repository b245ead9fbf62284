"""The JSON that nmm_jax.scaling.fit writes, as forecasts to ask and points to draw.

A file has one law, fitted to one loss or to several and their mean. `fit.json` is the mean, or the only one;
`fit.json:loss_captions` is that loss.
"""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from nmm_jax.scaling import runs
from nmm_jax.scaling.forecast import Forecast, Quantity
from nmm_jax.scaling.laws import MIXTURE, law
from nmm_jax.scaling.points import Points

_SAME_SPARSITY = 0.01  # runs whose S differ by less are drawn and planned together


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fit as it stands in its file; of a law of sparsity, at one of its runs' sparsities.

    Attributes:
      loss: the column that was fitted, or the mean of several.
      where: the condition on the rows; "" for all.
      points: the runs, those that were held out among them.
      parameters: and the exponents that follow.
      lawless: what the runs say of themselves: K and c of L = K C^c through their envelope, a and b of parabolas.
      sources: of a mean of several losses, the parameters of each.
    """

    name: str
    loss: str
    where: str
    forecast: Forecast
    points: Points
    parameters: Mapping[str, Quantity]
    warnings: tuple[str, ...]
    command: str
    lawless: Mapping[str, Quantity] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, Mapping[str, Quantity]] = dataclasses.field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """Mean distance of measured and predicted loss of the runs that were fitted, in percent of it."""
        return self.points.error(~self.points.held_out)

    @property
    def held_out_error(self) -> float | None:
        return self.points.error(self.points.held_out)


def read(path_and_loss: str) -> list[Fit]:
    """The fit of a file; of a law of sparsity one for each sparsity of its runs.

    Raises:
      ValueError: the file is no fit, or has no such loss.
    """
    found, path = _record(path_and_loss)
    if "S" not in found["rows"][0]:
        return [_fit(found, path, found["rows"], {})]
    rows = sorted(found["rows"], key=lambda row: row["S"])
    breaks = np.flatnonzero(np.diff([row["S"] for row in rows]) > _SAME_SPARSITY) + 1
    groups = [rows[begin:end] for begin, end in zip([0, *breaks], [*breaks, len(rows)], strict=True)]
    return [_fit(found, path, group, {"S": float(np.median([row["S"] for row in group]))}) for group in groups]


def _record(path_and_loss: str) -> tuple[dict[str, Any], epath.Path]:
    path, _, loss = path_and_loss.partition(".json:")
    path = f"{path}.json" if loss else path_and_loss
    try:
        found = json.loads(epath.Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or not {"law", "parameters", "rows"} <= found.keys():
        raise ValueError(f"{path} is no fit: python -m nmm_jax.scaling.fit --output={path} writes one")
    if loss and loss != found["source"]:
        several = found.get("sources", {})
        if loss not in several:
            raise ValueError(f"{path} has no fit of {loss!r}; it has {', '.join([found['source'], *several])}")
        found = several[loss] | {key: found[key] for key in ("command", "runs") if key in found} | {"chosen": loss}
    return found, epath.Path(path)


def _fit(found: Mapping[str, Any], path: epath.Path, rows: Sequence[Mapping[str, Any]], held: dict[str, float]) -> Fit:
    domains = tuple(found.get("domains", ()))
    fitted = [row for row in rows if not row["held_out"]] or rows
    columns = {name: np.array([row[name] for row in fitted]) for name in fitted[0] if name[0] in "NDC" or "h/" in name}
    name = path.stem + (f" {found['chosen']}" if "chosen" in found else "") + (f" S={held['S']:.2g}" if held else "")
    where = _flag(found.get("command", ""), "where")
    of_others = "".join(f", {column} {kind}" for column, kind in found.get("alike", {}).items())
    forecast = Forecast(
        name=name,
        law=law(found["law"], domains),
        values=found["parameters"],
        source=f"{path}: {found['source']} of {sum(not row['held_out'] for row in found['rows'])} runs",
        draws=_draws(found.get("bootstrap", {}).get("draws", {}), found["parameters"]),
        level=found.get("level", Forecast.level),
        fitted={key: (float(columns[key].min()), float(columns[key].max())) for key in "NDC"},
        per_pair=float(np.median(columns["C"] / (columns["N"] * columns["D"]))),
        held=held,
        mixtures={c: (float(v.min()), float(v.max())) for c, v in columns.items() if c.startswith(MIXTURE)},
        data=f"{found['source']} of {found.get('runs', path)}{of_others}",
        architecture=_architecture(found["law"], where, held),
    )
    return Fit(
        name=name,
        loss=found["source"],
        where=where,
        forecast=forecast,
        points=_points(rows),
        parameters=_parameters(found),
        warnings=tuple(found.get("warnings", ())),
        command=found.get("command", ""),
        lawless=_lawless(found),
        sources={source: _parameters(each) for source, each in found.get("sources", {}).items()},
    )


def _parameters(found: Mapping[str, Any]) -> dict[str, Quantity]:
    values, intervals = found["parameters"] | found.get("exponents", {}), found.get("intervals", {})
    return {name: Quantity(value, *intervals.get(name, ())) for name, value in values.items()}


def _lawless(found: Mapping[str, Any]) -> dict[str, Quantity]:
    frontier, parabolas = found.get("frontier", {}), found.get("isoflop", {})
    values = {name: frontier[name] for name in ("K", "c") if name in frontier}
    values |= {name: parabolas[name]["exponent"] for name in ("a", "b") if name in parabolas}
    intervals = frontier.get("intervals", {}) | parabolas.get("intervals", {})
    return {name: Quantity(value, *intervals.get(name, ())) for name, value in values.items()}


def with_runs(fit: Fit, path: str) -> Fit:
    """With the runs of a table that the fit has not seen, as held-out ones: its own table, grown since.

    Raises:
      ValueError: the fit does not say which columns it was made from, or the table lacks them.
    """
    roles = {name: _flag(fit.command, name) for name in ("n", "d", "compute", "sparsity", "n_vision", "d_vision")}
    losses, mixture = (tuple(filter(None, _flag(fit.command, name).split(","))) for name in ("loss", "mixture"))
    if not roles["n"] or not losses:
        raise ValueError(f"{fit.name} has no command that names its columns, so {path} cannot be read as its table was")
    found = runs.read(path, runs.Roles(**roles, losses=losses, mixture=mixture, where=fit.where))
    loss, predicted = found.losses[fit.loss], fit.forecast.law.predict(fit.forecast.values, found.columns)
    seen = set(zip(fit.points.N, fit.points.D, fit.points.loss, strict=True))
    N, D, C = (found.columns[name] for name in "NDC")
    new = np.array([run not in seen for run in zip(N, D, loss, strict=True)])
    if "S" in found.columns:
        new &= np.abs(found.columns["S"] - fit.forecast.held["S"]) <= _SAME_SPARSITY
    shares = {name: column for name, column in found.columns.items() if name.startswith(MIXTURE)}
    points = Points(N, D, C, loss, predicted, np.ones(len(loss), bool), shares).take(np.flatnonzero(new))
    return dataclasses.replace(fit, points=fit.points.joined(points))


def _draws(drawn: Mapping[str, Sequence[float | None]], names: Mapping[str, float]) -> tuple[dict[str, float], ...]:
    """Parameters draw by draw; what is not finite is null in the file."""
    if not drawn:
        return ()
    columns = [[math.nan if value is None else value for value in drawn[name]] for name in names]
    return tuple(dict(zip(names, draw, strict=True)) for draw in zip(*columns, strict=True))


def _points(rows: Sequence[Mapping[str, Any]]) -> Points:
    rows = sorted(rows, key=lambda row: (row["N"], row["D"]))
    N, D, C, loss, predicted = (np.array([row[key] for row in rows]) for key in ("N", "D", "C", "loss", "predicted"))
    shares = {key: np.array([row[key] for row in rows]) for key in rows[0] if key.startswith(MIXTURE)}
    return Points(N, D, C, loss, predicted, np.array([row["held_out"] for row in rows]), shares)


def _flag(command: str, name: str) -> str:
    """The value of a flag in a command, "" if it has none."""
    words = iter(shlex.split(command))
    for word in words:
        flag, equals, value = word.lstrip("-").partition("=")
        if word.startswith("--") and flag == name:
            return value if equals else next(words, "")
    return ""


def _architecture(name: str, where: str, held: Mapping[str, float]) -> str:
    """Whose configs a plan looks at: what the rows were chosen by, or what the law is of."""
    chosen = re.search(r"architecture\s*==\s*['\"]?(early|late|moe)", where)
    if chosen:
        return chosen[1]
    return "late" if name == "late" else "moe" if held.get("S", 0) > _SAME_SPARSITY else "early"
