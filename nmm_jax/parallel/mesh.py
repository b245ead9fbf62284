"""The device mesh: four named axes over all devices of all processes.

replica   whole copies of the parameters; between slices, where the network is slow
fsdp      shards of the parameters and of the batch
expert    shards of the experts and of the batch
tensor    shards of heads, feed-forward width and vocabulary; its devices see the same rows
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

AXES = ("replica", "fsdp", "expert", "tensor")
BATCH_AXES = ("replica", "fsdp", "expert")


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over `devices` (all there are, unless given)."""
    c = config.mesh
    return mesh_of({"replica": c.replica, "fsdp": c.fsdp, "expert": c.expert, "tensor": c.tensor}, devices)


def mesh_of(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of these sizes; an axis that is not named has size 1, and one may be -1: the devices that are left.

    Raises:
      ValueError: the sizes do not multiply out to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    asked = {axis: sizes.get(axis, 1) for axis in AXES}
    given = math.prod(n for n in asked.values() if n != -1)
    full = tuple(len(devices) // given if n == -1 else n for n in asked.values())
    if math.prod(full) != len(devices):
        product = " * ".join(f"mesh.{axis} {n}" for axis, n in asked.items())
        raise ValueError(
            f"{product} does not multiply out to the {len(devices)} devices there are; "
            f"set one of them to -1 and the product of the others to a divisor of {len(devices)}"
        )
    return Mesh(_arrange(full, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_rows(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ValueError unless every microbatch gives each part of the mesh the same number of rows."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * config.gradient_accumulation
    if config.batch_rows % parts:
        sizes = " * ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
        raise ValueError(
            f"batch_rows = {config.batch_rows} does not divide over {sizes} * gradient_accumulation "
            f"{config.gradient_accumulation} = {parts}; make batch_rows a multiple of {parts} (the next is "
            f"{math.ceil(config.batch_rows / parts) * parts}), or the mesh smaller there"
        )


def _arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Neighbours on the mesh are neighbours on the network; slices are kept whole, one or more to a replica."""
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.replica = {sizes[0]} is no multiple of the {slices} slices; only replicas lie in different slices"
        )
    within = (sizes[0] // slices, *sizes[1:])
    between = (slices, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
