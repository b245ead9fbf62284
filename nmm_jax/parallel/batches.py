"""From the rows that a process built to arrays over the whole mesh.

Batch t is rows [t * B, (t + 1) * B) of the stream, and row b of it lives on the devices whose part of the batch
axes holds b. A process builds just those; processes that share rows over `tensor` each build them.

    B = 8, fsdp 4 x tensor 2 on two processes:   process 0 builds rows 0-3, process 1 rows 4-7
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from nmm_jax.parallel.sharding import batch_sharding


def local_rows(mesh: Mesh, batch_rows: int) -> np.ndarray:
    """Positions within the global batch, sorted, that this process's devices address. int64 [rows of this process]."""
    shards = batch_sharding(mesh).addressable_devices_indices_map((batch_rows,)).values()
    return np.unique(np.concatenate([np.arange(batch_rows)[index] for index in shards]))


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_rows: int) -> dict[str, jax.Array]:
    """Global arrays [batch_rows, ...] sharded over rows, from the local rows [len(local_rows), ...] of each field."""
    sharding = batch_sharding(mesh)
    rows = local_rows(mesh, batch_rows)

    def globalise(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_rows)
            return local[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]

        return jax.make_array_from_callback((batch_rows, *local.shape[1:]), sharding, shard)

    return {name: globalise(local) for name, local in batch.items()}
