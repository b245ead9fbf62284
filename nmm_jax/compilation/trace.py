"""What the devices did in a profiler's trace, by part of the model and pass: of train's own window of `profile.steps`.

    trace       %fusion.7 ran from 1.203 to 1.311 ms          (jax.profiler; one event a run of an instruction)
    program     %fusion.7 is jit(step)/transpose(jvp())/closed_call/checkpoint/ffn/mul           (the compiled text)
    ->          ffn, backward, 0.108 ms

The parts are the model's own jax.named_scope. An instruction that others run inside, such as a loop, has the time that
they leave. A fusion counts for the instruction that it is named after.
"""

import collections
import dataclasses
import pathlib
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from nmm_jax.compilation.program import Instruction, Program

SCOPES = (
    "embedding", "vision", "connector", "attention", "attend", "norm", "ffn", "router", "experts", "loss", "optimizer",
)  # fmt: skip
PASSES = ("forward", "recomputed", "backward", "update", "other")
COLLECTIVES = re.compile(r"(ragged-)?all-|reduce-scatter|collective-")

_NAME = re.compile(r"%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Event:
    """A run of an instruction on a device. Nanoseconds."""

    device: str
    line: str  # a core, a stream or a thread: what is on one is nested or one after the other
    name: str
    start: float
    stop: float


@dataclasses.dataclass(frozen=True)
class Share:
    part: str
    passed: str  # one of PASSES
    seconds: float  # of a step and a device


@dataclasses.dataclass(frozen=True)
class Profile:
    """Means of a step and a device."""

    steps: int
    devices: int
    seconds: float  # from its beginning to the next one's
    idle: float  # of them no instruction ran
    shares: tuple[Share, ...]  # in order of time; on CPU instructions run side by side, and sum to more than a step
    instructions: tuple[tuple[str, str, str, float], ...]  # (name, part, source, seconds)

    @property
    def busy(self) -> float:
        """Seconds of instructions, those that run side by side each with its own."""
        return sum(share.seconds for share in self.shares)

    def by_part(self) -> dict[str, dict[str, float]]:
        """Seconds by part and pass, the longest part first."""
        found: dict[str, dict[str, float]] = {}
        for share in self.shares:
            passes = found.setdefault(share.part, {})
            passes[share.passed] = passes.get(share.passed, 0.0) + share.seconds
        return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"busy": self.busy, "by_part": self.by_part()}


def part_of(source: str) -> str:
    """The scopes that an instruction's op_name goes through, as in attention/attend; "other" outside of all."""
    found = [scope for scope in re.findall(r"\w+", source) if scope in SCOPES]
    unique = [scope for i, scope in enumerate(found) if scope not in found[:i]]
    return "/".join(unique) or "other"


def pass_of(source: str) -> str:
    """Which pass an op_name is of; `recomputed` is what rematerialisation runs again for the backward pass."""
    if "optimizer" in re.findall(r"\w+", source):
        return "update"
    if "rematted_computation" in source:
        return "recomputed"
    if "transpose(" in source:
        return "backward"
    return "forward" if "jvp(" in source else "other"


def newest_trace(folder: pathlib.Path) -> pathlib.Path:
    """The trace of the last window that was written below a folder.

    Raises:
      FileNotFoundError: there is none.
    """
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"{folder} has no trace: train with --config.profile.start=STEP --config.profile.steps=5, some steps after "
            "the first"
        )
    return found[-1]


def events_of(trace: pathlib.Path, names: Iterable[str]) -> list[Event]:
    """The runs of the instructions with these names, on all devices; the host's own threads stand for a CPU."""
    data = jax.profiler.ProfileData.from_file(str(trace))
    planes = list(data.planes)
    chosen = [p for p in planes if p.name.startswith("/device:")] or [p for p in planes if p.name == "/host:CPU"]
    known, found = set(names), []
    for plane in chosen:
        for number, line in enumerate(plane.lines):
            for event in line.events:
                stats = {key: value for key, value in event.stats if key in ("hlo_op", "device_ordinal")}
                name = _NAME.match(str(stats.get("hlo_op", event.name)))
                if name and name.group(1) in known and event.duration_ns:
                    device = f"{plane.name} {stats.get('device_ordinal', '')}"
                    start = event.start_ns
                    found.append(Event(device, str(number), name.group(1), start, start + event.duration_ns))
    return found


def own_times(events: Sequence[Event]) -> Iterator[tuple[Event, float]]:
    """Each event's nanoseconds without those of the events inside it."""
    lines: dict[tuple[str, str], list[Event]] = collections.defaultdict(list)
    for event in events:
        lines[event.device, event.line].append(event)
    for line in lines.values():
        open_events: list[list[Any]] = []  # [event, its own time so far], outermost first
        for event in sorted(line, key=lambda e: (e.start, -e.stop)):
            while open_events and open_events[-1][0].stop <= event.start:
                yield tuple(open_events.pop())  # type: ignore[misc]
            if open_events:
                open_events[-1][1] -= min(event.stop, open_events[-1][0].stop) - event.start
            open_events.append([event, event.stop - event.start])
        yield from (tuple(left) for left in reversed(open_events))  # type: ignore[misc]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profile_of(events: Sequence[Event], program: Program) -> Profile:
    """Raises ValueError where no instruction of the program is in the trace, or its steps cannot be told apart."""
    instructions = {i.name: i for inside in program.computations.values() for i in inside.values()}
    if not events:
        raise ValueError("no instruction of the compiled step is in the trace: is it of another program?")
    devices = {e.device for e in events}
    steps = _steps(events, program)
    shares: dict[tuple[str, str], float] = collections.defaultdict(float)
    single: dict[str, float] = collections.defaultdict(float)
    scale = 1e-9 / (steps * len(devices))
    for event, own in own_times(events):
        shares[_kind(instructions[event.name])] += own
        single[event.name] += own
    length = busy = 0.0
    for device in devices:
        spans = [(e.start, e.stop) for e in events if e.device == device]
        length += max(stop for _, stop in spans) - min(start for start, _ in spans)
        busy += covered(spans)
    return Profile(
        steps=steps,
        devices=len(devices),
        seconds=length * scale,
        idle=(length - busy) * scale,
        shares=tuple(Share(part, passed, own * scale) for (part, passed), own in _longest(shares)),
        instructions=tuple(
            (name, _kind(instructions[name])[0], instructions[name].source, own * scale)
            for name, own in _longest(single)
        ),
    )


def _longest(times: dict[Any, float]) -> list[tuple[Any, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def _kind(instruction: Instruction) -> tuple[str, str]:
    source = instruction.source
    part = part_of(source)
    if COLLECTIVES.match(instruction.op) or COLLECTIVES.match(instruction.name):
        part = "collectives"
    return part, pass_of(source)


def _steps(events: Sequence[Event], program: Program) -> int:
    """How often the program ran on a device: as often as most of what is outside of all loops and branches.

    Not as often as all of it: on CPU a loop itself is seen some times a step, whenever it goes on after a wait.
    """
    outside = program.computations[program.entry]
    runs: collections.Counter[tuple[str, str]] = collections.Counter()
    for event in events:
        if event.name in outside:
            runs[event.device, event.name] += 1
    if not runs:
        raise ValueError("the trace has no instruction of the step that is outside of its loops: it is too short")
    return statistics.mode(runs.values())


def table(profile: Profile, longest: int = 12) -> str:
    """For a reader."""
    by_part = profile.by_part()
    passes = [p for p in PASSES if any(p in of_part for of_part in by_part.values())]
    rows = [["of a step, ms", *passes, "all", "share"]]
    for part, of_part in by_part.items():
        whole = sum(of_part.values())
        rows.append([part, *(_ms(of_part.get(p, 0.0)) for p in passes), _ms(whole), f"{whole / profile.busy:.1%}"])
    sums = [sum(of_part.get(p, 0.0) for of_part in by_part.values()) for p in passes]
    rows.append(["all", *map(_ms, sums), _ms(profile.busy), "100.0%"])
    side_by_side = profile.busy / max(profile.seconds - profile.idle, 1e-12)
    lines = [
        f"{profile.steps} steps of {1e3 * profile.seconds:,.2f} ms on {profile.devices} devices; "
        f"no instruction ran for {profile.idle / profile.seconds:.1%} of the time",
        *([f"{side_by_side:.2f} instructions ran side by side"] if side_by_side > 1.005 else []),
        "",
        *_aligned(rows),
        "",
        "longest instructions",
    ]
    tops = [[_ms(seconds), part, name, source] for name, part, source, seconds in profile.instructions[:longest]]
    return "\n".join([*lines, *_aligned(tops, left=(1, 2, 3))])


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}" if seconds else ""


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
