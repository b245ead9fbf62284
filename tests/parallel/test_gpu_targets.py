"""Training steps compile for NVIDIA GPUs without one, where JAX's CUDA plugin is installed."""

import json
import os
import subprocess
import sys

import pytest

from nmm_jax.parallel import gpu_targets

needs_plugin = pytest.mark.skipif(not gpu_targets.has_plugin(), reason="JAX's CUDA plugin is not installed")


def compiled(config, topology, **overrides):
    small = {"model.depth": 2, "model.vocab_size": 2048, "batch_rows": 16}
    command = [sys.executable, "-m", "nmm_jax.compile", "--format=json", f"--config={config}", f"--topology={topology}"]
    command += [f"--config.{key}={value}" for key, value in (small | overrides).items()]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def kinds(facts):
    return {(row["kind"], tuple(row["axes"])) for row in facts["collectives"]}


@pytest.mark.extras
@needs_plugin
def test_a_dense_step_on_two_nodes():
    sizes = {"mesh.replica": 2, "mesh.fsdp": 8}
    found = compiled("configs/early_fusion.py:hw-300m", "h100:2x8", **sizes)
    assert (found["chip"], found["devices"]) == ("h100", 16)
    assert {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))} <= kinds(found)
    crossing = {**found["estimate"]["network"], **found["estimate"]["network_hidden"]}
    assert crossing and all("replica" in axes for axes in crossing), crossing  # the replicas are one to a node
    state = 12 * found["parameters"] / 8
    assert state <= found["memory"]["peak"] < 2 << 30


@pytest.mark.extras
@needs_plugin
def test_experts_on_a_node():
    pytest.importorskip("tokamax")
    found = compiled("configs/moe.py:hw-300m-8e", "h200:1x8", **{"mesh.expert": 8})
    assert ("ragged-all-to-all", ("expert",)) in kinds(found)


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="'h1000' is no GPU that is known; one of a100-40gb, a100, h100-pcie, h100"):
        gpu_targets.gpu_devices("h1000", 1, 8)
    if not gpu_targets.has_plugin():
        with pytest.raises(RuntimeError, match="needs JAX's CUDA plugin.*pip install jax-cuda13-plugin=="):
            gpu_targets.gpu_devices("h100", 1, 8)
