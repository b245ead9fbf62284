"""Accelerators by name, whether they are there or not: `v5p:4x4x8`, two slices of `v6e:16x16`, `h100:8x8`.

TPUs are named by the shape of a slice in chips, as GKE and JAX do (Cloud TPU's own names, such as v5p-256, count cores
or chips by generation); GPUs by nodes and GPUs in each. Devices that are not there can be compiled for: libtpu does it
on any machine, and so does JAX's CUDA plugin.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Self

import jax
from jax.experimental import topologies

from nmm_jax.parallel.chips import CHIPS, Chip
from nmm_jax.parallel.gpu_targets import gpu_devices

# What libtpu has to be told besides: v4's two cores work as one device on real slices.
_CONFIGURATION = {"v4": {"chip_config_name": "megacore"}}

# libtpu reads these once, when it is loaded: it is one process on one host, or it complains on stderr that it finds no
# others; it asks no TPU for its metadata; and other processes may compile at the same time.
_ENVIRONMENT = {
    "TPU_PROCESS_BOUNDS": "1,1,1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class TopologyError(ValueError):
    """No accelerators are known, or can be compiled for here, by this name."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one shape, or nodes of GPUs."""

    chip: Chip
    shape: tuple[int, ...]  # of a slice, in chips; of GPUs (nodes, GPUs in a node)
    slices: int = 1

    @classmethod
    def parse(cls, name: str, slices: int = 1) -> Self:
        """Of a name such as v5p:4x4x8.

        Raises:
          TopologyError: it is none.
        """
        found = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+){1,2})", name)
        if not found or found[1] not in CHIPS:
            raise TopologyError(
                f"{name!r} names no topology; expected GENERATION:SHAPE such as v5p:4x4x8, v5e:16x16 or h100:8x8 "
                f"(nodes x GPUs), where GENERATION is one of {', '.join(CHIPS)}"
            )
        topology = cls(CHIPS[found[1]], tuple(int(n) for n in found[2].split("x")), slices)
        if topology.is_tpu and len(topology.shape) != topology.chip.torus_dims:
            dims = topology.chip.torus_dims
            example = "x".join(["4"] * dims)
            raise TopologyError(f"{name!r}: slices of {found[1]} have {dims} dimensions, as {found[1]}:{example}")
        if slices > 1 and not topology.is_tpu:
            raise TopologyError(f"{name!r}: only TPUs come in slices; nodes are the first number, as {found[1]}:16x8")
        return topology

    @property
    def is_tpu(self) -> bool:
        return self.chip.torus_dims > 0

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def device_count(self) -> int:
        return self.slices * math.prod(self.shape) * self.chip.devices_per_chip

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    def devices(self) -> Sequence[jax.Device]:
        """Devices to compile for; none of them has to be there.

        Raises:
          TopologyError: the compiler for them is not installed, or knows no such slice.
        """
        if not self.is_tpu:
            try:
                return gpu_devices(self.chip.name, *self.shape)
            except RuntimeError as e:
                raise TopologyError(str(e)) from e
        if importlib.util.find_spec("libtpu") is None:
            raise TopologyError(f"compiling for {self} needs libtpu, which needs no TPU: pip install 'jax[tpu]'")
        os.environ |= _ENVIRONMENT
        try:
            return topologies.get_topology_desc(
                platform="tpu",
                topology_name=self.name,
                num_slices=self.slices,
                **_CONFIGURATION.get(self.chip.name, {}),
            ).devices
        except Exception as e:
            raise TopologyError(f"libtpu knows no {self}: {str(e).splitlines()[0]}") from e
