"""Early fusion: one decoder over token embeddings and linearly embedded image patches, in the order of the document.

Shukor et al. 2025, "Scaling Laws for Native Multimodal Models" (arXiv 2504.07951), section 2; the block is DCLM's.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nmm_jax.models.attention import attention, masked_attention
from nmm_jax.models.decoder import Block, run_blocks, stack_blocks
from nmm_jax.models.layers import Norm, PatchEmbedding, TokenEmbedding, rotary_tables, weight
from nmm_jax.models.router import Statistics
from nmm_jax.models.spec import Spec
from nmm_jax.parallel.sharding import Constrain

Cache = dict[str, Array]


class Unembedding(nnx.Module):
    """From hidden states to logits, where the token embeddings do not serve; applied by the loss."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        axes = {"embed": spec.width, "vocab": spec.vocab_size}
        self.kernel = weight(spec, rngs, axes, role="head", inputs=spec.width)


class EarlyFusion(nnx.Module):
    """The network up to its last hidden states; the loss multiplies them with the unembedding."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.embed = TokenEmbedding(spec, rngs=rngs)
        self.patches = PatchEmbedding(spec, rngs=rngs)
        self.layers = stack_blocks(spec, rngs=rngs)
        self.final_norm = Norm(spec, (spec.width,), (None,))
        if not spec.tie_embeddings:
            self.head = Unembedding(spec, rngs=rngs)

    def __call__(
        self, batch: dict[str, Array], constrain: Constrain, keep_cache: bool = False
    ) -> tuple[Float[Array, "B S D"], Any, Statistics]:
        """Hidden states of packed rows, if asked for every layer's keys and values [L,B,S,G,K], and of the routers."""
        spec = self.spec
        modality = jnp.where(batch["segment_ids"] > 0, (batch["image_index"] >= 0).astype(jnp.int32), -1)
        rotary = rotary_tables(batch["positions"], spec.head_dim, spec.rope_theta)

        def attend(q, k, v):
            out = attention(q, k, v, batch["segment_ids"], batch["attend_until"], spec.attention)
            return out, (k, v) if keep_cache else None

        def apply(block: Block, x, _):
            return block(x, rotary, modality, attend, constrain)

        x, kept, statistics = run_blocks(spec, self.layers, self.inputs(batch, constrain), apply)
        return self.final_norm(x), kept, statistics

    def inputs(self, batch: dict[str, Array], constrain: Constrain) -> Float[Array, "B S D"]:
        """Token embeddings, and patch embeddings where image_index says so."""
        dtype = jnp.dtype(self.spec.dtype)
        tokens = self.embed(batch["tokens"], constrain).astype(dtype)
        patches = self.patches(batch["images"], dtype, constrain)
        index = batch["image_index"]
        placed = jnp.take_along_axis(patches, jnp.maximum(index, 0)[..., None], axis=1)
        x = jnp.where((index >= 0)[..., None], placed, tokens)
        return constrain(x, ("batch", "sequence", "embed_act"))

    def decode(
        self, token: Int[Array, "B"], position: Int[Array, "B"], cache: Cache, constrain: Constrain
    ) -> tuple[Float[Array, "B D"], Cache]:
        """One more text token a row, written at `position` of the cache; it sees all that is before it."""
        spec = self.spec
        rotary = rotary_tables((position + cache["rotary_offset"])[:, None], spec.head_dim, spec.rope_theta)
        capacity = cache["key"].shape[2]
        mask = jnp.arange(capacity) <= position[:, None, None]
        put = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))

        def attend(own_cache, q, k, v):
            keys, values = (put(old, new, position) for old, new in zip(own_cache, (k, v), strict=True))
            return masked_attention(q, keys, values, mask), (keys, values)

        def apply(block: Block, x, own_cache):
            return block(x, rotary, jnp.zeros_like(token[:, None]), partial(attend, own_cache), constrain)

        x = self.embed(token[:, None], constrain).astype(spec.dtype)
        x, (keys, values), _ = run_blocks(spec, self.layers, x, apply, (cache["key"], cache["value"]))
        return self.final_norm(x)[:, 0], cache | {"key": keys, "value": values}
