"""One process of a machine at a time."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def locked(file: pathlib.Path) -> Iterator[None]:
    """Waits until no other process holds `file`, which is made if it is not there, and holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a process that dies
        yield
