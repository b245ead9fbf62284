"""The decoder: blocks of attention and SwiGLU, stacked along a leading axis and scanned.

A block does not know how its queries find their keys. It is given `attend(q, k, v) -> (output, kept)`: over a packed
row in training, over a cache in generation; `kept` (nothing, keys and values, or the renewed cache) comes back
stacked over the layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from nmm_jax.models.attention import ATTENDED
from nmm_jax.models.deep_fusion import ByModality
from nmm_jax.models.layers import ACTIVATIONS, FeedForward, Norm, bias, on_rows, product, rotate, weight
from nmm_jax.models.moe import EXCHANGED, MoE
from nmm_jax.models.router import CHOICE, Statistics
from nmm_jax.models.spec import StackSpec
from nmm_jax.parallel import gathered
from nmm_jax.parallel.sharding import Constrain

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

QKV = ("query", "key", "value")
MODULES = ("qkv", "out", "ffn", "norms")  # that modalities may have apart

# What a layer keeps for its backward pass under model.remat = "minimal": the outputs of its large products and of
# attention, and what crossed the network. Norms, rotary turns and the activation are computed again.
BLOCK_INPUT = "block_input"
KEPT = (*QKV, ATTENDED, "ffn_gate", "ffn_up", *EXCHANGED)


class SelfAttention(nnx.Module):
    """Grouped-query attention, perhaps with rotary positions and normalised queries and keys.

    QK-norm is over all heads together ("full", as in DCLM and OLMo 2) or over each head ("head").
    """

    def __init__(
        self,
        spec: StackSpec,
        layer: Array | int,
        *,
        rngs: nnx.Rngs,
        modules: Sequence[str] = MODULES,
        qkv_bias: bool | None = None,
    ):
        """modules: which weights it has, of MODULES. qkv_bias: of queries, keys and values, if not as the stack's."""
        d, h, g, k = spec.width, spec.heads, spec.kv_heads, spec.head_dim
        heads = {"query": {"heads": h, "head_dim": k}}
        heads |= {name: {"kv_heads": g, "head_dim": k} for name in ("key", "value")}
        if "qkv" in modules:
            for name, axes in heads.items():
                setattr(self, name, weight(spec, rngs, {"embed": d} | axes, role="inner", inputs=d))
                if spec.bias if qkv_bias is None else qkv_bias:
                    setattr(self, f"{name}_bias", bias(axes))
        if "out" in modules:
            axes = {"heads": h, "head_dim": k, "embed": d}
            self.out = weight(spec, rngs, axes, role="residual", inputs=h * k, layer=layer)
            if spec.bias:
                self.out_bias = bias({"embed": d})
        if "norms" in modules and spec.qk_norm == "full":
            self.query_norm = Norm(spec, (h, k), ("heads", "head_dim"))
            self.key_norm = Norm(spec, (g, k), ("kv_heads", "head_dim"))
        elif "norms" in modules and spec.qk_norm == "head":
            self.query_norm = Norm(spec, (k,), ("head_dim",))
            self.key_norm = Norm(spec, (k,), ("head_dim",))


class ImageWeights(nnx.Module):
    """The weights that image positions have for themselves in a deep block, under the names that the text's have."""

    def __init__(self, spec: StackSpec, layer: Array | int, *, rngs: nnx.Rngs):
        assert spec.deep
        modules = spec.deep.modules
        self.attention = SelfAttention(spec, layer, rngs=rngs, modules=modules, qkv_bias=spec.deep.qkv_bias or None)
        if "ffn" in modules:
            self.ffn = FeedForward(spec, layer, rngs=rngs)
        if "norms" in modules:
            self.attention_norm = Norm(spec, (spec.width,), (None,))
            self.ffn_norm = Norm(spec, (spec.width,), (None,))


class Block(nnx.Module):
    """x + f(norm(x)), or x + norm(f(x)) where norms come after the sublayer; f is attention, then SwiGLU or experts.

    A deep block has `image` besides, the weights that image positions have for themselves (models/deep_fusion.py).
    """

    def __init__(self, spec: StackSpec, layer: Array | int, *, rngs: nnx.Rngs, experts: bool, deep: bool):
        self.norm_after = spec.norm_position == "post"
        self.attention_norm = Norm(spec, (spec.width,), (None,))
        self.attention = SelfAttention(spec, layer, rngs=rngs)
        self.ffn_norm = Norm(spec, (spec.width,), (None,))
        self.ffn = MoE(spec, layer, rngs=rngs) if experts else FeedForward(spec, layer, rngs=rngs)
        if deep:
            self.image = ImageWeights(spec, layer, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotary: tuple[Array, Array] | None,
        modality: Int[Array, "B S"] | None,
        attend: Attend,
        constrain: Constrain,
        by_modality: ByModality | None = None,
    ) -> tuple[Float[Array, "B S D"], Any, Statistics]:
        """The output, what `attend` kept, and the router's statistics (models/moe.py), of which SwiGLU has none.

        Args:
          rotary: tables of layers.rotary_tables; None where positions are not rotary.
          modality: 0 text, 1 image, -1 padding; only experts ask for it.
          by_modality: of the batch, for a deep block. Without it all positions are text.
        """
        weights = Weights(self, by_modality, constrain)
        if self.norm_after:
            attended, kept = weights.attention(x, rotary, attend)
            x = x + weights.norm("attention_norm", attended)
            y, statistics = weights.feed_forward(x, modality)
            x = x + weights.norm("ffn_norm", y)
        else:
            attended, kept = weights.attention(weights.norm("attention_norm", x), rotary, attend)
            x = x + attended
            y, statistics = weights.feed_forward(weights.norm("ffn_norm", x), modality)
            x = x + y
        return constrain(x, ("batch", "sequence", "embed_act")), kept, statistics


@dataclasses.dataclass(frozen=True)
class Weights:
    """A block's sublayers, each with one set of weights or, where the block has them, with each modality's."""

    block: Block
    by_modality: ByModality | None
    constrain: Constrain

    def of_images(self, *path: str) -> Any:
        """block.image.<path>; None where there is none, or all positions are text."""
        module = getattr(self.block, "image", None) if self.by_modality else None
        for name in path:
            module = getattr(module, name, None)
        return module

    @property
    def apart(self) -> ByModality:
        assert self.by_modality is not None
        return self.by_modality

    def norm(self, name: str, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        text, image = getattr(self.block, name), self.of_images(name)
        return self.apart.select(text(x), image(x)) if image else text(x)

    @jax.named_scope("attention")
    def attention(
        self, x: Float[Array, "B S D"], rotary: tuple[Array, Array] | None, attend: Attend
    ) -> tuple[Float[Array, "B S D"], Any]:
        q, k, v = (checkpoint_name(y, n) for y, n in zip(self.query_key_value(x), QKV, strict=True))
        q, k = self.head_norm("query_norm", q), self.head_norm("key_norm", k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        with jax.named_scope("attend"):
            attended, kept = attend(self.constrain(q, ("batch", "sequence", "heads_act", None)), k, v)
        return self.attention_out(attended), kept

    def query_key_value(self, x: Float[Array, "B S D"]) -> list[Float[Array, "B S ?H K"]]:
        text, image = self.block.attention, self.of_images("attention")
        if getattr(image, "query", None) is None:
            params = {n: getattr(text, n) for n in QKV}
            found = self.products(x, params, 1, result_axes=("batch", None, "heads_act"))
        else:
            flat = [tuple(getattr(w, n)[...].reshape(x.shape[-1], -1) for w in (text, image)) for n in QKV]
            products = self.apart.products(x, flat)
            found = [y.reshape(*x.shape[:2], *getattr(text, n).shape[1:]) for y, n in zip(products, QKV, strict=True)]
        return [self.with_bias(y, text, image, f"{n}_bias") for y, n in zip(found, QKV, strict=True)]

    def head_norm(self, name: str, x: Float[Array, "B S H K"]) -> Float[Array, "B S H K"]:
        text, image = getattr(self.block.attention, name, None), self.of_images("attention", name)
        if text is None:
            return x
        if image is None:
            return text(x)
        flat = (y.reshape(*x.shape[:2], -1) for y in (text(x), image(x)))
        return self.apart.select(*flat).reshape(x.shape)

    def attention_out(self, attended: Float[Array, "B S H K"]) -> Float[Array, "B S D"]:
        text, image = self.block.attention, self.of_images("attention")
        if getattr(image, "out", None) is None:
            heads = ("batch", None, "heads_act")
            (y,) = self.products(attended, {"out": text.out}, 2, rows_axes=heads, result_axes=None)
        else:
            own, others = (w.out[...].reshape(-1, w.out.shape[-1]) for w in (text, image))
            y = self.apart.residual_product(attended.reshape(*attended.shape[:2], -1), (own, others))
        return self.with_bias(y, text, image, "out_bias")

    def products(self, x: Array, params: dict[str, nnx.Param], summed: int, **axes: Any) -> list[Array]:
        platform = self.constrain.platform

        def compute(x: Array, weights: gathered.Weights, _: Constrain) -> list[Array]:
            return [product(x, weights[name], platform, summed) for name in params]

        return on_rows(compute, x, params, x.dtype, self.constrain, **axes)

    def with_bias(self, y: Array, text: SelfAttention, image: SelfAttention | None, name: str) -> Array:
        own, others = getattr(text, name, None), getattr(image, name, None)
        if others is not None:
            zeros = jnp.zeros(others.shape) if own is None else own[...]
            flat = self.apart.select(zeros.reshape(-1), others[...].reshape(-1)).astype(y.dtype)
            return y + flat.reshape(*flat.shape[:2], *others.shape)
        return y if own is None else y + own[...].astype(y.dtype)

    @jax.named_scope("ffn")
    def feed_forward(self, x: Float[Array, "B S D"], modality: Array | None) -> tuple[Array, Statistics]:
        text, image = self.block.ffn, self.of_images("ffn")
        if isinstance(text, MoE):
            assert modality is not None
            return text(x, modality, self.constrain)
        if image is None:
            return text(x, self.constrain), {}
        names = ("gate", "up", "down") if text.gated else ("up", "down")
        pairs = [tuple(getattr(w, n)[...] for w in (text, image)) for n in names]
        return self.apart.feed_forward(x, pairs, ACTIVATIONS[text.activation]), {}


class Period(nnx.Module):
    """Consecutive layers of different kinds, with and without experts, deep and not."""

    def __init__(self, spec: StackSpec, period: Array | int, *, rngs: nnx.Rngs):
        for j in range(spec.period):
            kind = {"experts": spec.has_experts(j), "deep": spec.is_deep(j)}
            setattr(self, f"block_{j}", Block(spec, period * spec.period + j, rngs=rngs, **kind))


def stack_blocks(spec: StackSpec, *, rngs: nnx.Rngs) -> Block | Period:
    """One Block whose parameters have a leading axis of all layers, named "layers".

    Where layers are of several kinds, a Period of n blocks, each with a leading axis of depth / n.
    """

    @nnx.split_rngs(splits=spec.depth // spec.period)
    @nnx.vmap(in_axes=(0, 0), transform_metadata={nnx.PARTITION_NAME: "layers", "logical": "layers"})
    def make(rngs: nnx.Rngs, index: Array) -> Block | Period:
        if spec.period == 1:
            return Block(spec, index, rngs=rngs, experts=spec.has_experts(0), deep=spec.is_deep(0))
        return Period(spec, index, rngs=rngs)

    return make(rngs, jnp.arange(spec.depth // spec.period))


def run_blocks(
    spec: StackSpec,
    blocks: nnx.Module,
    x: Float[Array, "B S D"],
    apply: Callable[..., tuple[Array, Any, Statistics]],
    per_layer: Any = None,
    periods: int | None = None,
) -> tuple[Float[Array, "B S D"], Any, Statistics]:
    """x through all layers.

    Args:
      blocks: stacked, as stack_blocks makes them; a Period where layers are of several kinds.
      apply: (block, x, per_layer's slice) -> (x, kept, statistics), for one layer.
      per_layer: arrays with a leading axis of layers, such as a cache; or None.
      periods: only so many, from the first.

    Returns:
      The output, what the layers kept, stacked, and the statistics of those with experts, stacked.
    """
    graph, state = nnx.split(blocks)
    state = jax.tree.map(lambda a: a[:periods], state)
    period = spec.period

    def layer(j: int, params: Any, x: Array, own: Any) -> tuple[Array, Any, Statistics]:
        merged = nnx.merge(graph, params)
        return apply(merged if period == 1 else getattr(merged, f"block_{j}"), x, own)

    # Inside a loop nothing can undo the recomputation; unrolled, common subexpressions would be merged again.
    layer = jax.checkpoint(layer, static_argnums=0, policy=remat_policy(spec.remat), prevent_cse=not spec.scan_layers)

    def layers_of_period(x: Array, inputs: tuple[Any, Any]) -> tuple[Array, tuple[Any, Statistics]]:
        params, own = inputs
        kept, statistics = [], []
        for j in range(period):
            x = checkpoint_name(x, BLOCK_INPUT)
            x, kept_here, of_router = layer(j, params, x, jax.tree.map(lambda a, j=j: a[j], own))
            kept.append(kept_here)
            statistics += [of_router] if of_router else []
        return x, (_stacked(kept), _stacked(statistics) if statistics else {})

    per_period = jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), per_layer)
    unroll = 1 if spec.scan_layers else spec.depth // period
    x, by_period = jax.lax.scan(layers_of_period, x, (state, per_period), unroll=unroll)
    kept, statistics = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), by_period)
    return x, kept, statistics


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def remat_policy(name: str) -> Callable[..., bool]:
    """Which of a layer's values are kept for the backward pass, besides its input and its router's choice."""
    if name == "none":
        return gathered.is_kept
    names = {"full": (), "exchanges": EXCHANGED, "minimal": KEPT}
    if name not in names:
        raise ValueError(f"model.remat = {name!r}; expected none, full, exchanges or minimal")
    return jax.checkpoint_policies.save_only_these_names(CHOICE, *names[name])


def stack_policy(name: str) -> Callable[..., bool]:
    """The same for a stack that is rematerialised from outside too: its layers' inputs are kept, or all products."""
    policies = jax.checkpoint_policies
    if name == "none":
        return policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names(ATTENDED))
    kept = KEPT if name == "minimal" else ()
    return policies.save_only_these_names(CHOICE, BLOCK_INPUT, *kept)
