"""Whether the time of a step grows as its work, and as PyTorch's: rows, length, experts, simulated devices, images.

    python -m benchmarks.scaling --output=scaling.json
    python -m benchmarks.scaling --axes=rows,images --set=model.depth=4

Of each axis all points are timed in turns. "x first" is the time of a position (of images: of a step) over that of the
first point; 1 is linear. "work x first" is the same of the FLOPs that are needed (nmm_jax/scaling/counting.py), which
for a position grow with the row, as there are more keys to see, and with experts, as there is more to choose from.

    rows       of a batch
    length     of a row, one row a batch
    experts    of a layer, of which a token meets one
    devices    that share a batch, without PyTorch. On CPU they are simulated on the same cores: what is measured is the
               cost of sharing
    images     of all image slots of late fusion, the same compiled step on batches with more and fewer images

"PyTorch x first" is the growth of the same model's step there (benchmarks/torch_twin.py; on CPU without torch.compile),
from the same weights on the same batches in the same turns, and "x PyTorch" how many times as fast as it ours is. Of
images it has none: slots are filled here that no position refers to.
"""

import contextlib
import importlib.util
import os
import pathlib
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import corpus
from benchmarks.rivals import Rival
from benchmarks.steps import TOLERANCE, OurStep, TheirStep, save_batches
from benchmarks.tables import table
from benchmarks.timing import Timed, in_turns, origin, ratio, write
from benchmarks.workload import configured, needs
from configs import loading
from data_pipelines.rows import Batch
from nmm_jax.parallel import collective_threads, host_memory
from nmm_jax.scaling.counting import count

_AXES = flags.DEFINE_list("axes", ["rows", "length", "experts", "devices", "images"], "which of them")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE, of all configs")
_TORCH = flags.DEFINE_bool("torch", True, "beside PyTorch, where it is installed")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "turns of each, of three steps, after one not counted", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")

STEPS = 3  # of a turn, one after the other as in training
OF = 6  # batches of the stream, of which the fullest two are taken

# Sizes at which a step takes a tenth of a second or so.
_CPU = {"model.depth": 2, "model.vocab_size": 1024, "row_length": 256}
_GPU = {"batch_rows": 8, "model.remat": "minimal"}
CONFIGS = {
    "cpu": {
        "dense": ("configs/small.py", _CPU),
        "experts": ("configs/moe.py:quickstart-8e", {"row_length": 256, "batch_rows": 8, "model.depth": 2}),
        "late": ("configs/late_fusion.py:small", _CPU | {"model.vision.depth": 2}),
    },
    "gpu": {
        "dense": ("configs/early_fusion.py:hw-300m", _GPU),
        # Two layers: the states of all points, ours and PyTorch's, are there at once.
        "experts": ("configs/moe.py:hw-300m-8e", _GPU | {"model.depth": 2}),
        "late": ("configs/late_fusion.py:289m", _GPU),
    },
}

COLUMNS = {
    "axis": ("axis", ""), "value": ("", ",d"), "positions": ("positions", ",.0f"), "milliseconds": ("step ms", ",.1f"),
    "microseconds": ("us a position", ",.2f"), "times_first": ("x first", ".2f"),
    "work_times_first": ("work x first", ".2f"), "pytorch_times_first": ("PyTorch x first", ".2f"),
    "times_pytorch": ("x PyTorch", ".2f"),
}  # fmt: skip


class Point:
    """One value of an axis: a step to time, PyTorch's, and what a step needs."""

    def __init__(self, value: int, timed: Timed, theirs: Timed | None, positions: float, flops: float):
        self.value, self.timed, self.theirs, self.positions, self.flops = value, timed, theirs, positions, flops


class Maker:
    """Makes points of configs, and keeps their processes until the axis is timed."""

    def __init__(self, scratch: pathlib.Path, stack: contextlib.ExitStack, with_torch: bool):
        self._scratch, self._stack, self._with_torch = scratch, stack, with_torch

    def config(self, kind: str, **more: Any) -> ConfigDict:
        file, keys = CONFIGS["gpu" if jax.default_backend() == "gpu" else "cpu"][kind]
        named = {key.replace("__", "."): value for key, value in more.items()}
        config = configured(file, keys | named, _SET.value)
        corpus.use(config, self._scratch / "corpus")
        return config

    def point(self, value: int, config: ConfigDict, devices: int = 0) -> Point:
        batches = fullest(corpus.batches(config, OF), 2)
        ours, theirs = self._steps(config, batches, devices, self._with_torch and not devices)
        positions, _, _ = needed = needs(batches)
        flops = count(config).training_flops(*needed)
        other = theirs and Timed(lambda: theirs("step"), runs=STEPS)
        return Point(value, Timed(lambda: ours("step"), runs=STEPS), other, positions, flops)

    def images(self, config: ConfigDict) -> Iterator[Point]:
        """Of one compiled step, on batches of which an eighth, a quarter, half and all of the slots are filled."""
        (batch,) = fullest(corpus.batches(config, OF), 1)
        slots = batch["image_mask"].size
        filled = [slots // 8, slots // 4, slots // 2, slots]
        batches = []
        for images in filled:
            mask = (np.arange(slots) < images).reshape(batch["image_mask"].shape[::-1]).T  # as even as can be
            batches.append(batch | {"image_mask": np.ascontiguousarray(mask)})
        step, _ = self._steps(config, batches, 0, with_torch=False)
        for number, images in enumerate(filled):
            positions, pairs, _ = needs([batch])
            flops = count(config).training_flops(positions, pairs, images)
            timed = Timed(lambda number=number: step("step", number), runs=STEPS)
            yield Point(images, timed, None, positions, flops)

    def _steps(
        self, config: ConfigDict, batches: list[dict[str, np.ndarray]], devices: int, with_torch: bool
    ) -> tuple[Any, Any]:
        """Ours, and PyTorch's or None; each has run once."""
        folder = pathlib.Path(tempfile.mkdtemp(dir=self._scratch))
        save_batches(batches, folder)
        text, theirs = loading.to_json(config), None
        if devices:
            environment = {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "NPROC": str(collective_threads.enough(devices)),
            }
            ours: Any = self._stack.enter_context(Rival(OurStep, text, folder, environment=environment))
        else:
            weights = folder / "weights.npz"
            here = OurStep(text, folder, weights if with_torch else None)
            ours = lambda method, *arguments: getattr(here, method)(*arguments)  # noqa: E731
            if with_torch:
                on_gpu = jax.default_backend() == "gpu"
                theirs = self._stack.enter_context(Rival(TheirStep, text, folder, weights, on_gpu))
                same(ours("step"), theirs("step"), config)
                return ours, theirs
        ours("step")
        return ours, theirs


def fullest(batches: list[Batch], count: int) -> list[Batch]:
    """With the least padding: of so small a corpus there are few rows of 8,192, and a source's last is half empty."""
    return sorted(batches, key=lambda batch: (batch["segment_ids"] == 0).sum())[:count]


def same(ours: float, theirs: float, config: ConfigDict) -> None:
    """The losses of the first step; who computes something else is no rival."""
    if not abs(theirs / ours - 1) < TOLERANCE[config.model.dtype]:
        raise ValueError(f"the first loss of PyTorch is {theirs}, ours {ours}")


def points(axis: str, maker: Maker) -> list[Point]:
    if axis == "rows":
        return [maker.point(n, maker.config("dense", batch_rows=n)) for n in (1, 2, 4, 8)]
    if axis == "length":
        per_row = maker.config("dense").image.per_row * 1024 // maker.config("dense").row_length
        return [
            maker.point(s, maker.config("dense", batch_rows=1, row_length=s, image__per_row=per_row * s // 1024))
            for s in (1024, 2048, 4096, 8192)
        ]
    if axis == "experts":
        return [maker.point(n, maker.config("experts", model__moe__experts=n)) for n in (8, 16, 32, 64)]
    if axis == "devices":
        return [maker.point(n, maker.config("dense", batch_rows=8), devices=n) for n in (1, 2, 4, 8)]
    if axis == "images":
        return list(maker.images(maker.config("late")))
    raise app.UsageError(f"--axes: there is no {axis!r}; expected some of rows, length, experts, devices, images")


def results(axis: str, timed: list[Point]) -> list[dict[str, Any]]:
    """A row for each point, relative to the first; of a position, but where all have as many."""
    whole = axis == "images"
    first = timed[0]

    def each(point: Point) -> float:
        return 1.0 if whole else point.positions

    def growth(seconds: list[float], of_first: list[float], point: Point) -> float:
        if len(seconds) != len(of_first):  # what is slow ran once
            seconds, of_first = [statistics.median(seconds)], [statistics.median(of_first)]
        return statistics.median((a / each(point)) / (b / each(first)) for a, b in zip(seconds, of_first, strict=True))

    return [
        {
            "axis": axis,
            "value": point.value,
            "positions": point.positions,
            "milliseconds": 1e3 * point.timed.median,
            "microseconds": 1e6 * point.timed.median / point.positions,
            "times_first": growth(point.timed.seconds, first.timed.seconds, point),
            "work_times_first": (point.flops / each(point)) / (first.flops / each(first)),
            "pytorch_times_first": growth(point.theirs.seconds, first.theirs.seconds, point)
            if point.theirs and first.theirs
            else None,
            "times_pytorch": ratio(point.theirs, point.timed) if point.theirs else None,
            "seconds": point.timed.seconds,
            "pytorch_seconds": point.theirs.seconds if point.theirs else None,
        }
        for point in timed
    ]


def main(_):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's processes share a GPU
    host_memory.keep_freed()  # as train does, and before this process's first look at its devices
    rows, missing = [], {}
    with_torch = _TORCH.value and importlib.util.find_spec("torch") is not None
    if _TORCH.value and not with_torch:
        missing["PyTorch"] = "is not installed here: `make .venv-all/ready`, then .venv-all/bin/python"
    for axis in _AXES.value:
        if axis == "devices" and jax.default_backend() != "cpu":
            missing[axis] = "are simulated on CPU only: JAX_PLATFORMS=cpu python -m benchmarks.scaling --axes=devices"
            continue
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
            of_axis = points(axis, Maker(pathlib.Path(scratch), stack, with_torch))
            in_turns([way for point in of_axis for way in (point.timed, point.theirs) if way], _ROUNDS.value)
        rows += results(axis, of_axis)
    print(f"{jax.devices()[0].device_kind}\n\n{table(rows, COLUMNS)}\n")
    for what, why in missing.items():
        print(f"not measured here: {what}: {why}")
    if _OUTPUT.value:
        record = {"rounds": _ROUNDS.value, "points": rows, "not_measured": missing}
        write(_OUTPUT.value, record | origin(("jax", "jaxlib", "torch", "transformers")))


if __name__ == "__main__":
    app.run(main)
