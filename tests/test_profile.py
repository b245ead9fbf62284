"""A window of a real run, traced and read again."""

import json
import os
import subprocess
import sys

import pytest

from tests.data_pipelines import small_corpus
from tests.training_runs import ROOT, train


def command(workdir, *words):
    return subprocess.run(
        [sys.executable, "-m", "nmm_jax.profile", f"--workdir={workdir}", *words],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_a_traced_window(tmp_path):
    small_corpus.write(tmp_path / "data")
    run = tmp_path / "run"
    train(tmp_path / "data", run, "steps=6", "schedule.warmup=1", "profile.start=3", "profile.steps=2")
    done = command(run, "--format=json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["steps"], found["devices"]) == (2, 1)
    assert 0 <= found["idle"] < found["seconds"]
    by_part = found["by_part"]
    assert {"forward", "backward"} <= by_part["ffn"].keys() and by_part["optimizer"].keys() == {"update"}
    assert {"attention", "attention/attend", "embedding", "loss", "norm"} <= by_part.keys()
    assert sum(sum(of_part.values()) for of_part in by_part.values()) == pytest.approx(found["busy"])
    assert sum(by_part.get("other", {}).values()) < 0.3 * found["busy"]
    told = command(run).stdout
    assert told.startswith("2 steps of ") and "longest instructions" in told


def test_a_run_without_a_trace(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 1 and "has no trace: train with --config.profile.start=STEP" in done.stderr
