import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import loading
from data_pipelines import store
from data_pipelines.geometry import Geometry
from data_pipelines.rows import build_documents
from data_pipelines.scenes.corpus import Corpus
from nmm_jax import models
from nmm_jax.evaluate import evaluate
from nmm_jax.evaluation import restored, results
from nmm_jax.parallel.mesh import make_mesh
from nmm_jax.training.checkpoints import CheckpointError, Checkpoints
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.state import initial_state

TINY = {"model.width": 32, "model.heads": 2, "model.ffn_width": 64, "evaluation.batch_rows": 4}
SOURCES = ("captions", "interleaved", "text")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    Corpus().write(str(root), dict.fromkeys(SOURCES, 4), held_out=24, questions=36)
    return root


@pytest.fixture(scope="module")
def workdir(root, tmp_path_factory):
    """A run that has checkpoints of steps 0 and 5, neither trained."""
    workdir = tmp_path_factory.mktemp("run")
    config = loading.load("configs/quickstart.py", {**TINY, "data.root": str(root)})
    model, optimizer = models.build(config), make_optimizer(config)
    checkpoints = Checkpoints(str(workdir), keep=2)
    for step in (0, 5):
        state = initial_state(model, optimizer, make_mesh(config), seed=step)
        checkpoints.save(step, state, {"config": loading.to_json(config), "data": {}, "seen": {}})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def restored_run(workdir):
    return restored.restore(str(workdir), 5)


@pytest.fixture(scope="module")
def found(restored_run):
    run, tokenizer = restored_run
    return evaluate(run, tokenizer, ("held_out", "questions"), rows=1000)


def test_keys(found):
    assert set(found) == {"step", "notes", "held_out", "shuffled_images", "image_gain", "questions"}
    assert found["step"] == 5
    assert tuple(found["held_out"]) == SOURCES
    for loss in found["held_out"].values():
        assert set(loss) == {"loss", "standard_error", "tokens", "rows"}
    assert set(found["shuffled_images"]) == set(found["image_gain"]) == {"captions", "interleaved"}
    kinds = {"colour", "count", "right", "left", "change", "caption"}
    assert set(found["questions"]) == kinds | {"colour_and_count", "seen", "held_out_combinations"}
    for kind in kinds:
        score = found["questions"][kind]
        assert {"accuracy", "base", "gain", "standard_error", "count", "seen", "held_out_combinations"} <= set(score)
        assert score["count"] == 6
    json.dumps(found, allow_nan=False)


def test_loss_is_that_of_the_documents_one_by_one(restored_run, found, root):
    """Packed rows give each document the loss it has alone; in float64, from logits, without our loss function."""
    run, tokenizer = restored_run
    geometry = Geometry.from_config(run.config)
    unembedding = np.asarray(run.model.unembedding(run.params), np.float64)
    hidden_of = jax.jit(lambda batch: run.model.hidden(run.params, batch)[0])
    for number, source in enumerate(SOURCES):
        documents = list(store.Dataset.open(root / source, store.HELD_OUT))
        batch = build_documents(documents, tokenizer, geometry, source=number)
        logits = np.asarray(hidden_of(batch), np.float64) @ unembedding
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        ce = log_z - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        expected = (ce * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        assert found["held_out"][source]["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["held_out"][source]["tokens"] == batch["loss_mask"].sum()


def test_an_untrained_model_is_near_a_uniform_guess_and_images_gain_it_nothing(restored_run, found):
    run, _ = restored_run
    for loss in found["held_out"].values():
        assert loss["loss"] == pytest.approx(math.log(run.config.model.vocab_size), rel=0.2)
    for gain in found["image_gain"].values():
        assert abs(gain["drop"]) < 0.05


def test_fewer_rows(restored_run, found):
    run, tokenizer = restored_run
    fewer = evaluate(run, tokenizer, ["held_out"], rows=3)
    assert all(loss["rows"] <= 3 for loss in fewer["held_out"].values())
    assert "questions" not in fewer


def test_the_command_in_a_new_process(workdir, found):
    command = [sys.executable, "-m", "nmm_jax.evaluate", f"--workdir={workdir}", "--step=5", "--rows=1000"]
    output = workdir / "copy.json"
    done = subprocess.run(
        [*command, f"--output={output}"], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    assert "colour_and_count" in done.stdout and "captions" in done.stdout
    again = json.loads(output.read_text())
    assert again == json.loads((workdir / "evaluation" / "5.json").read_text())
    assert again["questions"] == found["questions"]
    assert set(again["in_context"]) == {"captions"} and "captions in context" in done.stdout
    assert again["in_context"]["captions"]["captions"] > 3
    for source in SOURCES:
        assert again["held_out"][source]["loss"] == pytest.approx(found["held_out"][source]["loss"], rel=1e-6)


def test_tasks_of_one_step_are_kept_side_by_side(tmp_path):
    results.save({"step": 3, "notes": [], "held_out": {"a": 1}}, str(tmp_path))
    results.save({"step": 3, "notes": [], "questions": {"b": 2}}, str(tmp_path))
    results.save({"step": 4, "notes": [], "questions": {}}, str(tmp_path))
    assert results.read(str(tmp_path), 3) == {"step": 3, "notes": [], "held_out": {"a": 1}, "questions": {"b": 2}}
    assert results.read(str(tmp_path), 9) is None


def test_a_step_that_is_not_there(workdir):
    with pytest.raises(CheckpointError, match=r"step 7.*\[0, 5\]"):
        restored.restore(str(workdir), 7)


def test_an_unknown_task(restored_run):
    with pytest.raises(ValueError, match="there is no task 'heldout'; there are held_out, questions"):
        evaluate(*restored_run, ["heldout"], rows=1)


def test_data_without_held_out_documents_or_questions(workdir, root, tmp_path):
    for source in SOURCES:
        with store.DatasetWriter(tmp_path / source, source) as writer:
            for document in store.Dataset.open(root / source, store.HELD_OUT):
                writer.add(document, "train")
    (tmp_path / "tokenizer.json").write_text((root / "tokenizer.json").read_text())
    run, tokenizer = restored.restore(str(workdir), None, str(tmp_path))
    with pytest.raises(ValueError, match=r"'captions' has no held-out documents.*\['train'\].*--held_out="):
        evaluate(run, tokenizer, ["held_out"], rows=1)
    assert "there is no dataset" in evaluate(run, tokenizer, ["questions"], rows=1)["notes"][0]
