"""Goodput: the share of a run's time that went into steps the run has kept, and where the rest of it went.

An attempt is one start of the training command; a run is all attempts in its folder. Every moment between the start of
the first attempt and the last sign of life of the last one is of exactly one kind, as the first process sees it:

    steps             steps that were done and kept. Their share is the goodput
    lost_steps        steps after the checkpoint that a later attempt went on from, at the mean duration of their
                      attempt's steps; and what was under way, short of a whole step, when an attempt was killed
    start_up          from the start of the process (not of its machine), or the end of the run that it made before:
                      imports, joining the others, mesh and model
    plans             row plans and tokenizer are made or opened
    restore           the state is read from a checkpoint, or initialised
    compile           the step is traced and compiled, or found in the compilation cache
    data_wait         the loop waited for a batch until no step was left on the devices. A wait in which they were busy
                      cost nothing and counts for `steps`; a wait in which they ran dry counts from its beginning
    checkpoint        the loop was held: by the save before, by the copy off the devices; at the end by the last save
    profiler          traces were started and written
    shutdown          after the last step
    between_attempts  from the last sign of life to the next start of the process: an outage, a queue, machines that
                      start, the few seconds before a kill that no record tells of. Time after an attempt that finished
                      all its steps is no loss and not counted at all, however much later the run is prolonged

The sum is the wall time, exactly. Nothing waits for the devices to measure this; in the loop `steps` is what is left
over, so it holds the host's own work too. Steps that the run's trunk made are the trunk's.

RUN/goodput.json has one record an attempt, and is written whole every few seconds by a thread of the first process:

    {"attempts": [{"started": 1763745600.0, "restored": 0, "step": 37, "seconds": {"start_up": 4.1, ...}, ...}]}
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging

from data_pipelines import paths

NAME = "goodput.json"
EVERY = 5.0  # seconds between writes: what a kill can take away. Some stores of objects allow one write a second
MEASURED = ("steps", "start_up", "plans", "restore", "compile", "data_wait", "checkpoint", "profiler", "shutdown")
KINDS = ("steps", "lost_steps", *MEASURED[1:], "between_attempts")
FINISHED, STOPPED = "finished", "stopped"  # all steps are done; SIGTERM

_IMPORTED, _IMPORTED_COUNT = time.time(), time.perf_counter()
_end_of_last_run = 0.0  # that this process made


def now() -> float:
    """Unix time that never jumps within a process."""
    return _IMPORTED + time.perf_counter() - _IMPORTED_COUNT


def start_of_attempt() -> float:
    """Unix time of this process's start, to 10 ms; or of the end of its last run, which counted what was before."""
    return max(process_started(), _end_of_last_run)


def process_started() -> float:
    """Unix time, to 10 ms; where there is no /proc, of this module's import."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _IMPORTED
    ticks_after_boot = int(fields[19])  # starttime: field 22 of proc(5), of which two came before the ")"
    return now() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks_after_boot / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass
class Attempt:
    """What is known of one; a killed one's record is what it last wrote."""

    started: float  # Unix time
    seconds: dict[str, float]  # of each of MEASURED
    restored: int | None = None  # the step it went on from, 0 at first; None: it had not come to that
    step: int | None = None  # the last it finished
    settled: float = 0.0  # of seconds["steps"], what passed until `step` was finished
    to_first_step: float | None = None  # seconds from its start to the end of its first step
    compile_cached: bool = False  # the step was found in the compilation cache
    ended: str = ""  # FINISHED, STOPPED, or neither: it is alive, failed, or was killed

    @property
    def seen(self) -> float:
        """Its last sign of life, in Unix time."""
        return self.started + sum(self.seconds.values())

    def lost(self, later: Sequence["Attempt"]) -> tuple[int, float]:
        """Steps that the attempts after it made again, and the seconds they had taken."""
        if not later:
            return 0, 0.0
        under_way = 0.0 if self.ended else self.seconds["steps"] - self.settled
        if self.restored is None or self.step is None or self.step <= self.restored:
            return 0, under_way
        kept = min([b.restored for b in later if b.restored is not None], default=self.step)
        lost = self.step - min(max(kept, self.restored), self.step)
        return lost, under_way + lost * self.settled / (self.step - self.restored)


@dataclasses.dataclass(frozen=True)
class Account:
    """Of a run."""

    seconds: dict[str, float]  # of each of KINDS
    attempts: list[Attempt]
    lost_steps: int

    @property
    def wall(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """0 to 1."""
        return self.seconds["steps"] / self.wall if self.wall else 0.0

    def to_json(self) -> dict[str, Any]:
        last = self.attempts[-1]
        return {
            "goodput": self.goodput,
            "wall_seconds": self.wall,
            "seconds": self.seconds,
            "attempts": len(self.attempts),
            "step": last.step,
            "lost_steps": self.lost_steps,
            "to_first_step": [a.to_first_step for a in self.attempts],
            "compile_cached": [a.compile_cached for a in self.attempts],
            "last_sign_of_life": last.seen,
            "ended": last.ended,
        }

    def table(self) -> str:
        last, attempts = self.attempts[-1], len(self.attempts)
        wall = datetime.timedelta(seconds=round(self.wall))
        cached = "the last from the cache" if last.compile_cached else ""
        remarks = {"lost_steps": f"{self.lost_steps:,} steps" if self.lost_steps else "", "compile": cached}
        lines = [f"goodput {self.goodput:.1%} of {wall} in {attempts} attempt{'s' if attempts > 1 else ''}"]
        for kind, seconds in self.seconds.items():
            share = seconds / (self.wall or 1)
            line = f"  {kind.replace('_', ' '):<18}{seconds:>12,.1f} s{share:>8.1%}  {remarks.get(kind, '')}"
            lines.append(line.rstrip())
        if last.to_first_step is not None:
            lines.append(f"  The last attempt's first step was done {last.to_first_step:,.1f} s after its start.")
        return "\n".join(lines)


def account(attempts: Sequence[Attempt]) -> Account:
    """Where the time of these attempts (one or more, in order) went."""
    seconds, lost_steps = dict.fromkeys(KINDS, 0.0), 0
    for i, attempt in enumerate(attempts):
        for kind, s in attempt.seconds.items():
            seconds[kind] += s
        steps, lost = attempt.lost(attempts[i + 1 :])
        lost_steps += steps
        seconds["steps"] -= lost
        seconds["lost_steps"] += lost
        if i + 1 < len(attempts) and attempt.ended != FINISHED:
            seconds["between_attempts"] += max(0.0, attempts[i + 1].started - attempt.seen)
    return Account(seconds, list(attempts), lost_steps)


def account_of(workdir: str | os.PathLike) -> Account:
    """Of the run in this folder, as far as it is.

    Raises:
      ValueError: there is no record, or no readable one.
    """
    attempts = read(paths.reach(workdir))
    if not attempts:
        raise ValueError(f"{workdir} holds no {NAME}; give the --workdir of train")
    return account(attempts)


def read(workdir: str | os.PathLike) -> list[Attempt]:
    """The attempts of a run; none where none was recorded.

    Raises:
      ValueError: the file is not what `Goodput` writes.
    """
    path = paths.absolute(workdir) / NAME
    try:
        return [Attempt(**record) for record in json.loads(path.read_text())["attempts"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is no record of attempts ({e}); move the file away") from e


class Goodput:
    """Measures this attempt, from the start of the process on. At every moment it is in one of MEASURED.

    Only with a folder is anything written: on the first process.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self._path = paths.absolute(folder) / NAME if folder else None
        self._earlier = read(folder) if folder else []
        self._since = now()
        # Not before the end of the attempt before: it may have been in this very process, or by a clock that is fast.
        started = max([start_of_attempt(), *(a.seen for a in self._earlier[-1:])])
        self.attempt = Attempt(min(started, self._since), dict.fromkeys(MEASURED, 0.0))
        self.attempt.seconds["start_up"] = self._since - self.attempt.started
        self._kind = "start_up"
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._write_until_the_end, daemon=True, name="goodput")
        jax.monitoring.register_event_listener(self._note)
        if folder:
            self._thread.start()

    def enter(self, kind: str) -> str:
        """From now on time is of this kind; returns the one before."""
        with self._lock:
            self._pass()
            before, self._kind = self._kind, kind
            return before

    @contextlib.contextmanager
    def within(self, kind: str) -> Iterator[None]:
        before = self.enter(kind)
        yield
        self.enter(before)

    def waited(self, seconds: float) -> None:
        """The last so many seconds, which counted for `steps`, were waiting for data with idle devices."""
        with self._lock:
            self._pass()
            self.attempt.seconds["steps"] -= seconds
            self.attempt.seconds["data_wait"] += seconds

    def restored(self, step: int) -> None:
        """The attempt goes on from this step."""
        self.attempt.restored = self.attempt.step = step

    def finished(self, step: int) -> None:
        """Of this step the metrics have been read."""
        with self._lock:
            self._pass()
            self.attempt.step, self.attempt.settled = step, self.attempt.seconds["steps"]
            if self.attempt.to_first_step is None:
                self.attempt.to_first_step = self._since - self.attempt.started

    def close(self, ended: str) -> Account:
        """Ends the record with FINISHED or STOPPED."""
        self._stop()
        self.attempt.ended = ended
        self.write()
        return account([*self._earlier, self.attempt])

    def discard(self) -> None:
        """There was nothing to do: this was no attempt."""
        self._stop()
        if self._path and self._earlier:
            self._put(self._earlier)
        elif self._path:
            self._path.unlink(missing_ok=True)

    def write(self) -> None:
        with self._lock:
            self._pass()
            attempt = dataclasses.replace(self.attempt, seconds=dict(self.attempt.seconds))
        self._put([*self._earlier, attempt])

    def _put(self, attempts: list[Attempt]) -> None:
        if self._path is None:
            return
        try:
            paths.write_text(self._path, json.dumps({"attempts": [dataclasses.asdict(a) for a in attempts]}, indent=1))
        except Exception as e:  # of any store of objects. No run ends for this
            logging.warning("%s was not written: %s: %s", self._path, type(e).__name__, e)

    def _pass(self) -> None:
        since, self._since = self._since, now()
        self.attempt.seconds[self._kind] += self._since - since

    def _note(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits" and self._kind == "compile":
            self.attempt.compile_cached = True

    def _write_until_the_end(self) -> None:
        self.write()
        while not self._ends.wait(EVERY):
            self.write()

    def _stop(self) -> None:
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join()
        global _end_of_last_run
        _end_of_last_run = now()
        jax.monitoring.unregister_event_listener(self._note)
