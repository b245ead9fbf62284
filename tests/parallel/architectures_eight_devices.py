"""Late and deep fusion on meshes of 8 simulated devices, in a process of its own (test_architecture_meshes.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmm_jax import models
from nmm_jax.parallel.batches import to_global
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.parallel.sharding import Constrain, param_shardings
from tests.fake_batches import fake_batch, tiny_config

EVERYTHING = ("qkv", "out", "ffn", "norms")
VISION = {
    "model.family": "late_fusion",
    "model.patch_positions": False,
    "model.vision.width": 32,
    "model.vision.depth": 2,
    "model.vision.heads": 4,
}
KINDS = {
    "late fusion": VISION | {"model.scan_layers": True, "model.remat": "full"},
    "mixture of transformers": {"model.deep.modules": EVERYTHING, "model.scan_layers": True, "model.remat": "minimal"},
    "visual expert": VISION
    | {
        "model.deep.modules": ("qkv", "out", "ffn"),
        "model.deep.every": 2,
        "model.deep.qkv_bias": True,
        "model.kv_heads": 2,
        "model.connector.kind": "glu",
        "model.vision.class_token": True,
        "model.vision.bias": True,
        "model.vision.ffn": "gelu",
        "model.vision.norm_position": "post",
    },
}
MESHES = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "replica 2, fsdp 2, tensor 2": {"replica": 2, "fsdp": 2, "tensor": 2},
}
DEFAULT = "replica 2, fsdp 2, tensor 2"  # of the default suite


@functools.cache
def weights_of(kind):
    """Random, so that no mistake hides in zeros."""
    r = np.random.default_rng(0)
    abstract = models.build(tiny_config(**KINDS[kind])).abstract

    def draw(path, leaf):
        return (r.normal(size=leaf.shape) * 0.2 + ("scale" in str(path))).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


@functools.cache
def step_on(kind, mesh_name):
    """A function of nothing: loss, what the model says of itself, gradients."""
    config = tiny_config(**KINDS[kind])
    model = models.build(config)
    mesh = mesh_of(MESHES[mesh_name]) if mesh_name else mesh_of({}, jax.devices()[:1])
    shardings = param_shardings(model.abstract, model.logical_axes, mesh)
    params = jax.device_put(weights_of(kind), shardings)
    batch = to_global(fake_batch(config), mesh, config.batch_rows)

    @functools.partial(jax.jit, out_shardings=(None, shardings))
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, batch):
        hidden, aux = model.hidden(params, batch, constrain=Constrain(mesh))
        logits = hidden @ model.unembedding(params)
        ce = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        return (ce * batch["loss_mask"]).sum() / batch["loss_mask"].sum(), aux

    def step():
        with jax.transfer_guard("disallow"):
            (value, aux), grads = loss(params, batch)
        return float(value), jax.device_get(aux), jax.device_get(grads)

    return step


@functools.cache
def gradients_on(kind, mesh_name):
    return step_on(kind, mesh_name)()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mesh", [DEFAULT, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES if mesh != DEFAULT)]
)
def test_losses_and_gradients_equal_one_devices(kind, mesh):
    value, _, grads = gradients_on(kind, mesh)
    expected, _, wanted = gradients_on(kind, "")
    assert value == pytest.approx(expected, rel=1e-6)
    for (path, g), w in zip(jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(wanted), strict=True):
        name = jax.tree_util.keystr(path)
        if "['vision']" in name and "key_bias" in name:  # moves all scores of a query alike: only rounding is left
            assert max(np.abs(g).max(), np.abs(w).max()) < 1e-7
            continue
        assert np.abs(w).max() > 0, name
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max(), err_msg=name)


def test_the_tower_skips_empty_slots_on_every_mesh():
    """One of two slots a row is filled, and a device's parts are of one or two slots: the filled half is computed."""
    for mesh in ("", DEFAULT):
        _, aux, _ = gradients_on("late fusion", mesh)
        assert int(aux["vision_slots"]) == 8, mesh


def test_devices_do_not_wait_for_each_other_for_ever():
    """The tower does not depend on the embedding, so a device can wait in both (parallel/collective_threads.py)."""
    step = step_on("late fusion", DEFAULT)
    assert len({step()[0] for _ in range(50)}) == 1
