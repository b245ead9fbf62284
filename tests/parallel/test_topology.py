"""Accelerators by name."""

import os
import subprocess
import sys

import pytest

from nmm_jax.parallel.topology import Topology, TopologyError


@pytest.mark.parametrize(
    "name, slices, devices, told",
    [
        ("v5p:4x4x8", 1, 128, "v5p:4x4x8"),
        ("v6e:16x16", 2, 512, "2 x v6e:16x16"),
        ("tpu7x:4x4x4", 1, 128, "tpu7x:4x4x4"),  # two devices a chip
        ("v4:2x2x1", 1, 4, "v4:2x2x1"),
        ("h100:8x8", 1, 64, "h100:8x8"),
    ],
)
def test_names(name, slices, devices, told):
    topology = Topology.parse(name, slices)
    assert topology.device_count == devices and str(topology) == told and topology.name == name


@pytest.mark.parametrize(
    "name, slices, message",
    [
        ("v5p-256", 1, "'v5p-256' names no topology; expected GENERATION:SHAPE such as v5p:4x4x8"),
        ("v7x:4x4x4", 1, "GENERATION is one of v4, v5e, v5p, v6e, tpu7x"),
        ("v5p:4x4", 1, "slices of v5p have 3 dimensions, as v5p:4x4x4"),
        ("v5e:4x4x4", 1, "slices of v5e have 2 dimensions, as v5e:4x4"),
        ("h100:8x8", 2, "only TPUs come in slices; nodes are the first number"),
    ],
)
def test_names_of_nothing(name, slices, message):
    with pytest.raises(TopologyError, match=message):
        Topology.parse(name, slices)


@pytest.mark.extras
@pytest.mark.parametrize("name, slices", [("v4:2x2x1", 1), ("v5e:4x4", 2), ("v5p:2x2x1", 1), ("tpu7x:2x2x1", 1)])
def test_devices_to_compile_for(name, slices):
    pytest.importorskip("libtpu")
    topology = Topology.parse(name, slices)
    devices = topology.devices()
    assert len(devices) == topology.device_count
    assert any(kind in devices[0].device_kind for kind in topology.chip.kinds)
    assert len({getattr(device, "slice_index", 0) for device in devices}) == slices


@pytest.mark.extras
def test_a_slice_that_there_is_not():
    pytest.importorskip("libtpu")
    with pytest.raises(TopologyError, match="libtpu knows no v5e:3x5: .*not divisible"):
        Topology.parse("v5e:3x5").devices()


@pytest.mark.extras
def test_libtpu_is_silent():
    """A command's stderr is its own words; libtpu reads its environment once, so in a process of its own."""
    pytest.importorskip("libtpu")
    program = "from nmm_jax.parallel.topology import Topology; Topology.parse('v5e:4x4', 2).devices()"
    environment = {name: v for name, v in os.environ.items() if not name.startswith("TPU_")}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
