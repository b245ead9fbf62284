"""Collectives found in excerpts of compiled programs, and in a program for eight simulated devices."""

import json
import pathlib
import subprocess
import sys

import pytest
from test_device_groups import mesh_of

from nmm_jax.compilation.collectives import collectives, summary
from nmm_jax.compilation.program import Program

ADD = """\
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

"""


def program(lines, computations="", partitions=8):
    """With these lines in its entry, and others that they call."""
    return Program(
        f"HloModule jit_step, is_scheduled=true, num_partitions={partitions}\n\n{ADD}{computations}\n"
        f"ENTRY %main (x: f32[8,16]) -> f32[8,16] {{\n{lines}\n}}\n"
    )


def found(lines, computations="", mesh=None, partitions=8):
    return collectives(program(lines, computations, partitions), mesh or mesh_of(fsdp=4, tensor=2))


X = "  %x = f32[8,16]{1,0} parameter(0)\n"
FSDP = "channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true"


@pytest.mark.parametrize(
    ("lines", "kind", "dtype", "shapes"),
    [
        (f"  ROOT %g = f32[32,16]{{1,0}} all-gather(%x), {FSDP}, dimensions={{0}}", "all-gather", "f32", ((32, 16),)),
        (f"  ROOT %g = f32[2,16] reduce-scatter(%x), {FSDP}, to_apply=%add", "reduce-scatter", "f32", ((8, 16),)),
        (f"  ROOT %g = f32[8,16]{{1,0}} all-reduce(%x), {FSDP}, to_apply=%add", "all-reduce", "f32", ((8, 16),)),
        (
            f"  %s = (f32[8,16]{{1,0}}, f32[32,16]{{1,0:S(1)}}) all-gather-start(%x), {FSDP}, dimensions={{0}}\n"
            "  ROOT %g = f32[32,16]{1,0} all-gather-done(%s)",
            "all-gather", "f32", ((32, 16),),
        ),
        (
            f"  %s = ((f32[8,16]{{1,0}}), f32[2,16]{{1,0}}) reduce-scatter-start(%x), {FSDP}, to_apply=%add\n"
            "  ROOT %g = f32[2,16]{1,0} reduce-scatter-done(%s)",
            "reduce-scatter", "f32", ((8, 16),),
        ),
        (
            f"  %s = (f32[8,16]{{1,0}}, f32[8,16]{{1,0}}) all-reduce-start(%x, %x), {FSDP}, to_apply=%add\n"
            "  ROOT %g = (f32[8,16]{1,0}, f32[8,16]{1,0}) all-reduce-done(%s)",
            "all-reduce", "f32", ((8, 16), (8, 16)),
        ),
        (
            "  %s = (f32[8,16]{1,0}, f32[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), "
            "source_target_pairs={{0,2},{2,0}}\n  ROOT %g = f32[8,16]{1,0} collective-permute-done(%s)",
            "collective-permute", "f32", ((8, 16),),
        ),
        (
            f"  ROOT %g = (f32[2,16]{{1,0}}, f32[2,16]{{1,0}}) all-to-all(%x, %x), {FSDP}",
            "all-to-all", "f32", ((2, 16), (2, 16)),
        ),
        (  # of a buffer with room for all rows of the axis
            f"  %y = f32[32,16]{{1,0}} broadcast(%x)\n  %n = s32[4]{{0}} iota()\n"
            f"  ROOT %g = f32[32,16]{{1,0}} ragged-all-to-all(%x, %y, %n, %n, %n, %n), {FSDP}",
            "ragged-all-to-all", "f32", ((8, 16),),
        ),
    ],
)  # fmt: skip
def test_kinds(lines, kind, dtype, shapes):
    (one,) = found(X + lines)
    assert (one.kind, one.axes, one.dtype, one.shapes, one.count) == (kind, ("fsdp",), dtype, shapes, 1)
    assert one.bytes == 4 * sum(a * b for a, b in shapes)
    assert not (one.in_loop or one.emulates or one.across_slices or one.uncertain)


def test_one_device_says_nothing_to_itself():
    assert not found(X + "  ROOT %g = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}")


def test_a_fusion_that_scatters_a_sum():
    computations = f"""\
%all-reduce-scatter.3 (input: f32[8,16]) -> f32[2,16] {{
  %input = f32[8,16]{{1,0}} parameter(0)
  %all-reduce.1 = f32[8,16]{{1,0}} all-reduce(%input), {FSDP}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = f32[2,16]{{1,0}} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={{2,16}}
}}
"""
    (one,) = found(X + "  ROOT %r = f32[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3", computations)
    assert (one.kind, one.shapes, one.computation) == ("reduce-scatter", ((8, 16),), "all-reduce-scatter.3")


def test_a_gather_that_is_cut_over_fusions_counts_once():
    def part(name, custom):
        gather = f'{FSDP}, frontend_attributes={{chain_id="8"}}, dimensions={{0}}'
        return f"""\
%{name} (p.{name}: f32[8,16]) -> f32[32,16] {{
  %p.{name} = f32[8,16]{{1,0}} parameter(0)
  %g.{name} = f32[32,16]{{1,0}} all-gather(%p.{name}), {gather}
  ROOT %c.{name} = f32[32,16]{{1,0}} custom-call(%g.{name}), custom_call_target="{custom}"
}}

"""

    computations = part("first", "AsyncCollectiveStart") + part("middle", "Other") + part("last", "AsyncCollectiveDone")
    lines = "".join(
        f"  %{name}.1 = f32[32,16]{{1,0}} fusion(%x), kind=kCustom, calls=%{name}\n"
        for name in ("first", "middle", "last")
    )
    assert [c.name for c in found(X + lines, computations)] == ["g.first"]


# One all-reduce of two weights' padded shards, one of them made in a fusion and both copied, and of a gradient.
PADDED = """\
%pad (shard: bf16[4,16], at: s32[]) -> bf16[16,16] {
  %zero.1 = bf16[] constant(0)
  %zeros.1 = bf16[16,16]{1,0} broadcast(%zero.1), dimensions={}
  %shard = bf16[4,16]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %padded.1 = bf16[16,16]{1,0} dynamic-update-slice(%zeros.1, %shard, %at, %at)
}

%write (kept: bf16[16,16], part: bf16[4,16], at.1: s32[]) -> bf16[16,16] {
  %kept = bf16[16,16]{1,0} parameter(0)
  %part = bf16[4,16]{1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  ROOT %written.1 = bf16[16,16]{1,0} dynamic-update-slice(%kept, %part, %at.1, %at.1)
}
"""


def test_shards_that_are_summed_with_zeros_are_gathered():
    lines = f"""\
  %w = bf16[4,16]{{1,0}} parameter(0)
  %place = s32[] parameter(1)
  %zero.2 = bf16[] constant(0)
  %zeros.2 = bf16[16,16]{{1,0}} broadcast(%zero.2), dimensions={{}}
  %padded.2 = bf16[16,16]{{1,0}} dynamic-update-slice(%zeros.2, %w, %place, %place)
  %padded.3 = bf16[16,16]{{1,0:S(1)}} fusion(%w, %place), kind=kLoop, calls=%pad
  %start.1 = (bf16[16,16]{{1,0}}, bf16[16,16]{{1,0:S(1)}}, u32[]{{:S(2)}}) copy-start(%padded.3)
  %done.1 = bf16[16,16]{{1,0}} copy-done(%start.1)
  %gradient = bf16[16,8]{{1,0}} dot(%padded.2, %done.1), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}
  %kept.2 = bf16[16,16]{{1,0}} multiply(%padded.2, %done.1)
  %written.2 = bf16[16,16]{{1,0}} fusion(%kept.2, %w, %place), kind=kLoop, calls=%write
  %sum = (bf16[16,16]{{1,0}}, bf16[16,16]{{1,0}}, bf16[16,8]{{1,0}}, bf16[16,16]{{1,0}}) \
all-reduce(%padded.2, %done.1, /*index=2*/%gradient, %written.2), {FSDP}, to_apply=%add
"""
    gathers, sums = found(lines, PADDED)
    assert (gathers.kind, gathers.emulates, gathers.shapes) == ("all-reduce", "all-gather", ((16, 16), (16, 16)))
    assert (sums.emulates, sums.shapes, sums.bytes) == ("", ((16, 8), (16, 16)), 2 * 16 * 24)


def loops(condition):
    """Permutes in a windowed einsum of 4 turns, in a loop over 3 layers."""
    return f"""\
%windowed_dot_general_body_ag.1.clone (p.1: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {{
  %p.1 = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %n.1 = s32[] get-tuple-element(%p.1), index=0
  %one.1 = s32[] constant(1)
  %next.1 = s32[] add(%n.1, %one.1)
  %y.1 = f32[8,16]{{1,0}} get-tuple-element(%p.1), index=1
  %s.1 = (f32[8,16]{{1,0}}, f32[8,16]{{1,0}}, u32[], u32[]) collective-permute-start(%y.1), \
source_target_pairs={{{{0,2}},{{2,4}},{{4,6}},{{6,0}},{{1,3}},{{3,5}},{{5,7}},{{7,1}}}}
  %d.1 = f32[8,16]{{1,0}} collective-permute-done(%s.1)
  ROOT %t.1 = (s32[], f32[8,16]{{1,0}}) tuple(%next.1, %d.1)
}}

%window (p.2: (s32[], f32[8,16])) -> pred[] {{
  %p.2 = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %n.2 = s32[] get-tuple-element(%p.2), index=0
  %four = s32[] constant(4)
  ROOT %more.1 = pred[] compare(%n.2, %four), direction=LT
}}

%layer (p.3: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {{
  %p.3 = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %n.3 = s32[] get-tuple-element(%p.3), index=0
  %one.2 = s32[] constant(1)
  %next.2 = s32[] add(%n.3, %one.2)
  %y.2 = f32[8,16]{{1,0}} get-tuple-element(%p.3), index=1
  %zero.1 = s32[] constant(0)
  %t.2 = (s32[], f32[8,16]{{1,0}}) tuple(%zero.1, %y.2)
  %while.1 = (s32[], f32[8,16]{{1,0}}) while(%t.2), condition=%window, body=%windowed_dot_general_body_ag.1.clone
  %y.3 = f32[8,16]{{1,0}} get-tuple-element(%while.1), index=1
  ROOT %t.3 = (s32[], f32[8,16]{{1,0}}) tuple(%next.2, %y.3)
}}

%layers (p.4: (s32[], f32[8,16])) -> pred[] {{
  %p.4 = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %n.4 = s32[] get-tuple-element(%p.4), index=0
  {condition}
}}
"""


LAYERS = (
    X
    + """\
  %zero.2 = s32[] constant(0)
  %t.4 = (s32[], f32[8,16]{1,0}) tuple(%zero.2, %x)
  %while.2 = (s32[], f32[8,16]{1,0}) while(%t.4), condition=%layers, body=%layer
"""
)


def test_permutes_of_a_windowed_einsum():
    counted = "%three = s32[] constant(3)\n  ROOT %more.2 = pred[] compare(%n.4, %three), direction=LT"
    (one,) = found(LAYERS, loops(counted))
    assert (one.kind, one.emulates, one.axes) == ("collective-permute", "all-gather", ("fsdp",))
    assert (one.count, one.in_loop, one.uncertain, one.devices) == (12, True, False, (0, 2, 4, 6))


def test_a_loop_on_data_counts_as_one_turn_and_says_so():
    on_data = "%more.3 = pred[] custom-call(%n.4)\n  ROOT %not = pred[] not(%more.3)"
    (one,) = found(LAYERS, loops(on_data))
    assert (one.count, one.in_loop, one.uncertain) == (4, True, True)
    assert summary([one])[0]["uncertain"]


def test_what_goes_across_slices():
    megascale = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_reduce_operation="SUM",'
        '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = f"""\
  %x = bf16[2,8,128]{{2,1,0}} parameter(0)
  %token = token[] after-all()
  %send.1 = (bf16[2,8,128]{{2,1,0}}, u32[], token[]) send(%x, %token), channel_id=1, {megascale}
  %recv.1 = (bf16[2,8,128]{{2,1,0}}, u32[], token[]) recv(%token), channel_id=2, {megascale}
  %done.1 = token[] send-done(%send.1), channel_id=1
  %done.2 = (bf16[2,8,128]{{2,1,0}}, token[]) recv-done(%recv.1), channel_id=2
  %y = bf16[2,8,128]{{2,1,0}} all-reduce(%x), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
"""
    across, within = found(lines, mesh=mesh_of(slices=2, replica=2, fsdp=4), partitions=4)
    assert (across.kind, across.axes, across.across_slices) == ("all-reduce", ("replica",), True)
    assert (across.bytes, across.devices) == (2 * 2 * 8 * 128, (0, 4))
    assert (within.kind, within.axes, within.across_slices) == ("all-reduce", ("fsdp",), False)


def test_summary():
    gather = f"  %g.1 = f32[32,16]{{1,0}} all-gather(%x), {FSDP}, dimensions={{0}}\n"
    tensor = "  %r = bf16[8]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add\n"
    rows = summary(found(X + gather + gather.replace("g.1", "g.2").replace("32,16", "8,8") + tensor))
    common = {"in_loop": False, "emulates": "", "across_slices": False, "uncertain": False}
    assert rows == [
        common | {"kind": "all-gather", "axes": ["fsdp"], "dtype": "f32", "group": 4, "count": 2, "bytes": 2304,
                  "largest": 2048},
        common | {"kind": "all-reduce", "axes": ["tensor"], "dtype": "bf16", "group": 2, "count": 1, "bytes": 16,
                  "largest": 16},
    ]  # fmt: skip
    assert json.loads(json.dumps(rows)) == rows


def test_a_program_for_eight_devices():
    script = pathlib.Path(__file__).with_name("collectives_eight_devices.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    by_kind = {kind: rest for kind, *rest in json.loads(run.stdout) if rest[-1]}
    shard = 4 * 8 * 16  # bytes of what a device has
    assert by_kind == {
        "all-gather": [["fsdp"], [0, 4], "f32", 2 * shard, 6, True],
        "reduce-scatter": [["fsdp"], [0, 4], "f32", 2 * shard, 6, True],
        "all-reduce": [["tensor"], [0, 1], "f32", shard, 6, True],
        "all-to-all": [["expert"], [0, 2], "f32", shard, 6, True],
        "collective-permute": [["fsdp"], [0, 4], "f32", shard, 6, True],
    }
    (outside,) = [rest for kind, *rest in json.loads(run.stdout) if not rest[-1]]
    assert outside[0] == ["fsdp", "expert"] and outside[-2:] == [1, False]
