"""Which chip a device is, its figures against other published ones, and its memory against libtpu's own word."""

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from nmm_jax.parallel.chips import CHIPS, of_device, peak_flops

# As jax.devices() prints them, or (v4 to tpu7x, a100 to b200) as compile-only devices have them.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    chip = of_device(SimpleNamespace(device_kind=kind))
    assert chip is CHIPS[KINDS[kind]]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GeForce RTX 4090"])
def test_unknown_devices_have_no_figures(kind):
    device = SimpleNamespace(device_kind=kind)
    assert of_device(device) is None and peak_flops(device) is None


# PFLOP/s of whole pods and boxes, as stated: cloud.google.com/tpu/docs/v5e, v6e; Google's Ironwood page (42.5 exaflops
# in float8, half of that in bfloat16); NVIDIA DGX B200's data sheet (36 dense in float8, twice bfloat16's).
PODS = {"v5e": (256, 50.63), "v6e": (256, 234.9), "tpu7x": (2 * 9216, 42_500 / 2), "b200": (8, 36 / 2)}


@pytest.mark.parametrize("name", PODS)
def test_peaks_against_those_of_pods(name):
    devices, petaflops = PODS[name]
    assert CHIPS[name].peak_flops * devices / 1e15 == pytest.approx(petaflops, rel=0.005)


# GB/s of a chip in both directions: cloud.google.com/tpu/docs, NVIDIA's data sheets.
STATED = {"v5e": 400, "v5p": 1200, "v6e": 800, "tpu7x": 1200, "a100": 600, "h100": 900, "h200": 900, "b200": 1800}


@pytest.mark.parametrize("name", STATED)
def test_links_against_whole_chips(name):
    chip = CHIPS[name]
    together = 2 * chip.links * chip.link_bandwidth / 1e9
    assert together / STATED[name] == (pytest.approx(0.9) if chip.torus_dims else 1)


def test_rings():
    assert CHIPS["v5p"].rings((4, 4, 8)) == (True, True, True)
    assert CHIPS["v5p"].rings((2, 4, 4)) == (False, False, False)
    assert CHIPS["v6e"].rings((8, 16)) == (False, True)


PROGRAM = textwrap.dedent(
    """
    import re

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from nmm_jax.parallel.chips import CHIPS, of_device

    slices = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
    for name, shape in slices.items():
        options = {"chip_config_name": "megacore"} if name == "v4" else {}
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **options)
        device, chip = topology.devices[0], CHIPS[name]
        assert of_device(device) is chip, device.device_kind
        assert len(topology.devices) == 4 * chip.devices_per_chip, (name, topology.devices)
        large = jax.ShapeDtypeStruct((1 << 36,), jnp.float32, sharding=SingleDeviceSharding(device))
        try:
            jax.jit(lambda x: jnp.sin(x) + jnp.cos(x[::-1])).lower(large).compile()
        except jax.errors.JaxRuntimeError as error:
            available = re.search(r"exceeds available HBM \\(([\\d.]+)G\\)", str(error))
            assert available, error
            assert round(chip.memory_bytes / 2**30, 2) == float(available.group(1)), (name, error)
        else:
            raise AssertionError(f"{name} takes 512 GiB")
    """
)


@pytest.mark.extras
def test_memory_is_what_libtpu_says():
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
