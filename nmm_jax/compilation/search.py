"""Meshes, remat policies and microbatches for a config on a topology: which fit, and which is the fastest.

There are hundreds, and a minute goes into compiling one. So each is first weighed by count (memory.needed, and the
roofline of the collectives that it cannot do without), and only the most promising are compiled.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from configs.validation import validate
from nmm_jax.compilation import network, roofline
from nmm_jax.compilation.facts import Facts, facts
from nmm_jax.compilation.memory import needed
from nmm_jax.compilation.step import LaidOut, TooLarge, compile_step, lay_out
from nmm_jax.parallel.topology import Topology

REMAT = ("none", "minimal", "exchanges", "full")
TENSOR = (1, 2, 4, 8)
MICROBATCHES = (1, 2, 4, 8, 16, 32)
# Of the memory, that what is needed by count may take: what compiled steps took beyond it was up to an eighth.
ROOM = 0.85


@dataclasses.dataclass(frozen=True)
class Candidate:
    overrides: Mapping[str, Any]
    config: ConfigDict
    needed: int  # bytes of a device, by count
    seconds: float  # of a step, at least

    def __str__(self) -> str:
        return " ".join(f"--config.{key}={value}" for key, value in self.overrides.items())


def search(config: ConfigDict, topology: Topology, limit: int, batches: Sequence[int] = ()) -> list[Facts]:
    """Facts of the most promising `limit` candidates, as they come.

    Args:
      batches: global batches to try, in rows; the config's, unless given.

    Raises:
      ValueError: none fits by count.
    """
    print("weighing meshes, remat policies and microbatches by count", file=sys.stderr)
    promising = _fitting(config, topology, batches)
    print(f"{len(promising)} fit by count; compiling {min(limit, len(promising))}", file=sys.stderr)
    found = []
    for number, candidate in enumerate(promising[:limit], 1):
        try:
            one = facts(compile_step(candidate.config, topology))
        except (TooLarge, jax.errors.JaxRuntimeError) as e:
            told = "too large" if isinstance(e, TooLarge) else f"the compiler failed ({str(e).splitlines()[0][:80]})"
            print(f"{number}: {told}   {candidate}", file=sys.stderr)
            continue
        found.append(one)
        print(f"{number}: {one['estimate']['seconds']:.3f} s a step   {candidate}", file=sys.stderr)
    return found


def proposals(config: ConfigDict, topology: Topology, most: int = 3) -> str:
    """What to set so that a step that is too large should fit."""
    try:
        promising = _fitting(config, topology)
    except ValueError as e:
        return str(e)
    lines = [f"  {c}   ({c.needed / 2**30:.1f} GiB by count)" for c in promising[:most]]
    return "\n".join(["By count these should fit, the fastest first (--search compiles them):", *lines])


def _fitting(config: ConfigDict, topology: Topology, batches: Sequence[int] = ()) -> list[Candidate]:
    capacity = topology.chip.memory_bytes
    everything = [c for rows in batches or [config.batch_rows] for c in candidates(config, topology, rows)]
    if not everything:
        raise ValueError(f"no mesh of {topology} divides this model and its batch_rows = {config.batch_rows}")
    fitting = sorted(
        (c for c in everything if c.needed <= ROOM * capacity), key=lambda c: c.seconds / c.config.batch_rows
    )
    if not fitting:
        least = min(everything, key=lambda c: c.needed)
        raise ValueError(
            f"nothing fits {topology} by count: the least is {least.needed / 2**30:.1f} GiB of "
            f"{capacity / 2**30:.1f} GiB a device, with {least}; take a larger slice or a smaller batch_rows"
        )
    return fitting


def candidates(config: ConfigDict, topology: Topology, batch_rows: int) -> Iterator[Candidate]:
    """All that divide the model, the rows and the devices; with as few microbatches as fit by count."""
    experts = config.model.moe.experts * config.model.moe.granularity
    remats = [r for r in REMAT if r != "exchanges" or experts]
    for mesh, remat in itertools.product(_meshes(topology, experts), remats):
        candidate = None
        for microbatches in MICROBATCHES:
            others = {"gradient_accumulation": microbatches, "model.remat": remat}
            others |= {"batch_rows": batch_rows} if batch_rows != config.batch_rows else {}
            more = _weigh(config, topology, mesh | others)
            candidate = more or candidate
            if more is None or more.needed <= ROOM * topology.chip.memory_bytes:
                break
        if candidate:
            yield candidate


def _meshes(topology: Topology, experts: int) -> Iterator[dict[str, int]]:
    within = topology.device_count // topology.slices
    for tensor, expert in itertools.product(TENSOR, _divisors(math.gcd(experts, within)) if experts else [1]):
        left, rest = divmod(within, tensor * expert)
        for fsdp in [] if rest else _divisors(left):
            sizes = {"replica": topology.slices * left // fsdp, "fsdp": fsdp, "expert": expert, "tensor": tensor}
            yield {f"mesh.{axis}": n for axis, n in sizes.items()}


def _weigh(config: ConfigDict, topology: Topology, overrides: Mapping[str, Any]) -> Candidate | None:
    """None where something does not divide."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.update_from_flattened_dict(overrides)
    try:
        validate(changed)
        step = lay_out(changed, topology)
    except ValueError:
        return None
    chip = topology.chip
    work = roofline.work(changed, dict(step.mesh.shape), step.mesh.devices.flat[0].platform)
    seconds = roofline.estimate(work, chip, step.mesh.size, _least_transfers(step, work)).seconds
    return Candidate(overrides, changed, sum(needed(step).values()), seconds)


def _least_transfers(step: LaidOut, work: roofline.Work) -> list[roofline.Transfer]:
    """The collectives that a step cannot do without; a microbatch's are counted with the others'."""
    spec, sizes = step.model.spec, dict(step.mesh.shape)
    again = spec.remat in ("full", "exchanges")
    weights = work.weights / (7 if again else 6)  # all gathered once
    rows = 2 * work.positions / (step.mesh.size // sizes["tensor"]) * spec.width  # bytes of a device's, in a layer
    found = [
        ("all-gather", "fsdp", 2 * weights),
        ("reduce-scatter", "fsdp", weights),
        ("all-reduce", "replica", weights / sizes["fsdp"]),
        ("all-reduce", "tensor", (6 if again else 4) * spec.depth * rows),
    ]
    if spec.moe:
        layers = spec.depth // spec.moe.every
        found.append(
            ("ragged-all-to-all", "expert", (6 if spec.remat == "full" else 4) * layers * spec.moe.top_k * rows)
        )
    return [
        roofline.Transfer(kind, (axis,), nbytes, 1, True, _group(step, axis))
        for kind, axis, nbytes in found
        if sizes[axis] > 1
    ]


def _group(step: LaidOut, axis: str) -> network.Group:
    """The devices along one axis of the mesh."""
    along = step.mesh.axis_names.index(axis)
    index = tuple(slice(None) if i == along else 0 for i in range(step.mesh.devices.ndim))
    return network.group_of(list(step.mesh.devices[index]), step.topology.chip, step.topology.shape)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
