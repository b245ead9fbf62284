"""Expert parallelism: numbers on 8 simulated devices, in a process of their own."""

import pathlib
import subprocess
import sys

import pytest

from tests.training_runs import environment


@pytest.mark.slow
@pytest.mark.timeout(1800)  # eight devices on the cores of a machine that may have other work
def test_on_eight_devices():
    """Meshes, transports and kinds of routing against one device: losses, gradients, counts, checkpoints, drops."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", pathlib.Path(__file__).with_name("moe_eight_devices.py")],
        env=environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
