"""Weights & Biases: the same run over restarts, what is sent, and what is missing or cannot be reached."""

import importlib.util
import json
import sys
import time
import types

import pytest

from nmm_jax.training import metrics
from tests import tiny


@pytest.fixture
def config():
    config = tiny.get_config()
    config.log.wandb = "pretraining"
    return config


class FakeWandb(types.ModuleType):
    def __init__(self, unreachable=False):
        super().__init__("wandb")
        self.unreachable, self.begun, self.lines, self.finished = unreachable, [], [], 0
        self.errors = types.SimpleNamespace(CommError=ConnectionError)

    def init(self, **settings):
        if self.unreachable:
            raise ConnectionError("timed out")
        self.begun.append(settings)
        return self

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_restarted_run_is_the_same_one_there(wandb, config, tmp_path):
    (tmp_path / "run").mkdir()
    for start in (0, 1):
        writer = metrics.Writer(tmp_path / "run", start, config)
        writer.write({"step": start + 1, "loss": 0.5, "moe/tokens_per_expert": [[1, 2]]})
        writer.close()
    first, second = wandb.begun
    assert first == second and first["resume"] == "allow" and first["id"]
    assert (first["project"], first["name"]) == ("pretraining", "run")
    assert first["config"]["optimizer"]["learning_rate"] == config.optimizer.learning_rate
    assert wandb.lines == [(1, {"step": 1, "loss": 0.5}), (2, {"step": 2, "loss": 0.5})]
    assert wandb.finished == 2


def test_another_folder_is_another_run(wandb, config, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        metrics.Writer(tmp_path / name, 0, config).close()
    assert wandb.begun[0]["id"] != wandb.begun[1]["id"]


def test_a_run_goes_on_where_it_cannot_be_reached(wandb, config, tmp_path, capsys):
    wandb.unreachable = True
    writer = metrics.Writer(tmp_path, 0, config)
    writer.write({"step": 1, "loss": 0.5})
    writer.close()
    assert "Weights & Biases cannot be reached, the run goes on without: timed out" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5


def test_it_is_asked_for_and_not_installed(monkeypatch, config, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="log.wandb = 'pretraining' needs a package .* pip install wandb"):
        metrics.Writer(tmp_path, 0, config)


@pytest.mark.extras
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_package_writes_a_run_without_a_network(monkeypatch, config, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = metrics.Writer(tmp_path, 0, config)
    for step in (1, 2, 2, 3):
        writer.write({"step": step, "loss": 1 / step})
    writer.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] in kept.name
    until = time.monotonic() + 60  # a process of its own writes it, and may be slow
    while b"loss" not in kept.read_bytes():
        assert time.monotonic() < until, kept.read_bytes()
        time.sleep(0.1)
