"""The vision tower runs on filled slots, and on less than a part of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmm_jax.models import build
from nmm_jax.models.image_slots import map_filled, part_size
from nmm_jax.parallel.sharding import Constrain
from tests.fake_batches import fake_batch, tiny_config
from tests.traced import equations, outputs

NOTHING = jax.checkpoint_policies.nothing_saveable


def encode(images, w):
    return jnp.tanh(images.reshape(*images.shape[:2], -1).astype(jnp.float32) / 255 @ w)


@pytest.mark.parametrize(("rows", "slots", "share"), [(4, 4, 0.5), (3, 5, 0.3), (2, 1, 1.0), (8, 8, 0.0), (5, 3, 0.9)])
def test_filled_slots_get_their_own_images_and_gradients(rows, slots, share):
    r = np.random.default_rng(rows)
    images = r.integers(0, 256, (rows, slots, 4, 6, 3)).astype(np.uint8)
    mask = r.random((rows, slots)) < share
    w = r.normal(size=(18, 7)).astype(np.float32)
    weights = r.normal(size=(rows, slots, 4, 7)).astype(np.float32) * mask[:, :, None, None]

    def parts(w):
        found, computed = map_filled(lambda x: encode(x, w), images, jnp.asarray(mask), 4, NOTHING, Constrain())
        return (found * weights).sum(), (found, computed)

    def whole(w):
        return (encode(images.reshape(-1, 4, 6, 3), w).reshape(rows, slots, 4, 7) * weights).sum()

    (_, (found, computed)), gradient = jax.jit(jax.value_and_grad(parts, has_aux=True))(w)
    expected = encode(images.reshape(-1, 4, 6, 3), w).reshape(rows, slots, 4, 7)
    np.testing.assert_allclose(np.asarray(found)[mask], np.asarray(expected)[mask], rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(whole)(w), rtol=1e-5, atol=1e-5)
    part = part_size(rows * slots, 4)
    assert mask.sum() <= int(computed) < mask.sum() + part


def test_microbatches_and_weights_that_are_not_trained():
    """In a scan over microbatches, as the training step has them, of a weight beside one that is a constant there."""
    r = np.random.default_rng(0)
    images = r.integers(0, 256, (2, 3, 4, 4, 6, 3)).astype(np.uint8)  # two microbatches of three rows of four slots
    masks = r.random((2, 3, 4)) < 0.5
    w, scale = r.normal(size=(18, 7)).astype(np.float32), r.normal(size=7).astype(np.float32)

    def gradient(w, scale):
        def of_microbatch(total, batch):
            def loss(w):
                encoded, _ = map_filled(lambda x: encode(x, w) * scale, *batch, 4, NOTHING, Constrain())
                return (encoded**2).sum()

            return total + jax.grad(loss)(w), None

        return jax.lax.scan(of_microbatch, jnp.zeros_like(w), (images, jnp.asarray(masks)))[0]

    whole = jax.grad(lambda w: ((encode(images[masks], w) * scale) ** 2).sum())(w)
    np.testing.assert_allclose(jax.jit(gradient)(w, scale), whole, rtol=1e-5, atol=1e-5)
    loops = [e for e in equations(jax.make_jaxpr(gradient)(w, scale).jaxpr) if e.primitive is jax.lax.while_p]
    sums = {v.aval.shape for loop in loops for v in loop.outvars}
    assert w.shape in sums and scale.shape not in sums


def test_a_part_is_a_16th_of_few_slots_and_a_32nd_of_many():
    assert part_size(64, 64) == 4
    assert part_size(8, 64) == 1
    assert part_size(16 * 128, 729) == 64
    assert part_size(16 * 8, 729) == 6  # 4,374 patches


@pytest.mark.parametrize("remat", ["none", "full", "minimal"])
def test_no_part_keeps_a_copy_of_weights_or_images(remat):
    """Its backward pass reads them; they are the same for all parts."""
    keys = {"model.family": "late_fusion", "model.patch_positions": False, "model.scan_layers": True}
    keys |= {"model.vision.width": 64, "model.vision.depth": 3, "model.vision.heads": 4, "model.remat": remat}
    config = tiny_config(**keys)
    model = build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, fake_batch(config))
    program = jax.make_jaxpr(jax.grad(lambda params: model.hidden(params, batch)[0].sum()))(shapes)
    parts = -(-config.batch_rows * config.image.per_row // part_size(config.batch_rows * config.image.per_row, 4))
    once = [x.shape for x in jax.tree.leaves(shapes["vision"]) if x.size > 64]
    once.append((1, batch["image_mask"].size, *batch["images"].shape[2:]))
    made = {v.aval.shape for v in outputs(program.jaxpr)}
    assert once[-1] in made and not {(parts, *shape) for shape in once} & made
