"""Turns, medians and ratios, by a clock that the runs themselves move."""

import pytest

from benchmarks import timing
from benchmarks.timing import Timed, in_turns, ratio


@pytest.fixture
def runs(monkeypatch):
    """A function that makes something that takes given seconds, run after run; and the names in the order of runs."""
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)

    def make(name, *seconds, runs=1):
        left = list(seconds)

        def run():
            order.append(name)
            now[0] += left.pop(0)

        return Timed(run, runs=runs)

    return make, order


def test_in_turns_after_a_round_that_is_not_counted(runs):
    make, order = runs
    a, b = make("a", 9e-3, 1, 2, 4), make("b", 9e-3, 3, 2, 4)
    in_turns(iter([a, b]), 3)
    assert order == ["a", "b"] * 4
    assert a.seconds == pytest.approx([1, 2, 4]) and a.median == pytest.approx(2)
    assert ratio(b, a) == pytest.approx(1)  # of 3, 1 and 1; not of the medians 3 and 2


def test_what_takes_long_runs_once(runs):
    make, order = runs
    slow, fast = make("slow", timing.ONCE + 1), make("fast", 1, 2, 4)
    in_turns([slow, fast], 2)
    assert order == ["slow", "fast", "fast", "fast"]
    assert slow.seconds == pytest.approx([timing.ONCE + 1])
    assert ratio(slow, fast) == pytest.approx((timing.ONCE + 1) / 3)


def test_a_turn_of_several_runs(runs):
    make, order = runs
    a, b = make("a", 2, 2, 1, 2, 3, 4, runs=2), make("b", 2, 5, 4)
    in_turns([a, b], 2)
    assert order == ["a", "a", "b"] * 3
    assert a.seconds == pytest.approx([1.5, 3.5]) and b.seconds == pytest.approx([5, 4])


def test_a_record_says_where_its_numbers_come_from():
    found = timing.origin(("jax", "no-such-package"))
    assert list(found["versions"]) == ["jax"]
    assert found["machine"]["cores"] >= 1 and found["machine"]["processor"]
    assert {"commit", "uncommitted", "date", "command"} <= found.keys()
