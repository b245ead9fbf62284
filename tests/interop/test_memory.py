"""The host's memory while a model of a gigabyte is read: the parameters', and about a shard of one of them."""

import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from fake_folders import LLAMA, shapes_of

from nmm_jax.interop.tensors import Entry, plan, write

pytestmark = pytest.mark.slow

LARGE = LLAMA | dict(
    vocab_size=16_000, hidden_size=1024, num_hidden_layers=18, num_attention_heads=16, num_key_value_heads=16,
    intermediate_size=2816, max_position_embeddings=2048, dtype="bfloat16",
)  # fmt: skip


def test_host_memory_is_near_one_shard(tmp_path):
    entries = [Entry(name, shape, np.dtype(ml_dtypes.bfloat16)) for name, shape in shapes_of(LARGE).items()]
    write(tmp_path, plan(entries, 200_000_000), (np.full(e.shape, 0.5, e.dtype) for e in entries))
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    done = subprocess.run(
        [sys.executable, pathlib.Path(__file__).with_name("memory.py"), tmp_path],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    print(found)
    assert found["parameters"] > 1_000_000_000 and found["largest"] > 200_000_000
    # Besides a shard: a tensor of the file (33 MB), compiling, what the allocator keeps.
    above = found["peak"] - found["parameters"]
    assert above < found["largest_shard"] + 100_000_000, found
