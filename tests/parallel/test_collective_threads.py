"""Simulated devices have threads to wait in, and some left to go on."""

import os
import subprocess
import sys

import pytest

from tests.training_runs import ROOT, environment

PROGRAM = """
import pathlib
import jax
from nmm_jax.parallel import processes

processes.initialize()
jax.device_count()
print(sum((task / "comm").read_text().startswith("tf_XLAEigen") for task in pathlib.Path("/proc/self/task").iterdir()))
"""


def threads(devices, **variables):
    bare = {name: value for name, value in environment(devices).items() if name != "NPROC"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=bare | variables, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in Linux's /proc")
def test_a_process_with_simulated_devices_has_several_threads_for_each():
    assert threads(4) == max(os.cpu_count(), 32)
    assert threads(1, JAX_NUM_CPU_DEVICES="2") == max(os.cpu_count(), 16)
    assert threads(4, NPROC="5") == 5
    assert threads(1) == len(os.sched_getaffinity(0))  # XLA's own number
