"""From the rows that a process built to arrays over the whole mesh.

Batch t is rows [t * B, (t + 1) * B) of the stream, and row b of it lives on the devices whose part of the batch
axes holds b. A process builds just those; processes that share rows over `tensor` each build them.

    B = 8, fsdp 4 x tensor 2 on two processes:   process 0 builds rows 0-3, process 1 rows 4-7
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.geometry import Geometry
from data_pipelines.rows import batch_spec
from nmm_jax.parallel.sharding import batch_sharding


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, types and shardings of the global arrays of a batch."""
    sharding = batch_sharding(mesh)
    spec = batch_spec(Geometry.from_config(config), config.batch_rows)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in spec.items()}


def local_rows(mesh: Mesh, batch_rows: int) -> np.ndarray:
    """Positions within the global batch, sorted, that this process's devices address. int64 [rows of this process]."""
    return np.unique(np.concatenate([np.arange(batch_rows)[part] for part in _shards(mesh, batch_rows).values()]))


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_rows: int) -> dict[str, jax.Array]:
    """Global arrays [batch_rows, ...] sharded over rows, from the local rows [len(local_rows), ...] of each field."""
    sharding = batch_sharding(mesh)
    rows = local_rows(mesh, batch_rows)
    ranges = {device: part.indices(batch_rows) for device, part in _shards(mesh, batch_rows).items()}
    places = [slice(*np.searchsorted(rows, (start, stop))) for start, stop, _ in ranges.values()]

    def globalise(local: np.ndarray) -> jax.Array:
        # device_put is an explicit transfer: jax.make_array_from_callback is not, and transfer guards refuse it.
        shards = jax.device_put([local[place] for place in places], list(ranges))
        return jax.make_array_from_single_device_arrays((batch_rows, *local.shape[1:]), sharding, shards)

    return {name: globalise(local) for name, local in batch.items()}


def _shards(mesh: Mesh, batch_rows: int) -> dict[jax.Device, slice]:
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_rows,))
    return {device: index[0] for device, index in indices.items() if index is not None}
