"""Evaluation in batches of one fixed size, so that each function compiles once, spread over the mesh."""

import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from nmm_jax.parallel.batches import local_rows, to_global
from nmm_jax.parallel.mesh import BATCH_AXES


def size_on(mesh: Mesh, rows: int) -> int:
    """`rows`, rounded up so that every device gets as many."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return math.ceil(rows / shards) * shards


def fixed_batches(count: int, size: int, title: str = "") -> Iterator[tuple[np.ndarray, int]]:
    """(indices [size], n of them real) until all of range(count) were there; the last batch is filled up with its last.

    With a title, process 0 shows progress on the terminal.
    """
    starts = range(0, count, size)
    for start in tqdm(starts, title, unit="batch", leave=False, disable=not title or jax.process_index() > 0):
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch that every process holds in full, as global arrays sharded over rows."""
    size = len(next(iter(batch.values())))
    mine = local_rows(mesh, size)
    return to_global({name: array[mine] for name, array in batch.items()}, mesh, size)
