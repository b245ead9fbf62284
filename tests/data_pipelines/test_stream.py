"""The stream: where its rows come from, in what shares, and that an epoch is every row once."""

import collections
import time

import cv2
import numpy as np
import pytest
import small_corpus

from data_pipelines import plan
from data_pipelines.stream import PERIOD, Mixture, Stream


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    small_corpus.write(root)
    config = small_corpus.config_for(root)
    plan.ensure_plans(config, progress=False)
    return config


@pytest.fixture(scope="module")
def stream(config):
    return Stream.open(config)


def test_pattern_by_hand():
    mixture = Mixture.of([3, 1, 1], [1, 1, 1])
    assert mixture.rates == (6_000, 2_000, 2_000)
    assert mixture.pattern[:10].tolist() == [0, 1, 0, 2, 0] * 2
    assert Mixture.of([0.5, 0.5], [1, 3]).rates == (7_500, 2_500)  # rows a third as full: three times as many
    assert Mixture.of([1, 1, 1], [1, 1, 1]).rates == (3_334, 3_333, 3_333)
    assert Mixture.of([1e-9, 1, 1e-9], [1, 1, 1]).rates == (1, 9_998, 1)


@pytest.mark.parametrize("rates", [(4_613, 4_397, 990), (1, 9_998, 1), (10_000,)])
def test_every_run_has_its_shares(rates):
    mixture = Mixture(rates)
    taken = np.cumsum(mixture.pattern[:, None] == np.arange(len(rates)), axis=0)
    assert tuple(taken[-1]) == rates
    ideal = np.arange(1, PERIOD + 1)[:, None] * np.array(rates) / PERIOD
    assert np.abs(taken - ideal).max() < len(rates)
    ranks = collections.Counter()
    for g in range(2 * PERIOD + 100):  # counted one by one
        source, rank = mixture.locate(g)
        assert rank == ranks[source]
        ranks[source] += 1


def test_an_epoch_is_every_row_once(stream):
    rows = [len(builder.plan) for builder in stream.builders]
    seen = [collections.defaultdict(list) for _ in rows]
    for g in range(2_500):  # two epochs of each source, and more
        at = stream.locate(g)
        assert at.epoch == at.rank // rows[at.source]
        seen[at.source][at.epoch].append(at.row)
    for source, count in enumerate(rows):
        assert sorted(seen[source][0]) == sorted(seen[source][1]) == list(range(count))
        assert seen[source][0] != seen[source][1] != list(range(count))  # another order in each


def test_every_document_once_an_epoch(stream):
    """From the batches alone: the tokens of an epoch are those of the documents, each as often."""
    dataset = stream.builders[1].dataset
    rows = [g for g in range(2_000) if (stream.locate(g).source, stream.locate(g).epoch) == (1, 0)]
    batch = stream.batch(rows)
    real = batch["segment_ids"] > 0
    axis = [position for document in dataset for position in small_corpus.axis(document)]
    assert collections.Counter(batch["tokens"][real].tolist()) == collections.Counter(token for _, token in axis)
    predicted = collections.Counter(token for kind, token in axis if kind in ("text", "eos"))
    assert collections.Counter(batch["targets"][batch["loss_mask"] == 1].tolist()) == predicted
    images = collections.Counter(small_corpus.number_of(image) for image in batch["images"][batch["image_mask"]])
    pictures = collections.Counter(data for document in dataset for data in document.images)
    assert {small_corpus.picture(number): count for number, count in images.items()} == pictures
    assert {id for g in rows for id in stream.records(g)} == {document.id for document in dataset}


def test_shares_of_real_positions(stream):
    batch = stream.batch(range(2_000))
    real = batch["segment_ids"] > 0
    shares = np.bincount(batch["source"][real]) / real.sum()
    assert stream.weights == pytest.approx((0.45, 0.45, 0.10))
    assert np.abs(shares - stream.weights).max() < 0.005
    sources = [stream.locate(g).source for g in range(PERIOD)]
    assert tuple(np.bincount(sources) / PERIOD) == stream.row_shares


def test_far_rows_take_no_longer(stream):
    def seconds(first):
        begin = time.perf_counter()
        for g in range(first, first + 300):
            stream.locate(g)
        return time.perf_counter() - begin

    seconds(0)
    near = min(seconds(0) for _ in range(5))
    far = min(seconds(10**12) for _ in range(5))
    assert far < 3 * near
    rows = stream.batch([10**9, 10**12])
    assert (rows["segment_ids"][:, 0] == 1).all()


def test_rows_depend_on_nothing_but_their_number(stream, config):
    batch = stream.batch(range(20))
    again = Stream.open(config).batch([7, 3])
    for name, array in again.items():
        assert array[0].tobytes() == batch[name][7].tobytes() and array[1].tobytes() == batch[name][3].tobytes()


def changed(config, **values):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return other


def test_augmentation(config, tmp_path):
    config = changed(config, image__augment=True, image__flip=0.5, image__size=8, image__patch=4)
    stream = Stream.open(config)
    plain = Stream.open(changed(config, image__augment=False))
    assert np.array_equal(stream.batch(range(9))["images"], Stream.open(config).batch(range(9))["images"])
    assert np.array_equal(stream.batch(range(9))["tokens"], plain.batch(range(9))["tokens"])
    at = stream.locate(0)
    gradient = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    data = cv2.imencode(".png", gradient)[1].tobytes()
    views = {stream._augmented(at, data, slot).tobytes() for slot in range(3)}
    later = next(g for g in range(1, 100) if stream.locate(g).source == at.source)
    views.add(stream._augmented(stream.locate(later), data, 0).tobytes())
    views.add(Stream.open(changed(config, seed=1))._augmented(at, data, 0).tobytes())
    assert len(views) == 5  # another one for each slot, row and seed


def test_fingerprint_tells_what_changed(stream, config):
    assert Stream.open(config).fingerprint == stream.fingerprint
    for key, value, name in (
        ("seed", 1, {"seed"}),
        ("data__weights", (0.5, 0.4, 0.1), {"weights"}),
        ("image__augment", True, {"augmentation"}),
        ("data__image_attention", "causal", {"geometry"}),
    ):
        other = Stream.open(changed(config, **{key: value}))
        different = {k for k, v in other.fingerprints.items() if stream.fingerprints[k] != v}
        assert different == name and other.fingerprint != stream.fingerprint


def test_plans_must_be_there(config):
    with pytest.raises(FileNotFoundError, match="python -m data_pipelines.plan"):
        Stream.open(changed(config, row_length=50))


def test_held_out(tmp_path):
    small_corpus.write(tmp_path, split="held_out")
    config = small_corpus.config_for(tmp_path)
    config.image.augment = True  # of training only
    made = plan.ensure_plans(config, "held_out", progress=False)
    held_out = Stream.held_out(config, "text")
    assert len(held_out) == len(made["text"])
    batch = held_out.batch([0, 1], rows=4)
    assert (batch["source"][:2] == 2).all()
    assert batch["loss_mask"][:2].any(axis=1).all() and not batch["loss_mask"][2:].any()
    captions = Stream.held_out(config, "captions").batch(range(3))
    assert {small_corpus.number_of(image) for image in captions["images"][captions["image_mask"]]} <= set(range(90))
    with pytest.raises(ValueError, match="no source 'films'"):
        Stream.held_out(config, "films")
