"""Where a compiled program's values lie in a device's memory, and when: XLA's own account of it.

`Compiled.memory_analysis()` is no good for this on TPUs: of libtpu 0.0.42 its temp_size_in_bytes is too large (with the
16.1 GiB that it says, beside 3.8 of arguments, a program was compiled for the 15.75 GiB of a v5e; it needs 15.1), its
peak_memory_in_bytes counts what lies in VMEM and no gaps, and its buffer assignment is empty. But the compiler writes
the assignment to files when it is asked to (`xla_dump_to`), on TPUs with the time that each value lives.

    allocation 449: size 1750073504, preallocated-temp:
     value: <1733 copy.576 @0> (size=29511680,offset=936312832): bf16[16,128,7205]{1,0,2:T(8,128)(2,1)}
    BufferLiveRange:
      copy.576{}:530-533
"""

import dataclasses
import pathlib
import re

from nmm_jax.compilation.program import Shape, shapes_in

_ALLOCATION = re.compile(r"allocation \d+: size (\d+),(?: color (\d+),)? (.*)")
_VALUE = re.compile(r" value: <\d+ ([\w.\-]+)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_RANGE = re.compile(r"\s+([\w.\-]+\{[\d,]*\}):(\d+)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A value in the memory of temporaries: `instruction`, or its element `index` of a tuple."""

    instruction: str
    index: tuple[int, ...]
    shape: Shape
    size: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Bytes of a device's main memory.

    Attributes:
      total: arguments, results that take none of their places, constants and temporaries.
      temporary: the last of these; gaps between values count.
      fullest: the temporaries at the moment when they are most, without those that lie in the place of another; None
        where the compiler does not write when values live.
    """

    total: int
    temporary: int
    fullest: tuple[Buffer, ...] | None


def options(folder: str) -> dict[str, str | bool]:
    """The compiler's, to write its files to a folder."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def read(folder: str) -> Buffers | None:
    """What it wrote there of one program; None if it wrote nothing, as when the program came from the cache."""
    assignments = sorted(pathlib.Path(folder).glob("*buffer-assignment.txt"))
    if not assignments:
        return None
    ranges = sorted(pathlib.Path(folder).glob("*live-range.txt"))
    return parse(assignments[-1].read_text(), ranges[-1].read_text() if ranges else None)


def parse(assignment: str, ranges: str | None) -> Buffers:
    total = temporary = 0
    values: list[Buffer] = []
    in_heap = False
    for line in assignment.splitlines():
        found = _ALLOCATION.match(line)
        if found:
            size, color, kind = int(found[1]), int(found[2] or 0), found[3]
            counts = color == 0 and "thread-local" not in kind
            in_heap = counts and "preallocated-temp" in kind
            total += size * counts
            temporary += size * in_heap
        elif in_heap and (value := _VALUE.match(line)):
            shapes = shapes_in(value[5])
            index = tuple(int(n) for n in (value[2] or "{}")[1:-1].split(",") if n)
            if not value[5].startswith("(") and shapes:  # a tuple is a table of pointers
                values.append(Buffer(value[1], index, shapes[0], int(value[3]), int(value[4])))
    return Buffers(total, temporary, None if ranges is None else _fullest(values, ranges))


def _fullest(values: list[Buffer], ranges: str) -> tuple[Buffer, ...]:
    lives = {name: (int(begin), int(end)) for name, begin, end in _RANGE.findall(ranges)}
    known = []
    for value in values:
        name = f"{value.instruction}{{{','.join(map(str, value.index))}}}"
        if name in lives:
            known.append((*lives[name], value))
    best: tuple[int, tuple[Buffer, ...]] = (0, ())
    for now in sorted({begin for begin, _, _ in known}):
        here = _apart([value for begin, end, value in known if begin <= now <= end])
        best = max(best, (sum(value.size for value in here), here), key=lambda found: found[0])
    return best[1]


def _apart(values: list[Buffer]) -> tuple[Buffer, ...]:
    """Those that do not lie within another."""
    kept, filled = [], 0
    for value in sorted(values, key=lambda value: (value.offset, -value.size)):
        if value.offset + value.size > filled:
            kept.append(value)
            filled = value.offset + value.size
    return tuple(kept)
