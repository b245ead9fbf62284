"""An estimate of a step's time from what it computes, reads and sends, and from what chips can do.

    seconds = max(compute, memory, links, network)     what can go on side by side
            + optimizer + links + network              what nothing else can hide

Roughly right is what it is meant to be: to rank meshes and to say what a step is bound by. What it assumes is in
`Estimate.assumptions`, in words.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nmm_jax import models
from nmm_jax.compilation import network
from nmm_jax.compilation.collectives import Collective
from nmm_jax.models import attention
from nmm_jax.parallel.chips import Chip
from nmm_jax.parallel.sharding import RULES
from nmm_jax.scaling import counting
from nmm_jax.training.freezing import frozen_names

# Of the peak, that products of a step reach. AI-Hypercomputer/maxtext reports 56 to 72 % end to end for dense models of
# 16 to 256 B on v5e and v5p (src/maxtext/configs/tpu/*/README.md), so its products alone do better than that.
EFFICIENCY = 0.75

# Keys that attention's kernels visit at a time: models/attention_tpu.py's; fewer on GPUs, which visit less.
KERNEL_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step has to do.

    Attributes:
      positions: of rows, of all devices.
      needed: FLOPs of all devices that the mathematics needs (scaling/counting.py).
      repeated: FLOPs of all devices besides: what rematerialisation computes again, what attention masks away.
      state: bytes of HBM of one device that the optimizer's update reads and writes.
      weights: that gathered weights and their gradients are written and read.
      activations: that products read and write of rows.
    """

    positions: float
    needed: float
    repeated: float
    state: float
    weights: float
    activations: float


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective of the compiled program: `count` runs a step of `nbytes` each, over the mesh axes `axes`."""

    kind: str
    axes: tuple[str, ...]
    nbytes: float
    count: int
    in_loop: bool
    group: network.Group

    @property
    def is_waited_for(self) -> bool:
        """Whether what comes next needs it: sums of activations and exchanges of tokens, and all outside of loops.

        Weights can be gathered ahead and their gradients reduced behind; permutes are of products that send piece after
        piece while they compute.
        """
        if self.in_loop and self.kind == "collective-permute":
            return False
        return not self.in_loop or "tensor" in self.axes or "all-to-all" in self.kind


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step by what takes them.

    Attributes:
      needed, repeated: of Work, in compute.
      memory: of HBM while layers compute.
      optimizer: of HBM for the update.
      links, links_hidden: between the devices of a slice or node, by mesh axes; waited for, and beside the compute.
      network, network_hidden: the same between slices or nodes.
      mfu: FLOPs needed over what the devices' peak would allow.
      bound: the largest of the above.
    """

    seconds: float
    needed: float
    repeated: float
    memory: float
    optimizer: float
    links: dict[str, float]
    links_hidden: dict[str, float]
    network: dict[str, float]
    network_hidden: dict[str, float]
    tokens_per_second: float
    mfu: float
    bound: str
    assumptions: tuple[str, ...]


def work(config: ConfigDict, sizes: Mapping[str, int], platform: str) -> Work:
    """A step of `config` on a mesh of these sizes, by axis, of a platform's devices."""
    model, counts = models.build(config), counting.count(config)
    spec, rows, devices = model.spec, counting.full_rows(config), math.prod(sizes.values())
    positions, pairs, _ = rows
    layers_again = spec.remat in ("full", "exchanges")

    visited = positions * _keys_visited(config, platform)
    again_for_gradients = 1.5 if _by_kernels(config, platform) else 0.5
    scores = (counts.training.pair + again_for_gradients * counts.forward.pair) * visited - counts.training.pair * pairs
    head = 2 * (counts.parts["head"] or counts.parts["token_embedding"]) * positions  # made again, chunk by chunk
    again = counts.forward_flops(*rows[:1], visited, rows[2]) if layers_again else head

    abstract, axes = (flatten_dict(tree, sep="/") for tree in (model.abstract, model.logical_axes))
    frozen = frozen_names({name: math.prod(x.shape) for name, x in abstract.items()}, config.optimizer.freeze)
    width = 2 if spec.dtype == "bfloat16" else 4
    trained = sum(math.prod(x.shape) / _cuts(axes[name], sizes) for name, x in abstract.items() if name not in frozen)
    gathered = activations = 0.0
    for name, flops in counting.of_matrices(config).items():
        x, whole = abstract[name], {axis: n for axis, n in sizes.items() if axis != "fsdp"}
        gathered += math.prod(x.shape) / _cuts(axes[name], whole)
        sides = {axis: n for axis, n in zip(axes[name], x.shape, strict=True) if axis not in ("layers", "expert")}
        inputs = sides.get("embed") or next(iter(sides.values()))
        others = math.prod(sides.values()) / inputs / _cuts(tuple(sides), whole)
        activations += flops.of(*rows) / devices * (1 / inputs + 1 / others) * width / 2
    return Work(
        positions=positions,
        needed=counts.training_flops(*rows),
        repeated=again + scores,
        state=8 * counting.FLOAT32 * trained,
        weights=(7 if layers_again else 6) * gathered * width * config.gradient_accumulation,
        activations=(4 if layers_again else 3) * activations,
    )


def _by_kernels(config: ConfigDict, platform: str) -> bool:
    """Whether attention runs in kernels, whose backward pass computes scores twice: for dq, and for dk and dv."""
    implementation = config.model.attention
    return implementation in attention.KERNELS or (
        implementation == "auto" and any(platform in runs for runs in attention.KERNELS.values())
    )


def _keys_visited(config: ConfigDict, platform: str) -> float:
    """A query's, in a row that is one causal document: to its block's end; without kernels all or a window of them."""
    length, implementation = config.row_length, config.model.attention
    if _by_kernels(config, platform):
        return (length + min(length, KERNEL_BLOCK)) / 2
    if implementation == "reference":
        return length
    widths = attention.window_widths(length, platform)
    ends = range(attention.BLOCK, length + attention.BLOCK, attention.BLOCK)
    return statistics.mean(min(width for width in widths if width >= min(end, length)) for end in ends)


def _cuts(axes: Sequence[str | None], sizes: Mapping[str, int]) -> int:
    """Into how many parts the rules cut a parameter on a mesh of these sizes."""
    over = [RULES[axis] for axis in axes]
    return math.prod(sizes.get(axis, 1) for axis in over if isinstance(axis, str))


def transfers(collectives: Sequence[Collective], mesh: Mesh, chip: Chip) -> list[Transfer]:
    """What a compiled program moves, with what the devices that it joins are to each other."""
    devices = list(mesh.devices.flat)
    first = network.island_of(devices[0], chip)
    coordinates = [d.coords for d in devices if chip.torus_dims and network.island_of(d, chip) == first]
    shape = [max(along) + 1 for along in zip(*coordinates, strict=True)]
    known: dict[tuple[int, ...], network.Group] = {}
    for c in collectives:
        if c.devices not in known:
            known[c.devices] = network.group_of([devices[i] for i in c.devices], chip, shape)
    return [Transfer(c.kind, c.axes, c.bytes, c.count, c.in_loop, known[c.devices]) for c in collectives]


def estimate(
    work: Work, chip: Chip, devices: int, transfers: Sequence[Transfer], efficiency: float = EFFICIENCY
) -> Estimate:
    """Seconds of a step of `work` on so many devices."""
    rate = devices * chip.peak_flops * efficiency
    needed, repeated = work.needed / rate, work.repeated / rate
    memory = (work.weights + work.activations) / chip.memory_bandwidth
    optimizer = work.state / chip.memory_bandwidth
    links, links_hidden, between, between_hidden = {}, {}, {}, {}  # type: ignore[var-annotated]
    for t in transfers:
        took = network.seconds(t.kind, t.nbytes, t.group, chip)
        name = " ".join(t.axes)
        on_links, on_network = (links, between) if t.is_waited_for else (links_hidden, between_hidden)
        for by_axes, seconds in ((on_links, took.links), (on_network, took.network)):
            if seconds:
                by_axes[name] = by_axes.get(name, 0.0) + t.count * seconds
    side_by_side = (needed + repeated, memory, sum(links_hidden.values()), sum(between_hidden.values()))
    total = max(side_by_side) + optimizer + sum(links.values()) + sum(between.values())
    parts = {"compute": needed + repeated, "memory": memory + optimizer}
    for kind, found in (("links", (links, links_hidden)), ("network", (between, between_hidden))):
        for name in {**found[0], **found[1]}:
            parts[f"{kind} over {name}"] = sum(by_axes.get(name, 0.0) for by_axes in found)
    return Estimate(
        seconds=total,
        needed=needed,
        repeated=repeated,
        memory=memory,
        optimizer=optimizer,
        links=links,
        links_hidden=links_hidden,
        network=between,
        network_hidden=between_hidden,
        tokens_per_second=work.positions / total,
        mfu=work.needed / (devices * chip.peak_flops * total),
        bound=max(parts, key=lambda part: parts[part]),
        assumptions=_assumptions(chip, transfers, efficiency),
    )


def _assumptions(chip: Chip, transfers: Sequence[Transfer], efficiency: float) -> tuple[str, ...]:
    def per_second(figure: float | None, unit: str = "GB/s") -> str:
        return "unknown, counted as infinite" if figure is None else f"{figure / 1e9:g} {unit}"

    said = [
        f"products reach {efficiency:g} of the peak, {chip.peak_flops / 1e12:g} TFLOP/s of a device",
        "rows are full, one causal document each, half of it images; router loads are even",
        f"attention's kernels visit blocks of {KERNEL_BLOCK} keys up to each query's own, and compute the scores twice "
        "more for the gradients; without kernels, all keys (on CPU windows of them) and the scores once more",
        f"HBM moves {per_second(chip.memory_bandwidth)}; products read their factors and write their result once, "
        "and what is between them is fused",
        f"{chip.links or 'unknown'} links of {per_second(chip.link_bandwidth)} in one direction"
        + (f", shared by the chip's {chip.devices_per_chip} devices" if chip.devices_per_chip > 1 else ""),
        f"between {'slices' if chip.torus_dims else 'nodes'} {per_second(chip.network_bandwidth)} a device",
        "gathers of weights, reductions of gradients and permutes inside loops are hidden behind compute; sums over "
        "tensor, exchanges of tokens and all that is outside of loops are waited for",
        "collectives of different axes take turns",
    ]
    irregular = sum(t.group.irregular for t in transfers)
    if irregular:
        said.append(
            f"of the collectives {irregular} join devices that are no box of the torus; they are taken for lines"
        )
    return tuple(said)
