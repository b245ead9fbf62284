"""The network as a whole: who influences whom, equal results of equal choices, generation, initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import packed_batch

from configs.base import base
from nmm_jax.models import build
from nmm_jax.models.layers import patchify
from nmm_jax.parallel.sharding import Constrain

VOCAB, PATCHES, LENGTH = 64, 9, 48


def config(**model):
    c = base()
    c.row_length = LENGTH
    c.image.size, c.image.patch, c.image.positions, c.image.per_row = 12, 4, PATCHES, 3
    c.model.update(
        dict(vocab_size=VOCAB, width=32, depth=2, heads=4, dtype="float32", remat="none", patch_positions=True) | model
    )
    return c


def make(c):
    """A model and weights with nothing at its initial value, so that no mistake hides in ones and zeros."""
    model = build(c)
    r = np.random.default_rng(0)

    def draw(path, leaf):
        values = r.normal(size=leaf.shape) * (1.0 if "embed" in str(path) else 0.15)
        return (values + ("scale" in str(path))).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, model.abstract)


@pytest.fixture(scope="module")
def batch():
    return packed_batch(2, LENGTH, PATCHES, slots=3, size=12, vocab=VOCAB, seed=3)


CHOICES = [
    dict(),
    dict(kv_heads=2, norm="layernorm", norm_position="post", qk_norm="head", tie_embeddings=True),
    dict(head_dim=16, qk_norm="none", patch_positions=False, init="open_lm"),
    dict(deep=dict(modules=("qkv", "out", "ffn", "norms"))),
    dict(deep=dict(modules=("ffn",), every=2), norm_position="post", bias=False, ffn="gelu", rope_theta=0.0),
    dict(family="late_fusion", connector=dict(kind="mlp"), vision=dict(width=16, depth=2, heads=2)),
]


def loss_and_gradients(c, params, batch):
    model = build(c)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        hidden, _ = model.hidden(params, batch)
        return jnp.square(hidden @ model.unembedding(params)).mean()

    return loss(params)


def assert_equal_but_for_rounding(found, expected):
    """Differences measured by the array's largest value: a small gradient is a sum of large terms that cancel."""
    assert np.abs(found - expected).max() <= 5e-6 * np.abs(expected).max()


@pytest.mark.parametrize("choice", CHOICES[:2])
def test_scan_and_remat_change_nothing(batch, choice):
    _, params = make(config(**choice, scan_layers=False))
    expected = loss_and_gradients(config(**choice, scan_layers=False, remat="none"), params, batch)
    for scan, remat in ((True, "full"), (True, "minimal"), (False, "full")):
        found = loss_and_gradients(config(**choice, scan_layers=scan, remat=remat), params, batch)
        jax.tree.map(assert_equal_but_for_rounding, found, expected)


@pytest.mark.parametrize("choice", CHOICES)
def test_tree_is_what_it_says(choice):
    model = build(config(**choice))
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"))
    shape = jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert shape == jax.tree.map(lambda p: (p.shape, p.dtype), model.abstract)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert jax.tree.map(lambda p: p.ndim, params) == jax.tree.map(
        len, model.logical_axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    assert model.unembedding(params).shape == (32, VOCAB)
    assert ("head" in params) == (not choice.get("tie_embeddings", False))


def test_compute_type(batch):
    model, params = make(config(dtype="bfloat16"))
    hidden, _ = jax.jit(model.hidden)(params, batch)
    assert hidden.dtype == jnp.bfloat16
    exact, _ = jax.jit(build(config()).hidden)(params, batch)
    np.testing.assert_allclose(np.asarray(hidden, np.float32), exact, atol=0.15)


def changed_places(model, params, batch, changed):
    """[B,S] bool: where hidden states differ between two batches."""
    run = jax.jit(model.hidden)
    difference = jnp.abs(run(params, batch)[0] - run(params, changed)[0]).max(-1)
    return np.asarray(difference > 1e-6)


def test_a_token_is_seen_after_it_and_within_its_segment(batch):
    model, params = make(config())
    b, place = 0, int(np.flatnonzero(batch["segment_ids"][0] == 2)[1])
    place += PATCHES if batch["image_index"][b, place] >= 0 else 0
    changed = batch | {"tokens": batch["tokens"].copy()}
    changed["tokens"][b, place] = 6 + (changed["tokens"][b, place] - 5) % (VOCAB - 6)
    expected = np.zeros((2, LENGTH), bool)
    expected[b, place:] = batch["segment_ids"][b, place:] == 2
    np.testing.assert_array_equal(changed_places(model, params, batch, changed), expected)


def test_an_image_is_seen_by_all_its_patches_and_the_text_after_it(batch):
    model, params = make(config())
    first = int(np.flatnonzero(batch["image_index"][1] == 0)[0])
    changed = batch | {"images": batch["images"].copy()}
    changed["images"][1, 0, -1, -1] ^= 255  # a pixel of the last patch
    expected = np.zeros((2, LENGTH), bool)
    expected[1, first:] = batch["segment_ids"][1, first:] == batch["segment_ids"][1, first]
    np.testing.assert_array_equal(changed_places(model, params, batch, changed), expected)


def test_patches_are_squares_in_reading_order():
    image = np.random.default_rng(0).normal(size=(2, 3, 8, 12, 3)).astype(np.float32)
    patches = patchify(jnp.asarray(image), 4)
    assert patches.shape == (2, 3, 6, 48)
    np.testing.assert_array_equal(patches[1, 2, 4], image[1, 2, 4:8, 4:8].reshape(-1))  # second row, second column


def test_pixels_are_normalised():
    c = config(patch_positions=False)
    model, params = make(c)
    batch = packed_batch(1, LENGTH, PATCHES, slots=3, size=12, vocab=VOCAB)
    grey = {**batch, "images": np.full_like(batch["images"], 128)}
    network = model.network(params)
    place = int(np.flatnonzero(batch["image_index"][0] >= 0)[0])
    pixel = (128 / 255 - np.array(c.image.mean)) / np.array(c.image.std)
    expected = np.tile(pixel, 16) @ np.asarray(params["patches"]["kernel"]) + params["patches"]["bias"]
    found = network.inputs(jax.tree.map(jnp.asarray, grey), Constrain())[0][0, place]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("choice", "shared_rotary"), list(zip(CHOICES, (False, True, False, True, False, False), strict=True))
)
def test_generation_equals_the_full_forward_pass(choice, shared_rotary):
    model, params = make(config(**choice))
    whole = packed_batch(2, LENGTH, PATCHES, slots=1, size=12, vocab=VOCAB, seed=5)
    place = np.arange(LENGTH)
    image = slice(2, 2 + PATCHES)
    whole["segment_ids"][:] = 1
    whole["attend_until"][:] = place + 1
    whole["attend_until"][:, image] = 2 + PATCHES
    whole["image_index"][:] = -1
    whole["image_index"][:, image] = np.arange(PATCHES)
    whole["positions"][:] = place
    if shared_rotary:
        whole["positions"][:, image] = 2
        whole["positions"][:, 2 + PATCHES :] = place[3 : 3 + LENGTH - 2 - PATCHES]
    expected, _ = jax.jit(model.hidden)(params, whole)

    lengths = np.array([20, 31])  # the rows' prompts; behind them padding
    behind = place >= lengths[:, None]
    prompt = whole | {
        "tokens": np.where(behind, 0, whole["tokens"]),
        "segment_ids": np.where(behind, 0, 1),
        "positions": np.where(behind, 0, whole["positions"]),
    }
    hidden, cache = jax.jit(model.prefill)(params, prompt)
    np.testing.assert_allclose(hidden[0, :20], expected[0, :20], rtol=1e-4, atol=1e-5)
    decode = jax.jit(model.decode)
    for step in range(12):
        position = lengths + step
        hidden, cache = decode(params, whole["tokens"][[0, 1], position], position, cache)
        np.testing.assert_allclose(hidden, expected[np.arange(2), position], rtol=1e-4, atol=1e-5)


def test_initial_weights_have_the_stated_spread():
    trees = {}
    for init in ("fan_in_depth_scaled", "open_lm", "normal"):
        model = build(config(init=init, width=256, heads=4, depth=3, qk_norm="none"))
        trees[init] = jax.jit(model.init)(jax.random.key(1, impl="rbg"))  # compiles faster

    def std(init, *path):
        values = trees[init]
        for name in path:
            values = values[name]
        return np.asarray(values).std(axis=tuple(range(1, values.ndim)) if path[0] == "layers" else None)

    d, f, depth = 256, 768, 3
    cut2, cut3 = 0.8796, 0.9866  # standard deviation of a normal cut at 2 and at 3
    close = lambda found, want: np.testing.assert_allclose(found, want, rtol=0.02)  # noqa: E731
    close(std("fan_in_depth_scaled", "embed", "tokens"), 0.1 / 3**0.5)
    close(std("fan_in_depth_scaled", "layers", "ffn", "down"), cut2 * ((1 + depth) * f) ** -0.5 * np.ones(3))
    close(std("fan_in_depth_scaled", "head", "kernel"), cut2 * ((1 + depth) * d) ** -0.5)
    close(std("open_lm", "embed", "tokens"), cut3 * d**-0.5)
    close(std("open_lm", "layers", "attention", "query"), cut3 * d**-0.5 * np.ones(3))
    close(std("open_lm", "layers", "ffn", "down"), cut3 * f**-0.5 / np.sqrt([2, 4, 6]))
    close(std("normal", "layers", "attention", "out"), 0.02 / 6**0.5 * np.ones(3))
