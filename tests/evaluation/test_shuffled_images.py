import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmm_jax.evaluation.shuffled_images import donors, exchange


def test_hand_made_batch():
    #   row 0: two images of document 7, one of document 2; row 1: one more of 7, two of 9, 9; row 2: 4, 5
    documents = np.array([[7, 7, 2], [9, 7, 9], [4, 5, -1]])
    images = np.arange(9, dtype=np.uint8).reshape(3, 3, 1, 1, 1).repeat(3, axis=4)
    takes = donors(documents)
    # by document: 2 (slot 2), 4 (6), 5 (7), 7 (0, 1, 4), 9 (3, 5); three further on
    assert takes.tolist() == [[3, 5, 0], [6, 2, 7], [1, 4, 8]]
    assert exchange(images, takes)[..., 0, 0, 0].tolist() == takes.tolist()


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=24))
def test_no_slot_gets_an_image_of_its_own_document_and_every_image_is_used_once(slots):
    documents = np.array(slots)[:, None]
    filled = documents[documents >= 0]
    most = max(np.bincount(filled)) if filled.size else 0
    takes = donors(documents)
    if not filled.size or 2 * most > filled.size:
        assert takes is None
        return
    assert sorted(takes.ravel()) == list(range(len(slots)))
    before, after = documents.ravel(), documents.ravel()[takes.ravel()]
    assert all(a != b for a, b in zip(before, after, strict=True) if b >= 0)
    assert (takes.ravel()[before < 0] == np.flatnonzero(before < 0)).all()


@pytest.mark.parametrize("slots", [[0], [0, 0], [0, 0, 1], [0, 0, 0, 1, 2]])
def test_none_exactly_where_no_permutation_exists(slots):
    permutations = itertools.permutations(range(len(slots)))
    exists = any(all(slots[i] != slots[p] for i, p in enumerate(perm)) for perm in permutations)
    assert not exists and donors(np.array([slots])) is None
