"""A step's weights as its devices have them, by their shapes and shardings."""

import math
import re
from typing import Any

import jax
from flax.traverse_util import flatten_dict


def by_name(params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """{"layers/ffn/up": ...}"""
    return flatten_dict(params, sep="/")


def layer_of(name: str) -> str:
    """vision/layers/block_0/ffn/up -> vision/layers/block_0/; "" of what is in no stack of layers.

    Those in a stack have a first axis of layers, which is never cut.
    """
    found = re.match(r"(?:.*/)?layers/(?:block_\d+/)?", name)
    return found.group() if found else ""


def gathered_shape(weight: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Of a device's part once it is whole over fsdp: the other axes of the mesh still cut it."""
    sizes = weight.sharding.mesh.shape
    return tuple(
        n // math.prod(sizes[axis] for axis in _axes(weight, i) if axis != "fsdp") for i, n in enumerate(weight.shape)
    )


def is_cut_over_fsdp(weight: jax.ShapeDtypeStruct) -> bool:
    return any("fsdp" in _axes(weight, i) for i in range(weight.ndim)) and weight.sharding.mesh.shape["fsdp"] > 1


def _axes(weight: jax.ShapeDtypeStruct, dimension: int) -> tuple[str, ...]:
    """The mesh axes that cut a dimension."""
    spec = weight.sharding.spec
    part = spec[dimension] if dimension < len(spec) else None
    return (part,) if isinstance(part, str) else part or ()
