"""How an array lies in another library's tensor, as a pattern of axes that is read in both directions.

    "out in -> in out"                               a matrix, transposed
    "(h k) d -> d h k"                               heads that are rows of one matrix there
    "d colour row column -> (row column colour) d"   a convolution over patches
    "1 1 d -> d"                                     axes of size 1 that only they have

A shard of ours is read as the part of theirs that it needs: a range of a single axis, or of the first in brackets.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

Index = tuple[slice, ...]
_WHOLE = slice(None)


@dataclasses.dataclass(frozen=True)
class Axes:
    """A pattern "theirs -> ours", with the size of every axis that it names."""

    theirs: tuple[tuple[str, ...], ...]  # of each axis, the names that it is made of
    ours: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, pattern: str, shape: tuple[int, ...], known: Mapping[str, int]) -> "Axes":
        """For an array of ours with this shape; `known` are sizes of names that share one of its axes."""
        theirs, ours = _parse(pattern)
        sizes = {name: 1 for axis in theirs for name in axis if name.startswith("1")}
        for axis, size in zip(ours, shape, strict=True):
            sizes |= {axis[0]: size} if len(axis) == 1 else {name: known[name] for name in axis}
            assert math.prod(sizes[name] for name in axis) == size, f"{pattern} of {shape} with {known}"
        return cls(theirs, ours, sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of their tensor."""
        return tuple(self._size(axis) for axis in self.theirs)

    def read(self, index: Index, piece: Callable[[Index], np.ndarray]) -> np.ndarray:
        """`index` of our array, made of what piece(i) gives, the values of theirs at i; no more is asked for."""
        ranges = {name: _WHOLE for name in self.sizes}
        later: list[slice] = []  # cut when all axes are in place
        for axis, wanted in zip(self.ours, index, strict=True):
            alone = len(axis) == 1
            later.append(_WHOLE if alone else wanted)
            if alone:
                ranges[axis[0]] = slice(*wanted.indices(self.sizes[axis[0]]))
        found = piece(tuple(self._range(axis, ranges) for axis in self.theirs))
        # What could be cut while reading has been; the others are cut here.
        sizes, rest = dict(self.sizes), []
        for axis in self.theirs:
            first = axis[0]
            if ranges[first] != _WHOLE:
                sizes[first] = ranges[first].stop - ranges[first].start
            rest += [_WHOLE, *(ranges[name] for name in axis[1:])]
        factors = [name for axis in self.theirs for name in axis]
        found = found.reshape([sizes[name] for name in factors])[tuple(rest)]
        order = [name for axis in self.ours for name in axis] + [name for name in factors if name.startswith("1")]
        found = found.transpose([factors.index(name) for name in order])
        lengths = dict(zip(order, found.shape, strict=True))
        return found.reshape([math.prod(lengths[name] for name in axis) for axis in self.ours])[tuple(later)]

    def write(self, array: np.ndarray) -> np.ndarray:
        """Our whole array as their tensor."""
        order = [name for axis in self.ours for name in axis]
        factors = [name for axis in self.theirs for name in axis if not name.startswith("1")]
        split = array.reshape([self.sizes[name] for name in order])
        return split.transpose([order.index(name) for name in factors]).reshape(self.shape)

    def _size(self, axis: tuple[str, ...]) -> int:
        return math.prod(self.sizes[name] for name in axis)

    def _range(self, axis: tuple[str, ...], ranges: Mapping[str, slice]) -> slice:
        """The part of their axis to read: an axis of several names is cut along the first."""
        first = ranges[axis[0]]
        inner = self._size(axis[1:])
        return _WHOLE if first == _WHOLE else slice(first.start * inner, first.stop * inner)


@functools.lru_cache
def _parse(pattern: str) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    theirs, ours = (_axes(side) for side in pattern.split("->"))
    named = {name for axis in theirs for name in axis if not name.startswith("1")}
    assert named == {name for axis in ours for name in axis}, pattern
    return theirs, ours


def _axes(side: str) -> tuple[tuple[str, ...], ...]:
    found: list[tuple[str, ...]] = []
    for i, part in enumerate(side.replace("(", " ( ").replace(")", " ) ").split(" ( ")):
        inside, _, outside = part.partition(" ) ") if i else ("", "", part)
        found += [tuple(inside.split())] if inside.strip() else []
        found += [(name,) for name in outside.split()]
    # Axes of size 1 have no name; they get different ones.
    return tuple((f"1_{i}",) if axis == ("1",) else axis for i, axis in enumerate(found))
