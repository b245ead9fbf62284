"""NVIDIA GPUs that are not there: devices to compile for, from what XLA has to know of a GPU.

Needs JAX's CUDA plugin (pip install jax-cuda13-plugin), no GPU, no driver and none of CUDA's libraries. XLA then has
nothing to measure its choices on (autotuning) and takes its defaults: kernels, and the temporary memory of some, may
differ from a real run's.
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Target:
    """What XLA is told of a GPU: fields of its GpuTargetConfigProto, of which the rest is the same in all of them."""

    name: str
    compute_capability: tuple[int, int]
    accelerated: bool  # has instructions of its generation alone (sm_90a)
    cores: int
    units_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int  # that a kernel may ask for
    l2_cache: int
    clock_ghz: float
    memory: int
    memory_bandwidth: int


# openxla/xla, xla/backends/gpu/target_config/specs/*.txtpb
TARGETS = {
    "a100-40gb": Target(
        "NVIDIA A100-SXM4-40GB", (8, 0), False, 108, 64, 167_936, 166_912, 40 << 20, 1.41, 42_331_013_120,
        1_555_200_000_000,
    ),
    "a100": Target(
        "NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 167_936, 166_912, 40 << 20, 1.41, 85_100_068_864,
        2_039_040_000_000,
    ),
    "h100-pcie": Target(
        "NVIDIA H100 PCIe", (9, 0), True, 114, 128, 233_472, 232_448, 50 << 20, 1.755, 84_942_979_072,
        2_039_040_000_000,
    ),
    "h100": Target(
        "NVIDIA H100 80GB HBM3", (9, 0), True, 132, 128, 233_472, 232_448, 50 << 20, 1.98, 84_942_979_072,
        3_352_320_000_000,
    ),
    "h200": Target(
        "NVIDIA H200", (9, 0), True, 132, 128, 233_472, 232_448, 50 << 20, 1.98, 151_397_597_184, 4_800_000_000_000,
    ),
    "b200": Target(
        "NVIDIA B200", (10, 0), True, 148, 128, 233_472, 232_448, 132_644_864, 1.965, 191_514_411_008,
        7_672_320_000_000,
    ),
}  # fmt: skip


def gpu_devices(generation: str, nodes: int, per_node: int) -> Sequence[jax.Device]:
    """Compile-only devices of `nodes` machines with `per_node` GPUs each; a device's process_index is its machine.

    Raises:
      ValueError: the generation is none of TARGETS.
      RuntimeError: JAX's CUDA plugin is not installed.
    """
    if generation not in TARGETS:
        raise ValueError(f"{generation!r} is no GPU that is known; one of {', '.join(TARGETS)}")
    if not has_plugin():
        raise RuntimeError(
            f"compiling for {generation} needs JAX's CUDA plugin, which needs no GPU: "
            f"pip install jax-cuda13-plugin=={jax.__version__}"
        )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # CUDA's libraries, which only running needs
    return topologies.get_topology_desc(
        topology_name=f"{generation}:{nodes}x{per_node}",
        platform="cuda",
        target_config=target_config(TARGETS[generation]),
        topology=f"1x{nodes}x{per_node}",
    ).devices


def lowering() -> AbstractContextManager[Any]:
    """Within it, kernels that ask whether there is a GPU (tokamax's, of experts) are lowered without one."""
    if importlib.util.find_spec("tokamax") is None:
        return contextlib.nullcontext()
    import tokamax

    return tokamax.config.cross_compile(True)


def has_plugin() -> bool:
    found = importlib.util.find_spec("jax_plugins")
    return found is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") is not None for version in (13, 12)
    )


def target_config(target: Target) -> str:
    """The text of XLA's GpuTargetConfigProto."""
    major, minor = target.compute_capability
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: {target.shared_memory_per_core}
          threads_per_core_limit: 2048
          core_count: {target.cores}
          fpus_per_core: {target.units_per_core}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {target.memory_bandwidth}
          l2_cache_size: {target.l2_cache}
          clock_rate_ghz: {target.clock_ghz}
          device_memory_size: {target.memory}
          shared_memory_per_block_optin: {target.shared_memory_per_block}
          cuda_compute_capability {{
            major: {major}
            minor: {minor}
            feature_extension: {"ACCELERATED_FEATURES" if target.accelerated else "NONE"}
          }}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
        device_description_str: "{target.name}"
        """
