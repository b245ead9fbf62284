import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import loading
from data_pipelines.geometry import Geometry
from data_pipelines.rows import build_documents
from data_pipelines.scenes.corpus import Corpus
from data_pipelines.store import HELD_OUT, Dataset
from nmm_jax import models, routing
from nmm_jax.evaluation import restored
from nmm_jax.evaluation.routing import Counts, Experts, statistics
from nmm_jax.parallel.mesh import make_mesh
from nmm_jax.training.checkpoints import Checkpoints, Run
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.state import initial_state
from tests.test_report import Page

SOURCES = ("captions", "interleaved", "text")
TINY = {
    "model.width": 32,
    "model.depth": 4,
    "model.heads": 2,
    "model.ffn_width": 64,
    "model.moe.experts": 4,
    "model.moe.top_k": 2,
    "model.moe.every": 2,
    "evaluation.batch_rows": 4,
}
KEYS = {
    "rows", "tokens", "expert_tokens", "dropped", "load", "image_share", "empty_experts", "imbalance", "specialisation",
    "specialisation_baseline", "deviation", "entropy", "entropy_share",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    Corpus().write(str(root), dict.fromkeys(SOURCES, 4), held_out=24, questions=6)
    return root


@pytest.fixture(scope="module")
def workdir(root, tmp_path_factory):
    """A run with an untrained model of experts in layers 1 and 3 of 4."""
    workdir = tmp_path_factory.mktemp("run")
    config = loading.load("configs/quickstart.py", {**TINY, "data.root": str(root)})
    model = models.build(config)
    checkpoints = Checkpoints(str(workdir), keep=1)
    state = initial_state(model, make_optimizer(config), make_mesh(config), seed=0)
    checkpoints.save(5, state, {"config": loading.to_json(config), "data": {}, "seen": {}})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def run(workdir):
    return restored.restore(str(workdir))


@pytest.fixture(scope="module")
def found(run):
    return routing.measure(run[0], rows=1000)


def test_keys(found):
    assert set(found) == {"step", "experts", "sources", "all"}
    labels = ["0", "1", "2", "3"]
    kind = {"count": 4, "top_k": 2, "modality": "agnostic", "image": 0}
    assert found["experts"] == {**kind, "labels": labels, "layers": [1, 3]}
    assert tuple(found["sources"]) == SOURCES
    for one in (*found["sources"].values(), found["all"]):
        assert set(one) == KEYS
        assert np.shape(one["image_share"]) == np.shape(one["load"]["all"]) == (2, 4)
        assert np.shape(one["expert_tokens"]["image"]) == (2, 4)
        for key in ("dropped", "empty_experts", "imbalance", "specialisation"):
            assert np.shape(one[key]) == (2,)
        for key in ("deviation", "entropy", "entropy_share"):
            assert np.shape(one[key]["text"]) == (2,)
        assert one["dropped"] == [0, 0]
    json.dumps(found, allow_nan=False)


def test_every_token_of_the_documents_is_counted_once_for_each_choice(run, found, root):
    """Neither padding, nor the rows that fill up the last batch."""
    run, tokenizer = run
    total = {"text": 0, "image": 0}
    for number, source in enumerate(SOURCES):
        documents = list(Dataset.open(root / source, HELD_OUT))
        batch = build_documents(documents, tokenizer, Geometry.from_config(run.config), source=number)
        image, real = batch["image_index"] >= 0, batch["segment_ids"] > 0
        expected = {"text": int((real & ~image).sum()), "image": int((real & image).sum())}
        one = found["sources"][source]
        assert one["tokens"] == expected
        for modality in total:
            assert np.sum(one["expert_tokens"][modality], 1).tolist() == [2 * expected[modality]] * 2
            total[modality] += expected[modality]
    assert found["all"]["tokens"] == total
    assert found["sources"]["text"]["tokens"]["image"] == 0 < total["image"]


@pytest.mark.parametrize("delimiters, of_images", [("text", 0), ("boi_image", 1), ("image", 2)])
def test_delimiters_count_as_the_router_takes_them(delimiters, of_images):
    """Two images of 4 positions, each between delimiters."""
    keys = {"data.image_delimiters": True, "model.delimiter_weights": delimiters, "model.moe.modality": "grouped"}
    config = loading.load("configs/quickstart.py", {**TINY, **keys, "model.moe.top_k": 1})
    model = models.build(config)
    mesh = make_mesh(config)
    p, rows = config.image.positions, config.row_length
    index = np.full((1, rows), -1, np.int32)
    index[0, 2 : 2 + p], index[0, 4 + p : 4 + 2 * p] = np.arange(p), p + np.arange(p)
    length = 8 + 2 * p
    inside = np.arange(rows)[None] < length
    size, slots = config.image.size, config.image.per_row
    batch = {
        "tokens": np.zeros((1, rows), np.int32),
        "segment_ids": inside.astype(np.int32),
        "positions": np.arange(rows, dtype=np.int32)[None],
        "attend_until": np.arange(1, rows + 1, dtype=np.int32)[None],
        "image_index": index,
        "images": np.zeros((1, slots, size, size, 3), np.uint8),
        "image_mask": np.arange(slots)[None] < 2,
    }
    run = Run(config, model, model.init(jax.random.key(0)), 0, mesh)
    found = routing.make_route(run)(run.params, batch)
    images = 2 * (p + of_images)
    assert found["tokens"].tolist() == [length - images, images]
    assert found["expert_tokens"].sum(-1).tolist() == [[length - images, images]] * 2


def test_an_untrained_router_is_undecided_and_blind(found):
    for one in (found["sources"]["captions"], found["all"]):
        for modality in ("text", "image"):
            assert min(one["entropy_share"][modality]) > 0.8
            assert max(one["entropy_share"][modality]) <= 1 + 1e-6


def test_fewer_rows(run):
    found = routing.measure(run[0], rows=3)
    assert [one["rows"] for one in found["sources"].values()] == [3, 3, 3]
    assert found["all"]["rows"] == 9


def test_the_command_in_a_new_process(workdir, found):
    done = subprocess.run(
        [sys.executable, "-m", "nmm_jax.routing", f"--workdir={workdir}", "--rows=1000"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "specialisation" in done.stdout and "interleaved" in done.stdout
    again = json.loads((workdir / "evaluation" / "routing-5.json").read_text())
    assert again["experts"] == found["experts"]
    assert again["all"]["tokens"] == found["all"]["tokens"]
    page = Page((workdir / "routing-5.html").read_text())
    assert not page.open and page.tags.count("svg") == 3


def test_a_dense_model():
    config = loading.load("configs/quickstart.py")
    run = Run(config, models.build(config), None, 0, None)
    with pytest.raises(ValueError, match=r"this run's model has no experts \(model.moe.experts = 0\)"):
        routing.measure(run, rows=1)


def made_up(experts):
    """Two sources, of both modalities and of text alone, of which the last expert has nothing."""
    generator = np.random.default_rng(0)
    of_source = {}
    for source, images in {"pairs": 300, "prose": 0}.items():
        expert_tokens = np.zeros((len(experts.layers), 2, experts.count), int)
        for m, n in enumerate((100, images)):
            allowed = slice(0, -1)
            if experts.image:
                allowed = slice(experts.count - experts.image, None) if m else slice(0, experts.count - experts.image)
            for layer in expert_tokens:
                size = len(layer[m, allowed])
                layer[m, allowed] = generator.multinomial(n, np.full(size, 1 / size))
        entropy = 0.5 * np.array([[100, images]] * len(experts.layers))
        tokens = np.array([100, images])
        of_source[source] = Counts(expert_tokens, entropy, np.zeros(len(experts.layers), int), tokens, 4)
    return {
        "step": 20,
        "experts": experts.to_json(),
        "sources": {source: statistics(counts, experts) for source, counts in of_source.items()},
        "all": statistics(of_source["pairs"] + of_source["prose"], experts),
    }


def page_of(experts):
    page = Page(routing.render(made_up(experts), "my <run>", "early fusion, of some size"))
    assert not page.open
    fetched = [link for link in page.links if not link.startswith(("data:", "#", "https://arxiv.org/"))]
    assert not fetched and "script" not in page.tags and "link" not in page.tags
    assert page.tags.count("svg") == 3
    return page


def test_the_page_says_it_all():
    page = page_of(Experts(4, (0, 1)))
    for expected in (
        "my <run>", "step 20", "early fusion, of some size", "4 in each of 2 layers, 1 a token",
        "every expert may get every token", "200 text and 300 image tokens in 8 rows",
        "pairs (75% images)", "all sources (60% images)", "Of one modality alone, so nothing to tell apart: prose",
        "images among an expert's tokens (%)", "tokens at an expert / mean of all experts", "Hatched: no tokens",
        "specialisation: 1 − H(image share)", "deviation from uniform", "router entropy", "busiest expert",
        "0.189",  # the baseline of three images to a text token
        "evaluation/routing-20.json",
    ):  # fmt: skip
        assert expected in page.text, expected


def test_pages_of_experts_that_belong_to_a_modality():
    grouped = page_of(Experts(6, (0, 1, 2), modality="grouped", image=2))
    assert "a router among 4 experts for text (T), one among 2 for images (I)" in grouped.text
    assert "T3" in grouped.text and "I4" in grouped.text and "by construction" in grouped.text
    fixed = page_of(Experts(2, (1, 3), modality="fixed", image=1))
    assert "no router: one expert for text, one for images" in fixed.text


def test_a_page_of_many_experts_has_no_numbers_in_its_cells():
    page = page_of(Experts(64, tuple(range(24))))
    assert page.tags.count("text") < 500  # there are 24 * 64 cells in each of 5 heatmaps
    assert "expert" in page.text and "60" in page.text  # every fourth has its label


def test_the_table_names_the_busiest_expert():
    found = made_up(Experts(3, (1,), modality="grouped", image=1))
    lines = routing.table(found).splitlines()
    busiest = next(line for line in lines if line.startswith("  1 "))
    assert "I2: 60%, 100% images" in busiest  # all 300 images, of 500 tokens
    prose = next(line for line in lines if line.startswith("  prose "))
    assert prose.split()[4] == "-" and prose.split()[-1] == "0%"
