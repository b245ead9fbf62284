"""What should not be in a step is found in excerpts of one, and what should be is not."""

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from nmm_jax.compilation.collectives import Collective
from nmm_jax.compilation.defects import dense_experts, emulated_gathers, host_transfers, whole_gradients
from nmm_jax.compilation.program import Program

MESH = AbstractMesh((1, 16, 2, 2), ("replica", "fsdp", "expert", "tensor"))


def weight(shape, *axes):
    return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(MESH, PartitionSpec(*axes)))


PARAMS = {
    "embed": {"tokens": weight((4096, 1024), "tensor", "fsdp")},
    "positions": weight((1024, 512)),
    "layers": {
        "ffn": {"up": weight((3, 1024, 2048), None, "fsdp", "tensor")},
        "norm": weight((3, 1024), None, None),
        "experts": {"down": weight((3, 8, 512, 1024), None, "expert", "tensor", "fsdp")},
    },
}


def collective(*shapes, **changes):
    of_dtype = {"kind": "all-reduce", "axes": ("fsdp",), "devices": (0, 4), "dtype": "f32", "count": 3}
    size = 4 * sum(a * b for a, b in shapes)
    rest = {"in_loop": True, "emulates": "", "across_slices": False, "uncertain": False}
    named = {"name": "all-reduce.1", "computation": "main", "source": "jit(step)/dot_general"}
    return Collective(**(of_dtype | rest | named | {"shapes": shapes, "bytes": size} | changes))


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        # of one layer, as the devices of the other axes share it
        ((1024, 1024), "the size of a gradient of layers/ffn/up or layers/experts/down"),
        ((2048, 1024), "the size of a gradient of embed/tokens"),
        ((1024, 7205), "no weight's size"),  # a chunk of an unembedding
        ((512, 1024), None),  # of positions, which every device has whole
        ((128, 1024), None),  # small
    ],
)
def test_whole_gradients(shape, said):
    found = whole_gradients([collective(shape)], PARAMS)
    if said is None:
        assert not found
    else:
        (sentence,) = found
        assert sentence.startswith(f"f32[{shape[0]},{shape[1]}] is summed whole over fsdp, 3 times a step")
        assert said in sentence


@pytest.mark.parametrize(
    "changes", [{"kind": "reduce-scatter"}, {"kind": "all-gather"}, {"axes": ("tensor",)}, {"emulates": "all-gather"}]
)
def test_other_collectives_of_the_size_are_no_whole_gradients(changes):
    assert not whole_gradients([collective((1024, 1024), **changes)], PARAMS)


def test_emulated_gathers_are_summed_up():
    padded = {"emulates": "all-gather"}
    permutes = collective((1024, 1024), kind="collective-permute", **padded)
    found = [collective((1024, 1024), **padded), collective((512, 1024), **padded), collective((1024, 1024)), permutes]
    (sentence,) = emulated_gathers(found)
    assert sentence.startswith("0.0189 GB a step are gathered over fsdp by all-reduces of shards")
    assert not emulated_gathers([*found, *[collective((4096, 4096), kind="all-gather")] * 300])  # under a thousandth


DOTS = """\
ENTRY %main (rows: bf16[8,64,512], weights: bf16[8,512,1024]) -> f32[{result}] {{
  %rows = bf16[{rows}]{{2,1,0}} parameter(0)
  %weights = bf16[{weights}]{{2,1,0}} parameter(1)
  ROOT %d = f32[{result}]{{2,1,0}} dot(%rows, %weights), lhs_contracting_dims={{{left}}}, rhs_contracting_dims={{1}}, \
metadata={{op_name="jit(step)/ragged_dot"}}
}}
"""


@pytest.mark.parametrize(
    ("rows", "weights", "result", "left", "dense"),
    [
        ("4,64,256", "4,256,1024", "4,64,1024", 2, True),  # all 4 of a device's experts
        ("4,256,64", "4,64,1024", "4,256,1024", 2, True),  # their gradient
        ("1,64,256", "1,256,1024", "1,64,1024", 2, False),  # one of them
    ],
)
def test_dense_experts(rows, weights, result, left, dense):
    program = Program(DOTS.format(rows=rows, weights=weights, result=result, left=left))
    found = dense_experts(program, PARAMS)
    assert bool(found) == dense
    assert not dense or "jit(step)/ragged_dot" in found[0]


HOST = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %kept = f32[8]{0:S(5)} parameter(1)
  %token = token[] after-all()
  %send.1 = (f32[8]{0}, u32[], token[]) send(%x, %token), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send.2 = (f32[8]{0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true
  %done.2 = token[] send-done(%send.2), channel_id=2, is_host_transfer=true
  %copy.1 = (f32[8]{0}, f32[8]{0:S(5)}, u32[]) copy-start(%kept)
  %copy.2 = f32[8]{0} copy-done(%copy.1)
  %tuple.1 = (f32[8]{0}, f32[8]{0:S(5)}) tuple(%x, %kept)
  %call.1 = f32[8]{0} custom-call(%x), custom_call_target="xla_ffi_python_cpu_callback"
  %call.2 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %out.1 = token[] outfeed(%x, %token)
}
"""


def test_host_transfers():
    assert [i.name for i in host_transfers(Program(HOST))] == ["send.2", "copy.1", "call.1", "out.1"]
