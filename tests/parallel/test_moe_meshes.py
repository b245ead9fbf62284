"""Expert parallelism: numbers on 8 simulated devices, in a process of their own."""

import pytest

from tests.training_runs import passes_on_eight_devices


@pytest.mark.slow
@pytest.mark.timeout(1800)  # eight devices on the cores of a machine that may have other work
def test_on_eight_devices():
    """Meshes, transports and kinds of routing against one device: losses, gradients, counts, checkpoints, drops."""
    passes_on_eight_devices("moe_eight_devices.py", __file__)
