"""The tables of docs/scaling_study: a law of the small runs says the loss of the largest."""

import csv
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
TABLES = sorted((ROOT / "docs" / "scaling_study").glob("*.csv"))


def rows_of(table):
    return list(csv.DictReader(table.read_text().splitlines()))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_five_sizes_by_five_budgets_of_each_architecture(table):
    rows = rows_of(table)
    assert not any(row["diverged"] == "True" for row in rows)
    for architecture in {row["architecture"] for row in rows}:
        points = {(row["n"], row["steps"]) for row in rows if row["architecture"] == architecture}
        sizes = {n for n, _ in points}
        assert sum(len({steps for n, steps in points if n == size}) >= 5 for size in sizes) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["early", "late", "moe"])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_the_largest_run_is_foretold(table, architecture, tmp_path):
    """As launch/study_report.sh fits them, without the bootstrap."""
    if architecture not in {row["architecture"] for row in rows_of(table)}:
        pytest.skip(f"{table.name} has no {architecture}")
    law = ["--law=late", "--n_vision=n_vision", "--d_vision=d_vision"] if architecture == "late" else ["--law=dense"]
    subprocess.run(
        [
            sys.executable, "-m", "nmm_jax.scaling.fit", f"--runs={table}",
            f"--where=architecture=={architecture}", *law,
            "--n=n", "--d=d", "--compute=c", "--loss=loss_captions,loss_interleaved,loss_text",
            "--held_out=size==w96", f"--output={tmp_path / 'fit.json'}",
        ],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["errors"]["held_out"]["runs"] == 1
    assert found["errors"]["held_out"]["mae_percent"] < 3
