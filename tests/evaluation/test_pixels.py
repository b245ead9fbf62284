"""Held-out losses of pixels, against a loop over held-out pictures; AIMv2's text with right and with other images."""

import json

import jax
import numpy as np
import pytest

from configs import loading
from data_pipelines.scenes.corpus import Corpus
from data_pipelines.stream import Stream
from data_pipelines.tokenizer import ByteTokenizer
from nmm_jax import models
from nmm_jax.evaluate import evaluate
from nmm_jax.evaluation import results
from nmm_jax.evaluation.pixels import prefixes
from nmm_jax.parallel.mesh import make_mesh
from nmm_jax.training.checkpoints import Run
from nmm_jax.training.pixel_loss import next_patches

ROWS = 7
TINY = {
    "row_length": 48,
    "image.size": 16,
    "image.patch": 4,
    "model.width": 16,
    "model.heads": 2,
    "model.depth": 1,
    "model.ffn_width": 32,
    "model.vision.width": 16,
    "model.vision.heads": 2,
    "model.vision.depth": 1,
    "model.vision.ffn_width": 32,
    "model.aim.head_width": 16,
    "model.aim.head_depth": 1,
    "model.dtype": "float32",
    "model.vocab_size": 300,
    "data.tokenizer": "bytes",
    "evaluation.batch_rows": 4,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    Corpus().write(str(root), {"captions": 4}, held_out=12, questions=0)
    return root


def run_of(family, root):
    config = loading.load(f"configs/encoder.py:{family}-small", {**TINY, "data.root": str(root)})
    model, rng = models.build(config), np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), model.abstract)
    return Run(config, model, params, 0, make_mesh(config))


def test_prefixes():
    assert prefixes(64) == (1, 16, 32, 48)
    assert prefixes(256) == (1, 64, 128, 192)
    assert prefixes(4) == (1, 2, 3)


def test_loss_is_that_of_patches_one_by_one(root):
    run = run_of("aim", root)
    found = evaluate(run, ByteTokenizer(), (), ROWS)
    assert set(found) == {"step", "notes", "pixels"}
    captions = found["pixels"]["captions"]
    assert captions["rows"] == ROWS and list(captions["by_prefix"]) == ["1", "4", "8", "12"]

    held_out = Stream.held_out(run.config, "captions")
    batch = held_out.batch(np.unique(np.linspace(0, len(held_out) - 1, ROWS).round().astype(int)).tolist())
    targets = np.asarray(next_patches(run.model.spec.vision, batch["images"]), np.float64)
    losses, zeros = [], []
    for prefix in (1, 4, 8, 12):
        given = batch | {"prefix": np.full(ROWS, prefix, np.int32)}
        pixels = np.asarray(run.model.predictions(run.params, given)[0], np.float64)
        here = [((pixels[b, i - 1] - targets[b, i - 1]) ** 2).mean() for b in range(ROWS) for i in range(prefix, 16)]
        assert captions["by_prefix"][str(prefix)]["value"] == pytest.approx(np.mean(here), rel=1e-4)
        losses += here
        zeros += [(targets[b, i - 1] ** 2).mean() for b in range(ROWS) for i in range(prefix, 16)]
    assert captions["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert captions["zero"] == pytest.approx(np.mean(zeros), rel=1e-4)
    assert captions["explained"]["value"] == pytest.approx(1 - np.sum(losses) / np.sum(zeros), rel=1e-4)
    json.dumps(found, allow_nan=False)
    assert "behind 12" in results.table(found)


def test_text_of_aimv2_with_right_and_with_other_images(root):
    run = run_of("aimv2", root)
    found = evaluate(run, ByteTokenizer(), (), ROWS)
    assert set(found) == {"step", "notes", "pixels", "held_out", "shuffled_images", "image_gain"}
    assert found["held_out"]["captions"]["rows"] == ROWS
    assert found["held_out"]["captions"]["loss"] != found["shuffled_images"]["captions"]["loss"]


def test_a_task_of_other_families_is_refused(root):
    with pytest.raises(ValueError, match="questions.*there are pixels"):
        evaluate(run_of("aim", root), ByteTokenizer(), ("questions",), ROWS)
