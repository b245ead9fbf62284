"""The training command: several processes, what it refuses, what it says."""

import contextlib
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from configs import loading
from data_pipelines import paths, plan
from data_pipelines.balance import arrange
from data_pipelines.stream import Stream
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.train import local_batches
from nmm_jax.train import train as train_here
from nmm_jax.training import metrics
from nmm_jax.training.checkpoints import Checkpoints
from tests.data_pipelines import small_corpus
from tests.training_runs import ROOT, command, environment, fails, lines, train

MESH = ("mesh.fsdp=4", "mesh.tensor=2", "steps=20")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    small_corpus.write(root)
    return root


@pytest.fixture(scope="module")
def short_run(corpus, tmp_path_factory):
    """Two steps on one device, saved."""
    workdir = tmp_path_factory.mktemp("runs") / "short"
    train(corpus, workdir, "steps=2", "schedule.warmup=1", "log.tensorboard=true")
    return workdir


def test_rows_are_dealt_out_by_their_images_where_there_is_a_tower(corpus):
    config = small_corpus.config_for(corpus)
    config.data.workers = 0
    plan.ensure_plans(config, progress=False)
    stream, mesh = Stream.open(config), mesh_of({}, jax.devices()[:1])

    def images(family):
        config.model.family = family
        with contextlib.closing(local_batches(config, stream, mesh, 0)) as found:
            return next(found)["image_mask"].sum(1)

    as_they_come, dealt = images("early_fusion"), images("late_fusion")
    np.testing.assert_array_equal(dealt, as_they_come[arrange(as_they_come)])
    assert not np.array_equal(dealt, as_they_come)


def test_metrics_that_cannot_be_uploaded_do_not_cost_the_checkpoint(corpus, tmp_path, monkeypatch):
    there = []  # checkpoints at each upload

    def upload(_, patience=0.0):
        there.append(Checkpoints(str(tmp_path), read_only=True).steps())
        if len(there) != 2:  # the second one is the first again
            raise paths.BucketError("no lines today")

    monkeypatch.setattr(metrics.Writer, "upload", upload)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is the tests'
    config = loading.load("tests/tiny.py", {"data.root": str(corpus)})
    with pytest.raises(paths.BucketError, match="no lines today"):
        train_here(config, str(tmp_path))
    assert there == [[], [7], [7], [7, 14]]


@pytest.mark.slow  # two programs for 8 devices are compiled
def test_two_processes_of_four_devices_stopped_and_finished_by_one_process(corpus, tmp_path):
    """launch/local.sh 2 x 4 on fsdp 4 x tensor 2, SIGTERM in the middle; one process of 8 devices goes on from there.
    The losses are those of a run that one process of 8 devices made alone."""
    train(corpus, tmp_path / "one", *MESH, devices=8)
    workdir = tmp_path / "two"
    training = command(corpus, workdir, *MESH)
    running = subprocess.Popen(
        ["launch/local.sh", "--processes=2", "--devices=4", "--", *training],
        cwd=ROOT,
        env=environment() | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while running.poll() is None and not ((workdir / "metrics.jsonl").exists() and len(lines(workdir)) >= 8):
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 143, said[-4000:]
    stopped = lines(workdir)[-1]["step"]
    assert 8 <= stopped < 20 and (workdir / "checkpoints" / str(stopped)).is_dir()

    assert f"checkpoints/{stopped}" in train(corpus, workdir, *MESH, devices=8)
    got, want = lines(workdir), lines(tmp_path / "one")
    assert [line["step"] for line in got] == list(range(1, 21))
    np.testing.assert_allclose([x["loss"] for x in got], [x["loss"] for x in want], rtol=1e-5)
    for name in ("tokens", "tokens/captions", "images"):
        assert [x[name] for x in got] == [x[name] for x in want]


def test_the_run_directory(short_run):
    assert {"config.json", "metrics.jsonl", "checkpoints"} <= {p.name for p in short_run.iterdir()}
    assert list(short_run.glob("events.out.tfevents.*"))
    first, second = lines(short_run)
    assert second["tokens"] > first["tokens"] == sum(first[f"tokens/{s}"] for s in small_corpus.SOURCES)
    assert {"time/step", "time/data_wait", "speed/tokens_per_second", "grad_norm", "param_norm"} <= set(first)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimizer.lerning_rate=1"], "no key 'optimizer.lerning_rate'; did you mean 'optimizer.learning_rate'"),
        (["batch_rows=8", "mesh.fsdp=3"], "does not divide the 1 devices that there are"),
        (["model.vocab_size=200"], "model.vocab_size = 200 has no room for the 262 tokens of data.tokenizer = 'bytes'"),
        (["model.width=64", "steps=4"], "holds another model: model.width was 32, is 64"),
        (["seed=1", "steps=4"], "was trained on other data: seed was 0, is 1"),
        (["data.weights=(0.3,0.3,0.4)", "steps=4"], "other data: data.weights was .* weights differs"),
    ],
)
def test_refusals(corpus, short_run, overrides, message):
    before = (short_run / "metrics.jsonl").read_bytes()
    assert re.search(message, fails(corpus, short_run, "schedule.warmup=1", *overrides))
    assert (short_run / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(corpus, tmp_path):
    said = fails(corpus, tmp_path, "optimizer.learning_rate=1e38", "schedule.warmup=0", "checkpoint.every=1")
    assert "at step" in said and "lower optimizer.learning_rate" in said
    assert all(np.isfinite(line["loss"]) and np.isfinite(line["param_norm"]) for line in lines(tmp_path))
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert all(step <= len(lines(tmp_path)) for step in saved)


def test_a_trunk_that_is_past_the_cooldown(corpus, short_run, tmp_path):
    said = fails(corpus, tmp_path, f"trunk.workdir={short_run}", "steps=5", "schedule.cooldown=4", "schedule.warmup=1")
    assert "trunk.step = 2 comes after the cooldown's beginning" in said and "--config.steps=6" in said
