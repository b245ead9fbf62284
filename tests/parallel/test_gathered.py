"""Fully sharded data parallelism by hand, on 8 simulated devices in a process of its own."""

import pathlib
import subprocess
import sys

from tests.training_runs import environment


def test_on_eight_devices():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", pathlib.Path(__file__).with_name("gathered_eight_devices.py")],
        env=environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
