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
    from jax.experimental import topologies

    from configs import loading
    from data_pipelines.geometry import Geometry
    from data_pipelines.rows import batch_spec
    from nmm_jax import models
    from nmm_jax.parallel.mesh import make_mesh
    from nmm_jax.parallel.sharding import batch_sharding
    from nmm_jax.training.optimizer import make_optimizer
    from nmm_jax.training.state import abstract_state
    from nmm_jax.training.step import jit_step

    name, overrides, topology, path = sys.argv[1:]
    config = loading.load(name, json.loads(overrides))
    mesh = make_mesh(config, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    model, optimizer = models.build(config), make_optimizer(config)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in batch_spec(Geometry.from_config(config), config.batch_rows).items()
    }
    compiled = jit_step(model, optimizer, config, mesh).lower(abstract_state(model, optimizer, mesh), batch).compile()
    pathlib.Path(path).write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    print(json.dumps({
        "devices": mesh.size,
        "parameters": sum(x.size for x in jax.tree.leaves(model.abstract)),
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
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process that compiles dies on a lock file
    }
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "program.txt"
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, config, json.dumps(dict(overrides)), topology, path],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-5000:]
        return Compiled(path.read_text(), json.loads(run.stdout.splitlines()[-1]))
