"""AdamW with fully decoupled decay, against the equations in a float64 NumPy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import loading
from configs.base import base
from nmm_jax import models
from nmm_jax.training.optimizer import decayed, make_optimizer

CONFIG = {
    "steps": 12,
    "schedule.warmup": 3,
    "schedule.cooldown": 4,
    "schedule.cooldown_shape": "1-sqrt",
    "optimizer.learning_rate": 0.05,
    "optimizer.weight_decay": 0.1,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.9,
    "optimizer.eps": 1e-3,
    "optimizer.clip_norm": 1.5,
}


def by_hand(weights, gradients, decays, scales):
    """The loop of the module's docstring; weights and each gradient are lists of arrays."""
    w = [x.astype(np.float64) for x in weights]
    m, v = [0 * x for x in w], [0 * x for x in w]
    peak, steps = 0.05, 12
    for t, g in enumerate(gradients):
        norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in g))
        g = [x * min(1.0, 1.5 / norm) for x in g]
        lr = peak * min((t + 1) / 3, 1.0)
        if t >= steps - 4:
            lr = peak * (1 - np.sqrt((t - (steps - 4)) / 4))
        for i in range(len(w)):
            m[i] = 0.8 * m[i] + 0.2 * g[i]
            v[i] = 0.9 * v[i] + 0.1 * g[i] ** 2
            direction = (m[i] / (1 - 0.8 ** (t + 1))) / (np.sqrt(v[i] / (1 - 0.9 ** (t + 1))) + 1e-3)
            shrink = 1 - scales[i] * 0.1 * lr / peak if decays[i] else 1.0
            w[i] = w[i] * shrink - scales[i] * lr * direction
    return w


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_twelve_steps_by_hand(scale):
    """Of the vision tower both rate and decay are scaled; what is after "vision" in another path is not it."""
    rng = np.random.default_rng(0)
    shapes = {"layers": {"vision": (4, 3)}, "norm": {"scale": (3,)}, "vision": {"up": (4, 3)}}
    make = lambda: jax.tree.map(  # noqa: E731
        lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    params, grads = make(), [make() for _ in range(12)]
    want = by_hand(jax.tree.leaves(params), [jax.tree.leaves(g) for g in grads], [True, False, True], [1, 1, scale])

    late = {"model.family": "late_fusion", "model.patch_positions": False, "optimizer.vision_scale": scale}
    optimizer = make_optimizer(loading.load("configs/quickstart.py", CONFIG | late))
    state, w = optimizer.init(params), jax.tree.map(jnp.asarray, params)
    for g in grads:
        updates, state = optimizer.update(g, state, w)
        w = optax.apply_updates(w, updates)
    for got, expected in zip(jax.tree.leaves(w), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_decay_does_not_depend_on_the_peak():
    """With no gradient a weight shrinks by (1 - weight_decay) at the peak, whatever the peak is."""
    for peak in (1e-4, 1.0):
        config = loading.load(
            "configs/quickstart.py", {**CONFIG, "optimizer.learning_rate": peak, "schedule.warmup": 0}
        )
        optimizer = make_optimizer(config)
        w = {"w": jnp.ones(2)}
        updates, _ = optimizer.update({"w": jnp.zeros(2)}, optimizer.init(w), w)
        np.testing.assert_allclose(optax.apply_updates(w, updates)["w"], 0.9, rtol=1e-6)


def test_exclusions_are_substrings_of_paths():
    tree = {"layers": {"attention_norm": {"scale": 0}, "mlp": {"up": 0}}, "patches": {"bias": 0, "kernel": 0}}
    assert decayed(tree, ("norm", "bias")) == {
        "layers": {"attention_norm": {"scale": False}, "mlp": {"up": True}},
        "patches": {"bias": False, "kernel": True},
    }


@pytest.mark.parametrize(
    "config",
    [
        "encoder.py:clip-small",
        "encoder.py:siglip-small",
        "encoder.py:aim-small",
        "deep_fusion.py:cogvlm-small",
        "mm1.py:small,connector=attention",
    ],
)
def test_only_matrices_decay(config):
    config = loading.load(f"configs/{config}")
    model = models.build(config)
    decays = flatten_dict(decayed(model.abstract, config.optimizer.decay_exclude), sep="/")
    axes, arrays = (flatten_dict(tree, sep="/") for tree in (model.logical_axes, model.abstract))
    vectors = {name for name, x in arrays.items() if x.ndim - ("layers" in axes[name]) < 2}
    vectors |= {name for name in arrays if name.endswith(("positions", "queries"))}
    assert not {name for name in vectors if decays[name]}
    assert all(
        decays[name] for name in arrays if name.endswith(("kernel", "query", "out", "up", "down", "embed/tokens"))
    )


def test_early_fusion_decays_as_by_norms_biases_and_positions():
    tree = models.build(loading.load("configs/moe.py:275m-8e")).abstract
    assert decayed(tree, base().optimizer.decay_exclude) == decayed(tree, ("norm", "bias", "positions"))
