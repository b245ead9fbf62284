"""Recalls and chance against counting by hand, and on a model whose towers know nothing of each other."""

import itertools
import json
import math

import numpy as np
import pytest

from nmm_jax.evaluation import results, retrieval


def test_the_drawn_example():
    cosines = np.array([[0.9, 0.2, 0.1], [0.6, 0.5, 0.3], [0.1, 0.6, 0.8]])
    same = np.eye(3, dtype=bool)
    found = retrieval.recalls(cosines, same)
    assert found.recall[1].value == pytest.approx(2 / 3)
    assert found.recall[1].standard_error == pytest.approx(math.sqrt(2 / 9 / 2))
    assert retrieval.recalls(cosines.T, same).recall[1].value == pytest.approx(2 / 3)
    assert found.recall[5].value == found.chance[5] == 1
    assert found.chance[1] == pytest.approx(1 / 3)


def test_twins_are_right_for_each_other():
    """Pairs 0 and 1 have one text: image 0 may find either."""
    cosines = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3], [0.2, 0.6, 0.4]])
    same = np.eye(3, dtype=bool)
    same[0, 1] = same[1, 0] = True
    found = retrieval.recalls(cosines, same)
    assert found.recall[1].value == pytest.approx(2 / 3)
    assert found.chance[1] == pytest.approx((2 + 2 + 1) / 9)


def test_equal_cosines_are_not_found():
    found = retrieval.recalls(np.zeros((20, 20)), np.eye(20, dtype=bool))
    assert [found.recall[k].value for k in retrieval.RANKS] == [0, 0, 0]


@pytest.mark.parametrize("right, candidates, k", [(1, 7, 1), (2, 7, 3), (3, 5, 2), (1, 4, 10), (4, 5, 3)])
def test_chance_by_counting(right, candidates, k):
    """Over all choices of the first k."""
    drawn = list(itertools.combinations(range(candidates), min(k, candidates)))
    share = np.mean([any(i < right for i in first) for first in drawn])
    assert retrieval.chance(np.array([right]), candidates, k)[0] == pytest.approx(share)


def test_a_random_order_has_the_recall_of_chance():
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 60, 80)
    same = texts[:, None] == texts
    found = [retrieval.recalls(rng.normal(size=(80, 80)), same) for _ in range(30)]
    for k in retrieval.RANKS:
        mean = np.mean([f.recall[k].value for f in found])
        assert mean == pytest.approx(found[0].chance[k], abs=4 * found[0].recall[k].standard_error / math.sqrt(30))


def test_table():
    direction = {
        f"recall@{k}": {"value": 0.1 * k, "standard_error": 0.01, "chance": 0.005 * k} for k in retrieval.RANKS
    }
    found = {"captions": {"pairs": 200, "image_to_text": direction, "text_to_image": direction}}
    table = results.table({"step": 3, "notes": [], "retrieval": found})
    assert table.splitlines()[2].split()[-4:] == ["recall@1", "recall@5", "recall@10", "pairs"]
    assert "captions, image to text" in table and "50.0 ±1.0 (2.5)" in table
    json.dumps(found, allow_nan=False)
