"""How much of a vision tower's compute goes to empty image slots: of all slots, and of those it goes through.

    python -m benchmarks.image_slots --config=configs/late_fusion.py:small --config.data.root=data \\
        --output=image_slots.json

Rows differ in how many images they have. The tower goes through a device's slots part by part, the filled ones first,
and stops when no device has any left (models/image_slots.py); rows are dealt out so that devices have about as many
(data_pipelines/balance.py), or left as they come. Counted in the rows of the training stream, batch after batch, for
several numbers of rows a device: the fewer, the more devices differ. Makes plans where they are missing; decodes
nothing and needs no accelerator.
"""

import json
import pathlib

import numpy as np
from absl import app, flags

from configs import loading
from data_pipelines import plan
from data_pipelines.balance import arrange
from data_pipelines.stream import Stream
from nmm_jax.models.image_slots import part_size

_CONFIG = loading.define_config_flag()
_OUTPUT = flags.DEFINE_string("output", "image_slots.json", "where the numbers go, as JSON")
_DEVICES = flags.DEFINE_multi_integer("devices", [1, 8, 64, 256], "devices that share a batch")
_ROWS = flags.DEFINE_multi_integer("rows", [2, 4, 8, 16, 32], "rows of each device")
_BATCHES = flags.DEFINE_integer("batches", 20, "that are counted, at least; more where they are small", 1)


def images_of_rows(stream: Stream, rows: int) -> np.ndarray:
    """Filled slots of the first rows of the stream, int [rows]."""
    found = np.zeros(rows, np.int64)
    for g in range(rows):
        found[g] = stream.images(g)
    return found


def empty_share(images: np.ndarray, devices: int, rows: int, slots: int, patches: int, dealt: bool) -> float:
    """Share of the tower's compute that is for empty slots; `slots` of a row."""
    batches = images[: len(images) // (devices * rows) * devices * rows].reshape(-1, devices * rows)
    if dealt:
        batches = np.stack([batch[arrange(batch)] for batch in batches])
    by_device = batches.reshape(-1, devices, rows).sum(2)
    part = part_size(rows * slots, patches)
    computed = np.ceil(by_device.max(1) / part) * part * devices
    return float(1 - by_device.sum() / computed.sum())


def main(_):
    config = _CONFIG.value
    plans = plan.ensure_plans(config)
    print(plan.table(plans))
    stream = Stream.open(config)
    most = max(d * r for d in _DEVICES.value for r in _ROWS.value)
    images = images_of_rows(stream, max(_BATCHES.value * most, 1))
    slots, patches = config.image.per_row, (config.image.size // config.image.patch) ** 2
    of_all = float(1 - images.mean() / slots)
    print(f"\nempty: {of_all:.1%} of all slots; of the tower's compute, by devices and rows of each:")
    table: dict[str, dict] = {"of_all_slots": of_all}
    for name, dealt in (("rows dealt out", True), ("as they come", False)):
        print(f"{name:<14}" + "".join(f"{rows:>8}" for rows in _ROWS.value))
        table[name] = {}
        for devices in _DEVICES.value:
            shares = [empty_share(images, devices, rows, slots, patches, dealt) for rows in _ROWS.value]
            table[name][devices] = dict(zip(map(str, _ROWS.value), shares, strict=True))
            print(f"{devices:>14}" + "".join(f"{share:8.1%}" for share in shares))
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
