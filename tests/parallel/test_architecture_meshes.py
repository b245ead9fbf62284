"""Late and deep fusion over several devices, in a process of their own."""

import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(which):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles twice as fast
    file = pathlib.Path(__file__).with_name("architectures_eight_devices.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", which, file],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
