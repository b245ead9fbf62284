"""Fits a law of the loss to a table of runs, anyone's: a CSV or Parquet file with one run a row.

    python -m nmm_jax.scaling.fit --runs=table.csv --n=params --d=tokens --loss=loss --output=fit.json
    python -m nmm_jax.scaling.fit --runs=table.csv --n=params --compute=flops --loss=loss/captions,loss/text \\
        --law=dense,overtraining --held_out='N>2e9' --bootstrap=100 --output=fit.json

Laws (nmm_jax/scaling/laws.py): dense, late, sparse (with --sparsity), overtraining, mixture-additive and mixture-joint
(with --mixture), frontier (through the runs on the lower hull of loss and compute). Of several losses each has its own
fit, and so has their mean, which comes first in the file. Of several laws the first is told in full, and all are
compared by the runs that --held_out keeps from them.

The file has the parameters (E, A, B, alpha, beta, ...), `objective`, `intervals` (of --bootstrap), `exponents` of the
optimum, the resampled parameters, every run with its residual, errors, and warnings; `record` makes it.
"""

import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Int
from tqdm import tqdm

from configs import command_line
from nmm_jax.scaling import checks, conditioning, fitting, frontier, laws
from nmm_jax.scaling.fitting import Fit
from nmm_jax.scaling.laws import Law
from nmm_jax.scaling.minimization import OBJECTIVES, Report
from nmm_jax.scaling.runs import MEAN, Roles, Runs, TableError, read

Doing = Callable[[str], Report | None]  # told what begins, says whom to report to

_MINIMA = 5  # different ones, that are told
_LAWLESS = {"frontier": ("K", "c"), "isoflop": ("a", "b")}  # that have intervals without a law
_TOLD = {"frontier": "L = K C^c of the envelope", "isoflop": "of IsoFLOP parabolas"}
_OFTEN = 0.9  # of resampled tables, that have to have a frontier or parabolas for an interval to be told
_FEW = 5  # held-out runs that are told one by one
_ALIKE = 1e-4  # relative difference of objectives of one minimum


def progress(doing: str) -> Report:
    """A bar on a terminal."""
    bar = tqdm(desc=doing, unit="fit", disable=None, leave=False)

    def report(done: int, total: int) -> None:
        bar.total, bar.n = total, done
        bar.refresh()
        if done == total:
            bar.close()

    return report


def fit_table(
    path: str, roles: Roles, names: Sequence[str], how: str, count: int, report: Doing = lambda doing: None
) -> dict[str, Any]:
    """The record of the first law, and how all of them compare.

    Raises:
      TableError, ValueError: what was asked for contradicts itself or the table.
    """
    chosen = [laws.law(name, roles.mixture if name in laws.OF_MIXTURES else ()) for name in names]
    if len(chosen) > 1 and not roles.held_out:
        raise TableError("--law names several: they are compared by runs kept from them, so give --held_out")
    if any("S" in law.columns for law in chosen) and not roles.sparsity:
        raise TableError("--sparsity: the law 'sparse' needs the column of S")
    runs = read(path, roles)
    if roles.held_out and (runs.held_out.all() or not runs.held_out.any()):
        raise TableError(f"--held_out={roles.held_out!r} holds {runs.held_out.sum()} of {len(runs)} runs out")
    records = [fit_runs(law, runs, how, 0 if n else count, report) for n, law in enumerate(chosen)]
    return records[0] | ({"comparison": compare(records)} if len(records) > 1 else {})


def fit_runs(law: Law, runs: Runs, how: str, count: int, report: Doing = lambda doing: None) -> dict[str, Any]:
    """The record of a law and all losses of the runs; of several the mean is the record, and has `sources`.

    Args:
      count: of resampled tables; 0 for no intervals.
    """
    told = list(runs.warnings)
    training = runs.take(~runs.held_out)
    if law.name == "frontier":
        training, left = on_frontier(training)
        told.append(f"{left} runs that are not on the lower hull of loss and compute are not fitted")
    told += checks.check(law, training)
    fits = fitting.fit(law, training.columns, np.array(list(training.losses.values())), how, report=report("fit"))
    draws = fitting.bootstrap(fits, count, report=report("bootstrap")) if count else [None] * len(fits)
    records = {
        source: record(found, source, training, runs.take(runs.held_out), drawn, told)
        for source, found, drawn in zip(training.losses, fits, draws, strict=True)
    }
    if len(records) == 1:
        return next(iter(records.values()))
    return records[MEAN] | {"sources": {source: r for source, r in records.items() if source != MEAN}}


def on_frontier(runs: Runs) -> tuple[Runs, int]:
    """The runs on the lower hull of the loss, of several of their mean; and how many are not."""
    loss = list(runs.losses.values())[-1]
    kept = np.zeros(len(runs), bool)
    kept[frontier.lower_hull(np.log(runs.columns["C"]), np.log(loss))] = True
    return runs.take(kept), int((~kept).sum())


def record(
    fit: Fit, source: str, training: Runs, held_out: Runs, draws: np.ndarray | None, told: Sequence[str]
) -> dict[str, Any]:
    """What is known of one fit, ready for JSON."""
    about = conditioning.condition(fit, draws)
    warnings = [*told, *about.warnings]
    for i, wrong in conditioning.diverged(fit).items():
        warnings.append(f"{training.labels[i]} looks diverged: {wrong}; --where can leave it out")
    found: dict[str, Any] = {
        "law": fit.law.name,
        "formula": fit.law.formula,
        "domains": [c.removeprefix(laws.MIXTURE) for c in fit.law.columns if c.startswith(laws.MIXTURE)],
        "source": source,
        "alike": dict(training.alike),
        **fit.values,
        "parameters": fit.values,
        "exponents": fit.exponents,
        "minimized": fit.how,
        "objective": fit.objective,
        "starts": {"count": len(fit.starts), "agreed": int(fit.agreed.sum()), "minima": minima(fit)},
        "conditioning": {
            "condition_number": about.condition_number,
            "standard_errors": about.standard_errors,
            "undetermined": list(about.undetermined),
            "correlations": dict(zip(fit.law.parameters, about.correlations.tolist(), strict=True)),
        },
    }
    if draws is not None:
        drawn = fit.law.values(draws)
        found["level"] = fitting.LEVEL
        found["intervals"] = {name: list(ends) for name, ends in fitting.intervals(fit, draws).items()}
        found["bootstrap"] = {
            "count": len(draws),
            "draws": {name: v.tolist() for name, v in (drawn | fit.law.exponents(drawn)).items()},
        }
    found["errors"] = {"fitted": fitting.errors(fit.loss, fit.predict(fit.columns))}
    rows = [*_rows(fit, source, training, False)]
    if len(held_out):
        loss = held_out.losses[source]
        found["errors"]["held_out"] = fitting.errors(loss, fit.predict(held_out.columns)) | {"runs": len(loss)}
        rows += _rows(fit, source, held_out, True)
    resampled = fitting.resampled(len(training), 0 if draws is None else len(draws), len(fit.fitted))
    return found | {"rows": rows, "warnings": warnings} | measured(training, source, resampled)


def minima(fit: Fit) -> list[dict[str, Any]]:
    """The lowest different minima that the starts came to, each with how many of them."""
    order = np.argsort(fit.objectives, kind="stable")
    found: list[dict[str, Any]] = []
    for i in order[np.isfinite(fit.objectives[order])]:
        if found and fit.objectives[i] <= found[-1]["objective"] * (1 + _ALIKE):
            found[-1]["starts"] += 1
        elif len(found) == _MINIMA:
            break
        else:
            parameters = {name: float(value) for name, value in fit.law.values(fit.ends[i]).items()}
            found.append({"objective": float(fit.objectives[i]), "starts": 1, "parameters": parameters})
    return found


def measured(runs: Runs, source: str, resampled: Int[np.ndarray, "count n"]) -> dict[str, Any]:
    """What the runs say of themselves, without a law: the frontier, and a parabola for each budget.

    Args:
      resampled: how often each run is in each of the tables that intervals are of; none for no intervals.
    """
    columns = *(runs.columns[name] for name in "NDC"), runs.losses[source]
    found, _ = _read_off(*columns)
    drawn = [_read_off(*(np.repeat(column, times) for column in columns))[1] for times in resampled]
    for part, names in _LAWLESS.items():
        values = {name: [one[name] for one in drawn if name in one] for name in names}
        if part in found and drawn and min(map(len, values.values())) >= _OFTEN * len(drawn):
            found[part]["intervals"] = {name: fitting.percentiles(np.array(each)) for name, each in values.items()}
    return found


def _read_off(N: np.ndarray, D: np.ndarray, C: np.ndarray, loss: np.ndarray) -> tuple[dict[str, Any], dict[str, float]]:
    """What `measured` tells without intervals, and the numbers among it by the names of _LAWLESS."""
    hull = frontier.envelope(N, C, loss)
    found: dict[str, Any] = {}
    numbers: dict[str, float] = {}
    if len(hull.C) > 2:
        K, c, error = frontier.power_law(hull.C, hull.loss)
        points = [dict(zip(hull._fields, map(float, point), strict=True)) for point in zip(*hull, strict=True)]
        found["frontier"] = {"K": K, "c": c, "standard_error": error, "points": points}
        numbers |= {"K": K, "c": c}
    if parabolas := frontier.isoflop(N, D, C, loss):
        exponents = frontier.isoflop_exponents(parabolas)
        found["isoflop"] = {"budgets": [budget._asdict() for budget in parabolas]}
        found["isoflop"] |= {name: law._asdict() for name, law in exponents.items()}
        numbers |= {name: law.exponent for name, law in exponents.items()}
    return found, numbers


def _rows(fit: Fit, source: str, runs: Runs, held_out: bool) -> list[dict[str, Any]]:
    predicted, loss = fit.predict(runs.columns), runs.losses[source]
    return [
        {
            "run": label,
            **{name: float(column[n]) for name, column in runs.columns.items()},
            "source": source,
            "loss": float(loss[n]),
            "predicted": float(predicted[n]),
            "residual": float(np.log(loss[n] / predicted[n])),
            "held_out": held_out,
        }
        for n, label in enumerate(runs.labels)
    ]


def compare(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Laws by their error on the runs held out, the best first."""
    rows = [{name: r[name] for name in ("law", "source", "parameters", "objective", "errors")} for r in records]
    return sorted(rows, key=lambda row: row["errors"]["held_out"]["mse"])


def table(found: Mapping[str, Any]) -> str:
    """The record for a reader: a column for each source."""
    columns = {found["source"]: found} | found.get("sources", {})
    heads = [found["law"], *columns]
    lines = []
    for name in (*found["parameters"], *found["exponents"]):
        lines.append([name, *(_with_interval(r, name) for r in columns.values())])
    lines.append([f"objective ({found['minimized']})", *(f"{r['objective']:.9g}" for r in columns.values())])
    for part, names in _LAWLESS.items():
        for name in names:
            cells = [_lawless(r, part, name) for r in columns.values()]
            lines += [[f"{name}, {_TOLD[part]}", *cells]] if any(cells) else []
    agreed = [f"{r['starts']['agreed']} of {r['starts']['count']}" for r in columns.values()]
    lines.append(["starts that agree", *agreed])
    for which, what in (("fitted", "fitted"), ("held_out", "held out")):
        if which in found["errors"]:
            runs = [sum(row["held_out"] == (which == "held_out") for row in r["rows"]) for r in columns.values()]
            lines.append([f"runs, {what}", *map(str, runs)])
            lines.append(
                [f"mean error, {what}, %", *(f"{r['errors'][which]['mae_percent']:.4f}" for r in columns.values())]
            )
    widths = [max(map(len, cells)) for cells in zip(heads, *lines, strict=True)]
    shown = [f"L = {found['formula']}", ""]
    shown += [
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in (heads, *lines)
    ]
    for row in found.get("comparison", ()):
        held, p = row["errors"]["held_out"], len(row["parameters"])
        shown.append(f"{row['law']}, {p} parameters: held-out mse {held['mse']:.3e}, {held['mae_percent']:.4f} %")
    kept = [row for row in found["rows"] if row["held_out"]]
    for row in kept if len(kept) <= _FEW else ():
        off = 100 * (row["predicted"] / row["loss"] - 1)
        told_of = f"{row['run']}: {row['source']} {row['loss']:.4f}, predicted {row['predicted']:.4f}"
        shown.append(f"held out: {told_of}, {off:+.4f} %")
    told = dict.fromkeys(w for r in columns.values() for w in r["warnings"])
    return "\n".join([*shown, *(f"warning: {w}" for w in told)])


def _with_interval(found: Mapping[str, Any], name: str) -> str:
    value = found["parameters"].get(name, found["exponents"].get(name))
    return _cell(value, found.get("intervals", {}).get(name))


def _lawless(found: Mapping[str, Any], part: str, name: str) -> str:
    """Of what the runs say without a law; "" where they do not."""
    value = found.get(part, {}).get(name)
    if value is None:
        return ""
    number = value["exponent"] if part == "isoflop" else value
    return _cell(number, found[part].get("intervals", {}).get(name))


def _cell(value: float, ends: Sequence[float] | None) -> str:
    return f"{value:.5g}" + (f" [{ends[0]:.4g}, {ends[1]:.4g}]" if ends else "")


def finite(value: Any) -> Any:
    """For JSON, which has no infinities: they become null."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    RUNS = flags.DEFINE_string("runs", None, "CSV or Parquet file, one run a row", required=True)
    N = flags.DEFINE_string("n", None, "column of N, parameters", required=True)
    D = flags.DEFINE_string("d", "", "column of D, training tokens")
    COMPUTE = flags.DEFINE_string("compute", "", "column of training FLOPs; without --d, D is C/(6 N)")
    LOSS = flags.DEFINE_list(
        "loss", None, "column of the loss, or several: each is fitted, and their mean", required=True
    )
    LAW = flags.DEFINE_list("law", ["dense"], f"of {', '.join(laws.LAWS)}; several are compared")
    SPARSITY = flags.DEFINE_string("sparsity", "", "column of S, one minus the active share of the experts")
    MIXTURE = flags.DEFINE_list("mixture", [], "columns of the domains' shares, which sum to 1")
    N_VISION = flags.DEFINE_string("n_vision", "", "column of those of N that are in a vision tower")
    D_VISION = flags.DEFINE_string("d_vision", "", "column of the tokens that the tower sees")
    WHERE = flags.DEFINE_string("where", "", "rows to read, as 'dataset==c4 and N<1e9'")
    HELD_OUT = flags.DEFINE_string(
        "held_out", "", "rows to predict and not to fit: a condition, or a column of true and false"
    )
    OBJECTIVE = flags.DEFINE_enum("objective", "huber", OBJECTIVES, "Huber of log loss, or squares of the loss")
    BOOTSTRAP = flags.DEFINE_integer("bootstrap", 0, "resampled tables, for intervals", 0)
    OUTPUT = flags.DEFINE_string("output", None, "JSON file to write", required=True)

    def main(_: list[str]) -> None:
        jax.config.update("jax_platforms", "cpu")  # no accelerator of this machine is touched
        output = epath.Path(OUTPUT.value)
        output.parent.mkdir(parents=True, exist_ok=True)
        roles = Roles(
            n=N.value, d=D.value, compute=COMPUTE.value, losses=tuple(LOSS.value), sparsity=SPARSITY.value,
            mixture=tuple(MIXTURE.value), n_vision=N_VISION.value, d_vision=D_VISION.value, where=WHERE.value,
            held_out=HELD_OUT.value,
        )  # fmt: skip
        found = fit_table(RUNS.value, roles, LAW.value, OBJECTIVE.value, BOOTSTRAP.value, progress)
        about = {"command": shlex.join(["python", "-m", "nmm_jax.scaling.fit", *sys.argv[1:]]), "runs": RUNS.value}
        output.write_text(json.dumps(finite(about | found), indent=1, allow_nan=False) + "\n")
        print(table(found))

    command_line.run(main)
