"""The memory of one device while a step runs: what the compiler takes, and what is needed by count."""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax

from nmm_jax.compilation.buffers import Buffer
from nmm_jax.compilation.program import Program
from nmm_jax.compilation.step import CompiledStep, LaidOut
from nmm_jax.compilation.weights import by_name, gathered_shape, layer_of
from nmm_jax.models.spec import Spec
from nmm_jax.parallel.mesh import BATCH_AXES
from nmm_jax.scaling import counting
from nmm_jax.training import freezing
from nmm_jax.training.losses import chunks_of

_LISTED = 12  # temporaries that are told one by one


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device's main memory; the kinds sum to `peak`.

    Attributes:
      capacity: of the chip, what XLA may use.
      peak: what the step takes: state, batch and the memory of temporaries, with its gaps.
      parameters, optimizer, batch: shards, as the step is given them.
      gradients: temporaries that have a trained parameter's shard's shape and its type, or come from the backward pass.
      activations: temporaries with a leading axis of layers: what the forward pass keeps for the backward pass.
      workspace: the rest: a layer's values, gathered weights, logits, copies, gaps.
      code: of the program itself; not in `peak`.
      by_buffers: whether kinds of temporaries are those of the compiler's buffers at the fullest moment. If not, when
        it did not write them down, gradients and activations are as counted.
      largest: temporaries of that moment, (shape, where from, bytes), the largest first.
    """

    capacity: int
    peak: int
    parameters: int
    optimizer: int
    gradients: int
    activations: int
    batch: int
    workspace: int
    code: int
    by_buffers: bool
    largest: tuple[tuple[str, str, int], ...]


def memory(step: CompiledStep, program: Program) -> Memory:
    """Of a compiled step; `program` is its text's."""
    parameters, optimizer = (_shards(step.state[part]) for part in ("params", "opt_state"))
    batch = _shards(step.batch)
    known = parameters + optimizer + batch
    stats = step.compiled.memory_analysis()
    gradients, activations = (needed(step)[name] for name in ("gradients", "saved activations"))
    peak, by_buffers = 0, False
    largest: tuple[tuple[str, str, int], ...] = ()
    if step.buffers:
        peak = step.buffers.total
        if step.buffers.fullest is not None:
            kinds, largest = _sorted(step, program, step.buffers.fullest)
            gradients, activations, by_buffers = kinds["gradients"], kinds["activations"], True
    elif stats:
        held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        peak = stats.peak_memory_in_bytes or held + stats.temp_size_in_bytes
    return Memory(
        capacity=step.topology.chip.memory_bytes,
        peak=peak,
        parameters=parameters,
        optimizer=optimizer,
        gradients=gradients,
        activations=activations,
        batch=batch,
        workspace=max(0, peak - known - gradients - activations),
        code=stats.generated_code_size_in_bytes if stats else 0,
        by_buffers=by_buffers,
        largest=largest,
    )


def needed(step: LaidOut) -> dict[str, int]:
    """Bytes of a device that the step needs by count, by what needs them; their sum is no bound, but near one.

    Gathered layers are of the compute type and whole over fsdp. A layer that is recomputed has all its values, the
    gradient of its output and that of its widest product (counting.activations). A chunk of logits is float32.
    """
    config, sizes = step.config, dict(step.mesh.shape)
    spec, trainable = Spec.from_config(config), freezing.split(step.state["params"], config.optimizer.freeze)[0]
    kept, working = counting.activations(config, sizes["expert"], sizes["tensor"])
    parts = math.prod(sizes[axis] for axis in BATCH_AXES)
    found = {
        "parameters": _shards(step.state["params"]),
        "optimizer": _shards(step.state["opt_state"]),
        "gradients": _shards(trainable),
        "two gathered layers": 2 * {"bfloat16": 2, "float32": 4}[spec.dtype] * _largest_layer(step.state["params"]),
        "saved activations": kept // parts,
        "one layer recomputed": working // parts,
    }
    if "head" in step.state["params"] or spec.tie_embeddings and spec.family not in ("contrastive", "aim"):
        positions = -(-config.batch_rows // config.gradient_accumulation) * config.row_length
        columns = -(-spec.vocab_size // chunks_of(positions, spec.vocab_size))
        found["one chunk of logits"] = counting.FLOAT32 * positions * columns // (parts * sizes["tensor"])
    return found


def _shards(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _largest_layer(params: Any) -> int:
    """Values of the largest layer's parameters on a device that has them whole over fsdp."""
    layers: Counter[str] = Counter()
    for name, weight in by_name(params).items():
        if layer := layer_of(name):
            layers[layer] += math.prod(gathered_shape(weight)[1:])
    return max(layers.values(), default=0)


def _lengths(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in dims if n > 1)


def _sorted(
    step: CompiledStep, program: Program, fullest: tuple[Buffer, ...]
) -> tuple[Counter[str], tuple[tuple[str, str, int], ...]]:
    """Bytes of buffers by kind, and the largest of them."""
    params = by_name(step.state["params"])
    shards = {_lengths(x.sharding.shard_shape(x.shape)) for x in params.values()}
    stacks = {x.shape[0] for name, x in params.items() if layer_of(name)}
    made = {i.name: i for inside in program.computations.values() for i in inside.values()}
    kinds: Counter[str] = Counter()
    told = []
    for buffer in fullest:
        dtype, dims = buffer.shape
        source = made[buffer.instruction].source if buffer.instruction in made else ""
        if _lengths(dims) in shards and (dtype == "f32" or "transpose(" in source) and not source.startswith("state["):
            kinds["gradients"] += buffer.size
        elif len(dims) > 2 and dims[0] in stacks and _lengths(dims) not in shards:
            kinds["activations"] += buffer.size
        told.append((f"{dtype}[{','.join(map(str, dims))}]", source, buffer.size))
    return kinds, tuple(sorted(told, key=lambda one: -one[2])[:_LISTED])
