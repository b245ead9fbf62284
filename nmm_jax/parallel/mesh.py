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


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None, width: int = 0) -> Mesh:
    """The mesh of `config.mesh` over `devices` (all there are, unless given).

    An axis of -1 takes the devices that are left. Where several are -1, each takes in turn

        expert     what divides the experts and the devices of a slice; 1 in a dense model
        tensor     1
        fsdp       what divides the devices that are left in a slice, and `width`
        replica    the slices, and what is left in them

    Args:
      width: the greatest common divisor of all that `fsdp` has to divide (sharding.divisor); 0 is no limit.

    Raises:
      ValueError: the sizes do not multiply out to the number of devices, or cut a slice in two.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: config.mesh[axis] for axis in AXES}
    _check_slices(sizes, devices)
    chosen = [axis for axis, n in sizes.items() if n == -1]
    if len(chosen) > 1:
        experts = config.model.moe.experts  # fine-grained ones stay together: buffers grow with the axis
        sizes |= _choose(chosen, sizes, len(devices), _slices(devices), {"expert": experts or 1, "fsdp": width})
    return mesh_of(sizes, devices)


def _choose(
    chosen: Sequence[str], sizes: Mapping[str, int], devices: int, slices: int, divides: Mapping[str, int]
) -> dict[str, int]:
    """Sizes of several axes that are left open, as make_mesh says; they may still not multiply out."""
    given = {axis: n for axis, n in sizes.items() if n != -1}
    replica = given.get("replica", slices)
    left, rest = divmod(devices, math.prod((given | {"replica": replica}).values()))
    if rest or not left:
        product = " * ".join(f"mesh.{axis} {n}" for axis, n in given.items())
        of_slices = f" of {slices} slices" if slices > 1 else ""
        raise ValueError(
            f"{product} does not divide the {devices} devices{of_slices} that there are, whatever the other axes are; "
            "change one of these, or make it -1"
        )
    found = {"tensor": 1} if "tensor" in chosen else {}
    for axis in ("expert", "fsdp"):
        if axis in chosen:
            found[axis] = math.gcd(left, divides[axis])
            left //= found[axis]
    # What is left is the replicas'. Where they are not asked for it does not divide, and is told so elsewhere.
    last = "replica" if "replica" in chosen else chosen[0] if "fsdp" not in chosen else "fsdp"
    return found | {last: (replica if last == "replica" else found[last]) * left}


def mesh_of(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of these sizes; an axis that is not named has size 1, and one may be -1: the devices that are left.

    Raises:
      ValueError: the sizes do not multiply out to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    asked = {axis: sizes.get(axis, 1) for axis in AXES}
    _check_slices(asked, devices)
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


def is_whole_slice(fsdp: int, devices: Sequence[jax.Device]) -> bool:
    """Whether an axis of this size is all of a TPU slice, for which gathered.py has two stages."""
    return devices[0].platform == "tpu" and fsdp == len(devices) // _slices(devices) >= 4


def _arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Neighbours on the mesh are neighbours on the network; slices are kept whole, one or more to a replica."""
    slices = _slices(devices)
    replica, fsdp, *others = sizes
    stages = (fsdp // 2, 2) if is_whole_slice(fsdp, devices) and fsdp % 2 == 0 else (fsdp,)
    within = (replica // slices, *stages, *others)
    if slices == 1:
        return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True).reshape(sizes)
    between = (slices, *(1 for _ in within[1:]))
    found = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return found.reshape(sizes)


def _check_slices(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> None:
    slices = _slices(devices)
    if sizes["replica"] != -1 and sizes["replica"] % slices:
        raise ValueError(
            f"mesh.replica = {sizes['replica']} is no multiple of the {slices} slices; only replicas lie in different "
            f"slices: make it -1, or {slices} or a multiple"
        )


def _slices(devices: Sequence[jax.Device]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})
