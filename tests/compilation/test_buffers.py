"""The compiler's account of memory, as libtpu writes it."""

from nmm_jax.compilation.buffers import Buffer, parse, read

ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 reduce_sum.2 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}, maybe-live-out, must-alias:
 value: <22 param @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 2: size 512, output shape is |f32[128]|, maybe-live-out:
 value: <29 all-reduce @0> (size=512,offset=0): f32[128]{0:T(128)}
allocation 3: size 64, constant:
 value: <30 constant.1 @0> (size=64,offset=0): s32[16]{0:T(128)}
allocation 8: size 128, color 2, preallocated-temp:
 value: <27 copy-start{2} @2> (size=4,offset=0): u32[]{:S(2)}
allocation 9: size 10240, preallocated-temp:
 value: <31 while.1{} @0> (size=16,offset=8192): (s32[]{:T(128)}, bf16[4,512]{1,0:T(8,128)(2,1)})
 value: <32 while.1{1} (phi) @0> (size=4096,offset=0): bf16[4,512]{1,0:T(8,128)(2,1)}
 value: <33 fusion.2 @0> (size=4096,offset=0): bf16[4,512]{1,0:T(8,128)(2,1)}
 value: <34 gather.3 @0> (size=2048,offset=4096): bf16[1024]{0:T(1024)(128)(2,1)}
 value: <35 logits.4 @0> (size=4096,offset=4096): f32[1024]{0:T(1024)}
 value: <36 piece.5{0,1} @0> (size=1024,offset=1024): bf16[512]{0:T(512)(128)(2,1)}
allocation 10: size 917504, color 1, preallocated-temp:
 value: <23 convert @1> (size=917504,offset=0): bf16[458752]{0:T(1024)(128)(2,1)S(1)}

Used values:
<22 param @0>
"""

# The fullest moment is 6: what the loop carries (which fusion.2 makes in its place) and logits.4.
RANGES = """\
HloLiveRange (max 9):
  InstructionSequence:
    0:param
  BufferLiveRange:
    param{}:0-9
    while.1{}:1-7
    while.1{1}:1-7
    fusion.2{}:6-7
    gather.3{}:2-4
    logits.4{}:6-8
    piece.5{0,1}:8-9
    convert{}:1-3
  Live ranges at 6 (peak):
    while.1{1}: 4096 bytes (cumulative: 4096 bytes)
"""


def test_parse():
    found = parse(ASSIGNMENT, RANGES)
    assert found.total == 4096 + 512 + 64 + 10240  # neither a thread's own nor what lies in another memory
    assert found.temporary == 10240
    kept = found.fullest[0]
    assert kept.shape == ("bf16", (4, 512)) and kept.size == 4096 and kept.offset == 0
    assert found.fullest[1:] == (Buffer("logits.4", (), ("f32", (1024,)), 4096, 4096),)


def test_without_times():
    assert parse(ASSIGNMENT, None).fullest is None


def test_read(tmp_path):
    assert read(str(tmp_path)) is None
    (tmp_path / "module_0000.jit_step.cl_1.after_optimizations-buffer-assignment.txt").write_text(ASSIGNMENT)
    (tmp_path / "module_0000.jit_step.cl_1.after_optimizations-live-range.txt").write_text(RANGES)
    assert read(str(tmp_path)) == parse(ASSIGNMENT, RANGES)
