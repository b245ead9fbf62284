"""Gathering by hand on 8 simulated devices. test_gathered.py runs this file in a process of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nmm_jax.parallel import gathered
from nmm_jax.parallel.mesh import BATCH_AXES, mesh_of
from nmm_jax.parallel.sharding import Constrain, spec

MESHES = {
    "fsdp 8": {"fsdp": 8},
    "replica 2, fsdp 4": {"replica": 2, "fsdp": 4},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
}
# Shards of 3 rows fill no tiles and go as lists; those of 16 go as matrices.
WEIGHTS = {
    "lists": {"in": ((24, 6), ("embed", "mlp")), "out": ((6, 24), ("mlp", "embed")), "bias": ((6,), ("mlp",))},
    "matrices": {
        "in": ((128, 2, 3), ("embed", "heads", "head_dim")),
        "out": ((2, 3, 128), ("heads", "head_dim", "embed")),
        "bias": ((2, 3), ("heads", "head_dim")),
    },
}
ROWS = 16


@pytest.fixture(params=[False, True], ids=["one stage", "two stages"])
def two_stages(request, monkeypatch):
    """Two stages are for TPUs; here they are taken on any mesh whose fsdp axis is all devices."""
    if request.param:
        monkeypatch.setattr(gathered, "is_whole_slice", lambda fsdp, devices: fsdp == len(devices))


def drawn(kind):
    r = np.random.default_rng(0)
    weights = {name: r.normal(size=shape).astype(np.float32) for name, (shape, _) in WEIGHTS[kind].items()}
    width = WEIGHTS[kind]["in"][0][0]
    return r.normal(size=(ROWS, width)).astype(np.float32), weights, {n: a for n, (_, a) in WEIGHTS[kind].items()}


def network(rows, weights, constrain):
    inner = jnp.tanh(jnp.tensordot(rows, weights["in"], 1) + weights["bias"])
    return jnp.tensordot(inner, weights["out"], inner.ndim - 1)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_values_and_gradients_are_those_of_whole_weights(name, kind, two_stages):
    mesh = mesh_of(MESHES[name])
    rows, weights, axes = drawn(kind)
    cotangent = np.random.default_rng(1).normal(size=rows.shape).astype(np.float32)

    def loss(rows, weights, constrain):
        y = gathered.with_gathered(network, rows, weights, axes, constrain, result_axes=None)
        return (y * cotangent).sum(), y

    expected = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(rows, weights, Constrain())
    shardings = {n: NamedSharding(mesh, spec(axes[n])) for n in weights}
    by_rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    here = jax.device_put(rows, by_rows), jax.device_put(weights, shardings)
    step = jax.jit(
        lambda rows, weights: jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(rows, weights, Constrain(mesh)),
        out_shardings=((None, by_rows), (by_rows, shardings)),
    )
    found = step(*here)
    # Outputs and gradients; their sum, the loss, is nearly nothing.
    pairs = zip(jax.tree.leaves((found[0][1], found[1])), jax.tree.leaves((expected[0][1], expected[1])), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-6 * np.abs(b).max())
    text = step.lower(*here).compile().as_text()
    assert "all-gather" in text and "reduce-scatter" in text


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_scatter_is_the_sum_of_the_devices(kind, two_stages):
    mesh = mesh_of(MESHES["fsdp 8"])
    shape, axes = WEIGHTS[kind]["out"]
    parts = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    scattered = jax.shard_map(
        lambda part: gathered.scatter(part[0], axes, mesh),
        mesh=mesh,
        in_specs=PartitionSpec("fsdp"),
        out_specs=spec(axes),
        check_vma=False,
    )
    np.testing.assert_allclose(np.asarray(jax.jit(scattered)(parts)), parts.sum(0), rtol=0, atol=1e-5)


def test_no_layer_keeps_its_whole_weights():
    """Under a policy that keeps all else: a shard of each is enough."""
    mesh, layers, width = mesh_of({"fsdp": 8}), 6, 256
    axes = ("layers", "embed", "mlp")
    weights = jax.device_put(np.ones((layers, width, width), np.float32), NamedSharding(mesh, spec(axes)))
    rows = jax.device_put(np.ones((8, width), np.float32), NamedSharding(mesh, PartitionSpec(BATCH_AXES)))

    def compute(x, whole, _):
        return jnp.tanh(x @ whole["w"])

    def temporary(policy):
        @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
        def layer(x, w):
            return gathered.with_gathered(compute, x, {"w": w}, {"w": axes[1:]}, Constrain(mesh)), None

        loss = jax.jit(jax.grad(lambda w: jax.lax.scan(layer, rows, w)[0].sum()), out_shardings=weights.sharding)
        return loss.lower(weights).compile().memory_analysis().temp_size_in_bytes

    all_weights = weights.nbytes
    assert temporary(jax.checkpoint_policies.everything_saveable) > all_weights  # of every layer, on every device
    assert temporary(gathered.is_kept) < all_weights


def test_rows_that_do_not_divide_are_left_to_the_compiler():
    assert gathered.by_hand(mesh_of({"fsdp": 8}), 16)
    assert not gathered.by_hand(mesh_of({"fsdp": 8}), 3)
    assert not gathered.by_hand(mesh_of({"replica": 8}), 16)
