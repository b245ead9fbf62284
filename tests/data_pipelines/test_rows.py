"""Rows against a hand-worked example and against an encoding of the documents position by position."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
import small_corpus

from data_pipelines import plan, rows, store, tokenizer
from data_pipelines.document import Document
from data_pipelines.geometry import Geometry
from data_pipelines.store import Dataset, DatasetWriter

BYTES = tokenizer.load("bytes")
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
TINY = Geometry(row_length=12, positions=4, per_row=1, size=4)


def build_all(dataset, folder, geometry, window=16) -> tuple[plan.Plan, rows.Batch]:
    made = plan.make_plan(dataset, BYTES, geometry, folder, window)
    builder = rows.RowBuilder(dataset, made, BYTES, geometry, source_index=1)
    batch = rows.allocate(len(made), geometry, BYTES.pad)
    for i in range(len(made)):
        builder.build(i, batch, i)
    return made, batch


def test_drawn_example(tmp_path):
    """The row in rows.py's docstring, with one byte a word: A B for "a dog", H for "hi"."""
    with DatasetWriter(tmp_path / "d", "d") as writer:
        writer.add(Document("0", "d", (small_corpus.picture(9), "AB")))
        writer.add(Document("1", "d", ("H",)))
    _, batch = build_all(Dataset.open(tmp_path / "d"), tmp_path / "plan", TINY)
    a, b, h = 6 + ord("A"), 6 + ord("B"), 6 + ord("H")
    expected = {
        "tokens": [BOS, IMAGE, IMAGE, IMAGE, IMAGE, a, b, EOS, BOS, h, EOS, PAD],
        "targets": [0, 0, 0, 0, a, b, EOS, 0, h, EOS, 0, 0],
        "loss_mask": [0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0],
        "segment_ids": [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0],
        "attend_until": [1, 5, 5, 5, 5, 6, 7, 8, 9, 10, 11, 12],
        "positions": [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0],
        "image_index": [-1, 0, 1, 2, 3, -1, -1, -1, -1, -1, -1, -1],
        "source": [1] * 12,
    }
    for name, values in expected.items():
        assert batch[name].tolist() == [values], name
    assert batch["image_mask"].tolist() == [[True]]
    assert small_corpus.number_of(batch["images"][0, 0]) == 9
    spec = rows.batch_spec(TINY, 1)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == spec


def test_delimiters_and_shared_positions():
    geometry = dataclasses.replace(TINY, image_delimiters=True, image_rotary="shared", image_attention="causal")
    batch = rows.build_documents([Document("0", "d", ("A", small_corpus.picture(1), "B"))], BYTES, geometry)
    a, b, boi, eoi = 6 + ord("A"), 6 + ord("B"), 4, 5
    assert batch["tokens"][0].tolist() == [BOS, a, boi, IMAGE, IMAGE, IMAGE, IMAGE, eoi, b, EOS, PAD, PAD]
    assert batch["targets"][0].tolist() == [a, 0, 0, 0, 0, 0, 0, b, EOS, 0, 0, 0]
    assert batch["loss_mask"][0].tolist() == [1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 0, 0]
    assert batch["attend_until"][0].tolist() == list(range(1, 13))
    assert batch["image_index"][0].tolist() == [-1, -1, -1, 0, 1, 2, 3, -1, -1, -1, -1, -1]
    both = dataclasses.replace(geometry, image_attention="bidirectional")
    batch = rows.build_documents([Document("0", "d", ("A", small_corpus.picture(1), "B"))], BYTES, both)
    assert batch["attend_until"][0].tolist() == [1, 2, 3, 7, 7, 7, 7, 8, 9, 10, 11, 12]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    small_corpus.write(root)
    return root


@pytest.mark.parametrize("source", small_corpus.SOURCES)
@pytest.mark.parametrize("delimiters", [False, True])
def test_rows_hold_the_documents(root, tmp_path, source, delimiters):
    geometry = Geometry.from_config(small_corpus.config_for(root))
    geometry = dataclasses.replace(geometry, image_delimiters=delimiters)
    dataset = store.Dataset.open(root / source)
    made, batch = build_all(dataset, tmp_path / "plan", geometry)
    losses = 0
    seen_images = []
    for i in range(len(made)):
        row = {name: array[i] for name, array in batch.items()}
        at = slot = 0
        for segment, f in enumerate(made[i], start=1):
            axis = small_corpus.axis(dataset[int(f["document"])], delimiters)
            n = f["stop"] - f["start"]
            own = slice(at, at + n)
            assert row["tokens"][own].tolist() == [token for _, token in axis[f["start"] : f["stop"]]]
            assert (row["segment_ids"][own] == segment).all()
            assert row["positions"][own].tolist() == list(range(n))
            for k in range(n):
                after = axis[f["start"] + k + 1] if f["start"] + k + 1 < len(axis) else ("end", 0)
                counts = after[0] in ("text", "eos")
                assert row["loss_mask"][at + k] == counts
                assert row["targets"][at + k] == (after[1] if counts else 0)
                losses += counts
                if axis[f["start"] + k][0] != "image":
                    assert row["image_index"][at + k] == -1 and row["attend_until"][at + k] == at + k + 1
            # Whole images: which ones of the document stand in this fragment, by counting patches.
            before = sum(kind == "image" for kind, _ in axis[: f["start"]]) // small_corpus.POSITIONS
            for data in dataset[int(f["document"])].images[before : before + f["images"]]:
                where = np.flatnonzero(row["image_index"] // small_corpus.POSITIONS == slot)
                assert (row["image_index"][where] % small_corpus.POSITIONS).tolist() == [0, 1, 2, 3]
                assert (np.diff(where) == 1).all() and (row["attend_until"][where] == where[-1] + 1).all()
                assert (row["tokens"][where] == IMAGE).all()
                assert small_corpus.picture(small_corpus.number_of(row["images"][slot])) == data
                seen_images.append(data)
                slot += 1
            at += n
        assert row["image_mask"].tolist() == [True] * slot + [False] * (small_corpus.PER_ROW - slot)
        assert not row["images"][slot:].any()
        rest = slice(at, None)
        assert (row["tokens"][rest] == PAD).all() and not row["segment_ids"][rest].any()
        assert not row["loss_mask"][rest].any() and (row["image_index"][rest] == -1).all()
        assert row["attend_until"][rest].tolist() == list(range(at + 1, small_corpus.ROW_LENGTH + 1))
    kinds = [kind for document in dataset for kind, _ in small_corpus.axis(document)]
    # Every text token and every EOS is predicted once, except a text token right before which stands boi: none does.
    assert losses == kinds.count("text") + kinds.count("eos")
    assert sorted(seen_images) == sorted(itertools.chain.from_iterable(d.images for d in dataset))


def test_long_text_is_tokenised_in_part(tmp_path, monkeypatch):
    text = small_corpus.words(np.random.default_rng(0), 12_000)
    with DatasetWriter(tmp_path / "d", "d") as writer:
        writer.add(Document("book", "d", ("A preface.", text)))
    dataset = Dataset.open(tmp_path / "d")
    made, batch = build_all(dataset, tmp_path / "plan", TINY)
    order = np.argsort([made[i]["start"][0] for i in range(len(made))])
    tokens = batch["tokens"][order].reshape(-1)
    whole = [token for _, token in small_corpus.axis(dataset[0])]
    assert tokens[: len(whole)].tolist() == whole
    builder = rows.RowBuilder(dataset, made, BYTES, TINY, 0)
    encoded, encode = [], type(BYTES).encode
    monkeypatch.setattr(type(BYTES), "encode", lambda self, part: encoded.append(part) or encode(self, part))
    builder.build(int(order[len(order) // 2]), rows.allocate(1, TINY, 0), 0)
    assert len(encoded) <= 2


def test_image_that_cannot_be_decoded(tmp_path, caplog):
    geometry = dataclasses.replace(TINY, row_length=24, per_row=2)
    with DatasetWriter(tmp_path / "d", "d") as writer:
        writer.add(Document("whole", "d", (small_corpus.picture(5), "AB")))
        writer.add(Document("torn", "d", (small_corpus.picture(6)[:40], "CDE")))
    dataset = Dataset.open(tmp_path / "d")
    made = plan.make_plan(dataset, BYTES, geometry, tmp_path / "plan", window=8)
    builder = rows.RowBuilder(dataset, made, BYTES, geometry, 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batch = rows.allocate(1, geometry, BYTES.pad)
            builder.build(0, batch, 0)
    assert builder.bad_images == 1
    assert len(caplog.records) == 1 and "'torn', image 0" in caplog.text
    torn = [f["document"] for f in made[0]].index(1)
    segments = batch["segment_ids"][0]
    assert not batch["loss_mask"][0][segments == torn + 1].any()
    assert batch["loss_mask"][0][segments == 2 - torn].sum() == 3
    assert batch["image_mask"][0].all()
    assert not batch["images"][0][torn].any() and batch["images"][0][1 - torn].any()
    with pytest.raises(ValueError, match="'torn', image 0 cannot be decoded"):
        rows.build_documents([dataset[1]], BYTES, geometry)


def test_documents_as_given():
    prompt = Document("p", "d", ("Q", small_corpus.picture(3)))
    geometry = dataclasses.replace(TINY, caption_order="image_first")
    batch = rows.build_documents([prompt], BYTES, geometry, source=2, append_eos=False)
    assert batch["tokens"][0].tolist() == [BOS, 6 + ord("Q"), IMAGE, IMAGE, IMAGE, IMAGE] + [PAD] * 6
    assert (batch["source"] == 2).all()
    with pytest.raises(ValueError, match="'long' has 22 positions and 0 images; a row has 12"):
        rows.build_documents([Document("long", "d", ("x" * 20,))], BYTES, geometry)
    pictures = (small_corpus.picture(3),) * 2
    with pytest.raises(ValueError, match="'two' has 10 positions and 2 images"):
        rows.build_documents([Document("two", "d", pictures)], BYTES, geometry)


def test_dataset_that_is_not_the_planned_one(tmp_path):
    for name, text in (("long", "abcdefgh"), ("short", "ab")):
        with DatasetWriter(tmp_path / name, "d") as writer:
            writer.add(Document("0", "d", (text,)))
    made = plan.make_plan(Dataset.open(tmp_path / "long"), BYTES, TINY, tmp_path / "plan", window=8)
    builder = rows.RowBuilder(Dataset.open(tmp_path / "short"), made, BYTES, TINY, 0)
    with pytest.raises(ValueError, match="document '0' .*is not what plan .* was made of"):
        builder.build(0, rows.allocate(1, TINY, 0), 0)
