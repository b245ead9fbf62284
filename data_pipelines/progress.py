"""How far a conversion is, over all its processes."""

import contextlib
import io
import os
import threading
from collections.abc import Iterator

import tqdm


class Progress:
    """Counters that the processes share; the bar shows them."""

    def __init__(self, context):
        self.bytes = context.Value("q", 0)
        self.documents = context.Value("q", 0)
        self.rejected = context.Value("q", 0)

    @staticmethod
    def add(counter, n: int) -> None:
        with counter.get_lock():
            counter.value += n

    @contextlib.contextmanager
    def shown(self, total: int) -> Iterator[None]:
        """A bar over the bytes of the input, with rate and ETA, while the block runs."""
        done = threading.Event()
        with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="converting", mininterval=0.5) as bar:

            def refresh():
                seconds = bar.format_dict["elapsed"] or 1e-9
                rate = self.documents.value / seconds
                bar.set_postfix_str(
                    f"{self.documents.value:,} documents ({rate:,.0f}/s), {self.rejected.value:,} rejected",
                    refresh=False,
                )
                bar.update(self.bytes.value - bar.n)

            def watch():
                while not done.wait(0.5):
                    refresh()

            thread = threading.Thread(target=watch, daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
                refresh()


class CountedFile(io.FileIO):
    """A file that tells how far it has been read. No read counts beyond the file's size (parquet reads some twice)."""

    def __init__(self, path: str, counter):
        super().__init__(path)
        self._counter = counter
        self._left = os.fstat(self.fileno()).st_size

    def _count(self, n: int) -> None:
        n = min(n, self._left)
        self._left -= n
        Progress.add(self._counter, n)

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._count(len(data))
        return data

    def readinto(self, buffer) -> int:
        n = super().readinto(buffer)
        self._count(n)
        return n

    def close(self) -> None:
        if not self.closed:
            self._count(self._left)
        super().close()
