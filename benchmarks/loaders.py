"""What builds batches, each an object for a process of its own (rivals.py)."""

import abc
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from configs import loading

SETTLE = 2  # times the batches that are kept ready, before which a loader's speed is that of its buffer


class Loader(abc.ABC):
    """`measure` counts what comes out once the buffers are as full as they will be."""

    def __init__(self, config: str):
        self.config = loading.from_json(config)

    @abc.abstractmethod
    def begin(self, workers: int) -> tuple[Iterator[Mapping[str, Any]], Callable[[], None]]:
        """Batches from the first one on, and what ends their threads or processes."""

    def measure(self, batches: int, workers: int) -> dict[str, float]:
        """Of so many batches: seconds, those of this process's cores, rows, real positions, images."""
        iterator, close = self.begin(workers)
        for _ in range(1 + (SETTLE * max(self.config.data.prefetch, workers) if workers else 0)):
            next(iterator)
        began, cores = time.perf_counter(), time.process_time()
        taken = [next(iterator) for _ in range(batches)]
        seconds, cores = time.perf_counter() - began, time.process_time() - cores
        close()
        return {
            "seconds": seconds,
            "core_seconds": cores,
            "rows": float(batches * self.config.batch_rows),
            "positions": float(sum((np.asarray(b["segment_ids"]) > 0).sum() for b in taken)),
            "images": float(sum(np.asarray(b["image_mask"]).sum() for b in taken)),
        }


class OurLoader(Loader):
    def begin(self, workers: int) -> tuple[Iterator[Mapping[str, Any]], Callable[[], None]]:
        from data_pipelines.loader import batches
        from data_pipelines.stream import Stream

        c, stream = self.config.data, Stream.open(self.config)
        balanced = int(self.config.model.family == "late_fusion")
        rows = list(range(self.config.batch_rows))
        iterator = batches(stream, rows, len(rows), 0, workers, c.worker_kind, c.prefetch, balanced)
        return iterator, iterator.close


class TheirLoader(Loader):
    def begin(self, workers: int) -> tuple[Iterator[Mapping[str, Any]], Callable[[], None]]:
        from benchmarks.torch_loader import batches

        iterator = batches(self.config, self.config.batch_rows, workers, self.config.data.prefetch)
        return iterator, getattr(iterator, "_shutdown_workers", lambda: None)


class OurLoop:
    """The loader beside the step that it feeds, as train.py has them."""

    def __init__(self, config: str, folder: pathlib.Path):
        from benchmarks.steps import OurStep

        self._step = OurStep(config, folder)
        self._step.step()
        self._loader = OurLoader(config)

    def waits(self, steps: int) -> list[tuple[float, float]]:
        """(seconds waited for the batch, seconds of the whole step) of each."""
        iterator, close = self._loader.begin(self._loader.config.data.workers)
        self._step.step(batch=next(iterator))
        found = []
        for _ in range(steps):
            began = time.perf_counter()
            batch = next(iterator)
            waited = time.perf_counter() - began
            self._step.step(batch=batch)
            found.append((waited, time.perf_counter() - began))
        close()
        return found
