"""Prints the memory of a tiny step on eight simulated devices; test_step_memory.py runs it in its own process."""

import dataclasses
import json
import os
import types

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jax

from configs import loading
from nmm_jax.compilation.memory import memory, needed
from nmm_jax.compilation.program import Program
from nmm_jax.compilation.step import compile_step
from nmm_jax.scaling.counting import count

# A number of layers that is the length of nothing else.
SIZES = {"model.depth": 3, "model.remat": "full", "model.tie_embeddings": False}
MESH = {"mesh.fsdp": 4, "mesh.tensor": 2}


def main():
    config = loading.load("tests/tiny.py", SIZES | MESH)
    chip = types.SimpleNamespace(is_tpu=True, memory_bytes=1 << 30)
    simulated = types.SimpleNamespace(is_tpu=True, chip=chip, devices=jax.devices)
    step = compile_step(config, simulated)
    found = dataclasses.asdict(memory(step, Program(step.compiled.as_text())))
    print(json.dumps({"memory": found, "needed": needed(step), "parameters": count(config).parameters}))


if __name__ == "__main__":
    main()
