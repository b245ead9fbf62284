"""All benchmarks that need nothing but this machine, one after another: a table and a JSON of each.

    make bench                                                   # runs/benchmarks/*.json
    make bench ONLY=train_step,data
    python -m benchmarks.run --list
    python -m benchmarks.run --smoke --output=FOLDER             # each at its smallest: whether it runs, not how fast

Each is `python -m benchmarks.NAME --output=FOLDER/NAME.json`, with its defaults for the device that JAX finds; what
cannot be measured here it says itself. One that fails is told at the end, and the others go on. Run them on a machine
that does nothing else. benchmarks/packing.py and image_slots.py want a config with data and are run by hand.
"""

import dataclasses
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from benchmarks.tables import table


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A module of this package and how it is called.

    Attributes:
      what: is measured.
      rival: in the same run.
      smoke: flags that make it small.
    """

    what: str
    rival: str
    smoke: str
    module: str = ""  # unless it has the benchmark's own name
    flags: str = ""


BENCHMARKS: Mapping[str, Benchmark] = {
    "train_step": Benchmark(
        "a training step, dense and with experts", "PyTorch, the same model",
        "--configs=configs/small.py --set=batch_rows=2 --set=model.depth=1 --rounds=1",
    ),
    "fusion": Benchmark(
        "early against late fusion, at equal parameters and FLOPs", "each other, and PyTorch",
        "--configs=configs/late_fusion.py:small --set=batch_rows=2 --set=model.depth=1 --set=model.vision.depth=1 "
        "--rounds=1", "train_step", "--fusion",
    ),
    "scaling": Benchmark(
        "how a step grows: rows, length, experts, devices, images", "PyTorch, and the FLOPs that are needed",
        "--axes=images --set=model.depth=1 --set=model.vision.depth=1 --set=batch_rows=2 --rounds=1",
    ),
    "attention": Benchmark(
        "attention over intervals", "torch's SDPA or FlexAttention, cuDNN", "--lengths=256 --positions=512 --rounds=1"
    ),
    "moe": Benchmark(
        "a layer of experts", "the dense layer, Mixtral's of transformers, ragged_dot",
        "--tokens=256 --width=64 --ffn=128 --experts=4 --rounds=1",
    ),
    "grouped_matmul": Benchmark(
        "products by group, even and uneven", "a dense product, torch's grouped_mm, ragged_dot, tokamax",
        "--shapes=256x4x64x128 --rounds=1",
    ),
    "generation": Benchmark(
        "tokens a second", "transformers' generate",
        "--width=64 --depth=1 --vocab=512 --prompt=8 --tokens=8 --batches=2 --rounds=1",
    ),
    "data": Benchmark(
        "building batches, and waiting for them", "PyTorch's DataLoader",
        "--configs=configs/small.py --batches=2 --rounds=1 --steps=2",
    ),
    "images": Benchmark("decoding and resizing", "Pillow, OpenCV", "--images=2 --rounds=1"),
    "checkpoint": Benchmark(
        "saving and restoring", "torch.save, safetensors, a raw read",
        "--rounds=1 --saves=1 --set=model.width=64 --set=model.depth=1 --set=model.heads=1 --set=model.vocab_size=1024",
    ),
    "fits": Benchmark(
        "fits of scaling laws", "scipy's L-BFGS-B", "--runs=20 --bootstraps=2 --sample=2"
    ),
}  # fmt: skip

LISTED = {"name": ("name", ""), "what": ("measures", ""), "rival": ("beside", "")}
RESULTS = {"name": ("benchmark", ""), "result": ("", ""), "seconds": ("s", ",.0f"), "json": ("JSON", "")}
NOTHING = "nothing to measure here"


def command(name: str, folder: pathlib.Path, smoke: bool) -> list[str]:
    """What follows `python`."""
    benchmark = BENCHMARKS[name]
    own = shlex.split(f"{benchmark.flags} {benchmark.smoke if smoke else ''}")
    return ["-m", f"benchmarks.{benchmark.module or name}", *own, f"--output={folder / name}.json"]


def run(name: str, folder: pathlib.Path, smoke: bool) -> dict[str, Any]:
    """A row of the summary; its result is "done", NOTHING, or how it failed."""
    path, own = folder / f"{name}.json", command(name, folder, smoke)
    path.unlink(missing_ok=True)  # of a run before, which would be taken for this one's
    print(f"python {shlex.join(own)}\n", flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, *own], check=False).returncode
    result = f"failed, code {code}" if code else "done" if path.exists() else NOTHING
    return {
        "name": name,
        "result": result,
        "seconds": time.perf_counter() - began,
        "json": str(path) if path.exists() else "",
    }


def run_all(chosen: Sequence[str], folder: pathlib.Path, smoke: bool) -> list[str]:
    """The names of those that failed. Raises UsageError of a name that there is not."""
    unknown = set(chosen) - set(BENCHMARKS)
    if unknown:
        raise app.UsageError(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for n, name in enumerate(chosen, 1):
        print(f"\n== {n} of {len(chosen)}: {name}\n", flush=True)
        rows.append(run(name, folder, smoke))
        print(f"\n{name}: {rows[-1]['result']}, {rows[-1]['seconds']:,.0f} s", flush=True)
    failed = [row["name"] for row in rows if row["result"] not in ("done", NOTHING)]
    print(f"\n== {len(rows) - len(failed)} of {len(rows)} ran\n\n{table(rows, RESULTS)}")
    return failed


if __name__ == "__main__":
    OUTPUT = flags.DEFINE_string("output", "runs/benchmarks", "folder of the JSON files")
    ONLY = flags.DEFINE_list("only", None, "some of them")
    LIST = flags.DEFINE_bool("list", False, "tell what there is, and run nothing")
    SMOKE = flags.DEFINE_bool("smoke", False, "each at its smallest")

    def main(_):
        if LIST.value:
            print(table([{"name": name} | dataclasses.asdict(each) for name, each in BENCHMARKS.items()], LISTED))
            return
        failed = run_all(ONLY.value or list(BENCHMARKS), pathlib.Path(OUTPUT.value), SMOKE.value)
        if failed:
            sys.exit(f"benchmarks.run: failed: {', '.join(failed)}")

    app.run(main)
