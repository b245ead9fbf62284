import dataclasses
import json
import math

import numpy as np
import pytest

from nmm_jax.evaluation import routing
from nmm_jax.evaluation.routing import Counts, Experts


def layers(*of_layers):
    """[L, 2, E] from (text tokens by expert, image tokens by expert) of each layer."""
    return np.array(of_layers, np.int64)


def counts_of(expert_tokens, entropy=None, dropped=None, top_k=1):
    expert_tokens = np.asarray(expert_tokens)
    tokens = expert_tokens[0].sum(-1) // top_k
    shape = expert_tokens.shape[:2]
    return Counts(
        expert_tokens,
        np.zeros(shape) if entropy is None else np.asarray(entropy, np.float64),
        np.zeros(len(expert_tokens), int) if dropped is None else np.asarray(dropped),
        tokens,
        rows=3,
    )


def test_specialisation_by_hand():
    tokens = layers(
        [[6, 0, 4, 0], [0, 9, 0, 1]],  # every expert sees one modality
        [[5, 1, 2, 2], [5, 1, 2, 2]],  # as many of both everywhere
        [[3, 0, 1, 0], [1, 0, 3, 0]],  # 1/4 and 3/4 images; two experts without tokens
    )
    quarter = 1 - (0.25 * 2 + 0.75 * math.log2(4 / 3))
    np.testing.assert_allclose(routing.specialisation(tokens), [1, 0, quarter], atol=1e-12)
    np.testing.assert_allclose(routing.image_share(tokens)[2], [0.25, np.nan, 0.75, np.nan])


def test_baseline_is_the_score_of_routers_that_ignore_modality():
    tokens = layers([[30, 60, 10, 0], [90, 180, 30, 0]])  # three images to a text token at every expert
    expected = 1 - (0.25 * 2 + 0.75 * math.log2(4 / 3))  # 0.1887, far from 0
    assert routing.baseline(tokens[0].sum(-1)) == pytest.approx(expected)
    np.testing.assert_allclose(routing.specialisation(tokens), expected)
    assert routing.baseline(np.array([7, 7])) == 0
    assert routing.baseline(np.array([7, 0])) == 1  # one modality is always alone


def test_deviation_by_hand():
    tokens = layers(
        [[5, 5, 5, 5], [1, 1, 1, 1]],
        [[5, 5, 0, 0], [0, 0, 3, 3]],  # half of the experts each: 1/E
        [[8, 0, 0, 0], [0, 0, 0, 0]],  # all at one: 2 (E-1) / E^2; and no images
    )
    np.testing.assert_allclose(routing.deviation(tokens), [[0, 0], [1 / 4, 1 / 4], [6 / 16, np.nan]])


def test_load_and_imbalance():
    tokens = layers([[6, 0, 2, 0], [0, 4, 0, 4]])
    np.testing.assert_allclose(routing.load(tokens), [[[0.75, 0, 0.25, 0], [0, 0.5, 0, 0.5]]])
    np.testing.assert_allclose(routing.imbalance(tokens), [6 / 4])
    np.testing.assert_allclose(routing.imbalance(layers([[8, 0, 0, 0], [8, 0, 0, 0]])), [4])
    assert np.isnan(routing.imbalance(layers([[0, 0], [0, 0]]))).all()


def test_statistics_of_counts():
    """Two layers, top-2 of four: 8 text tokens, 4 images."""
    tokens = layers([[8, 8, 0, 0], [0, 4, 4, 0]], [[4, 4, 4, 4], [2, 2, 2, 2]])
    counts = counts_of(tokens, entropy=[[8.0, 2.0], [8 * math.log(4), 4 * math.log(4)]], dropped=[6, 0], top_k=2)
    found = routing.statistics(counts, Experts(4, (1, 3), top_k=2))
    assert found["tokens"] == {"text": 8, "image": 4} and found["rows"] == 3
    assert found["expert_tokens"]["image"] == [[0, 4, 4, 0], [2, 2, 2, 2]]
    assert found["dropped"] == [0.25, 0.0]
    assert found["load"]["text"][0] == [0.5, 0.5, 0, 0]
    assert found["load"]["all"][0] == pytest.approx([1 / 3, 1 / 2, 1 / 6, 0])
    assert found["image_share"][0] == [0.0, pytest.approx(1 / 3), 1.0, None]
    assert found["empty_experts"] == [1, 0]
    assert found["imbalance"] == pytest.approx([2, 1])
    h = math.log2(3) - 2 / 3  # of one third
    assert found["specialisation"] == pytest.approx([(1 + (1 - h) + 1) / 3, 1 - h])
    assert found["specialisation_baseline"] == pytest.approx(1 - h)
    assert found["deviation"] == {"mean": [0.25, 0.0], "text": [0.25, 0.0], "image": [0.25, 0.0]}
    assert found["entropy"]["text"] == pytest.approx([1.0, math.log(4)])
    assert found["entropy"]["image"] == pytest.approx([0.5, math.log(4)])
    assert found["entropy"]["all"] == pytest.approx([10 / 12, math.log(4)])
    assert found["entropy_share"]["text"] == pytest.approx([1 / math.log(4), 1])
    assert found["entropy_share"]["all"] == pytest.approx([10 / 12 / math.log(4), 1])
    json.dumps(found, allow_nan=False)


def test_a_source_without_images():
    counts = counts_of(layers([[3, 1], [0, 0]]), entropy=[[2.0, 0.0]])
    found = routing.statistics(counts, Experts(2, (0,)))
    assert found["tokens"]["image"] == 0
    assert found["load"]["image"] == [[None, None]]
    assert found["deviation"] == {"mean": [0.25], "text": [0.25], "image": [None]}
    assert found["entropy"] == {"all": [0.5], "text": [0.5], "image": [None]}
    assert found["entropy_share"]["all"] == pytest.approx([0.5 / math.log(2)])
    assert found["specialisation"] == [1.0] and found["specialisation_baseline"] == 1.0


def test_entropy_is_a_share_of_what_the_own_group_allows():
    """Six experts for text, two for images: an undecided router has log 6 and log 2."""
    grouped = Experts(8, (0,), modality="grouped", image=2)
    tokens = layers([[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 2, 2]])
    found = routing.statistics(counts_of(tokens, entropy=[[6 * math.log(6), 4 * math.log(2) / 2]]), grouped)
    assert found["entropy_share"]["text"] == pytest.approx([1])
    assert found["entropy_share"]["image"] == pytest.approx([0.5])
    assert 0.5 < found["entropy_share"]["all"][0] < 1
    assert found["specialisation"] == [1.0]
    assert grouped.labels == ["T0", "T1", "T2", "T3", "T4", "T5", "I6", "I7"]


def test_without_a_router_there_is_no_entropy_to_take_a_share_of():
    fixed = Experts(2, (0,), modality="fixed", image=1)
    found = routing.statistics(counts_of(layers([[5, 0], [0, 3]])), fixed)
    assert found["entropy_share"] == {"all": [None], "text": [None], "image": [None]}
    assert found["specialisation"] == [1.0]
    assert fixed.labels == ["text", "image"]
    assert Experts(3, (0,)).labels == ["0", "1", "2"]


def test_counts_add():
    one, other = counts_of(layers([[3, 1], [0, 2]])), counts_of(layers([[1, 1], [1, 0]]), dropped=[1])
    both = one + other
    np.testing.assert_array_equal(both.expert_tokens, [[[4, 2], [1, 2]]])
    assert both.rows == 6 and both.dropped == [1]
    assert [f.name for f in dataclasses.fields(both)] == ["expert_tokens", "entropy", "dropped", "tokens", "rows"]
