"""Rivals in processes of their own, which do something when they are told to.

Each has its own threads and its own memory, so that two libraries neither wait for each other's threads nor share a
peak; a process that is not asked takes no core. They are timed from outside, in turns (benchmarks/timing.py).
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import pathlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, Self


class Rival:
    """An object in another process, made there by make(*arguments)."""

    def __init__(self, make: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None):
        """Raises RuntimeError, with what happened there, if it could not be made."""
        context = multiprocessing.get_context("spawn")  # a fork would share what JAX has started
        self._pipe, theirs = context.Pipe()
        # No daemon: those may have no processes of their own, as a DataLoader has. It ends with its pipe, and so does
        # what would wait for it as this process ends.
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        with _environment(environment or {}):
            self._process.start()
        atexit.register(self.close)
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def __call__(self, method: str, *arguments: Any) -> Any:
        """What the object's method returns; RuntimeError, with what happened there, if it raises."""
        self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            worked, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a rival's process ended with code {self._process.exitcode}") from None
        if not worked:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        atexit.unregister(self.close)
        self._pipe.close()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    made: Any = None
    method = ""
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            try:
                if made is None:
                    made, answer = make(*arguments), None
                else:
                    answer = getattr(made, method)(*arguments)
            except Exception:
                pipe.send((False, traceback.format_exc()))
            else:
                pipe.send((True, answer))
            method, arguments = pipe.recv()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class HostMemory:
    """What this process took since this was made, at its highest: VmHWM less what was resident then."""

    def __init__(self):
        self.forget()
        self._before = _status("VmRSS")

    def forget(self) -> None:
        """The highest so far, which from now on is what is there now."""
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what a compiler has freed would hide what comes after it
        pathlib.Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return _status("VmHWM") - self._before


def _status(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
