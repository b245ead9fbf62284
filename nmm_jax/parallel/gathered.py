"""Fully sharded data parallelism by hand: weights are gathered where they are used, gradients leave reduce-scattered.

    device    0        1                          0           1
    rows      x0       x1        gathered ->      x0 @ w      x1 @ w        and backwards, of dw = x0'dy0 + x1'dy1,
    weight    w[:D/2]  w[D/2:]                                              each device is left its own half

Left to itself the compiler makes all-reduces of whole weights and whole gradients of it in several cases: the token
embeddings', always; small shards'; and (libtpu 0.0.42 and 0.0.48) any reduce-scatter over all devices of a slice, any
all-gather over all of a three-dimensional one. Here the gather is told, along an axis of its own, and where `fsdp` is
the whole slice in two stages, of pairs of neighbours and then of every second device:

    shards  0 | 1 | 2 | 3   ->   01 | 01 | 23 | 23   ->   0123 on devices 0 and 2, and on 1 and 3
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nmm_jax.parallel.mesh import BATCH_AXES, is_whole_slice
from nmm_jax.parallel.sharding import Axes, Constrain, spec

# Of a whole weight: its name, and what is done to its shard until it is one.
GATHERED = "gathered_weight"
_MOVES = ("all_gather", "reshape", "transpose", "slice", "squeeze", "pad", "broadcast_in_dim", "convert_element_type")

TILE = (128, 16)  # columns and rows that TPUs keep bfloat16 in; of float32 8 rows

Weights = Mapping[str, jax.Array]
Compute = Callable[[Any, Weights, Constrain], Any]  # (rows, weights, constrain) -> rows


def with_gathered(
    compute: Compute,
    rows: Any,
    weights: Weights,
    axes: Mapping[str, Axes],
    constrain: Constrain,
    rows_axes: Axes = ("batch",),
    result_axes: Axes | None = ("batch",),
) -> Any:
    """compute(rows, weights, constrain) on every device for the rows it has, with weights that are whole over `fsdp`.

    Args:
      compute: of rows [b, ...], a device's own, and its part of the weights over `tensor`. Its `constrain` is for what
        is inside.
      rows: a pytree of arrays [B, ...] with these logical axes first.
      axes: the logical axes of each weight.
      result_axes: the first ones of each result; None: a result is this part of the weights' share of a sum.
    """
    mesh = constrain.mesh
    if mesh is None or not by_hand(mesh, jax.tree.leaves(rows)[0].shape[0]):
        return compute(rows, weights, constrain)
    shares = result_axes is None and mesh.shape["tensor"] > 1

    def body(rows: Any, shards: Weights) -> Any:
        found = compute(rows, {n: gather(w, axes[n], mesh) for n, w in shards.items()}, Constrain())
        return jax.tree.map(lambda y: y[None], found) if shares else found

    found = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(spec(rows_axes), {name: spec(axes[name]) for name in weights}),
        out_specs=PartitionSpec("tensor", BATCH_AXES) if shares else spec(result_axes or ("batch",)),
        check_vma=False,
    )(rows, dict(weights))
    if not shares:
        return found
    # Without a word the compiler lays out what layers keep otherwise, and gathers it.
    by_rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return jax.tree.map(lambda y: jax.lax.with_sharding_constraint(sum_of_shares(y), by_rows), found)


def by_hand(mesh: Mesh, rows: int) -> bool:
    """Whether there is something to gather. (Rows that do not divide, as a few prompts, the compiler lays out.)"""
    return mesh.shape["fsdp"] > 1 and rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0


def sum_of_shares(y: jax.Array) -> jax.Array:
    """[T, ...], cut over `tensor` along its first axis, to its sum, which goes over the network in y's own type.

    Outside of shard_map and not by a psum within: the gradient is then known to be a broadcast.
    """
    return jax.lax.reduce(y, jnp.zeros((), y.dtype), jax.lax.add, (0,))


def gather(shard: jax.Array, axes: Axes, mesh: Mesh) -> jax.Array:
    """The whole over `fsdp` of a weight with these logical axes; inside shard_map. Its gradient is scattered."""
    if mesh.shape["fsdp"] == 1 or "embed" not in axes:
        return shard
    return checkpoint_name(_gather(shard, axes, mesh), GATHERED)


def scatter(whole: jax.Array, axes: Axes, mesh: Mesh) -> jax.Array:
    """The sum over `fsdp` of what devices have of a gradient, each device its part."""
    shape = (n // mesh.shape["fsdp"] if a == "embed" else n for n, a in zip(whole.shape, axes, strict=True))
    shard = jax.ShapeDtypeStruct(tuple(shape), whole.dtype)
    return jax.linear_transpose(lambda w: _gather(w, axes, mesh), shard)(whole)[0]


def is_kept(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """A policy of jax.checkpoint: all values but whole weights, of which a scan would keep a copy for every layer.

    (jax.checkpoint_policies.save_anything_except_these_names saves them all the same, in JAX 0.10.2.)
    """
    return primitive.name not in _MOVES and parameters.get("name") != GATHERED


def _gather(shard: jax.Array, axes: Axes, mesh: Mesh) -> jax.Array:
    dimension, n = axes.index("embed"), mesh.shape["fsdp"]
    before, cut, after = shard.shape[:dimension], shard.shape[dimension], shard.shape[dimension + 1 :]
    rows, columns = (math.prod(before) * cut, math.prod(after)) if after else (math.prod(before), cut)
    # As a matrix: of arrays of more axes (heads, experts) the compiler makes all-reduces again, by their layouts.
    if rows % TILE[1] or columns % TILE[0]:  # And of float32 shards that fill no tiles; as a list of whole ones.
        parts = jnp.pad(shard.reshape(-1), (0, -shard.size % TILE[0])).reshape(1, -1, TILE[0])
    else:
        parts = shard.reshape(1, rows, columns)
    for groups in _stages(mesh):
        parts = jax.lax.all_gather(parts, "fsdp", axis=0, axis_index_groups=groups, tiled=True)
    parts = parts.reshape(n, -1)[:, : shard.size].reshape(n, math.prod(before), cut, math.prod(after))
    return jnp.moveaxis(parts, 0, 1).reshape(*before, -1, *after)


def _stages(mesh: Mesh) -> list[list[list[int]] | None]:
    """Groups of indices along `fsdp` that gather one after another; None is all of them."""
    n = mesh.shape["fsdp"]
    if not is_whole_slice(n, list(mesh.devices.flat)):
        return [None]
    return [[[i, i + 1] for i in range(0, n, 2)], [list(range(i, n, 2)) for i in range(2)]]
