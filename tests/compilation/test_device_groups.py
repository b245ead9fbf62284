"""Which devices and which mesh axes collectives join, in all the ways that compilers write groups."""

import types

import numpy as np
import pytest

from nmm_jax.compilation.device_groups import Layout


def mesh_of(slices=1, **sizes):
    """Of devices that know their slice, the first axis across slices."""
    sizes = {"replica": 1, "fsdp": 1, "expert": 1, "tensor": 1} | sizes
    n = int(np.prod(list(sizes.values())))
    devices = np.array([types.SimpleNamespace(slice_index=i * slices // n) for i in range(n)], object)
    return types.SimpleNamespace(shape=sizes, devices=devices.reshape(tuple(sizes.values())))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}, dimensions={0}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("{}, dimensions={0}", (tuple(range(8)),)),
        ("[2,4]<=[8], dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[4,2]T(1,0), dimensions={0}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("[4,2]<=[2,2,2]T(1,2,0), to_apply=%add", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh[axis_0=4,axis_1=2] {axis_0}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}, dimensions={0}", ()),
    ],
)
def test_groups(written, groups):
    assert Layout(mesh_of(fsdp=8), 8).groups(f", channel_id=1, replica_groups={written}") == groups


def test_pairs_join_all_that_a_ring_reaches():
    pairs = ", source_target_pairs={{0,2},{2,4},{4,0},{1,3},{6,6}}, metadata={}"
    assert Layout(mesh_of(fsdp=8), 8).groups(pairs) == ((0, 2, 4), (1, 3))


def test_an_unknown_way_is_told():
    with pytest.raises(ValueError, match="unknown way: 'rings"):
        Layout(mesh_of(fsdp=8), 8).groups("replica_groups=rings(2)")


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (((0, 2, 4, 6), (1, 3, 5, 7)), ("fsdp",)),
        (((0, 1), (2, 3)), ("tensor",)),
        (((0, 1, 2, 3, 4, 5, 6, 7),), ("fsdp", "tensor")),
        (((0, 2), (4, 6), (1, 3), (5, 7)), ("fsdp",)),  # neighbours on it, the first of two stages
        (((0, 3),), ("fsdp", "tensor")),
        ((), ()),
    ],
)
def test_axes_are_the_fewest_that_hold_the_groups(groups, axes):
    assert Layout(mesh_of(fsdp=4, tensor=2), 8).axes(groups) == axes


def test_a_program_of_one_of_several_slices():
    layout = Layout(mesh_of(slices=2, replica=2, fsdp=4), partitions=4)
    groups = layout.groups("replica_groups={{0,1,2,3}}")
    assert groups == ((0, 1, 2, 3), (4, 5, 6, 7)) and layout.axes(groups) == ("fsdp",)
    assert layout.across_slices == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.axes(layout.across_slices) == ("replica",)


def test_several_replicas_in_a_slice():
    layout = Layout(mesh_of(slices=2, replica=4, fsdp=2), partitions=4)
    assert layout.axes(layout.groups("replica_groups={{0,2},{1,3}}")) == ("replica",)
    assert layout.axes(layout.across_slices) == ("replica",)
    assert layout.axes(layout.groups("replica_groups={{0,1},{2,3}}")) == ("fsdp",)
