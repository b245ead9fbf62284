"""Rows of one image and its text: against a hand-worked row, and in the stream; packed rows are what they were."""

import collections
import logging

import numpy as np
import pytest
import small_corpus

from data_pipelines import pieces, plan, preview, rows, store, tokenizer
from data_pipelines.document import Document
from data_pipelines.geometry import Geometry
from data_pipelines.store import Dataset, DatasetWriter
from data_pipelines.stream import Stream

BYTES = tokenizer.load("bytes")
PAD, BOS, EOS = 0, 1, 2
PAIRS = Geometry(row_length=8, positions=0, per_row=1, size=small_corpus.SIZE, pairs=True)


def ids(text):
    return [6 + byte for byte in text.encode()]


def dataset_of(folder, *documents):
    with DatasetWriter(folder, "d") as writer:
        for i, parts in enumerate(documents):
            writer.add(Document(str(i), "d", parts))
    return Dataset.open(folder)


def build(dataset, folder, geometry=PAIRS):
    made = plan.make_plan(dataset, BYTES, geometry, folder, window=4)
    builder = rows.RowBuilder(dataset, made, BYTES, geometry, source_index=1)
    order = np.argsort([made[i]["document"][0] for i in range(len(made))])
    batch = rows.allocate(len(made), geometry, BYTES.pad)
    for b, i in enumerate(order):
        builder.build(int(i), batch, b)
    return made, batch


def test_by_hand(tmp_path):
    image = small_corpus.picture
    documents = [
        (image(0), "AB"),
        ("a longer text", image(1)),  # its order does not matter, and it is cut
        (image(2), image(3), "two images"),
        ("no image",),
        (image(4),),
        (image(5), " \n"),  # no text
        ("A", image(6), "B"),
        ("123456", image(7)),  # fits exactly
    ]
    made, batch = build(dataset_of(tmp_path / "d", *documents), tmp_path / "plan")
    assert batch["tokens"].tolist() == [
        [BOS, *ids("AB"), EOS, PAD, PAD, PAD, PAD],
        [BOS, *ids("a long"), EOS],
        [BOS, *ids("A\n\nB"), EOS, PAD, PAD],
        [BOS, *ids("123456"), EOS],
    ]
    assert batch["targets"][0].tolist() == [*ids("AB"), EOS, 0, 0, 0, 0, 0]
    assert batch["loss_mask"][0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert batch["segment_ids"].tolist()[0] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert batch["positions"].tolist()[0] == [0, 1, 2, 3, 0, 0, 0, 0]
    assert batch["targets"][1].tolist() == [*ids("a long"), EOS, 0]
    assert (batch["attend_until"] == np.arange(1, 9)).all() and (batch["image_index"] == -1).all()
    assert batch["image_mask"].all() and batch["images"].shape == (4, 1, 4, 4, 3)
    assert [small_corpus.number_of(images[0]) for images in batch["images"]] == [0, 1, 6, 7]
    assert (batch["source"] == 1).all()
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == rows.batch_spec(PAIRS, 4)
    assert made.report == {
        "documents": 8, "rows": 4, "fragments": 4, "cuts": 0, "positions": 26, "images": 4, "text_tokens": 18,
        "fill": 26 / 32, "images_per_row": 1.0, "slot_fill": 1.0, "left_out": 4,
    }  # fmt: skip
    assert "d: 4 documents are no pairs and were left out" in plan.table({"d": made})


def test_long_texts_are_encoded_as_a_whole_would_be():
    text = small_corpus.words(np.random.default_rng(0), 5_000)
    for row_length in (3, 100, 2 * pieces.LONGEST_PIECE):
        found = pieces.pair_tokens(text, BYTES, row_length).tolist()
        assert found == [BOS, *ids(text)[: row_length - 2], EOS]


def test_an_image_that_cannot_be_decoded(tmp_path, caplog):
    dataset = dataset_of(tmp_path / "d", (b"no image at all", "AB"), (small_corpus.picture(1), "AB"))
    with caplog.at_level(logging.WARNING):
        _, batch = build(dataset, tmp_path / "plan")
    assert batch["image_mask"].tolist() == [[False], [True]] and not batch["images"][0].any()
    assert batch["loss_mask"].sum(1).tolist() == [0, 3] and not batch["targets"][0].any()
    assert batch["tokens"][0].tolist() == batch["tokens"][1].tolist()
    assert "document '0', image 0 cannot be decoded" in caplog.text


def test_no_pairs(tmp_path):
    dataset = dataset_of(tmp_path / "d", ("text",), (small_corpus.picture(1),))
    message = "source 'd' has no pairs: none of the 2 documents of .*leave it out of data.sources"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            plan.make_plan(dataset, BYTES, PAIRS, tmp_path / "plan", window=4)


@pytest.mark.parametrize(
    "wrong", [{"positions": 4}, {"per_row": 2}, {"per_row": 0}, {"image_delimiters": True}, {"row_length": 2}]
)
def test_geometry(wrong):
    with pytest.raises(ValueError, match="data.rows = 'pairs'"):
        Geometry(**PAIRS.__dict__ | wrong)


def test_packed_fingerprints_are_what_they_were():
    """Plans that people have made, and checkpoints of packed streams, stay valid."""
    geometry = Geometry(row_length=48, positions=4, per_row=3, size=4)
    assert geometry.packing_key() == {
        "row_length": 48, "positions": 4, "per_row": 3, "image_delimiters": False, "caption_order": "image_first",
    }  # fmt: skip
    assert repr(geometry) == (
        "Geometry(row_length=48, positions=4, per_row=3, size=4, image_delimiters=False, "
        "image_attention='bidirectional', image_rotary='sequential', caption_order='image_first')"
    )
    assert PAIRS.packing_key()["pairs"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    small_corpus.write(root)
    config = small_corpus.config_for(root)
    config.data.rows = "pairs"
    config.data.sources, config.data.weights = ("captions",), (1.0,)
    config.image.positions, config.image.per_row = 0, 1
    config.row_length = 12
    return config


def test_stream(config):
    """Every pair once an epoch, and rows in any order."""
    plan.ensure_plans(config, progress=False)
    stream = Stream.open(config)
    assert len(stream.builders[0].plan) == 90
    batch = stream.batch(range(90))
    assert sorted(small_corpus.number_of(image) for image in batch["images"][:, 0]) == list(range(90))
    texts = {d.id: d.texts[0] for d in stream.builders[0].dataset}
    for b in range(90):
        (document,) = stream.records(b)
        want = [BOS, *ids(texts[document])[:10], EOS]
        assert batch["tokens"][b].tolist() == want + [PAD] * (12 - len(want))
    again = Stream.open(config).batch([70, 3])
    for name, array in again.items():
        np.testing.assert_array_equal(array, batch[name][[70, 3]])
    shown = preview.row_html(batch, 0, BYTES, positions=0)
    assert shown.count("<img") == 2 and "at no position" in shown  # the picture and the mask
    assert "[image 0: 0]" in preview.row_text(batch, 0, BYTES, positions=0)


def test_weights_are_shares_of_real_positions(tmp_path):
    for name, text in (("short", "A"), ("long", "A" * 20)):
        with DatasetWriter(tmp_path / name, name) as writer:
            for i in range(20):
                writer.add(Document(str(i), name, (small_corpus.picture(i), text)))
                writer.add(Document(f"held {i}", name, (small_corpus.picture(i), text)), "held_out")
    config = small_corpus.config_for(tmp_path)
    config.data.rows, config.row_length = "pairs", 12
    config.data.sources, config.data.weights = ("short", "long"), (0.5, 0.5)
    config.image.positions, config.image.per_row = 0, 1
    plan.ensure_plans(config, progress=False)
    stream = Stream.open(config)
    assert stream.row_shares == (0.8, 0.2)  # 3 positions a row against 12
    batch = stream.batch(range(500))
    real = batch["segment_ids"] > 0
    shares = collections.Counter(batch["source"][real].tolist())
    assert shares[0] == shares[1] == real.sum() / 2
    plan.ensure_plans(config, store.HELD_OUT, progress=False)
    held_out = Stream.held_out(config, "short")
    assert len(held_out) == 20 and held_out.batch([0, 1], rows=3)["image_mask"].tolist() == [[True], [True], [False]]
