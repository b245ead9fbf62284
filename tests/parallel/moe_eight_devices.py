"""The same mixture of experts on meshes of 8 simulated devices, in a process of its own (test_moe_meshes.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nmm_jax import models
from nmm_jax.models import moe, router
from nmm_jax.parallel.batches import to_global
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.parallel.sharding import replicated
from nmm_jax.training.checkpoints import Checkpoints
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.schedule import ends
from nmm_jax.training.state import abstract_state, initial_state, shardings_of
from nmm_jax.training.step import jit_step
from tests.fake_batches import fake_batch, tiny_config

# Unclipped, so that Adam's first moment after a step is (1 - beta1) times the gradient.
EIGHT = {"optimizer__clip_norm": 0.0, "model__moe__experts": 8, "model__scan_layers": True}
KINDS = {
    "top 1": EIGHT,
    "top 2": EIGHT | {"model__moe__top_k": 2},
    "top 2, all options": EIGHT
    | {
        "model__moe__top_k": 2,
        "model__moe__balance": "bias",
        "model__moe__renormalise": True,
        "model__moe__shared": 1,
        "model__remat": "exchanges",
    },
    "fixed": EIGHT | {"model__moe__experts": 2, "model__moe__modality": "fixed"},
    "grouped": EIGHT | {"model__moe__modality": "grouped"},
    "every second layer": EIGHT | {"model__moe__every": 2, "model__depth": 4},
}
MESHES = {
    "fsdp 8": {"fsdp": 8},
    "expert 2": {"expert": 2},
    "expert 4": {"expert": 4},
    "expert 8": {"expert": 8},
    "fsdp 2, expert 4": {"fsdp": 2, "expert": 4},
    "fsdp 4, expert 2": {"fsdp": 4, "expert": 2},
    "fsdp 2, expert 2, tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "replica 2, expert 4": {"replica": 2, "expert": 4},
}
RUNS = [
    *(("top 1", name, "padded") for name in MESHES if name != "fsdp 4, expert 2"),
    ("top 1", "expert 8", "gather"),
    ("top 2", "fsdp 2, expert 4", "gather"),
    ("top 2", "fsdp 2, expert 2, tensor 2", "gather"),
    ("top 2, all options", "fsdp 2, expert 2, tensor 2", "padded"),
    ("fixed", "fsdp 4, expert 2", "padded"),
    ("grouped", "replica 2, expert 4", "padded"),
    ("every second layer", "fsdp 2, expert 4", "padded"),
]
MARGIN = 1e-3  # between logits; rounding moves them by 1e-6


def config_of(kind, **overrides):
    return tiny_config(**KINDS[kind], **overrides)


def mesh_named(name):
    if name == "one device":
        return mesh_of({}, jax.devices()[:1])
    return mesh_of(MESHES[name], jax.devices()[: int(np.prod(list(MESHES[name].values())))])


def spread(path, x):
    """Router weights so much larger that no choice is close."""
    keys = [str(k.key) for k in path if hasattr(k, "key")]
    return x * 30 if keys[-2:] == ["router", "kernel"] else x


@functools.cache
def start(kind):
    config = config_of(kind)
    state = initial_state(models.build(config), make_optimizer(config), mesh_named("one device"), config.seed)
    state["params"] = jax.tree_util.tree_map_with_path(spread, state["params"])
    return jax.tree.map(np.asarray, state)


def step_on(name, config, state):
    """One step from `state`; (state, metrics) on the host, and the state on the devices."""
    model, optimizer, mesh = models.build(config), make_optimizer(config), mesh_named(name)
    placed = jax.device_put(state, shardings_of(abstract_state(model, optimizer, mesh)))
    batch = to_global(fake_batch(config), mesh, config.batch_rows)
    step = jit_step(model, optimizer, config, mesh)
    until = jax.device_put(ends(config), replicated(mesh))
    with jax.transfer_guard("disallow"):
        after, metrics = step(placed, batch, until)
    metrics = jax.device_get(metrics)
    return jax.tree.map(np.asarray, after), {"loss": metrics["loss"], **metrics["router"]}, after


@functools.cache
def run(kind, name, transport="auto"):
    return step_on(name, config_of(kind, model__moe__transport=transport), start(kind))


def gradients(state, config):
    scale = np.float32(1 - config.optimizer.beta1)
    moments = jax.tree.map(lambda m: m / scale, optax.tree.get(state["opt_state"], "mu"))
    return jax.tree_util.tree_flatten_with_path(moments)[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fixed"])
def test_no_choice_is_close(kind, monkeypatch):
    """Between the logits of the last expert that is chosen and of the first that is not."""
    config = config_of(kind)
    model, gaps = models.build(config), []

    def watched(spec, logits, modality, *rest):
        options = jnp.where(router.may_choose(spec, modality), logits, -jnp.inf)
        best = jax.lax.top_k(options, spec.top_k + 1)[0]
        gap = jnp.where(modality >= 0, best[..., -2] - best[..., -1], jnp.inf).min()
        jax.debug.callback(lambda x: gaps.append(float(x)), gap)
        return route(spec, logits, modality, *rest)

    route = moe.route
    monkeypatch.setattr(moe, "route", watched)
    jax.block_until_ready(jax.jit(model.hidden)(start(kind)["params"], jax.tree.map(jnp.asarray, fake_batch(config))))
    jax.effects_barrier()
    assert len(gaps) == config.model.depth // config.model.moe.every and min(gaps) > MARGIN


@pytest.mark.parametrize(("kind", "name", "transport"), RUNS)
def test_meshes_agree(kind, name, transport):
    config = config_of(kind)
    state, metrics, _ = run(kind, name, transport)
    want_state, want, _ = run(kind, "one device")
    assert abs(metrics["loss"] / want["loss"] - 1) < 1e-6
    for (path, got), (_, expected) in zip(gradients(state, config), gradients(want_state, config), strict=True):
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected), path
    np.testing.assert_array_equal(metrics["expert_tokens"], want["expert_tokens"])
    assert not metrics["dropped_tokens"].any() and not want["dropped_tokens"].any()
    for key in ("balance_loss", "router_z_loss", "router_entropy"):
        np.testing.assert_allclose(metrics[key], want[key], rtol=2e-6, err_msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_every_assignment_is_counted_and_experts_learn(kind):
    """Counts by modality are the batch's own, and every expert and router has a gradient."""
    config = config_of(kind)
    state, metrics, _ = run(kind, "one device")
    batch = fake_batch(config)
    real = batch["segment_ids"] > 0
    of_modality = [(real & (batch["image_index"] < 0)).sum(), (real & (batch["image_index"] >= 0)).sum()]
    layers = config.model.depth // config.model.moe.every
    assert metrics["expert_tokens"].shape == (layers, 2, config.model.moe.experts)
    np.testing.assert_array_equal(
        metrics["expert_tokens"].sum(-1), [[n * config.model.moe.top_k for n in of_modality]] * layers
    )
    for path, gradient in gradients(state, config):
        keys = jax.tree_util.keystr(path)
        if "experts" in keys:
            used, moved = metrics["expert_tokens"].sum(1) > 0, np.abs(gradient).max((2, 3)) > 0
            assert not (moved & ~used).any(), keys
            assert moved[:-1].tolist() == used[:-1].tolist(), keys  # most patches of the last layer end there
        elif "bias" not in keys:
            assert np.abs(gradient).max() > 0, keys


def test_experts_and_their_moments_are_sharded():
    """On fsdp 2 x expert 4 a device holds an eighth of the experts' weights, and of their moments."""
    *_, state = run("top 1", "fsdp 2, expert 4", "padded")
    for tree in (state["params"], optax.tree.get(state["opt_state"], "mu"), optax.tree.get(state["opt_state"], "nu")):
        for name in ("gate", "up", "down"):
            weights = tree["layers"]["ffn"]["experts"][name]
            shard = weights.addressable_shards[0].data
            assert shard.size * 8 == weights.size and shard.shape[1] * 4 == weights.shape[1]
            assert len(weights.sharding.device_set) == 8


def test_a_checkpoint_moves_between_meshes_to_the_bit(tmp_path):
    config = config_of("top 1")
    model, optimizer = models.build(config), make_optimizer(config)
    names = ("expert 8", "fsdp 2, expert 4", "one device")
    for saved_on in names:
        *_, state = run("top 1", saved_on, "auto" if saved_on == "one device" else "padded")
        checkpoints = Checkpoints(tmp_path / saved_on)
        checkpoints.save(1, state, {})
        checkpoints.close()
        for name in names:
            abstract = abstract_state(model, optimizer, mesh_named(name))
            restored, _ = Checkpoints(tmp_path / saved_on, read_only=True).restore(1, abstract)
            assert jax.tree.structure(restored) == jax.tree.structure(state)
            for got, want, target in zip(*map(jax.tree.leaves, (restored, state, abstract)), strict=True):
                assert got.sharding == target.sharding
                np.testing.assert_array_equal(got, want)


def test_a_bounded_buffer_drops_and_says_how_many():
    """All tokens want expert 0 of 8, and its device has room for a quarter of the tokens that the axis has."""
    bounded = {"model__moe__buffer_factor": 1.0, "model__moe__balance": "bias"}
    config = config_of("top 1", **bounded)
    state = initial_state(models.build(config), make_optimizer(config), mesh_named("one device"), config.seed)
    state = jax.tree.map(np.array, state)
    state["params"]["layers"]["ffn"]["router"]["bias"][:, 0] = 10.0
    losses = {}
    for transport in ("padded", "gather"):
        after, metrics, _ = step_on(
            "fsdp 2, expert 4", config_of("top 1", **bounded, model__moe__transport=transport), state
        )
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(after)) and np.isfinite(metrics["loss"])
        real = fake_batch(config)["segment_ids"] > 0
        assert (metrics["expert_tokens"][:, :, 0].sum(1) == real.sum()).all()
        # Two groups of 4 devices; each has room for as many rows as one device has places.
        places = real.size // 8
        expected = sum(max(int(group.sum()) - places, 0) for group in real.reshape(2, -1))
        assert metrics["dropped_tokens"].tolist() == [expected] * config.model.depth
        assert expected > 0
        losses[transport] = float(metrics["loss"])
    assert losses["padded"] == pytest.approx(losses["gather"], rel=1e-6)
