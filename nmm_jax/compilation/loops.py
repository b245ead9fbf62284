"""How often a loop runs, worked out from its condition: the TPU compiler does not write it down.

A loop that counts carries an integer: it starts at a constant, the body adds a constant, and the condition compares it
with a constant, or with the smaller of a constant and a number that depends on data: then it runs as often at most.
Constants are looked for through copies and fusions, through what outer loops carry unchanged, and through sums.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nmm_jax.compilation.program import Instruction, Program

    Made = tuple[str, Instruction] | None

_FARTHEST = 100  # steps to a constant; a value that needs more is none


def counted_trips(program: "Program", computation: str, loop: "Instruction") -> int | None:
    """Runs of the body of a loop in a computation, or the most there can be; None where no constants tell."""
    condition, body = loop.attribute("condition") or "", loop.attribute("body") or ""
    tested = _made(program, condition, program.roots[condition].name) if condition in program.roots else None
    if tested is None or tested[1].op != "compare":
        return None
    where, test = tested
    left, right = test.operands
    direction = test.attribute("direction") or ""
    counter, ahead = _counter(program, where, left)
    if counter is None:  # the bound stands first
        (counter, ahead), right = _counter(program, where, right), left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    if counter is None or not loop.operands:
        return None
    bound = _most(program, where, right)
    start = _value(program, _element(program, computation, loop.operands[0], counter))
    step = _step(program, body, counter)
    if bound is None or start is None or not step:
        return None
    return _turns(start, step, bound - ahead, direction)


def _counter(program: "Program", condition: str, name: str) -> tuple[int | None, int]:
    """The index of the argument that is compared, and what is added to it first: 1 where a last turn is peeled off."""
    where, found = _unfused(program, condition, name)
    if found.op in ("add", "subtract"):
        left, right = found.operands
        ahead = _constant(program, where, right)
        if ahead is not None:
            return _carried(program, where, left), -ahead if found.op == "subtract" else ahead
    return _carried(program, condition, name), 0


def _turns(start: int, step: int, bound: int, direction: str) -> int | None:
    if direction == "NE":
        whole, rest = divmod(bound - start, step)
        return whole if whole >= 0 and not rest else None
    if direction in ("LT", "LE") and step > 0:
        return max(0, math.ceil((bound + (direction == "LE") - start) / step))
    if direction in ("GT", "GE") and step < 0:
        return max(0, math.ceil((start - bound + (direction == "GE")) / -step))
    return None


def _carried(program: "Program", computation: str, name: str) -> int | None:
    """The index of the computation's argument (a tuple) that a value is; None for another value."""
    computation, found = _unfused(program, computation, name)
    if found.op != "get-tuple-element":
        return None
    _, of = _unfused(program, computation, found.operands[0])
    return int(found.attribute("index") or 0) if of.op == "parameter" else None


def _step(program: "Program", body: str, counter: int) -> int | None:
    """What the body adds to a carried value, if that is a constant."""
    root = program.roots[body]
    if root.op != "tuple":
        return None
    where, after = _unfused(program, body, root.operands[counter])
    if after.op not in ("add", "subtract"):
        return None
    left, right = after.operands
    if _carried(program, where, left) == counter:
        step = _constant(program, where, right)
        return -step if step is not None and after.op == "subtract" else step
    if after.op == "add" and _carried(program, where, right) == counter:
        return _constant(program, where, left)
    return None


def _most(program: "Program", computation: str, name: str) -> int | None:
    """A constant, or of the smaller of a constant and something else the constant."""
    made = _made(program, computation, name)
    if made and made[1].op == "minimum":
        either = (_constant(program, made[0], operand) for operand in made[1].operands)
        return min((constant for constant in either if constant is not None), default=None)
    return _value(program, made)


def _constant(program: "Program", computation: str, name: str) -> int | None:
    """An integer that is known without running anything."""
    return _value(program, _made(program, computation, name))


def _value(program: "Program", made: "Made") -> int | None:
    """The same of what makes it."""
    if made is None:
        return None
    computation, found = made
    if found.op == "constant":
        return int(found.literal) if found.literal.lstrip("-").isdecimal() else None
    if found.op in ("add", "subtract", "multiply"):
        left, right = (_constant(program, computation, operand) for operand in found.operands)
        if left is None or right is None:
            return None
        return {"add": left + right, "subtract": left - right, "multiply": left * right}[found.op]
    return None


def _made(program: "Program", computation: str, name: str, far: int = _FARTHEST) -> "Made":
    """What makes a value, and in which computation; None where that is not one instruction."""
    computation, found = _unfused(program, computation, name)
    if found.op != "get-tuple-element":
        return computation, found
    return _element(program, computation, found.operands[0], int(found.attribute("index") or 0), far)


def _unfused(program: "Program", computation: str, name: str) -> tuple[str, "Instruction"]:
    """What made a value: in a fusion, if one did, and before the fusion, if it came from there."""
    found = program.origin(computation, name)
    callers = program.callers[computation] if found.op == "parameter" else []
    if found.op == "fusion" and (inside := found.attribute("calls")):
        return _unfused(program, inside, program.roots[inside].name)
    if len(callers) == 1 and callers[0][1].op == "fusion":
        return _unfused(program, callers[0][0], callers[0][1].operands[int(found.literal)])
    return computation, found


def _element(program: "Program", computation: str, name: str, index: int, far: int = _FARTHEST) -> "Made":
    """The same of a tuple's element: of one that is made here, or that a loop carries unchanged."""
    if not far:
        return None
    computation, found = _unfused(program, computation, name)
    if found.op == "tuple":
        return _made(program, computation, found.operands[index], far - 1)
    if found.op == "while" and _is_unchanged(program, found, index):
        return _element(program, computation, found.operands[0], index, far - 1)
    if found.op == "parameter" and len(program.callers[computation]) == 1:
        ((caller, loop),) = program.callers[computation]
        if loop.op == "while" and _is_unchanged(program, loop, index):
            return _element(program, caller, loop.operands[0], index, far - 1)
    return None


def _is_unchanged(program: "Program", loop: "Instruction", index: int) -> bool:
    body = loop.attribute("body") or ""
    root = program.roots[body]
    return root.op == "tuple" and _carried(program, body, root.operands[index]) == index
