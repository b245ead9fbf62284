"""Two towers, of images and of texts, into one space: CLIP (Radford et al., arXiv 2103.00020) and SigLIP (Zhai et al.,
arXiv 2303.15343).

    image ─ vision tower ─ pooled: class token | mean of patches | attention ─ linear ─ length 1 ┐
                                                                                                 ├ cosines, scale, bias
    BOS text EOS ─ text tower, causal or both ways ─ its last position ─────── linear ─ length 1 ┘

Parameters: vision/... (models/vision.py), pooling/... where patches are pooled by attention; embed/tokens, layers/...,
final_norm of the text tower, under the names of a decoder; contrastive/{image [Dv,E], text [D,E]}, contrastive/scale []
(the logarithm of the scale) and, of sigmoid, contrastive/bias [].
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from nmm_jax.models.attention import attention, masked_attention
from nmm_jax.models.decoder import QKV, Block, SelfAttention, run_blocks, stack_blocks
from nmm_jax.models.initializers import initialize
from nmm_jax.models.layers import FeedForward, Norm, TokenEmbedding, rotary_tables
from nmm_jax.models.model import ON_ONE_DEVICE, Model, Params
from nmm_jax.models.spec import ContrastiveSpec, Spec, StackSpec, VisionSpec
from nmm_jax.models.vision import VisionTower
from nmm_jax.parallel.sharding import Constrain

Batch = dict[str, Array]


class Contrastive(nnx.Module):
    """Both towers up to their embeddings."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        assert spec.vision and spec.contrastive
        self.spec, self.how = spec, spec.contrastive
        self.vision = VisionTower(spec.vision, rngs=rngs)
        if self.how.pooling == "attention":
            self.pooling = AttentionPooling(spec.vision, rngs=rngs)
        self.embed = TokenEmbedding(spec, rngs=rngs)
        self.layers = stack_blocks(spec, rngs=rngs)
        self.final_norm = Norm(spec, (spec.width,), (None,))
        self.contrastive = SharedSpace(spec, rngs=rngs)

    def of_images(self, images: UInt8[Array, "N height width 3"], constrain: Constrain) -> Float[Array, "N E"]:
        features = self.vision(images, constrain)
        if self.how.pooling == "class":
            pooled = features[:, 0]
        else:
            patches = features[:, int(self.vision.spec.class_token) :]
            pooled = patches.mean(1) if self.how.pooling == "mean" else self.pooling(patches, constrain)
        return normalised(pooled, self.contrastive.image[...])

    def of_texts(self, batch: Batch, constrain: Constrain) -> Float[Array, "B E"]:
        """batch: tokens, segment_ids, positions [B,T], a text from the first position of each row on."""
        spec, segments = self.spec, batch["segment_ids"]
        length = (segments > 0).sum(1)
        until = jnp.broadcast_to(jnp.arange(1, segments.shape[1] + 1), segments.shape)
        if not self.how.causal:
            until = jnp.maximum(until, length[:, None])
        rotary = rotary_tables(spec, batch["positions"], constrain)
        modality = jnp.where(segments > 0, 0, -1)

        def attend(q, k, v):
            return attention(q, k, v, segments, until, spec.attention, constrain), None

        def apply(block: Block, x, _):
            return block(x, rotary, modality, attend, constrain)

        x = self.embed(batch["tokens"], constrain).astype(spec.dtype)
        x, _, _ = run_blocks(spec, self.layers, constrain(x, ("batch", "sequence", "embed_act")), apply)
        last = jnp.maximum(length - 1, 0)[:, None, None]
        pooled = self.final_norm(jnp.take_along_axis(x, last, axis=1)[:, 0])
        return normalised(pooled, self.contrastive.text[...])


class SharedSpace(nnx.Module):
    """The projections into it, and what makes logits of its cosines."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        assert spec.vision and spec.contrastive
        how = spec.contrastive

        def projection(stack: StackSpec) -> nnx.Param:
            kernel = initialize(stack, rngs.params(), (stack.width, how.width), role="inner", fan_in=stack.width)
            return nnx.Param(kernel, logical=("embed", None))

        self.image, self.text = projection(spec.vision), projection(spec)
        self.scale = nnx.Param(jnp.asarray(math.log(how.scale), jnp.float32), logical=())
        if how.loss == "sigmoid":
            self.bias = nnx.Param(jnp.asarray(how.bias, jnp.float32), logical=())


class AttentionPooling(nnx.Module):
    """A learned probe looks at all patches: y = attention(probe, x), then y + MLP(norm(y)). SigLIP's head."""

    def __init__(self, spec: VisionSpec, *, rngs: nnx.Rngs):
        spec = dataclasses.replace(spec, qk_norm="none")
        self.probe = nnx.Param(_xavier(rngs, spec.width), logical=("embed",))
        self.attention = SelfAttention(spec, 0, rngs=rngs)
        self.norm = Norm(spec, (spec.width,), (None,))
        self.ffn = FeedForward(spec, 0, rngs=rngs)

    def __call__(self, x: Float[Array, "N P D"], constrain: Constrain) -> Float[Array, "N D"]:
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        q, k, v = (self._heads(y, name) for y, name in zip((probe, x, x), QKV, strict=True))
        attended = masked_attention(q, k, v, jnp.ones((len(x), 1, x.shape[1]), bool))
        y = jnp.einsum("nqhk,hkd->nqd", attended, self.attention.out[...].astype(x.dtype))
        y = self._with_bias(y, "out")
        return (y + self.ffn(self.norm(y), constrain))[:, 0]

    def _heads(self, x: Array, name: str) -> Array:
        kernel = getattr(self.attention, name)[...].astype(x.dtype)
        return self._with_bias(jnp.einsum("nsd,dhk->nshk", x, kernel), name)

    def _with_bias(self, y: Array, name: str) -> Array:
        bias = getattr(self.attention, f"{name}_bias", None)
        return y if bias is None else y + bias[...].astype(y.dtype)


def _xavier(rngs: nnx.Rngs, width: int) -> Float[Array, "D"]:
    """Uniform of variance 2 / (1 + width), as big_vision draws the probe (1, 1, width)."""
    bound = math.sqrt(6 / (1 + width))
    return jax.random.uniform(rngs.params(), (width,), jnp.float32, -bound, bound)


def normalised(pooled: Float[Array, "N D"], kernel: Float[Array, "D E"]) -> Float[Array, "N E"]:
    """pooled @ kernel, its rows of length 1, float32."""
    x = jnp.matmul(pooled, kernel.astype(pooled.dtype), preferred_element_type=jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-16))


class ContrastiveModel(Model):
    """CLIP and SigLIP, as a function of their parameters."""

    Network = Contrastive

    def embeddings(
        self, params: Params, batch: Batch, *, constrain: Constrain = ON_ONE_DEVICE
    ) -> tuple[Float[Array, "B E"], Float[Array, "B E"], Float[Array, ""], Float[Array, ""]]:
        """Of images and of texts, of length 1, float32; and scale and bias (0 without one) of their cosines.

        Args:
          batch: rows of pairs (docs/data.md).
        """
        image = self.image_embeddings(params, batch, constrain=constrain)
        text = self.text_embeddings(params, batch, constrain=constrain)
        own = params["contrastive"]
        return image, text, jnp.exp(own["scale"]), own.get("bias", jnp.zeros(()))

    def image_embeddings(
        self, params: Params, batch: Batch, *, constrain: Constrain = ON_ONE_DEVICE
    ) -> Float[Array, "B E"]:
        """Of each row's first image."""
        return self.network(params).of_images(batch["images"][:, 0], constrain)

    def text_embeddings(
        self, params: Params, batch: Batch, *, constrain: Constrain = ON_ONE_DEVICE
    ) -> Float[Array, "B E"]:
        """Of each row's text; batch: tokens, segment_ids and positions."""
        return self.network(params).of_texts(batch, constrain)

    def after_update(self, params: Params) -> Params:
        """With the scale in [1, max_scale]: the parameter itself is put back, as OpenCLIP does. Clipping it in the
        forward pass would leave it without a gradient once it is beyond."""
        how = self.spec.contrastive
        assert isinstance(how, ContrastiveSpec)
        if not how.max_scale:
            return params
        own: dict[str, Any] = params["contrastive"]
        return params | {"contrastive": own | {"scale": jnp.clip(own["scale"], 0.0, math.log(how.max_scale))}}
