"""What a compiled program's devices say to each other: each collective with its mesh axes, its bytes and how often.

Compilers write one thing in many ways. What is told apart and brought together here:

- A pair of -start and -done is one collective. So is a gather that the TPU compiler has cut over several fusions
  ("async collective fusion"), each with a copy of it: the one with AsyncCollectiveStart counts.
- A reduce-scatter is an instruction, or a fusion around an all-reduce that is named all-reduce-scatter.
- A gather of narrow shards becomes an all-reduce of shards that are padded with zeros, as large as the whole and twice
  as slow. A product with what is gathered, or of which the sum is scattered, can become a loop of permutes ("windowed
  einsum"). `emulates` says of both what they are in place of.
- Across slices, device and host change places: a `send` hands the host what it reduces with the other slices and a
  `recv` takes it back (`_xla_host_transfer_handler_name="xla_megascale_runtime"`). The pair is one collective.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from jax.sharding import Mesh

from nmm_jax.compilation.device_groups import Layout
from nmm_jax.compilation.program import Instruction, Program, Shape, bytes_of, parts_of, shapes_in

KINDS = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
    "reduce-scatter",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of the program's, or the part of it that is of one type: compilers combine several into one.

    Attributes:
      kind: of KINDS.
      axes: the mesh axes that its devices differ in; it need not join all that do (`devices`).
      devices: of the mesh, by place: one group of those that it joins.
      dtype, shapes: of the buffers; whole, which is gathered or not yet scattered.
      bytes: of them together, of one run, on a device. Of a ragged exchange the smaller of what rows are sent from and
        what they are received in: what travels when all send as much.
      count: runs in a step.
      in_loop: whether a loop runs it.
      emulates: the kind that this is in place of; "".
      across_slices: whether it goes over the network between slices.
      uncertain: whether `count` takes a loop for one turn whose turns depend on data.
      name, computation, source: where it stands in the program, and where JAX made it.
    """

    kind: str
    axes: tuple[str, ...]
    devices: tuple[int, ...]
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    count: int
    in_loop: bool
    emulates: str
    across_slices: bool
    uncertain: bool
    name: str
    computation: str
    source: str


def collectives(program: Program, mesh: Mesh) -> list[Collective]:
    """All of a program that was compiled for this mesh; a collective of one device with itself is none."""
    layout = Layout(mesh, program.partitions)
    unknown: list[str] = []

    def once(_: Program, loop: Instruction) -> int:
        unknown.append(loop.attribute("body") or "")
        return 1

    runs, in_loops = program.runs(once), program.in_loops()
    uncertain = {*unknown, *(name for body in unknown for name, _ in program.within(body))}
    found = []
    for computation, inside in program.computations.items():
        if not runs[computation]:
            continue
        for instruction in inside.values():
            across, kind = False, _kind(program, computation, instruction)
            if not kind:
                across, kind = True, _kind_across_slices(instruction)
            if not kind:
                continue
            groups = layout.across_slices if across else layout.groups(instruction.attributes)
            if not groups:
                continue
            for (dtype, emulates), shapes in _buffers(program, computation, instruction, kind).items():
                one = Collective(
                    kind=kind,
                    axes=layout.axes(groups),
                    devices=max(groups, key=len),
                    dtype=dtype,
                    shapes=tuple(dims for _, dims in shapes),
                    bytes=sum(map(bytes_of, shapes)),
                    count=runs[computation],
                    in_loop=computation in in_loops,
                    emulates=emulates,
                    across_slices=across,
                    uncertain=computation in uncertain,
                    name=instruction.name,
                    computation=computation,
                    source=instruction.source,
                )
                found.append(one)
    return found


def summary(found: Iterable[Collective]) -> list[dict[str, Any]]:
    """Rows of those that are alike, the most bytes first; ready for JSON.

    kind, axes, dtype, in_loop, emulates, across_slices    what they have in common
    group                                                  devices that each joins
    count                                                  runs in a step, of all of them
    bytes                                                  on a device, of all runs in a step
    largest                                                bytes of the largest buffer
    uncertain                                              whether count and bytes are too small (Collective)
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for c in found:
        key = (c.kind, c.axes, c.dtype, c.in_loop, c.emulates, c.across_slices, len(c.devices))
        names = ("kind", "axes", "dtype", "in_loop", "emulates", "across_slices", "group")
        new = dict(zip(names, key, strict=True)) | {"axes": list(c.axes)}
        row = rows.setdefault(key, new | {"count": 0, "bytes": 0, "largest": 0, "uncertain": False})
        row["count"] += c.count
        row["bytes"] += c.count * c.bytes
        row["largest"] = max(row["largest"], *(bytes_of((c.dtype, dims)) for dims in c.shapes))
        row["uncertain"] |= c.uncertain
    return sorted(rows.values(), key=lambda row: (-row["bytes"], row["kind"], row["axes"], row["dtype"]))


def _kind(program: Program, computation: str, instruction: Instruction) -> str:
    """Of a collective within a slice; "" of another instruction, and of one that goes on or ends elsewhere."""
    kind = instruction.op.removesuffix("-start")
    if kind not in KINDS:
        return ""
    if "chain_id=" in instruction.attributes and not _starts(program, computation):
        return ""
    return "reduce-scatter" if kind == "all-reduce" and "all-reduce-scatter" in computation else kind


def _starts(program: Program, computation: str) -> bool:
    return "AsyncCollectiveStart" in program.roots[computation].attributes


def _kind_across_slices(instruction: Instruction) -> str:
    if instruction.op != "send" or "xla_megascale_runtime" not in instruction.attributes:
        return ""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    kind = found.group(1).lower().replace("_", "-") if found else ""
    if kind not in KINDS:
        raise ValueError(f"{instruction.name} moves something between slices in a way that is not known: {kind!r}")
    return kind


def _buffers(
    program: Program, computation: str, instruction: Instruction, kind: str
) -> dict[tuple[str, str], list[Shape]]:
    """The whole buffers by (element type, what their collective emulates)."""
    inside = program.computations[computation]
    operands = [shape for name in instruction.operands for shape in inside[name].shapes]
    results, windowed = _results(instruction), _windowed(computation)
    if instruction.op == "reduce-scatter" or kind == "all-reduce" and instruction.op == "send":
        results = [shape for name in instruction.operands for shape in inside[name].shapes]
    if kind == "ragged-all-to-all":  # operands: from, into, and the offsets and sizes of rows
        results = [min(operands[0], results[0], key=bytes_of)]
    found: dict[tuple[str, str], list[Shape]] = {}
    for i, shape in enumerate(results):
        emulates = windowed if kind == "collective-permute" else ""
        if kind == "all-reduce" and i < len(instruction.operands) and instruction.op != "send":
            padded = is_padded_shard(program, computation, instruction.operands[i])
            emulates = "all-gather" if padded else ""
        found.setdefault((shape[0], emulates), []).append(shape)
    return found


def _results(instruction: Instruction) -> list[Shape]:
    """Of a -start that is typed (operands, results, ...), the results; of a reduce-scatter's the operands."""
    if not instruction.op.endswith("-start") or instruction.op == "all-reduce-start":
        return instruction.shapes
    operands, results, *_ = parts_of(instruction.type)
    return shapes_in(operands if instruction.op == "reduce-scatter-start" else results)


def _windowed(computation: str) -> str:
    found = re.search(r"windowed_dot_general_body_(ag|rs)", computation)
    return {"ag": "all-gather", "rs": "reduce-scatter"}[found.group(1)] if found else ""


def is_padded_shard(program: Program, computation: str, name: str) -> bool:
    """Whether a value is a constant with a part written over: what is gathered where it is summed over devices."""
    of, made = _made(program, computation, name)
    if made.op != "dynamic-update-slice":
        return False
    _, below = _made(program, of, made.operands[0])
    return below.op in ("broadcast", "constant")


def _made(program: Program, computation: str, name: str) -> tuple[str, Instruction]:
    """(its computation, the instruction) that made a value, looking into fusions, and out of them."""
    made = program.origin(computation, name)
    if made.op == "fusion":
        (called,) = made.called
        return _made(program, called, program.roots[called].name)
    if made.op == "get-tuple-element":
        of = program.origin(computation, made.operands[0])
        if of.op == "fusion" and program.roots[of.called[0]].op == "tuple":
            called = of.called[0]
            return _made(program, called, program.roots[called].operands[int(made.attribute("index") or 0)])
    if made.op == "parameter" and len(program.callers[computation]) == 1:
        ((caller, fusion),) = program.callers[computation]
        if fusion.op == "fusion":
            return _made(program, caller, fusion.operands[int(made.literal)])
    return computation, made
