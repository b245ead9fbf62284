"""What accelerators can do, as their makers state it: the figures of one JAX device.

How JAX counts: a chip of v4 (whose two cores work as one, "megacore"), v5e, v5p and v6e is one device; a chip of tpu7x
is two, which share its links. A GPU is one.

Sources:
  TPU: peak, HBM's bandwidth, network   cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x
  TPU: memory                           libtpu 0.0.42.1: "exceeds available HBM (15.75G)"; less than the chip has
  TPU: links                            jax-ml.github.io/scaling-book/tpus, nine tenths of what Google states (400, 800
                                        and 1200 GB/s in both directions of 4, 4 and 6 ports); there, v4's network too
  GPU: peak, HBM's bandwidth, NVLink    NVIDIA's data sheets of A100, H100, H200, DGX B200; peaks without sparsity
  GPU: memory                           gpu_targets.py, and JAX's default share of it
  GPU: network                          NVIDIA's user guides of DGX A100, H100/H200, B200: one card for each GPU
"""

import dataclasses
from collections.abc import Sequence

import jax

from nmm_jax.parallel.gpu_targets import TARGETS

# docs.jax.dev/en/latest/gpu_memory_allocation.html; the environment's XLA_PYTHON_CLIENT_MEM_FRACTION changes it.
GPU_MEMORY_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one JAX device; None is unknown. Bandwidths are B/s in one direction.

    Attributes:
      name: of the generation, as topologies have it: v5p.
      kinds: substrings of `device.device_kind`.
      peak_flops: of dense bfloat16 products, FLOP/s.
      memory_bytes: what XLA may use.
      memory_bandwidth: of HBM.
      links: of the chip to neighbours (of a torus) or to the switch of its node (NVLink).
      link_bandwidth: of one of them.
      torus_dims: how many dimensions a slice has; 0 where the devices of a node hang on one switch.
      network_bandwidth: the device's share of the network between slices or nodes.
      devices_per_chip: JAX devices that share the chip's links.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    links: int | None
    link_bandwidth: float | None
    torus_dims: int
    network_bandwidth: float | None
    devices_per_chip: int = 1

    def rings(self, shape: Sequence[int]) -> tuple[bool, ...]:
        """Which dimensions of a slice wrap around: in 3D all if it is made of whole 4x4x4 cubes, in 2D those of 16.

        (The pages above; AI-Hypercomputer/maxtext src/maxtext/utils/accelerator_to_spec_map.py has it slice by slice.)
        """
        if self.torus_dims == 2:
            return tuple(size == 16 for size in shape)
        return (all(size % 4 == 0 for size in shape),) * len(shape)


def _gib(n: float) -> int:
    return int(n * 2**30)


def _of(generation: str) -> int:
    return int(GPU_MEMORY_FRACTION * TARGETS[generation].memory)


# The first whose kinds match a device is its chip: what is more special comes first.
# name, kinds, peak, memory, its bandwidth, links, bandwidth of one, torus, network, devices of a chip
_CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, _gib(30.75), 1200e9, 6, 45e9, 3, 50e9 / 8),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, _gib(15.75), 819e9, 4, 45e9, 2, 25e9 / 8),
    Chip("v5p", ("TPU v5",), 459e12, _gib(95.74), 2765e9, 6, 90e9, 3, 50e9 / 8),
    Chip("v6e", ("TPU v6",), 918e12, _gib(31.25), 1638e9, 4, 90e9, 2, 100e9 / 8),
    Chip("tpu7x", ("TPU7x",), 2307e12 / 2, _gib(94.75), 7380e9 / 2, 6, 90e9, 3, 100e9 / 8 / 2, 2),
    Chip("a100-40gb", ("A100-SXM4-40GB", "A100-PCIE-40GB"), 312e12, _of("a100-40gb"), 1555e9, 12, 25e9, 0, 200e9 / 8),
    Chip("a100", ("A100",), 312e12, _of("a100"), 2039e9, 12, 25e9, 0, 200e9 / 8),
    Chip("h100-pcie", ("H100 PCIe",), 756e12, _of("h100-pcie"), 2000e9, None, None, 0, None),  # linked as bought
    Chip("h100", ("H100",), 989e12, _of("h100"), 3350e9, 18, 25e9, 0, 400e9 / 8),
    Chip("h200", ("H200",), 989e12, _of("h200"), 4800e9, 18, 25e9, 0, 400e9 / 8),
    Chip("b200", ("B200",), 2250e12, _of("b200"), 8000e9, 18, 50e9, 0, 400e9 / 8),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}


def of_device(device: jax.Device) -> Chip | None:
    """None of a CPU and of an unlisted chip."""
    return next((chip for chip in _CHIPS if any(kind in device.device_kind for kind in chip.kinds)), None)


def peak_flops(device: jax.Device) -> float | None:
    """None where no peak is known."""
    chip = of_device(device)
    return chip.peak_flops if chip else None
