"""Late and deep fusion over several devices, in a process of their own."""

import pathlib
import subprocess
import sys

import pytest

from tests.training_runs import environment


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(which):
    file = pathlib.Path(__file__).with_name("architectures_eight_devices.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", which, file],
        env=environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
