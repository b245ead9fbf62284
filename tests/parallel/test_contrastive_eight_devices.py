"""The ring of contrastive losses, on 8 simulated devices in a process of its own."""

from tests.training_runs import passes_on_eight_devices


def test_on_eight_devices():
    """fsdp 8, replica 2 x fsdp 4, fsdp 4 x tensor 2 against one device: values, gradients, memory."""
    passes_on_eight_devices("contrastive_eight_devices.py", __file__)
