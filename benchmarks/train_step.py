"""The whole training step, as train.py compiles it, against the same model in PyTorch.

    python -m benchmarks.train_step --output=train_step.json
    python -m benchmarks.train_step --configs=configs/small.py,configs/moe.py:quickstart-8e --set=batch_rows=4
    python -m benchmarks.train_step --fusion --configs=configs/late_fusion.py:small      # early against late fusion

Each library has a process of its own (benchmarks/rivals.py), the same weights and the same packed rows of the 45/45/10
mixture, of the config's data.root if there is data, else of a generated corpus (benchmarks/corpus.py). Losses of the
first steps, updates included, are equal to 1e-4 (float32) before anything is timed. Five steps, one after the other as
in training, are a turn. A step begins with NumPy arrays and ends with the loss on the host.

    x PyTorch    how many times as fast as PyTorch, its faster form; median over rounds in turns
    MFU          FLOPs that the model needs, of attention those of its mask (nmm_jax/scaling/counting.py), over the
                 chip's peak; on CPU over the rate of a product of two 2048 x 2048 matrices, timed in the same turns
    forward, backward, optimizer    shares of the step; ours from a profile, recomputation with the backward pass.
                 Below the table and in the JSON ours by part of the model too, as nmm_jax.profile has them
    host         until the call of a step returns, the batch's way to the devices included; on CPU that is the step
    memory       highest, of the device's allocator; on CPU of the process, libraries left out
    compile      ours ahead of time; PyTorch's is what its first step takes longer

--fusion has three rows for each config of late fusion: it, and early fusion with the feed-forward width at which it has
as many parameters (as the paper counts: nmm_jax.describe), and at which a step needs as many FLOPs.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks.fusion import counterparts
from benchmarks.rivals import Rival
from benchmarks.steps import TOLERANCE, OurStep, TheirStep, save_batches
from benchmarks.tables import table
from benchmarks.timing import Timed, in_turns, origin, ratio, write
from benchmarks.workload import Needs, configured, name_of, needs, read
from configs import loading
from nmm_jax.parallel.chips import peak_flops
from nmm_jax.scaling.counting import Counts, count

_CONFIGS = flags.DEFINE_list("configs", None, "config files with their arguments; unless given, some for the device")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE, of all of the configs")
_RIVALS = flags.DEFINE_list("rivals", None, "of eager, compiled; unless given, eager on CPU and compiled elsewhere")
_FUSION = flags.DEFINE_bool("fusion", False, "early against late fusion")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "turns of each, of five steps, after those compared", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")

OURS = "nmm_jax"
STEPS = 5  # of a turn
MATRIX = 2048
BATCHES = 4

_H200 = {"model.remat": "minimal", "batch_rows": 16}
# By what the table calls them: a config and keys of it.
ON_CPU: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("configs/small.py", {}),
    "moe:quickstart-dense": ("configs/moe.py:quickstart-dense", {}),
    "moe:quickstart-8e": ("configs/moe.py:quickstart-8e", {}),
    "late_fusion:small": ("configs/late_fusion.py:small", {}),
}
ON_GPU: dict[str, tuple[str, dict[str, Any]]] = {
    "early_fusion:hw-1b": ("configs/early_fusion.py:hw-1b", _H200),
    "early_fusion:hw-3b": ("configs/early_fusion.py:hw-3b", _H200 | {"batch_rows": 8}),
    "early_fusion:1.6b, heads of 138": ("configs/early_fusion.py:1.6b", _H200),
    "early_fusion:1.6b, heads of 128": (
        "configs/early_fusion.py:1.6b", _H200 | {"model.width": 2176, "model.heads": 17, "model.ffn_width": 6144}
    ),
    "late_fusion:1b": ("configs/late_fusion.py:1b", _H200),
    "moe:hw-1b-dense": ("configs/moe.py:hw-1b-dense", _H200),
    "moe:hw-1b-8e": ("configs/moe.py:hw-1b-8e", _H200),  # 79 GB of state and gradients
    "moe:hw-1b-64e": ("configs/moe.py:hw-1b-64e", _H200),
}  # fmt: skip

COLUMNS = {
    "config": ("config", ""), "way": ("way", ""), "milliseconds": ("step ms", ",.1f"),
    "times_pytorch": ("x PyTorch", ".2f"), "tokens_per_second": ("tokens/s", ",.0f"), "mfu": ("MFU", ".1%"),
    "forward": ("forward", ".0%"), "backward": ("backward", ".0%"), "optimizer": ("optimizer", ".0%"),
    "host_milliseconds": ("host ms", ".2f"), "peak_gigabytes": ("GB", ".2f"), "compile_seconds": ("compile s", ".1f"),
}  # fmt: skip


def cases(on_gpu: bool) -> dict[str, ConfigDict]:
    """By what the table calls them."""
    chosen = ON_GPU if on_gpu else ON_CPU
    if _FUSION.value:
        chosen = {name: case for name, case in chosen.items() if "late_fusion" in case[0]}
    if _CONFIGS.value:
        chosen = {name_of(file): (file, {}) for file in _CONFIGS.value}
    return {name: configured(file, keys, _SET.value) for name, (file, keys) in chosen.items()}


@dataclasses.dataclass
class Way:
    """What was found of one rival."""

    timed: Timed
    facts: dict[str, Any]  # and the shares of its parts


def measure(name: str, config: ConfigDict, generated: pathlib.Path, forms: list[str]) -> list[dict[str, Any]]:
    """Our row, and one for each form of PyTorch."""
    batches = read(config, generated, BATCHES)
    peak = peak_flops(jax.devices()[0])
    product = Timed(lambda: None)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = pathlib.Path(scratch)
        save_batches(batches, folder)
        weights = folder / "weights.npz"
        text = loading.to_json(config)
        makers = {OURS: functools.partial(Rival, OurStep, text, folder, weights)} | {
            f"PyTorch, {form}": functools.partial(Rival, TheirStep, text, folder, weights, form == "compiled")
            for form in forms
        }
        ways: dict[str, Way] = {}
        if peak:  # an accelerator has nobody else on it, and perhaps no room for two
            losses: list[float] = []
            for way, make in makers.items():
                with make() as rival:
                    losses = compare(way, rival, losses, config)
                    ways |= run({way: rival})
        else:
            rivals = {way: stack.enter_context(make()) for way, make in makers.items()}
            losses = []
            for way, rival in rivals.items():
                losses = compare(way, rival, losses, config)
            product = Timed(lambda: rivals[OURS]("product", MATRIX))
            ways = run(rivals, product)
            peak = 2 * MATRIX**3 / product.median
    needed, counts = needs(batches), count(config)
    fastest = min((way.timed for name, way in ways.items() if name != OURS), key=lambda t: t.median, default=None)
    return [
        {
            "config": name,
            "way": way,
            **result(found.timed, counts, needed, peak),
            "times_pytorch": ratio(fastest, found.timed) if fastest and way == OURS else None,
            **found.facts,
            "parameters": counts.parameters,
            "rows": config.batch_rows,
            "row_length": config.row_length,
            "dtype": config.model.dtype,
        }
        for way, found in ways.items()
    ]


def compare(way: str, rival: Rival, expected: list[float], config: ConfigDict) -> list[float]:
    """The losses of a rival's first steps, one a batch; whose differ from the first rival's computes something else."""
    found = [rival("step") for _ in range(BATCHES)]
    error = np.abs(np.array(found) / np.array(expected or found) - 1).max()
    if not error < TOLERANCE[config.model.dtype]:
        raise ValueError(f"losses of {way} differ by {error:.2g}: {found}, of {OURS} {expected}")
    return expected or found


def run(rivals: dict[str, Rival], product: Timed | None = None) -> dict[str, Way]:
    memory = {way: rival("peak_memory") for way, rival in rivals.items()}
    timed = {way: Timed(lambda rival=rival: rival("step"), runs=STEPS) for way, rival in rivals.items()}
    in_turns([*timed.values(), *([product] if product else [])], _ROUNDS.value)
    return {
        way: Way(timed[way], {"peak_gigabytes": memory[way] / 1e9, **rival("facts"), **rival("parts")})
        for way, rival in rivals.items()
    }


def result(timed: Timed, counts: Counts, needed: Needs, peak: float) -> dict[str, Any]:
    flops = counts.training_flops(*needed)
    return {
        "milliseconds": 1e3 * timed.median,
        "tokens_per_second": needed.tokens / timed.median,
        "mfu": flops / timed.median / peak,
        "needed_gflop": flops / 1e9,
        "peak_flops": peak,
        "seconds": timed.seconds,
    }


def main(_):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two libraries and two processes share a GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # and take turns: one holds it at a time
    on_gpu = jax.default_backend() == "gpu"
    forms, missing = _RIVALS.value, {}
    if forms is None:
        forms = ["compiled"] if on_gpu else ["eager"]
    try:
        import torch  # noqa: F401
    except ImportError:
        forms, missing["PyTorch"] = [], "is not installed here: `make .venv-all/ready`, then .venv-all/bin/python"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        generated = pathlib.Path(scratch)
        for name, config in cases(on_gpu).items():
            variants = {name: config}
            if _FUSION.value:
                variants |= counterparts(config, needs(read(config, generated, BATCHES)))
            for variant, own in variants.items():
                rows += measure(variant, own, generated, forms)
    device = jax.devices()[0].device_kind
    print(f"{device}; a step of " + "; ".join(dict.fromkeys(_about(row) for row in rows)) + "\n")
    print(table(rows, COLUMNS), "\n")
    for row in rows:
        if "by_part" in row:
            shares = ", ".join(f"{part} {share:.0%}" for part, share in row["by_part"].items() if share >= 0.005)
            print(f"{row['config']}, of the time of instructions: {shares}")
    if not on_gpu:
        missing["; ".join(ON_GPU)] = "need a GPU of 141 GB: python -m benchmarks.train_step there"
    for what, why in missing.items():
        print(f"not measured here: {what}: {why}")
    if _OUTPUT.value:
        record = {"rounds": _ROUNDS.value, "steps_a_turn": STEPS, "ways": rows, "not_measured": missing}
        write(_OUTPUT.value, record | origin(("jax", "jaxlib", "torch", "transformers")))


def _about(row: dict[str, Any]) -> str:
    size = f"{row['rows']} x {row['row_length']} positions, {row['parameters'] / 1e6:,.1f} M parameters"
    return f"{row['config']}: {size}, {row['dtype']}"


if __name__ == "__main__":
    app.run(main)
