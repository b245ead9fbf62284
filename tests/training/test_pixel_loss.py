"""Targets, which patches count, and both losses, against loops in float64."""

import jax
import numpy as np
import pytest

from nmm_jax import models
from nmm_jax.models.spec import Spec
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.training.pixel_loss import PixelObjective, next_patches, predicted, squared_error
from tests.pixel_models import PATCHES, pairs, pixel_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def targets_by_hand(image):
    """Of one image, the patches after the first, each value by itself."""
    found = []
    for number in range(1, PATCHES):
        top, left = 2 * (number // 3), 2 * (number % 3)
        values = [
            (image[top + r, left + c, k] / 255 - MEAN[k]) / STD[k] for r in range(2) for c in range(2) for k in range(3)
        ]
        mean = sum(values) / 12
        variance = sum((v - mean) ** 2 for v in values) / 12
        found.append([(v - mean) / (variance + 1e-6) ** 0.5 for v in values])
    return np.array(found)


def vision_spec():
    return Spec.from_config(pixel_config("aim")).vision


def objective_of(family, **overrides):
    config = pixel_config(family, **overrides)
    model, rng = models.build(config), np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), model.abstract)
    return PixelObjective(model, config, mesh_of({}, jax.devices()[:1])), model, params


def test_targets_are_normalised_patches_in_reading_order():
    images = pairs(3)["images"]
    found = np.asarray(next_patches(vision_spec(), images))
    np.testing.assert_allclose(found, [targets_by_hand(image) for image in images[:, 0]], rtol=1e-5, atol=1e-5)


def test_predicting_zero_has_a_loss_of_one_but_of_none_on_a_single_value():
    spec = Spec.from_config(pixel_config("aim", image__mean=(0.5,) * 3, image__std=(0.5,) * 3)).vision
    images = pairs(3)["images"]
    images[1] = (40, 90, 200)  # one colour: its three channels differ
    images[2] = 90
    error = np.asarray(squared_error(np.zeros((3, PATCHES, 12)), next_patches(spec, images)))
    np.testing.assert_allclose(error, np.repeat([[1], [1], [0]], PATCHES - 1, axis=1), atol=1e-4)


def test_a_patch_is_held_against_the_one_before_it_in_the_row():
    targets = np.asarray(next_patches(vision_spec(), pairs(1)["images"]))
    pixels = np.concatenate([targets, np.full((1, 1, 12), 9.0)], axis=1)  # what the last patch says counts nowhere
    np.testing.assert_array_equal(squared_error(pixels, targets), np.zeros((1, PATCHES - 1)))
    assert np.all(np.asarray(squared_error(np.roll(pixels, 1, axis=1), targets)) > 0.1)


def test_which_patches_count():
    """Of 4 patches; columns are patches 1, 2, 3. Patch n is the first that counts behind a prefix of n."""
    batch = pairs(6) | {"prefix": np.array([1, 2, 3, 1, 1, 2], np.int32)}
    batch["image_mask"][3] = False
    batch["loss_mask"][4] = 0
    expected = [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 1]]
    np.testing.assert_array_equal(predicted(batch, 4), np.array(expected, bool))


def test_prefixes_are_uniform_and_of_the_key_alone():
    objective, *_ = objective_of("aim")
    batch = {"tokens": np.zeros((8_000, 1), np.int32)}
    drawn = np.asarray(objective.prepare(batch, jax.random.key(5))["prefix"])
    counts = np.bincount(drawn, minlength=PATCHES)
    assert drawn.dtype == np.int32 and len(counts) == PATCHES and counts[0] == 0
    assert np.all(np.abs(counts[1:] - 1_000) < 150)  # five standard deviations
    np.testing.assert_array_equal(objective.prepare(batch, jax.random.key(5))["prefix"], drawn)
    assert np.any(np.asarray(objective.prepare(batch, jax.random.key(6))["prefix"]) != drawn)


@pytest.mark.parametrize("family", ["aim", "aimv2"])
def test_losses_are_those_of_a_loop(family):
    objective, model, params = objective_of(family, optimizer__z_loss=0.5)
    batch = pairs(4)
    batch["image_mask"][1], batch["loss_mask"][2] = False, 0
    batch = objective.prepare(batch, jax.random.key(1))
    losses, penalties, auxiliary, told = jax.jit(objective.losses)(params, batch)
    masks = objective.masks(batch)
    pixels, text = model.predictions(params, batch)

    of_patches = []
    for b in (0, 3):
        targets = targets_by_hand(batch["images"][b, 0])
        for patch in range(int(batch["prefix"][b]), PATCHES):
            of_patches.append(np.mean((np.asarray(pixels[b, patch - 1], np.float64) - targets[patch - 1]) ** 2))
    assert masks["pixels"].sum() == len(of_patches)
    assert (masks["pixels"] * losses["pixels"]).sum() == pytest.approx(sum(of_patches), rel=1e-4)
    assert auxiliary == 0 and told == {}

    if family == "aim":
        assert objective.terms == (("pixels", 1.0),) and set(losses) == set(masks) == {"pixels"} and penalties == {}
        return
    assert objective.terms == (("text", 1.0), ("pixels", 0.4)) and set(losses) == set(masks) == {"text", "pixels"}
    logits = np.asarray(text, np.float64) @ np.asarray(params["head"]["kernel"], np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    ce = log_z - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_array_equal(masks["text"], batch["loss_mask"])
    np.testing.assert_allclose(losses["text"], ce, rtol=1e-4)
    np.testing.assert_allclose(penalties["text"], 0.5 * log_z**2, rtol=1e-4)


def test_an_image_that_could_not_be_decoded_counts_for_nobody():
    """Its pixels and its text change no sum."""
    objective, _, params = objective_of("aimv2")
    batch = objective.prepare(pairs(3), jax.random.key(1))
    batch["loss_mask"][1] = 0
    other = batch | {"images": batch["images"].copy(), "tokens": batch["tokens"].copy()}
    other["images"][1] ^= 85
    other["tokens"][1, 1:3] = 7

    def value(params, batch):
        losses, *_ = objective.losses(params, batch)
        return {name: (losses[name] * mask).sum() for name, mask in objective.masks(batch).items()}

    sums = jax.jit(value)
    jax.tree.map(np.testing.assert_array_equal, sums(params, batch), sums(params, other))
