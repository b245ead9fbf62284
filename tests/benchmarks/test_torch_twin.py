"""The twin in PyTorch computes what our model does: same loss, same gradients, same steps of the optimizer."""

import jax
import numpy as np
import pytest

from nmm_jax.models import build
from nmm_jax.parallel.batches import to_global
from nmm_jax.parallel.mesh import make_mesh
from nmm_jax.training.objectives import make_objective
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.schedule import ends, make_schedule
from nmm_jax.training.state import initial_state
from nmm_jax.training.step import jit_step
from tests.fake_batches import fake_batch, tiny_config

pytestmark = pytest.mark.extras

CASES = {
    "early": {},
    "grouped_queries": {"model.kv_heads": 2, "model.qk_norm": "head", "model.tie_embeddings": True},
    "after": {"model.norm_position": "post", "model.norm": "layernorm", "model.rope_theta": 0.0},
    "recomputed": {"model.remat": "full", "model.patch_positions": False},
    "mixture": {"model.moe.experts": 4},
    "mixture_every": {"model.moe.experts": 4, "model.moe.top_k": 2, "model.moe.every": 2, "model.moe.granularity": 2},
    "late": {
        "model.family": "late_fusion", "model.patch_positions": False, "model.vision.width": 16,
        "model.vision.depth": 2, "model.vision.heads": 2, "model.vision.qk_norm": "full", "optimizer.vision_scale": 0.1,
    },
    "late_average": {
        "model.family": "late_fusion", "model.patch_positions": False, "model.vision.width": 16,
        "model.vision.depth": 1, "model.vision.heads": 2, "model.connector.kind": "average", "image.positions": 1,
    },
}  # fmt: skip


def make(case, **more):
    torch_twin = pytest.importorskip("benchmarks.torch_twin")
    pytest.importorskip("transformers")
    config = tiny_config(**CASES[case], **more)
    model = build(config)
    mesh = make_mesh(config, jax.devices()[:1])
    optimizer = make_optimizer(config)
    state = initial_state(model, optimizer, mesh, seed=0)
    rng = np.random.default_rng(0)  # norms and biases begin at 1 and 0, where a mistake would not show
    state["params"] = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), state["params"])
    schedule = make_schedule(config)
    trainer = torch_twin.Trainer(
        config,
        lambda t: float(schedule(t)),
        torch_twin.state_dict(state["params"], model.spec),
        compiled=False,
    )
    return torch_twin, config, model, mesh, optimizer, state, trainer


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case):
    torch_twin, config, model, mesh, _, state, trainer = make(case)
    batch = fake_batch(config)
    objective = make_objective(model, config, mesh)

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        losses, _, auxiliary, _ = objective.losses(params, batch)
        return (losses["text"] * batch["loss_mask"]).sum() / batch["loss_mask"].sum() + auxiliary

    expected, gradients = ours(state["params"])
    minimised, _ = trainer.forward(batch)
    minimised.backward()
    np.testing.assert_allclose(minimised.item(), expected, rtol=1e-5)
    gradients = torch_twin.state_dict(gradients, model.spec)
    found = {name: p.grad for name, p in trainer.twin.named_parameters()}
    assert found.keys() == gradients.keys() - ({"head.weight"} if model.spec.tie_embeddings else set())
    for name, gradient in found.items():
        scale = np.abs(gradients[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(gradient.numpy(), gradients[name], atol=2e-5 * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", ["early", "mixture", "late"])
def test_steps(case):
    """Losses after a few updates, so that the optimizer, its groups and its rates are the same, too."""
    _, config, model, mesh, optimizer, state, trainer = make(case)
    step = jit_step(model, optimizer, config, mesh)
    for t in range(4):
        batch = fake_batch(config, seed=t)
        state, metrics = step(state, to_global(batch, mesh, config.batch_rows), ends(config))
        np.testing.assert_allclose(trainer.step(batch).item(), metrics["loss"], rtol=2e-5, err_msg=f"step {t}")


def test_a_model_without_a_twin_is_refused():
    torch_twin = pytest.importorskip("benchmarks.torch_twin")
    config = tiny_config(**{"model.deep.modules": ("ffn",)})
    with pytest.raises(ValueError, match="model.deep.modules"):
        torch_twin.Twin(config)
