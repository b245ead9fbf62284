"""The rows that kernels are timed on, and the FLOPs they are said to need."""

import numpy as np
import pytest

from benchmarks.attention import MATRIX, batch_of, over_floor
from benchmarks.mixture_rows import IMAGE, first_of_segment, synthetic
from benchmarks.timing import Timed


@pytest.mark.parametrize("s", [1024, 4096])
def test_synthetic_rows_are_packed_documents(s):
    rows = 40
    segments, until = synthetic(s, rows)
    first, at = first_of_segment(segments), np.arange(s)
    assert (first <= at).all() and (until > at).all() and (segments > 0).mean() > 0.85
    ends = np.take_along_axis(segments, until - 1, axis=1)
    assert (ends == segments).all()  # no interval leaves its segment
    images = until > at + 1
    # Their last positions see what text sees: nothing ahead.
    assert (until[:, :-1][images[:, :-1]] == until[:, 1:][images[:, :-1]]).all()
    spans = (np.diff(images.astype(int), axis=1) == 1).sum() + images[:, 0].sum()
    assert images.sum() == spans * (IMAGE - 1) and 0.3 < spans * IMAGE / segments.size < 0.8
    again, _ = synthetic(s, rows)
    np.testing.assert_array_equal(again, segments)


def test_pairs_are_those_that_are_seen():
    segments, until = synthetic(1024, 4)
    keys = np.arange(1024)
    mask = (segments[:, :, None] == segments[:, None]) & (keys < until[:, :, None]) & (segments[:, :, None] > 0)
    assert batch_of(segments, until, 1, 1, 8, "float32").pairs == mask.sum()


def test_over_floor():
    product = Timed(lambda: None, [0.5, 1.0, 1.0])  # for 2 MATRIX^3 FLOPs
    flops = 0.1 * 2 * MATRIX**3
    assert over_floor([0.1, 0.4, 0.2], product, flops, peak=None) == pytest.approx(2)  # of 2, 4 and 2
    assert over_floor([7.0], product, flops, peak=None) == pytest.approx(70)
    assert over_floor([1.0, 3.0, 2.0], product, 1e12, peak=2e12) == pytest.approx(4)
