"""FLOPs of the matrix products in a compiled program, counted from its text.

Unlike XLA's own cost analysis this multiplies a loop's body by its trips. What is not a dot or a convolution (the
TPU compiler's name for one) counts nothing; a custom kernel cannot be looked into and counts nothing either.
"""

import dataclasses
import math

from nmm_jax.compilation.program import Instruction, Program, Trips, depends_on_data


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product of the program."""

    name: str
    source: str
    shapes: tuple[tuple[int, ...], ...]  # of left, right and result
    contracted: int  # products that each element of the result sums
    flops: int  # of one run
    times: int  # how often the program runs it

    @property
    def total(self) -> int:
        return self.flops * self.times


def flops(text: str, trips: Trips = depends_on_data) -> int:
    return sum(p.total for p in products(Program(text), trips))


def products(program: Program, trips: Trips = depends_on_data) -> list[Product]:
    """The products that the program runs.

    Args:
      trips: how often a loop runs whose number depends on data; `products_in` tells what it multiplies.
    """
    times = program.runs(trips)
    found = []
    for name in program.computations:
        if times[name]:
            found += [dataclasses.replace(p, times=times[name]) for p in _products_of(program, name)]
    return found


def products_in(program: Program, computation: str) -> list[Product]:
    """Those of a computation and all that it calls, each once."""
    called = {computation, *(name for name, _ in program.within(computation))}
    return [p for name in called for p in _products_of(program, name)]


def _products_of(program: Program, computation: str) -> list[Product]:
    inside = program.computations[computation]
    found = []
    for i in inside.values():
        if i.op not in ("dot", "convolution"):
            assert i.op != "custom-call" or "matmul" not in i.target, f"a product that is not counted: {i}"
            continue
        left, right = (_dimensions(inside[operand]) for operand in i.operands[:2])
        result = _dimensions(i)
        if i.op == "dot":
            contracted = math.prod(left[int(axis)] for axis in (i.attribute("lhs_contracting_dims") or "").split(","))
            size = 2 * math.prod(result) * contracted
        else:
            contracted, size = _convolution(i, left, right, result)
        found.append(Product(i.name, i.source, (left, right, result), contracted, size, 1))
    return found


def _dimensions(i: Instruction) -> tuple[int, ...]:
    return i.shapes[0][1]


def _convolution(i: Instruction, left, right, result) -> tuple[int, int]:
    """(features that are summed, FLOPs), without those of padding and of the holes of a dilation.

    The TPU compiler writes a batched product as a convolution over the batch axis that is mostly holes.
    """
    inputs, kernel, output = _labels(i.attributes)
    window = _window(i.attributes)
    features = right[kernel.index("i")]
    size = 2 * features * result[output.index("b")] * result[output.index("f")]
    for axis in (c for c in output if c.isdigit()):
        n = int(axis)
        size *= _valid(
            left[inputs.index(axis)],
            right[kernel.index(axis)],
            result[output.index(axis)],
            stride=window("stride", n, 1),
            pad=window("pad", n, 0),
            left_dilation=window("lhs_dilate", n, 1),
            right_dilation=window("rhs_dilate", n, 1),
        )
    return features, size


def _labels(attributes: str) -> tuple[str, str, str]:
    """dim_labels=0bf_0io->0bf"""
    labels = attributes.split("dim_labels=", 1)[1].split(",")[0].split()[0]
    left, output = labels.split("->")
    inputs, kernel = left.split("_")
    return inputs, kernel, output


def _window(attributes: str):
    """window={size=8 stride=7 pad=0_0 lhs_dilate=8}, its values by name and axis; of a pad the lower one."""
    text = attributes.split("window={", 1)[1].split("}")[0] if "window={" in attributes else ""
    values = dict(part.split("=") for part in text.split())

    def value(name: str, axis: int, default: int) -> int:
        return int(values[name].split("x")[axis].split("_")[0]) if name in values else default

    return value


def _valid(left, right, result, *, stride, pad, left_dilation, right_dilation) -> int:
    """Pairs of an output and a kernel place on one axis that meet a value of the input."""
    end = (left - 1) * left_dilation + 1
    count = 0
    for out in range(result):
        for place in range(right):
            at = out * stride + place * right_dilation - pad
            count += 0 <= at < end and at % left_dilation == 0
    return count
