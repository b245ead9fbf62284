"""Text and images in one decoder, in the order of the document.

    early fusion    patches -> one linear layer ->                        decoder
    late fusion     images -> vision tower -> connector ->                decoder
    deep fusion     either of them, and in the decoder weights of their own for image positions (models/deep_fusion.py)

Early and late fusion as compared by Shukor et al. 2025, "Scaling Laws for Native Multimodal Models" (arXiv 2504.07951),
section 2; the decoder's block is DCLM's.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nmm_jax.models.attention import attention, masked_attention, padding_alone
from nmm_jax.models.connectors import make_connector
from nmm_jax.models.decoder import Block, run_blocks, stack_blocks, stack_policy
from nmm_jax.models.deep_fusion import ByModality, delimiters, modalities
from nmm_jax.models.image_slots import map_filled
from nmm_jax.models.layers import Norm, PatchEmbedding, TokenEmbedding, bias, rotary_tables, weight, whole
from nmm_jax.models.router import Statistics
from nmm_jax.models.spec import Spec
from nmm_jax.models.vision import VisionTower
from nmm_jax.parallel.sharding import Constrain

Cache = dict[str, Array]


class Unembedding(nnx.Module):
    """From hidden states to logits, where the token embeddings do not serve; applied by the loss."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        axes = {"embed": spec.width, "vocab": spec.vocab_size}
        self.kernel = weight(spec, rngs, axes, role="head", inputs=spec.width)


class Delimiters(nnx.Module):
    """Learned vectors of the positions before and behind an image, in the place of their tokens' embeddings."""

    def __init__(self, spec: Spec):
        self.boi = bias({"embed": spec.width})
        self.eoi = bias({"embed": spec.width})


class Multimodal(nnx.Module):
    """The network up to its last hidden states; the loss multiplies them with the unembedding."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.embed = TokenEmbedding(spec, rngs=rngs)
        if spec.vision and spec.connector:
            self.vision = VisionTower(spec.vision, rngs=rngs)
            self.connector = make_connector(spec.connector, rngs=rngs)
        else:
            self.patches = PatchEmbedding(spec, rngs=rngs, positions=spec.patch_positions)
        if spec.delimiter_vectors:
            self.delimiters = Delimiters(spec)
        self.layers = stack_blocks(spec, rngs=rngs)
        self.final_norm = Norm(spec, (spec.width,), (None,))
        if spec.deep and "norms" in spec.deep.modules:
            self.image_final_norm = Norm(spec, (spec.width,), (None,))
        if not spec.tie_embeddings:
            self.head = Unembedding(spec, rngs=rngs)

    def __call__(
        self, batch: dict[str, Array], constrain: Constrain, keep_cache: bool = False
    ) -> tuple[Float[Array, "B S D"], Any, Statistics]:
        """Hidden states of packed rows, if asked for every layer's keys and values [L,B,S,G,K], and statistics.

        The routers' are stacked over layers; vision_slots [] are the image slots that a vision tower went through.
        """
        spec = self.spec
        modality = modalities(spec, batch)
        has_images = batch["images"].shape[1] > 0
        by_modality = ByModality(modality, constrain) if spec.deep and has_images else None
        rotary = rotary_tables(spec, batch["positions"], constrain)
        segments = padding_alone(batch["segment_ids"])

        def attend(q, k, v):
            out = attention(q, k, v, segments, batch["attend_until"], spec.attention, constrain)
            return out, (k, v) if keep_cache else None

        def apply(block: Block, x, _):
            return block(x, rotary, modality, attend, constrain, by_modality)

        x, of_images = self.inputs(batch, constrain)
        x, kept, statistics = run_blocks(spec, self.layers, x, apply)
        final = self.final_norm(x)
        if by_modality and hasattr(self, "image_final_norm"):
            final = by_modality.select(final, self.image_final_norm(x))
        return final, kept, statistics | of_images

    def inputs(self, batch: dict[str, Array], constrain: Constrain) -> tuple[Float[Array, "B S D"], Statistics]:
        """Token embeddings, and image embeddings where image_index says so."""
        spec = self.spec
        x = self.embed(batch["tokens"], constrain).astype(spec.dtype)
        index = batch["image_index"]
        statistics: Statistics = {}
        if batch["images"].shape[1]:
            embedded, statistics = self.image_embeddings(batch, constrain)
            placed = jnp.take_along_axis(embedded, jnp.maximum(index, 0)[..., None], axis=1)
            x = jnp.where((index >= 0)[..., None], placed, x)
        if spec.delimiter_vectors:
            for where, vector in zip(
                delimiters(index, spec.image_positions), (self.delimiters.boi, self.delimiters.eoi), strict=True
            ):
                x = jnp.where(where[..., None], vector[...].astype(x.dtype), x)
        return constrain(x, ("batch", "sequence", "embed_act")), statistics

    def image_embeddings(
        self, batch: dict[str, Array], constrain: Constrain
    ) -> tuple[Float[Array, "B I*P D"], Statistics]:
        """What stands at the positions of each image slot."""
        vision = self.spec.vision
        if vision is None:
            return self.patches(batch["images"], jnp.dtype(self.spec.dtype), constrain), {}

        @jax.named_scope("connector")
        def connect(features: Array) -> Array:
            return whole(self.connector, features[:, int(vision.class_token) :], constrain)

        connect = connect if self.spec.remat == "none" else jax.checkpoint(connect)

        def encode(images: Array) -> Array:
            with jax.named_scope("vision"):
                features = self.vision(images, constrain)
            return connect(features)

        found, computed = map_filled(
            encode, batch["images"], batch["image_mask"], vision.patches, stack_policy(vision.remat), constrain
        )
        b, i, p, d = found.shape
        return found.reshape(b, i * p, d), {"vision_slots": computed}

    def decode(
        self, token: Int[Array, "B"], position: Int[Array, "B"], cache: Cache, constrain: Constrain
    ) -> tuple[Float[Array, "B D"], Cache]:
        """One more text token a row, written at `position` of the cache; it sees all that is before it."""
        rotary = rotary_tables(self.spec, (position + cache["rotary_offset"])[:, None], constrain)
        capacity = cache["key"].shape[2]
        mask = jnp.arange(capacity) <= position[:, None, None]
        put = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))

        def attend(own_cache, q, k, v):
            keys, values = (put(old, new, position) for old, new in zip(own_cache, (k, v), strict=True))
            return masked_attention(q, keys, values, mask), (keys, values)

        def apply(block: Block, x, own_cache):
            return block(x, rotary, jnp.zeros_like(token[:, None]), partial(attend, own_cache), constrain)

        x = self.embed(token[:, None], constrain).astype(self.spec.dtype)
        x, (keys, values), _ = run_blocks(self.spec, self.layers, x, apply, (cache["key"], cache["value"]))
        return self.final_norm(x)[:, 0], cache | {"key": keys, "value": values}
