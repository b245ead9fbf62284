"""The text of a compiled program (`compiled.as_text()`): its computations, who calls whom, and how often each runs."""

import dataclasses
import re
from collections.abc import Callable, Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_ONE_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_MANY_CALLED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = type op(operands), attributes`."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """(element type, dimensions) of the result, or of each part of a tuple."""
        found = _SHAPE.findall(self.type)
        return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found if kind in BYTES]

    @property
    def bytes(self) -> int:
        total = 0
        for kind, dims in self.shapes:
            size = BYTES[kind]
            for n in dims:
                size *= n
            total += size
        return total

    @property
    def source(self) -> str:
        """Where JAX made it, as in jit(step)/transpose(jvp())/while/body/dot_general."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
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
        """How often a loop's body runs; None where that depends on data."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
        return int(found.group(1)) if found else None


Trips = Callable[["Program", Instruction], int]


def depends_on_data(program: "Program", loop: Instruction) -> int:
    raise ValueError(f"how often loop {loop.name} ({loop.source}) runs depends on data; give `trips`")


class Program:
    """Computations by name, each a dict of instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        inside: dict[str, Instruction] = {}
        for line in text.splitlines():
            if not line.startswith(" "):
                opening = _COMPUTATION.match(line)
                if opening:
                    inside = self.computations[opening.group(2)] = {}
                    if opening.group(1):
                        self.entry = opening.group(2)
                continue
            found = _INSTRUCTION.match(line)
            if found:
                name, kind, op = found.groups()
                inside_parentheses, rest = _up_to_closing(line[found.end() :])
                operands = tuple(re.findall(r"%([\w.\-]+)", inside_parentheses))
                inside[name] = Instruction(name, kind, op, operands, rest)
        assert self.entry, "no ENTRY computation: is this the text of a compiled program?"

    def runs(self, trips: Trips = depends_on_data) -> dict[str, int]:
        """By computation: how often one execution of the program runs it.

        Args:
          trips: (program, loop) -> runs of the body, for loops whose number is not written in the program. Branches of
            a conditional all count.
        """
        times = dict.fromkeys(self.computations, 0)
        times[self.entry] = 1
        for name in self._callers_first():
            for instruction in self.computations[name].values():
                n = times[name]
                if n and instruction.op == "while":
                    n *= trips(self, instruction) if instruction.trips is None else instruction.trips
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


def _up_to_closing(text: str) -> tuple[str, str]:
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""
