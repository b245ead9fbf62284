"""Jobs, each a few commands in processes of their own: one job after another, or several side by side."""

import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import os
import queue
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from etils import epath

from configs.validation import ConfigError
from nmm_jax.training.progress import say
from nmm_jax.training.spool import Spool, closing


@dataclasses.dataclass(frozen=True)
class Job:
    """What is made of it.

    Attributes:
      folder: gets log.txt, what its commands say; it is made if it is not there.
      commands: as one would type them, from `python` on; the first that fails is the last.
      finished: whether there is nothing to do, asked when its turn has come.
    """

    name: str
    folder: epath.Path
    commands: Sequence[Sequence[str]]
    finished: Callable[[], bool]


def select(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The runs that a pattern names, in their own order.

    Raises:
      ConfigError: a pattern that names none.
    """
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"--runs: no run is called {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


class Runner:
    """Makes jobs. A job that fails stops no other; SIGTERM and SIGINT stop all, those that run and those that wait."""

    def __init__(self, side_by_side: int = 1):
        """side_by_side: jobs at a time, each on its share of the cores."""
        self._shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        self._jobs = side_by_side
        for share in shares(_cores(), side_by_side):
            self._shares.put(share)
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """Makes what is not finished; returns the names of those that failed."""
        before = signal.signal(signal.SIGTERM, self._stop)
        try:
            with concurrent.futures.ThreadPoolExecutor(self._jobs) as pool:
                try:
                    made = list(pool.map(lambda n: self._make(jobs[n], f"{n + 1}/{len(jobs)}"), range(len(jobs))))
                except BaseException:
                    self._stop()
                    raise
        finally:
            signal.signal(signal.SIGTERM, before)
        if self._stopped:
            sys.exit(128 + signal.SIGTERM)
        return [job.name for job, well in zip(jobs, made, strict=True) if not well]

    def _make(self, job: Job, number: str) -> bool:
        if self._stopped:
            return False
        if job.finished():
            say(f"{number} {job.name}: finished before")
            return True
        share, began = self._shares.get(), time.perf_counter()
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            for command in job.commands:
                say(f"{number} {shlex.join(command)}")
                code = self._call(command, job.folder, share)
                if code:
                    say(f"{job.name} failed (exit code {code}); its last words are in {job.folder / 'log.txt'}")
                    return False
        finally:
            self._shares.put(share)
        say(f"{job.name}: {time.perf_counter() - began:.0f} s")
        return True

    def _call(self, command: Sequence[str], folder: epath.Path, share: set[int]) -> int:
        spool = Spool(folder)
        with closing(spool), spool.file("log.txt").open("a") as log:
            process = subprocess.Popen([sys.executable, *command[1:]], stdout=log, stderr=subprocess.STDOUT)
            if share:
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.sched_setaffinity(process.pid, share)  # before it has threads, which inherit it
            self._running.add(process)
            if self._stopped:
                process.terminate()
            code = process.wait()
            self._running.discard(process)
        return code

    def _stop(self, *_: object) -> None:
        self._stopped = True
        for process in tuple(self._running):
            process.terminate()


def shares(cores: Sequence[int], jobs: int) -> list[set[int]]:
    """Of the cores, so that jobs do not take them from each other; an empty one is all of them.

    4 cores and 2 jobs: {0, 1}, {2, 3}. More jobs than cores, and one job, have all.
    """
    if jobs == 1 or jobs > len(cores):
        return [set()] * jobs
    bounds = [n * len(cores) // jobs for n in range(jobs + 1)]
    return [set(cores[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
