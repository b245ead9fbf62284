"""Compiles a config's exact training step for a TPU slice, ahead of time and without a TPU; needs libtpu.

In a process of its own, as libtpu cannot be unloaded:

    compiled = compile_step("configs/moe.py:hw-1b-8e", {"mesh.expert": 8}, "v5p:4x4x4")
    compiled.text, compiled.memory["temporary"]
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from typing import Any

PROGRAM = textwrap.dedent(
    """
    import json
    import pathlib
    import sys

    import jax

    from configs import loading
    from nmm_jax.compilation.step import compile_step
    from nmm_jax.parallel.topology import Topology

    name, overrides, topology, path = sys.argv[1:]
    step = compile_step(loading.load(name, json.loads(overrides)), Topology.parse(topology))
    pathlib.Path(path).write_text(step.compiled.as_text())
    memory = step.compiled.memory_analysis()
    print(json.dumps({
        "devices": step.mesh.size,
        "parameters": sum(x.size for x in jax.tree.leaves(step.model.abstract)),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }))
    """
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    text: str
    memory: dict[str, int]  # bytes of a device: arguments, temporary, peak; and devices, parameters


def compile_step(config: str, overrides: Mapping[str, Any], topology: str) -> Compiled:
    """`config` is FILE[:ARGUMENT]; `topology` a slice such as v5p:4x4x4."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "program.txt"
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, config, json.dumps(dict(overrides)), topology, path],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-5000:]
        return Compiled(path.read_text(), json.loads(run.stdout.splitlines()[-1]))
