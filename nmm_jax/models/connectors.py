"""From the patches of a vision tower to the positions that an image takes in the decoder.

    kind          what it does                                                   parameters, under connector/
    linear        one linear layer                                               out
    mlp           linear, GELU, linear (LLaVA-1.5, arXiv 2310.03744)             up, down
    average       the grid averaged to n x n, linear                             out
    attention     learned queries look at the patches, linear                    queries, (enter), layer_i, norm, out
    c_abstractor  convolutions, the grid averaged to n x n, convolutions, MLP    positions, stage1, stage2, readout
    glu           (2 x 2 patches to one), linear, norm, GELU, SwiGLU (CogVLM)    (downsample), enter, norm, ffn

linear, mlp and glu keep every patch (glu every square of patches); the others make of them as many as are asked for.
Average, attention and C-Abstractor are those that MM1 compares (arXiv 2403.09611, section 3.2).

Letters in shapes: N images, P patches, M positions, I width that comes in, D width that goes out, W width inside.
"""

import abc
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from nmm_jax.models.attention import masked_attention
from nmm_jax.models.decoder import SelfAttention
from nmm_jax.models.initializers import initialize
from nmm_jax.models.layers import ACTIVATIONS, FeedForward, Norm, position_table
from nmm_jax.models.spec import ConnectorSpec, StackSpec
from nmm_jax.parallel.sharding import Axes, Constrain

NORM_EPS = 1e-5  # of C-Abstractor and glu, whose code bases have it whatever the vision tower's is
SQUEEZE = 0.25  # of the channels that enter a block: those inside its squeeze-excitation


class Connector(nnx.Module):
    """What all of them are."""

    @abc.abstractmethod
    def __call__(self, features: Float[Array, "N P I"], constrain: Constrain) -> Float[Array, "N M D"]:
        """Features in reading order, without a class token, to the decoder's positions, in the features' type."""


def make_connector(spec: ConnectorSpec, *, rngs: nnx.Rngs) -> Connector:
    """The connector of a spec, whose numbers fit each other (configs/validation.py has looked)."""
    if spec.kind in ("linear", "mlp", "glu"):
        assert spec.positions == (spec.side // spec.downsample) ** 2, spec
    return KINDS[spec.kind](spec, rngs=rngs)


class Linear(nnx.Module):
    """x @ kernel, plus a bias if it has one. Also a convolution of 1 x 1."""

    def __init__(
        self, stack: StackSpec, inputs: int, outputs: int, axes: Axes, *, rngs: nnx.Rngs, has_bias: bool = True
    ):
        kernel = initialize(stack, rngs.params(), (inputs, outputs), role="inner", fan_in=inputs)
        self.kernel = nnx.Param(kernel, logical=axes)
        self.has_bias = has_bias
        if has_bias:
            self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32), logical=axes[1:])

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... D"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y


class MLP(Connector):
    """down(activation(up(x)))."""

    def __init__(
        self,
        stack: StackSpec,
        inputs: int,
        outputs: int,
        activation: Callable[[Array], Array] = ACTIVATIONS["gelu"],
        *,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.up = Linear(stack, inputs, stack.width, ("embed", "mlp"), rngs=rngs)
        self.down = Linear(stack, stack.width, outputs, ("mlp", "embed"), rngs=rngs)

    def __call__(self, features: Float[Array, "N P I"], constrain: Constrain) -> Float[Array, "N P D"]:
        inner = constrain(self.activation(self.up(features)), ("batch", "sequence", "mlp_act"))
        return self.down(inner)


class LinearConnector(Connector):
    def __init__(self, spec: ConnectorSpec, *, rngs: nnx.Rngs):
        self.out = Linear(_stack(spec), spec.inputs, spec.outputs, (None, "embed"), rngs=rngs)

    def __call__(self, features: Float[Array, "N P I"], constrain: Constrain) -> Float[Array, "N P D"]:
        return self.out(features)


class Average(LinearConnector):
    def __init__(self, spec: ConnectorSpec, *, rngs: nnx.Rngs):
        super().__init__(spec, rngs=rngs)
        self.edge = math.isqrt(spec.positions)

    def __call__(self, features: Float[Array, "N P I"], constrain: Constrain) -> Float[Array, "N M D"]:
        return self.out(_line(average_pool(_grid(features), self.edge)))


class CrossAttention(nnx.Module):
    """Queries look at patches, both normalised first; and at each other, if they are among the keys (Perceiver)."""

    def __init__(self, stack: StackSpec, *, rngs: nnx.Rngs, among_keys: bool):
        self.among_keys = among_keys
        self.query_norm = Norm(stack, (stack.width,), (None,))
        self.patch_norm = Norm(stack, (stack.width,), (None,))
        self.attention = SelfAttention(stack, 0, rngs=rngs)

    def __call__(
        self, queries: Float[Array, "N M W"], patches: Float[Array, "N P W"], constrain: Constrain
    ) -> Float[Array, "N M W"]:
        def heads(x: Array, name: str) -> Array:
            kernel, bias = (getattr(self.attention, n)[...].astype(x.dtype) for n in (name, f"{name}_bias"))
            y = jnp.einsum("nsw,whk->nshk", x, kernel) + bias
            return constrain(y, ("batch", "sequence", "heads_act", None))

        queries, keys = self.query_norm(queries), self.patch_norm(patches)
        if self.among_keys:
            keys = jnp.concatenate([keys, queries], axis=1)
        mask = jnp.ones((len(keys), queries.shape[1], keys.shape[1]), bool)
        # The scores, P x M a head, are computed again in the backward pass.
        attend = jax.checkpoint(masked_attention)
        found = attend(heads(queries, "query"), heads(keys, "key"), heads(keys, "value"), mask)
        out, bias = (getattr(self.attention, n)[...].astype(found.dtype) for n in ("out", "out_bias"))
        return jnp.einsum("nshk,hkw->nsw", found, out) + bias


class ResamplerLayer(nnx.Module):
    """x + attention(x, patches), then x + ffn(norm(x)) with a GELU between four times the width."""

    def __init__(self, stack: StackSpec, *, rngs: nnx.Rngs):
        self.cross = CrossAttention(stack, rngs=rngs, among_keys=True)
        self.ffn_norm = Norm(stack, (stack.width,), (None,))
        self.ffn = FeedForward(stack, 0, rngs=rngs)

    def __call__(
        self, x: Float[Array, "N M W"], patches: Float[Array, "N P W"], constrain: Constrain
    ) -> Float[Array, "N M W"]:
        x = x + self.cross(x, patches, constrain)
        return x + self.ffn(self.ffn_norm(x), constrain)


class Attention(Connector):
    """M learned queries, in one of two forms; behind either a LayerNorm and a linear layer.

    One layer is attention pooling as CoCa (arXiv 2205.01917) and Qwen-VL (arXiv 2308.12966) have it: cross-attention
    alone, nothing added to its output (and none of Qwen's fixed positions). Several are the Perceiver resampler of
    Flamingo (arXiv 2204.14198): residual layers of attention, in which the queries are keys as well, and feed-forward.
    Flamingo's products have no biases; these have, as PyTorch's MultiheadAttention in the other two. Patches of another
    width than the connector's go through a matrix first, as Qwen-VL's.
    """

    def __init__(self, spec: ConnectorSpec, *, rngs: nnx.Rngs):
        self.depth, width = spec.depth, spec.width
        stack = _stack(spec)
        self.queries = position_table(rngs, spec.positions, width)
        self.narrows = spec.inputs != width
        if self.narrows:
            self.enter = Linear(stack, spec.inputs, width, (None, "embed"), rngs=rngs, has_bias=False)
        for i in range(self.depth):
            pooling = self.depth == 1
            layer = CrossAttention(stack, rngs=rngs, among_keys=False) if pooling else ResamplerLayer(stack, rngs=rngs)
            setattr(self, f"layer_{i}", layer)
        self.norm = Norm(stack, (width,), (None,))
        self.out = Linear(stack, width, spec.outputs, (None, "embed"), rngs=rngs)

    def __call__(self, features: Float[Array, "N P I"], constrain: Constrain) -> Float[Array, "N M D"]:
        patches = self.enter(features) if self.narrows else features
        x = jnp.broadcast_to(self.queries[...].astype(patches.dtype), (len(patches), *self.queries.shape))
        for i in range(self.depth):
            x = getattr(self, f"layer_{i}")(x, patches, constrain)
        return self.out(self.norm(x))


class SqueezeExcitation(nnx.Module):
    """Each channel times sigmoid(excite(silu(squeeze(mean of the grid)))) (Hu et al., arXiv 1709.01507)."""

    def __init__(self, stack: StackSpec, inside: int, *, rngs: nnx.Rngs):
        self.squeeze = Linear(stack, stack.width, inside, (None, None), rngs=rngs)
        self.excite = Linear(stack, inside, stack.width, (None, None), rngs=rngs)

    def __call__(self, x: Float[Array, "N rows columns W"]) -> Float[Array, "N rows columns W"]:
        mean = x.mean((1, 2), dtype=jnp.float32).astype(x.dtype)
        return x * jax.nn.sigmoid(self.excite(jax.nn.silu(self.squeeze(mean))))[:, None, None]


class Bottleneck(nnx.Module):
    """RegNet's block as C-Abstractor has it: bottle ratio 1, groups of one channel, LayerNorm over channels.

    x -> 1x1 norm silu -> 3x3 depthwise norm silu -> squeeze-excitation -> 1x1 norm -> + -> silu
    `-------------------- 1x1 norm where the number of channels changes --------------'
    """

    def __init__(self, stack: StackSpec, inputs: int, *, rngs: nnx.Rngs):
        width = stack.width
        self.conv1 = Linear(stack, inputs, width, ("embed", "mlp"), rngs=rngs, has_bias=False)
        self.norm1 = Norm(stack, (width,), (None,))
        kernel = initialize(stack, rngs.params(), (3, 3, width), role="inner", fan_in=9)
        self.depthwise = nnx.Param(kernel, logical=(None, None, None))
        self.norm2 = Norm(stack, (width,), (None,))
        self.se = SqueezeExcitation(stack, _squeezed(inputs), rngs=rngs)
        self.conv3 = Linear(stack, width, width, ("mlp", "embed"), rngs=rngs, has_bias=False)
        self.norm3 = Norm(stack, (width,), (None,))
        self.widens = inputs != width
        if self.widens:
            self.shortcut = Linear(stack, inputs, width, (None, "embed"), rngs=rngs, has_bias=False)
            self.shortcut_norm = Norm(stack, (width,), (None,))

    def __call__(self, x: Float[Array, "N rows columns I"]) -> Float[Array, "N rows columns W"]:
        y = jax.nn.silu(self.norm1(self.conv1(x)))
        y = jax.nn.silu(self.norm2(depthwise_convolution(y, self.depthwise[...])))
        y = self.norm3(self.conv3(self.se(y)))
        return jax.nn.silu(y + (self.shortcut_norm(self.shortcut(x)) if self.widens else x))


class Stage(nnx.Module):
    """Blocks one after the other, the first from `inputs` channels."""

    def __init__(self, stack: StackSpec, inputs: int, *, rngs: nnx.Rngs):
        self.depth = stack.depth
        for i in range(stack.depth):
            setattr(self, f"block_{i}", Bottleneck(stack, stack.width if i else inputs, rngs=rngs))

    def __call__(self, x: Float[Array, "N rows columns I"]) -> Float[Array, "N rows columns W"]:
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        return x


class CAbstractor(Connector):
    """Honeybee's (Cha et al., arXiv 2312.06742): what is near in the image stays near. Weights begin as N(0, 0.02)."""

    def __init__(self, spec: ConnectorSpec, *, rngs: nnx.Rngs):
        stack = _stack(spec, init="normal", norm_eps=NORM_EPS)
        self.edge = math.isqrt(spec.positions)
        self.positions = position_table(rngs, spec.side**2, spec.inputs)
        self.stage1 = Stage(stack, spec.inputs, rngs=rngs)
        self.stage2 = Stage(stack, spec.width, rngs=rngs)
        readout = _stack(spec, init="normal", width=spec.outputs)
        self.readout = MLP(readout, spec.width, spec.outputs, jax.nn.silu, rngs=rngs)

    def __call__(self, features: Float[Array, "N P I"], constrain: Constrain) -> Float[Array, "N M D"]:
        x = self.stage1(_grid(features + self.positions[...].astype(features.dtype)))
        x = self.stage2(average_pool(x, self.edge))
        return self.readout(_line(x), constrain)


class GLU(Connector):
    """CogVLM's adapter (Wang et al., arXiv 2311.03079); `downsample` is CogVLM2's convolution before it."""

    def __init__(self, spec: ConnectorSpec, *, rngs: nnx.Rngs):
        self.downsampled = spec.downsample
        stack = _stack(spec, width=spec.outputs, ffn="swiglu", ffn_width=spec.width, bias=False)
        if self.downsampled > 1:
            square = self.downsampled**2 * spec.inputs
            self.downsample = Linear(stack, square, spec.inputs, ("embed", None), rngs=rngs)
        self.enter = Linear(stack, spec.inputs, spec.outputs, (None, "embed"), rngs=rngs, has_bias=False)
        self.norm = Norm(_stack(spec, norm_eps=NORM_EPS), (spec.outputs,), (None,))
        self.ffn = FeedForward(stack, 0, rngs=rngs)

    def __call__(self, features: Float[Array, "N P I"], constrain: Constrain) -> Float[Array, "N M D"]:
        if self.downsampled > 1:
            features = self.downsample(_line(squares(_grid(features), self.downsampled)))
        x = ACTIVATIONS["gelu"](self.norm(self.enter(features)))
        return self.ffn(x, constrain)


def _mlp(spec: ConnectorSpec, *, rngs: nnx.Rngs) -> MLP:
    return MLP(_stack(spec), spec.inputs, spec.outputs, rngs=rngs)


KINDS: dict[str, Callable[..., Connector]] = {
    "linear": LinearConnector,
    "mlp": _mlp,
    "average": Average,
    "attention": Attention,
    "c_abstractor": CAbstractor,
    "glu": GLU,
}


def average_pool(x: Float[Array, "N S S C"], edge: int) -> Float[Array, "N edge edge C"]:
    """Adaptive average pooling with the bins of PyTorch's AdaptiveAvgPool2d: they may overlap, and differ in size."""
    matrix = jnp.asarray(pooling_matrix(x.shape[1], edge))
    y = jnp.einsum(
        "ar,bc,nrcd->nabd", matrix, matrix, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )  # an average of many values loses digits in bfloat16
    return y.astype(x.dtype)


def pooling_matrix(size: int, bins: int) -> Float[np.ndarray, "bins size"]:
    """Averages a line of `size` values: bin i is over those from floor(i size / bins) to ceil((i + 1) size / bins).

    5 values in 3 bins:   0 1 2 3 4
                          x x . . .
                          . x x x .
                          . . . x x
    """
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        begin, end = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def depthwise_convolution(x: Float[Array, "N rows columns C"], kernel: Float[Array, "3 3 C"]) -> Float[Array, "..."]:
    """Each channel with its own 3 x 3, zeros around the grid; summed in float32.

    Nine shifted products and not a grouped convolution: XLA has no fast one on CPU (2 cores, JAX 0.10.2, 4 grids of
    27 x 27 x 256: 25 ms against 1.5 ms, forward and backward 111 ms against 23 ms), and these become one loop.
    """
    rows, columns = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        padded[:, i : i + rows, j : j + columns].astype(jnp.float32) * kernel[i, j] for i in range(3) for j in range(3)
    ]
    return sum(taps, jnp.float32(0)).astype(x.dtype)


def squares(x: Float[Array, "N S S C"], edge: int) -> Float[Array, "N S/edge S/edge edge*edge*C"]:
    """edge x edge neighbours side by side, their values ordered (row, column, channel).

    The product with a matrix is a convolution of that size and stride; of a kernel [C', C, edge, edge] of PyTorch the
    matrix is kernel.transpose(2, 3, 1, 0) with the first three axes as one.
    """
    n, side, _, channels = x.shape
    x = x.reshape(n, side // edge, edge, side // edge, edge, channels).swapaxes(2, 3)
    return x.reshape(n, side // edge, side // edge, edge * edge * channels)


def flops(spec: ConnectorSpec) -> int:
    """Of one image, forward: two for each multiply-add of a product or convolution; averages count nothing."""
    total = sum(2 * rows * inputs * outputs for rows, inputs, outputs in _products(spec))
    patches, positions = spec.side**2, spec.positions
    if spec.kind == "attention":
        keys = patches if spec.depth == 1 else patches + positions
        total += spec.depth * 2 * 2 * positions * keys * spec.width  # q k and weights v
    if spec.kind == "c_abstractor":
        total += spec.depth * 2 * 9 * spec.width * (patches + positions)
    return total


def _products(spec: ConnectorSpec) -> Iterator[tuple[int, int, int]]:
    """Rows of one image that a matrix is multiplied with, its inputs and outputs."""
    patches, positions = spec.side**2, spec.positions
    inputs, width, outputs = spec.inputs, spec.width, spec.outputs
    if spec.kind in ("linear", "average"):
        yield positions, inputs, outputs
    elif spec.kind == "mlp":
        yield positions, inputs, width
        yield positions, width, outputs
    elif spec.kind == "attention":
        if inputs != width:
            yield patches, inputs, width
        for _ in range(spec.depth):
            keys = patches if spec.depth == 1 else patches + positions
            for rows in (positions, keys, keys, positions):
                yield rows, width, width
            if spec.depth > 1:
                yield positions, width, 4 * width
                yield positions, 4 * width, width
        yield positions, width, outputs
    elif spec.kind == "c_abstractor":
        for stage, rows in enumerate((patches, positions)):
            for block in range(spec.depth):
                entering = width if stage or block else inputs
                yield rows, entering, width
                yield 1, width, _squeezed(entering)
                yield 1, _squeezed(entering), width
                yield rows, width, width
                if entering != width:
                    yield rows, entering, width
        yield positions, width, outputs
        yield positions, outputs, outputs
    elif spec.kind == "glu":
        if spec.downsample > 1:
            yield positions, spec.downsample**2 * inputs, inputs
        yield positions, inputs, outputs
        for _ in ("gate", "up", "down"):
            yield positions, outputs, width


def _stack(
    spec: ConnectorSpec,
    *,
    width: int = 0,
    ffn: str = "gelu",
    ffn_width: int = 0,
    bias: bool = True,
    init: str = "",
    norm_eps: float = 0.0,
) -> StackSpec:
    """What the parts of blocks read: LayerNorm, biases, a feed-forward layer of four times the width."""
    width = width or spec.width
    return StackSpec(
        width=width,
        depth=max(spec.depth, 1),
        heads=spec.heads,
        kv_heads=spec.heads,
        head_dim=width // spec.heads,
        ffn=ffn,
        ffn_width=ffn_width or 4 * width,
        bias=bias,
        norm="layernorm",
        norm_eps=norm_eps or spec.norm_eps,
        norm_position="pre",
        qk_norm="none",
        rope_theta=0.0,
        init=init or spec.init,
        dtype="",
        attention="",
        scan_layers=False,
        remat="none",
        moe=None,
        deep=None,
    )


def _squeezed(inputs: int) -> int:
    return round(SQUEEZE * inputs)


def _grid(features: Float[Array, "N P C"]) -> Float[Array, "N S S C"]:
    n, patches, channels = features.shape
    side = math.isqrt(patches)
    return features.reshape(n, side, side, channels)


def _line(grid: Float[Array, "N S S C"]) -> Float[Array, "N P C"]:
    return grid.reshape(len(grid), -1, grid.shape[-1])
