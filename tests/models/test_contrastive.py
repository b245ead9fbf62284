"""Two towers into one space: what is pooled, what an embedding depends on, the scale's clamp, and that they learn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import loading
from nmm_jax import models
from nmm_jax.models.contrastive import SharedSpace
from nmm_jax.training.contrastive_loss import contrastive_losses

T, B = 12, 6
TINY = {
    "data.tokenizer": "bytes",
    "row_length": T,
    "batch_rows": B,
    "image.size": 8,
    "image.patch": 4,
    "model.vocab_size": 64,
    "model.width": 32,
    "model.heads": 4,
    "model.ffn_width": 48,
    "model.depth": 1,
    "model.vision.width": 16,
    "model.vision.depth": 1,
    "model.vision.heads": 2,
    "model.vision.ffn_width": 24,
    "model.contrastive.width": 8,
}


def build(name="clip-small", **overrides):
    keys = TINY | {k.replace("__", "."): v for k, v in overrides.items()}
    model = models.build(loading.load(f"configs/encoder.py:{name}", keys))
    rng = np.random.default_rng(1)  # larger than at the beginning, biases too, so that everything matters
    return model, jax.tree.map(lambda x: rng.normal(scale=0.4, size=x.shape).astype(x.dtype), model.abstract)


def pairs(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, T + 1, B)
    real = np.arange(T) < lengths[:, None]
    return {
        "tokens": (rng.integers(6, 64, (B, T)) * real).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "positions": (np.arange(T) * real).astype(np.int32),
        "images": rng.integers(0, 256, (B, 1, 8, 8, 3)).astype(np.uint8),
        "image_mask": np.ones((B, 1), bool),
    }


KINDS = {
    "clip": ("clip-small", {}),
    "siglip": ("siglip-small", {}),
    "mean": ("siglip-small", {"model__contrastive__pooling": "mean", "model__contrastive__text_attention": "causal"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings(kind):
    model, params = build(KINDS[kind][0], **KINDS[kind][1])
    batch, embed = pairs(), jax.jit(model.embeddings)
    image, text, scale, bias = embed(params, batch)
    assert image.shape == text.shape == (B, 8) and image.dtype == text.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-6)
    assert float(scale) == pytest.approx(math.exp(params["contrastive"]["scale"]), rel=1e-6)
    assert ("bias" in params["contrastive"]) == (kind != "clip") == bool(bias)

    # Padding does not matter, and a row has nothing to do with the others.
    other = {**batch, "tokens": np.where(batch["segment_ids"] > 0, batch["tokens"], 7).astype(np.int32)}
    order = np.array([4, 0, 5, 1, 1, 3])
    again = embed(params, {name: x[order] for name, x in other.items()})
    np.testing.assert_allclose(again[0], image[order], atol=1e-5)
    np.testing.assert_allclose(again[1], text[order], atol=1e-5)


def test_every_token_matters_up_to_the_last():
    """The last position is pooled: all of the text reaches it."""
    model, params = build()
    batch = pairs()

    def first(table):
        return model.text_embeddings(params | {"embed": {"tokens": table}}, batch)[0, 0]

    gradient = jax.jit(jax.grad(first))(params["embed"]["tokens"])
    touched = set(np.flatnonzero(np.abs(gradient).sum(1)).tolist())
    assert touched == set(batch["tokens"][0][batch["segment_ids"][0] > 0].tolist())


@pytest.mark.parametrize("depth", [1, 2])
def test_causal_or_both_ways(depth):
    """The last position sees all of the text either way; what it sees there has seen more only from layer 2 on."""
    batch, found = pairs(), []
    for attention in ("causal", "bidirectional"):
        model, params = build(model__contrastive__text_attention=attention, model__depth=depth)
        found.append(jax.jit(model.text_embeddings)(params, batch))
    assert (np.abs(found[0] - found[1]).max() < 1e-5) == (depth == 1)


def test_attention_pooling_in_numpy():
    """SigLIP's head: probe, attention over heads, x + MLP(norm(x)); in float64 from its parameters."""
    model, params = build("siglip-small")
    features = np.random.default_rng(3).normal(size=(2, 4, 16))
    pooling = model.network(params).pooling
    got = pooling(jnp.asarray(features, jnp.float32), models.model.ON_ONE_DEVICE)

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["pooling"])
    a = p["attention"]
    for n in range(2):
        heads = []
        for h in range(2):
            q = p["probe"] @ a["query"][:, h] + a["query_bias"][h]
            k = features[n] @ a["key"][:, h] + a["key_bias"][h]
            v = features[n] @ a["value"][:, h] + a["value_bias"][h]
            scores = np.exp(k @ q / math.sqrt(8))
            heads.append(scores / scores.sum() @ v)
        y = sum(head @ a["out"][h] for h, head in enumerate(heads)) + a["out_bias"]
        x = (y - y.mean()) / np.sqrt(y.var() + 1e-6) * p["norm"]["scale"] + p["norm"]["bias"]
        u = x @ p["ffn"]["up"] + p["ffn"]["up_bias"]
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        np.testing.assert_allclose(got[n], y + u @ p["ffn"]["down"] + p["ffn"]["down_bias"], atol=1e-4)


def test_the_scale_is_put_back():
    model, params = build()
    for value, want in ((-1.0, 0.0), (2.0, 2.0), (5.0, math.log(100))):
        moved = params | {"contrastive": params["contrastive"] | {"scale": jnp.float32(value)}}
        put_back = model.after_update(moved)
        assert float(put_back["contrastive"]["scale"]) == pytest.approx(want)
        assert put_back["vision"] is moved["vision"]
    model, params = build("siglip-small")  # which has no clamp
    assert model.after_update(params) is params


@pytest.mark.parametrize("name, scale, bias", [("clip-small", 1 / 0.07, None), ("siglip-small", 10, -10)])
def test_what_cosines_begin_with(name, scale, bias):
    model, _ = build(name)
    _, state = nnx.split(SharedSpace(model.spec, rngs=nnx.Rngs(params=0)))
    own = nnx.to_pure_dict(state)
    assert math.exp(own["scale"]) == pytest.approx(scale, rel=1e-6)
    assert own.get("bias") == bias


@pytest.mark.slow
def test_every_parameter_has_a_gradient_and_pairs_are_learned():
    model, params = build("siglip-small")
    params["contrastive"] |= {"scale": jnp.float32(2), "bias": jnp.float32(-2)}
    batch = pairs()
    optimizer = optax.adam(2e-2)

    def loss(params):
        found = model.embeddings(params, batch)
        losses, right = contrastive_losses(model.spec.contrastive.loss, *found, np.ones(B, bool))
        return losses.mean(), right.mean()

    @jax.jit
    def step(params, state):
        (value, right), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value, right, gradients

    state = optimizer.init(params)
    first = None
    for _ in range(150):
        params, state, value, right, gradients = step(params, state)
        first = (value, gradients) if first is None else first
    for path, gradient in jax.tree_util.tree_leaves_with_path(first[1]):
        if "key_bias" not in jax.tree_util.keystr(path):  # adds the same to all of a query's scores
            assert np.abs(gradient).max() > 0, path
    assert value < first[0] / 4 and right == 1
