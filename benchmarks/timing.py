"""What the benchmarks share: timing in turns, and what a record says of where its numbers come from.

All ways are timed in turns, each once a round, with a pause between (threads of one library that still wait for work
take time from the next). So a machine that others use too, or that grows warm, slows all of them; what is compared are
ratios within a round. A turn is one run, or several that follow one another, as steps of training do: the first after
a pause finds caches that others have filled.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from nmm_jax.parallel.compiler_options import compile_with, of_devices

PAUSE, ONCE = 0.25, 5.0  # seconds: between turns, and beyond which one turn has to do


@dataclasses.dataclass(eq=False)
class Timed:
    """Something to run, and how long it took in each turn."""

    run: Callable[[], Any]  # once, until it is done
    seconds: list[float] = dataclasses.field(default_factory=list)  # of one run, where a turn has more the mean
    runs: int = 1  # of a turn

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compiled(function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """For this process's first device, as train compiles its steps."""
    return compile_with(jax.jit(function).lower(*arguments), of_devices(jax.devices()[:1]))


def in_turns(ways: Iterable[Timed], rounds: int) -> None:
    """Each has a turn a round, in `rounds` rounds after one that is not counted; what takes more than ONCE s, once."""
    ways, slow = list(ways), set()
    for n in range(rounds + 1):
        for way in ways:
            if way in slow:
                continue
            time.sleep(PAUSE)
            begin = time.perf_counter()
            for _ in range(way.runs):
                way.run()
            seconds = (time.perf_counter() - begin) / way.runs
            if n == 0 and seconds > ONCE:
                slow.add(way)
            if n or way in slow:
                way.seconds.append(seconds)


def ratio(way: Timed, to: Timed) -> float:
    """The median over rounds of how many times as long it took as the other; of medians, where one ran once."""
    if len(way.seconds) != len(to.seconds):
        return way.median / to.median
    return statistics.median(a / b for a, b in zip(way.seconds, to.seconds, strict=True))


def origin(packages: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, commit, date and command."""
    device = jax.devices()[0]
    return {
        "machine": {
            "device": device.device_kind,
            "devices": jax.device_count(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        },
        "versions": _versions(packages),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": shlex.join(["python", "-m", f"benchmarks.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def write(path: str, record: dict[str, Any]) -> None:
    pathlib.Path(path).write_text(json.dumps(record, indent=2) + "\n")


def _processor() -> str:
    """As Linux calls it; Python knows an architecture at best."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def _git(*arguments: str) -> str:
    here = pathlib.Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False).stdout.strip()
