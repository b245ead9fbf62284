"""Attention on 8 simulated devices, kernels interpreted. test_attention_tpu.py runs this file in its own process."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from packed_rows import packed_batch

from nmm_jax import models
from nmm_jax.models import attention as attention_module
from nmm_jax.models import attention_tpu
from nmm_jax.models.attention import attention
from nmm_jax.parallel.mesh import BATCH_AXES, mesh_of
from nmm_jax.parallel.sharding import ON_ONE_DEVICE, Constrain, param_shardings
from tests.fake_batches import fake_batch, tiny_config

MESH = {"replica": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(autouse=True)
def splash_on_cpu(monkeypatch):
    monkeypatch.setitem(attention_module.KERNELS, "splash", ("cpu",))
    monkeypatch.setattr(attention_tpu, "splash", functools.partial(attention_tpu.splash, interpret=True))


def assert_close(found, expected):
    assert np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(np.asarray(expected)).max()


@pytest.mark.parametrize("rows", [4, 3])
def test_a_kernel_on_a_mesh(rows):
    """Each device has its rows and heads; or all of 3 rows, which do not divide."""
    batch = packed_batch(rows, 60, patches=9, slots=3, size=4, vocab=50)
    r = np.random.default_rng(0)
    q, k, v, dout = (r.normal(size=(rows, 60, heads, 8)).astype(np.float32) for heads in (4, 2, 2, 4))

    def both_passes(implementation, constrain):
        def attend(*qkv):
            return attention(*qkv, batch["segment_ids"], batch["attend_until"], implementation, constrain)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    expected = both_passes("reference", ON_ONE_DEVICE)
    found = jax.jit(lambda: both_passes("splash", Constrain(mesh_of(MESH))))()
    jax.tree.map(assert_close, found, expected)


@pytest.mark.parametrize("block", [16, 64])
def test_windows_on_a_mesh(block, monkeypatch):
    """A window holds what rows of all devices see. Where there is one, of all keys, devices send each other nothing."""
    monkeypatch.setattr(attention_module, "BLOCK", block)
    batch = packed_batch(4, 60, patches=9, slots=3, size=4, vocab=50)
    mask = batch["segment_ids"], batch["attend_until"]
    r = np.random.default_rng(0)
    arrays = [r.normal(size=(4, 60, heads, 8)).astype(np.float32) for heads in (4, 2, 2, 4)]

    def both_passes(implementation, constrain, q, k, v, dout, *mask):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, *mask, implementation, constrain), q, k, v)
        return out, *pull(dout)

    expected = both_passes("reference", ON_ONE_DEVICE, *arrays, *mask)
    mesh = mesh_of(MESH)
    heads = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    inputs = *jax.device_put(arrays, heads), *jax.device_put(mask, rows)
    run = jax.jit(functools.partial(both_passes, "blocked", Constrain(mesh)), out_shardings=heads)
    run = run.lower(*inputs).compile()
    jax.tree.map(assert_close, run(*inputs), expected)
    assert ("all-reduce" in run.as_text()) == (block < 60)


def test_a_model_on_a_mesh():
    """Within scanned layers that are recomputed in the backward pass."""
    config = tiny_config(model__remat="minimal", model__kv_heads=2)
    mesh = mesh_of(MESH)
    batch = fake_batch(config)

    def loss_and_gradients(config, constrain, params):
        model = models.build(config)

        def loss(params):
            hidden, _ = model.hidden(params, batch, constrain=constrain)
            return jnp.square(hidden @ model.unembedding(params)).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    model = models.build(config)
    params = model.init(jax.random.key(0))
    expected = loss_and_gradients(tiny_config(model__attention="reference", model__kv_heads=2), ON_ONE_DEVICE, params)
    laid_out = jax.device_put(params, param_shardings(model.abstract, model.logical_axes, mesh))
    config = tiny_config(model__remat="minimal", model__attention="splash", model__kv_heads=2)
    jax.tree.map(assert_close, loss_and_gradients(config, Constrain(mesh), laid_out), expected)
