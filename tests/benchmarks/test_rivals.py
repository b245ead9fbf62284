"""Objects in processes of their own."""

import os

import numpy as np
import pytest

from benchmarks.rivals import HostMemory, Rival


class Counter:
    def __init__(self, start):
        if start < 0:
            raise ValueError("counts from 0")
        self.count = start

    def add(self, n):
        self.count += n
        return self.count, os.getpid(), os.environ.get("OF_THE_RIVAL")

    def memory(self, megabytes):
        memory = HostMemory()
        del [np.ones(megabytes << 17)][:]
        return memory.peak() / 2**20

    def leave(self):
        os._exit(7)


def test_it_keeps_its_state_and_has_its_environment():
    with Rival(Counter, 5, environment={"OF_THE_RIVAL": "yes"}) as rival:
        first, second = rival("add", 2), rival("add", 3)
    assert (first[0], second[0]) == (7, 10) and first[1] == second[1] != os.getpid()
    assert first[2] == "yes" and "OF_THE_RIVAL" not in os.environ


def test_what_happens_there_is_told_here():
    with pytest.raises(RuntimeError, match="counts from 0"):
        Rival(Counter, -1)
    with Rival(Counter, 0) as rival:
        with pytest.raises(RuntimeError, match="has no attribute 'subtract'"):
            rival("subtract", 1)
        assert rival("add", 1)[0] == 1  # and it goes on
        with pytest.raises(RuntimeError, match="ended with code 7"):
            rival("leave")


def test_memory_that_was_given_back_counts():
    assert Counter(0).memory(64) == pytest.approx(64, rel=0.1)
