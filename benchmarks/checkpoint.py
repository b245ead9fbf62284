"""Checkpoints: what saving takes from the loop, and how fast and in how much memory a state comes back.

    python -m benchmarks.checkpoint --output=checkpoint.json
    python -m benchmarks.checkpoint --folder=/mnt/disk --set=model.depth=24          # another disk, a larger state

"loop" is the config's own step: of each save the seconds that the call takes, and that the steps take longer while the
state is written behind them, over the seconds between two saves (checkpoint.every). Below it a larger state, of float32
parameters and Adam's two moments, is saved and restored by us, by torch.save and torch.load, and by safetensors; each
has the same arrays. Readers take turns, each in a process of its own.

    cold, warm    the files' pages dropped from the page cache before each read, or left there by the one before
    raw           the files of our checkpoint read one after another into one buffer of 16 MiB, as dd does
    x raw         speed over the raw one's in the same round and state of the cache
    peak          highest memory of the first restore (VmHWM, less what was there before it) over the bytes restored;
                  devices of a CPU have their arrays in it
"""

import contextlib
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.rivals import HostMemory, Rival
from benchmarks.steps import OurStep, save_batches
from benchmarks.tables import table
from benchmarks.timing import PAUSE, origin, write
from benchmarks.workload import configured, read
from configs import loading

_CONFIG = flags.DEFINE_string("config", "configs/small.py", "config file with its argument")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE, of the larger state's config")
_FOLDER = flags.DEFINE_string("folder", None, "on the disk to measure; the system's for temporary files, unless given")
_SAVES = flags.DEFINE_integer("saves", 3, "of the loop", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "saves and restores of each", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")

LARGER = {"model.width": 512, "model.depth": 8, "model.heads": 8, "model.vocab_size": 32_768}  # 0.7 GB of state
BESIDE = 6  # steps while a checkpoint is written
BLOCK = 16 << 20

COLUMNS = {
    "what": ("", ""), "way": ("way", ""), "gigabytes": ("GB", ".2f"), "seconds": ("seconds", ".3f"),
    "gigabytes_per_second": ("GB/s", ".2f"), "times_raw": ("x raw", ".2f"), "peak": ("peak", ".2f"),
    "share": ("of the interval", ".3%"),
}  # fmt: skip

Arrays = Mapping[str, np.ndarray]


class Loop:
    """Steps, and saves between them."""

    def __init__(self, config: str, folder: pathlib.Path):
        from nmm_jax.training.checkpoints import Checkpoints

        self._step = OurStep(config, folder)
        self._checkpoints = Checkpoints(str(folder / "loop"), keep=1)
        self._saved = 0

    def interval(self) -> float:
        """Seconds between two saves of the config."""
        self._step.step()
        return self._step.config.checkpoint.every * statistics.median(self._timed_steps(BESIDE))

    def save(self) -> tuple[float, float]:
        """Seconds of the call, and that the steps beside the writing took longer than those after it."""
        self._saved += 1
        began = time.perf_counter()
        self._checkpoints.save(self._saved, self._step.state, {})
        blocked = time.perf_counter() - began
        beside = self._timed_steps(BESIDE)
        self._checkpoints.wait()
        after = self._timed_steps(BESIDE)
        return blocked, max(0.0, sum(beside) - sum(after))

    def _timed_steps(self, count: int) -> list[float]:
        found = []
        for _ in range(count):
            began = time.perf_counter()
            self._step.step()
            found.append(time.perf_counter() - began)
        return found


class Ours:
    """Orbax, as train.py saves and restores."""

    def __init__(self, config: str, folder: pathlib.Path):
        import jax

        from nmm_jax import models
        from nmm_jax.parallel.mesh import make_mesh
        from nmm_jax.training.checkpoints import Checkpoints
        from nmm_jax.training.optimizer import make_optimizer
        from nmm_jax.training.state import abstract_state

        parsed = loading.from_json(config)
        self._model, self._optimizer, self._mesh = models.build(parsed), make_optimizer(parsed), make_mesh(parsed)
        self._abstract = abstract_state(self._model, self._optimizer, self._mesh)
        self._bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._abstract))
        self._checkpoints = Checkpoints(str(folder / "ours"), keep=1)
        self._saved = 0

    def save(self) -> float:
        from nmm_jax.training.state import initial_state

        if not self._saved:
            self._state = trained(initial_state(self._model, self._optimizer, self._mesh, 0))
        self._saved += 1
        began = time.perf_counter()
        self._checkpoints.save(self._saved, self._state, {})
        self._checkpoints.wait()
        return time.perf_counter() - began

    def export(self, path: pathlib.Path) -> None:
        """The state's arrays, for the others."""
        import jax

        leaves = jax.tree_util.tree_flatten_with_path(self._state)[0]
        np.savez(path, **{jax.tree_util.keystr(name): np.asarray(x) for name, x in leaves})

    def restore(self) -> tuple[float, float]:
        """Seconds, and the highest memory over the bytes restored."""
        import jax

        memory, began = HostMemory(), time.perf_counter()
        jax.block_until_ready(self._checkpoints.restore(None, self._abstract)[0])
        return time.perf_counter() - began, memory.peak() / self._bytes


def trained(state: Any) -> Any:
    """With moments that are not 0, as after training: zeros would take no room in a file, and no time to read."""
    import jax

    def values(x: jax.Array) -> jax.Array:
        if x.dtype != np.float32:
            return x
        made = np.random.default_rng(x.size).standard_normal(x.shape, np.float32)
        return jax.device_put(made, x.sharding)

    return {part: x if part == "params" else jax.tree.map(values, x) for part, x in state.items()}


class Theirs:
    """A flat dict of tensors in one file."""

    def __init__(self, folder: pathlib.Path, arrays: pathlib.Path, kind: str):
        import torch
        from safetensors import torch as safetensors

        self._path, self._arrays = folder / kind, arrays
        ways: dict[str, tuple[Callable[[Any], None], Callable[[], Any]]] = {
            "torch": (
                lambda tensors: torch.save(tensors, self._path),
                lambda: torch.load(self._path, weights_only=True),
            ),
            "safetensors": (
                lambda tensors: safetensors.save_file(tensors, self._path),
                # What it returns are maps of the file, and nothing is read yet.
                lambda: {name: x.clone() for name, x in safetensors.load_file(self._path).items()},
            ),
        }
        self._save, self._load = ways[kind]
        self._tensors: dict[str, Any] = {}

    def save(self) -> float:
        import torch

        if not self._tensors:
            self._tensors = {name: torch.from_numpy(x) for name, x in np.load(self._arrays).items()}
        began = time.perf_counter()
        self._save(self._tensors)
        with open(self._path, "rb") as file:
            os.fsync(file)
        return time.perf_counter() - began

    def restore(self) -> tuple[float, float]:
        memory, began = HostMemory(), time.perf_counter()
        restored = self._load()
        seconds = time.perf_counter() - began
        return seconds, memory.peak() / sum(x.nbytes for x in restored.values())


class Raw:
    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def restore(self) -> tuple[float, None]:
        buffer, began = bytearray(BLOCK), time.perf_counter()
        for path in files(self._folder):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return time.perf_counter() - began, None


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drop_cache(folder: pathlib.Path) -> None:
    """Of these files' pages; they have to be on the disk before."""
    os.sync()
    for path in files(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loop(folder: pathlib.Path) -> dict[str, Any]:
    config = configured(_CONFIG.value, {})
    save_batches(read(config, folder / "corpus", 2), folder)
    with Rival(Loop, loading.to_json(config), folder) as there:
        interval = there("interval")
        saves = [there("save") for _ in range(_SAVES.value)]
    blocked, beside = (statistics.median(column) for column in zip(*saves, strict=True))
    return {
        "what": "loop",
        "way": f"saves of {_CONFIG.value}",
        "seconds": blocked + beside,
        "share": (blocked + beside) / interval,
        "interval_seconds": interval,
        "blocked_seconds": [s for s, _ in saves],
        "beside_seconds": [s for _, s in saves],
    }


def larger(folder: pathlib.Path, with_torch: bool) -> list[dict[str, Any]]:
    config = configured(_CONFIG.value, LARGER, _SET.value)
    arrays = folder / "arrays.npz"
    kinds = ("torch", "safetensors") if with_torch else ()
    saves: dict[str, list[float]] = {}
    with Rival(Ours, loading.to_json(config), folder) as ours:
        saves["nmm_jax"] = [ours("save") for _ in range(_ROUNDS.value)]
        if kinds:
            ours("export", arrays)
    for kind in kinds:
        with Rival(Theirs, folder, arrays, kind) as theirs:
            saves[kind] = [theirs("save") for _ in range(_ROUNDS.value)]
    arrays.unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in files(folder / "ours")) / 1e9
    rows = [_row("save", way, size, seconds) for way, seconds in saves.items()]

    found: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
    with contextlib.ExitStack() as stack:
        readers = {"raw": Rival(Raw, folder / "ours"), "nmm_jax": Rival(Ours, loading.to_json(config), folder)}
        readers |= {kind: Rival(Theirs, folder, arrays, kind) for kind in kinds}
        for reader in readers.values():
            stack.enter_context(reader)
        for _ in range(_ROUNDS.value):
            for cache in ("cold", "warm"):
                for way, reader in readers.items():
                    if cache == "cold":
                        drop_cache(folder)
                    time.sleep(PAUSE)
                    found.setdefault((cache, way), []).append(reader("restore"))
    for (cache, way), measured in found.items():
        seconds, raw = [s for s, _ in measured], [s for s, _ in found[cache, "raw"]]
        peaks = {"peak": measured[0][1]} if cache == "cold" else {}
        times_raw = statistics.median(r / s for s, r in zip(seconds, raw, strict=True))
        rows.append(_row(f"restore, {cache}", way, size, seconds) | {"times_raw": times_raw} | peaks)
    return rows


def _row(what: str, way: str, gigabytes: float, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    speed = {"gigabytes": gigabytes, "seconds": median, "gigabytes_per_second": gigabytes / median}
    return {"what": what, "way": way, **speed, "all_seconds": seconds}


def main(_):
    missing = {}
    try:
        import torch  # noqa: F401

        with_torch = True
    except ImportError:
        with_torch = False
        missing["torch, safetensors"] = "torch is not installed here: `make .venv-all/ready`, .venv-all/bin/python"
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as scratch:
        folder = pathlib.Path(scratch)
        rows = [loop(folder), *larger(folder, with_torch)]
    print(table(rows, COLUMNS), "\n")
    interval = rows[0]["interval_seconds"]
    print(f"the interval of {_CONFIG.value} is {interval:,.1f} s: checkpoint.every steps, as fast as they are here")
    for what, why in missing.items():
        print(f"not measured here: {what}: {why}")
    if _OUTPUT.value:
        record = {"rounds": _ROUNDS.value, "results": rows, "not_measured": missing}
        write(_OUTPUT.value, record | origin(("jax", "orbax-checkpoint", "tensorstore", "torch", "safetensors")))


if __name__ == "__main__":
    app.run(main)
