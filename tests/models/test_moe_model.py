"""Mixtures of experts within the model: where they stand in its tree, what they add up to, generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import packed_batch
from test_moe import LENGTH, PATCHES, ROWS, VOCAB, WIDTH, config

from nmm_jax.models import build

DEPTH, EXPERTS = 4, 6


@pytest.fixture(scope="module")
def batch():
    return packed_batch(ROWS, LENGTH, PATCHES, slots=4, size=12, vocab=VOCAB, seed=3)


def model_config(depth=DEPTH, dtype="float32", **moe):
    c = config(**moe)
    c.model.depth, c.model.dtype = depth, dtype
    return c


def drawn(model, seed=0):
    """Nothing at its initial value, so that no mistake hides in ones and zeros."""
    r = np.random.default_rng(seed)

    def one(path, leaf):
        values = r.normal(size=leaf.shape) * (1.0 if "embed" in str(path) else 0.2)
        return (values + ("scale" in str(path))).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, model.abstract)


def with_equal_experts(dense, c, router_seed=0):
    """The MoE model's tree in which every expert of a layer is that layer's SwiGLU; routers are random."""
    e, every = c.model.moe.experts, c.model.moe.every

    def moe(layers):
        kernels = {name: np.repeat(kernel[:, None], e, axis=1) for name, kernel in layers["ffn"].items()}
        ffn = {"experts": kernels}
        if c.model.moe.modality != "fixed":
            r = np.random.default_rng(router_seed)
            ffn["router"] = {"kernel": r.normal(size=(len(kernels["up"]), WIDTH, e)).astype(np.float32)}
        return layers | {"ffn": ffn}

    layers = dense["layers"]
    if every == 1:
        return dense | {"layers": moe(layers)}
    blocks = [jax.tree.map(lambda leaf, i=i: leaf[i::every], layers) for i in range(every)]
    blocks[-1] = moe(blocks[-1])
    return dense | {"layers": {f"block_{i}": block for i, block in enumerate(blocks)}}


def as_dense(tree, every):
    """Gradients of with_equal_experts' tree, as those of the tree it was made of: summed over the experts."""
    layers = dict(tree["layers"])
    blocks = [layers] if every == 1 else [layers[f"block_{i}"] for i in range(every)]
    blocks[-1] = blocks[-1] | {"ffn": {name: d.sum(1) for name, d in blocks[-1]["ffn"]["experts"].items()}}
    return tree | {
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:]), *blocks)
    }


def value_and_gradients(model, params, batch):
    @jax.jit
    @jax.value_and_grad
    def loss(params):
        hidden, _ = model.hidden(params, batch)
        real = batch["segment_ids"] > 0  # padding meets experts in a dense layer, and none here
        return (jnp.square(hidden @ model.unembedding(params)) * real[..., None]).mean()

    return loss(params)


def assert_equal_but_for_rounding(found, expected):
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "moe, remat",
    [
        (dict(every=1, top_k=2, renormalise=True), "none"),
        (dict(every=4, top_k=2, renormalise=True, modality="grouped", image_experts=2), "none"),
        (dict(every=2, modality="fixed", experts=2), "none"),
        *((dict(every=2, top_k=3, renormalise=True), remat) for remat in ("none", "full", "minimal")),
    ],
    ids=str,
)
def test_equal_experts_are_the_dense_model(batch, moe, remat):
    c = model_config(**dict(experts=EXPERTS) | moe)
    c.model.remat = remat
    model, dense_model = build(c), build(model_config())
    dense = drawn(dense_model)
    params = with_equal_experts(dense, c)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.abstract)
    expected, wanted = value_and_gradients(dense_model, dense, batch)
    value, gradients = value_and_gradients(model, params, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(assert_equal_but_for_rounding, as_dense(gradients, c.model.moe.every), wanted)


def test_statistics_are_by_layer_and_losses_are_their_mean(batch):
    """With equal experts a router changes its own layer's statistics and no others."""
    c = model_config(experts=EXPERTS, top_k=2, renormalise=True, every=2)
    model = build(c)
    hidden = jax.jit(model.hidden)
    both = with_equal_experts(drawn(build(model_config())), c)

    def without_router(layer):
        tree = jax.tree.map(np.array, both)
        tree["layers"]["block_1"]["ffn"]["router"]["kernel"][layer] = 0
        return hidden(tree, batch)[1]

    aux, first_zero, second_zero = hidden(both, batch)[1], without_router(0), without_router(1)
    real = batch["segment_ids"] > 0
    by_modality = np.array([(real & (batch["image_index"] < 0)).sum(), (real & (batch["image_index"] >= 0)).sum()])
    assert aux["expert_tokens"].shape == (2, 2, EXPERTS) and aux["expert_tokens"].dtype == jnp.int32
    np.testing.assert_array_equal(aux["expert_tokens"].sum(2), [2 * by_modality] * 2)
    np.testing.assert_array_equal(aux["dropped_tokens"], [0, 0])
    np.testing.assert_array_equal(aux["expert_tokens"][0], second_zero["expert_tokens"][0])
    np.testing.assert_array_equal(aux["expert_tokens"][1], first_zero["expert_tokens"][1])
    np.testing.assert_allclose(first_zero["router_entropy"][0], by_modality * np.log(EXPERTS), rtol=1e-5)
    np.testing.assert_allclose(aux["router_entropy"][0], second_zero["router_entropy"][0], rtol=1e-5)
    for name, of_zero in (("balance_loss", 1), ("router_z_loss", np.log(EXPERTS) ** 2)):
        others = first_zero[name] + second_zero[name]
        assert float(aux[name]) == pytest.approx(float(others - of_zero), rel=1e-4)
        assert abs(aux[name] - of_zero) > 0.01


def test_dense_model_has_no_statistics(batch):
    model = build(model_config())
    assert jax.jit(model.hidden)(drawn(model), batch)[1] == {}


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        (
            dict(experts=4, shared=1),
            {"router": {"kernel": (4, WIDTH, 4)}, "experts": (4, 4, WIDTH, 24), "shared": (4, WIDTH, 24)},
        ),
        (
            dict(experts=4, top_k=2, granularity=2, shared=1, balance="bias"),
            {
                "router": {"kernel": (4, WIDTH, 8), "bias": (4, 8)},
                "experts": (4, 8, WIDTH, 12),
                "shared": (4, WIDTH, 24),
            },
        ),
        (dict(experts=2, modality="fixed"), {"experts": (4, 2, WIDTH, 24)}),
    ],
    ids=str,
)
def test_tree_is_what_it_says(moe, expected):
    model = build(model_config(**moe))
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"))
    shapes = jax.tree.map(lambda p: p.shape, params)
    assert shapes == jax.tree.map(lambda p: p.shape, model.abstract)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    is_axes = {"is_leaf": lambda x: isinstance(x, tuple)}
    assert jax.tree.map(len, shapes, **is_axes) == jax.tree.map(len, model.logical_axes, **is_axes)
    ffn = shapes["layers"]["ffn"]
    for group in ("experts", "shared"):
        if group in expected:
            *stack, d, f = expected[group]
            expected[group] = {"gate": (*stack, d, f), "up": (*stack, d, f), "down": (*stack, f, d)}
    assert ffn == expected
    axes = model.logical_axes["layers"]["ffn"]["experts"]
    assert axes["gate"] == axes["up"] == ("layers", "expert", "embed", "mlp")
    assert axes["down"] == ("layers", "expert", "mlp", "embed")


def test_initial_experts_differ_and_have_the_spread_of_a_dense_layer():
    c = model_config(depth=3, experts=8, every=1)
    c.model.width, c.model.ffn_width, c.model.init = 128, 256, "open_lm"
    params = jax.jit(build(c).init)(jax.random.key(1, impl="rbg"))["layers"]["ffn"]
    cut = 0.9866  # standard deviation of a normal cut at 3
    std = {name: np.asarray(leaf).std(axis=(2, 3)) for name, leaf in params["experts"].items()}
    np.testing.assert_allclose(std["gate"], np.full((3, 8), cut * 128**-0.5), rtol=0.03)
    np.testing.assert_allclose(std["up"], np.full((3, 8), cut * 128**-0.5), rtol=0.03)
    down = cut * 256**-0.5 / np.sqrt([2, 4, 6])
    np.testing.assert_allclose(std["down"], np.repeat(down[:, None], 8, axis=1), rtol=0.03)
    flat = np.asarray(params["experts"]["up"]).reshape(24, -1)
    correlation = np.corrcoef(flat) - np.eye(24)
    assert np.abs(correlation).max() < 0.05


def test_compute_type(batch):
    """The router's own arithmetic stays in float32; bfloat16 inputs turn few choices."""
    moe = dict(experts=EXPERTS, top_k=2, renormalise=True, every=2)
    model = build(model_config(dtype="bfloat16", **moe))
    params = with_equal_experts(drawn(build(model_config())), model.config)
    hidden, aux = jax.jit(model.hidden)(params, batch)
    assert hidden.dtype == jnp.bfloat16 and aux["balance_loss"].dtype == jnp.float32
    exact, _ = jax.jit(build(model_config(**moe)).hidden)(params, batch)
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(np.asarray(hidden, np.float32)[real], np.asarray(exact)[real], atol=0.2)


@pytest.mark.parametrize(
    "moe",
    [
        dict(experts=4, top_k=2, every=2, shared=1),
        dict(experts=4, modality="grouped"),
        dict(experts=2, modality="fixed", every=2),
    ],
    ids=str,
)
def test_generation_equals_the_full_forward_pass(moe):
    """No token's output depends on how many others go to its experts."""
    model = build(model_config(**moe))
    params = drawn(model)
    whole = packed_batch(2, LENGTH, PATCHES, slots=1, size=12, vocab=VOCAB, seed=5)
    place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    image = slice(2, 2 + PATCHES)
    whole |= {"segment_ids": np.ones_like(place), "attend_until": place + 1, "positions": np.array(place)}
    whole["attend_until"][:, image] = 2 + PATCHES
    whole["image_index"] = np.full_like(place, -1)
    whole["image_index"][:, image] = np.arange(PATCHES)
    expected, _ = jax.jit(model.hidden)(params, whole)

    lengths = np.array([20, 31])  # the rows' prompts; behind them padding
    behind = place >= lengths[:, None]
    prompt = whole | {name: np.where(behind, 0, whole[name]) for name in ("tokens", "segment_ids", "positions")}
    hidden, cache = jax.jit(model.prefill)(params, prompt)
    np.testing.assert_allclose(hidden[0, :20], expected[0, :20], rtol=1e-4, atol=2e-5)
    decode = jax.jit(model.decode)
    for step in range(6):
        position = lengths + step
        hidden, cache = decode(params, whole["tokens"][[0, 1], position], position, cache)
        np.testing.assert_allclose(hidden, expected[np.arange(2), position], rtol=1e-4, atol=2e-5)


def test_biases_of_deep_layers_follow_their_own_tokens():
    """Experts in every layer, weights for images in every second: a period of two blocks, both with experts."""
    c = config(experts=4, balance="bias")
    c.model.depth, c.model.deep.modules, c.model.deep.every = 4, ("qkv",), 2
    model = build(c)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = (
        jnp.zeros((4, 2, 4), jnp.int32).at[jnp.arange(4), 0, jnp.arange(4)].set(10)
    )  # all of layer i chose expert i
    found = model.rebalanced(params, jnp.asarray(tokens))["layers"]
    for layer in range(4):
        moved = found[f"block_{layer % 2}"]["ffn"]["router"]["bias"][layer // 2]
        assert int(jnp.argmin(moved)) == layer and float(moved.max()) > 0
