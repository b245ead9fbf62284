"""The loss of predicted pixels (AIM, El-Nouby et al., arXiv 2401.08541; AIMv2, Fini et al., arXiv 2411.14402).

    loss of a patch = mean over its 3 p² values of (prediction - target)²
    loss            = mean over the patches behind the prefixes of all images of the global batch

Targets are normalised patch by patch, as MAE's (He et al., arXiv 2111.06377): minus the mean of a patch's values, over
their standard deviation. The papers' squared l2 norm is the sum over a patch's values, 3 p² times the loss here; with
the mean, as MAE's, predicting zero has a loss of 1 at any patch size (of 0 where all values of a patch are one), and
AIMv2's weight of 0.4 is beside a text loss in nats per token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key, UInt8
from ml_collections import ConfigDict

from nmm_jax.models.aim import PixelModel, PixelTextModel
from nmm_jax.models.layers import normalised_patches
from nmm_jax.models.spec import VisionSpec
from nmm_jax.parallel.sharding import Constrain
from nmm_jax.training.losses import cross_entropy

Batch = dict[str, Array]

VARIANCE_EPS = 1e-6  # MAE's; on values of the normalised image


def next_patches(spec: VisionSpec, images: UInt8[Array, "B 1 height width 3"]) -> Float[Array, "B P-1 pixels"]:
    """The targets: patches 1, 2, ..., P - 1 in reading order, normalised, float32."""
    patches = normalised_patches(spec, images, jnp.float32)[:, 0, 1:]
    centred = patches - patches.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + VARIANCE_EPS)


def predicted(batch: Batch, patches: int) -> Bool[Array, "B P-1"]:
    """Which of patches 1, 2, ..., P - 1 count: those behind their image's prefix, where there is an image.

    With a prefix of n, patches 0 to n - 1 are given and patch n is the first that counts. An image that could not be
    decoded has no loss on its text either, which is how it is known.
    """
    there = batch["image_mask"][:, 0] & (batch["loss_mask"].sum(1) > 0)
    return there[:, None] & (jnp.arange(1, patches) >= batch["prefix"][:, None])


def squared_error(pixels: Float[Array, "B P pixels"], targets: Float[Array, "B P-1 pixels"]) -> Float[Array, "B P-1"]:
    """Of what each patch but the last predicted for the next one."""
    return jnp.square(pixels[:, :-1].astype(jnp.float32) - targets).mean(-1)


class PixelObjective:
    """The next patch's pixels and, in AIMv2, the next token (training/objectives.py says what an objective is)."""

    def __init__(self, model: PixelModel, config: ConfigDict, mesh: Mesh):
        assert model.spec.vision and model.spec.aim
        self._model = model
        self._vision = model.spec.vision
        self._text = isinstance(model, PixelTextModel)
        self._chunks, self._z_loss = config.model.vocab_chunks, config.optimizer.z_loss
        self._constrain = Constrain(mesh)
        self.terms: tuple[tuple[str, float], ...] = (("pixels", 1.0),)
        if self._text:
            self.terms = (("text", 1.0), ("pixels", model.spec.aim.pixel_weight))

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        """With "prefix" int32 [B], uniform in [1, P - 1]."""
        rows, patches = len(batch["tokens"]), self._vision.patches
        return batch | {"prefix": jax.random.randint(key, (rows,), 1, patches, jnp.int32)}

    def masks(self, batch: Batch) -> dict[str, Float[Array, "B N"]]:
        pixels = predicted(batch, self._vision.patches).astype(jnp.float32)
        return ({"text": batch["loss_mask"]} if self._text else {}) | {"pixels": pixels}

    def losses(
        self, params: Any, batch: Batch
    ) -> tuple[dict[str, Float[Array, "B N"]], dict[str, Float[Array, "B N"]], Float[Array, ""], dict[str, Array]]:
        pixels, text = self._model.predictions(params, batch, constrain=self._constrain)
        losses = {"pixels": squared_error(pixels, next_patches(self._vision, batch["images"]))}
        penalty: dict[str, Array] = {}
        if isinstance(self._model, PixelTextModel):
            assert text is not None
            unembedding = self._model.unembedding(params)
            losses["text"], log_z = cross_entropy(text, unembedding, batch["targets"], self._chunks, self._constrain)
            if self._z_loss:
                penalty["text"] = self._z_loss * jnp.square(log_z)
        return losses, penalty, jnp.zeros(()), {}
