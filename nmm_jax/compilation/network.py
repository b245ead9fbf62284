"""How long a collective takes: on a torus of links (TPU slices), on a switch (GPU nodes), between slices or nodes.

A collective joins groups of devices. Of a group it matters which dimensions of the torus it spans, how far apart its
neighbours are there (groups in between use the same links) and whether a dimension is a ring:

    ring of n      every device sends on 2 links: one in each direction
    line of n      the device at the end has 1

V bytes of the whole buffer, n devices, w of a link, D dimensions (jax-ml.github.io/scaling-book/sharding):

    all-gather, reduce-scatter    (n - 1)/n V / sum over D of (1 or 2) w        all dimensions at work at once
    all-reduce                    twice that
    all-to-all of v a device      max over D of n_D v / (4 or 8 w)              what crosses the middle of the longest
    a permutation of v            v / w

and at least a microsecond for each hop on the longest way. On a switch all links of a device work at once. Between
slices or nodes, each of the g devices that a group has in one of m moves 1/g of the buffer: (m - 1)/m V/g for a gather.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from nmm_jax.parallel.chips import Chip

HOP = 1e-6  # seconds; jax-ml.github.io/scaling-book/tpus, question 5
DIE_TO_DIE = 6  # links; between the two devices of a chip of tpu7x: cloud.google.com/tpu/docs/tpu7x


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One dimension of the torus as a group sees it: `size` of its chips, each `stride` from the next."""

    size: int
    stride: int = 1
    ring: bool = False

    @property
    def links(self) -> float:
        """A chip's links along it that are this group's own."""
        return (2 if self.ring else 1) / self.stride


@dataclasses.dataclass(frozen=True)
class Group:
    """Devices that a collective joins.

    Attributes:
      islands: slices (or nodes) it has devices in.
      within: devices in each.
      dimensions: of the torus, those in which it is more than one chip wide; () on a switch.
      cores: devices of each of its chips.
      irregular: its devices are no box of the torus; taken for a line.
    """

    islands: int = 1
    within: int = 1
    dimensions: tuple[Dimension, ...] = ()
    cores: int = 1
    irregular: bool = False

    @property
    def size(self) -> int:
        return self.islands * self.within


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one collective: on links within slices or nodes, and on the network between them. They work side by side."""

    links: float = 0.0
    network: float = 0.0


def group_of(devices: Sequence[Any], chip: Chip, shape: Sequence[int]) -> Group:
    """What `devices` are to each other.

    Args:
      devices: of TPUs, with coords, core_on_chip and slice_index; of GPUs, with process_index, which is their node.
      shape: of the slice, in chips.
    """
    islands = Counter(island_of(device, chip) for device in devices)
    within = max(islands.values())
    if not chip.torus_dims:
        return Group(len(islands), within)
    first = island_of(devices[0], chip)
    here = [device for device in devices if island_of(device, chip) == first]
    chips = {tuple(device.coords) for device in here}
    cores = len(here) // len(chips)
    places = [sorted(set(along)) for along in zip(*chips, strict=True)]
    steps = [{b - a for a, b in zip(along, along[1:], strict=False)} for along in places]
    if math.prod(map(len, places)) != len(chips) or any(len(distinct) > 1 for distinct in steps):
        return Group(len(islands), within, (Dimension(len(chips)),), cores, irregular=True)
    dimensions = []
    for along, distinct, whole, ring in zip(places, steps, shape, chip.rings(shape), strict=False):
        if len(along) > 1:
            (stride,) = distinct
            dimensions.append(Dimension(len(along), stride, ring and len(along) * stride == whole))
    return Group(len(islands), within, tuple(dimensions), cores)


def island_of(device: jax.Device, chip: Chip) -> int:
    """The slice of a TPU, the node of a GPU."""
    return getattr(device, "slice_index", 0) if chip.torus_dims else device.process_index


def seconds(kind: str, nbytes: float, group: Group, chip: Chip) -> Seconds:
    """Of one run of a collective. A bandwidth that is not known counts as infinite.

    Args:
      kind: as HLO names it.
      nbytes: of the whole buffer that a device gathers, reduces or exchanges.

    Raises:
      ValueError: the kind is none of those above.
    """
    if group.size == 1:
        return Seconds()
    if kind in ("all-gather", "reduce-scatter", "collective-broadcast"):
        return _gather(nbytes, group, chip)
    if kind == "all-reduce":
        return _gather(2 * nbytes, group, chip)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return _exchange(nbytes, group, chip)
    if kind == "collective-permute":
        return _permute(nbytes, group, chip)
    raise ValueError(f"no time is known for a {kind!r}")


def _gather(nbytes: float, group: Group, chip: Chip) -> Seconds:
    chips = group.within // group.cores
    links = sum(d.links for d in group.dimensions) if chip.torus_dims else chip.links or 1
    between_chips = _passes(chips) * nbytes / (_own(group, chip) * links) if chips > 1 else 0.0
    on_chip = _passes(group.cores) * nbytes / (DIE_TO_DIE * _known(chip.link_bandwidth))
    network = _passes(group.islands) * nbytes / group.within / _known(chip.network_bandwidth)
    return Seconds(max(between_chips, on_chip, _latency(group)), network)


def _exchange(nbytes: float, group: Group, chip: Chip) -> Seconds:
    inside = nbytes * group.within / group.size  # of what a device sends, what stays in its island
    network = (nbytes - inside) / _known(chip.network_bandwidth)
    if not chip.torus_dims:
        return Seconds(_passes(group.within) * inside / (_known(chip.link_bandwidth) * (chip.links or 1)), network)
    # Half of a dimension's chips send half of it to the other half, over the links that cross its middle.
    across = [d.size * group.cores * inside / 4 / (d.links * _own(group, chip)) for d in group.dimensions]
    on_chip = (group.cores - 1) / group.within * inside / (DIE_TO_DIE * _known(chip.link_bandwidth))
    return Seconds(max([*across, on_chip, _latency(group)]), network)


def _permute(nbytes: float, group: Group, chip: Chip) -> Seconds:
    if group.islands > 1:
        return Seconds(network=nbytes / _known(chip.network_bandwidth))
    if group.dimensions:
        return Seconds(max(nbytes * max(d.stride for d in group.dimensions) / _own(group, chip), HOP))
    return Seconds(nbytes / (_known(chip.link_bandwidth) * (DIE_TO_DIE if group.cores > 1 else chip.links or 1)))


def _passes(n: int) -> float:
    """What a device has to be sent of a buffer that n devices have between them."""
    return (n - 1) / n


def _own(group: Group, chip: Chip) -> float:
    """A link's bandwidth, of which the other devices of its chip may use a part for groups of their own."""
    return _known(chip.link_bandwidth) * group.cores / chip.devices_per_chip


def _latency(group: Group) -> float:
    return HOP * sum((d.size // 2 if d.ring else d.size - 1) * d.stride for d in group.dimensions)


def _known(bandwidth: float | None) -> float:
    return math.inf if bandwidth is None else bandwidth
