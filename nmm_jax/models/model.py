"""A model as pure functions of a pytree of parameters: what training, evaluation and checkpoints see of it.

NNX describes the network; here it is split into a static definition and a pure dict of arrays. Parameters of the
layers are stacked on their first axis:

    embed/tokens [V,D]   patches/{kernel [patch*patch*3,D], bias [D], patch_positions [P,D]}
    layers/attention/{query,key,value,out,...}, layers/ffn/{gate,up,down}, layers/*_norm/scale   final_norm/scale [D]
    head/kernel [D,V] (absent when embeddings are tied)

Late fusion has vision/... (models/vision.py) and connector/... (models/connectors.py) in the place of patches; deep
fusion has layers/image/... beside the text's weights, under the same names. With experts a layer has
ffn/router/kernel [D,E], ffn/experts/{gate,up [E,D,F], down [E,F,D]} and perhaps ffn/shared; where layers differ, only
every n-th having experts, layers/block_0/... to layers/block_<n-1>/... are stacked apart.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from nmm_jax.models.deep_fusion import with_copies
from nmm_jax.models.multimodal import Cache, Multimodal
from nmm_jax.models.router import Statistics, rebalanced
from nmm_jax.models.spec import Spec
from nmm_jax.parallel.sharding import ON_ONE_DEVICE, Constrain

Params = dict[str, Any]

ROUTER_LOSSES = ("balance_loss", "router_z_loss")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Static: holds no arrays, compares by identity, may be closed over by a jitted function.

    What a family's network is asked for is added by its own class: LanguageModel below, those of encoders beside them.
    """

    config: ConfigDict
    spec: Spec
    definition: nnx.GraphDef
    abstract: Params  # of jax.ShapeDtypeStruct, float32
    logical_axes: Params  # the same tree; each leaf is the tuple of its axes' names

    Network: ClassVar[Callable[..., nnx.Module]]  # (spec, rngs=) -> the module

    @classmethod
    def of(cls, config: ConfigDict) -> Self:
        """The model a config describes, without allocating any of it."""
        spec = Spec.from_config(config)
        network = nnx.eval_shape(lambda: cls.Network(spec, rngs=nnx.Rngs(params=0)))
        definition, state = nnx.split(network, nnx.Param)  # an error if there is state besides the parameters
        abstract = nnx.to_pure_dict(state)
        axes = jax.tree.map(
            lambda param: param.get_metadata("logical"), state, is_leaf=lambda node: isinstance(node, nnx.Variable)
        )
        return cls(config, spec, definition, abstract, nnx.to_pure_dict(axes))

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters. Jit it with out_shardings to create every shard in its place."""
        _, state = nnx.split(self.Network(self.spec, rngs=nnx.Rngs(params=key)), nnx.Param)
        params = nnx.to_pure_dict(state)
        return with_copies(params) if self.spec.deep and self.spec.deep.copied else params

    def network(self, params: Params) -> Any:
        """The module, with these parameters."""
        return nnx.merge(self.definition, params)

    def after_update(self, params: Params) -> Params:
        """The parameters after an optimizer's step, put back to where they may be."""
        return params


class LanguageModel(Model):
    """Early, late and deep fusion: predicts text after text and images."""

    Network = Multimodal

    def hidden(
        self, params: Params, batch: dict[str, Array], *, constrain: Constrain = ON_ONE_DEVICE
    ) -> tuple[Float[Array, "B S D"], Statistics]:
        """Last hidden states of a packed batch, in the compute type, and what its routers did ({} without any).

        Args:
          batch: tokens, segment_ids, attend_until, positions, image_index [B,S] and images [B,I,height,width,3] uint8.
          constrain: lays activations out over the mesh, given the names of their axes.

        Returns:
          x, and of the L layers with experts: balance_loss and router_z_loss [] (means over layers), expert_tokens
          int32 [L,2,E] ((token, choice) pairs of text and of images that chose each expert), dropped_tokens int32 [L]
          (those that found no room in a bounded buffer), router_entropy [L,2] (sums over tokens, nats). In late fusion
          vision_slots int32 []: image slots that the vision tower went through.
        """
        x, _, statistics = self.network(params)(batch, constrain)
        losses = {k: v.mean() for k, v in statistics.items() if k in ROUTER_LOSSES}
        return x, statistics | losses

    def rebalanced(self, params: Params, expert_tokens: Int[Array, "L 2 E"]) -> Params:
        """The parameters with the routers' biases moved after a step, where they balance the load; else as they are."""
        moe = self.spec.moe
        if moe is None or moe.balance != "bias" or moe.modality == "fixed":
            return params

        # Layers with experts come period by period; layers/block_j has every so many of them.
        with_experts = [f"block_{j}" for j in range(self.spec.period) if self.spec.has_experts(j)]

        def move(path: Any, x: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if not name.endswith("ffn/router/bias"):
                return x
            block = name.split("/")[1]
            first = with_experts.index(block) if block in with_experts else 0
            return rebalanced(moe, x, expert_tokens[first :: len(with_experts)])

        return jax.tree_util.tree_map_with_path(move, params)

    def unembedding(self, params: Params) -> Float[Array, "D V"]:
        """The float32 matrix from hidden states to logits."""
        return params["embed"]["tokens"].T if self.spec.tie_embeddings else params["head"]["kernel"]

    def prefill(
        self, params: Params, batch: dict[str, Array], *, constrain: Constrain = ON_ONE_DEVICE
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Hidden states of prompts, and the cache to go on from.

        Each row holds one document from its first position on, with padding behind; generated tokens take the
        padding's place, so a row has room for S positions in all.

        Returns:
          Hidden states, and a cache of {"key", "value": [L,B,S,G,K], "rotary_offset": [B]}; the last is what a row's
          rotary positions lag behind its places (nothing, unless the patches of an image share one).
        """
        hidden, (keys, values), _ = self.network(params)(batch, constrain, keep_cache=True)
        last = jnp.maximum((batch["segment_ids"] == 1).sum(1) - 1, 0)
        rotary = jnp.take_along_axis(batch["positions"], last[:, None], axis=1)[:, 0]
        return hidden, {"key": keys, "value": values, "rotary_offset": rotary - last}

    def decode(
        self,
        params: Params,
        token: Int[Array, "B"],
        position: Int[Array, "B"],
        cache: Cache,
        *,
        constrain: Constrain = ON_ONE_DEVICE,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Hidden states after one more text token a row, at place `position` of it (from 0), and the renewed cache."""
        return self.network(params).decode(token, position, cache, constrain)
