"""AIM and AIMv2: which patches see which, the network in numpy, sizes."""

import functools
import math

import jax
import numpy as np
import pytest

from configs.base import base
from configs.loading import ConfigError, validate
from nmm_jax import models
from nmm_jax.models.spec import Spec
from tests.parameter_formulas import of_pixels
from tests.pixel_models import PATCHES, ROW, pairs, pixel_config

# Row i: which patches what patch i predicts depends on, behind a prefix of 4 (x), worked by hand.
BEHIND_4 = """
    xxxx.....
    xxxx.....
    xxxx.....
    xxxx.....
    xxxxx....
    xxxxxx...
    xxxxxxx..
    xxxxxxxx.
    xxxxxxxxx"""
BEHIND_1 = "\n".join("x" * (i + 1) + "." * (PATCHES - 1 - i) for i in range(PATCHES))
ALL = "\n".join("x" * PATCHES for _ in range(PATCHES))


def drawn(text):
    return np.array([[c == "x" for c in line.strip()] for line in text.split()])


@functools.cache
def model_and_params(family):
    """Its predictions, jitted, and parameters of which none is as at initialisation."""
    model, rng = models.build(pixel_config(family)), np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), model.abstract)
    return jax.jit(model.predictions), params


@pytest.mark.parametrize(
    ("prefix", "expected"), [(4, BEHIND_4), (1, BEHIND_1), (None, ALL)], ids=["behind 4", "behind 1", "all"]
)
@pytest.mark.parametrize("family", ["aim", "aimv2"])
def test_which_patches_a_prediction_depends_on(family, prefix, expected):
    """Each row of the batch has another patch changed; what then differs from the first row saw that patch."""
    predictions, params = model_and_params(family)
    batch = jax.tree.map(lambda a: np.repeat(a[:1], PATCHES + 1, axis=0), pairs(1))
    for patch in range(PATCHES):
        row, column = divmod(patch, 3)
        batch["images"][patch + 1, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] ^= 85
    if prefix:
        batch["prefix"] = np.full(PATCHES + 1, prefix, np.int32)
    pixels, _ = predictions(params, batch)
    changed = np.abs(np.asarray(pixels[1:] - pixels[0])).max(-1).T > 1e-6  # [position, patch that was changed]
    np.testing.assert_array_equal(changed, drawn(expected))


def test_prefixes_are_of_each_image():
    predictions, params = model_and_params("aim")
    batch = jax.tree.map(lambda a: np.repeat(a[:1], 3, axis=0), pairs(1)) | {"prefix": np.array([2, 7, 2], np.int32)}
    pixels = np.asarray(predictions(params, batch)[0])
    np.testing.assert_allclose(pixels[0], pixels[2], rtol=1e-5, atol=1e-6)
    assert np.abs(pixels[0, 0] - pixels[1, 0]).max() > 1e-3


def test_text_sees_the_image_and_the_text_before_it_and_pixels_see_no_text():
    predictions, params = model_and_params("aimv2")
    batch = jax.tree.map(lambda a: np.repeat(a[:1], ROW + 2, axis=0), pairs(1))
    n = int((batch["segment_ids"][0] > 0).sum())
    for place in range(n):
        batch["tokens"][place + 1, place] = 3
    batch["images"][n + 1, 0, :2, :2] ^= 85
    pixels, text = predictions(params, batch)
    changed = np.abs(np.asarray(text - text[0]))[:, :n].max(-1) > 1e-6
    np.testing.assert_array_equal(changed[1 : n + 1], np.triu(np.ones((n, n), bool)))
    assert changed[n + 1].all()
    np.testing.assert_allclose(pixels[1 : n + 1], np.repeat(pixels[:1], n, axis=0), rtol=1e-5, atol=1e-6)


def test_padding_does_not_matter_to_text():
    predictions, params = model_and_params("aimv2")
    batch = pairs(4)
    other = {**batch, "tokens": np.where(batch["segment_ids"] > 0, batch["tokens"], 7)}
    real = batch["segment_ids"] > 0
    texts = [np.asarray(predictions(params, one)[1])[real] for one in (batch, other)]
    np.testing.assert_array_equal(*texts)


def test_aimv2s_text_is_that_of_late_fusion():
    """With a linear connector, and patches that see what went before them: rows of the image, BOS, text, EOS."""
    predictions, params = model_and_params("aimv2")
    batch = pairs(4)
    late = pixel_config("aimv2", model__family="late_fusion", data__rows="packed", image__positions=PATCHES)
    late.row_length = PATCHES + ROW
    late.model.connector.kind = "linear"
    ahead = lambda name, value: np.concatenate([np.full((4, PATCHES), value, np.int32), batch[name]], axis=1)  # noqa: E731
    place = np.tile(np.arange(PATCHES + ROW, dtype=np.int32), (4, 1))
    fused = {
        **batch,
        "tokens": ahead("tokens", 3),
        "segment_ids": ahead("segment_ids", 1),
        "image_index": np.where(place < PATCHES, place, -1),
        "attend_until": place + 1,
        "positions": place,
    }
    model = models.build(late)
    names = {name: params[name] for name in ("vision", "embed", "layers", "final_norm", "head")}
    connector = {"out": {"kernel": params["projection"], "bias": np.zeros(24, np.float32)}}
    assert jax.tree.map(np.shape, connector) == jax.tree.map(np.shape, model.abstract["connector"])
    expected = jax.jit(model.hidden)({**names, "connector": connector}, fused)[0][:, PATCHES:]
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(predictions(params, batch)[1][real], expected[real], rtol=1e-4, atol=1e-5)


def test_aim_is_the_network_of_its_description():
    """In numpy, float64, patch by patch and head by head."""
    predictions, params = model_and_params("aim")
    batch = pairs(2) | {"prefix": np.array([3, 5], np.int32)}
    found = np.asarray(predictions(params, batch)[0])
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for image, prefix, pixels in zip(batch["images"][:, 0], batch["prefix"], found, strict=True):
        np.testing.assert_allclose(pixels, aim_in_numpy(exact, image, prefix), rtol=2e-4, atol=2e-5)


def aim_in_numpy(params, image, prefix):
    vision, head = params["vision"], params["pixel_head"]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    image = (image / 255 - mean) / std
    patches = [image[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].ravel() for r in range(3) for c in range(3)]
    positions = positions_in_numpy(side=3, width=16)
    x = layer_norm(np.array(patches) @ vision["patches"]["kernel"], vision["embedding_norm"]["scale"]) + positions
    for n in range(2):
        layer = jax.tree.map(lambda a, n=n: a[n], vision["layers"])
        y = layer_norm(x, layer["attention_norm"]["scale"])
        for h in range(2):
            q, k, v = (y @ layer["attention"][name][:, h] for name in ("query", "key", "value"))
            out = np.zeros_like(v)
            for i in range(PATCHES):
                seen = slice(0, max(i + 1, prefix))
                weights = np.exp(k[seen] @ q[i] / math.sqrt(8))
                out[i] = weights @ v[seen] / weights.sum()
            x = x + out @ layer["attention"]["out"][h]
        x = x + mlp(layer_norm(x, layer["ffn_norm"]["scale"]), layer["ffn"])
    x = (layer_norm(x, vision["final_norm"]["scale"]) + positions) @ head["inputs"]
    for n in range(2):
        layer = jax.tree.map(lambda a, n=n: a[n], head["layers"])
        x = x + mlp(layer_norm(x, layer["norm"]["scale"]), layer["ffn"])
    return layer_norm(x, head["norm"]["scale"]) @ head["outputs"]


def positions_in_numpy(side, width):
    """A quarter of the width each: sines and cosines of the column, sines and cosines of the row."""
    out = []
    for r in range(side):
        for c in range(side):
            frequencies = [10_000 ** (-4 * j / width) for j in range(width // 4)]
            out.append([f(a * w) for a in (c, r) for f in (math.sin, math.cos) for w in frequencies])
    return np.array(out)


def layer_norm(x, scale):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale


def mlp(x, ffn):
    inner = x @ ffn["up"]
    return inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) @ ffn["down"]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("aim", {}),
        ("aim", {"model__vision__ffn": "swiglu"}),
        ("aim", {"model__vision__bias": True}),
        ("aim", {"model__vision__bias": True, "model__vision__ffn": "swiglu"}),
        ("aimv2", {}),
    ],
)
def test_parameters_counted_are_those_there_are(family, overrides):
    model = models.build(pixel_config(family, **overrides))
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    counted = of_pixels(model.spec)
    assert counted == {name: size(model.abstract[name]) for name in counted}
    assert set(model.abstract) - set(counted) == (
        {"vision"} if family == "aim" else {"vision", "embed", "layers", "final_norm", "head"}
    )


def test_the_published_head():
    """Linear 1536 -> 2048, 12 blocks of 2 * 2048 * 8192, linear 2048 -> 588, 13 norms."""
    c = base()
    c.model.family, c.image.positions = "aim", 0
    c.model.vision.width, c.model.vision.heads, c.model.vision.ffn = 1536, 12, "gelu"
    spec = Spec.from_config(c)
    assert 1536 * 2048 + 12 * 2 * 2048 * 8192 + 2048 * 588 == 407_003_136
    assert of_pixels(spec) == {"pixel_head": 407_003_136 + 13 * 2048}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__vision__class_token": True}, "model.vision.class_token"),
        ({"model__vision__feature_layer": -2}, "model.vision.feature_layer"),
        ({"image__size": 2}, "image.size = 2"),
        ({"model__aim__head_depth": 0}, "model.aim.head_depth"),
        ({"model__moe__experts": 4}, "model.moe.experts"),
    ],
)
def test_what_has_no_next_patch_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(pixel_config("aim", **overrides))
