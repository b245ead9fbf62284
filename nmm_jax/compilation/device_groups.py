"""Which devices a collective joins, and which mesh axes these differ in.

Devices are numbered as the mesh has them, row by row. A program writes its groups of devices in one of three ways, or
as pairs of a sender and a receiver:

    replica_groups={{0,1},{2,3}}                                      written out; {} is all of them
    replica_groups=[2,2]<=[2,2]T(1,0)                                 0..3 as 2 x 2, transposed, as 2 groups of 2
    replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}  along axes of a mesh of the compiler's own
    source_target_pairs={{0,1},{1,0}}

A program for several slices is one slice's: its numbers count within the slice.
"""

import functools
import itertools
import math
import re

import numpy as np
from jax.sharding import Mesh

Groups = tuple[tuple[int, ...], ...]


class Layout:
    """The devices of a mesh, as a program for so many `partitions` numbers them."""

    def __init__(self, mesh: Mesh, partitions: int):
        self.sizes = dict(mesh.shape)
        self.devices = math.prod(self.sizes.values())
        self.partitions = partitions
        slices: dict[int, list[int]] = {}
        for place, device in enumerate(mesh.devices.flat):
            slices.setdefault(getattr(device, "slice_index", 0) or 0, []).append(place)
        whole = partitions == self.devices or len(slices) * partitions != self.devices
        # Of each slice, the places in the mesh of its devices.
        self.slices = [list(range(self.devices))] if whole else [slices[each] for each in sorted(slices)]
        self.groups = functools.cache(self._find_groups)
        self.axes = functools.cache(self._find_axes)

    def _find_groups(self, attributes: str) -> Groups:
        """Of a collective's attributes, groups of more than one device."""
        local = _pairs(attributes)
        if local is None:
            local = _groups(attributes, len(self.slices[0]))
        return tuple(tuple(s[i] for i in group) for s in self.slices for group in local if len(group) > 1)

    @functools.cached_property
    def across_slices(self) -> Groups:
        """The devices that have the same place in each slice."""
        return tuple(zip(*self.slices, strict=True))

    def _find_axes(self, groups: Groups) -> tuple[str, ...]:
        """The fewest mesh axes such that no group has devices that differ in another; () of no groups."""
        if not groups:
            return ()
        names = [axis for axis, n in self.sizes.items() if n > 1]
        combinations = [c for k in range(1, len(names) + 1) for c in itertools.combinations(names, k)]
        for axes in sorted(combinations, key=lambda axes: math.prod(self.sizes[axis] for axis in axes)):
            others = self._places_on(tuple(axis for axis in self.sizes if axis not in axes))
            if all((others[list(group)] == others[group[0]]).all() for group in groups):
                return axes
        return ()

    def _places_on(self, axes: tuple[str, ...]) -> np.ndarray:
        """Of each device its coordinate on these axes, as one number."""
        coordinates = np.unravel_index(np.arange(self.devices), tuple(self.sizes.values()))
        place = np.zeros(self.devices, int)
        for axis, along in zip(self.sizes, coordinates, strict=True):
            if axis in axes:
                place = place * self.sizes[axis] + along
        return place


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Raises ValueError: they are written in a way that is not known."""
    text = attributes.split("replica_groups=", 1)[-1]
    if text.startswith("{{"):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text.split("}}")[0] + "}")]
    if text.startswith("{}"):
        return [list(range(devices))]
    found = re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if found:
        return _iota(found.group(2)).reshape(_numbers(found.group(1))).tolist()
    found = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([\d,]*\))*)\))? \{([^}]*)\}", text)
    if found:
        return _along_axes(*found.groups())
    raise ValueError(f"groups of devices that are written in an unknown way: {text[:80]!r}")


def _along_axes(mesh: str, device_ids: str | None, axes: str) -> list[list[int]]:
    """'a'=2,'b'=4 and 'a','b':(1)2, which is of b's four the first two halves: one of each pair of neighbours."""
    sizes = {name.strip("' "): int(n) for name, n in (part.split("=") for part in mesh.split(","))}
    if device_ids is None:
        ids = np.arange(math.prod(sizes.values()))
    else:
        ids = _iota(device_ids) if "[" in device_ids else np.array(_numbers(device_ids))
    pieces: dict[str, list[tuple[int, int]]] = {}
    for axis in filter(None, axes.split(",")):
        name, _, of = axis.partition(":")
        name = name.strip("' ")
        found = re.fullmatch(r"\((\d+)\)(\d+)", of)
        pieces.setdefault(name, []).append((int(found[1]), int(found[2])) if found else (1, sizes[name]))
    shape: list[int] = []  # the mesh's, with axes cut where the pieces are that devices are joined along
    grouped = []
    for name, size in sizes.items():
        done = 1
        for start, n in sorted(pieces.get(name, [])):
            shape += [start // done, n]
            grouped.append(len(shape) - 1)
            done = start * n
        shape.append(size // done)
    order = [i for i in range(len(shape)) if i not in grouped] + grouped
    members = math.prod(shape[i] for i in grouped)
    return ids.reshape(shape).transpose(order).reshape(-1, members).tolist()


def _iota(text: str) -> np.ndarray:
    """<=[8,2]T(1,0) or [8,2]T(1,0): 0, 1, ... in this shape, transposed, in a row."""
    found = re.fullmatch(r"(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip())
    if not found:
        raise ValueError(f"an order of devices that is written in an unknown way: {text!r}")
    shape = _numbers(found[1])
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_numbers(found[2])) if found[2] else ids).reshape(-1)


def _pairs(attributes: str) -> list[list[int]] | None:
    """Of pairs of a source and a target the devices that are joined, however far; None where there are no pairs."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if not found:
        return None
    joined: dict[int, list[int]] = {}
    for source, target in re.findall(r"\{(\d+),(\d+)\}", found[1]):
        a, b = (joined.setdefault(int(each), [int(each)]) for each in (source, target))
        if a is not b:
            a += b
            joined |= dict.fromkeys(b, a)
    return [sorted(group) for group in {id(group): group for group in joined.values()}.values()]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
