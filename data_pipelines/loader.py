"""Batches of the stream, built ahead by threads or by worker processes.

Grain carries them: a random-access dataset whose element t is this process's part of batch t, behind its threads or
its worker processes. Every element is a pure function of t, so neither their number nor their kind changes a byte.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence

import grain
import numpy as np
from absl import flags

from data_pipelines.balance import arrange
from data_pipelines.rows import Batch
from data_pipelines.stream import Stream

_ENDLESS = 1 << 60  # batches


class LocalBatches(grain.MapDataset):
    """Element t is what stands at the places `local_rows` of batch t."""

    def __init__(self, stream: Stream, local_rows: Sequence[int], batch_rows: int, balanced_over: int = 0):
        """balanced_over: microbatches that a batch is cut in, to arrange its rows by their images (balance.arrange);
        0 leaves them as they come."""
        super().__init__()
        if any(not 0 <= row < batch_rows for row in local_rows):
            raise ValueError(f"rows {list(local_rows)} of a batch of {batch_rows} (batch_rows) were asked for")
        self._stream = stream
        self._rows = tuple(local_rows)
        self._batch_rows = batch_rows
        self._balanced_over = balanced_over

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step):
        if isinstance(step, slice):
            return self.slice(step)
        rows = range(step * self._batch_rows, (step + 1) * self._batch_rows)
        if self._balanced_over:
            order = arrange(np.array([self._stream.images(g) for g in rows]), self._balanced_over)
            return self._stream.batch([rows[order[place]] for place in self._rows])
        return self._stream.batch([rows[place] for place in self._rows])


def batches(
    stream: Stream,
    local_rows: Sequence[int],
    batch_rows: int,
    start_step: int = 0,
    workers: int = 0,
    kind: str = "threads",
    prefetch: int = 4,
    balanced_over: int = 0,
) -> grain.DatasetIterator[Batch]:
    """This process's part of batch start_step, start_step + 1, ...; arrays are [len(local_rows), ...].

    Args:
      local_rows: which rows of the global batch, in 0 ... batch_rows - 1, this process feeds.
      workers: threads or processes that build batches ahead; 0 builds in `next`.
      kind: threads | processes. Threads start at once, and decoding, resizing and tokenising release the GIL; processes
        take seconds to start (each imports Grain and with it JAX) and copy every batch through shared memory.
      prefetch: batches kept ready.
      balanced_over: as of LocalBatches.

    Call `close()` on the iterator when done with it, or use contextlib.closing.
    """
    if kind not in ("threads", "processes"):
        raise ValueError(f"data.worker_kind = {kind!r}; expected threads or processes")
    source = LocalBatches(stream, local_rows, batch_rows, balanced_over)[start_step:]
    if kind == "threads" or not workers:
        ahead = max(prefetch, workers) if workers else 0
        return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)))
    if not flags.FLAGS.is_parsed():  # Grain hands its flags to the workers
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=math.ceil(prefetch / workers))
    in_worker = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(source.to_iter_dataset(in_worker).mp_prefetch(options, _end_with_parent))


def _end_with_parent(*_: int) -> None:
    """In a worker process: it ends when its parent does, and not before.

    Whoever wants the machines back sends SIGTERM to every process there is, and the parent goes on until it has saved.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow the parent", daemon=True).start()
