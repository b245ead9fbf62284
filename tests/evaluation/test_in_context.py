import json

import jax
import numpy as np
import pytest

from data_pipelines.document import Document
from data_pipelines.geometry import Geometry
from data_pipelines.images import to_eval
from nmm_jax import models
from nmm_jax.evaluation import in_context
from nmm_jax.evaluation.held_out import make_row_sums, spread
from nmm_jax.evaluation.in_context import ARMS, Caption
from nmm_jax.parallel.mesh import make_mesh
from nmm_jax.training.checkpoints import Run

TEXTS = ("abcd", "b", "xyzzy", "qed", "aaaaaaaaaa", "hello", "end")


@pytest.fixture(scope="module")
def captions(noise):
    return [Caption(noise(i), text, len(text), False) for i, text in enumerate(TEXTS)]


def test_the_arms_of_a_caption(captions):
    rows = in_context.arms(captions)
    assert tuple(rows) == ARMS
    earlier_of = {}
    for b, caption in enumerate(captions):
        alone, pair, text, other = (rows[arm][b].parts for arm in ARMS)
        last = (caption.image, caption.text)
        assert alone == last and pair[2:] == text[1:] == other[2:] == last
        assert pair[1] == text[0] == other[1]
        earlier = next(c for c in captions if c.image == pair[0])
        assert pair[:2] == (earlier.image, earlier.text)
        assert len({caption.image, earlier.image, other[0]}) == 3
        earlier_of[b] = captions.index(earlier)
    assert sorted(earlier_of.values()) == list(range(len(captions)))  # each comes before exactly one other
    assert in_context.arms(captions) == rows


def loss_alone(run, hidden_of, letters, parts, last):
    """Of the last text's letters, in nats; from arrays that are written here position by position."""
    geometry = Geometry.from_config(run.config)
    tokens, index, until, images = [letters.bos], [-1], [1], []
    for part in parts:
        if isinstance(part, bytes):
            first = len(tokens)
            tokens += [letters.image] * geometry.positions
            index += [len(images) * geometry.positions + i for i in range(geometry.positions)]
            until += [first + geometry.positions] * geometry.positions
            images.append(to_eval(part, geometry.size))
        else:
            for letter in letters.encode(part):
                tokens.append(int(letter))
                index.append(-1)
                until.append(len(tokens))
    n, s = len(tokens), geometry.row_length
    pad = lambda values, fill: np.array([values + [fill] * (s - n)], np.int32)  # noqa: E731
    pictures = np.zeros((1, geometry.per_row, geometry.size, geometry.size, 3), np.uint8)
    pictures[0, : len(images)] = images
    batch = {
        "tokens": pad(tokens, 0),
        "segment_ids": pad([1] * n, 0),
        "positions": pad(list(range(n)), 0),
        "image_index": pad(index, -1),
        "attend_until": np.concatenate([np.array(until), np.arange(n + 1, s + 1)])[None].astype(np.int32),
        "images": pictures,
        "image_mask": np.arange(geometry.per_row)[None] < len(images),
    }
    hidden, unembedding = hidden_of(run.params, batch)[0][0], run.model.unembedding(run.params)
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -sum(log_p[at - 1, tokens[at]] for at in range(n - len(last), n))


def late_fusion(run):
    """The same shapes with a vision tower and a connector."""
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.family = "late_fusion"
        config.model.patch_positions = False
        config.model.vision.update({"width": 32, "depth": 1, "heads": 2, "ffn_width": 64})
    model = models.build(config)
    params = jax.jit(lambda key: jax.tree.map(lambda w: 4 * w, model.init(key)))(jax.random.key(1))
    return Run(config, model, params, 0, make_mesh(config))


@pytest.mark.parametrize("family", ["early_fusion", "late_fusion"])
def test_losses_and_gains_are_those_of_rows_one_by_one(run, letters, captions, family):
    run = late_fusion(run) if family == "late_fusion" else run
    found = in_context.measure(run, letters, make_row_sums(run), captions)
    rows, hidden_of = in_context.arms(captions), jax.jit(run.model.hidden)
    tokens = sum(map(len, TEXTS))
    assert (found.captions, found.tokens, found.cut) == (len(TEXTS), tokens, 0)
    summed = {arm: sum(loss_alone(run, hidden_of, letters, d.parts, d.parts[-1]) for d in rows[arm]) for arm in ARMS}
    for arm in ARMS:
        assert found.loss[arm].value == pytest.approx(summed[arm] / tokens, rel=1e-4)
    for arm in ARMS[1:]:
        assert found.gain[arm].value == pytest.approx((summed["alone"] - summed[arm]) / tokens, abs=1e-3)
        assert found.gain[arm].standard_error > 0
    assert found.picture.value == pytest.approx(found.gain["pair"].value - found.gain["other_image"].value)
    assert len({round(loss.value, 4) for loss in found.loss.values()}) == len(ARMS)  # the arms do differ
    json.dumps(found.to_json(), allow_nan=False)


def test_selection(letters, noise):
    documents = [
        Document("no caption", "s", ("abc", noise(0), noise(1))),
        Document("text first", "s", ("abcdefgh", noise(2))),
        Document("text", "s", ("abc",)),
        *(Document(str(i), "s", (noise(i), "ab")) for i in range(3, 9)),
        Document("empty", "s", (noise(9), "")),
    ]
    found = in_context.select(documents, letters, 5, 100)
    assert found[0] == Caption(noise(2), "abcde", 5, True)
    assert [caption.text for caption in found[1:]] == ["ab"] * 6
    assert len(in_context.select(documents, letters, 5, 3)) <= 3
    assert in_context.select(documents[2:3], letters, 5, 3) == []


def test_no_more_documents_are_read_than_are_needed(letters, noise):
    class Read(list):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    def documents(every):
        """A caption and then texts, again and again; with 0 texts alone."""
        captions = (every and i % every == 0 for i in range(500))
        return Read(Document(str(i), "s", (noise(0), str(i)) if c else ("abc",)) for i, c in enumerate(captions))

    read = []
    assert len(in_context.select(documents(1), letters, 9, 5)) == 5
    assert read == spread(5, 500).tolist()
    chosen = []
    for every, count, found, most in ((3, 20, 20, 100), (3, 20, 20, 100), (0, 5, 0, 16 * 5)):
        read = []
        chosen.append(in_context.select(documents(every), letters, 9, count))
        assert len(chosen[-1]) == found and len(set(read)) == len(read) <= most
    assert chosen[0] == chosen[1]


def test_a_text_is_cut_before_whitespace():
    class Bytes:
        def encode(self, text):
            return np.array(list(text.encode()), np.int32)

    assert in_context.beginning("one two three", Bytes(), 13) == "one two three"
    assert in_context.beginning("one two three", Bytes(), 12) == "one two"
    assert in_context.beginning("one two three", Bytes(), 4) == "one"
    assert in_context.beginning("éééé", Bytes(), 4) == "éé"
    assert in_context.beginning("word", Bytes(), 0) == ""


@pytest.mark.parametrize(
    "row_length, per_row, delimiters, longest",
    [(40, 2, False, 15), (40, 2, True, 13), (40, 1, False, 0), (11, 2, False, 1), (9, 2, False, 0), (999, 4, True, 48)],
)
def test_room_for_two_captions(row_length, per_row, delimiters, longest):
    geometry = Geometry(row_length, 4, per_row, 8, image_delimiters=delimiters)
    assert in_context.room(geometry) == longest
