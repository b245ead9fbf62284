"""Row plans: whole, as good as packing everything at once, the same however they were made."""

import concurrent.futures
import json
import multiprocessing
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import small_corpus
from test_packing import plain_best_fit_decreasing

from data_pipelines import pieces, plan, store, tokenizer
from data_pipelines.document import Document
from data_pipelines.geometry import Geometry

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    small_corpus.write(root)
    return root


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fragments_of(made: plan.Plan) -> np.ndarray:
    return np.concatenate([made[i] for i in range(len(made))])


def make(root, folder, source="interleaved", window=16, workers=0, **geometry):
    dataset = store.Dataset.open(root / source)
    shape = Geometry.from_config(small_corpus.config_for(root))
    shape = Geometry(**{**shape.__dict__, **geometry})
    return plan.make_plan(dataset, tokenizer.load("bytes"), shape, folder, window, workers)


@pytest.mark.parametrize("source", small_corpus.SOURCES)
@pytest.mark.parametrize("delimiters", [False, True])
def test_every_position_of_every_document_once(root, tmp_path, source, delimiters):
    made = make(root, tmp_path / "plan", source, image_delimiters=delimiters)
    dataset = store.Dataset.open(root / source)
    axes = [small_corpus.axis(document, delimiters) for document in dataset]
    seen = {(d, p): 0 for d, axis in enumerate(axes) for p in range(len(axis))}
    for i in range(len(made)):
        row = made[i]
        assert (row["stop"] - row["start"]).sum() <= small_corpus.ROW_LENGTH
        assert row["images"].sum() <= small_corpus.PER_ROW
        for f in row:
            for p in range(f["start"], f["stop"]):
                seen[int(f["document"]), p] += 1
            kinds = [kind for kind, _ in axes[f["document"]][f["start"] : f["stop"]]]
            assert kinds.count("image") == f["images"] * small_corpus.POSITIONS  # whole ones
    assert set(seen.values()) == {1}
    kinds = [kind for axis in axes for kind, _ in axis]
    report = made.report
    assert report["documents"] == len(dataset)
    assert made.positions == report["positions"] == len(kinds)
    assert made.images * small_corpus.POSITIONS == kinds.count("image")
    assert report["text_tokens"] == kinds.count("text")
    assert made.fill == pytest.approx(len(kinds) / len(made) / small_corpus.ROW_LENGTH)


@pytest.mark.parametrize("source", small_corpus.SOURCES)
def test_fill_against_offline_best_fit_decreasing_of_the_whole_corpus(root, tmp_path, source):
    """Windows of 16 documents, far smaller than anyone would choose, are the hard case."""
    made = make(root, tmp_path / "plan", source)
    fragments = fragments_of(made)
    offline = plain_best_fit_decreasing(
        (fragments["stop"] - fragments["start"]).tolist(),
        fragments["images"].tolist(),
        small_corpus.ROW_LENGTH,
        small_corpus.PER_ROW,
    )
    whole = make(root, tmp_path / "whole", source, window=1_000)
    assert len(whole) <= offline / 0.98
    assert len(made) <= offline / 0.93


def test_the_same_whoever_makes_it(root, tmp_path):
    alone = make(root, tmp_path / "alone")
    together = make(root, tmp_path / "together", workers=2)
    assert files_of(alone.folder) == files_of(together.folder)


def test_goes_on_where_it_stopped(root, tmp_path, monkeypatch):
    whole = make(root, tmp_path / "whole")
    packed, real = [], plan.pack_fragments

    def dies(fragments, geometry):
        if len(packed) == 2:
            raise KeyboardInterrupt
        packed.append(len(fragments))
        return real(fragments, geometry)

    monkeypatch.setattr(plan, "pack_fragments", dies)
    with pytest.raises(KeyboardInterrupt):
        make(root, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(FileNotFoundError, match="data_pipelines.plan"):
        plan.Plan.open(tmp_path / "stopped")
    first = sorted((tmp_path / "stopped.incomplete" / "windows").glob("*.npz"))
    assert len(first) == 2
    times = [file.stat().st_mtime_ns for file in first]
    kept = []
    monkeypatch.setattr(plan, "pack_fragments", real)
    monkeypatch.setattr(plan, "_join", lambda files, *a, join=plan._join: kept.extend(
        file.stat().st_mtime_ns for file in files[:2]) or join(files, *a))  # fmt: skip
    assert files_of(make(root, tmp_path / "stopped").folder) == files_of(whole.folder)
    assert kept == times
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stopped", "stopped.lock", "whole", "whole.lock"]


def test_processes_that_want_the_same_plan(root, tmp_path):
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        plans = list(pool.map(make, [root] * 2, [tmp_path / "plan"] * 2))
    assert files_of(plans[0].folder) == files_of(make(root, tmp_path / "alone").folder)


def test_another_config_is_another_plan(root):
    config = small_corpus.config_for(root)
    changes = {"row_length": 64, "image.per_row": 2, "data.window": 8, "data.caption_order": "random",
               "data.image_delimiters": True, "image.positions": 5}  # fmt: skip
    dataset, encoder = store.Dataset.open(root / "captions"), tokenizer.load("bytes")
    folders = {plan.plan_folder(config, "captions", dataset, encoder)}
    for key, value in changes.items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({key: value})
        folders.add(plan.plan_folder(changed, "captions", dataset, encoder))
    assert len(folders) == 1 + len(changes)
    config.image.size, config.seed, config.data.image_attention = 8, 3, "causal"  # these leave the packing alone
    assert plan.plan_folder(config, "captions", dataset, encoder) in folders


def test_images_without_slots_name_the_document(root, tmp_path):
    with pytest.raises(ValueError, match=r"captions.*document 0 \('captions-0'\).*0 image slots.*image.per_row"):
        make(root, tmp_path / "plan", "captions", per_row=0)
    make(root, tmp_path / "text", "text", per_row=0)  # text needs none


def test_image_longer_than_a_row():
    with pytest.raises(ValueError, match=r"258 positions .*row_length = 257"):
        Geometry(row_length=257, positions=256, per_row=1, size=8, image_delimiters=True)


def test_caption_order():
    image, text = b"image", "text"
    captions = [Document(str(i), "captions", (image, text)) for i in range(200)]

    def first(document, order):
        return pieces.of_document(document, order)[1]

    assert all(first(c, "text_first") == text and first(c, "image_first") == image for c in captions)
    random = [first(c, "random") for c in captions]
    assert 60 < random.count(text) < 140
    turned = [Document(c.id, "captions", (text, image)) for c in captions]
    assert [first(c, "random") for c in turned] == random  # decided by the id alone
    story = Document("0", "interleaved", (image, text, image))
    assert pieces.of_document(story, "text_first")[1:-1] == [image, text, image]


def test_long_texts_are_cut_before_whitespace():
    rng = np.random.default_rng(0)
    text = small_corpus.words(rng, 20_000)
    cut = pieces.cut_text(text)
    assert "".join(cut) == text and len(cut) > 3
    assert all(len(piece) <= pieces.LONGEST_PIECE for piece in cut) and all(piece[0] == " " for piece in cut[1:])
    assert [len(piece) for piece in pieces.cut_text("x" * 40_000)] == [4_096] * 9 + [3_136]


def test_command(root, tmp_path):
    overrides = [f"--config.data.root={root}", f"--config.data.plans={tmp_path}", "--config.row_length=256"]
    command = [sys.executable, "-m", "data_pipelines.plan", "--config=configs/small.py", *overrides]
    command += ["--config.data.tokenizer=bytes", "--workers=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["source", *small_corpus.SOURCES]
    reports = [json.loads(path.read_text())["report"] for path in sorted(tmp_path.glob("*/plan.json"))]
    assert [report["documents"] for report in reports] == [90, 60, 50]
