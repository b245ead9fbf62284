"""The table of a study, a row each finished run: what fits, plans and plots read.

run, architecture, size, mixture, grid, seed     which it is
n, n_text, n_vision, n_total    N as the paper counts it, active of experts; of it decoder and tower; with all experts
d, d_text, d_vision             D, tokens without padding; of it text; patches (counting.Tokens)
tokens_SOURCE, h_SOURCE         of d those of a source; their share
c, flops                        6 (n_text d + n_vision d_vision); and all that the mathematics needs, attention too
loss, loss_SOURCE, loss_se_SOURCE    held out: the unweighted mean of the sources, each, and its standard error
sparsity                        1 - n / n_total
tokenizer, validation           fingerprints: losses under different ones are not comparable
steps, batch_rows, learning_rate, trunk, trunk_step    trunk_step is where it left its trunk
diverged                        it has no loss, and what it was trained on is not told
seconds                         of its steps, the trunk's up to trunk_step among them
commit, device                  that made it
"""

import csv
import hashlib
import importlib.util
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from nmm_jax.scaling.counting import count, tokens_seen
from nmm_jax.scaling.study import Branch, Trunk

ROW = "row.json"  # in the folder of a run that is finished, or has diverged

Row = dict[str, Any]
Line = Mapping[str, Any]  # of metrics.jsonl


def row(trunk: Trunk, branch: Branch, config: ConfigDict, commit: str, device: str) -> Row:
    """What is known of a run before it is made, and of one that diverged."""
    counts = count(config)
    return {
        "run": branch.name,
        "architecture": trunk.architecture,
        "size": trunk.size,
        "mixture": trunk.mixture,
        "grid": branch.grid,
        "seed": trunk.seed,
        "n": counts.paper_parameters,
        "n_text": counts.paper_text,
        "n_vision": counts.paper_vision,
        "n_total": counts.paper_total,
        "sparsity": 1 - counts.paper_parameters / counts.paper_total,
        "steps": branch.steps,
        "batch_rows": config.batch_rows,
        "learning_rate": config.optimizer.learning_rate,
        "trunk": trunk.name,
        "trunk_step": branch.at,
        "diverged": True,
        "commit": commit,
        "device": device,
    }


def finished(
    about: Row,
    config: ConfigDict,
    meta: Mapping[str, Any],
    lines: Sequence[Line],
    losses: Mapping[str, Mapping[str, float]],
    held_out: Mapping[str, str],
) -> Row:
    """The row of a run that was trained and evaluated.

    Args:
      about: what `row` returned.
      meta: its last checkpoint's: the tokens and images that it was trained on, and the data's fingerprints.
      lines: of metrics.jsonl, the trunk's up to where the run begins and its own.
      losses: by source {"loss", "standard_error"}.
      held_out: by source the fingerprint of the plan of the rows that the loss is of.
    """
    counts, seen = count(config), tokens_seen(config, meta["seen"]["tokens"], meta["seen"]["images"])
    d, (per_token, seconds) = seen.total, _measured(lines)
    of_source = {f"tokens_{source}": n for source, n in seen.by_source.items()}
    shares = {f"h_{source}": n / d for source, n in seen.by_source.items()}
    loss = {f"loss_{source}": found["loss"] for source, found in losses.items()}
    errors = {f"loss_se_{source}": found["standard_error"] for source, found in losses.items()}
    rows = {source: found["rows"] for source, found in losses.items()}
    return about | {
        **{"d": d, "d_text": seen.text, "d_vision": seen.vision},
        **of_source,
        **shares,
        "c": counts.paper_flops(d, seen.vision),
        "flops": per_token * d,
        "loss": math.fsum(loss.values()) / len(loss),
        **loss,
        **errors,
        "tokenizer": meta["data"]["tokenizer"],
        "validation": fingerprint({"plans": dict(held_out), "rows": rows}),
        "diverged": False,
        "seconds": seconds,
    }


def fingerprint(made_of: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def _measured(lines: Sequence[Line]) -> tuple[float, float]:
    """(FLOPs of a token, seconds of all steps). A line tells of the steps since the one before it."""
    flops = tokens = seconds = 0.0
    before = 0
    for line in lines:
        of_line = line["time/step"] * (line["step"] - before)
        flops += 1e12 * line["speed/tflops_per_second"] * of_line
        tokens += line["speed/tokens_per_second"] * of_line
        seconds += of_line
        before = line["step"]
    return flops / tokens, seconds


# What ends in _ stands for the columns of all sources.
ORDER = (
    "run", "architecture", "size", "mixture", "grid", "seed", "n", "n_text", "n_vision", "n_total", "d", "d_text",
    "d_vision", "tokens_", "h_", "c", "flops", "loss", "loss_", "loss_se_", "sparsity", "tokenizer", "validation",
    "steps", "batch_rows", "learning_rate", "trunk", "trunk_step", "diverged", "seconds", "commit", "device",
)  # fmt: skip


def columns(rows: Iterable[Row]) -> list[str]:
    """Those that any row has, in the table's order."""
    names = dict.fromkeys(name for row in rows for name in row)
    return sorted(names, key=lambda name: ORDER.index(_group(name)))


def _group(name: str) -> str:
    return name if name in ORDER else max((g for g in ORDER if g.endswith("_") and name.startswith(g)), key=len)


def write(rows: Sequence[Row], path: epath.Path) -> list[epath.Path]:
    """PATH.csv, and PATH.parquet where pyarrow is installed. What is not known is an empty cell."""
    names = columns(rows)
    text = io.StringIO()
    table = csv.DictWriter(text, names, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    written = [path.with_name(f"{path.name}.csv")]
    written[0].write_text(text.getvalue())
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet

        data = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), data)
        written.append(path.with_name(f"{path.name}.parquet"))
        written[1].write_bytes(data.getvalue().to_pybytes())
    return written
