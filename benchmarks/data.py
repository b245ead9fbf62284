"""How fast batches come, against what a step needs and against a PyTorch DataLoader over the same files.

    python -m benchmarks.data --output=data.json
    python -m benchmarks.data --configs=configs/early_fusion.py:hw-1b --set=data.root=DATA --set=data.workers=16

Files are the config's own where data.root has any, else generated (benchmarks/corpus.py), and in the page cache. The
loaders take turns, each in a process of its own. Rows of both have the same length and slots; theirs are packed as
documents come, so compare positions, which are real ones.

    us/position    of one core: all the work in one thread (workers = 0)
    positions/s    with the config's data.workers: our threads, their processes
    a chip needs   positions/s of an H200 at 40% of its peak, by the FLOPs of a position of these rows
    cores a chip   that ours takes to feed it
    wait           of the step's time, in the loop of train.py on this machine, where the config is one for CPU

Our decoding and tokenising release the GIL; their threads would not help them, so that they have processes.
"""

import contextlib
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks.loaders import OurLoader, OurLoop, TheirLoader
from benchmarks.rivals import Rival
from benchmarks.steps import save_batches
from benchmarks.tables import table
from benchmarks.timing import PAUSE, origin, write
from benchmarks.workload import configured, name_of, needs, read
from configs import loading
from nmm_jax.parallel.chips import CHIPS
from nmm_jax.scaling.counting import count

_CONFIGS = flags.DEFINE_list(
    "configs",
    ["configs/small.py", "configs/late_fusion.py:small", "configs/early_fusion.py:hw-1b"],
    "config files with their arguments",
)
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE, of all configs")
_BATCHES = flags.DEFINE_integer("batches", 12, "of 8 rows, that are timed at a time", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "in turns, after one that is not counted", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 12, "of the loop whose waits are measured", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")

CHIP, MFU = "h200", 0.4
LARGEST = 20_000_000  # parameters of a config whose steps are run where there is no accelerator

COLUMNS = {
    "config": ("config", ""), "loader": ("loader", ""), "microseconds": ("us/position", ",.2f"),
    "workers": ("workers", "d"), "positions_per_second": ("positions/s", ",.0f"),
    "images_per_second": ("images/s", ",.0f"), "times_pytorch": ("x PyTorch", ".2f"),
    "needed": ("a chip needs", ",.0f"), "cores": ("cores a chip", ".2f"), "wait": ("wait", ".2%"),
}  # fmt: skip


def measure(name: str, config: ConfigDict, generated: pathlib.Path, with_torch: bool) -> list[dict[str, Any]]:
    """A row for each loader."""
    batches = read(config, generated, 2)
    text = loading.to_json(config)
    kinds = {"nmm_jax": OurLoader} | ({"DataLoader": TheirLoader} if with_torch else {})
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        loaders = {kind: stack.enter_context(Rival(make, text)) for kind, make in kinds.items()}
        for n in range(_ROUNDS.value + 1):
            for workers in (0, config.data.workers):
                for kind, loader in loaders.items():
                    time.sleep(PAUSE)
                    measured = loader("measure", _BATCHES.value, workers)
                    if n:
                        found.setdefault((kind, workers), []).append(measured)
    tokens, pairs, images = needs(batches)
    needed = MFU * CHIPS[CHIP].peak_flops / (count(config).training_flops(tokens, pairs, images) / tokens)
    rows = []
    for kind in kinds:
        alone, ahead = found[kind, 0], found[kind, config.data.workers]
        of_core = statistics.median(m["core_seconds"] / m["positions"] for m in alone)
        rivals = zip(ahead, found.get(("DataLoader", config.data.workers), ahead), strict=True)
        rows.append(
            {
                "config": name,
                "loader": kind,
                "workers": config.data.workers,
                "microseconds": 1e6 * of_core,
                "positions_per_second": statistics.median(m["positions"] / m["seconds"] for m in ahead),
                "images_per_second": statistics.median(m["images"] / m["seconds"] for m in ahead),
                "rows_per_second": statistics.median(m["rows"] / m["seconds"] for m in ahead),
                "times_pytorch": None
                if kind != "nmm_jax" or not with_torch
                else statistics.median(
                    (a["positions"] / a["seconds"]) / (b["positions"] / b["seconds"]) for a, b in rivals
                ),
                "needed": needed,
                "cores": needed * of_core,
                "wait": wait(config, batches) if kind == "nmm_jax" and runs_here(config) else None,
                "alone": alone,
                "ahead": ahead,
            }
        )
    return rows


def runs_here(config: ConfigDict) -> bool:
    return jax.default_backend() != "cpu" or count(config).parameters < LARGEST


def wait(config: ConfigDict, batches: list[dict[str, Any]]) -> float:
    """The share of the time of all steps."""
    with tempfile.TemporaryDirectory() as folder:
        save_batches(batches, pathlib.Path(folder))
        with Rival(OurLoop, loading.to_json(config), pathlib.Path(folder)) as loop:
            waits = loop("waits", _STEPS.value)
    return sum(waited for waited, _ in waits) / sum(whole for _, whole in waits)


def main(_):
    missing = {}
    try:
        import torch  # noqa: F401

        with_torch = True
    except ImportError:
        with_torch = False
        missing["DataLoader"] = "torch is not installed here: `make .venv-all/ready`, then .venv-all/bin/python"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for file in _CONFIGS.value:
            config = configured(file, {"batch_rows": 8}, _SET.value)
            rows += measure(name_of(file), config, pathlib.Path(scratch), with_torch)
            if not runs_here(config):
                missing[f"wait of {name_of(file)}"] = "runs on an accelerator: python -m benchmarks.data there"
    print(f"batches of 8 rows; a chip is one {CHIP.upper()} at {MFU:.0%} of its peak\n\n{table(rows, COLUMNS)}\n")
    for what, why in missing.items():
        print(f"not measured here: {what}: {why}")
    if _OUTPUT.value:
        record = {"chip": CHIP, "mfu": MFU, "rounds": _ROUNDS.value, "loaders": rows, "not_measured": missing}
        write(_OUTPUT.value, record | origin(("jax", "grain", "torch", "tokenizers", "simplejpeg", "pillow")))


if __name__ == "__main__":
    app.run(main)
