"""Objectives of one term and of several: their weighted sum, over the whole batch however it is cut."""

import jax
import numpy as np
import pytest

from nmm_jax import models
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.training import objectives
from nmm_jax.training.contrastive_loss import ContrastiveObjective
from nmm_jax.training.objectives import LanguageObjective, make_objective
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.pixel_loss import PixelObjective
from nmm_jax.training.schedule import ends
from nmm_jax.training.state import trainable
from nmm_jax.training.step import jit_step
from tests.fake_batches import tiny_config
from tests.pixel_models import pairs, pixel_config

ROWS = 8


def one_device():
    return mesh_of({}, jax.devices()[:1])


def one_step(number, **overrides):
    """Metrics, gradients and the parameters before update number `number` of AIMv2 with two sources."""
    sources = {"data__sources": ("a", "b"), "data__weights": (0.5, 0.5), "batch_rows": ROWS}
    config = pixel_config("aimv2", optimizer__clip_norm=0.0, **sources, **overrides)
    model, optimizer, mesh = models.build(config), make_optimizer(config), one_device()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), model.abstract)
    state = {"step": np.int32(number), "params": params, "opt_state": optimizer.init(trainable(model, params))}
    batch = two_sources()
    step = (
        jit_step(model, optimizer, config, mesh)
        .lower(state, batch, ends(config))
        .compile({"xla_backend_optimization_level": 0})
    )
    after, metrics = step(jax.device_put(state), jax.device_put(batch), ends(config))
    return model, config, params, after["opt_state"][1].mu, jax.device_get(metrics)


def two_sources():
    """Rows 0 to 4 are of source 0, 5 to 7 of source 1, where there is something; the last row has no pair."""
    batch = pairs(ROWS)
    batch["source"][5:] = 1
    batch["source"] *= batch["segment_ids"] > 0
    batch["source"][5:, 0] = 1  # a row's first position is never padding
    batch["loss_mask"][7] = 0
    return batch


@pytest.fixture(scope="module")
def whole():
    return one_step(3)


def test_terms_and_sources_are_weighted_sums(whole):
    """Against sums in NumPy over the objective's own losses, with the prefixes of the seed and the step."""
    model, config, params, _, metrics = whole
    objective = make_objective(model, config, one_device())
    batch = objective.prepare(jax.device_put(two_sources()), jax.random.fold_in(jax.random.key(config.seed), 3))
    compute = jax.jit(lambda params, batch: (objective.losses(params, batch), objective.masks(batch)))
    found = compute.lower(params, batch).compile({"xla_backend_optimization_level": 0})(params, batch)
    (losses, penalties, auxiliary, told), masks = jax.device_get(found)
    assert not penalties and not told and auxiliary == 0
    (_, one), (_, weight) = objective.terms
    assert (one, weight) == (1.0, 0.4)
    assert masks["pixels"].shape == (ROWS, 8) != masks["text"].shape

    def quotient(name, rows):
        return (masks[name][rows] * losses[name][rows]).sum() / masks[name][rows].sum()

    for rows, got in (
        (slice(0, 8), metrics["loss"]),
        (slice(0, 5), metrics["loss_sum_by_source"][0] / metrics["mask_sum_by_source"][0]),
        (slice(5, 8), metrics["loss_sum_by_source"][1] / metrics["mask_sum_by_source"][1]),
    ):
        assert got == pytest.approx(quotient("text", rows) + 0.4 * quotient("pixels", rows), rel=1e-5)
    for name, loss in metrics["terms"].items():
        assert loss == pytest.approx(quotient(name, slice(0, 8)), rel=1e-5)


def test_microbatches_with_what_is_drawn_for_the_whole_batch(whole):
    """Rows have other numbers of predicted patches and of tokens, and microbatches the whole batch's prefixes."""
    *_, gradients, metrics = whole
    *_, of_parts, parts_metrics = one_step(3, gradient_accumulation=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parts_metrics, metrics)
    for a, b in zip(jax.tree.leaves(of_parts), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(np.abs(b).max(), 1e-9))


def test_every_model_has_its_objective():
    kinds = {"aim": PixelObjective, "aimv2": PixelObjective, "contrastive": ContrastiveObjective}
    for family, kind in kinds.items():
        config = pixel_config(family)
        assert isinstance(make_objective(models.build(config), config, one_device()), kind)
    config = tiny_config()
    assert isinstance(make_objective(models.build(config), config, one_device()), LanguageObjective)


def test_what_the_language_objective_tells(monkeypatch):
    """Slots apart from what routers tell, whose losses are the auxiliary loss, a share for each microbatch."""
    statistics = {"vision_slots": 5, "balance_loss": 2.0, "router_z_loss": 3.0, "expert_tokens": 7}
    config = tiny_config(
        gradient_accumulation=2, optimizer__z_loss=0.5, model__moe__balance_loss=0.1, model__moe__z_loss=0.01
    )

    class FakeModel:
        hidden = staticmethod(lambda params, batch, constrain: (None, statistics))
        unembedding = staticmethod(lambda params: None)

    monkeypatch.setattr(objectives, "cross_entropy", lambda *_: (np.ones((1, 2)), np.full((1, 2), 4.0)))
    objective = LanguageObjective(FakeModel(), config, one_device())
    losses, penalties, auxiliary, told = objective.losses({}, {"targets": None})
    np.testing.assert_array_equal(losses["text"], [[1, 1]])
    np.testing.assert_array_equal(penalties["text"], [[8, 8]])
    assert auxiliary == pytest.approx(0.1 * 2 / 2 + 0.01 * 3 / 2)
    assert told == {"vision_slots": 5, "router": {"balance_loss": 1.0, "router_z_loss": 1.5, "expert_tokens": 7}}
