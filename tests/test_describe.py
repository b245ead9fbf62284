"""`python -m nmm_jax.describe`, as a user calls it."""

import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent


def describe(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "nmm_jax.describe", *arguments],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_json():
    run = describe("--config=configs/early_fusion.py:275m", "--format=json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert round(found["paper_parameters"] / 1e6, 1) == 274.8
    assert sum(found["parts"].values()) == found["parameters"] == found["active_parameters"]
    assert 1.5e9 < found["flops_per_token"] < 6 * found["parameters"] + 12 * 24 * 800 * 1024


def test_a_model_of_100_billion_parameters_is_described_in_seconds():
    start = time.time()
    larger = ("--config.model.width=12800", "--config.model.depth=60", "--config.model.heads=100")
    run = describe("--config=configs/early_fusion.py:8b", *larger)
    assert run.returncode == 0, run.stderr
    assert "119.66B" in run.stdout
    assert time.time() - start < 60  # mostly the start of Python, on a machine that others use too


def test_a_misspelt_size_is_refused_with_the_sizes():
    run = describe("--config=configs/early_fusion.py:27m")
    assert run.returncode != 0
    assert "expected SIZE or SIZE,STEPS, where SIZE is one of 275m, 464m" in run.stderr
