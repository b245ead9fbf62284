"""The step: losses are over the whole batch, microbatches add up to it, metrics count what is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmm_jax import models
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.state import initial_state
from nmm_jax.training.step import jit_step
from tests.fake_batches import fake_batch, tiny_config


def run_step(config, batch):
    mesh, model, optimizer = mesh_of({}, jax.devices()[:1]), models.build(config), make_optimizer(config)
    state = initial_state(model, optimizer, mesh, config.seed)
    before = jax.tree.map(np.asarray, state["params"])
    after, metrics = jit_step(model, optimizer, config, mesh)(state, batch)
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
    for name, value in metrics.items():
        np.testing.assert_allclose(of_parts[name], value, rtol=2e-6, err_msg=name)
    # Adam's first moment is (1 - beta1) * gradient: the gradients themselves, before Adam divides by their size.
    for a, b in zip(jax.tree.leaves(after_parts["opt_state"]), jax.tree.leaves(after["opt_state"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(np.abs(b).max(), 1e-9))


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
