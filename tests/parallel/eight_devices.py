"""The same training on four meshes of 8 simulated devices. test_meshes.py runs this file in a process of its own."""

import jax
import numpy as np
import pytest

from configs import loading
from nmm_jax import models
from nmm_jax.parallel.batches import local_rows, to_global
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.parallel.sharding import replicated
from nmm_jax.training import freezing
from nmm_jax.training import start as starting
from nmm_jax.training.checkpoints import Checkpoints
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.schedule import ends
from nmm_jax.training.state import abstract_state, initial_state, shardings_of
from nmm_jax.training.step import jit_step
from tests.fake_batches import fake_batch, tiny_config

MESHES = {
    "1x1": {},
    "fsdp 8": {"fsdp": 8},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "replica 2, fsdp 4": {"replica": 2, "fsdp": 4},
}
# Unclipped, so that Adam's first moment after a step is (1 - beta1) times the gradient.
CONFIG = tiny_config(optimizer__clip_norm=0.0)
MODEL = models.build(CONFIG)
OPTIMIZER = make_optimizer(CONFIG)


def mesh_named(name):
    return mesh_of(MESHES[name], None if MESHES[name] else jax.devices()[:1])


@pytest.fixture(scope="module")
def start():
    return initial_state(MODEL, OPTIMIZER, mesh_named("1x1"), CONFIG.seed)


@pytest.fixture(scope="module")
def runs(start):
    """By mesh: losses of 20 steps, gradients and state after the first."""
    host = jax.tree.map(np.asarray, start)
    result = {}
    for name in MESHES:
        mesh = mesh_named(name)
        state = jax.device_put(host, shardings_of(abstract_state(MODEL, OPTIMIZER, mesh)))
        step = jit_step(MODEL, OPTIMIZER, CONFIG, mesh)
        until = jax.device_put(ends(CONFIG), replicated(mesh))
        losses = []
        for t in range(20):
            batch = fake_batch(CONFIG, seed=t)
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, to_global(batch, mesh, CONFIG.batch_rows), until)
            losses.append(float(metrics["loss"]))
            if t == 0:
                first = jax.tree.map(np.asarray, state)
        result[name] = losses, first, state
    return result


def gradients(state):
    return [np.asarray(x) / np.float32(1 - CONFIG.optimizer.beta1) for x in jax.tree.leaves(state["opt_state"][1].mu)]


@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_meshes_agree(runs, name):
    losses, first, _ = runs[name]
    want_losses, want_first, _ = runs["1x1"]
    assert abs(losses[0] / want_losses[0] - 1) < 1e-6
    for got, want in zip(gradients(first), gradients(want_first), strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-4)


def test_parameters_and_moments_are_sharded(runs):
    """On fsdp 4 x tensor 2 a device holds an eighth of a matrix, and of its moments too."""
    state = runs["fsdp 4, tensor 2"][2]
    for tree in (state["params"], state["opt_state"][1].mu, state["opt_state"][1].nu):
        up = tree["layers"]["ffn"]["up"]
        assert up.addressable_shards[0].data.size * 8 == up.size
        assert len(up.sharding.device_set) == 8


def test_first_weights_do_not_depend_on_the_mesh(start):
    sharded = initial_state(MODEL, OPTIMIZER, mesh_named("fsdp 4, tensor 2"), CONFIG.seed)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), start, sharded)


@pytest.mark.parametrize("saved_on", MESHES)
def test_a_checkpoint_of_each_mesh_is_restored_on_each_other_to_the_bit(runs, saved_on, tmp_path):
    state = runs[saved_on][2]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(20, state, {})
    checkpoints.close()
    for name in MESHES:
        abstract = abstract_state(MODEL, OPTIMIZER, mesh_named(name))
        restored, _ = Checkpoints(tmp_path, read_only=True).restore(20, abstract)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        for got, want, target in zip(*map(jax.tree.leaves, (restored, state, abstract)), strict=True):
            assert got.sharding == target.sharding
            np.testing.assert_array_equal(got, want)


def test_accumulation_on_a_mesh(runs, start):
    """Two microbatches of 4 rows over 4 devices give the whole batch's gradients."""
    config = tiny_config(optimizer__clip_norm=0.0, gradient_accumulation=2)
    mesh = mesh_named("fsdp 4, tensor 2")
    state = initial_state(MODEL, OPTIMIZER, mesh, config.seed)
    state, metrics = jit_step(MODEL, OPTIMIZER, config, mesh)(
        state, to_global(fake_batch(config), mesh, 8), ends(config)
    )
    want_losses, want_first, _ = runs["1x1"]
    assert float(metrics["loss"]) == pytest.approx(want_losses[0], rel=1e-6)
    for got, want in zip(gradients(state), gradients(want_first), strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_frozen_parameters_on_a_mesh(runs, start):
    """Their bits stay, and the others' gradients are those of a run that freezes nothing."""
    config = tiny_config(optimizer__clip_norm=0.0, optimizer__freeze=("layers/attention*", "embed/*"))
    model, optimizer, mesh = models.build(config), make_optimizer(config), mesh_named("fsdp 4, tensor 2")
    state = initial_state(model, optimizer, mesh, config.seed)
    state, _ = jit_step(model, optimizer, config, mesh)(state, to_global(fake_batch(config), mesh, 8), ends(config))
    first, moments = runs["1x1"][1], state["opt_state"][1].mu
    wanted, frozen = freezing.split(first["opt_state"][1].mu, config.optimizer.freeze)
    assert jax.tree.structure(moments) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(moments), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    before, after = (freezing.split(s["params"], config.optimizer.freeze)[1] for s in (start, state))
    assert len(jax.tree.leaves(before)) == len(jax.tree.leaves(frozen)) == 8
    jax.tree.map(np.testing.assert_array_equal, before, after)
    up = moments["layers"]["ffn"]["up"]
    assert up.addressable_shards[0].data.size * 8 == up.size


def test_weights_to_start_from_on_a_mesh(start, tmp_path):
    """Each shard is read where it belongs; 61 tokens that tensor does not divide become the first of 64."""
    there = tiny_config(model__vocab_size=61)
    params = jax.tree.map(lambda x: np.full(x.shape, 7, np.float32), models.build(there).abstract)
    checkpoints = Checkpoints(tmp_path)
    state = jax.device_put({"step": np.int32(1), "params": params, "opt_state": np.zeros(3)})
    checkpoints.save(1, state, {"config": loading.to_json(there), "data": {}})
    checkpoints.close()
    config = tiny_config(start__decoder=str(tmp_path))
    model, optimizer, mesh = models.build(config), make_optimizer(config), mesh_named("fsdp 4, tensor 2")
    loaded = starting.load(config, model, mesh)
    abstract = abstract_state(model, optimizer, mesh)["params"]
    up = loaded["layers"]["ffn"]["up"]
    assert up.sharding == abstract["layers"]["ffn"]["up"].sharding and up.addressable_shards[0].data.size * 8 == up.size
    params = initial_state(model, optimizer, mesh, config.seed, loaded)["params"]
    assert jax.tree.map(lambda x: x.sharding, params) == shardings_of(abstract)
    fresh = np.asarray(start["params"]["embed"]["tokens"])
    want = np.concatenate([np.full((61, 32), 7, np.float32), fresh[61:]])
    np.testing.assert_array_equal(params["embed"]["tokens"], want)
    np.testing.assert_array_equal(params["patches"]["kernel"], start["params"]["patches"]["kernel"])
    assert (np.asarray(params["layers"]["ffn"]["down"]) == 7).all()


@pytest.mark.parametrize("name", MESHES)
def test_global_batches(name):
    mesh = mesh_named(name)
    rows = local_rows(mesh, 16)
    assert rows.tolist() == list(range(16))  # one process addresses them all
    local = {"tokens": np.arange(16 * 3).reshape(16, 3)}
    array = to_global(local, mesh, 16)["tokens"]
    np.testing.assert_array_equal(array, local["tokens"])
    assert array.addressable_shards[0].data.shape[0] == 16 // (mesh.size // mesh.shape["tensor"])
