"""What blocks are made of: norms, rotary positions, feed-forward layers, token and patch embeddings.

A parameter carries the names of its axes in its metadata (`logical`); parallel/ maps the names to the device mesh.
Parameters are float32 and are cast to the type of the computation where they are used.

Letters in shapes: B rows, S positions, D width, H heads, G key-value heads, K head dimension, F feed-forward width,
V vocabulary, I images of a row, P patches of an image.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from nmm_jax.models.initializers import Role, initialize
from nmm_jax.models.spec import Spec, StackSpec, VisionSpec
from nmm_jax.parallel.sharding import Constrain

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swiglu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def weight(
    spec: StackSpec, rngs: nnx.Rngs, axes: dict[str, int], *, role: Role, inputs: int, layer: Array | int = 0
) -> nnx.Param:
    """A matrix with named axes; the first (or the first two) of them, `inputs` values in all, are summed over."""
    shape = tuple(axes.values())
    return nnx.Param(initialize(spec, rngs.params(), shape, role=role, fan_in=inputs, layer=layer), logical=tuple(axes))


def bias(axes: dict[str, int]) -> nnx.Param:
    """Zeros with named axes."""
    return nnx.Param(jnp.zeros(tuple(axes.values()), jnp.float32), logical=tuple(axes))


def position_table(rngs: nnx.Rngs, positions: int, width: int) -> nnx.Param:
    """Learned vectors, one a position, of standard deviation 0.02."""
    table = 0.02 * jax.random.normal(rngs.params(), (positions, width), jnp.float32)
    return nnx.Param(table, logical=(None, "embed"))


class Norm(nnx.Module):
    """RMSNorm or LayerNorm, in float32 over the last axes, as many as `scale` has; with a bias if the stack has."""

    def __init__(self, spec: StackSpec, shape: tuple[int, ...], logical: tuple[str | None, ...]):
        self.centred = spec.norm == "layernorm"
        self.eps = spec.norm_eps
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32), logical=logical)
        self.has_bias = spec.bias
        if spec.bias:
            self.bias = nnx.Param(jnp.zeros(shape, jnp.float32), logical=logical)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        scale = self.scale[...]
        axes = tuple(range(-scale.ndim, 0))
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - y.mean(axes, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + self.eps)
        y = y * scale
        if self.has_bias:
            y = y + self.bias[...]
        return y.astype(x.dtype)


def rotary_tables(
    positions: Int[Array, "B S"], head_dim: int, theta: float
) -> tuple[Float[Array, "B S 1 K/2"], Float[Array, "B S 1 K/2"]]:
    """Cosines and sines, float32, of position * theta^(-2j / K) (Su et al., arXiv 2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B S H K"], cos: Array, sin: Array) -> Float[Array, "B S H K"]:
    """Turns the pairs (x[j], x[j + K/2]): the half-split order of Hugging Face's Llama."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)), SwiGLU (Shazeer, arXiv 2002.05202), or without a gate down(gelu(up(x)))."""

    def __init__(self, spec: StackSpec, layer: Array | int, *, rngs: nnx.Rngs, width: int = 0):
        """width: F, if not the stack's."""
        d, f = spec.width, width or spec.ffn_width
        self.activation = spec.ffn
        self.gated = spec.ffn == "swiglu"
        if self.gated:
            self.gate = weight(spec, rngs, {"embed": d, "mlp": f}, role="inner", inputs=d)
        self.up = weight(spec, rngs, {"embed": d, "mlp": f}, role="inner", inputs=d)
        self.down = weight(spec, rngs, {"mlp": f, "embed": d}, role="residual", inputs=f, layer=layer)
        self.has_bias = spec.bias
        if spec.bias:
            if self.gated:
                self.gate_bias = bias({"mlp": f})
            self.up_bias = bias({"mlp": f})
            self.down_bias = bias({"embed": d})

    def __call__(self, x: Float[Array, "B S D"], constrain: Constrain) -> Float[Array, "B S D"]:
        def product(x: Array, name: str) -> Array:
            y = x @ getattr(self, name)[...].astype(x.dtype)
            return y + getattr(self, f"{name}_bias")[...].astype(x.dtype) if self.has_bias else y

        inner = checkpoint_name(product(x, "up"), "ffn_up")
        if self.gated:
            gate = checkpoint_name(product(x, "gate"), "ffn_gate")
            inner = ACTIVATIONS[self.activation](gate) * inner
        else:
            inner = ACTIVATIONS[self.activation](inner)
        return product(constrain(inner, ("batch", "sequence", "mlp_act")), "down")


class TokenEmbedding(nnx.Module):
    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        axes = {"vocab": spec.vocab_size, "embed": spec.width}
        self.tokens = weight(spec, rngs, axes, role="embedding", inputs=1)

    def __call__(self, tokens: Int[Array, "B S"], constrain: Constrain) -> Float[Array, "B S D"]:
        """Float32 rows of the table: so a frequent token's gradient is summed in float32 whatever the compute type."""
        table = constrain(self.tokens[...], ("vocab", None))  # gathered over the embed axis before it is looked up
        return table[tokens]


class PatchEmbedding(nnx.Module):
    """One linear layer from a patch's normalised pixels to the stack's width, and perhaps a learned position."""

    def __init__(self, spec: Spec | VisionSpec, *, rngs: nnx.Rngs, has_bias: bool = True, positions: int = 0):
        self.spec = spec
        pixels = 3 * spec.patch**2
        self.kernel = weight(spec, rngs, {"patch": pixels, "embed": spec.width}, role="inner", inputs=pixels)
        self.bias = bias({"embed": spec.width}) if has_bias else None
        self.patch_positions = position_table(rngs, positions, spec.width) if positions else None

    def __call__(
        self, images: UInt8[Array, "B I height width 3"], dtype: jnp.dtype, constrain: Constrain
    ) -> Float[Array, "B I*P D"]:
        """All patches of a row's image slots, in reading order."""
        spec = self.spec
        patches = constrain(normalised_patches(spec, images, dtype), ("batch", None, None, None))
        embedded = patches @ self.kernel[...].astype(dtype)
        if self.bias is not None:
            embedded = embedded + self.bias[...].astype(dtype)
        if self.patch_positions is not None:
            embedded = embedded + self.patch_positions[...].astype(dtype)
        b, i, p, d = embedded.shape
        return embedded.reshape(b, i * p, d)


def normalised_patches(
    spec: Spec | VisionSpec, images: UInt8[Array, "B I height width 3"], dtype: jnp.dtype
) -> Float[Array, "B I P patch*patch*3"]:
    """The patches of images, their pixels minus `image.mean` over `image.std`."""
    pixels = images.astype(jnp.float32) / 255
    pixels = (pixels - jnp.array(spec.pixel_mean)) / jnp.array(spec.pixel_std)
    return patchify(pixels.astype(dtype), spec.patch)


def patchify(images: Float[Array, "B I height width 3"], patch: int) -> Float[Array, "B I P patch*patch*3"]:
    """Cuts images into squares in reading order; a patch's values are ordered (row, column, colour)."""
    b, i, height, width, colours = images.shape
    rows, columns = height // patch, width // patch
    squares = images.reshape(b, i, rows, patch, columns, patch, colours).swapaxes(3, 4)
    return squares.reshape(b, i, rows * columns, patch * patch * colours)
