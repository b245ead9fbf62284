"""The vision tower (ViT; Dosovitskiy et al., arXiv 2010.11929): patches of an image through a stack of blocks.

One tower for all: CLIP's (class token, norm before the layers), SigLIP's, AIM's (fixed positions, causal behind a
prefix), AIMv2's (RMSNorm, SwiGLU), EVA's as in CogVLM (norms after the sublayers); `model.vision` has the choices.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from nmm_jax.models.attention import attention
from nmm_jax.models.decoder import Block, run_blocks, stack_blocks
from nmm_jax.models.layers import Norm, PatchEmbedding, on_rows, position_table
from nmm_jax.models.spec import VisionSpec
from nmm_jax.parallel.sharding import Constrain


class VisionTower(nnx.Module):
    """Images to features."""

    def __init__(self, spec: VisionSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.patches = PatchEmbedding(spec, rngs=rngs, has_bias=spec.patch_bias)
        if spec.class_token:
            self.class_token = nnx.Param(position_table(rngs, 1, spec.width)[...][0], logical=("embed",))
        if spec.positions == "learned":
            self.positions = position_table(rngs, spec.tokens, spec.width)
        if spec.embedding_norm != "none":
            self.embedding_norm = Norm(spec, (spec.width,), (None,))
        self.layers = stack_blocks(spec, rngs=rngs)
        if spec.final_norm:
            self.final_norm = Norm(spec, (spec.width,), (None,))

    def __call__(
        self, images: UInt8[Array, "N height width 3"], constrain: Constrain, prefix: Int[Array, "N"] | None = None
    ) -> Float[Array, "N tokens D"]:
        """Features of the layer that is used: of the class token, if there is one, then of patches in reading order.

        Args:
          prefix: patches at the beginning that see each other; those behind see what went before them (AIM, El-Nouby
            et al., arXiv 2401.08541). None: all patches see all.
        """
        spec = self.spec
        if prefix is not None and spec.class_token:
            raise ValueError("a tower with a class token (model.vision.class_token) has no causal form")
        x = self.embed(images, constrain)
        n, tokens, _ = x.shape
        segments = jnp.zeros((n, tokens), jnp.int32)
        until = jnp.full((n, tokens), tokens, jnp.int32)
        if prefix is not None:
            until = jnp.maximum(jnp.arange(1, tokens + 1), prefix[:, None])

        def attend(q, k, v):
            return attention(q, k, v, segments, until, spec.attention, constrain), None

        def apply(block: Block, x, _):
            return block(x, None, None, attend, constrain)

        x, _, _ = run_blocks(spec, self.layers, x, apply, periods=spec.layers_used)
        return self.final_norm(x) if spec.final_norm and spec.layers_used == spec.depth else x

    def embed(self, images: UInt8[Array, "N height width 3"], constrain: Constrain) -> Float[Array, "N tokens D"]:
        """What the first layer takes."""
        spec = self.spec
        dtype = jnp.dtype(spec.dtype)
        x = self.patches(images[:, None], dtype, constrain)
        if spec.embedding_norm == "before_positions":
            x = self.embedding_norm(x)
        if spec.class_token:
            token = jnp.broadcast_to(self.class_token[...].astype(dtype), (x.shape[0], 1, spec.width))
            x = jnp.concatenate([token, x], axis=1)
        x = self.with_positions(x, constrain)
        if spec.embedding_norm == "after_positions":
            x = self.embedding_norm(x)
        return constrain(x, ("batch", "sequence", "embed_act"))

    def with_positions(self, x: Float[Array, "N tokens D"], constrain: Constrain) -> Float[Array, "N tokens D"]:
        if self.spec.positions == "learned":
            params = {"positions": self.positions}
            return on_rows(lambda x, weights, _: x + weights["positions"], x, params, x.dtype, constrain)
        vectors = sincos_positions(self.spec.side, self.spec.width)
        vectors = np.pad(vectors, ((self.spec.tokens - len(vectors), 0), (0, 0)))  # none for the class token
        return x + jnp.asarray(vectors, x.dtype)


def sincos_positions(side: int, width: int) -> Float[np.ndarray, "side*side width"]:
    """Fixed positions: of each patch sines and cosines of its column, then of its row (MAE, arXiv 2111.06377)."""
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width / 4))
    angles = np.arange(side)[:, None] * frequencies
    one = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side, width / 2]
    columns, rows = np.tile(one, (side, 1)), np.repeat(one, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


def resize_positions(
    table: Float[Array, "tokens D"], side_from: int, side_to: int, class_token: bool
) -> Float[Array, "new_tokens D"]:
    """Learned positions for another resolution: the grid is interpolated, a class token's stays.

    Bicubic as PyTorch's (a = -0.75, centres of pixels aligned, no antialiasing), which is how Hugging Face's encoders
    do it.
    """
    if side_from == side_to:
        return table
    first, grid = table[: int(class_token)], table[int(class_token) :]
    matrix = jnp.asarray(_bicubic(side_from, side_to), grid.dtype)
    grid = grid.reshape(side_from, side_from, -1)
    resized = jnp.einsum("ar,bc,rcd->abd", matrix, matrix, grid)
    return jnp.concatenate([first, resized.reshape(side_to * side_to, -1)])


def _bicubic(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """The matrix that resamples a line of `size` values to `new_size`."""
    a = -0.75
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    matrix = np.zeros((new_size, size))
    for i, centre in enumerate(centres):
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - tap)
            near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            matrix[i, min(max(tap, 0), size - 1)] += near if x <= 1 else far
    return matrix
