"""Programs read from text: excerpts as the TPU compiler writes them, and loops whose turns it does not write down."""

import pytest

from nmm_jax.compilation.program import Program, bytes_of, parts_of, shapes_in

# Three layers of which the first is peeled off, in each a loop over four blocks by twos, backwards; and one on data.
LOOPS = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%inner_body (p.1: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %n.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n.2 = s32[]{:T(128)S(6)} copy(%n.1)
  %two.1 = s32[]{:T(128)} constant(2)
  %less.1 = s32[]{:T(128)} subtract(%n.2, %two.1)
  %x.1 = f32[8]{0:T(128)} get-tuple-element(%p.1), index=1
  %last.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=2
  ROOT %t.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%less.1, %x.1, %last.1)
}

%inner_left (p.2: (s32[], f32[8], s32[])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %n.3 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %more.1 = pred[]{:T(512)} compare(%zero.1, %n.3), direction=LT
}

%fused (q.1: f32[8]) -> f32[8] {
  %q.1 = f32[8]{0:T(128)} parameter(0)
  ROOT %sine.1 = f32[8]{0:T(128)} sine(%q.1), metadata={op_name="jit(step)/while/body/sin"}
}

%layer (p.3: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p.3 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %n.4 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  %one.1 = s32[]{:T(128)} constant(1)
  %next.1 = s32[]{:T(128)} add(%one.1, %n.4)
  %x.2 = f32[8]{0:T(128)} get-tuple-element(%p.3), index=1
  %blocks.1 = s32[]{:T(128)} get-tuple-element(%p.3), index=2
  %t.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%blocks.1, %x.2, %blocks.1)
  %while.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) while(%t.2), condition=%inner_left, body=%inner_body
  %x.3 = f32[8]{0:T(128)} get-tuple-element(%while.1), index=1
  %y.1 = f32[8]{0:T(128)} fusion(%x.3), kind=kLoop, calls=%fused
  ROOT %t.3 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%next.1, %y.1, %blocks.1)
}

%layers_left (p.4: (s32[], f32[8], s32[])) -> pred[] {
  %three.1 = s32[]{:T(128)} constant(3)
  %p.4 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %n.5 = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  ROOT %more.2 = pred[]{:T(512)} compare(%n.5, %three.1), direction=LT
}

%data_body (p.5: (f32[8], s32[])) -> (f32[8], s32[]) {
  %p.5 = (f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %x.4 = f32[8]{0:T(128)} get-tuple-element(%p.5), index=0
  %y.2 = f32[8]{0:T(128)} fusion(%x.4), kind=kLoop, calls=%fused
  %n.6 = s32[]{:T(128)} get-tuple-element(%p.5), index=1
  %one.2 = s32[]{:T(128)} constant(1)
  %next.2 = s32[]{:T(128)} subtract(%n.6, %one.2)
  ROOT %t.4 = (f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%y.2, %next.2)
}

%data_left (p.6: (f32[8], s32[])) -> pred[] {
  %p.6 = (f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %n.7 = s32[]{:T(128)} get-tuple-element(%p.6), index=1
  %zero.2 = s32[]{:T(128)} constant(0)
  ROOT %more.3 = pred[]{:T(512)} compare(%n.7, %zero.2), direction=GT
}

ENTRY %main (x.5: f32[8], n.8: s32[]) -> f32[8] {
  %x.5 = f32[8]{0:T(128)} parameter(0), metadata={op_name="x"}
  %n.8 = s32[]{:T(128)} parameter(1)
  %one.3 = s32[]{:T(128)} constant(1)
  %one.4 = s32[]{:T(128)} copy(%one.3)
  %four.1 = s32[]{:T(128)} constant(4)
  %t.5 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%one.4, %x.5, %four.1)
  %while.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) while(%t.5), condition=%layers_left, body=%layer
  %x.6 = f32[8]{0:T(128)} get-tuple-element(%while.2), index=1
  %t.6 = (f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%x.6, %n.8)
  %while.3 = (f32[8]{0:T(128)}, s32[]{:T(128)}) while(%t.6), condition=%data_left, body=%data_body
  ROOT %x.7 = f32[8]{0:T(128)} get-tuple-element(%while.3), index=0
}
"""


def loop(program, name):
    return next((c, i) for c, inside in program.computations.items() for i in inside.values() if i.name == name)


def test_what_a_line_says():
    program = Program(LOOPS)
    assert program.entry == "main" and program.partitions == 4
    y = program.computations["layer"]["y.1"]
    assert (y.op, y.operands, y.called, y.shapes, y.bytes) == ("fusion", ("x.3",), ["fused"], [("f32", (8,))], 32)
    assert program.roots["fused"].source == "jit(step)/while/body/sin"
    assert program.computations["layer"]["one.1"].literal == "1"
    assert program.computations["main"]["n.8"].literal == "1"  # the second parameter
    assert program.origin("inner_body", "n.2").name == "n.1"


@pytest.mark.parametrize(("name", "trips"), [("while.1", 2), ("while.2", 2), ("while.3", None)])
def test_turns_are_counted_where_the_compiler_does_not_write_them(name, trips):
    """while.1 counts 4, 2 from what the outer loop carries unchanged; while.2 1, 2 from behind a copy."""
    program = Program(LOOPS)
    assert program.trips(*loop(program, name)) == trips


@pytest.mark.parametrize("fused", [False, True])
def test_a_loop_until_the_smaller_of_data_and_a_constant_runs_as_often_at_most(fused):
    """As for TPUs, and as for CPUs, where each of these small things is a fusion."""
    made, added, compared = ("minimum(%n, %seven)", "add(%i, %one)", "compare(%j, %until), direction=LT")
    if fused:
        made, added, compared = (
            f"fusion({operands}), kind=kLoop, calls=%{name}"
            for operands, name in (("%n", "smaller"), ("%one, %i", "sum"), ("%until, %j", "less"))
        )
    text = f"""\
%smaller (a: s32[]) -> s32[] {{
  %a = s32[] parameter(0)
  %five = s32[] constant(5)
  ROOT %m = s32[] minimum(%five, %a)
}}

%sum (b: s32[], d: s32[]) -> s32[] {{
  %b = s32[] parameter(0)
  %d = s32[] parameter(1)
  ROOT %both = s32[] add(%d, %b)
}}

%less (e: s32[], f: s32[]) -> pred[] {{
  %e = s32[] parameter(0)
  %f = s32[] parameter(1)
  ROOT %is = pred[] compare(%f, %e), direction=LT
}}

%body (s: (s32[], s32[])) -> (s32[], s32[]) {{
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %most = s32[] get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] {added}
  ROOT %t = (s32[], s32[]) tuple(%next, %most)
}}

%condition (c: (s32[], s32[])) -> pred[] {{
  %c = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %until = s32[] get-tuple-element(%c), index=1
  ROOT %left = pred[] {compared}
}}

ENTRY %main (n: s32[]) -> (s32[], s32[]) {{
  %n = s32[] parameter(0)
  %seven = s32[] constant(7)
  %bound = s32[] {made}
  %start = s32[] constant(2)
  %all = (s32[], s32[]) tuple(%start, %bound)
  ROOT %while.1 = (s32[], s32[]) while(%all), condition=%condition, body=%body
}}
"""
    assert Program(text).runs()["body"] == (3 if fused else 5)


def test_runs():
    program = Program(LOOPS)
    with pytest.raises(ValueError, match="loop while.3 .* depends on data; give `trips`"):
        program.runs()
    runs = program.runs(lambda _, loop: 10 if loop.name == "while.3" else 0)
    assert runs["main"] == 1 and runs["layer"] == 2 and runs["inner_body"] == 4
    assert runs["fused"] == 2 + 10
    assert program.in_loops() == {"layer", "inner_body", "inner_left", "fused", "data_body"}


def test_what_an_asynchronous_start_calls_runs_once():
    text = """\
%wrapped (q: f32[2]) -> f32[8] {
  %q = f32[2]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%q), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: f32[2]) -> f32[8] {
  %x = f32[2]{0} parameter(0)
  %start = ((f32[2]{0}), f32[8]{0}) async-start(%x), calls=%wrapped
  %update = ((f32[2]{0}), f32[8]{0}) async-update(%start), calls=%wrapped
  ROOT %done = f32[8]{0} async-done(%update), calls=%wrapped
}
"""
    assert Program(text).runs() == {"wrapped": 1, "main": 1}


def test_types():
    text = "(bf16[1,16]{1,0:T(8,128)(2,1)}, (f32[], /*index=5*/u32[2]{0:S(2)}), token[], f8e4m3fn[3,5]{1,0}, s4[3])"
    assert parts_of(text)[:2] == ["bf16[1,16]{1,0:T(8,128)(2,1)}", "(f32[], u32[2]{0:S(2)})"]
    shapes = shapes_in(text)
    assert shapes == [("bf16", (1, 16)), ("f32", ()), ("u32", (2,)), ("f8e4m3fn", (3, 5)), ("s4", (3,))]
    assert [bytes_of(shape) for shape in shapes] == [32, 4, 8, 15, 2]
    assert parts_of("f32[2]{0}") == ["f32[2]{0}"]
