"""Losses of pairs against loops over logits in NumPy, and gradients against autodiff of the dense form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmm_jax.training.contrastive_loss import contrastive_losses

B, E = 11, 6


def pairs(seed=0, b=B, dtype=np.float64):
    rng = np.random.default_rng(seed)
    image, text = (rng.normal(size=(b, E)) for _ in range(2))
    text = text + image
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    valid = rng.random(b) < 0.7
    valid[:2] = True
    return image.astype(dtype), text.astype(dtype), dtype(7.3), dtype(-2.1), valid


def by_hand(kind, image, text, scale, bias, valid):
    """Losses and accuracy from the definitions, one logit at a time."""
    rows = np.flatnonzero(valid)
    logit = {(i, j): scale * float(image[i] @ text[j]) + bias for i in rows for j in rows}
    losses, right = np.zeros(len(image)), np.zeros(len(image))
    for i in rows:
        if kind == "softmax":
            of_texts = math.log(sum(math.exp(logit[i, j]) for j in rows))
            of_images = math.log(sum(math.exp(logit[j, i]) for j in rows))
            losses[i] = (of_texts - logit[i, i] + of_images - logit[i, i]) / 2
        else:
            losses[i] = sum(math.log1p(math.exp(-logit[i, j] if i == j else logit[i, j])) for j in rows)
        right[i] = all(logit[i, j] <= logit[i, i] for j in rows)
    return losses, right


def dense(kind, image, text, scale, bias, valid):
    """What one writes down with all logits at once; autodiff gives its gradients."""
    logits = scale * image @ text.T + bias
    both = valid[:, None] & valid
    if kind == "softmax":
        shown = jnp.where(both, logits, -1e30)
        losses = (jax.nn.logsumexp(shown, 1) + jax.nn.logsumexp(shown, 0)) / 2 - jnp.diag(logits)
    else:
        signs = 2 * jnp.eye(len(logits), dtype=logits.dtype) - 1
        losses = -jnp.where(both, jax.nn.log_sigmoid(signs * logits), 0).sum(1)
    return jnp.where(valid, losses, 0)


@pytest.mark.parametrize("kind, chunk", [(k, c) for k in ("softmax", "sigmoid") for c in (1, 4, 128)])
def test_values_and_gradients(kind, chunk):
    """In float64, with chunks that divide the batch and that do not."""
    with jax.enable_x64(True):
        arrays = pairs()
        losses, right = contrastive_losses(kind, *map(jnp.asarray, arrays), chunk=chunk)
        want, want_right = by_hand(kind, *arrays)
        np.testing.assert_allclose(losses, want, rtol=1e-12)
        np.testing.assert_array_equal(right, want_right)

        weights = jnp.asarray(np.random.default_rng(1).random(B))
        valid = arrays[-1]

        def total(function, *x):
            return (weights * function(kind, *x, valid)).sum()

        def ours(*x):
            return contrastive_losses(*x, chunk=chunk)[0]

        got = jax.grad(lambda *x: total(ours, *x), argnums=(0, 1, 2, 3))(*arrays[:-1])
        expected = jax.grad(lambda *x: total(dense, *x), argnums=(0, 1, 2, 3))(*arrays[:-1])
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_pairs_that_do_not_count():
    """Taking them away changes nothing, whatever they hold; and a batch without any pair has no loss."""
    image, text, scale, bias, valid = pairs(dtype=np.float32)
    for kind in ("softmax", "sigmoid"):
        losses, right = contrastive_losses(kind, image, text, scale, bias, valid)
        alone, right_alone = contrastive_losses(kind, image[valid], text[valid], scale, bias, valid[valid])
        np.testing.assert_allclose(losses[valid], alone, rtol=1e-5)
        np.testing.assert_array_equal(right[valid], right_alone)
        assert not losses[~valid].any() and not right[~valid].any()

        def total(image, kind=kind):
            return contrastive_losses(kind, image, text, scale, bias, np.zeros(B, bool))[0].sum()

        value, gradient = jax.value_and_grad(total)(image)
        assert value == 0 and not np.asarray(gradient).any()


def test_an_untrained_model_has_the_loss_of_guessing():
    """Nothing known: ln B of softmax; of sigmoid with logits of 0, B ln 2."""
    equal = np.tile(np.float32([1, 0]), (16, 1))
    valid = np.ones(16, bool)
    losses, _ = contrastive_losses("softmax", equal, equal, np.float32(10), np.float32(0), valid)
    np.testing.assert_allclose(losses, math.log(16), rtol=1e-6)
    losses, _ = contrastive_losses("sigmoid", equal, equal, np.float32(10), np.float32(-10), valid)
    np.testing.assert_allclose(losses, 16 * math.log(2), rtol=1e-6)
