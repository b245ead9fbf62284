"""Deep fusion against an independent decoder that computes both sets of weights everywhere and selects."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed_rows import packed_batch
from test_multimodal import LENGTH, PATCHES, VOCAB, config, make

from nmm_jax.compilation.products import flops, products_in
from nmm_jax.models import build, grouped_matmul
from nmm_jax.models.decoder import run_blocks, stack_blocks
from nmm_jax.models.deep_fusion import ByModality, delimiters, modalities, with_copies
from nmm_jax.models.spec import Spec
from nmm_jax.parallel.sharding import Constrain

EVERYTHING = ("qkv", "out", "ffn", "norms")
KINDS = {
    "mixture of transformers": dict(deep=dict(modules=EVERYTHING)),
    "visual expert": dict(deep=dict(modules=("qkv", "out", "ffn")), kv_heads=2, qk_norm="none"),
    "its biases": dict(deep=dict(modules=("qkv", "out", "ffn"), qkv_bias=True), qk_norm="head"),
    "feed-forward only": dict(deep=dict(modules=("ffn",)), norm_position="post"),
    "attention only": dict(deep=dict(modules=("qkv", "out"))),
    "every second layer": dict(deep=dict(modules=EVERYTHING, every=2), depth=4, kv_heads=2, qk_norm="head"),
}


DEFAULT = ("visual expert", "every second layer")  # of the default suite
EACH_KIND = [kind if kind in DEFAULT else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def batch():
    return packed_batch(2, LENGTH, PATCHES, slots=3, size=12, vocab=VOCAB, seed=3)


def norm(weights, x, axes, eps):
    return x / jnp.sqrt(jnp.square(x).mean(axes, keepdims=True) + eps) * weights["scale"]


def rotary(x, positions, theta):
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


def reference(c, params, x, batch):
    """Hidden states [B,S,D] of the decoder on input embeddings x: each product twice, once with each set of weights."""
    model = c.model
    is_image = batch["image_index"] >= 0
    eps, head_dim = model.norm_eps, model.width // model.heads
    groups = model.heads // (model.kv_heads or model.heads)
    ids, until = batch["segment_ids"], batch["attend_until"]
    mask = (ids[:, :, None] == ids[:, None, :]) & (np.arange(LENGTH) < until[:, :, None])

    def layer_weights(i):
        layers = params["layers"]
        if "block_0" in layers:
            n = len(layers)
            return jax.tree.map(lambda a: a[i // n], layers[f"block_{i % n}"])
        return jax.tree.map(lambda a: a[i], layers)

    def both(text, image, f, x):
        """f with the text's weights, and with the images' where they have some; each position its own."""
        mine = f(text, x)
        if image is None:
            return mine
        other = f({**text, **image}, x)
        return jnp.where(is_image.reshape(is_image.shape + (1,) * (mine.ndim - 2)), other, mine)

    def sublayers(w):
        image = w.get("image", {})
        apart = image.get("attention", {})

        def project(name):
            def f(weights, x):
                y = jnp.einsum("bsd,dhk->bshk", x, weights[name])
                return y + weights.get(f"{name}_bias", 0.0)

            return f

        def head_norm(name, y):
            axes = (-2, -1) if model.qk_norm == "full" else (-1,)
            if model.qk_norm == "none":
                return y
            own = apart.get(f"{name}_norm")
            return both(w["attention"][f"{name}_norm"], own, lambda weights, y: norm(weights, y, axes, eps), y)

        def attention(x):
            own = apart if "query" in apart else None
            q, k, v = (both(w["attention"], own, project(name), x) for name in ("query", "key", "value"))
            q, k = head_norm("query", q), head_norm("key", k)
            q, k = (rotary(y, batch["positions"], model.rope_theta) for y in (q, k))
            k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
            scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(head_dim)
            weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), -1)
            y = jnp.einsum("bhqs,bshk->bqhk", weights, v)
            out = lambda weights, y: jnp.einsum("bqhk,hkd->bqd", y, weights["out"])  # noqa: E731
            return both(w["attention"], apart if "out" in apart else None, out, y)

        def ffn(x):
            f = lambda w, x: (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]  # noqa: E731
            return both(w["ffn"], image.get("ffn"), f, x)

        def normed(name, x):
            return both(w[name], image.get(name), lambda weights, x: norm(weights, x, -1, eps), x)

        return attention, ffn, normed

    for i in range(model.depth):
        attention, ffn, normed = sublayers(layer_weights(i))
        if model.norm_position == "post":
            x = x + normed("attention_norm", attention(x))
            x = x + normed("ffn_norm", ffn(x))
        else:
            x = x + attention(normed("attention_norm", x))
            x = x + ffn(normed("ffn_norm", x))
    final = params.get("image_final_norm")
    return both(params["final_norm"], final, lambda weights, x: norm(weights, x, -1, eps), x)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_joint_attention_and_gradients_equal_computing_both_and_selecting(kind, batch):
    c = config(**KINDS[kind])
    model, params = make(c)
    real = (batch["segment_ids"] > 0)[..., None]
    weights = np.random.default_rng(1).normal(size=(2, LENGTH, c.model.width)).astype(np.float32) * real

    def ours(params):
        hidden, _ = model.hidden(params, batch)
        return (hidden * weights).sum(), hidden

    def theirs(params):
        x, _ = model.network(params).inputs(batch, Constrain())
        hidden = reference(c, params, x, batch)
        return (hidden * weights).sum(), hidden

    (_, found), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (_, expected), wanted = jax.jit(jax.value_and_grad(theirs, has_aux=True))(params)
    np.testing.assert_allclose(found * real, expected * real, rtol=0, atol=2e-5 * float(jnp.abs(expected).max()))
    for (path, g), w in zip(jax.tree_util.tree_flatten_with_path(gradients)[0], jax.tree.leaves(wanted), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(g, w, rtol=0, atol=3e-5 * float(jnp.abs(w).max()) + 1e-9, err_msg=name)
        assert "image" not in name or float(jnp.abs(w).max()) > 0, f"{name} has no gradient: nothing was compared"


@pytest.mark.parametrize("kind", EACH_KIND)
def test_text_alone_gives_the_base_decoders_numbers(kind, batch):
    choice = KINDS[kind]
    model, params = make(config(**choice))
    base = build(config(**{k: v for k, v in choice.items() if k != "deep"}))
    dense = _without_images(params)
    text = batch | {"image_index": np.full_like(batch["image_index"], -1)}
    bare = text | {name: batch[name][:, :0] for name in ("images", "image_mask")}
    real = batch["segment_ids"] > 0
    expected = jax.jit(base.hidden)(dense, bare)[0]
    # Rows without image slots never meet the dispatch: the very same program.
    np.testing.assert_array_equal(jax.jit(model.hidden)(params, bare)[0], expected)
    # With slots that are all empty, every position goes through the text's group.
    found = jax.jit(model.hidden)(params, text)[0]
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5)


def _without_images(params):
    """The base decoder's parameters, of which a deep model's are a superset under the same names."""
    layers = params["layers"]
    if "block_0" in layers:  # interleave the blocks of a period again
        blocks = [{k: v for k, v in layers[f"block_{j}"].items() if k != "image"} for j in range(len(layers))]
        layers = jax.tree.map(lambda *a: np.stack(a, 1).reshape(-1, *a[0].shape[1:]), *blocks)
    layers = {k: v for k, v in layers.items() if k != "image"}
    return {k: v for k, v in params.items() if k != "image_final_norm"} | {"layers": layers}


def test_copied_weights_begin_as_the_texts():
    model = build(config(deep=dict(modules=EVERYTHING, initial="copy", every=2), depth=4))
    params = jax.jit(model.init)(jax.random.key(0))
    block = params["layers"]["block_1"]
    jax.tree.map(np.testing.assert_array_equal, block["image"], {k: block[k] for k in block["image"]})
    assert "image" not in params["layers"]["block_0"]
    np.testing.assert_array_equal(params["image_final_norm"]["scale"], params["final_norm"]["scale"])
    apart = build(config(deep=dict(modules=EVERYTHING)))
    params = jax.jit(apart.init)(jax.random.key(0))
    assert not np.array_equal(params["layers"]["image"]["ffn"]["up"], params["layers"]["ffn"]["up"])
    copied = with_copies(params)["layers"]
    np.testing.assert_array_equal(copied["image"]["ffn"]["up"], params["layers"]["ffn"]["up"])


# BOS boi p p eoi boi p p eoi a | BOS b pad, two images side by side
INDEX = np.array([[-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, -1, -1, -1]])
SEGMENTS = np.array([[1] * 10 + [2, 2, 0]])


@pytest.mark.parametrize(
    ("weights", "images"),
    [
        ("text", [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, -1]),
        ("boi_image", [0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, -1]),  # CogVLM's rule: each eoi is the text's
        ("image", [0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, -1]),
    ],
)
def test_delimiters_of_adjacent_images(weights, images):
    c = config(delimiter_weights=weights)
    c.image.positions, c.data.image_delimiters = 2, True
    spec = Spec.from_config(c)
    batch = {"image_index": jnp.asarray(INDEX), "segment_ids": jnp.asarray(SEGMENTS)}
    assert modalities(spec, batch)[0].tolist() == images
    boi, eoi = delimiters(jnp.asarray(INDEX), 2)
    assert np.flatnonzero(boi[0]).tolist() == [1, 5] and np.flatnonzero(eoi[0]).tolist() == [4, 8]


def test_delimiter_vectors_stand_before_and_behind_images():
    c = config(delimiter_vectors=True)
    c.image.positions, c.image.size, c.data.image_delimiters, c.row_length = 4, 8, True, 16
    model, params = make(c)
    index = np.array([[-1, -1, 0, 1, 2, 3, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1]])
    batch = {
        "tokens": jnp.full((1, 16), 7),
        "image_index": jnp.asarray(index),
        "images": jnp.zeros((1, 2, 8, 8, 3), jnp.uint8),
        "image_mask": jnp.ones((1, 2), bool),
    }
    x, _ = model.network(params).inputs(batch, Constrain())
    for places, vector in (((1, 7), "boi"), ((6, 12), "eoi")):
        for place in places:
            np.testing.assert_array_equal(x[0, place], params["delimiters"][vector])
    for place in (0, 13, 15):
        np.testing.assert_array_equal(x[0, place], params["embed"]["tokens"][7])


@pytest.mark.parametrize("text_is_frozen", [False, True])
def test_flops_are_the_dense_blocks(text_is_frozen):
    """Of the compiled gradient of a layer, half of its positions images, attention left out.

    With the text's weights frozen, weight gradients are those of the images' half.
    """
    tokens, width, ffn = 8_192, 64, 512
    keys = dict(width=width, ffn_width=ffn, heads=2, qk_norm="none", depth=1)
    sizes = {"image": tokens // 2 + 5, "text": tokens // 2 - 5}

    def program(**deep):
        spec = Spec.from_config(config(**keys, **deep))
        graph, params = nnx.split(nnx.eval_shape(lambda: stack_blocks(spec, rngs=nnx.Rngs(0))))
        frozen = {}
        if deep and text_is_frozen:
            params, frozen = {"image": params["image"]}, {k: v for k, v in params.items() if k != "image"}
        x = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
        modality = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

        def gradients(params, frozen, x, dy, modality):
            def forward(params, x):
                split = ByModality(modality, Constrain()) if deep else None
                attend = lambda q, k, v: (q * k + v, None)  # noqa: E731
                apply = lambda block, x, _: block(x, None, modality, attend, Constrain(), split)  # noqa: E731
                blocks = nnx.merge(graph, nnx.State({**params, **frozen}))
                return run_blocks(spec, blocks, x, apply)[0]

            y, pull = jax.vjp(forward, params, x)
            return y, pull(dy)

        return jax.jit(gradients).lower(dict(params), frozen, x, x, modality).compile().as_text()

    def trips(text, loop):
        """Over a group's blocks, on average."""
        (product,) = products_in(text, loop.attribute("body"))
        is_weight_gradient = product.contracted in grouped_matmul.BLOCKS  # a sum over the rows of a block
        size = product.contracted if is_weight_gradient else product.shapes[0][0]
        groups = ["image"] if text_is_frozen and is_weight_gradient else list(sizes)
        blocks = dict(grouped_matmul.blocks_of(np.array([sizes[g] for g in groups]), tokens))[size]
        return Fraction(int(blocks.sum()), len(groups))

    dense = flops(program())
    assert dense == 3 * 2 * tokens * (4 * width**2 + 3 * width * ffn)
    deep = int(flops(program(deep=dict(modules=("qkv", "out", "ffn"))), trips))
    print(f"deep / dense FLOPs: {deep / dense:.4f}")
    expected = dense * (2.5 / 3 if text_is_frozen else 1)
    assert expected <= deep <= 1.05 * expected
