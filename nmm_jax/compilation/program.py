"""The text of a compiled program (`compiled.as_text()`): its computations, who calls whom, and how often each runs."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

from nmm_jax.compilation.loops import counted_trips

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8, "f8e8m0fnu": 8,
}  # fmt: skip

Shape = tuple[str, tuple[int, ...]]  # element type, dimensions

_REARRANGED = (
    "bitcast", "convert", "copy", "copy-done", "copy-start", "optimization-barrier", "reshape", "transpose",
)  # fmt: skip
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_ONE_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_MANY_CALLED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = type op(operands), attributes`.

    `literal` is what a constant or a parameter has in its parentheses instead of operands: its value or its number.
    """

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""

    @property
    def shapes(self) -> list[Shape]:
        """Of the result, or of each part of a tuple, however deep."""
        return shapes_in(self.type)

    @property
    def bytes(self) -> int:
        return sum(bytes_of(shape) for shape in self.shapes)

    @property
    def source(self) -> str:
        """Where JAX made it, as in jit(step)/transpose(jvp())/while/body/dot_general."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def attribute(self, name: str) -> str | None:
        """The computation, number or braces' content that an attribute names; None where it has no such attribute."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        return None if found is None else found.group(1) if found.group(1) is not None else found.group(2)

    @property
    def called(self) -> list[str]:
        """Computations it calls; of a loop the body and the condition."""
        many = [name.strip(" %") for group in _MANY_CALLED.findall(self.attributes) for name in group.split(",")]
        return [*_ONE_CALLED.findall(self.attributes), *many]

    @property
    def trips(self) -> int | None:
        """How often a loop's body runs, where the compiler has written it down (for CPUs and GPUs it does)."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
        return int(found.group(1)) if found else None


Trips = Callable[["Program", Instruction], int]


def depends_on_data(program: "Program", loop: Instruction) -> int:
    raise ValueError(f"how often loop {loop.name} ({loop.source}) runs depends on data; give `trips`")


class Program:
    """Computations by name, each a dict of instructions by name.

    `roots` has each computation's result. `partitions` is the number of devices that the program is written for: of
    one slice, where there are several.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry = ""
        found = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
        self.partitions = int(found.group(1)) if found else 1
        current = ""
        inside: dict[str, Instruction] = {}
        for line in _lines(text):
            if not line.startswith(" "):
                opening = _COMPUTATION.match(line)
                if opening:
                    current, inside = opening.group(2), {}
                    self.computations[current] = inside
                    if opening.group(1):
                        self.entry = current
                continue
            found = _INSTRUCTION.match(line)
            if found:
                root, name, kind, op = found.groups()
                within, rest = _up_to_closing(line, found.end())
                operands = tuple(re.findall(r"%([\w.\-]+)", within))
                literal = within if op in ("constant", "parameter") else ""
                inside[name] = Instruction(name, kind, op, operands, rest, literal)
                if root:
                    self.roots[current] = inside[name]
        assert self.entry, "no ENTRY computation: is this the text of a compiled program?"

    @functools.cached_property
    def callers(self) -> dict[str, list[tuple[str, Instruction]]]:
        """By computation: (computation, instruction) that call it."""
        callers: dict[str, list[tuple[str, Instruction]]] = defaultdict(list)
        for name, inside in self.computations.items():
            for instruction in inside.values():
                for callee in instruction.called:
                    callers[callee].append((name, instruction))
        return callers

    def origin(self, computation: str, name: str) -> Instruction:
        """The instruction that made a value, behind its copies and other arrangements of the same numbers."""
        found = self.computations[computation][name]
        while found.op in _REARRANGED and found.operands:
            found = self.computations[computation][found.operands[0]]
        return found

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """How often the body of a loop in a computation runs, at most; None where that depends on data alone."""
        return counted_trips(self, computation, loop) if loop.trips is None else loop.trips

    def runs(self, trips: Trips = depends_on_data) -> dict[str, int]:
        """By computation: how often one execution of the program runs it.

        Args:
          trips: (program, loop) -> runs of the body, for loops whose number the program does not tell. Branches of a
            conditional all count.
        """
        times = dict.fromkeys(self.computations, 0)
        times[self.entry] = 1
        for name in self._callers_first():
            for instruction in self.computations[name].values():
                n = times[name]
                if instruction.op in ("async-update", "async-done"):  # they name what their start has called
                    continue
                if n and instruction.op == "while":
                    turns = self.trips(name, instruction)
                    n *= trips(self, instruction) if turns is None else turns
                for callee in instruction.called:
                    times[callee] += n
        return times

    def within(self, computation: str) -> Iterator[tuple[str, Instruction]]:
        """(its computation, instruction) of this one and of all that it calls, each once."""
        seen, waiting = set(), [computation]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            for instruction in self.computations[name].values():
                yield name, instruction
                waiting += instruction.called

    def loops(self) -> list[Instruction]:
        return [i for c in self.computations.values() for i in c.values() if i.op == "while"]

    def in_loops(self) -> set[str]:
        """The computations that run within a loop."""
        bodies = [loop.attribute("body") or "" for loop in self.loops()]
        return {*bodies, *(name for body in bodies for name, _ in self.within(body))}

    def _callers_first(self) -> list[str]:
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name not in seen:
                seen.add(name)
                for instruction in self.computations[name].values():
                    for callee in instruction.called:
                        visit(callee)
                order.append(name)

        visit(self.entry)
        return order[::-1]


def parts_of(type: str) -> list[str]:
    """(f32[2]{0}, (u32[], u32[])) -> [f32[2]{0}, (u32[], u32[])]; what is no tuple is its own part."""
    if not type.startswith("("):
        return [type]
    parts, depth = [""], 0
    for c in type[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [re.sub(r"/\*.*?\*/", "", part).strip() for part in parts]


def shapes_in(text: str) -> list[Shape]:
    """(f32[2,3]{1,0}, u32[]) -> [("f32", (2, 3)), ("u32", ())]; tokens are none."""
    found = _SHAPE.findall(text)
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found if kind in BITS]


def bytes_of(shape: Shape) -> int:
    kind, dims = shape
    return -(-BITS[kind] * math.prod(dims) // 8)


def _lines(text: str) -> Iterator[str]:
    """With those of one instruction joined: what Pallas notes of a kernel has line breaks, within braces."""
    whole = ""
    for line in text.splitlines():
        if whole.startswith(" ") and line not in ("", "}") and not line.startswith(" "):
            whole += line
        else:
            yield whole
            whole = line
    yield whole


def _up_to_closing(line: str, start: int) -> tuple[str, str]:
    """The text from `start`, just behind an opening parenthesis, to its closing one, and what comes behind."""
    depth = 1
    for found in re.finditer(r"[()]", line[start:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return line[start : start + found.start()], line[start + found.end() :]
    return line[start:], ""
