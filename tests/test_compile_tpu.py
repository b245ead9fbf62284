"""The exact training step compiles for a TPU slice, ahead of time and without a TPU, and is sharded as meant."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.extras

PROGRAM = textwrap.dedent(
    """
    import json
    import re

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

    config = loading.load(
        "configs/early_fusion.py:hw-300m",
        {"batch_rows": 32, "row_length": 1536, "model.depth": 4, "mesh.fsdp": 8, "mesh.tensor": 2},
    )
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = make_mesh(config, slice_.devices)
    model, optimizer = models.build(config), make_optimizer(config)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in batch_spec(Geometry.from_config(config), config.batch_rows).items()
    }
    compiled = jit_step(model, optimizer, config, mesh).lower(abstract_state(model, optimizer, mesh), batch).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    print(json.dumps({
        "gathers": len(re.findall(r" all-gather(?:-start)?\\(", text)),
        "scatters": len(re.findall(r"reduce-scatter", text)),
        "square": len(re.findall(r"(?:pred|f32)\\[[0-9,]*1536,1536\\]", text)),
        "arguments": memory.argument_size_in_bytes,
        "parameters": sum(x.size for x in jax.tree.leaves(model.abstract)),
        "temporary": memory.temp_size_in_bytes,
    }))
    """
)


def test_the_step_compiles_for_a_slice_of_v5e():
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process that compiles dies on a lock file
    }
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["gathers"] and found["scatters"], found
    # A row's own [S, S] scores may exist for a block of queries, never for a whole row.
    assert found["square"] == 0, found
    # The state of a device is 12 bytes a parameter over 16 devices; the batch comes on top (uint8 images).
    state = 12 * found["parameters"] / 16
    assert state <= found["arguments"] <= 1.1 * state + (32 << 20), (state, found)
    assert found["temporary"] < 8 << 30, found
