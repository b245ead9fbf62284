"""A table of runs, as anyone keeps it: a CSV or Parquet file, one run a row, its columns named by flags.

What cannot be fitted is refused by name; what can be repaired is repaired and told. Rows are counted from 1, the header
not among them, and carry their `name` or `run` where the table has such a column.
"""

import csv
import dataclasses
import difflib
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Float

from nmm_jax.scaling.laws import MIXTURE
from nmm_jax.scaling.optima import FLOPS

MEAN = "mean"  # of several losses of a run, unweighted
_NAMES, _DIVERGED = ("name", "run"), "diverged"  # columns that are looked at if they are there
# Columns that must not differ, losses of others are of something else: as a study's table calls them, and others do.
_ALIKE = re.compile(
    r"tokeni[sz]er(name|hash|fingerprint)?|vocab(ulary)?(size)?"
    r"|(validation|valid|val|eval|evaluation)(set|data|dataset|fingerprint)|validation"
)
_SHOWN = 8  # rows of a message
_SUM_TO_ONE = 0.01
_NO_LETTERS = re.compile(r"[^a-z]")
_CONDITION = re.compile(r"\s*(.+?)\s*(==|!=|>=|<=|>|<)\s*(.+?)\s*")
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no", "none", "")

Table = Mapping[str, Sequence[object]]  # columns of cells, as they stand in the file


class TableError(ValueError):
    """A table that cannot be fitted as it is."""


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which columns of a table are what.

    Attributes:
      n, d, compute: N, D and training FLOPs. D may be missing where `compute` is there.
      losses: one or several; of several their mean is fitted as well.
      sparsity: S, one minus the active share of the experts.
      mixture: shares of the domains.
      n_vision, d_vision: of N in a vision tower, and the tokens that the tower sees: C = 6 (N_v D_v + (N - N_v) D).
      where: a condition on the rows that are read; "" for all.
      held_out: a condition on rows that are predicted and not fitted, or a column that says so; "" for none.
    """

    n: str
    losses: tuple[str, ...]
    d: str = ""
    compute: str = ""
    sparsity: str = ""
    mixture: tuple[str, ...] = ()
    n_vision: str = ""
    d_vision: str = ""
    where: str = ""
    held_out: str = ""


@dataclasses.dataclass(frozen=True)
class Runs:
    """What is fitted.

    Attributes:
      columns: N, D, C, and S, h/<domain>, N_v, D_v where they were asked for.
      losses: by column, and MEAN of several.
      labels: how messages name each row.
      held_out: rows that are predicted and not fitted.
      warnings: what was repaired.
      alike: tokenizer and validation set of all of them, as far as the table says.
    """

    columns: dict[str, Float[np.ndarray, "n"]]
    losses: dict[str, Float[np.ndarray, "n"]]
    labels: tuple[str, ...]
    held_out: Bool[np.ndarray, "n"]
    warnings: tuple[str, ...] = ()
    alike: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Bool[np.ndarray, "n"]) -> "Runs":
        return Runs(
            {name: column[rows] for name, column in self.columns.items()},
            {name: loss[rows] for name, loss in self.losses.items()},
            tuple(label for label, taken in zip(self.labels, rows, strict=True) if taken),
            self.held_out[rows],
            self.warnings,
            self.alike,
        )


def read_table(path: str) -> Table:
    """The columns of a file.

    Raises:
      TableError: it has no rows, or rows of more cells than columns.
      ImportError: it is Parquet, and pyarrow is not installed.
    """
    file = epath.Path(path)
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(
                f"{path} is Parquet: reading it needs pyarrow (pip install 'nmm_jax[convert]')"
            ) from error
        with file.open("rb") as f:
            table = pyarrow.parquet.read_table(f).to_pydict()
    else:
        text = file.read_text().removeprefix("\ufeff")  # with which spreadsheets begin
        rows = csv.DictReader(io.StringIO(text), delimiter=_delimiter(text.partition("\n")[0]))
        lines = list(rows)
        if uneven := [n for n, line in enumerate(lines, 1) if None in line or None in line.values()]:
            raise TableError(f"{path}: {_listed(f'row {n}' for n in uneven)}: not as many cells as the header")
        table = {name.strip(): [line[name] for line in lines] for name in rows.fieldnames or ()}
    if not table or not len(next(iter(table.values()))):
        raise TableError(f"{path} has no rows")
    return table


def _delimiter(header: str) -> str:
    return "\t" if "\t" in header else ";" if ";" in header and "," not in header else ","


def read(path: str, roles: Roles) -> Runs:
    """The runs of a file. Raises TableError, which names the columns and rows at fault."""
    return runs_of(read_table(path), roles, path)


def runs_of(table: Table, roles: Roles, path: str = "the table") -> Runs:
    """The runs of a table."""
    if not roles.d and not roles.compute:
        raise TableError("--d or --compute: one of them must name a column; with --compute alone, D is C/(6 N)")
    if bool(roles.n_vision) != bool(roles.d_vision):
        raise TableError("--n_vision and --d_vision: a tower's FLOPs need both, its parameters and its tokens")
    named = next((name for name in _NAMES if name in table), None)
    count = len(next(iter(table.values())))
    labels = [f"row {n + 1}" + (f" ({table[named][n]})" if named else "") for n in range(count)]
    roled = {"N": roles.n, "D": roles.d, "C": roles.compute}
    rows = [n for n in range(count) if not roles.where or _meets(table, roles.where, n, roled, "--where", path)]
    if not rows:
        raise TableError(f"{path}: no row meets --where={roles.where!r}")
    alike = _alike({name: cells for name, cells in table.items() if name not in roles.losses}, rows, path)

    def numbers(column: str, flag: str) -> np.ndarray:
        cells = _column(table, column, flag, path)
        return np.array([_number(cells[n], labels[n], column, path) for n in rows])

    losses = {column: numbers(column, "--loss") for column in roles.losses}
    columns = _quantities(roles, numbers)
    labels = [labels[n] for n in rows]
    if roles.held_out in table:
        held_out = [_truth(table[roles.held_out][n], labels[i], roles.held_out) for i, n in enumerate(rows)]
    else:
        held_out = [bool(roles.held_out) and _meets(table, roles.held_out, n, roled, "--held_out", path) for n in rows]
    runs = Runs(columns, losses, tuple(labels), np.array(held_out), alike=alike)
    diverged = [_DIVERGED in table and _truth(table[_DIVERGED][n], labels[i], _DIVERGED) for i, n in enumerate(rows)]
    runs = _without_repeats(_without_diverged(runs, np.array(diverged), path))
    _refuse_impossible(runs, path)
    if len(roles.losses) > 1:
        runs.losses[MEAN] = np.mean(list(runs.losses.values()), axis=0)
    return runs


def _quantities(roles: Roles, numbers) -> dict[str, np.ndarray]:
    """N, D, C and the rest; D of a budget where D is not given, and C of the tokens where C is not."""
    n = numbers(roles.n, "--n")
    n_v, d_v = (
        (numbers(roles.n_vision, "--n_vision"), numbers(roles.d_vision, "--d_vision")) if roles.n_vision else (0, 0)
    )
    if roles.d:
        d = numbers(roles.d, "--d")
        c = numbers(roles.compute, "--compute") if roles.compute else FLOPS * (n_v * d_v + (n - n_v) * d)
    else:
        c = numbers(roles.compute, "--compute")
        d = (c / FLOPS - n_v * d_v) / (n - n_v)
    found = {"N": n, "D": d, "C": c}
    if roles.n_vision:
        found |= {"N_v": n_v, "D_v": d_v}
    if roles.sparsity:
        found["S"] = numbers(roles.sparsity, "--sparsity")
    return found | {MIXTURE + column: numbers(column, "--mixture") for column in roles.mixture}


def _column(table: Table, name: str, flag: str, path: str) -> Sequence[object]:
    if name not in table:
        close = difflib.get_close_matches(name, list(table), 1, 0.5)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        raise TableError(f"{flag}: {path} has no column {name!r}{guess} It has {', '.join(table)}")
    return table[name]


def _number(cell: object, label: str, column: str, path: str) -> float:
    if cell is None or cell == "":
        return math.nan
    try:
        return float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TableError(f"{path}: {label}: column {column!r} is {cell!r}, which is no number") from None


def _truth(cell: object, label: str, column: str) -> bool:
    text = str(cell).strip().lower()
    if text not in (*_TRUE, *_FALSE):
        raise TableError(f"{label}: column {column!r} is {cell!r}; it must be true or false")
    return text in _TRUE


def _meets(table: Table, condition: str, row: int, roled: Mapping[str, str], flag: str, path: str) -> bool:
    """Whether a row meets `column>1e9 and name==x or ...`; N, D and C are the columns that have that part."""
    if " or " in condition:
        return any([_meets(table, either, row, roled, flag, path) for either in condition.split(" or ")])
    for part in condition.split(" and "):
        match = _CONDITION.fullmatch(part)
        if not match:
            raise TableError(f"{flag}: {part!r} is neither a column of {path} nor a condition such as 'N>1e9'")
        name, operator, wanted = match.groups()
        cell = _column(table, name if name in table else roled.get(name) or name, flag, path)[row]
        try:
            left, right = float(cell), float(wanted)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            left, right = str(cell), wanted.strip("'\"")  # type: ignore[assignment]
        met = {
            "==": left == right, "!=": left != right, ">": left > right, "<": left < right, ">=": left >= right,
            "<=": left <= right,
        }[operator]  # fmt: skip
        if not met:
            return False
    return True


def _alike(table: Table, rows: Sequence[int], path: str) -> dict[str, str]:
    """What the columns say whose cells must not differ; raises TableError where they do."""
    found = {}
    for column in table:
        if not _ALIKE.fullmatch(_NO_LETTERS.sub("", column.lower())):
            continue
        cells = [str(table[column][n]) for n in rows if table[column][n] not in (None, "")]
        kinds = Counter(cells)
        if len(kinds) > 1:
            there = ", ".join(f"{kind} ({count} runs)" for kind, count in kinds.most_common())
            raise TableError(
                f"{path}: column {column!r} differs: {there}. Losses under different ones are no points of one law: "
                f"choose with --where='{column}=={kinds.most_common(1)[0][0]}'"
            )
        if cells:
            found[column] = cells[0]
    return found


def _without_diverged(runs: Runs, diverged: Bool[np.ndarray, "n"], path: str) -> Runs:
    """Without rows that have no loss, or say that they diverged."""
    finite = np.all([np.isfinite(loss) for loss in runs.losses.values()], axis=0) & ~diverged
    if not finite.any():
        raise TableError(f"{path}: no row has a finite loss in {', '.join(runs.losses)}")
    if finite.all():
        return runs
    lost = _listed(label for label, kept in zip(runs.labels, finite, strict=True) if not kept)
    told = f"diverged or without a finite loss, left out: {lost}"
    return dataclasses.replace(runs.take(finite), warnings=(*runs.warnings, told))


def _without_repeats(runs: Runs) -> Runs:
    """Without rows that say the same as an earlier one, all numbers alike; equal runs of other seeds differ in loss."""
    seen: dict[tuple, str] = {}
    first, repeats = [], []
    for n, label in enumerate(runs.labels):
        key = tuple(float(column[n]) for column in (*runs.columns.values(), *runs.losses.values()))
        first.append(key not in seen)
        if key in seen:
            repeats.append(f"{label} is {seen[key]} again")
        seen.setdefault(key, label)
    if not repeats:
        return runs
    told = f"the same numbers twice, counted once: {_listed(repeats)}"
    return dataclasses.replace(runs.take(np.array(first)), warnings=(*runs.warnings, told))


def _refuse_impossible(runs: Runs, path: str) -> None:
    allowed = dict.fromkeys((*runs.columns, *runs.losses), ("positive", lambda v: v > 0))
    allowed |= dict.fromkeys(("N_v", "D_v"), ("zero or positive", lambda v: v >= 0))
    allowed["S"] = ("in 0 <= S < 1", lambda v: (v >= 0) & (v < 1))
    shares = [name for name in runs.columns if name.startswith(MIXTURE)]
    allowed |= dict.fromkeys(shares, ("a share, 0 to 1", lambda v: (v >= 0) & (v <= 1)))
    for name, values in (runs.columns | runs.losses).items():
        what, right = allowed[name]
        wrong = ~(np.isfinite(values) & right(values))
        if wrong.any():
            there = _listed(f"{runs.labels[n]}: {values[n]:g}" for n in np.flatnonzero(wrong))
            raise TableError(f"{path}: {name} must be {what}; {there}")
    if shares:
        sums = np.sum([runs.columns[name] for name in shares], axis=0)
        wrong = np.abs(sums - 1) > _SUM_TO_ONE
        if wrong.any():
            there = _listed(f"{runs.labels[n]}: {sums[n]:g}" for n in np.flatnonzero(wrong))
            raise TableError(f"{path}: the shares of --mixture must sum to 1; {there}")


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
