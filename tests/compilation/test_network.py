"""Seconds of collectives, worked by hand, and against those that jax-ml.github.io/scaling-book works ("the book")."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest

from nmm_jax.compilation.network import HOP, Dimension, Group, group_of, seconds
from nmm_jax.parallel.chips import CHIPS

RING_4, LINE_4 = Dimension(4, ring=True), Dimension(4)
V4, V5E, V5P, TPU7X, H100 = (CHIPS[name] for name in ("v4", "v5e", "v5p", "tpu7x", "h100"))


def along(*dimensions):
    size = 1
    for d in dimensions:
        size *= d.size
    return Group(1, size, dimensions)


def test_the_books_gathers_over_a_ring_and_two():
    """Sharding, question 2: v4, 4x4x4. The book leaves out the factor (n - 1)/n: 23 us, 46 us, 190 us."""
    matrix = 2 * 1024 * 4096
    one = seconds("all-gather", matrix / 4, along(RING_4), V4).links
    two = seconds("all-gather", matrix, along(RING_4, RING_4), V4).links
    summed = seconds("all-reduce", matrix, along(RING_4), V4).links
    assert one * 4 / 3 == pytest.approx(23e-6, rel=0.02)
    assert two * 16 / 15 == pytest.approx(46e-6, rel=0.02)
    assert summed * 4 / 3 == pytest.approx(190e-6, rel=0.02)


def test_the_books_gather_over_a_line():
    """Sharding, pop quiz 2: v5e, 4 of 8x4, bf16[2048, 8192]: three hops of 8.4 MB at 45 GB/s, 560 us (680 measured)."""
    assert seconds("all-gather", 2 * 2048 * 8192, along(LINE_4), V5E).links == pytest.approx(560e-6, rel=0.01)


def test_the_books_small_gather_is_hops():
    """Sharding, question 3: 128 numbers over a ring of 4 take two hops."""
    assert seconds("all-gather", 2 * 128, along(RING_4), V4).links == 2 * HOP


def test_the_books_exchange_is_a_quarter_of_a_gather():
    """Sharding: an all-to-all of an array over a ring. A device has 1/n of the array to exchange."""
    ring = along(Dimension(16, ring=True))
    array = 1e9
    gather, exchange = (
        seconds(kind, n, ring, V5E).links for kind, n in (("all-gather", array), ("all-to-all", array / 16))
    )
    assert exchange == pytest.approx(gather * 16 / 15 / 4)


@pytest.mark.parametrize("dimensions, tokens", [((28,), 2550), ((16, 20, 28), 850)])
def test_the_books_least_batch_for_fsdp(dimensions, tokens):
    """Training: on v5p a layer is gathered in the time of its products at 2550 tokens a device; over three axes, 850.

    The book leaves out the factor (n - 1)/n.
    """
    group = along(*(Dimension(n, ring=True) for n in dimensions))
    d, f = 8192, 28_672
    gathers = 2 * seconds("all-gather", 2 * d * f, group, V5P).links
    products = tokens * 2 * 2 * d * f / V5P.peak_flops
    assert products == pytest.approx(gathers * group.size / (group.size - 1), rel=0.005)


def test_the_books_least_batch_of_a_pod():
    """Training: over DCN, gradients of 8960 chips of v5p are hidden from 76,000 tokens a pod on (6.25 GB/s a chip)."""
    pods, chips, parameters = 1000, 8960, 1e9
    reduced = seconds("all-reduce", 2 * parameters / chips, Group(pods, 1), V5P).network
    backward = 76_000 * 4 * parameters / (chips * V5P.peak_flops)
    assert backward == pytest.approx(reduced, rel=0.05)


def test_exchange_over_a_line_and_over_a_torus():
    """By the bytes that cross the middle: a line of 4, v bytes a device: 2 devices send half of v over 1 link."""
    v = 1e9
    assert seconds("all-to-all", v, along(LINE_4), V5E).links == pytest.approx(2 * v / 2 / 45e9)
    # 4x8, rings: 16 devices send half of v over the 2 * 4 links that cut the longer dimension
    torus = along(RING_4, Dimension(8, ring=True))
    assert seconds("all-to-all", v, torus, V5E).links == pytest.approx(16 * v / 2 / (2 * 4 * 45e9))


def test_groups_in_between_use_the_same_links():
    apart, near = (along(Dimension(2, stride)) for stride in (2, 1))
    assert seconds("all-gather", 1e9, apart, V5E).links == 2 * seconds("all-gather", 1e9, near, V5E).links
    assert seconds("collective-permute", 1e9, apart, V5E).links == pytest.approx(2e9 / 45e9)


def test_devices_of_one_chip():
    """tpu7x: a group of one core of each chip shares the links with the other's; one of both has them for itself."""
    single = Group(1, 4, (RING_4,), cores=1)
    both = Group(1, 8, (RING_4,), cores=2)
    assert seconds("all-gather", 1e9, single, TPU7X).links == pytest.approx(0.75e9 / (2 * 45e9))
    assert seconds("all-gather", 1e9, both, TPU7X).links == pytest.approx(0.75e9 / (2 * 90e9))
    assert seconds("all-gather", 1e9, Group(1, 2, (), cores=2), TPU7X).links == pytest.approx(0.5e9 / (6 * 90e9))


def test_gpus():
    """8 of a node by NVLink, 450 GB/s each; 16 of two nodes by 8 cards of 50 GB/s besides."""
    node, two = Group(1, 8), Group(2, 8)
    assert seconds("all-gather", 1e9, node, H100).links == pytest.approx(7 / 8 * 1e9 / 450e9)
    assert seconds("all-to-all", 1e9, node, H100).links == pytest.approx(7 / 8 * 1e9 / 450e9)
    gather, exchange = (seconds(kind, 1e9, two, H100) for kind in ("all-gather", "all-to-all"))
    assert gather.network == pytest.approx(1 / 2 * 1e9 / (8 * 50e9))
    assert exchange.network == pytest.approx(1 / 2 * 1e9 / 50e9)


def test_between_slices():
    across = Group(2, 1)
    assert seconds("all-reduce", 1e9, across, V5P).network == pytest.approx(1e9 / 6.25e9)
    assert seconds("all-gather", 1e9, Group(), V5P).links == 0
    with pytest.raises(ValueError, match="no time is known for a 'wave'"):
        seconds("wave", 1e9, across, V5P)


def test_unknown_bandwidths_cost_nothing():
    pcie = CHIPS["h100-pcie"]
    found = seconds("all-reduce", 1e9, Group(2, 4), pcie)
    assert (found.links, found.network) == (0, 0)


def devices(shape, cores=1, slices=1):
    return [
        SimpleNamespace(coords=[x, y, z], core_on_chip=core, slice_index=s)
        for s, z, y, x, core in itertools.product(range(slices), *map(range, reversed(shape)), range(cores))
    ]


def test_groups_of_devices():
    cube, shape = devices((4, 4, 4)), (4, 4, 4)

    def of(keep, among=cube, whole=shape, chip=V5P):
        return group_of([d for d in among if keep(*d.coords)], chip, whole)

    assert of(lambda x, y, z: y == z == 0) == along(RING_4)
    assert of(lambda x, y, z: z == 1) == along(RING_4, RING_4)
    assert of(lambda x, y, z: y == z == 0 and x < 2) == along(Dimension(2))
    assert of(lambda x, y, z: y == z == 0 and x % 2) == along(Dimension(2, stride=2, ring=True))
    assert of(lambda x, y, z: x == y == z).irregular
    flat = devices((4, 4, 1))
    assert of(lambda x, y, z: y == 0, flat, (4, 4, 1), V5E) == along(LINE_4)
    paired = devices((2, 2, 1), cores=2)
    assert group_of(paired, TPU7X, (2, 2, 1)) == Group(1, 8, (Dimension(2), Dimension(2)), cores=2)
    assert group_of(paired[::2], TPU7X, (2, 2, 1)) == Group(1, 4, (Dimension(2), Dimension(2)), cores=1)
    two = devices((4, 4, 4), slices=2)
    assert of(lambda x, y, z: x == y == z == 0, two) == Group(2, 1)
    assert of(lambda x, y, z: y == z == 0, two) == dataclasses.replace(along(RING_4), islands=2)
    nodes = [SimpleNamespace(process_index=i // 8) for i in range(16)]
    assert group_of(nodes, H100, ()) == Group(2, 8)
