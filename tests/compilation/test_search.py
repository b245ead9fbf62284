"""Meshes and remat policies by count. Devices are libtpu's; nothing is compiled."""

import dataclasses

import pytest

from nmm_jax import compile as command
from nmm_jax.compilation import search
from nmm_jax.compilation.step import TooLarge, lay_out
from nmm_jax.parallel.mesh import AXES
from nmm_jax.parallel.topology import Topology
from tests.fake_batches import tiny_config

pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def topology():
    pytest.importorskip("libtpu")
    return Topology.parse("v5e:2x2")


@pytest.fixture(scope="module")
def found(topology):
    return list(search.candidates(tiny_config(), topology, 8))


def with_room(topology, room):
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory_bytes=int(room / search.ROOM)))


def test_candidates_are_meshes_that_divide(found, topology):
    meshes = {tuple(c.config.mesh[axis] for axis in AXES) for c in found}
    assert (4, 1, 1, 1) in meshes and (1, 4, 1, 1) in meshes and (2, 1, 1, 2) in meshes
    for c in found:
        assert lay_out(c.config, topology).mesh.size == 4
        assert c.config.batch_rows % (c.config.mesh.replica * c.config.mesh.fsdp * c.config.gradient_accumulation) == 0
    assert {c.config.model.remat for c in found} == {"none", "minimal", "full"}  # exchanges are of experts


def test_microbatches_only_where_they_are_needed(found, topology):
    assert all(c.config.gradient_accumulation == 1 for c in found)
    least = min(c.needed for c in found)
    tight = search.candidates(tiny_config(), with_room(topology, 0.8 * least), 8)
    assert any(c.config.gradient_accumulation > 1 for c in tight)


def test_the_fastest_that_fits_is_proposed_first(found, topology):
    room = sorted(c.needed for c in found)[len(found) // 2]
    fitting = search._fitting(tiny_config(), with_room(topology, room))
    assert fitting and all(c.needed <= room for c in fitting)
    assert [c.seconds for c in fitting] == sorted(c.seconds for c in fitting)
    told = search.proposals(tiny_config(), with_room(topology, room))
    assert str(fitting[0]) in told and "--config.mesh.fsdp=" in told and "GiB by count" in told


def test_batches_are_tried_by_time_for_a_row(topology):
    fitting = search._fitting(tiny_config(), topology, [4, 8])
    assert {c.config.batch_rows for c in fitting} == {4, 8}
    assert all(("batch_rows" in c.overrides) == (c.config.batch_rows == 4) for c in fitting)


def test_a_slice_that_is_too_small_is_told(topology):
    with pytest.raises(ValueError, match=r"nothing fits v5e:2x2 by count: the least is .* take a larger slice"):
        search._fitting(tiny_config(), with_room(topology, 1))


def test_a_step_that_is_too_large_is_told_with_what_should_fit(topology, monkeypatch):
    def too_large(*_):
        raise TooLarge("RESOURCE_EXHAUSTED: 20.0G of 15.75G")

    monkeypatch.setattr(command, "compile_step", too_large)
    with pytest.raises(TooLarge, match=r"20.0G of 15.75G\n.*these should fit(.|\n)*--config.mesh.replica="):
        command.compile_one(tiny_config(), topology)
