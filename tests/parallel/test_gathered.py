"""Fully sharded data parallelism by hand, on 8 simulated devices in a process of its own."""

from tests.training_runs import passes_on_eight_devices


def test_on_eight_devices():
    passes_on_eight_devices("gathered_eight_devices.py", __file__)
