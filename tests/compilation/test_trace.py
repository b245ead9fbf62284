"""Time by part and pass from a trace: hand-made events, and the planes of the backends by their own names."""

import types

import pytest

from nmm_jax.compilation import trace
from nmm_jax.compilation.program import Program
from nmm_jax.compilation.trace import Event, covered, own_times, part_of, pass_of, profile_of, table

TEXT = """\
HloModule jit_step, num_partitions=1

%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %gate.1 = f32[8]{0} negate(%x), metadata={op_name="jit(step)/jvp()/while/body/ffn/jit(silu)/mul"}
  ROOT %scores.2 = f32[8]{0} negate(%gate.1), metadata={op_name="jit(step)/jvp()/while/body/attention/attend/exp"}
}

%condition (y: f32[8]) -> pred[] {
  ROOT %y = pred[] parameter(0)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %loop.3 = f32[8]{0} while(%p), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp()/while"}
  %all-reduce.4 = f32[8]{0} all-reduce(%loop.3), metadata={op_name="jit(step)/transpose(jvp(loss))/add"}
  ROOT %adam.5 = f32[8]{0} negate(%all-reduce.4), metadata={op_name="jit(step)/optimizer/mul"}
}
"""


def step(start, device="d0"):
    """10 us: a loop of 6 with 2 x (2 + 0.5) inside, an all-reduce of 1, a gap of 2, the update of 1."""
    spans = [("loop.3", 0, 6), ("gate.1", 0, 2), ("scores.2", 2, 2.5), ("gate.1", 3, 5), ("scores.2", 5, 5.5)]
    spans += [("all-reduce.4", 6, 7), ("adam.5", 9, 10)]
    return [Event(device, "0", name, 1e3 * (start + a), 1e3 * (start + b)) for name, a, b in spans]


def test_time_by_part_and_pass():
    found = profile_of([*step(0), *step(10), *step(100, "d1"), *step(110, "d1")], Program(TEXT))
    assert (found.steps, found.devices) == (2, 2)
    assert found.seconds == pytest.approx(10e-6) and found.idle == pytest.approx(2e-6)
    assert found.by_part() == {
        "ffn": {"forward": pytest.approx(4e-6)},
        "attention/attend": {"forward": pytest.approx(1e-6)},
        "collectives": {"backward": pytest.approx(1e-6)},
        "optimizer": {"update": pytest.approx(1e-6)},
        "other": {"forward": pytest.approx(1e-6)},  # what the loop itself took
    }
    name, part, source, seconds = found.instructions[0]
    assert (name, part, seconds) == ("gate.1", "ffn", pytest.approx(4e-6)) and source.endswith("jit(silu)/mul")
    told = table(found)
    assert told.startswith("2 steps of 0.01 ms on 2 devices; no instruction ran for 20.0% of the time")
    assert "side by side" not in told


def test_own_time_of_nested_events():
    outer, inner, innermost = (Event("d", "0", n, a, b) for n, a, b in (("a", 0, 10), ("b", 1, 6), ("c", 2, 4)))
    after = Event("d", "0", "d", 10, 11)
    beside = Event("d", "1", "e", 0, 3)  # on another line: nothing to do with a
    own = {event.name: time for event, time in own_times([innermost, outer, beside, after, inner])}
    assert own == {"a": 5, "b": 3, "c": 2, "d": 1, "e": 3}


def test_instructions_side_by_side():
    events = [*step(0), Event("d0", "1", "scores.2", 0.0, 7e3)]
    found = profile_of(events, Program(TEXT))
    assert found.idle == pytest.approx(2e-6) and found.busy == pytest.approx(15e-6)
    assert "1.88 instructions ran side by side" in table(found)


def test_covered():
    assert covered([(5, 6), (0, 2), (1, 3), (2, 2.5)]) == 4
    assert covered([]) == 0


@pytest.mark.parametrize(
    ("source", "part", "passed"),
    [
        ("jit(step)/jvp()/closed_call/attention/norm/mul", "attention/norm", "forward"),
        ("jit(step)/transpose(jvp(loss))/dot_general", "loss", "backward"),
        ("jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/ffn/dot_general", "ffn", "recomputed"),
        ("jit(step)/jvp(vision)/while/body/attention/attend/exp", "vision/attention/attend", "forward"),
        ("jit(step)/optimizer/jit(clip)/min", "optimizer", "update"),
        ("jit(step)/jvp()/closed_call/ffn/experts/shard_map/ffn/mul", "ffn/experts", "forward"),
        ("jit(step)/add", "other", "other"),
        ("", "other", "other"),
    ],
)
def test_parts_and_passes_by_the_names_that_jax_gives(source, part, passed):
    assert (part_of(source), pass_of(source)) == (part, passed)


def event(name, start, duration, **stats):
    return types.SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=list(stats.items()))


def plane(name, *lines):
    made = [types.SimpleNamespace(name=f"line {i}", events=line) for i, line in enumerate(lines)]
    return types.SimpleNamespace(name=name, lines=made)


@pytest.mark.parametrize(
    ("planes", "expected"),
    [
        (  # CPU: the instruction is a stat, its device too; what ends is an event as well
            [
                plane(
                    "/host:CPU",
                    [event("adam.5", 5, 2, hlo_op="adam.5", device_ordinal=3), event("end: adam.5", 7, 1)],
                    [event("$train.py:1 train", 0, 99)],
                )
            ],
            [Event("/host:CPU 3", "0", "adam.5", 5, 7)],
        ),
        (  # GPU: a stream's kernels have names of their own; the host's plane is not looked at
            [
                plane("/host:CPU", [event("adam.5", 5, 2, hlo_op="adam.5")]),
                plane("/device:GPU:0", [event("loop_negate_fusion", 5, 2, hlo_op="adam.5", hlo_module="jit_step")]),
            ],
            [Event("/device:GPU:0 ", "0", "adam.5", 5, 7)],
        ),
        (  # TPU: an event is named by the instruction's text
            [plane("/device:TPU:0", [event("%adam.5 = f32[8]{0} negate(...)", 5, 2), event("jit_step(123)", 0, 9)])],
            [Event("/device:TPU:0 ", "0", "adam.5", 5, 7)],
        ),
    ],
)
def test_planes_of_the_backends(monkeypatch, tmp_path, planes, expected):
    data = types.SimpleNamespace(from_file=lambda path: types.SimpleNamespace(planes=planes))
    monkeypatch.setattr(trace.jax.profiler, "ProfileData", data)
    assert trace.events_of(tmp_path, ["adam.5"]) == expected


def test_a_trace_of_another_program_is_refused():
    with pytest.raises(ValueError, match="no instruction of the compiled step is in the trace"):
        profile_of([], Program(TEXT))
    with pytest.raises(ValueError, match="outside of its loops: it is too short"):
        profile_of([Event("d0", "0", "gate.1", 0.0, 1.0)], Program(TEXT))


def test_no_trace(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no trace: train with --config.profile.start=STEP"):
        trace.newest_trace(tmp_path)
