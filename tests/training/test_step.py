"""The step: losses are over the whole batch, microbatches add up to it, metrics count what is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmm_jax import models
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.schedule import ends
from nmm_jax.training.state import abstract_state, initial_state
from nmm_jax.training.step import jit_step
from tests.fake_batches import fake_batch, tiny_config


def run_step(config, batch):
    mesh, model, optimizer = mesh_of({}, jax.devices()[:1]), models.build(config), make_optimizer(config)
    state = initial_state(model, optimizer, mesh, config.seed)
    before = jax.tree.map(np.asarray, state["params"])
    after, metrics = jit_step(model, optimizer, config, mesh)(state, batch, ends(config))
    return model, before, after, jax.device_get(metrics)


@pytest.fixture(scope="module")
def whole():
    config = tiny_config()
    batch = fake_batch(config)
    return config, batch, *run_step(config, batch)


def test_losses_are_those_of_dense_logits(whole):
    """Against float64 log-softmax of the model's logits, position by position."""
    config, batch, model, params, _, metrics = whole
    hidden, _ = model.hidden(params, jax.tree.map(jnp.asarray, batch))
    logits = np.asarray(hidden, np.float64) @ np.asarray(model.unembedding(params), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ce = -np.take_along_axis(log_p, batch["targets"][..., None].astype(int), -1)[..., 0]
    mask = batch["loss_mask"]
    assert metrics["loss"] == pytest.approx((mask * ce).sum() / mask.sum(), rel=1e-5)
    for k in range(3):
        here = mask * (batch["source"] == k)
        assert metrics["mask_sum_by_source"][k] == here.sum()
        assert metrics["loss_sum_by_source"][k] == pytest.approx((here * ce).sum(), rel=1e-5)
    assert metrics["mask_sum_by_source"][1] == 0


def test_counts(whole):
    config, batch, _, _, _, metrics = whole
    real = batch["segment_ids"] > 0
    assert metrics["tokens_by_source"].tolist() == [(real & (batch["source"] == k)).sum() for k in range(3)]
    assert metrics["images"] == batch["image_mask"].sum()
    pairs = 0
    for b in range(config.batch_rows):
        for q in range(config.row_length):
            if real[b, q]:
                keys = [k for k in range(batch["attend_until"][b, q])]
                pairs += sum(batch["segment_ids"][b, k] == batch["segment_ids"][b, q] for k in keys)
    assert metrics["attended_pairs"] == pairs


def test_the_step_counts_and_leaves_no_parameter_alone(whole):
    *_, before, after, metrics = whole
    assert after["step"] == 1
    assert metrics["learning_rate"] == np.float32(1e-3)  # the first of two warm-up steps to 2e-3
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after["params"])
    assert all(jax.tree.leaves(moved))
    norm = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(after["params"])))
    assert metrics["param_norm"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("accumulation", [4])
def test_accumulated_microbatches_are_the_whole_batch(whole, accumulation):
    """Rows have different numbers of targets, so a mean of microbatch means would not pass."""
    _, batch, _, _, after, metrics = whole
    *_, after_parts, of_parts = run_step(tiny_config(gradient_accumulation=accumulation), batch)
    jax.tree.map(lambda part, value: np.testing.assert_allclose(part, value, rtol=2e-6), of_parts, metrics)
    # Adam's first moment is (1 - beta1) * gradient: the gradients themselves, before Adam divides by their size.
    for a, b in zip(jax.tree.leaves(after_parts["opt_state"]), jax.tree.leaves(after["opt_state"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(np.abs(b).max(), 1e-9))


def test_accumulated_microbatches_with_experts():
    """What counts tokens adds up; routers' losses are the mean of the microbatches', each over its own tokens."""
    kinds = dict(model__moe__experts=4, model__moe__balance_loss=0.0, model__moe__z_loss=0.0)
    batch = fake_batch(tiny_config())
    *_, after, metrics = run_step(tiny_config(**kinds), batch)
    *_, after_parts, of_parts = run_step(tiny_config(gradient_accumulation=2, **kinds), batch)
    router, router_parts = metrics["router"], of_parts["router"]
    for name in ("expert_tokens", "dropped_tokens", "load_imbalance"):
        np.testing.assert_array_equal(router_parts[name], router[name])
    for name in ("router_entropy", "router_z_loss"):
        np.testing.assert_allclose(router_parts[name], router[name], rtol=0.1 if name == "router_z_loss" else 2e-6)
    assert router_parts["balance_loss"] >= 0.9 and of_parts["loss"] == pytest.approx(metrics["loss"], rel=2e-6)
    for a, b in zip(jax.tree.leaves(after_parts["opt_state"]), jax.tree.leaves(after["opt_state"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(np.abs(b).max(), 1e-9))


def test_router_losses_reach_the_router_and_the_loss_stays_cross_entropy():
    batch = fake_batch(tiny_config())
    norms, losses = [], []
    for weights in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        config = tiny_config(
            model__moe__experts=4, model__moe__balance_loss=weights[0], model__moe__z_loss=weights[1], seed=3
        )
        *_, after, metrics = run_step(config, batch)
        router = after["opt_state"][1].mu["layers"]["ffn"]["router"]["kernel"]
        norms.append(float(np.linalg.norm(router)))
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1] == losses[2]
    assert norms[1] != norms[0] != norms[2]


def test_z_loss_changes_gradients_but_not_the_loss(whole):
    _, batch, _, _, after, metrics = whole
    *_, after_z, with_z = run_step(tiny_config(optimizer__z_loss=0.1), batch)
    assert with_z["loss"] == metrics["loss"] and with_z["grad_norm"] != metrics["grad_norm"]


def test_a_batch_without_targets_has_loss_zero():
    config = tiny_config()
    batch = fake_batch(config)
    batch["loss_mask"][:] = 0
    *_, metrics = run_step(config, batch)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0


def test_runs_of_one_trunk_are_one_program():
    def lowered(**ending):
        config = tiny_config(**ending)
        mesh, model, optimizer = mesh_of({}, jax.devices()[:1]), models.build(config), make_optimizer(config)
        state = abstract_state(model, optimizer, mesh)
        return jit_step(model, optimizer, config, mesh).lower(state, fake_batch(config), ends(config)).as_text()

    trunk = lowered(steps=40, schedule__cooldown=0)
    assert trunk == lowered(steps=55, schedule__cooldown=0) == lowered(steps=50, schedule__cooldown=10)
    assert trunk != lowered(steps=40, schedule__cooldown=0, schedule__warmup=7)
