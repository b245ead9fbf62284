"""How full a plan's rows are, against best-fit-decreasing of the whole corpus at once, and how fast packing is.

    python -m benchmarks.packing --config=configs/small.py --config.data.root=data --output=packing.json

Makes the plans where they are missing. The rival knows all documents before it packs the first, and looks at every
open row; `bound` is the most that any packing could fill, if positions or image slots were all that mattered.
"""

import json
import pathlib
import time

import numpy as np
from absl import app, flags

from configs import loading
from data_pipelines import plan
from data_pipelines.geometry import Geometry
from data_pipelines.packing import pack

_CONFIG = loading.define_config_flag()
_OUTPUT = flags.DEFINE_string("output", "packing.json", "where the numbers go, as JSON")


def offline_best_fit_decreasing(positions: np.ndarray, images: np.ndarray, row_length: int, per_row: int) -> int:
    """Rows that the textbook's algorithm needs; positions and images of fragments, int [n]."""
    left = np.zeros((len(positions), 2), np.int64)  # positions and slots left in each open row
    rows = 0
    for n in np.argsort(-positions, kind="stable"):
        room, slots = left[:rows, 0], left[:rows, 1]
        fitting = np.where((room >= positions[n]) & (slots >= images[n]), room, row_length + 1)
        row = int(fitting.argmin()) if rows else 0
        if not rows or fitting[row] > row_length:
            row, rows = rows, rows + 1
            left[row] = row_length, per_row
        left[row] -= positions[n], images[n]
    return rows


def measure(made: plan.Plan, geometry: Geometry) -> dict:
    fragments = np.concatenate([made[i] for i in range(len(made))])
    positions, images = (fragments["stop"] - fragments["start"]).astype(int), fragments["images"].astype(int)
    begin = time.perf_counter()
    pack(positions.tolist(), images.tolist(), geometry.row_length, geometry.per_row)
    seconds = time.perf_counter() - begin
    offline = offline_best_fit_decreasing(positions, images, geometry.row_length, geometry.per_row)
    least = max(-(-made.positions // geometry.row_length), -(-made.images // geometry.per_row))
    size = made.positions / geometry.row_length
    return {
        "fragments": len(fragments),
        "rows": len(made),
        "fill": made.fill,
        "slot_fill": made.report["slot_fill"],
        "offline_rows": offline,
        "offline_fill": size / offline,
        "as_good": offline / len(made),
        "bound": size / least,
        "microseconds_per_fragment": 1e6 * seconds / len(fragments),
    }


def main(_):
    config = _CONFIG.value
    geometry = Geometry.from_config(config)
    results = {source: measure(made, geometry) for source, made in plan.ensure_plans(config).items()}
    print(
        f"{'source':<14}{'fragments':>11}{'rows':>8}{'fill':>8}{'offline':>9}{'as good':>9}{'bound':>8}{'us each':>9}"
    )
    for source, r in results.items():
        print(
            f"{source:<14}{r['fragments']:>11,}{r['rows']:>8,}{r['fill']:>8.1%}{r['offline_fill']:>9.1%}"
            f"{r['as_good']:>9.1%}{r['bound']:>8.1%}{r['microseconds_per_fragment']:>9.1f}"
        )
    about = {"row_length": geometry.row_length, "positions": geometry.positions, "per_row": geometry.per_row}
    pathlib.Path(_OUTPUT.value).write_text(json.dumps({"geometry": about, "sources": results}, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
