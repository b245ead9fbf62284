"""Where each array lives: the logical names of its axes, mapped to the axes of the mesh."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nmm_jax.parallel.mesh import BATCH_AXES

# Logical axis -> mesh axes. Parameters: a matrix is cut over `fsdp` along the model's width and over `tensor` along
# its other side (Megatron), so a layer's parameters are gathered over fsdp and its activations summed over tensor.
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "router": None,
    "patch": None,
    # activations
    "batch": BATCH_AXES,
    "sequence": None,
    "embed_act": None,
    "heads_act": "tensor",
    "mlp_act": "tensor",
}

# What a user changes when an axis does not divide: of the decoder, and of what else there is, by how names begin.
_KEYS = {
    "vocab": "model.vocab_size",
    "embed": "model.width",
    "heads": "model.heads",
    "kv_heads": "model.kv_heads",
    "mlp": "model.ffn_width",
    "expert": "model.moe.experts",
}
_TOWER = {
    "embed": "model.vision.width",
    "heads": "model.vision.heads",
    "kv_heads": "model.vision.heads",
    "mlp": "model.vision.ffn_width",
}
_KEYS_OF: dict[str, dict[str, str]] = {
    "vision/": _TOWER,
    "pooling/": _TOWER,
    "connector/": {
        "embed": "model.vision.width, model.connector.width, model.width",
        "heads": "model.connector.heads",
        "kv_heads": "model.connector.heads",
        "mlp": "model.connector.width",
    },
    "contrastive/image": _TOWER,
    "projection": {"mlp": "model.vision.width"},
    "pixel_head/inputs": {"embed": "model.aim.head_width", "mlp": "model.vision.width"},
    "pixel_head/": {"embed": "model.aim.head_width", "mlp": "model.aim.head_width"},
}

Axes = tuple[str | None, ...]


def spec(axes: Axes) -> PartitionSpec:
    """("embed", "mlp") -> P("fsdp", "tensor").

    Raises:
      ValueError: a name has no rule.
    """
    unknown = [a for a in axes if a not in RULES]
    if unknown:
        raise ValueError(f"logical axes {axes}: {unknown} have no rule in nmm_jax/parallel/sharding.py")
    return PartitionSpec(*(RULES[a] for a in axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes of the mesh; everything else whole."""
    return NamedSharding(mesh, spec(("batch",)))


def param_shardings(abstract: Any, logical_axes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter.

    Args:
      abstract: pytree of ShapeDtypeStruct (`model.abstract`).
      logical_axes: the same tree with a tuple of names for each (`model.logical_axes`).

    Raises:
      ValueError: a dimension does not divide over its mesh axis; names the parameter, the config key and the axis.
    """

    def one(path: tuple[Any, ...], array: jax.ShapeDtypeStruct, axes: Axes) -> NamedSharding:
        for size, name in zip(array.shape, axes, strict=True):
            axis = RULES.get(name)
            if isinstance(axis, str) and size % mesh.shape[axis]:
                parameter = jax.tree_util.keystr(path, simple=True, separator="/")
                own = next((keys for start, keys in _KEYS_OF.items() if parameter.startswith(start)), {})
                key = (_KEYS | own).get(str(name), str(name))
                raise ValueError(
                    f"parameter {parameter} {array.shape}: its axis {name!r} of size {size} does not divide over "
                    f"mesh.{axis} = {mesh.shape[axis]}; change {key} or mesh.{axis}"
                )
        return NamedSharding(mesh, spec(axes))

    return jax.tree_util.tree_map_with_path(one, abstract, logical_axes)


def divisor(abstract: Any, logical_axes: Any, mesh_axis: str = "fsdp") -> int:
    """The greatest common divisor of all sizes of parameters that this axis of the mesh has to divide."""
    sizes = jax.tree.map(
        lambda x, axes: math.gcd(*(n for n, a in zip(x.shape, axes, strict=True) if RULES[a] == mesh_axis)),
        abstract,
        logical_axes,
    )
    return math.gcd(*jax.tree.leaves(sizes))


@dataclasses.dataclass(frozen=True)
class Constrain:
    """`constrain(x, ("batch", "sequence", "embed_act"))`: what a model calls on its activations.

    Without a mesh, a model on one device, it leaves them as they are.
    """

    mesh: Mesh | None = None

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec(axes)))

    @property
    def platform(self) -> str:
        """Of the devices that will run it: not this machine's where a program is compiled ahead of time."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform


ON_ONE_DEVICE = Constrain()
