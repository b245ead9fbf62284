"""`python -m nmm_jax.describe`, as a user calls it."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from configs import deep_fusion, encoder, late_fusion, loading
from nmm_jax.describe import describe as described
from nmm_jax.describe import table

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


def test_late_fusion_shows_its_tower():
    text = table(described(late_fusion.get_config("289m")))
    for line in (
        "vision tower: width 384, depth 24, heads 16, head_dim 24, ffn_width 1,024, size 224, patch 14, tokens 256",
        "connector: mlp, from 16 x 16 patches to 256 positions",
        "N of the paper                     289,800,192  289.8M",
        "  of it text                       247,332,864  247.3M",
        "  of it vision                      42,467,328  42.5M",
    ):
        assert line in text
    d = described(late_fusion.get_config("289m"))  # C = 6 (N D + N_v D_v), an image of 256 positions being 256 patches
    assert d["paper_flops"] == pytest.approx(6 * d["positions"] * (247_332_864 + 0.5 * 42_467_328))


def test_deep_fusion_shows_what_is_trained():
    text = table(described(deep_fusion.get_config("cogvlm-17b")))
    assert "deep fusion: images have their own qkv, out, ffn in every layer" in text
    assert "visual_expert                    6,476,005,376   36.7%" in text
    assert "trainable                        6,618,628,096  6.62B" in text


def test_encoders_are_described_by_the_pair():
    text = table(described(encoder.get_config("clip-b")))
    assert "FLOPs of a pair (an image, and a text of 77 positions)" in text
    assert "pairs a step                            32,768" in text
    assert "N of the paper" not in text


def test_a_freeze_pattern_that_matches_nothing_is_refused():
    config = loading.load("configs/late_fusion.py:289m", {"optimizer.freeze": ("vison/*",)})
    with pytest.raises(ValueError, match=r"'vison/\*' matches no parameter \(did you mean vision/\*"):
        described(config)


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
