"""Late and deep fusion over several devices, in a process of their own."""

import pytest

from tests.training_runs import passes_on_eight_devices


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(which):
    passes_on_eight_devices("architectures_eight_devices.py", __file__, "-m", which)
