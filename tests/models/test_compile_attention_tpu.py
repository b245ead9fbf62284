"""Splash as TPUs' compiler takes it, ahead of time and without a TPU: alone, and within whole training steps."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.compilation.compiled import facts_of

pytestmark = [pytest.mark.extras, pytest.mark.timeout(3600)]

LADDER = (50, 68, 102, 138, 164, 202, 320)  # head dimensions of configs/early_fusion.py, besides 128
# Two layers of the 1B model, on each device two rows of 4096; a small vocabulary, lest logits need most memory.
CONFIG = "configs/early_fusion.py:hw-1b"
STEP = {"model.depth": 2, "model.vocab_size": 8192, "row_length": 4096, "batch_rows": 16, "mesh.fsdp": 8}


def compiled_step(attention):
    """Facts, runs of each splash kernel, shapes of arrays of scores. Run in a process of its own."""
    from configs import loading
    from nmm_jax.compilation.facts import facts
    from nmm_jax.compilation.program import Program
    from nmm_jax.compilation.step import compile_step
    from nmm_jax.parallel.topology import Topology

    step = compile_step(loading.load(CONFIG, STEP | {"model.attention": attention}), Topology.parse("v5e:2x4"))
    text = step.compiled.as_text()
    program = Program(text)
    runs, kernels = program.runs(lambda *_: 1), Counter()
    for name, inside in program.computations.items():
        for i in inside.values():
            if i.target == "tpu_custom_call":
                kernels[re.match(r"splash_mha_([a-z]+)_|", i.name)[1] or i.name] += runs[name]
    scores = sorted(set(re.findall(r"\w+\[[0-9,]*(?:256|512|4096),4096\]", text)))
    return {"facts": facts(step), "kernels": kernels, "scores": scores}


@pytest.fixture(scope="module")
def steps():
    return {name: in_process(f"compiled_step({name!r})") for name in ("auto", "blocked")}


def in_process(call):
    """JAX in there loads the TPU compiler, which cannot be unloaded."""
    pytest.importorskip("libtpu")
    program = f"import json, test_compile_attention_tpu as t; print(json.dumps(t.{call}))"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()]),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_step_runs_the_kernels(steps):
    """Each layer's, forward twice for it is computed again; and makes no scores, as "blocked" does."""
    assert steps["auto"]["kernels"] == {"fwd": 4, "dq": 2, "dkv": 2}
    assert not steps["auto"]["scores"]
    assert not steps["blocked"]["kernels"] and steps["blocked"]["scores"]


def test_a_step_needs_less_memory_than_with_scores(steps):
    splash, blocked = (steps[name]["facts"] for name in ("auto", "blocked"))
    assert splash["memory"]["peak"] < blocked["memory"]["peak"]
    assert splash["flops"]["needed"] == blocked["flops"]["needed"]
    assert not splash["warnings"]


def test_the_command_compiles_for_v5p():
    """With tensor shards besides: shard_map over rows and heads."""
    pytest.importorskip("libtpu")
    overrides = STEP | {"row_length": 1024, "mesh.fsdp": 2, "mesh.tensor": 2}
    found = facts_of(CONFIG, "v5p:2x2x1", overrides=overrides)
    assert found["fits"] and not found["warnings"]


def compiled_kernels():
    """Kernels in programs of both passes, by what is particular about them. Run in a process of its own."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from nmm_jax.models.attention_tpu import splash

    chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0])

    def both_passes(q, k, v, dout, first, until):
        out, pull = jax.vjp(lambda *qkv: splash(*qkv, first, until), q, k, v)
        return out, *pull(dout)

    def kernels(rows=2, length=1000, heads=(4, 2), head_dim=128, dtype=jnp.bfloat16):
        of_heads = [jax.ShapeDtypeStruct((rows, length, n, head_dim), dtype, sharding=chip) for n in heads]
        interval = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=chip)
        q, k = of_heads
        compiled = jax.jit(both_passes).lower(q, k, k, q, interval, interval).compile()
        return compiled.as_text().count('custom_call_target="tpu_custom_call"')

    found = {f"head_dim {n}": kernels(head_dim=n) for n in (64, 128, *LADDER)}
    found |= {f"row_length {n}": kernels(length=n) for n in (77, 257, 577)}
    found["many short rows"] = kernels(rows=2048, length=256, heads=(2, 2))
    found["long rows"] = kernels(rows=1, length=32_768, heads=(1, 1))
    found["float32"] = kernels(dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        found["highest precision"] = kernels()
    with jax.enable_x64(True):
        found["64 bits"] = kernels()
    return found


def test_all_shapes():
    """Head dimensions of the paper's ladder, lengths of towers, and settings of JAX that Mosaic minds."""
    found = in_process("compiled_kernels()")
    assert set(found.values()) == {3}, found
