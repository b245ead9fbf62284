"""Patterns of axes, against reshapes and transposes by hand; and parts of arrays, which need parts of tensors."""

import numpy as np
import pytest

from nmm_jax.interop.axes import Axes

H, K, D, P = 4, 3, 10, 2
CASES = {
    "out in -> in out": ((D, 6), lambda x: x.T, {}),
    "(h k) d -> d h k": ((H * K, D), lambda x: x.reshape(H, K, D).transpose(2, 0, 1), {}),
    "d (h k) -> h k d": ((D, H * K), lambda x: x.reshape(D, H, K).transpose(1, 2, 0), {}),
    "(h k) -> h k": ((H * K,), lambda x: x.reshape(H, K), {}),
    "1 1 d -> d": ((1, 1, D), lambda x: x[0, 0], {}),
    "d colour row column -> (row column colour) d": (
        (D, 3, P, P),
        lambda x: np.stack([x[:, c, i, j] for i in range(P) for j in range(P) for c in range(3)]),
        {"row": P, "column": P, "colour": 3},
    ),
}


@pytest.mark.parametrize("pattern", CASES)
def test_both_directions(pattern):
    shape, by_hand, known = CASES[pattern]
    theirs = np.random.default_rng(0).normal(size=shape)
    ours = by_hand(theirs)
    axes = Axes.of(pattern, ours.shape, known)
    assert axes.shape == shape
    np.testing.assert_array_equal(axes.read((slice(None),) * ours.ndim, theirs.__getitem__), ours)
    np.testing.assert_array_equal(axes.write(ours), theirs)


@pytest.mark.parametrize("pattern", CASES)
def test_parts_are_read_from_parts(pattern):
    shape, by_hand, known = CASES[pattern]
    theirs = np.random.default_rng(0).normal(size=shape)
    ours = by_hand(theirs)
    axes = Axes.of(pattern, ours.shape, known)
    for axis, size in enumerate(ours.shape):
        read = []

        def piece(index, read=read):
            read.append(theirs[index].size)
            return theirs[index]

        for start, stop in ((0, size // 2), (size // 2, size)):
            index = tuple(slice(start, stop) if i == axis else slice(None) for i in range(ours.ndim))
            np.testing.assert_array_equal(axes.read(index, piece), ours[index])
        # The two halves are all that was read, but where the axis lies inside one of theirs.
        inside = axes.ours[axis][0] == "k" or len(axes.ours[axis]) > 1
        assert sum(read) == theirs.size * (2 if inside else 1)
