"""Files of a run that grow line by line, in a run directory that may be in a bucket, where nothing can be appended.

There they are written to a folder on the local disk and uploaded whole: whenever `upload` is called, and from then on
in the background, so that others can watch. On a disk they are where they belong at once, and nothing else is done.
"""

import contextlib
import pathlib
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from etils import epath

from data_pipelines import paths
from nmm_jax.training.progress import say

EVERY = 30.0  # seconds between uploads in the background, at least
SHARE = 0.05  # of the time may go into them: what takes long is uploaded less often
PATIENCE = 60.0  # seconds that an upload which fails is tried again, where nothing is worse than to do without it


class Spool:
    """`folder` is on the local disk; what is written there is, or will be, in `target`."""

    def __init__(self, target: epath.Path):
        self.target = target
        self._temporary: tempfile.TemporaryDirectory | None = None
        self.folder = pathlib.Path(target)
        if paths.is_remote(target):
            self._temporary = tempfile.TemporaryDirectory(prefix="nmm_jax-spool-")
            self.folder = pathlib.Path(self._temporary.name)
        self._uploaded: dict[pathlib.Path, int] = {}  # bytes that a file had when it was uploaded last
        self._one_at_a_time = threading.Lock()  # an older copy must not arrive behind a newer one
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def file(self, name: str) -> pathlib.Path:
        """A file to go on with: as it is in `target`, if it is there."""
        if self._temporary and (self.target / name).exists():
            (self.folder / name).write_bytes((self.target / name).read_bytes())
        return self.folder / name

    def upload(self, patience: float = 0.0) -> None:
        """Returns when `target` has all that was written so far; tries again for about `patience` seconds.

        Raises:
          BucketError: it cannot be reached, or does not take it.
        """
        until, pause = time.monotonic() + patience, 1.0
        while True:
            try:
                return self._upload()
            except paths.BucketError as e:
                if time.monotonic() + pause > until:
                    raise
                say(f"{e}; trying again")
            time.sleep(pause)
            pause = min(2 * pause, 16.0)

    def _upload(self) -> None:
        if not self._temporary:
            return
        with self._one_at_a_time, paths.reaching(self.target):
            for file in sorted(self.folder.rglob("*")):
                if file.is_file() and file.stat().st_size != self._uploaded.get(file):
                    data = file.read_bytes()
                    (self.target / file.relative_to(self.folder).as_posix()).write_bytes(data)
                    self._uploaded[file] = len(data)
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._watch, name="spool", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Uploads the rest."""
        if not self._temporary or self._closed.is_set():
            return
        self._closed.set()
        if self._thread:
            self._thread.join()
        self.upload(PATIENCE)
        self._temporary.cleanup()

    def _watch(self) -> None:
        """Again and again, until `close`."""
        pause = EVERY
        while not self._closed.wait(pause):
            began = time.monotonic()
            try:
                self.upload()
            except paths.BucketError as e:
                say(f"{e}; trying again")
            pause = max(EVERY, (time.monotonic() - began) / SHARE)


class Closes(Protocol):
    def close(self) -> None: ...


@contextlib.contextmanager
def closing(grown: Closes) -> Iterator[None]:
    """contextlib.closing for what has a Spool: an exception on its way is not replaced by a last upload that fails."""
    try:
        yield
    except BaseException:
        try:
            grown.close()
        except paths.BucketError as e:
            say(str(e))
        raise
    grown.close()
