"""The exact training step compiles for a TPU slice, ahead of time and without a TPU, and is sharded as meant."""

import re

import pytest

from tests.tpu_compile import compile_step

pytestmark = [pytest.mark.extras, pytest.mark.timeout(1800)]


def test_the_step_compiles_for_a_slice_of_v5e():
    pytest.importorskip("libtpu")
    overrides = {"batch_rows": 32, "row_length": 1536, "model.depth": 4, "mesh.fsdp": 8, "mesh.tensor": 2}
    found = compile_step("configs/early_fusion.py:hw-300m", overrides, "v5e:4x4")
    assert re.search(r" all-gather(?:-start)?\(", found.text) and "reduce-scatter" in found.text
    # A row's own [S, S] scores may exist for a block of queries, never for a whole row.
    assert not re.search(r"(?:pred|f32)\[[0-9,]*1536,1536\]", found.text)
    # The state of a device is 12 bytes a parameter over 16 devices; the batch comes on top (uint8 images).
    state = 12 * found.memory["parameters"] / 16
    assert state <= found.memory["arguments"] <= 1.1 * state + (32 << 20), (state, found.memory)
    assert found.memory["temporary"] < 8 << 30, found.memory
