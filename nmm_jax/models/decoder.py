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
from jaxtyping import Array, Float

from nmm_jax.models.layers import Constrain, Norm, SwiGLU, rotate, weight
from nmm_jax.models.spec import Spec

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

# What a layer keeps for its backward pass under model.remat = "minimal": the outputs of its large products and of
# attention. Norms, rotary turns and the activation are computed again.
KEPT = ("query", "key", "value", "attended", "ffn_gate", "ffn_up")


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
    """x + f(norm(x)), or x + norm(f(x)) where norms come after the sublayer; f is attention, then SwiGLU."""

    def __init__(self, spec: Spec, layer: Array | int, *, rngs: nnx.Rngs):
        self.norm_after = spec.norm_position == "post"
        self.attention_norm = Norm(spec, (spec.width,), (None,))
        self.attention = SelfAttention(spec, layer, rngs=rngs)
        self.ffn_norm = Norm(spec, (spec.width,), (None,))
        self.ffn = SwiGLU(spec, layer, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S D"], rotary: tuple[Array, Array], attend: Attend, constrain: Constrain
    ) -> tuple[Float[Array, "B S D"], Any]:
        if self.norm_after:
            attended, kept = self.attention(x, rotary, attend, constrain)
            x = x + self.attention_norm(attended)
            x = x + self.ffn_norm(self.ffn(x, constrain))
        else:
            attended, kept = self.attention(self.attention_norm(x), rotary, attend, constrain)
            x = x + attended
            x = x + self.ffn(self.ffn_norm(x), constrain)
        return constrain(x, ("batch", "sequence", "embed_act")), kept


def stack_blocks(spec: Spec, *, rngs: nnx.Rngs) -> Block:
    """One Block whose parameters have a leading axis of all layers, named "layers"."""

    @nnx.split_rngs(splits=spec.depth)
    @nnx.vmap(in_axes=(0, 0), transform_metadata={nnx.PARTITION_NAME: "layers", "logical": "layers"})
    def make(rngs: nnx.Rngs, layer: Array) -> Block:
        return Block(spec, layer, rngs=rngs)

    return make(rngs, jnp.arange(spec.depth))


def run_blocks(
    spec: Spec, blocks: Block, x: Float[Array, "B S D"], apply: Callable[..., tuple[Array, Any]], per_layer: Any = None
) -> tuple[Float[Array, "B S D"], Any]:
    """x through all layers.

    Args:
      apply: (block, x, per_layer's slice) -> (x, kept), for one layer.
      per_layer: arrays with a leading axis of layers, such as a cache; or None.

    Returns:
      The output, and what the layers kept, stacked.
    """
    graph, state = nnx.split(blocks)

    def layer(x, inputs):
        params, own = inputs
        return apply(nnx.merge(graph, params), x, own)

    if spec.remat != "none":
        # Inside a loop nothing can undo the recomputation; unrolled, common subexpressions would be merged again.
        layer = jax.checkpoint(layer, policy=remat_policy(spec.remat), prevent_cse=not spec.scan_layers)
    return jax.lax.scan(layer, x, (state, per_layer), unroll=1 if spec.scan_layers else spec.depth)


def remat_policy(name: str) -> Callable[..., bool]:
    """Which of a layer's values are kept for the backward pass."""
    if name == "full":
        return jax.checkpoint_policies.nothing_saveable
    if name == "minimal":
        return jax.checkpoint_policies.save_only_these_names(*KEPT)
    raise ValueError(f"model.remat = {name!r}; expected none, full or minimal")
