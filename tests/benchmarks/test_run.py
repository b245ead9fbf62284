"""All benchmarks in a row: which there are, how each is called, and what becomes of one that fails."""

import json
import pathlib
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from absl import app

from benchmarks import run

ROOT = pathlib.Path(run.__file__).parent.parent
BY_HAND = {"packing", "image_slots"}  # want a config with data


def test_every_benchmark_is_among_them():
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "    app.run(main)" in path.read_text()}
    assert {each.module or name for name, each in run.BENCHMARKS.items()} == programs - BY_HAND - {"run"}


def test_how_it_is_called(tmp_path):
    assert run.command("data", tmp_path, smoke=False) == ["-m", "benchmarks.data", f"--output={tmp_path}/data.json"]
    fusion = run.command("fusion", tmp_path, smoke=True)
    assert fusion[:3] == ["-m", "benchmarks.train_step", "--fusion"] and "--rounds=1" in fusion
    assert fusion[-1] == f"--output={tmp_path}/fusion.json"


def test_one_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "fits.json").write_text("{}")  # of a run before
    called = []

    def process(command, check):
        name = command[2].removeprefix("benchmarks.")
        called.append(name)
        if name == "images":
            pathlib.Path(command[-1].removeprefix("--output=")).write_text("{}")
        return SimpleNamespace(returncode=int(name == "data"))

    monkeypatch.setattr(run.subprocess, "run", process)
    assert run.run_all(["data", "images", "fits"], tmp_path, smoke=False) == ["data"]
    assert called == ["data", "images", "fits"]
    summary = capsys.readouterr().out.split("== 2 of 3 ran")[1]
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in summary.strip().splitlines()[2:]]
    assert lines == [["data", "failed, code 1"], ["images", "done"], ["fits", run.NOTHING]]


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(app.UsageError, match="there is no dta; there are train_step, "):
        run.run_all(["dta", "data"], tmp_path, smoke=False)


@pytest.mark.slow
@pytest.mark.extras
@pytest.mark.parametrize("name", run.BENCHMARKS)
def test_each_runs_at_its_smallest(name, tmp_path):
    command = [sys.executable, *run.command(name, tmp_path, smoke=True)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"{shlex.join(command)}\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}"
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"machine", "versions", "commit", "date"} <= record.keys()
    assert sum(line.startswith("|--") for line in found.stdout.splitlines()) == 1, "one table"
