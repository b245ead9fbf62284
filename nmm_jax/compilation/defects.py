"""What a compiled step should not do, and what to do about it."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from nmm_jax.compilation.collectives import Collective
from nmm_jax.compilation.products import products
from nmm_jax.compilation.program import Instruction, Program, bytes_of
from nmm_jax.compilation.weights import by_name, gathered_shape, is_cut_over_fsdp, layer_of

LEAST = 1 << 20  # bytes; what is smaller, such as norms' gradients, may be summed whole
LEAST_SHARE = 1e-3  # of the bytes that all collectives move; gathers of less may be emulated

# What names or hands on a value, and does not move it.
_PASSIVE = (
    "after-all", "bitcast", "call", "conditional", "get-tuple-element", "optimization-barrier", "parameter", "tuple",
    "while",
)  # fmt: skip
_HOST_MEMORY = "S(5)"  # of TPUs and GPUs: xla/layout.h


def whole_gradients(found: Iterable[Collective], params: Any) -> list[str]:
    """A sentence for each kind of buffer that is summed whole over fsdp, though every device needs only its shard.

    Args:
      params: their shapes and shardings. A gradient of what is not cut over fsdp has to be summed whole.
    """
    cut: dict[int, list[str]] = {}  # by the number of a gradient's values
    uncut = set()
    for name, weight in by_name(params).items():
        shape = gathered_shape(weight)
        for n in {math.prod(shape), math.prod(shape[1:])} if layer_of(name) else {math.prod(shape)}:
            if is_cut_over_fsdp(weight):
                cut.setdefault(n, []).append(name)
            else:
                uncut.add(n)
    runs: Counter[tuple[str, str]] = Counter()
    for c in found:
        if c.kind != "all-reduce" or c.emulates or "fsdp" not in c.axes:
            continue
        for dims in c.shapes:
            size = math.prod(dims)
            if bytes_of((c.dtype, dims)) >= LEAST and (size in cut or size not in uncut):
                buffer = f"{c.dtype}[{','.join(map(str, dims))}]"
                runs[buffer, " or ".join(cut.get(size, []))] += c.count
    return [
        f"{buffer} is summed whole over fsdp, {n} times a step"
        + (f": the size of a gradient of {names}" if names else ": no weight's size, perhaps part of one's gradient")
        for (buffer, names), n in sorted(runs.items())
    ]


def emulated_gathers(found: Iterable[Collective]) -> list[str]:
    """A sentence for each combination of axes on which shards are gathered by an all-reduce of padded ones."""
    moved: Counter[tuple[str, ...]] = Counter()
    by_all = 0
    for c in found:
        by_all += c.count * c.bytes
        if c.kind == "all-reduce" and c.emulates == "all-gather":
            moved[c.axes] += c.count * c.bytes
    return [
        f"{n / 1e9:.3g} GB a step are gathered over {' '.join(axes)} by all-reduces of shards that are padded with "
        "zeros, which takes twice as long: shards are too narrow; cut less over this axis, or a wider model"
        for axes, n in sorted(moved.items())
        if n >= max(LEAST, LEAST_SHARE * by_all)
    ]


def dense_experts(program: Program, params: Any) -> list[str]:
    """A sentence for each product that multiplies all of a device's experts with all rows, or makes such a gradient."""
    experts = {gathered_shape(x)[1:] for name, x in by_name(params).items() if "experts" in name.split("/")}
    several = {tuple(sorted(shape)) for shape in experts if shape[0] > 1}
    return [
        f"{product.name} ({product.source}) multiplies all experts with all rows: {product.shapes}"
        for product in products(program, lambda *_: 1)
        if several & {tuple(sorted(n for n in shape if n > 1)) for shape in product.shapes}
    ]


def host_transfers(program: Program) -> list[Instruction]:
    """What moves values between a device and its host: infeeds, callbacks, copies to the host's memory.

    Not what slices send each other through their hosts.
    """
    return [
        instruction
        for inside in program.computations.values()
        for instruction in inside.values()
        if _is_host_transfer(instruction, inside)
    ]


def _is_host_transfer(instruction: Instruction, inside: dict[str, Instruction]) -> bool:
    op, attributes = instruction.op, instruction.attributes
    if op in ("infeed", "outfeed"):
        return True
    if op in ("send", "recv"):
        return "is_host_transfer=true" in attributes and "xla_megascale_runtime" not in attributes
    if op == "custom-call":
        return "callback" in instruction.target or instruction.target in ("MoveToHost", "MoveToDevice")
    if op in _PASSIVE or op.endswith("-done"):
        return False
    return _HOST_MEMORY in instruction.type or any(_HOST_MEMORY in inside[name].type for name in instruction.operands)
