"""The decoder: blocks of attention and SwiGLU, stacked along a leading axis and scanned.

A block does not know how its queries find their keys. It is given `attend(q, k, v) -> (output, kept)`: over a packed
row in training, over a cache in generation; `kept` (nothing, keys and values, or the renewed cache) comes back
stacked over the layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from nmm_jax.models.layers import Norm, SwiGLU, rotate, weight
from nmm_jax.models.moe import EXCHANGED, MoE
from nmm_jax.models.router import CHOICE, Statistics
from nmm_jax.models.spec import Spec
from nmm_jax.parallel.sharding import Constrain

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

# What a layer keeps for its backward pass under model.remat = "minimal": the outputs of its large products and of
# attention, and what crossed the network. Norms, rotary turns and the activation are computed again.
KEPT = ("query", "key", "value", "attended", "ffn_gate", "ffn_up", *EXCHANGED)


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions and, perhaps, normalised queries and keys.

    QK-norm is over all heads together ("full", as in DCLM and OLMo 2) or over each head ("head").
    """

    def __init__(self, spec: Spec, layer: Array | int, *, rngs: nnx.Rngs):
        d, h, g, k = spec.width, spec.heads, spec.kv_heads, spec.head_dim
        inner = partial(weight, spec, rngs, role="inner", inputs=d)
        self.query = inner({"embed": d, "heads": h, "head_dim": k})
        self.key = inner({"embed": d, "kv_heads": g, "head_dim": k})
        self.value = inner({"embed": d, "kv_heads": g, "head_dim": k})
        out_axes = {"heads": h, "head_dim": k, "embed": d}
        self.out = weight(spec, rngs, out_axes, role="residual", inputs=h * k, layer=layer)
        self.qk_norm = spec.qk_norm != "none"
        if spec.qk_norm == "full":
            self.query_norm = Norm(spec, (h, k), ("heads", "head_dim"))
            self.key_norm = Norm(spec, (g, k), ("kv_heads", "head_dim"))
        elif spec.qk_norm == "head":
            self.query_norm = Norm(spec, (k,), ("head_dim",))
            self.key_norm = Norm(spec, (k,), ("head_dim",))

    def __call__(
        self, x: Float[Array, "B S D"], rotary: tuple[Array, Array], attend: Attend, constrain: Constrain
    ) -> tuple[Float[Array, "B S D"], Any]:
        q, k, v = (
            checkpoint_name(jnp.einsum("bsd,dhk->bshk", x, kernel[...].astype(x.dtype)), name)
            for kernel, name in ((self.query, "query"), (self.key, "key"), (self.value, "value"))
        )
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q = constrain(rotate(q, *rotary), ("batch", "sequence", "heads_act", None))
        attended, kept = attend(q, rotate(k, *rotary), v)
        attended = checkpoint_name(attended, "attended")
        return jnp.einsum("bshk,hkd->bsd", attended, self.out[...].astype(x.dtype)), kept


class Block(nnx.Module):
    """x + f(norm(x)), or x + norm(f(x)) where norms come after the sublayer; f is attention, then SwiGLU or experts."""

    def __init__(self, spec: Spec, layer: Array | int, *, rngs: nnx.Rngs, experts: bool):
        self.norm_after = spec.norm_position == "post"
        self.attention_norm = Norm(spec, (spec.width,), (None,))
        self.attention = SelfAttention(spec, layer, rngs=rngs)
        self.ffn_norm = Norm(spec, (spec.width,), (None,))
        self.ffn = MoE(spec, layer, rngs=rngs) if experts else SwiGLU(spec, layer, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotary: tuple[Array, Array],
        modality: Int[Array, "B S"],
        attend: Attend,
        constrain: Constrain,
    ) -> tuple[Float[Array, "B S D"], Any, Statistics]:
        """The output, what `attend` kept, and the router's statistics (models/moe.py), of which SwiGLU has none."""
        if self.norm_after:
            attended, kept = self.attention(x, rotary, attend, constrain)
            x = x + self.attention_norm(attended)
            y, statistics = self.feed_forward(x, modality, constrain)
            x = x + self.ffn_norm(y)
        else:
            attended, kept = self.attention(self.attention_norm(x), rotary, attend, constrain)
            x = x + attended
            y, statistics = self.feed_forward(self.ffn_norm(x), modality, constrain)
            x = x + y
        return constrain(x, ("batch", "sequence", "embed_act")), kept, statistics

    def feed_forward(self, x: Array, modality: Array, constrain: Constrain) -> tuple[Array, Statistics]:
        if isinstance(self.ffn, MoE):
            return self.ffn(x, modality, constrain)
        return self.ffn(x, constrain), {}


class Period(nnx.Module):
    """Consecutive layers of different kinds: the last has experts, the others are dense."""

    def __init__(self, spec: Spec, period: Array | int, *, rngs: nnx.Rngs):
        for j in range(spec.period):
            last = j == spec.period - 1
            setattr(self, f"block_{j}", Block(spec, period * spec.period + j, rngs=rngs, experts=last))


def stack_blocks(spec: Spec, *, rngs: nnx.Rngs) -> Block | Period:
    """One Block whose parameters have a leading axis of all layers, named "layers".

    Where only every n-th layer has experts, a Period of n blocks, each with a leading axis of depth / n.
    """

    @nnx.split_rngs(splits=spec.depth // spec.period)
    @nnx.vmap(in_axes=(0, 0), transform_metadata={nnx.PARTITION_NAME: "layers", "logical": "layers"})
    def make(rngs: nnx.Rngs, index: Array) -> Block | Period:
        if spec.period == 1:
            return Block(spec, index, rngs=rngs, experts=spec.moe is not None)
        return Period(spec, index, rngs=rngs)

    return make(rngs, jnp.arange(spec.depth // spec.period))


def run_blocks(
    spec: Spec,
    blocks: Block | Period,
    x: Float[Array, "B S D"],
    apply: Callable[..., tuple[Array, Any, Statistics]],
    per_layer: Any = None,
) -> tuple[Float[Array, "B S D"], Any, Statistics]:
    """x through all layers.

    Args:
      apply: (block, x, per_layer's slice) -> (x, kept, statistics), for one layer.
      per_layer: arrays with a leading axis of layers, such as a cache; or None.

    Returns:
      The output, what the layers kept, stacked, and the statistics of those with experts, stacked.
    """
    graph, state = nnx.split(blocks)
    period = spec.period

    def layer(j: int, params: Any, x: Array, own: Any) -> tuple[Array, Any, Statistics]:
        merged = nnx.merge(graph, params)
        return apply(merged if period == 1 else getattr(merged, f"block_{j}"), x, own)

    if spec.remat != "none":
        # Inside a loop nothing can undo the recomputation; unrolled, common subexpressions would be merged again.
        policy = remat_policy(spec.remat)
        layer = jax.checkpoint(layer, static_argnums=0, policy=policy, prevent_cse=not spec.scan_layers)

    def layers_of_period(x: Array, inputs: tuple[Any, Any]) -> tuple[Array, tuple[Any, Statistics]]:
        params, own = inputs
        kept = []
        for j in range(period):
            x, kept_here, statistics = layer(j, params, x, jax.tree.map(lambda a, j=j: a[j], own))
            kept.append(kept_here)
        return x, (jax.tree.map(lambda *a: jnp.stack(a), *kept), statistics)

    per_period = jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), per_layer)
    unroll = 1 if spec.scan_layers else spec.depth // period
    x, (kept, statistics) = jax.lax.scan(layers_of_period, x, (state, per_period), unroll=unroll)
    return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), kept), statistics


def remat_policy(name: str) -> Callable[..., bool]:
    """Which of a layer's values are kept for the backward pass, besides its input and its router's choice."""
    names = {"full": (), "exchanges": EXCHANGED, "minimal": KEPT}
    if name not in names:
        raise ValueError(f"model.remat = {name!r}; expected none, full, exchanges or minimal")
    return jax.checkpoint_policies.save_only_these_names(CHOICE, *names[name])
