"""What blocks are made of: norms, rotary positions, feed-forward layers, token and patch embeddings.

A parameter carries the names of its axes in its metadata (`logical`); parallel/ maps the names to the device mesh.
Parameters are float32 and are cast to the type of the computation where they are used.

Letters in shapes: B rows, S positions, D width, H heads, G key-value heads, K head dimension, F feed-forward width,
V vocabulary, I images of a row, P patches of an image.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from nmm_jax.models.initializers import Role, initialize
from nmm_jax.models.spec import Spec, StackSpec, VisionSpec
from nmm_jax.parallel.gathered import Weights, with_gathered
from nmm_jax.parallel.sharding import Axes, Constrain

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


def on_rows(
    compute: Callable[[Any, Weights, Constrain], Any],
    rows: Any,
    params: Mapping[str, nnx.Param],
    dtype: jnp.dtype,
    constrain: Constrain,
    rows_axes: Axes = ("batch",),
    result_axes: Axes | None = ("batch",),
) -> Any:
    """compute(rows, weights, constrain) with these parameters, gathered and of this type (parallel/gathered.py)."""
    axes = {name: p.get_metadata("logical")[-p.ndim :] for name, p in params.items()}  # a layer's own, of stacked ones
    weights = {name: p[...].astype(dtype) for name, p in params.items()}
    return with_gathered(compute, rows, weights, axes, constrain, rows_axes, result_axes)


def product(x: Float[Array, "B S *K"], w: Float[Array, "..."], platform: str, summed: int = 1) -> Array:
    """x times w, over the last `summed` axes of x and the first of w.

    On CPU all positions are one axis: XLA's gradients of products over two are several times slower there (JAX 0.10.2,
    docs/performance.md).
    """
    if platform != "cpu":
        return jnp.tensordot(x, w, summed)
    inner = math.prod(w.shape[:summed])
    y = x.reshape(-1, inner) @ w.reshape(inner, -1)
    return y.reshape(*x.shape[: x.ndim - summed], *w.shape[summed:])


def whole(module: nnx.Module, rows: Float[Array, "N ..."], constrain: Constrain) -> Float[Array, "N ..."]:
    """module(rows, constrain), all of its parameters gathered first, in their own type; beside `tensor` as it is."""
    if constrain.mesh is None or constrain.mesh.shape["tensor"] > 1:
        return module(rows, constrain)  # type: ignore[operator]
    definition, state = nnx.split(module)
    flat = {"/".join(map(str, path)): p for path, p in nnx.to_flat_state(state)}
    axes = {name: p.get_metadata("logical")[-p.ndim :] for name, p in flat.items()}

    def compute(rows: Array, weights: Weights, constrain: Constrain) -> Array:
        there = nnx.to_flat_state(state)
        merged = nnx.merge(
            definition, nnx.from_flat_state([(path, weights["/".join(map(str, path))]) for path, _ in there])
        )
        return merged(rows, constrain)

    return with_gathered(compute, rows, {name: p[...] for name, p in flat.items()}, axes, constrain)


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

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        scale = self.scale[...]
        axes = tuple(range(-scale.ndim, 0))
        # Without axes of length 1: XLA:CPU's sums over the last of [1,S,D] take 15 times as long as of [S,D].
        y = x.reshape(*(n for n in x.shape[: -scale.ndim] if n != 1), *scale.shape).astype(jnp.float32)
        if self.centred:
            y = y - y.mean(axes, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + self.eps)
        y = y * scale
        if self.has_bias:
            y = y + self.bias[...]
        return y.astype(x.dtype).reshape(x.shape)


def rotary_tables(
    spec: StackSpec, positions: Int[Array, "B S"], constrain: Constrain
) -> tuple[Float[Array, "B S 1 K/2"], Float[Array, "B S 1 K/2"]] | None:
    """Cosines and sines, float32, of position * theta^(-2j / K) (Su et al., arXiv 2104.09864); None if theta is 0."""
    if not spec.rope_theta:
        return None
    frequencies = spec.rope_theta ** (-jnp.arange(0, spec.head_dim, 2, dtype=jnp.float32) / spec.head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    if constrain.platform != "cpu":
        return jnp.cos(angles), jnp.sin(angles)
    # XLA:CPU would make them anew in every layer and head, in the fusion that turns it; into a loop it fuses nothing.
    tables = jax.lax.map(lambda a: (jnp.cos(a), jnp.sin(a)), jnp.moveaxis(angles, -1, 0))
    cos, sin = (jnp.moveaxis(table, 0, -1) for table in tables)
    return cos, sin


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
        matrices = ("gate", "up", "down") if self.gated else ("up", "down")
        params = {name: getattr(self, name) for name in matrices}
        if self.has_bias:
            params |= {f"{name}_bias": getattr(self, f"{name}_bias") for name in matrices[:-1]}
        platform = constrain.platform

        def compute(x: Array, weights: Weights, constrain: Constrain) -> Array:
            def biased(x: Array, name: str) -> Array:
                y = product(x, weights[name], platform)
                return y + weights[f"{name}_bias"] if f"{name}_bias" in weights else y

            inner = checkpoint_name(biased(x, "up"), "ffn_up")
            if self.gated:
                gate = checkpoint_name(biased(x, "gate"), "ffn_gate")
                inner = ACTIVATIONS[self.activation](gate) * inner
            else:
                inner = ACTIVATIONS[self.activation](inner)
            return biased(constrain(inner, ("batch", "sequence", "mlp_act")), "down")

        y = on_rows(compute, x, params, x.dtype, constrain, result_axes=None)
        return y + self.down_bias[...].astype(y.dtype) if self.has_bias else y


class TokenEmbedding(nnx.Module):
    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        axes = {"vocab": spec.vocab_size, "embed": spec.width}
        self.tokens = weight(spec, rngs, axes, role="embedding", inputs=1)

    @jax.named_scope("embedding")
    def __call__(self, tokens: Int[Array, "B S"], constrain: Constrain) -> Float[Array, "B S D"]:
        """Float32 rows of the table: so a frequent token's gradient is summed in float32 whatever the compute type."""

        def compute(tokens: Array, weights: Weights, _: Constrain) -> Array:
            table = weights["tokens"]
            if table.shape[0] == self.tokens.shape[0]:
                return table[tokens]
            own = tokens - jax.lax.axis_index("tensor") * table.shape[0]  # the others' are 0 here
            return table.at[own].get(mode="fill", fill_value=0, wrap_negative_indices=False)

        return on_rows(compute, tokens, {"tokens": self.tokens}, jnp.float32, constrain, result_axes=None)


class PatchEmbedding(nnx.Module):
    """One linear layer from a patch's normalised pixels to the stack's width, and perhaps a learned position."""

    def __init__(self, spec: Spec | VisionSpec, *, rngs: nnx.Rngs, has_bias: bool = True, positions: int = 0):
        self.spec = spec
        pixels = 3 * spec.patch**2
        self.kernel = weight(spec, rngs, {"patch": pixels, "embed": spec.width}, role="inner", inputs=pixels)
        self.bias = bias({"embed": spec.width}) if has_bias else None
        self.patch_positions = position_table(rngs, positions, spec.width) if positions else None

    @jax.named_scope("embedding")
    def __call__(
        self, images: UInt8[Array, "B I height width 3"], dtype: jnp.dtype, constrain: Constrain
    ) -> Float[Array, "B I*P D"]:
        """All patches of a row's image slots, in reading order."""
        spec = self.spec
        patches = constrain(normalised_patches(spec, images, dtype), ("batch", None, None, None))
        params = {"kernel": self.kernel} | ({} if self.bias is None else {"bias": self.bias})
        params |= {} if self.patch_positions is None else {"positions": self.patch_positions}

        def compute(patches: Array, weights: Weights, _: Constrain) -> Array:
            embedded = patches @ weights["kernel"]
            for name in ("bias", "positions"):
                embedded = embedded + weights[name] if name in weights else embedded
            return embedded

        embedded = on_rows(compute, patches, params, dtype, constrain)
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
