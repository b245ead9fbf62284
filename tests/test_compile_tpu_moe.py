"""The exact MoE training step, compiled for a TPU v5p slice without a TPU: what crosses the network, what is made."""

import contextlib
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nmm_jax.compilation.products import products_in
from nmm_jax.compilation.program import Instruction, Program
from nmm_jax.models.moe import lacks_ragged
from nmm_jax.parallel.topology import Topology
from tests.tpu_compile import Compiled, compile_step

pytestmark = [pytest.mark.extras, pytest.mark.timeout(1800)]

CONFIG = "configs/moe.py:hw-1b-8e"
DEPTH, EXPERTS, WIDTH, FFN, VOCABULARY = 4, 8, 2048, 5632, 50_432
ROWS, LENGTH, DEVICES = 128, 1536, 64
TOKENS = ROWS * LENGTH // DEVICES  # of a device
MESHES = {"one expert a device": (8, 8), "two experts a device": (16, 4)}  # fsdp, expert
# Exchanges of a layer: rows there and back forwards, the same of their gradients, and (unless the backward pass finds
# what came kept) rows there and back once more.
EXCHANGES = {"full": 6, "exchanges": 4}
CASES = [("one expert a device", "full"), ("two experts a device", "exchanges")]


@functools.cache
def compiled(mesh: str, remat: str) -> Compiled:
    pytest.importorskip("libtpu")
    fsdp, expert = MESHES[mesh]
    overrides = {
        "batch_rows": ROWS,
        "row_length": LENGTH,
        "model.depth": DEPTH,
        "model.remat": remat,
        "mesh.fsdp": fsdp,
        "mesh.expert": expert,
    }
    return compile_step(CONFIG, overrides, "v5p:4x4x4")


@functools.cache
def program(mesh: str, remat: str) -> Program:
    return Program(compiled(mesh, remat).text)


def in_loops(program: Program) -> list[tuple[str, Instruction]]:
    """(computation, instruction) of all that loops run, each once: the layers' loops run a layer a turn."""
    found = {}
    for loop in program.loops():
        for computation, instruction in program.within(loop.attribute("body")):
            found[computation, instruction.name] = instruction
    return [(computation, instruction) for (computation, _), instruction in found.items()]


def group_size(instruction: Instruction) -> int:
    """Devices that a collective is among: {{0,1},{2,3}}, [2,2]<=[4] and mesh['a'=2,'b'=2] {'a'} are all 2."""
    text = instruction.attributes.split("replica_groups=", 1)[1]
    if text.startswith("{{"):
        return text[2:].split("}")[0].count(",") + 1
    if text.startswith("mesh["):
        sizes = dict(part.split("=") for part in text[5:].split("]")[0].replace("'", "").split(","))
        names = text.split("{", 1)[1].split("}")[0].replace("'", "").split(",")
        return math.prod(int(sizes[name]) for name in names)
    return int(text[1:].split("]")[0].split(",")[1])


@pytest.mark.parametrize(("mesh", "remat"), CASES)
def test_exchanges_of_a_layer(mesh, remat):
    _, expert = MESHES[mesh]
    exchanges = [i for _, i in in_loops(program(mesh, remat)) if i.op.startswith("ragged-all-to-all")]
    assert len(exchanges) == EXCHANGES[remat], [i.source for i in exchanges]
    assert all(group_size(i) == expert for i in exchanges)
    kept = [i for i in exchanges if "rematted_computation" in i.source]
    assert len(kept) == EXCHANGES[remat] - 4, [i.source for i in exchanges]


@pytest.mark.parametrize(("mesh", "remat"), CASES)
def test_gradients_of_experts_are_scattered_and_never_summed_whole(mesh, remat):
    fsdp, expert = MESHES[mesh]
    owned = EXPERTS // expert * WIDTH * FFN  # values of one matrix that a device of the expert axis is responsible for
    scattered = []
    for computation, i in in_loops(program(mesh, remat)):
        within_scatter = "reduce-scatter" in computation  # a fusion that the compiler names all-reduce-scatter
        if i.op in ("reduce-scatter", "reduce-scatter-start") or (within_scatter and i.op.startswith("all-reduce")):
            parts = fsdp if within_scatter else 1
            # In bfloat16 nothing is as large but the experts' gradients; the head's is float32.
            large = [dims for kind, dims in i.shapes if kind == "bf16" and math.prod(dims) >= owned // fsdp * parts]
            assert not large or group_size(i) == fsdp, i
            scattered += large
        elif i.op in ("all-reduce", "all-reduce-start"):
            # (Of attention's, the output's is summed whole where width / fsdp is 128: libtpu 0.0.42.)
            assert not any(FFN in dims or math.prod(dims) >= owned for _, dims in i.shapes), f"{i.type} {i.source}"
    assert len(scattered) == 3, scattered  # gate, up and down


@pytest.mark.parametrize(("mesh", "remat"), CASES)
def test_weights_are_gathered_in_bfloat16(mesh, remat):
    fsdp, expert = MESHES[mesh]
    owned = EXPERTS // expert * WIDTH * FFN
    gathers = [i for _, i in in_loops(program(mesh, remat)) if i.op in ("all-gather", "all-gather-start")]
    large = [i for i in gathers if any(math.prod(dims) >= owned for _, dims in i.shapes)]
    assert large and all(group_size(i) == fsdp for i in large)
    assert all(kind == "bf16" for i in large for kind, dims in i.shapes if math.prod(dims) >= owned // fsdp)


@pytest.mark.parametrize(("mesh", "remat"), CASES)
def test_nothing_has_a_row_for_every_expert_and_token(mesh, remat):
    """Experts are multiplied in kernels that visit the rows of each; a plain product would multiply them all."""
    _, expert = MESHES[mesh]
    this = program(mesh, remat)
    for name in this.computations:
        for product in products_in(this, name):
            assert not any(FFN in shape for shape in product.shapes), product
    kernels, rows = [], expert * TOKENS  # all tokens of the axis, should they all want this device's experts
    for computation in this.computations.values():
        for i in computation.values():
            for _, dims in i.shapes:
                of_layer = dims[1:] if dims[:1] == (DEPTH,) else dims  # the layers' are stacked
                # The embeddings on their way, padded to whole tiles; the unembedding's by chunks.
                of_vocabulary = VOCABULARY in dims or 1 <= math.prod(dims) / (VOCABULARY * WIDTH) < 1.02
                assert math.prod(of_layer) <= rows * FFN or of_vocabulary, f"{i.type} {i.op} {i.source}"
            if i.op == "custom-call" and "tpu_custom_call" in i.attributes:
                shapes = [dims for o in (i, *(computation[o] for o in i.operands)) for _, dims in o.shapes]
                kernels += [shapes] if any(FFN in dims for dims in shapes) else []  # the others are attention's
    # Three products forwards, two gradients of each, and what is computed again: under "exchanges" not the last.
    assert len(kernels) == 9 + {"full": 3, "exchanges": 2}[remat]
    matrices = {(EXPERTS // expert, WIDTH, FFN), (EXPERTS // expert, FFN, WIDTH)}
    for shapes in kernels:
        large = [dims for dims in shapes if math.prod(dims) >= rows * WIDTH]
        assert set(large) == {(rows, WIDTH), (rows, FFN)} and matrices & set(shapes), shapes


@pytest.mark.parametrize(("mesh", "remat"), CASES)
def test_memory(mesh, remat):
    memory = compiled(mesh, remat).memory
    print(json.dumps({"config": CONFIG, "depth": DEPTH, "mesh": MESHES[mesh], "remat": remat, **memory}))
    # 12 bytes a parameter, of experts over all devices, of the rest over those of fsdp; the batch comes on top.
    of_experts = DEPTH * EXPERTS * 3 * WIDTH * FFN
    state = 12 * (of_experts / DEVICES + (memory["parameters"] - of_experts) / MESHES[mesh][0])
    assert state <= memory["arguments"] <= 1.1 * state + (32 << 20), (state, memory)
    assert memory["temporary"] < 3 << 30, memory


@pytest.mark.parametrize(("topology", "there"), [("v5e:4x4", True), ("v5e:4x8", False), ("v6e:4x8", True)])
def test_where_tpus_have_no_exchange_of_unequal_parts(topology, there):
    """What choose_transport knows of them is so."""
    pytest.importorskip("libtpu")
    devices = np.array(Topology.parse(topology, 1).devices()).reshape(-1, EXPERTS)
    mesh = Mesh(devices, ("fsdp", "expert"))
    assert bool(lacks_ragged(mesh)) is not there
    cut = PartitionSpec(("fsdp", "expert"))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(cut, cut), out_specs=cut, check_vma=False)
    def exchange(rows, sizes):
        places = 8 * jnp.arange(EXPERTS, dtype=jnp.int32)
        return jax.lax.ragged_all_to_all(rows, rows, places, sizes, places, sizes, axis_name="expert")

    shapes = ((devices.size * 64, 128), jnp.bfloat16), ((devices.size * EXPERTS,), jnp.int32)
    given = [jax.ShapeDtypeStruct(*x, sharding=NamedSharding(mesh, cut)) for x in shapes]
    refused = contextlib.nullcontext() if there else pytest.raises(jax.errors.JaxRuntimeError, match="limited ICI")
    with refused:
        jax.jit(exchange).lower(*given).compile()
