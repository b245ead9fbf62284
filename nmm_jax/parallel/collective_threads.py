"""On CPUs, threads enough for the collectives that wait.

XLA runs side by side what does not depend on each other, so a device may wait for others in several collectives at
once, in a thread each of one pool. That has as many as there are cores or simulated devices, and where all of them wait
the device that they wait for has none to go on: 8 devices on 2 cores, with late fusion's tower beside the embedding,
stopped for ever within 50 steps. With twice as many threads they did not.
"""

import os
import re

import jax

_OF_A_DEVICE = 8


def provide(alone: bool) -> None:
    """Has XLA start enough, if this process has simulated devices or is not alone; comes before its devices are there.

    NPROC is XLA's for the size of the pool (xla/pjrt, DefaultThreadPoolSize); one that is set already is kept.
    """
    asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = max(1, jax.config.jax_num_cpu_devices, *map(int, asked[-1:]))  # type: ignore[attr-defined]
    if devices > 1 or not alone:
        os.environ.setdefault("NPROC", str(enough(devices)))


def enough(devices: int) -> int:
    return max(os.cpu_count() or 1, _OF_A_DEVICE * devices)
