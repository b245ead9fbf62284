"""Facts of steps that are compiled for TPUs without one."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


def facts_of(config: str, topology: str, slices: int = 1, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What nmm_jax.compile says, in a process of its own: libtpu cannot be unloaded."""
    command = [
        sys.executable, "-m", "nmm_jax.compile", f"--config={config}", f"--topology={topology}", f"--slices={slices}",
        "--format=json", *(f"--config.{key}={value}" for key, value in (overrides or {}).items()),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads(run.stdout)
