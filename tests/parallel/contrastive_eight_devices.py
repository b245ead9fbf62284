"""Contrastive losses over 8 simulated devices. test_contrastive_eight_devices.py runs this file in its own process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.parallel.sharding import batch_sharding, replicated
from nmm_jax.training.contrastive_loss import contrastive_losses

jax.config.update("jax_enable_x64", True)

MESHES = {
    "fsdp 8": {"fsdp": 8},
    "replica 2, fsdp 4": {"replica": 2, "fsdp": 4},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
}
B, E = 48, 16


def pairs(dtype):
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(B, E)) for _ in range(2))
    text = text + image
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    valid = rng.random(B) < 0.8
    valid[12:18] = False  # a device of 8 that has none
    return image.astype(dtype), text.astype(dtype), dtype(9.0), dtype(-3.0), valid


def dense(kind, image, text, scale, bias, valid):
    logits = scale * jnp.matmul(image, text.T, precision="highest") + bias
    both = valid[:, None] & valid
    if kind == "softmax":
        shown = jnp.where(both, logits, -1e30)
        losses = (jax.nn.logsumexp(shown, 1) + jax.nn.logsumexp(shown, 0)) / 2 - jnp.diag(logits)
    else:
        signs = 2 * jnp.eye(len(logits), dtype=logits.dtype) - 1
        losses = -jnp.where(both, jax.nn.log_sigmoid(signs * logits), 0).sum(1)
    return jnp.where(valid, losses, 0)


def mean_and_gradients(losses):
    """Of the loss that a step minimises; `losses` is a function of image, text, scale, bias, valid."""

    def mean(image, text, scale, bias, valid):
        each = losses(image, text, scale, bias, valid)
        return each.sum() / valid.sum(), each

    return jax.value_and_grad(mean, argnums=(0, 1, 2, 3), has_aux=True)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "name, dtype, tolerance", [*((name, np.float64, 1e-12) for name in MESHES), ("fsdp 8", np.float32, 1e-5)]
)
def test_as_on_one_device(name, dtype, tolerance, kind):
    """Value and gradients of embeddings, scale and bias; three chunks a device where 8 share the batch."""
    mesh = mesh_of(MESHES[name])
    arrays = pairs(dtype)
    (want, want_each), want_gradients = mean_and_gradients(lambda *x: dense(kind, *x))(*arrays)

    of_rows, whole = batch_sharding(mesh), replicated(mesh)
    layout = (of_rows, of_rows, whole, whole, of_rows)
    placed = [jax.device_put(x, s) for x, s in zip(arrays, layout, strict=True)]
    compute = mean_and_gradients(lambda *x: contrastive_losses(kind, *x, mesh=mesh, chunk=2)[0])
    (got, each), gradients = jax.jit(compute)(*placed)
    assert abs(got / want - 1) < tolerance
    np.testing.assert_allclose(each, want_each, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients, want_gradients, strict=True):
        # A softmax does not change with its bias: what autodiff has there is rounding.
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 0.1)


def temporary_bytes(losses, mesh, batch):
    """Of one device, for value and gradients of a global batch of pairs; nothing is run."""
    of_rows, whole = NamedSharding(mesh, PartitionSpec(("replica", "fsdp"))), replicated(mesh)
    layout = (of_rows, of_rows, whole, whole, of_rows)
    shapes = [((batch, 256), np.float32)] * 2 + [((), np.float32)] * 2 + [((batch,), np.bool_)]
    abstract = [jax.ShapeDtypeStruct(*shape, sharding=s) for shape, s in zip(shapes, layout, strict=True)]
    gradients = (of_rows, of_rows, whole, whole)
    jitted = jax.jit(mean_and_gradients(losses), out_shardings=((whole, of_rows), gradients))
    return jitted.lower(*abstract).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_memory_grows_linearly(kind):
    mesh = mesh_of({"fsdp": 8})
    sizes = [512, 1024, 2048, 4096]
    ring, whole = (
        [temporary_bytes(losses, mesh, batch) for batch in sizes]
        for losses in (
            lambda *x: contrastive_losses(kind, *x, mesh=mesh, chunk=32)[0],
            lambda *x: dense(kind, *x),
        )
    )
    print(f"{kind}: bytes of a device for global batches of {sizes}: ring {ring}, all logits at once {whole}")
    for small, large in zip(ring, ring[1:], strict=False):
        assert large < 2.1 * small
    assert whole[-1] > 3 * whole[-2] and ring[-1] < whole[-1] / 10
