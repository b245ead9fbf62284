"""Vision towers that learn by predicting the next patch: AIM (El-Nouby et al., arXiv 2401.08541) and AIMv2 (Fini et
al., arXiv 2411.14402).

    patch      p0  p1  p2  p3  p4  p5  p6  p7  p8       9 patches in reading order, a prefix of 3
    sees       [   0..2  ] 0.3 0.4 0.5 0.6 0.7 0.8      patches: all of the prefix, what went before, itself
    predicts    -   -  p3  p4  p5  p6  p7  p8   -       pixels, normalised patch by patch; no loss on the prefix

    AIM      images ─ tower ─ MLP blocks, each patch for itself ─ the next patch's pixels
    AIMv2    images ─ tower ─ linear ─┐
                   BOS text EOS ──────┴─ causal decoder ─ the next patch's pixels, and the next token

In AIMv2's decoder the pair's row BOS text EOS comes behind the last patch, so the first token of the text is predicted
at BOS, which has seen the image; the last patch predicts nothing. In use, and in evaluation of text, the tower has no
prefix: all patches see all (without "prefix" in the batch).
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nmm_jax.models.attention import attention
from nmm_jax.models.decoder import Block, run_blocks, stack_blocks
from nmm_jax.models.layers import FeedForward, Norm, TokenEmbedding, rotary_tables, weight
from nmm_jax.models.model import ON_ONE_DEVICE, Model, Params
from nmm_jax.models.multimodal import Unembedding
from nmm_jax.models.spec import Spec, StackSpec, ffn_width
from nmm_jax.models.vision import VisionTower, sincos_positions
from nmm_jax.parallel.sharding import Constrain

Batch = dict[str, Array]


class AIM(nnx.Module):
    """A tower, and MLP blocks on top that only pretraining needs.

    Positions, sines and cosines, are added to what goes into the tower (`model.vision.positions`) and to what goes into
    the head, whatever the tower's are.
    """

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        assert spec.vision
        self.spec = spec.vision
        self.vision = VisionTower(spec.vision, rngs=rngs)
        self.pixel_head = PixelMLP(spec, rngs=rngs)

    def __call__(self, batch: Batch, constrain: Constrain) -> tuple[Float[Array, "B P pixels"], None]:
        """batch: images [B,1,height,width,3] uint8, and perhaps prefix int32 [B]."""
        x = self.vision(batch["images"][:, 0], constrain, batch.get("prefix"))
        x = x + jnp.asarray(sincos_positions(self.spec.side, self.spec.width)).astype(x.dtype)
        return self.pixel_head(x, constrain), None


class AIMv2(nnx.Module):
    """A tower, and a causal decoder over its features and the text behind them."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        assert spec.vision
        self.spec = spec
        self.vision = VisionTower(spec.vision, rngs=rngs)
        axes = {"mlp": spec.vision.width, "embed": spec.width}
        self.projection = weight(spec, rngs, axes, role="inner", inputs=spec.vision.width)
        self.embed = TokenEmbedding(spec, rngs=rngs)
        self.layers = stack_blocks(spec, rngs=rngs)
        self.final_norm = Norm(spec, (spec.width,), (None,))
        axes = {"embed": spec.width, "patch": pixels_of(spec)}
        self.pixel_head = weight(spec, rngs, axes, role="head", inputs=spec.width)
        if not spec.tie_embeddings:
            self.head = Unembedding(spec, rngs=rngs)

    def __call__(self, batch: Batch, constrain: Constrain) -> tuple[Float[Array, "B P pixels"], Float[Array, "B T D"]]:
        """batch: that of AIM, and tokens, segment_ids, positions [B,T]."""
        spec = self.spec
        features = self.vision(batch["images"][:, 0], constrain, batch.get("prefix"))
        rows, patches, _ = features.shape
        of_text = self.embed(batch["tokens"], constrain).astype(features.dtype)
        x = jnp.concatenate([features @ self.projection[...].astype(features.dtype), of_text], axis=1)

        segments = jnp.concatenate([jnp.ones((rows, patches), jnp.int32), batch["segment_ids"]], axis=1)
        place = jnp.broadcast_to(jnp.arange(patches), (rows, patches))
        positions = jnp.concatenate([place, patches + batch["positions"]], axis=1)
        until = jnp.broadcast_to(jnp.arange(1, x.shape[1] + 1), segments.shape)
        rotary = rotary_tables(spec, positions, constrain)

        def attend(q, k, v):
            return attention(q, k, v, segments, until, spec.attention, constrain), None

        def apply(block: Block, x, _):
            return block(x, rotary, None, attend, constrain)

        x, _, _ = run_blocks(spec, self.layers, constrain(x, ("batch", "sequence", "embed_act")), apply)
        x = self.final_norm(x)
        return to_pixels(x[:, :patches], self.pixel_head), x[:, patches:]


class PixelMLP(nnx.Module):
    """From each patch's features to pixels: linear, blocks of x + MLP(norm(x)), norm, linear.

    The blocks' number, width (2048) and expansion (4), their norms and the missing biases are AIM's. How they are put
    together is not in the paper; here it is as in the tower, which they take norm and activation from.
    """

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        assert spec.vision
        self.spec = stack = head_stack(spec)
        axes = {"mlp": spec.vision.width, "embed": stack.width}
        self.inputs = weight(stack, rngs, axes, role="inner", inputs=spec.vision.width)

        @nnx.split_rngs(splits=stack.depth)
        @nnx.vmap(in_axes=(0, 0), transform_metadata={nnx.PARTITION_NAME: "layers", "logical": "layers"})
        def blocks(rngs: nnx.Rngs, layer: Array) -> MLPBlock:
            return MLPBlock(stack, layer, rngs=rngs)

        self.layers = blocks(rngs, jnp.arange(stack.depth))
        self.norm = Norm(stack, (stack.width,), (None,))
        axes = {"embed": stack.width, "patch": pixels_of(spec)}
        self.outputs = weight(stack, rngs, axes, role="head", inputs=stack.width)

    def __call__(self, x: Float[Array, "B P D"], constrain: Constrain) -> Float[Array, "B P pixels"]:
        def apply(block: MLPBlock, x, _):
            return block(x, constrain), None, {}

        x = constrain(x @ self.inputs[...].astype(x.dtype), ("batch", "sequence", "embed_act"))
        x, _, _ = run_blocks(self.spec, self.layers, x, apply)
        return to_pixels(self.norm(x), self.outputs)


class MLPBlock(nnx.Module):
    """x + MLP(norm(x))."""

    def __init__(self, spec: StackSpec, layer: Array | int, *, rngs: nnx.Rngs):
        self.norm = Norm(spec, (spec.width,), (None,))
        self.ffn = FeedForward(spec, layer, rngs=rngs)

    def __call__(self, x: Float[Array, "B P D"], constrain: Constrain) -> Float[Array, "B P D"]:
        return constrain(x + self.ffn(self.norm(x), constrain), ("batch", "sequence", "embed_act"))


class PixelModel(Model):
    """AIM, as a function of its parameters."""

    Network: ClassVar[type[nnx.Module]] = AIM

    def predictions(
        self, params: Params, batch: Batch, *, constrain: Constrain = ON_ONE_DEVICE
    ) -> tuple[Float[Array, "B P pixels"], Float[Array, "B T D"] | None]:
        """For each patch the normalised pixels of the next one, float32; of AIMv2 the text's last hidden states too.

        Args:
          batch: images [B,1,height,width,3] uint8; of AIMv2 tokens, segment_ids and positions [B,T], of rows BOS text
            EOS; and perhaps prefix int32 [B], the patches at the beginning that see each other (all see all without).
        """
        return self.network(params)(batch, constrain)


class PixelTextModel(PixelModel):
    """AIMv2, as a function of its parameters."""

    Network = AIMv2

    def hidden(
        self, params: Params, batch: Batch, *, constrain: Constrain = ON_ONE_DEVICE
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """The text's last hidden states, as models.LanguageModel has them."""
        _, text = self.predictions(params, batch, constrain=constrain)
        assert text is not None
        return text, {}

    def unembedding(self, params: Params) -> Float[Array, "D V"]:
        """The float32 matrix from hidden states to logits."""
        return params["embed"]["tokens"].T if self.spec.tie_embeddings else params["head"]["kernel"]


def head_stack(spec: Spec) -> StackSpec:
    """The MLP blocks as a stack: the tower's, of the head's width and depth."""
    assert spec.vision and spec.aim
    width = spec.aim.head_width
    return dataclasses.replace(
        spec.vision, width=width, depth=spec.aim.head_depth, ffn_width=ffn_width(spec.vision.ffn, width)
    )


def pixels_of(spec: Spec) -> int:
    """Values of a patch."""
    return 3 * spec.patch**2


def to_pixels(x: Float[Array, "B P D"], kernel: nnx.Param) -> Float[Array, "B P pixels"]:
    """Float32, whatever the type of the computation: pixels are what the loss takes."""
    return jnp.matmul(x, kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)
