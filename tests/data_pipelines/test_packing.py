"""Cutting and packing against their definitions, and against a plain best-fit-decreasing."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.packing import cut, pack


def plain_best_fit_decreasing(positions, images, row_length, per_row):
    """The textbook's algorithm: look at every open row. Returns the number of rows."""
    rows = []  # [positions left, slots left]
    for n in sorted(range(len(positions)), key=lambda n: -positions[n]):
        fitting = [row for row in rows if row[0] >= positions[n] and row[1] >= images[n]]
        if fitting:
            row = min(fitting, key=lambda row: row[0])
        else:
            row = [row_length, per_row]
            rows.append(row)
        row[0] -= positions[n]
        row[1] -= images[n]
    return len(rows)


def test_drawn_example():
    names, positions, images = "abcde", [5, 4, 3, 3, 1], [1, 1, 0, 0, 0]
    rows = pack(positions, images, row_length=8, per_row=1)
    assert ["".join(names[n] for n in row) for row in rows] == ["ac", "bde"]


def test_cut_by_hand():
    # BOS, 5 text, an image of 4, 9 text, EOS in rows of 8 positions: the image opens the second row.
    lengths, is_image = [1, 5, 4, 9, 1], [False, False, True, False, False]
    cuts = [tuple(c) for c in cut(lengths, is_image, row_length=8, per_row=1)]
    assert cuts == [(0, 6, 0, 0, 0), (6, 14, 2, 6, 1), (14, 20, 3, 10, 0)]


def test_image_that_fits_no_row():
    with pytest.raises(ValueError, match="image of 9 positions; rows have 8 positions and 1 image slots"):
        list(cut([1, 9, 1], [False, True, False], row_length=8, per_row=1))
    with pytest.raises(ValueError, match="0 image slots"):
        list(cut([1, 4, 1], [False, True, False], row_length=8, per_row=0))


pieces = st.lists(st.one_of(st.just((4, True)), st.tuples(st.integers(0, 40), st.just(False))), max_size=20)


@settings(max_examples=200, deadline=None)
@given(pieces, st.integers(4, 20), st.integers(1, 4))
def test_cuts_are_whole_legal_and_few(parts, row_length, per_row):
    parts = [(1, False), *parts]  # BOS
    lengths, is_image = [p[0] for p in parts], [p[1] for p in parts]
    begins = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    cuts = list(cut(lengths, is_image, row_length, per_row))
    covered = [p for c in cuts for p in range(c.start, c.stop)]
    assert covered == list(range(begins[-1]))  # every position, once, in order
    for c in cuts:
        assert 0 < c.stop - c.start <= row_length
        inside = [k for k in range(len(parts)) if is_image[k] and c.start <= begins[k] < c.stop]
        assert all(begins[k + 1] <= c.stop for k in inside)
        assert len(inside) == c.images <= per_row
        assert c.origin == begins[c.piece] <= c.start < begins[c.piece + 1]
    for c, after in zip(cuts, cuts[1:], strict=False):  # each run is as long as it could be
        next_is_image = is_image[after.piece] and after.start == after.origin
        full = c.stop - c.start + (4 if next_is_image else 1) > row_length
        assert full or (next_is_image and c.images == per_row)


fragments = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), max_size=80)


@settings(max_examples=200, deadline=None)
@given(fragments, st.integers(30, 64), st.integers(3, 5))
def test_rows_keep_both_budgets_and_lose_nothing(items, row_length, per_row):
    positions, images = [p for p, _ in items], [m for _, m in items]
    rows = pack(positions, images, row_length, per_row)
    assert sorted(n for row in rows for n in row) == list(range(len(items)))
    sums = [(sum(positions[n] for n in row), sum(images[n] for n in row)) for row in rows]
    assert all(p <= row_length and m <= per_row for p, m in sums)
    assert sum(2 * p <= row_length and 2 * m <= per_row for p, m in sums) <= 1
    assert rows == pack(positions, images, row_length, per_row)


@pytest.mark.parametrize("source", ["captions", "interleaved", "text"])
def test_as_good_as_plain_best_fit_decreasing(source):
    rng = np.random.default_rng(0)
    n, row_length, per_row, span = 1_500, 1024, 4, 256
    images = {"captions": np.ones(n), "interleaved": rng.integers(0, 4, n), "text": np.zeros(n)}[source].astype(int)
    texts = np.minimum(rng.lognormal(4.0, 1.0, n).astype(int) + 2, row_length - span * images)
    positions = (texts + span * images).tolist()
    ours = len(pack(positions, images.tolist(), row_length, per_row))
    assert ours <= plain_best_fit_decreasing(positions, images.tolist(), row_length, per_row)


def test_a_window_takes_a_moment():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 4, 20_000)
    positions = images * 200 + rng.integers(1, 200, 20_000)
    begin = time.process_time()
    pack(positions.tolist(), images.tolist(), 1024, 4)
    assert time.process_time() - begin < 2  # measured: 0.2 s
